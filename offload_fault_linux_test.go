package overlay

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/virtio"
	"golang.org/x/sys/unix"
)

// answers stands between a queue and the kernel, for those writes that a test has another answer for. It notes what they were.
type answers struct {
	answer func(h virtio.Header, packet []byte) (n int, answered bool, err error)
	supers int // superpackets offered
	probes int
}

func (f *answers) instead(parts [][]byte) (int, bool, error) {
	all := bytes.Join(parts, nil)
	h, _ := virtio.DecodeHeader(all)
	packet := all[vnetHeaderSize:]
	if h.GSOType != virtio.GSONone {
		f.supers++
		if isProbe(packet) {
			f.probes++
		}
	}
	return f.answer(h, packet)
}

// isProbe tells what the queue itself sends: between loopback addresses, which no packet of these tests has.
func isProbe(packet []byte) bool { return packetSrc(packet).IsLoopback() }

// faulty puts answers before the road's first device.
func (w *road) faulty(answer func(h virtio.Header, packet []byte) (int, bool, error)) *answers {
	f := &answers{answer: answer}
	q := w.in.Queues()[0].(*tunQueue)
	q.writeMu.Lock()
	q.out.vector.instead = f.instead
	q.writeMu.Unlock()
	return f
}

// burstOf is n packets of each of two flows that merge, one TCP and one UDP.
func burstOf(n int) (burst []Packet) {
	tcp := &form{src: netip.AddrPortFrom(peer4, 1), dst: netip.AddrPortFrom(out4.Addr().Next(), 2), ttl: 9, flags: tcpFlagACK}
	udp := *tcp
	udp.udp = true
	for i := range n {
		for _, f := range []*form{tcp, &udp} {
			burst = append(burst, Packet{Data: f.finished(bytes.Repeat([]byte{byte(i)}, 500))})
			f.seq += 500
			f.id++
		}
	}
	return burst
}

// arrives sends a burst and wants the same packets out, each flow in order.
func (w *road) arrives(what string, burst []Packet) {
	w.Helper()
	got, err := w.through(burst)
	if err != nil {
		w.Fatalf("%s: %v", what, err)
	}
	var want []Packet
	for _, p := range burst {
		for i := range p.Segments() {
			want = append(want, Packet{Data: lessHops(p.AppendSegment(nil, i))})
		}
	}
	if err := sameFlows(got, want); err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

// EINVAL to one superpacket: its packets go one by one, none lost, none twice. A probe that is taken says that it was that one's fault.
func TestOneSuperpacketRefused(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	for n := range 4 {
		seen := 0
		f := w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
			if h.GSOType == virtio.GSONone || isProbe(packet) {
				return 0, false, nil
			}
			seen++
			return 0, seen == n+1, unix.EINVAL
		})
		batch := burstOf(20)
		batch = append(batch, Packet{superOf(4000), 300}, batch[0], Packet{superOf(5000), 300})
		w.arrives("one refused", batch)
		if f.supers != 5 || f.probes != 1 {
			t.Errorf("%d superpackets offered, %d of them probes", f.supers, f.probes)
		}
	}
	s := w.in.Stats()
	if s.OffloadFails != 4 || s.WriteRefused != 0 || s.WritePackets != 4*(41+14+17) {
		t.Errorf("counters %+v", s)
	}
	if got := w.in.State(); got.Offload != OffloadTCP|OffloadUDP || strings.Contains(got.String(), "note the kernel takes") {
		t.Errorf("a step down: %v", got)
	}
	requireNoEvent(t, w.in, EventDegraded)
}

// superOf is a superpacket for the road, of TCP.
func superOf(payload int) []byte {
	f := &form{src: netip.AddrPortFrom(peer4, 3), dst: netip.AddrPortFrom(out4.Addr().Next(), 4), ttl: 9, flags: tcpFlagACK}
	return f.packet(make([]byte, payload))
}

func requireNoEvent(t testing.TB, d Device, kind EventKind) {
	t.Helper()
	for {
		select {
		case e := <-d.Events():
			if e.Kind == kind {
				t.Errorf("an event: %v", e)
			}
		default:
			return
		}
	}
}

