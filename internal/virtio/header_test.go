package virtio

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestHeaderCodec(t *testing.T) {
	h := Header{Flags: 1, GSOType: GSOTCPv6 | GSOECN, HdrLen: 0x1122, GSOSize: 0x3344, CsumStart: 0x5566, CsumOffset: 0x7788}
	want := []byte{1, 0x84}
	for _, x := range []uint16{0x1122, 0x3344, 0x5566, 0x7788} {
		want = binary.NativeEndian.AppendUint16(want, x)
	}
	b := make([]byte, HeaderLen+1)
	if !h.Encode(b) || !bytes.Equal(b[:HeaderLen], want) || b[HeaderLen] != 0 {
		t.Errorf("Encode: got %x, want %x and a byte untouched", b, want)
	}
	if got, ok := DecodeHeader(b); !ok || got != h {
		t.Errorf("DecodeHeader: got %+v, %v, want %+v", got, ok, h)
	}
	for n := range HeaderLen {
		short := make([]byte, n)
		if h.Encode(short) || !bytes.Equal(short, make([]byte, n)) {
			t.Errorf("Encode into %d bytes: got %x, want a refusal", n, short)
		}
		if got, ok := DecodeHeader(short); ok || got != (Header{}) {
			t.Errorf("DecodeHeader of %d bytes: got %+v, %v", n, got, ok)
		}
	}
}

// headerOf returns the kernel's header for the superpacket of s.
func headerOf(s *shape) Header {
	h := Header{
		Flags: FlagNeedsCsum, GSOSize: uint16(s.size),
		CsumStart: uint16(s.transport()), CsumOffset: uint16(s.csumOffset()),
	}
	switch {
	case s.udp:
		h.GSOType = GSOUDPL4
	case s.v6:
		h.GSOType = GSOTCPv6
	default:
		h.GSOType = GSOTCPv4
	}
	return h
}

func TestAcceptSuperpacket(t *testing.T) {
	r := seeded(t)
	for range 700 {
		s := randomShape(r)
		h, data := headerOf(s), s.super()
		h.HdrLen = uint16(r.Uint32()) // a forwarded packet's is the whole first packet
		if !s.udp && r.IntN(2) == 0 {
			h.GSOType |= GSOECN
		}
		size, n := h.Accept(data)
		if size != s.size || n != s.segments() {
			t.Fatalf("%v: got size %d, %d segments, want %d, %d", s, size, n, s.size, s.segments())
		}
		if !bytes.Equal(data, s.super()) {
			t.Fatalf("%v: Accept changed the superpacket", s)
		}
	}
}

// TestAcceptPlain: a checksum that the kernel left unfinished is what a sender without offload would have written.
func TestAcceptPlain(t *testing.T) {
	r := seeded(t)
	for range 700 {
		s := randomShape(r)
		s.size = len(s.payload)
		h, data := headerOf(s), s.super()
		h.GSOType, h.GSOSize, h.HdrLen = GSONone, 0, 0
		size, n := h.Accept(data)
		// The field may be 0 in TCP, where Accept, as the kernel, writes 0xffff.
		want := s.segment(0)
		field := want[s.transport()+s.csumOffset():]
		binary.BigEndian.PutUint16(field, mangleZero(binary.BigEndian.Uint16(field)))
		if size != 0 || n != 1 || !bytes.Equal(data, want) {
			t.Fatalf("%v: got size %d, %d segments, or another packet", s, size, n)
		}
	}
}

func TestAcceptChecksumZero(t *testing.T) {
	data := make([]byte, 40)
	h := Header{Flags: FlagNeedsCsum, CsumStart: 20, CsumOffset: 6}
	copy(data[26:], []byte{0xff, 0xff})
	if _, n := h.Accept(data); n != 1 || data[26] != 0xff || data[27] != 0xff {
		t.Errorf("got %d segments, checksum %x, want 1, ffff", n, data[26:28])
	}
}

// headerCase is a header that contradicts its packet, or just does not.
type headerCase struct {
	name   string
	header Header
	packet []byte
	want   int // segments
}

