package overlay

import (
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/rtnl"
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
	l := newLab(t)
	d := l.open(following1())
	ears := &lateEars{ears: d.follower.listener}
	d.follower.listener = ears
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
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

// Where no look is quiet what is in doubt is not looked for again and again.
func TestFollowDoubtWhenDeaf(t *testing.T) {
	l := newLab(t)
	d := l.open(following1())
	ears := &deafEars{ears: d.follower.listener}
	d.follower.listener = ears
	l.must(d.Activate())
	l.event(d, EventResynced)
	l.ns.OtherTun(t, "other0", "10.1.0.1/24")
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
