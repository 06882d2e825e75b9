package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"example.com/overlay"
	"github.com/gaissmai/bart"
	nebula "github.com/slackhq/nebula/overlay"
	"github.com/slackhq/nebula/routing"
)

// followArgs is what a process that follows the kernel's routes is told. Its namespace, with the device, is descriptor 3.
type followArgs struct {
	Way    string
	Routes int // that there will be, as followed makes them
	Hosts  bool
}

// followed are the routes that others put into the kernel: the internet's, or single hosts.
func followed(n int, hosts bool) []netip.Prefix {
	if !hosts {
		return newInternet(4, 1).prefixes(n)
	}
	list := make([]netip.Prefix, n)
	for i := range list {
		list[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	return list
}

// follower is such a process: a device of the library or of nebula, or no more than a structure of routes.
type follower struct {
	prefixes []netip.Prefix
	to       []netip.Addr
	activate func() error
	knows    func(netip.Addr) bool
	overruns func() uint64
	keep     any
	raw      *rawRoutes // to the kernel of its namespace
}

func followRole(text []byte) (func(string) (any, error), error) {
	var args followArgs
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, err
	}
	f := &follower{prefixes: followed(args.Routes, args.Hosts), overruns: func() uint64 { return 0 }}
	n := newInternet(4, 2)
	for range min(1<<16, 64*len(f.prefixes)) {
		f.to = append(f.to, n.inside(f.prefixes[n.random.IntN(len(f.prefixes))]))
	}
	s := inherited(3)
	var err error
	switch args.Way {
	case ours:
		err = f.useOverlay(s)
	case wayNebula:
		err = f.useNebula(s)
	default:
		f.useTable()
		return f.obey, nil
	}
	if err == nil {
		f.raw, err = newRawRoutes(s, relayName)
	}
	return f.obey, err
}

func (f *follower) useOverlay(s *space) error {
	d, err := overlay.New(overlay.Config{
		Name: relayName, Mode: overlay.Attach, NetNS: s.path(), Networks: relayAddrs(false), SystemRoutes: &overlay.SystemRoutes{},
	})
	if err != nil {
		return err
	}
	f.keep, f.activate = d, d.Activate
	f.knows = func(a netip.Addr) bool { g, ok := d.RoutesFor(a); return ok && g.Len() > 0 }
	f.overruns = func() uint64 { return d.Stats().Overruns }
	return nil
}

// useNebula needs all threads to be in the namespace: nebula's watcher asks for the link by name from any of them.
func (f *follower) useNebula(s *space) error {
	var d nebula.Device
	err := s.do(func() (err error) {
		d, err = newNebula(map[string]any{"dev": relayName, "mtu": relayMTU, "use_system_route_table": true}, false, 1)
		return err
	})
	if err != nil {
		return err
	}
	f.keep, f.activate = d, func() error { return s.do(d.Activate) }
	f.knows = func(a netip.Addr) bool { return len(d.RoutesFor(a)) > 0 }
	return nil
}

// useTable keeps the routes as nebula does, without a device.
func (f *follower) useTable() {
	t := new(bart.Table[routing.Gateways])
	learned := make(map[netip.Prefix]routing.Gateways)
	f.activate = func() error {
		for i, p := range f.prefixes {
			via := routing.Gateways{routing.NewGateway(gateway(4, i), 1)}
			learned[p] = via
			t.Insert(p, via)
		}
		f.keep = []any{t, learned}
		return nil
	}
	f.knows = func(a netip.Addr) bool { _, ok := t.Lookup(a); return ok }
}

// measured is a follower's answer.
type measured struct {
	Took     time.Duration // of what was asked for
	Median   time.Duration
	Slow     time.Duration // the 99th percentile
	CPU      time.Duration // of the process so far
	Heap     int64         // bytes at rest
	Known    int
	Overruns uint64
	Lap      lapSample
}

func (f *follower) obey(command string) (any, error) {
	m := measured{}
	verb, rest, _ := strings.Cut(command, " ")
	start := time.Now()
	var err error
	switch verb {
	case "activate":
		err = f.activate()
	case "await": // ADDR: until a lookup finds it
		err = await(f.knows, netip.MustParseAddr(rest), true)
	case "count": // how many of the routes are known, by an address inside each
		for _, p := range f.prefixes {
			if f.knows(p.Addr()) {
				m.Known++
			}
		}
	case "heap":
		m.Heap = heapAtRest()
	case "lookup":
		m.Lap, err = timeLaps(len(f.to), nil, func(i int) bool { return f.knows(f.to[i]) })
	case "clone": // and insert
		m.Median = f.cloneAndInsert()
	case "changes": // N: until each is visible
		var n int
		if _, err = fmt.Sscan(rest, &n); err == nil {
			m.Median, m.Slow, err = f.changes(n)
		}
	case "usage":
	default:
		err = fmt.Errorf("unknown command %q", command)
	}
	m.Took, m.CPU, m.Overruns = time.Since(start), processorTime(), f.overruns()
	return m, err
}

// await gives up only long after every budget: how late it really is shall be told.
func await(knows func(netip.Addr) bool, a netip.Addr, want bool) error {
	const long = 90 * time.Second
	for late := time.Now().Add(long); knows(a) != want; {
		if time.Now().After(late) {
			return fmt.Errorf("%v: not seen after %v", a, long)
		}
		time.Sleep(50 * time.Microsecond)
	}
	return nil
}

// cloneAndInsert is nebula's way to learn one route, on its own structure; the median of a few.
func (f *follower) cloneAndInsert() time.Duration {
	t := f.keep.([]any)[0].(*bart.Table[routing.Gateways])
	var times []time.Duration
	for i := range 3 {
		start := time.Now()
		next := t.Clone()
		next.Insert(f.prefixes[i], routing.Gateways{routing.NewGateway(gateway(4, i+1), 1)})
		times = append(times, time.Since(start))
		t = next
	}
	f.keep = []any{t, f.keep.([]any)[1]}
	slices.Sort(times)
	return times[1]
}

// changes adds a route and takes it out again, n times, and waits for each to be visible.
func (f *follower) changes(n int) (median, slow time.Duration, err error) {
	var times []time.Duration
	for i := range 2 * n {
		route := rawRoute{prefix: netip.PrefixFrom(hostAddr(i/2), 32), gateway: gateway(4, 1), protocol: 4, gone: i%2 == 1}
		start := time.Now()
		if err := f.raw.do([]rawRoute{route}); err != nil {
			return 0, 0, err
		}
		if err := await(f.knows, route.prefix.Addr(), !route.gone); err != nil {
			return 0, 0, err
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	return times[len(times)/2], times[len(times)*99/100], nil
}

// hostAddr is one of those that no followed route leads to.
func hostAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)}) }

func heapAtRest() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
