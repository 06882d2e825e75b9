//go:build linux

package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// watchBuffer is the receive buffer asked for: the kernel charges 832 bytes a route event (kernel.md A3).
const watchBuffer = 4 << 20

// watch listens to what the kernel announces of the device, tells of the link's changes, and raises a doubt where what was
// last seen may not hold any more. What the device's own requests bring about it is not told of.
type watch struct {
	listener ears
	done     chan struct{} // closed when the goroutine is gone; nil before start

	mu       sync.Mutex  // one hears at a time: the goroutine, or who needs to know now
	seen     kernel.Link // as last told of
	deaf     bool        // the kernel tells us nothing any more
	lostIPv6 bool        // an IPv6 address or route of the device went since IPv6 was last announced to be in use
	suspects suspects
}

// newWatch subscribes in the namespace of the calling thread; before the device is looked at, so that no change is missed.
func newWatch(ownPort uint32) (*watch, error) {
	listener, err := rtnl.Listen(watchBuffer, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFINFO,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, err
	}
	_ = listener.Join(watchBuffer, unix.RTNLGRP_NEXTHOP) // kernels before 5.3 have none
	if err := listener.Ignore(ownPort); err != nil {
		listener.Close()
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
	// Others' routes through others' interfaces cost too much to hear of. One that stands before ours without having taken its
	// place is found by the audit. Without the filter there is more to hear, and no harm.
	_ = w.listener.OnlyConcerning(d.index, d.ctl.Port())
	go func() {
		defer close(w.done)
		for {
			if err := w.listener.Wait(); err != nil {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.deafen(d, err)
				return
			}
			begun := time.Now()
			if w.hearSome(d, gulp); w.isDeaf() {
				return
			}
			time.Sleep(restAfter(time.Since(begun)))
		}
	}()
}

// restAfter is how long not to listen after it took so long to hear what was announced: a storm costs two thirds of a processor at
// most, and much less where it is the wake-up for each announcement that costs (kernel.md A27).
func restAfter(took time.Duration) time.Duration {
	return min(max(took/2, time.Millisecond), 10*time.Millisecond)
}

// stop ends the goroutine and waits for it.
func (w *watch) stop() {
	w.listener.Close()
	if w.done != nil {
		<-w.done
	}
}

// hearAll takes note of all that was announced until now: the kernel's announcement precedes the end of the request that it is
// about. false: there is more, in a storm, or nothing is announced any more.
func (w *watch) hearAll(d *tunDevice) bool {
	return w.hearSome(d, 1<<16) // a storm may be quicker than we are
}

func (w *watch) hearSome(d *tunDevice, most int) bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := 0; n < most && !w.deaf; n++ {
		messages, err := w.listener.Next()
		for _, m := range messages {
			w.hear(d, m)
		}
		switch {
		case errors.Is(err, rtnl.ErrOverrun):
			d.counts.overruns.Add(1)
			w.listener.Drain() // else a storm means an overrun a message
			w.resync(d, err)
		case err != nil:
			w.deafen(d, err)
		case len(messages) == 0:
			return true
		}
	}
	return false
}

// deafen notes that nothing is announced any more, which is no news to who has closed the socket; with the watch's lock. From here
// on the healer looks for itself, and often.
func (w *watch) deafen(d *tunDevice, err error) {
	if w.deaf = true; errors.Is(err, os.ErrClosed) {
		return
	}
	d.healer.deaf.Store(true)
	d.doubt(false)
	d.note(fmt.Errorf("no longer told of changes: %w", err))
}

func (w *watch) isDeaf() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.deaf
}

// hear takes note of one announcement. They come in order, so that none between two of ours goes untold.
func (w *watch) hear(d *tunDevice, m rtnl.Message) {
	switch m.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		w.hearLink(d, m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		w.hearAddr(d, m)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		w.hearRoute(d, m)
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		w.doubtShadows(d) // routes change with it, untold (kernel.md A13, A14)
	}
}

