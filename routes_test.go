package overlay

import (
	"net/netip"
	"slices"
	"testing"

	"example.com/overlay/internal/kernel"
)

func describeRoutes(routes []kernel.Route) (lines []string) {
	for _, r := range routes {
		line := routeText(r)
		if r.Source.IsValid() {
			line += " src " + r.Source.String()
		}
		lines = append(lines, line)
	}
	return lines
}

// What a Config asks of the kernel: one connected route a network, then the installed Routes (kernel.md V21, V28, B8).
func TestDesire(t *testing.T) {
	p := netip.MustParsePrefix
	for _, test := range []struct {
		name string
		cfg  Config
		mtu  int
		ipv6 bool
		want []string
	}{
		{"nothing", Config{}, 1300, false, nil},
		{
			"networks",
			Config{Networks: prefixes("10.1.0.7/24", "10.1.0.8/24", "10.2.0.1/32", "fd01::7/64", "fd01::8/64", "fd02::1/128")},
			1300, true,
			[]string{"10.1.0.0/24 metric 0 table 254 mtu 1300 proto 111 src 10.1.0.7", "fd01::/64 metric 256 table 254 mtu 1300 proto 111"},
		},
		{
			"routes",
			Config{MTU: 1000, Protocol: 99, Routes: []Route{
				{Prefix: p("10.9.0.0/16"), MTU: 1400}, {Prefix: p("10.8.0.0/16"), NoInstall: true, MTU: 1500}, {Prefix: p("10.7.0.0/16"), Table: 100, Metric: 7},
			}},
			1500, false,
			[]string{"10.9.0.0/16 metric 0 table 254 mtu 1400 proto 99", "10.7.0.0/16 metric 7 table 100 mtu 1000 proto 99"},
		},
		{
			"a network's own",
			Config{Networks: prefixes("10.1.0.7/24", "fd01::7/64"), Routes: []Route{
				{Prefix: p("10.1.0.0/24"), MTU: 1400}, {Prefix: p("fd01::/64"), MTU: 1350}, {Prefix: p("fd01::/64"), Metric: 1024},
			}},
			1400, true,
			[]string{
				"10.1.0.0/24 metric 0 table 254 mtu 1400 proto 111 src 10.1.0.7", "fd01::/64 metric 256 table 254 mtu 1350 proto 111",
				"fd01::/64 metric 1024 table 254 mtu 1300 proto 111",
			},
		},
		{"a network's own in another table", Config{Networks: prefixes("fd01::7/64"), Routes: []Route{{Prefix: p("fd01::/64"), Table: 100}}}, 1300, true, []string{
			"fd01::/64 metric 256 table 254 mtu 1300 proto 111", "fd01::/64 metric 1024 table 100 mtu 1300 proto 111",
		}},
		{"not installed", Config{Networks: prefixes("10.1.0.7/24"), Routes: []Route{{Prefix: p("10.1.0.0/24"), NoInstall: true}, {Prefix: p("fd09::/64"), NoInstall: true}}}, 1300, false, nil},
		{"the largest", Config{MTU: 65535, Routes: []Route{{Prefix: p("10.9.0.0/16")}}}, 65535, false, []string{"10.9.0.0/16 metric 0 table 254 mtu 65520 proto 111"}},
	} {
		if err := test.cfg.Validate(); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		d := desire(&test.cfg, 7)
		if got := describeRoutes(d.routes); !slices.Equal(got, test.want) || d.mtu != test.mtu || d.ipv6 != test.ipv6 || d.txQueueLen != 500 {
			t.Errorf("%s: MTU %d, IPv6 %v, queue length %d, routes %q; want %d, %v, 500, %q", test.name, d.mtu, d.ipv6, d.txQueueLen, got, test.mtu, test.ipv6, test.want)
		}
		for _, r := range d.routes {
			if r.Link != 7 || !r.Plain || int(r.MSS) != segmentSize(r.Prefix, int(r.MTU)) {
				t.Errorf("%s: %+v", test.name, r)
			}
		}
	}
}

// A Route for a network's own prefix is the network's: it has no gateway, and is not given twice.
func TestRouteForNetworkIsRefused(t *testing.T) {
	for _, routes := range [][]Route{
		{{Prefix: netip.MustParsePrefix("fd01::/64"), Via: via("fd01::9")}},
		{{Prefix: netip.MustParsePrefix("fd01::/64")}, {Prefix: netip.MustParsePrefix("fd01::/64"), Metric: 256}},
	} {
		if err := (Config{Networks: prefixes("fd01::7/64"), Routes: routes}).Validate(); err == nil {
			t.Errorf("%+v is taken", routes)
		}
	}
}

// A probe is an address of the prefix that nothing longer of ours covers, and none of our own (kernel.md V12).
func TestProbes(t *testing.T) {
	p := netip.MustParsePrefix
	c := Config{Networks: prefixes("10.1.0.1/24", "fd01::1/64"), Routes: []Route{
		{Prefix: p("10.0.0.0/8")},
		{Prefix: p("10.0.0.0/9")},
		{Prefix: p("10.128.0.0/10")},
		{Prefix: p("10.9.9.9/32")},
		{Prefix: p("11.0.0.0/31")},
		{Prefix: p("11.0.0.0/32")},
		{Prefix: p("11.0.0.1/32")},
		{Prefix: p("0.0.0.0/0"), Metric: 5},
		{Prefix: p("255.255.255.0/24")},
		{Prefix: p("fd09::/16")},
	}}
	var tree routeTree
	tree.replace(staticLayer(&c, &tree.pool))
	probes := newProbes(c.Networks, tree.longest)
	for prefix, want := range map[string]string{
		"10.1.0.0/24": "10.1.0.2", "fd01::/64": "fd01::2", "10.0.0.0/8": "10.192.0.0", "10.0.0.0/9": "10.0.0.1", "10.9.9.9/32": "10.9.9.9",
		"11.0.0.0/31": "", "0.0.0.0/0": "0.0.0.1", "fd09::/16": "fd09::1",
	} {
		got, ok := probes.first(p(prefix))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("probe of %s: %v %v, want %s", prefix, got, ok, want)
		}
	}
	for other, want := range map[string]string{
		"255.255.255.0/25": "255.255.255.128", "255.255.255.128/25": "", "255.255.255.255/32": "", "255.255.255.0/32": "255.255.255.1",
	} {
		got, ok := probes.after(p("255.255.255.0/24"), p(other))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("probe after %s: %v %v, want %s", other, got, ok, want)
		}
	}
	if got, ok := probes.after(p("10.1.0.0/24"), netip.Prefix{}); ok {
		t.Errorf("a probe after nothing: %v", got)
	}
}

// The spare metric of an exchange is free, and lower if it can be.
func TestSpareKey(t *testing.T) {
	key := func(metric uint32) kernel.RouteKey {
		return kernel.RouteKey{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Table: 254, Metric: metric}
	}
	for _, test := range []struct {
		metric uint32
		taken  []uint32
		want   uint32
	}{{1024, []uint32{1024}, 1023}, {256, []uint32{254, 255, 256}, 253}, {2, []uint32{1, 2, 3}, 4}, {1, []uint32{1}, 2}, {0, []uint32{0}, 1}} {
		got := spareKey(key(test.metric), func(k kernel.RouteKey) bool { return slices.Contains(test.taken, k.Metric) })
		if got != key(test.want) {
			t.Errorf("spare of %d beside %v: %d, want %d", test.metric, test.taken, got.Metric, test.want)
		}
	}
}
