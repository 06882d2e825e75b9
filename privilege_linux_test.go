package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("privilege net admin", helperNetAdmin)
	nstest.Helper("privilege activate", helperActivate)
}

// helperNetAdmin does with a device all that needs a privilege, on the descriptor of a socket that is bound in its namespace.
func helperNetAdmin() error {
	network := netip.MustParsePrefix("10.9.0.1/24")
	cfg := Config{Name: "x", Queues: 2, Persist: true, Networks: []netip.Prefix{network, netip.MustParsePrefix("fd00:9::1/64")}}
	for _, mode := range []Mode{Create, Attach} {
		cfg.Mode, cfg.Persist = mode, mode == Create
		d, err := New(cfg)
		if err != nil {
			return err
		}
		defer d.Close()
		if err := d.Activate(); err != nil {
			return err
		}
		if s := d.State(); !s.Up || strings.Contains(s.String(), "\nnote ") {
			return fmt.Errorf("%v: state\n%v", mode, s)
		}
		if err := d.Close(); err != nil {
			return err
		}
	}
	d, err := New(cfg)
	if err != nil {
		return err
	}
	var fds []int
	for _, q := range d.Queues() {
		f, err := q.File()
		if err != nil {
			return err
		}
		defer f.Close()
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	a, err := Adopt(Config{Networks: cfg.Networks}, fds...)
	if err != nil {
		return err
	}
	fmt.Println(errors.Join(a.Activate(), a.Close(), d.Close()))
	return nil
}

// CAP_NET_ADMIN and access to the node are all that is needed (kernel.md S8).
func TestNetAdminIsEnough(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Mknod, nstest.SecondUID)
	nstest.Leaks(t)
	ns := nstest.New(t)
	opts := nstest.HelperOptions{UID: 65534, Tun: nstest.TunPublic, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}}
	wantHelper(t, ns, "privilege net admin", opts, "<nil>")
	if link, _ := linkIn(t, ns, "x"); link.Tun.Owner != 65534 || !link.Tun.Persist {
		t.Errorf("the device left is %+v", link.Tun)
	}
}

// helperActivate adopts descriptor 3 and activates.
func helperActivate() error {
	d, err := Adopt(Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}, 3)
	if err != nil {
		return err
	}
	defer d.Close()
	err = d.Activate()
	fmt.Println(err)
	fmt.Println(errors.Is(err, os.ErrPermission))
	return nil
}

// Without CAP_NET_ADMIN each step's error names it (kernel.md S8; TestNodeClosedToUser and TestAttachAsOwner have New's).
func TestWithoutNetAdmin(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod, nstest.SecondUID, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	f := ns.OtherTun(t, "x")
	ns.Run(t, "ip tuntap add dev kept mode tun")
	same := unchanged(t, ns)
	opts := nstest.HelperOptions{UID: 65534, Tun: nstest.TunPublic, ExtraFiles: []*os.File{f}}
	wantHelper(t, ns, "privilege activate", opts, "overlay: activate x: ", "operation not permitted (needs CAP_NET_ADMIN)\ntrue\n")
	opts = nstest.HelperOptions{DropCaps: []uintptr{unix.CAP_NET_ADMIN}, Args: []string{configArg(t, Config{})}}
	wantHelper(t, ns, "open new", opts, "overlay: create: operation not permitted (needs CAP_NET_ADMIN in the network namespace)\nis permission denied")
	same("without CAP_NET_ADMIN")
}

// An attached or adopted device that anybody may attach to is as open afterwards, and State and an event say so (kernel.md S1).
func TestUnownedIsNoted(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	const note = "note any local user may attach a queue: the device has neither owner nor group\n"
	for i, prepare := range []string{"multi_queue", "multi_queue user 0", "multi_queue group 0", ""} {
		name := fmt.Sprint("x", i)
		ns.Run(t, "ip tuntap add dev "+name+" mode tun "+prepare)
		d := newIn(t, ns, Config{Name: name, Mode: Attach})
		noted := strings.Contains(d.State().String(), note)
		if want := prepare == "multi_queue"; noted != want || len(d.Events()) > 0 != want {
			t.Errorf("%q: noted: %t, %d events", prepare, noted, len(d.Events()))
		}
	}
	d := newIn(t, ns, Config{Queues: 2})
	if s := d.State().String(); strings.Contains(s, "note") {
		t.Errorf("a device of our own: %s", s)
	}
}

