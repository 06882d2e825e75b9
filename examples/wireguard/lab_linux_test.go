package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"

	"golang.org/x/sys/unix"
)

const patience = 30 * time.Second // a handshake that is lost is tried again after five seconds, and that may be lost too

// helperDaemon is the program itself in a process of its own, which at its end also looks for what it has left.
const helperDaemon = "wireguard"

func TestMain(m *testing.M) {
	nstest.Helper(helperDaemon, func() error {
		fmt.Println("started")
		code := program(os.Args[1:], os.Stdout, os.Stderr)
		if err := leftovers(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = exitLeft
		}
		os.Exit(code)
		return nil
	})
	nstest.Helper(helperMeasured, measured)
	if os.Getenv(inArena) != "" { // the demo has started itself anew
		os.Exit(program(os.Args[1:], os.Stdout, os.Stderr))
	}
	if os.Getenv(hostMounts) == "" { // else this is the process in the namespaces that Main makes
		os.Setenv(hostMounts, mounts())
	}
	code := nstest.Main(m)
	if scratch.dir != "" {
		os.RemoveAll(scratch.dir)
	}
	os.Exit(code)
}

// hostMounts is in the environment the mount namespace in which the tests were started.
const hostMounts = "OVERLAY_WIREGUARD_MOUNTS"

// mounts is the mount namespace of the process.
func mounts() string {
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		panic(err)
	}
	return ns
}

// exitLeft is the exit code of a daemon that has left something, whatever else it came to.
const exitLeft = 99

// leftovers waits for all goroutines to end but this one, and that of os/signal.
func leftovers() error {
	var left []string
	for range 200 {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		left = nil
		for i, stack := range strings.Split(string(stacks), "\n\n") {
			if i > 0 && !strings.Contains(stack, "os/signal.loop") {
				left = append(left, stack)
			}
		}
		if len(left) == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%d goroutines left:\n%s", len(left), strings.Join(left, "\n\n"))
}

// scratch is what all tests share: sockets of their own, and upstream's daemon.
var scratch struct {
	sync.Mutex
	dir      string
	upstream string
	sockets  bool
}

// isolate gives the tests a /var/run of their own, for the sockets of their daemons.
func isolate(t testing.TB) {
	t.Helper()
	nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.Program("ip"), nstest.Program("ping"), nstest.Program("wg"))
	scratch.Lock()
	defer scratch.Unlock()
	if scratch.sockets {
		return
	}
	if mounts() == os.Getenv(hostMounts) {
		t.Skip("missing a mount namespace of the tests' own")
	}
	if err := unix.Mount("wireguard-test", "/var/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	scratch.sockets = true
}

// upstreamDaemon builds the daemon of golang.zx2c4.com/wireguard, in the version that go.mod names.
func upstreamDaemon(t testing.TB) string {
	t.Helper()
	nstest.Require(t, nstest.Program("go"))
	scratch.Lock()
	defer scratch.Unlock()
	if scratch.upstream != "" {
		return scratch.upstream
	}
	dir, err := os.MkdirTemp("", "wireguard")
	if err != nil {
		t.Fatal(err)
	}
	scratch.dir = dir
	binary := filepath.Join(dir, "wireguard-go")
	if out, err := exec.Command("go", "build", "-o", binary, "golang.zx2c4.com/wireguard").CombinedOutput(); err != nil {
		t.Fatalf("build upstream's daemon: %v\n%s", err, out)
	}
	scratch.upstream = binary
	return binary
}

// host is one end of tunnels: host N is 192.0.2.N and 2001:db8::N on the underlay, 10.42.0.N and fd42::N on the overlay, whose
// interface is wgN.
type host struct {
	testing.TB
	n               int
	ns              *nstest.NS
	dir             string
	private, public string
	daemon          *nstest.Process
}

// newHosts makes hosts, all on one underlay, a bridge.
func newHosts(t testing.TB, n int) []*host {
	t.Helper()
	isolate(t)
	hosts := make([]*host, n)
	for i := range hosts {
		h := &host{TB: t, n: i + 1, ns: nstest.New(t), dir: t.TempDir()}
		h.private = strings.TrimSpace(h.ns.Run(t, "wg genkey"))
		cmd := exec.Command("wg", "pubkey")
		cmd.Stdin = strings.NewReader(h.private)
		public, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		h.public = strings.TrimSpace(string(public))
		hosts[i] = h
		if i == 0 {
			continue
		}
		// A star around host 1, which forwards nothing: each link is a subnet of /32s.
		nstest.Veth(t, hosts[0].ns, h.ns, fmt.Sprintf("eth%d", h.n), "eth1")
		hosts[0].cable(h, fmt.Sprintf("eth%d", h.n))
		h.cable(hosts[0], "eth1")
	}
	return hosts
}

// cable says which host is at the other end of a link.
func (h *host) cable(to *host, link string) {
	h.Helper()
	h.ns.Run(h, "ip", "addr", "replace", h.underlay(4), "peer", to.underlay(4), "dev", link)
	h.ns.Run(h, "ip", "addr", "replace", h.underlay(6), "peer", to.underlay(6), "dev", link, "nodad")
}

func (h *host) underlay(family int) string {
	if family == 4 {
		return fmt.Sprintf("192.0.2.%d", h.n)
	}
	return fmt.Sprintf("2001:db8::%d", h.n)
}

func (h *host) overlay(family int) string {
	if family == 4 {
		return fmt.Sprintf("10.42.0.%d", h.n)
	}
	return fmt.Sprintf("fd42::%d", h.n)
}

func (h *host) link() string   { return fmt.Sprintf("wg%d", h.n) }
func (h *host) conf() string   { return filepath.Join(h.dir, h.link()+".conf") }
func (h *host) socket() string { return "/var/run/wireguard/" + h.link() + ".sock" }

// peerSection is h as others see it. With family 0 it has no endpoint: it must speak first.
func (h *host) peerSection(family int, more ...string) string {
	section := fmt.Sprintf("[Peer]\nPublicKey = %s\nAllowedIPs = %s/32, %s/128\n", h.public, h.overlay(4), h.overlay(6))
	if family != 0 {
		section += fmt.Sprintf("Endpoint = %s\n", net.JoinHostPort(h.underlay(family), "51820"))
	}
	return section + strings.Join(append(more, ""), "\n")
}

// configure writes the file of h.
func (h *host) configure(sections ...string) {
	h.Helper()
	h.writeFile(h.conf(), fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\nAddress = %s/24, %s/64\nTable = auto\n\n",
		h.private, h.overlay(4), h.overlay(6))+strings.Join(sections, "\n"))
}

