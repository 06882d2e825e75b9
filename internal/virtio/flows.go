package virtio

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// The flow table is as an associative cache: what a packet costs is bounded however flows are chosen. Eight flows fit wherever they
// fall; where a ninth falls into the same set, the oldest loses no packet, only further company.
const (
	flowSets = 16
	flowWays = 8
)

// flowTable knows the open groups: at most one per flow, and all earlier packets of that flow are in it or in groups before it. Groups
// are written in the order they were started: so order within a flow holds as long as whatever stays out of a flow's open group
// closes it.
type flowTable struct {
	groups [flowSets][flowWays]int32 // index, plus one so that 0 is none
	tags   [flowSets][flowWays]uint32
	open   int
}

func (t *flowTable) reset() {
	if t.open > 0 {
		*t = flowTable{}
	}
}

// flowKey hashes addresses, protocol and ports.
func (l *layout) flowKey(data []byte) uint64 {
	key := uint64(binary.LittleEndian.Uint32(data[l.transport:])) | uint64(l.protocol)<<32 | uint64(l.version)<<40
	if l.version == 4 {
		return mix(key, binary.LittleEndian.Uint64(data[addresses4:]))
	}
	a := data[addresses6:headerLen6]
	key = mix(key, binary.LittleEndian.Uint64(a)) ^ mix(binary.LittleEndian.Uint64(a[8:]), binary.LittleEndian.Uint64(a[16:]))
	return mix(key, binary.LittleEndian.Uint64(a[24:]))
}

// mix is one round of a multiplicative hash; the constants are only odd and random.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0xa0761d6478bd642f, b^0xe7037ed1a0b428db)
	return hi ^ lo
}

// find returns where the open group of the packet's flow is noted, or nil.
func (t *flowTable) find(c *Coalescer, key uint64, data []byte, l *layout) *int32 {
	set := key % flowSets
	for way, tag := range t.tags[set] {
		at := &t.groups[set][way]
		if tag == uint32(key>>32) && *at != 0 {
			if g := &c.groups[*at-1]; sameFlow(c.pieces[g.first].data, &g.layout, data, l) {
				return at
			}
		}
	}
	return nil
}

// put notes a group of a flow that has none.
func (t *flowTable) put(key uint64, group int) {
	set := &t.groups[key%flowSets]
	way := 0
	for i, other := range set {
		if other < set[way] { // free, or the oldest
			way = i
		}
	}
	if set[way] == 0 {
		t.open++
	}
	set[way] = int32(group + 1)
	t.tags[key%flowSets][way] = uint32(key >> 32)
}

// close forgets what find found.
func (t *flowTable) close(at *int32) {
	*at = 0
	t.open--
}

// closeBetween forgets all groups between the addresses of a packet that shows no ports: a fragment, or anything else that may belong
// to one of their flows. The kernel, too, keeps no order between packets of different addresses, nor for those without.
func (t *flowTable) closeBetween(c *Coalescer, data []byte) {
	if t.open == 0 {
		return
	}
	var l layout
	switch {
	case len(data) >= headerLen4 && data[0]>>4 == 4:
		l.version = 4
	case len(data) >= headerLen6 && data[0]>>4 == 6:
		l.version = 6
	default:
		return
	}
	for set := range t.groups {
		for way := range t.groups[set] {
			at := &t.groups[set][way]
			if *at == 0 {
				continue
			}
			if g := &c.groups[*at-1]; g.version == l.version && sameAddresses(c.pieces[g.first].data, data, l.version) {
				t.close(at)
			}
		}
	}
}

func sameFlow(head []byte, h *layout, data []byte, l *layout) bool {
	return h.version == l.version && h.protocol == l.protocol &&
		binary.LittleEndian.Uint32(head[h.transport:]) == binary.LittleEndian.Uint32(data[l.transport:]) &&
		sameAddresses(head, data, l.version)
}

func sameAddresses(head, data []byte, version uint8) bool {
	if version == 4 {
		return binary.LittleEndian.Uint64(head[addresses4:]) == binary.LittleEndian.Uint64(data[addresses4:])
	}
	return bytes.Equal(head[addresses6:headerLen6], data[addresses6:headerLen6])
}
