package nstest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Run runs a command in the namespace, waits for it and returns what it wrote to stdout and stderr; if it fails, so does the
// test. One argument alone is split at spaces: ns.Run(t, "ip link show").
func (n *NS) Run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.TryRun(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryRun is Run for a command that may fail; the error holds the output.
func (n *NS) TryRun(args ...string) (string, error) {
	cmd, err := command(args)
	if err != nil {
		return "", err
	}
	var out []byte
	err = n.do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out), err
}

// Start starts a command in the namespace, as Run does, and kills it and its children at t.Cleanup if it still runs.
func (n *NS) Start(t testing.TB, args ...string) *Process {
	t.Helper()
	cmd, err := command(args)
	if err != nil {
		t.Fatal(err)
	}
	p := newProcess(cmd)
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	p.start(t, n.do)
	return p
}

// command finds a program and prepares the command.
func command(args []string) (*exec.Cmd, error) {
	if len(args) == 1 {
		args = strings.Fields(args[0])
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("no command given")
	}
	path, err := lookPath(args[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args[1:]...)
	tie(cmd)
	return cmd, nil
}

// tie makes a command die with the thread that starts it, and gives it a process group of its own, so that its children can
// be killed too.
func tie(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 2 * time.Second // for grandchildren that keep the output open
}

// lookPath also looks where an ordinary user's PATH does not lead.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil || strings.ContainsRune(name, '/') {
		return path, err
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/frr"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", err
}
