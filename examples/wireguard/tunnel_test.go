package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"example.com/overlay"

	"golang.zx2c4.com/wireguard/tun"
)

const offset = 16 // where wireguard has its header

// pipe returns a tunnel that is up and the end that plays the kernel.
func pipe(t *testing.T, cfg overlay.Config) (*tunnel, overlay.Device) {
	t.Helper()
	dev, host, err := overlay.Pipe(cfg)
	if err != nil {
		t.Fatal(err)
	}
	tunnel := newTunnel(dev)
	t.Cleanup(func() {
		tunnel.Close()
		host.Close()
		for range tunnel.Events() { // until follow has ended
		}
	})
	if err := dev.Activate(); err != nil {
		t.Fatal(err)
	}
	return tunnel, host
}

// buffersOf is what wireguard reads into, dirty.
func buffersOf(n, size int) ([][]byte, []int) {
	buffers := make([][]byte, n)
	for i := range buffers {
		buffers[i] = bytes.Repeat([]byte{0xaa}, size)
	}
	return buffers, make([]int, n)
}

// superpacket is UDP from 10.0.0.1 to 10.0.0.2, so many packets of 100 bytes of payload, the n-th full of n.
func superpacket(segments int) overlay.Packet {
	data := make([]byte, 28, 28+100*segments)
	copy(data, []byte{0: 0x45, 8: 64, 9: 17, 12: 10, 15: 1, 16: 10, 19: 2, 20: 4, 21: 210, 22: 4, 23: 210})
	binary.BigEndian.PutUint16(data[2:], uint16(cap(data)))
	binary.BigEndian.PutUint16(data[24:], uint16(cap(data)-20))
	for i := range segments {
		data = append(data, bytes.Repeat([]byte{byte(i)}, 100)...)
	}
	return overlay.Packet{Data: data, SegmentSize: 100}
}

// TestRead reads superpackets of many sizes among single packets with many numbers of buffers: the packets are the same as if
// the library itself had split them, in the same order, and what is before the offset stays as it is.
func TestRead(t *testing.T) {
	for _, buffers := range []int{1, 2, 3, 7, 128} {
		t.Run(fmt.Sprint(buffers), func(t *testing.T) {
			tunnel, host := pipe(t, overlay.Config{})
			var packets []overlay.Packet
			var want [][]byte
			for _, segments := range []int{1, 2, 3, 7, 8, 64, 1} {
				packets = append(packets, superpacket(segments), overlay.Packet{Data: superpacket(1).Data})
			}
			for _, p := range packets {
				for i := range p.Segments() {
					want = append(want, p.AppendSegment(nil, i))
				}
			}
			if n, err := host.Queues()[0].WriteBatch(packets); n != len(packets) || err != nil {
				t.Fatalf("the host wrote %d, %v; want %d", n, err, len(packets))
			}
			bufs, sizes := buffersOf(buffers, 2000)
			for read := 0; read < len(want); {
				n, err := tunnel.Read(bufs, sizes, offset)
				if err != nil || n != min(buffers, len(want)-read) {
					t.Fatalf("Read after %d packets = %d, %v; want %d", read, n, err, min(buffers, len(want)-read))
				}
				for i := range n {
					if got := bufs[i][offset : offset+sizes[i]]; !bytes.Equal(got, want[read]) {
						t.Errorf("packet %d is\n%x, want\n%x", read, got, want[read])
					}
					if head := bufs[i][:offset]; !bytes.Equal(head, bytes.Repeat([]byte{0xaa}, offset)) {
						t.Errorf("before packet %d there is %x", read, head)
					}
					read++
				}
			}
		})
	}
}

// TestReadTooLong drops what no buffer holds and goes on with the packet after it.
func TestReadTooLong(t *testing.T) {
	tunnel, host := pipe(t, overlay.Config{})
	long, short := overlay.Packet{Data: superpacket(30).Data}, overlay.Packet{Data: superpacket(2).Data}
	if _, err := host.Queues()[0].WriteBatch([]overlay.Packet{long, short}); err != nil {
		t.Fatal(err)
	}
	bufs, sizes := buffersOf(2, 1000)
	if n, err := tunnel.Read(bufs, sizes, offset); n != 1 || err != nil || sizes[0] != len(short.Data) {
		t.Errorf("Read = %d, %v with %d bytes; want one packet of %d", n, err, sizes[0], len(short.Data))
	}
}

