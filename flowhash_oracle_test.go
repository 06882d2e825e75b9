package overlay

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// flowKey is what FlowHash must see in a packet, and nothing else.
type flowKey struct {
	ends  [2]netip.AddrPort // sorted
	proto byte
}

func newFlowKey(src, dst netip.Addr, proto byte, srcPort, dstPort uint16) flowKey {
	k := flowKey{[2]netip.AddrPort{netip.AddrPortFrom(src, srcPort), netip.AddrPortFrom(dst, dstPort)}, proto}
	slices.SortFunc(k.ends[:], netip.AddrPort.Compare)
	return k
}

// packet returns the plainest packet of the flow.
func (k flowKey) packet(reverse bool) []byte {
	src, dst := k.ends[0], k.ends[1]
	if reverse {
		src, dst = dst, src
	}
	build, echo := flow4, byte(8)
	if src.Addr().Is6() {
		build, echo = flow6, 128
	}
	switch {
	case src.Port() == 0 && dst.Port() == 0:
		return build(src.Addr(), dst.Addr(), k.proto)
	case k.proto == protoICMP || k.proto == protoICMP6:
		return build(src.Addr(), dst.Addr(), k.proto, flowICMP(echo, src.Port())...)
	default:
		return build(src.Addr(), dst.Addr(), k.proto, flowPorts(src.Port(), dst.Port())...)
	}
}

// keyOf is the slow oracle: it reads a packet for what FlowHash's doc comment promises.
func keyOf(p []byte, quoted bool) (flowKey, bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		n := 4 * int(p[0]&0xf)
		if p[6]&0x20 != 0 || p[6]&0x1f != 0 || p[7] != 0 || n < 20 || n > len(p) {
			return newFlowKey(src, dst, p[9], 0, 0), true
		}
		return keyOfUpper(src, dst, p[9], p[n:], quoted), true
	case len(p) >= 40 && p[0]>>4 == 6:
		src, dst := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		proto, rest := p[6], p[40:]
		for n := 0; slices.Contains([]byte{0, 43, 44, 51, 60}, proto); n++ {
			if len(rest) < 8 || n == 8 {
				return newFlowKey(src, dst, proto, 0, 0), true
			}
			size := 8 * (1 + int(rest[1]))
			if proto == 51 {
				size = 4 * (2 + int(rest[1]))
			}
			if proto == 44 {
				if rest[2] != 0 || rest[3]>>3 != 0 || rest[3]&1 != 0 {
					return newFlowKey(src, dst, rest[0], 0, 0), true
				}
				size = 8
			}
			if len(rest) < size {
				return newFlowKey(src, dst, proto, 0, 0), true
			}
			proto, rest = rest[0], rest[size:]
		}
		return keyOfUpper(src, dst, proto, rest, quoted), true
	}
	return flowKey{}, false
}

func keyOfUpper(src, dst netip.Addr, proto byte, payload []byte, quoted bool) flowKey {
	portful := slices.Contains([]byte{6, 17, 33, 132, 136}, proto)
	if portful && len(payload) >= 4 {
		return newFlowKey(src, dst, proto, uint16(payload[0])<<8|uint16(payload[1]), uint16(payload[2])<<8|uint16(payload[3]))
	}
	errors, echoes := []byte{3, 4, 5, 11, 12}, []byte{0, 8, 13, 14}
	own := byte(protoICMP)
	if src.Is6() {
		own, errors, echoes = protoICMP6, nil, []byte{128, 129}
		for kind := range byte(128) {
			errors = append(errors, kind)
		}
	}
	if proto == own && len(payload) >= 8 {
		if identifier := uint16(payload[4])<<8 | uint16(payload[5]); slices.Contains(echoes, payload[0]) {
			return newFlowKey(src, dst, proto, identifier, identifier)
		}
		if slices.Contains(errors, payload[0]) && !quoted {
			if k, ok := keyOf(payload[8:], true); ok && k.ends[0].Addr().BitLen() == src.BitLen() {
				return k
			}
		}
	}
	return newFlowKey(src, dst, proto, 0, 0)
}

func FuzzFlowHash(f *testing.F) {
	tcp4, tcp6 := flow4(flowA4, flowB4, protoTCP, flowPorts(1000, 443)...), flow6(flowA6, flowB6, protoTCP, flowPorts(1000, 443)...)
	for _, p := range [][]byte{
		nil,
		{0x45},
		{0x60},
		tcp4, tcp6, flowOptions4(tcp4), flowFragment4(tcp4, 5, true),
		flow4(flowB4, flowA4, protoICMP, flowICMP(3, 0, tcp4...)...), flow4(flowB4, flowA4, protoICMP, flowICMP(8, 99)...),
		flow6(flowB6, flowA6, protoICMP6, flowICMP(2, 0, tcp6...)...), flow6(flowB6, flowA6, protoICMP6, flowICMP(128, 99)...),
		flow6(flowA6, flowB6, protoHopByHop, extension6(protoFragment, 1, flowFragment6(protoUDP, 0, true, flowPorts(1, 2)...)...)...),
		flow6(flowA6, flowB6, protoAH, authentication6(protoFragment, 4, flowFragment6(protoDstOpts, 0, false, extension6(protoUDP, 0, flowPorts(1, 2)...)...)...)...),
	} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		before := bytes.Clone(p)
		h := FlowHash(p)
		dst, ok := packetDst(p)
		if !bytes.Equal(p, before) {
			t.Fatal("the packet was changed")
		}
		k, isIP := keyOf(p, false)
		if ok != isIP || ok != dst.IsValid() {
			t.Fatalf("destination %v %v of a packet that is IP: %v", dst, ok, isIP)
		}
		if !isIP {
			if h != 0 {
				t.Fatalf("got %#08x for what is not IP", h)
			}
			return
		}
		for _, reverse := range []bool{false, true} {
			if want := FlowHash(k.packet(reverse)); h != want {
				t.Fatalf("got %#08x, want %#08x of the flow %v", h, want, k)
			}
		}
		checkFragments(t, p)
	})
}

