package fib

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest/oracle"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// put adds a route written as for parseRoute, with ourLink and otherLink for the lab's devices.
func (l *lab) put(t *testing.T, o op, text string) {
	t.Helper()
	l.do(t, oracle.RouteMessage(unix.RTM_NEWROUTE, opFlags[o], l.parse(t, text)))
}

func (l *lab) parse(t *testing.T, text string) kernel.FIBRoute {
	t.Helper()
	r := parseRoute(t, strings.Fields(text))
	for i := range r.Legs {
		if r.Legs[i].Link == ourLink {
			r.Legs[i].Link = l.Ours
		} else {
			r.Legs[i].Link = l.Other
		}
	}
	return r
}

// A dump leaves out what stands between the legs of an IPv6 multipath (net/ipv6/ip6_fib.c, fib6_dump_node): see End.
func TestKernelDumpLeavesOut(t *testing.T) {
	l := newLab(t)
	l.put(t, opCreate, "2001:db8::/64 via fd00::2")
	l.put(t, opAppend, "2001:db8::/64 on 7")
	shown := func() (onLink int) {
		for _, m := range l.dump(t, rtnl.GetFIB(unix.AF_INET6, kernel.TableMain)) {
			var r kernel.FIBRoute
			if err := rtnl.DecodeFIBRoute(m, &r); err != nil {
				t.Fatal(err)
			}
			if r.Prefix == netip.MustParsePrefix("2001:db8::/64") && !r.Legs[0].Gateway.IsValid() {
				onLink++
			}
		}
		return onLink
	}
	before := shown()
	l.put(t, opAppend, "2001:db8::/64 via fd00::3")
	if after := shown(); before != 1 || after != 0 {
		t.Errorf("shown %d times before, %d after it was enclosed, want 1 and 0: if the kernel has changed, End may too", before, after)
	}
	l.hear(t)
	l.resync(t, true)
	l.do(t, oracle.RouteMessage(unix.RTM_DELROUTE, 0, l.parse(t, "2001:db8::/64 via fd00::2")), oracle.RouteMessage(unix.RTM_DELROUTE, 0, l.parse(t, "2001:db8::/64 via fd00::3")))
	l.quiet(t)
	if a := l.t.Answer(netip.MustParsePrefix("2001:db8::/64")); a.Kind != OnLink {
		t.Errorf("got %v, want on-link", a)
	}
}

// What was left out when we began is asked about, whatever else the prefix has: the preferred route is the kernel's answer.
func TestKernelLeftOutAtFirst(t *testing.T) {
	l := newLab(t)
	for _, text := range []string{"via fd01::2 dev 8", "on 7 pref 1", "via fd00::3", "metric 100 via fd01::4 dev 8"} {
		l.put(t, opAppend, "2001:db8::/64 "+text)
	}
	l.hear(t)
	l.t = New(Config{Link: l.Ours, Overlay: oracle.Overlay})
	l.resync(t, true)
	l.quiet(t)
	if a := l.t.Answer(netip.MustParsePrefix("2001:db8::/64")); a.Kind != OnLink {
		t.Errorf("got %v, want on-link", a)
	}
}

// There and back through nexthop objects, in the place of another's route: the last that came is the first.
func TestKernelThereAndBack(t *testing.T) {
	l := newLab(t)
	p := netip.MustParsePrefix("198.51.100.0/24")
	for id, gateway := range map[uint32]string{20: "10.0.0.2", 21: "10.0.0.3"} {
		l.do(t, oracle.NextHopMessage(unix.RTM_NEWNEXTHOP, kernel.NextHop{ID: id, Leg: kernel.Leg{Gateway: netip.MustParseAddr(gateway), Link: l.Ours}}))
	}
	l.put(t, opCreate, p.String()+" on 8")
	l.quiet(t)
	for _, step := range []struct{ id, want string }{{"20", "10.0.0.2*1"}, {"21", "10.0.0.3*1"}, {"20", "10.0.0.2*1"}} {
		l.put(t, opReplace, p.String()+" nhid "+step.id)
		l.quiet(t)
		if a := l.t.Answer(p); a.String() != step.want {
			t.Errorf("nhid %s: got %v", step.id, a)
		}
	}
}

