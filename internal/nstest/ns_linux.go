package nstest

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"example.com/overlay/internal/netns"

	"golang.org/x/sys/unix"
)

// threadNS is the namespace of the calling thread, processNS that of the main thread and with it of the process.
const (
	threadNS  = "/proc/thread-self/ns/net"
	processNS = "/proc/self/ns/net"
)

// NS is a network namespace that nothing but an open descriptor keeps alive. All methods may run concurrently.
type NS struct {
	fd   int
	mu   sync.Mutex
	tuns map[string][]*os.File // see OtherTun
}

// New makes a network namespace with nothing but lo, up, in it. It is gone at t.Cleanup.
func New(t testing.TB) *NS {
	t.Helper()
	fd, err := newNS()
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &NS{fd: fd, tuns: make(map[string][]*os.File)}
}

// Own returns the namespace of the test process itself, which Main has made for it.
func Own(t testing.TB) *NS {
	t.Helper()
	fd, err := unix.Open(processNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("own network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &NS{fd: fd, tuns: make(map[string][]*os.File)}
}

// newNS unshares on a thread that netns.Do lends and brings home again.
func newNS() (fd int, err error) {
	err = netns.Do(threadNS, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := setUp("lo"); err != nil {
			return err
		}
		fd, err = unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// Path returns a path of the namespace for Config.NetNS. It is valid on every thread, and in children with
// the same user and capabilities.
func (n *NS) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.fd)
}

// Do runs fn on a thread in the namespace. Goroutines that fn starts are elsewhere; t.Fatal, t.Skip and panics in fn end the
// test as usual.
func (n *NS) Do(t testing.TB, fn func()) {
	t.Helper()
	if err := n.do(func() error { fn(); return nil }); err != nil {
		t.Fatal(err)
	}
}

func (n *NS) do(fn func() error) error { return netns.DoFd(n.fd, fn) }

// setUp sets a link up in the calling thread's namespace.
func setUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil {
		return fmt.Errorf("flags of %s: %w", name, err)
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}
