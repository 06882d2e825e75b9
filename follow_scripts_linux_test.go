package overlay

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// The cases of the kernel's fib_tests.sh and fib_nexthops.sh that concern one device, as far as TestFollow and TestFollowUntold do
// not have them: each line of ip(8), and what RoutesFor says then of an address. DEV is the device; a line that begins with -6 is
// for IPv6. A line that begins with ! is to be refused.
var scripts = map[string][]string{
	"fib_tests: unregister": {
		"route add 10.9.0.0/16 nexthop via 10.42.0.9 dev DEV nexthop via 10.1.0.9 dev other0", "10.9.0.1 10.42.0.9",
		"link del other0", "10.9.0.1 none", // the whole route goes
	},
	"fib_tests: down multipath": {
		"route add 10.9.0.0/16 nexthop via 10.42.0.9 dev DEV nexthop via 10.1.0.9 dev other0", "10.9.0.1 10.42.0.9",
		"link set other0 down", "10.9.0.1 10.42.0.9",
		"link set DEV down", "10.9.0.1 none",
		"link set other0 up", "10.9.0.1 none",
	},
	"fib_tests: down multipath, ours first": {
		"route add 10.9.0.0/16 nexthop via 10.42.0.9 dev DEV nexthop via 10.1.0.9 dev other0", "10.9.0.1 10.42.0.9",
		"link set DEV down", "10.9.0.1 none",
		"link set DEV up", "10.9.0.1 10.42.0.9", // the leg lives again
	},
	"fib_tests: unregister, IPv6": {
		"addr add fd01::1/64 dev other0 nodad\n-6 route add fd09::/64 nexthop via fd42::9 dev DEV nexthop via fd01::9 dev other0", "fd09::1 fd42::9",
		"link del other0", "fd09::1 fd42::9", // its leg alone goes
		"-6 route append fd09::/64 via fd42::10", "fd09::1 fd42::9 fd42::10",
	},
	"fib_tests: down multipath, IPv6": {
		"addr add fd01::1/64 dev other0 nodad\n-6 route add fd09::/64 nexthop via fd42::9 dev DEV nexthop via fd01::9 dev other0", "fd09::1 fd42::9",
		"link set other0 down", "fd09::1 fd42::9",
		"link set other0 up\nlink set DEV down", "fd09::1 none",
		"link set other0 down", "fd09::1 none",
	},
	"fib_tests: nexthop": {
		"!route add 10.9.0.0/16 via 10.77.0.9", "10.9.0.1 none",
		"route add 10.9.0.0/16 via 10.77.0.9 dev DEV onlink", "10.9.0.1 none",
	},
	"a stranger's route that stood first has gone with its nexthop object": { // untold, so that a replace takes ours
		"nexthop add id 9 via 10.1.0.9 dev other0\nroute add 10.9.0.0/16 via 10.42.0.9\nroute prepend 10.9.0.0/16 nhid 9", "10.9.0.1 10.42.0.9",
		"nexthop del id 9", "10.9.0.1 10.42.0.9",
		"route replace 10.9.0.0/16 via 10.1.0.10 dev other0\nroute del 10.9.0.0/16 via 10.1.0.10 dev other0", "10.9.0.1 none",
	},
	"a replace leaves two alike, IPv6": { // the dump for the rule shows both
		"nexthop add id 2 via fd42::9 dev DEV\n-6 route add fd09::/64 nhid 2 metric 50\n-6 route append fd09::/64 dev DEV metric 50", "fd09::1 fd42::9",
		"-6 route replace fd09::/64 dev DEV metric 50", "fd09::1 on-link",
		"-6 rule add pref 100 table main", "fd09::1 on-link",
		"-6 route del fd09::/64 dev DEV metric 50", "fd09::1 on-link",
		"-6 route del fd09::/64 dev DEV metric 50", "fd09::1 none",
	},
	"a replace takes one of two alike, IPv6": {
		"nexthop add id 2 via fd42::9 dev DEV\n-6 route add fd09::/64 nhid 2 metric 50\n-6 route append fd09::/64 dev DEV metric 50", "fd09::1 fd42::9",
		"-6 route replace fd09::/64 dev DEV metric 50", "fd09::1 on-link",
		"-6 rule del pref 32766", "fd09::1 none",
		"-6 rule add pref 100 table main", "fd09::1 on-link", // the dump for the rules shows both
		"-6 route replace fd09::/64 via fd42::10 metric 50", "fd09::1 fd42::10",
		"-6 route del fd09::/64 via fd42::10 metric 50", "fd09::1 on-link",
	},
	"fib_tests: suppress": {
		"route add default via 10.42.0.9", "1.2.3.4 10.42.0.9",
		"rule add pref 100 table main suppress_prefixlength 0", "1.2.3.4 10.42.0.9",
		"rule del pref 32766", "1.2.3.4 none",
		"route add 1.2.3.0/24 via 10.42.0.10", "1.2.3.4 10.42.0.10",
	},
	"fib_tests: suppress, IPv6": {
		"-6 route add default via fd42::9", "1234::1 fd42::9",
		"-6 rule add pref 100 table main suppress_prefixlength 0\n-6 rule del pref 32766", "1234::1 none",
		"-6 rule del pref 100", "1234::1 none", // no rule looks at the table
		"-6 rule add pref 100 table main", "1234::1 fd42::9",
	},
	"fib_tests: ipv4_rt_add": {
		"route add 10.9.0.0/16 via 10.42.0.9", "10.9.0.1 10.42.0.9",
		"!route add 10.9.0.0/16 via 10.42.0.10", "10.9.0.1 10.42.0.9",
		"!route add 10.9.0.0/16 dev DEV", "10.9.0.1 10.42.0.9",
		"route add blackhole 10.9.0.0/16 metric 5", "10.9.0.1 10.42.0.9",
		"route del 10.9.0.0/16 metric 0", "10.9.0.1 none",
	},
	"fib_tests: ipv4_rt_append": {
		"route add 10.9.0.0/16 via 10.42.0.9\nroute append 10.9.0.0/16 via 10.42.0.10", "10.9.0.1 10.42.0.9",
		"route del 10.9.0.0/16 via 10.42.0.9", "10.9.0.1 10.42.0.10",
		"route append 10.9.0.0/16 dev DEV\nroute del 10.9.0.0/16 via 10.42.0.10", "10.9.0.1 on-link",
	},
	"fib_tests: ipv4_rt_replace": {
		"!route replace 10.9.0.0/16 via 10.77.0.9", "10.9.0.1 none",
		"route replace 10.9.0.0/16 nexthop via 10.42.0.9 nexthop via 10.42.0.10", "10.9.0.1 10.42.0.9 10.42.0.10",
		"route replace 10.9.0.0/16 via 10.42.0.11", "10.9.0.1 10.42.0.11",
		"!route change 10.9.0.0/16 via 10.77.0.9", "10.9.0.1 10.42.0.11",
		"route change 10.9.0.0/16 via 10.42.0.12", "10.9.0.1 10.42.0.12",
		"route replace blackhole 10.9.0.0/16", "10.9.0.1 none",
	},
	"fib_tests: ipv6_rt_add": {
		"-6 route add fd09::/64 via fd42::9", "fd09::1 fd42::9",
		"!-6 route add fd09::/64 via fd42::10", "fd09::1 fd42::9",
		"-6 route add fd09::/64 via fd42::10 metric 2000", "fd09::1 fd42::9",
	},
	"fib_tests: ipv6_rt_replace_single": {
		"-6 route add fd09::/64 via fd42::9", "fd09::1 fd42::9",
		"-6 route replace fd09::/64 nexthop via fd42::9 weight 2 nexthop via fd42::10 weight 3", "fd09::1 fd42::9*2 fd42::10*3",
		"-6 route replace fd09::/64 via fd42::11", "fd09::1 fd42::11",
		"-6 route replace blackhole fd09::/64", "fd09::1 none",
	},
	"fib_tests: ipv6_rt_replace_mpath": {
		"-6 route add fd09::/64 nexthop via fd42::9 nexthop via fd42::10", "fd09::1 fd42::9 fd42::10",
		"-6 route replace fd09::/64 nexthop via fd42::11 nexthop via fd42::12", "fd09::1 fd42::11 fd42::12",
		"-6 route append fd09::/64 via fd42::13", "fd09::1 fd42::11 fd42::12 fd42::13",
		"!-6 route replace fd09::/64 nexthop via fd77::9 nexthop via fd77::10", "fd09::1 fd42::11 fd42::12 fd42::13",
		"-6 route del fd09::/64 nexthop via fd42::11 dev DEV nexthop via fd42::12 dev DEV", "fd09::1 fd42::13",
	},
	"fib_tests: ipv4_addr_metric": {
		"addr add 10.43.0.1/24 dev DEV metric 257", "10.43.0.9 on-link",
		"route add 10.43.0.0/24 via 10.42.0.9 metric 200", "10.43.0.9 10.42.0.9",
		"addr change 10.43.0.1/24 dev DEV metric 100", "10.43.0.9 on-link",
		"addr del 10.43.0.1/24 dev DEV", "10.43.0.9 10.42.0.9",
	},
	"fib_tests: ipv6_addr_metric": {
		"addr add fd43::1/64 dev DEV metric 257 nodad", "fd43::9 on-link",
		"-6 route add fd43::/64 via fd42::9 metric 200", "fd43::9 fd42::9",
		"addr change fd43::1/64 dev DEV metric 100", "fd43::9 on-link",
		"addr del fd43::1/64 dev DEV", "fd43::9 fd42::9",
	},
	"fib_tests: route_metrics": {
		"route add 10.9.0.0/16 via 10.42.0.9 mtu 1200", "10.9.0.1 10.42.0.9",
		"route append 10.9.0.0/16 via 10.42.0.9 mtu 1100\nroute del 10.9.0.0/16 mtu 1200", "10.9.0.1 10.42.0.9",
		"route del 10.9.0.0/16", "10.9.0.1 none",
	},
	"fib_tests: route_metrics, IPv6": {
		"-6 route add fd09::/64 via fd42::9 mtu 1300", "fd09::1 fd42::9",
		"!-6 route del fd09::/64 via fd42::10", "fd09::1 fd42::9",
		"-6 route replace fd09::/64 via fd42::9 mtu 1400\n-6 route append fd09::/64 via fd42::10 mtu 1400", "fd09::1 fd42::9 fd42::10",
		"-6 route del fd09::/64", "fd09::1 none",
	},
	"fib_tests: ipv4_del_addr": {
		"addr add 10.43.0.1/24 dev DEV\naddr add 10.43.0.2/24 dev DEV", "10.43.0.9 on-link",
		"route add 10.9.0.0/16 via 10.42.0.9 src 10.43.0.2\nroute add 10.9.0.0/16 via 10.42.0.10 metric 9", "10.9.0.1 10.42.0.9",
		"addr del 10.43.0.2/24 dev DEV", "10.9.0.1 10.42.0.10",
		"route add 10.7.0.0/16 via 10.42.0.9 src 10.43.0.1", "10.7.0.1 10.42.0.9",
		"addr del 10.43.0.1/24 dev DEV", "10.7.0.1 none",
	},
	"fib_tests: ipv4_route_v6_gw": {
		"route add 10.9.0.0/16 via inet6 fd42::9 dev DEV", "10.9.0.1 fd42::9",
		"route replace 10.9.0.0/16 nexthop via inet6 fd42::9 dev DEV nexthop via 10.42.0.10", "10.9.0.1 fd42::9 10.42.0.10",
		"!route del 10.9.0.0/16 via inet6 fd42::11", "10.9.0.1 fd42::9 10.42.0.10",
	},
	"fib_nexthops: basic, blackhole": {
		"nexthop add id 1 via 10.42.0.9 dev DEV\nroute add 10.9.0.0/16 nhid 1", "10.9.0.1 10.42.0.9",
		"nexthop replace id 1 blackhole", "10.9.0.1 none",
		"nexthop replace id 1 via 10.42.0.10 dev DEV", "10.9.0.1 10.42.0.10",
		"!nexthop replace id 1 via 10.77.0.9 dev DEV", "10.9.0.1 10.42.0.10",
	},
	"fib_nexthops: grp, IPv6": {
		"nexthop add id 1 via fd42::9 dev DEV\nnexthop add id 2 via fd42::10 dev DEV\nnexthop add id 9 group 1/2,3", "fd09::1 none",
		"-6 route add fd09::/64 nhid 9", "fd09::1 fd42::9 fd42::10*3",
		"nexthop replace id 9 group 1,5/2,1", "fd09::1 fd42::9*5 fd42::10",
		"nexthop del id 1", "fd09::1 fd42::10",
		"nexthop del id 2", "fd09::1 none",
	},
	"fib_nexthops: admin down": {
		"nexthop add id 1 via fd42::9 dev DEV\nnexthop add id 9 group 1\n-6 route add fd09::/64 nhid 9\nroute add 10.9.0.0/16 nhid 9", "fd09::1 fd42::9",
		"link set DEV down", "fd09::1 none",
		"link set DEV up", "10.9.0.1 none",
		"addr replace fd42::1/64 dev DEV nodad\nnexthop add id 1 via fd42::10 dev DEV\n-6 route add fd09::/64 nhid 1", "fd09::1 fd42::10",
	},
	"fib_nexthops: runtime": {
		"nexthop add id 1 via fd42::9 dev DEV\nnexthop add id 2 via 10.42.0.9 dev DEV\n-6 route add fd09::/64 nhid 1\nroute add 10.9.0.0/16 nhid 2", "fd09::1 fd42::9",
		"!-6 route add fd08::/64 nhid 2", "fd08::1 none",
		"-6 nexthop add id 3 blackhole\nnexthop add id 4 blackhole\n-6 route replace fd09::/64 nhid 3\nroute replace 10.9.0.0/16 nhid 4", "fd09::1 none",
		"-6 route replace fd09::/64 via fd42::11\nroute replace 10.9.0.0/16 via 10.42.0.11", "10.9.0.1 10.42.0.11",
		"!route del 10.9.0.0/16 nhid 2", "fd09::1 fd42::11",
	},
	"fib_nexthops: fdb": { // no route leads through such
		"nexthop add id 1 via 10.42.0.9 fdb\nnexthop add id 2 group 1 fdb\nroute add 10.9.0.0/16 via 10.42.0.10", "10.9.0.1 10.42.0.10",
		"!route add 10.8.0.0/16 nhid 2", "10.8.0.1 none",
		"nexthop del id 1\nnexthop add id 1 via 10.42.0.11 dev DEV\nroute add 10.8.0.0/16 nhid 1", "10.8.0.1 10.42.0.11",
	},
	"fib_nexthops: grp": {
		"nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 via 10.42.0.10 dev DEV\nnexthop add id 3 via 10.1.0.9 dev other0", "10.9.0.1 none",
		"nexthop add id 9 group 1/2,2/3\nroute add 10.9.0.0/16 nhid 9", "10.9.0.1 10.42.0.9 10.42.0.10*2",
		"nexthop replace id 9 group 1,200/2", "10.9.0.1 10.42.0.9*200 10.42.0.10",
		"nexthop replace id 3 via 10.42.0.11 dev DEV", "10.9.0.1 10.42.0.9*200 10.42.0.10",
		"nexthop del id 1", "10.9.0.1 10.42.0.10",
		"nexthop del id 2", "10.9.0.1 none", // the last member takes the group along
	},
	"fib_nexthops: res_grp": {
		"nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 via 10.42.0.10 dev DEV", "10.9.0.1 none",
		"nexthop add id 9 group 1/2,3 type resilient buckets 8\nroute add 10.9.0.0/16 nhid 9", "10.9.0.1 10.42.0.9 10.42.0.10*3",
		"nexthop replace id 9 group 1,2/2 type resilient", "10.9.0.1 10.42.0.9*2 10.42.0.10",
		"nexthop del id 1", "10.9.0.1 10.42.0.10",
	},
	"fib_nexthops: withv6": {
		"nexthop add id 1 via fd42::9 dev DEV\nroute add 10.9.0.0/16 nhid 1\n-6 route add fd09::/64 nhid 1", "10.9.0.1 fd42::9",
		"nexthop replace id 1 via fd42::10 dev DEV", "fd09::1 fd42::10",
	},
	"fib_nexthops: compat_mode, IPv6": {
		"SYSCTL", "fd09::1 none",
		"nexthop add id 1 via fd42::9 dev DEV\nnexthop add id 2 group 1\n-6 route add fd09::/64 nhid 2", "fd09::1 fd42::9",
		"nexthop replace id 1 via fd42::10 dev DEV", "fd09::1 fd42::10",
		"nexthop add id 3 via fd42::11 dev DEV\nnexthop replace id 2 group 1/3", "fd09::1 fd42::10 fd42::11",
		"nexthop del id 2", "fd09::1 none",
	},
	"fib_nexthops: compat_mode": {
		"SYSCTL", "10.9.0.1 none",
		"nexthop add id 1 via 10.42.0.9 dev DEV\nnexthop add id 2 group 1\nroute add 10.9.0.0/16 nhid 2\n-6 route add fd09::/64 via fd42::9", "10.9.0.1 10.42.0.9",
		"nexthop replace id 1 via 10.42.0.10 dev DEV", "10.9.0.1 10.42.0.10",
		"nexthop add id 3 via 10.42.0.11 dev DEV\nnexthop replace id 2 group 1/3", "10.9.0.1 10.42.0.10 10.42.0.11",
	},
}

