package overlay

import "example.com/overlay/internal/virtio"

// Segments returns the number of packets in p: 1 where SegmentSize is 0, whatever Data holds. A superpacket has as many as its
// payload fills, 1 too: that one's checksums are unfinished all the same. It has 0 if it is malformed: a SegmentSize below 0 or
// above 65535, no payload, anything but an unfragmented TCP or UDP packet, headers that do not fit, more bytes than IP has lengths
// for. The lengths in its headers do not matter: it ends where Data ends. No allocation.
func (p Packet) Segments() int {
	if p.SegmentSize == 0 {
		return 1
	}
	var s virtio.Superpacket
	if !s.Parse(p.Data, p.SegmentSize) {
		return 0
	}
	return s.Segments()
}

// AppendSegment appends the i-th packet of p, finished, to dst and returns it; dst as it is if p is malformed or i is not in
// [0, Segments). Without SegmentSize that packet is Data. It leaves p alone: any order, many goroutines. No allocation where dst has
// the capacity: 65,535 bytes and an IPv6 header are enough for any packet. dst must not overlap Data.
func (p Packet) AppendSegment(dst []byte, i int) []byte {
	if p.SegmentSize == 0 {
		if i != 0 {
			return dst
		}
		return append(dst, p.Data...)
	}
	var s virtio.Superpacket
	if !s.Parse(p.Data, p.SegmentSize) {
		return dst
	}
	return s.AppendSegment(dst, i)
}
