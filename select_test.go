package overlay

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// kernelBounds is fib_rebalance of net/ipv4/fib_semantics.c in numbers without end.
func kernelBounds(gws []Gateway) []int64 {
	total, sum := new(big.Int), new(big.Int)
	for _, gw := range gws {
		total.Add(total, big.NewInt(int64(gw.Weight)))
	}
	half := new(big.Int).Rsh(total, 1)
	bounds := make([]int64, len(gws))
	for i, gw := range gws {
		sum.Add(sum, big.NewInt(int64(gw.Weight)))
		x := new(big.Int).Lsh(sum, 31)
		bounds[i] = x.Div(x.Add(x, half), total).Int64() - 1
	}
	return bounds
}

// kernelPick is fib_select_multipath, without its look at source addresses.
func kernelPick(bounds []int64, hash31 uint32) int {
	return slices.IndexFunc(bounds, func(bound int64) bool { return int64(hash31) <= bound })
}

func TestThresholdsAreTheKernels(t *testing.T) {
	r := gatewayRand(t)
	lists := [][]int{
		{1},
		{heaviestWeight},
		{1, 1},
		{1, 2, 3},
		{1, heaviestWeight},
		{heaviestWeight, 1},
		{heaviestWeight, 1, heaviestWeight},
		{heaviestWeight, heaviestWeight},
		repeatedWeight(heaviestWeight, 1024), repeatedWeight(1, 1024), append(repeatedWeight(heaviestWeight, 1023), 1),
		{1, heaviestWeight, heaviestWeight, 1},
		{1, 255},
		{65536, 1},
	}
	for range 300 {
		weights := make([]int, 1+r.IntN(40))
		for i := range weights {
			weights[i] = 1 + int(r.Uint32()>>1>>r.IntN(31))
			weights[i] = min(weights[i], heaviestWeight)
		}
		lists = append(lists, weights)
	}
	for _, weights := range lists {
		gws := weightedList(weights...)
		s, bounds := newGatewaySet(gws), kernelBounds(gws)
		if last := bounds[len(bounds)-1]; last != math.MaxInt32 {
			t.Fatalf("reference: last bound %d", last)
		}
		for i, limit := range s.limits {
			if int64(limit)-1 != bounds[i] {
				t.Fatalf("weights %v: bound %d is %d, want %d", weights, i, int64(limit)-1, bounds[i])
			}
		}
		hashes := []uint32{0, 1, math.MaxInt32, r.Uint32() >> 1}
		for _, b := range bounds {
			hashes = append(hashes, uint32(max(b, 0)), uint32(min(b+1, math.MaxInt32)))
		}
		for _, h := range hashes {
			want := kernelPick(bounds, h)
			for low := range uint32(2) { // the lowest bit of the hash has no say
				if got := s.pick(h<<1 | low); got != want {
					t.Fatalf("weights %v: pick of 31-bit hash %#x is %d, want %d", weights, h, got, want)
				}
			}
		}
	}
}

var shareSets = [][]int{
	{0, 3},
	{1, 2, 3, 4, 100},
	repeatedWeight(7, 32),
	{heaviestWeight, 1, heaviestWeight},
	{heaviestWeight, heaviestWeight / 1000},
	append(repeatedWeight(heaviestWeight, 30), repeatedWeight(heaviestWeight/2, 30)...),
}

