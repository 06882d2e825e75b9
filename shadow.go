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

// overshadow returns what is in the shadow after a look at some routes found these, and which of them was not before.
func overshadow(before, found []shadow, looked []kernel.Route) (all, news []shadow) {
	prefixes := make(map[netip.Prefix]bool, len(looked))
	for _, r := range looked {
		prefixes[r.Prefix] = true
	}
	all = append(all, found...)
	for _, s := range before {
		if !prefixes[s.prefix] && !slices.Contains(found, s) {
			all = append(all, s)
		}
	}
	for _, s := range found {
		if !slices.Contains(before, s) {
			news = append(news, s)
		}
	}
	return all, news
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
	return p.from(prefix, behind(other))
}

func (p *probes) from(prefix netip.Prefix, addr netip.Addr) (netip.Addr, bool) {
	const tries = 64
	for try := 0; try < tries && prefix.Contains(addr); try++ {
		longest := p.longest(addr)
		switch {
		case longest.Bits() > prefix.Bits():
			addr = behind(longest)
		case p.own[addr]:
			addr = addr.Next()
		default:
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// behind returns the address that follows the last of prefix; the zero Addr, which no prefix contains, if there is none.
func behind(prefix netip.Prefix) netip.Addr {
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
