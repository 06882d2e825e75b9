package overlay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// succession is a daemon in a process of its own that is replaced by another, its device under traffic, and all that is around it:
// the host it runs on (lab), systemd's part, another overlay host, and applications on both.
type succession struct {
	*lab
	systemd  *keeper
	underlay *net.UDPConn // of the other host, where the examples' hosts say
	far      *rig
	heard    *rtnl.Listener
	relays   sync.WaitGroup

	socket *os.File   // the daemon's to other hosts, where it opens none itself
	ends   []*os.File // of a socket between one daemon and the next
}

// Where the hosts of Example_takeOver are.
var (
	daemonAddr = netip.MustParseAddrPort("192.0.2.1:4242")
	otherAddr  = netip.MustParseAddrPort("192.0.2.2:4242")
)

func newSuccession(t *testing.T) *succession {
	s := &succession{lab: oneOfLabs(t)}
	s.systemd = newKeeper(s.lab)
	s.ip("addr add 192.0.2.1/32 dev lo\naddr add 192.0.2.2/32 dev lo")
	s.in(func() (err error) {
		if s.underlay, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(otherAddr)); err != nil {
			return err
		}
		s.heard, err = rtnl.Listen(4<<20, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF)
		return err
	})
	t.Cleanup(func() { s.heard.Close() })
	roomy(t, s.underlay)
	s.far = host(t, Config{TxQueueLen: 10_000, Networks: prefixes("10.42.0.2/24", "fd42::2/64")})
	s.relays.Go(s.relayOut)
	s.relays.Go(s.relayIn)
	t.Cleanup(func() {
		s.far.dev.Close()
		s.underlay.Close()
		s.relays.Wait()
	})
	return s
}

// roomy gives a socket a buffer for all that waits while nobody carries, where this is allowed.
func roomy(t testing.TB, conn *net.UDPConn) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const room = 8 << 20
	err = raw.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, room) // as much as there may be
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (s *succession) relayOut() {
	var datagram []byte
	for {
		packets, err := s.far.q.ReadBatch()
		if err != nil {
			return
		}
		for _, p := range packets {
			for i := range p.Segments() {
				datagram = p.AppendSegment(datagram[:0], i)
				_, _ = s.underlay.WriteToUDPAddrPort(datagram, daemonAddr)
			}
		}
	}
}

func (s *succession) relayIn() {
	buf := make([]byte, maxPacket)
	for {
		n, _, err := s.underlay.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if _, err := s.far.q.Write(buf[:n]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

// keeper plays systemd's part: it keeps descriptors, and hears who is ready.
type keeper struct {
	socket *net.UnixConn
	names  []string
	files  []*os.File
	ready  chan struct{}
	done   sync.WaitGroup
	mu     sync.Mutex
}

func newKeeper(l *lab) *keeper {
	l.Helper()
	k := &keeper{ready: make(chan struct{}, 1)}
	l.in(func() (err error) { // abstract names are the network namespace's
		k.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "@systemd", Net: "unixgram"})
		return err
	})
	k.done.Go(func() {
		for k.hear() == nil {
		}
	})
	l.Cleanup(func() {
		k.socket.Close()
		k.done.Wait()
		for _, f := range k.files {
			f.Close()
		}
	})
	return k
}

func (k *keeper) hear() error {
	message, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*64))
	n, c, _, _, err := k.socket.ReadMsgUnix(message, control)
	if err != nil {
		return err
	}
	text := string(message[:n])
	if text == "READY=1" {
		k.ready <- struct{}{}
		return nil
	}
	name, ok := strings.CutPrefix(text, "FDSTORE=1\nFDNAME=")
	messages, err := unix.ParseSocketControlMessage(control[:c])
	if err != nil || len(messages) != 1 || !ok {
		return fmt.Errorf("%q with %d control messages: %w", text, len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range fds {
		k.names = append(k.names, name)
		k.files = append(k.files, os.NewFile(uintptr(fd), name))
	}
	return err
}

// dropDead lets go what has hung up, as systemd does.
func (k *keeper) dropDead(t testing.TB) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := len(k.files) - 1; i >= 0; i-- {
		polled := []unix.PollFd{{Fd: int32(k.files[i].Fd())}}
		if _, err := unix.Poll(polled, 0); err != nil {
			t.Fatal(err)
		}
		if polled[0].Revents != 0 {
			k.files[i].Close()
			k.names, k.files = slices.Delete(k.names, i, i+1), slices.Delete(k.files, i, i+1)
		}
	}
}

// start runs a helper with what is kept for it, and with extra files instead if there are any.
func (s *succession) start(helper string, args []string, extra ...*os.File) *nstest.Process {
	s.Helper()
	opts := nstest.HelperOptions{Args: args, ExtraFiles: extra, Env: []string{"NOTIFY_SOCKET=" + s.systemd.socket.LocalAddr().String()}}
	if extra == nil {
		s.systemd.mu.Lock()
		opts.ExtraFiles = s.systemd.files
		opts.Env = append(opts.Env, fmt.Sprint("LISTEN_FDS=", len(s.systemd.files)), "LISTEN_FDNAMES="+strings.Join(s.systemd.names, ":"))
		s.systemd.mu.Unlock()
	}
	p, _ := s.ns.StartHelper(s.T, helper, opts)
	return p
}

// awaitReady waits for the daemon that p is.
func (s *succession) awaitReady(p *nstest.Process) {
	s.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case <-s.systemd.ready:
		return
	case <-ended:
	case <-time.After(patience):
	}
	s.Fatalf("the daemon is not ready:\n%s", p.Output())
}

// awaitEnd waits for a process that is to end.
func (s *succession) awaitEnd(p *nstest.Process) error {
	s.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
		_ = p.Signal(syscall.SIGQUIT) // which shows where it is
		<-ended
		s.Fatalf("the daemon does not end:\n%s", p.Output())
		return nil
	}
}

// end tells a process to end, by a signal, and waits for it.
func (s *succession) end(p *nstest.Process, signal os.Signal) {
	s.Helper()
	s.must(p.Signal(signal))
	if err := p.Wait(); err != nil && signal != os.Kill {
		s.Fatalf("the daemon ended with %v:\n%s", err, p.Output())
	}
}

// changes lists what the kernel has announced since the last call.
func (s *succession) changes() (all []string) {
	s.Helper()
	for {
		messages, err := s.heard.Next()
		if err != nil {
			s.Fatal(err)
		}
		if len(messages) == 0 {
			return all
		}
		for _, m := range messages {
			all = append(all, fmt.Sprintf("message %d: %x", m.Type, m.Body[:min(len(m.Body), 32)]))
		}
	}
}