// checkFragments makes fragments of an IP packet's datagram and checks that they are alike.
func checkFragments(t *testing.T, p []byte) {
	t.Helper()
	var first, middle, last []byte
	if p[0]>>4 == 4 {
		first, middle, last = flowFragment4(p, 0, true), flowFragment4(p, 7, true), flowFragment4(p, 8191, false)
	} else {
		next := p[6]
		make6 := func(offset uint16, more bool, rest []byte) []byte {
			whole := append(slices.Clone(p[:headerLen6]), flowFragment6(next, offset, more, rest...)...)
			whole[6] = protoFragment
			return whole
		}
		first, middle, last = make6(0, true, p[headerLen6:]), make6(7, true, nil), make6(8191, false, []byte("anything"))
	}
	h := FlowHash(first)
	if FlowHash(middle) != h || FlowHash(last) != h {
		t.Fatalf("fragments: first %#08x, middle %#08x, last %#08x", h, FlowHash(middle), FlowHash(last))
	}
}

func TestFlowHashAgainstOracle(t *testing.T) {
	r := gatewayRand(t)
	for range 20_000 {
		p := randomFlowPacket(r)
		k, ok := keyOf(p, false)
		if !ok {
			continue
		}
		if got, want := FlowHash(p), FlowHash(k.packet(r.IntN(2) == 0)); got != want {
			t.Fatalf("% x: got %#08x, want %#08x of the flow %v", p, got, want, k)
		}
		checkFragments(t, p)
	}
}

// randomFlowPacket returns an IP packet, mostly well-formed, often with extension headers or a quoted packet, sometimes cut.
func randomFlowPacket(r *rand.Rand) []byte {
	body := make([]byte, r.IntN(30))
	for i := range body {
		body[i] = byte(r.Uint32())
	}
	protos := []byte{protoTCP, protoUDP, protoSCTP, protoDCCP, protoUDPLite, 47, 59, protoICMP, protoICMP6, byte(r.Uint32())}
	next := protos[r.IntN(len(protos))]
	if r.IntN(3) == 0 {
		next = []byte{protoICMP, protoICMP6}[r.IntN(2)]
		body = flowICMP(byte(r.IntN(16)), uint16(r.Uint32()), randomFlowPacket(r)...)
	}
	var p []byte
	if r.IntN(2) == 0 {
		p = flow4(gatewayAddr(r.IntN(5)), gatewayAddr(r.IntN(5)), next, body...)
		if r.IntN(4) == 0 {
			p = flowFragment4(p, uint16(r.IntN(3)), r.IntN(2) == 0)
		}
		if r.IntN(4) == 0 {
			p = flowOptions4(p)
		}
	} else {
		for range r.IntN(4) {
			switch r.IntN(5) {
			case 0:
				body, next = flowFragment6(next, uint16(r.IntN(2)), r.IntN(2) == 0, body...), protoFragment
			case 1:
				body, next = flowFragment6(next, 0, false, body...), protoFragment
			case 2:
				body, next = authentication6(next, r.IntN(5), body...), protoAH
			default:
				body, next = extension6(next, r.IntN(3), body...), []byte{protoHopByHop, protoRouting, protoDstOpts}[r.IntN(3)]
			}
		}
		p = flow6(flowA6, flowB6, next, body...)
	}
	if r.IntN(5) == 0 {
		p = p[:r.IntN(len(p)+1)]
	}
	return p
}

func BenchmarkFlowHash(b *testing.B) {
	tcp4, tcp6 := flow4(flowA4, flowB4, protoTCP, flowPorts(1000, 443)...), flow6(flowA6, flowB6, protoTCP, flowPorts(1000, 443)...)
	for _, c := range []struct {
		name string
		p    []byte
	}{
		{"tcp4", tcp4},
		{"tcp6", tcp6},
		{"fragment4", flowFragment4(tcp4, 5, true)},
		{"extensions6", flow6(flowA6, flowB6, protoHopByHop, extension6(protoDstOpts, 0, extension6(protoTCP, 0, flowPorts(1000, 443)...)...)...)},
		{"error4", flow4(flowB4, flowA4, protoICMP, flowICMP(3, 0, tcp4...)...)},
		{"error6", flow6(flowB6, flowA6, protoICMP6, flowICMP(2, 0, tcp6...)...)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				FlowHash(c.p)
			}
		})
	}
	packets := make([][]byte, 1<<10)
	for i := range packets {
		c := structuredFlows[i%len(structuredFlows)]
		packets[i] = bytes.Clone(c.p)
		c.set(packets[i], rand.Uint32N(1<<20))
	}
	b.Run("mixed", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			FlowHash(packets[i&(len(packets)-1)])
			i++
		}
	})
}
