package nstest

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// helperMarker names, in the environment, the helper that a process is to be.
const helperMarker = "OVERLAY_NSTEST_HELPER"

var helpers = map[string]func() error{}

// Helper registers fn under a name, for NS.Helper and NS.StartHelper to run in a process of its own. Call it in TestMain,
// before Main. The process is the test binary itself, so fn may use all that the tests may but *testing.T; its arguments are
// os.Args[1:], its extra files are descriptors 3, 4 and so on. If fn returns an error the process writes it to stderr and exits with 1.
func Helper(name string, fn func() error) {
	if helpers[name] != nil {
		panic("nstest: two helpers " + name)
	}
	helpers[name] = fn
}

func runHelper(name string) int {
	os.Unsetenv(helperMarker)
	fn := helpers[name]
	if fn == nil {
		fmt.Fprintf(os.Stderr, "nstest: no helper %q is registered before Main\n", name)
		return 2
	}
	if err := fn(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Ready is for helpers that stay: it tells the test, in a line on stdout, that all is in place, and returns when the test stops
// the helper.
func Ready(line string) error {
	fmt.Println(line)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// HelperOptions says as whom and among what a helper runs; zero is as the test itself.
type HelperOptions struct {
	Args       []string   // its os.Args[1:]
	Env        []string   // "key=value", beside the test's own
	ExtraFiles []*os.File // its descriptors from 3 on

	UID         int       // 0: the test's. Another needs the ability SecondUID, and has AmbientCaps but no other capabilities
	GID         int       // 0: the test's, or with UID the same number. There are no supplementary groups then
	AmbientCaps []uintptr // unix.CAP_…
	DropCaps    []uintptr // what root shall lack; it needs no second user

	Tun             TunNode
	ReadOnlyProcSys bool // as in an unprivileged container
}

// TunNode is what a helper finds as /dev/net/tun.
type TunNode uint8

// The nodes. Public and Private need the ability Mknod, unless the node is so already.
const (
	TunAsIs    TunNode = iota
	TunPublic          // for every user, as distributions have it
	TunPrivate         // for root only
	TunMissing
)

// Helper runs a helper in the namespace and waits for it. It returns what the helper wrote to stdout and stderr; the error
// holds that too, and is an *exec.ExitError if the helper failed.
func (n *NS) Helper(t testing.TB, name string, opts HelperOptions) (string, error) {
	t.Helper()
	cmd := helperCommand(t, name, opts)
	var out []byte
	err := n.do(func() (err error) {
		if err = opts.prepareThread(); err == nil {
			out, err = cmd.CombinedOutput()
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("helper %s: %w\n%s", name, err, out)
	}
	return string(out), err
}

// StartHelper starts a helper that stays, waits until it calls Ready and returns that line. The helper ends with
// Process.Stop, or is killed at t.Cleanup.
func (n *NS) StartHelper(t testing.TB, name string, opts HelperOptions) (p *Process, ready string) {
	t.Helper()
	p = newProcess(helperCommand(t, name, opts))
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stdout output
	p.stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, io.MultiWriter(&p.out, &stdout), &p.out
	p.start(t, func(run func() error) error {
		return n.do(func() error {
			if err := opts.prepareThread(); err != nil {
				return err
			}
			return run()
		})
	})
	return p, p.await(t, &stdout, "\n")
}

func helperCommand(t testing.TB, name string, opts HelperOptions) *exec.Cmd {
	t.Helper()
	if !mainRan {
		t.Fatalf("helper %s: TestMain does not call nstest.Main", name)
	}
	cmd := exec.Command(binary, opts.Args...)
	tie(cmd)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // else one under -race ends a second late
	cmd.Env = append(append(cmd.Env, opts.Env...), helperMarker+"="+name)
	cmd.ExtraFiles = opts.ExtraFiles
	cmd.SysProcAttr.AmbientCaps = opts.AmbientCaps
	if opts.UID != 0 || opts.GID != 0 {
		uid := cmp.Or(opts.UID, os.Geteuid())
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(cmp.Or(opts.GID, uid))}
	}
	return cmd
}

// prepareThread gives the calling thread, which netns.Do lends and which therefore is not the main one, what its children
// inherit and it cannot give up again. Locked once more than netns.Do unlocks, it ends with its goroutine.
func (o HelperOptions) prepareThread() error {
	runtime.LockOSThread()
	if o.Tun != TunAsIs || o.ReadOnlyProcSys {
		if err := o.mount(); err != nil {
			return err
		}
	}
	return dropCaps(o.DropCaps)
}

// mount gives the calling thread a mount namespace as the options say.
func (o HelperOptions) mount() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := privateMounts(); err != nil {
		return err
	}
	if o.ReadOnlyProcSys {
		if err := readOnly("/proc/sys"); err != nil {
			return err
		}
	}
	return o.Tun.mount()
}

func (n TunNode) mount() error {
	const dir, node = "/dev/net", "/dev/net/tun"
	mode := map[TunNode]os.FileMode{TunPublic: 0o666, TunPrivate: 0o600}[n]
	info, err := os.Stat(node)
	switch {
	case n == TunAsIs, err == nil && info.Mode().Perm() == mode, errors.Is(err, os.ErrNotExist) && n == TunMissing:
		return nil
	}
	if err := unix.Mount("nstest", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	if n == TunMissing {
		return nil
	}
	if err := unix.Mknod(node, unix.S_IFCHR|uint32(mode), int(unix.Mkdev(10, 200))); err != nil {
		return fmt.Errorf("mknod %s: %w", node, err)
	}
	return os.Chmod(node, mode) // whatever the umask
}

// readOnly bind-mounts a directory onto itself, read-only.
func readOnly(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	// In a user namespace the flags that the mount has must stay.
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("", dir, "", flags, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", dir, err)
	}
	return nil
}

// dropCaps takes capabilities from what the calling thread's children can have: the bounding set, and the inheritable and
// with it the ambient set.
func dropCaps(caps []uintptr) error {
	for _, c := range caps {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if len(caps) == 0 {
		return nil
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}
