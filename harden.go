package overlay

import "example.com/overlay/internal/kernel"

// setting is a per-device setting by the path of its sysctl: family/name.
type setting string

// The settings of law 11. Those of IPv4 and the address generation mode can be set by netlink, the others only through procfs.
const (
	settingIPv4Redirects   setting = "ipv4/accept_redirects"
	settingIPv4Sends       setting = "ipv4/send_redirects"
	settingIPv4SourceRoute setting = "ipv4/accept_source_route"
	settingIPv4Promote     setting = "ipv4/promote_secondaries"
	settingIPv6AddrGen     setting = "ipv6/addr_gen_mode"
	settingIPv6RA          setting = "ipv6/accept_ra"
	settingIPv6Autoconf    setting = "ipv6/autoconf"
	settingIPv6Redirects   setting = "ipv6/accept_redirects"
	settingIPv6SourceRoute setting = "ipv6/accept_source_route"
)

// hardened says what each setting shall be. of finds it in a link.
var hardened = []struct {
	name   setting
	wanted int
	of     func(*kernel.Link) *int
}{
	{settingIPv4Redirects, 0, ofIPv4(func(s *kernel.IPv4) *int { return &s.AcceptRedirects })},
	{settingIPv4Sends, 0, ofIPv4(func(s *kernel.IPv4) *int { return &s.SendRedirects })},
	{settingIPv4SourceRoute, 0, ofIPv4(func(s *kernel.IPv4) *int { return &s.AcceptSourceRoute })},
	{settingIPv4Promote, 1, ofIPv4(func(s *kernel.IPv4) *int { return &s.PromoteSecondaries })},
	{settingIPv6AddrGen, kernel.AddrGenNone, ofIPv6(func(s *kernel.IPv6) *int { return &s.AddrGenMode })},
	{settingIPv6RA, 0, ofIPv6(func(s *kernel.IPv6) *int { return &s.AcceptRA })},
	{settingIPv6Autoconf, 0, ofIPv6(func(s *kernel.IPv6) *int { return &s.Autoconf })},
	{settingIPv6Redirects, 0, ofIPv6(func(s *kernel.IPv6) *int { return &s.AcceptRedirects })},
	{settingIPv6SourceRoute, 0, ofIPv6(func(s *kernel.IPv6) *int { return &s.AcceptSourceRoute })},
}

// ofIPv4 returns nil for a link that has no IPv4 settings; ofIPv6 likewise.
func ofIPv4(field func(*kernel.IPv4) *int) func(*kernel.Link) *int {
	return func(l *kernel.Link) *int {
		if l.IPv4 == nil {
			return nil
		}
		return field(l.IPv4)
	}
}

func ofIPv6(field func(*kernel.IPv6) *int) func(*kernel.Link) *int {
	return func(l *kernel.Link) *int {
		if l.IPv6 == nil {
			return nil
		}
		return field(l.IPv6)
	}
}

// isIPv6 says whether the setting is one of those that come and go with an MTU of 1280.
func (s setting) isIPv6() bool { return s[:4] == "ipv6" }

// planHardening makes the device deaf to redirects, router advertisements and source routes, and lets an IPv4 primary
// address go without its secondaries (kernel.md V7, V8, V9). All of it is optional but the last, where a primary is about to go.
func planHardening(link *kernel.Link, want *desired, promotes bool) []step {
	var steps []step
	for _, h := range hardened {
		is := h.of(link)
		// Below 1280 bytes IPv6 goes, but last of all, after the link is up: no address may come of it until then.
		goes := h.name.isIPv6() && want.mtu < minIPv6MTU && h.name != settingIPv6AddrGen
		if is == nil || goes {
			continue
		}
		s := step{kind: stepSetting, setting: h.name, to: h.wanted, from: *is, optional: true}
		switch {
		case h.name == settingIPv4Promote:
			s.optional = !promotes
		case h.name == settingIPv6AddrGen && want.linkLocal:
			s.to, s.now = s.from, link.Up
			if s.from == kernel.AddrGenNone {
				s.to = kernel.AddrGenEUI64
			}
		}
		if s.from != s.to {
			steps = append(steps, s)
		}
	}
	return steps
}
