package overlay

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/sirupsen/logrus"
)

// A full channel drops the oldest events and counts them; the channel is one for life, made before or after the first event.
func TestEventsDropTheOldest(t *testing.T) {
	for _, asked := range []bool{false, true} {
		var c core
		var ch <-chan Event
		if asked {
			ch = c.Events()
		}
		const more = 10
		for i := range eventBacklog + more {
			c.notify(Event{Kind: EventChanged, N: i})
		}
		if asked && ch != c.Events() {
			t.Error("Events returned another channel")
		}
		if got := c.stats().EventsMissed; got != more {
			t.Errorf("%d events missed, want %d", got, more)
		}
		c.events.close()
		c.notify(Event{Kind: EventGone}) // nobody is there to miss it
		next := more
		for e := range c.Events() {
			if e.N != next || e.Kind != EventChanged {
				t.Errorf("got event %v %d, want %d", e.Kind, e.N, next)
			}
			next++
		}
		if next != eventBacklog+more {
			t.Errorf("%d events, want %d", next-more, eventBacklog)
		}
		if got := c.stats().EventsMissed; got != more {
			t.Errorf("%d events missed after the end, want %d", got, more)
		}
	}
}

// kernel.md U37: nothing is sent on a closed channel, however many send while it closes, and no event is lost uncounted.
func TestEventsClosedInAStorm(t *testing.T) {
	for range 50 {
		var c core
		const senders, each = 4, 200
		var all sync.WaitGroup
		sent, got := senders*each, 0
		for range senders {
			all.Go(func() {
				for i := range each {
					c.notify(Event{Kind: EventChanged, N: i})
				}
			})
		}
		all.Go(func() {
			for range c.Events() {
				got++
			}
		})
		for range 2 {
			all.Go(c.events.close)
		}
		all.Wait()
		if missed := int(c.stats().EventsMissed); got+missed > sent {
			t.Errorf("%d events arrived and %d were missed of %d", got, missed, sent)
		}
	}
}

// The log gets one line an event: what, how many, why; a warning where somebody should look.
func TestEventsLogged(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	log.SetFormatter(&logrus.JSONFormatter{DisableTimestamp: true})
	var c core
	c.logTo(log)
	for _, e := range []Event{
		{Kind: EventUp},
		{Kind: EventRestored, N: 3},
		{Kind: EventShadowed, N: 2, Err: errors.Join(io.EOF, errors.New("red \x1b[31m"))},
		{Kind: EventGone},
	} {
		out.Reset()
		c.notify(e)
		var line map[string]any
		if strings.Count(out.String(), "\n") != 1 || json.Unmarshal(out.Bytes(), &line) != nil {
			t.Fatalf("%v: got %q", e, out.String())
		}
		want := map[string]any{"event": e.Kind.String(), "level": "info", "msg": "overlay"}
		switch e.Kind {
		case EventRestored:
			want["n"] = 3.0
		case EventShadowed:
			want["n"], want["cause"], want["level"] = 2.0, `EOF; red \x1b[31m`, "warning"
		case EventGone:
			want["level"] = "warning"
		}
		for k, v := range want {
			if line[k] != v {
				t.Errorf("%v: got %s %v, want %v", e, k, line[k], v)
			}
		}
		if len(line) != len(want) {
			t.Errorf("%v: got %v", e, line)
		}
	}
}

// Packets count after splitting, superpackets beside that.
func TestTrafficCounts(t *testing.T) {
	var q traffic
	packets := []Packet{{Data: make([]byte, 100)}, {superTCP4(25), 10}, {superUDP6(25), 25}}
	q.read(packets...)
	q.read()
	for _, p := range packets {
		q.wrote(p)
	}
	q.failed(ErrDown)
	q.failed(&OpError{Op: "write to", Err: ErrDown})
	q.failed(io.ErrShortWrite)
	var s Stats
	q.addTo(&s)
	size := uint64(100 + 65 + 81)
	want := Stats{
		ReadPackets: 5, ReadBytes: size, ReadSuper: 2, WritePackets: 5, WriteBytes: size, WriteSuper: 2, WriteDown: 2, WriteRefused: 1,
	}
	if s != want {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
	if got := (&core{}).stats(&q, &q); got.ReadPackets != 10 {
		t.Errorf("two queues: got %+v", got)
	}
}

// Who reads, who writes and who does so on another queue share no cache line.
func TestTrafficSharesNoCacheLine(t *testing.T) {
	const line = 64
	var q traffic
	if gap := unsafe.Offsetof(q.writePackets) - unsafe.Offsetof(q.readDropped); gap < line {
		t.Errorf("the counters of reads and writes are %d bytes apart", gap)
	}
	if rest := unsafe.Sizeof(q) - unsafe.Offsetof(q.writeDown); rest < line {
		t.Errorf("the next object is %d bytes from the counters", rest)
	}
}

// NextHop and RoutesFor of what every device has, before and after there are routes.
func TestNextHop(t *testing.T) {
	addr := netip.MustParseAddr
	var c core
	packet := func(dst string) []byte {
		a := addr(dst)
		if a.Is4() {
			return flow4(addr("10.0.0.1"), a, 17, flowPorts(1, 2)...)
		}
		return flow6(addr("fd00::1"), a, 17, flowPorts(1, 2)...)
	}
	if _, ok := c.NextHop(packet("10.0.0.9"), nil); ok {
		t.Error("NextHop without routes")
	}
	if _, ok := c.RoutesFor(addr("10.0.0.9")); ok {
		t.Error("RoutesFor without routes")
	}
	c.publish(&Config{
		Networks: prefixes("10.0.0.1/24", "fd00::1/64"),
		Routes:   []Route{routeTo("192.168.0.0/16", "10.0.0.2", "10.0.0.3"), routeTo("2001:db8::/32", "fd00::2")},
	})
	none := func(netip.Addr) bool { return false }
	only := func(a netip.Addr) bool { return a == addr("10.0.0.3") }
	for _, c2 := range []struct {
		name   string
		packet []byte
		alive  func(netip.Addr) bool
		want   string
	}{
		{"on-link", packet("10.0.0.9"), nil, "10.0.0.9"},
		{"on-link, whoever is alive", packet("fd00::9"), none, "fd00::9"},
		{"by a gateway", packet("2001:db8::9"), nil, "fd00::2"},
		{"by the one alive", packet("192.168.5.5"), only, "10.0.0.3"},
		{"none alive", packet("192.168.5.5"), none, ""},
		{"no route", packet("203.0.113.1"), nil, ""},
		{"no IP", []byte{0x20, 1, 2}, nil, ""},
		{"too short", packet("10.0.0.9")[:19], nil, ""},
		{"empty", nil, nil, ""},
	} {
		got, ok := c.NextHop(c2.packet, c2.alive)
		if ok != (c2.want != "") || ok && got != addr(c2.want) {
			t.Errorf("%s: got %v, %v, want %q", c2.name, got, ok, c2.want)
		}
	}
	if g, ok := c.RoutesFor(addr("::ffff:192.168.5.5")); !ok || g.Len() != 2 {
		t.Errorf("RoutesFor an IPv4-mapped address: %v, %v", g, ok)
	}
	p := packet("192.168.5.5")
	if n := testing.AllocsPerRun(100, func() { c.NextHop(p, only); c.RoutesFor(addr("fd00::2")) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
