package virtio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"weak"
)

func both() *Coalescer { return &Coalescer{TCP: true, UDP: true} }

// TestCoalesceRandom compares one Coalescer, used again and again, with the slow model, and its superpackets with what they split into.
func TestCoalesceRandom(t *testing.T) {
	r := seeded(t)
	c := both()
	var packets, writes int
	for range 200 {
		c.TCP, c.UDP = r.IntN(8) != 0, r.IntN(8) != 0
		c.MaxDatagrams = []int{0, 0, 0, 1, 2, 10, 128}[r.IntN(7)]
		c.HeaderSize = []int{0, 0, 10, 12, 20}[r.IntN(5)]
		burst := randomBurst(r, 1+r.IntN(1+r.IntN(150)))
		counts := checkBurst(t, c, burst, true)
		packets, writes = packets+len(burst), writes+len(counts)
	}
	if packets < writes+writes/4 { // twice as many is usual
		t.Errorf("%d packets in %d writes: the random bursts are not such as merge", packets, writes)
	}
}

// TestCoalesceManyFlows: where there are more flows than the table holds, merging may be lost, order not.
func TestCoalesceManyFlows(t *testing.T) {
	r := seeded(t)
	c := both()
	for _, flows := range []int{8, 128, 500} {
		var burst []sent
		var streams []*stream
		for i := range flows {
			s := streamOf(i%2 == 0, i%4 < 2, byte(i))
			s.rest[4] = byte(i >> 8)
			streams = append(streams, s)
		}
		for len(burst) < 300 {
			i := r.IntN(flows)
			p := streams[i].next(100, tcpACK)
			if r.IntN(20) == 0 {
				p = fragment(p, 1, 0)
			}
			burst = append(burst, sent{data: p})
		}
		counts := checkBurst(t, c, burst, flows <= flowWays)
		t.Logf("%d flows, %d packets: %d writes", flows, len(burst), len(counts))
	}
}

// TestCoalesceEightFlows: wherever eight flows fall in the table, all of them stay open.
func TestCoalesceEightFlows(t *testing.T) {
	r := seeded(t)
	c := both()
	for range 50 {
		var streams []*stream
		for range 8 {
			s := streamOf(r.IntN(2) == 0, r.IntN(2) == 0, byte(r.Uint32()))
			s.src, s.dst = randomBytes(r, len(s.src)), randomBytes(r, len(s.dst))
			streams = append(streams, s)
		}
		var burst []sent
		for range 5 {
			for _, s := range streams {
				burst = append(burst, sent{data: s.next(100, tcpACK)})
			}
		}
		if got := checkBurst(t, c, burst, true); len(got) != 8 {
			t.Fatalf("8 flows of 5 packets: got writes of %v", got)
		}
	}
}

// TestCoalesceSameSet: nine flows in one set of the table; the ninth takes the place of the oldest.
func TestCoalesceSameSet(t *testing.T) {
	var streams []*stream
	set := -1
	for port := 0; len(streams) < flowWays+1; port++ {
		s := streamOf(false, true, byte(port))
		s.rest[4] = byte(port >> 8)
		p := s.packet([]byte{1}, 1, 1, 0)
		var l layout
		l.parse(p)
		if at := int(l.flowKey(p) % flowSets); set < 0 || set == at {
			set = at
			streams = append(streams, s)
		}
	}
	var burst []sent
	for _, i := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 2} {
		burst = append(burst, sent{data: streams[i].next(10, 0)})
	}
	got := checkBurst(t, both(), burst, false)
	if want := []int{1, 2, 3, 2, 2, 2, 2, 2, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("got writes of %v, want %v", got, want)
	}
}

// TestFlowTableCollision: flows that have the same key are still told apart.
func TestFlowTableCollision(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		flow := func(udp bool, port byte) *stream {
			s := streamOf(v6, udp, port)
			if v6 {
				copy(s.src[4:], []byte{10, 0, 0, 1, 10, 0, 0, 2}) // where IPv4 has streamOf's addresses
			}
			return s
		}
		c, a := both(), flow(false, 1)
		var l layout
		p := a.next(100, tcpACK)
		c.Add(0, p, 0)
		l.parse(p)
		key := l.flowKey(p)
		if at := c.flows.find(c, key, p, &l); at == nil || *at != 1 {
			t.Fatalf("v6 %v: its own flow is not found", v6)
		}
		others := []*stream{streamOf(!v6, false, 1), flow(true, 1), flow(false, 2)}
		for i := range 2 {
			s := flow(false, 1)
			address := [][]byte{s.src, s.dst}[i]
			address[len(address)-1] ^= 1
			others = append(others, s)
		}
		for i, s := range others {
			p := s.next(100, tcpACK)
			l.parse(p)
			if c.flows.find(c, key, p, &l) != nil {
				t.Errorf("v6 %v: other flow %d is taken for it", v6, i)
			}
		}
	}
}

