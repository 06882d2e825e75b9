package overlay

import (
	"cmp"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
)

// treeModel is the slow oracle of a routeTree: a map for each layer, and no other state.
type treeModel [layerNames]map[netip.Prefix]offer

func newTreeModel() *treeModel {
	return &treeModel{make(map[netip.Prefix]offer), make(map[netip.Prefix]offer)}
}

func (m *treeModel) change(name layerName, changes []change) {
	for _, c := range changes {
		if c.gone {
			delete(m[name], c.prefix)
		} else {
			m[name][c.prefix] = c.offer
		}
	}
}

// answer lines up who speaks of a prefix as the kernel would, and takes the first.
func (m *treeModel) answer(p netip.Prefix) (Gateways, bool) {
	type speaker struct {
		offer
		rank int // among those of equal metric
	}
	var all []speaker
	if o, ok := m[staticRoutes][p]; ok {
		rank := 2
		if o.steerOnly {
			rank = 0
		}
		all = append(all, speaker{o, rank})
	}
	if o, ok := m[learnedRoutes][p]; ok {
		rank := 3
		if o.first {
			rank = 1
		}
		all = append(all, speaker{o, rank})
	}
	if len(all) == 0 {
		return Gateways{}, false
	}
	return slices.MinFunc(all, func(a, b speaker) int {
		return cmp.Or(cmp.Compare(a.metric, b.metric), cmp.Compare(a.rank, b.rank))
	}).gateways, true
}

// merged is what a snapshot must hold.
func (m *treeModel) merged() map[netip.Prefix]Gateways {
	all := make(map[netip.Prefix]Gateways)
	for _, l := range m {
		for p := range l {
			all[p], _ = m.answer(p)
		}
	}
	return all
}

func modelLookup(merged map[netip.Prefix]Gateways, dst netip.Addr) (best Gateways, ok bool) {
	bits := -1
	for p, gateways := range merged {
		if p.Contains(dst) && p.Bits() > bits {
			best, ok, bits = gateways, true, p.Bits()
		}
	}
	return best, ok
}

// script reads a routeTree's life from bytes; at their end it reads zeros.
type script struct {
	bytes []byte
	vias  []Gateways
}

func (s *script) next(n int) int {
	if len(s.bytes) == 0 {
		return 0
	}
	b := int(s.bytes[0]) % n
	s.bytes = s.bytes[1:]
	return b
}

// addr picks from few addresses that share long prefixes.
func (s *script) addr() netip.Addr {
	edges := [...]byte{0, 1, 127, 128, 255}
	if s.next(2) == 0 {
		a := [4]byte{10, 0, 0, edges[s.next(5)]}
		a[s.next(4)] ^= edges[s.next(5)]
		return netip.AddrFrom4(a)
	}
	a := [16]byte{0: 0xfd, 15: edges[s.next(5)]}
	a[s.next(16)] ^= edges[s.next(5)]
	return netip.AddrFrom16(a)
}

