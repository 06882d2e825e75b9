package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// The hosts of a rig: the device's own addresses and those of a peer that only the test plays.
var (
	own4  = netip.MustParsePrefix("10.9.0.1/24")
	peer4 = netip.MustParseAddr("10.9.0.2")
	own6  = netip.MustParsePrefix("fd09::1/64")
	peer6 = netip.MustParseAddr("fd09::2")
)

// rig is a device in a namespace of its own. Without a network of IPv6 nothing sends there but the test.
type rig struct {
	testing.TB
	ns   *nstest.NS
	dev  Device
	q    Queue // the first
	name string
}

// newRig makes an active device.
func newRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	r := newDownRig(t, cfg)
	if err := r.dev.Activate(); err != nil {
		t.Fatal(err)
	}
	for _, network := range cfg.Networks {
		// An IPv6 address takes packets when the kernel's addrconf worker has had its turn, after Activate.
		eventually(t, "the kernel takes packets for "+network.String(), func() bool {
			return strings.HasPrefix(r.ns.Run(t, "ip route get "+network.Addr().String()), "local")
		})
	}
	return r
}

// newDownRig makes one that is down.
func newDownRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	r := &rig{TB: t, ns: ns}
	ipv6 := false
	for _, network := range cfg.Networks {
		ipv6 = ipv6 || network.Addr().Is6()
	}
	if ipv6 {
		nstest.Require(t, nstest.IPv6)
	} else {
		r.sysctl("net/ipv6/conf/default/disable_ipv6", "1")
	}
	cfg.NetNS = ns.Path()
	var err error
	if r.dev, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.dev.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	r.q = r.dev.Queues()[0]
	r.name = r.dev.State().Name
	return r
}

// ip runs ip(8) in the namespace; DEV in it stands for the device.
func (r *rig) ip(command string) {
	r.Helper()
	r.ns.Run(r, "ip "+strings.ReplaceAll(command, "DEV", r.name))
}

// sysctl writes a setting of the namespace; without IPv6 there are none of it.
func (r *rig) sysctl(path, value string) {
	r.Helper()
	r.ns.Do(r, func() {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			r.Fatal(err)
		}
	})
}

// udp opens a UDP socket on one of the device's addresses, with a receive buffer for all that a test sends.
func (r *rig) udp(addr netip.Addr) *net.UDPConn {
	r.Helper()
	var conn *net.UDPConn
	r.ns.Do(r, func() {
		var err error
		if conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))); err != nil {
			r.Fatal(err)
		}
	})
	r.Cleanup(func() { conn.Close() })
	if err := conn.SetReadBuffer(4 << 20); err != nil {
		r.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		r.Fatal(err)
	}
	return conn
}

// patience bounds every wait of these tests; none of them takes that long.
const patience = 20 * time.Second

// port returns the address of a socket.
func port(conn *net.UDPConn) netip.AddrPort { return conn.LocalAddr().(*net.UDPAddr).AddrPort() }

// tap is a packet socket on the device: it sees what the kernel gets of the device byte for byte, and hands the device
// whatever bytes a test wants.
type tap struct {
	testing.TB
	fd  int
	to  map[byte]*unix.SockaddrLinklayer // by IP version
	buf []byte
}

func (r *rig) tap() *tap {
	r.Helper()
	w := &tap{TB: r, fd: -1, buf: make([]byte, 1<<17)}
	r.ns.Do(r, func() {
		link, err := net.InterfaceByName(r.name)
		if err != nil {
			r.Fatal(err)
		}
		w.to = map[byte]*unix.SockaddrLinklayer{
			4: {Protocol: htons(unix.ETH_P_IP), Ifindex: link.Index},
			6: {Protocol: htons(unix.ETH_P_IPV6), Ifindex: link.Index},
		}
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL))); err != nil {
			r.Fatal(err)
		}
		r.Cleanup(func() { unix.Close(w.fd) })
		wait := unix.NsecToTimeval(patience.Nanoseconds())
		err = errors.Join(
			unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index}),
			unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
			unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20),
		)
		if err != nil {
			r.Fatal(err)
		}
	})
	return w
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// send makes the kernel send these bytes through the device.
func (w *tap) send(packet []byte) {
	w.Helper()
	if err := unix.Sendto(w.fd, packet, 0, w.to[packet[0]>>4]); err != nil {
		w.Fatalf("send %d bytes: %v", len(packet), err)
	}
}

// next returns the next packet that the kernel got of the device.
func (w *tap) next() []byte {
	w.Helper()
	for {
		n, from, err := unix.Recvfrom(w.fd, w.buf, 0)
		if err != nil {
			w.Fatalf("capture: %v", err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OUTGOING {
			return w.buf[:n]
		}
	}
}

// datagram makes a finished UDP packet.
func datagram(src, dst netip.AddrPort, payload []byte) []byte {
	udp := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(udp, src.Port())
	binary.BigEndian.PutUint16(udp[2:], dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(payload)))
	return transport(src.Addr(), dst.Addr(), 17, append(udp, payload...), 6)
}

// transport puts an IP header before b and a checksum into it.
func transport(src, dst netip.Addr, protocol byte, b []byte, checksum int) []byte {
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, protocol, byte(len(b)>>8), byte(len(b)))
	if protocol == 1 {
		pseudo = nil // ICMP for IPv4 has none
	}
	sum := ^onesSum(pseudo, b)
	if sum == 0 && protocol == 17 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[checksum:], sum)
	if src.Is6() {
		h := []byte{0x60, 0, 0, 0, byte(len(b) >> 8), byte(len(b)), protocol, 64}
		return append(append(h, pseudo[:32]...), b...)
	}
	n := 20 + len(b)
	h := append([]byte{0x45, 0, byte(n >> 8), byte(n), 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0}, src.AsSlice()...)
	h = append(h, dst.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], ^onesSum(h))
	return append(h, b...)
}

// filler is n bytes that begin like an IP packet of that version and otherwise depend on seed.
func filler(version byte, n int, seed uint32) []byte {
	b := make([]byte, n)
	for i := range b {
		seed = seed*1664525 + 1013904223
		b[i] = byte(seed >> 24)
	}
	b[0] = version<<4 | 5
	return b
}

// eventually waits until the condition holds: for what another goroutine or the kernel does in its own time.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// returns waits for a call that must end, and returns its error.
func returns(t testing.TB, within time.Duration, what string, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(within):
		buf := make([]byte, 1<<16)
		t.Fatalf("%s does not return within %v:\n%s", what, within, buf[:runtime.Stack(buf, true)])
		return nil
	}
}

// parked waits until as many goroutines wait in the poller under a function of this name, such as "tunQueue).Read(".
func parked(t testing.TB, function string, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d goroutines wait in %s", n, function), func() bool {
		buf := make([]byte, 1<<20)
		got := 0
		for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			head, rest, _ := strings.Cut(stack, "\n")
			if strings.Contains(head, "[IO wait") && strings.Contains(rest, function) {
				got++
			}
		}
		return got == n
	})
}

// requireStats compares the counters that a test has an opinion about: all but the device's own.
func (r *rig) requireStats(want Stats) {
	r.Helper()
	got := r.dev.Stats()
	got.Overruns, got.Resyncs, got.EventsMissed = want.Overruns, want.Resyncs, want.EventsMissed
	if got != want {
		r.Errorf("counters:\ngot  %+v\nwant %+v", got, want)
	}
}

// heard waits for the next announcement.
func heard(l *rtnl.Listener) ([]rtnl.Message, error) {
	if err := l.Wait(); err != nil {
		return nil, err
	}
	return l.Next()
}
