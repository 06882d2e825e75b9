package overlay

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/gaissmai/bart"
)

const treeBenchRoutes = 1_000_000

// treeRoutes makes prefixes of one kind, distinct if it draws long enough.
type treeRoutes struct {
	name string
	draw func(r *rand.Rand, i int) netip.Prefix
}

func prefix4(addr uint32, bits int) netip.Prefix {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], addr)
	return netip.PrefixFrom(netip.AddrFrom4(a), bits).Masked()
}

func prefix6(high, low uint64, bits int) netip.Prefix {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:8], high)
	binary.BigEndian.PutUint64(a[8:], low)
	return netip.PrefixFrom(netip.AddrFrom16(a), bits).Masked()
}

const ula = 0xfd << 56

var treeRouteSets = []treeRoutes{
	{"ipv4-24s", func(r *rand.Rand, _ int) netip.Prefix { return prefix4(r.Uint32(), 24) }},
	{"ipv4-hosts-in-10", func(r *rand.Rand, _ int) netip.Prefix { return prefix4(10<<24|r.Uint32()>>8, 32) }},
	{"ipv4-bgp", func(r *rand.Rand, _ int) netip.Prefix { // six of ten are /24, in 20,000 /16s
		lengths := [...]int{16, 18, 19, 20, 21, 22, 22, 23, 24, 24, 24, 24, 24, 24, 24, 24}
		return prefix4(r.Uint32N(20_000)*2654435761&^0xffff|r.Uint32()&0xffff, lengths[r.IntN(len(lengths))])
	}},
	{"ipv6-48-to-64", func(r *rand.Rand, _ int) netip.Prefix { return prefix6(ula|r.Uint64()>>8, 0, 48+r.IntN(17)) }},
	{"ipv6-64s-of-16-sites", func(r *rand.Rand, _ int) netip.Prefix {
		return prefix6(ula|uint64(r.IntN(16)*0x10701)<<16|r.Uint64()&0xffff, 0, 64)
	}},
	{"ipv6-sites-with-4-64s", func(_ *rand.Rand, i int) netip.Prefix {
		site := rand.New(rand.NewPCG(uint64(i/5), 0)).Uint64() >> 8 &^ 0xffff
		return prefix6(ula|site|uint64(i%5), 0, 48+16*min(i%5, 1))
	}},
	{"ipv6-hosts-dense", func(_ *rand.Rand, i int) netip.Prefix { return prefix6(ula, uint64(i), 128) }},
}

func (s treeRoutes) prefixes(n int) []netip.Prefix {
	r := rand.New(rand.NewPCG(1, 2))
	seen := make(map[netip.Prefix]bool, n)
	list := make([]netip.Prefix, 0, n)
	for i := 0; len(list) < n && i < 20*n; i++ {
		if p := s.draw(r, i); !seen[p] {
			seen[p] = true
			list = append(list, p)
		}
	}
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// addrIn draws an address inside a prefix.
func addrIn(r *rand.Rand, p netip.Prefix) netip.Addr {
	a := p.Addr().AsSlice()
	for i := range a {
		if free := min(8, 8*i+8-p.Bits()); free > 0 {
			a[i] |= byte(r.Uint32()) & (1<<free - 1)
		}
	}
	addr, _ := netip.AddrFromSlice(a)
	return addr
}

func learnedTree(list []netip.Prefix) *routeTree {
	tree := new(routeTree)
	changes := make([]change, len(list))
	for i, p := range list {
		changes[i] = change{prefix: p, offer: offer{gateways: tree.pool.intern([]Gateway{{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i % 64)})}})}}
	}
	tree.changeLayer(learnedRoutes, changes)
	return tree
}

// BenchmarkTreeLookup looks up addresses inside 1,000,000 routes, in turn with a Table of slices and one of Gateways, so that
// noise meets all alike. ×slices is what counts.
func BenchmarkTreeLookup(b *testing.B) {
	for _, set := range treeRouteSets {
		b.Run(set.name, func(b *testing.B) {
			list := set.prefixes(treeBenchRoutes)
			tree := learnedTree(list)
			plain, sliced := new(bart.Table[Gateways]), new(bart.Table[[]netip.Addr])
			for p, gateways := range tree.current.Load().all() {
				plain.Insert(p, gateways)
				sliced.Insert(p, []netip.Addr{gateways.At(0).Addr})
			}
			r := rand.New(rand.NewPCG(3, 4))
			dsts := make([]netip.Addr, 1<<18)
			for i := range dsts {
				dsts[i] = addrIn(r, list[r.IntN(len(list))])
			}
			list = nil
			runtime.GC()
			compareLookups(b, dsts, tree, plain, sliced)
		})
	}
}

