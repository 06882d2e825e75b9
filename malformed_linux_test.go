package overlay

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"example.com/overlay/internal/virtio"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// malformedCase is what the kernel says to a header before a packet, and what a reader makes of the same.
type malformedCase struct {
	name     string
	header   virtio.Header
	packet   []byte
	refused  bool // by the kernel, with EINVAL
	segments int  // for a reader: 0 is refused
}

// malformedCases are those of kernel.md C5, with what a 6.18 kernel answers.
func malformedCases() []malformedCase {
	const csum, none, tcp4, tcp6, ufo, udp, ecn = virtio.FlagNeedsCsum, virtio.GSONone, virtio.GSOTCPv4, virtio.GSOTCPv6, virtio.GSOUDP, virtio.GSOUDPL4, virtio.GSOECN
	// From a loopback address: the kernel drops it when it has said what it thinks of the header.
	packetOf := func(kind uint8) []byte { return virtio.Probe(kind, 2)[virtio.HeaderLen:] }
	t4, t6, u4 := packetOf(tcp4), packetOf(tcp6), packetOf(udp)
	long := append(bytes.Clone(u4), make([]byte, 8*129-16)...)
	lies, fragment, options := bytes.Clone(t4), bytes.Clone(t4), bytes.Clone(t4)
	binary.BigEndian.PutUint16(lies[2:], 20)
	fragment[6] = 0x20
	options[0] = 0x4f
	short := bytes.Clone(t4)
	short[32] = 0x40
	h := func(flags, kind uint8, length, size, start, offset int) virtio.Header {
		return virtio.Header{Flags: flags, GSOType: kind, HdrLen: uint16(length), GSOSize: uint16(size), CsumStart: uint16(start), CsumOffset: uint16(offset)}
	}
	return []malformedCase{
		{"TCP", h(csum, tcp4, 40, 8, 20, 16), t4, false, 2},
		{"TCP over IPv6", h(csum, tcp6, 60, 8, 40, 16), t6, false, 2},
		{"UDP", h(csum, udp, 28, 8, 20, 6), u4, false, 2},
		{"plain", h(0, none, 0, 0, 0, 0), t4, false, 1},
		{"size 0", h(csum, tcp4, 40, 0, 20, 16), t4, true, 0},
		{"size 0, UDP", h(csum, udp, 28, 0, 20, 6), u4, true, 0},
		{"size 65535, which means something else to the kernel", h(csum, tcp4, 40, 65535, 20, 16), t4, true, 1},
		{"size beyond, UDP", h(csum, udp, 28, 9000, 20, 6), u4, false, 1},
		{"header length beyond", h(csum, tcp4, 100, 8, 20, 16), t4, true, 2},
		{"header length 65535", h(csum, tcp4, 65535, 8, 20, 16), t4, true, 2},
		{"header length 0", h(csum, tcp4, 0, 8, 20, 16), t4, false, 2},
		{"start beyond", h(csum, tcp4, 40, 8, 300, 16), t4, true, 0},
		{"start 65535", h(csum, tcp4, 40, 8, 65535, 16), t4, true, 0},
		{"start and offset wrap", h(csum, none, 0, 0, 65530, 10), t4, true, 0},
		{"offset of UDP in TCP", h(csum, tcp4, 40, 8, 20, 6), t4, true, 0},
		{"offset of TCP in UDP", h(csum, udp, 28, 8, 20, 16), u4, true, 0},
		{"offset 0", h(csum, tcp4, 40, 8, 20, 0), t4, true, 0},
		{"offset 65535", h(csum, tcp4, 40, 8, 20, 65535), t4, true, 0},
		{"v6 type on v4", h(csum, tcp6, 40, 8, 20, 16), t4, true, 0},
		{"v4 type on v6", h(csum, tcp4, 60, 8, 40, 16), t6, false, 0},
		{"type 2", h(csum, 2, 40, 8, 20, 16), t4, true, 0},
		{"type 6", h(csum, 6, 40, 8, 20, 16), t4, true, 0},
		{"type 127", h(csum, 127, 40, 8, 20, 16), t4, true, 0},
		{"ECN alone", h(csum, ecn, 40, 8, 20, 16), t4, true, 0},
		{"ECN and TCP", h(csum, tcp4|ecn, 40, 8, 20, 16), t4, false, 2},
		{"ECN on UDP", h(csum, udp|ecn, 28, 8, 20, 6), u4, true, 0},
		{"UDP without a flag", h(0, udp, 28, 8, 0, 0), u4, true, 2},
		{"TCP without a flag", h(0, tcp4, 40, 8, 0, 0), t4, false, 2},
		{"UDP of 129 segments", h(csum, udp, 28, 8, 20, 6), long, true, 129},
		{"TCP type on UDP", h(csum, tcp4, 28, 8, 20, 16), u4, false, 0},
		{"UDP type on TCP", h(csum, udp, 40, 8, 20, 6), t4, false, 0},
		{"UFO", h(csum, ufo, 28, 8, 20, 6), u4, false, 0},
		{"total length lies", h(csum, tcp4, 40, 8, 20, 16), lies, false, 2},
		{"fragment", h(csum, tcp4, 40, 8, 20, 16), fragment, false, 0},
		{"IPv4 header beyond the packet", h(csum, tcp4, 40, 8, 20, 16), options, false, 0},
		{"TCP header too short", h(csum, tcp4, 40, 8, 20, 16), short, false, 0},
		{"plain, checksum half outside", h(csum, none, 0, 0, 20, len(t4)-21), t4, true, 0},
		{"plain, checksum at the end", h(csum, none, 0, 0, 20, len(t4)-22), t4, false, 1},
		{"plain, start at the end", h(csum, none, 0, 0, len(t4), 0), t4, true, 0},
		{"RSC", h(csum|virtio.FlagRSCInfo, tcp4, 40, 8, 20, 16), t4, false, 2},
		{"verified", h(virtio.FlagDataValid, tcp4, 40, 8, 0, 0), t4, false, 2},
		{"no packet", h(csum, tcp4, 0, 8, 20, 16), nil, true, 0},
		{"IP version 0", h(0, none, 0, 0, 0, 0), []byte{0}, true, 1},
	}
}

