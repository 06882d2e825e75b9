package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
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

// Others work on the device while Activate does.

func contested() Config {
	return Config{
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), MTU: 1400, NoHeal: true,
		Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16")}, {Prefix: netip.MustParsePrefix("fd09::/64")}},
	}
}

// moment is when in an Activate something happened.
type moment struct {
	text string
	late bool // after the last look at the kernel
	last bool // after the last change
}

func (m moment) String() string { return m.text }

// disturb activates a new device and calls fn before the n-th operation, for every n. check gets what came of it.
func disturb(l *lab, cfg Config, fn func(d *tunDevice, question bool), check func(when moment, d *tunDevice, err error)) {
	l.Helper()
	for n, reached := 1, true; reached && !l.Failed(); n++ {
		d := l.open(cfg)
		m, remove := meddle(d)
		reached = false
		m.before = func(op int, r rtnl.Message) {
			if op == n {
				reached = true
				fn(d, isQuestion(r))
			}
		}
		err := d.Activate()
		remove()
		if reached {
			when := moment{fmt.Sprintf("operation %d of %d, %s", n, m.n, m.log[n-1]), true, true}
			for _, name := range m.log[n-1:] {
				when.late = when.late && name != "GETADDR" // what follows are questions about who answers
				when.last = when.last && strings.HasPrefix(name, "GET")
			}
			check(when, d, err)
		}
		d.Close()
		l.conn.Do(rtnl.DelLink(d.index)) // if it is another's now
		l.alone()
	}
}

// Whenever somebody deletes an address, Activate heals or fails: it does not say that all is well of a kernel that differs
// (kernel.md U18).
func TestActivateNeverLies(t *testing.T) {
	l := newLab(t)
	for _, victim := range prefixes("10.42.0.1/24", "fd42::1/64") {
		deleted := false
		disturb(l, contested(), func(d *tunDevice, _ bool) {
			deleted = l.conn.Do(rtnl.DelAddr(d.index, kernel.Addr{Prefix: victim}))[0].Err == nil
		}, func(when moment, d *tunDevice, err error) {
			whole := len(l.addresses(d.index)) == 2 && len(l.routes(d.index)) == 4
			if err == nil && !whole && !(deleted && when.late) {
				t.Errorf("%v deleted before %s: no error, and %v, %v", victim, when, l.addresses(d.index), l.routes(d.index))
			}
			if err != nil {
				l.wantOpError(err)
			}
		})
	}
}

// One who deletes an address again and again wins, and the error lists what is not as it should be (kernel.md U18).
func TestActivateListsDifferences(t *testing.T) {
	l := newLab(t)
	d := l.open(contested())
	before := l.kernelState()
	m, remove := meddle(d)
	m.before = func(_ int, r rtnl.Message) {
		if r.Type == unix.RTM_GETADDR {
			l.conn.Do(rtnl.DelAddr(d.index, kernel.Addr{Prefix: netip.MustParsePrefix("10.42.0.1/24")}))
		}
	}
	err := d.Activate()
	l.wantOpError(err, "the kernel differs after 4 attempts: add address 10.42.0.1/24; add route 10.42.0.0/24")
	if errors.Is(err, ErrPartial) {
		t.Error(err)
	}
	l.want("state", l.kernelState(), before...)
	remove()
	l.must(d.Activate())
}

