package rtnl

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// dialIn opens a connection in a namespace that has the device other0, up, and returns that one's index.
func dialIn(t *testing.T) (ns *nstest.NS, c *Conn, index int) {
	t.Helper()
	nstest.Require(t, nstest.TUN, nstest.IPv6)
	nstest.Leaks(t)
	ns = nstest.New(t)
	ns.OtherTun(t, "other0", "10.1.0.1/24")
	c = dialAgain(t, ns)
	link, err := DecodeLink(answer(t, c, GetLinkByName("other0")))
	if err != nil || link.Name != "other0" || !link.Up || link.Kind != "tun" || link.MTU != 1500 || link.TxQueueLen != 500 {
		t.Fatalf("link %+v, %v", link, err)
	}
	return ns, c, link.Index
}

func dialAgain(t *testing.T, ns *nstest.NS) (c *Conn) {
	t.Helper()
	ns.Do(t, func() {
		var err error
		if c, err = Dial(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { c.Close() })
	return c
}

func answer(t *testing.T, c *Conn, request Message) Message {
	t.Helper()
	r := c.Do(request)[0]
	if r.Err != nil || len(r.Answers) != 1 {
		t.Fatalf("%v, %d answers", r.Err, len(r.Answers))
	}
	return r.Answers[0]
}

func plainRoute(index, n int) kernel.Route {
	addr := netip.AddrFrom4([4]byte{11, byte(n >> 16), byte(n >> 8), byte(n)})
	if n%2 == 1 {
		addr = netip.AddrFrom16([16]byte{0xfd, 0x11, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	return kernel.Route{
		RouteKey: kernel.RouteKey{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Table: 254, Metric: 7},
		Protocol: 111, Link: index, MTU: 1300, MSS: 1200, Plain: true,
	}
}

// Thousands of requests in one Do, more than buffers hold: each result is of its request, refusals with the kernel's words,
// and a dump returns what was done, each route as it was asked for (kernel.md V6).
func TestThousandsOfRequests(t *testing.T) {
	_, c, index := dialIn(t)
	const n = 5000
	var requests []Message
	for i := range n {
		m := AddRoute(plainRoute(index, i))
		switch {
		case i%10 == 4: // twice, in IPv4
			m = AddRoute(plainRoute(index, i-2))
			m.Flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
		case i%10 == 6: // host bits
			m = AddRoute(plainRoute(index, i))
			m.Body[1] = 8
		case i%10 == 8:
			m = GetLink(index)
		case i%10 == 9: // no such interface
			m = AddRoute(plainRoute(index+77, i))
		}
		requests = append(requests, m)
	}
	for i, r := range c.Do(requests...) {
		var refused *Error
		errors.As(r.Err, &refused)
		ok := r.Err == nil && len(r.Answers) == 0
		switch i % 10 {
		case 4:
			ok = errors.Is(r.Err, unix.EEXIST)
		case 6:
			ok = errors.Is(r.Err, unix.EINVAL) && refused != nil && refused.Text == "Invalid prefix for given prefix length"
		case 8:
			ok = r.Err == nil && len(r.Answers) == 1
		case 9:
			ok = errors.Is(r.Err, unix.ENODEV)
		}
		if !ok {
			t.Fatalf("request %d: %v, %d answers", i, r.Err, len(r.Answers))
		}
	}
	got := make(map[kernel.Route]bool)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		messages, err := c.Dump(GetRoutes(family, index))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			r, unicast, err := DecodeRoute(m)
			if err != nil || !unicast {
				t.Fatalf("%+v, %v, %v", r, unicast, err)
			}
			got[r] = true
		}
	}
	for i := range n {
		if want := i%10 < 4 || i%10 == 5 || i%10 == 7; got[plainRoute(index, i)] != want {
			t.Fatalf("route %d is there: %v, want %v", i, !want, want)
		}
	}
}

// The sequence number wraps around at the kernel too.
func TestSequenceWraps(t *testing.T) {
	_, c, index := dialIn(t)
	c.seq = ^uint32(0) - 2
	for i, r := range c.Do(GetLink(index), GetLink(9999), GetLink(index), GetLink(index), GetLink(9999), GetLink(index)) {
		if missing := i%3 == 1; (len(r.Answers) == 1) == missing || errors.Is(r.Err, unix.ENODEV) != missing {
			t.Errorf("request %d: %v, %d answers", i, r.Err, len(r.Answers))
		}
	}
	c.seq = ^uint32(0)
	if all, err := c.Dump(GetAddrs(index)); err != nil || len(all) == 0 {
		t.Errorf("dump: %d, %v", len(all), err)
	}
}

// Answers that do not fit the receive buffer are an unknown outcome, with the kernel too; what went before and comes after is
// known (kernel.md V6).
func TestOverrunOfAnswers(t *testing.T) {
	_, c, index := dialIn(t)
	if err := unix.SetsockoptInt(c.sock.(*kernelSocket).fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	unknown := 0
	for _, r := range c.Do(manyGetLink(index, 100)...) {
		if r.Err != nil && !errors.Is(r.Err, ErrUnknown) {
			t.Errorf("%v, want ErrUnknown", r.Err)
		}
		if r.Err != nil {
			unknown++
		}
	}
	if unknown == 0 {
		t.Error("the answers were not too many")
	}
	for range 3 {
		link, err := DecodeLink(answer(t, c, GetLink(index)))
		if err != nil || link.Index != index {
			t.Errorf("afterwards: %+v, %v", link, err)
		}
	}
}

func manyGetLink(index, n int) (requests []Message) {
	for range n {
		requests = append(requests, GetLink(index))
	}
	return requests
}

// A dump under churn is whole or an error: no address that was there all the time is ever missing from one (kernel.md A5).
func TestDumpUnderChurn(t *testing.T) {
	ns, c, index := dialIn(t)
	var requests []Message
	addr := func(i, j int) kernel.Addr {
		return kernel.Addr{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{12, byte(i), byte(j), 1}), 24), Protocol: 111}
	}
	const stable = 1500
	for i := range stable {
		requests = append(requests, AddAddr(index, addr(i/250, i%250)))
	}
	for _, r := range c.Do(requests...) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	stop := make(chan struct{})
	var churn sync.WaitGroup
	churn.Go(func() {
		var other *Conn
		ns.Do(t, func() { other, _ = Dial() })
		defer other.Close()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				other.Do(AddAddr(index, addr(99, i%200)), DelAddr(index, addr(99, i%200)))
			}
		}
	})
	whole, interrupted := 0, 0
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		messages, err := c.dump(GetAddrs(0))
		if errors.Is(err, ErrInterrupted) {
			interrupted++
			continue
		}
		if err != nil {
			t.Error(err)
			break
		}
		whole++
		n := 0
		for _, m := range messages {
			a, _, err := DecodeAddr(m)
			if err == nil && a.Protocol == 111 && !netip.MustParsePrefix("12.99.0.0/16").Contains(a.Prefix.Addr()) {
				n++
			}
		}
		if n != stable {
			t.Errorf("a dump that says it is whole has %d of %d addresses", n, stable)
			break
		}
	}
	close(stop)
	churn.Wait()
	t.Logf("%d dumps whole, %d interrupted", whole, interrupted)
	if all, err := c.Dump(GetAddrs(0)); err != nil || len(all) < stable {
		t.Errorf("when it is quiet: %d, %v", len(all), err)
	}
}

