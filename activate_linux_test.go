package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// In a bare namespace the device gets its addresses without the kernel's prefix routes or a DAD wait, tagged, and our own
// connected routes with MTU, MSS and, in IPv4, source (kernel.md V28, U61, V21).
func TestActivateInBareNamespace(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400})
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute", "fd42::1/64 proto 111 noprefixroute")
	l.want("routes", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1400 mss 1340")
	if s := d.State(); s.MTU != 1400 || !s.Up {
		t.Errorf("state %+v, want MTU 1400, up", s)
	}
	for dst, src := range map[string]string{"10.42.0.9": "10.42.0.1", "fd42::9": "fd42::1"} {
		if out := l.ip("route get " + dst); !strings.Contains(out, "src "+src) {
			t.Errorf("source to %s: %s, want %s", dst, out, src)
		}
	}
	l.noEvent(d, EventDegraded, EventShadowed)
}

// The kernel's SYN carries the MSS of the route that it takes, in both families (kernel.md U61).
func TestSYNCarriesMSSOfRoute(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400,
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 600}, {Prefix: netip.MustParsePrefix("fd09::/64"), MTU: 1290}},
	})
	for dst, want := range map[string]uint16{"10.42.0.9": 1360, "10.9.0.9": 560, "fd42::9": 1340, "fd09::9": 1230} {
		if got := l.segmentSizeOfSYN(d, netip.MustParseAddr(dst)); got != want {
			t.Errorf("SYN to %s carries MSS %d, want %d", dst, got, want)
		}
	}
}

// segmentSizeOfSYN begins a TCP connection and reads its first packet from the device.
func (l *lab) segmentSizeOfSYN(d *tunDevice, dst netip.Addr) uint16 {
	l.Helper()
	l.in(func() error {
		var to unix.Sockaddr = &unix.SockaddrInet6{Port: 80, Addr: dst.As16()}
		family := unix.AF_INET6
		if dst.Is4() {
			to, family = &unix.SockaddrInet4{Port: 80, Addr: dst.As4()}, unix.AF_INET
		}
		s, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		if err := unix.Connect(s, to); err != unix.EINPROGRESS {
			return fmt.Errorf("connect: %w", err)
		}
		return nil
	})
	packet := make([]byte, 65535)
	for {
		n, err := d.queues[0].Read(packet)
		l.must(err)
		header, protocol := 40, packet[6]
		if packet[0]>>4 == 4 {
			header, protocol = int(packet[0]&15)*4, packet[9]
		}
		if tcp := packet[header:n]; protocol == unix.IPPROTO_TCP && packetDstIs(packet, dst) {
			return binary.BigEndian.Uint16(tcp[22:]) // Linux writes the MSS first among the options
		}
	}
}

func packetDstIs(packet []byte, dst netip.Addr) bool {
	got, ok := packetDst(packet)
	return ok && got == dst
}

// Every field of a Route reaches the kernel, and what is not to be installed does not (kernel.md U16, U17, V21).
func TestActivateInstallsRoutes(t *testing.T) {
	l := newLab(t)
	p := netip.MustParsePrefix
	via := []Gateway{{Addr: netip.MustParseAddr("10.42.0.2")}}
	d := l.active(Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"),
		Routes: []Route{
			{Prefix: p("192.168.7.0/24"), Via: via},
			{Prefix: p("192.168.8.0/24"), MTU: 1200, Metric: 7},
			{Prefix: p("192.168.9.0/24"), Table: 100},
			{Prefix: p("192.168.10.0/24"), NoInstall: true},
			{Prefix: p("192.0.2.7/32")},
			{Prefix: p("0.0.0.0/0"), Table: 254},
			{Prefix: p("2001:db8:7::/48")},
			{Prefix: p("2001:db8:8::/48"), MTU: 1280, Metric: 9},
			{Prefix: p("2001:db8:9::/48"), Table: 300},
			{Prefix: p("2001:db8::7/128"), NoInstall: true},
			{Prefix: p("::/0"), Metric: 5},
		},
	})
	got := l.routes(d.index)
	slices.Sort(got)
	l.want("routes", got,
		"0.0.0.0/0 table 254 metric 0 proto 111 mtu 1300 mss 1260",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1",
		"192.0.2.7/32 table 254 metric 0 proto 111 mtu 1300 mss 1260",
		"192.168.7.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260",
		"192.168.8.0/24 table 254 metric 7 proto 111 mtu 1200 mss 1160",
		"192.168.9.0/24 table 100 metric 0 proto 111 mtu 1300 mss 1260",
		"2001:db8:7::/48 table 254 metric 1024 proto 111 mtu 1300 mss 1240",
		"2001:db8:8::/48 table 254 metric 9 proto 111 mtu 1280 mss 1220",
		"2001:db8:9::/48 table 300 metric 1024 proto 111 mtu 1300 mss 1240",
		"::/0 table 254 metric 5 proto 111 mtu 1300 mss 1240",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1300 mss 1240",
	)
	l.noEvent(d, EventShadowed)
}

