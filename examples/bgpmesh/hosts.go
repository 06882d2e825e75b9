//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"example.com/overlay"
	"example.com/overlay/examples/internal/stage"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// arena is where all files are that the program makes: in a file system of its own, which nobody else sees.
const arena = "/run"

// families are indices of what exists once for IPv4 and once for IPv6.
var families = [...]string{"IPv4", "IPv6"}

// subnet is a network behind a host: subnet 7 is 10.100.7.0/24 and fd00:100:7::/64.
type subnet byte

// shared is the subnet that two hosts have behind them.
const shared subnet = 99

func (s subnet) prefix(family int) netip.Prefix {
	if families[family] == "IPv4" {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, byte(s), 0}), 24)
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x01, 5: byte(s)}), 64)
}

// door is the one address of the subnet that somebody has, and who it is says when asked.
func (s subnet) door(family int) netip.AddrPort {
	return netip.AddrPortFrom(s.prefix(family).Addr().Next(), 7)
}

func (s subnet) String() string { return fmt.Sprintf("%v, %v", s.prefix(0), s.prefix(1)) }

// host is an overlay host: host7 is 192.0.2.7 on the underlay, 10.42.0.7 and fd42::7 on the overlay, and has subnet 7 behind it.
type host struct {
	name     string
	number   byte
	ns       *stage.Namespace
	dir      string // of its router's files
	underlay netip.AddrPort
	networks [len(families)]netip.Prefix
	agent    *agent
	router   router

	announced []subnet
	doors     map[subnet][]*net.UDPConn // sockets on the addresses that it has of each subnet
	serving   sync.WaitGroup
}

func newHost(n byte) (*host, error) {
	h := &host{
		name:     fmt.Sprintf("host%d", n),
		number:   n,
		underlay: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 4242),
		networks: [...]netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 42, 0, n}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x42, 15: n}), 64),
		},
		doors: make(map[subnet][]*net.UDPConn),
	}
	h.dir = filepath.Join(arena, h.name)
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	h.ns, err = stage.NewNamespace()
	return h, err
}

// startAgent runs the agent, which follows the kernel's routes: that is all it takes to be steered by a router.
func (h *host) startAgent(peers map[netip.Addr]netip.AddrPort) error {
	cfg := overlay.Config{
		Name: "overlay0", Networks: h.networks[:], NetNS: h.ns.Path(),
		SystemRoutes: &overlay.SystemRoutes{},
	}
	udp, err := h.ns.ListenUDP(h.underlay)
	if err != nil {
		return err
	}
	if h.agent, err = startAgent(cfg, udp, peers); err != nil {
		return errors.Join(err, udp.Close())
	}
	return nil
}

// settle gives the host the doors of a subnet, where it answers; leave takes them away. Neither tells its router.
func (h *host) settle(s subnet) error {
	for family := range families {
		err := h.ns.Configure(func(k *netlink.Handle) error {
			_, err := stage.SetUp(k, "lo", single(s.door(family)))
			return err
		})
		if err != nil {
			return err
		}
		door, err := h.ns.ListenUDP(s.door(family))
		if err != nil {
			return err
		}
		h.doors[s] = append(h.doors[s], door)
		h.serving.Go(func() { stage.Answer(door, h.number) })
	}
	return nil
}

func (h *host) leave(s subnet) error {
	var errs []error
	for _, door := range h.doors[s] {
		errs = append(errs, door.Close())
	}
	delete(h.doors, s)
	return errors.Join(append(errs, h.ns.Configure(func(k *netlink.Handle) error {
		lo, err := k.LinkByName("lo")
		for family := range families {
			if err == nil {
				err = k.AddrDel(lo, &netlink.Addr{IPNet: stage.IPNet(single(s.door(family)))})
			}
		}
		return err
	}))...)
}

func single(a netip.AddrPort) netip.Prefix { return netip.PrefixFrom(a.Addr(), a.Addr().BitLen()) }

// announce makes the host's router announce one subnet more, withdraw one less.
func (h *host) announce(ctx context.Context, s subnet) error {
	return h.tell(ctx, append(slices.Clone(h.announced), s))
}

func (h *host) withdraw(ctx context.Context, s subnet) error {
	return h.tell(ctx, slices.DeleteFunc(slices.Clone(h.announced), func(a subnet) bool { return a == s }))
}

func (h *host) tell(ctx context.Context, subnets []subnet) error {
	var prefixes []netip.Prefix
	for _, s := range subnets {
		for family := range families {
			prefixes = append(prefixes, s.prefix(family))
		}
	}
	if err := h.router.announce(ctx, prefixes); err != nil {
		return fmt.Errorf("tell the router of %s: %w", h.name, err)
	}
	h.announced = subnets
	return nil
}

