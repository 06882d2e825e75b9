package stage

import (
	"fmt"
	"net"
	"net/netip"

	"example.com/overlay/internal/netns"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const threadNamespace = "/proc/thread-self/ns/net"

// Namespace is a network namespace that nothing but its descriptor keeps alive: however the process ends, it goes too. What
// runs in it (a process, a socket) keeps it alive as well.
type Namespace struct{ fd int }

// NewNamespace makes a namespace, which the caller closes.
func NewNamespace() (*Namespace, error) {
	n := &Namespace{}
	err := netns.Do(threadNamespace, func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.fd, err = unix.Open(threadNamespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return n, nil
}

// Path is for overlay.Config.NetNS.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/self/fd/%d", n.fd) }

// Do runs fn on a thread in the namespace. Goroutines that fn starts run elsewhere; sockets that it opens can be used anywhere.
func (n *Namespace) Do(fn func() error) error { return netns.DoFd(n.fd, fn) }

// Close gives the namespace up.
func (n *Namespace) Close() error { return unix.Close(n.fd) }

// Configure runs fn with a connection to the namespace's routing tables.
func (n *Namespace) Configure(fn func(*netlink.Handle) error) error {
	return n.Do(func() error {
		k, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer k.Close()
		return fn(k)
	})
}

// ListenUDP opens a UDP socket in the namespace.
func (n *Namespace) ListenUDP(addr netip.AddrPort) (conn *net.UDPConn, err error) {
	err = n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	})
	return conn, err
}

// SetUp gives a link addresses, usable at once, and sets it up.
func SetUp(k *netlink.Handle, name string, addrs ...netip.Prefix) (netlink.Link, error) {
	link, err := k.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", name, err)
	}
	for _, a := range addrs {
		if err := k.AddrAdd(link, &netlink.Addr{IPNet: IPNet(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return nil, fmt.Errorf("add address %v to %s: %w", a, name, err)
		}
	}
	if err := k.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	for _, a := range addrs {
		// An IPv6 address is there at once, but what is sent to it arrives a little later.
		err := Await(fmt.Sprintf("address %v of %s to work", a, name), func() (bool, error) {
			routes, err := k.RouteGet(a.Addr().AsSlice())
			return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL, nil
		})
		if err != nil {
			return nil, err
		}
	}
	return link, nil
}

// IPNet is the prefix in netlink's words.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
