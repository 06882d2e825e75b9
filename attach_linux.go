package overlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// attachment is a device with our descriptors on it, one a queue, in the order of the queues.
type attachment struct {
	fds        []int
	flags      tunFlags // as read back
	header     int      // bytes of virtio header before each packet
	without    Offload  // not to be used
	link       kernel.Link
	persist    bool         // still to be made persistent
	drain      bool         // what waits in the queues came under an earlier user's offload mask
	adopted    []int        // the caller's, of which fds are duplicates
	unverified bool         // the device's namespace could not be compared with ours
	attached   int          // queues, so far
	reframe    func() error // gives a prepared device its flags back; nil: not ours to do
}

// close closes the descriptors; a device that is not persistent goes with the last.
func (a *attachment) close() {
	for _, fd := range a.fds {
		unix.Close(fd)
	}
	a.fds = nil
}

// unowned says whether every local user may attach a queue, and read and write packets by it (kernel.md S1): an attached or
// adopted device keeps its owner, and one that never had one is as open as the node.
func (a *attachment) unowned() bool {
	return a.link.Tun.MultiQueue && a.link.Tun.Owner < 0 && a.link.Tun.Group < 0
}

// abandon closes what was attached, because of err, and gives the device its flags back.
func (a *attachment) abandon(err error, closeAll func()) error {
	closeAll()
	if a.attached == 0 || a.reframe == nil {
		return err
	}
	if back := a.reframe(); back != nil {
		return fmt.Errorf("%w (and its flags, which attaching changed, could not be put back: %v)", err, back)
	}
	return err
}

// queues makes queues of the descriptors, which are theirs from then on. Only when all else is done is the device changed
// for good, and are the caller's originals closed, if any. On error it closes all that is ours; the device is as it was.
func (a *attachment) queues(common *shared) (queues []*tunQueue, err error) {
	fds := slices.Clone(a.fds)
	undo, err := nonblocking(a.adopted) // ours are so from the start, or share the flag with these
	for len(a.fds) > 0 && err == nil {
		var q *tunQueue
		if q, err = newTunQueue(a.fds[0], a.link.Name, a.header, common); err == nil {
			queues = append(queues, q)
		}
		a.fds = a.fds[1:] // the queue's, or closed
	}
	if err == nil {
		err = a.finish(fds, common)
	}
	if err != nil {
		undo()
		return nil, a.abandon(err, func() {
			for _, q := range queues {
				q.Close()
			}
			a.close()
		})
	}
	for _, fd := range a.adopted {
		unix.Close(fd)
	}
	return queues, nil
}

// finish makes the changes that outlive the descriptors.
func (a *attachment) finish(fds []int, common *shared) error {
	if a.header > 0 {
		if err := setNativeOrder(fds[0]); err != nil {
			return err
		}
	}
	granted, err := grant(offloadsOf(fds[0]), a.header, a.without)
	if err != nil {
		return err
	}
	common.offloads.granted.Store(uint32(granted))
	if a.drain {
		discard(fds, a.link.TxQueueLen)
	}
	if a.persist {
		if err := setPersist(fds[0]); err != nil {
			return fmt.Errorf("make persistent: %w", err)
		}
	}
	return nil
}

// discard throws away what the kernel queued until now, at most so many packets a queue: superpackets among them look like
// packets on a descriptor without a virtio header (kernel.md C1, U49).
func discard(fds []int, most int) {
	var b [1]byte
	for _, fd := range fds {
		for range most {
			if _, err := unix.Read(fd, b[:]); err != nil {
				break
			}
		}
	}
}

// nonblocking changes descriptors as the runtime's poller wants them. undo gives those that it shares with a caller their
// flags back.
func nonblocking(fds []int) (undo func(), err error) {
	var changed []int
	undo = func() {
		for _, fd := range changed {
			_ = unix.SetNonblock(fd, false) // as it was; it cannot fail where setting did not
		}
	}
	for _, fd := range fds {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err == nil && flags&unix.O_NONBLOCK == 0 {
			if err = unix.SetNonblock(fd, true); err == nil {
				changed = append(changed, fd)
			}
		}
		if err != nil {
			return undo, fmt.Errorf("make descriptor non-blocking: %w", err)
		}
	}
	return undo, nil
}