// kernel.md V24: a kernel that takes no superpackets of a protocol any more, not even the probe, gets none for a minute. One event
// tells, State does meanwhile, and nothing is lost.
func TestStepDownAndUpAgain(t *testing.T) {
	for _, kind := range []Offload{OffloadTCP, OffloadUDP} {
		w := newRoad(t, OffloadTCP|OffloadUDP)
		clock := newClock()
		w.in.(*tunDevice).offloads.clock = func() time.Time { return clock.Time }
		broken := true
		f := w.faulty(func(h virtio.Header, _ []byte) (int, bool, error) {
			refused := h.GSOType != virtio.GSONone && (h.GSOType == virtio.GSOUDPL4) == (kind == OffloadUDP)
			return 0, broken && refused, unix.EINVAL
		})
		w.arrives("refused", burstOf(20))
		if e := awaitEvent(t, w.in, EventDegraded); !strings.Contains(e.String(), kind.String()) || !errors.Is(e.Err, unix.EINVAL) {
			t.Errorf("%v: the event is %v", kind, e)
		}
		want := (OffloadTCP | OffloadUDP) &^ kind
		if s := w.in.State(); s.Offload != want || !strings.Contains(s.String(), "\nnote the kernel takes no superpackets of "+kind.String()) {
			t.Errorf("%v: State is %v", kind, s)
		}
		f.supers, f.probes = 0, 0
		clock.pass(offloadPause - 1)
		w.arrives("one protocol left", append(burstOf(20), Packet{superOf(4000), 300}))
		if f.probes != 0 || f.supers > 2 {
			t.Errorf("%v: before its time: %d superpackets, %d probes", kind, f.supers, f.probes)
		}
		clock.pass(1)
		w.arrives("a probe", burstOf(20))
		w.arrives("no probe", burstOf(20))
		if f.probes != 1 || w.in.State().Offload != want {
			t.Errorf("%v: after a minute: %d probes, State %v", kind, f.probes, w.in.State())
		}
		broken = false
		clock.pass(offloadPause)
		f.supers = 0
		w.arrives("mended", burstOf(20))
		if s := w.in.State(); f.supers != 3 || s.Offload != OffloadTCP|OffloadUDP || strings.Contains(s.String(), "note the kernel takes") {
			t.Errorf("%v: mended: %d superpackets, State %v", kind, f.supers, s)
		}
		requireNoEvent(t, w.in, EventDegraded)
		if s := w.in.Stats(); s.OffloadFails != 1 || s.WriteRefused != 0 {
			t.Errorf("%v: counters %+v", kind, s)
		}
	}
}

// A kernel before 6.9 takes 64 datagrams at once: that is found out by one superpacket of more that is known to be good, and no loss
// of an ability.
func TestOlderKernelTakesFewerDatagrams(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	most := 0
	f := w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
		if h.GSOType != virtio.GSOUDPL4 {
			return 0, false, nil
		}
		n := Packet{packet, int(h.GSOSize)}.Segments()
		if n <= 64 {
			most = max(most, n)
		}
		return 0, n > 64, unix.EINVAL
	})
	for range 3 {
		w.arrives("128 datagrams", burstOf(128))
	}
	if s := w.in.State(); f.probes != 2 || most != 64 || s.Offload != OffloadTCP|OffloadUDP || w.in.Stats().OffloadFails != 1 {
		t.Errorf("%d probes, at most %d datagrams, State %v", f.probes, most, s)
	}
	requireNoEvent(t, w.in, EventDegraded)
}

// Nor does that the kernel takes no datagrams at all for a while.
func TestNoDatagramsForAWhileAreNoOldKernel(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	clock := newClock()
	w.in.(*tunDevice).offloads.clock = func() time.Time { return clock.Time }
	broken, longest := true, 0
	w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
		if h.GSOType == virtio.GSOUDPL4 && !isProbe(packet) {
			longest = max(longest, Packet{packet, int(h.GSOSize)}.Segments())
		}
		return 0, broken && h.GSOType == virtio.GSOUDPL4, unix.EINVAL
	})
	w.arrives("refused", burstOf(128))
	broken = false
	clock.pass(offloadPause)
	w.arrives("the first after the pause", burstOf(1)) // finds out
	longest = 0
	w.arrives("and as ever", burstOf(128))
	if longest <= 64 || w.in.Stats().OffloadFails != 1 {
		t.Errorf("at most %d datagrams, counters %+v", longest, w.in.Stats())
	}
}

