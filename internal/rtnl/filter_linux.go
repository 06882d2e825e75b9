package rtnl

import (
	"encoding/binary"
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// A filter runs in the kernel, on each announcement, before it costs anything of a listener's buffer. It loads a message's bytes
// in network order, where most of rtnetlink is in the machine's own.

// Where a filter finds things in a message.
const (
	offsetType      = 4
	offsetFlags     = 6
	offsetPort      = 12
	offsetRouteType = headerLen + 7
	offsetRouteAttr = headerLen + unix.SizeofRtMsg
	// The extension that finds an attribute: A says from where, X which; A is then where it is, 0 if there is none.
	findAttribute = math.MaxUint32 - 0x1000 + 1 + 12 // SKF_AD_OFF + SKF_AD_NLATTR
)

// Where a test leads; assemble makes distances of them.
const (
	onward = 0
	toKeep = 0xfe
	toDrop = 0xff
)

// Ignore keeps the listener from being told of what requests from a port (Conn.Port) bring about: else the installation of many
// routes would overrun the listener's own buffer (kernel.md V6).
func (l *Listener) Ignore(port uint32) error { return l.attach(ignore(port)) }

// OnlyConcerning is Ignore that also keeps away the routes of which MayConcern says no: those plainly through other interfaces
// (kernel.md V26). Port 0 is the kernel's own: with it nothing is ignored.
func (l *Listener) OnlyConcerning(index int, port uint32) error {
	return l.attach(append(ignore(port), onlyConcerning(uint32(index))...))
}

// HearAll takes the filter away.
func (l *Listener) HearAll() error {
	var err error
	closed := l.raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	})
	if err == unix.ENOENT { // there is none
		err = nil
	}
	return errors.Join(closed, err)
}

func (l *Listener) attach(program []unix.SockFilter) error {
	program = assemble(program)
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	var err error
	closed := l.raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &filter)
	})
	return errors.Join(closed, err)
}

func ignore(port uint32) []unix.SockFilter {
	if port == 0 {
		return nil
	}
	return []unix.SockFilter{load(unix.BPF_W, offsetPort), ifEqual(own32(port), toDrop, onward)}
}

func onlyConcerning(index uint32) []unix.SockFilter {
	program := []unix.SockFilter{
		load(unix.BPF_H, offsetType), ifEqual(own16(unix.RTM_NEWROUTE), onward, toKeep),
		load(unix.BPF_H, offsetFlags), ifAnyOf(own16(unix.NLM_F_REPLACE), toKeep, onward),
		ifAnyOf(own16(unix.NLM_F_EXCL), onward, toKeep),
		load(unix.BPF_B, offsetRouteType), ifEqual(unix.RTN_THROW, toKeep, onward),
	}
	for _, kind := range []uint32{unix.RTA_MULTIPATH, rtaNHID} {
		program = append(append(program, find(kind)...), ifEqual(0, onward, toKeep))
	}
	return append(append(program, find(unix.RTA_OIF)...),
		ifEqual(0, toDrop, onward),
		unix.SockFilter{Code: unix.BPF_MISC | unix.BPF_TAX},
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: unix.SizeofRtAttr},
		ifEqual(own32(index), toKeep, toDrop))
}

func load(size uint16, offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: offset}
}

func ifEqual(value uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: yes, Jf: no}
}

func ifAnyOf(bits uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: bits, Jt: yes, Jf: no}
}

func find(kind uint32) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: unix.BPF_LDX | unix.BPF_IMM, K: kind},
		{Code: unix.BPF_LD | unix.BPF_IMM, K: offsetRouteAttr},
		load(unix.BPF_W, findAttribute),
	}
}

// own32 is how a filter sees a value that the kernel wrote in the machine's order; own16 likewise.
func own32(v uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, v))
}

func own16(v uint16) uint32 {
	return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, v)))
}

// assemble adds the two ends of a program, to keep and to drop, and makes distances of where its tests lead.
func assemble(program []unix.SockFilter) []unix.SockFilter {
	keep := len(program)
	distance := func(from int, to uint8) uint8 {
		switch to {
		case toKeep:
			return uint8(keep - from - 1)
		case toDrop:
			return uint8(keep + 1 - from - 1)
		}
		return to
	}
	for i := range program {
		if s := &program[i]; s.Code&0x7 == unix.BPF_JMP {
			s.Jt, s.Jf = distance(i, s.Jt), distance(i, s.Jf)
		}
	}
	end := func(verdict uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: verdict}
	}
	return append(program, end(math.MaxUint32), end(0))
}
