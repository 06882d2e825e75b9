package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// relayArgs is what a relay is told. Its namespaces are descriptors 3 and 4.
type relayArgs struct {
	Way    string
	Queues int
	MTU    int
}

// relayName is the device's in either namespace.
const relayName = "tun0"

// pump moves packets one way on one queue until it fails.
type pump func() error

// relayWays open a device in either namespace and return what moves packets between them.
var relayWays = map[string]func(a, b *space, args relayArgs) ([]pump, error){
	ours:         overlayRelay,
	wayCeiling:   ceilingRelay,
	wayUnsplit:   unsplitRelay,
	wayPlain:     plainRelay,
	wayWireguard: wireguardRelay,
	wayTailscale: tailscaleRelay,
	wayWater:     waterRelay,
	wayNebula:    nebulaRelay,
}

// relayUsage is a relay's answer to every command.
type relayUsage struct{ CPU time.Duration }

func relayRole(text []byte) (func(string) (any, error), error) {
	var args relayArgs
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, err
	}
	open := relayWays[args.Way]
	if open == nil {
		return nil, fmt.Errorf("no relay is called %q", args.Way)
	}
	pumps, err := open(inherited(3), inherited(4), args)
	if err != nil {
		return nil, err
	}
	for _, pump := range pumps {
		go func() {
			err := pump()
			fmt.Fprintln(os.Stderr, "relay ended:", err)
			os.Exit(1)
		}()
	}
	return func(string) (any, error) { return relayUsage{processorTime()}, nil }, nil
}

// relayAddrs are the addresses of the device in the first and in the second namespace.
func relayAddrs(second bool) []netip.Prefix {
	if second {
		return []netip.Prefix{netip.MustParsePrefix("10.9.0.2/24"), netip.MustParsePrefix("fd09::2/64")}
	}
	return []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")}
}

// both opens the two ends by open and makes pumps between them in either direction, queue by queue.
func both[E any](a, b *space, open func(s *space, second bool) ([]E, error), move func(from, to E) error) ([]pump, error) {
	first, err := open(a, false)
	if err != nil {
		return nil, err
	}
	second, err := open(b, true)
	if err != nil {
		return nil, err
	}
	if len(first) != len(second) {
		return nil, errors.New("the ends differ in queues")
	}
	var pumps []pump
	for i := range first {
		pumps = append(pumps, func() error { return move(first[i], second[i]) }, func() error { return move(second[i], first[i]) })
	}
	return pumps, nil
}
