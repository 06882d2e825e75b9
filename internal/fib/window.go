package fib

import (
	"maps"
	"net/netip"

	"example.com/overlay/internal/kernel"
)

// window is the time of one family's dump.
type window struct {
	open, quiet bool
	whole       bool // the dump shows strangers' routes too
	number      uint8
	gone        map[goneKey]struct{} // what announcements have taken out meanwhile: the dump may show it none the less
	last        pending
}

type goneKey struct {
	key
	metric uint32
	id     string
}

// pending counts the strangers that an IPv4 dump has shown of one key: they stand before what comes next.
type pending struct {
	key
	metric uint32
	count  uint8
}

// note remembers that the route at i is known to be gone.
func (e *edit) note(i int) {
	if w := &e.t.windows[e.key.family()]; w.open {
		w.gone[goneKey{e.key, e.chain[i].metric, e.shape(i).id}] = struct{}{}
	}
}

// back forgets that a route was gone.
func (w *window) back(k key, metric uint32, id string) {
	if len(w.gone) > 0 {
		delete(w.gone, goneKey{k, metric, id})
	}
}

// Begin opens a resync of one family's routes: mark and sweep. What a dump shows is fed by Dumped, announcements that come
// meanwhile by Apply; before End everything must have been applied that was announced before the dump ended. whole: the dump
// shows the routes through other interfaces too, so that their places are known.
func (t *Table) Begin(is6, whole bool) {
	w := &t.windows[familyIndex(is6)]
	w.open, w.quiet, w.whole = true, true, whole
	w.number++
	w.gone = make(map[goneKey]struct{})
	w.last = pending{}
}

// Dumped takes one route of a dump, in the dump's order. It keeps nothing of r and may reorder its legs.
func (t *Table) Dumped(r *kernel.FIBRoute) {
	k, ok := t.follows(r)
	if !ok || r.Expires < 0 { // the kernel lists it until it clears it away
		return
	}
	w := &t.windows[k.family()]
	if !w.open {
		return
	}
	if w.last.key != k || w.last.metric != r.Metric {
		w.last = pending{key: k, metric: r.Metric}
	}
	if !t.concerns(r) && k.is6 && joins(r) && len(r.Legs) > 1 {
		t.veils.add(k, w.number, r.Legs)
		t.doubts[k] = true // what it hides may be what answers
	}
	if _, known := t.heads[k]; !known && !t.concerns(r) {
		w.last.count = add(w.last.count, 1)
		return
	}
	e := t.open(k)
	lo, hi := e.group(r.Metric)
	n, mine := e.admit(lo, hi, r, false)
	if mine {
		if _, gone := w.gone[goneKey{k, r.Metric, t.shapes.all[n.shape].id}]; !gone {
			e.show(lo, hi, n)
		}
	} else {
		w.last.count = add(w.last.count, 1)
		e.showStranger(lo, hi)
		if k.is6 && joins(r) && len(r.Legs) > 1 {
			e.excuse(lo, hi)
		}
	}
	e.close()
	t.leave(n.shape)
}

// show puts a route that a dump shows behind those of its group that it has shown before, and in front of the others.
func (e *edit) show(lo, hi int, n entry) {
	w := &e.t.windows[e.key.family()]
	at := e.find(lo, hi, n.shape)
	if j := e.joined(lo, hi); j >= 0 && e.shapeJoins(n.shape) {
		at = j
	}
	to := lo
	for to < hi && e.chain[to].seen == w.number {
		to++
	}
	strangers := w.last.count
	w.last.count = 0
	switch {
	case at >= 0 && e.chain[at].seen == w.number:
		e.chain[at].state |= twin // or it is shown twice under churn (kernel.md V5), or an announcement was quicker
		return
	case at < 0:
		if !w.whole {
			n.state = moreBefore
		}
		e.insert(to, n)
	default:
		if e.chain[at].shape != n.shape {
			e.swap(at, n.shape)
		}
		e.settle(at)
		e.chain[at].state &^= twin
		if at != to {
			c := e.chain[at]
			copy(e.chain[to+1:at+1], e.chain[to:at])
			e.chain[to] = c
			e.changed = true
		}
	}
	if w.whole {
		c := &e.chain[to]
		c.before, c.after, c.state = strangers, 0, c.state&^(moreBefore|moreAfter)
		if to > lo {
			e.chain[to-1].after = 0
		}
		if e.hides(to) {
			c.state |= moreAfter // strangers are left out, too
			e.ask = true         // and one of ours may be what answers
		}
	}
}

// showStranger counts a stranger behind the routes of its group that a dump has shown.
func (e *edit) showStranger(lo, hi int) {
	w := &e.t.windows[e.key.family()]
	to := lo
	for to < hi && e.chain[to].seen == w.number {
		to++
	}
	if to > lo && w.whole {
		c := &e.chain[to-1]
		c.after = w.last.count
		if !e.hides(to - 1) {
			c.state &^= moreAfter
		}
	}
}

