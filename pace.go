package overlay

import "time"

// How often what others remove is put back. Whoever fights us gets that much of the processor and no more.
const (
	healBurst   = 5                      // repairs that may follow each other at once
	healEvery   = 500 * time.Millisecond // then one in this time
	healSettle  = 20 * time.Millisecond  // from the first sign until we look: a flush is many announcements
	healShare   = 10                     // of the time at most one part in so many
	urgentShare = 2                      // and where packets go astray meanwhile
	healRetry   = time.Second            // after a repair that failed, doubled each time
	healPatient = time.Minute            // and no longer than this
	reportBurst = 5                      // tellings of repairs that may follow each other at once
	reportEvery = 10 * time.Second       // then one in this time, for all that were made
	auditEvery  = 5 * time.Minute        // between looks without any sign
	auditDeaf   = 5 * time.Second        // and where the kernel tells us nothing
)

// bucket allows burst of something at once and then one every so long. The zero value with its limits set is full.
type bucket struct {
	burst int
	every time.Duration
	used  int       // of burst
	since time.Time // of the last refill; of no meaning while used is 0
}

// wait returns how long from now until the next is allowed.
func (b *bucket) wait(now time.Time) time.Duration {
	b.refill(now)
	if b.used < b.burst {
		return 0
	}
	return b.since.Add(b.every).Sub(now)
}

// take counts one.
func (b *bucket) take(now time.Time) {
	b.refill(now)
	if b.used == 0 {
		b.since = now
	}
	b.used = min(b.used+1, b.burst)
}

func (b *bucket) refill(now time.Time) {
	if b.used == 0 {
		return
	}
	n := int(min(now.Sub(b.since)/b.every, time.Duration(b.used)))
	b.used -= n
	b.since = b.since.Add(time.Duration(n) * b.every)
}

// pace says when to look, and to put back what is missing.
type pace struct {
	looks    bucket
	urgents  bucket // of looks: what others do to our routes does not delay those after link up
	pending  bool
	urgent   bool
	first    time.Time     // sign of what is pending
	last     time.Time     // end of the last look
	cost     time.Duration // of that
	retry    time.Time     // not before, unless urgent: the last repair failed
	failures int
}

func newPace() *pace {
	limits := bucket{burst: healBurst, every: healEvery}
	return &pace{looks: limits, urgents: limits}
}

// sign notes that there may be something to repair. urgent: the link came up, and until its routes are back packets for the
// overlay take another way (kernel.md V27).
func (p *pace) sign(now time.Time, urgent bool) {
	if !p.pending {
		p.pending, p.first = true, now
	}
	p.urgent = p.urgent || urgent
}

// wait returns how long from now until the next look; false if there is no reason for one.
func (p *pace) wait(now time.Time) (time.Duration, bool) {
	if !p.pending {
		return 0, false
	}
	if p.urgent {
		return max(p.last.Add((urgentShare-1)*p.cost).Sub(now), p.urgents.wait(now), 0), true
	}
	rest := p.last.Add((healShare - 1) * p.cost)
	return max(rest.Sub(now), p.looks.wait(now), p.first.Add(healSettle).Sub(now), p.retry.Sub(now), 0), true
}

// looked notes what came of a look. A repair that failed is pending again; of one that others undid meanwhile they gave a sign.
func (p *pace) looked(start, end time.Time, r repair) {
	urgent := p.urgent
	p.pending, p.urgent = r.err != nil, false
	if !r.looked {
		return
	}
	if urgent {
		p.urgents.take(end)
	} else {
		p.looks.take(end)
	}
	p.last, p.cost = end, end.Sub(start)
	if r.err == nil {
		p.failures, p.retry = 0, time.Time{}
		return
	}
	p.first, p.retry = end, end.Add(min(healRetry<<min(p.failures, 10), healPatient))
	p.failures++
}

// repair is what came of a look.
type repair struct {
	looked   bool
	restored int      // objects
	err      error    // something is missing still
	leftOut  error    // something is not put back, for the administrator's sake
	shadowed []shadow // as far as they are news
}

// never is a wait without end.
const never = time.Duration(1<<63 - 1)

// next returns how long from now until there is something to do.
func (p *pace) next(now time.Time) time.Duration {
	if wait, ok := p.wait(now); ok {
		return wait
	}
	return never
}

// digest sums up what came of looks until it may be told: a fight fills no log.
type digest struct {
	limit    bucket
	restored int      // objects
	leftOut  error    // what began to be; nil: nothing, or told
	unhealed error    // likewise
	shadowed []shadow // that are news
}

func newDigest() *digest { return &digest{limit: bucket{burst: reportBurst, every: reportEvery}} }

func (d *digest) empty() bool {
	return d.restored == 0 && d.leftOut == nil && d.unhealed == nil && len(d.shadowed) == 0
}

// take returns one of the things that are to be told, the worst first, if anything is and may be now; it is told then.
func (d *digest) take(now time.Time) (told digest) {
	if d.empty() || d.limit.wait(now) > 0 {
		return told
	}
	d.limit.take(now)
	switch {
	case d.unhealed != nil:
		told.unhealed, d.unhealed = d.unhealed, nil
	case d.leftOut != nil:
		told.leftOut, d.leftOut = d.leftOut, nil
	case len(d.shadowed) > 0:
		told.shadowed, d.shadowed = d.shadowed, nil
	default:
		told.restored, d.restored = d.restored, 0
	}
	return told
}

// next returns how long from now until there is something to tell.
func (d *digest) next(now time.Time) time.Duration {
	if d.empty() {
		return never
	}
	return d.limit.wait(now)
}
