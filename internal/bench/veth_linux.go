package main

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
)

// openVeths joins two namespaces by a third that forwards between two pairs of veth links, with the relay's addresses and MTU.
func openVeths() (*path, error) {
	spaces, err := newSpaces(3)
	if err != nil {
		return nil, err
	}
	p := &path{spaces: spaces}
	middle := spaces[2]
	for i := range 2 {
		gateways := []netip.Prefix{netip.MustParsePrefix("10.9.1.1/24"), netip.MustParsePrefix("fd09:1::1/64")}
		if i == 1 {
			gateways = []netip.Prefix{netip.MustParsePrefix("10.9.2.1/24"), netip.MustParsePrefix("fd09:2::1/64")}
		}
		if err = joinByVeth(spaces[i], middle, fmt.Sprintf("end%d", i), i == 1, gateways); err != nil {
			p.close()
			return nil, err
		}
	}
	err = middle.do(func() error {
		for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(path, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// joinByVeth gives the end its relay address as a host's, a network towards the middle, and routes by it to the other end.
func joinByVeth(end, middle *space, name string, second bool, gateways []netip.Prefix) error {
	const inner = "veth0"
	err := middle.netlink(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: inner, PeerNamespace: netlink.NsFd(int(end.file.Fd()))})
	})
	if err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	var own []netip.Prefix
	for i, addr := range relayAddrs(second) {
		own = append(own, netip.PrefixFrom(addr.Addr(), addr.Addr().BitLen()), netip.PrefixFrom(gateways[i].Addr().Next(), gateways[i].Bits()))
	}
	if err := middle.configure(name, relayMTU, gateways); err != nil {
		return err
	}
	if err := end.configure(inner, relayMTU, own); err != nil {
		return err
	}
	if err := routeByGateways(end, inner, relayAddrs(!second), gateways, relayAddrs(second)); err != nil {
		return err
	}
	back := []netip.Prefix{netip.PrefixFrom(gateways[0].Addr().Next(), 24), netip.PrefixFrom(gateways[1].Addr().Next(), 64)}
	return routeByGateways(middle, name, relayAddrs(second), back, nil)
}

// routeByGateways routes to hosts by gateways, from a source of one's own where there are any.
func routeByGateways(s *space, link string, hosts, gateways, sources []netip.Prefix) error {
	return s.netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(link)
		for i := 0; i < len(hosts) && err == nil; i++ {
			r := &netlink.Route{
				LinkIndex: l.Attrs().Index, Gw: gateways[i].Addr().AsSlice(),
				Dst: ipNet(netip.PrefixFrom(hosts[i].Addr(), hosts[i].Addr().BitLen())),
			}
			if sources != nil {
				r.Src = sources[i].Addr().AsSlice()
			}
			err = h.RouteAdd(r)
		}
		if err != nil {
			return fmt.Errorf("route through %s: %w", link, err)
		}
		return nil
	})
}
