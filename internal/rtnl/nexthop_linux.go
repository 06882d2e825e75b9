package rtnl

import (
	"encoding/binary"
	"fmt"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

const (
	sizeofNhmsg   = 8  // struct nhmsg: family, scope, protocol, padding, flags
	sizeofNHGroup = 8  // struct nexthop_grp: id, weight-1, its upper byte (since 6.12), padding
	nhaFDB        = 11 // for a bridge's forwarding database
)

// GetNextHops asks for all nexthop objects.
func GetNextHops() Message {
	return Message{Type: unix.RTM_GETNEXTHOP, Body: make([]byte, sizeofNhmsg)}
}

// GetNextHop asks for one.
func GetNextHop(id uint32) Message {
	m := GetNextHops()
	m.Body = append(m.Body, attr32(unix.NHA_ID, id).Serialize()...)
	return m
}

// DecodeNextHop reads an RTM_NEWNEXTHOP or RTM_DELNEXTHOP.
func DecodeNextHop(m Message) (kernel.NextHop, error) {
	n := kernel.NextHop{Leg: kernel.Leg{Weight: 1}}
	if len(m.Body) < sizeofNhmsg {
		return n, fmt.Errorf("nexthop: %w", ErrMalformed)
	}
	family := m.Body[0]
	n.Dead = binary.NativeEndian.Uint32(m.Body[4:])&unix.RTNH_F_DEAD != 0
	whole := true
	for b := m.Body[sizeofNhmsg:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			break
		}
		word, is32 := u32(value)
		switch kind {
		case unix.NHA_ID:
			n.ID, whole = word, whole && is32
		case unix.NHA_OIF:
			n.Link, whole = int32(word), whole && is32
		case unix.NHA_GATEWAY:
			whole = decodeGateway(&n.Leg, family, unix.RTA_GATEWAY, value) && whole
		case unix.NHA_BLACKHOLE:
			n.Blackhole = true
		case nhaFDB:
			n.Foreign = true
		case unix.NHA_GROUP:
			n.Group, ok = decodeGroup(value)
			whole = whole && ok
		}
		b = rest
	}
	if !whole || n.ID == 0 {
		return n, fmt.Errorf("nexthop: %w", ErrMalformed)
	}
	return n, nil
}

// decodeGroup reads members and their weights, of 16 bits (kernel.md V14).
func decodeGroup(b []byte) ([]kernel.NextHopLeg, bool) {
	if len(b) == 0 || len(b)%sizeofNHGroup != 0 {
		return nil, false
	}
	group := make([]kernel.NextHopLeg, 0, len(b)/sizeofNHGroup)
	for ; len(b) > 0; b = b[sizeofNHGroup:] {
		group = append(group, kernel.NextHopLeg{
			ID:     binary.NativeEndian.Uint32(b),
			Weight: uint32(b[4]) | uint32(b[5])<<8 + 1,
		})
	}
	return group, true
}
