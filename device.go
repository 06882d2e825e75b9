package overlay

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
)

// core is what every kind of device has: the route tree, events, counters, a log.
type core struct {
	tree   routeTree
	events eventQueue
	log    atomic.Pointer[logrus.FieldLogger] // of the Config in force; nil: silent
	counts struct{ overruns, resyncs, restores, restoreFails, offloadFails atomic.Uint64 }
}

func (c *core) sealed() {}

// publish puts a valid Config in force as far as the kernel has no part in it: its routes into the tree, its logger.
func (c *core) publish(cfg *Config) {
	c.logTo(cfg.Logger)
	c.tree.replace(staticLayer(cfg, &c.tree.pool))
}

func (c *core) logTo(log logrus.FieldLogger) {
	if log == nil {
		c.log.Store(nil)
		return
	}
	c.log.Store(&log)
}

// NextHop implements Device.
func (c *core) NextHop(packet []byte, alive func(netip.Addr) bool) (netip.Addr, bool) {
	dst, ok := packetDst(packet)
	if !ok {
		return netip.Addr{}, false
	}
	gateways, ok := c.tree.lookup(dst)
	switch {
	case !ok:
		return netip.Addr{}, false
	case gateways.Len() == 0:
		return dst, true
	case gateways.Len() == 1: // it has all flows
		return gateways.Select(0, alive)
	}
	return gateways.Select(FlowHash(packet), alive)
}

// RoutesFor implements Device.
func (c *core) RoutesFor(dst netip.Addr) (Gateways, bool) {
	return c.tree.lookup(dst.Unmap())
}

// Events implements Device.
func (c *core) Events() <-chan Event { return c.events.channel() }

// notify sends an event and tells the log of it, in one line.
func (c *core) notify(e Event) {
	if log := c.log.Load(); log != nil {
		logEvent(*log, e)
	}
	c.events.send(e)
}

func logEvent(log logrus.FieldLogger, e Event) {
	fields := logrus.Fields{"event": e.Kind.String()}
	if e.N != 0 {
		fields["n"] = e.N
	}
	if e.Err != nil {
		fields["cause"] = oneLine(e.Err.Error())
	}
	entry := log.WithFields(fields)
	switch e.Kind {
	case EventGone, EventShadowed, EventDegraded:
		entry.Warn("overlay")
	default:
		entry.Info("overlay")
	}
}

// eventBacklog is how many events wait for a slow reader.
const eventBacklog = 64

// eventQueue is a channel that never blocks its senders: full, it drops the oldest. The zero value works.
type eventQueue struct {
	mu     sync.Mutex
	ch     chan Event
	closed bool
	missed atomic.Uint64
}

func (q *eventQueue) channel() chan Event {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.open()
}

// open makes the channel on first use; the caller holds mu.
func (q *eventQueue) open() chan Event {
	if q.ch == nil {
		q.ch = make(chan Event, eventBacklog)
	}
	return q.ch
}

func (q *eventQueue) send(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	ch := q.open()
	for {
		select {
		case ch <- e:
			return
		default:
		}
		select {
		case <-ch:
			q.missed.Add(1)
		default: // a reader was quicker
		}
	}
}

func (q *eventQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.closed = true
		close(q.open())
	}
}

// traffic counts the packets of one queue; a queue of its own so that the goroutines of different queues, and those that
// read and that write one, share no cache line.
type traffic struct {
	readPackets, readBytes, readSuper, readInvalid, readDropped                  atomic.Uint64
	_                                                                            [64]byte
	writePackets, writeBytes, writeSuper, writeRefused, writeFiltered, writeDown atomic.Uint64
	_                                                                            [64]byte
}

// tally is a count of packets and superpackets on the way into a traffic: one for a batch.
type tally struct{ packets, bytes, super uint64 }

// add counts p, which is n packets after splitting.
func (s *tally) add(p Packet, n int) {
	s.packets += uint64(n)
	s.bytes += uint64(len(p.Data))
	if p.SegmentSize != 0 {
		s.super++
	}
}

// addTo leaves alone what does not change: an atomic addition is what counting costs.
func (s tally) addTo(packets, size, super *atomic.Uint64) {
	if s.packets != 0 {
		packets.Add(s.packets)
		size.Add(s.bytes)
	}
	if s.super != 0 {
		super.Add(s.super)
	}
}

// read counts packets and superpackets from the kernel.
func (t *traffic) read(packets ...Packet) {
	var s tally
	for _, p := range packets {
		s.add(p, p.Segments())
	}
	t.readAll(s)
}

func (t *traffic) readAll(s tally) { s.addTo(&t.readPackets, &t.readBytes, &t.readSuper) }

// wrote counts one that the kernel took.
func (t *traffic) wrote(p Packet) {
	var s tally
	s.add(p, p.Segments())
	t.wroteAll(s)
}

func (t *traffic) wroteAll(s tally) { s.addTo(&t.writePackets, &t.writeBytes, &t.writeSuper) }

// failed counts a packet that was not taken.
func (t *traffic) failed(err error) {
	switch {
	case errors.Is(err, ErrDown):
		t.writeDown.Add(1)
	default:
		t.writeRefused.Add(1)
	}
}

func (t *traffic) addTo(s *Stats) {
	s.ReadPackets += t.readPackets.Load()
	s.ReadBytes += t.readBytes.Load()
	s.ReadSuper += t.readSuper.Load()
	s.ReadInvalid += t.readInvalid.Load()
	s.ReadDropped += t.readDropped.Load()
	s.WritePackets += t.writePackets.Load()
	s.WriteBytes += t.writeBytes.Load()
	s.WriteSuper += t.writeSuper.Load()
	s.WriteRefused += t.writeRefused.Load()
	s.WriteFiltered += t.writeFiltered.Load()
	s.WriteDown += t.writeDown.Load()
}

// stats adds the device's own counters to its queues'.
func (c *core) stats(queues ...*traffic) Stats {
	s := Stats{
		Overruns: c.counts.overruns.Load(), Resyncs: c.counts.resyncs.Load(),
		Restores: c.counts.restores.Load(), RestoreFails: c.counts.restoreFails.Load(),
		OffloadFails: c.counts.offloadFails.Load(), EventsMissed: c.events.missed.Load(),
	}
	for _, t := range queues {
		t.addTo(&s)
	}
	return s
}
