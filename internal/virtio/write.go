package virtio

import (
	"encoding/binary"
	"slices"
)

// Writes returns what to write for all packets that were added, in an order that keeps that of every flow. It may be called again,
// also after further packets, and then returns everything anew.
func (c *Coalescer) Writes() []Write {
	c.makeRoom()
	plain := c.room(0)
	for i := range c.groups {
		g := &c.groups[i]
		w := Write{Segments: int(g.segments)}
		parts, numbers := len(c.parts), len(c.numbers)
		if !g.merged() {
			c.parts = append(c.parts, plain, c.pieces[g.first].data)
			c.numbers = append(c.numbers, c.pieces[g.first].number)
			w.Len = len(plain) + g.total
		} else {
			w.Header = g.header(c.pieces[g.first].data)
			c.appendSuper(g, w.Header)
			w.Len = len(plain) + g.total
		}
		w.Parts, w.Packets = c.parts[parts:len(c.parts):len(c.parts)], c.numbers[numbers:len(c.numbers):len(c.numbers)]
		c.writes = append(c.writes, w)
	}
	return c.writes
}

// merged says whether a group is written with headers of its own.
func (g *group) merged() bool { return g.count > 1 || g.super }

// makeRoom empties what Writes builds and makes it large enough: parts of what was outgrown would be kept by those that point there.
func (c *Coalescer) makeRoom() {
	parts, numbers, memory := 0, 0, c.headerSize()
	for i := range c.groups {
		g := &c.groups[i]
		parts, numbers = parts+1+int(g.count), numbers+int(g.count)
		if g.merged() {
			memory += c.headerSize() + g.payload
		}
	}
	c.writes = slices.Grow(c.writes[:0], len(c.groups))
	c.parts = slices.Grow(c.parts[:0], parts)
	c.numbers = slices.Grow(c.numbers[:0], numbers)
	c.memory = slices.Grow(c.memory[:0], memory)
}

// appendSuper appends the parts and numbers of a superpacket.
func (c *Coalescer) appendSuper(g *group, h Header) {
	b := c.room(g.payload)
	packet := b[len(b)-g.payload:]
	h.Encode(b)
	copy(packet, c.pieces[g.first].data)
	g.stamp(packet)
	c.parts = append(c.parts, b)
	for i, left := g.first, g.count; left > 0; left-- {
		p := &c.pieces[i]
		c.parts = append(c.parts, p.data[g.payload:])
		c.numbers = append(c.numbers, p.number)
		i = p.next
	}
}

func (c *Coalescer) headerSize() int { return max(c.HeaderSize, HeaderLen) }

// room returns zeros for a virtio header and n bytes more.
func (c *Coalescer) room(n int) []byte {
	n += c.headerSize()
	start := len(c.memory)
	c.memory = c.memory[:start+n]
	b := c.memory[start : start+n : start+n]
	clear(b)
	return b
}

// header returns the virtio header of the superpacket that begins with head. One that has a single segment is none to the kernel, but
// wants a checksum.
func (g *group) header(head []byte) Header {
	h := Header{Flags: FlagNeedsCsum, HdrLen: uint16(g.payload), CsumStart: uint16(g.transport), CsumOffset: csumOffsetTCP}
	if g.protocol == protoUDP {
		h.CsumOffset = csumOffsetUDP
	}
	if g.segments == 1 {
		return h
	}
	h.GSOSize = uint16(g.size)
	switch {
	case g.protocol == protoUDP:
		h.GSOType = GSOUDPL4
	case g.version == 4:
		h.GSOType = GSOTCPv4
	default:
		h.GSOType = GSOTCPv6
	}
	// Merged packets never have CWR; a superpacket that was added as one may.
	if g.protocol == protoTCP && head[g.transport+13]&tcpCWR != 0 {
		h.GSOType |= GSOECN
	}
	return h
}

// stamp makes the superpacket's headers of a copy of the first packet's: with the lengths of the whole, and the sum of the pseudo
// header where the checksum will be.
func (g *group) stamp(h []byte) {
	length := g.total - g.transport
	acc := uint64(g.protocol) + uint64(length)
	if g.version == 4 {
		binary.BigEndian.PutUint16(h[2:], uint16(g.total))
		binary.BigEndian.PutUint16(h[10:], 0)
		binary.BigEndian.PutUint16(h[10:], ^fold(sumWords(h[:g.transport])))
		acc += sumWords(h[addresses4:headerLen4])
	} else {
		binary.BigEndian.PutUint16(h[4:], uint16(g.total-headerLen6))
		acc += sumWords(h[addresses6:addresses6+16]) + sumWords(h[g.final:g.final+16])
	}
	t := h[g.transport:]
	if g.protocol == protoUDP {
		binary.BigEndian.PutUint16(t[4:], uint16(length))
		binary.BigEndian.PutUint16(t[csumOffsetUDP:], fold(acc))
		return
	}
	binary.BigEndian.PutUint16(t[csumOffsetTCP:], fold(acc))
	if g.push {
		t[13] |= tcpPSH
	}
}
