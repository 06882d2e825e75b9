package virtio

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
)

// shape describes a flow's packets. It is the oracle of the splitter: it builds any of them from the description alone, parsing
// nothing, with slowSum.
type shape struct {
	v6, udp    bool
	src, dst   []byte
	options    []byte // of IPv4
	extensions []extension
	tcpOptions []byte
	id         uint16
	seq        uint32
	flags      uint8
	rest       [8]byte // fields that nobody looks at: TOS, TTL, ports, …
	payload    []byte
	size       int
}

// extension is an IPv6 extension header. Where final is set, it is an address inside body that the checksum covers.
type extension struct {
	protocol uint8
	body     []byte // all but the next header
	final    []byte
}

func (s *shape) String() string {
	return fmt.Sprintf("v6 %v, udp %v, %d bytes of IP options, %d extensions, %d bytes of TCP options, flags %#x, %d bytes by %d",
		s.v6, s.udp, len(s.options), len(s.extensions), len(s.tcpOptions), s.flags, len(s.payload), s.size)
}

func (s *shape) segments() int { return (len(s.payload) + s.size - 1) / s.size }

// segment returns the i-th packet of the superpacket, finished.
func (s *shape) segment(i int) []byte {
	n := s.segments()
	flags := s.flags
	if i != 0 {
		flags &= 0x7f
	}
	if i != n-1 {
		flags &= 0xf6
	}
	payload := s.payload[i*s.size : min((i+1)*s.size, len(s.payload))]
	return s.packet(payload, s.id+uint16(i), s.seq+uint32(i*s.size), flags)
}

// super returns the superpacket as the kernel hands it out: lengths of the whole, a checksum that holds only the pseudo header.
func (s *shape) super() []byte {
	p := s.packet(s.payload, s.id, s.seq, s.flags)
	binary.BigEndian.PutUint16(p[s.transport()+s.csumOffset():], slowSum(s.pseudo(len(p)-s.transport())))
	return p
}

func (s *shape) transport() int {
	if !s.v6 {
		return 20 + len(s.options)
	}
	n := 40
	for _, e := range s.extensions {
		n += 1 + len(e.body)
	}
	return n
}

func (s *shape) protocol() uint8 {
	if s.udp {
		return 17
	}
	return 6
}

func (s *shape) csumOffset() int {
	if s.udp {
		return 6
	}
	return 16
}

func (s *shape) pseudo(length int) []byte {
	dst := s.dst
	for _, e := range s.extensions {
		if e.final != nil {
			dst = e.final
		}
	}
	p := append(append([]byte(nil), s.src...), dst...)
	p = binary.BigEndian.AppendUint32(p, uint32(length))
	return append(p, 0, 0, 0, s.protocol())
}

func (s *shape) packet(payload []byte, id uint16, seq uint32, flags uint8) []byte {
	t := s.transportPacket(payload, seq, flags)
	csum := ^slowSum(s.pseudo(len(t)), t)
	if s.udp && csum == 0 {
		csum = 0xffff
	}
	binary.BigEndian.PutUint16(t[s.csumOffset():], csum)
	if s.v6 {
		return append(s.header6(len(t)), t...)
	}
	return append(s.header4(len(t), id), t...)
}

func (s *shape) header4(length int, id uint16) []byte {
	h := []byte{0x45 + byte(len(s.options)/4), s.rest[0]}
	h = binary.BigEndian.AppendUint16(h, uint16(20+len(s.options)+length))
	h = binary.BigEndian.AppendUint16(h, id)
	h = append(h, s.rest[1]&0x40, 0, s.rest[2], s.protocol(), 0, 0)
	h = append(append(append(h, s.src...), s.dst...), s.options...)
	binary.BigEndian.PutUint16(h[10:], ^slowSum(h))
	return h
}

func (s *shape) header6(length int) []byte {
	h := []byte{0x60 + s.rest[0]&0xf, s.rest[1], s.rest[2], s.rest[3]}
	h = binary.BigEndian.AppendUint16(h, uint16(s.transport()-40+length))
	h = append(h, 0, s.rest[4])
	next := 6
	h = append(append(h, s.src...), s.dst...)
	for _, e := range s.extensions {
		h[next] = e.protocol
		next = len(h)
		h = append(append(h, 0), e.body...)
	}
	h[next] = s.protocol()
	return h
}

func (s *shape) transportPacket(payload []byte, seq uint32, flags uint8) []byte {
	t := append([]byte(nil), s.rest[4:]...) // ports
	if s.udp {
		t = binary.BigEndian.AppendUint16(t, uint16(8+len(payload)))
		t = append(t, 0, 0)
		return append(t, payload...)
	}
	t = binary.BigEndian.AppendUint32(t, seq)
	t = append(t, s.rest[:4]...) // acknowledged
	t = append(t, byte(5+len(s.tcpOptions)/4)<<4, flags, s.rest[6], s.rest[1], 0, 0, s.rest[2], s.rest[5])
	return append(append(t, s.tcpOptions...), payload...)
}

// randomShape draws one; its packets are at most 65,535 bytes long.
func randomShape(r *rand.Rand) *shape {
	s := &shape{
		v6: r.IntN(2) == 0, udp: r.IntN(2) == 0,
		id: uint16(r.Uint32()), seq: r.Uint32(), flags: uint8(r.Uint32()),
		size: 1 + r.IntN(1+r.IntN(3000)),
	}
	copy(s.rest[:], randomBytes(r, len(s.rest)))
	if r.IntN(4) == 0 {
		s.id, s.seq = uint16(-1-r.IntN(3)), uint32(-1-r.IntN(5000))
	}
	addressLen := 4
	if s.v6 {
		addressLen = 16
		for range r.IntN(4) {
			s.extensions = append(s.extensions, randomExtension(r))
		}
	} else {
		s.options = randomBytes(r, 4*max(0, r.IntN(22)-11))
	}
	s.src, s.dst = randomBytes(r, addressLen), randomBytes(r, addressLen)
	if !s.udp {
		s.tcpOptions = randomBytes(r, 4*r.IntN(11))
	}
	most := min(65_535-s.transport()-60, s.size*70)
	s.payload = randomBytes(r, 1+r.IntN(most))
	if r.IntN(4) == 0 {
		s.payload = make([]byte, len(s.payload))
	}
	return s
}

func randomExtension(r *rand.Rand) extension {
	n := 1 + r.IntN(6)
	e := extension{protocol: []uint8{0, 43, 60}[r.IntN(3)], body: randomBytes(r, 8*n-1)}
	e.body[0] = byte(n - 1)
	if e.protocol != 43 {
		return e
	}
	e.body[2] = 0 // segments left
	if n >= 3 && r.IntN(2) == 0 {
		e.body[1], e.body[2] = []byte{0, 2, 4}[r.IntN(3)], byte(1+r.IntN(255))
		whole := (8*n - 8) / 16
		last := 7 + 16*(whole-1)
		if e.body[1] == 4 {
			last = 7
		}
		e.final = e.body[last : last+16]
	}
	return e
}
