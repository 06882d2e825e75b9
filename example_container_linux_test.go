package overlay_test

import (
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"

	"example.com/overlay"
)

// In a container. With --cap-add NET_ADMIN --device /dev/net/tun all works but the settings in /proc/sys, which are read-only there:
// New makes a missing node where it may, and what could not be set is an event.
func Example_container() {
	cfg := overlay.Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24"), netip.MustParsePrefix("fd42::1/64")}}
	dev, err := overlay.New(cfg)
	if errors.Is(err, os.ErrPermission) {
		log.Print(err)      // the error says whether it is the node, making it, or CAP_NET_ADMIN
		cfg.Disabled = true // a relay, say, can do without: the same code, and nothing to read
		dev, err = overlay.New(cfg)
	}
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil { // not because of a setting
		log.Fatal(err)
	}
	for e := range dev.Events() {
		if e.Kind == overlay.EventDegraded {
			fmt.Println(e) // degraded (3): set ipv6/accept_ra=0: read-only file system; …
		}
	}
}
