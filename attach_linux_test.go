package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("attach owner", helperOwner)
}

// A prepared device is taken as it is: owner, group, persistence and addresses stay, and however it was prepared its packets
// have no header on our descriptors (kernel.md U25, V10).
func TestAttachPrepared(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for i, c := range []struct {
		prepare string
		queues  int
		flags   tunFlags
	}{
		{"", 1, 0},
		{"user ID", 0, 0},
		{"group ID pi vnet_hdr", 1, 0},
		{"one_queue pi", 1, 0},
		{"multi_queue user ID group ID pi vnet_hdr", 1, flagMultiQueue},
		{"multi_queue user ID vnet_hdr", 3, flagMultiQueue},
	} {
		name := fmt.Sprint("x", i)
		ns.Run(t, "ip tuntap add dev "+name+" mode tun "+strings.ReplaceAll(c.prepare, "ID", fmt.Sprint(otherID())))
		network := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(i), 1}), 24)
		ns.Run(t, fmt.Sprintf("ip addr add %v dev %s", network, name))
		before, _ := linkIn(t, ns, name)
		for range 2 { // and again, when it was left (kernel.md U25: "start twice")
			d := newIn(t, ns, Config{Name: name, Mode: Attach, Queues: c.queues, Networks: []netip.Prefix{network}})
			after, _ := linkIn(t, ns, name)
			if after.Index != before.Index || after.Tun.Owner != before.Tun.Owner || after.Tun.Group != before.Tun.Group || !after.Tun.Persist {
				t.Errorf("%q: was %+v, is %+v", c.prepare, before, after)
			}
			f, err := d.Queues()[0].File()
			if err != nil {
				t.Fatal(err)
			}
			_, flags, err := getIff(int(f.Fd()))
			f.Close()
			if want := flagTUN | flagVnetHeader | c.flags; err != nil || flags&framing != want || after.Tun.PacketInfo {
				t.Errorf("%q: flags %#x, %v; want %#x", c.prepare, flags, err, want)
			}
			if err := d.Activate(); err != nil {
				t.Fatal(err)
			}
			requireFraming(t, ns, d, network)
			d.Close()
		}
	}
}

