package overlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// events collects a device's events until one of kind last.
func (l *lab) events(d *tunDevice, last EventKind) (kinds []string) {
	l.Helper()
	late := time.After(10 * time.Second)
	for {
		select {
		case e := <-d.Events():
			kinds = append(kinds, e.String())
			if e.Kind == last {
				return kinds
			}
		case <-late:
			l.Fatalf("no event %v after %v", last, kinds)
		}
	}
}

// What befalls the link is told, each time and in order, also where the next thing has happened by then; State says how it is
// (design.md law 1).
func TestWatchTells(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), MTU: 1400, NoHeal: true})
	l.event(d, EventChanged) // of Activate
	for _, test := range []struct {
		lines string
		last  EventKind
		want  []string
		state string
	}{
		{"link set DEV down", EventDown, []string{"down"}, "tun0 1400 down"},
		{"link set DEV up", EventUp, []string{"up"}, "tun0 1400 up"},
		{"link set DEV down\nlink set DEV up\nlink set DEV down\nlink set DEV up\nlink set DEV mtu 1300", EventChanged, []string{"down", "up", "down", "up", "changed"}, "tun0 1300 up"},
		{"link set DEV name other", EventChanged, []string{"changed"}, "other 1300 up"},
		{"link set other alias x\nlink set other txqueuelen 77\nlink set other down", EventDown, []string{"down"}, "other 1300 down"},
	} {
		l.ip(strings.ReplaceAll(test.lines, "DEV", "tun0"))
		l.want(test.lines, l.events(d, test.last), test.want...)
		s := d.State()
		if got := fmt.Sprintf("%s %d %s", s.Name, s.MTU, map[bool]string{true: "up", false: "down"}[s.Up]); got != test.state {
			t.Errorf("%s: state %s, want %s", test.lines, got, test.state)
		}
	}
	l.ip("link del other")
	l.want("deleted", l.events(d, EventGone), "gone")
	if s := d.State(); s.Index != 0 || s.Up {
		t.Errorf("state %+v of a deleted device", s)
	}
}

// A device that goes to another namespace is gone from ours, once, and its queues go on (kernel.md A24).
func TestWatchTellsOfMove(t *testing.T) {
	l := newLab(t)
	elsewhere := nstest.New(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
	l.event(d, EventUp)
	l.ip("link set tun0 netns " + elsewhere.Path())
	if e := l.event(d, EventGone); !errors.Is(e.Err, errMoved) {
		t.Errorf("event %v", e)
	}
	if err := d.Activate(); !errors.Is(err, ErrGone) {
		t.Errorf("Activate: %v", err)
	}
	l.noEvent(d, EventGone)
	elsewhere.Run(t, "ip link set tun0 up")
	if _, err := d.queues[0].Write(header4("10.42.0.9", "10.42.0.1", unix.IPPROTO_NONE, 0)); err != nil {
		t.Errorf("write: %v", err)
	}
	// When it comes back it may have another's number: gone is gone.
	elsewhere.Run(t, "ip link set tun0 netns "+l.ns.Path())
	l.await("its return", func() bool { return l.conn.Do(rtnl.GetLinkByName("tun0"))[0].Err == nil })
	if s := d.State(); s.Index != 0 {
		t.Errorf("state %+v", s)
	}
}

// smallWatch gives d a watch with the smallest receive buffer there is.
func smallWatch(l *lab, d *tunDevice) {
	l.Helper()
	d.mu.Lock() // the healer asks the watch with it
	defer d.mu.Unlock()
	d.watch.stop()
	l.in(func() (err error) {
		d.watch = new(watch)
		d.watch.listener, err = rtnl.Listen(1, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE)
		return err
	})
	d.watch.start(d)
}

// A storm of announcements overruns the watch's buffer: that is counted and told, and what was lost is looked up, be it the
// device's end (kernel.md A2).
func TestWatchOverrun(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
	smallWatch(l, d)
	storm := func(inTheMiddle rtnl.Message) {
		t.Helper()
		before := d.Stats().Overruns
		other := l.index("other0")
		l.await("an overrun", func() bool {
			var requests []rtnl.Message
			for i := range 200 {
				requests = append(requests, rtnl.SetLinkMTU(other, 1000+i))
			}
			requests[100] = inTheMiddle
			l.conn.Do(requests...)
			return d.Stats().Overruns > before
		})
	}
	storm(rtnl.SetLinkUp(d.index, false))
	if e := l.event(d, EventResynced); e.Err == nil {
		t.Errorf("event %v", e)
	}
	l.await("state down", func() bool { return !d.State().Up })
	storm(rtnl.SetLinkUp(d.index, true))
	l.await("state up", func() bool { return d.State().Up })
	if s := d.Stats(); s.Resyncs == 0 || s.Resyncs > s.Overruns {
		t.Errorf("%d overruns, %d resyncs", s.Overruns, s.Resyncs)
	}
	storm(rtnl.DelLink(d.index))
	l.event(d, EventGone)
}

// What another program says in the kernel's place is not heard (kernel.md A25).
func TestWatchIgnoresForgery(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
	l.events(d, EventChanged)
	link := l.conn.Do(rtnl.GetLink(d.index))[0].Answers[0]
	gone, down := link, link
	gone.Type = unix.RTM_DELLINK
	down.Body = slices.Clone(link.Body)
	down.Body[8] &^= unix.IFF_UP
	l.forge(gone, down)
	l.ip("link set tun0 mtu 1234")
	l.want("events", l.events(d, EventChanged), "changed")
	if s := d.State(); s.Index == 0 || !s.Up {
		t.Errorf("state %+v", s)
	}
}

// forge sends messages of our own to all netlink sockets of this process.
func (l *lab) forge(messages ...rtnl.Message) {
	l.Helper()
	l.in(func() error {
		s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		for _, port := range netlinkPorts(l.T) {
			for _, m := range messages {
				// To whom it may concern: not each of them is the watch's or the follower's, and not each is read.
				_ = unix.Sendto(s, encoded(m), unix.MSG_DONTWAIT, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: port})
			}
		}
		return nil
	})
}

// encoded is a message with its header.
func encoded(m rtnl.Message) []byte {
	n := uint32(16 + len(m.Body))
	b := []byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24), byte(m.Type), byte(m.Type >> 8), byte(m.Flags), byte(m.Flags >> 8), 0, 0, 0, 0, 0, 0, 0, 0}
	return append(b, m.Body...)
}

// netlinkPorts lists the port numbers of this process's netlink sockets. They are called by the process's number and then by
// any.
func netlinkPorts(t *testing.T) (ports []uint32) {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var socket string
		var protocol, port uint32
		if n, _ := fmt.Sscan(line, &socket, &protocol, &port); n == 3 && protocol == unix.NETLINK_ROUTE && port != 0 {
			ports = append(ports, port)
		}
	}
	return ports
}

// Close ends the watch in the middle of a storm, and no event comes after it.
func TestCloseDuringEventStorm(t *testing.T) {
	l := newLab(t)
	other := l.ns.OtherTun(t, "other0")
	defer other.Close()
	index := l.index("other0")
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				l.conn.Do(rtnl.SetLinkMTU(index, 1000+i%100))
			}
		}
	})
	for range 20 {
		d := l.active(Config{Networks: prefixes("10.42.0.1/24")})
		smallWatch(l, d)
		l.must(d.Close())
		for range d.Events() { // ends, because Close closed it
		}
	}
	close(stop)
	storm.Wait()
}