// What the kernel says to each is not what a reader says: it takes some that make no sense, and so does not vouch for what it hands out.
func TestMalformedHeaders(t *testing.T) {
	r := newRig(t, Config{})
	out := r.q.(*tunQueue)
	in, k := newFaultyQueue(t, vnetHeaderSize)
	invalid := uint64(0)
	for _, c := range malformedCases() {
		b := make([]byte, vnetHeaderSize)
		c.header.Encode(b)
		var err error
		if control := out.raw.Control(func(fd uintptr) { err = out.send(int(fd), [][]byte{b, c.packet}, vnetHeaderSize+len(c.packet)) }); control != nil {
			t.Fatal(control)
		}
		if (err != nil) != c.refused || err != nil && err != unix.EINVAL {
			t.Errorf("%s: the kernel says %v, want EINVAL: %v", c.name, err, c.refused)
		}
		k.send(append(b, c.packet...))
		k.send(append(make([]byte, vnetHeaderSize), sequence(1)...))
		packets, err := in.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		if len(packets) == 2 {
			got = packets[0].Segments()
		} else {
			invalid++
		}
		if got != c.segments || !bytes.Equal(packets[len(packets)-1].Data, sequence(1)) {
			t.Errorf("%s: a reader gets %d segments, want %d", c.name, got, c.segments)
		}
	}
	if got := in.readInvalid.Load(); got != invalid || invalid < 15 {
		t.Errorf("%d counted as invalid, want %d", got, invalid)
	}
}

// randomMalformed makes something that once was a packet, and a segment size.
func randomMalformed(r *rand.Rand) Packet {
	f := randomForm(r, r.IntN(2) == 0, r.IntN(2) == 0)
	p := f.packet(make([]byte, r.IntN(300)))
	for range r.IntN(4) {
		p[r.IntN(min(len(p), 90))] = []byte{0, 1, 0x40, 0x45, 0x60, 0xff, byte(r.Uint32())}[r.IntN(7)]
	}
	if r.IntN(3) == 0 {
		p = p[:r.IntN(len(p)+1)]
	}
	return Packet{p, []int{0, 0, 1, 10, 65535, 65536, -1, r.IntN(400)}[r.IntN(8)]}
}

// nextMalformed is the next packet of a flow, in two cases of three with some of its bits changed, before or after its checksum was made.
func nextMalformed(r *rand.Rand, f *form) Packet {
	p := f.finished(randomBytes(r, 1+300*r.IntN(2)))
	if change := r.IntN(3); change > 0 {
		i := r.IntN(min(len(p), 100))
		p[i] ^= 1 << r.IntN(8)
		if change == 1 && i < 20 && p[0] == 0x45 {
			sumHeader(p)
		}
	}
	f.seq += uint32(len(p) - f.headerLen())
	f.id++
	return Packet{Data: p}
}

