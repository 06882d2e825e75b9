package overlay

import (
	"encoding/json"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var nebulaBase = Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.128.0.7/16")}}

func decodeJSON(t *testing.T, text []byte) map[string]any {
	t.Helper()
	var tun map[string]any
	if err := json.Unmarshal(text, &tun); err != nil {
		t.Fatal(err)
	}
	return tun
}

func TestConfigFromMapReadsASection(t *testing.T) {
	text, err := os.ReadFile("testdata/nebula-tun.json")
	if err != nil {
		t.Fatal(err)
	}
	cfg, ignored, err := ConfigFromMap(nebulaBase, decodeJSON(t, text))
	if err != nil {
		t.Fatal(err)
	}
	weighted := []Gateway{{netip.MustParseAddr("10.128.0.98"), 3}, {netip.MustParseAddr("10.128.0.99"), 1}}
	want := Config{
		Networks: nebulaBase.Networks, Name: "nebula1", MTU: 1300, TxQueueLen: 500,
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("10.128.5.0/24"), MTU: 8800},
			{Prefix: netip.MustParsePrefix("172.16.1.0/24"), Via: via("10.128.0.99"), MTU: 1300, Metric: 100},
			{Prefix: netip.MustParsePrefix("172.16.2.0/24"), Via: weighted, NoInstall: true},
			{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Via: via("10.128.0.1"), Metric: 5},
		},
		SystemRoutes: &SystemRoutes{ReadBuffer: 1 << 20},
	}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
	if want := []string{"drop_local_broadcast", "drop_multicast"}; !slices.Equal(ignored, want) {
		t.Errorf("ignored %q, want %q", ignored, want)
	}
}

// The shapes of other decoders: YAML's map[any]any, TOML's []map[string]any, json.Number, unsigned numbers.
func TestConfigFromMapTakesEveryDecodersTypes(t *testing.T) {
	for _, tun := range []map[string]any{
		{"mtu": uint64(1400), "unsafe_routes": []any{map[any]any{"route": "192.0.2.0/24", "via": []any{map[any]any{"gateway": "10.128.0.2", "weight": int64(1)}}}}},
		{"mtu": json.Number("1400"), "unsafe_routes": []map[string]any{{"route": "192.0.2.0/24", "via": []map[string]any{{"gateway": "10.128.0.2"}}}}},
		{"mtu": json.Number("1400.0"), "unsafe_routes": []any{map[string]any{"route": "192.0.2.0/24", "via": []any{map[string]any{"gateway": "10.128.0.2", "weight": json.Number("1e0")}}}}},
		{"mtu": " 1.4e3 ", "unsafe_routes": []any{map[string]any{"route": "192.0.2.0/24", "via": []any{map[string]any{"gateway": "10.128.0.2", "weight": "1.0"}}}}},
		{"mtu": float32(1400), "unsafe_routes": []any{map[string]any{"route": "192.0.2.0/24", "via": []any{map[string]any{"gateway": "10.128.0.2", "weight": 1.0}}}}},
		{"mtu": 1400, "unsafe_routes": []map[any]any{{"route": "192.0.2.0/24", "via": []map[any]any{{"gateway": "10.128.0.2", "weight": 1}}, "mtu": nil, "metric": nil, "install": nil}}},
		{"mtu": 1400.0, "unsafe_routes": []any{map[string]any{"route": "192.0.2.0/24", "via": []any{map[string]any{"gateway": "10.128.0.2", "weight": "1"}}}}},
	} {
		cfg, _, err := ConfigFromMap(nebulaBase, tun)
		want := []Route{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Via: []Gateway{{netip.MustParseAddr("10.128.0.2"), 1}}}}
		if err != nil || cfg.MTU != 1400 || !reflect.DeepEqual(cfg.Routes, want) {
			t.Errorf("ConfigFromMap(%v) = %+v, %v", tun, cfg, err)
		}
	}
}

func TestConfigFromMapKeepsWhatIsSilent(t *testing.T) {
	base := nebulaBase
	base.MTU, base.Routes = 1400, []Route{routeTo("192.0.2.0/24", "10.128.0.2")}
	cfg, _, err := ConfigFromMap(base, map[string]any{"disabled": "true"})
	base.Disabled = true
	if err != nil || !reflect.DeepEqual(cfg, base) {
		t.Errorf("got %+v, %v, want %+v", cfg, err, base)
	}
	nothing := map[string]any{
		"disabled": nil, "dev": nil, "mtu": nil, "tx_queue": nil, "use_system_route_table": nil, "use_system_route_table_buffer_size": nil,
	}
	base.SystemRoutes = &SystemRoutes{ReadBuffer: 1 << 20}
	if cfg, _, err := ConfigFromMap(base, nothing); err != nil || !cfg.Disabled || cfg.MTU != 1400 || cfg.SystemRoutes.ReadBuffer != 1<<20 {
		t.Errorf("keys without a value make of it %+v, %v", cfg, err)
	}
	if cfg, _, err := ConfigFromMap(base, map[string]any{"routes": nil}); err != nil || len(cfg.Routes) != 0 {
		t.Errorf("an empty list leaves %v, %v", cfg.Routes, err)
	}
}

