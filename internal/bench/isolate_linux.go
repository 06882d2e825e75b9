package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// insideMarker says in the environment that the process is in a network namespace made for it.
	insideMarker = "OVERLAY_BENCH_INSIDE"
	self         = "/proc/self/exe"
)

// isolate brings the process into a network namespace of its own, so that nothing it does reaches the host: with the privilege to
// make one it executes itself anew there, without, it runs as a child that is root of a user namespace. done: that child has
// ended with this exit code. Where neither is allowed, o.noKernel says what is missing.
func isolate(o *options, cases []benchCase) (code int, done bool) {
	if !slices.ContainsFunc(cases, func(c benchCase) bool { return c.kernel }) {
		return 0, false
	}
	if os.Getenv(insideMarker) != "" {
		o.noKernel = tryTun()
		return 0, false
	}
	os.Setenv(insideMarker, "1")
	err := replace()
	code, err2 := inUserNS()
	if err2 == nil {
		return code, true
	}
	o.noKernel = fmt.Errorf("needs network namespaces and TUN devices: run it as root, or let users make user namespaces (%w)", errors.Join(err, err2))
	return 0, false
}

// tryTun says what is missing to make TUN devices.
func tryTun() error {
	fd, err := unix.Open(tunNode, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("needs %s, readable and writable: %w", tunNode, err)
	}
	return unix.Close(fd)
}

// replace returns only if it cannot. The thread that unshares also executes, and with that becomes the process.
func replace() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	err := unix.Exec(self, os.Args, os.Environ())
	fmt.Fprintln(os.Stderr, "bench: execute in a new namespace:", err)
	os.Exit(exitIncomplete) // the thread is not where it was
	return err
}

// inUserNS runs the process as a child and returns its exit code. The terminal sends an interrupt to both; only the child obeys.
func inUserNS() (int, error) {
	cmd := exec.Command(self)
	cmd.Args = os.Args
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // the child dies with this thread
	defer runtime.UnlockOSThread()
	signal.Ignore(unix.SIGINT)
	defer signal.Reset(unix.SIGINT)
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, unix.SIGTERM)
	defer signal.Stop(terminated)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("user namespace: %w", err)
	}
	go func() {
		for s := range terminated {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return exitIncomplete, nil // by a signal
}