func TestWrite(t *testing.T) {
	tunnel, host := pipe(t, overlay.Config{})
	want := [][]byte{superpacket(1).Data, superpacket(3).Data}
	var bufs [][]byte
	for _, packet := range want {
		bufs = append(bufs, append(make([]byte, offset), packet...))
	}
	bufs = append(bufs, append(make([]byte, offset), 0xff)) // not IP, and wireguard is not told
	for range 3 {
		if n, err := tunnel.Write(bufs, offset); n != len(want) || err != nil {
			t.Fatalf("Write = %d, %v; want %d", n, err, len(want))
		}
		got, err := host.Queues()[0].ReadBatch()
		if err != nil || len(got) != len(want) {
			t.Fatalf("the host reads %d packets, %v; want %d", len(got), err, len(want))
		}
		for i := range want {
			if !bytes.Equal(got[i].Data, want[i]) {
				t.Errorf("packet %d is\n%x, want\n%x", i, got[i].Data, want[i])
			}
		}
	}
	if refused := tunnel.dev.Stats().WriteRefused; refused != 3 {
		t.Errorf("%d packets refused, want 3", refused)
	}
}

// TestGone deletes the link under the tunnel, and closes it.
func TestGone(t *testing.T) {
	for name, end := range map[string]struct {
		close func(*tunnel, overlay.Device) error
		want  error
	}{
		"deleted": {func(_ *tunnel, host overlay.Device) error { return host.Close() }, overlay.ErrGone},
		"closed":  {func(tunnel *tunnel, _ overlay.Device) error { return tunnel.Close() }, os.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			tunnel, host := pipe(t, overlay.Config{})
			bufs, sizes := buffersOf(1, 2000)
			read := make(chan error, 1)
			go func() {
				_, err := tunnel.Read(bufs, sizes, offset)
				read <- err
			}()
			time.Sleep(time.Millisecond) // most likely it waits by now; if not, it shall see the end all the same
			if err := end.close(tunnel, host); err != nil {
				t.Fatal(err)
			}
			if err := <-read; !errors.Is(err, end.want) {
				t.Errorf("Read: %v, want %v", err, end.want)
			}
			if _, err := tunnel.Write([][]byte{append(make([]byte, offset), superpacket(1).Data...)}, offset); !errors.Is(err, end.want) {
				t.Errorf("Write: %v, want %v", err, end.want)
			}
		})
	}
}

// TestEvents follows a life: up, another MTU, the end.
func TestEvents(t *testing.T) {
	tunnel, _ := pipe(t, overlay.Config{MTU: 1400})
	if e := <-tunnel.Events(); e != tun.EventUp|tun.EventMTUUpdate {
		t.Errorf("event %b, want up and the MTU", e)
	}
	if err := tunnel.dev.Reload(overlay.Config{MTU: 1350}); err != nil {
		t.Fatal(err)
	}
	if e := <-tunnel.Events(); e != tun.EventMTUUpdate {
		t.Errorf("event %b, want the MTU alone", e)
	}
	if mtu, err := tunnel.MTU(); mtu != 1350 || err != nil {
		t.Errorf("MTU %d, %v; want 1350", mtu, err)
	}
	if err := tunnel.Close(); err != nil {
		t.Fatal(err)
	}
	for range tunnel.Events() { // the test ends if the channel does
	}
}

// FuzzRead takes any superpackets and numbers of buffers: every packet comes once and in order, whatever the two make of each
// other.
func FuzzRead(f *testing.F) {
	f.Add([]byte{1, 5, 200}, uint8(3))
	f.Fuzz(func(t *testing.T, segments []byte, buffers uint8) {
		if buffers == 0 || len(segments) == 0 || len(segments) > 100 {
			return
		}
		dev, host, err := overlay.Pipe(overlay.Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}})
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		tunnel := &tunnel{dev: dev, queue: dev.Queues()[0]}
		defer tunnel.Close()
		if err := dev.Activate(); err != nil {
			t.Fatal(err)
		}
		var want []byte
		for _, n := range segments {
			if _, err := host.Queues()[0].WriteBatch([]overlay.Packet{superpacket(int(n) + 1)}); err != nil {
				t.Fatal(err)
			}
			for i := range int(n) + 1 {
				want = append(want, byte(i))
			}
		}
		var got []byte
		bufs, sizes := buffersOf(int(buffers), 200)
		for len(got) < len(want) {
			n, err := tunnel.Read(bufs, sizes, offset)
			if err != nil || n == 0 {
				t.Fatalf("Read = %d, %v", n, err)
			}
			for i := range n {
				got = append(got, bufs[i][offset+sizes[i]-1])
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("packets\n%v, want\n%v", got, want)
		}
	})
}