// A Route for the prefix of a network sets that network's MTU, in both families; it is no second route.
func TestRouteForNetworkSetsItsMTU(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"),
		Routes:   []Route{{Prefix: netip.MustParsePrefix("10.42.0.0/24"), MTU: 1500}, {Prefix: netip.MustParsePrefix("fd42::/64"), MTU: 1350}},
	})
	l.want("routes", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1500 mss 1460 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1350 mss 1290")
	if mtu := d.State().MTU; mtu != 1500 {
		t.Errorf("MTU %d, want 1500", mtu)
	}
}

// Of two addresses in one network the first is the source of the one route; an address alone in its network has none.
func TestConnectedRoutes(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.9/24", "10.42.0.1/24", "10.43.0.1/32", "fd42::9/64", "fd42::1/64", "fd43::1/128")})
	l.want("addresses", l.addresses(d.index), "10.42.0.9/24 proto 111 noprefixroute", "10.43.0.1/32 proto 111 noprefixroute",
		"10.42.0.1/24 proto 111 secondary noprefixroute", "fd43::1/128 proto 111 noprefixroute",
		"fd42::1/64 proto 111 noprefixroute", "fd42::9/64 proto 111 noprefixroute")
	l.want("routes", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.9",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1300 mss 1240")
}

// The kernel cuts MTU and MSS of a route down to 65520 and 65495: that is no difference to be mended again and again.
func TestActivateWithLargestMTU(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 65535})
	l.want("routes", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 65520 mss 65480 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 65520 mss 65460")
	if mtu := d.State().MTU; mtu != 65535 {
		t.Errorf("MTU %d, want 65535", mtu)
	}
}

// An IPv4-only device may be smaller than IPv6 allows; that its IPv6 settings go with it is no lost ability (kernel.md B7).
func TestActivateBelowIPv6(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24"), MTU: 576}
	d := l.active(cfg)
	l.want("routes", l.routes(d.index), "10.42.0.0/24 table 254 metric 0 proto 111 mtu 576 mss 536 src 10.42.0.1")
	l.noEvent(d, EventDegraded)
	// And up again, where IPv6 comes back with the kernel's defaults and is hardened before it is used (kernel.md V9).
	cfg.MTU, cfg.Networks = 1400, prefixes("10.42.0.1/24", "fd42::1/64")
	l.reload(d, cfg)
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute", "fd42::1/64 proto 111 noprefixroute")
	l.wantHardened(d)
}

// What already holds is not written again (design.md law 5), whoever set it up: ourselves, or an administrator.
func TestSecondActivateWritesNothing(t *testing.T) {
	l := newLab(t)
	cfg := Config{
		Networks: prefixes("10.42.0.1/24", "10.42.0.2/24", "fd42::1/64"),
		Routes:   []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1400}, {Prefix: netip.MustParsePrefix("fd09::/64"), MTU: 1290}},
	}
	d := l.active(cfg)
	m, _ := meddle(d)
	l.must(d.Activate())
	l.reload(d, cfg)
	l.want("messages that change", m.changes())
	if len(m.log) == 0 {
		t.Error("nobody looked")
	}

	l.ip(`tuntap add prepared mode tun
		link set prepared mtu 1300
		link set prepared addrgenmode none
		addr add 10.43.0.1/24 dev prepared
		addr add fd43::1/64 dev prepared nodad
		link set prepared up
		route add 10.19.0.0/16 dev prepared
		route add fd19::/64 dev prepared`)
	for _, name := range []string{"accept_ra", "autoconf", "accept_redirects", "accept_source_route"} {
		l.setSysctl("ipv6/conf/prepared/"+name, "0")
	}
	for _, name := range []string{"send_redirects", "accept_redirects", "accept_source_route"} {
		l.setSysctl("ipv4/conf/prepared/"+name, "0")
	}
	l.setSysctl("ipv4/conf/prepared/promote_secondaries", "1")
	before := l.kernelState()
	d = l.open(Config{
		Name: "prepared", Mode: Attach, Networks: prefixes("10.43.0.1/24", "fd43::1/64"),
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.19.0.0/16")}, {Prefix: netip.MustParsePrefix("fd19::/64")}},
	})
	m, _ = meddle(d)
	l.must(d.Activate())
	l.want("messages that change a prepared device", m.changes())
	l.noEvent(d, EventDegraded, EventShadowed)
	if diff := difference(linkUnknowing(l.kernelState()), linkUnknowing(before)); diff != "" {
		t.Errorf("the prepared device changed:\n%s", diff)
	}
}

// linkUnknowing leaves out of routes what comes and goes with the queues attached to their device.
func linkUnknowing(lines []string) (out []string) {
	for _, line := range lines {
		fields := strings.Fields(line)
		if fields[0] == "route" {
			isIPv6, isLocal := fields[1][:2] == "0a", fields[1][14:16] == "02"
			if fields[1][14:16] == "05" || isIPv6 && isLocal {
				continue // multicast; and what makes an IPv6 address local, which a worker adds when there is a carrier
			}
			fields[1] = fields[1][:16] // its flags are the last of the header
		}
		out = append(out, strings.Join(fields, " "))
	}
	return out
}

