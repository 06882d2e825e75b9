package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

// A device that an administrator prepared completely needs no privilege: an ordinary user who owns it starts on it, twice,
// and is told what could not be hardened (kernel.md U25, V11; design.md law 11).
func TestUnprivilegedOnPreparedDevice(t *testing.T) {
	l := newLab(t, nstest.SecondUID, nstest.Mknod)
	l.ip(`tuntap add prepared mode tun user 1000
		link set prepared mtu 1300
		addr add 10.42.0.1/24 dev prepared
		addr add fd42::1/64 dev prepared
		link set prepared up
		route add 10.9.0.0/16 dev prepared`)
	cfg := Config{
		Name: "prepared", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64"),
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16")}},
	}
	user := nstest.HelperOptions{UID: 1000, Tun: nstest.TunPublic}
	// The queue of an ordinary user gives the link its carrier, and so the address that the kernel makes.
	d := l.open(cfg)
	l.ready(d)
	d.Close()
	before := linkUnknowing(l.kernelState())
	for range 2 {
		out := l.device(cfg, user)
		for _, text := range []string{"activate: <nil>", "set ipv4/send_redirects=0: operation not permitted", "set ipv6/accept_ra=0: permission denied"} {
			if !strings.Contains(out, text) {
				t.Errorf("no %q in\n%s", text, out)
			}
		}
		if strings.Count(out, "event degraded") != 1 || strings.Contains(out, "event shadowed") {
			t.Errorf("events in\n%s", out)
		}
	}
	l.want("the device", linkUnknowing(l.kernelState()), before...)

	// What is missing cannot be added, and says so.
	cfg.Networks = append(cfg.Networks, netip.MustParsePrefix("10.43.0.1/24"))
	out := l.device(cfg, user)
	if want := "activate: overlay: activate prepared: add address 10.43.0.1/24: operation not permitted (needs CAP_NET_ADMIN)"; !strings.Contains(out, want) {
		t.Errorf("no %q in\n%s", want, out)
	}
	l.want("the device", linkUnknowing(l.kernelState()), before...)
}

// The kernel's own prefix route of an address that an administrator gave stays where its MTU is right; where it is wrong ours
// takes its place (kernel.md V11).
func TestKernelPrefixRouteGivesWay(t *testing.T) {
	l := newLab(t)
	prepare := `tuntap add p0 mode tun
		link set p0 mtu 1400
		addr add 10.42.0.1/24 dev p0
		addr add fd42::1/64 dev p0 nodad
		link set p0 up`
	l.ip(prepare)
	d := l.open(Config{Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400})
	l.must(d.Activate())
	l.want("routes with the right MTU", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 2 mtu 0 mss 0 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 2 mtu 0 mss 0")
	// The device grows for another route, and the networks' MTU stays.
	cfg := Config{
		Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400,
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1500}},
	}
	l.reload(d, cfg)
	l.want("routes with the wrong MTU", l.routes(d.index),
		"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1500 mss 1460",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1400 mss 1340")
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 0", "fd42::1/64 proto 0")
	// When the link has been down the kernel's route is back.
	l.ip("link set p0 down\nlink set p0 up")
	l.must(d.Activate())
	l.want("routes after a link bounce", l.routes(d.index),
		"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1500 mss 1460",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1400 mss 1340")
}

// The kernel's prefix route of an administrator's address in a network of ours is his, whatever its MTU: it stays, an event names
// it, and when a later run has swept ours his address still leads to its network (kernel.md V11; design.md law 4).
func TestStrangersPrefixRouteStays(t *testing.T) {
	l := newLab(t)
	l.ip(`tuntap add p0 mode tun
		link set p0 mtu 1500
		addr add 10.42.0.7/24 dev p0
		addr add fd42::7/64 dev p0 nodad
		link set p0 up`)
	index := l.index("p0")
	before := l.routes(index)
	l.want("routes before", before,
		"10.42.0.0/24 table 254 metric 0 proto 2 mtu 0 mss 0 src 10.42.0.7",
		"fd42::/64 table 254 metric 256 proto 2 mtu 0 mss 0")
	cfg := Config{
		Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400,
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1500}},
	}
	d := l.active(cfg)
	active := []string{
		"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1500 mss 1460",
		"10.42.0.0/24 table 254 metric 0 proto 2 mtu 0 mss 0 src 10.42.0.7",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 2 mtu 0 mss 0",
	}
	l.want("routes", l.routes(index), active...)
	e := l.event(d, EventShadowed)
	for _, network := range []string{"10.42.0.0/24", "fd42::/64"} {
		if text := network + " is answered by p0 itself, protocol 2, mtu 0"; e.N != 2 || !strings.Contains(e.Err.Error(), text) {
			t.Errorf("event %v, want (2) and %q", e, text)
		}
	}
	l.reload(d, cfg)
	l.want("routes after a reload", l.routes(index), active...)
	d.Close()
	l.active(Config{Name: "p0", Mode: Attach, MTU: 1500})
	l.want("routes after a sweep", l.routes(index), before...)
	l.want("addresses", l.addresses(index), "10.42.0.7/24 proto 0", "fd42::7/64 proto 0")
}

