package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/examples/internal/stage"
	"example.com/overlay/internal/nstest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The program itself, for tests that need it in a process of its own.
const program = "quickstart"

const nobody = 65534

func TestMain(m *testing.M) {
	nstest.Helper(program, func() error {
		os.Exit(start(os.Args[1:], os.Stdout, os.Stderr))
		return nil
	})
	if os.Getenv(marker) != "" { // the program, as an ordinary user, has started itself anew
		os.Exit(start(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(nstest.Main(m))
}

func TestRun(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	for _, hosts := range []int{3, 5} {
		t.Run(fmt.Sprint(hosts), func(t *testing.T) {
			nstest.Leaks(t)
			var out bytes.Buffer
			err := run(t.Context(), options{hosts: hosts, duration: 300 * time.Millisecond, verbose: true}, &out)
			if err != nil {
				t.Fatalf("run: %v\n%s", err, &out)
			}
			requireReport(t, out.String(), hosts)
		})
	}
}

// requireReport looks for a line with every host's name, for the last line, and for each State.
func requireReport(t *testing.T, out string, hosts int) {
	t.Helper()
	for n := 1; n <= hosts; n++ {
		if line := fmt.Sprintf("\nhost%d  10.42.0.%d, fd42::%x  overlay0", n, n, n); !strings.Contains(out, line) {
			t.Errorf("no line %q in:\n%s", line, out)
		}
	}
	if got := strings.Count(out, "device overlay0 index"); got != hosts {
		t.Errorf("%d States, want %d:\n%s", got, hosts, out)
	}
	if !strings.Contains(out, "agent.go") {
		t.Errorf("no hint to read agent.go in:\n%s", out)
	}
}

// TestNothingPrinted gives the program a file to print to that is always full: it fails, says why, and leaves nothing behind.
func TestNothingPrinted(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	nstest.Leaks(t)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	var stderr bytes.Buffer
	if code := start([]string{"-d", "100ms"}, full, &stderr); code != exitFailed || !strings.Contains(stderr.String(), "print: write /dev/full: no space left") {
		t.Errorf("exit code %d, want %d; it says:\n%s", code, exitFailed, &stderr)
	}
}

// TestInterruptedRun cancels at moments from the first to the last step.
func TestInterruptedRun(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	for _, after := range []time.Duration{0, 1, 5, 10, 20, 50, 100, 200, 400} {
		after *= time.Millisecond
		t.Run(after.String(), func(t *testing.T) {
			nstest.Leaks(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer time.AfterFunc(after, cancel).Stop()
			begin := time.Now()
			var out bytes.Buffer
			err := run(ctx, options{hosts: 3, duration: time.Minute}, &out)
			if !stage.Interrupted(err) {
				t.Errorf("run, cancelled after %v: %v, want nothing but the interruption\n%s", after, err, &out)
			}
			if took := time.Since(begin); took > after+stage.Patience {
				t.Errorf("run, cancelled after %v, took %v", after, took)
			}
		})
	}
}

func TestOrdinaryUser(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6, nstest.SecondUID, nstest.Mknod)
	out, err := nstest.New(t).Helper(t, program, nstest.HelperOptions{
		Args: []string{"-v", "-d", "300ms"}, UID: nobody, Tun: nstest.TunPublic,
	})
	if err != nil {
		t.Fatal(err)
	}
	requireReport(t, out, 3)
}

// TestSignal sends a signal to the program in the midst of its work.
func TestSignal(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6, nstest.Program("go"))
	binary := filepath.Join(t.TempDir(), "quickstart")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		for _, step := range []string{"hosts", "built", "steered"} {
			t.Run(signal.String()+" when "+step, func(t *testing.T) {
				mounts, links := mountsOf(t), linksOf(t)
				requireInterrupt(t, binary, signal, step)
				if got := mountsOf(t); got != mounts {
					t.Errorf("mounts are\n%s\nwere\n%s", got, mounts)
				}
				if got := linksOf(t); !slices.Equal(got, links) {
					t.Errorf("links are %v, were %v", got, links)
				}
			})
		}
	}
}

// TestSignalOrdinaryUser sends the signal to the process that has started the one at work.
func TestSignalOrdinaryUser(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6, nstest.SecondUID, nstest.Mknod)
	for _, step := range []string{"hosts", "built", "steered"} {
		t.Run(step, func(t *testing.T) {
			p, _ := nstest.New(t).StartHelper(t, program, nstest.HelperOptions{
				Args: []string{"-d", "1m"}, UID: nobody, Tun: nstest.TunPublic,
			})
			p.Expect(t, step)
			if err := p.Signal(unix.SIGINT); err != nil {
				t.Fatal(err)
			}
			requireInterrupted(t, p.Pid(), p.Wait(), p.Output())
		})
	}
}

