package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	wayClone = "clone and insert"
	wayQuiet = "quiet"

	perChange = "CPU a change"
	perSecond = "changes a CPU second"
	visible   = "visible after"
	converged = "converged after"
	learnt    = "known then"
	perRoute  = "bytes a route"
)

// following is a namespace with a device, a process that follows the kernel's routes through it, and the means to change them.
type following struct {
	space *space
	raw   *rawRoutes
	child *child
	args  followArgs
}

func (f *following) close() {
	if f.child != nil {
		f.child.close()
	}
	if f.raw != nil {
		f.raw.close()
	}
	f.space.close()
}

// startFollowing prepares the device as an administrator would, and the process; activating is the caller's.
func startFollowing(args followArgs) (*following, error) {
	s, err := newSpace()
	if err != nil {
		return nil, err
	}
	f := &following{space: s, args: args}
	if err = f.prepare(); err == nil {
		f.child, err = startChildIn(s, "follow", args)
	}
	if err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *following) prepare() error {
	tun, err := f.space.openTun(relayName, false, false)
	if err != nil {
		return err
	}
	defer tun.Close()
	if err := persist(tun); err != nil {
		return err
	}
	if err := f.space.configure(relayName, relayMTU, relayAddrs(false)); err != nil {
		return err
	}
	f.raw, err = newRawRoutes(f.space, relayName)
	return err
}

// persist lets a device outlive its descriptors; it goes with its namespace.
func persist(tun *os.File) error {
	raw, err := tun.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	err = raw.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) })
	return errors.Join(err, errno)
}

// routes are what the process is to learn.
func (f *following) routes() []rawRoute {
	prefixes := followed(f.args.Routes, f.args.Hosts)
	list := make([]rawRoute, len(prefixes))
	for i, p := range prefixes {
		list[i] = rawRoute{prefix: p, gateway: gateway(4, i), protocol: unix.RTPROT_STATIC}
	}
	return list
}

func (f *following) ask(command string) (m measured, err error) {
	err = f.child.ask(command, &m)
	return m, err
}

// learnAll puts the routes into the kernel and has the process learn them from there, nebula as they come: it does not ask for
// those that are there.
func (f *following) learnAll() error {
	routes := f.routes()
	if f.args.Way == ours {
		if err := f.raw.do(routes); err != nil {
			return err
		}
	}
	if _, err := f.ask("activate"); err != nil {
		return err
	}
	if f.args.Way == wayNebula {
		if err := f.raw.do(routes); err != nil {
			return err
		}
	}
	_, err := f.ask("await " + routes[len(routes)-1].prefix.Addr().String())
	return err
}

// openFollowing opens each way's process at its first turn, with all routes learned.
func openFollowing(routes int, sample func(f *following) ([]float64, error)) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		all := make([]*following, len(c.ways))
		return &session{
			sample: func(way, _ int) ([]float64, error) {
				if all[way] == nil {
					f, err := startFollowing(followArgs{Way: c.ways[way], Routes: routes})
					if err != nil {
						return nil, err
					}
					all[way] = f
					if err := f.learnAll(); err != nil {
						return nil, err
					}
				}
				return sample(all[way])
			},
			close: func() {
				for _, f := range all {
					if f != nil {
						f.close()
					}
				}
			},
		}, nil
	}
}

// churnCases: what a change of a learned route costs the process that follows, everything included: netlink, the comparison, the
// new snapshot, the collector.
func churnCases() []benchCase {
	var cases []benchCase
	for _, routes := range []int{100_000, million} {
		one := benchCase{
			name:    "one change at " + thousands(routes),
			what:    "Processor time of the following process for each of 250 kernel routes that come and go one by one, beside copying a bart.Table of as many routes and inserting, as nebula does for each.",
			quick:   routes == 100_000,
			kernel:  true,
			ways:    []string{ours, wayClone},
			metrics: []metric{{perSecond, "/s", 1}, {perChange, "µs", 1}},
			open:    openFollowing(routes, func(f *following) ([]float64, error) { return f.oneByOne(250) }),
		}
		if routes == million {
			one.budgets = []budget{atMost(perChange, "", 50), atLeast(perSecond, wayClone, 1000)}
		}
		cases = append(cases, one, benchCase{
			name:    "burst of 10,000 changes at " + thousands(routes),
			what:    "Processor time of the following process for each of 10,000 kernel routes that come and go at once.",
			kernel:  true,
			ways:    []string{ours},
			metrics: []metric{{perSecond, "/s", 0}, {perChange, "µs", 1}},
			open:    openFollowing(routes, func(f *following) ([]float64, error) { return f.burst(10_000) }),
		})
	}
	return cases
}

// oneByOne spaces changes by two milliseconds.
func (f *following) oneByOne(n int) ([]float64, error) {
	if f.args.Way == wayClone {
		m, err := f.ask("clone")
		return []float64{1e9 / float64(m.Median), float64(m.Median) / 1e3}, err
	}
	before, err := f.ask("usage")
	if err != nil {
		return nil, err
	}
	for i := range 2 * n {
		if err := f.raw.do([]rawRoute{{prefix: netip.PrefixFrom(hostAddr(i/2), 32), gateway: gateway(4, 1), protocol: 4, gone: i%2 == 1}}); err != nil {
			return nil, err
		}
		time.Sleep(2 * time.Millisecond)
	}
	return f.costSince(before, 2*n)
}

