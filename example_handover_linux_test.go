package overlay_test

import (
	"fmt"
	"log"
	"net"
	"net/netip"
	"sync"

	"example.com/overlay"
	"golang.org/x/sys/unix"
)

// The old process of an upgrade, or a privileged helper, hands its device over by a Unix socket (SCM_RIGHTS). The successor, which
// needs no right to the node, asks for it there.
func Example_handOver() {
	old, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: "/run/overlay/device", Net: "unix"}) // where it calls handOver
	if err != nil {
		log.Fatal(err)
	}
	defer old.Close()
	dev, err := takeOver(overlay.Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")}}, old)
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil { // what holds already is not written again
		log.Fatal(err)
	}
	fmt.Println(dev.State())
}

// handOver closes dev, waits for the loops that read it, which that ends, and sends its descriptors. Who writes to it has to have ended
// before: see carry, in Example_takeOver. In this order no packet is lost, nor overtaken: what comes meanwhile waits in the device,
// Config.TxQueueLen packets a queue. Without a successor to send them to, the device ends here as any other: Config.Persist, or a
// service manager that keeps the descriptors, outlives that.
func handOver(dev overlay.Device, loops *sync.WaitGroup, successor *net.UnixConn) error {
	if n := len(dev.Queues()); n > mostFiles {
		return fmt.Errorf("%d queues, and a message takes %d descriptors", n, mostFiles)
	}
	var fds []int
	for _, q := range dev.Queues() {
		f, err := q.File()
		if err != nil {
			return err
		}
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	err := dev.Close()
	loops.Wait()
	if err != nil {
		return err
	}
	_, _, err = successor.WriteMsgUnix([]byte("device"), unix.UnixRights(fds...), nil)
	return err
}

const mostFiles = 253 // that the kernel takes in one message

// takeOver waits for the descriptors, and makes a Device of them.
func takeOver(cfg overlay.Config, old *net.UnixConn) (overlay.Device, error) {
	message, control := make([]byte, 64), make([]byte, unix.CmsgSpace(4*mostFiles))
	_, n, _, _, err := old.ReadMsgUnix(message, control) // they are close-on-exec
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages, want the one with the device", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	dev, err := overlay.Adopt(cfg, fds...)
	if err != nil {
		for _, fd := range fds { // still ours
			unix.Close(fd)
		}
	}
	return dev, err
}
