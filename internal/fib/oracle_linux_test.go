package fib

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest/oracle"
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
	*oracle.Churn
	claims  int // probes answered through our interface
	misses  int // probes answered by no route
	probes  int
	upsets  int
	ordered bool
	told    map[netip.Prefix]Answer // by Changes
}

// upset changes what silently takes routes away, then looks again.
func (c *churn) upset(t *testing.T) {
	c.upsets++
	switch n := c.IntN(6); n {
	case 0, 1:
		dev := oracle.OneOf(c.Rand, "ours", "other")
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
		c.sysctl(t, "ipv4/nexthop_compat_mode", oracle.OneOf(c.Rand, "0", "1"))
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
		c.ns.Run(t, "ip link set ours mtu "+oracle.OneOf(c.Rand, "1400", "1500"))
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

// check asks the kernel about all destinations and compares.
func (c *churn) check(t *testing.T) {
	t.Helper()
	destinations := c.Destinations()
	verdicts, err := c.Ask(destinations)
	if err != nil {
		t.Fatal(err)
	}
	for p, a := range c.t.Changes() {
		c.told[p] = a
	}
	for _, p := range c.Prefixes {
		if a := c.t.Answer(p); a != c.told[p] {
			t.Fatalf("seed %d, operation %d: %v: Changes told %v, and it is %v\n%s", *oracleSeed, c.Steps, p, c.told[p], a, c.story(p.Addr()))
		}
	}
	for i, dst := range destinations {
		c.probes++
		if err := c.compare(dst, &verdicts[i]); err != nil {
			t.Fatalf("seed %d, operation %d: %v: %v\n%s", *oracleSeed, c.Steps, dst, err, c.story(dst))
		}
	}
}

func (c *churn) compare(dst netip.Addr, v *oracle.Verdict) error {
	q, ok := c.longest(dst)
	a, r := c.t.Answer(q), &v.Route
	switch {
	case v.Kind == oracle.Miss:
		c.misses++
		if !ok {
			return nil
		}
		if hole, err := c.Hole(dst); err != nil || hole {
			return err
		}
		return fmt.Errorf("got %+v by %v, want a miss", a, q)
	case v.Kind == oracle.NoClaim:
		return nil
	case v.Kind == oracle.Among:
		c.claims++
		if hop := v.Hops[0].Addr; hop.IsValid() && (a.Kind != Via || !slices.ContainsFunc(a.Set.Gateways, func(g Gateway) bool { return g.Addr == hop })) ||
			a.Kind == Absent {
			return fmt.Errorf("got %+v by %v, want %v among it", a, q, hop)
		}
		return nil
	case v.Own:
		if a.Kind != Absent && a.Metric == r.Metric && a.Table == r.Table && a.First && q == r.Prefix {
			return fmt.Errorf("got %+v before our own %+v", a, r)
		}
		return nil
	}
	c.claims++
	kind := map[oracle.Kind]Kind{oracle.OnLink: OnLink, oracle.Via: Via, oracle.Refused: Refused}[v.Kind]
	var gateways []Gateway
	for _, hop := range v.Hops {
		gateways = append(gateways, Gateway(hop))
	}
	if q != r.Prefix && c.t.throws == 0 && !a.Over || a.Kind != kind || a.Metric != r.Metric || a.Table != r.Table || kind == Via && !sameGateways(a.Set.Gateways, gateways) || !a.First {
		var have []Gateway
		if a.Set != nil {
			have = a.Set.Gateways
		}
		return fmt.Errorf("got %+v %v by %v,\nwant kind %d %v by %s", a, have, q, kind, gateways, tell(kernel.Refreshed, *r))
	}
	return nil
}

func (c *churn) story(dst netip.Addr) string {
	var b strings.Builder
	var lines []string
	for _, line := range c.log {
		for i, p := range c.Prefixes {
			if p.Contains(dst) && strings.Contains(line, " "+p.String()+" ") && slices.Index(c.Prefixes, p) == i {
				lines = append(lines, line)
			}
		}
		if line == "resync" {
			lines = append(lines, line)
		}
	}
	b.WriteString(strings.Join(lines[max(0, len(lines)-60):], "\n"))
	for i, table := range c.t.cfg.Tables {
		for _, p := range c.Prefixes {
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
		c := &churn{told: make(map[netip.Prefix]Answer), Churn: &oracle.Churn{Protocol: ourProto, Rand: rand.New(rand.NewPCG(*oracleSeed, uint64(world)))}}
		c.Prefixes = [][]netip.Prefix{oracle.All, oracle.All, oracle.Few(false), oracle.Few(true)}[world%4]
		t.Run(fmt.Sprint(world), func(t *testing.T) {
			c.lab = newLab(t, someTable, kernel.TableMain)
			c.Churn.World = &c.lab.World
			c.readRules(t)
			for range 60 {
				for range 1 + c.IntN(20) {
					c.Step()
				}
				if c.IntN(6) == 0 {
					c.upset(t)
				}
				c.quiet(t)
				c.check(t)
			}
		})
		for i, n := range []int{c.Steps, c.Done, c.probes, c.claims, c.misses, c.upsets} {
			total[i] += n
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("operations %d (%d carried out), probes %d (%d through us, %d misses), upsets %d: no mismatch", total[0], total[1], total[2], total[3], total[4], total[5])
}
