package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("stranger", helperStranger)
}

const strangerFlags = flagTUN | flagNoPI | flagMultiQueue

// helperStranger spins to get a queue of the device that its first argument names. What it then does the second says: hold it
// as long as there is a device, or take it over and go. It reports how often it got one.
func helperStranger() error {
	var got atomic.Int64
	go func() {
		for {
			fd, err := unix.Open(nodePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return
			}
			for err = unix.EPERM; err != nil; {
				_, err = setIff(fd, os.Args[1], strangerFlags)
			}
			got.Add(1)
			for os.Args[2] == "hold" && err == nil {
				_, _, err = getIff(fd)
			}
			if os.Args[2] == "take over" {
				setOwner(fd, unix.Getuid())
				setPersist(fd)
			}
			unix.Close(fd)
		}
	}()
	err := nstest.Ready("spinning")
	fmt.Printf("got %d queues\n", got.Load())
	return err
}

// A stranger who spins for a queue of a new multi-queue device, from before it exists until it has its owner, never shares
// it: the device is made again until we are alone (kernel.md V4). He does get queues of it, in vain.
func TestSpinningStranger(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod, nstest.SecondUID)
	nstest.Leaks(t)
	creations := 50 // twice
	switch {
	case testing.Short():
		creations = 5
	case raceEnabled:
		creations = 25
	}
	for _, conduct := range []string{"hold", "take over"} {
		ns := nstest.New(t)
		opts := nstest.HelperOptions{UID: 65534, Tun: nstest.TunPublic, Args: []string{"x", conduct}}
		p, _ := ns.StartHelper(t, "stranger", opts)
		attempts, refused := 0, 0
		for range creations {
			cfg := Config{Name: "x", Queues: 2, NetNS: ns.Path(), Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}
			d, err := newWith(cfg, func(fd int, name string, flags tunFlags) (string, error) {
				if flags&flagExclusive != 0 {
					attempts++
				}
				return setIff(fd, name, flags)
			})
			if errors.Is(err, errStranger) {
				refused++
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			requireOurs(t, ns, d)
			d.Close()
		}
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		_, text, _ := strings.Cut(p.Output(), "got ")
		text, _, _ = strings.Cut(text, " queues")
		got, err := strconv.Atoi(text)
		t.Logf("%s: %d creations took %d attempts, %d refused; the stranger got %d queues", conduct, creations, attempts, refused, got)
		if err != nil || got == 0 || attempts == creations {
			t.Errorf("%s: the stranger got %q queues, so this proves nothing", conduct, text)
		}
		if _, ok := linkIn(t, ns, "x"); ok {
			t.Errorf("%s: a device is left", conduct)
		}
	}
}

// requireOurs requires that the device has our queues alone and belongs to us, and that what the host sends to the overlay
// arrives on them: of many flows some would go to a stranger's queue.
func requireOurs(t testing.TB, ns *nstest.NS, d Device) {
	t.Helper()
	link, _ := linkIn(t, ns, "x")
	if k := link.Tun; k.Queues != len(d.Queues()) || k.Disabled != 0 || k.Owner != 0 || k.Group != -1 || k.Persist || link.Hardware != unix.ARPHRD_NONE {
		t.Fatalf("the device is %+v", link)
	}
	if err := d.Activate(); err != nil {
		t.Fatal(err)
	}
	const flows = 64
	sendFlows(t, ns, netip.MustParseAddrPort("10.9.0.2:9"), flows)
	total, counts := 0, waiting(t, d)
	for _, n := range counts {
		total += n
	}
	if total != flows || slices.Contains(counts, 0) {
		t.Fatalf("of %d packets %v arrived on the queues", flows, counts)
	}
}

