package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"example.com/overlay"
)

// Keys as wg genkey makes them, but for the randomness.
const (
	key1 = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
	key2 = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
	key3 = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM="
)

const complete = `# a comment
[Interface]
Address = 10.42.0.1/24, fd42::1/64 # two
Address=10.43.0.1
MTU = 1380
Table = 51
ListenPort = 51820
FwMark = 0xca6c
PrivateKey = ` + key1 + `
DNS = 1.1.1.1, example.com
PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo a = b

[peer]
publickey = ` + key2 + `
PresharedKey = ` + key3 + `
AllowedIPs = 10.42.0.2/32, 192.168.7.9/24
AllowedIPs = ::/0, 192.168.7.0/24
Endpoint = [2001:db8::1]:51820
PersistentKeepalive = 25

[Peer]
PublicKey = ` + key3 + `
AllowedIPs =
PersistentKeepalive = off
`

func TestParseFile(t *testing.T) {
	f, err := parseFile("wg0.conf", complete)
	if err != nil {
		t.Fatal(err)
	}
	prefix := func(s string, line int) at[netip.Prefix] { return at[netip.Prefix]{netip.MustParsePrefix(s), line} }
	secret := func(b byte, line int) at[key] {
		k := at[key]{line: line}
		for i := range k.value {
			k.value[i] = b
		}
		return k
	}
	want := &file{
		name:       "wg0.conf",
		addresses:  []at[netip.Prefix]{prefix("10.42.0.1/24", 3), prefix("fd42::1/64", 3), prefix("10.43.0.1/32", 4)},
		mtu:        at[int64]{1380, 5},
		table:      at[int64]{51, 6},
		listenPort: at[int64]{51820, 7},
		mark:       at[int64]{0xca6c, 8},
		privateKey: secret(1, 9),
		foreign:    []at[string]{{"DNS", 10}, {"PostUp", 11}},
		peers: []*peer{
			{
				line: 13, publicKey: secret(2, 14), presharedKey: secret(3, 15),
				allowed:  []at[netip.Prefix]{prefix("10.42.0.2/32", 16), prefix("192.168.7.0/24", 16), prefix("::/0", 17)},
				endpoint: at[string]{"[2001:db8::1]:51820", 18}, keepalive: at[int64]{25, 19},
			},
			{line: 21, publicKey: secret(3, 22), keepalive: at[int64]{0, 24}},
		},
	}
	if !reflect.DeepEqual(f, want) {
		t.Errorf("got\n%+v, want\n%+v", f, want)
	}
	cfg, err := f.config("wg0")
	if err != nil {
		t.Fatal(err)
	}
	wanted := overlay.Config{
		Name: "wg0", MTU: 1380,
		Networks: []netip.Prefix{f.addresses[0].value, f.addresses[1].value, f.addresses[2].value},
		Routes: []overlay.Route{
			{Prefix: netip.MustParsePrefix("10.42.0.2/32"), Table: 51},
			{Prefix: netip.MustParsePrefix("192.168.7.0/24"), Table: 51},
			{Prefix: netip.MustParsePrefix("::/0"), Table: 51},
		},
	}
	if !reflect.DeepEqual(cfg, wanted) {
		t.Errorf("got\n%+v, want\n%+v", cfg, wanted)
	}
}

// minimal is a file with lines of [Interface] from 3 on, and then lines from its [Peer], line 3 or later, on.
func minimal(inInterface, inPeer string) string {
	text := "[Interface]\nPrivateKey = " + key1 + "\n" + inInterface
	if inPeer != "" {
		text += "[Peer]\nPublicKey = " + key2 + "\n" + inPeer
	}
	return text
}

func TestTable(t *testing.T) {
	for table, want := range map[string]string{
		"": "[{10.0.0.0/8 [] 0 0 0 false}]", "Table = auto\n": "[{10.0.0.0/8 [] 0 0 0 false}]", "Table = off\n": "[]",
		"Table = main\n": "[{10.0.0.0/8 [] 0 0 254 false}]", "Table = 1000\n": "[{10.0.0.0/8 [] 0 0 1000 false}]",
	} {
		f, err := parseFile("wg0.conf", minimal(table, "AllowedIPs = 10.0.0.0/8\n"))
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := f.config("wg0")
		if got := fmt.Sprint(cfg.Routes); got != want || err != nil {
			t.Errorf("%q: routes %s, %v; want %s", table, got, err, want)
		}
	}
}

