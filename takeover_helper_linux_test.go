package overlay_test

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"time"

	"example.com/overlay"
	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

func init() {
	nstest.Helper("take over", helperTakeOver)
	nstest.Helper("hand over", helperHandOver)
	nstest.Helper("attach again", helperAttachAgain)
}

func stopSignal() <-chan os.Signal {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	return stop
}

// helperTakeOver is the daemon of Example_takeOver, in a process that systemd started, as far as it can tell.
func helperTakeOver() error {
	os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	stop := stopSignal()
	fmt.Println("started")
	return daemon(inherited(), stop)
}

// helperHandOver is two generations of a daemon in one, with the functions of Example_handOver. Descriptor 3 is a socket to the other
// generation; with an argument it waits for the device there. Descriptor 4 is the socket to other hosts.
func helperHandOver() error {
	stop := stopSignal()
	other, err := net.FileConn(os.NewFile(3, "the other generation"))
	if err != nil {
		return err
	}
	defer other.Close()
	fmt.Println("started")
	socket, err := openSocket([]int{4})
	if err != nil {
		return err
	}
	defer socket.Close()
	var dev overlay.Device
	if len(os.Args) > 1 {
		dev, err = takeOver(config, other.(*net.UnixConn))
	} else {
		dev, err = overlay.New(config)
	}
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		return err
	}
	if err := notify("READY=1"); err != nil {
		return err
	}
	if len(os.Args) > 1 {
		return carry(dev, socket, stop)
	}
	var out, in sync.WaitGroup
	out.Go(func() { _ = send(dev, socket) }) // until Close
	in.Go(func() { _ = receive(dev, socket) })
	<-stop
	if err := socket.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	in.Wait()
	return handOver(dev, &out, other.(*net.UnixConn))
}

// helperAttachAgain is a daemon with a persistent device, and nobody who keeps a descriptor of it.
func helperAttachAgain() error {
	stop := stopSignal()
	fmt.Println("started")
	cfg := config
	cfg.Mode, cfg.Persist = overlay.AttachOrCreate, true
	dev, err := overlay.New(cfg)
	if err != nil {
		return err
	}
	defer dev.Close()
	socket, err := openSocket([]int{3})
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := dev.Activate(); err != nil {
		return err
	}
	if err := notify("READY=1"); err != nil {
		return err
	}
	return carry(dev, socket, stop)
}
