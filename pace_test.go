package overlay

import (
	"errors"
	"testing"
	"time"
)

// clock is a time that stands still unless told otherwise.
type clock struct{ time.Time }

func (c *clock) pass(d time.Duration) { c.Time = c.Add(d) }

func newClock() *clock { return &clock{time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)} }

// dueIn is pace.wait without a second result: never if nothing is pending.
func dueIn(p *pace, c *clock) time.Duration {
	if wait, ok := p.wait(c.Time); ok {
		return wait
	}
	return never
}

// A sign leads to a look after a moment, an urgent one at once, and none to none.
func TestPaceOfOneSign(t *testing.T) {
	for _, test := range []struct {
		signs []bool // urgent
		want  time.Duration
	}{
		{nil, never}, {[]bool{false}, healSettle}, {[]bool{true}, 0}, {[]bool{false, false}, healSettle}, {[]bool{false, true}, 0}, {[]bool{true, false}, 0},
	} {
		p, c := newPace(), newClock()
		for _, urgent := range test.signs {
			p.sign(c.Time, urgent)
		}
		if got := dueIn(p, c); got != test.want {
			t.Errorf("signs %v: due in %v, want %v", test.signs, got, test.want)
		}
	}
	p, c := newPace(), newClock()
	p.sign(c.Time, false)
	c.pass(healSettle / 2)
	p.sign(c.Time, false) // the first counts: signs without end do not put the look off
	if got := dueIn(p, c); got != healSettle/2 {
		t.Errorf("due in %v after a second sign", got)
	}
}

// However many signs there are, the looks are few: a burst and then one each healEvery, and link flaps have no more. A look that
// costs a lot is followed by a rest.
func TestPaceOfStorm(t *testing.T) {
	const length = 20 * time.Second
	for _, test := range []struct {
		name   string
		urgent bool
		cost   time.Duration
		most   int
	}{
		{"flusher", false, 0, healBurst + int(length/healEvery)},
		{"flapper", true, 0, healBurst + int(length/healEvery)},
		{"costly", false, 500 * time.Millisecond, 1 + int(length/(healShare*500*time.Millisecond))},
		{"costly flapper", true, 500 * time.Millisecond, 1 + int(length/(urgentShare*500*time.Millisecond))},
	} {
		p, c := newPace(), newClock()
		looks := 0
		for end := c.Add(length); c.Before(end); c.pass(time.Millisecond) {
			p.sign(c.Time, test.urgent)
			if dueIn(p, c) == 0 {
				start := c.Time
				c.pass(test.cost)
				p.looked(start, c.Time, repair{looked: true})
				looks++
			}
		}
		if looks > test.most || looks < test.most*3/4 {
			t.Errorf("%s: %d looks in %v, want about %d and no more", test.name, looks, length, test.most)
		}
	}
}

// A repair that fails is tried again, later each time, and at once when the link comes up.
func TestPaceOfFailures(t *testing.T) {
	p, c := newPace(), newClock()
	failed := repair{looked: true, err: errors.New("no")}
	p.sign(c.Time, false)
	c.pass(healSettle)
	for _, want := range []time.Duration{healRetry, 2 * healRetry, 4 * healRetry, 8 * healRetry, 16 * healRetry, 32 * healRetry, healPatient, healPatient} {
		p.looked(c.Time, c.Time, failed)
		if got := dueIn(p, c); got != want {
			t.Errorf("tried again in %v, want %v", got, want)
		}
		c.pass(want)
	}
	p.looked(c.Time, c.Time, failed)
	p.sign(c.Time, true)
	if got := dueIn(p, c); got != 0 {
		t.Errorf("link up: tried again in %v", got)
	}
	p.looked(c.Time, c.Time, repair{looked: true})
	p.sign(c.Time, false)
	if got := dueIn(p, c); got != healSettle {
		t.Errorf("after a success a sign waits %v", got)
	}
}

// After a costly look the next waits for its share of the time; not so long where the link came up.
func TestPaceOfRest(t *testing.T) {
	p, c := newPace(), newClock()
	const cost = 300 * time.Millisecond
	start := c.Time
	c.pass(cost)
	p.looked(start, c.Time, repair{looked: true})
	p.sign(c.Time, false)
	if got, want := dueIn(p, c), (healShare-1)*cost; got != want {
		t.Errorf("the next look is due in %v, want %v", got, want)
	}
	p.sign(c.Time, true)
	if got, want := dueIn(p, c), (urgentShare-1)*cost; got != want {
		t.Errorf("with the link up the next look is due in %v, want %v", got, want)
	}
}

// Repairs are told of at once, and in a fight summed up: nothing is lost, and it fills no log.
func TestDigest(t *testing.T) {
	const length = time.Minute
	d, c := newDigest(), newClock()
	told, sum, added := 0, 0, 0
	for end := c.Add(length); c.Before(end); c.pass(100 * time.Millisecond) {
		d.restored += 3
		added += 3
		if n := d.take(c.Time).restored; n > 0 {
			told++
			sum += n
		}
	}
	if want := reportBurst + int(length/reportEvery); told > want || told < want-1 {
		t.Errorf("told %d times in %v, want %d", told, length, want)
	}
	c.pass(d.next(c.Time))
	if sum += d.take(c.Time).restored; sum != added {
		t.Errorf("told of %d repairs, there were %d", sum, added)
	}
	if told := d.take(c.Time); d.next(c.Time) != never || !told.empty() {
		t.Error("there is more to tell")
	}
}

// Trouble and shadows that come when nothing may be told wait until it may.
func TestDigestKeeps(t *testing.T) {
	d, c := newDigest(), newClock()
	for range reportBurst {
		d.restored = 1
		d.take(c.Time)
	}
	no, s := errors.New("no"), shadow{text: "shadow"}
	d.unhealed, d.leftOut, d.shadowed = no, no, []shadow{s}
	if told := d.take(c.Time); !told.empty() {
		t.Errorf("told %v", told)
	}
	next := func() digest {
		wait := d.next(c.Time)
		if wait <= 0 || wait > reportEvery {
			t.Errorf("to be told in %v", wait)
		}
		c.pass(wait)
		return d.take(c.Time)
	}
	first, second, third := next(), next(), next()
	if first.unhealed != no || second.leftOut != no || len(third.shadowed) != 1 || third.shadowed[0] != s || !d.empty() {
		t.Errorf("told %v, %v, %v", first, second, third)
	}
}
