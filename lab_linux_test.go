package overlay

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// lab is a network namespace to try devices in, and a connection to look at it.
type lab struct {
	*testing.T
	ns   *nstest.NS
	conn *rtnl.Conn
}

func newLab(t *testing.T, needs ...nstest.Ability) *lab {
	t.Helper()
	nstest.Require(t, append(needs, nstest.TUN, nstest.IPv6, nstest.Program("ip"))...)
	nstest.Leaks(t)
	return oneOfLabs(t)
}

// oneOfLabs is newLab where several tests run at a time: then the one around them looks for leaks.
func oneOfLabs(t *testing.T) *lab {
	t.Helper()
	l := &lab{T: t, ns: nstest.New(t)}
	l.in(func() (err error) { l.conn, err = rtnl.Dial(); return err })
	t.Cleanup(func() { l.conn.Close() })
	return l
}

// together runs subtests at the same time, most of which wait for the kernel to delete devices (kernel.md V2).
func together(t *testing.T, tests map[string]func(*lab)) {
	t.Helper()
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Program("ip"))
	nstest.Leaks(t)
	var wg sync.WaitGroup
	for name, fn := range tests {
		wg.Go(func() { t.Run(name, func(t *testing.T) { fn(oneOfLabs(t)) }) })
	}
	wg.Wait()
}

// in runs fn on a thread in the namespace.
func (l *lab) in(fn func() error) {
	l.Helper()
	l.ns.Do(l.T, func() {
		if err := fn(); err != nil {
			l.Fatal(err)
		}
	})
}

// ip runs ip(8) with one or more lines of arguments, in a batch.
func (l *lab) ip(lines string) (out string) {
	l.Helper()
	lines = strings.TrimSpace(lines)
	if lines == "" {
		return ""
	}
	if !strings.Contains(lines, "\n") {
		return l.ns.Run(l.T, "ip "+lines)
	}
	return l.ns.Run(l.T, "sh", "-c", "ip -batch - <<'END'\n"+lines+"\nEND")
}

// address adds an address with a protocol, which ip(8) may be too old for.
func (l *lab) address(link, prefix string, protocol uint8) {
	l.Helper()
	a := kernel.Addr{Prefix: netip.MustParsePrefix(prefix), Protocol: protocol}
	l.must(l.conn.Do(rtnl.AddAddr(l.index(link), a))[0].Err)
}

func (l *lab) index(link string) int {
	l.Helper()
	got, err := getLink(l.conn, rtnl.GetLinkByName(link))
	l.must(err)
	return got.Index
}

// open makes a device in the namespace; it is closed at the end of the test.
func (l *lab) open(cfg Config) *tunDevice {
	l.Helper()
	cfg.NetNS = l.ns.Path()
	dev, err := New(cfg)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { dev.Close() })
	return dev.(*tunDevice)
}

// alone waits until there is no other interface than lo: a process between fork and exec may keep a closed device for an instant.
func (l *lab) alone() {
	l.Helper()
	l.await("no device left", func() bool {
		links, err := l.conn.Dump(rtnl.GetLink(0))
		return err == nil && len(links) == 1
	})
}

// ready waits until a device has its carrier and the kernel has made its IPv6 addresses local, which a worker does.
func (l *lab) ready(d *tunDevice) {
	l.Helper()
	l.await("carrier and IPv6 addresses", func() bool {
		result := l.conn.Do(rtnl.GetLink(d.index))[0]
		l.must(result.Err)
		if all := attributesOf(result.Answers[0].Body[unix.SizeofIfInfomsg:]); all[unix.IFLA_CARRIER][0] == 0 {
			return false
		}
		addresses, err := l.conn.Dump(rtnl.GetAddrs(d.index))
		l.must(err)
		local, err := l.conn.Dump(rtnl.GetLocal(unix.AF_INET6, d.index))
		l.must(err)
		waiting := 0
		for _, m := range addresses {
			flags := binary.NativeEndian.Uint32(attributesOf(m.Body[unix.SizeofIfAddrmsg:])[unix.IFA_FLAGS])
			if flags&unix.IFA_F_TENTATIVE != 0 {
				return false
			}
			if m.Body[0] == unix.AF_INET6 {
				waiting++
			}
		}
		return len(local) >= waiting
	})
}

