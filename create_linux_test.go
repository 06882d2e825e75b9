package overlay

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("open raw", helperRaw)
}

// helperRaw attaches to the device that the first argument names with the flags of the second, and reports what came of it.
func helperRaw() error {
	flags, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	fd, err := tryTun("", os.Args[1], tunFlags(flags))
	if err == nil {
		err = unix.Close(fd)
	}
	fmt.Printf("raw: %v\n", err)
	return nil
}

// New reports the name that the kernel gave: its own choice, the one asked for, or the pattern's next.
func TestCreateReportsName(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	for _, c := range [][2]string{
		{"", "tun0"},
		{"", "tun1"},
		{"x", "x"},
		{"ov%d", "ov0"},
		{"ov%d", "ov1"},
		{"%d", "0"},
		{"a%db", "a0b"},
		{"fifteen-bytes-x", "fifteen-bytes-x"},
		{"-x", "-x"},
		{"\xff\x01", "\xff\x01"},
	} {
		d := newIn(t, ns, Config{Name: c[0]})
		link, ok := linkIn(t, ns, c[1])
		if got := d.State(); got.Name != c[1] || !ok || got.Index != link.Index || link.Up {
			t.Errorf("Name %q: got %q, index %d; the kernel has %v", c[0], got.Name, got.Index, link)
		}
	}
}

// badName and the kernel agree, for every byte and for what else is known to be odd (kernel.md U34, S12).
func TestBadNameAgreesWithKernel(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	names := []string{
		".", "..", "...", ".x", "all", "default", "All", "all0", "lo0", "x:", ":x", "x/", " x", "x ", "\u00a0", "é", "%", "%%",
		"x%", "%s", "%d%d", "x%5d", "x%D", "a123456789012345", "a12345678901234", "\x7f", "0", "-",
		"y%d", "%d", "%dz", "a234567890123%d", "%d34567890123%", "b2345678901234%d", "c23456%d9012345",
	}
	for b := range 256 {
		names = append(names, "a"+string([]byte{byte(b)})+"z")
	}
	work := make(chan string)
	var wg sync.WaitGroup
	for range 8 { // the kernel takes its time to close one, and little more for eight (kernel.md V2)
		wg.Go(func() {
			for name := range work {
				accepted := false
				fd, err := tryTun(ns.Path(), name, flagTUN|flagNoPI|flagExclusive)
				for end := time.Now().Add(patience); errors.Is(err, unix.EBUSY) && time.Now().Before(end); {
					fd, err = tryTun(ns.Path(), name, flagTUN|flagNoPI|flagExclusive) // for a moment "%d" may have become just this name
				}
				if err == nil {
					got, _, err := getIff(fd)
					accepted = err == nil && nameFits(name, got)
					unix.Close(fd)
				}
				if reason := badName(name); accepted != (reason == "") {
					t.Errorf("name %q: the kernel accepts it: %t; badName says %q", name, accepted, reason)
				}
			}
		})
	}
	for _, name := range names {
		work <- name
	}
	close(work)
	wg.Wait()
}

// A name that is taken is ErrBusy, whoever has it, and he notices nothing.
func TestCreateTakenName(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	nstest.Veth(t, ns, nstest.New(t), "veth0", "peer0")
	ns.Run(t, "ip link property add dev veth0 altname other0")
	ns.Run(t, fmt.Sprint("ip tuntap add dev kept mode tun pi vnet_hdr user ", otherID()))
	ns.Run(t, "ip tuntap add dev tap0 mode tap")
	for _, cfg := range []Config{{Name: "single"}, {Name: "multi", Queues: 2}} {
		ns.StartHelper(t, "open new", nstest.HelperOptions{Args: []string{configArg(t, cfg), "hold"}})
	}
	same := unchanged(t, ns)
	for name, text := range map[string]string{
		"lo":     "the name is that of interface 1, of kind \"\"",
		"veth0":  "of kind \"veth\"",
		"other0": "of kind \"veth\"",
		"kept":   "the name is that of a persistent device, for Mode Attach",
		"tap0":   "the name is that of a persistent device",
		"single": "in use by process ",
		"multi":  "in use by process ",
	} {
		for _, queues := range []int{1, 2} {
			_, err := New(Config{Name: name, NetNS: ns.Path(), Queues: queues})
			wantOpError(t, name, err, ErrBusy, "overlay: create "+name+": the device is in use", text)
			wantOpError(t, name, err, unix.EBUSY)
		}
	}
	same("refused")
}

