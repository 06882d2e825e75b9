package overlay

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// probe keeps traffic going through a device: pings from an overlay peer to addresses of ours, and datagrams of ours to
// addresses behind the device. Every one must come out of its queue.
type probe struct {
	l       *lab
	d       *tunDevice
	flows   []*flow
	stop    chan struct{}
	once    sync.Once
	writers sync.WaitGroup
	reader  sync.WaitGroup
}

// flow is a numbered sequence of packets of one kind.
type flow struct {
	name     string
	ping     netip.Addr // pinged; or zero, for
	socket   int        // datagrams sent on it
	sent     atomic.Uint32
	refused  atomic.Uint32 // by the kernel, at once
	received atomic.Uint32
	last     uint32 // the reader's
	swapped  atomic.Uint32
}

const (
	probeRate  = 200 * time.Microsecond // between two packets of a flow
	probePeer4 = "10.44.0.200"
	probePeer6 = "fd44::200"
)

// startProbe begins; pings names addresses of ours, sends "source>destination" each.
func (l *lab) startProbe(d *tunDevice, pings, sends []string) *probe {
	l.Helper()
	p := &probe{l: l, d: d, stop: make(chan struct{})}
	for _, s := range pings {
		p.flows = append(p.flows, &flow{name: "ping " + s, ping: netip.MustParseAddr(s), socket: -1})
	}
	for _, s := range sends {
		src, dst, _ := strings.Cut(s, ">")
		f := &flow{name: "send " + s}
		l.in(func() (err error) {
			f.socket, err = datagramSocket(netip.MustParseAddr(src), netip.MustParseAddr(dst))
			return err
		})
		p.flows = append(p.flows, f)
	}
	l.Cleanup(p.release)
	p.reader.Go(p.read)
	p.writers.Go(p.write)
	l.await("the probe's first packets", func() bool {
		return !slices.ContainsFunc(p.flows, func(f *flow) bool { return f.received.Load() < 20 })
	})
	return p
}

func datagramSocket(src, dst netip.Addr) (int, error) {
	family, from, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: src.As16()}), unix.Sockaddr(&unix.SockaddrInet6{Addr: dst.As16(), Port: 9})
	if dst.Is4() {
		family, from, to = unix.AF_INET, &unix.SockaddrInet4{Addr: src.As4()}, &unix.SockaddrInet4{Addr: dst.As4(), Port: 9}
	}
	s, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = unix.Bind(s, from); err == nil {
		err = unix.Connect(s, to)
	}
	if err != nil {
		unix.Close(s)
	}
	return s, err
}

func (p *probe) write() {
	for {
		for i, f := range p.flows {
			number := f.sent.Add(1)
			if _, err := p.send(f, byte(i), number); err != nil {
				f.refused.Add(1)
			}
		}
		select {
		case <-p.stop:
			return
		case <-time.After(probeRate):
		}
	}
}

// send lets the payload say the flow and the number.
func (p *probe) send(f *flow, id byte, number uint32) (int, error) {
	payload := binary.BigEndian.AppendUint32([]byte{0xda, 0x7a, 0, id}, number)
	switch {
	case !f.ping.IsValid():
		return unix.Write(f.socket, payload)
	case f.ping.Is4():
		message := slices.Concat([]byte{8, 0, 0, 0, 0, id, 0, 0}, payload)
		binary.BigEndian.PutUint16(message[2:], onesComplement(message))
		return p.d.queues[0].Write(append(header4(probePeer4, f.ping.String(), unix.IPPROTO_ICMP, len(message)), message...))
	}
	return p.d.queues[0].Write(icmp6(probePeer6, f.ping.String(), slices.Concat([]byte{128, 0, 0, 0, 0, id, 0, 0}, payload)))
}

func (p *probe) read() {
	packet := make([]byte, 65535)
	for {
		n, err := p.d.queues[0].Read(packet)
		if err != nil {
			return // closed
		}
		if n < 28 || packet[n-8] != 0xda || packet[n-7] != 0x7a || int(packet[n-5]) >= len(p.flows) {
			continue
		}
		f := p.flows[packet[n-5]]
		number := binary.BigEndian.Uint32(packet[n-4:])
		f.received.Add(1)
		if number < f.last {
			f.swapped.Add(1)
		}
		f.last = number
	}
}

