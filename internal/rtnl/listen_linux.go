package rtnl

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener receives what the kernel announces to multicast groups. Wait may run beside Next and Drain, which
// take turns by their caller's care; Close wakes it.
type Listener struct {
	file     *os.File // non-blocking, in the runtime's poller
	raw      syscall.RawConn
	buf      []byte
	messages []Message // of the last datagram
	poked    atomic.Bool
	closed   atomic.Bool // the poller's own error for that matches nothing
}

// Listen joins groups (unix.RTNLGRP_…) in the network namespace of the calling thread. It asks for readBuffer bytes of
// receive buffer, beyond the host's limit where the caller may.
func Listen(readBuffer int, groups ...int) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "rtnetlink")
	l := &Listener{file: file, buf: make([]byte, 64<<10)}
	if l.raw, err = file.SyscallConn(); err == nil {
		err = join(fd, readBuffer, groups)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("listen to rtnetlink: %w", err)
	}
	return l, nil
}

func join(fd, readBuffer int, groups []int) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	return membership(fd, readBuffer, groups)
}

func membership(fd, readBuffer int, groups []int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, readBuffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, readBuffer); err != nil {
			return err
		}
	}
	for _, group := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return err
		}
	}
	return nil
}

// Join is what Listen does with its arguments, for one that has joined nothing yet.
func (l *Listener) Join(readBuffer int, groups ...int) error {
	var err error
	closed := l.raw.Control(func(fd uintptr) { err = membership(int(fd), readBuffer, groups) })
	return errors.Join(closed, err)
}

// Leave ends what Join began; what waits to be received stays.
func (l *Listener) Leave(groups ...int) error {
	var errs []error
	closed := l.raw.Control(func(fd uintptr) {
		for _, group := range groups {
			errs = append(errs, unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, unix.NETLINK_DROP_MEMBERSHIP, group))
		}
	})
	return errors.Join(append(errs, closed)...)
}

// ReadBuffer is the receive buffer that the kernel granted, in its own count: twice the bytes that were asked for.
func (l *Listener) ReadBuffer() (size int) {
	_ = l.raw.Control(func(fd uintptr) { size, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) })
	return size
}

// Poke ends a WaitUntil, or the next one, without anything to receive.
func (l *Listener) Poke() {
	l.poked.Store(true)
	_ = l.file.SetReadDeadline(time.Unix(1, 0)) // closed: then it ends anyway
}

// WaitUntil is Wait with an end; it returns nil then too.
func (l *Listener) WaitUntil(deadline time.Time) error {
	if err := l.file.SetReadDeadline(deadline); err != nil {
		if l.closed.Load() {
			return os.ErrClosed
		}
		return err
	}
	if l.poked.Swap(false) {
		return nil
	}
	if err := l.Wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	l.poked.Store(false)
	return nil
}

// Wait waits until there is something for Next. os.ErrClosed after Close.
func (l *Listener) Wait() error {
	var failed error
	err := l.raw.Read(func(fd uintptr) bool {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, 0)
		if err != nil && err != unix.EINTR {
			failed = err
		}
		return n > 0 || failed != nil
	})
	switch {
	case err != nil && l.closed.Load():
		return os.ErrClosed
	case err != nil:
		return err
	}
	return failed
}

// Next returns the next datagram of notifications without waiting, nil if there is none; they are good until the next call.
// ErrOverrun: some were lost, look for yourself and go on. os.ErrClosed after Close.
func (l *Listener) Next() ([]Message, error) {
	for {
		datagram, err := l.receive()
		switch {
		case err == unix.EAGAIN:
			return nil, nil
		case err != nil:
			return nil, err
		case datagram == nil:
			continue // not the kernel's
		}
		l.messages = l.messages[:0]
		for m, err := range split(datagram) {
			if err != nil {
				return l.messages, ErrOverrun // what cannot be read counts as lost
			}
			l.messages = append(l.messages, m)
		}
		return l.messages, nil
	}
}

// receive returns one datagram; nil if it is not the kernel's.
func (l *Listener) receive() (datagram []byte, err error) {
	var n, flags int
	var from unix.Sockaddr
	closed := l.raw.Control(func(fd uintptr) {
		for {
			n, _, flags, from, err = unix.Recvmsg(int(fd), l.buf, nil, unix.MSG_TRUNC|unix.MSG_DONTWAIT)
			if err != unix.EINTR {
				return
			}
		}
	})
	switch {
	case closed != nil && l.closed.Load():
		return nil, os.ErrClosed
	case closed != nil:
		return nil, closed
	case err == unix.ENOBUFS:
		return nil, ErrOverrun
	case err != nil:
		return nil, err
	case flags&unix.MSG_TRUNC != 0:
		l.buf = make([]byte, align(n))
		return nil, ErrOverrun
	}
	if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
		return nil, nil
	}
	return l.buf[:n], nil
}

// Drain throws away what waits to be received. To be called after an overrun: what is looked up then is
// newer than all that was lost.
func (l *Listener) Drain() {
	const most = 1 << 16 // a storm may be quicker than we are
	_ = l.raw.Control(func(fd uintptr) {
		for range most {
			_, _, _, _, err := unix.Recvmsg(int(fd), l.buf, nil, unix.MSG_TRUNC)
			if err != nil && err != unix.EINTR && err != unix.ENOBUFS {
				return // EAGAIN: no more
			}
		}
	}) // an error says that it is closed: so will Wait
}

// Close wakes Wait and closes the socket.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.file.Close()
}
