package overlay

import (
	"maps"
	"net/netip"
	"runtime"
	"testing"
)

func viaRoute(prefix string, metric, table int, noInstall bool, gateways ...string) Route {
	r := routeTo(prefix, gateways...)
	r.Metric, r.Table, r.NoInstall = metric, table, noInstall
	return r
}

func TestStaticLayerOfConfig(t *testing.T) {
	c := Config{
		Networks: prefixes("10.0.0.1/24", "fd00::1/64", "10.9.0.1/32"),
		Routes: []Route{
			viaRoute("10.1.0.0/16", 20, 0, false, "10.0.0.2"), // the better comes first here,
			viaRoute("10.1.0.0/16", 30, 0, false, "10.0.0.3"),
			viaRoute("10.2.0.0/16", 30, 0, false, "10.0.0.3"), // and last here
			viaRoute("10.2.0.0/16", 20, 0, true, "10.0.0.2"),
			viaRoute("10.3.0.0/16", 20, 0, false, "10.0.0.2"),
			viaRoute("10.3.0.0/16", 20, 7, true, "10.0.0.2"), // steer-only beside an equal that is installed
			viaRoute("10.0.0.0/24", 1, 0, false, "10.0.0.2"), // behind the connected route,
			viaRoute("fd00::/64", 255, 0, false, "fd00::2"),  // before it
			viaRoute("fd01::/64", 0, 0, false, "fd00::2"),
		},
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	var pool gatewayPool
	say := func(metric uint32, steerOnly bool, gateways ...string) offer {
		return offer{gateways: pool.intern(via(gateways...)), metric: metric, steerOnly: steerOnly}
	}
	want := map[netip.Prefix]offer{
		netip.MustParsePrefix("10.1.0.0/16"): say(20, false, "10.0.0.2"),
		netip.MustParsePrefix("10.2.0.0/16"): say(20, true, "10.0.0.2"),
		netip.MustParsePrefix("10.3.0.0/16"): say(20, true, "10.0.0.2"),
		netip.MustParsePrefix("10.0.0.0/24"): say(0, false),
		netip.MustParsePrefix("10.9.0.1/32"): say(0, false),
		netip.MustParsePrefix("fd00::/64"):   say(255, false, "fd00::2"),
		netip.MustParsePrefix("fd01::/64"):   say(defaultMetricIPv6, false, "fd00::2"),
	}
	if got := maps.Collect(staticLayer(&c, &pool).All()); !maps.Equal(got, want) {
		t.Errorf("the static layer is %v\nwant %v", got, want)
	}
	only := map[netip.Prefix]bool{netip.MustParsePrefix("10.2.0.0/16"): true, netip.MustParsePrefix("10.0.0.0/24"): true}
	maps.DeleteFunc(want, func(p netip.Prefix, _ offer) bool { return !only[p] })
	if got := offersFor(&c, &pool, only); !maps.Equal(got, want) {
		t.Errorf("of %v the Config says %v\nwant %v", only, got, want)
	}
}

// treeHolds checks the static routes of a core against what a Config alone would publish, and others'.
func treeHolds(t *testing.T, step string, c *core, want *Config, also ...netip.Prefix) {
	t.Helper()
	all := make(map[netip.Prefix]Gateways)
	for p, o := range staticLayer(want, &c.tree.pool).All() {
		all[p] = o.gateways
	}
	for _, p := range also {
		all[p], _ = c.tree.current.Load().get(p)
	}
	if got := maps.Collect(c.tree.current.Load().all()); !maps.Equal(got, all) {
		t.Errorf("%s: the tree holds %v\nwant %v", step, got, all)
	}
}

// TestTouchedPrefixes goes the way of a Reload: learn before the kernel, forget after it, or revert.
func TestTouchedPrefixes(t *testing.T) {
	networks := prefixes("10.0.0.1/24")
	old := Config{Networks: networks, Routes: []Route{
		routeTo("10.1.0.0/16", "10.0.0.2"), routeTo("10.2.0.0/16", "10.0.0.2"), routeTo("10.3.0.0/16", "10.0.0.2"),
	}}
	next := Config{Networks: prefixes("10.0.0.1/24", "fd00::1/64"), Routes: []Route{
		routeTo("10.1.0.0/16", "10.0.0.2"), routeTo("10.2.0.0/16", "10.0.0.3"), routeTo("10.4.0.0/16", "10.0.0.2"),
	}}
	touched := make(map[netip.Prefix]bool)
	for _, p := range prefixes("10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "fd00::/64") {
		touched[p] = true
	}
	gone := netip.MustParsePrefix("10.3.0.0/16")
	for _, revert := range []bool{false, true} {
		var c core
		c.publish(&old)
		forget := c.learn(&next, touched)
		treeHolds(t, "learnt", &c, &next, gone)
		if got, ok := c.tree.lookup(gone.Addr()); !ok || got.String() != "10.0.0.2" {
			t.Errorf("%v goes through %v, %t while the kernel changes, want its old gateway", gone, got, ok)
		}
		last := &next
		if revert {
			last = &old
		}
		if revert {
			c.publishTouched(&old, touched)
		} else {
			c.tree.changeLayer(staticRoutes, forget)
		}
		treeHolds(t, "settled", &c, last)
		if c.tree.published != 3 {
			t.Errorf("it took %d publications, want 3", c.tree.published)
		}
		before := c.tree.current.Load()
		c.publish(last)
		if c.tree.current.Load() != before {
			t.Error("publishing the same Config as a whole changed the tree")
		}
	}
}

func TestPublishTouchedKeepsOld(t *testing.T) {
	old := Config{Routes: []Route{routeTo("10.1.0.0/16"), routeTo("10.2.0.0/16")}}
	next := Config{Networks: prefixes("10.0.0.1/24"), Routes: []Route{routeTo("10.1.0.0/16", "10.0.0.2")}}
	var c core
	c.publish(&old)
	learned := change{prefix: netip.MustParsePrefix("10.5.0.0/16")}
	c.tree.changeLayer(learnedRoutes, []change{learned})
	changes := changedRoutes(old.Routes, next.Routes)
	c.learn(&next, changes.touched(&old, &next))
	treeHolds(t, "both", &c, &next, netip.MustParsePrefix("10.2.0.0/16"), learned.prefix)
	c.publish(&next)
	treeHolds(t, "next", &c, &next, learned.prefix)
}

func TestTreeTakesWhatIsNoPrefix(t *testing.T) {
	var tree routeTree
	tree.changeLayer(learnedRoutes, []change{{}, {gone: true}, {prefix: netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 99)}})
	tree.changeLayer(learnedRoutes, []change{{prefix: netip.MustParsePrefix("10.1.2.3/16")}}) // host bits
	for _, addr := range []netip.Addr{{}, netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("10.2.0.0")} {
		if got, ok := tree.lookup(addr); ok {
			t.Errorf("lookup of %v = %v, want none", addr, got)
		}
	}
	if _, ok := tree.lookup(netip.MustParseAddr("10.1.0.0")); !ok || tree.published != 1 {
		t.Errorf("route: %t after %d publications, want one after 1", ok, tree.published)
	}
}

