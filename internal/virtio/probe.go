package virtio

import "encoding/binary"

// Probe returns a superpacket of a GSOType with its header, of so many segments, that every kernel takes which takes such
// superpackets at all, and drops at once without a trace but in a counter: from and to the loopback address, in IPv4 with a wrong
// header checksum too.
func Probe(gsoType uint8, segments int) []byte {
	const size = 8
	gsoType &^= GSOECN
	payload := size * segments
	h := Header{Flags: FlagNeedsCsum, GSOType: gsoType, GSOSize: size, CsumStart: headerLen4, CsumOffset: csumOffsetTCP}
	transport := []byte{0, 9, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, tcpACK, 0, 0, 0, 0, 0, 0}
	protocol := byte(protoTCP)
	if gsoType == GSOUDPL4 {
		protocol, h.CsumOffset = protoUDP, csumOffsetUDP
		transport = []byte{0, 9, 0, 9, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(transport[4:], uint16(headerLenUDP+payload))
	}
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0xde, 0xad, 127, 0, 0, 1, 127, 0, 0, 1}
	binary.BigEndian.PutUint16(ip[2:], uint16(headerLen4+len(transport)+payload))
	if gsoType == GSOTCPv6 {
		h.CsumStart = headerLen6
		ip = make([]byte, headerLen6)
		ip[0], ip[6], ip[7], ip[addresses6+15], ip[addresses6+31] = 0x60, protocol, 64, 1, 1
		binary.BigEndian.PutUint16(ip[4:], uint16(len(transport)+payload))
	}
	h.HdrLen = uint16(len(ip) + len(transport))
	packet := make([]byte, HeaderLen, HeaderLen+int(h.HdrLen)+payload)
	h.Encode(packet)
	packet = append(append(packet, ip...), transport...)
	return packet[:cap(packet)]
}
