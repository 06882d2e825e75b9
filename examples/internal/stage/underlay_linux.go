package stage

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// router is the underlay's own address, the same on all its links.
var router = netip.MustParseAddr("192.0.2.254")

// Underlay is a namespace that does nothing but forward IPv4 between hosts.
type Underlay struct{ ns *Namespace }

// NewUnderlay makes an underlay that nobody has joined. The caller closes it.
func NewUnderlay() (*Underlay, error) {
	ns, err := NewNamespace()
	if err != nil {
		return nil, err
	}
	return &Underlay{ns}, nil
}

// Close gives the underlay's namespace up; its links go with it.
func (u *Underlay) Close() error { return u.ns.Close() }

// Join connects a host to the underlay by a veth pair: eth0 in the host, a link of the host's name in the underlay.
func (u *Underlay) Join(name string, host *Namespace, addr netip.Addr) error {
	err := u.ns.Configure(func(k *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(host.fd)
		if err := k.LinkAdd(veth); err != nil {
			return fmt.Errorf("add a veth pair: %w", err)
		}
		link, err := SetUp(k, name, single(router))
		if err != nil {
			return err
		}
		return errors.Join(addRoute(k, link, single(addr), netip.Addr{}), forward(link))
	})
	if err != nil {
		return err
	}
	err = host.Configure(func(k *netlink.Handle) error {
		link, err := SetUp(k, "eth0", single(addr))
		if err != nil {
			return err
		}
		return errors.Join(addRoute(k, link, netip.MustParsePrefix("0.0.0.0/0"), router), awaitUp(k, link))
	})
	if err != nil {
		return err
	}
	return u.ns.Configure(func(k *netlink.Handle) error {
		link, err := k.LinkByName(name)
		if err != nil {
			return err
		}
		return awaitUp(k, link)
	})
}

func single(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }

// addRoute adds a route through a link, by a gateway on that link if there is one.
func addRoute(k *netlink.Handle, link netlink.Link, to netip.Prefix, gateway netip.Addr) error {
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: IPNet(to), Scope: netlink.SCOPE_LINK}
	if gateway.IsValid() {
		route.Gw, route.Scope, route.Flags = gateway.AsSlice(), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
	}
	if err := k.RouteAdd(route); err != nil {
		return fmt.Errorf("add route %v through %s: %w", to, link.Attrs().Name, err)
	}
	return nil
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
	return Await(fmt.Sprintf("link %s to be up", link.Attrs().Name), func() (bool, error) {
		now, err := k.LinkByIndex(link.Attrs().Index)
		return err == nil && now.Attrs().OperState == netlink.OperUp, err
	})
}