func TestTreeLookupAllocatesNothing(t *testing.T) {
	var c core
	c.tree.changeLayer(learnedRoutes, routesAt(10_000, offer{gateways: c.tree.pool.intern(via("10.0.0.2", "10.0.0.3"))}))
	for _, dst := range []netip.Addr{
		netip.MustParseAddr("10.0.5.1"), netip.MustParseAddr("11.0.0.1"), netip.MustParseAddr("fd00:0:0:5::1"), netip.MustParseAddr("fe80::1%lo"), {},
	} {
		if n := testing.AllocsPerRun(100, func() { c.RoutesFor(dst) }); n != 0 {
			t.Errorf("lookup of %v allocates %v times", dst, n)
		}
	}
}

// TestTreeChangeCostIsIndependentOfSize compares what one change allocates: what is copied is what takes time.
func TestTreeChangeCostIsIndependentOfSize(t *testing.T) {
	cost := func(n int) (least uint64) {
		var tree routeTree
		tree.changeLayer(learnedRoutes, routesAt(n, offer{metric: 1}))
		vias := []Gateways{tree.pool.intern(via("10.0.0.2")), {}}
		least = 1 << 62
		for i := range 20 { // others allocate too, at times
			changes := []change{
				{prefix: netip.MustParsePrefix("10.0.7.0/24"), offer: offer{gateways: vias[i%2]}},
				{prefix: netip.MustParsePrefix("fd00:0:7::/48"), offer: offer{gateways: vias[i%2]}},
				{prefix: netip.MustParsePrefix("10.0.8.0/24"), gone: i%2 == 0, offer: offer{}},
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			tree.changeLayer(learnedRoutes, changes)
			runtime.ReadMemStats(&after)
			least = min(least, after.TotalAlloc-before.TotalAlloc)
		}
		return least
	}
	small, large := cost(4_000), cost(200_000)
	t.Logf("three changes allocate %d bytes at 4,000 routes, %d at 200,000", small, large)
	if large > 3*small || large > 100_000 { // nodes are wider, up to 256 children, and as deep
		t.Errorf("three changes allocate %d bytes at 200,000 routes, %d at 4,000", large, small)
	}
}
