package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// soak is a device in the oracle's churn that carries checked traffic to a far host all the while, beside others that come and go.
type soak struct {
	*followOracle
	far     *rig
	relays  sync.WaitGroup
	flows   sync.WaitGroup
	ending  atomic.Bool
	carried atomic.Uint64 // bytes of TCP, checked
	heard   atomic.Uint64 // datagrams, checked
	said    atomic.Uint64
	lives   soakLives
	dice    *rand.Rand // of those lives
}

// The network of the checked traffic: churn changes the ways to other destinations, and takes this one away only with the link.
var (
	soakNear = prefixes("10.77.0.1/24", "fd77::1/64")
	soakFar  = prefixes("10.77.0.2/24", "fd77::2/64")
)

const (
	soakDatagram = 512             // bytes
	soakDrought  = 2 * time.Minute // how long TCP may find no way: the kernel's own pauses double
)

// TestSoak runs all at once, in rounds of a minute (two of a second and a half without -long): reloads, the oracle's churn with
// flaps, devices whose queues close, and numbered traffic. After each round RoutesFor must say what the kernel says, and there be no
// more descriptors, goroutines and memory than after the first.
func TestSoak(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	round, rounds := 1500*time.Millisecond, 2
	if *long > 0 {
		round = min(time.Minute, *long)
		rounds = max(2, int(*long/round))
	}
	t.Logf("seed %d", *seed)
	s := newSoak(t)
	first := s.round(round)
	t.Logf("after the first round: %v", first)
	for n := 2; n <= rounds && !t.Failed(); n++ {
		var now load
		s.round(round)
		s.within(patience, "no more held than after the first round", func() bool {
			now = s.held()
			return now.descriptors <= first.descriptors && now.goroutines <= first.goroutines && now.heap <= first.heap+first.heap/4+1<<20
		})
		t.Logf("after round %d: %v", n, now)
	}
	s.end()
	t.Logf("%d operations, %d upsets, %d probes, %d devices, %d queues closed early, %d reloads of theirs, %d datagrams read there; %d bytes and %d of %d datagrams in their places; agreed after %v",
		s.Steps, s.upsets, s.probes, s.lives.devices, s.lives.queues, s.lives.reloads, s.lives.read.Load(), s.carried.Load(), s.heard.Load(), s.said.Load(), s.slowest)
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	s := &soak{followOracle: newFollowOracle(t, 1), dice: rand.New(rand.NewPCG(*seed, 77))}
	// Else TCP doubles its pauses and finds the link down, time after time, for minutes. Kernels before 6.15 know no such bound. With it
	// TCP would give up after fifteen tries (tcp_retries2), one a second; a repair that failed may wait longer for the next.
	_, _ = s.ns.TryRun("sysctl -qw net.ipv4.tcp_rto_max_ms=1000")
	s.ns.Run(s, "sysctl -qw net.ipv4.tcp_retries2=200")
	s.bound = 5 * leeway * time.Second // beside traffic as fast as it goes
	s.do("-4 rule add pref 1 to 10.77.0.0/24 table main", "-6 rule add pref 1 to fd77::/64 table main")
	s.cfg.Networks = append(s.cfg.Networks, soakNear...)
	s.reload(s.d, s.cfg)
	s.far = host(t, Config{MTU: 1400, Networks: soakFar})
	s.relays.Go(func() { carry(s, s.d.queues[0], s.far.q, ErrDown) }) // down is the churn's doing
	s.relays.Go(func() { carry(s, s.far.q, s.d.queues[0], ErrDown) })
	t.Cleanup(func() { // also when it fails in the middle
		s.ending.Store(true)
		s.d.Close()
		s.far.dev.Close()
		s.relays.Wait()
		s.flows.Wait()
	})
	for i := range soakNear {
		s.stream(soakFar[i].Addr())
		s.datagrams(soakFar[i].Addr())
	}
	return s
}

// stream sends numbers by TCP as fast as it goes, until the soak ends, and checks that they arrive.
func (s *soak) stream(far netip.Addr) {
	s.Helper()
	var listener net.Listener
	var out net.Conn
	var err error
	s.far.ns.Do(s, func() { listener, err = net.Listen("tcp", netip.AddrPortFrom(far, 0).String()) })
	s.must(err)
	defer listener.Close()
	s.ns.Do(s, func() { out, err = net.Dial("tcp", listener.Addr().String()) })
	s.must(err)
	in, err := listener.Accept()
	s.must(err)
	s.Cleanup(func() { out.Close(); in.Close() }) // also where they find no way any more
	s.flows.Go(func() {
		defer out.Close()
		buf := make([]byte, 1<<13)
		for n := uint64(0); !s.ending.Load(); n += uint64(len(buf)) / 8 {
			for i := range uint64(len(buf)) / 8 {
				binary.BigEndian.PutUint64(buf[8*i:], n+i)
			}
			_ = out.SetWriteDeadline(time.Now().Add(soakDrought))
			if _, err := out.Write(buf); err != nil && !s.ending.Load() {
				s.Errorf("TCP to %v: %v", far, err)
				return
			}
		}
	})
	s.flows.Go(func() {
		defer in.Close()
		if err := s.checkNumbers(in); err != nil && !s.ending.Load() {
			s.Errorf("TCP from %v: %v", far, err)
		}
	})
}

