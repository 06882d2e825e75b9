package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// Activate implements Device.
func (d *tunDevice) Activate() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.alive(); err != nil {
		return err
	}
	run := &execution{device: d, protocol: d.cfg.protocol(), concerned: d.tree.routed}
	if err := d.converge("activate", &d.cfg, run); err != nil {
		return err
	}
	d.active = true
	if !d.follower.running() {
		d.follower.change(d, &d.cfg, &d.cfg)
	}
	return nil
}

// Bounds of patience with those who work against us.
const (
	rounds     = 4 // looks of converge: once for the MTU that brings IPv6 back, once to check, twice for others
	backRounds = 6 // looks of takeBack: once for each kind of object, and for others
)

// past is what Activate and Reload remember from one call to the next.
type past struct {
	added map[netip.Prefix]bool // addresses
	lacks map[string]lack       // optional steps that failed the last time, by what they are
}

// lack is an optional step that failed.
type lack struct {
	step step
	err  error
}

func (l lack) Error() string { return fmt.Sprintf("%s: %v", l.step, l.err) }
func (l lack) Unwrap() error { return l.err }

// converge brings the kernel to what cfg asks, and checks that it is there. On error it takes back all that run did, before
// and now.
func (d *tunDevice) converge(op string, cfg *Config, run *execution) error {
	want := desire(cfg, d.index)
	want.added = d.past.added
	if err := run.reach(&want); err != nil {
		return d.giveUp(op, run, &want, err)
	}
	run.report(true)
	d.allWell()
	d.trust = run.trust(&want)
	if len(run.done) > 0 {
		d.follower.resync(errLink)
	}
	d.shadows(run.now, &want, cfg)
	return nil
}

// allWell takes back what State says of trouble with healing.
func (d *tunDevice) allWell() {
	d.viewMu.Lock()
	d.leftOut, d.unhealed = nil, nil
	d.viewMu.Unlock()
}

// giveUp takes back all that run did, and makes the contract's error of why.
func (d *tunDevice) giveUp(op string, run *execution, want *desired, err error) error {
	if back := run.takeBack(); back != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", ErrPartial, back))
	}
	d.trust.whole = false
	d.doubt(false)
	if d.closing.Load() {
		return os.ErrClosed
	}
	return opError(op, d.lastLink().Name, d.explain(err, want))
}

// explain makes the contract's errors of what the kernel said.
func (d *tunDevice) explain(err error, want *desired) error {
	switch {
	case errors.Is(err, ErrGone):
		d.deviceLost()
	case errors.Is(err, unix.ENODEV):
		d.deviceLost()
		return fmt.Errorf("%w: %w", ErrGone, err)
	case errors.Is(err, unix.EACCES) && want.ipv6: // of an IPv6 address or route: disabled since we looked (kernel.md U27)
		if link, look := d.ownLink(d.ctl); look == nil && link.IPv6 != nil && link.IPv6.Disabled {
			return fmt.Errorf("%w: %v", ErrIPv6Disabled, err)
		}
	}
	return needs(err, "CAP_NET_ADMIN")
}

// execution carries out steps and remembers them, to take them back.
type execution struct {
	device      *tunDevice
	protocol    uint8
	before, now *observed               // the first look and the last
	seenAt      uint64                  // doubts at the last
	concerned   func(netip.Prefix) bool // of others' routes, which to look at; nil: all
	done        []step                  // also those whose outcome is unknown
	failed      map[string]lack
	left        []step                   // of the last round
	held        bool                     // a step's end was reached already: things are not as we thought
	present     map[kernel.RouteKey]bool // IPv6 routes that the kernel refused because they are there
	gone        []kernel.Route           // to be deleted once though they may not be listed; see routeChanges.hidden
	deleted     map[kernel.RouteKey]bool // of these
	unknown     error                    // why the outcome of some is
}

