package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"example.com/overlay/internal/kernel"
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
	now      bool // of addr_gen_mode: make the link-local address at once, not at the next link up
	exact    bool // of stepDelRoute: this one, not an older one of the same key
}

// inverse is the step that takes s back.
func (s step) inverse() step {
	s.to, s.from, s.now, s.exact = s.from, s.to, false, false
	switch s.kind {
	case stepAddAddr:
		s.kind = stepDelAddr
	case stepDelAddr:
		s.kind = stepAddAddr
	case stepAddRoute:
		s.kind, s.exact = stepDelRoute, s.route.Prefix.Addr().Is4() && s.route.Message == ""
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

// plan returns the steps from have to want, in the order in which the kernel takes them without harm: hardening before any
// address, the link up before routes, and old addresses late: with them go the IPv4 routes that name them as source, so ours
// name the new ones by then (kernel.md V7). The device's MTU is the first to grow and the last to shrink: no route ever promises
// more than it carries, and what goes when it falls below 1280 has been taken back one by one. Nothing that holds is written.
func plan(have *observed, want *desired) []step {
	var steps []step
	mtu := step{kind: stepMTU, to: want.mtu, from: have.link.MTU}
	if mtu.from < mtu.to {
		steps = append(steps, mtu)
		if mtu.from < minIPv6MTU && mtu.to >= minIPv6MTU {
			// The kernel gives the device its IPv6 settings back, with their defaults: look again before going on (kernel.md V9).
			return steps
		}
	}
	if have.link.TxQueueLen != want.txQueueLen {
		steps = append(steps, step{kind: stepTxQueueLen, to: want.txQueueLen, from: have.link.TxQueueLen, optional: true})
	}
	come, gone, promotes := planAddresses(have.addresses, want)
	steps = append(steps, planHardening(&have.link, want, promotes)...)
	steps = append(steps, come...)
	if !have.link.Up {
		steps = append(steps, step{kind: stepUp, to: 1})
	}
	steps = append(steps, planRoutes(have, want, nil)...)
	steps = append(steps, gone...)
	if mtu.from > mtu.to {
		steps = append(steps, mtu)
	}
	return steps
}

// planAddresses adds what is missing, and removes what is ours and stale, the kernel's link-local address unless wanted, and,
// with TakeAddresses, all else. promotes: a primary address goes and leaves others of its network behind.
func planAddresses(have []kernel.Addr, want *desired) (come, gone []step, promotes bool) {
	var stale, stay []kernel.Addr
	for _, a := range have {
		if !want.names(a) && removable(a, want) {
			stale = append(stale, a)
		} else {
			stay = append(stay, a)
		}
	}
	for _, a := range want.addresses {
		if slices.ContainsFunc(stay, a.Same) {
			continue
		}
		if i := slices.IndexFunc(stale, func(h kernel.Addr) bool { return excludes(h, a) }); i >= 0 {
			come = append(come, step{kind: stepDelAddr, addr: stale[i]})
			stale = slices.Delete(stale, i, i+1)
		}
		come = append(come, step{kind: stepAddAddr, addr: a})
		stay = append(stay, a)
	}
	gone, promotes = planRemovals(stale, stay, want.protocol)
	return come, gone, promotes
}

// names says whether a is among the wanted addresses.
func (d *desired) names(a kernel.Addr) bool {
	return slices.ContainsFunc(d.addresses, a.Same)
}

// excludes says whether the kernel refuses a as long as it has the other address h: an IPv6 address cannot be held with two
// lengths (kernel.md V7), and an IPv4 address not twice in one network.
func excludes(h, a kernel.Addr) bool {
	if h.Prefix.Addr() != a.Prefix.Addr() || h.Same(a) {
		return false
	}
	return a.Prefix.Addr().Is6() || networkOf(h) == networkOf(a)
}

// networkOf is what the kernel compares to find an address's primary.
func networkOf(a kernel.Addr) netip.Prefix {
	if a.Peer.IsValid() {
		return netip.PrefixFrom(a.Peer, a.Prefix.Bits()).Masked()
	}
	return a.Prefix.Masked()
}

// removable says whether an address that is not wanted may go.
func removable(a kernel.Addr, want *desired) bool {
	linkLocal := a.Prefix.Addr().Is6() && a.Prefix.Addr().IsLinkLocalUnicast()
	switch {
	case a.Protocol == want.protocol:
		return true
	case a.Protocol == 0 && want.added[a.Prefix]:
		return true // by a kernel before 5.18, which keeps no protocol
	case linkLocal && want.linkLocal:
		return false
	case isKernelsLinkLocal(a):
		return true
	}
	return want.takeAddresses
}

// isKernelsLinkLocal says whether the kernel made a. To remove it is a part of hardening.
func isKernelsLinkLocal(a kernel.Addr) bool { return a.Protocol == kernel.AddrProtoKernelLink }

// planRemovals removes addresses. When an IPv4 primary goes the kernel moves what stays of its network to a new primary, and
// for an instant none of it is local; the same addresses with another length bridge that (kernel.md V7).
func planRemovals(stale, stay []kernel.Addr, protocol uint8) (steps []step, promotes bool) {
	slices.SortStableFunc(stale, func(a, b kernel.Addr) int { // secondaries first: no use in promoting what is to go
		return compareBool(b.Secondary, a.Secondary)
	})
	var bridge, out, end []step
	for _, a := range stale {
		out = append(out, step{kind: stepDelAddr, addr: a, optional: isKernelsLinkLocal(a)})
		for _, c := range companionsOf(a, stay, protocol) {
			bridge = append(bridge, step{kind: stepAddAddr, addr: c})
			end = append(end, step{kind: stepDelAddr, addr: c})
		}
	}
	return slices.Concat(bridge, out, end), len(bridge) > 0
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// companionsOf returns a companion for each address that loses its primary when a goes.
func companionsOf(a kernel.Addr, stay []kernel.Addr, protocol uint8) []kernel.Addr {
	if a.Secondary || a.Prefix.Addr().Is6() {
		return nil
	}
	var companions []kernel.Addr
	for _, s := range stay {
		c := companion(s, protocol)
		if networkOf(s) == networkOf(a) && !slices.ContainsFunc(stay, c.Same) {
			companions = append(companions, c)
		}
	}
	return companions
}

// companion is the same address with another length.
func companion(a kernel.Addr, protocol uint8) kernel.Addr {
	bits := 32
	if a.Prefix.Bits() == bits {
		bits = 31
	}
	return kernel.Addr{Prefix: netip.PrefixFrom(a.Prefix.Addr(), bits), Protocol: protocol, NoPrefixRoute: true}
}

// planRoutes adds what is missing, exchanges what differs, and removes what is ours and stale. others, if not nil, says which
// keys are in use beside those of have and want.
func planRoutes(have *observed, want *desired, others func(kernel.RouteKey) bool) []step {
	held := make(map[kernel.RouteKey][]kernel.Route, len(have.routes))
	for _, r := range have.routes {
		held[r.RouteKey] = append(held[r.RouteKey], r)
	}
	if len(held) == 0 {
		return (&exchange{in: want.routes}).steps() // as they are: there may be a hundred thousand
	}
	wanted := make(map[kernel.RouteKey]bool, len(want.routes))
	for _, r := range want.routes {
		wanted[r.RouteKey] = true
	}
	spares := make(map[kernel.RouteKey]bool)
	taken := func(k kernel.RouteKey) bool {
		return wanted[k] || held[k] != nil || spares[k] || others != nil && others(k)
	}
	x := exchange{
		addresses: have.addresses, spares: spares,
		in: make([]kernel.Route, 0, max(len(want.routes)-len(have.routes), 0)),
	}
	for _, r := range want.routes {
		x.plan(held[r.RouteKey], r, want, taken)
	}
	for _, r := range have.routes {
		if r.Protocol == want.protocol && !wanted[r.RouteKey] {
			x.out = append(x.out, r)
		}
	}
	return x.steps()
}

// exchange collects routes that come, those that go then, those that come in their place, and those that stood in for them.
type exchange struct {
	in, out, then, end []kernel.Route
	addresses          []kernel.Addr            // that the device has
	spares             map[kernel.RouteKey]bool // keys of those that stand in
}

func (x *exchange) steps() []step {
	steps := make([]step, 0, len(x.in)+len(x.out)+len(x.then)+len(x.end))
	list := func(kind stepKind, routes []kernel.Route) {
		for _, r := range routes {
			steps = append(steps, step{kind: kind, route: r})
		}
	}
	list(stepAddRoute, x.in)
	list(stepDelRoute, x.out)
	list(stepAddRoute, x.then)
	list(stepDelRoute, x.end)
	return steps
}

// plan brings one key in order. Whoever's route comes first there and does what r shall do, does. Else ours takes its
// place, before the kernel's prefix route for an address of ours and behind a stranger's, which stays (kernel.md V11, V12).
func (x *exchange) plan(held []kernel.Route, r kernel.Route, want *desired, taken func(kernel.RouteKey) bool) {
	var ours, kernels []kernel.Route
	right := len(held) > 0 && want.does(held[0], r) // the first is the one that the kernel uses
	for _, h := range held {
		switch {
		case h.Protocol == want.protocol:
			ours = append(ours, h)
		case h.Protocol == kernel.ProtoKernel && want.caused(h, x.addresses):
			kernels = append(kernels, h)
		}
	}
	old := slices.Concat(ours, kernels)
	switch {
	case len(ours) == 1 && want.does(ours[0], r):
		if !right {
			x.out = append(x.out, kernels...)
		}
	case right && held[0].Protocol != want.protocol:
		x.out = append(x.out, ours...)
	case len(old) == 0 && len(held) > 0 && r.Prefix.Addr().Is6():
		// A stranger's: IPv6 has no room for ours beside it (kernel.md V3).
	case len(old) == 0, r.Prefix.Addr().Is4() && len(ours) <= 1:
		// Behind the old one, which then goes from the front: the prefix is never without a route.
		x.in, x.out = append(x.in, r), append(x.out, old...)
	default:
		// IPv6 cannot hold a second route of the same device and metric (kernel.md V3), and of several alike in IPv4 none can
		// be named alone: so one stands in at a metric that nobody uses.
		spare := r
		spare.RouteKey = spareKey(r.RouteKey, taken)
		x.spares[spare.RouteKey] = true
		x.in, x.out = append(x.in, spare), append(x.out, old...)
		x.then, x.end = append(x.then, r), append(x.end, spare)
	}
}

// spareKey finds a free metric, a lower one if there is: then nobody else's route comes between.
func spareKey(key kernel.RouteKey, taken func(kernel.RouteKey) bool) kernel.RouteKey {
	spare := key
	for spare.Metric > 1 {
		if spare.Metric--; !taken(spare) {
			return spare
		}
	}
	for spare = key; taken(spare); spare.Metric++ {
	}
	return spare
}

// caused says whether h, of the kernel, is the prefix route of an address of ours, and of nobody else's: his would not answer any
// more once ours in its place is gone. In IPv4 the source tells; in IPv6 all addresses of a network share one route.
func (d *desired) caused(h kernel.Route, addresses []kernel.Addr) bool {
	ours := slices.ContainsFunc(d.addresses, func(a kernel.Addr) bool {
		return connectedKey(a.Prefix) == h.RouteKey && (a.Prefix.Addr() == h.Source || a.Prefix.Addr().Is6())
	})
	return ours && (h.Prefix.Addr().Is4() || !slices.ContainsFunc(addresses, func(a kernel.Addr) bool {
		return connectedKey(networkOf(a)) == h.RouteKey && !a.NoPrefixRoute && !d.names(a) && !removable(a, d)
	}))
}

// does says whether have does what want asks. Another's, such as the kernel's own prefix route, does without our attributes
// where the device's MTU says the same: a device that an administrator prepared needs no change (kernel.md U25, V11).
func (d *desired) does(have, want kernel.Route) bool {
	if have.Protocol == d.protocol {
		return have.Plain && have.MTU == want.MTU && have.MSS == want.MSS && have.Source == want.Source
	}
	mtu := have.MTU
	if mtu == 0 {
		mtu = routeMTULimit(d.mtu)
	}
	return have.Plain && mtu == want.MTU && (have.MSS == 0 || have.MSS == want.MSS) &&
		(have.Source == want.Source || !want.Source.IsValid())
}

// obstacle says why no steps lead from have to want without harm to what is others', or nil.
func obstacle(have *observed, want *desired) error {
	if want.ipv6 && have.link.IPv6 != nil && have.link.IPv6.Disabled {
		return fmt.Errorf("%w: net.ipv6.conf.%s.disable_ipv6 is set", ErrIPv6Disabled, have.link.Name)
	}
	losesIPv6 := want.mtu < minIPv6MTU && have.link.IPv6 != nil
	for _, a := range have.addresses {
		if want.names(a) || removable(a, want) {
			continue
		}
		if i := slices.IndexFunc(want.addresses, func(w kernel.Addr) bool { return excludes(a, w) }); i >= 0 {
			return fmt.Errorf("add address %v: another's %v is in the way: remove it, or set TakeAddresses", want.addresses[i].Prefix, a.Prefix)
		}
		if losesIPv6 && a.Prefix.Addr().Is6() && !isKernelsLinkLocal(a) {
			return fmt.Errorf("set MTU %d: another's %v would go: remove it, or set TakeAddresses", want.mtu, a.Prefix)
		}
	}
	for _, r := range have.routes {
		if losesIPv6 && r.Prefix.Addr().Is6() && r.Protocol != want.protocol && r.Protocol != kernel.ProtoKernel {
			return fmt.Errorf("set MTU %d: another's route %v would go: remove it first", want.mtu, r.Prefix)
		}
	}
	return nil
}

// harms says whether routes of others may go with a step: with an IPv4 address, or with IPv6 as a whole.
func harms(steps []step) bool {
	return slices.ContainsFunc(steps, func(s step) bool {
		return s.kind == stepDelAddr && s.addr.Prefix.Addr().Is4() || s.kind == stepMTU && min(s.from, s.to) < minIPv6MTU
	})
}

// restoredBy counts the objects that steps put back, without those that only stood in for others meanwhile.
func restoredBy(done []step) (n int) {
	routes, addresses := make(map[kernel.RouteKey]bool), make(map[netip.Prefix]bool)
	for _, s := range done {
		switch s.kind {
		case stepSetting:
			n++
		case stepAddRoute:
			routes[s.route.RouteKey] = true
		case stepDelRoute:
			delete(routes, s.route.RouteKey)
		case stepAddAddr:
			addresses[s.addr.Prefix] = true
		case stepDelAddr:
			delete(addresses, s.addr.Prefix)
		}
	}
	return n + len(routes) + len(addresses)
}

func differences(steps []step) string { return brief(steps, step.String) }

// brief lists the first few.
func brief[T any](list []T, text func(T) string) string {
	const most = 8
	var names []string
	for i, v := range list {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(list)-most))
			break
		}
		names = append(names, text(v))
	}
	return strings.Join(names, "; ")
}
