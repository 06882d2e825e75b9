package fib

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// model is a kernel in memory, as plain as can be: for each table and prefix a list, searched from its start. IPv6 legs are
// entries of their own, as in the kernel. It announces what the kernel announces.
type model struct {
	chains   map[place][]held
	nextHops map[uint32]kernel.NextHop
	compat   bool // nexthop_compat_mode
	told     func(kernel.Change, kernel.FIBRoute)
	toldNext func(n kernel.NextHop, deleted bool)
}

type place struct {
	prefix netip.Prefix
	table  uint32
}

// held is a kernel.FIBRoute with, in IPv6, at most one leg.
type held struct{ kernel.FIBRoute }

// places returns where there are routes, always in the same order: a seed reproduces a run.
func (m *model) places() []place {
	return slices.SortedFunc(maps.Keys(m.chains), func(a, b place) int {
		return cmp.Or(a.prefix.Compare(b.prefix), cmp.Compare(a.table, b.table))
	})
}

type op uint8

const (
	opCreate op = iota
	opPrepend
	opAppend
	opReplace
)

func newModel() *model {
	return &model{chains: make(map[place][]held), nextHops: make(map[uint32]kernel.NextHop), compat: true}
}

func identity(r kernel.FIBRoute) string {
	legs := ""
	if r.NextHop == 0 {
		for _, leg := range r.Legs {
			legs += fmt.Sprint(leg.Gateway, leg.Link, leg.Weight, ";")
		}
	}
	return fmt.Sprint(r.NextHop, r.Protocol, r.Type, r.Pref, legs, string(r.Detail))
}

func (h held) joins() bool { return joins(&h.FIBRoute) }

// message is what the kernel tells of the i-th of a chain: IPv6 tells of the whole multipath, beginning with that leg.
func (m *model) message(chain []held, i int) kernel.FIBRoute {
	r := chain[i].FIBRoute
	r.Legs = slices.Clone(r.Legs)
	if r.NextHop != 0 {
		r.Legs = nil
		if m.compat {
			r.Legs = m.legs(r)
		}
		return r
	}
	if !chain[i].joins() {
		return r
	}
	for n := 1; n < len(chain); n++ {
		if h := chain[(i+n)%len(chain)]; h.Metric == r.Metric && h.joins() {
			r.Legs = append(r.Legs, h.Legs...)
		}
	}
	return r
}

// legs resolves a route's nexthop object.
func (m *model) legs(r kernel.FIBRoute) []kernel.Leg {
	if r.NextHop == 0 {
		return r.Legs
	}
	n := m.nextHops[r.NextHop]
	if len(n.Group) == 0 {
		if n.Blackhole {
			return nil
		}
		return []kernel.Leg{n.Leg}
	}
	var legs []kernel.Leg
	for _, member := range n.Group {
		if single := m.nextHops[member.ID]; !single.Blackhole {
			leg := single.Leg
			leg.Weight = member.Weight
			legs = append(legs, leg)
		}
	}
	return legs
}

func (m *model) add(o op, r kernel.FIBRoute) error {
	if r.Prefix.Addr().Is6() {
		return m.add6(o, r)
	}
	at := place{r.Prefix, r.Table}
	chain := m.chains[at]
	lo := 0
	for lo < len(chain) && (chain[lo].TOS > r.TOS || chain[lo].TOS == r.TOS && chain[lo].Metric < r.Metric) {
		lo++
	}
	hi, same := lo, -1
	for hi < len(chain) && chain[hi].TOS == r.TOS && chain[hi].Metric == r.Metric {
		if same < 0 && identity(chain[hi].FIBRoute) == identity(r) {
			same = hi
		}
		hi++
	}
	change := kernel.Created
	switch {
	case lo == hi:
	case o == opCreate, same >= 0:
		return fmt.Errorf("exists")
	case o == opPrepend:
		change = kernel.Prepended
	case o == opAppend:
		lo, change = hi, kernel.Appended
	case o == opReplace:
		chain, change = slices.Delete(chain, lo, lo+1), kernel.Replaced
	}
	m.chains[at] = slices.Insert(chain, lo, held{r})
	m.told(change, m.message(m.chains[at], lo))
	return nil
}

func (m *model) add6(o op, r kernel.FIBRoute) error {
	at := place{r.Prefix, r.Table}
	pieces := []held{{r}}
	if r.NextHop == 0 && len(r.Legs) > 1 {
		pieces = nil
		for _, leg := range r.Legs {
			piece := r
			piece.Legs = []kernel.Leg{leg}
			pieces = append(pieces, held{piece})
		}
	}
	if o != opReplace && m.duplicate6(at, pieces) {
		return fmt.Errorf("exists")
	}
	change, index := kernel.Prepended, 0
	for i, h := range pieces {
		c, j, err := m.one6(o, at, h)
		if err != nil {
			return err
		}
		if i == 0 {
			change, index = c, j
			o = min(o, opAppend) // the rest joins
			if o == opCreate {
				o = opPrepend
			}
		}
	}
	if len(pieces) > 1 && change == kernel.Created {
		change = kernel.Prepended // no NLM_F_EXCL
	}
	m.told(change, m.message(m.chains[at], index))
	return nil
}

func (m *model) duplicate6(at place, pieces []held) bool {
	for _, h := range m.chains[at] {
		for _, p := range pieces {
			if h.Metric == p.Metric && duplicateLeg(h, p) {
				return true
			}
		}
	}
	return false
}

