package overlay

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// wantHardened checks every setting of law 11, and that procfs says the same of it as netlink.
func (l *lab) wantHardened(d *tunDevice) {
	l.Helper()
	link, err := d.ownLink(d.view)
	l.must(err)
	for _, h := range hardened {
		is := h.of(&link)
		if is == nil || *is != h.wanted {
			l.Errorf("%s is not %d: %+v %+v", h.name, h.wanted, link.IPv4, link.IPv6)
		}
		family, name, _ := strings.Cut(string(h.name), "/")
		if got := l.sysctl(family + "/conf/" + link.Name + "/" + name); got != fmt.Sprint(h.wanted) {
			l.Errorf("sysctl of %s is %s, want %d", h.name, got, h.wanted)
		}
	}
}

// The device is deaf to redirects, advertisements and source routes, and has no address but those of Config, from the moment
// it is up (design.md law 11; kernel.md S2, V7, V8, V9, U43).
func TestActivateHardens(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("fd42::1/64")})
	l.wantHardened(d)
	l.want("addresses", l.addresses(d.index), "fd42::1/64 proto 111 noprefixroute")
	for _, path := range []string{"ipv4/conf/all/accept_redirects", "ipv6/conf/default/accept_ra"} {
		if got := l.sysctl(path); got != "1" {
			t.Errorf("%s is %s: it is the host's", path, got)
		}
	}
}

// The kernel makes an fe80:: address only if asked to: at Activate, at once by Reload, and one that it had made goes, but not
// that of an administrator (kernel.md U43).
func TestLinkLocal(t *testing.T) {
	l := newLab(t)
	linkLocal := func(d *tunDevice) string {
		var kernels []string
		for _, line := range l.addresses(d.index) {
			if strings.HasPrefix(line, "fe80:") && !strings.Contains(line, "proto 0") {
				kernels = append(kernels, line)
			}
		}
		return fmt.Sprint(len(kernels))
	}
	d := l.active(Config{LinkLocal: true})
	steps := []struct {
		linkLocal bool
		want      string
	}{{true, "1"}, {false, "0"}, {true, "1"}, {false, "0"}}
	for i, s := range steps {
		l.reload(d, Config{LinkLocal: s.linkLocal})
		if got := linkLocal(d); got != s.want {
			t.Errorf("step %d, LinkLocal %v: %s link-local addresses, want %s", i, s.linkLocal, got, s.want)
		}
	}
	l.ip("tuntap add p0 mode tun\nlink set p0 up\naddr add fe80::7/64 dev p0 nodad")
	d = l.open(Config{Mode: Attach, Name: "p0"})
	if linkLocal(d) != "1" {
		t.Fatal("the kernel made no address")
	}
	l.must(d.Activate())
	l.want("addresses", l.addresses(d.index), "fe80::7/64 proto 0")
}