// gatewayIndex returns which of the gateways of weightedList has the address.
func gatewayIndex(t testing.TB, a netip.Addr) int {
	t.Helper()
	if !a.Is4() {
		t.Fatalf("selected %v, which is not in the list", a)
	}
	b := a.As4()
	return int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func TestSelectShares(t *testing.T) {
	r := gatewayRand(t)
	for _, weights := range shareSets {
		var p gatewayPool
		g := p.intern(weightedList(weights...))
		counts := make([]int, len(weights))
		for range 1_000_000 {
			a, ok := g.Select(r.Uint32(), nil)
			if !ok {
				t.Fatalf("weights %v: nothing selected", weights)
			}
			counts[gatewayIndex(t, a)]++
		}
		if x := chiExcess(counts, weightShares(weights)); x > chiTooMuch {
			t.Errorf("weights %v: counts %v, %.1f deviations beyond chance", weights, counts, x)
		}
	}
}

// gatewayHealth is a fake of the embedder's knowledge about its peers.
type gatewayHealth struct {
	dead  map[netip.Addr]bool
	asked []netip.Addr
}

func (h *gatewayHealth) alive(a netip.Addr) bool {
	h.asked = append(h.asked, a)
	return !h.dead[a]
}

func TestSelectMovesOnlyTheDeadsFlows(t *testing.T) {
	r := gatewayRand(t)
	for _, weights := range [][]int{{1, 1}, {1, 2, 3, 4}, {heaviestWeight, heaviestWeight, 1000}, repeatedWeight(1, 9), {1, 100, 100}} {
		var p gatewayPool
		g := p.intern(weightedList(weights...))
		hashes := make([]uint32, 20_000)
		for i := range hashes {
			hashes[i] = r.Uint32()
		}
		h := &gatewayHealth{dead: map[netip.Addr]bool{}}
		choose := func() []netip.Addr {
			way := make([]netip.Addr, len(hashes))
			for i, hash := range hashes {
				h.asked = h.asked[:0]
				way[i], _ = g.Select(hash, h.alive)
			}
			return way
		}
		states := [][]netip.Addr{choose()} // after each failure, one after the other until all are dead
		var failed []netip.Addr
		for _, i := range r.Perm(len(weights)) {
			a := gatewayAddr(i)
			h.dead[a] = true
			failed = append(failed, a)
			before, after := states[len(states)-1], choose()
			for k := range hashes {
				if (before[k] == a) != (before[k] != after[k]) {
					t.Fatalf("weights %v, %v fails after %v: hash %#x goes from %v to %v", weights, a, failed, hashes[k], before[k], after[k])
				}
				if h.dead[after[k]] {
					t.Fatalf("hash %#x goes to the dead %v", hashes[k], after[k])
				}
			}
			states = append(states, after)
		}
		for n := len(failed) - 1; n >= 0; n-- { // and back
			delete(h.dead, failed[n])
			if !slices.Equal(choose(), states[n]) {
				t.Fatalf("weights %v: after the recovery of %v flows are not where they were", weights, failed[n])
			}
		}
		for i := range weights { // in another order the way back still ends where it began
			h.dead[gatewayAddr(i)] = true
			choose()
		}
		clear(h.dead)
		if !slices.Equal(choose(), states[0]) {
			t.Fatalf("weights %v: recovery is not complete", weights)
		}
	}
}

func TestSelectSpreadsTheDeadsFlows(t *testing.T) {
	r := gatewayRand(t)
	for _, c := range []struct {
		weights []int
		dead    []int
	}{
		{[]int{1, 1, 1}, []int{0}},
		{[]int{6, 1, 2, 3}, []int{0}},
		{[]int{1, 2, 3, 30, 30}, []int{3, 4}},
		{[]int{heaviestWeight, heaviestWeight, heaviestWeight / 2, heaviestWeight / 4}, []int{0}},
		{[]int{heaviestWeight, heaviestWeight, 1}, []int{0}},
		{append([]int{10}, repeatedWeight(1, 40)...), []int{0}},
		{append(repeatedWeight(20, 8), 1, 2, 3, 4), []int{0, 1, 2, 3, 4, 5, 6, 7}}, // more than are asked in order
	} {
		var p gatewayPool
		g := p.intern(weightedList(c.weights...))
		dead := map[netip.Addr]bool{}
		want := weightShares(c.weights)
		for _, i := range c.dead {
			dead[gatewayAddr(i)], want[i] = true, 0
		}
		alive := func(a netip.Addr) bool { return !dead[a] }
		counts := make([]int, len(c.weights))
		for moved := 0; moved < 50_000; {
			hash := r.Uint32()
			if first, _ := g.Select(hash, nil); !dead[first] {
				continue
			}
			a, ok := g.Select(hash, alive)
			if !ok {
				t.Fatalf("weights %v: nothing selected", c.weights)
			}
			counts[gatewayIndex(t, a)]++
			moved++
		}
		if x := chiExcess(counts, want); x > chiTooMuch {
			t.Errorf("weights %v, dead %v: counts %v, %.1f deviations beyond chance", c.weights, c.dead, counts, x)
		}
	}
}

// preferenceOf is the slow oracle of survivor: every spare's address, the kernel's choice first, the others by cost.
func preferenceOf(s *gatewaySet, hash uint32) []netip.Addr {
	bounds := kernelBounds(s.gateways)
	first := s.gateways[kernelPick(bounds, hash>>1)].Addr
	type bid struct {
		addr netip.Addr
		cost float64
	}
	var bids []bid
	for i := range s.spares {
		sp := &s.spares[i]
		bids = append(bids, bid{sp.addr, -math.Log(sp.draw(hash)) * sp.inverse})
	}
	slices.SortStableFunc(bids, func(a, b bid) int { return cmp.Compare(a.cost, b.cost) })
	order := []netip.Addr{first}
	for _, b := range bids {
		if b.addr != first {
			order = append(order, b.addr)
		}
	}
	return order
}

// keyTwins returns n addresses with one key, which the rendezvous must nevertheless keep apart.
func keyTwins(n int) []Gateway {
	var gws []Gateway
	for i := range n {
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], 0x2001_0db8_0000_0000+uint64(i))
		binary.BigEndian.PutUint64(b[8:], salt1)
		gws = append(gws, Gateway{netip.AddrFrom16(b), 1})
	}
	return gws
}

