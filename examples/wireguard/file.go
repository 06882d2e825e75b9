package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// lineError says what is wrong with which key in which line of a file.
type lineError struct {
	file string
	line int
	key  string
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("%s:%d: %s: %v", e.file, e.line, e.key, e.err) }
func (e *lineError) Unwrap() error { return e.err }

// key is a WireGuard key of any kind.
type key [32]byte

// at is a value and where it stands.
type at[T any] struct {
	value T
	line  int // 0: the file does not have it
}

// file is what a wg-quick file says.
type file struct {
	name string

	addresses  []at[netip.Prefix] // own, with the length of their networks
	mtu        at[int64]          // bytes
	table      at[int64]          // routing table of the routes; tableAuto, tableOff
	listenPort at[int64]
	mark       at[int64] // of the packets that WireGuard sends
	privateKey at[key]
	peers      []*peer
	foreign    []at[string] // keys of wg-quick's that are read over
}

// Tables, beside numbers. The library knows auto by the same number.
const (
	tableAuto = 0
	tableMain = 254
	tableOff  = -1
)

// peer is a [Peer] section.
type peer struct {
	line         int
	publicKey    at[key]
	presharedKey at[key]
	allowed      []at[netip.Prefix]
	endpoint     at[string] // host:port
	keepalive    at[int64]  // seconds; 0: none
}

// foreign are the keys of [Interface] that are for other programs than a daemon to see to.
var foreign = []string{"DNS", "PreUp", "PostUp", "PreDown", "PostDown", "SaveConfig"}

// parser reads a file line by line and goes on after an error, so that all of them can be told at once.
type parser struct {
	file    *file
	section string // "", "interface", "peer"; "?" is one that is unknown, whose keys are read over
	line    int
	key     string
	errs    []error
}

