// Command bench measures the overlay library beside its peers, in throw-away network namespaces, and prints one table of ratios
// that were taken in one run:
//
//	go run -C internal/bench . [-suite relay,lookup] [-rounds N] [-quick] [-json FILE] [-svg DIR] [-list]
//
// In every round the ways of a case take turns; the first round warms up and is dropped. The table has each way's median and the
// median of the ratios round by round, ours divided by the peer's, with the middle half of those ratios in parentheses. The exit
// code is 1 where a budget is missed, 2 where something could not be measured.
//
// It runs on Linux, as root, or as a user who may make user namespaces.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are the command line's.
type options struct {
	suites, ways []string
	only         string
	rounds       int
	quick        bool
	list         bool
	budgets      bool
	json, svg    string
	profiles     string
	lap          time.Duration // of a sample of traffic
	noKernel     error         // why there are no namespaces to measure in
}

const (
	exitShort      = 1
	exitIncomplete = 2
)

func main() {
	if role := os.Getenv(roleMarker); role != "" {
		os.Exit(beChild(role))
	}
	o := parse()
	cases, err := choose(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitIncomplete)
	}
	if o.list {
		fmt.Print(list(cases))
		return
	}
	if code, done := isolate(o, cases); done {
		os.Exit(code)
	}
	os.Exit(run(o, cases))
}

func parse() *options {
	o := new(options)
	var suites, ways string
	flag.StringVar(&suites, "suite", "", "the `suites` to run, separated by commas (all)")
	flag.StringVar(&ways, "ways", "", "the `peers` to measure beside ours, separated by commas (all)")
	flag.StringVar(&o.only, "case", "", "run only the cases whose name contains `text`")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds beside the one that warms up (5, with -quick 3)")
	flag.DurationVar(&o.lap, "lap", time.Second, "how long a sample of traffic takes")
	flag.BoolVar(&o.quick, "quick", false, "one case of every suite, in under two minutes")
	flag.BoolVar(&o.list, "list", false, "list the cases and what they measure")
	flag.BoolVar(&o.budgets, "budgets", false, "print only the lines that have a budget")
	flag.StringVar(&o.json, "json", "", "write every sample, the machine and the versions to `file`")
	flag.StringVar(&o.svg, "svg", "", "draw a bar chart of each suite in `directory`")
	flag.StringVar(&o.profiles, "debug-pprof", "", "write CPU profiles of the relays to `directory`")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "bench: unexpected argument", flag.Arg(0))
		os.Exit(exitIncomplete)
	}
	o.suites, o.ways = fields(suites), fields(ways)
	if o.rounds <= 0 {
		o.rounds = 5
		if o.quick {
			o.rounds = 3
		}
	}
	return o
}

func fields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// run measures, prints and returns the exit code. The first signal ends it after the sample in progress, with all cleaned up; a
// second one at once, and then the kernel cleans up: nothing that the bench makes outlives its processes.
func run(o *options, cases []benchCase) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	defer stop()
	results := runAll(ctx, o, cases, newProgress(os.Stderr))

	var rows []row
	code := 0
	for _, r := range results {
		rows = append(rows, r.rows()...)
	}
	for _, r := range rows {
		if r.Short {
			code = exitShort
		}
	}
	shown := rows
	if o.budgets {
		shown = slices.DeleteFunc(slices.Clone(rows), func(r row) bool { return r.Budget == "" })
	}
	if err := writeTable(os.Stdout, shown); err != nil {
		code = exitIncomplete
	}
	for _, r := range results {
		for _, line := range r.failureLines() {
			fmt.Fprintln(os.Stderr, "not measured:", line)
			code = exitIncomplete
		}
	}
	if err := publish(o, results, rows); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = exitIncomplete
	}
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "interrupted: the table is not complete")
		code = exitIncomplete
	}
	return code
}

// publish writes what the options ask for beside the table.
func publish(o *options, results []*result, rows []row) error {
	if o.json != "" {
		b, err := json.MarshalIndent(newReport(results, rows), "", "\t")
		if err == nil {
			err = os.WriteFile(o.json, append(b, '\n'), 0o666)
		}
		if err != nil {
			return err
		}
	}
	if o.svg != "" {
		return drawSuites(o.svg, results)
	}
	return nil
}
