package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ReadBatch waits for a first packet, then drains what is ready, in order, and no further than it has room.
func TestReadBatchDrainsInOrder(t *testing.T) {
	r := newRig(t, Config{})
	w, done := r.tap(), make(chan error, 1)
	go func() {
		packets, err := r.q.ReadBatch()
		if err == nil && (len(packets) != 1 || !bytes.Equal(packets[0].Data, sequence(0))) {
			err = fmt.Errorf("got %d packets", len(packets))
		}
		done <- err
	}()
	parked(t, "tunQueue).ReadBatch(", 1)
	w.send(sequence(0))
	if err := returns(t, patience, "ReadBatch", done); err != nil {
		t.Fatal(err)
	}
	const ready = 300
	var bytesRead int
	for i := range ready {
		w.send(sequence(i))
		bytesRead += len(sequence(i))
	}
	next := 0
	var lengths []int
	for next < ready {
		packets, err := r.q.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range packets {
			if !bytes.Equal(p.Data, sequence(next)) || p.SegmentSize != 0 {
				t.Fatalf("packet %d: got %d bytes of packet %d", next, len(p.Data), binary.BigEndian.Uint32(p.Data[20:]))
			}
			next++
		}
		lengths = append(lengths, len(packets))
	}
	if want := []int{readMost, readMost, ready - 2*readMost}; !slices.Equal(lengths, want) {
		t.Errorf("batches of %v packets, want %v", lengths, want)
	}
	r.requireStats(Stats{ReadPackets: ready + 1, ReadBytes: uint64(bytesRead + len(sequence(0)))})
}

// The packets are the caller's until the next read: none overlaps another, appending to one leaves the others alone, and
// what happens to them does no harm to what comes.
func TestReadBatchPacketsAreTheCallers(t *testing.T) {
	r := newRig(t, Config{})
	w := r.tap()
	for round := range 3 {
		const n = 50
		for i := range n {
			w.send(sequence(round*n + i))
		}
		packets, err := r.q.ReadBatch()
		if err != nil || len(packets) != n {
			t.Fatalf("got %d packets, %v", len(packets), err)
		}
		for _, p := range packets {
			_ = append(p.Data, "what comes after"...)
		}
		for i, p := range packets {
			if !bytes.Equal(p.Data, sequence(round*n+i)) {
				t.Fatalf("packet %d was changed by its neighbour", i)
			}
			clear(p.Data)
		}
		clear(packets)
	}
}

// The largest packets fit whatever is before them in the batch.
func TestReadBatchOfTheLargest(t *testing.T) {
	r := newRig(t, Config{MTU: maxMTU})
	w := r.tap()
	for _, lengths := range [][]int{
		slices.Repeat([]int{maxMTU}, 9),
		append(slices.Repeat([]int{9000}, 21), maxMTU, maxMTU), // 21 leave less than one of the largest needs
		append(slices.Repeat([]int{1536}, readMost-1), maxMTU, maxMTU),
		{1, maxMTU, 1, maxMTU, 1, maxMTU, 1, maxMTU, 1, maxMTU},
	} {
		for i, n := range lengths {
			w.send(filler(4, n, uint32(i)))
		}
		for i := 0; i < len(lengths); {
			packets, err := r.q.ReadBatch()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range packets {
				if !bytes.Equal(p.Data, filler(4, lengths[i], uint32(i))) {
					t.Fatalf("packet %d: got %d bytes, want %d", i, len(p.Data), lengths[i])
				}
				i++
			}
		}
	}
}

