package overlay

import (
	"net/netip"
	"testing"

	"example.com/overlay/internal/fib"
)

// Gateways are overlay hosts other than ourselves, whoever writes into the kernel's table (kernel.md S6).
func TestOverlayHosts(t *testing.T) {
	c := Config{Networks: []netip.Prefix{
		netip.MustParsePrefix("10.42.0.1/24"), netip.MustParsePrefix("10.42.0.7/24"), netip.MustParsePrefix("fd42::1/64"),
	}}
	overlay := c.overlay()
	for addr, want := range map[string]bool{
		"10.42.0.9": true, "10.42.0.1": false, "10.42.0.7": false, "10.42.1.9": false, "fd42::9": true, "fd42::1": false, "fd43::9": false,
		"fe80::1": false,
	} {
		if got := overlay(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: got %v", addr, got)
		}
	}
}

// Sets of gateways that come and go are not remembered for ever.
func TestLearnedForgetsSets(t *testing.T) {
	l := newLearned(&Config{SystemRoutes: &SystemRoutes{}}, 7, new(gatewayPool))
	for i := range 25_000 {
		addr := netip.AddrFrom4([4]byte{10, 42, byte(i >> 8), byte(i)})
		if g := l.gateways(&fib.Set{Gateways: []fib.Gateway{{Addr: addr, Weight: 3}}}); g.Len() != 1 || g.At(0) != (Gateway{addr, 3}) {
			t.Fatalf("%v: %v", addr, g)
		}
	}
	if n := len(l.sets); n > 10_000 {
		t.Errorf("%d sets are remembered", n)
	}
}