func TestConfigFromMapRefuses(t *testing.T) {
	for _, test := range []struct{ section, field, text string }{
		{`{"mtu": "big"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": 1300.5}`, "tun.mtu", "not a whole number"},
		{`{"mtu": "1300.5"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": "0x514p0"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": "inf"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": "NaN"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": "1e30"}`, "tun.mtu", "not a whole number"},
		{`{"mtu": ""}`, "tun.mtu", "not a whole number"},
		{`{"mtu": 65536}`, "tun.mtu", "want 0…65535"},
		{`{"mtu": 50}`, "tun.mtu", "want 68…65535"},
		{`{"dev": 5}`, "tun.dev", "not a text"},
		{`{"dev": "a/b"}`, "tun.dev", "has a slash"},
		{`{"disabled": "maybe"}`, "tun.disabled", "want true or false"},
		{`{"tx_queue": -1}`, "tun.tx_queue", "want 0…"},
		{`{"multi_queue": 2}`, "tun.multi_queue", "unknown key"},
		{`{"routes": {}}`, "tun.routes", "not a list"},
		{`{"routes": [5]}`, "tun.routes[0]", "not a map"},
		{`{"routes": [{"route": "10.128.1.0/24"}]}`, "tun.routes[0].mtu", "missing"},
		{`{"routes": [{"mtu": 499, "route": "10.128.1.0/24"}]}`, "tun.routes[0].mtu", "want 500…65535"},
		{`{"routes": [{"mtu": 500}]}`, "tun.routes[0].route", "missing"},
		{`{"routes": [{"mtu": 500, "route": "nowhere"}]}`, "tun.routes[0].route", "not a prefix"},
		{`{"routes": [{"mtu": 500, "route": "10.129.1.0/24"}]}`, "tun.routes[0].route", "not inside the overlay networks"},
		{`{"routes": [{"mtu": 500, "route": "10.0.0.0/8"}]}`, "tun.routes[0].route", "not inside the overlay networks"},
		{`{"routes": [{"mtu": 500, "route": "10.128.1.1/24"}]}`, "tun.routes[0].route", "host bits"},
		{`{"routes": [{"mtu": 500, "route": "10.128.1.0/24", "via": "10.128.0.2"}]}`, "tun.routes[0].via", "unknown key"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24"}]}`, "tun.unsafe_routes[0].via", "missing"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": []}]}`, "tun.unsafe_routes[0].via", "names no gateway"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "me"}]}`, "tun.unsafe_routes[0].via", "not an address"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": 5}]}`, "tun.unsafe_routes[0].via", "not a list"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "192.0.2.1"}]}`, "tun.unsafe_routes[0].via", "outside Networks"},
		{`{"unsafe_routes": [{"route": "10.128.9.0/24", "via": "10.128.0.2"}]}`, "tun.unsafe_routes[0].route", "inside an overlay network"},
		{`{"unsafe_routes": [{"route": "::ffff:192.0.2.0/120", "via": "10.128.0.2"}]}`, "tun.unsafe_routes[0].route", "IPv4-mapped"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "10.128.0.2", "mtu": 499}]}`, "tun.unsafe_routes[0].mtu", "want 500…65535"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "10.128.0.2", "metric": 2147483648}]}`, "tun.unsafe_routes[0].metric", "want 0…2147483647"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "10.128.0.2", "install": 5}]}`, "tun.unsafe_routes[0].install", "want true or false"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": [{"weight": 1}]}]}`, "tun.unsafe_routes[0].via[0].gateway", "missing"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": [{"gateway": "10.128.0.2"}, {"gateway": "10.128.0.3", "weight": 0}]}]}`, "tun.unsafe_routes[0].via[1].weight", "want 1…2147483647"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "10.128.0.2"}, {"route": "192.0.2.0/24", "via": "10.128.0.2"}]}`, "tun.unsafe_routes[1]", "metric of tun.unsafe_routes[0] again"},
		{`{"routes": [{"mtu": 500, "route": "10.128.1.0/24"}], "unsafe_routes": [{"route": "192.0.2.0/24", "via": "10.128.0.2"}, {"route": "192.0.2.0/24", "via": "10.128.0.2"}]}`, "tun.unsafe_routes[1]", "metric of tun.unsafe_routes[0] again"},
		{`{"routes": [{"mtu": 500, "route": "10.128.1.0/24"}, {"mtu": 600, "route": "10.128.1.0/24"}]}`, "tun.routes[1]", "metric of tun.routes[0] again"},
		{`{"unsafe_routes": [{"route": "192.0.2.0/24", "via": [{"gateway": "10.128.0.2"}, {"gateway": "10.128.0.2"}]}]}`, "tun.unsafe_routes[0].via[1].gateway", "the gateway of tun.unsafe_routes[0].via[0] again"},
		{`{"unsafe_routes": [{"route": "0.0.0.0/0", "via": "10.128.0.2"}]}`, "tun.unsafe_routes[0].route", "0.0.0.0/0: a default route at metric 0 takes over the host: give it a metric"},
		{`{"unsafe_routes": [{"route": "::/0", "via": "10.128.0.2", "metric": "x"}]}`, "tun.unsafe_routes[0].metric", "not a whole number"},
	} {
		cfg, _, err := ConfigFromMap(nebulaBase, decodeJSON(t, []byte(test.section)))
		if got := configErrors(err); !slices.Equal(got, []string{test.field}) {
			t.Errorf("%s: refuses %q (%v), want %q", test.section, got, err, test.field)
			continue
		}
		if !strings.Contains(err.Error(), test.text) || !reflect.DeepEqual(cfg, nebulaBase) {
			t.Errorf("%s: says %q with %+v, want %q and the base", test.section, err, cfg, test.text)
		}
	}
}

