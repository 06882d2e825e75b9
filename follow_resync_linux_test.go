package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// sparseConn is a follower's connection whose dumps of routes fail while fault is set: they show every other route only.
type sparseConn struct {
	routesConn
	fault atomic.Pointer[error]
	dumps atomic.Int64
}

func (c *sparseConn) DumpOnce(request rtnl.Message) ([]rtnl.Message, error) {
	c.dumps.Add(1)
	fault := c.fault.Load()
	if fault == nil {
		return c.routesConn.DumpOnce(request)
	}
	show, n := request.Keep, 0
	request.Keep = func(m rtnl.Message) bool {
		n++
		return n%2 == 0 && show(m)
	}
	_, _ = c.routesConn.DumpOnce(request)
	return nil, *fault
}

// A dump that fails, is interrupted, or overruns its socket takes nothing away. State says so until one succeeds, and it is tried
// again, ever more rarely (kernel.md A5).
func TestFollowFailingDumps(t *testing.T) {
	for _, fault := range []error{rtnl.ErrInterrupted, rtnl.ErrOverrun, unix.EMSGSIZE} {
		t.Run(fault.Error(), func(t *testing.T) {
			l := newLab(t)
			d := l.open(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), SystemRoutes: &SystemRoutes{}})
			conn := &sparseConn{routesConn: d.follower.conn}
			d.follower.conn = conn
			l.must(d.Activate())
			l.event(d, EventResynced)
			var lines strings.Builder
			for i := range 100 {
				fmt.Fprintf(&lines, "route add 10.9.%d.0/24 via 10.42.0.9\n", i)
			}
			l.ip(lines.String())
			l.wantRoute(d, "10.9.99.1", "10.42.0.9")
			conn.fault.Store(&fault)
			before := conn.dumps.Load()
			d.follower.resync(errLink)
			begun := time.Now()
			const note = "the kernel's routes may not be those that are followed"
			l.await("a note", func() bool { return strings.Contains(d.State().String(), note) })
			e := l.event(d, EventDegraded)
			if !errors.Is(e.Err, fault) {
				t.Errorf("event %v", e)
			}
			l.ip("route add 10.10.0.0/16 via 10.42.0.10") // meanwhile announcements are heard
			l.wantRoute(d, "10.10.0.1", "10.42.0.10")
			l.await("the fourth try, of two dumps each", func() bool { return conn.dumps.Load()-before >= 8 })
			if took := time.Since(begun); took < 700*time.Millisecond { // 0.1, 0.2, 0.4 s
				t.Errorf("four tries in %v", took)
			}
			for i := range 100 {
				if got := routeOf(d, fmt.Sprintf("10.9.%d.1", i)); got != "10.42.0.9" {
					t.Fatalf("a route is gone: %s", got)
				}
			}
			l.noEvent(d, EventDegraded, EventResynced)
			conn.fault.Store(nil)
			l.event(d, EventResynced)
			if strings.Contains(d.State().String(), note) {
				t.Errorf("state\n%v", d.State())
			}
		})
	}
}

// Where every dump from the first on is interrupted, what they show is better than nothing: it counts after some tries.
func TestFollowInterruptedFromTheStart(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\naddr add 10.42.0.1/24 dev p0\nlink set p0 up\nroute add 10.9.0.0/16 via 10.42.0.9\nroute add 10.9.0.0/16 via 10.42.0.9 metric 5")
	d := l.open(Config{Name: "p0", Mode: Attach, Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{}})
	conn, fault := &sparseConn{routesConn: d.follower.conn}, rtnl.ErrInterrupted
	conn.fault.Store(&fault)
	d.follower.conn = conn
	l.must(d.Activate())
	l.wantRoute(d, "10.9.0.1", "10.42.0.9") // of the two one is shown
}

// busyConn is a follower's connection during whose next dump of routes something else is done.
type busyConn struct {
	routesConn
	during atomic.Pointer[func()]
}

func (c *busyConn) DumpOnce(request rtnl.Message) ([]rtnl.Message, error) {
	messages, err := c.routesConn.DumpOnce(request)
	if do := c.during.Swap(nil); do != nil {
		(*do)()
	}
	return messages, err
}