func (s *script) prefix() netip.Prefix {
	lengths4 := [...]int{0, 1, 7, 8, 9, 16, 23, 24, 25, 31, 32}
	lengths6 := [...]int{0, 3, 8, 48, 63, 64, 65, 120, 127, 128}
	addr := s.addr()
	bits := lengths6[s.next(len(lengths6))]
	if addr.Is4() {
		bits = lengths4[s.next(len(lengths4))]
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

func (s *script) changes(name layerName) []change {
	list := make([]change, 1+s.next(1+s.next(40)))
	for i := range list {
		c := &list[i]
		c.prefix = s.prefix()
		if c.gone = s.next(3) == 0; c.gone {
			continue
		}
		c.offer = offer{gateways: s.vias[s.next(len(s.vias))], metric: uint32(s.next(3))}
		c.offer.steerOnly = name == staticRoutes && s.next(2) == 0
		c.offer.first = name == learnedRoutes && s.next(2) == 0
	}
	return list
}

// playTree runs a script on a tree and its model, and compares them after each step.
func playTree(t *testing.T, bytes []byte) {
	t.Helper()
	tree, model := new(routeTree), newTreeModel()
	s := &script{bytes: bytes, vias: []Gateways{{}}}
	for _, list := range [][]Gateway{via("10.0.0.2"), via("10.0.0.3"), via("10.0.0.2", "fd00::2")} {
		s.vias = append(s.vias, tree.pool.intern(list))
	}
	for len(s.bytes) > 0 {
		before, old := tree.current.Load(), model.merged()
		published := tree.published
		name := layerName(s.next(int(layerNames)))
		changes := s.changes(name)
		if s.next(8) == 0 {
			l := new(layer)
			clear(model[name])
			for _, c := range changes {
				l.Insert(c.prefix, c.offer)
				c.gone = false
				model.change(name, []change{c})
			}
			tree.replaceLayer(name, l)
		} else {
			tree.changeLayer(name, changes)
			model.change(name, changes)
		}
		now := model.merged()
		checkSnapshot(t, tree.current.Load(), now, s)
		checkSnapshot(t, before, old, s)
		want := published
		if !maps.Equal(now, old) {
			want++
		}
		if tree.published != want {
			t.Fatalf("%d publications for a step from %v to %v, want %d", tree.published-published, old, now, want-published)
		}
	}
}

func checkSnapshot(t *testing.T, got *snapshot, want map[netip.Prefix]Gateways, s *script) {
	t.Helper()
	if all := maps.Collect(got.all()); !maps.Equal(all, want) {
		t.Fatalf("the tree holds %v\nwant %v", all, want)
	}
	probes := []netip.Addr{s.addr(), netip.MustParseAddr("10.0.0.255"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("::")}
	for p := range want {
		probes = append(probes, p.Addr())
	}
	for _, dst := range probes {
		gateways, ok := got.lookup(dst)
		if expected, there := modelLookup(want, dst); ok != there || gateways != expected {
			t.Fatalf("lookup of %v = %v, %t; want %v, %t in %v", dst, gateways, ok, expected, there, want)
		}
	}
}

func TestTreeAgainstModel(t *testing.T) {
	r := gatewayRand(t)
	rounds := 300
	if raceEnabled {
		rounds = 60
	}
	for range rounds {
		bytes := make([]byte, r.IntN(3000))
		for i := range bytes {
			bytes[i] = byte(r.Uint32())
		}
		playTree(t, bytes)
	}
}

func FuzzRouteTree(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("a route comes, another of the same prefix, and one of them goes"))
	f.Add(slices.Repeat([]byte{0, 39, 1, 2, 3, 255, 7}, 40))
	f.Fuzz(func(t *testing.T, bytes []byte) {
		if len(bytes) > 4096 {
			return
		}
		playTree(t, bytes)
	})
}

func TestTreeMergeRule(t *testing.T) {
	static, learned := via("10.0.0.2"), via("10.0.0.3")
	for _, c := range []struct {
		name            string
		static, learned offer
		wantStatic      bool
	}{
		{"the lower metric of the static layer", offer{metric: 9}, offer{metric: 10, first: true}, true},
		{"the lower metric of the learned layer", offer{metric: 10, steerOnly: true}, offer{metric: 9}, false},
		{"equal metric, the kernel's first", offer{metric: 10}, offer{metric: 10, first: true}, false},
		{"equal metric, the kernel's second", offer{metric: 10}, offer{metric: 10}, true},
		{"equal metric, unknown to the kernel", offer{metric: 10, steerOnly: true}, offer{metric: 10, first: true}, true},
	} {
		var tree routeTree
		c.static.gateways, c.learned.gateways = tree.pool.intern(static), tree.pool.intern(learned)
		p := netip.MustParsePrefix("10.1.0.0/16")
		for _, order := range [][]layerName{{staticRoutes, learnedRoutes}, {learnedRoutes, staticRoutes}} {
			for _, name := range order {
				tree.changeLayer(name, []change{{prefix: p, offer: [...]offer{c.static, c.learned}[name]}})
			}
			want := c.learned.gateways
			if c.wantStatic {
				want = c.static.gateways
			}
			if got, ok := tree.lookup(p.Addr()); !ok || got != want {
				t.Errorf("%s: %v, %t answers, want %v", c.name, got, ok, want)
			}
		}
	}
}

// nebula's one tree of both loses the config's route when a learned one of the same prefix goes (kernel.md A22).
func TestLearnedDeleteBringsStaticBack(t *testing.T) {
	testLayerBack(t, staticRoutes, offer{metric: 100, steerOnly: true}, learnedRoutes, offer{metric: 50})
}

func TestStaticDeleteBringsLearnedBack(t *testing.T) {
	testLayerBack(t, learnedRoutes, offer{metric: 100, first: true}, staticRoutes, offer{metric: 50})
}

func testLayerBack(t *testing.T, below layerName, stays offer, above layerName, goes offer) {
	t.Helper()
	for _, p := range prefixes("10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "fd00:1::/64", "::/0", "fd00::1/128") {
		var tree routeTree
		stays.gateways, goes.gateways = tree.pool.intern(via("10.0.0.2")), tree.pool.intern(via("10.0.0.3"))
		tree.changeLayer(below, []change{{prefix: p, offer: stays}})
		tree.changeLayer(above, []change{{prefix: p, offer: goes}})
		if got, _ := tree.lookup(p.Addr()); got != goes.gateways {
			t.Errorf("%v goes through %v, want %v, of the lower metric", p, got, goes.gateways)
		}
		tree.changeLayer(above, []change{{prefix: p, gone: true}})
		if got, ok := tree.lookup(p.Addr()); !ok || got != stays.gateways {
			t.Errorf("%v goes through %v, %t after the delete, want %v back", p, got, ok, stays.gateways)
		}
		tree.changeLayer(below, []change{{prefix: p, gone: true}})
		if got, ok := tree.lookup(p.Addr()); ok {
			t.Errorf("%v goes through %v after both deletes, want no route", p, got)
		}
	}
}

// routesAt makes n distinct changes, the i-th of 10.x.y.0/24 beside fd00:x:y::/48, all by one offer.
func routesAt(n int, o offer) []change {
	changes := make([]change, 0, n)
	for i := range n / 2 {
		high, middle, low := byte(i>>16), byte(i>>8), byte(i)
		changes = append(changes,
			change{prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10 + high, middle, low}), 24), offer: o},
			change{prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, high, middle, low}), 48), offer: o})
	}
	return changes
}

