package overlay

import (
	"slices"

	"example.com/overlay/internal/kernel"
)

// restoring returns the next steps from now, the state after all of done was taken back, to before: what the kernel changed
// beside what it was asked to. With an MTU below 1280 went all of IPv6, with a link down the IPv6 addresses, with an address
// the IPv4 routes that named it as source, with the last all of them; a changed MTU went into IPv6 routes, and an address that was put back stands last.
// What others did meanwhile is left to them. Each kind of object waits for those that it depends on: look again, until there
// are no steps.
func restoring(now, before *observed, done []step, protocol uint8) []step {
	t := touched(done, before.addresses)
	steps := t.restoreLink(&now.link, &before.link)
	if len(steps) == 0 {
		steps = t.restoreAddresses(now.addresses, before.addresses, protocol)
	}
	if len(steps) == 0 {
		steps = t.restoreRoutes(now.routes, before.routes, protocol)
	}
	return steps
}

// trail tells what a list of steps had to do with.
type trail struct {
	mtu, queue, up bool
	settings       map[setting]bool
	removed        []kernel.Addr
	deleted        []kernel.Route
	lost6          bool // IPv6 addresses and settings may have gone with something else
	lost4          bool // IPv4 routes may have gone with the last IPv4 address
}

// touched is the trail of steps that were carried out, and perhaps taken back, where there had been addresses.
func touched(steps []step, addresses []kernel.Addr) *trail {
	t := &trail{settings: make(map[setting]bool)}
	moved4 := false
	for _, s := range steps {
		switch s.kind {
		case stepMTU:
			t.mtu = true
			t.lost6 = t.lost6 || min(s.from, s.to) < minIPv6MTU
		case stepTxQueueLen:
			t.queue = true
		case stepSetting:
			t.settings[s.setting] = true
		case stepUp:
			t.up, t.lost6 = true, true
		case stepAddAddr:
			moved4 = moved4 || s.addr.Prefix.Addr().Is4()
		case stepDelAddr:
			moved4 = moved4 || s.addr.Prefix.Addr().Is4()
			t.removed = append(t.removed, s.addr)
		case stepDelRoute:
			t.deleted = append(t.deleted, s.route)
		}
	}
	t.lost4 = moved4 && !slices.ContainsFunc(addresses, func(a kernel.Addr) bool {
		return a.Prefix.Addr().Is4() && !slices.ContainsFunc(t.removed, a.Same)
	})
	return t
}

