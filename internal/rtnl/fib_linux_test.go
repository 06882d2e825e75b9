package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

// packed builds messages by hand: numbers of 16 and 32 bits, bytes, and text for addresses.
func packed(parts ...any) []byte {
	var b []byte
	for _, part := range parts {
		switch v := part.(type) {
		case uint16:
			b = binary.NativeEndian.AppendUint16(b, v)
		case uint32:
			b = binary.NativeEndian.AppendUint32(b, v)
		case byte:
			b = append(b, v)
		case []byte:
			b = append(b, v...)
		case string:
			b = append(b, netip.MustParseAddr(v).AsSlice()...)
		}
	}
	return b
}

// with appends an attribute.
func with(b []byte, kind uint16, value ...any) []byte {
	v := packed(value...)
	b = packed(b, uint16(4+len(v)), kind, v)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

// rtm is a route's header: family, destination and source length, TOS, table, protocol, scope, type.
func rtm(h ...byte) []byte { return append(h, 0, 0, 0, 0) }

// leg is a struct rtnexthop with attributes.
func leg(link uint32, hops, flags byte, attributes []byte) []byte {
	return packed(uint16(8+len(attributes)), flags, hops, link, attributes)
}

func newRoute(body []byte) Message { return Message{Type: unix.RTM_NEWROUTE, Body: body} }

func TestDecodeFIBRoute(t *testing.T) {
	v4 := rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 1)
	v6 := rtm(unix.AF_INET6, 64, 0, 0, 0, 4, 0, 1)
	net4, net6 := []any{"192.0.2.0"}, []any{"2001:db8::"}
	via := packed(uint16(unix.AF_INET6), "fd00::2")
	legs := packed(leg(7, 0, 0, with(nil, unix.RTA_GATEWAY, "10.0.0.2")), leg(8, 43, unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN, with(nil, unix.RTA_VIA, via)))
	tests := []struct {
		name string
		body []byte
		want string // prefix table metric tos pref type proto nhid legs
	}{
		{"default, on-link", with(rtm(unix.AF_INET, 0, 0, 0, 254, 3, 253, 1), unix.RTA_OIF, uint32(7)), "0.0.0.0/0 254 0 0 0 1 3 0 [{invalid IP 7 1 false}]"},
		{"IPv6 default", with(rtm(unix.AF_INET6, 0, 0, 0, 254, 3, 0, 1), unix.RTA_OIF, uint32(7)), "::/0 254 0 0 0 1 3 0 [{invalid IP 7 1 false}]"},
		{"gateway", with(with(with(v4, unix.RTA_DST, net4...), unix.RTA_OIF, uint32(7)), unix.RTA_GATEWAY, "10.0.0.2"), "192.0.2.0/24 254 0 0 0 1 3 0 [{10.0.0.2 7 1 false}]"},
		{"A15 via inet6", with(with(with(v4, unix.RTA_DST, net4...), unix.RTA_VIA, via), unix.RTA_OIF, uint32(7)), "192.0.2.0/24 254 0 0 0 1 3 0 [{fd00::2 7 1 false}]"},
		{"A15 v4-mapped", with(with(v6, unix.RTA_DST, net6...), unix.RTA_GATEWAY, "::ffff:10.0.0.2"), "2001:db8::/64 0 0 0 0 1 4 0 [{10.0.0.2 0 1 false}]"},
		{"table, metric, preference", with(with(with(with(v6, unix.RTA_DST, net6...), unix.RTA_TABLE, uint32(1000)), unix.RTA_PRIORITY, uint32(1024)), unix.RTA_PREF, byte(0xff)), "2001:db8::/64 1000 1024 0 3 1 4 0 []"},
		{"multipath", with(with(v4, unix.RTA_DST, net4...), unix.RTA_MULTIPATH, legs), "192.0.2.0/24 254 0 0 0 1 3 0 [{10.0.0.2 7 1 false} {fd00::2 8 44 true}]"},
		{"TOS, blackhole, nexthop object", with(with(rtm(unix.AF_INET, 24, 0, 16, 254, 3, 0, 6), unix.RTA_DST, net4...), rtaNHID, uint32(9)), "192.0.2.0/24 254 0 16 0 6 3 9 []"},
		{"empty", nil, "error"},
		{"header alone cut", v4[:11], "error"},
		{"no such family", rtm(7, 0, 0, 0, 254, 3, 0, 1), "error"},
		{"33 bits", with(rtm(unix.AF_INET, 33, 0, 0, 254, 3, 0, 1), unix.RTA_DST, net4...), "error"},
		{"129 bits", with(rtm(unix.AF_INET6, 129, 0, 0, 254, 3, 0, 1), unix.RTA_DST, net6...), "error"},
		{"host bits", with(rtm(unix.AF_INET, 16, 0, 0, 254, 3, 0, 1), unix.RTA_DST, net4...), "error"},
		{"destination of another length", with(v4, unix.RTA_DST, net6...), "error"},
		{"metric of another length", with(with(v4, unix.RTA_DST, net4...), unix.RTA_PRIORITY, uint16(1)), "error"},
		{"short RTA_VIA", with(with(v4, unix.RTA_DST, net4...), unix.RTA_VIA, byte(2)), "error"},
		{"leg of length 0", with(with(v4, unix.RTA_DST, net4...), unix.RTA_MULTIPATH, make([]byte, 8)), "error"},
		{"leg longer than the rest", with(with(v4, unix.RTA_DST, net4...), unix.RTA_MULTIPATH, packed(uint16(99), make([]byte, 6))), "error"},
		{"half a leg", with(with(v4, unix.RTA_DST, net4...), unix.RTA_MULTIPATH, legs[:5]), "error"},
	}
	var r kernel.FIBRoute
	for _, test := range tests {
		got := "error"
		if err := DecodeFIBRoute(newRoute(test.body), &r); err == nil {
			got = fmt.Sprint(r.Prefix, " ", r.Table, r.Metric, r.TOS, r.Pref, r.Type, r.Protocol, r.NextHop, " ", r.Legs)
		}
		if got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

// Of a route's age only when it goes out of use is told, and only IPv6 has that.
func TestDecodeExpires(t *testing.T) {
	age := func(words ...any) []byte { return packed(words...) }
	for _, test := range []struct {
		family byte
		age    []byte
		want   int32
	}{
		{unix.AF_INET6, age(uint32(1), uint32(2), uint32(300), uint32(0)), 300},
		{unix.AF_INET6, age(uint32(1), uint32(2), ^uint32(0)), -1},
		{unix.AF_INET6, age(uint32(1), uint32(2)), 0},
		{unix.AF_INET, age(uint32(1), uint32(2), uint32(300), uint32(0)), 0},
	} {
		r := kernel.FIBRoute{Expires: 7}
		body := with(rtm(test.family, 0, 0, 0, 254, 3, 0, 1), unix.RTA_CACHEINFO, test.age)
		if err := DecodeFIBRoute(newRoute(body), &r); err != nil || r.Expires != test.want {
			t.Errorf("family %d, %x: %d, %v, want %d", test.family, test.age, r.Expires, err, test.want)
		}
	}
}

// Detail tells apart what the kernel tells apart, and nothing else.
func TestDetail(t *testing.T) {
	base := with(with(rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 1), unix.RTA_DST, "192.0.2.0"), unix.RTA_OIF, uint32(7))
	other := func(change func(b []byte)) []byte {
		b := append([]byte(nil), base...)
		change(b)
		return b
	}
	tests := []struct {
		name string
		body []byte
		same bool
	}{
		{"age", with(base, unix.RTA_CACHEINFO, make([]byte, 32)), true},
		{"dead", other(func(b []byte) { b[8] |= unix.RTNH_F_DEAD | unix.RTNH_F_LINKDOWN }), true},
		{"offloaded", other(func(b []byte) { b[9] |= 0x40 }), true},
		{"source", with(base, unix.RTA_PREFSRC, "10.0.0.1"), false},
		{"MTU", with(base, unix.RTA_METRICS, with(nil, unix.RTAX_MTU, uint32(1300))), false},
		{"onlink", other(func(b []byte) { b[8] |= unix.RTNH_F_ONLINK }), false},
		{"scope", other(func(b []byte) { b[6] = 253 }), false},
	}
	var first, second kernel.FIBRoute
	if err := DecodeFIBRoute(newRoute(base), &first); err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		if err := DecodeFIBRoute(newRoute(test.body), &second); err != nil {
			t.Fatal(err)
		}
		if same := string(first.Detail) == string(second.Detail); same != test.same {
			t.Errorf("%s: the same %v, want %v: %x, %x", test.name, same, test.same, first.Detail, second.Detail)
		}
	}
	six := with(with(rtm(unix.AF_INET6, 64, 0, 0, 254, 3, 0, 1), unix.RTA_DST, "2001:db8::"), unix.RTA_OIF, uint32(7))
	changed := with(with(six, unix.RTA_PREFSRC, "fd00::1"), unix.RTA_METRICS, with(nil, unix.RTAX_MTU, uint32(1300)))
	if err := errors.Join(DecodeFIBRoute(newRoute(six), &first), DecodeFIBRoute(newRoute(changed), &second)); err != nil || string(first.Detail) != string(second.Detail) {
		t.Errorf("IPv6, what changes untold: %v: %x, %x", err, first.Detail, second.Detail)
	}
	// The legs of a nexthop object are not the route's: with nexthop_compat_mode off they are not told.
	object := with(rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 1), rtaNHID, uint32(9))
	told := with(with(object, unix.RTA_OIF, uint32(7)), unix.RTA_GATEWAY, "10.0.0.2")
	told[8] |= unix.RTNH_F_ONLINK
	if err := DecodeFIBRoute(newRoute(with(object, unix.RTA_DST, "192.0.2.0")), &first); err != nil {
		t.Fatal(err)
	}
	if err := DecodeFIBRoute(newRoute(with(told, unix.RTA_DST, "192.0.2.0")), &second); err != nil || string(first.Detail) != string(second.Detail) {
		t.Errorf("%v: %x, %x", err, first.Detail, second.Detail)
	}
}

