package virtio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"testing"
)

// mustParse returns the parsed superpacket of s.
func mustParse(t testing.TB, s *shape) Superpacket {
	t.Helper()
	var p Superpacket
	if !p.Parse(s.super(), s.size) {
		t.Fatalf("Parse refused %v", s)
	}
	return p
}

// equalSegments compares all segments of p with those that s says.
func equalSegments(t *testing.T, p Superpacket, s *shape) {
	t.Helper()
	if got, want := p.Segments(), s.segments(); got != want {
		t.Fatalf("%v: got %d segments, want %d", s, got, want)
	}
	prefix := []byte("before")
	for i := range s.segments() {
		got, want := p.AppendSegment(prefix, i), s.segment(i)
		if !bytes.Equal(got[:len(prefix)], prefix) {
			t.Fatalf("%v: segment %d changed what dst held", s, i)
		}
		if got = got[len(prefix):]; !bytes.Equal(got, want) {
			t.Fatalf("%v: segment %d:\n got %x\nwant %x", s, i, got[:min(len(got), 120)], want[:min(len(want), 120)])
		}
	}
}

func TestSegmentRandomShapes(t *testing.T) {
	r := seeded(t)
	for range 1500 {
		s := randomShape(r)
		data := s.super()
		before := bytes.Clone(data)
		var p Superpacket
		if !p.Parse(data, s.size) {
			t.Fatalf("Parse refused %v", s)
		}
		equalSegments(t, p, s)
		if !bytes.Equal(data, before) {
			t.Fatalf("%v: the superpacket was changed", s)
		}
	}
}

// TestSegmentStaleFields: what a superpacket's lengths and checksums say makes no difference.
func TestSegmentStaleFields(t *testing.T) {
	r := seeded(t)
	for range 500 {
		s := randomShape(r)
		data := s.super()
		copy(data[s.transport()+s.csumOffset():], randomBytes(r, 2))
		if s.udp {
			copy(data[s.transport()+4:], randomBytes(r, 2))
		}
		if s.v6 {
			copy(data[4:], randomBytes(r, 2))
			data[5] |= 1 // 0 before hop-by-hop options means jumbogram
		} else {
			copy(data[2:], randomBytes(r, 2))
			copy(data[10:], randomBytes(r, 2))
		}
		var p Superpacket
		if !p.Parse(data, s.size) {
			t.Fatalf("Parse refused %v", s)
		}
		equalSegments(t, p, s)
	}
}

// tcp4 and udp4 are the plainest superpackets; tests change one thing in them.
func tcp4(flags uint8, payload, size int) *shape {
	return &shape{src: []byte{10, 0, 0, 1}, dst: []byte{10, 0, 0, 2}, flags: flags, payload: make([]byte, payload), size: size}
}

func udp4(payload, size int) *shape {
	s := tcp4(0, payload, size)
	s.udp = true
	return s
}

func over6(s *shape, extensions ...extension) *shape {
	s.v6, s.src, s.dst, s.extensions = true, bytes.Repeat([]byte{1}, 16), bytes.Repeat([]byte{2}, 16), extensions
	return s
}

func TestSegmentFlags(t *testing.T) {
	const all = 0xff
	p := mustParse(t, tcp4(all, 30, 10))
	for i, want := range []uint8{all &^ (tcpFIN | tcpPSH), all &^ (tcpFIN | tcpPSH | tcpCWR), all &^ tcpCWR} {
		if got := p.AppendSegment(nil, i)[33]; got != want {
			t.Errorf("segment %d: got flags %#x, want %#x", i, got, want)
		}
	}
	alone := mustParse(t, tcp4(all, 30, 30))
	if got := alone.AppendSegment(nil, 0)[33]; got != all {
		t.Errorf("the only segment: got flags %#x, want %#x", got, all)
	}
}

func TestSegmentNumbersWrap(t *testing.T) {
	s := tcp4(0, 50, 10)
	s.id, s.seq = 0xfffe, 0xfffffff0
	p := mustParse(t, s)
	for i, want := range []struct {
		id  uint16
		seq uint32
	}{{0xfffe, 0xfffffff0}, {0xffff, 0xfffffffa}, {0, 4}, {1, 14}, {2, 24}} {
		got := p.AppendSegment(nil, i)
		id, seq := binary.BigEndian.Uint16(got[4:]), binary.BigEndian.Uint32(got[24:])
		if id != want.id || seq != want.seq {
			t.Errorf("segment %d: got id %#x, seq %#x, want %#x, %#x", i, id, seq, want.id, want.seq)
		}
	}
}

