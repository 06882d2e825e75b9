package rtnl

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"example.com/overlay/internal/kernel"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ifaProto is IFA_PROTO (linux/if_addr.h, since 5.18), which neither library knows yet. An older kernel ignores it.
const ifaProto = 11

// GetAddrs asks for the addresses of one interface.
func GetAddrs(index int) Message {
	h := &nl.IfAddrmsg{}
	h.Index = uint32(index)
	return Message{Type: unix.RTM_GETADDR, Body: body(h)}
}

// AddAddr adds an address, without duplicate address detection: nobody else is on a TUN's link. One that the kernel told of
// is put back as it was.
func AddAddr(index int, a kernel.Addr) Message {
	m := Message{Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL}
	if len(a.Message) >= unix.SizeofIfAddrmsg {
		m.Body = []byte(a.Message)
		binary.NativeEndian.PutUint32(m.Body[4:], uint32(index))
		return m
	}
	flags := uint32(unix.IFA_F_NODAD)
	if a.NoPrefixRoute {
		flags |= unix.IFA_F_NOPREFIXROUTE
	}
	m.Body = append(addrHeader(index, a, unix.IFA_F_NODAD), body(attr32(unix.IFA_FLAGS, flags))...)
	if a.Protocol != 0 {
		m.Body = append(m.Body, body(nl.NewRtAttr(ifaProto, []byte{a.Protocol}))...)
	}
	return m
}

// DelAddr removes an address.
func DelAddr(index int, a kernel.Addr) Message {
	return Message{Type: unix.RTM_DELADDR, Body: addrHeader(index, a, 0)}
}

// addrHeader names an address. IFA_ADDRESS is the peer's, if there is one.
func addrHeader(index int, a kernel.Addr, flags uint8) []byte {
	local, address := a.Prefix.Addr(), a.Prefix.Addr()
	if a.Peer.IsValid() {
		address = a.Peer
	}
	h := &nl.IfAddrmsg{}
	h.Family, h.Prefixlen, h.Flags, h.Index = family(local), uint8(a.Prefix.Bits()), flags, uint32(index)
	return body(h, nl.NewRtAttr(unix.IFA_LOCAL, local.AsSlice()), nl.NewRtAttr(unix.IFA_ADDRESS, address.AsSlice()))
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// DecodeAddr reads an RTM_NEWADDR or RTM_DELADDR: the address and its interface's index.
func DecodeAddr(m Message) (a kernel.Addr, index int, err error) {
	if len(m.Body) < unix.SizeofIfAddrmsg {
		return a, 0, fmt.Errorf("address: %w", ErrMalformed)
	}
	bits := int(m.Body[1])
	flags := uint32(m.Body[2])
	index = int(int32(binary.NativeEndian.Uint32(m.Body[4:])))
	var local, address netip.Addr
	for kind, value := range attributes(m.Body[unix.SizeofIfAddrmsg:]) {
		switch kind {
		case unix.IFA_LOCAL:
			local, _ = addrOf(m.Body[0], value)
		case unix.IFA_ADDRESS:
			address, _ = addrOf(m.Body[0], value)
		case unix.IFA_FLAGS:
			if word, ok := u32(value); ok {
				flags = word
			}
		case ifaProto:
			if len(value) == 1 {
				a.Protocol = value[0]
			}
		}
	}
	// IPv6 has IFA_LOCAL only where there is a peer.
	if !local.IsValid() {
		local = address
	}
	if address != local {
		a.Peer = address
	}
	a.NoPrefixRoute = flags&unix.IFA_F_NOPREFIXROUTE != 0
	a.Secondary = local.Is4() && flags&unix.IFA_F_SECONDARY != 0 // IPv6 calls temporary addresses so
	a.Prefix = netip.PrefixFrom(local, bits)
	if !a.Prefix.IsValid() {
		return a, index, fmt.Errorf("address: %w", ErrMalformed)
	}
	a.Message = string(m.Body)
	return a, index, nil
}

// addrOf reads an address of the given family; false if its length is another's.
func addrOf(family uint8, b []byte) (netip.Addr, bool) {
	switch {
	case family == unix.AF_INET && len(b) == 4:
		return netip.AddrFrom4([4]byte(b)), true
	case family == unix.AF_INET6 && len(b) == 16:
		return netip.AddrFrom16([16]byte(b)), true
	}
	return netip.Addr{}, false
}
