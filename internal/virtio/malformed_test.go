package virtio

import (
	"encoding/binary"
	"testing"
)

// superCase is a superpacket as Parse gets it, and the number of segments that must come of it.
type superCase struct {
	name string
	data []byte
	size int
	want int
}

// changed returns the superpacket of s after change.
func changed(s *shape, change func(data []byte)) []byte {
	data := s.super()
	change(data)
	return data
}

func set(offset int, bytes ...byte) func([]byte) {
	return func(data []byte) { copy(data[offset:], bytes) }
}

func ext(protocol uint8, body ...byte) extension {
	return extension{protocol: protocol, body: body}
}

// superCases are the malformed inputs of kernel.md section 3, beside their well-formed neighbours.
func superCases() []superCase {
	cases := []superCase{
		{"nothing", nil, 10, 0},
		{"one byte", []byte{0x45}, 10, 0},
	}
	cases = append(cases, sizeCases()...)
	cases = append(cases, cases4()...)
	cases = append(cases, cases6()...)
	return append(cases, transportCases()...)
}

func sizeCases() []superCase {
	tcp := tcp4(0, 30, 10).super()
	return []superCase{
		{"size", tcp, 10, 3},
		{"size 0", tcp, 0, 0},
		{"size 1", tcp, 1, 30},
		{"size as payload", tcp, 30, 1},
		{"size beyond payload", tcp, 31, 1},
		{"size 65535", tcp, 65_535, 1},
		{"size 65536", tcp, 65_536, 0},
		{"size negative", tcp, -1, 0},
		{"size most negative", tcp, -int(^uint(0)>>1) - 1, 0},
		{"65535 bytes", tcp4(0, 65_535-40, 10).super(), 65_535, 1},
		{"65536 bytes", append(tcp4(0, 65_535-40, 10).super(), 0), 65_535, 0},
		{"65535 bytes and an IPv6 header", over6(udp4(65_535-8, 10)).super(), 65_535, 1},
		{"65536 bytes and an IPv6 header", append(over6(udp4(65_535-8, 10)).super(), 0), 65_535, 0},
	}
}

func cases4() []superCase {
	s := tcp4(0, 30, 10)
	options := tcp4(0, 30, 10)
	options.options = make([]byte, 40)
	var cases []superCase
	for _, v := range []byte{0, 1, 5, 6, 7, 15} {
		cases = append(cases, superCase{"version", changed(s, set(0, v<<4|5)), 10, 0})
	}
	cases = append(cases, []superCase{
		{"IHL 0", changed(s, set(0, 0x40)), 10, 0},
		{"IHL 4", changed(s, set(0, 0x44)), 10, 0},
		{"IHL 15", options.super(), 10, 3},
		{"IHL past the end", changed(s, set(0, 0x4f))[:59], 10, 0},
		{"total length 0", changed(s, set(2, 0, 0)), 10, 3},
		{"total length below the header's", changed(s, set(2, 0, 19)), 10, 3},
		{"total length beyond the end", changed(s, set(2, 0xff, 0xff)), 10, 3},
		{"don't fragment", changed(s, set(6, 0x40)), 10, 3},
		{"reserved bit", changed(s, set(6, 0x80)), 10, 3},
		{"first fragment", changed(s, set(6, 0x20)), 10, 0},
		{"middle fragment", changed(s, set(6, 0x20, 1)), 10, 0},
		{"last fragment", changed(s, set(6, 0, 1)), 10, 0},
		{"fragment far off", changed(s, set(6, 0x1f, 0xff)), 10, 0},
		{"ICMP", changed(s, set(9, 1)), 10, 0},
		{"SCTP", changed(s, set(9, 132)), 10, 0},
		{"UDP-Lite", changed(s, set(9, 136)), 10, 0},
		{"IPv6 in IPv4", changed(s, set(9, 41)), 10, 0},
	}...)
	for n := range 41 {
		cases = append(cases, superCase{"IPv4 cut", s.super()[:n], 10, 0})
	}
	return cases
}

func cases6() []superCase {
	s := over6(tcp4(0, 30, 10))
	hop, routing, options := ext(0, 0, 1, 4, 0, 0, 0, 0), ext(43, 0, 0, 0, 0, 0, 0, 0), ext(60, 0, 1, 4, 0, 0, 0, 0)
	chain := over6(tcp4(0, 30, 10), hop, options, routing, options)
	left := func(kind byte, n int) extension {
		body := make([]byte, n-1)
		body[0], body[1], body[2] = byte(n/8-1), kind, 1
		return extension{protocol: 43, body: body}
	}
	cases := []superCase{
		{"payload length 0", changed(s, set(4, 0, 0)), 10, 3},
		{"payload length beyond the end", changed(s, set(4, 0xff, 0xff)), 10, 3},
		{"extensions", chain.super(), 10, 3},
		{"jumbogram", changed(chain, set(4, 0, 0)), 10, 0},
		{"extension past the end", changed(chain, set(41, 0xff)), 10, 0},
		{"fragment header", changed(chain, set(40, 44)), 10, 0},
		{"AH", changed(chain, set(40, 51)), 10, 0},
		{"ESP", changed(chain, set(40, 50)), 10, 0},
		{"no next header", changed(chain, set(40, 59)), 10, 0},
		{"mobility", changed(chain, set(40, 135)), 10, 0},
		{"ICMPv6", changed(s, set(6, 58)), 10, 0},
		{"routing of unknown type, done", changed(over6(tcp4(0, 30, 10), routing), set(42, 99)), 10, 3},
		{"routing of unknown type", over6(tcp4(0, 30, 10), left(99, 24)).super(), 10, 0},
		{"routing without address", over6(tcp4(0, 30, 10), left(4, 16)).super(), 10, 0},
		{"routing with one", over6(tcp4(0, 30, 10), left(4, 24)).super(), 10, 3},
		{"routing with one and a half", over6(tcp4(0, 30, 10), left(0, 32)).super(), 10, 3},
	}
	for n := range chain.transport() + 21 {
		cases = append(cases, superCase{"IPv6 cut", chain.super()[:n], 10, 0})
	}
	return cases
}

