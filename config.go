package overlay

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"example.com/overlay/internal/kernel"
)

// Limits of the kernel.
const (
	maxNameLen    = 15      // IFNAMSIZ less the NUL
	maxQueues     = 256     // MAX_TAP_QUEUES
	maxTxQueueLen = 1 << 19 // one pointer a packet in 4 MiB, the most that the kernel allocates for a ring
	maxReadBuffer = 1 << 30 // the kernel doubles it into an int
	maxID         = math.MaxUint32 - 1
	maxMetric     = math.MaxInt32
)

// Validate returns every *ConfigError in c, joined; it makes no system call.
func (c Config) Validate() error {
	v := &validator{}
	v.config(&c)
	return errors.Join(v.errs...)
}

// validator collects what is wrong.
type validator struct {
	errs   []error
	called func(field string) string // what the reader of the errors calls a field of Config; nil: by its path
}

func (v *validator) refuse(field string, value any, format string, args ...any) {
	v.errs = append(v.errs, &ConfigError{Field: v.path(field), Value: value, Err: fmt.Errorf(format, args...)})
}

// path is for reasons that name a field, as refuse's own field is.
func (v *validator) path(field string) string {
	if v.called == nil {
		return field
	}
	return v.called(field)
}

func (v *validator) config(c *Config) {
	v.name(c)
	v.number("MTU", c.MTU, minMTU, maxMTU, "bytes, or 0 for 1300")
	v.number("TxQueueLen", c.TxQueueLen, 1, maxTxQueueLen, "packets, or 0 for 500")
	v.number("Queues", c.Queues, 1, maxQueues, "queues, or 0 for 1")
	v.number("Owner", c.Owner, 1, maxID, "a uid, or 0 for the effective one")
	v.number("Group", c.Group, 1, maxID, "a gid, or 0 for none")
	v.protocol(c.Protocol)
	if c.NoOffload&^(OffloadTCP|OffloadUDP) != 0 {
		v.refuse("NoOffload", c.NoOffload, "unknown offload")
	}
	if strings.ContainsRune(c.NetNS, 0) {
		v.refuse("NetNS", c.NetNS, "a path has no NUL")
	}
	v.mode(c)
	v.networks(c.Networks)
	v.routes(c)
	v.ipv6MTU(c)
	v.systemRoutes(c.SystemRoutes)
}

// number takes 0 and lowest…highest.
func (v *validator) number(field string, value int, lowest, highest int64, unit string) {
	if value != 0 && (int64(value) < lowest || int64(value) > highest) {
		v.refuse(field, value, "want %d…%d %s", lowest, highest, unit)
	}
}

func (v *validator) name(c *Config) {
	if reason := badName(c.Name); reason != "" {
		v.refuse("Name", c.Name, "%s", reason)
	}
}

// badName says why the kernel refuses a name for a new interface: dev_valid_name and __dev_alloc_name in net/core/dev.c,
// sysctl_dev_name_is_allowed in net/ipv4/devinet.c. Empty is fine: the kernel chooses.
func badName(name string) string {
	_, after, pattern := strings.Cut(name, "%")
	switch {
	case len(name) > maxNameLen:
		return "longer than 15 bytes"
	case name == "." || name == "..":
		return "a directory"
	case name == "all" || name == "default":
		return "stands for every interface in the kernel's settings"
	case strings.ContainsAny(name, "/:\x00"):
		return "has a slash, a colon or a NUL"
	case pattern && (!strings.HasPrefix(after, "d") || strings.Contains(after, "%")):
		return "may hold one %d and no other percent sign"
	}
	for _, b := range []byte(name) {
		if b == ' ' || b >= '\t' && b <= '\r' || b == 0xa0 { // isspace in the kernel's Latin-1
			return "has white space"
		}
	}
	return ""
}