// What a dump leaves in doubt, because a route was announced meanwhile, is asked about though nothing is announced after that.
func TestFollowBusyDump(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
	d := l.open(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	conn := &busyConn{routesConn: d.follower.conn}
	d.follower.conn = conn
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.ip("link set " + d.State().Name + " alias x") // the first that is heard of a link is news in any case
	l.event(d, EventResynced)
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	foreign := rtnl.AddRoute(kernel.Route{RouteKey: kernel.RouteKey{Prefix: hostRoute(0), Table: kernel.TableMain}, Link: l.index("other0")})
	do := func() { l.conn.Do(foreign) }
	conn.during.Store(&do)
	l.ip("addr del 10.42.0.1/24 dev " + d.State().Name) // with it go the routes, untold (kernel.md A8)
	if took := l.wantRoute(d, "10.9.0.1", "none"); took > leeway*time.Second {
		t.Errorf("after %v", took)
	}
	if conn.during.Load() != nil {
		t.Error("there was no dump")
	}
}

// A dump that leaves routes out while one of others is announced, be it through another interface and hidden by the filter at other
// times, is no proof that they are gone (kernel.md V5), and no failure.
func TestFollowDumpSpoiltByOthers(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
	d := l.open(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	conn := &holedConn{busyConn: busyConn{routesConn: d.follower.conn}}
	d.follower.conn = conn
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.install(gatewayRoutes(100, d.index))
	l.await("all learned", func() bool { return d.State().Learned >= 100 })
	foreign := rtnl.AddRoute(kernel.Route{RouteKey: kernel.RouteKey{Prefix: netip.MustParsePrefix("12.0.0.0/8"), Table: kernel.TableMain}, Link: l.index("other0")})
	do := func() { l.conn.Do(foreign) }
	conn.during.Store(&do)
	conn.holes.Store(true)
	before := d.Stats().Resyncs
	d.follower.resync(errLink)
	l.await("the resync", func() bool {
		return d.Stats().Resyncs > before || strings.Contains(d.State().String(), "may not be those")
	})
	if s := d.State(); s.Learned < 100 || strings.Contains(s.String(), "may not be those") {
		t.Errorf("state\n%v", s)
	}
}

// holedConn is a busyConn whose next dump shows every other route only, while holes is set.
type holedConn struct {
	busyConn
	holes atomic.Bool
}

func (c *holedConn) DumpOnce(request rtnl.Message) ([]rtnl.Message, error) {
	if show, n := request.Keep, 0; c.holes.Swap(false) {
		request.Keep = func(m rtnl.Message) bool {
			n++
			return n%2 == 0 && show(m)
		}
	}
	return c.busyConn.DumpOnce(request)
}

// deafEars hear until deaf is set; then the kernel answers with an error, as for a descriptor that is no socket.
type deafEars struct {
	ears
	deaf atomic.Bool
}

func (e *deafEars) Next() ([]rtnl.Message, error) {
	if e.deaf.Load() {
		return nil, unix.ENOTSOCK
	}
	return e.ears.Next()
}

func (e *deafEars) Wait() error {
	if e.deaf.Load() {
		return unix.ENOTSOCK
	}
	return e.ears.Wait()
}

func (e *deafEars) WaitUntil(deadline time.Time) error {
	if e.deaf.Load() {
		return unix.ENOTSOCK
	}
	return e.ears.WaitUntil(deadline)
}

// Where the kernel tells no more of routes they are read every few seconds, and nothing spins (design.md law 6); a Reload that
// begins anew does no worse.
func TestFollowDeaf(t *testing.T) {
	l := newLab(t)
	cfg := following1()
	d := l.open(cfg)
	ears := &deafEars{ears: d.follower.listener}
	d.follower.listener = ears
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	ears.deaf.Store(true)
	l.ip("route add 10.10.0.0/16 via 10.42.0.10")
	if e := l.event(d, EventDegraded); !errors.Is(e.Err, unix.ENOTSOCK) {
		t.Errorf("event %v", e)
	}
	l.wantRoute(d, "10.10.0.1", "10.42.0.10") // by the look that follows
	cpu := l.processorTime()
	l.ip("route replace 10.9.0.0/16 via 10.42.0.11\nroute del 10.10.0.0/16")
	took := l.wantRoute(d, "10.9.0.1", "10.42.0.11")
	l.wantRoute(d, "10.10.0.1", "none")
	if cpu = l.processorTime() - cpu; took > leeway*auditDeaf || cpu > took/2 && cpu > time.Second {
		t.Errorf("after %v, %v of processor time", took, cpu)
	}
	l.ip("route replace 10.9.0.0/16 via 10.42.0.12")
	begun := time.Now()
	l.reload(d, Config{Networks: cfg.Networks, SystemRoutes: &SystemRoutes{Max: 1000}})
	l.event(d, EventDegraded)
	l.wantRoute(d, "10.9.0.1", "10.42.0.12")
	l.must(d.Close())
	if took := time.Since(begun); took > leeway*time.Second {
		t.Errorf("Reload, its look and Close took %v", took)
	}
}

// Where the kernel tells no more of the device the healer looks for itself, every few seconds.
func TestWatchDeaf(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
	ears := new(deafEars)
	d.mu.Lock()
	d.watch.stop()
	l.in(func() error {
		w, err := newWatch(d.ctl.Port())
		ears.ears = w.listener
		w.listener = ears
		d.watch = w
		return err
	})
	d.watch.start(d)
	d.mu.Unlock()
	ears.deaf.Store(true)
	l.ip("link set tun0 alias x")
	if e := l.event(d, EventDegraded); !errors.Is(e.Err, unix.ENOTSOCK) {
		t.Errorf("event %v", e)
	}
	l.await("the look that follows", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.trust.at == d.doubts.Load()
	})
	l.ip("addr del 10.42.0.1/24 dev tun0")
	begun := time.Now()
	l.event(d, EventRestored)
	if took := time.Since(begun); took > leeway*auditDeaf {
		t.Errorf("after %v", took)
	}
}

// stormyEars hear the same announcement without end while storm is set, as fast as they listen.
type stormyEars struct {
	ears
	storm   atomic.Bool
	message rtnl.Message
}

func (e *stormyEars) Next() ([]rtnl.Message, error) {
	if e.storm.Load() {
		return []rtnl.Message{e.message}, nil
	}
	return e.ears.Next()
}

func (e *stormyEars) Wait() error {
	if e.storm.Load() {
		return nil
	}
	return e.ears.Wait()
}

func (e *stormyEars) WaitUntil(deadline time.Time) error {
	if e.storm.Load() {
		return nil
	}
	return e.ears.WaitUntil(deadline)
}

// However many announcements there are, to hear them costs each that listens two thirds of a processor at most, and orders are
// obeyed meanwhile (kernel.md A27).
func TestStormShare(t *testing.T) {
	l := newLab(t)
	d := l.open(following1())
	message := gatewayRoutes(1, d.index)[0]
	follower := &stormyEars{ears: d.follower.listener, message: message}
	d.follower.listener = follower
	l.must(d.Activate())
	l.event(d, EventResynced)
	watch := &stormyEars{message: message}
	d.mu.Lock()
	d.watch.stop()
	l.in(func() error {
		w, err := newWatch(d.ctl.Port())
		watch.ears = w.listener
		w.listener = watch
		d.watch = w
		return err
	})
	d.watch.start(d)
	d.mu.Unlock()
	for name, ears := range map[string]*stormyEars{"follower": follower, "watch": watch} {
		ears.storm.Store(true)
		l.ip("link set " + d.State().Name + " alias " + name) // wakes it
		cpu, begun := l.processorTime(), time.Now()
		time.Sleep(time.Second)
		share := float64(l.processorTime()-cpu) / float64(time.Since(begun))
		t.Logf("%s: %.2f of a processor", name, share)
		if share > 0.8 || share < 0.05 {
			t.Errorf("%s: %.2f of a processor", name, share)
		}
		l.reload(d, following1())
		ears.storm.Store(false)
	}
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
}

// A receive buffer of the smallest size is overrun by any burst: that is counted and told, and what was lost is read anew, at no
// great cost (kernel.md A2 to A4).
func TestFollowOverrun(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{ReadBuffer: 1}})
	l.event(d, EventResynced)
	if granted := d.follower.listener.ReadBuffer() / 2; granted <= 1 || !strings.Contains(d.State().String(), fmt.Sprintf("read-buffer %d ", granted)) {
		t.Errorf("granted %d, state\n%v", granted, d.State())
	}
	const n = 20_000
	l.install(gatewayRoutes(n, d.index))
	for {
		if e := l.event(d, EventResynced); errors.Is(e.Err, rtnl.ErrOverrun) {
			break
		}
	}
	l.await("all learned", func() bool { return d.State().Learned >= n })
	l.wantRoute(d, hostRoute(n-1).Addr().String(), "10.42.0."+string(rune('2'+(n-1)%3)))
	if d.Stats().Overruns == 0 {
		t.Error("no overrun was counted")
	}
	cpu, begun := l.processorTime(), time.Now()
	for time.Since(begun) < time.Second { // one reason after the other
		d.follower.resync(errLink)
		time.Sleep(time.Millisecond)
	}
	if share := float64(l.processorTime()-cpu) / float64(time.Since(begun)); share > 0.5 && !raceEnabled {
		t.Errorf("to read all again and again costs %.2f of a processor", share)
	}
	l.ip("route flush proto static")
	l.wantRoute(d, hostRoute(n-1).Addr().String(), "none")
	l.await("none learned", func() bool { return d.State().Learned == 0 })
}