// headerCases are those of kernel.md C5 that a reader can meet.
func headerCases() []headerCase {
	s4, s6, u4, u6 := tcp4(0x18, 30, 10), over6(tcp4(0x18, 30, 10)), udp4(30, 10), over6(udp4(30, 10))
	h4, h6, hu, hu6 := headerOf(s4), headerOf(s6), headerOf(u4), headerOf(u6)
	with := func(h Header, change func(*Header)) Header {
		change(&h)
		return h
	}
	plain := Header{Flags: FlagNeedsCsum, CsumStart: 20, CsumOffset: 16}
	return append([]headerCase{
		{"TCP", h4, s4.super(), 3},
		{"TCP over IPv6", h6, s6.super(), 3},
		{"UDP", hu, u4.super(), 3},
		{"UDP over IPv6", hu6, u6.super(), 3},
		{"v6 type on IPv4", with(h4, func(h *Header) { h.GSOType = GSOTCPv6 }), s4.super(), 0},
		{"v4 type on IPv6", with(h6, func(h *Header) { h.GSOType = GSOTCPv4 }), s6.super(), 0},
		{"TCP type on UDP", with(hu, func(h *Header) { h.GSOType = GSOTCPv4 }), u4.super(), 0},
		{"UDP type on TCP", with(h4, func(h *Header) { h.GSOType = GSOUDPL4 }), s4.super(), 0},
		{"ECN", with(h4, func(h *Header) { h.GSOType |= GSOECN }), s4.super(), 3},
		{"ECN on UDP", with(hu, func(h *Header) { h.GSOType |= GSOECN }), u4.super(), 0},
		{"ECN alone", with(h4, func(h *Header) { h.GSOType = GSOECN }), s4.super(), 0},
		{"UFO", with(hu, func(h *Header) { h.GSOType = GSOUDP }), u4.super(), 0},
		{"type 2", with(h4, func(h *Header) { h.GSOType = 2 }), s4.super(), 0},
		{"tunnel bits", with(h4, func(h *Header) { h.GSOType |= 0x60 }), s4.super(), 0},
		{"size 0", with(h4, func(h *Header) { h.GSOSize = 0 }), s4.super(), 0},
		{"size 65535", with(h4, func(h *Header) { h.GSOSize = 65_535 }), s4.super(), 1},
		{"header length 0", with(h4, func(h *Header) { h.HdrLen = 0 }), s4.super(), 3},
		{"header length 65535", with(h4, func(h *Header) { h.HdrLen = 65_535 }), s4.super(), 3},
		{"no flag", with(h4, func(h *Header) { h.Flags, h.CsumStart, h.CsumOffset = 0, 0, 0 }), s4.super(), 3},
		{"verified", with(h4, func(h *Header) { h.Flags = FlagDataValid }), s4.super(), 3},
		{"RSC", with(h4, func(h *Header) { h.Flags = FlagRSCInfo }), s4.super(), 3},
		{"start off", with(h4, func(h *Header) { h.CsumStart++ }), s4.super(), 0},
		{"start 65535", with(h4, func(h *Header) { h.CsumStart = 65_535 }), s4.super(), 0},
		{"UDP's offset in TCP", with(h4, func(h *Header) { h.CsumOffset = 6 }), s4.super(), 0},
		{"TCP's offset in UDP", with(hu, func(h *Header) { h.CsumOffset = 16 }), u4.super(), 0},
		{"offset 65535", with(h4, func(h *Header) { h.CsumOffset = 65_535 }), s4.super(), 0},
		{"superpacket of nothing", h4, nil, 0},
		{"superpacket without payload", h4, s4.super()[:40], 0},
	}, []headerCase{
		{"plain", Header{}, s4.segment(0), 1},
		{"plain, no IP", Header{}, []byte{0}, 1},
		{"plain, empty", Header{}, nil, 0},
		{"plain, size says nothing", Header{GSOSize: 7, HdrLen: 9}, s4.segment(0), 1},
		{"plain, unfinished", plain, s4.segment(0), 1},
		{"plain, checksum at the end", plain, make([]byte, 38), 1},
		{"plain, checksum half outside", plain, make([]byte, 37), 0},
		{"plain, start at the end", Header{Flags: FlagNeedsCsum, CsumStart: 38}, make([]byte, 38), 0},
		{"plain, start past the end", Header{Flags: FlagNeedsCsum, CsumStart: 39}, make([]byte, 38), 0},
		{"plain, sum of 16 bits wraps", Header{Flags: FlagNeedsCsum, CsumStart: 65_530, CsumOffset: 10}, make([]byte, 60), 0},
		{"plain, both 65535", Header{Flags: FlagNeedsCsum, CsumStart: 65_535, CsumOffset: 65_535}, make([]byte, 65_535), 0},
		{"plain, unfinished, empty", Header{Flags: FlagNeedsCsum}, nil, 0},
	}...)
}

