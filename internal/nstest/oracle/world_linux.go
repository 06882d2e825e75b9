package oracle

import (
	"errors"
	"net/netip"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// World is a namespace with two interfaces: the one whose routes are followed, with the addresses Own4 and Own6, and another,
// with Other4 and Other6.
type World struct {
	Conn        *rtnl.Conn
	Ours, Other int32 // their numbers
	Protocol    uint8 // of the routes that the follower's own side installs
	Tables      []uint32

	nextHops map[uint32]kernel.NextHop // of the last Ask
}

// Addresses of a World, with their networks. All else in ours are overlay hosts.
var (
	Own4, Own6     = netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("fd00::1/64")
	Other4, Other6 = netip.MustParsePrefix("10.0.1.1/24"), netip.MustParsePrefix("fd01::1/64")
)

// Addresses are those of a World's two interfaces, by the names that they mostly have.
var Addresses = map[string][]netip.Prefix{"ours": {Own4, Own6}, "other": {Other4, Other6}}

// SomeTable is a table beside main in which routes are put; a third one is not followed.
const (
	SomeTable = 100
	lostTable = 77
)

// Overlay says whether an address is an overlay host's other than our own.
func Overlay(a netip.Addr) bool {
	return (Own4.Contains(a) || Own6.Contains(a)) && a != Own4.Addr() && a != Own6.Addr()
}

// Few are prefixes of a family, so few that many routes come to be alike but for what makes one stand before the other.
func Few(is6 bool) []netip.Prefix {
	few := []string{"0.0.0.0/0", "192.0.2.0/24", "192.0.2.0/30"}
	if is6 {
		few = []string{"::/0", "2001:db8::/48", "2001:db8::/64"}
	}
	var prefixes []netip.Prefix
	for _, p := range few {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	return prefixes
}

// All are prefixes of both families, so nested that the longest match matters.
var All = func() []netip.Prefix {
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for i := range 6 {
		a4, a6 := netip.AddrFrom4([4]byte{192, 0, 2, byte(i * 40)}), netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 7: byte(i)})
		for _, bits := range []int{24 + i%3, 30, 32} {
			p, _ := a4.Prefix(bits)
			all = append(all, p)
		}
		for _, bits := range []int{48 + i%3, 64, 128} {
			p, _ := a6.Prefix(bits)
			all = append(all, p)
		}
	}
	return all
}()

func (w *World) dump(request rtnl.Message) ([]rtnl.Message, error) {
	messages, err := w.Conn.Dump(request)
	if errors.Is(err, unix.ENOENT) { // a table without routes
		err = nil
	}
	return messages, err
}

// readNextHops notes all nexthop objects.
func (w *World) readNextHops() error {
	w.nextHops = make(map[uint32]kernel.NextHop)
	messages, err := w.dump(rtnl.GetNextHops())
	for _, m := range messages {
		n, err := rtnl.DecodeNextHop(m)
		if err != nil {
			return err
		}
		w.nextHops[n.ID] = n
	}
	return err
}
