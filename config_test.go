package overlay

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func via(texts ...string) []Gateway {
	var all []Gateway
	for _, text := range texts {
		all = append(all, Gateway{Addr: netip.MustParseAddr(text)})
	}
	return all
}

func routeTo(prefix string, gateways ...string) Route {
	return Route{Prefix: netip.MustParsePrefix(prefix), Via: via(gateways...)}
}

// configErrors lists the fields that an error of Validate names.
func configErrors(err error) []string {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []string{"not joined: " + err.Error()}
	}
	var fields []string
	for _, e := range joined.Unwrap() {
		var c *ConfigError
		if !errors.As(e, &c) {
			return []string{"not a ConfigError: " + e.Error()}
		}
		fields = append(fields, c.Field)
	}
	return fields
}

// Every field: what is refused, and how it reads.
func TestValidateRefuses(t *testing.T) {
	v4 := prefixes("10.0.0.1/24")
	tests := []struct {
		config Config
		field  string
		text   string
	}{
		{Config{Name: "sixteen-bytes-xy"}, "Name", `overlay: config: Name: "sixteen-bytes-xy": longer than 15 bytes`},
		{Config{Name: "all"}, "Name", `stands for every interface`},
		{Config{Name: "a/b"}, "Name", `has a slash`},
		{Config{Name: "a%d%d"}, "Name", `one %d`},
		{Config{Mode: Attach}, "Name", `"": attaching needs the name of a device`},
		{Config{Mode: AttachOrCreate, Name: "tun%d"}, "Name", `attaching needs the name`},
		{Config{Mode: 3, Name: "x"}, "Mode", `Mode: mode(3): unknown mode`},
		{Config{MTU: 67}, "MTU", `MTU: 67: want 68…65535 bytes`},
		{Config{MTU: 65536}, "MTU", `MTU: 65536: want 68…65535 bytes`},
		{Config{MTU: -1}, "MTU", `MTU: -1: want`},
		{Config{MTU: 1279, Networks: prefixes("fd00::1/64")}, "MTU", `Networks[0] is IPv6, which needs 1280 bytes`},
		{Config{MTU: 1279, LinkLocal: true}, "LinkLocal", `LinkLocal: true: IPv6 needs 1280 bytes, the device has 1279`},
		{Config{TxQueueLen: -1}, "TxQueueLen", `TxQueueLen: -1: want 1…524288 packets`},
		{Config{TxQueueLen: 1<<19 + 1}, "TxQueueLen", `want 1…524288 packets`},
		{Config{Queues: -1}, "Queues", `Queues: -1: want 1…256 queues`},
		{Config{Queues: 257}, "Queues", `Queues: 257: want 1…256 queues`},
		{Config{Owner: -1}, "Owner", `Owner: -1: want 1…4294967294 a uid`},
		{Config{Group: -1}, "Group", `Group: -1: want 1…4294967294 a gid`},
		{Config{Mode: Attach, Name: "x", Owner: 5}, "Owner", `an attached device keeps its owner`},
		{Config{Mode: Attach, Name: "x", Group: 5}, "Group", `an attached device keeps its group`},
		{Config{Mode: Attach, Name: "x", Persist: true}, "Persist", `an attached device keeps its persistence`},
		{Config{Protocol: -1}, "Protocol", `Protocol: -1: want 5…255, or 0 for 111`},
		{Config{Protocol: 256}, "Protocol", `want 5…255`},
		{Config{Protocol: 2}, "Protocol", `the kernel and ip(8) mark their own`},
		{Config{Protocol: 9}, "Protocol", `the kernel and ip(8) mark their own`},
		{Config{NoOffload: 4}, "NoOffload", `NoOffload: offload(4): unknown offload`},
		{Config{NetNS: "a\x00b"}, "NetNS", `a path has no NUL`},

		{Config{Networks: make([]netip.Prefix, 1)}, "Networks[0]", `not a prefix`},
		{Config{Networks: prefixes("::ffff:10.0.0.1/120")}, "Networks[0]", `IPv4-mapped`},
		{Config{Networks: prefixes("10.0.0.1/0")}, "Networks[0]", `no network spans all addresses`},
		{Config{Networks: prefixes("0.0.0.0/8")}, "Networks[0]", `not the address of a host`},
		{Config{Networks: prefixes("127.0.0.1/8")}, "Networks[0]", `not the address of a host`},
		{Config{Networks: prefixes("224.0.0.1/8")}, "Networks[0]", `not the address of a host`},
		{Config{Networks: prefixes("ff02::1/64")}, "Networks[0]", `not the address of a host`},
		{Config{Networks: prefixes("10.0.0.1/24", "10.0.0.1/16")}, "Networks[1]", `the address of Networks[0] again`},

		{Config{Routes: make([]Route, 1)}, "Routes[0].Prefix", `not a prefix`},
		{Config{Routes: []Route{routeTo("::ffff:10.0.0.0/120")}}, "Routes[0].Prefix", `IPv4-mapped`},
		{Config{Routes: []Route{routeTo("10.0.0.1/24")}}, "Routes[0].Prefix", `has host bits: did you mean 10.0.0.0/24?`},
		{Config{Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Metric: -1}}}, "Routes[0].Metric", `want 0…2147483647`},
		{Config{Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Table: -1}}}, "Routes[0].Table", `want 1…2147483647, or 0 for main`},
		{Config{Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Table: 255}}}, "Routes[0].Table", `the local table is the kernel's`},
		{Config{Routes: []Route{routeTo("0.0.0.0/0")}}, "Routes[0].Table", `takes over the host`},
		{Config{Routes: []Route{routeTo("::/0")}}, "Routes[0].Table", `takes over the host`},
		{Config{Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), MTU: 67}}}, "Routes[0].MTU", `want 68…65535 bytes`},
		{Config{Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), MTU: 1279}}}, "Routes[0].MTU", `IPv6 needs 1280 bytes, this route has 1279`},
		{Config{Routes: []Route{routeTo("10.0.0.0/24"), routeTo("10.0.0.0/24")}}, "Routes[1]", `prefix, table and metric of Routes[0] again`},
		{Config{Networks: v4, Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: via("10.0.0.2")},
			{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: via("10.0.0.3"), Table: 7},
		}}, "Routes[1].Via", `differs from Routes[0]`},
		{Config{Networks: v4, Routes: []Route{routeTo("10.0.0.0/24", "10.0.0.2")}}, "Routes[0].Via", `on-link`},

		{Config{Networks: v4, Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Table: 7, Via: via("10.0.0.2")}}}, "Routes[0].Via", `on-link, whatever the table`},
		{Config{Networks: v4, Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Table: 7, Metric: 5, Via: via("10.0.0.2")}}}, "Routes[0].Via", `on-link`},
		{Config{Networks: prefixes("fd00::1/64"), Routes: []Route{routeTo("fd00::/64", "fd00::2")}}, "Routes[0].Via", `on-link`},
		{Config{Networks: prefixes("fd00::1/64"), Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), Metric: 256, Via: via("fd00::2")}}}, "Routes[0].Via", `on-link`},
		{Config{Networks: prefixes("fd00::1/64"), Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), Table: 7, Via: via("fd00::2")}}}, "Routes[0].Via", `on-link`},
		{Config{Networks: prefixes("fd00::1/64"), Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), Table: 7, Metric: 256, Via: via("fd00::2")}}}, "Routes[0].Via", `on-link`},

		{Config{Networks: v4, Routes: []Route{{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: make([]Gateway, 1)}}}, "Routes[0].Via[0].Addr", `not an address`},
		{Config{Networks: v4, Routes: []Route{routeTo("10.1.0.0/24", "10.2.0.2")}}, "Routes[0].Via[0].Addr", `outside Networks`},
		{Config{Networks: v4, Routes: []Route{routeTo("10.1.0.0/24", "10.0.0.1")}}, "Routes[0].Via[0].Addr", `our own address`},
		{Config{Networks: v4, Routes: []Route{routeTo("10.1.0.0/24", "10.0.0.2", "10.0.0.2")}}, "Routes[0].Via[1].Addr", `the gateway of Routes[0].Via[0] again`},
		{Config{Networks: v4, Routes: []Route{{
			Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: []Gateway{{Addr: netip.MustParseAddr("10.0.0.2"), Weight: -1}},
		}}}, "Routes[0].Via[0].Weight", `Weight: -1: want 1…2147483647`},

		{Config{SystemRoutes: &SystemRoutes{Tables: []int{0}}}, "SystemRoutes.Tables[0]", `want 1…2147483647`},
		{Config{SystemRoutes: &SystemRoutes{Tables: []int{7, 7}}}, "SystemRoutes.Tables[1]", `twice`},
		{Config{SystemRoutes: &SystemRoutes{ReadBuffer: -1}}, "SystemRoutes.ReadBuffer", `bytes, or 0 for 4 MiB`},
		{Config{SystemRoutes: &SystemRoutes{Max: -1}}, "SystemRoutes.Max", `routes, or 0 for 4,000,000`},
	}
	for _, test := range tests {
		err := test.config.Validate()
		if got := configErrors(err); !slices.Equal(got, []string{test.field}) {
			t.Errorf("Validate(%+v) refuses %q, want %q", test.config, got, test.field)
			continue
		}
		if !strings.Contains(err.Error(), test.text) {
			t.Errorf("Validate says %q, want it to contain %q", err, test.text)
		}
		// New and Pipe refuse the same, before any system call.
		if _, err := New(test.config); !errors.Is(err, errors.ErrUnsupported) && !slices.Equal(configErrors(err), []string{test.field}) {
			t.Errorf("New(%+v) = %v, want the error of Validate", test.config, err)
		}
	}
}

