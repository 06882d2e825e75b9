package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// nebulaElsewhere are keys of nebula's `tun:` section that other parts of nebula read; a device has no use for them.
var nebulaElsewhere = []string{"drop_local_broadcast", "drop_multicast"}

// minNebulaMTU is the smallest MTU that nebula takes for a route.
const minNebulaMTU = 500

// ConfigFromMap lays a decoded nebula `tun:` section over base, and checks it against base.Networks. The map is what any
// YAML, JSON or TOML decoder yields; whole numbers may come as integers, floats or quoted. A key that is there replaces the
// field of base; routes and unsafe_routes together replace Routes. ignored lists the keys that are other parts of nebula's.
//
// The rules are nebula's: routes lie inside the networks and carry an MTU of at least 500; no network holds the address of an
// unsafe route, which may be wider than one; a metric is 0…2³¹−1, a weight 1…2³¹−1. One is our own: gateways lie inside the
// networks. A Config written by hand may say more. Errors are *ConfigError, joined, whose fields are paths like
// "tun.unsafe_routes[2].via[1].weight", or Config's where base is at fault. On error cfg is base.
func ConfigFromMap(base Config, tun map[string]any) (cfg Config, ignored []string, err error) {
	m := &mapping{cfg: base.clone(), networks: base.Networks, tun: tun}
	m.section()
	if len(m.errs) == 0 {
		m.validate()
	}
	if len(m.errs) > 0 {
		return base, m.ignored, errors.Join(m.errs...)
	}
	return m.cfg, m.ignored, nil
}

// mapping is a section on its way into a Config.
type mapping struct {
	validator
	tun      map[string]any
	cfg      Config
	networks []netip.Prefix
	routes   []Route
	paths    []string        // where each of routes came from
	single   map[string]bool // paths of via that are an address and no list
	ignored  []string
}

func (m *mapping) section() {
	keys := make([]string, 0, len(m.tun))
	for key := range m.tun {
		keys = append(keys, key)
	}
	slices.Sort(keys) // errors in an order that does not change
	for _, key := range keys {
		m.key(key, m.tun[key])
	}
	_, hasRoutes := m.tun["routes"]
	if _, hasUnsafe := m.tun["unsafe_routes"]; hasRoutes || hasUnsafe {
		m.cfg.Routes = m.routes
	} else {
		m.paths = nil
	}
}

// scalars are the keys that are as good as absent where nothing stands behind them, which YAML decodes to nil.
var scalars = []string{"disabled", "dev", "mtu", "tx_queue", "use_system_route_table", "use_system_route_table_buffer_size"}

func (m *mapping) key(key string, value any) {
	path := "tun." + key
	if value == nil && slices.Contains(scalars, key) {
		return
	}
	switch key {
	case "disabled":
		m.boolean(path, value, &m.cfg.Disabled)
	case "dev":
		m.text(path, value, &m.cfg.Name)
	case "mtu":
		m.integer(path, value, 0, maxMTU, &m.cfg.MTU)
	case "tx_queue":
		m.integer(path, value, 0, maxTxQueueLen, &m.cfg.TxQueueLen)
	case "routes":
		m.list(path, value, m.route)
	case "unsafe_routes":
		m.list(path, value, m.unsafeRoute)
	case "use_system_route_table":
		var use bool
		if m.boolean(path, value, &use); !use {
			m.cfg.SystemRoutes = nil
		} else if m.cfg.SystemRoutes == nil {
			m.cfg.SystemRoutes = new(SystemRoutes)
		}
	case "use_system_route_table_buffer_size":
		var size int
		if m.integer(path, value, 0, maxReadBuffer, &size); m.cfg.SystemRoutes != nil {
			m.cfg.SystemRoutes.ReadBuffer = size // sorted behind use_system_route_table
		}
	default:
		if slices.Contains(nebulaElsewhere, key) {
			m.ignored = append(m.ignored, key)
			return
		}
		m.refuse(path, value, "unknown key")
	}
}

// route reads an entry of routes: part of a network with an MTU of its own.
func (m *mapping) route(path string, entry map[string]any) {
	var r Route
	m.known(path, entry, "mtu", "route")
	if m.need(path, entry, "mtu") {
		m.integer(path+".mtu", entry["mtu"], minNebulaMTU, maxMTU, &r.MTU)
	}
	if !m.prefix(path, entry, &r.Prefix) {
		return
	}
	if !slices.ContainsFunc(m.networks, func(n netip.Prefix) bool {
		return n.Bits() <= r.Prefix.Bits() && n.Contains(r.Prefix.Addr())
	}) {
		m.refuse(path+".route", r.Prefix, "not inside the overlay networks")
	}
	m.add(path, r)
}

