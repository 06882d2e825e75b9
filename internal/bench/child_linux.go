package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What is measured by processor time runs in a process of its own, this program again. It obeys lines on stdin, answers each with
// a line of JSON on stdout and ends with stdin, so that it never outlives its parent.

const (
	roleMarker    = "OVERLAY_BENCH_ROLE"
	profileMarker = "OVERLAY_BENCH_PROFILE" // a file for the profile of a child's whole life
	patience      = 3 * time.Minute         // for an answer
)

// roles are what a child may be. A role prepares itself by its arguments and returns what obeys the commands.
var roles = map[string]func(args []byte) (obey func(command string) (any, error), err error){
	"relay":    relayRole,
	"lookup":   lookupRole,
	"gateways": gatewaysRole,
	"follow":   followRole,
	"rest":     restRole,
}

// answer is a line on stdout.
type answer struct {
	Error string          `json:"error,omitempty"`
	Value json.RawMessage `json:"value,omitempty"`
}

func beChild(role string) int {
	signal.Ignore(unix.SIGINT) // the terminal's, which the parent obeys
	if path := os.Getenv(profileMarker); path != "" {
		f, err := os.Create(path)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer pprof.StopCPUProfile()
	}
	out := json.NewEncoder(os.Stdout)
	reply := func(value any, err error) {
		var a answer
		if a.Value, _ = json.Marshal(value); err != nil {
			a.Error = err.Error()
		}
		if out.Encode(a) != nil {
			os.Exit(1)
		}
	}
	obey, err := roles[role]([]byte(os.Args[1]))
	reply(nil, err)
	if err != nil {
		return 1
	}
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		reply(obey(commands.Text()))
	}
	return 0
}

// child is such a process as its parent sees it.
type child struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *os.File
	lines  *bufio.Reader
	stderr bytes.Buffer
}

// profilePath is where the next child shall leave its profile; "": nowhere. The cases run one after the other.
var profilePath string

// profileName names the profile of a way.
func profileName(o *options, c *benchCase, way string) string {
	if o.profiles == "" {
		return ""
	}
	name := strings.NewReplacer(" ", "-", ",", "", "'", "").Replace(c.suite + "-" + c.name + "-" + way)
	path, _ := filepath.Abs(filepath.Join(o.profiles, name+".prof"))
	return path
}

// startChild returns when the child is prepared. Files are its descriptors from 3 on; they stay the caller's.
func startChild(role string, args any, files ...*os.File) (*child, error) {
	return startChildBy(func(start func() error) error { return start() }, role, args, files...)
}

// startChildIn starts it in a namespace, which is its descriptor 3 as well.
func startChildIn(s *space, role string, args any) (*child, error) {
	return startChildBy(s.do, role, args, s.file)
}

func startChildBy(on func(func() error) error, role string, args any, files ...*os.File) (*child, error) {
	text, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.Command(self, string(text))}
	c.cmd.Env = append(os.Environ(), roleMarker+"="+role)
	if profilePath != "" {
		c.cmd.Env = append(c.cmd.Env, profileMarker+"="+profilePath)
	}
	c.cmd.ExtraFiles = files
	c.cmd.Stderr = &c.stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	c.out, c.lines, c.cmd.Stdout = out, bufio.NewReader(out), theirs
	err = on(c.cmd.Start)
	theirs.Close()
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("start a child: %w", err)
	}
	if err := c.hear(nil); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// ask gives a command and stores the answer's value.
func (c *child) ask(command string, value any) error {
	if _, err := io.WriteString(c.in, command+"\n"); err != nil {
		return c.explain(err)
	}
	return c.hear(value)
}

func (c *child) hear(value any) error {
	if err := c.out.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	line, err := c.lines.ReadBytes('\n')
	if err != nil {
		return c.explain(err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return fmt.Errorf("answer of a child: %w", err)
	}
	if a.Error != "" {
		return errors.New(a.Error)
	}
	if value == nil {
		return nil
	}
	return json.Unmarshal(a.Value, value)
}

// explain adds what a child that is lost has said.
func (c *child) explain(err error) error {
	c.close()
	if said := bytes.TrimSpace(c.stderr.Bytes()); len(said) > 0 {
		return fmt.Errorf("child: %w: %s", err, said[:min(len(said), 2000)])
	}
	return fmt.Errorf("child: %w (%v)", err, c.cmd.ProcessState)
}

// close ends the child and reaps it. A second close does nothing.
func (c *child) close() {
	if c.cmd.ProcessState != nil {
		return
	}
	c.in.Close()
	late := time.AfterFunc(5*time.Second, func() { _ = c.cmd.Process.Kill() })
	_ = c.cmd.Wait()
	late.Stop()
	c.out.Close()
}

// processorTime is what this process has used so far.
func processorTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
