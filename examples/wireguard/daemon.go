//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"example.com/overlay"

	"github.com/sirupsen/logrus"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
)

// daemon is a running WireGuard interface.
type daemon struct {
	path     string
	log      *logrus.Entry
	dev      overlay.Device
	wg       *device.Device // owns the tunnel, and with it dev
	settings *settings      // in force

	uapi    net.Listener // what wg(8) talks to
	gone    chan error   // why uapi ended, once
	ready   chan struct{}
	cancel  context.CancelFunc
	serving sync.WaitGroup // the goroutines that ctx ends
}

// start puts a file in force. Until Close the daemon owns the interface and its socket; on error nothing is left of either. With ctx
// the clients of the socket end: a reload may be waiting for one of them.
func start(ctx context.Context, path string, log *logrus.Logger) (_ *daemon, err error) {
	s, err := load(ctx, path, nil)
	if err != nil {
		return nil, err
	}
	entry := log.WithField("interface", s.cfg.Name)
	s.cfg.Logger = entry
	dev, err := overlay.New(s.cfg)
	if err != nil {
		return nil, err
	}
	d := &daemon{path: path, log: entry, dev: dev, gone: make(chan error, 1), ready: make(chan struct{})}
	d.wg = device.NewDevice(newTunnel(dev), conn.NewDefaultBind(), &device.Logger{Verbosef: entry.Debugf, Errorf: entry.Errorf})
	ctx, d.cancel = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if d.uapi, err = listen(dev.State().Name); err != nil {
		return nil, fmt.Errorf("the socket of wg(8): %w", err)
	}
	d.serving.Go(func() { d.gone <- d.serve(ctx) })
	if err := d.set(s); err != nil {
		return nil, err
	}
	// Before the link: with that it goes up by itself, and if the port is taken it tells only its log and takes any port next time.
	if err := d.wg.Up(); err != nil {
		return nil, err
	}
	if err := dev.Activate(); err != nil { // addresses, MTU, link up, routes
		return nil, err
	}
	d.settings = s
	d.tell("up")
	close(d.ready)
	return d, nil
}

// listen opens the socket that wg(8) expects.
func listen(name string) (net.Listener, error) {
	f, err := ipc.UAPIOpen(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() // the listener has a duplicate
	return ipc.UAPIListen(name, f)
}

// serve answers wg(8), once all is in force, until the socket is closed or removed by somebody, which is how wg-quick(8) ends a
// daemon. The listener's own goroutines end only if somebody accepts.
func (d *daemon) serve(ctx context.Context) error {
	for {
		client, err := d.uapi.Accept()
		if err != nil {
			return err
		}
		d.serving.Go(func() {
			defer context.AfterFunc(ctx, func() { client.Close() })() // a client may stay for ever
			select {
			case <-d.ready:
				d.wg.IpcHandle(client)
			case <-ctx.Done():
			}
		})
	}
}

// reload puts the file in force as it is now, but for a port that the file does not have any more: that stays. On error what was in
// force stays so, unless the error says that there was no way back.
func (d *daemon) reload(ctx context.Context) error {
	next, err := load(ctx, d.path, d.settings)
	if err != nil {
		return err
	}
	next.cfg.Logger = d.log
	if err := d.dev.Reload(next.cfg); err != nil {
		if errors.Is(err, overlay.ErrPartial) {
			return back(err, d.dev.Reload(d.settings.cfg))
		}
		return err
	}
	if err := d.set(next); err != nil {
		return back(err, errors.Join(d.dev.Reload(d.settings.cfg), d.set(d.settings)))
	}
	d.settings = next
	d.tell("reloaded")
	return nil
}

// back adds to an error what became of the way back.
func back(err, failed error) error {
	if failed != nil {
		return fmt.Errorf("%w; and there is no way back: %w", err, failed)
	}
	return fmt.Errorf("%w; what was in force is so again", err)
}

// set puts WireGuard's half in force.
func (d *daemon) set(s *settings) error {
	have, err := d.wg.IpcGet()
	if err != nil {
		return err
	}
	return d.wg.IpcSet(s.commands(d.settings, have))
}

// tell logs that there is something new in force, and what of it is not.
func (d *daemon) tell(what string) {
	s := d.settings
	for _, k := range s.foreign {
		d.log.Warnf("%s:%d: %s is not supported: nothing is done about it", s.name, k.line, k.value)
	}
	d.log.WithFields(logrus.Fields{"peers": len(s.peers), "routes": len(s.cfg.Routes), "mtu": s.cfg.MTU}).Info(what)
}

// Close takes the interface and its socket away, and waits for those that serve clients. The tunnel's and the listener's goroutines end
// soon after.
func (d *daemon) Close() error {
	d.cancel() // the clients first: one of them may be in the middle of a "set", which the others wait for
	var err error
	if d.uapi != nil {
		err = d.uapi.Close()
	}
	d.serving.Wait()
	d.wg.Close()
	return err
}
