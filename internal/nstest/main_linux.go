package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// marker says in the environment that the tests run in namespaces made for them, or directly, so that no process executes
	// itself for ever. It is for this package alone.
	marker = "OVERLAY_NSTEST"
	made   = "made"
	direct = "direct"

	// binary is this test binary, even where its path leads through directories that are closed to the user.
	binary = "/proc/self/exe"

	nobody = 65534
)

// notIsolated says why the tests run in the host's namespaces, nil if they do not.
var notIsolated error

// mainRan says that this binary can be executed again for a Helper.
var mainRan bool

// Main is for TestMain: it runs the tests in network and mount namespaces of their own and returns the exit code. In a
// process that a test started for a Helper it runs that instead.
//
// With the privilege to make namespaces the process replaces itself in them, keeping its id, descriptors and arguments.
// Without, it executes itself as a child, root of a user namespace, and passes signals and exit code on. Where the system
// forbids that too the tests run as they are, and Require tells why; OVERLAY_NSTEST=direct in the environment forces that.
// Fuzz workers inherit the namespaces and the marker from their coordinator. /sys goes on showing the host's devices.
func Main(m *testing.M) int {
	if name, ok := os.LookupEnv(helperMarker); ok {
		return quit(runHelper(name))
	}
	mainRan = true
	switch os.Getenv(marker) {
	case made:
		notIsolated = setUp("lo")
		return m.Run()
	case direct:
		notIsolated = errors.New(marker + "=" + direct)
		return m.Run()
	}
	os.Setenv(marker, made)
	err := replace()
	code, err2 := child()
	if err2 == nil {
		return quit(code)
	}
	os.Setenv(marker, direct)
	notIsolated = errors.Join(err, err2)
	return m.Run()
}

// replace executes the process anew in namespaces of its own; it returns only if it cannot. The thread that unshares also
// executes, and with that becomes the process: no other thread is left in the old namespaces.
func replace() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	privateMounts() // where that is forbidden so is mounting, which it is to confine
	err := unix.Exec(binary, os.Args, os.Environ())
	fmt.Fprintf(os.Stderr, "nstest: execute the tests in new namespaces: %v\n", err)
	os.Exit(1) // the thread is not where it was
	return err
}

// privateMounts keeps what the calling thread, in a mount namespace of its own, will mount from the host.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}

// child executes the process as a child in a user namespace, waits for it and returns its exit code.
func child() (int, error) {
	cmd := exec.Command(binary)
	cmd.Args = os.Args
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		Unshareflags: unix.CLONE_NEWNS, // unlike among Cloneflags, mounts become private
		UidMappings:  []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings:  []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:    syscall.SIGKILL,
	}
	runtime.LockOSThread() // the child dies with this thread
	defer runtime.UnlockOSThread()

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("user namespace: %w", err)
	}
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	cmd.Wait()
	return exitCode(cmd.ProcessState), nil
}

// quit returns the exit code of a process that has run no tests. Under coverage it ends the process itself: os.Exit would
// complain on stderr that there is no place for its data.
func quit(code int) int {
	if testing.CoverMode() != "" {
		syscall.Exit(code)
	}
	return code
}

// exitCode is the code that a shell would give.
func exitCode(state *os.ProcessState) int {
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}
