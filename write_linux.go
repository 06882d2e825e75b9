package overlay

import (
	"io"
	"os"

	"example.com/overlay/internal/virtio"
	"golang.org/x/sys/unix"
)

// writer is what a write keeps between the runtime's poller and the call, with writeMu held.
type writer struct {
	all    func(fd uintptr) bool
	vector vector
	single [1]Packet // of Write

	packets []Packet // the caller's
	next    int      // the first that is not in writes yet
	merge   virtio.Coalescer
	alone   aloneWrite
	writes  []virtio.Write

	at     int    // of writes
	split  bool   // that one is written packet by packet
	member int    // of it, the next packet
	part   int    // of that packet, the next segment
	buffer []byte // for a segment
	parts  [2][]byte
	zeros  [maxVnetSize]byte
	probe  [3][]byte

	taken  int
	sent   tally
	err    error // of the first packet that was not taken
	failed int   // its number
}

// aloneWrite is the Write of one packet that goes by itself.
type aloneWrite struct {
	write  [1]virtio.Write
	number [1]int
}

// frame puts an empty header before a packet.
func (w *writer) frame(data []byte, header int) [][]byte {
	w.parts = [...][]byte{w.zeros[:header], data}
	return w.parts[:]
}

func (w *writer) lone(number int, data []byte, header int) []virtio.Write {
	a := &w.alone
	a.number[0] = number
	a.write[0] = virtio.Write{Parts: w.frame(data, header), Len: header + len(data), Packets: a.number[:], Segments: 1}
	return a.write[:]
}

// Write implements Queue.
func (q *tunQueue) Write(p []byte) (int, error) {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	q.out.single[0].Data = p
	n, err := q.write(q.out.single[:])
	q.out.single[0].Data = nil
	if n == 0 {
		return 0, err
	}
	return len(p), nil
}

// WriteBatch implements Queue.
func (q *tunQueue) WriteBatch(packets []Packet) (int, error) {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	return q.write(packets)
}

func (q *tunQueue) write(packets []Packet) (int, error) {
	w := &q.out
	w.packets, w.next, w.taken, w.sent, w.err = packets, 0, 0, tally{}, nil
	err := q.raw.Write(w.all)
	if err != nil {
		w.countParts()
		if w.err == nil || w.pending() < w.failed {
			w.err = q.explain(opWrite, err)
		}
	}
	w.forget()
	q.wroteAll(w.sent)
	return w.taken, w.err
}

// forget gives the caller's memory back.
func (w *writer) forget() {
	w.merge.Reset()
	w.packets, w.writes, w.at, w.split, w.member, w.part = nil, nil, 0, false, 0, 0
	w.parts = [2][]byte{}
}

// writeAll runs under the poller; false: wait, the queue's send buffer is full.
func (q *tunQueue) writeAll(fd uintptr) bool {
	w := &q.out
	if len(w.writes) == 0 { // at the beginning
		q.offloads.retry(func(packet []byte) error { return q.probe(int(fd), packet) })
	}
	for {
		for ; w.at < len(w.writes); w.at++ {
			if ended, wait := q.put(int(fd), &w.writes[w.at]); ended {
				return !wait
			}
			w.split, w.member, w.part = false, 0, 0
		}
		if w.next == len(w.packets) {
			return true
		}
		q.gather()
	}
}

// pending returns the lowest number of the packets that are not written yet. A flow's later packets go with its first, so that those
// of other flows between them may still be here.
func (w *writer) pending() int {
	lowest := w.next
	for i := w.at; i < len(w.writes); i++ {
		numbers := w.writes[i].Packets
		if i == w.at && w.split {
			numbers = numbers[w.member:]
		}
		for _, number := range numbers {
			lowest = min(lowest, number)
		}
	}
	return lowest
}

// gather prepares the next writes: of as many packets as may be merged at once, or of one that has to go by itself.
func (q *tunQueue) gather() {
	w := &q.out
	w.merge.Reset()
	w.at, w.writes = 0, nil
	bare, usable := q.bare.Load(), q.offloads.usable()
	w.merge.TCP, w.merge.UDP = usable&OffloadTCP != 0, usable&OffloadUDP != 0
	w.merge.MaxDatagrams, w.merge.HeaderSize = q.offloads.datagrams(), q.header
	lone := usable == 0 || len(w.packets)-w.next == 1
	for gathered := 0; w.next < len(w.packets); w.next++ {
		p := &w.packets[w.next]
		if !bare && filtered(p.Data) {
			q.writeFiltered.Add(1)
			w.taken++
			continue
		}
		outcome := virtio.Refused
		if !lone || p.SegmentSize != 0 && usable != 0 {
			outcome = w.merge.Add(w.next, p.Data, p.SegmentSize)
		}
		switch {
		case outcome == virtio.Added:
			gathered++
		case gathered > 0: // what is there goes first
			w.writes = w.merge.Writes()
			return
		case outcome == virtio.Refused:
			w.writes, w.split = w.lone(w.next, p.Data, q.header), p.SegmentSize != 0
			w.next++
			return
		}
	}
	w.writes = w.merge.Writes()
}