// A kernel that does not know the options (filtered dumps came with 4.20, error texts with 4.12) works all the same: it lists
// everybody's, and says no more than the errno (kernel.md A17).
func TestWithoutSocketOptions(t *testing.T) {
	ns, _, index := dialIn(t)
	ns.OtherTun(t, "other1", "10.2.0.1/24")
	var c *Conn
	ns.Do(t, func() {
		s, err := openSocket()
		if err != nil {
			t.Fatal(err)
		}
		c = newConn(s)
	})
	defer c.Close()
	messages, err := c.Dump(GetAddrs(index))
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]int)
	for _, m := range messages {
		a, at, err := DecodeAddr(m)
		if err != nil {
			t.Fatal(err)
		}
		found[a.Prefix.String()] = at
	}
	if found["10.1.0.1/24"] != index || found["10.2.0.1/24"] == 0 || found["10.2.0.1/24"] == index {
		t.Errorf("addresses and interfaces: %v", found)
	}
	bad := AddRoute(plainRoute(index, 2))
	bad.Body[1] = 8
	if err := c.Do(bad)[0].Err; fmt.Sprint(err) != "invalid argument" {
		t.Errorf("error %q", err)
	}
}

// The kernel's words are found behind a request that it quotes whole, too.
func TestUncappedExtendedAck(t *testing.T) {
	ns, _, index := dialIn(t)
	var c *Conn
	ns.Do(t, func() {
		s, err := openSocket(unix.NETLINK_EXT_ACK)
		if err != nil {
			t.Fatal(err)
		}
		c = newConn(s)
	})
	defer c.Close()
	bad := AddRoute(plainRoute(index, 2))
	bad.Body[1] = 8
	if err := c.Do(bad)[0].Err; fmt.Sprint(err) != "invalid argument (kernel: Invalid prefix for given prefix length)" {
		t.Errorf("error %q", err)
	}
}

