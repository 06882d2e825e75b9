//go:build linux

// Bgpmesh builds an overlay network in private network namespaces that routers steer which people already run: on each host
// BIRD 2, or with -frr FRR, speaks BGP over the overlay and exports what it hears into the kernel, and the agent follows the
// kernel. A subnet moves from one host to another under traffic, and two hosts share one.
//
//	go run ./examples/bgpmesh        # needs Debian's package bird2
//	go run ./examples/bgpmesh -frr   # needs Debian's package frr
//
// It needs no root where the system lets users make user namespaces. Its processes, mounts and networks are in namespaces of
// their own and go with it, however it ends.
//
// Bird.go and frr.go are the part to read and to copy: how a router is configured to speak over an overlay. Agent.go is the
// quickstart's, letter by letter; Config.SystemRoutes, in hosts.go, is all that is new. The other files are the scenes
// (scenes.go), their measure (stream.go) and what a daemon is (daemon.go).
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

	"example.com/overlay/examples/internal/stage"

	"golang.org/x/sys/unix"
)

// Exit codes, beside 0: all worked.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// inArena in the environment says that the process has namespaces of its own: as root, or as root of a user namespace.
const (
	inArena = "OVERLAY_BGPMESH_ARENA"
	asRoot  = "root"
	asUser  = "user"
)

func main() { os.Exit(start(os.Args[1:], os.Stdout, os.Stderr)) }

// options are what the command line says.
type options struct {
	hosts   int
	frr     bool
	verbose bool
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	f := flag.NewFlagSet("bgpmesh", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.hosts, "hosts", 4, "overlay hosts to build, 3…16")
	f.BoolVar(&o.frr, "frr", false, "let FRR speak BGP instead of BIRD")
	f.BoolVar(&o.verbose, "v", false, "print the configuration of a router and the State of every host")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.hosts < 3 || o.hosts > 16:
		err = fmt.Errorf("-hosts %d: want 3…16", o.hosts)
	}
	if err != nil {
		fmt.Fprintf(stderr, "bgpmesh: %v\n", err)
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
	brand, err := look(o)
	if err != nil {
		return fail(err, stderr)
	}
	if os.Getenv(inArena) == "" {
		code, err := enter(ctx, args)
		if err != nil {
			return fail(err, stderr)
		}
		return code
	}
	err = run(ctx, o, brand, stdout)
	switch {
	case err == nil:
		return 0
	case stage.Interrupted(err):
		fmt.Fprintln(stderr, "\nbgpmesh: interrupted; nothing is left")
		return exitInterrupted
	}
	fmt.Fprintln(stdout)
	return fail(err, stderr)
}

func look(o options) (*brand, error) {
	if o.frr {
		return lookForFRR()
	}
	return lookForBIRD()
}

func fail(err error, stderr io.Writer) int {
	explained := stage.Explain(err, "bgpmesh", os.Getenv(inArena) == asUser)
	fmt.Fprintf(stderr, "bgpmesh: failed:\n  %s\n", strings.ReplaceAll(explained.Error(), "\n", "\n  "))
	return exitFailed
}

// enter runs the program again where nothing that it does is seen, and where all of it ends when it does: the first process of
// a namespace of processes takes the others with it, routers too, and mounts and networks go with the last process in them.
func enter(ctx context.Context, args []string) (code int, err error) {
	const own = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET
	code, err = stage.Again(ctx, args, inArena+"="+asRoot, own)
	if errors.Is(err, os.ErrPermission) {
		code, err = stage.Again(ctx, args, inArena+"="+asUser, own|unix.CLONE_NEWUSER)
	}
	return code, err
}

// run builds, plays the scenes, reports and takes down. The error holds all that did not work.
func run(ctx context.Context, o options, b *brand, stdout io.Writer) error {
	before, out := stage.OpenFiles(), &stage.Printer{To: stdout}
	fmt.Fprintf(out, "%d overlay hosts, each in a network namespace of its own, with %s on each. Nothing of your system is touched.\n\n",
		o.hosts, b.version)
	if err := errors.Join(play(ctx, o, b, out), stage.Leftovers(before), alone(), ctx.Err()); err != nil {
		return errors.Join(err, out.Err)
	}
	fmt.Fprintln(out, "\nAll worked. Routers ended, devices closed, namespaces gone, no process and no descriptor left.")
	fmt.Fprintf(out, "Next: read examples/bgpmesh/%s, how %s is set up to steer an overlay; the agent need not know of it.\n", b.file, b.name)
	return out.Err
}

// alone says whether a process is left beside this one, the first of its namespace.
func alone() error {
	if err := unix.Kill(-1, 0); !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("a process was left running (%v)", err)
	}
	return nil
}
