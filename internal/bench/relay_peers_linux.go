package main

import (
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"

	tailtun "github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"example.com/overlay"
	"github.com/slackhq/nebula/config"
	nebula "github.com/slackhq/nebula/overlay"
	"github.com/songgao/water"
)

const (
	wayWireguard = "wireguard-go"
	wayTailscale = "tailscale"
	wayWater     = "water"
	wayNebula    = "nebula"
)

// isFinal says that nothing more can be written. All else is one packet's fault, such as that the link is not up yet.
func isFinal(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) || errors.Is(err, overlay.ErrGone)
}

// onePacket: read a packet, copy it, where a VPN would encrypt, and write it.
func onePacket[E io.ReadWriter](from, to E) error {
	in, out := make([]byte, mostPacket), make([]byte, mostPacket)
	for {
		n, err := from.Read(in)
		if err != nil {
			return err
		}
		copy(out, in[:n])
		if _, err := to.Write(out[:n]); isFinal(err) {
			return err
		}
	}
}

// batchTun is what wireguard-go's tun and tailscale's have in common.
type batchTun interface {
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	BatchSize() int
}

// relayBatches: read a batch, whose packets the tun has split and copied into the program's buffers, where a VPN would encrypt them
// in place, and write them as one batch. Buffers and offset are wireguard-go's own.
func relayBatches(from, to batchTun) error {
	const offset = 16
	bufs, sizes := make([][]byte, from.BatchSize()), make([]int, from.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, mostPacket)
	}
	packets := make([][]byte, 0, len(bufs))
	for {
		n, err := from.Read(bufs, sizes, offset)
		if err != nil && n == 0 && isFinal(err) {
			return err
		}
		packets = packets[:0]
		for i := range n {
			packets = append(packets, bufs[i][:offset+sizes[i]])
		}
		if n == 0 {
			continue
		}
		if _, err := to.Write(packets, offset); isFinal(err) {
			return err
		}
	}
}

// wireguardRelay: golang.zx2c4.com/wireguard/tun. It has one queue.
func wireguardRelay(a, b *space, args relayArgs) ([]pump, error) {
	return batchRelay(a, b, args, func() (batchTun, error) {
		t, err := wgtun.CreateTUN(relayName, args.MTU)
		if err == nil {
			go discard(t.Events())
		}
		return t, err
	})
}

// tailscaleRelay: github.com/tailscale/wireguard-go/tun. It has one queue.
func tailscaleRelay(a, b *space, args relayArgs) ([]pump, error) {
	return batchRelay(a, b, args, func() (batchTun, error) {
		t, err := tailtun.CreateTUN(relayName, args.MTU)
		if err == nil {
			go discard(t.Events())
		}
		return t, err
	})
}

func discard[E any](events <-chan E) {
	for range events {
	}
}

func batchRelay(a, b *space, args relayArgs, create func() (batchTun, error)) ([]pump, error) {
	return both(a, b, func(s *space, second bool) ([]batchTun, error) {
		var t batchTun
		err := s.do(func() (err error) {
			t, err = create()
			return err
		})
		if err != nil {
			return nil, err
		}
		return []batchTun{t}, s.configure(relayName, args.MTU, relayAddrs(second))
	}, relayBatches)
}

// waterRelay: github.com/songgao/water, one packet at a time.
func waterRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, func(s *space, second bool) ([]io.ReadWriter, error) {
		var queues []io.ReadWriter
		for range args.Queues {
			err := s.do(func() error {
				t, err := water.New(water.Config{
					DeviceType:             water.TUN,
					PlatformSpecificParams: water.PlatformSpecificParams{Name: relayName, MultiQueue: args.Queues > 1},
				})
				queues = append(queues, t)
				return err
			})
			if err != nil {
				return nil, err
			}
		}
		return queues, s.configure(relayName, args.MTU, relayAddrs(second))
	}, onePacket[io.ReadWriter])
}

// nebulaRelay: the overlay package of github.com/slackhq/nebula, one packet at a time, as its own loops read and write.
func nebulaRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, func(s *space, second bool) ([]io.ReadWriter, error) {
		var d nebula.Device
		err := s.do(func() (err error) {
			d, err = newNebula(map[string]any{"dev": relayName, "mtu": args.MTU}, second, args.Queues)
			if err == nil {
				err = d.Activate()
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		queues := []io.ReadWriter{d}
		for len(queues) < args.Queues {
			err := s.do(func() error {
				q, err := d.NewMultiQueueReader()
				queues = append(queues, q)
				return err
			})
			if err != nil {
				return nil, err
			}
		}
		return queues, nil
	}, onePacket[io.ReadWriter])
}

// silent swallows what a peer logs.
var silent = slog.New(slog.DiscardHandler)

// newNebula opens nebula's device in the calling thread's namespace.
func newNebula(tun map[string]any, second bool, queues int) (nebula.Device, error) {
	return newNebulaWith(tun, relayAddrs(second), queues)
}

func newNebulaWith(tun map[string]any, networks []netip.Prefix, queues int) (nebula.Device, error) {
	c := config.NewC(silent)
	c.Settings["tun"] = tun
	return nebula.NewDeviceFromConfig(c, silent, networks, queues)
}
