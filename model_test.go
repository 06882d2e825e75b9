package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"example.com/overlay/internal/kernel"
)

// model is a kernel with one device, as far as plan knows kernels: what a step does, and what it does beside that (kernel.md
// V3, V7, V9, V13, B6, B7).
type model struct {
	observed
	others []kernel.Route // through other devices: nothing of ours may touch them
}

const modelLink = 7

// What the model answers.
var (
	errModelHeld    = errors.New("it is so already")
	errModelRefused = errors.New("refused")
)

func newModel() *model {
	m := &model{}
	m.link = kernel.Link{Index: modelLink, Name: "tun0", MTU: 1500, TxQueueLen: 500}
	m.link.IPv4 = &kernel.IPv4{AcceptRedirects: 1, SendRedirects: 1, AcceptSourceRoute: 1}
	m.link.IPv6 = defaultIPv6()
	return m
}

func defaultIPv6() *kernel.IPv6 { return &kernel.IPv6{AcceptRA: 1, Autoconf: 1, AcceptRedirects: 1} }

// look is a copy, as a look at the kernel is.
func (m *model) look() *observed {
	o := &observed{link: m.link, addresses: slices.Clone(m.addresses), routes: slices.Clone(m.routes)}
	v4 := *m.link.IPv4
	o.link.IPv4 = &v4
	if m.link.IPv6 != nil {
		v6 := *m.link.IPv6
		o.link.IPv6 = &v6
	}
	return o
}

func (m *model) clone() *model { return &model{observed: *m.look(), others: slices.Clone(m.others)} }

// String lists everything that matters. Of IPv4 addresses the order does; that of routes of one key nobody can put back: what
// stands before an equal route of another device is not for us to see.
func (m *model) String() string {
	var lines []string
	lines = append(lines, fmt.Sprintf("mtu %d qlen %d up %v ipv4 %+v ipv6 %+v", m.link.MTU, m.link.TxQueueLen, m.link.Up, *m.link.IPv4, m.link.IPv6))
	var rest []string
	for _, a := range m.addresses {
		line := fmt.Sprintf("address %v peer %v proto %d noprefixroute %v secondary %v", a.Prefix, a.Peer, a.Protocol, a.NoPrefixRoute, a.Secondary)
		if a.Prefix.Addr().Is6() || a.Peer.IsValid() { // that stays where it is put
			rest = append(rest, line)
		} else {
			lines = append(lines, line)
		}
	}
	slices.Sort(rest)
	lines = append(lines, rest...)
	var routes []string
	for _, r := range slices.Concat(m.routes, m.others) {
		if r.Prefix.Addr().Is6() && r.Protocol != planProtocol {
			r.MTU = 0 // the kernel changes it with the device's, and we leave a stranger's route alone
		}
		routes = append(routes, fmt.Sprintf("route %v src %v mss %d link %d", routeText(r), r.Source, r.MSS, r.Link))
	}
	slices.Sort(routes)
	lines = append(lines, routes...)
	return strings.Join(lines, "\n")
}

// do carries out a step.
func (m *model) do(s step) error {
	switch s.kind {
	case stepMTU:
		m.setMTU(s.to)
	case stepTxQueueLen:
		m.link.TxQueueLen = s.to
	case stepSetting:
		return m.set(s)
	case stepAddAddr:
		return m.addAddr(s.addr)
	case stepDelAddr:
		return m.delAddr(s.addr)
	case stepUp:
		m.setUp(s.to == 1)
	case stepAddRoute:
		return m.addRoute(s.route)
	case stepDelRoute:
		return m.delRoute(s)
	}
	return nil
}

