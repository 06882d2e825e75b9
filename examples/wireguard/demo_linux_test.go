package main

import (
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

// TestDemo runs the demo as root and as an ordinary user.
func TestDemo(t *testing.T) {
	for name, opts := range map[string]nstest.HelperOptions{
		"root":          {},
		"ordinary user": {UID: 65534, Tun: nstest.TunPublic},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.Require(t, nstest.TUN, nstest.IPv6, nstest.SecondUID, nstest.Mknod)
			nstest.Leaks(t)
			opts.Args = []string{"-demo"}
			out, err := nstest.New(t).Helper(t, helperDaemon, opts)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"IPv4  alice to bob, round trip ", "IPv6  alice to bob, round trip ", "All worked."} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in:\n%s", want, out)
				}
			}
		})
	}
}
