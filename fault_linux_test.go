package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// fault is a way in which the kernel fails from the n-th operation on, or at it alone.
type fault struct {
	name     string
	for_     func(n, op int, m rtnl.Message) misfortune
	forever  bool // the way back may fail too
	unseeing bool // nobody can look
	raced    bool // tried under the race detector too
}

func refusal(errno unix.Errno) misfortune { return misfortune{err: &rtnl.Error{Errno: errno}} }

func at(n, op int, bad misfortune) misfortune {
	if n == op {
		return bad
	}
	return misfortune{}
}

func isQuestion(m rtnl.Message) bool { return strings.HasPrefix(messageName(m), "GET") }

var faults = []fault{
	{name: "EPERM", raced: true, for_: func(n, op int, _ rtnl.Message) misfortune { return at(n, op, refusal(unix.EPERM)) }},
	{name: "EINVAL", for_: func(n, op int, _ rtnl.Message) misfortune { return at(n, op, refusal(unix.EINVAL)) }},
	{name: "the answer lost", for_: func(n, op int, _ rtnl.Message) misfortune {
		return at(n, op, misfortune{err: rtnl.ErrUnknown, done: true})
	}},
	{name: "the request lost", raced: true, for_: func(n, op int, _ rtnl.Message) misfortune {
		return at(n, op, misfortune{err: rtnl.ErrUnknown})
	}},
	{name: "dumps interrupted from then on", raced: true, unseeing: true, for_: func(n, op int, m rtnl.Message) misfortune {
		if op >= n && isDump(m) {
			return misfortune{err: rtnl.ErrInterrupted}
		}
		return misfortune{}
	}},
	{name: "all answers lost from then on", forever: true, for_: func(n, op int, m rtnl.Message) misfortune {
		if op >= n && !isQuestion(m) {
			return misfortune{err: rtnl.ErrUnknown, done: true}
		}
		return misfortune{}
	}},
	{name: "all changes refused from then on", raced: true, forever: true, for_: func(n, op int, m rtnl.Message) misfortune {
		if op >= n && !isQuestion(m) {
			return refusal(unix.EPERM)
		}
		return misfortune{}
	}},
}

// isDump tells dumps from questions about one object.
func isDump(m rtnl.Message) bool {
	return m.Type == unix.RTM_GETADDR || m.Type == unix.RTM_GETROUTE && m.Body[1] == 0
}

// trial is something that may fail half-way.
type trial struct {
	prepare func(l *lab) *tunDevice
	run     func(l *lab, d *tunDevice) error
	unsure  bool // without a look nobody can tell that it was taken back
}

// Whatever operation fails, in whatever way, the kernel holds all of what was asked or is exactly as it was, and so does the
// tree; the error names device and step. Where even the way back fails it is ErrPartial, and the next attempt repairs
// (design.md law 5, kernel.md B10, A5, U39).
func TestFaultsOfActivate(t *testing.T) {
	cfg := Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400,
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1300}, {Prefix: netip.MustParsePrefix("fd09::/64"), Metric: 8}},
	}
	activate := func(_ *lab, d *tunDevice) error { return d.Activate() }
	trials := make(map[string]trial)
	for name, prepare := range map[string]func(*lab) *tunDevice{
		"new": func(l *lab) *tunDevice { return l.open(cfg) },
		"attached": func(l *lab) *tunDevice {
			return l.attachTo(cfg, `link set p0 mtu 1300
				addr add 10.42.0.1/24 dev p0
				addr add 10.42.0.7/24 dev p0
				addr add 10.43.0.1/24 dev p0 proto 111
				addr add fd42::1/64 dev p0
				addr add fd43::1/64 dev p0 proto 111
				link set p0 up
				route add 10.8.0.0/16 dev p0 proto 111
				route add 10.9.0.0/16 dev p0 proto 111 metric 0 mtu 900
				route add fd08::/64 dev p0 proto 111
				route add fd09::/64 dev p0 proto 111 metric 8
				route add 10.7.0.0/16 dev p0 src 10.43.0.1`)
		},
		"attached, down, below IPv6": func(l *lab) *tunDevice {
			return l.attachTo(cfg, "link set p0 mtu 1279\naddr add 10.42.0.1/24 dev p0 noprefixroute")
		},
		"attached, down, with addresses": func(l *lab) *tunDevice {
			return l.attachTo(cfg, `addr add 10.42.0.1/24 dev p0 noprefixroute
				addr add fd42::7/64 dev p0
				addr add fd43::1/64 dev p0 proto 111`)
		},
	} {
		trials[name] = trial{prepare: prepare, run: activate, unsure: name == "attached, down, with addresses"}
	}
	tryFaults(t, trials)
}

