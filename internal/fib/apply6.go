package fib

import (
	"slices"

	"example.com/overlay/internal/kernel"
)

// put6 takes a route of ours into a group of IPv6 routes. Those with gateways are one multipath, whose announcements show
// all legs; the others stand in the order in which they came (net/ipv6/ip6_fib.c, fib6_add_rt2node).
func (e *edit) put6(lo, hi int, change kernel.Change, n entry) {
	if change == kernel.Created {
		hi = e.clear(lo, hi)
	}
	if change == kernel.Replaced {
		e.replace6(lo, hi, n)
		return
	}
	at := e.find(lo, hi, n.shape)
	if e.t.shapes.all[n.shape].joins {
		at = e.joined(lo, hi)
	}
	switch {
	case at < 0:
	case e.t.shapes.all[n.shape].joins:
		e.swap(at, n.shape)
		if hi-lo == 1 {
			e.settle(at)
		}
		return
	case change == kernel.Refreshed:
		e.settle(at)
		e.changed = true
		return
	default:
		e.remove(at) // it had gone untold, or was shown by a dump
		hi--
	}
	unsure := e.t.shapes.all[n.shape].joins && len(e.t.shapes.all[n.shape].route.Legs) > 1 && e.strangers(lo, hi)
	e.push(lo, hi, change, n)
	if unsure {
		e.doubt(lo, hi+1) // it has joined a stranger's, perhaps one that stands before others
	}
}

// replace6 puts a route in the place of the first of its kind (multipath or not) in the group, or if there is none of the
// first of all. A multipath is replaced with all its legs.
func (e *edit) replace6(lo, hi int, n entry) {
	sh := &e.t.shapes.all[n.shape]
	same := e.find(lo, hi, n.shape)
	at := e.first6(lo, hi, sh.joins)
	switch {
	case lo == hi:
		n.state = moreBefore | moreAfter
		e.insert(lo, n)
	case sh.joins && at >= 0:
		if hi-lo == 1 {
			e.settle(at)
		}
		e.anyOf(lo, hi, at)
		e.note(at)
		e.swap(at, n.shape)
	case same >= 0 && sh.route.NextHop != 0:
		// Either the nexthop object changed, or the first was replaced by an equal of one that stands behind.
		e.settle(same)
		e.changed = true
		if same != at || e.strangers(lo, hi) {
			e.doubt(lo, hi)
			e.chain[same].state |= twin
		}
	case e.unsure6(lo, hi, at), e.unsure(n.shape, lo, hi), e.t.windows[e.key.family()].open, e.chain[max(at, lo)].state&twin != 0:
		e.insert(lo, n)
		e.doubt(lo, hi+1)
	default:
		at = max(at, lo)
		if same >= 0 && same != at {
			e.remove(same)
			at, hi = at-btoi(same < at), hi-1
			e.chain[at].state |= twin
		}
		e.note(at)
		unsure := e.anyOf(lo, hi, at)
		e.swap(at, n.shape)
		if !unsure {
			e.settle(at)
		}
	}
}

// unsure6 says whether the route at a place, the first of its kind that is known, may not be what a replacement takes; at < 0: none is known.
func (e *edit) unsure6(lo, hi, at int) bool {
	if at < 0 {
		return e.strangers(lo, hi)
	}
	return e.strangers(lo, at) || e.chain[at].before > 0 || e.chain[at].state&moreBefore != 0
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// first6 returns the first of a kind in a group, negative if there is none.
func (e *edit) first6(lo, hi int, joins bool) int {
	for i := lo; i < hi; i++ {
		if e.shape(i).joins == joins {
			return i
		}
	}
	return -1
}

// stranger6 notes a stranger's route in a group of ours.
func (e *edit) stranger6(lo, hi int, change kernel.Change, r *kernel.FIBRoute, shape uint32) {
	if change == kernel.Created {
		e.clear(lo, hi)
		return
	}
	if at := e.find(lo, hi, shape); at >= 0 {
		if change != kernel.Replaced && change != kernel.Refreshed {
			e.remove(at)
		}
		return
	}
	if lo == hi {
		return
	}
	at := e.first6(lo, hi, joins(r))
	switch {
	case joins(r) && at >= 0: // no leg of the multipath is ours any more
		e.anyOf(lo, hi, at)
		e.note(at)
		e.chain[at].before = add(e.chain[at].before, 1)
		e.remove(at)
	case change == kernel.Refreshed:
	case change != kernel.Replaced:
		e.chain[hi-1].after = add(e.chain[hi-1].after, 1)
	default:
		if e.strangers(lo, hi) {
			e.doubt(lo, hi) // it may have been one of theirs, of either kind
			e.chain[lo].state |= moreBefore
			return
		}
		e.taken(lo, hi, max(at, lo), false)
	}
}

// part takes legs out of the multipath of a group: the kernel announces one that was deleted alone, or all of them at once
// (kernel.md A11).
func (e *edit) part(lo, hi int, r *kernel.FIBRoute) {
	at := e.joined(lo, hi)
	if at < 0 {
		e.strangerGone(lo, hi)
		return
	}
	e.note(at)
	rest := e.shape(at).route
	rest.Legs = slices.Clone(rest.Legs)
	for _, gone := range r.Legs {
		i := slices.IndexFunc(rest.Legs, func(leg kernel.Leg) bool { return leg.Gateway == gone.Gateway && leg.Link == gone.Link })
		if i >= 0 {
			rest.Legs = slices.Delete(rest.Legs, i, i+1)
		}
	}
	switch {
	case len(rest.Legs) == len(e.shape(at).route.Legs):
		e.doubt(at, at+1) // none of those that are known
		return
	case len(rest.Legs) == 0:
		if e.chain[at].state&moreAfter != 0 { // what a dump left out behind its first leg may be ours, and shows now
			e.ask = true
			e.t.veils.add(e.key, e.t.windows[1].number, nil)
			e.t.veils.tell(e.key)
		}
		e.remove(at)
		return
	}
	rest.Prefix = r.Prefix
	shape := e.t.intern(&rest)
	e.swap(at, shape)
	e.settle(at)
	if hi-lo > 1 || e.strangers(lo, hi) {
		e.doubt(lo, hi) // the multipath stands where its first leg stands
	}
}
