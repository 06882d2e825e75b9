package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"example.com/overlay/internal/netns"

	"golang.org/x/sys/unix"
)

// Ability is something that a test needs and a system may lack.
type Ability string

// The abilities, beside Program.
const (
	NetAdmin   Ability = "NetAdmin"   // make network namespaces and configure what is in them
	TUN        Ability = "TUN"        // make TUN links there
	IPv6       Ability = "IPv6"       // IPv6 is there and not disabled in new namespaces
	InitUserNS Ability = "InitUserNS" // CAP_NET_ADMIN over the whole machine, as for SO_RCVBUFFORCE
	SecondUID  Ability = "SecondUID"  // run processes as another user
	Mknod      Ability = "Mknod"      // make device nodes
)

const programPrefix = "program "

// Program is the ability to run the program of that name.
func Program(name string) Ability { return Ability(programPrefix + name) }

// Require skips the test, naming the first ability that is missing and why. Where the environment says OVERLAY_REQUIRE=1 it
// fails the test instead, and always where a probe could not tell.
func Require(t testing.TB, abilities ...Ability) {
	t.Helper()
	for _, a := range abilities {
		why, err := a.probe()
		if err != nil {
			t.Fatalf("cannot tell whether there is the ability %s: %v", a, err)
		}
		if why != nil {
			missing(t, "the ability "+string(a), why)
		}
	}
}

// missing ends a test that cannot run here.
func missing(t testing.TB, what string, why error) {
	t.Helper()
	if notIsolated != nil {
		why = fmt.Errorf("%w (and no namespace for the tests: %w)", why, notIsolated)
	}
	if os.Getenv("OVERLAY_REQUIRE") == "1" {
		t.Fatalf("missing %s, which OVERLAY_REQUIRE=1 demands: %v", what, why)
	}
	t.Skipf("missing %s: %v", what, why)
}

// probed holds the conclusive answers of probes: Ability to error, why it is missing, or to nil.
var probed sync.Map

// probe tells why the ability is missing, nil if it is there, or in err that this could not be found out.
func (a Ability) probe() (why, err error) {
	if v, ok := probed.Load(a); ok {
		why, _ = v.(error)
		return why, nil
	}
	try, ok := probes[a]
	if name, isProgram := strings.CutPrefix(string(a), programPrefix); isProgram {
		try, ok = func() error { _, err := lookPath(name); return err }, true
	}
	if !ok {
		return nil, errors.New("there is no probe for it")
	}
	if why = try(); why != nil && !conclusive(why) {
		return nil, why
	}
	probed.Store(a, why)
	return why, nil
}

// conclusive tells a probe's "no" from an accident. ENOSPC is a limit on namespaces that somebody set.
func conclusive(err error) bool {
	for _, no := range []error{
		unix.EPERM, unix.EACCES, unix.ENOENT, unix.ENODEV, unix.ENXIO, unix.ENOSYS, unix.EINVAL, unix.EOPNOTSUPP,
		unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EADDRNOTAVAIL, unix.ENOSPC, unix.EROFS, exec.ErrNotFound,
	} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// probes try the thing itself, not what a version or a capability bit says about it.
var probes = map[Ability]func() error{
	NetAdmin:   func() error { return inNewNS(func() error { return nil }) },
	TUN:        func() error { return inNewNS(probeTUN) },
	IPv6:       func() error { return inNewNS(probeIPv6) },
	InitUserNS: probeInitUserNS,
	SecondUID:  probeSecondUID,
	Mknod:      probeMknod,
}

func inNewNS(fn func() error) error {
	fd, err := newNS()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return (&NS{fd: fd}).do(fn)
}

func probeTUN() error {
	f, err := openTun("probe")
	if err != nil {
		return err
	}
	return f.Close()
}

func probeIPv6() error {
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(s)
	loopback := &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	if err := unix.Bind(s, loopback); err != nil {
		return fmt.Errorf("bind to ::1: %w", err)
	}
	return nil
}

func probeInitUserNS() error {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(s)
	if err := unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<16); err != nil {
		return fmt.Errorf("SO_RCVBUFFORCE: %w", err)
	}
	return nil
}

func probeSecondUID() error {
	cmd, err := command([]string{"true"})
	if err != nil {
		return err
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	return netns.Do("", cmd.Run)
}

func probeMknod() error {
	dir, err := os.MkdirTemp("", "nstest")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		return fmt.Errorf("mknod: %w", err)
	}
	return nil
}