// unsafeRoute reads an entry of unsafe_routes: a prefix outside the networks, behind gateways.
func (m *mapping) unsafeRoute(path string, entry map[string]any) {
	var r Route
	install, before := true, len(m.errs)
	m.known(path, entry, "route", "via", "mtu", "metric", "install")
	if value := entry["mtu"]; value != nil && m.integer(path+".mtu", value, 0, maxMTU, &r.MTU) && r.MTU != 0 && r.MTU < minNebulaMTU {
		m.refuse(path+".mtu", value, "want %d…%d bytes, or 0 for tun.mtu", minNebulaMTU, maxMTU)
	}
	if value := entry["metric"]; value != nil {
		m.integer(path+".metric", value, 0, maxMetric, &r.Metric)
	}
	if value := entry["install"]; value != nil {
		m.boolean(path+".install", value, &install)
	}
	r.NoInstall = !install
	if m.need(path, entry, "via") {
		m.via(path+".via", entry["via"], &r)
	}
	if !m.prefix(path, entry, &r.Prefix) {
		return
	}
	if slices.ContainsFunc(m.networks, func(n netip.Prefix) bool { return n.Contains(r.Prefix.Addr()) }) {
		m.refuse(path+".route", r.Prefix, "inside an overlay network")
	}
	if r.Prefix.Bits() == 0 && r.Metric == 0 && install && len(m.errs) == before { // Validate would ask for a table, which no section has
		m.refuse(path+".route", r.Prefix, "a default route at metric 0 takes over the host: give it a metric")
	}
	m.add(path, r)
}

func (m *mapping) add(path string, r Route) {
	m.routes, m.paths = append(m.routes, r), append(m.paths, path)
}

// via reads one gateway, or a list of gateways with weights.
func (m *mapping) via(path string, value any, r *Route) {
	before := len(m.errs)
	if _, isText := value.(string); isText {
		var g Gateway
		if m.addr(path, value, &g.Addr) {
			r.Via = []Gateway{g}
		}
		if m.single == nil {
			m.single = make(map[string]bool)
		}
		m.single[path] = true
		return
	}
	m.list(path, value, func(path string, entry map[string]any) {
		g := Gateway{Weight: 1}
		m.known(path, entry, "gateway", "weight")
		if value := entry["weight"]; value != nil {
			m.integer(path+".weight", value, 1, math.MaxInt32, &g.Weight)
		}
		if m.need(path, entry, "gateway") && m.addr(path+".gateway", entry["gateway"], &g.Addr) {
			r.Via = append(r.Via, g)
		}
	})
	if len(r.Via) == 0 && len(m.errs) == before {
		m.refuse(path, value, "names no gateway")
	}
}

// validate applies the rules of every Config, under the names that the section has for its fields.
func (m *mapping) validate() {
	v := validator{called: m.rename}
	v.config(&m.cfg)
	m.errs = v.errs
}

// sectionKeys are the keys of the fields that Validate may refuse though a decoded value was taken.
var sectionKeys = map[string]string{"MTU": "mtu", "Name": "dev"}

// sectionNames translates the last parts of a route's path.
var sectionNames = strings.NewReplacer(".Prefix", ".route", ".Table", ".route", ".Via", ".via", ".Addr", ".gateway",
	".Weight", ".weight", ".Metric", ".metric", ".MTU", ".mtu")

// rename gives a field of the Config the path that it has in the section; base's own keep theirs.
func (m *mapping) rename(field string) string {
	if key, ok := sectionKeys[field]; ok {
		if _, ok := m.tun[key]; ok {
			return "tun." + key
		}
	}
	rest, isRoute := strings.CutPrefix(field, "Routes[")
	number, rest, _ := strings.Cut(rest, "]")
	i, err := strconv.Atoi(number)
	if !isRoute || err != nil || i >= len(m.paths) {
		return field
	}
	rest = sectionNames.Replace(rest)
	if m.single[m.paths[i]+".via"] {
		rest = strings.Replace(rest, ".via[0].gateway", ".via", 1)
	}
	return m.paths[i] + rest
}

