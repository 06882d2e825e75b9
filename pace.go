package overlay

import "time"

// How often what others remove is put back. Whoever fights us gets that much of the processor and no more.
const (
	healBurst   = 5                      // repairs that may follow each other at once
	healEvery   = 500 * time.Millisecond // then one in this time
	healSettle  = 20 * time.Millisecond  // from the first sign until we look: a flush is many announcements
	healShare   = 10                     // of the time at most one part in so many
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
	first    time.Time // sign of what is pending
	rest     time.Time // not before: the share of the time
	retry    time.Time // not before, unless urgent: the last repair failed
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
	wait := p.rest.Sub(now)
	if p.urgent {
		wait = max(wait, p.urgents.wait(now))
	} else {
		wait = max(wait, p.looks.wait(now), p.first.Add(healSettle).Sub(now), p.retry.Sub(now))
	}
	return max(wait, 0), true
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
	p.rest = end.Add((healShare - 1) * end.Sub(start))
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

// digest sums up repairs until they may be told of: a fight fills no log.
type digest struct {
	limit bucket
	n     int
}

func newDigest() *digest { return &digest{limit: bucket{burst: reportBurst, every: reportEvery}} }

func (d *digest) add(n int) { d.n += n }

// due returns what is to be told now; 0 if nothing is.
func (d *digest) due(now time.Time) (n int) {
	if d.n == 0 || !d.may(now) {
		return 0
	}
	n, d.n = d.n, 0
	return n
}

// may says whether something may be told now, and counts it.
func (d *digest) may(now time.Time) bool {
	if d.limit.wait(now) > 0 {
		return false
	}
	d.limit.take(now)
	return true
}

func (d *digest) next(now time.Time) time.Duration {
	if d.n == 0 {
		return never
	}
	return d.limit.wait(now)
}
