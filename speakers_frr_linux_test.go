package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

// frr is FRR on one of three hosts: zebra, which installs nexthop objects, and bgpd in an iBGP full mesh of IPv4 sessions
// for both families: for one over IPv6 it wants a link-local address.
type frr struct {
	*speaker
	zebra, bgpd *nstest.Process
	announced   []string
}

func startFRR(s *speaker) *frr {
	s.Helper()
	f := &frr{speaker: s}
	var c strings.Builder
	fmt.Fprintf(&c, "router bgp 65000\n bgp router-id %s\n no bgp default ipv4-unicast\n no bgp network import-check\n", f.v4())
	f.write("group", "root:x:0:\nfrrvty:x:0:root\n")
	f.write("zebra.conf", "log stdout\n")
	f.write("vtysh.conf", "")
	peers := slices.DeleteFunc([]string{"10.42.0.1", "10.42.0.2", "10.42.0.3"}, func(p string) bool { return p == f.v4() })
	for _, p := range peers {
		fmt.Fprintf(&c, " neighbor %s remote-as 65000\n neighbor %s timers connect 1\n neighbor %s advertisement-interval 0\n", p, p, p)
	}
	for _, family := range []string{"ipv4", "ipv6"} {
		fmt.Fprintf(&c, " address-family %s unicast\n  maximum-paths ibgp 8\n", family)
		for _, p := range peers {
			fmt.Fprintf(&c, "  neighbor %s activate\n", p)
		}
		c.WriteString(" exit-address-family\n")
	}
	f.write("bgpd.conf", "log stdout\n"+c.String())
	f.start()
	s.daemon = f
	return f
}

func (f *frr) write(name, text string) {
	f.Helper()
	f.must(os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o644))
}

// run runs a daemon as root, which has to be in the group frrvty for that: in /etc/group as this process and no other sees it.
// It stays the test's to kill so; a change of user would undo what ties it to the test. And it leaves its logs in /var/tmp.
func (f *frr) run(name string, more ...string) *nstest.Process {
	f.Helper()
	command := []string{
		"unshare", "-m", "sh", "-c", `mount --bind "$0/group" /etc/group && mount -t tmpfs frr /var/tmp && exec "$@"`, f.dir,
		"/usr/lib/frr/" + name, "-u", "root", "-g", "root", "-A", "127.0.0.1", "-P", "0", "--vty_socket", f.dir, "--log", "stdout",
		"-z", filepath.Join(f.dir, "zserv.api"), "-i", filepath.Join(f.dir, name+".pid"), "-f", filepath.Join(f.dir, name+".conf"),
	}
	p := f.ns.Start(f.T, append(command, more...)...)
	p.Expect(f.T, " starting: vty")
	return p
}

func (f *frr) start() {
	f.Helper()
	f.zebra = f.run("zebra")
	f.bgpd = f.run("bgpd", "-l", f.v4())
}

// restart starts zebra again, and bgpd with it, which would not tell a new zebra of old routes: watchfrr does the same.
func (f *frr) restart() {
	f.Helper()
	f.zebra.Kill()
	f.bgpd.Kill()
	f.start()
	subnets := f.announced
	f.announced = nil
	f.announce(subnets...)
}

// announce tells bgpd what changes.
func (f *frr) announce(prefixes ...string) {
	f.Helper()
	lines := []string{"configure", "router bgp 65000"}
	network := func(verb, prefix string) {
		family := "ipv4"
		if strings.Contains(prefix, ":") {
			family = "ipv6"
		}
		lines = append(lines, "address-family "+family+" unicast", verb+"network "+prefix, "exit-address-family")
	}
	for _, p := range f.announced {
		if !slices.Contains(prefixes, p) {
			network("no ", p)
		}
	}
	for _, p := range prefixes {
		if !slices.Contains(f.announced, p) {
			network("", p)
		}
	}
	f.announced = prefixes
	f.vtysh("bgpd", lines...)
}

func (f *frr) vtysh(daemon string, lines ...string) string {
	f.Helper()
	command := []string{"vtysh", "--config_dir", f.dir, "--vty_socket", f.dir, "-d", daemon}
	for _, line := range lines {
		command = append(command, "-c", line)
	}
	return f.ns.Run(f.T, command...)
}

func (f *frr) log() string {
	return f.vtysh("zebra", "show ip route", "show ipv6 route", "show nexthop-group rib") +
		f.vtysh("bgpd", "show bgp summary") + f.zebra.Output() + f.bgpd.Output()
}

// objects fails unless the kernel's route to a subnet goes by a nexthop object, to a group by one of a group.
func (f *frr) objects(subnet int, group bool) {
	f.Helper()
	for _, route := range []string{f.ip("route show " + subnet4(subnet)), f.ip("-6 route show " + subnet6(subnet))} {
		_, id, ok := strings.Cut(route, " nhid ")
		if !ok {
			f.Errorf("without a nexthop object: %s", route)
			continue
		}
		id, _, _ = strings.Cut(id, " ")
		if object := f.ip("nexthop show id " + id); strings.Contains(object, "group") != group {
			f.Errorf("group %v: %s has %s", !group, route, object)
		}
	}
}

// What FRR speaks over the overlay and installs as nexthop objects, RoutesFor says, also when zebra is restarted: on host 1 it
// dies by SIGKILL, and routes and objects stay as they were, on host 2 it ends in good order and takes them with it.
func TestSpeakersFRR(t *testing.T) {
	// In a user namespace FRR works too, but not as surely: its daemons are made for root.
	speakers := newSpeakers(t, 3, nstest.InitUserNS, nstest.Program("zebra"), nstest.Program("bgpd"), nstest.Program("vtysh"),
		nstest.Program("unshare"), nstest.Program("mount"))
	frrs := make([]*frr, len(speakers))
	for i, s := range speakers {
		frrs[i] = startFRR(s)
	}
	converse(t, speakers)
	one, two, three := speakers[0], speakers[1], speakers[2]
	two.announce(2, 9)
	three.announce(3, 9)
	one.want(9, 2, 3)
	frrs[0].objects(9, true)
	frrs[0].objects(2, false)

	frrs[0].zebra.Kill()
	if err := frrs[1].zebra.Stop(); err != nil {
		t.Errorf("zebra: %v", err)
	}
	two.want(1)
	two.want(3)
	three.announce(8)
	for _, s := range speakers {
		s.agree()
	}
	one.want(2, 2)
	one.want(9, 2, 3) // nobody takes it away
	frrs[0].restart()
	frrs[1].restart()
	for _, s := range speakers {
		s.agree()
	}
	for _, s := range speakers[:2] {
		s.want(8, 3) // what zebra makes of routes that it left behind is its own business, and takes it its time
	}
	one.want(2, 2)
	one.want(9, 2)
	two.want(1, 1)
	three.want(1, 1)
	one.knock(2)
	frrs[0].objects(2, false)
	for _, s := range speakers {
		s.agree()
	}
}
