package virtio

import "encoding/binary"

// HeaderLen is the size in bytes of a Header before each packet of a device with IFF_VNET_HDR, unless TUNSETVNETHDRSZ asks for more.
const HeaderLen = 10

// Flags of a Header.
const (
	FlagNeedsCsum = 1 // the checksum is unfinished: its field holds the sum of the pseudo header
	FlagDataValid = 2 // the checksum was verified
	FlagRSCInfo   = 4 // a virtio network card only, never a TUN
)

// Values of Header.GSOType. GSOECN is a bit beside the TCP types; it says that CWR is set in the superpacket.
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 3 // IP fragments of one datagram (UFO): never asked for, hence never from the kernel
	GSOTCPv6 = 4
	GSOUDPL4 = 5 // many datagrams, of either IP version
	GSOECN   = 0x80
)

// Offsets of the checksum in a transport header, as in Header.CsumOffset.
const (
	csumOffsetTCP = 16
	csumOffsetUDP = 6
)

// Header is struct virtio_net_hdr. Its integers are in the machine's own byte order: only TUNSETVNETLE and TUNSETVNETBE,
// which this library never calls, make a TUN use another.
type Header struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes of headers; a hint that no reader may trust: a forwarded superpacket has its first packet's length here
	GSOSize    uint16 // payload bytes per packet
	CsumStart  uint16 // offset in the packet from which to sum
	CsumOffset uint16 // of the checksum, from CsumStart
}

// DecodeHeader reads the Header at the start of b; false if b is shorter than HeaderLen. Any ten bytes are a Header: Accept
// tells whether it fits its packet.
func DecodeHeader(b []byte) (Header, bool) {
	if len(b) < HeaderLen {
		return Header{}, false
	}
	return Header{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}, true
}

// Encode writes h to the start of b; false, and b unchanged, if b is shorter than HeaderLen.
func (h Header) Encode(b []byte) bool {
	if len(b) < HeaderLen {
		return false
	}
	b[0], b[1] = h.Flags, h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
	return true
}

// Accept makes of a packet that came behind h what a Packet promises. A plain packet gets its checksum finished in place, and the
// result is 0 and 1. A superpacket stays as it is; the results are its segment size and the number of segments. No segments: the
// header contradicts the packet, which must be dropped (and is unchanged). Nothing in h is trusted.
func (h Header) Accept(packet []byte) (segmentSize, segments int) {
	if h.GSOType != GSONone {
		return h.acceptSuper(packet)
	}
	if len(packet) == 0 || h.Flags&FlagNeedsCsum != 0 && !h.finish(packet) {
		return 0, 0
	}
	return 0, 1
}

func (h Header) acceptSuper(packet []byte) (segmentSize, segments int) {
	var s Superpacket
	if !s.Parse(packet, int(h.GSOSize)) || !h.describes(&s) {
		return 0, 0
	}
	return s.size, s.Segments()
}

// describes reports whether type and checksum offsets are those of s. Without FlagNeedsCsum the offsets mean nothing; the segments
// get new checksums in any case, as the kernel's own would.
func (h Header) describes(s *Superpacket) bool {
	var want uint8
	var offset uint16
	switch {
	case s.protocol == protoUDP:
		want, offset = GSOUDPL4, csumOffsetUDP
	case s.version == 4:
		want, offset = GSOTCPv4, csumOffsetTCP
	default:
		want, offset = GSOTCPv6, csumOffsetTCP
	}
	got := h.GSOType
	if s.protocol == protoTCP {
		got &^= GSOECN
	}
	if got != want {
		return false
	}
	return h.Flags&FlagNeedsCsum == 0 || int(h.CsumStart) == s.transport && h.CsumOffset == offset
}

// finish completes an unfinished checksum, of whatever protocol. A result of 0 is written as 0xffff, the same number in one's
// complement: in UDP 0 would mean "none". The kernel does so for every protocol, too.
func (h Header) finish(packet []byte) bool {
	start := int(h.CsumStart)
	field := start + int(h.CsumOffset)
	if field+2 > len(packet) {
		return false
	}
	binary.BigEndian.PutUint16(packet[field:], mangleZero(^sum(packet[start:])))
	return true
}