func TestValidateAccepts(t *testing.T) {
	weights := []Gateway{{netip.MustParseAddr("10.0.0.2"), math.MaxInt32}, {netip.MustParseAddr("10.0.0.3"), 0}}
	for _, config := range []Config{
		{},
		{Name: "tun%d"},
		{Name: "fifteen-bytes-x", Mode: Attach},
		{MTU: 68},
		{MTU: 65535, TxQueueLen: 1 << 19, Queues: 256, Protocol: 255},
		{MTU: 1279, Networks: prefixes("10.0.0.1/24")},
		{Owner: 1000, Group: 1000, Persist: true},
		{Name: "x", Mode: AttachOrCreate, Owner: 1000, Group: 1000, Persist: true},
		{Networks: prefixes("10.0.0.0/24", "10.0.0.255/24", "fe80::1/64", "10.1.2.3/32", "fd00::1/128")},
		{Networks: prefixes("10.0.0.1/24", "10.0.0.2/24")},
		// An IPv6 route may be wider than the default, and one that is not installed needs no IPv6 at all.
		{MTU: 1000, Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), MTU: 1400}}},
		{MTU: 1000, Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), NoInstall: true}}},
		{MTU: 1000, LinkLocal: true, Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), MTU: 1280}}},
		{Routes: []Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Table: 254}, {Prefix: netip.MustParsePrefix("::/0"), Metric: 5}}},
		{Routes: []Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Table: 77}, {Prefix: netip.MustParsePrefix("::/0"), NoInstall: true}}},
		{Networks: prefixes("10.0.0.1/24"), Routes: []Route{{Prefix: netip.MustParsePrefix("fd00::/64"), Via: weights}}},
		{Networks: prefixes("10.0.0.1/24"), Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/24"), MTU: 9000}}},
		{Networks: prefixes("10.0.0.1/24"), Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: via("10.0.0.2")},
			{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Via: via("10.0.0.3"), Metric: 7},
		}},
		// For a network's own prefix: on-link in another table, and by gateways at a metric that acts or, in main, waits.
		{Networks: prefixes("10.0.0.1/24", "fd00::1/64"), Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Table: 7},
			{Prefix: netip.MustParsePrefix("10.0.0.0/24"), Metric: 5, Via: via("10.0.0.2")},
			{Prefix: netip.MustParsePrefix("fd00::/64"), Table: 7, Metric: 255, Via: via("fd00::2")},
			{Prefix: netip.MustParsePrefix("fd00::/64"), Metric: 255, Via: via("fd00::2")},
			{Prefix: netip.MustParsePrefix("fd00::/64"), Metric: 1024, Via: via("fd00::2")},
		}},
		{SystemRoutes: &SystemRoutes{Tables: []int{254, 7}, ReadBuffer: 1 << 30, Max: math.MaxInt32}},
	} {
		if err := config.Validate(); err != nil {
			t.Errorf("Validate(%+v) = %v", config, err)
		}
	}
}

