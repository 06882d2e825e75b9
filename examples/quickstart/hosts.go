//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"example.com/overlay"
	"example.com/overlay/internal/netns"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// patience is how long anything may take that normally takes no time.
const patience = 5 * time.Second

// families are indices of what exists once for IPv4 and once for IPv6.
var families = [...]string{"IPv4", "IPv6"}

// shared is the subnet behind both gateways, as the address that each of them has in it.
var shared = [...]netip.Prefix{netip.MustParsePrefix("192.168.77.1/24"), netip.MustParsePrefix("fd77::1/64")}

// weights are the shares of the flows into shared that the gateways, the last hosts, are to get.
var weights = [...]int{3, 1}

// router is the underlay's own address, the same on all its links.
var router = netip.MustParseAddr("192.0.2.254")

// host is an overlay host: host7 is 192.0.2.7 on the underlay, 10.42.0.7 and fd42::7 on the overlay.
type host struct {
	name     string
	ns       *namespace
	underlay netip.AddrPort
	networks [len(families)]netip.Prefix
	agent    *agent
}

func newHost(number int) (*host, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	n := byte(number)
	return &host{
		name:     fmt.Sprintf("host%d", number),
		ns:       ns,
		underlay: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 4242),
		networks: [...]netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 42, 0, n}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x42, 15: n}), 64),
		},
	}, nil
}

// lab is all that the program builds: hosts around an underlay, a namespace that does nothing but forward IPv4.
type lab struct {
	underlay *namespace
	hosts    []*host
}

// newLab builds n hosts and starts their agents. The caller closes the lab.
func newLab(ctx context.Context, n int) (_ *lab, err error) {
	l := &lab{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.underlay, err = newNamespace(); err != nil {
		return nil, err
	}
	peers := make(map[netip.Addr]netip.AddrPort)
	for number := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := newHost(number + 1)
		if err != nil {
			return nil, err
		}
		l.hosts = append(l.hosts, h)
		if err := l.join(h); err != nil {
			return nil, fmt.Errorf("join %s to the underlay: %w", h.name, err)
		}
		for _, network := range h.networks {
			peers[network.Addr()] = h.underlay
		}
	}
	for _, h := range l.hosts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := l.start(h, peers); err != nil {
			return nil, fmt.Errorf("start %s: %w", h.name, err)
		}
	}
	return l, nil
}

// gateways are the last hosts, which share a subnet behind them; the others are its clients.
func (l *lab) gateways() []*host { return l.hosts[len(l.hosts)-len(weights):] }
func (l *lab) clients() []*host  { return l.hosts[:len(l.hosts)-len(weights)] }

// start runs the agent of a host, and gives a gateway its address in the shared subnet.
func (l *lab) start(h *host, peers map[netip.Addr]netip.AddrPort) error {
	cfg := overlay.Config{Name: "overlay0", Networks: h.networks[:], NetNS: h.ns.path()}
	gateway := false
	for _, g := range l.gateways() {
		gateway = gateway || g == h
	}
	if gateway {
		err := h.ns.configure(func(k *netlink.Handle) error {
			_, err := setUp(k, "lo", shared[:]...)
			return err
		})
		if err != nil {
			return err
		}
	} else {
		cfg.Routes = l.sharedRoutes()
	}
	// A socket belongs to the namespace of the thread that makes it, and can then be used from anywhere.
	var udp *net.UDPConn
	err := h.ns.do(func() (err error) {
		udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(h.underlay))
		return err
	})
	if err != nil {
		return err
	}
	if err = udp.SetReadBuffer(4 << 20); err == nil { // the kernel may grant less
		h.agent, err = startAgent(cfg, udp, peers)
	}
	if err != nil {
		return errors.Join(err, udp.Close())
	}
	return nil
}

// sharedRoutes lead to the shared subnet, one a family, by weight through the gateways.
func (l *lab) sharedRoutes() []overlay.Route {
	var routes []overlay.Route
	for family, prefix := range shared {
		var via []overlay.Gateway
		for i, gateway := range l.gateways() {
			via = append(via, overlay.Gateway{Addr: gateway.networks[family].Addr(), Weight: weights[i]})
		}
		routes = append(routes, overlay.Route{Prefix: prefix.Masked(), Via: via})
	}
	return routes
}

// Close ends the agents and gives up the namespaces; links go with them.
func (l *lab) Close() error {
	errs := make([]error, len(l.hosts)+1)
	var closing sync.WaitGroup // together, because the kernel takes its time for each device
	for i, h := range l.hosts {
		closing.Go(func() {
			if h.agent != nil {
				errs[i] = h.agent.Close()
			}
			if err := errors.Join(errs[i], h.ns.close()); err != nil {
				errs[i] = fmt.Errorf("close %s: %w", h.name, err)
			}
		})
	}
	closing.Wait()
	if l.underlay != nil {
		errs[len(l.hosts)] = l.underlay.close()
	}
	return errors.Join(errs...)
}

