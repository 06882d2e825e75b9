package overlay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/fib"
	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// silentCase is a change of which the kernel announces less than what follows from it for the routes through the device.
type silentCase struct {
	name, before, lines string
	addr, was, want     string
}

// firstLegElsewhere makes an IPv6 multipath whose first leg leads through another interface, and between its legs a route that
// answers while that leg is dead.
const firstLegElsewhere = "-6 route add fd09::/64 via fd41::9 dev other0 onlink metric 50\n-6 route append fd09::/64 dev DEV metric 50\n" +
	"-6 route append fd09::/64 via fd42::9 dev DEV metric 50"

// What follows untold from what befalls links, addresses, nexthop objects and settings, RoutesFor says within a second, without
// healing: nobody else may bring it to light.
func TestFollowUntold(t *testing.T) {
	for _, test := range []silentCase{
		{"A7 link down", "route add 10.9.0.0/16 via 10.42.0.9", "link set DEV down", "10.9.1.1", "10.42.0.9", "none"},
		{"A7 IPv6 link down", "-6 route add fd09::/64 via fd42::9", "link set DEV down", "fd09::1", "fd42::9", "none"},
		{"A8 one of two addresses", "addr add 10.42.0.7/24 dev DEV\nroute add 10.9.0.0/16 via 10.42.0.9", "addr del 10.42.0.7/24 dev DEV", "10.9.1.1", "10.42.0.9", "10.42.0.9"},
		{"A8 the last address", "route add 10.9.0.0/16 via 10.42.0.9", "addr del 10.42.0.1/24 dev DEV", "10.9.1.1", "10.42.0.9", "none"},
		{"A8 IPv6 keeps them", "-6 route add fd09::/64 via fd42::9", "addr del fd42::1/64 dev DEV", "fd09::1", "fd42::9", "fd42::9"},
		{"A8 the preferred source", "addr add 10.1.0.7/24 dev other0\nroute add 10.9.0.0/16 via 10.42.0.9 src 10.1.0.7", "addr del 10.1.0.7/24 dev other0", "10.9.1.1", "10.42.0.9", "none"},
		{"A14 nexthop object", "nexthop add id 1 via 10.42.0.9 dev DEV\nroute add 10.9.0.0/16 nhid 1", "nexthop del id 1", "10.9.1.1", "10.42.0.9", "none"},
		{"A14 nexthop objects flushed", "nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 group 1\nroute add 10.9.0.0/16 nhid 2", "nexthop flush", "10.9.1.1", "10.42.0.9", "none"},
		{"V15 the carrier goes where that counts", "SYSCTL\nroute add 10.9.0.0/16 via 10.42.0.9", "link set DEV carrier off", "10.9.1.1", "10.42.0.9", "none"},
		{"V15 the carrier goes, which starts to count", "link set DEV carrier off\nroute add 10.9.0.0/16 via 10.42.0.9", "SYSCTL", "10.9.1.1", "10.42.0.9", "none"},
		{"V15 the carrier goes where nobody minds", "route add 10.9.0.0/16 via 10.42.0.9", "link set DEV carrier off", "10.9.1.1", "10.42.0.9", "10.42.0.9"},
		{"B7 a small MTU takes IPv6", "-6 route add fd09::/64 via fd42::9", "link set DEV mtu 1200", "fd09::1", "fd42::9", "none"},
		{"an IPv6 route expires", "-6 route add fd09::/64 via fd42::9\n-6 route add fd09::/65 via fd42::10 expires 2", "", "fd09::1", "fd42::10", "fd42::9"},
		{
			"another link's down takes what stood before", "route add 10.9.0.0/16 via 10.42.0.9\nroute prepend 10.9.0.0/16 via 10.1.0.9",
			"link set other0 down\nlink set other0 up\nroute replace 10.9.0.0/16 via 10.42.0.10\nroute del 10.9.0.0/16 via 10.42.0.10", "10.9.1.1", "10.42.0.9", "none",
		},
		{
			"another link's down takes its nexthop objects", "nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 via 10.1.0.9 dev other0\nnexthop add id 3 group 1/2\nroute add 10.9.0.0/16 nhid 3",
			"link set other0 down\nnexthop add id 2 via 10.42.0.10 dev DEV", "10.9.1.1", "10.42.0.9", "10.42.0.9",
		},
		{
			"another link's end takes its nexthop objects", "nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 via 10.1.0.9 dev other0\nnexthop add id 3 group 1/2\nroute add 10.9.0.0/16 nhid 3",
			"link del other0\nnexthop add id 2 via 10.42.0.10 dev DEV", "10.9.1.1", "10.42.0.9", "10.42.0.9",
		},
		{
			"another link's last address takes what stood before", "route add 10.9.0.0/16 via 10.42.0.9\nroute prepend 10.9.0.0/16 via 10.1.0.9",
			"addr del 10.1.0.1/24 dev other0\nroute replace 10.9.0.0/16 via 10.42.0.10\nroute del 10.9.0.0/16 via 10.42.0.10", "10.9.1.1", "10.42.0.9", "none",
		},
		{"another link's down, of which the first leg is", firstLegElsewhere, "link set other0 down", "fd09::1", "fd42::9", "on-link"},
		{"another link's up, of which the first leg is", firstLegElsewhere + "\nlink set other0 down", "link set other0 up", "fd09::1", "on-link", "fd42::9"},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(newLab(t)) })
	}
	for _, test := range []silentCase{
		{"A7 IPv6 without announcements", "-6 route add fd09::/64 via fd42::9", "link set DEV down", "fd09::1", "fd42::9", "none"},
		{"B7 without announcements", "addr del fd42::1/64 dev DEV\n-6 route add fd09::/64 dev DEV", "link set DEV mtu 1200", "fd09::1", "on-link", "none"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLab(t, nstest.InitUserNS) // the setting is not in others (kernel.md V20)
			l.ns.Run(t, "sysctl", "-qw", "net.ipv6.route.skip_notify_on_dev_down=1")
			test.run(l)
		})
	}
}

