package rtnl

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// The filter lets through exactly what MayConcern says yes of, and nothing of an ignored connection (kernel.md V26, A9).
func TestFilterAgreesWithMayConcern(t *testing.T) {
	nstest.Require(t, nstest.Program("ip"))
	ns, c, index := dialIn(t)
	ns.OtherTun(t, "ours", "10.2.0.1/24")
	link, err := DecodeLink(answer(t, c, GetLinkByName("ours")))
	if err != nil {
		t.Fatal(err)
	}
	groups := []int{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_LINK}
	all, some := listenIn(t, ns, 8<<20, groups...), listenIn(t, ns, 8<<20, groups...)
	if err := some.OnlyConcerning(link.Index, c.Port()); err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	r := rand.New(rand.NewPCG(1, 2))
	ways := []string{
		"dev other0", "dev ours", "via 10.2.0.9 dev ours", "nexthop dev other0 nexthop dev ours", "nexthop dev other0 nexthop via 10.1.0.9",
		"nhid 7", "dev other0 metric 7", "dev ours metric 7",
	}
	fmt.Fprintf(&lines, "nexthop add id 7 dev ours\n")
	for i := range 400 {
		verb := []string{"add", "append", "prepend", "replace", "del"}[r.IntN(5)]
		prefix, way := fmt.Sprintf("10.9.%d.0/24", r.IntN(4)), ways[r.IntN(len(ways))]
		if i%3 == 0 && !strings.Contains(way, "via") && !strings.Contains(way, "nhid") {
			prefix = fmt.Sprintf("fd09:%x::/64", r.IntN(4))
		}
		fmt.Fprintf(&lines, "route %s %s %s\n", verb, prefix, way)
		if i%20 == 0 {
			fmt.Fprintf(&lines, "route %s throw 10.9.%d.0/24 metric 9\nroute %s blackhole 10.9.%d.0/24 metric 8\n", verb, r.IntN(4), verb, r.IntN(4))
		}
	}
	ns.Run(t, "sh", "-c", "ip -force -batch - 2>/dev/null <<'END' || true\n"+lines.String()+"link set other0 mtu 1400\nEND")
	if err := c.Do(SetLinkMTU(index, 1300))[0].Err; err != nil {
		t.Fatal(err)
	}
	type told struct{ text, flags string }
	read := func(l *Listener, keep func(Message) bool) (list []told) {
		for {
			messages, err := l.Next()
			if err != nil {
				t.Fatal(err)
			}
			if messages == nil {
				return list
			}
			for _, m := range messages {
				if keep(m) {
					list = append(list, told{fmt.Sprintf("%d %x", m.Type, m.Body), fmt.Sprint(m.Flags)})
				}
			}
		}
	}
	dropped := 0
	want := read(all, func(m Message) bool {
		concerns := m.Type != unix.RTM_NEWROUTE && m.Type != unix.RTM_DELROUTE || MayConcern(m, int32(link.Index))
		if !concerns {
			dropped++
		}
		return concerns
	})
	got := read(some, func(Message) bool { return true })
	if len(got) != len(want) || dropped < 10 || len(want) < 100 {
		t.Fatalf("let %d through, want %d; %d are of no concern", len(got), len(want), dropped)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("message %d: %v, want %v", i, got[i], want[i])
		}
	}
	if err := some.HearAll(); err != nil {
		t.Fatal(err)
	}
	ns.Run(t, "ip route add 10.99.0.0/24 dev other0")
	if got := read(some, func(Message) bool { return true }); len(got) != 1 {
		t.Errorf("without a filter it hears %v", got)
	}
}
