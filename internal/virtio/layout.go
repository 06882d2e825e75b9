package virtio

import "encoding/binary"

// IP protocol numbers, among them the IPv6 extension headers that may stand before a superpacket's transport header.
const (
	protoHopByHop = 0
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoDestOpts = 60
)

// Header lengths and the offset of the first address, in bytes.
const (
	headerLen4   = 20
	headerLen6   = 40
	headerLenTCP = 20
	headerLenUDP = 8
	addresses4   = 12
	addresses6   = 8
)

// layout says where the headers of a whole TCP or UDP packet are. Offsets count from the start of the packet.
type layout struct {
	transport int // the TCP or UDP header
	payload   int // what follows it
	final     int // IPv6: the 16 bytes that the checksum covers as the destination
	version   uint8
	protocol  uint8
}

// parse finds the headers in data, which ends where the packet does. It does not look at the lengths of IP and UDP. False, and l
// is of no use: not TCP or UDP over IP, a fragment, a header that does not fit, or more bytes than IP has lengths for.
func (l *layout) parse(data []byte) bool {
	if len(data) == 0 {
		return false
	}
	switch data[0] >> 4 {
	case 4:
		return l.parse4(data) && l.parseTransport(data)
	case 6:
		return l.parse6(data) && l.parseTransport(data)
	}
	return false
}

func (l *layout) parse4(data []byte) bool {
	if len(data) < headerLen4 || len(data) > 0xffff {
		return false
	}
	l.version, l.protocol = 4, data[9]
	l.transport = int(data[0]&0xf) * 4
	const offsetAndMore = 0x3fff
	return l.transport >= headerLen4 && binary.BigEndian.Uint16(data[6:])&offsetAndMore == 0
}

// parse6 passes the extension headers that the kernel's own segmentation passes. The others are malformed in a superpacket: one
// fragment header or one signature (AH) cannot serve many packets. So is a jumbogram, whose payload length is 0.
func (l *layout) parse6(data []byte) bool {
	if len(data) < headerLen6 || len(data) > headerLen6+0xffff {
		return false
	}
	l.version, l.protocol = 6, data[6]
	l.transport, l.final = headerLen6, addresses6+16
	if l.protocol == protoTCP || l.protocol == protoUDP {
		return true
	}
	if l.protocol == protoHopByHop && data[4] == 0 && data[5] == 0 {
		return false
	}
	for l.protocol == protoHopByHop || l.protocol == protoRouting || l.protocol == protoDestOpts {
		if !l.skipExtension(data) {
			return false
		}
	}
	return true
}

// skipExtension moves l past the IPv6 extension header at l.transport.
func (l *layout) skipExtension(data []byte) bool {
	rest := data[l.transport:]
	if len(rest) < 8 {
		return false
	}
	n := 8 + int(rest[1])*8
	if n > len(rest) {
		return false
	}
	if l.protocol == protoRouting && rest[3] != 0 {
		at, ok := finalAddress(rest[:n])
		if !ok {
			return false
		}
		l.final = l.transport + at
	}
	l.protocol = rest[0]
	l.transport += n
	return true
}

// finalAddress returns the offset of the last address to visit in a routing header with segments left: the checksum covers that
// one (RFC 8200, 8.1), not the one in the IPv6 header.
func finalAddress(routing []byte) (int, bool) {
	if len(routing) < 24 {
		return 0, false
	}
	switch routing[2] {
	case 0, 2: // source route (obsolete) and mobile IPv6: in the order of travel
		return 8 + (len(routing)-8)/16*16 - 16, true
	case 4: // segment routing: the last segment first
		return 8, true
	}
	return 0, false
}

// parseTransport sets l.payload; false if the transport header does not fit.
func (l *layout) parseTransport(data []byte) bool {
	rest := len(data) - l.transport
	switch {
	case l.protocol == protoTCP && rest >= headerLenTCP:
		n := int(data[l.transport+12]>>4) * 4
		l.payload = l.transport + n
		return n >= headerLenTCP && n <= rest
	case l.protocol == protoUDP && rest >= headerLenUDP:
		l.payload = l.transport + headerLenUDP
		return true
	}
	return false
}
