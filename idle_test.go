package overlay

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
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

// slowLog is a logger's hook that takes its time, and then looks whether the device is closed.
type slowLog struct {
	begun        chan bool
	closed, late atomic.Bool
}

func (l *slowLog) Levels() []logrus.Level { return logrus.AllLevels }

func (l *slowLog) Fire(*logrus.Entry) error {
	l.begun <- true
	time.Sleep(5 * time.Millisecond)
	if l.closed.Load() {
		l.late.Store(true)
	}
	return nil
}

// Once Close has returned nothing more is logged, whatever it was that had something to say.
func TestPipeIsSilentAfterClose(t *testing.T) {
	for what, call := range map[string]func(dev, host Device){
		"Activate":         func(dev, _ Device) { dev.Activate() },
		"Reload":           func(dev, _ Device) { dev.Reload(Config{MTU: 1400, Logger: dev.State().report.config.Logger}) },
		"Close of host":    func(_, host Device) { host.Close() },
		"Close of a queue": func(dev, _ Device) { dev.Queues()[0].Close() },
	} {
		hook := &slowLog{begun: make(chan bool, 9)}
		log := logrus.New()
		log.SetOutput(io.Discard)
		log.AddHook(hook)
		dev, host, err := Pipe(Config{Logger: log})
		if err != nil {
			t.Fatal(err)
		}
		if what != "Activate" {
			dev.Activate()
			<-hook.begun
		}
		var all sync.WaitGroup
		all.Go(func() { call(dev, host) })
		<-hook.begun
		dev.Close()
		hook.closed.Store(true)
		all.Wait()
		if hook.late.Load() {
			t.Errorf("%s: logged after Close", what)
		}
		host.Close()
	}
}
