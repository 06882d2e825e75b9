package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

const (
	wayVeth  = "kernel forwarding"
	relayMTU = 1300

	rate      = "rate"
	cpu       = "CPU a packet"
	roundTrip = "round trip"
)

// relayCases: packets between two network namespaces, through a program that has a device in each. What arrives counts. The relay
// is a process of its own, and its processor time is what getrusage says, the kernel's work for it included; senders and
// receivers are in this process.
func relayCases() []benchCase {
	all := []string{ours, wayCeiling, wayUnsplit, wayWireguard, wayTailscale, wayPlain, wayWater, wayNebula, wayVeth}
	var cases []benchCase
	for _, version := range []int{4, 6} {
		for _, streams := range []int{1, 8} {
			cases = append(cases, tcpCase(version, streams, 1, all))
		}
		for _, size := range []int{64, 1300} {
			cases = append(cases, udpCase(version, size, 1, all))
		}
	}
	queued := []string{ours, wayCeiling, wayUnsplit, wayPlain, wayWater, wayNebula}
	cases = append(cases, tcpCase(4, 8, 2, queued), udpCase(4, 64, 2, queued), latencyCase())
	for i := range cases {
		c := &cases[i]
		c.budgets = slices.DeleteFunc(c.budgets, func(b budget) bool { return !slices.Contains(c.ways, b.against) })
	}
	return cases
}

// tcpCase: the payload that TCP connections deliver, sent as fast as they take it; a packet is as much payload as its MTU has room
// for, whether it travels alone or in a superpacket.
func tcpCase(version, streams, queues int, ways []string) benchCase {
	c := benchCase{
		name:    fmt.Sprintf("tcp%d, %s%s", version, plural(streams, "stream"), queued(queues)),
		what:    "TCP payload delivered through the relay, and the relay's processor time for each packet's worth of it.",
		quick:   version == 4 && streams == 8 && queues == 1,
		kernel:  true,
		ways:    ways,
		metrics: []metric{{rate, "Gbit/s", 2}, {cpu, "ns", 0}},
		budgets: []budget{
			atLeast(rate, wayCeiling, 0.95),
			atLeast(rate, wayWireguard, 1.05), atMost(cpu, wayWireguard, 0.95),
		},
	}
	if streams == 8 {
		c.budgets = []budget{
			atLeast(rate, wayCeiling, 0.95), atLeast(rate, wayWireguard, 1.1), atMost(cpu, wayWireguard, 0.85),
		}
	}
	payload := relayMTU - 20 - 32 // headers of IP, and of TCP with timestamps
	if version == 6 {
		payload -= 20
	}
	c.open = openRelay(queues, func(p *path, lap time.Duration) ([]float64, error) {
		t, err := startTCP(p, version, streams)
		if err != nil {
			return nil, err
		}
		defer t.stop()
		bytes, took, used, err := p.window(t.delivered.Load, lap)
		return []float64{bytes * 8 / float64(took), used / (bytes / float64(payload))}, err
	})
	return c
}

// udpCase: datagrams that arrive, of what one socket sends as fast as it can, each a packet of its own to the kernel.
func udpCase(version, size, queues int, ways []string) benchCase {
	flows := queues
	c := benchCase{
		name:    fmt.Sprintf("udp%d, %d bytes%s", version, size, queued(queues)),
		what:    "UDP packets of this size, headers included, delivered through the relay, and the relay's processor time for each.",
		kernel:  true,
		ways:    ways,
		metrics: []metric{{rate, "kpps", 0}, {cpu, "ns", 0}},
		budgets: []budget{
			{metric: rate, against: wayWireguard, atLeast: true, bound: 2, aim: 2.5}, atMost(cpu, wayWireguard, 0.35),
		},
	}
	headers := 28
	if version == 6 {
		headers = 48
	}
	c.open = openRelay(queues, func(p *path, lap time.Duration) ([]float64, error) {
		t, err := startUDP(p, version, size-headers, flows)
		if err != nil {
			return nil, err
		}
		defer t.stop()
		packets, took, used, err := p.window(t.delivered.Load, lap)
		return []float64{packets / float64(took) * 1e6, used / packets}, err
	})
	return c
}