// parseFile reads a wg-quick file. The error holds a *lineError for each thing that is wrong.
func parseFile(name, text string) (*file, error) {
	p := parser{file: &file{name: name}}
	seen := 0 // the line of [Interface]
	for line := range strings.SplitSeq(text, "\n") {
		p.line++
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if strings.HasPrefix(line, "[") {
			name, closed := strings.CutSuffix(line[1:], "]")
			name = strings.TrimSpace(name)
			p.key, p.section = "["+shown(name)+"]", strings.ToLower(name)
			switch {
			case !closed:
				p.key, p.section = "["+shown(name), "?"
				p.refuse("want a ] at its end")
			case p.section == "peer":
				p.file.peers = append(p.file.peers, &peer{line: p.line})
			case p.section != "interface":
				p.section = "?"
				p.refuse("there are only [Interface] and [Peer]")
			case seen > 0:
				p.refuse("again, after line %d", seen)
			default:
				seen = p.line
			}
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if p.key = shown(name); !ok || p.key != name {
			p.refuse("want a key, = and a value")
			continue
		}
		p.set(strings.TrimSpace(value))
	}
	p.complete()
	return p.file, errors.Join(p.errs...)
}

// shown is the word by which an error may name a line, "?" where it has none: without its = the line of a key may be a secret.
func shown(name string) string {
	end := strings.IndexFunc(name, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	if end < 0 {
		end = len(name)
	}
	rest := name[end:]
	if end == 0 || end >= base64.RawStdEncoding.EncodedLen(len(key{})) || rest != "" && !strings.ContainsAny(rest[:1], " \t:") {
		return "?"
	}
	return name[:end]
}

func (p *parser) refuse(format string, args ...any) { p.refuseAt(p.line, p.key, format, args...) }

func (p *parser) refuseAt(line int, key, format string, args ...any) {
	p.errs = append(p.errs, &lineError{p.file.name, line, key, fmt.Errorf(format, args...)})
}

// set takes a line with a key.
func (p *parser) set(value string) {
	name := strings.ToLower(p.key)
	switch p.section {
	case "":
		p.refuse("stands before [Interface]")
	case "interface":
		p.setInterface(name, value)
	case "peer":
		p.setPeer(p.file.peers[len(p.file.peers)-1], name, value)
	}
}

func (p *parser) setInterface(name, value string) {
	f := p.file
	switch name {
	case "address":
		p.prefixes(&f.addresses, value, func(prefix netip.Prefix) netip.Prefix { return prefix })
	case "mtu":
		p.number(&f.mtu, value, 68, 65535)
	case "table":
		p.number(&f.table, value, 1, 1<<31-1, word{"auto", tableAuto}, word{"off", tableOff}, word{"main", tableMain})
	case "listenport":
		p.number(&f.listenPort, value, 0, 65535)
	case "fwmark":
		p.number(&f.mark, value, 0, 1<<32-1, word{"off", 0})
	case "privatekey":
		p.secret(&f.privateKey, value)
	default:
		for _, known := range foreign {
			if name == strings.ToLower(known) {
				f.foreign = append(f.foreign, at[string]{known, p.line})
				return
			}
		}
		p.refuse("is no key of [Interface]")
	}
}

func (p *parser) setPeer(to *peer, name, value string) {
	switch name {
	case "publickey":
		p.secret(&to.publicKey, value)
	case "presharedkey":
		p.secret(&to.presharedKey, value)
	case "allowedips":
		p.prefixes(&to.allowed, value, netip.Prefix.Masked)
	case "endpoint":
		host, port, err := net.SplitHostPort(value)
		if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host == "" {
			p.refuse("%q: want HOST:PORT", value)
			return
		}
		put(p, &to.endpoint, value)
	case "persistentkeepalive":
		p.number(&to.keepalive, value, 0, 65535, word{"off", 0})
	default:
		p.refuse("is no key of [Peer]")
	}
}

// put stores what may stand in a section once.
func put[T any](p *parser, to *at[T], value T) {
	if to.line > 0 {
		p.refuse("again, after line %d", to.line)
		return
	}
	*to = at[T]{value, p.line}
}

// word is a value that stands for a number.
type word struct {
	text  string
	value int64
}

func (p *parser) number(to *at[int64], text string, least, most int64, words ...word) {
	want := ""
	for _, w := range words {
		if w.text == text {
			put(p, to, w.value)
			return
		}
		want += ", or " + w.text
	}
	digits, base := text, 10
	if hex, ok := strings.CutPrefix(text, "0x"); ok {
		digits, base = hex, 16
	}
	n, err := strconv.ParseInt(digits, base, 64)
	if err != nil || n < least || n > most {
		p.refuse("%q: want %d…%d%s", text, least, most, want)
		return
	}
	put(p, to, n)
}

// secret does not repeat in an error what may be a key but for a slip.
func (p *parser) secret(to *at[key], text string) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != len(key{}) {
		p.refuse("is not 32 bytes in base64")
		return
	}
	put(p, to, key(raw))
}

// prefixes appends a list; an address by itself is one host.
func (p *parser) prefixes(to *[]at[netip.Prefix], list string, normal func(netip.Prefix) netip.Prefix) {
	for text := range strings.SplitSeq(list, ",") {
		text = strings.TrimSpace(text)
		if text == "" && list == text {
			return // AllowedIPs may be empty
		}
		prefix, err := netip.ParsePrefix(text)
		if addr, addrErr := netip.ParseAddr(text); addrErr == nil && addr.Zone() == "" {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			p.refuse("%q is neither an address nor a prefix", text)
			continue
		}
		*to = append(*to, at[netip.Prefix]{normal(prefix), p.line})
	}
}

// complete looks for what is missing, and for what contradicts other lines.
func (p *parser) complete() {
	f := p.file
	if f.privateKey.line == 0 {
		p.refuseAt(max(p.line, 1), "PrivateKey", "missing in [Interface]")
	}
	owners := make(map[netip.Prefix]int)
	for i, peer := range f.peers {
		if peer.publicKey.line == 0 {
			p.refuseAt(peer.line, "PublicKey", "missing in [Peer]")
			continue
		}
		for _, other := range f.peers[:i] {
			if other.publicKey.value == peer.publicKey.value {
				p.refuseAt(peer.publicKey.line, "PublicKey", "is that of line %d", other.publicKey.line)
			}
		}
		// WireGuard itself would let the last peer have it, whatever was meant.
		peer.allowed = slices.DeleteFunc(peer.allowed, func(a at[netip.Prefix]) bool {
			switch first := owners[a.value]; {
			case first == 0:
				owners[a.value] = a.line
			case first < peer.line:
				p.refuseAt(a.line, "AllowedIPs", "%v is another peer's, by line %d", a.value, first)
			default:
				return true // the same peer says it twice
			}
			return false
		})
		for _, a := range peer.allowed {
			if a.value.Bits() == 0 && f.table.value == tableAuto {
				p.refuseAt(a.line, "AllowedIPs", "a default route, %v, takes over the host, with it what WireGuard sends: "+
					"say which table by Table = NUMBER, Table = main if it is meant, or Table = off", a.value)
			}
		}
	}
}
