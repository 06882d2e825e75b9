package fib

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// lab is a namespace with two TUN devices, a Table that follows one of them as the watch does, and the means to change the
// kernel's routes.
type lab struct {
	ns          *nstest.NS
	ctl         *rtnl.Conn
	listener    *rtnl.Listener
	t           *Table
	ours, other int32
	nextHops    map[uint32]kernel.NextHop // of the last dump: the oracle's own view
	scratch     kernel.FIBRoute
	log         []string

	heard, filtered, resyncs, asked int
}

// Networks and addresses of the lab. Gateways in the first two are overlay hosts.
var (
	net4, net6 = netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")
	own4, own6 = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
)

func labOverlay(a netip.Addr) bool {
	return (net4.Contains(a) || net6.Contains(a)) && a != own4 && a != own6
}

const markerID = 1 << 30

func newLab(t *testing.T, tables ...uint32) *lab {
	t.Helper()
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	l := &lab{ns: nstest.New(t)}
	l.ns.OtherTun(t, "ours")
	l.ns.OtherTun(t, "other")
	l.ns.Do(t, func() {
		var err error
		if l.ctl, err = rtnl.Dial(); err != nil {
			t.Fatal(err)
		}
		l.listener, err = rtnl.Listen(16<<20, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP)
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { l.ctl.Close(); l.listener.Close() })
	for name, index := range map[string]*int32{"ours": &l.ours, "other": &l.other} {
		link, err := rtnl.DecodeLink(l.do(t, rtnl.GetLinkByName(name)).Answers[0])
		if err != nil {
			t.Fatal(err)
		}
		*index = int32(link.Index)
	}
	l.addresses(t)
	l.t = New(Config{Link: l.ours, Protocol: ourProto, Tables: tables, Overlay: labOverlay})
	l.resync(t, true)
	return l
}

// addresses gives the devices theirs, if they have lost them.
func (l *lab) addresses(t *testing.T) {
	t.Helper()
	for _, a := range []string{"10.0.0.1/24 dev ours", "10.0.1.1/24 dev other", "fd00::1/64 dev ours nodad", "fd01::1/64 dev other nodad"} {
		l.ns.Run(t, "ip address replace "+a)
	}
}

// do carries out requests, each of which must succeed, and returns the last one's result.
func (l *lab) do(t *testing.T, requests ...rtnl.Message) rtnl.Result {
	t.Helper()
	results := l.ctl.Do(requests...)
	for i, r := range results {
		if r.Err != nil {
			t.Fatalf("request %d of %d: %v", i, len(results), r.Err)
		}
	}
	return results[len(results)-1]
}

// sysctl writes a setting of the namespace below net/.
func (l *lab) sysctl(t *testing.T, name, value string) {
	t.Helper()
	l.ns.Do(t, func() {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	})
}

// hear feeds the Table with what has been announced up to now.
func (l *lab) hear(t *testing.T) {
	t.Helper()
	l.do(t, nextHopMessage(unix.RTM_NEWNEXTHOP, kernel.NextHop{ID: markerID, Blackhole: true}), nextHopMessage(unix.RTM_DELNEXTHOP, kernel.NextHop{ID: markerID}))
	for {
		if err := l.listener.Wait(); err != nil {
			t.Fatal(err)
		}
		messages, err := l.listener.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			if n, err := rtnl.DecodeNextHop(m); err == nil && isNextHop(m) && n.ID == markerID {
				if m.Type == unix.RTM_DELNEXTHOP {
					return
				}
				continue
			}
			l.feed(t, m)
		}
	}
}

func isNextHop(m rtnl.Message) bool {
	return m.Type == unix.RTM_NEWNEXTHOP || m.Type == unix.RTM_DELNEXTHOP
}