// compareLookups reports medians of short laps: the few that others interrupt do not count.
func compareLookups(b *testing.B, dsts []netip.Addr, tree *routeTree, plain *bart.Table[Gateways], sliced *bart.Table[[]netip.Addr]) {
	const lapLength = 64
	var laps [3][]float64
	misses, at := 0, 0
	lap := func(i int, found func(netip.Addr) bool) {
		part := dsts[at : at+lapLength]
		start := time.Now()
		for _, dst := range part {
			if !found(dst) {
				misses++
			}
		}
		laps[i] = append(laps[i], float64(time.Since(start))/lapLength)
		at = (at + lapLength) % len(dsts)
	}
	for b.Loop() {
		lap(0, func(dst netip.Addr) bool { _, ok := tree.lookup(dst); return ok })
		lap(1, func(dst netip.Addr) bool { _, ok := plain.Lookup(dst); return ok })
		lap(2, func(dst netip.Addr) bool { _, ok := sliced.Lookup(dst); return ok })
	}
	if misses != 0 {
		b.Fatalf("%d addresses inside the routes found none", misses)
	}
	var median [3]float64
	for i := range laps {
		slices.Sort(laps[i])
		median[i] = laps[i][len(laps[i])/2]
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median[0], "tree-ns")
	b.ReportMetric(median[2], "slices-ns")
	b.ReportMetric(median[2]/median[0], "×slices")
	b.ReportMetric(median[2]/median[1], "table×slices")
}

// BenchmarkTreeChange is one learned route changed at 1,000,000, beside what copying the tree would take. Against the noise of
// others, and of the collector walking a million routes, it tells the median.
func BenchmarkTreeChange(b *testing.B) {
	for _, set := range treeRouteSets {
		b.Run(set.name, func(b *testing.B) {
			list := set.prefixes(treeBenchRoutes)
			tree := learnedTree(list)
			vias := []Gateways{tree.pool.intern(via("10.0.1.1")), tree.pool.intern(via("10.0.1.2"))}
			start := time.Now()
			tree.current.Load().withInCopy([]edit{{prefix: list[0], gateways: vias[0]}})
			whole := time.Since(start)
			r := rand.New(rand.NewPCG(5, 6))
			var times []time.Duration
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				p := list[r.IntN(len(list))]
				start := time.Now()
				tree.changeLayer(learnedRoutes, []change{{prefix: p, offer: offer{gateways: vias[i%2]}, gone: i%8 == 7}})
				times = append(times, time.Since(start))
			}
			slices.Sort(times)
			median := times[len(times)/2]
			b.ReportMetric(float64(median)/1e3, "median-µs")
			b.ReportMetric(float64(whole)/float64(median), "×copy")
		})
	}
}

// BenchmarkTreeBurst makes bursts of edits by both ways; routesPerEdit is where they meet.
func BenchmarkTreeBurst(b *testing.B) {
	const routes = 200_000
	for _, set := range treeRouteSets {
		list := set.prefixes(routes)
		s := learnedTree(list).current.Load()
		for _, share := range []int{256, 128, 64, 32, 16, 8} {
			edits := make([]edit, routes/share)
			for i := range edits {
				edits[i] = edit{prefix: list[i*share], gone: i%4 == 3}
			}
			b.Run(fmt.Sprintf("%s/1-of-%d", set.name, share), func(b *testing.B) {
				var chained, copied time.Duration
				for b.Loop() {
					start := time.Now()
					s.withOneByOne(edits)
					middle := time.Now()
					s.withInCopy(edits)
					chained += middle.Sub(start)
					copied += time.Since(middle)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(chained)/float64(copied), "chained/copied")
			})
		}
	}
}

// BenchmarkTreeMemory tells the bytes a route of each structure, at rest.
func BenchmarkTreeMemory(b *testing.B) {
	for _, set := range treeRouteSets {
		b.Run(set.name, func(b *testing.B) {
			list := set.prefixes(treeBenchRoutes)
			gateways := new(gatewayPool).intern(via("10.0.0.2"))
			perRoute := func(build func() any) float64 {
				before := heapAtRest()
				kept := build()
				after := heapAtRest()
				runtime.KeepAlive(kept)
				return float64(after-before) / float64(len(list))
			}
			for b.Loop() {
				b.ReportMetric(perRoute(func() any { return learnedTree(list) }), "all-B/route")
				b.ReportMetric(perRoute(func() any {
					t := new(bart.Table[Gateways])
					for _, p := range list {
						t.Insert(p, gateways)
					}
					return t
				}), "Table-B/route")
				b.ReportMetric(perRoute(func() any {
					t := new(bart.Fast[Gateways])
					for _, p := range list {
						t.Insert(p, gateways)
					}
					return t
				}), "Fast-B/route")
				b.ReportMetric(perRoute(func() any {
					t := new(layer)
					for _, p := range list {
						t.Insert(p, offer{gateways: gateways})
					}
					return t
				}), "layer-B/route")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

func heapAtRest() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