// opener opens devices in the network namespace of the calling thread, which conn is in too.
type opener struct {
	cfg  *Config
	conn conn
	iff  func(fd int, name string, flags tunFlags) (string, error) // nil: setIff; tests interfere before and after it
}

func (o *opener) setIff(fd int, name string, flags tunFlags) (string, error) {
	if o.iff != nil {
		return o.iff(fd, name, flags)
	}
	return setIff(fd, name, flags)
}

// Bounds of patience.
const (
	strangerTries = 32                   // with a stranger that spins for the first queue, about one try in three succeeds
	raceTries     = 4                    // a device that comes and goes between the look and the attempt
	busyPause     = 5 * time.Millisecond // doubled each time, while a last descriptor may be on its way out:
	busyTries     = 5                    // 75 ms, that of a child between fork and exec, or of a process just killed
	closingTries  = 9                    // 1.3 s, one that nobody is seen to hold, because the kernel is closing it
)

// open does what Config.Mode says.
func (o *opener) open() (*attachment, error) {
	switch o.cfg.Mode {
	case Attach:
		return o.attach()
	case AttachOrCreate:
		return o.attachOrCreate()
	}
	return o.create()
}

// attachOrCreate follows a device that others make or delete in between.
func (o *opener) attachOrCreate() (a *attachment, err error) {
	for range raceTries {
		if a, err = o.attach(); !errors.Is(err, errNoDevice) && !errors.Is(err, errVanished) {
			break
		}
		if a, err = o.create(); !errors.Is(err, ErrBusy) {
			break
		}
	}
	return a, err
}

// attach takes a prepared device, with as many queues as Config says. Owner, group and persistence stay (kernel.md V10), and
// so does what else an earlier user may have set, but for the offload mask.
func (o *opener) attach() (*attachment, error) {
	for try := 1; ; try++ {
		a, err := o.attachOnce()
		var op *OpError
		switch {
		case err == nil:
			return a, nil
		case errors.Is(err, unix.EBUSY) && try < busyTries:
			time.Sleep(busyPause << (try - 1))
			continue
		case errors.Is(err, unix.EBUSY):
			err = o.busy(err)
		case errors.As(err, &op):
			return nil, err // about the node
		}
		return nil, opError("attach to", o.cfg.Name, err)
	}
}

// busy is busy for the name in Config, which may be an alternative one.
func (o *opener) busy(err error) error {
	name := o.cfg.Name
	if link, err := o.linkByName(name); err == nil {
		name = link.Name
	}
	return busy(name, err)
}

var (
	errNoDevice = fmt.Errorf("no such device: %w", os.ErrNotExist)
	errVanished = fmt.Errorf("the device was renamed, moved or deleted meanwhile: %w", os.ErrNotExist)
)

func (o *opener) attachOnce() (*attachment, error) {
	link, err := o.linkByName(o.cfg.Name)
	if errors.Is(err, unix.ENODEV) {
		return nil, errNoDevice
	}
	if err != nil {
		return nil, err
	}
	flags, err := o.attachable(&link)
	if err != nil {
		return nil, err
	}
	fds, err := openNodes(o.cfg.queues())
	if err != nil {
		return nil, err
	}
	flags |= vnetHeader(fds[0])
	a := &attachment{fds: fds, link: link, drain: true, without: o.cfg.NoOffload}
	a.reframe = func() error { return o.reframe(&link) }
	if err = o.addQueues(a, fds, flags); err == nil {
		err = o.onlyOurs(a)
	}
	if err != nil {
		return nil, a.abandon(err, a.close)
	}
	return a, nil
}

