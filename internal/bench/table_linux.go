package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// row is a line of the table: a metric of a case, ours beside one peer, or ours alone.
type row struct {
	Suite, Case, Metric, Unit string
	Peer                      string
	Ours, Theirs, Ratio       spread
	Budget                    string
	Short                     bool
	digits                    int
}

// rows makes the lines of a result: of each metric ours alone where it has an absolute budget or no peer, and beside each peer.
func (r *result) rows() []row {
	var rows []row
	at := slices.Index(r.ways, ours)
	for m, metric := range r.metrics {
		base := row{Suite: r.suite, Case: r.name, Metric: metric.name, Unit: metric.unit, digits: metric.digits}
		var mine []float64
		if at >= 0 {
			mine = r.samples[at][m]
			base.Ours = summarize(mine)
		}
		if b, ok := r.budget(metric.name, ""); ok || len(r.ways) == 1 {
			alone := base
			if ok && alone.Ours.N > 0 {
				alone.Budget, alone.Short = b.verdict(alone.Ours.Median, metric.unit), !b.metBy(alone.Ours.Median)
			}
			rows = append(rows, alone)
		}
		for way, name := range r.ways {
			theirs := r.samples[way][m]
			if way == at || summarize(theirs).N == 0 {
				continue
			}
			line := base
			line.Peer, line.Theirs, line.Ratio = name, summarize(theirs), summarize(ratios(mine, theirs))
			if b, ok := r.budget(metric.name, name); ok && line.Ratio.N > 0 {
				line.Budget, line.Short = b.verdict(line.Ratio.Median, ""), !b.metBy(line.Ratio.Median)
			}
			rows = append(rows, line)
		}
	}
	return rows
}

func (r *result) budget(metric, against string) (budget, bool) {
	for _, b := range r.budgets {
		if b.metric == metric && b.against == against {
			return b, true
		}
	}
	return budget{}, false
}

// writeTable prints the rows in columns as wide as they need to be.
func writeTable(w io.Writer, rows []row) error {
	lines := [][]string{{"suite", "case", "ours", "peer", "ratio", "budget"}}
	last := ""
	for _, r := range rows {
		suite, name := r.Suite, r.Case+": "+r.Metric
		mine := ""
		if r.Suite+name == last {
			suite, name = "", ""
		} else {
			last = r.Suite + name
			mine = r.number(r.Ours.Median) + " " + r.Unit
		}
		peer, ratio := "", ""
		if r.Peer != "" {
			peer, ratio = r.Peer+" "+r.number(r.Theirs.Median), r.Ratio.String()
		}
		lines = append(lines, []string{suite, name, mine, peer, ratio, r.Budget})
	}
	var widths [6]int
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range lines {
		var b strings.Builder
		for i, cell := range line {
			b.WriteString(cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(b.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

func (r row) number(x float64) string {
	if math.IsNaN(x) {
		return "-"
	}
	return fmt.Sprintf("%.*f", r.digits, x)
}

// String is the median with the middle half of the series: "1.24 (1.20-1.31)".
func (s spread) String() string {
	if s.N == 0 {
		return "-"
	}
	digits := 2
	switch {
	case s.Median >= 100:
		digits = 0
	case s.Median >= 10:
		digits = 1
	}
	return fmt.Sprintf("%.*f (%.*f-%.*f)", digits, s.Median, digits, s.Low, digits, s.High)
}
