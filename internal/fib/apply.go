package fib

import "example.com/overlay/internal/kernel"

// Apply takes one announcement, in the order in which the kernel made them. It may reorder r's legs and keeps nothing of r.
// What it costs depends on how many routes the prefix has, not on the size of the table.
func (t *Table) Apply(change kernel.Change, r *kernel.FIBRoute) {
	k, ok := t.follows(r)
	if !ok {
		return
	}
	t.windows[k.family()].quiet = false
	veiled := t.veils.tell(k)
	if _, known := t.heads[k]; !known && !veiled && change == kernel.Deleted {
		return
	}
	e := t.open(k)
	e.ask, e.changed = veiled, veiled
	lo, hi := e.group(r.Metric)
	if change == kernel.Deleted {
		e.delete(lo, hi, r)
		e.changed = true // whatever it was, a doubt about this prefix is to be asked again
		e.close()
		return
	}
	n, mine := e.admit(lo, hi, r, change == kernel.Replaced || change == kernel.Created)
	switch {
	case n.shape == 0 && lo == hi:
		e.close()
		return
	case mine:
		t.windows[k.family()].back(k, r.Metric, t.shapes.all[n.shape].id)
	}
	switch {
	case k.is6 && mine:
		e.put6(lo, hi, change, n)
	case k.is6:
		e.stranger6(lo, hi, change, r, n.shape)
	case mine:
		e.put4(lo, hi, change, n)
	default:
		e.stranger4(lo, hi, change, r, n.shape)
	}
	e.close()
	t.leave(n.shape)
}

// admit returns the entry that a route would be in a group, with a reference to its shape until leave; and whether it is one of
// those that are kept. A stranger has a shape only if another route has the same. replaces: others of the group go.
func (e *edit) admit(lo, hi int, r *kernel.FIBRoute, replaces bool) (n entry, mine bool) {
	t := e.t
	n.metric = r.Metric
	if t.concerns(r) {
		n.shape = t.intern(r)
	} else if lo < hi {
		n.shape = t.shapes.find(r)
	}
	if n.shape == 0 {
		return n, false
	}
	sh := &t.shapes.all[n.shape]
	sh.refs++
	mine = sh.mine
	if mine && !sh.own && t.full() && !e.inPlace(lo, hi, n.shape, replaces) {
		t.refused++
		t.unlearned = true
		mine = false
	}
	return n, mine
}

func (t *Table) full() bool { return t.cfg.Max > 0 && t.learned >= t.cfg.Max }

// inPlace says whether a group has a route already, or one that it takes the place of, so that they do not become more.
func (e *edit) inPlace(lo, hi int, shape uint32, replaces bool) bool {
	for i := lo; i < hi; i++ {
		sh := e.shape(i)
		if e.chain[i].shape == shape || sh.counts() && (replaces || sh.joins && e.shapeJoins(shape)) {
			return true
		}
	}
	return false
}

// leave gives back the reference that admit took.
func (t *Table) leave(shape uint32) {
	if shape != 0 {
		t.shapes.all[shape].refs--
		t.drop(shape)
	}
}

// concerns says whether a route has a leg through our interface, or throws.
func (t *Table) concerns(r *kernel.FIBRoute) bool {
	legs := r.Legs
	if r.NextHop != 0 {
		legs = t.legsOf(r.NextHop, legs)
	} else if !carries(r) {
		return throws(r)
	}
	for _, leg := range legs {
		if leg.Link == t.cfg.Link {
			return true
		}
	}
	return false
}

// put4 takes a route of ours into a group of IPv4 routes, which are in the order in which the lookup tries them.
func (e *edit) put4(lo, hi int, change kernel.Change, n entry) {
	if change == kernel.Created {
		hi = e.clear(lo, hi)
	}
	if at := e.find(lo, hi, n.shape); at >= 0 {
		gone := change != kernel.Refreshed && e.chain[at].state&doubtful != 0
		if !gone && (change == kernel.Replaced || change == kernel.Refreshed) {
			// The kernel holds no route twice, so this says that the nexthop object behind it changed.
			e.settle(at)
			e.changed = true
			return
		}
		if change == kernel.Replaced && e.shape(at).route.NextHop != 0 {
			// Either that, or it had gone, and has taken the place of the first.
			e.settle(at)
			e.doubt(lo, hi)
			return
		}
		e.remove(at) // it had gone untold, or was shown by a dump
		hi--
	}
	switch change {
	case kernel.Created:
		e.insert(lo, n)
	case kernel.Prepended:
		if lo == hi {
			n.after, n.state = 1, moreAfter
		}
		e.insert(lo, n)
	case kernel.Replaced:
		e.replace4(lo, hi, n)
	default:
		e.push(lo, hi, change, n)
	}
}