// feed is what the watch does with one announcement.
func (l *lab) feed(t *testing.T, m rtnl.Message) {
	l.heard++
	switch m.Type {
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		n, err := rtnl.DecodeNextHop(m)
		if err != nil {
			t.Fatalf("%v: %x", err, m.Body)
		}
		if m.Type == unix.RTM_DELNEXTHOP {
			l.t.DeleteNextHop(n.ID)
		} else {
			l.t.SetNextHop(n)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if !rtnl.MayConcern(m, l.ours) {
			l.filtered++
			return
		}
		if err := rtnl.DecodeFIBRoute(m, &l.scratch); err != nil {
			t.Fatalf("%v: %x", err, m.Body)
		}
		l.log = append(l.log, tell(rtnl.ChangeOf(m), l.scratch))
		l.t.Apply(rtnl.ChangeOf(m), &l.scratch)
	}
}

// resync dumps everything.
func (l *lab) resync(t *testing.T, quiet bool) {
	t.Helper()
	l.resyncs++
	l.readNextHops(t)
	var all []kernel.NextHop
	for _, n := range l.nextHops {
		all = append(all, n)
	}
	l.t.SetNextHops(all)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		is6 := family == unix.AF_INET6
		l.t.Begin(is6, true)
		for _, table := range l.t.cfg.Tables {
			for _, m := range l.dump(t, rtnl.GetFIB(family, table)) {
				if err := rtnl.DecodeFIBRoute(m, &l.scratch); err != nil {
					t.Fatalf("%v: %x", err, m.Body)
				}
				l.t.Dumped(&l.scratch)
			}
		}
		l.t.End(is6, quiet)
	}
	l.log = append(l.log, "resync")
}

func (l *lab) dump(t *testing.T, request rtnl.Message) []rtnl.Message {
	t.Helper()
	messages, err := l.ctl.Dump(request)
	if err != nil && !errors.Is(err, unix.ENOENT) { // a table without routes
		t.Fatal(err)
	}
	return messages
}

// readNextHops notes all nexthop objects.
func (l *lab) readNextHops(t *testing.T) {
	t.Helper()
	l.nextHops = make(map[uint32]kernel.NextHop)
	for _, m := range l.dump(t, rtnl.GetNextHops()) {
		n, err := rtnl.DecodeNextHop(m)
		if err != nil {
			t.Fatal(err)
		}
		l.nextHops[n.ID] = n
	}
}

// quiet hears what was announced and settles what follows from it, as the watch does.
func (l *lab) quiet(t *testing.T) {
	t.Helper()
	l.hear(t)
	for _, id := range l.t.MissingNextHops() {
		if r := l.ctl.Do(rtnl.GetNextHop(id))[0]; r.Err == nil && len(r.Answers) == 1 {
			l.feed(t, r.Answers[0])
		}
	}
	resynced := false
	for round := 0; ; round++ {
		if l.t.ResyncNeeded() && !resynced {
			l.resync(t, true)
			resynced = true
		}
		doubts := l.t.Doubts(round == 0)
		if len(doubts) == 0 {
			return
		}
		if round > 20 {
			t.Fatalf("still doubtful: %v", doubts)
		}
		for _, p := range doubts {
			l.settle(t, p)
		}
	}
}

func (l *lab) settle(t *testing.T, p netip.Prefix) {
	var after netip.Prefix
	for try := range 10 {
		addr, ok := Probe(p, after, l.longest)
		if !ok {
			return
		}
		l.asked++
		result := l.ctl.Do(rtnl.MatchRoute(addr))[0]
		l.log = append(l.log, fmt.Sprintf("asked about %v by %v: %v", p, addr, result.Err))
		if errors.Is(result.Err, unix.ENETUNREACH) {
			if after = l.t.Settle(p, addr, nil); !after.IsValid() {
				return
			}
			continue
		}
		if result.Err != nil || len(result.Answers) != 1 {
			after = l.t.Unanswered(p, addr, try)
			continue
		}
		var got kernel.FIBRoute
		if err := rtnl.DecodeFIBRoute(result.Answers[0], &got); err != nil {
			t.Fatal(err)
		}
		l.log = append(l.log, tell(kernel.Refreshed, got)+" was the answer about "+p.String()+" ")
		if after = l.t.Settle(p, addr, &got); !after.IsValid() {
			return
		}
	}
}

func (l *lab) longest(dst netip.Addr) (netip.Prefix, bool) {
	for bits := dst.BitLen(); bits >= 0; bits-- {
		p, _ := dst.Prefix(bits)
		if l.t.Answer(p).Kind != Absent {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, (4-len(value)%4)%4)...)
}

