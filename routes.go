package overlay

import (
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// Route is a prefix that is reached through the device. For the very prefix of a network, in main and without Metric, it stands for
// the network's connected route, which then is installed with its MTU or, with NoInstall, not at all.
type Route struct {
	Prefix    netip.Prefix // without host bits
	Via       []Gateway    // overlay hosts inside Networks; nil: on-link, for any prefix
	MTU       int          // bytes; 0: Config.MTU
	Metric    int          // 0: the kernel's default: 0 for IPv4, 1024 for IPv6
	Table     int          // 0: main. A /0 in main at metric 0 needs it said: Table 254
	NoInstall bool         // steer only, keep it out of the kernel's table; for a network's own prefix, its connected route too
}

// metric is what the kernel makes of Metric: for IPv6 it replaces 0 (kernel.md V21).
func (r *Route) metric() uint32 {
	if r.Metric == 0 && r.Prefix.Addr().Is6() {
		return defaultMetricIPv6
	}
	return uint32(r.Metric)
}

func (r *Route) table() uint32 {
	if r.Table == 0 {
		return kernel.TableMain
	}
	return uint32(r.Table)
}

// keyOf is the kernel's key of one of c's routes: that of the connected route if it names a network of ours and no metric. There is
// no key of a Route alone.
func (c *Config) keyOf(r *Route) kernel.RouteKey {
	if r.Metric == 0 && r.table() == kernel.TableMain {
		for _, network := range c.Networks {
			if network.IsValid() && network.Masked() == r.Prefix {
				return connectedKey(network)
			}
		}
	}
	return kernel.RouteKey{Prefix: r.Prefix, Table: r.table(), Metric: r.metric()}
}

// Metrics that the kernel gives to what names none.
const (
	defaultMetricIPv6   = 1024
	connectedMetricIPv6 = 256
)

// connectedKey names the route to a network of ours. Its metric is the one the kernel gives its own prefix routes.
func connectedKey(network netip.Prefix) kernel.RouteKey {
	key := kernel.RouteKey{Prefix: network.Masked(), Table: kernel.TableMain}
	if network.Addr().Is6() {
		key.Metric = connectedMetricIPv6
	}
	return key
}

// The kernel cuts larger values of a route down to these (ip_metrics_convert in net/ipv4/metrics.c).
const (
	maxRouteMTU = 65535 - 15
	maxRouteMSS = 65535 - 40
)

func routeMTULimit(mtu int) uint32 { return uint32(min(mtu, maxRouteMTU)) }

// desired is all that the kernel shall hold for a Config.
type desired struct {
	mtu, txQueueLen int
	linkLocal       bool
	takeAddresses   bool
	protocol        uint8
	ipv6            bool // something of it needs IPv6
	addresses       []kernel.Addr
	routes          []kernel.Route        // networks, then Config.Routes that are installed
	added           map[netip.Prefix]bool // addresses that the device has added in its life
}

// desire works out what a valid Config asks of the kernel.
func desire(c *Config, link int) desired {
	d := desired{
		mtu: c.deviceMTU(), txQueueLen: c.TxQueueLen, linkLocal: c.LinkLocal,
		takeAddresses: c.TakeAddresses, protocol: c.protocol(), ipv6: c.LinkLocal,
	}
	if d.txQueueLen == 0 {
		d.txQueueLen = defaultTxQueueLen
	}
	// A Route for the network itself says its MTU, and of two addresses in one network the first names the source.
	own := make(map[kernel.RouteKey]bool, len(c.Routes))
	for i := range c.Routes {
		own[c.keyOf(&c.Routes[i])] = true
	}
	for _, network := range c.Networks {
		d.ipv6 = d.ipv6 || network.Addr().Is6()
		d.addresses = append(d.addresses, kernel.Addr{Prefix: network, Protocol: d.protocol, NoPrefixRoute: true})
		key := connectedKey(network)
		if network.IsSingleIP() || own[key] { // a single host needs no route: the kernel's local table has it
			continue
		}
		own[key] = true
		d.routes = append(d.routes, d.route(c, key, link, c.mtuOf()))
	}
	for i := range c.Routes {
		r := &c.Routes[i]
		if r.NoInstall {
			continue
		}
		d.ipv6 = d.ipv6 || r.Prefix.Addr().Is6()
		d.routes = append(d.routes, d.route(c, c.keyOf(r), link, c.routeMTU(r)))
	}
	return d
}

// route is the kernel's form of a route of ours. Gateways are no part of it: on a TUN the kernel hands every packet to the
// program, which picks the gateway.
func (d *desired) route(c *Config, key kernel.RouteKey, link, mtu int) kernel.Route {
	r := kernel.Route{RouteKey: key, Protocol: d.protocol, Link: link, Plain: true, Source: sourceFor(c, key)}
	setMTU(&r, mtu)
	return r
}

func setMTU(r *kernel.Route, mtu int) {
	r.MTU = routeMTULimit(mtu)
	r.MSS = min(uint32(segmentSize(r.Prefix, int(r.MTU))), maxRouteMSS)
}

// sourceFor is the preferred source of the connected route: the first of our addresses in that network. IPv6 routes carry
// none: source address selection prefers the device's address, and the kernel drops a preferred source silently when its
// address goes for a moment.
func sourceFor(c *Config, key kernel.RouteKey) netip.Addr {
	for _, network := range c.Networks {
		if network.Addr().Is4() && connectedKey(network) == key {
			return network.Addr()
		}
	}
	return netip.Addr{}
}

// yield leaves to the administrator what is the link's own: its MTU and queue length stay as they are, and what it cannot carry
// so waits. It returns whether all that d asks for is left.
func (d *desired) yield(link *kernel.Link) (whole bool) {
	whole = d.mtu == link.MTU && d.txQueueLen == link.TxQueueLen
	d.mtu, d.txQueueLen = link.MTU, link.TxQueueLen
	if link.IPv6 == nil || link.IPv6.Disabled {
		whole = whole && !d.ipv6
		d.ipv6 = false
		d.addresses = slices.DeleteFunc(d.addresses, func(a kernel.Addr) bool { return a.Prefix.Addr().Is6() })
		d.routes = slices.DeleteFunc(d.routes, func(r kernel.Route) bool { return r.Prefix.Addr().Is6() })
	}
	for i := range d.routes {
		if r := &d.routes[i]; int(r.MTU) > link.MTU {
			setMTU(r, link.MTU)
			whole = false
		}
	}
	return whole
}
