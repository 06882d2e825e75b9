//go:build linux

package nstest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/netns"

	"golang.org/x/sys/unix"
)

// fakeT is a testing.TB that may fail.
type fakeT struct {
	testing.TB
	outcome  string // "failed: …", "skipped: …"
	cleanups []func()
}

func (f *fakeT) Helper()                        {}
func (f *fakeT) Cleanup(fn func())              { f.cleanups = append(f.cleanups, fn) }
func (f *fakeT) Errorf(format string, a ...any) { f.outcome += "failed: " + fmt.Sprintf(format, a...) }

func (f *fakeT) Fatal(a ...any)                 { f.Errorf("%s", fmt.Sprint(a...)); runtime.Goexit() }
func (f *fakeT) Fatalf(format string, a ...any) { f.Errorf(format, a...); runtime.Goexit() }
func (f *fakeT) Skipf(format string, args ...any) {
	f.outcome += "skipped: " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// pretend runs a test that may fail and returns how it ended.
func pretend(test func(testing.TB)) string {
	f := &fakeT{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, fn := range slices.Backward(f.cleanups) {
				fn()
			}
		}()
		test(f)
	}()
	<-done
	return f.outcome
}

func links(t testing.TB, n *NS) string {
	t.Helper()
	var names []string
	n.Do(t, func() {
		all, err := net.Interfaces()
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			names = append(names, fmt.Sprintf("%s %v", i.Name, i.Flags&net.FlagUp != 0))
		}
	})
	return strings.Join(names, ", ")
}

func TestNew(t *testing.T) {
	Require(t, NetAdmin)
	Leaks(t)
	a, b := New(t), New(t)
	if got, want := links(t, a), "lo true"; got != want {
		t.Errorf("links of a new namespace: %s, want %s", got, want)
	}
	idA, idB, own := id(t, a.Path()), id(t, b.Path()), id(t, Own(t).Path())
	if idA == idB || idA == own || idB == own {
		t.Errorf("namespaces are not distinct: %d, %d, own %d", idA, idB, own)
	}
	b.Do(t, func() {
		if got := id(t, a.Path()); got != idA {
			t.Errorf("Path seen from another thread: %d, want %d", got, idA)
		}
	})
	if out, err := b.Helper(t, "id", HelperOptions{Args: []string{a.Path()}}); err != nil || out != fmt.Sprint(idA) {
		t.Errorf("Path seen from a child: %s, %v; want %d", out, err, idA)
	}
}

