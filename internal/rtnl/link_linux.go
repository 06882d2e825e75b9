package rtnl

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"example.com/overlay/internal/kernel"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Indexes of the kernel's per-device settings: linux/ip.h counts IPv4's from 1, linux/ipv6.h IPv6's from 0.
const (
	IPv4AcceptRedirects    = 4
	IPv4SendRedirects      = 6
	IPv4AcceptSourceRoute  = 9
	IPv4PromoteSecondaries = 20

	ipv6AcceptRA          = 3
	ipv6AcceptRedirects   = 4
	ipv6Autoconf          = 5
	ipv6AcceptSourceRoute = 24
	ipv6Disable           = 26
)

// GetLink asks for one interface by index.
func GetLink(index int) Message {
	return Message{Type: unix.RTM_GETLINK, Body: linkHeader(index, 0, 0)}
}

// GetLinkByName asks for one interface by name.
func GetLinkByName(name string) Message {
	return Message{Type: unix.RTM_GETLINK, Body: append(linkHeader(0, 0, 0), nameAttr(name)...)}
}

func nameAttr(name string) []byte {
	return body(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
}

// SetLinkUp takes an interface up or down.
func SetLinkUp(index int, up bool) Message {
	flags := uint32(0)
	if up {
		flags = unix.IFF_UP
	}
	return Message{Type: unix.RTM_NEWLINK, Body: linkHeader(index, flags, unix.IFF_UP)}
}

// SetLinkMTU sets an interface's MTU.
func SetLinkMTU(index, mtu int) Message { return setLink(index, attr32(unix.IFLA_MTU, uint32(mtu))) }

// SetLinkTxQueueLen sets how many packets wait for a reader.
func SetLinkTxQueueLen(index, packets int) Message {
	return setLink(index, attr32(unix.IFLA_TXQLEN, uint32(packets)))
}

// SetLinkIPv4 sets one per-device setting (IPv4AcceptRedirects …) without procfs.
func SetLinkIPv4(index, setting, value int) Message {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(unix.IFLA_INET_CONF, nil)
	conf.AddRtAttr(setting, nl.Uint32Attr(uint32(value)))
	return setLink(index, spec)
}

// SetLinkAddrGenMode says how the kernel makes IPv6 link-local addresses: kernel.AddrGenNone, it makes none.
func SetLinkAddrGenMode(index, mode int) Message {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, nl.Uint8Attr(uint8(mode)))
	return setLink(index, spec)
}

// DelLink deletes an interface.
func DelLink(index int) Message {
	return Message{Type: unix.RTM_DELLINK, Body: linkHeader(index, 0, 0)}
}

func setLink(index int, attribute *nl.RtAttr) Message {
	return Message{Type: unix.RTM_SETLINK, Body: append(linkHeader(index, 0, 0), body(attribute)...)}
}

func linkHeader(index int, flags, change uint32) []byte {
	h := nl.NewIfInfomsg(unix.AF_UNSPEC)
	h.Index, h.Flags, h.Change = int32(index), flags, change
	return body(h)
}

// DecodeLink reads an RTM_NEWLINK or RTM_DELLINK.
func DecodeLink(m Message) (kernel.Link, error) {
	if len(m.Body) < unix.SizeofIfInfomsg {
		return kernel.Link{}, fmt.Errorf("link: %w", ErrMalformed)
	}
	n := binary.NativeEndian
	l := kernel.Link{
		Hardware: n.Uint16(m.Body[2:]),
		Index:    int(int32(n.Uint32(m.Body[4:]))),
		Up:       n.Uint32(m.Body[8:])&unix.IFF_UP != 0,
		Tun:      kernel.Tun{Owner: -1, Group: -1},
	}
	for kind, value := range attributes(m.Body[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			name, _, _ := bytes.Cut(value, []byte{0})
			l.Name = string(name)
		case unix.IFLA_MTU:
			v, _ := u32(value)
			l.MTU = int(v)
		case unix.IFLA_TXQLEN:
			v, _ := u32(value)
			l.TxQueueLen = int(v)
		case unix.IFLA_LINKINFO:
			decodeLinkInfo(&l, value)
		case unix.IFLA_AF_SPEC:
			decodeFamilies(&l, value)
		case unix.IFLA_STATS64:
			const txDropped = 7 * 8 // struct rtnl_link_stats64, eighth counter
			if len(value) >= txDropped+8 {
				l.TxDropped = n.Uint64(value[txDropped:])
			}
		}
	}
	return l, nil
}

