package overlay

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
)

// The dump in full, of two layers: what it says is read by people and cut by their scripts, so a change of it is a change of the contract.
func TestStatePrinted(t *testing.T) {
	p := netip.MustParsePrefix
	cfg := Config{
		Networks: []netip.Prefix{p("10.42.0.1/24"), p("fd42::1/64")}, MTU: 1400, TxQueueLen: 1000, Protocol: 77,
		Routes: []Route{
			{Prefix: p("192.168.7.0/24"), Via: []Gateway{{Addr: netip.MustParseAddr("10.42.0.2")}, {Addr: netip.MustParseAddr("10.42.0.3"), Weight: 3}}},
			{Prefix: p("2001:db8::/32"), Via: []Gateway{{Addr: netip.MustParseAddr("fd42::2")}}, MTU: 1300, Metric: 5, Table: 100},
			{Prefix: p("203.0.113.0/24"), NoInstall: true},
			{Prefix: p("fd42::/64"), MTU: 1280},
		},
		SystemRoutes: &SystemRoutes{Tables: []int{254, 100}, ReadBuffer: 1 << 20},
		NoOffload:    OffloadUDP, LinkLocal: true, NoFilter: true,
		Name: "tun%d", Mode: AttachOrCreate, NetNS: "/run/netns/a b", Owner: 1000, Group: 100, Persist: true, Queues: 2,
	}
	s := State{
		Name: "tun0", Index: 7, MTU: 1400, Up: true, Networks: cfg.Networks, Offload: OffloadTCP, Learned: 3,
		report: report{
			config: cfg, queues: 2, txQueueLen: 900,
			stats: Stats{
				1, 2, 3, 4, 5,
				6, 7, 8, 9, 10, 11,
				12, 13, 14, 15, 16, 17,
			},
			notes: []string{"no ears", "two\nlines and \x1b[31mred"},
		},
	}
	var tree routeTree
	tree.changeLayer(learnedRoutes, []change{
		{prefix: p("2001:db8:7::/48"), offer: offer{metric: 1024}},
		{prefix: p("10.7.0.0/16"), offer: offer{metric: 32, gateways: tree.pool.intern([]Gateway{
			{Addr: netip.MustParseAddr("10.42.0.9"), Weight: 1}, {Addr: netip.MustParseAddr("10.42.0.10"), Weight: 300},
		})}},
		{prefix: p("192.168.7.0/24"), offer: offer{metric: 100}}, // ours, of a lower metric, is in force
	})
	tree.changeLayer(staticRoutes, []change{{prefix: p("192.168.7.0/24"), offer: offer{first: true}}})
	s.table, s.report.learned = tree.current.Load(), tree.learnedOffer
	want, err := os.ReadFile("testdata/state.txt")
	if err != nil {
		t.Fatal(err)
	}
	if got := s.String(); got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A State that holds little prints as well, and names from outside stay one word.
func TestStatePrintedOfLittle(t *testing.T) {
	const zero = `device "" index 0 link down mtu 0 txqueuelen 500 queues 0 offload none learned 0
config mode create netns "" owner 0 group 0 persist off protocol 111 filter on heal on link-local off take-addresses off refused-offload none
count read packets 0 bytes 0 super 0 invalid 0 dropped 0
count write packets 0 bytes 0 super 0 refused 0 filtered 0 down 0
count control overruns 0 resyncs 0 restores 0 restore-fails 0 offload-fails 0 events-missed 0
`
	if got := (State{}).String(); got != zero {
		t.Errorf("got\n%s\nwant\n%s", got, zero)
	}
	for name, want := range map[string]string{
		"tun0": "tun0", "a b": `"a b"`, "\x1b[2J": `"\x1b[2J"`, `a"b`: `"a\"b"`, "ü": `"\u00fc"`, "\xff": `"\xff"`, "a\nb": `"a\nb"`,
	} {
		line, _, _ := strings.Cut(State{Name: name}.String(), "\n")
		if got := strings.TrimSuffix(strings.TrimPrefix(line, "device "), " index 0 link down mtu 0 txqueuelen 500 queues 0 offload none learned 0"); got != want {
			t.Errorf("name %q: printed %s, want %s", name, got, want)
		}
	}
	for mode, s := range map[string]State{
		"disabled": {report: report{config: Config{Disabled: true}}},
		"adopt":    {report: report{adopted: true}},
	} {
		if !strings.Contains(s.String(), "\nconfig mode "+mode+" ") {
			t.Errorf("%s: got\n%s", mode, s)
		}
	}
}

// Every field of Config and of Stats shows in the dump, so that a new one is not forgotten: changing it changes the text.
func TestStatePrintsEveryField(t *testing.T) {
	p := netip.MustParsePrefix
	full := Config{
		Networks: []netip.Prefix{p("10.0.0.1/8")}, MTU: 1, TxQueueLen: 1, Routes: []Route{{Prefix: p("10.0.0.0/8")}},
		SystemRoutes: &SystemRoutes{}, Protocol: 1, NoOffload: 1, LinkLocal: true, NoHeal: true, NoFilter: true,
		TakeAddresses: true, Name: "a", Queues: 1, Owner: 1, Group: 1, Mode: 1, NetNS: "a", Persist: true, Disabled: true,
	}
	printed := func(c Config) string { // as a device that is none does it
		return State{Name: c.Name, MTU: c.deviceMTU(), Networks: c.Networks, report: report{config: c, queues: c.Queues}}.String()
	}
	v := reflect.ValueOf(full)
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		c := full
		if name == "Mode" {
			c.Disabled = false // else that is the mode
		}
		base := printed(c)
		if name == "Logger" {
			continue // says nothing of the device
		}
		if v.Field(i).IsZero() {
			t.Errorf("%s: give it a value here", name)
		}
		reflect.ValueOf(&c).Elem().Field(i).SetZero()
		if printed(c) == base {
			t.Errorf("Config.%s does not show", name)
		}
	}
	stats := reflect.TypeFor[Stats]()
	for i := range stats.NumField() {
		var s State
		reflect.ValueOf(&s.report.stats).Elem().Field(i).SetUint(987654321)
		if strings.Count(s.String(), " 987654321") != 1 {
			t.Errorf("Stats.%s does not show once", stats.Field(i).Name)
		}
	}
}

func TestNamesOfKinds(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{EventUp.String(), "up"},
		{EventDegraded.String(), "degraded"},
		{EventKind(0).String(), "event(0)"},
		{EventKind(200).String(), "event(200)"},
		{Event{Kind: EventGone}.String(), "gone"},
		{Event{Kind: EventRestored, N: 3}.String(), "restored (3)"},
		{Event{Kind: EventShadowed, N: 2, Err: errors.Join(errors.New("one"), errors.New("two\x00"))}.String(), `shadowed (2): one; two\x00`},
		{Create.String(), "create"},
		{AttachOrCreate.String(), "attach or create"},
		{Mode(9).String(), "mode(9)"},
		{Offload(0).String(), "none"},
		{(OffloadTCP | OffloadUDP).String(), "tcp+udp"},
		{Offload(5).String(), "tcp+offload(4)"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
	for k := EventUp; k <= EventDegraded; k++ {
		if strings.HasPrefix(k.String(), "event(") {
			t.Errorf("kind %d has no name", k)
		}
	}
}
