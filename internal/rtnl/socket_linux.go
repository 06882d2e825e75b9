package rtnl

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	answerWait  = 10 * time.Second // the kernel answers within the send itself; this only bounds one that does not
	receiveRoom = 1 << 20          // asked for; the host's limit may grant less
)

// options ask for better error texts, errors without the whole request, and filtered dumps. A kernel that lacks one (the
// last came with 4.20) still works: what a dump returns is filtered again by its reader.
var options = []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK}

// socket is what Conn needs of a netlink socket; tests put a scripted kernel in its place.
type socket interface {
	send(b []byte) error
	// receive reads one datagram, or as much of it as fits; n is its whole length.
	receive(b []byte) (n int, whole, fromKernel bool, err error)
	// drain throws away what waits to be received.
	drain()
	close() error
}

// kernelSocket is a blocking rtnetlink socket.
type kernelSocket struct{ fd int }

// openSocket opens one in the network namespace of the calling thread.
func openSocket(options ...int) (*kernelSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	s := &kernelSocket{fd}
	if err := s.prepare(options); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("prepare rtnetlink socket: %w", err)
	}
	return s, nil
}

func (s *kernelSocket) prepare(options []int) error {
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for _, option := range options {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, option, 1)
	}
	// More than the default, for answers larger than an error's; the default does too.
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveRoom)
	wait := unix.NsecToTimeval(answerWait.Nanoseconds())
	return unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
}

func (s *kernelSocket) send(b []byte) error {
	for {
		err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

func (s *kernelSocket) receive(b []byte) (n int, whole, fromKernel bool, err error) {
	n, _, flags, from, err := unix.Recvmsg(s.fd, b, nil, unix.MSG_TRUNC)
	sender, ok := from.(*unix.SockaddrNetlink)
	return n, flags&unix.MSG_TRUNC == 0, ok && sender.Pid == 0, err
}

func (s *kernelSocket) drain() {
	var b [1]byte
	for {
		_, _, err := unix.Recvfrom(s.fd, b[:], unix.MSG_DONTWAIT)
		if err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			return // EAGAIN: no more
		}
	}
}

func (s *kernelSocket) close() error { return unix.Close(s.fd) }
