package overlay

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// The dump in full: what it says is read by people and cut by their scripts, so a change of it is a change of the contract.
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
		Name: "tun0", Index: 7, MTU: 1400, Up: true, Networks: cfg.Networks, Offload: OffloadTCP, Learned: 12,
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
	const want = `device tun0 index 7 link up mtu 1400 txqueuelen 900 queues 2 offload tcp learned 12
config mode attach-or-create netns "/run/netns/a b" owner 1000 group 100 persist on protocol 77 filter off heal on link-local on take-addresses off refused-offload udp
follow tables 254,100 read-buffer 1048576 max 0
network 10.42.0.1/24 mtu 1400 mss 1360
network fd42::1/64 mtu 1280 mss 1220
route 192.168.7.0/24 via 10.42.0.2*1 10.42.0.3*3 layer static metric 0 table 254 mtu 1400 mss 1360
route 2001:db8::/32 via fd42::2*1 layer static metric 5 table 100 mtu 1300 mss 1240
route 203.0.113.0/24 on-link layer static metric 0 table 254 mtu 1400 mss 1360 steer-only
route fd42::/64 on-link layer static metric 256 table 254 mtu 1280 mss 1220
count read packets 1 bytes 2 super 3 invalid 4 dropped 5
count write packets 6 bytes 7 super 8 refused 9 filtered 10 down 11
count control overruns 12 resyncs 13 restores 14 restore-fails 15 offload-fails 16 events-missed 17
note no ears
note two; lines and \x1b[31mred
`
	if got := s.String(); got != want {
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
