package fib

import "slices"

// edit is one chain while it is changed.
type edit struct {
	t       *Table
	key     key
	chain   []entry // in the kernel's order: by metric, then by place
	slots   []uint32
	changed bool
	ask     bool // there may be routes that are not known
}

// open reads the chain of k.
func (t *Table) open(k key) *edit {
	e := &t.edit
	e.key, e.changed, e.ask = k, false, false
	e.chain, e.slots = e.chain[:0], e.slots[:0]
	for i := t.heads[k]; i != 0; i = t.entries.at(i).next {
		e.chain, e.slots = append(e.chain, *t.entries.at(i)), append(e.slots, i)
	}
	return e
}

// mixed says whether the route at i is a multipath that others share and that stands with other routes: an IPv6 multipath stands where
// its first leg stands that is in use.
func (e *edit) mixed(i int) bool {
	return e.shape(i).mixed && (e.chain[i].state&moreAfter != 0 || e.among(i))
}

// miscounted notes that strangers may have gone untold: of those that were counted there may be any number.
func (e *edit) miscounted() {
	for i := range e.chain {
		e.uncount(i)
		if c := &e.chain[i]; c.after > 0 {
			c.after, c.state = 0, c.state|moreAfter
		}
	}
}

// uncount notes that strangers may stand before the route at i, or none.
func (e *edit) uncount(i int) {
	if c := &e.chain[i]; c.before > 0 {
		c.before, c.state = 0, c.state|moreBefore
	}
}

// among says whether the route at i has others of its metric beside it.
func (e *edit) among(i int) bool {
	return i > 0 && e.chain[i-1].metric == e.chain[i].metric || i+1 < len(e.chain) && e.chain[i+1].metric == e.chain[i].metric
}

// close writes the chain back, without those that no longer lead through our interface (a nexthop object may have moved),
// and notes what follows from it.
func (e *edit) close() {
	t := e.t
	for i := len(e.chain) - 1; i >= 0; i-- {
		if !e.shape(i).mine {
			e.chain[i].before = add(e.chain[i].before, 1) // it stays, as a stranger
			e.remove(i)
		}
	}
	for len(e.slots) < len(e.chain) {
		e.slots = append(e.slots, t.entries.take())
	}
	for len(e.slots) > len(e.chain) {
		t.entries.give(e.slots[len(e.slots)-1])
		e.slots = e.slots[:len(e.slots)-1]
	}
	ask, counted, mixed := e.ask, false, false
	for i := range e.chain {
		c := &e.chain[i]
		ask, counted, mixed = ask || c.state&doubtful != 0, counted || c.before > 0 || c.after > 0, mixed || e.mixed(i)
		c.next = 0
		if i+1 < len(e.slots) {
			c.next = e.slots[i+1]
		}
		*t.entries.at(e.slots[i]) = *c
	}
	if len(e.slots) == 0 {
		delete(t.heads, e.key)
	} else if t.heads[e.key] != e.slots[0] {
		t.heads[e.key] = e.slots[0]
	}
	switch {
	case e.ask, ask && e.changed:
		t.doubts[e.key] = true
	case !ask && len(t.doubts) > 0 && !t.doubts[e.key]: // a question that nobody has put yet may be about routes that are not known
		delete(t.doubts, e.key)
	}
	note(t.counted, e.key, counted)
	note(t.mixed, e.key, mixed)
	if e.changed {
		t.touch(e.key)
	}
}

// note notes whether a chain is one of some.
func note(some map[key]struct{}, k key, is bool) {
	if is {
		some[k] = struct{}{}
	} else if len(some) > 0 {
		delete(some, k)
	}
}

func (e *edit) shape(i int) *shape { return &e.t.shapes.all[e.chain[i].shape] }

// group returns where the routes of a metric stand.
func (e *edit) group(metric uint32) (lo, hi int) {
	for lo < len(e.chain) && e.chain[lo].metric < metric {
		lo++
	}
	for hi = lo; hi < len(e.chain) && e.chain[hi].metric == metric; {
		hi++
	}
	return lo, hi
}