// A device too small for IPv6 gets there last, when it is up: until then, too, the kernel makes no address and sends nothing into the
// overlay, neither a Router Solicitation nor a report of groups, however long that takes (design.md law 11).
func TestSmallDeviceIsSilent(t *testing.T) {
	l := newLab(t)
	d := l.open(Config{MTU: 1000, Networks: prefixes("10.42.0.1/24")})
	shrunk := false
	m, _ := meddle(d)
	m.before = func(_ int, r rtnl.Message) {
		if r.Type == unix.RTM_SETLINK && attributesOf(r.Body[unix.SizeofIfInfomsg:])[unix.IFLA_MTU] != nil {
			l.ready(d)
			shrunk = true
			l.want("addresses before the MTU shrinks", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute")
		}
	}
	l.must(d.Activate())
	if !shrunk {
		t.Error("the MTU did not shrink last")
	}
	l.ip("route add 10.9.0.0/16 dev " + d.State().Name)
	sendFlows(t, l.ns, netip.MustParseAddrPort("10.9.0.1:9"), 1)
	b := make([]byte, maxPacket)
	if n, err := d.queues[0].Read(b); err != nil || b[0]>>4 != 4 {
		t.Errorf("the first packet is %x, %v; want that of the test", b[:n], err)
	}
	l.noEvent(d, EventDegraded)
}

// A router advertisement and redirects that reach the kernel through the device have no effect; on an ordinary device they
// do (kernel.md S2, V8).
func TestInjectedPacketsHaveNoEffect(t *testing.T) {
	l := newLab(t)
	// Whatever the device says, the host's "all" lets IPv4 redirects through: there the filter stands in (see the next test).
	l.setSysctl("ipv4/conf/all/accept_redirects", "0")
	bare := l.ns.OtherTun(t, "bare", "10.43.0.1/24", "fd43::1/64")
	l.ip("link set bare mtu 1400")
	l.setSysctl("ipv4/conf/bare/accept_redirects", "1")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400, NoFilter: true})
	name := d.State().Name
	l.ip(fmt.Sprintf(`route add 10.77.0.0/16 via 10.43.0.2 dev bare
		route add 10.78.0.0/16 via 10.42.0.2 dev %[1]s
		route add fd77::/64 via fe80::2 dev bare
		route add fd78::/64 via fe80::2 dev %[1]s`, name))
	for _, test := range []struct {
		what           string
		toBare, toOurs []byte
		shown          string // by ip, with the effect on the bare device
		on, ours       string
	}{
		{"RA", advertisement(), advertisement(), "-6 route show default dev bare", "via fe80::2", "-6 route show default dev " + name},
		{
			"IPv4 redirect", redirect4("10.43.0.1", "10.43.0.2", "10.43.0.3", "10.77.0.1"), redirect4("10.42.0.1", "10.42.0.2", "10.42.0.3", "10.78.0.1"),
			"route get 10.77.0.1", "via 10.43.0.3", "route get 10.78.0.1",
		},
		{
			"IPv6 redirect", redirect6("fd43::1", "fd77::1"), redirect6("fd42::1", "fd78::1"),
			"route get fd77::1", "via fe80::3", "route get fd78::1",
		},
	} {
		before := slices.Concat(l.addresses(d.index), l.routes(d.index), []string{l.ip(test.ours), l.sysctl("ipv6/conf/" + name + "/mtu")})
		if _, err := bare.Write(test.toBare); err != nil {
			t.Fatal(err)
		}
		if got := l.ip(test.shown); !strings.Contains(got, test.on) {
			t.Errorf("%s: the packet is no good: %s shows %q", test.what, test.shown, got)
		}
		if _, err := d.queues[0].Write(test.toOurs); err != nil {
			t.Fatal(err)
		}
		after := slices.Concat(l.addresses(d.index), l.routes(d.index), []string{l.ip(test.ours), l.sysctl("ipv6/conf/" + name + "/mtu")})
		l.want(test.what, after, before...)
	}
}

// IPv4 redirects that the host's conf/all lets through are stopped by the filter (kernel.md V8).
func TestFilterStandsInForConfAll(t *testing.T) {
	l := newLab(t)
	l.setSysctl("ipv4/conf/all/accept_redirects", "1")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
	l.ip("route add 10.78.0.0/16 via 10.42.0.2 dev " + d.State().Name)
	packet := redirect4("10.42.0.1", "10.42.0.2", "10.42.0.3", "10.78.0.1")
	for filter, via := range map[bool]string{true: "10.42.0.2", false: "10.42.0.3"} {
		l.reload(d, Config{Networks: prefixes("10.42.0.1/24"), NoFilter: !filter})
		if _, err := d.queues[0].Write(packet); err != nil {
			t.Fatal(err)
		}
		if got := l.ip("route get 10.78.0.1"); !strings.Contains(got, "via "+via) {
			t.Errorf("filter %v: %s, want via %s", filter, got, via)
		}
		l.ip("route flush cache")
	}
}

