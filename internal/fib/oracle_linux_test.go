package fib

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

var (
	oracleSeed = flag.Uint64("seed", 0, "seed of the kernel oracle; 0: one of the clock")
	oracleLong = flag.Duration("long", 0, "how long the kernel oracle runs; 0: a few seconds")
)

// churn changes a lab's routes at random.
type churn struct {
	*lab
	r       *rand.Rand
	have    []kernel.FIBRoute // what was added, mostly still there
	ops     int
	done    int // that the kernel carried out
	claims  int // probes answered through our interface
	misses  int // probes answered by no route
	probes  int
	upsets  int
	ordered bool
}

func oneOf[T any](c *churn, from ...T) T { return from[c.r.IntN(len(from))] }

// prefixes nest, so that the longest match matters.
var labPrefixes = func() []netip.Prefix {
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for i := range 6 {
		a4, a6 := netip.AddrFrom4([4]byte{192, 0, 2, byte(i * 40)}), netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 7: byte(i)})
		for _, bits := range []int{24 + i%3, 30, 32} {
			p, _ := a4.Prefix(bits)
			all = append(all, p)
		}
		for _, bits := range []int{48 + i%3, 64, 128} {
			p, _ := a6.Prefix(bits)
			all = append(all, p)
		}
	}
	return all
}()

// leg is a leg; routes of one prefix choose among few gateways, so that they meet.
func (c *churn) leg(is6 bool) kernel.Leg {
	ours := c.r.IntN(3) > 0
	leg := kernel.Leg{Link: c.other, Weight: uint32(1 + c.r.IntN(4))}
	if ours {
		leg.Link = c.ours
	}
	last := byte(2 + c.r.IntN(5))
	six := is6 || c.r.IntN(6) == 0
	switch {
	case six && ours && c.r.IntN(8) == 0:
		leg.Gateway = netip.MustParseAddr("2001:db8:ffff::1") // on-link by flag, no overlay host
	case ours && c.r.IntN(8) == 0 && !six:
		leg.Gateway = netip.MustParseAddr("172.16.0.1")
	case six:
		leg.Gateway = netip.AddrFrom16([16]byte{0: 0xfd, 1: boolByte(!ours), 15: last})
	default:
		leg.Gateway = netip.AddrFrom4([4]byte{10, 0, boolByte(!ours), last})
	}
	return leg
}

func boolByte(b bool) byte { return byte(btoi(b)) }

func (c *churn) route() kernel.FIBRoute {
	r := kernel.FIBRoute{
		Prefix: oneOf(c, labPrefixes...), Table: oneOf[uint32](c, kernel.TableMain, kernel.TableMain, someTable, 77),
		Metric: oneOf[uint32](c, 50, 50, 100), Type: kernel.TypeUnicast, Protocol: oneOf[uint8](c, 3, 3, 4, 4, ourProto),
	}
	is6 := r.Prefix.Addr().Is6()
	switch c.r.IntN(10) {
	case 0:
		r.Type = oneOf[uint8](c, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW)
	case 1, 2, 3:
		r.NextHop = uint32(1 + c.r.IntN(8))
	case 4, 5:
		r.Legs = []kernel.Leg{{Link: oneOf(c, c.ours, c.ours, c.other), Weight: 1}}
	default:
		for range oneOf(c, 1, 1, 2, 3) {
			r.Legs = append(r.Legs, c.leg(is6))
		}
	}
	switch {
	case is6 && joins(&r):
		r.Pref = uint8(r.Prefix.Bits()/16) % 2 // one for all legs of a multipath
	case is6 && r.NextHop != 0:
		r.Protocol = 3 // whose route it is the kernel does not tell reliably
	case is6:
		r.Pref = oneOf[uint8](c, 0, 0, 0, 1, 3)
	default:
		r.TOS = oneOf[uint8](c, 0, 0, 0, 0, 0, 0x10)
	}
	if !is6 && c.r.IntN(6) == 0 {
		r.Detail = attribute(nil, unix.RTA_PREFSRC, own4.AsSlice())
	}
	if c.r.IntN(6) == 0 {
		r.Detail = attribute(r.Detail, unix.RTA_METRICS, attribute(nil, unix.RTAX_MTU, word(oneOf[uint32](c, 1300, 1400))))
	}
	return r
}

