package fib

import (
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// Doubts returns the prefixes with routes that may be gone, stand elsewhere or be unknown, each once after something has changed there;
// all: also those that were returned before and still have such routes, because another may have hidden them. Each is to be asked
// about: an address of it (Probe) in a RTM_F_FIB_MATCH, the kernel's answer to Settle. What stays hidden stays doubtful until a quiet
// dump.
func (t *Table) Doubts(all bool) []netip.Prefix {
	seen := make(map[key]bool)
	var prefixes []netip.Prefix
	for k, ask := range t.doubts {
		if !ask && !all {
			continue
		}
		if _, veiled := t.veils.prefixes[k]; veiled || t.heads[k] != 0 {
			t.doubts[k] = false
		} else {
			delete(t.doubts, k)
		}
		k.table = 0
		if !seen[k] {
			seen[k] = true
			prefixes = append(prefixes, k.prefix())
		}
	}
	return prefixes
}

// Doubtful is the number of prefixes with doubtful routes, or to be asked about, counted by table.
func (t *Table) Doubtful() int { return len(t.doubts) }

// Probe returns an address of prefix by which to ask about it: one for which no longer prefix's route is known to answer. It begins behind
// after, if that is valid: a prefix that has turned out to cover the last address. False if there is none, or it is not found soon.
func (t *Table) Probe(prefix, after netip.Prefix) (netip.Addr, bool) {
	return probe(prefix, after, t.longest)
}

// longest returns the longest prefix around an address whose own routes answer.
func (t *Table) longest(addr netip.Addr) (netip.Prefix, bool) {
	t.freshen()
	for bits := addr.BitLen(); bits >= 0; bits-- {
		p, _ := addr.Prefix(bits)
		if a := t.answer(keyOf(p, 0)); a.Kind != Absent && !a.shorter {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func probe(prefix, after netip.Prefix, longest func(netip.Addr) (netip.Prefix, bool)) (netip.Addr, bool) {
	const tries = 64
	addr := prefix.Masked().Addr()
	if !prefix.IsSingleIP() {
		addr = addr.Next() // the first may be an anycast address of our own
	}
	if after.IsValid() {
		addr = kernel.Behind(after)
	}
	for range tries {
		if !addr.IsValid() || !prefix.Contains(addr) {
			return netip.Addr{}, false
		}
		q, ok := longest(addr)
		if !ok || q.Bits() <= prefix.Bits() {
			return addr, true
		}
		addr = kernel.Behind(q)
	}
	return netip.Addr{}, false
}

// Unanswered returns what to begin behind, as Settle does, after the kernel has answered for addr with another error than
// ENETUNREACH: a longer prefix leads nowhere, but the kernel does not tell how long it is. try counts from 0.
func (t *Table) Unanswered(prefix netip.Prefix, addr netip.Addr, try int) netip.Prefix {
	t.untold[keyOf(prefix, 0)] = struct{}{}
	bits := addr.BitLen()
	if try > 0 {
		bits = min(prefix.Bits()+1, bits)
	}
	p, _ := addr.Prefix(bits)
	return p
}

// Settle takes the kernel's answer for addr, an address of a doubtful prefix; got is nil where it knows no route (ENETUNREACH;
// of other errors nothing follows: Unanswered). The answer must be no older than the announcements that were applied. If a
// longer prefix hides this one, or may, it returns that: then ask by another address, beginning behind it.
func (t *Table) Settle(prefix netip.Prefix, addr netip.Addr, got *kernel.FIBRoute) (hidden netip.Prefix) {
	if hidden = t.settle(prefix, addr, got); !hidden.IsValid() {
		hidden = t.elsewhere(prefix, addr, got)
	}
	return hidden
}

// elsewhere returns what to begin behind so as to ask about the tables that were not looked at for addr because of a rule for some
// destinations: of the prefix only they are looked up there, or all others.
func (t *Table) elsewhere(prefix netip.Prefix, addr netip.Addr, got *kernel.FIBRoute) netip.Prefix {
	for _, step := range t.order[familyIndex(addr.Is6())] {
		if !step.To.IsValid() || step.To.Bits() <= prefix.Bits() || !prefix.Contains(step.To.Addr()) {
			continue
		}
		within, beside := t.inDoubt(prefix, step.Table)
		switch inside := step.To.Contains(addr); {
		case inside && beside && got != nil && got.Table == step.Table:
			return step.To
		case within && addr.Less(step.To.Addr()):
			return netip.PrefixFrom(step.To.Addr().Prev(), addr.BitLen())
		case within && !inside:
			t.untold[keyOf(prefix, 0)] = struct{}{} // Probe has passed over them
		}
	}
	return netip.Prefix{}
}

// inDoubt says whether there is something to ask about a prefix in a table, and in the others.
func (t *Table) inDoubt(prefix netip.Prefix, table uint32) (within, beside bool) {
	for index := range t.cfg.Tables {
		if _, doubtful := t.doubts[keyOf(prefix, uint16(index))]; doubtful {
			within = within || t.cfg.Tables[index] == table
			beside = beside || t.cfg.Tables[index] != table
		}
	}
	return within, beside
}

func (t *Table) settle(prefix netip.Prefix, addr netip.Addr, got *kernel.FIBRoute) (hidden netip.Prefix) {
	k := keyOf(prefix, 0)
	if got != nil && (got.Prefix.Addr().Is6() != k.is6 || !got.Prefix.IsValid()) {
		return hidden
	}
	if certain := t.certain(prefix, got, addr); k.is6 && !certain && (got == nil && len(t.nextHops) > 0 || got != nil && got.NextHop != 0) {
		// IPv6 routes through one nexthop object share its cached entries, which tell of the route that was used first
		// (net/ipv6/route.c, rt6_get_pcpu_route): prefix, table, metric, even the group are not those of the match. When
		// that route is gone the kernel answers ENETUNREACH, and goes on to forward.
		hidden, _ = addr.Prefix(addr.BitLen())
		if got != nil && got.Prefix.Bits() > prefix.Bits() && got.Prefix.Contains(addr) {
			hidden = got.Prefix
		}
		t.untold[k] = struct{}{}
		t.resync = t.needDump(k) || t.resync
		if got != nil && t.allKnown(got.NextHop) && looksAt(t.order[familyIndex(true)], got.Table) {
			t.clearBefore(addr, got.NextHop)
		}
		return hidden
	}
	longer := got != nil && got.Prefix.Bits() > prefix.Bits()
	if longer {
		hidden = got.Prefix
		t.untold[k] = struct{}{}
	}
	order := t.order[k.family()]
	if got != nil && !looksAt(order, got.Table) {
		return hidden // it is not known which tables come before that
	}
	for _, step := range order {
		if step.To.IsValid() && !step.To.Contains(addr) {
			continue
		}
		k.table = t.tables[step.Table]
		here := got != nil && got.Table == step.Table && int16(got.Prefix.Bits()) > step.Suppress
		if step.Selective || int16(k.bits) <= step.Suppress {
			if here {
				return hidden
			}
			continue
		}
		q, thrown := t.thrown(k.table, prefix, addr)
		e := t.open(k)
		switch {
		case here && longer:
			return hidden
		case here && got.Prefix.Bits() == prefix.Bits():
			e.found(got)
		case !thrown:
			e.absent(0, len(e.chain))
			if len(e.chain) == 0 {
				delete(t.veils.prefixes, k) // what nothing answers for hides nothing
			}
		case q == prefix:
			e.passed()
		case !longer:
			hidden = q // of this table the answer tells nothing: for another address it may
			t.untold[k] = struct{}{}
		}
		e.rest()
		if here {
			if t.throws > 0 {
				t.untold[keyOf(prefix, 0)] = struct{}{} // elsewhere the later tables may answer
			}
			return hidden
		}
	}
	return hidden
}

// certain says whether an IPv6 answer through a nexthop object is about the route that it names. That one is there, or the kernel would
// answer ENETUNREACH; it is the match if of all known routes around addr, as far as the look-up comes, no other leads through the
// object, or through a group that shares a leg with it. No route that is not known may do so. And where a dump may hide routes it is
// taken for what was hidden.
func (t *Table) certain(prefix netip.Prefix, got *kernel.FIBRoute, addr netip.Addr) bool {
	if got == nil || got.NextHop == 0 || !addr.Is6() || !t.allKnown(got.NextHop) {
		return false
	}
	if index, ok := t.tables[got.Table]; ok && got.Prefix == prefix {
		if _, veiled := t.veils.prefixes[keyOf(prefix, index)]; veiled {
			return true
		}
	}
	routes := t.through(addr, got.NextHop)
	if len(routes) != 1 {
		return false
	}
	r := &routes[0]
	return r.prefix() == got.Prefix && t.cfg.Tables[r.table] == got.Table && r.metric == got.Metric && t.shapes.all[r.shape].route.NextHop == got.NextHop
}

// placed is a route by its place.
type placed struct {
	key
	metric, shape uint32
	unsure        bool // the look-up may have gone past it: another route throws, or the rule is for other packets
}

// through lists, as far as they are known, the routes around addr that an answer through a nexthop object can be about, in the order of
// the look-up: those that lead through the object, or through a group that shares a leg with it. What certainly answers ends it, unless
// a route throws before: then it may go on with the next table.
func (t *Table) through(addr netip.Addr, id uint32) (routes []placed) {
	throws := false
	for _, step := range t.order[familyIndex(addr.Is6())] {
		if step.To.IsValid() && !step.To.Contains(addr) {
			continue
		}
		for bits := addr.BitLen(); bits > int(step.Suppress); bits-- {
			p, _ := addr.Prefix(bits)
			e := t.open(keyOf(p, t.tables[step.Table]))
			end := false
			throws = throws || slices.ContainsFunc(e.chain, func(c entry) bool { return t.shapes.all[c.shape].throw })
			for i, c := range e.chain {
				if end && c.metric != e.chain[i-1].metric {
					break
				}
				sh := e.shape(i)
				if via := sh.route.NextHop; via != 0 && t.share(via, id) {
					routes = append(routes, placed{e.key, c.metric, c.shape, throws || step.Selective})
				}
				end = end || c.state&doubtful == 0 && sh.kind != Absent && !step.Selective && !throws
			}
			if end {
				return routes
			}
		}
	}
	return routes
}

// clearBefore takes an answer through a nexthop object that may be about any of several routes: what the kernel would prefer to the first
// of them, wherever it stands, is gone if it was doubtful.
func (t *Table) clearBefore(addr netip.Addr, id uint32) {
	routes := t.through(addr, id)
	if len(routes) == 0 || routes[0].unsure {
		return
	}
	first := routes[0]
	e := t.open(first.key)
	for _, r := range routes[1:] { // the first of a chain may not be the one that its metric's preference puts first
		if r.key == first.key && r.metric == first.metric && rank(t.shapes.all[r.shape].route.Pref) > rank(t.shapes.all[first.shape].route.Pref) {
			first = r
		}
	}
	lo, hi := e.group(first.metric)
	e.clearPreferred(e.find(lo, hi, first.shape))
	e.close()
}

// matters says whether the answer for a prefix is itself doubtful.
func (t *Table) matters(k key) bool {
	for table := range t.cfg.Tables {
		k.table = uint16(table)
		e := t.open(k)
		if i := e.first(); i >= 0 && e.chain[i].state&doubtful != 0 {
			return true
		}
	}
	return false
}

// first returns which route of a chain the kernel's look-up ends at, negative if at none.
func (e *edit) first() int {
	first := -1
	for i := range e.chain {
		switch {
		case first >= 0 && e.chain[i].metric != e.chain[first].metric:
			return first
		case e.answers(i) && (first < 0 || e.preferred(i, first)):
			first = i
		}
	}
	return first
}

// preferred says whether the kernel takes the route at i rather than the one at j wherever the two stand in their metric.
func (e *edit) preferred(i, j int) bool {
	return e.key.is6 && rank(e.shape(i).route.Pref) > rank(e.shape(j).route.Pref)
}

// thrown returns which prefix, not shorter than the given one, throws for addr in a table.
func (t *Table) thrown(table uint16, prefix netip.Prefix, addr netip.Addr) (netip.Prefix, bool) {
	if t.throws == 0 {
		return netip.Prefix{}, false
	}
	for bits := addr.BitLen(); bits >= prefix.Bits(); bits-- {
		p, err := addr.Prefix(bits)
		if err != nil {
			break
		}
		for i := t.heads[keyOf(p, table)]; i != 0; i = t.entries.at(i).next {
			if t.shapes.all[t.entries.at(i).shape].throw {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

func looksAt(order []Step, table uint32) bool {
	for _, step := range order {
		if step.Table == table {
			return true
		}
	}
	return false
}

// answers says whether the kernel's look-up ends at the route at i: it passes over the dead.
func (e *edit) answers(i int) bool { return e.shape(i).kind != Absent || e.shape(i).throw }

// absent removes the doubtful routes of a range that the kernel would have answered with.
func (e *edit) absent(lo, hi int) {
	for i := hi - 1; i >= lo; i-- {
		if e.chain[i].state&doubtful != 0 && e.answers(i) {
			e.remove(i)
		}
	}
}

// found takes the route with which the kernel answers for the prefix: it stands before all others that are in use.
func (e *edit) found(got *kernel.FIBRoute) {
	before, _ := e.group(got.Metric)
	e.absent(0, before)
	lo, hi := e.group(got.Metric)
	n, mine := e.admit(lo, hi, got, false)
	defer e.t.leave(n.shape)
	if !mine {
		for i := hi - 1; i >= lo; i-- {
			if e.key.is6 && rank(e.shape(i).route.Pref) > rank(got.Pref) {
				e.absent(i, i+1)
			}
		}
		if lo, hi = e.group(got.Metric); lo < hi && e.chain[lo].before == 0 {
			e.chain[lo].before, e.chain[lo].state = 1, e.chain[lo].state|moreBefore
		}
		if !e.key.is6 { // of which a dump shows all
			e.t.untold[keyOf(e.key.prefix(), 0)] = struct{}{}
		}
		return
	}
	at := e.find(lo, hi, n.shape)
	if j := e.joined(lo, hi); j >= 0 && e.shapeJoins(n.shape) {
		at = j
	}
	if at < 0 {
		at, n.state = lo, moreBefore
		e.insert(lo, n)
	}
	if e.chain[at].shape != n.shape {
		e.swap(at, n.shape)
	}
	if e.chain[at].state&doubtful != 0 {
		e.changed = true
	}
	e.settle(at)
	e.uncount(at) // who stood before it would answer, but for the dead
	e.lead(at)
}

// passed notes that the kernel has gone past the table: a route that throws stands before all others that are in use, or
// nothing is there.
func (e *edit) passed() {
	at := -1
	for i := range e.chain {
		switch {
		case !e.shape(i).throw:
		case at < 0, e.chain[i].metric == e.chain[at].metric && e.preferred(i, at):
			at = i
		}
	}
	if at >= 0 {
		e.lead(at)
	}
}

// clearPreferred removes the doubtful routes that the kernel would prefer to the one at a place, wherever they stand, and returns its
// place then.
func (e *edit) clearPreferred(at int) int {
	for i := len(e.chain) - 1; i >= 0; i-- {
		c, than := &e.chain[i], &e.chain[at]
		preferred := c.metric < than.metric || c.metric == than.metric && e.preferred(i, at)
		if i != at && preferred && c.state&doubtful != 0 && e.answers(i) {
			e.remove(i)
			at -= btoi(i < at)
		}
	}
	return at
}

// lead puts the route at a place before all of its metric that are in use: the kernel answers with it. What it seemed to stand behind is
// doubtful.
func (e *edit) lead(at int) {
	at = e.clearPreferred(at)
	lo, _ := e.group(e.chain[at].metric)
	for i := lo; i < at; i++ {
		if e.answers(i) && !e.preferred(at, i) {
			c := e.chain[at]
			copy(e.chain[i+1:at+1], e.chain[i:at])
			e.chain[i] = c
			e.doubt(i+1, at+1)
			return
		}
	}
}

// rest writes the chain back; what is still doubtful has been asked about.
func (e *edit) rest() {
	if e.t.doubts[e.key] {
		e.t.doubts[e.key] = false
	}
	e.close()
	if _, ok := e.t.doubts[e.key]; ok {
		e.t.doubts[e.key] = false
	}
}
