package overlay

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"example.com/overlay/internal/nstest"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// notes are those of State that begin so.
func notes(d *tunDevice, start string) (found []string) {
	for line := range strings.Lines(d.State().String()) {
		if strings.HasPrefix(line, "note "+start) {
			found = append(found, line)
		}
	}
	return found
}

// setIPv6 lets the kernel have IPv6 on the device or not.
func (l *lab) setIPv6(d *tunDevice, on bool) {
	l.Helper()
	l.setSysctl("ipv6/conf/"+d.State().Name+"/disable_ipv6", map[bool]string{true: "0", false: "1"}[on])
}

// IPv6 that was disabled for a while is put back also where the kernel is told not to announce the routes that go with it
// (kernel.md A7).
func TestHealIPv6DisabledSilently(t *testing.T) {
	l := newLab(t, nstest.InitUserNS) // the setting is not in others (kernel.md V20)
	d := l.active(healed())
	want := l.config(d)
	l.setSysctl("ipv6/route/skip_notify_on_dev_down", "1")
	l.setIPv6(d, false)
	l.event(d, EventDegraded)
	l.await("healer at rest", d.atRest)
	l.setIPv6(d, true)
	l.wantHealed(d, want)
}

// A Reload that puts all in force ends what State says of healing's trouble, and trouble that returns is told again.
func TestReloadEndsTrouble(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	for range 2 {
		l.setIPv6(d, false)
		if e := l.event(d, EventDegraded); !errors.Is(e.Err, ErrIPv6Disabled) {
			t.Errorf("event %v", e)
		}
		l.await("healer at rest", d.atRest)
		l.reload(d, Config{Networks: prefixes("10.42.0.1/24")})
		if got := notes(d, "IPv6"); len(got) > 0 {
			t.Errorf("without IPv6 in Config: %q", got)
		}
		l.setIPv6(d, true)
		l.await("healer at rest", d.atRest)
		l.reload(d, healed())
		l.await("trust", d.isTrusted)
	}
}

// A look that fails says nothing about what is left out: it stays noted, and is not news afterwards.
func TestLeftOutOutlivesFailedLooks(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	l.setIPv6(d, false)
	l.event(d, EventDegraded)
	l.await("healer at rest", d.atRest)
	_, remove := meddle(d, func(m *meddler) {
		m.fail = func(_ int, r rtnl.Message) misfortune {
			if r.Type == unix.RTM_GETADDR {
				return refusal(unix.ENOMEM)
			}
			return misfortune{}
		}
	})
	l.ip("route flush dev " + d.State().Name)
	if e := l.event(d, EventDegraded); !errors.Is(e.Err, unix.ENOMEM) || len(notes(d, "IPv6")) != 1 {
		t.Errorf("event %v, state\n%v", e, d.State())
	}
	remove()
	l.await("the look succeeds", func() bool { return len(notes(d, "not put back")) == 0 })
	if len(notes(d, "IPv6")) != 1 {
		t.Errorf("state\n%v", d.State())
	}
	l.noEvent(d, EventDegraded)
}

// Trouble of one kind does not hide that of another.
func TestSecondTroubleIsTold(t *testing.T) {
	l := newLab(t)
	d := l.active(healed())
	l.setIPv6(d, false)
	l.event(d, EventDegraded)
	l.await("healer at rest", d.atRest)
	_, remove := meddle(d, func(m *meddler) {
		m.fail = func(_ int, r rtnl.Message) misfortune {
			if r.Type == unix.RTM_NEWROUTE {
				return refusal(unix.EPERM)
			}
			return misfortune{}
		}
	})
	l.ip("route flush dev " + d.State().Name)
	if e := l.event(d, EventDegraded); !errors.Is(e.Err, unix.EPERM) {
		t.Errorf("event %v", e)
	}
	if len(notes(d, "IPv6")) != 1 || len(notes(d, "not put back")) != 1 {
		t.Errorf("state\n%v", d.State())
	}
	remove()
	l.await("one trouble less", func() bool { return len(notes(d, "not put back")) == 0 })
	if len(notes(d, "IPv6")) != 1 {
		t.Errorf("state\n%v", d.State())
	}
}

// An ability that is missing stays noted, and is not news, after looks that had no reason to try it: of a link that is down, or where
// its setting is the administrator's until the next Reload.
func TestLackOutlivesHealing(t *testing.T) {
	for what, test := range map[string]struct {
		cfg       Config
		attribute uint16
	}{
		"queue length": {Config{Networks: prefixes("10.42.0.1/24"), TxQueueLen: 77}, unix.IFLA_TXQLEN},
		"settings":     {Config{Networks: prefixes("10.42.0.1/24")}, unix.IFLA_AF_SPEC},
	} {
		l := newLab(t)
		l.setSysctl("ipv4/conf/default/accept_redirects", "1")
		test.cfg.Routes = []Route{{Prefix: netip.MustParsePrefix("10.9.0.0/16")}}
		d := l.open(test.cfg)
		_, remove := meddle(d, func(m *meddler) {
			m.fail = func(_ int, r rtnl.Message) misfortune {
				sets := r.Type == unix.RTM_NEWLINK || r.Type == unix.RTM_SETLINK
				if sets && attributesOf(r.Body[unix.SizeofIfInfomsg:])[test.attribute] != nil {
					return refusal(unix.EPERM)
				}
				return misfortune{}
			}
		})
		l.must(d.Activate())
		name := d.State().Name
		l.event(d, EventDegraded)
		lacks := len(notes(d, ""))
		for _, lines := range []string{"route del 10.9.0.0/16 dev DEV", "link set DEV down", "link set DEV up"} {
			l.ip(strings.ReplaceAll(lines, "DEV", name))
			l.await("healer at rest", d.atRest)
			if got := notes(d, ""); len(got) != lacks || lacks == 0 {
				t.Errorf("%s: after %q notes %q, there were %d", what, lines, got, lacks)
			}
		}
		l.noEvent(d, EventDegraded)
		remove()
		l.must(d.Activate())
		if got := notes(d, ""); len(got) > 0 {
			t.Errorf("%s: notes %q though nothing is missing", what, got)
		}
	}
}

// With TakeAddresses a stranger's address that came meanwhile goes with the next Reload, an equal one too; healing leaves it.
func TestReloadTakesLaterAddresses(t *testing.T) {
	l := newLab(t)
	cfg := Config{Networks: prefixes("10.42.0.1/24"), TakeAddresses: true}
	d := l.active(cfg)
	l.await("trust", d.isTrusted)
	l.ip("addr add 10.99.0.1/24 dev " + d.State().Name)
	l.await("healer at rest", d.atRest)
	if got := l.addresses(d.index); len(got) != 2 {
		t.Errorf("addresses %v", got)
	}
	l.reload(d, cfg)
	l.want("addresses", l.addresses(d.index), "10.42.0.1/24 proto 111 noprefixroute")
	l.await("trust", d.isTrusted)
}