func (v *validator) mode(c *Config) {
	if c.Mode > AttachOrCreate {
		v.refuse("Mode", c.Mode, "unknown mode")
		return
	}
	if c.Mode != Create && (c.Name == "" || strings.Contains(c.Name, "%")) {
		v.refuse("Name", c.Name, "attaching needs the name of a device")
	}
	if c.Mode != Attach {
		return
	}
	if c.Owner != 0 {
		v.refuse("Owner", c.Owner, "an attached device keeps its owner")
	}
	if c.Group != 0 {
		v.refuse("Group", c.Group, "an attached device keeps its group")
	}
	if c.Persist {
		v.refuse("Persist", true, "an attached device keeps its persistence")
	}
}

// protocol refuses the numbers by which the kernel and ip(8) mark their own objects: what is ours must be told from theirs.
func (v *validator) protocol(p int) {
	const static, routerAdvertisement = 4, 9
	switch {
	case p < 0 || p > math.MaxUint8:
		v.refuse("Protocol", p, "want 5…255, or 0 for %d", DefaultProtocol)
	case p != 0 && p <= static || p == routerAdvertisement:
		v.refuse("Protocol", p, "the kernel and ip(8) mark their own routes and addresses so")
	}
}

func (v *validator) networks(networks []netip.Prefix) {
	seen := make(map[netip.Addr]int, len(networks))
	for i, network := range networks {
		field := fmt.Sprintf("Networks[%d]", i)
		addr := network.Addr()
		switch {
		case !network.IsValid():
			v.refuse(field, network, "not a prefix")
			continue
		case addr.Is4In6():
			v.refuse(field, network, "IPv4-mapped: write it as IPv4")
		case network.Bits() == 0:
			v.refuse(field, network, "no network spans all addresses: use a Route")
		case addr.IsUnspecified(), addr.IsLoopback(), addr.IsMulticast(), addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			v.refuse(field, network, "not the address of a host")
		}
		if first, ok := seen[addr]; ok {
			v.refuse(field, network, "the address of Networks[%d] again", first)
			continue
		}
		seen[addr] = i
	}
}

func routeField(i int) string             { return fmt.Sprintf("Routes[%d]", i) }
func viaField(route string, i int) string { return fmt.Sprintf("%s.Via[%d]", route, i) }

// refuseRoute is refuse for a part of Routes[i]. Of the hundred thousand paths that a Config may have only the few that are
// refused are made.
func (v *validator) refuseRoute(i int, part string, value any, format string, args ...any) {
	v.refuse(routeField(i)+part, value, format, args...)
}

func (v *validator) routes(c *Config) {
	seen := make(map[kernel.RouteKey]int, len(c.Routes))
	tables := false // other than main
	for i := range c.Routes {
		r := &c.Routes[i]
		if !v.route(c, i) {
			continue
		}
		key := c.keyOf(r)
		if j, ok := seen[key]; ok {
			v.refuseRoute(i, "", r.Prefix, "prefix, table and metric of %s again", v.path(routeField(j)))
			continue
		}
		seen[key] = i
		tables = tables || key.Table != kernel.TableMain
	}
	if tables {
		v.tables(c, seen)
	}
}

// tables refuses routes that differ in their gateways alone, but for the table: the tree has one answer for both.
func (v *validator) tables(c *Config, valid map[kernel.RouteKey]int) {
	first := make(map[kernel.RouteKey]int, len(valid))
	for i := range c.Routes {
		r := &c.Routes[i]
		key := c.keyOf(r)
		if j, ok := valid[key]; !ok || j != i {
			continue
		}
		key.Table = 0
		if j, ok := first[key]; !ok {
			first[key] = i
		} else if !slices.Equal(r.Via, c.Routes[j].Via) {
			v.refuseRoute(i, ".Via", r.Via, "differs from %s, which has the same prefix and metric in another table", v.path(routeField(j)))
		}
	}
}

