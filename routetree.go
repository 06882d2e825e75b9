package overlay

import (
	"iter"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// offer is what one layer says of a prefix.
type offer struct {
	gateways  Gateways // none: on-link
	metric    uint32   // effective: IPv6's 0 is 1024 (kernel.md V21)
	steerOnly bool     // static: NoInstall, the kernel has no say: at equal metric it wins
	first     bool     // learned: in the kernel's order it stands before an installed static route of equal metric
}

// staticPrevails is the whole rule by which two layers that speak of one prefix become one answer: the kernel's own, lower metric
// first and then its order, but that it never saw a steer-only route.
func staticPrevails(static, learned offer) bool {
	if static.metric != learned.metric {
		return static.metric < learned.metric
	}
	return static.steerOnly || !learned.first
}

// merge returns the answer for a prefix of which the layers say these; false: neither speaks.
func merge(static offer, inStatic bool, learned offer, inLearned bool) (Gateways, bool) {
	if inStatic && (!inLearned || staticPrevails(static, learned)) {
		return static.gateways, true
	}
	return learned.gateways, inLearned
}

// layer is one source of routes. The zero value is empty.
//
// A trie serves here as a map would: it keeps 33 to 83 bytes a route, maps by prefix length keep 43 to 84. Only of IPv6 sites with
// few /64s each the trie keeps more, 140. One map by netip.Prefix keeps 98.
type layer struct{ bart.Table[offer] }

// over returns what is said of a prefix when o is said of it beside have: of several routes the lowest metric answers, of equals the
// last. That one of the equals is not in the kernel's hands is enough to be steer-only.
func (o offer) over(have offer) offer {
	if have.metric < o.metric {
		return have
	}
	o.steerOnly = o.steerOnly || have.steerOnly && have.metric == o.metric
	return o
}

// source is what the tree asks of a layer, with its lock held.
type source interface {
	Get(netip.Prefix) (offer, bool)
	All() iter.Seq2[netip.Prefix, offer]
}

// differing lists the prefixes of which two layers say different things.
func differing(was, is source) []netip.Prefix {
	var prefixes []netip.Prefix
	for p, o := range is.All() {
		if had, ok := was.Get(p); !ok || had != o {
			prefixes = append(prefixes, p)
		}
	}
	for p := range was.All() {
		if _, ok := is.Get(p); !ok {
			prefixes = append(prefixes, p)
		}
	}
	return prefixes
}

// staticLayer is what a valid Config says; a pure function of it, but for the gateways' identity, which is the pool's.
func staticLayer(c *Config, pool *gatewayPool) *layer {
	l := new(layer)
	eachOffer(c, pool, nil, func(p netip.Prefix, o offer) {
		if have, ok := l.Get(p); ok {
			o = o.over(have)
		}
		l.Insert(p, o)
	})
	return l
}

// offersFor is what it says of some prefixes: a map, as nobody looks for the longest prefix there.
func offersFor(c *Config, pool *gatewayPool, only map[netip.Prefix]bool) map[netip.Prefix]offer {
	said := make(map[netip.Prefix]offer, len(only))
	eachOffer(c, pool, only, func(p netip.Prefix, o offer) {
		if have, ok := said[p]; ok {
			o = o.over(have)
		}
		said[p] = o
	})
	return said
}

// eachOffer goes through all that a valid Config says of the prefixes in only (nil: of all). A network competes as its connected
// route.
func eachOffer(c *Config, pool *gatewayPool, only map[netip.Prefix]bool, say func(netip.Prefix, offer)) {
	for i := range c.Routes {
		if r := &c.Routes[i]; only == nil || only[r.Prefix] {
			say(r.Prefix, offer{gateways: pool.intern(r.Via), metric: c.keyOf(r).Metric, steerOnly: r.NoInstall})
		}
	}
	for _, network := range c.Networks {
		if key := connectedKey(network); only == nil || only[key.Prefix] {
			say(key.Prefix, offer{metric: key.Metric})
		}
	}
}

// change is one for a layer: of prefix it says offer from now on or, gone, nothing.
type change struct {
	prefix netip.Prefix
	offer  offer
	gone   bool
}

// routeTree holds what Config and kernel say of each prefix, and publishes what follows from both as one immutable snapshot.
// Writers take turns; readers load one pointer and never wait. The zero value is empty.
type routeTree struct {
	pool      gatewayPool
	current   atomic.Pointer[snapshot]
	mu        sync.Mutex // of all below
	config    *layer     // the static layer; nil: empty
	kernel    source     // the learned one; nil: nothing is learned
	published int        // snapshots so far
}

// lookup returns the answer for dst by longest prefix, from what is published.
func (t *routeTree) lookup(dst netip.Addr) (Gateways, bool) { return t.current.Load().lookup(dst) }

// replace makes next, which it keeps, the whole static layer, in one publication at most. Beyond a comparison of the two it costs
// what differs: a Reload beside a million learned routes does not build them anew.
func (t *routeTree) replace(next *layer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	prefixes := differing(t.staticLocked(), next)
	t.config = next
	t.publishLocked(prefixes)
}

// change applies changes to the static layer, the last for a prefix being in force, in one publication at most. What it costs
// follows from their number. Applied again they do nothing; the caller reverts with changes that say what was before.
func (t *routeTree) change(changes []change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	static := t.staticLocked()
	prefixes := make([]netip.Prefix, len(changes))
	for i := range changes {
		c := &changes[i]
		if prefixes[i] = c.prefix; c.gone {
			static.Delete(c.prefix)
		} else {
			static.Insert(c.prefix, c.offer)
		}
	}
	t.publishLocked(prefixes)
}

// follow makes next, nil for none, the learned layer. From then on whoever changes what it says does so with the tree's lock, by
// refresh.
func (t *routeTree) follow(next source) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var was, is source = new(layer), new(layer)
	if t.kernel != nil {
		was = t.kernel
	}
	if next != nil {
		is = next
	}
	prefixes := differing(was, is)
	t.kernel = next
	t.publishLocked(prefixes)
}

