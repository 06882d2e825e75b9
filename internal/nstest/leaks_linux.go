package nstest

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// leakPatience is how long Leaks waits for what is on its way out. The kernel alone takes 20 ms to close a TUN device.
const leakPatience = 5 * time.Second

// Leaks requires that at t.Cleanup the process has the descriptors and goroutines that it has now, and fails the test with a
// list of the others. Call it first: what the test cleans up later than Leaks counts as leaked. Not for parallel tests, which
// would answer for each other.
func Leaks(t testing.TB) {
	t.Helper()
	leaks(t, leakPatience)
}

func leaks(t testing.TB, patience time.Duration) {
	t.Helper()
	openPoller()
	runtime.GC() // close what earlier tests have forgotten now rather than during this one
	runtime.GC()
	time.Sleep(time.Millisecond)
	fds, goroutines := descriptors(), stacks()
	t.Cleanup(func() {
		t.Helper()
		var leaked []string
		deadline := time.Now().Add(patience)
		for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
			leaked = slices.Concat(extra("leaked descriptor", fds, descriptors()),
				extra("closed another's descriptor", descriptors(), fds), extra("leaked", goroutines, stacks()))
			if len(leaked) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(wait)
		}
		t.Errorf("%d leaks:\n%s", len(leaked), strings.Join(leaked, "\n"))
	})
}

// openPoller makes the runtime open its own two descriptors, which stay.
func openPoller() {
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
}

// extra lists what is in now and not in before, by key and value.
func extra(what string, before, now map[string]string) []string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(now)) {
		if _, ok := before[k]; !ok {
			list = append(list, fmt.Sprintf("%s %s", what, now[k]))
		}
	}
	return list
}

// descriptors returns the open descriptors, each as its number and what it is: a number used anew is another descriptor.
func descriptors() map[string]string {
	const dir = "/proc/self/fd"
	open := map[string]string{}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		target, err := os.Readlink(dir + "/" + e.Name())
		if err != nil {
			continue // the one that read the directory
		}
		s := e.Name() + " -> " + target
		open[s] = s
	}
	return open
}

// stacks returns the stacks of all goroutines by id, apart from those that stay for the life of the process.
func stacks() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	all := map[string]string{}
	for s := range strings.SplitSeq(string(buf), "\n\n") {
		if strings.Contains(s, "os/signal.signal_recv") {
			continue
		}
		id, _, _ := strings.Cut(s, " [")
		all[id] = s
	}
	return all
}
