package overlay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

const planProtocol = DefaultProtocol

// world draws states that a kernel can be in, and configurations, from few values so that they meet.
type world struct{ *rand.Rand }

func newWorld(seed uint64) world { return world{rand.New(rand.NewPCG(seed, 1))} }

func pick[T any](w world, list ...T) T { return list[w.IntN(len(list))] }

func (w world) network() netip.Prefix {
	if w.IntN(2) == 0 {
		addr := netip.AddrFrom4([4]byte{10, byte(1 + w.IntN(2)), 0, byte(1 + w.IntN(4))})
		return netip.PrefixFrom(addr, pick(w, 16, 24, 24, 24, 32))
	}
	addr := netip.AddrFrom16([16]byte{0xfd, byte(1 + w.IntN(2)), 15: byte(1 + w.IntN(3))})
	return netip.PrefixFrom(addr, pick(w, 48, 64, 64, 64, 128))
}

func (w world) destination() netip.Prefix {
	return netip.MustParsePrefix(pick(w, "10.1.0.0/24", "10.2.0.0/24", "10.9.0.0/16", "10.8.0.0/16", "0.0.0.0/0", "fd01::/64", "fd02::/64", "fd09::/64", "fd08::/64"))
}

// config draws a valid Config.
func (w world) config() Config {
	for {
		c := Config{MTU: pick(w, 0, 0, 1000, 1280, 1300, 1400, 65535), TxQueueLen: pick(w, 0, 0, 77), TakeAddresses: w.IntN(4) == 0, LinkLocal: w.IntN(4) == 0}
		for range w.IntN(5) {
			c.Networks = append(c.Networks, w.network())
		}
		for range w.IntN(5) {
			c.Routes = append(c.Routes, Route{
				Prefix: w.destination(), MTU: pick(w, 0, 0, 1280, 1300, 1400), Metric: pick(w, 0, 0, 1, 2, 256, 1024),
				Table: pick(w, 0, 254, 254, 100), NoInstall: w.IntN(6) == 0,
			})
		}
		if c.Validate() == nil {
			return c
		}
	}
}

// state draws a kernel's state, by what others and an earlier run may have done.
func (w world) state() *model {
	m := newModel()
	for range w.IntN(30) {
		switch w.IntN(8) {
		case 0:
			m.setMTU(pick(w, 1000, 1279, 1280, 1300, 1400, 1500))
		case 1:
			m.setUp(w.IntN(4) != 0)
		case 2:
			_ = m.set(step{setting: pick(w, settingIPv4Promote, settingIPv6AddrGen, settingIPv6RA), to: w.IntN(2)})
		case 3, 4:
			a := kernel.Addr{Prefix: w.network(), Protocol: pick[uint8](w, 0, planProtocol, planProtocol, 110), NoPrefixRoute: w.IntN(2) == 0}
			if w.IntN(8) == 0 { // between two hosts
				a.Prefix = netip.MustParsePrefix(pick(w, "10.3.0.1/32", "fd03::1/128"))
				a.Peer = a.Prefix.Addr().Next()
			}
			_ = m.addAddr(a)
		case 5, 6:
			m.strangeRoute(w)
		case 7:
			if len(m.addresses) > 0 {
				_ = m.delAddr(pick(w, m.addresses...))
			}
		}
	}
	return m
}

func (m *model) strangeRoute(w world) {
	r := kernel.Route{
		RouteKey: kernel.RouteKey{Prefix: w.destination(), Table: pick[uint32](w, 254, 254, 254, 100), Metric: pick[uint32](w, 0, 1, 2, 255, 256, 1024)},
		Protocol: pick[uint8](w, 3, planProtocol, planProtocol, 110), Link: modelLink, Plain: w.IntN(8) != 0,
		MTU: pick[uint32](w, 0, 1280, 1300, 1400), MSS: pick[uint32](w, 0, 1260, 1240),
	}
	if r.Prefix.Addr().Is6() {
		r.Metric = max(r.Metric, 1)
	}
	if w.IntN(3) == 0 {
		for _, a := range m.addresses {
			if a.Prefix.Addr().Is4() && r.Prefix.Addr().Is4() {
				r.Source = a.Prefix.Addr()
			}
		}
	}
	if w.IntN(4) == 0 && !r.Source.IsValid() { // one that names our address goes with it, unseen
		r.Link = 8
		m.others = append(m.others, r)
		return
	}
	_ = m.addRoute(r)
}

