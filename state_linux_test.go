package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/netns"
	"example.com/overlay/internal/rtnl"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// kernel.md U59: what comes when the queue is full is dropped by the kernel, and counted by us, packet for packet.
func TestStatsCountWhatTheKernelDropped(t *testing.T) {
	r := newRig(t, Config{TxQueueLen: 10})
	w := r.tap()
	for i := range 1000 {
		w.send(sequence(i))
	}
	want := Stats{ReadDropped: 990}
	r.requireStats(want)
	packets, err := r.q.ReadBatch()
	if err != nil || len(packets) != 10 {
		t.Fatalf("%d packets, %v", len(packets), err)
	}
	want.ReadPackets = 10
	for _, p := range packets {
		want.ReadBytes += uint64(len(p.Data))
	}
	r.requireStats(want)
	for i := range 17 { // nobody asks about these before Close
		w.send(sequence(i))
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	want.ReadDropped += 17 // 7 by the kernel, and 10 that waited
	for range 2 {
		r.requireStats(want)
	}
}

// An answer of the kernel's that comes late does not take the place of a later one: no counter goes back.
func TestStatsNeverGoBack(t *testing.T) {
	r := newRig(t, Config{TxQueueLen: 1})
	d := r.dev.(*tunDevice)
	s := &late{conn: d.view, entered: make(chan struct{}), release: make(chan struct{})}
	d.view = s
	var callers sync.WaitGroup
	callers.Go(func() { d.Stats() })
	<-s.entered // and knows of no loss
	w := r.tap()
	for i := range 100 {
		w.send(sequence(i))
	}
	second := make(chan struct{})
	callers.Go(func() {
		d.Stats()
		close(second)
	})
	select { // it should have to wait
	case <-second:
	case <-time.After(50 * time.Millisecond):
	}
	close(s.release)
	callers.Wait()
	if got := d.stats().ReadDropped; got != 99 {
		t.Errorf("ReadDropped %d, want 99", got)
	}
}

// late is a connection whose first answer is on its way until release.
type late struct {
	conn
	asked            atomic.Bool
	entered, release chan struct{}
}

func (s *late) Do(requests ...rtnl.Message) []rtnl.Result {
	results := s.conn.Do(requests...)
	if !s.asked.Swap(true) {
		close(s.entered)
		<-s.release
	}
	return results
}

// A device that is attached to starts from zero, whatever its kernel counters say.
func TestStatsBeginAtNew(t *testing.T) {
	r := newDownRig(t, Config{Persist: true, Name: "lasting", TxQueueLen: 10})
	if err := r.dev.Activate(); err != nil {
		t.Fatal(err)
	}
	w := r.tap()
	for i := range 100 {
		w.send(sequence(i))
	}
	r.requireStats(Stats{ReadDropped: 90})
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Name: "lasting", Mode: Attach, NetNS: r.ns.Path(), TxQueueLen: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got := d.Stats(); got != (Stats{}) {
		t.Errorf("a new Device counts %+v", got)
	}
	r.ip("link del lasting")
}

// What the kernel says of a device shows in State at once, and stays as it was when the device is gone or closed.
func TestStateOfARealDevice(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, MTU: 1400, TxQueueLen: 123, Queues: 2, Routes: []Route{{
		Prefix: netip.MustParsePrefix("192.168.7.0/24"), Via: []Gateway{{Addr: peer4}},
	}}})
	want := func(format string, args ...any) {
		t.Helper()
		s := r.dev.State()
		if pattern := "^" + fmt.Sprintf(format, args...) + "[ \n]"; !regexp.MustCompile(pattern).MatchString(s.String()) {
			t.Errorf("got\n%v\nwant %s", s, pattern)
		}
	}
	want("device %s index [1-9][0-9]* link up mtu 1400 txqueuelen 123 queues 2 offload tcp\\+udp learned 0", r.name)
	text := r.dev.State().String()
	for _, line := range []string{
		"config mode create netns ", "network 10.9.0.1/24 mtu 1400 mss 1360",
		"route 192.168.7.0/24 via 10.9.0.2*1 layer static metric 0 table 254 mtu 1400 mss 1360", "count read packets 0 bytes 0 ",
	} {
		if !strings.Contains(text, "\n"+line) {
			t.Errorf("no line %q in\n%s", line, text)
		}
	}
	r.ip("link set DEV mtu 1500 txqueuelen 50")
	r.ip("link set DEV name renamed")
	want("device renamed index [1-9][0-9]* link up mtu 1500 txqueuelen 50 queues 2")
	r.ip("link set renamed down")
	want("device renamed index [1-9][0-9]* link down")
	s := r.dev.State()
	s.Networks[0] = netip.Prefix{} // the caller's copy
	if got := r.dev.State().Networks; got[0] != own4 {
		t.Errorf("State shares its Networks: %v", got)
	}
	var routes []netip.Prefix
	for prefix := range s.Routes() {
		routes = append(routes, prefix)
	}
	if fmt.Sprint(routes) != "[10.9.0.0/24 192.168.7.0/24]" {
		t.Errorf("Routes: %v", routes)
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	want("device renamed index 0 link down mtu 1500 txqueuelen 50 queues 2")
}

