package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// train is a form whose packets follow each other.
type train struct {
	*form
	size int
	step uint16 // of the identification
}

func randomFlow(r *rand.Rand) *train {
	f := &train{form: randomForm(r, r.IntN(2) == 0, r.IntN(2) == 0), step: uint16(min(1, r.IntN(4)))}
	f.size = []int{1, 2, 64, 1300, 1448, 1 + r.IntN(roadMTU-f.headerLen())}[r.IntN(6)]
	if r.IntN(4) > 0 { // mergeable
		f.options, f.flags = nil, tcpFlagACK
		if f.v6 && r.IntN(2) == 0 {
			f.extensions, f.first = nil, f.protocol()
		}
	}
	return f
}

const (
	tcpFlagACK = 0x10
	tcpFlagPSH = 0x08
)

// next is the flow's next packet.
func (f *train) next(r *rand.Rand, n int) []byte {
	p := f.finished(randomBytes(r, n))
	f.seq += uint32(n)
	f.id += f.step
	return p
}

// randomBurst mixes packets of a few flows, most of them in good order, with what must not be merged.
func randomBurst(r *rand.Rand) (burst []Packet) {
	flows := make([]*train, 1+r.IntN(8))
	for i := range flows {
		flows[i] = randomFlow(r)
	}
	odd := 1 + r.IntN(40)
	most, room := 1+r.IntN(200), 1<<20
	for f := flows[0]; len(burst) < most && room > 0; {
		if r.IntN(3) == 0 {
			f = flows[r.IntN(len(flows))]
		}
		n := f.size
		if r.IntN(20) == 0 {
			n = 1 + r.IntN(n)
		}
		p := Packet{}
		switch {
		case r.IntN(odd) == 0:
			p = f.strange(r, n)
		case !f.udp && r.IntN(20) == 0:
			before := f.flags
			f.flags |= tcpFlagPSH
			p.Data = f.next(r, n)
			f.flags = before
		default:
			p.Data = f.next(r, n)
		}
		if p.Segments() > 0 && len(p.Data) > 0 {
			burst, room = append(burst, p), room-len(p.Data)
		}
	}
	return burst
}

// strange is a packet of the flow, or nearly, with something odd about it. What it has before its payload is never cut, so that the
// kernel takes it for a packet.
func (f *train) strange(r *rand.Rand, n int) Packet {
	p := f.next(r, n)
	transport := f.headerLen() - 20 - len(f.tcpOptions)
	if f.udp {
		transport = f.headerLen() - 8
	}
	switch r.IntN(12) {
	case 0: // a wrong checksum
		p[len(p)-1] ^= 1 + byte(r.IntN(255))
	case 1:
		p = f.next(r, 0)
	case 2:
		f.seq++
	case 3:
		f.id++
	case 4:
		f.step ^= 1
	case 5: // a fragment, of either kind
		if !f.v6 {
			p[6] |= 0x20 * byte(r.IntN(2))
			p[7] = byte(r.IntN(2))
			p = sumHeader(p)
		}
	case 6:
		f.size = 1 + r.IntN(n+1)
		return Packet{f.packet(randomBytes(r, 1+r.IntN(min(4000, 40*f.size)))), f.size}
	case 7: // the end of the data is not the end of the packet
		p = append(p, 0)
	case 8: // of another protocol, without ports
		if !f.v6 {
			p[9] = 47
			p = sumHeader(p)
		}
	case 9: // no checksum
		if f.udp {
			p[transport+6], p[transport+7] = 0, 0
		}
	case 10: // any bit of the transport header
		p[transport+r.IntN(min(8, len(p)-transport))] ^= 1 << r.IntN(8)
	default: // any bit of the IP header but the addresses
		p[r.IntN(12)] ^= 1 << r.IntN(8)
		if p[0]>>4 == 4 && len(p) >= 20 {
			p = sumHeader(p)
		}
	}
	return Packet{Data: p}
}

// portless is the name of a packet that ends before its ports: the kernel forwards no more of it than its header says. It is of no flow.
const portless = "cut short"

// flowName says which flow a packet is of; "": any of those between its addresses, for it shows no ports.
func flowName(p []byte) (addresses, name string) {
	switch {
	case p[0]>>4 == 4:
		addresses = string(p[12:20])
		n := int(p[0]&0xf) * 4
		switch {
		case binary.BigEndian.Uint16(p[6:])&0x3fff != 0, p[9] != 6 && p[9] != 17:
		case len(p) >= n+8:
			name = string(p[9]) + string(p[n:n+4])
		default:
			name = portless
		}
	case p[0]>>4 == 6:
		addresses = string(p[8:40])
		at, protocol, ok := transportOf(p)
		switch {
		case ok:
			name = string(protocol) + string(p[at:at+4])
		case len(p) < at+8:
			name = portless
		}
	}
	return addresses, name
}