// The same at random times, many times (kernel.md U18).
func TestActivateAgainstDeleter(t *testing.T) {
	l := newLab(t)
	l.ip("tuntap add p0 mode tun")
	cfg := contested()
	cfg.Name, cfg.Mode = "p0", Attach
	d := l.open(cfg)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	healed, failed := 0, 0
	for i := range 200 {
		var mu sync.Mutex
		var look, deletion time.Time // of the last
		m, remove := meddle(d)
		m.before = func(_ int, r rtnl.Message) {
			if r.Type == unix.RTM_GETADDR {
				mu.Lock()
				look = time.Now()
				mu.Unlock()
			}
		}
		start := make(chan struct{})
		var deleter sync.WaitGroup
		delay := time.Duration(r.IntN(1500)) * time.Microsecond
		deleter.Go(func() {
			<-start
			time.Sleep(delay)
			for _, p := range prefixes("10.42.0.1/24", "fd42::1/64") {
				if l.conn.Do(rtnl.DelAddr(d.index, kernel.Addr{Prefix: p}))[0].Err == nil {
					deletion = time.Now()
				}
			}
		})
		close(start)
		err := d.Activate()
		deleter.Wait()
		remove()
		if err != nil {
			l.wantOpError(err)
			failed++
		} else if got := l.addresses(d.index); !deletion.After(look) && len(got) != 2 {
			t.Fatalf("attempt %d, seed %d: no error, and %v", i, seed, got)
		} else if !deletion.IsZero() {
			healed++
		}
	}
	t.Logf("after %d deletions it succeeded, after %d failed", healed, failed)
}

// Close ends an Activate or Reload that is under way, at whatever point, with os.ErrClosed; nothing is left of either.
func TestCloseDuringActivate(t *testing.T) {
	l := newLab(t)
	var closing sync.WaitGroup
	disturb(l, contested(), func(d *tunDevice, _ bool) {
		closing.Go(func() { l.Check(d.Close()) })
		l.await("closing", d.closing.Load)
	}, func(when moment, d *tunDevice, err error) {
		closing.Wait()
		if !errors.Is(err, os.ErrClosed) && !(err == nil && when.last) {
			t.Errorf("closed before %s: %v", when, err)
		}
	})
	d := l.active(contested())
	if d.Close(); !errors.Is(d.Activate(), os.ErrClosed) || !errors.Is(d.Reload(Config{NetNS: l.ns.Path()}), os.ErrClosed) {
		t.Error("Activate or Reload after Close succeeds")
	}
}

// Check reports an error without ending the test: for other goroutines.
func (l *lab) Check(err error) {
	if err != nil {
		l.Error(err)
	}
}

// A device that is deleted while Activate works is ErrGone, and there is nothing to repair.
func TestDeletedDuringActivate(t *testing.T) {
	l := newLab(t)
	disturb(l, contested(), func(d *tunDevice, _ bool) {
		l.must(l.conn.Do(rtnl.DelLink(d.index))[0].Err)
	}, func(when moment, d *tunDevice, err error) {
		if !errors.Is(err, ErrGone) && !(err == nil && when.late) || errors.Is(err, ErrPartial) {
			t.Errorf("deleted before %s: %v", when, err)
		}
		l.event(d, EventGone)
		if err := d.Activate(); !errors.Is(err, ErrGone) {
			t.Errorf("Activate again: %v", err)
		}
	})
}

// A device that leaves the namespace is ErrGone too, whether or not the watch has heard of it, and who has its number and name
// there from then on is left alone (kernel.md A24, design.md law 8).
func TestMovedDuringActivate(t *testing.T) {
	l := newLab(t)
	elsewhere := nstest.New(t)
	for _, deaf := range []bool{false, true} { // deaf: all is left to the look before each change
		var stranger []string
		disturb(l, contested(), func(d *tunDevice, question bool) {
			stranger = nil
			if deaf {
				d.watch.stop()
			}
			if question { // between the last look at the descriptor and a send nobody can tell
				stranger = replaceBy(l, d, elsewhere)
			}
		}, func(when moment, d *tunDevice, err error) {
			if stranger == nil {
				return
			}
			if !errors.Is(err, ErrGone) && !(err == nil && when.late) || errors.Is(err, ErrPartial) {
				t.Errorf("moved before %s, deaf %v: %v", when, deaf, err)
			}
			if s := d.State(); s.Index != 0 {
				t.Errorf("state %+v: the number is another's", s)
			}
			if err := errors.Join(d.Activate(), d.Reload(Config{NetNS: l.ns.Path()})); strings.Count(fmt.Sprint(err), ErrGone.Error()) != 2 {
				t.Errorf("deaf %v, Activate and Reload again: %v", deaf, err)
			}
			if e := l.event(d, EventGone); !errors.Is(e.Err, errMoved) {
				t.Errorf("event %v", e)
			}
			l.want(fmt.Sprintf("the stranger, moved before %s, deaf %v", when, deaf), l.kernelState(), stranger...)
		})
	}
}

