package overlay

import (
	"errors"
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
)

// The Logger is reloadable: events go to the one of the Config in force.
func TestReloadChangesTheLogger(t *testing.T) {
	var first, second ledger
	dev, host, err := Pipe(Config{Logger: first.logger()})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		t.Fatal(err)
	}
	before := len(first.lines())
	if before == 0 {
		t.Fatal("the first logger was not told that the link is up")
	}
	if err := dev.Reload(Config{Logger: second.logger()}); err != nil {
		t.Fatal(err)
	}
	if err := host.Close(); err != nil {
		t.Fatal(err)
	}
	if len(first.lines()) != before || len(second.lines()) == 0 {
		t.Errorf("after Reload the first has %q, the second %q", first.lines()[before:], second.lines())
	}
}

// After one's own Close every answer is os.ErrClosed, also to a Config that would be refused.
func TestReloadAfterClose(t *testing.T) {
	nstest.Require(t, nstest.NetAdmin, nstest.TUN)
	dev, err := New(Config{NetNS: nstest.New(t).Path()})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	for _, cfg := range []Config{{}, {MTU: -1}} {
		if err := dev.Reload(cfg); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Reload(%+v) = %v, want os.ErrClosed", cfg, err)
		}
	}
}