// A million of them through the reader's and the writer's machinery, and fewer through a device: no panic, no wrong merge, and a log
// that does not grow with them.
func TestMalformedByTheMillion(t *testing.T) {
	n := 1_000_000
	if raceEnabled || testing.Short() {
		n = 100_000
	}
	r := seeded(t)
	merge := virtio.Coalescer{TCP: true, UDP: true, MaxDatagrams: 128}
	buf := make([]byte, 0, maxPacket+40)
	segments, merged := 0, 0
	trains := make([]*form, 6)
	var burst []Packet
	for i := range n {
		if i%4096 == 0 {
			for j := range trains {
				trains[j] = randomForm(r, j%2 == 0, j%3 == 0)
				trains[j].flags = tcpFlagACK
			}
		}
		p := randomMalformed(r)
		if r.IntN(4) > 0 {
			p = nextMalformed(r, trains[r.IntN(len(trains))])
		}
		h := virtio.Header{Flags: byte(r.IntN(4)), GSOType: []byte{0, 1, 3, 4, 5, 0x81, byte(r.Uint32())}[r.IntN(7)], GSOSize: uint16(p.SegmentSize)}
		h.CsumStart, h.CsumOffset = uint16(20*r.IntN(4)), uint16(6+10*r.IntN(2))
		if r.IntN(8) == 0 {
			h.CsumStart, h.CsumOffset = uint16(r.Uint32()), uint16(r.Uint32())
		}
		burst = append(burst, p)
		if merge.Add(len(burst)-1, p.Data, p.SegmentSize) == virtio.Full || i%64 == 63 {
			packets, together := writtenWhole(t, &merge, burst)
			segments, merged, burst = segments+packets, merged+together, burst[:0]
		}
		read := Packet{Data: bytes.Clone(p.Data)}
		read.SegmentSize, _ = h.Accept(read.Data)
		for _, p := range []Packet{p, read} {
			for j := range min(p.Segments(), 3) {
				buf = p.AppendSegment(buf[:0], j)
			}
		}
	}
	if segments < n/4 || merged < n/20 {
		t.Errorf("%d of %d packets came out of the coalescer, %d of them merged", segments, n, merged)
	}
}

// writtenWhole checks that a superpacket is what its packets are, but for the identification, and returns how many packets there were
// and how many of them were merged.
func writtenWhole(t *testing.T, merge *virtio.Coalescer, burst []Packet) (n, merged int) {
	t.Helper()
	for _, w := range merge.Writes() {
		all := bytes.Join(w.Parts, nil)
		if len(all) != w.Len || len(w.Packets) == 0 {
			t.Fatalf("%d bytes for %d packets, %d said", len(all), len(w.Packets), w.Len)
		}
		p := Packet{all[virtio.HeaderLen:], int(w.Header.GSOSize)}
		if w.Header.GSOType != virtio.GSONone && p.Segments() != w.Segments {
			t.Fatalf("%d segments of %d", p.Segments(), w.Segments)
		}
		if n += len(w.Packets); len(w.Packets) == 1 {
			continue
		}
		merged += len(w.Packets)
		for i, number := range w.Packets {
			if is, was := withoutID(p.AppendSegment(nil, i)), withoutID(burst[number].Data); !bytes.Equal(is, was) {
				t.Fatalf("packet %d of %d that were merged%s", i, len(w.Packets), whereOther(is, was))
			}
		}
	}
	merge.Reset()
	return n, merged
}

// withoutID is a packet without IPv4 identification, which may change where it was fixed, and the checksum that it is in.
func withoutID(p []byte) []byte {
	p = bytes.Clone(p)
	if p[0]>>4 == 4 {
		clear(p[4:6])
		clear(p[10:12])
	}
	return p
}

// The same through a real device: whatever is written, it goes on, and keeps its offloads, and says no more than at the beginning.
func TestMalformedThroughADevice(t *testing.T) {
	w, r := newRoad(t, OffloadTCP|OffloadUDP), seeded(t)
	var log bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&log)
	logger.SetLevel(logrus.TraceLevel)
	cfg := Config{Name: "in", Networks: []netip.Prefix{own4, own6}, NetNS: w.ns.Path(), MTU: roadMTU, TxQueueLen: 20_000, Logger: logger}
	if err := w.in.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	q := w.in.Queues()[0]
	for range 300 {
		batch := make([]Packet, 1+r.IntN(60))
		for i := range batch {
			batch[i] = randomMalformed(r)
		}
		n, err := q.WriteBatch(batch)
		if n > len(batch) || (n == len(batch)) != (err == nil) {
			t.Fatalf("%d of %d taken, %v", n, len(batch), err)
		}
		w.collect() // else there is no room for the last of them
	}
	w.arrives("good ones afterwards", burstOf(20))
	if lines := bytes.Count(log.Bytes(), []byte("\n")); lines > 10 {
		t.Errorf("%d lines of log: %s", lines, log.Bytes()[:1000])
	}
	s := w.in.State()
	if len(s.String()) > 5000 || s.Offload != OffloadTCP|OffloadUDP {
		t.Errorf("State %v", s)
	}
	requireNoEvent(t, w.in, EventDegraded)
	t.Logf("%+v", w.in.Stats())
}

// FuzzRead: whatever bytes the kernel hands out become a packet that can be split, or none.
func FuzzRead(f *testing.F) {
	for _, c := range malformedCases() {
		b := make([]byte, vnetHeaderSize, vnetHeaderSize+len(c.packet))
		c.header.Encode(b)
		f.Add(append(b, c.packet...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < vnetHeaderSize || len(b) > readRoom {
			return
		}
		q := tunQueue{header: vnetHeaderSize}
		p, n := q.accept(b, len(b))
		if n == 0 {
			return
		}
		if n != p.Segments() {
			t.Fatalf("%d segments, the packet has %d", n, p.Segments())
		}
		for i := range min(n, 100) {
			if len(p.AppendSegment(nil, i)) == 0 {
				t.Fatalf("segment %d of %d is empty", i, n)
			}
		}
	})
}