// replaceBy moves a device to another namespace, and gives its name and number to a stranger that looks as it did.
func replaceBy(l *lab, d *tunDevice, elsewhere *nstest.NS) []string {
	l.Helper()
	name := d.lastLink().Name
	l.ip(fmt.Sprintf("link set %s netns %s", name, elsewhere.Path()))
	l.ip(fmt.Sprintf("link add %s index %d mtu 1500 type veth peer name peer0", name, d.index))
	l.ip("link set peer0 netns " + elsewhere.Path())
	return l.kernelState()
}

// A rename does not matter, at whatever point, nor does one after the other: the device is known by its number (kernel.md A23,
// U33).
func TestRenamedDuringActivate(t *testing.T) {
	l := newLab(t)
	rename := func(d *tunDevice, name string) error {
		body := binary.NativeEndian.AppendUint32(make([]byte, 4, 40), uint32(d.index))
		body = append(body, make([]byte, 8)...)
		body = binary.NativeEndian.AppendUint16(body, uint16(4+len(name)+1))
		body = binary.NativeEndian.AppendUint16(body, unix.IFLA_IFNAME)
		body = append(append(body, name...), 0)
		return l.conn.Do(rtnl.Message{Type: unix.RTM_SETLINK, Body: body})[0].Err
	}
	want := []string{
		"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1400 mss 1360", "10.42.0.0/24 table 254 metric 0 proto 111 mtu 1400 mss 1360 src 10.42.0.1",
		"fd09::/64 table 254 metric 1024 proto 111 mtu 1400 mss 1340", "fd42::/64 table 254 metric 256 proto 111 mtu 1400 mss 1340",
	}
	disturb(l, contested(), func(d *tunDevice, _ bool) { l.must(rename(d, "renamed")) }, func(when moment, d *tunDevice, err error) {
		if err != nil {
			t.Errorf("renamed before %s: %v", when, err)
		}
		l.wantHardened(d)
		l.want("routes, renamed before "+when.text, l.routes(d.index), want...)
	})
	d := l.open(contested())
	stop := make(chan struct{})
	var renamer sync.WaitGroup
	renamer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				l.Check(rename(d, fmt.Sprintf("name%d", i%3)))
			}
		}
	})
	for range 20 {
		l.Check(d.Activate())
	}
	close(stop)
	renamer.Wait()
	l.want("routes", l.routes(d.index), want...)
	l.noEvent(d, EventGone)
}

// A kernel before 4.20 does not filter dumps: what belongs to others is left out all the same (kernel.md A17).
func TestUnfilteredDumps(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0", "10.50.0.1/24", "fd50::1/64")
	l.address("other0", "10.51.0.1/24", 111)
	l.ip("route add 10.60.0.0/16 dev other0 proto 111\nroute add fd60::/64 dev other0 proto 111")
	other := l.index("other0")
	l.await("another's own address", func() bool { return !slices.ContainsFunc(l.addresses(other), isTentative) })
	before := append(l.addresses(other), l.routes(other)...)
	d := l.open(contested())
	d.ctl = unfiltered{d.ctl}
	l.must(d.Activate())
	l.must(d.Activate())
	l.want("another's", append(l.addresses(other), l.routes(other)...), before...)
	if got := append(l.addresses(d.index), l.routes(d.index)...); len(got) != 6 {
		t.Errorf("ours: %v", got)
	}
}

func isTentative(line string) bool { return strings.HasSuffix(line, " tentative") }

type unfiltered struct{ conn }

