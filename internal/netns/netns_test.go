//go:build linux

package netns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/netns"
	"example.com/overlay/internal/nstest"

	"golang.org/x/sys/unix"
)

const (
	thread  = "/proc/thread-self/ns/net"
	process = "/proc/self/ns/net"
)

func TestMain(m *testing.M) {
	nstest.Helper("enter", func() error {
		return netns.Do(os.Args[1], func() error { return nil })
	})
	os.Exit(nstest.Main(m))
}

// here is the calling thread's namespace.
func here(t testing.TB) string {
	t.Helper()
	s, err := os.Readlink(thread)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// identify returns which namespace n is.
func identify(t testing.TB, n *nstest.NS) (id string) {
	t.Helper()
	n.Do(t, func() { id = here(t) })
	return id
}

// requireClean requires all threads to be at home, but for those that take a little longer to end than their goroutine.
func requireClean(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		dirty := foreignThreads(t)
		if len(dirty) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("threads in foreign namespaces: %v", dirty)
		}
	}
}

func foreignThreads(t *testing.T) (list []string) {
	t.Helper()
	home, err := os.Readlink(process)
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if ns, err := os.Readlink(path); err == nil && ns != home {
			list = append(list, path+" -> "+ns)
		}
	}
	return list
}

// TestDoConcurrent: while thousands of visits go on, all of them are where they should be, what they open belongs there, and
// the process never seems to be elsewhere.
func TestDoConcurrent(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin)
	nstest.Leaks(t)
	const workers, visits = 16, 250
	spaces := []*nstest.NS{nstest.New(t), nstest.New(t), nstest.Own(t)}
	home := here(t)
	var ids []string
	for _, n := range spaces {
		ids = append(ids, identify(t, n))
	}

	stop := make(chan struct{})
	var watcher, wg sync.WaitGroup
	watcher.Go(func() { watchProcess(t, home, stop) })
	for w := range workers {
		wg.Go(func() {
			for i := range visits {
				k := (w + i) % len(spaces)
				if err := visit(spaces[k].Path(), ids[k]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	watcher.Wait()
	requireClean(t)
}

func watchProcess(t *testing.T, home string, stop chan struct{}) {
	for {
		if ns, err := os.Readlink(process); err != nil || ns != home {
			t.Errorf("%s is %s, %v; want %s", process, ns, err, home)
			return
		}
		select {
		case <-stop:
			return
		default:
			runtime.Gosched()
		}
	}
}

// visit opens a socket in the namespace at path and asks outside where that is.
func visit(path, id string) error {
	var s int
	err := netns.Do(path, func() error {
		if ns, err := os.Readlink(thread); err != nil || ns != id {
			return fmt.Errorf("visited %s, %v; want %s", ns, err, id)
		}
		if unix.Gettid() == unix.Getpid() {
			return errors.New("visited on the main thread")
		}
		runtime.Gosched()
		var err error
		s, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(s)
	return requireOwner(s, id)
}

func requireOwner(socket int, id string) error {
	fd, err := unix.IoctlRetInt(socket, unix.SIOCGSKNS)
	if err != nil {
		return fmt.Errorf("SIOCGSKNS: %w", err)
	}
	defer unix.Close(fd)
	if ns, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || ns != id {
		return fmt.Errorf("the socket belongs to %s, %v; want %s", ns, err, id)
	}
	return nil
}

// TestDoStaysOnThread: the empty path and the caller's thread.
func TestDoStaysOnThread(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin)
	nstest.Leaks(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, home := unix.Gettid(), here(t)
	netns.Do("", func() error {
		if got := unix.Gettid(); got != tid {
			t.Errorf("ran on thread %d, want the caller's, %d", got, tid)
		}
		return nil
	})
	a, b := nstest.New(t), nstest.New(t)
	idA, idB := identify(t, a), identify(t, b)
	netns.Do(a.Path(), func() error {
		if unix.Gettid() == tid {
			t.Error("ran on the caller's thread")
		}
		netns.Do(b.Path(), func() error {
			if got := here(t); got != idB {
				t.Errorf("in a namespace within another: %s, want %s", got, idB)
			}
			return nil
		})
		return netns.Do("", func() error {
			if got := here(t); got != idA {
				t.Errorf("with the empty path: %s, want the caller's, %s", got, idA)
			}
			return nil
		})
	})
	if got := here(t); unix.Gettid() != tid || got != home {
		t.Errorf("the caller is now on thread %d in %s, was on %d in %s", unix.Gettid(), got, tid, home)
	}
}

func TestDoErrors(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin)
	nstest.Leaks(t)
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		is   error
		text string
	}{
		{"/no/such/path", fs.ErrNotExist, "open network namespace /no/such/path: no such file or directory"},
		{file, unix.EINVAL, "enter " + file + ": it is not a network namespace: invalid argument"},
		{fifo, unix.EINVAL, "it is not a network namespace"},
		{"/proc/self/ns/uts", unix.EINVAL, "it is not a network namespace"},
		{dir, unix.EINVAL, "it is not a network namespace"},
	} {
		err := netns.Do(c.path, func() error { t.Errorf("%s: the function ran", c.path); return nil })
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: error %v, want %v with %q", c.path, err, c.is, c.text)
		}
	}
	n, own := nstest.New(t), errors.New("own")
	if err := netns.Do(n.Path(), func() error { return own }); err != own {
		t.Errorf("the function's error became %v", err)
	}
	opts := nstest.HelperOptions{DropCaps: []uintptr{unix.CAP_SYS_ADMIN}, Args: []string{process}}
	out, err := n.Helper(t, "enter", opts)
	if want := "enter network namespace " + process + ": needs CAP_SYS_ADMIN"; err == nil || !strings.Contains(out, want) {
		t.Errorf("without CAP_SYS_ADMIN: %v, output %q, want %q", err, out, want)
	}
	requireClean(t)
}

func TestDoPanics(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin)
	nstest.Leaks(t)
	n := nstest.New(t)
	for _, cause := range []func(){
		func() { panic("some text") },
		func() { panic(nil) },
		func() { _ = []int{}[len(os.Args)] },
	} {
		func() {
			defer func() {
				p, ok := recover().(*netns.Panic)
				if !ok || !strings.Contains(p.Error(), "TestDoPanics.func") {
					t.Fatalf("recovered %v, want a *Panic with the stack of the function", p)
				}
				want, isError := p.Value.(error)
				if isError && !errors.Is(p, want) || !isError && !strings.HasPrefix(p.Error(), "some text ") {
					t.Errorf("panic %v, want its value %v", p, p.Value)
				}
			}()
			netns.Do(n.Path(), func() error { cause(); return nil })
			t.Error("went on")
		}()
	}
	requireClean(t)
}

func TestDoGoexit(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin)
	nstest.Leaks(t)
	n := nstest.New(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		netns.Do(n.Path(), func() error { runtime.Goexit(); return nil })
		t.Error("went on")
	}()
	<-done
	requireClean(t)
}

func BenchmarkDo(b *testing.B) {
	nstest.Require(b, nstest.NetAdmin)
	path := nstest.New(b).Path()
	for b.Loop() {
		netns.Do(path, func() error { return nil })
	}
}
