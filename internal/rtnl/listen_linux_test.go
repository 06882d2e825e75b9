package rtnl

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

func listenIn(t *testing.T, ns *nstest.NS, buffer int, groups ...int) *Listener {
	t.Helper()
	var l *Listener
	ns.Do(t, func() {
		var err error
		if l, err = Listen(buffer, groups...); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { l.Close() })
	return l
}

// receive waits for the next datagram.
func receive(l *Listener) ([]Message, error) {
	if err := l.Wait(); err != nil {
		return nil, err
	}
	return l.Next()
}

// next returns the next link announcement about index; it fails after a while.
func next(t *testing.T, l *Listener, index int) Message {
	t.Helper()
	l.file.SetReadDeadline(time.Now().Add(10 * time.Second))
	defer l.file.SetReadDeadline(time.Time{})
	for {
		messages, err := receive(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			if link, err := DecodeLink(m); err == nil && link.Index == index {
				return m
			}
		}
	}
}

// Announcements come in order, those of another sender than the kernel not at all (kernel.md A25).
func TestListenerHearsTheKernelAlone(t *testing.T) {
	ns, c, index := dialIn(t)
	l := listenIn(t, ns, 1<<20, unix.RTNLGRP_LINK)
	var port uint32
	l.raw.Control(func(fd uintptr) {
		name, _ := unix.Getsockname(int(fd))
		port = name.(*unix.SockaddrNetlink).Pid
	})
	forged := answer(t, c, GetLink(index))
	forged.Body[4] = byte(index)
	sent := 0
	ns.Do(t, func() {
		s, err := openSocket()
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		for range 3 {
			if unix.Sendto(s.fd, forged.appendTo(nil), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: port}) == nil {
				sent++
			}
		}
	})
	if sent != 3 {
		t.Fatalf("%d of 3 forgeries were sent", sent)
	}
	for _, mtu := range []int{1400, 1300} {
		if err := c.Do(SetLinkMTU(index, mtu))[0].Err; err != nil {
			t.Fatal(err)
		}
	}
	for _, mtu := range []int{1400, 1300} {
		if link, err := DecodeLink(next(t, l, index)); err != nil || link.MTU != mtu {
			t.Errorf("%+v, %v, want MTU %d", link, err, mtu)
		}
	}
	if err := c.Do(DelLink(index))[0].Err; err != nil {
		t.Fatal(err)
	}
	for {
		if m := next(t, l, index); m.Type == unix.RTM_DELLINK {
			break
		}
	}
}

// Announcements that do not fit the buffer are an overrun; after Drain what comes is new (kernel.md A2).
func TestListenerOverrun(t *testing.T) {
	ns, c, index := dialIn(t)
	l := listenIn(t, ns, 1, unix.RTNLGRP_LINK)
	for i := range 100 {
		if err := c.Do(SetLinkMTU(index, 1300+i))[0].Err; err != nil {
			t.Fatal(err)
		}
	}
	for overrun := false; !overrun; {
		messages, err := receive(l)
		overrun = errors.Is(err, ErrOverrun)
		if err != nil && !overrun {
			t.Fatalf("%v, %v, want ErrOverrun", messages, err)
		}
	}
	l.Drain()
	if err := c.Do(SetLinkMTU(index, 1500))[0].Err; err != nil {
		t.Fatal(err)
	}
	if link, err := DecodeLink(next(t, l, index)); err != nil || link.MTU != 1500 {
		t.Errorf("%+v, %v, want MTU 1500", link, err)
	}
}

// What an ignored connection brings about is not heard, what others do is; without the filter the first message would be its.
func TestListenerIgnores(t *testing.T) {
	ns, c, index := dialIn(t)
	other := dialAgain(t, ns)
	l := listenIn(t, ns, 1<<20, unix.RTNLGRP_IPV4_IFADDR)
	if err := l.Ignore(c.Port()); err != nil {
		t.Fatal(err)
	}
	for i, by := range []*Conn{c, c, other, c} {
		a := kernel.Addr{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 32)}
		if err := by.Do(AddAddr(index, a))[0].Err; err != nil {
			t.Fatal(err)
		}
	}
	messages, err := receive(l)
	if err != nil || len(messages) != 1 {
		t.Fatalf("%v, %v, want one message", messages, err)
	}
	if a, _, err := DecodeAddr(messages[0]); err != nil || a.Prefix.String() != "10.0.0.2/32" {
		t.Errorf("heard of %v, %v, want 10.0.0.2/32", a.Prefix, err)
	}
	if more, err := l.Next(); more != nil || err != nil {
		t.Errorf("heard %v, %v too", more, err)
	}
}

// Close wakes a Wait, and every later one.
func TestListenerClose(t *testing.T) {
	ns, _, _ := dialIn(t)
	l := listenIn(t, ns, 1<<20, unix.RTNLGRP_LINK)
	done := make(chan error, 1)
	go func() {
		for {
			if _, err := receive(l); err != nil {
				done <- err
				return
			}
		}
	}()
	l.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	if _, err := receive(l); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a later Wait: %v", err)
	}
	l.Drain()
}

// Who may not go beyond the host's limit gets what that grants, and no error (kernel.md A3).
func TestListenerBuffer(t *testing.T) {
	nstest.Require(t, nstest.InitUserNS)
	ns, _, _ := dialIn(t)
	l := listenIn(t, ns, 8<<20, unix.RTNLGRP_LINK)
	var size int
	l.raw.Control(func(fd uintptr) { size, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) })
	if size < 16<<20 {
		t.Errorf("SO_RCVBUF %d, want twice what was asked", size)
	}
}
