package overlay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/nstest/oracle"
)

// disagreement is a destination of which RoutesFor does not say what it should, and since when.
type disagreement struct {
	got, want string
	since     time.Time
}

// settle waits until RoutesFor says of all destinations what the kernel says, and fails if one does not within a second of
// the kernel's last change of mind, also where the kernel announced nothing.
func (o *followOracle) settle() {
	o.Helper()
	o.agree(o.Destinations())
}

func (o *followOracle) agree(pending []netip.Addr) {
	o.Helper()
	seen := make(map[netip.Addr]disagreement)
	begun := time.Now()
	for len(pending) > 0 {
		verdicts, err := o.World.Ask(pending)
		o.must(err)
		now := time.Now()
		var still []netip.Addr
		for i, dst := range pending {
			got, want, ok := o.compare(dst, &verdicts[i])
			if ok {
				continue
			}
			still = append(still, dst)
			was, again := seen[dst]
			if !again || was.want != want {
				seen[dst] = disagreement{got, want, now}
			} else if now.Sub(was.since) > o.bound {
				o.Fatalf("seed %d, step %d: %v goes through %q, want %q\n%+v\n%s\n%s\n%v", *seed, o.Steps, dst, got, want, verdicts[i],
					strings.Join(o.story, "\n"), o.routesAround(dst), o.d.State())
			}
		}
		if pending = still; len(pending) > 0 {
			time.Sleep(time.Millisecond)
		}
	}
	o.slowest = max(o.slowest, time.Since(begun))
}

// compare counts a probe, and says whether RoutesFor agrees.
func (o *followOracle) compare(dst netip.Addr, v *oracle.Verdict) (got, want string, ok bool) {
	list := o.want(dst, v)
	got = ordered(strings.Fields(routeOf(o.d, dst.String())))
	if !agrees(got, list) {
		if hole, err := o.World.Hole(dst); v.Kind != oracle.Miss || err != nil || !hole {
			return got, fmt.Sprint(list), false
		}
	}
	switch o.probes++; {
	case v.Kind == oracle.Miss:
		o.misses++
	case v.Own:
		o.own++
	case len(list) > 0:
		o.claims++
	}
	return got, "", true
}

// routesAround is what ip(8) shows of the routes around a destination.
func (o *followOracle) routesAround(dst netip.Addr) string {
	family := "-4"
	if dst.Is6() {
		family = "-6"
	}
	var b strings.Builder
	for line := range strings.Lines(o.ns.Run(o.T, "ip -d "+family+" route show table all")) {
		for _, field := range strings.Fields(line)[:2] {
			p, err := netip.ParsePrefix(field)
			if err != nil {
				if a, err := netip.ParseAddr(field); err == nil {
					p = netip.PrefixFrom(a, a.BitLen())
				}
			}
			if p.Contains(dst) || field == "default" || field == "nexthop" {
				b.WriteString(line)
			}
		}
	}
	return b.String() + o.ns.Run(o.T, "ip nexthop") + o.ns.Run(o.T, "ip "+family+" rule") + fmt.Sprintf("%+v\n", o.cfg.Routes)
}

// churn makes some steps.
func (o *followOracle) churn(most int) {
	for range 1 + o.IntN(most) {
		o.Step()
	}
}

// upset does what takes routes away untold, or changes them, with churn in the middle.
func (o *followOracle) upset() {
	o.upsets++
	dev := oracle.OneOf(o.Rand, "DEV", "other")
	switch o.IntN(16) {
	case 0, 1:
		o.do("link set " + dev + " down")
		o.churn(5)
		if o.IntN(2) == 0 {
			o.settle()
		}
		o.churn(5)
		o.do("link set " + dev + " up")
	case 2:
		for range 1 + o.IntN(5) {
			o.do("link set "+dev+" down", "link set "+dev+" up")
			o.churn(2)
		}
	case 3:
		o.do("address del " + oracle.Own4.String() + " dev DEV")
		o.churn(5)
	case 4:
		o.do("address del " + oracle.Own6.String() + " dev DEV")
		o.churn(5)
	case 5:
		o.do("address flush dev other")
		o.churn(5)
	case 6:
		o.do("link set DEV mtu " + oracle.OneOf(o.Rand, "1300", "1400", "1500"))
		return
	case 7:
		o.do("link set DEV mtu 1200")
		o.churn(5)
		o.do("link set DEV mtu 1400")
	case 8:
		o.sysctl("ipv4/nexthop_compat_mode", oracle.OneOf(o.Rand, "0", "1"))
		return
	case 9:
		o.rule()
		return
	case 10:
		o.do("route flush dev "+dev, "-6 route flush dev "+dev)
	case 11:
		o.rename()
		return
	case 12:
		o.replaceOther()
	case 13:
		o.carrier()
		return
	case 14, 15:
		o.reloads()
		return
	}
	o.churn(3)
	if o.cfg.NoHeal || o.IntN(2) == 0 {
		o.restore()
	}
}