func (s *soak) checkNumbers(in net.Conn) error {
	buf := make([]byte, 1<<13)
	for n := uint64(0); ; n++ {
		if n%uint64(len(buf)/8) == 0 {
			_ = in.SetReadDeadline(time.Now().Add(soakDrought))
			if _, err := io.ReadFull(in, buf); err != nil {
				return err
			}
			s.carried.Add(uint64(len(buf)))
		}
		if got := binary.BigEndian.Uint64(buf[8*n%uint64(len(buf)):]); got != n {
			s.ending.Store(true)
			s.Errorf("%x in place of %x", got, n)
			return nil
		}
	}
}

// datagrams sends a thousand numbered datagrams a second; some may be lost, but none changed, doubled or overtaken.
func (s *soak) datagrams(far netip.Addr) {
	s.Helper()
	in := s.far.udp(far)
	s.must(in.SetDeadline(time.Time{}))
	var out net.Conn
	var err error
	s.ns.Do(s, func() { out, err = net.Dial("udp", in.LocalAddr().String()) })
	s.must(err)
	s.flows.Go(func() {
		defer in.Close()
		defer out.Close()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		buf := make([]byte, soakDatagram)
		for n := uint64(1); !s.ending.Load(); <-tick.C {
			for range 10 {
				binary.BigEndian.PutUint64(buf, n)
				binary.BigEndian.PutUint32(buf[len(buf)-4:], crc32.ChecksumIEEE(buf[:len(buf)-4]))
				if _, err := out.Write(buf); err == nil { // else there is no way at the moment
					s.said.Add(1)
				}
				n++
			}
		}
	})
	s.flows.Go(func() {
		last := uint64(0)
		for buf := make([]byte, 2*soakDatagram); ; {
			n, err := in.Read(buf)
			if err != nil {
				return // the sender has ended
			}
			number := binary.BigEndian.Uint64(buf)
			if n != soakDatagram || binary.BigEndian.Uint32(buf[n-4:]) != crc32.ChecksumIEEE(buf[:n-4]) || number <= last {
				s.Errorf("a datagram of %d bytes, number %d after %d", n, number, last)
			}
			last = number
			s.heard.Add(1)
		}
	})
}

// load is what a program holds.
type load struct {
	descriptors, goroutines int
	heap                    uint64
}

func (l load) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, heap %d KiB", l.descriptors, l.goroutines, l.heap>>10)
}

// round churns for so long beside other devices' lives, and returns what is held when all has come to rest but the traffic.
func (s *soak) round(lasts time.Duration) load {
	s.Helper()
	end := time.Now().Add(lasts)
	var others sync.WaitGroup
	others.Go(func() {
		for s.live(); time.Now().Before(end) && !s.Failed(); s.live() {
		}
	})
	defer others.Wait()
	for time.Now().Before(end) {
		s.churn(20)
		if s.IntN(3) == 0 {
			s.upset()
		}
		s.settle()
	}
	s.story = s.story[:0]
	s.do("link set DEV mtu 1400", "link set DEV up")
	s.restore()
	others.Wait()
	s.within(soakDrought, "the device is at rest", s.d.atRest)
	s.settle()
	bytes, datagrams := s.carried.Load(), s.heard.Load()
	s.within(soakDrought, "traffic goes on", func() bool { return s.carried.Load() > bytes+1<<16 && s.heard.Load() > datagrams+10 })
	return s.held()
}

// within waits for ok.
func (s *soak) within(lasts time.Duration, what string, ok func() bool) {
	s.Helper()
	for deadline := time.Now().Add(lasts); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("waited in vain: %s; held: %v\nnear %v\n%s\nfar %v", what, s.held(), s.d.State(),
				s.ns.Run(s.T, "sh", "-c", "ip -s link; ip address; ip rule; ip -d -6 route show table all; ip -d -4 route show table all"), s.far.dev.State())
		}
	}
}

// held counts when nothing is on its way out any more.
func (s *soak) held() (now load) {
	runtime.GC()
	runtime.GC() // what had a finalizer
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	now = load{goroutines: runtime.NumGoroutine(), heap: m.HeapAlloc}
	open, err := os.ReadDir("/proc/self/fd")
	s.must(err)
	now.descriptors = len(open)
	return now
}

