package rtnl

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"example.com/overlay/internal/kernel"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes of linux/rtnetlink.h that x/sys lacks.
const (
	rtaNHID    = 30 // since 5.3
	prefMedium = 0  // of RTA_PREF
)

// GetRoutes asks for one family's unicast routes through one interface, in every table.
func GetRoutes(family uint8, index int) Message {
	h := &nl.RtMsg{}
	h.Family, h.Type = family, unix.RTN_UNICAST
	return Message{Type: unix.RTM_GETROUTE, Body: body(h, attr32(unix.RTA_OIF, uint32(index)))}
}

// GetAllRoutes asks for one family's routes of every kind, table and interface.
func GetAllRoutes(family uint8) Message {
	h := &nl.RtMsg{}
	h.Family = family
	return Message{Type: unix.RTM_GETROUTE, Body: body(h)}
}

// GetLocal asks for the addresses of one family that the kernel takes packets for on one interface.
func GetLocal(family uint8, index int) Message {
	h := &nl.RtMsg{}
	h.Family, h.Type, h.Table = family, unix.RTN_LOCAL, unix.RT_TABLE_LOCAL
	return Message{Type: unix.RTM_GETROUTE, Body: body(h, attr32(unix.RTA_OIF, uint32(index)))}
}

// MatchRoute asks which route the kernel's own lookup finds for dst. IPv4 calls every table main unless it is asked for the
// table too (net/ipv4/route.c, inet_rtm_getroute); IPv6 tells it, and refuses that flag.
func MatchRoute(dst netip.Addr) Message {
	h := &nl.RtMsg{}
	h.Family, h.Dst_len, h.Flags = family(dst), uint8(dst.BitLen()), unix.RTM_F_FIB_MATCH
	if dst.Is4() {
		h.Flags |= unix.RTM_F_LOOKUP_TABLE
	}
	return Message{Type: unix.RTM_GETROUTE, Body: body(h, nl.NewRtAttr(unix.RTA_DST, dst.AsSlice()))}
}

// AddRoute adds a route behind any that has the same key: it never takes another's place (kernel.md V3, U4). One that the
// kernel told of is put back as it was.
func AddRoute(r kernel.Route) Message {
	m := Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_CREATE | unix.NLM_F_APPEND}
	if len(r.Message) >= unix.SizeofRtMsg {
		m.Body = []byte(r.Message)
		// The kernel takes no flags that tell of the next hop's state.
		flags := binary.NativeEndian.Uint32(m.Body[8:])
		binary.NativeEndian.PutUint32(m.Body[8:], flags&unix.RTNH_F_ONLINK)
		return m
	}
	h := routeHeader(r)
	h.Type, h.Scope = unix.RTN_UNICAST, scopeOf(r.Prefix)
	m.Body = appendRouteDetails(appendRouteKey(routeRoom(h), &r), &r)
	return m
}

// scopeOf is the scope of an on-link route.
func scopeOf(prefix netip.Prefix) uint8 {
	if prefix.Addr().Is6() {
		return unix.RT_SCOPE_UNIVERSE // IPv6 knows no other
	}
	return unix.RT_SCOPE_LINK
}

// DelRoute deletes one route, named by table, prefix, metric, interface and protocol (law 4), without RTA_METRICS, which
// would have to be equal (kernel.md U14). Of several alike it is the first. The kernel echoes what it deleted (V13).
func DelRoute(r kernel.Route) Message {
	h := routeHeader(r)
	h.Scope = unix.RT_SCOPE_NOWHERE
	return Message{Type: unix.RTM_DELROUTE, Flags: unix.NLM_F_ECHO, Body: appendRouteKey(routeRoom(h), &r)}
}

// DelRouteExactly is DelRoute that also tells two alike of different MTU, MSS or source apart. IPv4 only: IPv6 holds no
// two.
func DelRouteExactly(r kernel.Route) Message {
	m := DelRoute(r)
	m.Body = appendRouteDetails(m.Body, &r)
	return m
}

func routeHeader(r kernel.Route) *nl.RtMsg {
	h := &nl.RtMsg{}
	h.Family, h.Dst_len = family(r.Prefix.Addr()), uint8(r.Prefix.Bits())
	h.Tos, h.Protocol = r.TOS, r.Protocol
	return h
}

// routeRoom is the header with room for all that may follow.
func routeRoom(h *nl.RtMsg) []byte {
	return append(make([]byte, 0, 128), h.Serialize()...)
}

// The attributes of a route are appended in place: of the many small pieces that a tree of nl.RtAttr is made of, a hundred
// thousand routes make a tenth of their installation's time.