func duplicateLeg(a, b held) bool {
	if a.NextHop != 0 || b.NextHop != 0 {
		return a.NextHop == b.NextHop
	}
	la, lb := kernel.Leg{Link: 1}, kernel.Leg{Link: 1}
	if len(a.Legs) > 0 {
		la = a.Legs[0]
	}
	if len(b.Legs) > 0 {
		lb = b.Legs[0]
	}
	return la.Link == lb.Link && la.Gateway == lb.Gateway
}

// one6 puts one leg in and returns where it stands.
func (m *model) one6(o op, at place, h held) (change kernel.Change, index int, err error) {
	chain := m.chains[at]
	lo := 0
	for lo < len(chain) && chain[lo].Metric < h.Metric {
		lo++
	}
	hi, first := lo, -1
	for hi < len(chain) && chain[hi].Metric == h.Metric {
		if first < 0 && chain[hi].joins() == h.joins() {
			first = hi
		}
		hi++
	}
	switch {
	case lo == hi:
		m.chains[at] = slices.Insert(chain, lo, h)
		return kernel.Created, lo, nil
	case o == opCreate:
		return 0, 0, fmt.Errorf("exists")
	case o != opReplace:
		m.chains[at] = slices.Insert(chain, hi, h)
		if o == opAppend {
			return kernel.Appended, hi, nil
		}
		return kernel.Prepended, hi, nil
	}
	if first < 0 {
		first = lo
	}
	// A multipath goes with all its legs, whatever takes its place.
	joined := chain[first].joins()
	rest := append(slices.Clone(chain[:first]), h)
	for _, x := range chain[first+1:] {
		if !joined || x.Metric != h.Metric || !x.joins() {
			rest = append(rest, x)
		}
	}
	m.chains[at] = rest
	return kernel.Replaced, first, nil
}

// delete takes the i-th of a chain out; IPv6: with the whole multipath if all.
func (m *model) delete(at place, i int, all bool) {
	chain := m.chains[at]
	h := chain[i]
	told := m.message(chain, i)
	if h.joins() && !all {
		told.Legs = h.Legs
	}
	rest := slices.Clone(chain[:i])
	for _, x := range chain[i+1:] {
		if !(all && h.joins() && x.joins() && x.Metric == h.Metric) {
			rest = append(rest, x)
		}
	}
	if all && h.joins() {
		rest = slices.DeleteFunc(rest, func(x held) bool { return x.joins() && x.Metric == h.Metric })
	}
	if m.chains[at] = rest; len(rest) == 0 {
		delete(m.chains, at)
	}
	m.told(kernel.Deleted, told)
}

// setNextHop makes or changes a nexthop object.
func (m *model) setNextHop(n kernel.NextHop) {
	_, changed := m.nextHops[n.ID]
	m.nextHops[n.ID] = n
	m.toldNext(n, false)
	if !changed || !m.compat {
		return
	}
	for _, at := range m.places() {
		chain := m.chains[at]
		for i, h := range chain {
			if h.NextHop != 0 && (h.NextHop == n.ID || m.hasMember(h.NextHop, n.ID)) {
				m.told(kernel.Replaced, m.message(chain, i))
			}
		}
	}
}

func (m *model) hasMember(group, id uint32) bool {
	return slices.ContainsFunc(m.nextHops[group].Group, func(leg kernel.NextHopLeg) bool { return leg.ID == id })
}

// deleteNextHop takes its routes with it: IPv4's untold, IPv6's told in compat mode (kernel.md A14).
func (m *model) deleteNextHop(id uint32) {
	if _, ok := m.nextHops[id]; !ok {
		return
	}
	for _, at := range m.places() {
		chain := m.chains[at]
		for i := len(chain) - 1; i >= 0; i-- {
			if chain[i].NextHop != id {
				continue
			}
			told := m.message(chain, i)
			chain = slices.Delete(slices.Clone(chain), i, i+1)
			if m.chains[at] = chain; len(chain) == 0 {
				delete(m.chains, at)
			}
			if m.compat && at.prefix.Addr().Is6() {
				m.told(kernel.Deleted, told)
			}
		}
	}
	delete(m.nextHops, id)
	for _, group := range slices.Sorted(maps.Keys(m.nextHops)) {
		n, ok := m.nextHops[group]
		if !ok || !m.hasMember(group, id) {
			continue
		}
		n.Group = slices.DeleteFunc(slices.Clone(n.Group), func(leg kernel.NextHopLeg) bool { return leg.ID == id })
		if len(n.Group) == 0 {
			m.deleteNextHop(group)
		} else {
			m.setNextHop(n)
		}
	}
	m.toldNext(kernel.NextHop{ID: id}, true)
}

// dump yields what RTM_GETROUTE with NLM_F_DUMP would.
func (m *model) dump(is6 bool, yield func(kernel.FIBRoute)) {
	for _, at := range m.places() {
		chain := m.chains[at]
		if at.prefix.Addr().Is6() != is6 {
			continue
		}
		for i := 0; i < len(chain); i++ {
			yield(m.message(chain, i))
			if !chain[i].joins() {
				continue
			}
			last := i
			for j := i + 1; j < len(chain); j++ {
				if chain[j].joins() && chain[j].Metric == chain[i].Metric {
					last = j
				}
			}
			i = last // what stands between the legs is left out
		}
	}
}
