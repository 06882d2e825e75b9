package fib

import (
	"net/netip"

	"example.com/overlay/internal/kernel"
	"github.com/gaissmai/bart"
)

// Config says what a Table follows.
type Config struct {
	Link     int32                 // the interface whose routes are followed
	Protocol uint8                 // rtm_protocol of the routes that we install ourselves
	Tables   []uint32              // nil: main. No more than 1<<16 are followed
	Overlay  func(netip.Addr) bool // is it an overlay host other than ourselves? nil: every address is
	Max      int                   // most routes to be learned; 0: no limit
}

// Table is the routes through one interface as far as they are known. It is for one goroutine.
type Table struct {
	cfg      Config
	tables   map[uint32]uint16 // index in cfg.Tables
	heads    map[key]uint32    // where a prefix's chain begins
	entries  slab
	shapes   shapes
	nextHops map[uint32]*nextHop
	memberOf map[uint32]map[uint32]struct{} // member to the groups it is in
	order    [2][]Step                      // by family
	cover    [2][]*bart.Lite                // what each table answers; nil: there is but one
	owned    [2][]*bart.Lite                // where each has a route of our own that is in use; likewise
	passing  [2][]*bart.Lite                // where the look-up goes on to the next table, because each throws there; likewise
	windows  [2]window
	edit     edit // of one chain at a time

	dirty   map[key]struct{} // of table 0: a prefix in any table
	doubts  map[key]bool     // what may have doubtful or unknown routes, and whether it is to be asked about
	stale   map[uint32]bool  // shapes whose answer changed for all that have them
	missing map[uint32]bool  // ids of nexthop objects that routes have and nobody told of
	untold  map[key]struct{} // prefixes of which no probe tells
	veils   veils
	resync  bool

	learned int
	throws  int
	refused uint64
	counted map[key]struct{} // chains in which strangers are counted
	mixed   map[key]struct{} // chains in which others share a multipath and so decide its place

	unlearned bool // what was refused may be there still
}

// key is a prefix in a table. Its size is most of what a route costs.
type key struct {
	addr  [16]byte
	table uint16
	bits  uint8
	is6   bool
}

func keyOf(p netip.Prefix, table uint16) key {
	return key{addr: p.Addr().As16(), table: table, bits: uint8(p.Bits()), is6: p.Addr().Is6()}
}

func (k key) prefix() netip.Prefix {
	a := netip.AddrFrom16(k.addr)
	if !k.is6 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, int(k.bits))
}

func (k key) family() int { return familyIndex(k.is6) }

func familyIndex(is6 bool) int {
	if is6 {
		return 1
	}
	return 0
}

// New returns an empty Table that looks at the configured tables in their order.
func New(cfg Config) *Table {
	if len(cfg.Tables) == 0 {
		cfg.Tables = []uint32{kernel.TableMain}
	}
	t := &Table{
		cfg:      cfg,
		tables:   make(map[uint32]uint16),
		heads:    make(map[key]uint32),
		nextHops: make(map[uint32]*nextHop),
		memberOf: make(map[uint32]map[uint32]struct{}),
		dirty:    make(map[key]struct{}),
		doubts:   make(map[key]bool),
		stale:    make(map[uint32]bool),
		missing:  make(map[uint32]bool),
		untold:   make(map[key]struct{}),
		counted:  make(map[key]struct{}),
		mixed:    make(map[key]struct{}),
		veils:    veils{make(map[key]veil), make(map[int32]uint8)},
	}
	t.shapes.init()
	t.edit.t = t
	for i, table := range cfg.Tables {
		if _, again := t.tables[table]; again || i >= 1<<16 {
			continue
		}
		t.tables[table] = uint16(i)
		for family := range t.order {
			t.order[family] = append(t.order[family], Step{Table: table, Suppress: -1})
		}
	}
	if len(t.tables) > 1 {
		for family := range t.cover {
			for range cfg.Tables {
				t.cover[family] = append(t.cover[family], new(bart.Lite))
				t.owned[family] = append(t.owned[family], new(bart.Lite))
				t.passing[family] = append(t.passing[family], new(bart.Lite))
			}
		}
	}
	return t
}

