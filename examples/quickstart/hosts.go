//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"example.com/overlay"
	"example.com/overlay/examples/internal/stage"

	"github.com/vishvananda/netlink"
)

// families are indices of what exists once for IPv4 and once for IPv6.
var families = [...]string{"IPv4", "IPv6"}

// shared is the subnet behind both gateways, as the address that each of them has in it.
var shared = [...]netip.Prefix{netip.MustParsePrefix("192.168.77.1/24"), netip.MustParsePrefix("fd77::1/64")}

// weights are the shares of the flows into shared that the gateways, the last hosts, are to get.
var weights = [...]int{3, 1}

// host is an overlay host: host7 is 192.0.2.7 on the underlay, 10.42.0.7 and fd42::7 on the overlay.
type host struct {
	name     string
	ns       *stage.Namespace
	underlay netip.AddrPort
	networks [len(families)]netip.Prefix
	agent    *agent
}

func newHost(number int) (*host, error) {
	ns, err := stage.NewNamespace()
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

// lab is all that the program builds: hosts around an underlay.
type lab struct {
	underlay *stage.Underlay
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
	if l.underlay, err = stage.NewUnderlay(); err != nil {
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
		if err := l.underlay.Join(h.name, h.ns, h.underlay.Addr()); err != nil {
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
	cfg := overlay.Config{Name: "overlay0", Networks: h.networks[:], NetNS: h.ns.Path()}
	gateway := false
	for _, g := range l.gateways() {
		gateway = gateway || g == h
	}
	if gateway {
		err := h.ns.Configure(func(k *netlink.Handle) error {
			_, err := stage.SetUp(k, "lo", shared[:]...)
			return err
		})
		if err != nil {
			return err
		}
	} else {
		cfg.Routes = l.sharedRoutes()
	}
	// A socket belongs to the namespace of the thread that makes it, and can then be used from anywhere.
	udp, err := h.ns.ListenUDP(h.underlay)
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
			if err := errors.Join(errs[i], h.ns.Close()); err != nil {
				errs[i] = fmt.Errorf("close %s: %w", h.name, err)
			}
		})
	}
	closing.Wait()
	if l.underlay != nil {
		errs[len(l.hosts)] = l.underlay.Close()
	}
	return errors.Join(errs...)
}
