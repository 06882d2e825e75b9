package virtio

import (
	"encoding/binary"
	"math/bits"
)

// sum returns the one's complement sum of b, at most 16 MiB, as 16-bit words in network order, an odd last byte padded with zero. It
// is 0 only where every byte is. Sums add up, by fold, if each part but the last has an even length; the sum of a part that starts
// at an odd offset goes in with its two bytes swapped.
func sum(b []byte) uint16 {
	// One's complement addition does not care about the order of bytes until the end (RFC 1071), nor about the width of the
	// words: so the machine adds 64 bits at a time or more, little-endian, and the result is swapped once. In Go it is two sums at
	// a time, because within one each addition waits for the carry of the one before.
	var acc, other, carry uint64
	if wide && len(b) >= 128 {
		n := len(b) &^ 63
		acc = sumBlocksAVX2(&b[0], n)
		b = b[n:]
	}
	for len(b) >= 128 {
		acc = addBlock(acc, (*[64]byte)(b))
		other = addBlock(other, (*[64]byte)(b[64:]))
		b = b[128:]
	}
	if len(b) >= 64 {
		other = addBlock(other, (*[64]byte)(b))
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b), carry)
		b = b[8:]
	}
	acc, carry = bits.Add64(acc, other, carry)
	acc, carry = bits.Add64(acc, tail(b), carry)
	acc, carry = bits.Add64(acc, 0, carry)
	return bits.ReverseBytes16(fold(acc + carry))
}

// addBlock adds 64 bytes to acc, in little-endian words, modulo 2^64-1.
func addBlock(acc uint64, b *[64]byte) uint64 {
	acc, carry := bits.Add64(acc, binary.LittleEndian.Uint64(b[0:]), 0)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[8:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[16:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[24:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[32:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[40:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[48:]), carry)
	acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[56:]), carry)
	acc, carry = bits.Add64(acc, 0, carry)
	return acc + carry
}

// tail returns fewer than eight bytes as a little-endian number.
func tail(b []byte) (n uint64) {
	shift := 0
	if len(b) >= 4 {
		n, shift, b = uint64(binary.LittleEndian.Uint32(b)), 32, b[4:]
	}
	if len(b) >= 2 {
		n |= uint64(binary.LittleEndian.Uint16(b)) << shift
		shift, b = shift+16, b[2:]
	}
	if len(b) >= 1 {
		n |= uint64(b[0]) << shift
	}
	return n
}

// copySum copies all of src to dst, which is at least as long, and returns sum(src). One function, so that one pass may do both
// some day: in Go a copy by wide moves and a sum that finds it in the first cache took 58 ns for 1448 bytes, one pass 68.
func copySum(dst, src []byte) uint16 {
	copy(dst, src)
	return sum(src)
}

// fold adds the 16-bit words of acc until one is left. It is 0 only for 0.
func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return uint16(acc>>16 + acc)
}

// sumWords returns b, a multiple of four bytes and at most 64 KiB long, as a term of a sum, not yet folded. It is for headers, where
// sum would spend its time on preparations.
func sumWords(b []byte) (acc uint64) {
	for ; len(b) >= 4; b = b[4:] {
		acc += sum32(b)
	}
	return acc
}

// sum16 and sum32 return the first bytes of b as such a term.
func sum16(b []byte) uint64 { return uint64(binary.BigEndian.Uint16(b)) }
func sum32(b []byte) uint64 { return uint64(binary.BigEndian.Uint32(b)) }

// mangleZero returns a checksum as UDP writes it.
func mangleZero(csum uint16) uint16 {
	if csum == 0 {
		return 0xffff
	}
	return csum
}
