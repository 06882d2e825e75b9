//go:build linux

package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inArena in the environment says that the process has namespaces of its own, in which it may do what it likes.
const inArena = "OVERLAY_WIREGUARD_ARENA"

const demoPatience = 5 * time.Second

// runDemo runs the demo in a child that has users, mounts and a network of its own: nothing of the system is touched, no root
// is needed where users may have such namespaces, and all goes with the process.
func runDemo(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if os.Getenv(inArena) != "" {
		return demonstrate(ctx, stdout, slices.Contains(args, "-v"))
	}
	runtime.LockOSThread() // the child dies with the thread that starts it
	defer runtime.UnlockOSThread()
	child := exec.CommandContext(ctx, "/proc/self/exe", args...)
	child.Cancel = func() error { return child.Process.Signal(unix.SIGTERM) }
	child.Env = append(os.Environ(), inArena+"=1")
	child.Stdout, child.Stderr = stdout, stderr
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if os.Geteuid() != 0 {
		child.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		child.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		child.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	if err := child.Run(); err != nil {
		return fmt.Errorf("the demo, in namespaces of its own: %w", err)
	}
	return nil
}

// demoHost is one of the two hosts: the N-th is 192.0.2.N on the underlay, 10.42.0.N and fd42::N on the overlay.
type demoHost struct {
	name    string
	n       int
	ns      int // an open network namespace
	private *ecdh.PrivateKey
	daemon  *exec.Cmd
}

func (h *demoHost) addr(family int) string {
	return fmt.Sprintf([]string{"10.42.0.%d", "fd42::%d"}[family], h.n)
}

// demonstrate builds two hosts, runs a daemon on each, lets them talk and takes all down.
func demonstrate(ctx context.Context, out io.Writer, verbose bool) (err error) {
	// The sockets of wg(8) are not to appear among the system's.
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("demo", "/var/run", "tmpfs", 0, "")); err != nil {
		return fmt.Errorf("a /var/run for the demo: %w", err)
	}
	dir, err := os.MkdirTemp("/var/run", "wireguard")
	if err != nil {
		return err
	}
	alice, bob := &demoHost{name: "alice", n: 1}, &demoHost{name: "bob", n: 2}
	hosts := []*demoHost{alice, bob}
	for _, h := range hosts {
		if h.private, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return err
		}
		if err := h.unshare(); err != nil {
			return fmt.Errorf("a namespace for %s: %w", h.name, err)
		}
		defer unix.Close(h.ns)
	}
	fmt.Fprintln(out, "Two hosts, alice and bob, each in a network namespace of its own. Nothing of your system is touched.")
	if err := cable(alice, bob); err != nil {
		return fmt.Errorf("a link between alice and bob: %w", err)
	}
	for i, h := range hosts {
		path := filepath.Join(dir, h.name+".conf")
		text := h.file(hosts[1-i])
		fmt.Fprintf(out, "\n%s.conf\n    %s\n", h.name, strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    "))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		if err := h.start(path, verbose); err != nil {
			return fmt.Errorf("start the daemon of %s: %w", h.name, err)
		}
		defer func() { err = errors.Join(err, h.stop()) }()
	}
	fmt.Fprintln(out)
	for family, name := range []string{"IPv4", "IPv6"} {
		said, err := talk(ctx, alice, bob, family)
		if err != nil {
			return fmt.Errorf("alice talks to bob by %s: %w", name, err)
		}
		fmt.Fprintf(out, "%s  alice to bob, %s\n", name, said)
	}
	if _, err := exec.LookPath("wg"); err == nil {
		shown, err := exec.CommandContext(ctx, "wg", "show", "alice").CombinedOutput()
		if err != nil {
			return fmt.Errorf("wg show: %w\n%s", err, shown)
		}
		fmt.Fprintf(out, "\nwg show alice\n    %s\n", strings.ReplaceAll(strings.TrimSpace(string(shown)), "\n", "\n    "))
	}
	fmt.Fprintln(out, "\nAll worked. Next: read examples/wireguard/tunnel.go, which makes an overlay.Device WireGuard's.")
	return nil
}

