package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"
)

// healed is a Config with something of everything.
func healed() Config {
	return Config{
		Networks: prefixes("10.42.0.1/24", "10.42.0.3/24", "fd42::1/64"), MTU: 1400,
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.9.0.0/16"), MTU: 1300},
			{Prefix: netip.MustParsePrefix("10.10.0.0/16"), Metric: 7, Table: 77},
			{Prefix: netip.MustParsePrefix("fd09::/64"), Metric: 8},
			{Prefix: netip.MustParsePrefix("10.11.0.0/16"), NoInstall: true},
		},
	}
}

// config is what the kernel holds of the device, in no order and without the link's state, which is the administrator's.
func (l *lab) config(d *tunDevice) string {
	l.Helper()
	lines := append(l.addresses(d.index), l.routes(d.index)...)
	slices.Sort(lines)
	return strings.ReplaceAll(strings.Join(lines, "\n"), " secondary", "") // which of two it is depends on the way
}

// leeway is how much longer than promised things may take on a machine that does much else.
const leeway = 3

// wantHealed waits until the kernel holds again what it held, and returns how long that took.
func (l *lab) wantHealed(d *tunDevice, want string) time.Duration {
	l.Helper()
	start := time.Now()
	l.await("what was removed is back", func() bool { return l.config(d) == want })
	return time.Since(start)
}

// Whatever others remove of the device's is put back, within a second, in full, and told of (kernel.md U2, U6, A21, B6, B7).
func TestHeal(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	want := l.config(d)
	name := d.State().Name
	for _, lines := range []string{
		"route flush dev DEV",
		"-6 route flush dev DEV",
		"addr flush dev DEV",
		"route del 10.9.0.0/16 dev DEV",
		"route del 10.10.0.0/16 dev DEV table 77",
		"route del 10.42.0.0/24 dev DEV",
		"addr del 10.42.0.1/24 dev DEV", // the primary: with it go routes, silently
		"addr del fd42::1/64 dev DEV",
		"link set DEV down\nlink set DEV up",
		"link set DEV mtu 1279\nlink set DEV mtu 1400",
		"link set DEV mtu 1279\nlink set DEV down\nlink set DEV mtu 1400\nlink set DEV up",
		"route replace blackhole 10.9.0.0/16\nroute del blackhole 10.9.0.0/16",
		"route flush table 77",
		"route add 10.99.0.0/16 dev DEV proto 111", // as if of a former run
	} {
		before := d.Stats().Restores
		l.ip(strings.ReplaceAll(lines, "DEV", name))
		if took := l.wantHealed(d, want); took > leeway*time.Second {
			t.Errorf("%q: healed after %v", lines, took)
		}
		l.await("verified", func() bool { return d.isTrusted() })
		l.wantHardened(d)
		if after := d.Stats().Restores; after == before && !strings.Contains(lines, "proto 111") {
			t.Errorf("%q: nothing was counted", lines)
		}
	}
	if e := l.event(d, EventRestored); e.N == 0 || e.Err != nil {
		t.Errorf("event %v", e)
	}
	if s := d.State().String(); strings.Contains(s, "note ") {
		t.Errorf("state\n%s", s)
	}
	m, _ := meddle(d)
	l.must(d.Activate())
	if changes := m.changes(); len(changes) > 0 {
		t.Errorf("left to do: %v", changes)
	}
}

func (l *lab) hasRoute(d *tunDevice, start string) bool {
	l.Helper()
	return slices.ContainsFunc(l.routes(d.index), func(line string) bool { return strings.HasPrefix(line, start) })
}

func (d *tunDevice) isTrusted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trusted()
}

// When the link comes up its routes come at once: until then packets for the overlay take another way (kernel.md V27). Measured
// against a dump, which the test needs to see them.
func TestHealOnLinkUpAtOnce(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	want, name := l.config(d), d.State().Name
	var times []time.Duration
	for range healBurst { // more in a row wait their turn
		l.ip("link set " + name + " down")
		l.event(d, EventDown)
		l.await("healer at rest", func() bool { return !d.State().Up && d.atRest() })
		l.ip("link set " + name + " up")
		times = append(times, l.wantHealed(d, want))
	}
	if slices.Sort(times); times[len(times)/2] > healSettle {
		t.Errorf("healed after %v, want a median below the %v of other signs", times, healSettle)
	}
	t.Logf("healed after %v", times)
}

// atRest says whether every doubt has been looked into.
func (d *tunDevice) atRest() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.watch.hearAll(d) && d.trust.at == d.doubts.Load()
}