// reframe gives a device without queues the flags that it was prepared with, which say how packets look: the first queue sets them,
// and they outlive it. So one is attached for a moment, with the old ones. Somebody else's would not notice: the flags of a queue
// beside his have no effect. IFF_ONE_QUEUE, which means nothing any more, and IFF_NAPI are lost: netlink does not tell them.
func (o *opener) reframe(prepared *kernel.Link) error {
	link, err := o.linkByIndex(prepared.Index)
	is, was := link.Tun, prepared.Tun
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil
	case err != nil:
		return err
	case is.PacketInfo == was.PacketInfo && is.VnetHeader == was.VnetHeader:
		return nil
	case is.Queues+is.Disabled > 0:
		return fmt.Errorf("%d of its queues are taken: %w", is.Queues+is.Disabled, unix.EBUSY)
	}
	flags := flagTUN
	for flag, set := range map[tunFlags]bool{flagNoPI: !was.PacketInfo, flagVnetHeader: was.VnetHeader, flagMultiQueue: was.MultiQueue} {
		if set {
			flags |= flag
		}
	}
	fd, err := openNode()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_ = attachOnly(fd) // as in addQueues
	_, err = setIff(fd, link.Name, flags)
	return err
}

// attachable refuses a device before it is touched, and returns the flags to attach with.
func (o *opener) attachable(link *kernel.Link) (flags tunFlags, err error) {
	flags = flagTUN | flagNoPI
	switch t := &link.Tun; {
	case link.Kind != "tun":
		return 0, fmt.Errorf("not a TUN device, but interface %d of kind %q", link.Index, link.Kind)
	case link.Hardware == unix.ARPHRD_ETHER:
		return 0, errors.New("a TAP device: this package carries IP packets only")
	case link.Hardware != unix.ARPHRD_NONE:
		return 0, fmt.Errorf("a device of link type %d: this package carries IP packets only", link.Hardware)
	case !t.MultiQueue && o.cfg.queues() > 1:
		return 0, fmt.Errorf("the device has a single queue, Config.Queues is %d", o.cfg.queues())
	case t.Queues+t.Disabled > 0:
		// Unread, a queue swallows its share of the flows; and the framing would be another's choice (kernel.md C2).
		return 0, fmt.Errorf("%d of its queues are taken: %w", t.Queues+t.Disabled, unix.EBUSY)
	case t.MultiQueue:
		flags |= flagMultiQueue
	}
	return flags, nil
}

// addQueues attaches descriptors to the device, and checks that each of a.fds reached it, with the same framing: by name the
// kernel would as soon attach to whatever is called so by now (kernel.md A24, U50).
func (o *opener) addQueues(a *attachment, fds []int, flags tunFlags) error {
	for _, fd := range fds {
		_ = attachOnly(fd) // where a sandbox does not know it, the index betrays a new device below
		if _, err := o.setIff(fd, a.link.Name, flags); err != nil {
			return o.explainAttach(a, err)
		}
		a.attached++
	}
	for _, fd := range a.fds {
		if err := o.sameDevice(a, fd, flags); err != nil {
			return err
		}
	}
	return nil
}

func (o *opener) sameDevice(a *attachment, fd int, flags tunFlags) error {
	link, err := o.linkOf(fd)
	if err != nil {
		return err
	}
	if link.Index != a.link.Index {
		return fmt.Errorf("a queue reached interface %d instead of %d: %w", link.Index, a.link.Index, errVanished)
	}
	_, got, err := getIff(fd)
	if err != nil {
		return fmt.Errorf("read back the flags: %w", err)
	}
	if got&framing != flags&framing || link.Tun.PacketInfo {
		return fmt.Errorf("its queues have flags %#x instead of %#x, packet information %t: another process attached with others",
			got&framing, flags&framing, link.Tun.PacketInfo)
	}
	a.flags = got
	return a.measureHeader(fd)
}

// measureHeader asks how large the virtio header is, if there is one.
func (a *attachment) measureHeader(fd int) (err error) {
	if a.flags&flagVnetHeader == 0 {
		return nil
	}
	a.header, err = headerSize(fd)
	switch {
	case err != nil:
		return fmt.Errorf("read the size of its virtio header: %w", err)
	case a.header < vnetHeaderSize || a.header > maxVnetSize:
		return fmt.Errorf("its packets have a virtio header of %d bytes: %w", a.header, errors.ErrUnsupported)
	}
	return nil
}

