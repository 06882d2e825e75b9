package fib

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

// orderStep is an announcement, or a dump that shows nothing and proves nothing, and what the kernel answers about the prefix
// afterwards, if it is asked; "": no route.
type orderStep struct{ hear, answer string }

// order feeds a Table with steps, as the watch would.
func order(t *testing.T, table *Table, p netip.Prefix, steps ...orderStep) {
	t.Helper()
	for _, step := range steps {
		if step.hear == "a dump" {
			table.Begin(p.Addr().Is6(), true)
			table.End(p.Addr().Is6(), false)
		} else {
			apply(t, table, step.hear)
		}
		if !answers(t, table, p, step.answer) {
			t.Fatalf("still in doubt after %q", step.hear)
		}
	}
}

// answers settles what is in doubt; false: it does not end.
func answers(t *testing.T, table *Table, p netip.Prefix, answer string) bool {
	t.Helper()
	for range 10 {
		doubts := table.Doubts(false)
		if len(doubts) == 0 {
			return true
		}
		for range doubts {
			var got *kernel.FIBRoute
			if answer != "" {
				r := parseRoute(t, strings.Fields(answer))
				got = &r
			}
			table.Settle(p, p.Addr().Next(), got)
		}
	}
	return false
}

// Orders of changes in which what is replaced, or gone, is not what it seems.
func TestOrders(t *testing.T) {
	const p = "192.0.2.0/24 "
	tests := []struct {
		name  string
		steps []orderStep
		want  string
	}{
		{"there and back through nexthop objects, in a stranger's place", []orderStep{
			{"nexthop 20 via 10.0.0.2", ""},
			{"nexthop 21 via 10.0.0.3", ""},
			{"replaced " + p + "nhid 20", p + "nhid 20 via 10.0.0.2"},
			{"replaced " + p + "nhid 21", p + "nhid 21 via 10.0.0.3"},
			{"replaced " + p + "nhid 20", p + "nhid 20 via 10.0.0.2"},
		}, "10.0.0.2*1"},
		{"there and back, where a stranger has gone untold with its nexthop object", []orderStep{
			{"created " + p + "via 10.0.0.2", ""},
			{"prepended " + p + "nhid 9 via 10.0.1.9 dev 8", p + "nhid 9 via 10.0.1.9 dev 8"},
			{"nexthop 9 gone", ""},
			{"replaced " + p + "via 10.0.0.3", p + "via 10.0.0.3"},
			{"replaced " + p + "via 10.0.0.2", p + "via 10.0.0.2"},
		}, "10.0.0.2*1"},
		{"a stranger's nexthop object changed, behind ours", []orderStep{
			{"created " + p + "via 10.0.0.6", ""},
			{"prepended " + p + "via 10.0.0.5", ""},
			{"replaced " + p + "nhid 3 via 10.0.1.6 dev 8", ""},
			{"prepended " + p + "via 10.0.0.4", ""},
			{"replaced " + p + "nhid 3 via 10.0.1.7 dev 8", p + "via 10.0.0.4"},
			{"replaced " + p + "via 10.0.0.3", p + "via 10.0.0.3"},
			{"nexthop 3 gone", p + "via 10.0.0.3"},
			{"deleted " + p + "via 10.0.0.3", p + "via 10.0.0.6"},
		}, "10.0.0.6*1"},
		{"there, a stranger before it, and back", []orderStep{
			{"nexthop 20 via 10.0.0.2", ""},
			{"nexthop 21 via 10.0.0.3", ""},
			{"replaced " + p + "nhid 20", p + "nhid 20 via 10.0.0.2"},
			{"replaced " + p + "nhid 21", p + "nhid 21 via 10.0.0.3"},
			{"prepended " + p + "via 10.0.1.9 dev 8", p + "via 10.0.1.9 dev 8"},
			{"replaced " + p + "nhid 20", p + "nhid 20 via 10.0.0.2"},
			{"replaced " + p + "via 10.0.0.9", p + "via 10.0.0.9"},
			{"deleted " + p + "via 10.0.0.9", p + "nhid 21 via 10.0.0.3"},
			{"replaced " + p + "via 10.0.0.7", p + "via 10.0.0.7"},
			{"deleted " + p + "via 10.0.0.7", ""},
		}, "absent"},
		{"a nexthop object changed, of a route that was in doubt behind another", []orderStep{
			{"nexthop 20 via 10.0.0.3", ""},
			{"created " + p + "via 10.0.0.2", ""},
			{"appended " + p + "nhid 20", ""},
			{"a dump", p + "via 10.0.0.2"},
			{"nexthop 20 via 10.0.0.4", ""},
			{"replaced " + p + "nhid 20 via 10.0.0.4", p + "via 10.0.0.2"},
		}, "10.0.0.2*1"},
		{"an object that moved away and is gone, and its routes with it", []orderStep{
			{"nexthop 9 via 10.0.0.9", ""},
			{"created " + p + "via 10.0.0.5", ""},
			{"appended " + p + "via 10.0.1.7 dev 8", ""},
			{"prepended " + p + "nhid 9", p + "nhid 9 via 10.0.0.9"},
			{"nexthop 9 via 10.0.1.9 dev 8", p + "nhid 9 via 10.0.1.9 dev 8"},
			{"nexthop 9 gone", p + "via 10.0.0.5"},
			{"replaced " + p + "via 10.0.0.6", p + "via 10.0.0.6"},
			{"deleted " + p + "via 10.0.0.6", p + "via 10.0.1.7 dev 8"},
			{"deleted " + p + "via 10.0.1.7 dev 8", ""},
		}, "absent"},
	}
	for _, test := range tests {
		table := New(Config{Link: ourLink})
		prefix := netip.MustParsePrefix(strings.TrimSpace(p))
		order(t, table, prefix, test.steps...)
		if a := table.Answer(prefix); a.String() != test.want || table.ResyncNeeded(false) {
			t.Errorf("%s: got %v, want %s", test.name, a, test.want)
		}
	}
}