// LinkState is what of a link the kernel's use of its routes follows from.
type LinkState struct {
	Index, MTU  int
	Up, Carrier bool
}

// DecodeLinkState is a quick DecodeLink; false: the message is not about a link as such, but about its place in a bridge or the
// settings of a family.
func DecodeLinkState(m Message) (s LinkState, ok bool) {
	if len(m.Body) < unix.SizeofIfInfomsg || m.Body[0] != unix.AF_UNSPEC {
		return s, false
	}
	flags := binary.NativeEndian.Uint32(m.Body[8:])
	s = LinkState{
		Index: int(int32(binary.NativeEndian.Uint32(m.Body[4:]))),
		Up:    flags&unix.IFF_UP != 0, Carrier: flags&unix.IFF_LOWER_UP != 0,
	}
	for b := m.Body[unix.SizeofIfInfomsg:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			return s, true
		}
		if kind == unix.IFLA_MTU {
			v, _ := u32(value)
			s.MTU = int(v)
		}
		b = rest
	}
}

func decodeLinkInfo(l *kernel.Link, b []byte) {
	for kind, value := range attributes(b) {
		switch kind {
		case unix.IFLA_INFO_KIND:
			name, _, _ := bytes.Cut(value, []byte{0})
			l.Kind = string(name)
		case unix.IFLA_INFO_DATA:
			if l.Kind == "tun" { // the kernel writes the kind first
				decodeTun(&l.Tun, value)
			}
		}
	}
}

func decodeTun(t *kernel.Tun, b []byte) {
	for kind, value := range attributes(b) {
		word, isWord := u32(value)
		flag := len(value) == 1 && value[0] != 0
		switch {
		case kind == unix.IFLA_TUN_OWNER && isWord:
			t.Owner = int64(word)
		case kind == unix.IFLA_TUN_GROUP && isWord:
			t.Group = int64(word)
		case kind == unix.IFLA_TUN_PERSIST:
			t.Persist = flag
		case kind == unix.IFLA_TUN_MULTI_QUEUE:
			t.MultiQueue = flag
		case kind == unix.IFLA_TUN_PI:
			t.PacketInfo = flag
		case kind == unix.IFLA_TUN_VNET_HDR:
			t.VnetHeader = flag
		case kind == unix.IFLA_TUN_NUM_QUEUES && isWord:
			t.Queues = int(word)
		case kind == unix.IFLA_TUN_NUM_DISABLED_QUEUES && isWord:
			t.Disabled = int(word)
		}
	}
}

func decodeFamilies(l *kernel.Link, b []byte) {
	for family, spec := range attributes(b) {
		for kind, value := range attributes(spec) {
			switch {
			case family == unix.AF_INET && kind == unix.IFLA_INET_CONF:
				l.IPv4 = &kernel.IPv4{
					AcceptRedirects:    setting(value, IPv4AcceptRedirects-1),
					SendRedirects:      setting(value, IPv4SendRedirects-1),
					AcceptSourceRoute:  setting(value, IPv4AcceptSourceRoute-1),
					PromoteSecondaries: setting(value, IPv4PromoteSecondaries-1),
				}
			case family == unix.AF_INET6 && kind == unix.IFLA_INET6_CONF:
				ipv6(l).AcceptRA = setting(value, ipv6AcceptRA)
				ipv6(l).Autoconf = setting(value, ipv6Autoconf)
				ipv6(l).AcceptRedirects = setting(value, ipv6AcceptRedirects)
				ipv6(l).AcceptSourceRoute = setting(value, ipv6AcceptSourceRoute)
				ipv6(l).Disabled = setting(value, ipv6Disable) != 0
			case family == unix.AF_INET6 && kind == unix.IFLA_INET6_ADDR_GEN_MODE && len(value) == 1:
				ipv6(l).AddrGenMode = int(value[0])
			}
		}
	}
}

func ipv6(l *kernel.Link) *kernel.IPv6 {
	if l.IPv6 == nil {
		l.IPv6 = new(kernel.IPv6)
	}
	return l.IPv6
}

// setting reads one of an array of 32-bit settings; 0 where this kernel has fewer.
func setting(values []byte, i int) int {
	if len(values) < 4*(i+1) {
		return 0
	}
	return int(int32(binary.NativeEndian.Uint32(values[4*i:])))
}
