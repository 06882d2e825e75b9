package overlay

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A queue's read buffer: room for a batch of packets of ordinary size and always for one of the largest, so that ReadBatch
// never cuts a packet, whatever the device's MTU becomes.
const (
	maxPacket   = maxMTU
	readArena   = 4 * (maxPacket + 1)
	readMost    = 128     // packets a batch
	maxVnetSize = 64      // bytes of virtio header that an adopted device may want
	maxBacklog  = 1 << 16 // packets counted when a queue is closed
)

// What an OpError of a queue says was tried.
const (
	opRead  = "read from"
	opWrite = "write to"
)

// tunQueue is one descriptor of a TUN device. It owns the file; Close is the only one to close it. Reads take turns by
// readMu, writes by writeMu; Close wakes both, takes both and so waits for every call.
type tunQueue struct {
	traffic
	device string       // for errors
	bare   *atomic.Bool // Config.NoFilter, now
	file   *os.File
	raw    syscall.RawConn
	header []byte      // zeros before every packet that is written; empty unless the adopted device wants a virtio header
	sole   atomic.Bool // nobody else has a descriptor of the queue: no File, and none from before Adopt
	closed atomic.Bool
	gone   atomic.Bool
	once   sync.Once

	readMu  sync.Mutex
	in      reader
	_       [64]byte // reading and writing goroutines share no cache line
	writeMu sync.Mutex
	out     writer
}

// reader is what a read keeps between the runtime's poller and the call; it lives in the queue so that reading allocates
// nothing. Its functions run with readMu held.
type reader struct {
	one, batch func(fd uintptr) bool
	parts      [3][]byte // virtio header, packet, spill
	vec        [][]byte  // of parts, without an empty header
	spill      [1]byte   // a byte that lands here says that the packet was longer than its room
	old        bool      // the kernel does not know RWF_NOWAIT here
	n          int
	err        error
	arena      []byte
	packets    []Packet
}

// writer likewise, with writeMu.
type writer struct {
	all     func(fd uintptr) bool
	parts   [2][]byte // virtio header, packet
	vec     [][]byte  // of parts, without an empty header
	packets []Packet
	single  [1]Packet
	old     bool
	segment []byte // scratch for splitting superpackets
	next    int    // of packets
	part    int    // of that packet, which is a superpacket: so many are written already
	taken   int
	sent    tally
	err     error // of the first that was not taken
}

// newTunQueue makes a queue of fd, which is attached and non-blocking by now: in another order the runtime's poller refuses
// it, and Close would not wake a blocked read. From here on fd is the queue's: on error it is closed.
func newTunQueue(fd int, device string, header int, bare *atomic.Bool) (*tunQueue, error) {
	q := &tunQueue{device: device, bare: bare, header: make([]byte, header)}
	q.in.one, q.in.batch, q.out.all = q.readOne, q.readAll, q.writeAll
	q.in.parts[0], q.in.parts[2] = make([]byte, header), q.in.spill[:]
	q.out.parts[0] = q.header
	q.in.vec, q.out.vec = q.in.parts[:], q.out.parts[:]
	if header == 0 {
		q.in.vec, q.out.vec = q.in.vec[1:], q.out.vec[1:]
	}
	q.file = os.NewFile(uintptr(fd), nodePath)
	var err error
	if q.raw, err = q.file.SyscallConn(); err == nil {
		err = q.file.SetDeadline(time.Time{}) // NewFile does not tell whether the poller took it
	}
	if err != nil {
		q.file.Close()
		return nil, err
	}
	return q, nil
}

func (q *tunQueue) sealed() {}

// Read implements Queue.
func (q *tunQueue) Read(p []byte) (int, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	r.parts[1] = p
	err := q.raw.Read(r.one)
	r.parts[1] = nil // the buffer is the caller's again
	if err == nil {
		err = r.err
	}
	if err != nil {
		return 0, q.explain(opRead, err)
	}
	if r.n > len(p) {
		q.readDropped.Add(1)
		return 0, io.ErrShortBuffer
	}
	q.read(Packet{Data: p[:r.n]})
	return r.n, nil
}

// readOne runs under the poller; false: wait.
func (q *tunQueue) readOne(fd uintptr) bool {
	r := &q.in
	r.n, r.err = q.receive(int(fd))
	return r.err != unix.EAGAIN
}

