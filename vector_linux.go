package overlay

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector reads and writes memory, also in pieces, without an allocation, which x/sys/unix makes for more than eight parts. It keeps no
// memory of the caller's between calls.
type vector struct {
	iov []unix.Iovec
	old bool // the kernel does not know RWF_NOWAIT here

	instead func(parts [][]byte) (n int, answered bool, err error) // of asking the kernel to write; tests, else nil
}

// read reads one packet, without blocking, even if somebody with a duplicate of the descriptor has made it block: O_NONBLOCK
// is common to both, and Close could not wake a read that waits in the kernel.
func (v *vector) read(fd int, b []byte) (int, error) {
	parts := [...][]byte{b}
	return v.do(unix.SYS_PREADV2, unix.SYS_READV, fd, parts[:])
}

// write writes parts as one packet, likewise.
func (v *vector) write(fd int, parts [][]byte) (int, error) {
	if v.instead != nil {
		if n, answered, err := v.instead(parts); answered {
			return n, err
		}
	}
	return v.do(unix.SYS_PWRITEV2, unix.SYS_WRITEV, fd, parts)
}

func (v *vector) do(modern, plain uintptr, fd int, parts [][]byte) (n int, err error) {
	v.iov = v.iov[:0]
	for _, part := range parts {
		if len(part) > 0 {
			v.iov = append(v.iov, unix.Iovec{Base: &part[0]})
			v.iov[len(v.iov)-1].SetLen(len(part))
		}
	}
	base := unsafe.Pointer(unsafe.SliceData(v.iov))
	if !v.old {
		// Raw, without a word to the scheduler, because with RWF_NOWAIT it waits for nothing: small packets feel that word. Without
		// the flag it might wait, and would hold up the garbage collector.
		const noPosition = ^uintptr(0)
		n, err = result(unix.RawSyscall6(modern, uintptr(fd), uintptr(base), uintptr(len(v.iov)), noPosition, noPosition, unix.RWF_NOWAIT))
		v.old = err == unix.EOPNOTSUPP || err == unix.ENOSYS
	}
	if v.old {
		n, err = result(unix.Syscall(plain, uintptr(fd), uintptr(base), uintptr(len(v.iov))))
	}
	clear(v.iov)
	return n, err
}

func result(n, _ uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
