package overlay

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

const (
	headerLen4 = 20 // without options
	headerLen6 = 40 // without extension headers

	// maxExtensions bounds the walk through IPv6 extension headers; what lies beyond counts as a protocol without ports.
	maxExtensions = 8

	icmpHeaderLen  = 8 // of an echo and of an error, which quotes a packet behind it
	echoIdentifier = 4 // where an echo has it
)

// IP protocol numbers that FlowHash looks into (IANA "Assigned Internet Protocol Numbers").
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoDCCP     = 33
	protoRouting  = 43
	protoFragment = 44
	protoAH       = 51
	protoICMP6    = 58
	protoDstOpts  = 60
	protoSCTP     = 132
	protoUDPLite  = 136
)

// FlowHash returns a hash of the flow that an IP packet belongs to, the same for both directions of the flow:
//
//   - TCP, UDP, UDP-Lite, SCTP, DCCP: addresses, ports and protocol, behind IPv6 extension headers too;
//   - ICMP echo and timestamp: addresses, protocol and identifier;
//   - an ICMP error: what the packet that it quotes has, so that it takes that flow's way;
//   - everything else, and every fragment, the first one included: addresses and protocol.
//
// It takes any bytes: what is neither IPv4 nor IPv6, or ends within the fixed header, has hash 0. Length fields and
// checksums are not looked at, so that superpackets are welcome. The hash has no seed: a packet has the same hash in every
// process and on every machine, and whoever chooses the ports chooses the hash. Hosts in a row that all select by it do not
// split again what the first has split: from the second on, give Select a hash of your own. Its upper bits are as good as
// its lower ones. It does not allocate, keeps nothing, and may be called concurrently.
func FlowHash(packet []byte) uint32 {
	switch ipVersion(packet) {
	case 4:
		return flowHash4(packet, true)
	case 6:
		return flowHash6(packet, true)
	}
	return 0
}

// packetDst returns the destination of an IPv4 or IPv6 packet; false if it is neither, or ends within the fixed header.
// An IPv6 packet to a mapped IPv4 address stays one: the address is Is4In6.
func packetDst(packet []byte) (netip.Addr, bool) {
	switch ipVersion(packet) {
	case 4:
		return netip.AddrFrom4([4]byte(packet[16:20])), true
	case 6:
		return netip.AddrFrom16([16]byte(packet[24:40])), true
	}
	return netip.Addr{}, false
}

// ipVersion returns 4 or 6 if the packet holds the fixed header of that version, else 0.
func ipVersion(packet []byte) int {
	if len(packet) >= headerLen4 {
		switch packet[0] >> 4 {
		case 4:
			return 4
		case 6:
			if len(packet) >= headerLen6 {
				return 6
			}
		}
	}
	return 0
}

// flowHash4 needs the whole fixed header. Quoted errors (follow is false then) are not followed: no ICMP error answers
// another (RFC 1122, 3.2.2), and a chain of quotes would cost its sender nothing and us a walk.
func flowHash4(p []byte, follow bool) uint32 {
	var ports uint32
	proto := p[9]
	fragment := binary.BigEndian.Uint16(p[6:])&0x3fff != 0 // more fragments, or an offset
	if n := int(p[0]&15) * 4; !fragment && n >= headerLen4 && n <= len(p) {
		payload := p[n:]
		if proto != protoICMP {
			ports = portsOf(proto, payload)
		} else if len(payload) >= icmpHeaderLen {
			switch payload[0] {
			case 0, 8, 13, 14: // echo reply, echo, timestamp, timestamp reply
				ports = identifierOf(payload)
			case 3, 4, 5, 11, 12: // unreachable, source quench, redirect, time exceeded, parameter problem
				if quote := payload[icmpHeaderLen:]; follow && ipVersion(quote) == 4 {
					return flowHash4(quote, false)
				}
			}
		}
	}
	return mix4(binary.BigEndian.Uint32(p[12:]), binary.BigEndian.Uint32(p[16:]), ports, proto)
}