// attachTo prepares the persistent device p0 with ip(8) and attaches to it.
func (l *lab) attachTo(cfg Config, lines string) *tunDevice {
	l.Helper()
	var batch strings.Builder
	batch.WriteString("tuntap add p0 mode tun\n")
	for line := range strings.Lines(lines) {
		if fields := strings.Fields(line); len(fields) != 7 || fields[5] != "proto" {
			batch.WriteString(line + "\n")
			continue
		}
		l.ip(batch.String())
		batch.Reset()
		l.address("p0", strings.Fields(line)[2], 111)
	}
	l.ip(batch.String())
	cfg.Name, cfg.Mode = "p0", Attach
	d := l.open(cfg)
	l.ready(d)
	return d
}

// A mixed change: addresses come and go, among them a primary, lengths and MTU change, and so do routes.
func TestFaultsOfReload(t *testing.T) {
	old := Config{
		Networks: prefixes("10.42.0.1/24", "10.42.0.3/24", "10.44.0.1/24", "fd42::1/64", "fd44::1/64"), MTU: 1400,
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1300, Via: via("10.42.0.9")},
			{Prefix: netip.MustParsePrefix("10.10.0.0/16")},
			{Prefix: netip.MustParsePrefix("fd09::/64"), MTU: 1300},
			{Prefix: netip.MustParsePrefix("fd10::/64")},
		},
	}
	next := Config{
		Networks: prefixes("10.42.0.2/24", "10.42.0.3/24", "10.44.0.1/16", "fd42::1/48", "fd44::1/64"), MTU: 1500,
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1200, Via: via("10.42.0.8")},
			{Prefix: netip.MustParsePrefix("10.11.0.0/16")},
			{Prefix: netip.MustParsePrefix("fd09::/64"), MTU: 1290},
			{Prefix: netip.MustParsePrefix("fd10::/64"), Metric: 9},
		},
	}
	small := Config{Networks: prefixes("10.42.0.1/24", "10.42.0.3/24", "10.44.0.1/24"), MTU: 1000}
	routes := old // what Reload does without a look
	routes.Routes = []Route{
		{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1200, Via: via("10.42.0.8")},
		{Prefix: netip.MustParsePrefix("10.10.0.0/16"), Metric: 9},
		{Prefix: netip.MustParsePrefix("10.11.0.0/16")},
		{Prefix: netip.MustParsePrefix("fd09::/64"), MTU: 1290},
		{Prefix: netip.MustParsePrefix("fd11::/64"), Via: via("fd42::9")},
	}
	trusting := func(prepare func(*lab) *tunDevice) func(*lab) *tunDevice {
		return func(l *lab) *tunDevice {
			d := prepare(l)
			l.await("trust", d.isTrusted)
			return d
		}
	}
	prepare := func(foreign string) func(l *lab) *tunDevice {
		return func(l *lab) *tunDevice {
			d := l.active(old)
			l.ip(strings.ReplaceAll(foreign, "DEV", d.State().Name))
			l.ready(d)
			return d
		}
	}
	const foreign4 = "route add 10.7.0.0/16 dev DEV src 10.42.0.1\naddr add 10.42.0.77/24 dev DEV"
	const foreign6 = "\nroute add fd07::/64 dev DEV metric 77"
	reload := func(cfg Config) func(*lab, *tunDevice) error {
		return func(l *lab, d *tunDevice) error {
			cfg := cfg
			cfg.NetNS = l.ns.Path()
			return d.Reload(cfg)
		}
	}
	tryFaults(t, map[string]trial{
		"mixed":     {prepare: prepare(foreign4 + foreign6), run: reload(next)},
		"routes":    {prepare: trusting(prepare(foreign4 + foreign6)), run: reload(routes)},
		"IPv6 goes": {prepare: prepare(foreign4), run: reload(small), unsure: true},
	})
}

// tryFaults lets every operation of every trial fail in every way.
func tryFaults(t *testing.T, trials map[string]trial) {
	t.Helper()
	var total, partial atomic.Int32
	tests := make(map[string]func(*lab))
	for name, tr := range trials {
		for _, f := range faults {
			if raceEnabled && !f.raced {
				continue // as much again takes a minute
			}
			tests[name+": "+f.name] = func(l *lab) { tr.try(l, f, &total, &partial) }
		}
	}
	together(t, tests)
	t.Logf("%d faults, after %d of them the way back failed too", total.Load(), partial.Load())
	if partial.Load() == 0 {
		t.Error("the way back never failed")
	}
}

