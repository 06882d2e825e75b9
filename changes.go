package overlay

import (
	"maps"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// routeChanges are the routes in which two Configs differ: those that only the old one has, and those that only the new one has.
// A route that changed is in both.
type routeChanges struct {
	gone, come []*Route
	prefixes   map[netip.Prefix]bool // of all of them
}

// changedRoutes compares routes in one pass; in whatever order they are listed. They point into the Configs.
func changedRoutes(old, next []Route) (c routeChanges) {
	for len(old) > 0 && len(next) > 0 && old[0].equal(&next[0]) {
		old, next = old[1:], next[1:]
	}
	for len(old) > 0 && len(next) > 0 && old[len(old)-1].equal(&next[len(next)-1]) {
		old, next = old[:len(old)-1], next[:len(next)-1]
	}
	had := make(map[kernel.RouteKey]*Route, len(old))
	for i := range old {
		had[old[i].written()] = &old[i]
	}
	c.come = make([]*Route, 0, len(next))
	for i := range next {
		r := &next[i]
		if was := had[r.written()]; was != nil && was.equal(r) {
			delete(had, r.written())
			continue
		}
		c.come = append(c.come, r)
	}
	for i := range old {
		if r := &old[i]; had[r.written()] == r {
			c.gone = append(c.gone, r)
		}
	}
	c.prefixes = make(map[netip.Prefix]bool, len(c.gone)+len(c.come))
	for _, list := range [][]*Route{c.gone, c.come} {
		for _, r := range list {
			c.prefixes[r.Prefix] = true
		}
	}
	return c
}

// written tells r from all other routes of a valid Config, whatever its networks are: its metric is the one that is written. In the
// kernel's terms Metric 0 of IPv6 is 256 for a network of ours (see Config.keyOf), and 1024 beside it another route.
func (r *Route) written() kernel.RouteKey {
	return kernel.RouteKey{Prefix: r.Prefix, Table: r.table(), Metric: uint32(r.Metric)}
}

func (r *Route) equal(other *Route) bool {
	return r.Prefix == other.Prefix && r.MTU == other.MTU && r.Metric == other.Metric && r.Table == other.Table &&
		r.NoInstall == other.NoInstall && slices.Equal(r.Via, other.Via)
}

// touched are the prefixes of which the Configs may say different things: of these routes, and of networks that come or go.
func (c routeChanges) touched(old, next *Config) map[netip.Prefix]bool {
	all := c.prefixes
	if slices.Equal(old.Networks, next.Networks) {
		return all
	}
	all = maps.Clone(all)
	for _, list := range [][]netip.Prefix{old.Networks, next.Networks} {
		for _, network := range list {
			all[network.Masked()] = true
		}
	}
	return all
}

// onlyRoutes says whether two valid Configs differ, as far as the kernel is concerned, in nothing but these routes, none of which
// is a network of ours.
func (c routeChanges) onlyRoutes(old, next *Config) bool {
	same := old.mtuOf() == next.mtuOf() && old.deviceMTU() == next.deviceMTU() && old.TxQueueLen == next.TxQueueLen &&
		old.LinkLocal == next.LinkLocal && old.TakeAddresses == next.TakeAddresses && slices.Equal(old.Networks, next.Networks)
	if !same {
		return false
	}
	return !slices.ContainsFunc(old.Networks, func(n netip.Prefix) bool { return c.prefixes[n.Masked()] })
}

// planChanges are the steps for routes alone, where the kernel holds what old asks for: as many messages as law 5 allows.
func (c routeChanges) planChanges(old, next *Config, link int) (steps []step, want desired) {
	want = desired{protocol: next.protocol(), mtu: next.deviceMTU()}
	have := make([]kernel.Route, 0, len(c.gone))
	want.routes = make([]kernel.Route, 0, len(c.come))
	install := func(cfg *Config, list []*Route, to *[]kernel.Route) {
		for _, r := range list {
			if !r.NoInstall {
				want.ipv6 = want.ipv6 || r.Prefix.Addr().Is6()
				*to = append(*to, want.route(cfg, cfg.keyOf(r), link, cfg.routeMTU(r)))
			}
		}
	}
	install(old, c.gone, &have)
	install(next, c.come, &want.routes)
	var keys map[kernel.RouteKey]bool // of all of next's, some of which do not change; made when somebody asks, which IPv6 alone does
	taken := func(k kernel.RouteKey) bool {
		if keys == nil {
			keys = make(map[kernel.RouteKey]bool, len(next.Routes))
			for i := range next.Routes {
				keys[next.keyOf(&next.Routes[i])] = true
			}
		}
		return keys[k]
	}
	return planRoutes(&observed{routes: have}, &want, taken), want
}

// hidden are the IPv6 routes that go. Between the legs of another's multipath route the kernel has ours and does not list it, so that a
// look is no reason to leave it behind.
func (c routeChanges) hidden(old, next *Config, link int) (routes []kernel.Route) {
	was := desired{protocol: old.protocol()}
	for _, r := range c.gone {
		if r.Prefix.Addr().Is6() && !r.NoInstall {
			routes = append(routes, was.route(old, old.keyOf(r), link, old.routeMTU(r)))
		}
	}
	if len(routes) == 0 {
		return nil
	}
	wanted := keys(desire(next, link).routes)
	return slices.DeleteFunc(routes, func(r kernel.Route) bool { return wanted[r.RouteKey] })
}

// withUnlisted appends to routes of all protocols those of ours that are not among them.
func withUnlisted(routes, ours []kernel.Route) []kernel.Route {
	if len(ours) == 0 {
		return routes
	}
	listed := make(map[kernel.RouteKey]bool)
	for i := range routes {
		if routes[i].Protocol == ours[0].Protocol {
			listed[routes[i].RouteKey] = true
		}
	}
	for _, r := range ours {
		if !listed[r.RouteKey] {
			routes = append(routes, r)
		}
	}
	return routes
}

func keys(routes []kernel.Route) map[kernel.RouteKey]bool {
	all := make(map[kernel.RouteKey]bool, len(routes))
	for i := range routes {
		all[routes[i].RouteKey] = true
	}
	return all
}

// mark puts a key into a set that may not be there yet.
func mark(set *map[kernel.RouteKey]bool, key kernel.RouteKey) {
	if *set == nil {
		*set = make(map[kernel.RouteKey]bool)
	}
	(*set)[key] = true
}
