package overlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/netns"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// New opens the device that cfg describes; it is down until Activate. Elsewhere than on Linux: errors.ErrUnsupported.
//
// It may add one thing to the host: the node /dev/net/tun where it is missing. On error nothing else is left behind.
// Errors: *ConfigError, joined, before any system call; *OpError, which may be ErrBusy, os.ErrPermission or os.ErrNotExist.
func New(cfg Config) (Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Disabled {
		return newIdle(cfg), nil
	}
	return newTun(cfg, (*opener).open)
}

// Adopt takes over an open device by its descriptors, one a queue (systemd, a helper, an older self). On error they stay the
// caller's. A descriptor taken from an *os.File must be a duplicate: the File would close it behind our back.
//
// It changes nothing of the device but the offloads and the byte order of headers, and loses no packet that waits in it. The Config
// that New made it by will do: Name, Owner, Group and Persist are compared, where they say something, and refused if the device is
// otherwise; Mode says nothing. Activate then writes what differs from Config, which after an older self is nothing. That self must have
// closed its Device: of two that are alive each would read a part of the packets, and put back what the other changes.
//
// Without CAP_NET_ADMIN the kernel does not tell which namespace the device is in: then names and flags alone are compared, and
// State says so. Errors: *ConfigError, joined, before any system call; *OpError, which may be ErrBusy: the device has more queues.
func Adopt(cfg Config, fds ...int) (Device, error) {
	if err := errors.Join(cfg.Validate(), adoptable(&cfg, fds)); err != nil {
		return nil, err
	}
	cfg.Queues = len(fds)
	return newTun(cfg, func(o *opener) (*attachment, error) { return o.adopt(fds) })
}

// adoptable checks what Validate cannot know.
func adoptable(cfg *Config, fds []int) error {
	v := &validator{}
	if cfg.Disabled {
		v.refuse("Disabled", true, "a device that is none has no descriptors")
	}
	if len(fds) == 0 || cfg.Queues != 0 && cfg.Queues != len(fds) {
		v.refuse("Queues", cfg.Queues, "there are %d descriptors", len(fds))
	}
	return errors.Join(v.errs...)
}

// tunDevice is a kernel device. It is the only owner of its descriptors (queues, ctl, view, procfs) and of its
// goroutines (watch, healer, follower).
type tunDevice struct {
	core
	index      int // its identity, in the namespace that ctl and view are in
	queues     []*tunQueue
	adopted    bool
	unverified bool
	home       netnsID // the namespace of ctl and view
	procfs     int     // directory /proc/sys/net/ipv6/conf; -1: none
	watch      *watch  // nil: the kernel lets us not listen
	healer     *healer
	follower   *follower     // nil: the kernel lets us not follow its routes
	doubts     atomic.Uint64 // announcements so far that what was last seen may not outlive
	shared
	dropped   uint64       // what the kernel's counter said at New
	last      atomic.Value // kernel.Link: last seen
	lookMu    sync.Mutex   // of look: what is seen later is stored later
	lost      atomic.Bool  // deleted, or moved to another namespace
	closing   atomic.Bool
	closeOnce sync.Once

	mu     sync.Mutex // one of Activate, Reload, Close at a time
	cfg    Config     // in force; written with mu and viewMu held, what it points to never
	active bool
	past   past
	trust  trust
	ctl    conn       // for them
	view   conn       // for State, Stats and the watch: they wait for no Reload
	viewMu sync.Mutex // cfg and what follows, for State

	notes    []string // abilities that are missing
	unsynced string   // why the routes that are followed may not be the kernel's; "": they are
	leftOut  error    // what is not put back, for the administrator's sake; nil: nothing
	unhealed error    // why others' doings could not be made good; nil: they could
	shadowed []shadow // prefixes for which others answer; what it points to nobody changes
}

// conn is a connection to the kernel's routing tables; tests put one in between that fails.
type conn interface {
	Do(requests ...rtnl.Message) []rtnl.Result
	Dump(request rtnl.Message) ([]rtnl.Message, error)
	Port() uint32
	Close() error
}

func dial() (conn, error) {
	c, err := rtnl.Dial()
	if err != nil {
		return nil, err // not a conn that holds a nil
	}
	return c, nil
}

// newTun opens descriptors and sockets in the device's namespace, and puts the device together.
func newTun(cfg Config, open func(*opener) (*attachment, error)) (Device, error) {
	d := &tunDevice{cfg: cfg.clone(), procfs: -1, healer: newHealer()}
	d.logTo(cfg.Logger)
	d.bare.Store(cfg.NoFilter)
	d.offloads.fails = &d.counts.offloadFails
	d.offloads.tell = func(why error) { d.notify(Event{Kind: EventDegraded, N: 1, Err: why}) }
	err := netns.Do(cfg.NetNS, func() error { return d.open(open) })
	if err != nil {
		var op *OpError
		if !errors.As(err, &op) {
			err = opError("open", cfg.Name, err)
		}
		return nil, err
	}
	d.publish(&d.cfg)
	d.watch.start(d)
	d.healer.start(d)
	return d, nil
}

// open runs in the device's namespace. On error it closes what it opened.
func (d *tunDevice) open(open func(*opener) (*attachment, error)) (err error) {
	defer func() {
		if err != nil {
			d.release()
		}
	}()
	d.home = currentNetNS()
	if err = d.connect(); err != nil {
		return err
	}
	a, err := open(&opener{cfg: &d.cfg, conn: d.ctl})
	if err != nil {
		return err
	}
	d.index, d.dropped = a.link.Index, a.link.TxDropped
	d.adopted, d.unverified = a.adopted != nil, a.unverified
	d.last.Store(a.link)
	if a.unowned() {
		d.note(errors.New("any local user may attach a queue: the device has neither owner nor group"))
	}
	d.queues, err = a.queues(&d.shared)
	for _, q := range d.queues {
		q.sole.Store(!d.adopted)
	}
	return opError("prepare the queues of", a.link.Name, err)
}