func (u unfiltered) Dump(m rtnl.Message) ([]rtnl.Message, error) {
	size := unix.SizeofIfAddrmsg
	if m.Type == unix.RTM_GETROUTE {
		size = unix.SizeofRtMsg
	}
	return u.conn.Dump(rtnl.Message{Type: m.Type, Body: append([]byte{m.Body[0]}, make([]byte, size-1)...)})
}

// A kernel before 5.18 keeps no protocol of addresses: then what the device has added is ours as long as it lives.
func TestWithoutAddressProtocol(t *testing.T) {
	l := newLab(t)
	d := l.open(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")})
	d.ctl = forgetful{d.ctl}
	l.must(d.Activate())
	l.ip("addr add 10.50.0.1/24 dev " + d.State().Name)
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 0 noprefixroute", "10.50.0.1/24 proto 0", "fd42::1/64 proto 0 noprefixroute")
	l.reload(d, Config{Networks: prefixes("10.42.0.2/24")})
	l.want("addresses", l.addresses(d.index), "10.50.0.1/24 proto 0", "10.42.0.2/24 proto 0 noprefixroute")
}

type forgetful struct{ conn }

func (f forgetful) Do(requests ...rtnl.Message) []rtnl.Result {
	for i, r := range requests {
		if r.Type == unix.RTM_NEWADDR {
			requests[i].Body = r.Body[:len(r.Body)-8] // the protocol comes last
		}
	}
	return f.conn.Do(requests...)
}

// The kernel takes metric 0 in a request to delete for any. If the route that was meant is gone already, another of ours is
// put back (kernel.md V13).
func TestDeletedInsteadIsPutBack(t *testing.T) {
	l := newLab(t)
	route := func(metric int) Route { return Route{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Metric: metric} }
	cfg := Config{Networks: prefixes("10.42.0.1/24"), Routes: []Route{route(0), route(50)}}
	d := l.active(cfg)
	m, _ := meddle(d, func(m *meddler) {
		m.before = func(_ int, r rtnl.Message) {
			if r.Type == unix.RTM_DELROUTE && !slices.Contains(m.log[:len(m.log)-1], "DELROUTE") {
				l.ip("route del 10.9.0.0/16 dev " + d.lastLink().Name + " metric 0")
			}
		}
	})
	cfg.Routes = cfg.Routes[1:]
	l.reload(d, cfg)
	l.want("routes", l.routes(d.index), "10.9.0.0/16 table 254 metric 50 proto 111 mtu 1300 mss 1260",
		"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1")
	if got := strings.Join(m.changes(), " "); got != "DELROUTE NEWROUTE" {
		t.Errorf("messages %s, want the deletion and the way back", got)
	}
}

// The step itself puts it back and says that the one meant was gone, without a look that would find it missing (kernel.md V13).
func TestDeletedInsteadIsPutBackAtOnce(t *testing.T) {
	l := newLab(t)
	p := netip.MustParsePrefix("10.9.0.0/16")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), Routes: []Route{{Prefix: p, MTU: 700}, {Prefix: p, Metric: 50}}, NoHeal: true})
	l.ip("route del 10.9.0.0/16 dev tun0 metric 0")
	before := l.routes(d.index)
	d.mu.Lock()
	defer d.mu.Unlock()
	want := desire(&d.cfg, d.index)
	i := slices.IndexFunc(want.routes, func(r kernel.Route) bool { return r.Prefix == p && r.Metric == 0 })
	s := step{kind: stepDelRoute, route: want.routes[i]}
	if errs := d.apply([]step{s}); len(errs) != 1 || !errors.Is(errs[0], unix.ESRCH) || !s.held(errs[0]) {
		t.Errorf("results %v, want %v", errs, unix.ESRCH)
	}
	l.want("routes", l.routes(d.index), before...)
}