func TestCoalesceFull(t *testing.T) {
	c, s := both(), streamOf(false, false, 1)
	for i := range MaxBatch {
		if got := c.Add(i, s.next(10, tcpACK), 0); got != Added {
			t.Fatalf("packet %d: got %d", i, got)
		}
	}
	extra := s.next(10, tcpACK)
	if got := c.Add(0, extra, 0); got != Full {
		t.Errorf("packet %d: got %d, want Full", MaxBatch, got)
	}
	if got := c.Add(0, s.super(), 1); got != Full {
		t.Errorf("superpacket: got %d, want Full", got)
	}
	if got := len(c.Writes()); got != MaxBatch/maxSegments {
		t.Errorf("got %d writes, want %d", got, MaxBatch/maxSegments)
	}
	c.Reset()
	if got := c.Add(0, extra, 0); got != Added || len(c.Writes()) != 1 {
		t.Errorf("after Reset: got %d, %d writes", got, len(c.Writes()))
	}
}

// TestCoalesceSuperpackets: what is taken as a whole, and what is refused.
func TestCoalesceSuperpackets(t *testing.T) {
	long := over6(tcp4(0, 100, 10), ext(0, append([]byte{31}, make([]byte, 254)...)...))
	body := append([]byte{2, 4, 1, 0, 0, 0, 0}, bytes.Repeat([]byte{9}, 16)...)
	for _, k := range []struct {
		name  string
		c     Coalescer
		super *shape
		size  int
		want  Outcome
	}{
		{"TCP", Coalescer{TCP: true}, tcp4(0xff, 60_000, 1448), 1448, Added},
		{"TCP, not wanted", Coalescer{UDP: true}, tcp4(0, 100, 10), 10, Refused},
		{"TCP of many segments", Coalescer{TCP: true}, tcp4(0, 60_000, 1), 1, Added},
		{"UDP", Coalescer{UDP: true}, udp4(64, 1), 1, Added},
		{"UDP, not wanted", Coalescer{TCP: true}, udp4(64, 1), 1, Refused},
		{"UDP of too many segments", Coalescer{UDP: true}, udp4(65, 1), 1, Refused},
		{"UDP of many segments", Coalescer{UDP: true, MaxDatagrams: 128}, udp4(128, 1), 1, Added},
		{"UDP of still more", Coalescer{UDP: true, MaxDatagrams: 1000}, udp4(129, 1), 1, Refused},
		{"one segment", Coalescer{TCP: true}, tcp4(0xff, 10, 10), 10, Added},
		{"one segment, size 65535", Coalescer{UDP: true}, udp4(10, 65_535), 65_535, Added},
		{"IPv6 of more than 65535 bytes", Coalescer{UDP: true}, over6(udp4(65_535-8, 1300)), 1300, Added},
		{"routing with segments left", Coalescer{TCP: true}, over6(tcp4(0, 100, 10), extension{43, body, body[7:]}), 10, Added},
		{"long headers", Coalescer{TCP: true}, long, 10, Refused},
		{"size -1", Coalescer{TCP: true}, tcp4(0, 100, 10), -1, Refused},
		{"no payload", Coalescer{TCP: true}, tcp4(0, 0, 10), 10, Refused},
	} {
		got := k.c.Add(5, k.super.super(), k.size)
		k.c.Reset()
		if got != k.want {
			t.Errorf("%s: got %d, want %d", k.name, got, k.want)
		}
		checkBurst(t, &k.c, []sent{{k.super.super(), k.size}}, true)
	}
}

// TestCoalesceForgets: after Reset nothing keeps a packet alive.
func TestCoalesceForgets(t *testing.T) {
	c := both()
	var kept []weak.Pointer[byte]
	func() {
		s := streamOf(false, false, 1)
		for i := range 10 {
			p := s.next(100, tcpACK)
			kept = append(kept, weak.Make(&p[0]))
			c.Add(i, p, 0)
		}
		c.Writes()
		c.Reset()
	}()
	runtime.GC()
	for i, p := range kept {
		if p.Value() != nil {
			t.Errorf("packet %d is still there", i)
		}
	}
	runtime.KeepAlive(c)
}