// id is the inode of the namespace that one gets into by path.
func id(t testing.TB, path string) uint64 {
	t.Helper()
	n, err := idOf(path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func idOf(path string) (uint64, error) {
	var st unix.Stat_t
	err := netns.Do(path, func() error { return unix.Stat(threadNS, &st) })
	return st.Ino, err
}

func TestDoEndsTheTest(t *testing.T) {
	Require(t, NetAdmin)
	Leaks(t)
	n := New(t)
	for what, end := range map[string]func(t testing.TB){
		"failed: ":  func(t testing.TB) { t.Fatal("") },
		"skipped: ": func(t testing.TB) { t.Skipf("") },
	} {
		got := pretend(func(t testing.TB) {
			n.Do(t, func() { end(t) })
			t.Errorf("went on")
		})
		if got != what {
			t.Errorf("outcome %q, want %q", got, what)
		}
	}
}

func TestRun(t *testing.T) {
	Require(t, NetAdmin, Program("ip"))
	Leaks(t)
	a, b := New(t), New(t)
	Veth(t, a, b, "va", "vb")
	a.OtherTun(t, "other0", "192.0.2.1/24", "2001:db8::1/64")
	out := a.Run(t, "ip addr")
	for _, want := range []string{"va@", "other0: <POINTOPOINT,MULTICAST,NOARP,UP,LOWER_UP>", "inet 192.0.2.1/24", "inet6 2001:db8::1/64"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if got, want := links(t, b), "lo true, vb true"; got != want {
		t.Errorf("links %s, want %s", got, want)
	}
	_, err := b.TryRun("ip", "link", "show", "other0")
	if err == nil || !strings.Contains(err.Error(), "ip link show other0: exit status 1\nDevice \"other0\" does not exist") {
		t.Errorf("error of ip: %v", err)
	}
	if got := pretend(func(t testing.TB) { b.Run(t, "ip link show other0") }); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("Run of a failing command: outcome %q", got)
	}
	_, err = b.TryRun("no-such-program")
	if err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("error of a missing program: %v", err)
	}
}

func TestStart(t *testing.T) {
	Require(t, NetAdmin, Program("sh"), Program("sleep"))
	Leaks(t)
	n := New(t)
	sh := n.Start(t, "sh", "-c", "echo hello; sleep 60 & wait")
	sh.Expect(t, "hello\n")
	sleep := n.Start(t, "sleep 60")
	if err := sleep.Stop(); codeOf(err) != 128+15 {
		t.Errorf("stopped by SIGTERM: %v", err)
	}
	sh.Kill() // returns at once only if the sleep in it is killed too
	if err := sh.Wait(); codeOf(err) != 128+9 {
		t.Errorf("killed: %v", err)
	}
	got := pretend(func(t testing.TB) { n.Start(t, "sh -c exit").Expect(t, "hello") })
	if !strings.Contains(got, `sh -c exit ended without "hello"`) {
		t.Errorf("outcome of waiting in vain: %s", got)
	}
}

func TestOtherTunGoesWithDescriptor(t *testing.T) {
	Require(t, TUN)
	Leaks(t)
	n := New(t)
	f := n.OtherTun(t, "other0")
	f.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := f.Read(make([]byte, 2000)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	f.Close()
	if got, want := links(t, n), "lo true"; got != want {
		t.Errorf("links %s, want %s", got, want)
	}
}

func TestRequire(t *testing.T) {
	t.Setenv("OVERLAY_REQUIRE", "")
	broken := Ability("broken")
	probes[broken] = func() error { return unix.EMFILE }
	defer delete(probes, broken)
	for _, c := range []struct {
		ability         Ability
		require, prefix string
	}{
		{Program("no-such-program"), "", "skipped: missing the ability program no-such-program: exec: "},
		{Program("no-such-program"), "1", "failed: missing the ability program no-such-program, which OVERLAY_REQUIRE=1 demands: "},
		{broken, "", "failed: cannot tell whether there is the ability broken: too many open files"},
		{"unknown", "", "failed: cannot tell whether there is the ability unknown: there is no probe for it"},
		{Program("sh"), "1", ""},
	} {
		t.Setenv("OVERLAY_REQUIRE", c.require)
		got := pretend(func(t testing.TB) { Require(t, c.ability) })
		if !strings.HasPrefix(got, c.prefix) || (c.prefix == "") != (got == "") {
			t.Errorf("OVERLAY_REQUIRE=%s, %s: outcome %q, want %q", c.require, c.ability, got, c.prefix)
		}
	}
	if _, cached := probed.Load(broken); cached {
		t.Error("an inconclusive answer is cached")
	}
}

// TestProbes: whatever the answers are here, they must be answers.
func TestProbes(t *testing.T) {
	Leaks(t)
	for a := range probes {
		why, err := a.probe()
		if err != nil {
			t.Errorf("%s: %v", a, err)
		}
		t.Logf("%s: missing because: %v", a, why)
	}
}

func TestLeaks(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	stop := make(chan struct{})
	var dup int
	for _, c := range []struct {
		name string
		test func()
		want []string
	}{
		{"clean", func() {}, nil},
		{"late", func() { go time.Sleep(20 * time.Millisecond) }, nil},
		{"descriptor", func() { dup, _ = unix.Dup(int(r.Fd())) }, []string{"1 leaks:\nleaked descriptor ", " -> pipe:["}},
		{"closed", func() { unix.Close(dup) }, []string{"1 leaks:\nclosed another's descriptor ", " -> pipe:["}},
		{"goroutine", func() { go func() { <-stop }() }, []string{"1 leaks:\nleaked goroutine ", "TestLeaks"}},
	} {
		got := pretend(func(t testing.TB) {
			leaks(t, 200*time.Millisecond)
			c.test()
		})
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s: outcome %q, want %q", c.name, got, want)
			}
		}
		if c.want == nil && got != "" {
			t.Errorf("%s: outcome %q", c.name, got)
		}
	}
	close(stop)
}
