package overlay

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// attachment is a device with our descriptors on it, one a queue, in the order of the queues.
type attachment struct {
	fds        []int
	flags      tunFlags // as read back
	link       kernel.Link
	adopted    []int // the caller's, of which fds are duplicates
	unverified bool  // the device's namespace could not be compared with ours
}

// close closes the descriptors; a device that is not persistent goes with the last.
func (a *attachment) close() {
	for _, fd := range a.fds {
		unix.Close(fd)
	}
	a.fds = nil
}

// queues makes queues of the descriptors, which are theirs from then on, and closes the caller's originals, if any. On error
// it closes all that is ours.
func (a *attachment) queues(bare *atomic.Bool) (queues []*tunQueue, err error) {
	header := 0
	if a.flags&flagVnetHeader != 0 {
		if header, err = headerSize(a.fds[0]); err != nil || header > maxVnetSize {
			a.close()
			return nil, fmt.Errorf("packets have a virtio header of %d bytes: %w", header, errors.Join(err, errors.ErrUnsupported))
		}
	}
	undo, err := nonblocking(a.fds)
	for len(a.fds) > 0 && err == nil {
		var q *tunQueue
		if q, err = newTunQueue(a.fds[0], a.link.Name, header, bare); err == nil {
			queues = append(queues, q)
			a.fds = a.fds[1:]
		}
	}
	if err != nil {
		undo()
		for _, q := range queues {
			q.Close()
		}
		a.close()
		return nil, err
	}
	for _, fd := range a.adopted {
		unix.Close(fd)
	}
	return queues, nil
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
}

// open does what Config.Mode says.
func (o *opener) open() (*attachment, error) {
	if o.cfg.Mode == Create {
		return o.create()
	}
	link, err := o.linkByName(o.cfg.Name)
	switch missing := errors.Is(err, unix.ENODEV); {
	case missing && o.cfg.Mode == AttachOrCreate:
		return o.create()
	case missing:
		return nil, opError("attach to", o.cfg.Name, fmt.Errorf("%w: %w", os.ErrNotExist, err))
	case err != nil:
		return nil, opError("attach to", o.cfg.Name, err)
	}
	return o.attach(link)
}

// Bounds of create's patience.
const (
	strangerTries = 32                    // with a stranger that spins for the first queue, about one try in three succeeds
	busyTries     = 5                     // a device whose last descriptor is just being closed
	busyPause     = 10 * time.Millisecond //
)

// create makes a device that nobody else has a queue of.
//
// Between TUNSETIFF and TUNSETOWNER any local user may attach a queue to a multi-queue device (kernel.md V4), and through it
// change owner and persistence. So the device is only kept if, after TUNSETOWNER, the kernel counts our queue alone.
func (o *opener) create() (*attachment, error) {
	for try := 1; ; try++ {
		a, err := o.createOnce()
		switch {
		case err == nil:
			return a, nil
		case errors.Is(err, unix.EBUSY) && try < busyTries && !errors.Is(err, errStranger):
			time.Sleep(busyPause)
		case !errors.Is(err, errStranger) || try == strangerTries:
			return nil, err
		}
	}
}

var errStranger = errors.New("another process attached a queue to the new device, again and again")

func (o *opener) createOnce() (*attachment, error) {
	fd, err := openNode()
	if err != nil {
		return nil, err
	}
	flags := flagTUN | flagNoPI
	if o.cfg.queues() > 1 {
		flags |= flagMultiQueue
	}
	name, exclusive, err := createDevice(fd, o.cfg.Name, flags)
	if err != nil {
		unix.Close(fd)
		return nil, o.explainCreate(err)
	}
	a := &attachment{fds: []int{fd}}
	if err := o.claim(a, name, exclusive, flags); err != nil {
		o.destroy(a, exclusive)
		return nil, opError("create", name, err)
	}
	return a, nil
}

// createDevice creates with the exclusive flag, or without it where a sandbox refuses to know it; claim then proves that the
// device is new.
func createDevice(fd int, name string, flags tunFlags) (got string, exclusive bool, err error) {
	got, err = setIff(fd, name, flags|flagExclusive)
	if err == nil || !errors.Is(err, unix.EINVAL) {
		return got, true, err
	}
	got, err = setIff(fd, name, flags)
	return got, false, err
}

func (o *opener) explainCreate(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		err = busy(o.cfg.Name, err)
	case errors.Is(err, os.ErrPermission):
		err = needs(err, "CAP_NET_ADMIN in the network namespace")
	}
	return opError("create", o.cfg.Name, err)
}

// claim makes the device with its first queue ours, then adds the other queues.
func (o *opener) claim(a *attachment, name string, exclusive bool, flags tunFlags) error {
	link, err := o.linkOf(a.fds[0])
	if err != nil {
		return err
	}
	a.link = link
	// A device that was there before is persistent or has another's queue.
	if !exclusive && (link.Tun.Persist || link.Tun.Queues > 1) {
		return fmt.Errorf("%w (the name is taken)", ErrBusy)
	}
	owner, group := o.ownership()
	if err := own(a.fds[0], owner, group); err != nil {
		return err
	}
	if flags&flagMultiQueue != 0 {
		if err := o.alone(a, owner, group); err != nil {
			return err
		}
	}
	if err := o.addQueues(a, name, flags); err != nil {
		return err
	}
	if o.cfg.Persist {
		return setPersist(a.fds[0])
	}
	return nil
}