func (c *churn) nextHop() rtnl.Message {
	id := uint32(1 + c.r.IntN(8))
	if c.r.IntN(6) == 0 {
		return nextHopMessage(unix.RTM_DELNEXTHOP, kernel.NextHop{ID: id})
	}
	n := kernel.NextHop{ID: id}
	switch {
	case id == 4:
		n.Leg = kernel.Leg{Link: oneOf(c, c.ours, c.other)}
	case id <= 4:
		n.Leg = c.leg(id%2 == 0)
		if !labOverlay(n.Gateway) && n.Link == c.ours || c.r.IntN(12) == 0 {
			n.Leg, n.Blackhole = kernel.Leg{}, true
		}
	default: // IPv4 routes go through 5 and 6, IPv6 routes through those with even members only
		for _, member := range oneOf(c, []uint32{1, 3}, []uint32{2, 3}, []uint32{2}, []uint32{1, 2, 3}) {
			n.Group = append(n.Group, kernel.NextHopLeg{ID: member, Weight: oneOf[uint32](c, 1, 2, 5, 300)})
		}
	}
	return nextHopMessage(unix.RTM_NEWNEXTHOP, n)
}

// step makes one change of the kernel's state.
func (c *churn) step() {
	c.ops++
	var m rtnl.Message
	switch n := c.r.IntN(20); {
	case n < 11:
		r := c.route()
		m = routeMessage(unix.RTM_NEWROUTE, opFlags[c.r.IntN(len(opFlags))], r)
		c.have = append(c.have, r)
	case n < 17 && len(c.have) > 0:
		i := c.r.IntN(len(c.have))
		r := c.have[i]
		if c.r.IntN(3) == 0 {
			r.Legs, r.NextHop, r.Protocol, r.Type = nil, 0, 0, 0 // the first that there is
		} else if len(r.Legs) > 1 && c.r.IntN(2) == 0 {
			r.Legs = r.Legs[:1]
		}
		r.Detail = nil
		m = routeMessage(unix.RTM_DELROUTE, 0, r)
		c.have[i] = c.have[len(c.have)-1]
		c.have = c.have[:len(c.have)-1]
	default:
		m = c.nextHop()
	}
	if c.ctl.Do(m)[0].Err == nil {
		c.done++
	}
}

// upset changes what silently takes routes away, then looks again.
func (c *churn) upset(t *testing.T) {
	c.upsets++
	switch n := c.r.IntN(6); n {
	case 0, 1:
		dev := oneOf(c, "ours", "other")
		c.ns.Run(t, "ip link set "+dev+" down")
		if n == 0 {
			time.Sleep(20 * time.Millisecond) // linkwatch
			c.hear(t)
			c.resync(t, true)
			c.quiet(t)
			c.check(t)
		}
		c.ns.Run(t, "ip link set "+dev+" up")
	case 2:
		c.ns.Run(t, "ip address del 10.0.0.1/24 dev ours")
	case 3:
		c.sysctl(t, "ipv4/nexthop_compat_mode", oneOf(c, "0", "1"))
		return
	case 4:
		c.ordered = !c.ordered
		for _, family := range []string{"-4", "-6"} {
			verb := "del"
			if c.ordered {
				verb = "add"
			}
			c.ns.Run(t, "ip "+family+" rule "+verb+" pref 1000 table 100")
		}
		c.readRules(t)
		return
	case 5:
		c.ns.Run(t, "ip link set ours mtu "+oneOf(c, "1400", "1500"))
		return
	}
	c.addresses(t)
	time.Sleep(20 * time.Millisecond)
	c.hear(t)
	c.resync(t, true)
}

func (c *churn) readRules(t *testing.T) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var rules []kernel.Rule
		for _, m := range c.dump(t, rtnl.GetRules(family)) {
			r, err := rtnl.DecodeRule(m)
			if err != nil {
				t.Fatal(err)
			}
			rules = append(rules, r)
		}
		is6 := family == unix.AF_INET6
		c.t.SetOrder(is6, Order(rules, is6, c.t.cfg.Tables))
	}
}

