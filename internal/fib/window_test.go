package fib

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

// TestLoss: whatever announcements were lost, a quiet dump brings the Table to the kernel's state.
func TestLoss(t *testing.T) {
	for seed := range 60 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newWorld(seeded(uint64(seed)))
			for range 8 {
				w.lost = w.pick(2) == 0
				for range 60 {
					w.step()
				}
				w.lost = false
				w.resync()
				w.settle(t)
				w.check(t, true)
			}
		})
	}
}

// TestDumpUnderChurn: a dump during which routes change, and which leaves out a third of them (kernel.md V5), removes none
// that is there, and brings back none that has gone; nor does it matter when announcements are heard.
func TestDumpUnderChurn(t *testing.T) {
	for seed := range 60 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newWorld(seeded(uint64(seed)))
			for range 12 {
				w.late = true
				w.steps4()
				for _, is6 := range []bool{false, true} {
					w.t.Begin(is6, true)
					w.deliver(w.pick(5))
					var dumped []kernel.FIBRoute
					w.m.dump(is6, func(r kernel.FIBRoute) { dumped = append(dumped, r) })
					w.steps4()
					for _, r := range dumped {
						if w.pick(3) > 0 {
							w.t.Dumped(&r)
						}
						w.deliver(w.pick(2))
					}
					w.deliver(len(w.held))
					w.log = append(w.log, "dumped")
					w.t.End(is6, false)
				}
				w.late = false
				w.settle(t)
				w.check(t, false)
			}
			w.resync()
			w.settle(t)
			w.check(t, true)
		})
	}
}

func (w *world) steps4() {
	for range w.pick(30) {
		w.step()
	}
}

// A dump lists what has expired, but the kernel uses it no more; its deletion is announced later.
func TestExpired(t *testing.T) {
	const prefix = "2001:db8::/64"
	table := New(Config{Link: ourLink})
	apply(t, table, "created "+prefix+" via fd00::2 expires 100")
	for _, test := range []struct{ route, want string }{
		{prefix + " via fd00::2 expires 1", "fd00::2*1"}, {prefix + " via fd00::2 expires -1", "absent"},
	} {
		table.Begin(true, true)
		r := parseRoute(t, strings.Fields(test.route))
		table.Dumped(&r)
		table.End(true, true)
		if a := table.Answer(netip.MustParsePrefix(prefix)); a.String() != test.want {
			t.Errorf("%s: %v", test.route, a)
		}
	}
	apply(t, table, "created "+prefix+" via fd00::3 expires 100")
	apply(t, table, "deleted "+prefix+" via fd00::3 expires -1")
	if a := table.Answer(netip.MustParsePrefix(prefix)); a.Kind != Absent {
		t.Errorf("deleted: %v", a)
	}
}