// active opens and activates.
func (l *lab) active(cfg Config) *tunDevice {
	l.Helper()
	d := l.open(cfg)
	l.must(d.Activate())
	return d
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// reload puts cfg in force.
func (l *lab) reload(d *tunDevice, cfg Config) {
	l.Helper()
	cfg.NetNS = l.ns.Path()
	l.must(d.Reload(cfg))
}

// await waits until ok says yes.
func (l *lab) await(what string, ok func() bool) {
	l.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			l.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// event waits for an event of that kind.
func (l *lab) event(d *tunDevice, kind EventKind) Event {
	l.Helper()
	late := time.After(10 * time.Second)
	for {
		select {
		case e, ok := <-d.Events():
			if !ok {
				l.Fatalf("the events ended without %v", kind)
			}
			if e.Kind == kind {
				return e
			}
		case <-late:
			l.Fatalf("no event %v", kind)
		}
	}
}

// noEvent fails if an event of that kind has come.
func (l *lab) noEvent(d *tunDevice, kinds ...EventKind) {
	l.Helper()
	for {
		select {
		case e := <-d.Events():
			if slices.Contains(kinds, e.Kind) {
				l.Errorf("event %v", e)
			}
		default:
			return
		}
	}
}

// want compares lists line by line.
func (l *lab) want(what string, got []string, want ...string) {
	l.Helper()
	if diff := difference(got, want); diff != "" {
		l.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// difference marks what is in one list only, "" if they are equal.
func difference(got, want []string) string {
	if slices.Equal(got, want) {
		return ""
	}
	var b strings.Builder
	for _, line := range want {
		if !slices.Contains(got, line) {
			fmt.Fprintf(&b, "-%s\n", line)
		}
	}
	for _, line := range got {
		if !slices.Contains(want, line) {
			fmt.Fprintf(&b, "+%s\n", line)
		}
	}
	if b.Len() == 0 {
		fmt.Fprintf(&b, "the order: want\n%s\ngot\n%s\n", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
	return b.String()
}

// addresses lists an interface's addresses as our own decoder reads them, in the kernel's order.
func (l *lab) addresses(index int) (lines []string) {
	l.Helper()
	messages, err := l.conn.Dump(rtnl.GetAddrs(index))
	l.must(err)
	for _, m := range messages {
		a, _, err := rtnl.DecodeAddr(m)
		l.must(err)
		line := fmt.Sprintf("%v proto %d", a.Prefix, a.Protocol)
		flags := attributesOf(m.Body[unix.SizeofIfAddrmsg:])[unix.IFA_FLAGS]
		if a.Secondary {
			line += " secondary"
		}
		if a.NoPrefixRoute {
			line += " noprefixroute"
		}
		if a.Peer.IsValid() {
			line += " peer " + a.Peer.String()
		}
		if binary.NativeEndian.Uint32(flags)&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED|unix.IFA_F_OPTIMISTIC) != 0 {
			line += " tentative"
		}
		lines = append(lines, line)
	}
	return lines
}

// routes lists the unicast routes through an interface, in the kernel's order.
func (l *lab) routes(index int) (lines []string) {
	l.Helper()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		messages, err := l.conn.Dump(rtnl.GetRoutes(family, index))
		l.must(err)
		for _, m := range messages {
			r, unicast, err := rtnl.DecodeRoute(m)
			l.must(err)
			if !unicast || r.Prefix == netip.MustParsePrefix("fe80::/64") {
				continue
			}
			line := fmt.Sprintf("%v table %d metric %d proto %d mtu %d mss %d", r.Prefix, r.Table, r.Metric, r.Protocol, r.MTU, r.MSS)
			if r.Source.IsValid() {
				line += " src " + r.Source.String()
			}
			lines = append(lines, line)
		}
	}
	return lines
}

func attributesOf(b []byte) map[uint16][]byte {
	all := make(map[uint16][]byte)
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		all[binary.NativeEndian.Uint16(b[2:])&0x3fff] = b[4:size]
		b = b[min((size+3)&^3, len(b)):]
	}
	return all
}

// kernelState is all that the kernel holds in the namespace: links with their settings, addresses and routes, in its order, of
// everybody. Counters, ages and what a link keeps of having been up are left out, and what nobody can put back: the order of
// IPv6 addresses, and the note that one was made stable-privacy.
func (l *lab) kernelState() (lines []string) {
	l.Helper()
	dump := func(what string, m rtnl.Message, header int, but ...uint16) {
		messages, err := l.conn.Dump(m)
		l.must(err)
		var part []string
		for _, m := range messages {
			line := what + " " + hex.EncodeToString(m.Body[:header])
			all := attributesOf(m.Body[header:])
			for kind := range uint16(64) {
				value, ok := all[kind]
				if what == "address" && kind == unix.IFA_FLAGS {
					value = binary.NativeEndian.AppendUint32(nil, binary.NativeEndian.Uint32(value)&^unix.IFA_F_STABLE_PRIVACY)
				}
				if ok && !slices.Contains(but, kind) {
					line += fmt.Sprintf(" %d:%x", kind, value)
				}
			}
			part = append(part, line)
		}
		slices.SortStableFunc(part, func(a, b string) int {
			const v6 = "address 0a"
			if strings.HasPrefix(a, v6) && strings.HasPrefix(b, v6) {
				return strings.Compare(a, b)
			}
			return 0 // IPv4 comes first
		})
		lines = append(lines, part...)
	}
	links, err := l.conn.Dump(rtnl.GetLink(0))
	l.must(err)
	for _, m := range links {
		link, err := rtnl.DecodeLink(m)
		l.must(err)
		lines = append(lines, fmt.Sprintf("link %s %d mtu %d qlen %d up %v %s", link.Name, link.Index, link.MTU, link.TxQueueLen, link.Up, l.settings(m)))
	}
	dump("address", rtnl.GetAddrs(0), unix.SizeofIfAddrmsg, unix.IFA_CACHEINFO)
	dump("route", rtnl.Message{Type: unix.RTM_GETROUTE, Body: []byte{unix.AF_INET, 11: 0}}, unix.SizeofRtMsg, unix.RTA_CACHEINFO)
	dump("route", rtnl.Message{Type: unix.RTM_GETROUTE, Body: []byte{unix.AF_INET6, 11: 0}}, unix.SizeofRtMsg, unix.RTA_CACHEINFO)
	return lines
}

// settings are a link's arrays of per-device settings, IPv4's and IPv6's, by which sysctl's values are told too.
func (l *lab) settings(m rtnl.Message) string {
	families := attributesOf(attributesOf(m.Body[unix.SizeofIfInfomsg:])[unix.IFLA_AF_SPEC])
	v4, v6 := attributesOf(families[unix.AF_INET]), attributesOf(families[unix.AF_INET6])
	return fmt.Sprintf("ipv4 %x ipv6 %x %x", v4[unix.IFLA_INET_CONF], v6[unix.IFLA_INET6_CONF], v6[unix.IFLA_INET6_ADDR_GEN_MODE])
}

func init() { nstest.Helper("lab device", helperDevice) }

// device runs helperDevice in a process of its own.
func (l *lab) device(cfg Config, opts nstest.HelperOptions) string {
	l.Helper()
	opts.Args = append(encodeConfig(l.T, cfg), opts.Args...)
	out, err := l.ns.Helper(l.T, "lab device", opts)
	l.must(err)
	return out
}

func encodeConfig(t *testing.T, cfg Config) []string {
	t.Helper()
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return []string{string(b)}
}

func decodeConfig(s string) (cfg Config, err error) {
	err = json.Unmarshal([]byte(s), &cfg)
	return cfg, err
}

// wantOpError checks the shape of an error of Activate or Reload, and that it says all of texts.
func (l *lab) wantOpError(err error, texts ...string) {
	l.Helper()
	var op *OpError
	if !errors.As(err, &op) || op.Op == "" || op.Device == "" {
		l.Fatalf("error %v is no *OpError with operation and device", err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			l.Errorf("error %q does not say %q", err, text)
		}
	}
}

// sysctl reads a setting of the namespace; "" if there is none.
func (l *lab) sysctl(path string) (value string) {
	l.Helper()
	l.in(func() error {
		b, err := os.ReadFile("/proc/sys/net/" + path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		value = strings.TrimSpace(string(b))
		return nil
	})
	return value
}

func (l *lab) setSysctl(path, value string) {
	l.Helper()
	l.in(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) })
}