// ownership returns uid and gid to be set, -1 for none: where both are set the kernel wants both to match (kernel.md V10).
func (o *opener) ownership() (owner, group int64) {
	owner, group = -1, -1
	if o.cfg.Group != 0 {
		group = int64(o.cfg.Group)
	}
	if o.cfg.Owner != 0 {
		owner = int64(o.cfg.Owner)
	} else if o.cfg.Group == 0 {
		owner = int64(os.Geteuid())
	}
	return owner, group
}

func own(fd int, owner, group int64) error {
	if owner >= 0 {
		if err := setOwner(fd, int(owner)); err != nil {
			return fmt.Errorf("set owner %d: %w", owner, err)
		}
	}
	if group >= 0 {
		if err := setGroup(fd, int(group)); err != nil {
			return fmt.Errorf("set group %d: %w", group, err)
		}
	}
	return nil
}

// alone proves that no stranger got at the new device before it had an owner.
func (o *opener) alone(a *attachment, owner, group int64) error {
	link, err := o.linkByIndex(a.link.Index)
	if err != nil {
		return err
	}
	t := link.Tun
	if t.Queues+t.Disabled != 1 || t.Owner != owner || t.Group != group || t.Persist || link.Hardware != unix.ARPHRD_NONE {
		return errStranger
	}
	return nil
}

// destroy takes a half-made device away. One that a stranger holds too, or made persistent, outlives our descriptor, so it
// is deleted by index; but not if it may have been there before us.
func (o *opener) destroy(a *attachment, exclusive bool) {
	if exclusive && a.link.Index != 0 {
		o.conn.Do(rtnl.DelLink(a.link.Index)) // on failure the close below does it for every device that is ours alone
	}
	a.close()
}

// attach takes a prepared device, with as many queues as Config says. Owner, group and persistence stay (kernel.md V10).
func (o *opener) attach(link kernel.Link) (*attachment, error) {
	a := &attachment{link: link}
	err := o.attachQueues(a)
	if err != nil {
		a.close()
		return nil, opError("attach to", o.cfg.Name, err)
	}
	return a, nil
}

func (o *opener) attachQueues(a *attachment) error {
	flags := flagTUN | flagNoPI
	switch {
	case a.link.Kind != "tun" || a.link.Hardware != unix.ARPHRD_NONE:
		return fmt.Errorf("not a TUN device")
	case a.link.Tun.MultiQueue:
		flags |= flagMultiQueue
	case o.cfg.queues() > 1:
		return fmt.Errorf("the device has a single queue, Config.Queues is %d", o.cfg.queues())
	}
	if err := o.addQueues(a, o.cfg.Name, flags); err != nil {
		return err
	}
	return o.onlyOurs(a)
}

// onlyOurs refuses a device on which somebody else reads: that queue would swallow its share of the flows.
func (o *opener) onlyOurs(a *attachment) error {
	link, err := o.linkByIndex(a.link.Index)
	if err != nil {
		return err
	}
	a.link = link
	if link.Tun.MultiQueue && link.Tun.Queues+link.Tun.Disabled != len(a.fds) {
		return busy(link.Name, fmt.Errorf("it has %d queues, we have %d", link.Tun.Queues+link.Tun.Disabled, len(a.fds)))
	}
	return nil
}

// addQueues attaches until there are as many as Config says, and checks that each reached the same device with the same
// framing: by name the kernel would as soon create a new device as attach to a renamed or moved one (kernel.md A24, U50).
func (o *opener) addQueues(a *attachment, name string, flags tunFlags) error {
	for len(a.fds) < o.cfg.queues() {
		fd, err := openNode()
		if err != nil {
			return err
		}
		a.fds = append(a.fds, fd)
		if _, err := setIff(fd, name, flags); err != nil {
			return explainAttach(name, err)
		}
	}
	for _, fd := range a.fds {
		if err := o.sameDevice(a, fd, flags); err != nil {
			return err
		}
		if err := setOffload(fd, 0); err != nil {
			return fmt.Errorf("set offload: %w", err)
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
		return fmt.Errorf("a queue reached interface %d instead of %d: the device was renamed, moved or deleted", link.Index, a.link.Index)
	}
	_, got, err := getIff(fd)
	if err != nil {
		return err
	}
	if got&framing != flags&framing {
		return fmt.Errorf("a queue has flags %#x instead of %#x", got&framing, flags&framing)
	}
	a.flags = got
	return nil
}

func explainAttach(name string, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return busy(name, err)
	case errors.Is(err, os.ErrPermission):
		return needs(err, "CAP_NET_ADMIN, or to be the device's owner or group")
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%w (a device has at most %d queues)", err, maxQueues)
	}
	return err
}

// linkOf finds the interface behind a descriptor, which has no index of its own: by name, and again by name if it was
// renamed in between.
func (o *opener) linkOf(fd int) (kernel.Link, error) {
	for range 8 {
		name, _, err := getIff(fd)
		if err != nil {
			return kernel.Link{}, fmt.Errorf("read back the device: %w", err)
		}
		link, err := o.linkByName(name)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return kernel.Link{}, err
		}
		if again, _, err := getIff(fd); err == nil && again == name {
			return link, nil
		}
	}
	return kernel.Link{}, fmt.Errorf("the device is not in this network namespace: %w", unix.ENODEV)
}

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
