package netns

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// self is the calling thread's namespace; /proc/self would be the main thread's.
const self = "/proc/thread-self/ns/net"

// Do runs fn on a thread that is in the network namespace at path, and waits for it. The caller's thread stays where it is;
// with path "" fn runs on the caller's thread, locked meanwhile, so that all that fn opens is of one namespace.
//
// The error is fn's own, unchanged, or says why fn did not run; it keeps the errno. fn may panic (the caller panics with a
// *Panic, which has fn's stack) and may call runtime.Goexit, as testing.T.FailNow does (it ends the caller's goroutine too).
func Do(path string, fn func() error) error {
	if path == "" {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		return fn()
	}
	// O_NONBLOCK: the path may by mistake be a FIFO.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	return do(fd, path, fn)
}

// DoFd is Do for an open namespace file, which stays the caller's.
func DoFd(fd int, fn func() error) error {
	return do(fd, fmt.Sprintf("descriptor %d", fd), fn)
}

func do(fd int, name string, fn func() error) error {
	var o outcome
	onOtherThread(func() { o.visit(fd, name, fn) })
	switch {
	case o.panic != nil:
		panic(o.panic)
	case !o.returned:
		runtime.Goexit()
	}
	return o.err
}

// onOtherThread runs fn on a goroutine of its own, locked to a thread that is not the main one. The main thread cannot be
// thrown away should fn leave it dirty, and the whole process is judged by it: it is what /proc/self shows.
func onOtherThread(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done) // also when fn ends the goroutine
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onOtherThread(fn) // while this goroutine holds the main thread, no other gets it
			runtime.UnlockOSThread()
			return
		}
		fn()
	}()
	<-done
}

// outcome is how a visit ended: none of the fields set means by runtime.Goexit.
type outcome struct {
	err      error
	returned bool
	panic    *Panic
}

// visit enters the namespace, runs fn and goes back. It expects a locked thread and unlocks it only when that is clean:
// a goroutine that ends locked takes its thread along.
func (o *outcome) visit(fd int, name string, fn func() error) {
	home, err := unix.Open(self, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		o.err, o.returned = fmt.Errorf("open this thread's network namespace %s: %w", self, err), true
		runtime.UnlockOSThread()
		return
	}
	defer unix.Close(home)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		o.err, o.returned = enterError(name, err), true
		runtime.UnlockOSThread()
		return
	}
	defer func() {
		// Deferred, so that it also happens when fn panics or ends the goroutine.
		if err := unix.Setns(home, unix.CLONE_NEWNET); err == nil {
			runtime.UnlockOSThread()
		}
	}()
	o.run(fn)
}

func (o *outcome) run(fn func() error) {
	defer func() {
		if o.returned {
			return
		}
		if v := recover(); v != nil { // nil: runtime.Goexit
			o.panic = &Panic{Value: v, Stack: debug.Stack()}
		}
	}()
	o.err = fn()
	o.returned = true
}

// enterError explains what setns refused; errors.Is still finds the errno.
func enterError(name string, err error) error {
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("enter %s: it is not a network namespace: %w", name, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("enter network namespace %s: needs CAP_SYS_ADMIN, here and in the user namespace that owns it: %w", name, err)
	}
	return fmt.Errorf("enter network namespace %s: %w", name, err)
}

// Panic is what Do panics with when its function did.
type Panic struct {
	Value any    // what the function panicked with
	Stack []byte // where
}

// Error makes the runtime print the function's stack beside the caller's.
func (p *Panic) Error() string {
	return fmt.Sprintf("%v [in a network namespace]\n\n%s", p.Value, p.Stack)
}

// Unwrap returns the value if it is an error, such as a runtime.Error.
func (p *Panic) Unwrap() error {
	err, _ := p.Value.(error)
	return err
}