// refresh runs update, which may change what the learned layer says, and returns what it now says where that differs, once
// for a prefix; and publishes what follows.
func (t *routeTree) refresh(update func() []change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changes := update()
	edits := make([]edit, len(changes))
	for i := range changes {
		c := &changes[i]
		static, inStatic := t.staticLocked().Get(c.prefix)
		var learned offer
		if !c.gone {
			learned = c.offer
		}
		gateways, ok := merge(static, inStatic, learned, !c.gone)
		edits[i] = edit{prefix: c.prefix, gateways: gateways, gone: !ok}
	}
	t.editLocked(edits)
}

// routed says whether the Config has a route or a network of this very prefix.
func (t *routeTree) routed(prefix netip.Prefix) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.staticLocked().Get(prefix)
	return ok
}

// longest returns the Config's longest prefix around an address; the zero Prefix if there is none.
func (t *routeTree) longest(addr netip.Addr) netip.Prefix {
	t.mu.Lock()
	defer t.mu.Unlock()
	prefix, _, _ := t.staticLocked().LookupPrefixLPM(netip.PrefixFrom(addr, addr.BitLen()))
	return prefix
}

func (t *routeTree) staticLocked() *layer {
	if t.config == nil {
		t.config = new(layer)
	}
	return t.config
}

// publishLocked publishes what became of the prefixes, if anybody could tell.
func (t *routeTree) publishLocked(prefixes []netip.Prefix) {
	edits := make([]edit, len(prefixes))
	for i, p := range prefixes {
		edits[i] = t.saysLocked(p)
	}
	t.editLocked(edits)
}

// editLocked makes the edits that anybody could tell of, in one publication at most.
func (t *routeTree) editLocked(edits []edit) {
	now := t.current.Load()
	edits = slices.DeleteFunc(edits, func(e edit) bool {
		have, ok := now.get(e.prefix)
		return ok != e.gone && have == e.gateways
	})
	if len(edits) > 0 {
		t.current.Store(now.with(edits))
		t.published++
	}
}

// saysLocked is what the layers together say of p.
func (t *routeTree) saysLocked(p netip.Prefix) edit {
	static, inStatic := t.staticLocked().Get(p)
	var learned offer
	inLearned := false
	if t.kernel != nil {
		learned, inLearned = t.kernel.Get(p)
	}
	gateways, ok := merge(static, inStatic, learned, inLearned)
	return edit{prefix: p, gateways: gateways, gone: !ok}
}

// edit is one for a snapshot.
type edit struct {
	prefix   netip.Prefix
	gateways Gateways
	gone     bool
}