// route checks one route by itself; false if its key means nothing.
func (v *validator) route(c *Config, i int) bool {
	r := &c.Routes[i]
	ok := v.routePrefix(r, i)
	if r.Metric < 0 || r.Metric > maxMetric {
		v.refuseRoute(i, ".Metric", r.Metric, "want 0…%d", maxMetric)
		ok = false
	}
	switch {
	case r.Table < 0 || int64(r.Table) > math.MaxInt32:
		v.refuseRoute(i, ".Table", r.Table, "want 1…%d, or 0 for main", math.MaxInt32)
		ok = false
	case r.Table == kernel.TableLocal:
		v.refuseRoute(i, ".Table", r.Table, "the local table is the kernel's")
	case ok && r.Prefix.Bits() == 0 && r.Table == 0 && r.Metric == 0 && !r.NoInstall:
		v.refuseRoute(i, ".Table", r.Table, "a default route in the main table at metric 0 takes over the host: say Table 254, or another table or metric")
	}
	if r.MTU != 0 {
		v.number(routeField(i)+".MTU", r.MTU, minMTU, maxMTU, "bytes, or 0 for Config.MTU")
	}
	v.gateways(c, i)
	return ok
}

func (v *validator) routePrefix(r *Route, i int) bool {
	switch {
	case !r.Prefix.IsValid():
		v.refuseRoute(i, ".Prefix", r.Prefix, "not a prefix")
	case r.Prefix.Addr().Is4In6():
		v.refuseRoute(i, ".Prefix", r.Prefix, "IPv4-mapped: write it as IPv4")
	case r.Prefix != r.Prefix.Masked():
		v.refuseRoute(i, ".Prefix", r.Prefix, "has host bits: did you mean %v?", r.Prefix.Masked())
	default:
		return true
	}
	return false
}

func (v *validator) gateways(c *Config, i int) {
	r := &c.Routes[i]
	if len(r.Via) > 0 && slices.ContainsFunc(c.Networks, func(n netip.Prefix) bool { return c.prevails(n, r) }) {
		v.refuseRoute(i, ".Via", r.Via, "the network itself is on-link, whatever the table: it has no gateway")
	}
	const few = 16 // up to which a scan is cheaper than a map
	var seen map[netip.Addr]int
	if len(r.Via) > few {
		seen = make(map[netip.Addr]int, len(r.Via))
	}
	for n, gateway := range r.Via {
		v.gateway(c, i, n)
		first := slices.IndexFunc(r.Via[:min(n, few)], func(g Gateway) bool { return g.Addr == gateway.Addr })
		if at, ok := seen[gateway.Addr]; ok && first < 0 {
			first = at
		}
		if first >= 0 {
			v.refuse(viaField(routeField(i), n)+".Addr", gateway.Addr, "the gateway of %s again", v.path(viaField(routeField(i), first)))
		} else if seen != nil {
			seen[gateway.Addr] = n
		}
	}
}

// prevails says whether a network of ours answers in the place of r in any case: the tree has one answer for all tables, the lowest
// metric's, while the kernel takes r for whoever looks into another table. In the network's own table a higher metric waits in both.
func (c *Config) prevails(network netip.Prefix, r *Route) bool {
	if !network.IsValid() || network.Masked() != r.Prefix {
		return false
	}
	is, key := connectedKey(network), c.keyOf(r)
	return key == is || key.Table != is.Table && key.Metric >= is.Metric
}

// gateway checks Routes[i].Via[n] by itself.
func (v *validator) gateway(c *Config, i, n int) {
	gateway := c.Routes[i].Via[n]
	refuse := func(part string, value any, format string, args ...any) {
		v.refuse(viaField(routeField(i), n)+part, value, format, args...)
	}
	if gateway.Weight < 0 || gateway.Weight > math.MaxInt32 {
		refuse(".Weight", gateway.Weight, "want 1…%d, or 0 for 1", math.MaxInt32)
	}
	inside, own := false, false
	for _, network := range c.Networks {
		inside = inside || network.IsValid() && network.Contains(gateway.Addr)
		own = own || network.Addr() == gateway.Addr
	}
	switch {
	case !gateway.Addr.IsValid():
		refuse(".Addr", gateway.Addr, "not an address")
	case !inside:
		refuse(".Addr", gateway.Addr, "outside Networks")
	case own:
		refuse(".Addr", gateway.Addr, "our own address")
	}
}

