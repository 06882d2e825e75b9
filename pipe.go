package overlay

import (
	"cmp"
	"errors"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"sync/atomic"
)

// Pipe returns an in-memory Device and host, the end that plays the kernel; closing host is to dev what deleting the link is.
// It is for programs that test without root, on any system.
//
// What is written to a queue of one end is copied, and read in the same order from the other end's queue of the same number,
// or the next open one where that is closed. A queue keeps Config.TxQueueLen packets for its reader, a superpacket being one.
// What comes when it is full is dropped: the writer, who never waits, is not told; ReadDropped of the reading end counts it,
// as it does what is lost with a queue.
//
// dev is what New returns, but for this:
//
//   - A superpacket arrives as one or, where NoOffload names its protocol, as the packets that it stands for. Nothing is merged.
//   - Until Activate, what host writes is dropped. The link does not go down again.
//   - State has Index 1 and the MTU that cfg asks for. The Name "" becomes pipe0, and %d becomes 0.
//   - A write fails with ErrDown, ErrGone, os.ErrClosed, or an *OpError for a packet that is empty, longer than 65,535 bytes or
//     not IP, or a superpacket that cannot be split. File is errors.ErrUnsupported.
//   - What only a kernel could put in force is checked, and without effect: Mode, Owner, Group, NetNS, Persist, SystemRoutes….
//     Disabled is refused.
//
// host is up from the start and has no routes. What it writes passes no filter and need not be IP. Its Activate does nothing,
// its Reload is errors.ErrUnsupported. Once host or its last queue is closed, dev is gone: ErrGone, EventGone, State.Index 0;
// its backlog is lost. Once dev or its last queue is closed, host still reads what was written before, then it is gone too.
//
// Errors: *ConfigError, as from Validate.
func Pipe(cfg Config) (dev, host Device, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, nil, err
	}
	if cfg.Disabled {
		return nil, nil, &ConfigError{Field: "Disabled", Value: true, Err: errors.New("a device that is none has no other end")}
	}
	w, name := newWire(cfg), memoryName(cfg.Name, "pipe0")
	d, h := newMemoryDevice(w, name), newMemoryDevice(w, name)
	d.peer, h.peer = h, d
	w.ends = []*memoryDevice{d, h}
	d.logTo(cfg.Logger)
	d.publish(w.cfg.Load())
	h.host = true
	h.up.Store(true)
	return d, h, nil
}

// memoryName is what becomes of Config.Name, where no kernel chooses.
func memoryName(name, unnamed string) string {
	return cmp.Or(strings.ReplaceAll(name, "%d", "0"), unnamed)
}

// wire is what the two ends of a Pipe share. An idle device has one for itself.
type wire struct {
	cfg  atomic.Pointer[Config] // in force; dev's Reload stores another, nobody changes one that is stored
	gone atomic.Bool
	ends []*memoryDevice
}

func newWire(cfg Config) *wire {
	w := new(wire)
	own := cfg.clone()
	w.cfg.Store(&own)
	return w
}

// cut ends the link for both.
func (w *wire) cut() {
	if w.gone.Swap(true) {
		return
	}
	for _, d := range w.ends {
		d.lose()
	}
}

// memoryQueue is one queue of a memoryDevice. It holds what the other end wrote until it is read.
type memoryQueue struct {
	traffic
	device *memoryDevice
	index  int
	closed atomic.Bool
	once   sync.Once

	readMu sync.Mutex // reads take turns
	taken  batch      // by the reader; what it has not handed out yet still waits
	parts  batch      // the packets of a superpacket that Read has met

	mu      sync.Mutex // locked after readMu
	arrived sync.Cond  // a packet, or the end; its lock is mu
	backlog batch
	waiting int // packets in backlog and taken that are not handed out

	writeMu sync.Mutex // so do writes
	split   batch      // the packets of the superpacket that is written, where it may not go whole
}

func (q *memoryQueue) sealed() {}

// over returns why nothing goes through the queue any more, or nil.
func (q *memoryQueue) over() error {
	switch {
	case q.closed.Load():
		return os.ErrClosed
	case q.device.wire.gone.Load():
		return ErrGone
	}
	return nil
}

