package overlay

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// A queue's read buffer: room for a batch of packets of ordinary size and always for one of the largest, so that ReadBatch
// never cuts a packet, whatever the device's MTU becomes.
const (
	maxPacket   = 65535
	readArena   = 4 * (maxPacket + 1)
	readMost    = 128 // packets a batch
	maxVnetSize = 64  // bytes of virtio header that an adopted device may want
)

// tunQueue is one descriptor of a TUN device. It owns the file; Close is the only one to close it. Reads take turns by
// readMu, writes by writeMu; Close takes both once the descriptor is gone, and so waits for every call.
type tunQueue struct {
	traffic
	device string       // for errors
	bare   *atomic.Bool // Config.NoFilter, now
	file   *os.File
	raw    syscall.RawConn
	header []byte // zeros before every packet that is written; empty unless the adopted device wants a virtio header
	closed atomic.Bool
	gone   atomic.Bool
	once   sync.Once
	err    error // of closing

	readMu  sync.Mutex
	in      reader
	writeMu sync.Mutex
	out     writer
}

// reader is what a read keeps between the runtime's poller and the call; it lives in the queue so that reading allocates
// nothing. Its functions run with readMu held.
type reader struct {
	one, batch func(fd uintptr) bool
	parts      [3][]byte // virtio header, packet, spill
	vec        [][]byte  // of parts, without an empty header
	spill      [1]byte   // a byte that lands here says that the packet was longer than the caller's buffer
	n          int
	err        error
	arena      []byte
	packets    []Packet
}

// writer likewise, with writeMu.
type writer struct {
	all     func(fd uintptr) bool
	vec     [2][]byte // virtio header, packet
	packets []Packet
	single  [1]Packet
	segment []byte // scratch for splitting superpackets
	next    int    // of packets, and in it
	part    int
	taken   int
	err     error // of the first that was not taken
}

// newTunQueue makes a queue of fd, which is attached and non-blocking by now: in another order the runtime's poller refuses
// it, and Close would not wake a blocked read. On error fd stays open.
func newTunQueue(fd int, device string, header int, bare *atomic.Bool) (*tunQueue, error) {
	q := &tunQueue{device: device, bare: bare, header: make([]byte, header)}
	q.in.one, q.in.batch, q.out.all = q.readOne, q.readAll, q.writeAll
	q.in.parts[0] = make([]byte, header)
	q.in.parts[2] = q.in.spill[:]
	q.out.vec[0] = q.header
	q.file = os.NewFile(uintptr(fd), nodePath)
	var err error
	q.raw, err = q.file.SyscallConn()
	return q, err
}

func (q *tunQueue) sealed() {}

// Read implements Queue.
func (q *tunQueue) Read(p []byte) (int, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	r.parts[1] = p
	r.vec = q.vector()
	err := q.raw.Read(r.one)
	n := r.n - len(q.header)
	r.parts[1] = nil // the buffer is the caller's again
	if err == nil {
		err = r.err
	}
	if err != nil {
		return 0, q.fail("read from", err)
	}
	if n > len(p) {
		q.readDropped.Add(1)
		return 0, io.ErrShortBuffer
	}
	q.read(Packet{Data: p[:n]})
	return n, nil
}

// vector leaves an empty virtio header out, which readv would otherwise have to skip each time.
func (q *tunQueue) vector() [][]byte {
	if len(q.header) == 0 {
		return q.in.parts[1:]
	}
	return q.in.parts[:]
}

// readOne runs under the poller; false: wait.
func (q *tunQueue) readOne(fd uintptr) bool {
	r := &q.in
	for {
		r.n, r.err = unix.Readv(int(fd), r.vec)
		if r.err != unix.EINTR {
			return r.err != unix.EAGAIN
		}
	}
}

// ReadBatch implements Queue.
func (q *tunQueue) ReadBatch() ([]Packet, error) {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	r := &q.in
	if r.arena == nil {
		r.arena = make([]byte, readArena)
		r.packets = make([]Packet, 0, readMost)
	}
	r.packets = r.packets[:0]
	err := q.raw.Read(r.batch)
	if err == nil && len(r.packets) == 0 {
		err = r.err
	}
	if err != nil {
		return nil, q.fail("read from", err)
	}
	for _, p := range r.packets {
		q.read(p)
	}
	return r.packets, nil
}