// transportOf skips the extension headers of a road.
func transportOf(p []byte) (at int, protocol byte, ok bool) {
	at, protocol = 40, p[6]
	for (protocol == 0 || protocol == 43 || protocol == 60) && len(p) >= at+8 {
		protocol, at = p[at], at+8+8*int(p[at+1])
	}
	return at, protocol, (protocol == 6 || protocol == 17) && len(p) >= at+8
}

// byFlow sorts packets by their flows, each with those that show no ports in between. The identification of what must not be fragmented
// is left out: merged from equal ones, it counts up afterwards (RFC 6864).
func byFlow(packets []Packet, names map[string][]string) map[string][]string {
	flows := make(map[string][]string)
	for _, p := range packets {
		data := p.Data
		if data[0]>>4 == 4 && binary.BigEndian.Uint16(data[6:])&0x7fff == 0x4000 {
			data = bytes.Clone(data)
			data[4], data[5] = 0, 0
			data = sumHeader(data)
		}
		addresses, name := flowName(data)
		if name != "" {
			flows[addresses+name] = append(flows[addresses+name], string(data))
			continue
		}
		for _, name := range append(names[addresses], "") {
			flows[addresses+name] = append(flows[addresses+name], string(data))
		}
	}
	return flows
}

// namesOf lists the flows between each pair of addresses.
func namesOf(packets []Packet) map[string][]string {
	names := make(map[string][]string)
	for _, p := range packets {
		if addresses, name := flowName(p.Data); name != "" && name != portless && !slices.Contains(names[addresses], name) {
			names[addresses] = append(names[addresses], name)
		}
	}
	return names
}

// Oracle O7: what is merged and taken apart again by the kernel is, flow by flow, what comes of the same packets without offloads: the
// same bytes in the same order, wrong checksums and all.
func TestMergingChangesNothing(t *testing.T) {
	w, r := newRoad(t, OffloadTCP|OffloadUDP), seeded(t)
	packets := 0
	for round := range 100 {
		burst := randomBurst(r)
		before := clonePackets(burst)
		n, err := w.in.Queues()[0].WriteBatch(burst)
		got := w.collect()
		if !slices.EqualFunc(burst, before, samePacket) {
			t.Fatalf("round %d: WriteBatch changed its packets", round)
		}
		m, bad := w.plain.Queues()[0].WriteBatch(burst)
		want := w.collect()
		if n != m || errors.Is(err, unix.EINVAL) != errors.Is(bad, unix.EINVAL) || (err == nil) != (bad == nil) {
			t.Fatalf("round %d: %d taken, %v; without offloads %d, %v", round, n, err, m, bad)
		}
		packets += len(want)
		if err := sameFlows(got, want); err != nil {
			t.Fatalf("round %d, a burst of %d: %v", round, len(burst), err)
		}
	}
	s := w.in.Stats()
	if want := w.plain.Stats().WritePackets; s.WritePackets+uint64(w.marks) != want {
		t.Errorf("%d packets written with offloads, %d without", s.WritePackets, want)
	}
	t.Logf("%d packets forwarded, %d superpackets made", packets, s.WriteSuper)
	if packets < 2000 || s.WriteSuper < 200 || s.OffloadFails != 0 {
		t.Errorf("%d packets forwarded, too little merged or too much refused: %+v", packets, s)
	}
}

func clonePackets(packets []Packet) []Packet {
	clone := make([]Packet, len(packets))
	for i, p := range packets {
		clone[i] = Packet{bytes.Clone(p.Data), p.SegmentSize}
	}
	return clone
}

func samePacket(a, b Packet) bool {
	return a.SegmentSize == b.SegmentSize && bytes.Equal(a.Data, b.Data)
}

func sameFlows(got, want []Packet) error {
	names := namesOf(want)
	is, shall := byFlow(got, names), byFlow(want, names)
	for name, packets := range shall {
		for i, p := range packets {
			switch {
			case i >= len(is[name]):
				return fmt.Errorf("packet %d of %d is missing: %x", i, len(packets), p[:min(len(p), 120)])
			case is[name][i] != p:
				return fmt.Errorf("packet %d of %d of a flow%s", i, len(packets), whereOther([]byte(is[name][i]), []byte(p)))
			}
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("%d packets, without offloads %d", len(got), len(want))
	}
	return nil
}