// join connects a host to the underlay by a veth pair: eth0 in the host, a link of the host's name in the underlay.
func (l *lab) join(h *host) error {
	err := l.underlay.configure(func(k *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = h.name
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(h.ns.fd)
		if err := k.LinkAdd(veth); err != nil {
			return fmt.Errorf("add a veth pair: %w", err)
		}
		link, err := setUp(k, h.name, single(router))
		if err != nil {
			return err
		}
		return errors.Join(addRoute(k, link, single(h.underlay.Addr()), netip.Addr{}), forward(link))
	})
	if err != nil {
		return err
	}
	err = h.ns.configure(func(k *netlink.Handle) error {
		link, err := setUp(k, "eth0", single(h.underlay.Addr()))
		if err != nil {
			return err
		}
		return errors.Join(addRoute(k, link, netip.MustParsePrefix("0.0.0.0/0"), router), awaitUp(k, link))
	})
	if err != nil {
		return err
	}
	return l.underlay.configure(func(k *netlink.Handle) error {
		link, err := k.LinkByName(h.name)
		if err != nil {
			return err
		}
		return awaitUp(k, link)
	})
}

func single(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }

// namespace is a network namespace that nothing but its descriptor keeps alive: however the process ends, it goes too.
type namespace struct{ fd int }

const threadNamespace = "/proc/thread-self/ns/net"

func newNamespace() (*namespace, error) {
	n := &namespace{}
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

func (n *namespace) path() string             { return fmt.Sprintf("/proc/self/fd/%d", n.fd) }
func (n *namespace) do(fn func() error) error { return netns.DoFd(n.fd, fn) }
func (n *namespace) close() error             { return unix.Close(n.fd) }

// configure runs fn with a connection to the namespace's routing tables.
func (n *namespace) configure(fn func(*netlink.Handle) error) error {
	return n.do(func() error {
		k, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer k.Close()
		return fn(k)
	})
}

// setUp gives a link addresses, usable at once, and sets it up.
func setUp(k *netlink.Handle, name string, addrs ...netip.Prefix) (netlink.Link, error) {
	link, err := k.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", name, err)
	}
	for _, a := range addrs {
		if err := k.AddrAdd(link, &netlink.Addr{IPNet: ipNet(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return nil, fmt.Errorf("add address %v to %s: %w", a, name, err)
		}
	}
	if err := k.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	for _, a := range addrs {
		// An IPv6 address is there at once, but what is sent to it arrives a little later.
		err := await(fmt.Sprintf("address %v of %s to work", a, name), func() (bool, error) {
			routes, err := k.RouteGet(a.Addr().AsSlice())
			return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL, nil
		})
		if err != nil {
			return nil, err
		}
	}
	return link, nil
}

// addRoute adds a route through a link, by a gateway on that link if there is one.
func addRoute(k *netlink.Handle, link netlink.Link, to netip.Prefix, gateway netip.Addr) error {
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Scope: netlink.SCOPE_LINK}
	if gateway.IsValid() {
		route.Gw, route.Scope, route.Flags = gateway.AsSlice(), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
	}
	if err := k.RouteAdd(route); err != nil {
		return fmt.Errorf("add route %v through %s: %w", to, link.Attrs().Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// forward lets what comes in by the link go out by others. It asks by netlink, from the link's namespace, because /proc/sys
// is read-only in many containers.
func forward(link netlink.Link) error {
	const inetConf, forwarding = 1, 1 // IFLA_INET_CONF, IPV4_DEVCONF_FORWARDING
	header := nl.NewIfInfomsg(unix.AF_UNSPEC)
	header.Index = int32(link.Attrs().Index)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil).AddRtAttr(forwarding, nl.Uint32Attr(1))
	request := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	request.AddData(header)
	request.AddData(spec)
	if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("forward what comes from %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// awaitUp waits until the kernel has noticed that the link has a live other end; before that it drops what is sent.
func awaitUp(k *netlink.Handle, link netlink.Link) error {
	return await(fmt.Sprintf("link %s to be up", link.Attrs().Name), func() (bool, error) {
		now, err := k.LinkByIndex(link.Attrs().Index)
		return err == nil && now.Attrs().OperState == netlink.OperUp, err
	})
}

// await waits for something that the kernel does in its own time.
func await(what string, done func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		switch ok, err := done(); {
		case err != nil:
			return fmt.Errorf("wait for %s: %w", what, err)
		case ok:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("waited %v for %s", patience, what)
		}
	}
}