// reach looks, plans and carries out until there is nothing left to do, and the kernel takes packets for our addresses.
func (e *execution) reach(want *desired) error {
	var patience deliveries
	for round := 0; round < rounds; {
		if err := e.device.alive(); err != nil {
			return err
		}
		if err := e.look(); err != nil {
			return err
		}
		if err := e.device.feasible(e.now, want); err != nil {
			return err
		}
		e.left = e.pending(plan(e.now, want))
		if e.concerned != nil && (want.mtu < minIPv6MTU || harms(e.left)) {
			e.concerned = nil // what others may lose must be known before
			if len(e.done) == 0 {
				e.before = nil
			}
			continue
		}
		if len(e.left) > 0 {
			round++
			if err := e.carryOut(e.left); err != nil {
				return err
			}
			continue
		}
		waiting, err := e.device.undelivered(want)
		if err != nil || len(waiting) == 0 {
			return err
		}
		if err := patience.wait(waiting); err != nil {
			return err
		}
	}
	err := fmt.Errorf("the kernel differs after %d attempts: %s", rounds, differences(e.left))
	if e.unknown != nil {
		err = fmt.Errorf("%w: %w", err, e.unknown)
	}
	return err
}

func (e *execution) look() (err error) {
	e.device.watch.hearAll(e.device)
	e.seenAt = e.device.doubts.Load()
	if e.now, err = e.device.observe(e.concerned); err != nil {
		return err
	}
	e.gone = slices.DeleteFunc(e.gone, func(r kernel.Route) bool { return e.deleted[r.RouteKey] })
	e.now.routes = withUnlisted(e.now.routes, e.gone)
	if e.before == nil {
		e.before = e.now
	}
	return nil
}

// feasible finds what cannot work, before the system is touched.
func (d *tunDevice) feasible(have *observed, want *desired) error {
	if want.ipv6 && have.link.IPv6 == nil {
		if !ipv6Exists() {
			return fmt.Errorf("%w: the kernel has none", ErrIPv6Disabled)
		}
		if d.readProcfs("default/disable_ipv6") == "1" { // so it will be when the MTU brings it back
			return fmt.Errorf("%w: net.ipv6.conf.default.disable_ipv6 is set", ErrIPv6Disabled)
		}
	}
	return obstacle(have, want)
}

// ipv6Exists says whether this kernel has IPv6 at all.
func ipv6Exists() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return !errors.Is(err, unix.EAFNOSUPPORT)
	}
	unix.Close(fd)
	return true
}

// observe reads what the kernel holds for the device; of others' routes those for prefixes that are concerned (nil: all).
func (d *tunDevice) observe(concerned func(netip.Prefix) bool) (*observed, error) {
	have := new(observed)
	var err error
	if have.link, err = d.ownLink(d.ctl); err != nil {
		return nil, err
	}
	messages, err := d.ctl.Dump(rtnl.GetAddrs(d.index))
	if err != nil {
		return nil, fmt.Errorf("read the addresses: %w", err)
	}
	for _, m := range messages {
		a, index, err := rtnl.DecodeAddr(m)
		if err != nil {
			return nil, err
		}
		if index == d.index {
			have.addresses = append(have.addresses, a)
		}
	}
	families := []uint8{unix.AF_INET, unix.AF_INET6}
	if have.link.IPv6 == nil {
		families = families[:1]
	}
	for _, family := range families {
		if err := d.observeRoutes(have, family, concerned); err != nil {
			return nil, fmt.Errorf("read the routes: %w", err)
		}
	}
	return have, nil
}

func (d *tunDevice) observeRoutes(have *observed, family uint8, concerned func(netip.Prefix) bool) error {
	request := rtnl.GetRoutes(family, d.index)
	if ours := d.cfg.protocol(); concerned != nil {
		request.Keep = func(m rtnl.Message) bool {
			prefix, protocol := rtnl.PeekRoute(m)
			return protocol == ours || concerned(prefix)
		}
	}
	messages, err := d.ctl.Dump(request)
	if err != nil {
		return err
	}
	for _, m := range messages {
		r, unicast, err := rtnl.DecodeRoute(m)
		if err != nil {
			return err
		}
		// We install none by a nexthop object, and could not delete one by its key: with our protocol it is somebody else's.
		if r.Object && r.Protocol == d.cfg.protocol() {
			continue
		}
		if unicast && r.Link == d.index && r.Table != kernel.TableLocal {
			have.routes = append(have.routes, r)
		}
	}
	return nil
}