// Where a sandbox refuses the exclusive flag New does without, and still takes no device that was there before: it does not
// even attach to it, which would already change its flags (kernel.md U38).
func TestCreateWithoutExclusiveFlag(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	var meanwhile func()
	sandbox := func(fd int, name string, flags tunFlags) (string, error) {
		if flags&flagExclusive != 0 {
			return "", unix.EINVAL
		}
		if meanwhile != nil {
			meanwhile()
			meanwhile = nil
		}
		return setIff(fd, name, flags)
	}
	for _, queues := range []int{1, 3} {
		for _, name := range []string{"x", "", "x%d"} {
			d, err := newWith(Config{Name: name, NetNS: ns.Path(), Queues: queues}, sandbox)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	ns.Run(t, "ip tuntap add dev one mode tun pi vnet_hdr")
	ns.Run(t, "ip tuntap add dev many mode tun multi_queue pi vnet_hdr")
	held := rawTun(t, ns, "held", flagTUN|flagNoPI|flagMultiQueue)
	same := unchanged(t, ns)
	for _, name := range []string{"one", "many", "held"} {
		for _, queues := range []int{1, 2} {
			_, err := newWith(Config{Name: name, NetNS: ns.Path(), Queues: queues}, sandbox)
			wantOpError(t, name, err, ErrBusy)
		}
	}
	same("refused")
	// Taken between the look and the attempt: the stranger's device stays.
	for _, c := range []struct{ name, command string }{
		{"late1", "ip tuntap add dev late1 mode tun"},
		{"late2", "ip tuntap add dev late2 mode tun multi_queue"},
	} {
		for _, queues := range []int{1, 2} {
			meanwhile = func() { ns.Run(t, c.command) }
			_, err := newWith(Config{Name: c.name, NetNS: ns.Path(), Queues: queues}, sandbox)
			if err == nil {
				t.Errorf("%s, %d queues: took it", c.name, queues)
			}
			if link, ok := linkIn(t, ns, c.name); !ok || !link.Tun.Persist || link.Tun.Owner != -1 {
				t.Errorf("%s, %d queues: the stranger's device is %+v", c.name, queues, link)
			}
			ns.Run(t, "ip link del "+c.name)
		}
	}
	meanwhile = func() { rawTun(t, ns, "late3", flagTUN|flagNoPI|flagMultiQueue) }
	_, err := newWith(Config{Name: "late3", NetNS: ns.Path(), Queues: 2}, sandbox)
	wantOpError(t, "late3", err, ErrBusy, "the name was taken in between")
	if _, _, err := getIff(held); err != nil {
		t.Error(err)
	}
}

// Who may attach to a device of ours: its owner and nobody else, or who has its group; of two both (kernel.md V10, S1).
func TestOwnerAndGroup(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Mknod, nstest.SecondUID)
	nstest.Leaks(t)
	ns := nstest.New(t)
	const uid, gid = 1000, 2000
	const yes, no = "raw: <nil>", "raw: operation not permitted"
	try := func(name string, flags tunFlags, uid, gid int, want string) {
		t.Helper()
		args := []string{name, strconv.Itoa(int(flags))}
		wantHelper(t, ns, "open raw", nstest.HelperOptions{UID: uid, GID: gid, Tun: nstest.TunPublic, Args: args}, want)
	}
	for i, c := range []struct {
		cfg          Config
		owner, group int64
		attach       map[[2]int]string
	}{
		{Config{}, 0, -1, map[[2]int]string{{uid, gid}: no}},
		{Config{Owner: uid}, uid, -1, map[[2]int]string{{uid, 1}: yes, {1, gid}: no, {1, uid}: no}},
		{Config{Group: gid}, -1, gid, map[[2]int]string{{uid, gid}: yes, {1, gid}: yes, {uid, 1}: no, {gid, 1}: no}},
		{Config{Owner: uid, Group: gid}, uid, gid, map[[2]int]string{{uid, gid}: yes, {uid, 1}: no, {1, gid}: no}},
	} {
		for queues, flags := range map[int]tunFlags{1: flagTUN | flagNoPI, 2: flagTUN | flagNoPI | flagMultiQueue} {
			cfg := c.cfg
			cfg.Name, cfg.Queues, cfg.Persist = fmt.Sprintf("x%d-%d", i, queues), queues, true
			d := newIn(t, ns, cfg)
			link, _ := linkIn(t, ns, cfg.Name)
			if link.Tun.Owner != c.owner || link.Tun.Group != c.group || !link.Tun.Persist {
				t.Errorf("%+v: the kernel has %+v", cfg, link.Tun)
			}
			try(cfg.Name, flags, 65534, 65534, no) // also while we hold it
			d.Close()
			for ids, want := range c.attach {
				try(cfg.Name, flags, ids[0], ids[1], want)
			}
			try(cfg.Name, flags, 65534, 65534, no)
		}
	}
}

// Every queue has the flags asked for, and none has IFF_NAPI (kernel.md S10, U50).
func TestQueuesHaveTheFlags(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	for queues, want := range map[int]tunFlags{1: flagTUN | flagVnetHeader, 4: flagTUN | flagVnetHeader | flagMultiQueue} {
		d := newIn(t, ns, Config{Name: fmt.Sprint("x", queues), Queues: queues})
		if link, _ := linkIn(t, ns, d.State().Name); link.Tun.PacketInfo {
			t.Error("there is packet information")
		}
		if got := len(d.Queues()); got != queues {
			t.Errorf("%d queues, want %d", got, queues)
		}
		for i, q := range d.Queues() {
			f, err := q.File()
			if err != nil {
				t.Fatal(err)
			}
			name, flags, err := getIff(int(f.Fd()))
			f.Close()
			if err != nil || name != d.State().Name || flags&(framing|flagNAPI|unix.IFF_PERSIST) != want {
				t.Errorf("queue %d: %s, flags %#x, %v; want %#x", i, name, flags, err, want)
			}
		}
	}
}

// A device has at most 256 queues: as many work, one more is refused before any system call.
func TestMostQueues(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	d := newIn(t, ns, Config{Name: "x", Queues: maxQueues, Persist: true})
	if link, _ := linkIn(t, ns, "x"); link.Tun.Queues != maxQueues || len(d.Queues()) != maxQueues {
		t.Errorf("%d queues, the kernel counts %d; want %d", len(d.Queues()), link.Tun.Queues, maxQueues)
	}
	d.Close()
	newIn(t, ns, Config{Name: "x", Queues: maxQueues, Mode: Attach})
	_, err := New(Config{Name: "y", NetNS: ns.Path(), Queues: maxQueues + 1})
	var config *ConfigError
	if !errors.As(err, &config) || config.Field != "Queues" {
		t.Errorf("error %v, want a *ConfigError for Queues", err)
	}
}

// A name can be opened again at once, 500 times in all, also while children are started: between fork and exec one has a
// duplicate of the descriptor, and the device outlives Close for that moment (kernel.md U24; eight at a time: V2).
func TestReopenAtOnce(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("true"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	const workers = 8
	cycles := 500 / workers
	switch {
	case testing.Short():
		cycles = 50 / workers
	case raceEnabled:
		cycles = 200 / workers
	}
	stop := make(chan struct{})
	var children, wg sync.WaitGroup
	children.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				exec.Command("true").Run()
			}
		}
	})
	for w := range workers {
		wg.Go(func() {
			for i := range cycles {
				d, err := New(Config{Name: fmt.Sprint("x", w), NetNS: ns.Path()})
				if err == nil {
					err = d.Close()
				}
				if err != nil {
					t.Errorf("x%d, cycle %d: %v", w, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	children.Wait()
}

// faultyConn fails one request.
type faultyConn struct {
	conn
	requests, fail int
}

func (c *faultyConn) Do(requests ...rtnl.Message) []rtnl.Result {
	if c.requests++; c.requests == c.fail {
		return []rtnl.Result{{Err: unix.ENOBUFS}}
	}
	return c.conn.Do(requests...)
}

// One of our own user attaches to the device while its queues are added: that is found out too, and the device made anew.
func TestIntruderOfOurOwnUser(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	nstest.Leaks(t)
	ns := nstest.New(t)
	created := 0
	intrude := meddleAt(3, func() { rawTun(t, ns, "x", flagTUN|flagNoPI|flagMultiQueue) })
	opened(t)(newWith(Config{Name: "x", Queues: 3, NetNS: ns.Path()}, func(fd int, name string, flags tunFlags) (string, error) {
		if flags&flagExclusive != 0 {
			created++
		}
		return intrude(fd, name, flags)
	}))
	if link, _ := linkIn(t, ns, "x"); created != 2 || link.Tun.Queues != 3 {
		t.Errorf("made %d times, %+v; want twice, 3 queues", created, link.Tun)
	}
}

// meddlingConn does something before its n-th request.
type meddlingConn struct {
	conn
	n    int
	does func()
}

func (c *meddlingConn) Do(requests ...rtnl.Message) []rtnl.Result {
	if c.n--; c.n == 0 {
		c.does()
	}
	return c.conn.Do(requests...)
}

// A device that is renamed while New looks for it, whose name another takes at once, is still told from that one.
func TestRenamedDuringLook(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	for _, queues := range []int{1, 2} {
		for n := 1; n <= 4; n++ {
			ns := nstest.New(t)
			var other int
			d, err := newTun(Config{Name: "x", NetNS: ns.Path(), Queues: queues}, func(o *opener) (*attachment, error) {
				o.conn = &meddlingConn{o.conn, n, func() {
					ns.Run(t, "ip link set x name y")
					ns.Run(t, "ip tuntap add dev x mode tun multi_queue")
					link, _ := linkIn(t, ns, "x")
					other = link.Index
				}}
				return o.open()
			})
			switch {
			case err == nil && d.State().Index == other:
				t.Errorf("%d queues, request %d: took the other for our own", queues, n)
			case err != nil && queues == 1: // more are attached by name
				t.Errorf("request %d: %v", n, err)
			}
			if err == nil {
				d.Close()
			}
			if link, ok := linkIn(t, ns, "x"); other != 0 && (!ok || link.Index != other || !link.Tun.Persist || link.Tun.Queues != 0 || link.Tun.Owner != -1) {
				t.Errorf("%d queues, request %d: the other is %+v", queues, n, link)
			}
			if _, ok := linkIn(t, ns, "y"); ok {
				t.Errorf("%d queues, request %d: ours is left", queues, n)
			}
		}
	}
}

// Nor does it take one that has the name as an alternative one for the moment of the look, and the device its own back afterwards.
func TestAltnameDuringLook(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	ns.Run(t, "ip tuntap add dev other mode tun")
	other, _ := linkIn(t, ns, "other")
	d := opened(t)(newTun(Config{Name: "x", NetNS: ns.Path()}, func(o *opener) (*attachment, error) {
		o.conn = &around{
			conn:   o.conn,
			before: func() { ns.Run(t, "ip link set x name y"); ns.Run(t, "ip link property add dev other altname x") },
			after:  func() { ns.Run(t, "ip link property del dev other altname x"); ns.Run(t, "ip link set y name x") },
		}
		return o.open()
	}))
	if link, ok := linkIn(t, ns, "x"); !ok || d.State().Index != link.Index || link.Index == other.Index {
		t.Errorf("ours is %d, the other %d, the device took %d", link.Index, other.Index, d.(*tunDevice).index)
	}
}

// Whichever ioctl or request fails, New leaves nothing behind, and an attached device as it was.
func TestFailedNewChangesNothing(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for _, cfg := range []Config{
		{Name: "x"},
		{Name: "x", Persist: true, Owner: otherID(), Group: otherID()},
		{Name: "x%d", Queues: 3, Persist: true},
		{Name: "one", Mode: Attach},
		{Name: "many", Mode: Attach, Queues: 3},
		{Name: "many", Mode: AttachOrCreate, Queues: 1},
	} {
		cfg.NetNS = ns.Path()
		ns.Run(t, fmt.Sprint("ip tuntap add dev one mode tun pi vnet_hdr user ", otherID()))
		ns.Run(t, fmt.Sprint("ip tuntap add dev many mode tun multi_queue pi vnet_hdr group ", otherID()))
		same := unchanged(t, ns)
		clean := func() { // after success
			if cfg.Persist {
				ns.Run(t, "ip", "link", "del", strings.Replace(cfg.Name, "%d", "0", 1))
			}
		}
		failures := 0
		for _, errno := range []error{unix.ENOMEM, unix.EPERM, unix.E2BIG, unix.EINVAL, io.ErrUnexpectedEOF} {
			for n := 1; n <= cfg.queues(); n++ {
				call := 0
				d, err := newWith(cfg, func(fd int, name string, flags tunFlags) (string, error) {
					if call++; call == n {
						return "", errno
					}
					return setIff(fd, name, flags)
				})
				if err == nil && n == 1 && errno == unix.EINVAL { // as where a sandbox does not know the exclusive flag
					d.Close()
					clean()
					continue
				}
				what := fmt.Sprintf("%s %s, ioctl %d: %v", cfg.Mode, cfg.Name, n, errno)
				wantOpError(t, what, err, errno)
				same(what)
				failures++
			}
		}
		for n := 1; ; n++ {
			var faulty *faultyConn
			d, err := newTun(cfg, func(o *opener) (*attachment, error) {
				faulty = &faultyConn{conn: o.conn, fail: n}
				o.conn = faulty
				return o.open()
			})
			if err == nil && faulty.requests < n {
				d.Close()
				clean()
				break
			}
			what := fmt.Sprintf("%s %s, request %d", cfg.Mode, cfg.Name, n)
			wantOpError(t, what, err, unix.ENOBUFS)
			same(what)
			failures++
		}
		if failures < 2 {
			t.Errorf("%+v: only %d failures", cfg, failures)
		}
		ns.Run(t, "ip link del one")
		ns.Run(t, "ip link del many")
	}
}
