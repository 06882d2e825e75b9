package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"

	"golang.org/x/sys/unix"
)

// reload sends SIGHUP and waits for what the daemon says about it.
func (h *host) reload(says string) {
	h.Helper()
	before := strings.Count(h.daemon.Output(), says)
	if err := h.daemon.Signal(unix.SIGHUP); err != nil {
		h.Fatal(err)
	}
	eventually(h, "the daemon says again "+says, func() bool { return strings.Count(h.daemon.Output(), says) > before })
}

// peers are the public keys that wg(8) shows.
func (h *host) peers() []string {
	h.Helper()
	peers := strings.Fields(h.ns.Run(h, "wg", "show", h.link(), "peers"))
	slices.Sort(peers)
	return peers
}

func (h *host) wantPeers(peers ...*host) {
	h.Helper()
	var want []string
	for _, p := range peers {
		want = append(want, p.public)
	}
	slices.Sort(want)
	if got := h.peers(); !slices.Equal(got, want) {
		h.Errorf("wg(8) shows the peers %v, want %v", got, want)
	}
}

// routed says whether the kernel sends what is for an address into the tunnel.
func (h *host) routed(addr string) bool {
	out, err := h.ns.TryRun("ip", "route", "get", addr)
	return err == nil && strings.Contains(out, "dev "+h.link())
}

// TestReload adds and removes a peer and what peers are allowed, while a TCP connection with another peer goes on.
func TestReload(t *testing.T) {
	nstest.Leaks(t)
	hosts := newHosts(t, 3)
	one, two, three := hosts[0], hosts[1], hosts[2]
	for _, h := range hosts[1:] {
		h.configure(one.peerSection(4))
		h.run()
	}
	one.configure(two.peerSection(0))
	one.run()
	two.ping(one)

	out, in := two.dial(one, 4)
	var received atomic.Int64
	ended := make(chan error, 2)
	go func() {
		for buffer := make([]byte, 16<<10); ; {
			if _, err := out.Write(buffer); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() {
		for buffer := make([]byte, 16<<10); ; {
			n, err := in.Read(buffer)
			if received.Add(int64(n)); err != nil {
				ended <- err
				return
			}
		}
	}()
	flows := func(when string) {
		t.Helper()
		was := received.Load()
		eventually(t, "a MiB more received "+when, func() bool { return received.Load() > was+1<<20 })
	}
	flows("at first")

	one.configure(two.peerSection(0), three.peerSection(0))
	one.reload("msg=reloaded")
	one.wantPeers(two, three)
	three.ping(one)
	flows("with another peer")

	three.ns.Run(t, "ip addr add 192.168.7.1/32 dev lo")
	if one.routed("192.168.7.1") {
		t.Error("192.168.7.1 is routed into the tunnel before it is allowed")
	}
	one.configure(two.peerSection(0), three.peerSection(0, "AllowedIPs = 192.168.7.0/24"))
	one.reload("msg=reloaded")
	one.ns.Run(t, "ping -q -c 1 -W 5 192.168.7.1")
	flows("with another subnet")

	one.configure("bad", two.peerSection(0))
	one.reload("not reloaded")
	one.wantPeers(two, three)
	one.ns.Run(t, "ping -q -c 1 -W 5 192.168.7.1")

	one.configure(two.peerSection(0))
	one.reload("msg=reloaded")
	one.wantPeers(two)
	if one.routed("192.168.7.1") {
		t.Error("192.168.7.1 is routed into the tunnel when nobody is allowed it any more")
	}
	if out, err := three.ns.TryRun("ping -q -c 1 -W 0.3", one.overlay(4)); err == nil {
		t.Errorf("a peer that was removed still gets an answer:\n%s", out)
	}
	flows("in the end")
	select {
	case err := <-ended:
		t.Errorf("the connection ended: %v", err)
	default:
	}
	out.Close()
	<-ended
	<-ended
}

// TestWG looks at the daemon by wg(8) and changes it so; SIGHUP puts the file in force again.
func TestWG(t *testing.T) {
	nstest.Leaks(t)
	hosts := newHosts(t, 3)
	one, two, three := hosts[0], hosts[1], hosts[2]
	one.configure(two.peerSection(4, "PersistentKeepalive = 25"))
	two.configure(one.peerSection(4))
	two.run() // first, because the other speaks at once
	one.run()
	one.ping(two)
	shown := one.ns.Run(t, "wg show "+one.link())
	for _, want := range []string{
		"interface: wg1", "public key: " + one.public, "listening port: 51820", "peer: " + two.public, "endpoint: 192.0.2.2:51820",
		"allowed ips: 10.42.0.2/32, fd42::2/128", "latest handshake: ", "transfer: ", "persistent keepalive: every 25 seconds",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("wg show does not say %q:\n%s", want, shown)
		}
	}
	one.ns.Run(t, "wg", "set", one.link(), "peer", three.public, "allowed-ips", "10.42.0.3/32", "endpoint", "192.0.2.3:51820")
	one.wantPeers(two, three)
	one.ns.Run(t, "wg", "set", one.link(), "peer", two.public, "remove")
	one.wantPeers(three)
	one.reload("msg=reloaded")
	one.wantPeers(two)
	one.ping(two)
}

// TestLinkDown takes the link down and up again: the tunnel and its routes are back.
func TestLinkDown(t *testing.T) {
	nstest.Leaks(t)
	hosts := newHosts(t, 2)
	one, two := hosts[0], hosts[1]
	one.configure(two.peerSection(4, "AllowedIPs = 192.168.7.0/24"))
	two.configure(one.peerSection(4))
	one.run()
	two.run()
	one.ping(two)
	one.ns.Run(t, "ip link set wg1 down")
	one.daemon.Expect(t, "Interface state was Up, requested Down")
	one.ns.Run(t, "ip link set wg1 up")
	eventually(t, "the routes are back", func() bool { return one.routed("192.168.7.1") && one.routed(two.overlay(6)) })
	one.ping(two)
	two.ping(one)
}

// TestTerminated ends the daemon while a client of its socket is in the middle of a command, others are idle, and packets flow.
func TestTerminated(t *testing.T) {
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			nstest.Leaks(t)
			hosts := newHosts(t, 2)
			one, two := hosts[0], hosts[1]
			one.configure(two.peerSection(4))
			two.configure(one.peerSection(4))
			one.run()
			two.run()
			one.ping(two)
			for _, says := range []string{"", "", "set=1\n"} {
				conn, err := net.Dial("unix", one.socket())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, says); err != nil {
					t.Fatal(err)
				}
			}
			flood := two.ns.Start(t, "ping -q -f -i 0 -w 5 "+one.overlay(4))
			if err := one.daemon.Signal(signal); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			one.wantEnd(0, "msg=down")
			if took := time.Since(begun); took > 2*time.Second {
				t.Errorf("it took %v", took)
			}
			flood.Kill()
			one.wantNothing()
		})
	}
}