// While the MTU is below 1280 there is no IPv6, and no fight about it; IPv4 is as it can be (kernel.md B7, U15).
func TestHealLeavesLinkToAdministrator(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	want, name := l.config(d), d.State().Name
	for _, lines := range []string{"link set DEV mtu 1200", "link set DEV txqueuelen 99", "link set DEV down"} {
		l.ip(strings.ReplaceAll(lines, "DEV", name))
		l.await("healer at rest", d.atRest)
	}
	link, err := d.ownLink(d.view)
	if err != nil || link.Up || link.MTU != 1200 || link.TxQueueLen != 99 {
		t.Fatalf("link %+v, %v", link, err)
	}
	l.ip("link set " + name + " up")
	l.await("healer at rest", d.atRest)
	got := l.routes(d.index)
	slices.Sort(got)
	l.want("routes", got, "10.10.0.0/16 table 77 metric 7 proto 111 mtu 1200 mss 1160",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1200 mss 1160 src 10.42.0.1", "10.9.0.0/16 table 254 metric 0 proto 111 mtu 1200 mss 1160")
	if s := d.Stats(); s.RestoreFails != 0 {
		t.Errorf("%d repairs failed", s.RestoreFails)
	}
	l.ip("link set " + name + " mtu 1400")
	l.wantHealed(d, want)
	cfg := healed()
	l.reload(d, cfg) // an equal Reload puts the queue length back
	if link, _ := d.ownLink(d.view); link.TxQueueLen != defaultTxQueueLen {
		t.Errorf("queue length %d after Reload", link.TxQueueLen)
	}
}

// While the administrator has IPv6 disabled on the device it is left out, which is told; when he enables it again all of it comes
// back at once, though the kernel announces little of it.
func TestHealIPv6Disabled(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	want, name := l.config(d), d.State().Name
	const note = "note IPv6 is left out: "
	for range 2 {
		l.setSysctl("ipv6/conf/"+name+"/disable_ipv6", "1")
		if e := l.event(d, EventDegraded); !errors.Is(e.Err, ErrIPv6Disabled) {
			t.Errorf("event %v", e)
		}
		if s := d.State().String(); !strings.Contains(s, note) {
			t.Errorf("state\n%s", s)
		}
		if !l.hasRoute(d, "10.9.0.0/16") {
			t.Error("IPv4 went too")
		}
		l.setSysctl("ipv6/conf/"+name+"/disable_ipv6", "0")
		if took := l.wantHealed(d, want); took > leeway*time.Second {
			t.Errorf("healed after %v", took)
		}
		l.await("no note", func() bool { return !strings.Contains(d.State().String(), note) })
	}
	if s := d.Stats(); s.RestoreFails != 0 {
		t.Errorf("%d repairs failed", s.RestoreFails)
	}
}

// NoHeal leaves things as others made them; Reload repairs, and may switch healing on.
func TestNoHeal(t *testing.T) {
	l := newLab(t)
	cfg := healed()
	cfg.NoHeal = true
	d := l.active(cfg)
	want, name := l.config(d), d.State().Name
	l.ip("route flush dev " + name)
	l.ip("route flush table 77")
	flushed := l.config(d)
	l.await("the doubt", func() bool { return !d.isTrusted() })
	time.Sleep(2 * healEvery) // for what must not happen there is no condition
	if got := l.config(d); got != flushed || got == want {
		t.Errorf("healed to\n%s", got)
	}
	l.reload(d, cfg)
	l.wantHealed(d, want)
	cfg.NoHeal = false
	l.reload(d, cfg)
	l.ip("route del 10.9.0.0/16 dev " + name)
	l.wantHealed(d, want)
}

// One who flushes a thousand times a second costs neither processor nor log: looks, events and lines are bounded, and when he
// stops, all is well.
func TestHealAgainstFlusher(t *testing.T) {
	l := newLab(t)
	log, hook := logtest.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	cfg := healed()
	cfg.Logger = log
	d := l.active(cfg)
	want := l.config(d)
	m, _ := meddle(d)
	victim := kernel.Route{
		RouteKey: kernel.RouteKey{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Table: kernel.TableMain},
		Protocol: DefaultProtocol, Link: d.index,
	}
	hook.Reset()
	const length = 3 * time.Second
	deletions := 0
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); time.Since(start) < length; <-tick.C {
		if l.conn.Do(rtnl.DelRoute(victim))[0].Err == nil {
			deletions++
		}
	}
	looks := 0
	m.mu.Lock()
	for _, name := range m.log {
		if name == "GETADDR" {
			looks++
		}
	}
	m.mu.Unlock()
	most := healBurst + int(length/healEvery) + 1
	if looks > 2*most { // before and after each repair
		t.Errorf("%d looks in %v, want at most %d", looks, length, 2*most)
	}
	if deletions < 3 {
		t.Errorf("put back only %d times in %v", deletions, length)
	}
	l.wantHealed(d, want)
	if lines := len(hook.AllEntries()); lines > reportBurst+1 {
		t.Errorf("%d lines of log", lines)
	}
	t.Logf("%d deletions, %d looks, %d lines", deletions, looks, len(hook.AllEntries()))
}

