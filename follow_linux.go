package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/fib"
	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// How the kernel's routes are followed.
const (
	publishEvery = 10 * time.Millisecond  // at most: a burst is one publication
	gulp         = 512                    // datagrams between two looks at what else is to be done
	resyncRest   = 9                      // after a resync, times the processor time that it took, until the next
	resyncSettle = 5 * time.Millisecond   // from the first reason for one: an address that goes is several announcements
	resyncRetry  = 100 * time.Millisecond // after one that failed, doubled each time
	resyncBear   = 3                      // failures in succession before they are told of
	resyncDoubt  = 100 * time.Millisecond // after one for what is in doubt that was not quiet, doubled each time
	settleRounds = 20                     // of questions about what announcements leave in doubt
	settleTries  = 10                     // addresses of one prefix
)

// followed are the groups of announcements that routes, and what they depend on, are told by. Links and addresses are among them
// although the watch hears of those too: what one takes away untold counts from its place among the routes' announcements on.
var followed = []int{
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
}

// follower keeps the tree's kernel layer equal to the kernel's routes through the device. Its sockets are the device's from New
// on, its goroutine runs while a Config has SystemRoutes. Announcements are hints, dumps are no snapshots: design.md laws 1, 2.
type follower struct {
	listener ears
	conn     routesConn
	poked    chan struct{} // beside the listener, which may fail
	done     chan struct{} // closed when the goroutine is gone; nil: none runs
	layer    *learned      // with the tree's lock
	granted  atomic.Int64  // bytes of receive buffer; 0: not asked for yet

	mu      sync.Mutex
	stopped bool
	reason  error                 // why to look anew; nil: no reason
	overlay func(netip.Addr) bool // of a new Config; nil: none
}

// routesConn is a connection that can list a table's routes; tests put one in between that fails.
type routesConn interface {
	conn
	DumpOnce(request rtnl.Message) ([]rtnl.Message, error)
}

// ears hear what the kernel announces: a *rtnl.Listener; tests put one in between that fails.
type ears interface {
	Wait() error
	WaitUntil(deadline time.Time) error
	Next() ([]rtnl.Message, error)
	Drain()
	Poke()
	Join(readBuffer int, groups ...int) error
	Leave(groups ...int) error
	ReadBuffer() int
	OnlyConcerning(index int, port uint32) error
	HearAll() error
	Close() error
}

// newFollower opens its sockets in the network namespace of the calling thread.
func newFollower() (*follower, error) {
	conn, err := rtnl.Dial()
	if err != nil {
		return nil, err
	}
	listener, err := rtnl.Listen(1)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &follower{listener: listener, conn: conn, poked: make(chan struct{}, 1)}, nil
}

// close ends it for good.
func (f *follower) close() error {
	f.stop()
	return errors.Join(f.listener.Close(), f.conn.Close())
}

// start follows the routes of a Config that has SystemRoutes.
func (f *follower) start(d *tunDevice, c *Config) {
	f.mu.Lock()
	f.stopped, f.reason, f.overlay = false, nil, nil
	f.mu.Unlock()
	f.layer = newLearned(c, d.index, &d.tree.pool)
	f.done = make(chan struct{})
	run := &following{follower: f, device: d, tables: c.SystemRoutes.tables(), pending: errBegin, others: make(linkStates)}
	if err := run.listen(c.SystemRoutes.readBuffer()); err != nil {
		run.deafen(err)
	}
	f.granted.Store(int64(f.listener.ReadBuffer() / 2)) // the kernel counts as much again for itself
	go func() {
		defer close(f.done)
		run.run()
		if run.synced && run.dirty {
			run.publishNow() // whoever takes the layer's place removes from the tree what the layer says, not what it said
		}
		d.setUnsynced("")  // what is not followed differs from nothing
		if d.lost.Load() { // with the device went its routes; its number may be another's
			d.tree.follow(nil)
		}
	}()
}

// running says whether it follows; with the device's lock.
func (f *follower) running() bool { return f != nil && f.done != nil }

// change goes from one Config to the next; with the device's lock. What was learned stays until it has been learned anew.
func (f *follower) change(d *tunDevice, old, next *Config) {
	switch {
	case f == nil:
		return
	case next.SystemRoutes == nil:
		f.stop()
		d.tree.follow(nil)
		return
	case f.running() && old.SystemRoutes.equal(next.SystemRoutes):
		if !slices.Equal(old.Networks, next.Networks) {
			f.setOverlay(next.overlay())
		}
		return
	}
	f.stop()
	f.start(d, next)
}

