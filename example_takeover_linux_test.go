package overlay_test

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/overlay"
	"golang.org/x/sys/unix"
)

// config is the same for New and for Adopt. While no daemon runs packets wait: TxQueueLen of them in the device.
var config = overlay.Config{
	Name:       "overlay0",
	Networks:   []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24"), netip.MustParsePrefix("fd42::1/64")},
	Routes:     []overlay.Route{{Prefix: netip.MustParsePrefix("192.168.7.0/24"), Via: []overlay.Gateway{{Addr: hosts[0].overlay4}}}},
	TxQueueLen: 10_000,
}

// hosts are the others of the overlay, and where they are.
var hosts = []struct {
	overlay4, overlay6 netip.Addr
	underlay           netip.AddrPort
}{
	{netip.MustParseAddr("10.42.0.2"), netip.MustParseAddr("fd42::2"), netip.MustParseAddrPort("192.0.2.2:4242")},
}

// The names by which systemd keeps our descriptors.
const (
	deviceName = "device"
	socketName = "socket"
)

// A daemon whose device outlives it, whether it is restarted, upgraded or killed: systemd keeps the descriptors meanwhile, by
// Type=notify and FileDescriptorStoreMax=2 in the unit. The next daemon finds addresses, routes and connections as they were,
// and the packets that came in between.
func Example_takeOver() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	if err := daemon(inherited(), stop); err != nil {
		log.Fatal(err)
	}
}

func daemon(kept map[string][]int, stop <-chan os.Signal) error {
	dev, err := openDevice(kept[deviceName])
	if err != nil {
		return err
	}
	defer dev.Close()
	socket, err := openSocket(kept[socketName])
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := dev.Activate(); err != nil { // it compares, and after a take-over finds nothing to write
		return err
	}
	if err := keep(dev, socket, kept); err != nil {
		return err
	}
	if err := notify("READY=1"); err != nil {
		return err
	}
	return carry(dev, socket, stop)
}

// openDevice adopts what was kept. A device that does not fit config any longer, by its name say, is refused: who changes what is
// fixed for a device's life stops the unit first, with which systemd lets go of what it keeps.
func openDevice(fds []int) (overlay.Device, error) {
	if len(fds) > 0 {
		return overlay.Adopt(config, fds...)
	}
	return overlay.New(config)
}

// openSocket opens the socket to the other hosts. It is kept too: what they send meanwhile waits in its buffer.
func openSocket(fds []int) (*net.UDPConn, error) {
	if len(fds) == 0 {
		return net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:4242")))
	}
	file := os.NewFile(uintptr(fds[0]), socketName)
	defer file.Close()
	conn, err := net.FilePacketConn(file) // a duplicate
	if err != nil {
		return nil, err
	}
	udp, ok := conn.(*net.UDPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("descriptor %d is no UDP socket", fds[0]), conn.Close())
	}
	return udp, nil
}

// keep gives systemd a duplicate of every descriptor that it does not keep yet: it drops that of a device that was deleted.
func keep(dev overlay.Device, socket *net.UDPConn, kept map[string][]int) error {
	var errs []error
	if len(kept[socketName]) == 0 {
		errs = append(errs, store(socketName, socket.File))
	}
	if len(kept[deviceName]) == 0 {
		for _, q := range dev.Queues() {
			errs = append(errs, store(deviceName, q.File))
		}
	}
	return errors.Join(errs...)
}

// store keeps no duplicate itself: one forgotten would keep the device alive. Systemd's is let go by FDSTOREREMOVE=1.
func store(name string, file func() (*os.File, error)) error {
	f, err := file()
	if err != nil {
		return err
	}
	defer f.Close()
	raw, err := f.SyscallConn() // Fd would let the socket block, ours too
	if err != nil {
		return err
	}
	control := raw.Control(func(fd uintptr) { err = notify("FDSTORE=1\nFDNAME="+name, int(fd)) })
	return errors.Join(control, err)
}

// carry carries packets until it is told to stop; then in an order in which none is lost on its way.
func carry(dev overlay.Device, socket *net.UDPConn, stop <-chan os.Signal) error {
	var out, in sync.WaitGroup
	failed := make(chan error, 2)
	out.Go(func() { failed <- send(dev, socket) })
	in.Go(func() { failed <- receive(dev, socket) })
	var err error
	select {
	case <-stop:
	case err = <-failed: // the device was deleted, say
	}
	past := time.Unix(1, 0)
	err = errors.Join(err, socket.SetReadDeadline(past)) // what was received is written,
	in.Wait()
	err = errors.Join(err, dev.Close()) // and what was read is sent: what waits in the device stays there, because systemd has a File
	out.Wait()
	return err
}

func send(dev overlay.Device, socket *net.UDPConn) error {
	var datagram []byte
	for {
		packets, err := dev.Queues()[0].ReadBatch()
		if err != nil {
			return err
		}
		for _, p := range packets {
			hop, ok := dev.NextHop(p.Data, nil)
			for _, h := range hosts {
				if !ok || h.overlay4 != hop && h.overlay6 != hop {
					continue
				}
				for i := range p.Segments() {
					datagram = p.AppendSegment(datagram[:0], i) // a VPN encrypts here
					_, _ = socket.WriteToUDPAddrPort(datagram, h.underlay)
				}
			}
		}
	}
}

func receive(dev overlay.Device, socket *net.UDPConn) error {
	buffer := make([]byte, 65535)
	for {
		n, _, err := socket.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return err
		}
		_, _ = dev.Queues()[0].Write(buffer[:n]) // a VPN has made sure before who sent it
	}
}

// inherited returns the descriptors that systemd hands over, by name: sd_listen_fds(3). The library reads no environment.
func inherited() map[string][]int {
	const first = 3
	kept := make(map[string][]int)
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return kept // nothing, or another's
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil {
		return kept
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for i := range min(n, len(names)) {
		if name := names[i]; name != deviceName && name != socketName { // of an earlier version: it would keep its device alive
			unix.Close(first + i)
		} else {
			unix.CloseOnExec(first + i)
			kept[name] = append(kept[name], first+i)
		}
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name) // our children inherit nothing
	}
	return kept
}

// notify tells systemd something, with descriptors if there are any: sd_notify(3).
func notify(state string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil // not started by systemd
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	if err := unix.Sendmsg(socket, []byte(state), unix.UnixRights(fds...), &unix.SockaddrUnix{Name: path}, 0); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}