// TakeAddresses removes what is neither ours nor in Networks, point-to-point addresses too; without, only what is ours and
// stale goes (kernel.md V11, U19).
func TestTakeAddresses(t *testing.T) {
	l := newLab(t)
	l.ip(`tuntap add p0 mode tun
		addr add 10.42.0.1/24 dev p0
		addr add 10.50.0.1/24 dev p0
		addr add 10.51.0.1 peer 10.51.0.2 dev p0
		addr add fd50::1/64 dev p0 nodad
		addr add fd51::1 peer fd51::2 dev p0 nodad
		link set p0 up`)
	l.address("p0", "10.60.0.1/24", 111)
	l.address("p0", "fd60::1/64", 111)
	cfg := Config{Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
	d := l.open(cfg)
	l.must(d.Activate())
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 0", "10.50.0.1/24 proto 0", "10.51.0.1/32 proto 0 peer 10.51.0.2",
		"fd42::1/64 proto 111 noprefixroute", "fd51::1/128 proto 0 peer fd51::2", "fd50::1/64 proto 0")
	cfg.TakeAddresses = true
	l.reload(d, cfg)
	l.want("addresses taken", l.addresses(d.index), "10.42.0.1/24 proto 0", "fd42::1/64 proto 111 noprefixroute")

	created := l.open(Config{Networks: prefixes("10.43.0.1/24"), TakeAddresses: true}) // so it is with what others add to a new one
	l.must(created.Activate())
	l.address(created.State().Name, "10.50.0.1/24", 0)
	l.reload(created, Config{Networks: prefixes("10.43.0.1/24", "10.44.0.1/24"), TakeAddresses: true})
	l.want("addresses of a new device", l.addresses(created.index), "10.43.0.1/24 proto 111 noprefixroute", "10.44.0.1/24 proto 111 noprefixroute")
}

