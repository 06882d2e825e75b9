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

// answer looks into the tables in the order of the rules.
func (t *Table) answer(k key) Answer {
	order, cover := t.order[k.family()], t.cover[k.family()]
	for _, step := range order {
		if int16(k.bits) <= step.Suppress {
			continue
		}
		k.table = t.tables[step.Table]
		if a := t.best(k); a.Kind != Absent {
			a.Table = step.Table
			return a
		}
		if cover == nil {
			continue
		}
		if q, ok := cover[k.table].LookupPrefixLPM(k.prefix()); ok && int16(q.Bits()) > step.Suppress {
			break // an earlier table answers for all of it
		}
	}
	return Answer{}
}

// best returns the first route of a chain that is in use and not ours.
func (t *Table) best(k key) Answer {
	var a Answer
	var pref int
	ownMetric, ownPref, owned := uint32(0), 0, false
	for i := t.heads[k]; i != 0; i = t.entries.at(i).next {
		c := t.entries.at(i)
		if a.Kind != Absent && (!k.is6 || c.metric != a.Metric) {
			break
		}
		sh := &t.shapes.all[c.shape]
		switch {
		case sh.kind == Absent:
		case sh.own:
			if !owned || c.metric != ownMetric || rank(sh.route.Pref) > ownPref {
				ownMetric, ownPref, owned = c.metric, rank(sh.route.Pref), true
			}
			if a.Kind != Absent && rank(sh.route.Pref) > pref {
				a.First = false
			}
		case a.Kind == Absent || rank(sh.route.Pref) > pref:
			// In IPv6 the router preference counts before the place (kernel.md V14).
			a.Kind, a.Set, a.Metric, pref = sh.kind, sh.set, c.metric, rank(sh.route.Pref)
			a.First = !owned || ownMetric != c.metric || k.is6 && pref > ownPref
		}
	}
	return a
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
		live = t.shapes.all[t.entries.at(i).shape].kind != Absent
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
