package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"

	"golang.org/x/sys/unix"
)

// The program itself, for tests that need it in a process of its own.
const program = "bgpmesh"

const nobody = 65534

func TestMain(m *testing.M) {
	nstest.Helper(program, func() error {
		os.Exit(start(os.Args[1:], os.Stdout, os.Stderr))
		return nil
	})
	if os.Getenv(inArena) != "" { // the program has started itself anew
		os.Exit(start(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(nstest.Main(m))
}

// kind is a router, with the programs and the argument that it needs, and what is said of it.
type kind struct {
	programs []nstest.Ability
	args     []string
	says     []string
}

var kinds = map[string]kind{
	"BIRD": {
		[]nstest.Ability{nstest.Program("bird"), nstest.Program("birdc")},
		nil,
		[]string{"with BIRD 2", "6 BGP sessions", "Next: read examples/bgpmesh/bird.go", "protocol bgp from mesh { neighbor 10.42.0.2 as 65000;"},
	},
	"FRR": {
		[]nstest.Ability{nstest.Program("zebra"), nstest.Program("bgpd"), nstest.Program("vtysh")},
		[]string{"-frr"},
		[]string{"with FRR ", "3 BGP sessions", "Next: read examples/bgpmesh/frr.go", " neighbor 10.42.0.2 remote-as 65000"},
	},
}

func TestRun(t *testing.T) {
	for name, kind := range kinds {
		for user, uid := range map[string]int{"root": 0, "ordinary user": nobody} {
			t.Run(name+" as "+user, func(t *testing.T) {
				nstest.Require(t, append(kind.programs, nstest.NetAdmin, nstest.TUN, nstest.IPv6)...)
				opts := nstest.HelperOptions{Args: append(kind.args, "-hosts", "3", "-v"), UID: uid}
				if uid != 0 {
					nstest.Require(t, nstest.SecondUID, nstest.Mknod)
					opts.Tun = nstest.TunPublic
				}
				unchanged := surroundings(t)
				out, err := nstest.New(t).Helper(t, program, opts)
				if err != nil {
					t.Fatal(err)
				}
				requireReport(t, out, kind.says)
				unchanged()
			})
		}
	}
}

// requireReport looks for every scene, for what became of the streams and the flows of the one client, and for what is said besides.
func requireReport(t *testing.T, out string, more []string) {
	t.Helper()
	want := append([]string{
		`built +3 hosts`, `started +`, `met +`, `moved +the subnet of host2 to host3`, `moved +it back`, `shared +`, `retired +`,
		`\nsudden +host3 → host2 +IPv6 +\d+ +[1-9]\d* +\d+ ms +\d+ ms\n`, // something must be lost
		`\nhost1 +10\.100\.99\.0/24 +IPv4 +(4|5|6)\d % +(4|5|6)\d %\n`, `\nhost1 +fd00:100:63::/64 +IPv6 +(4|5|6)\d % +(4|5|6)\d %\n`,
		`\nAll worked\.`, `device overlay0 index`,
	}, quote(more)...)
	for _, family := range families {
		want = append(want, `\nplanned +host2 → host3 +`+family+` +\d+ +\d+ +\d+ ms +\d+ ms\n`, `\nsudden +host3 → host2 +`+family+` `)
	}
	for _, w := range want {
		if !regexp.MustCompile(w).MatchString(out) {
			t.Errorf("no %q in:\n%s", w, out)
		}
	}
}

func quote(texts []string) []string {
	var quoted []string
	for _, text := range texts {
		quoted = append(quoted, regexp.QuoteMeta(text))
	}
	return quoted
}

// surroundings returns a function that fails the test unless mounts and files are as they were.
func surroundings(t *testing.T) (unchanged func()) {
	t.Helper()
	mounts := mountsOf(t)
	return func() {
		t.Helper()
		if got := mountsOf(t); got != mounts {
			t.Errorf("mounts are\n%s\nwere\n%s", got, mounts)
		}
		if _, err := os.Lstat(filepath.Join(arena, "host1")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("host1 in %s: %v, want that there is none", arena, err)
		}
	}
}

func mountsOf(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(mounts)
}

// pidNamespace is the namespace of processes that the program has made, held open so that no other gets its number.
type pidNamespace struct{ os.FileInfo }

func pidNamespaceOf(t *testing.T, program int) pidNamespace {
	t.Helper()
	for _, process := range processes(t) {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", process)) // it may have ended
		if !strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", program)) {
			continue
		}
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", process))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return pidNamespace{info}
	}
	t.Fatalf("process %d has no child", program)
	return pidNamespace{}
}

// members are the processes in the namespace now.
func (n pidNamespace) members(t *testing.T) (members []int) {
	t.Helper()
	for _, process := range processes(t) {
		info, err := os.Stat(fmt.Sprintf("/proc/%d/ns/pid", process))
		if err == nil && os.SameFile(info, n.FileInfo) { // an error: it has ended, or is not ours to look at
			members = append(members, process)
		}
	}
	return members
}

// requireEmpty fails the test, and kills what is left, unless all that was in the namespace ends.
func (n pidNamespace) requireEmpty(t *testing.T) {
	t.Helper()
	var left []int
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if left = n.members(t); len(left) == 0 {
			return
		}
	}
	t.Errorf("processes were left: %v", left)
	for _, process := range left {
		_ = unix.Kill(process, unix.SIGKILL)
	}
}

// processes lists all processes.
func processes(t *testing.T) (all []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if process, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, process)
		}
	}
	return all
}

