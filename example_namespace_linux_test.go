package overlay_test

import (
	"fmt"
	"log"
	"net"
	"net/netip"

	"example.com/overlay"
)

// The device lives in another network namespace, a container's for example, while the daemon and its sockets stay in the host's:
// what is in there reaches the world through the overlay alone. It takes CAP_SYS_ADMIN to open, and no thread is left in there.
func Example_networkNamespace() {
	dev, err := overlay.New(overlay.Config{
		NetNS:    "/run/netns/blue", // `ip netns add blue`; of a container /proc/PID/ns/net
		Name:     "overlay0",        // may be taken here: names are the namespace's
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")},
		Routes: []overlay.Route{{
			Prefix: netip.MustParsePrefix("0.0.0.0/0"), Table: 254, // main: in there the overlay is all there is
			Via: []overlay.Gateway{{Addr: netip.MustParseAddr("10.42.0.2")}},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil { // from any goroutine, as everything
		log.Fatal(err)
	}
	socket, err := net.ListenUDP("udp", &net.UDPAddr{Port: 4242}) // here, in the host's
	if err != nil {
		log.Fatal(err)
	}
	defer socket.Close()
	fmt.Println(dev.State())
}
