package overlay

import (
	"errors"
	"iter"
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

// many makes n routes, of both families and with and without gateways, all different.
func many(n int) []Route {
	sets := [][]Gateway{nil, via("10.42.0.2"), via("10.42.0.3", "10.42.0.4"), via("fd42::2")}
	routes := make([]Route, n)
	for i := range routes {
		r := &routes[i]
		if i%3 == 0 {
			b := [16]byte{0xfd, 0x09, 2: byte(i >> 16), 3: byte(i >> 8), 4: byte(i)}
			r.Prefix = netip.PrefixFrom(netip.AddrFrom16(b), 64)
		} else {
			r.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		}
		r.Via = sets[i%len(sets)]
	}
	return routes
}

// what a Reload of 100,000 routes sends (design.md law 5): nothing if nothing changed, and no look; one message for a route that
// comes or goes, none for gateways, two for an attribute or the metric in IPv4, four in IPv6.
func TestReloadIsMinimal(t *testing.T) {
	n := 100_000
	if testing.Short() || raceEnabled {
		n = 5_000
	}
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), Routes: many(n)}
	d := l.active(cfg)
	l.await("trust", d.isTrusted)
	const v6, v4 = 3, 4 // their places
	for _, test := range []struct {
		what   string
		change func(c *Config)
		want   string // messages, GETROUTE being the question who answers
	}{
		{"nothing", func(*Config) {}, ""},
		{"the order", func(c *Config) {
			rand.Shuffle(n, func(i, j int) { c.Routes[i], c.Routes[j] = c.Routes[j], c.Routes[i] })
		}, ""},
		{"and back", func(c *Config) { c.Routes = slices.Clone(cfg.Routes) }, ""},
		{"one more", func(c *Config) { c.Routes = append(c.Routes, Route{Prefix: netip.MustParsePrefix("12.0.0.0/8")}) }, "NEWROUTE GETROUTE"},
		{"one less", func(c *Config) { c.Routes = slices.Delete(c.Routes, n/2, n/2+1) }, "DELROUTE"},
		{"that again", func(c *Config) { c.Routes = slices.Insert(c.Routes, 7, cfg.Routes[n/2]) }, "NEWROUTE GETROUTE"},
		{"gateways", func(c *Config) { c.Routes[v4].Via, c.Routes[v6].Via = via("10.42.0.9", "10.42.0.8"), via("fd42::9") }, ""},
		{"steer only", func(c *Config) { c.Routes[v4].NoInstall = true }, "DELROUTE"},
		{"or not", func(c *Config) { c.Routes[v4].NoInstall = false }, "NEWROUTE GETROUTE"},
		{"MTU of IPv4", func(c *Config) { c.Routes[v4].MTU = 1299 }, "NEWROUTE DELROUTE GETROUTE"},
		{"MTU of IPv6", func(c *Config) { c.Routes[v6].MTU = 1299 }, "NEWROUTE DELROUTE NEWROUTE DELROUTE GETROUTE"},
		{"metric of IPv4", func(c *Config) { c.Routes[v4].Metric = 9 }, "NEWROUTE DELROUTE GETROUTE"},
		{"metric of IPv6", func(c *Config) { c.Routes[v6].Metric = 9 }, "NEWROUTE DELROUTE GETROUTE"},
		{"table", func(c *Config) { c.Routes[v4].Table = 77 }, "NEWROUTE DELROUTE"},
		{"the filter", func(c *Config) { c.NoFilter = true }, ""},
	} {
		cfg := d.cfg.clone()
		test.change(&cfg)
		m, remove := meddle(d)
		start := time.Now()
		l.reload(d, cfg)
		took := time.Since(start)
		remove()
		got := slices.DeleteFunc(m.log, func(name string) bool { return name == "GETLINK" }) // of one link, for its name
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: sent %v, want %v", test.what, got, test.want)
		}
		t.Logf("%s: %v, %d messages", test.what, took, len(m.log))
	}
	l.wantInForce(d)
}

// wantInForce compares the kernel with what the Config in force asks of it: its routes by a dump, and the tree with one built anew.
// What failed and is optional may be left to do.
func (l *lab) wantInForce(d *tunDevice) {
	l.Helper()
	want := desire(&d.cfg, d.index)
	have, err := d.observe(nil)
	l.must(err)
	lacking := execution{failed: d.past.lacks}
	if steps := lacking.pending(plan(have, &want)); len(steps) > 0 {
		l.Errorf("the kernel differs: %s", differences(steps))
	}
	have.routes = slices.DeleteFunc(have.routes, func(r kernel.Route) bool { return r.Prefix == netip.MustParsePrefix("fe80::/64") })
	if len(have.routes) != len(want.routes) {
		l.Errorf("%d routes, want %d", len(have.routes), len(want.routes))
	}
	var tree routeTree
	tree.replace(staticLayer(&d.cfg, &d.tree.pool))
	fresh := State{table: tree.current.Load()}
	next, stop := iter.Pull2(fresh.Routes())
	defer stop()
	for prefix, gateways := range d.State().Routes() {
		p, g, ok := next()
		if !ok || p != prefix || g != gateways {
			l.Fatalf("the tree has %v %v, want %v %v", prefix, gateways, p, g)
		}
	}
	if p, _, more := next(); more {
		l.Errorf("the tree lacks %v", p)
	}
}