// What the kernel told can be put back as it was: addresses with peer, label and lifetime, routes with next hop, TOS and other
// metrics than ours. What we name to delete is what goes, one of two alike too (kernel.md U14, V13).
func TestPutBack(t *testing.T) {
	ns, c, index := dialIn(t)
	nstest.Require(t, nstest.Program("ip"))
	for _, line := range []string{
		"addr add 10.3.0.1 peer 10.3.0.2/32 dev other0 label other0:x scope link", "addr add 10.4.0.1/24 broadcast 10.4.0.255 dev other0 valid_lft 9000 preferred_lft 8000",
		"addr add fd03::1 peer fd03::2 dev other0 nodad", "addr add fd04::1/64 dev other0 nodad noprefixroute",
		"route add 10.9.0.0/16 via 10.1.0.9 dev other0 tos 8 metric 5 mtu 1300 window 4000 src 10.4.0.1 proto 111",
		"route add 10.9.0.0/16 dev other0 proto 111 mtu 1200 onlink via 10.77.0.1", "route add fd09::/64 via fe80::9 dev other0 pref high proto 111 metric 5",
		"route add fd10::/64 dev other0 mtu lock 1300 proto 111",
	} {
		ns.Run(t, "ip "+line)
	}
	show := func() string {
		out := ns.Run(t, "ip -d addr show dev other0") + ns.Run(t, "ip -d route show table all dev other0") + ns.Run(t, "ip -d -6 route show table all dev other0")
		return strings.NewReplacer("9000sec", "", "8000sec", "", "8999sec", "", "7999sec", "").Replace(out)
	}
	before := show()
	var back []Message
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		messages, err := c.Dump(GetRoutes(family, index))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			r, _, err := DecodeRoute(m)
			if err != nil {
				t.Fatal(err)
			}
			if r.Protocol != 111 {
				continue
			}
			answers := c.Do(DelRoute(r))[0]
			if answers.Err != nil || len(answers.Answers) != 1 {
				t.Fatalf("delete %+v: %+v", r, answers)
			}
			if gone, _, err := DecodeRoute(answers.Answers[0]); err != nil || gone.RouteKey != r.RouteKey || gone.Protocol != 111 || gone.TOS != r.TOS {
				t.Errorf("asked to delete %+v, the kernel deleted %+v, %v", r, gone, err)
			}
			back = append(back, AddRoute(r))
		}
	}
	messages, err := c.Dump(GetAddrs(index))
	if err != nil {
		t.Fatal(err)
	}
	var addresses []Message
	for _, m := range messages {
		a, _, err := DecodeAddr(m)
		if err != nil {
			t.Fatal(err)
		}
		if a.Protocol != 0 {
			continue // the kernel's
		}
		if err := c.Do(DelAddr(index, a))[0].Err; err != nil {
			t.Fatalf("delete %+v: %v", a, err)
		}
		addresses = append(addresses, AddAddr(index, a))
	}
	for i := len(addresses); i > 0; i-- { // IPv6 shows the newest first
		if m := addresses[i-1]; m.Body[0] == unix.AF_INET6 {
			back = append([]Message{m}, back...)
		}
	}
	for i := len(addresses); i > 0; i-- {
		if m := addresses[i-1]; m.Body[0] == unix.AF_INET {
			back = append([]Message{m}, back...)
		}
	}
	for i, r := range c.Do(back...) {
		if r.Err != nil {
			t.Errorf("put back %x: %v", back[i].Body, r.Err)
		}
	}
	if after := show(); sorted(after) != sorted(before) {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

func sorted(text string) string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// Of two routes alike, which IPv4 can have, the first goes, or exactly the one that is named.
func TestDeleteOneOfTwo(t *testing.T) {
	_, c, index := dialIn(t)
	first := plainRoute(index, 0)
	second := first
	second.MTU, second.MSS = 1400, 1360
	left := func() (mtus []uint32) {
		messages, err := c.Dump(GetRoutes(unix.AF_INET, index))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			if r, _, _ := DecodeRoute(m); r.Protocol == 111 {
				mtus = append(mtus, r.MTU)
			}
		}
		return mtus
	}
	for name, del := range map[string]Message{"the first": DelRoute(second), "exactly": DelRouteExactly(second)} {
		for _, r := range c.Do(AddRoute(first), AddRoute(second), del) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
		want := map[string]uint32{"the first": second.MTU, "exactly": first.MTU}[name]
		if got := left(); len(got) != 1 || got[0] != want {
			t.Errorf("%s: left with MTU %v, want %d", name, got, want)
		}
		c.Do(DelRoute(first))
	}
}
