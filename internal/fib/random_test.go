package fib

import (
	"fmt"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

const (
	ourLink   = 7
	otherLink = 8
	ourProto  = 111
	someTable = 100
)

func overlayOnly(a netip.Addr) bool {
	return netip.MustParsePrefix("10.0.0.0/8").Contains(a) || netip.MustParsePrefix("fd00::/16").Contains(a)
}

// world is a model, a Table that hears of it, and a source of choices.
type world struct {
	m      *model
	t      *Table
	steps  []Step
	pick   func(n int) int
	lost   bool // announcements are
	missed bool // some were
	held   []func()
	late   bool // announcements come when deliver is called
	log    []string
	told   map[netip.Prefix]Answer // by Changes
	ops    int
	probes int
}

func newWorld(pick func(n int) int) *world {
	w := &world{m: newModel(), pick: pick, told: make(map[netip.Prefix]Answer)}
	w.t = New(Config{Link: ourLink, Protocol: ourProto, Tables: []uint32{someTable, kernel.TableMain}, Overlay: overlayOnly})
	w.steps = w.t.order[0]
	w.m.told = func(c kernel.Change, r kernel.FIBRoute) {
		w.hear(tell(c, r), func() { w.t.Apply(c, &r) })
	}
	w.m.toldNext = func(n kernel.NextHop, deleted bool) {
		w.hear(fmt.Sprintf("nexthop %d %v %v deleted=%v", n.ID, n.Leg, n.Group, deleted), func() {
			if deleted {
				w.t.DeleteNextHop(n.ID)
			} else {
				w.t.SetNextHop(n)
			}
		})
	}
	return w
}

func tell(c kernel.Change, r kernel.FIBRoute) string {
	what := [...]string{"", "created", "prepended", "appended", "replaced", "refreshed", "deleted"}[c]
	return fmt.Sprintf("%s %v table %d metric %d tos %d pref %d type %d proto %d nhid %d %v %x", what, r.Prefix, r.Table, r.Metric, r.TOS, r.Pref, r.Type, r.Protocol, r.NextHop, r.Legs, r.Detail)
}

func (w *world) hear(what string, apply func()) {
	w.log = append(w.log, what)
	switch {
	case w.lost:
		w.missed = true
	case w.late:
		w.held = append(w.held, apply)
	default:
		apply()
	}
}

func (w *world) deliver(n int) {
	for ; n > 0 && len(w.held) > 0; n-- {
		w.held[0]()
		w.held = w.held[1:]
	}
}

func choose[T any](w *world, from ...T) T { return from[w.pick(len(from))] }

var modelPrefixes = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("192.0.2.1/32"),
	netip.MustParsePrefix("::/0"), netip.MustParsePrefix("2001:db8::/48"), netip.MustParsePrefix("2001:db8::/64"), netip.MustParsePrefix("2001:db8::1/128"),
}

func (w *world) leg(is6 bool) kernel.Leg {
	leg := kernel.Leg{Link: choose[int32](w, ourLink, ourLink, otherLink), Weight: 1 + uint32(w.pick(3))}
	last := byte(1 + w.pick(4))
	switch {
	case is6:
		leg.Gateway = netip.AddrFrom16([16]byte{0: 0xfd, 15: last})
		if w.pick(8) == 0 {
			leg.Gateway = netip.MustParseAddr("2001:db8:ffff::1") // outside the overlay
		}
	default:
		leg.Gateway = netip.AddrFrom4([4]byte{10, 0, 0, last})
		if w.pick(8) == 0 {
			leg.Gateway = netip.AddrFrom16([16]byte{0: 0xfd, 15: last}) // via inet6
		}
	}
	return leg
}