// FuzzPlan: carried out on a model of the kernel a plan gives the wanted state, without naming anybody else's object, and
// planning again gives nothing. Taken back after any step, the state is the one before.
func FuzzPlan(f *testing.F) {
	for seed := range uint64(200) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		w := newWorld(seed)
		m, c := w.state(), w.config()
		want := desire(&c, modelLink)
		if obstacle(m.look(), &want) != nil {
			return
		}
		r := &rehearsal{w: w, m: m, before: m.clone(), want: &want}
		if err := r.run(-1); err != nil {
			t.Fatalf("seed %d: %v\n%v", seed, err, r)
		}
		if err := r.reached(); err != nil {
			t.Fatalf("seed %d: %v\n%v", seed, err, r)
		}
		for n := range len(r.done) + 1 {
			back := &rehearsal{w: w, m: r.before.clone(), before: r.before, want: &want}
			if err := back.run(n); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if err := back.takeBack(); err != nil {
				t.Fatalf("seed %d, taken back after %d steps: %v\n%v", seed, n, err, back)
			}
			blind := &rehearsal{w: w, m: r.before.clone(), before: r.before, want: &want}
			_ = blind.run(n)
			if err := blind.takeBackUnseen(); err != nil {
				t.Fatalf("seed %d, taken back unseen after %d steps: %v\n%v", seed, n, err, blind)
			}
		}
	})
}

// rehearsal carries plans out on a model, as execution does on the kernel.
type rehearsal struct {
	w      world
	m      *model
	before *model
	want   *desired
	done   []step
}

func (r *rehearsal) String() string {
	return fmt.Sprintf("before\n%v\nwant %+v\nsteps\n%s\nnow\n%v", r.before, r.want, differences(r.done), r.m)
}

// run stops after most steps, if that is not negative.
func (r *rehearsal) run(most int) error {
	for range rehearsalRounds {
		steps := plan(r.m.look(), r.want)
		if len(steps) == 0 || len(r.done) == most {
			return nil
		}
		for _, s := range steps {
			if len(r.done) == most {
				return nil
			}
			if err := r.mayDo(s); err != nil {
				return err
			}
			switch err := r.m.do(s); {
			case err == nil:
				r.done = append(r.done, s)
			case !errors.Is(err, errModelHeld) && !s.optional:
				return fmt.Errorf("%v: %w", s, err)
			}
		}
	}
	return errors.New("it never ends: " + brief(plan(r.m.look(), r.want), step.String))
}

const rehearsalRounds = 4 // as many as converge has

// mayDo refuses steps that concern what is others'.
func (r *rehearsal) mayDo(s step) error {
	switch {
	case s.kind == stepDelAddr && !removable(s.addr, r.want),
		s.kind == stepDelRoute && s.route.Protocol != planProtocol && (s.route.Protocol != kernel.ProtoKernel || r.leadsToStranger(s.route)),
		(s.kind == stepAddRoute || s.kind == stepDelRoute) && s.route.Link != modelLink,
		s.kind == stepAddRoute && s.route.Protocol != planProtocol, s.kind == stepAddAddr && s.addr.Protocol != planProtocol:
		return fmt.Errorf("%v is not ours to do", s)
	}
	return nil
}

// reached compares the model with what was wanted.
func (r *rehearsal) reached() error {
	is := r.m.look()
	if is.link.MTU != r.want.mtu || is.link.TxQueueLen != r.want.txQueueLen || !is.link.Up {
		return fmt.Errorf("link %+v", is.link)
	}
	for _, a := range r.want.addresses {
		if !slices.ContainsFunc(is.addresses, a.Same) {
			return fmt.Errorf("no address %v", a.Prefix)
		}
	}
	for _, a := range is.addresses {
		if !r.want.names(a) && removable(a, r.want) {
			return fmt.Errorf("address %v is left", a.Prefix)
		}
	}
	strangers := obscured(is, r.want)
	for _, route := range r.want.routes {
		i := slices.IndexFunc(is.routes, func(h kernel.Route) bool { return h.RouteKey == route.RouteKey })
		if i < 0 || !r.want.does(is.routes[i], route) && !slices.Contains(strangers, is.routes[i]) {
			return fmt.Errorf("no route %s", routeText(route))
		}
	}
	for _, h := range is.routes {
		wanted := slices.ContainsFunc(r.want.routes, func(w kernel.Route) bool { return w.RouteKey == h.RouteKey })
		if h.Protocol == planProtocol && !wanted {
			return fmt.Errorf("route %s is left", routeText(h))
		}
	}
	return r.foreignStays()
}

