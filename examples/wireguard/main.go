//go:build linux

// Wireguard is a WireGuard daemon: golang.zx2c4.com/wireguard does the protocol, an overlay.Device is its tunnel. It reads a
// file as wg-quick(8) does, and wg(8) works with it. As root:
//
//	go run -C examples/wireguard . /etc/wireguard/wg0.conf    # until SIGTERM or SIGINT; SIGHUP reads the file anew
//	go run -C examples/wireguard . -demo                      # two hosts in private namespaces talk; no root needed
//
// Tunnel.go is the part to read and to copy: the adapter between the two; all but the tests can be copied. Daemon.go is the life
// of an interface; file.go and settings.go are the file, and what it asks of each side. DNS and the commands of wg-quick (PostUp
// and the like) are left to others, and told so. Routes go to Table, a number or main or off: main if it is not given, but a default
// route only goes where Table says. Without MTU the interface's is 1420, whatever the underlay's is, and each Endpoint's host must be
// found.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Exit codes, beside 0.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(program(os.Args[1:], os.Stdout, os.Stderr)) }

// program is all but the process; it returns the exit code.
func program(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("wireguard", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: wireguard [-v] FILE\n       wireguard [-v] -demo")
		flags.PrintDefaults()
	}
	demo := flags.Bool("demo", false, "let two hosts in namespaces of their own talk, and end")
	verbose := flags.Bool("v", false, "log what WireGuard does, too")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return exitUsage
	case *demo != (flags.NArg() == 0) || flags.NArg() > 1:
		flags.Usage()
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	log := logrus.New()
	log.SetOutput(stderr)
	if *verbose {
		log.SetLevel(logrus.DebugLevel)
	}
	var err error
	if *demo {
		err = runDemo(ctx, args, stdout, stderr)
	} else {
		err = run(ctx, flags.Arg(0), log)
	}
	if err != nil {
		fmt.Fprintln(stderr, err) // it may have lines, one for each thing that is wrong with the file
		return exitFailed
	}
	return 0
}

// run is the daemon's life. It ends with ctx, or when somebody deletes the interface or the socket.
func run(ctx context.Context, path string, log *logrus.Logger) error {
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGHUP)
	defer signal.Stop(again)
	d, err := start(ctx, path, log)
	if err != nil {
		return err
	}
	for {
		select {
		case <-again:
			if err := d.reload(ctx); err != nil {
				d.log.WithError(err).Error("not reloaded")
			}
			continue
		case <-ctx.Done():
			d.log.Info("down")
		case err = <-d.gone:
			err = fmt.Errorf("the socket of wg(8) is gone: %w", err)
		case <-d.wg.Wait():
			err = errors.New("the interface is gone")
		}
		return errors.Join(err, d.Close())
	}
}