// known refuses keys that an entry does not have.
func (m *mapping) known(path string, entry map[string]any, keys ...string) {
	var unknown []string
	for key := range entry {
		if !slices.Contains(keys, key) {
			unknown = append(unknown, key)
		}
	}
	slices.Sort(unknown)
	for _, key := range unknown {
		m.refuse(path+"."+key, entry[key], "unknown key")
	}
}

func (m *mapping) need(path string, entry map[string]any, key string) bool {
	there := entry[key] != nil
	if !there {
		m.refuse(path+"."+key, nil, "missing")
	}
	return there
}

// list calls read for each entry of a list of maps, in any of the shapes that decoders give it.
func (m *mapping) list(path string, value any, read func(path string, entry map[string]any)) {
	var entries []any
	switch list := value.(type) {
	case nil: // an empty key in YAML
	case []any:
		entries = list
	case []map[string]any: // TOML
		for _, entry := range list {
			entries = append(entries, entry)
		}
	case []map[any]any:
		for _, entry := range list {
			entries = append(entries, entry)
		}
	default:
		m.refuse(path, value, "not a list")
	}
	for i, value := range entries {
		entryPath := fmt.Sprintf("%s[%d]", path, i)
		if entry, ok := stringMap(value); ok {
			read(entryPath, entry)
		} else {
			m.refuse(entryPath, value, "not a map")
		}
	}
}

// stringMap takes older YAML decoders' maps too.
func stringMap(value any) (map[string]any, bool) {
	switch entry := value.(type) {
	case map[string]any:
		return entry, true
	case map[any]any:
		texts := make(map[string]any, len(entry))
		for key, value := range entry {
			texts[fmt.Sprint(key)] = value
		}
		return texts, true
	}
	return nil, false
}

func (m *mapping) prefix(path string, entry map[string]any, to *netip.Prefix) bool {
	var text string
	if !m.need(path, entry, "route") || !m.text(path+".route", entry["route"], &text) {
		return false
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		m.refuse(path+".route", text, "not a prefix")
		return false
	}
	*to = prefix
	return true
}

func (m *mapping) addr(path string, value any, to *netip.Addr) bool {
	var text string
	if !m.text(path, value, &text) {
		return false
	}
	addr, err := netip.ParseAddr(text)
	if err != nil {
		m.refuse(path, text, "not an address")
		return false
	}
	*to = addr
	return true
}

func (m *mapping) text(path string, value any, to *string) bool {
	text, ok := value.(string)
	if !ok {
		m.refuse(path, value, "not a text")
		return false
	}
	*to = text
	return true
}

// boolean takes what nebula takes: true, yes, y, 1 and their opposites, quoted or not.
func (m *mapping) boolean(path string, value any, to *bool) bool {
	switch text := strings.ToLower(fmt.Sprint(value)); text {
	case "y", "yes":
		*to = true
	case "n", "no":
		*to = false
	default:
		b, err := strconv.ParseBool(text)
		if err != nil {
			m.refuse(path, value, "want true or false")
			return false
		}
		*to = b
	}
	return true
}

// integer takes a whole number within bounds, in any of the types that decoders have for it.
func (m *mapping) integer(path string, value any, lowest, highest int64, to *int) bool {
	n, ok := wholeNumber(value)
	switch {
	case !ok:
		m.refuse(path, value, "not a whole number")
	case n < lowest || n > highest:
		m.refuse(path, value, "want %d…%d", lowest, highest)
		ok = false
	default:
		*to = int(n) // fits: every bound is within 32 bits
	}
	return ok
}

func wholeNumber(value any) (int64, bool) {
	switch v := value.(type) {
	case int:
		return int64(v), true
	case int8, int16, int32, int64, uint8, uint16, uint32, uint, uint64, json.Number:
		return wholeNumber(fmt.Sprint(v))
	case string:
		text := strings.TrimSpace(v)
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			return n, true
		}
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || strings.ContainsAny(text, "xX") { // hexadecimal: Go's, and no decoder's
			return 0, false
		}
		return wholeNumber(f)
	case float32:
		return wholeNumber(float64(v))
	case float64:
		if v != math.Trunc(v) || math.Abs(v) > 1<<53 {
			return 0, false
		}
		return int64(v), true
	}
	return 0, false
}
