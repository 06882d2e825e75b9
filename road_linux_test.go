package overlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
)

// The networks of a road: what comes in by a device of the first goes out by the one of the second.
var (
	out4, out6     = netip.MustParsePrefix("10.10.0.1/24"), netip.MustParsePrefix("fd0a::1/64")
	plain4, plain6 = netip.MustParsePrefix("10.11.0.1/24"), netip.MustParsePrefix("fd0b::1/64")
)

// roadMTU is that of all devices of a road: no packet of these tests is longer.
const roadMTU = 9000

// road is a kernel that forwards: what is written to in, which has offloads, or to plain, which has none, is read from out, which
// has as many as out's Config says. So the kernel itself takes superpackets apart, and tells what became of packets that were merged.
type road struct {
	testing.TB
	ns             *nstest.NS
	in, plain, out Device
	marks          uint16 // packets that ended a collection
}

func newRoad(t testing.TB, outWithout Offload) *road {
	t.Helper()
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	nstest.Leaks(t)
	w := &road{TB: t, ns: nstest.New(t)}
	w.ns.Do(t, func() {
		for _, path := range []string{"ipv4/conf/all/forwarding", "ipv4/conf/default/forwarding", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+path, []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	both := OffloadTCP | OffloadUDP
	w.in = w.device(Config{Name: "in", Networks: []netip.Prefix{own4, own6}})
	w.plain = w.device(Config{Name: "plain", Networks: []netip.Prefix{plain4, plain6}, NoOffload: both})
	w.out = w.device(Config{Name: "out", Networks: []netip.Prefix{out4, out6}, NoOffload: outWithout})
	if got := w.in.State().Offload; got != both {
		t.Skipf("the kernel grants only %v", got)
	}
	return w
}

func (w *road) device(cfg Config) Device {
	w.Helper()
	cfg.NetNS, cfg.MTU, cfg.TxQueueLen = w.ns.Path(), roadMTU, 20_000
	d := newIn(w, w.ns, cfg)
	if err := d.Activate(); err != nil {
		w.Fatal(err)
	}
	return d
}

// send offers a batch and wants all of it taken.
func (w *road) send(d Device, batch []Packet) {
	w.Helper()
	if n, err := d.Queues()[0].WriteBatch(batch); n != len(batch) || err != nil {
		w.Fatalf("%d of %d packets taken, %v", n, len(batch), err)
	}
}

// collect returns copies of what has come out from the road's hosts: the kernel forwards in the writer's own call, so that a packet
// written afterwards comes out last. What the kernel says by itself is left out.
func (w *road) collect() []Packet {
	w.Helper()
	packets, err := w.through(nil)
	if err != nil {
		w.Fatal(err)
	}
	return packets
}

// through sends a batch and collects.
func (w *road) through(batch []Packet) (packets []Packet, err error) {
	w.marks++
	src, dst := netip.AddrPortFrom(peer4, 0xffff), netip.AddrPortFrom(out4.Addr().Next(), w.marks)
	mark := datagram(src, dst, []byte("the last"))
	if n, err := w.in.Queues()[0].WriteBatch(batch); n != len(batch) || err != nil {
		return nil, fmt.Errorf("%d of %d packets taken, %w", n, len(batch), err)
	}
	if _, err := w.plain.Queues()[0].Write(mark); err != nil {
		return nil, err
	}
	late := time.AfterFunc(patience, func() { w.out.Close() })
	defer late.Stop()
	mark = lessHops(mark)
	for {
		batch, err := w.out.Queues()[0].ReadBatch()
		if err != nil {
			return nil, fmt.Errorf("the last packet does not come: %w", err)
		}
		for _, p := range batch {
			switch {
			case bytes.Equal(p.Data, mark):
				return packets, nil
			case forwarded(p.Data):
				packets = append(packets, Packet{bytes.Clone(p.Data), p.SegmentSize})
			}
		}
	}
}

// forwarded tells what a road's hosts sent from what the kernel sends.
func forwarded(p []byte) bool {
	src := packetSrc(p)
	return (own4.Masked().Contains(src) || own6.Masked().Contains(src)) && src != own4.Addr() && src != own6.Addr()
}

func packetSrc(p []byte) (src netip.Addr) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		src, _ = netip.AddrFromSlice(p[12:16])
	case len(p) >= 40 && p[0]>>4 == 6:
		src, _ = netip.AddrFromSlice(p[8:24])
	}
	return src
}

// lessHops returns a packet as a router passes it on (kernel.md V25).
func lessHops(packet []byte) []byte {
	p := bytes.Clone(packet)
	if p[0]>>4 == 6 {
		p[7]--
		return p
	}
	p[8]--
	return sumHeader(p)
}

// sumHeader puts the right checksum into an IPv4 header that has room for it.
func sumHeader(p []byte) []byte {
	h := p[:min(len(p), int(p[0]&0xf)*4)]
	if len(h) < 12 {
		return p
	}
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^onesSum(h))
	return p
}

