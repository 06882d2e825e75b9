package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// kernel.md C12, V2: 10,000 times a program attaches to a persistent device and goes, and the process is as it was. Two
// devices take turns, for two processors.
func TestCyclesOfAttachAndClose(t *testing.T) {
	cycles := 10_000
	if raceEnabled {
		cycles = 1000
	}
	r := newDownRig(t, Config{})
	var workers sync.WaitGroup
	flat := requireFlat(t)
	start := time.Now()
	for _, name := range []string{"lasting0", "lasting1"} {
		cfg := Config{Name: name, NetNS: r.ns.Path(), Mode: AttachOrCreate, Persist: true}
		workers.Go(func() {
			for range cycles / 2 {
				d, err := New(cfg)
				if err == nil {
					err = d.Close()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	took := time.Since(start)
	flat()
	t.Logf("%d times attach and close: %v, %v each", cycles, took, took/time.Duration(cycles))
	r.ip("link del lasting0")
	r.ip("link del lasting1")
}

// kernel.md V2: 500 devices, eight at a time, come up with addresses and routes and go.
func TestCyclesOfCreateAndDestroy(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN)
	nstest.Leaks(t)
	const abreast = 8
	cycles := 500
	if raceEnabled {
		cycles = 160
	}
	ns := nstest.New(t)
	work := make(chan int)
	var workers sync.WaitGroup
	flat := requireFlat(t)
	start := time.Now()
	for range abreast {
		workers.Go(func() {
			for i := range work {
				if err := oneLife(ns, i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range cycles {
		work <- i
	}
	close(work)
	workers.Wait()
	took := time.Since(start)
	flat()
	t.Logf("%d times create, activate and close, %d at a time: %v, %v each", cycles, abreast, took, took/time.Duration(cycles))
}

func oneLife(ns *nstest.NS, i int) error {
	d, err := New(Config{NetNS: ns.Path(), Queues: 1 + i%3, Networks: lifeNetworks(i)})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Activate(); err != nil {
		return err
	}
	if n, err := d.Queues()[0].Write(sequenceOne); n != len(sequenceOne) || err != nil {
		return fmt.Errorf("Write: %d, %w", n, err)
	}
	return d.Close()
}

func lifeNetworks(i int) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 24)}
}

// requireFlat counts descriptors and goroutines, and again when the function it returns is called.
func requireFlat(t testing.TB) func() {
	t.Helper()
	count := func() (descriptors, goroutines int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), runtime.NumGoroutine()
	}
	fds, goroutines := count()
	return func() {
		t.Helper()
		eventually(t, fmt.Sprintf("no more than the %d descriptors and %d goroutines of before", fds, goroutines), func() bool {
			f, g := count()
			return f <= fds && g <= goroutines
		})
	}
}

const fewDescriptors = "New with few descriptors"

func init() { nstest.Helper(fewDescriptors, newWithFewDescriptors) }

// New where the process has fewer and fewer descriptors left fails with an error that says so, leaves none open and no
// device behind; it never goes on without what it could not open.
func TestNewWithFewDescriptors(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	out, err := ns.Helper(t, fewDescriptors, nstest.HelperOptions{})
	if err != nil {
		t.Error(err)
	}
	t.Logf("%s", out)
}

// newWithFewDescriptors runs in a process of its own, whose limit of descriptors it lowers.
func newWithFewDescriptors() error {
	if r, w, err := os.Pipe(); err == nil { // the runtime's poller, once it has its descriptors; without any it ends the process
		r.Close()
		w.Close()
	}
	if err := connectWithFewDescriptors(); err != nil {
		return err
	}
	for _, cfg := range []Config{
		{Name: "few0", NetNS: "/proc/thread-self/ns/net", Queues: 3},
		{Name: "few0", NetNS: "/proc/thread-self/ns/net", Persist: true},
		{Name: "few0"},
	} {
		before := openDescriptors()
		failures := 0
		for limit := 3; ; limit++ {
			var d Device
			err := withLimit(limit, func() (err error) { d, err = New(cfg); return err })
			if err == nil {
				err = d.Close()
			} else if err = failedClean(err, before); err == nil {
				failures++
				continue
			}
			if err != nil {
				return fmt.Errorf("%d queues, descriptors below %d: %w", cfg.queues(), limit, err)
			}
			break
		}
		fmt.Printf("%d queues, namespace %q: New fails clean %d times\n", cfg.queues(), cfg.NetNS, failures)
		if cfg.Persist {
			if out, err := exec.Command("ip", "link", "del", "few0").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		if now := openDescriptors(); !slices.Equal(now, before) {
			return fmt.Errorf("there are descriptors %v instead of %v", now, before)
		}
	}
	return nil
}

// withLimit makes a call for which descriptors have numbers below the limit.
func withLimit(limit int, call func() error) error {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(limit), Max: old.Max}); err != nil {
		return err
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	return call()
}

// connectWithFewDescriptors tries what New does first: it needs four, and goes without none of them for want of descriptors.
func connectWithFewDescriptors() error {
	for limit := 3; ; limit++ {
		d := &tunDevice{procfs: -1}
		err := withLimit(limit, d.connect)
		missing := len(d.notes) > 0 || d.procfs < 0 || d.watch == nil
		switch {
		case err == nil && missing:
			return fmt.Errorf("descriptors below %d: connect went on without something: procfs %d, notes %q", limit, d.procfs, d.notes)
		case err != nil && !errors.Is(err, unix.EMFILE):
			return err
		}
		if release := d.release(); release != nil || err == nil {
			return release
		}
	}
}

// failedClean checks what New left behind when it failed.
func failedClean(err error, before []int) error {
	if !errors.Is(err, unix.EMFILE) {
		return fmt.Errorf("New: %w, want EMFILE", err)
	}
	if now := openDescriptors(); !slices.Equal(now, before) {
		return fmt.Errorf("New: %w, and there are descriptors %v instead of %v", err, now, before)
	}
	if out, found := exec.Command("ip", "link", "show", "few0").CombinedOutput(); found == nil {
		return fmt.Errorf("New: %w, and there is the device: %s", err, out)
	}
	return nil
}

// openDescriptors lists them by trial, for reading /proc needs one.
func openDescriptors() []int {
	var open []int
	for fd := range 256 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open = append(open, fd)
		}
	}
	return open
}

// New, Activate and Close with ten addresses and routes, in the median of 50, beside close(2) alone of a device like that.
func TestLifecycleTimes(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN)
	nstest.Leaks(t)
	rounds := 50
	if raceEnabled || testing.Short() {
		rounds = 5
	}
	cfg := lifeConfig(nstest.New(t))
	var opening, closing, bare []time.Duration
	for range rounds {
		for _, end := range []func(Device){
			func(d Device) { closing = append(closing, timed(t, d.Close)) },
			func(d Device) { bare = append(bare, closeBare(t, d)) },
		} {
			var d Device
			opening = append(opening, timed(t, func() error { d = openLife(t, cfg); return nil }))
			end(d)
		}
	}
	median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2] }
	o, c, b := median(opening), median(closing), median(bare)
	t.Logf("medians of %d: New and Activate %v, Close %v, close(2) alone %v, ratio %.2f", rounds, o, c, b, float64(c)/float64(b))
	if rounds == 50 && c > b*12/10 {
		t.Errorf("Close takes %v, which is more than 1.2 times the %v of close(2) alone", c, b)
	}
}

func lifeConfig(ns *nstest.NS) Config {
	cfg := Config{NetNS: ns.Path()}
	for i := range 10 {
		cfg.Networks = append(cfg.Networks, lifeNetworks(i)...)
		cfg.Routes = append(cfg.Routes, Route{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i), 0}), 24)})
	}
	return cfg
}

func openLife(t testing.TB, cfg Config) Device {
	t.Helper()
	d, err := New(cfg)
	if err == nil {
		err = d.Activate()
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func timed(t testing.TB, call func() error) time.Duration {
	t.Helper()
	start := time.Now()
	if err := call(); err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

// closeBare closes a device so that its last descriptor is closed by close(2), and returns how long that took.
func closeBare(t testing.TB, d Device) time.Duration {
	t.Helper()
	f, err := d.Queues()[0].File()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return timed(t, func() error { return unix.Close(fd) })
}
