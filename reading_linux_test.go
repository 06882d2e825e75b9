package overlay

import (
	"net/netip"
	"testing"
)

// BenchmarkReadingConfig is what a Reload of 100,000 routes costs before anything is done: it grows with the Config.
func BenchmarkReadingConfig(b *testing.B) {
	cfg := Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24"), netip.MustParsePrefix("fd42::1/64")}, Routes: many(100_000)}
	b.Run("Validate", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := cfg.Validate(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("clone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			cfg.clone()
		}
	})
	other := cfg.clone()
	b.Run("changedRoutes", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			changedRoutes(cfg.Routes, other.Routes)
		}
	})
}
