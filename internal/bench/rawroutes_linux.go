package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// rawRoute is a route as raw rtnetlink puts it into the main table.
type rawRoute struct {
	prefix   netip.Prefix
	gateway  netip.Addr // none: on-link
	protocol byte
	mtu      uint32 // with what follows from it; 0: neither
	gone     bool   // take it out
}

// rawRoutes is the least that a program can do: messages made in place, many a send, one acknowledgement for them all.
type rawRoutes struct {
	fd    int
	index uint32 // of the link
	out   []byte
	in    [1 << 16]byte
}

func newRawRoutes(s *space, link string) (*rawRoutes, error) {
	r := &rawRoutes{fd: -1}
	err := s.do(func() error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		r.index = uint32(l.Index)
		r.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("raw rtnetlink: %w", err)
	}
	return r, nil
}

func (r *rawRoutes) close() { unix.Close(r.fd) }

// do carries out all of them, 250 a send: as fast as more, and what fits the buffers by default.
func (r *rawRoutes) do(routes []rawRoute) error {
	to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for len(routes) > 0 {
		batch := routes[:min(250, len(routes))]
		routes = routes[len(batch):]
		r.out = r.out[:0]
		for i := range batch {
			r.append(&batch[i], i == len(batch)-1)
		}
		if err := unix.Sendto(r.fd, r.out, 0, to); err != nil {
			return fmt.Errorf("send routes: %w", err)
		}
		n, _, err := unix.Recvfrom(r.fd, r.in[:], 0)
		if err != nil {
			return fmt.Errorf("routes: %w", err)
		}
		if n < 20 || binary.NativeEndian.Uint16(r.in[4:]) != unix.NLMSG_ERROR {
			return fmt.Errorf("routes: an answer of %d bytes", n)
		}
		if errno := int32(binary.NativeEndian.Uint32(r.in[16:])); errno != 0 {
			return fmt.Errorf("routes: %w", unix.Errno(-errno))
		}
	}
	return nil
}

func (r *rawRoutes) append(route *rawRoute, last bool) {
	n := binary.NativeEndian
	start := len(r.out)
	kind, flags := uint16(unix.RTM_NEWROUTE), uint16(unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	if route.gone {
		kind, flags = unix.RTM_DELROUTE, unix.NLM_F_REQUEST
	}
	if last {
		flags |= unix.NLM_F_ACK
	}
	r.out = append(r.out, 0, 0, 0, 0)
	r.out = n.AppendUint16(n.AppendUint16(r.out, kind), flags)
	r.out = append(r.out, 0, 0, 0, 0, 0, 0, 0, 0)
	family, scope := byte(unix.AF_INET), byte(unix.RT_SCOPE_UNIVERSE)
	addr := route.prefix.Addr()
	if addr.Is6() {
		family = unix.AF_INET6
	} else if !route.gateway.IsValid() {
		scope = unix.RT_SCOPE_LINK
	}
	r.out = append(r.out, family, byte(route.prefix.Bits()), 0, 0, unix.RT_TABLE_MAIN, route.protocol, scope, unix.RTN_UNICAST, 0, 0, 0, 0)
	r.attribute(unix.RTA_DST, addr.AsSlice())
	r.number(unix.RTA_OIF, r.index)
	if route.gateway.IsValid() {
		r.attribute(unix.RTA_GATEWAY, route.gateway.AsSlice())
	}
	if route.mtu != 0 {
		r.out = n.AppendUint16(n.AppendUint16(r.out, 20), unix.RTA_METRICS)
		r.number(unix.RTAX_MTU, route.mtu)
		r.number(unix.RTAX_ADVMSS, route.mtu-40)
	}
	n.PutUint32(r.out[start:], uint32(len(r.out)-start))
}

// attribute appends a value whose length is a multiple of four.
func (r *rawRoutes) attribute(kind uint16, value []byte) {
	n := binary.NativeEndian
	r.out = append(n.AppendUint16(n.AppendUint16(r.out, uint16(4+len(value))), kind), value...)
}

func (r *rawRoutes) number(kind uint16, value uint32) {
	r.attribute(kind, binary.NativeEndian.AppendUint32(nil, value))
}
