//go:build linux

package overlay

import (
	"errors"
	"fmt"
	"os"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// watchBuffer is the receive buffer asked for: the kernel charges 832 bytes a route event (kernel.md A3).
const watchBuffer = 4 << 20

// watch listens to what the kernel announces of the device, and looks for itself where that may not be all.
type watch struct {
	listener *rtnl.Listener
	seen     kernel.Link   // as last told of; the goroutine's own
	done     chan struct{} // closed when the goroutine is gone; nil before start
}

// newWatch subscribes in the namespace of the calling thread; before the device is looked at, so that no change is missed.
func newWatch() (*watch, error) {
	listener, err := rtnl.Listen(watchBuffer, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, err
	}
	return &watch{listener: listener}, nil
}

// start runs the watch's goroutine until stop.
func (w *watch) start(d *tunDevice) {
	if w == nil {
		return
	}
	w.done, w.seen = make(chan struct{}), d.lastLink()
	go func() {
		defer close(w.done)
		w.run(d)
	}()
}

// stop ends the goroutine and waits for it.
func (w *watch) stop() {
	w.listener.Close()
	if w.done != nil {
		<-w.done
	}
}

func (w *watch) run(d *tunDevice) {
	for {
		messages, err := w.listener.Receive()
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, rtnl.ErrOverrun):
			d.counts.overruns.Add(1)
			w.listener.Drain() // else a storm means an overrun a message
			w.resync(d, err)
		case err != nil:
			d.note(fmt.Errorf("no longer told of the link's changes: %w", err))
			return
		}
		for _, m := range messages {
			w.hear(d, m)
		}
	}
}

// hear takes note of one announcement. They come in order, so that none between two of ours goes untold.
func (w *watch) hear(d *tunDevice, m rtnl.Message) {
	// Bridges and address families announce theirs by the same types.
	if m.Type != unix.RTM_NEWLINK && m.Type != unix.RTM_DELLINK || len(m.Body) == 0 || m.Body[0] != unix.AF_UNSPEC {
		return
	}
	link, err := rtnl.DecodeLink(m)
	switch {
	case err != nil || link.Index != d.index || d.lost.Load():
	case m.Type == unix.RTM_DELLINK: // deleted or moved away: what has the number next is another's
		d.deviceLost()
	default:
		w.saw(d, link)
	}
}

// resync looks for itself, because announcements were lost.
func (w *watch) resync(d *tunDevice, cause error) {
	switch link, err := d.ownLink(d.view); {
	case d.alive() != nil:
		return
	case errors.Is(err, ErrGone), errors.Is(err, unix.ENODEV):
		d.deviceLost()
	case err == nil:
		w.saw(d, link)
	}
	d.counts.resyncs.Add(1)
	d.notify(Event{Kind: EventResynced, Err: cause})
}

// saw tells of what differs from what was seen last.
func (w *watch) saw(d *tunDevice, is kernel.Link) {
	for _, kind := range linkEvents(w.seen, is) {
		d.notify(Event{Kind: kind})
	}
	w.seen = is
}

// linkEvents names what differs between two looks at a link.
func linkEvents(was, is kernel.Link) []EventKind {
	var kinds []EventKind
	if was.Name != is.Name || was.MTU != is.MTU {
		kinds = append(kinds, EventChanged)
	}
	switch {
	case is.Up && !was.Up:
		kinds = append(kinds, EventUp)
	case was.Up && !is.Up:
		kinds = append(kinds, EventDown)
	}
	return kinds
}

var errMoved = errors.New("moved to another network namespace")

// deviceLost notes that the interface is not in our namespace any more. Its number may go to another: nothing is
// configured by it from here on.
func (d *tunDevice) deviceLost() {
	if d.lost.Swap(true) {
		return
	}
	e := Event{Kind: EventGone}
	if name, err := d.reached(); errors.Is(err, errMoved) || err == nil && name != "" {
		e.Err = errMoved
	}
	d.notify(e)
}
