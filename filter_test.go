package overlay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// filterV4 is an IPv4 packet of the given protocol, fragment field and options.
func filterV4(protocol byte, fragment uint16, options int, payload ...byte) []byte {
	p := make([]byte, 20+options, 20+options+len(payload))
	p[0], p[3], p[8], p[9] = byte(0x45+options/4), byte(len(p)+len(payload)), 255, protocol
	p[6], p[7] = byte(fragment>>8), byte(fragment)
	return append(p, payload...)
}

// filterV6 is an IPv6 packet whose first header is of protocol next.
func filterV6(next byte, parts ...[]byte) []byte {
	p := make([]byte, 40)
	p[0], p[6], p[7] = 0x60, next, 255
	return append(p, bytes.Join(parts, nil)...)
}

// filterExtension is an IPv6 extension header of n bytes, or what is left of it where more follows its length field.
func filterExtension(next, length byte, n int) []byte {
	h := make([]byte, n)
	h[0], h[1] = next, length
	return h
}

type filterCase struct {
	name   string
	packet []byte
	want   bool
}

func filterCases4() []filterCase {
	redirect := []byte{5, 1, 0, 0, 0, 0, 0, 0}
	cases := []filterCase{
		{"redirect", filterV4(1, 0, 0, redirect...), true},
		{"redirect, only the type", filterV4(1, 0, 0, 5), true},
		{"redirect, don't fragment", filterV4(1, 0x4000, 0, redirect...), true},
		{"redirect behind options", filterV4(1, 0, 40, redirect...), true},
		{"redirect, first fragment", filterV4(1, 0x2000, 0, redirect...), true},
		{"later fragment", filterV4(1, 0x2001, 0, redirect...), false},
		{"last fragment", filterV4(1, 0x0100, 0, redirect...), false},
		{"echo", filterV4(1, 0, 0, 8, 0), false},
		{"5 in the options", filterV4(1, 0, 4, 8, 0), false},
		{"no payload", filterV4(1, 0, 0), false},
		{"ICMPv6 type", filterV4(1, 0, 0, 134), false},
		{"TCP", filterV4(6, 0, 0, redirect...), false},
		{"UDP", filterV4(17, 0, 0, redirect...), false},
		{"ICMPv6 in IPv4", filterV4(58, 0, 0, 137), false},
	}
	for ihl := range byte(5) {
		p := filterV4(1, 0, 0, redirect...)
		p[0] = 0x40 | ihl
		cases = append(cases, filterCase{"short IHL", p, false})
	}
	past := filterV4(1, 0, 0, redirect...)
	past[0] = 0x4f
	return append(cases, filterCase{"IHL past the end", past, false})
}

func filterCases6() []filterCase {
	ra, redirect, echo := []byte{134, 0, 0, 0}, []byte{137, 0, 0, 0}, []byte{128, 0, 0, 0}
	atomic, first := filterExtension(58, 0, 8), []byte{58, 0, 0, 1, 0, 0, 0, 1}
	var long [][]byte
	for range 8000 {
		long = append(long, filterExtension(60, 0, 8))
	}
	long = append(long, filterExtension(58, 0, 8), ra)
	return []filterCase{
		{"advertisement", filterV6(58, ra), true},
		{"redirect", filterV6(58, redirect), true},
		{"only the type", filterV6(58, ra[:1]), true},
		{"echo", filterV6(58, echo), false},
		{"neighbour solicitation", filterV6(58, []byte{135}), false},
		{"router solicitation", filterV6(58, []byte{133}), false},
		{"redirect of ICMPv4", filterV6(58, []byte{5}), false},
		{"no payload", filterV6(58), false},
		{"TCP", filterV6(6, ra), false},
		{"UDP", filterV6(17, ra), false},
		{"ICMPv4 in IPv6", filterV6(1, []byte{5}), false},
		{"no next header", filterV6(59, ra), false},
		{"ESP", filterV6(50, filterExtension(58, 0, 8), ra), false},
		{"behind hop-by-hop options", filterV6(0, filterExtension(58, 2, 24), ra), true},
		{"behind routing", filterV6(43, filterExtension(58, 0, 8), redirect), true},
		{"behind destination options", filterV6(60, filterExtension(58, 0, 8), ra), true},
		{"behind AH", filterV6(51, filterExtension(58, 4, 24), ra), true},
		{"behind all", filterV6(0, filterExtension(60, 0, 8), filterExtension(43, 0, 8), filterExtension(44, 1, 16),
			filterExtension(51, 0, 8), filterExtension(60, 1, 12), filterExtension(58, 0, 8), ra), true},
		{"behind very many", filterV6(60, long...), true},
		{"echo behind options", filterV6(0, filterExtension(58, 0, 8), echo), false},
		{"UDP behind options", filterV6(0, filterExtension(17, 0, 8), ra), false},
		{"options cut off", filterV6(0, filterExtension(58, 2, 16)), false},
		{"options of one byte", filterV6(0, []byte{58}), false},
		{"atomic fragment", filterV6(44, atomic, ra), true},
		{"first fragment", filterV6(44, first, redirect), true},
		{"first fragment, echo", filterV6(44, first, echo), false},
		{"first fragment of options", filterV6(44, filterExtension(60, 0, 8), filterExtension(58, 0, 8), ra), true},
		{"first fragment without the type", filterV6(44, first), true},
		{"first fragment, options cut off", filterV6(44, filterExtension(60, 0, 8), filterExtension(58, 9, 8)), true},
		{"first fragment, options untold", filterV6(44, filterExtension(60, 0, 8), []byte{58}), true},
		{"first fragment of UDP, empty", filterV6(44, filterExtension(17, 0, 8)), false},
		{"later fragment", filterV6(44, []byte{58, 0, 0, 9, 0, 0, 0, 1}, ra), false},
		{"far fragment", filterV6(44, []byte{58, 0, 1, 0, 0, 0, 0, 1}, ra), false},
		{"fragment header cut off", filterV6(44, atomic[:7]), false},
	}
}

