//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"example.com/overlay/examples/internal/stage"
)

// report writes a line for each host.
func (l *lab) report(w io.Writer, results []result) {
	columns := []stage.Column{
		{Title: "HOST"},
		{Title: "ADDRESSES"},
		{Title: "DEVICE"},
		{Title: "RTT IPv4", Right: true},
		{Title: "RTT IPv6", Right: true},
		{Title: "LOSS", Right: true},
		{Title: "Gbit/s", Right: true},
		{Title: "GATEWAY CHOSEN"},
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
	stage.WriteTable(w, columns, rows)
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
