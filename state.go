package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"unicode"
)

var eventNames = [...]string{
	EventUp: "up", EventDown: "down", EventChanged: "changed", EventGone: "gone", EventResynced: "resynced",
	EventRestored: "restored", EventShadowed: "shadowed", EventDegraded: "degraded",
}

// String names the kind in one lower-case word.
func (k EventKind) String() string {
	if int(k) < len(eventNames) && eventNames[k] != "" {
		return eventNames[k]
	}
	return fmt.Sprintf("event(%d)", uint8(k))
}

// String puts kind, number and cause on one line.
func (e Event) String() string {
	s := e.Kind.String()
	if e.N != 0 {
		s += fmt.Sprintf(" (%d)", e.N)
	}
	if e.Err != nil {
		s += ": " + oneLine(e.Err.Error())
	}
	return s
}

// oneLine joins the lines of joined errors, and shows what no terminal or log should be sent: names come from the kernel.
func oneLine(s string) string { return printable(strings.ReplaceAll(s, "\n", "; ")) }

// printable shows what does not print as a Go escape sequence.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
	}
	return b.String()
}

var modeNames = [...]string{Create: "create", Attach: "attach", AttachOrCreate: "attach or create"}

// String names the mode.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// String lists the offloads, or says "none".
func (o Offload) String() string {
	var names []string
	if o&OffloadTCP != 0 {
		names = append(names, "tcp")
	}
	if o&OffloadUDP != 0 {
		names = append(names, "udp")
	}
	if rest := o &^ (OffloadTCP | OffloadUDP); rest != 0 {
		names = append(names, fmt.Sprintf("offload(%d)", uint8(rest)))
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, "+")
}

// report is what State prints beside its fields.
type report struct {
	config     Config // in force; nobody changes what it points to
	adopted    bool
	queues     int
	txQueueLen int // the kernel's now; 0: what Config asks for
	readBuffer int // of announcements of routes, likewise
	stats      Stats
	notes      []string                         // abilities that the device lacks
	learned    func(netip.Prefix) (offer, bool) // what the kernel's route table says now; nil: nothing
}

// String is the dump for the field: one object a line, a keyword first, in a stable order, so that grep and diff work.
func (s State) String() string {
	var b strings.Builder
	c := &s.report.config
	fmt.Fprintf(&b, "device %s index %d link %s mtu %d txqueuelen %d queues %d offload %v learned %d\n",
		word(s.Name), s.Index, either(s.Up, "up", "down"), s.MTU, cmp.Or(s.report.txQueueLen, c.TxQueueLen, defaultTxQueueLen),
		s.report.queues, s.Offload, s.Learned)
	s.writeConfig(&b)
	for _, network := range s.Networks {
		mtu := c.networkMTU(network)
		fmt.Fprintf(&b, "network %v mtu %d mss %d\n", network, mtu, segmentSize(network, mtu))
	}
	for i := range c.Routes {
		s.writeRoute(&b, &c.Routes[i])
	}
	s.writeLearned(&b)
	writeStats(&b, s.report.stats)
	for _, note := range s.report.notes {
		fmt.Fprintf(&b, "note %s\n", oneLine(note))
	}
	return b.String()
}

// networkMTU is that of the Route for the very prefix of the network, where there is one.
func (c *Config) networkMTU(network netip.Prefix) int {
	for i := range c.Routes {
		if r := &c.Routes[i]; r.Prefix == network.Masked() && c.keyOf(r) == connectedKey(network) {
			return c.routeMTU(r)
		}
	}
	return c.mtuOf()
}

// word keeps a name that comes from outside one printable word.
func word(s string) string {
	if quoted := strconv.QuoteToASCII(s); s == "" || quoted != `"`+s+`"` || strings.Contains(s, " ") {
		return quoted
	}
	return s
}

func either(cond bool, yes, no string) string {
	if cond {
		return yes
	}
	return no
}

// writeConfig writes what of the Config the other lines do not show.
func (s State) writeConfig(b *strings.Builder) {
	c := &s.report.config
	mode := strings.ReplaceAll(c.Mode.String(), " ", "-")
	switch {
	case c.Disabled:
		mode = "disabled"
	case s.report.adopted:
		mode = "adopt"
	}
	on := func(cond bool) string { return either(cond, "on", "off") }
	fmt.Fprintf(b, "config mode %s netns %s owner %d group %d persist %s protocol %d filter %s heal %s link-local %s take-addresses %s refused-offload %v\n",
		mode, word(c.NetNS), c.Owner, c.Group, on(c.Persist), c.protocol(), on(!c.NoFilter), on(!c.NoHeal), on(c.LinkLocal),
		on(c.TakeAddresses), c.NoOffload)
	if r := c.SystemRoutes; r != nil {
		tables := strings.Trim(fmt.Sprint(r.Tables), "[]")
		fmt.Fprintf(b, "follow tables %s read-buffer %d max %d\n", word(strings.ReplaceAll(tables, " ", ",")), cmp.Or(s.report.readBuffer, r.ReadBuffer), r.Max)
	}
}

func (s State) writeRoute(b *strings.Builder, r *Route) {
	mtu := s.report.config.routeMTU(r)
	via := "on-link"
	if len(r.Via) > 0 {
		via = "via"
		for _, g := range r.Via {
			via += fmt.Sprintf(" %v*%d", g.Addr, max(g.Weight, 1))
		}
	}
	install := ""
	if r.NoInstall {
		install = " steer-only"
	}
	fmt.Fprintf(b, "route %v %s layer static metric %d table %d mtu %d mss %d%s\n",
		r.Prefix, via, s.report.config.keyOf(r).Metric, r.table(), mtu, segmentSize(r.Prefix, mtu), install)
}

// writeLearned writes the routes in force that are the kernel's.
func (s State) writeLearned(b *strings.Builder) {
	if s.Learned == 0 || s.report.learned == nil {
		return
	}
	for prefix, gateways := range s.Routes() {
		if o, ok := s.report.learned(prefix); ok {
			via := "on-link"
			if gateways.Len() > 0 {
				via = "via"
				for i := range gateways.Len() {
					via += fmt.Sprintf(" %v*%d", gateways.At(i).Addr, gateways.At(i).Weight)
				}
			}
			fmt.Fprintf(b, "route %v %s layer kernel metric %d\n", prefix, via, o.metric)
		}
	}
}

// writeStats writes every counter, those of zero too: a line for reading, one for writing, one for the rest.
func writeStats(b *strings.Builder, s Stats) {
	lines := []struct{ keyword, prefix string }{{"read", "Read"}, {"write", "Write"}, {"control", ""}}
	counters := reflect.ValueOf(s)
	seen := make(map[string]bool)
	for _, line := range lines {
		b.WriteString("count " + line.keyword)
		for i := range counters.NumField() {
			name, ok := strings.CutPrefix(counters.Type().Field(i).Name, line.prefix)
			if full := counters.Type().Field(i).Name; ok && !seen[full] {
				seen[full] = true
				fmt.Fprintf(b, " %s %d", dashed(name), counters.Field(i).Uint())
			}
		}
		b.WriteByte('\n')
	}
}

// dashed turns RestoreFails into restore-fails.
func dashed(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
