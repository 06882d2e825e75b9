package main

import (
	"fmt"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

// TestInterop lets our daemon and upstream's, and two of ours, talk. The first of each pair knows the other's endpoint and so
// begins.
func TestInterop(t *testing.T) {
	daemons := map[string]func(*host){"ours": (*host).run, "upstream": (*host).runUpstream}
	for _, pair := range [][2]string{{"ours", "upstream"}, {"upstream", "ours"}, {"ours", "ours"}} {
		for _, underlay := range []int{4, 6} {
			t.Run(fmt.Sprintf("%s to %s over IPv%d", pair[0], pair[1], underlay), func(t *testing.T) {
				nstest.Leaks(t)
				hosts := newHosts(t, 2)
				one, two := hosts[0], hosts[1]
				secret := "PresharedKey = " + strings.TrimSpace(one.ns.Run(t, "wg genpsk"))
				one.configure(two.peerSection(underlay, secret))
				two.configure(one.peerSection(0, secret))
				daemons[pair[1]](two)
				daemons[pair[0]](one)
				one.ping(two)
				two.ping(one)
				for _, family := range []int{4, 6} {
					one.transfer(two, family, 2<<20)
					two.transfer(one, family, 2<<20)
				}
			})
		}
	}
}
