package virtio

import "golang.org/x/sys/cpu"

// sumBlocksAVX2 adds n bytes from p, a positive multiple of 64 of them and at most 16 MiB, as little-endian words. The result is a term
// that fold takes; it is 0 only where every byte is.
//
//go:noescape
func sumBlocksAVX2(p *byte, n int) uint64

// wide says that the processor has AVX2 and that the system saves its registers. A variable for tests.
var wide = cpu.X86.HasAVX2