func TestTreeBurstIsOnePublication(t *testing.T) {
	var tree routeTree
	tree.changeLayer(staticRoutes, routesAt(10_000, offer{metric: 10}))
	for i, burst := range [][]change{
		routesAt(20_000, offer{metric: 5, gateways: tree.pool.intern(via("10.0.0.2"))}), // as many as to make a copy
		routesAt(10, offer{metric: 5, gateways: tree.pool.intern(via("10.0.0.3"))}),     // one by one
	} {
		before := tree.published
		tree.changeLayer(learnedRoutes, burst)
		tree.changeLayer(learnedRoutes, burst)
		if got := tree.published - before; got != 1 {
			t.Errorf("burst %d, sent twice, took %d publications, want 1", i, got)
		}
	}
}

func TestTreeEditsAgree(t *testing.T) {
	r := gatewayRand(t)
	var pool gatewayPool
	s := new(snapshot)
	for range 200 {
		edits := make([]edit, 1+r.IntN(50))
		for i := range edits {
			bytes := make([]byte, 8)
			for j := range bytes {
				bytes[j] = byte(r.Uint32())
			}
			p := (&script{bytes: bytes}).prefix()
			edits[i] = edit{prefix: p, gone: r.IntN(3) == 0, gateways: pool.intern(via("10.0.0.2", "10.0.0.3")[:r.IntN(3)])}
		}
		a, b := s.withOneByOne(edits), s.withInCopy(edits)
		if x, y := maps.Collect(a.all()), maps.Collect(b.all()); !maps.Equal(x, y) {
			t.Fatalf("one by one: %v\nin a copy: %v", x, y)
		}
		s = a
	}
}

// TestTreeReadersSeeWholeBursts lets readers watch a burst: all of it is there or nothing, and its neighbours always.
func TestTreeReadersSeeWholeBursts(t *testing.T) {
	var tree routeTree
	sides := [2]Gateways{tree.pool.intern(via("10.0.0.2")), tree.pool.intern(via("10.0.0.3"))}
	steady := offer{metric: 10, gateways: tree.pool.intern(via("10.0.0.4"))}
	tree.changeLayer(staticRoutes, []change{{prefix: netip.MustParsePrefix("11.0.0.0/8"), offer: steady}})
	tree.changeLayer(staticRoutes, routesAt(4000, offer{metric: 10, gateways: sides[0]}))
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				now := tree.current.Load()
				first, ok := now.lookup(netip.AddrFrom4([4]byte{10, 0, 0, 1}))
				last, ok2 := now.lookup(netip.AddrFrom4([4]byte{10, 0, 20, 1}))
				if !ok || !ok2 || first != last || first != sides[0] && first != sides[1] {
					t.Errorf("a burst is torn: %v, %t and %v, %t", first, ok, last, ok2)
					return
				}
				if got, ok := tree.lookup(netip.AddrFrom4([4]byte{11, 0, 0, 1})); !ok || got != steady.gateways {
					t.Errorf("an untouched prefix goes through %v, %t; want %v", got, ok, steady.gateways)
					return
				}
				runtime.Gosched()
			}
		})
	}
	for i := range 200 {
		n := 2 * (21 + i%2*1900) // the burst is 10.0.0.0/24 … 10.0.20.0/24 and more, made one by one or in a copy
		changes := routesAt(4000, offer{metric: 5, gateways: sides[1]})[:n]
		for j := range changes {
			changes[j].gone = i%4 >= 2
		}
		changes = append(changes, change{prefix: netip.MustParsePrefix("10.0.20.0/24"), offer: changes[0].offer, gone: changes[0].gone})
		tree.changeLayer(learnedRoutes, changes)
	}
	close(done)
	readers.Wait()
}

// layerName tells the layers of a routeTree apart.
type layerName int

const (
	staticRoutes layerName = iota
	learnedRoutes
	layerNames
)

// changeLayer is change for either layer. The learned one is a layer like the other here.
func (t *routeTree) changeLayer(name layerName, changes []change) {
	if name == staticRoutes {
		t.change(changes)
		return
	}
	t.refresh(func() []change {
		if t.kernel == nil {
			t.kernel = new(layer)
		}
		l := t.kernel.(*layer)
		for _, c := range changes {
			if c.gone {
				l.Delete(c.prefix)
			} else {
				l.Insert(c.prefix, c.offer)
			}
		}
		now := slices.Clone(changes)
		for i := range now { // of a prefix that is named twice the last counts
			o, ok := l.Get(now[i].prefix)
			now[i].offer, now[i].gone = o, !ok
		}
		return now
	})
}

// replaceLayer is replace for either layer.
func (t *routeTree) replaceLayer(name layerName, next *layer) {
	if name == staticRoutes {
		t.replace(next)
	} else {
		t.follow(next)
	}
}