// Learned is the number of routes through the interface that are not our own, whether they are in force or not.
func (t *Table) Learned() int { return t.learned }

// Refused counts the routes not learned because there were Max. Each stays unknown until a dump shows it again: once there is
// room, ResyncNeeded says that one is wanted.
func (t *Table) Refused() uint64 { return t.refused }

// ResyncNeeded says, once, that neither announcements nor probes tell what routes there are now: a nexthop object has come to
// our interface, and routes may have come with it untold (kernel.md A13), a probe's answer was no answer (Settle), or there is room
// for routes that were refused. vain: a dump for such an answer was quiet, and nothing was announced since, so that the next would show
// the same.
func (t *Table) ResyncNeeded(vain bool) bool {
	needed := t.resync
	t.resync = false
	if t.unlearned && !t.full() {
		t.unlearned, needed = false, true
	}
	for k := range t.untold {
		needed = needed || !vain && t.matters(k)
	}
	clear(t.untold)
	return needed
}

// Depends says whether another interface's loss of its routes and nexthop objects, or that it goes up or down, which the kernel
// does not announce of routes (kernel.md A7, A8, A14), changes what is known here: the places of our routes among others', a nexthop
// object's legs, or what a multipath of the interface hides.
func (t *Table) Depends(link int32) bool {
	if _, veiled := t.veils.links[link]; veiled || len(t.counted)+len(t.mixed) > 0 {
		return true
	}
	for _, n := range t.nextHops {
		if n.Link == link {
			return true
		}
	}
	return false
}

// SetOverlay tells of changed networks or addresses.
func (t *Table) SetOverlay(overlay func(netip.Addr) bool) {
	t.cfg.Overlay = overlay
	for i := range t.shapes.all {
		if s := &t.shapes.all[i]; s.refs > 0 && t.derive(s) {
			t.stale[uint32(i)] = true
		}
	}
}

// follows says whether a route is of a kind that is looked at, and its key. Routes for some TOS or source only are
// candidates for none of the packets that the claim is about.
func (t *Table) follows(r *kernel.FIBRoute) (key, bool) {
	table, ok := t.tables[r.Table]
	if !ok || r.Cloned || r.TOS != 0 || r.SourceLen != 0 || !r.Prefix.IsValid() {
		return key{}, false
	}
	return keyOf(r.Prefix, table), true
}

// entry is a route in the chain of its prefix, where routes stand in the kernel's order. Without pointers, so that the
// garbage collector need not look at a million of them.
type entry struct {
	metric uint32
	shape  uint32
	next   uint32
	seen   uint8 // number of the dump that showed it last
	state  uint8
	before uint8 // at least so many strangers of the same metric stand between it and the one before
	after  uint8 // likewise behind the last of a metric
}

// Bits of entry.state.
const (
	doubtful   = 1 << iota // it may be gone, or not where it is thought to be
	moreBefore             // there may be more strangers before it than counted
	moreAfter
	twin    // the kernel may hold it twice
	excused // the dump may have left it out
)

// slab holds entries in pieces, so that growing moves none. Index 0 is nobody's.
type slab struct {
	pieces [][]entry
	free   uint32 // chained by next
	used   uint32
}

const slabPiece = 1 << 12

func (s *slab) at(i uint32) *entry { return &s.pieces[i/slabPiece][i%slabPiece] }

func (s *slab) take() uint32 {
	if i := s.free; i != 0 {
		s.free = s.at(i).next
		return i
	}
	s.used++
	if int(s.used/slabPiece) >= len(s.pieces) {
		s.pieces = append(s.pieces, make([]entry, slabPiece))
	}
	return s.used
}

func (s *slab) give(i uint32) {
	*s.at(i) = entry{next: s.free}
	s.free = i
}
