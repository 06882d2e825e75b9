package overlay

import (
	"net/netip"
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
)

// What goes on without CAP_NET_ADMIN, once a device is active: following routes, packets both ways, State, Events, closing; a Reload
// that writes nothing. What would write is refused, and what was in force stays so (doc.go, "Privileges"). Here root becomes another
// user; TestDroppedCapability has the user who had nothing but that capability.
func TestDroppedPrivileges(t *testing.T) {
	testDropped(newLab(t, nstest.SecondUID), nstest.HelperOptions{})
}

func testDropped(l *lab, opts nstest.HelperOptions) {
	l.Helper()
	p, first := l.ns.StartHelper(l.T, "dropped", opts)
	if first != "dropped" {
		l.Fatalf("it says %q", first)
	}
	l.ip("route add 10.7.0.0/16 via 10.9.0.2 dev x")
	p.Expect(l.T, "followed; echo <nil>\n")
	p.Expect(l.T, "equal reload <nil>\n")
	p.Expect(l.T, "operation not permitted (needs CAP_NET_ADMIN) true 1300 true\n")
	l.ip("addr del 10.9.0.1/24 dev x")
	p.Expect(l.T, "told of harm\n")
	l.ip("link set x down")
	p.Expect(l.T, "down true\nclosed <nil> <nil>\n")
	if err := p.Wait(); err != nil {
		l.Errorf("%v:\n%s", err, p.Output())
	}
}

// A daemon that is restarted needs no privilege to take its device over: all holds already, so that Activate writes nothing.
func TestTakeOverWithoutPrivileges(t *testing.T) {
	l := newLab(t, nstest.SecondUID)
	d := l.active(Config{Networks: []netip.Prefix{own4, own6}})
	f, err := d.Queues()[0].File()
	l.must(err)
	defer f.Close()
	before := l.kernelState()
	l.must(d.Close())
	opts := nstest.HelperOptions{UID: 65534, ExtraFiles: []*os.File{f}}
	wantHelper(t, l.ns, "powerless successor", opts, "active; echo <nil>\n", "link up", "note the device's network namespace could not be verified")
	l.want("the kernel's state", l.kernelState(), before...)
}
