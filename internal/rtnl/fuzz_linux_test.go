package rtnl

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

func addSeeds(f *testing.F, messages ...Message) {
	for _, m := range messages {
		f.Add(m.Type, m.Flags, m.Body)
		for _, cut := range []int{1, 3, 5, 9, 13} { // ends in the middle of something
			if len(m.Body) > cut {
				f.Add(m.Type, m.Flags, m.Body[:len(m.Body)-cut])
			}
		}
		lying := bytes.Clone(m.Body)
		for i := range min(len(lying), 64) {
			lying[i] ^= 0xff
			f.Add(m.Type, m.Flags, bytes.Clone(lying))
			lying[i] ^= 0xff
		}
	}
}

// FuzzSplit: encoding the messages of a datagram again gives the datagram; nothing comes after an error.
func FuzzSplit(f *testing.F) {
	whole := Message{Type: 1, Seq: 7, Body: []byte("odd")}.appendTo(Message{Type: 2, Flags: 3, Body: make([]byte, 8)}.appendTo(nil))
	f.Add(whole)
	f.Add(whole[:len(whole)-1])
	f.Add(whole[:20])
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var again []byte
		bad := false
		for m, err := range split(b) {
			if bad {
				t.Fatal("a message after an error")
			}
			if bad = err != nil; bad {
				continue
			}
			at := len(again)
			again = m.appendTo(again)
			if len(again) <= len(b) {
				copy(again[at+12:at+16], b[at+12:]) // the port, which we leave to the kernel
			}
		}
		if !bad && !hasPadding(b) && !bytes.Equal(again, b) {
			t.Fatalf("read %x, encoded %x", b, again)
		}
	})
}

// hasPadding says whether some message's length is odd: what fills it up may be anything.
func hasPadding(b []byte) bool {
	for m := range split(b) {
		if len(m.Body)%4 != 0 {
			return true
		}
	}
	return false
}

// FuzzDecodeError: an error has an errno, and its text lies within the message.
func FuzzDecodeError(f *testing.F) {
	request := Message{Type: unix.RTM_NEWROUTE, Body: make([]byte, 12)}
	addSeeds(f, says(request, unix.EINVAL, "text"), says(request, 0, ""), says(request, unix.EPERM, ""),
		Message{Type: unix.NLMSG_DONE, Flags: unix.NLM_F_ACK_TLVS, Body: []byte{0xea, 0xff, 0xff, 0xff, 9, 0, 1, 0, 't', 'e', 'x', 't', 0}},
		Message{Type: unix.NLMSG_ERROR, Flags: unix.NLM_F_ACK_TLVS, Body: append([]byte{0xea, 0xff, 0xff, 0xff}, request.appendTo(nil)...)},
		Message{Type: unix.NLMSG_ERROR, Body: []byte{0, 0, 0, 0x80}})
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		err := decodeError(Message{Type: kind, Flags: flags, Body: b})
		refused, ok := err.(*Error)
		if ok && (refused.Errno == 0 || refused.Text != "" && !bytes.Contains(b, []byte(refused.Text))) {
			t.Fatalf("%#v of %x", refused, b)
		}
		if err == nil && len(b) >= 4 && binary.NativeEndian.Uint32(b) != 0 {
			t.Fatalf("success of %x", b)
		}
		_ = err == nil || err.Error() != ""
	})
}

func FuzzDecodeLink(f *testing.F) {
	named := Message{Type: unix.RTM_NEWLINK, Body: append(linkHeader(7, unix.IFF_UP, 0), nameAttr("tun0")...)}
	named.Body = append(named.Body, body(attr32(unix.IFLA_MTU, 1300), attr32(unix.IFLA_TXQLEN, 500))...)
	addSeeds(f, named, SetLinkIPv4(7, IPv4SendRedirects, 1), SetLinkAddrGenMode(7, 1), SetLinkUp(7, true), SetLinkMTU(7, -1))
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		l, err := DecodeLink(Message{Type: kind, Flags: flags, Body: b})
		if err == nil && (len(b) < unix.SizeofIfInfomsg || len(l.Name) > len(b)) {
			t.Fatalf("%+v of %x", l, b)
		}
	})
}

// FuzzDecodeAddr: what can be read can be put back, and is read again as the same; so is what is made of its fields.
func FuzzDecodeAddr(f *testing.F) {
	for _, text := range []string{"10.0.0.1/24", "fd00::1/64", "0.0.0.0/0", "::ffff:10.0.0.1/128"} {
		p := netip.MustParsePrefix(text)
		addSeeds(f, AddAddr(7, kernel.Addr{Prefix: p, Protocol: 111, NoPrefixRoute: true}),
			DelAddr(7, kernel.Addr{Prefix: p, Peer: p.Addr().Next()}), GetAddrs(7))
	}
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		a, index, err := DecodeAddr(Message{Type: kind, Flags: flags, Body: b})
		if err != nil {
			return
		}
		if !a.Prefix.IsValid() || a.Peer.IsValid() && a.Peer.Is4() != a.Prefix.Addr().Is4() {
			t.Fatalf("%+v of %x", a, b)
		}
		back, at, err := DecodeAddr(AddAddr(index, a))
		if err != nil || at != index || back != a {
			t.Fatalf("put back %+v, read %+v, %v", a, back, err)
		}
		a.Message, a.Secondary = "", false
		if back, _, err = DecodeAddr(AddAddr(index, a)); err != nil || back.Prefix != a.Prefix || back.Peer != a.Peer || back.NoPrefixRoute != a.NoPrefixRoute {
			t.Fatalf("made of %+v, read %+v, %v", a, back, err)
		}
		DelAddr(index, a)
	})
}

// FuzzDecodeRoute: likewise. What needs no message to be put back is the same without.
func FuzzDecodeRoute(f *testing.F) {
	for _, text := range []string{"10.0.0.0/24", "fd00::/64", "0.0.0.0/0", "::/0", "10.0.0.1/32"} {
		p := netip.MustParsePrefix(text)
		r := kernel.Route{RouteKey: kernel.RouteKey{Prefix: p, Table: 254, Metric: 5}, Protocol: 111, Source: p.Addr(), MTU: 1300, MSS: 1240, Link: 7}
		addSeeds(f, AddRoute(r), DelRoute(r), MatchRoute(p.Addr()), GetRoutes(unix.AF_INET, 7))
		m := AddRoute(r)
		m.Body = append(m.Body, body(attr32(unix.RTA_GATEWAY, 0x0100000a), attr32(rtaNHID, 9))...)
		addSeeds(f, m)
	}
	f.Fuzz(func(t *testing.T, kind, flags uint16, b []byte) {
		r, unicast, err := DecodeRoute(Message{Type: kind, Flags: flags, Body: b})
		if err != nil {
			return
		}
		if !r.Prefix.IsValid() || r.Plain && r.TOS != 0 {
			t.Fatalf("%+v of %x", r, b)
		}
		back, again, err := DecodeRoute(AddRoute(r))
		r.Message, back.Message = "", ""
		if err != nil || back != r || r.Message == "" && again != unicast && unicast {
			t.Fatalf("put back %+v, read %+v, %v", r, back, err)
		}
		DelRouteExactly(r)
	})
}
