//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"

	"example.com/overlay/examples/internal/stage"
)

// birdConf is the whole configuration. Each pair of hosts has a session for each family, so that gateways are of the family of
// what they lead to. With merge paths, routes of equal cost become one with many gateways, which the agent shares flows out to.
var birdConf = template.Must(template.New("bird.conf").Parse(`log stderr all;
router id {{.ID}};
protocol device {}
protocol kernel { ipv4 { export all; }; merge paths on; }
protocol kernel { ipv6 { export all; }; merge paths on; }
template bgp mesh {
	local as 65000;
	direct;                    # every host is one hop away
	connect delay time 1;
	connect retry time 1;
	error wait time 1, 1;
}
{{- range .Peers4}}
protocol bgp from mesh { neighbor {{.}} as 65000; ipv4 { import all; export where source = RTS_STATIC; }; }
{{- end}}
{{- range .Peers6}}
protocol bgp from mesh { neighbor {{.}} as 65000; ipv6 { import all; export where source = RTS_STATIC; }; }
{{- end}}
protocol static { ipv4;
{{- range .Prefixes4}}
	route {{.}} blackhole;     # what is for nobody in it ends here
{{- end}}
}
protocol static { ipv6;
{{- range .Prefixes6}}
	route {{.}} blackhole;
{{- end}}
}
`))

// bird is BIRD 2 on a host.
type bird struct {
	ns    *stage.Namespace
	dir   string
	paths map[string]string // of programs
	setup setup
	*daemon
}

// lookForBIRD says what is here of BIRD, and how to run it.
func lookForBIRD() (*brand, error) {
	paths, err := find("BIRD", "bird2", "bird", "birdc")
	if err != nil {
		return nil, err
	}
	version, err := exec.Command(paths["bird"], "--version").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("bird --version: %w\n%s", err, version)
	}
	return &brand{
		name: "BIRD", version: strings.Replace(strings.TrimSpace(string(version)), " version", "", 1),
		file: "bird.go", sessions: 2, prepare: func() error { return nil },
		router: func(h *host, hosts []*host) router {
			return &bird{ns: h.ns, dir: h.dir, paths: paths, setup: newSetup(h, hosts)}
		},
	}, nil
}

func (b *bird) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bird) config() string { return b.setup.text(birdConf) }

func (b *bird) start(ctx context.Context) (err error) {
	if err := os.WriteFile(b.path("bird.conf"), []byte(b.config()), 0o600); err != nil {
		return err
	}
	b.daemon, err = startDaemon(b.ns, b.paths["bird"], "-f", "-c", b.path("bird.conf"), "-s", b.path("ctl"), "-P", b.path("pid"))
	if err != nil {
		return err
	}
	return b.awaitWord(ctx, "Started")
}

func (b *bird) announce(ctx context.Context, prefixes []netip.Prefix) error {
	b.setup.announce(prefixes)
	if err := os.WriteFile(b.path("bird.conf"), []byte(b.config()), 0o600); err != nil {
		return err
	}
	out, err := command(ctx, b.ns, b.paths["birdc"], "-s", b.path("ctl"), "configure")
	if err == nil && !strings.Contains(out, "Reconfigur") {
		err = fmt.Errorf("birdc configure: %s", out)
	}
	return err
}

func (b *bird) stop() error {
	if b.daemon == nil {
		return nil
	}
	return b.daemon.stop()
}

func (b *bird) log() string { return b.last() }
