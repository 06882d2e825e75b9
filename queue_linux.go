package overlay

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a queue.
const (
	maxPacket   = maxMTU  // bytes
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
	device   string       // for errors
	bare     *atomic.Bool // Config.NoFilter, now
	offloads *offloads    // the device's
	file     *os.File
	raw      syscall.RawConn
	header   int         // bytes of virtio header before each packet; 0: none
	sole     atomic.Bool // nobody else has a descriptor of the queue: no File, and none from before Adopt
	closed   atomic.Bool
	gone     atomic.Bool
	once     sync.Once

	readMu  sync.Mutex
	in      reader
	_       [64]byte // reading and writing goroutines share no cache line
	writeMu sync.Mutex
	out     writer
}

// shared is what the queues of a device have in common.
type shared struct {
	bare     atomic.Bool // Config.NoFilter, now
	offloads offloads
}

// newTunQueue makes a queue of fd, which is attached and non-blocking by now: in another order the runtime's poller refuses
// it, and Close would not wake a blocked read. From here on fd is the queue's: on error it is closed.
func newTunQueue(fd int, device string, header int, common *shared) (*tunQueue, error) {
	q := &tunQueue{device: device, header: header, bare: &common.bare, offloads: &common.offloads}
	q.in.one, q.in.batch, q.out.all = q.takeOne, q.drain, q.writeAll
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
		q.in, q.out = reader{}, writer{}
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
	q.readDropped.Add(uint64(q.in.left()))
	var b [maxVnetSize]byte // a superpacket's number of segments is not worth the room
	_ = q.raw.Control(func(fd uintptr) {
		for range maxBacklog {
			if _, err := q.receive(int(fd), b[:]); err != nil {
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
