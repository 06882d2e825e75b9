package overlay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/overlay/internal/virtio"
	"golang.org/x/sys/unix"
)

// framed puts the kernel's header before a packet.
func framed(p Packet, f *form, header int) []byte {
	b := make([]byte, header, header+len(p.Data))
	if p.SegmentSize != 0 {
		h := virtio.Header{Flags: virtio.FlagNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: uint16(p.SegmentSize), HdrLen: uint16(len(p.Data))}
		h.CsumStart, h.CsumOffset = uint16(f.headerLen()-20-len(f.tcpOptions)), 16
		switch {
		case f.udp:
			h.GSOType, h.CsumStart, h.CsumOffset = virtio.GSOUDPL4, uint16(f.headerLen()-8), 6
		case f.v6:
			h.GSOType = virtio.GSOTCPv6
		}
		h.Encode(b)
	}
	return append(b, p.Data...)
}

// A superpacket is handed out packet by packet by Read, and what Read has left of it by ReadBatch; a buffer that is too short loses
// exactly one packet. So it is behind headers of any size.
func TestReadTakesSuperpacketsApart(t *testing.T) {
	r := seeded(t)
	for _, header := range []int{10, 12, maxVnetSize} {
		q, k := newFaultyQueue(t, header)
		var want Stats
		buf := make([]byte, maxPacket)
		for range 150 {
			f := randomForm(r, r.IntN(2) == 0, r.IntN(2) == 0)
			p := randomSuper(r, f)
			switch r.IntN(6) {
			case 0:
				p.SegmentSize = 0
			case 1: // the largest that the kernel makes
				p = Packet{f.packet(make([]byte, maxPacket-f.headerLen())), 1 + r.IntN(maxPacket)}
				if r.IntN(2) == 0 {
					p.SegmentSize = 600
				}
			}
			k.send(framed(p, f, header))
			if p.SegmentSize != 0 {
				want.ReadSuper++
			}
			for i := 0; i < p.Segments(); {
				i += readMixed(t, r, q, buf, p, i, &want)
			}
		}
		var got Stats
		if q.addTo(&got); got.ReadPackets != want.ReadPackets || got.ReadDropped != want.ReadDropped || got.ReadInvalid != 0 || got.ReadSuper != want.ReadSuper {
			t.Errorf("header of %d bytes: counters %+v, want %+v", header, got, want)
		}
		q.Close()
	}
}

// readMixed takes the i-th packet of p, or more, in any way, and returns how many.
func readMixed(t *testing.T, r *rand.Rand, q *tunQueue, buf []byte, p Packet, i int, want *Stats) (n int) {
	t.Helper()
	first := p.AppendSegment(nil, i)
	switch r.IntN(3) {
	case 0:
		short := buf[:r.IntN(len(first))]
		if n, err := q.Read(short); n != 0 || err != io.ErrShortBuffer {
			t.Fatalf("a buffer of %d for %d bytes: %d, %v", len(short), len(first), n, err)
		}
		want.ReadDropped++
		return 1
	case 1:
		if n, err := q.Read(buf[:len(first)+r.IntN(maxPacket+1-len(first))]); err != nil || !bytes.Equal(buf[:n], first) {
			t.Fatalf("segment %d of %d: %d bytes, %v", i, p.Segments(), n, err)
		}
		want.ReadPackets++
		return 1
	}
	packets, err := q.ReadBatch()
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range packets {
		for j := range got.Segments() {
			if !bytes.Equal(got.AppendSegment(nil, j), p.AppendSegment(nil, i+n)) {
				t.Fatalf("ReadBatch: segment %d of %d differs", i+n, p.Segments())
			}
			n++
		}
	}
	want.ReadPackets += uint64(n)
	return n
}

// What Read has not handed out when the queue is closed is lost and counted, whether a reader is at it meanwhile, who gets
// os.ErrClosed, or not.
func TestCloseAmidASuperpacket(t *testing.T) {
	for _, first := range []int{10, 4999} {
		q, k := newFaultyQueue(t, vnetHeaderSize)
		q.sole.Store(true)
		f := randomForm(seeded(t), false, false)
		k.send(framed(Packet{f.packet(make([]byte, 50_000)), 10}, f, vnetHeaderSize))
		read, buf := uint64(0), make([]byte, maxPacket)
		next := func() error {
			_, err := q.Read(buf)
			if err == nil {
				read++
			}
			return err
		}
		for range first {
			if err := next(); err != nil {
				t.Fatal(err)
			}
		}
		if first == 10 {
			q.Close()
		}
		done := make(chan error, 1)
		go func() {
			err := error(nil)
			for err == nil {
				err = next()
			}
			done <- err
		}()
		if first != 10 {
			parked(t, "tunQueue).Read(", 1)
			q.Close()
		}
		if err := returns(t, patience, "Read", done); err != os.ErrClosed {
			t.Errorf("got %v, want os.ErrClosed", err)
		}
		if read+q.readDropped.Load() != 5000 || q.readPackets.Load() != read || first == 10 && read != 10 {
			t.Errorf("%d packets read, %d dropped, of 5000", read, q.readDropped.Load())
		}
	}
}

