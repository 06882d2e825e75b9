package fib

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// Answer is what the kernel does with packets to one prefix that it hands to our interface.
type Answer struct {
	Kind   Kind
	Set    *Set   // for Via
	Metric uint32 // in force
	Table  uint32
	First  bool // no route of equal metric that we have installed ourselves stands before it
	Over   bool // a route of this prefix that we have installed ourselves stands in a later table; the answer may be a shorter prefix's

	shorter bool // the route that answers is a shorter prefix's, and answers beside this prefix, too
}

// Changes yields, once, the prefixes whose answer may have changed since the last call, with the answer now. If the caller
// stops early the rest stays for the next call.
func (t *Table) Changes() iter.Seq2[netip.Prefix, Answer] {
	return func(yield func(netip.Prefix, Answer) bool) {
		t.freshen()
		const large = 1 << 12
		shrink := len(t.dirty) > large
		for k := range t.dirty {
			delete(t.dirty, k)
			if !yield(k.prefix(), t.answer(k)) {
				return
			}
		}
		if shrink {
			t.dirty = make(map[key]struct{}) // a map keeps the room that a burst has needed
		}
	}
}

// All yields every prefix that has an answer.
func (t *Table) All() iter.Seq2[netip.Prefix, Answer] {
	return func(yield func(netip.Prefix, Answer) bool) {
		t.freshen()
		for k := range t.heads {
			a := t.answer(k)
			if a.Kind != Absent && t.isFirst(k) && !yield(k.prefix(), a) {
				return
			}
		}
		for k := range t.beginnings() {
			if a := t.answer(k); a.Kind != Absent && !yield(k.prefix(), a) {
				return
			}
		}
	}
}

// beginnings are where the destinations of rules begin and no table has a route.
func (t *Table) beginnings() map[key]struct{} {
	keys := make(map[key]struct{})
	for family := range t.order {
		for _, step := range t.order[family] {
			k := keyOf(step.To, 0)
			if last := k; step.To.IsValid() && t.cover[family] != nil {
				last.table = uint16(len(t.cfg.Tables) - 1)
				if t.heads[last] == 0 && t.isFirst(last) {
					keys[k] = struct{}{}
				}
			}
		}
	}
	return keys
}

// isFirst says whether none of the tables before that of k has its prefix.
func (t *Table) isFirst(k key) bool {
	for ; k.table > 0; k.table-- {
		before := k
		before.table--
		if t.heads[before] != 0 {
			return false
		}
	}
	return true
}

// Answer returns the answer for one prefix, not for what is in it.
func (t *Table) Answer(p netip.Prefix) Answer {
	t.freshen()
	return t.answer(keyOf(p, 0))
}

// answer looks into the tables in the order of the rules. Where one throws the next is asked, for a part of a shorter
// prefix there, too.
func (t *Table) answer(k key) Answer {
	order, cover := t.order[k.family()], t.cover[k.family()]
	p, thrown := k.prefix(), false
	for _, step := range order {
		at := k
		at.table = t.tables[step.Table]
		if cover != nil {
			if step.To.IsValid() && !covers(step.To, p) {
				continue
			}
			q, ok := cover[at.table].LookupPrefixLPM(p)
			if !ok {
				continue
			}
			at.bits, at.addr = uint8(q.Bits()), q.Addr().As16()
		}
		if int16(at.bits) <= step.Suppress {
			continue
		}
		a, passed := t.best(at)
		switch {
		case passed:
			thrown = thrown || at.bits == k.bits
			continue
		case at.bits != k.bits && !thrown && step.To != p:
			// An earlier table answers for all of it. A shorter prefix's answer holds here, unless it is in our own route's way.
			if a.Kind == Absent || !t.owns(k) {
				return Answer{}
			}
			a.Table, a.First, a.Over, a.shorter = step.Table, true, true, true
			return a
		case a.Kind != Absent:
			a.Table, a.shorter = step.Table, at.bits != k.bits && !thrown
			a.Over = cover != nil && t.owns(k) && !t.owned[k.family()][at.table].Get(p)
			return a
		case cover != nil:
			return Answer{} // our own route
		}
	}
	return Answer{}
}

// owns says whether some table has a route of our own for the prefix of k, which is in use.
func (t *Table) owns(k key) bool {
	return slices.ContainsFunc(t.owned[k.family()], func(prefixes *bart.Lite) bool { return prefixes.Get(k.prefix()) })
}

// best returns the first route of a chain that is in use and not ours; thrown: one that throws stands before all. In IPv6
// the router preference counts before the place among equal metrics (kernel.md V14).
func (t *Table) best(k key) (a Answer, thrown bool) {
	type rival struct {
		metric uint32
		rank   int
		there  bool
	}
	var own, first rival // the first of ours, and of the others
	hidden := false      // by one of ours with a lower metric
	for i := t.heads[k]; i != 0; i = t.entries.at(i).next {
		c := t.entries.at(i)
		if first.there && (!k.is6 || c.metric != first.metric) {
			break
		}
		sh := &t.shapes.all[c.shape]
		r := rival{c.metric, 0, true}
		if k.is6 {
			r.rank = rank(sh.route.Pref)
		}
		switch {
		case sh.kind == Absent && !sh.throw:
		case sh.own && sh.kind != Absent:
			if !own.there || own.metric != r.metric || r.rank > own.rank {
				own = r
			}
			if r.rank > first.rank {
				a.First = false
			}
		case !first.there || r.rank > first.rank:
			first, thrown = r, sh.throw
			a = Answer{Kind: sh.kind, Set: sh.set, Metric: c.metric}
			a.First = !own.there || own.metric != r.metric || r.rank > own.rank
			hidden = own.there && own.metric != r.metric
		}
	}
	if thrown {
		return Answer{}, a.First && !hidden
	}
	return a, false
}

