package kernel

import "net/netip"

// Types of routes (rtm_type) that a follower of the table must tell apart.
const (
	TypeUnicast   = 1
	TypeBroadcast = 3
	TypeAnycast   = 4
	TypeMulticast = 5
	TypeThrow     = 9
)

// ProtoRA is the rtm_protocol of what router advertisements bring.
const ProtoRA = 9

// FIBRoute is one entry of the kernel's forwarding tables as a message tells it: of any type, through any interfaces.
type FIBRoute struct {
	Prefix    netip.Prefix // host bits as the kernel sent them: none
	Table     uint32
	Metric    uint32 // in force: the kernel tells IPv6's default as 1024
	SourceLen uint8  // IPv6: chosen for some sources only
	TOS       uint8
	Pref      uint8 // RTA_PREF as the kernel encodes it: 0 medium, 1 high, 3 low
	Type      uint8 // TypeUnicast, …
	Protocol  uint8
	Cloned    bool   // a cache entry, no route
	Expires   int32  // IPv6: in how many hundredths of a second it goes out of use; 0: never; negative: it has
	NextHop   uint32 // id of the nexthop object it leads through; 0: none, the legs are its own
	Legs      []Leg
	Detail    []byte // all else by which the kernel tells routes of one key apart: equal routes have equal bytes
}

// Leg is one way on of a route.
type Leg struct {
	Gateway netip.Addr // unmapped, without zone; zero: on-link
	Link    int32      // index of the interface; 0: none
	Weight  uint32     // as the kernel counts, from 1
	Dead    bool       // not used now: its interface is down, or without carrier where that is to be obeyed
}

// Change says what became of a route by an announcement. The kernel tells it by the message's type and flags, and with it
// the place among equal keys.
type Change uint8

// The changes.
const (
	Created   Change = iota + 1 // the first of its key: there is no other of the key
	Prepended                   // IPv4: before the others of its key. IPv6: behind them
	Appended                    // behind the others of its key, or joined to a multipath
	Replaced                    // in the place of another of its key, whoever's; or the nexthop object behind it changed
	Refreshed                   // it is there; its flags may have changed
	Deleted
)

// NextHop is a nexthop object, or a group of such.
type NextHop struct {
	ID        uint32
	Leg                    // of a single one
	Blackhole bool         // drops
	Group     []NextHopLeg // not empty: a group, which has no leg of its own
	Foreign   bool         // for a forwarding database: no route leads through it
}

// NextHopLeg is a member of a group.
type NextHopLeg struct{ ID, Weight uint32 }

// Rule is a routing policy rule, in so far as it tells in which order tables are looked at.
type Rule struct {
	IPv6      bool
	Priority  uint32
	Table     uint32
	Lookup    bool         // it looks in Table; else, without Goto, it leads nowhere that is followed
	Goto      uint32       // it goes on with the first rule of this priority; 0: it does not
	Selective bool         // only for some destinations, or Beside
	Beside    bool         // not for what the host sends itself of TOS 0, no mark, an unspecified source and no interface
	To        netip.Prefix // the destinations that it is for; not valid: all, or those that are not in a prefix
	Suppress  int16        // matches with prefixes of this length or shorter do not count; -1: all count
}