// requireFraming sends a packet each way: what Read returns and what Write takes begins with the IP header.
func requireFraming(t testing.TB, ns *nstest.NS, d Device, network netip.Prefix) {
	t.Helper()
	peer := netip.AddrPortFrom(network.Addr().Next(), 9)
	waiting(t, d) // what the kernel sent by itself
	sendFlows(t, ns, peer, 64)
	q := d.Queues()[0]
	b := make([]byte, maxPacket)
	n, err := q.Read(b)
	if err != nil || n != 20+8+5 || b[0] != 0x45 || string(b[n-5:n]) != "hello" {
		t.Fatalf("read %d, %v: %x", n, err, b[:max(n, 0)])
	}
	waiting(t, d)
	var s int
	ns.Do(t, func() {
		if s, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err == nil {
			err = unix.Bind(s, &unix.SockaddrInet4{Port: 9})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if _, err := q.Write(reply(b[:n])); err != nil {
		t.Fatal(err)
	}
	if got, err := unix.Read(s, b); err != nil || string(b[:max(got, 0)]) != "hello" {
		t.Errorf("the host received %d bytes, %v", got, err)
	}
}

// reply turns a UDP packet round, to port 9: the header's checksum does not change, UDP's may be left out.
func reply(packet []byte) []byte {
	p := append([]byte(nil), packet...)
	copy(p[12:16], packet[16:20])
	copy(p[16:20], packet[12:16])
	p[26], p[27] = 0, 0
	return p
}

// What cannot be attached to is refused with the reason, and is not changed.
func TestAttachRefuses(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	nstest.Veth(t, ns, nstest.New(t), "veth0", "peer0")
	ns.Run(t, "ip tuntap add dev tap0 mode tap multi_queue")
	ns.Run(t, "ip tuntap add dev one mode tun pi")
	ns.Run(t, "ip tuntap add dev many mode tun multi_queue pi")
	ns.Run(t, "ip tuntap add dev mine mode tun multi_queue pi")
	ns.Run(t, "ip tuntap add dev odd mode tun")
	odd := rawTun(t, ns, "odd", flagTUN)
	if err := unix.IoctlSetInt(odd, unix.TUNSETLINK, unix.ARPHRD_PPP); err != nil {
		t.Fatal(err)
	}
	foreign := rawTun(t, ns, "many", strangerFlags|flagVnetHeader)
	newIn(t, ns, Config{Name: "mine", Mode: Attach, Queues: 2})
	same := unchanged(t, ns)
	for _, c := range []struct {
		name   string
		queues int
		is     error
		text   string
	}{
		{"none", 1, os.ErrNotExist, "attach to none: no such device"},
		{"veth0", 1, nil, "not a TUN device, but interface 2 of kind \"veth\""},
		{"lo", 1, nil, "not a TUN device"},
		{"tap0", 1, nil, "a TAP device: this package carries IP packets only"},
		{"odd", 1, nil, "a device of link type 512"},
		{"one", 2, nil, "the device has a single queue, Config.Queues is 2"},
		{"many", 1, ErrBusy, "1 of its queues are taken"},
		{"many", 2, ErrBusy, "this process"},
		{"mine", 2, ErrBusy, "2 of its queues are taken"},
	} {
		_, err := New(Config{Name: c.name, Mode: Attach, Queues: c.queues, NetNS: ns.Path()})
		wantOpError(t, c.name, err, c.is, "overlay: attach to "+c.name+": ", c.text)
		if c.is == nil && errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v", c.name, err)
		}
		same(c.name)
	}
	if _, flags, err := getIff(foreign); err != nil || flags&framing != flagTUN|flagMultiQueue|flagVnetHeader {
		t.Errorf("the other's queue: flags %#x, %v", flags, err)
	}
}

// A second process finds the device in use, and the first notices nothing; when it is gone the second succeeds.
func TestAttachWhileHeld(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for _, kind := range []string{"", "multi_queue"} {
		name := "x" + kind[:min(5, len(kind))]
		ns.Run(t, "ip tuntap add dev "+name+" mode tun "+kind)
		cfg := Config{Name: name, Mode: Attach}
		p, _ := ns.StartHelper(t, "open new", nstest.HelperOptions{Args: []string{configArg(t, cfg), "hold"}})
		same := unchanged(t, ns)
		cfg.NetNS = ns.Path()
		_, err := New(cfg)
		wantOpError(t, name, err, ErrBusy, fmt.Sprintf("in use by process %d (exe)", p.Pid()))
		same(name)
		p.Kill()
		newIn(t, ns, cfg)
	}
}

// meddleAt is an opener's iff that does something before the n-th queue is attached.
func meddleAt(n int, does func()) func(fd int, name string, flags tunFlags) (string, error) {
	return func(fd int, name string, flags tunFlags) (string, error) {
		if n--; n == 0 {
			does()
		}
		return setIff(fd, name, flags)
	}
}

// A device that is renamed, deleted or moved while its queues are attached: New fails, leaves no device of its own making,
// and keeps off one that has the name by now (kernel.md A24).
func TestDeviceVanishesMeanwhile(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	for _, mode := range []Mode{Create, Attach} {
		for _, c := range []struct {
			does     []string
			stranger string // what another's device is called then
		}{
			{[]string{"ip link del x"}, ""},
			{[]string{"ip link set x name y"}, ""},
			{[]string{"ip link set x netns OTHER"}, ""},
			{[]string{"ip link del x", "ip tuntap add dev x mode tun multi_queue user ID"}, "x"},
			{[]string{"ip link del x", "ip tuntap add dev x mode tun user ID"}, "x"},
			{[]string{"ip link del x", "ip tuntap add dev x mode tap user ID"}, "x"},
			{[]string{"ip link set x name y", "ip tuntap add dev x mode tun multi_queue user ID"}, "x"},
			{[]string{"ip link set x netns OTHER", "ip tuntap add dev x mode tun multi_queue user ID"}, "x"},
		} {
			for _, n := range []int{2, 3} {
				ns, other := nstest.New(t), nstest.New(t)
				if mode == Attach {
					ns.Run(t, "ip tuntap add dev x mode tun multi_queue")
				}
				before, _ := linkIn(t, ns, "x")
				_, err := newWith(Config{Name: "x", Mode: mode, Queues: 3, NetNS: ns.Path()}, meddleAt(n, func() {
					for _, command := range c.does {
						ns.Run(t, strings.NewReplacer("OTHER", other.Path(), "ID", fmt.Sprint(otherID())).Replace(command))
					}
				}))
				what := fmt.Sprintf("%v, queue %d: %v", mode, n, c.does)
				wantOpError(t, what, err, os.ErrNotExist, "renamed, moved or deleted meanwhile")
				var link kernel.Link
				var ok bool
				eventually(t, what+": our queue is gone", func() bool { // a process between fork and exec keeps it for an instant
					link, ok = linkIn(t, ns, "x")
					return link.Tun.Queues == 0
				})
				if ok != (c.stranger != "") || ok && (link.Tun.Owner != int64(otherID()) || link.Tun.Queues != 0 || !link.Tun.Persist) {
					t.Errorf("%s: there is %t %+v", what, ok, link)
				}
				if mode == Create { // ours went with its descriptors, wherever it was by then
					for where, ns := range map[string]*nstest.NS{"y": ns, "x": other} {
						if link, ok := linkIn(t, ns, where); ok {
							t.Errorf("%s: left %+v", what, link)
						}
					}
				}
				if mode == Attach && strings.Contains(what, "name y") {
					if link, ok := linkIn(t, ns, "y"); !ok || link.Index != before.Index || link.Tun.Queues != 0 {
						t.Errorf("%s: the renamed device is %+v", what, link)
					}
				}
			}
		}
	}
}

// Attaching to a name that is nobody's creates nothing, not even for a moment (kernel.md A24).
func TestAttachingCreatesNothing(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	ns.Run(t, "ip tuntap add dev x mode tun multi_queue")
	ns.Do(t, func() {
		l, err := rtnl.Listen(1<<20, unix.RTNLGRP_LINK)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, err = newWith(Config{Name: "x", Mode: Attach, Queues: 2, NetNS: ns.Path()}, meddleAt(2, func() { ns.Run(t, "ip link del x") }))
		wantOpError(t, "deleted", err, os.ErrNotExist)
		ns.Run(t, "ip tuntap add dev last mode tun")
		var said []string
		for len(said) == 0 || !strings.HasSuffix(said[len(said)-1], "last") {
			messages, err := heard(l)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range messages {
				if link, err := rtnl.DecodeLink(m); err == nil {
					said = append(said, fmt.Sprintf("%d %s", m.Type, link.Name))
				}
			}
		}
		if want := fmt.Sprintf("[%d x %d last]", unix.RTM_DELLINK, unix.RTM_NEWLINK); fmt.Sprint(said) != want {
			t.Errorf("the kernel announced %v, want %s", said, want)
		}
	})
}

// The offload mask that an earlier user left is cleared where none is to be used, and what came under it is thrown away
// (kernel.md C1, U49).
func TestAttachClearsOffload(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"), nstest.Program("ethtool"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for i, kind := range []string{"", " multi_queue"} {
		name := fmt.Sprint("x", i)
		ns.Run(t, "ip tuntap add dev "+name+" mode tun"+kind)
		ns.Run(t, fmt.Sprintf("ip addr add 10.9.%d.1/24 dev %s", i, name))
		ns.Run(t, "ip link set "+name+" up")
		flags := flagTUN | flagNoPI
		if kind != "" {
			flags |= flagMultiQueue
		}
		earlier := rawTun(t, ns, name, flags|flagVnetHeader)
		if err := setOffload(earlier, 0); err != nil {
			t.Fatal(err)
		}
		want := ns.Run(t, "ethtool -k "+name)
		const mask = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_USO4 | unix.TUN_F_USO6
		if err := setOffload(earlier, mask); err != nil {
			t.Fatal(err)
		}
		unix.Close(earlier)
		if got := ns.Run(t, "ethtool -k "+name); got == want {
			t.Fatal("the mask does not outlive its setter")
		}
		send := func() { sendSuperpacket(t, ns, [4]byte{10, 9, byte(i), 2}) }
		d := opened(t)(newWith(Config{Name: name, Mode: Attach, NoOffload: OffloadTCP | OffloadUDP, NetNS: ns.Path()}, func(fd int, name string, flags tunFlags) (string, error) {
			got, err := setIff(fd, name, flags)
			for n := 0; n == 0 && err == nil; { // the kernel needs a moment to notice that there is a carrier now
				send()
				n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1)
			}
			return got, err
		}))
		if got := ns.Run(t, "ethtool -k "+name); got != want {
			t.Errorf("features are\n%swant\n%s", got, want)
		}
		send()
		sizes := waitingSizes(t, d)
		for _, size := range sizes {
			if size > 1500 {
				t.Errorf("read %d bytes at once", size)
			}
		}
		if len(sizes) < superSegments {
			t.Errorf("only %d packets arrived", len(sizes))
		}
	}
}

