package overlay

import "net/netip"

// What a Config leaves silent.
const (
	defaultMTU        = 1300
	defaultTxQueueLen = 500
)

// The smallest and largest MTU of a TUN device, and the smallest that IPv6 works with (RFC 8200, section 5): below it the
// kernel takes IPv6 off the device, addresses and all (kernel.md B7).
const (
	minMTU     = 68
	maxMTU     = 65535
	minIPv6MTU = 1280
)

// What TCP takes of an MTU: the IP header and its own.
const (
	overheadIPv4 = 20 + 20
	overheadIPv6 = 40 + 20
)

// mtuOf returns the MTU of networks and of routes that name none.
func (c *Config) mtuOf() int {
	if c.MTU == 0 {
		return defaultMTU
	}
	return c.MTU
}

// deviceMTU is the largest of the default's and every route's: the device must carry what its widest route promises.
// It depends on nothing but the Config, so neither order nor earlier reloads change it.
func (c *Config) deviceMTU() int {
	mtu := c.mtuOf()
	for i := range c.Routes {
		mtu = max(mtu, c.Routes[i].MTU)
	}
	return mtu
}

// routeMTU is the MTU of packets to r.
func (c *Config) routeMTU(r *Route) int {
	if r.MTU == 0 {
		return c.mtuOf()
	}
	return r.MTU
}

// segmentSize is the TCP payload that fits into packets of mtu bytes to prefix: the route's advertised MSS.
func segmentSize(prefix netip.Prefix, mtu int) int {
	if prefix.Addr().Is4() {
		return mtu - overheadIPv4
	}
	return mtu - overheadIPv6
}