// A device that may not change anything any more fails to heal: counted, told once, and seldom tried; State says why until it
// works again.
func TestHealFails(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	want, name := l.config(d), d.State().Name
	_, remove := meddle(d, func(m *meddler) {
		m.fail = func(_ int, r rtnl.Message) misfortune {
			if isQuestion(r) {
				return misfortune{}
			}
			return refusal(unix.EPERM)
		}
	})
	l.ip("route del 10.9.0.0/16 dev " + name)
	e := l.event(d, EventDegraded)
	if !strings.Contains(e.Err.Error(), "add route 10.9.0.0/16") || !strings.Contains(e.Err.Error(), "needs CAP_NET_ADMIN") {
		t.Errorf("event %v", e)
	}
	if s := d.State().String(); !strings.Contains(s, "note not put back what others removed: ") {
		t.Errorf("state\n%s", s)
	}
	l.await("a second attempt", func() bool { return d.Stats().RestoreFails >= 2 })
	l.noEvent(d, EventDegraded)
	remove()
	l.wantHealed(d, want)
	l.await("no note", func() bool { return !strings.Contains(d.State().String(), "note ") })
}

// Another's route for a prefix of ours is told of when it comes, and not fought; ours that it replaced is put back behind it
// (kernel.md A9, V12, law 4).
func TestHealTellsOfShadow(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	d := l.active(healed())
	l.ip("route replace 10.9.0.0/16 dev other0")
	e := l.event(d, EventShadowed)
	if !strings.Contains(e.Err.Error(), "10.9.0.0/16 is answered by other0") {
		t.Errorf("event %v", e)
	}
	l.await("ours is back", func() bool { return l.hasRoute(d, "10.9.0.0/16 table 254 metric 0 proto 111 mtu 1300") })
	if got := l.ip("route show 10.9.0.0/16"); !strings.HasPrefix(got, "10.9.0.0/16 dev other0") {
		t.Errorf("routes %s", got)
	}
	if s := d.State().String(); !strings.Contains(s, "note shadowed: 10.9.0.0/16 is answered by other0") {
		t.Errorf("state\n%s", s)
	}
	l.noEvent(d, EventShadowed)
}

// What others do with their own routes, also through our device, leads to no look at all.
func TestHealIgnoresOthersRoutes(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	d := l.active(healed())
	l.await("trust", d.isTrusted)
	m, _ := meddle(d)
	var lines strings.Builder
	for i := range 100 {
		fmt.Fprintf(&lines, "route add 10.100.%d.0/24 dev other0\nroute add 10.101.%d.0/24 via 10.42.0.9 dev %s\n", i, i, d.State().Name)
	}
	lines.WriteString("route flush 10.101.0.0/16 dev other0\nroute add 10.102.0.0/16 dev " + d.State().Name)
	l.ip(lines.String())
	if !d.isTrusted() {
		t.Error("others' routes raise a doubt")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.log) > 0 {
		t.Errorf("looked: %v", m.log)
	}
}

// Announcements that were lost lead to a look at everything (kernel.md A2).
func TestHealAfterOverrun(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	d := l.active(healed())
	want := l.config(d)
	smallWatch(l, d)
	other, ours := l.index("other0"), kernel.RouteKey{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Table: kernel.TableMain}
	var requests []rtnl.Message
	for i := range 200 {
		requests = append(requests, rtnl.SetLinkMTU(other, 1000+i))
	}
	requests[100] = rtnl.DelRoute(kernel.Route{RouteKey: ours, Protocol: DefaultProtocol, Link: d.index})
	overruns := d.Stats().Overruns
	l.await("an overrun", func() bool {
		l.conn.Do(requests...)
		return d.Stats().Overruns > overruns
	})
	l.wantHealed(d, want)
}

// Close ends the healer in the middle of a fight, and Activate, Reload and healing take turns.
func TestHealBesideEverything(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	name := d.State().Name
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				l.ns.Run(t, "sh", "-c", "ip route flush dev "+name+" 2>/dev/null || true") // a dump may be interrupted
			}
		}
	})
	cfg := healed()
	cfg.NetNS = l.ns.Path()
	for i := range 50 {
		cfg.Routes[0].MTU = 1300 + i
		if err := d.Reload(cfg); err != nil && !strings.Contains(err.Error(), "the kernel differs") {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	l.await("the last Config in force", func() bool {
		return d.Reload(cfg) == nil && l.hasRoute(d, "10.9.0.0/16 table 254 metric 0 proto 111 mtu 1349")
	})
	l.must(d.Close())
	if err := d.Reload(cfg); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Reload after Close: %v", err)
	}
}

// A healing device at rest costs no processor time: no timer ticks but the audit's.
func TestHealerSleeps(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	l.await("trust", d.isTrusted)
	m, _ := meddle(d)
	var before, after syscall.Rusage
	l.must(syscall.Getrusage(syscall.RUSAGE_SELF, &before))
	time.Sleep(time.Second)
	l.must(syscall.Getrusage(syscall.RUSAGE_SELF, &after))
	if spent := time.Duration(after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano()); spent > 200*time.Millisecond {
		t.Errorf("%v of processor time in a second", spent)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.log) > 0 {
		t.Errorf("looked: %v", m.log)
	}
}