// Read and ReadBatch take turns on one queue without losing or repeating a packet.
func TestReadBetweenReadBatches(t *testing.T) {
	r := newRig(t, Config{})
	w, buf := r.tap(), make([]byte, maxPacket)
	for i := range 20 {
		w.send(sequence(i))
	}
	n, err := r.q.Read(buf)
	if err != nil || !bytes.Equal(buf[:n], sequence(0)) {
		t.Fatalf("Read: %d bytes, %v", n, err)
	}
	packets, err := r.q.ReadBatch()
	if err != nil || len(packets) != 19 || !bytes.Equal(packets[18].Data, sequence(19)) {
		t.Fatalf("ReadBatch: %d packets, %v", len(packets), err)
	}
	w.send(sequence(20))
	if n, err = r.q.Read(buf); err != nil || !bytes.Equal(buf[:n], sequence(20)) {
		t.Fatalf("Read after it: %d bytes, %v", n, err)
	}
	w.send(sequence(21))
	if packets, err = r.q.ReadBatch(); err != nil || len(packets) != 1 || !bytes.Equal(packets[0].Data, sequence(21)) {
		t.Fatalf("ReadBatch after that: %d packets, %v", len(packets), err)
	}
}

// Of a mixture WriteBatch takes what it can, in order, counts what the filter dropped as taken, and tells of the first refusal.
func TestWriteBatchOfAMixture(t *testing.T) {
	r := newRig(t, Config{NoOffload: OffloadTCP | OffloadUDP})
	w := r.tap()
	redirect := filterV4(1, 0, 0, 5, 1, 0, 0)
	malformed := Packet{superTCP4(100), 70_000}
	packets := []Packet{
		{Data: sequence(0)},
		{Data: redirect},
		{superTCP4(25), 10},
		malformed,
		{Data: sequence(1)},
		{Data: []byte{0x20}},
		{superUDP6(25), 25},
		{Data: nil},
		{Data: sequence(2)},
	}
	before := make([]Packet, len(packets))
	for i, p := range packets {
		before[i] = Packet{bytes.Clone(p.Data), p.SegmentSize}
	}
	n, err := r.q.WriteBatch(packets)
	var op *OpError
	if n != 6 || !errors.As(err, &op) || !errors.Is(err, unix.EINVAL) {
		t.Fatalf("got %d, %v, want 6 and EINVAL", n, err)
	}
	super := func(p Packet, i int) []byte { return p.AppendSegment(nil, i) }
	for i, want := range [][]byte{
		sequence(0), super(packets[2], 0), super(packets[2], 1), super(packets[2], 2), sequence(1), super(packets[6], 0), sequence(2),
	} {
		if got := w.next(); !bytes.Equal(got, want) {
			t.Fatalf("packet %d: the kernel got %x\nwant %x", i, got, want)
		}
	}
	size := 0
	for i, p := range packets {
		if !bytes.Equal(p.Data, before[i].Data) || p.SegmentSize != before[i].SegmentSize {
			t.Errorf("packet %d was changed", i)
		}
		if i != 1 && i != 3 && i != 5 && i != 7 {
			size += len(p.Data)
		}
	}
	r.requireStats(Stats{WritePackets: 7, WriteBytes: uint64(size), WriteSuper: 2, WriteRefused: 3, WriteFiltered: 1})
	tooLong := Packet{Data: filler(4, maxPacket+1, 1)}
	if n, err := r.q.WriteBatch([]Packet{tooLong, malformed, {Data: nil}}); n != 0 || !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("three bad packets: got %d, %v, want what is wrong with the first", n, err)
	}
	if n, err := r.q.WriteBatch(nil); n != 0 || err != nil {
		t.Errorf("an empty batch: got %d, %v", n, err)
	}
}

