package fib

import (
	"cmp"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
)

// Step is one look into a table.
type Step struct {
	Table     uint32
	Suppress  int16        // a match of this length or shorter does not count there; -1: all count
	To        netip.Prefix // of these destinations only; not valid: of all
	Selective bool         // done for some packets only, of these destinations: a probe does not tell what is in the table
}

// Order returns in which order a family's rules look at the configured tables for packets of TOS 0 without mark, source and
// interface. What rules for other packets look at comes last: whoever configures its table means those packets, and the kernel's
// answer for these comes first. Of several rules for one table the first counts, and a later one that counts more of it.
func Order(rules []kernel.Rule, is6 bool, tables []uint32) []Step {
	rules = slices.DeleteFunc(slices.Clone(rules), func(r kernel.Rule) bool { return r.IPv6 != is6 })
	slices.SortStableFunc(rules, func(a, b kernel.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	var steps, beside []Step
	for i := 0; i < len(rules); i++ {
		r := &rules[i]
		step := Step{r.Table, max(r.Suppress, -1), r.To, r.Beside || r.Selective && !r.To.IsValid()}
		switch {
		case r.Goto != 0 && !r.Selective:
			if to := slices.IndexFunc(rules, func(t kernel.Rule) bool { return t.Priority == r.Goto }); to > i {
				i = to - 1
			}
		case !r.Lookup || !slices.Contains(tables, r.Table):
		case r.Beside:
			beside = append(beside, step)
		default:
			steps = append(steps, step)
		}
	}
	var order []Step
	for _, step := range append(steps, beside...) {
		again := slices.ContainsFunc(order, func(s Step) bool {
			return s.Table == step.Table && s.Suppress <= step.Suppress && (!s.To.IsValid() || s.To == step.To)
		})
		if !again {
			order = append(order, step)
		}
	}
	return order
}