// stuck is a connection to a kernel that takes its time.
type stuck struct {
	conn
	once             sync.Once
	entered, release chan struct{}
}

func (s *stuck) Do(requests ...rtnl.Message) []rtnl.Result {
	s.once.Do(func() {
		close(s.entered)
		<-s.release
	})
	return s.conn.Do(requests...)
}

// State, Stats and the data plane do not wait for a Reload that does (law 6), and Close makes one give up.
func TestStateDoesNotWaitForReload(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4}})
	d := r.dev.(*tunDevice)
	s := &stuck{conn: d.ctl, entered: make(chan struct{}), release: make(chan struct{})}
	d.ctl = s
	reloaded, looked := make(chan error, 1), make(chan error, 1)
	go func() { reloaded <- d.Reload(Config{NetNS: r.ns.Path(), MTU: 1500}) }()
	<-s.entered
	go func() {
		_, err := r.q.Write(sequence(1))
		if s := d.State(); s.MTU != 1300 || len(s.Networks) != 1 || !strings.Contains(s.String(), "network 10.9.0.1/24") || d.Stats().WritePackets != 1 {
			err = fmt.Errorf("got %v", s)
		}
		looked <- err
	}()
	if err := returns(t, patience, "State", looked); err != nil {
		t.Error(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- d.Close() }()
	eventually(t, "Close has begun", d.closing.Load)
	d.State()
	select {
	case <-closed:
		t.Error("Close returned while Reload was at work")
	case <-time.After(100 * time.Millisecond):
	}
	close(s.release)
	if err := returns(t, patience, "Reload", reloaded); err != os.ErrClosed {
		t.Errorf("Reload that meets Close: %v", err)
	}
	if err := returns(t, patience, "Close", closed); err != nil {
		t.Error(err)
	}
}

// ledger is a log that a test reads.
type ledger struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *ledger) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *ledger) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Split(strings.TrimSuffix(l.buf.String(), "\n"), "\n")
}

func (l *ledger) logger() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(l)
	log.SetLevel(logrus.TraceLevel)
	return log
}

// The log gets a line for each event and none of its own; Close is silent, also in the middle of a storm (kernel.md U37).
func TestLogGetsEventsAndNothingElse(t *testing.T) {
	var log ledger
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, Logger: log.logger()})
	awaitEvent(t, r.dev, EventUp)
	r.ip("link set DEV down")
	awaitEvent(t, r.dev, EventDown)
	r.ip("link set DEV up")
	awaitEvent(t, r.dev, EventUp)
	before := log.lines()
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	after := log.lines()
	if len(after) != len(before) {
		t.Errorf("Close logged %q", after[len(before):])
	}
	for _, line := range after {
		if !strings.Contains(line, "level=info") || !strings.Contains(line, "event=") {
			t.Errorf("logged %q", line)
		}
	}
}

// kernel.md U37: events come faster than anybody reads them; the oldest are dropped and counted, and Close in the middle of it
// ends the channel and logs no error.
func TestEventStorm(t *testing.T) {
	var log ledger
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, Logger: log.logger()})
	var conn *rtnl.Conn
	if err := netns.Do(r.ns.Path(), func() (err error) { conn, err = rtnl.Dial(); return err }); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	index, stop := r.dev.State().Index, make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for mtu := 1300; ; mtu = 1300 + (mtu+1)%100 {
			select {
			case <-stop:
				return
			default:
				conn.Do(rtnl.SetLinkMTU(index, mtu)) // refused when the device is gone
			}
		}
	})
	eventually(t, "events are missed", func() bool { return r.dev.Stats().EventsMissed > 100 })
	if err := r.dev.Close(); err != nil {
		t.Error(err)
	}
	close(stop)
	storm.Wait()
	n := 0
	for range r.dev.Events() {
		n++
	}
	if n == 0 || n > eventBacklog {
		t.Errorf("%d events are left, want up to %d", n, eventBacklog)
	}
	for _, line := range log.lines() {
		if !strings.Contains(line, "level=info") || !strings.Contains(line, "event=") {
			t.Errorf("logged %q", line)
		}
	}
}

