package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// progress tells on stderr where the run is: in one line that is written over on a terminal, in plain lines elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	current  *benchCase
	cases    int
	number   int
	rounds   int
	done     float64 // seconds that the cases before were thought to take
	total    float64 // and all of them
	steps    int     // done of this case
	started  time.Time
}

func newProgress(f *os.File) *progress {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &progress{w: f, terminal: err == nil, started: time.Now()}
}

func (p *progress) begin(cases []benchCase, i, rounds int) {
	p.current, p.cases, p.number, p.rounds = &cases[i], len(cases), i+1, cases[i].rounds(rounds)
	p.done, p.total, p.steps = 0, 0, 0
	for n := range cases {
		if n == i {
			p.done = p.total
		}
		p.total += cases[n].step * float64(len(cases[n].ways)*(cases[n].rounds(rounds)+1))
	}
	if !p.terminal {
		fmt.Fprintf(p.w, "%s / %s (case %d of %d)%s\n", p.current.suite, p.current.name, p.number, p.cases, p.left())
	}
}

func (p *progress) step(round int, way string) {
	if !p.terminal {
		return
	}
	turn := fmt.Sprintf("round %d of %d", round+1, p.rounds)
	if round < 0 {
		turn = "warm-up"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s / %s (case %d of %d), %s, %s%s", p.current.suite, p.current.name, p.number, p.cases, turn, way, p.left())
}

func (p *progress) took() { p.steps++ }

// left scales what is thought to be left by how long it really took so far.
func (p *progress) left() string {
	done := p.done + float64(p.steps)*p.current.step
	scale := 1.0
	if done > 10 {
		scale = time.Since(p.started).Seconds() / done
	}
	left := time.Duration(scale * (p.total - done) * float64(time.Second))
	return fmt.Sprintf(", about %v left", left.Round(time.Second))
}

func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
