package overlay

import (
	"fmt"
	"reflect"
	"strings"
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
		s += ": " + e.Err.Error()
	}
	return s
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
	config Config // a copy
	queues int
	stats  Stats
	notes  []string // abilities that the device lacks
}

// String is the dump for the field: one object a line, a keyword first, in a stable order, so that grep and diff work.
func (s State) String() string {
	var b strings.Builder
	link := "down"
	if s.Up {
		link = "up"
	}
	fmt.Fprintf(&b, "device %s index %d link %s mtu %d queues %d offload %v learned %d\n",
		s.Name, s.Index, link, s.MTU, s.report.queues, s.Offload, s.Learned)
	c := &s.report.config
	for _, network := range s.Networks {
		fmt.Fprintf(&b, "network %v mtu %d mss %d\n", network, c.mtuOf(), segmentSize(network, c.mtuOf()))
	}
	for i := range c.Routes {
		s.writeRoute(&b, &c.Routes[i])
	}
	counters := reflect.ValueOf(s.report.stats)
	for i := range counters.NumField() {
		if n := counters.Field(i).Uint(); n != 0 {
			fmt.Fprintf(&b, "count %s %d\n", counters.Type().Field(i).Name, n)
		}
	}
	for _, note := range s.report.notes {
		fmt.Fprintf(&b, "note %s\n", note)
	}
	return b.String()
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
