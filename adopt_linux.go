package overlay

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

// adopt checks that fds are the queues of one TUN device in this namespace, all of them, and works on duplicates: the
// caller's are closed when nothing can fail any more. It changes nothing; attachment.queues does, when all is well.
func (o *opener) adopt(fds []int) (*attachment, error) {
	a := &attachment{adopted: fds, without: o.cfg.NoOffload}
	name, err := o.takeDuplicates(a)
	if err != nil {
		a.close()
		return nil, opError("adopt", name, err)
	}
	return a, nil
}

func (o *opener) takeDuplicates(a *attachment) (name string, err error) {
	for _, fd := range a.adopted {
		duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return "", fmt.Errorf("descriptor %d: %w", fd, err)
		}
		a.fds = append(a.fds, duplicate)
	}
	for i := range a.fds {
		if err := a.inspect(i, &name); err != nil {
			return name, err
		}
	}
	if !nameFits(o.cfg.Name, name) {
		return name, fmt.Errorf("its name is not %q, as Config says", o.cfg.Name)
	}
	if err := o.identify(a); err != nil {
		return name, err
	}
	return name, o.agrees(&a.link.Tun)
}

// agrees compares what Config says, where it says something, of what the device keeps.
func (o *opener) agrees(is *kernel.Tun) error {
	switch said := o.cfg; {
	case said.Owner != 0 && int64(said.Owner) != is.Owner:
		return fmt.Errorf("its owner is %s, Config says uid %d", idText("uid", is.Owner), said.Owner)
	case said.Group != 0 && int64(said.Group) != is.Group:
		return fmt.Errorf("its group is %s, Config says gid %d", idText("gid", is.Group), said.Group)
	case said.Persist && !is.Persist:
		return errors.New("it ends with its descriptors, Config says that it shall not")
	}
	return nil
}

func idText(kind string, id int64) string {
	if id < 0 {
		return "not set"
	}
	return fmt.Sprintf("%s %d", kind, id)
}

// inspect checks the i-th descriptor by itself and against those before it.
func (a *attachment) inspect(i int, name *string) error {
	fd, theirs := a.fds[i], a.adopted[i]
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil || !isNode(&stat) {
		return errors.Join(fmt.Errorf("descriptor %d is %w", theirs, errNotNode), err)
	}
	mode, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || mode&unix.O_ACCMODE != unix.O_RDWR {
		return errors.Join(fmt.Errorf("descriptor %d is not open for reading and writing", theirs), err)
	}
	got, flags, err := getIff(fd)
	if err != nil {
		return fmt.Errorf("descriptor %d is not attached to a device: %w", theirs, err)
	}
	if i == 0 {
		*name, a.flags = got, flags
	}
	if got != *name || flags&framing != a.flags&framing {
		return fmt.Errorf("descriptor %d is of %s with flags %#x, descriptor %d of %s with flags %#x",
			a.adopted[0], *name, a.flags&framing, theirs, got, flags&framing)
	}
	for j := range i {
		if sameDescription(a.fds[j], fd) {
			return fmt.Errorf("descriptors %d and %d are duplicates: one queue, not two", a.adopted[j], theirs)
		}
	}
	return a.acceptable(theirs, flags)
}

func (a *attachment) acceptable(fd int, flags tunFlags) error {
	switch {
	case flags&flagTUN == 0:
		return errors.New("a TAP device: this package carries IP packets only")
	case flags&flagNAPI != 0:
		return errors.New("it was opened with IFF_NAPI, which this package refuses")
	case flags&flagDetached != 0:
		return fmt.Errorf("the queue of descriptor %d is detached (IFF_DETACH_QUEUE): no packet would reach it", fd)
	}
	return a.measureHeader(a.fds[0])
}

// identify finds the interface, and makes sure that it is here and that no other queue of it swallows flows.
func (o *opener) identify(a *attachment) (err error) {
	for _, fd := range a.fds {
		verified, err := sameNamespace(fd)
		if errors.Is(err, errElsewhere) {
			return fmt.Errorf("%w: name it in Config.NetNS", err)
		}
		if err != nil {
			return err
		}
		a.unverified = a.unverified || !verified
	}
	if a.link, err = o.linkOf(a.fds[0]); err != nil {
		return err
	}
	if a.link.Tun.PacketInfo {
		return errors.New("its packets have the packet information header: open it with IFF_NO_PI")
	}
	if err = o.onlyOurs(a); errors.Is(err, unix.EBUSY) {
		return busy(a.link.Name, err)
	}
	return err
}

// nameFits says whether name may be what a Config's Name led to.
func nameFits(pattern, name string) bool {
	before, after, has := strings.Cut(pattern, "%d")
	if !has {
		return pattern == "" || pattern == name
	}
	number, ok := strings.CutPrefix(name, before)
	if ok {
		number, ok = strings.CutSuffix(number, after)
	}
	n, err := strconv.ParseUint(number, 10, 31)
	return ok && err == nil && strconv.FormatUint(n, 10) == number
}
