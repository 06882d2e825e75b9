package overlay

import (
	"bytes"
	"encoding/binary"
	"sync"
	"testing"
)

// onesSum is the one's complement sum of parts as 16-bit words, 0xffff over a finished packet and its pseudo header.
func onesSum(parts ...[]byte) uint16 {
	all := append(bytes.Join(parts, nil), 0)
	acc := 0
	for i := 0; i+1 < len(all); i += 2 {
		acc += int(all[i])<<8 + int(all[i+1])
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// superTCP4 is a superpacket with payload bytes 0, 1, 2, …, don't-fragment, id 0xfffe, sequence number 1000 and the flags CWR, PSH, FIN and ACK.
func superTCP4(payload int) []byte {
	h := []byte{
		0x45, 0, 0, 0, 0xff, 0xfe, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
		0, 80, 0, 81, 0, 0, 0x03, 0xe8, 0, 0, 0, 0, 0x50, 0x99, 1, 0, 0xde, 0xad, 0, 0,
	}
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+payload))
	return appendCount(h, payload)
}

// superUDP6 is the like in IPv6, behind hop-by-hop options.
func superUDP6(payload int) []byte {
	h := make([]byte, 56)
	h[0], h[6], h[7] = 0x60, 0, 64
	copy(h[8:], "from address....to address......")
	copy(h[40:], []byte{17, 0, 1, 4, 0, 0, 0, 0, 0, 80, 0, 81, 0, 0, 0xde, 0xad})
	binary.BigEndian.PutUint16(h[4:], uint16(16+payload))
	binary.BigEndian.PutUint16(h[52:], uint16(8+payload))
	return appendCount(h, payload)
}

func appendCount(b []byte, n int) []byte {
	for i := range n {
		b = append(b, byte(i))
	}
	return b
}

func TestPacketSegmentsTCP4(t *testing.T) {
	p := Packet{superTCP4(25), 10}
	before := bytes.Clone(p.Data)
	if got := p.Segments(); got != 3 {
		t.Fatalf("got %d segments, want 3", got)
	}
	for i, want := range []struct {
		payload int
		id      uint16
		flags   byte
	}{{10, 0xfffe, 0x90}, {10, 0xffff, 0x10}, {5, 0, 0x19}} {
		got := p.AppendSegment(nil, i)
		if len(got) != 40+want.payload || !bytes.Equal(got[40:], p.Data[40+10*i:][:want.payload]) {
			t.Fatalf("segment %d: got %x", i, got)
		}
		total, id := binary.BigEndian.Uint16(got[2:]), binary.BigEndian.Uint16(got[4:])
		if int(total) != len(got) || id != want.id || got[8] != 64 {
			t.Errorf("segment %d: got total length %d, id %#x, TTL %d", i, total, id, got[8])
		}
		if seq := binary.BigEndian.Uint32(got[24:]); seq != uint32(1000+10*i) || got[33] != want.flags {
			t.Errorf("segment %d: got sequence number %d, flags %#x, want %d, %#x", i, seq, got[33], 1000+10*i, want.flags)
		}
		ip, tcp := onesSum(got[:20]), onesSum(got[12:20], []byte{0, 6, 0, byte(len(got) - 20)}, got[20:])
		if ip != 0xffff || tcp != 0xffff {
			t.Errorf("segment %d: got sums %#x, %#x, want 0xffff", i, ip, tcp)
		}
	}
	if !bytes.Equal(p.Data, before) {
		t.Error("Data was changed")
	}
}

func TestPacketSegmentsUDP6(t *testing.T) {
	p := Packet{superUDP6(25), 10}
	if got := p.Segments(); got != 3 {
		t.Fatalf("got %d segments, want 3", got)
	}
	for i, payload := range []int{10, 10, 5} {
		got := p.AppendSegment(nil, i)
		if len(got) != 56+payload || !bytes.Equal(got[56:], p.Data[56+10*i:][:payload]) || !bytes.Equal(got[6:52], p.Data[6:52]) {
			t.Fatalf("segment %d: got %x", i, got)
		}
		ip, udp := binary.BigEndian.Uint16(got[4:]), binary.BigEndian.Uint16(got[52:])
		if int(ip) != 16+payload || int(udp) != 8+payload {
			t.Errorf("segment %d: got lengths %d, %d, want %d, %d", i, ip, udp, 16+payload, 8+payload)
		}
		if got := onesSum(got[8:40], []byte{0, 17, 0, byte(8 + payload)}, got[48:]); got != 0xffff {
			t.Errorf("segment %d: got sum %#x, want 0xffff", i, got)
		}
	}
}