// kernel.md S11: bad packets fill no log and no channel.
func TestAMillionBadPacketsLogNothing(t *testing.T) {
	batches := 1000
	if raceEnabled {
		batches = 100
	}
	var log ledger
	r := newRig(t, Config{Logger: log.logger()})
	awaitEvent(t, r.dev, EventUp)
	awaitEvent(t, r.dev, EventChanged) // a smaller MTU comes last
	before := len(log.lines())
	batch := make([]Packet, 1000)
	for i := range batch {
		batch[i].Data = []byte{byte(i) | 0x80, 1, 2, 3}
	}
	for range batches {
		if n, err := r.q.WriteBatch(batch); n != 0 || !errors.Is(err, unix.EINVAL) {
			t.Fatalf("got %d, %v", n, err)
		}
	}
	r.requireStats(Stats{WriteRefused: uint64(1000 * batches)})
	if lines := log.lines(); len(lines) != before {
		t.Errorf("%d lines, among them %q", len(lines)-before, lines[len(lines)-1])
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	for e := range r.dev.Events() {
		t.Errorf("event %v", e)
	}
}

// kernel.md V29: a steady stream loses nothing and keeps its order while the device is looked at, activated again, and others
// change its MTU and addresses. The sender waits for a reader that falls behind, so that what gets lost is the device's fault.
func TestNothingIsLostWhileTheDeviceChanges(t *testing.T) {
	const rate, window = 20_000, 400
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, TxQueueLen: 500})
	conn := r.udp(own4.Addr())
	sent, arrived := 0, make(chan int, window)
	stop, done := make(chan struct{}), make(chan error, 1)
	var sender sync.WaitGroup
	sender.Go(func() {
		credit := window
		payload := make([]byte, 200)
		for start := time.Now(); ; {
			select {
			case <-stop:
				binary.BigEndian.PutUint32(payload, 1<<31)
				_, _ = conn.WriteToUDPAddrPort(payload, netip.AddrPortFrom(peer4, 9))
				return
			case n := <-arrived:
				credit += n
				continue
			default:
			}
			if credit == 0 || time.Since(start)*rate < time.Duration(sent)*time.Second {
				time.Sleep(50 * time.Microsecond)
				continue
			}
			binary.BigEndian.PutUint32(payload, uint32(sent))
			if _, err := conn.WriteToUDPAddrPort(payload, netip.AddrPortFrom(peer4, 9)); err != nil {
				t.Error(err)
			}
			sent++
			credit--
		}
	})
	got := 0
	go func() {
		for {
			packets, err := r.q.ReadBatch()
			for _, p := range packets {
				switch n := binary.BigEndian.Uint32(p.Data[28:]); {
				case n == 1<<31:
					err = io.EOF
				case n != uint32(got):
					err = fmt.Errorf("packet %d comes instead of %d", n, got)
				default:
					got++
				}
			}
			if err != nil {
				done <- err
				return
			}
			arrived <- len(packets)
		}
	}()
	for range 20 {
		if s := r.dev.State(); !s.Up {
			t.Error("the link is down")
		}
		if err := r.dev.Activate(); err != nil {
			t.Error(err)
		}
		r.ip("addr add 10.10.0.1/24 dev DEV")
		r.ip("link set DEV mtu 1400")
		r.ip("addr del 10.10.0.1/24 dev DEV")
		r.ip("link set DEV mtu 1300")
	}
	close(stop)
	sender.Wait()
	if err := returns(t, patience, "the reader", done); err != io.EOF {
		t.Error(err)
	}
	if s := r.dev.Stats(); got != sent || s.ReadDropped != 0 || s.ReadPackets != uint64(sent)+1 {
		t.Errorf("%d of %d packets arrived, counters %+v", got, sent, s)
	}
	t.Logf("%d packets", sent)
}
