//go:build linux

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// column is a title and how the cells below are aligned.
type column struct {
	title string
	right bool
}

// writeTable writes rows below their titles, each column as wide as its widest cell.
func writeTable(w io.Writer, columns []column, rows [][]string) {
	titles := make([]string, len(columns))
	widths := make([]int, len(columns))
	for i, c := range columns {
		titles[i] = c.title
		for _, row := range append(rows[:len(rows):len(rows)], titles) {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	for _, row := range slices.Insert(slices.Clone(rows), 0, titles) {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if columns[i].right {
				line.WriteString(pad + cell + "  ")
			} else {
				line.WriteString(cell + pad + "  ")
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

// report writes a line for each host.
func (l *lab) report(w io.Writer, results []result) {
	columns := []column{
		{title: "HOST"},
		{title: "ADDRESSES"},
		{title: "DEVICE"},
		{title: "RTT IPv4", right: true},
		{title: "RTT IPv6", right: true},
		{title: "LOSS", right: true},
		{title: "Gbit/s", right: true},
		{title: "GATEWAY CHOSEN"},
	}
	var rows [][]string
	for i, h := range l.hosts {
		r := &results[i]
		rows = append(rows, []string{
			h.name,
			fmt.Sprintf("%v, %v", h.networks[0].Addr(), h.networks[1].Addr()),
			h.agent.dev.State().Name,
			formatRTT(r.rtt[0]), formatRTT(r.rtt[1]),
			formatLoss(r),
			fmt.Sprintf("%.2f", r.gigabits()),
			l.formatGateways(i, r),
		})
	}
	writeTable(w, columns, rows)
}

func formatRTT(d time.Duration) string {
	return fmt.Sprintf("%d µs", d.Microseconds())
}

func formatLoss(r *result) string {
	sent, lost := 0, 0
	for family := range families {
		sent, lost = sent+r.sent[family], lost+r.lost[family]
	}
	return fmt.Sprintf("%.0f %%", 100*float64(lost)/float64(max(sent, 1)))
}

// formatGateways says how the i-th host's flows were shared out, or that it is a gateway.
func (l *lab) formatGateways(i int, r *result) string {
	if i := i - len(l.clients()); i >= 0 {
		return fmt.Sprintf("(is one, weight %d)", weights[i])
	}
	var shares []string
	for i, gateway := range l.gateways() {
		both := 0.0
		for family := range families {
			both += r.share(family, i)
		}
		shares = append(shares, fmt.Sprintf("%s %.0f %%", gateway.name, 100*both/float64(len(families))))
	}
	return strings.Join(shares, ", ")
}
