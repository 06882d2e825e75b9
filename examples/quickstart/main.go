//go:build linux

// Quickstart builds a small overlay network in private network namespaces, measures it and takes it down. It needs no
// set-up, and not even root where the system lets users make user namespaces.
//
// Agent.go is the part to read and to copy: what one overlay host does, on the public API alone. The other files build the
// hosts (hosts.go), measure (measure.go) and print (table.go).
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"example.com/overlay"

	"golang.org/x/sys/unix"
)

// Exit codes, beside 0: all worked.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() { os.Exit(start(os.Args[1:], os.Stdout, os.Stderr)) }

// options are what the command line says.
type options struct {
	hosts    int
	duration time.Duration // of TCP, all hosts together
	verbose  bool
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	f := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.hosts, "hosts", 3, "overlay hosts to build, 3…16")
	f.DurationVar(&o.duration, "d", 2*time.Second, "how long TCP runs, all hosts together, 100ms…1h")
	f.BoolVar(&o.verbose, "v", false, "print the State of every host")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.hosts < 3 || o.hosts > 16:
		err = fmt.Errorf("-hosts %d: want 3…16", o.hosts)
	case o.duration < 100*time.Millisecond || o.duration > time.Hour:
		err = fmt.Errorf("-d %v: want 100ms…1h", o.duration)
	}
	if err != nil {
		fmt.Fprintf(stderr, "quickstart: %v\n", err)
	}
	return o, err
}

// start is the program but for the process it runs in; it returns the exit code.
func start(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := allowed(); err != nil {
		if os.Getenv(marker) == "" && errors.Is(err, os.ErrPermission) {
			return becomeRoot(ctx, args, stderr)
		}
		return fail(err, stderr)
	}
	err = run(ctx, o, stdout)
	switch {
	case err == nil:
		return 0
	case interrupted(err):
		fmt.Fprintln(stderr, "\nquickstart: interrupted; nothing is left")
		return exitInterrupted
	}
	fmt.Fprintln(stdout)
	return fail(err, stderr)
}

func fail(err error, stderr io.Writer) int {
	fmt.Fprintf(stderr, "quickstart: failed:\n  %s\n", strings.ReplaceAll(explain(err).Error(), "\n", "\n  "))
	return exitFailed
}

// run builds, measures, reports and takes down. The error holds all that did not work.
func run(ctx context.Context, o options, stdout io.Writer) error {
	before, out := openFiles(), &printer{to: stdout}
	fmt.Fprintf(out, "%d overlay hosts, each in a network namespace of its own. Nothing of your system is touched.\n\n", o.hosts)
	if err := errors.Join(session(ctx, o, out), leftovers(before), ctx.Err()); err != nil {
		return errors.Join(err, out.err)
	}
	fmt.Fprintln(out, "\nAll worked. Devices closed, namespaces gone, no descriptor left open.")
	fmt.Fprintln(out, "Next: read examples/quickstart/agent.go, all that an overlay host does, in under 100 lines.")
	return out.err
}

// printer remembers why it could not write, so that not every line that is printed need ask.
type printer struct {
	to  io.Writer
	err error // the first; after it nothing is written
}

func (p *printer) Write(b []byte) (n int, err error) {
	if p.err != nil {
		return 0, p.err
	}
	if n, err = p.to.Write(b); err != nil {
		p.err = fmt.Errorf("print: %w", err)
	}
	return n, p.err
}

// session is the life of the lab.
func session(ctx context.Context, o options, out io.Writer) (err error) {
	say := progress(out)
	l, err := newLab(ctx, o.hosts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	say("built", "%d namespaces, %d links, %d overlay devices", o.hosts+1, o.hosts, o.hosts)

	results := make([]result, o.hosts)
	if err := l.ping(ctx, results); err != nil {
		return err
	}
	say("pinged", "%d times from each host to each other, by IPv4 and IPv6; RTT is the median", probes)
	if err := l.steer(ctx, results); err != nil {
		return err
	}
	say("steered", "%d flows from each client to a subnet behind two gateways, weights %d and %d",
		flows*len(families), weights[0], weights[1])
	if err := l.stream(ctx, o.duration, results); err != nil {
		return err
	}
	say("streamed", "TCP from each host to the next, one after the other")

	fmt.Fprintln(out)
	l.report(out, results)
	if o.verbose {
		for _, h := range l.hosts {
			fmt.Fprintf(out, "\n%s\n  %s\n", h.name, strings.ReplaceAll(strings.TrimSpace(h.agent.dev.State().String()), "\n", "\n  "))
		}
	}
	return l.check(results)
}

// progress returns a function that tells what has been done since it was called last, and how long that took.
func progress(out io.Writer) func(what, format string, args ...any) {
	last := time.Now()
	return func(what, format string, args ...any) {
		now := time.Now()
		fmt.Fprintf(out, "  %-9s %-76s %6d ms\n", what, fmt.Sprintf(format, args...), now.Sub(last).Milliseconds())
		last = now
	}
}

// openFiles lists the open descriptors, apart from those of the Go runtime, and what each is.
func openFiles() []string {
	const dir = "/proc/self/fd"
	var open []string
	entries, _ := os.ReadDir(dir) // without /proc the list is empty before and after
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") { // the poller's; an error: that of ReadDir
			open = append(open, e.Name()+" → "+target)
		}
	}
	return open
}

