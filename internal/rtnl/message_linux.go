package rtnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Message is one rtnetlink message without its header: a request, an answer or a notification.
type Message struct {
	Type  uint16
	Flags uint16
	Seq   uint32 // set by Conn
	Body  []byte // family header and attributes

	Keep func(Message) bool // of a dump's request: which answers to return, and not to hold on to; nil: all
}

// Error is what the kernel answered: an errno and, where it gave one, its own words and the dump or message concerned.
type Error struct {
	Errno unix.Errno
	Text  string // extended ack
}

func (e *Error) Error() string {
	if e.Text == "" {
		return e.Errno.Error()
	}
	return fmt.Sprintf("%v (kernel: %s)", e.Errno, e.Text)
}

// Unwrap returns the errno, for errors.Is.
func (e *Error) Unwrap() error { return e.Errno }

// What may go wrong beside the kernel's refusals.
var (
	ErrOverrun     = errors.New("rtnetlink: receive buffer overrun: answers or notifications were lost")
	ErrUnknown     = errors.New("rtnetlink: the answer was lost: the outcome is unknown")
	ErrInterrupted = errors.New("rtnetlink: the dump was interrupted: it may be incomplete")
	ErrMalformed   = errors.New("rtnetlink: malformed message")
)

const headerLen = unix.SizeofNlMsghdr

// appendTo encodes m with its header.
func (m Message) appendTo(b []byte) []byte {
	n := binary.NativeEndian
	b = n.AppendUint32(b, uint32(headerLen+len(m.Body)))
	b = n.AppendUint16(b, m.Type)
	b = n.AppendUint16(b, m.Flags)
	b = n.AppendUint32(b, m.Seq)
	b = n.AppendUint32(b, 0) // port: the kernel fills it in
	b = append(b, m.Body...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// split yields the messages of one datagram; their bodies alias it. It stops with ErrMalformed at the first whose length lies.
func split(b []byte) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		n := binary.NativeEndian
		for len(b) > 0 {
			if len(b) < headerLen {
				yield(Message{}, ErrMalformed)
				return
			}
			size := int(n.Uint32(b))
			if size < headerLen || size > len(b) {
				yield(Message{}, ErrMalformed)
				return
			}
			m := Message{Type: n.Uint16(b[4:]), Flags: n.Uint16(b[6:]), Seq: n.Uint32(b[8:]), Body: b[headerLen:size]}
			if !yield(m, nil) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// decodeError reads the body of an NLMSG_ERROR, or of the NLMSG_DONE that ends a dump; nil where it says success.
func decodeError(m Message) error {
	if len(m.Body) < 4 {
		if m.Type == unix.NLMSG_DONE {
			return nil
		}
		return ErrMalformed
	}
	errno := -int32(binary.NativeEndian.Uint32(m.Body))
	if errno == 0 {
		return nil
	}
	if errno < 0 {
		return ErrMalformed
	}
	return &Error{Errno: unix.Errno(errno), Text: extendedAck(m)}
}

// extendedAck digs the kernel's text out of an error message, past the request's header (and body, unless capped) that it quotes.
func extendedAck(m Message) string {
	if m.Flags&unix.NLM_F_ACK_TLVS == 0 {
		return ""
	}
	rest := m.Body[4:]
	if m.Type == unix.NLMSG_ERROR {
		if len(rest) < headerLen {
			return ""
		}
		skip := headerLen
		if m.Flags&unix.NLM_F_CAPPED == 0 {
			quoted := binary.NativeEndian.Uint32(rest)
			if quoted < headerLen || uint64(quoted) > uint64(len(rest)) {
				return ""
			}
			skip = min(align(int(quoted)), len(rest))
		}
		rest = rest[skip:]
	}
	for kind, value := range attributes(rest) {
		if kind == nl.NLMSGERR_ATTR_MSG {
			text, _, _ := bytes.Cut(value, []byte{0})
			return string(text)
		}
	}
	return ""
}

// attributes yields kind and value of each attribute, nesting and byte-order flags removed, and stops at the first whose length lies.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(binary.NativeEndian.Uint16(b))
			kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(kind, b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// u32 reads a 32-bit attribute; false if it has another size.
func u32(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(b), true
}

// body joins a family header and attributes, in vishvananda/netlink's encoding.
func body(parts ...nl.NetlinkRequestData) []byte {
	size := 0
	for _, p := range parts {
		size += align(p.Len())
	}
	b := make([]byte, 0, size)
	for _, p := range parts {
		b = append(b, p.Serialize()...)
		for len(b)%unix.NLMSG_ALIGNTO != 0 {
			b = append(b, 0)
		}
	}
	return b
}

func attr32(kind int, value uint32) *nl.RtAttr { return nl.NewRtAttr(kind, nl.Uint32Attr(value)) }

// appendAttr appends the head of an attribute whose value, of so many bytes, the caller appends.
func appendAttr(b []byte, kind uint16, size int) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+size))
	return binary.NativeEndian.AppendUint16(b, kind)
}

func append32(b []byte, kind uint16, value uint32) []byte {
	return binary.NativeEndian.AppendUint32(appendAttr(b, kind, 4), value)
}

func appendAddr(b []byte, kind uint16, a netip.Addr) []byte {
	b = appendAttr(b, kind, a.BitLen()/8)
	if a.Is4() {
		v := a.As4()
		return append(b, v[:]...)
	}
	v := a.As16()
	return append(b, v[:]...)
}