// sendFlows sends datagrams from as many ports.
func sendFlows(t testing.TB, ns *nstest.NS, to netip.AddrPort, flows int) {
	t.Helper()
	ns.Do(t, func() {
		for range flows {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Sendto(s, []byte("hello"), 0, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
				unix.Close(s)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// waiting takes the UDP packets that wait in each of the device's queues and counts them; the kernel puts a packet there
// before the sender's call returns.
func waiting(t testing.TB, d Device) (counts []int) {
	t.Helper()
	for i := range d.Queues() {
		counts = append(counts, len(waitingIn(t, d, i)))
	}
	return counts
}

// waitingSizes takes them too, and returns their sizes.
func waitingSizes(t testing.TB, d Device) (sizes []int) {
	t.Helper()
	for i := range d.Queues() {
		sizes = append(sizes, waitingIn(t, d, i)...)
	}
	return sizes
}

func waitingIn(t testing.TB, d Device, queue int) (sizes []int) {
	t.Helper()
	room := make([]byte, readRoom)
	q := d.Queues()[queue].(*tunQueue)
	err := q.raw.Control(func(fd uintptr) {
		for {
			size, err := unix.Read(int(fd), room)
			if err != nil {
				return
			}
			b := room[q.header:]
			size -= q.header
			if size > 20 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_UDP {
				sizes = append(sizes, size)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return sizes
}

// What a stranger does in the moment between TUNSETIFF and TUNSETOWNER: what can be seen costs a device, which is made anew;
// what cannot is set right.
func TestStrangersTraces(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"), nstest.Program("ethtool"))
	pointer := func(request uint, value int) func(int) error {
		return func(fd int) error { return unix.IoctlSetPointerInt(fd, request, value) }
	}
	value := func(request uint, value int) func(int) error {
		return func(fd int) error { return unix.IoctlSetInt(fd, request, value) }
	}
	for _, c := range []struct {
		name  string
		does  func(fd int) error
		stays bool // his descriptor remains open, until he does more by it and leaves unseen
		anew  bool
	}{
		{"queue", func(int) error { return nil }, true, true},
		{"detached queue", detachQueue, true, true},
		{"owner", value(unix.TUNSETOWNER, otherID()), true, true},
		{"persistence", value(unix.TUNSETPERSIST, 1), false, true},
		{"group", value(unix.TUNSETGROUP, otherID()), false, true},
		{"link type", value(unix.TUNSETLINK, unix.ARPHRD_PPP), false, true},
		{"owner, gone", value(unix.TUNSETOWNER, otherID()), false, false}, // ours overwrites it
		{"send buffer", pointer(unix.TUNSETSNDBUF, 1), false, false},
		{"header size", pointer(unix.TUNSETVNETHDRSZ, 64), false, false},
		{"byte order", pointer(unix.TUNSETVNETLE, 1), false, false},
		{"carrier", pointer(unix.TUNSETCARRIER, 0), false, false},
		{"offload", value(unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6), false, false},
		{"debug", value(unix.TUNSETDEBUG, 0xffff), false, false},
		{"filter program", func(fd int) error { return setProgram(fd, unix.TUNSETFILTEREBPF) }, false, false},
		{"steering program", func(fd int) error { return setProgram(fd, unix.TUNSETSTEERINGEBPF) }, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if strings.HasSuffix(c.name, "program") {
				nstest.Require(t, nstest.InitUserNS)
			}
			nstest.Leaks(t)
			ns := nstest.New(t)
			quiet := nstest.New(t)
			want := readings(t, quiet, newIn(t, quiet, Config{Name: "x", Queues: 2}))
			created, his := 0, -1
			cfg := Config{Name: "x", Queues: 2, NetNS: ns.Path(), Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}
			d := opened(t)(newWith(cfg, func(fd int, name string, flags tunFlags) (string, error) {
				if flags&flagExclusive == 0 && his >= 0 {
					errors.Join(unix.IoctlSetPointerInt(his, unix.TUNSETSNDBUF, 1), unix.Close(his)) // in vain: it is of a former device
					his = -1
				}
				got, err := setIff(fd, name, flags)
				if flags&flagExclusive == 0 || err != nil {
					return got, err
				}
				if created++; created == 1 {
					if his = stranger(t, ns, c.does); !c.stays {
						unix.Close(his)
						his = -1
					}
				}
				return got, err
			}))
			if (created == 2) != c.anew {
				t.Errorf("made %d times; anew: %t", created, c.anew)
			}
			for what, got := range readings(t, ns, d) {
				if got != want[what] {
					t.Errorf("%s: %q, want %q", what, got, want[what])
				}
			}
			requireOurs(t, ns, d)
		})
	}
}

// stranger gets a queue and does something with it.
func stranger(t testing.TB, ns *nstest.NS, does func(fd int) error) int {
	t.Helper()
	fd, err := tryTun(ns.Path(), "x", strangerFlags)
	if err == nil {
		err = does(fd)
	}
	if err != nil {
		t.Errorf("the stranger failed: %v", err)
	}
	return fd
}

// detachQueue switches a queue off: the kernel counts it elsewhere, and lets it come back.
func detachQueue(fd int) error {
	request, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_DETACH_QUEUE)
	return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, request)
}

// setProgram attaches a program that returns 0: the filter drops every packet, the steering sends all to the first queue.
func setProgram(fd int, request uint) error {
	// r0 = 0; exit
	code := [2]uint64{0xb7, 0x95}
	license := [4]byte{'G', 'P', 'L'}
	attr := struct {
		kind, count    uint32
		code, license  uint64
		_, _           uint32
		_              uint64
		version, flags uint32
		_              [16]byte
		_              uint32
		_              uint32
	}{kind: 1, count: 2, code: uint64(uintptr(unsafe.Pointer(&code))), license: uint64(uintptr(unsafe.Pointer(&license)))}
	const load = 5 // BPF_PROG_LOAD, of a socket filter
	program, _, errno := unix.Syscall(unix.SYS_BPF, load, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(program))
	return unix.IoctlSetPointerInt(fd, request, int(program))
}

// readings returns all that can be read of a device and that a descriptor of it can change.
func readings(t testing.TB, ns *nstest.NS, d Device) map[string]string {
	t.Helper()
	read := map[string]string{}
	err := d.Queues()[0].(*tunQueue).raw.Control(func(fd uintptr) {
		for what, request := range map[string]uint{
			"send buffer": unix.TUNGETSNDBUF, "header size": unix.TUNGETVNETHDRSZ, "byte order": unix.TUNGETVNETLE,
		} {
			v, err := unix.IoctlGetUint32(int(fd), request)
			read[what] = fmt.Sprint(v, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	read["ethtool"] = ns.Run(t, "ethtool x") // kernel messages
	read["features"] = ns.Run(t, "ethtool -k x")
	_, read["link"], _ = strings.Cut(ns.Run(t, "ip -d link show x"), ":") // after the index
	return read
}

// One stranger after the other: New gives up, says why, and leaves nothing behind, whatever he did to keep the device.
func TestStrangerForEver(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	same := unchanged(t, ns)
	for what, does := range map[string]func(fd int) error{
		"stays":            func(fd int) error { return nil },
		"makes persistent": setPersist,
	} {
		attempts := 0
		cfg := Config{Name: "x", Queues: 3, NetNS: ns.Path()}
		_, err := newWith(cfg, func(fd int, name string, flags tunFlags) (string, error) {
			got, err := setIff(fd, name, flags)
			if flags&flagExclusive != 0 && err == nil {
				attempts++
				his := stranger(t, ns, does)
				if what == "stays" {
					t.Cleanup(func() { unix.Close(his) })
				} else {
					unix.Close(his)
				}
			}
			return got, err
		})
		wantOpError(t, what, err, errStranger, "overlay: create x: another process attached a queue to the new device, again and again")
		if attempts != strangerTries {
			t.Errorf("%s: %d attempts, want %d", what, attempts, strangerTries)
		}
		same(what)
	}
}
