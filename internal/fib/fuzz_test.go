package fib

import (
	"math/rand/v2"
	"testing"
)

// FuzzFIB: whatever the kernel does, and whatever announcements are lost before a dump, the Table says what the naive model
// says (kernel.md F7). The input is the choices.
func FuzzFIB(f *testing.F) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 2))
		b := make([]byte, 400)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), 1024)]
		w := newWorld(func(n int) int {
			if len(b) == 0 {
				return 0
			}
			c := int(b[0]) % n
			b = b[1:]
			return c
		})
		for len(b) > 0 {
			w.m.compat = w.pick(2) == 0
			w.lost = w.pick(6) == 0
			for range w.pick(8) + 1 {
				w.step()
			}
			if w.lost {
				w.lost = false
				w.resync()
			}
			w.settle(t)
			w.check(t, false)
		}
		w.resync()
		w.settle(t)
		w.check(t, true)
	})
}
