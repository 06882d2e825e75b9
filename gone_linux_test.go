package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/netns"
	"golang.org/x/sys/unix"
)

// readCalls are the two ways to read a queue, each as a call that waits for a packet.
var readCalls = []struct {
	name string
	read func(q Queue) ([]byte, error)
}{
	{"Read", func(q Queue) ([]byte, error) {
		buf := make([]byte, maxPacket)
		n, err := q.Read(buf)
		return buf[:n], err
	}},
	{"ReadBatch", func(q Queue) ([]byte, error) {
		packets, err := q.ReadBatch()
		if err != nil {
			return nil, err
		}
		return packets[0].Data, nil
	}},
}

// writeCalls likewise.
var writeCalls = []struct {
	name  string
	write func(q Queue, p []byte) error
}{
	{"Write", func(q Queue, p []byte) error { _, err := q.Write(p); return err }},
	{"WriteBatch", func(q Queue, p []byte) error { _, err := q.WriteBatch([]Packet{{Data: p}, {Data: p}}); return err }},
}

// requireEnd checks that each call on the queue fails with this error.
func requireEnd(t testing.TB, q Queue, want error) {
	t.Helper()
	for _, r := range readCalls {
		if _, err := r.read(q); err != want {
			t.Errorf("%s: got %v, want %v", r.name, err, want)
		}
	}
	for _, w := range writeCalls {
		for _, p := range [][]byte{sequence(1), {0x20}, nil} {
			if err := w.write(q, p); err != want {
				t.Errorf("%s of %d bytes: got %v, want %v", w.name, len(p), err, want)
			}
		}
	}
}

// kernel.md U31, U32: while the link is down writes fail and are counted, readers wait and go on when it is up.
func TestDownParksReadersAndRefusesWrites(t *testing.T) {
	for _, reading := range readCalls {
		t.Run(reading.name, func(t *testing.T) {
			r := newRig(t, Config{})
			got, done := []byte(nil), make(chan error, 8)
			go func() {
				var err error
				got, err = reading.read(r.q)
				done <- err
			}()
			parked(t, "tunQueue)."+reading.name+"(", 1)
			for range 3 {
				r.ip("link set DEV down")
				for _, writing := range writeCalls {
					if err := writing.write(r.q, sequence(1)); err != ErrDown {
						t.Errorf("%s: got %v, want ErrDown", writing.name, err)
					}
				}
				r.ip("link set DEV up")
				for _, writing := range writeCalls {
					if err := writing.write(r.q, sequence(1)); err != nil {
						t.Errorf("%s when up again: %v", writing.name, err)
					}
				}
				parked(t, "tunQueue)."+reading.name+"(", 1)
			}
			r.tap().send(sequence(5))
			if err := returns(t, patience, reading.name, done); err != nil || !bytes.Equal(got, sequence(5)) {
				t.Fatalf("got %d bytes, %v", len(got), err)
			}
			n, size := uint64(9), uint64(len(sequence(1)))
			r.requireStats(Stats{
				ReadPackets: 1, ReadBytes: uint64(len(sequence(5))), WritePackets: n, WriteBytes: n * size, WriteDown: n,
			})
		})
	}
}

// A device that was never up is down: writes say so, and reads wait for Activate.
func TestBeforeActivate(t *testing.T) {
	r := newDownRig(t, Config{})
	done := make(chan error, 8)
	go func() {
		_, err := r.q.ReadBatch()
		done <- err
	}()
	parked(t, "tunQueue).ReadBatch(", 1)
	if _, err := r.q.Write(sequence(1)); err != ErrDown {
		t.Errorf("Write: got %v, want ErrDown", err)
	}
	if err := r.dev.Activate(); err != nil {
		t.Fatal(err)
	}
	r.tap().send(sequence(2))
	if err := returns(t, patience, "ReadBatch", done); err != nil {
		t.Error(err)
	}
}

// kernel.md U31, C11, V19: a device that is deleted under a reader ends it with ErrGone, at once and for good, without
// burning a processor.
func TestDeletedUnderAReader(t *testing.T) {
	for _, reading := range readCalls {
		t.Run(reading.name, func(t *testing.T) {
			r := newRig(t, Config{Queues: 2})
			done := make(chan error, 8)
			for _, q := range r.dev.Queues() {
				go func() {
					_, err := reading.read(q)
					done <- err
				}()
			}
			parked(t, "tunQueue)."+reading.name+"(", 2)
			r.ip("link del DEV")
			for range 2 {
				if err := returns(t, time.Second, reading.name, done); err != ErrGone {
					t.Fatalf("got %v, want ErrGone", err)
				}
			}
			for range 3 {
				requireEnd(t, r.q, ErrGone)
			}
			awaitEvent(t, r.dev, EventGone)
			requireIdle(t)
			if s := r.dev.State(); s.Index != 0 || s.Up || s.Name != r.name {
				t.Errorf("State of what is gone: %+v", s)
			}
			if err := r.dev.Activate(); !errors.Is(err, ErrGone) {
				t.Errorf("Activate: got %v, want ErrGone", err)
			}
			if err := r.dev.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			requireEnd(t, r.q, os.ErrClosed)
		})
	}
}

// kernel.md V19: where nobody reads when the device is deleted, the first read to come is told by the runtime's poller alone,
// in an error that matches nothing.
func TestDeletedBetweenReads(t *testing.T) {
	for i := range readCalls {
		r := newRig(t, Config{})
		r.ip("link del DEV")
		eventually(t, "the poller knows", func() bool {
			return r.q.(*tunQueue).raw.Read(func(uintptr) bool { return true }) != nil
		})
		if _, err := readCalls[i].read(r.q); err != ErrGone {
			t.Errorf("%s: got %v, want ErrGone", readCalls[i].name, err)
		}
		requireEnd(t, r.q, ErrGone)
	}
}

