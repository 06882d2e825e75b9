package overlay

import (
	"fmt"
	"os"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// An error names who holds the device: process and its name, or this one (kernel.md U23).
func TestBusyNamesHolder(t *testing.T) {
	nstest.Require(t, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	opts := nstest.HelperOptions{Args: []string{configArg(t, Config{Name: "x"}), "hold"}}
	if otherID() != 0 { // so may mknod: the holder has the node in another place, as in a container
		opts.Tun = nstest.TunPublic
	}
	p, ready := ns.StartHelper(t, "open new", opts)
	if ready != "x" {
		t.Fatalf("helper opened %q", ready)
	}
	same := unchanged(t, ns)
	holder := fmt.Sprintf("the device is in use by process %d (exe) (", p.Pid())
	for _, mode := range []Mode{Create, Attach, AttachOrCreate} {
		_, err := New(Config{Name: "x", NetNS: ns.Path(), Mode: mode})
		wantOpError(t, mode.String(), err, ErrBusy, holder)
		wantOpError(t, mode.String(), err, unix.EBUSY)
	}
	same("refused")
	if err := p.Stop(); err != nil {
		t.Error(err)
	}

	own, ready := ns.StartHelper(t, "open twice", nstest.HelperOptions{})
	if want := "overlay: create y: the device is in use by this process (device or resource busy)"; ready != want {
		t.Errorf("got %q, want %q", ready, want)
	}
	own.Stop()
}

// What a process calls itself ends in an error text, and must not be able to forge a second one (kernel.md S11).
func TestHolderNameIsPrintable(t *testing.T) {
	nstest.Require(t, nstest.TUN)
	ns := nstest.New(t)
	p, _ := ns.StartHelper(t, "open twice", nstest.HelperOptions{Args: []string{"evil\n\x1b[2J"}})
	_, err := New(Config{Name: "y", NetNS: ns.Path()})
	wantOpError(t, "holder", err, ErrBusy, fmt.Sprintf("process %d (evil??[2J)", p.Pid()))
}

func init() {
	nstest.Helper("open twice", func() error {
		if len(os.Args) > 1 {
			if err := os.WriteFile("/proc/self/comm", []byte(os.Args[1]), 0); err != nil {
				return err
			}
		}
		d, err := New(Config{Name: "y"})
		if err != nil {
			return err
		}
		defer d.Close()
		_, err = New(Config{Name: "y"})
		return nstest.Ready(fmt.Sprint(err))
	})
}

// A holder may be in another namespace than the device, as by Config.NetNS. Of ourselves we can tell, and are named; of another
// process we say perhaps. Either way the answer comes soon, and nobody is sent to Attach, which would find the device as busy.
func TestHolderOutsideNamespace(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns, away := nstest.New(t), nstest.New(t) // names of no other test: its holder would be named too
	ns.Run(t, "ip tuntap add dev far-kept mode tun")
	ns.Run(t, "ip tuntap add dev near-kept mode tun")
	newIn(t, ns, Config{Name: "near-made"})
	newIn(t, ns, Config{Name: "near-kept", Mode: Attach})
	holders := make(map[string]string)
	for name, mode := range map[string]Mode{"far-made": Create, "far-kept": Attach} {
		cfg := Config{Name: name, Mode: mode, NetNS: ns.Path()}
		p, _ := away.StartHelper(t, "open new", nstest.HelperOptions{Args: []string{configArg(t, cfg), "hold"}})
		holders[name] = fmt.Sprintf("the device is in use, perhaps by process %d (exe), from another network namespace (", p.Pid())
	}
	holders["near-made"] = "the device is in use by this process ("
	holders["near-kept"] = holders["near-made"]
	same := unchanged(t, ns)
	for name, holder := range holders {
		for _, mode := range []Mode{Create, Attach, AttachOrCreate} {
			what := fmt.Sprintf("%s, %v", name, mode)
			start := time.Now()
			_, err := New(Config{Name: name, NetNS: ns.Path(), Mode: mode})
			wantOpError(t, what, err, ErrBusy, holder)
			if took := time.Since(start); took > time.Second {
				t.Errorf("%s: refused after %v", what, took)
			}
		}
	}
	same("refused")
}

// A namesake of ours in another namespace holds nothing here.
func TestNamesakeIsNoHolder(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN, nstest.Program("ip"))
	nstest.Leaks(t)
	ns := nstest.New(t)
	newIn(t, nstest.New(t), Config{Name: "namesake"})
	ns.Run(t, "ip tuntap add dev namesake mode tun")
	_, err := New(Config{Name: "namesake", NetNS: ns.Path()})
	wantOpError(t, "persistent", err, ErrBusy, "the name is that of a persistent device, for Mode Attach")
}