// TestCoalesceWritesAgain: Writes may be called more than once, also in the middle.
func TestCoalesceWritesAgain(t *testing.T) {
	c, s := both(), streamOf(true, false, 1)
	for i := range 10 {
		c.Add(i, s.next(100, tcpACK), 0)
		first := fmt.Sprint(c.Writes())
		if again := c.Writes(); len(again) != 1 || len(again[0].Packets) != i+1 || fmt.Sprint(again) != first {
			t.Fatalf("after %d packets: got %d writes", i+1, len(again))
		}
	}
}

func TestCoalesceAllocs(t *testing.T) {
	r := seeded(t)
	c := both()
	burst := randomBurst(r, 200)
	allocs := testing.AllocsPerRun(50, func() {
		for i, p := range burst {
			c.Add(i, p.data, p.size)
		}
		c.Writes()
		c.Reset()
	})
	if allocs != 0 {
		t.Errorf("got %v allocations, want 0", allocs)
	}
}

// FuzzCoalesce: any sequence of packets. In the input, each has its length and segment size before it.
func FuzzCoalesce(f *testing.F) {
	r := fuzzSource()
	for range 30 {
		var b []byte
		for _, p := range randomBurst(r, 1+r.IntN(12)) {
			p.data = p.data[:min(len(p.data), 300)]
			b = binary.BigEndian.AppendUint16(b, uint16(len(p.data)))
			b = binary.BigEndian.AppendUint16(b, uint16(p.size))
			b = append(b, refinish(p.data)...)
		}
		f.Add(b)
	}
	for _, c := range superCases() {
		if len(c.data) < 200 {
			b := binary.BigEndian.AppendUint16(nil, uint16(len(c.data)))
			b = append(append(b, 0, 0), c.data...)
			f.Add(append(b, b...))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var burst []sent
		flows := map[string]bool{}
		for len(b) >= 4 && len(burst) < 100 {
			n, size := int(binary.BigEndian.Uint16(b)), int(binary.BigEndian.Uint16(b[2:]))
			n = min(n, len(b)-4)
			burst = append(burst, sent{data: slices.Clip(b[4 : 4+n]), size: size})
			flow, _ := modelFlow(b[4 : 4+n])
			flows[flow] = true
			b = b[4+n:]
		}
		c := both()
		checkBurst(t, c, burst, len(flows) <= flowWays)
		checkBurst(t, c, burst, len(flows) <= flowWays)
	})
}

// TestCoalescerMemory holds what doc.go of the library says a queue keeps for WriteBatch, at worst: MaxBatch superpackets with the
// longest headers, each a flow of its own.
func TestCoalescerMemory(t *testing.T) {
	const bound = 320 << 10
	heap := func() int {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	burst := longHeaders()
	for _, header := range []int{10, 64} {
		before := heap()
		c := &Coalescer{TCP: true, UDP: true, MaxDatagrams: 128, HeaderSize: header}
		for i, p := range burst {
			if got := c.Add(i, p.data, p.size); got != Added {
				t.Fatalf("packet %d: %v", i, got)
			}
		}
		writes := c.Writes()
		atWork := heap() - before
		if len(writes) != MaxBatch || atWork > bound {
			t.Errorf("virtio header of %d bytes: %d KiB for %d writes", header, atWork>>10, len(writes))
		}
		t.Logf("virtio header of %d bytes: %d KiB", header, atWork>>10)
		runtime.KeepAlive(c)
	}
}

// longHeaders are superpackets with 236 bytes of headers.
func longHeaders() (burst []sent) {
	const options = 136
	for i := range MaxBatch {
		b := make([]byte, headerLen6+options+60+2)
		b[0], b[6], b[7] = 0x60, 60, 64
		b[8], b[9], b[23], b[24], b[39] = 0xfd, byte(i), byte(i>>8), 0xfd, 1
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-headerLen6))
		b[40], b[41], b[42], b[43] = protoTCP, options/8-1, 1, options-4
		b[headerLen6+options+12], b[headerLen6+options+13] = 0xf0, tcpACK
		burst = append(burst, sent{data: b, size: 1})
	}
	return burst
}