// All that is wrong is told at once, each by the name that its writer knows: the section's, but Config's for what base says.
func TestConfigFromMapTellsAll(t *testing.T) {
	bad := nebulaBase
	bad.MTU, bad.Name, bad.TxQueueLen, bad.SystemRoutes = 5, "a/b", -1, &SystemRoutes{ReadBuffer: -1}
	for _, test := range []struct {
		base    Config
		section string
		want    []string
	}{
		{
			nebulaBase, `{"unsafe_routes": [{"route": "192.0.2.0/24", "via": "me"}, {"route": "198.51.100.0/24", "via": []}, {"route": "203.0.113.0/24", "via": null}]}`,
			[]string{"tun.unsafe_routes[0].via", "tun.unsafe_routes[1].via", "tun.unsafe_routes[2].via"},
		},
		{nebulaBase, `{"unsafe_routes": [{"route": "192.0.2.0/24", "via": 5}]}`, []string{"tun.unsafe_routes[0].via"}},
		{nebulaBase, `{"mtu": "x", "unsafe_routes": [{"route": "::/0", "via": "10.128.0.2"}]}`, []string{"tun.mtu", "tun.unsafe_routes[0].route"}},
		{nebulaBase, `{"dev": "c/d", "mtu": 6}`, []string{"tun.dev", "tun.mtu"}},
		{bad, `{}`, []string{"Name", "MTU", "TxQueueLen", "SystemRoutes.ReadBuffer"}},
		{bad, `{"mtu": 6, "tx_queue": 7}`, []string{"Name", "tun.mtu", "SystemRoutes.ReadBuffer"}},
		{bad, `{"dev": "c/d", "mtu": 1400, "tx_queue": 7, "use_system_route_table_buffer_size": 8}`, []string{"tun.dev"}},
	} {
		if _, _, err := ConfigFromMap(test.base, decodeJSON(t, []byte(test.section))); !slices.Equal(configErrors(err), test.want) {
			t.Errorf("%s: refuses %q, want %q", test.section, configErrors(err), test.want)
		}
	}
}

func FuzzConfigFromMap(f *testing.F) {
	text, err := os.ReadFile("testdata/nebula-tun.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"unsafe_routes": [{"route": "::/0", "via": [{"gateway": "fe80::1%1", "weight": 1e300}], "metric": "-1"}], "routes": null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var tun map[string]any
		if json.Unmarshal(text, &tun) != nil {
			return
		}
		cfg, _, err := ConfigFromMap(nebulaBase, tun)
		if err == nil {
			err = cfg.Validate()
		} else if len(configErrors(err)) == 0 {
			t.Errorf("%s: an error without fields: %v", text, err)
			return
		} else {
			return
		}
		if err != nil {
			t.Errorf("%s gives a Config that is refused: %v", text, err)
		}
	})
}
