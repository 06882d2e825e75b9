package overlay

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/kernel"
)

// healer puts back what others take from the device, in a goroutine of its own: the watch must not wait for Activate and Reload.
type healer struct {
	wake    chan struct{} // a sign was given
	urgent  atomic.Bool   // that one, or one before it
	stopped chan struct{}
	done    chan struct{} // closed when the goroutine is gone; nil before start
}

func newHealer() *healer {
	return &healer{wake: make(chan struct{}, 1), stopped: make(chan struct{})}
}

// start runs the healer's goroutine until stop.
func (h *healer) start(d *tunDevice) {
	h.done = make(chan struct{})
	audits := auditEvery
	if d.watch == nil {
		audits = auditDeaf
	}
	go func() {
		defer close(h.done)
		h.run(d, audits)
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
func (h *healer) run(d *tunDevice, audits time.Duration) {
	pace, news := newPace(), newDigest()
	audit, next := time.NewTimer(audits), time.NewTimer(0)
	defer audit.Stop()
	defer next.Stop()
	for {
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
			r := d.heal()
			pace.looked(start, time.Now(), r)
			d.tellRepair(news, r)
		}
		if n := news.due(time.Now()); n > 0 {
			d.notify(Event{Kind: EventRestored, N: n})
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

// heal looks, and puts back what is missing. It goes as far as it gets and takes nothing back: a part is better than nothing.
func (d *tunDevice) heal() (r repair) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.alive() != nil || !d.active || d.cfg.NoHeal || d.trust.at == d.doubts.Load() {
		return r
	}
	want := desire(&d.cfg, d.index)
	want.added, want.takeAddresses = d.past.added, false // who adds something takes nothing away
	run := &execution{device: d, protocol: want.protocol, concerned: d.tree.routed}
	r.looked, r.err = true, run.look()
	if r.err != nil {
		return r
	}
	whole := want.yield(&run.now.link)
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
		d.trust.whole = whole && run.now.link.Up
		run.report()
		r.shadowed = d.newShadows(run, &want)
	case r.err == nil && d.doubts.Load() == signs:
		r.err = fmt.Errorf("the kernel differs after the attempt: %s", differences(run.left))
	}
	return r
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

// tellRepair tells what came of a look: repairs summed up, a failure when it begins.
func (d *tunDevice) tellRepair(news *digest, r repair) {
	news.add(r.restored)
	if r.err != nil {
		d.counts.restoreFails.Add(1)
	}
	if r.looked {
		d.viewMu.Lock()
		failed := d.unhealed != ""
		d.unhealed = ""
		if r.err != nil {
			d.unhealed = "not put back what others removed: " + needs(r.err, "CAP_NET_ADMIN").Error()
		}
		text := d.unhealed
		d.viewMu.Unlock()
		if r.err != nil && !failed && d.alive() == nil && news.may(time.Now()) {
			d.notify(Event{Kind: EventDegraded, N: 1, Err: errors.New(text)})
		}
	}
	if len(r.shadowed) > 0 && news.may(time.Now()) {
		d.tellShadows(r.shadowed)
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
	return d.someShadows(run.now, want, &d.cfg, ask)
}