func (t *trail) restoreLink(now, before *kernel.Link) []step {
	var steps []step
	put := func(touched bool, s step) {
		if touched && s.from != s.to {
			steps = append(steps, s)
		}
	}
	put(t.mtu, step{kind: stepMTU, from: now.MTU, to: before.MTU})
	put(t.queue, step{kind: stepTxQueueLen, from: now.TxQueueLen, to: before.TxQueueLen})
	for _, h := range hardened {
		is, was := h.of(now), h.of(before)
		if is != nil && was != nil {
			lost := t.lost6 && h.name.isIPv6()
			put(lost || t.settings[h.name], step{kind: stepSetting, setting: h.name, from: *is, to: *was})
		}
	}
	if now.Up != before.Up {
		put(t.up, step{kind: stepUp, from: bit(now.Up), to: bit(before.Up)})
	}
	return steps
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (t *trail) restoreAddresses(now, before []kernel.Addr, protocol uint8) []step {
	var steps []step
	for _, a := range now {
		ours := a.Protocol == protocol || isKernelsLinkLocal(a) && (t.lost6 || t.settings[settingIPv6AddrGen])
		if ours && !slices.ContainsFunc(before, a.Same) {
			steps = append(steps, step{kind: stepDelAddr, addr: a})
		}
	}
	var back []step
	for _, a := range before {
		ours := a.Protocol == protocol || slices.ContainsFunc(t.removed, a.Same) || t.lost6 && a.Prefix.Addr().Is6()
		switch {
		case !ours || slices.ContainsFunc(now, a.Same):
		case a.Prefix.Addr().Is6(): // the kernel puts a new one before the others, in IPv4 behind
			back = slices.Insert(back, 0, step{kind: stepAddAddr, addr: a})
		default:
			back = append(back, step{kind: stepAddAddr, addr: a})
		}
	}
	steps = append(steps, back...)
	if len(steps) == 0 && len(t.removed) > 0 {
		return reorder(now, before, protocol)
	}
	return steps
}

// unseen is restoring where now cannot be looked at: the steps are harmless where they are not needed. false: they may not be
// enough.
func unseen(before *observed, done []step, protocol uint8) (steps []step, enough bool) {
	t := touched(done, before.addresses)
	enough = !slices.ContainsFunc(done, func(s step) bool {
		switch {
		case s.kind == stepMTU && min(s.from, s.to) < minIPv6MTU:
			return before.link.IPv6 != nil // it comes back as new
		case s.kind == stepMTU: // it went into IPv6 routes that were larger, and raised again into some that were not
			return slices.ContainsFunc(before.routes, func(r kernel.Route) bool {
				return r.Prefix.Addr().Is6() && r.MTU != 0 && (s.from > s.to || int(r.MTU) > s.from)
			})
		case s.kind == stepDelAddr && !s.addr.NoPrefixRoute: // the kernel makes it a route that it may not have had
			return !slices.ContainsFunc(before.routes, func(r kernel.Route) bool {
				return r.Protocol == kernel.ProtoKernel && r.RouteKey == connectedKey(networkOf(s.addr))
			})
		}
		return s.now // the kernel made an address of its own choice
	})
	for _, a := range before.addresses {
		if t.lost6 && a.Prefix.Addr().Is6() {
			steps = slices.Insert(steps, 0, step{kind: stepAddAddr, addr: a})
		}
	}
	now := slices.DeleteFunc(slices.Clone(before.addresses), func(a kernel.Addr) bool { return slices.ContainsFunc(t.removed, a.Same) })
	for i := len(t.removed) - 1; i >= 0; i-- { // so they were put back
		if slices.ContainsFunc(before.addresses, t.removed[i].Same) {
			now = append(now, t.removed[i])
		}
	}
	steps = append(steps, reorder(now, before.addresses, protocol)...)
	for _, r := range before.routes {
		if t.addressGone(r) {
			steps = append(steps, step{kind: stepAddRoute, route: r})
		}
	}
	return steps, enough
}

// reorder makes the IPv4 addresses stand as before: the first of a network is its primary, and the first of all the source
// where nothing names one. A companion keeps each local meanwhile (kernel.md V7).
func reorder(now, before []kernel.Addr, protocol uint8) []step {
	common := func(list, other []kernel.Addr) []kernel.Addr {
		return slices.DeleteFunc(slices.Clone(list), func(a kernel.Addr) bool {
			// The network of a point-to-point address is another host: a companion might be in the way.
			return a.Prefix.Addr().Is6() || a.Peer.IsValid() || !slices.ContainsFunc(other, a.Same)
		})
	}
	is, was := common(now, before), common(before, now)
	first := 0
	for first < len(was) && is[first].Same(was[first]) {
		first++
	}
	was = was[first:]
	var bridge, out, in, end []step
	for _, a := range was {
		out = append(out, step{kind: stepDelAddr, addr: a})
		in = append(in, step{kind: stepAddAddr, addr: a})
		if c := companion(a, protocol); !slices.ContainsFunc(now, c.Same) {
			bridge = append(bridge, step{kind: stepAddAddr, addr: c})
			end = append(end, step{kind: stepDelAddr, addr: c})
		}
	}
	return slices.Concat(bridge, out, in, end)
}

func (t *trail) restoreRoutes(now, before []kernel.Route, protocol uint8) []step {
	is, was, deleted := routeSet(now), routeSet(before), routeSet(t.deleted)
	var add, remove []step
	for _, r := range now {
		ours := r.Protocol == protocol || r.Protocol == kernel.ProtoKernel && t.readded(r)
		if ours && !was[plainRoute(r)] {
			exact := r.Prefix.Addr().Is4() && r.Message == ""
			remove = append(remove, step{kind: stepDelRoute, route: r, exact: exact})
		}
	}
	for _, r := range before {
		ours := r.Protocol == protocol || deleted[plainRoute(r)] || t.addressGone(r)
		if ours && !is[plainRoute(r)] {
			add = append(add, step{kind: stepAddRoute, route: r})
		}
	}
	// IPv4 is never without a route; IPv6 has no room for both (kernel.md V3).
	isIPv6 := func(s step) bool { return s.route.Prefix.Addr().Is6() }
	slices.SortStableFunc(remove, func(a, b step) int { return compareBool(isIPv6(b), isIPv6(a)) })
	first := 0
	for first < len(remove) && isIPv6(remove[first]) {
		first++
	}
	return slices.Concat(remove[:first], add, remove[first:])
}

// readded says whether the kernel made r of an address that was put back.
func (t *trail) readded(r kernel.Route) bool {
	return slices.ContainsFunc(t.removed, func(a kernel.Addr) bool { return connectedKey(networkOf(a)) == r.RouteKey })
}

// addressGone says whether r, of IPv4, went with an address: the one that it names as source, or the device's last.
func (t *trail) addressGone(r kernel.Route) bool {
	if r.Prefix.Addr().Is6() {
		return false
	}
	return t.lost4 || slices.ContainsFunc(t.removed, func(a kernel.Addr) bool { return a.Prefix.Addr() == r.Source })
}

// routeSet holds routes without their messages, which tell of ages and use too.
func routeSet(routes []kernel.Route) map[kernel.Route]bool {
	set := make(map[kernel.Route]bool, len(routes))
	for _, r := range routes {
		set[plainRoute(r)] = true
	}
	return set
}

func plainRoute(r kernel.Route) kernel.Route {
	r.Message = ""
	return r
}

// lostRoutes lists strangers' IPv4 routes that went with an address of ours (kernel.md V7, A8).
func lostRoutes(before, now *observed, done []step, protocol uint8) []kernel.Route {
	t, is := touched(done, before.addresses), routeSet(now.routes)
	return slices.DeleteFunc(slices.Clone(before.routes), func(r kernel.Route) bool {
		return r.Protocol == protocol || r.Protocol == kernel.ProtoKernel || !t.addressGone(r) || is[plainRoute(r)]
	})
}
