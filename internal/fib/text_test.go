package fib

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"example.com/overlay/internal/kernel"
)

// changes by the words with which tests begin an announcement.
var changes = map[string]kernel.Change{
	"created": kernel.Created, "prepended": kernel.Prepended, "appended": kernel.Appended,
	"replaced": kernel.Replaced, "refreshed": kernel.Refreshed, "deleted": kernel.Deleted,
}

func number(t testing.TB, word string) uint32 {
	t.Helper()
	n, err := strconv.ParseUint(word, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

// parseRoute reads a route as `ip route` would take it: "192.0.2.0/24 metric 5 via 10.0.0.2 dev 7 via 10.0.0.3 weight 2".
func parseRoute(t testing.TB, words []string) kernel.FIBRoute {
	t.Helper()
	r := kernel.FIBRoute{Prefix: netip.MustParsePrefix(words[0]), Table: kernel.TableMain, Type: kernel.TypeUnicast, Protocol: 3, Metric: 50}
	for i := 1; i+1 < len(words); i += 2 {
		value := words[i+1]
		last := &kernel.Leg{}
		if n := len(r.Legs); n > 0 {
			last = &r.Legs[n-1]
		}
		switch words[i] {
		case "via":
			r.Legs = append(r.Legs, kernel.Leg{Gateway: netip.MustParseAddr(value), Link: ourLink, Weight: 1})
		case "on":
			r.Legs = append(r.Legs, kernel.Leg{Link: int32(number(t, value)), Weight: 1})
		case "dev":
			last.Link = int32(number(t, value))
		case "weight":
			last.Weight = number(t, value)
		case "leg":
			last.Dead = value == "dead"
		case "metric":
			r.Metric = number(t, value)
		case "table":
			r.Table = number(t, value)
		case "proto":
			r.Protocol = uint8(number(t, value))
		case "type":
			r.Type = uint8(number(t, value))
		case "tos":
			r.TOS = uint8(number(t, value))
		case "pref":
			r.Pref = uint8(number(t, value))
		case "source":
			r.SourceLen = uint8(number(t, value))
		case "expires":
			r.Expires = int32(number(t, strings.TrimPrefix(value, "-")))
			if value[0] == '-' {
				r.Expires = -r.Expires
			}
		case "nhid":
			r.NextHop = number(t, value)
		case "flag":
			r.Cloned = value == "cloned"
		case "detail":
			r.Detail = []byte(value)
		default:
			t.Fatalf("what is %q?", words[i])
		}
	}
	return r
}

// apply takes one line: an announcement of a route or of a nexthop object.
func apply(t testing.TB, table *Table, line string) {
	t.Helper()
	words := strings.Fields(line)
	change, ok := changes[words[0]]
	switch {
	case ok:
		r := parseRoute(t, words[1:])
		table.Apply(change, &r)
	case words[0] == "nexthop":
		n := kernel.NextHop{ID: number(t, words[1])}
		switch words[2] {
		case "gone":
			table.DeleteNextHop(n.ID)
			return
		case "blackhole":
			n.Blackhole = true
		case "group":
			for _, member := range words[3:] {
				id, weight, _ := strings.Cut(member, "*")
				n.Group = append(n.Group, kernel.NextHopLeg{ID: number(t, id), Weight: number(t, weight)})
			}
		default:
			n.Leg = parseRoute(t, append([]string{"0.0.0.0/0"}, words[2:]...)).Legs[0]
		}
		table.SetNextHop(n)
	default:
		t.Fatalf("what is %q?", line)
	}
}

func (a Answer) String() string {
	s := [...]string{"absent", "on-link", "", "refused"}[a.Kind]
	if a.Set != nil {
		for _, g := range a.Set.Gateways {
			s += fmt.Sprintf("%v*%d ", g.Addr, g.Weight)
		}
	}
	return strings.TrimSpace(s)
}
