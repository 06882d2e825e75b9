package overlay

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// Law 7: Close wakes who reads, on every queue and by either call, and waits; what comes after is os.ErrClosed, for good.
func TestCloseWakesReadersOfEveryQueue(t *testing.T) {
	r := newRig(t, Config{Queues: 3})
	var errs [2 * 3]error
	var readers sync.WaitGroup
	for i, q := range r.dev.Queues() {
		for j, reading := range readCalls {
			readers.Go(func() { _, errs[2*i+j] = reading.read(q) })
		}
	}
	// One of each queue waits for a packet, the other for its turn.
	parked(t, "tunQueue).Read", 3)
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	readers.Wait()
	for _, err := range errs {
		if err != os.ErrClosed {
			t.Errorf("a reader got %v, want os.ErrClosed", err)
		}
	}
	for range 2 {
		for _, q := range r.dev.Queues() {
			requireClosed(t, q)
		}
		requireDeviceClosed(t, r.dev)
	}
}

func requireClosed(t testing.TB, q Queue) {
	t.Helper()
	requireEnd(t, q, os.ErrClosed)
	if f, err := q.File(); f != nil || err != os.ErrClosed {
		t.Errorf("File: got %v, %v", f, err)
	}
	if err := q.Close(); err != nil {
		t.Errorf("Close of a queue again: %v", err)
	}
}

