package overlay

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// tunFlags are the flags of TUNSETIFF and TUNGETIFF. IFF_NAPI and IFF_NAPI_FRAGS are never set: they open kernel paths that
// had holes (kernel.md S10) and bring nothing to a TUN.
type tunFlags uint16

const (
	flagTUN        tunFlags = unix.IFF_TUN
	flagTAP        tunFlags = unix.IFF_TAP
	flagNoPI       tunFlags = unix.IFF_NO_PI
	flagMultiQueue tunFlags = unix.IFF_MULTI_QUEUE
	flagVnetHeader tunFlags = unix.IFF_VNET_HDR
	flagExclusive  tunFlags = unix.IFF_TUN_EXCL
	flagDetached   tunFlags = unix.IFF_DETACH_QUEUE // only read: the descriptor's queue is switched off
	flagNAPI       tunFlags = unix.IFF_NAPI | unix.IFF_NAPI_FRAGS
)

// framing are the flags that say how packets look on a descriptor, as far as TUNGETIFF tells; they must be the same on every
// queue. It does not tell flagNoPI: that is also IFF_NOFILTER, which it always sets on a TUN. kernel.Tun has PacketInfo.
const framing = flagTUN | flagTAP | flagMultiQueue | flagVnetHeader | flagNAPI

// setIff creates the device called name, or attaches fd to it, and returns the name that the kernel gave it.
func setIff(fd int, name string, flags tunFlags) (string, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return "", err
	}
	request.SetUint16(uint16(flags))
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return "", err
	}
	return request.Name(), nil
}

// getIff returns name and flags of the device behind fd; EBADFD if it was deleted or fd was never attached.
func getIff(fd int) (string, tunFlags, error) {
	request, err := unix.NewIfreq("")
	if err != nil {
		return "", 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, request); err != nil {
		return "", 0, err
	}
	return request.Name(), tunFlags(request.Uint16()), nil
}

// attachOnly keeps the next setIff on fd from creating a device, which the kernel does as readily as it attaches to the one
// of that name (kernel.md A24): a new interface would have to get the index asked for here, and that is lo's in every
// namespace. The refusal is EBUSY. Attaching does not look at the index.
func attachOnly(fd int) error {
	const loopback = 1
	return unix.IoctlSetPointerInt(fd, unix.TUNSETIFINDEX, loopback)
}

// setOwner lets only this uid attach, beside CAP_NET_ADMIN.
func setOwner(fd, uid int) error { return unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid) }

// setGroup lets only this gid attach; with an owner both must match.
func setGroup(fd, gid int) error { return unix.IoctlSetInt(fd, unix.TUNSETGROUP, gid) }

// setPersist makes the device outlive its descriptors.
func setPersist(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1) }

// setOffload says which superpackets the program takes; the mask belongs to the device and outlives descriptors, so it is
// set even to 0 (kernel.md C1).
func setOffload(fd, mask int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, mask) }

// setDefaults gives a new device back what somebody may have changed who had a descriptor of it for a moment: send buffer,
// carrier, eBPF programs, size and byte order of the virtio header, kernel messages for every packet. All of that stays when
// his descriptor is closed. What else he can change (owner, group, persistence, link type) can be read, and is the caller's
// to check; the offload mask is set for every device, last of all.
func setDefaults(fd int) error {
	for _, s := range []struct {
		what    string
		request uint
		value   int
	}{
		{"send buffer", unix.TUNSETSNDBUF, math.MaxInt32},
		{"carrier", unix.TUNSETCARRIER, 1},
		{"steering program", unix.TUNSETSTEERINGEBPF, -1},
		{"filter program", unix.TUNSETFILTEREBPF, -1},
		{"virtio header size", unix.TUNSETVNETHDRSZ, vnetHeaderSize},
		{"little-endian virtio header", unix.TUNSETVNETLE, 0},
		{"big-endian virtio header", unix.TUNSETVNETBE, 0},
	} {
		// EINVAL: this kernel has no such setting, so nobody changed it.
		if err := unix.IoctlSetPointerInt(fd, s.request, s.value); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("set %s: %w", s.what, err)
		}
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETDEBUG, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("set debug: %w", err)
	}
	return nil
}

// setNativeOrder makes the fields of the virtio header of the machine's own byte order, whatever an earlier user wanted.
func setNativeOrder(fd int) error {
	for _, request := range []uint{unix.TUNSETVNETLE, unix.TUNSETVNETBE} {
		if err := unix.IoctlSetPointerInt(fd, request, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("set the byte order of the virtio header: %w", err)
		}
	}
	return nil
}

// vnetHeader is the flag for a virtio header, without which there are no offloads, if the kernel has it.
func vnetHeader(fd int) tunFlags {
	features, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	if err != nil { // a sandbox that knows neither, kernel.md U38
		return 0
	}
	return tunFlags(features) & flagVnetHeader
}

// vnetHeaderSize is the kernel's default: struct virtio_net_hdr.
const vnetHeaderSize = 10

// headerSize returns how many bytes of virtio header go before each packet on fd, which has flagVnetHeader.
func headerSize(fd int) (int, error) {
	size, err := unix.IoctlGetUint32(fd, unix.TUNGETVNETHDRSZ)
	return int(size), err
}

// deviceNetNS opens the network namespace that the device behind fd lives in; EPERM without CAP_NET_ADMIN there.
func deviceNetNS(fd int) (int, error) { return unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS) }

// threadNetNS opens the network namespace of the calling thread, by way of a socket: it needs no /proc, but CAP_NET_ADMIN
// there.
func threadNetNS() (int, error) {
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(socket)
	return unix.IoctlRetInt(socket, unix.SIOCGSKNS)
}

// sameDescription says whether two descriptors are duplicates of each other; false too where the kernel does not tell.
func sameDescription(a, b int) bool {
	same, err := unix.FcntlInt(uintptr(a), unix.F_DUPFD_QUERY, b) // since 6.10
	if err == nil {
		return same == 1
	}
	const file = 0 // KCMP_FILE
	pid := uintptr(unix.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, file, uintptr(a), uintptr(b), 0)
	return errno == 0 && order == 0
}
