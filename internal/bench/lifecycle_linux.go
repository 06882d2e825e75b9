package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"

	"example.com/overlay"
	nebula "github.com/slackhq/nebula/overlay"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

const (
	wayBare = "bare close(2)"

	beginning = "New and Activate"
	ending    = "Close"
	atRest    = "memory at rest"
)

// lifecycleCases: a device with ten addresses and ten routes, from nothing to up, and its end.
func lifecycleCases() []benchCase {
	return []benchCase{
		{
			name:    "one life",
			what:    "From nothing to a device that is up with 10 addresses and 10 routes, and its end; beside close(2) of the same device's last descriptor, and nebula's device.",
			quick:   true,
			kernel:  true,
			ways:    []string{ours, wayBare, wayNebula},
			metrics: []metric{{ending, "ms", 2}, {beginning, "ms", 2}},
			budgets: []budget{atMost(ending, wayBare, 1.2), atMost(beginning, "", 5)},
			open: func(_ *options, c *benchCase) (*session, error) {
				s, err := newSpace()
				if err != nil {
					return nil, err
				}
				return &session{close: s.close, sample: func(way, _ int) ([]float64, error) { return oneLife(s, c.ways[way]) }}, nil
			},
			moreRounds: 10,
		},
		{
			name:    "at rest",
			what:    "The heap that a device with 10 addresses and 10 routes keeps in its process after a collection, before its first packet.",
			kernel:  true,
			ways:    []string{ours, wayNebula, wayWireguard},
			metrics: []metric{{atRest, "KiB", 0}},
			open: func(_ *options, c *benchCase) (*session, error) {
				s, err := newSpace()
				if err != nil {
					return nil, err
				}
				return &session{close: s.close, sample: func(way, _ int) ([]float64, error) {
					child, err := startChildIn(s, "rest", restArgs{c.ways[way]})
					if err != nil {
						return nil, err
					}
					defer child.close()
					var bytes int64
					err = child.ask("heap", &bytes)
					return []float64{float64(bytes) / 1024}, err
				}}, nil
			},
		},
	}
}

// lifeNetworks are ten addresses, lifeRoutes ten routes.
func lifeNetworks() []netip.Prefix {
	var list []netip.Prefix
	for i := range 5 {
		list = append(list,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 20, byte(i), 1}), 24),
			netip.PrefixFrom(address(64, 0xfd20<<48|uint64(i), 1), 64))
	}
	return list
}

func lifeRoutes() []netip.Prefix {
	var list []netip.Prefix
	for i := range 10 {
		list = append(list, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i), 0}), 24))
	}
	return list
}

func lifeConfig(s *space) overlay.Config {
	return overlay.Config{Name: relayName, NetNS: s.path(), Networks: lifeNetworks(), Routes: onLink(lifeRoutes())}
}

func oneLife(s *space, way string) ([]float64, error) {
	start := time.Now()
	var end func() error
	var err error
	if way == wayNebula {
		var d nebula.Device
		err = s.do(func() (err error) {
			d, err = lifeNebula()
			return err
		})
		if err == nil {
			end = d.Close
		}
	} else {
		end, err = lifeOverlay(s, way == wayBare)
	}
	if err != nil {
		return nil, err
	}
	began := time.Since(start)
	start = time.Now()
	err = end()
	ended := time.Since(start)
	if way == wayBare {
		return []float64{float64(ended) / 1e6}, err // its beginning is ours
	}
	return []float64{float64(ended) / 1e6, float64(began) / 1e6}, err
}

// lifeOverlay returns how to end it: by Close, or after that by close(2) of a descriptor that has kept the device.
func lifeOverlay(s *space, bare bool) (end func() error, err error) {
	d, err := overlay.New(lifeConfig(s))
	if err == nil {
		err = d.Activate()
	}
	if err != nil || !bare {
		return d.Close, err
	}
	f, err := d.Queues()[0].File()
	if err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if err := d.Close(); err != nil {
		return nil, err
	}
	return func() error { return unix.Close(fd) }, nil
}

// lifeNebula works in the calling thread's namespace.
func lifeNebula() (nebula.Device, error) {
	var routes []any
	for _, p := range lifeRoutes() {
		routes = append(routes, map[string]any{"route": p.String(), "via": "10.20.0.9"})
	}
	d, err := newNebulaWith(map[string]any{"dev": relayName, "mtu": relayMTU, "unsafe_routes": routes}, lifeNetworks(), 1)
	if err == nil {
		err = d.Activate()
	}
	return d, err
}

type restArgs struct{ Way string }

// restRole keeps one device and tells what it holds. Its threads are in the namespace.
func restRole(text []byte) (func(string) (any, error), error) {
	var args restArgs
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, err
	}
	before := heapAtRest()
	var keep any
	var err error
	switch s := inherited(3); args.Way {
	case ours:
		var d overlay.Device
		if d, err = overlay.New(lifeConfig(s)); err == nil {
			err = d.Activate()
		}
		keep = d
	case wayNebula:
		keep, err = lifeNebula()
	case wayWireguard:
		keep, err = wgtun.CreateTUN(relayName, relayMTU)
		if err == nil {
			err = s.configure(relayName, relayMTU, lifeNetworks())
		}
	default:
		err = fmt.Errorf("nothing is called %q", args.Way)
	}
	return func(string) (any, error) {
		bytes := heapAtRest() - before
		runtime.KeepAlive(keep)
		return bytes, nil
	}, err
}
