package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"example.com/overlay/internal/fib"
	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// resyncNow reads everything anew.
func (f *following) resyncNow() {
	reason := f.pending
	f.pending = nil
	cost, err := processorTime(func() error {
		heard := f.heard
		err := f.readAll()
		f.untold.vain = reason == errUntold && err == nil && f.quiet && f.heard == heard
		if reason == errUntold {
			f.untold.heard, f.untold.times = heard, f.untold.times+1
		}
		f.settle() // nobody may announce anything for long
		return err
	})
	f.rested = time.Now().Add(resyncRest * cost)
	if err != nil {
		f.failed(reason, err)
		return
	}
	f.failures = 0
	f.device.setUnsynced("")
	f.publishNow()
	f.synced = true
	f.device.counts.resyncs.Add(1)
	if reason != errAudit {
		f.device.notify(Event{Kind: EventResynced, N: f.device.tree.learnedRoutes(), Err: reasonOf(reason)})
	}
}

// processorTime says what fn cost the processor: on a machine that has other things to do it takes far longer.
func processorTime(fn func() error) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	used := func() time.Duration {
		var u unix.Rusage
		if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
			return 0
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	err := fn()
	return used() - before, err
}

// failed notes that a resync came to nothing, or to little: what was learned stays, and it is tried again, ever more rarely.
func (f *following) failed(reason, err error) {
	f.look(reason)
	retry := min(resyncRetry<<min(f.failures, 10), auditDeaf)
	f.rested = maxTime(f.rested, time.Now().Add(retry))
	f.failures++
	if f.failures >= resyncBear && errors.Is(err, rtnl.ErrInterrupted) { // better than nothing, where nothing was read in quiet yet
		f.publishNow()
		f.synced = true
	}
	err = fmt.Errorf("the kernel's routes may not be those that are followed: %w", err)
	f.device.setUnsynced(err.Error())
	if f.failures == resyncBear {
		f.device.notify(Event{Kind: EventDegraded, N: 1, Err: err})
	}
}

// setUnsynced is for State.
func (d *tunDevice) setUnsynced(why string) {
	d.viewMu.Lock()
	d.unsynced = why
	d.viewMu.Unlock()
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
	if !f.deaf {
		if err := f.listener.HearAll(); err != nil {
			return err
		}
		defer func() { _ = f.filter() }()
	}
	f.hear(1 << 20)
	f.quiet = true
	if err := f.readNextHops(); err != nil {
		return fmt.Errorf("read the nexthop objects: %w", err)
	}
	if err := f.readRules(); err != nil {
		return fmt.Errorf("read the routing rules: %w", err)
	}
	err := errors.Join(f.readRoutes(unix.AF_INET), f.readRoutes(unix.AF_INET6)) // that one fails says nothing about the other
	if err != nil {
		return fmt.Errorf("read the routes: %w", err)
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
	f.lost = f.deaf
	f.locked(func(t *fib.Table) { t.Begin(is6, true) })
	var failed error
	for _, table := range f.tables {
		request := rtnl.GetFIB(family, table)
		request.Keep = func(m rtnl.Message) bool {
			if err := rtnl.DecodeFIBRoute(m, &f.scratch); err != nil {
				failed = err
				return false
			}
			f.expires(&f.scratch)
			f.locked(func(t *fib.Table) { t.Dumped(&f.scratch) })
			return false
		}
		if _, err := f.conn.DumpOnce(request); err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: a table without routes
			failed = err
		}
	}
	f.hear(1 << 20) // all that was announced before the dump ended
	quiet := failed == nil && !f.lost && heard == f.routes[familyIndex(family)]
	if quiet && f.short(is6) {
		quiet, failed = false, errShort
	}
	f.locked(func(t *fib.Table) { t.End(is6, quiet) })
	f.quiet = f.quiet && quiet
	f.dirty = true
	return failed
}

// breathe waits; true: it was ended by an order, perhaps by an old one.
func (f *following) breathe(rest time.Duration) bool {
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-f.poked:
		return true
	case <-timer.C:
		return false
	}
}

// expires takes note of when a route goes out of use. The kernel announces that only when it clears the route away, which may take it
// half a minute (net/ipv6/route.c, find_match; net.ipv6.route.gc_interval).
func (f *following) expires(r *kernel.FIBRoute) {
	const late = 20 * time.Millisecond // it counts in ticks
	ours := func(leg kernel.Leg) bool { return int(leg.Link) == f.device.index }
	if r.Expires <= 0 || r.NextHop == 0 && !slices.ContainsFunc(r.Legs, ours) {
		return
	}
	if at := time.Now().Add(time.Duration(r.Expires)*10*time.Millisecond + late); f.expiry.IsZero() || at.Before(f.expiry) {
		f.expiry = at
	}
}

