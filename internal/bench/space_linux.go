package main

import (
	"fmt"
	"net/netip"
	"os"

	"example.com/overlay/internal/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace that nothing but an open descriptor keeps alive: it ends with the process at the latest.
type space struct{ file *os.File }

const threadNS = "/proc/thread-self/ns/net"

func newSpace() (*space, error) {
	s := new(space)
	err := netns.Do(threadNS, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		fd, err := unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		s.file = os.NewFile(uintptr(fd), "network namespace")
		return nil
	})
	if err == nil {
		err = s.netlink(func(h *netlink.Handle) error { return setUp(h, "lo") })
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// newSpaces makes n of them, or none.
func newSpaces(n int) ([]*space, error) {
	var made []*space
	for range n {
		s, err := newSpace()
		if err != nil {
			closeSpaces(made)
			return nil, err
		}
		made = append(made, s)
	}
	return made, nil
}

func closeSpaces(spaces []*space) {
	for _, s := range spaces {
		s.close()
	}
}

// inherited is a namespace that the parent has passed on as a descriptor.
func inherited(fd uintptr) *space { return &space{os.NewFile(fd, "network namespace")} }

func (s *space) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// path is a path of the namespace in this process.
func (s *space) path() string { return fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()) }

// do runs fn on a thread in the namespace; goroutines that fn starts are elsewhere.
func (s *space) do(fn func() error) error { return netns.DoFd(int(s.file.Fd()), fn) }

// netlink runs fn with a connection to the namespace.
func (s *space) netlink(fn func(h *netlink.Handle) error) error {
	var h *netlink.Handle
	err := s.do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	return fn(h)
}

func setUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// configure gives a link its MTU and addresses and sets it up.
func (s *space) configure(name string, mtu int, addrs []netip.Prefix) error {
	return s.netlink(func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err == nil {
			err = h.LinkSetMTU(link, mtu)
		}
		if err == nil && link.Type() != "veth" { // who forwards to neighbours needs an fe80::
			const none = 1
			err = h.LinkSetIP6AddrGenMode(link, none)
		}
		for i := 0; i < len(addrs) && err == nil; i++ {
			err = h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(addrs[i]), Flags: unix.IFA_F_NODAD})
		}
		if err == nil {
			err = h.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("configure %s: %w", name, err)
		}
		return nil
	})
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}