// The link comes up in one send with the routes, before them: a link that is down refuses routes (kernel.md V27).
func TestRoutesShareSendWithUp(t *testing.T) {
	l := newLab(t)
	d := l.open(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")})
	r := &sends{conn: d.ctl}
	d.ctl = r
	l.must(d.Activate())
	want := "NEWLINK NEWROUTE NEWROUTE"
	if !slices.Contains(r.list, want) {
		t.Errorf("sends %q, want one %q", r.list, want)
	}
}

// sends records what was sent together.
type sends struct {
	conn
	list []string
}

func (s *sends) Do(requests ...rtnl.Message) []rtnl.Result {
	var names []string
	for _, r := range requests {
		names = append(names, messageName(r))
	}
	s.list = append(s.list, strings.Join(names, " "))
	return s.conn.Do(requests...)
}

// Activate right after New never comes too early for the kernel (kernel.md B9). Several at a time: closing waits for the kernel
// (kernel.md V2).
func TestActivateRightAfterNew(t *testing.T) {
	l := newLab(t)
	times := 1000
	if raceEnabled || testing.Short() {
		times = 200
	}
	cfg := Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), NetNS: l.ns.Path(),
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16")}, {Prefix: netip.MustParsePrefix("fd09::/64")}},
	}
	var wg sync.WaitGroup
	var left atomic.Int32
	left.Store(int32(times))
	for range 16 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				d, err := New(cfg)
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(d.Activate(), d.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// Where IPv6 is disabled nothing that needs it is begun, and what does not works (kernel.md U27).
func TestIPv6Disabled(t *testing.T) {
	l := newLab(t)
	l.setSysctl("ipv6/conf/default/disable_ipv6", "1")
	both := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
	d := l.open(both)
	wantUntouched := func(what string) {
		t.Helper()
		before := l.kernelState()
		err := d.Activate()
		l.wantOpError(err, "disable_ipv6")
		if !errors.Is(err, ErrIPv6Disabled) || errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: %v", what, err)
		}
		l.want(what, l.kernelState(), before...)
	}
	wantUntouched("disabled before New")
	// With an MTU below 1280 the device has no settings that tell: the default does, by which they would be made.
	l.ip("link set tun0 mtu 1000")
	wantUntouched("disabled by default")
	// The address that the kernel is to make needs it too.
	l.reload(d, Config{Networks: prefixes("10.42.0.1/24"), LinkLocal: true})
	wantUntouched("link-local, disabled by default")
	l.ip("link set tun0 mtu 1500")
	wantUntouched("link-local")
	l.reload(d, Config{Networks: prefixes("10.42.0.1/24")})
	l.must(d.Activate())
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute")

	l.setSysctl("ipv6/conf/tun0/disable_ipv6", "0")
	l.reload(d, both)
	l.setSysctl("ipv6/conf/tun0/disable_ipv6", "1")
	wantUntouched("disabled at run time")
	l.setSysctl("ipv6/conf/tun0/disable_ipv6", "0")
	l.must(d.Activate())
	l.want("routes", l.routes(d.index),
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1",
		"fd42::/64 table 254 metric 256 proto 111 mtu 1300 mss 1240")
}

// An fe80:: address that was asked for is part of the Config: where somebody disables IPv6 and it goes, healing is patient, which is
// told, and an equal Reload does not say that all is well.
func TestLinkLocalIsMissed(t *testing.T) {
	l := newLab(t)
	cfg := Config{LinkLocal: true}
	d := l.active(cfg)
	var looks atomic.Int32
	meddle(d, func(m *meddler) { m.before = func(int, rtnl.Message) { looks.Add(1) } })
	l.setSysctl("ipv6/conf/tun0/disable_ipv6", "1")
	l.await("a look at it", func() bool { return looks.Load() > 0 })
	cfg.NetNS = l.ns.Path()
	if err := d.Reload(cfg); !errors.Is(err, ErrIPv6Disabled) {
		t.Errorf("Reload: %v", err)
	}
	if e := l.event(d, EventDegraded); !errors.Is(e.Err, ErrIPv6Disabled) {
		t.Errorf("event %v", e)
	}
	l.noEvent(d, EventDegraded) // told once
	l.setSysctl("ipv6/conf/tun0/disable_ipv6", "0")
	l.must(d.Reload(cfg))
	if got := l.addresses(d.index); len(got) != 1 {
		t.Errorf("addresses %v, want the kernel's", got)
	}
}

// An MTU that IPv6 cannot live with is refused before any system call (kernel.md U15, B7).
func TestIPv6NeedsItsMTU(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("fd42::1/64")})
	before := l.kernelState()
	m, _ := meddle(d)
	var config *ConfigError
	err := d.Reload(Config{Networks: prefixes("fd42::1/64"), MTU: 1279, NetNS: l.ns.Path()})
	if !errors.As(err, &config) || config.Field != "MTU" {
		t.Errorf("error %v, want a *ConfigError of MTU", err)
	}
	l.want("operations", m.log)
	l.want("state", l.kernelState(), before...)
}
