package oracle

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// Churn changes a World's routes at random, the same way for the same Rand.
type Churn struct {
	*rand.Rand
	World       *World
	Prefixes    []netip.Prefix // of the routes: All, or Few
	Protocol    uint8          // of every fifth route
	NoThrow     bool           // no route throws
	Steps, Done int            // changes so far, and those that the kernel carried out

	Tell func(change string, err error) // each change and what the kernel says of it; nil: nobody listens

	have []kernel.FIBRoute // what was added last, mostly still there
}

// remembered is how many: a run may last for hours.
const remembered = 300

// OneOf picks.
func OneOf[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// leg is a leg; routes of one prefix choose among few gateways, so that they meet.
func (c *Churn) leg(is6 bool) kernel.Leg {
	ours := c.IntN(3) > 0
	leg := kernel.Leg{Link: c.World.Other, Weight: uint32(1 + c.IntN(4))}
	elsewhere := byte(1)
	if ours {
		leg.Link, elsewhere = c.World.Ours, 0
	}
	last := byte(2 + c.IntN(5))
	six := is6 || c.IntN(6) == 0
	switch {
	case six && ours && c.IntN(8) == 0:
		leg.Gateway = netip.MustParseAddr("2001:db8:ffff::1") // on-link by flag, no overlay host
	case ours && c.IntN(8) == 0 && !six:
		leg.Gateway = netip.MustParseAddr("172.16.0.1")
	case six:
		leg.Gateway = netip.AddrFrom16([16]byte{0: 0xfd, 1: elsewhere, 15: last})
	default:
		leg.Gateway = netip.AddrFrom4([4]byte{10, 0, elsewhere, last})
	}
	return leg
}

func (c *Churn) route() kernel.FIBRoute {
	r := kernel.FIBRoute{
		Prefix: OneOf(c.Rand, c.Prefixes...), Table: OneOf[uint32](c.Rand, kernel.TableMain, kernel.TableMain, SomeTable, lostTable),
		Metric: OneOf[uint32](c.Rand, 50, 50, 100), Type: kernel.TypeUnicast, Protocol: OneOf[uint8](c.Rand, 3, 3, 4, 4, c.Protocol),
	}
	is6 := r.Prefix.Addr().Is6()
	switch c.IntN(10) {
	case 0:
		r.Type = OneOf[uint8](c.Rand, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW)
		if c.NoThrow && r.Type == unix.RTN_THROW {
			r.Type = unix.RTN_BLACKHOLE
		}
	case 1, 2, 3:
		r.NextHop = uint32(1 + c.IntN(8))
	case 4, 5:
		r.Legs = []kernel.Leg{{Link: OneOf(c.Rand, c.World.Ours, c.World.Ours, c.World.Other), Weight: 1}}
	default:
		for range OneOf(c.Rand, 1, 1, 2, 3) {
			r.Legs = append(r.Legs, c.leg(is6))
		}
	}
	switch {
	case is6 && Joins(&r):
		r.Pref = uint8(r.Prefix.Bits()/16) % 2 // one for all legs of a multipath
	case is6 && r.NextHop != 0:
		r.Protocol = 3 // whose route it is the kernel does not tell reliably
	case is6:
		r.Pref = OneOf[uint8](c.Rand, 0, 0, 0, 1, 3)
	default:
		r.TOS = OneOf[uint8](c.Rand, 0, 0, 0, 0, 0, 0x10)
	}
	if !is6 && c.IntN(6) == 0 {
		r.Detail = Attribute(nil, unix.RTA_PREFSRC, Own4.Addr().AsSlice())
	}
	if c.IntN(6) == 0 {
		r.Detail = Attribute(r.Detail, unix.RTA_METRICS, Attribute(nil, unix.RTAX_MTU, word(OneOf[uint32](c.Rand, 1300, 1400))))
	}
	return r
}

func (c *Churn) nextHop() rtnl.Message {
	id := uint32(1 + c.IntN(8))
	if c.IntN(6) == 0 {
		return NextHopMessage(unix.RTM_DELNEXTHOP, kernel.NextHop{ID: id})
	}
	n := kernel.NextHop{ID: id}
	switch {
	case id == 4:
		n.Leg = kernel.Leg{Link: OneOf(c.Rand, c.World.Ours, c.World.Other)}
	case id <= 4:
		n.Leg = c.leg(id%2 == 0)
		if !Overlay(n.Gateway) && n.Link == c.World.Ours || c.IntN(12) == 0 {
			n.Leg, n.Blackhole = kernel.Leg{}, true
		}
	default: // IPv4 routes go through 5 and 6, IPv6 routes through those with even members only
		for _, member := range OneOf(c.Rand, []uint32{1, 3}, []uint32{2, 3}, []uint32{2}, []uint32{1, 2, 3}) {
			n.Group = append(n.Group, kernel.NextHopLeg{ID: member, Weight: OneOf[uint32](c.Rand, 1, 2, 5, 300)})
		}
	}
	return NextHopMessage(unix.RTM_NEWNEXTHOP, n)
}

// Step makes one change of the kernel's routes or nexthop objects, which the kernel may refuse.
func (c *Churn) Step() {
	c.Steps++
	var m rtnl.Message
	var told any
	flags := uint16(0)
	switch n := c.IntN(20); {
	case n < 11:
		r := c.route()
		flags = OneOf[uint16](c.Rand, Create, Prepend, Append, Replace)
		m, told = RouteMessage(unix.RTM_NEWROUTE, flags, r), r
		if c.have = append(c.have, r); len(c.have) > remembered {
			c.have = slices.Delete(c.have, 0, 1)
		}
	case n < 17 && len(c.have) > 0:
		i := c.IntN(len(c.have))
		r := c.have[i]
		if c.IntN(3) == 0 {
			r.Legs, r.NextHop, r.Protocol, r.Type = nil, 0, 0, 0 // the first that there is
		} else if len(r.Legs) > 1 && c.IntN(2) == 0 {
			r.Legs = r.Legs[:1]
		}
		r.Detail = nil
		m, told = RouteMessage(unix.RTM_DELROUTE, 0, r), r
		c.have[i] = c.have[len(c.have)-1]
		c.have = c.have[:len(c.have)-1]
	default:
		m = c.nextHop()
		told = m.Body
	}
	err := c.World.Conn.Do(m)[0].Err
	if err == nil {
		c.Done++
	}
	if c.Tell != nil {
		c.Tell(fmt.Sprintf("type %d flags %#x %+v", m.Type, flags, told), err)
	}
}

// Destinations are in all prefixes, and beside them.
func (c *Churn) Destinations() []netip.Addr {
	var all []netip.Addr
	for _, p := range c.Prefixes {
		a := p.Addr()
		some := []netip.Addr{a, a.Next(), kernel.Behind(p)}
		if !p.IsSingleIP() {
			b := a.AsSlice()
			b[len(b)-1] |= byte(c.IntN(1 << min(8, a.BitLen()-p.Bits())))
			within, _ := netip.AddrFromSlice(b)
			some = append(some, within)
		}
		for _, a := range some {
			if a.IsValid() && !a.IsUnspecified() {
				all = append(all, a)
			}
		}
	}
	return all
}
