package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest/oracle"
	"golang.org/x/sys/unix"
)

// endToEnd sends datagrams to all destinations, and compares for each that the kernel hands us what RoutesFor and NextHop say with
// what a FIB match says of its destination (kernel.md O4), unless that changes meanwhile: the device may be putting back what is its
// own, and the kernel be late in noticing a carrier.
func (o *followOracle) endToEnd() {
	o.Helper()
	destinations := o.Destinations()
	verdicts, err := o.World.Ask(destinations)
	o.must(err)
	packets, refused := o.exchange(destinations)
	after, err := o.World.Ask(destinations)
	o.must(err)
	for i, dst := range destinations {
		v, p := &verdicts[i], packets[dst]
		if !reflect.DeepEqual(*v, after[i]) {
			continue
		}
		if p != nil {
			o.packets++
			o.nextHop(p, dst)
		}
		if p != nil && v.Kind == oracle.NoClaim && !v.Mixed {
			o.Fatalf("seed %d, step %d: a packet to %v came\n%+v\n%s", *seed, o.Steps, dst, *v, o.routesAround(dst))
		}
		if p == nil && v.Kind > oracle.Miss && !v.Mixed && refused[dst] == nil && len(o.want(dst, v)) > 0 {
			// The kernel drops what it sends while it is about to notice that the carrier is back.
			eventually(o, "a packet to "+dst.String()+" comes", func() bool {
				again, _ := o.exchange([]netip.Addr{dst})
				return again[dst] != nil
			})
		}
	}
	o.agree(destinations)
}

// nextHop fails unless NextHop takes a packet where RoutesFor says.
func (o *followOracle) nextHop(packet []byte, dst netip.Addr) {
	o.Helper()
	for {
		before := routeOf(o.d, dst.String())
		hop, there := o.d.NextHop(packet, nil)
		if routeOf(o.d, dst.String()) != before {
			continue
		}
		via := slices.ContainsFunc(strings.Fields(before), func(g string) bool { g, _, _ = strings.Cut(g, "*"); return g == hop.String() })
		if there == (before == "none") || there && !via && (before != "on-link" || hop != dst) {
			o.Fatalf("a packet to %v goes to %v, %v, RoutesFor says %s", dst, hop, there, before)
		}
		return
	}
}

// exchange sends, and returns what came of it.
func (o *followOracle) exchange(destinations []netip.Addr) (packets map[netip.Addr][]byte, refused map[netip.Addr]error) {
	o.Helper()
	refused = o.send(destinations)
	return o.receive(), refused
}

// send sends a datagram to each destination from an unspecified address, and returns what the kernel did not send.
func (o *followOracle) send(destinations []netip.Addr) map[netip.Addr]error {
	o.Helper()
	refused := make(map[netip.Addr]error)
	o.in(func() error {
		for _, network := range []string{"udp4", "udp6"} {
			conn, err := net.ListenUDP(network, nil)
			if err != nil {
				return err
			}
			defer conn.Close()
			for _, dst := range destinations {
				if dst.Is4() == (network == "udp4") {
					if _, err := conn.WriteToUDPAddrPort([]byte("packet"), netip.AddrPortFrom(dst, 9)); err != nil {
						refused[dst] = err
					}
				}
			}
		}
		return nil
	})
	return refused
}

// receive returns the packets that wait, by destination: up to one that is sent to the interface itself, again and again, because
// with the others the kernel may drop it.
func (o *followOracle) receive() map[netip.Addr][]byte {
	o.Helper()
	waiting := make(map[netip.Addr][]byte)
	o.ends++
	last := datagram(netip.MustParseAddrPort("10.0.0.1:9"), netip.MustParseAddrPort("10.0.0.254:9"), fmt.Append(nil, "end ", o.ends))
	came, sent := make(chan struct{}), make(chan struct{})
	s, err := -1, error(nil)
	o.in(func() error {
		s, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // of no protocol: it hears nothing
		return err
	})
	go func() {
		defer close(sent)
		defer unix.Close(s)
		for {
			_ = unix.Sendto(s, last, 0, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: o.d.index})
			select {
			case <-came:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	defer func() { close(came); <-sent }()
	for {
		packets, err := o.d.Queues()[0].ReadBatch()
		o.must(err)
		for i := range packets {
			p := packets[i].Data
			if bytes.Equal(p, last) {
				return waiting
			}
			if dst, ok := packetDst(p); ok && bytes.HasSuffix(p, []byte("packet")) { // not the kernel's own reports
				waiting[dst] = bytes.Clone(p)
			}
		}
	}
}

// A follower is told what to learn at most, and says so when there is more (kernel.md S6); what is there by then is followed on, and
// where there is room again the rest is learned.
func TestFollowMax(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{Max: 2}})
	l.event(d, EventResynced)
	l.ip("route add 10.7.0.0/16 via 10.42.0.7\nroute add 10.8.0.0/16 via 10.42.0.8\nroute add 10.9.0.0/16 via 10.42.0.9")
	if e := l.event(d, EventDegraded); !strings.Contains(e.Err.Error(), "SystemRoutes.Max") {
		t.Errorf("event %v", e)
	}
	if s := d.State(); s.Learned != 2 || routeOf(d, "10.9.0.1") != "none" {
		t.Errorf("state\n%v", s)
	}
	l.ip("route replace 10.8.0.0/16 via 10.42.0.10") // that is no more than before
	l.wantRoute(d, "10.8.0.1", "10.42.0.10")
	before := d.Stats().Resyncs
	d.follower.resync(errLink)
	l.await("a resync", func() bool { return d.Stats().Resyncs > before })
	l.wantRoute(d, "10.8.0.1", "10.42.0.10")
	l.ip("route del 10.8.0.0/16")
	if took := l.wantRoute(d, "10.9.0.1", "10.42.0.9"); took > leeway*time.Second {
		t.Errorf("there is room, and used after %v", took)
	}
	l.noEvent(d, EventDegraded)
}

