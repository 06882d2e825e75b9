//go:build linux

package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inner asks, in the environment, a test binary that a test has started for what TestInner does.
const inner = "NSTEST_INNER"

func TestMain(m *testing.M) {
	Helper("again", again)
	registerHelpers()
	os.Exit(Main(m))
}

// again goes on as if `go test` had started this process.
func again() error {
	os.Unsetenv(marker)
	return unix.Exec(binary, os.Args, os.Environ())
}

// TestInner is what the other tests here have run by a test binary of their own.
func TestInner(t *testing.T) {
	switch os.Getenv(inner) {
	case "":
		t.Skip("no test of its own")
	case "where":
		net, _ := os.Readlink(processNS)
		user, _ := os.Readlink("/proc/self/ns/user")
		fmt.Printf("pid %d args %q net %s user %s uid %d; not isolated: %v\n", os.Getpid(), os.Args[1:], net, user, os.Getuid(), notIsolated)
		fmt.Fprintln(os.Stderr, "on stderr")
		Require(t, NetAdmin, TUN)
		New(t).OtherTun(t, "other0")
	case "exit":
		os.Exit(7)
	case "stay":
		fmt.Println("pid", os.Getpid())
		time.Sleep(time.Minute)
	}
}

// runInner runs TestInner in a process with or without root's privileges and returns its output.
func runInner(t *testing.T, what string, opts HelperOptions) (string, error) {
	t.Helper()
	opts.Env = append(opts.Env, inner+"="+what)
	opts.Args = append(opts.Args, "-test.run=^TestInner$", "-test.v")
	return New(t).Helper(t, "again", opts)
}

// users are those who run the tests. The node is 0666 on most systems, so it is here.
var users = []struct {
	name  string
	needs []Ability
	opts  HelperOptions
}{
	{"root", []Ability{NetAdmin}, HelperOptions{}},
	{"nobody", []Ability{NetAdmin, SecondUID, Mknod}, HelperOptions{UID: nobody, Tun: TunPublic}},
}

func TestMainIsolates(t *testing.T) {
	for _, u := range users {
		t.Run(u.name, func(t *testing.T) {
			Require(t, u.needs...)
			out, err := runInner(t, "where", u.opts)
			if err != nil {
				t.Fatal(err)
			}
			host, _ := os.Readlink(processNS)
			for _, want := range []string{"uid 0; not isolated: <nil>\n", "on stderr\n", "--- PASS", "\nPASS\n", `args ["-test.run=^TestInner$"`} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in the output:\n%s", want, out)
				}
			}
			if strings.Contains(out, host) {
				t.Errorf("the tests ran in our namespace %s:\n%s", host, out)
			}
		})
	}
}

func TestMainExitCode(t *testing.T) {
	for _, u := range users {
		t.Run(u.name, func(t *testing.T) {
			Require(t, u.needs...)
			_, err := runInner(t, "exit", u.opts)
			if got := codeOf(err); got != 7 {
				t.Errorf("exit code %d, want 7: %v", got, err)
			}
			opts := u.opts
			opts.Args = []string{"-test.timeout=100ms"}
			out, err := runInner(t, "stay", opts)
			if got := codeOf(err); got != 2 || !strings.Contains(out, "panic: test timed out") {
				t.Errorf("after a timeout: exit code %d, want 2: %v", got, err)
			}
		})
	}
}

func codeOf(err error) int {
	if e := (*exec.ExitError)(nil); errors.As(err, &e) {
		return exitCode(e.ProcessState)
	}
	return 0
}

// TestMainSignals: as an ordinary user the process that `go test` knows is not the one that runs the tests.
func TestMainSignals(t *testing.T) {
	for _, u := range users {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			t.Run(u.name+" "+sig.String(), func(t *testing.T) {
				Require(t, u.needs...)
				opts := u.opts
				opts.Env = []string{inner + "=stay"}
				opts.Args = []string{"-test.run=^TestInner$"}
				p, line := New(t).StartHelper(t, "again", opts)
				pid, err := strconv.Atoi(strings.TrimPrefix(line, "pid "))
				if err != nil {
					t.Fatalf("%v in %q", err, p.Output())
				}
				p.Signal(sig)
				if got, want := codeOf(p.Wait()), 128+int(sig); got != want {
					t.Errorf("exit code %d, want %d", got, want)
				}
				for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("process %d survived", pid)
					}
				}
			})
		}
	}
}

// alive is false for a zombie too: pid 1 may take its time.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// TestMainForbidden runs where no further namespaces are allowed: the tests run anyway, and skip with the reason.
func TestMainForbidden(t *testing.T) {
	Require(t, NetAdmin, Program("unshare"))
	t.Setenv(inner, "where")
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := `for k in user net; do echo 0 >/proc/sys/user/max_${k}_namespaces; done
		unset ` + marker + ` OVERLAY_REQUIRE; exec "$0" -test.run=^TestInner$ -test.v`
	out := New(t).Run(t, "unshare", "--user", "--map-root-user", "sh", "-c", script, path)
	for _, want := range []string{"unshare: no space left on device", "user namespace: ", "--- SKIP", "missing the ability NetAdmin", "\nPASS\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the output:\n%s", want, out)
		}
	}
}

func TestMainDirect(t *testing.T) {
	t.Setenv(marker, direct)
	t.Setenv(inner, "where")
	out := Own(t).Run(t, fmt.Sprintf("/proc/%d/exe -test.run=^TestInner$ -test.v", os.Getpid()))
	host, _ := os.Readlink(processNS)
	if !strings.Contains(out, host) || !strings.Contains(out, "not isolated: "+marker+"="+direct) {
		t.Errorf("the tests did not run directly in %s:\n%s", host, out)
	}
}
