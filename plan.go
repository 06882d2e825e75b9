package overlay

import (
	"fmt"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"github.com/gaissmai/bart"
)

// observed is what the kernel holds for the device.
type observed struct {
	link      kernel.Link
	addresses []kernel.Addr
	routes    []kernel.Route // unicast, through the device, of whoever, in the kernel's order
}

// stepKind says what a step does.
type stepKind uint8

const (
	stepMTU stepKind = iota + 1
	stepTxQueueLen
	stepSetting // a per-device setting by name
	stepAddAddr
	stepDelAddr
	stepUp // 1: up, 0: down
	stepAddRoute
	stepDelRoute
)

// step is one change to the kernel's state; it knows its way back.
type step struct {
	kind     stepKind
	setting  setting
	to, from int
	addr     kernel.Addr
	route    kernel.Route
	optional bool // its failure is an EventDegraded
}

// setting is a per-device setting by the path of its sysctl: family/name.
type setting string

// The settings of law 11. Those of IPv4 and the address generation mode can be set by netlink, the others only through procfs.
const (
	settingIPv4Redirects   setting = "ipv4/accept_redirects"
	settingIPv4Sends       setting = "ipv4/send_redirects"
	settingIPv4SourceRoute setting = "ipv4/accept_source_route"
	settingIPv4Promote     setting = "ipv4/promote_secondaries"
	settingIPv6AddrGen     setting = "ipv6/addr_gen_mode"
	settingIPv6RA          setting = "ipv6/accept_ra"
	settingIPv6Autoconf    setting = "ipv6/autoconf"
	settingIPv6Redirects   setting = "ipv6/accept_redirects"
	settingIPv6SourceRoute setting = "ipv6/accept_source_route"
)

// inverse is the step that takes s back.
func (s step) inverse() step {
	s.to, s.from = s.from, s.to
	switch s.kind {
	case stepAddAddr:
		s.kind = stepDelAddr
	case stepDelAddr:
		s.kind = stepAddAddr
	case stepAddRoute:
		s.kind = stepDelRoute
	case stepDelRoute:
		s.kind = stepAddRoute
	}
	return s
}

// String names the step as an error or a list of differences shows it.
func (s step) String() string {
	switch s.kind {
	case stepMTU:
		return fmt.Sprintf("set MTU %d", s.to)
	case stepTxQueueLen:
		return fmt.Sprintf("set queue length %d", s.to)
	case stepSetting:
		return fmt.Sprintf("set %s=%d", s.setting, s.to)
	case stepAddAddr:
		return fmt.Sprintf("add address %v", s.addr.Prefix)
	case stepDelAddr:
		return fmt.Sprintf("remove address %v", s.addr.Prefix)
	case stepUp:
		if s.to == 0 {
			return "take the link down"
		}
		return "take the link up"
	case stepAddRoute:
		return "add route " + routeText(s.route)
	case stepDelRoute:
		return "remove route " + routeText(s.route)
	}
	return "do nothing"
}

func routeText(r kernel.Route) string {
	return fmt.Sprintf("%v metric %d table %d mtu %d proto %d", r.Prefix, r.Metric, r.Table, r.MTU, r.Protocol)
}

// plan returns the steps from have to want, in the order in which the kernel takes them without harm: link settings,
// hardening before any address, the link up before routes, and old addresses last: with them go the IPv4 routes that name them
// as source, so ours name the new ones by then (kernel.md V7). Nothing that holds is written.
func plan(have *observed, want *desired) []step {
	var steps []step
	if have.link.MTU != want.mtu {
		steps = append(steps, step{kind: stepMTU, to: want.mtu, from: have.link.MTU})
		if have.link.IPv6 == nil && want.mtu >= minIPv6MTU {
			// The kernel gives the device its IPv6 settings back, with their defaults: look again before going on (kernel.md V9).
			return steps
		}
	}
	if have.link.TxQueueLen != want.txQueueLen {
		steps = append(steps, step{kind: stepTxQueueLen, to: want.txQueueLen, from: have.link.TxQueueLen, optional: true})
	}
	steps = append(steps, planHardening(&have.link, want.linkLocal)...)
	add, remove := planAddresses(have.addresses, want)
	steps = append(steps, add...)
	if !have.link.Up {
		steps = append(steps, step{kind: stepUp, to: 1})
	}
	steps = append(steps, planRoutes(have, want)...)
	return append(steps, remove...)
}

