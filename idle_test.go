package overlay

import (
	"errors"
	"net/netip"
	"os"
	"testing"
)

func TestDisabled(t *testing.T) {
	checkGoroutines(t)
	dev, err := New(Config{Disabled: true, Queues: 2, Networks: prefixes("10.0.0.1/24")})
	if err != nil {
		t.Fatal(err)
	}
	parked := make(chan error, 2)
	for _, q := range dev.Queues() {
		go func() { _, err := q.ReadBatch(); parked <- err }()
	}
	wantError(t, "Activate", dev.Activate(), nil)
	write(t, dev.Queues()[1], Packet{Data: echo("")}, Packet{superTCP4(250), 100})
	wantStats(t, dev, Stats{WritePackets: 4, WriteBytes: 24 + 290, WriteSuper: 1})
	if s := dev.State(); s.Index != 0 || s.Up || s.Offload != 0 {
		t.Errorf("got %v", s)
	}
	if hop, ok := dev.NextHop(echo(""), nil); !ok || hop.String() != "10.0.0.2" {
		t.Errorf("got %v, %v, want the destination, which is on-link", hop, ok)
	}
	wantError(t, "Reload of a fixed field", dev.Reload(Config{Queues: 2}), ErrRestart)
	wantError(t, "Reload", dev.Reload(Config{Queues: 2, Disabled: true}), nil)
	if _, ok := dev.RoutesFor(netip.MustParseAddr("10.0.0.2")); ok {
		t.Error("the old network is still in force")
	}
	dev.Queues()[1].Close()
	wantError(t, "a read of the closed queue", <-parked, os.ErrClosed)
	dev.Close()
	wantError(t, "a parked read", <-parked, os.ErrClosed)
	wantEvents(t, dev)
	wantEnded(t, dev, os.ErrClosed)
}

// A disabled device has a name whatever Config says, for its errors and for whoever prints it.
func TestDisabledName(t *testing.T) {
	for name, want := range map[string]string{"": "disabled", "x%d": "x0", "tun7": "tun7"} {
		dev, err := New(Config{Disabled: true, Name: name})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		var op *OpError
		_, err = dev.Queues()[0].Write(nil)
		if got := dev.State().Name; got != want || !errors.As(err, &op) || op.Device != want {
			t.Errorf("Name %q: got %q and the error %v, want %q", name, got, err, want)
		}
	}
}
