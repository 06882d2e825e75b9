package overlay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// shadowNotes are the prefixes that State says are shadowed.
func shadowNotes(d *tunDevice) (prefixes []string) {
	for line := range strings.Lines(d.State().String()) {
		if rest, ok := strings.CutPrefix(line, "note shadowed: "); ok {
			prefix, _, _ := strings.Cut(rest, " ")
			prefixes = append(prefixes, prefix)
		}
	}
	return prefixes
}

// A shadow ends where the other's route goes, by whatever way, and is news when it returns (kernel.md V12).
func TestShadowGoes(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	// Without IPv6 there: else an address that goes with it would give the sign.
	l.setSysctl("ipv6/conf/other0/disable_ipv6", "1")
	d := l.active(healed())
	name := d.State().Name
	for i, rival := range []struct{ come, prefix, leave string }{
		{"route replace 10.9.0.0/16 dev other0", "10.9.0.0/16", "route del 10.9.0.0/16 dev other0"},
		{"route replace 10.9.0.0/16 dev other0", "10.9.0.0/16", "link del other0"},
		{"route replace 10.9.0.0/16 dev other0", "10.9.0.0/16", "link set other0 down\nlink set other0 up"},
		{"addr add 10.5.0.1/24 dev other0\nroute replace 10.9.0.0/16 via 10.5.0.2 dev other0", "10.9.0.0/16", "addr del 10.5.0.1/24 dev other0"},
		{"addr add 10.5.0.1/24 dev other0\nnexthop add id 1 via 10.5.0.2 dev other0\nroute replace 10.9.0.0/16 nhid 1", "10.9.0.0/16", "nexthop del id 1"},
		{"route replace blackhole 10.9.0.0/16", "10.9.0.0/16", "route del blackhole 10.9.0.0/16"},
		{"route prepend 10.9.0.0/16 dev DEV mtu 1280 proto 44", "10.9.0.0/16", "route del 10.9.0.0/16 dev DEV proto 44"},
	} {
		l.ip(strings.ReplaceAll(rival.come, "DEV", name))
		if i < 2 { // more in a row are summed up
			l.event(d, EventShadowed)
		}
		l.await("noted", func() bool { return slices.Equal(shadowNotes(d), []string{rival.prefix}) })
		l.ip(strings.ReplaceAll(rival.leave, "DEV", name))
		l.await(rival.leave+": the note is gone", func() bool { return len(shadowNotes(d)) == 0 })
		if rival.leave == "link del other0" {
			l.ns.OtherTun(t, "other0")
			l.setSysctl("ipv6/conf/other0/disable_ipv6", "1")
		}
	}
}

// What a Reload removes is not shadowed any more; what it leaves is.
func TestReloadDropsShadows(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	l.ip("route add 10.9.0.0/16 dev other0\nroute add 10.8.0.0/16 dev other0\nroute add 10.7.0.0/16 dev other0")
	cfg := Config{Networks: prefixes("10.42.0.1/24")}
	for _, prefix := range prefixes("10.7.0.0/16", "10.8.0.0/16", "10.9.0.0/16") {
		cfg.Routes = append(cfg.Routes, Route{Prefix: prefix})
	}
	d := l.active(cfg)
	want := func(when string, prefixes ...string) {
		t.Helper()
		if got := shadowNotes(d); !slices.Equal(got, prefixes) {
			t.Errorf("%s: shadowed %v, want %v", when, got, prefixes)
		}
	}
	want("active", "10.7.0.0/16", "10.8.0.0/16", "10.9.0.0/16")
	l.await("trust", d.isTrusted)
	m, _ := meddle(d)
	cfg.Routes = cfg.Routes[1:]
	l.reload(d, cfg)
	want("one less", "10.8.0.0/16", "10.9.0.0/16")
	cfg.Routes = slices.Clone(cfg.Routes)
	cfg.Routes[0].NoInstall = true
	l.reload(d, cfg)
	want("one steered only", "10.9.0.0/16")
	cfg.Routes = append(slices.Clone(cfg.Routes), Route{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Metric: 5})
	l.reload(d, cfg)
	want("two of one prefix", "10.9.0.0/16")
	cfg.Routes = slices.Clone(cfg.Routes[:2])
	l.reload(d, cfg)
	want("one of them again", "10.9.0.0/16")
	m.mu.Lock()
	defer m.mu.Unlock()
	if slices.Contains(m.log, "GETADDR") {
		t.Error("one of these reloads looked: the test shows nothing of those that do not")
	}
}

// When nothing may be told for a while, a shadow and trouble that come meanwhile are told afterwards, if they are still there.
func TestTellLater(t *testing.T) {
	l := newLab(t)
	l.ns.OtherTun(t, "other0")
	l.ip("route add 10.9.0.0/16 dev other0")
	d := l.active(healed())
	l.event(d, EventShadowed)
	there := d.shadowed[0]
	gone := shadow{prefix: netip.MustParsePrefix("10.8.0.0/16"), text: "10.8.0.0/16 was answered by somebody"}

	news, now := newDigest(), time.Now()
	for range reportBurst {
		news.restored = 1
		news.take(now)
	}
	d.digest(news, repair{looked: true, shadowed: []shadow{there, gone}, leftOut: ErrIPv6Disabled})
	d.tell(news.take(now))
	l.noEvent(d, EventShadowed)
	for range 2 {
		now = now.Add(news.next(now))
		d.tell(news.take(now))
	}
	if e := l.event(d, EventDegraded); e.Err != ErrIPv6Disabled {
		t.Errorf("event %v", e)
	}
	if e := l.event(d, EventShadowed); e.N != 1 || !strings.Contains(e.Err.Error(), there.text) {
		t.Errorf("event %v", e)
	}
	for range reportBurst {
		news.restored = 1
		news.take(now)
	}
	d.digest(news, repair{looked: true})
	d.digest(news, repair{looked: true, leftOut: ErrIPv6Disabled})
	d.digest(news, repair{looked: true})
	if news.leftOut != nil {
		t.Errorf("trouble that has passed is to be told: %v", news.leftOut)
	}
}
