package overlay

// filtered reports whether a packet is one that WriteBatch and Write drop, unless Config.NoFilter is set: an ICMP redirect of either
// IP version or an IPv6 router advertisement. One advertisement from a peer installs a default route, an on-link prefix and an
// MTU (kernel.md S2). The settings of the device alone do not stop them all: a device with accept_redirects off obeys where
// conf/all, which is the host's and not ours, has it on (V8); accept_ra cannot be set by netlink, is on again after the MTU was below
// 1280, and is out of reach in a container with a read-only /proc/sys (V9).
//
// It takes any bytes. Of fragments the first counts, for it holds the type. A packet that the kernel refuses anyhow may get either
// answer. Superpackets, being TCP or UDP, need no look.
func filtered(packet []byte) bool {
	const icmp, tcp, udp = 1, 6, 17
	if len(packet) < 20 {
		return false
	}
	switch packet[0] >> 4 {
	case 4:
		return packet[9] == icmp && filtered4(packet)
	case 6:
		return packet[6] != tcp && packet[6] != udp && filtered6(packet)
	}
	return false
}

// filtered4 is for ICMP in IPv4, of at least 20 bytes.
func filtered4(packet []byte) bool {
	const redirect = 5
	header := int(packet[0]&0xf) * 4
	if header < 20 || header >= len(packet) {
		return false
	}
	first := packet[6]&0x1f == 0 && packet[7] == 0
	return first && packet[header] == redirect
}

// filtered6 follows the extension headers to the end of the packet, however many: a limit would be a way around it.
//
// A first fragment that ends before the type is dropped too: the type could follow in the next one. Nobody has use for such a
// fragment; RFC 7112 asks every host to drop it, and not every kernel does.
func filtered6(packet []byte) bool {
	const fragment, icmp, advertisement, redirect = 44, 58, 134, 137
	if len(packet) < 40 {
		return false
	}
	fragmented := false
	for next, rest := packet[6], packet[40:]; ; {
		if next == icmp && len(rest) > 0 {
			return rest[0] == advertisement || rest[0] == redirect
		}
		n := extensionLen(next, rest)
		if n == 0 {
			return false
		}
		if n > len(rest) {
			return fragmented
		}
		if next == fragment {
			if rest[2] != 0 || rest[3]>>3 != 0 {
				return false
			}
			fragmented = true
		}
		next, rest = rest[0], rest[n:]
	}
}

// extensionLen returns the length of the header that b starts with, next being its protocol: of an IPv6 extension header behind
// which the kernel still finds ICMP, 8 or more bytes; more than b has if b does not tell, 0 for any other protocol.
func extensionLen(next byte, b []byte) int {
	const hopByHop, routing, fragment, authentication, icmp, destination = 0, 43, 44, 51, 58, 60
	switch next {
	case hopByHop, routing, destination:
		if len(b) >= 8 {
			return 8 + int(b[1])*8
		}
	case authentication:
		if len(b) >= 8 {
			return 8 + int(b[1])*4
		}
	case fragment, icmp:
	default:
		return 0
	}
	return 8
}
