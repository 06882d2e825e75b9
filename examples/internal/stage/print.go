package stage

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Printer remembers why it could not write, so that not every line that is printed need ask.
type Printer struct {
	To  io.Writer
	Err error // the first; after it nothing is written
}

func (p *Printer) Write(b []byte) (n int, err error) {
	if p.Err != nil {
		return 0, p.Err
	}
	if n, err = p.To.Write(b); err != nil {
		p.Err = fmt.Errorf("print: %w", err)
	}
	return n, p.Err
}

// Progress returns a function that tells what has been done since it was called last, and how long that took.
func Progress(out io.Writer) func(what, format string, args ...any) {
	last := time.Now()
	return func(what, format string, args ...any) {
		now := time.Now()
		fmt.Fprintf(out, "  %-9s %-76s %6d ms\n", what, fmt.Sprintf(format, args...), now.Sub(last).Milliseconds())
		last = now
	}
}

// Column is a title and how the cells below are aligned.
type Column struct {
	Title string
	Right bool
}

// WriteTable writes rows below their titles, each column as wide as its widest cell.
func WriteTable(w io.Writer, columns []Column, rows [][]string) {
	titles := make([]string, len(columns))
	widths := make([]int, len(columns))
	for i, c := range columns {
		titles[i] = c.Title
		for _, row := range append(rows[:len(rows):len(rows)], titles) {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	for _, row := range slices.Insert(slices.Clone(rows), 0, titles) {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if columns[i].Right {
				line.WriteString(pad + cell + "  ")
			} else {
				line.WriteString(cell + pad + "  ")
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}
