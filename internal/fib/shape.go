package fib

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// shape is all of a route but its key, shared by the routes that have it, as the kernel shares a fib_info.
type shape struct {
	id    string // what tells it from others: not the state of its legs
	refs  int
	route kernel.FIBRoute // no key
	is6   bool
	joins bool // IPv6: routes like this, of one metric, are one multipath
	mixed bool // that joins, and has legs through other interfaces beside ours
	users map[key]uint32

	// Derived from the route, the nexthop objects and the Config.
	mine  bool // some leg is through our interface; or it throws
	own   bool // we have installed it
	throw bool // the kernel goes on to the next table: what it hides in its own, it uncovers there
	kind  Kind
	set   *Set
}

// shapes interns them. Index 0 is nobody's.
type shapes struct {
	all       []shape
	byID      map[string]uint32
	byNextHop map[uint32]map[uint32]struct{}
	free      []uint32
	buf       []byte
}

func (s *shapes) init() {
	s.all = make([]shape, 1)
	s.byID = make(map[string]uint32)
	s.byNextHop = make(map[uint32]map[uint32]struct{})
}

// identify writes into buf what tells r from other routes of its key. The legs of an IPv6 multipath come in an order that
// changes from message to message: they are sorted.
func (s *shapes) identify(r *kernel.FIBRoute) {
	is6 := r.Prefix.Addr().Is6()
	if is6 && r.NextHop == 0 && len(r.Legs) > 1 {
		slices.SortFunc(r.Legs, compareLegs)
	}
	b := append(s.buf[:0], byte(familyIndex(is6)), r.Protocol, r.Pref)
	b = binary.NativeEndian.AppendUint32(b, r.NextHop)
	if r.NextHop == 0 {
		b = append(b, r.Type)
		b = binary.NativeEndian.AppendUint32(b, uint32(len(r.Legs)))
		for _, leg := range r.Legs {
			b = appendLeg(b, leg)
		}
	}
	s.buf = append(b, r.Detail...)
}

func appendLeg(b []byte, leg kernel.Leg) []byte {
	gateway := leg.Gateway.As16()
	b = append(b, byte(leg.Gateway.BitLen()))
	b = append(b, gateway[:]...)
	b = binary.NativeEndian.AppendUint32(b, uint32(leg.Link))
	return binary.NativeEndian.AppendUint32(b, leg.Weight)
}

func compareLegs(a, b kernel.Leg) int {
	return cmp.Or(a.Gateway.Compare(b.Gateway), cmp.Compare(a.Link, b.Link), cmp.Compare(a.Weight, b.Weight))
}

// find returns the shape of r, 0 if no route has it.
func (s *shapes) find(r *kernel.FIBRoute) uint32 {
	s.identify(r)
	return s.byID[string(s.buf)]
}

// intern returns the shape of r and takes over the state of its legs; the caller takes a reference or drops it.
func (t *Table) intern(r *kernel.FIBRoute) uint32 {
	s := &t.shapes
	if i := s.find(r); i != 0 {
		if sh := &s.all[i]; r.NextHop == 0 && sh.takeState(r.Legs) && t.derive(sh) {
			t.stale[i] = true
		}
		return i
	}
	i := uint32(len(s.all))
	if n := len(s.free); n > 0 {
		i, s.free = s.free[n-1], s.free[:n-1]
	} else {
		s.all = append(s.all, shape{})
	}
	sh := &s.all[i]
	*sh = shape{id: string(s.buf), is6: r.Prefix.Addr().Is6()}
	sh.route = kernel.FIBRoute{
		Pref: r.Pref, Type: r.Type, Protocol: r.Protocol, NextHop: r.NextHop,
		Legs: slices.Clone(r.Legs), Detail: slices.Clone(r.Detail),
	}
	sh.joins = joins(r)
	sh.mixed = sh.joins && slices.ContainsFunc(r.Legs, func(leg kernel.Leg) bool { return leg.Link != t.cfg.Link })
	s.byID[sh.id] = i
	if r.NextHop != 0 {
		sh.users = make(map[key]uint32)
		addTo(s.byNextHop, r.NextHop, i)
	}
	t.derive(sh)
	return i
}

// takeState takes the legs' states from a message about the same shape, and says whether one differs.
func (sh *shape) takeState(legs []kernel.Leg) bool {
	changed := false
	for i, leg := range legs {
		if sh.route.Legs[i].Dead != leg.Dead {
			sh.route.Legs[i].Dead, changed = leg.Dead, true
		}
	}
	return changed
}

// joins says whether the kernel makes one multipath of this route and others like it (net/ipv6, rt6_qualify_for_ecmp).
func joins(r *kernel.FIBRoute) bool {
	return r.Prefix.Addr().Is6() && r.NextHop == 0 && r.Type == kernel.TypeUnicast && r.Protocol != kernel.ProtoRA &&
		len(r.Legs) > 0 && r.Legs[0].Gateway.IsValid()
}