// latencyCase: a lone packet must not wait for company.
func latencyCase() benchCase {
	return benchCase{
		name:       "lone packet",
		what:       "The time of a UDP packet of 64 bytes through the relay and of its echo back through it, one at a time; each sample is a median.",
		kernel:     true,
		ways:       []string{ours, wayPlain, wayWireguard, wayTailscale, wayWater, wayNebula, wayVeth},
		metrics:    []metric{{roundTrip, "µs", 1}},
		budgets:    []budget{atMost(roundTrip, wayPlain, 1.05)},
		moreRounds: 5,
		open: openRelay(1, func(p *path, lap time.Duration) ([]float64, error) {
			median, err := pingPong(p, 64-28, lap/5)
			return []float64{float64(median) / 1e3}, err
		}),
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func queued(queues int) string {
	if queues == 1 {
		return ""
	}
	return ", " + plural(queues, "queue")
}

// path is two namespaces and what joins them.
type path struct {
	spaces []*space // the first two are the ends
	relay  *child   // nil: the kernel alone
}

func (p *path) close() {
	if p.relay != nil {
		p.relay.close()
	}
	closeSpaces(p.spaces)
}

// addr is an address of the second end.
func (p *path) addr(version int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(relayAddrs(true)[version/6].Addr(), port)
}

// used is the relay's processor time so far.
func (p *path) used() (time.Duration, error) {
	if p.relay == nil {
		return 0, nil
	}
	var u relayUsage
	err := p.relay.ask("usage", &u)
	return u.CPU, err
}

// window lets traffic run in and then measures for the time of a lap what is delivered, how long it really was, in nanoseconds, and
// the relay's processor time, likewise.
func (p *path) window(delivered func() uint64, lap time.Duration) (n float64, took time.Duration, used float64, err error) {
	time.Sleep(300 * time.Millisecond)
	before, err := p.used()
	if err != nil {
		return 0, 0, 0, err
	}
	start, first := time.Now(), delivered()
	time.Sleep(lap)
	took, last := time.Since(start), delivered()
	after, err := p.used()
	if err == nil && last == first {
		err = errors.New("nothing arrived")
	}
	return float64(last - first), took, float64(after - before), err
}

// openRelay opens each way's path at its first turn.
func openRelay(queues int, measure func(p *path, lap time.Duration) ([]float64, error)) func(*options, *benchCase) (*session, error) {
	return func(o *options, c *benchCase) (*session, error) {
		paths := make([]*path, len(c.ways))
		return &session{
			sample: func(way, round int) (values []float64, err error) {
				if paths[way] == nil {
					if paths[way], err = openPath(c.ways[way], queues); err != nil {
						return nil, err
					}
				}
				p := paths[way]
				values, err = measure(p, o.lap)
				if p.relay == nil && len(values) == 2 {
					values = values[:1] // the kernel's time is nobody's
				}
				return values, err
			},
			close: func() {
				for _, p := range paths {
					if p != nil {
						p.close()
					}
				}
			},
		}, nil
	}
}

func openPath(way string, queues int) (*path, error) {
	p, err := joinSpaces(way, queues)
	if err != nil {
		return nil, err
	}
	for _, version := range []int{4, 6} {
		if err := p.ready(version); err != nil {
			p.close()
			return nil, err
		}
	}
	return p, nil
}

func joinSpaces(way string, queues int) (*path, error) {
	if way == wayVeth {
		return openVeths()
	}
	spaces, err := newSpaces(2)
	if err != nil {
		return nil, err
	}
	p := &path{spaces: spaces}
	p.relay, err = startChild("relay", relayArgs{Way: way, Queues: queues, MTU: relayMTU}, spaces[0].file, spaces[1].file)
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}