func TestSelectAgainstOracle(t *testing.T) {
	r := gatewayRand(t)
	if a, b := keyTwins(2)[0].Addr, keyTwins(2)[1].Addr; addrKey(a) != addrKey(b) {
		t.Fatalf("%v and %v do not have the same key", a, b)
	}
	lists := [][]Gateway{
		weightedList(1), weightedList(5, 5), weightedList(1, 2, 3), weightedList(repeatedWeight(1, 12)...), weightedList(repeatedWeight(3, 40)...),
		weightedList(1, heaviestWeight, 1, heaviestWeight), keyTwins(9), append(keyTwins(3), weightedList(1, 2)...),
		{{gatewayAddr(0), 1}, {gatewayAddr(0), 2}},
		{{gatewayAddr(0), 1}, {gatewayAddr(1), 4}, {gatewayAddr(0), 2}, {gatewayAddr(2), 1}, {gatewayAddr(1), 1}},
	}
	for _, gws := range lists {
		var p gatewayPool
		g := p.intern(gws)
		h := &gatewayHealth{dead: map[netip.Addr]bool{}}
		alive := h.alive
		for range 2000 {
			hash := r.Uint32()
			order := preferenceOf(g.set, hash)
			clear(h.dead)
			deadly := r.IntN(5) // of 4
			for _, gw := range gws {
				h.dead[gw.Addr] = r.IntN(4) < deadly
			}
			at := slices.IndexFunc(order, func(a netip.Addr) bool { return !h.dead[a] })
			h.asked = h.asked[:0]
			a, ok := g.Select(hash, alive)
			if ok != (at >= 0) || ok && a != order[at] {
				t.Fatalf("%v, hash %#x, dead %v: got %v %v, want place %d of %v", g, hash, h.dead, a, ok, at, order)
			}
			if at >= 0 && at <= inOrder && !slices.Equal(h.asked, order[:at+1]) {
				t.Fatalf("%v, hash %#x: asked about %v, want %v", g, hash, h.asked, order[:at+1])
			}
			slices.SortFunc(h.asked, netip.Addr.Compare)
			if n := len(h.asked); len(slices.Compact(h.asked)) != n {
				t.Fatalf("%v, hash %#x: asked twice: %v", g, hash, h.asked)
			}
		}
	}
}

// A gateway that a list holds twice has both shares, also of a dead one's flows.
func TestSelectRepeatedAddress(t *testing.T) {
	r := gatewayRand(t)
	var p gatewayPool
	g := p.intern([]Gateway{{gatewayAddr(0), 1}, {gatewayAddr(1), 1}, {gatewayAddr(2), 4}, {gatewayAddr(0), 2}})
	for _, c := range []struct {
		dead int
		want []float64
	}{{3, []float64{3, 1, 4}}, {2, []float64{3, 1, 0}}, {0, []float64{0, 1, 4}}} {
		dead := gatewayAddr(c.dead)
		alive := func(a netip.Addr) bool { return a != dead }
		counts := make([]int, 3)
		for range 200_000 {
			a, _ := g.Select(r.Uint32(), alive)
			counts[gatewayIndex(t, a)]++
		}
		if x := chiExcess(counts, c.want); x > chiTooMuch {
			t.Errorf("dead %v: counts %v, %.1f deviations beyond chance", dead, counts, x)
		}
	}
}

func TestSelectNone(t *testing.T) {
	var p gatewayPool
	none := func(netip.Addr) bool { return false }
	for _, c := range []struct {
		name  string
		g     Gateways
		alive func(netip.Addr) bool
		ok    bool
	}{
		{"empty", Gateways{}, nil, false},
		{"empty, with a fallback", Gateways{}, func(netip.Addr) bool { return true }, false},
		{"one, all alive", p.intern(weightedList(1)), nil, true},
		{"one, dead", p.intern(weightedList(1)), none, false},
		{"three, dead", p.intern(weightedList(1, 2, 3)), none, false},
		{"many, dead", p.intern(weightedList(repeatedWeight(1, 100)...)), none, false},
	} {
		for hash := range uint32(100) {
			a, ok := c.g.Select(hash*0x02f00001, c.alive)
			if ok != c.ok || a.IsValid() != c.ok {
				t.Fatalf("%s: got %v %v, want %v", c.name, a, ok, c.ok)
			}
		}
	}
}