// Closing the last queue alone ends a device that nothing else keeps.
func TestLastQueueClosedEndsTheDevice(t *testing.T) {
	r := newRig(t, Config{Queues: 2})
	for _, q := range r.dev.Queues() {
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if e := awaitEvent(t, r.dev, EventGone); e.Err != nil {
		t.Errorf("got event %q", e)
	}
	if s := r.dev.State(); s.Index != 0 || s.Up {
		t.Errorf("State: %v", s)
	}
	if err := r.dev.Activate(); !errors.Is(err, ErrGone) {
		t.Errorf("Activate: got %v, want ErrGone", err)
	}
	if err := r.dev.Close(); err != nil {
		t.Error(err)
	}
	requireEnd(t, r.q, os.ErrClosed)
}

// requireIdle measures the processor time of a tenth of a second in which nothing happens.
func requireIdle(t testing.TB) {
	t.Helper()
	const interval = 100 * time.Millisecond
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	time.Sleep(interval)
	if spent := used() - before; spent > interval/2 {
		t.Errorf("%v of processor time in %v of idleness", spent, interval)
	}
}

// awaitEvent reads events until one of this kind.
func awaitEvent(t testing.TB, d Device, kind EventKind) Event {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case e, open := <-d.Events():
			if !open {
				t.Fatalf("the events end without %q", kind)
			}
			if e.Kind == kind {
				return e
			}
		case <-late:
			t.Fatalf("no event %q", kind)
		}
	}
}

// Readers that come and go while the device is deleted never hang, and writers learn of it by themselves.
func TestDeletedUnderTraffic(t *testing.T) {
	r := newRig(t, Config{Queues: 2, TxQueueLen: 10})
	w := r.tap()
	ended := make(chan error, 8)
	for _, q := range r.dev.Queues() {
		for _, reading := range readCalls {
			go func() {
				for {
					if _, err := reading.read(q); err != nil {
						ended <- err
						return
					}
				}
			}()
		}
		for _, writing := range writeCalls {
			go func() {
				for {
					if err := writing.write(q, sequence(1)); err != nil && err != ErrDown { // it goes down first
						ended <- err
						return
					}
				}
			}()
		}
	}
	for i := range 200 {
		w.send(sequence(i))
	}
	r.ip("link del DEV")
	for range 8 {
		if err := returns(t, patience, "a reader or writer", ended); err != ErrGone {
			t.Errorf("got %v, want ErrGone", err)
		}
	}
}

// passing makes a network namespace that is gone when its descriptor is closed.
func passing(t testing.TB) (fd int) {
	t.Helper()
	err := netns.Do("/proc/thread-self/ns/net", func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// A device that is moved to another namespace carries on there once it is up, and ends with that namespace.
func TestMovedToAnotherNamespaceThatIsDeleted(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4}})
	done := make(chan error, 8)
	read := func() {
		buf := make([]byte, maxPacket)
		for { // IPv6 has things to say there
			n, err := r.q.Read(buf)
			if err != nil || bytes.HasSuffix(buf[:n], []byte("from there")) {
				done <- err
				return
			}
		}
	}
	go read()
	parked(t, "tunQueue).Read(", 1)
	there := passing(t)
	r.ip(fmt.Sprintf("link set DEV netns /proc/%d/fd/%d", os.Getpid(), there))
	if _, err := r.q.Write(sequence(1)); err != ErrDown {
		t.Errorf("Write before it is up: got %v, want ErrDown", err)
	}
	if e := awaitEvent(t, r.dev, EventGone); e.Err == nil || !strings.Contains(e.Err.Error(), "moved") {
		t.Errorf("got event %q", e)
	}
	if s := r.dev.State(); s.Index != 0 || s.Up {
		t.Errorf("State of what is elsewhere: %+v", s)
	}
	moved := &rig{TB: t, dev: r.dev, q: r.q, name: r.name, ns: r.ns}
	enter := fmt.Sprintf("nsenter --net=/proc/%d/fd/%d ", os.Getpid(), there)
	for _, command := range []string{"ip link set %s up", "ip addr add 10.9.0.1/24 dev %s"} {
		r.ns.Run(t, enter+fmt.Sprintf(command, moved.name))
	}
	if _, err := r.q.Write(sequence(1)); err != nil {
		t.Errorf("Write when it is up there: %v", err)
	}
	err := netns.DoFd(there, func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		return unix.Sendto(s, []byte("from there"), 0, &unix.SockaddrInet4{Addr: peer4.As4(), Port: 9})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := returns(t, patience, "Read", done); err != nil {
		t.Errorf("Read when it is up there: %v", err)
	}
	go read()
	parked(t, "tunQueue).Read(", 1)
	unix.Close(there)
	if err := returns(t, patience, "Read", done); err != ErrGone {
		t.Errorf("Read when the namespace is deleted: got %v, want ErrGone", err)
	}
	requireEnd(t, r.q, ErrGone)
	if err := r.dev.Close(); err != nil {
		t.Error(err)
	}
	requireEnd(t, r.q, os.ErrClosed)
}

// The namespace that a device was made in lives as long as the device: whoever else leaves it takes nothing away.
func TestNamespaceOutlivedByTheDevice(t *testing.T) {
	r := newRig(t, Config{}) // for its clean-up
	there := passing(t)
	d, err := New(Config{NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), there), Networks: []netip.Prefix{own4}})
	unix.Close(there)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Activate(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Queues()[0].Write(sequence(1)); err != nil {
		t.Error(err)
	}
	if s := d.State(); s.Index == 0 || !s.Up {
		t.Errorf("State: %+v", s)
	}
	_ = r
}
