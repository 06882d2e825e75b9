package main

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	median = "median"
	slow   = "99th percentile"
)

// watchCases: how soon and how surely the device knows what the kernel's table says.
func watchCases() []benchCase {
	cases := []benchCase{presentCase(100_000), presentCase(million), burstCase()}
	single := benchCase{
		name:       "a single change",
		what:       "From the request that adds or deletes one kernel route until a lookup tells, nothing else going on.",
		quick:      true,
		kernel:     true,
		ways:       []string{ours, wayNebula},
		metrics:    []metric{{median, "ms", 2}, {slow, "ms", 2}},
		budgets:    []budget{atMost(slow, "", 50)},
		moreRounds: 2,
		open: openFollowing(10, func(f *following) ([]float64, error) {
			m, err := f.ask("changes 50")
			return []float64{float64(m.Median) / 1e6, float64(m.Slow) / 1e6}, err
		}),
	}
	return append(cases, single, foreignCase())
}

// presentCase: nebula learns nothing of routes that are there before it.
func presentCase(routes int) benchCase {
	c := benchCase{
		name:    thousands(routes) + " at the start",
		what:    "From Activate until the last of the kernel's routes is in force, where all were there before.",
		kernel:  true,
		ways:    []string{ours},
		metrics: []metric{{visible, "s", 2}},
		open: func(_ *options, c *benchCase) (*session, error) {
			return &session{close: func() {}, sample: func(int, int) ([]float64, error) {
				f, err := startFollowing(followArgs{Way: ours, Routes: routes})
				if err != nil {
					return nil, err
				}
				defer f.close()
				list := f.routes()
				if err := f.raw.do(list); err != nil {
					return nil, err
				}
				up, err := f.ask("activate")
				if err != nil {
					return nil, err
				}
				seen, err := f.ask("await " + list[len(list)-1].prefix.Addr().String())
				return []float64{(up.Took + seen.Took).Seconds()}, err
			}}, nil
		},
	}
	if routes == million {
		c.budgets = []budget{atMost(visible, "", 5)}
	}
	return c
}

// burstCase: nebula, by vishvananda's RouteSubscribe, copies its table for each event; the table grows from nothing.
func burstCase() benchCase {
	const routes = 100_000
	return benchCase{
		name:    "burst of " + thousands(routes),
		what:    "Routes put into the kernel as fast as it takes them: how many of them lookups find 3 s after the last, and after how long all of them.",
		kernel:  true,
		ways:    []string{ours, wayNebula},
		metrics: []metric{{learnt, "%", 1}, {converged, "s", 2}, {"overruns", "", 0}},
		budgets: []budget{atLeast(learnt, "", 100), atMost(converged, "", 3)},
		open: func(_ *options, c *benchCase) (*session, error) {
			return &session{close: func() {}, sample: func(way, _ int) ([]float64, error) {
				return burstSample(c.ways[way], routes)
			}}, nil
		},
	}
}

func burstSample(way string, routes int) ([]float64, error) {
	f, err := startFollowing(followArgs{Way: way, Routes: routes, Hosts: true})
	if err != nil {
		return nil, err
	}
	defer f.close()
	if _, err := f.ask("activate"); err != nil {
		return nil, err
	}
	if err := f.raw.do(f.routes()); err != nil {
		return nil, err
	}
	start := time.Now()
	var m measured
	for time.Since(start) < 3*time.Second && m.Known < routes {
		if m, err = f.ask("count"); err != nil {
			return nil, err
		}
	}
	took := time.Since(start).Seconds()
	values := []float64{100 * float64(m.Known) / float64(routes), took, float64(m.Overruns)}
	if m.Known < routes {
		values = values[:1]
	}
	if way != ours {
		values = values[:min(2, len(values))] // it does not count them
	}
	return values, nil
}

// foreignCase: routes through another link, which the follower hears of and has to leave out.
func foreignCase() benchCase {
	const changes = 1_000
	return benchCase{
		name:    "routes of others",
		what:    "Processor time of the following process for each of 1,000 routes that come and go through another link, 5 each 5 ms: faster, nebula's subscription overruns and ends.",
		kernel:  true,
		ways:    []string{ours, wayNebula},
		metrics: []metric{{perChange, "µs", 2}},
		open: openFollowing(10, func(f *following) ([]float64, error) {
			other, err := f.otherLink()
			if err != nil {
				return nil, err
			}
			defer other.close()
			before, err := f.ask("usage")
			if err != nil {
				return nil, err
			}
			for _, gone := range []bool{false, true} {
				list := make([]rawRoute, changes)
				for i := range list {
					list[i] = rawRoute{prefix: netip.PrefixFrom(hostAddr(i), 32), protocol: unix.RTPROT_STATIC, gone: gone}
				}
				for some := range slices.Chunk(list, 5) {
					if err := other.do(some); err != nil {
						return nil, err
					}
					time.Sleep(5 * time.Millisecond)
				}
			}
			values, err := f.costSince(before, 2*changes)
			if err != nil {
				return nil, err
			}
			return values[1:], nil
		}),
	}
}

// otherLink is a second device of the namespace, made at the first call.
func (f *following) otherLink() (*rawRoutes, error) {
	const name = "other0"
	if raw, err := newRawRoutes(f.space, name); err == nil {
		return raw, nil
	}
	tun, err := f.space.openTun(name, false, false)
	if err != nil {
		return nil, err
	}
	defer tun.Close()
	if err := persist(tun); err != nil {
		return nil, err
	}
	if err := f.space.configure(name, relayMTU, []netip.Prefix{netip.MustParsePrefix("10.8.0.1/24")}); err != nil {
		return nil, fmt.Errorf("another link: %w", err)
	}
	return newRawRoutes(f.space, name)
}