// Who was counted before what now answers has gone untold: what replaces the first takes that.
func TestAnswerUncounts(t *testing.T) {
	const p = "192.0.2.0/24 "
	table := New(Config{Link: ourLink})
	prefix := netip.MustParsePrefix(strings.TrimSpace(p))
	order(t, table, prefix, orderStep{"created " + p + "via 10.0.0.2", ""}, orderStep{"prepended " + p + "via 10.0.1.2 dev 8", ""})
	order(t, table, prefix, orderStep{"a dump", p + "via 10.0.0.2"}, orderStep{"replaced " + p + "via 10.0.0.3", p + "via 10.0.0.3"}, orderStep{"deleted " + p + "via 10.0.0.3", ""})
	if a := table.Answer(prefix); a.Kind != Absent {
		t.Errorf("got %v", a)
	}
}

// Routes that were refused, because there are too many, are strangers' too, and go untold with their nexthop object.
func TestRefusedGone(t *testing.T) {
	const p = "192.0.2.0/24 "
	table := New(Config{Link: ourLink, Max: 1})
	prefix := netip.MustParsePrefix(strings.TrimSpace(p))
	order(t, table, prefix,
		orderStep{"nexthop 9 via 10.0.0.9", ""},
		orderStep{"created " + p + "via 10.0.0.2", ""},
		orderStep{"prepended " + p + "nhid 9", p + "nhid 9 via 10.0.0.9"},
		orderStep{"nexthop 9 gone", p + "via 10.0.0.2"},
		orderStep{"replaced " + p + "via 10.0.0.3", p + "via 10.0.0.3"},
		orderStep{"deleted " + p + "via 10.0.0.3", ""},
	)
	if a := table.Answer(prefix); a.Kind != Absent {
		t.Errorf("got %v", a)
	}
}

// Where a stranger has taken the place of a route of ours, perhaps, a dump tells (kernel.md A9: the lookup must miss), unless the last
// was in vain.
func TestReplacedByStranger(t *testing.T) {
	const p = "192.0.2.0/24 "
	for _, vain := range []bool{false, true} {
		table := New(Config{Link: ourLink})
		order(t, table, netip.MustParsePrefix(strings.TrimSpace(p)),
			orderStep{"created " + p + "via 10.0.0.2", ""},
			orderStep{"prepended " + p + "nhid 9 via 10.0.1.9 dev 8", p + "nhid 9 via 10.0.1.9 dev 8"},
			orderStep{"nexthop 9 gone", p + "via 10.0.0.2"},
			orderStep{"replaced " + p + "via 10.0.1.10 dev 8", p + "via 10.0.1.10 dev 8"},
		)
		if table.ResyncNeeded(vain) == vain {
			t.Errorf("after one in vain (%v) a dump is wanted: %v", vain, !vain)
		}
	}
}

