package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// create makes a device that nobody else has a queue of.
//
// Between TUNSETIFF and TUNSETOWNER any local user may attach a queue to a multi-queue device (kernel.md V4), and through it
// change owner, persistence and what not. So the device is only kept if, after TUNSETOWNER, the kernel counts our queue
// alone, and everything that he may have changed is as it should be.
func (o *opener) create() (*attachment, error) {
	for busyTry, strangerTry := 1, 1; ; {
		a, err := o.createOnce()
		switch {
		case err == nil:
			return a, nil
		case errors.Is(err, errStranger) && strangerTry < strangerTries:
			strangerTry++
		case errors.Is(err, unix.EBUSY) && o.passes(busyTry):
			time.Sleep(busyPause << (busyTry - 1))
			busyTry++
		default:
			return nil, o.explainCreate(err)
		}
	}
}

var errStranger = errors.New("another process attached a queue to the new device, again and again")

// passes says whether the name may soon be free, after so many tries: that of a device that goes with its last descriptor, or
// has just gone. The kernel takes 20 ms for each device that it closes, and a child that inherited a dozen closes one after
// the other when it executes; it does not hold them any more by then (kernel.md U24, V2). A process that seems to hold it from
// another namespace ends the wait too, although it may be of a namesake there: short patience remains.
func (o *opener) passes(try int) bool {
	link, err := o.linkByName(o.cfg.Name)
	switch {
	case err == nil && (link.Kind != "tun" || link.Tun.Persist), try >= closingTries:
		return false
	case try < busyTries:
		return true
	}
	here, elsewhere := holdersOf(o.cfg.Name)
	return len(here)+len(elsewhere) == 0
}

// explainCreate names the device and says what errno of creating it means.
func (o *opener) explainCreate(err error) error {
	var op *OpError
	switch {
	case errors.As(err, &op):
		return err
	case errors.Is(err, unix.EBUSY):
		err = o.explainTaken(err)
	case errors.Is(err, os.ErrPermission):
		err = needs(err, "CAP_NET_ADMIN in the network namespace")
	}
	return opError("create", o.cfg.Name, err)
}

// explainTaken says who has the name.
func (o *opener) explainTaken(err error) error {
	link, gone := o.linkByName(o.cfg.Name)
	switch {
	case gone != nil:
		return busy(o.cfg.Name, err)
	case link.Kind != "tun":
		return fmt.Errorf("%w: the name is that of interface %d, of kind %q (%w)", ErrBusy, link.Index, link.Kind, err)
	}
	if here, elsewhere := holdersOf(link.Name); link.Tun.Persist && len(here)+len(elsewhere) == 0 {
		return fmt.Errorf("%w: the name is that of a persistent device, for Mode Attach (%w)", ErrBusy, err)
	}
	return busy(link.Name, err)
}

func (o *opener) createOnce() (*attachment, error) {
	fds, err := openNodes(o.cfg.queues())
	if err != nil {
		return nil, err
	}
	a := &attachment{fds: fds, persist: o.cfg.Persist, without: o.cfg.NoOffload}
	flags := flagTUN | flagNoPI | vnetHeader(fds[0])
	if len(fds) > 1 {
		flags |= flagMultiQueue
	}
	name, exclusive, err := o.createDevice(fds[0], flags)
	if err != nil {
		a.close()
		return nil, err
	}
	if err := o.claim(a, exclusive, flags); err != nil {
		o.destroy(a, exclusive)
		return nil, opError("create", name, err)
	}
	return a, nil
}

// createDevice creates with the exclusive flag, or without it where a sandbox does not know it; then it looks first, because
// already attaching to a persistent device would change it, and claim proves that the device is new.
func (o *opener) createDevice(fd int, flags tunFlags) (name string, exclusive bool, err error) {
	name, err = o.setIff(fd, o.cfg.Name, flags|flagExclusive)
	if err == nil || !errors.Is(err, unix.EINVAL) {
		return name, true, err
	}
	if o.cfg.Name != "" && !strings.Contains(o.cfg.Name, "%") {
		if _, err := o.linkByName(o.cfg.Name); !errors.Is(err, unix.ENODEV) {
			return "", false, errors.Join(unix.EBUSY, err)
		}
	}
	name, err = o.setIff(fd, o.cfg.Name, flags)
	return name, false, err
}

// claim makes the device with its first queue ours, then adds the other queues.
func (o *opener) claim(a *attachment, exclusive bool, flags tunFlags) (err error) {
	if a.link, err = o.linkOf(a.fds[0]); err != nil {
		return err
	}
	// A device that was there before is persistent or has another's queue.
	if t := a.link.Tun; !exclusive && (t.Persist || t.Queues+t.Disabled > 1) {
		return fmt.Errorf("%w: the name was taken in between", ErrBusy)
	}
	owner, group := o.ownership()
	if err := own(a.fds[0], owner, group); err != nil {
		return err
	}
	if len(a.fds) > 1 {
		if err := o.alone(a, owner, group); err != nil {
			return err
		}
		if err := setDefaults(a.fds[0]); err != nil {
			return err
		}
	}
	if err := o.addQueues(a, a.fds[1:], flags); err != nil {
		return err
	}
	if err = o.onlyOurs(a); errors.Is(err, unix.EBUSY) {
		return busy(a.link.Name, err)
	}
	return err
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
			return fmt.Errorf("set owner %d: %w", owner, unmapped(err))
		}
	}
	if group >= 0 {
		if err := setGroup(fd, int(group)); err != nil {
			return fmt.Errorf("set group %d: %w", group, unmapped(err))
		}
	}
	return nil
}

// unmapped explains the only reason for which the kernel refuses an id.
func unmapped(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w (this user namespace has no such id)", err)
	}
	return err
}

// alone proves that no stranger has a queue of the new device, now that nobody else gets any, and that none who had one for a
// moment left it changed in a way that cannot be set right: setDefaults does the rest.
func (o *opener) alone(a *attachment, owner, group int64) error {
	link, err := o.linkByIndex(a.link.Index)
	if err != nil {
		return err
	}
	switch t := link.Tun; {
	case !t.MultiQueue:
		return errors.New("the kernel does not tell how many queues the device has: a stranger's could be among them (needs Linux 4.17)")
	case t.Queues+t.Disabled != 1, t.Owner != owner, t.Group != group, t.Persist, link.Hardware != unix.ARPHRD_NONE:
		return errStranger
	}
	return nil
}

// destroy takes a half-made device away. One that a stranger holds too, or made persistent, outlives our descriptors, so it
// is deleted by index, if that still is the one behind them; but not if it may have been there before us.
func (o *opener) destroy(a *attachment, exclusive bool) {
	if exclusive {
		if link, err := o.linkOf(a.fds[0]); err == nil {
			o.conn.Do(rtnl.DelLink(link.Index)) // on failure the close below does it for a device that is ours alone
		}
	}
	a.close()
}