func TestAccept(t *testing.T) {
	for _, c := range headerCases() {
		packet := bytes.Clone(c.packet)
		size, n := c.header.Accept(packet)
		wantSize := 0
		if c.header.GSOType != GSONone && c.want > 0 {
			wantSize = int(c.header.GSOSize)
		}
		if size != wantSize || n != c.want {
			t.Errorf("%s: got size %d, %d segments, want %d, %d", c.name, size, n, wantSize, c.want)
		}
		if c.want == 0 && !bytes.Equal(packet, c.packet) {
			t.Errorf("%s: a refused packet was changed", c.name)
		}
	}
}

// FuzzDecodeHeader: any header on any packet.
func FuzzDecodeHeader(f *testing.F) {
	for _, c := range headerCases() {
		b := make([]byte, HeaderLen, HeaderLen+len(c.packet))
		c.header.Encode(b)
		f.Add(append(b, c.packet...))
	}
	f.Add([]byte{1, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, ok := DecodeHeader(b)
		if ok != (len(b) >= HeaderLen) {
			t.Fatalf("%d bytes: %v", len(b), ok)
		}
		if !ok {
			return
		}
		again := make([]byte, HeaderLen)
		if h.Encode(again); !bytes.Equal(again, b[:HeaderLen]) {
			t.Fatalf("%x encodes as %x", b[:HeaderLen], again)
		}
		checkAccept(t, h, b[HeaderLen:])
	})
}

func checkAccept(t *testing.T, h Header, packet []byte) {
	before := bytes.Clone(packet)
	size, n := h.Accept(packet)
	if h.GSOType == GSONone && n == 1 && h.Flags&FlagNeedsCsum != 0 {
		start, field := int(h.CsumStart), int(h.CsumStart)+int(h.CsumOffset)
		want := mangleZero(^slowSum(before[start:]))
		if got := binary.BigEndian.Uint16(packet[field:]); got != want {
			t.Fatalf("got checksum %#x, want %#x", got, want)
		}
		copy(packet[field:field+2], before[field:])
	}
	if !bytes.Equal(packet, before) {
		t.Fatal("more than a checksum was changed")
	}
	if h.GSOType == GSONone {
		if size != 0 || n != 0 && n != 1 {
			t.Fatalf("plain: got size %d, %d segments", size, n)
		}
		return
	}
	var p Superpacket
	ok := p.Parse(packet, int(h.GSOSize))
	switch {
	case n == 0 && size == 0: // refused: TestAccept says when
	case !ok || size != int(h.GSOSize) || n != p.Segments():
		t.Fatalf("%+v: got size %d, %d segments", h, size, n)
	}
}

func TestAcceptAllocs(t *testing.T) {
	s := tcp4(0x18, 60_000, 1448)
	data, super := s.super(), headerOf(s)
	plain := super
	plain.GSOType = GSONone
	allocs := testing.AllocsPerRun(100, func() {
		super.Accept(data)
		plain.Accept(data)
	})
	if allocs != 0 {
		t.Errorf("got %v allocations, want 0", allocs)
	}
}