// A refused value has the type of its field, for who looks at it with errors.As.
func TestConfigErrorValueIsTyped(t *testing.T) {
	for field, config := range map[string]Config{
		"Mode": {Mode: 3}, "NoOffload": {NoOffload: 4}, "MTU": {MTU: 1}, "Owner": {Owner: -1}, "Name": {Name: "all"}, "NetNS": {NetNS: "\x00"},
	} {
		want := reflect.ValueOf(config).FieldByName(field).Interface()
		if c := new(ConfigError); !errors.As(config.Validate(), &c) || c.Field != field || c.Value != want {
			t.Errorf("%s: got %s with %T, want the field's %T", field, c.Field, c.Value, want)
		}
	}
}

// All that is wrong is told at once.
func TestValidateTellsAll(t *testing.T) {
	c := Config{MTU: 1, Queues: 300, Networks: make([]netip.Prefix, 2), Routes: []Route{routeTo("10.0.0.1/8", "1.2.3.4")}}
	want := []string{"MTU", "Queues", "Networks[0]", "Networks[1]", "Routes[0].Prefix", "Routes[0].Via[0].Addr"}
	if got := configErrors(c.Validate()); !slices.Equal(got, want) {
		t.Errorf("Validate refuses %q, want %q", got, want)
	}
}