// planHardening makes the device deaf to redirects, router advertisements and source routes, and lets an IPv4 primary
// address go without its secondaries (kernel.md V7, V8, V9).
func planHardening(link *kernel.Link, linkLocal bool) []step {
	var steps []step
	set := func(name setting, is, wanted int) {
		if is != wanted {
			steps = append(steps, step{kind: stepSetting, setting: name, to: wanted, from: is, optional: true})
		}
	}
	if v4 := link.IPv4; v4 != nil {
		set(settingIPv4Redirects, v4.AcceptRedirects, 0)
		set(settingIPv4Sends, v4.SendRedirects, 0)
		set(settingIPv4SourceRoute, v4.AcceptSourceRoute, 0)
		set(settingIPv4Promote, v4.PromoteSecondaries, 1)
	}
	if v6 := link.IPv6; v6 != nil {
		switch {
		case !linkLocal:
			set(settingIPv6AddrGen, v6.AddrGenMode, kernel.AddrGenNone)
		case v6.AddrGenMode == kernel.AddrGenNone:
			set(settingIPv6AddrGen, v6.AddrGenMode, kernel.AddrGenEUI64)
		}
		set(settingIPv6RA, v6.AcceptRA, 0)
		set(settingIPv6Autoconf, v6.Autoconf, 0)
		set(settingIPv6Redirects, v6.AcceptRedirects, 0)
		set(settingIPv6SourceRoute, v6.AcceptSourceRoute, 0)
	}
	return steps
}

// planAddresses adds what is missing, and removes what is ours and stale, the kernel's link-local address unless wanted, and,
// with TakeAddresses, all else. An IPv6 address that only changes its length must go first (V7).
func planAddresses(have []kernel.Addr, want *desired) (add, remove []step) {
	holds := make(map[netip.Prefix]bool, len(have))
	for _, a := range have {
		holds[a.Prefix] = true
	}
	wanted := make(map[netip.Prefix]bool, len(want.addresses))
	for _, a := range want.addresses {
		wanted[a.Prefix] = true
	}
	stale := make(map[netip.Addr]step)
	for _, a := range have {
		if wanted[a.Prefix] || !removable(a, want) {
			continue
		}
		s := step{kind: stepDelAddr, addr: a}
		if a.Prefix.Addr().Is6() {
			stale[a.Prefix.Addr()] = s
			continue
		}
		remove = append(remove, s)
	}
	for _, a := range want.addresses {
		if holds[a.Prefix] {
			continue
		}
		if s, ok := stale[a.Prefix.Addr()]; ok {
			add = append(add, s)
			delete(stale, a.Prefix.Addr())
		}
		add = append(add, step{kind: stepAddAddr, addr: a})
	}
	for _, a := range have { // in the kernel's order, not the map's
		if s, ok := stale[a.Prefix.Addr()]; ok && s.addr == a {
			remove = append(remove, s)
		}
	}
	return add, remove
}

// removable says whether an address that is not wanted may go.
func removable(a kernel.Addr, want *desired) bool {
	switch {
	case a.Protocol == want.protocol:
		return true
	case a.Prefix.Addr().Is6() && a.Prefix.Addr().IsLinkLocalUnicast() && a.Protocol == kernel.AddrProtoKernelLink:
		return !want.linkLocal
	}
	return want.takeAddresses
}

// planRoutes adds what is missing, exchanges what differs, and removes what is ours and stale.
func planRoutes(have *observed, want *desired) []step {
	held := make(map[kernel.RouteKey][]kernel.Route, len(have.routes))
	for _, r := range have.routes {
		held[r.RouteKey] = append(held[r.RouteKey], r)
	}
	var steps, stale []step
	wanted := make(map[kernel.RouteKey]bool, len(want.routes))
	for _, r := range want.routes {
		wanted[r.RouteKey] = true
		steps = append(steps, planRoute(held, have.link.MTU, r, want)...)
	}
	for _, r := range have.routes {
		if r.Protocol == want.protocol && !wanted[r.RouteKey] {
			stale = append(stale, step{kind: stepDelRoute, route: r})
		}
	}
	return append(steps, stale...)
}