// An MTU below 1280 and back brings IPv6 back with the kernel's defaults. Activate hardens before it restores (kernel.md V9,
// B7).
func TestActivateHardensBeforeItRestores(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400, NoHeal: true})
	name := d.State().Name
	l.ip("link set " + name + " mtu 1279")
	l.ip("link set " + name + " mtu 1400")
	if got := l.sysctl("ipv6/conf/" + name + "/accept_ra"); got != "1" {
		t.Fatalf("accept_ra %s: the kernel did not forget", got)
	}
	m, _ := meddle(d)
	restored := 0
	m.before = func(_ int, r rtnl.Message) {
		if r.Type != unix.RTM_NEWADDR {
			return
		}
		restored++
		link, err := getLink(l.conn, rtnl.GetLink(d.index))
		if err != nil || link.IPv6.AcceptRA != 0 || link.IPv6.AddrGenMode != kernel.AddrGenNone {
			t.Errorf("an address is restored to %+v (%v)", link.IPv6, err)
		}
	}
	l.must(d.Activate())
	if restored == 0 {
		t.Error("nothing was restored")
	}
	l.wantHardened(d)
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute", "fd42::1/64 proto 111 noprefixroute")
}

// Settings are found by name. One whose name goes to a stranger in the middle of that is found again by its new one, and the
// stranger's settings stay (kernel.md S12, A23).
func TestNamesSwapWhileSettings(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0", "10.43.0.1/24")
	d := l.open(Config{NoHeal: true})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ctl = &around{conn: d.ctl, after: func() {
		l.ip("link set tun0 name ours0\nlink set other0 down\nlink set other0 name tun0\nlink set tun0 up")
	}}
	for i, err := range d.apply([]step{{kind: stepSetting, setting: settingIPv6RA, from: 1}, {kind: stepSetting, setting: settingIPv6Autoconf, from: 1}}) {
		if err != nil {
			t.Errorf("step %d: %v", i, err)
		}
	}
	for path, want := range map[string]string{"ours0/accept_ra": "0", "ours0/autoconf": "0", "tun0/accept_ra": "1", "tun0/autoconf": "1"} {
		if got := l.sysctl("ipv6/conf/" + path); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
}

// Where a setting cannot be made all else works, and one event, not one each time, and State tell which (kernel.md S9, U39).
func TestWithoutProcfs(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), TxQueueLen: 77}
	d := l.open(cfg)
	procfs := d.procfs
	d.procfs = -1
	m, remove := meddle(d)
	m.fail = func(_ int, r rtnl.Message) misfortune {
		if r.Type == unix.RTM_SETLINK && attributesOf(r.Body[unix.SizeofIfInfomsg:])[unix.IFLA_TXQLEN] != nil {
			return refusal(unix.EPERM)
		}
		return misfortune{}
	}
	l.must(d.Activate())
	e := l.event(d, EventDegraded)
	lacks := []string{"set queue length 77: operation not permitted", "set ipv6/accept_ra=0: ", "set ipv6/autoconf=0: ", "set ipv6/accept_redirects=0: "}
	for _, text := range lacks {
		if !strings.Contains(e.Err.Error(), text) || !strings.Contains(d.State().String(), "note "+text) {
			t.Errorf("event %v and state\n%v lack %q", e, d.State(), text)
		}
	}
	if e.N != len(lacks) {
		t.Errorf("event %v, want N %d", e, len(lacks))
	}
	l.must(d.Activate())
	l.noEvent(d, EventDegraded)
	if n := strings.Count(d.State().String(), "note "); n != len(lacks) {
		t.Errorf("%d notes, want %d:\n%v", n, len(lacks), d.State())
	}
	remove()
	d.procfs = procfs
	l.must(d.Activate())
	l.wantHardened(d)
	if s := d.State().String(); strings.Contains(s, "note ") {
		t.Errorf("what was lacking is not any more:\n%s", s)
	}
	l.noEvent(d, EventDegraded)
}