func (f *following) burst(n int) ([]float64, error) {
	before, err := f.ask("usage")
	if err != nil {
		return nil, err
	}
	for _, gone := range []bool{false, true} {
		list := make([]rawRoute, n)
		for i := range list {
			list[i] = rawRoute{prefix: netip.PrefixFrom(hostAddr(i), 32), gateway: gateway(4, 1), protocol: 4, gone: gone}
		}
		if err := f.raw.do(list); err != nil {
			return nil, err
		}
	}
	return f.costSince(before, 2*n)
}

// costSince is the processor time a change, once all is done: a last route is visible, and nothing is collected any more.
func (f *following) costSince(before measured, n int) ([]float64, error) {
	last := rawRoute{prefix: netip.MustParsePrefix("10.201.0.1/32"), gateway: gateway(4, 1), protocol: 4}
	if err := f.raw.do([]rawRoute{last}); err != nil {
		return nil, err
	}
	if _, err := f.ask("await " + last.prefix.Addr().String()); err != nil {
		return nil, err
	}
	time.Sleep(50 * time.Millisecond)
	after, err := f.ask("usage")
	last.gone = true
	each := float64(after.CPU-before.CPU) / float64(n)
	return []float64{1e9 / each, each / 1e3}, errors.Join(err, f.raw.do([]rawRoute{last}))
}

// busyLookupCase: readers beside the writer.
func busyLookupCase() benchCase {
	return benchCase{
		name:       "RoutesFor, " + thousands(million) + " learned, 10,000 changes a second",
		what:       "The time of a lookup by one goroutine while others change 10,000 of the kernel's routes a second, which the device follows, beside the same while nothing changes.",
		kernel:     true,
		ways:       []string{ours, wayQuiet},
		metrics:    []metric{{lookupTime, "ns", 0}},
		budgets:    []budget{atMost(lookupTime, wayQuiet, 1.3)},
		moreRounds: 2,
		open: func(_ *options, c *benchCase) (*session, error) {
			f, err := startFollowing(followArgs{Way: ours, Routes: million})
			if err != nil {
				return nil, err
			}
			if err := f.learnAll(); err != nil {
				f.close()
				return nil, err
			}
			return &session{close: f.close, sample: func(way, _ int) ([]float64, error) {
				if c.ways[way] == wayQuiet {
					time.Sleep(200 * time.Millisecond) // what has changed is published, and collected
					m, err := f.ask("lookup")
					return []float64{m.Lap.Nanoseconds}, err
				}
				return f.lookupBusy()
			}}, nil
		},
	}
}

func (f *following) lookupBusy() ([]float64, error) {
	stop := make(chan struct{})
	var changing sync.WaitGroup
	var failed error
	changing.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				if i%2 == 0 {
					return // what came is gone
				}
			case <-tick.C:
			}
			list := make([]rawRoute, 20)
			for n := range list {
				list[n] = rawRoute{prefix: netip.PrefixFrom(hostAddr(i/2%50*len(list)+n), 32), gateway: gateway(4, 1), protocol: 4, gone: i%2 == 1}
			}
			failed = errors.Join(failed, f.raw.do(list))
		}
	})
	time.Sleep(100 * time.Millisecond)
	m, err := f.ask("lookup")
	close(stop)
	changing.Wait()
	return []float64{m.Lap.Nanoseconds}, errors.Join(err, failed)
}

// memoryCases: the heap of the process at rest after a collection, less what it was before, shared among the routes.
func memoryCases() []benchCase {
	var cases []benchCase
	for _, hosts := range []bool{false, true} {
		for _, routes := range []int{100_000, million} {
			what := "the internet's prefixes"
			if hosts {
				what = "hosts"
			}
			if hosts && routes != million {
				continue
			}
			c := benchCase{
				name:    fmt.Sprintf("%s learned, %s", thousands(routes), what),
				what:    "The heap that learned routes keep, all structures together, at rest after a collection; the peer keeps them as nebula does, in a bart.Table of slices and a map.",
				quick:   routes == 100_000,
				kernel:  true,
				ways:    []string{ours, wayNebula + "'s structures"},
				metrics: []metric{{perRoute, "B", 0}},
				open:    openMemory(routes, hosts),
			}
			if routes == million {
				c.budgets = []budget{atMost(perRoute, "", 200)}
			}
			cases = append(cases, c)
		}
	}
	return cases
}

func openMemory(routes int, hosts bool) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		return &session{close: func() {}, sample: func(way, round int) ([]float64, error) {
			name := wayClone
			if c.ways[way] == ours {
				name = ours
			}
			f, err := startFollowing(followArgs{Way: name, Routes: routes, Hosts: hosts})
			if err != nil {
				return nil, err
			}
			defer f.close()
			before, err := f.ask("heap")
			if err == nil {
				err = f.learnAll()
			}
			if err != nil {
				return nil, err
			}
			time.Sleep(time.Second) // a first look at the kernel may still be going on
			after, err := f.ask("heap")
			return []float64{float64(after.Heap-before.Heap) / float64(routes)}, err
		}}, nil
	}
}
