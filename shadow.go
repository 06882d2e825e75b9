package overlay

import (
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// shadow is a prefix of ours for which somebody else answers.
type shadow struct {
	prefix netip.Prefix
	text   string
}

// overshadow returns what is in the shadow after a look at the routes for some prefixes found these, and which of them was not
// before.
func overshadow(before, found []shadow, looked map[netip.Prefix]bool) (all, news []shadow) {
	was, is := setOf(before), setOf(found)
	all = append(all, found...)
	for _, s := range before {
		if !looked[s.prefix] && !is[s] {
			all = append(all, s)
		}
	}
	for _, s := range found {
		if !was[s] {
			news = append(news, s)
		}
	}
	return all, news
}

// setOf is for many: who shadows us may do so a hundred thousand times.
func setOf(list []shadow) map[shadow]bool {
	set := make(map[shadow]bool, len(list))
	for _, s := range list {
		set[s] = true
	}
	return set
}

// asked are the routes of which the kernel can be asked who answers for them: other tables are consulted by rules only.
func asked(routes []kernel.Route) []kernel.Route {
	elsewhere := func(r kernel.Route) bool { return r.Table != kernel.TableMain }
	if !slices.ContainsFunc(routes, elsewhere) { // as they are: there may be a hundred thousand
		return routes
	}
	return slices.DeleteFunc(slices.Clone(routes), elsewhere)
}

func prefixesOf(routes []kernel.Route) map[netip.Prefix]bool {
	prefixes := make(map[netip.Prefix]bool, len(routes))
	for i := range routes {
		prefixes[routes[i].Prefix] = true
	}
	return prefixes
}

// sharesKeys says whether somebody else's route through the device has the key of one of ours.
func sharesKeys(have *observed, want *desired) bool {
	wanted := make(map[kernel.RouteKey]bool, len(want.routes))
	for _, r := range want.routes {
		wanted[r.RouteKey] = true
	}
	return slices.ContainsFunc(have.routes, func(r kernel.Route) bool {
		return r.Protocol != want.protocol && wanted[r.RouteKey]
	})
}

// obscured lists the wanted routes before which a stranger's through the same device stands and does something else.
func obscured(have *observed, want *desired) []kernel.Route {
	first := make(map[kernel.RouteKey]kernel.Route, len(have.routes))
	for _, r := range have.routes {
		if _, ok := first[r.RouteKey]; !ok {
			first[r.RouteKey] = r
		}
	}
	var found []kernel.Route
	for _, r := range want.routes {
		if h, ok := first[r.RouteKey]; ok && h.Protocol != want.protocol && !want.does(h, r) {
			found = append(found, h)
		}
	}
	return found
}

// probes finds for each of the prefixes that d installs an address by which to ask who answers for it.
type probes struct {
	own     map[netip.Addr]bool
	longest func(netip.Addr) netip.Prefix // of our prefixes
}

func newProbes(networks []netip.Prefix, longest func(netip.Addr) netip.Prefix) *probes {
	p := &probes{own: make(map[netip.Addr]bool, len(networks)), longest: longest}
	for _, network := range networks {
		p.own[network.Addr()] = true
	}
	return p
}

// first returns an address inside prefix that no longer prefix of ours covers; false if one cannot be found quickly.
func (p *probes) first(prefix netip.Prefix) (netip.Addr, bool) {
	addr := prefix.Addr()
	if !prefix.IsSingleIP() {
		addr = addr.Next() // the first may be a broadcast or anycast address
	}
	return p.from(prefix, addr)
}

// after is first for an address behind those that other, a stranger's longer prefix, covers.
func (p *probes) after(prefix, other netip.Prefix) (netip.Addr, bool) {
	return p.from(prefix, kernel.Behind(other))
}

func (p *probes) from(prefix netip.Prefix, addr netip.Addr) (netip.Addr, bool) {
	const tries = 64
	for try := 0; try < tries && prefix.Contains(addr); try++ {
		longest := p.longest(addr)
		switch {
		case longest.Bits() > prefix.Bits():
			addr = kernel.Behind(longest)
		case p.own[addr]:
			addr = addr.Next()
		default:
			return addr, true
		}
	}
	return netip.Addr{}, false
}