// What failed and is optional an equal Reload tries again, without a look, an event or a change beside: a setting by netlink or by
// procfs, the queue length, the link-local address that is wanted and the one that is not. When it works a look confirms it.
func TestReloadTriesAgain(t *testing.T) {
	l := newLab(t)
	cfg := Config{Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24"), TxQueueLen: 77, NoHeal: true}
	wantLinkLocal := func(d *tunDevice, want bool) {
		l.Helper()
		addresses := l.addresses(d.index)
		if has := slices.ContainsFunc(addresses, func(a string) bool { return strings.HasPrefix(a, "fe80:") }); has != want {
			t.Errorf("addresses %q", addresses)
		}
	}
	l.ip("tuntap add p0 mode tun\nlink set p0 mtu 1300 up")
	d := l.open(cfg)
	l.ready(d)
	wantLinkLocal(d, true)
	procfs := d.procfs
	defer func() { d.procfs = procfs }()
	d.procfs = -1
	m, remove := meddle(d)
	m.fail = func(_ int, r rtnl.Message) misfortune {
		if r.Type == unix.RTM_SETLINK || r.Type == unix.RTM_DELADDR {
			return refusal(unix.EPERM)
		}
		return misfortune{}
	}
	l.must(d.Activate())
	l.event(d, EventDegraded)
	l.trusting(d)
	notes := strings.Count(d.State().String(), "note ")
	wantTried := func(cfg Config, want ...string) {
		l.Helper()
		m.log = nil
		l.reload(d, cfg)
		if got := slices.DeleteFunc(m.log, func(name string) bool { return name == "GETLINK" }); !slices.Equal(slices.Compact(got), want) {
			t.Errorf("sent %v, want %v", got, want)
		}
	}
	more := cfg
	more.Routes = []Route{routeTo("10.9.0.0/16")}
	wantTried(cfg, "DELADDR", "SETLINK")
	wantTried(more, "DELADDR", "SETLINK", "NEWROUTE", "GETROUTE")
	wantTried(cfg, "DELADDR", "SETLINK", "DELROUTE")
	l.noEvent(d, EventDegraded)
	if got := strings.Count(d.State().String(), "note "); got != notes || notes < 6 {
		t.Errorf("%d notes, then %d:\n%v", notes, got, d.State())
	}
	remove()
	d.procfs = procfs
	l.reload(d, cfg)
	l.wantHardened(d)
	l.wantInForce(d)
	wantLinkLocal(d, false)
	l.noEvent(d, EventDegraded)

	cfg.LinkLocal = true
	d.procfs = -1
	l.reload(d, cfg)
	l.event(d, EventDegraded)
	wantLinkLocal(d, false)
	d.procfs = procfs
	l.reload(d, cfg)
	wantLinkLocal(d, true)
	if s := d.State().String(); strings.Contains(s, "note ") {
		t.Errorf("what was lacking is not any more:\n%s", s)
	}
}

// A link-local address that goes by itself, before we remove it or after that was refused, is no loss.
func TestLinkLocalIsGoneAlready(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\nlink set p0 up")
	d := l.open(Config{Name: "p0", Mode: Attach, NoHeal: true})
	l.ready(d)
	gone := false
	_, remove := meddle(d, func(m *meddler) {
		m.before = func(_ int, r rtnl.Message) {
			if r.Type == unix.RTM_DELADDR {
				gone = l.conn.Do(rtnl.Message{Type: r.Type, Flags: r.Flags, Body: slices.Clone(r.Body)})[0].Err == nil
			}
		}
	})
	l.must(d.Activate())
	remove()
	wantNoNote := func() {
		l.Helper()
		if s := d.State().String(); !gone || strings.Contains(s, "note ") {
			t.Errorf("gone %v, state\n%s", gone, s)
		}
		l.noEvent(d, EventDegraded)
	}
	wantNoNote()
	cfg := Config{Name: "p0", Mode: Attach, NoHeal: true, LinkLocal: true}
	l.reload(d, cfg)
	gone = false
	meddle(d, func(m *meddler) {
		m.fail = func(_ int, r rtnl.Message) misfortune {
			if r.Type != unix.RTM_DELADDR {
				return misfortune{}
			}
			gone = true // with IPv6, which the MTU takes
			return refusal(unix.EPERM)
		}
	})
	cfg.LinkLocal, cfg.MTU = false, 1000
	l.reload(d, cfg)
	wantNoNote()
}

// A container with a read-only /proc/sys gets a device that works, and is told (kernel.md S9).
func TestReadOnlyProcSys(t *testing.T) {
	l := newLab(t)
	out := l.device(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}, nstest.HelperOptions{ReadOnlyProcSys: true})
	for _, text := range []string{
		"activate: <nil>", "degraded (3): ", "set ipv6/accept_ra=0: read-only file system", "network fd42::1/64",
		"link up", "note set ipv6/accept_ra=0: read-only file system",
	} {
		if !strings.Contains(out, text) {
			t.Errorf("no %q in\n%s", text, out)
		}
	}
}