// readAll runs under the poller: it takes what is ready, as far as there is room for one more of the largest packets.
func (q *tunQueue) readAll(fd uintptr) bool {
	r := &q.in
	free := r.arena
	for len(r.packets) < readMost && len(free) > maxPacket {
		r.parts[1] = free[:maxPacket]
		r.vec = q.vector()
		r.n, r.err = unix.Readv(int(fd), r.vec)
		if r.err == unix.EINTR {
			continue
		}
		if r.err == unix.EAGAIN && len(r.packets) == 0 {
			return false
		}
		if r.err != nil {
			break // after a first packet the next call meets the same error
		}
		n := r.n - len(q.header)
		r.packets = append(r.packets, Packet{Data: free[:n:n]})
		free = free[n:]
	}
	return true
}

// Write implements Queue.
func (q *tunQueue) Write(p []byte) (int, error) {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	q.out.single[0] = Packet{Data: p}
	defer func() { q.out.single[0] = Packet{} }()
	if n, err := q.write(q.out.single[:]); n == 0 {
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
	w.packets, w.next, w.part, w.taken, w.err = packets, 0, 0, 0, nil
	err := q.raw.Write(w.all)
	w.packets, w.vec[1] = nil, nil // the caller's again
	if err != nil {
		return w.taken, q.fail("write to", err)
	}
	return w.taken, w.err
}

// writeAll runs under the poller; false: wait, the queue's send buffer is full.
func (q *tunQueue) writeAll(fd uintptr) bool {
	w := &q.out
	for ; w.next < len(w.packets); w.next++ {
		p := w.packets[w.next]
		if !q.bare.Load() && filtered(p.Data) {
			q.writeFiltered.Add(1)
			w.taken++
			continue
		}
		err := q.offer(int(fd), p)
		switch err {
		case nil:
			q.wrote(p)
			w.taken++
			continue
		case unix.EAGAIN:
			return false
		}
		err = q.fail("write to", err)
		q.failed(err)
		if w.err == nil {
			w.err = err
		}
		if errors.Is(err, ErrGone) || errors.Is(err, os.ErrClosed) {
			return true // so will be what comes after
		}
	}
	return true
}

// offer writes one packet, or a superpacket packet by packet: the plain queue takes no others.
func (q *tunQueue) offer(fd int, p Packet) error {
	if p.SegmentSize == 0 {
		return q.writePacket(fd, p.Data)
	}
	w := &q.out
	n := p.Segments()
	if n == 0 {
		return unix.EINVAL
	}
	for ; w.part < n; w.part++ {
		w.segment = p.AppendSegment(w.segment[:0], w.part)
		if err := q.writePacket(fd, w.segment); err != nil {
			if err != unix.EAGAIN { // that one goes on where it stopped
				w.part = 0
			}
			return err
		}
	}
	w.part = 0
	return nil
}

func (q *tunQueue) writePacket(fd int, packet []byte) error {
	if len(packet) == 0 {
		return unix.EINVAL // writev would take it for nothing to do
	}
	q.out.vec[1] = packet
	vec := q.out.vec[:]
	if len(q.header) == 0 {
		vec = vec[1:]
	}
	for {
		n, err := unix.Writev(fd, vec)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n != len(q.header)+len(packet):
			return io.ErrShortWrite
		}
		return err
	}
}

// fail turns what the poller or the kernel said into the contract's errors.
func (q *tunQueue) fail(op string, err error) error {
	switch {
	case q.closed.Load():
		return os.ErrClosed
	case q.gone.Load():
		return ErrGone
	case err == unix.EIO: // only tun_get_user says so, of a link that is down
		return ErrDown
	case err == unix.EINVAL:
		return opError(op, q.device, err)
	}
	// After `ip link del` the first read says EBADFD, and later ones only that the poller gave up (kernel.md V19).
	if q.deleted() {
		q.gone.Store(true)
		return ErrGone
	}
	return opError(op, q.device, err)
}

// name asks the descriptor which device it is on.
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
func (q *tunQueue) Close() error {
	q.once.Do(func() {
		q.closed.Store(true)
		err := q.file.Close() // wakes who waits; returns when nobody uses the descriptor
		q.err = opError("close a queue of", q.device, err)
	})
	q.readMu.Lock()
	q.in.arena, q.in.packets = nil, nil
	q.readMu.Unlock()
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	return q.err
}

// File implements Queue.
func (q *tunQueue) File() (*os.File, error) {
	var fd int
	var err error
	control := q.raw.Control(func(own uintptr) {
		fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
	})
	if control != nil {
		err = control
	}
	if err != nil {
		return nil, q.fail("duplicate a descriptor of", err)
	}
	return os.NewFile(uintptr(fd), nodePath), nil
}
