package overlay

import (
	"bytes"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// kernel.md C12: the orders in which the kernel's own selftest (tools/testing/selftests/net/tun.c) detaches, deletes and
// closes, each of which once crashed a kernel. None leaves a descriptor behind, and the kernel stays whole.
func TestOrdersOfDetachDeleteAndClose(t *testing.T) {
	for _, order := range []string{
		"delete detach close", "detach delete close", "detach close delete", "reattach delete close", "reattach close delete",
	} {
		t.Run(order, func(t *testing.T) {
			tainted := taint(t)
			r := newRig(t, Config{Networks: []netip.Prefix{own4}, Queues: 2})
			q := r.dev.Queues()[1]
			f, err := q.File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			done := make(chan error, 1)
			go func() {
				_, err := q.ReadBatch()
				done <- err
			}()
			parked(t, "tunQueue).ReadBatch(", 1)
			gone := false
			for _, step := range strings.Fields(order) {
				switch step {
				case "delete":
					r.ip("link del DEV")
					gone = true
				case "detach":
					if err := setQueue(f, unix.IFF_DETACH_QUEUE); (err != nil) != gone {
						t.Errorf("detach: %v", err)
					}
				case "reattach":
					if err := setQueue(f, unix.IFF_DETACH_QUEUE); err != nil {
						t.Errorf("detach: %v", err)
					}
					if err := setQueue(f, unix.IFF_ATTACH_QUEUE); err != nil {
						t.Errorf("attach: %v", err)
					}
				case "close":
					want := os.ErrClosed
					if gone {
						want = ErrGone
						if err := returns(t, patience, "ReadBatch", done); err != want {
							t.Errorf("the reader got %v, want %v", err, want)
						}
					}
					f.Close()
					if err := q.Close(); err != nil {
						t.Errorf("Close of the queue: %v", err)
					}
					if !gone {
						if err := returns(t, patience, "ReadBatch", done); err != want {
							t.Errorf("the reader got %v, want %v", err, want)
						}
					}
				}
			}
			requireEnd(t, r.q, ErrGone)
			requireClosed(t, q)
			if err := r.dev.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if now := taint(t); now != tainted {
				t.Errorf("the kernel was %s and is %s (/proc/sys/kernel/tainted): see dmesg", tainted, now)
			}
		})
	}
}

func setQueue(f *os.File, flags uint16) error {
	request, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	request.SetUint16(flags)
	return unix.IoctlIfreq(int(f.Fd()), unix.TUNSETQUEUE, request)
}

// taint tells what the kernel has been through: warnings and crashes set a bit each.
func taint(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/tainted")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// kernel.md C11: a queue that somebody detaches is neither gone nor closed: its readers wait, its flows go elsewhere, and
// once it is attached again it goes on.
func TestDetachedQueueWaits(t *testing.T) {
	r := newRig(t, Config{Queues: 2})
	q := r.dev.Queues()[1]
	f, err := q.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := setQueue(f, unix.IFF_DETACH_QUEUE); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	var got []byte
	go func() {
		packets, err := q.ReadBatch()
		if err == nil {
			got = packets[0].Data
		}
		done <- err
	}()
	parked(t, "tunQueue).ReadBatch(", 1)
	w := r.tap()
	for i := range 50 { // on whatever queue they would have been
		w.send(sequence(i))
	}
	for n := 0; n < 50; {
		packets, err := r.q.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		n += len(packets)
	}
	parked(t, "tunQueue).ReadBatch(", 1)
	if err := setQueue(f, unix.IFF_ATTACH_QUEUE); err != nil {
		t.Fatal(err)
	}
	if err := r.q.Close(); err != nil { // so that all comes here
		t.Fatal(err)
	}
	w.send(sequence(77))
	if err := returns(t, patience, "ReadBatch", done); err != nil || !bytes.Equal(got, sequence(77)) {
		t.Errorf("attached again: %d bytes, %v", len(got), err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
