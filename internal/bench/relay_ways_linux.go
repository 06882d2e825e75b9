package main

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"

	"example.com/overlay"
)

const (
	wayCeiling = "ceiling"
	wayUnsplit = "unsplit superpackets"
	wayPlain   = "plain read and write"

	vnetHeader = 10
	mostPacket = 65535
)

// overlayRelay: read a batch, put each segment into the program's own buffer, where a VPN would encrypt it in place, and write
// the segments as one batch.
func overlayRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, func(s *space, second bool) ([]overlay.Queue, error) {
		d, err := overlay.New(overlay.Config{
			Name: relayName, NetNS: s.path(), Networks: relayAddrs(second), MTU: args.MTU, Queues: args.Queues,
		})
		if err == nil {
			err = d.Activate()
		}
		if err != nil {
			return nil, err
		}
		return d.Queues(), nil
	}, relayOverlay)
}

func relayOverlay(from, to overlay.Queue) error {
	var segments []overlay.Packet
	buffer := make([]byte, 0, 8*mostPacket)
	for {
		packets, err := from.ReadBatch()
		if err != nil {
			return err
		}
		segments, buffer = segments[:0], buffer[:0]
		for _, p := range packets {
			for i := range p.Segments() {
				start := len(buffer)
				buffer = p.AppendSegment(buffer, i)
				segments = append(segments, overlay.Packet{Data: buffer[start:]})
			}
		}
		if _, err := to.WriteBatch(segments); isFinal(err) {
			return err
		}
	}
}

// plainQueues opens a device as plainly as possible.
func plainQueues(framed bool, args relayArgs) func(s *space, second bool) ([]*os.File, error) {
	return func(s *space, second bool) ([]*os.File, error) {
		var files []*os.File
		for range args.Queues {
			f, err := s.openTun(relayName, framed, args.Queues > 1)
			if err != nil {
				return nil, err
			}
			files = append(files, f)
		}
		return files, s.configure(relayName, args.MTU, relayAddrs(second))
	}
}

// ceilingRelay: superpackets as they are, and of the work on each packet what no VPN can avoid: the payload is copied once, where
// it would be encrypted, and summed once for the checksums of its packets and once more to verify them before they are merged.
func ceilingRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, plainQueues(true, args), func(from, to *os.File) error {
		in, out := make([]byte, vnetHeader+mostPacket), make([]byte, vnetHeader+mostPacket)
		for {
			n, err := from.Read(in)
			if err != nil {
				return err
			}
			copy(out, in[:n])
			if sumBytes(in[vnetHeader:n]) != sumBytes(out[vnetHeader:n]) {
				return fmt.Errorf("a copy differs")
			}
			if _, err := to.Write(out[:n]); isFinal(err) {
				return err
			}
		}
	})
}

// unsplitRelay: superpackets as they are, and nothing done to them.
func unsplitRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, plainQueues(true, args), func(from, to *os.File) error {
		in := make([]byte, vnetHeader+mostPacket)
		for {
			n, err := from.Read(in)
			if err != nil {
				return err
			}
			if _, err := to.Write(in[:n]); isFinal(err) {
				return err
			}
		}
	})
}

// plainRelay: one packet by each system call, without offloads, copied once.
func plainRelay(a, b *space, args relayArgs) ([]pump, error) {
	return both(a, b, plainQueues(false, args), onePacket[*os.File])
}

// sumBytes is the one's complement sum of b, as fast as plain Go does it: 64 bits at a time, in two chains of carries.
func sumBytes(b []byte) uint16 {
	var one, two, c uint64
	for len(b) >= 64 {
		one, c = bits.Add64(one, binary.LittleEndian.Uint64(b), 0)
		one, c = bits.Add64(one, binary.LittleEndian.Uint64(b[8:]), c)
		one, c = bits.Add64(one, binary.LittleEndian.Uint64(b[16:]), c)
		one, c = bits.Add64(one, binary.LittleEndian.Uint64(b[24:]), c)
		one += c
		two, c = bits.Add64(two, binary.LittleEndian.Uint64(b[32:]), 0)
		two, c = bits.Add64(two, binary.LittleEndian.Uint64(b[40:]), c)
		two, c = bits.Add64(two, binary.LittleEndian.Uint64(b[48:]), c)
		two, c = bits.Add64(two, binary.LittleEndian.Uint64(b[56:]), c)
		two += c
		b = b[64:]
	}
	for len(b) >= 8 {
		one, c = bits.Add64(one, binary.LittleEndian.Uint64(b), 0)
		one += c
		b = b[8:]
	}
	var last [8]byte
	copy(last[:], b)
	one, c = bits.Add64(one, binary.LittleEndian.Uint64(last[:]), 0)
	one, c = bits.Add64(one, two, c)
	one += c
	one = one>>32 + one&0xffffffff
	one = one>>16 + one&0xffff
	one = one>>16 + one&0xffff
	return uint16(one>>16 + one)
}
