package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// adopt checks that fds are the queues of one TUN device in this namespace, all of them, and works on duplicates: the
// caller's are closed when nothing can fail any more. It changes nothing but the device's offload mask, and that last.
func (o *opener) adopt(fds []int) (*attachment, error) {
	a := &attachment{adopted: fds}
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
	if name, err = o.inspect(a); err != nil {
		return name, err
	}
	for _, fd := range a.fds {
		if err := setOffload(fd, 0); err != nil {
			return name, fmt.Errorf("set offload: %w", err)
		}
	}
	return name, nil
}

func (o *opener) inspect(a *attachment) (name string, err error) {
	for i, fd := range a.fds {
		got, flags, err := getIff(fd)
		if err != nil {
			return name, fmt.Errorf("descriptor %d is not attached to a TUN device: %w", a.adopted[i], err)
		}
		if i > 0 && (got != name || flags&framing != a.flags&framing) {
			return name, fmt.Errorf("descriptor %d is of %s with flags %#x, descriptor %d of %s with flags %#x",
				a.adopted[0], name, a.flags, a.adopted[i], got, flags)
		}
		name, a.flags = got, flags
	}
	switch flags := a.flags; {
	case flags&flagTUN == 0:
		return name, errors.New("a TAP device: this package carries IP packets only")
	case flags&flagNoPI == 0:
		return name, errors.New("its packets have the packet information header: open it with IFF_NO_PI")
	case flags&flagNAPI != 0:
		return name, errors.New("it was opened with IFF_NAPI, which this package refuses")
	case flags&flagMultiQueue == 0 && len(a.fds) > 1:
		return name, fmt.Errorf("the device has a single queue, and there are %d descriptors", len(a.fds))
	case !nameFits(o.cfg.Name, name):
		return name, fmt.Errorf("its name is not %q, as Config says", o.cfg.Name)
	}
	if err := o.sameNamespace(a); err != nil {
		return name, err
	}
	if a.link, err = o.linkOf(a.fds[0]); err != nil {
		return name, err
	}
	return name, o.onlyOurs(a)
}

// nameFits says whether name may be what a Config's Name led to.
func nameFits(pattern, name string) bool {
	before, after, has := strings.Cut(pattern, "%d")
	if !has {
		return pattern == "" || pattern == name
	}
	return strings.HasPrefix(name, before) && strings.HasSuffix(name, after)
}

// sameNamespace compares the device's network namespace with ours. Without CAP_NET_ADMIN the kernel does not tell (kernel.md
// V17): then name and flags have to do, and State says so.
func (o *opener) sameNamespace(a *attachment) error {
	fd, err := deviceNetNS(a.fds[0])
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		a.unverified = true // EINVAL and ENOTTY: a kernel before 5.10
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the device's namespace: %w", err)
	}
	defer unix.Close(fd)
	var there, here unix.Stat_t
	if err := unix.Fstat(fd, &there); err != nil {
		return fmt.Errorf("read the device's namespace: %w", err)
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &here); err != nil {
		return fmt.Errorf("read our namespace: %w", err)
	}
	if there.Dev != here.Dev || there.Ino != here.Ino {
		return errors.New("the device lives in another network namespace: name it in Config.NetNS")
	}
	return nil
}
