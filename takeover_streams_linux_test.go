package overlay

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/nstest"
)

// numbered is a stream of datagrams with numbers, and what is seen of it at the other end.
type numbered struct {
	from, to       *net.UDPConn
	every          time.Duration
	sent, got      atomic.Uint64
	swapped        atomic.Uint64
	silence        atomic.Int64 // the longest between two, in ns
	stop           chan struct{}
	writer, reader sync.WaitGroup
}

func (s *succession) startNumbered(every time.Duration, fromNS *nstest.NS, from netip.Addr, toNS *nstest.NS, to netip.Addr) *numbered {
	s.Helper()
	n := &numbered{every: every, stop: make(chan struct{})}
	listen := func(ns *nstest.NS, addr netip.Addr) (conn *net.UDPConn) {
		ns.Do(s.T, func() {
			var err error
			if conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))); err != nil {
				s.Fatal(err)
			}
		})
		roomy(s.T, conn)
		return conn
	}
	n.from, n.to = listen(fromNS, from), listen(toNS, to)
	n.writer.Go(n.write)
	n.reader.Go(n.read)
	s.Cleanup(func() {
		n.end()
		n.to.Close()
		n.reader.Wait()
		n.from.Close()
	})
	return n
}

func (n *numbered) end() {
	select {
	case <-n.stop:
	default:
		close(n.stop)
	}
	n.writer.Wait()
}

func (n *numbered) write() {
	to := port(n.to)
	for start, i := time.Now(), uint64(0); ; i++ {
		select {
		case <-n.stop:
			return
		case <-time.After(time.Until(start.Add(time.Duration(i) * n.every))):
		}
		_, _ = n.from.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, i), to) // one that is refused is lost, too
		n.sent.Add(1)
	}
}

func (n *numbered) read() {
	buf := make([]byte, 64)
	var last time.Time
	for next := uint64(0); ; {
		size, err := n.to.Read(buf)
		if err != nil {
			return
		}
		if now := time.Now(); size == 8 {
			if !last.IsZero() {
				n.silence.Store(max(n.silence.Load(), int64(now.Sub(last))))
			}
			last = now
			number := binary.BigEndian.Uint64(buf)
			if number < next {
				n.swapped.Add(1)
			}
			next = max(next, number+1)
			n.got.Add(1)
		}
	}
}

func (n *numbered) String() string {
	return fmt.Sprintf("%d of %d datagrams lost, %d overtaken, longest silence %v", n.sent.Load()-n.got.Load(), n.sent.Load(),
		n.swapped.Load(), time.Duration(n.silence.Load()).Round(time.Millisecond))
}

// lost ends the stream, waits for what is on its way, and returns how much is not coming.
func (n *numbered) lost() uint64 {
	n.end()
	for deadline := time.Now().Add(2 * time.Second); n.got.Load() < n.sent.Load() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	return n.sent.Load() - n.got.Load()
}

// dialogue is one TCP connection on which numbers are echoed, one at a time.
type dialogue struct {
	near, far net.Conn
	echoed    atomic.Uint64
	longest   atomic.Int64 // until the echo, in ns
	ended     chan error
	stop      atomic.Bool
}

func (s *succession) startDialogue(near, far netip.Addr) *dialogue {
	s.Helper()
	d := &dialogue{ended: make(chan error, 1)}
	var listener net.Listener
	s.far.ns.Do(s.T, func() {
		var err error
		if listener, err = net.Listen("tcp", netip.AddrPortFrom(far, 0).String()); err != nil {
			s.Fatal(err)
		}
	})
	defer listener.Close()
	s.in(func() (err error) {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(near, 0)), Timeout: patience}
		d.near, err = dialer.Dial("tcp", listener.Addr().String())
		return err
	})
	var err error
	d.far, err = listener.Accept()
	s.must(err)
	var echo sync.WaitGroup
	echo.Go(func() { _, _ = io.Copy(d.far, struct{ io.Reader }{d.far}) }) // not by splice, whose pipes the runtime keeps
	go func() { d.ended <- d.talk() }()
	s.Cleanup(func() {
		d.near.Close()
		d.far.Close()
		echo.Wait()
	})
	return d
}

// end ends the talk, but for an error.
func (d *dialogue) end() error {
	d.stop.Store(true)
	return <-d.ended
}

func (d *dialogue) talk() error {
	var said, heard [8]byte
	for i := uint64(0); !d.stop.Load(); i++ {
		start := time.Now()
		binary.BigEndian.PutUint64(said[:], i)
		if err := d.near.SetDeadline(start.Add(patience)); err != nil {
			return err
		}
		if _, err := d.near.Write(said[:]); err != nil {
			return err
		}
		if _, err := io.ReadFull(d.near, heard[:]); err != nil {
			return err
		}
		if heard != said {
			return fmt.Errorf("said %x, heard %x", said, heard)
		}
		d.longest.Store(max(d.longest.Load(), int64(time.Since(start))))
		d.echoed.Add(1)
		time.Sleep(time.Millisecond) // a thousand a second, at most
	}
	return nil
}