// sockets returns the namespace of each socket that the process has open, by descriptor.
func sockets(t testing.TB) map[string]string {
	t.Helper()
	owners := map[string]string{}
	paths, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		var fd int
		if link, err := os.Readlink(path); err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		if _, err := fmt.Sscanf(filepath.Base(path), "%d", &fd); err != nil {
			t.Fatal(err)
		}
		ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
		if err != nil {
			t.Fatal(err)
		}
		if owners[filepath.Base(path)], err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", ns)); err != nil {
			t.Fatal(err)
		}
		unix.Close(ns)
	}
	return owners
}

// NetNS opens device and sockets in that namespace and leaves every thread where it was (kernel.md U66, V16).
func TestNetNS(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	where := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ns, home, thread := nstest.New(t), where(), unix.Gettid()
	var there string
	ns.Do(t, func() { there = where() })
	before := sockets(t)
	homeSame := unchanged(t, nstest.Own(t))
	d := newIn(t, ns, Config{Name: "x", Queues: 2, Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}})
	if err := d.Activate(); err != nil {
		t.Fatal(err)
	}
	if got := where(); got != home || unix.Gettid() != thread {
		t.Errorf("the caller's thread %d is in %s, was thread %d in %s", unix.Gettid(), got, thread, home)
	}
	opened := 0
	for fd, owner := range sockets(t) {
		if _, old := before[fd]; old {
			continue
		}
		if opened++; owner != there {
			t.Errorf("socket %s is of %s, want %s", fd, owner, there)
		}
	}
	if opened == 0 {
		t.Error("no sockets found")
	}
	link, ok := linkIn(t, ns, "x")
	if !ok || !link.Up || d.State().Index != link.Index {
		t.Errorf("there is %+v; state %v", link, d.State())
	}
	requireOurs(t, ns, d)
	homeSame("a device elsewhere")
	d.Close()
	for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() { // threads end a little later than goroutines
		tasks, _ := filepath.Glob("/proc/self/task/*/ns/net")
		astray := 0
		for _, task := range tasks {
			if s, err := os.Readlink(task); err == nil && s != home {
				astray++
			}
		}
		if astray == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d threads are in other namespaces", astray)
		}
	}
}

// What is no namespace, or may not be entered, is an error that says so (kernel.md V16).
func TestNetNSRefused(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, c := range map[string]struct {
		is   error
		text string
	}{
		"/no/such/path":     {os.ErrNotExist, "open network namespace /no/such/path: no such file or directory"},
		file:                {unix.EINVAL, "it is not a network namespace"},
		"/proc/self/ns/mnt": {unix.EINVAL, "enter /proc/self/ns/mnt: it is not a network namespace"},
	} {
		_, err := New(Config{Name: "x", NetNS: path})
		wantOpError(t, path, err, c.is, "overlay: open x: ", c.text)
		_, err = Adopt(Config{NetNS: path}, 9999)
		wantOpError(t, path, err, c.is, "overlay: open: ", c.text)
	}
	opts := nstest.HelperOptions{DropCaps: []uintptr{unix.CAP_SYS_ADMIN}, Args: []string{configArg(t, Config{NetNS: "/proc/self/ns/net"})}}
	wantHelper(t, nstest.New(t), "open new", opts, "enter network namespace /proc/self/ns/net: needs CAP_SYS_ADMIN", "is permission denied")
}

// A device keeps its namespace alive when nothing else does, goes on working there, and lets go of it by Close.
func TestNetNSWithoutName(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	here := nstest.New(t)
	var d Device
	t.Run("", func(t *testing.T) { // at whose end the test lets go of the namespace
		ns := nstest.New(t)
		nstest.Veth(t, here, ns, "veth0", "peer0")
		var err error
		if d, err = New(Config{Name: "x", NetNS: ns.Path(), Queues: 2, Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}); err != nil {
			t.Fatal(err)
		}
	})
	if err := d.Activate(); err != nil {
		t.Error(err)
	}
	if s := d.State(); !s.Up || s.Index == 0 {
		t.Errorf("state %v", s)
	}
	if _, ok := linkIn(t, here, "veth0"); !ok {
		t.Error("the namespace is gone before Close")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // the kernel takes it away in its own time
		if _, ok := linkIn(t, here, "veth0"); !ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the namespace is still there")
		}
	}
}
