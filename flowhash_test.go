package overlay

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"testing"
)

var (
	flowA4, flowB4 = netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("192.168.77.200")
	flowA6, flowB6 = netip.MustParseAddr("fd00::1:2"), netip.MustParseAddr("2001:db8:7::c0de")
)

// flow4 returns an IPv4 packet without options.
func flow4(src, dst netip.Addr, proto byte, payload ...byte) []byte {
	p := make([]byte, headerLen4, headerLen4+len(payload))
	p[0], p[8], p[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(p[2:], uint16(headerLen4+len(payload)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	return append(p, payload...)
}

// flow6 returns an IPv6 packet whose first header is next.
func flow6(src, dst netip.Addr, next byte, payload ...byte) []byte {
	p := make([]byte, headerLen6, headerLen6+len(payload))
	p[0], p[6], p[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	copy(p[8:], src.AsSlice())
	copy(p[24:], dst.AsSlice())
	return append(p, payload...)
}

// flowPorts returns the beginning of a transport header and eight bytes more.
func flowPorts(src, dst uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	return append(b, "whatever"...)
}

// flowICMP returns an ICMP message: type, code 0, checksum, identifier, sequence 9, body.
func flowICMP(kind byte, identifier uint16, body ...byte) []byte {
	b := []byte{kind, 0, 0xab, 0xcd, byte(identifier >> 8), byte(identifier), 0, 9}
	return append(b, body...)
}

// flowFragment4 turns an IPv4 packet into a fragment: an offset in 8 bytes, and whether more follow.
func flowFragment4(p []byte, offset uint16, more bool) []byte {
	p = slices.Clone(p)
	if more {
		offset |= 0x2000
	}
	binary.BigEndian.PutUint16(p[6:], offset)
	return p
}

// extension6 returns an IPv6 extension header of 8+8*n bytes (AH: 8+4*n) before rest.
func extension6(next byte, n int, rest ...byte) []byte {
	return append(append([]byte{next, byte(n)}, make([]byte, 6+8*n)...), rest...)
}

func authentication6(next byte, n int, rest ...byte) []byte {
	return append(append([]byte{next, byte(n)}, bytes.Repeat([]byte{0x55}, 6+4*n)...), rest...)
}

func flowFragment6(next byte, offset uint16, more bool, rest ...byte) []byte {
	field := offset<<3 | 6 // the reserved bits do not count
	if more {
		field |= 1
	}
	return append([]byte{next, 0, byte(field >> 8), byte(field), 1, 2, 3, 4}, rest...)
}

func changedFlow(p []byte, change func(p []byte)) []byte {
	p = slices.Clone(p)
	change(p)
	return p
}

func flowOptions4(p []byte) []byte { // four bytes of no-operation
	p = slices.Insert(slices.Clone(p), headerLen4, 1, 1, 1, 1)
	p[0]++
	return p
}

func TestFlowHashSame(t *testing.T) {
	tcp4, tcp6 := flow4(flowA4, flowB4, protoTCP, flowPorts(1000, 443)...), flow6(flowA6, flowB6, protoTCP, flowPorts(1000, 443)...)
	udp4, udp6 := flow4(flowA4, flowB4, protoUDP), flow6(flowA6, flowB6, protoUDP) // without ports
	echo4, echo6 := flow4(flowA4, flowB4, protoICMP, flowICMP(8, 77)...), flow6(flowA6, flowB6, protoICMP6, flowICMP(128, 77)...)
	other := netip.MustParseAddr("10.9.9.9")
	router := netip.MustParseAddr("fd00::99")
	for _, c := range []struct {
		name string
		a, b []byte
	}{
		{"v4: reply", tcp4, flow4(flowB4, flowA4, protoTCP, flowPorts(443, 1000)...)},
		{"v4: TTL, TOS, ID, DF and the reserved flag", tcp4, changedFlow(tcp4, func(p []byte) { p[1], p[4], p[6], p[8] = 7, 8, 0xc0, 9 })},
		{"v4: options", tcp4, flowOptions4(tcp4)},
		{"v4: payload", tcp4, changedFlow(tcp4, func(p []byte) { p[25]++ })},
		{"v4: cut behind the ports", tcp4, tcp4[:24]},
		{"v4: wrong total length", tcp4, changedFlow(tcp4, func(p []byte) { p[2], p[3] = 0, 0 })},
		{"v4: options beyond the packet", udp4, changedFlow(flow4(flowA4, flowB4, protoUDP, flowPorts(5, 6)...), func(p []byte) { p[0] = 0x4f })},
		{"v4: header length 4", udp4, changedFlow(flow4(flowA4, flowB4, protoUDP, flowPorts(5, 6)...), func(p []byte) { p[0] = 0x41 })},
		{"v4: ports cut", udp4, flow4(flowA4, flowB4, protoUDP, 1, 2, 3)},
		{"v4: first and second fragment", flowFragment4(flow4(flowA4, flowB4, protoUDP, flowPorts(5, 6)...), 0, true), flowFragment4(flow4(flowA4, flowB4, protoUDP, flowPorts(7, 8)...), 64, true)},
		{"v4: first and last fragment", flowFragment4(flow4(flowA4, flowB4, protoUDP, flowPorts(5, 6)...), 0, true), flowFragment4(udp4, 128, false)},
		{"v4: fragments of both directions", flowFragment4(udp4, 0, true), flowFragment4(flow4(flowB4, flowA4, protoUDP), 128, false)},
		{"v4: fragments of an ICMP error", flowFragment4(flow4(flowA4, flowB4, protoICMP, flowICMP(3, 0, tcp4...)...), 0, true), flowFragment4(flow4(flowA4, flowB4, protoICMP), 9, false)},
		{"v4: no ports", flow4(flowA4, flowB4, 47, 1, 2, 3, 4), flow4(flowB4, flowA4, 47, 5, 6, 7, 8)},
		{"v4: echo and reply", echo4, flow4(flowB4, flowA4, protoICMP, flowICMP(0, 77)...)},
		{"v4: echoes", echo4, changedFlow(echo4, func(p []byte) { p[27]++ })},
		{"v4: timestamp and reply", flow4(flowA4, flowB4, protoICMP, flowICMP(13, 77)...), flow4(flowB4, flowA4, protoICMP, flowICMP(14, 77)...)},
		{"v4: ICMP without identifier", flow4(flowA4, flowB4, protoICMP, flowICMP(9, 77)...), flow4(flowA4, flowB4, protoICMP, flowICMP(10, 78)...)},
		{"v4: echo cut", flow4(flowA4, flowB4, protoICMP, flowICMP(8, 77)[:7]...), flow4(flowA4, flowB4, protoICMP)},
		{"v4: unreachable", tcp4, flow4(other, flowA4, protoICMP, flowICMP(3, 1, tcp4...)...)},
		{"v4: source quench", tcp4, flow4(other, flowA4, protoICMP, flowICMP(4, 2, tcp4...)...)},
		{"v4: redirect", tcp4, flow4(other, flowA4, protoICMP, flowICMP(5, 3, tcp4...)...)},
		{"v4: time exceeded, header and 8 bytes", tcp4, flow4(other, flowA4, protoICMP, flowICMP(11, 4, tcp4[:28]...)...)},
		{"v4: parameter problem, from the other direction", tcp4, flow4(other, flowB4, protoICMP, flowICMP(12, 5, flow4(flowB4, flowA4, protoTCP, flowPorts(443, 1000)...)...)...)},
		{"v4: error about a packet with options", tcp4, flowOptions4(flow4(other, flowA4, protoICMP, flowICMP(3, 1, flowOptions4(tcp4)...)...))},
		{"v4: error about an echo", echo4, flow4(other, flowA4, protoICMP, flowICMP(3, 1, echo4...)...)},
		{"v4: error about a fragment", flowFragment4(tcp4, 0, true), flow4(other, flowA4, protoICMP, flowICMP(3, 1, flowFragment4(tcp4, 0, true)...)...)},
		{"v4: error about an error", flow4(flowA4, flowB4, protoICMP), flow4(other, flowA4, protoICMP, flowICMP(3, 1, flow4(flowA4, flowB4, protoICMP, flowICMP(3, 1, tcp4...)...)...)...)},
		{"v4: error that quotes too little", flow4(flowA4, flowB4, protoICMP), flow4(flowA4, flowB4, protoICMP, flowICMP(3, 1, tcp4[:19]...)...)},
		{"v4: error that quotes IPv6", flow4(flowA4, flowB4, protoICMP), flow4(flowA4, flowB4, protoICMP, flowICMP(3, 1, tcp6...)...)},
		{"v4: IPv6's extension headers mean nothing", flow4(flowA4, flowB4, protoDstOpts), flow4(flowA4, flowB4, protoDstOpts, extension6(protoTCP, 0, flowPorts(1, 2)...)...)},

		{"v6: reply", tcp6, flow6(flowB6, flowA6, protoTCP, flowPorts(443, 1000)...)},
		{"v6: traffic class, flow label, hop limit", tcp6, changedFlow(tcp6, func(p []byte) { p[0], p[1], p[2], p[3], p[7] = 0x6f, 0xff, 1, 2, 3 })},
		{"v6: wrong length", tcp6, changedFlow(tcp6, func(p []byte) { p[4], p[5] = 0, 0 })},
		{"v6: cut behind the ports", tcp6, tcp6[:44]},
		{"v6: hop-by-hop", tcp6, flow6(flowA6, flowB6, protoHopByHop, extension6(protoTCP, 1, flowPorts(1000, 443)...)...)},
		{"v6: routing", tcp6, flow6(flowA6, flowB6, protoRouting, extension6(protoTCP, 2, flowPorts(1000, 443)...)...)},
		{"v6: destination options", tcp6, flow6(flowB6, flowA6, protoDstOpts, extension6(protoTCP, 0, flowPorts(443, 1000)...)...)},
		{"v6: authentication", tcp6, flow6(flowA6, flowB6, protoAH, authentication6(protoTCP, 4, flowPorts(1000, 443)...)...)},
		{"v6: atomic fragment", tcp6, flow6(flowA6, flowB6, protoFragment, flowFragment6(protoTCP, 0, false, flowPorts(1000, 443)...)...)},
		{"v6: all of them", tcp6, flow6(flowA6, flowB6, protoHopByHop, extension6(protoDstOpts, 1, extension6(protoRouting, 3, extension6(protoFragment, 0,
			flowFragment6(protoAH, 0, false, authentication6(protoDstOpts, 1, extension6(protoTCP, 0, flowPorts(1000, 443)...)...)...)...)...)...)...)},
		{"v6: first and second fragment", flow6(flowA6, flowB6, protoFragment, flowFragment6(protoUDP, 0, true, flowPorts(5, 6)...)...), flow6(flowA6, flowB6, protoFragment, flowFragment6(protoUDP, 100, true, flowPorts(7, 8)...)...)},
		{"v6: first and last fragment", flow6(flowA6, flowB6, protoFragment, flowFragment6(protoUDP, 0, true, flowPorts(5, 6)...)...), flow6(flowA6, flowB6, protoFragment, flowFragment6(protoUDP, 200, false)...)},
		{
			"v6: fragments behind hop-by-hop, options in the first",
			flow6(flowA6, flowB6, protoHopByHop, extension6(protoFragment, 0, flowFragment6(protoDstOpts, 0, true, extension6(protoUDP, 0, flowPorts(5, 6)...)...)...)...),
			flow6(flowB6, flowA6, protoHopByHop, extension6(protoFragment, 0, flowFragment6(protoDstOpts, 8, false, extension6(protoTCP, 0, flowPorts(5, 6)...)...)...)...),
		},
		{"v6: fragment has the protocol behind it", udp6, flow6(flowA6, flowB6, protoFragment, flowFragment6(protoUDP, 200, false)...)},
		{"v6: fragments of an ICMP error", flow6(flowA6, flowB6, protoFragment, flowFragment6(protoICMP6, 0, true, flowICMP(3, 0, tcp6...)...)...), flow6(flowA6, flowB6, protoICMP6)},
		{"v6: extension header cut", flow6(flowA6, flowB6, protoRouting), flow6(flowA6, flowB6, protoRouting, extension6(protoTCP, 2, flowPorts(1, 2)...)[:20]...)},
		{"v6: fragment header cut", flow6(flowA6, flowB6, protoFragment), flow6(flowA6, flowB6, protoFragment, flowFragment6(protoTCP, 1, true)[:7]...)},
		{"v6: no next header", flow6(flowA6, flowB6, 59), flow6(flowA6, flowB6, protoDstOpts, extension6(59, 0, 1, 2, 3, 4)...)},
		{"v6: echo and reply", echo6, flow6(flowB6, flowA6, protoICMP6, flowICMP(129, 77)...)},
		{"v6: neighbour discovery", flow6(flowA6, flowB6, protoICMP6, flowICMP(135, 1)...), flow6(flowB6, flowA6, protoICMP6, flowICMP(136, 2)...)},
		{"v6: unreachable", tcp6, flow6(router, flowA6, protoICMP6, flowICMP(1, 1, tcp6...)...)},
		{"v6: too big", tcp6, flow6(router, flowA6, protoICMP6, flowICMP(2, 2, tcp6...)...)},
		{"v6: time exceeded", tcp6, flow6(router, flowB6, protoICMP6, flowICMP(3, 3, flow6(flowB6, flowA6, protoTCP, flowPorts(443, 1000)...)...)...)},
		{"v6: parameter problem", tcp6, flow6(router, flowA6, protoICMP6, flowICMP(4, 4, tcp6[:48]...)...)},
		{"v6: experimental error", tcp6, flow6(router, flowA6, protoICMP6, flowICMP(127, 4, tcp6[:48]...)...)},
		{
			"v6: error behind and about extension headers", tcp6,
			flow6(router, flowA6, protoDstOpts, extension6(protoICMP6, 0, flowICMP(2, 2, flow6(flowA6, flowB6, protoRouting, extension6(protoTCP, 2, flowPorts(1000, 443)...)...)...)...)...),
		},
		{"v6: error about an error", flow6(flowA6, flowB6, protoICMP6), flow6(router, flowA6, protoICMP6, flowICMP(1, 1, flow6(flowA6, flowB6, protoICMP6, flowICMP(1, 1, tcp6...)...)...)...)},
		{"v6: error that quotes too little", flow6(flowA6, flowB6, protoICMP6), flow6(flowA6, flowB6, protoICMP6, flowICMP(1, 1, tcp6[:39]...)...)},
		{"v6: error that quotes IPv4", flow6(flowA6, flowB6, protoICMP6), flow6(flowA6, flowB6, protoICMP6, flowICMP(1, 1, tcp4...)...)},
	} {
		if got, want := FlowHash(c.b), FlowHash(c.a); got != want || want == 0 {
			t.Errorf("%s: got %#08x, want %#08x", c.name, got, want)
		}
	}
}

func TestFlowHashDiffers(t *testing.T) {
	var packets [][]byte
	for _, proto := range []byte{protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite, 47, protoICMP, protoICMP6} {
		packets = append(
			packets,
			flow4(flowA4, flowB4, proto), flow4(flowA4, flowB4.Next(), proto), flow4(flowA4.Next(), flowB4, proto), flow4(flowA4, flowA4, proto), flow4(flowB4, flowB4, proto),
			flow6(flowA6, flowB6, proto), flow6(flowA6, flowB6.Next(), proto), flow6(flowA6.Next(), flowB6, proto), flow6(flowA6, flowA6, proto), flow6(flowB6, flowB6, proto),
		)
	}
	for _, proto := range []byte{protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite} {
		for _, pair := range [][2]uint16{{1, 2}, {2, 1}, {1, 1}, {2, 2}, {0, 3}} { // {2, 1} is another flow unless the addresses swap too
			packets = append(packets, flow4(flowA4, flowB4, proto, flowPorts(pair[0], pair[1])...), flow6(flowA6, flowB6, proto, flowPorts(pair[0], pair[1])...))
		}
	}
	for _, identifier := range []uint16{1, 2, 256} {
		packets = append(
			packets,
			flow4(flowA4, flowB4, protoICMP, flowICMP(8, identifier)...), flow6(flowA6, flowB6, protoICMP6, flowICMP(128, identifier)...),
		)
	}
	chain := flowPorts(4, 5)
	next := byte(protoTCP)
	for range maxExtensions {
		chain = extension6(next, 0, chain...)
		next = protoDstOpts
	}
	packets = append(packets, flow6(flowA6, flowB6, next, chain...), flow6(flowA6, flowB6, next, extension6(next, 0, chain...)...)) // within the bound, beyond it
	seen := map[uint32]int{}
	for i, p := range packets {
		h := FlowHash(p)
		if k, ok := seen[h]; ok {
			t.Errorf("% x and % x have the same hash %#08x", packets[k], p, h)
		}
		seen[h] = i
	}
	if within, want := FlowHash(flow6(flowA6, flowB6, next, chain...)), FlowHash(flow6(flowA6, flowB6, protoTCP, flowPorts(4, 5)...)); within != want {
		t.Errorf("%d extension headers: got %#08x, want %#08x", maxExtensions, within, want)
	}
	if beyond, want := FlowHash(flow6(flowA6, flowB6, next, extension6(next, 0, chain...)...)), FlowHash(flow6(flowA6, flowB6, protoDstOpts)); beyond != want {
		t.Errorf("%d extension headers: got %#08x, want %#08x", maxExtensions+1, beyond, want)
	}
}

// The hash is the same in every process and on every machine, so also tomorrow's.
func TestFlowHashGolden(t *testing.T) {
	for _, c := range []struct {
		p    []byte
		want uint32
	}{
		{flow4(flowA4, flowB4, protoTCP, flowPorts(1000, 443)...), 0xa808f07c},
		{flow6(flowA6, flowB6, protoUDP, flowPorts(1000, 443)...), 0xbcc4cc7c},
		{flow4(flowA4, flowB4, 47), 0xfc56fa5a},
	} {
		if got := FlowHash(c.p); got != c.want {
			t.Errorf("% x: got %#08x, want %#08x", c.p, got, c.want)
		}
	}
}

func TestNotIP(t *testing.T) {
	tcp4, tcp6 := flow4(flowA4, flowB4, protoTCP, flowPorts(1, 2)...), flow6(flowA6, flowB6, protoTCP, flowPorts(1, 2)...)
	for _, c := range []struct {
		name string
		p    []byte
		dst  netip.Addr
	}{
		{"nil", nil, netip.Addr{}},
		{"one byte", []byte{0x45}, netip.Addr{}},
		{"IPv4 of 19 bytes", tcp4[:19], netip.Addr{}},
		{"IPv4 of 20 bytes", tcp4[:20], flowB4},
		{"IPv4 packet", tcp4, flowB4},
		{"IPv6 of 39 bytes", tcp6[:39], netip.Addr{}},
		{"IPv6 of 40 bytes", tcp6[:40], flowB6},
		{"IPv6 packet", tcp6, flowB6},
		{"version 0", make([]byte, 60), netip.Addr{}},
		{"version 5", bytes.Repeat([]byte{0x55}, 60), netip.Addr{}},
		{"version 15", bytes.Repeat([]byte{0xff}, 60), netip.Addr{}},
		{"IPv6 to a mapped address", flow6(flowA6, netip.MustParseAddr("::ffff:1.2.3.4"), 59), netip.MustParseAddr("::ffff:1.2.3.4")},
	} {
		if dst, ok := packetDst(c.p); dst != c.dst || ok != c.dst.IsValid() {
			t.Errorf("%s: destination %v %v, want %v", c.name, dst, ok, c.dst)
		}
		if h := FlowHash(c.p); (h == 0) != !c.dst.IsValid() {
			t.Errorf("%s: hash %#08x", c.name, h)
		}
	}
}

func TestFlowHashAllocs(t *testing.T) {
	tcp4, tcp6 := flow4(flowA4, flowB4, protoTCP, flowPorts(1, 2)...), flow6(flowA6, flowB6, protoHopByHop, extension6(protoTCP, 0, flowPorts(1, 2)...)...)
	for _, p := range [][]byte{nil, tcp4, tcp6, flow4(flowA4, flowB4, protoICMP, flowICMP(3, 0, tcp4...)...), flow6(flowA6, flowB6, protoICMP6, flowICMP(3, 0, tcp6...)...)} {
		if n := testing.AllocsPerRun(100, func() { FlowHash(p); packetDst(p) }); n != 0 {
			t.Errorf("% x: %v allocations, want 0", p, n)
		}
	}
}

// Each bit of addresses and ports must change each bit of the hash in half of all flows.
func TestFlowHashAvalanche(t *testing.T) {
	r := gatewayRand(t)
	const trials = 4096
	for _, c := range []struct {
		name     string
		p        []byte
		from, to int // the flow's bytes
	}{
		{"v4", flow4(flowA4, flowB4, protoTCP, flowPorts(0, 0)...), 12, 24},
		{"v6", flow6(flowA6, flowB6, protoTCP, flowPorts(0, 0)...), 8, 44},
	} {
		for bit := c.from * 8; bit < c.to*8; bit++ {
			var flips [32]int
			for range trials {
				for i := c.from; i < c.to; i++ {
					c.p[i] = byte(r.Uint32())
				}
				h := FlowHash(c.p)
				c.p[bit/8] ^= 1 << (bit % 8)
				for h ^= FlowHash(c.p); h != 0; h &= h - 1 {
					flips[bits.TrailingZeros32(h)]++
				}
			}
			for out, n := range flips {
				// 7 deviations: of 12,000 counts none leaves them by chance.
				if math.Abs(float64(n)-trials/2) > 7*math.Sqrt(trials)/2 {
					t.Errorf("%s: bit %d flips bit %d of the hash in %d of %d flows", c.name, bit, out, n, trials)
				}
			}
		}
	}
}

// structuredFlows are flows as a real network has them: little differs, and that in order.
var structuredFlows = []struct {
	name string
	p    []byte
	set  func(p []byte, i uint32) // makes p a packet of flow i
}{
	{"v4 ports", flow4(flowA4, flowB4, protoTCP, flowPorts(0, 0)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[20:], i<<16|i>>16)
	}},
	{"v4 even ports", flow4(flowA4, flowB4, protoUDP, flowPorts(0, 0)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[20:], i<<17|i>>15)
	}},
	{"v4 hosts, equal ports", flow4(flowA4, flowB4, protoUDP, flowPorts(51820, 51820)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[16:], 10<<24|i)
	}},
	{"v4 pairs of hosts", flow4(flowA4, flowB4, 47), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[12:], 10<<24|i>>10)
		binary.BigEndian.PutUint32(p[16:], 11<<24|i&1023)
	}},
	{"v4 pings", flow4(flowA4, flowB4, protoICMP, flowICMP(8, 0)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[12:], 10<<24|i>>16)
		binary.BigEndian.PutUint16(p[24:], uint16(i))
	}},
	{"v6 ports", flow6(flowA6, flowB6, protoUDP, flowPorts(0, 0)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[40:], i<<16|i>>16)
	}},
	{"v6 hosts", flow6(flowA6, flowB6, protoTCP, flowPorts(40000, 443)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[36:], i)
	}},
	{"v6 networks", flow6(flowA6, flowB6, protoTCP, flowPorts(40000, 443)...), func(p []byte, i uint32) {
		binary.BigEndian.PutUint32(p[28:], i)
	}},
}

