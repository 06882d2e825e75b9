package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"

	"example.com/overlay"
	"github.com/gaissmai/bart"
)

const (
	waySlices = "Table of slices"
	wayTable  = "bart.Table"
	wayFast   = "bart.Fast"

	lookupTime  = "a lookup"
	nextHopTime = "a packet"
	allocations = "allocations"

	million = 1_000_000
)

// lookupCases: which gateways lead to a destination that is drawn inside the routes. bart.Table and bart.Fast hold a pointer for
// each route and do nothing but find it: the floor. A Table of slices is how nebula keeps its routes.
func lookupCases() []benchCase {
	var cases []benchCase
	for _, version := range []int{4, 6} {
		for _, routes := range []int{10, 1_000, 100_000, million} {
			cases = append(cases, lookupCase(version, routes))
		}
	}
	for _, version := range []int{4, 6} {
		cases = append(cases, nextHopCase(version))
	}
	return append(cases, busyLookupCase())
}

func lookupCase(version, routes int) benchCase {
	c := benchCase{
		name:    fmt.Sprintf("RoutesFor, %s of IPv%d", thousands(routes), version),
		what:    "Lookups a second of one goroutine, for destinations drawn inside routes with the internet's prefix lengths; each sample is a median of laps of 64.",
		quick:   version == 4 && routes == 100_000,
		ways:    []string{ours, waySlices, wayTable, wayFast},
		metrics: []metric{{lookupTime, "M/s", 2}, {allocations, "", 0}},
		budgets: []budget{atMost(allocations, "", 0)},
		open:    openLookup(lookupArgs{Version: version, Routes: routes}),
	}
	c.moreRounds = 2
	if routes == million {
		c.budgets = append(c.budgets, atLeast(lookupTime, waySlices, 1.5))
	}
	return c
}

func nextHopCase(version int) benchCase {
	return benchCase{
		name:       fmt.Sprintf("NextHop, %s of IPv%d", thousands(million), version),
		what:       "Packets, just written to memory, for which one goroutine finds the next hop in a second, routes with one gateway each; the peer reads the destination and takes the first of the list.",
		ways:       []string{ours, waySlices},
		metrics:    []metric{{nextHopTime, "M/s", 2}, {allocations, "", 0}},
		budgets:    []budget{atLeast(nextHopTime, waySlices, 1.5), atMost(allocations, "", 0)},
		moreRounds: 2,
		open:       openLookup(lookupArgs{Version: version, Routes: million, Packets: true}),
	}
}

func thousands(n int) string {
	switch {
	case n >= million:
		return fmt.Sprintf("%d,%03d,%03d routes", n/million, n/1000%1000, n%1000)
	case n >= 1000:
		return fmt.Sprintf("%d,%03d routes", n/1000, n%1000)
	}
	return fmt.Sprintf("%d routes", n)
}

// openLookup keeps all the structures in one child, so that their laps take turns within moments.
func openLookup(args lookupArgs) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		args.Ways = c.ways
		child, err := startChild("lookup", args)
		if err != nil {
			return nil, err
		}
		return &session{close: child.close, sample: func(way, _ int) ([]float64, error) {
			var s lapSample
			err := child.ask(c.ways[way], &s)
			values := []float64{1e3 / s.Nanoseconds, s.Allocations}
			if c.ways[way] != ours {
				values = values[:1]
			}
			return values, err
		}}, nil
	}
}

type lookupArgs struct {
	Ways            []string
	Version, Routes int
	Packets         bool // NextHop
}

// lookups are the same routes in all structures, and where to.
type lookups struct {
	find    map[string]func(i int) bool
	to      []netip.Addr
	packets [lap][]byte // as a batch that was just read, in the processor's cache
}

// arrive writes the packets to the destinations from the i-th on.
func (l *lookups) arrive(i int) {
	for k := range l.packets {
		putUDP(l.packets[k], l.to[i+k])
	}
}

func lookupRole(text []byte) (func(string) (any, error), error) {
	var args lookupArgs
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, err
	}
	l, err := newLookups(args)
	if err != nil {
		return nil, err
	}
	return func(way string) (any, error) {
		if l.find[way] == nil {
			return nil, fmt.Errorf("no lookup is called %q", way)
		}
		var before func(int)
		if args.Packets {
			before = l.arrive
		}
		return timeLaps(len(l.to), before, l.find[way])
	}, nil
}

