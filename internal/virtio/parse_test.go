package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
)

// fuzzSource draws the same seeds each time, so that a corpus entry keeps its number.
func fuzzSource() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// slowHeader is what parseSlow found.
type slowHeader struct {
	transport, length int
	udp               bool
}

// parseSlow is a second parser, for tests: it demands that packet is one whole, finished TCP or UDP packet, right in every length
// and checksum.
func parseSlow(packet []byte) (h slowHeader, err error) {
	if len(packet) < 20 {
		return h, errors.New("no IP header")
	}
	var pseudo []byte
	var protocol byte
	if packet[0]>>4 == 4 {
		pseudo, protocol, h.transport, err = slow4(packet)
	} else {
		pseudo, protocol, h.transport, err = slow6(packet)
	}
	if err != nil {
		return h, err
	}
	rest := packet[h.transport:]
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(rest)))
	pseudo = append(pseudo, 0, 0, 0, protocol)
	if got := slowSum(pseudo, rest); got != 0xffff {
		return h, fmt.Errorf("checksum off: sum %#x", got)
	}
	switch {
	case protocol == 6 && len(rest) >= 20:
		h.length = h.transport + int(rest[12]&0xf0)/4
		if h.length < h.transport+20 || h.length > len(packet) {
			return h, errors.New("TCP offset")
		}
	case protocol == 17 && len(rest) >= 8:
		h.udp, h.length = true, h.transport+8
		if int(binary.BigEndian.Uint16(rest[4:])) != len(rest) {
			return h, errors.New("UDP length")
		}
		if rest[6] == 0 && rest[7] == 0 {
			return h, errors.New("UDP without checksum")
		}
	default:
		return h, errors.New("no transport header")
	}
	return h, nil
}

func slow4(packet []byte) (pseudo []byte, protocol byte, transport int, err error) {
	transport = int(packet[0]%16) * 4
	switch {
	case transport < 20 || transport > len(packet):
		err = errors.New("IHL")
	case int(packet[2])*256+int(packet[3]) != len(packet):
		err = errors.New("total length")
	case slowSum(packet[:transport]) != 0xffff:
		err = errors.New("header checksum")
	case packet[6]&0x3f != 0 || packet[7] != 0:
		err = errors.New("fragment")
	}
	return append([]byte(nil), packet[12:20]...), packet[9], transport, err
}

func slow6(packet []byte) (pseudo []byte, protocol byte, transport int, err error) {
	if len(packet) < 40 || int(packet[4])*256+int(packet[5]) != len(packet)-40 {
		return nil, 0, 0, errors.New("IPv6 header")
	}
	src, dst := packet[8:24], packet[24:40]
	protocol, rest := packet[6], packet[40:]
	for protocol == 0 || protocol == 43 || protocol == 60 {
		if len(rest) < 8 || len(rest) < 8+8*int(rest[1]) {
			return nil, 0, 0, errors.New("extension header")
		}
		header := rest[:8+8*int(rest[1])]
		if protocol == 43 && header[3] > 0 {
			addresses := header[8:]
			for header[2] != 4 && len(addresses) >= 32 {
				addresses = addresses[16:]
			}
			dst = addresses[:16]
		}
		protocol, rest = header[0], rest[len(header):]
	}
	return append(append([]byte(nil), src...), dst...), protocol, len(packet) - len(rest), nil
}