// filterCases also holds every version and every cut.
func filterCases() []filterCase {
	cases := slices.Concat(filterCases4(), filterCases6())
	ra, redirect := filterV6(58, []byte{134}), filterV4(1, 0, 0, 5)
	for v := range byte(16) {
		for _, whole := range [][]byte{ra, redirect} {
			p := bytes.Clone(whole)
			p[0] = v<<4 | 5
			cases = append(cases, filterCase{fmt.Sprint("version ", v), p, p[0]>>4 == whole[0]>>4})
		}
	}
	for _, whole := range [][]byte{ra, redirect} {
		for n := range whole {
			cases = append(cases, filterCase{fmt.Sprint("cut to ", n), whole[:n], false})
		}
	}
	return cases
}

func TestFiltered(t *testing.T) {
	for _, c := range filterCases() {
		if got := filtered(c.packet); got != c.want {
			t.Errorf("%s, %x: got %v, want %v", c.name, c.packet[:min(len(c.packet), 80)], got, c.want)
		}
		if got := filteredSlow(c.packet); got != c.want {
			t.Errorf("%s: the oracle says %v, want %v", c.name, got, c.want)
		}
	}
}

// filteredSlow is the oracle: the same question, asked of one header at a time.
func filteredSlow(packet []byte) bool {
	switch {
	case len(packet) >= 20 && packet[0]/16 == 4:
		header := 4 * int(packet[0]%16)
		offset := (int(packet[6])*256 + int(packet[7])) % 8192
		return packet[9] == 1 && offset == 0 && header >= 20 && len(packet) > header && packet[header] == 5
	case len(packet) >= 40 && packet[0]/16 == 6:
		return filteredSlow6(packet[6], packet[40:], false)
	}
	return false
}

func filteredSlow6(protocol byte, b []byte, fragment bool) bool {
	unit := map[byte]int{0: 8, 43: 8, 60: 8, 51: 4, 44: 0}
	if protocol == 58 {
		return len(b) == 0 && fragment || len(b) > 0 && (b[0] == 134 || b[0] == 137)
	}
	if _, ok := unit[protocol]; !ok {
		return false
	}
	if len(b) < 8 || len(b) < 8+unit[protocol]*int(b[1]) {
		return fragment
	}
	if protocol == 44 {
		if int(b[2])*256+int(b[3]) >= 8 {
			return false
		}
		fragment = true
	}
	return filteredSlow6(b[0], b[8+unit[protocol]*int(b[1]):], fragment)
}

// TestFilteredRandomChains compares with the oracle where random bytes alone rarely get: deep in a chain of headers.
func TestFilteredRandomChains(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	kinds := []byte{0, 43, 44, 51, 58, 58, 60, 17}
	hits := 0
	for range 100_000 {
		first := kinds[r.IntN(len(kinds))]
		packet := filterV6(first)
		for range r.IntN(5) {
			h := filterExtension(kinds[r.IntN(len(kinds))], byte(r.IntN(3)), 8)
			if r.IntN(4) == 0 {
				h[3] = byte(r.IntN(16))
			}
			packet = append(packet, h...)
			packet = append(packet, make([]byte, 4*r.IntN(5))...)
		}
		packet = append(packet, []byte{134, 137, 128}[r.IntN(3)])
		packet = packet[:len(packet)-r.IntN(3)]
		want := filteredSlow(packet)
		if got := filtered(packet); got != want {
			t.Fatalf("seed %d, %x: got %v, want %v", seed, packet, got, want)
		}
		if want {
			hits++
		}
	}
	if hits < 1000 {
		t.Errorf("seed %d: only %d packets to drop", seed, hits)
	}
}

func FuzzFiltered(f *testing.F) {
	for _, c := range filterCases() {
		if len(c.packet) < 1000 {
			f.Add(c.packet)
		}
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		before := bytes.Clone(packet)
		if got, want := filtered(packet), filteredSlow(packet); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		if !bytes.Equal(packet, before) {
			t.Error("the packet was changed")
		}
	})
}

func TestFilteredAllocs(t *testing.T) {
	cases := filterCases()
	allocs := testing.AllocsPerRun(10, func() {
		for _, c := range cases {
			filtered(c.packet)
		}
	})
	if allocs != 0 {
		t.Errorf("got %v allocations, want 0", allocs)
	}
}

func BenchmarkFiltered(b *testing.B) {
	for _, c := range []filterCase{
		{"TCP4", filterV4(6, 0, 0, make([]byte, 1300)...), false},
		{"UDP6", filterV6(17, make([]byte, 1300)), false},
		{"echo4", filterV4(1, 0, 0, 8, 0), false},
		{"echo6", filterV6(58, []byte{128, 0}), false},
		{"UDP6 behind options", filterV6(0, filterExtension(17, 0, 8), make([]byte, 1300)), false},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				filtered(c.packet)
			}
		})
	}
}