// appendRouteKey appends the attributes that name a route.
func appendRouteKey(b []byte, r *kernel.Route) []byte {
	b = appendAddr(b, unix.RTA_DST, r.Prefix.Addr())
	b = append32(b, unix.RTA_OIF, uint32(r.Link))
	b = append32(b, unix.RTA_TABLE, r.Table)
	return append32(b, unix.RTA_PRIORITY, r.Metric)
}

// appendRouteDetails appends the others that we set.
func appendRouteDetails(b []byte, r *kernel.Route) []byte {
	if r.Source.IsValid() {
		b = appendAddr(b, unix.RTA_PREFSRC, r.Source)
	}
	if r.MTU == 0 && r.MSS == 0 {
		return b
	}
	start := len(b)
	b = appendAttr(b, unix.RTA_METRICS, 0)
	if r.MTU != 0 {
		b = append32(b, unix.RTAX_MTU, r.MTU)
	}
	if r.MSS != 0 {
		b = append32(b, unix.RTAX_ADVMSS, r.MSS)
	}
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start))
	return b
}

// PeekRoute reads of a route message what tells whose it is, at a tenth of DecodeRoute's cost.
func PeekRoute(m Message) (prefix netip.Prefix, protocol uint8) {
	if len(m.Body) < unix.SizeofRtMsg {
		return prefix, 0
	}
	dst := unspecified(m.Body[0])
	for kind, value := range attributes(m.Body[unix.SizeofRtMsg:]) {
		if kind == unix.RTA_DST {
			dst, _ = addrOf(m.Body[0], value)
			break
		}
	}
	return netip.PrefixFrom(dst, int(m.Body[1])), m.Body[5]
}

// PeekLink reads of a route message which interface it leads through; 0 for none or several.
func PeekLink(m Message) int {
	if len(m.Body) < unix.SizeofRtMsg {
		return 0
	}
	for kind, value := range attributes(m.Body[unix.SizeofRtMsg:]) {
		if kind == unix.RTA_OIF && len(value) >= 4 {
			return int(binary.NativeEndian.Uint32(value))
		}
	}
	return 0
}

// DecodeRoute reads an RTM_NEWROUTE or RTM_DELROUTE; false for what is no unicast route: local, multicast, blackhole,
// cloned, …
func DecodeRoute(m Message) (r kernel.Route, unicast bool, err error) {
	if len(m.Body) < unix.SizeofRtMsg {
		return r, false, fmt.Errorf("route: %w", ErrMalformed)
	}
	fam, bits, srcBits := m.Body[0], int(m.Body[1]), m.Body[2]
	r.TOS, r.Table, r.Protocol = m.Body[3], uint32(m.Body[4]), m.Body[5]
	scope, kind, flags := m.Body[6], m.Body[7], binary.NativeEndian.Uint32(m.Body[8:])
	r.Plain = srcBits == 0 && r.TOS == 0
	dst, whole := unspecified(fam), r.Plain
	for kind, value := range attributes(m.Body[unix.SizeofRtMsg:]) {
		word, _ := u32(value)
		switch kind {
		case unix.RTA_DST:
			dst, _ = addrOf(fam, value)
		case unix.RTA_TABLE:
			r.Table = word
		case unix.RTA_PRIORITY:
			r.Metric = word
		case unix.RTA_OIF:
			r.Link = int(int32(word))
		case unix.RTA_PREFSRC:
			r.Source, _ = addrOf(fam, value)
		case unix.RTA_METRICS:
			whole = decodeMetrics(&r, value) && whole
		case unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_MULTIPATH, rtaNHID:
			r.Plain, whole, r.Object = false, false, r.Object || kind == rtaNHID
		case unix.RTA_PREF:
			whole = whole && len(value) == 1 && value[0] == prefMedium
		case unix.RTA_CACHEINFO: // ages and use counts
		default:
			whole = false
		}
	}
	r.Prefix = netip.PrefixFrom(dst, bits)
	if !r.Prefix.IsValid() {
		return r, false, fmt.Errorf("route: %w", ErrMalformed)
	}
	if !whole || scope != scopeOf(r.Prefix) {
		r.Message = string(m.Body)
	}
	return r, kind == unix.RTN_UNICAST && flags&unix.RTM_F_CLONED == 0, nil
}

// decodeMetrics returns whether there are none but those that a Route has.
func decodeMetrics(r *kernel.Route, b []byte) (whole bool) {
	whole = true
	for kind, value := range attributes(b) {
		word, _ := u32(value)
		switch kind {
		case unix.RTAX_MTU:
			r.MTU = word
		case unix.RTAX_ADVMSS:
			r.MSS = word
		default:
			whole = false
		}
	}
	return whole
}

// unspecified is the destination of a default route, whose message has none.
func unspecified(family uint8) netip.Addr {
	if family == unix.AF_INET {
		return netip.IPv4Unspecified()
	}
	if family == unix.AF_INET6 {
		return netip.IPv6Unspecified()
	}
	return netip.Addr{}
}
