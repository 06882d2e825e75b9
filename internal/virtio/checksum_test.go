package virtio

import (
	"bytes"
	"math/bits"
	"math/rand/v2"
	"strconv"
	"testing"
)

// slowSum is RFC 1071's own loop, one word at a time.
func slowSum(parts ...[]byte) uint16 {
	var acc uint32
	for i, b := range bytes.Join(parts, nil) {
		word := uint32(b)
		if i%2 == 0 {
			word <<= 8
		}
		acc += word
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// seeded returns a random source and prints its seed should the test fail.
func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestSumLengthsAndAlignments(t *testing.T) {
	r := seeded(t)
	const most = 2048
	dst := make([]byte, most+16)
	for n := range most + 1 {
		content := randomBytes(r, n)
		want := slowSum(content)
		for align := range 16 {
			b := append(make([]byte, align), content...)[align:]
			if got := sum(b); got != want {
				t.Fatalf("sum of %d bytes at alignment %d: got %#04x, want %#04x", n, align, got, want)
			}
			if got := copySum(dst[15-align:], b); got != want || !bytes.Equal(dst[15-align:][:n], b) {
				t.Fatalf("copySum of %d bytes at alignment %d: got %#04x, want %#04x, or another copy", n, align, got, want)
			}
		}
	}
}

func TestSumExtremes(t *testing.T) {
	for n := range 300 {
		for _, x := range []byte{0, 0xff} {
			b := bytes.Repeat([]byte{x}, n)
			if got, want := sum(b), slowSum(b); got != want {
				t.Errorf("sum of %d bytes %#x: got %#04x, want %#04x", n, x, got, want)
			}
		}
	}
}

func TestCopySumKeepsTheRest(t *testing.T) {
	src := bytes.Repeat([]byte{1}, 200)
	for n := range 201 {
		dst := bytes.Repeat([]byte{2}, 210)
		copySum(dst, src[:n])
		if !bytes.Equal(dst[:n], src[:n]) || bytes.IndexByte(dst[n:], 1) >= 0 {
			t.Fatalf("copySum of %d bytes wrote beside them", n)
		}
	}
}

func TestSumLong(t *testing.T) {
	r := seeded(t)
	for range 100 {
		b := randomBytes(r, r.IntN(70_000))
		if got, want := sum(b), slowSum(b); got != want {
			t.Fatalf("sum of %d bytes: got %#04x, want %#04x", len(b), got, want)
		}
	}
}

// TestSumCarries drives the carry through every word of the unrolled loop: all ones, then a one anywhere.
func TestSumCarries(t *testing.T) {
	b := bytes.Repeat([]byte{0xff}, 200)
	for i := range b {
		for _, x := range []byte{0, 1, 0xfe} {
			b[i] = x
			if got, want := sum(b), slowSum(b); got != want {
				t.Errorf("ones but %#x at %d: got %#04x, want %#04x", x, i, got, want)
			}
			b[i] = 0xff
		}
	}
}

// TestSumNarrow is for processors without AVX2.
func TestSumNarrow(t *testing.T) {
	defer func(was bool) { wide = was }(wide)
	wide = false
	t.Run("lengths", TestSumLengthsAndAlignments)
	t.Run("extremes", TestSumExtremes)
	t.Run("long", TestSumLong)
	t.Run("carries", TestSumCarries)
}

func TestSumOfChunks(t *testing.T) {
	r := seeded(t)
	for range 20_000 {
		b := randomBytes(r, r.IntN(300))
		i := r.IntN(len(b) + 1)
		second := sum(b[i:])
		if i%2 != 0 {
			second = bits.ReverseBytes16(second)
		}
		got, want := fold(uint64(sum(b[:i]))+uint64(second)), slowSum(b)
		if got != want {
			t.Fatalf("%d and %d bytes: got %#04x, want %#04x", i, len(b)-i, got, want)
		}
	}
}

func TestFold(t *testing.T) {
	for _, c := range []struct {
		acc  uint64
		want uint16
	}{
		{0, 0},
		{0xffff, 0xffff},
		{0x10000, 1},
		{0x1ffff, 1},
		{0xffffffff, 0xffff},
		{0x1_0000_0000, 1},
		{0xffff_ffff_ffff_ffff, 0xffff},
		{0xffff_ffff_ffff_fffe, 0xfffe},
		{0x0001_0002_0003_0004, 10},
	} {
		if got := fold(c.acc); got != c.want {
			t.Errorf("fold(%#x): got %#x, want %#x", c.acc, got, c.want)
		}
	}
}

var sizes = []int{20, 64, 536, 1448, 9000, 65535}

func BenchmarkSum(b *testing.B) {
	for _, n := range sizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				sum(buf)
			}
		})
		b.Run("narrow/"+strconv.Itoa(n), func(b *testing.B) {
			defer func(was bool) { wide = was }(wide)
			wide = false
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				sum(buf)
			}
		})
	}
}

func BenchmarkCopySum(b *testing.B) {
	for _, n := range sizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			src, dst := make([]byte, n), make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				copySum(dst, src)
			}
		})
	}
}