// flowHash6 is flowHash4 for IPv6 (RFC 4443, 2.4 e for errors about errors).
func flowHash6(p []byte, follow bool) uint32 {
	var ports uint32
	proto, payload, whole := upperLayer6(p)
	if whole {
		if proto != protoICMP6 {
			ports = portsOf(proto, payload)
		} else if len(payload) >= icmpHeaderLen {
			switch kind := payload[0]; {
			case kind == 128 || kind == 129: // echo request, echo reply
				ports = identifierOf(payload)
			case kind < 128: // every error
				if quote := payload[icmpHeaderLen:]; follow && ipVersion(quote) == 6 {
					return flowHash6(quote, false)
				}
			}
		}
	}
	return mix6(p[8:24], p[24:40], ports, proto)
}

// upperLayer6 walks the extension headers, those that the kernel's ipv6_ext_hdr knows. whole is false for a fragment: its
// protocol is then what the fragment header names, which all fragments of a datagram have in common, and not what follows
// a further extension header, which only the first one has. An atomic fragment (RFC 6946) is a whole packet.
// If the chain is cut short or too long, the protocol is the header's that could not be passed.
func upperLayer6(p []byte) (proto uint8, payload []byte, whole bool) {
	proto, payload = p[6], p[headerLen6:]
	for range maxExtensions {
		var n int
		switch proto {
		case protoHopByHop, protoRouting, protoDstOpts:
			if len(payload) < 8 {
				return proto, nil, true
			}
			n = 8 + int(payload[1])*8
		case protoAH:
			if len(payload) < 8 {
				return proto, nil, true
			}
			n = 8 + int(payload[1])*4
		case protoFragment:
			if len(payload) < 8 {
				return proto, nil, true
			}
			if binary.BigEndian.Uint16(payload[2:])&0xfff9 != 0 { // an offset, or more fragments
				return payload[0], nil, false
			}
			n = 8
		default:
			return proto, payload, true
		}
		if len(payload) < n {
			return proto, nil, true
		}
		proto, payload = payload[0], payload[n:]
	}
	return proto, payload, true
}

// portsOf returns the source and the destination port, 0 if the protocol has none. They are the first four bytes in every
// protocol that has ports, so that they survive in an ICMP error, which quotes at least eight (RFC 792).
func portsOf(proto uint8, payload []byte) uint32 {
	switch proto {
	case protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite:
		if len(payload) >= 4 {
			return binary.BigEndian.Uint32(payload)
		}
	}
	return 0
}

// identifierOf returns an echo's identifier as both ports: request and reply have the same.
func identifierOf(payload []byte) uint32 {
	return uint32(binary.BigEndian.Uint16(payload[echoIdentifier:])) * 0x10001
}

// The fractional digits of pi, made odd: numbers without structure.
const (
	salt0 = 0x243f6a8885a308d3
	salt1 = 0x13198a2e03707345
	salt2 = 0xa4093822299f31d1
	salt3 = 0x082efa98ec4e6c89
)

// mix4 hashes each end by itself and adds the two, which makes direction vanish. Neither factor of an end's product can be
// 0: an end has 48 bits, and each salt has bits where a factor has none.
func mix4(src, dst, ports uint32, proto uint8) uint32 {
	a := uint64(src)<<16 | uint64(ports>>16)
	b := uint64(dst)<<16 | uint64(ports&0xffff)
	a = foldMul(a^salt0, bits.RotateLeft64(a, 32)^salt1)
	b = foldMul(b^salt0, bits.RotateLeft64(b, 32)^salt1)
	return finishFlow(a+b, proto)
}

// mix6 is mix4 for addresses of 16 bytes.
func mix6(src, dst []byte, ports uint32, proto uint8) uint32 {
	a := foldMul(binary.BigEndian.Uint64(src)^salt0, binary.BigEndian.Uint64(src[8:])^salt1)
	b := foldMul(binary.BigEndian.Uint64(dst)^salt0, binary.BigEndian.Uint64(dst[8:])^salt1)
	a = foldMul(a^salt2, uint64(ports>>16)^salt3)
	b = foldMul(b^salt2, uint64(ports&0xffff)^salt3)
	return finishFlow(a+b, proto)
}

func finishFlow(ends uint64, proto uint8) uint32 {
	h := foldMul(ends^salt2, uint64(proto)<<32^salt3)
	h = foldMul(h^salt0, salt2)
	return uint32(h >> 32)
}

// foldMul multiplies to 128 bits and folds them to 64, as wyhash does: one multiplication, and every bit of either factor
// reaches the middle.
func foldMul(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}