// stop ends the goroutine, waits for it, and leaves what it has learned in the tree.
func (f *follower) stop() {
	if f.done == nil {
		return
	}
	f.mu.Lock()
	f.stopped = true
	f.mu.Unlock()
	f.poke()
	<-f.done
	f.done = nil
	_ = f.listener.Leave(followed...) // a later start joins anew
	f.listener.Drain()
}

// poke ends the goroutine's wait.
func (f *follower) poke() {
	select {
	case f.poked <- struct{}{}:
	default:
	}
	f.listener.Poke()
}

// resync asks for a look at all, because something may have changed untold.
func (f *follower) resync(reason error) {
	if f == nil {
		return
	}
	f.mu.Lock()
	if f.reason == nil {
		f.reason = reason
	}
	f.mu.Unlock()
	f.poke()
}

// abandon ends the goroutine without waiting for it: the device is gone.
func (f *follower) abandon() {
	if f == nil {
		return
	}
	f.mu.Lock()
	f.stopped = true
	f.mu.Unlock()
	f.poke()
}

// setOverlay tells of other networks.
func (f *follower) setOverlay(overlay func(netip.Addr) bool) {
	f.mu.Lock()
	f.overlay = overlay
	f.mu.Unlock()
	f.poke()
}

// Reasons for a look.
var (
	errBegin = errors.New("the routes that are there already")
	errAudit = errors.New("an audit")
	errLink  = errors.New("the link or its addresses changed")

	errExpiry = errors.New("a route has expired")
	errUntold = errors.New("there may be routes of which nothing was announced")
)

// following is the state of the goroutine.
type following struct {
	*follower
	device  *tunDevice
	tables  []uint32
	scratch kernel.FIBRoute

	routes    [2]uint64      // announced so far, by family
	heard     uint64         // announcements that may have changed the table
	untold    untold         // looks for what is in doubt
	quiet     bool           // no routes were announced while the last look read them
	lost      bool           // announcements
	deaf      bool           // there are none any more
	link      rtnl.LinkState // as last announced
	others    linkStates
	pending   error     // reason for a resync
	failures  int       // of resyncs, in succession
	since     time.Time // of the reason
	rested    time.Time // not before
	audit     time.Time
	expiry    time.Time // of the route that goes out of use next; zero: none does
	published time.Time
	dirty     bool // changes may wait to be published
	synced    bool // once
	told      bool // that routes are refused
}

func (f *following) run() {
	f.audit = time.Now().Add(f.auditPeriod())
	for ordered := false; ; {
		if !ordered {
			f.wait(f.next())
		}
		if f.orders() {
			return
		}
		begun := time.Now()
		heard := f.hear(gulp)
		f.settle()
		now := time.Now()
		took := now.Sub(begun)
		if f.audit.Before(now) {
			f.look(errAudit)
			f.audit = now.Add(f.auditPeriod())
		}
		if !f.expiry.IsZero() && f.expiry.Before(now) {
			f.expiry = time.Time{}
			f.look(errExpiry)
		}
		if f.pending != nil && !now.Before(f.due()) {
			f.resyncNow()
		}
		f.publish()
		ordered = heard && f.breathe(restAfter(took))
	}
}

func (f *following) auditPeriod() time.Duration {
	if f.deaf {
		return auditDeaf
	}
	return auditEvery
}

// listen begins to hear announcements.
func (f *following) listen(readBuffer int) error {
	if err := f.listener.Join(readBuffer, followed...); err != nil {
		return err
	}
	return f.filter()
}

// filter keeps away what does not concern the device. What its own requests bring about does: where our own routes stand among
// the others decides which are in force.
func (f *following) filter() error { return f.listener.OnlyConcerning(f.device.index, 0) }

// deafen notes that the kernel's announcements can be heard no more: from here on there are dumps alone.
func (f *following) deafen(err error) {
	f.deaf = true
	f.device.note(fmt.Errorf("no longer told of routes, which are read every %v instead: %w", auditDeaf, err))
	f.look(err)
	f.audit = time.Now().Add(auditDeaf)
}

// wait waits for an announcement, an order, or until there is something to do without.
func (f *following) wait(until time.Time) {
	if !f.deaf {
		if err := f.listener.WaitUntil(until); err != nil {
			f.deafen(err)
		}
		return
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-f.poked:
	case <-timer.C:
	}
}

