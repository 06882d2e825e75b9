package overlay

import (
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
	flagPersist    tunFlags = unix.IFF_PERSIST
	flagNAPI       tunFlags = unix.IFF_NAPI | unix.IFF_NAPI_FRAGS
)

// framing are the flags that say how packets look on a descriptor; they must be the same on every queue.
const framing = flagTUN | flagTAP | flagNoPI | flagMultiQueue | flagVnetHeader | flagNAPI

// setIff creates the device called name, or attaches fd to it, and returns the name that the kernel gave it.
// unix.Ifreq is as large as what the kernel copies (kernel.md U35).
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

// setOwner lets only this uid attach, beside CAP_NET_ADMIN.
func setOwner(fd, uid int) error { return unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid) }

// setGroup lets only this gid attach; with an owner both must match.
func setGroup(fd, gid int) error { return unix.IoctlSetInt(fd, unix.TUNSETGROUP, gid) }

// setPersist makes the device outlive its descriptors.
func setPersist(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1) }

// setOffload says which superpackets the program takes; the mask belongs to the device and outlives descriptors, so it is
// set even to 0 (kernel.md C1).
func setOffload(fd, mask int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, mask) }

// headerSize returns how many bytes of virtio header go before each packet on fd, which has flagVnetHeader.
func headerSize(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ) }

// deviceNetNS opens the network namespace that the device behind fd lives in; EPERM without CAP_NET_ADMIN there.
func deviceNetNS(fd int) (int, error) { return unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS) }
