package overlay

import (
	"fmt"
	"slices"

	"example.com/overlay/internal/kernel"
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
	d.viewMu.Lock()
	d.cfg = next
	d.viewMu.Unlock()
	if d.active {
		d.follow(&old, &next)
	}
	d.bare.Store(next.NoFilter)
	d.logTo(next.Logger)
	d.tree.change(forget)
	return nil
}

// follow lets the follower go from one Config to the next. It is no part of all or nothing: what cannot be followed is noted.
func (d *tunDevice) follow(old, next *Config) {
	if err := d.follower.change(d, old, next); err != nil {
		d.note(fmt.Errorf("the kernel's routes are not followed: %w", err))
	}
}

// enforce brings the kernel from the Config in force to next. Where that is a matter of routes, and nobody has meddled since we
// looked, it takes law 5's messages and no look.
func (d *tunDevice) enforce(next *Config, changes routeChanges) error {
	run := &execution{device: d, protocol: next.protocol(), concerned: d.tree.routed}
	if !changes.onlyRoutes(&d.cfg, next) || d.trust.contested || !d.trusted() {
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
	d.tellShadows(d.someShadows(&observed{}, &want, next, added(steps, want.routes)))
	return nil
}

// added are those of the wanted routes that steps add: not those that only stand in for others meanwhile.
func added(steps []step, wanted []kernel.Route) (routes []kernel.Route) {
	if len(steps) == len(wanted) && !slices.ContainsFunc(steps, func(s step) bool { return s.kind != stepAddRoute }) {
		return wanted
	}
	keys := make(map[kernel.RouteKey]bool)
	for _, s := range steps {
		if s.kind == stepAddRoute {
			keys[s.route.RouteKey] = true
		}
	}
	for _, r := range wanted {
		if keys[r.RouteKey] {
			routes = append(routes, r)
		}
	}
	return routes
}

// supposed is what the kernel holds of ours by all we know.
func (d *tunDevice) supposed() *observed {
	want := desire(&d.cfg, d.index)
	return &observed{link: d.lastLink(), addresses: want.addresses, routes: want.routes}
}
