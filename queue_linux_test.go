package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// sizes are packet lengths with a surprise in them: the smallest, those around headers, pages and the largest.
var sizes = []int{1, 2, 19, 20, 39, 40, 41, 63, 64, 1279, 1280, 1300, 1500, 4095, 4096, 4097, 9000, 32767, 32768, 65534, 65535}

// One packet a call, byte for byte, whatever its length and content.
func TestQueueReadIsExact(t *testing.T) {
	r := newRig(t, Config{MTU: maxMTU})
	w, buf := r.tap(), make([]byte, maxPacket)
	total := 0
	for i, n := range sizes {
		for _, version := range []byte{4, 6} {
			sent := filler(version, n, uint32(i))
			w.send(sent)
			got, err := r.q.Read(buf)
			if err != nil || !bytes.Equal(buf[:got], sent) {
				t.Fatalf("%d bytes of version %d: Read returned %d, %v", n, version, got, err)
			}
			total += n
		}
	}
	r.requireStats(Stats{ReadPackets: uint64(2 * len(sizes)), ReadBytes: uint64(total)})
}

func TestQueueWriteIsExact(t *testing.T) {
	r := newRig(t, Config{NoFilter: true})
	w := r.tap()
	total := 0
	for i, n := range sizes {
		for _, version := range []byte{4, 6} {
			packet := filler(version, n, uint32(i))
			sent := bytes.Clone(packet)
			if got, err := r.q.Write(packet); got != n || err != nil {
				t.Fatalf("%d bytes of version %d: Write returned %d, %v", n, version, got, err)
			}
			if got := w.next(); !bytes.Equal(got, sent) {
				t.Fatalf("%d bytes of version %d: the kernel got %d bytes", n, version, len(got))
			}
			if !bytes.Equal(packet, sent) {
				t.Fatalf("%d bytes of version %d: Write changed the packet", n, version)
			}
			total += n
		}
	}
	r.requireStats(Stats{WritePackets: uint64(2 * len(sizes)), WriteBytes: uint64(total)})
}

// A program's packets reach sockets, and theirs the program, in both families.
func TestQueueCarriesUDP(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4, own6}})
	for _, hosts := range [][2]netip.Addr{{own4.Addr(), peer4}, {own6.Addr(), peer6}} {
		conn := r.udp(hosts[0])
		here, there := port(conn), netip.AddrPortFrom(hosts[1], 4242)
		if _, err := r.q.Write(datagram(there, here, []byte("to the kernel"))); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, maxPacket)
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "to the kernel" || from != there {
			t.Fatalf("the socket got %q from %v, %v", buf[:n], from, err)
		}
		if _, err := conn.WriteToUDPAddrPort([]byte("to the program"), there); err != nil {
			t.Fatal(err)
		}
		want := datagram(here, there, []byte("to the program"))
		for { // IPv6 has things of its own to say
			n, err = r.q.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if n == len(want) && bytes.HasSuffix(buf[:n], []byte("to the program")) {
				break
			}
		}
		got := buf[:n]
		if here.Addr().Is4() { // id, and the header's checksum with it, are the kernel's choice
			if onesSum(got[:20]) != 0xffff {
				t.Errorf("wrong header checksum: %x", got[:20])
			}
			copy(got[4:6], want[4:6])
			copy(got[10:12], want[10:12])
		} else {
			copy(got[1:4], want[1:4]) // so is the flow label
		}
		if !bytes.Equal(got, want) {
			t.Errorf("Read %x\nwant %x", got, want)
		}
	}
}