// By a rule for some destinations the kernel looks at a table that it looks at for no others of the prefix: what is in doubt there is
// asked about by one of these, and what is in doubt in the next table by the others.
func TestKernelByDestination(t *testing.T) {
	for table, half := range map[string]string{"100": "198.51.100.128/25", "254": "198.51.100.0/25"} {
		l := newLab(t, someTable, kernel.TableMain)
		to, p := netip.MustParsePrefix(half), netip.MustParsePrefix("198.51.100.0/24")
		l.ns.Run(t, "ip rule add pref 1000 to "+half+" table 100")
		l.t.SetOrder(false, []Step{{Table: someTable, Suppress: -1, To: to}, {Table: kernel.TableMain, Suppress: -1}})
		l.put(t, opCreate, "198.51.0.0/16 table 100 via 10.0.0.9")
		route := p.String() + " table " + table
		l.put(t, opCreate, route+" on 8")
		l.put(t, opAppend, route+" via 10.0.0.2")
		l.quiet(t)
		l.do(t, oracle.RouteMessage(unix.RTM_DELROUTE, 0, l.parse(t, route+" on 8")))
		l.quiet(t)
		l.put(t, opReplace, route+" via 10.0.0.3")
		l.quiet(t)
		l.do(t, oracle.RouteMessage(unix.RTM_DELROUTE, 0, l.parse(t, route+" via 10.0.0.3")))
		l.quiet(t)
		if a, there := l.t.Answer(p), l.t.Answer(to); a.Kind != Absent || there.String() != "10.0.0.9*1" {
			t.Errorf("table %s: got %v, for the rule's %v", table, a, there)
		}
	}
}

// IPv6 routes through one nexthop object share cached entries: a FIB match tells of a route that was used earlier, and
// ENETUNREACH when that is gone: see Settle.
func TestKernelMatchThroughNextHop(t *testing.T) {
	l := newLab(t)
	l.do(t, oracle.NextHopMessage(unix.RTM_NEWNEXTHOP, kernel.NextHop{ID: 1, Leg: kernel.Leg{Gateway: netip.MustParseAddr("fd00::2"), Link: l.Ours}}))
	l.put(t, opCreate, "2001:db8:1::/64 nhid 1")
	l.put(t, opCreate, "2001:db8:2::/64 nhid 1")
	first, second := rtnl.MatchRoute(netip.MustParseAddr("2001:db8:1::1")), rtnl.MatchRoute(netip.MustParseAddr("2001:db8:2::1"))
	wrong, unreachable := 0, 0
	for range 100 { // the cache is one of each CPU
		l.do(t, first)
		var r kernel.FIBRoute
		if err := rtnl.DecodeFIBRoute(l.do(t, second).Answers[0], &r); err != nil {
			t.Fatal(err)
		}
		if r.Prefix != netip.MustParsePrefix("2001:db8:2::/64") {
			wrong++
		}
	}
	l.do(t, oracle.RouteMessage(unix.RTM_DELROUTE, 0, l.parse(t, "2001:db8:1::/64 nhid 1")))
	for range 100 {
		if errors.Is(l.Conn.Do(second)[0].Err, unix.ENETUNREACH) {
			unreachable++
		}
	}
	t.Logf("of 100 matches %d named another route; after that was gone %d of 100 found none", wrong, unreachable)
	if wrong == 0 {
		t.Error("no match named another route: if the kernel has changed, Settle may trust it")
	}
}

// The kernel marks the first of a key (ChangeOf), and names the table of a match if asked for it (MatchRoute).
func TestKernelMarks(t *testing.T) {
	l := newLab(t, someTable, kernel.TableMain)
	l.ns.Run(t, "ip rule add pref 1000 table 100")
	l.hear(t)
	l.log = nil
	for _, o := range []op{opAppend, opAppend, opPrepend, opReplace} {
		l.put(t, o, "192.0.2.0/24 table 100 via 10.0.0."+string(rune('2'+len(l.log))))
		l.hear(t)
	}
	for i, want := range []string{"created", "appended", "prepended", "replaced"} {
		if len(l.log) != 4 || strings.Fields(l.log[i])[0] != want {
			t.Fatalf("got %q, want %s at %d", l.log, want, i)
		}
	}
	var r kernel.FIBRoute
	if err := rtnl.DecodeFIBRoute(l.do(t, rtnl.MatchRoute(netip.MustParseAddr("192.0.2.1"))).Answers[0], &r); err != nil || r.Table != someTable {
		t.Errorf("matched in table %d, %v, want %d", r.Table, err, someTable)
	}
}
