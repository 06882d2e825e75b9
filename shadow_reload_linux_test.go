package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A Reload that takes no look asks about every route for a prefix that it touches: also those that stay, for what stood before them
// may be gone, and those of other tables tell nothing about main.
func TestReloadAsksAboutTouchedPrefixes(t *testing.T) {
	prefix := netip.MustParsePrefix("10.9.0.0/16")
	in := func(metric, table int) Route { return Route{Prefix: prefix, Metric: metric, Table: table} }
	for _, test := range []struct {
		what          string
		rival         string
		before, after []Route
		was, is       int
	}{
		{"the lower metric goes", "metric 50", []Route{in(5, 0), in(100, 0)}, []Route{in(100, 0)}, 0, 1},
		{"the higher metric comes", "metric 50", []Route{in(5, 0)}, []Route{in(5, 0), in(100, 0)}, 0, 0},
		{"another table's comes", "", []Route{in(0, 0)}, []Route{in(0, 0), in(0, 77)}, 1, 1},
		{"another table's stays", "", []Route{in(0, 0), in(0, 77)}, []Route{in(0, 77)}, 1, 0},
	} {
		l := newLab(t)
		l.ns.OtherTun(t, "other0")
		l.ip(fmt.Sprintf("route add %v dev other0 %s", prefix, test.rival))
		cfg := Config{Networks: prefixes("10.42.0.1/24"), Routes: test.before}
		d := l.active(cfg)
		l.await("trust", d.isTrusted)
		if got := shadowNotes(d); len(got) != test.was {
			t.Errorf("%s: before it %v are shadowed", test.what, got)
		}
		m, _ := meddle(d)
		cfg.Routes = test.after
		l.reload(d, cfg)
		if got := shadowNotes(d); len(got) != test.is {
			t.Errorf("%s: %v are shadowed, want %d", test.what, got, test.is)
		}
		m.mu.Lock()
		if slices.Contains(m.log, "GETADDR") {
			t.Errorf("%s: it looked, so that the test shows nothing", test.what)
		}
		m.mu.Unlock()
	}
}

// Another device of ours, with our own protocol number, is a rival like any other, of few routes and of many; and so it is to a Reload,
// which takes no look at ours.
func TestShadowOfOurOwnKind(t *testing.T) {
	for _, n := range []int{10, 300} {
		l := newLab(t)
		var routes []Route
		for i := range n {
			routes = append(routes, Route{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 32)})
		}
		l.active(Config{Networks: prefixes("10.42.0.1/24"), Routes: routes})
		second := l.active(Config{Networks: prefixes("10.43.0.1/24"), Routes: routes})
		if got := len(shadowNotes(second)); got != n {
			t.Errorf("%d of %d routes are told to be shadowed", got, n)
		}
		cfg := Config{Networks: prefixes("10.44.0.1/24")}
		third := l.active(cfg)
		l.await("trust", third.isTrusted)
		cfg.Routes = routes
		l.reload(third, cfg)
		if got := len(shadowNotes(third)); got != n {
			t.Errorf("after a Reload %d of %d routes are told to be shadowed", got, n)
		}
	}
}

// What is kept of many shadows costs time in proportion: twenty thousand are a second's work, not a minute's.
func TestManyShadows(t *testing.T) {
	took := func(n int) time.Duration {
		var found []shadow
		looked := make(map[netip.Prefix]bool)
		for i := range n {
			s := shadow{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32), fmt.Sprint("by another, ", i)}
			found, looked[s.prefix] = append(found, s), true
		}
		start := time.Now()
		all, news := overshadow(found[:n/2], found, looked)
		if len(all) != n || len(news) != n-n/2 {
			t.Errorf("of %d: %d in all, %d new", n, len(all), len(news))
		}
		return time.Since(start)
	}
	took(1000)
	few, many := took(10_000), took(100_000)
	if many > 40*max(few, time.Millisecond) { // ten times as many; the square would be a hundred
		t.Errorf("10,000 shadows take %v, 100,000 %v", few, many)
	}
}