// Law 2: absence from a dump removes a route if the dump was quiet, or if a probe of it says so.
func TestAbsence(t *testing.T) {
	const prefix = "2001:db8::/64"
	p := netip.MustParsePrefix(prefix)
	start := func(t *testing.T) *Table {
		table := New(Config{Link: ourLink})
		apply(t, table, "created "+prefix+" via fd00::2")
		table.Begin(true, true)
		return table
	}
	shorter := parseRoute(t, []string{"2001:db8::/48", "via", "fd00::9"})
	same := parseRoute(t, []string{prefix, "via", "fd00::2"})
	stranger := parseRoute(t, []string{prefix, "metric", "100", "on", "8"})
	hidden := parseRoute(t, []string{prefix, "metric", "10", "on", "8"})
	longer := parseRoute(t, []string{"2001:db8::/65", "on", "8"})
	unknown := parseRoute(t, []string{"2001:db8::/48", "table", "77", "via", "fd00::9"})
	tests := []struct {
		name  string
		quiet bool
		other bool // a route of the family was announced meanwhile
		got   *kernel.FIBRoute
		none  bool
		want  Kind
		doubt int
	}{
		{name: "quiet", quiet: true, want: Absent},
		{name: "the caller knows of announcements", want: Via, doubt: 1},
		{name: "the Table does", quiet: true, other: true, want: Via, doubt: 1},
		{name: "no route", none: true, want: Absent},
		{name: "a shorter one", got: &shorter, want: Absent},
		{name: "it", got: &same, want: Via},
		{name: "one behind", got: &stranger, want: Absent},
		{name: "one before", got: &hidden, want: Via, doubt: 1},
		{name: "a longer one", got: &longer, want: Via, doubt: 1},
		{name: "a table before which others may be", got: &unknown, want: Via, doubt: 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			table := start(t)
			if test.other {
				apply(t, table, "created 2001:db8:1::/64 via fd00::2")
			}
			table.End(true, test.quiet)
			if doubts := table.Doubts(false); len(doubts) != table.Doubtful() || len(table.Doubts(false)) != 0 || len(table.Doubts(true)) != len(doubts) {
				t.Errorf("doubts %v, doubtful %d", doubts, table.Doubtful())
			}
			if test.got != nil || test.none {
				if again := table.Settle(p, p.Addr(), test.got); again.IsValid() != (test.got == &longer) {
					t.Errorf("Settle says %v", again)
				}
			}
			if a := table.Answer(p); a.Kind != test.want || table.Doubtful() != test.doubt {
				t.Errorf("got %v, %d doubtful, want kind %d, %d", a, table.Doubtful(), test.want, test.doubt)
			}
		})
	}
}

// That the kernel goes past a table tells what does not stand before a route that throws there.
func TestSettlePassed(t *testing.T) {
	const prefix = "2001:db8::/64"
	p := netip.MustParsePrefix(prefix)
	tests := []struct {
		name, doubted string
		longer        bool
	}{
		{"a lower metric", "metric 10 via fd00::2", false},
		{"preferred", "pref 1 via fd00::2", false},
		{"before it or gone", "via fd00::2", false},
		{"behind it", "metric 100 via fd00::2", false},
		{"a later table answers with a longer prefix", "pref 1 via fd00::2", true},
	}
	for _, test := range tests {
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		apply(t, table, "created "+prefix+" table 100 "+test.doubted)
		table.Begin(true, true)
		table.End(true, false)
		apply(t, table, "appended "+prefix+" table 100 type 9")
		apply(t, table, "created "+prefix+" via fd00::3")
		got := parseRoute(t, []string{prefix, "via", "fd00::3"})
		if test.longer {
			got.Prefix = netip.MustParsePrefix("2001:db8::/65")
		}
		table.Settle(p, p.Addr(), &got)
		if a := table.Answer(p); a.String() != "fd00::3*1" {
			t.Errorf("%s: got %v", test.name, a)
		}
	}
}

// An answer counts whatever rules for some destinations look at the same table before, or for other packets behind.
func TestSettleAmongRules(t *testing.T) {
	const prefix = "2001:db8::/64"
	p := netip.MustParsePrefix(prefix)
	here, elsewhere := netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("2001:db9::/32")
	look := kernel.Rule{IPv6: true, Priority: 9, Table: kernel.TableMain, Lookup: true, Suppress: -1}
	for _, to := range []netip.Prefix{here, elsewhere} {
		first, marked := look, look
		first.Priority, first.Selective, first.To = 1, true, to
		marked.Table, marked.Selective, marked.Beside, marked.To = someTable, true, true, here
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(true, Order([]kernel.Rule{first, look, marked}, true, []uint32{someTable, kernel.TableMain}))
		apply(t, table, "created "+prefix+" via fd00::2")
		apply(t, table, "created "+prefix+" table 100 via fd00::4")
		table.Begin(true, true)
		table.End(true, false) // all is in doubt
		got := parseRoute(t, []string{prefix, "via", "fd00::3"})
		table.Settle(p, p.Addr(), &got)
		if a := table.Answer(p); a.String() != "fd00::3*1" {
			t.Errorf("a rule to %v: got %v", to, a)
		}
	}
}

