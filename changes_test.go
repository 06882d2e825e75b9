package overlay

import (
	"net/netip"
	"slices"
	"testing"
)

// What changedRoutes returns leads from one Config to the other, and no route that both have is in it, wherever it stands: of random
// valid Configs, and of those in which Metric 0 and 1024 are two routes, because the prefix is a network's.
func TestChangedRoutes(t *testing.T) {
	own := netip.MustParsePrefix("fd42::/64")
	x, y := routeTo("10.8.0.0/16"), routeTo("10.9.0.0/16")
	check := func(old, next []Route) {
		t.Helper()
		has := func(list []*Route, r *Route) bool { return slices.ContainsFunc(list, r.equal) }
		among := func(list []Route, r *Route) bool {
			return slices.ContainsFunc(list, func(o Route) bool { return r.equal(&o) })
		}
		c := changedRoutes(old, next)
		for i := range old {
			if r := &old[i]; has(c.gone, r) == among(next, r) {
				t.Errorf("%+v\nto %+v: %+v is wrong about going", old, next, *r)
			}
		}
		for i := range next {
			if r := &next[i]; has(c.come, r) == among(old, r) {
				t.Errorf("%+v\nto %+v: %+v is wrong about coming", old, next, *r)
			}
		}
	}
	stays := Route{Prefix: own, MTU: 1280}
	check([]Route{{Prefix: own, Metric: 1024}, stays}, []Route{x, stays, y})
	check([]Route{x, stays, y}, []Route{{Prefix: own, Metric: 1024}, stays})
	for seed := range uint64(300) {
		w := newWorld(seed)
		old, next := w.config(), w.config()
		for _, r := range old.Routes { // some stay, elsewhere
			mixed := Config{Networks: old.Networks, Routes: append(slices.Clone(next.Routes), r)}
			if w.IntN(2) == 0 && mixed.Validate() == nil {
				next = mixed
			}
		}
		check(old.Routes, next.Routes)
	}
}