// receive takes the next packet into the second of the reader's parts and returns its length, which is more than there is
// room if it was cut.
func (q *tunQueue) receive(fd int) (int, error) {
	for {
		n, err := q.in.now(fd)
		switch {
		case err == unix.EINTR:
			continue
		case len(q.header) > 0 && (err == unix.EINVAL || err == nil && n < len(q.header)) && !q.closed.Load():
			q.readInvalid.Add(1) // one that the kernel has no virtio header for; it is lost
			continue
		}
		return n - len(q.header), err
	}
}

// now reads without blocking, even if somebody with a duplicate of the descriptor has made it block: O_NONBLOCK is common to
// both, and Close could not wake a read that waits in the kernel.
func (r *reader) now(fd int) (n int, err error) {
	if !r.old {
		n, err = unix.Preadv2(fd, r.vec, -1, unix.RWF_NOWAIT)
		r.old = err == unix.EOPNOTSUPP || err == unix.ENOSYS
	}
	if r.old {
		n, err = unix.Readv(fd, r.vec)
	}
	return n, err
}

// ReadBatch implements Queue.
func (q *tunQueue) ReadBatch() ([]Packet, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	r.packets = r.packets[:0]
	err := q.raw.Read(r.batch)
	if err == nil && len(r.packets) == 0 {
		err = r.err
	}
	if err != nil {
		return nil, q.explain(opRead, err)
	}
	q.read(r.packets...)
	return r.packets, nil
}

// readAll runs under the poller: it takes what is ready, as far as there is room for one more of the largest packets.
func (q *tunQueue) readAll(fd uintptr) bool {
	r := &q.in
	if r.arena == nil { // for those who Read there is none
		r.arena = make([]byte, readArena)
		r.packets = make([]Packet, 0, readMost)
	}
	free := r.arena
	for len(r.packets) < readMost && len(free) >= maxPacket {
		r.parts[1] = free[:maxPacket]
		var n int
		n, r.err = q.receive(int(fd))
		if r.err == unix.EAGAIN && len(r.packets) == 0 {
			return false
		}
		if r.err != nil {
			break // after a first packet the next call meets the same error
		}
		if n > maxPacket { // no device is that wide
			q.readInvalid.Add(1)
			continue
		}
		r.packets = append(r.packets, Packet{Data: free[:n:n]})
		free = free[n:]
	}
	return true
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
	w.packets, w.next, w.part, w.taken, w.sent, w.err = packets, 0, 0, 0, tally{}, nil
	err := q.raw.Write(w.all)
	if err != nil {
		w.countParts()
		if w.err == nil {
			w.err = q.explain(opWrite, err)
		}
	}
	w.packets, w.parts[1] = nil, nil // the caller's again
	q.wroteAll(w.sent)
	return w.taken, w.err
}

// writeAll runs under the poller; false: wait, the queue's send buffer is full.
func (q *tunQueue) writeAll(fd uintptr) bool {
	w := &q.out
	bare := q.bare.Load()
	for ; w.next < len(w.packets); w.next++ {
		p := w.packets[w.next]
		err := q.offer(int(fd), p, bare)
		switch {
		case err == nil:
			w.taken++
		case err == unix.EAGAIN:
			return false
		case !q.refused(p, err):
			return true // nor will what comes after be taken
		}
		w.part = 0
	}
	return true
}

// offer writes one packet, or a superpacket packet by packet: the plain queue takes no others.
func (q *tunQueue) offer(fd int, p Packet, bare bool) error {
	w := &q.out
	n := 1
	switch {
	case !bare && filtered(p.Data):
		q.writeFiltered.Add(1)
		return nil
	case p.SegmentSize == 0:
		if err := q.send(fd, p.Data); err != nil {
			return err
		}
	default:
		if n = p.Segments(); n == 0 {
			return unix.EINVAL
		}
		for ; w.part < n; w.part++ {
			w.segment = p.AppendSegment(w.segment[:0], w.part)
			if err := q.send(fd, w.segment); err != nil {
				return err
			}
		}
	}
	w.sent.add(p, n)
	return nil
}

// send writes one packet.
func (q *tunQueue) send(fd int, packet []byte) error {
	switch {
	case q.closed.Load():
		return os.ErrClosed // Close shall not wait for a long batch
	case len(packet) == 0:
		return unix.EINVAL // the kernel would take an empty vector for nothing to do
	case len(packet) > maxPacket:
		return unix.EMSGSIZE // the kernel would take a megabyte
	}
	q.out.parts[1] = packet
	for {
		n, err := q.out.now(fd)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n != len(q.header)+len(packet):
			return io.ErrShortWrite
		}
		return err
	}
}