// That no route answers says nothing of a table that the rules look at for other destinations, or other packets, only.
func TestSettleBesideRules(t *testing.T) {
	p, part := netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("2001:db8:1::/48")
	look := kernel.Rule{IPv6: true, Priority: 9, Table: kernel.TableMain, Lookup: true, Suppress: -1}
	for _, beside := range []bool{false, true} {
		rule := look
		rule.Priority, rule.Table, rule.Selective, rule.Beside, rule.To = 1, someTable, true, beside, part
		if beside {
			rule.To = p
		}
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(true, Order([]kernel.Rule{rule, look}, true, []uint32{someTable, kernel.TableMain}))
		apply(t, table, "created 2001:db8::/32 table 100 via fd00::4")
		table.Begin(true, true)
		table.End(true, false)
		table.Settle(p, p.Addr(), nil)
		if table.Doubtful() != 1 {
			t.Errorf("for other packets %v: the route is gone, or no longer in doubt", beside)
		}
	}
}

// What an earlier table hides at one address a route that throws may uncover at another: only a dump tells.
func TestHiddenByEarlierTable(t *testing.T) {
	for _, throws := range []bool{false, true} {
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		apply(t, table, "created 2001:db8::/64 via fd00::2")
		apply(t, table, "created 2001:db8::/64 table 100 via fd00::3")
		table.Begin(true, true)
		got := parseRoute(t, []string{"2001:db8::/64", "table", "100", "via", "fd00::3"})
		table.Dumped(&got)
		table.End(true, false)
		if throws {
			apply(t, table, "created 2001:db8::/65 table 100 type 9")
		}
		table.Doubts(false)
		table.Settle(got.Prefix, netip.MustParseAddr("2001:db8::8000:0:0:0"), &got)
		if table.ResyncNeeded(false) != throws {
			t.Errorf("throws %v: resync needed %v", throws, !throws)
		}
		if doubts := table.Doubts(false); len(doubts) != 0 {
			t.Errorf("throws %v: asked again although nothing has changed: %v", throws, doubts)
		}
		apply(t, table, "deleted 2001:db8::/64 table 100 via fd00::3")
		if doubts := table.Doubts(false); !slices.Equal(doubts, []netip.Prefix{got.Prefix}) {
			t.Errorf("throws %v: in doubt once nothing hides it: %v", throws, doubts)
		}
	}
}

// Probe finds an address that no longer prefix covers.
func TestProbe(t *testing.T) {
	known := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.0.0/25"), netip.MustParsePrefix("10.0.0.128/26"), netip.MustParsePrefix("10.1.0.0/31"), netip.MustParsePrefix("10.1.0.0/32"), netip.MustParsePrefix("10.1.0.1/32")}
	longest := func(a netip.Addr) (best netip.Prefix, ok bool) {
		for _, p := range known {
			if p.Contains(a) && (!ok || p.Bits() > best.Bits()) {
				best, ok = p, true
			}
		}
		return best, ok
	}
	tests := []struct{ prefix, after, want string }{
		{"10.0.0.0/24", "", "10.0.0.192"},
		{"10.0.0.0/24", "10.0.0.192/27", "10.0.0.224"},
		{"10.0.0.0/24", "10.0.0.192/26", "invalid IP"},
		{"10.1.0.0/31", "", "invalid IP"},
		{"10.1.0.1/32", "", "10.1.0.1"},
		{"255.255.255.255/32", "255.255.255.255/32", "invalid IP"},
	}
	for _, test := range tests {
		var after netip.Prefix
		if test.after != "" {
			after = netip.MustParsePrefix(test.after)
		}
		if got, ok := probe(netip.MustParsePrefix(test.prefix), after, longest); got.String() != test.want || ok != got.IsValid() {
			t.Errorf("%s after %q: got %v, %v, want %s", test.prefix, test.after, got, ok, test.want)
		}
	}
}

