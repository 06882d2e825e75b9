// Command hello is the program on the first screen of the README: it prints where each packet of the overlay goes.
package main

import (
	"fmt"
	"net/netip"

	"example.com/overlay"
)

func main() {
	dev, err := overlay.New(overlay.Config{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")}, // our address, and who is on-link
		Routes: []overlay.Route{{
			Prefix: netip.MustParsePrefix("192.168.7.0/24"), // a subnet behind two of the hosts, three flows of four to one
			Via:    []overlay.Gateway{{Addr: netip.MustParseAddr("10.42.0.2"), Weight: 3}, {Addr: netip.MustParseAddr("10.42.0.3")}},
		}},
	})
	if err == nil {
		err = dev.Activate() // MTU, addresses, link up, routes: all of it, or an error and nothing of it
	}
	for err == nil {
		var packets []overlay.Packet
		packets, err = dev.Queues()[0].ReadBatch() // what the kernel sends into the overlay
		for _, p := range packets {
			host, ok := dev.NextHop(p.Data, nil)
			for i := range p.Segments() {
				packet := p.AppendSegment(nil, i)
				fmt.Println(len(packet), "bytes to", host, ok) // yours: seal and send it; what comes back goes to Write
			}
		}
	}
	fmt.Println(err)
}