// try lets one operation after the other fail.
func (tr trial) try(l *lab, f fault, total, partial *atomic.Int32) {
	d := tr.prepare(l)
	before := l.kernelState()
	var operations []rtnl.Message
	_, remove := meddle(d, func(m *meddler) {
		m.before = func(_ int, r rtnl.Message) { operations = append(operations, r) }
	})
	l.must(tr.run(l, d))
	remove()
	wanted := l.kernelState()
	intact := false
	for n := 1; n <= len(operations) && !l.Failed(); n++ {
		if f.for_(n, n, operations[n-1]).err == nil {
			continue // not this one
		}
		if !intact {
			d.Close()
			l.conn.Do(rtnl.DelLink(d.index))
			l.alone()
			d = tr.prepare(l)
			before = l.kernelState()
		}
		var err error
		intact, err = tr.tryOne(l, f, n, d, before, wanted)
		total.Add(1)
		if errors.Is(err, ErrPartial) {
			partial.Add(1)
		}
	}
}

// tryOne lets the n-th operation fail. intact: all is as before.
func (tr trial) tryOne(l *lab, f fault, n int, d *tunDevice, before, wanted []string) (intact bool, err error) {
	l.Helper()
	routes := treeOf(d)
	hit := ""
	_, remove := meddle(d, func(m *meddler) {
		m.fail = func(op int, r rtnl.Message) misfortune {
			bad := f.for_(n, op, r)
			if bad.err != nil && hit == "" {
				hit = messageName(r)
			}
			return bad
		}
	})
	err = tr.run(l, d)
	remove()
	what := fmt.Sprintf("%s at operation %d (%s)", f.name, n, hit)
	if err == nil {
		// To remove the kernel's link-local address is hardening: refused, it is told, and no error.
		told := hit == "DELADDR" && strings.Contains(d.State().String(), "note remove address fe80:")
		if diff := difference(generic(l.kernelState()), generic(wanted)); diff != "" && !told {
			l.Errorf("%s: no error, and the kernel differs:\n%s", what, diff)
		}
		return false, err
	}
	l.wantOpError(err)
	if step := regexp.MustCompile(`: (set|add|remove|take|read) `); !step.MatchString(err.Error()) {
		l.Errorf("%s: %v: names no step", what, err)
	}
	if f.name == "EPERM" && (!errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "needs CAP_NET_ADMIN")) {
		l.Errorf("%s: %v", what, err)
	}
	if errors.Is(err, ErrPartial) {
		if !f.forever && !(tr.unsure && f.unseeing) {
			l.Errorf("%s: %v", what, err)
		}
		if err := tr.run(l, d); err != nil {
			l.Errorf("%s: not repaired: %v", what, err)
		}
		if diff := difference(generic(l.kernelState()), generic(wanted)); diff != "" {
			l.Errorf("%s: repaired, and the kernel differs:\n%s", what, diff)
		}
		return false, err
	}
	diff := ""
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(time.Millisecond) { // a worker makes IPv6 addresses local
		diff = difference(l.kernelState(), before)
		if diff == "" || time.Now().After(deadline) {
			break
		}
	}
	if diff != "" {
		l.Errorf("%s: %v: and the kernel is not as it was:\n%s", what, err, diff)
	}
	l.want(what+": the tree", treeOf(d), routes...)
	return true, err
}

// generic makes the states of two devices comparable: without indexes and names, without settings, whose failure is no error,
// and without orders that depend on the way.
func generic(lines []string) []string {
	var out []string
	for _, line := range lines {
		fields := strings.Fields(line)
		switch fields[0] {
		case "link":
			fields = append(fields[:1], fields[3:9]...)
		case "address":
			fields[1] = fields[1][:4] // family and length
			fields = slices.DeleteFunc(fields, func(f string) bool { return strings.HasPrefix(f, "3:") || strings.HasPrefix(f, "8:") })
		case "route":
			fields = slices.DeleteFunc(fields, func(f string) bool { return strings.HasPrefix(f, "4:") })
		}
		out = append(out, strings.Join(fields, " "))
	}
	slices.Sort(out)
	return out
}

func treeOf(d *tunDevice) (lines []string) {
	for prefix, gateways := range d.State().Routes() {
		line := prefix.String()
		for i := range gateways.Len() {
			line += fmt.Sprintf(" %v", gateways.At(i))
		}
		lines = append(lines, line)
	}
	return lines
}