// setMTU also goes into IPv6 routes (rt6_mtu_change_route), and takes and brings back IPv6.
func (m *model) setMTU(mtu int) {
	old := m.link.MTU
	m.link.MTU = mtu
	switch {
	case mtu < minIPv6MTU:
		m.link.IPv6 = nil
		m.drop6()
	case m.link.IPv6 == nil:
		m.link.IPv6 = defaultIPv6()
		m.makeLinkLocal()
	default:
		for i, r := range m.routes {
			if is := int(r.MTU); r.Prefix.Addr().Is6() && is != 0 && (is >= mtu || is == old) {
				m.routes[i].MTU = routeMTULimit(mtu)
			}
		}
	}
}

func (m *model) drop6() {
	m.addresses = slices.DeleteFunc(m.addresses, func(a kernel.Addr) bool { return a.Prefix.Addr().Is6() })
	m.routes = slices.DeleteFunc(m.routes, func(r kernel.Route) bool { return r.Prefix.Addr().Is6() })
}

var modelLinkLocal = kernel.Addr{Prefix: netip.MustParsePrefix("fe80::1/64"), Protocol: kernel.AddrProtoKernelLink, NoPrefixRoute: true}

func (m *model) makeLinkLocal() {
	if m.link.Up && m.link.IPv6 != nil && m.link.IPv6.AddrGenMode != kernel.AddrGenNone {
		_ = m.addAddr(modelLinkLocal)
	}
}

func (m *model) set(s step) error {
	for _, h := range hardened {
		if h.name == s.setting {
			is := h.of(&m.link)
			if is == nil {
				return errModelRefused
			}
			*is = s.to
		}
	}
	if s.now {
		m.makeLinkLocal()
	}
	return nil
}

func (m *model) setUp(up bool) {
	if up == m.link.Up {
		return
	}
	m.link.Up = up
	if !up {
		m.routes = nil
		m.drop6()
		return
	}
	for _, a := range m.addresses {
		m.prefixRoute(a)
	}
	m.makeLinkLocal()
}

// prefixRoute is what the kernel makes of an address unless told not to.
func (m *model) prefixRoute(a kernel.Addr) {
	if a.NoPrefixRoute || a.Secondary || !m.link.Up || a.Prefix.IsSingleIP() {
		return
	}
	r := kernel.Route{RouteKey: connectedKey(networkOf(a)), Protocol: kernel.ProtoKernel, Link: modelLink, Plain: true}
	if a.Prefix.Addr().Is4() {
		r.Source = a.Prefix.Addr()
	}
	_ = m.addRoute(r)
}

func (m *model) addAddr(a kernel.Addr) error {
	a.Secondary = false
	if a.Prefix.Addr().Is6() {
		switch {
		case m.link.IPv6 == nil:
			return errModelRefused
		case slices.ContainsFunc(m.addresses, func(h kernel.Addr) bool { return h.Prefix.Addr() == a.Prefix.Addr() }):
			return errModelHeld
		}
		m.addresses = append(m.addresses, a)
		m.prefixRoute(a)
		return nil
	}
	last := 0 // after the last primary
	for i, h := range m.addresses {
		if h.Prefix.Addr().Is4() && !h.Secondary {
			last = i + 1
		}
		if h.Prefix.Addr().Is4() && networkOf(h) == networkOf(a) {
			if h.Prefix.Addr() == a.Prefix.Addr() {
				return errModelHeld
			}
			a.Secondary = true
		}
	}
	if a.Secondary {
		last = len(m.addresses)
	}
	m.addresses = slices.Insert(m.addresses, last, a)
	m.prefixRoute(a)
	return nil
}