// A route that flaps as fast as it can costs a bounded number of publications, and its last state is in force (kernel.md A27).
func TestFollowFlap(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24"), SystemRoutes: &SystemRoutes{}})
	l.event(d, EventResynced)
	add := gatewayRoutes(1, d.index)[0]
	del := add
	del.Type, del.Flags = unix.RTM_DELROUTE, 0
	published := func() int {
		d.tree.mu.Lock()
		defer d.tree.mu.Unlock()
		return d.tree.published
	}
	before, begun, changes := published(), time.Now(), 0
	for time.Since(begun) < time.Second {
		for _, r := range l.conn.Do(add, del, add, del, add, del) {
			l.must(r.Err)
			changes++
		}
	}
	l.must(l.conn.Do(add)[0].Err)
	took := time.Since(begun)
	l.wantRoute(d, hostRoute(0).Addr().String(), "10.42.0.2")
	// A resync publishes too; there is one after each overrun at most.
	most := int(took/(10*time.Millisecond)) + 2 + int(d.Stats().Overruns+d.Stats().Resyncs)
	if n := published() - before; n > most || n == 0 {
		t.Errorf("%d publications in %v of %d changes, want %d at most", n, took, changes, most)
	}
}

// What another program says of routes in the kernel's place is not heard (kernel.md A25).
func TestFollowIgnoresForgery(t *testing.T) {
	l := newLab(t)
	d := l.active(following1())
	l.event(d, EventResynced)
	routes := gatewayRoutes(2, d.index)
	forged, real := routes[0], routes[1]
	forged.Flags = oracle.Create
	l.must(l.conn.Do(real)[0].Err)
	l.wantRoute(d, hostRoute(1).Addr().String(), "10.42.0.3")
	gone := real
	gone.Type, gone.Flags = unix.RTM_DELROUTE, 0
	l.forge(forged, gone)
	l.ip("route add 10.9.0.0/16 via 10.42.0.9")
	l.wantRoute(d, "10.9.0.1", "10.42.0.9")
	if got := routeOf(d, hostRoute(0).Addr().String()); got != "none" {
		t.Errorf("a forged route leads to %s", got)
	}
	if got := routeOf(d, hostRoute(1).Addr().String()); got != "10.42.0.3" {
		t.Errorf("after a forged deletion: %s", got)
	}
}

// A route with a thousand legs is learned, all of them, by announcement and by dump (kernel.md A26). One that no dump can show,
// because it is larger than the kernel's buffer for one, takes nothing away.
func TestFollowManyLegs(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/16"), SystemRoutes: &SystemRoutes{}})
	l.event(d, EventResynced)
	legs := func(prefix string, n int) error {
		r := kernel.FIBRoute{Prefix: netip.MustParsePrefix(prefix), Table: kernel.TableMain, Type: kernel.TypeUnicast, Protocol: 3}
		for i := range n {
			gateway := netip.AddrFrom4([4]byte{10, 42, byte(1 + i/250), byte(1 + i%250)})
			r.Legs = append(r.Legs, kernel.Leg{Gateway: gateway, Link: int32(d.index), Weight: 1})
		}
		return l.conn.Do(oracle.RouteMessage(unix.RTM_NEWROUTE, oracle.Create, r))[0].Err
	}
	l.must(legs("10.9.0.0/16", 1000))
	count := func(addr string) int {
		g, _ := d.RoutesFor(netip.MustParseAddr(addr))
		return g.Len()
	}
	l.await("a thousand gateways", func() bool { return count("10.9.0.1") == 1000 })
	d.follower.resync(errLink)
	l.event(d, EventResynced)
	if n := count("10.9.0.1"); n != 1000 {
		t.Errorf("%d gateways after a dump", n)
	}
	if err := legs("10.10.0.0/16", 3000); err != nil {
		t.Fatal(err)
	}
	d.follower.resync(errLink)
	l.await("three thousand, by announcement", func() bool { return count("10.10.0.1") == 3000 })
	l.ip("route add 10.11.0.0/16 via 10.42.0.11\nroute add 10.8.0.0/16 via 10.42.0.8")
	l.wantRoute(d, "10.8.0.1", "10.42.0.8")
	l.ip("link set lo up\naddr add 10.1.0.1/24 dev lo\naddr del 10.1.0.1/24 dev lo") // a reason to look anew
	e := l.event(d, EventDegraded)
	if !errors.Is(e.Err, errShort) || count("10.9.0.1") != 1000 || count("10.10.0.1") != 3000 || count("10.11.0.1") != 1 || count("10.8.0.1") != 1 {
		t.Errorf("%d, %d, %d and %d gateways after %v", count("10.9.0.1"), count("10.10.0.1"), count("10.11.0.1"), count("10.8.0.1"), e)
	}
	l.ip("route del 10.10.0.0/16")
	l.wantRoute(d, "10.10.0.1", "none")
	l.event(d, EventResynced)
}