// clear empties a group that the kernel says was empty, and returns its new end.
func (e *edit) clear(lo, hi int) int {
	for i := hi - 1; i >= lo; i-- {
		e.note(i)
		e.remove(i)
	}
	return lo
}

// push puts a route behind all others of its metric.
func (e *edit) push(lo, hi int, change kernel.Change, n entry) {
	switch {
	case change == kernel.Created:
	case lo == hi:
		n.before, n.state = 1, moreBefore
		if change == kernel.Replaced || e.key.is6 {
			n.before = 0 // an IPv6 multipath is announced without NLM_F_EXCL even where it is the first
		}
	default:
		last := &e.chain[hi-1]
		n.before, n.state = last.after, moreBefore*(last.state&moreAfter/moreAfter)
		last.after, last.state = 0, last.state&^moreAfter
	}
	e.insert(hi, n)
	if change == kernel.Refreshed {
		e.doubt(hi, hi+1) // it is there, but not necessarily here
	}
}

// replace4 puts a route in the place of the first of its group, whoever's that is (kernel.md A9).
func (e *edit) replace4(lo, hi int, n entry) {
	if lo == hi {
		n.state = moreAfter
		e.insert(lo, n)
		return
	}
	switch first := &e.chain[lo]; {
	case first.before > 0: // a stranger's
		first.before--
		e.insert(lo, n)
	case first.state&(moreBefore|twin) != 0, e.unsure(n.shape, lo, hi):
		e.insert(lo, n)
		e.doubt(lo+1, lo+2)
	default:
		e.note(lo)
		e.anyOf(lo, hi, lo)
		if e.t.windows[e.key.family()].open {
			// Announcements that are older than the dump may tell of the replacement of one that is no longer there.
			e.insert(lo, n)
			e.doubt(lo+1, lo+2)
			return
		}
		e.swap(lo, n.shape)
		e.settle(lo)
	}
}

// unsure says whether a replacement may be a nexthop object's change, for a route that was a stranger's until then.
func (e *edit) unsure(shape uint32, lo, hi int) bool {
	return e.t.shapes.all[shape].route.NextHop != 0 && e.strangers(lo, hi)
}

// stranger4 notes a stranger's route in a group of ours. shape is not 0 if one of ours has the same: its nexthop object
// has moved to another interface, or there are too many routes.
func (e *edit) stranger4(lo, hi int, change kernel.Change, r *kernel.FIBRoute, shape uint32) {
	if change == kernel.Created {
		e.clear(lo, hi)
		return
	}
	if at := e.find(lo, hi, shape); at >= 0 && change != kernel.Replaced && change != kernel.Refreshed {
		e.remove(at)
		hi--
	} else if at >= 0 {
		return
	}
	if lo == hi {
		return
	}
	switch first, last := &e.chain[lo], &e.chain[hi-1]; change {
	case kernel.Prepended:
		first.before = add(first.before, 1)
	case kernel.Appended:
		last.after = add(last.after, 1)
	case kernel.Refreshed:
	default:
		e.taken(lo, hi, lo, r.NextHop != 0)
	}
}

// taken notes that a stranger's route has replaced the one at i, unless that was another stranger's.
func (e *edit) taken(lo, hi, i int, byNextHop bool) {
	c := &e.chain[i]
	switch {
	case c.before > 0:
	case byNextHop && e.strangers(lo, hi): // or another's nexthop object has changed, wherever its route stands
		c.state |= moreBefore
		e.doubt(i, i+1)
	case c.state&(moreBefore|twin) != 0:
		c.before, c.state = 1, c.state|moreBefore
		e.doubt(i, i+1)
	case e.t.windows[e.key.family()].open:
		c.before = 1
		e.doubt(i, i+1)
	case e.anyOf(lo, hi, i):
		e.chain[lo].state |= moreBefore
	default:
		c.before = 1
		e.note(i)
		e.remove(i)
	}
}

// delete takes out the route that the kernel has deleted.
func (e *edit) delete(lo, hi int, r *kernel.FIBRoute) {
	if joins(r) {
		e.part(lo, hi, r)
		return
	}
	at := e.find(lo, hi, e.t.shapes.find(r))
	switch {
	case at < 0:
		e.strangerGone(lo, hi)
	case e.chain[at].state&twin != 0:
		e.settle(at)
		e.chain[at].state &^= twin
		e.doubt(at, at+1)
	default:
		e.note(at)
		e.remove(at)
	}
}