func TestFollowScripts(t *testing.T) {
	all := make(map[string]func(*lab))
	for name, script := range scripts {
		all[name] = func(l *lab) { l.script(script) }
	}
	all["fib_nexthops: large_grp"] = func(l *lab) {
		var lines, members, want []string
		for i := range 32 {
			lines = append(lines, fmt.Sprintf("nexthop add id %d via 10.42.0.%d dev DEV", 100+i, 100+i))
			members, want = append(members, fmt.Sprint(100+i)), append(want, fmt.Sprintf("10.42.0.%d", 100+i))
		}
		lines = append(lines, "nexthop add id 9 group "+strings.Join(members, "/"), "route add 10.9.0.0/16 nhid 9")
		l.script([]string{strings.Join(lines, "\n"), "10.9.0.1 " + strings.Join(want, " ")})
	}
	all["fib_nexthops: torture"] = torture
	together(t, all)
}

// torture changes groups and routes through them all at a time, as the script does; when all rests the kernel's answer is given.
func torture(l *lab) {
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	name := d.State().Name
	l.ip(strings.ReplaceAll("nexthop add id 101 via 10.42.0.9 dev DEV\nnexthop add id 102 via 10.42.0.10 dev DEV\nnexthop add id 1 group 101/102", "DEV", name))
	var all sync.WaitGroup
	end := time.Now().Add(time.Second)
	for _, lines := range []string{
		"nexthop del id 101\nnexthop add id 101 via 10.42.0.9 dev DEV",
		"nexthop replace id 1 group 101/102\nnexthop del id 1\nnexthop add id 1 group 102",
		"route add 10.9.0.0/16 nhid 1\nroute replace 10.9.0.0/16 nhid 102\nroute del 10.9.0.0/16",
		"route replace 10.9.0.0/16 nhid 1\nroute append 10.9.0.0/16 via 10.42.0.11",
	} {
		all.Go(func() {
			for time.Now().Before(end) { // most are refused while another is quicker
				_, _ = l.ns.TryRun("sh", "-c", "ip -force -batch - <<'END'\n"+strings.ReplaceAll(lines, "DEV", name)+"\nEND")
			}
		})
	}
	all.Wait()
	l.ip("nexthop flush")
	for err := error(nil); err == nil; {
		_, err = l.ns.TryRun("ip route del 10.9.0.0/16")
	}
	l.ip("nexthop add id 101 via 10.42.0.9 dev " + name + "\nnexthop add id 1 group 101")
	l.wantRoute(d, "10.9.0.1", "none")
	l.ip("route add 10.9.0.0/16 nhid 1")
	if took := l.wantRoute(d, "10.9.0.1", "10.42.0.9"); took > leeway*time.Second {
		l.Errorf("after %v", took)
	}
}

// script runs pairs of lines and what is to be true then.
func (l *lab) script(pairs []string) {
	l.ns.OtherTun(l, "other0", "10.1.0.1/24")
	d := l.active(Config{Networks: prefixes("10.42.0.1/24", "fd42::1/64"), SystemRoutes: &SystemRoutes{}, NoHeal: true})
	for i := 0; i < len(pairs); i += 2 {
		for line := range strings.Lines(strings.ReplaceAll(pairs[i], "DEV", d.State().Name)) {
			line, refused := strings.CutPrefix(strings.TrimSpace(line), "!")
			if line == "SYSCTL" {
				l.ns.Run(l, "sysctl", "-qw", "net.ipv4.nexthop_compat_mode=0")
				continue
			}
			if out, err := l.ns.TryRun("ip " + line); (err != nil) != refused {
				l.Fatalf("ip %s: %v\n%s", line, err, out)
			}
		}
		addr, want, _ := strings.Cut(pairs[i+1], " ")
		if took := l.wantRoute(d, addr, want); took > leeway*time.Second {
			l.Errorf("%s: after %v", pairs[i], took)
		}
	}
}
