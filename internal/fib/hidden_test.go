package fib

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

// What the first dump left out between the legs of a multipath is asked about when that goes.
func TestUnknownBehindMultipath(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/49")
	table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
	table.Begin(true, true)
	multipath := "2001:db8::/49 via fd00::4 via fd00::6"
	got := parseRoute(t, strings.Fields(multipath))
	table.Dumped(&got)
	table.End(true, true)
	if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{p}) {
		t.Errorf("in doubt beforehand: %v", doubts)
	}
	table.Settle(p, p.Addr(), &got)
	if doubts := table.Doubts(true); len(doubts) != 0 {
		t.Errorf("in doubt when asked: %v", doubts)
	}
	apply(t, table, "deleted "+multipath)
	if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{p}) {
		t.Fatalf("in doubt: %v", doubts)
	}
	stranger := parseRoute(t, []string{"2001:db8::/49", "type", "7"})
	table.Settle(p, p.Addr(), &stranger) // behind which there may be more
	apply(t, table, "deleted 2001:db8::/49 type 7")
	if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{p}) {
		t.Fatalf("in doubt behind a stranger's: %v", doubts)
	}
	got = parseRoute(t, []string{"2001:db8::/49", "via", "fd00::3"})
	table.Settle(p, p.Addr(), &got)
	if a := table.Answer(p); a.String() != "fd00::3*1" || table.Doubtful() != 0 {
		t.Errorf("got %v, %d in doubt", a, table.Doubtful())
	}
}

// What else a dump shows of the prefix, behind the multipath, does not make up for the question.
func TestUnknownBeforeOthers(t *testing.T) {
	for _, multipath := range []string{"2001:db8::/49 via fd00::4 via fd00::6", "2001:db8::/49 via fd01::4 dev 8 via fd01::6 dev 8"} {
		for _, other := range []string{"2001:db8::/49 metric 2000 via fd00::3", "2001:db8::/49 metric 2000 on 8"} {
			table := New(Config{Link: ourLink})
			table.Begin(true, true)
			for _, line := range []string{"2001:db8::/49 metric 100 on 7", multipath, other} {
				r := parseRoute(t, strings.Fields(line))
				table.Dumped(&r)
			}
			table.End(true, true)
			if doubts := table.Doubts(false); len(doubts) != 1 {
				t.Errorf("%s, then %s: in doubt: %v", multipath, other, doubts)
			}
		}
	}
}

// Where a dump shows a stranger's multipath, routes may be that it hides: whatever is announced there, the kernel is asked.
func TestVeils(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	multipath := parseRoute(t, strings.Fields("2001:db8::/64 via fd01::2 dev 8 via fd01::3 dev 8"))
	dumped := func(table *Table, quiet bool, routes ...kernel.FIBRoute) {
		table.Begin(true, true)
		for i := range routes {
			table.Dumped(&routes[i])
		}
		table.End(true, quiet)
	}
	asked := func(table *Table, line string) bool {
		apply(t, table, line)
		return slices.Contains(table.Doubts(false), p)
	}
	table := New(Config{Link: ourLink})
	dumped(table, true, multipath)
	if !table.Depends(otherLink) || table.Depends(ourLink+100) {
		t.Error("the multipath's interface does not count, or another does")
	}
	if !asked(table, "deleted 2001:db8::/64 via fd01::2 dev 8") {
		t.Error("not asked about what a leg may have hidden")
	}
	mixed := New(Config{Link: ourLink})
	dumped(mixed, true, parseRoute(t, strings.Fields("2001:db8::/64 via fd00::2 via fd01::3 dev 8")))
	if !mixed.Depends(otherLink) {
		t.Error("what hides behind another's leg does not count")
	}
	multipath.Prefix = netip.MustParsePrefix("2001:db8::/65")
	dumped(table, false, multipath)
	if !asked(table, "deleted 2001:db8::/64 via fd01::2 dev 8") {
		t.Error("forgotten after a dump that proves nothing")
	}
	table.Settle(p, p.Addr().Next(), nil)
	if asked(table, "deleted 2001:db8::/64 via fd01::3 dev 8") {
		t.Error("asked although nothing can be hidden any more")
	}
	dumped(table, true)
	if asked(table, "deleted 2001:db8::/65 via fd01::3 dev 8") || table.Depends(otherLink) || table.Doubtful() != 0 {
		t.Error("not forgotten after a dump without it")
	}
}