func newLookups(args lookupArgs) (*lookups, error) {
	n := newInternet(args.Version, 1)
	prefixes := n.prefixes(args.Routes)
	l := &lookups{find: map[string]func(int) bool{}}
	l.to = make([]netip.Addr, 1<<18)
	for i := range l.to {
		l.to[i] = n.inside(prefixes[n.random.IntN(len(prefixes))])
	}
	for k := range l.packets {
		l.packets[k] = make([]byte, udpLen(args.Version))
	}
	for _, way := range args.Ways {
		find, err := l.findIn(way, args, prefixes)
		if err != nil {
			return nil, err
		}
		l.find[way] = find
	}
	runtime.GC()
	return l, nil
}

// findIn puts the routes into the structure of a way and returns what looks up the i-th destination or packet.
func (l *lookups) findIn(way string, args lookupArgs, prefixes []netip.Prefix) (func(i int) bool, error) {
	via := func(i int) []overlay.Gateway { return []overlay.Gateway{{Addr: gateway(args.Version, i)}} }
	switch way {
	case ours:
		d, err := idleDevice(prefixes, via)
		if err != nil {
			return nil, err
		}
		if args.Packets {
			return func(i int) bool { _, ok := d.NextHop(l.packets[i%lap], nil); return ok }, nil
		}
		return func(i int) bool { _, ok := d.RoutesFor(l.to[i]); return ok }, nil
	case waySlices:
		t := new(bart.Table[[]overlay.Gateway])
		for i, p := range prefixes {
			t.Insert(p, via(i))
		}
		if args.Packets {
			return func(i int) bool {
				g, ok := t.Lookup(destination(l.packets[i%lap]))
				return ok && g[0].Addr.IsValid()
			}, nil
		}
		return func(i int) bool { _, ok := t.Lookup(l.to[i]); return ok }, nil
	case wayTable:
		t := new(bart.Table[*netip.Prefix])
		for i := range prefixes {
			t.Insert(prefixes[i], &prefixes[i%64%len(prefixes)])
		}
		return func(i int) bool { _, ok := t.Lookup(l.to[i]); return ok }, nil
	case wayFast:
		t := new(bart.Fast[*netip.Prefix])
		for i := range prefixes {
			t.Insert(prefixes[i], &prefixes[i%64%len(prefixes)])
		}
		return func(i int) bool { _, ok := t.Lookup(l.to[i]); return ok }, nil
	}
	return nil, fmt.Errorf("no lookup is called %q", way)
}

// idleDevice is a device without a kernel part that has the routes in its Config.
func idleDevice(prefixes []netip.Prefix, via func(i int) []overlay.Gateway) (overlay.Device, error) {
	shared := make([][]overlay.Gateway, min(64, len(prefixes)))
	for i := range shared {
		shared[i] = via(i)
	}
	cfg := overlay.Config{Disabled: true, Networks: overlayNetworks(), Routes: make([]overlay.Route, len(prefixes))}
	for i, p := range prefixes {
		cfg.Routes[i] = overlay.Route{Prefix: p, Via: shared[i%len(shared)]}
	}
	return overlay.New(cfg)
}

// destination reads a packet's, as every program on a TUN device must.
func destination(packet []byte) netip.Addr {
	if packet[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(packet[16:20]))
	}
	return netip.AddrFrom16([16]byte(packet[24:40]))
}

// udpLen is the length of a UDP packet without payload.
func udpLen(version int) int {
	if version == 4 {
		return 28
	}
	return 48
}

// putUDP makes p, which has the length for it, a UDP packet without payload to an address.
func putUDP(p []byte, dst netip.Addr) {
	clear(p)
	if dst.Is4() {
		src, to := gateway(4, 0).As4(), dst.As4()
		p[0], p[3], p[8], p[9] = 0x45, 28, 64, 17
		copy(p[12:], src[:])
		copy(p[16:], to[:])
	} else {
		src, to := gateway(6, 0).As16(), dst.As16()
		p[0], p[5], p[6], p[7] = 6<<4, 8, 17, 64
		copy(p[8:], src[:])
		copy(p[24:], to[:])
	}
	udp := p[len(p)-8:]
	a := dst.As16()
	udp[0], udp[1], udp[2], udp[3], udp[5] = a[14], a[15], 0, 53, 8
}
