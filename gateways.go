package overlay

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"math/bits"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"weak"
)

// Gateway is an overlay host that forwards, and its share of the flows.
type Gateway struct {
	Addr   netip.Addr
	Weight int // share of the flows, in proportion to the list's other weights, up to 1<<31 - 1; 0: 1
}

// effective returns the gateway with the weight that is in force. It takes any weight: refusing is Config.Validate's work.
func (g Gateway) effective() Gateway {
	g.Weight = min(max(g.Weight, 1), math.MaxInt32)
	return g
}

// Gateways is an immutable list, one word wide; zero is empty. Equal lists of one Device are ==, so it can key a map.
// Equal means: the same addresses and weights in the same order. All methods may be called concurrently.
type Gateways struct{ set *gatewaySet }

// gatewaySet is what a Gateways refers to. Nothing in it changes once intern has published it.
type gatewaySet struct {
	gateways []Gateway // weights in force
	limits   []uint32  // hash-threshold: gateway i has the 31-bit hashes in [limits[i-1], limits[i]); the last one's end is implied
	spares   []spare   // one per distinct address, for the flows of the dead
}

// spare is a gateway in the rendezvous for the flows of a dead one.
type spare struct {
	addr    netip.Addr
	key     uint64  // hash of addr
	inverse float64 // of the sum of the weights that addr has in the list
}

// Len returns the number of gateways.
func (g Gateways) Len() int { return len(g.list()) }

// At returns the i-th gateway with the weight that is in force: 1 where 0 was given. It panics unless 0 <= i < Len().
func (g Gateways) At(i int) Gateway { return g.list()[i] }

func (g Gateways) list() []Gateway {
	if g.set == nil {
		return nil
	}
	return g.set.gateways
}

// String returns the list as "10.0.0.2*3 10.0.0.3": addresses with their weights, where those are not 1.
func (g Gateways) String() string {
	var b []byte
	for i, gw := range g.list() {
		if i > 0 {
			b = append(b, ' ')
		}
		b = gw.Addr.AppendTo(b)
		if gw.Weight != 1 {
			b = append(b, '*')
			b = strconv.AppendInt(b, int64(gw.Weight), 10)
		}
	}
	return string(b)
}

// Select returns the gateway for a flow, by the flow's hash (FlowHash) and the weights; false if the list is empty or none
// is alive. The kernel's rule for `ip route … nexthop … weight` applies, so that the shares are the kernel's.
//
// alive says whether a gateway may be used (nil: all may); Select asks it about one gateway if that one is alive, about a
// few more if not, and never twice about the same address. While a gateway is dead its flows are spread over the others by
// weight, whichever and however many die; flows of the living stay where they are; the dead one gets its own flows back
// when it lives again. Two callers agree if their hash, list and answers of alive do.
//
// Select does not allocate, but a method value passed as alive does: hoist it.
func (g Gateways) Select(hash uint32, alive func(netip.Addr) bool) (netip.Addr, bool) {
	s := g.set
	if s == nil {
		return netip.Addr{}, false
	}
	addr := s.gateways[s.pick(hash)].Addr
	if alive == nil || alive(addr) {
		return addr, true
	}
	return s.survivor(hash, addr, alive)
}

// pick returns the gateway that owns the hash while all are alive.
func (s *gatewaySet) pick(hash uint32) int {
	const few = 16 // up to which looking at all limits is faster than a search that mispredicts
	h, limits := hash>>1, s.limits
	if len(limits) > few {
		i, _ := slices.BinarySearch(limits, h+1) // the first limit above h
		return i
	}
	i := 0
	for _, limit := range limits {
		if limit <= h {
			i++
		}
	}
	return i
}

// inOrder is how many spares survivor asks about strictly in a flow's order of preference; each costs a pass over all.
const inOrder = 4

// survivor returns the flow's first choice among the living other than dead: the one with the least cost. Costs depend on
// flow and gateway only, so each flow has one fixed order of preference, and a death moves the flows of the dead, no others.
//
// It asks in that order first. If very many are dead it goes on in the list's order, only about those that would beat the
// best so far.
func (s *gatewaySet) survivor(hash uint32, dead netip.Addr, alive func(netip.Addr) bool) (netip.Addr, bool) {
	if len(s.spares) == 1 {
		return netip.Addr{}, false
	}
	r := rendezvous{hash: hash, dead: dead, asked: -1, askedCost: -1}
	for range inOrder {
		best := s.next(&r, nil)
		if best < 0 {
			return netip.Addr{}, false
		}
		if addr := s.spares[best].addr; alive(addr) {
			return addr, true
		}
	}
	if best := s.next(&r, alive); best >= 0 {
		return s.spares[best].addr, true
	}
	return netip.Addr{}, false
}

// rendezvous is how far the search for one packet is: the spares up to the one asked last, in the order of cost and then of
// the list, are dead.
type rendezvous struct {
	hash      uint32
	dead      netip.Addr
	asked     int
	askedCost float64
}

