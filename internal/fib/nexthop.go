package fib

import (
	"maps"
	"slices"

	"example.com/overlay/internal/kernel"
)

// nextHop is a nexthop object and the legs that a route through it has.
type nextHop struct {
	kernel.NextHop
	legs []kernel.Leg
}

// SetNextHop takes a nexthop object that is new or has changed: with nexthop_compat_mode off its routes change without a
// message of their own (kernel.md A13).
func (t *Table) SetNextHop(n kernel.NextHop) {
	if n.ID == 0 || n.Foreign {
		return
	}
	untold := t.missing[n.ID]
	delete(t.missing, n.ID)
	old := t.nextHops[n.ID]
	if old == nil && len(t.shapes.byNextHop[n.ID]) > 0 {
		t.resync = true // it may be a new one: then the routes through the one before have gone
	}
	if old != nil {
		for _, member := range old.Group {
			removeFrom(t.memberOf, member.ID, n.ID)
		}
	}
	n.Group = slices.Clone(n.Group)
	for _, member := range n.Group {
		addTo(t.memberOf, member.ID, n.ID)
	}
	t.nextHops[n.ID] = &nextHop{NextHop: n}
	if old != nil {
		t.nextHops[n.ID].legs = old.legs
	}
	t.resolve(n.ID, old != nil || untold)
	for group := range t.memberOf[n.ID] {
		t.resolve(group, true)
	}
}

// resolve computes an object's legs anew. used: routes may lead through it already; if they have led elsewhere so far they
// are not known here.
func (t *Table) resolve(id uint32, used bool) {
	n := t.nextHops[id]
	if n == nil {
		return
	}
	was := n.legs
	n.legs = nil
	switch {
	case len(n.Group) > 0:
		for _, member := range n.Group {
			m := t.nextHops[member.ID]
			if m == nil {
				t.missing[member.ID] = true
			} else if m.Link != 0 {
				leg := m.Leg
				leg.Weight = member.Weight
				n.legs = append(n.legs, leg)
			}
		}
	case !n.Blackhole && n.Link != 0:
		n.legs = []kernel.Leg{n.Leg}
	}
	if used && !t.throughUs(was) && t.throughUs(n.legs) {
		t.resync = true
	}
	for shape := range t.shapes.byNextHop[id] {
		if t.derive(&t.shapes.all[shape]) {
			t.stale[shape] = true
		}
	}
}

func (t *Table) throughUs(legs []kernel.Leg) bool {
	return slices.ContainsFunc(legs, func(leg kernel.Leg) bool { return leg.Link == t.cfg.Link })
}

// allOurs says whether a nexthop object is known, and all its legs lead through our interface.
func (t *Table) allOurs(id uint32) bool {
	n := t.nextHops[id]
	elsewhere := func(leg kernel.Leg) bool { return leg.Link != t.cfg.Link }
	return n != nil && len(n.legs) > 0 && !slices.ContainsFunc(n.legs, elsewhere)
}

// allKnown says whether all routes through a nexthop object are known: it is ours alone, and none was refused.
func (t *Table) allKnown(id uint32) bool { return t.allOurs(id) && !t.unlearned }

// share says whether two nexthop objects are one, or groups, or a group and a member, with one in common.
func (t *Table) share(a, b uint32) bool {
	return slices.ContainsFunc(t.membersOf(a), func(id uint32) bool { return slices.Contains(t.membersOf(b), id) })
}

// membersOf are a group's members; of another object itself.
func (t *Table) membersOf(id uint32) []uint32 {
	n := t.nextHops[id]
	if n == nil || len(n.Group) == 0 {
		return []uint32{id}
	}
	members := make([]uint32, len(n.Group))
	for i := range n.Group {
		members[i] = n.Group[i].ID
	}
	return members
}

// legsOf returns the legs of routes through an object; told, what a message said of them, if the object is not known.
func (t *Table) legsOf(id uint32, told []kernel.Leg) []kernel.Leg {
	if n := t.nextHops[id]; n != nil {
		return n.legs
	}
	t.missing[id] = true
	return told
}

// DeleteNextHop takes the deletion of a nexthop object, or that there is none: its routes go with it, most of them untold
// (kernel.md A14), and groups lose a leg.
func (t *Table) DeleteNextHop(id uint32) {
	delete(t.missing, id)
	if n := t.nextHops[id]; n != nil {
		delete(t.nextHops, id)
		for _, member := range n.Group {
			removeFrom(t.memberOf, member.ID, id)
		}
	}
	for _, shape := range slices.Collect(maps.Keys(t.shapes.byNextHop[id])) {
		for _, k := range slices.Collect(maps.Keys(t.shapes.all[shape].users)) {
			e := t.open(k)
			for i := len(e.chain) - 1; i >= 0; i-- {
				if e.chain[i].shape == shape {
					e.note(i)
					e.remove(i)
				}
			}
			e.close()
		}
	}
	t.miscounted()
	for _, groupID := range slices.Collect(maps.Keys(t.memberOf[id])) {
		group := t.nextHops[groupID].NextHop
		group.Group = slices.DeleteFunc(slices.Clone(group.Group), func(leg kernel.NextHopLeg) bool { return leg.ID == id })
		if len(group.Group) == 0 {
			t.DeleteNextHop(groupID)
		} else {
			t.SetNextHop(group)
		}
	}
}

// miscounted notes that strangers' routes may have gone untold, wherever some were counted.
func (t *Table) miscounted() {
	for _, k := range slices.Collect(maps.Keys(t.counted)) {
		e := t.open(k)
		e.miscounted()
		e.close()
	}
	if len(t.counted) == 0 {
		t.counted = make(map[key]struct{}) // a map keeps the room that a burst has needed
	}
}

// SetNextHops takes a dump of all nexthop objects: those that are not in it are deleted. To be called before the routes are
// dumped.
func (t *Table) SetNextHops(all []kernel.NextHop) {
	there := make(map[uint32]bool, len(all))
	for _, n := range all {
		there[n.ID] = true
	}
	for _, id := range slices.Collect(maps.Keys(t.nextHops)) {
		if !there[id] {
			t.DeleteNextHop(id)
		}
	}
	for _, groups := range []bool{false, true} {
		for _, n := range all {
			if groups == (len(n.Group) > 0) {
				t.SetNextHop(n)
			}
		}
	}
}

// MissingNextHops returns, once, the ids of objects that routes lead through and nobody has told of.
func (t *Table) MissingNextHops() []uint32 {
	ids := slices.Sorted(maps.Keys(t.missing))
	clear(t.missing)
	return ids
}