func transportCases() []superCase {
	tcp, udp := tcp4(0, 30, 10), udp4(30, 10)
	cases := []superCase{
		{"UDP", udp.super(), 10, 3},
		{"UDP length 0", changed(udp, set(24, 0, 0)), 10, 3},
		{"UDP length below the header's", changed(udp, set(24, 0, 7)), 10, 3},
		{"UDP length beyond the end", changed(udp, set(24, 0xff, 0xff)), 10, 3},
		{"UDP without checksum", changed(udp, set(26, 0, 0)), 10, 3},
		{"UDP without payload", udp.super()[:28], 10, 0},
		{"TCP without payload", tcp.super()[:40], 10, 0},
		{"TCP offset over the payload", changed(tcp, set(32, 12<<4)), 10, 1},
		{"TCP offset up to the end", changed(tcp, set(32, 12<<4))[:68], 10, 0},
		{"TCP offset past the end", changed(tcp, set(32, 15<<4))[:79], 10, 0},
		{"TCP as UDP", changed(tcp, set(9, 17)), 10, 5},
	}
	for offset := range byte(5) {
		cases = append(cases, superCase{"TCP offset", changed(tcp, set(32, offset<<4)), 10, 0})
	}
	return cases
}

func TestParse(t *testing.T) {
	for _, c := range superCases() {
		var p Superpacket
		ok := p.Parse(c.data, c.size)
		if ok != (c.want > 0) || p.Segments() != c.want {
			t.Errorf("%s, %d bytes: got %d segments, %v, want %d", c.name, len(c.data), p.Segments(), ok, c.want)
		}
		for i := range c.want + 2 {
			if got := p.AppendSegment(nil, i); (len(got) > 0) != (i < c.want) {
				t.Errorf("%s: segment %d of %d has %d bytes", c.name, i, c.want, len(got))
			}
		}
	}
}

// FuzzSegment: whatever is taken for a superpacket splits into packets that an independent parser finds right.
func FuzzSegment(f *testing.F) {
	for _, c := range superCases() {
		f.Add(c.data, c.size)
	}
	r := fuzzSource()
	for range 50 {
		s := randomShape(r)
		f.Add(s.super(), s.size)
	}
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		before := string(data)
		checkSuper(t, data, size)
		if string(data) != before {
			t.Fatal("the superpacket was changed")
		}
	})
}

// checkSuper splits data and compares the segments with it.
func checkSuper(t *testing.T, data []byte, size int) {
	var p Superpacket
	ok := p.Parse(data, size)
	n := p.Segments()
	if ok != (n > 0) {
		t.Fatalf("%d segments, %v", n, ok)
	}
	if len(p.AppendSegment(nil, n)) > 0 || len(p.AppendSegment(nil, -1)) > 0 {
		t.Fatal("a segment beside the segments")
	}
	var payload []byte
	for i := range n {
		if i > 50 && i < n-50 {
			payload = append(payload, data[p.payload+i*size:][:size]...)
			continue
		}
		segment := p.AppendSegment(nil, i)
		h, err := parseSlow(segment)
		if err != nil {
			t.Fatalf("segment %d of %d: %v: %x", i, n, err, segment)
		}
		if want := expectedHeader(data[:h.length], segment, i, i*size, n); string(segment[:h.length]) != string(want) {
			t.Fatalf("segment %d of %d: got header %x, want %x", i, n, segment[:h.length], want)
		}
		if got := len(segment) - h.length; got != size && i != n-1 || got < 1 || got > size {
			t.Fatalf("segment %d of %d: %d bytes of payload", i, n, got)
		}
		payload = append(payload, segment[h.length:]...)
	}
	if n > 0 && string(payload) != string(data[p.payload:]) {
		t.Fatal("payload lost")
	}
}

// expectedHeader is the superpacket's header with everything changed that may; lengths and checksums, which parseSlow has
// verified, are the segment's.
func expectedHeader(super, segment []byte, i, offset, n int) []byte {
	h, _ := parseSlow(segment)
	want := append([]byte(nil), super...)
	if segment[0]>>4 == 4 {
		copy(want[2:4], segment[2:4])
		binary.BigEndian.PutUint16(want[4:], binary.BigEndian.Uint16(super[4:])+uint16(i))
		copy(want[10:12], segment[10:12])
	} else {
		copy(want[4:6], segment[4:6])
	}
	if h.udp {
		copy(want[h.transport+4:h.transport+8], segment[h.transport+4:])
		return want
	}
	tcp := want[h.transport:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(offset))
	if i > 0 {
		tcp[13] &= 0x7f
	}
	if i < n-1 {
		tcp[13] &= 0xf6
	}
	copy(tcp[16:18], segment[h.transport+16:])
	return want
}