// Superpackets reach sockets as the packets that they stand for, with checksums that the kernel believes.
func TestWriteBatchSplitsUDP(t *testing.T) {
	r := newRig(t, Config{Networks: []netip.Prefix{own4, own6}, MTU: 1500})
	payload := filler(4, 4321, 9)
	for _, hosts := range [][2]netip.Addr{{peer4, own4.Addr()}, {peer6, own6.Addr()}} {
		conn := r.udp(hosts[1])
		packet := datagram(netip.AddrPortFrom(hosts[0], 7), port(conn), payload)
		packet[len(packet)-len(payload)-1] ^= 0xff // a superpacket's own checksum is unfinished
		if n, err := r.q.WriteBatch([]Packet{{packet, 1000}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		for rest := payload; len(rest) > 0; {
			want := rest[:min(1000, len(rest))]
			buf := make([]byte, 2000)
			n, err := conn.Read(buf)
			if err != nil || !bytes.Equal(buf[:n], want) {
				t.Fatalf("%v: the socket got %d bytes, %v; want %d", hosts[1], n, err, len(want))
			}
			rest = rest[len(want):]
		}
	}
}

// segment makes a TCP packet, finished but for what a superpacket leaves open anyhow.
func segment(src, dst netip.AddrPort, seq, ack uint32, flags byte, payload []byte) []byte {
	tcp := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(tcp, src.Port())
	binary.BigEndian.PutUint16(tcp[2:], dst.Port())
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13], tcp[14] = 5<<4, flags, 0xff
	return transport(src.Addr(), dst.Addr(), 6, append(tcp, payload...), 16)
}

func TestWriteBatchSplitsTCP(t *testing.T) {
	const syn, psh, ack = 2, 8, 16
	r := newRig(t, Config{Networks: []netip.Prefix{own4, own6}, MTU: 1500})
	payload := filler(4, 12345, 5)
	for _, hosts := range [][2]netip.Addr{{peer4, own4.Addr()}, {peer6, own6.Addr()}} {
		var listener *net.TCPListener
		r.ns.Do(t, func() {
			var err error
			if listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(hosts[1], 0))); err != nil {
				t.Fatal(err)
			}
		})
		defer listener.Close()
		here, there := listener.Addr().(*net.TCPAddr).AddrPort(), netip.AddrPortFrom(hosts[0], 777)
		if _, err := r.q.Write(segment(there, here, 1000, 0, syn, nil)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2000)
		header := len(segment(there, here, 0, 0, 0, nil)) - 20
		for buf[header+13] != syn|ack {
			if _, err := r.q.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
		peerSeq := binary.BigEndian.Uint32(buf[header+4:]) + 1
		n, err := r.q.WriteBatch([]Packet{
			{Data: segment(there, here, 1001, peerSeq, ack, nil)},
			{segment(there, here, 1001, peerSeq, ack|psh, payload), 1400},
		})
		if n != 2 || err != nil {
			t.Fatal(n, err)
		}
		if err := listener.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got := make([]byte, len(payload))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, payload) {
			t.Fatalf("%v: the stream differs, %v", hosts[1], err)
		}
	}
}

// A link that goes down half way refuses the rest, which is counted, and only then tells of it.
func TestWriteBatchDownHalfWay(t *testing.T) {
	r := newRig(t, Config{})
	batch := make([]Packet, 64)
	for i := range batch {
		batch[i] = Packet{Data: sequence(i)}
	}
	flaps, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(flaps)
		for {
			select {
			case <-stop:
				return
			default:
				r.ip("link set DEV down")
				r.ip("link set DEV up")
			}
		}
	}()
	var sent, took uint64
	halfWay := false
	for deadline := time.Now().Add(patience); !halfWay && time.Now().Before(deadline); {
		n, err := r.q.WriteBatch(batch)
		if (err == nil) != (n == len(batch)) || err != nil && err != ErrDown {
			t.Errorf("got %d, %v", n, err)
		}
		sent, took = sent+uint64(len(batch)), took+uint64(n)
		halfWay = 0 < n && n < len(batch)
	}
	close(stop)
	<-flaps
	if !halfWay {
		t.Error("the link never went down within a batch")
	}
	if s := r.dev.Stats(); s.WritePackets != took || s.WriteDown != sent-took || s.WriteRefused != 0 {
		t.Errorf("%d of %d packets taken, counters %+v", took, sent, s)
	}
}