const superSegments = 10

// sendSuperpacket sends datagrams that stay together until a device demands them one by one.
func sendSuperpacket(t testing.TB, ns *nstest.NS, to [4]byte) {
	t.Helper()
	ns.Do(t, func() {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		const size = 1000
		if err := unix.SetsockoptInt(s, unix.SOL_UDP, unix.UDP_SEGMENT, size); err != nil {
			t.Fatal(err)
		}
		if err := unix.Sendto(s, make([]byte, superSegments*size), 0, &unix.SockaddrInet4{Port: 9, Addr: to}); err != nil {
			t.Fatal(err)
		}
	})
}

// A single-queue device that another replaces between the look and the attempt, and a device that others fill meanwhile.
func TestAttachRaces(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	prepare := func(kind string) { ns.Run(t, "ip tuntap add dev x mode tun "+kind) }
	for _, c := range []struct {
		what   string
		kind   string
		queues int
		n      int
		does   func()
		is     error
		text   string
	}{
		{"replaced", "", 1, 1, func() { ns.Run(t, "ip link del x"); prepare("pi") }, os.ErrNotExist, "renamed, moved or deleted"},
		{"deleted", "", 1, 1, func() { ns.Run(t, "ip link del x") }, os.ErrNotExist, "renamed, moved or deleted"},
		// U50: the kernel ignores the flags of all queues but the first, which here is another's.
		{"other framing", "multi_queue", 2, 1, func() { rawTun(t, ns, "x", strangerFlags) }, nil, "its queues have flags"},
		{"packet information", "multi_queue", 2, 1, func() { rawTun(t, ns, "x", flagTUN|flagMultiQueue|flagVnetHeader) }, nil, "packet information true"},
		{"one more", "multi_queue", 2, 1, func() { rawTun(t, ns, "x", strangerFlags|flagVnetHeader) }, ErrBusy, "1 of its queues are taken"},
		{"one more, detached", "multi_queue", 2, 2, func() { detachQueue(rawTun(t, ns, "x", strangerFlags)) }, ErrBusy, "1 of its queues are taken"},
		{"full", "multi_queue", 256, 9, func() { rawTun(t, ns, "x", strangerFlags) }, unix.E2BIG, "a device has at most 256 queues"},
	} {
		prepare(c.kind)
		_, err := newWith(Config{Name: "x", Mode: Attach, Queues: c.queues, NetNS: ns.Path()}, meddleAt(c.n, c.does))
		wantOpError(t, c.what, err, c.is, c.text)
		if link, ok := linkIn(t, ns, "x"); ok {
			if link.Tun.Queues+link.Tun.Disabled > 1 {
				t.Errorf("%s: left queues: %+v", c.what, link.Tun)
			}
			ns.Run(t, "ip link del x")
		}
	}
}