// ReadBatch implements Queue.
func (q *memoryQueue) ReadBatch() ([]Packet, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	packets := q.parts.take(math.MaxInt)
	if len(packets) == 0 {
		var err error
		if packets, err = q.await(math.MaxInt); err != nil {
			return nil, err
		}
	}
	for _, p := range packets {
		q.read(p)
	}
	return packets, nil
}

// Read implements Queue.
func (q *memoryQueue) Read(p []byte) (int, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	packet, err := q.next()
	switch {
	case err != nil:
		return 0, err
	case len(packet.Data) > len(p):
		q.dropped(packet)
		return 0, io.ErrShortBuffer
	}
	q.read(packet)
	return copy(p, packet.Data), nil
}

// next returns the next finished packet; the caller holds readMu.
func (q *memoryQueue) next() (Packet, error) {
	for q.parts.empty() {
		packets, err := q.await(1)
		if err != nil {
			return Packet{}, err
		}
		if packets[0].SegmentSize == 0 {
			return packets[0], nil
		}
		q.readSuper.Add(1)
		q.parts.split(packets[0])
	}
	return q.parts.take(1)[0], nil
}

// await waits for packets and takes at most so many; the caller holds readMu. The bytes that the read before handed out are
// the writers' again when it swaps.
func (q *memoryQueue) await(most int) ([]Packet, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed.Load() {
		if q.taken.empty() && !q.backlog.empty() {
			q.taken, q.backlog = q.backlog, q.taken
			q.backlog.reset()
		}
		if packets := q.taken.take(most); len(packets) > 0 {
			q.waiting -= len(packets)
			return packets, nil
		}
		if q.device.wire.gone.Load() {
			return nil, ErrGone
		}
		q.arrived.Wait()
	}
	return nil, os.ErrClosed
}

// put copies packets from the other end into the backlog, or drops them; false, and none of them, if the queue is closed.
func (q *memoryQueue) put(packets []Packet) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed.Load() {
		return false
	}
	room := cmp.Or(q.device.wire.cfg.Load().TxQueueLen, defaultTxQueueLen)
	for _, p := range packets {
		if !q.device.up.Load() || q.waiting >= room {
			q.dropped(p)
			continue
		}
		q.backlog.add(p)
		q.waiting++
	}
	q.arrived.Signal()
	return true
}

// dropped counts a packet that the reader does not get.
func (q *memoryQueue) dropped(p Packet) {
	n := 1
	if p.SegmentSize != 0 {
		n = p.Segments()
	}
	q.readDropped.Add(uint64(n))
}

