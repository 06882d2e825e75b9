package overlay_test

import (
	"errors"
	"fmt"
	"net/netip"

	"example.com/overlay"
)

// agent is what is tested: it sends every packet to the overlay host that NextHop names, until its device is no more.
func agent(dev overlay.Device, send func(peer netip.Addr, packet []byte)) error {
	for {
		packets, err := dev.Queues()[0].ReadBatch()
		if err != nil {
			return err
		}
		for _, p := range packets {
			peer, ok := dev.NextHop(p.Data, nil)
			if !ok {
				continue
			}
			for i := range p.Segments() { // one, unless p is a superpacket
				send(peer, p.AppendSegment(nil, i))
			}
		}
	}
}

// A test plays the kernel and the peers of an agent, without root.
func ExamplePipe() {
	dev, host, err := overlay.Pipe(overlay.Config{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")},
		Routes: []overlay.Route{{
			Prefix: netip.MustParsePrefix("192.168.0.0/16"),
			Via:    []overlay.Gateway{{Addr: netip.MustParseAddr("10.0.0.7")}},
		}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		fmt.Println(err)
		return
	}

	sent := make(chan string, 1)
	ended := make(chan error)
	go func() {
		ended <- agent(dev, func(peer netip.Addr, packet []byte) { sent <- fmt.Sprintf("%d bytes to %v", len(packet), peer) })
	}()

	// The kernel hands over a packet from 10.0.0.1 to 192.168.5.5.
	packet := []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0, 10, 0, 0, 1, 192, 168, 5, 5}
	if _, err := host.Queues()[0].Write(packet); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(<-sent)

	// Somebody deletes the link.
	host.Close()
	fmt.Println(errors.Is(<-ended, overlay.ErrGone))
	// Output:
	// 20 bytes to 10.0.0.7
	// true
}