func TestSelectAllocs(t *testing.T) {
	var p gatewayPool
	for _, n := range []int{1, 3, 40, 1024} {
		g := p.intern(weightedList(repeatedWeight(3, n)...))
		dead := gatewayAddr(0)
		hash := uint32(0)
		for name, alive := range map[string]func(netip.Addr) bool{
			"nil": nil, "one dead": func(a netip.Addr) bool { return a != dead }, "all dead": func(netip.Addr) bool { return false },
		} {
			if allocs := testing.AllocsPerRun(100, func() { g.Select(hash, alive); hash += 0x9e3779b9 }); allocs != 0 {
				t.Errorf("%d gateways, %s: %v allocations, want 0", n, name, allocs)
			}
		}
	}
}

func FuzzSelect(f *testing.F) {
	f.Add(uint32(0), []byte{0, 0, 0, 0, 0}, uint64(0))
	f.Add(uint32(math.MaxUint32), []byte("\x00\xff\xff\xff\x7f\x01\x01\x00\x00\x00\x02\xff\xff\xff\xff"), uint64(5))
	f.Add(uint32(77), slices.Repeat([]byte{1, 2, 3, 4, 5}, 30), uint64(1<<30-1))
	// Five bytes a gateway: address, weight. Few addresses, so that some repeat.
	f.Fuzz(func(t *testing.T, hash uint32, list []byte, deadBits uint64) {
		var gws []Gateway
		for ; len(list) >= 5 && len(gws) < 64; list = list[5:] {
			gws = append(gws, Gateway{gatewayAddr(int(list[0] & 63)), int(int32(binary.LittleEndian.Uint32(list[1:])))})
		}
		var p gatewayPool
		g := p.intern(gws)
		if g.Len() != len(gws) {
			t.Fatalf("got %d gateways, want %d", g.Len(), len(gws))
		}
		alive := func(a netip.Addr) bool { return deadBits>>gatewayIndex(t, a)&1 == 0 }
		living := slices.DeleteFunc(slices.Clone(gws), func(gw Gateway) bool { return !alive(gw.Addr) })
		a, ok := g.Select(hash, alive)
		if ok != (len(living) > 0) {
			t.Fatalf("%v of %v: got %v, %d live", hash, g, ok, len(living))
		}
		if ok && !slices.ContainsFunc(living, func(gw Gateway) bool { return gw.Addr == a }) {
			t.Fatalf("%v of %v: got %v, which is not among the living %v", hash, g, a, living)
		}
		first, _ := g.Select(hash, nil)
		if ok && alive(first) && a != first {
			t.Fatalf("%v of %v: got %v, but %v is alive", hash, g, a, first)
		}
	})
}

func BenchmarkSelect(b *testing.B) {
	hashes := make([]uint32, 1<<12)
	for i := range hashes {
		hashes[i] = rand.Uint32()
	}
	var p gatewayPool
	for _, n := range []int{1, 2, 4, 16, 64, 1024} {
		gws := weightedList(repeatedWeight(1, n)...)
		for i := range gws {
			gws[i].Weight += i
		}
		g := p.intern(gws)
		last := gatewayAddr(n - 1)
		for _, c := range []struct {
			name  string
			alive func(netip.Addr) bool
		}{
			{"nil", nil},
			{"alive", func(netip.Addr) bool { return true }},
			{"last-dead", func(a netip.Addr) bool { return a != last }},
			{"all-dead", func(netip.Addr) bool { return false }},
		} {
			b.Run(fmt.Sprintf("gateways=%d/%s", n, c.name), func(b *testing.B) {
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					g.Select(hashes[i&(len(hashes)-1)], c.alive)
					i++
				}
			})
		}
	}
}

func BenchmarkIntern(b *testing.B) {
	for _, n := range []int{1, 2, 8} {
		b.Run(fmt.Sprintf("gateways=%d", n), func(b *testing.B) {
			var p gatewayPool
			gws := weightedList(repeatedWeight(1, n)...)
			g := p.intern(gws)
			b.ReportAllocs()
			for b.Loop() {
				if p.intern(gws) != g {
					b.Fatal("another list")
				}
			}
		})
	}
}