// An IPv6 answer through a nexthop object, which may name another route than the match (net/ipv6/route.c, rt6_get_pcpu_route),
// tells of the only route around the address that leads through the object, if there is but one.
func TestSettleThroughNextHop(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	for _, test := range []struct{ name, before, got, want string }{
		{"the only one", "", "2001:db8::/64 nhid 3", "fd00::2*1"},
		{"another is named", "", "2001:db8::/48 metric 9 nhid 3", "fd00::6*1"},
		{"a group is named", "nexthop 4 group 3*2", "2001:db8::/64 nhid 4", "fd00::6*1"},
		{"a longer prefix beside", "created 2001:db8::/126 nhid 3", "2001:db8::/64 nhid 3", "fd00::6*1"},
		{"a group beside", "nexthop 4 group 3*2\ncreated 2001:db8::/126 nhid 4", "2001:db8::/64 nhid 3", "fd00::6*1"},
		{"a shorter prefix beside, which is behind what is there", "created 2001:db8::/48 nhid 3", "2001:db8::/64 nhid 3", "fd00::2*1"},
		{"a higher metric beside, likewise", "created 2001:db8::/64 metric 99 nhid 3", "2001:db8::/64 nhid 3", "fd00::2*1"},
		{"beside it in a table that no rule looks at", "created 2001:db8::/64 table 100 nhid 3", "2001:db8::/64 nhid 3", "fd00::2*1"},
		{"a group that strangers may use", "nexthop 2 via fd01::5 dev 8\nnexthop 4 group 3*2 2*1", "2001:db8::/64 nhid 4", "fd00::6*1"},
	} {
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(true, []Step{{Table: kernel.TableMain, Suppress: -1}})
		multipath := "2001:db8::/64 via fd01::2 dev 8 leg dead via fd00::6"
		for line := range strings.Lines("nexthop 3 via fd00::2\n" + test.before + "\ncreated " + multipath + "\nappended 2001:db8::/64 nhid 3") {
			if line = strings.TrimSpace(line); line != "" {
				apply(t, table, line)
			}
		}
		table.Begin(true, true)
		r := parseRoute(t, strings.Fields(multipath))
		table.Dumped(&r)
		table.End(true, false) // what it leaves out is in doubt
		got := parseRoute(t, strings.Fields(test.got))
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a.String() != test.want {
			t.Errorf("%s: got %v, want %s", test.name, a, test.want)
		}
	}
}

// An answer that may be about either of two routes through a nexthop object still tells that nothing stands before both.
func TestClearBefore(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	for _, test := range []struct {
		doubtful, want string
		stays          bool
	}{
		{"2001:db8::/64 on 7 pref 1", "fd00::2*1", false},
		{"2001:db8::/64 metric 9 on 7", "fd00::2*1", false},
		{"2001:db8::/64 on 7", "on-link", true}, // where it stands is not certain
		{"2001:db8::/64 metric 90 on 7", "fd00::2*1", true},
		{"2001:db8::/64 metric 9 via fd00::3 leg dead", "fd00::2*1", true}, // which does not answer
	} {
		table := New(Config{Link: ourLink})
		for _, line := range []string{"nexthop 3 via fd00::2", "created 2001:db8::/48 nhid 3", "created " + test.doubtful, "appended 2001:db8::/64 nhid 3"} {
			apply(t, table, line)
		}
		table.Begin(true, true)
		table.End(true, false)
		got := parseRoute(t, strings.Fields("2001:db8::/48 nhid 3"))
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a.String() != test.want || table.Learned() == 3 != test.stays {
			t.Errorf("%s: got %v, want %s; %d routes", test.doubtful, a, test.want, table.Learned())
		}
		r := parseRoute(t, strings.Fields(test.doubtful))
		table.Apply(kernel.Appended, &r) // there is no doubt then
		was := table.Answer(p)
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a != was {
			t.Errorf("%s is there: got %v, before %v", test.doubtful, a, was)
		}
	}
}

// What was hidden and leads through a nexthop object is learned from the answer, although another route through the object is known;
// if the answer names that one, a dump is wanted.
func TestHiddenThroughNextHop(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	for name, multipath := range map[string]string{"others'": "2001:db8::/64 via fd01::2 dev 8 via fd01::3 dev 8", "ours": "2001:db8::/64 via fd00::2 via fd00::3"} {
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(true, []Step{{Table: someTable, Suppress: -1, To: netip.MustParsePrefix("2001:db8:1::/64")}, {Table: kernel.TableMain, Suppress: -1}})
		apply(t, table, "nexthop 1 via fd00::6")
		r := parseRoute(t, strings.Fields(multipath))
		table.Begin(true, true)
		table.Dumped(&r)
		table.End(true, true)
		apply(t, table, "created 2001:db8::/64 table 100 nhid 1")
		apply(t, table, "deleted "+multipath)
		other := parseRoute(t, strings.Fields("2001:db8:3::/64 table 100 nhid 1"))
		table.Settle(p, p.Addr().Next(), &other)
		if !table.ResyncNeeded(false) || table.ResyncNeeded(false) {
			t.Errorf("%s: no dump is wanted, or more than one", name)
		}
		got := parseRoute(t, strings.Fields("2001:db8::/64 nhid 1"))
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a.String() != "fd00::6*1" || a.Table != kernel.TableMain {
			t.Errorf("%s: got %v by table %d", name, a, a.Table)
		}
	}
}

// A nexthop object that is asked for, because routes lead through it, may be another than the one that they led through.
func TestNextHopMadeAgain(t *testing.T) {
	table := New(Config{Link: ourLink})
	apply(t, table, "created 192.0.2.0/24 nhid 7 via 10.0.0.2")
	if ids := table.MissingNextHops(); !slices.Equal(ids, []uint32{7}) {
		t.Errorf("missing: %v", ids)
	}
	apply(t, table, "nexthop 7 via 10.0.0.3")
	if !table.ResyncNeeded(false) {
		t.Error("no dump is wanted")
	}
}

