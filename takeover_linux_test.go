package overlay

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// takeover is one way in which a daemon follows another.
type takeover struct {
	name    string
	first   func(s *succession) *nstest.Process
	replace func(s *succession, old *nstest.Process)

	untouched bool   // the kernel has nothing to announce
	keeps     bool   // no packet is lost but those that
	inHand    uint64 // a process that is killed has read and not written, at most
}

var takeovers = []takeover{
	{name: "restarted by systemd", first: (*succession).kept, replace: (*succession).restart, untouched: true, keeps: true},
	{name: "killed", first: (*succession).kept, replace: (*succession).kill, untouched: true, keeps: true, inHand: readMost},
	{name: "handed over", first: (*succession).predecessor, replace: (*succession).handOver, untouched: true, keeps: true},
	{name: "a persistent device, attached to again", first: (*succession).attached, replace: (*succession).attachAgain},
}

// kept starts the daemon of which systemd keeps the descriptors.
func (s *succession) kept() *nstest.Process { return s.start("take over", nil) }

func (s *succession) restart(old *nstest.Process) {
	s.end(old, syscall.SIGTERM)
	s.awaitReady(s.kept())
}

func (s *succession) kill(old *nstest.Process) {
	s.end(old, os.Kill)
	s.awaitReady(s.kept())
}

// predecessor starts a daemon that will hand over.
func (s *succession) predecessor() *nstest.Process {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	s.must(err)
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "between generations")
		s.Cleanup(func() { f.Close() })
		s.ends = append(s.ends, f)
	}
	return s.start("hand over", nil, s.ends[0], s.openSocket())
}

func (s *succession) handOver(old *nstest.Process) {
	next := s.start("hand over", []string{"successor"}, s.ends[1], s.socket)
	s.end(old, syscall.SIGTERM)
	s.awaitReady(next)
}

// attached starts a daemon of whose device nobody keeps a descriptor.
func (s *succession) attached() *nstest.Process { return s.start("attach again", nil, s.openSocket()) }

func (s *succession) attachAgain(old *nstest.Process) {
	s.end(old, syscall.SIGTERM)
	s.awaitReady(s.start("attach again", nil, s.socket))
}

// openSocket opens the daemon's socket to other hosts.
func (s *succession) openSocket() *os.File {
	s.in(func() error {
		conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(daemonAddr))
		if err != nil {
			return err
		}
		defer conn.Close()
		s.socket, err = conn.File()
		return err
	})
	s.Cleanup(func() { s.socket.Close() })
	return s.socket
}

// A daemon is replaced by another process, and the device stays: index, addresses and routes as they were and untouched, a TCP
// connection through it, and the packets that came when nobody was there to carry them. What an attached device loses is for comparison,
// and shows that the counting can tell.
func TestTakeOver(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Program("ip"))
	nstest.Leaks(t)
	for _, way := range takeovers {
		t.Run(way.name, func(t *testing.T) {
			s := newSuccession(t)
			old := way.first(s)
			s.awaitReady(old)
			near4, near6 := netip.MustParseAddr("10.42.0.1"), netip.MustParseAddr("fd42::1")
			far4, far6 := near4.Next(), near6.Next()
			out := s.startNumbered(500*time.Microsecond, s.ns, near4, s.far.ns, far4)
			in := s.startNumbered(2*time.Millisecond, s.far.ns, far6, s.ns, near6)
			talk := s.startDialogue(near6, far6)
			flows := func() {
				goal := [...]uint64{out.got.Load() + 400, in.got.Load() + 100, talk.echoed.Load() + 50}
				s.await("traffic", func() bool {
					return out.got.Load() > goal[0] && in.got.Load() > goal[1] && talk.echoed.Load() > goal[2]
				})
			}
			flows()
			before, start, sent := s.kernelState(), time.Now(), out.sent.Load()
			s.changes()
			way.replace(s, old)
			down, meanwhile := time.Since(start), out.sent.Load()-sent
			flows()
			after, changes := s.kernelState(), s.changes()
			lostOut, lostIn := out.lost(), in.lost()
			err := talk.end()

			t.Logf("nobody carried for at most %v; out: %v; in: %v; the longest echo by TCP took %v",
				down.Round(time.Millisecond), out, in, time.Duration(talk.longest.Load()).Round(time.Millisecond))
			if err != nil {
				t.Errorf("the TCP connection: %v", err)
			}
			s.want("the kernel's state", after, before...)
			if way.untouched {
				s.want("announcements", changes)
			}
			switch {
			case way.keeps && (lostOut > way.inHand || lostIn > way.inHand):
				t.Errorf("%d datagrams out and %d in were lost, want at most %d", lostOut, lostIn, way.inHand)
			case !way.keeps && (lostOut == 0 || lostOut > meanwhile+readMost):
				t.Errorf("%d datagrams out were lost, want some of the %d that were sent meanwhile", lostOut, meanwhile)
			}
			for _, n := range []*numbered{out, in} {
				if n.swapped.Load() > 0 || time.Duration(n.silence.Load()) > down+time.Second {
					t.Errorf("%v, want none overtaken, and no silence much longer than nobody carried", n)
				}
			}
		})
	}
}

// A daemon to which nobody speaks ends all the same: what systemd got of its socket does not make it block.
func TestTakeOverInSilence(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Program("ip"))
	nstest.Leaks(t)
	s := newSuccession(t)
	for range 2 {
		p := s.kept()
		s.awaitReady(p)
		s.must(p.Signal(syscall.SIGTERM))
		s.awaitEnd(p)
	}
}

// A device that was deleted is not kept any longer; the next daemon makes a new one, and that is kept again.
func TestTakeOverAfterDeletion(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Program("ip"))
	nstest.Leaks(t)
	s := newSuccession(t)
	old := s.kept()
	s.awaitReady(old)
	s.ip("link del overlay0")
	if err := s.awaitEnd(old); err == nil {
		t.Error("the daemon goes without its device, and says nothing")
	}
	s.systemd.dropDead(t)
	s.want("what is kept meanwhile", s.systemd.names, "socket")
	next := s.kept()
	s.awaitReady(next)
	s.restart(next)
	s.want("what is kept", s.systemd.names, "socket", "device")
}

// The Config of New will do for Adopt, and for Reload then: what is fixed for a device's life is compared with the device.
func TestAdoptByTheConfigOfNew(t *testing.T) {
	l := newLab(t)
	cfg := Config{
		Name: "x", Queues: 2, Owner: otherID(), Group: otherID(), Mode: AttachOrCreate, Persist: true, NetNS: l.ns.Path(),
		Networks: prefixes("10.42.0.1/24", "fd42::1/64"), Routes: []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Via: via("10.42.0.9")}},
	}
	d := l.active(cfg)
	var fds []int
	for _, q := range d.Queues() {
		f, err := q.File()
		l.must(err)
		fds = append(fds, duplicate(t, int(f.Fd())))
		l.must(f.Close())
	}
	before := l.kernelState()
	l.must(d.Close())
	a := opened(t)(Adopt(cfg, fds...))
	l.must(a.Activate())
	l.must(a.Reload(cfg))
	l.want("the kernel's state", l.kernelState(), before...)
	want := fmt.Sprintf(" owner %d group %d persist on ", otherID(), otherID())
	if got := a.State().String(); !strings.Contains(got, "\nconfig mode adopt ") || !strings.Contains(got, want) {
		t.Errorf("no adopted device with%sin\n%s", want, got)
	}
}
