package virtio

import (
	"bytes"
	"encoding/binary"
)

// TCP flags that merged packets have: all have tcpACK, all or none tcpECE, and the last may have tcpPSH. The kernel would also take a
// FIN at the end and a CWR at the start. But a FIN is not worth it, and what CWR means depends on a negotiation that is not seen
// here: with accurate ECN it is one bit of a counter.
const (
	tcpACK = 0x10
	tcpECE = 0x40
)

const dontFragment = 0x4000

// mergeable tells whether a packet may be part of a superpacket, whatever the others, if its checksums are right.
func (c *Coalescer) mergeable(data []byte, l *layout) bool {
	if len(data) == l.payload || l.payload > maxHeaders || !c.merges(l.protocol) {
		return false
	}
	// Lengths that contradict the end of the data would be repaired by splitting.
	if l.version == 4 {
		// Options are never merged: which of them a segment repeats depends on the option. The reserved bit is nobody's.
		if l.transport != headerLen4 || int(binary.BigEndian.Uint16(data[2:])) != len(data) ||
			binary.BigEndian.Uint16(data[6:])&^dontFragment != 0 {
			return false
		}
	} else if int(binary.BigEndian.Uint16(data[4:])) != len(data)-headerLen6 || l.final != addresses6+16 {
		return false
	}
	h := data[l.transport:]
	if l.protocol == protoTCP {
		return h[13]&^(tcpECE|tcpPSH) == tcpACK
	}
	return int(binary.BigEndian.Uint16(h[4:])) == len(h) && binary.BigEndian.Uint16(h[csumOffsetUDP:]) != 0
}

// continuedBy tells whether a mergeable packet of the same flow can follow the packets in g, of which head is the first: with what
// differs between a superpacket's segments as it must, and all else the same.
func (g *group) continuedBy(head, data []byte, l *layout) bool {
	n := len(data) - l.payload
	if l.payload != g.payload || n > g.size || g.total+n > maxSuper {
		return false
	}
	if g.version == 4 {
		if !g.continuedBy4(head, data) {
			return false
		}
	} else if !same6(head, data, g.transport) {
		return false
	}
	return g.protocol == protoUDP || g.continuedByTCP(head[g.transport:g.payload], data[g.transport:g.payload])
}

func (g *group) continuedBy4(head, data []byte) bool {
	// Type of service; fragment word, time to live and protocol.
	if head[1] != data[1] || binary.BigEndian.Uint32(head[6:]) != binary.BigEndian.Uint32(data[6:]) {
		return false
	}
	if sameID(head, data) {
		// The second packet decides whether the identification counts up or stays.
		return g.fixedID || g.count == 1 && binary.BigEndian.Uint16(head[6:])&dontFragment != 0
	}
	return !g.fixedID && binary.BigEndian.Uint16(data[4:])-binary.BigEndian.Uint16(head[4:]) == uint16(g.count)
}

func sameID(head, data []byte) bool { return head[4] == data[4] && head[5] == data[5] }

// same6 compares all of an IPv6 header and its extensions but the length and the addresses, which are the flow's. If it all is the
// same the transport header begins at the same place.
func same6(head, data []byte, transport int) bool {
	return binary.BigEndian.Uint32(head) == binary.BigEndian.Uint32(data) && head[6] == data[6] && head[7] == data[7] &&
		bytes.Equal(head[headerLen6:transport], data[headerLen6:transport])
}

func (g *group) continuedByTCP(head, h []byte) bool {
	seq := binary.BigEndian.Uint32(head[4:]) + uint32(g.total-g.payload)
	const push = tcpPSH << 16
	return binary.BigEndian.Uint32(h[4:]) == seq &&
		binary.BigEndian.Uint32(h[8:]) == binary.BigEndian.Uint32(head[8:]) && // acknowledged
		binary.BigEndian.Uint32(h[12:])&^push == binary.BigEndian.Uint32(head[12:]) && // length, flags, window; nothing follows a head that pushes
		binary.BigEndian.Uint16(h[18:]) == binary.BigEndian.Uint16(head[18:]) && // urgent pointer, though it means nothing
		bytes.Equal(h[headerLenTCP:], head[headerLenTCP:]) // options, timestamps among them
}

// valid tells whether the checksums of a mergeable packet are right, and are what splitting would write: one's complement has two
// zeros, and all ones, where it is not UDP's way to say zero, would come back as the other.
func valid(data []byte, l *layout) bool {
	const otherZero = 0xffff
	acc := uint64(sum(data[l.transport:])) + uint64(l.protocol) + uint64(len(data)-l.transport)
	if l.version == 4 {
		if fold(sumWords(data[:headerLen4])) != 0xffff || binary.BigEndian.Uint16(data[10:]) == otherZero {
			return false
		}
		acc += sumWords(data[addresses4:headerLen4])
	} else {
		acc += sumWords(data[addresses6:headerLen6])
	}
	if l.protocol == protoTCP && binary.BigEndian.Uint16(data[l.transport+csumOffsetTCP:]) == otherZero {
		return false
	}
	return fold(acc) == 0xffff
}