// find returns where in a group the shape stands, negative if nowhere.
func (e *edit) find(lo, hi int, shape uint32) int {
	if shape == 0 {
		return -1
	}
	for i := lo; i < hi; i++ {
		if e.chain[i].shape == shape {
			return i
		}
	}
	return -1
}

// joined returns where the IPv6 multipath of a group stands, negative if there is none.
func (e *edit) joined(lo, hi int) int {
	for i := lo; i < hi; i++ {
		if e.shape(i).joins {
			return i
		}
	}
	return -1
}

// insert puts a route at i.
func (e *edit) insert(i int, n entry) {
	e.t.hold(n.shape, e.key)
	n.seen = e.t.windows[e.key.family()].number
	e.chain = slices.Insert(e.chain, i, n)
	e.changed = true
}

// remove takes the route at i out; the strangers around it are now around its neighbours.
func (e *edit) remove(i int) {
	c := e.chain[i]
	switch {
	case i+1 < len(e.chain) && e.chain[i+1].metric == c.metric:
		n := &e.chain[i+1]
		n.before = add(n.before, c.before)
		n.state |= c.state & moreBefore
	case i > 0 && e.chain[i-1].metric == c.metric:
		p := &e.chain[i-1]
		p.after = add(p.after, add(c.before, c.after))
		if c.state&(moreBefore|moreAfter) != 0 {
			p.state |= moreAfter
		}
	}
	e.t.release(c.shape, e.key)
	e.chain = slices.Delete(e.chain, i, i+1)
	e.changed = true
}

// swap puts another shape in the place of the one at i. What is doubtful about the place stays so.
func (e *edit) swap(i int, shape uint32) {
	e.t.hold(shape, e.key)
	e.t.release(e.chain[i].shape, e.key)
	e.chain[i].shape = shape
	e.chain[i].seen = e.t.windows[e.key.family()].number
	e.changed = true
}

// settle notes that the route at i is there, once or twice.
func (e *edit) settle(i int) {
	e.chain[i].state &^= doubtful | excused
	e.chain[i].seen = e.t.windows[e.key.family()].number
}

// doubt notes that the routes in a range may be gone or stand elsewhere.
func (e *edit) doubt(lo, hi int) {
	for i := lo; i < hi; i++ {
		e.chain[i].state |= doubtful
		e.changed = true
	}
}

// anyOf says whether another route of a group may have been replaced than the one at i, which is the one by the kernel's rules: that is
// so where it may be gone. Then all are in doubt.
func (e *edit) anyOf(lo, hi, i int) bool {
	unsure := e.chain[i].state&doubtful != 0 && hi-lo > 1
	if unsure {
		e.doubt(lo, hi)
	}
	return unsure
}

// strangers says whether others' routes stand, or may stand, in a group.
func (e *edit) strangers(lo, hi int) bool {
	for _, c := range e.chain[lo:hi] {
		if c.before > 0 || c.after > 0 || c.state&(moreBefore|moreAfter) != 0 {
			return true
		}
	}
	return false
}

// strangerGone counts one stranger of a group less. If it is not clear where it stood, the counts become lower bounds.
func (e *edit) strangerGone(lo, hi int) {
	places := 0
	for _, c := range e.chain[lo:hi] {
		if c.before > 0 || c.state&moreBefore != 0 {
			places++
		}
		if c.after > 0 || c.state&moreAfter != 0 {
			places++
		}
	}
	for i := lo; i < hi; i++ {
		c := &e.chain[i]
		if c.before > 0 {
			c.before--
			if places > 1 {
				c.state |= moreBefore
			}
		}
		if c.after > 0 {
			c.after--
			if places > 1 {
				c.state |= moreAfter
			}
		}
	}
	e.changed = e.changed || lo < hi
}

// many is where counts end: it stands for more, too.
const many = 200

// add adds counts of strangers.
func add(a, b uint8) uint8 { return uint8(min(uint(a)+uint(b), many)) }
