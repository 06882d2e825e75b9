package rtnl

import (
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listener receives what the kernel announces to multicast groups. One goroutine receives; Close wakes it.
type Listener struct {
	file   *os.File // non-blocking, in the runtime's poller
	raw    syscall.RawConn
	buf    []byte
	closed atomic.Bool // the poller's own error for that matches nothing
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
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, readBuffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, readBuffer); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for _, group := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return err
		}
	}
	return nil
}

// Receive waits for the next datagram of notifications; they are good until the next call. ErrOverrun: some were lost,
// look for yourself and go on. os.ErrClosed after Close.
func (l *Listener) Receive() ([]Message, error) {
	for {
		datagram, err := l.receive()
		if err != nil {
			return nil, err
		}
		if datagram == nil {
			continue // not the kernel's
		}
		var all []Message
		for m, err := range split(datagram) {
			if err != nil {
				return all, ErrOverrun // what cannot be read counts as lost
			}
			all = append(all, m)
		}
		return all, nil
	}
}

func (l *Listener) receive() (datagram []byte, err error) {
	wait := l.raw.Read(func(fd uintptr) bool {
		var n, flags int
		var from unix.Sockaddr
		n, _, flags, from, err = unix.Recvmsg(int(fd), l.buf, nil, unix.MSG_TRUNC)
		switch {
		case err == unix.EAGAIN:
			return false
		case err == unix.EINTR:
			err = nil // an empty turn: Receive comes again
		case err == unix.ENOBUFS:
			err = ErrOverrun
		case err != nil:
		case flags&unix.MSG_TRUNC != 0:
			l.buf = make([]byte, align(n))
			err = ErrOverrun
		default:
			if sender, ok := from.(*unix.SockaddrNetlink); ok && sender.Pid == 0 {
				datagram = l.buf[:n]
			}
		}
		return true
	})
	switch {
	case wait != nil && l.closed.Load():
		return nil, os.ErrClosed
	case wait != nil:
		return nil, wait
	}
	return datagram, err
}

// Drain throws away what waits to be received. To be called between Receives, after an overrun: what is looked up then is
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
	}) // an error says that it is closed: so will Receive
}

// Close wakes Receive and closes the socket.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.file.Close()
}