// planRoute brings one key in order. Ours and, for a network of ours, the kernel's own prefix route count; a stranger's with the
// same key stays, and ours goes behind it.
func planRoute(held map[kernel.RouteKey][]kernel.Route, deviceMTU int, r kernel.Route, want *desired) []step {
	var ours, kernels []kernel.Route
	good := false // some route does what r shall do
	for _, h := range held[r.RouteKey] {
		same := sameRoute(h, r, deviceMTU, want)
		switch {
		case h.Protocol == want.protocol:
			good = good || same
			ours = append(ours, h)
		case h.Protocol == kernel.ProtoKernel && isConnected(r.RouteKey, want):
			if same {
				good = true
				continue
			}
			kernels = append(kernels, h)
		}
	}
	switch {
	case good && len(ours) <= 1:
		return deletions(kernels)
	case len(ours)+len(kernels) == 0, r.Prefix.Addr().Is4() && len(ours) <= 1:
		// Appended, then the old one from the front: the prefix is never without a route.
		return append([]step{{kind: stepAddRoute, route: r}}, deletions(append(ours, kernels...))...)
	}
	// IPv6 cannot hold a second route of the same device and metric (kernel.md V3), and of several alike in IPv4 none can be
	// named alone: so one stands in at a metric that nobody uses.
	spare := r
	for spare.Metric++; held[spare.RouteKey] != nil; spare.Metric++ {
	}
	steps := append([]step{{kind: stepAddRoute, route: spare}}, deletions(append(ours, kernels...))...)
	return append(steps, step{kind: stepAddRoute, route: r}, step{kind: stepDelRoute, route: spare})
}

func deletions(routes []kernel.Route) []step {
	var steps []step
	for _, r := range routes {
		steps = append(steps, step{kind: stepDelRoute, route: r})
	}
	return steps
}

func isConnected(key kernel.RouteKey, want *desired) bool {
	return slices.ContainsFunc(want.addresses, func(a kernel.Addr) bool { return connectedKey(a.Prefix) == key })
}

// sameRoute says whether have does what want asks. The kernel's own prefix route does where the device's MTU is the one
// wanted: then its MSS is right too, and a device that an administrator prepared needs no change (kernel.md U25, V11).
func sameRoute(have, want kernel.Route, deviceMTU int, d *desired) bool {
	if have.Protocol == kernel.ProtoKernel && d.protocol != kernel.ProtoKernel {
		return have.Plain && have.MTU == 0 && have.MSS == 0 && uint32(deviceMTU) == want.MTU
	}
	return have.Plain && have.MTU == want.MTU && have.MSS == want.MSS && have.Source == want.Source
}

// probes finds for each of the prefixes that d installs an address by which to ask who answers for it.
type probes struct {
	own  map[netip.Addr]bool
	tree bart.Lite // what d installs
}

func (d *desired) probes() *probes {
	p := &probes{own: make(map[netip.Addr]bool, len(d.addresses))}
	for _, a := range d.addresses {
		p.own[a.Prefix.Addr()] = true
	}
	for _, r := range d.routes {
		p.tree.Insert(r.Prefix)
	}
	return p
}

// of returns an address inside prefix that no longer prefix of ours covers; false if the first few are all covered.
func (p *probes) of(prefix netip.Prefix) (netip.Addr, bool) {
	const tries = 16
	addr := prefix.Addr()
	if !prefix.IsSingleIP() {
		addr = addr.Next() // the first may be a broadcast or anycast address
	}
	for try := 0; try < tries && prefix.Contains(addr); addr, try = addr.Next(), try+1 {
		longest, _ := p.tree.LookupPrefixLPM(netip.PrefixFrom(addr, addr.BitLen()))
		if longest == prefix && !p.own[addr] {
			return addr, true
		}
	}
	return netip.Addr{}, false
}
