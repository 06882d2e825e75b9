package nstest

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long a process may take to say or do what it must.
const patience = 10 * time.Second

// Process is a command or a helper that goes on while the test does.
type Process struct {
	cmd   *exec.Cmd
	stdin io.Closer // of a helper, nil of a command
	out   output
	done  chan struct{} // closed when err is set
	err   error
}

func newProcess(cmd *exec.Cmd) *Process {
	return &Process{cmd: cmd, done: make(chan struct{})}
}

// start starts the command on a thread that `on` gives and keeps that thread as long as the command runs: Pdeathsig kills it
// when the thread ends, and the runtime ends threads that others have left locked.
func (p *Process) start(t testing.TB, on func(func() error) error) {
	t.Helper()
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		running := false
		p.err = on(func() error {
			if err := p.cmd.Start(); err != nil {
				return err
			}
			running = true
			started <- nil
			return p.cmd.Wait()
		})
		if !running {
			started <- p.err
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", p, err)
	}
	t.Cleanup(p.Kill)
}

// Pid returns the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Output returns what the process has written so far, to stdout and stderr.
func (p *Process) Output() string { return p.out.String() }

// Expect waits until the output contains text, and fails the test if the process ends first or takes too long.
func (p *Process) Expect(t testing.TB, text string) {
	t.Helper()
	p.await(t, &p.out, text)
}

// await waits until o contains text and returns what is before it.
func (p *Process) await(t testing.TB, o *output, text string) string {
	t.Helper()
	late := time.After(patience)
	for ended := false; ; {
		now, more := o.watch()
		if before, _, ok := strings.Cut(now, text); ok {
			return before
		}
		if ended {
			t.Fatalf("%s ended without %q (%v):\n%s", p, text, p.err, p.Output())
		}
		select {
		case <-more:
		case <-p.done:
			ended = true // and look once more
		case <-late:
			t.Fatalf("%s: no %q after %v:\n%s", p, text, patience, p.Output())
		}
	}
}

// Signal sends a signal to the process alone.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Wait waits for the process to end. A non-zero exit or a signal is an *exec.ExitError.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Stop asks the process to end, a helper by the end of its stdin and a command by SIGTERM, and waits; one that does not obey
// is killed.
func (p *Process) Stop() error {
	if p.stdin != nil {
		p.stdin.Close()
	} else {
		p.Signal(syscall.SIGTERM)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.Kill()
	}
	return p.Wait()
}

// Kill ends the process and its children with SIGKILL and waits. Killing one that has ended does nothing.
func (p *Process) Kill() {
	select {
	case <-p.done: // its id may be another's by now
	default:
		syscall.Kill(-p.Pid(), syscall.SIGKILL)
	}
	<-p.done
	if p.stdin != nil {
		p.stdin.Close()
	}
}

func (p *Process) String() string { return strings.Join(p.cmd.Args, " ") }

// output collects what a process writes while a test reads it.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed by the next Write; nil if nobody waits
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// watch returns what there is and a channel that is closed when there is more.
func (o *output) watch() (now string, more <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more == nil {
		o.more = make(chan struct{})
	}
	return o.buf.String(), o.more
}
