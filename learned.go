package overlay

import (
	"iter"
	"net/netip"
	"slices"

	"example.com/overlay/internal/fib"
	"example.com/overlay/internal/kernel"
)

// What a SystemRoutes leaves silent.
const (
	defaultReadBuffer = 4 << 20
	defaultMaxRoutes  = 4_000_000
)

// learned is the tree's kernel layer: what a fib.Table answers, as offers. It is used with the tree's lock, like the Table.
type learned struct {
	table *fib.Table
	pool  *gatewayPool
	sets  map[*fib.Set]Gateways
}

// newLearned returns the layer of a Config that has SystemRoutes, empty.
func newLearned(c *Config, link int, pool *gatewayPool) *learned {
	return &learned{pool: pool, sets: make(map[*fib.Set]Gateways), table: fib.New(fib.Config{
		Link: int32(link), Protocol: c.protocol(), Tables: c.SystemRoutes.tables(), Overlay: c.overlay(), Max: c.SystemRoutes.max(),
	})}
}

// tables are those whose routes are followed.
func (s *SystemRoutes) tables() []uint32 {
	if len(s.Tables) == 0 {
		return []uint32{kernel.TableMain}
	}
	tables := make([]uint32, len(s.Tables))
	for i, t := range s.Tables {
		tables[i] = uint32(t)
	}
	return tables
}

func (s *SystemRoutes) max() int {
	if s.Max == 0 {
		return defaultMaxRoutes
	}
	return s.Max
}

func (s *SystemRoutes) readBuffer() int {
	if s.ReadBuffer == 0 {
		return defaultReadBuffer
	}
	return s.ReadBuffer
}

// equal says whether two follow the same routes in the same way.
func (s *SystemRoutes) equal(other *SystemRoutes) bool {
	if s == nil || other == nil {
		return s == other
	}
	return slices.Equal(s.tables(), other.tables()) && s.max() == other.max() && s.readBuffer() == other.readBuffer()
}

// overlay says of an address whether it is an overlay host other than ourselves: no other may be a gateway, whoever writes into
// the kernel's table (kernel.md S6).
func (c *Config) overlay() func(netip.Addr) bool {
	networks := slices.Clone(c.Networks)
	return func(a netip.Addr) bool {
		inside := false
		for _, network := range networks {
			if network.Addr() == a {
				return false
			}
			inside = inside || network.Contains(a)
		}
		return inside
	}
}

// Get implements source.
func (l *learned) Get(p netip.Prefix) (offer, bool) { return l.offer(l.table.Answer(p)) }

// All implements source.
func (l *learned) All() iter.Seq2[netip.Prefix, offer] {
	return func(yield func(netip.Prefix, offer) bool) {
		for p, answer := range l.table.All() {
			if o, ok := l.offer(answer); ok && !yield(p, o) {
				return
			}
		}
	}
}

func (l *learned) offer(a fib.Answer) (offer, bool) {
	o := offer{metric: a.Metric, first: a.First}
	if a.Over {
		o.metric = 0 // it comes before our own route, whatever that has
	}
	switch a.Kind {
	case fib.OnLink:
	case fib.Via:
		o.gateways = l.gateways(a.Set)
	case fib.Refused:
		o.gateways = Gateways{nowhere}
	default:
		return o, false
	}
	return o, true
}

// gateways interns a set once, as long as it is remembered.
func (l *learned) gateways(set *fib.Set) Gateways {
	if g, ok := l.sets[set]; ok {
		return g
	}
	const most = 10_000 // sets that nothing leads through any more are not told of
	if len(l.sets) >= most {
		clear(l.sets)
	}
	list := make([]Gateway, len(set.Gateways))
	for i, g := range set.Gateways {
		list[i] = Gateway{Addr: g.Addr, Weight: int(g.Weight)}
	}
	g := l.pool.intern(list)
	l.sets[set] = g
	return g
}

// changed lists what the table now answers otherwise.
func (l *learned) changed() (changes []change) {
	for p, answer := range l.table.Changes() {
		o, ok := l.offer(answer)
		changes = append(changes, change{prefix: p, offer: o, gone: !ok})
	}
	return changes
}

// learnedRoutes is how many routes are followed now.
func (t *routeTree) learnedRoutes() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l, ok := t.kernel.(*learned); ok {
		return l.table.Learned()
	}
	return 0
}

// learnedOffer is what the kernel's layer says of a prefix, if its word counts there.
func (t *routeTree) learnedOffer(p netip.Prefix) (offer, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kernel == nil {
		return offer{}, false
	}
	o, ok := t.kernel.Get(p)
	static, inStatic := t.staticLocked().Get(p)
	return o, ok && !(inStatic && staticPrevails(static, o))
}
