package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// ours is the name of the way that is the library's, first in every case.
const ours = "overlay"

// benchCase is one thing that several ways do in turn.
type benchCase struct {
	suite, name string
	what        string // what is measured, in a sentence
	step        float64
	quick       bool // part of -quick
	kernel      bool // needs network namespaces and TUN devices
	ways        []string
	metrics     []metric
	budgets     []budget
	moreRounds  int // times as many as of others, for short samples; 0: as many
	// open prepares all ways; what it returns takes a sample of one of them, and cleans up.
	open func(o *options, c *benchCase) (*session, error)
}

// metric is one number of a sample.
type metric struct {
	name, unit string
	digits     int // behind the point
}

// session is a case in progress.
type session struct {
	sample func(way, round int) ([]float64, error) // one number for each metric; round is negative while warming up
	close  func()
}

// budget is a promise about the median of a metric, or of its ratio ours to a peer's.
type budget struct {
	metric  string
	against string // a way; "": the bound is absolute, in the metric's unit
	atLeast bool
	bound   float64
	aim     float64 // what would be better still; 0: nothing
}

func atLeast(metric, against string, bound float64) budget {
	return budget{metric: metric, against: against, atLeast: true, bound: bound}
}

func atMost(metric, against string, bound float64) budget {
	return budget{metric: metric, against: against, bound: bound}
}

func (b budget) metBy(x float64) bool { return b.reaches(x, b.bound) }

func (b budget) reaches(x, bound float64) bool {
	if math.IsNaN(x) {
		return false
	}
	if b.atLeast {
		return x >= bound
	}
	return x <= bound
}

// verdict is the last column of the table.
func (b budget) verdict(x float64, unit string) string {
	sign := "≤"
	if b.atLeast {
		sign = "≥"
	}
	text := fmt.Sprintf("%s %v", sign, b.bound)
	if b.against == "" && unit != "" {
		text += " " + unit
	}
	if b.aim != 0 {
		text += fmt.Sprintf(", aim %v", b.aim)
		if b.reaches(x, b.aim) {
			text += " reached"
		}
	}
	if b.metBy(x) {
		return text + "  ok"
	}
	return text + "  short"
}

// suites are all there are, in the order of the table.
var suites = []struct {
	name  string
	what  string
	step  float64 // seconds that a sample takes, about
	cases func() []benchCase
}{
	{"relay", "packets through two devices in one process", 1.4, relayCases},
	{"lookup", "the gateways to a destination", 0.1, lookupCases},
	{"gateways", "one gateway for a packet", 0.06, gatewaysCases},
	{"churn", "learned routes that change", 1.3, churnCases},
	{"install", "routes into the kernel", 1.5, installCases},
	{"reload", "a new Config", 0.2, reloadCases},
	{"watch", "the kernel's routes, followed", 1, watchCases},
	{"lifecycle", "a device's beginning and end", 0.05, lifecycleCases},
	{"memory", "bytes a route", 2, memoryCases},
}

// choose returns the cases that the options ask for.
func choose(o *options) ([]benchCase, error) {
	known := map[string]bool{}
	var chosen []benchCase
	for _, s := range suites {
		known[s.name] = true
		if len(o.suites) > 0 && !slices.Contains(o.suites, s.name) {
			continue
		}
		for _, c := range s.cases() {
			c.suite, c.step = s.name, s.step
			if o.quick && !c.quick || !strings.Contains(c.name, o.only) {
				continue
			}
			c.ways = slices.DeleteFunc(c.ways, func(way string) bool {
				return len(o.ways) > 0 && way != ours && !slices.Contains(o.ways, way)
			})
			chosen = append(chosen, c)
		}
	}
	for _, name := range o.suites {
		if !known[name] {
			return nil, fmt.Errorf("there is no suite %q; -list tells which there are", name)
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("no case is left to run")
	}
	return chosen, nil
}

func list(cases []benchCase) string {
	var b strings.Builder
	for _, c := range cases {
		quick := ""
		if c.quick {
			quick = " (quick)"
		}
		fmt.Fprintf(&b, "%s / %s%s\n    %s\n    ways: %s\n", c.suite, c.name, quick, c.what, strings.Join(c.ways, ", "))
	}
	return b.String()
}
