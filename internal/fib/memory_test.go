package fib

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"

	"example.com/overlay/internal/kernel"
)

// nthPrefix returns the i-th of many prefixes.
func nthPrefix(i int, is6 bool) netip.Prefix {
	x := uint32(i) * 2654435761 // spreads, and is a bijection
	if !is6 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, x))), 32)
	}
	var a [16]byte
	a[0], a[1] = 0x20, 0x01
	binary.BigEndian.PutUint32(a[4:], x)
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// filled returns a Table with n routes through three sets of gateways, drained.
func filled(t testing.TB, n int, is6 bool) *Table {
	t.Helper()
	table := New(Config{Link: ourLink, Protocol: ourProto})
	sets := []kernel.FIBRoute{
		parseRoute(t, []string{"0.0.0.0/0", "via", "10.0.0.2"}),
		parseRoute(t, []string{"0.0.0.0/0", "via", "10.0.0.2", "via", "10.0.0.3", "weight", "2"}),
		parseRoute(t, []string{"0.0.0.0/0", "on", "7"}),
	}
	for i := range n {
		r := &sets[i%len(sets)]
		r.Prefix = nthPrefix(i, is6)
		table.Apply(kernel.Created, r)
		if i%1000 == 0 {
			for range table.Changes() {
			}
		}
	}
	for range table.Changes() {
	}
	return table
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A learned route costs no more than 100 bytes here: half of what design.md, section 7, allows.
func TestMemory(t *testing.T) {
	n := 1_000_000
	if testing.Short() {
		n = 100_000
	}
	for _, is6 := range []bool{false, true} {
		before := heap()
		table := filled(t, n, is6)
		bytes := float64(heap()-before) / float64(n)
		t.Logf("IPv6 %v: %.1f bytes a route", is6, bytes)
		if table.Learned() != n || bytes > 100 {
			t.Errorf("%d learned, %.1f bytes a route, want %d and at most 100", table.Learned(), bytes, n)
		}
		runtime.KeepAlive(table)
	}
}

// What an event costs does not depend on how many routes there are.
func BenchmarkApply(b *testing.B) {
	for _, size := range []int{1_000, 100_000, 1_000_000} {
		for _, is6 := range []bool{false, true} {
			name := map[bool]string{false: "v4/", true: "v6/"}[is6] + map[int]string{1_000: "1k", 100_000: "100k", 1_000_000: "1M"}[size]
			b.Run(name, func(b *testing.B) {
				table := filled(b, size, is6)
				one := parseRoute(b, []string{"0.0.0.0/0", "via", "10.0.0.2"})
				other := parseRoute(b, []string{"0.0.0.0/0", "via", "10.0.0.2", "via", "10.0.0.3", "weight", "2"})
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					r := &one
					if i++; i&1 == 0 {
						r = &other
					}
					r.Prefix = nthPrefix(i*7919%size, is6)
					table.Apply(kernel.Replaced, r)
					for range table.Changes() {
					}
				}
			})
		}
	}
}

// Applying a change and reading what follows from it allocates nothing once there is room.
func TestApplyAllocates(t *testing.T) {
	table := filled(t, 1000, false)
	r := parseRoute(t, []string{"0.0.0.0/0", "via", "10.0.0.2"})
	r.Prefix = nthPrefix(5, false)
	got := testing.AllocsPerRun(1000, func() {
		table.Apply(kernel.Deleted, &r)
		table.Apply(kernel.Created, &r)
		for range table.Changes() {
		}
	})
	if got != 0 {
		t.Errorf("%v allocations a change", got)
	}
}
