//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
)

// brand is a kind of router.
type brand struct {
	name, version string
	file          string // where to read how it is set up
	sessions      int    // of BGP, between two hosts
	prepare       func() error
	router        func(h *host, hosts []*host) router
}

// router speaks BGP for one host.
type router interface {
	// start returns when the router takes orders. What it has started ends by stop, also after an error.
	start(ctx context.Context) error
	// announce makes it announce these prefixes and no others.
	announce(ctx context.Context, prefixes []netip.Prefix) error
	// stop ends it in good order: its routes go with it.
	stop() error
	// config is what it was started with.
	config() string
	// log is the last that it said.
	log() string
}

// find returns where programs are. Daemons are where an ordinary user's PATH does not lead.
func find(brand, debian string, names ...string) (map[string]string, error) {
	paths := make(map[string]string)
	var missing []string
	for _, name := range names {
		path, err := exec.LookPath(name)
		for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/frr", "/usr/libexec/frr"} {
			if err != nil {
				path, err = exec.LookPath(filepath.Join(dir, name))
			}
		}
		if err != nil {
			missing = append(missing, name)
		}
		paths[name] = path
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%s is not installed: there is no %s. On Debian: apt install %s", brand, strings.Join(missing, ", no "), debian)
	}
	return paths, nil
}

// setup is what the configurations depend on.
type setup struct {
	ID                   netip.Addr // the host's own, by which its router is known
	Peers4, Peers6       []netip.Addr
	Prefixes4, Prefixes6 []netip.Prefix // announced
}

func newSetup(h *host, hosts []*host) setup {
	s := setup{ID: h.networks[0].Addr()}
	for _, peer := range hosts {
		if peer != h {
			s.Peers4 = append(s.Peers4, peer.networks[0].Addr())
			s.Peers6 = append(s.Peers6, peer.networks[1].Addr())
		}
	}
	return s
}

func (s *setup) announce(prefixes []netip.Prefix) {
	s.Prefixes4, s.Prefixes6 = nil, nil
	for _, p := range prefixes {
		if p.Addr().Is4() {
			s.Prefixes4 = append(s.Prefixes4, p)
		} else {
			s.Prefixes6 = append(s.Prefixes6, p)
		}
	}
}

func (s setup) text(t *template.Template) string {
	var text strings.Builder
	if err := t.Execute(&text, s); err != nil {
		panic(err) // the template is not made for its data
	}
	return text.String()
}