func (c silentCase) run(l *lab) {
	l.ns.OtherTun(l, "other0", "10.1.0.1/24")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	l.event(d, EventResynced)
	c.do(l, d, "link set DEV alias x") // the first that is heard of a link is news in any case
	l.event(d, EventResynced)
	c.do(l, d, c.before)
	l.wantRoute(d, c.addr, c.was)
	c.do(l, d, c.lines)
	if c.want == c.was { // nothing is to change: look when all has been heard
		l.ip("route add 10.11.0.0/16 via 10.42.0.9 dev " + d.State().Name)
		l.wantRoute(d, "10.11.0.1", "10.42.0.9")
	}
	if took := l.wantRoute(d, c.addr, c.want); took > leeway*time.Second {
		l.Errorf("after %v", took)
	}
}

// do runs lines of ip(8) one after the other; SYSCTL makes a lost carrier count.
func (c silentCase) do(l *lab, d Device, lines string) {
	l.Helper()
	name := d.State().Name
	for line := range strings.Lines(lines) {
		if line = strings.TrimSpace(line); line == "SYSCTL" {
			l.ns.Run(l, "sysctl", "-qw", "net.ipv4.conf."+name+".ignore_routes_with_linkdown=1")
		} else {
			l.ip(strings.ReplaceAll(line, "DEV", name))
		}
	}
}

