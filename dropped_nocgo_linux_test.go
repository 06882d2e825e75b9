//go:build !cgo

package overlay

import (
	"testing"

	"example.com/overlay/internal/nstest"
	"golang.org/x/sys/unix"
)

// A user who has CAP_NET_ADMIN alone, and gives that up too. In a program with cgo Go cannot do that for all threads.
func TestDroppedCapability(t *testing.T) {
	l := newLab(t, nstest.SecondUID, nstest.Mknod)
	testDropped(l, nstest.HelperOptions{UID: 65534, Tun: nstest.TunPublic, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}})
}