// undelivered lists our IPv6 addresses that the kernel takes no packets for. It shows an address at once, but lets a worker make
// it local; if the device has only just got its carrier, by up to a second later.
func (d *tunDevice) undelivered(want *desired) ([]netip.Addr, error) {
	var waiting []netip.Addr
	for _, a := range want.addresses {
		if a.Prefix.Addr().Is6() {
			waiting = append(waiting, a.Prefix.Addr())
		}
	}
	if len(waiting) == 0 {
		return nil, nil
	}
	messages, err := d.ctl.Dump(rtnl.GetLocal(unix.AF_INET6, d.index))
	if err != nil {
		return nil, fmt.Errorf("read the local addresses: %w", err)
	}
	for _, m := range messages {
		r, _, err := rtnl.DecodeRoute(m)
		if err == nil && r.Link == d.index && r.Table == kernel.TableLocal {
			waiting = slices.DeleteFunc(waiting, func(a netip.Addr) bool { return a == r.Prefix.Addr() })
		}
	}
	return waiting, nil
}

// deliveries bounds the waiting for them.
type deliveries struct {
	deadline time.Time
	pause    time.Duration
}

func (p *deliveries) wait(waiting []netip.Addr) error {
	const longest = 3 * time.Second
	if p.deadline.IsZero() {
		p.deadline, p.pause = time.Now().Add(longest), 100*time.Microsecond
	}
	if time.Now().After(p.deadline) {
		return fmt.Errorf("read the local addresses: the kernel does not deliver to %s after %v: has the device a carrier?",
			brief(waiting, netip.Addr.String), longest)
	}
	time.Sleep(p.pause)
	p.pause = min(2*p.pause, 10*time.Millisecond)
	return nil
}

// pending leaves out routes that are there and not listed: the kernel passes over one of ours between the legs of another's multipath
// route; and the optional steps that failed already. It forgets those that are needless by now: an address goes with a small MTU.
func (e *execution) pending(steps []step) []step {
	if len(e.present) > 0 {
		listed := keys(e.now.routes)
		steps = slices.DeleteFunc(steps, func(s step) bool {
			return s.kind == stepAddRoute && e.present[s.route.RouteKey] && !listed[s.route.RouteKey]
		})
	}
	if len(e.failed) == 0 {
		return steps
	}
	still := make(map[string]lack)
	rest := slices.DeleteFunc(steps, func(s step) bool {
		l, failed := e.failed[s.String()]
		if failed {
			still[s.String()] = l
		}
		return failed
	})
	e.failed = still
	return rest
}

// carryOut runs the steps phase by phase, each phase in one send. The first that fails and is not optional ends it; so does
// one whose outcome is unknown, without an error: the next look tells.
func (e *execution) carryOut(steps []step) error {
	for len(steps) > 0 {
		if err := e.device.alive(); err != nil {
			return err
		}
		if _, err := e.device.reached(); err != nil {
			return err
		}
		n := samePhase(steps)
		known, err := e.settle(steps[:n], e.device.apply(steps[:n]))
		if err != nil || !known {
			return err
		}
		steps = steps[n:]
	}
	return nil
}

// settle records what was done, or may have been, and returns the first failure that counts.
func (e *execution) settle(steps []step, results []error) (known bool, first error) {
	known = true
	e.done = slices.Grow(e.done, len(steps))
	for i, err := range results {
		s := steps[i]
		if s.kind == stepDelRoute && len(e.gone) > 0 {
			mark(&e.deleted, s.route.RouteKey)
		}
		switch {
		case err == nil:
			e.did(s)
		case errors.Is(err, rtnl.ErrUnknown):
			known, e.unknown = false, err
			e.did(s)
		case s.held(err):
			e.held = true
			if s.kind == stepAddRoute && s.route.Prefix.Addr().Is6() {
				mark(&e.present, s.route.RouteKey)
			}
		case s.optional:
			if e.failed == nil {
				e.failed = make(map[string]lack)
			}
			e.failed[s.String()] = lack{s, err}
		case first == nil:
			first = fmt.Errorf("%s: %w", s, err)
		}
	}
	return known, first
}

