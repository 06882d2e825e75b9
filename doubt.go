package overlay

import (
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// beliefs are what a device takes for true of the kernel since it last looked: that Config is in force there. What the kernel
// announces either fits them or raises a doubt, and a doubt leads to a look (design.md law 1).
type beliefs struct {
	config Config
	link   int
	routed func(netip.Prefix) bool // whether a route or network of Config has this very prefix
}

// doubtAddr says whether the beliefs may not hold any more after an address of the device was added or removed. The kernel adds
// again, in its announcements, an address that it has made local.
func (b beliefs) doubtAddr(a kernel.Addr, added bool) bool {
	if !added {
		return true // with it may have gone others, and routes
	}
	if isKernelsLinkLocal(a) {
		return !b.config.LinkLocal
	}
	if a.Protocol != b.config.protocol() {
		return b.config.TakeAddresses
	}
	return !slices.Contains(b.config.Networks, a.Prefix) || a.Peer.IsValid()
}

// doubtRoute says whether the beliefs may not hold any more after a route was added or removed, of whatever kind, by others.
// A route of another interface, or of none, may stand before ours, or have taken its place (kernel.md A9, V12); when it goes,
// ours answers again.
func (b beliefs) doubtRoute(r kernel.Route) bool {
	if r.Table == kernel.TableLocal {
		return false
	}
	if r.Link == b.link && r.Protocol == b.config.protocol() {
		return true
	}
	return b.routed(r.Prefix)
}

// linkEvents names what differs between two looks at a link.
func linkEvents(was, is kernel.Link) []EventKind {
	var kinds []EventKind
	if was.Name != is.Name || was.MTU != is.MTU {
		kinds = append(kinds, EventChanged)
	}
	switch {
	case is.Up && !was.Up:
		kinds = append(kinds, EventUp)
	case was.Up && !is.Up:
		kinds = append(kinds, EventDown)
	}
	return kinds
}

// sameSettings says whether two looks at a link agree in all that a Config asks of it.
func sameSettings(was, is *kernel.Link) bool {
	if was.MTU != is.MTU || was.TxQueueLen != is.TxQueueLen || was.Up != is.Up {
		return false
	}
	return equalOrNil(was.IPv4, is.IPv4) && equalOrNil(was.IPv6, is.IPv6)
}

func equalOrNil[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// revives says whether the link came up, or its IPv6 back: then what went with them is missing, and until it is there packets
// for the overlay take another way, and others' advertisements are heard (kernel.md V27, V9).
func revives(was, is *kernel.Link) bool {
	return is.Up && (!was.Up || was.MTU < minIPv6MTU && is.MTU >= minIPv6MTU || was.IPv6 == nil && is.IPv6 != nil)
}

// suspects are prefixes of ours for which another interface may answer: few, or all.
type suspects struct {
	prefixes map[netip.Prefix]bool
	all      bool
}

func (s *suspects) add(prefix netip.Prefix) {
	const few = 1000
	if len(s.prefixes) == few {
		s.addAll()
	}
	if s.all {
		return
	}
	if s.prefixes == nil {
		s.prefixes = make(map[netip.Prefix]bool)
	}
	s.prefixes[prefix] = true
}

func (s *suspects) addAll() { s.prefixes, s.all = nil, true }
