package fib

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

// settle does what the watch does: it asks about what is doubtful.
func (w *world) settle(t testing.TB) {
	resynced := false
	for round := 0; ; round++ {
		if w.t.ResyncNeeded(false) && !resynced {
			w.resync()
			resynced = true
		}
		doubts := w.t.Doubts(round == 0)
		if len(doubts) == 0 {
			return
		}
		if round > 50 {
			t.Fatalf("still doubtful after %d rounds: %v", round, doubts)
		}
		for _, p := range doubts {
			var after netip.Prefix
			for try := range 10 {
				addr, ok := w.t.Probe(p, after)
				if !ok {
					break
				}
				w.probes++
				r, found := w.match(addr)
				got := &r
				if !found {
					got = nil
				}
				if found && len(w.m.legs(r)) == 0 {
					after = w.t.Unanswered(p, addr, try) // a blackhole: the kernel answers with an error
					continue
				}
				if after = w.t.Settle(p, addr, got); !after.IsValid() {
					break
				}
			}
		}
	}
}

// longest is the longest prefix that the Table has an answer for.
func (w *world) longest(dst netip.Addr) (netip.Prefix, bool) {
	for bits := dst.BitLen(); bits >= 0; bits-- {
		p, _ := dst.Prefix(bits)
		if w.t.Answer(p).Kind != Absent {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// check compares with the kernel's answers: exactly where it hands us the packet, and a miss where no route of ours leads.
func (w *world) check(t testing.TB, exact bool) {
	t.Helper()
	if got, want := len(w.t.counted)+len(w.t.mixed), w.t.recount(); got != want {
		t.Fatalf("strangers are counted, and decide multipaths' places, in %d chains, known are %d", want, got)
	}
	for p, a := range w.t.Changes() {
		w.told[p] = a
	}
	for _, p := range modelPrefixes {
		if a := w.t.Answer(p); a != w.told[p] {
			t.Fatalf("%v: Changes told %v, and it is %v\n%s", p, w.told[p], a, w.story(p))
		}
		dst := p.Addr()
		r, found := w.match(dst)
		kind, gateways, ours := Absent, []Gateway(nil), false
		if found {
			kind, gateways, ours = w.want(r)
		}
		q, ok := w.longest(dst)
		if !ours {
			if ok && exact && !w.covered(dst) && !w.t.matters(keyOf(q, 0)) { // buried routes stay doubtful
				t.Fatalf("%v: got %v by %v, want a miss\n%s", dst, w.t.Answer(q), q, w.story(q))
			}
			continue
		}
		if r.Protocol == ourProto && !joins(&r) || w.ownCovers(dst, r.Prefix) && w.t.throws > 0 {
			continue // the static layer's
		}
		if w.missed && w.buried(r) {
			continue
		}
		a := w.t.Answer(q)
		if !ok || a.Kind != kind || kind == Via && !sameGateways(a.Set.Gateways, gateways) || a.Metric != r.Metric || q != r.Prefix && w.t.throws == 0 && !a.Over {
			t.Fatalf("%v: got %v %+v, want %v %v %v by %v\n%s", dst, ok, a, kind, gateways, r.Metric, r.Prefix, w.story(r.Prefix))
		}
	}
}

// buried says whether a route of IPv6 stands between the legs of a multipath: no dump shows it. Whoever has missed its
// announcement learns of it only when it is alone.
func (w *world) buried(r kernel.FIBRoute) bool {
	legs, there := 0, false
	for _, h := range w.m.chains[place{r.Prefix, r.Table}] {
		switch {
		case h.Metric != r.Metric:
		case h.joins():
			if there && legs > 0 {
				return true
			}
			legs++
		case identity(h.FIBRoute) == identity(r):
			there = true
		}
	}
	return false
}

// ownCovers says whether a route of our own would hide what the Table says: that is the merged tree's to sort out.
func (w *world) ownCovers(dst netip.Addr, p netip.Prefix) bool {
	for at, chain := range w.m.chains {
		if at.prefix.Contains(dst) && slices.ContainsFunc(chain, func(h held) bool { return h.Protocol == ourProto && !h.joins() }) {
			return true
		}
	}
	return false
}

// covered says whether any route through us, in force or not, covers dst.
func (w *world) covered(dst netip.Addr) bool {
	for at, chain := range w.m.chains {
		for _, h := range chain {
			_, _, ours := w.want(h.FIBRoute)
			if ours && h.TOS == 0 && at.table != 77 && at.prefix.Contains(dst) {
				return true
			}
		}
	}
	return false
}

// recount is in how many chains strangers are counted, and in how many others decide a multipath's place.
func (t *Table) recount() (n int) {
	for _, i := range t.heads {
		chain := make(map[uint32]int) // by metric
		for at := i; at != 0; at = t.entries.at(at).next {
			chain[t.entries.at(at).metric]++
		}
		counted, mixed := 0, 0
		for ; i != 0; i = t.entries.at(i).next {
			c := t.entries.at(i)
			sh := &t.shapes.all[c.shape]
			elsewhere := sh.joins && slices.ContainsFunc(sh.route.Legs, func(leg kernel.Leg) bool { return leg.Link != t.cfg.Link })
			if c.before > 0 || c.after > 0 {
				counted = 1
			}
			if elsewhere && (c.state&moreAfter != 0 || chain[c.metric] > 1) {
				mixed = 1
			}
		}
		n += counted + mixed
	}
	return n
}

func sameGateways(a, b []Gateway) bool {
	sum := func(list []Gateway) map[netip.Addr]uint32 {
		m := make(map[netip.Addr]uint32)
		for _, g := range list {
			m[g.Addr] += g.Weight
		}
		return m
	}
	sa, sb := sum(a), sum(b)
	if len(a) == 1 && len(b) == 1 {
		return a[0] == Gateway{b[0].Addr, 1}
	}
	if len(sa) != len(sb) {
		return false
	}
	for addr, weight := range sa {
		if sb[addr] != weight {
			return false
		}
	}
	return true
}

// story tells what was announced lately of a prefix, and what the Table has of it.
func (w *world) story(p netip.Prefix) string {
	var lines []string
	for _, line := range w.log {
		if !strings.Contains(line, "/") || strings.Contains(line, " "+p.String()+" ") {
			lines = append(lines, line)
		}
	}
	s := strings.Join(lines[max(0, len(lines)-25):], "\n")
	for i, table := range w.t.cfg.Tables {
		for _, c := range w.t.open(keyOf(p, uint16(i))).chain {
			s += fmt.Sprintf("\nhave in %d: %+v %+v", table, c, w.t.shapes.all[c.shape].route)
		}
	}
	return s
}

// resync dumps both families, in the quiet.
func (w *world) resync() {
	var all []kernel.NextHop
	for _, id := range slices.Sorted(maps.Keys(w.m.nextHops)) {
		all = append(all, w.m.nextHops[id])
	}
	w.t.SetNextHops(all)
	for _, is6 := range []bool{false, true} {
		w.t.Begin(is6, true)
		w.m.dump(is6, func(r kernel.FIBRoute) { w.t.Dumped(&r) })
		w.t.End(is6, true)
	}
	w.log = append(w.log, "resync")
}

func seeded(seed uint64) func(int) int {
	r := rand.New(rand.NewPCG(seed, 1))
	return func(n int) int { return r.IntN(n) }
}

// TestModel: after each of many random changes the Table says what a naive model says (kernel.md O2).
func TestModel(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		w := newWorld(seeded(uint64(seed)))
		t.Run(fmt.Sprint(seed), func(t *testing.T) { w.random(t, seed%2 == 0) })
	}
}

func (w *world) random(t *testing.T, compat bool) {
	w.m.compat = compat
	for range 400 {
		w.step()
		w.t.MissingNextHops()
		w.settle(t)
		w.check(t, false)
	}
	w.resync()
	w.settle(t)
	w.check(t, true)
}
