package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"example.com/overlay"

	"golang.org/x/sys/unix"
)

// Again runs the program itself as a child in namespaces of its own (unix.CLONE_NEW…; its mounts are private, in a user
// namespace it is root), with more in its environment. It interrupts the child when ctx ends and returns its exit code; an
// error is that of starting it. The child dies with us.
func Again(ctx context.Context, args []string, env string, namespaces uintptr) (code int, err error) {
	runtime.LockOSThread() // the child's death signal is tied to the thread that starts it
	defer runtime.UnlockOSThread()
	child := exec.Command("/proc/self/exe")
	child.Args = append([]string{os.Args[0]}, args...)
	child.Env = append(os.Environ(), env)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   namespaces &^ unix.CLONE_NEWNS,
		Unshareflags: namespaces & unix.CLONE_NEWNS, // so mounts become private, which among Cloneflags they do not
		Pdeathsig:    unix.SIGKILL,
	}
	if namespaces&unix.CLONE_NEWUSER != 0 {
		child.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		child.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	if err := child.Start(); err != nil {
		return 0, fmt.Errorf("run again in namespaces: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = child.Process.Signal(unix.SIGINT) // it has ended if that fails
		err = <-ended
	}
	return exitCode(err)
}

// exitCode is what a shell would make of the end of a child.
func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 0, fmt.Errorf("wait for the process in namespaces: %w", err)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return cmp.Or(exit.ExitCode(), 1), nil
}

// OpenFiles lists the open descriptors, apart from those of the Go runtime, and what each is.
func OpenFiles() []string {
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

// Leftovers says which descriptors are open that were not before, and which threads are in a foreign namespace. Nothing else
// keeps our namespaces alive, nor the links in them.
func Leftovers(before []string) error {
	var errs []error
	for _, f := range OpenFiles() {
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

// Interrupted says whether err is of the interruption and of nothing else.
func Interrupted(err error) bool {
	switch e := err.(type) {
	case interface{ Unwrap() []error }:
		return !slices.ContainsFunc(e.Unwrap(), func(err error) bool { return !Interrupted(err) })
	case interface{ Unwrap() error }:
		return Interrupted(e.Unwrap())
	}
	return errors.Is(err, context.Canceled)
}

// Explain adds to an error for want of permission what of this system is in the way, and what to do. Made says that the process
// runs in a user namespace that the example has made.
func Explain(err error, example string, made bool) error {
	if !errors.Is(err, os.ErrPermission) && !errors.Is(err, unix.ENOSPC) {
		return err
	}
	lines := []string{err.Error()}
	var device *overlay.OpError
	if !errors.As(err, &device) {
		lines = append(lines, forbidding()...)
	}
	advice := fmt.Sprintf("As root it works: go build ./examples/%[1]s && sudo ./%[1]s", example)
	if os.Geteuid() == 0 && !made {
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