// What WriteBatch promises holds with offloads too: how many were taken, why not the first of the others, what is counted, filtered and
// left alone.
func TestWriteBatchOfAMixtureWithOffloads(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	merged := burstOf(10)
	super := Packet{superOf(4000), 300}
	batch := append([]Packet{{Data: filterV4(1, 0, 0, 5, 1, 0, 0)}, super}, merged...)
	batch = append(batch, Packet{superOf(100), 70_000}, super, Packet{Data: []byte{0x20}}, Packet{}, Packet{Data: filler(4, maxPacket+1, 1)})
	for _, malformed := range []bool{true, false} {
		before := w.in.Stats()
		kept := clonePackets(batch)
		n, err := w.in.Queues()[0].WriteBatch(batch)
		if want := len(batch) - 1; !malformed && (n != want-3 || !errors.Is(err, unix.EMSGSIZE)) || malformed && (n != want-3 || !errors.Is(err, unix.EINVAL)) {
			t.Errorf("%d of %d taken, %v", n, len(batch), err)
		}
		if !bytes.Equal(flat(kept), flat(batch)) {
			t.Error("WriteBatch changed its packets")
		}
		s := w.in.Stats()
		if got := s.WriteBytes - before.WriteBytes; int(got) != len(flat(merged))+2*len(super.Data) {
			t.Errorf("%d bytes counted", got)
		}
		if s.WritePackets-before.WritePackets != 20+2*14 || s.WriteSuper-before.WriteSuper != 4 || s.WriteFiltered-before.WriteFiltered != 1 || s.WriteRefused-before.WriteRefused != 4 {
			t.Errorf("counters %+v\nwere %+v", s, before)
		}
		if err := sameFlows(w.collect(), hopped(append(append([]Packet{super}, merged...), super))); err != nil {
			t.Error(err)
		}
		batch[1], batch[len(batch)-1] = batch[len(batch)-1], batch[1] // now what is too long is the first of the others
	}
}

func flat(packets []Packet) (all []byte) {
	for _, p := range packets {
		all = append(all, p.Data...)
	}
	return all
}

// hopped returns packets as a router passes them on, superpackets split.
func hopped(packets []Packet) (out []Packet) {
	for _, p := range packets {
		for i := range p.Segments() {
			out = append(out, Packet{Data: lessHops(p.AppendSegment(nil, i))})
		}
	}
	return out
}

// Nothing of the caller's is kept: neither the list nor a packet, taken or refused, merged, split or alone.
func TestWriteBatchKeepsNothing(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	var freed atomic.Int64
	refuse := false
	w.faulty(func(h virtio.Header, _ []byte) (int, bool, error) {
		return 0, refuse && h.GSOType != virtio.GSONone, unix.EINVAL
	})
	const each = 42
	for i := range 6 {
		refuse = i%2 == 1
		func() {
			list := new([each]Packet)
			runtime.SetFinalizer(list, func(*[each]Packet) { freed.Add(1) })
			for j, p := range append(burstOf(20), Packet{superOf(4000), 300}, Packet{Data: []byte{0x20}}) {
				memory := new([5000]byte)
				runtime.SetFinalizer(memory, func(*[5000]byte) { freed.Add(1) })
				list[j] = Packet{memory[:copy(memory[:], p.Data)], p.SegmentSize}
			}
			if i >= 4 {
				if _, err := w.in.Queues()[0].Write(list[0].Data); err != nil {
					t.Fatal(err)
				}
				return
			}
			if n, err := w.in.Queues()[0].WriteBatch(list[:]); n != each-1 || !errors.Is(err, unix.EINVAL) {
				t.Fatal(n, err)
			}
		}()
		// At once: the next call would let go of what this one kept.
		eventually(t, "all is collected", func() bool { runtime.GC(); return freed.Load() == int64((i+1)*(each+1)) })
	}
}

