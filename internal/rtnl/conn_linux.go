package rtnl

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of one send (kernel.md V6): the answers to 250 failing requests fit a default receive buffer, and a send
// larger than the send buffer is refused whole.
const (
	maxRequests  = 250
	replyCost    = 832 // bytes of receive buffer that one short answer occupies
	sendOverhead = 32
	answerWait   = 10 * time.Second // the kernel answers within the send itself; this only bounds a kernel that does not
	dumpTries    = 20
)

// Conn is one rtnetlink socket for requests. Its methods may run concurrently; they take turns.
type Conn struct {
	mu      sync.Mutex
	fd      int // -1: closed
	seq     uint32
	buf     []byte
	batch   int // requests a send
	maxSend int // bytes a send
}

// Dial opens a connection in the network namespace of the calling thread and keeps to it.
func Dial() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	c := &Conn{fd: fd, buf: make([]byte, 64<<10)}
	if err := c.prepare(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("prepare rtnetlink socket: %w", err)
	}
	return c, nil
}

func (c *Conn) prepare() error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	// Better error texts and filtered dumps: a kernel without them (before 4.20) still works, so refusals are no errors;
	// what a dump returns is filtered again by its reader.
	for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, option, 1)
	}
	wait := unix.NsecToTimeval(answerWait.Nanoseconds())
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	receive, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return err
	}
	send, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return err
	}
	c.batch = max(1, min(maxRequests, receive/replyCost))
	c.maxSend = send - sendOverhead
	return nil
}

// Close closes the socket; it is safe to call twice.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	return err
}

// Result is what came of one request.
type Result struct {
	Err     error     // *Error if the kernel refused it; ErrUnknown if the answer was lost; nil if it did it
	Answers []Message // what it sent back: for RTM_GET…, or with NLM_F_ECHO
}

// Do sends all requests, as many to a send as V6 allows, and returns one Result each. A refused request does not keep the
// kernel from carrying out those after it.
func (c *Conn) Do(requests ...Message) []Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	results := make([]Result, len(requests))
	for done := 0; done < len(requests); {
		n := c.fitting(requests[done:])
		if err := c.exchange(requests[done:done+n], results[done:done+n]); err != nil {
			for i := range results[done:] {
				if results[done+i].Err == nil && len(results[done+i].Answers) == 0 {
					results[done+i].Err = err
				}
			}
			return results
		}
		done += n
	}
	return results
}

// fitting counts how many of the requests go into one send.
func (c *Conn) fitting(requests []Message) int {
	size := 0
	for i, m := range requests {
		size += align(headerLen + len(m.Body))
		if i > 0 && (i == c.batch || size > c.maxSend) {
			return i
		}
	}
	return len(requests)
}

// exchange sends one batch and reads its answers. Only the last request asks for an acknowledgement: the kernel works in
// order and always reports failure, so when the last is answered every earlier silence is success.
func (c *Conn) exchange(requests []Message, results []Result) error {
	if c.fd < 0 {
		return os.ErrClosed
	}
	first := c.seq + 1
	c.seq += uint32(len(requests))
	var out []byte
	for i, m := range requests {
		m.Seq = first + uint32(i)
		m.Flags |= unix.NLM_F_REQUEST
		if i == len(requests)-1 {
			m.Flags |= unix.NLM_F_ACK
		}
		out = m.appendTo(out)
	}
	if err := c.send(out); err != nil {
		return err
	}
	return c.collect(first, results)
}

func (c *Conn) send(out []byte) error {
	for {
		err := unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

// collect reads answers until the last request's acknowledgement.
func (c *Conn) collect(first uint32, results []Result) error {
	for {
		datagram, err := c.receive()
		if errors.Is(err, ErrOverrun) {
			return ErrUnknown
		}
		if err != nil {
			return err
		}
		for m, err := range split(datagram) {
			if err != nil {
				return err
			}
			i := m.Seq - first
			if uint64(i) >= uint64(len(results)) {
				continue // left from an exchange whose answers were lost
			}
			if m.Type != unix.NLMSG_ERROR {
				m.Body = append([]byte(nil), m.Body...)
				results[i].Answers = append(results[i].Answers, m)
				continue
			}
			results[i].Err = decodeError(m)
			if int(i) == len(results)-1 {
				return nil
			}
		}
	}
}

// receive returns one datagram of the kernel's; it aliases the buffer.
func (c *Conn) receive() ([]byte, error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(c.fd, c.buf, nil, unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			return nil, ErrOverrun
		case err != nil:
			return nil, err
		case flags&unix.MSG_TRUNC != 0:
			c.buf = make([]byte, align(n)) // the next one of this size fits
			return nil, ErrOverrun
		}
		if sender, ok := from.(*unix.SockaddrNetlink); ok && sender.Pid == 0 {
			return c.buf[:n], nil
		}
	}
}

// Dump returns all that the kernel lists for request. A dump that the kernel marks as interrupted is repeated a few times,
// then ErrInterrupted: never act upon what such a dump left out.
func (c *Conn) Dump(request Message) ([]Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for try := 1; ; try++ {
		messages, err := c.dump(request)
		if !errors.Is(err, ErrInterrupted) && !errors.Is(err, unix.EBUSY) || try == dumpTries {
			return messages, err
		}
		time.Sleep(time.Duration(try) * time.Millisecond) // backs off from whoever keeps changing the table
	}
}

func (c *Conn) dump(request Message) ([]Message, error) {
	if c.fd < 0 {
		return nil, os.ErrClosed
	}
	c.seq++
	request.Seq = c.seq
	request.Flags |= unix.NLM_F_REQUEST | unix.NLM_F_DUMP
	if err := c.send(request.appendTo(nil)); err != nil {
		return nil, err
	}
	var all []Message
	interrupted := false
	for {
		datagram, err := c.receive()
		if err != nil {
			return nil, err
		}
		copied := append([]byte(nil), datagram...)
		for m, err := range split(copied) {
			if err != nil {
				return nil, err
			}
			if m.Seq != request.Seq {
				continue
			}
			interrupted = interrupted || m.Flags&unix.NLM_F_DUMP_INTR != 0
			switch m.Type {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				if err := decodeError(m); err != nil {
					return nil, err
				}
				if interrupted {
					return all, ErrInterrupted
				}
				return all, nil
			default:
				all = append(all, m)
			}
		}
	}
}