// TestSegmentChecksumZero: where the checksum comes out as 0, UDP has 0xffff and TCP has 0.
func TestSegmentChecksumZero(t *testing.T) {
	for _, s := range []*shape{udp4(40, 10), over6(udp4(40, 10)), tcp4(0, 40, 10), over6(tcp4(0, 40, 10))} {
		field := s.transport() + s.csumOffset()
		// The complement of a sum added to it gives 0xffff: so a checksum moved into the payload makes the next one 0.
		copy(s.payload[20:], s.segment(2)[field:field+2])
		p := mustParse(t, s)
		want := uint16(0)
		if s.udp {
			want = 0xffff
		}
		if got := binary.BigEndian.Uint16(p.AppendSegment(nil, 2)[field:]); got != want {
			t.Errorf("%v: got checksum %#x, want %#x", s, got, want)
		}
		equalSegments(t, p, s)
	}
}

func TestSegmentLimits(t *testing.T) {
	for _, s := range []*shape{
		tcp4(0, 65_535-40, 1),
		tcp4(0, 65_535-40, 65_535),
		tcp4(0, 65_535-40, 1460),
		udp4(65_535-28, 65_535-28),
		udp4(1, 1),
		udp4(1, 65_535),
		over6(tcp4(0, 65_535-20, 1440)),
		over6(tcp4(0, 65_535-20, 65_535)),
		over6(udp4(65_535-8, 65_535-9)),
	} {
		p := mustParse(t, s)
		if got, want := p.Segments(), s.segments(); got != want {
			t.Errorf("%v: got %d segments, want %d", s, got, want)
		}
		for _, i := range []int{0, s.segments() / 2, s.segments() - 1} {
			if got, want := p.AppendSegment(nil, i), s.segment(i); !bytes.Equal(got, want) {
				t.Errorf("%v: segment %d differs", s, i)
			}
		}
	}
}

func TestSegmentOutOfRange(t *testing.T) {
	const most = int(^uint(0) >> 1)
	dst := []byte("kept")
	for _, s := range []*shape{tcp4(0, 30, 10), udp4(1, 1), tcp4(0, 65_535-40, 1), udp4(65_535-28, 65_535)} {
		p := mustParse(t, s)
		n := s.segments()
		for _, i := range []int{-1, n, n + 1, 65_535, 65_536, 1 << 30, most, -most - 1} {
			if got := p.AppendSegment(dst, i); string(got) != "kept" {
				t.Errorf("%v: AppendSegment(%d) of %d appended %d bytes", s, i, n, len(got)-len(dst))
			}
		}
	}
	var zero Superpacket
	if got := zero.AppendSegment(dst, 0); string(got) != "kept" || zero.Segments() != 0 {
		t.Error("the zero Superpacket has a segment")
	}
}

func TestSegmentConcurrently(t *testing.T) {
	s := over6(tcp4(0x19, 20_000, 1000))
	p := mustParse(t, s)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for k := range s.segments() {
				i := (k*7 + g*5) % s.segments()
				if got := p.AppendSegment(nil, i); !bytes.Equal(got, s.segment(i)) {
					t.Errorf("segment %d differs", i)
				}
			}
		})
	}
	wg.Wait()
}

func TestSegmentAllocs(t *testing.T) {
	for _, s := range []*shape{tcp4(0, 60_000, 1448), over6(udp4(60_000, 1200))} {
		var p Superpacket
		data, dst := s.super(), make([]byte, 0, 65_535)
		allocs := testing.AllocsPerRun(100, func() {
			p.Parse(data, s.size)
			for i := range p.Segments() {
				dst = p.AppendSegment(dst[:0], i)
			}
		})
		if allocs != 0 {
			t.Errorf("%v: got %v allocations, want 0", s, allocs)
		}
	}
}

func BenchmarkAppendSegment(b *testing.B) {
	for _, s := range []*shape{
		tcp4(0x18, 65_160, 1448), over6(tcp4(0x18, 65_160, 1448)), udp4(65_000, 1300), udp4(8_192, 64), over6(udp4(65_000, 1300)),
	} {
		if !s.udp {
			s.tcpOptions = make([]byte, 12)
		}
		name := strings.Join([]string{fmt.Sprintf("v6=%v", s.v6), fmt.Sprintf("udp=%v", s.udp), fmt.Sprint(s.size)}, "/")
		b.Run(name, func(b *testing.B) {
			data, dst := s.super(), make([]byte, 0, 65_535)
			b.SetBytes(int64(s.size))
			i, n := 0, s.segments()
			for b.Loop() {
				var p Superpacket
				p.Parse(data, s.size)
				dst = p.AppendSegment(dst[:0], i)
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}