func (w *world) route() kernel.FIBRoute {
	r := kernel.FIBRoute{
		Prefix:   choose(w, modelPrefixes...),
		Table:    choose[uint32](w, kernel.TableMain, kernel.TableMain, someTable, 77),
		Metric:   choose[uint32](w, 50, 50, 100),
		Type:     kernel.TypeUnicast,
		Protocol: choose[uint8](w, 3, 3, 3, 4, ourProto),
	}
	is6 := r.Prefix.Addr().Is6()
	if is6 {
		r.Pref = choose[uint8](w, 0, 0, 0, 0, 1, 3)
	} else {
		r.TOS = choose[uint8](w, 0, 0, 0, 0, 0, 4)
	}
	switch w.pick(8) {
	case 0:
		r.Type = choose[uint8](w, 6, 6, kernel.TypeThrow) // 6: blackhole
	case 1, 2:
		if id := uint32(1 + w.pick(4)); w.m.nextHops[id].ID != 0 {
			r.NextHop = id
			break
		}
		fallthrough
	case 3, 4:
		r.Legs = []kernel.Leg{{Link: choose[int32](w, ourLink, otherLink), Weight: 1}}
	default:
		for range choose(w, 1, 1, 2, 3) {
			leg := w.leg(is6)
			if !slices.ContainsFunc(r.Legs, func(l kernel.Leg) bool { return l.Gateway == leg.Gateway && l.Link == leg.Link }) {
				r.Legs = append(r.Legs, leg)
			}
		}
	}
	if joins(&r) {
		// Legs with different preferences in one multipath are not followed: a message tells of one.
		r.Pref = uint8(r.Prefix.Bits()/16) % 2
	}
	return r
}

// step makes one change.
func (w *world) step() {
	w.ops++
	switch w.pick(10) {
	case 0, 1, 2, 3, 4:
		_ = w.m.add(op(w.pick(4)), w.route())
	case 5, 6, 7:
		if at, ok := w.somewhere(); ok {
			w.m.delete(at, w.pick(len(w.m.chains[at])), w.pick(2) == 0)
		}
	case 8:
		id := uint32(1 + w.pick(4))
		n := kernel.NextHop{ID: id, Leg: w.leg(false)}
		n.Weight = 1
		if id > 2 {
			n.Leg = kernel.Leg{Weight: 1}
			for _, member := range []uint32{1, 2} {
				if w.m.nextHops[member].ID != 0 && !w.m.nextHops[member].Blackhole {
					n.Group = append(n.Group, kernel.NextHopLeg{ID: member, Weight: choose[uint32](w, 1, 2, 300)})
				}
			}
			if n.Group == nil {
				return
			}
		}
		w.m.setNextHop(n)
	case 9:
		if w.pick(4) == 0 {
			w.m.deleteNextHop(uint32(1 + w.pick(4)))
		}
	}
}

func (w *world) somewhere() (place, bool) {
	at := place{choose(w, modelPrefixes...), choose[uint32](w, kernel.TableMain, someTable)}
	_, ok := w.m.chains[at]
	return at, ok
}

// match is the kernel's look-up: the route, and whether there is one.
func (w *world) match(dst netip.Addr) (kernel.FIBRoute, bool) {
	for _, step := range w.steps {
		for bits := dst.BitLen(); bits >= 0; bits-- {
			p, _ := dst.Prefix(bits)
			if i := w.winner(place{p, step.Table}); i >= 0 {
				if throws(&w.m.chains[place{p, step.Table}][i].FIBRoute) {
					break
				}
				return w.m.message(w.m.chains[place{p, step.Table}], i), true
			}
		}
	}
	return kernel.FIBRoute{}, false
}

// winner returns which of a chain the kernel uses, negative if none.
func (w *world) winner(at place) int {
	best := -1
	for i, h := range w.m.chains[at] {
		if h.TOS != 0 {
			continue
		}
		if best < 0 {
			best = i
			continue
		}
		b := w.m.chains[at][best]
		if h.Metric == b.Metric && rank(h.Pref) > rank(b.Pref) {
			best = i
		}
	}
	return best
}

// want is what the Table should say of a route that the kernel uses.
func (w *world) want(r kernel.FIBRoute) (kind Kind, gateways []Gateway, ours bool) {
	legs := w.m.legs(r)
	if r.NextHop == 0 && r.Type != kernel.TypeUnicast {
		return Absent, nil, false
	}
	for _, leg := range legs {
		if leg.Link != ourLink {
			continue
		}
		ours = true
		switch {
		case leg.Gateway.IsValid() && overlayOnly(leg.Gateway):
			gateways = append(gateways, Gateway{leg.Gateway, leg.Weight})
		case leg.Gateway.IsValid():
			kind = Refused
		case kind == Absent:
			kind = OnLink
		}
	}
	if gateways != nil {
		kind = Via
	}
	return kind, gateways, ours
}