func TestMayConcern(t *testing.T) {
	const created, prepended, replaced = unix.NLM_F_CREATE | unix.NLM_F_EXCL, unix.NLM_F_CREATE, unix.NLM_F_REPLACE
	header := rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 1)
	foreign := with(header, unix.RTA_OIF, uint32(8))
	tests := []struct {
		name        string
		kind, flags uint16
		body        []byte
		want        bool
	}{
		{"through us", unix.RTM_NEWROUTE, created, with(header, unix.RTA_OIF, uint32(7)), true},
		{"through another", unix.RTM_NEWROUTE, created, foreign, false},
		{"through none", unix.RTM_NEWROUTE, created, header, false},
		{"throw", unix.RTM_NEWROUTE, created, rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 9), true},
		{"joins a key", unix.RTM_NEWROUTE, prepended, foreign, true},
		{"A9 replaced", unix.RTM_NEWROUTE, replaced, foreign, true},
		{"multipath", unix.RTM_NEWROUTE, created, with(header, unix.RTA_MULTIPATH|unix.NLA_F_NESTED, []byte{}), true},
		{"nexthop object", unix.RTM_NEWROUTE, created, with(foreign, rtaNHID, uint32(1)), true},
		{"deleted", unix.RTM_DELROUTE, 0, foreign, true},
		{"short", unix.RTM_NEWROUTE, replaced, header[:11], false},
		{"lying attribute", unix.RTM_NEWROUTE, created, append(header[:12:12], 99, 0, 4, 0, 7, 0, 0, 0), false},
		{"no route", unix.RTM_NEWLINK, replaced, foreign, false},
	}
	for _, test := range tests {
		m := Message{Type: test.kind, Flags: test.flags, Body: test.body}
		if got := MayConcern(m, 7); got != test.want {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
	m := Message{Type: unix.RTM_NEWROUTE, Flags: created, Body: with(foreign, unix.RTA_DST, "192.0.2.0")}
	var r kernel.FIBRoute
	if n := testing.AllocsPerRun(100, func() { MayConcern(m, 7); _ = DecodeFIBRoute(m, &r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestChangeOf(t *testing.T) {
	for flags, want := range map[uint16]kernel.Change{
		unix.NLM_F_CREATE | unix.NLM_F_EXCL:                     kernel.Created,
		unix.NLM_F_CREATE | unix.NLM_F_EXCL | unix.NLM_F_APPEND: kernel.Created,
		unix.NLM_F_CREATE:                     kernel.Prepended,
		unix.NLM_F_CREATE | unix.NLM_F_APPEND: kernel.Appended,
		unix.NLM_F_REPLACE:                    kernel.Replaced,
		0:                                     kernel.Refreshed,
	} {
		if got := ChangeOf(Message{Type: unix.RTM_NEWROUTE, Flags: flags}); got != want {
			t.Errorf("%#x: got %d, want %d", flags, got, want)
		}
		if got := ChangeOf(Message{Type: unix.RTM_DELROUTE, Flags: flags}); got != kernel.Deleted {
			t.Errorf("deleted with %#x: got %d", flags, got)
		}
	}
}

func TestDecodeNextHop(t *testing.T) {
	head := func(family byte, flags uint32) []byte { return packed(family, byte(0), byte(0), byte(0), flags) }
	tests := []struct {
		name string
		body []byte
		want string
	}{
		{"gateway", with(with(with(head(unix.AF_INET6, 0), unix.NHA_ID, uint32(5)), unix.NHA_OIF, uint32(7)), unix.NHA_GATEWAY, "fd00::2"), "{5 {fd00::2 7 1 false} false [] false}"},
		{"dead", with(with(head(unix.AF_INET, unix.RTNH_F_DEAD), unix.NHA_ID, uint32(5)), unix.NHA_OIF, uint32(7)), "{5 {invalid IP 7 1 true} false [] false}"},
		{"blackhole", with(with(head(unix.AF_INET, 0), unix.NHA_ID, uint32(5)), unix.NHA_BLACKHOLE), "{5 {invalid IP 0 1 false} true [] false}"},
		{"forwarding database", with(with(head(unix.AF_INET, 0), unix.NHA_ID, uint32(5)), nhaFDB), "{5 {invalid IP 0 1 false} false [] true}"},
		{"V14 weights of 16 bits", with(with(head(0, 0), unix.NHA_ID, uint32(5)), unix.NHA_GROUP, uint32(1), byte(43), byte(1), uint16(0), uint32(2), byte(0), byte(0), uint16(0)), "{5 {invalid IP 0 1 false} false [{1 300} {2 1}] false}"},
		{"no id", with(head(unix.AF_INET, 0), unix.NHA_OIF, uint32(7)), "error"},
		{"half a group", with(with(head(0, 0), unix.NHA_ID, uint32(5)), unix.NHA_GROUP, uint32(1)), "error"},
		{"gateway of another family", with(with(head(unix.AF_INET, 0), unix.NHA_ID, uint32(5)), unix.NHA_GATEWAY, "fd00::2"), "error"},
		{"short", make([]byte, 7), "error"},
	}
	for _, test := range tests {
		got := "error"
		if n, err := DecodeNextHop(Message{Type: unix.RTM_NEWNEXTHOP, Body: test.body}); err == nil {
			got = fmt.Sprint(n)
		}
		if got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

func TestDecodeRule(t *testing.T) {
	head := func(h ...byte) []byte { return append(h, make([]byte, 12-len(h))...) }
	plain := head(unix.AF_INET, 0, 0, 0, 254, 0, 0, ruleLookup)
	tests := []struct {
		name string
		body []byte
		want string // IPv6 priority table lookup goto selective beside to suppress
	}{
		{"main", with(plain, unix.FRA_PRIORITY, uint32(32766)), "{false 32766 254 true 0 false false invalid Prefix -1}"},
		{"IPv6, large table", with(with(head(unix.AF_INET6, 0, 0, 0, 0, 0, 0, ruleLookup), unix.FRA_TABLE, uint32(1000)), unix.FRA_SUPPRESS_PREFIXLEN, uint32(0)), "{true 0 1000 true 0 false false invalid Prefix 0}"},
		{"no suppression", with(plain, unix.FRA_SUPPRESS_PREFIXLEN, ^uint32(0)), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"mark", with(plain, unix.FRA_FWMARK, uint32(1)), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"mark without the bits of a mask", with(with(plain, unix.FRA_FWMASK, uint32(0xff)), unix.FRA_FWMARK, uint32(0x100)), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"mark of nothing", with(plain, unix.FRA_FWMASK, uint32(0xff)), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"interface", with(plain, unix.FRA_IIFNAME, []byte("tun0\x00")), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"the host's own", with(plain, unix.FRA_IIFNAME, []byte("lo\x00")), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"source", head(unix.AF_INET, 0, 8, 0, 254, 0, 0, ruleLookup), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"TOS", head(unix.AF_INET, 0, 0, 16, 254, 0, 0, ruleLookup), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"DSCP 0", with(plain, fraDSCP, byte(0)), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"destination", with(head(unix.AF_INET, 8, 0, 0, 254, 0, 0, ruleLookup), unix.FRA_DST, "10.0.0.0"), "{false 0 254 true 0 true false 10.0.0.0/8 -1}"},
		{"not for any packet", head(unix.AF_INET, 0, 0, 0, 254, 0, 0, ruleLookup, ruleInvert), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"not with a mark", with(head(unix.AF_INET, 0, 0, 0, 254, 0, 0, ruleLookup, ruleInvert), unix.FRA_FWMARK, uint32(1)), "{false 0 254 true 0 false false invalid Prefix -1}"},
		{"not to a destination", with(head(unix.AF_INET, 8, 0, 0, 254, 0, 0, ruleLookup, ruleInvert), unix.FRA_DST, "10.0.0.0"), "{false 0 254 true 0 true false invalid Prefix -1}"},
		{"to a destination, with a mark", with(head(unix.AF_INET, 8, 0, 0, 254, 0, 0, ruleLookup), unix.FRA_FWMARK, uint32(1)), "{false 0 254 true 0 true true invalid Prefix -1}"},
		{"goto", with(head(unix.AF_INET, 0, 0, 0, 0, 0, 0, ruleGoto), unix.FRA_GOTO, uint32(99)), "{false 0 0 false 99 false false invalid Prefix -1}"},
		{"blackhole", head(unix.AF_INET, 0, 0, 0, 0, 0, 0, 6), "{false 0 0 false 0 false false invalid Prefix -1}"},
		{"another family", head(128, 0, 0, 0, 254, 0, 0, ruleLookup), "error"},
		{"priority of another length", with(plain, unix.FRA_PRIORITY, uint16(1)), "error"},
		{"short", plain[:11], "error"},
	}
	for _, test := range tests {
		got := "error"
		if r, err := DecodeRule(Message{Type: unix.RTM_NEWRULE, Body: test.body}); err == nil {
			got = fmt.Sprint(r)
		}
		if got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

// FuzzDecodeFIBRoute: what can be read has a prefix without host bits and legs with weights. What the prefilter lets pass
// over is no route through the interface.
func FuzzDecodeFIBRoute(f *testing.F) {
	base := with(with(rtm(unix.AF_INET, 24, 0, 0, 254, 3, 0, 1), unix.RTA_DST, "192.0.2.0"), unix.RTA_PRIORITY, uint32(9))
	legs := packed(leg(7, 0, 0, with(nil, unix.RTA_GATEWAY, "10.0.0.2")), leg(8, 43, 1, with(nil, unix.RTA_VIA, uint16(unix.AF_INET6), "fd00::2")))
	addSeeds(f, newRoute(with(base, unix.RTA_OIF, uint32(7))), newRoute(with(base, unix.RTA_MULTIPATH, legs)), newRoute(with(base, rtaNHID, uint32(3))),
		newRoute(with(with(rtm(unix.AF_INET6, 64, 0, 0, 0, 4, 0, 1), unix.RTA_DST, "2001:db8::"), unix.RTA_PREF, byte(1))),
		Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: with(base, unix.RTA_OIF, uint32(7))})
	r := kernel.FIBRoute{}
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		m := Message{Type: kind, Flags: flags, Body: b}
		concerns := MayConcern(m, 7)
		if DecodeFIBRoute(m, &r) != nil {
			return
		}
		if !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked() || len(r.Legs) > len(b) || len(r.Detail) > 2*len(b) {
			t.Fatalf("%+v of %x", r, b)
		}
		for _, leg := range r.Legs {
			if leg.Weight == 0 || leg.Weight > 256 || leg.Gateway.Is4In6() || leg.Gateway.IsValid() && leg.Gateway.IsUnspecified() {
				t.Fatalf("%+v of %x", r, b)
			}
			if !concerns && leg.Link == 7 && kind == unix.RTM_NEWROUTE {
				t.Fatalf("passed over: %+v of %x", r, b)
			}
		}
		if ChangeOf(m) == 0 {
			t.Fatalf("no change of flags %#x", flags)
		}
	})
}

// FuzzDecodeNextHop: what can be read has an id, and members with weights of 16 bits.
func FuzzDecodeNextHop(f *testing.F) {
	head := make([]byte, 8)
	head[0] = unix.AF_INET
	id := with(head, unix.NHA_ID, uint32(5))
	for _, b := range [][]byte{with(with(id, unix.NHA_OIF, uint32(7)), unix.NHA_GATEWAY, "10.0.0.2"), with(id, unix.NHA_BLACKHOLE), with(id, unix.NHA_GROUP, uint32(1), uint32(2))} {
		addSeeds(f, Message{Type: unix.RTM_NEWNEXTHOP, Body: b})
	}
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		n, err := DecodeNextHop(Message{Type: kind, Flags: flags, Body: b})
		if err != nil {
			return
		}
		if n.ID == 0 || n.Weight != 1 || len(n.Group) > len(b)/8 {
			t.Fatalf("%+v of %x", n, b)
		}
		for _, member := range n.Group {
			if member.Weight == 0 || member.Weight > 1<<16 {
				t.Fatalf("%+v of %x", n, b)
			}
		}
	})
}

// FuzzDecodeRule: what can be read is of a known family.
func FuzzDecodeRule(f *testing.F) {
	head := make([]byte, 12)
	head[0], head[4], head[7] = unix.AF_INET, 254, ruleLookup
	addSeeds(f, Message{Type: unix.RTM_NEWRULE, Body: with(with(head, unix.FRA_PRIORITY, uint32(5)), unix.FRA_SUPPRESS_PREFIXLEN, uint32(0))},
		Message{Type: unix.RTM_NEWRULE, Body: with(with(head, unix.FRA_TABLE, uint32(500)), unix.FRA_FWMARK, uint32(1))})
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		r, err := DecodeRule(Message{Type: kind, Flags: flags, Body: b})
		if err == nil && (len(b) < 12 || r.Suppress < -1 || r.Suppress > 128 || r.IPv6 != (b[0] == unix.AF_INET6)) {
			t.Fatalf("%+v of %x", r, b)
		}
	})
}
