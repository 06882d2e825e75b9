package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("adopt donor", helperDonor)
	nstest.Helper("adopt successor", helperSuccessor)
}

const (
	plain     = flagTUN | flagNoPI
	plainMany = plain | flagMultiQueue
	fullMask  = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
)

// helperDonor opens queues of a device and sends the descriptors through a socket, its descriptor 3.
func helperDonor() error {
	flags, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(os.Args[3])
	if err != nil {
		return err
	}
	fds := make([]int, n)
	for i := range fds {
		if fds[i], err = tryTun("", os.Args[1], tunFlags(flags)); err != nil {
			return err
		}
	}
	return unix.Sendmsg(3, []byte("x"), unix.UnixRights(fds...), nil, 0)
}

// donated returns descriptors that another process opened; it is gone by now.
func donated(t testing.TB, ns *nstest.NS, name string, flags tunFlags, n int) []int {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	args := []string{name, strconv.Itoa(int(flags)), strconv.Itoa(n)}
	if _, err := ns.Helper(t, "adopt donor", nstest.HelperOptions{Args: args, ExtraFiles: []*os.File{theirs}}); err != nil {
		t.Fatal(err)
	}
	control := make([]byte, unix.CmsgSpace(4*n))
	_, size, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:size])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	return fds
}

// helperSuccessor adopts its descriptors from 3 on, and tells its State; with an argument it moves a packet each way first.
func helperSuccessor() error {
	n, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return err
	}
	var fds []int
	for i := range n {
		fds = append(fds, 3+i)
	}
	d, err := Adopt(Config{}, fds...)
	if err != nil {
		fmt.Println(err)
		return nil
	}
	defer d.Close()
	for range len(os.Args) - 2 {
		b := make([]byte, maxPacket)
		n, err := d.Queues()[0].Read(b)
		if err != nil {
			return err
		}
		if _, err := d.Queues()[0].Write(reply(b[:n])); err != nil {
			return err
		}
		fmt.Println("read and wrote")
	}
	fmt.Print(d.State())
	return nil
}

// A device that another process opened is taken over with the framing it has, once: the originals are closed (kernel.md U40).
func TestAdopt(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"), nstest.Program("ethtool"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for i, c := range []struct {
		flags  tunFlags
		queues int
		header int
		cfg    Config
	}{
		{plain, 1, 0, Config{Owner: otherID(), Group: otherID(), Mode: AttachOrCreate, Name: "x0"}},
		{plain | flagVnetHeader, 1, 10, Config{Name: "x1"}},
		{plain | flagVnetHeader, 1, 12, Config{Name: "x%d", Queues: 1}},
		{plainMany, 3, 0, Config{}},
		{plainMany | flagVnetHeader, 3, 10, Config{Queues: 3}},
		{plainMany | flagVnetHeader, 1, 24, Config{}},
	} {
		name := fmt.Sprint("x", i)
		fds := donated(t, ns, name, c.flags, c.queues)
		if err := own(fds[0], int64(otherID()), int64(otherID())); err != nil {
			t.Fatal(err)
		}
		if c.header > 0 {
			if err := unix.IoctlSetPointerInt(fds[0], unix.TUNSETVNETHDRSZ, c.header); err != nil {
				t.Fatal(err)
			}
		}
		before, _ := linkIn(t, ns, name)
		network := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(i), 1}), 24)
		c.cfg.NetNS, c.cfg.Networks = ns.Path(), []netip.Prefix{network}
		d := opened(t)(Adopt(c.cfg, fds...))
		for _, fd := range fds {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Errorf("%+v: descriptor %d: %v, want closed", c, fd, err)
			}
		}
		_, err := Adopt(c.cfg, fds...)
		wantOpError(t, name, err, nil, "overlay: adopt: descriptor "+strconv.Itoa(fds[0])) // whatever has the number by now
		if s := d.State(); s.Name != name || s.Index != before.Index || strings.Contains(s.String(), "note") {
			t.Errorf("%+v: %v", c, s)
		}
		if after, _ := linkIn(t, ns, name); after != before && (after.Tun != before.Tun || after.Index != before.Index) {
			t.Errorf("%+v: was %+v, is %+v", c, before, after)
		}
		if err := d.Activate(); err != nil {
			t.Fatal(err)
		}
		if c.header == 0 { // waiting knows no header
			requireFraming(t, ns, d, network)
		} else {
			requireEcho(t, ns, d, network)
		}
	}
}