// What asks the kernel whether it takes superpackets again shall not get into the way of a packet that waits for room.
func TestProbeBesideALonePacket(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	wake := (&rig{TB: t, ns: w.ns, name: "in"}).tap()
	clock := newClock()
	w.in.(*tunDevice).offloads.clock = func() time.Time { return clock.Time }
	broken, full := true, false
	w.faulty(func(h virtio.Header, _ []byte) (int, bool, error) {
		switch {
		case h.GSOType != virtio.GSONone:
			return 0, broken, unix.EINVAL
		case full:
			full = false
			clock.pass(offloadPause)
			wake.send(sequence(0)) // the poller tells of any packet
			return 0, true, unix.EAGAIN
		}
		return 0, false, nil
	})
	w.arrives("refused", burstOf(20))
	broken, full = false, true
	if n, err := w.in.Queues()[0].WriteBatch(burstOf(1)[:1]); n != 1 || err != nil {
		t.Errorf("%d taken, %v, counters %+v", n, err, w.in.Stats())
	}
}

// The ladder: the best that a kernel grants, and its answer where it grants nothing.
func TestGrant(t *testing.T) {
	const csum, tcp, udp = unix.TUN_F_CSUM, unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN, unix.TUN_F_USO4 | unix.TUN_F_USO6
	for _, test := range []struct {
		name    string
		knows   int // bits of a mask
		err     error
		header  int
		without Offload
		want    Offload
		mask    int
	}{
		{"since 6.2", csum | tcp | udp, nil, 10, 0, OffloadTCP | OffloadUDP, csum | tcp | udp},
		{"TCP declined", csum | tcp | udp, nil, 10, OffloadTCP, OffloadUDP, csum | udp},
		{"before 6.2", csum | tcp, nil, 10, 0, OffloadTCP, csum | tcp},
		{"before 6.2, TCP declined", csum | tcp, nil, 10, OffloadTCP, 0, 0},
		{"none", 0, nil, 10, 0, 0, 0},
		{"without a header", csum | tcp | udp, nil, 0, 0, 0, 0},
		{"forbidden", csum | tcp | udp, unix.EPERM, 10, 0, 0, -1},
	} {
		mask := -1
		got, err := grant(func(m int) error {
			switch {
			case test.err != nil:
				return test.err
			case m&^test.knows != 0:
				return unix.EINVAL
			}
			mask = m
			return nil
		}, test.header, test.without)
		if got != test.want || mask != test.mask || !errors.Is(err, test.err) {
			t.Errorf("%s: got %v by mask %#x, %v", test.name, got, mask, err)
		}
	}
}

// The offloads are the device's: that its first queue is closed hinders no Reload.
func TestNoOffloadWithAQueueClosed(t *testing.T) {
	r := newRig(t, Config{Queues: 2})
	granted := r.dev.State().Offload
	if err := r.q.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := Config{NetNS: r.ns.Path(), Queues: 2, NoOffload: OffloadTCP | OffloadUDP}
	if err := r.dev.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := r.dev.State().Offload; got != 0 || granted == 0 {
		t.Errorf("offload %v before, %v after", granted, got)
	}
}

// One superpacket of many datagrams that the kernel refuses says nothing about others as long (kernel.md V24).
func TestRefusedDatagramsAreNoOldKernel(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	first, longest := true, 0
	w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
		if h.GSOType != virtio.GSOUDPL4 || isProbe(packet) {
			return 0, false, nil
		}
		longest = max(longest, Packet{packet, int(h.GSOSize)}.Segments())
		refuse := first
		first = false
		return 0, refuse, unix.EINVAL
	})
	w.arrives("refused once", burstOf(128))
	longest = 0
	w.arrives("and not again", burstOf(128))
	if longest <= 64 || w.in.Stats().OffloadFails != 1 {
		t.Errorf("at most %d datagrams, counters %+v", longest, w.in.Stats())
	}
}