// rank orders values of RTA_PREF, a signed number of two bits; 2, which is reserved, is medium.
func rank(pref uint8) int {
	switch pref {
	case 1:
		return 1
	case 3:
		return -1
	}
	return 0
}

// touch notes that a prefix may have another answer; with several tables, also what follows from it in the others.
func (t *Table) touch(k key) {
	family, table := k.family(), k.table
	cover, owned, passing := t.cover[family], t.owned[family], t.passing[family]
	k.table = 0
	t.dirty[k] = struct{}{}
	if cover == nil {
		return
	}
	t.spreadTo(k)
	k.table = table
	_, passed := t.best(k)
	live, own := false, false
	for i := t.heads[k]; i != 0; i = t.entries.at(i).next {
		sh := &t.shapes.all[t.entries.at(i).shape]
		live = live || sh.kind != Absent || sh.throw
		own = own || sh.own && sh.kind != Absent
	}
	p := k.prefix()
	put(owned[table], p, own)
	spread := put(cover[table], p, live)
	spread = put(passing[table], p, passed) || spread
	for other := range cover {
		t.spread(owned[other], p) // what it is counts where another table's answer may be that of a shorter prefix
		t.spread(passing[other], p)
		if spread && other != int(table) {
			t.spread(cover[other], p)
			t.askAgain(uint16(other), p)
		}
	}
}

// askAgain has the kernel asked once more about what is in doubt in a part of a table, which another has hidden perhaps.
func (t *Table) askAgain(table uint16, p netip.Prefix) {
	if len(t.doubts) == 0 {
		return
	}
	for q := range t.cover[familyIndex(p.Addr().Is6())][table].Subnets(p) {
		k := keyOf(q, table)
		if _, doubtful := t.doubts[k]; doubtful {
			t.doubts[k] = true
		}
	}
}

// covers says whether a prefix has all of another.
func covers(p, other netip.Prefix) bool { return p.Bits() <= other.Bits() && p.Contains(other.Addr()) }

// spreadTo notes that where the destinations of a rule begin there may be another answer: that of the prefix of k, which has more.
func (t *Table) spreadTo(k key) {
	for _, step := range t.order[k.family()] {
		if step.To.IsValid() && covers(k.prefix(), step.To) {
			t.dirty[keyOf(step.To, 0)] = struct{}{}
		}
	}
}

// spread notes that what a prefix covers of a set may have another answer.
func (t *Table) spread(set *bart.Lite, p netip.Prefix) {
	for q := range set.Subnets(p) {
		t.dirty[keyOf(q, 0)] = struct{}{}
	}
}

// put puts a prefix into a set, or takes it out, and says whether that changed anything.
func put(set *bart.Lite, p netip.Prefix, in bool) bool {
	switch {
	case set.Get(p) == in:
		return false
	case in:
		set.Insert(p)
	default:
		set.Delete(p)
	}
	return true
}

// freshen finds the prefixes whose shapes have changed.
func (t *Table) freshen() {
	if len(t.stale) == 0 {
		return
	}
	var keys []key
	everywhere := false
	for i := range t.stale {
		if users := t.shapes.all[i].users; users == nil {
			everywhere = true
		} else {
			for k := range users {
				keys = append(keys, k)
			}
		}
	}
	if everywhere {
		keys = keys[:0]
		for k, i := range t.heads {
			for ; i != 0; i = t.entries.at(i).next {
				if t.stale[t.entries.at(i).shape] {
					keys = append(keys, k)
					break
				}
			}
		}
	}
	clear(t.stale)
	for _, k := range keys {
		e := t.open(k)
		e.changed = true
		e.close()
	}
}

// SetOrder says in which order a family's rules look at the tables; see Order.
func (t *Table) SetOrder(is6 bool, steps []Step) {
	kept := make([]Step, 0, len(steps))
	for _, step := range steps {
		if _, ok := t.tables[step.Table]; ok {
			kept = append(kept, step)
		}
	}
	everywhere := keyOf(netip.PrefixFrom(netip.IPv4Unspecified(), 0), 0)
	if is6 {
		everywhere = keyOf(netip.PrefixFrom(netip.IPv6Unspecified(), 0), 0)
	}
	t.spreadTo(everywhere)
	t.order[familyIndex(is6)] = kept
	t.spreadTo(everywhere)
	for k := range t.heads {
		if k.is6 == is6 {
			k.table = 0
			t.dirty[k] = struct{}{}
		}
	}
}
