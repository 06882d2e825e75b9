package overlay_test

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the Examples are handed may be anything: that is an error, and what is not there is not taken.

func TestInheritedIsHostile(t *testing.T) {
	mine := strconv.Itoa(os.Getpid())
	for _, test := range []struct{ pid, fds, names, want string }{
		{mine, "0", "device", "map[]"},
		{mine, "-1", "device", "map[]"},
		{mine, "x", "device", "map[]"},
		{mine, "99999999999999999999", "", "map[]"},
		{mine, "1000000", "device:socket", "map[device:[1003] socket:[1004]]"},
		{"1", "1", "device", "map[]"},
		{"", "1", "device", "map[]"},
	} {
		t.Setenv("LISTEN_PID", test.pid)
		t.Setenv("LISTEN_FDS", test.fds)
		t.Setenv("LISTEN_FDNAMES", test.names)
		if got := fmt.Sprint(inherited()); got != strings.NewReplacer("1003", "3", "1004", "4").Replace(test.want) {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

func TestOpenSocketOfAnotherKind(t *testing.T) {
	for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
		fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if conn, err := openSocket([]int{fd}); err == nil {
			conn.Close()
			t.Errorf("a Unix socket of type %d is taken for the UDP socket", kind)
		}
	}
}

func TestTakeOverOfNothing(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		conn, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		defer conn.Close()
		ends[i] = conn.(*net.UnixConn)
	}
	if _, err := ends[0].Write([]byte("device")); err != nil {
		t.Fatal(err)
	}
	if _, err := takeOver(config, ends[1]); err == nil || err.Error() != "0 control messages, want the one with the device" {
		t.Errorf("without descriptors: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, _, err := ends[0].WriteMsgUnix([]byte("device"), unix.UnixRights(int(null.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := takeOver(config, ends[1]); err == nil || !strings.Contains(err.Error(), "is not") {
		t.Errorf("with a descriptor of another file: %v", err)
	}
}