// requireInterrupt runs the program until it says step, sends the signal to its first process alone, and looks how it ends.
// A namespace needs a process, a descriptor of one, or a mount: where none of these is left, none of those is either.
func requireInterrupt(t *testing.T, binary string, signal unix.Signal, step string) {
	t.Helper()
	cmd := exec.Command(binary, "-d", "1m")
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(30*time.Second, func() { unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
	defer timer.Stop()
	said := readUntil(stdout, step)
	if err := cmd.Process.Signal(signal); err != nil {
		t.Error(err)
	}
	rest, _ := io.ReadAll(stdout)
	err = cmd.Wait()
	requireInterrupted(t, cmd.Process.Pid, err, said+string(rest)+stderr.String())
}

// requireInterrupted looks how the program, the first of its process group, has ended.
func requireInterrupted(t *testing.T, pid int, err error, out string) {
	t.Helper()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		t.Errorf("%v, want exit code %d\n%s", err, exitInterrupted, out)
	}
	if !strings.Contains(out, "nothing is left") {
		t.Errorf("no word on cleaning up:\n%s", out)
	}
	if err := unix.Kill(-pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the program's process group: %v, want that there is none", err)
	}
}

// readUntil reads up to and with a word.
func readUntil(r io.Reader, word string) string {
	var said strings.Builder
	for b := make([]byte, 1); !strings.HasSuffix(said.String(), word); {
		if _, err := r.Read(b); err != nil {
			break
		}
		said.Write(b)
	}
	return said.String()
}

func mountsOf(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(mounts)
}

func linksOf(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}

func TestParse(t *testing.T) {
	tests := []struct {
		args string
		want options
		says string // on stderr, with an error
	}{
		{"", options{hosts: 3, duration: 2 * time.Second}, ""},
		{"-hosts 16 -d 100ms -v", options{hosts: 16, duration: 100 * time.Millisecond, verbose: true}, ""},
		{"-hosts 2", options{}, "-hosts 2: want 3…16"},
		{"-hosts 17", options{}, "-hosts 17: want 3…16"},
		{"-d 0", options{}, "-d 0s: want 100ms…1h"},
		{"-d 2h", options{}, "-d 2h0m0s: want 100ms…1h"},
		{"more", options{}, `unexpected argument "more"`},
		{"-x", options{}, "-x"},
		{"-h", options{}, "Usage"},
	}
	for _, tt := range tests {
		var stderr bytes.Buffer
		got, err := parse(strings.Fields(tt.args), &stderr)
		if tt.says == "" && (err != nil || got != tt.want) {
			t.Errorf("parse(%q) = %+v, %v, want %+v", tt.args, got, err, tt.want)
		}
		if tt.says != "" && (err == nil || !strings.Contains(stderr.String(), tt.says)) {
			t.Errorf("parse(%q): %v, stderr %q, want %q there", tt.args, err, &stderr, tt.says)
		}
		if errors.Is(err, flag.ErrHelp) != (tt.args == "-h") {
			t.Errorf("parse(%q): %v", tt.args, err)
		}
	}
}

func TestChecksum(t *testing.T) {
	// The example of RFC 1071, section 3: the sum is ddf2.
	if got, want := checksum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}), ^uint16(0xddf2); got != want {
		t.Errorf("checksum = %#04x, want %#04x", got, want)
	}
}

// TestCheck: what went wrong must not pass.
func TestCheck(t *testing.T) {
	l := &lab{hosts: []*host{{name: "host1"}, {name: "host2"}, {name: "host3"}}}
	good := func() []result {
		r := make([]result, 3)
		for i := range r {
			r[i] = result{sent: [2]int{40, 40}, bytes: 1, elapsed: 1}
		}
		r[0].chosen = [2][2]int{{375, 125}, {390, 110}}
		return r
	}
	if err := l.check(good()); err != nil {
		t.Errorf("check of good results: %v", err)
	}
	tests := map[string]func(r []result){
		"host2 lost 1 of 40 IPv6 echoes":                                    func(r []result) { r[1].lost[1] = 1 },
		"host3 sent nothing by TCP":                                         func(r []result) { r[2].bytes = 0 },
		"host1 sent 100 % of its IPv4 flows through host2, want about 75 %": func(r []result) { r[0].chosen[0] = [2]int{500, 0} },
		"host1 sent 50 % of its IPv6 flows through host2, want about 75 %":  func(r []result) { r[0].chosen[1] = [2]int{250, 250} },
		"host1 sent 0 % of its IPv6 flows through host2, want about 75 %":   func(r []result) { r[0].chosen[1] = [2]int{} },
	}
	for want, spoil := range tests {
		r := good()
		spoil(r)
		if err := l.check(r); err == nil || err.Error() != want {
			t.Errorf("check: %v, want %q", err, want)
		}
	}
}