// hides says whether the route at i is a multipath behind whose first leg a dump leaves others out: see End.
func (e *edit) hides(i int) bool { return e.shape(i).joins && len(e.shape(i).route.Legs) > 1 }

// excuse notes that a dump has shown a stranger's multipath, so that it may leave others of the metric out: see End.
func (e *edit) excuse(lo, hi int) {
	for i := lo; i < hi; i++ {
		e.chain[i].state |= excused
	}
}

// veils are where routes may be that no dump shows, because they stand between the legs of an IPv6 multipath: whatever is announced
// there, the kernel is asked what it answers now. That is so of strangers' multipaths alone, and where one of ours has gone;
// what one of ours hides its own entry says.
type veils struct {
	prefixes map[key]veil
	links    map[int32]uint8 // of the legs, with the number of the dump that showed one last
}

type veil struct {
	seen uint8 // number of the dump that showed it last
	told bool  // since then something was announced there
}

func (v *veils) add(k key, number uint8, legs []kernel.Leg) {
	v.prefixes[k] = veil{seen: number}
	for _, leg := range legs {
		v.links[leg.Link] = number
	}
}

// tell notes that something was announced of k, and says whether there may be hidden routes.
func (v *veils) tell(k key) bool {
	veil, ok := v.prefixes[k]
	if ok {
		veil.told = true
		v.prefixes[k] = veil
	}
	return ok
}

// needDump says, once, that an answer has told nothing of what may be hidden in any table at the prefix of k, though something was
// announced there: if the multipath has gone a dump shows it.
func (t *Table) needDump(k key) (needed bool) {
	for table := range t.cfg.Tables {
		k.table = uint16(table)
		if veil := t.veils.prefixes[k]; veil.told {
			needed, veil.told = true, false
			t.veils.prefixes[k] = veil
		}
	}
	return needed
}

// sweep takes away what a dump has not shown, and returns its prefixes.
func (v *veils) sweep(number uint8) (gone []key) {
	for k, veil := range v.prefixes {
		if veil.seen != number {
			gone = append(gone, k)
			delete(v.prefixes, k)
		}
	}
	maps.DeleteFunc(v.links, func(_ int32, seen uint8) bool { return seen != number })
	return gone
}

func (e *edit) shapeJoins(shape uint32) bool { return e.t.shapes.all[shape].joins }

// Place is a prefix in a table.
type Place struct {
	Prefix netip.Prefix
	Table  uint32
}

// Unseen returns up to most of the places where there are routes and an open resync has shown none until now, whichever.
func (t *Table) Unseen(is6 bool, most int) (places []Place) {
	w := &t.windows[familyIndex(is6)]
	for k, i := range t.heads {
		if k.is6 != is6 {
			continue
		}
		seen := false
		for ; i != 0 && !seen; i = t.entries.at(i).next {
			c := t.entries.at(i)
			seen = c.seen == w.number || c.state&excused != 0 // of these the dump tells nothing
		}
		if !seen {
			if places = append(places, Place{k.prefix(), t.cfg.Tables[k.table]}); len(places) == most {
				break
			}
		}
	}
	return places
}

// End closes a resync and returns how many routes it removed. quiet: the caller knows that no route of the family was
// announced from before the dump began until it ended, to no socket (a filter hides announcements that spoil a dump too). Only
// then is absence proof (design.md, law 2); otherwise what the dump did not show is doubtful.
//
// A dump of the kernel leaves out the IPv6 routes that stand between the legs of a multipath of their metric: those are
// doubtful in any case.
func (t *Table) End(is6, quiet bool) (removed int) {
	w := &t.windows[familyIndex(is6)]
	if !w.open {
		return 0
	}
	quiet = quiet && w.quiet
	for k, i := range t.heads {
		if k.is6 != is6 {
			continue
		}
		unseen := false
		for ; i != 0 && !unseen; i = t.entries.at(i).next {
			unseen = t.entries.at(i).seen != w.number
		}
		if unseen {
			removed += t.open(k).sweep(w.number, quiet)
		}
	}
	if is6 && quiet && w.whole {
		for _, k := range t.veils.sweep(w.number) {
			if t.heads[k] == 0 {
				delete(t.doubts, k) // that another answer has hidden, perhaps
			}
		}
	}
	w.open = false
	clear(w.gone)
	return removed
}

func (e *edit) sweep(number uint8, quiet bool) (removed int) {
	for i := len(e.chain) - 1; i >= 0; i-- {
		if e.chain[i].seen == number {
			continue
		}
		lo, hi := e.group(e.chain[i].metric)
		if j := e.joined(lo, hi); !quiet || e.chain[i].state&excused != 0 || j >= 0 && j != i && e.chain[j].seen == number && e.hides(j) {
			e.chain[i].state &^= excused
			e.doubt(i, i+1)
			continue
		}
		e.remove(i)
		removed++
	}
	e.close()
	return removed
}