func (o *followOracle) sysctl(name, value string) {
	o.note("%s = %s", name, value)
	o.ns.Run(o.T, "sysctl", "-qw", "net."+strings.ReplaceAll(name, "/", ".")+"="+value)
}

// rule has other rules look at the tables.
func (o *followOracle) rule() {
	all := func(verb string) {
		for _, rule := range o.rules {
			o.do("-4 rule "+verb+" "+rule, "-6 rule "+verb+" "+rule)
		}
	}
	all("del")
	o.rules = oracle.OneOf(o.Rand, nil, []string{"pref 1000 table 100"}, []string{"pref 900 fwmark 1 table main", "pref 1000 table 100"},
		[]string{"pref 900 goto 1100", "pref 1000 table 100", "pref 1100 table main"},
		[]string{"pref 1000 to 192.0.2.64/26 table 100", "pref 1000 to 2001:db8:0:2::/63 table 100"}) // each of one family
	all("add")
}

func (o *followOracle) rename() {
	name := "else" + fmt.Sprint(o.upsets)
	o.do("link set DEV name " + name)
	o.name = name
}

// replaceOther deletes the other interface; another has its name then.
func (o *followOracle) replaceOther() {
	o.note("the other interface is deleted")
	o.must(o.other.Close())
	o.await("its end", func() bool { _, err := o.ns.TryRun("ip link show other"); return err != nil })
	o.churn(5)
	o.makeOther()
	o.note("and made again")
}

// carrier goes and comes, while a device without counts, or does not (kernel.md V15).
func (o *followOracle) carrier() {
	o.sysctl("ipv4/conf/"+o.name+"/ignore_routes_with_linkdown", oracle.OneOf(o.Rand, "0", "1"))
	o.sysctl("ipv6/conf/"+o.name+"/ignore_routes_with_linkdown", oracle.OneOf(o.Rand, "0", "1"))
	o.do("link set DEV carrier off")
	o.churn(3)
	o.settle()
	o.do("link set DEV carrier on")
}

// reloads changes the Config's routes, or ends the following and begins it anew.
func (o *followOracle) reloads() {
	o.cfg.Routes = o.routes()
	o.note("reload %+v", o.cfg.Routes)
	if o.IntN(4) == 0 {
		silent := o.cfg
		silent.SystemRoutes = nil
		o.reload(o.d, silent)
		o.churn(3)
	}
	next := o.cfg
	next.NetNS = o.ns.Path()
	done := make(chan error, 1)
	go func() { done <- o.d.Reload(next) }() // beside others' changes (kernel.md A22)
	o.churn(10)
	if err := <-done; err != nil {
		o.Fatalf("seed %d, step %d: %v\n%s\n%s", *seed, o.Steps, err, strings.Join(o.story, "\n"),
			o.ns.Run(o.T, "sh", "-c", "ip -d -4 route show table all; ip -d -6 route show table all; ip nexthop"))
	}
}

// What the kernel does with packets to our interface, RoutesFor says, whatever befalls routes, nexthop objects, rules, links and
// addresses, and whether or not the device puts back what is its own (kernel.md O1).
func TestFollowOracle(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	length := *long
	if length == 0 {
		length = 10 * time.Second
	}
	if testing.Short() {
		length = 3 * time.Second
	}
	t.Logf("seed %d", *seed)
	end, total, slowest := time.Now().Add(length), [8]int{}, time.Duration(0)
	for world := 0; world < 2 || time.Now().Before(end); world++ {
		var o *followOracle
		t.Run(fmt.Sprint(world), func(t *testing.T) {
			o = newFollowOracle(t, world)
			for range 40 {
				o.churn(20)
				if o.IntN(3) == 0 {
					o.upset()
				}
				o.settle()
				if o.IntN(4) == 0 {
					o.endToEnd()
				}
			}
		})
		if t.Failed() {
			return
		}
		for i, n := range []int{o.Steps, o.Done, o.probes, o.claims, o.misses, o.own, o.upsets, o.packets} {
			total[i] += n
		}
		slowest = max(slowest, o.slowest)
	}
	t.Logf("operations %d (%d carried out), probes %d (%d by the kernel's routes, %d by ours, %d misses), upsets %d, packets %d: no mismatch; agreed after %v at most",
		total[0], total[1], total[2], total[3], total[5], total[4], total[6], total[7], slowest)
}
