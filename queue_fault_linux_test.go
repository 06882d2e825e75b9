package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// kernelEnd plays the kernel where the real one does not do what a test needs: a queue is a socket here, whose other end
// may be slow to take packets, as a TUN is that somebody gave a small send buffer (TUNSETSNDBUF).
type kernelEnd struct {
	testing.TB
	fd  int
	buf []byte
}

func newFaultyQueue(t testing.TB, header int) (*tunQueue, *kernelEnd) {
	t.Helper()
	nstest.Leaks(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	if err := unix.SetNonblock(fds[0], true); err != nil {
		t.Fatal(err)
	}
	q, err := newTunQueue(fds[0], "fake0", header, new(shared))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q, &kernelEnd{t, fds[1], make([]byte, 1<<17)}
}

func (k *kernelEnd) next() []byte {
	k.Helper()
	n, err := unix.Read(k.fd, k.buf)
	if err != nil {
		k.Fatal(err)
	}
	return k.buf[:n]
}

func (k *kernelEnd) send(b []byte) {
	k.Helper()
	if _, err := unix.Write(k.fd, b); err != nil {
		k.Fatal(err)
	}
}

// A writer waits for room where there is none, goes on where it stopped, in the middle of a superpacket too, and writes
// nothing twice.
func TestWriteWaitsForRoom(t *testing.T) {
	q, k := newFaultyQueue(t, 0)
	batch := []Packet{{Data: sequence(1)}, {superTCP4(60_000), 20}, {Data: sequence(2)}, {superUDP6(60_000), 30}, {Data: nil}, {Data: sequence(3)}}
	n, done := 0, make(chan error, 1)
	go func() {
		var err error
		n, err = q.WriteBatch(batch)
		done <- err
	}()
	size := uint64(0)
	for i, p := range batch {
		parts := p.Segments()
		if p.Data == nil {
			continue
		}
		for j := range parts {
			if j%1000 == 500 && j < 1000 {
				parked(t, "tunQueue).WriteBatch(", 1)
			}
			if got, want := k.next(), p.AppendSegment(nil, j); !bytes.Equal(got, want) {
				t.Fatalf("segment %d of packet %d: got %d bytes, want %d", j, i, len(got), len(want))
			}
		}
		size += uint64(len(p.Data))
	}
	if err := returns(t, patience, "WriteBatch", done); n != 5 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("got %d, %v", n, err)
	}
	var s Stats
	q.addTo(&s)
	if want := (Stats{WritePackets: 3 + 3000 + 2000, WriteBytes: size, WriteSuper: 2, WriteRefused: 1}); s != want {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
}

// Law 7: Close wakes a writer that waits for room and those behind it. Of a superpacket what was written counts.
func TestCloseWakesWriters(t *testing.T) {
	q, k := newFaultyQueue(t, 0)
	super := []Packet{{superTCP4(60_000), 20}}
	done := make(chan error, 4)
	go func() {
		n, err := q.WriteBatch(super)
		if n != 0 {
			err = fmt.Errorf("%d packets taken, %w", n, err)
		}
		done <- err
	}()
	parked(t, "tunQueue).WriteBatch(", 1)
	for range 2 {
		go func() {
			_, err := q.Write(sequence(1))
			done <- err
		}()
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := returns(t, patience, "a writer", done); err != os.ErrClosed {
			t.Errorf("got %v, want os.ErrClosed", err)
		}
	}
	var got, want Stats
	for {
		p := k.next()
		if len(p) == 0 { // the end
			break
		}
		want.WritePackets++
		want.WriteBytes += uint64(len(p))
	}
	if q.addTo(&got); got != want || got.WritePackets == 0 {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// A device that was adopted with a virtio header has it before each packet, in both directions. One that comes without is
// lost and counted, and does not end the queue.
func TestQueueWithVirtioHeader(t *testing.T) {
	for _, header := range []int{10, 12} {
		q, k := newFaultyQueue(t, header)
		zeros := make([]byte, header)
		if _, err := q.Write(sequence(1)); err != nil {
			t.Fatal(err)
		}
		if got := k.next(); !bytes.Equal(got, append(bytes.Clone(zeros), sequence(1)...)) {
			t.Errorf("the kernel got %x", got)
		}
		dirty := bytes.Repeat([]byte{0xff}, header)
		dirty[0], dirty[1] = 0xfe, 0 // neither an unfinished checksum nor a superpacket: the rest means nothing then
		buf := make([]byte, len(sequence(2)))
		k.send(dirty[:header-1])
		k.send(append(dirty, sequence(2)...))
		if n, err := q.Read(buf); err != nil || !bytes.Equal(buf[:n], sequence(2)) {
			t.Errorf("Read: %d bytes, %v", n, err)
		}
		k.send(append(dirty, sequence(3)...))
		k.send(dirty[:1])
		k.send(append(dirty, sequence(4)...))
		packets, err := q.ReadBatch()
		if err != nil || len(packets) != 2 || !bytes.Equal(packets[0].Data, sequence(3)) || !bytes.Equal(packets[1].Data, sequence(4)) {
			t.Errorf("ReadBatch: %d packets, %v", len(packets), err)
		}
		if got := q.readInvalid.Load(); got != 2 {
			t.Errorf("%d invalid packets counted, want 2", got)
		}
		if _, err := q.Write(sequence(5)); err != nil {
			t.Fatal(err)
		}
		if got := k.next(); !bytes.Equal(got[:header], zeros) {
			t.Errorf("what was read went into the header that is written: %x", got[:header])
		}
		q.Close()
	}
}

// A kernel that does not know RWF_NOWAIT is asked without.
func TestQueueOnAnOldKernel(t *testing.T) {
	r := newRig(t, Config{})
	q := r.q.(*tunQueue)
	q.in.vector.old, q.out.vector.old = true, true
	w := r.tap()
	for _, reading := range readCalls {
		w.send(sequence(1))
		if p, err := reading.read(q); err != nil || !bytes.Equal(p, sequence(1)) {
			t.Errorf("%s: %d bytes, %v", reading.name, len(p), err)
		}
	}
	for _, writing := range writeCalls {
		if err := writing.write(q, sequence(2)); err != nil {
			t.Errorf("%s: %v", writing.name, err)
		}
		if got := w.next(); !bytes.Equal(got, sequence(2)) {
			t.Errorf("%s: the kernel got %d bytes", writing.name, len(got))
		}
	}
}

// A descriptor that the runtime's poller refuses would make reads fail and Close wait for ever: New says so instead. It is
// closed, once.
func TestQueueNeedsThePoller(t *testing.T) {
	nstest.Leaks(t)
	path := filepath.Join(t.TempDir(), "no device")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if q, err := newTunQueue(fd, "file0", 0, new(shared)); q != nil || err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v, %v", q, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is open: %v", err)
	}
}

// Packets that make no sense hold up neither those that do nor Close, and one that was cut is none.
func TestInvalidHoldsNothingUp(t *testing.T) {
	const some = 3 * readMost / 2
	q, k := newFaultyQueue(t, vnetHeaderSize)
	bad := make([]byte, 60)
	bad[1] = 77 // there is no such GSO type
	good := append(make([]byte, vnetHeaderSize), sequence(1)...)
	requireOne := func() {
		t.Helper()
		packets, err := q.ReadBatch()
		if err != nil || len(packets) != 1 || !bytes.Equal(packets[0].Data, sequence(1)) {
			t.Fatalf("%d packets, %v", len(packets), err)
		}
	}
	k.send(make([]byte, readRoom))
	k.send(good)
	requireOne()
	k.send(good)
	for range some {
		k.send(bad)
	}
	requireOne()
	if n := q.readInvalid.Load(); n > 1+readMost {
		t.Errorf("%d packets passed over before a good one was handed out", n)
	}
	q.closed.Store(true) // as Close does first
	before := q.readInvalid.Load()
	if _, err := q.ReadBatch(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadBatch of a closed queue: %v", err)
	}
	if _, err := q.Read(bad); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read of a closed queue: %v", err)
	}
	if n := q.readInvalid.Load() - before; n != 0 {
		t.Errorf("%d packets read of a queue that is being closed", n)
	}
}

// Read keeps nothing of its caller's.
func TestReadKeepsNothing(t *testing.T) {
	q, k := newFaultyQueue(t, vnetHeaderSize)
	var freed atomic.Bool
	func() {
		buf := new([5000]byte)
		runtime.SetFinalizer(buf, func(*[5000]byte) { freed.Store(true) })
		k.send(append(make([]byte, vnetHeaderSize), sequence(1)...))
		if _, err := q.Read(buf[:]); err != nil {
			t.Fatal(err)
		}
	}()
	eventually(t, "it is collected", func() bool { runtime.GC(); return freed.Load() })
	runtime.KeepAlive(q)
}