// A route of our protocol that leads through the device by a nexthop object is none of ours: nothing is done to it.
func TestNexthopObjectOfOurProtocol(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	name := d.State().Name
	l.ip("nexthop add id 7 via 10.42.0.9 dev " + name + "\nroute add 10.97.0.0/16 nhid 7 proto 111")
	l.ip("nexthop add id 8 via fd42::9 dev " + name)
	l.ip("-6 route add fd97::/64 nhid 8 proto 111")
	l.must(d.Activate())
	for _, list := range []string{l.ip("route show 10.97.0.0/16"), l.ip("-6 route show fd97::/64")} {
		if !strings.Contains(list, "nhid") {
			t.Errorf("the route is %q", list)
		}
	}
	cfg := healed()
	cfg.Routes[0].MTU = 1290
	l.reload(d, cfg)
}

// An IPv6 route of ours between the legs of another's multipath route is in no list of the kernel's, which tells the legs at once and
// goes on behind the last. It is there nevertheless: neither healing nor Reload waits for it to show.
func TestRouteThatIsNotListed(t *testing.T) {
	l := newLab(t)
	prefix := netip.MustParsePrefix("2001:db8::/48")
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
	d := l.active(cfg)
	other := l.ns.OtherTun(t, "other", "fd43::1/64")
	defer other.Close()
	listed := func() (mtu uint32) { // 0: it is not
		have, err := d.observe(nil)
		l.must(err)
		for _, r := range have.routes {
			if r.Prefix == prefix && r.Protocol == cfg.protocol() {
				mtu = r.MTU
			}
		}
		return mtu
	}
	l.ip("-6 route append 2001:db8::/48 metric 50 via fd43::2 dev other")
	cfg.Routes = []Route{{Prefix: prefix, Metric: 50}}
	l.reload(d, cfg)
	l.ip("-6 route append 2001:db8::/48 metric 50 via fd42::5 dev " + d.State().Name)
	if mtu := listed(); mtu != 0 {
		t.Fatalf("it is listed, with MTU %d: this is not what the test is about", mtu)
	}
	l.await("healer at rest", d.atRest)
	cfg.MTU = 1400
	l.reload(d, cfg)
	l.await("healer at rest", d.atRest)
	l.noEvent(d, EventDegraded)
	l.ip("-6 route del 2001:db8::/48 metric 50 via fd42::5 dev " + d.State().Name)
	l.await("it is listed again, as it should be", func() bool { return listed() == 1400 })
	cfg.Routes = nil
	l.reload(d, cfg)
	if listed() != 0 {
		t.Error("it was left behind")
	}
}

// Nor does Reload leave it behind for that.
func TestRouteThatIsNotListedGoes(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
	d := l.active(cfg)
	other := l.ns.OtherTun(t, "other", "fd43::1/64")
	defer other.Close()
	l.ip("-6 route append 2001:db8::/48 metric 50 via fd43::2 dev other")
	with := cfg
	with.Routes = []Route{{Prefix: netip.MustParsePrefix("2001:db8::/48"), Metric: 50}}
	l.reload(d, with)
	l.ip("-6 route append 2001:db8::/48 metric 50 via fd42::5 dev " + d.State().Name)
	l.await("healer at rest", d.atRest)
	l.reload(d, cfg)
	l.ip("-6 route del 2001:db8::/48 metric 50 via fd42::5 dev " + d.State().Name)
	if left := l.ip("-6 route show 2001:db8::/48 proto 111"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}

// What goes is looked for once, however much it is: a Reload that looks takes time as the routes are many, not as their square.
func TestReloadTakesAwayMany(t *testing.T) {
	l := newLab(t)
	took := func(n int) time.Duration {
		cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), NoHeal: true}
		for i := range n {
			p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 1, 3: byte(i >> 16), 4: byte(i >> 8), 5: byte(i)}), 48)
			cfg.Routes = append(cfg.Routes, Route{Prefix: p})
		}
		d := l.active(cfg)
		cfg.Routes, cfg.MTU = nil, 1400 // with another MTU it looks
		start := time.Now()
		l.reload(d, cfg)
		defer d.Close()
		return time.Since(start)
	}
	few, many := took(4_000), took(40_000)
	if many > 40*max(few, time.Millisecond) { // ten times as many; the square would be a hundred
		t.Errorf("4,000 routes take %v, 40,000 %v", few, many)
	}
}
