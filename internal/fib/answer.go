package fib

import (
	"iter"
	"net/netip"
)

// Answer is what the kernel does with packets to one prefix that it hands to our interface.
type Answer struct {
	Kind   Kind
	Set    *Set   // for Via
	Metric uint32 // in force
	Table  uint32
	First  bool // no route of equal metric that we have installed ourselves stands before it
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
			if a.Kind != Absent && a.Table == t.cfg.Tables[k.table] && !yield(k.prefix(), a) {
				return
			}
		}
	}
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
		case at.bits != k.bits && !thrown:
			return Answer{} // an earlier table answers for all of it
		case a.Kind != Absent:
			a.Table = step.Table
			return a
		case cover != nil:
			return Answer{} // our own route
		}
	}
	return Answer{}
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

// touch notes that a prefix may have another answer; with several tables, also what it covers in the others.
func (t *Table) touch(k key) {
	cover, table := t.cover[k.family()], k.table
	k.table = 0
	t.dirty[k] = struct{}{}
	if cover == nil {
		return
	}
	k.table = table
	live := false
	for i := t.heads[k]; i != 0 && !live; i = t.entries.at(i).next {
		sh := &t.shapes.all[t.entries.at(i).shape]
		live = sh.kind != Absent || sh.throw
	}
	p := k.prefix()
	if cover[table].Get(p) == live {
		return
	}
	if live {
		cover[table].Insert(p)
	} else {
		cover[table].Delete(p)
	}
	for other, prefixes := range cover {
		if other != int(table) {
			for q := range prefixes.Subnets(p) {
				t.dirty[keyOf(q, 0)] = struct{}{}
			}
		}
	}
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
	t.order[familyIndex(is6)] = kept
	for k := range t.heads {
		if k.is6 == is6 {
			k.table = 0
			t.dirty[k] = struct{}{}
		}
	}
}
