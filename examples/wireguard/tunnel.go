package main

import (
	"errors"
	"os"
	"sync"

	"example.com/overlay"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"
)

// tunnel is an overlay.Device as the tun.Device that wireguard's device reads and writes. Closing it closes the Device.
type tunnel struct {
	dev    overlay.Device
	queue  overlay.Queue
	events chan tun.Event

	left    []overlay.Packet // read, but not handed over yet; good until the next ReadBatch
	segment int              // the first packet of left[0] that is not handed over

	writeMu sync.Mutex // wireguard writes for each peer from a goroutine of its own
	packets []overlay.Packet
}

// newTunnel takes over the Device and its events.
func newTunnel(dev overlay.Device) *tunnel {
	t := &tunnel{dev: dev, queue: dev.Queues()[0], events: make(chan tun.Event)}
	go t.follow() // until the Device is closed and wireguard has read the last event
	return t
}

// follow tells wireguard what becomes of the link. An event is a hint, of which the oldest may be lost: State has the truth.
func (t *tunnel) follow() {
	defer close(t.events)
	up := false
	for range t.dev.Events() {
		state, event := t.dev.State(), tun.Event(tun.EventMTUUpdate)
		switch {
		case state.Up && !up:
			event |= tun.EventUp
		case up && !state.Up:
			event |= tun.EventDown
		}
		up = state.Up
		t.events <- event
	}
}

// Read fills buffers with packets from offset on and waits for the first one. Of a superpacket with more packets than there are
// buffers the others are handed over by the next call; wireguard makes one call at a time.
func (t *tunnel) Read(buffers [][]byte, sizes []int, offset int) (n int, err error) {
	for n == 0 {
		if len(t.left) == 0 {
			if t.left, err = t.queue.ReadBatch(); err != nil {
				return 0, err
			}
		}
		for len(t.left) > 0 && n < len(buffers) {
			p := &t.left[0]
			if t.segment == p.Segments() {
				t.left, t.segment = t.left[1:], 0
				continue
			}
			if sizes[n] = fill(buffers[n][offset:], p, t.segment); sizes[n] > 0 {
				n++
			}
			t.segment++
		}
	}
	return n, nil
}

// fill copies the i-th packet of p and returns its length, 0 if the buffer is too small for it: wireguard has no message of
// that size either.
func fill(buffer []byte, p *overlay.Packet, i int) int {
	n := len(p.AppendSegment(buffer[:0], i))
	if n > len(buffer) {
		return 0
	}
	return n
}

// Write hands packets, each from offset on, to the kernel and returns how many it took. What is a packet's own fault, or that
// of a link that is down, is counted in Stats: wireguard would log a line for each, as often as a peer likes.
func (t *tunnel) Write(buffers [][]byte, offset int) (int, error) {
	t.writeMu.Lock()
	defer t.writeMu.Unlock()
	t.packets = t.packets[:0]
	for _, b := range buffers {
		t.packets = append(t.packets, overlay.Packet{Data: b[offset:]})
	}
	n, err := t.queue.WriteBatch(t.packets)
	if errors.Is(err, os.ErrClosed) || errors.Is(err, overlay.ErrGone) {
		return n, err
	}
	return n, nil
}

// BatchSize is what the sockets move at a time, so that a read from either end fills a write to the other.
func (t *tunnel) BatchSize() int { return conn.IdealBatchSize }

// MTU is the kernel's.
func (t *tunnel) MTU() (int, error) { return t.dev.State().MTU, nil }

// Name is the kernel's too.
func (t *tunnel) Name() (string, error) { return t.dev.State().Name, nil }

// Events is closed some time after the tunnel.
func (t *tunnel) Events() <-chan tun.Event { return t.events }

// File is for a daemon that hands its device to a successor; wireguard's device does not ask for it.
func (t *tunnel) File() *os.File { return nil }

// Close does not wait for follow: wireguard reads no event while it closes.
func (t *tunnel) Close() error { return t.dev.Close() }