func (e *execution) did(s step) {
	e.done = append(e.done, s)
	p := &e.device.past
	switch s.kind {
	case stepAddAddr:
		if p.added == nil {
			p.added = make(map[netip.Prefix]bool)
		}
		p.added[s.addr.Prefix] = true
	case stepDelAddr:
		delete(p.added, s.addr.Prefix)
	}
}

// report tells of optional steps that failed, once, and of foreign routes that went with an address. all: every step that is due was
// tried, so that what failed before and not now is no lack any more.
func (e *execution) report(all bool) {
	d := e.device
	var news []error
	d.viewMu.Lock()
	for name, l := range d.past.lacks {
		if _, still := e.failed[name]; still {
			continue
		}
		if !all {
			if e.failed == nil {
				e.failed = make(map[string]lack)
			}
			e.failed[name] = l
		} else {
			d.notes = slices.DeleteFunc(d.notes, func(n string) bool { return n == l.Error() })
		}
	}
	for name, l := range e.failed {
		if told, before := d.past.lacks[name]; before {
			e.failed[name] = lack{l.step, told.err}
		} else {
			news = append(news, l)
		}
	}
	slices.SortFunc(news, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	for _, err := range news {
		d.notes = append(d.notes, err.Error())
	}
	d.past.lacks = e.failed
	d.viewMu.Unlock()
	if len(news) > 0 {
		d.notify(Event{Kind: EventDegraded, N: len(news), Err: errors.Join(news...)})
	}
	if lost := lostRoutes(e.before, e.now, e.done, e.protocol); len(lost) > 0 {
		err := fmt.Errorf("others' routes went with an address of ours: %s", brief(lost, routeText))
		d.notify(Event{Kind: EventDegraded, N: len(lost), Err: err})
	}
}

// takeBack undoes what was done, last first, then looks for what that left different, and returns what stays so.
func (e *execution) takeBack() error {
	if len(e.done) == 0 {
		return nil
	}
	d := e.device
	back := make([]step, len(e.done))
	for i, s := range e.done {
		back[len(back)-1-i] = s.inverse()
	}
	failed := e.undo(back)
	for try := 0; ; try++ {
		now, err := d.observe(nil)
		if errors.Is(err, ErrGone) || errors.Is(err, unix.ENODEV) {
			return nil // and with the device all that was done to it
		}
		if err != nil {
			return errors.Join(failed, e.takeBackUnseen(err))
		}
		steps := restoring(now, e.before, e.done, e.protocol)
		switch {
		case len(steps) == 0:
			return nil
		case try == backRounds:
			return errors.Join(fmt.Errorf("left to do: %s", differences(steps)), failed)
		}
		failed = e.undo(steps)
	}
}

// takeBackUnseen ends takeBack where the kernel does not let us look, for the reason why.
func (e *execution) takeBackUnseen(why error) error {
	steps, enough := unseen(e.before, e.done, e.protocol)
	if err := e.undo(steps); err != nil || enough {
		return err
	}
	return fmt.Errorf("not verified: %w", why)
}

// undo carries out steps, whatever becomes of each, and returns what failed.
func (e *execution) undo(steps []step) error {
	var errs []error
	for len(steps) > 0 {
		if _, err := e.device.reached(); err != nil {
			return err
		}
		n := samePhase(steps)
		for i, err := range e.device.apply(steps[:n]) {
			if s := steps[i]; err != nil && !s.held(err) {
				errs = append(errs, fmt.Errorf("%s: %w", s, err))
			}
		}
		steps = steps[n:]
	}
	return errors.Join(errs...)
}