// TestBadFiles wants all that is wrong, with file, line and key.
func TestBadFiles(t *testing.T) {
	const isDefault = "takes over the host, with it what WireGuard sends: say which table by Table = NUMBER, Table = main if it is meant, or Table = off"
	tests := []struct {
		text string
		want string // one error a line
	}{
		{"", "1: PrivateKey: missing in [Interface]"},
		{"[Interface]\n", "2: PrivateKey: missing in [Interface]"},
		{"MTU = 1\n" + minimal("", ""), "1: MTU: stands before [Interface]"},
		{minimal("MTU\n", ""), "3: MTU: want a key, = and a value"},
		{minimal("= 5\n", ""), "3: ?: want a key, = and a value"},
		{minimal("PrivateKey "+key2+"\n", ""), "3: PrivateKey: want a key, = and a value"},
		{minimal("PrivateKey: "+key2+"\n", ""), "3: PrivateKey: want a key, = and a value"},
		{minimal("", "PresharedKey"+key3+"\n"), "5: ?: want a key, = and a value"},
		{minimal(key2+"\n", ""), "3: ?: want a key, = and a value"},
		{minimal("= "+key2+"\n", ""), "3: ?: want a key, = and a value"},
		{minimal("yAnz5TF+"+key2+"\n", ""), "3: ?: want a key, = and a value"},
		{minimal("\x1b[31mMTU = 1400\n", ""), "3: ?: want a key, = and a value"},
		{minimal("[Interface]\n", ""), "3: [Interface]: again, after line 1"},
		{minimal("[Peers]\nPublicKey = x\n", ""), "3: [Peers]: there are only [Interface] and [Peer]"},
		{minimal("[Peer\nPublicKey = x\n", ""), "3: [Peer: want a ] at its end"},
		{minimal("[[Peer]]\n", ""), "3: [?]: there are only [Interface] and [Peer]"},
		{minimal("Adress = 10.0.0.1\n", ""), "3: Adress: is no key of [Interface]"},
		{minimal("", "MTU = 1400\n"), "5: MTU: is no key of [Peer]"},
		{minimal("Address = 10.0.0.1/33\n", ""), `3: Address: "10.0.0.1/33" is neither an address nor a prefix`},
		{minimal("Address = 10.0.0.1,\n", ""), `3: Address: "" is neither an address nor a prefix`},
		{minimal("Address = fe80::1%eth0\n", ""), `3: Address: "fe80::1%eth0" is neither an address nor a prefix`},
		{minimal("Address = ::ffff:10.0.0.1/120\n", ""), "3: Address: IPv4-mapped: write it as IPv4"},
		{minimal("Address = 10.0.0.1\nAddress = 10.0.0.2, 10.0.0.1\n", ""), "4: Address: the address of 10.0.0.1/32 again"},
		{minimal("MTU = 0\n", ""), `3: MTU: "0": want 68…65535`},
		{minimal("MTU = 1400\nMTU = 1400\n", ""), "4: MTU: again, after line 3"},
		{minimal("MTU = 20\n", ""), `3: MTU: "20": want 68…65535`},
		{minimal("MTU = 1200\nAddress = fd42::1/64\n", ""), "3: MTU: fd42::1/64 is IPv6, which needs 1280 bytes"},
		{minimal("Table = some\n", ""), `3: Table: "some": want 1…2147483647, or auto, or off, or main`},
		{minimal("Table = 255\n", "AllowedIPs = 10.0.0.0/8\n"), "3: Table: the local table is the kernel's"},
		{minimal("ListenPort = 65536\n", ""), `3: ListenPort: "65536": want 0…65535`},
		{minimal("FwMark = 0xx\n", ""), `3: FwMark: "0xx": want 0…4294967295, or off`},
		{"[Interface]\nPrivateKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE\n", "2: PrivateKey: is not 32 bytes in base64\n3: PrivateKey: missing in [Interface]"},
		{"[Interface]\nPrivateKey = AQEB\n", "2: PrivateKey: is not 32 bytes in base64\n3: PrivateKey: missing in [Interface]"},
		{minimal("[Peer]\nAllowedIPs = 10.0.0.1\n", ""), "3: PublicKey: missing in [Peer]"},
		{minimal("", "[Peer]\nPublicKey = "+key2+"\n"), "6: PublicKey: is that of line 4"},
		{minimal("", "PresharedKey = ?\n"), "5: PresharedKey: is not 32 bytes in base64"},
		{minimal("", "AllowedIPs = 10.0.0.1/x\n"), `5: AllowedIPs: "10.0.0.1/x" is neither an address nor a prefix`},
		{minimal("", "AllowedIPs = 10.0.0.0/8\n[Peer]\nPublicKey = "+key3+"\nAllowedIPs = 10.1.0.0/8\n"), "8: AllowedIPs: 10.0.0.0/8 is another peer's, by line 5"},
		{minimal("", "AllowedIPs = 0.0.0.0/0, ::/0\n"), "5: AllowedIPs: a default route, 0.0.0.0/0, " + isDefault + "\n5: AllowedIPs: a default route, ::/0, " + isDefault},
		{minimal("Table = auto\n", "AllowedIPs = ::/0\n"), "6: AllowedIPs: a default route, ::/0, " + isDefault},
		{minimal("", "AllowedIPs = ::ffff:10.0.0.0/120\n"), "5: AllowedIPs: IPv4-mapped: write it as IPv4"},
		{minimal("", "Endpoint = 192.0.2.1\n"), `5: Endpoint: "192.0.2.1": want HOST:PORT`},
		{minimal("", "Endpoint = 192.0.2.1:0\n"), `5: Endpoint: "192.0.2.1:0": want HOST:PORT`},
		{minimal("", "Endpoint = :51820\n"), `5: Endpoint: ":51820": want HOST:PORT`},
		{minimal("", "PersistentKeepalive = -1\n"), `5: PersistentKeepalive: "-1": want 0…65535, or off`},
		{minimal("MTU = x\nTable = y\n", "Z = 1\n"), "3: MTU: \"x\": want 68…65535\n4: Table: \"y\": want 1…2147483647, or auto, or off, or main\n7: Z: is no key of [Peer]"},
	}
	for _, test := range tests {
		f, err := parseFile("wg0.conf", test.text)
		if err == nil {
			_, err = f.config("wg0")
		}
		want := "wg0.conf:" + strings.ReplaceAll(test.want, "\n", "\nwg0.conf:")
		if err == nil || err.Error() != want {
			t.Errorf("%q:\n%v, want\n%s", test.text, err, want)
		}
	}
}

