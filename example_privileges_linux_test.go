package overlay_test

import (
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"example.com/overlay"
	"golang.org/x/sys/unix"
)

// A daemon that is not root: CAP_NET_ADMIN is all that it needs, and all that this gives it in its unit
//
//	User=overlay
//	AmbientCapabilities=CAP_NET_ADMIN
//	CapabilityBoundingSet=CAP_NET_ADMIN
//
// It may drop that too as soon as its device is active. Packets, routes that are followed, State, Stats and Events go on, and so does a
// Reload that has nothing to write. What others remove can be put back no more (EventDegraded says so), and to change what is
// in force takes another daemon, which takes the device over.
func Example_privileges() {
	cfg := overlay.Config{Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")}}
	dev, err := overlay.New(cfg)
	if err != nil {
		log.Fatal(err) // names the capability that is missing
	}
	defer dev.Close()
	if err := dev.Activate(); err != nil {
		log.Fatal(err)
	}
	const nobody = 65534
	if err := dropPrivileges(nobody, nobody); err != nil {
		log.Fatal(err)
	}
	fmt.Println(dev.Reload(cfg)) // nil: nothing to write
	cfg.MTU = 1400
	if err := dev.Reload(cfg); errors.Is(err, os.ErrPermission) {
		fmt.Println(err) // and the old Config is in force
	}
}

// dropPrivileges gives up all capabilities for good, in all threads of the program: as root by becoming another user, and else
// by capset(2). The latter Go does for programs without cgo; for others there is kernel.org/pub/linux/libs/security/libcap/psx.
func dropPrivileges(uid, gid int) error {
	if os.Geteuid() == 0 {
		return errors.Join(syscall.Setgroups([]int{}), syscall.Setgid(gid), syscall.Setuid(uid))
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
