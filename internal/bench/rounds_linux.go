package main

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// result is all that was measured of a case.
type result struct {
	benchCase
	samples  [][][]float64 // by way, metric, round
	failures map[string]error
}

// runAll runs the cases one after the other; a case that fails does not keep the others from running.
func runAll(ctx context.Context, o *options, cases []benchCase, p *progress) []*result {
	var results []*result
	for i := range cases {
		if ctx.Err() != nil {
			break
		}
		r := newResult(cases[i])
		results = append(results, r)
		p.begin(cases, i, o.rounds)
		if err := r.run(ctx, o, p); err != nil {
			r.failures[""] = err
		}
	}
	p.end()
	return results
}

func newResult(c benchCase) *result {
	r := &result{benchCase: c, samples: make([][][]float64, len(c.ways)), failures: map[string]error{}}
	for way := range r.samples {
		r.samples[way] = make([][]float64, len(c.metrics))
	}
	return r
}

// run lets the ways take turns, round by round. The first round warms up and is dropped.
func (r *result) run(ctx context.Context, o *options, p *progress) error {
	if r.kernel && o.noKernel != nil {
		return o.noKernel
	}
	profilePath = profileName(o, &r.benchCase, "all")
	s, err := r.open(o, &r.benchCase)
	if err != nil {
		return err
	}
	defer s.close()
	for round := -1; round < r.rounds(o.rounds); round++ {
		for way, name := range r.ways {
			if ctx.Err() != nil {
				return errInterrupted
			}
			if r.failures[name] != nil {
				r.add(way, nil)
				continue
			}
			p.step(round, name)
			profilePath = profileName(o, &r.benchCase, name)
			values, err := s.sample(way, round)
			if err != nil {
				r.failures[name] = err
			}
			p.took()
			if round >= 0 {
				r.add(way, values)
			}
		}
	}
	return nil
}

// rounds returns how many rounds the case takes where n are asked for.
func (c *benchCase) rounds(n int) int { return n * max(1, c.moreRounds) }

var errInterrupted = errors.New("interrupted")

func (r *result) add(way int, values []float64) {
	for m := range r.metrics {
		x := math.NaN()
		if m < len(values) {
			x = values[m]
		}
		r.samples[way][m] = append(r.samples[way][m], x)
	}
}

// complete says whether everything was measured.
func (r *result) complete() bool { return len(r.failures) == 0 }

func (r *result) failureLines() []string {
	var lines []string
	for _, way := range append([]string{""}, r.ways...) {
		if err := r.failures[way]; err != nil {
			name := r.suite + " / " + r.name
			if way != "" {
				name += " / " + way
			}
			lines = append(lines, fmt.Sprintf("%s: %v", name, err))
		}
	}
	return lines
}
