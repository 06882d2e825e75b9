package overlay

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"weak"
)

const heaviestWeight = math.MaxInt32

// gatewayRand returns a random source whose seed the test prints.
func gatewayRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// gatewayAddr returns the i-th of many different addresses.
func gatewayAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

// weightedList returns a list with these weights.
func weightedList(weights ...int) []Gateway {
	gws := make([]Gateway, len(weights))
	for i, w := range weights {
		gws[i] = Gateway{gatewayAddr(i), w}
	}
	return gws
}

func repeatedWeight(weight, n int) []int { return slices.Repeat([]int{weight}, n) }

// chiExcess returns how many standard deviations the chi-square of counts lies above what the weights let expect
// (Wilson-Hilferty). Cells that expect less than 10 are merged with the next; one with weight 0 must be empty.
func chiExcess(counts []int, weights []float64) float64 {
	total, sum := 0, 0.0
	for i, n := range counts {
		total += n
		sum += weights[i]
	}
	chi2, cells := 0.0, 0
	seen, want := 0.0, 0.0
	for i, n := range counts {
		seen += float64(n)
		want += float64(total) * weights[i] / sum
		if want >= 10 || i == len(counts)-1 {
			if want > 0 {
				chi2 += (seen - want) * (seen - want) / max(want, 1)
				cells++
			} else if seen > 0 {
				return math.Inf(1)
			}
			seen, want = 0, 0
		}
	}
	if cells < 2 {
		return 0
	}
	df := float64(cells - 1)
	return (math.Cbrt(chi2/df) - (1 - 2/(9*df))) / math.Sqrt(2/(9*df))
}

// chiTooMuch is where chiExcess fails a test: by chance once in a billion runs.
const chiTooMuch = 6

func weightShares(weights []int) []float64 {
	f := make([]float64, len(weights))
	for i, w := range weights {
		f[i] = float64(max(w, 1))
	}
	return f
}

func TestGatewaysList(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fe80::1%tun0")
	for _, c := range []struct {
		in   []Gateway
		want []Gateway
		text string
	}{
		{nil, nil, ""},
		{[]Gateway{}, nil, ""},
		{[]Gateway{{a, 0}}, []Gateway{{a, 1}}, "10.0.0.2"},
		{[]Gateway{{a, 3}, {b, 1}}, []Gateway{{a, 3}, {b, 1}}, "10.0.0.2*3 fe80::1%tun0"},
		{[]Gateway{{b, 2}, {b, 0}}, []Gateway{{b, 2}, {b, 1}}, "fe80::1%tun0*2 fe80::1%tun0"},
		{[]Gateway{{a, -7}, {b, heaviestWeight}}, []Gateway{{a, 1}, {b, heaviestWeight}}, "10.0.0.2 fe80::1%tun0*2147483647"},
	} {
		var p gatewayPool
		g := p.intern(c.in)
		var got []Gateway
		for i := range g.Len() {
			got = append(got, g.At(i))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("intern(%v): got %v, want %v", c.in, got, c.want)
		}
		if g.String() != c.text {
			t.Errorf("String of %v: got %q, want %q", c.in, g, c.text)
		}
		if (g == Gateways{}) != (len(c.want) == 0) {
			t.Errorf("intern(%v) is zero: %v", c.in, g == Gateways{})
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("At(0) of an empty list: no panic")
		}
	}()
	Gateways{}.At(0)
}

func TestGatewaysEqual(t *testing.T) {
	var p gatewayPool
	base := p.intern(weightedList(1, 2))
	for _, c := range []struct {
		name string
		gws  []Gateway
		same bool
	}{
		{"again", weightedList(1, 2), true},
		{"silent weight", weightedList(0, 2), true},
		{"other weight", weightedList(1, 3), false},
		{"other order", []Gateway{weightedList(1, 2)[1], weightedList(1, 2)[0]}, false},
		{"shorter", weightedList(1), false},
		{"longer", weightedList(1, 2, 1), false},
		{"mapped address", []Gateway{{netip.AddrFrom16(gatewayAddr(0).As16()), 1}, {gatewayAddr(1), 2}}, false},
		{"empty", nil, false},
	} {
		if got := p.intern(c.gws) == base; got != c.same {
			t.Errorf("%s: equal %v, want %v", c.name, got, c.same)
		}
	}
	zone := func(name string) Gateways {
		return p.intern([]Gateway{{Addr: netip.MustParseAddr("fe80::1").WithZone(name)}})
	}
	if a := zone("a"); a != zone("a") || a == zone("b") {
		t.Error("zones are not told apart")
	}
	count := map[Gateways]int{base: 1}
	count[p.intern(weightedList(1, 2))]++
	if count[base] != 2 {
		t.Errorf("as the key of a map: got %v", count)
	}
}

