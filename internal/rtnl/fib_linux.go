package rtnl

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

// GetFIB asks for one family's routes in one table, through all interfaces: the place of a route among equal keys counts.
func GetFIB(family uint8, table uint32) Message {
	h := make([]byte, unix.SizeofRtMsg)
	h[0] = family
	return Message{Type: unix.RTM_GETROUTE, Body: append(h, attr32(unix.RTA_TABLE, table).Serialize()...)}
}

// ChangeOf reads off a route announcement what became of the route: IPv4 marks with NLM_F_EXCL the first of a key, and
// leaves both that and NLM_F_APPEND out where it puts a route before the others (net/ipv4/fib_trie.c, fib_table_insert).
func ChangeOf(m Message) kernel.Change {
	switch f := m.Flags; {
	case m.Type == unix.RTM_DELROUTE:
		return kernel.Deleted
	case f&unix.NLM_F_REPLACE != 0:
		return kernel.Replaced
	case f&unix.NLM_F_EXCL != 0:
		return kernel.Created
	case f&unix.NLM_F_APPEND != 0:
		return kernel.Appended
	case f&unix.NLM_F_CREATE != 0:
		return kernel.Prepended
	}
	return kernel.Refreshed
}

// MayConcern says whether a route announcement may matter to who follows the routes through interface index. It allocates
// nothing. A stranger's new route does not matter if it is the first of its key and plainly leads through another interface; one
// that joins a key does, because it may stand before ours when that is replaced (kernel.md A9, A10), and so does a deletion, and
// one that throws.
func MayConcern(m Message, index int32) bool {
	if m.Type != unix.RTM_NEWROUTE || len(m.Body) < unix.SizeofRtMsg {
		return m.Type == unix.RTM_DELROUTE
	}
	if m.Flags&unix.NLM_F_REPLACE != 0 || m.Flags&unix.NLM_F_EXCL == 0 || m.Body[7] == unix.RTN_THROW {
		return true
	}
	for b := m.Body[unix.SizeofRtMsg:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			return false
		}
		switch kind {
		case unix.RTA_MULTIPATH, rtaNHID:
			return true
		case unix.RTA_OIF:
			if word, ok := u32(value); ok && int32(word) == index {
				return true
			}
		}
		b = rest
	}
}

// nextAttribute is one step of attributes, without a closure.
func nextAttribute(b []byte) (kind uint16, value, rest []byte, ok bool) {
	if len(b) < unix.SizeofRtAttr {
		return 0, nil, nil, false
	}
	size := int(binary.NativeEndian.Uint16(b))
	kind = binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	if size < unix.SizeofRtAttr || size > len(b) {
		return 0, nil, nil, false
	}
	return kind, b[unix.SizeofRtAttr:size], b[min(align(size), len(b)):], true
}

// DecodeFIBRoute reads an RTM_NEWROUTE or RTM_DELROUTE into r, whose slices it uses again: once they are large enough it
// allocates nothing. After an error r is of no use.
func DecodeFIBRoute(m Message, r *kernel.FIBRoute) error {
	if len(m.Body) < unix.SizeofRtMsg {
		return fmt.Errorf("route: %w", ErrMalformed)
	}
	h := m.Body
	*r = kernel.FIBRoute{Legs: r.Legs[:0], Detail: append(r.Detail[:0], h[6])} // the scope
	family, bits := h[0], int(h[1])
	r.SourceLen, r.TOS, r.Table, r.Protocol, r.Type = h[2], h[3], uint32(h[4]), h[5], h[7]
	flags := binary.NativeEndian.Uint32(h[8:])
	r.Cloned = flags&unix.RTM_F_CLONED != 0
	dst, leg, whole := unspecified(family), kernel.Leg{Weight: 1, Dead: flags&unix.RTNH_F_DEAD != 0}, true
	for b := h[unix.SizeofRtMsg:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			break
		}
		whole = decodeFIBAttribute(r, &dst, &leg, family, kind, value) && whole
		b = rest
	}
	r.Prefix = netip.PrefixFrom(dst, bits)
	if !whole || !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked() {
		return fmt.Errorf("route: %w", ErrMalformed)
	}
	if len(r.Legs) == 0 && (leg.Link != 0 || leg.Gateway.IsValid()) {
		r.Legs = append(r.Legs, leg)
		detailLeg(r, byte(flags))
	}
	return nil
}