// onlySegments wants exactly the segments of supers, after one hop, in order.
func onlySegments(got, supers []Packet) error {
	for i, super := range supers {
		super.Data = lessHops(super.Data)
		for j := range super.Segments() {
			want := super.AppendSegment(nil, j)
			what := fmt.Sprintf("superpacket %d of segment size %d, segment %d of %d", i, super.SegmentSize, j, super.Segments())
			if len(got) == 0 {
				return fmt.Errorf("%s: the kernel made none", what)
			}
			if got[0].SegmentSize != 0 || !bytes.Equal(got[0].Data, want) {
				return fmt.Errorf("%s: the kernel's has %d bytes%s", what, len(got[0].Data), whereOther(got[0].Data, want))
			}
			got = got[1:]
		}
	}
	if len(got) > 0 {
		return fmt.Errorf("the kernel made %d more", len(got))
	}
	return nil
}

// whereOther shows the headers of two packets and where they differ.
func whereOther(got, want []byte) string {
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Sprintf(", other from byte %d on:\ngot  %x\nwant %x", at, got[:min(len(got), 120)], want[:min(len(want), 120)])
}

// seeded is a source of randomness whose seed is in the test's log.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 5))
}

// form draws the headers of a flow's packets: of either version and protocol, with options, extensions and whatever flags.
type form struct {
	v6, udp    bool
	src, dst   netip.AddrPort
	options    []byte // of IPv4
	extensions []byte // of IPv6; the first is hop-by-hop options, or none
	first      byte   // protocol of what follows the IPv6 header
	tcpOptions []byte
	tos, ttl   byte
	id, frag   uint16
	seq, ack   uint32
	flags      byte
}

func randomForm(r *rand.Rand, v6, udp bool) *form {
	port := func() uint16 { return uint16(1 + r.IntN(60_000)) }
	f := &form{v6: v6, udp: udp, tos: byte(r.Uint32()), ttl: byte(2 + r.IntN(254)), id: uint16(r.Uint32()), frag: uint16(r.IntN(2)) << 14}
	f.src, f.dst = netip.AddrPortFrom(peer4, port()), netip.AddrPortFrom(out4.Addr().Next(), port())
	f.seq, f.ack, f.flags = uint32(-r.IntN(100_000)), r.Uint32(), byte(r.Uint32())
	f.first = f.protocol()
	if v6 {
		f.src, f.dst = netip.AddrPortFrom(peer6, f.src.Port()), netip.AddrPortFrom(out6.Addr().Next(), f.dst.Port())
		f.extend(r)
	} else if r.IntN(3) == 0 {
		f.options = bytes.Repeat([]byte{1}, 4*(1+r.IntN(10))) // no-operation: a router looks at them
	}
	if !udp {
		f.tcpOptions = randomBytes(r, 4*r.IntN(11))
	}
	return f
}

// extend adds what a router passes on: padding, destination options, and a routing header that is not for it.
func (f *form) extend(r *rand.Rand) {
	next := f.protocol()
	add := func(protocol byte, body ...byte) {
		f.extensions = append(append([]byte{next, byte((len(body) - 6) / 8)}, body...), f.extensions...)
		next = protocol
	}
	if r.IntN(4) == 0 {
		add(60, append([]byte{1, 12}, make([]byte, 12)...)...)
	}
	if r.IntN(4) == 0 {
		left := byte(r.IntN(2)) // segments left: the checksum covers the address inside
		add(43, append([]byte{4, left, 0, 0, 0, 0}, randomBytes(r, 16)...)...)
	}
	if r.IntN(4) == 0 {
		add(0, 1, 4, 0, 0, 0, 0)
	}
	f.first = next
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func (f *form) protocol() byte {
	if f.udp {
		return 17
	}
	return 6
}

// headerLen is that of all headers.
func (f *form) headerLen() int {
	n := 20 + len(f.options)
	if f.v6 {
		n = 40 + len(f.extensions)
	}
	if f.udp {
		return n + 8
	}
	return n + 20 + len(f.tcpOptions)
}

// packet puts the headers before a payload, lengths right and checksums unfinished.
func (f *form) packet(payload []byte) []byte {
	n := f.headerLen() + len(payload)
	p := make([]byte, 0, n)
	if f.v6 {
		p = append(p, 0x60|f.tos>>4, f.tos<<4, 0, 7, byte((n-40)>>8), byte(n-40), f.first, f.ttl)
		p = append(append(append(p, f.src.Addr().AsSlice()...), f.dst.Addr().AsSlice()...), f.extensions...)
	} else {
		p = append(p, 0x45+byte(len(f.options)/4), f.tos, byte(n>>8), byte(n), byte(f.id>>8), byte(f.id), byte(f.frag>>8), byte(f.frag), f.ttl, f.protocol(), 0, 0)
		p = sumHeader(append(append(append(p, f.src.Addr().AsSlice()...), f.dst.Addr().AsSlice()...), f.options...))
	}
	p = binary.BigEndian.AppendUint16(p, f.src.Port())
	p = binary.BigEndian.AppendUint16(p, f.dst.Port())
	if f.udp {
		p = append(p, byte((8+len(payload))>>8), byte(8+len(payload)), 0, 0)
	} else {
		p = binary.BigEndian.AppendUint32(p, f.seq)
		p = binary.BigEndian.AppendUint32(p, f.ack)
		p = append(p, byte(5+len(f.tcpOptions)/4)<<4, f.flags, 1, 2, 0, 0, 0, 3)
		p = append(p, f.tcpOptions...)
	}
	return append(p, payload...)
}

// finished is packet with right checksums: a superpacket of one segment is split.
func (f *form) finished(payload []byte) []byte {
	return Packet{f.packet(append(payload, 0)[:max(1, len(payload))]), 0xffff}.AppendSegment(nil, 0)
}
