package virtio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
)

// sent is one packet of a burst, or a superpacket.
type sent struct {
	data []byte
	size int
}

func plain(packets ...[]byte) (burst []sent) {
	for _, p := range packets {
		burst = append(burst, sent{data: p})
	}
	return burst
}

// modelFlow tells the flow of a packet and its addresses; the flow is empty if it shows no ports, both if it shows no addresses.
func modelFlow(data []byte) (flow, addresses string) {
	switch {
	case len(data) >= 20 && data[0]>>4 == 4:
		addresses = "4" + string(data[12:20])
	case len(data) >= 40 && data[0]>>4 == 6:
		addresses = "6" + string(data[8:40])
	}
	var l layout
	if l.parse(data) {
		flow = fmt.Sprint(addresses, l.protocol, data[l.transport:l.transport+4])
	}
	return flow, addresses
}

// modelOrdered tells whether two packets must stay in order.
func modelOrdered(a, b []byte) bool {
	flowA, addressesA := modelFlow(a)
	flowB, addressesB := modelFlow(b)
	return addressesA == addressesB && addressesA != "" && (flowA == flowB || flowA == "" || flowB == "")
}

// modelWrites is the slow coalescer: which of a burst's packets go into which write. Each packet looks back at all writes for the last
// that holds a packet it must not overtake, and joins it if all of them together can be one superpacket.
func modelWrites(c *Coalescer, burst []sent) (writes [][]int) {
	for i, p := range burst {
		last := -1
		for w := range writes {
			for _, other := range writes[w] {
				if modelOrdered(burst[other].data, p.data) {
					last = w
				}
			}
		}
		if last >= 0 && modelMerges(c, burst, append(writes[last][:len(writes[last]):len(writes[last])], i)) {
			writes[last] = append(writes[last], i)
			continue
		}
		writes = append(writes, []int{i})
	}
	return writes
}

// modelMerges tells whether packets may be one superpacket: if splitting it gives them back, and nothing speaks against it.
func modelMerges(c *Coalescer, burst []sent, numbers []int) bool {
	first := burst[numbers[0]].data
	head, err := parseSlow(first)
	if err != nil || head.length > 256 || modelRouted(first) {
		return false
	}
	limit, wanted := 128, c.TCP
	if head.udp {
		limit, wanted = 64, c.UDP
		if c.MaxDatagrams > 0 {
			limit = min(c.MaxDatagrams, 128)
		}
	}
	size, total := len(first)-head.length, head.length
	for k, i := range numbers {
		p := burst[i].data
		h, err := parseSlow(p)
		n := len(p) - h.length
		if err != nil || h != head || burst[i].size != 0 || n == 0 || n > size || n != size && k != len(numbers)-1 || !modelPlain(p, h) {
			return false
		}
		total += n
	}
	if !wanted || total > 65_535 || len(numbers) > limit {
		return false
	}
	return modelSplits(burst, numbers, head, size, 1) || first[0]>>4 == 4 && first[6] == 0x40 && modelSplits(burst, numbers, head, size, 0)
}

// modelPlain tells whether a packet has nothing that forbids merging.
func modelPlain(p []byte, h slowHeader) bool {
	if p[0]>>4 == 4 && (p[0] != 0x45 || p[6]&^0x40 != 0 || p[7] != 0 || p[10] == 0xff && p[11] == 0xff) {
		return false
	}
	t := p[h.transport:]
	return h.udp || t[13]&0x10 != 0 && t[13]&0xa7 == 0 && (t[16] != 0xff || t[17] != 0xff)
}

// modelRouted tells whether an IPv6 packet, right in all lengths, has a routing header with segments left.
func modelRouted(p []byte) bool {
	if p[0]>>4 != 6 {
		return false
	}
	protocol, rest := p[6], p[40:]
	for protocol == 0 || protocol == 43 || protocol == 60 {
		if protocol == 43 && rest[3] != 0 {
			return true
		}
		protocol, rest = rest[0], rest[8+8*int(rest[1]):]
	}
	return false
}