// ipv6MTU refuses what the kernel would answer by taking IPv6 off the device (kernel.md U15).
func (v *validator) ipv6MTU(c *Config) {
	if mtu := c.deviceMTU(); c.LinkLocal && mtu < minIPv6MTU {
		v.refuse("LinkLocal", true, "IPv6 needs %d bytes, the device has %d", minIPv6MTU, mtu)
	}
	for i, network := range c.Networks {
		if network.IsValid() && network.Addr().Is6() && c.mtuOf() < minIPv6MTU {
			v.refuse("MTU", c.MTU, "Networks[%d] is IPv6, which needs %d bytes", i, minIPv6MTU)
			return
		}
	}
	for i := range c.Routes {
		r := &c.Routes[i]
		if r.Prefix.IsValid() && r.Prefix.Addr().Is6() && !r.NoInstall && c.routeMTU(r) < minIPv6MTU {
			v.refuse(routeField(i)+".MTU", r.MTU, "IPv6 needs %d bytes, this route has %d", minIPv6MTU, c.routeMTU(r))
		}
	}
}

func (v *validator) systemRoutes(s *SystemRoutes) {
	if s == nil {
		return
	}
	for i, table := range s.Tables {
		field := fmt.Sprintf("SystemRoutes.Tables[%d]", i)
		switch {
		case table < 1 || int64(table) > math.MaxInt32:
			v.refuse(field, table, "want 1…%d", math.MaxInt32)
		case slices.Index(s.Tables, table) < i:
			v.refuse(field, table, "twice")
		}
	}
	v.number("SystemRoutes.ReadBuffer", s.ReadBuffer, 1, maxReadBuffer, "bytes, or 0 for 4 MiB")
	v.number("SystemRoutes.Max", s.Max, 1, math.MaxInt32, "routes, or 0 for 4,000,000")
}

// protocol is what marks our routes and addresses.
func (c *Config) protocol() uint8 {
	if c.Protocol == 0 {
		return DefaultProtocol
	}
	return uint8(c.Protocol)
}

// queues is the number of queues of a new device.
func (c *Config) queues() int { return max(c.Queues, 1) }

// clone copies c with all that it points to: Config is plain data of whoever takes it.
func (c Config) clone() Config {
	c.Networks = slices.Clone(c.Networks)
	c.Routes = slices.Clone(c.Routes)
	n := 0
	for i := range c.Routes {
		n += len(c.Routes[i].Via)
	}
	all := make([]Gateway, 0, n)
	for i := range c.Routes {
		if via := &c.Routes[i].Via; len(*via) > 0 {
			start := len(all)
			all = append(all, *via...)
			*via = all[start:len(all):len(all)]
		}
	}
	if c.SystemRoutes != nil {
		s := *c.SystemRoutes
		s.Tables = slices.Clone(s.Tables)
		c.SystemRoutes = &s
	}
	return c
}

// fixedChanges names the fields that differ and may not.
func fixedChanges(old, wanted *Config) []string {
	var names []string
	differ := func(name string, differs bool) {
		if differs {
			names = append(names, name)
		}
	}
	differ("Name", old.Name != wanted.Name)
	differ("Queues", old.queues() != wanted.queues())
	differ("Mode", old.Mode != wanted.Mode)
	differ("NetNS", old.NetNS != wanted.NetNS)
	differ("Owner", old.Owner != wanted.Owner)
	differ("Group", old.Group != wanted.Group)
	differ("Persist", old.Persist != wanted.Persist)
	differ("Disabled", old.Disabled != wanted.Disabled)
	differ("Protocol", old.protocol() != wanted.protocol())
	return names
}

// restart refuses a change of the fixed fields, all named.
func restart(old, next *Config) error {
	names := fixedChanges(old, next)
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("overlay: reload: %s: %w", strings.Join(names, ", "), ErrRestart)
}