// openNamespace opens the network namespace that the thread is in.
func openNamespace() (int, error) {
	return unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// unshare gives the host its namespace.
func (h *demoHost) unshare() error {
	return abroad(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() (err error) {
		h.ns, err = openNamespace()
		return err
	})
}

// in runs fn in the host's namespace. What it opens stays there.
func (h *demoHost) in(fn func() error) error {
	return abroad(func() error { return unix.Setns(h.ns, unix.CLONE_NEWNET) }, fn)
}

// abroad runs fn where leave takes the thread, and takes it home.
func abroad(leave, fn func() error) error {
	runtime.LockOSThread()
	home, err := openNamespace()
	if err == nil {
		defer unix.Close(home)
		if err = leave(); err == nil {
			err = fn()
			if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
				return errors.Join(err, back) // and nobody else gets the thread
			}
		}
	}
	runtime.UnlockOSThread()
	return err
}

// cable makes the underlay: a pair of links.
func cable(a, b *demoHost) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(b.ns)
	if err := a.in(func() error { return netlink.LinkAdd(veth) }); err != nil {
		return err
	}
	for _, h := range []*demoHost{a, b} {
		err := h.in(func() error {
			addr, err := netlink.ParseAddr(fmt.Sprintf("192.0.2.%d/24", h.n))
			if err != nil {
				return err
			}
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// file is what the daemon of h is to read.
func (h *demoHost) file(other *demoHost) string {
	text := base64.StdEncoding.EncodeToString
	return fmt.Sprintf(`[Interface]
Address = %s/24, %s/64
ListenPort = 51820
PrivateKey = %s

[Peer]
PublicKey = %s
AllowedIPs = %s, %s
Endpoint = 192.0.2.%d:51820
`, h.addr(0), h.addr(1), text(h.private.Bytes()), text(other.private.PublicKey().Bytes()), other.addr(0), other.addr(1), other.n)
}

// start runs the daemon of h and waits until it answers wg(8), which it does when all is in force.
func (h *demoHost) start(path string, verbose bool) error {
	h.daemon = exec.Command("/proc/self/exe", path)
	if verbose {
		h.daemon.Args = slices.Insert(h.daemon.Args, 1, "-v")
	}
	h.daemon.Stderr = os.Stderr
	h.daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL} // of a thread that the runtime keeps
	if err := h.in(h.daemon.Start); err != nil {
		return err
	}
	return within(demoPatience, func() error {
		conn, err := net.Dial("unix", "/var/run/wireguard/"+h.name+".sock")
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(demoPatience)); err != nil {
			return err
		}
		if _, err = io.WriteString(conn, "get=1\n\n"); err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		return err
	})
}

func (h *demoHost) stop() error {
	if err := h.daemon.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	return h.daemon.Wait()
}

// within tries until it works or the time is over.
func within(patience time.Duration, try func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if err := try(); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// talk measures a round trip and a second of TCP from a to b, and says how fast they were.
func talk(ctx context.Context, a, b *demoHost, family int) (said string, err error) {
	var listener net.Listener
	err = b.in(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(b.addr(family), "0"))
		return err
	})
	if err != nil {
		return "", err
	}
	defer listener.Close()
	var conn net.Conn
	dialer := net.Dialer{Timeout: demoPatience}
	err = a.in(func() (err error) {
		conn, err = dialer.DialContext(ctx, "tcp", listener.Addr().String()) // an address: no second goroutine has a part in it
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	other, err := listener.Accept()
	if err != nil {
		return "", err
	}
	defer other.Close()
	defer context.AfterFunc(ctx, func() { conn.Close(); other.Close() })()

	begun, one := time.Now(), make([]byte, 1)
	for _, end := range []net.Conn{conn, other} { // there and back
		if _, err := end.Write(one); err != nil {
			return "", err
		}
		if _, err := map[net.Conn]net.Conn{conn: other, other: conn}[end].Read(one); err != nil {
			return "", err
		}
	}
	roundTrip := time.Since(begun)

	begun = time.Now()
	sent := make(chan error, 1)
	go func() {
		for buffer := make([]byte, 128<<10); time.Since(begun) < time.Second; {
			if _, err := conn.Write(buffer); err != nil {
				sent <- err
				return
			}
		}
		sent <- conn.(*net.TCPConn).CloseWrite()
	}()
	n, err := io.Copy(io.Discard, other)
	if err = errors.Join(err, <-sent, ctx.Err()); err != nil {
		return "", err
	}
	gigabits := float64(n) * 8 / 1e9 / time.Since(begun).Seconds()
	return fmt.Sprintf("round trip %d µs, %.2f Gbit/s of TCP", roundTrip.Microseconds(), gigabits), nil
}
