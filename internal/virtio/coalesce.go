package virtio

// MaxBatch is how many packets a Coalescer takes between two calls of Reset: eight streams, each with a superpacket's worth of
// Ethernet-sized packets, fit. It bounds the memory of a Coalescer to some 320 KiB, with the longest headers; a burst of 128 ordinary packets needs 40.
const MaxBatch = 512

// Limits of a superpacket.
const (
	maxSuper        = 0xffff // bytes of a merged one: what IPv4's total length can say, and the kernel's own limit for both versions
	maxSegments     = 128    // kernels since 6.9 refuse more datagrams; TCP segments of ordinary size end at 64 KiB before
	fewestDatagrams = 64     // what every kernel with UDP segmentation takes (UDP_MAX_SEGMENTS before 6.9)
	maxHeaders      = 256    // of IP and transport, which are copied; longer ones are not worth it
)

// Outcome says what became of a packet.
type Outcome uint8

// Outcomes of Coalescer.Add. After Full and Refused nothing has changed.
const (
	Added   Outcome = iota
	Full            // there are MaxBatch packets: write them, Reset and add this one again
	Refused         // a superpacket that the device cannot take as a whole, or a malformed one, which has no Segments
)

// Coalescer merges a burst of packets into superpackets: what belongs together becomes one write, headers rewritten and payload left
// where it is. Its zero value merges nothing; the fields may change before each burst. It is not for concurrent use.
//
// What may be merged is what the kernel's own receive offload would merge, or less: splitting a superpacket gives back the very
// packets that it was merged from, but for the IPv4 identification where that was constant with "don't fragment" set, which counts up
// afterwards (nobody looks at it then: RFC 6864). A packet with a wrong checksum passes as it is. The order within a flow, addresses,
// protocol and ports, stays; for packets that do not show their ports, such as fragments, the order among all between the same
// addresses.
type Coalescer struct {
	TCP, UDP     bool // merge such packets, take such superpackets
	MaxDatagrams int  // per UDP superpacket, at most 128; 0 means 64: kernels before 6.9 refuse more
	HeaderSize   int  // bytes of virtio header before each packet, zero beyond HeaderLen; 0 means HeaderLen

	pieces []piece
	groups []group
	flows  flowTable

	// What Writes builds, in memory that is large enough before it begins.
	writes  []Write
	parts   [][]byte
	numbers []int
	memory  []byte
}

// Write is what goes to the device in one writev. It is good until Reset, and its slices are not to be changed.
type Write struct {
	Parts    [][]byte // the bytes: a virtio header, in a superpacket with the packet's headers in the same part, then packet or payloads
	Len      int      // of all Parts
	Header   Header   // at the start of Parts; the zero Header precedes a packet that is written as it came
	Packets  []int    // the numbers of the packets in it, in order; at least one
	Segments int      // packets after splitting; more than there are Packets only in a superpacket that was added as one
}

// piece is one packet that was added.
type piece struct {
	data   []byte
	number int
	next   int32 // the next one in its group, if it is not the last
}

// group is what one Write will hold.
type group struct {
	layout      // of the first packet; zero if that has no ports to show
	first, last int32
	count       int32 // pieces
	segments    int32
	size        int  // payload bytes of the first packet, or of a superpacket's segments
	total       int  // bytes of IP
	super       bool // a superpacket that was added as one
	verified    bool // the first packet's checksums are right
	fixedID     bool // more than one packet, with one identification
	push        bool // the last packet has TCP's push flag
}

// Reset forgets all packets. Nothing keeps them alive afterwards.
func (c *Coalescer) Reset() {
	clear(c.pieces)
	clear(c.parts)
	clear(c.writes)
	c.pieces, c.groups, c.writes = c.pieces[:0], c.groups[:0], c.writes[:0]
	c.parts, c.numbers, c.memory = c.parts[:0], c.numbers[:0], c.memory[:0]
	c.flows.reset()
}

