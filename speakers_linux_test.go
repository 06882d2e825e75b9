package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
)

// speaker is an overlay host, 10.42.0.N and fd42::N, on which a routing daemon speaks with those of the other hosts.
type speaker struct {
	*lab
	number int
	dev    *tunDevice
	dir    string // of the daemon's files
	daemon daemon
}

// daemon is what the tests ask of a routing daemon.
type daemon interface {
	announce(prefixes ...string) // these and no others, from now on
	log() string
}

// newSpeakers makes n hosts whose devices a relay joins; their daemons are still to be started.
func newSpeakers(t *testing.T, n int, needs ...nstest.Ability) []*speaker {
	t.Helper()
	nstest.Require(t, append(needs, nstest.TUN, nstest.IPv6, nstest.Program("ip"))...)
	nstest.Leaks(t)
	var loops sync.WaitGroup
	t.Cleanup(loops.Wait)
	speakers := make([]*speaker, n)
	owners := make(map[netip.Addr]Queue)
	for i := range speakers {
		s := &speaker{lab: oneOfLabs(t), number: i + 1, dir: t.TempDir()}
		networks := prefixes(s.v4()+"/24", s.v6()+"/64")
		s.dev = s.active(Config{Name: "overlay0", Networks: networks, SystemRoutes: &SystemRoutes{}})
		s.ready(s.dev)
		for _, network := range networks {
			owners[network.Addr()] = s.dev.Queues()[0]
		}
		speakers[i] = s
	}
	for _, s := range speakers {
		loops.Go(func() { relay(t, s.dev, owners) })
	}
	return speakers
}

// relay hands what a device has to send to the device that owns the next hop.
func relay(t *testing.T, d Device, owners map[netip.Addr]Queue) {
	for {
		packets, err := d.Queues()[0].ReadBatch()
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("relay: %v", err)
			}
			return
		}
		for i := range packets {
			if hop, ok := d.NextHop(packets[i].Data, nil); ok && owners[hop] != nil {
				_, _ = owners[hop].WriteBatch(packets[i : i+1]) // what is lost TCP sends again
			}
		}
	}
}

func (s *speaker) v4() string { return fmt.Sprintf("10.42.0.%d", s.number) }
func (s *speaker) v6() string { return fmt.Sprintf("fd42::%d", s.number) }

// subnet4 and subnet6 are what the tests announce. Their hosts 1 exist where a test adds them, no host 7 does.
func subnet4(n int) string { return fmt.Sprintf("10.100.%d.0/24", n) }
func subnet6(n int) string { return fmt.Sprintf("fd00:100:%d::/64", n) }

// announce announces subnets of both families, these and no others.
func (s *speaker) announce(subnets ...int) {
	s.Helper()
	var all []string
	for _, n := range subnets {
		all = append(all, subnet4(n), subnet6(n))
	}
	s.daemon.announce(all...)
}

// inhabit gives the host the first address of a subnet, or takes it away.
func (s *speaker) inhabit(verb string, subnet int) {
	s.Helper()
	s.ip(fmt.Sprintf("addr %s 10.100.%d.1/32 dev lo\naddr %s fd00:100:%d::1/128 dev lo", verb, subnet, verb, subnet))
}

// want waits until both RoutesFor and the kernel send what is for a subnet to those hosts, to none: nowhere in the overlay.
func (s *speaker) want(subnet int, hosts ...int) {
	s.Helper()
	via4, via6 := "none", "none"
	for i, n := range hosts {
		if i == 0 {
			via4, via6 = "", ""
		}
		via4 += fmt.Sprintf(" 10.42.0.%d", n)
		via6 += fmt.Sprintf(" fd42::%d", n)
	}
	s.wantVia(fmt.Sprintf("10.100.%d.7", subnet), strings.TrimSpace(via4))
	s.wantVia(fmt.Sprintf("fd00:100:%d::7", subnet), strings.TrimSpace(via6))
}

// wantVia is want for an address.
func (s *speaker) wantVia(addr, want string) {
	s.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		ours := s.overlaid(addr)
		late := time.Now().After(deadline)
		if ours != want && !late {
			continue
		}
		kernels := s.kernels(addr)
		if ours == want && kernels == want {
			return
		}
		if late {
			s.Fatalf("host %d: %s goes through %q, the kernel says %q, want %q\n%s\n%s\n%s\n%s", s.number, addr, ours, kernels, want,
				s.dev.State(), s.ip("route"), s.ip("-6 route"), s.daemon.log())
		}
	}
}