func (m *model) delAddr(a kernel.Addr) error {
	i := slices.IndexFunc(m.addresses, a.Same)
	if i < 0 {
		return errModelHeld
	}
	a = m.addresses[i]
	m.addresses = slices.Delete(m.addresses, i, i+1)
	shared := a.Prefix.Addr().Is6() && slices.ContainsFunc(m.addresses, func(h kernel.Addr) bool { return networkOf(h) == networkOf(a) })
	if !a.Secondary && !a.NoPrefixRoute && !shared {
		r := kernel.Route{RouteKey: connectedKey(networkOf(a)), Protocol: kernel.ProtoKernel, Link: modelLink}
		if a.Prefix.Addr().Is4() {
			r.Source = a.Prefix.Addr()
		}
		_ = m.delRoute(step{route: r, exact: true})
	}
	if a.Prefix.Addr().Is6() {
		return nil
	}
	gone := []kernel.Addr{a}
	if !a.Secondary {
		gone = append(gone, m.orphans(a)...)
	}
	for _, g := range gone {
		m.sourceGone(g.Prefix.Addr())
	}
	if !slices.ContainsFunc(m.addresses, func(h kernel.Addr) bool { return h.Prefix.Addr().Is4() }) {
		m.routes = slices.DeleteFunc(m.routes, func(r kernel.Route) bool { return r.Prefix.Addr().Is4() })
	}
	return nil
}

// orphans promotes one of those whose primary went, or removes them all and returns them. With the old primary the local routes of
// the others go for an instant; that is when routes that name them as source go, unless a companion keeps them.
func (m *model) orphans(a kernel.Addr) (gone []kernel.Addr) {
	orphan := func(h kernel.Addr) bool { return h.Secondary && networkOf(h) == networkOf(a) }
	i := slices.IndexFunc(m.addresses, orphan)
	switch {
	case i < 0:
		return nil
	case m.link.IPv4.PromoteSecondaries == 0:
		for _, h := range m.addresses {
			if orphan(h) {
				gone = append(gone, h)
			}
		}
		m.addresses = slices.DeleteFunc(m.addresses, orphan)
		return gone
	}
	p := m.addresses[i]
	m.addresses = slices.Delete(m.addresses, i, i+1)
	p.Secondary = false
	last := 0
	for j, h := range m.addresses {
		if h.Prefix.Addr().Is4() && !h.Secondary {
			last = j + 1
		}
	}
	m.addresses = slices.Insert(m.addresses, last, p)
	m.prefixRoute(p)
	return nil
}

func (m *model) sourceGone(addr netip.Addr) {
	if slices.ContainsFunc(m.addresses, func(h kernel.Addr) bool { return h.Prefix.Addr() == addr }) {
		return
	}
	named := func(r kernel.Route) bool { return r.Source == addr }
	m.routes = slices.DeleteFunc(m.routes, named)
	m.others = slices.DeleteFunc(m.others, named)
}

func (m *model) addRoute(r kernel.Route) error {
	same := func(h kernel.Route) bool { h.Message, r.Message = "", ""; return h == r }
	local := func(h kernel.Addr) bool { return h.Prefix.Addr() == r.Source }
	switch {
	case !m.link.Up, r.Source.Is4() && !slices.ContainsFunc(m.addresses, local), r.Prefix.Addr().Is6() && m.link.IPv6 == nil:
		return errModelRefused
	case slices.ContainsFunc(m.routes, same),
		r.Prefix.Addr().Is6() && slices.ContainsFunc(m.routes, func(h kernel.Route) bool { return h.RouteKey == r.RouteKey }):
		return errModelHeld
	}
	m.routes = append(m.routes, r)
	return nil
}

func (m *model) delRoute(s step) error {
	best := -1
	for i, h := range m.routes {
		r := s.route
		if h.Prefix != r.Prefix || h.Table != r.Table || h.Protocol != r.Protocol || h.TOS != r.TOS || r.Metric != 0 && h.Metric != r.Metric {
			continue
		}
		if s.exact && (h.MTU != r.MTU || h.MSS != r.MSS || r.Source.IsValid() && h.Source != r.Source) {
			continue
		}
		if best < 0 || h.Metric < m.routes[best].Metric {
			best = i
		}
	}
	if best < 0 {
		return errModelHeld
	}
	m.routes = slices.Delete(m.routes, best, best+1)
	return nil
}