// Packets that an overlay peer might send. Checksums are left to finish.

func advertisement() []byte {
	ra := []byte{
		134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, // lifetime 1800 s
		5, 1, 0, 0, 0, 0, 0x05, 0x00, // MTU 1280
		3, 4, 64, 0xc0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0, 0, 0, // prefix, on-link, autonomous
		0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
	}
	return icmp6("fe80::2", "ff02::1", ra)
}

func redirect6(to, dst string) []byte {
	target, destination := netip.MustParseAddr("fe80::3").As16(), netip.MustParseAddr(dst).As16()
	return icmp6("fe80::2", to, slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, target[:], destination[:]))
}

func icmp6(src, dst string, message []byte) []byte {
	s, d := netip.MustParseAddr(src).As16(), netip.MustParseAddr(dst).As16()
	header := slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255}, s[:], d[:])
	pseudo := slices.Concat(s[:], d[:], []byte{0, 0, 0, byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6})
	binary.BigEndian.PutUint16(message[2:], onesComplement(append(pseudo, message...)))
	return append(header, message...)
}

func redirect4(to, from, gateway, dst string) []byte {
	g := netip.MustParseAddr(gateway).As4()
	quoted := append(header4(to, dst, unix.IPPROTO_ICMP, 8), 0, 0, 0xff, 0xff, 0, 0, 0, 0) // an echo reply
	message := slices.Concat([]byte{5, 1, 0, 0}, g[:], quoted)
	binary.BigEndian.PutUint16(message[2:], onesComplement(message))
	return append(header4(from, to, unix.IPPROTO_ICMP, len(message)), message...)
}

func header4(src, dst string, protocol byte, payload int) []byte {
	s, d := netip.MustParseAddr(src).As4(), netip.MustParseAddr(dst).As4()
	h := slices.Concat([]byte{0x45, 0, 0, byte(20 + payload), 0, 1, 0, 0, 64, protocol, 0, 0}, s[:], d[:])
	binary.BigEndian.PutUint16(h[10:], onesComplement(h))
	return h
}

func onesComplement(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// helperDevice opens and activates a device as its first argument says, and tells how that went; with a second argument it
// stays.
func helperDevice() error {
	cfg, err := decodeConfig(os.Args[1])
	if err != nil {
		return err
	}
	d, err := New(cfg)
	if err != nil {
		return fmt.Errorf("new: %w", err)
	}
	fmt.Println("activate:", d.Activate())
	fmt.Print(d.State())
	for len(d.Events()) > 0 {
		fmt.Println("event", <-d.Events())
	}
	if len(os.Args) > 2 {
		return nstest.Ready("ready")
	}
	return d.Close()
}
