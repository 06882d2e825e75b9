package oracle

import (
	"errors"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// Kind is the kind of a Verdict.
type Kind uint8

// The kinds. With those behind Miss the kernel hands us packets.
const (
	NoClaim Kind = iota // the kernel hands us none, or does not tell what it does
	Miss                // no route; but see Hole
	OnLink              // the destination is the next hop
	Via                 // through gateways
	Refused             // through our interface, by no overlay host
	Among               // by one Hop of several: the kernel tells no more
)

// Verdict is what the kernel does with packets to one destination.
type Verdict struct {
	Kind  Kind
	Own   bool            // by a route that the follower's own side has installed
	Mixed bool            // some packets may go elsewhere, or by gateways that are no overlay hosts
	Route kernel.FIBRoute // the match, unless the kind is NoClaim, Miss or Among
	Hops  []Hop           // overlay hosts; of Among one, which is not valid where the route is on-link
}

// Hop is a gateway and its weight as the kernel counts, from 1.
type Hop struct {
	Addr   netip.Addr
	Weight uint32
}

// Ask asks the kernel about destinations. Nobody may change nexthop objects meanwhile.
func (w *World) Ask(all []netip.Addr) ([]Verdict, error) {
	if err := w.readNextHops(); err != nil {
		return nil, err
	}
	requests := make([]rtnl.Message, len(all))
	for i, dst := range all {
		requests[i] = rtnl.MatchRoute(dst)
	}
	verdicts := make([]Verdict, len(all))
	for i, result := range w.Conn.Do(requests...) {
		var err error
		if verdicts[i], err = w.judge(all[i], result); err != nil {
			return nil, err
		}
	}
	return verdicts, nil
}

func (w *World) judge(dst netip.Addr, result rtnl.Result) (v Verdict, err error) {
	switch {
	case errors.Is(result.Err, unix.ENETUNREACH):
		return Verdict{Kind: Miss}, nil
	case errors.Is(result.Err, rtnl.ErrUnknown):
		return v, result.Err
	case result.Err != nil || len(result.Answers) != 1: // a blackhole or its kin
		return v, nil
	}
	if err = rtnl.DecodeFIBRoute(result.Answers[0], &v.Route); err != nil {
		return v, err
	}
	r := &v.Route
	if r.NextHop != 0 && dst.Is6() {
		return w.judgeLeg(dst), nil
	}
	if r.Type != kernel.TypeUnicast && r.NextHop == 0 || r.Table == kernel.TableLocal {
		return v, nil
	}
	v.Kind, v.Hops, v.Mixed = w.weigh(r)
	// Of several IPv4 default routes of one metric the kernel takes one whose neighbour answers (fib_select_default), and a FIB match
	// tells of the first.
	v.Mixed = v.Mixed || dst.Is4() && r.Prefix.Bits() == 0
	v.Own = r.Protocol == w.Protocol && !Joins(r)
	return v, nil
}

// judgeLeg is judge for IPv6 routes through nexthop objects, of which a FIB match may name another that shares a leg
// (net/ipv6/route.c, rt6_get_pcpu_route). A plain look-up tells the leg itself.
func (w *World) judgeLeg(dst netip.Addr) Verdict {
	plain := rtnl.MatchRoute(dst)
	clear(plain.Body[8:12]) // no RTM_F_FIB_MATCH
	result := w.Conn.Do(plain)[0]
	var r kernel.FIBRoute
	if result.Err != nil || len(result.Answers) != 1 || rtnl.DecodeFIBRoute(result.Answers[0], &r) != nil || len(r.Legs) != 1 || r.Legs[0].Link != w.Ours {
		return Verdict{Mixed: true}
	}
	if gateway := r.Legs[0].Gateway; !gateway.IsValid() || Overlay(gateway) {
		return Verdict{Kind: Among, Mixed: true, Hops: []Hop{{gateway, 1}}}
	}
	return Verdict{Mixed: true}
}

// weigh says what the kernel's route is for us. Legs of nexthop objects and their weights come from the objects (V14).
func (w *World) weigh(r *kernel.FIBRoute) (kind Kind, hops []Hop, mixed bool) {
	legs := r.Legs
	if r.NextHop != 0 {
		legs = nil
		n := w.nextHops[r.NextHop]
		for _, member := range n.Group {
			leg := w.nextHops[member.ID].Leg
			leg.Weight = member.Weight
			legs = append(legs, leg)
		}
		if len(n.Group) == 0 {
			legs = []kernel.Leg{n.Leg}
		}
	}
	ours := 0
	for _, leg := range legs {
		if leg.Link == w.Ours {
			ours++
		}
		switch {
		case leg.Link != w.Ours || leg.Dead:
		case leg.Gateway.IsValid() && Overlay(leg.Gateway):
			kind, hops = Via, append(hops, Hop{leg.Gateway, leg.Weight})
		case kind == Via:
		case leg.Gateway.IsValid():
			kind = Refused
		case kind == NoClaim:
			kind = OnLink
		}
	}
	if len(hops) == 1 {
		hops[0].Weight = 1 // a share of all
	}
	return kind, hops, ours > 0 && ours < len(legs) || kind == Via && len(hops) < ours
}

// Joins says whether the kernel makes one multipath of this route and others like it (net/ipv6, rt6_qualify_for_ecmp); then
// it tells the protocol of one of them.
func Joins(r *kernel.FIBRoute) bool {
	return r.Prefix.Addr().Is6() && r.NextHop == 0 && r.Type == kernel.TypeUnicast && r.Protocol != kernel.ProtoRA &&
		len(r.Legs) > 0 && r.Legs[0].Gateway.IsValid()
}

func halfDead(legs []kernel.Leg) bool {
	dead := func(leg kernel.Leg) bool { return leg.Dead }
	alive := func(leg kernel.Leg) bool { return !leg.Dead }
	return slices.ContainsFunc(legs, dead) && slices.ContainsFunc(legs, alive)
}

// Hole says whether a Miss says nothing: a route that throws covers dst, so that the kernel goes past the shorter ones of
// its table, or an IPv6 route through a nexthop object does, whose cached entries miss when another has used them before, or
// a multipath that may hide either of them (no dump shows what stands between its legs), where one of its legs is dead.
func (w *World) Hole(dst netip.Addr) (bool, error) {
	family := uint8(unix.AF_INET)
	if dst.Is6() {
		family = unix.AF_INET6
	}
	for _, table := range w.Tables {
		messages, err := w.dump(rtnl.GetFIB(family, table))
		if err != nil {
			return false, err
		}
		for _, m := range messages {
			var r kernel.FIBRoute
			if rtnl.DecodeFIBRoute(m, &r) == nil && r.Prefix.Contains(dst) &&
				(r.Type == unix.RTN_THROW || dst.Is6() && (r.NextHop != 0 || halfDead(r.Legs))) {
				return true, nil
			}
		}
	}
	return false, nil
}
