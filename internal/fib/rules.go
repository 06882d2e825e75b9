package fib

import (
	"cmp"
	"slices"

	"example.com/overlay/internal/kernel"
)

// Step is one look into a table.
type Step struct {
	Table     uint32
	Suppress  int16 // a match of this length or shorter does not count there; -1: all count
	Selective bool  // done for some packets only: a probe does not tell what is in the table
}

// Order returns in which order a family's rules look at the configured tables. A rule that is for some packets only, by
// their mark for instance, counts as if it were for all: whoever configures its table means those packets. Of several rules for
// one table the first counts, and a later one that counts more of it.
func Order(rules []kernel.Rule, is6 bool, tables []uint32) []Step {
	rules = slices.Clone(rules)
	slices.SortStableFunc(rules, func(a, b kernel.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	var steps []Step
	for _, r := range rules {
		if r.IPv6 != is6 || !r.Lookup || !slices.Contains(tables, r.Table) {
			continue
		}
		step := Step{r.Table, max(r.Suppress, -1), r.Selective}
		again := slices.ContainsFunc(steps, func(s Step) bool { return s.Table == step.Table && s.Suppress <= step.Suppress })
		if !again {
			steps = append(steps, step)
		}
	}
	return steps
}
