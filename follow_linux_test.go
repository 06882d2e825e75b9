package overlay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// routeOf is what RoutesFor says of an address: "none", "on-link", or gateways.
func routeOf(d Device, addr string) string {
	g, ok := d.RoutesFor(netip.MustParseAddr(addr))
	switch {
	case !ok:
		return "none"
	case g.Len() == 0:
		return "on-link"
	}
	return g.String()
}

// wantRoute waits for an answer, and returns how long that took.
func (l *lab) wantRoute(d Device, addr, want string) time.Duration {
	l.Helper()
	start := time.Now()
	for got := ""; ; time.Sleep(100 * time.Microsecond) {
		if got = routeOf(d, addr); got == want {
			return time.Since(start)
		}
		if time.Since(start) > patience {
			l.Fatalf("%s goes through %q, want %q\n%v", addr, got, want, d.State())
		}
	}
}

func following1() Config {
	return Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), SystemRoutes: &SystemRoutes{}, Routes: []Route{
		{Prefix: netip.MustParsePrefix("10.8.0.0/16"), Via: via("10.42.0.8")},
	}}
}

// What `ip route` does to routes through the device, RoutesFor says: the cases of kernel.md A1, A7 to A15, A18 to A20, U11, A22,
// by hand. The oracle of internal/fib has all others.
func TestFollow(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
	d := l.open(following1())
	name := d.State().Name
	l.must(d.Activate())
	for _, test := range []struct{ lines, addr, want string }{
		{"route add 10.9.0.0/16 via 10.42.0.9 dev DEV", "10.9.1.1", "10.42.0.9"},
		{"route replace 10.9.0.0/16 via 10.42.0.10 dev DEV", "10.9.1.1", "10.42.0.10"},
		{"route replace 10.9.0.0/16 via 10.1.0.9 dev other0", "10.9.1.1", "none"}, // A9
		{"route del 10.9.0.0/16", "10.9.1.1", "none"},
		{"route add 10.9.0.0/16 nexthop via 10.42.0.9 weight 1 nexthop via 10.42.0.10 weight 3", "10.9.1.1", "10.42.0.9 10.42.0.10*3"},
		{"route add 10.9.1.0/24 dev DEV", "10.9.1.1", "on-link"},
		{"route del 10.9.1.0/24\nroute add 10.9.1.0/24 via 8.8.8.8 dev DEV onlink", "10.9.1.1", "none"}, // S6
		{"route del 10.9.1.0/24", "10.9.1.1", "10.42.0.9 10.42.0.10*3"},
		{"route add 10.7.0.0/16 via 10.42.0.9 metric 50\nroute add 10.7.0.0/16 via 10.42.0.10 metric 100", "10.7.0.1", "10.42.0.9"},
		{"route del 10.7.0.0/16 metric 50", "10.7.0.1", "10.42.0.10"}, // A10
		{"route append 10.7.0.0/16 via 10.42.0.11 metric 100", "10.7.0.1", "10.42.0.10"},
		{"route prepend 10.7.0.0/16 via 10.42.0.12 metric 100", "10.7.0.1", "10.42.0.12"},
		{"route add 10.7.0.0/16 via 10.42.0.13 tos 8 metric 100", "10.7.0.1", "10.42.0.12"},
		{"nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 via 10.42.0.10 dev DEV\nnexthop add id 3 group 1,2/2,5\nroute add 10.6.0.0/16 nhid 3", "10.6.0.1", "10.42.0.9*2 10.42.0.10*5"}, // A13
		{"nexthop replace id 1 via 10.42.0.11 dev DEV", "10.6.0.1", "10.42.0.11*2 10.42.0.10*5"},
		{"nexthop del id 3", "10.6.0.1", "none"},                                       // A14
		{"route add 10.5.0.0/16 via inet6 fd42::9 dev DEV", "10.5.0.1", "fd42::9"},     // A15
		{"route add 10.4.0.0/16 via 10.42.0.9 table 77", "10.4.0.1", "none"},           // A20
		{"route add default via 10.42.0.9", "1.2.3.4", "10.42.0.9"},                    // A19
		{"route add 10.8.0.0/16 via 10.42.0.9 metric 9", "10.8.0.1", "10.42.0.8"},      // V21: ours has metric 0
		{"route add broadcast 10.9.9.255 dev DEV table main", "10.9.9.255", "on-link"}, // packets come, be it of other types than unicast
		{"route add multicast 224.1.0.0/16 dev DEV table main", "224.1.0.1", "on-link"},
		{"-6 route add anycast fd33::/64 dev DEV table main", "fd33::1", "on-link"},
		{"route add local 10.9.9.0/24 dev DEV table main", "10.9.9.1", "10.42.0.9 10.42.0.10*3"}, // the kernel takes them itself: no claim
		{"-6 route add fd09::/64 via fd42::9", "fd09::1", "fd42::9"},
		{"-6 route append fd09::/64 via fd42::10", "fd09::1", "fd42::9 fd42::10"}, // A11
		{"-6 route del fd09::/64 via fd42::9 dev DEV", "fd09::1", "fd42::10"},
	} {
		for line := range strings.Lines(test.lines) {
			l.ip(strings.ReplaceAll(strings.TrimSpace(line), "DEV", name))
		}
		if took := l.wantRoute(d, test.addr, test.want); took > leeway*time.Second {
			t.Errorf("%s: after %v", test.lines, took)
		}
	}
	cfg := following1()
	cfg.Routes = nil
	l.reload(d, cfg)
	l.wantRoute(d, "10.8.0.1", "10.42.0.9") // U11: the kernel's is back
	l.reload(d, following1())
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	l.ip("route del 10.8.0.0/16 metric 9")
	l.wantRoute(d, "10.8.0.1", "10.42.0.8") // A22
	if s := d.State(); s.Learned == 0 || !strings.Contains(s.String(), "route 10.7.0.0/16 via 10.42.0.12*1 layer kernel metric 100") {
		t.Errorf("state\n%v", s)
	}
	l.ip("link set " + name + " down") // A7
	l.wantRoute(d, "10.7.0.1", "none")
	l.ip("link set " + name + " up")
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	cfg = following1()
	cfg.SystemRoutes = nil
	eventually(t, "the network is put back", func() bool { return strings.Contains(l.ip("route show 10.42.0.0/24"), name) })
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	l.reload(d, cfg)
	l.wantRoute(d, "10.9.0.1", "none")
	l.reload(d, following1())
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	l.ip("link del " + name)
	l.wantRoute(d, "10.9.0.1", "none")
}

// Routes that are there before the device follows are seen (kernel.md A1), on an attached device and by Reload.
func TestFollowWhatIsThere(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\naddr add 10.42.0.1/24 dev p0\nlink set p0 up")
	var lines strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&lines, "route add 10.100.%d.%d/32 via 10.42.0.9\n", i/256, i%256)
	}
	l.ip(lines.String())
	cfg := following1()
	cfg.Name, cfg.Mode = "p0", Attach
	d := l.active(cfg)
	// One more is the kernel's own, to the network of p0's address.
	if e := l.event(d, EventResynced); e.N != 1001 || e.Err != nil {
		t.Errorf("event %v", e)
	}
	for i := range 1000 {
		l.wantRoute(d, fmt.Sprintf("10.100.%d.%d", i/256, i%256), "10.42.0.9")
	}
}