// Nothing is allocated for superpackets, of however many parts, in either direction.
func TestSuperpacketsAllocateNothing(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	out := w.in.Queues()[0]
	q, k := newFaultyQueue(t, vnetHeaderSize)
	f := randomForm(seeded(t), true, false)
	super := framed(Packet{f.packet(make([]byte, 20_000)), 1000}, f, vnetHeaderSize)
	buf, batch := make([]byte, maxPacket), append(burstOf(60), Packet{superOf(9000), 300})
	for _, c := range []struct {
		name string
		call func() error
	}{
		{"WriteBatch", func() error { _, err := out.WriteBatch(batch); return err }},
		{"Read", func() (err error) {
			for i := 0; i < 20 && err == nil; i++ {
				if i == 0 {
					k.send(super)
				}
				_, err = q.Read(buf)
			}
			return err
		}},
		{"ReadBatch", func() error { k.send(super); _, err := q.ReadBatch(); return err }},
	} {
		if err := c.call(); err != nil {
			t.Fatal(c.name, err)
		}
		if got := testing.AllocsPerRun(100, func() { _ = c.call() }); got != 0 {
			t.Errorf("%s: %v allocations a call, want 0", c.name, got)
		}
	}
}

// A packet without company is with the kernel when the call returns, and read when it is there: nothing waits for more.
func TestLonePacketNeverWaits(t *testing.T) {
	r := newRig(t, Config{})
	w := r.tap()
	for i := range 50 {
		if _, err := r.q.WriteBatch([]Packet{{Data: sequence(i)}}); err != nil {
			t.Fatal(err)
		}
		n, _, err := unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT)
		if err != nil || !bytes.Equal(w.buf[:n], sequence(i)) {
			t.Fatalf("packet %d: the kernel has %d bytes, %v", i, n, err)
		}
		w.send(sequence(i)) // the next ReadBatch would wait for ever for another
		if packets, err := r.q.ReadBatch(); err != nil || len(packets) != 1 || !bytes.Equal(packets[0].Data, sequence(i)) {
			t.Fatalf("packet %d: %d packets, %v", i, len(packets), err)
		}
		for more := true; more; { // the tap's own
			_, _, err := unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT)
			more = err == nil
		}
	}
}

// The probe is a superpacket that the kernel takes and drops without a word: nobody gets it, nothing is answered.
func TestProbeIsDroppedSilently(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	q := w.in.Queues()[0].(*tunQueue)
	errorsOf := func() (n int) {
		w.ns.Do(t, func() {
			text, err := os.ReadFile("/proc/thread-self/net/netstat")
			snmp6, err2 := os.ReadFile("/proc/thread-self/net/snmp6")
			snmp, err3 := os.ReadFile("/proc/thread-self/net/snmp")
			if err := errors.Join(err, err2, err3); err != nil {
				t.Fatal(err)
			}
			n = counter(string(text), "InCsumErrors") + counter(string(snmp), "InHdrErrors") + counter6(string(snmp6), "Ip6InHdrErrors")
		})
		return n
	}
	for i, kind := range []uint8{virtio.GSOTCPv4, virtio.GSOTCPv4 | virtio.GSOECN, virtio.GSOTCPv6, virtio.GSOUDPL4, virtio.GSOUDPL4} {
		segments := []int{2, 2, 2, 2, fewDatagrams + 1}[i]
		before := errorsOf()
		sent := w.in.Stats()
		var err error
		if control := q.raw.Control(func(fd uintptr) { err = q.probe(int(fd), virtio.Probe(kind, segments)) }); control != nil || err != nil {
			t.Errorf("type %#x: %v, %v", kind, control, err)
		}
		if after := errorsOf(); after == before {
			t.Errorf("type %#x: the kernel counts no error", kind)
		}
		if s := w.in.Stats(); s.WritePackets != sent.WritePackets {
			t.Errorf("type %#x: counted as a packet", kind)
		}
	}
	// The answer to this one comes first.
	if _, err := q.Write(datagram(netip.AddrPortFrom(peer4, 7), netip.AddrPortFrom(own4.Addr(), 4), nil)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, maxPacket); ; {
		n, err := q.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if buf[0]>>4 == 4 {
			if buf[9] != 1 || !bytes.Contains(buf[28:n], peer4.AsSlice()) {
				t.Errorf("the kernel answered %x", buf[:n])
			}
			return
		}
	}
}

// counter sums a column of all tables in /proc/net/snmp's form.
func counter(text, name string) (sum int) {
	lines := strings.Split(text, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		for j, field := range strings.Fields(lines[i]) {
			if values := strings.Fields(lines[i+1]); field == name && j < len(values) {
				sum += number(values[j])
			}
		}
	}
	return sum
}

func counter6(text, name string) int {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			return number(f[1])
		}
	}
	return 0
}

func number(s string) (n int) {
	n, _ = strconv.Atoi(s)
	return n
}