// The send buffer is full in the middle of it all: the queue waits, and goes on where it was, in a superpacket that is split too.
func TestWaitsAmongSuperpackets(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	// The poller hears of changes only, and there is room all the time: a packet for the reader makes it look.
	wake := (&rig{TB: t, ns: w.ns, name: "in"}).tap()
	for _, refuse := range []bool{false, true} {
		again := true
		w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
			again = !again
			switch {
			case isProbe(packet):
				return 0, false, nil
			case again:
				wake.send(sequence(0))
				return 0, true, unix.EAGAIN
			}
			return 0, refuse && h.GSOType != virtio.GSONone, unix.EINVAL
		})
		w.arrives("EAGAIN", append(burstOf(20), Packet{superOf(4000), 300}, burstOf(1)[0]))
	}
	if s := w.in.Stats(); s.WriteRefused != 0 || s.WritePackets != 2*(41+14) {
		t.Errorf("counters %+v", s)
	}
}

// A short count would be a packet that the kernel cut: it is refused, the others go on.
func TestShortCount(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	for _, super := range []bool{false, true} {
		w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
			return len(packet), (h.GSOType != virtio.GSONone) == super, nil
		})
		n, err := w.in.Queues()[0].WriteBatch(append(burstOf(20), Packet{Data: sequence(1)}))
		if want := map[bool]int{false: 40, true: 1}[super]; n != want || !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("superpackets %v: %d taken, %v", super, n, err)
		}
	}
	if s := w.in.Stats(); s.WriteRefused != 1+40 || s.WritePackets != 40+1 {
		t.Errorf("counters %+v", s)
	}
}

// The link goes down and comes up in the middle, in each way that a superpacket may go; what is not taken is counted by packets.
func TestDownAndUpAmongSuperpackets(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	for n := range 45 {
		writes := 0
		w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
			if writes++; writes == n+1 {
				return 0, true, unix.EIO
			}
			return 0, n >= 5 && h.GSOType != virtio.GSONone && !isProbe(packet), unix.EINVAL
		})
		before := w.in.Stats()
		batch := append(burstOf(10), Packet{superOf(4000), 300})
		taken, err := w.in.Queues()[0].WriteBatch(batch)
		after := w.in.Stats()
		lost := after.WriteDown - before.WriteDown
		if got := after.WritePackets - before.WritePackets + lost; got != 20+14 || after.WriteRefused != 0 {
			t.Errorf("down at write %d: %d packets accounted for, counters %+v", n, got, after)
		}
		if (taken == len(batch)) != (err == nil) || err != nil && err != ErrDown || (err == nil) != (lost == 0) {
			t.Errorf("down at write %d: %d of %d taken, %v", n, taken, len(batch), err)
		}
	}
}

// Closed or deleted in the middle: the first error is that of the lowest packet that was not taken, whatever befell later ones.
func TestEndsAmongSuperpackets(t *testing.T) {
	for _, end := range []struct {
		name string
		want error
		do   func(w *road) error
	}{
		{"closed", os.ErrClosed, func(w *road) error { return w.in.Queues()[0].Close() }},
		{"deleted", ErrGone, func(w *road) error { w.ns.Run(w, "ip link del in"); return nil }},
	} {
		t.Run(end.name, func(t *testing.T) {
			w := newRoad(t, OffloadTCP|OffloadUDP)
			q := w.in.Queues()[0].(*tunQueue)
			var waiting atomic.Bool
			w.faulty(func(h virtio.Header, packet []byte) (int, bool, error) {
				switch {
				case isProbe(packet):
					return 0, false, nil
				case h.GSOType != virtio.GSONone && packet[9] == 6: // of the flow that begins
					return 0, true, unix.EINVAL
				case packet[9] == 6 && packet[len(packet)-1] == 9: // its last packet
					return 0, true, unix.EINVAL
				case packet[9] == 17:
					waiting.Store(true)
					return 0, !q.deleted(), unix.EAGAIN
				}
				return 0, false, nil
			})
			n, done := 0, make(chan error, 1)
			go func() {
				var err error
				n, err = q.WriteBatch(burstOf(10))
				done <- err
			}()
			eventually(t, "the writer waits", waiting.Load)
			if err := end.do(w); err != nil {
				t.Error(err)
			}
			if err := returns(t, patience, "WriteBatch", done); n != 9 || err != end.want {
				t.Errorf("%d taken, %v, want 9 and %v: packet 1 was not taken", n, err, end.want)
			}
		})
	}
}