// destinations are in all prefixes, and beside them.
func (c *churn) destinations() []netip.Addr {
	var all []netip.Addr
	for _, p := range labPrefixes {
		a := p.Addr()
		all = append(all, a, a.Next(), behind(p))
		if !p.IsSingleIP() {
			b := a.AsSlice()
			b[len(b)-1] |= byte(c.r.IntN(1 << min(8, a.BitLen()-p.Bits())))
			within, _ := netip.AddrFromSlice(b)
			all = append(all, within)
		}
	}
	return all
}

// check asks the kernel about all destinations and compares.
func (c *churn) check(t *testing.T) {
	t.Helper()
	c.readNextHops(t)
	var asked []netip.Addr
	var requests []rtnl.Message
	for _, dst := range c.destinations() {
		if dst.IsValid() && !dst.IsUnspecified() {
			asked, requests = append(asked, dst), append(requests, rtnl.MatchRoute(dst))
		}
	}
	for i, result := range c.ctl.Do(requests...) {
		c.probes++
		if err := c.compare(t, asked[i], result); err != nil {
			t.Fatalf("seed %d, operation %d: %v: %v\n%s", *oracleSeed, c.ops, asked[i], err, c.story(asked[i]))
		}
	}
}

func (c *churn) compare(t *testing.T, dst netip.Addr, result rtnl.Result) error {
	q, ok := c.longest(dst)
	if errors.Is(result.Err, unix.ENETUNREACH) {
		if c.misses++; ok && !c.hole(t, dst) {
			return fmt.Errorf("got %+v by %v, want a miss", c.t.Answer(q), q)
		}
		return nil
	}
	if result.Err != nil || len(result.Answers) != 1 {
		return nil // a blackhole or its kin
	}
	var r kernel.FIBRoute
	if err := rtnl.DecodeFIBRoute(result.Answers[0], &r); err != nil {
		return err
	}
	if r.NextHop != 0 && dst.Is6() {
		return c.leads(dst, q, ok)
	}
	kind, gateways, ours := c.want(r)
	if !ours || r.Type != kernel.TypeUnicast && r.NextHop == 0 || r.Table == kernel.TableLocal {
		return nil
	}
	a := c.t.Answer(q)
	if r.Protocol == ourProto && !joins(&r) {
		if a.Kind != Absent && a.Metric == r.Metric && a.Table == r.Table && a.First && q == r.Prefix {
			return fmt.Errorf("got %+v before our own %+v", a, r)
		}
		return nil
	}
	c.claims++
	if q != r.Prefix && c.t.throws == 0 || a.Kind != kind || a.Metric != r.Metric || a.Table != r.Table || kind == Via && !sameGateways(a.Set.Gateways, gateways) || !a.First {
		var have []Gateway
		if a.Set != nil {
			have = a.Set.Gateways
		}
		return fmt.Errorf("got %+v %v by %v,\nwant kind %d %v by %s", a, have, q, kind, gateways, tell(kernel.Refreshed, r))
	}
	return nil
}

// leads is compare for IPv6 routes through nexthop objects, of which a FIB match may name another that shares a leg: see
// Settle. A plain look-up tells the leg itself.
func (c *churn) leads(dst netip.Addr, q netip.Prefix, ok bool) error {
	plain := rtnl.MatchRoute(dst)
	clear(plain.Body[8:12]) // no RTM_F_FIB_MATCH
	result := c.ctl.Do(plain)[0]
	var r kernel.FIBRoute
	if result.Err != nil || len(result.Answers) != 1 || rtnl.DecodeFIBRoute(result.Answers[0], &r) != nil || len(r.Legs) != 1 || r.Legs[0].Link != c.ours {
		return nil
	}
	a, leg := c.t.Answer(q), r.Legs[0]
	switch {
	case !ok:
	case leg.Gateway.IsValid() && !labOverlay(leg.Gateway):
		return nil
	case leg.Gateway.IsValid() && a.Kind == Via && slices.ContainsFunc(a.Set.Gateways, func(g Gateway) bool { return g.Addr == leg.Gateway }),
		!leg.Gateway.IsValid() && a.Kind != Absent:
		c.claims++
		return nil
	}
	return fmt.Errorf("got %+v by %v, want %v among it", a, q, leg)
}

