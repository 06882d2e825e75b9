package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	nodePath  = "/dev/net/tun"
	nodeMode  = unix.S_IFCHR | 0o600
	nodeMajor = 10
	nodeMinor = 200
	nodeTries = 3 // somebody may take away what somebody else makes
)

// openNode opens /dev/net/tun, making it where it is missing. The caller closes the descriptor.
func openNode() (int, error) {
	fd, err := unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	for try := 1; errors.Is(err, unix.ENOENT) && try < nodeTries; try++ {
		if err = makeNode(); err != nil {
			return -1, opError("open "+nodePath, "", fmt.Errorf("there is none, and making it failed: %w", err))
		}
		fd, err = unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return -1, opError("open "+nodePath, "", explainNode(err))
	}
	var stat unix.Stat_t
	if err = unix.Fstat(fd, &stat); err == nil && !isNode(&stat) {
		err = errNotNode
	}
	if err != nil {
		unix.Close(fd)
		return -1, opError("open "+nodePath, "", err)
	}
	return fd, nil
}

// openNodes opens the node n times. All that may fail for want of descriptors fails here, before any device is touched.
func openNodes(n int) ([]int, error) {
	fds := make([]int, 0, n)
	for range n {
		fd, err := openNode()
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// makeNode makes the node as containers need it. Whoever makes it first wins: mknod follows no link and replaces nothing,
// and what then stands there is checked after opening. On error a directory made for the node is taken away again.
func makeNode() error {
	dir := filepath.Dir(nodePath)
	made := unix.Mkdir(dir, 0o755)
	if made != nil && !errors.Is(made, unix.EEXIST) {
		return needs(fmt.Errorf("make %s: %w", dir, made), "the right to write to "+filepath.Dir(dir))
	}
	err := unix.Mknod(nodePath, nodeMode, int(unix.Mkdev(nodeMajor, nodeMinor)))
	if err == nil || errors.Is(err, unix.EEXIST) {
		return nil
	}
	if made == nil {
		_ = unix.Rmdir(dir) // not empty: somebody uses it by now
	}
	if errors.Is(err, unix.ENOENT) {
		return nil // somebody else took the directory away: the caller tries again
	}
	return needs(err, "CAP_MKNOD in the first user namespace and the right to write to "+dir)
}

var errNotNode = fmt.Errorf("not the TUN node, which is character device %d:%d", nodeMajor, nodeMinor)

// isNode tells the TUN node from what somebody planted in its place, which would give the ioctls another meaning.
func isNode(stat *unix.Stat_t) bool {
	return stat.Mode&unix.S_IFMT == unix.S_IFCHR && uint64(stat.Rdev) == unix.Mkdev(nodeMajor, nodeMinor)
}

// explainNode says what an errno of opening the node means.
func explainNode(err error) error {
	var stat unix.Stat_t
	if unix.Stat(nodePath, &stat) == nil && !isNode(&stat) {
		return fmt.Errorf("%w (%w)", errNotNode, err)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("a link that leads nowhere: %w", err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("the kernel has no TUN driver (module tun): %w", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (%s)", err, describeNode())
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (a device control group or security module forbids it)", err)
	}
	return err
}

// describeNode tells the node's mode and owner, so that the reader of an error knows what to change.
func describeNode() string {
	var stat unix.Stat_t
	if unix.Stat(nodePath, &stat) != nil {
		return "its directory is closed"
	}
	owner := fmt.Sprintf("%d:%d", stat.Uid, stat.Gid)
	overflow, _ := os.ReadFile("/proc/sys/kernel/overflowuid")
	mapped, _ := os.ReadFile("/proc/self/uid_map")
	if strings.TrimSpace(string(overflow)) == fmt.Sprint(stat.Uid) && !hasID(string(mapped), stat.Uid) {
		owner = "somebody outside this user namespace"
	}
	text := fmt.Sprintf("its mode is %04o, its owner %s", stat.Mode&0o7777, owner)
	var fs unix.Statfs_t
	if unix.Statfs(nodePath, &fs) == nil && fs.Flags&unix.ST_NODEV != 0 {
		text += ", and its file system is mounted nodev"
	}
	return text
}

// hasID says whether a user namespace's uid_map has a place for id: lines of first id inside, first outside, and how many.
func hasID(uidMap string, id uint32) bool {
	for line := range strings.Lines(uidMap) {
		var inside, outside, count uint64
		n, _ := fmt.Sscan(line, &inside, &outside, &count)
		if n == 3 && uint64(id) >= inside && uint64(id)-inside < count {
			return true
		}
	}
	return false
}

// busy explains EBUSY, naming the processes that hold the device where /proc tells (kernel.md U23).
func busy(name string, err error) error {
	here, elsewhere := holdersOf(name)
	switch {
	case len(here) > 0:
		return fmt.Errorf("%w by %s (%w)", ErrBusy, strings.Join(here, ", "), err)
	case len(elsewhere) > 0:
		return fmt.Errorf("%w, perhaps by %s, from another network namespace (%w)", ErrBusy, strings.Join(elsewhere, ", "), err)
	}
	return fmt.Errorf("%w (%w)", ErrBusy, err)
}

// holdersOf lists the processes, ourselves included, that have a descriptor of a TUN device called name. A process may hold
// a device of a namespace that it is not in (by Config.NetNS, or in another thread than its first), so those outside the
// calling thread's are listed too, but apart: theirs may be another device of that name. Of our own descriptors we can tell.
func holdersOf(name string) (here, elsewhere []string) {
	entries, _ := os.ReadDir("/proc") // none: nothing to tell
	ours, _ := os.Readlink("/proc/thread-self/ns/net")
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		fds := descriptorsOf(e.Name(), name)
		theirs, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/net"))
		inside, told := err == nil && theirs == ours, false
		if isSelf(e.Name()) {
			fds, told = ofNamespace(fds, name)
		}
		switch {
		case len(fds) == 0:
		case inside || told:
			here = append(here, describeProcess(e.Name()))
		default:
			elsewhere = append(elsewhere, describeProcess(e.Name()))
		}
	}
	return here, elsewhere
}

// descriptorsOf lists the process's descriptors of a TUN device called name. Where the node is seems to depend on who looks
// (another mount namespace), so the path only spares us reading about all other descriptors.
func descriptorsOf(process, name string) (fds []int) {
	dir := filepath.Join("/proc", process)
	entries, _ := os.ReadDir(filepath.Join(dir, "fd")) // none: not for us to see
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, "fd", e.Name()))
		if err != nil || !strings.Contains(link, "tun") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, "fdinfo", e.Name()))
		if fd, bad := strconv.Atoi(e.Name()); bad == nil && err == nil && bytes.Contains(text, []byte("iff:\t"+name+"\n")) {
			fds = append(fds, fd)
		}
	}
	return fds
}

// ofNamespace leaves out those of our own descriptors whose device, called name, is not in the calling thread's namespace.
// told: one is; else the kernel does not tell of those that are left.
func ofNamespace(fds []int, name string) (left []int, told bool) {
	for _, fd := range fds {
		same, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) // its owner may close it at any time
		if err != nil {
			continue
		}
		var stat unix.Stat_t
		if unix.Fstat(same, &stat) == nil && isNode(&stat) {
			verified, err := sameNamespace(same)
			if got, _, bad := getIff(same); bad == nil && got == name && !errors.Is(err, errElsewhere) {
				left, told = append(left, fd), told || verified
			}
		}
		unix.Close(same)
	}
	return left, told
}

func isSelf(process string) bool {
	self, _ := os.Readlink("/proc/self") // not Getpid: this /proc may be another pid namespace's
	return process == self
}

// describeProcess names a process; what it calls itself is not trusted.
func describeProcess(process string) string {
	if isSelf(process) {
		return "this process"
	}
	comm, err := os.ReadFile(filepath.Join("/proc", process, "comm"))
	if err != nil {
		return "process " + process
	}
	printable := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSuffix(string(comm), "\n"))
	return fmt.Sprintf("process %s (%s)", process, printable)
}
