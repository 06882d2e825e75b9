package nstest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OtherTun makes a second TUN link, up, to be "another interface" (a kernel need not have dummy links), with addresses such
// as "192.0.2.1/24". The link goes at t.Cleanup or with the returned descriptor, which reads and writes its bare IP packets.
func (n *NS) OtherTun(t testing.TB, name string, addrs ...string) *os.File {
	t.Helper()
	var f *os.File
	err := n.do(func() (err error) {
		if f, err = openTun(name); err != nil {
			return err
		}
		return configure(name, addrs)
	})
	if f != nil {
		n.keepTun(t, name, f)
	}
	if err != nil {
		t.Fatalf("another tun %s: %v", name, err)
	}
	return f
}

// keepTun has a link go at t.Cleanup. Those that went earlier, with their descriptor, are forgotten: a test of hours makes many.
func (n *NS) keepTun(t testing.TB, name string, f *os.File) {
	n.mu.Lock()
	defer n.mu.Unlock()
	kept, again := n.tuns[name]
	if !again {
		t.Cleanup(func() { n.closeTuns(name) })
	}
	closed := func(f *os.File) bool { _, err := f.Stat(); return errors.Is(err, os.ErrClosed) }
	n.tuns[name] = append(slices.DeleteFunc(kept, closed), f)
}

func (n *NS) closeTuns(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, f := range n.tuns[name] {
		f.Close()
	}
	delete(n.tuns, name)
}

// openTun makes a TUN link in the calling thread's namespace.
func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	// This order, or the runtime's poller does not take the descriptor.
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("TUNSETIFF %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "tun "+name), nil
}

// configure sets a link up and gives it addresses, usable at once.
func configure(name string, addrs []string) error {
	if err := setUp(name); err != nil || len(addrs) == 0 {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	for _, s := range addrs {
		ip, prefix, err := net.ParseCIDR(s)
		if err != nil {
			return err
		}
		prefix.IP = ip
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: prefix, Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("add %s to %s: %w", s, name, err)
		}
	}
	return nil
}

// Veth joins two namespaces by a pair of links, up, nameA in a and nameB in b. It goes with either namespace. A kernel
// without such links skips the test.
func Veth(t testing.TB, a, b *NS, nameA, nameB string) {
	t.Helper()
	err := a.do(func() error { return addVeth(nameA, nameB, b) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		missing(t, "veth links", err)
	}
	if err == nil {
		err = b.do(func() error { return setUp(nameB) })
	}
	if err != nil {
		t.Fatalf("veth pair %s, %s: %v", nameA, nameB, err)
	}
}

func addVeth(name, peer string, peerNS *NS) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err = h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(peerNS.fd)})
	if err != nil {
		return fmt.Errorf("add: %w", err)
	}
	return setUp(name)
}