func TestErrorsStayShortAndPrintable(t *testing.T) {
	const bad = "ü\n\x1b[2J\u202e\xff"
	long := strings.Repeat(bad, 1000)
	section := func(key string, value any) error {
		_, _, err := ConfigFromMap(Config{Networks: prefixes("10.0.0.1/24")}, map[string]any{key: value})
		return err
	}
	gateway := func(fields map[string]any) error {
		return section("unsafe_routes", []any{map[string]any{"route": "192.0.2.0/24", "via": []any{fields}}})
	}
	for _, err := range []error{
		Config{Name: long}.Validate(),
		Config{NetNS: "\x00" + long}.Validate(),
		section("mtu", []any{"a\nb\x1b[31m"}),
		section("mtu", []any{long}),
		section("mtu", map[any]any{long: bad}),
		section("mtu\nx", 1),
		section(long, 1),
		gateway(map[string]any{"gateway": "10.0.0.2", long: bad}),
		gateway(map[string]any{"gateway": long}),
		gateway(map[string]any{"gateway": "fe80::1%" + long}),
		opError("adopt", "a\n\x1b[2J\u202e\xff", errors.Join(errors.New("one"), fmt.Errorf("descriptor 3 is of %s", bad))),
	} {
		lines := []error{err} // joined errors have a line each
		if joined, ok := err.(interface{ Unwrap() []error }); ok {
			lines = joined.Unwrap()
		}
		for _, line := range lines {
			text := line.Error()
			if len(text) > 600 || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("the error reads %q", text)
			}
		}
	}
}

func FuzzValidate(f *testing.F) {
	f.Add("tun0", 1300, "10.0.0.1/24", "10.1.0.0/16", "10.0.0.2", 3, 7, 254)
	f.Add("%d%", -1, "::1/0", "0.0.0.0/0", "fe80::1%eth0", -5, -1, 255)
	f.Fuzz(func(t *testing.T, name string, mtu int, network, prefix, gateway string, weight, metric, table int) {
		n, _ := netip.ParsePrefix(network)
		p, _ := netip.ParsePrefix(prefix)
		g, _ := netip.ParseAddr(gateway)
		c := Config{Name: name, MTU: mtu, Networks: []netip.Prefix{n}, Routes: []Route{{
			Prefix: p, Via: []Gateway{{g, weight}}, Metric: metric, Table: table,
		}}}
		if c.Validate() != nil {
			return
		}
		// What is accepted is safe to work with.
		if c.deviceMTU() < minMTU || c.deviceMTU() > maxMTU || len(name) > maxNameLen || strings.Contains(name, "/") {
			t.Errorf("accepted %+v", c)
		}
		want := desire(&c, 1)
		if len(want.addresses) != 1 || want.ipv6 && c.deviceMTU() < minIPv6MTU {
			t.Errorf("%+v asks for %+v", c, want)
		}
		if said, ok := staticLayer(&c, new(gatewayPool)).Lookup(p.Addr()); !ok || said.gateways.Len() > 1 {
			t.Errorf("no route to %v in %+v", p, c)
		}
	})
}

func TestCloneIsDeep(t *testing.T) {
	c := Config{
		Networks: prefixes("10.0.0.1/24"), Routes: []Route{routeTo("10.1.0.0/24", "10.0.0.2")},
		SystemRoutes: &SystemRoutes{Tables: []int{254}},
	}
	copied := c.clone()
	c.Networks[0] = netip.Prefix{}
	c.Routes[0].Via[0] = Gateway{}
	c.SystemRoutes.Tables[0] = 0
	if err := copied.Validate(); err != nil {
		t.Errorf("a change of the original reached the copy: %v", err)
	}
}

func TestRestartNamesFixedFields(t *testing.T) {
	old := Config{Name: "a"}
	if err := restart(&old, &Config{Name: "a", Queues: 1, Protocol: DefaultProtocol, MTU: 1400, NoHeal: true}); err != nil {
		t.Errorf("a reload of what may change is refused: %v", err)
	}
	next := Config{Queues: 2, Mode: Attach, NetNS: "x", Owner: 1, Group: 1, Persist: true, Disabled: true, Protocol: 99}
	err := restart(&old, &next)
	want := "overlay: reload: Name, Queues, Mode, NetNS, Owner, Group, Persist, Disabled, Protocol: fixed for the life of a device"
	if !errors.Is(err, ErrRestart) || err.Error() != want {
		t.Errorf("restart = %v, want %q", err, want)
	}
}

func TestOpErrorReads(t *testing.T) {
	err := opError("create", "wg0", needs(fmt.Errorf("ioctl: %w", os.ErrPermission), "CAP_NET_ADMIN"))
	if want := "overlay: create wg0: ioctl: permission denied (needs CAP_NET_ADMIN)"; err.Error() != want || !errors.Is(err, os.ErrPermission) {
		t.Errorf("the error reads %q, want %q", err, want)
	}
	if opError("create", "wg0", nil) != nil {
		t.Error("opError makes an error of none")
	}
}