// kernel.md V8: where the host overrides the device's settings, the kernel would obey redirects from the overlay; the filter
// stands before it. NoFilter shows that each of these is one that the kernel obeys.
func TestFilterKeepsRedirectsAndRouterAdvertisementsOut(t *testing.T) {
	for _, c := range kernelObeys() {
		t.Run(c.name, func(t *testing.T) {
			for _, bare := range []bool{false, true} {
				r := newRig(t, Config{Networks: []netip.Prefix{own4, own6}, NoFilter: bare})
				for path, value := range c.settings {
					r.sysctl(strings.ReplaceAll(path, "DEV", r.name), value)
				}
				for _, command := range c.before {
					r.ip(command)
				}
				for _, p := range c.packets {
					if n, err := r.q.Write(p); n != len(p) || err != nil {
						t.Fatalf("Write: %d, %v", n, err)
					}
					if n, err := r.q.WriteBatch([]Packet{{Data: p}}); n != 1 || err != nil {
						t.Fatalf("WriteBatch: %d, %v", n, err)
					}
				}
				moved := func() bool { return strings.Contains(r.ns.Run(t, "ip "+c.look), c.sign) }
				n, s := uint64(2*len(c.packets)), r.dev.Stats()
				if bare {
					eventually(t, "the kernel obeys", moved)
				} else if moved() {
					t.Error("the kernel obeyed")
				}
				if bare && (s.WriteFiltered != 0 || s.WritePackets != n) || !bare && (s.WriteFiltered != n || s.WritePackets != 0) {
					t.Errorf("NoFilter %v: counters %+v", bare, s)
				}
			}
		})
	}
}

// obeyed is something that a kernel does on a packet's word.
type obeyed struct {
	name     string
	settings map[string]string
	before   []string // ip …
	packets  [][]byte
	look     string // ip …
	sign     string // in its output
}

func kernelObeys() []obeyed {
	router, other := netip.MustParseAddr("fe80::2"), netip.MustParseAddr("fe80::3")
	far4, far6 := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	allNodes := netip.MustParseAddr("ff02::1")
	inner := transport(own4.Addr(), far4, 1, []byte{0, 0, 0, 0, 0, 0, 0, 0}, 2)
	redirect4 := append([]byte{5, 1, 0, 0, 10, 9, 0, 3}, inner...)
	redirect6 := append(append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, other.AsSlice()...), far6.AsSlice()...)
	advertisement := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
	neighbour := func(src, dst netip.Addr, icmp []byte, extensions ...byte) []byte {
		p := transport(src, dst, 58, bytes.Clone(icmp), 2)
		if p[7] = 255; len(extensions) > 0 {
			p[6], p[5] = 0, p[5]+8 // hop-by-hop options; the short packets here need no carry
			p = slices.Insert(p, 40, extensions...)
		}
		return p
	}
	hopByHop := []byte{58, 0, 1, 4, 0, 0, 0, 0}
	takeRoute6 := []string{"-6 addr add fe80::1/64 dev DEV nodad", "-6 route add 2001:db8::/32 via fe80::2 dev DEV"}
	redirects6 := map[string]string{"net/ipv6/conf/DEV/accept_redirects": "1"}
	advertisements := map[string]string{"net/ipv6/conf/DEV/accept_ra": "1"}
	return []obeyed{
		{
			name: "IPv4 redirect", settings: map[string]string{"net/ipv4/conf/all/accept_redirects": "1"},
			before:  []string{"route add 192.0.2.0/24 via 10.9.0.2 dev DEV"},
			packets: [][]byte{transport(peer4, own4.Addr(), 1, redirect4, 2)},
			look:    "route get 192.0.2.9", sign: "via 10.9.0.3",
		},
		{
			name: "IPv6 redirect", settings: redirects6, before: takeRoute6,
			packets: [][]byte{neighbour(router, own6.Addr(), redirect6)},
			look:    "-6 route get 2001:db8::9", sign: "via fe80::3",
		},
		{
			name: "IPv6 redirect behind hop-by-hop options", settings: redirects6, before: takeRoute6,
			packets: [][]byte{neighbour(router, own6.Addr(), redirect6, hopByHop...)},
			look:    "-6 route get 2001:db8::9", sign: "via fe80::3",
		},
		{
			name: "router advertisement", settings: advertisements,
			packets: [][]byte{neighbour(router, allNodes, advertisement)},
			look:    "-6 route show default", sign: "via fe80::2",
		},
		{
			name: "router advertisement behind hop-by-hop options", settings: advertisements,
			packets: [][]byte{neighbour(router, allNodes, advertisement, hopByHop...)},
			look:    "-6 route show default", sign: "via fe80::2",
		},
	}
}