// Where a longer prefix has the answer of a shorter one, because a route of our own is there in a table that no rule looks at, the shorter
// one can be asked about.
func TestProbeBesideOwn(t *testing.T) {
	table := New(Config{Link: ourLink, Protocol: ourProto, Tables: []uint32{someTable, kernel.TableMain}})
	table.SetOrder(false, []Step{{Table: kernel.TableMain, Suppress: -1}})
	for _, line := range []string{
		"created 192.0.2.0/24 via 10.0.0.5", "created 192.0.2.0/25 table 100 proto 111 on 7", "created 192.0.2.128/25 table 100 proto 111 on 7",
	} {
		apply(t, table, line)
	}
	if a := table.Answer(netip.MustParsePrefix("192.0.2.0/25")); a.String() != "10.0.0.5*1" {
		t.Errorf("the longer prefix has %v", a)
	}
	if addr, ok := table.Probe(netip.MustParsePrefix("192.0.2.0/24"), netip.Prefix{}); addr.String() != "192.0.2.1" || !ok {
		t.Errorf("ask by %v (%v)", addr, ok)
	}
	apply(t, table, "created 192.0.2.0/25 via 10.0.0.6")
	if addr, ok := table.Probe(netip.MustParsePrefix("192.0.2.0/24"), netip.Prefix{}); addr.String() != "192.0.2.128" || !ok {
		t.Errorf("beside what has its own answer ask by %v (%v)", addr, ok)
	}
}

// Where a route throws, what another table has for a longer prefix answers: it cannot be asked about by that.
func TestProbeBesideThrow(t *testing.T) {
	table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
	for _, line := range []string{
		"created 192.0.2.0/24 table 100 via 10.0.0.5", "created 192.0.2.0/26 table 100 type 9", "created 192.0.2.0/25 via 10.0.0.6",
	} {
		apply(t, table, line)
	}
	if addr, ok := table.Probe(netip.MustParsePrefix("192.0.2.0/24"), netip.Prefix{}); addr.String() != "192.0.2.64" || !ok {
		t.Errorf("ask by %v (%v)", addr, ok)
	}
}

// What a dump shows twice may be there once (kernel.md V5): when it is replaced the kernel is asked.
func TestShownTwice(t *testing.T) {
	table := New(Config{Link: ourLink})
	table.Begin(false, true)
	for range 2 {
		r := parseRoute(t, strings.Fields("192.0.2.0/24 via 10.0.0.2"))
		table.Dumped(&r)
	}
	table.End(false, true)
	apply(t, table, "replaced 192.0.2.0/24 via 10.0.0.3")
	if doubts := table.Doubts(false); len(doubts) != 1 {
		t.Errorf("in doubt: %v", doubts)
	}
}

// A dump of our interface alone does not tell where strangers stand: what is replaced then is doubtful.
func TestNarrowDump(t *testing.T) {
	for _, whole := range []bool{true, false} {
		table := New(Config{Link: ourLink})
		table.Begin(false, whole)
		r := parseRoute(t, []string{"192.0.2.0/24", "via", "10.0.0.2"})
		table.Dumped(&r)
		table.End(false, true)
		apply(t, table, "replaced 192.0.2.0/24 via 10.0.1.2 dev 8")
		if a := table.Answer(r.Prefix); (a.Kind == Absent) != whole || (table.Doubtful() == 0) != whole {
			t.Errorf("whole %v: got %v, %d doubtful", whole, a, table.Doubtful())
		}
		table.Begin(false, whole)
		r.Prefix = netip.MustParsePrefix("192.0.3.0/24")
		table.Dumped(&r)
		table.End(false, true)
		apply(t, table, "replaced 192.0.3.0/24 via 10.0.0.3")
		apply(t, table, "deleted 192.0.3.0/24 via 10.0.0.3")
		if a := table.Answer(r.Prefix); (a.Kind == Absent) != whole {
			t.Errorf("whole %v: got %v", whole, a)
		}
	}
}