// Readers and writers of one queue may run concurrently; every packet comes to exactly one of them, whole.
func TestQueueConcurrent(t *testing.T) {
	const workers, each = 4, 500
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, TxQueueLen: 2 * workers * each})
	conn := r.udp(own4.Addr())
	here, there := port(conn), netip.AddrPortFrom(peer4, 4242)
	var seen sync.Map
	var calls sync.WaitGroup
	start := func(n int, call func(worker int)) {
		for i := range n {
			calls.Go(func() { call(i) })
		}
	}
	note := func(payload []byte) {
		if _, twice := seen.LoadOrStore(string(payload), true); twice || len(payload) != 100 {
			t.Errorf("%d bytes twice or cut: %.20q", len(payload), payload)
		}
	}
	payload := func(way string, worker, i int) []byte {
		return append(fmt.Appendf(nil, "%s %d %d", way, worker, i), make([]byte, 100)...)[:100]
	}
	start(workers, func(worker int) {
		for i := range each {
			p := datagram(there, here, payload("in", worker, i))
			var err error
			if worker%2 == 0 {
				_, err = r.q.Write(p)
			} else {
				_, err = r.q.WriteBatch([]Packet{{Data: p}})
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	start(1, func(int) {
		buf := make([]byte, 1<<16)
		for range workers * each {
			n, err := conn.Read(buf)
			if err != nil {
				t.Error(err)
				return
			}
			note(buf[:n])
		}
	})
	start(workers, func(worker int) {
		for i := range each {
			if _, err := conn.WriteToUDPAddrPort(payload("out", worker, i), there); err != nil {
				t.Error(err)
			}
		}
	})
	start(workers, func(worker int) {
		buf := make([]byte, 2000)
		for range each {
			n, err := r.q.Read(buf)
			if err != nil {
				t.Error(err)
				return
			}
			note(buf[28:n])
		}
	})
	calls.Wait()
	want := uint64(workers * each)
	r.requireStats(Stats{ReadPackets: want, ReadBytes: want * 128, WritePackets: want, WriteBytes: want * 128})
}

// A packet longer than the buffer is lost with an error, counted, and does no harm to the next; one that just fits is whole.
func TestReadShortBuffer(t *testing.T) {
	r := newRig(t, Config{MTU: maxMTU})
	w := r.tap()
	for _, c := range []struct{ packet, buffer int }{{1300, 1299}, {1300, 1}, {1300, 0}, {1, 0}, {65535, 65534}, {65535, 1300}} {
		sent := filler(4, c.packet, 1)
		w.send(sent)
		room := make([]byte, c.buffer+8)
		if n, err := r.q.Read(room[:c.buffer]); n != 0 || err != io.ErrShortBuffer {
			t.Errorf("%d bytes into %d: got %d, %v, want io.ErrShortBuffer", c.packet, c.buffer, n, err)
		}
		if !bytes.Equal(room[c.buffer:], make([]byte, 8)) {
			t.Errorf("%d bytes into %d: written beyond the buffer", c.packet, c.buffer)
		}
		w.send(sent)
		buf := make([]byte, c.packet)
		if n, err := r.q.Read(buf); n != c.packet || err != nil || !bytes.Equal(buf, sent) {
			t.Errorf("%d bytes into as many: got %d, %v", c.packet, n, err)
		}
	}
	r.requireStats(Stats{ReadPackets: 6, ReadBytes: 3*1300 + 1 + 2*65535, ReadDropped: 6})
}

// kernel.md U56: the MTU is no safe size for a buffer, for it may grow while the reader waits.
func TestReadParkedWhileMTUGrows(t *testing.T) {
	r := newRig(t, Config{MTU: 1300})
	w, done := r.tap(), make(chan error, 1)
	go func() {
		_, err := r.q.Read(make([]byte, 1300))
		done <- err
	}()
	parked(t, "tunQueue).Read(", 1)
	r.ip("link set DEV mtu 9000")
	w.send(filler(4, 9000, 1))
	if err := returns(t, patience, "Read", done); err != io.ErrShortBuffer {
		t.Fatalf("got %v, want io.ErrShortBuffer", err)
	}
	w.send(filler(4, 9000, 2))
	packets, err := r.q.ReadBatch()
	if err != nil || len(packets) != 1 || !bytes.Equal(packets[0].Data, filler(4, 9000, 2)) {
		t.Fatalf("ReadBatch after it: %d packets, %v", len(packets), err)
	}
}

// kernel.md U57: what is written needs no room around it. Here the packet ends, and in another round begins, where the memory
// does, and cannot be written to.
func TestWriteNeedsNoRoomAround(t *testing.T) {
	r := newRig(t, Config{NoFilter: true})
	w := r.tap()
	page := unix.Getpagesize()
	memory, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(memory)
	middle := memory[page : 2*page : 2*page]
	copy(middle, filler(4, page, 7))
	for _, p := range [][]byte{memory[:page], memory[2*page:]} {
		if err := unix.Mprotect(p, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	middle[page-100] = 0x45
	if err := unix.Mprotect(middle, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	for _, p := range [][]byte{middle, middle[:1:1], middle[page-100:]} {
		if _, err := r.q.Write(p); err != nil {
			t.Fatal(err)
		}
		if got := w.next(); !bytes.Equal(got, p) {
			t.Fatalf("the kernel got %d bytes of %d", len(got), len(p))
		}
		if n, err := r.q.WriteBatch([]Packet{{Data: p}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if got := w.next(); !bytes.Equal(got, p) {
			t.Fatalf("the kernel got %d bytes of %d", len(got), len(p))
		}
	}
}

// What is no IP packet is that packet's fault, and told so; the queue goes on.
func TestWriteRefusesBadPackets(t *testing.T) {
	r := newRig(t, Config{})
	w := r.tap()
	bad := [][]byte{nil, {}, {0}, {0x10}, {0x50, 1, 2}, {0xf0}, filler(0, 100, 1), filler(7, 65535, 1)}
	good := filler(4, 20, 1)
	for _, p := range bad {
		n, err := r.q.Write(p)
		var op *OpError
		if n != 0 || !errors.As(err, &op) || !errors.Is(err, unix.EINVAL) || op.Device != r.name || op.Op != "write to" {
			t.Errorf("Write of %d bytes: got %d, %v", len(p), n, err)
		}
		n, err = r.q.WriteBatch([]Packet{{Data: p}, {Data: good}, {Data: p}})
		if n != 1 || !errors.As(err, &op) || !errors.Is(err, unix.EINVAL) {
			t.Errorf("WriteBatch of %d bytes: got %d, %v", len(p), n, err)
		}
		if got := w.next(); !bytes.Equal(got, good) {
			t.Errorf("the kernel got %x", got)
		}
	}
	for _, size := range []int{maxPacket + 1, 1_000_000} {
		if n, err := r.q.Write(filler(4, size, 1)); n != 0 || !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("Write of %d bytes: got %d, %v", size, n, err)
		}
	}
	// No longer one as a superpacket of one: it is the same packet.
	long := (&form{v6: true, udp: true, src: netip.AddrPortFrom(peer6, 1), dst: netip.AddrPortFrom(own6.Addr(), 2), ttl: 9, first: 17}).packet(make([]byte, 65535-8))
	for _, p := range []Packet{{Data: long}, {long, 65535}} {
		if n, err := r.q.WriteBatch([]Packet{p}); len(long) != 65575 || n != 0 || !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("WriteBatch of %d bytes, segments of %d: got %d, %v", len(long), p.SegmentSize, n, err)
		}
	}
	n := uint64(len(bad))
	r.requireStats(Stats{WritePackets: n, WriteBytes: n * 20, WriteRefused: 3*n + 4})
}

// Nothing is allocated for a packet or a batch of them.
func TestQueueAllocatesNothing(t *testing.T) {
	const rounds = 200
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, TxQueueLen: 10 * rounds})
	w, buf := r.tap(), make([]byte, maxPacket)
	packet := filler(4, 1300, 1)
	one, batch := []Packet{{Data: packet}}, make([]Packet, 32)
	for i := range batch {
		batch[i].Data = packet
	}
	super := []Packet{{superTCP4(5000), 1000}} // the kernel drops it for its addresses
	for _, c := range []struct {
		name  string
		ready int // packets that it reads a call
		call  func() error
	}{
		{"Read", 1, func() error { _, err := r.q.Read(buf); return err }},
		{"ReadBatch", 2, func() error { _, err := r.q.ReadBatch(); return err }},
		{"Write", 0, func() error { _, err := r.q.Write(packet); return err }},
		{"WriteBatch of one", 0, func() error { _, err := r.q.WriteBatch(one); return err }},
		{"WriteBatch of many", 0, func() error { _, err := r.q.WriteBatch(batch); return err }},
		{"WriteBatch of a superpacket", 0, func() error { _, err := r.q.WriteBatch(super); return err }},
	} {
		for range c.ready {
			w.send(packet)
		}
		if err := c.call(); err != nil { // the first may
			t.Fatalf("%s: %v", c.name, err)
		}
		for range (rounds + 2) * min(c.ready, 1) {
			w.send(packet)
		}
		got := testing.AllocsPerRun(rounds, func() {
			if c.name == "ReadBatch" {
				w.send(packet) // it has drained what was ready
			}
			if err := c.call(); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		})
		if got != 0 {
			t.Errorf("%s: %v allocations a call, want 0", c.name, got)
		}
	}
}

// sequence numbers a packet that nothing but a tap and a queue will look at.
func sequence(n int) []byte {
	p := filler(4, 60+n%1200, uint32(n))
	binary.BigEndian.PutUint32(p[20:], uint32(n))
	return p
}