func (s *soak) end() {
	s.ending.Store(true)
	s.flows.Wait()
	if s.lives.devices < 2 || s.lives.queues == 0 || s.lives.read.Load() == 0 || s.heard.Load() == 0 || s.carried.Load() == 0 {
		s.Errorf("too little came to pass: %d devices, %d queues, %d datagrams there; %d datagrams, %d bytes",
			s.lives.devices, s.lives.queues, s.lives.read.Load(), s.heard.Load(), s.carried.Load())
	}
}

// soakLives counts what happened to devices beside the long-lived one.
type soakLives struct {
	devices, queues, reloads int
	read                     atomic.Uint64 // numbered datagrams
}

// lifeNet is the network of those devices, and what is sent into it.
var lifeNet = netip.MustParsePrefix("10.78.0.1/24")

const (
	lifeFlows     = 16
	lifeDatagrams = 1 << 14 // at most, of all flows
)

// numbers sends numbered datagrams of many flows into the network of a device beside, until told to stop.
func (s *soak) numbers(stop *atomic.Bool) {
	var flows [lifeFlows]net.Conn
	for i := range flows {
		var err error
		s.far.ns.Do(s, func() {
			flows[i], err = net.Dial("udp", netip.AddrPortFrom(lifeNet.Addr().Next(), uint16(7000+i)).String())
		})
		if err != nil {
			s.Errorf("a device beside: %v", err)
			return
		}
		defer flows[i].Close()
	}
	for n := 0; n < lifeDatagrams && !stop.Load(); n++ {
		_, err := flows[n%lifeFlows].Write(binary.BigEndian.AppendUint64([]byte("numbered"), uint64(n)))
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			s.Errorf("a device beside: %v", err)
			return
		}
		if n%lifeFlows == 0 {
			time.Sleep(100 * time.Microsecond) // a pace, not a wait
		}
	}
}

// readNumbers reads a queue to its end. None of the datagrams may come twice, be it from another queue, or with another content.
func (s *soak) readNumbers(q Queue, seen *[lifeDatagrams]atomic.Bool) {
	for {
		packets, err := q.ReadBatch()
		if err != nil {
			return
		}
		for _, p := range packets {
			for i := range p.Segments() {
				_, number, ok := bytes.Cut(p.AppendSegment(nil, i), []byte("numbered"))
				if !ok {
					continue // the kernel's own
				}
				if len(number) != 8 || binary.BigEndian.Uint64(number) >= lifeDatagrams || seen[binary.BigEndian.Uint64(number)].Swap(true) {
					s.Errorf("a device beside: read %x, changed or for the second time", number)
				}
				s.lives.read.Add(1)
			}
		}
	}
}

// live opens a device of three queues, writes to it and reads what is sent into its network, reloads it, closes a queue in the middle,
// and closes it all.
func (s *soak) live() {
	w := walker{s.dice}
	cfg := w.config()
	cfg.Queues, cfg.NetNS, cfg.NoHeal = 3, s.far.ns.Path(), false
	cfg.Networks, cfg.Routes, cfg.LinkLocal = []netip.Prefix{lifeNet}, nil, false // the far host's own are to stay reachable
	d, err := New(cfg)
	if err == nil {
		err = d.Activate()
	}
	if err != nil {
		s.Errorf("a device beside: %v", err)
		return
	}
	s.lives.devices++
	var readers sync.WaitGroup
	var seen [lifeDatagrams]atomic.Bool
	for _, q := range d.Queues() {
		readers.Go(func() { s.readNumbers(q, &seen) })
	}
	var sender sync.WaitGroup
	var enough atomic.Bool
	sender.Go(func() { s.numbers(&enough) })
	burst := burstOf(20)
	for i := range 20 {
		q := d.Queues()[s.dice.IntN(3)]
		if _, err := q.WriteBatch(burst); err != nil && !errors.Is(err, os.ErrClosed) {
			s.Errorf("a device beside: write: %v", err)
		}
		if i == 10 {
			if err := q.Close(); err != nil {
				s.Errorf("a device beside: close a queue: %v", err)
			}
			s.lives.queues++
		}
		if i%5 == 0 {
			cfg.TxQueueLen, cfg.NoOffload = 100+s.dice.IntN(900), Offload(s.dice.IntN(4))
			if err := d.Reload(cfg); err != nil {
				s.Errorf("a device beside: reload: %v", err)
			}
			s.lives.reloads++
		}
	}
	enough.Store(true)
	sender.Wait()
	if err := d.Close(); err != nil {
		s.Errorf("a device beside: %v", err)
	}
	readers.Wait()
}