// A route that throws sends the look-up on: an answer through a nexthop object may be another table's, or one that is not followed.
func TestThroughNextHopElsewhere(t *testing.T) {
	const metric9 = "2001:db8::/64 table 100 metric 9 "
	for _, test := range []struct {
		name, doubtful, got string
		want                string
		table               uint32
	}{
		{"a throw before all", metric9 + "type 9", "::/0 nhid 3", "fd00::2*1", kernel.TableMain},
		{"the throw's table is named", metric9 + "type 9", "2001:db8::/64 table 100 nhid 3", "fd00::2*1", kernel.TableMain},
		{"a table that is not followed", metric9 + "on 7", "2001:db8::/80 table 101 nhid 3", "on-link", someTable},
		{"an object that strangers use", metric9 + "on 7", "2001:db8::/64 table 100 nhid 4", "on-link", someTable},
		{"nothing else", metric9 + "on 7", "::/0 nhid 3", "fd00::2*1", someTable}, // the doubtful one is gone
	} {
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		for _, line := range []string{"nexthop 3 via fd00::2", "nexthop 2 via fd01::2 dev 8", "nexthop 4 group 3*1 2*1", "created ::/0 nhid 3", "created 2001:db8::/64 table 100 nhid 3", "created " + test.doubtful} {
			apply(t, table, line)
		}
		table.Begin(true, true)
		for _, line := range []string{"2001:db8::/64 table 100 nhid 3", "::/0 nhid 3"} {
			r := parseRoute(t, strings.Fields(line))
			table.Dumped(&r)
		}
		table.End(true, false) // what it leaves out is in doubt
		p := netip.MustParsePrefix("2001:db8::/64")
		got := parseRoute(t, strings.Fields(test.got))
		table.Settle(p, p.Addr().Next(), &got)
		if a := table.Answer(p); a.String() != test.want || a.Table != test.table {
			t.Errorf("%s: got %v of table %d, want %s of %d", test.name, a, a.Table, test.want, test.table)
		}
	}
}

