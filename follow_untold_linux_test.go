package overlay

import (
	"bytes"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// lateEars do something once while a dump reads IPv6: when a look has come so far that it has read all of IPv4.
type lateEars struct {
	ears
	armed atomic.Bool
	empty int // times that nothing was left to hear, in this look
	act   func()
}

func (e *lateEars) HearAll() error {
	e.empty = 0
	return e.ears.HearAll()
}

func (e *lateEars) Next() ([]rtnl.Message, error) {
	if e.empty == 2 && e.armed.CompareAndSwap(true, false) {
		e.act()
	}
	messages, err := e.ears.Next()
	if len(messages) == 0 {
		e.empty++
	}
	return messages, err
}

// followedBy is a device with a follower that was tampered with, beside another device, other0.
func followedBy(t *testing.T, tamper func(*follower)) (*lab, *tunDevice) {
	t.Helper()
	l := newLab(t)
	d := l.open(following1())
	tamper(d.follower)
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
	return l, d
}

// calm waits until routes have not been read anew for some time.
func (l *lab) calm(d *tunDevice) (resyncs uint64) {
	l.Helper()
	since := time.Now()
	l.await("no more resyncs", func() bool {
		if now := d.counts.resyncs.Load(); now != resyncs {
			resyncs, since = now, time.Now()
		}
		return time.Since(since) > 200*time.Millisecond
	})
	return resyncs
}

// What is announced during a look for what is in doubt is looked for in turn, whichever family was being read.
func TestFollowDoubtDuringLook(t *testing.T) {
	ears := new(lateEars)
	l, d := followedBy(t, func(f *follower) { ears.ears, f.listener = f.listener, ears })
	l.ip("nexthop add id 9 via 10.1.0.9 dev other0")
	for _, p := range []string{"10.9.0.0/16", "10.10.0.0/16"} {
		l.ip("route add " + p + " via 10.42.0.9\nroute append " + p + " via 10.1.0.7 dev other0")
	}
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	l.wantRoute(d, "10.10.0.1", "10.42.0.9")
	before := l.calm(d)
	ears.act = func() { l.ip("route replace 10.10.0.0/16 nhid 9") }
	ears.armed.Store(true)
	l.ip("route replace 10.9.0.0/16 nhid 9") // what this has replaced only a look tells
	l.wantRoute(d, "10.9.0.1", "none")
	l.wantRoute(d, "10.10.0.1", "none")
	if ears.armed.Load() || l.calm(d) < before+2 {
		t.Error("there was no look during which something was announced, or none after it")
	}
}

// lateConn does something once before a question is put.
type lateConn struct {
	routesConn
	about netip.Addr
	armed atomic.Bool
	act   func()
}

func (c *lateConn) Do(requests ...rtnl.Message) []rtnl.Result {
	ask := rtnl.MatchRoute(c.about)
	if len(requests) == 1 && bytes.Equal(requests[0].Body, ask.Body) && c.armed.CompareAndSwap(true, false) {
		c.act()
	}
	return c.routesConn.Do(requests...)
}

// What the kernel answers may follow from what it has announced and nobody has heard yet: that is heard first.
func TestFollowAnswerBeforeNews(t *testing.T) {
	conn := &lateConn{about: netip.MustParseAddr("fd09::1")}
	l, d := followedBy(t, func(f *follower) { conn.routesConn, f.conn = f.conn, conn })
	for _, route := range []string{"via fd42::6", "dev tun0 pref high", "via fd42::7", "via fd42::8"} {
		l.ip("-6 route append fd09::/64 metric 50 " + route)
	}
	l.wantRoute(d, "fd09::1", "on-link")
	l.calm(d)
	conn.act = func() { l.ip("-6 route replace prohibit fd09::/64 metric 50") } // in the place of the preferred one
	conn.armed.Store(true)
	l.ip("-6 route del fd09::/64 metric 50 via fd42::8") // by that the places are in doubt
	l.await("a question", func() bool { return !conn.armed.Load() })
	l.calm(d)
	l.wantRoute(d, "fd09::1", "fd42::6 fd42::7")
}

// dozingEars do not wait any more, though they hear.
type dozingEars struct {
	ears
	doze atomic.Bool
}

func (e *dozingEars) WaitUntil(deadline time.Time) error {
	if e.doze.Load() {
		return unix.ENOTSOCK
	}
	return e.ears.WaitUntil(deadline)
}

// Whoever turns out to be deaf while it waits looks at once, not when the wait was to end.
func TestFollowDeafWhileWaiting(t *testing.T) {
	ears := new(dozingEars)
	l, d := followedBy(t, func(f *follower) { ears.ears, f.listener = f.listener, ears })
	before := l.calm(d)
	ears.doze.Store(true)
	l.ip("addr add 10.1.1.1/24 dev other0") // which changes nothing, but ends the wait
	l.await("a look", func() bool { return d.counts.resyncs.Load() > before })
}

// Where no look is quiet what is in doubt is not looked for again and again.
func TestFollowDoubtWhenDeaf(t *testing.T) {
	ears := new(deafEars)
	l, d := followedBy(t, func(f *follower) { ears.ears, f.listener = f.listener, ears })
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	l.calm(d)
	ears.deaf.Store(true)
	l.ip("route replace 10.9.0.0/16 via 10.1.0.9 dev other0\nroute add 10.10.0.0/16 via 10.42.0.10")
	l.wantRoute(d, "10.10.0.1", "10.42.0.10") // by a look that shows the other as well
	before := d.counts.resyncs.Load()
	l.calm(d)
	if n := d.counts.resyncs.Load() - before; n > 2 {
		t.Errorf("%d looks", n)
	}
}
