package overlay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// randomSuper draws a superpacket whose segments fit the road.
func randomSuper(r *rand.Rand, f *form) Packet {
	size := []int{1 + r.IntN(20), 100 + r.IntN(200), 1448, 1 + r.IntN(roadMTU-f.headerLen())}[r.IntN(4)]
	most := min(0xffff-f.headerLen(), 128*size)
	return Packet{f.packet(randomBytes(r, 1+r.IntN(most))), size}
}

// Oracle O5 (kernel.md V25): what the kernel makes of a superpacket, forwarding it to a device without offloads, is byte for byte what
// AppendSegment makes of it.
func TestSegmentsAreTheKernels(t *testing.T) {
	w, r := newRoad(t, OffloadTCP|OffloadUDP), seeded(t)
	sent := uint64(0)
	for round := range 40 {
		for _, kind := range []struct{ v6, udp bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
			supers := make([]Packet, 1+r.IntN(4))
			for i := range supers {
				supers[i] = randomSuper(r, randomForm(r, kind.v6, kind.udp))
			}
			w.send(w.in, supers)
			if err := onlySegments(w.collect(), supers); err != nil {
				t.Fatalf("round %d, %+v: %v", round, kind, err)
			}
			sent += uint64(len(supers))
		}
	}
	if s := w.in.Stats(); s.WriteSuper != sent || s.OffloadFails != 0 {
		t.Errorf("the kernel split not all of %d superpackets: %+v", sent, s)
	}
}

// The other way: the kernel's superpackets, whose header length is that of a whole packet when they were forwarded (C4), split into
// what it would have made of them itself. What waits when Reload takes the offloads away still comes as it is, what comes later not.
func TestForwardedSuperpacketsSplit(t *testing.T) {
	w, r := newRoad(t, 0), seeded(t)
	var supers []Packet
	for i := range 60 {
		f := randomForm(r, i%2 == 0, i%4 < 2)
		supers = append(supers, randomSuper(r, f))
	}
	w.send(w.in, supers[:40])
	w.without(w.out, OffloadTCP|OffloadUDP)
	w.send(w.in, supers[40:50])
	w.without(w.out, 0)
	w.send(w.in, supers[50:])
	got := w.collect()
	count := 0
	var all []Packet
	for _, p := range got {
		if p.SegmentSize != 0 {
			count++
		}
		for i := range p.Segments() {
			all = append(all, Packet{Data: p.AppendSegment(nil, i)})
		}
	}
	if err := onlySegments(all, supers); err != nil {
		t.Fatal(err)
	}
	want, many := 0, 0
	for i, p := range supers {
		if i >= 40 && i < 50 {
			many += p.Segments()
		} else {
			want++
		}
	}
	if count > want || count < want/2 || len(got) < want+many { // one segment alone is no superpacket to the kernel
		t.Errorf("%d superpackets among %d packets came of %d", count, len(got), want)
	}
	if s := w.out.Stats(); s.ReadInvalid != 0 || s.ReadDropped != 0 || int(s.ReadSuper) != count {
		t.Errorf("counters %+v", s)
	}
}

// without changes what a device of the road may not use.
func (w *road) without(d Device, without Offload) {
	w.Helper()
	cfg := d.(*tunDevice).cfg.clone()
	cfg.NoOffload = without
	if err := d.Reload(cfg); err != nil {
		w.Fatal(err)
	}
	if got, want := d.State().Offload, (OffloadTCP|OffloadUDP)&^without; got != want {
		w.Fatalf("offload %v, want %v", got, want)
	}
}

// A host's own traffic: superpackets of its TCP and its UDP_SEGMENT sockets are read, split here and by the kernel alike, and come to
// the other host as they were sent.
func TestSocketsSuperpacketsSplit(t *testing.T) {
	w := newRoad(t, OffloadTCP|OffloadUDP)
	near := host(t, Config{MTU: 1500, TxQueueLen: 5000, Networks: []netip.Prefix{netip.PrefixFrom(peer4, 24), netip.PrefixFrom(peer6, 64)}}, out4, out6)
	far := host(t, Config{MTU: 1500, TxQueueLen: 5000, Networks: []netip.Prefix{
		netip.PrefixFrom(out4.Addr().Next(), 24), netip.PrefixFrom(out6.Addr().Next(), 64),
	}}, own4, own6)
	done := make(chan error, 2)
	go func() { done <- w.checkedWay(near.q, far.q) }()
	go func() { done <- straightWay(far.q, near.q) }()
	for _, addr := range []netip.Addr{out4.Addr().Next(), out6.Addr().Next()} {
		carryStream(t, near, far, addr)
		carryDatagrams(t, near, far, addr)
	}
	if s := near.dev.Stats(); s.ReadSuper < 100 || s.ReadInvalid != 0 {
		t.Errorf("too few superpackets to tell: %+v", s)
	}
	near.dev.Close()
	far.dev.Close()
	for range 2 {
		if err := returns(t, patience, "a relay", done); !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	}
}

