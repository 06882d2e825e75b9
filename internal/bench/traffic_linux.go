package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// traffic is what runs between the ends of a path until it is stopped.
type traffic struct {
	delivered atomic.Uint64 // bytes of TCP, datagrams of UDP
	stopped   atomic.Bool
	running   sync.WaitGroup
	closers   []func() error
}

func (t *traffic) stop() {
	t.stopped.Store(true)
	for _, c := range t.closers {
		_ = c()
	}
	t.running.Wait()
}

// startTCP opens connections from the first end to the second and sends as fast as they take it.
func startTCP(p *path, version, streams int) (*traffic, error) {
	const piece = 128 << 10
	t := new(traffic)
	network := fmt.Sprintf("tcp%d", version)
	var listener net.Listener
	err := p.spaces[1].do(func() (err error) {
		listener, err = net.Listen(network, p.addr(version, 0).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	for range streams {
		var from net.Conn
		err := p.spaces[0].do(func() (err error) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			from, err = new(net.Dialer).DialContext(ctx, network, listener.Addr().String())
			return err
		})
		if err != nil {
			t.stop()
			return nil, err
		}
		t.closers = append(t.closers, from.Close)
		to, err := listener.Accept()
		if err != nil {
			t.stop()
			return nil, err
		}
		t.closers = append(t.closers, to.Close)
		t.running.Go(func() {
			for b := make([]byte, piece); ; {
				if _, err := from.Write(b); err != nil {
					return
				}
			}
		})
		t.running.Go(func() {
			for b := make([]byte, piece); ; {
				n, err := to.Read(b)
				if err != nil {
					return
				}
				t.delivered.Add(uint64(n))
			}
		})
	}
	return t, nil
}

// message is struct mmsghdr.
type message struct {
	header unix.Msghdr
	length uint32
}

// messages are n buffers for sendmmsg or recvmmsg, all of them the same memory.
func messages(n, size int) []message {
	b := make([]byte, max(size, 1))
	iov := &unix.Iovec{Base: &b[0]}
	iov.SetLen(size)
	list := make([]message, n)
	for i := range list {
		list[i].header.Iov, list[i].header.Iovlen = iov, 1
	}
	return list
}

// do sends or receives many datagrams in one system call and returns how many.
func do(call uintptr, fd int, list []message, flags uintptr) (int, error) {
	n, _, errno := unix.Syscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&list[0])), uintptr(len(list)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// startUDP sends datagrams of size bytes of payload, in flows of one socket each, as fast as the kernel takes them.
func startUDP(p *path, version, size, flows int) (*traffic, error) {
	const batch = 64
	t := new(traffic)
	for range flows {
		from, to, err := udpPair(p, version)
		if err != nil {
			t.stop()
			return nil, err
		}
		t.running.Go(func() {
			list := messages(batch, size)
			for !t.stopped.Load() {
				_, _ = do(unix.SYS_SENDMMSG, from, list, 0) // what the kernel has no room for is lost, as on any path
			}
			unix.Close(from)
		})
		t.running.Go(func() {
			list := messages(batch, 2048)
			for !t.stopped.Load() {
				if n, err := do(unix.SYS_RECVMMSG, to, list, unix.MSG_WAITFORONE); err == nil {
					t.delivered.Add(uint64(n))
				}
			}
			unix.Close(to)
		})
	}
	return t, nil
}

// udpPair returns a socket of the first end and one of the second, connected to each other. Calls on them end after a while.
func udpPair(p *path, version int) (from, to int, err error) {
	open := func(s *space, second bool) (fd int, err error) {
		family := unix.AF_INET
		if version == 6 {
			family = unix.AF_INET6
		}
		err = s.do(func() (err error) {
			fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			return unix.Bind(fd, sockaddr(relayAddrs(second)[version/6].Addr(), 0))
		})
		if err == nil {
			soon := unix.NsecToTimeval(int64(100 * time.Millisecond))
			err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &soon)
		}
		const buffer = 4 << 20 // where that is forbidden, what rmem_max allows
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
		}
		return fd, err
	}
	if from, err = open(p.spaces[0], false); err != nil {
		return 0, 0, err
	}
	if to, err = open(p.spaces[1], true); err != nil {
		unix.Close(from)
		return 0, 0, err
	}
	for _, pair := range [][2]int{{from, to}, {to, from}} {
		peer, err2 := unix.Getsockname(pair[1])
		if err2 == nil {
			err2 = unix.Connect(pair[0], peer)
		}
		if err2 != nil {
			unix.Close(from)
			unix.Close(to)
			return 0, 0, err2
		}
	}
	return from, to, nil
}

// ready waits for a first datagram to come through and back.
func (p *path) ready(version int) error {
	from, to, err := udpPair(p, version)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	defer unix.Close(to)
	b := make([]byte, 8)
	for late := time.Now().Add(10 * time.Second); time.Now().Before(late); {
		_, _ = unix.Write(from, b)
		if n, err := unix.Read(to, b); err == nil {
			if _, err := unix.Write(to, b[:n]); err == nil {
				if _, err := unix.Read(from, b); err == nil {
					return nil
				}
			}
		}
	}
	return fmt.Errorf("no packet of IPv%d comes through", version)
}

// pingPong returns the median time of a datagram to the second end and back.
func pingPong(p *path, size int, lap time.Duration) (time.Duration, error) {
	t := new(traffic)
	from, to, err := udpPair(p, 4)
	if err != nil {
		return 0, err
	}
	defer unix.Close(from)
	t.running.Go(func() {
		for b := make([]byte, 2048); !t.stopped.Load(); {
			if n, err := unix.Read(to, b); err == nil {
				_, _ = unix.Write(to, b[:n])
			}
		}
		unix.Close(to)
	})
	defer t.stop()
	var times []time.Duration
	b, lost := make([]byte, size), 0
	for end := time.Now().Add(lap); time.Now().Before(end); {
		start := time.Now()
		if _, err := unix.Write(from, b); err != nil {
			return 0, err
		}
		if _, err := unix.Read(from, b); err != nil {
			if lost++; lost > 5 {
				return 0, fmt.Errorf("no echo: %w", err)
			}
			continue
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}