// An address of another's in the way is named before anything is touched: IPv6 holds an address with one length only
// (kernel.md V7). With TakeAddresses it goes. So it is with an MTU that would take others' IPv6 (kernel.md B7).
func TestObstacles(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\nlink set p0 addrgenmode none\naddr add fd42::1/128 dev p0 nodad\naddr add 10.42.0.1 peer 10.42.0.2/24 dev p0\nlink set p0 up")
	for _, test := range []struct {
		cfg  Config
		text string
	}{
		{Config{Networks: prefixes("fd42::1/64")}, "add address fd42::1/64: another's fd42::1/128 is in the way"},
		{Config{Networks: prefixes("10.42.0.1/24")}, "add address 10.42.0.1/24: another's 10.42.0.1/24 is in the way"},
		{Config{MTU: 1000}, "set MTU 1000: another's fd42::1/128 would go"},
	} {
		cfg := test.cfg
		cfg.Name, cfg.Mode = "p0", Attach
		d := l.open(cfg)
		before := linkUnknowing(l.kernelState())
		l.wantOpError(d.Activate(), test.text)
		l.want("state", linkUnknowing(l.kernelState()), before...)
		d.Close()
	}
	d := l.open(Config{Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24", "fd42::1/64"), TakeAddresses: true})
	l.must(d.Activate())
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute", "fd42::1/64 proto 111 noprefixroute")
}

// A run that was killed leaves a persistent device full of its state. The next one leaves its own there and what is not ours:
// other protocols, tables and metrics (kernel.md U5, U19, B2, B5, A18).
func TestKilledRunIsSwept(t *testing.T) {
	l := newLab(t)
	cfg := Config{
		Name: "p0", Mode: AttachOrCreate, Persist: true, MTU: 1400, Networks: prefixes("10.42.0.1/24", "10.42.0.2/24", "10.43.0.1/24", "fd42::1/64", "fd43::1/64"),
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.9.0.0/16")},
			{Prefix: netip.MustParsePrefix("10.10.0.0/16")},
			{Prefix: netip.MustParsePrefix("fd09::/64")},
			{Prefix: netip.MustParsePrefix("fd10::/64"), Table: 100},
		},
	}
	p, _ := l.ns.StartHelper(t, "lab device", nstest.HelperOptions{Args: append(encodeConfig(t, cfg), "stay")})
	p.Kill()
	l.address("p0", "10.42.0.9/24", 0)
	l.address("p0", "fd42::9/64", 110)
	foreign := []string{
		"route add 10.9.0.0/16 dev p0 metric 9", "route add 10.9.0.0/16 dev p0 table 100", "route append 10.10.0.0/16 dev p0 proto static",
		"route add 10.77.0.0/16 dev p0", "route add fd09::/64 dev p0 metric 9", "route add fd09::/64 dev p0 table 100 proto 110",
		"route add fd77::/64 dev p0", "route add unreachable 10.9.0.0/16 metric 10",
	}
	l.ip(strings.Join(foreign, "\n"))
	// Ours of an older version, which did things in another way.
	l.ip("route add 10.11.0.0/16 via 10.42.0.9 dev p0 proto 111\nroute add 10.12.0.0/16 dev p0 proto 111 tos 8\nroute add fd11::/64 dev p0 proto 111 metric 5 table 77")

	cfg.Mode, cfg.Persist = Attach, false
	cfg.Networks, cfg.Routes = prefixes("10.42.0.2/24", "fd43::1/64"), []Route{{Prefix: netip.MustParsePrefix("10.10.0.0/16")}}
	d := l.active(cfg)
	l.want("addresses", l.addresses(d.index), "10.42.0.2/24 proto 111 noprefixroute", "10.42.0.9/24 proto 0 secondary",
		"fd42::9/64 proto 110", "fd43::1/64 proto 111 noprefixroute")
	got := l.routes(d.index)
	slices.Sort(got)
	l.want("routes", got,
		"10.10.0.0/16 table 254 metric 0 proto 111 mtu 1400 mss 1360",
		"10.10.0.0/16 table 254 metric 0 proto 4 mtu 0 mss 0",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.2",
		"10.77.0.0/16 table 254 metric 0 proto 3 mtu 0 mss 0",
		"10.9.0.0/16 table 100 metric 0 proto 3 mtu 0 mss 0",
		"10.9.0.0/16 table 254 metric 9 proto 3 mtu 0 mss 0",
		"fd09::/64 table 100 metric 1024 proto 110 mtu 0 mss 0",
		"fd09::/64 table 254 metric 9 proto 3 mtu 0 mss 0",
		"fd43::/64 table 254 metric 256 proto 111 mtu 1400 mss 1340",
		"fd77::/64 table 254 metric 1024 proto 3 mtu 0 mss 0")
	if out := l.ip("route show type unreachable"); !strings.Contains(out, "10.9.0.0/16") {
		t.Errorf("the unreachable route is gone: %q", out)
	}
}

// Two devices with one network: each has its route, nobody's is replaced, and who comes second is told by whom it is
// shadowed (kernel.md U4, V12). So is who meets another's equal route, and who meets a dead end.
func TestShadowed(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16")}, {Prefix: netip.MustParsePrefix("fd09::/64")}}}
	a := l.active(cfg)
	l.noEvent(a, EventShadowed)
	routes := l.routes(a.index)
	b := l.active(cfg)
	e := l.event(b, EventShadowed)
	if e.N != 4 {
		t.Errorf("event %v, want N 4", e)
	}
	for _, prefix := range []string{"10.42.0.0/24", "fd42::/64", "10.9.0.0/16", "fd09::/64"} {
		if text := fmt.Sprintf("%s is answered by %s, protocol 111", prefix, a.State().Name); !strings.Contains(e.Err.Error(), text) {
			t.Errorf("event %v does not say %q", e, text)
		}
	}
	l.want("routes of the first", l.routes(a.index), routes...)
	if got := l.routes(b.index); len(got) != 4 {
		t.Errorf("routes of the second: %v", got)
	}
	b.Close()
	a.Close()

	// A longer prefix of another's inside ours is no shadow, wherever it lies; a dead end is.
	l.ns.OtherTun(t, "other0", "10.42.0.1/30", "10.42.0.129/26")
	l.ip("route add blackhole 10.9.0.0/16\nroute add blackhole 10.8.0.0/17\nroute add 10.7.0.0/16 dev other0 proto static")
	d := l.active(Config{Networks: prefixes("10.42.0.77/24"), Routes: []Route{
		{Prefix: netip.MustParsePrefix("10.9.0.0/16")}, {Prefix: netip.MustParsePrefix("10.8.0.0/16")}, {Prefix: netip.MustParsePrefix("10.7.0.0/16"), Metric: 5},
	}})
	e = l.event(d, EventShadowed)
	for _, text := range []string{"10.9.0.0/16 is answered by a route that leads nowhere: invalid argument", "10.7.0.0/16 is answered by other0, protocol 4"} {
		if e.N != 2 || !strings.Contains(e.Err.Error(), text) {
			t.Errorf("event %v, want (2) and %q", e, text)
		}
	}
}

// A stranger's route through our own device with our key: one that does the same does for us, and one that does not stays
// before ours, or in IPv6 alone, and we are told (kernel.md V3, V12).
func TestStrangersRouteOnOurDevice(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")})
	name := d.State().Name
	l.ip(strings.ReplaceAll(`route add 10.9.0.0/16 dev DEV mtu 700
		route add fd09::/64 dev DEV mtu 1280
		route add 10.8.0.0/16 dev DEV mtu 1300
		route add fd08::/64 dev DEV`, "DEV", name))
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
	for _, p := range prefixes("10.9.0.0/16", "fd09::/64", "10.8.0.0/16", "fd08::/64") {
		cfg.Routes = append(cfg.Routes, Route{Prefix: p})
	}
	l.trusting(d)
	l.reload(d, cfg)
	l.want("routes", l.routes(d.index),
		"10.8.0.0/16 table 254 metric 0 proto 3 mtu 1300 mss 0",
		"10.8.0.0/16 table 254 metric 0 proto 111 mtu 1300 mss 1260", // Reload did not look before
		"10.9.0.0/16 table 254 metric 0 proto 3 mtu 700 mss 0",
		"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1300 mss 1260",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1",
		"fd08::/64 table 254 metric 1024 proto 3 mtu 0 mss 0",
		"fd09::/64 table 254 metric 1024 proto 3 mtu 1280 mss 0",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1300 mss 1240")
	e := l.event(d, EventShadowed)
	want := fmt.Sprintf("10.9.0.0/16 is answered by %[1]s itself, protocol 3, mtu 700; fd09::/64 is answered by %[1]s itself, protocol 3, mtu 1280", name)
	if e.N != 2 || e.Err.Error() != want {
		t.Errorf("event %v, want (2): %s", e, want)
	}
}
