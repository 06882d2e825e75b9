package overlay

import (
	"io"
	"os"

	"example.com/overlay/internal/virtio"
	"golang.org/x/sys/unix"
)

// What ReadBatch reads into: room for a batch of packets of ordinary size or a few superpackets, and always for one more of the
// largest, so that it never cuts a packet, whatever the device's MTU becomes. For those who only Read there is one such room.
const (
	readRoom  = maxPacket + maxVnetSize + 1 // bytes; a packet that fills it was cut
	readArena = 4 * readRoom
	readMost  = 128 // packets a batch
)

// reader is what a read keeps between the runtime's poller and the call; it lives in the queue so that reading allocates
// nothing. Its functions run with readMu held.
type reader struct {
	one, batch func(fd uintptr) bool
	vector     vector
	got        tally
	err        error

	// ReadBatch
	arena   []byte
	packets []Packet

	// Read
	into  []byte // the caller's
	n     int
	room  []byte
	super virtio.Superpacket // in room, handed out packet by packet
	next  int                // of its segments
}

// left returns how many segments are still to be handed out.
func (r *reader) left() int { return r.super.Segments() - r.next }

// receive takes the next packet, with its header, into b and returns the length of both; 0 of one that the kernel has no virtio
// header for, and which is lost.
func (q *tunQueue) receive(fd int, b []byte) (int, error) {
	for {
		n, err := q.in.vector.read(fd, b)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EINVAL && q.header > 0:
			return 0, nil
		}
		return n, err
	}
}

// ReadBatch implements Queue.
func (q *tunQueue) ReadBatch() ([]Packet, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	r.packets, r.got, r.err = r.packets[:0], tally{}, nil
	err := q.raw.Read(r.batch)
	if err == nil && len(r.packets) == 0 {
		err = r.err
	}
	if err != nil {
		return nil, q.explain(opRead, err)
	}
	q.readAll(r.got)
	return r.packets, nil
}

// drain runs under the poller: it takes what is ready, as far as there is room for one more of the largest packets.
func (q *tunQueue) drain(fd uintptr) bool {
	r := &q.in
	if r.arena == nil { // for those who Read there is none
		r.arena = make([]byte, readArena)
		r.packets = make([]Packet, 0, readMost)
	}
	free := r.arena
	for r.left() > 0 && len(r.packets) < readMost && len(free) >= readRoom {
		free = r.add(free, Packet{Data: r.segment(free[:0:readRoom])}, 0, 1)
	}
	// Those that make no sense take no room: they are counted too, so that they hold up neither who waits for what there is nor Close.
	for reads := 0; len(free) >= readRoom && (reads < readMost && len(r.packets) < readMost || len(r.packets) == 0); reads++ {
		if q.closed.Load() {
			r.err = os.ErrClosed
			break
		}
		var n int
		n, r.err = q.receive(int(fd), free[:readRoom])
		if r.err == unix.EAGAIN && len(r.packets) == 0 {
			return false
		}
		if r.err != nil {
			break // after a first packet the next call meets the same error
		}
		if p, segments := q.accept(free, n); segments > 0 {
			free = r.add(free, p, q.header, segments)
		} else {
			q.readInvalid.Add(1)
		}
	}
	return true
}

// add adds a packet, which lies in free behind a header, to the batch, and returns what is free then.
func (r *reader) add(free []byte, p Packet, header, segments int) []byte {
	p.Data = p.Data[:len(p.Data):len(p.Data)]
	r.packets = append(r.packets, p)
	r.got.add(p, segments)
	return free[header+len(p.Data):]
}

// accept makes a Packet of the n bytes in b; no segments: of none that makes sense.
func (q *tunQueue) accept(b []byte, n int) (p Packet, segments int) {
	if n < q.header || n == readRoom {
		return p, 0
	}
	p.Data = b[q.header:n]
	if q.header == 0 {
		return p, 1
	}
	h, _ := virtio.DecodeHeader(b)
	p.SegmentSize, segments = h.Accept(p.Data)
	return p, segments
}

// Read implements Queue.
func (q *tunQueue) Read(p []byte) (int, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	r.into, r.n, r.got = p, 0, tally{}
	err := q.raw.Read(r.one)
	if err == nil {
		err = r.err
	}
	r.into = nil // the caller's again
	if err != nil {
		return 0, q.explain(opRead, err)
	}
	if r.n > len(p) {
		q.readDropped.Add(1)
		q.readAll(tally{super: r.got.super})
		return 0, io.ErrShortBuffer
	}
	q.readAll(r.got)
	return r.n, nil
}

// takeOne runs under the poller; false: wait.
func (q *tunQueue) takeOne(fd uintptr) bool {
	r := &q.in
	if r.room == nil {
		r.room = make([]byte, readRoom)
	}
	for segments := 0; segments == 0 && r.left() == 0; {
		if q.closed.Load() {
			r.err = os.ErrClosed
			return true
		}
		// Not right to where the caller wants it: only its header tells whether it is one packet, and one that makes sense.
		n, err := q.receive(int(fd), r.room)
		if err != nil {
			r.err = err
			return err != unix.EAGAIN
		}
		var p Packet
		p, segments = q.accept(r.room, n)
		switch {
		case segments == 0:
			q.readInvalid.Add(1)
		case p.SegmentSize == 0:
			copy(r.into, p.Data)
			r.took(len(p.Data))
			return true
		default:
			r.super.Parse(p.Data, p.SegmentSize)
			r.next, r.got.super = 0, 1
		}
	}
	r.took(len(r.segment(r.into[:0:len(r.into)])))
	return true
}

// took notes the packet that Read hands out, or was to.
func (r *reader) took(n int) {
	r.n, r.err = n, nil
	r.got.packets, r.got.bytes = 1, uint64(n)
}

// segment appends the next segment to b.
func (r *reader) segment(b []byte) []byte {
	b = r.super.AppendSegment(b, r.next)
	r.next++
	if r.left() == 0 {
		r.super, r.next = virtio.Superpacket{}, 0
	}
	return b
}
