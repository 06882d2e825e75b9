package rtnl

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

const (
	sizeofRuleHdr   = 12   // struct fib_rule_hdr
	ruleLookup      = 1    // FR_ACT_TO_TBL
	ruleGoto        = 2    // FR_ACT_GOTO
	ruleInvert      = 0x2  // FIB_RULE_INVERT
	fraDSCP         = 0x19 // since 6.12
	noSuppression   = 1<<32 - 1
	longestSuppress = 128
)

// GetRules asks for one family's routing policy rules.
func GetRules(family uint8) Message {
	h := make([]byte, sizeofRuleHdr)
	h[0] = family
	return Message{Type: unix.RTM_GETRULE, Body: h}
}

// DecodeRule reads an RTM_NEWRULE or RTM_DELRULE.
func DecodeRule(m Message) (kernel.Rule, error) {
	r := kernel.Rule{Suppress: -1}
	if len(m.Body) < sizeofRuleHdr || m.Body[0] != unix.AF_INET && m.Body[0] != unix.AF_INET6 {
		return r, fmt.Errorf("rule: %w", ErrMalformed)
	}
	h := m.Body
	r.IPv6, r.Table, r.Lookup = h[0] == unix.AF_INET6, uint32(h[4]), h[7] == ruleLookup
	some := selectors{other: h[2] != 0 || h[3] != 0, mask: math.MaxUint32}
	for b := h[sizeofRuleHdr:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			break
		}
		whole := true
		if kind == unix.FRA_DST {
			whole = decodeRuleTo(&r, h, value)
		} else {
			whole = decodeRuleAttribute(&r, &some, kind, value)
		}
		if !whole {
			return r, fmt.Errorf("rule: %w", ErrMalformed)
		}
		b = rest
	}
	if h[7] != ruleGoto {
		r.Goto = 0
	}
	inverted := binary.NativeEndian.Uint32(h[8:])&ruleInvert != 0
	r.Beside = some.beside() != inverted
	if h[1] != 0 { // whether it is for a packet depends on the destination, unless something else rules that out
		r.Beside = r.Beside && !inverted
	}
	if inverted {
		r.To = netip.Prefix{}
	}
	r.Selective = r.Beside || h[1] != 0
	return r, nil
}

func decodeRuleTo(r *kernel.Rule, h, value []byte) bool {
	addr, ok := addrOf(h[0], value)
	r.To = netip.PrefixFrom(addr, int(h[1])).Masked()
	return ok && r.To.IsValid()
}

// selectors are what a rule asks of a packet beside its destination.
type selectors struct {
	mark, mask uint32
	other      bool // what a packet of TOS 0 without source that the host sends through whichever interface has not
}

// beside says whether such a packet without mark is none of theirs.
func (s *selectors) beside() bool { return s.other || s.mark&s.mask != 0 }

// decodeRuleAttribute returns whether it could be read.
func decodeRuleAttribute(r *kernel.Rule, some *selectors, kind uint16, value []byte) bool {
	word, is32 := u32(value)
	switch kind {
	case unix.FRA_TABLE:
		r.Table = word
	case unix.FRA_PRIORITY:
		r.Priority = word
	case unix.FRA_GOTO:
		r.Goto = word
	case unix.FRA_FWMARK:
		some.mark = word
	case unix.FRA_FWMASK:
		some.mask = word
	case unix.FRA_SUPPRESS_PREFIXLEN:
		if word != noSuppression {
			r.Suppress = int16(min(word, longestSuppress))
		}
	case unix.FRA_IIFNAME:
		some.other = some.other || !bytes.Equal(value, []byte("lo\x00"))
		return true
	case fraDSCP:
		some.other = some.other || !bytes.Equal(value, []byte{0})
		return true
	case unix.FRA_SRC, unix.FRA_OIFNAME, unix.FRA_TUN_ID, unix.FRA_L3MDEV, unix.FRA_UID_RANGE, unix.FRA_IP_PROTO,
		unix.FRA_SPORT_RANGE, unix.FRA_DPORT_RANGE:
		some.other = true
		return true
	default:
		return true
	}
	return is32
}