// TestTerminatedInReload ends the daemon while its reload waits for a client of its socket that is in the middle of a command.
func TestTerminatedInReload(t *testing.T) {
	nstest.Leaks(t)
	one := newHosts(t, 1)[0]
	one.configure()
	one.run()
	conn, err := net.Dial("unix", one.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "set=1\nfwmark=5\n"); err != nil {
		t.Fatal(err)
	}
	one.daemon.Expect(t, "UAPI: Updating fwmark") // from now on all others wait for it
	one.set("MTU = 1390")
	if err := one.daemon.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the reload has the device's half in force", func() bool {
		return strings.Contains(one.ns.Run(t, "ip link show wg1"), "mtu 1390")
	})
	if err := one.daemon.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	one.wantEnd(0, "msg=down")
	one.wantNothing()
}

// TestPortTaken reloads to a port that is another's: what was in force stays so, the sockets too.
func TestPortTaken(t *testing.T) {
	for _, port := range []string{"51820", "0"} {
		t.Run(port, func(t *testing.T) {
			nstest.Leaks(t)
			hosts := newHosts(t, 2)
			one, two := hosts[0], hosts[1]
			one.configure(two.peerSection(4))
			one.set("ListenPort = " + port)
			two.configure(one.peerSection(0))
			two.run()
			one.run()
			one.ping(two)
			one.ns.Do(t, func() {
				conn, err := net.ListenPacket("udp", ":51999")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { conn.Close() })
			})
			one.set("ListenPort = 51999")
			one.reload("not reloaded")
			one.ping(two)
			two.ping(one)
		})
	}
}

// set writes a line of [Interface] in the place of the one with that key, if there is one.
func (h *host) set(line string) {
	h.Helper()
	text, err := os.ReadFile(h.conf())
	if err != nil {
		h.Fatal(err)
	}
	name, _, _ := strings.Cut(line, " ")
	lines := slices.DeleteFunc(strings.Split(string(text), "\n"), func(l string) bool { return strings.HasPrefix(l, name+" ") })
	h.writeFile(h.conf(), strings.Join(slices.Insert(lines, 1, line), "\n"))
}

// wantEnd waits for the daemon to end, with that exit code and having said that.
func (h *host) wantEnd(code int, says string) {
	h.Helper()
	ended := make(chan error, 1)
	go func() { ended <- h.daemon.Wait() }()
	select {
	case err := <-ended:
		got := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			got = exit.ExitCode()
		} else if err != nil {
			got = -1 // it cannot be waited for
		}
		if got != code || !strings.Contains(h.daemon.Output(), says) {
			h.Errorf("the daemon ended with %v, want exit code %d and %q\n%s", err, code, says, h.daemon.Output())
		}
	case <-time.After(patience):
		h.daemon.Signal(unix.SIGQUIT) // which shows where it is
		<-ended
		h.Fatalf("the daemon does not end\n%s", h.daemon.Output())
	}
}

