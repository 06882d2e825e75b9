package main

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
)

// internet makes routes whose prefix lengths are distributed as in the internet's own tables of 2025 (rounded shares of the BGP
// reports by length), in address space that is handed out in blocks as there. The same seed makes the same routes.
type internet struct {
	random *rand.Rand
	blocks []uint64 // what registries have handed out: /8 of IPv4, /32 of IPv6, as the highest bits of an address
	shares []share
	bits   int // of the part of an address that is drawn
}

// share is how many of 1,000 routes have a length.
type share struct{ length, count int }

var (
	shares4 = []share{
		{24, 604}, {23, 102}, {22, 112}, {21, 54}, {20, 46}, {19, 27}, {18, 15}, {17, 9}, {16, 14}, {15, 3}, {14, 3}, {13, 3}, {12, 3}, {11, 2}, {10, 2}, {9, 1},
	}
	shares6 = []share{
		{48, 460}, {44, 95}, {40, 85}, {32, 120}, {46, 50}, {47, 35}, {45, 25}, {36, 40}, {33, 15}, {34, 15}, {35, 10}, {42, 15}, {38, 10}, {29, 15}, {28, 5}, {30, 5},
	}
)

func newInternet(version int, seed uint64) *internet {
	n := &internet{random: rand.New(rand.NewPCG(seed, uint64(version)))}
	if version == 4 {
		n.bits, n.shares = 32, shares4
		for high := uint64(1); high < 224; high++ {
			if high != 10 && high != 127 {
				n.blocks = append(n.blocks, high<<56)
			}
		}
		return n
	}
	n.bits, n.shares = 64, shares6
	for _, high := range []uint64{0x2001, 0x2400, 0x2600, 0x2800, 0x2a00, 0x2c00} {
		for range 8000 {
			n.blocks = append(n.blocks, high<<48|n.random.Uint64N(1<<10)<<48|n.random.Uint64N(1<<16)<<32)
		}
	}
	return n
}

// prefixes returns n different ones in random order.
func (n *internet) prefixes(count int) []netip.Prefix {
	seen := make(map[netip.Prefix]bool, count)
	list := make([]netip.Prefix, 0, count)
	for len(list) < count {
		if p := n.prefix(); !seen[p] {
			seen[p] = true
			list = append(list, p)
		}
	}
	return list
}

func (n *internet) prefix() netip.Prefix {
	length, at := 0, n.random.IntN(1000)
	for _, s := range n.shares {
		if length = s.length; at < s.count {
			break
		}
		at -= s.count
	}
	block := n.blocks[n.random.IntN(len(n.blocks))]
	given := 8
	if n.bits == 64 {
		given = 32
	}
	high := block
	if given < length {
		high |= n.random.Uint64() >> given
	}
	return netip.PrefixFrom(address(n.bits, high, 0), length).Masked()
}

func address(bits int, high, low uint64) netip.Addr {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:], high)
	binary.BigEndian.PutUint64(a[8:], low)
	if bits == 32 {
		return netip.AddrFrom4([4]byte(a[:4]))
	}
	return netip.AddrFrom16(a)
}

// inside draws an address in a prefix.
func (n *internet) inside(p netip.Prefix) netip.Addr {
	a := p.Addr().AsSlice()
	for i := range a {
		if free := min(8, 8*i+8-p.Bits()); free > 0 {
			a[i] |= byte(n.random.Uint32()) & (1<<free - 1)
		}
	}
	addr, _ := netip.AddrFromSlice(a)
	return addr
}

// overlayNetworks hold the gateways, outside of what internet draws.
func overlayNetworks() []netip.Prefix { return relayAddrs(false) }

// gateway returns the i-th of 64 overlay hosts.
func gateway(version, i int) netip.Addr {
	if version == 4 {
		return netip.AddrFrom4([4]byte{10, 9, 0, byte(2 + i%64)})
	}
	return address(64, 0xfd09<<48, uint64(2+i%64))
}
