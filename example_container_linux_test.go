package overlay_test

import (
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"

	"example.com/overlay"
)

// In a container, with --cap-add NET_ADMIN --device /dev/net/tun. New makes a missing node where it may. The settings in /proc/sys are
// read-only there: what could not be set is an event. Where IPv6 is off too (in Docker --sysctl net.ipv6.conf.all.disable_ipv6=0 has it
// on) that is an error, because only the program knows whether it can do without.
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
	err = dev.Activate()
	if errors.Is(err, overlay.ErrIPv6Disabled) {
		log.Print(err)
		cfg.Networks = cfg.Networks[:1] // without, then
		if err = dev.Reload(cfg); err == nil {
			err = dev.Activate()
		}
	}
	if err != nil {
		log.Fatal(err)
	}
	for e := range dev.Events() {
		if e.Kind == overlay.EventDegraded {
			fmt.Println(e) // degraded (3): set ipv6/accept_ra=0: read-only file system; …
		}
	}
}
