package overlay

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// walker makes Configs at random, out of few parts, so that they often have some in common.
type walker struct{ *rand.Rand }

var (
	walkNetworks = prefixes("10.42.0.1/24", "10.42.0.2/24", "10.43.0.1/16", "10.44.0.1/32", "fd42::1/64", "fd43::1/48")
	walkPrefixes = prefixes("10.9.0.0/16", "10.9.1.0/24", "10.42.0.0/24", "10.43.0.0/16", "0.0.0.0/0", "fd09::/64", "fd09::/48", "fd42::/64", "::/0", "10.8.0.1/32")
)

// config is valid, whatever it is.
func (w walker) config() Config {
	for {
		c := Config{
			NoHeal: true, MTU: []int{0, 1000, 1400, 1500}[w.IntN(4)], TxQueueLen: []int{0, 0, 77}[w.IntN(3)],
			LinkLocal: w.IntN(3) == 0, TakeAddresses: w.IntN(3) == 0,
		}
		for _, network := range walkNetworks {
			if w.IntN(2) == 0 {
				c.Networks = append(c.Networks, network)
			}
		}
		for range w.IntN(12) {
			r := Route{
				Prefix: walkPrefixes[w.IntN(len(walkPrefixes))], MTU: []int{0, 0, 1300, 1450}[w.IntN(4)], Metric: []int{0, 0, 7, 256, 1024}[w.IntN(5)],
				Table: []int{0, 0, 254, 77}[w.IntN(4)], NoInstall: w.IntN(4) == 0,
			}
			if w.IntN(2) == 0 {
				r.Via = [][]Gateway{via("10.42.0.9"), via("fd42::9"), via("10.42.0.9", "10.42.0.8"), via("10.43.7.7")}[w.IntN(4)]
			}
			c.Routes = append(c.Routes, r)
		}
		if c.Validate() == nil {
			return c
		}
	}
}

// near is another that differs from c in a route or two, or in their order.
func (w walker) near(c Config) Config {
	for {
		n := c.clone()
		switch other := w.config(); {
		case w.IntN(8) == 0:
			n.TxQueueLen, n.LinkLocal, n.TakeAddresses = other.TxQueueLen, other.LinkLocal, other.TakeAddresses
		case w.IntN(8) == 0: // the same again
		case len(n.Routes) > 0 && w.IntN(3) == 0:
			i := w.IntN(len(n.Routes))
			n.Routes = append(n.Routes[:i], n.Routes[i+1:]...)
		case w.IntN(3) == 0:
			w.Shuffle(len(n.Routes), func(i, j int) { n.Routes[i], n.Routes[j] = n.Routes[j], n.Routes[i] })
		case len(n.Routes) > 0 && len(other.Routes) > 0 && w.IntN(2) == 0:
			n.Routes[w.IntN(len(n.Routes))] = other.Routes[0]
		default:
			n.Routes = append(n.Routes, other.Routes...)
		}
		if n.Validate() == nil {
			return n
		}
	}
}

// A walk through Configs: after each Reload kernel and tree hold what the Config says and no more, with a look or without; and
// after one in which an operation was refused or its outcome lost, what the Config before said, or all but that where it is optional.
func TestReloadWalk(t *testing.T) {
	steps := 400
	if testing.Short() || raceEnabled {
		steps = 100
	}
	l := newLab(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	w := walker{rand.New(rand.NewPCG(seed, 0))}
	cfg := w.config()
	d := l.active(cfg)
	fast, refused, lacked := 0, 0, 0
	for i := range steps {
		next := w.near(cfg)
		if w.IntN(3) == 0 {
			next = w.config()
		}
		next.NetNS = l.ns.Path()
		fault, hit := w.IntN(40), false
		bad := []misfortune{refusal(unix.EINVAL), {err: rtnl.ErrUnknown}, {err: rtnl.ErrUnknown, done: true}}[w.IntN(3)]
		m, remove := meddle(d, func(m *meddler) {
			m.fail = func(n int, r rtnl.Message) misfortune {
				if n == fault && !isQuestion(r) {
					hit = true
					return bad
				}
				return misfortune{}
			}
		})
		err := d.Reload(next)
		remove()
		if err == nil {
			cfg = next
		} else {
			refused++
		}
		if len(d.past.lacks) > 0 {
			if lacked++; !hit && err == nil {
				t.Errorf("lacks what nothing was refused for: %v", d.past.lacks)
			}
		}
		looked := false
		for _, name := range m.log {
			looked = looked || name == "GETADDR"
		}
		if !looked {
			fast++
		}
		l.wantInForce(d)
		if t.Failed() {
			t.Fatalf("step %d, fault at operation %d, looked %v, error %v\nbefore %+v\nnext   %+v\nsent %v", i, fault, looked, err, cfg, next, m.log)
		}
		if got := fmt.Sprint(d.State().Networks); got != fmt.Sprint(cfg.Networks) {
			t.Fatalf("networks %s, want %v", got, cfg.Networks)
		}
	}
	t.Logf("%d reloads, %d without a look, %d refused, %d in part", steps, fast, refused, lacked)
	if fast == 0 || refused == 0 {
		t.Error("one kind never happened")
	}
}
