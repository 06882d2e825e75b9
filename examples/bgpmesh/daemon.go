//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/overlay/examples/internal/stage"

	"golang.org/x/sys/unix"
)

// daemon is a process that runs on a host until it is stopped.
type daemon struct {
	name   string
	cmd    *exec.Cmd
	exited chan struct{} // closed when err is set
	err    error
	told   bool // that it ended too early

	mu  sync.Mutex
	out bytes.Buffer
}

// startDaemon runs a program on a host.
func startDaemon(ns *stage.Namespace, path string, args ...string) (*daemon, error) {
	d := &daemon{name: filepath.Base(path), cmd: exec.Command(path, args...), exited: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d, d
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who tell it in good order
	if err := ns.Do(d.cmd.Start); err != nil {
		return nil, err
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.exited)
	}()
	return d, nil
}

// Write keeps what the daemon says.
func (d *daemon) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.Write(b)
}

func (d *daemon) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.String()
}

// last is the end of what the daemon said.
func (d *daemon) last() string {
	const lines = 8
	said := strings.Split(strings.TrimSpace(d.said()), "\n")
	return strings.Join(said[max(0, len(said)-lines):], "\n")
}

// awaitWord waits until the daemon has said a word.
func (d *daemon) awaitWord(ctx context.Context, word string) error {
	return await(ctx, fmt.Sprintf("%s to say %q", d.name, word), func() (bool, error) {
		if strings.Contains(d.said(), word) {
			return true, nil
		}
		select {
		case <-d.exited:
			d.told = true
			return false, fmt.Errorf("it has ended: %w\n%s", d.err, d.last())
		default:
			return false, nil
		}
	})
}

// stop ends the daemon in good order if it can.
func (d *daemon) stop() error {
	select {
	case <-d.exited:
		if d.told {
			return nil
		}
		return fmt.Errorf("%s had ended before: %w\n%s", d.name, d.err, d.last())
	default:
	}
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.exited:
	case <-time.After(stage.Patience):
		_ = d.cmd.Process.Kill() // it has ended if that fails
		<-d.exited
	}
	if d.err != nil {
		return fmt.Errorf("%s ended with %w\n%s", d.name, d.err, d.last())
	}
	return nil
}

// command runs a program on a host and returns what it says.
func command(ctx context.Context, ns *stage.Namespace, path string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out), nil
}

// patience is how long a router may take for anything: a session that did not come about is tried again after a second or more.
const patience = 30 * time.Second

// await waits for something that a router brings about.
func await(ctx context.Context, what string, done func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		switch ok, err := done(); {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("wait for %s: %w", what, err)
		case ok:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("waited %v for %s", patience, what)
		}
	}
}