// refused notes that p was not taken; false if no packet will be taken any more.
func (q *tunQueue) refused(p Packet, errno error) bool {
	w := &q.out
	err := q.explain(opWrite, errno)
	if w.err == nil {
		w.err = err
	}
	w.countParts()
	lost := uint64(max(1, p.Segments()-w.part))
	switch {
	case err == ErrDown:
		q.writeDown.Add(lost)
	case err == ErrGone || err == os.ErrClosed:
		return false
	default:
		q.writeRefused.Add(lost)
	}
	return true
}

// countParts counts what is written of a superpacket whose rest will not be.
func (w *writer) countParts() {
	for i := range w.part {
		w.segment = w.packets[w.next].AppendSegment(w.segment[:0], i)
		w.sent.add(Packet{Data: w.segment}, 1)
	}
}

// now writes without blocking, as reader.now reads.
func (w *writer) now(fd int) (n int, err error) {
	if !w.old {
		n, err = unix.Pwritev2(fd, w.vec, -1, unix.RWF_NOWAIT)
		w.old = err == unix.EOPNOTSUPP || err == unix.ENOSYS
	}
	if w.old {
		n, err = unix.Writev(fd, w.vec)
	}
	return n, err
}

// explain turns what the poller or the kernel said into the contract's errors.
func (q *tunQueue) explain(op string, err error) error {
	switch {
	case q.closed.Load():
		return os.ErrClosed
	case q.gone.Load():
		return ErrGone
	case err == unix.EIO && op == opWrite: // only tun_get_user says so, of a link that is down
		return ErrDown
	case err == unix.EINVAL || err == unix.EMSGSIZE: // of this packet
		return opError(op, q.device, err)
	}
	// After `ip link del` the first read says EBADFD, and later ones only that the poller gave up (kernel.md V19).
	if err == unix.EBADFD || q.deleted() {
		q.gone.Store(true)
		return ErrGone
	}
	if q.closed.Load() { // meanwhile
		return os.ErrClosed
	}
	return opError(op, q.device, err)
}

// name asks the descriptor which device it is on: ErrGone, os.ErrClosed.
func (q *tunQueue) name() (name string, err error) {
	if control := q.raw.Control(func(fd uintptr) { name, _, err = getIff(int(fd)) }); control != nil {
		return "", os.ErrClosed
	}
	if errors.Is(err, unix.EBADFD) {
		err = ErrGone
	}
	return name, err
}

// deleted says whether there is no device any more behind the descriptor.
func (q *tunQueue) deleted() bool {
	_, err := q.name()
	return errors.Is(err, ErrGone)
}

// Close implements Queue. It closes, and never detaches: IFF_DETACH_QUEUE would take the queue away from a successor that
// holds a duplicate (kernel.md V18).
func (q *tunQueue) Close() (err error) {
	q.once.Do(func() {
		q.closed.Store(true)
		_ = q.file.SetDeadline(time.Unix(1, 0)) // wakes who waits; newTunQueue has seen it work
		q.readMu.Lock()
		defer q.readMu.Unlock()
		q.writeMu.Lock()
		defer q.writeMu.Unlock()
		q.countBacklog()
		q.in.arena, q.in.packets, q.out.segment = nil, nil, nil
		err = opError("close a queue of", q.device, q.file.Close())
	})
	return err
}

// countBacklog counts the packets that will be lost with the queue (kernel.md V18). Only taking them out tells how many
// there are, so it does nothing where somebody else may yet read them. The caller holds readMu.
func (q *tunQueue) countBacklog() {
	if !q.sole.Load() {
		return
	}
	q.in.parts[1] = nil // the spill byte is room enough
	_ = q.raw.Control(func(fd uintptr) {
		for range maxBacklog {
			if _, err := q.receive(int(fd)); err != nil {
				return
			}
			q.readDropped.Add(1)
		}
	})
}

// File implements Queue.
func (q *tunQueue) File() (*os.File, error) {
	var fd int
	var err error
	q.sole.Store(false)
	control := q.raw.Control(func(own uintptr) {
		fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
	})
	switch {
	case control != nil: // nothing but that it is closed
		return nil, os.ErrClosed
	case err != nil:
		return nil, opError("duplicate a descriptor of", q.device, err)
	}
	return os.NewFile(uintptr(fd), nodePath), nil
}