// AttachOrCreate does either, and follows a device that comes or goes in between.
func TestAttachOrCreate(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	for _, queues := range []int{1, 2} {
		ns := nstest.New(t)
		cfg := Config{Name: "x", Mode: AttachOrCreate, Queues: queues, Owner: otherID(), NetNS: ns.Path()}
		kind := map[int]string{1: "", 2: " multi_queue"}[queues]
		make := func() { ns.Run(t, "ip tuntap add dev x mode tun user 0"+kind) }
		require := func(what string, d Device, err error, owner int, persist bool) {
			t.Helper()
			if err != nil {
				t.Errorf("%d queues, %s: %v", queues, what, err)
				return
			}
			if link, _ := linkIn(t, ns, "x"); link.Tun.Owner != int64(owner) || link.Tun.Persist != persist {
				t.Errorf("%d queues, %s: %+v", queues, what, link.Tun)
			}
			d.Close()
		}
		d, err := New(cfg)
		require("nothing there", d, err, otherID(), false)
		d, err = newWith(cfg, meddleAt(1, make))
		require("made in between", d, err, 0, true)
		d, err = New(cfg)
		require("there", d, err, 0, true)
		d, err = newWith(cfg, meddleAt(1, func() { ns.Run(t, "ip link del x") }))
		require("deleted in between", d, err, otherID(), false)
		var held int
		d, err = newWith(cfg, meddleAt(1, func() { held = rawTun(t, ns, "x", flagTUN|flagNoPI|flagMultiQueue) }))
		if err == nil {
			d.Close()
		}
		if _, _, alive := getIff(held); alive != nil || err == nil {
			t.Errorf("made and held in between: %v; the holder: %v", err, alive)
		}
	}
}