// next is when there is something to do without an announcement.
func (f *following) next() time.Time {
	at := f.audit
	if f.pending != nil && f.due().Before(at) {
		at = f.due()
	}
	if !f.expiry.IsZero() && f.expiry.Before(at) {
		at = f.expiry
	}
	if f.dirty && f.synced {
		if due := f.published.Add(publishEvery); due.Before(at) {
			at = due
		}
	}
	return at
}

// due is when a resync that is pending may begin.
func (f *following) due() time.Time {
	if at := f.since.Add(resyncSettle); at.After(f.rested) {
		return at
	}
	return f.rested
}

// look makes a resync pending.
func (f *following) look(reason error) {
	if f.pending == nil || f.pending == errUntold {
		f.pending, f.since = reason, time.Now()
	}
}

// orders takes what others have asked for; true: stop.
func (f *following) orders() bool {
	f.mu.Lock()
	stopped, reason, overlay := f.stopped, f.reason, f.overlay
	f.reason, f.overlay = nil, nil
	f.mu.Unlock()
	if reason != nil {
		f.look(reason)
	}
	if overlay != nil {
		f.device.tree.refresh(func() []change {
			f.layer.table.SetOverlay(overlay)
			return f.layer.changed()
		})
	}
	return stopped
}

// hear takes note of what was announced, up to most datagrams, and says whether there was any. If there is more the next wait is short.
func (f *following) hear(most int) bool {
	if f.deaf {
		return false
	}
	heard, err := f.take(most)
	if err != nil {
		f.lost = true
		f.deafen(err)
	}
	return heard
}

func (f *following) take(most int) (heard bool, err error) {
	tree := &f.device.tree
	tree.mu.Lock() // and no other lock beside it: State asks the tree while it holds its own
	defer tree.mu.Unlock()
	for range most {
		messages, err := f.listener.Next()
		for _, m := range messages {
			f.apply(m)
		}
		switch {
		case errors.Is(err, rtnl.ErrOverrun):
			f.device.counts.overruns.Add(1)
			f.listener.Drain()
			f.lost = true
			f.look(err)
		case err != nil:
			return heard, err
		case len(messages) == 0:
			return heard, nil
		}
		heard = true
	}
	return heard, nil
}

// apply takes note of one announcement; with the tree's lock.
func (f *following) apply(m rtnl.Message) {
	table := f.layer.table
	switch m.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Body) > 0 {
			f.routes[familyIndex(m.Body[0])]++
		}
		if !rtnl.MayConcern(m, int32(f.device.index)) {
			return
		}
		if err := rtnl.DecodeFIBRoute(m, &f.scratch); err != nil {
			f.look(err)
			return
		}
		f.expires(&f.scratch)
		table.Apply(rtnl.ChangeOf(m), &f.scratch)
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		n, err := rtnl.DecodeNextHop(m)
		switch {
		case err != nil:
			f.look(err)
		case m.Type == unix.RTM_DELNEXTHOP:
			table.DeleteNextHop(n.ID)
		default:
			table.SetNextHop(n)
		}
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		f.applyLink(m)
		return
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		// An IPv4 address takes routes with it: its interface's, with the last one, and all that name it as their source.
		a, index, err := rtnl.DecodeAddr(m)
		if err != nil || index == f.device.index || m.Type == unix.RTM_DELADDR && a.Prefix.Addr().Is4() {
			f.look(errLink)
		}
		return
	default: // rules, netconf
		f.look(errors.New("the routing rules or settings changed"))
		return
	}
	f.heard++
	f.untold.vain = false
	f.dirty = true
}

func familyIndex(family uint8) int {
	if family == unix.AF_INET6 {
		return 1
	}
	return 0
}

// publish shows readers what changed, unless it has only just done so.
func (f *following) publish() {
	if f.dirty && f.synced && time.Since(f.published) >= publishEvery {
		f.publishNow()
	}
}

func (f *following) publishNow() {
	tree := &f.device.tree
	tree.refresh(func() []change {
		changes := f.layer.changed()
		if was := tree.kernel; was != f.layer && was != nil { // what another has learned gives way
			for p := range was.All() {
				o, ok := f.layer.Get(p)
				changes = append(changes, change{prefix: p, offer: o, gone: !ok})
			}
		}
		tree.kernel = f.layer
		return changes
	})
	f.dirty, f.published = false, time.Now()
	var refused uint64
	f.locked(func(t *fib.Table) { refused = t.Refused() })
	if refused > 0 && !f.told {
		f.told = true
		f.device.note(fmt.Errorf("there are more kernel routes than SystemRoutes.Max: %d were not learned", refused))
	}
}
