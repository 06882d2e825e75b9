// Package kernel holds what the kernel knows of a device, as plain data: the pure rooms compare and plan with it, the
// acting rooms read and write it.
package kernel

import "net/netip"

// Link is one network interface.
type Link struct {
	Index      int
	Name       string
	MTU        int
	TxQueueLen int
	Up         bool // administratively
	Hardware   uint16
	Kind       string // "tun" for TUN and TAP devices
	Tun        Tun
	IPv4       *IPv4 // nil: the kernel keeps no IPv4 settings for it
	IPv6       *IPv6 // nil: none for IPv6: MTU below 1280, or no IPv6 at all
	TxDropped  uint64
}

// Tun is what the kernel tells of a TUN device beside its descriptors.
type Tun struct {
	Owner, Group     int64 // -1: none
	Persist          bool
	MultiQueue       bool
	VnetHeader       bool // a virtio header before each packet
	PacketInfo       bool // four bytes before each packet: TUNGETIFF does not tell, its IFF_NO_PI is also IFF_NOFILTER
	Queues, Disabled int  // attached and detached queues; 0 where the device is not multi-queue
}

// IPv4 holds the per-device settings that matter for hardening, as sysctl knows them.
type IPv4 struct {
	AcceptRedirects, SendRedirects, AcceptSourceRoute, PromoteSecondaries int
}

// IPv6 likewise.
type IPv6 struct {
	Disabled                                               bool
	AcceptRA, Autoconf, AcceptRedirects, AcceptSourceRoute int
	AddrGenMode                                            int
}

// Values of IPv6.AddrGenMode.
const (
	AddrGenEUI64 = 0
	AddrGenNone  = 1
)

// Protocols that the kernel itself writes into addresses and routes.
const (
	ProtoKernel         = 2 // rtm_protocol
	AddrProtoKernelLink = 3 // ifa_proto of fe80:: addresses
)

// Addr is an address of an interface.
type Addr struct {
	Prefix        netip.Prefix // host bits kept
	Protocol      uint8
	NoPrefixRoute bool
	Secondary     bool       // IPv4: behind another of its network, and gone with it unless promoted
	Peer          netip.Addr // the other end of a point-to-point address; zero: none
	Message       string     // the kernel's message about it, with which it can be put back as it was; "": nobody's yet
}

// Same says whether the kernel takes b for the address a.
func (a Addr) Same(b Addr) bool { return a.Prefix == b.Prefix && a.Peer == b.Peer }

// Routing tables.
const (
	TableDefault = 253
	TableMain    = 254
	TableLocal   = 255
)

// RouteKey is what tells the routes through one interface apart.
type RouteKey struct {
	Prefix netip.Prefix
	Table  uint32
	Metric uint32
}

// Route is a unicast route through one interface.
type Route struct {
	RouteKey
	Protocol uint8
	TOS      uint8
	Source   netip.Addr // preferred source; zero: none
	MTU, MSS uint32     // 0: unset
	Link     int        // index of the interface; 0: several or none
	Plain    bool       // on-link, by one next hop, for any TOS and source
	Object   bool       // by a nexthop object
	Message  string     // the kernel's message, if the other fields do not say all
}

// Behind returns the address that follows the last of prefix; the zero Addr, which no prefix contains, if there is none.
func Behind(prefix netip.Prefix) netip.Addr {
	if !prefix.IsValid() {
		return netip.Addr{}
	}
	b := prefix.Addr().AsSlice()
	for i := prefix.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}