// agree waits until RoutesFor says what the kernel says, whatever that is, about the subnets 0 to 9 of both families.
func (s *speaker) agree() {
	s.Helper()
	for n := range 10 {
		for _, addr := range []string{fmt.Sprintf("10.100.%d.7", n), fmt.Sprintf("fd00:100:%d::7", n)} {
			eventually(s, fmt.Sprintf("RoutesFor(%s) equals the kernel's answer", addr), func() bool {
				return s.overlaid(addr) == s.kernels(addr)
			})
		}
	}
}

// overlaid is what RoutesFor says of an address, in order.
func (s *speaker) overlaid(addr string) string { return ordered(strings.Fields(routeOf(s.dev, addr))) }

func ordered(gateways []string) string {
	slices.Sort(gateways)
	return strings.Join(gateways, " ")
}

// kernels is what ip(8) says that the kernel's best match is, in the words of routeOf.
func (s *speaker) kernels(addr string) string {
	s.Helper()
	out, err := s.ns.TryRun("ip", "-j", "route", "get", "fibmatch", addr)
	if err != nil {
		return "none" // no route, or one that refuses
	}
	type hop struct {
		Dev, Gateway string
		Via          struct{ Host string }
		Weight       int
	}
	var routes []struct {
		hop
		Nexthops []hop
	}
	if err := json.Unmarshal([]byte(out), &routes); err != nil || len(routes) != 1 {
		s.Fatalf("%d routes, %v in\n%s", len(routes), err, out)
	}
	hops := append(routes[0].Nexthops, routes[0].hop)
	var gateways []string
	for _, h := range hops {
		gateway := h.Gateway + h.Via.Host
		if h.Dev != "overlay0" || gateway == "" {
			continue
		}
		if h.Weight > 1 {
			gateway += fmt.Sprintf("*%d", h.Weight)
		}
		gateways = append(gateways, gateway)
	}
	if len(gateways) == 0 {
		return "none"
	}
	return ordered(gateways)
}

// knock fails unless a host with the first address of a subnet answers, over IPv4 and IPv6.
func (s *speaker) knock(subnet int) {
	s.Helper()
	for _, addr := range []string{fmt.Sprintf("10.100.%d.1:9", subnet), fmt.Sprintf("[fd00:100:%d::1]:9", subnet)} {
		s.ns.Do(s, func() {
			conn, err := net.DialTimeout("tcp", addr, patience)
			if err == nil {
				conn.Close()
			}
			if !errors.Is(err, syscall.ECONNREFUSED) { // by whoever has the address: nobody listens
				s.Errorf("host %d: %s does not answer: %v", s.number, addr, err)
			}
		})
	}
}

// converse is what three hosts see whatever daemon they speak through; in the end host N announces subnet N.
func converse(t *testing.T, speakers []*speaker) {
	begun := time.Now()
	step := func(what string) {
		t.Logf("%v after %v", what, time.Since(begun).Round(time.Millisecond))
		begun = time.Now()
	}
	one, two, three := speakers[0], speakers[1], speakers[2]
	for _, s := range speakers {
		s.inhabit("add", s.number)
		s.announce(s.number)
	}
	for _, s := range speakers {
		for n := range 3 {
			if n+1 == s.number {
				s.want(n + 1) // its own is not the overlay's
				continue
			}
			s.want(n+1, n+1)
			s.knock(n + 1)
		}
	}
	step("everybody's subnet")

	two.inhabit("add", 9)
	three.inhabit("add", 9)
	two.announce(2, 9)
	three.announce(3, 9)
	one.want(9, 2, 3)
	one.knock(9)
	step("a subnet of two")
	two.announce(2)
	one.want(9, 3)
	three.announce(3)
	one.want(9)
	step("one less, none")

	two.inhabit("del", 2)
	three.inhabit("add", 2)
	two.announce()
	three.announce(2, 3)
	one.want(2, 3)
	two.want(2, 3)
	one.knock(2)
	two.knock(2)
	step("a subnet moved")
	three.inhabit("del", 2)
	three.announce(3)
	one.want(2)
	two.want(2)
	step("a subnet withdrawn")
	two.announce(2)
	two.inhabit("add", 2)
	one.want(2, 2)
	one.knock(2)
	step("and back")

	one.ip("link set overlay0 down")
	one.want(2)
	one.want(3)
	one.ip("link set overlay0 up")
	one.want(2, 2)
	one.want(3, 3)
	one.knock(3)
	step("the link down and up")
}
