package overlay

import (
	"iter"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"github.com/gaissmai/bart"
)

// snapshot is an immutable route tree: readers load it with one atomic pointer, the one writer publishes a new one.
// A prefix that is there without gateways is on-link.
type snapshot struct {
	tree *bart.Table[Gateways]
}

// lookup returns the answer for dst by longest prefix.
func (s *snapshot) lookup(dst netip.Addr) (Gateways, bool) {
	if s == nil {
		return Gateways{}, false
	}
	return s.tree.Lookup(dst)
}

// all iterates the prefixes with their answers, sorted.
func (s *snapshot) all() iter.Seq2[netip.Prefix, Gateways] {
	return func(yield func(netip.Prefix, Gateways) bool) {
		if s != nil {
			s.tree.AllSorted()(yield)
		}
	}
}

// publishBoth puts next into the tree and leaves what only old has: while the kernel changes from one to the other, what it
// hands us still finds its gateway.
func (c *core) publishBoth(old, next *Config) {
	both := newSnapshot(next, &c.pool)
	for prefix, gateways := range newSnapshot(old, &c.pool).tree.All() {
		if _, ok := both.tree.Get(prefix); !ok {
			both.tree.Insert(prefix, gateways)
		}
	}
	c.table.Store(both)
}

// newSnapshot builds the tree of a valid Config: a pure function of it, but for the gateways' identity, which is the pool's.
// Of several routes for one prefix the one with the lowest metric answers; a network competes as its connected route.
func newSnapshot(c *Config, pool *gatewayPool) *snapshot {
	type offer struct {
		key kernel.RouteKey
		via []Gateway
	}
	var offers []offer
	for i := range c.Routes {
		r := &c.Routes[i]
		offers = append(offers, offer{key: c.keyOf(r), via: r.Via})
	}
	for _, network := range c.Networks {
		offers = append(offers, offer{key: connectedKey(network)})
	}
	// Highest metric first, so that the best is the last to be inserted and stays.
	slices.SortStableFunc(offers, func(a, b offer) int { return compareUint32(b.key.Metric, a.key.Metric) })
	tree := new(bart.Table[Gateways])
	for _, o := range offers {
		tree.Insert(o.key.Prefix, pool.intern(o.via))
	}
	return &snapshot{tree: tree}
}

func compareUint32(a, b uint32) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
