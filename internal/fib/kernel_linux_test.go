package fib

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/nstest/oracle"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// lab is a namespace with two TUN devices, a Table that follows one of them as the watch does, and the means to change the
// kernel's routes.
type lab struct {
	oracle.World
	ns       *nstest.NS
	listener *rtnl.Listener
	t        *Table
	scratch  kernel.FIBRoute
	log      []string

	heard, filtered, resyncs, asked int
}

const markerID = 1 << 30

func newLab(t *testing.T, tables ...uint32) *lab {
	t.Helper()
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	l := &lab{ns: nstest.New(t), World: oracle.World{Protocol: ourProto, Tables: tables}}
	l.ns.OtherTun(t, "ours")
	l.ns.OtherTun(t, "other")
	l.ns.Do(t, func() {
		var err error
		if l.Conn, err = rtnl.Dial(); err != nil {
			t.Fatal(err)
		}
		l.listener, err = rtnl.Listen(16<<20, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP)
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { l.Conn.Close(); l.listener.Close() })
	for name, index := range map[string]*int32{"ours": &l.Ours, "other": &l.Other} {
		link, err := rtnl.DecodeLink(l.do(t, rtnl.GetLinkByName(name)).Answers[0])
		if err != nil {
			t.Fatal(err)
		}
		*index = int32(link.Index)
	}
	l.addresses(t)
	l.t = New(Config{Link: l.Ours, Protocol: ourProto, Tables: tables, Overlay: oracle.Overlay})
	l.resync(t, true)
	return l
}

// addresses gives the devices theirs, if they have lost them.
func (l *lab) addresses(t *testing.T) {
	t.Helper()
	for _, dev := range []string{"ours", "other"} {
		for _, a := range oracle.Addresses[dev] {
			l.ns.Run(t, "ip address replace "+a.String()+" dev "+dev+" nodad")
		}
	}
}

// do carries out requests, each of which must succeed, and returns the last one's result.
func (l *lab) do(t *testing.T, requests ...rtnl.Message) rtnl.Result {
	t.Helper()
	results := l.Conn.Do(requests...)
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
	l.do(t, oracle.NextHopMessage(unix.RTM_NEWNEXTHOP, kernel.NextHop{ID: markerID, Blackhole: true}), oracle.NextHopMessage(unix.RTM_DELNEXTHOP, kernel.NextHop{ID: markerID}))
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
		if !rtnl.MayConcern(m, l.Ours) {
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
	var all []kernel.NextHop
	for _, m := range l.dump(t, rtnl.GetNextHops()) {
		n, err := rtnl.DecodeNextHop(m)
		if err != nil {
			t.Fatal(err)
		}
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
	messages, err := l.Conn.Dump(request)
	if err != nil && !errors.Is(err, unix.ENOENT) { // a table without routes
		t.Fatal(err)
	}
	return messages
}

// quiet hears what was announced and settles what follows from it, as the watch does.
func (l *lab) quiet(t *testing.T) {
	t.Helper()
	l.hear(t)
	for _, id := range l.t.MissingNextHops() {
		if r := l.Conn.Do(rtnl.GetNextHop(id))[0]; r.Err == nil && len(r.Answers) == 1 {
			l.feed(t, r.Answers[0])
		}
	}
	resynced := false
	for round := 0; ; round++ {
		if l.t.ResyncNeeded(false) && !resynced {
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
		addr, ok := l.t.Probe(p, after)
		if !ok {
			return
		}
		l.asked++
		result := l.Conn.Do(rtnl.MatchRoute(addr))[0]
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

// opFlags are the flags of a request by op.
var opFlags = [...]uint16{opCreate: oracle.Create, opPrepend: oracle.Prepend, opAppend: oracle.Append, opReplace: oracle.Replace}