func requireDeviceClosed(t testing.TB, d Device) {
	t.Helper()
	if err := d.Activate(); err != os.ErrClosed {
		t.Errorf("Activate: got %v", err)
	}
	if err := d.Reload(Config{}); err != os.ErrClosed {
		t.Errorf("Reload: got %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
	for range d.Events() { // ends, because Close closes it
	}
	if s := d.State(); s.Index != 0 || s.Up || s.Name == "" || s.MTU == 0 || !strings.HasPrefix(s.String(), "device ") {
		t.Errorf("State: %v", s)
	}
}

// Close may be called by many at once, and none returns before the descriptors are closed.
func TestCloseConcurrently(t *testing.T) {
	r := newRig(t, Config{Queues: 2})
	var callers sync.WaitGroup
	for i := range 16 {
		callers.Go(func() {
			if i%2 == 0 {
				if err := r.dev.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
				if err := r.q.(*tunQueue).file.Close(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("Close returned while a queue was open: %v", err)
				}
			} else if err := r.dev.Queues()[1].Close(); err != nil {
				t.Errorf("Close of a queue: %v", err)
			}
		})
	}
	callers.Wait()
}

// Close in the middle of traffic and of every other call.
func TestCloseUnderLoad(t *testing.T) {
	for range 3 {
		r := newRig(t, Config{Networks: []netip.Prefix{own4}, Queues: 2, TxQueueLen: 50})
		var calls sync.WaitGroup
		untilClosed := func(call func() error) {
			calls.Go(func() {
				for {
					if err := call(); err == os.ErrClosed {
						return
					} else if err != nil {
						t.Errorf("got %v", err)
						return
					}
				}
			})
		}
		for _, q := range r.dev.Queues() {
			for _, reading := range readCalls {
				untilClosed(func() error { _, err := reading.read(q); return err })
			}
			for _, writing := range writeCalls {
				untilClosed(func() error { return writing.write(q, sequence(1)) })
			}
			untilClosed(func() error {
				f, err := q.File()
				if err == nil {
					err = f.Close()
				}
				return err
			})
		}
		untilClosed(r.dev.Activate)
		mtu := 0
		untilClosed(func() error {
			mtu = 1300 + (mtu+1)%2
			return r.dev.Reload(Config{NetNS: r.ns.Path(), Networks: []netip.Prefix{own4}, Queues: 2, TxQueueLen: 50, MTU: mtu})
		})
		untilClosed(func() error {
			_, _, _ = r.dev.State().String(), r.dev.Stats(), r.dev.Queues()
			select {
			case _, open := <-r.dev.Events():
				if !open {
					return os.ErrClosed
				}
			default:
			}
			return nil
		})
		stop := make(chan struct{})
		conn := r.udp(own4.Addr())
		var sender sync.WaitGroup
		sender.Go(func() {
			for {
				select {
				case <-stop:
					return
				default: // it fails once the route is gone
					_, _ = conn.WriteToUDPAddrPort(make([]byte, 1000), netip.AddrPortFrom(peer4, 9))
				}
			}
		})
		eventually(t, "packets go both ways", func() bool {
			s := r.dev.Stats()
			return s.ReadPackets > 100 && s.WritePackets > 100
		})
		done := make(chan error, 1)
		go func() { done <- r.dev.Close() }()
		if err := returns(t, patience, "Close", done); err != nil {
			t.Error(err)
		}
		calls.Wait()
		close(stop)
		sender.Wait()
	}
}

// A batch that takes a second or two does not hold up Close.
func TestCloseEndsALongBatch(t *testing.T) {
	r := newRig(t, Config{})
	batch := slices.Repeat([]Packet{{Data: sequenceOne}}, 300_000)
	n, done := 0, make(chan error, 1)
	go func() {
		var err error
		n, err = r.q.WriteBatch(batch)
		done <- err
	}()
	w := r.tap()
	w.next()
	start := time.Now()
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	if err := returns(t, patience, "WriteBatch", done); err != os.ErrClosed || n == 0 || n == len(batch) {
		t.Errorf("got %d of %d, %v", n, len(batch), err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("Close took %v", took)
	}
	if s := r.dev.Stats(); s.WritePackets != uint64(n) || s.WriteRefused != 0 {
		t.Errorf("%d packets taken, counters %+v", n, s)
	}
}

var sequenceOne = sequence(1)

// A successor may make its duplicate blocking, and with it ours; Close wakes a reader all the same.
func TestCloseWhereADuplicateIsBlocking(t *testing.T) {
	for _, reading := range readCalls {
		t.Run(reading.name, func(t *testing.T) {
			r := newRig(t, Config{})
			w := r.tap()
			f, err := r.q.File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
				t.Fatal(err)
			}
			first, done := make(chan error, 1), make(chan error, 1)
			go func() {
				_, err := reading.read(r.q)
				first <- err
				_, err = reading.read(r.q)
				done <- err
			}()
			w.send(sequence(1))
			if err := returns(t, patience, reading.name, first); err != nil {
				t.Fatal(err)
			}
			parked(t, "tunQueue)."+reading.name+"(", 1)
			go func() { done <- r.dev.Close() }()
			for range 2 {
				if err := returns(t, patience, "Close or "+reading.name, done); err != nil && err != os.ErrClosed {
					t.Error(err)
				}
			}
		})
	}
}

// One forgotten File keeps the device alive, configured as it is; closing it ends the device.
func TestForgottenFileKeepsTheDevice(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4}})
	f, err := r.q.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("File's descriptor is inherited by children: flags %#x, %v", flags, err)
	}
	w := r.tap()
	w.send(sequence(1)) // the successor's, for the File makes it so
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	if s := r.dev.Stats(); s.ReadDropped != 0 {
		t.Errorf("Close took %d packets from the successor", s.ReadDropped)
	}
	r.ip("-4 addr show DEV to 10.9.0.1/24")
	if out := r.ns.Run(t, "ip route show dev "+r.name); !strings.Contains(out, "10.9.0.0/24") {
		t.Errorf("the routes are gone: %q", out)
	}
	buf := make([]byte, maxPacket)
	w.send(sequence(2))
	for i := 1; i <= 2; i++ {
		if n, err := f.Read(buf); err != nil || !bytes.Equal(buf[vnetHeaderSize:n], sequence(i)) {
			t.Fatalf("the successor reads %d bytes, %v", n, err)
		}
	}
	if _, err := f.Write(append(make([]byte, vnetHeaderSize), sequence(3)...)); err != nil {
		t.Errorf("the successor's write: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the device is gone", func() bool {
		_, err := r.ns.TryRun("ip link show " + r.name)
		return err != nil
	})
}

