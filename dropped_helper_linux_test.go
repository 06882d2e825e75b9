package overlay_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"example.com/overlay"
	"example.com/overlay/internal/nstest"
)

func init() {
	nstest.Helper("dropped", helperDropped)
	nstest.Helper("powerless successor", helperPowerlessSuccessor)
}

// helperDropped is a device whose program gives up its privileges, by the function of Example_privileges. It says what still works;
// between lines the test does something to the device.
func helperDropped() error {
	cfg := overlay.Config{
		Name: "x", Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")},
		SystemRoutes: &overlay.SystemRoutes{},
	}
	dev, err := overlay.New(cfg)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		return err
	}
	if err := dropPrivileges(65534, 65534); err != nil {
		return err
	}
	if err := powerless(); err != nil {
		return err
	}
	fmt.Println("dropped")
	routed := func() bool { _, ok := dev.RoutesFor(netip.MustParseAddr("10.7.0.1")); return ok }
	if err := awaitAll("a route", routed); err != nil {
		return err
	}
	fmt.Println("followed; echo", echo(dev))
	fmt.Println("equal reload", dev.Reload(cfg))
	other := cfg
	other.MTU = 1400
	err = dev.Reload(other)
	fmt.Println("other reload", err, errors.Is(err, os.ErrPermission), dev.State().MTU, routed())
	failed := func() bool {
		return dev.Stats().RestoreFails > 0 && strings.Contains(dev.State().String(), "operation not permitted")
	}
	if err := errors.Join(awaitAll("trouble with healing", failed), awaitAll("an event of it", refused(dev))); err != nil {
		return err
	}
	fmt.Println("told of harm")
	if err := awaitAll("the link down", func() bool { return !dev.State().Up }); err != nil {
		return err
	}
	_, err = dev.Queues()[0].Write(echoRequest)
	fmt.Println("down", err == overlay.ErrDown)
	fmt.Println("closed", dev.Queues()[0].Close(), dev.Close())
	return nil
}

// refused looks through the events for one of an ability that was lost for want of permission.
func refused(dev overlay.Device) func() bool {
	return func() bool {
		for {
			select {
			case e := <-dev.Events():
				if e.Kind == overlay.EventDegraded && errors.Is(e.Err, os.ErrPermission) {
					return true
				}
			default:
				return false
			}
		}
	}
}

// powerless says which of the process's threads has a capability.
func powerless() error {
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(tasks) == 0 {
		return errors.Join(err, errors.New("no threads"))
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err == nil && !strings.Contains(string(status), "\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n") {
			return fmt.Errorf("%s: %s", task, status)
		}
	}
	return nil
}

func awaitAll(what string, ok func() bool) error {
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("waited in vain: %s", what)
		}
	}
	return nil
}

// echoRequest is from 10.9.0.2 to 10.9.0.1.
var echoRequest = []byte{
	0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 1, 0x26, 0xcd, 10, 9, 0, 2, 10, 9, 0, 1,
	8, 0, 0xf7, 0xff, 0, 0, 0, 0,
}

// echo moves a packet each way.
func echo(dev overlay.Device) error {
	if _, err := dev.Queues()[0].Write(echoRequest); err != nil {
		return err
	}
	for {
		packets, err := dev.Queues()[0].ReadBatch()
		if err != nil {
			return err
		}
		for _, p := range packets {
			if len(p.Data) == 28 && p.Data[9] == 1 && p.Data[20] == 0 {
				return nil
			}
		}
	}
}

// helperPowerlessSuccessor takes a device over without any privilege.
func helperPowerlessSuccessor() error {
	if err := powerless(); err != nil {
		return err
	}
	cfg := overlay.Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")}}
	dev, err := overlay.Adopt(cfg, 3)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		return err
	}
	fmt.Println("active; echo", echo(dev))
	fmt.Print(dev.State())
	return nil
}
