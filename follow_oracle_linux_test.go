package overlay

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/nstest/oracle"
	"example.com/overlay/internal/rtnl"
)

// followOracle is a device in a world of churn: RoutesFor is to say what the kernel says of packets that it hands us.
type followOracle struct {
	*lab
	*oracle.Churn
	d     *tunDevice
	cfg   Config
	other interface{ Close() error }
	name  string
	story []string // what was changed last
	ends  int      // of packets

	probes, claims, misses, own, upsets, packets int
	rules                                        []string      // beside the kernel's own
	bound, slowest                               time.Duration // of agreement
}

// newFollowOracle makes one of four kinds of worlds: healed or not, with routes in the Config or with some in the kernel that throw.
// Both together is what the tree has no words for: that at the prefix of what throws a shorter one of the Config's answers.
func newFollowOracle(t *testing.T, world int) *followOracle {
	t.Helper()
	o := &followOracle{lab: newLab(t, nstest.NetAdmin), name: "ours", bound: leeway * time.Second}
	o.Churn = &oracle.Churn{Protocol: 4, NoThrow: world%4 < 2, Rand: rand.New(rand.NewPCG(*seed, uint64(world)))}
	o.Prefixes = [][]netip.Prefix{oracle.All, oracle.Few(false), oracle.Few(true)}[world/4%3]
	o.Tell = func(change string, err error) { o.note("%s: %v", change, err) }
	o.cfg = Config{
		Name: "ours", MTU: 1400, Networks: []netip.Prefix{oracle.Own4, oracle.Own6}, NoHeal: world%2 == 0,
		SystemRoutes: &SystemRoutes{Tables: []int{oracle.SomeTable, kernel.TableMain}},
	}
	o.cfg.Routes = o.routes()
	o.d = o.active(o.cfg)
	o.World = &oracle.World{
		Conn: o.conn, Ours: int32(o.d.index), Protocol: o.cfg.protocol(), Tables: []uint32{oracle.SomeTable, kernel.TableMain},
	}
	o.makeOther()
	return o
}

func (o *followOracle) makeOther() {
	var addrs []string
	for _, p := range oracle.Addresses["other"] {
		addrs = append(addrs, p.String())
	}
	o.other = o.ns.OtherTun(o.T, "other", addrs...)
	o.World.Other = int32(o.index("other"))
}

// routes are some for a Config, at prefixes where churn is.
func (o *followOracle) routes() (routes []Route) {
	for _, p := range o.Prefixes[2:] {
		if !o.NoThrow || o.IntN(6) > 0 || slices.ContainsFunc(routes, func(r Route) bool { return r.Prefix == p }) {
			continue
		}
		r := Route{Prefix: p, Metric: oracle.OneOf(o.Rand, 50, 100), NoInstall: o.IntN(4) == 0}
		if last := byte(2 + o.IntN(8)); p.Addr().Is6() {
			r.Via = []Gateway{{Addr: netip.AddrFrom16([16]byte{0: 0xfd, 15: last})}}
		} else {
			r.Via = []Gateway{{Addr: netip.AddrFrom4([4]byte{10, 0, 0, last})}}
		}
		if o.IntN(4) == 0 {
			r.Via = nil
		}
		routes = append(routes, r)
	}
	return routes
}

// do runs ip(8) and remembers it; what the kernel refuses is none of ours.
func (o *followOracle) do(lines ...string) {
	for _, line := range lines {
		line = strings.ReplaceAll(line, "DEV", o.name)
		_, err := o.ns.TryRun("ip " + line)
		o.note("ip %s (%v)", line, err != nil)
	}
}

func (o *followOracle) note(format string, args ...any) {
	const enough = 300 // a run may last for hours
	if o.story = append(o.story, fmt.Sprintf("%d: ", o.Steps)+fmt.Sprintf(format, args...)); len(o.story) > enough {
		o.story = slices.Delete(o.story, 0, 1)
	}
}

// restore gives the devices their addresses, if they have lost them.
func (o *followOracle) restore() {
	for dev, all := range oracle.Addresses {
		for _, p := range all {
			o.do("address replace " + p.String() + " dev " + strings.ReplaceAll(dev, "ours", "DEV") + " nodad")
		}
	}
}