// Write implements Queue.
func (q *memoryQueue) Write(p []byte) (int, error) {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	if err := q.offer(Packet{Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteBatch implements Queue.
func (q *memoryQueue) WriteBatch(packets []Packet) (taken int, first error) {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	if err := q.over(); err != nil {
		return 0, err
	}
	for i := range packets {
		err := q.offer(packets[i])
		if err == nil {
			taken++
			continue
		}
		if first == nil {
			first = err
		}
		if errors.Is(err, ErrGone) || errors.Is(err, os.ErrClosed) {
			break // so will be what comes after
		}
	}
	return taken, first
}

// offer writes one packet; the caller holds writeMu.
func (q *memoryQueue) offer(p Packet) error {
	if err := q.over(); err != nil {
		return err
	}
	d := q.device
	cfg := d.wire.cfg.Load()
	if !d.host && !cfg.NoFilter && filtered(p.Data) {
		q.writeFiltered.Add(1)
		return nil
	}
	err := opError("write to", d.name, d.flaw(p))
	if err == nil && !d.up.Load() {
		err = ErrDown
	}
	if err != nil {
		q.failed(err)
		return err
	}
	if !q.deliver(p, cfg) {
		return ErrGone
	}
	q.wrote(p)
	return nil
}

// Why a packet is refused, where the kernel would say EINVAL.
var (
	errEmpty     = errors.New("an empty packet")
	errTooLong   = errors.New("a packet of more than 65,535 bytes")
	errNotIP     = errors.New("neither an IPv4 nor an IPv6 packet")
	errMalformed = errors.New("a superpacket that cannot be split")
)

// flaw says what is wrong with a packet that is written to d, or nil. A kernel may send what is not IP, by a packet socket.
func (d *memoryDevice) flaw(p Packet) error {
	switch {
	case len(p.Data) == 0:
		return errEmpty
	case len(p.Data) > maxMTU:
		return errTooLong
	case p.SegmentSize != 0 && p.Segments() == 0:
		return errMalformed
	case !d.host && p.Data[0]>>4 != 4 && p.Data[0]>>4 != 6:
		return errNotIP
	}
	return nil
}

// deliver hands a packet to the other end, split if its offload may not be used: all of it or, if that end is closed, nothing
// and false.
func (q *memoryQueue) deliver(p Packet, cfg *Config) bool {
	if p.SegmentSize == 0 || cfg.NoOffload&offloadOf(p.Data) == 0 {
		return q.hand([]Packet{p})
	}
	q.split.split(p)
	return q.hand(q.split.packets)
}

// offloadOf returns the offload that a well-formed superpacket, which is TCP or UDP, belongs to.
func offloadOf(packet []byte) Offload {
	protocol := packet[9]
	if ipVersion(packet) == 6 {
		protocol, _, _ = upperLayer6(packet)
	}
	if protocol == protoTCP {
		return OffloadTCP
	}
	return OffloadUDP
}

// hand tries the other end's queue of the same number first, then the ones after it: the flows of a closed queue move
// (kernel.md V18).
func (q *memoryQueue) hand(packets []Packet) bool {
	peer := q.device.peer
	if peer == nil {
		return true
	}
	for i := range peer.queues {
		if peer.queues[(q.index+i)%len(peer.queues)].put(packets) {
			return true
		}
	}
	return false
}

// Close implements Queue.
func (q *memoryQueue) Close() error {
	q.once.Do(func() {
		q.closed.Store(true)
		q.wake()
		q.discard()
		q.writeMu.Lock() // waits for who writes
		q.split = batch{}
		q.writeMu.Unlock()
		if q.device.open.Add(-1) == 0 && q.device.peer != nil {
			q.device.wire.cut() // nobody holds the link any more
		}
	})
	return nil
}

// wake makes a reader see the end.
func (q *memoryQueue) wake() {
	q.mu.Lock()
	q.arrived.Broadcast()
	q.mu.Unlock()
}

// discard waits for who reads, who must have been woken, and drops what is left.
func (q *memoryQueue) discard() {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range []*batch{&q.parts, &q.taken, &q.backlog} {
		for _, p := range b.take(math.MaxInt) {
			q.dropped(p)
		}
		*b = batch{}
	}
	q.waiting = 0
}

// batch is packets in a row with room for their bytes, which it keeps for the next ones.
type batch struct {
	data    []byte
	packets []Packet
	next    int // of packets, to be taken
}

func (b *batch) empty() bool { return b.next == len(b.packets) }

// take returns at most so many packets; they are good until reset.
func (b *batch) take(most int) []Packet {
	packets := b.packets[b.next:]
	packets = packets[:min(most, len(packets))]
	b.next += len(packets)
	return packets
}

func (b *batch) reset() { b.data, b.packets, b.next = b.data[:0], b.packets[:0], 0 }

// add copies p. Where the room is too small there will be a larger one; the packets so far stay in the old one.
func (b *batch) add(p Packet) {
	if cap(b.data)-len(b.data) < len(p.Data) {
		b.data = make([]byte, 0, max(2*cap(b.data), len(p.Data), 4096))
	}
	b.data = append(b.data, p.Data...)
	b.push(len(p.Data), p.SegmentSize)
}

// split makes the batch that of p's packets.
func (b *batch) split(p Packet) {
	b.reset()
	for i := range p.Segments() {
		start := len(b.data)
		b.data = p.AppendSegment(b.data, i)
		b.push(len(b.data)-start, 0)
	}
}

// push makes a packet of the last n bytes.
func (b *batch) push(n, segmentSize int) {
	end := len(b.data)
	b.packets = append(b.packets, Packet{Data: b.data[end-n : end : end], SegmentSize: segmentSize})
}

// File implements Queue.
func (q *memoryQueue) File() (*os.File, error) {
	if q.closed.Load() {
		return nil, os.ErrClosed
	}
	return nil, opError("duplicate a descriptor of", q.device.name, errors.ErrUnsupported)
}
