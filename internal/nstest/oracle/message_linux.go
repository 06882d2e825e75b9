package oracle

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// Attribute appends an attribute of rtnetlink.
func Attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, (4-len(value)%4)%4)...)
}

// rtaNHID is RTA_NH_ID, which x/sys does not know.
const rtaNHID = 30

func word(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// NextHopMessage asks for a nexthop object, or for its end.
func NextHopMessage(kind uint16, n kernel.NextHop) rtnl.Message {
	b := make([]byte, 8)
	switch {
	case kind == unix.RTM_DELNEXTHOP:
	case n.Gateway.Is6():
		b[0] = unix.AF_INET6
	case n.Gateway.Is4() || n.Blackhole || n.Link != 0:
		b[0] = unix.AF_INET
	}
	b = Attribute(b, unix.NHA_ID, word(n.ID))
	if n.Link != 0 {
		b = Attribute(b, unix.NHA_OIF, word(uint32(n.Link)))
	}
	if n.Gateway.IsValid() {
		b = Attribute(b, unix.NHA_GATEWAY, n.Gateway.AsSlice())
	}
	if n.Blackhole {
		b = Attribute(b, unix.NHA_BLACKHOLE, nil)
	}
	if len(n.Group) > 0 {
		var group []byte
		for _, leg := range n.Group {
			w := leg.Weight - 1
			group = append(append(group, word(leg.ID)...), byte(w), byte(w>>8), 0, 0)
		}
		b = Attribute(b, unix.NHA_GROUP, group)
	}
	return rtnl.Message{Type: kind, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: b}
}

// Flags of a request for a route.
const (
	Create  = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	Prepend = unix.NLM_F_CREATE
	Append  = unix.NLM_F_CREATE | unix.NLM_F_APPEND
	Replace = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
)

// RouteMessage asks for a route. A deletion names what the route has. Gateways that are no overlay hosts are on-link by flag.
func RouteMessage(kind, flags uint16, r kernel.FIBRoute) rtnl.Message {
	h := make([]byte, unix.SizeofRtMsg)
	h[0], h[1], h[3], h[5], h[7] = unix.AF_INET6, byte(r.Prefix.Bits()), r.TOS, r.Protocol, r.Type
	if r.Prefix.Addr().Is4() {
		h[0] = unix.AF_INET
		switch {
		case kind == unix.RTM_DELROUTE:
			h[6] = unix.RT_SCOPE_NOWHERE
		case len(r.Legs) > 0 && !slices.ContainsFunc(r.Legs, func(leg kernel.Leg) bool { return leg.Gateway.IsValid() }):
			h[6] = unix.RT_SCOPE_LINK
		}
	}
	b := Attribute(h, unix.RTA_DST, r.Prefix.Addr().AsSlice())
	b = Attribute(Attribute(b, unix.RTA_TABLE, word(r.Table)), unix.RTA_PRIORITY, word(r.Metric))
	b = append(b, r.Detail...)
	if r.Pref != 0 {
		b = Attribute(b, unix.RTA_PREF, []byte{r.Pref})
	}
	switch {
	case r.NextHop != 0:
		b = Attribute(b, rtaNHID, word(r.NextHop))
	case len(r.Legs) == 1:
		leg := r.Legs[0]
		b = gateway(Attribute(b, unix.RTA_OIF, word(uint32(leg.Link))), h[0], leg.Gateway)
		b[8] |= onLinkFlag(leg)
	case len(r.Legs) > 1:
		b = Attribute(b, unix.RTA_MULTIPATH, legsAttribute(h[0], r.Legs))
	}
	return rtnl.Message{Type: kind, Flags: flags, Body: b}
}

func onLinkFlag(leg kernel.Leg) byte {
	if leg.Gateway.IsValid() && !Overlay(leg.Gateway) {
		return unix.RTNH_F_ONLINK
	}
	return 0
}

func legsAttribute(family byte, legs []kernel.Leg) []byte {
	var all []byte
	for _, leg := range legs {
		rest := gateway(nil, family, leg.Gateway)
		all = binary.NativeEndian.AppendUint16(all, uint16(8+len(rest)))
		all = append(append(append(all, onLinkFlag(leg), byte(leg.Weight-1)), word(uint32(leg.Link))...), rest...)
	}
	return all
}

func gateway(b []byte, family byte, a netip.Addr) []byte {
	switch {
	case !a.IsValid():
		return b
	case family == unix.AF_INET && a.Is6():
		return Attribute(b, unix.RTA_VIA, append(binary.NativeEndian.AppendUint16(nil, unix.AF_INET6), a.AsSlice()...))
	}
	return Attribute(b, unix.RTA_GATEWAY, a.AsSlice())
}
