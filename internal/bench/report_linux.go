package main

import (
	"bytes"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report is the JSON file.
type report struct {
	Time     time.Time         `json:"time"`
	Machine  machine           `json:"machine"`
	Versions map[string]string `json:"versions"` // of the modules measured, by path
	Cases    []caseReport      `json:"cases"`
	Rows     []rowReport       `json:"rows"`
}

type machine struct {
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Memory string `json:"memory"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	OS     string `json:"os"`
}

type caseReport struct {
	Suite    string            `json:"suite"`
	Case     string            `json:"case"`
	What     string            `json:"what"`
	Samples  []sampleReport    `json:"samples"`
	Failures map[string]string `json:"failures,omitempty"` // by way; "": all
}

type sampleReport struct {
	Way    string     `json:"way"`
	Metric string     `json:"metric"`
	Unit   string     `json:"unit"`
	Rounds []*float64 `json:"rounds"` // null: not measured
}

type rowReport struct {
	Suite  string  `json:"suite"`
	Case   string  `json:"case"`
	Metric string  `json:"metric"`
	Unit   string  `json:"unit"`
	Ours   *spread `json:"ours,omitempty"`
	Peer   string  `json:"peer,omitempty"`
	Theirs *spread `json:"theirs,omitempty"`
	Ratio  *spread `json:"ratio,omitempty"`
	Budget string  `json:"budget,omitempty"`
}

func newReport(results []*result, rows []row) report {
	r := report{Time: time.Now().UTC(), Machine: thisMachine(), Versions: versions()}
	for _, res := range results {
		c := caseReport{Suite: res.suite, Case: res.name, What: res.what}
		for way, name := range res.ways {
			for m, metric := range res.metrics {
				s := sampleReport{Way: name, Metric: metric.name, Unit: metric.unit}
				for _, x := range res.samples[way][m] {
					s.Rounds = append(s.Rounds, finite(x))
				}
				c.Samples = append(c.Samples, s)
			}
		}
		for way, err := range res.failures {
			if c.Failures == nil {
				c.Failures = map[string]string{}
			}
			c.Failures[way] = err.Error()
		}
		r.Cases = append(r.Cases, c)
	}
	for _, x := range rows {
		r.Rows = append(r.Rows, rowReport{
			Suite: x.Suite, Case: x.Case, Metric: x.Metric, Unit: x.Unit, Peer: x.Peer, Budget: x.Budget,
			Ours: ifMeasured(x.Ours), Theirs: ifMeasured(x.Theirs), Ratio: ifMeasured(x.Ratio),
		})
	}
	return r
}

func ifMeasured(s spread) *spread {
	if s.N == 0 {
		return nil
	}
	return &s
}

func finite(x float64) *float64 {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return nil
	}
	return &x
}

func thisMachine() machine {
	m := machine{CPU: field("/proc/cpuinfo", "model name"), CPUs: runtime.NumCPU(), Memory: field("/proc/meminfo", "MemTotal"), Go: runtime.Version()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = string(bytes.TrimRight(u.Release[:], "\x00"))
	}
	if b, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				m.OS = strings.Trim(name, `"`)
			}
		}
	}
	return m
}

// field returns the first value of a key in a file of lines such as "key : value".
func field(path, key string) string {
	b, _ := os.ReadFile(path)
	for line := range strings.SplitSeq(string(b), "\n") {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func versions() map[string]string {
	v := map[string]string{}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, dep := range info.Deps {
		switch dep.Path {
		case "golang.zx2c4.com/wireguard", "github.com/tailscale/wireguard-go", "github.com/songgao/water", "github.com/slackhq/nebula",
			"github.com/gaissmai/bart", "github.com/vishvananda/netlink":
			v[dep.Path] = dep.Version
		}
	}
	return v
}
