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

// watch listens to what the kernel announces of the device. What it hears are hints: it then looks for itself.
type watch struct {
	listener *rtnl.Listener
	seen     kernel.Link   // at the last look; the goroutine's own
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
			w.linkChanged(d)
			d.counts.resyncs.Add(1)
			d.notify(Event{Kind: EventResynced, Err: err})
		case err != nil:
			d.note(fmt.Errorf("no longer told of the link's changes: %w", err))
			return
		case concerns(messages, d.index):
			w.linkChanged(d)
		}
	}
}

// concerns says whether one of the messages is about the interface itself (bridge and address families announce theirs by
// the same types).
func concerns(messages []rtnl.Message, index int) bool {
	for _, m := range messages {
		if m.Type != unix.RTM_NEWLINK && m.Type != unix.RTM_DELLINK || len(m.Body) == 0 || m.Body[0] != unix.AF_UNSPEC {
			continue
		}
		if link, err := rtnl.DecodeLink(m); err == nil && link.Index == index {
			return true
		}
	}
	return false
}

// linkChanged looks at the link and tells of what differs from the last look.
func (w *watch) linkChanged(d *tunDevice) {
	is, here := d.look()
	if !here {
		if !d.closing.Load() {
			d.deviceLost()
		}
		return
	}
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
	if len(d.queues) > 0 && !d.queues[0].deleted() {
		e.Err = errMoved
	}
	d.notify(e)
}