func TestInternCopies(t *testing.T) {
	var p gatewayPool
	gws := weightedList(1, 2)
	g := p.intern(gws)
	gws[0] = Gateway{gatewayAddr(9), 9}
	if got, want := g.String(), "10.0.0.0 10.0.0.1*2"; got != want {
		t.Errorf("after a change of the input: got %q, want %q", got, want)
	}
}

func TestInternCollision(t *testing.T) {
	p := gatewayPool{sets: map[uint64][]weak.Pointer[gatewaySet]{}}
	a, b := p.internLocked(7, weightedList(1)), p.internLocked(7, weightedList(2))
	if a == b {
		t.Fatal("two lists with one hash became one")
	}
	if p.internLocked(7, weightedList(1)) != a || p.internLocked(7, weightedList(2)) != b {
		t.Error("lists with one hash are not found again")
	}
	runtime.KeepAlive(a) // its last use
	waitForSets(t, &p, 1)
	if p.internLocked(7, weightedList(2)) != b {
		t.Error("forgetting one list lost the other with the same hash")
	}
}

// size returns how many lists the pool holds, unused ones included.
func (p *gatewayPool) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, sets := range p.sets {
		n += len(sets)
	}
	return n
}

func waitForSets(t *testing.T, p *gatewayPool, want int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); p.size() != want; {
		if time.Now().After(deadline) {
			t.Fatalf("the pool holds %d lists, want %d", p.size(), want)
		}
		runtime.GC()
		time.Sleep(time.Millisecond) // cleanups run in the background
	}
}

func TestInternForgets(t *testing.T) {
	var p gatewayPool
	kept := p.intern(weightedList(1, 1))
	for i := range 1000 {
		p.intern([]Gateway{{gatewayAddr(i), 5}})
	}
	waitForSets(t, &p, 1)
	if p.intern(weightedList(1, 1)) != kept {
		t.Error("a list in use was forgotten")
	}
	runtime.KeepAlive(kept)
	waitForSets(t, &p, 0)
	if len(p.sets) != 0 {
		t.Errorf("%d empty entries remain", len(p.sets))
	}
}

func TestInternConcurrent(t *testing.T) {
	var p gatewayPool
	var wg sync.WaitGroup
	const workers, rounds, lists = 8, 300, 5
	held := make([][lists]Gateways, workers)
	for w := range workers {
		wg.Go(func() {
			for r := range rounds {
				for i := range lists {
					g := p.intern(weightedList(repeatedWeight(2, i+1)...))
					if again := p.intern(weightedList(repeatedWeight(2, i+1)...)); again != g {
						t.Error("two lists while one is held")
					}
					if _, ok := g.Select(uint32(r), nil); !ok {
						t.Error("no gateway")
					}
					held[w][i] = g
				}
				if r%100 == w {
					runtime.GC()
				}
				if r < rounds-1 {
					held[w] = [lists]Gateways{} // so that lists die and are made again all the time
				}
			}
		})
	}
	wg.Wait()
	for w := range held {
		if held[w] != held[0] {
			t.Fatalf("worker %d holds other lists than worker 0", w)
		}
	}
	if got := p.size(); got < lists {
		t.Errorf("the pool holds %d lists, want at least %d", got, lists)
	}
	runtime.KeepAlive(held)
}

func TestInternAllocs(t *testing.T) {
	var p gatewayPool
	gws := weightedList(0, 2, 3, 4)
	g := p.intern(gws)
	if n := testing.AllocsPerRun(1000, func() { p.intern(gws) }); n != 0 {
		t.Errorf("a known list costs %v allocations, want 0", n)
	}
	runtime.KeepAlive(g)
}