// What stands in for an IPv6 route while its MTU changes takes a metric that no other route has, the unchanged included.
func TestReloadStandsInBesideOthers(t *testing.T) {
	l := newLab(t)
	p := netip.MustParsePrefix("fd09::/64")
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), Routes: []Route{{Prefix: p, Metric: 1023}, {Prefix: p}}}
	d := l.active(cfg)
	l.trusting(d)
	cfg.Routes = []Route{{Prefix: p, Metric: 1023}, {Prefix: p, MTU: 1290}}
	m, remove := meddle(d)
	l.reload(d, cfg)
	remove()
	if got, want := strings.Join(m.log, " "), "NEWROUTE DELROUTE NEWROUTE DELROUTE GETROUTE GETROUTE"; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	l.wantInForce(d)
}

// Where more than routes changes, or the very route of a network, Reload looks, however much it trusts what it knows: its messages
// for routes alone would not bring the new Config in force.
func TestReloadLooksWhereItMust(t *testing.T) {
	l := newLab(t)
	p, own4, own6 := netip.MustParsePrefix, netip.MustParsePrefix("10.42.0.0/24"), netip.MustParsePrefix("fd42::/64")
	base := Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), NoHeal: true,
		Routes: []Route{{Prefix: p("10.9.0.0/16"), MTU: 1500}, {Prefix: own4, MTU: 1290}, {Prefix: own6, MTU: 1290}, {Prefix: p("10.10.0.0/16")}},
	}
	d := l.active(base)
	l.ip("addr add 10.50.0.1/24 dev " + d.State().Name + " noprefixroute")
	for _, test := range []struct {
		what   string
		change func(c *Config)
	}{
		{"MTU", func(c *Config) { c.MTU = 1400 }}, // the device's stays
		{"a route's MTU", func(c *Config) { c.Routes[0].MTU = 1501 }},
		{"queue length", func(c *Config) { c.TxQueueLen = 77 }},
		{"link-local", func(c *Config) { c.LinkLocal = true }},
		{"networks", func(c *Config) { c.Networks = prefixes("10.42.0.2/24", "fd42::1/64") }},
		{"IPv4 network's route", func(c *Config) { c.Routes = slices.Delete(c.Routes, 1, 2) }},
		{"IPv6 network's route", func(c *Config) { c.Routes = slices.Delete(c.Routes, 2, 3) }},
		{"not installed", func(c *Config) { c.Routes[1].NoInstall = true }},
		{"another at the network's metric", func(c *Config) { c.Routes[2] = Route{Prefix: own6, Metric: 256} }},
		{"addresses", func(c *Config) { c.TakeAddresses = true }}, // the last: it takes the stranger's
	} {
		cfg := base.clone()
		test.change(&cfg)
		for _, c := range []Config{cfg, base} {
			l.trusting(d)
			if d.trust.contested {
				t.Fatal("it would look anyway")
			}
			l.reload(d, c)
			l.wantInForce(d)
			if t.Failed() {
				t.Fatal(test.what)
			}
		}
	}
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute", "fd42::1/64 proto 111 noprefixroute")
}

// Another's route through our device in the place of one of ours makes Reload look: ours is not there to be changed.
func TestReloadLooksWhereContested(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24"), NoHeal: true, Routes: []Route{routeTo("10.8.0.0/16")}}
	d := l.attachTo(cfg, "link set p0 mtu 1300 up\nroute add 10.8.0.0/16 dev p0 mtu 1300")
	l.must(d.Activate())
	l.trusting(d)
	if l.hasRoute(d, "10.8.0.0/16 table 254 metric 0 proto 111") {
		t.Fatal("the stranger's route does not do what ours would")
	}
	cfg.Name, cfg.Mode = "p0", Attach
	cfg.Routes = []Route{{Prefix: netip.MustParsePrefix("10.8.0.0/16"), MTU: 1290}}
	l.reload(d, cfg)
	l.want("routes", l.routes(d.index),
		"10.8.0.0/16 table 254 metric 0 proto 3 mtu 1300 mss 0",
		"10.8.0.0/16 table 254 metric 0 proto 111 mtu 1290 mss 1250",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1")
}

// A route that is there already, of a former run perhaps, need not be as the one that Reload adds: it looks.
func TestReloadLooksWhereHeld(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("fd42::1/64"), NoHeal: true}
	d := l.active(cfg)
	l.trusting(d)
	cfg.Routes = []Route{routeTo("fd09::/64")}
	former := kernel.Route{
		RouteKey: kernel.RouteKey{Prefix: cfg.Routes[0].Prefix, Table: kernel.TableMain, Metric: defaultMetricIPv6},
		Protocol: DefaultProtocol, Link: d.index, MTU: 1280,
	}
	first := true
	_, remove := meddle(d, func(m *meddler) {
		m.before = func(_ int, r rtnl.Message) {
			if first && r.Type == unix.RTM_NEWROUTE {
				first = false
				l.must(l.conn.Do(rtnl.AddRoute(former))[0].Err)
			}
		}
	})
	l.reload(d, cfg)
	remove()
	l.wantInForce(d)
}

