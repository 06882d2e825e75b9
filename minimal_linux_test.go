package overlay

import (
	"iter"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

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
func (l *lab) wantInForce(d *tunDevice) {
	l.Helper()
	want := desire(&d.cfg, d.index)
	have, err := d.observe(nil)
	l.must(err)
	if steps := plan(have, &want); len(steps) > 0 {
		l.Errorf("the kernel differs: %s", differences(steps))
	}
	if len(have.routes) != len(want.routes) {
		l.Errorf("%d routes, want %d", len(have.routes), len(want.routes))
	}
	var tree routeTree
	tree.replace(staticLayer(&d.cfg, &d.tree.pool, nil))
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
