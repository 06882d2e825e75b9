package fib

import (
	"net/netip"
	"testing"

	"example.com/overlay/internal/kernel"
)

// The cases of kernel.md by their numbers: what is announced, and what a prefix's answer is then.
func TestCases(t *testing.T) {
	tests := []struct {
		name   string
		hear   []string
		prefix string
		want   string
	}{
		{"A9 replaced off our device", []string{"created 192.0.2.0/24 via 10.0.0.2", "replaced 192.0.2.0/24 via 10.0.1.2 dev 8"}, "192.0.2.0/24", "absent"},
		{"A9 a stranger that stands first is replaced", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "replaced 192.0.2.0/24 via 10.0.1.3 dev 8"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A9 IPv6, another kind", []string{"created 2001:db8::/64 via fd00::2", "replaced 2001:db8::/64 on 8"}, "2001:db8::/64", "absent"},
		{"A9 onto our device", []string{"replaced 192.0.2.0/24 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A9 strangers are counted", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "replaced 192.0.2.0/24 via 10.0.0.3", "deleted 192.0.2.0/24 via 10.0.0.3", "replaced 192.0.2.0/24 via 10.0.1.2 dev 8"}, "192.0.2.0/24", "absent"},
		{"A9 ours in a stranger's place", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "replaced 192.0.2.0/24 via 10.0.0.3", "deleted 192.0.2.0/24 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A9 strangers stay before the next", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 via 10.0.0.3", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "deleted 192.0.2.0/24 via 10.0.0.2", "replaced 192.0.2.0/24 via 10.0.1.3 dev 8"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A9 IPv6, the same twice", []string{"nexthop 1 via fd00::2", "created 2001:db8::/64 nhid 1", "prepended 2001:db8::/64 on 7", "replaced 2001:db8::/64 on 7", "deleted 2001:db8::/64 on 7"}, "2001:db8::/64", "on-link"},
		{"A9 IPv6, the same nexthop object twice", []string{"nexthop 1 via fd00::2", "appended 2001:db8::/64 nhid 1", "replaced 2001:db8::/64 nhid 1", "deleted 2001:db8::/64 nhid 1"}, "2001:db8::/64", "fd00::2*1"},
		{"A10 metric fallback", []string{"created 192.0.2.0/24 metric 50 via 10.0.0.2", "created 192.0.2.0/24 metric 100 via 10.0.0.3", "deleted 192.0.2.0/24 metric 50 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A10 the lower metric wins, whichever came first", []string{"created 192.0.2.0/24 metric 100 via 10.0.0.3", "created 192.0.2.0/24 metric 50 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A10 append", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A10 append, delete the first", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 via 10.0.0.3", "deleted 192.0.2.0/24 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A10 prepend", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A10 two alike but for their source", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 via 10.0.0.3", "appended 192.0.2.0/24 via 10.0.0.2 detail x", "deleted 192.0.2.0/24 via 10.0.0.2 detail x"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A10 the first of a key: the others are gone", []string{"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.2.0/24 via 10.0.0.3", "deleted 192.0.2.0/24 via 10.0.0.3"}, "192.0.2.0/24", "absent"},
		{"A10 TOS", []string{"created 192.0.2.0/24 tos 16 via 10.0.0.2"}, "192.0.2.0/24", "absent"},
		{"A10 TOS is another key", []string{"created 192.0.2.0/24 via 10.0.0.2", "replaced 192.0.2.0/24 tos 16 via 10.0.0.3", "deleted 192.0.2.0/24 tos 16 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A11 append joins", []string{"created 2001:db8::/64 via fd00::2", "appended 2001:db8::/64 via fd00::3 via fd00::2"}, "2001:db8::/64", "fd00::2*1 fd00::3*1"},
		{"A11 one leg deleted", []string{"prepended 2001:db8::/64 via fd00::2 via fd00::3 weight 2 via fd00::4", "deleted 2001:db8::/64 via fd00::2"}, "2001:db8::/64", "fd00::3*2 fd00::4*1"},
		{"A11 all legs deleted one by one", []string{"prepended 2001:db8::/64 via fd00::2 via fd00::3", "deleted 2001:db8::/64 via fd00::2", "deleted 2001:db8::/64 via fd00::3"}, "2001:db8::/64", "absent"},
		{"A11 all legs deleted at once", []string{"prepended 2001:db8::/64 via fd00::2 via fd00::3", "deleted 2001:db8::/64 via fd00::3 via fd00::2"}, "2001:db8::/64", "absent"},
		{"A11 replaced by one", []string{"prepended 2001:db8::/64 via fd00::2 via fd00::3", "replaced 2001:db8::/64 via fd00::4"}, "2001:db8::/64", "fd00::4*1"},
		{"A11 on-link stands in order", []string{"created 2001:db8::/64 on 7", "prepended 2001:db8::/64 via fd00::2", "deleted 2001:db8::/64 on 7"}, "2001:db8::/64", "fd00::2*1"},
		{"A12 dead leg", []string{"created 192.0.2.0/24 via 10.0.0.2 leg dead via 10.0.0.3 via 10.0.1.2 dev 8"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A12 all legs of ours dead", []string{"created 192.0.2.0/24 via 10.0.0.2 leg dead via 10.0.1.2 dev 8"}, "192.0.2.0/24", "absent"},
		{"A12 known again as dead", []string{"created 192.0.2.0/24 via 10.0.0.2 via 10.0.0.3", "created 198.51.100.0/24 via 10.0.0.2 leg dead via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A13 nexthop object", []string{"nexthop 1 via 10.0.0.2", "created 192.0.2.0/24 nhid 1", "nexthop 1 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A13 group, leg replaced", []string{"nexthop 1 via 10.0.0.2", "nexthop 2 via 10.0.0.3", "nexthop 3 group 1*300 2*2", "created 192.0.2.0/24 nhid 3", "nexthop 2 via 10.0.0.4"}, "192.0.2.0/24", "10.0.0.2*300 10.0.0.4*2"},
		{"A13 told twice in compat mode", []string{"nexthop 1 via 10.0.0.2", "created 192.0.2.0/24 nhid 1 via 10.0.0.2", "appended 192.0.2.0/24 via 10.0.0.9", "nexthop 1 via 10.0.0.3", "replaced 192.0.2.0/24 nhid 1 via 10.0.0.3", "deleted 192.0.2.0/24 nhid 1 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.9*1"},
		{"A13 a stranger's told again", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 nhid 9 via 10.0.1.2 dev 8", "replaced 192.0.2.0/24 nhid 9 via 10.0.1.3 dev 8"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A13 a stranger's becomes ours", []string{"nexthop 9 via 10.0.1.2 dev 8", "created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 nhid 9", "nexthop 9 via 10.0.0.9", "replaced 192.0.2.0/24 nhid 9", "deleted 192.0.2.0/24 nhid 9"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A13 group told after its routes", []string{"created 192.0.2.0/24 nhid 1 via 10.0.0.2", "nexthop 1 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A13 blackhole", []string{"nexthop 1 via 10.0.0.2", "created 192.0.2.0/24 nhid 1", "nexthop 1 blackhole"}, "192.0.2.0/24", "absent"},
		{"A14 nexthop object deleted", []string{"nexthop 1 via 10.0.0.2", "created 192.0.2.0/24 nhid 1", "nexthop 1 gone"}, "192.0.2.0/24", "absent"},
		{"A14 and made again", []string{"nexthop 1 via 10.0.0.2", "created 192.0.2.0/24 nhid 1", "nexthop 1 gone", "nexthop 1 via 10.0.0.2"}, "192.0.2.0/24", "absent"},
		{"A14 member of a group deleted", []string{"nexthop 1 via 10.0.0.2", "nexthop 2 via 10.0.0.3", "nexthop 3 group 1*1 2*1", "created 192.0.2.0/24 nhid 3", "nexthop 1 gone"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A15 via inet6", []string{"created 192.0.2.0/24 via fd00::2 via 10.0.0.3 weight 4"}, "192.0.2.0/24", "fd00::2*1 10.0.0.3*4"},
		{"A16 cloned", []string{"created 192.0.2.0/24 flag cloned via 10.0.0.2"}, "192.0.2.0/24", "absent"},
		{"A18 our own", []string{"created 192.0.2.0/24 proto 111 on 7"}, "192.0.2.0/24", "absent"},
		{"A18 another's of the same prefix", []string{"created 192.0.2.0/24 proto 111 on 7", "appended 192.0.2.0/24 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"A19 blackhole", []string{"created 192.0.2.0/24 type 6"}, "192.0.2.0/24", "absent"},
		{"A19 unreachable through us in name", []string{"created 2001:db8::/64 type 7 on 7"}, "2001:db8::/64", "absent"},
		{"A19 default, IPv4", []string{"created 0.0.0.0/0 via 10.0.0.2"}, "0.0.0.0/0", "10.0.0.2*1"},
		{"A19 default, IPv6", []string{"created ::/0 via fd00::2"}, "::/0", "fd00::2*1"},
		{"A20 a table that is not configured", []string{"created 192.0.2.0/24 table 77 via 10.0.0.2"}, "192.0.2.0/24", "absent"},
		{"A20 the earlier table first", []string{"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.2.0/24 table 100 via 10.0.0.3"}, "192.0.2.0/24", "10.0.0.3*1"},
		{"A20 covered in an earlier table", []string{"created 192.0.2.0/25 via 10.0.0.2", "created 192.0.2.0/24 table 100 via 10.0.0.3"}, "192.0.2.0/25", "absent"},
		{"A20 no longer covered", []string{"created 192.0.2.0/25 via 10.0.0.2", "created 192.0.2.0/24 table 100 via 10.0.0.3", "deleted 192.0.2.0/24 table 100 via 10.0.0.3"}, "192.0.2.0/25", "10.0.0.2*1"},
		{"throw uncovers the next table", []string{"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.2.0/24 table 100 via 10.0.0.3", "created 192.0.2.0/25 table 100 type 9"}, "192.0.2.0/25", "10.0.0.2*1"},
		{"throw before our own", []string{"created 2001:db8::/64 via fd00::2", "created 2001:db8::/64 table 100 type 9", "prepended 2001:db8::/64 table 100 proto 111 on 7"}, "2001:db8::/64", "fd00::2*1"},
		{"throw behind our own", []string{"created 2001:db8::/64 via fd00::2", "created 2001:db8::/64 table 100 proto 111 on 7", "prepended 2001:db8::/64 table 100 type 9"}, "2001:db8::/64", "absent"},
		{"throw behind our own, lower metric", []string{"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.2.0/24 table 100 metric 10 proto 111 on 7", "created 192.0.2.0/24 table 100 type 9"}, "192.0.2.0/24", "absent"},
		{"source prefix", []string{"created 2001:db8::/64 source 48 via fd00::2"}, "2001:db8::/64", "absent"},
		{"V14 preference beats the place", []string{"created 2001:db8::/64 on 7", "prepended 2001:db8::/64 pref 1 via fd00::2"}, "2001:db8::/64", "fd00::2*1"},
		{"S6 no overlay host", []string{"created 192.0.2.0/24 via 203.0.113.1"}, "192.0.2.0/24", "refused"},
		{"S6 one of two", []string{"created 192.0.2.0/24 via 203.0.113.1 via 10.0.0.2"}, "192.0.2.0/24", "10.0.0.2*1"},
		{"on-link", []string{"created 10.9.0.0/24 on 7"}, "10.9.0.0/24", "on-link"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			table := New(Config{Link: ourLink, Protocol: ourProto, Tables: []uint32{someTable, kernel.TableMain}, Overlay: overlayOnly})
			got := map[netip.Prefix]Answer{}
			for _, line := range test.hear {
				apply(t, table, line)
				for p, a := range table.Changes() {
					got[p] = a
				}
			}
			// Changes told of it, and asked directly it is the same.
			p := netip.MustParsePrefix(test.prefix)
			if a := table.Answer(p); a.String() != test.want || got[p] != a {
				t.Errorf("got %v, told %v, want %s", a, got[p], test.want)
			}
		})
	}
}

// What announcements leave open is doubtful, so that it is asked about.
func TestDoubtful(t *testing.T) {
	tests := []struct {
		name string
		hear []string
		want int
	}{
		{"all told", []string{"created 2001:db8::/64 via fd00::2", "prepended 2001:db8::/64 on 7", "deleted 2001:db8::/64 on 7"}, 0},
		{"the first leg went: what stands first now?", []string{"created 2001:db8::/64 via fd00::2", "prepended 2001:db8::/64 on 7", "prepended 2001:db8::/64 via fd00::2 via fd00::3", "deleted 2001:db8::/64 via fd00::2"}, 1},
		{"joined a stranger's", []string{"appended 2001:db8::/64 on 7", "prepended 2001:db8::/64 via fd00::2 via fd01::3 dev 8"}, 1},
		{"replaced ours or a stranger's", []string{"nexthop 1 via fd00::2", "appended 2001:db8::/64 on 7", "replaced 2001:db8::/64 nhid 1"}, 1},
		{"its place is not told", []string{"created 192.0.2.0/24 via 10.0.0.2", "refreshed 192.0.2.0/24 via 10.0.0.3"}, 1},
	}
	for _, test := range tests {
		table := New(Config{Link: ourLink, Protocol: ourProto})
		for _, line := range test.hear {
			apply(t, table, line)
		}
		if got := table.Doubtful(); got != test.want {
			t.Errorf("%s: got %d doubtful, want %d", test.name, got, test.want)
		}
	}
}

// A route whose nexthop object leads elsewhere is not kept; one that comes from elsewhere must be looked for.
func TestNextHopMoves(t *testing.T) {
	table := New(Config{Link: ourLink})
	apply(t, table, "nexthop 1 via 10.0.0.2")
	apply(t, table, "created 192.0.2.0/24 nhid 1")
	apply(t, table, "nexthop 1 via 10.0.1.2 dev 8")
	for p, a := range table.Changes() {
		if a.Kind != Absent {
			t.Errorf("%v: %v", p, a)
		}
	}
	if table.Learned() != 0 || len(table.heads) != 0 || table.ResyncNeeded() {
		t.Errorf("learned %d, kept %d", table.Learned(), len(table.heads))
	}
	apply(t, table, "nexthop 1 via 10.0.0.3")
	if !table.ResyncNeeded() || table.ResyncNeeded() {
		t.Error("no resync, or two, after the object has come back")
	}
}

// First tells on which side of our own route of equal metric a learned one stands.
func TestFirst(t *testing.T) {
	tests := []struct {
		name string
		hear []string
		want bool
	}{
		{"alone", []string{"created 192.0.2.0/24 via 10.0.0.2"}, true},
		{"behind", []string{"created 192.0.2.0/24 proto 111 on 7", "appended 192.0.2.0/24 via 10.0.0.2"}, false},
		{"before", []string{"created 192.0.2.0/24 proto 111 on 7", "prepended 192.0.2.0/24 via 10.0.0.2"}, true},
		{"another metric", []string{"created 192.0.2.0/24 proto 111 metric 40 on 7", "created 192.0.2.0/24 via 10.0.0.2"}, true},
		{"ours comes later", []string{"created 192.0.2.0/24 via 10.0.0.2", "appended 192.0.2.0/24 proto 111 on 7"}, true},
		{"ours deleted", []string{"created 192.0.2.0/24 proto 111 on 7", "appended 192.0.2.0/24 via 10.0.0.2", "deleted 192.0.2.0/24 proto 111 on 7"}, true},
	}
	for _, test := range tests {
		table := New(Config{Link: ourLink, Protocol: ourProto})
		for _, line := range test.hear {
			apply(t, table, line)
		}
		if a := table.Answer(netip.MustParsePrefix("192.0.2.0/24")); a.Kind != Via || a.First != test.want {
			t.Errorf("%s: got %+v, want First %v", test.name, a, test.want)
		}
	}
}

// Max bounds what is learned, and what is refused is counted (kernel.md S6).
func TestMax(t *testing.T) {
	table := New(Config{Link: ourLink, Protocol: ourProto, Max: 2})
	for _, line := range []string{
		"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.3.0/24 proto 111 on 7", "created 192.0.4.0/24 via 10.0.0.2",
		"created 192.0.5.0/24 via 10.0.0.2", "created 192.0.6.0/24 proto 111 on 7",
	} {
		apply(t, table, line)
	}
	if table.Learned() != 2 || table.Refused() != 1 {
		t.Errorf("learned %d, refused %d, want 2 and 1", table.Learned(), table.Refused())
	}
	apply(t, table, "deleted 192.0.2.0/24 via 10.0.0.2")
	apply(t, table, "created 192.0.5.0/24 via 10.0.0.2")
	if a := table.Answer(netip.MustParsePrefix("192.0.5.0/24")); table.Learned() != 2 || a.Kind != Via {
		t.Errorf("learned %d, %v", table.Learned(), a)
	}
}

// Rules give the order of the tables, and say which are looked at all (kernel.md A20).
func TestOrder(t *testing.T) {
	rules := []kernel.Rule{
		{Priority: 32766, Table: 254, Lookup: true, Suppress: -1},
		{Priority: 5, Table: 100, Lookup: true, Selective: true, Suppress: -1},
		{Priority: 4, Table: 254, Lookup: true, Suppress: 0},
		{Priority: 3, Table: 100, Suppress: -1},
		{Priority: 2, Table: 77, Lookup: true, Suppress: -1},
		{Priority: 1, Table: 100, Lookup: true, Suppress: -1, IPv6: true},
	}
	steps := Order(rules, false, []uint32{254, 100, 55})
	want := []Step{{254, 0, false}, {100, -1, true}, {254, -1, false}}
	if len(steps) != len(want) || steps[0] != want[0] || steps[1] != want[1] || steps[2] != want[2] {
		t.Fatalf("got %v, want %v", steps, want)
	}
	table := New(Config{Link: ourLink, Tables: []uint32{254, 100, 55}})
	table.SetOrder(false, steps)
	for _, line := range []string{
		"created 0.0.0.0/0 via 10.0.0.2", "created 0.0.0.0/0 table 100 via 10.0.0.3", "created 192.0.2.0/24 via 10.0.0.2",
		"created 192.0.2.0/25 table 100 via 10.0.0.3", "created 198.51.100.0/24 table 55 via 10.0.0.3",
	} {
		apply(t, table, line)
	}
	for prefix, want := range map[string]string{
		"0.0.0.0/0": "10.0.0.3*1", "192.0.2.0/24": "10.0.0.2*1", "192.0.2.0/25": "absent", "198.51.100.0/24": "absent",
	} {
		if a := table.Answer(netip.MustParsePrefix(prefix)); a.String() != want {
			t.Errorf("%s: got %v, want %s", prefix, a, want)
		}
	}
}