// hole says whether ENETUNREACH says nothing: a route that throws covers dst, so that the kernel goes past the shorter
// ones of its table, or an IPv6 route through a nexthop object does, of which the answer is not to be trusted: see Settle.
func (c *churn) hole(t *testing.T, dst netip.Addr) bool {
	family := uint8(unix.AF_INET)
	if dst.Is6() {
		family = unix.AF_INET6
	}
	for _, table := range c.t.cfg.Tables {
		for _, m := range c.dump(t, rtnl.GetFIB(family, table)) {
			var r kernel.FIBRoute
			if rtnl.DecodeFIBRoute(m, &r) == nil && r.Prefix.Contains(dst) &&
				(r.Type == unix.RTN_THROW || r.NextHop != 0 && dst.Is6()) {
				return true
			}
		}
	}
	return false
}

// want is what the kernel's route is for us. Legs of nexthop objects and their weights come from the objects (V14).
func (c *churn) want(r kernel.FIBRoute) (kind Kind, gateways []Gateway, ours bool) {
	legs := r.Legs
	if r.NextHop != 0 {
		legs = nil
		n := c.nextHops[r.NextHop]
		for _, member := range n.Group {
			leg := c.nextHops[member.ID].Leg
			leg.Weight = member.Weight
			legs = append(legs, leg)
		}
		if len(n.Group) == 0 {
			legs = []kernel.Leg{n.Leg}
		}
	}
	for _, leg := range legs {
		if leg.Link != c.ours {
			continue
		}
		ours = true
		switch {
		case leg.Dead:
		case leg.Gateway.IsValid() && labOverlay(leg.Gateway):
			kind, gateways = Via, append(gateways, Gateway{leg.Gateway, leg.Weight})
		case kind == Via:
		case leg.Gateway.IsValid():
			kind = Refused
		case kind == Absent:
			kind = OnLink
		}
	}
	return kind, gateways, ours && kind != Absent
}

func (c *churn) story(dst netip.Addr) string {
	var b strings.Builder
	var lines []string
	for _, line := range c.log {
		for i, p := range labPrefixes {
			if p.Contains(dst) && strings.Contains(line, " "+p.String()+" ") && slices.Index(labPrefixes, p) == i {
				lines = append(lines, line)
			}
		}
		if line == "resync" {
			lines = append(lines, line)
		}
	}
	b.WriteString(strings.Join(lines[max(0, len(lines)-60):], "\n"))
	for i, table := range c.t.cfg.Tables {
		for _, p := range labPrefixes {
			if p.Contains(dst) {
				for _, e := range c.t.open(keyOf(p, uint16(i))).chain {
					fmt.Fprintf(&b, "\nhave %v in %d: %+v %+v", p, table, e, c.t.shapes.all[e.shape].route)
				}
			}
		}
	}
	return b.String()
}

// TestKernelOracle: after random changes of the kernel's routes, nexthop objects, rules, links and addresses, packets that
// the kernel hands us get the kernel's own answer (kernel.md O1).
func TestKernelOracle(t *testing.T) {
	if *oracleSeed == 0 {
		*oracleSeed = uint64(time.Now().UnixNano())
	}
	length := *oracleLong
	if length == 0 {
		length = 10 * time.Second
	}
	if testing.Short() {
		length = 3 * time.Second
	}
	t.Logf("seed %d", *oracleSeed)
	end, total := time.Now().Add(length), [6]int{}
	for world := 0; world == 0 || time.Now().Before(end); world++ {
		c := &churn{r: rand.New(rand.NewPCG(*oracleSeed, uint64(world)))}
		t.Run(fmt.Sprint(world), func(t *testing.T) {
			c.lab = newLab(t, someTable, kernel.TableMain)
			c.readRules(t)
			for range 60 {
				for range 1 + c.r.IntN(20) {
					c.step()
				}
				if c.r.IntN(6) == 0 {
					c.upset(t)
				}
				c.quiet(t)
				c.check(t)
			}
		})
		for i, n := range []int{c.ops, c.done, c.probes, c.claims, c.misses, c.upsets} {
			total[i] += n
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("operations %d (%d carried out), probes %d (%d through us, %d misses), upsets %d: no mismatch", total[0], total[1], total[2], total[3], total[4], total[5])
}