func TestPacketSegmentsCount(t *testing.T) {
	tcp := superTCP4(25)
	fragment := bytes.Clone(tcp)
	fragment[6] = 0x20
	for _, c := range []struct {
		name string
		p    Packet
		want int
	}{
		{"zero", Packet{}, 1},
		{"plain", Packet{Data: tcp}, 1},
		{"plain, no IP", Packet{Data: []byte("no IP")}, 1},
		{"superpacket", Packet{tcp, 10}, 3},
		{"superpacket of one", Packet{tcp, 25}, 1},
		{"superpacket of less", Packet{tcp, 65_535}, 1},
		{"size too large", Packet{tcp, 65_536}, 0},
		{"size negative", Packet{tcp, -10}, 0},
		{"size most negative", Packet{tcp, -int(^uint(0)>>1) - 1}, 0},
		{"empty", Packet{nil, 10}, 0},
		{"no IP", Packet{[]byte("no IP"), 10}, 0},
		{"no payload", Packet{superTCP4(0), 10}, 0},
		{"cut", Packet{tcp[:30], 10}, 0},
		{"fragment", Packet{fragment, 10}, 0},
	} {
		if got := c.p.Segments(); got != c.want {
			t.Errorf("%s: got %d segments, want %d", c.name, got, c.want)
		}
		for _, i := range []int{-1, c.want, c.want + 1, 1 << 30} {
			if got := c.p.AppendSegment([]byte("kept"), i); string(got) != "kept" {
				t.Errorf("%s: AppendSegment(%d) of %d appended %d bytes", c.name, i, c.want, len(got)-4)
			}
		}
	}
}

func TestPacketAppendSegmentAppends(t *testing.T) {
	for _, p := range []Packet{{Data: []byte("plain")}, {superTCP4(5), 10}, {superTCP4(5), 1}} {
		got := p.AppendSegment([]byte("before"), 0)
		if want := append([]byte("before"), p.AppendSegment(nil, 0)...); !bytes.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	plain := Packet{Data: []byte("plain")}
	if got := plain.AppendSegment(nil, 0); string(got) != "plain" || &got[0] == &plain.Data[0] {
		t.Errorf("got %q, want a copy of Data", got)
	}
}

// TestPacketAppendSegmentConcurrently is for the race detector.
func TestPacketAppendSegmentConcurrently(t *testing.T) {
	p := Packet{superUDP6(10_000), 1000}
	want := p.AppendSegment(nil, 7)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range p.Segments() {
				if got := p.AppendSegment(nil, i); i == 7 && !bytes.Equal(got, want) {
					t.Error("segment 7 differs")
				}
			}
		})
	}
	wg.Wait()
}

func TestPacketAllocs(t *testing.T) {
	dst := make([]byte, 0, 65_535)
	for _, p := range []Packet{{Data: superTCP4(1000)}, {superTCP4(60_000), 1448}, {superUDP6(60_000), 1200}} {
		allocs := testing.AllocsPerRun(100, func() {
			for i := range p.Segments() {
				dst = p.AppendSegment(dst[:0], i)
			}
		})
		if allocs != 0 {
			t.Errorf("size %d: got %v allocations, want 0", p.SegmentSize, allocs)
		}
	}
}

func BenchmarkPacketAppendSegment(b *testing.B) {
	for name, p := range map[string]Packet{"TCP4": {superTCP4(65_160), 1448}, "UDP6": {superUDP6(65_000), 1300}} {
		b.Run(name, func(b *testing.B) {
			dst := make([]byte, 0, 65_535)
			b.SetBytes(int64(len(p.Data)))
			for b.Loop() {
				for i := range p.Segments() {
					dst = p.AppendSegment(dst[:0], i)
				}
			}
		})
	}
}
