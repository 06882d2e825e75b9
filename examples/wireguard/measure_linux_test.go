package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"

	"github.com/google/pprof/profile"
	"github.com/sirupsen/logrus"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

var (
	rounds  = flag.Int("rounds", 1, "rounds of TestBesideUpstream, each of one stream through either tunnel")
	seconds = flag.Int("seconds", 1, "how long each of these streams lasts")
	keep    = flag.String("profiles", "", "where to keep the CPU profiles of the last round; empty: nowhere")
)

// helperMeasured is a daemon that profiles itself, on a tunnel of either kind: all but the tunnel is the same code.
const helperMeasured = "measured"

// Kinds of tunnel, and the daemon that upstream itself builds, which has no profile.
const (
	ours      = "overlay"
	upstreams = "upstream"
	original  = "wireguard-go"
)

// measured is that daemon: its arguments are the kind, a configuration file and where its profile goes.
func measured() error {
	kind, path := os.Args[1], os.Args[2]
	f, err := os.Create(os.Args[3])
	if err != nil {
		return err
	}
	defer f.Close()
	begin := beginOurs
	if kind == upstreams {
		begin = beginUpstreams
	}
	end, err := begin(path)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	err = nstest.Ready("up")
	pprof.StopCPUProfile()
	return errors.Join(err, end())
}

func beginOurs(path string) (end func() error, err error) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	d, err := start(context.Background(), path, log)
	if err != nil {
		return nil, err
	}
	return d.Close, nil
}

// beginUpstreams is the same with upstream's tunnel, but for addresses and link.
func beginUpstreams(path string) (end func() error, err error) {
	s, err := load(context.Background(), path, nil)
	if err != nil {
		return nil, err
	}
	native, err := tun.CreateTUN(s.cfg.Name, s.cfg.MTU)
	if err != nil {
		return nil, err
	}
	wg := device.NewDevice(native, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	end = func() error { wg.Close(); return nil }
	if err := errors.Join(wg.IpcSet(s.commands(nil, "")), wg.Up()); err != nil {
		return nil, errors.Join(err, end())
	}
	return end, nil
}

// figures are what one stream came to.
type figures struct {
	gigabits     float64 // a second
	nanoseconds  float64 // of both daemons' processor time for each KiB
	share        float64 // of the processor time that the tunnels take, in per cent
	shareRead    float64
	shareOutside float64 // what of share is not spent in the kernel
}

// TestBesideUpstream has iperf3 stream TCP through daemons on our tunnel and on upstream's, by turns, and reports what they cost. As a
// test it only sees that this works. To measure:
//
//	go test -C examples/wireguard -run BesideUpstream -v -timeout 300s . -rounds 5 -seconds 3
func TestBesideUpstream(t *testing.T) {
	nstest.Require(t, nstest.Program("iperf3"))
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) { besideUpstream(t, family) })
	}
}

func besideUpstream(t *testing.T, family int) {
	all := map[string][]figures{}
	for round := range *rounds {
		kinds := []string{ours, upstreams, original}
		if round%2 == 1 {
			slices.Reverse(kinds)
		}
		for _, kind := range kinds {
			t.Run(fmt.Sprintf("%d %s", round, kind), func(t *testing.T) {
				all[kind] = append(all[kind], measure(t, kind, family))
			})
		}
	}
	for _, row := range []struct {
		title string
		of    func(figures) float64
	}{
		{"Gbit/s", func(f figures) float64 { return f.gigabits }},
		{"ns of both for a KiB", func(f figures) float64 { return f.nanoseconds }},
		{"% of it in the tunnel", func(f figures) float64 { return f.share }},
		{"% reading from it", func(f figures) float64 { return f.shareRead }},
		{"% writing to it", func(f figures) float64 { return f.share - f.shareRead }},
		{"% in it, kernel left out", func(f figures) float64 { return f.shareOutside }},
	} {
		line := fmt.Sprintf("%-28s", row.title)
		for _, kind := range []string{ours, upstreams, original} {
			if kind == original && strings.HasPrefix(row.title, "%") {
				continue
			}
			var values []float64
			for _, f := range all[kind] {
				values = append(values, row.of(f))
			}
			if len(values) == 0 {
				return // skipped
			}
			slices.Sort(values)
			line += fmt.Sprintf("  %s %8.2f (%.2f…%.2f)", kind, values[len(values)/2], values[0], values[len(values)-1])
		}
		t.Log(line)
	}
}