func word(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func nextHopMessage(kind uint16, n kernel.NextHop) rtnl.Message {
	b := make([]byte, 8)
	switch {
	case kind == unix.RTM_DELNEXTHOP:
	case n.Gateway.Is6():
		b[0] = unix.AF_INET6
	case n.Gateway.Is4() || n.Blackhole || n.Link != 0:
		b[0] = unix.AF_INET
	}
	b = attribute(b, unix.NHA_ID, word(n.ID))
	if n.Link != 0 {
		b = attribute(b, unix.NHA_OIF, word(uint32(n.Link)))
	}
	if n.Gateway.IsValid() {
		b = attribute(b, unix.NHA_GATEWAY, n.Gateway.AsSlice())
	}
	if n.Blackhole {
		b = attribute(b, unix.NHA_BLACKHOLE, nil)
	}
	if len(n.Group) > 0 {
		var group []byte
		for _, leg := range n.Group {
			w := leg.Weight - 1
			group = append(append(group, word(leg.ID)...), byte(w), byte(w>>8), 0, 0)
		}
		b = attribute(b, unix.NHA_GROUP, group)
	}
	return rtnl.Message{Type: kind, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: b}
}

// flags of a request by op.
var opFlags = [...]uint16{
	opCreate:  unix.NLM_F_CREATE | unix.NLM_F_EXCL,
	opPrepend: unix.NLM_F_CREATE,
	opAppend:  unix.NLM_F_CREATE | unix.NLM_F_APPEND,
	opReplace: unix.NLM_F_CREATE | unix.NLM_F_REPLACE,
}

// routeMessage asks for a route. A deletion names what the route has.
func routeMessage(kind, flags uint16, r kernel.FIBRoute) rtnl.Message {
	h := make([]byte, unix.SizeofRtMsg)
	h[0], h[1], h[3], h[5], h[7] = unix.AF_INET6, byte(r.Prefix.Bits()), r.TOS, r.Protocol, r.Type
	if r.Prefix.Addr().Is4() {
		h[0] = unix.AF_INET
		switch {
		case kind == unix.RTM_DELROUTE:
			h[6] = unix.RT_SCOPE_NOWHERE
		case len(r.Legs) > 0 && !slices.ContainsFunc(r.Legs, func(leg kernel.Leg) bool { return leg.Gateway.IsValid() }):
			h[6] = unix.RT_SCOPE_LINK
		}
	}
	b := attribute(h, unix.RTA_DST, r.Prefix.Addr().AsSlice())
	b = attribute(attribute(b, unix.RTA_TABLE, word(r.Table)), unix.RTA_PRIORITY, word(r.Metric))
	b = append(b, r.Detail...)
	if r.Pref != 0 {
		b = attribute(b, unix.RTA_PREF, []byte{r.Pref})
	}
	switch {
	case r.NextHop != 0:
		b = attribute(b, 30, word(r.NextHop))
	case len(r.Legs) == 1:
		leg := r.Legs[0]
		b = gateway(attribute(b, unix.RTA_OIF, word(uint32(leg.Link))), h[0], leg.Gateway)
		if !labOverlay(leg.Gateway) && leg.Gateway.IsValid() {
			b[8] |= unix.RTNH_F_ONLINK
		}
	case len(r.Legs) > 1:
		b = attribute(b, unix.RTA_MULTIPATH, legsAttribute(h[0], r.Legs))
	}
	return rtnl.Message{Type: kind, Flags: flags, Body: b}
}

func legsAttribute(family byte, legs []kernel.Leg) []byte {
	var all []byte
	for _, leg := range legs {
		rest := gateway(nil, family, leg.Gateway)
		flags := byte(0)
		if !labOverlay(leg.Gateway) && leg.Gateway.IsValid() {
			flags = unix.RTNH_F_ONLINK
		}
		all = binary.NativeEndian.AppendUint16(all, uint16(8+len(rest)))
		all = append(append(append(all, flags, byte(leg.Weight-1)), word(uint32(leg.Link))...), rest...)
	}
	return all
}

func gateway(b []byte, family byte, a netip.Addr) []byte {
	switch {
	case !a.IsValid():
		return b
	case family == unix.AF_INET && a.Is6():
		return attribute(b, unix.RTA_VIA, append(binary.NativeEndian.AppendUint16(nil, unix.AF_INET6), a.AsSlice()...))
	}
	return attribute(b, unix.RTA_GATEWAY, a.AsSlice())
}
