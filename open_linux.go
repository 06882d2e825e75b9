package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	nodePath  = "/dev/net/tun"
	nodeMode  = unix.S_IFCHR | 0o600
	nodeMajor = 10
	nodeMinor = 200
)

// openNode opens /dev/net/tun, making it where it is missing. The caller closes the descriptor.
func openNode() (int, error) {
	fd, err := unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		if err := makeNode(); err != nil {
			return -1, opError("open "+nodePath, "", fmt.Errorf("no such node, and making it failed: %w", err))
		}
		fd, err = unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return -1, opError("open "+nodePath, "", explainNode(err))
	}
	if err := checkNode(fd); err != nil {
		unix.Close(fd)
		return -1, opError("open "+nodePath, "", err)
	}
	return fd, nil
}

// makeNode makes the node as containers need it. Whoever makes it first wins: mknod follows no link and replaces nothing,
// and what then stands there is checked after opening.
func makeNode() error {
	if err := unix.Mkdir(filepath.Dir(nodePath), 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	err := unix.Mknod(nodePath, nodeMode, int(unix.Mkdev(nodeMajor, nodeMinor)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return needs(err, "CAP_MKNOD in the first user namespace")
	}
	return nil
}

// checkNode refuses what is no TUN node: a file that somebody planted would swallow the ioctls' meaning.
func checkNode(fd int) error {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFCHR || uint64(stat.Rdev) != unix.Mkdev(nodeMajor, nodeMinor) {
		return fmt.Errorf("not the TUN node, which is character device %d:%d", nodeMajor, nodeMinor)
	}
	return nil
}

// explainNode says what an errno of opening the node means.
func explainNode(err error) error {
	switch {
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
	return fmt.Sprintf("its mode is %04o, its owner %d:%d", stat.Mode&0o7777, stat.Uid, stat.Gid)
}

// busy explains EBUSY, naming the processes that hold the device where /proc tells (kernel.md U23).
func busy(name string, err error) error {
	holders := holdersOf(name)
	if len(holders) == 0 {
		return fmt.Errorf("%w (%w)", ErrBusy, err)
	}
	return fmt.Errorf("%w by %s (%w)", ErrBusy, strings.Join(holders, ", "), err)
}

// holdersOf lists processes, ourselves included, with a descriptor of the TUN device called name, in this network namespace
// as far as one can see.
func holdersOf(name string) []string {
	files, _ := filepath.Glob("/proc/[0-9]*/fdinfo/[0-9]*") // the pattern is well-formed: no error
	here, _ := os.Readlink("/proc/thread-self/ns/net")
	var holders []string
	seen := make(map[string]bool)
	for _, file := range files {
		process := strings.Split(file, "/")[2]
		if seen[process] {
			continue
		}
		link, err := os.Readlink(filepath.Join(filepath.Dir(filepath.Dir(file)), "fd", filepath.Base(file)))
		if err != nil || link != nodePath {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text)+"\n", "iff:\t"+name+"\n") {
			continue
		}
		there, err := os.Readlink(filepath.Join("/proc", process, "ns/net"))
		if err == nil && there != here {
			continue
		}
		seen[process] = true
		holders = append(holders, describeProcess(process))
	}
	return holders
}

func describeProcess(process string) string {
	if process == strconv.Itoa(os.Getpid()) {
		return "this process"
	}
	name, err := os.ReadFile(filepath.Join("/proc", process, "comm"))
	if err != nil {
		return "process " + process
	}
	return fmt.Sprintf("process %s (%s)", process, strings.TrimSpace(string(name)))
}