// host makes an active device in a namespace of its own, with routes to the networks.
func host(t testing.TB, cfg Config, to ...netip.Prefix) *rig {
	t.Helper()
	r := &rig{TB: t, ns: nstest.New(t)}
	for _, prefix := range to {
		cfg.Routes = append(cfg.Routes, Route{Prefix: prefix.Masked()})
	}
	r.dev = newIn(t, r.ns, cfg)
	if err := r.dev.Activate(); err != nil {
		t.Fatal(err)
	}
	r.q, r.name = r.dev.Queues()[0], r.dev.State().Name
	return r
}

// checkedWay carries packets over the road, and compares what the kernel makes of each with its segments.
func (w *road) checkedWay(from, to Queue) error {
	for {
		batch, err := from.ReadBatch()
		if err != nil {
			return err
		}
		for _, p := range batch {
			if !forwarded(p.Data) {
				continue
			}
			got, err := w.through([]Packet{p})
			if err == nil {
				err = onlySegments(got, []Packet{p})
			}
			if err == nil {
				_, err = to.WriteBatch(got)
			}
			if err != nil {
				return err
			}
		}
	}
}

// straightWay carries packets, superpackets unsplit.
func straightWay(from, to Queue) error {
	for {
		batch, err := from.ReadBatch()
		if err == nil {
			_, err = to.WriteBatch(batch)
		}
		if err != nil {
			return err
		}
	}
}

func carryStream(t *testing.T, near, far *rig, addr netip.Addr) {
	t.Helper()
	var listener *net.TCPListener
	var out *net.TCPConn
	var err error
	far.ns.Do(t, func() {
		if listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))); err != nil {
			t.Fatal(err)
		}
	})
	defer listener.Close()
	near.ns.Do(t, func() {
		if out, err = net.DialTCP("tcp", nil, listener.Addr().(*net.TCPAddr)); err != nil {
			t.Fatal(err)
		}
	})
	defer out.Close()
	in, err := listener.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	sent := filler(4, 4<<20, 7)
	wrote := make(chan error, 1)
	go func() {
		_, err := out.Write(sent)
		wrote <- errors.Join(err, out.CloseWrite())
	}()
	if err := in.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%v: got %d bytes of %d, %v", addr, len(got), len(sent), err)
	}
	if err := returns(t, patience, "the sender", wrote); err != nil {
		t.Fatal(err)
	}
}

// carryDatagrams sends several with one call (UDP_SEGMENT), of odd sizes.
func carryDatagrams(t *testing.T, near, far *rig, addr netip.Addr) {
	t.Helper()
	in := far.udp(addr)
	var out *net.UDPConn
	var err error
	near.ns.Do(t, func() {
		if out, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(port(in))); err != nil {
			t.Fatal(err)
		}
	})
	defer out.Close()
	raw, err := out.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 7, 500, 1001, 1400} {
		if bad := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) }); bad != nil || err != nil {
			t.Fatal(bad, err)
		}
		for _, n := range []int{size, size + 1, 3*size - 1, 40 * size} {
			sent, buf := filler(4, n, uint32(n)), make([]byte, 2000)
			if _, err := out.Write(sent); err != nil {
				t.Fatal(err)
			}
			for rest := sent; len(rest) > 0; {
				want := rest[:min(size, len(rest))]
				if got, err := in.Read(buf); err != nil || !bytes.Equal(buf[:got], want) {
					t.Fatalf("%v: %d bytes by %d: got a datagram of %d, %v", addr, n, size, got, err)
				}
				rest = rest[len(want):]
			}
		}
	}
}