// foreignStays checks that what is others' is there yet, but for what the kernel takes along.
func (r *rehearsal) foreignStays() error {
	is := r.m.look()
	for _, a := range r.before.addresses {
		if !removable(a, r.want) && !slices.ContainsFunc(is.addresses, a.Same) && !isKernelsLinkLocal(a) {
			return fmt.Errorf("another's address %v is gone", a.Prefix)
		}
	}
	for _, h := range r.before.routes {
		same := func(o kernel.Route) bool {
			if h.Prefix.Addr().Is6() {
				o.MTU = h.MTU // the kernel's doing, when the device's MTU changes
			}
			return o == h
		}
		if r.leadsToStranger(h) && !slices.ContainsFunc(is.routes, same) {
			return fmt.Errorf("the kernel's route %s to another's address is gone", routeText(h))
		}
		lost := h.Source.IsValid() && !slices.ContainsFunc(is.addresses, func(a kernel.Addr) bool { return a.Prefix.Addr() == h.Source })
		if h.Protocol != planProtocol && h.Protocol != kernel.ProtoKernel && !lost && !slices.ContainsFunc(is.routes, same) && !r.losesIPv4(h) {
			return fmt.Errorf("another's route %s is gone", routeText(h))
		}
	}
	return nil
}

// leadsToStranger says whether h is the kernel's own route to the network of an address that is not ours and stays.
func (r *rehearsal) leadsToStranger(h kernel.Route) bool {
	return h.Protocol == kernel.ProtoKernel && slices.ContainsFunc(r.before.addresses, func(a kernel.Addr) bool {
		theirs := a.Protocol != planProtocol && !r.want.takeAddresses && !r.want.names(a) && !a.NoPrefixRoute
		return theirs && connectedKey(networkOf(a)) == h.RouteKey && (h.Prefix.Addr().Is6() || h.Source == a.Prefix.Addr())
	})
}

// losesIPv4 says whether h went because the last IPv4 address did.
func (r *rehearsal) losesIPv4(h kernel.Route) bool {
	return h.Prefix.Addr().Is4() && !slices.ContainsFunc(r.m.addresses, func(a kernel.Addr) bool { return a.Prefix.Addr().Is4() })
}

func (r *rehearsal) takeBack() error {
	r.inverse()
	for range 7 {
		steps := restoring(r.m.look(), &r.before.observed, r.done, planProtocol)
		if len(steps) == 0 {
			return r.asBefore()
		}
		for _, s := range steps {
			_ = r.m.do(s)
		}
	}
	return errors.New("it never ends: " + differences(restoring(r.m.look(), &r.before.observed, r.done, planProtocol)))
}

func (r *rehearsal) inverse() {
	for i := len(r.done) - 1; i >= 0; i-- {
		_ = r.m.do(r.done[i].inverse())
	}
}

func (r *rehearsal) takeBackUnseen() error {
	r.inverse()
	steps, enough := unseen(&r.before.observed, r.done, planProtocol)
	for _, s := range steps {
		_ = r.m.do(s)
	}
	if !enough {
		return nil
	}
	return r.asBefore()
}

func (r *rehearsal) asBefore() error {
	now, before := strings.Split(r.m.String(), "\n"), strings.Split(r.before.String(), "\n")
	if slices.Equal(now, before) {
		return nil
	}
	var b strings.Builder
	for _, line := range before {
		if !slices.Contains(now, line) {
			fmt.Fprintf(&b, "-%s\n", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(before, line) {
			fmt.Fprintf(&b, "+%s\n", line)
		}
	}
	return fmt.Errorf("not as before:\n%s", &b)
}