// modelSplits tells whether the packets, all valid, are those that their superpacket splits into, if the IPv4 identification went up
// by step.
func modelSplits(burst []sent, numbers []int, head slowHeader, size, step int) bool {
	super := bytes.Clone(burst[numbers[0]].data[:head.length])
	last := burst[numbers[len(numbers)-1]].data
	if !head.udp {
		super[head.transport+13] |= last[head.transport+13] & 8
	}
	for k, i := range numbers {
		p := burst[i].data
		want := expectedHeader(super, p, k, k*size, len(numbers))
		if step == 0 {
			copy(want[4:6], super[4:6])
		}
		if !bytes.Equal(p[:head.length], want) {
			return false
		}
	}
	return true
}

// checkBurst adds a burst to c, which must be Reset, and checks everything about what comes out; then it resets c. What is refused is
// taken out of the burst. It returns how many packets are in each write.
func checkBurst(t *testing.T, c *Coalescer, burst []sent, exact bool) (counts []int) {
	t.Helper()
	defer c.Reset()
	var kept []sent
	var before [][]byte
	for _, p := range burst {
		switch got := c.Add(len(kept), p.data, p.size); got {
		case Added:
			kept = append(kept, p)
			before = append(before, bytes.Clone(p.data))
		case Full:
			t.Fatalf("full after %d packets", len(kept))
		case Refused:
			checkRefused(t, c, p)
		}
	}
	writes := c.Writes()
	position := make([]int, len(kept))
	var order []int
	for i := range writes {
		order = append(order, writes[i].Packets...)
		counts = append(counts, len(writes[i].Packets))
		checkWrite(t, c, &writes[i], kept)
	}
	for i := range position {
		position[i] = -1
	}
	for i, number := range order {
		if number < 0 || number >= len(kept) || position[number] >= 0 {
			t.Fatalf("packet %d of %d is written again or was never added", number, len(kept))
		}
		position[number] = i
	}
	for i, p := range kept {
		if position[i] < 0 || !bytes.Equal(p.data, before[i]) {
			t.Fatalf("packet %d is lost or was changed", i)
		}
		for j := range i {
			if position[j] > position[i] && modelOrdered(kept[j].data, p.data) {
				t.Fatalf("packet %d overtakes packet %d of its flow: %v", i, j, order)
			}
		}
	}
	if exact {
		checkModel(t, c, writes, kept)
	}
	return counts
}

func checkModel(t *testing.T, c *Coalescer, writes []Write, burst []sent) {
	t.Helper()
	var got [][]int
	for _, w := range writes {
		got = append(got, w.Packets)
	}
	if want := modelWrites(c, burst); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("merged %v, want %v", got, want)
	}
}

// checkRefused: only superpackets are, for one of four reasons.
func checkRefused(t *testing.T, c *Coalescer, p sent) {
	t.Helper()
	var s Superpacket
	if p.size != 0 && (!s.Parse(p.data, p.size) || s.payload > maxHeaders || !c.merges(s.protocol)) {
		return
	}
	if p.size == 0 || s.protocol != 17 || s.Segments() <= 64 && c.MaxDatagrams == 0 || s.Segments() <= min(c.MaxDatagrams, 128) {
		t.Fatalf("refused: %d bytes, segment size %d", len(p.data), p.size)
	}
}

