package overlay

import (
	"io"
	"iter"
	"net/netip"
	"os"

	"github.com/sirupsen/logrus"
)

// Device is a TUN device's life and routes; packets go through its Queues. All methods may run concurrently: Activate and
// Reload take turns, Close ends them. Only this package implements Device and Queue, so that they can grow: wrap by embedding.
type Device interface {
	// Activate sets MTU, hardening, addresses, link up and routes, then compares with the kernel; on error the link is as it was.
	// What already holds is not written again. Errors: *OpError, which may be ErrIPv6Disabled, ErrGone, os.ErrPermission,
	// ErrPartial; os.ErrClosed. The device stays usable after any of them but the last and ErrGone.
	Activate() error
	// Reload puts all of cfg in force or leaves the old Config so; ErrPartial: neither, a next Reload repairs. Before Activate it
	// only replaces it. Errors: *ConfigError, ErrRestart naming the fixed fields that differ, and those of Activate.
	Reload(cfg Config) error
	// Close wakes every call and waits for it. It undoes nothing: a device that outlives it (Persist, a File elsewhere) stays
	// configured. A second Close does nothing and returns nil.
	Close() error
	// Queues returns the same queues each time, Config.Queues of them; they may be read before Activate.
	Queues() []Queue
	// NextHop returns the overlay host for a packet: its destination if on-link, else a gateway among those alive (nil: all), by flow.
	// False: no route, none alive, not IP. Lock-free, 0 allocations; a method value as alive costs one: hoist it.
	NextHop(packet []byte, alive func(netip.Addr) bool) (netip.Addr, bool)
	// RoutesFor returns the gateways to dst; empty and true if on-link, false if no route leads here. Lock-free, 0 allocations.
	RoutesFor(dst netip.Addr) (Gateways, bool)
	State() State         // what the device believes now; printed, it is the dump
	Stats() Stats         // counters since New
	Events() <-chan Event // the one channel; 64 wait, then the oldest goes (EventsMissed); Close closes it
	sealed()
}

// Queue is one kernel queue; flows of a queue that nobody reads stall. Methods may run concurrently, reads take turns.
type Queue interface {
	// ReadBatch waits for a packet, then drains what is ready. The packets are the caller's, to change too, until the next
	// read of this queue; Data is capped, append never touches a neighbour. Every error is final: os.ErrClosed, ErrGone.
	ReadBatch() ([]Packet, error)
	// WriteBatch offers every packet in order, merging what it may, and neither changes nor keeps them. It returns how many were
	// taken (not a prefix: never resend packets[n:]) and why not the first of the others: ErrDown passes, os.ErrClosed and ErrGone
	// are final, all else is that packet's fault. A packet that the filter drops (Config.NoFilter) counts as taken.
	WriteBatch(packets []Packet) (int, error)
	// Read and Write move one packet; one too long for Read's buffer is lost with io.ErrShortBuffer, and 65,535 bytes are always
	// enough. Close detaches only this queue: its flows move to the others, its backlog is lost.
	io.ReadWriteCloser
	// File returns a close-on-exec duplicate of the descriptor, for a successor or an ioctl. The caller closes it: one forgotten
	// File keeps the device alive. Without a kernel device: errors.ErrUnsupported.
	File() (*os.File, error)
	sealed()
}

// Packet is one IP packet, or a superpacket: one header before the payload of many packets of a TCP or UDP flow.
// A superpacket's own checksums are unfinished: split it, or hand it to WriteBatch, but never send its Data.
type Packet struct {
	Data        []byte
	SegmentSize int // payload bytes per packet of a superpacket; 0: Data is one finished packet
}

