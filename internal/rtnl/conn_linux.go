package rtnl

import (
	"bytes"
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
	dumpTries    = 20
)

// Conn is one rtnetlink socket for requests. Its methods may run concurrently; they take turns.
type Conn struct {
	mu      sync.Mutex
	sock    socket // nil: closed
	seq     uint32
	buf     []byte
	batch   int           // requests a send
	maxSend int           // bytes a send
	backOff time.Duration // between two tries of a dump, times their number
	port    uint32
}

// Dial opens a connection in the network namespace of the calling thread and keeps to it.
func Dial() (*Conn, error) {
	s, err := openSocket(options...)
	if err != nil {
		return nil, err
	}
	c := newConn(s)
	if err := c.measure(s); err != nil {
		s.close()
		return nil, fmt.Errorf("prepare rtnetlink socket: %w", err)
	}
	return c, nil
}

func newConn(s socket) *Conn {
	return &Conn{sock: s, buf: make([]byte, 64<<10), batch: maxRequests, maxSend: 64 << 10, backOff: time.Millisecond}
}

// measure fits the bounds to the socket's buffers.
func (c *Conn) measure(s *kernelSocket) error {
	receive, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return err
	}
	send, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return err
	}
	c.batch = max(1, min(maxRequests, receive/replyCost))
	c.maxSend = send - sendOverhead
	name, err := unix.Getsockname(s.fd)
	if own, ok := name.(*unix.SockaddrNetlink); ok {
		c.port = own.Pid
	}
	return err
}

// Port is the number by which the kernel knows the connection: what its requests bring about is announced with it.
func (c *Conn) Port() uint32 { return c.port }

// Close closes the socket; it is safe to call twice.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sock == nil {
		return nil
	}
	err := c.sock.close()
	c.sock = nil
	return err
}

// Result is what came of one request.
type Result struct {
	Err     error     // *Error if the kernel refused it; ErrUnknown if the answer was lost or it was not sent; nil if it did it
	Answers []Message // what it sent back: for RTM_GET…, or with NLM_F_ECHO
}

// Do sends all requests, as many to a send as V6 allows, and returns one Result each. A refused request does not keep the
// kernel from carrying out those after it; a lost answer keeps Do from sending more.
func (c *Conn) Do(requests ...Message) []Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	results := make([]Result, len(requests))
	for done := 0; done < len(requests); {
		n := c.fitting(requests[done:])
		if err := c.exchange(requests[done:done+n], results[done:done+n]); err != nil {
			for i := range results[done:] {
				if r := &results[done+i]; r.Err == nil && len(r.Answers) == 0 {
					r.Err = err
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
	if c.sock == nil {
		return os.ErrClosed
	}
	first := c.seq + 1
	c.seq += uint32(len(requests))
	room := 0
	for i := range requests {
		room += align(headerLen + len(requests[i].Body))
	}
	out := make([]byte, 0, room)
	for i, m := range requests {
		m.Seq = first + uint32(i)
		m.Flags |= unix.NLM_F_REQUEST
		if i == len(requests)-1 {
			m.Flags |= unix.NLM_F_ACK
		}
		out = m.appendTo(out)
	}
	if err := c.sock.send(out); err != nil {
		return err // nothing of it was carried out
	}
	if err := c.collect(first, results); err != nil {
		c.sock.drain() // a full buffer would take no later answer either
		return fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	return nil
}

// collect reads answers until the last request's acknowledgement.
func (c *Conn) collect(first uint32, results []Result) error {
	for {
		datagram, err := c.receive()
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
			if results[i].Err = decodeError(m); errors.Is(results[i].Err, ErrMalformed) {
				results[i].Err = fmt.Errorf("%w: %w", ErrUnknown, results[i].Err)
			}
			if int(i) == len(results)-1 {
				return nil
			}
		}
	}
}

// receive returns one datagram of the kernel's; it aliases the buffer.
func (c *Conn) receive() ([]byte, error) {
	for {
		n, whole, fromKernel, err := c.sock.receive(c.buf)
		switch {
		case err == unix.EINTR:
		case err == unix.ENOBUFS:
			return nil, ErrOverrun
		case err == unix.EAGAIN:
			return nil, fmt.Errorf("no answer within %v: %w", answerWait, err)
		case err != nil:
			return nil, err
		case !fromKernel:
		case !whole:
			c.buf = make([]byte, align(n)) // the next one of this size fits
			return nil, ErrOverrun
		default:
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
		time.Sleep(time.Duration(try) * c.backOff) // from whoever keeps changing the table
	}
}

// DumpOnce is Dump that does not repeat itself: with ErrInterrupted come those answers that there were.
func (c *Conn) DumpOnce(request Message) ([]Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dump(request)
}

func (c *Conn) dump(request Message) ([]Message, error) {
	if c.sock == nil {
		return nil, os.ErrClosed
	}
	c.seq++
	request.Seq = c.seq
	request.Flags |= unix.NLM_F_REQUEST | unix.NLM_F_DUMP
	if err := c.sock.send(request.appendTo(nil)); err != nil {
		return nil, err
	}
	all, end, err := c.collectDump(request)
	if !end {
		c.sock.drain() // to its end: the kernel begins no other on this socket before
	}
	return all, err
}

// keep appends an answer to all, or a copy of it where it stands in the receive buffer.
func keep(all []Message, request, answer Message) []Message {
	if request.Keep == nil {
		return append(all, answer)
	}
	if !request.Keep(answer) {
		return all
	}
	answer.Body = bytes.Clone(answer.Body)
	return append(all, answer)
}

// collectDump reads to the end of a dump; end: it got there.
func (c *Conn) collectDump(request Message) (all []Message, end bool, err error) {
	whole := true
	for {
		datagram, err := c.receive()
		if errors.Is(err, ErrOverrun) {
			whole = false
			continue
		}
		if err != nil {
			return nil, false, err
		}
		if request.Keep == nil {
			datagram = bytes.Clone(datagram)
		}
		for m, err := range split(datagram) {
			if err != nil {
				return nil, false, err
			}
			if m.Seq != request.Seq {
				continue // left from an exchange whose answers were lost
			}
			whole = whole && m.Flags&unix.NLM_F_DUMP_INTR == 0
			if m.Type != unix.NLMSG_ERROR && m.Type != unix.NLMSG_DONE {
				all = keep(all, request, m)
				continue
			}
			if err := decodeError(m); err != nil {
				return nil, true, err
			}
			if !whole {
				return all, true, ErrInterrupted
			}
			return all, true, nil
		}
	}
}