// leftovers says which descriptors are open that were not before, and which threads are in a foreign namespace. Nothing else
// keeps our namespaces alive, nor the links in them.
func leftovers(before []string) error {
	var errs []error
	for _, f := range openFiles() {
		if !slices.Contains(before, f) {
			errs = append(errs, fmt.Errorf("descriptor %s was left open", f))
		}
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	threads, _ := filepath.Glob("/proc/self/task/*/ns/net") // the pattern is well-formed
	for _, thread := range threads {
		if ns, err := os.Readlink(thread); err == nil && ns != home { // an error: the thread has ended
			errs = append(errs, fmt.Errorf("thread %s was left in %s", thread, ns))
		}
	}
	return errors.Join(errs...)
}

// interrupted says whether err is of the interruption and of nothing else.
func interrupted(err error) bool {
	switch e := err.(type) {
	case interface{ Unwrap() []error }:
		return !slices.ContainsFunc(e.Unwrap(), func(err error) bool { return !interrupted(err) })
	case interface{ Unwrap() error }:
		return interrupted(e.Unwrap())
	}
	return errors.Is(err, context.Canceled)
}

// marker in the environment says that the process is root of a user namespace made for it.
const marker = "OVERLAY_QUICKSTART_USERNS"

// allowed tries whether the process may make network namespaces.
func allowed() error {
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	return ns.close()
}

// becomeRoot runs the program as a child that is root of a user namespace of its own, interrupts it when ctx ends, and
// returns its exit code. The child dies with us.
func becomeRoot(ctx context.Context, args []string, stderr io.Writer) int {
	runtime.LockOSThread() // the child's death signal is tied to the thread that starts it
	defer runtime.UnlockOSThread()
	child := exec.Command("/proc/self/exe")
	child.Args = append([]string{os.Args[0]}, args...)
	child.Env = append(os.Environ(), marker+"=1")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	if err := child.Start(); err != nil {
		return fail(fmt.Errorf("make a user namespace: %w", err), stderr)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case err := <-ended:
		return exitCode(err, stderr)
	case <-ctx.Done():
		_ = child.Process.Signal(unix.SIGINT) // it has ended if that fails
		return exitCode(<-ended, stderr)
	}
}

// exitCode is what a shell would make of the end of a child.
func exitCode(err error, stderr io.Writer) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &exit):
		fmt.Fprintf(stderr, "quickstart: wait for the process in the user namespace: %v\n", err)
		return exitFailed
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return cmp.Or(exit.ExitCode(), exitFailed)
}

// explain adds to an error for want of permission what of this system is in the way, and what to do.
func explain(err error) error {
	if !errors.Is(err, os.ErrPermission) && !errors.Is(err, unix.ENOSPC) {
		return err
	}
	lines := []string{err.Error()}
	var device *overlay.OpError
	if !errors.As(err, &device) {
		lines = append(lines, forbidding()...)
	}
	advice := "As root it works: go build ./examples/quickstart && sudo ./quickstart"
	if os.Geteuid() == 0 && os.Getenv(marker) == "" {
		advice = "This root is not almighty. A container needs --cap-add SYS_ADMIN --cap-add NET_ADMIN --device /dev/net/tun"
	}
	return errors.New(strings.Join(append(lines, advice), "\n"))
}

// forbidding lists the settings that keep users from making namespaces.
func forbidding() []string {
	var found []string
	for _, s := range []struct{ path, forbids string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0"},
		{"/proc/sys/user/max_user_namespaces", "0"},
		{"/proc/sys/user/max_net_namespaces", "0"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"},
	} {
		value, err := os.ReadFile(s.path)
		if err == nil && strings.TrimSpace(string(value)) == s.forbids {
			found = append(found, fmt.Sprintf("%s is %s, which forbids it", s.path, s.forbids))
		}
	}
	return found
}