func (h *host) writeFile(path, text string) {
	h.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		h.Fatal(err)
	}
}

// run starts our daemon.
func (h *host) run() {
	h.Helper()
	h.begin("-v", h.conf())
	h.daemon.Expect(h, "msg=up")
}

// begin starts our daemon and does not wait.
func (h *host) begin(args ...string) {
	h.Helper()
	h.daemon, _ = h.ns.StartHelper(h, helperDaemon, nstest.HelperOptions{Args: args})
}

// runUpstream starts upstream's daemon and does what wg-quick would do with the file.
func (h *host) runUpstream() {
	h.Helper()
	h.daemon = h.ns.Start(h, "env", "LOG_LEVEL=verbose", upstreamDaemon(h), "-f", h.link())
	h.daemon.Expect(h, "UAPI listener started")
	text, err := os.ReadFile(h.conf())
	if err != nil {
		h.Fatal(err)
	}
	var stripped []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "Address") && !strings.HasPrefix(line, "Table") {
			stripped = append(stripped, line)
		}
	}
	h.writeFile(h.conf()+".stripped", strings.Join(stripped, ""))
	h.ns.Run(h, "wg", "setconf", h.link(), h.conf()+".stripped")
	h.assign()
}

// ping asks another host by both families, by small packets and by some that fill the MTU.
func (h *host) ping(to *host) {
	h.Helper()
	for family, full := range map[int]string{4: "1392", 6: "1372"} {
		for _, size := range []string{"56", full} {
			h.ns.Run(h, "ping", "-q", "-n", "-c", "3", "-i", "0.01", "-W", "5", "-M", "do", "-s", size, to.overlay(family))
		}
	}
}

// dial connects to another host, which returns what it accepts.
func (h *host) dial(to *host, family int) (out, in *net.TCPConn) {
	h.Helper()
	var listener net.Listener
	var conn net.Conn
	var err error
	to.ns.Do(h, func() { listener, err = net.Listen("tcp", net.JoinHostPort(to.overlay(family), "0")) })
	if err != nil {
		h.Fatal(err)
	}
	defer listener.Close()
	h.ns.Do(h, func() { conn, err = net.DialTimeout("tcp", listener.Addr().String(), patience) })
	if err != nil {
		h.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { conn.Close(); accepted.Close() })
	return conn.(*net.TCPConn), accepted.(*net.TCPConn)
}

// transfer sends so many bytes to another host and requires them to arrive as they were.
func (h *host) transfer(to *host, family, size int) {
	h.Helper()
	out, in := h.dial(to, family)
	sent := make([]byte, size)
	for i := range sent {
		sent[i] = byte(i>>8 ^ i)
	}
	deadline := time.Now().Add(patience)
	err := errors.Join(out.SetDeadline(deadline), in.SetDeadline(deadline))
	done := make(chan error, 1)
	go func() {
		_, err := out.Write(sent)
		done <- errors.Join(err, out.CloseWrite())
	}()
	got, readErr := io.ReadAll(in)
	if err := errors.Join(err, readErr, <-done); err != nil {
		h.Fatalf("%d of %d bytes from %s to %s: %v", len(got), size, h.overlay(family), to.overlay(family), err)
	}
	if !bytes.Equal(got, sent) {
		h.Errorf("the bytes from %s to %s are not those that were sent", h.overlay(family), to.overlay(family))
	}
}

// eventually waits for something to become so.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s", patience, what)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
