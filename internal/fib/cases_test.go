package fib

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
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
		{"what throw uncovers changes", []string{"created 192.0.2.0/24 via 10.0.0.2", "created 192.0.2.0/24 table 100 via 10.0.0.3", "created 192.0.2.0/25 table 100 type 9", "replaced 192.0.2.0/24 via 10.0.0.4"}, "192.0.2.0/25", "10.0.0.4*1"},
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
	if table.Learned() != 0 || len(table.heads) != 0 || table.ResyncNeeded(false) {
		t.Errorf("learned %d, kept %d", table.Learned(), len(table.heads))
	}
	apply(t, table, "nexthop 1 via 10.0.0.3")
	if !table.ResyncNeeded(false) || table.ResyncNeeded(false) {
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
		if got, want := len(table.counted)+len(table.mixed), table.recount(); got != want {
			t.Errorf("%s: strangers in %d chains, known are %d", test.name, want, got)
		}
		if a := table.Answer(netip.MustParsePrefix("192.0.2.0/24")); a.Kind != Via || a.First != test.want {
			t.Errorf("%s: got %+v, want First %v", test.name, a, test.want)
		}
	}
}

// Over says that an earlier table answers where our own route stands, Changes tells whenever that changes, and All has it once.
func TestOver(t *testing.T) {
	own, earlier := "created 192.0.2.0/24 proto 111 on 7", "created 192.0.0.0/16 table 100 via 10.0.0.3"
	tests := []struct {
		name string
		hear []string
		want string
	}{
		{"none", []string{own}, "absent"},
		{"shorter", []string{own, earlier}, "10.0.0.3*1"},
		{"the other way round", []string{earlier, own}, "10.0.0.3*1"},
		{"equal", []string{own, "created 192.0.2.0/24 table 100 metric 500 via 10.0.0.3"}, "10.0.0.3*1"},
		{"replaced", []string{own, earlier, "replaced 192.0.0.0/16 table 100 via 10.0.0.4"}, "10.0.0.4*1"},
		{"deleted", []string{own, earlier, "deleted 192.0.0.0/16 table 100 via 10.0.0.3"}, "absent"},
		{"ours deleted", []string{own, earlier, "deleted 192.0.2.0/24 proto 111 on 7"}, "absent"},
		{"through a nexthop object", []string{own, "nexthop 1 via 10.0.0.3", "created 192.0.0.0/16 table 100 nhid 1", "nexthop 1 via 10.0.0.4"}, "10.0.0.4*1"},
		{"a later table", []string{"created 192.0.2.0/24 table 100 proto 111 on 7", "created 192.0.0.0/16 via 10.0.0.3"}, "absent"},
	}
	for _, test := range tests {
		table := New(Config{Link: ourLink, Protocol: ourProto, Tables: []uint32{someTable, kernel.TableMain}})
		p, told, all := netip.MustParsePrefix("192.0.2.0/24"), Answer{}, 0
		for _, line := range test.hear {
			apply(t, table, line)
			for q, a := range table.Changes() {
				if q == p {
					told = a
				}
			}
		}
		for q := range table.All() {
			if q == p {
				all++
			}
		}
		a := table.Answer(p)
		if there := test.want != "absent"; a.String() != test.want || told != a || a.Over != there || there != (all == 1) || all > 1 {
			t.Errorf("%s: got %v %+v, told %+v, %d times among all, want %s", test.name, a, a, told, all, test.want)
		}
	}
}