// Add takes a packet, or a superpacket if segmentSize is not 0, which is written as a whole. Until Reset data is not to be changed, and
// Add never does. The number is the caller's own and comes back in Write.Packets; it may be any, even one that was there before.
//
// Of a superpacket that is Refused the segments may be added instead, as packets. What was added before must be written first only if
// they go another way.
func (c *Coalescer) Add(number int, data []byte, segmentSize int) Outcome {
	switch {
	case len(c.pieces) >= MaxBatch:
		return Full
	case segmentSize != 0:
		return c.addSuper(number, data, segmentSize)
	}
	var l layout
	if !l.parse(data) {
		c.flows.closeBetween(c, data)
		c.start(number, data, &layout{})
		return Added
	}
	fit := c.mergeable(data, &l)
	key := l.flowKey(data)
	if at := c.flows.find(c, key, data, &l); at != nil {
		g := &c.groups[*at-1]
		if fit && c.join(g, number, data, &l) {
			if !g.open(c.limit(g.protocol)) {
				c.flows.close(at)
			}
			return Added
		}
		c.flows.close(at)
	}
	g := c.start(number, data, &l)
	if fit && g.open(c.limit(g.protocol)) {
		c.flows.put(key, len(c.groups)-1)
	}
	return Added
}

func (c *Coalescer) addSuper(number int, data []byte, segmentSize int) Outcome {
	var s Superpacket
	if !s.Parse(data, segmentSize) || s.payload > maxHeaders || !c.merges(s.protocol) {
		return Refused
	}
	n := s.Segments()
	if s.protocol == protoUDP && n > c.limit(protoUDP) {
		return Refused
	}
	if at := c.flows.find(c, s.flowKey(data), data, &s.layout); at != nil {
		c.flows.close(at)
	}
	g := c.start(number, data, &s.layout)
	g.super, g.size, g.segments = true, segmentSize, int32(n)
	return Added
}

// start begins a group with a packet.
func (c *Coalescer) start(number int, data []byte, l *layout) *group {
	i := int32(len(c.pieces))
	c.pieces = append(c.pieces, piece{data: data, number: number})
	c.groups = append(c.groups, group{layout: *l, first: i, last: i, count: 1, segments: 1, size: len(data) - l.payload, total: len(data)})
	return &c.groups[len(c.groups)-1]
}

// join adds a mergeable packet to the open group of its flow; false: it does not belong there, and nothing has changed. The first
// packet's checksums are verified only now that there is a second, so that packets without company cost less.
func (c *Coalescer) join(g *group, number int, data []byte, l *layout) bool {
	head := c.pieces[g.first].data
	if !g.continuedBy(head, data, l) || !g.verified && !valid(head, &g.layout) || !valid(data, l) {
		return false
	}
	g.verified = true
	g.fixedID = l.version == 4 && sameID(head, data)
	g.push = l.protocol == protoTCP && data[l.transport+13]&tcpPSH != 0

	i := int32(len(c.pieces))
	c.pieces = append(c.pieces, piece{data: data, number: number})
	c.pieces[g.last].next = i
	g.last = i
	g.count++
	g.segments++
	g.total += len(data) - l.payload
	return true
}

// open tells whether another packet may join: not after a push, nor a packet that was shorter than the first.
func (g *group) open(limit int) bool {
	return !g.push && int(g.count) < limit && g.total-g.payload == int(g.count)*g.size
}

// merges tells whether superpackets of the protocol are wanted.
func (c *Coalescer) merges(protocol uint8) bool {
	return protocol == protoTCP && c.TCP || protocol == protoUDP && c.UDP
}

// limit returns how many packets there may be in a superpacket.
func (c *Coalescer) limit(protocol uint8) int {
	switch {
	case protocol == protoTCP:
		return maxSegments
	case c.MaxDatagrams <= 0:
		return fewestDatagrams
	}
	return min(c.MaxDatagrams, maxSegments)
}