// A dump too tells when a route goes out of use, and of one that has the kernel lists it still.
func TestFollowExpiresWhatIsThere(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\naddr add fd42::1/64 dev p0 nodad\nlink set p0 up\nroute add fd09::/64 via fd42::9 dev p0\n" +
		"route add fd09::/65 via fd42::10 dev p0 expires 3")
	d := l.active(Config{Name: "p0", Mode: Attach, Networks: prefixes("fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	l.event(d, EventResynced)
	begun := time.Now()
	l.wantRoute(d, "fd09::1", "fd42::10")
	l.wantRoute(d, "fd09::1", "fd42::9")
	if took := time.Since(begun); took > 3*time.Second+leeway*time.Second {
		t.Errorf("after %v", took)
	}
	if routes := l.ip("-6 route show fd09::/65"); !strings.Contains(routes, "expires") {
		t.Errorf("the kernel has cleared it away already:\n%s", routes)
	}
	d.follower.resync(errLink)
	l.event(d, EventResynced)
	l.wantRoute(d, "fd09::1", "fd42::9")
}

// What no dump shows, because it stands between the legs of another interface's multipath, is learned when that goes, and what
// stands behind a stranger there, when that goes too.
func TestFollowBehindStrangers(t *testing.T) {
	const strangers = "route add fd09::/64 via fd41::9 dev other0 onlink metric 50\nroute append unreachable fd09::/64 metric 50\n" +
		"route append fd09::/64 dev p0 metric 50\nroute append fd09::/64 via fd41::10 dev other0 onlink metric 50"
	for name, lines := range map[string]string{
		"leg by leg":    "route del fd09::/64 via fd41::9 dev other0 metric 50\nroute del fd09::/64 via fd41::10 dev other0 metric 50",
		"all at once":   "route del fd09::/64 proto boot metric 50",
		"the link down": "link set other0 down",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.ns.OtherTun(l, "other0", "10.1.0.1/24")
			l.ip("tuntap add p0 mode tun\naddr add fd42::1/64 dev p0 nodad\nlink set p0 up\n" + strangers)
			d := l.active(Config{Name: "p0", Mode: Attach, Networks: prefixes("fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
			l.event(d, EventResynced)
			l.ip(lines)
			l.ip("route del unreachable fd09::/64 metric 50")
			if took := l.wantRoute(d, "fd09::1", "on-link"); took > leeway*time.Second {
				t.Errorf("after %v", took)
			}
		})
	}
}

// What the first dump does not show may be what answers: the kernel prefers it to the multipath that hides it.
func TestFollowPreferredBehindMultipath(t *testing.T) {
	for name, via := range map[string]string{"ours": "via fd42::%d dev p0", "others'": "via fd41::%d dev other0 onlink"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.ns.OtherTun(l, "other0", "10.1.0.1/24")
			l.ip("tuntap add p0 mode tun\naddr add fd42::1/64 dev p0 nodad\nlink set p0 up\n" +
				"route add fd09::/64 " + fmt.Sprintf(via, 8) + " metric 50\nroute append fd09::/64 dev p0 metric 50 pref high\n" +
				"route append fd09::/64 " + fmt.Sprintf(via, 9) + " metric 50")
			d := l.active(Config{Name: "p0", Mode: Attach, Networks: prefixes("fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
			l.event(d, EventResynced)
			l.wantRoute(d, "fd09::1", "on-link")
		})
	}
}

// The kernel announces the end of a nexthop object before it takes the routes away that lead through it, which it does not announce: who
// asks in between is told of a route that is about to go (net/ipv4/nexthop.c, remove_nexthop).
func TestFollowNextHopAboutToGo(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	l.event(d, EventResynced)
	gateway := netip.MustParseAddr("10.42.0.9")
	d.tree.mu.Lock()
	d.follower.layer.table.Apply(kernel.Created, &kernel.FIBRoute{
		Prefix: netip.MustParsePrefix("10.9.0.0/16"), Table: kernel.TableMain, Type: kernel.TypeUnicast, NextHop: 7,
		Legs: []kernel.Leg{{Gateway: gateway, Link: int32(d.index), Weight: 1}},
	})
	if a := d.follower.layer.table.Answer(netip.MustParsePrefix("10.9.0.0/16")); a.Kind != fib.Via {
		t.Errorf("got %+v, want it through the gateway at first", a)
	}
	d.tree.mu.Unlock()
	l.ip("route add 10.8.0.0/16 via 10.42.0.8 dev " + d.State().Name) // wakes the follower
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	l.wantRoute(d, "10.9.0.1", "none")
}

// What a Reload installs counts in the kernel's order: a route that stands behind ours is not in force.
func TestFollowBehindOurs(t *testing.T) {
	l := newLab(t)
	cfg := following1()
	cfg.Routes = nil
	d := l.active(cfg)
	l.event(d, EventResynced)
	l.reload(d, following1())
	l.ip("route append 10.8.0.0/16 via 10.42.0.9 dev " + d.State().Name + "\nroute add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9") // all is heard
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	l.ip("route prepend 10.8.0.0/16 via 10.42.0.10 dev " + d.State().Name)
	l.wantRoute(d, "10.8.0.1", "10.42.0.10")
}

// A table that the rules look at before ours answers for what it covers, be its prefix shorter.
func TestFollowEarlierTable(t *testing.T) {
	l := newLab(t)
	l.ip("rule add pref 1000 table 100")
	cfg := following1()
	cfg.SystemRoutes = &SystemRoutes{Tables: []int{100, 254}}
	cfg.Routes = append(cfg.Routes, Route{Prefix: netip.MustParsePrefix("10.7.0.0/16"), Via: via("10.42.0.7"), NoInstall: true})
	d := l.active(cfg)
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	l.ip("route add 10.0.0.0/8 via 10.42.0.9 table 100 metric 500")
	l.wantRoute(d, "10.99.0.1", "10.42.0.9")
	l.wantRoute(d, "10.8.0.1", "10.42.0.9")
	l.wantRoute(d, "10.7.0.1", "10.42.0.7") // of which the kernel knows nothing
	l.ip("route del 10.0.0.0/8 table 100")
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
}

// What was learned goes from the tree with the following, also what had gone from the kernel just before (kernel.md A22).
func TestFollowEndsAtOnce(t *testing.T) {
	l := newLab(t)
	d := l.active(following1())
	silent := following1()
	silent.SystemRoutes = nil
	add := gatewayRoutes(1, d.index)[0]
	del := add
	del.Type, del.Flags = unix.RTM_DELROUTE, 0
	addr := hostRoute(0).Addr().String()
	for range 10 {
		l.must(l.conn.Do(add)[0].Err)
		l.wantRoute(d, addr, "10.42.0.2")
		l.must(l.conn.Do(del)[0].Err) // so soon after a publication the next one is still to come
		l.reload(d, silent)
		if got := routeOf(d, addr); got != "none" {
			t.Fatalf("nothing is followed, and %s goes through %s", addr, got)
		}
		l.reload(d, following1())
	}
}

// What was learned of a table goes with a Reload that names it no more, and the rest stays.
func TestFollowFewerTables(t *testing.T) {
	l := newLab(t)
	cfg := following1()
	cfg.SystemRoutes = &SystemRoutes{Tables: []int{254, 100}}
	d := l.active(cfg)
	l.ip("rule add pref 1000 table 100\nroute add 10.9.0.0/16 via 10.42.0.9\nroute add 10.7.0.0/16 via 10.42.0.9 table 100")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	l.wantRoute(d, "10.7.0.1", "10.42.0.9")
	l.reload(d, following1())
	l.wantRoute(d, "10.7.0.1", "none")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
}

// Where two tables have an answer it is the kernel's for packets without mark, TOS and source that is given, whatever other
// rules there are; what only other packets are looked up in answers where those others do not.
func TestFollowRules(t *testing.T) {
	tests := make(map[string]func(*lab))
	for _, test := range []struct{ rules, both, first string }{ // what is said where both tables have a route, and where only 100 has
		{"rule add pref 1000 table 100", "10.42.0.10", "10.42.0.11"},
		{"rule add pref 1000 fwmark 1 table 100", "10.42.0.9", "10.42.0.11"},
		{"rule add pref 1000 fwmark 1 table main\nrule add pref 2000 table 100", "10.42.0.10", "10.42.0.11"},
		{"rule add pref 1000 fwmark 0/0xff table 100", "10.42.0.10", "10.42.0.11"},
		{"rule add pref 1000 not fwmark 1 table 100", "10.42.0.10", "10.42.0.11"},
		{"rule add pref 1000 from 10.77.0.0/16 table 100", "10.42.0.9", "10.42.0.11"},
		{"rule add pref 1000 tos 0x10 table 100", "10.42.0.9", "10.42.0.11"},
		{"rule add pref 1000 iif other0 table 100", "10.42.0.9", "10.42.0.11"},
		{"rule add pref 1000 to 10.9.0.0/20 table 100", "10.42.0.10", "none"},
		{"rule add pref 1000 to 10.77.0.0/16 table 100", "10.42.0.9", "none"},
		{"rule add pref 1000 iif lo table 100", "10.42.0.10", "10.42.0.11"},
		{"rule add pref 2000 table main\nrule add pref 1500 table 100\nrule add pref 1000 goto 2000", "10.42.0.9", "none"},
		{"rule add pref 2000 table main\nrule add pref 1500 table 100\nrule add pref 1000 goto 2000 fwmark 1", "10.42.0.10", "10.42.0.11"},
	} {
		tests[test.rules] = func(l *lab) {
			l.ns.OtherTun(l, "other0", "10.1.0.1/24")
			cfg := following1()
			cfg.SystemRoutes = &SystemRoutes{Tables: []int{100, 254}}
			d := l.active(cfg)
			l.ip(strings.ReplaceAll(test.rules+`
route add 10.9.0.0/16 via 10.42.0.9
route add 10.9.0.0/16 via 10.42.0.10 dev DEV table 100
route add 10.7.0.0/16 via 10.42.0.11 dev DEV table 100
route add 10.6.0.0/16 via 10.42.0.9`, "DEV", d.State().Name))
			l.wantRoute(d, "10.6.0.1", "10.42.0.9") // the routes are heard
			if took := l.wantRoute(d, "10.9.0.1", test.both) + l.wantRoute(d, "10.7.0.1", test.first); took > leeway*time.Second {
				l.Errorf("after %v", took)
			}
		}
	}
	together(t, tests)
}
