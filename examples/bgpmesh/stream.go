//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

const (
	pace  = 2 * time.Millisecond   // between the probes of a stream
	some  = 50                     // answers in a row, before it is said who answers a stream
	grace = 300 * time.Millisecond // for the last answers
)

// stream is one flow of numbered probes from a host to a subnet's door, and what became of each.
type stream struct {
	family int
	conn   *net.UDPConn
	stop   chan struct{}
	loops  sync.WaitGroup

	mu     sync.Mutex
	probes []probe
	by     byte // who answered last,
	row    int  // and how often without another in between
}

type probe struct {
	sent time.Time
	by   byte // the host that answered; 0: none
}

// startStream begins to probe. The caller ends the stream and asks for its outcome.
func startStream(from *host, to subnet, family int) (*stream, error) {
	s := &stream{family: family, stop: make(chan struct{})}
	err := from.ns.Do(func() (err error) {
		s.conn, err = net.ListenUDP("udp", &net.UDPAddr{IP: from.networks[family].Addr().AsSlice()})
		return err
	})
	if err != nil {
		return nil, err
	}
	s.loops.Go(func() { s.send(net.UDPAddrFromAddrPort(to.door(family))) })
	s.loops.Go(s.receive)
	return s, nil
}

func (s *stream) send(to *net.UDPAddr) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for question := make([]byte, 4); ; {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		binary.BigEndian.PutUint32(question, uint32(len(s.probes)))
		s.probes = append(s.probes, probe{sent: time.Now()})
		s.mu.Unlock()
		_, _ = s.conn.WriteToUDP(question, to) // without a route it fails: the probe is lost, and counted
	}
}

func (s *stream) receive() {
	for answer := make([]byte, 64); ; {
		n, _, err := s.conn.ReadFromUDP(answer)
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return
		case err != nil || n != 5:
			continue // not an answer
		}
		s.note(int(binary.BigEndian.Uint32(answer[1:])), answer[0])
	}
}

// note writes down who answered a probe.
func (s *stream) note(i int, by byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i >= len(s.probes) {
		return
	}
	s.probes[i].by = by
	if s.by != by {
		s.row = 0
	}
	s.by, s.row = by, s.row+1
}

// awaitAnswers waits until a host has answered some probes in a row of each stream, from now on.
func awaitAnswers(ctx context.Context, streams []*stream, from *host) error {
	for _, s := range streams {
		s.mu.Lock()
		s.row = 0
		s.mu.Unlock()
	}
	for _, s := range streams {
		err := await(ctx, fmt.Sprintf("%d answers in a row from %s by %s", some, from.name, families[s.family]), func() (bool, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.by == from.number && s.row >= some, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// end stops the probes, and soon after the wait for answers that are still to come.
func (s *stream) end() error {
	close(s.stop)
	return s.conn.SetReadDeadline(time.Now().Add(grace))
}

// outcome waits for the end of a stream that has been told to end, and returns all its probes.
func (s *stream) outcome() ([]probe, error) {
	s.loops.Wait()
	return s.probes, s.conn.Close()
}

// fate is what became of the probes of some streams to a subnet that moved.
type fate struct {
	sent, lost int
	gap        time.Duration // the longest time in which whatever was sent was lost
	followed   time.Duration // from the beginning of the move to the first probe that the new host answered, of the last stream
}

// add adds a stream's probes, which moved to a host at some time.
func (f *fate) add(probes []probe, begun time.Time, to byte) {
	lost := time.Time{} // since when
	followed := false
	for _, p := range probes {
		f.sent++
		if p.by == 0 {
			f.lost++
			if lost.IsZero() {
				lost = p.sent
			}
			continue
		}
		if !lost.IsZero() {
			f.gap, lost = max(f.gap, p.sent.Sub(lost)), time.Time{}
		}
		if p.by == to && !followed {
			f.followed, followed = max(f.followed, p.sent.Sub(begun)), true
		}
	}
	if !lost.IsZero() && len(probes) > 0 {
		f.gap = max(f.gap, probes[len(probes)-1].sent.Sub(lost))
	}
}