// explainAttach says what an errno of attaching means. Each of them may be the answer to a name that is another's by now, or
// nobody's (EBUSY: attachOnly).
func (o *opener) explainAttach(a *attachment, err error) error {
	link, gone := o.linkByName(a.link.Name)
	switch {
	case errors.Is(gone, unix.ENODEV), gone == nil && link.Index != a.link.Index:
		return errVanished
	case errors.Is(err, os.ErrPermission):
		return needs(err, "CAP_NET_ADMIN in the network namespace, or to be the device's "+ownerText(&a.link.Tun))
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%w (a device has at most %d queues)", err, maxQueues)
	}
	return err
}

func ownerText(t *kernel.Tun) string {
	switch {
	case t.Owner >= 0 && t.Group >= 0:
		return fmt.Sprintf("owner, uid %d, in its group, gid %d", t.Owner, t.Group)
	case t.Group >= 0:
		return fmt.Sprintf("group, gid %d", t.Group)
	}
	return fmt.Sprintf("owner, uid %d", t.Owner)
}

// onlyOurs counts by index, which no renaming deceives: as many queues as we have descriptors.
func (o *opener) onlyOurs(a *attachment) error {
	link, err := o.linkByIndex(a.link.Index)
	if err != nil {
		return err
	}
	a.link = link
	switch n := link.Tun.Queues + link.Tun.Disabled; {
	case !link.Tun.MultiQueue || n == len(a.fds):
		return nil
	case n > len(a.fds):
		return fmt.Errorf("it has %d queues, we have %d: %w", n, len(a.fds), unix.EBUSY)
	}
	return errVanished // some of ours are elsewhere
}

// linkOf finds the interface behind a descriptor, which has no index of its own: by name, and again by name if it was
// renamed in between. Names repeat from namespace to namespace, so the device's is compared with ours where the kernel tells.
func (o *opener) linkOf(fd int) (kernel.Link, error) {
	for range 8 {
		name, _, err := getIff(fd)
		if errors.Is(err, unix.EBADFD) {
			break // deleted
		}
		if err != nil {
			return kernel.Link{}, fmt.Errorf("read back the device: %w", err)
		}
		link, err := o.linkByName(name)
		if errors.Is(err, unix.ENODEV) || err == nil && link.Name != name { // an alternative name of another
			continue
		}
		if err != nil {
			return kernel.Link{}, err
		}
		if _, err := sameNamespace(fd); errors.Is(err, errElsewhere) {
			break
		} else if err != nil {
			return kernel.Link{}, err
		}
		if again, _, err := getIff(fd); err == nil && again == name {
			return link, nil
		}
	}
	return kernel.Link{}, errVanished
}

// sameNamespace compares the network namespace of the device behind fd with the thread's. Without CAP_NET_ADMIN the kernel
// does not tell (kernel.md V17).
func sameNamespace(fd int) (verified bool, err error) {
	there, err := deviceNetNS(fd)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		return false, nil // EINVAL and ENOTTY: a kernel before 5.10
	}
	if err != nil {
		return false, fmt.Errorf("read the device's network namespace: %w", err)
	}
	defer unix.Close(there)
	here, err := threadNetNS()
	if errors.Is(err, os.ErrPermission) {
		return true, errElsewhere // what is allowed there and not here is not the same
	}
	if err != nil {
		return false, fmt.Errorf("read our network namespace: %w", err)
	}
	defer unix.Close(here)
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(there, &a), unix.Fstat(here, &b)); err != nil {
		return false, fmt.Errorf("compare network namespaces: %w", err)
	}
	if a.Dev != b.Dev || a.Ino != b.Ino {
		return true, errElsewhere
	}
	return true, nil
}

var errElsewhere = errors.New("the device lives in another network namespace")

func (o *opener) linkByName(name string) (kernel.Link, error) {
	return getLink(o.conn, rtnl.GetLinkByName(name))
}

func (o *opener) linkByIndex(index int) (kernel.Link, error) {
	return getLink(o.conn, rtnl.GetLink(index))
}

// getLink asks for one interface.
func getLink(c conn, request rtnl.Message) (kernel.Link, error) {
	result := c.Do(request)[0]
	switch {
	case result.Err != nil:
		return kernel.Link{}, fmt.Errorf("read the link: %w", result.Err)
	case len(result.Answers) != 1:
		return kernel.Link{}, fmt.Errorf("read the link: %d answers", len(result.Answers))
	}
	return rtnl.DecodeLink(result.Answers[0])
}
