//go:build linux

// Quickstart builds a small overlay network in private network namespaces, measures it and takes it down. It needs no
// set-up, and not even root where the system lets users make user namespaces.
//
// Agent.go is the part to read and to copy: what one overlay host does, on the public API alone. The other files build the
// hosts (hosts.go), measure (measure.go) and print (table.go), with what the examples share.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"example.com/overlay/examples/internal/stage"

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
			// Root of a user namespace may.
			code, err := stage.Again(ctx, args, marker+"=1", unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
			if err != nil {
				return fail(err, stderr)
			}
			return code
		}
		return fail(err, stderr)
	}
	err = run(ctx, o, stdout)
	switch {
	case err == nil:
		return 0
	case stage.Interrupted(err):
		fmt.Fprintln(stderr, "\nquickstart: interrupted; nothing is left")
		return exitInterrupted
	}
	fmt.Fprintln(stdout)
	return fail(err, stderr)
}

func fail(err error, stderr io.Writer) int {
	explained := stage.Explain(err, "quickstart", os.Getenv(marker) != "")
	fmt.Fprintf(stderr, "quickstart: failed:\n  %s\n", strings.ReplaceAll(explained.Error(), "\n", "\n  "))
	return exitFailed
}

// run builds, measures, reports and takes down. The error holds all that did not work.
func run(ctx context.Context, o options, stdout io.Writer) error {
	before, out := stage.OpenFiles(), &stage.Printer{To: stdout}
	fmt.Fprintf(out, "%d overlay hosts, each in a network namespace of its own. Nothing of your system is touched.\n\n", o.hosts)
	if err := errors.Join(session(ctx, o, out), stage.Leftovers(before), ctx.Err()); err != nil {
		return errors.Join(err, out.Err)
	}
	fmt.Fprintln(out, "\nAll worked. Devices closed, namespaces gone, no descriptor left open.")
	fmt.Fprintln(out, "Next: read examples/quickstart/agent.go, all that an overlay host does, in under 100 lines.")
	return out.Err
}

// session is the life of the lab.
func session(ctx context.Context, o options, out io.Writer) (err error) {
	say := stage.Progress(out)
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

// marker in the environment says that the process is root of a user namespace made for it.
const marker = "OVERLAY_QUICKSTART_USERNS"

// allowed tries whether the process may make network namespaces.
func allowed() error {
	ns, err := stage.NewNamespace()
	if err != nil {
		return err
	}
	return ns.Close()
}