// Another interface's loss of routes matters where strangers stand around ours, or its nexthop objects are known.
func TestDepends(t *testing.T) {
	for _, test := range []struct {
		name string
		hear []string
		want bool
	}{
		{"ours alone", []string{"created 192.0.2.0/24 via 10.0.0.2"}, false},
		{"a stranger's alone", []string{"created 192.0.2.0/24 via 10.0.1.2 dev 8"}, false},
		{"a stranger's before", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8"}, true},
		{"and gone again", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "deleted 192.0.2.0/24 via 10.0.1.2 dev 8"}, false},
		{"ours gone", []string{"created 192.0.2.0/24 via 10.0.0.2", "prepended 192.0.2.0/24 via 10.0.1.2 dev 8", "deleted 192.0.2.0/24 via 10.0.0.2"}, false},
		{"a leg of our multipath", []string{"created 2001:db8::/64 via fd00::2 via fd01::2 dev 8"}, false},
		{"a leg of our multipath, and another route", []string{"created 2001:db8::/64 via fd00::2 via fd01::2 dev 8", "appended 2001:db8::/64 on 7"}, true},
		{"a leg of our multipath, and another metric", []string{"created 2001:db8::/64 via fd00::2 via fd01::2 dev 8", "created 2001:db8::/64 on 7 metric 60"}, false},
		{"its nexthop object", []string{"nexthop 1 via 10.0.1.2 dev 8"}, true},
		{"ours", []string{"nexthop 1 via 10.0.0.2"}, false},
	} {
		table := New(Config{Link: ourLink, Protocol: ourProto})
		for _, line := range test.hear {
			apply(t, table, line)
		}
		if got := table.Depends(otherLink); got != test.want {
			t.Errorf("%s: got %v", test.name, got)
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

// What is replaced, joined, or shown again by a dump makes no more of what has reached Max. Where room comes of it, or of a
// deletion, what was refused is asked for.
func TestMaxReached(t *testing.T) {
	const prefix4, prefix6 = "192.0.2.0/24", "2001:db8::/64"
	table := New(Config{Link: ourLink, Max: 2})
	answers := func(want4, want6 string) {
		t.Helper()
		a4, a6 := table.Answer(netip.MustParsePrefix(prefix4)), table.Answer(netip.MustParsePrefix(prefix6))
		if a4.String() != want4 || a6.String() != want6 || table.Learned() > 2 {
			t.Errorf("learned %d, %v and %v, want %s and %s", table.Learned(), a4, a6, want4, want6)
		}
	}
	dump := func(is6 bool, routes ...string) {
		t.Helper()
		table.Begin(is6, true)
		for _, line := range routes {
			r := parseRoute(t, strings.Fields(line))
			table.Dumped(&r)
		}
		table.End(is6, true)
	}
	apply(t, table, "created "+prefix4+" via 10.0.0.2")
	apply(t, table, "created "+prefix6+" via fd00::2")
	apply(t, table, "replaced "+prefix4+" via 10.0.0.3")
	answers("10.0.0.3*1", "fd00::2*1")
	apply(t, table, "appended "+prefix6+" via fd00::2 via fd00::3")
	answers("10.0.0.3*1", "fd00::2*1 fd00::3*1")
	dump(false, prefix4+" via 10.0.0.3")
	dump(true, prefix6+" via fd00::2 via fd00::3")
	answers("10.0.0.3*1", "fd00::2*1 fd00::3*1")
	if table.Refused() != 0 || table.ResyncNeeded(false) {
		t.Errorf("refused %d; or a resync is wanted", table.Refused())
	}
	dump(false, prefix4+" via 10.0.0.4") // a replacement that went untold
	answers("absent", "fd00::2*1 fd00::3*1")
	if !table.ResyncNeeded(false) || table.ResyncNeeded(false) {
		t.Error("there is room, and no resync is wanted once")
	}
	dump(false, prefix4+" via 10.0.0.4")
	answers("10.0.0.4*1", "fd00::2*1 fd00::3*1")
	apply(t, table, "created 192.0.3.0/24 via 10.0.0.2")
	if table.ResyncNeeded(false) {
		t.Error("a resync is wanted where there is no room")
	}
	apply(t, table, "deleted "+prefix6+" via fd00::2 via fd00::3")
	if !table.ResyncNeeded(false) {
		t.Error("there is room, and no resync is wanted")
	}
}

// Rules give the order of the tables, and say which are looked at all (kernel.md A20).
func TestOrder(t *testing.T) {
	rules := []kernel.Rule{
		{Priority: 32766, Table: 254, Lookup: true, Suppress: -1},
		{Priority: 5, Table: 100, Lookup: true, Selective: true, Beside: true, Suppress: -1},
		{Priority: 4, Table: 254, Lookup: true, Suppress: 0},
		{Priority: 3, Table: 100, Suppress: -1},
		{Priority: 2, Table: 77, Lookup: true, Suppress: -1},
		{Priority: 1, Table: 100, Lookup: true, Suppress: -1, IPv6: true},
	}
	steps := Order(rules, false, []uint32{254, 100, 55})
	if want := []Step{{Table: 254, Suppress: 0}, {Table: 254, Suppress: -1}, {Table: 100, Suppress: -1, Selective: true}}; !slices.Equal(steps, want) {
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
		"0.0.0.0/0": "10.0.0.2*1", "192.0.2.0/24": "10.0.0.2*1", "192.0.2.0/25": "absent", "198.51.100.0/24": "absent",
	} {
		if a := table.Answer(netip.MustParsePrefix(prefix)); a.String() != want {
			t.Errorf("%s: got %v, want %s", prefix, a, want)
		}
	}
}

// A rule may go on with a later one: what is between is not looked at.
func TestOrderGoto(t *testing.T) {
	look := func(priority, table uint32) kernel.Rule {
		return kernel.Rule{Priority: priority, Table: table, Lookup: true, Suppress: -1}
	}
	jump := kernel.Rule{Priority: 1, Goto: 3, Suppress: -1}
	marked := jump
	marked.Selective, marked.Beside = true, true
	nowhere := jump
	nowhere.Goto = 7
	for _, test := range []struct {
		name string
		rule kernel.Rule
		want []Step
	}{
		{"over a table", jump, []Step{{Table: 254, Suppress: -1}, {Table: 77, Suppress: -1}}},
		{"for other packets", marked, []Step{{Table: 100, Suppress: -1}, {Table: 254, Suppress: -1}, {Table: 77, Suppress: -1}}},
		{"to no rule", nowhere, []Step{{Table: 100, Suppress: -1}, {Table: 254, Suppress: -1}, {Table: 77, Suppress: -1}}},
	} {
		rules := []kernel.Rule{look(4, 77), look(3, 254), {Priority: 3, IPv6: true}, look(2, 100), test.rule}
		if got := Order(rules, false, []uint32{254, 100, 77}); !slices.Equal(got, test.want) {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
}

// A rule for some destinations counts for those: also where a shorter prefix of its table answers for them.
func TestRuleTo(t *testing.T) {
	to := netip.MustParsePrefix("192.0.2.0/24")
	rules := []kernel.Rule{
		{Priority: 1, Table: 100, Lookup: true, Suppress: -1, Selective: true, To: to}, {Priority: 2, Table: 254, Lookup: true, Suppress: -1},
	}
	table := New(Config{Link: ourLink, Tables: []uint32{100, 254}})
	table.SetOrder(false, Order(rules, false, []uint32{100, 254}))
	for range table.Changes() {
	}
	answers := func(want string) {
		t.Helper()
		got, changed := make(map[string]string), make(map[string]bool)
		for p, a := range table.All() {
			if _, twice := got[p.String()]; twice {
				t.Errorf("%v twice", p)
			}
			got[p.String()] = a.String()
		}
		for p := range table.Changes() {
			changed[p.String()] = true
		}
		if text := fmt.Sprint(got); text != want || !changed[to.String()] {
			t.Errorf("got %s, want %s; %v told of: %v", text, want, to, changed[to.String()])
		}
	}
	apply(t, table, "created 0.0.0.0/0 table 100 via 10.0.0.3")
	answers("map[192.0.2.0/24:10.0.0.3*1]")
	apply(t, table, "created 192.0.0.0/16 table 254 via 10.0.0.2")
	apply(t, table, "created 192.0.2.0/25 table 254 via 10.0.0.2")
	apply(t, table, "created 192.0.0.0/20 table 100 via 10.0.0.4")
	answers("map[192.0.0.0/16:10.0.0.2*1 192.0.2.0/24:10.0.0.4*1]")
	apply(t, table, "created 192.0.2.0/24 table 254 via 10.0.0.5")
	answers("map[192.0.0.0/16:10.0.0.2*1 192.0.2.0/24:10.0.0.4*1]")
	table.SetOrder(false, Order(rules[1:], false, []uint32{100, 254}))
	answers("map[192.0.0.0/16:10.0.0.2*1 192.0.2.0/24:10.0.0.5*1 192.0.2.0/25:10.0.0.2*1]")
}