// static is what the Config says of a destination: the longest of its prefixes around it.
func (o *followOracle) static(dst netip.Addr) (key kernel.RouteKey, r *Route) {
	key.Prefix = netip.PrefixFrom(netip.IPv6Unspecified(), -1)
	for _, network := range o.cfg.Networks {
		if k := connectedKey(network); k.Prefix.Contains(dst) {
			key, r = k, &Route{}
		}
	}
	for i := range o.cfg.Routes {
		if c := &o.cfg.Routes[i]; c.Prefix.Contains(dst) && c.Prefix.Bits() > key.Prefix.Bits() {
			key, r = o.cfg.keyOf(c), c
		}
	}
	return key, r
}

// installed says whether the kernel holds a route of ours. Others may have taken it.
func (o *followOracle) installed(key kernel.RouteKey) bool {
	family := uint8(2)
	if key.Prefix.Addr().Is6() {
		family = 10
	}
	messages, err := o.conn.Dump(rtnl.GetFIB(family, key.Table))
	return err == nil && slices.ContainsFunc(messages, func(m rtnl.Message) bool {
		r, _, err := rtnl.DecodeRoute(m)
		return err == nil && r.RouteKey == key && r.Protocol == o.World.Protocol && r.Link == o.d.index
	})
}

// want is what RoutesFor is to say, by the kernel's verdict and, where the kernel uses our own routes, has none, or never
// had, by the Config. "": no claim.
func (o *followOracle) want(dst netip.Addr, v *oracle.Verdict) (want []string) {
	key, static := o.static(dst)
	ours := "on-link"
	if static != nil && len(static.Via) > 0 {
		ours = static.Via[0].Addr.String()
	}
	says := kernels(v)
	switch {
	case v.Kind == oracle.NoClaim:
		return nil
	case static == nil:
		return says
	case v.Kind == oracle.Miss, v.Kind == oracle.Among:
		return append(says, ours) // of the first the kernel hands us none, of the other it does not tell enough
	case static.NoInstall && o.begins(dst) >= max(key.Prefix.Bits(), v.Route.Prefix.Bits()):
		return append(says, ours) // the kernel's answer holds from where the rule's destinations begin
	case static.NoInstall && (key.Prefix.Bits() > v.Route.Prefix.Bits() || key.Prefix == v.Route.Prefix && key.Metric <= v.Route.Metric):
		return []string{ours}
	case v.Own && key.Prefix == v.Route.Prefix:
		return []string{ours}
	case static.NoInstall || key.Prefix.Bits() < v.Route.Prefix.Bits():
		return says
	case key.Prefix == v.Route.Prefix && key.Metric >= v.Route.Metric:
		return says
	case !o.installed(key):
		return nil
	}
	return says
}

// begins is the length of the prefix of a rule that is for some destinations, dst among them; -1: there is none.
func (o *followOracle) begins(dst netip.Addr) int {
	for _, rule := range o.rules {
		_, to, _ := strings.Cut(rule, " to ")
		to, _, _ = strings.Cut(to, " ")
		if p, err := netip.ParsePrefix(to); err == nil && p.Contains(dst) {
			return p.Bits()
		}
	}
	return -1
}

// kernels are the answers of RoutesFor that a verdict allows.
func kernels(v *oracle.Verdict) []string {
	var hops []string
	for _, h := range v.Hops {
		switch {
		case !h.Addr.IsValid():
			hops = append(hops, "on-link")
		case h.Weight > 1:
			hops = append(hops, fmt.Sprintf("%v*%d", h.Addr, h.Weight))
		default:
			hops = append(hops, h.Addr.String())
		}
	}
	switch v.Kind {
	case oracle.NoClaim:
		return nil
	case oracle.Miss, oracle.Refused:
		return []string{"none"}
	case oracle.OnLink:
		return []string{"on-link"}
	case oracle.Among:
		return []string{"among " + hops[0]}
	}
	return []string{ordered(hops)}
}

// agrees says whether an answer is one of those that are wanted.
func agrees(got string, want []string) bool {
	for _, w := range want {
		hop, among := strings.CutPrefix(w, "among ")
		if got == w || among && slices.ContainsFunc(strings.Fields(got), func(g string) bool { return g == hop || strings.HasPrefix(g, hop+"*") }) {
			return true
		}
	}
	return len(want) == 0
}
