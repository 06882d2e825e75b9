package overlay

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

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
	if err := d.converge("activate", &d.cfg); err != nil {
		return err
	}
	d.active = true
	return nil
}

// Reload implements Device. The tree learns new routes before the kernel does and forgets old ones after.
func (d *tunDevice) Reload(cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.alive(); err != nil {
		return err
	}
	if d.adopted && cfg.Queues == 0 {
		cfg.Queues = len(d.queues)
	}
	if err := restart(&d.cfg, &cfg); err != nil {
		return err
	}
	next := cfg.clone()
	if d.active {
		d.publishBoth(&d.cfg, &next)
		if err := d.converge("reload", &next); err != nil {
			d.publish(&d.cfg)
			return err
		}
	}
	d.viewMu.Lock()
	d.cfg = next
	d.viewMu.Unlock()
	d.bare.Store(next.NoFilter)
	d.publish(&next)
	return nil
}

// rounds bounds how often converge looks again: once for the MTU that brings IPv6 back, once to check, twice because
// somebody works against us.
const rounds = 4

// converge brings the kernel to what cfg asks, and checks that it is there. On error it takes back all that it did.
func (d *tunDevice) converge(op string, cfg *Config) error {
	want := desire(cfg, d.index)
	run := &execution{device: d}
	err := d.feasible(&want)
	for range rounds {
		if err != nil {
			break
		}
		var have *observed
		if have, err = d.observe(); err != nil {
			break
		}
		steps := run.pending(plan(have, &want))
		if len(steps) == 0 {
			run.report()
			d.shadows(&want)
			return nil
		}
		run.left = steps
		err = run.carryOut(steps)
	}
	if err == nil {
		err = fmt.Errorf("the kernel differs after %d attempts: %s", rounds, differences(run.left))
	}
	if back := run.takeBack(); back != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", ErrPartial, back))
	}
	switch {
	case d.closing.Load():
		return os.ErrClosed
	case errors.Is(err, unix.ENODEV):
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	return opError(op, d.lastLink().Name, needs(err, "CAP_NET_ADMIN"))
}

// feasible finds what cannot work before the system is touched.
func (d *tunDevice) feasible(want *desired) error {
	if !want.ipv6 {
		return nil
	}
	link, err := d.ownLink()
	switch {
	case err != nil:
		return err
	case link.IPv6 != nil && link.IPv6.Disabled:
		return fmt.Errorf("%w: net.ipv6.conf.%s.disable_ipv6 is set", ErrIPv6Disabled, link.Name)
	case link.IPv6 == nil && !ipv6Exists():
		return ErrIPv6Disabled
	}
	return nil
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

// observe reads what the kernel holds for the device.
func (d *tunDevice) observe() (*observed, error) {
	have := new(observed)
	var err error
	if have.link, err = d.ownLink(); err != nil {
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
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := d.observeRoutes(have, family); err != nil {
			return nil, fmt.Errorf("read the routes: %w", err)
		}
	}
	return have, nil
}

// ownLink reads the link, and makes sure that it still is the one behind our descriptors: in our namespace the number may
// by now be another's, if the device was moved (kernel.md A24).
func (d *tunDevice) ownLink() (kernel.Link, error) {
	for range 8 {
		link, err := getLink(d.ctl, rtnl.GetLink(d.index))
		if err != nil {
			return link, err
		}
		name, err := d.queues[0].name()
		if errors.Is(err, os.ErrClosed) || err == nil && name == link.Name {
			return link, nil
		}
		if err != nil {
			return link, err
		}
	}
	return kernel.Link{}, fmt.Errorf("%w: interface %d is another's now", ErrGone, d.index)
}

func (d *tunDevice) observeRoutes(have *observed, family uint8) error {
	messages, err := d.ctl.Dump(rtnl.GetRoutes(family, d.index))
	if err != nil {
		return err
	}
	for _, m := range messages {
		r, unicast, err := rtnl.DecodeRoute(m)
		if err != nil {
			return err
		}
		if unicast && r.Link == d.index && r.Table != kernel.TableLocal {
			have.routes = append(have.routes, r)
		}
	}
	return nil
}

// execution carries out steps and remembers them, to take them back.
type execution struct {
	device *tunDevice
	done   []step
	failed map[string]error // optional steps, by name: tried once
	left   []step           // of the last round
}

// pending leaves out the optional steps that failed already.
func (e *execution) pending(steps []step) []step {
	var rest []step
	for _, s := range steps {
		if e.failed[s.String()] == nil {
			rest = append(rest, s)
		}
	}
	return rest
}

// carryOut runs the steps phase by phase, each phase in one send. The first that fails and is not optional ends it.
func (e *execution) carryOut(steps []step) error {
	for len(steps) > 0 {
		if err := e.device.alive(); err != nil {
			return err
		}
		n := 1
		for n < len(steps) && steps[n].phase() == steps[0].phase() {
			n++
		}
		if err := e.settle(steps[:n], e.device.apply(steps[:n])); err != nil {
			return err
		}
		steps = steps[n:]
	}
	return nil
}

// settle records what was done and returns the first failure that counts.
func (e *execution) settle(steps []step, results []error) error {
	var first error
	for i, err := range results {
		s := steps[i]
		switch {
		case err == nil:
			e.done = append(e.done, s)
		case s.optional:
			if e.failed == nil {
				e.failed = make(map[string]error)
			}
			e.failed[s.String()] = err
		case s.held(err):
		case first == nil:
			first = fmt.Errorf("%s: %w", s, err)
		}
	}
	return first
}

// report tells of optional steps that failed.
func (e *execution) report() {
	for name, err := range e.failed {
		e.device.note(fmt.Errorf("%s: %w", name, err))
	}
}

// takeBack undoes what was done, last first, and returns what could not be undone.
func (e *execution) takeBack() error {
	var errs []error
	for i := len(e.done) - 1; i >= 0; i-- {
		s := e.done[i].inverse()
		if err := e.device.apply([]step{s})[0]; err != nil && !s.held(err) {
			errs = append(errs, fmt.Errorf("%s: %w", s, err))
		}
	}
	e.done = nil
	return errors.Join(errs...)
}

func differences(steps []step) string {
	const most = 8
	var names []string
	for i, s := range steps {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(steps)-most))
			break
		}
		names = append(names, s.String())
	}
	return strings.Join(names, "; ")
}