// Where IPv6 is disabled the first Route that needs it is refused before the system is touched.
func TestReloadAsksBeforeFirstIPv6(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24"), NoHeal: true}
	d := l.active(cfg)
	l.setSysctl("ipv6/conf/"+d.State().Name+"/disable_ipv6", "1")
	cfg.NetNS, cfg.Routes = l.ns.Path(), []Route{routeTo("10.9.0.0/16"), routeTo("fd09::/64")}
	l.trusting(d)
	m, remove := meddle(d)
	err := d.Reload(cfg)
	remove()
	if changes := m.changes(); !errors.Is(err, ErrIPv6Disabled) || len(changes) > 0 {
		t.Errorf("error %v, sent %v", err, changes)
	}
	l.setSysctl("ipv6/conf/"+d.State().Name+"/disable_ipv6", "0")
	l.must(d.Reload(cfg))
	l.wantInForce(d)
}

// In IPv6 a Route for a network of ours is the connected route, metric 256, and one for the same prefix at 1024 is another, whatever
// Metric 0 means elsewhere. A Reload tells them apart, in whatever order they are.
func TestReloadTellsMetricsApart(t *testing.T) {
	l := newLab(t)
	own := netip.MustParsePrefix("fd42::/64")
	x, y, beside := routeTo("10.8.0.0/16"), routeTo("10.9.0.0/16"), Route{Prefix: own, Metric: 1024}
	cfg := Config{Networks: prefixes("fd42::1/64"), NoHeal: true}
	for _, connected := range []Route{{Prefix: own, MTU: 1280}, {Prefix: own, NoInstall: true}, {Prefix: own}} {
		orders := [][]Route{{beside, connected}, {x, connected, y}, {connected, beside, y}, {y, beside, x}, {x, connected}}
		d := l.active(cfg)
		l.trusting(d)
		for _, from := range orders {
			for _, to := range orders {
				for _, routes := range [][]Route{from, to} {
					next := cfg
					next.Routes = routes
					l.reload(d, next)
					l.wantInForce(d)
				}
				if t.Failed() {
					t.Fatalf("from %+v\nto %+v", from, to)
				}
			}
		}
		l.must(d.Close())
		l.alone()
	}
}

// A route that somebody adds while Reload adds the same, or removes while it removes it, makes Reload look: its end is what was
// asked, or an error.
func TestReloadIsMeddledWith(t *testing.T) {
	l := newLab(t)
	base := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), Routes: many(20)}
	next := base
	next.Routes = append(slices.Clone(base.Routes[5:]), Route{Prefix: netip.MustParsePrefix("12.0.0.0/8")}, Route{Prefix: netip.MustParsePrefix("fd12::/64")})
	for n := 1; ; n++ {
		l.reloadFresh(base, func(d *tunDevice) {
			reached := false
			m, remove := meddle(d, func(m *meddler) {
				m.before = func(op int, r rtnl.Message) {
					if op == n && (r.Type == unix.RTM_NEWROUTE || r.Type == unix.RTM_DELROUTE) {
						reached = true
						l.conn.Do(rtnl.Message{Type: r.Type, Flags: r.Flags &^ unix.NLM_F_ECHO, Body: slices.Clone(r.Body)})
					}
				}
			})
			l.reload(d, next)
			remove()
			if !reached && n <= len(m.log) {
				return
			}
			l.await("the kernel is as asked", func() bool { return l.converged(d) })
		})
		if n == 10 {
			return
		}
	}
}

// trusting reloads the Config in force until the device trusts what it knows: what the kernel announces late leaves it in doubt, and
// without healing nothing else looks.
func (l *lab) trusting(d *tunDevice) {
	l.Helper()
	l.await("trust", func() bool {
		l.must(d.Reload(d.cfg))
		return d.isTrusted()
	})
}

func (l *lab) converged(d *tunDevice) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := desire(&d.cfg, d.index)
	have, err := d.observe(nil)
	return err == nil && len(plan(have, &want)) == 0
}

// reloadFresh gives fn a device of its own.
func (l *lab) reloadFresh(cfg Config, fn func(d *tunDevice)) {
	l.Helper()
	d := l.active(cfg)
	l.await("trust", d.isTrusted)
	fn(d)
	l.must(d.Close())
	l.alone()
}