// applyLink takes note of a link that came, went or changed: routes and nexthop objects go with it, untold (kernel.md A7, B7, V15).
// Of other interfaces' only those count that are known here; with the tree's lock.
func (f *following) applyLink(m rtnl.Message) {
	link, ok := rtnl.DecodeLinkState(m)
	switch {
	case !ok:
	case link.Index == f.device.index:
		if m.Type == unix.RTM_NEWLINK && link != f.link {
			f.link = link
			f.look(errLink)
		}
	case f.others.differs(m.Type, link) && f.layer.table.Depends(int32(link.Index)):
		f.look(errLink)
	}
}

// linkStates are other interfaces' links as last announced.
type linkStates map[int]rtnl.LinkState

// differs takes note of a link, and says whether its routes may have gone or come into use again: it came, went, or went up or down.
func (s linkStates) differs(kind uint16, link rtnl.LinkState) bool {
	if kind == unix.RTM_DELLINK {
		delete(s, link.Index)
		return true
	}
	link.MTU = 0 // which is no reason
	was, known := s[link.Index]
	s[link.Index] = link
	return !known || was != link
}

var errShort = errors.New("the kernel's list leaves out routes that are there")

// short says whether a dump, in which all was quiet, left out what is there: the kernel ends the list of a table, and says that it
// was all, before a route of so many legs that it does not fit (kernel.md A26). A few questions tell, because then all that would
// have come after that is missing.
func (f *following) short(is6 bool) bool {
	const few = 16
	var asked []fib.Place
	var requests []rtnl.Message
	f.locked(func(t *fib.Table) {
		for _, p := range t.Unseen(is6, few) {
			if addr, ok := t.Probe(p.Prefix, netip.Prefix{}); ok {
				asked, requests = append(asked, p), append(requests, rtnl.MatchRoute(addr))
			}
		}
	})
	for i, result := range f.conn.Do(requests...) {
		if errors.Is(result.Err, unix.EMSGSIZE) {
			return true
		}
		if result.Err != nil || len(result.Answers) != 1 || rtnl.DecodeFIBRoute(result.Answers[0], &f.scratch) != nil {
			continue
		}
		r := &f.scratch
		through := is6 && r.NextHop != 0 // of such routes an answer may be about another
		if !through && asked[i] == (fib.Place{Prefix: r.Prefix, Table: r.Table}) && slices.ContainsFunc(r.Legs, func(leg kernel.Leg) bool { return int(leg.Link) == f.device.index }) {
			return true
		}
	}
	return false
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
			if t.ResyncNeeded(f.untold.vain) {
				f.lookForUntold()
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

// untold is what came of looks for what is in doubt and no question tells.
type untold struct {
	heard uint64 // when the last began
	times uint   // in succession, without an announcement between them that could matter
	vain  bool   // the last was quiet: another would show the same
}

// lookForUntold makes a resync for that pending: at once if there is news, ever later if not. The deaf look every few seconds anyway.
func (f *following) lookForUntold() {
	if f.pending != nil || f.deaf {
		return
	}
	f.look(errUntold)
	if f.heard == f.untold.heard && f.untold.times > 0 {
		f.since = f.since.Add(min(resyncDoubt<<min(f.untold.times-1, 10), auditDeaf))
	} else {
		f.untold.times = 0
	}
}

// fetch asks for nexthop objects that routes lead through and nobody told of. Of one that has gone the kernel tells before it takes
// its routes away, so that a question or a dump may have shown one of them afterwards (net/ipv4/nexthop.c, remove_nexthop).
func (f *following) fetch(ids []uint32) {
	for _, id := range ids {
		r := f.conn.Do(rtnl.GetNextHop(id))[0]
		if errors.Is(r.Err, unix.ENOENT) {
			f.locked(func(t *fib.Table) { t.DeleteNextHop(id) })
			continue
		}
		if r.Err != nil || len(r.Answers) != 1 {
			continue
		}
		if n, err := rtnl.DecodeNextHop(r.Answers[0]); err == nil {
			f.locked(func(t *fib.Table) { t.SetNextHop(n) })
		}
	}
}

// match asks the kernel which route it uses for addr. What it announced before it answered is heard first: the answer may follow from
// that. Who announces all the time is asked a few times.
func (f *following) match(addr netip.Addr) (result rtnl.Result) {
	const times = 3
	for range times {
		heard := f.heard
		result = f.conn.Do(rtnl.MatchRoute(addr))[0]
		if f.hear(1 << 20); f.heard == heard {
			break
		}
	}
	return result
}

// ask puts a question about a prefix, and the answer into the table.
func (f *following) ask(p netip.Prefix) {
	var after netip.Prefix
	for try := range settleTries {
		var addr netip.Addr
		ok := false
		f.locked(func(t *fib.Table) { addr, ok = t.Probe(p, after) })
		if !ok {
			return
		}
		result := f.match(addr)
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