// TestSignal interrupts the first process alone at several scenes: it cleans up.
func TestSignal(t *testing.T) {
	for name, kind := range kinds {
		for _, tt := range []struct {
			signal unix.Signal
			scene  string
		}{{unix.SIGINT, "hosts"}, {unix.SIGINT, "started"}, {unix.SIGINT, "moved"}, {unix.SIGTERM, "started"}} {
			t.Run(fmt.Sprintf("%s, %v when %s", name, tt.signal, tt.scene), func(t *testing.T) {
				p, ns, unchanged := startProgram(t, kind, tt.scene)
				if err := p.Signal(tt.signal); err != nil {
					t.Fatal(err)
				}
				err := p.Wait()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted || !strings.Contains(p.Output(), "nothing is left") {
					t.Errorf("%v, want exit code %d and a word on cleaning up\n%s", err, exitInterrupted, p.Output())
				}
				ns.requireEmpty(t)
				unchanged()
			})
		}
	}
}

// TestKilled kills the first process, which can clean up nothing then. What it has started is stopped before, so that only the
// kernel can end it.
func TestKilled(t *testing.T) {
	for name, kind := range kinds {
		for _, scene := range []string{"started", "moved"} {
			t.Run(name+" when "+scene, func(t *testing.T) {
				p, ns, unchanged := startProgram(t, kind, scene)
				for _, process := range ns.members(t) {
					if err := unix.Kill(process, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
						t.Error(err)
					}
				}
				if err := p.Signal(unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				_ = p.Wait() // of the signal
				ns.requireEmpty(t)
				unchanged()
			})
		}
	}
}

// startProgram starts the program and waits for a scene.
func startProgram(t *testing.T, k kind, scene string) (p *nstest.Process, ns pidNamespace, unchanged func()) {
	t.Helper()
	nstest.Require(t, append(k.programs, nstest.NetAdmin, nstest.TUN, nstest.IPv6)...)
	nstest.Leaks(t)
	unchanged = surroundings(t)
	p, _ = nstest.New(t).StartHelper(t, program, nstest.HelperOptions{Args: append(k.args, "-hosts", "3")})
	p.Expect(t, scene)
	return p, pidNamespaceOf(t, p.Pid()), unchanged
}

// TestNothingPrinted gives the program a file to print to that is always full: it fails, and says why.
func TestNothingPrinted(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6, nstest.Program("bird"), nstest.Program("birdc"), nstest.Program("sh"))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `exec "$0" -hosts 3 > /dev/full`, exe)
	cmd.Env = append(os.Environ(), "OVERLAY_NSTEST_HELPER="+program)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitFailed || !strings.Contains(stderr.String(), "print: write /dev/stdout: no space left") {
		t.Errorf("%v, want exit code %d; it says:\n%s", err, exitFailed, &stderr)
	}
}

