package main

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSummarize(t *testing.T) {
	nan := math.NaN()
	tests := []struct {
		samples []float64
		want    spread
	}{
		{[]float64{3}, spread{3, 3, 3, 1}},
		{[]float64{4, 1, 3, 2}, spread{2.5, 1.75, 3.25, 4}},
		{[]float64{5, nan, 1, 3, math.Inf(1)}, spread{3, 2, 4, 3}},
	}
	for _, test := range tests {
		if got := summarize(test.samples); got != test.want {
			t.Errorf("summarize(%v) = %+v, want %+v", test.samples, got, test.want)
		}
	}
	if got := summarize([]float64{nan}); got.N != 0 || !math.IsNaN(got.Median) {
		t.Errorf("of nothing: %+v", got)
	}
}

// What slows both down in a round does not move the ratio.
func TestRatiosArePairwise(t *testing.T) {
	mine, peer := []float64{10, 5, 20, 10}, []float64{5, 2.5, 10, math.NaN()}
	if got, want := summarize(ratios(mine, peer)), (spread{2, 2, 2, 3}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestVerdict(t *testing.T) {
	tests := []struct {
		b    budget
		x    float64
		want string
	}{
		{atLeast("m", "peer", 1.5), 1.5, "≥ 1.5  ok"},
		{atLeast("m", "peer", 1.5), 1.49, "≥ 1.5  short"},
		{atMost("m", "", 50), 50, "≤ 50 µs  ok"},
		{atMost("m", "", 50), 51, "≤ 50 µs  short"},
		{atMost("m", "", 50), math.NaN(), "≤ 50 µs  short"},
		{budget{metric: "m", against: "peer", atLeast: true, bound: 2, aim: 2.5}, 2.2, "≥ 2, aim 2.5  ok"},
		{budget{metric: "m", against: "peer", atLeast: true, bound: 2, aim: 2.5}, 2.6, "≥ 2, aim 2.5 reached  ok"},
	}
	for _, test := range tests {
		unit := ""
		if test.b.against == "" {
			unit = "µs"
		}
		if got := test.b.verdict(test.x, unit); got != test.want {
			t.Errorf("%+v of %v: got %q, want %q", test.b, test.x, got, test.want)
		}
	}
}

func sampleResult() *result {
	r := newResult(benchCase{
		suite: "relay", name: "tcp", what: "What it measures.",
		ways:    []string{ours, "peer", "lost"},
		metrics: []metric{{"rate", "Gbit/s", 2}, {"time", "ms", 0}},
		budgets: []budget{atLeast("rate", "peer", 3), atMost("time", "", 7)},
	})
	for round := range 3 {
		r.add(0, []float64{float64(4 + 2*round), 7})
		r.add(1, []float64{float64(2 + round)})
		r.add(2, nil)
	}
	r.failures["lost"] = errors.New("went away")
	return r
}

func TestTable(t *testing.T) {
	r := sampleResult()
	rows := r.rows()
	var b strings.Builder
	if err := writeTable(&b, rows); err != nil {
		t.Fatal(err)
	}
	want := strings.Join([]string{
		"suite  case       ours         peer       ratio             budget",
		"relay  tcp: rate  6.00 Gbit/s  peer 3.00  2.00 (2.00-2.00)  ≥ 3  short",
		"relay  tcp: time  7 ms                                      ≤ 7 ms  ok",
		"",
	}, "\n")
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	if short := slices.IndexFunc(rows, func(r row) bool { return r.Short }); short != 0 {
		t.Errorf("row %d is short, want 0", short)
	}
	if r.complete() || len(r.failureLines()) != 1 || r.failureLines()[0] != "relay / tcp / lost: went away" {
		t.Errorf("failures: %q", r.failureLines())
	}
}

func TestReportIsJSON(t *testing.T) {
	r := sampleResult()
	b, err := json.Marshal(newReport([]*result{r}, r.rows())) // which knows no NaN
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `"way":"lost","metric":"rate","unit":"Gbit/s","rounds":[null,null,null]`) {
		t.Errorf("what was not measured is not null: %s", b)
	}
}

func TestDraw(t *testing.T) {
	dir := t.TempDir()
	if err := drawSuites(dir, []*result{sampleResult()}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "relay.svg"))
	if err != nil || !strings.Contains(string(b), "<svg") || !strings.Contains(string(b), "Gbit/s") {
		t.Errorf("%v, %.200s", err, b)
	}
}

// Every case has a sentence, a name of its own, ours first or alone, and budgets that name what there is; every suite has one quick case.
func TestCases(t *testing.T) {
	for _, s := range suites {
		seen, quick := map[string]bool{}, 0
		for _, c := range s.cases() {
			if c.what == "" || !strings.HasSuffix(c.what, ".") || seen[c.name] || c.open == nil || c.ways[0] != ours || len(c.metrics) == 0 {
				t.Errorf("%s / %s: %+v", s.name, c.name, c)
			}
			seen[c.name] = true
			for _, b := range c.budgets {
				named := func(m metric) bool { return m.name == b.metric }
				if b.against != "" && !slices.Contains(c.ways, b.against) || !slices.ContainsFunc(c.metrics, named) {
					t.Errorf("%s / %s: a budget of nothing: %+v", s.name, c.name, b)
				}
			}
			if c.quick {
				quick++
			}
		}
		if quick != 1 {
			t.Errorf("%s has %d quick cases, want 1", s.name, quick)
		}
	}
}

func TestChoose(t *testing.T) {
	if _, err := choose(&options{suites: []string{"nonsense"}}); err == nil {
		t.Error("an unknown suite was accepted")
	}
	cases, err := choose(&options{suites: []string{"relay"}, quick: true, ways: []string{wayCeiling}})
	if err != nil || len(cases) != 1 || !slices.Equal(cases[0].ways, []string{ours, wayCeiling}) {
		t.Errorf("got %+v, %v", cases, err)
	}
}

func TestInternet(t *testing.T) {
	for _, version := range []int{4, 6} {
		n := newInternet(version, 1)
		list := n.prefixes(5000)
		again := newInternet(version, 1).prefixes(5000)
		if !slices.Equal(list, again) {
			t.Errorf("IPv%d: the same seed made other routes", version)
		}
		total := 0
		for _, s := range n.shares {
			total += s.count
		}
		if total != 1000 {
			t.Errorf("IPv%d: shares of %d, want 1000", version, total)
		}
		for _, p := range list {
			if p != p.Masked() || p.Addr().Is4() != (version == 4) || !p.Contains(n.inside(p)) {
				t.Fatalf("IPv%d: %v", version, p)
			}
		}
	}
}

func TestSumBytes(t *testing.T) {
	for size := range 200 {
		b := make([]byte, size)
		var want uint32
		for i := range b {
			b[i] = byte(i*31 + size)
			want += uint32(b[i]) << (8 * (i % 2)) // little-endian words
		}
		for want > 0xffff {
			want = want>>16 + want&0xffff
		}
		if got := sumBytes(b); uint32(got) != want {
			t.Fatalf("%d bytes: got %#x, want %#x", size, got, want)
		}
	}
}
