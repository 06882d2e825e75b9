package overlay

import (
	"fmt"
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// A prepared device has its flags back where a queue of it turns out to be of no use, but not where another has one by then.
func TestFailedAttachGivesFlagsBack(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	for _, flags := range []string{"", " pi", " vnet_hdr", " pi vnet_hdr"} {
		ns.Run(t, "ip tuntap add dev one mode tun"+flags)
		ns.Run(t, "ip tuntap add dev many mode tun multi_queue"+flags)
		same := unchanged(t, ns)
		for _, cfg := range []Config{{Name: "one"}, {Name: "many"}, {Name: "many", Queues: 3}} {
			for n := range cfg.queues() {
				cfg.NetNS, cfg.Mode = ns.Path(), Attach
				_, err := newTun(cfg, func(o *opener) (*attachment, error) { return spoilt(t, n)(o.open()) })
				what := fmt.Sprintf("%s%s, queue %d of %d", cfg.Name, flags, n, cfg.queues())
				wantOpError(t, what, err, os.ErrNoDeadline)
				same(what)
			}
		}
		ns.Run(t, "ip link del one")
		ns.Run(t, "ip link del many")
	}
	ns.Run(t, "ip tuntap add dev many mode tun multi_queue pi vnet_hdr")
	theirs := flagTUN | flagNoPI | flagMultiQueue | flagVnetHeader
	_, err := newWith(Config{Name: "many", Mode: Attach, Queues: 2, NetNS: ns.Path()}, meddleAt(2, func() { rawTun(t, ns, "many", theirs) }))
	wantOpError(t, "another's", err, ErrBusy)
	if link, _ := linkIn(t, ns, "many"); link.Tun.PacketInfo || !link.Tun.VnetHeader || link.Tun.Queues != 1 {
		t.Errorf("the other's device is %+v", link.Tun)
	}
}

// spoilt puts a descriptor that the runtime's poller refuses in the place of the n-th queue's.
func spoilt(t testing.TB, n int) func(*attachment, error) (*attachment, error) {
	return func(a *attachment, err error) (*attachment, error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(null)
		return a, unix.Dup3(null, a.fds[n], unix.O_CLOEXEC)
	}
}