// A dump of IPv6 routes leaves out some that are there while others change below them, the same ones twice (kernel.md A6, V5).
// None of them leaves the tree, nor the answers of those that look.
func TestFollowIPv6DumpsUnderChurn(t *testing.T) {
	n := 60_000
	if testing.Short() || raceEnabled {
		n = 10_000
	}
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("fd42::1/64"), SystemRoutes: &SystemRoutes{}})
	stable := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 5: byte(i >> 16), 6: byte(i >> 8), 7: byte(i)}), 64)
	}
	route := func(p netip.Prefix) kernel.Route {
		return kernel.Route{RouteKey: kernel.RouteKey{Prefix: p, Table: kernel.TableMain, Metric: 1024}, Protocol: unix.RTPROT_STATIC, Link: d.index}
	}
	var requests []rtnl.Message
	for i := range n {
		requests = append(requests, rtnl.AddRoute(route(stable(i))))
	}
	l.install(requests)
	l.await("all learned", func() bool { return d.State().Learned >= n })
	l.wantRoute(d, stable(n-1).Addr().String(), "on-link")

	stop, missed := make(chan struct{}), 0
	var churn sync.WaitGroup
	churn.Go(func() { // on the lab's connection: nobody else uses it now
		for {
			for _, change := range []func(kernel.Route) rtnl.Message{rtnl.AddRoute, rtnl.DelRoute} {
				for i := range n / 10 {
					select {
					case <-stop:
						return
					default:
						l.conn.Do(change(route(netip.PrefixFrom(stable(i).Addr(), 65))))
					}
				}
			}
		}
	})
	for range 5 { // what the follower sees
		shown := make(map[netip.Prefix]bool) // some twice
		request := rtnl.GetFIB(unix.AF_INET6, kernel.TableMain)
		request.Keep = func(m rtnl.Message) bool {
			if p, _ := rtnl.PeekRoute(m); p.Bits() == 64 && p.Addr().As16()[0] == 0x20 {
				shown[p] = true
			}
			return false
		}
		if _, err := d.follower.conn.DumpOnce(request); err != nil && !errors.Is(err, rtnl.ErrInterrupted) {
			t.Error(err)
		}
		missed = max(missed, n-len(shown))
	}
	for range 3 {
		before := d.Stats().Resyncs
		d.follower.resync(errAudit)
		for d.Stats().Resyncs == before {
			for i := range n {
				if got := routeOf(d, stable(i).Addr().Next().String()); got != "on-link" {
					t.Fatalf("%v: %s", stable(i), got)
				}
			}
		}
	}
	close(stop)
	churn.Wait()
	t.Logf("dumps under churn left out up to %d of %d routes", missed, n)
}