// An owner without any capability can attach and move packets, also again (kernel.md U25); another user is told what he lacks.
func TestAttachAsOwner(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod, nstest.SecondUID, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for name, prepare := range map[string]string{
		"one": "user 1000", "many": "multi_queue user 1000", "team": "multi_queue group 2000", "both": "user 1000 group 2000",
	} {
		ns.Run(t, "ip tuntap add dev "+name+" mode tun "+prepare)
	}
	ns.Run(t, "ip addr add 10.9.0.1/24 dev one")
	ns.Run(t, "ip link set one up")
	opts := nstest.HelperOptions{UID: 1000, Tun: nstest.TunPublic}
	for range 2 {
		wantHelper(t, ns, "attach owner", opts, "read and wrote")
	}
	for _, c := range []struct {
		name     string
		uid, gid int
		want     string
	}{
		{"one", 1000, 0, "opened one"},
		{"many", 1000, 0, "opened many"},
		{"team", 1, 2000, "opened team"},
		{"both", 1000, 2000, "opened both"},
		{"one", 1, 0, "attach to one: operation not permitted (needs CAP_NET_ADMIN in the network namespace, or to be the device's owner, uid 1000)"},
		{"team", 1, 0, "or to be the device's group, gid 2000)"},
		{"both", 1000, 0, "or to be the device's owner, uid 1000, in its group, gid 2000)"},
		{"none", 1000, 0, "attach to none: no such device"},
	} {
		opts := nstest.HelperOptions{UID: c.uid, GID: c.gid, Tun: nstest.TunPublic, Args: []string{configArg(t, Config{Name: c.name, Mode: Attach})}}
		wantHelper(t, ns, "open new", opts, c.want)
	}
}

// helperOwner attaches as the user it is, and moves a packet each way.
func helperOwner() error {
	d, err := New(Config{Name: "one", Mode: Attach})
	if err != nil {
		return err
	}
	defer d.Close()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 9, 0, 2}}); err != nil {
		return err
	}
	if _, err := unix.Write(s, []byte("hello")); err != nil {
		return err
	}
	q, b := d.Queues()[0], make([]byte, maxPacket)
	for {
		n, err := q.Read(b)
		if err != nil {
			return err
		}
		if n == 20+8+5 && b[0] == 0x45 {
			back := reply(b[:n])
			copy(back[20:22], b[22:24]) // the ports too
			copy(back[22:24], b[20:22])
			if _, err := q.Write(back); err != nil {
				return err
			}
			break
		}
	}
	n, err := unix.Read(s, b)
	if err != nil || string(b[:n]) != "hello" {
		return fmt.Errorf("received %d bytes: %v", n, err)
	}
	fmt.Println("read and wrote")
	return nil
}