// What seems to have been replaced may have gone before: then it was another (net/ipv6/ip6_fib.c, fib6_add_rt2node).
func TestReplacedInstead(t *testing.T) {
	for _, test := range []struct{ name, dumped, lines, asked, then, want string }{
		{
			"a multipath that was replaced by a route that the kernel prefers", "2001:db8::/64 via fd01::6 dev 8 via fd00::5", "replaced 2001:db8::/64 on 7 pref 1", "2001:db8::/64 on 7 pref 1",
			"replaced 2001:db8::/64 via fd01::3 dev 8 via fd00::3", "fd00::3*1",
		},
	} {
		table := New(Config{Link: ourLink})
		table.Begin(true, true)
		r := parseRoute(t, strings.Fields(test.dumped))
		p := r.Prefix
		table.Dumped(&r)
		table.End(true, true)
		apply(t, table, test.lines)
		got := parseRoute(t, strings.Fields(test.asked))
		table.Settle(p, p.Addr().Next(), &got)
		apply(t, table, test.then)
		_, answer, _ := strings.Cut(test.then, " ")
		if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{p}) {
			t.Errorf("%s: in doubt: %v", test.name, doubts)
		}
		got = parseRoute(t, strings.Fields(answer))
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a.String() != test.want {
			t.Errorf("%s: got %v, want %s", test.name, a, test.want)
		}
	}
}

// The kernel holds two alike after a replace, which exchanges the first of its kind and looks no further. When one of them goes the other
// is there, whether or not a dump or an answer came between.
func TestHeldTwice(t *testing.T) {
	const route = "2001:db8::/48 on 7"
	p := netip.MustParsePrefix("2001:db8::/48")
	got := parseRoute(t, strings.Fields(route))
	for name, between := range map[string]func(*Table){
		"a dump": func(table *Table) {
			table.Begin(true, true)
			for range 2 {
				r := parseRoute(t, strings.Fields(route))
				table.Dumped(&r)
			}
			table.End(true, true)
		},
		"an answer": func(table *Table) { table.Settle(p, p.Addr().Next(), &got) },
		"nothing":   func(*Table) {},
	} {
		for _, end := range []string{"deleted " + route, "replaced 2001:db8::/48 on 8", "replaced 2001:db8::/48 via fd00::2"} {
			table := New(Config{Link: ourLink})
			apply(t, table, "created 2001:db8::/48 on 7 detail b")
			apply(t, table, "appended "+route)
			apply(t, table, "replaced "+route)
			between(table)
			table.Doubts(false)
			apply(t, table, end)
			if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{p}) {
				t.Errorf("%s, then %s: in doubt: %v", name, end, doubts)
			}
			table.Settle(p, p.Addr().Next(), &got)
			if a := table.Answer(p); a.Kind != OnLink {
				t.Errorf("%s, then %s: got %v", name, end, a)
			}
		}
	}
}

// Of two routes the first has gone untold, so that what replaces the first of its kind takes the second's place.
func TestReplacedAfterTheFirstHasGone(t *testing.T) {
	for _, test := range []struct{ first, second, last string }{
		{"192.0.2.0/24 via 10.0.0.2", "192.0.2.0/24 via 10.0.0.3", "192.0.2.0/24 via 10.0.0.4"},
		{"192.0.2.0/24 via 10.0.0.2", "192.0.2.0/24 via 10.0.0.3", "192.0.2.0/24 via 10.0.1.4 dev 8"},
		{"2001:db8::/64 on 7", "2001:db8::/64 on 7 detail b", "2001:db8::/64 on 7 detail c"},
		{"2001:db8::/64 on 7", "2001:db8::/64 on 7 detail b", "2001:db8::/64 on 8"},
		{"2001:db8::/64 via fd00::2", "2001:db8::/64 on 7", "2001:db8::/64 via fd00::3"},
		{"2001:db8::/64 via fd00::2", "2001:db8::/64 on 7", "2001:db8::/64 via fd01::3 dev 8"},
	} {
		table := New(Config{Link: ourLink})
		apply(t, table, "created "+test.first)
		apply(t, table, "appended "+test.second)
		r := parseRoute(t, strings.Fields(test.second))
		p := r.Prefix
		table.Begin(p.Addr().Is6(), true)
		table.End(p.Addr().Is6(), false) // proves nothing: both are in doubt
		apply(t, table, "refreshed "+test.second)
		table.Doubts(false)
		apply(t, table, "replaced "+test.last)
		apply(t, table, "deleted "+test.last)
		if !slices.Equal(table.Doubts(false), []netip.Prefix{p}) {
			t.Errorf("%s: not asked about the second", test.last)
		}
		table.Settle(p, p.Addr().Next(), nil)
		if a := table.Answer(p); a.Kind != Absent {
			t.Errorf("%s: got %v", test.last, a)
		}
	}
}
