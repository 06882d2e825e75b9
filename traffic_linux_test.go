package overlay

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
)

// pair is two hosts whose packets this process carries, as a VPN does: read, split, copied, merged, written.
type pair struct {
	testing.TB
	near, far *rig
	relays    sync.WaitGroup
}

var (
	far4 = netip.PrefixFrom(peer4, 24)
	far6 = netip.PrefixFrom(peer6, 64)
)

func newPair(t testing.TB, needs ...nstest.Ability) *pair {
	t.Helper()
	nstest.Require(t, append(needs, nstest.NetAdmin, nstest.TUN, nstest.IPv6)...)
	nstest.Leaks(t)
	p := &pair{TB: t, near: host(t, Config{MTU: 1500, Networks: []netip.Prefix{own4, own6}}), far: host(t, Config{MTU: 1500, Networks: []netip.Prefix{far4, far6}})}
	p.relays.Go(func() { carry(p, p.near.q, p.far.q) })
	p.relays.Go(func() { carry(p, p.far.q, p.near.q) })
	t.Cleanup(func() { // before the devices' own
		p.near.dev.Close()
		p.far.dev.Close()
		p.relays.Wait()
	})
	return p
}

// carry reads, splits, copies, merges and writes until a queue is closed; but for what passes every other error fails the test.
func carry(t testing.TB, from, to Queue, passes ...error) {
	var packets []Packet
	var memory []byte
	for {
		batch, err := from.ReadBatch()
		if err == nil {
			packets, memory = split(batch, packets[:0], memory[:0])
			_, err = to.WriteBatch(packets)
		}
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil && !slices.Contains(passes, err):
			t.Errorf("relay: %v", err)
			return
		}
	}
}

// split copies the packets of a batch into memory, one behind the other.
func split(batch, packets []Packet, memory []byte) ([]Packet, []byte) {
	var ends []int
	for _, p := range batch {
		for i := range p.Segments() {
			memory = p.AppendSegment(memory, i)
			ends = append(ends, len(memory))
		}
	}
	start := 0
	for _, end := range ends {
		packets = append(packets, Packet{Data: memory[start:end]})
		start = end
	}
	return packets, memory
}

type iperfSum struct {
	Bytes       float64
	LostPercent float64 `json:"lost_percent"`
}

// iperf3 finds nothing to complain of: TCP and UDP, both families, one stream and eight.
func TestIperf(t *testing.T) {
	p := newPair(t, nstest.Program("iperf3"))
	for _, addr := range []netip.Addr{peer4, peer6} {
		for _, way := range []string{"-P 1", "-P 8", "-u -b 50M -l 1300 -P 1", "-u -b 5M -l 1300 -P 8"} {
			server := p.far.ns.Start(t, "iperf3", "-s", "-1", "-B", addr.String(), "--forceflush")
			server.Expect(t, "Server listening")
			out := p.near.ns.Run(t, fmt.Sprintf("iperf3 -c %v -t 1 --json %s", addr, way))
			var report struct {
				End struct {
					Sum      iperfSum
					Received iperfSum `json:"sum_received"`
				}
			}
			if err := json.Unmarshal([]byte(out), &report); err != nil {
				t.Fatalf("%v: %.300s", err, out)
			}
			if got := max(report.End.Sum.Bytes, report.End.Received.Bytes); got < 1e6 || report.End.Sum.LostPercent > 10 {
				t.Errorf("%v %s: %.0f bytes, %.1f %% lost", addr, way, got, report.End.Sum.LostPercent)
			}
			if err := server.Wait(); err != nil {
				t.Errorf("%v %s: the server: %v", addr, way, err)
			}
		}
	}
	near, far := p.near.dev.Stats(), p.far.dev.Stats()
	if near.ReadSuper == 0 || far.WriteSuper == 0 || far.ReadInvalid+near.ReadInvalid+far.WriteRefused+near.WriteRefused+far.OffloadFails+near.OffloadFails != 0 {
		t.Errorf("counters\nnear %+v\nfar  %+v", near, far)
	}
	if near.ReadPackets-near.ReadDropped > far.WritePackets || far.WritePackets > near.ReadPackets {
		t.Errorf("%d packets read, %d written", near.ReadPackets, far.WritePackets)
	}
}

// Every byte of many streams arrives in its place: each eight of them are their number.
func TestCheckedTraffic(t *testing.T) {
	p := newPair(t)
	lasts := max(*long, 1500*time.Millisecond)
	var carried atomic.Uint64
	var streams sync.WaitGroup
	for i := range 9 {
		streams.Go(func() {
			n, err := p.checkedStream([]netip.Addr{peer4, peer6}[i%2], lasts)
			carried.Add(n)
			if err != nil {
				t.Errorf("stream %d: after %d bytes: %v", i, n, err)
			}
		})
	}
	streams.Wait()
	t.Logf("%d bytes", carried.Load())
	least := uint64(1 << 20)
	if *long >= 10*time.Minute {
		least = 1e10
	}
	if carried.Load() < least {
		t.Errorf("only %d bytes", carried.Load())
	}
}

// checkedStream sends for so long and returns how many bytes arrived as they were sent.
func (p *pair) checkedStream(addr netip.Addr, lasts time.Duration) (n uint64, err error) {
	var listener net.Listener
	var out net.Conn
	p.far.ns.Do(p, func() { listener, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String()) })
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	p.near.ns.Do(p, func() { out, err = net.Dial("tcp", listener.Addr().String()) })
	if err != nil {
		return 0, err
	}
	defer out.Close()
	in, err := listener.Accept()
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if err := in.SetDeadline(time.Now().Add(lasts + patience)); err != nil {
		return 0, err
	}
	sent := make(chan uint64, 1)
	go func() { sent <- sendNumbers(out, time.Now().Add(lasts)) }()
	buf := make([]byte, 1<<16)
	for {
		_, err := io.ReadFull(in, buf)
		if err == io.EOF {
			break
		}
		if err != nil {
			return n, err
		}
		for i := 0; i < len(buf); i += 8 {
			if got := binary.BigEndian.Uint64(buf[i:]); got != n/8 {
				return n, fmt.Errorf("%x in place of %x", got, n/8)
			}
			n += 8
		}
	}
	if want := <-sent; n != want {
		return n, fmt.Errorf("%d bytes sent", want)
	}
	return n, nil
}

func sendNumbers(out net.Conn, until time.Time) (n uint64) {
	buf := make([]byte, 1<<16)
	for time.Now().Before(until) {
		for i := 0; i < len(buf); i += 8 {
			binary.BigEndian.PutUint64(buf[i:], n/8+uint64(i/8))
		}
		if _, err := out.Write(buf); err != nil {
			break
		}
		n += uint64(len(buf))
	}
	_ = out.(*net.TCPConn).CloseWrite()
	return n
}
