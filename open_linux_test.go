package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/netns"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("open new", helperNew)
	nstest.Helper("open node", helperNode)
}

// newIn opens a device in a namespace and closes it at the end of the test.
func newIn(t testing.TB, ns *nstest.NS, cfg Config) Device {
	t.Helper()
	cfg.NetNS = ns.Path()
	return opened(t)(New(cfg))
}

// opened is for New and Adopt: it fails the test if they did, and closes the device at its end.
func opened(t testing.TB) func(Device, error) Device {
	return func(d Device, err error) Device {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
}

// newWith is New with an opener that the test has its hands in.
func newWith(cfg Config, iff func(fd int, name string, flags tunFlags) (string, error)) (Device, error) {
	return newTun(cfg, func(o *opener) (*attachment, error) {
		o.iff = iff
		return o.open()
	})
}

// rawTun makes a device, or attaches to one, without this package.
func rawTun(t testing.TB, ns *nstest.NS, name string, flags tunFlags) int {
	t.Helper()
	fd, err := tryTun(ns.Path(), name, flags)
	if err != nil {
		t.Fatalf("tun %s: %v", name, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func tryTun(path, name string, flags tunFlags) (fd int, err error) {
	err = netns.Do(path, func() error {
		if fd, err = unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		if _, err = setIff(fd, name, flags); err != nil {
			unix.Close(fd)
		}
		return err
	})
	return fd, err
}

// otherID is a uid and a gid that are not ours, where this user namespace has any: else a test proves less.
var otherID = sync.OnceValue(func() int {
	const other = 1000
	var inside, outside, count int
	text, _ := os.ReadFile("/proc/self/uid_map")
	if n, _ := fmt.Sscan(string(text), &inside, &outside, &count); n == 3 && inside+count <= other {
		return 0
	}
	return other
})

// linkIn reads an interface by name; false if there is none.
func linkIn(t testing.TB, ns *nstest.NS, name string) (link kernel.Link, ok bool) {
	t.Helper()
	var err error
	ns.Do(t, func() {
		c, dialed := rtnl.Dial()
		if dialed != nil {
			t.Fatal(dialed)
		}
		defer c.Close()
		link, err = getLink(c, rtnl.GetLinkByName(name))
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		t.Fatal(err)
	}
	return link, err == nil
}

// unchanged returns a check that the namespace's links are as they are now, to the last detail.
func unchanged(t testing.TB, ns *nstest.NS) func(what string) {
	t.Helper()
	before := ns.Run(t, "ip -d link")
	return func(what string) {
		t.Helper()
		after := ns.Run(t, "ip -d link")
		if after == before {
			return
		}
		var differing []string
		for line := range strings.SplitSeq(before+after, "\n") {
			if strings.Count(before, line) != strings.Count(after, line) {
				differing = append(differing, line)
			}
		}
		t.Errorf("%s: the links changed:\n%s", what, strings.Join(differing, "\n"))
	}
}

// wantOpError requires an *OpError whose text has all the parts, and that is what is, if not nil.
func wantOpError(t testing.TB, what string, err, is error, parts ...string) {
	t.Helper()
	var op *OpError
	if !errors.As(err, &op) {
		t.Errorf("%s: error %v, want an *OpError", what, err)
		return
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("%s: error %v is not %q", what, err, is)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: error %q lacks %q", what, err, part)
		}
	}
	if strings.Count(err.Error(), "overlay: ") != 1 {
		t.Errorf("%s: error %q does not begin with the package's name, once", what, err)
	}
}

// helperNew opens the device that its first argument, a Config, describes, and reports the error or the final name; with a
// second argument it then holds the device until it is stopped.
func helperNew() error {
	var cfg Config
	if err := json.Unmarshal([]byte(os.Args[1]), &cfg); err != nil {
		return err
	}
	d, err := New(cfg)
	if err != nil {
		fmt.Println(err)
		for _, is := range []error{os.ErrPermission, os.ErrNotExist, ErrBusy} {
			if errors.Is(err, is) {
				fmt.Printf("is %v\n", is)
			}
		}
		return nil
	}
	defer d.Close()
	if len(os.Args) > 2 {
		return nstest.Ready(d.State().Name)
	}
	fmt.Printf("opened %s\n", d.State().Name)
	return nil
}

func configArg(t testing.TB, cfg Config) string {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// wantHelper runs a helper and requires its output to have all the parts.
func wantHelper(t testing.TB, ns *nstest.NS, helper string, opts nstest.HelperOptions, parts ...string) {
	t.Helper()
	out, err := ns.Helper(t, helper, opts)
	if err != nil {
		t.Errorf("%v", err)
	}
	for _, part := range parts {
		if !strings.Contains(out, part) {
			t.Errorf("helper %q as %d: output %q lacks %q", helper, opts.UID, out, part)
		}
	}
}

// helperNode plants something at /dev/net/tun, or takes /dev away, opens devices at once and reports what came of it.
func helperNode() error {
	if err := plant(os.Args[1]); err != nil {
		return err
	}
	var wg sync.WaitGroup
	results := make([]error, 8)
	for i := range results {
		wg.Go(func() {
			d, err := New(Config{})
			if results[i] = err; err == nil {
				results[i] = d.Close()
			}
		})
	}
	wg.Wait()
	for _, err := range results {
		if fmt.Sprint(err) != fmt.Sprint(results[0]) {
			return fmt.Errorf("differing results: %v", results)
		}
	}
	if results[0] != nil {
		fmt.Println(results[0])
	}
	var stat unix.Stat_t
	if err := unix.Stat(nodePath, &stat); err != nil {
		fmt.Printf("node: %v\n", err)
	} else {
		fmt.Printf("node: %o %d:%d\n", stat.Mode, unix.Major(uint64(stat.Rdev)), unix.Minor(uint64(stat.Rdev)))
	}
	_, err := os.Stat("/dev/net")
	fmt.Printf("directory: %t\n", err == nil)
	return nil
}

func plant(what string) error {
	switch what {
	case "no /dev/net":
		return unix.Mount("none", "/dev", "tmpfs", 0, "mode=0755")
	case "nodev":
		return unix.Mount("none", "/dev", "tmpfs", unix.MS_NODEV, "mode=0755")
	case "read-only":
		return unix.Mount("none", "/dev", "tmpfs", unix.MS_RDONLY, "mode=0755")
	case "file":
		return os.WriteFile(nodePath, nil, 0o666)
	case "fifo":
		return unix.Mkfifo(nodePath, 0o666)
	case "null":
		return unix.Mknod(nodePath, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	case "directory":
		return os.Mkdir(nodePath, 0o777)
	case "socket":
		l, err := net.Listen("unix", nodePath)
		if err == nil {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			err = l.Close()
		}
		return err
	case "dangling link":
		return os.Symlink("/dev/net/none", nodePath)
	case "good link":
		return errors.Join(
			unix.Mknod("/dev/net/real", unix.S_IFCHR|0o600, int(unix.Mkdev(nodeMajor, nodeMinor))), os.Symlink("real", nodePath))
	}
	return nil
}

// A missing node is made, 10:200 and 0600, whoever else makes it at the same time; what stands there and is not the node is
// refused, and the error says what is wrong (kernel.md U26).
func TestNode(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod)
	nstest.Leaks(t)
	ns := nstest.New(t)
	const made, notNode = "node: 20600 10:200", "overlay: open /dev/net/tun: not the TUN node, which is character device 10:200"
	for _, c := range []struct {
		plant string
		drop  []uintptr
		want  []string
	}{
		{"", nil, []string{made}},
		{"no /dev/net", nil, []string{made}},
		{"good link", nil, []string{made}},
		{"file", nil, []string{notNode}},
		{"fifo", nil, []string{notNode}},
		{"null", nil, []string{notNode}},
		{"directory", nil, []string{notNode + " (is a directory)"}},
		{"socket", nil, []string{notNode + " (no such device or address)"}},
		{"dangling link", nil, []string{"open /dev/net/tun: a link that leads nowhere: no such file or directory", "node: no such file"}},
		{"nodev", nil, []string{"permission denied (its mode is 0600, its owner 0:0, and its file system is mounted nodev)"}},
		{"read-only", nil, []string{"there is none, and making it failed: make /dev/net: read-only file system"}},
		{"", []uintptr{unix.CAP_MKNOD}, []string{
			"overlay: open /dev/net/tun: there is none, and making it failed: operation not permitted (needs CAP_MKNOD", "node: no such file",
		}},
		{"no /dev/net", []uintptr{unix.CAP_MKNOD}, []string{"needs CAP_MKNOD", "directory: false"}},
	} {
		opts := nstest.HelperOptions{Args: []string{c.plant}, Tun: nstest.TunMissing, DropCaps: c.drop}
		out, err := ns.Helper(t, "open node", opts)
		for _, want := range c.want {
			if err != nil || !strings.Contains(out, want) {
				t.Errorf("%q without %v: %v, output %q, want %q", c.plant, c.drop, err, out, want)
			}
		}
	}
}

// A user who may not open the node is told its mode and owner (kernel.md U26), and one who may, what he lacks then (S8).
func TestNodeClosedToUser(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod, nstest.SecondUID)
	nstest.Leaks(t)
	ns := nstest.New(t)
	same := unchanged(t, ns)
	for _, c := range []struct {
		node  nstest.TunNode
		mode  Mode
		parts []string
	}{
		{nstest.TunPrivate, Create, []string{"overlay: open /dev/net/tun: permission denied (its mode is 0600, its owner 0:0)"}},
		{nstest.TunMissing, Create, []string{"there is none, and making it failed: permission denied (needs CAP_MKNOD in the first user namespace and the right to write to /dev/net)"}},
		{nstest.TunPublic, Create, []string{"overlay: create x: operation not permitted (needs CAP_NET_ADMIN in the network namespace)"}},
		{nstest.TunPublic, AttachOrCreate, []string{"overlay: create x: operation not permitted (needs CAP_NET_ADMIN"}},
	} {
		opts := nstest.HelperOptions{UID: 1000, Tun: c.node, Args: []string{configArg(t, Config{Name: "x", Mode: c.mode})}}
		wantHelper(t, ns, "open new", opts, append(c.parts, "is permission denied")...)
	}
	same("refused")
}

// TestExplainNode: the errnos that cannot be had here (kernel.md U26).
func TestExplainNode(t *testing.T) {
	nstest.Require(t, nstest.TUN) // the node exists
	for errno, want := range map[error]string{
		unix.ENODEV: "the kernel has no TUN driver (module tun): no such device",
		unix.ENXIO:  "the kernel has no TUN driver (module tun): no such device or address",
		unix.EPERM:  "operation not permitted (a device control group or security module forbids it)",
		unix.EMFILE: "too many open files",
	} {
		if err := explainNode(errno); !errors.Is(err, errno) || err.Error() != want {
			t.Errorf("%v: got %q, want %q", errno, err, want)
		}
	}
}

// No child inherits a descriptor: not one started in the middle of New, nor later (kernel.md S7, U23).
func TestEveryDescriptorClosesOnExec(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ls"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	inherits := func() int {
		out, err := exec.Command("ls", "-l", "/proc/self/fd").Output()
		if err != nil {
			t.Error(err)
		}
		return strings.Count(string(out), " -> ")
	}
	looks, before := 0, inherits() // what this process itself inherited, too
	look := func(when string) {
		looks++
		if n := inherits(); n != before {
			t.Errorf("%s: a child has %d descriptors, want %d", when, n, before)
		}
	}
	cfg := Config{Name: "x", Queues: 3, NetNS: ns.Path()}
	d := opened(t)(newWith(cfg, func(fd int, name string, flags tunFlags) (string, error) {
		look("before a queue")
		defer look("after a queue")
		return setIff(fd, name, flags)
	}))
	look("after New")
	if err := d.Activate(); err != nil {
		t.Fatal(err)
	}
	f, err := d.Queues()[0].File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	look("after Activate and File")
	if looks != 8 {
		t.Errorf("looked %d times, want 8", looks)
	}
	adopted := make([]int, 3)
	for i, q := range d.Queues() {
		f, err := q.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if adopted[i], err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	opened(t)(Adopt(Config{NetNS: ns.Path()}, adopted...))
	look("after Adopt")
}

// Where there are too few descriptors left nothing is touched, not even for a moment: no link message is sent.
func TestTooFewDescriptors(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	ns := nstest.New(t)
	ns.Run(t, fmt.Sprint("ip tuntap add dev x mode tun multi_queue pi vnet_hdr user ", otherID()))
	ns.Run(t, "ip link set x up") // or the kernel would not announce its changes
	same := unchanged(t, ns)
	ns.Do(t, func() {
		l, err := rtnl.Listen(1<<20, unix.RTNLGRP_LINK)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		out, err := ns.Helper(t, "open limited", nstest.HelperOptions{})
		if n := strings.Count(out, "overlay: open /dev/net/tun: too many open files"); err != nil || n != 2 {
			t.Errorf("%v, output %q", err, out)
		}
		ns.Run(t, "ip link set x alias mark") // the first message if there was no other
		messages, err := heard(l)
		if err != nil || len(messages) != 1 || !strings.Contains(string(messages[0].Body), "mark") {
			t.Errorf("links changed: %v, %v", err, messages)
		}
	})
	ns.Run(t, "ip", "link", "set", "x", "alias", "")
	same("too few descriptors")
}

func init() {
	nstest.Helper("open limited", func() error {
		limit := &syscall.Rlimit{Cur: 30, Max: 30}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, limit); err != nil {
			return err
		}
		for _, cfg := range []Config{{Name: "x", Mode: Attach, Queues: 64}, {Name: "y", Queues: 64}} {
			_, err := New(cfg)
			fmt.Println(err)
		}
		return nil
	})
}

// An owner that shows as the overflow id is outside only where the map has no place for that id.
func TestUIDMap(t *testing.T) {
	for _, test := range []struct {
		uidMap string
		id     uint32
		want   bool
	}{
		{"         0          0 4294967295\n", 65534, true},
		{"      1000       1000          1\n", 65534, false},
		{"         0       1000          1\n     65534     100000          1\n", 65534, true},
		{"         0     100000      65534\n", 65534, false},
		{"", 65534, false},
		{"no numbers\n", 0, false},
	} {
		if got := hasID(test.uidMap, test.id); got != test.want {
			t.Errorf("hasID(%q, %d) = %v", test.uidMap, test.id, got)
		}
	}
}
