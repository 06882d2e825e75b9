package overlay

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stream sends numbered datagrams in several flows at a fixed rate, and counts what of them comes out of the device, in which
// order, and whether its next hop is known.
type stream struct {
	sockets  []int
	sent     atomic.Uint64
	got      atomic.Uint64
	swapped  atomic.Uint64
	unrouted atomic.Uint64
	stop     chan struct{}
	writer   sync.WaitGroup
	reader   sync.WaitGroup
}

const (
	streamRate  = 20_000 // packets a second
	streamBurst = 20     // a millisecond's worth
)

func (l *lab) startStream(d *tunDevice, sends [][2]string) *stream {
	l.Helper()
	s := &stream{stop: make(chan struct{})}
	for _, way := range sends {
		l.in(func() error {
			socket, err := datagramSocket(netip.MustParseAddr(way[0]), netip.MustParseAddr(way[1]))
			s.sockets = append(s.sockets, socket)
			return err
		})
	}
	l.Cleanup(func() {
		d.Close()
		s.reader.Wait()
		for _, socket := range s.sockets {
			unix.Close(socket)
		}
	})
	s.reader.Go(func() { s.read(d) })
	s.writer.Go(func() { s.write(l.T) })
	l.await("a stream", func() bool { return s.got.Load() > streamRate/20 })
	return s
}

func (s *stream) write(t *testing.T) {
	numbers := make([]uint32, len(s.sockets))
	payload := make([]byte, 16)
	for start, n := time.Now(), 0; ; n += streamBurst {
		select {
		case <-s.stop:
			return
		case <-time.After(time.Until(start.Add(time.Duration(n) * time.Second / streamRate))):
		}
		for i := range streamBurst {
			flow := i % len(s.sockets)
			numbers[flow]++
			copy(payload, "flow")
			payload[4] = byte(flow)
			binary.BigEndian.PutUint32(payload[8:], numbers[flow])
			if _, err := unix.Write(s.sockets[flow], payload); err != nil {
				t.Errorf("send: %v", err)
				return
			}
			s.sent.Add(1)
		}
	}
}

func (s *stream) read(d *tunDevice) {
	last := make([]uint32, len(s.sockets))
	for {
		packets, err := d.queues[0].ReadBatch()
		if err != nil {
			return
		}
		for _, p := range packets {
			payload := p.Data[max(0, len(p.Data)-16):]
			if string(payload[:4]) != "flow" {
				continue
			}
			s.got.Add(1)
			number := binary.BigEndian.Uint32(payload[8:])
			if number <= last[payload[4]] {
				s.swapped.Add(1)
			}
			last[payload[4]] = number
			if _, ok := d.NextHop(p.Data, nil); !ok {
				s.unrouted.Add(1)
			}
		}
	}
}

// 20,000 packets a second, across a Reload that changes half of 10,000 other routes, addresses and the MTU, and back: none is
// lost, none overtakes another of its flow, and each finds its next hop (design.md law 5, kernel.md V29).
func TestReloadUnderLoad(t *testing.T) {
	l := newLab(t)
	others := many(10_000)
	old := Config{
		// At 20,000 a second the default of 500 packets bridges 25 ms: too little to tell a loss from a busy machine.
		Networks: prefixes("10.42.0.1/24", "10.43.0.1/24", "fd42::1/64"), MTU: 1400, TxQueueLen: 10_000,
		Routes: append([]Route{
			{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Via: via("10.42.0.9")},
			{Prefix: netip.MustParsePrefix("fd99::/64"), Via: via("fd42::9")},
		}, others...),
	}
	next := old.clone()
	next.Networks, next.MTU = prefixes("10.42.0.1/24", "10.44.0.1/24", "fd42::1/64", "fd44::1/64"), 1500
	next.Routes = next.Routes[:2+len(others)/2]
	for i := range len(others) / 2 {
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{12, 0, byte(i >> 8), byte(i)}), 32)
		next.Routes = append(next.Routes, Route{Prefix: prefix, Via: via("10.42.0.7")})
	}
	d := l.active(old)
	s := l.startStream(d, [][2]string{
		{"10.42.0.1", "10.9.1.1"}, {"10.42.0.1", "10.9.2.2"}, {"10.42.0.1", "10.42.0.77"}, {"fd42::1", "fd99::1"}, {"fd42::1", "fd42::77"},
	})
	var times []time.Duration
	for i := range 6 {
		start := time.Now()
		l.reload(d, []Config{next, old}[i%2])
		times = append(times, time.Since(start))
	}
	before := s.sent.Load()
	l.await("more of the stream", func() bool { return s.sent.Load() > before+streamRate/20 })
	close(s.stop)
	s.writer.Wait()
	await := time.Now().Add(2 * time.Second)
	for s.got.Load() < s.sent.Load() && time.Now().Before(await) {
		time.Sleep(time.Millisecond)
	}
	slices.Sort(times)
	t.Logf("%d sent, %d lost (%d for want of a reader), %d swapped, %d without a next hop; 6 reloads, median %v", s.sent.Load(),
		s.sent.Load()-s.got.Load(), d.Stats().ReadDropped, s.swapped.Load(), s.unrouted.Load(), times[3])
	lost := s.sent.Load() - s.got.Load()
	if raceEnabled { // a reader ten times as slow may not keep up, which the kernel counts
		lost -= min(lost, d.Stats().ReadDropped)
	}
	if lost != 0 || s.swapped.Load() != 0 || s.unrouted.Load() != 0 {
		t.Error("packets were lost, swapped, or found no way")
	}
}