// next returns the cheapest spare that is alive (nil: all are) and comes after those asked, and counts it as asked;
// negative if there is none.
func (s *gatewaySet) next(r *rendezvous, alive func(netip.Addr) bool) int {
	best, bestCost := -1, math.Inf(1)
	for i := range s.spares {
		sp := &s.spares[i]
		if sp.addr == r.dead {
			continue
		}
		u := sp.draw(r.hash)
		// 1-u <= -ln(u) spares most of the logarithms. Rounding must not let it pass for more.
		if (1-u)*sp.inverse*(1-1e-9) >= bestCost {
			continue
		}
		cost := -math.Log(u) * sp.inverse
		if cost < bestCost && (cost > r.askedCost || cost == r.askedCost && i > r.asked) && (alive == nil || alive(sp.addr)) {
			best, bestCost = i, cost
		}
	}
	r.asked, r.askedCost = best, bestCost
	return best
}

// draw returns a number in (0, 1] for flow and address. The cost -ln(draw)/weight is then a draw from the exponential
// distribution whose rate is the weight, and the least of several falls on each in proportion to its weight (weighted
// rendezvous hashing).
func (sp *spare) draw(hash uint32) float64 {
	x := foldMul(uint64(hash)*salt0^sp.key, sp.key^salt1)
	x = foldMul(x^salt2, salt3)
	return float64(x>>11+1) / (1 << 53)
}

// newGatewaySet keeps gws, whose weights are in force. It must not be empty.
func newGatewaySet(gws []Gateway) *gatewaySet {
	s := &gatewaySet{gateways: gws, limits: thresholds(gws), spares: make([]spare, 0, len(gws))}
	sums := make(map[netip.Addr]float64, len(gws))
	for _, gw := range gws {
		if _, again := sums[gw.Addr]; !again {
			s.spares = append(s.spares, spare{addr: gw.Addr, key: addrKey(gw.Addr)})
		}
		sums[gw.Addr] += float64(gw.Weight)
	}
	for i := range s.spares {
		s.spares[i].inverse = 1 / sums[s.spares[i].addr]
	}
	return s
}

// thresholds returns where the shares of all gateways but the last end in the space of 31-bit hashes. They are the
// kernel's upper bounds (net/ipv4/fib_semantics.c, fib_rebalance) plus one. A share may be empty: a weight of 1 beside
// much more than 1<<31 of others.
func thresholds(gws []Gateway) []uint32 {
	var total, sum uint64
	for _, gw := range gws {
		total += uint64(gw.Weight)
	}
	limits := make([]uint32, len(gws)-1)
	for i := range limits {
		sum += uint64(gws[i].Weight)
		lo, carry := bits.Add64(sum<<31, total/2, 0) // sum<<31 may need more than 64 bits
		limit, _ := bits.Div64(sum>>33+carry, lo, total)
		limits[i] = uint32(limit)
	}
	return limits
}

// addrKey hashes an address, the same on every machine.
func addrKey(a netip.Addr) uint64 {
	b := a.As16()
	key := foldMul(binary.BigEndian.Uint64(b[:])^salt0, binary.BigEndian.Uint64(b[8:])^salt1)
	for _, c := range []byte(a.Zone()) {
		key = foldMul(key^uint64(c), salt2)
	}
	return foldMul(key^salt3, salt0)
}

// gatewayPool shares the lists of one device: equal ones are one. It forgets a list soon after the last Gateways that
// refers to it is gone. The zero value is empty and ready; it may be used concurrently and must not be copied.
type gatewayPool struct {
	mu   sync.Mutex
	seed maphash.Seed                          // random: the lists come from others, who could prepare collisions
	sets map[uint64][]weak.Pointer[gatewaySet] // by hash of the list; nil until the first list
}

// intern returns the one Gateways for the list; zero if it is empty. gws stays the caller's. A weight below 1 counts as 1,
// one above 1<<31 - 1 as that.
func (p *gatewayPool) intern(gws []Gateway) Gateways {
	if len(gws) == 0 {
		return Gateways{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sets == nil {
		p.seed = maphash.MakeSeed()
		p.sets = make(map[uint64][]weak.Pointer[gatewaySet])
	}
	return p.internLocked(p.hashLocked(gws), gws)
}

// internLocked is intern for a list with a known hash; lists that share one are told apart.
func (p *gatewayPool) internLocked(hash uint64, gws []Gateway) Gateways {
	for _, w := range p.sets[hash] {
		if s := w.Value(); s != nil && equalGateways(s.gateways, gws) {
			return Gateways{s}
		}
	}
	inForce := make([]Gateway, len(gws))
	for i, gw := range gws {
		inForce[i] = gw.effective()
	}
	s := newGatewaySet(inForce)
	w := weak.Make(s)
	p.sets[hash] = append(p.sets[hash], w)
	runtime.AddCleanup(s, func(w weak.Pointer[gatewaySet]) { p.forget(hash, w) }, w)
	return Gateways{s}
}

// forget removes the set that w pointed to. An equal set that was made since has another weak pointer, and stays.
func (p *gatewayPool) forget(hash uint64, w weak.Pointer[gatewaySet]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rest := slices.DeleteFunc(p.sets[hash], func(x weak.Pointer[gatewaySet]) bool { return x == w })
	if len(rest) == 0 {
		delete(p.sets, hash)
	} else {
		p.sets[hash] = rest
	}
}

func (p *gatewayPool) hashLocked(gws []Gateway) uint64 {
	var h uint64
	for _, gw := range gws {
		h = foldMul(h^maphash.Comparable(p.seed, gw.effective()), salt0)
	}
	return h
}

// equalGateways compares a list in the pool with a given one, whose weights may be silent.
func equalGateways(inForce, given []Gateway) bool {
	return slices.EqualFunc(inForce, given, func(a, b Gateway) bool { return a == b.effective() })
}
