package overlay

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel.md U35: unix.Ifreq is as large as what the kernel copies: a name, then a union whose largest member, struct ifmap,
// holds two longs and eight bytes.
func TestIfreqHasTheKernelsSize(t *testing.T) {
	const want = unix.IFNAMSIZ + 2*unsafe.Sizeof(uintptr(0)) + 8
	if got := unsafe.Sizeof(unix.Ifreq{}); got != want {
		t.Errorf("unix.Ifreq has %d bytes, want %d", got, want)
	}
}