func TestFlowHashShares(t *testing.T) {
	const flows = 1 << 18
	var sets []*gatewaySet
	for _, weights := range [][]int{{1, 1}, {1, 2, 3}, repeatedWeight(1, 64), {heaviestWeight, 1000, heaviestWeight / 2}} {
		sets = append(sets, newGatewaySet(weightedList(weights...)))
	}
	hashes := make([]uint32, flows)
	for _, c := range structuredFlows {
		for i := range hashes {
			c.set(c.p, uint32(i))
			hashes[i] = FlowHash(c.p)
		}
		for _, s := range sets {
			counts, shares := make([]int, len(s.gateways)), make([]float64, len(s.gateways))
			for i, gw := range s.gateways {
				shares[i] = float64(gw.Weight)
			}
			for _, h := range hashes {
				counts[s.pick(h)]++
			}
			if x := chiExcess(counts, shares); x > chiTooMuch {
				t.Errorf("%s over %v: %v, %.1f deviations beyond chance", c.name, Gateways{s}, counts, x)
			}
		}
		slices.Sort(hashes)
		const want = flows / 2 * (flows / float64(1<<32)) // birthdays
		if n := flows - len(slices.Compact(hashes)); float64(n) > want+8*math.Sqrt(want) {
			t.Errorf("%s: %d collisions, want about %.0f", c.name, n, want)
		}
	}
}