// decodeFIBAttribute returns whether it could be read.
func decodeFIBAttribute(r *kernel.FIBRoute, dst *netip.Addr, leg *kernel.Leg, family uint8, kind uint16, value []byte) bool {
	word, is32 := u32(value)
	switch kind {
	case unix.RTA_DST:
		var ok bool
		*dst, ok = addrOf(family, value)
		return ok
	case unix.RTA_TABLE:
		r.Table = word
		return is32
	case unix.RTA_PRIORITY:
		r.Metric = word
		return is32
	case unix.RTA_OIF:
		leg.Link = int32(word)
		return is32
	case unix.RTA_GATEWAY, unix.RTA_VIA:
		return decodeGateway(leg, family, kind, value)
	case rtaNHID:
		r.NextHop = word
		return is32
	case unix.RTA_PREF:
		if len(value) != 1 {
			return false
		}
		r.Pref = value[0] & 3
	case unix.RTA_MULTIPATH:
		return decodeLegs(r, family, value)
	case unix.RTA_CACHEINFO:
		if len(value) >= 12 && family == unix.AF_INET6 { // struct rta_cacheinfo: behind two other words
			r.Expires = int32(binary.NativeEndian.Uint32(value[8:]))
		}
	case unix.RTA_IIF, unix.RTA_MARK, unix.RTA_UID, unix.RTA_EXPIRES: // nothing that lasts
	case unix.RTA_METRICS, unix.RTA_PREFSRC:
		// IPv6 tells no routes apart by them, and changes them untold when the device's MTU changes or the address goes
		// (net/ipv6/route.c, rt6_mtu_change_route, rt6_remove_prefsrc).
		if family == unix.AF_INET {
			r.Detail = appendDetail(r.Detail, kind, value)
		}
	default:
		r.Detail = appendDetail(r.Detail, kind, value)
	}
	return true
}

// appendDetail adds an attribute to what tells routes apart.
func appendDetail(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, uint16(len(value)))
	return append(b, value...)
}

// decodeGateway reads RTA_GATEWAY, of the route's own family, or RTA_VIA, which says which (kernel.md A15).
func decodeGateway(leg *kernel.Leg, family uint8, kind uint16, value []byte) bool {
	if kind == unix.RTA_VIA {
		if len(value) < 2 {
			return false
		}
		of := binary.NativeEndian.Uint16(value)
		if of > 0xff {
			return false
		}
		family, value = uint8(of), value[2:]
	}
	gateway, ok := addrOf(family, value)
	if ok && !gateway.IsUnspecified() {
		leg.Gateway = gateway.Unmap()
	}
	return ok
}

// detailLeg notes what of a leg's flags is configuration. Legs of a nexthop object are not the route's: RTA_NH_ID, which comes
// before them, tells it apart with nexthop_compat_mode on or off.
func detailLeg(r *kernel.FIBRoute, flags uint8) {
	if r.NextHop == 0 {
		r.Detail = append(r.Detail, flags&unix.RTNH_F_ONLINK)
	}
}

// decodeLegs reads an RTA_MULTIPATH.
func decodeLegs(r *kernel.FIBRoute, family uint8, b []byte) bool {
	for len(b) > 0 {
		if len(b) < unix.SizeofRtNexthop {
			return false
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtNexthop || size > len(b) {
			return false
		}
		flags := b[2]
		leg := kernel.Leg{
			Weight: uint32(b[3]) + 1,
			Link:   int32(binary.NativeEndian.Uint32(b[4:])),
			Dead:   flags&unix.RTNH_F_DEAD != 0,
		}
		detailLeg(r, flags)
		for attributes := b[unix.SizeofRtNexthop:size]; ; {
			kind, value, rest, ok := nextAttribute(attributes)
			if !ok {
				break
			}
			switch {
			case kind != unix.RTA_GATEWAY && kind != unix.RTA_VIA:
				if r.NextHop == 0 {
					r.Detail = appendDetail(r.Detail, kind, value)
				}
			case !decodeGateway(&leg, family, kind, value):
				return false
			}
			attributes = rest
		}
		r.Legs = append(r.Legs, leg)
		b = b[min(align(size), len(b)):]
	}
	return true
}