// requireEcho is requireFraming for a device whose descriptors have a virtio header, by Read and Write alone.
func requireEcho(t testing.TB, ns *nstest.NS, d Device, network netip.Prefix) {
	t.Helper()
	sendFlows(t, ns, netip.AddrPortFrom(network.Addr().Next(), 9), 64)
	var s int
	var err error
	ns.Do(t, func() {
		if s, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err == nil {
			err = unix.Bind(s, &unix.SockaddrInet4{Port: 9})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	b := make([]byte, maxPacket)
	for _, q := range d.Queues() {
		n, err := q.Read(b)
		for ; err == nil && n != 20+8+5; n, err = q.Read(b) {
			if b[0] != 0x45 && b[0] != 0x60 {
				t.Fatalf("read %x", b[:n])
			}
		}
		if err != nil || b[0] != 0x45 || string(b[n-5:n]) != "hello" {
			t.Fatalf("read %d, %v: %x", n, err, b[:max(n, 0)])
		}
		if _, err := q.Write(reply(b[:n])); err != nil {
			t.Fatal(err)
		}
		if got, err := unix.Read(s, b); err != nil || string(b[:max(got, 0)]) != "hello" {
			t.Errorf("the host received %d bytes, %v", got, err)
		}
	}
}

// The offload mask of the device's last user is cleared at the end of a successful Adopt, and only there.
func TestAdoptClearsOffload(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ethtool"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	fd := rawTun(t, ns, "x", plain)
	for _, mask := range []int{0, fullMask} {
		if err := setOffload(fd, mask); err != nil {
			t.Fatal(err)
		}
		features := ns.Run(t, "ethtool -k x")
		if got := strings.Contains(features, "tcp-segmentation-offload: on"); got != (mask != 0) {
			t.Fatalf("mask %#x: %s", mask, features)
		}
	}
	for n := 1; ; n++ {
		var faulty *faultyConn
		d, err := newTun(Config{NetNS: ns.Path(), Queues: 1}, func(o *opener) (*attachment, error) {
			faulty = &faultyConn{conn: o.conn, fail: n}
			o.conn = faulty
			return o.adopt([]int{fd})
		})
		features := ns.Run(t, "ethtool -k x")
		if err == nil {
			defer d.Close()
		}
		if on := strings.Contains(features, "tcp-segmentation-offload: on"); on != (err != nil) {
			t.Errorf("request %d failed: %v; features %s", n, err, features)
		}
		if err == nil {
			if n < 2 {
				t.Errorf("only %d requests", faulty.requests)
			}
			break
		}
		wantOpError(t, "request", err, unix.ENOBUFS, "overlay: adopt x: ")
	}
}

// A File of an older self can be adopted by a younger, which carries on.
func TestAdoptFromOlderSelf(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	network := netip.MustParsePrefix("10.9.0.1/24")
	d := newIn(t, ns, Config{Name: "x", Queues: 2, Networks: []netip.Prefix{network}})
	if err := d.Activate(); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, q := range d.Queues() {
		f, err := q.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	waiting(t, d)
	sendFlows(t, ns, netip.MustParseAddrPort("10.9.0.2:9"), 64)
	opts := nstest.HelperOptions{ExtraFiles: files, Args: []string{"2", "echo", "echo"}}
	wantHelper(t, ns, "adopt successor", opts, "read and wrote\nread and wrote\ndevice x ", "queues 2")
	opts = nstest.HelperOptions{ExtraFiles: files[:1], Args: []string{"1"}}
	wantHelper(t, ns, "adopt successor", opts, "overlay: adopt x: the device is in use by", "it has 2 queues, we have 1")
}

// Without CAP_NET_ADMIN the kernel does not tell the device's namespace: it is adopted, and State says so (kernel.md V17).
func TestAdoptUnverified(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.SecondUID)
	nstest.Leaks(t)
	ns := nstest.New(t)
	f := ns.OtherTun(t, "x")
	const note = "note the device's network namespace could not be verified (needs CAP_NET_ADMIN)"
	opts := nstest.HelperOptions{UID: 65534, ExtraFiles: []*os.File{f}, Args: []string{"1"}}
	wantHelper(t, ns, "adopt successor", opts, "device x ", note)
	wantHelper(t, nstest.New(t), "adopt successor", opts, "overlay: adopt x: the device was renamed, moved or deleted")
	opts.UID = 0
	out, err := ns.Helper(t, "adopt successor", opts)
	if err != nil || !strings.Contains(out, "device x ") || strings.Contains(out, note) {
		t.Errorf("as root: %v, %s", err, out)
	}
}

// duplicate is dup(2) for a test's life.
func duplicate(t testing.TB, fd int) int {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(d) })
	return d
}

// holdings is what Adopt must leave a caller: descriptors open, attached, blocking or not as they were.
func holdings(fds []int) string {
	var b strings.Builder
	for _, fd := range fds {
		mode, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		name, flags, attached := getIff(fd)
		fmt.Fprintln(&b, fd, mode, err, name, flags, attached)
	}
	return b.String()
}

// What is refused stays the caller's as it is: open, attached, blocking, device and offload mask unchanged (kernel.md U40).
func TestAdoptRefuses(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"), nstest.Program("ethtool"))
	nstest.Leaks(t)
	ns, other := nstest.New(t), nstest.New(t)
	tun := func(name string, flags tunFlags) int { return rawTun(t, ns, name, flags) }
	node := func(path string, mode int) int {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	one, two := tun("one", plain), []int{tun("two", plainMany), tun("two", plainMany)}
	if err := setOffload(one, fullMask); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(two[1], true); err != nil {
		t.Fatal(err)
	}
	pair := []int{tun("pair", plainMany), rawTun(t, other, "pair", plainMany)}
	detached := []int{tun("off", plainMany), tun("off", plainMany)}
	if err := detachQueue(detached[1]); err != nil {
		t.Fatal(err)
	}
	gone := tun("gone", plain)
	ns.Run(t, "ip link del gone")
	long := tun("long", plain|flagVnetHeader)
	if err := unix.IoctlSetPointerInt(long, unix.TUNSETVNETHDRSZ, maxVnetSize+1); err != nil {
		t.Fatal(err)
	}
	var reader int
	ns.Do(t, func() {
		reader = node(nodePath, unix.O_RDONLY)
		if _, err := setIff(reader, "reader", plain); err != nil {
			t.Error(err)
		}
	})
	otherSame, features := unchanged(t, other), ns.Run(t, "ethtool -k one")
	for _, c := range []struct {
		text string
		fds  []int
		cfg  Config
		is   error
	}{
		{"overlay: adopt: descriptor 9999: bad file descriptor", []int{9999}, Config{}, unix.EBADF},
		{"adopt: descriptor 9999", []int{one, 9999}, Config{}, unix.EBADF},
		{" is not the TUN node, which is character device 10:200", []int{node("/dev/null", unix.O_RDWR)}, Config{}, errNotNode},
		{" is not the TUN node", []int{node("/proc/self/exe", unix.O_RDONLY)}, Config{}, errNotNode},
		{"is not attached to a device", []int{node(nodePath, unix.O_RDWR)}, Config{}, unix.EBADFD},
		{"is not attached to a device", []int{gone}, Config{}, unix.EBADFD},
		{"is not open for reading and writing", []int{reader}, Config{}, nil},
		{"adopt pi: its packets have the packet information header", []int{tun("pi", flagTUN)}, Config{}, nil},
		{"adopt tap: a TAP device", []int{tun("tap", flagTAP|flagNoPI)}, Config{}, nil},
		{"adopt napi: it was opened with IFF_NAPI", []int{tun("napi", plain|unix.IFF_NAPI)}, Config{}, nil},
		{"are duplicates: one queue, not two", []int{one, one}, Config{}, nil},
		{"are duplicates: one queue, not two", []int{one, duplicate(t, one)}, Config{}, nil},
		{"are duplicates: one queue, not two", []int{two[0], duplicate(t, two[0])}, Config{}, nil},
		{"is of one with flags 0x1, descriptor", []int{one, two[0]}, Config{}, nil},
		{"of many with flags 0x101", []int{two[0], tun("many", plainMany)}, Config{}, nil},
		{"lives in another network namespace: name it in Config.NetNS", pair, Config{}, errElsewhere},
		{"(it has 2 queues, we have 1", two[:1], Config{}, ErrBusy},
		{`adopt one: its name is not "x", as Config says`, []int{one}, Config{Name: "x"}, nil},
		{`adopt one: its name is not "one%d", as Config says`, []int{one}, Config{Name: "one%d"}, nil},
		{"adopt one: its owner is not set, Config says uid 1", []int{one}, Config{Owner: 1}, nil},
		{"adopt one: its group is not set, Config says gid 1", []int{one}, Config{Group: 1}, nil},
		{"adopt one: it ends with its descriptors, Config says", []int{one}, Config{Persist: true}, nil},
		{"lives in another network namespace: name it in Config.NetNS", []int{one}, Config{NetNS: other.Path()}, errElsewhere},
		{"is detached (IFF_DETACH_QUEUE): no packet would reach it", detached, Config{}, nil},
		{"its packets have a virtio header of 65 bytes", []int{long}, Config{}, errors.ErrUnsupported},
	} {
		if c.cfg.NetNS == "" {
			c.cfg.NetNS = ns.Path()
		}
		before, same := holdings(c.fds), unchanged(t, ns)
		_, err := Adopt(c.cfg, c.fds...)
		wantOpError(t, c.text, err, c.is, c.text)
		if after := holdings(c.fds); after != before {
			t.Errorf("%s: had\n%shave\n%s", c.text, before, after)
		}
		same(c.text)
	}
	otherSame("refused")
	if got := ns.Run(t, "ethtool -k one"); got != features {
		t.Errorf("features were\n%sare\n%s", features, got)
	}
	opened(t)(Adopt(Config{NetNS: ns.Path()}, duplicate(t, one)))
}

// An Adopt that fails after the descriptors were made ready for the poller gives the caller's their flags back: the open file is
// shared with ours (kernel.md U40).
func TestFailedAdoptGivesFlagsBack(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	for n := range 3 {
		name := fmt.Sprint("x", n)
		fds := []int{rawTun(t, ns, name, plainMany), rawTun(t, ns, name, plainMany), rawTun(t, ns, name, plainMany)}
		if err := unix.SetNonblock(fds[1], true); err != nil {
			t.Fatal(err)
		}
		before := holdings(fds)
		_, err := newTun(Config{NetNS: ns.Path(), Queues: 3}, func(o *opener) (*attachment, error) {
			return spoilt(t, n)(o.adopt(fds))
		})
		wantOpError(t, name, err, os.ErrNoDeadline)
		if after := holdings(fds); after != before {
			t.Errorf("queue %d: had\n%shave\n%s", n, before, after)
		}
	}
}

// What Adopt refuses before any system call.
func TestAdoptConfig(t *testing.T) {
	for _, c := range []struct {
		field string
		cfg   Config
		fds   []int
	}{
		{"Queues", Config{}, nil},
		{"Queues", Config{Queues: 2}, []int{9999}},
		{"Disabled", Config{Disabled: true}, []int{9999}},
		{"MTU", Config{MTU: 1}, []int{9999}},
	} {
		_, err := Adopt(c.cfg, c.fds...)
		var config *ConfigError
		if !errors.As(err, &config) || config.Field != c.field {
			t.Errorf("%+v of %v: error %v, want a *ConfigError for %s", c.cfg, c.fds, err, c.field)
		}
	}
}

// TestNameFits: which names a Config's Name may have led to.
func TestNameFits(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"", "x", true},
		{"x", "x", true},
		{"x", "x0", false},
		{"x%d", "x0", true},
		{"x%d", "x12", true},
		{"x%d", "x", false},
		{"x%d", "x01", false},
		{"x%d", "x+1", false},
		{"x%d", "x-1", false},
		{"x%d", "xy", false},
		{"x%d", "y1", false},
		{"a%db", "a7b", true},
		{"a%da", "a", false},
		{"%d", "7", true},
	} {
		if got := nameFits(c.pattern, c.name); got != c.want {
			t.Errorf("nameFits(%q, %q) = %t", c.pattern, c.name, got)
		}
	}
}
