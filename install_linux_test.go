package overlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BenchmarkInstall compares ways to put routes through a device into the kernel, one after the other in every round: the device's
// own (a Reload: reading the Config, tree and questions who answers included), netlink.RouteReplace one by one, `ip -batch`, and
// raw rtnetlink with 250 messages a send and no library at all. ns/route is each way's median over the rounds, x the ratio to ours.
func BenchmarkInstall(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchmarkInstall(b, n) })
	}
}

func benchmarkInstall(b *testing.B, n int) {
	nstest.Require(b, nstest.NetAdmin, nstest.TUN, nstest.Program("ip"))
	r := newRig(b, Config{Networks: []netip.Prefix{own4}})
	cfg := r.dev.(*tunDevice).cfg.clone()
	none := cfg.clone()
	for i := range n {
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		cfg.Routes = append(cfg.Routes, Route{Prefix: prefix})
	}
	index := r.dev.State().Index
	var handle *netlink.Handle
	r.ns.Do(r, func() {
		var err error
		if handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			b.Fatal(err)
		}
	})
	b.Cleanup(handle.Close)
	ways := []struct {
		name string
		run  func()
	}{
		{"ours", func() { r.must(r.dev.Reload(cfg)) }},
		{"RouteReplace", func() {
			for i := range cfg.Routes {
				p := cfg.Routes[i].Prefix
				r.must(handle.RouteReplace(&netlink.Route{
					LinkIndex: index, Scope: netlink.SCOPE_LINK, Protocol: 222, MTU: 1300, AdvMSS: 1260,
					Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)},
				}))
			}
		}},
		{"ip-batch", func() { r.ipBatch(cfg.Routes) }},
		{"raw", func() { r.rawInstall(index, cfg.Routes) }},
	}
	times := make([][]time.Duration, len(ways))
	for b.Loop() {
		for i, way := range ways {
			eventually(b, "trust", r.dev.(*tunDevice).isTrusted)
			start := time.Now()
			way.run()
			times[i] = append(times[i], time.Since(start))
			r.must(r.dev.Reload(none))
			r.ns.Run(b, "ip route flush proto 222")
		}
	}
	medianOf := func(i int) float64 {
		slices.Sort(times[i])
		return float64(times[i][len(times[i])/2].Nanoseconds()) / float64(n)
	}
	for i, way := range ways {
		b.ReportMetric(medianOf(i), way.name+"-ns/route")
		if i > 0 {
			b.ReportMetric(medianOf(i)/medianOf(0), way.name+"-x")
		}
	}
	b.ReportMetric(0, "ns/op")
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) ipBatch(routes []Route) {
	var lines bytes.Buffer
	for i := range routes {
		fmt.Fprintf(&lines, "route add %v dev %s scope link mtu 1300 advmss 1260 proto 222\n", routes[i].Prefix, r.name)
	}
	r.ns.Do(r, func() {
		cmd := exec.Command("ip", "-batch", "-")
		cmd.Stdin = &lines
		if out, err := cmd.CombinedOutput(); err != nil {
			r.Fatalf("%v: %s", err, out)
		}
	})
}

// rawInstall is the least that a program can do: messages made in place, 250 a send, one acknowledgement for them all.
func (r *rig) rawInstall(index int, routes []Route) {
	n := binary.NativeEndian
	r.ns.Do(r, func() {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		r.must(err)
		defer unix.Close(fd)
		to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
		var out, in []byte = make([]byte, 0, 1<<16), make([]byte, 1<<16)
		for len(routes) > 0 {
			batch := routes[:min(250, len(routes))]
			routes = routes[len(batch):]
			out = out[:0]
			for i := range batch {
				flags := uint16(unix.NLM_F_REQUEST | unix.NLM_F_CREATE | unix.NLM_F_APPEND)
				if i == len(batch)-1 {
					flags |= unix.NLM_F_ACK
				}
				out = appendRawRoute(out, n, flags, uint32(index), batch[i].Prefix)
			}
			r.must(unix.Sendto(fd, out, 0, to))
			got, _, err := unix.Recvfrom(fd, in, 0)
			r.must(err)
			if errno := int32(n.Uint32(in[16:])); got < 20 || errno != 0 {
				r.Fatalf("answer %d", errno)
			}
		}
	})
}

func appendRawRoute(out []byte, n interface {
	binary.ByteOrder
	binary.AppendByteOrder
}, flags uint16, index uint32, prefix netip.Prefix,
) []byte {
	a := prefix.Addr().As4()
	out = n.AppendUint32(out, 16+12+8+8+8+8+20)
	out = n.AppendUint16(out, unix.RTM_NEWROUTE)
	out = n.AppendUint16(out, flags)
	out = append(out, 0, 0, 0, 0, 0, 0, 0, 0)
	out = append(out, unix.AF_INET, byte(prefix.Bits()), 0, 0, 254, 222, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0)
	attr := func(kind uint16, value uint32) {
		out = n.AppendUint16(n.AppendUint16(out, 8), kind)
		out = n.AppendUint32(out, value)
	}
	out = append(n.AppendUint16(n.AppendUint16(out, 8), unix.RTA_DST), a[:]...)
	attr(unix.RTA_OIF, index)
	attr(unix.RTA_TABLE, 254)
	attr(unix.RTA_PRIORITY, 0)
	out = n.AppendUint16(n.AppendUint16(out, 20), unix.RTA_METRICS)
	attr(unix.RTAX_MTU, 1300)
	attr(unix.RTAX_ADVMSS, 1260)
	return out
}

// BenchmarkQuestions is what it costs to ask who answers, beside what it costs to install.
func BenchmarkQuestions(b *testing.B) {
	r := newRig(b, Config{Networks: []netip.Prefix{own4}})
	d := r.dev.(*tunDevice)
	requests := make([]rtnl.Message, 1000)
	for i := range requests {
		requests[i] = rtnl.MatchRoute(netip.AddrFrom4([4]byte{10, 9, 0, byte(2 + i%200)}))
	}
	for b.Loop() {
		d.ctl.Do(requests...)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(requests)), "ns/question")
}