// end stops and returns what each flow lost.
func (p *probe) end() map[string]uint32 {
	p.l.Helper()
	for _, f := range p.flows { // a while longer, after the change
		from := f.received.Load()
		deadline := time.Now().Add(50 * time.Millisecond)
		for f.received.Load() < from+20 && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	p.halt()
	deadline := time.Now().Add(500 * time.Millisecond) // for what is on its way
	lost := make(map[string]uint32)
	for _, f := range p.flows {
		for f.sent.Load() != f.received.Load() && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		lost[f.name] = f.sent.Load() - f.received.Load()
		if n := f.swapped.Load(); n > 0 {
			p.l.Errorf("%s: %d out of order", f.name, n)
		}
	}
	return lost
}

// halt ends the writing, release all.
func (p *probe) halt() {
	p.once.Do(func() { close(p.stop) })
	p.writers.Wait()
}

func (p *probe) release() {
	p.halt()
	p.d.Close()
	p.reader.Wait()
	for _, f := range p.flows {
		if f.socket >= 0 {
			unix.Close(f.socket)
		}
	}
}

// Reload changes addresses, lengths, MTU and routes under traffic. What no change touches loses nothing and keeps its order; nor
// does an address that stays in a network whose primary goes, whatever promote_secondaries was. (kernel.md V7, V29, U41, B11;
// design.md law 5.)
func TestReloadLosesNothing(t *testing.T) {
	p := netip.MustParsePrefix
	always := prefixes("10.44.0.1/24", "fd44::1/64")
	routes := []Route{{Prefix: p("10.9.0.0/16")}, {Prefix: p("fd09::/64")}}
	tests := make(map[string]func(*lab))
	for _, test := range []struct {
		name     string
		old, new Config
		stays    []string // addresses that both have
		most     map[string]uint32
		want     []string // routes among those after
	}{
		{
			name: "IPv4 address in its network", old: Config{Networks: prefixes("10.42.0.1/24")}, new: Config{Networks: prefixes("10.42.0.2/24")},
			want: []string{"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.2"},
		},
		{
			name: "primary goes", old: Config{Networks: prefixes("10.42.0.1/24", "10.42.0.3/24", "10.42.0.4/24")}, new: Config{Networks: prefixes("10.42.0.3/24", "10.42.0.4/24", "10.42.0.2/24")},
			stays: []string{"10.42.0.3", "10.42.0.4"},
			want:  []string{"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.3"},
		},
		{
			name: "primaries swap", old: Config{Networks: prefixes("10.42.0.1/24", "10.42.0.3/24")}, new: Config{Networks: prefixes("10.42.0.3/24", "10.42.0.1/24")},
			stays: []string{"10.42.0.1", "10.42.0.3"},
			want:  []string{"10.42.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.3"},
		},
		{
			name: "IPv4 length", old: Config{Networks: prefixes("10.42.0.1/24", "10.42.0.3/24")}, new: Config{Networks: prefixes("10.42.0.1/16", "10.42.0.3/24")},
			stays: []string{"10.42.0.1", "10.42.0.3"},
			want:  []string{"10.42.0.0/16 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.42.0.1"},
		},
		{
			name: "IPv6 address", old: Config{Networks: prefixes("fd42::1/64", "fd42::3/64")}, new: Config{Networks: prefixes("fd42::2/64", "fd42::3/64")},
			stays: []string{"fd42::3"},
			want:  []string{"fd42::/64 table 254 metric 256 proto 111 mtu 1300 mss 1240"},
		},
		{
			// The kernel has no way to change it but to take the address away for an instant.
			name: "IPv6 length", old: Config{Networks: prefixes("fd42::1/64", "fd42::3/64")}, new: Config{Networks: prefixes("fd42::1/48", "fd42::3/64")},
			stays: []string{"fd42::3", "fd42::1"}, most: map[string]uint32{"ping fd42::1": lossOfInstant},
			want: []string{"fd42::/48 table 254 metric 256 proto 111 mtu 1300 mss 1240"},
		},
		{
			name: "MTU and routes", old: Config{Routes: []Route{{Prefix: p("10.8.0.0/16")}, {Prefix: p("fd08::/64"), MTU: 1290}}},
			new:  Config{MTU: 1400, Routes: []Route{{Prefix: p("10.7.0.0/16"), MTU: 1500}, {Prefix: p("fd08::/64"), MTU: 1300, Metric: 5}}},
			want: []string{"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1400 mss 1360", "fd08::/64 table 254 metric 5 proto 111 mtu 1300 mss 1240"},
		},
		{
			name: "MTU falls", old: Config{MTU: 1400}, new: Config{MTU: 1300},
			want: []string{"10.9.0.0/16 table 254 metric 0 proto 111 mtu 1300 mss 1260", "fd09::/64 table 254 metric 1024 proto 111 mtu 1300 mss 1240"},
		},
	} {
		for _, promote := range []string{"0", "1"} {
			tests[fmt.Sprintf("%s, promote %s", test.name, promote)] = func(l *lab) {
				with := func(c Config) Config {
					c.Networks, c.Routes, c.TxQueueLen = append(slices.Clone(c.Networks), always...), append(slices.Clone(c.Routes), routes...), 10000
					return c
				}
				d := l.active(with(test.old))
				l.setSysctl("ipv4/conf/"+d.State().Name+"/promote_secondaries", promote)
				pings := append([]string{"10.44.0.1", "fd44::1"}, test.stays...)
				probe := l.startProbe(d, pings, []string{"10.44.0.1>10.44.0.9", "10.44.0.1>10.9.0.9", "fd44::1>fd44::9", "fd44::1>fd09::9"})
				l.reload(d, with(test.new))
				got := l.routes(d.index)
				for flow, lost := range probe.end() {
					if lost > 0 {
						l.Logf("%s: lost %d", flow, lost)
					}
					if lost > test.most[flow] {
						l.Errorf("%s: lost %d, want at most %d", flow, lost, test.most[flow])
					}
				}
				for _, want := range test.want {
					if !slices.Contains(got, want) {
						l.Errorf("no route %q among %q", want, got)
					}
				}
				l.noEvent(d, EventDegraded)
			}
		}
	}
	nstestLeaksAround(t, tests)
}

// The device's MTU is the largest of its routes', in whatever order they are and come, and two more reloads leave `ip link` and
// `ip route` as they are (kernel.md U13).
func TestReloadPermutesRouteMTUs(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")})
	destinations := prefixes("10.7.0.0/16", "fd08::/64", "10.9.0.0/16")
	permutations([]int{1290, 1500, 0}, func(mtus []int) {
		cfg := Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64")}
		var want []string
		for i, mtu := range mtus {
			cfg.Routes = append(cfg.Routes, Route{Prefix: destinations[i], MTU: mtu})
			want = append(want, fmt.Sprintf("%v mtu %d", destinations[i], cmp.Or(mtu, 1300)))
		}
		l.reload(d, cfg)
		state, routes := l.kernelState(), strings.Join(l.routes(d.index), "\n")
		for _, text := range want {
			if destination, mtu, _ := strings.Cut(text, " "); !regexp.MustCompile(`(?m)^` + destination + ` .* ` + mtu + ` `).MatchString(routes) {
				t.Errorf("routes %v: no %s among\n%s", mtus, text, routes)
			}
		}
		if got := d.State().MTU; got != 1500 {
			t.Errorf("routes %v: device MTU %d, want 1500", mtus, got)
		}
		for n := range 2 {
			l.reload(d, cfg)
			l.want(fmt.Sprintf("routes %v, reload %d", mtus, n+2), l.kernelState(), state...)
		}
	})
}

// lossOfInstant is how many packets of one flow may be lost while an address is not there.
const lossOfInstant = 100

// nstestLeaksAround runs the tests one after the other: their probes want the machine for themselves.
func nstestLeaksAround(t *testing.T, tests map[string]func(*lab)) {
	for name, fn := range tests {
		t.Run(name, func(t *testing.T) { fn(newLab(t)) })
	}
}

// Strangers' IPv4 routes that name an address as their source go with it in the kernel, silently. An event says how many
// (kernel.md V7).
func TestRemovedAddressTakesStrangersRoutes(t *testing.T) {
	l := newLab(t)
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "10.43.0.1/24")})
	name := d.State().Name
	l.ip(strings.ReplaceAll("route add 10.7.0.0/16 dev DEV src 10.42.0.1\nroute add 10.8.0.0/16 dev DEV src 10.42.0.1\nroute add 10.6.0.0/16 dev DEV src 10.43.0.1", "DEV", name))
	l.reload(d, Config{Networks: prefixes("10.43.0.1/24")})
	e := l.event(d, EventDegraded)
	want := "others' routes went with an address of ours: 10.7.0.0/16 metric 0 table 254 mtu 0 proto 3; 10.8.0.0/16 metric 0 table 254 mtu 0 proto 3"
	if e.N != 2 || e.Err.Error() != want {
		t.Errorf("event %v, want (2): %s", e, want)
	}
	l.want("routes", l.routes(d.index), "10.6.0.0/16 table 254 metric 0 proto 3 mtu 0 mss 0 src 10.43.0.1",
		"10.43.0.0/24 table 254 metric 0 proto 111 mtu 1300 mss 1260 src 10.43.0.1")
	// An address that only changes its length takes none, and the last of all takes every one.
	l.reload(d, Config{Networks: prefixes("10.43.0.1/16")})
	l.noEvent(d, EventDegraded)
	l.ip("route add 10.5.0.0/16 dev " + name)
	l.reload(d, Config{})
	if e := l.event(d, EventDegraded); e.N != 2 {
		t.Errorf("event %v, want (2)", e)
	}
}