// wantNothing requires interface and socket to be gone.
func (h *host) wantNothing() {
	h.Helper()
	if exists(h.socket()) {
		h.Errorf("the socket %s is still there", h.socket())
	}
	if out, err := h.ns.TryRun("ip link show " + h.link()); err == nil {
		h.Errorf("the interface is still there:\n%s", out)
	}
}

// TestTakenAway ends the daemon by deleting its interface, and by removing its socket.
func TestTakenAway(t *testing.T) {
	for name, test := range map[string]struct {
		take func(*host)
		says string
	}{
		"interface": {func(h *host) { h.ns.Run(h, "ip link del "+h.link()) }, "the interface is gone"},
		"socket": {func(h *host) {
			if err := os.Remove(h.socket()); err != nil {
				h.Fatal(err)
			}
		}, "the socket of wg(8) is gone"},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.Leaks(t)
			one := newHosts(t, 1)[0]
			one.configure()
			one.run()
			test.take(one)
			one.wantEnd(exitFailed, test.says)
			one.wantNothing()
		})
	}
}

// TestRefused starts the daemon where it cannot work: it says why and leaves nothing.
func TestRefused(t *testing.T) {
	for name, test := range map[string]struct {
		arrange func(*host)
		says    string
		nothing bool // is left; else what is there is another's
	}{
		"no file":  {func(h *host) {}, "wg1.conf: no such file or directory", true},
		"bad file": {func(h *host) { h.configure("MTU = x") }, `wg1.conf:7: MTU: "x": want 68…65535`, true},
		"port": {func(h *host) {
			h.configure()
			h.ns.Do(h, func() {
				conn, err := net.ListenPacket("udp", ":51820")
				if err != nil {
					h.Fatal(err)
				}
				h.Cleanup(func() { conn.Close() })
			})
		}, "address already in use", true},
		"interface": {func(h *host) {
			h.configure()
			h.ns.OtherTun(h, "wg1")
		}, "overlay: create wg1: ", false},
		"socket": {func(h *host) {
			h.configure()
			if err := os.MkdirAll("/var/run/wireguard", 0o755); err != nil {
				h.Fatal(err)
			}
			l, err := net.Listen("unix", h.socket())
			if err != nil {
				h.Fatal(err)
			}
			h.Cleanup(func() { l.Close() })
		}, "the socket of wg(8): unix socket in use", false},
		"table": {func(h *host) {
			h.configure(fmt.Sprintf("[Peer]\nPublicKey = %s\nAllowedIPs = 0.0.0.0/0\n", key2))
		}, "wg1.conf:9: AllowedIPs: a default route, 0.0.0.0/0, takes over the host", true},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.Leaks(t)
			one := newHosts(t, 1)[0]
			test.arrange(one)
			one.begin(one.conf())
			one.wantEnd(exitFailed, test.says)
			if test.nothing {
				one.wantNothing()
			}
			if output := one.daemon.Output(); strings.Contains(output, "event=up") {
				t.Errorf("the link was up\n%s", output)
			}
		})
	}
}

// TestDefaultRoute has everything go through the tunnel: in a table of its own, and in main, where the underlay is more
// specific.
func TestDefaultRoute(t *testing.T) {
	for _, table := range []string{"4242", "main"} {
		t.Run(table, func(t *testing.T) {
			nstest.Leaks(t)
			hosts := newHosts(t, 2)
			one, two := hosts[0], hosts[1]
			one.configure(strings.Replace(two.peerSection(4, "AllowedIPs = 0.0.0.0/0, ::/0"), "[Peer]", "FwMark = 0xca6c\n[Peer]", 1))
			text, err := os.ReadFile(one.conf())
			if err != nil {
				t.Fatal(err)
			}
			one.writeFile(one.conf(), strings.Replace(string(text), "Table = auto", "Table = "+table, 1))
			two.configure(one.peerSection(4))
			one.run()
			two.run()
			if table != "main" {
				one.ns.Run(t, "ip rule add not fwmark 0xca6c table "+table)
				one.ns.Run(t, "ip -6 rule add not fwmark 0xca6c table "+table)
			}
			two.ns.Run(t, "ip addr add 198.51.100.1/32 dev lo")
			two.ns.Run(t, "ip addr add 2001:db8:1::1/128 dev lo")
			one.ns.Run(t, "ping -q -c 1 -W 5 198.51.100.1")
			one.ns.Run(t, "ping -q -c 1 -W 5 2001:db8:1::1")
		})
	}
}
