//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"example.com/overlay/examples/internal/stage"

	"golang.org/x/sys/unix"
)

// bgpdConf is the configuration of bgpd; zebra needs none. Both families go over IPv4 sessions: for one over IPv6 FRR wants
// link-local addresses, which an overlay.Device does not have. What a host announces need not be in its kernel.
var bgpdConf = template.Must(template.New("bgpd.conf").Parse(`log stdout
router bgp 65000
 bgp router-id {{.ID}}
 no bgp default ipv4-unicast
 no bgp network import-check
{{- range .Peers4}}
 neighbor {{.}} remote-as 65000
 neighbor {{.}} timers connect 1
 neighbor {{.}} advertisement-interval 0
{{- end}}
 address-family ipv4 unicast
  maximum-paths ibgp 8
{{- range .Peers4}}
  neighbor {{.}} activate
{{- end}}
 exit-address-family
 address-family ipv6 unicast
  maximum-paths ibgp 8
{{- range .Peers4}}
  neighbor {{.}} activate
{{- end}}
 exit-address-family
`))

// frr is FRR on a host: bgpd speaks, zebra tells the kernel.
type frr struct {
	ns          *stage.Namespace
	dir         string
	paths       map[string]string // of programs
	setup       setup
	announced   []netip.Prefix
	zebra, bgpd *daemon
}

// lookForFRR says what is here of FRR, and how to run it.
func lookForFRR() (*brand, error) {
	paths, err := find("FRR", "frr", "zebra", "bgpd", "vtysh")
	if err != nil {
		return nil, err
	}
	said, err := exec.Command(paths["zebra"], "--version").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("zebra --version: %w\n%s", err, said)
	}
	version, _, _ := strings.Cut(strings.TrimPrefix(string(said), "zebra version "), "\n")
	return &brand{
		name: "FRR", version: "FRR " + version, file: "frr.go", sessions: 1, prepare: prepareFRR,
		router: func(h *host, hosts []*host) router {
			return &frr{ns: h.ns, dir: h.dir, paths: paths, setup: newSetup(h, hosts)}
		},
	}, nil
}

// prepareFRR lets FRR's daemons run as root, alone or of a user namespace, where there is no other user: root has to be in the
// group frrvty for that, in /etc/group as this process and its children see it. And FRR leaves its logs in /var/tmp.
func prepareFRR() error {
	group := filepath.Join(arena, "group")
	return errors.Join(
		os.WriteFile(group, []byte("root:x:0:\nfrrvty:x:0:root\n"), 0o644),
		unix.Mount(group, "/etc/group", "", unix.MS_BIND, ""),
		unix.Mount("bgpmesh", "/var/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777"))
}

func (f *frr) path(name string) string { return filepath.Join(f.dir, name) }

func (f *frr) config() string { return f.setup.text(bgpdConf) }

func (f *frr) start(ctx context.Context) (err error) {
	for name, text := range map[string]string{"zebra.conf": "log stdout\n", "bgpd.conf": f.config(), "vtysh.conf": ""} {
		if err := os.WriteFile(f.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if f.zebra, err = f.run(ctx, "zebra"); err != nil {
		return err
	}
	f.bgpd, err = f.run(ctx, "bgpd", "-l", f.setup.ID.String())
	return err
}

// run runs a daemon with all its files and sockets in the host's directory, and nothing open to the network but BGP.
func (f *frr) run(ctx context.Context, name string, more ...string) (*daemon, error) {
	d, err := startDaemon(f.ns, f.paths[name], append([]string{
		"-u", "root", "-g", "root", "-A", "127.0.0.1", "-P", "0", "--vty_socket", f.dir, "--log", "stdout",
		"-z", f.path("zserv.api"), "-i", f.path(name + ".pid"), "-f", f.path(name + ".conf"),
	}, more...)...)
	if err != nil {
		return nil, err
	}
	return d, d.awaitWord(ctx, " starting: vty")
}

func (f *frr) announce(ctx context.Context, prefixes []netip.Prefix) error {
	args := []string{"--config_dir", f.dir, "--vty_socket", f.dir, "-d", "bgpd", "-c", "configure", "-c", "router bgp 65000"}
	change := func(verb string, p netip.Prefix) {
		family := "ipv4"
		if p.Addr().Is6() {
			family = "ipv6"
		}
		args = append(args, "-c", "address-family "+family+" unicast", "-c", verb+"network "+p.String(), "-c", "exit-address-family")
	}
	for _, p := range f.announced {
		if !slices.Contains(prefixes, p) {
			change("no ", p)
		}
	}
	for _, p := range prefixes {
		if !slices.Contains(f.announced, p) {
			change("", p)
		}
	}
	_, err := command(ctx, f.ns, f.paths["vtysh"], args...)
	if err == nil {
		f.announced = prefixes
	}
	return err
}

func (f *frr) stop() error {
	var errs []error
	for _, d := range []*daemon{f.bgpd, f.zebra} {
		if d != nil {
			errs = append(errs, d.stop())
		}
	}
	return errors.Join(errs...)
}

func (f *frr) log() string { return f.zebra.last() + "\n" + f.bgpd.last() }
