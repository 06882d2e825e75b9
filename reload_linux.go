package overlay

import (
	"maps"
	"slices"
)

// Reload implements Device. The tree learns new routes before the kernel does and forgets old ones after.
func (d *tunDevice) Reload(cfg Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.alive(); err != nil {
		return err
	}
	if err := cfg.Validate(); err != nil {
		return err
	}
	if d.adopted && cfg.Queues == 0 {
		cfg.Queues = len(d.queues)
	}
	if err := restart(&d.cfg, &cfg); err != nil {
		return err
	}
	next := cfg.clone()
	changes := changedRoutes(d.cfg.Routes, next.Routes)
	touched := changes.touched(&d.cfg, &next)
	forget := d.learn(&next, touched)
	if d.active {
		if err := d.enforce(&next, changes); err != nil {
			d.publishTouched(&d.cfg, touched)
			return err
		}
	}
	old := d.cfg
	if next.NoOffload != old.NoOffload {
		d.regrant(next.NoOffload)
	}
	d.viewMu.Lock()
	d.cfg = next
	d.viewMu.Unlock()
	if d.active {
		d.follower.change(d, &old, &next)
	}
	d.bare.Store(next.NoFilter)
	d.logTo(next.Logger)
	d.tree.change(forget)
	return nil
}

// enforce brings the kernel from the Config in force to next. Where that is a matter of routes, and nobody has meddled since we
// looked, it takes law 5's messages and no look. What failed the last time and is optional is tried again in any case: where it
// never works, as in a container with a read-only /proc/sys, that is all.
func (d *tunDevice) enforce(next *Config, changes routeChanges) error {
	run := &execution{device: d, protocol: next.protocol(), concerned: d.tree.routed}
	if !changes.onlyRoutes(&d.cfg, next) || d.trust.contested || !d.trusted() || d.retry() {
		run.gone = changes.hidden(&d.cfg, next, d.index)
		return d.converge("reload", next, run)
	}
	steps, want := changes.planChanges(&d.cfg, next, d.index)
	if want.ipv6 && !d.trust.ipv6 {
		return d.converge("reload", next, run) // its first route: can the device carry it?
	}
	if len(steps) == 0 {
		return nil
	}
	if err := run.carryOut(steps); err != nil {
		run.before = d.supposed()
		return d.giveUp("reload", run, &want, err)
	}
	if run.held || run.unknown != nil {
		run.before = d.supposed()
		return d.converge("reload", next, run) // things are not as we thought: look
	}
	d.tellShadows(d.someShadows(&observed{}, &want, next, d.worthAsking(next, &want, changes.prefixes), changes.prefixes))
	return nil
}

// retry tries again what failed the last time, and says whether something is otherwise now, so that a look is due. The Config in
// force asks for it already: whatever becomes of a Reload, this is not taken back.
func (d *tunDevice) retry() bool {
	var steps []step
	for _, name := range slices.Sorted(maps.Keys(d.past.lacks)) {
		steps = append(steps, d.past.lacks[name].step)
	}
	run := &execution{device: d, protocol: d.cfg.protocol()}
	err := run.carryOut(steps)
	return err != nil || len(run.done) > 0
}

// supposed is what the kernel holds of ours by all we know.
func (d *tunDevice) supposed() *observed {
	want := desire(&d.cfg, d.index)
	return &observed{link: d.lastLink(), addresses: want.addresses, routes: want.routes}
}