// put writes one packet or superpacket, or what it was made of. ended: nothing more can be written, now or, unless wait, ever.
func (q *tunQueue) put(fd int, m *virtio.Write) (ended, wait bool) {
	w := &q.out
	if !w.split {
		plain := m.Header == virtio.Header{}
		err := error(unix.EMSGSIZE) // the kernel would take a megabyte
		if m.Segments > 1 || m.Len <= q.header+maxPacket {
			err = q.send(fd, m.Parts, m.Len)
		}
		switch {
		case err == nil:
			w.sent.packets += uint64(m.Segments)
			for _, number := range m.Packets { // as they were handed over: merging saves headers, and is nobody's business
				w.sent.bytes += uint64(len(w.packets[number].Data))
			}
			if !plain {
				w.sent.super++
			}
			w.taken += len(m.Packets)
			return false, false
		case err == unix.EAGAIN:
			return true, true
		case err != unix.EINVAL || plain:
			return q.refuseAll(m, err), false
		}
		q.offloads.refused(m.Header, m.Segments, func(packet []byte) error { return q.probe(fd, packet) })
		w.split = true // nothing is lost by the attempt
	}
	for ; w.member < len(m.Packets); w.member++ {
		number := m.Packets[w.member]
		switch err := q.putParts(fd, w.packets[number]); {
		case err == nil:
			w.taken++
		case err == unix.EAGAIN:
			return true, true
		case q.refuse(number, err):
			return true, false
		}
		w.part = 0
	}
	return false, false
}

// putParts writes one packet as it came, or a superpacket packet by packet.
func (q *tunQueue) putParts(fd int, p Packet) error {
	w := &q.out
	n := p.Segments()
	if n == 0 {
		return unix.EINVAL
	}
	for ; w.part < n; w.part++ {
		packet := p.Data
		if p.SegmentSize != 0 {
			w.buffer = p.AppendSegment(w.buffer[:0], w.part)
			packet = w.buffer
		}
		if len(packet) > maxPacket {
			return unix.EMSGSIZE
		}
		if err := q.send(fd, w.frame(packet, q.header), q.header+len(packet)); err != nil {
			return err
		}
	}
	w.sent.add(p, n)
	return nil
}

// send writes one packet or superpacket with its header.
func (q *tunQueue) send(fd int, parts [][]byte, size int) error {
	switch {
	case q.closed.Load():
		return os.ErrClosed // Close shall not wait for a long batch
	case size == q.header:
		return unix.EINVAL // the kernel would take an empty vector for nothing to do
	}
	for {
		n, err := q.out.vector.write(fd, parts)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n != size:
			return io.ErrShortWrite
		}
		return err
	}
}

// probe writes a packet of virtio.Probe.
func (q *tunQueue) probe(fd int, packet []byte) error {
	w := &q.out
	more := w.zeros[:q.header-virtio.HeaderLen]
	w.probe = [...][]byte{packet[:virtio.HeaderLen], more, packet[virtio.HeaderLen:]}
	return q.send(fd, w.probe[:], len(packet)+len(more))
}

// refuseAll notes that what m was made of was not taken; true if no packet will be any more.
func (q *tunQueue) refuseAll(m *virtio.Write, errno error) (final bool) {
	for _, number := range m.Packets {
		if q.refuse(number, errno) {
			return true
		}
	}
	return false
}

// refuse notes that a packet was not taken; true if none will be any more.
func (q *tunQueue) refuse(number int, errno error) (final bool) {
	w := &q.out
	err := q.explain(opWrite, errno)
	if w.err == nil || number < w.failed {
		w.err, w.failed = err, number
	}
	w.countParts()
	lost := uint64(max(1, w.packets[number].Segments()-w.part))
	switch {
	case err == ErrDown:
		q.writeDown.Add(lost)
	case err == ErrGone || err == os.ErrClosed:
		return true
	default:
		q.writeRefused.Add(lost)
	}
	return false
}

// countParts counts what is written of a superpacket whose rest will not be.
func (w *writer) countParts() {
	if w.part == 0 {
		return
	}
	p := w.packets[w.writes[w.at].Packets[w.member]]
	for i := range w.part {
		w.buffer = p.AppendSegment(w.buffer[:0], i)
		w.sent.add(Packet{Data: w.buffer}, 1)
	}
}