// snapshot is an immutable route tree: readers load it with one atomic pointer, the one writer publishes a new one.
// A prefix that is there without gateways is on-link. nil is empty.
//
// Fast rather than Table, by BenchmarkTreeLookup and BenchmarkTreeMemory, 1,000,000 routes, both beside a Table of slices:
//
//	routes                    Fast         Table        bytes a route: Fast, Table, one layer
//	IPv4 /24                  1.5-1.9 x    1.0-1.2 x    57    39    47
//	IPv4 hosts of 10/8        1.1-1.4 x    1.0 x        57    39    47
//	IPv4 like BGP             1.3-1.4 x    1.0 x        30    24    33
//	IPv6 /48 to /64 at random 0.9-1.1 x    0.7-1.0 x    108   83    83
//	IPv6 /64 of 16 sites      2.0 x        1.1 x        30    28    36
//	IPv6 sites, 4 /64 each    1.0-1.2 x    1.0-1.1 x    366   132   140
//	IPv6 hosts, dense         1.0 x        1.1 x        29    28    36
//
// Neither reaches 1.5 x everywhere: scattered routes cost a cache miss for each of a node's parts. Fast keeps 256 bytes more a
// node; where nodes have few children, as in the last but one, that alone is more than 200 bytes a route.
type snapshot bart.Fast[Gateways]

func (s *snapshot) tree() *bart.Fast[Gateways] { return (*bart.Fast[Gateways])(s) }

// lookup returns the answer for dst by longest prefix.
func (s *snapshot) lookup(dst netip.Addr) (Gateways, bool) {
	if s == nil {
		return Gateways{}, false
	}
	g, ok := s.tree().Lookup(dst)
	if g.set == nowhere {
		return Gateways{}, false
	}
	return g, ok
}

// nowhere is the answer for a prefix of which the kernel has a route that leads to no overlay host: none, and no shorter prefix's
// either.
var nowhere = new(gatewaySet)

// get returns the answer for a very prefix.
func (s *snapshot) get(p netip.Prefix) (Gateways, bool) {
	if s == nil {
		return Gateways{}, false
	}
	return s.tree().Get(p)
}

// all iterates the prefixes with their answers, sorted.
func (s *snapshot) all() iter.Seq2[netip.Prefix, Gateways] {
	return func(yield func(netip.Prefix, Gateways) bool) {
		if s == nil {
			return
		}
		for prefix, gateways := range s.tree().AllSorted() {
			if gateways.set != nowhere && !yield(prefix, gateways) {
				return
			}
		}
	}
}

// routesPerEdit is how many routes are copied in the time of one persistent edit.
//
// BenchmarkTreeBurst: a persistent edit takes 6-25 us, a route in a copy 60-1,100 ns, little where nodes are full; both ways meet
// between 1 edit of 16 routes and 1 of 64, at 1 of 200 in IPv6's dense hosts and 1 of 10 where nodes are nearly empty.
const routesPerEdit = 32

// with returns s with the edits made: one by one, each copying the nodes on its way, or on a copy of all where that is less work.
func (s *snapshot) with(edits []edit) *snapshot {
	if s == nil {
		s = new(snapshot)
	}
	if len(edits)*routesPerEdit > s.tree().Size() {
		return s.withInCopy(edits)
	}
	return s.withOneByOne(edits)
}

func (s *snapshot) withOneByOne(edits []edit) *snapshot {
	tree := s.tree()
	for i := range edits {
		if e := &edits[i]; e.gone {
			tree = tree.DeletePersist(e.prefix)
		} else {
			tree = tree.InsertPersist(e.prefix, e.gateways)
		}
	}
	return (*snapshot)(tree)
}

func (s *snapshot) withInCopy(edits []edit) *snapshot {
	tree := s.tree().Clone()
	for i := range edits {
		if e := &edits[i]; e.gone {
			tree.Delete(e.prefix)
		} else {
			tree.Insert(e.prefix, e.gateways)
		}
	}
	return (*snapshot)(tree)
}

// learn makes the tree's static layer say of the touched prefixes what cfg says, in one publication, and returns how to forget
// the others of them: a Reload learns before the kernel changes and forgets after. Of all that is not touched cfg must say what
// the layer says already.
//
// It reads the Config's routes; all other work follows from the number of touched prefixes.
func (c *core) learn(cfg *Config, touched map[netip.Prefix]bool) (forget []change) {
	say, forget := c.tree.says(cfg, touched)
	c.tree.change(say)
	return forget
}

// publishTouched learns and forgets at once.
func (c *core) publishTouched(cfg *Config, touched map[netip.Prefix]bool) {
	say, forget := c.tree.says(cfg, touched)
	c.tree.change(append(say, forget...))
}

// says sorts the touched prefixes into those of which cfg says something, and the others.
func (t *routeTree) says(cfg *Config, touched map[netip.Prefix]bool) (say, forget []change) {
	said := offersFor(cfg, &t.pool, touched)
	say = make([]change, 0, len(said))
	for p, o := range said {
		say = append(say, change{prefix: p, offer: o})
	}
	forget = make([]change, 0, len(touched)-len(said))
	for p := range touched {
		if _, ok := said[p]; !ok {
			forget = append(forget, change{prefix: p, gone: true})
		}
	}
	return say, forget
}