// received is what iperf3 says of it.
type received struct {
	Bytes float64
	Bits  float64 `json:"bits_per_second"`
}

// iperf has iperf3 stream to another host.
func (h *host) iperf(to *host, family int) received {
	h.Helper()
	server := to.ns.Start(h, "iperf3", "-s", "-1", "-B", to.overlay(family), "--forceflush")
	server.Expect(h, "Server listening")
	out := h.ns.Run(h, fmt.Sprintf("iperf3 -c %s -t %d --json", to.overlay(family), *seconds))
	var report struct {
		End struct {
			Received received `json:"sum_received"`
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.End.Received.Bytes < 1e6 {
		h.Fatalf("%v: %.300s", err, out)
	}
	if err := server.Wait(); err != nil {
		h.Errorf("the server: %v", err)
	}
	return report.End.Received
}

func measure(t *testing.T, kind string, family int) (f figures) {
	hosts := newHosts(t, 2)
	one, two := hosts[0], hosts[1]
	one.configure(two.peerSection(4))
	two.configure(one.peerSection(4))
	for _, h := range hosts {
		if kind == original {
			h.runUpstream()
			continue
		}
		h.daemon, _ = h.ns.StartHelper(h, helperMeasured, nstest.HelperOptions{Args: []string{kind, h.conf(), h.profile()}})
		if kind == upstreams {
			h.assign()
		}
	}
	one.ns.Run(t, "ping -q -c 3 -i 0.01 -W 5 "+two.overlay(4))
	before := one.processor() + two.processor()
	got := one.iperf(two, family)
	f.gigabits = got.Bits / 1e9
	f.nanoseconds = float64((one.processor() + two.processor() - before).Nanoseconds()) / (got.Bytes / 1024)
	if kind == original {
		return f
	}
	for _, h := range hosts {
		if err := h.daemon.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	f.profileOf(t, one.profile(), two.profile())
	if *keep != "" {
		for i, h := range hosts {
			text, err := os.ReadFile(h.profile())
			if err != nil {
				t.Fatal(err)
			}
			h.writeFile(filepath.Join(*keep, kind+"-"+[]string{"sender", "receiver"}[i]+".pprof"), string(text))
		}
	}
	return f
}

// assign does what our daemon does by itself.
func (h *host) assign() {
	h.Helper()
	h.ns.Run(h, "ip", "addr", "add", h.overlay(4)+"/24", "dev", h.link())
	h.ns.Run(h, "ip", "addr", "add", h.overlay(6)+"/64", "dev", h.link(), "nodad")
	h.ns.Run(h, "ip", "link", "set", h.link(), "up", "mtu", "1420")
}

func (h *host) profile() string { return filepath.Join(h.dir, "cpu.pprof") }

// processor is the time that the daemon has had so far, in the kernel too.
func (h *host) processor() time.Duration {
	h.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.daemon.Pid()))
	if err != nil {
		h.Fatal(err)
	}
	_, after, _ := strings.Cut(string(stat), ") ") // what is before may hold spaces
	var ticks int64
	for _, field := range strings.Fields(after)[11:13] { // utime and stime, in 1/100 s
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			h.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// profileOf says which share of the time in the profiles is the tunnel's.
func (f *figures) profileOf(t *testing.T, paths ...string) {
	t.Helper()
	var all, reading, writing, outside int64
	for _, path := range paths {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		p, err := profile.Parse(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, sample := range p.Sample {
			all += sample.Value[1]
			read, write, kernel := false, false, false
			for i, location := range sample.Location {
				for _, line := range location.Line {
					name := line.Function.Name
					kernel = kernel || i == 0 && strings.HasSuffix(name, ".Syscall6")
					read = read || strings.HasSuffix(name, ".(*tunnel).Read") || strings.HasSuffix(name, ".(*NativeTun).Read")
					write = write || strings.HasSuffix(name, ".(*tunnel).Write") || strings.HasSuffix(name, ".(*NativeTun).Write")
				}
			}
			switch {
			case read:
				reading += sample.Value[1]
			case write:
				writing += sample.Value[1]
			default:
				continue
			}
			if !kernel {
				outside += sample.Value[1]
			}
		}
	}
	if all > 0 {
		percent := 100 / float64(all)
		f.share, f.shareRead, f.shareOutside = float64(reading+writing)*percent, float64(reading)*percent, float64(outside)*percent
	}
}