// via returns the hosts that the agent sends to what is for a subnet, in order; nil if it has no route or an on-link one.
func (h *host) via(s subnet, family int) []netip.Addr {
	gateways, _ := h.agent.dev.RoutesFor(s.door(family).Addr())
	var addrs []netip.Addr
	for i := range gateways.Len() {
		addrs = append(addrs, gateways.At(i).Addr)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// awaitVia waits until all those hosts' agents send what is for a subnet to these hosts and no others.
func awaitVia(ctx context.Context, s subnet, to []*host, from []*host) error {
	for _, h := range from {
		for family := range families {
			var want, got []netip.Addr
			for _, gateway := range to {
				want = append(want, gateway.networks[family].Addr())
			}
			err := await(ctx, fmt.Sprintf("%s to send what is for %v to %v", h.name, s.prefix(family), want), func() (bool, error) {
				got = h.via(s, family)
				return slices.Equal(got, want), nil
			})
			if err != nil {
				return fmt.Errorf("%w: it sends to %v\nits router's last words:\n%s", err, got, h.router.log())
			}
		}
	}
	return nil
}

// close ends what the host has; the router first, so that its routes go in good order.
func (h *host) close() error {
	var errs []error
	if h.router != nil {
		errs = append(errs, h.router.stop())
	}
	for _, doors := range h.doors {
		for _, door := range doors {
			errs = append(errs, door.Close())
		}
	}
	h.serving.Wait()
	if h.agent != nil {
		errs = append(errs, h.agent.Close())
	}
	if h.ns != nil {
		errs = append(errs, h.ns.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close %s: %w", h.name, err)
	}
	return nil
}

// mesh is all that the program builds.
type mesh struct {
	brand    *brand
	underlay *stage.Underlay
	hosts    []*host
}

// newMesh builds n hosts, starts their agents, and gives each its subnet. The caller closes the mesh.
func newMesh(ctx context.Context, n int, b *brand) (_ *mesh, err error) {
	if err := unix.Mount("bgpmesh", arena, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755"); err != nil {
		return nil, fmt.Errorf("a %s of our own: %w", arena, err)
	}
	if err := b.prepare(); err != nil {
		return nil, fmt.Errorf("make room for %s: %w", b.name, err)
	}
	m := &mesh{brand: b}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	if m.underlay, err = stage.NewUnderlay(); err != nil {
		return nil, err
	}
	peers := make(map[netip.Addr]netip.AddrPort)
	for i := range n {
		h, err := newHost(byte(i + 1))
		if err != nil {
			return nil, err
		}
		m.hosts = append(m.hosts, h)
		if err := errors.Join(ctx.Err(), m.underlay.Join(h.name, h.ns, h.underlay.Addr())); err != nil {
			return nil, fmt.Errorf("join %s to the underlay: %w", h.name, err)
		}
		for _, network := range h.networks {
			peers[network.Addr()] = h.underlay
		}
	}
	for _, h := range m.hosts {
		if err := errors.Join(ctx.Err(), h.startAgent(peers)); err != nil {
			return nil, fmt.Errorf("start the agent of %s: %w", h.name, err)
		}
		if err := h.settle(subnet(h.number)); err != nil {
			return nil, fmt.Errorf("settle %v on %s: %w", subnet(h.number), h.name, err)
		}
	}
	return m, nil
}

// clients are the hosts that look on while the last two do something.
func (m *mesh) clients() []*host       { return m.hosts[:len(m.hosts)-2] }
func (m *mesh) last() (one, two *host) { return m.hosts[len(m.hosts)-2], m.hosts[len(m.hosts)-1] }
func (m *mesh) others(but *host) []*host {
	return slices.DeleteFunc(slices.Clone(m.hosts), func(h *host) bool { return h == but })
}

// each does something to all hosts at once.
func (m *mesh) each(do func(h *host) error) error {
	errs := make([]error, len(m.hosts))
	var doing sync.WaitGroup
	for i, h := range m.hosts {
		doing.Go(func() { errs[i] = do(h) })
	}
	doing.Wait()
	return errors.Join(errs...)
}

func (m *mesh) close() error {
	err := m.each((*host).close)
	if m.underlay != nil {
		err = errors.Join(err, m.underlay.Close())
	}
	return err
}

// describe prints all there is to know: -v.
func (m *mesh) describe() string {
	var text strings.Builder
	indent := func(title, body string) {
		fmt.Fprintf(&text, "\n%s\n  %s\n", title, strings.ReplaceAll(strings.TrimSpace(body), "\n", "\n  "))
	}
	indent("the router of host1", m.hosts[0].router.config())
	for _, h := range m.hosts {
		indent(h.name, h.agent.dev.State().String())
	}
	return text.String()
}