// Law 7: nothing is ever written to a descriptor number that has been used anew. The pipes and files that are opened while
// devices close get such numbers, and must stay empty.
func TestCloseNeverWritesToAReusedDescriptor(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	stop := make(chan struct{})
	var openers sync.WaitGroup
	for range 2 {
		openers.Go(func() { requireEmptyPipes(t, stop) })
	}
	for range 15 {
		d, err := New(Config{NetNS: ns.Path(), Queues: 2})
		if err != nil {
			t.Error(err)
			break
		}
		if err := d.Activate(); err != nil {
			t.Error(err)
		}
		var writers sync.WaitGroup
		for i := range 8 {
			q, writing := d.Queues()[i%2], writeCalls[i/2%2]
			writers.Go(func() {
				var err error
				for err == nil {
					err = writing.write(q, sequenceOne)
				}
				if err != os.ErrClosed {
					t.Errorf("got %v", err)
				}
			})
		}
		if err := d.Queues()[0].Close(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		writers.Wait()
	}
	close(stop)
	openers.Wait()
}

// requireEmptyPipes opens and closes pipes, of which nobody writes to either end.
func requireEmptyPipes(t testing.TB, stop <-chan struct{}) {
	buf := make([]byte, 100)
	for {
		var fds [2 * 8]int
		for i := 0; i < len(fds); i += 2 {
			if err := unix.Pipe2(fds[i:i+2], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
				t.Errorf("pipe: %v", err)
				return
			}
		}
		for i := 0; i < len(fds); i += 2 {
			if n, err := unix.Read(fds[i], buf); err != unix.EAGAIN {
				t.Errorf("a pipe that nobody writes to has %d bytes, %v", n, err)
			}
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
		select {
		case <-stop:
			return
		default:
		}
	}
}

// kernel.md V18: closing is not detaching, which would take the queue from a successor too: its duplicate goes on, with the
// backlog and the flows.
func TestQueueCloseLeavesASuccessorsDuplicate(t *testing.T) {
	r := newRig(t, Config{Queues: 2})
	first, second := r.dev.Queues()[0], r.dev.Queues()[1]
	f, err := first.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := second.Close(); err != nil { // so that all comes by the first
		t.Fatal(err)
	}
	w := r.tap()
	w.send(sequence(1))
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	w.send(sequence(2))
	if err := f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxPacket)
	for i := 1; i <= 2; i++ {
		if n, err := f.Read(buf); err != nil || !bytes.Equal(buf[vnetHeaderSize:n], sequence(i)) {
			t.Fatalf("the successor reads %d bytes, %v", n, err)
		}
	}
	if _, err := f.Write(append(make([]byte, vnetHeaderSize), sequence(3)...)); err != nil {
		t.Errorf("the successor's write: %v", err)
	}
	r.requireStats(Stats{})
}

// kernel.md V18: the packets that wait in a closing queue are lost, and counted, each of them once.
func TestQueueCloseCountsItsBacklog(t *testing.T) {
	r := newRig(t, Config{})
	w := r.tap()
	const ready = 300
	for i := range ready {
		w.send(sequence(i))
	}
	packets, err := r.q.ReadBatch()
	if err != nil {
		t.Fatal(err)
	}
	want := Stats{ReadPackets: uint64(len(packets)), ReadDropped: uint64(ready - len(packets))}
	for _, p := range packets {
		want.ReadBytes += uint64(len(p.Data))
	}
	if err := r.q.Close(); err != nil {
		t.Fatal(err)
	}
	r.requireStats(want)
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	r.requireStats(want)
}
