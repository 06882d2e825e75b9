package overlay

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// kernel.md V18, U51: a queue that is closed alone takes its backlog along, counted, and its flows move to the others.
func TestQueueCloseMovesItsFlows(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, Queues: 2})
	first, second := r.dev.Queues()[0], r.dev.Queues()[1]
	flows := make([]*net.UDPConn, 32)
	for i := range flows {
		flows[i] = r.udp(own4.Addr())
	}
	got := make(chan string, 1000)
	var readers sync.WaitGroup
	read := func(q Queue, name string) {
		readers.Go(func() {
			for {
				packets, err := q.ReadBatch()
				if err != nil {
					return
				}
				for range packets {
					got <- name
				}
			}
		})
	}
	round := func() map[string]int {
		for _, f := range flows {
			if _, err := f.WriteToUDPAddrPort(make([]byte, 100), netip.AddrPortFrom(peer4, 4242)); err != nil {
				t.Fatal(err)
			}
		}
		counts := map[string]int{}
		for range flows {
			select {
			case name := <-got:
				counts[name]++
			case <-time.After(patience):
				t.Fatalf("of %d flows only %v arrive", len(flows), counts)
			}
		}
		return counts
	}
	read(first, "first")
	read(second, "second")
	if counts := round(); counts["first"] == 0 || counts["second"] == 0 {
		t.Fatalf("all flows on one queue: %v", counts)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	requireClosed(t, second)
	if counts := round(); counts["second"] != 0 {
		t.Errorf("flows of a closed queue: %v", counts)
	}
	if _, err := first.Write(sequence(1)); err != nil {
		t.Errorf("the other queue's Write: %v", err)
	}
	if s := r.dev.State(); s.Index == 0 || !s.Up {
		t.Errorf("State: %v", s)
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	readers.Wait()
}

// Without a backlog the packets of a flow arrive in order, whichever queue they come by, also when that is closed and they move.
func TestQueuesKeepTheOrderOfAFlow(t *testing.T) {
	const flows, rounds = 24, 60
	r := newRig(t, Config{Networks: []netip.Prefix{own4}, Queues: 3})
	var senders [flows]*net.UDPConn
	number := make(map[uint16]int)
	for i := range senders {
		senders[i] = r.udp(own4.Addr())
		number[uint16(senders[i].LocalAddr().(*net.UDPAddr).Port)] = i
	}
	var mu sync.Mutex
	var got [flows][]byte // by flow, the rounds as they arrived
	by := make(map[int]map[Queue]bool)
	total := 0
	var readers sync.WaitGroup
	for _, q := range r.dev.Queues() {
		readers.Go(func() {
			for {
				packets, err := q.ReadBatch()
				if err != nil {
					return
				}
				mu.Lock()
				for _, p := range packets {
					flow := number[binary.BigEndian.Uint16(p.Data[20:])]
					got[flow] = append(got[flow], p.Data[28])
					if by[flow] == nil {
						by[flow] = make(map[Queue]bool)
					}
					by[flow][q] = true
					total++
				}
				mu.Unlock()
			}
		})
	}
	for round := range rounds {
		if round > 0 && round%(rounds/3) == 0 {
			eventually(t, "all is read", func() bool { mu.Lock(); defer mu.Unlock(); return total == round*flows })
			if err := r.dev.Queues()[round/(rounds/3)].Close(); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range senders {
			if _, err := s.WriteToUDPAddrPort([]byte{byte(round)}, netip.AddrPortFrom(peer4, 4242)); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "all is read", func() bool { mu.Lock(); defer mu.Unlock(); return total == rounds*flows })
	moved := 0
	for flow, arrived := range got {
		if !slices.IsSorted(arrived) || len(arrived) != rounds {
			t.Errorf("flow %d arrived as %v", flow, arrived)
		}
		if len(by[flow]) > 1 {
			moved++
		}
	}
	if moved == 0 {
		t.Error("no flow moved from a queue to another")
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	readers.Wait()
}
