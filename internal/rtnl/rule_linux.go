package rtnl

import (
	"encoding/binary"
	"fmt"

	"example.com/overlay/internal/kernel"
	"golang.org/x/sys/unix"
)

const (
	sizeofRuleHdr   = 12   // struct fib_rule_hdr
	ruleLookup      = 1    // FR_ACT_TO_TBL
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
	flags := binary.NativeEndian.Uint32(h[8:])
	r.Selective = h[1] != 0 || h[2] != 0 || h[3] != 0 || flags&ruleInvert != 0
	for b := h[sizeofRuleHdr:]; ; {
		kind, value, rest, ok := nextAttribute(b)
		if !ok {
			return r, nil
		}
		word, is32 := u32(value)
		switch kind {
		case unix.FRA_TABLE, unix.FRA_PRIORITY, unix.FRA_SUPPRESS_PREFIXLEN:
			if !is32 {
				return r, fmt.Errorf("rule: %w", ErrMalformed)
			}
		}
		switch kind {
		case unix.FRA_TABLE:
			r.Table = word
		case unix.FRA_PRIORITY:
			r.Priority = word
		case unix.FRA_SUPPRESS_PREFIXLEN:
			if word != noSuppression {
				r.Suppress = int16(min(word, longestSuppress))
			}
		case unix.FRA_SRC, unix.FRA_DST, unix.FRA_IIFNAME, unix.FRA_OIFNAME, unix.FRA_FWMARK, unix.FRA_FWMASK, unix.FRA_TUN_ID,
			unix.FRA_L3MDEV, unix.FRA_UID_RANGE, unix.FRA_IP_PROTO, unix.FRA_SPORT_RANGE, unix.FRA_DPORT_RANGE, fraDSCP:
			r.Selective = true
		}
		b = rest
	}
}
