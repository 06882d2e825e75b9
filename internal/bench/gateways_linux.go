package main

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"example.com/overlay"
	"github.com/slackhq/nebula/firewall"
	"github.com/slackhq/nebula/routing"
)

const (
	choiceTime = "a packet"
	// wayBalance is nebula's choice by the ports that its firewall has read from the packet before: that reading is not in its time.
	wayBalance = "nebula's choice"
	wayFlat    = "FlowHash alone"
)

// gatewaysCases: the gateway for a packet, from its bytes, among those that share a prefix.
func gatewaysCases() []benchCase {
	var cases []benchCase
	for _, count := range []int{2, 8, 64} {
		for _, dead := range []bool{false, true} {
			if dead && count != 8 {
				continue
			}
			name := fmt.Sprintf("%d gateways", count)
			if dead {
				name += ", one dead"
			}
			c := benchCase{
				name:       name,
				what:       "Packets a second for which one goroutine chooses a gateway: FlowHash of the packet and Select, and nebula's BalancePacket of ports read before.",
				quick:      count == 8 && !dead,
				ways:       []string{ours, wayFlat, wayBalance},
				metrics:    []metric{{choiceTime, "M/s", 1}, {allocations, "", 0}},
				budgets:    []budget{atMost(allocations, "", 0)},
				moreRounds: 2,
			}
			if dead {
				c.ways = c.ways[:2] // nebula does not know of the dead here
			}
			c.open = openGateways(gatewaysArgs{Count: count, Dead: dead})
			cases = append(cases, c)
		}
	}
	return cases
}

type gatewaysArgs struct {
	Count int
	Dead  bool
}

func openGateways(args gatewaysArgs) func(*options, *benchCase) (*session, error) {
	return func(_ *options, c *benchCase) (*session, error) {
		child, err := startChild("gateways", args)
		if err != nil {
			return nil, err
		}
		return &session{close: child.close, sample: func(way, _ int) ([]float64, error) {
			var s lapSample
			err := child.ask(c.ways[way], &s)
			if c.ways[way] != ours {
				return []float64{1e3 / s.Nanoseconds}, err
			}
			return []float64{1e3 / s.Nanoseconds, s.Allocations}, err
		}}, nil
	}
}

func gatewaysRole(text []byte) (func(string) (any, error), error) {
	var args gatewaysArgs
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, err
	}
	all := make([]overlay.Gateway, args.Count)
	theirs := make([]routing.Gateway, args.Count)
	for i := range all {
		all[i] = overlay.Gateway{Addr: gateway(4, i), Weight: 1 + i%3}
		theirs[i] = routing.NewGateway(all[i].Addr, all[i].Weight)
	}
	routing.CalculateBucketsForGateways(theirs)
	prefix := netip.MustParsePrefix("192.0.2.0/24")
	d, err := idleDevice([]netip.Prefix{prefix}, func(int) []overlay.Gateway { return all })
	if err != nil {
		return nil, err
	}
	list, _ := d.RoutesFor(prefix.Addr())
	var alive func(netip.Addr) bool
	if dead := all[0].Addr; args.Dead {
		alive = func(a netip.Addr) bool { return a != dead }
	}
	const flows = 1 << 12
	packets, ports := make([][]byte, flows), make([]firewall.Packet, flows)
	for i := range packets {
		packets[i] = make([]byte, udpLen(4))
		putUDP(packets[i], prefix.Addr())
		packets[i][20], packets[i][21] = byte(i>>8), byte(i)
		ports[i] = firewall.Packet{LocalPort: uint16(i), RemotePort: 53}
	}
	var sink uint32
	choose := map[string]func(i int) bool{
		ours:       func(i int) bool { _, ok := list.Select(overlay.FlowHash(packets[i]), alive); return ok },
		wayFlat:    func(i int) bool { sink += overlay.FlowHash(packets[i]); return true },
		wayBalance: func(i int) bool { _, ok := routing.BalancePacket(&ports[i], theirs); return ok },
	}
	return func(way string) (any, error) { return timeLaps(flows, nil, choose[way]) }, nil
}