// Config is plain data, copied by whoever takes it; zero is a working device without address.
type Config struct {
	Networks      []netip.Prefix     // own addresses with the length of their networks
	MTU           int                // bytes; 0: 1300. The device's MTU is the largest of this and the Routes'
	TxQueueLen    int                // packets that wait for a reader, per queue; 0: 500
	Routes        []Route            // what else is reached through the device
	SystemRoutes  *SystemRoutes      // follow the kernel's routes through the device; nil: no
	Protocol      int                // rtm_protocol and ifa_proto of what is ours; 0: DefaultProtocol
	NoOffload     Offload            // not to be used; 0: use what the kernel grants
	LinkLocal     bool               // let the kernel make an fe80:: address; needs an MTU of 1280
	NoHeal        bool               // do not put back what others remove
	NoFilter      bool               // let ICMP redirects and router advertisements from the overlay through WriteBatch and Write
	Logger        logrus.FieldLogger // nil: silent; whatever matters is in Events, Stats and State too. Its hooks must not call the Device
	TakeAddresses bool               // also remove addresses that are neither ours nor in Networks. A new device has none unless others add them

	// The rest, and Protocol, is fixed for a Device's life: Reload refuses a change with ErrRestart.

	Name     string // up to 15 bytes; "": the kernel's choice, or with Disabled "disabled"; may hold one %d
	Queues   int    // 0: 1 (Adopt: as many as descriptors); at most 256
	Owner    int    // uid that may attach; 0: the effective uid unless Group is set. With Group, both must match
	Group    int    // gid that may attach; 0: none
	Mode     Mode   // 0: Create
	NetNS    string // path of the network namespace; "": the caller's. Entering another needs CAP_SYS_ADMIN
	Persist  bool   // a new device outlives its descriptors
	Disabled bool   // no kernel part at all: RoutesFor answers, reads wait for Close, writes are counted and dropped
}

// SystemRoutes says which of the kernel's routes through the device the overlay follows: by gateways that lie in Networks, and
// without a gateway, on-link, whatever prefix they are for.
type SystemRoutes struct {
	Tables     []int // routing tables; nil: main
	ReadBuffer int   // bytes of socket receive buffer; 0: 4 MiB asked (rmem_max may grant less: State tells)
	Max        int   // routes followed; 0: 4,000,000
}

// DefaultProtocol is the rtm_protocol and ifa_proto of what this package installs, where Config.Protocol is 0.
const DefaultProtocol = 111

// Mode says which device New opens.
type Mode uint8

// The modes of New. A device that is there keeps its owner, its group and its persistence: Attach refuses to be asked for any of
// them, Adopt compares them, and with AttachOrCreate they are those of the device that it creates.
const (
	Create         Mode = iota // a new device; ErrBusy if the name is taken
	Attach                     // a prepared, persistent device
	AttachOrCreate             // that, or a new one where there is none
)

// Offload is a set of segmentation and receive offloads.
type Offload uint8

// The offloads, per protocol.
const (
	OffloadTCP Offload = 1 << iota
	OffloadUDP
)

// State is a snapshot of what a device believes; it stays valid after Close.
type State struct {
	Name     string
	Index    int // of the interface; 0: no kernel device
	MTU      int // bytes, the kernel's now
	Up       bool
	Networks []netip.Prefix
	Offload  Offload // granted by the kernel, and taken by it now
	Learned  int     // routes followed now

	table  *snapshot
	report report
}

// Routes iterates the routes in force: networks, configured and learned, by prefix.
func (s State) Routes() iter.Seq2[netip.Prefix, Gateways] { return s.table.all() }

// Stats holds nothing but uint64 counters. Read is kernel to program, what `ip -s link` calls TX; packets count after splitting,
// bytes as they are handed over, and Super counts superpackets, those that WriteBatch makes too.
type Stats struct {
	ReadPackets, ReadBytes, ReadSuper, ReadInvalid, ReadDropped                  uint64 // ReadDropped: for want of a reader, of room in its buffer, or with a queue that was closed
	WritePackets, WriteBytes, WriteSuper, WriteRefused, WriteFiltered, WriteDown uint64
	Overruns, Resyncs, Restores, RestoreFails, OffloadFails, EventsMissed        uint64 // OffloadFails: superpackets that the kernel refused and got packet by packet
}

// Event is a hint that something changed; State has the truth.
type Event struct {
	Kind EventKind
	N    int   // routes or objects concerned
	Err  error // cause, if any
}

// EventKind says what happened.
type EventKind uint8

// The kinds of Event.
const (
	EventUp       EventKind = iota + 1 // the link is up
	EventDown                          // the link is down: writes fail with ErrDown, reads wait
	EventChanged                       // name or MTU changed
	EventGone                          // the device was deleted or moved to another namespace
	EventResynced                      // the kernel's view was read anew, because hints may be lost
	EventRestored                      // N objects that others removed are back
	EventShadowed                      // another interface answers for N of our prefixes
	EventDegraded                      // an optional ability is lost
)
