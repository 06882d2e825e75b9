package main

import (
	"math"
	"slices"
)

// spread is what a series of samples comes to: its median and the middle half of it.
type spread struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`  // a quarter of the samples is below
	High   float64 `json:"high"` // a quarter is above
	N      int     `json:"n"`
}

// summarize leaves out samples that are not a number: what was not measured.
func summarize(samples []float64) spread {
	var s []float64
	for _, x := range samples {
		if !math.IsNaN(x) && !math.IsInf(x, 0) {
			s = append(s, x)
		}
	}
	slices.Sort(s)
	return spread{Median: quantile(s, 0.5), Low: quantile(s, 0.25), High: quantile(s, 0.75), N: len(s)}
}

// quantile interpolates in a sorted series; NaN in an empty one.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// ratios divides ours by the peer's, round by round: what disturbs a whole round meets both.
func ratios(ours, peer []float64) []float64 {
	r := make([]float64, min(len(ours), len(peer)))
	for i := range r {
		r[i] = ours[i] / peer[i]
	}
	return r
}
