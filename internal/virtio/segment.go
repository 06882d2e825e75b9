package virtio

import (
	"encoding/binary"
	"slices"
)

// TCP flags of which a superpacket's belong to one end of it: congestion window reduced is said once, by the first segment; push
// and the end of the stream by the last.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// Superpacket is a superpacket that Parse found well-formed; otherwise and before, it has no segments. It refers to the bytes it
// was parsed from and never changes them: as long as nobody else does, AppendSegment may run concurrently, in any order.
type Superpacket struct {
	data []byte
	layout
	size int
}

// Parse makes s the superpacket in data, whose segments carry segmentSize bytes of payload each, the last one what is left. It
// keeps data. No allocation.
//
// The end of data is the end of the packet. The lengths inside, IPv4's total length, IPv6's payload length and UDP's length, are
// not compared with it, for every segment gets its own and those of a superpacket are often stale: the kernel's are the whole
// superpacket's, a program that builds one may leave them as in its first packet. Nor are the checksums looked at.
//
// False, for malformed: a segment size outside 1 to 65535; no payload; data too long for IP (65535 bytes, in IPv6 without its
// header), so jumbograms; anything but TCP or UDP; a header cut short or shorter than it may be; an IP fragment; an IPv6 extension
// header other than hop-by-hop options, routing and destination options, or a routing header of unknown type with segments left.
func (s *Superpacket) Parse(data []byte, segmentSize int) bool {
	// Filled in place: a struct of this size returned by value goes through memory twice, and doubled the cost.
	s.data, s.size = nil, 0
	if segmentSize < 1 || segmentSize > 0xffff || !s.parse(data) || s.payload == len(data) {
		return false
	}
	s.data, s.size = data, segmentSize
	return true
}

// Segments returns the number of packets in s: at least 1 after Parse.
func (s *Superpacket) Segments() int {
	if s.size == 0 {
		return 0
	}
	return (len(s.data) - s.payload + s.size - 1) / s.size
}

// AppendSegment appends the i-th packet of s, complete in lengths, identification, sequence number, flags and checksums, to dst and
// returns it; dst unchanged if i is not in [0, Segments). No allocation where dst has the capacity. dst must not overlap what s
// was parsed from.
func (s *Superpacket) AppendSegment(dst []byte, i int) []byte {
	start, end, ok := s.span(i)
	if !ok {
		return dst
	}
	n := s.payload + end - start
	dst = slices.Grow(dst, n)
	dst = dst[:len(dst)+n]
	segment := dst[len(dst)-n:]

	copy(segment, s.data[:s.payload])
	acc := uint64(copySum(segment[s.payload:], s.data[start:end]))
	acc += s.stampIP(segment, i)
	if s.protocol == protoTCP {
		s.stampTCP(segment[s.transport:], start, end, acc)
	} else {
		s.stampUDP(segment[s.transport:], acc)
	}
	return dst
}

// span returns where the i-th segment's payload is in s.data.
func (s *Superpacket) span(i int) (start, end int, ok bool) {
	// A segment has at least one byte: so i is small after this test, and the product needs no more than 32 bits unsigned.
	if i < 0 || i >= len(s.data)-s.payload {
		return 0, 0, false
	}
	offset := uint64(i) * uint64(s.size)
	if offset >= uint64(len(s.data)-s.payload) {
		return 0, 0, false
	}
	start = s.payload + int(offset)
	return start, min(start+s.size, len(s.data)), true
}

// The stamp functions write what differs between segments over a copy of the headers. They sum the superpacket's headers, not the
// copy, leaving out the fields that change: a load from bytes just stored in other units would stall the processor.

// stampIP writes the IP header of the i-th segment and returns the sum of the pseudo header.
func (s *Superpacket) stampIP(segment []byte, i int) uint64 {
	length := uint64(len(segment) - s.transport)
	if s.version == 4 {
		return s.stamp4(segment, i) + uint64(s.protocol) + length
	}
	// The payload length counts the extension headers, the length that the checksum covers does not.
	binary.BigEndian.PutUint16(segment[4:], uint16(len(segment)-headerLen6))
	return sumWords(s.data[addresses6:addresses6+16]) + sumWords(s.data[s.final:s.final+16]) + uint64(s.protocol) + length
}

// stamp4 writes an IPv4 header and returns the sum of its addresses.
func (s *Superpacket) stamp4(segment []byte, i int) uint64 {
	old := s.data[:s.transport]
	id := binary.BigEndian.Uint16(old[4:]) + uint16(i)
	binary.BigEndian.PutUint16(segment[2:], uint16(len(segment)))
	binary.BigEndian.PutUint16(segment[4:], id)

	addresses := sum32(old[addresses4:]) + sum32(old[addresses4+4:])
	acc := sum16(old) + uint64(len(segment)) + uint64(id) + sum32(old[6:]) + addresses + sumWords(old[headerLen4:])
	binary.BigEndian.PutUint16(segment[10:], ^fold(acc))
	return addresses
}

// stampTCP writes a TCP header; acc is the sum of pseudo header and payload.
func (s *Superpacket) stampTCP(header []byte, start, end int, acc uint64) {
	old := s.data[s.transport:s.payload]
	seq := binary.BigEndian.Uint32(old[4:]) + uint32(start-s.payload)
	flags := old[13]
	if start != s.payload {
		flags &^= tcpCWR
	}
	if end != len(s.data) {
		flags &^= tcpFIN | tcpPSH
	}
	binary.BigEndian.PutUint32(header[4:], seq)
	header[13] = flags

	acc += sum32(old) + uint64(seq) + sum32(old[8:]) + uint64(old[12])<<8 + uint64(flags) + sum16(old[14:]) + sum16(old[18:])
	acc += sumWords(old[headerLenTCP:])
	binary.BigEndian.PutUint16(header[csumOffsetTCP:], ^fold(acc))
}

// stampUDP writes a UDP header, which ends with the segment; acc is the sum of pseudo header and payload.
func (s *Superpacket) stampUDP(header []byte, acc uint64) {
	length := uint16(len(header))
	binary.BigEndian.PutUint16(header[4:], length)
	acc += sum32(s.data[s.transport:]) + uint64(length)
	binary.BigEndian.PutUint16(header[csumOffsetUDP:], mangleZero(^fold(acc)))
}
