package overlay

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/kernel"
)

// healer puts back what others take from the device, in a goroutine of its own: the watch must not wait for Activate and Reload.
type healer struct {
	wake    chan struct{} // a sign was given
	urgent  atomic.Bool   // that one, or one before it
	deaf    atomic.Bool   // nobody gives signs
	stopped chan struct{}
	done    chan struct{} // closed when the goroutine is gone; nil before start
}

func newHealer() *healer {
	return &healer{wake: make(chan struct{}, 1), stopped: make(chan struct{})}
}

// start runs the healer's goroutine until stop.
func (h *healer) start(d *tunDevice) {
	h.done = make(chan struct{})
	if d.watch == nil {
		h.deaf.Store(true)
	}
	go func() {
		defer close(h.done)
		h.run(d)
	}()
}

// stop ends the goroutine and waits for it, and it may wait for Activate and Reload.
func (h *healer) stop() {
	close(h.stopped)
	if h.done != nil {
		<-h.done
	}
}

// sign says that there may be something to put back.
func (h *healer) sign(urgent bool) {
	if urgent {
		h.urgent.Store(true)
	}
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run looks at every sign as pace allows, and in any case every so often.
func (h *healer) run(d *tunDevice) {
	pace, news, audits := newPace(), newDigest(), auditEvery
	audit, next := time.NewTimer(audits), time.NewTimer(0)
	defer audit.Stop()
	defer next.Stop()
	for {
		if h.deaf.Load() && audits != auditDeaf {
			audits = auditDeaf
			audit.Reset(audits)
		}
		select {
		case <-h.stopped:
			return
		case <-h.wake:
			pace.sign(time.Now(), h.urgent.Swap(false))
		case <-audit.C:
			d.doubts.Add(1)
			d.watch.suspectAll()
			pace.sign(time.Now(), false)
			audit.Reset(audits)
		case <-next.C:
		}
		if wait, ok := pace.wait(time.Now()); ok && wait == 0 {
			start := time.Now()
			r := d.heal(news)
			pace.looked(start, time.Now(), r)
		}
		for due := news.take(time.Now()); !due.empty(); due = news.take(time.Now()) {
			d.tell(due)
		}
		next.Reset(min(pace.next(time.Now()), news.next(time.Now())))
	}
}

// doubt notes that what was last seen may not hold any more. urgent: nor do packets go where they should.
func (d *tunDevice) doubt(urgent bool) {
	d.doubts.Add(1)
	d.healer.sign(urgent)
}

// beliefs are those of the Config in force.
func (d *tunDevice) beliefs() beliefs {
	d.viewMu.Lock()
	defer d.viewMu.Unlock()
	return beliefs{config: d.cfg, link: d.index, routed: d.tree.routed}
}

// trust is what the device knows of the kernel since its last look; with mu held.
type trust struct {
	at        uint64 // doubts at that look
	whole     bool   // Config was in force, with nothing left to the administrator
	contested bool   // somebody else holds the key of a route of ours
	ipv6      bool   // the device has what IPv6 needs
}

// trust is what a look is worth that left nothing to do.
func (e *execution) trust(want *desired) trust {
	return trust{at: e.seenAt, whole: true, contested: sharesKeys(e.now, want), ipv6: want.ipv6}
}

// trusted says whether the kernel holds what Config says, by all that was announced until now.
func (d *tunDevice) trusted() bool {
	return d.watch.hearAll(d) && d.trust.whole && d.trust.at == d.doubts.Load()
}

// heal looks, puts back what is missing, and notes what came of it.
func (d *tunDevice) heal(news *digest) repair {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.mend()
	d.digest(news, r) // not later: what a Reload finds in order meanwhile is no trouble any more
	return r
}

// mend goes as far as it gets and takes nothing back: a part is better than nothing. With the device's lock.
func (d *tunDevice) mend() (r repair) {
	if d.alive() != nil || !d.active || d.cfg.NoHeal || d.trust.at == d.doubts.Load() {
		return r
	}
	want := desire(&d.cfg, d.index)
	want.added, want.takeAddresses = d.past.added, false // who adds something takes nothing away
	asked := want.ipv6
	run := &execution{device: d, protocol: want.protocol, concerned: d.tree.routed}
	if r.looked, r.err = true, run.look(); r.err != nil {
		r.leftOut = d.leftOut // by all we know
		return r
	}
	whole := want.yield(&run.now.link)
	if asked && !want.ipv6 {
		r.leftOut = withoutIPv6(&run.now.link)
	}
	signs := run.seenAt
	if run.now.link.Up {
		r.err = run.repair(&want)
	}
	r.restored = restoredBy(run.done)
	d.counts.restores.Add(uint64(r.restored))
	if len(run.done) > 0 {
		d.follower.resync(errLink)
	}
	switch {
	case r.err == nil && len(run.left) == 0:
		d.trust = run.trust(&want)
		d.trust.whole = whole && run.now.link.Up && !d.strangersIn(run.now, want)
		run.report(whole && run.now.link.Up)
		r.shadowed = d.newShadows(run, &want)
	case r.err == nil && d.doubts.Load() == signs:
		r.err = fmt.Errorf("the kernel differs after the attempt: %s", differences(run.left))
	}
	return r
}

// strangersIn says whether there are addresses that Config wants taken and healing leaves: that is for Reload.
func (d *tunDevice) strangersIn(have *observed, want desired) bool {
	want.takeAddresses = d.cfg.TakeAddresses
	return want.takeAddresses && len(plan(have, &want)) > 0
}

// repair carries out what is left to do, and looks what then is.
func (e *execution) repair(want *desired) error {
	if err := obstacle(e.now, want); err != nil {
		return err
	}
	e.left = e.pending(plan(e.now, want))
	if len(e.left) == 0 {
		return nil
	}
	if err := e.carryOut(e.left); err != nil {
		return err
	}
	if err := e.look(); err != nil {
		return err
	}
	e.left = e.pending(plan(e.now, want))
	return nil
}

// withoutIPv6 says why what needs IPv6 is left out.
func withoutIPv6(link *kernel.Link) error {
	if link.IPv6 == nil && link.MTU < minIPv6MTU {
		return fmt.Errorf("IPv6 is left out: the MTU is %d, IPv6 needs %d", link.MTU, minIPv6MTU)
	}
	return fmt.Errorf("IPv6 is left out: %w", ErrIPv6Disabled)
}

// digest takes note of what came of a look, for State and to be told. Trouble is told when it begins. With the device's lock.
func (d *tunDevice) digest(news *digest, r repair) {
	news.restored += r.restored
	_, more := overshadow(news.shadowed, r.shadowed, nil)
	news.shadowed = append(news.shadowed, more...)
	if r.err != nil {
		d.counts.restoreFails.Add(1)
	}
	if !r.looked {
		return
	}
	var unhealed error
	if r.err != nil {
		unhealed = fmt.Errorf("not put back what others removed: %w", needs(r.err, "CAP_NET_ADMIN"))
	}
	d.viewMu.Lock()
	defer d.viewMu.Unlock()
	news.leftOut = begun(news.leftOut, d.leftOut, r.leftOut)
	news.unhealed = begun(news.unhealed, d.unhealed, unhealed)
	d.leftOut, d.unhealed = r.leftOut, unhealed
}

// begun is what is to be told of trouble that was, and now is this.
func begun(untold, was, is error) error {
	if is == nil || was != nil && untold == nil {
		return nil // over, or told
	}
	return is
}

// tell tells what is due, as far as it is still so.
func (d *tunDevice) tell(due digest) {
	if due.empty() || d.alive() != nil {
		return
	}
	if due.restored > 0 {
		d.notify(Event{Kind: EventRestored, N: due.restored})
	}
	d.viewMu.Lock()
	leftOut, unhealed, shadowed := d.leftOut, d.unhealed, d.shadowed
	d.viewMu.Unlock()
	if due.leftOut != nil && leftOut != nil {
		d.notify(Event{Kind: EventDegraded, N: 1, Err: due.leftOut})
	}
	if due.unhealed != nil && unhealed != nil {
		d.notify(Event{Kind: EventDegraded, N: 1, Err: due.unhealed})
	}
	if len(due.shadowed) > 0 {
		still := setOf(shadowed)
		d.tellShadows(slices.DeleteFunc(due.shadowed, func(s shadow) bool { return !still[s] }))
	}
}

// newShadows asks who answers for the routes that were put back, and for those that the watch suspects.
func (d *tunDevice) newShadows(run *execution, want *desired) []shadow {
	suspects, all := d.watch.takeSuspects()
	back := make(map[kernel.RouteKey]bool)
	for _, s := range run.done {
		if s.kind == stepAddRoute {
			back[s.route.RouteKey] = true
		}
	}
	var ask []kernel.Route
	for _, r := range want.routes {
		if all || back[r.RouteKey] || suspects[r.Prefix] {
			ask = append(ask, r)
		}
	}
	ask = asked(ask)
	return d.someShadows(run.now, want, &d.cfg, ask, prefixesOf(ask))
}