// Announcements that are older than a dump may tell of replacing what the dump no longer showed.
func TestStaleReplace(t *testing.T) {
	for _, last := range []string{"via 10.0.0.4", "via 10.0.1.4 dev 8"} {
		table := New(Config{Link: ourLink})
		apply(t, table, "created 192.0.2.0/24 via 10.0.0.2")
		table.Begin(false, true)
		r := parseRoute(t, strings.Fields("192.0.2.0/24 via 10.0.0.3"))
		table.Dumped(&r)
		apply(t, table, "replaced 192.0.2.0/24 "+last)
		apply(t, table, "deleted 192.0.2.0/24 "+last)
		table.End(false, false)
		if a := table.Answer(r.Prefix); a.String() != "10.0.0.3*1" || table.Doubtful() != 1 {
			t.Errorf("%s: got %v, %d doubtful", last, a, table.Doubtful())
		}
	}
}

// What stands between the legs of a multipath no dump shows, not even a quiet one.
func TestBuried(t *testing.T) {
	for _, legs := range []string{"via fd00::2 via fd00::3", "via fd01::2 dev 8 via fd01::3 dev 8", "via fd00::2"} {
		table := New(Config{Link: ourLink})
		apply(t, table, "created 2001:db8::/64 on 7")
		apply(t, table, "prepended 2001:db8::/64 "+legs)
		table.Begin(true, true)
		r := parseRoute(t, strings.Fields("2001:db8::/64 "+legs))
		table.Dumped(&r)
		removed := table.End(true, true)
		if buried := len(r.Legs) > 1; buried != (removed == 0) || buried != (table.Doubtful() == 1) {
			t.Errorf("%s: removed %d, %d doubtful", legs, removed, table.Doubtful())
		}
		// A stranger's may stand there too, and be what is replaced.
		table = New(Config{Link: ourLink})
		table.Begin(true, true)
		table.Dumped(&r)
		table.End(true, true)
		apply(t, table, "replaced 2001:db8::/64 on 7")
		if buried := len(r.Legs) > 1; buried != (table.Doubtful() == 1) {
			t.Errorf("%s: replaced, %d doubtful", legs, table.Doubtful())
		}
	}
}

// A whole dump tells where strangers stand.
func TestDumpedStrangers(t *testing.T) {
	table := New(Config{Link: ourLink})
	table.Begin(false, true)
	for _, text := range []string{"192.0.2.0/24 via 10.0.1.9 dev 8", "192.0.2.0/24 via 10.0.0.2", "192.0.2.0/24 via 10.0.1.3 dev 8"} {
		r := parseRoute(t, strings.Fields(text))
		table.Dumped(&r)
	}
	table.End(false, true)
	p := netip.MustParsePrefix("192.0.2.0/24")
	for _, step := range []struct {
		line string
		want Kind
	}{
		{"replaced 192.0.2.0/24 via 10.0.1.4 dev 8", Via}, // in the place of the first stranger
		{"deleted 192.0.2.0/24 via 10.0.1.4 dev 8", Via},
		{"appended 192.0.2.0/24 via 10.0.0.3", Via},
		{"deleted 192.0.2.0/24 via 10.0.0.2", Via},
	} {
		if apply(t, table, step.line); table.Answer(p).Kind != step.want {
			t.Errorf("%s: got %v", step.line, table.Answer(p))
		}
	}
}

// All yields what Answer says of every prefix that has one.
func TestAll(t *testing.T) {
	w := newWorld(seeded(1))
	for range 300 {
		w.step()
	}
	n := 0
	for p, a := range w.t.All() {
		if n++; a.Kind == Absent || a != w.t.Answer(p) {
			t.Errorf("%v: %v", p, a)
		}
	}
	for _, p := range modelPrefixes {
		if w.t.Answer(p).Kind != Absent {
			n--
		}
	}
	if n != 0 {
		t.Errorf("%d more than there are", n)
	}
}
