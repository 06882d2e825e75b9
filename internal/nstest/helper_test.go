//go:build linux

package nstest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func registerHelpers() {
	Helper("none", func() error { return nil })
	Helper("id", func() error {
		n, err := idOf(os.Args[1])
		fmt.Print(n)
		return err
	})
	Helper("tun", func() error {
		fmt.Printf("uid %d gid %d\n", os.Getuid(), os.Getgid())
		_, err := openTun("tun0")
		return err
	})
	Helper("sysctl", func() error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/lo/rp_filter", []byte("0"), 0)
	})
	Helper("files", func() error {
		b, err := io.ReadAll(os.NewFile(3, "first"))
		fmt.Printf("%s %s %s", b, os.Args[1], os.Getenv("GREETING"))
		return err
	})
	Helper("hold", func() error {
		f, err := openTun("tun0")
		if err != nil {
			return err
		}
		if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
			return err
		}
		return errors.Join(Ready("have tun0"), errors.New("was stopped"))
	})
}

// TestHelperUsers opens a TUN device as whom the options say.
func TestHelperUsers(t *testing.T) {
	admin := []uintptr{unix.CAP_NET_ADMIN}
	asNobody, makeNode := []Ability{NetAdmin, SecondUID}, []Ability{NetAdmin, SecondUID, Mknod}
	for _, c := range []struct {
		name  string
		needs []Ability
		opts  HelperOptions
		gid   int
		want  string // "" is success
	}{
		{"itself", []Ability{TUN}, HelperOptions{}, 0, ""},
		{"itself less CAP_NET_ADMIN", []Ability{TUN}, HelperOptions{DropCaps: admin}, 0, "TUNSETIFF tun0: operation not permitted"},
		{"itself without node", []Ability{NetAdmin}, HelperOptions{Tun: TunMissing}, 0, "open /dev/net/tun: no such file or directory"},
		{"nobody", makeNode, HelperOptions{UID: nobody, Tun: TunPublic}, nobody, "TUNSETIFF tun0: operation not permitted"},
		{"nobody with CAP_NET_ADMIN", makeNode, HelperOptions{UID: nobody, Tun: TunPublic, AmbientCaps: admin}, nobody, ""},
		{"nobody, private node", makeNode, HelperOptions{UID: nobody, Tun: TunPrivate, AmbientCaps: admin}, nobody, "open /dev/net/tun: permission denied"},
		{"nobody without node", asNobody, HelperOptions{UID: nobody, GID: 1, Tun: TunMissing}, 1, "open /dev/net/tun: no such file or directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			Require(t, c.needs...)
			Leaks(t)
			out, err := New(t).Helper(t, "tun", c.opts)
			want := fmt.Sprintf("uid %d gid %d\n", c.opts.UID, c.gid)
			if c.want != "" {
				want += c.want + "\n"
			}
			if out != want || (err == nil) != (c.want == "") {
				t.Errorf("output %q, want %q; error %v", out, want, err)
			}
			if c.want != "" && codeOf(err) != 1 {
				t.Errorf("exit code %d, want 1", codeOf(err))
			}
		})
	}
}

func TestHelperReadOnlyProcSys(t *testing.T) {
	Require(t, NetAdmin)
	Leaks(t)
	n := New(t)
	if _, err := n.Helper(t, "sysctl", HelperOptions{}); err != nil {
		t.Error(err)
	}
	out, err := n.Helper(t, "sysctl", HelperOptions{ReadOnlyProcSys: true})
	if err == nil || !strings.Contains(out, "read-only file system") {
		t.Errorf("output %q, error %v", out, err)
	}
}

func TestHelperFiles(t *testing.T) {
	Require(t, NetAdmin)
	Leaks(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	io.WriteString(w, "file")
	w.Close()
	opts := HelperOptions{ExtraFiles: []*os.File{r}, Args: []string{"arg"}, Env: []string{"GREETING=env"}}
	if out, err := New(t).Helper(t, "files", opts); out != "file arg env" || err != nil {
		t.Errorf("output %q, error %v", out, err)
	}
}

// TestHelperStays: a helper that holds a persistent device, stopped, killed, and left to the cleanup.
func TestHelperStays(t *testing.T) {
	Require(t, TUN)
	Leaks(t)
	for _, end := range []string{"stop", "kill", "cleanup"} {
		t.Run(end, func(t *testing.T) {
			n := New(t)
			t.Cleanup(func() {
				if got, want := links(t, n), "lo true, tun0 false"; got != want {
					t.Errorf("links %s, want %s", got, want)
				}
			})
			p, ready := n.StartHelper(t, "hold", HelperOptions{})
			if ready != "have tun0" {
				t.Errorf("ready with %q", ready)
			}
			switch end {
			case "stop":
				if err := p.Stop(); codeOf(err) != 1 || p.Output() != "have tun0\nwas stopped\n" {
					t.Errorf("stopped: %v\n%s", err, p.Output())
				}
			case "kill":
				p.Kill()
				if err := p.Wait(); codeOf(err) != 128+9 {
					t.Errorf("killed: %v", err)
				}
			}
		})
	}
	got := pretend(func(t testing.TB) { New(t).StartHelper(t, "hold", HelperOptions{Tun: TunMissing}) })
	if !strings.Contains(got, "no such file or directory") {
		t.Errorf("outcome of a helper that never is ready: %s", got)
	}
}

// TestNoDirtyThreads: those that netns.Do lent, and those that helpers left with other mounts, are home or gone.
func TestNoDirtyThreads(t *testing.T) {
	Require(t, NetAdmin)
	n := New(t)
	for range 10 {
		n.Helper(t, "none", HelperOptions{Tun: TunMissing, DropCaps: []uintptr{unix.CAP_NET_RAW}})
	}
	for _, kind := range []string{"net", "mnt"} {
		deadline := time.Now().Add(5 * time.Second) // threads end a little later than their goroutines
		for dirty := foreignThreads(t, kind); len(dirty) > 0; dirty = foreignThreads(t, kind) {
			if time.Now().After(deadline) {
				t.Fatalf("threads in foreign namespaces: %v", dirty)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// foreignThreads lists the threads that are not in the process's namespace of a kind.
func foreignThreads(t *testing.T, kind string) (list []string) {
	t.Helper()
	home, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if ns, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/" + kind); err == nil && ns != home {
			list = append(list, task.Name()+": "+ns)
		}
	}
	return list
}