// held says whether the kernel's refusal means that the step's end was reached already.
func (s step) held(err error) bool {
	switch s.kind {
	case stepAddAddr, stepAddRoute:
		return errors.Is(err, unix.EEXIST)
	case stepDelAddr:
		return errors.Is(err, unix.EADDRNOTAVAIL)
	case stepDelRoute:
		return errors.Is(err, unix.ESRCH)
	}
	return false
}

// phase groups the steps that may share a send: those of one phase do not depend on each other's success.
func (s step) phase() int {
	switch s.kind {
	case stepMTU, stepTxQueueLen:
		return 1
	case stepSetting:
		if _, ok := netlinkSettings[s.setting]; ok || s.setting == settingIPv6AddrGen {
			return 1
		}
		return 2
	case stepAddAddr, stepDelAddr:
		return 3
	}
	return 4 // the link up and the routes: a link that is down refuses them (kernel.md V27)
}

// apply carries out the steps of one phase and returns an error or nil for each.
func (d *tunDevice) apply(steps []step) []error {
	results := make([]error, len(steps))
	if steps[0].phase() == 2 {
		for i, s := range steps {
			results[i] = d.writeProcfs(s.setting, s.to)
		}
		return results
	}
	requests := make([]rtnl.Message, len(steps))
	for i, s := range steps {
		requests[i] = d.request(s)
	}
	for i, r := range d.ctl.Do(requests...) {
		results[i] = r.Err
	}
	return results
}

// netlinkSettings are the settings that RTM_SETLINK knows.
var netlinkSettings = map[setting]int{
	settingIPv4Redirects:   rtnl.IPv4AcceptRedirects,
	settingIPv4Sends:       rtnl.IPv4SendRedirects,
	settingIPv4SourceRoute: rtnl.IPv4AcceptSourceRoute,
	settingIPv4Promote:     rtnl.IPv4PromoteSecondaries,
}

// request is the step as a message.
func (d *tunDevice) request(s step) rtnl.Message {
	switch s.kind {
	case stepMTU:
		return rtnl.SetLinkMTU(d.index, s.to)
	case stepTxQueueLen:
		return rtnl.SetLinkTxQueueLen(d.index, s.to)
	case stepSetting:
		if s.setting == settingIPv6AddrGen {
			return rtnl.SetLinkAddrGenMode(d.index, s.to)
		}
		return rtnl.SetLinkIPv4(d.index, netlinkSettings[s.setting], s.to)
	case stepAddAddr:
		return rtnl.AddAddr(d.index, s.addr)
	case stepDelAddr:
		return rtnl.DelAddr(d.index, s.addr)
	case stepUp:
		return rtnl.SetLinkUp(d.index, s.to != 0)
	case stepAddRoute:
		return rtnl.AddRoute(s.route)
	case stepDelRoute:
		return rtnl.DelRoute(s.route)
	}
	panic("overlay: a step without a kind") // plan makes none
}

// writeProcfs writes one of the device's IPv6 settings that netlink cannot set. The directory is found by name and used
// only if the name is still the device's afterwards; one that was renamed since answers ENOENT.
func (d *tunDevice) writeProcfs(name setting, value int) error {
	if d.procfs < 0 {
		return errors.New("/proc/sys/net/ipv6/conf could not be opened")
	}
	for range 3 {
		link, err := getLink(d.ctl, rtnl.GetLink(d.index))
		if err != nil {
			return err
		}
		dir, err := unix.Openat(d.procfs, link.Name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		again, err := getLink(d.ctl, rtnl.GetLink(d.index))
		if err == nil && again.Name == link.Name {
			err = writeAt(dir, strings.TrimPrefix(string(name), "ipv6/"), value)
		}
		unix.Close(dir)
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return unix.ENOENT
}

func writeAt(dir int, name string, value int) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	_, err = file.WriteString(strconv.Itoa(value))
	return errors.Join(err, file.Close())
}

// shadows tells where another interface answers in our place: an equal route that stands before ours (kernel.md V12).
func (d *tunDevice) shadows(want *desired) {
	var requests []rtnl.Message
	var asked []kernel.Route
	probes := want.probes()
	for _, r := range want.routes {
		if dst, ok := probes.of(r.Prefix); ok && r.Table == kernel.TableMain {
			requests, asked = append(requests, rtnl.MatchRoute(dst)), append(asked, r)
		}
	}
	if len(requests) == 0 {
		return
	}
	var found []error
	for i, result := range d.ctl.Do(requests...) {
		if result.Err != nil || len(result.Answers) != 1 {
			continue // no route at all: healing's business
		}
		r, unicast, err := rtnl.DecodeRoute(result.Answers[0])
		if err == nil && unicast && r.Prefix == asked[i].Prefix && r.Table == asked[i].Table && r.Link != d.index {
			found = append(found, fmt.Errorf("%v is answered by interface %d, protocol %d", r.Prefix, r.Link, r.Protocol))
		}
	}
	if len(found) > 0 {
		d.notify(Event{Kind: EventShadowed, N: len(found), Err: errors.Join(found...)})
	}
}
