package overlay_test

import (
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
)

func init() {
	nstest.Helper("example container", func() error { Example_container(); return nil })
	nstest.Helper("example privileges", func() error { Example_privileges(); return nil })
}

// Examples that the go tool only compiles, because they take a process or a host of their own, run here.

func TestExampleContainer(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.IPv6)
	nstest.Leaks(t)
	for _, disabled := range []string{"0", "1"} { // 1 as in Docker
		ns := nstest.New(t)
		ns.Run(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6="+disabled)
		ns.Run(t, "sysctl -qw net.ipv6.conf.default.disable_ipv6="+disabled)
		_, first := ns.StartHelper(t, "example container", nstest.HelperOptions{ReadOnlyProcSys: true})
		if !strings.HasPrefix(first, "degraded (3): set ipv6/accept_ra=0: read-only file system") {
			t.Errorf("disable_ipv6=%s: it says %q", disabled, first)
		}
	}
}

func TestExamplePrivileges(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.SecondUID)
	nstest.Leaks(t)
	out, err := nstest.New(t).Helper(t, "example privileges", nstest.HelperOptions{})
	if err != nil || !strings.HasPrefix(out, "<nil>\n") || !strings.Contains(out, "operation not permitted") {
		t.Errorf("%v, it says %q", err, out)
	}
}
