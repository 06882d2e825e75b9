package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"example.com/overlay"

	"golang.zx2c4.com/wireguard/device"
)

// settings is what a file asks of both halves of the daemon.
type settings struct {
	*file
	cfg       overlay.Config
	endpoints map[key]netip.AddrPort
}

// load reads and checks a file, to the last that can be known before it is put in force; before, if not nil, is in force. The interface
// has the file's name, without .conf.
func load(ctx context.Context, path string, before *settings) (*settings, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := parseFile(path, string(text))
	if err != nil {
		return nil, err
	}
	s := &settings{file: f}
	if s.cfg, err = f.config(strings.TrimSuffix(filepath.Base(path), ".conf")); err != nil {
		return nil, err
	}
	var known map[key]netip.AddrPort
	if before != nil {
		known = before.endpoints
	}
	s.endpoints, err = f.resolve(ctx, known)
	return s, err
}

// config is the overlay's half: addresses, and a route for everything that peers may send and get. Which peer a packet goes to
// is for WireGuard to know, so none of the routes has a gateway.
func (f *file) config(name string) (overlay.Config, error) {
	cfg := overlay.Config{Name: name, MTU: device.DefaultMTU}
	if f.mtu.line > 0 {
		cfg.MTU = int(f.mtu.value)
	}
	for _, a := range f.addresses {
		cfg.Networks = append(cfg.Networks, a.value)
	}
	var lines []int // of the routes
	for _, p := range f.peers {
		for _, a := range p.allowed {
			if f.table.value != tableOff {
				cfg.Routes = append(cfg.Routes, overlay.Route{Prefix: a.value, Table: int(f.table.value)})
				lines = append(lines, a.line)
			}
		}
	}
	return cfg, f.translate(cfg.Validate(), lines)
}

// translate says of what the library refuses in which line of the file it stands.
func (f *file) translate(err error, routes []int) error {
	if err == nil {
		return nil
	}
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	var fields []string
	for i, a := range f.addresses {
		fields = append(fields, fmt.Sprintf("Networks[%d]", i), a.value.String())
	}
	words := strings.NewReplacer(fields...)
	for i, err := range all {
		var refused *overlay.ConfigError
		if !errors.As(err, &refused) {
			continue
		}
		n, line, key := 0, 0, refused.Field
		switch {
		case scan(refused.Field, "Networks[%d]", &n) && n < len(f.addresses):
			line, key = f.addresses[n].line, "Address"
		case scan(refused.Field, "Routes[%d].Table", &n) && n < len(routes) && strings.HasSuffix(refused.Field, ".Table"):
			line = f.table.line
			key = "Table"
		case scan(refused.Field, "Routes[%d]", &n) && n < len(routes):
			line, key = routes[n], "AllowedIPs"
		case refused.Field == "MTU":
			line = f.mtu.line
		}
		if line > 0 {
			all[i] = &lineError{f.name, line, key, errors.New(words.Replace(refused.Err.Error()))}
		} else {
			all[i] = fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return errors.Join(all...)
}

func scan(text, format string, n *int) bool {
	_, err := fmt.Sscanf(text, format, n)
	return err == nil
}

// resolve looks up the hosts of the endpoints. Of several addresses it takes the one that is known already, else the first.
func (f *file) resolve(ctx context.Context, known map[key]netip.AddrPort) (map[key]netip.AddrPort, error) {
	endpoints := make(map[key]netip.AddrPort)
	for _, p := range f.peers {
		if p.endpoint.line == 0 {
			continue
		}
		host, port, _ := net.SplitHostPort(p.endpoint.value) // the parser has seen to that, and to the number
		number, _ := strconv.ParseUint(port, 10, 16)
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, &lineError{f.name, p.endpoint.line, "Endpoint", err}
		}
		addr := addrs[0].Unmap()
		for _, a := range addrs {
			if a.Unmap() == known[p.publicKey.value].Addr() {
				addr = a.Unmap()
			}
		}
		endpoints[p.publicKey.value] = netip.AddrPortFrom(addr, uint16(number))
	}
	return endpoints, nil
}

// commands is WireGuard's half, as what must be said by its protocol (wireguard.com/xplatform) where before is in force and
// have is what its "get" answers: what differs from have, which somebody may have changed by wg(8), and nothing that would
// interrupt what stays. Before is nil at first.
func (s *settings) commands(before *settings, have string) string {
	var out strings.Builder
	now := parseState(have)
	say := func(key string, value any) { fmt.Fprintf(&out, "%s=%v\n", key, value) }

	// Saying the port opens the sockets anew. Without a port they are closed: the last reload came upon one that was taken. It is said
	// first, so that nothing has changed when it is refused.
	if port := s.listenPort.value; port > 0 && port != now.listenPort || before != nil && now.listenPort == 0 {
		say("listen_port", port)
	}
	say("private_key", hex.EncodeToString(s.privateKey.value[:]))
	say("fwmark", s.mark.value)
	wanted := make(map[key]bool)
	for _, p := range s.peers {
		wanted[p.publicKey.value] = true
	}
	for public := range now.peers {
		if !wanted[public] {
			say("public_key", hex.EncodeToString(public[:]))
			say("remove", true)
		}
	}
	for _, p := range s.peers {
		public := p.publicKey.value
		allowed, known := now.peers[public]
		say("public_key", hex.EncodeToString(public[:]))
		say("preshared_key", hex.EncodeToString(p.presharedKey.value[:]))
		say("persistent_keepalive_interval", p.keepalive.value)
		// A peer may have moved since: what the file has always said is older than that.
		if e := s.endpoints[public]; e.IsValid() && (!known || before == nil || before.endpoints[public] != e) {
			say("endpoint", e)
		}
		for _, a := range p.allowed {
			if !allowed[a.value] {
				say("allowed_ip", a.value)
			}
			delete(allowed, a.value)
		}
		for prefix := range allowed {
			say("allowed_ip", "-"+prefix.String())
		}
	}
	return out.String()
}

// state is what commands needs of the answer to "get".
type state struct {
	listenPort int64
	peers      map[key]map[netip.Prefix]bool // what they are allowed
}

func parseState(text string) state {
	s := state{peers: make(map[key]map[netip.Prefix]bool)}
	var allowed map[netip.Prefix]bool
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "=")
		switch name {
		case "listen_port":
			s.listenPort, _ = strconv.ParseInt(value, 10, 64)
		case "public_key":
			var public key
			if raw, err := hex.DecodeString(value); err == nil {
				copy(public[:], raw)
			}
			allowed = make(map[netip.Prefix]bool)
			s.peers[public] = allowed
		case "allowed_ip":
			if prefix, err := netip.ParsePrefix(value); err == nil {
				allowed[prefix] = true
			}
		}
	}
	return s
}