// hearLink also hears what bridges and address families announce by the same types: of theirs, that IPv6 is in use again after
// net.ipv6.conf.DEVICE.disable_ipv6 was set for a while. What went with it is missing, and nothing else tells.
func (w *watch) hearLink(d *tunDevice, m rtnl.Message) {
	link, err := rtnl.DecodeLink(m)
	switch {
	case err != nil || d.lost.Load():
	case link.Index != d.index:
		if !link.Up || m.Type == unix.RTM_DELLINK {
			w.doubtShadows(d)
		}
	case m.Body[0] == unix.AF_INET6:
		if w.lostIPv6 {
			w.lostIPv6 = false
			d.doubt(true)
		}
	case m.Body[0] != unix.AF_UNSPEC:
	case m.Type == unix.RTM_DELLINK: // deleted or moved away: what has the number next is another's
		d.deviceLost()
	default:
		w.saw(d, link)
	}
}

func (w *watch) hearAddr(d *tunDevice, m rtnl.Message) {
	a, index, err := rtnl.DecodeAddr(m)
	removed := m.Type == unix.RTM_DELADDR
	switch {
	case err != nil:
		d.doubt(false)
	case index != d.index:
		if removed {
			w.doubtShadows(d)
		}
	default:
		w.lostIPv6 = w.lostIPv6 || removed && a.Prefix.Addr().Is6()
		if d.beliefs().doubtAddr(a, !removed) {
			d.doubt(false)
		}
	}
}

// doubtShadows has the next look ask again who answers in our place: an interface's routes may have gone with it or its
// addresses, untold (kernel.md A7, A8).
func (w *watch) doubtShadows(d *tunDevice) {
	d.viewMu.Lock()
	shadowed := d.shadowed
	d.viewMu.Unlock()
	for _, s := range shadowed {
		w.suspects.add(s.prefix)
	}
	if len(shadowed) > 0 {
		d.doubt(false)
	}
}

func (w *watch) hearRoute(d *tunDevice, m rtnl.Message) {
	r, _, err := rtnl.DecodeRoute(m)
	if err != nil {
		d.doubt(false)
		return
	}
	if r.Link == d.index && r.Prefix.Addr().Is6() && m.Type == unix.RTM_DELROUTE {
		w.lostIPv6 = true
	}
	if d.beliefs().doubtRoute(r) {
		w.suspects.add(r.Prefix)
		d.doubt(false)
	}
}

// resync looks at the link for itself, because announcements were lost; at the rest the healer does.
func (w *watch) resync(d *tunDevice, cause error) {
	switch link, err := d.ownLink(d.view); {
	case d.alive() != nil:
		return
	case errors.Is(err, ErrGone), errors.Is(err, unix.ENODEV):
		d.deviceLost()
	case err == nil:
		w.saw(d, link)
	}
	w.suspects.addAll()
	d.doubt(false)
	d.counts.resyncs.Add(1)
	d.notify(Event{Kind: EventResynced, Err: cause})
}

// saw tells of what differs from what was seen last.
func (w *watch) saw(d *tunDevice, is kernel.Link) {
	was := w.seen
	w.seen = is
	for _, kind := range linkEvents(was, is) {
		d.notify(Event{Kind: kind})
	}
	if !sameSettings(&was, &is) {
		d.doubt(revives(&was, &is))
	}
}

// suspectAll has the next look ask about all.
func (w *watch) suspectAll() {
	if w != nil {
		w.mu.Lock()
		w.suspects.addAll()
		w.mu.Unlock()
	}
}

// takeSuspects returns the prefixes of ours for which another interface may answer now; all: any of them.
func (w *watch) takeSuspects() (prefixes map[netip.Prefix]bool, all bool) {
	if w == nil {
		return nil, true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.suspects
	w.suspects = suspects{}
	return s.prefixes, s.all
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
	d.follower.abandon()
	d.notify(e)
}
