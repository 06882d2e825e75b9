package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

// bird is BIRD 2 on one of three hosts, in an iBGP full mesh of one session for each family. What it announces it blackholes
// itself, so that a subnet that moves away was a blackhole before.
type bird struct {
	*speaker
	process *nstest.Process
}

func startBIRD(s *speaker) *bird {
	s.Helper()
	b := &bird{speaker: s}
	b.configure()
	b.start()
	s.daemon = b
	return b
}

func (b *bird) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bird) start() {
	b.Helper()
	b.process = b.ns.Start(b.T, "bird", "-f", "-c", b.path("conf"), "-s", b.path("ctl"), "-P", b.path("pid"))
	b.process.Expect(b.T, "Started")
}

func (b *bird) announce(prefixes ...string) {
	b.Helper()
	b.configure(prefixes...)
	if out := b.ns.Run(b.T, "birdc", "-s", b.path("ctl"), "configure"); !strings.Contains(out, "Reconfigur") {
		b.Fatalf("birdc configure:\n%s", out)
	}
}

func (b *bird) log() string {
	out, _ := b.ns.TryRun("birdc", "-s", b.path("ctl"), "show protocols all")
	return out + b.process.Output()
}

// configure writes the configuration. Routes to 10.101.0.0/16 go over the IPv6 session, with gateways of that family.
func (b *bird) configure(prefixes ...string) {
	b.Helper()
	var c strings.Builder
	fmt.Fprintf(&c, `log stderr all;
router id %s;
protocol device {}
protocol kernel { ipv4 { export all; }; merge paths on; }
protocol kernel { ipv6 { export all; }; merge paths on; }
template bgp mesh {
	local as 65000;
	direct;
	connect delay time 1;
	connect retry time 1;
	error wait time 1, 1;
}
`, b.v4())
	for n := 1; n <= 3; n++ {
		if n == b.number {
			continue
		}
		fmt.Fprintf(&c, `protocol bgp from mesh {
	neighbor 10.42.0.%d as 65000;
	ipv4 { import all; export where source = RTS_STATIC && net !~ 10.101.0.0/16; };
}
protocol bgp from mesh {
	neighbor fd42::%d as 65000;
	ipv6 { import all; export where source = RTS_STATIC; };
	ipv4 { extended next hop; import all; export where source = RTS_STATIC && net ~ 10.101.0.0/16; };
}
`, n, n)
	}
	for _, family := range []string{"ipv4", "ipv6"} {
		fmt.Fprintf(&c, "protocol static { %s;\n", family)
		for _, p := range prefixes {
			if strings.Contains(p, ":") == (family == "ipv6") {
				fmt.Fprintf(&c, "\troute %s blackhole;\n", p)
			}
		}
		c.WriteString("}\n")
	}
	b.must(os.WriteFile(b.path("conf"), []byte(c.String()), 0o600))
}

// What BIRD speaks over the overlay and exports to the kernel, RoutesFor says, also when BIRD ends, in good order (it takes its
// routes with it) and by SIGKILL (they stay), and when it comes back.
func TestSpeakersBIRD(t *testing.T) {
	speakers := newSpeakers(t, 3, nstest.Program("bird"), nstest.Program("birdc"))
	birds := make([]*bird, len(speakers))
	for i, s := range speakers {
		birds[i] = startBIRD(s)
	}
	converse(t, speakers)
	one := speakers[0]

	birds[1].announce(subnet4(2), subnet6(2), "10.101.9.0/24")
	one.wantVia("10.101.9.7", "fd42::2") // IPv4 by IPv6 gateways
	birds[2].announce(subnet4(3), subnet6(3), "10.101.9.0/24")
	one.wantVia("10.101.9.7", "fd42::2 fd42::3")
	birds[1].announce(subnet4(2), subnet6(2))
	one.wantVia("10.101.9.7", "fd42::3")
	birds[2].announce(subnet4(3), subnet6(3))
	one.wantVia("10.101.9.7", "none")

	birds[0].process.Kill()
	one.agree()
	one.want(2, 2)
	birds[0].start()
	one.agree()
	one.want(2, 2)
	one.want(3, 3)
	if err := birds[0].process.Stop(); err != nil {
		t.Errorf("BIRD: %v", err)
	}
	one.want(2)
	one.want(3)
	birds[2].process.Kill() // its sessions end with it
	speakers[1].want(3)
	birds[2].start()
	birds[0].start()
	for _, s := range speakers {
		for n := 1; n <= 3; n++ {
			if n != s.number {
				s.want(n, n)
				s.knock(n)
			}
		}
		s.agree()
	}
}
