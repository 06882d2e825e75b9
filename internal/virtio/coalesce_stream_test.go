package virtio

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
)

// stream builds the packets of one flow.
type stream struct {
	shape
	step uint16 // of the IPv4 identification
}

// streamOf returns a flow of a kind; port tells flows between the same addresses apart.
func streamOf(v6, udp bool, port byte) *stream {
	s := tcp4(0, 0, 0)
	if v6 {
		over6(s)
	}
	s.udp, s.seq, s.id = udp, 100, 8
	s.rest = [8]byte{0, 0x40, 64, 0, 10, port, 31, 64}
	return &stream{shape: *s, step: 1}
}

// next returns the next packet, with n bytes of payload.
func (s *stream) next(n int, flags uint8) []byte {
	payload := bytes.Repeat([]byte{byte(s.seq)}, n)
	p := s.packet(payload, s.id, s.seq, flags)
	s.id += s.step
	s.seq += uint32(n)
	return p
}

// data returns count packets of n bytes.
func (s *stream) data(count, n int) (packets [][]byte) {
	for range count {
		packets = append(packets, s.next(n, tcpACK))
	}
	return packets
}

// transportOf returns where the transport header of a packet is, or 0.
func transportOf(p []byte) int {
	var l layout
	if !l.parse(p) {
		return 0
	}
	return l.transport
}

// refinish makes lengths and checksums of a changed packet right, if it shows where they are.
func refinish(p []byte) []byte {
	var l layout
	if len(p) >= 20 && p[0]>>4 == 4 && p[0]&0xf >= 5 && int(p[0]&0xf)*4 <= len(p) {
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		finishIP(p)
	} else if len(p) >= 40 && p[0]>>4 == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	}
	if !l.parse(p) {
		return p
	}
	t, field := p[l.transport:], 16
	if l.protocol == 17 {
		field = 6
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	copy(t[field:], []byte{0, 0})
	pseudo := bytes.Clone(p[12:20])
	if p[0]>>4 == 6 {
		pseudo = append(bytes.Clone(p[8:24]), p[l.final:l.final+16]...)
	}
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(t)))
	csum := ^slowSum(pseudo, []byte{0, 0, 0, l.protocol}, t)
	if l.protocol == 17 {
		csum = mangleZero(csum)
	}
	binary.BigEndian.PutUint16(t[field:], csum)
	return p
}

// edit returns a packet with bytes changed from offset on, and finished again.
func edit(p []byte, offset int, bytes ...byte) []byte {
	copy(p[offset:], bytes)
	return refinish(p)
}

// editTransport likewise, in the transport header.
func editTransport(p []byte, offset int, bytes ...byte) []byte {
	return edit(p, transportOf(p)+offset, bytes...)
}

// spoil makes the transport checksum wrong.
func spoil(p []byte) []byte {
	p[len(p)-1] ^= 1
	return p
}

// fragment makes a packet look like one of several fragments: in IPv4 by its fragment word, in IPv6 with a header more.
func fragment(p []byte, more, offset byte) []byte {
	if p[0]>>4 == 4 {
		p[6], p[7] = more<<5, offset
		finishIP(p)
		return p
	}
	p = append(append(bytes.Clone(p[:40]), p[6], 0, 0, offset<<3|more, 0, 0, 0, 9), p[40:]...)
	p[6] = 44
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	return p
}

// randomBurst draws packets of a few flows, most of them in good order.
func randomBurst(r *rand.Rand, most int) (burst []sent) {
	streams := make([]*stream, 1+r.IntN(6))
	sizes := make([]int, len(streams))
	for i := range streams {
		s := streamOf(r.IntN(2) == 0, r.IntN(2) == 0, byte(i))
		s.seq, s.id, s.step = uint32(-r.IntN(3000)), uint16(-r.IntN(20)), uint16(min(1, r.IntN(5)))
		s.rest[1] = byte(r.IntN(2)) * 0x40
		if r.IntN(3) == 0 {
			s.dst = bytes.Repeat([]byte{7}, len(s.dst))
		}
		if !s.udp && r.IntN(2) == 0 {
			s.tcpOptions = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
		}
		if s.v6 && r.IntN(4) == 0 {
			s.extensions = append(s.extensions, randomExtension(r))
		}
		sizes[i] = []int{1, 2, 64, 1300, 1448, 1 + r.IntN(9000)}[r.IntN(6)]
		streams[i] = s
	}
	odd := 1 + r.IntN(40)
	i := 0
	for len(burst) < most {
		if r.IntN(3) == 0 {
			i = r.IntN(len(streams))
		}
		s, n := streams[i], sizes[i]
		if r.IntN(20) == 0 {
			n = 1 + r.IntN(n)
		}
		if r.IntN(odd) == 0 {
			burst = append(burst, s.strange(r, n))
			continue
		}
		p := s.next(n, tcpACK|tcpPSH*byte(r.IntN(20)/19))
		burst = append(burst, sent{data: p})
	}
	return burst
}

// strange returns a packet of the flow, or nearly, with something odd about it.
func (s *stream) strange(r *rand.Rand, n int) sent {
	switch r.IntN(14) {
	case 0:
		return sent{data: s.next(n, uint8(r.Uint32()))}
	case 1:
		return sent{data: spoil(s.next(n, tcpACK))}
	case 2:
		return sent{data: s.next(0, tcpACK)}
	case 3:
		s.seq++
	case 4:
		s.id++
	case 5:
		s.step ^= 1
	case 6:
		return sent{data: fragment(s.next(n, tcpACK), byte(r.IntN(2)), byte(r.IntN(3)))}
	case 7: // a superpacket
		s.payload, s.size, s.flags = randomBytes(r, 1+r.IntN(4000)), r.IntN(1500), uint8(r.Uint32())
		return sent{data: s.super(), size: s.size}
	case 8: // the lengths inside are others
		return sent{data: append(s.next(n, tcpACK), 0)}
	case 9:
		p := s.next(n, tcpACK)
		return sent{data: p[:r.IntN(len(p))]}
	case 10: // a bit of the headers, checksums wrong
		p := s.next(n, tcpACK)
		p[r.IntN(min(len(p), 100))] ^= 1 << r.IntN(8)
		return sent{data: p}
	case 11: // no transport that shows ports
		p := s.next(n, tcpACK)
		p[map[bool]int{false: 9, true: 6}[s.v6]] = 1
		return sent{data: refinish(p)}
	case 12:
		p := s.next(n, tcpACK)
		if s.udp {
			copy(p[transportOf(p)+6:], []byte{0, 0})
		}
		return sent{data: p}
	}
	// A bit of the headers, checksums right.
	p := s.next(n, tcpACK)
	p[r.IntN(min(len(p), 100))] ^= 1 << r.IntN(8)
	return sent{data: refinish(p)}
}