// oldConn is a follower's connection to a kernel before 4.20, which does not filter dumps: it lists all tables.
type oldConn struct{ routesConn }

func (c oldConn) DumpOnce(request rtnl.Message) ([]rtnl.Message, error) {
	request.Body = request.Body[:unix.SizeofRtMsg]
	return c.routesConn.DumpOnce(request)
}

// What is in other tables is not learned where a dump lists it none the less (kernel.md A17).
func TestFollowUnfilteredDumps(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun\naddr add 10.42.0.1/24 dev p0\nlink set p0 up\nroute add 10.9.0.0/16 via 10.42.0.9\n" +
		"route add 10.4.0.0/16 via 10.42.0.9 table 77\nroute add 10.5.0.0/16 via 10.42.0.10 table 100\nroute add 10.9.0.0/16 via 10.42.0.11 table 77")
	cfg := following1()
	cfg.Name, cfg.Mode, cfg.SystemRoutes = "p0", Attach, &SystemRoutes{Tables: []int{254, 100}}
	d := l.open(cfg)
	d.follower.conn = oldConn{d.follower.conn}
	l.must(d.Activate())
	l.event(d, EventResynced)
	for addr, want := range map[string]string{"10.9.0.1": "10.42.0.9", "10.4.0.1": "none", "10.5.0.1": "none", "10.42.0.9": "on-link", "10.42.0.255": "on-link"} {
		if got := routeOf(d, addr); got != want {
			t.Errorf("%s goes through %s, want %s", addr, got, want)
		}
	}
	l.ip("rule add pref 1000 table 100")
	l.wantRoute(d, "10.5.0.1", "10.42.0.10")
}
