package main

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/overlay"
	"github.com/slackhq/nebula/config"
	nebula "github.com/slackhq/nebula/overlay"
	"golang.org/x/sys/unix"
)

const (
	wayEqual = "equal Config"

	reloadTime = "a reload"
	messagesOf = "route messages"
)

// reloadKind is what one reload changes of many routes.
type reloadKind struct {
	name     string
	messages float64                       // that may change the kernel's table (design: law 5)
	change   func(r *overlay.Route, i int) // of the first route, or of all
	all      bool
}

var reloadKinds = []reloadKind{
	{name: "one MTU", messages: 2, change: func(r *overlay.Route, i int) { r.MTU = 1200 + i%2*50 }},
	{name: "one route's gateway", messages: 0, change: func(r *overlay.Route, i int) { r.Via = []overlay.Gateway{{Addr: gateway(4, 1+i%2)}} }},
	{name: "one more, one less", messages: 1, change: func(r *overlay.Route, i int) {
		if i%2 == 1 {
			r.Prefix = netip.Prefix{} // left out
		}
	}},
	{name: "all MTUs", change: func(r *overlay.Route, i int) { r.MTU = 1200 + i%2*50 }, all: true},
}

// reloadCases: a Reload of many routes, beside a Reload with an equal Config, which does nothing but read it.
func reloadCases() []benchCase {
	var cases []benchCase
	for _, routes := range []int{1_000, 100_000} {
		for i, kind := range reloadKinds {
			c := benchCase{
				name:    fmt.Sprintf("%s of %s", kind.name, thousands(routes)),
				what:    "The time of a Reload that changes this, beside one with an equal Config, and how many changes of routes the kernel announces meanwhile.",
				quick:   i == 0 && routes == 100_000,
				kernel:  true,
				ways:    []string{ours, wayEqual},
				metrics: []metric{{reloadTime, "ms", 2}, {messagesOf, "", 0}},
				open:    openReload(routes, kind),
			}
			c.moreRounds = 2
			if !kind.all {
				c.budgets = []budget{atMost(messagesOf, "", kind.messages)}
				if routes == 100_000 {
					c.budgets = append(c.budgets, atMost(reloadTime, wayEqual, 2))
				}
			} else {
				c.moreRounds = 1
			}
			cases = append(cases, c)
		}
	}
	return append(cases, nebulaReloadCase())
}

func openReload(routes int, kind reloadKind) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		s, err := newSpace()
		if err != nil {
			return nil, err
		}
		cfg := overlay.Config{Name: relayName, NetNS: s.path(), Networks: relayAddrs(false), MTU: relayMTU, Routes: viaGateways(routes)}
		d, err := overlay.New(cfg)
		if err != nil {
			s.close()
			return nil, err
		}
		closeAll := func() {
			d.Close()
			s.close()
		}
		if err := d.Activate(); err != nil {
			closeAll()
			return nil, err
		}
		turn := 0
		return &session{close: closeAll, sample: func(way, _ int) ([]float64, error) {
			next := cfg
			if turn++; c.ways[way] == ours {
				next.Routes = kind.apply(cfg.Routes, turn/2)
				cfg = next
			} else {
				next.Routes = slices.Clone(cfg.Routes)
			}
			return timedReload(s, func() error { return d.Reload(compact(next)) })
		}}, nil
	}
}

func (k reloadKind) apply(routes []overlay.Route, turn int) []overlay.Route {
	next := slices.Clone(routes)
	for i := range next {
		if i > 0 && !k.all {
			break
		}
		prefix := viaPrefix(i)
		next[i].Prefix = prefix
		k.change(&next[i], turn)
	}
	return next
}

// compact leaves out the first route where it has no prefix.
func compact(cfg overlay.Config) overlay.Config {
	if !cfg.Routes[0].Prefix.IsValid() {
		cfg.Routes = cfg.Routes[1:]
	}
	return cfg
}

func viaPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
}

func viaGateways(n int) []overlay.Route {
	routes := make([]overlay.Route, n)
	via := []overlay.Gateway{{Addr: gateway(4, 0)}}
	for i := range routes {
		routes[i] = overlay.Route{Prefix: viaPrefix(i), Via: via}
	}
	return routes
}

// timedReload returns the milliseconds of a reload and the route changes that the kernel announces.
func timedReload(s *space, reload func() error) ([]float64, error) {
	listener, err := listenRoutes(s)
	if err != nil {
		return nil, err
	}
	defer unix.Close(listener)
	start := time.Now()
	if err := reload(); err != nil {
		return nil, err
	}
	took := float64(time.Since(start)) / 1e6
	return []float64{took, float64(countMessages(listener))}, nil
}

// listenRoutes hears of every change of a route in the namespace.
func listenRoutes(s *space) (fd int, err error) {
	err = s.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		const groups = 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1)
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 256<<20)
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups})
	})
	if err != nil {
		return 0, os.NewSyscallError("listen to rtnetlink", err)
	}
	return fd, nil
}

func countMessages(fd int) (n int) {
	for b := make([]byte, 1<<16); ; n++ {
		if _, _, err := unix.Recvfrom(fd, b, 0); err != nil {
			return n
		}
	}
}

// nebulaReloadCase compares with nebula where it is feasible: its comparison of old and new routes is quadratic.
func nebulaReloadCase() benchCase {
	const routes = 1_000
	return benchCase{
		name:    "one MTU of " + thousands(routes) + ", beside nebula",
		what:    "The time of a Reload that changes the MTU of one route of 1,000, and of nebula's with the same in YAML, which it parses first.",
		kernel:  true,
		ways:    []string{ours, wayNebula},
		metrics: []metric{{reloadTime, "ms", 2}, {messagesOf, "", 0}},
		open: func(_ *options, c *benchCase) (*session, error) {
			mine, err := openReload(routes, reloadKinds[0])(nil, &benchCase{ways: []string{ours}})
			if err != nil {
				return nil, err
			}
			theirs, closeTheirs, err := openNebulaReload(routes)
			if err != nil {
				mine.close()
				return nil, err
			}
			return &session{
				sample: func(way, round int) ([]float64, error) {
					if c.ways[way] == ours {
						return mine.sample(0, round)
					}
					return theirs()
				},
				close: func() {
					mine.close()
					closeTheirs()
				},
			}, nil
		},
	}
}

func openNebulaReload(routes int) (sample func() ([]float64, error), closeAll func(), err error) {
	s, err := newSpace()
	if err != nil {
		return nil, nil, err
	}
	text := func(turn int) string {
		var b strings.Builder
		fmt.Fprintf(&b, "tun:\n  dev: %s\n  mtu: %d\n  unsafe_routes:\n", relayName, relayMTU)
		for i := range routes {
			mtu := relayMTU
			if i == 0 {
				mtu = 1200 + turn%2*50
			}
			fmt.Fprintf(&b, "    - route: %v\n      via: %v\n      mtu: %d\n", viaPrefix(i), gateway(4, 0), mtu)
		}
		return b.String()
	}
	c := config.NewC(silent)
	var d nebula.Device
	err = c.LoadString(text(0))
	if err == nil {
		err = s.do(func() (err error) {
			if d, err = nebula.NewDeviceFromConfig(c, silent, relayAddrs(false), 1); err == nil {
				err = d.Activate()
			}
			return err
		})
	}
	if err != nil {
		s.close()
		return nil, nil, err
	}
	turn := 0
	sample = func() ([]float64, error) {
		turn++
		next := text(turn)
		return timedReload(s, func() error { return s.do(func() error { return c.ReloadConfigString(next) }) })
	}
	return sample, func() {
		d.Close()
		s.close()
	}, nil
}