// checkWrite compares a write with the packets that are said to be in it.
func checkWrite(t *testing.T, c *Coalescer, w *Write, burst []sent) {
	t.Helper()
	size := max(c.HeaderSize, HeaderLen)
	b := bytes.Join(w.Parts, nil)
	header, _ := DecodeHeader(b)
	if len(w.Parts) > 2+maxSegments || len(b) != w.Len || header != w.Header || !bytes.Equal(b[HeaderLen:size], make([]byte, size-HeaderLen)) {
		t.Fatalf("%d parts of %d bytes in all, said %d; header %+v, said %+v", len(w.Parts), len(b), w.Len, header, w.Header)
	}
	packet := b[size:]
	first := burst[w.Packets[0]]
	if len(w.Packets) == 1 && first.size == 0 {
		if header != (Header{}) || !bytes.Equal(packet, first.data) || w.Segments != 1 || len(w.Parts[1]) > 0 && &w.Parts[1][0] != &first.data[0] {
			t.Fatalf("a packet without company is not written as it came: header %+v", header)
		}
		return
	}
	checkSuperpacket(t, w, packet)
	if first.size != 0 {
		checkSegments(t, &Superpacket{}, w, packet, first)
		return
	}
	var s Superpacket
	if !s.Parse(packet, int(header.GSOSize)) || s.Segments() != len(w.Packets) || w.Segments != len(w.Packets) {
		t.Fatalf("%d packets in %d segments, said %d", len(w.Packets), s.Segments(), w.Segments)
	}
	fixed := packet[0] == 0x45 && bytes.Equal(first.data[4:6], burst[w.Packets[1]].data[4:6])
	for k, i := range w.Packets {
		got, want := s.AppendSegment(nil, k), bytes.Clone(burst[i].data)
		if fixed { // the id counts up in the segments
			binary.BigEndian.PutUint16(want[4:], binary.BigEndian.Uint16(first.data[4:])+uint16(k))
			finishIP(want)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("packet %d, segment %d of %d:\n got %x\nwant %x", i, k, len(w.Packets), got[:min(len(got), 120)], want[:min(len(want), 120)])
		}
		if payload := w.Parts[k+1]; &payload[0] != &burst[i].data[s.payload] {
			t.Fatalf("packet %d: the payload was copied", i)
		}
	}
}

// checkSegments: a superpacket that was added as one splits as it would have before.
func checkSegments(t *testing.T, s *Superpacket, w *Write, packet []byte, p sent) {
	t.Helper()
	var was Superpacket
	if !was.Parse(p.data, p.size) || !s.Parse(packet, p.size) || w.Segments != was.Segments() || s.Segments() != was.Segments() {
		t.Fatalf("%d segments, said %d, were %d", s.Segments(), w.Segments, was.Segments())
	}
	for k := range was.Segments() {
		if k > 20 && k < was.Segments()-20 {
			continue
		}
		if got, want := s.AppendSegment(nil, k), was.AppendSegment(nil, k); !bytes.Equal(got, want) {
			t.Fatalf("segment %d:\n got %x\nwant %x", k, got[:min(len(got), 120)], want[:min(len(want), 120)])
		}
	}
	if len(w.Packets) != 1 || w.Header.GSOType&GSOECN != 0 != (s.protocol == protoTCP && w.Segments > 1 && packet[s.transport+13]&tcpCWR != 0) {
		t.Fatalf("%d numbers, header %+v", len(w.Packets), w.Header)
	}
}

// checkSuperpacket: the headers are such as the kernel's own superpackets have. It is shape.super's rule: finished, all sums are right.
func checkSuperpacket(t *testing.T, w *Write, packet []byte) {
	t.Helper()
	h := w.Header
	var l layout
	if !l.parse(packet) || h.Flags != FlagNeedsCsum || int(h.HdrLen) != l.payload || int(h.CsumStart) != l.transport {
		t.Fatalf("header %+v for payload at %d, transport at %d", h, l.payload, l.transport)
	}
	if size, n := h.Accept(bytes.Clone(packet)); n != w.Segments || n > 1 && size != int(h.GSOSize) {
		t.Fatalf("the header says %d segments of %d: %+v", n, size, h)
	}
	finished := bytes.Clone(packet)
	if !h.finish(finished) {
		t.Fatalf("the checksum is outside: %+v", h)
	}
	if _, err := parseSlow(finished); err != nil {
		t.Fatalf("superpacket: %v: %x", err, finished[:l.payload])
	}
}

// finishIP writes the checksum of an IPv4 header anew.
func finishIP(p []byte) {
	copy(p[10:], []byte{0, 0})
	binary.BigEndian.PutUint16(p[10:], ^slowSum(p[:int(p[0]&0xf)*4]))
}