// connect opens what the device needs beside its queues. What a system may not have is noted; but that there are no
// descriptors left says nothing about the system.
func (d *tunDevice) connect() (err error) {
	if d.ctl, err = dial(); err != nil {
		return err
	}
	if d.view, err = dial(); err != nil {
		return err
	}
	d.watch, err = newWatch(d.ctl.Port())
	switch {
	case exhausted(err):
		return err
	case err != nil:
		d.note(fmt.Errorf("not told of changes: %w", err))
	}
	d.follower, err = newFollower()
	switch {
	case exhausted(err):
		return err
	case err != nil && d.cfg.SystemRoutes != nil:
		d.note(fmt.Errorf("the kernel's routes are not followed: %w", err))
	}
	// Kept, because a file below it dies with the device's IPv6 settings, and the directory does not (kernel.md V9).
	d.procfs, err = unix.Open("/proc/sys/net/ipv6/conf", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	switch {
	case exhausted(err):
		return fmt.Errorf("open the IPv6 settings: %w", err)
	case err != nil:
		d.procfs = -1 // no IPv6, or no procfs: found out when something is to be set there
	}
	return nil
}

func exhausted(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOBUFS)
}

// release closes what the device holds.
func (d *tunDevice) release() error {
	var errs []error
	if d.watch != nil {
		d.watch.stop() // before the queues: the device's end is no news to those who asked for it
	}
	if d.follower != nil {
		errs = append(errs, d.follower.close())
	}
	for _, q := range d.queues {
		errs = append(errs, q.Close())
	}
	for _, c := range []conn{d.ctl, d.view} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if d.procfs >= 0 {
		errs = append(errs, unix.Close(d.procfs))
	}
	return errors.Join(errs...)
}

// Close implements Device. Activate and Reload see closing and give up; whoever calls Close second waits for the first.
func (d *tunDevice) Close() (err error) {
	d.closing.Store(true)
	d.closeOnce.Do(func() {
		d.healer.stop()
		d.mu.Lock()
		defer d.mu.Unlock()
		d.see() // the last look at the kernel's counter
		err = d.release()
		d.events.close()
	})
	return err
}

// Queues implements Device.
func (d *tunDevice) Queues() []Queue {
	queues := make([]Queue, len(d.queues))
	for i, q := range d.queues {
		queues[i] = q
	}
	return queues
}

// Stats implements Device.
func (d *tunDevice) Stats() Stats {
	d.look()
	return d.stats()
}

func (d *tunDevice) stats() Stats {
	all := make([]*traffic, len(d.queues))
	for i, q := range d.queues {
		all[i] = &q.traffic
	}
	s := d.core.stats(all...)
	s.ReadDropped += d.lastLink().TxDropped - d.dropped
	return s
}

// State implements Device.
func (d *tunDevice) State() State {
	link, here := d.look()
	s := State{Name: link.Name, MTU: link.MTU, Offload: d.offloads.usable(), table: d.tree.current.Load()}
	if here {
		s.Index, s.Up = d.index, link.Up
	}
	d.viewMu.Lock()
	defer d.viewMu.Unlock()
	s.Networks = slices.Clone(d.cfg.Networks)
	s.Learned = d.tree.learnedRoutes()
	s.report = report{
		config: d.cfg, adopted: d.adopted, queues: len(d.queues), txQueueLen: link.TxQueueLen,
		stats: d.stats(), notes: slices.Clone(d.notes), learned: d.tree.learnedOffer,
	}
	if d.follower != nil {
		s.report.readBuffer = int(d.follower.granted.Load())
	}
	for _, trouble := range []error{d.leftOut, d.unhealed} {
		if trouble != nil {
			s.report.notes = append(s.report.notes, trouble.Error())
		}
	}
	for _, note := range []string{d.unsynced, d.offloads.note()} {
		if note != "" {
			s.report.notes = append(s.report.notes, note)
		}
	}
	for _, shadow := range d.shadowed {
		s.report.notes = append(s.report.notes, "shadowed: "+shadow.text)
	}
	if d.unverified {
		s.report.notes = append(s.report.notes, "the device's network namespace could not be verified (needs CAP_NET_ADMIN)")
	}
	return s
}

func (d *tunDevice) lastLink() kernel.Link { return d.last.Load().(kernel.Link) }

// look asks the kernel for the link; false, with what was seen last, if it is not here any more.
func (d *tunDevice) look() (kernel.Link, bool) {
	if d.closing.Load() {
		return d.lastLink(), false
	}
	here := d.see()
	return d.lastLink(), here
}

// see updates the last link that was seen; false if it is not here any more. A kernel that does not answer changes nothing.
func (d *tunDevice) see() bool {
	d.lookMu.Lock()
	defer d.lookMu.Unlock()
	if d.lost.Load() {
		return false
	}
	link, err := d.ownLink(d.view)
	switch {
	case err == nil:
		d.last.Store(link)
		return true
	case errors.Is(err, unix.ENODEV), errors.Is(err, ErrGone):
		return false
	}
	return true
}

// note records that an optional ability is missing.
func (d *tunDevice) note(err error) {
	d.viewMu.Lock()
	d.notes = append(d.notes, err.Error())
	d.viewMu.Unlock()
	d.notify(Event{Kind: EventDegraded, N: 1, Err: err})
}

// alive returns why the device can be configured no more, or nil.
func (d *tunDevice) alive() error {
	switch {
	case d.closing.Load():
		return os.ErrClosed
	case d.lost.Load():
		return ErrGone
	}
	return nil
}