func TestInterfaceName(t *testing.T) {
	f, err := parseFile("a-name-of-18-bytes.conf", minimal("", ""))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.config("a-name-of-18-bytes")
	if want := "a-name-of-18-bytes.conf: overlay: config: Name"; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v, want %s…", err, want)
	}
}

func TestCommands(t *testing.T) {
	hex := func(b string) string { return strings.Repeat(b, 32) }
	parse := func(text string) *settings {
		f, err := parseFile("wg0.conf", text)
		if err != nil {
			t.Fatal(err)
		}
		s := &settings{file: f}
		if s.endpoints, err = f.resolve(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := parse(minimal("ListenPort = 5\n", "AllowedIPs = 10.0.0.2/32, 10.0.0.3/32\nEndpoint = 192.0.2.2:7\n"))
	have := "private_key=" + hex("01") + "\nlisten_port=5\npublic_key=" + hex("02") + "\nendpoint=192.0.2.99:7\nallowed_ip=10.0.0.2/32\nallowed_ip=10.0.0.3/32\n" +
		"public_key=" + hex("07") + "\nallowed_ip=10.0.0.7/32\n"
	own := "private_key=" + hex("01") + "\nfwmark=0\n"
	first := "public_key=" + hex("02") + "\npreshared_key=" + hex("00") + "\npersistent_keepalive_interval=0\n"
	gone := "public_key=" + hex("07") + "\nremove=true\n"
	tests := []struct {
		name, have string
		before     *settings
		text, want string
	}{
		{
			"at first", "", nil,
			minimal("ListenPort = 5\nFwMark = 8\n", "AllowedIPs = 10.0.0.2/32\nEndpoint = 192.0.2.2:7\n"),
			"listen_port=5\nprivate_key=" + hex("01") + "\nfwmark=8\n" + first + "endpoint=192.0.2.2:7\nallowed_ip=10.0.0.2/32\n",
		},
		{
			"a stranger's peer goes, a roaming one is left where it is", have, before,
			minimal("ListenPort = 5\n", "AllowedIPs = 10.0.0.2/32, 10.0.0.3/32\nEndpoint = 192.0.2.2:7\n"),
			own + gone + first,
		},
		{
			"another endpoint, other addresses, another port", have, before,
			minimal("ListenPort = 6\n", "AllowedIPs = 10.0.0.2/32, 10.0.0.4/32\nEndpoint = 192.0.2.3:7\n"),
			"listen_port=6\n" + own + gone + first + "endpoint=192.0.2.3:7\nallowed_ip=10.0.0.4/32\nallowed_ip=-10.0.0.3/32\n",
		},
		{
			"no port of its own", have, before,
			minimal("", "AllowedIPs = 10.0.0.2/32, 10.0.0.3/32\n"), own + gone + first,
		},
		{
			"no port of its own, and none is open", strings.Replace(have, "listen_port=5\n", "", 1), before,
			minimal("", "AllowedIPs = 10.0.0.2/32, 10.0.0.3/32\n"), "listen_port=0\n" + own + gone + first,
		},
	}
	for _, test := range tests {
		if got := parse(test.text).commands(test.before, test.have); got != test.want {
			t.Errorf("%s:\n%s, want\n%s", test.name, got, test.want)
		}
	}
}

// Of a host's addresses the one in use stays, in whatever order they are told: another would interrupt what goes on.
func TestResolveKeepsWhatIsKnown(t *testing.T) {
	f, err := parseFile("wg0.conf", minimal("", "Endpoint = localhost:7\n"))
	if err != nil {
		t.Fatal(err)
	}
	public := f.peers[0].publicKey.value
	addrs, err := net.DefaultResolver.LookupNetIP(t.Context(), "ip", "localhost")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range append(addrs, netip.MustParseAddr("192.0.2.1")) {
		want := netip.AddrPortFrom(a.Unmap(), 7)
		if a.String() == "192.0.2.1" { // it is localhost's no longer
			want = netip.AddrPortFrom(addrs[0].Unmap(), 7)
		}
		got, err := f.resolve(t.Context(), map[key]netip.AddrPort{public: netip.AddrPortFrom(a.Unmap(), 8)})
		if err != nil || got[public] != want {
			t.Errorf("where %v is known: %v, %v, want %v", a, got[public], err, want)
		}
	}
}

// FuzzParseFile takes any text: what is refused names file, line and key; what is not makes a Config that the library takes or
// refuses in terms of the file, and is the same when its parts are written down and read again.
func FuzzParseFile(f *testing.F) {
	f.Add(complete)
	f.Add(minimal("MTU = x\n", "AllowedIPs = 0.0.0.0/0\n"))
	f.Add("= 1")
	f.Fuzz(func(t *testing.T, text string) {
		file, err := parseFile("wg0.conf", text)
		if err == nil {
			_, err = file.config("wg0")
		}
		if err == nil {
			if again, err := parseFile("wg0.conf", writeDown(file)); err != nil || writeDown(again) != writeDown(file) {
				t.Errorf("written down:\n%s\nread again: %v", writeDown(file), err)
			}
			return
		}
		errs, ok := err.(interface{ Unwrap() []error })
		if !ok {
			t.Fatalf("%T: %v", err, err)
		}
		for _, err := range errs.Unwrap() {
			var at *lineError
			if !errors.As(err, &at) || at.line < 1 || at.line > 1+strings.Count(text, "\n") || at.key == "" {
				t.Errorf("%v, want a line and a key", err)
			}
		}
	})
}

// writeDown is a file that says the same.
func writeDown(f *file) string {
	var b strings.Builder
	line := func(key string, value any) { fmt.Fprintf(&b, "%s = %v\n", key, value) }
	number := func(key string, n at[int64]) {
		if n.line > 0 && !(key == "Table" && n.value < 1) {
			line(key, n.value)
		}
	}
	secret := func(name string, k at[key]) {
		if k.line > 0 {
			line(name, base64.StdEncoding.EncodeToString(k.value[:]))
		}
	}
	b.WriteString("[Interface]\n")
	for _, a := range f.addresses {
		line("Address", a.value)
	}
	number("MTU", f.mtu)
	number("Table", f.table)
	if f.table.value == tableOff {
		line("Table", "off")
	}
	number("ListenPort", f.listenPort)
	number("FwMark", f.mark)
	secret("PrivateKey", f.privateKey)
	for _, p := range f.peers {
		b.WriteString("[Peer]\n")
		secret("PublicKey", p.publicKey)
		secret("PresharedKey", p.presharedKey)
		for _, a := range p.allowed {
			line("AllowedIPs", a.value)
		}
		if p.endpoint.line > 0 {
			line("Endpoint", p.endpoint.value)
		}
		number("PersistentKeepalive", p.keepalive)
	}
	return b.String()
}