// hold takes a reference for an entry of k.
func (t *Table) hold(i uint32, k key) {
	sh := &t.shapes.all[i]
	sh.refs++
	if sh.users != nil {
		sh.users[k]++
	}
	if sh.counts() {
		t.learned++
	}
	if sh.throw {
		t.throws++
	}
}

// counts says whether the shape's routes count as learned.
func (sh *shape) counts() bool { return sh.mine && !sh.own }

func throws(r *kernel.FIBRoute) bool { return r.Type == kernel.TypeThrow && r.NextHop == 0 }

// carries says whether the kernel hands packets to the interface of a route of its own legs. Those of other types it takes
// itself, drops or refuses.
func carries(r *kernel.FIBRoute) bool {
	switch r.Type {
	case kernel.TypeUnicast, kernel.TypeBroadcast, kernel.TypeAnycast, kernel.TypeMulticast:
		return true
	}
	return false
}

// release gives an entry's reference back.
func (t *Table) release(i uint32, k key) {
	sh := &t.shapes.all[i]
	if sh.counts() {
		t.learned--
	}
	if sh.throw {
		t.throws--
	}
	sh.refs--
	if sh.users != nil {
		if sh.users[k]--; sh.users[k] == 0 {
			delete(sh.users, k)
		}
	}
	t.drop(i)
}

// drop forgets a shape that nobody has.
func (t *Table) drop(i uint32) {
	s := &t.shapes
	sh := &s.all[i]
	if sh.refs > 0 || sh.id == "" {
		return
	}
	delete(s.byID, sh.id)
	if sh.route.NextHop != 0 {
		removeFrom(s.byNextHop, sh.route.NextHop, i)
	}
	delete(t.stale, i)
	*sh = shape{}
	s.free = append(s.free, i)
}

// Kind says what an answer is.
type Kind uint8

// The kinds.
const (
	Absent  Kind = iota // no route through our interface
	OnLink              // the destination is the next hop
	Via                 // through gateways
	Refused             // through our interface, but by none that is an overlay host: nothing may be sent there
)

// Gateway is a next hop and its weight as the kernel counts, from 1.
type Gateway struct {
	Addr   netip.Addr
	Weight uint32
}

// Set is an immutable list of gateways in the kernel's order, shared by all routes that are alike but for their key.
type Set struct{ Gateways []Gateway }

// derive computes what follows from the shape's legs, and says whether the answer changed.
func (t *Table) derive(sh *shape) bool {
	before, refs := *sh, sh.refs
	legs := sh.route.Legs
	if id := sh.route.NextHop; id != 0 {
		legs = t.legsOf(id, legs)
	}
	sh.mine, sh.kind = false, Absent
	var gateways []Gateway
	if carries(&sh.route) || sh.route.NextHop != 0 {
		sh.mine, sh.kind, gateways = t.weigh(legs)
	}
	// A multipath of IPv6 may have legs of several protocols, of which a message tells one. What we install has no gateways.
	sh.own = sh.mine && sh.route.Protocol == t.cfg.Protocol && !sh.joins
	sh.throw = throws(&sh.route)
	sh.mine = sh.mine || sh.throw
	switch {
	case sh.kind != Via:
		sh.set = nil
	case before.set == nil || !slices.Equal(before.set.Gateways, gateways):
		sh.set = &Set{gateways}
	}
	if was := before.counts(); was != sh.counts() {
		if was {
			refs = -refs
		}
		t.learned += refs
	}
	return before.mine != sh.mine || before.kind != sh.kind || before.set != sh.set
}

// weigh sorts out which legs count: those through our interface that are alive and, if they have a gateway, lead to an
// overlay host. Legs without gateway count where none has one: one list cannot say both.
func (t *Table) weigh(legs []kernel.Leg) (mine bool, kind Kind, gateways []Gateway) {
	for _, leg := range legs {
		if leg.Link != t.cfg.Link {
			continue
		}
		mine = true
		switch {
		case leg.Dead:
		case !leg.Gateway.IsValid():
			if kind == Absent {
				kind = OnLink
			}
		case t.cfg.Overlay == nil || t.cfg.Overlay(leg.Gateway):
			kind, gateways = Via, append(gateways, Gateway{leg.Gateway, leg.Weight})
		case kind != Via:
			kind = Refused
		}
	}
	if len(gateways) == 1 {
		gateways[0].Weight = 1 // a share of all; messages of one leg do not tell its weight
	}
	return mine, kind, gateways
}

func addTo(m map[uint32]map[uint32]struct{}, at, value uint32) {
	if m[at] == nil {
		m[at] = make(map[uint32]struct{})
	}
	m[at][value] = struct{}{}
}

func removeFrom(m map[uint32]map[uint32]struct{}, at, value uint32) {
	delete(m[at], value)
	if len(m[at]) == 0 {
		delete(m, at)
	}
}
