package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"time"

	"example.com/overlay"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	wayReplace = "RouteReplace"
	wayBatch   = "ip -batch"
	wayRaw     = "raw rtnetlink"

	installed = "installed"
)

// installCases: routes through a new device into the kernel's main table, each with MTU and MSS.
func installCases() []benchCase {
	var cases []benchCase
	for _, version := range []int{4, 6} {
		for _, routes := range []int{1_000, 10_000, 100_000} {
			c := benchCase{
				name:    fmt.Sprintf("%s of IPv%d", thousands(routes), version),
				what:    "Routes a second by a Reload from none to all of them, its reading, comparing and asking included; by netlink.RouteReplace one by one, as nebula does; by ip -batch, its start included; and by messages made in place, 250 a send.",
				quick:   version == 4 && routes == 10_000,
				kernel:  true,
				ways:    []string{ours, wayReplace, wayBatch, wayRaw},
				metrics: []metric{{installed, "k/s", 1}},
				open:    openInstall(newInternet(version, 1).prefixes(routes)),
			}
			if routes == 100_000 {
				c.budgets = []budget{atLeast(installed, wayReplace, 8), atLeast(installed, wayBatch, 3), atLeast(installed, wayRaw, 0.9)}
			}
			cases = append(cases, c)
		}
	}
	return cases
}

func openInstall(prefixes []netip.Prefix) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		return &session{close: func() {}, sample: func(way, _ int) ([]float64, error) {
			took, err := installBy(c.ways[way], prefixes)
			return []float64{float64(len(prefixes)) / float64(took) * 1e6}, err
		}}, nil
	}
}

// installBy takes the time of one way in a namespace of its own, which goes with the routes.
func installBy(way string, prefixes []netip.Prefix) (time.Duration, error) {
	s, err := newSpace()
	if err != nil {
		return 0, err
	}
	defer s.close()
	if way == ours {
		return installByReload(s, prefixes)
	}
	tun, err := s.openTun(relayName, false, false)
	if err != nil {
		return 0, err
	}
	defer tun.Close()
	if err := s.configure(relayName, relayMTU, relayAddrs(false)); err != nil {
		return 0, err
	}
	switch way {
	case wayReplace:
		return replaceRoutes(s, prefixes)
	case wayBatch:
		return batchRoutes(s, prefixes)
	}
	return rawInstall(s, prefixes)
}

func installByReload(s *space, prefixes []netip.Prefix) (time.Duration, error) {
	cfg := overlay.Config{Name: relayName, NetNS: s.path(), Networks: relayAddrs(false)}
	d, err := overlay.New(cfg)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	if err := d.Activate(); err != nil {
		return 0, err
	}
	cfg.Routes = onLink(prefixes)
	start := time.Now()
	err = d.Reload(cfg)
	return time.Since(start), err
}

func onLink(prefixes []netip.Prefix) []overlay.Route {
	routes := make([]overlay.Route, len(prefixes))
	for i, p := range prefixes {
		routes[i].Prefix = p
	}
	return routes
}

func replaceRoutes(s *space, prefixes []netip.Prefix) (took time.Duration, err error) {
	err = s.do(func() error {
		link, err := netlink.LinkByName(relayName)
		if err != nil {
			return err
		}
		start := time.Now()
		for _, p := range prefixes {
			r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(p), MTU: relayMTU, AdvMSS: relayMTU - 40, Scope: unix.RT_SCOPE_LINK}
			if err := netlink.RouteReplace(r); err != nil {
				return err
			}
		}
		took = time.Since(start)
		return nil
	})
	return took, err
}

func batchRoutes(s *space, prefixes []netip.Prefix) (took time.Duration, err error) {
	var lines bytes.Buffer
	for _, p := range prefixes {
		scope := "scope link"
		if p.Addr().Is6() {
			scope = ""
		}
		fmt.Fprintf(&lines, "route add %v dev %s %s mtu %d advmss %d\n", p, relayName, scope, relayMTU, relayMTU-40)
	}
	cmd := exec.Command("ip", "-batch", "-")
	if errors.Is(cmd.Err, exec.ErrNotFound) { // an ordinary user's PATH may not lead there
		for _, path := range []string{"/usr/sbin/ip", "/sbin/ip"} {
			if _, err := os.Stat(path); err == nil {
				cmd = exec.Command(path, "-batch", "-")
				break
			}
		}
	}
	cmd.Stdin = &lines
	err = s.do(func() error {
		start := time.Now()
		out, err := cmd.CombinedOutput()
		took = time.Since(start)
		if err != nil {
			return fmt.Errorf("ip -batch: %w: %s", err, out[:min(len(out), 500)])
		}
		return nil
	})
	return took, err
}

func rawInstall(s *space, prefixes []netip.Prefix) (time.Duration, error) {
	raw, err := newRawRoutes(s, relayName)
	if err != nil {
		return 0, err
	}
	defer raw.close()
	start := time.Now()
	routes := make([]rawRoute, len(prefixes))
	for i, p := range prefixes {
		routes[i] = rawRoute{prefix: p, protocol: unix.RTPROT_STATIC, mtu: relayMTU}
	}
	err = raw.do(routes)
	return time.Since(start), err
}
