package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"example.com/overlay/internal/fib"
	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// resyncNow reads everything anew.
func (f *following) resyncNow() {
	reason, start := f.pending, time.Now()
	f.pending = nil
	err := f.readAll()
	f.rested = time.Now().Add(resyncRest * time.Since(start))
	if err != nil {
		f.look(fmt.Errorf("%w: %w", reason, err))
		f.rested = maxTime(f.rested, time.Now().Add(resyncRetry))
		return
	}
	f.publishNow()
	f.synced = true
	f.device.counts.resyncs.Add(1)
	if reason != errAudit {
		f.device.notify(Event{Kind: EventResynced, N: f.device.tree.learnedRoutes(), Err: reasonOf(reason)})
	}
}

func reasonOf(reason error) error {
	if reason == errBegin {
		return nil
	}
	return reason
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// readAll reads nexthop objects, rules and routes. The filter is away meanwhile, because what it hides spoils a dump too.
func (f *following) readAll() error {
	if err := f.listener.HearAll(); err != nil {
		return err
	}
	defer func() { _ = f.listener.OnlyConcerning(f.device.index, f.ownPort) }()
	if err := f.hear(1 << 20); err != nil {
		return err
	}
	if err := f.readNextHops(); err != nil {
		return fmt.Errorf("read the nexthop objects: %w", err)
	}
	if err := f.readRules(); err != nil {
		return fmt.Errorf("read the routing rules: %w", err)
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := f.readRoutes(family); err != nil {
			return fmt.Errorf("read the routes: %w", err)
		}
	}
	return nil
}

func (f *following) readNextHops() error {
	messages, err := f.conn.Dump(rtnl.GetNextHops())
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // before Linux 5.3
		return err
	}
	all := make([]kernel.NextHop, 0, len(messages))
	for _, m := range messages {
		n, err := rtnl.DecodeNextHop(m)
		if err != nil {
			return err
		}
		all = append(all, n)
	}
	f.locked(func(t *fib.Table) { t.SetNextHops(all) })
	return nil
}

func (f *following) readRules() error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		messages, err := f.conn.Dump(rtnl.GetRules(family))
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a kernel without rules looks at local, main, default
		}
		if err != nil {
			return err
		}
		var rules []kernel.Rule
		for _, m := range messages {
			rule, err := rtnl.DecodeRule(m)
			if err != nil {
				return err
			}
			rules = append(rules, rule)
		}
		is6 := family == unix.AF_INET6
		f.locked(func(t *fib.Table) { t.SetOrder(is6, fib.Order(rules, is6, f.tables)) })
	}
	return nil
}

// readRoutes reads one family's routes: mark and sweep (design.md law 2).
func (f *following) readRoutes(family uint8) error {
	is6, heard := family == unix.AF_INET6, f.routes[familyIndex(family)]
	f.lost = false
	f.locked(func(t *fib.Table) { t.Begin(is6, true) })
	var failed error
	for _, table := range f.tables {
		request := rtnl.GetFIB(family, table)
		request.Keep = func(m rtnl.Message) bool {
			if err := rtnl.DecodeFIBRoute(m, &f.scratch); err != nil {
				failed = err
				return false
			}
			f.locked(func(t *fib.Table) { t.Dumped(&f.scratch) })
			return false
		}
		if _, err := f.conn.DumpOnce(request); err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: a table without routes
			failed = err
		}
	}
	err := f.hear(1 << 20) // all that was announced before the dump ended
	quiet := failed == nil && err == nil && !f.lost && heard == f.routes[familyIndex(family)]
	f.locked(func(t *fib.Table) { t.End(is6, quiet) })
	f.dirty = true
	if err == nil {
		err = failed
	}
	return err
}

// locked lends out the table.
func (f *following) locked(fn func(t *fib.Table)) {
	f.device.tree.mu.Lock()
	defer f.device.tree.mu.Unlock()
	fn(f.layer.table)
}

// settle asks the kernel about what announcements and dumps leave in doubt.
func (f *following) settle() {
	for round := range settleRounds {
		var missing []uint32
		var doubts []netip.Prefix
		f.locked(func(t *fib.Table) {
			missing, doubts = t.MissingNextHops(), t.Doubts(false)
			if t.ResyncNeeded() {
				f.look(errors.New("nexthop objects changed"))
			}
		})
		if len(missing) == 0 && len(doubts) == 0 {
			return
		}
		f.dirty = true
		f.fetch(missing)
		for _, p := range doubts {
			f.ask(p)
		}
		if round == settleRounds-1 {
			f.look(errors.New("doubts that questions do not settle"))
		}
	}
}

// fetch asks for nexthop objects that routes lead through and nobody told of.
func (f *following) fetch(ids []uint32) {
	for _, id := range ids {
		r := f.conn.Do(rtnl.GetNextHop(id))[0]
		if r.Err != nil || len(r.Answers) != 1 {
			continue
		}
		if n, err := rtnl.DecodeNextHop(r.Answers[0]); err == nil {
			f.locked(func(t *fib.Table) { t.SetNextHop(n) })
		}
	}
}

// ask puts a question about a prefix, and the answer into the table.
func (f *following) ask(p netip.Prefix) {
	var after netip.Prefix
	for try := range settleTries {
		var addr netip.Addr
		ok := false
		f.locked(func(t *fib.Table) { addr, ok = fib.Probe(p, after, f.layer.longest) })
		if !ok {
			return
		}
		result := f.conn.Do(rtnl.MatchRoute(addr))[0]
		var got *kernel.FIBRoute
		switch {
		case errors.Is(result.Err, unix.ENETUNREACH):
		case result.Err != nil || len(result.Answers) != 1:
			f.locked(func(t *fib.Table) { after = t.Unanswered(p, addr, try) })
			continue
		case rtnl.DecodeFIBRoute(result.Answers[0], &f.scratch) != nil:
			return
		default:
			got = &f.scratch
		}
		f.locked(func(t *fib.Table) { after = t.Settle(p, addr, got) })
		if !after.IsValid() {
			return
		}
	}
}