// TestMissing: whoever lacks a router is told what to install.
func TestMissing(t *testing.T) {
	_, err := find("BIRD", "bird2", "sh", "no-such-daemon", "no-such-client")
	const want = "BIRD is not installed: there is no no-such-daemon, no no-such-client. On Debian: apt install bird2"
	if err == nil || err.Error() != want {
		t.Errorf("find: %v, want %q", err, want)
	}
}

// TestAgent: the agent is the quickstart's, so that who knows the one knows the other.
func TestAgent(t *testing.T) {
	ours, err := os.ReadFile("agent.go")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile("../quickstart/agent.go")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ours, theirs) {
		t.Error("agent.go is not what ../quickstart/agent.go is")
	}
}

func TestParse(t *testing.T) {
	tests := []struct {
		args string
		want options
		says string // on stderr, with an error
	}{
		{"", options{hosts: 4}, ""},
		{"-hosts 16 -frr -v", options{hosts: 16, frr: true, verbose: true}, ""},
		{"-hosts 2", options{}, "-hosts 2: want 3…16"},
		{"-hosts 17", options{}, "-hosts 17: want 3…16"},
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

// TestFate: what became of probes, each 2 ms after the other, that a letter or a dot stands for: who answered, or nobody.
func TestFate(t *testing.T) {
	begun := time.Unix(1000, 0)
	const ms = time.Millisecond
	tests := []struct {
		probes string
		want   fate
	}{
		{"", fate{}},
		{"aabb", fate{sent: 4, followed: 4 * ms}},
		{"abab", fate{sent: 4, followed: 2 * ms}},
		{"a.a...bb", fate{sent: 8, lost: 4, gap: 6 * ms, followed: 12 * ms}},
		{"a...b.b", fate{sent: 7, lost: 4, gap: 6 * ms, followed: 8 * ms}},
		{"ab..", fate{sent: 4, lost: 2, gap: 2 * ms, followed: 2 * ms}},
		{"....", fate{sent: 4, lost: 4, gap: 6 * ms}},
	}
	for _, tt := range tests {
		var probes []probe
		for i, c := range []byte(tt.probes) {
			p := probe{sent: begun.Add(time.Duration(i) * 2 * ms), by: c}
			if c == '.' {
				p.by = 0
			}
			probes = append(probes, p)
		}
		var got fate
		got.add(probes, begun, 'b')
		if got != tt.want {
			t.Errorf("%q: %+v, want %+v", tt.probes, got, tt.want)
		}
	}
}

// TestCheck: what went wrong must not pass.
func TestCheck(t *testing.T) {
	m := &mesh{hosts: []*host{{name: "host1", number: 1}, {name: "host2", number: 2}, {name: "host3", number: 3}}}
	good := shares{{2: 230, 3: 270}, {2: 299, 3: 201}}
	if err := m.check(fates{{sent: 100, lost: 1}, {sent: 99}}, []shares{good}); err != nil {
		t.Errorf("check of good shares: %v", err)
	}
	const want = "the planned move lost 2 of 100 probes by IPv6"
	if err := m.check(fates{{}, {sent: 100, lost: 2}}, []shares{good}); err == nil || err.Error() != want {
		t.Errorf("check: %v, want %q", err, want)
	}
	for _, bad := range []map[byte]int{{2: 500}, {2: 100, 3: 400}, {1: 500}, {}} {
		for family, name := range families {
			s := good
			s[family] = bad
			want := fmt.Sprintf("host1 sent %.0f %% of its %s flows to host2, want about 50 %%", 100*s.of(family, m.hosts[1]), name)
			if err := m.check(fates{}, []shares{s}); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("check: %v, want %q", err, want)
			}
		}
	}
}