// Of a table that rules look at for other packets only, or of routes that were refused, an answer through a nexthop object tells nothing.
func TestThroughNextHopUnknown(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	for _, test := range []struct {
		name      string
		selective bool
		most      int
	}{{"a rule for other packets", true, 0}, {"too many", false, 2}} {
		table := New(Config{Link: ourLink, Max: test.most, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(true, []Step{{Table: someTable, Suppress: -1, Selective: test.selective}, {Table: kernel.TableMain, Suppress: -1}})
		for _, line := range []string{"nexthop 3 via fd00::2", "created 2001:db8::/64 table 100 metric 9 on 7", "created 2001:db8::/64 table 100 nhid 3", "created ::/0 nhid 3"} {
			apply(t, table, line)
		}
		table.Begin(true, true)
		r := parseRoute(t, strings.Fields("2001:db8::/64 table 100 nhid 3"))
		table.Dumped(&r)
		table.End(true, false)
		learned := table.Learned()
		got := parseRoute(t, strings.Fields("::/0 nhid 3"))
		table.Settle(p, p.Addr().Next(), &got)
		if n := table.Learned(); n != learned {
			t.Errorf("%s: %d of %d routes are left", test.name, n, learned)
		}
	}
}

// Where no address of a rule's destinations can be asked about a dump is wanted.
func TestDestinationsPassedOver(t *testing.T) {
	p := netip.MustParsePrefix("192.0.2.0/24")
	table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
	table.SetOrder(false, []Step{{Table: someTable, Suppress: -1, To: netip.MustParsePrefix("192.0.2.0/26")}, {Table: kernel.TableMain, Suppress: -1}})
	apply(t, table, "created 192.0.2.0/24 table 100 via 10.0.0.2")
	apply(t, table, "created 192.0.2.0/25 via 10.0.0.6") // which is known, and longer
	table.Begin(false, true)
	r := parseRoute(t, strings.Fields("192.0.2.0/25 via 10.0.0.6"))
	table.Dumped(&r)
	table.End(false, false)
	addr, _ := table.Probe(p, netip.Prefix{})
	table.Settle(p, addr, nil)
	if addr.String() != "192.0.2.128" || !table.ResyncNeeded(false) {
		t.Errorf("asked by %v, and no dump is wanted", addr)
	}
}

// A stranger's nexthop object that comes to us tells as a replacement would; what is ours stays, in doubt.
func TestStrangersObjectComes(t *testing.T) {
	p := netip.MustParsePrefix("2001:db8::/64")
	table := New(Config{Link: ourLink})
	for _, line := range []string{"nexthop 30 via fd01::2 dev 8", "created 2001:db8::/64 on 7", "appended 2001:db8::/64 nhid 30", "nexthop 30 via fd00::2", "replaced 2001:db8::/64 nhid 30"} {
		apply(t, table, line)
	}
	if doubts := table.Doubts(false); table.Learned() != 2 || len(doubts) != 1 {
		t.Errorf("%d learned, in doubt: %v", table.Learned(), doubts)
	}
	got := parseRoute(t, strings.Fields("2001:db8::/64 on 7"))
	if table.Settle(p, p.Addr().Next(), &got); table.Answer(p).Kind != OnLink {
		t.Errorf("got %v", table.Answer(p))
	}
}

// A doubt in a table that rules look at for some destinations only is asked about by one of these, and one in another table by others.
func TestSettleByDestination(t *testing.T) {
	p := netip.MustParsePrefix("192.0.2.0/24")
	for _, test := range []struct {
		table, to string
		want      string // the first address that tells
	}{{"100", "192.0.2.64/26", "192.0.2.64"}, {"254", "192.0.2.64/26", "192.0.2.1"}, {"254", "192.0.2.0/25", "192.0.2.128"}} {
		to := netip.MustParsePrefix(test.to)
		table := New(Config{Link: ourLink, Tables: []uint32{someTable, kernel.TableMain}})
		table.SetOrder(false, []Step{{Table: someTable, Suppress: -1, To: to}, {Table: kernel.TableMain, Suppress: -1}})
		apply(t, table, "created 192.0.2.0/24 table "+test.table+" via 10.0.0.2")
		apply(t, table, "created 192.0.0.0/16 table 100 via 10.0.0.9") // for these destinations the kernel's answer
		table.Begin(false, true)
		got := parseRoute(t, strings.Fields("192.0.0.0/16 table 100 via 10.0.0.9"))
		table.Dumped(&got)
		table.End(false, false)
		var addr netip.Addr
		for after, ok := (netip.Prefix{}), true; ok && table.Learned() > 1; ok = after.IsValid() {
			if addr, ok = table.Probe(p, after); !ok {
				break
			}
			answer := &got
			if !to.Contains(addr) {
				answer = nil
			}
			after = table.Settle(p, addr, answer)
		}
		if addr.String() != test.want || table.Learned() != 1 {
			t.Errorf("%v: settled by %v, %d routes left", test, addr, table.Learned())
		}
	}
}

// What is replaced again and again beside a stranger is one route.
func TestNoGrowth(t *testing.T) {
	table := New(Config{Link: ourLink})
	p := netip.MustParsePrefix("2001:db8::/64")
	order(t, table, p, orderStep{"created 2001:db8::/64 on 7", ""}, orderStep{"appended 2001:db8::/64 on 8", ""})
	for i := range 20 {
		line := fmt.Sprintf("2001:db8::/64 on 7 detail %d", i%2)
		order(t, table, p, orderStep{"replaced " + line, line})
	}
	if n := table.Learned(); n != 1 {
		t.Errorf("%d learned", n)
	}
}

// The end of a nexthop object costs as much as there are chains in which strangers were counted since the last.
func TestMiscountedOnce(t *testing.T) {
	table := New(Config{Link: ourLink})
	for i := range 100 {
		for _, line := range []string{"created 192.0.%d.0/24 via 10.0.0.2", "appended 192.0.%d.0/24 via 10.0.1.2 dev 8", "created 2001:db8:%d::/64 via fd00::2 via fd01::2 dev 8", "appended 2001:db8:%d::/64 on 7"} {
			apply(t, table, fmt.Sprintf(line, i))
		}
	}
	before := len(table.counted)
	table.DeleteNextHop(1)
	if before != 100 || len(table.counted) != 0 || len(table.mixed) != 100 {
		t.Errorf("strangers counted in %d chains before, %d after, multipaths shared in %d", before, len(table.counted), len(table.mixed))
	}
}

// A question that is settled, or is about what has gone, is not put again.
func TestQuestionsEnd(t *testing.T) {
	const p = "192.0.2.0/24 via 10.0.0.2"
	prefix := netip.MustParsePrefix("192.0.2.0/24")
	for name, end := range map[string]func(*Table){
		"settled, before anybody took it up": func(table *Table) {
			got := parseRoute(t, strings.Fields(p))
			table.Settle(prefix, prefix.Addr().Next(), &got)
		},
		"gone": func(table *Table) {
			apply(t, table, "deleted "+p)
			table.Doubts(false)
		},
	} {
		table := New(Config{Link: ourLink})
		apply(t, table, "created "+p)
		table.Begin(false, true)
		table.End(false, false)
		before := table.Doubtful()
		end(table)
		if before != 1 || table.Doubtful() != 0 {
			t.Errorf("%s: %d in doubt before, %d after", name, before, table.Doubtful())
		}
	}
}
