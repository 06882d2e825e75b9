//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"time"

	"example.com/overlay/examples/internal/stage"
)

const (
	flows     = 1000 // per client and family, to the shared subnet
	tolerance = 0.10 // of a host's share; so many random flows stray that far less than once in a million runs
	spoilt    = 0.01 // of the probes of a planned move; datagrams are no promise
)

// play is the life of the mesh.
func play(ctx context.Context, o options, b *brand, out io.Writer) (err error) {
	say := stage.Progress(out)
	m, err := newMesh(ctx, o.hosts, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	say("built", "%d hosts, an agent on each; UDP carries the overlay between them", o.hosts)
	if err := m.startRouters(ctx); err != nil {
		return err
	}
	say("started", "%s on each host, a neighbour of all others on the overlay", b.name)
	if err := m.meet(ctx); err != nil {
		return err
	}
	say("met", "%d BGP sessions; every agent knows the way to every host's subnet", o.hosts*(o.hosts-1)/2*b.sessions)

	one, two := m.last()
	planned, err := m.move(ctx, one, two, plan)
	if err != nil {
		return fmt.Errorf("move a subnet from %s to %s: %w", one.name, two.name, err)
	}
	say("moved", "the subnet of %s to %s, which announces it before %s withdraws it", one.name, two.name, one.name)
	sudden, err := m.move(ctx, two, one, surprise)
	if err != nil {
		return fmt.Errorf("move a subnet from %s to %s: %w", two.name, one.name, err)
	}
	say("moved", "it back without a warning: %s loses it before %s has it", two.name, one.name)
	shares, err := m.share(ctx, one, two)
	if err != nil {
		return fmt.Errorf("share a subnet between %s and %s: %w", one.name, two.name, err)
	}
	say("shared", "a subnet that %s and %s announce both; %d flows from each other host", one.name, two.name, flows*len(families))

	description := ""
	if o.verbose {
		description = m.describe()
	}
	if err := m.retire(); err != nil {
		return err
	}
	say("retired", "the routers, and their routes with them: no agent knows a way any more")
	fmt.Fprintln(out)
	m.report(out, []moved{{"planned", one, two, planned}, {"sudden", two, one, sudden}}, shares)
	fmt.Fprint(out, description)
	return m.check(planned, shares)
}

// startRouters starts the routers, all at once.
func (m *mesh) startRouters(ctx context.Context) error {
	return m.each(func(h *host) error {
		h.router = m.brand.router(h, m.hosts)
		if err := h.router.start(ctx); err != nil {
			return fmt.Errorf("start the router of %s: %w", h.name, err)
		}
		return nil
	})
}

// meet lets every host announce its subnet, and every other ask who is there.
func (m *mesh) meet(ctx context.Context) error {
	err := m.each(func(h *host) error { return h.announce(ctx, subnet(h.number)) })
	if err != nil {
		return err
	}
	for _, h := range m.hosts {
		if err := awaitVia(ctx, subnet(h.number), []*host{h}, m.others(h)); err != nil {
			return err
		}
		for _, from := range m.others(h) {
			for family, name := range families {
				answers, err := from.ask(ctx, subnet(h.number), family, 1)
				if err == nil && answers[h.number] == 0 {
					err = fmt.Errorf("another answers: %v", answers)
				}
				if err != nil {
					return fmt.Errorf("from %s to the subnet of %s by %s: %w", from.name, h.name, name, err)
				}
			}
		}
	}
	return nil
}

// ask starts flows to a subnet and returns how many each host answered, by number.
func (h *host) ask(ctx context.Context, s subnet, family, flows int) (answers map[byte]int, err error) {
	answers = make(map[byte]int)
	err = h.ns.Do(func() error {
		for i := range flows {
			by, err := stage.Ask(ctx, s.door(family))
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err != nil:
				return fmt.Errorf("flow %d of %d: %w", i+1, flows, err)
			}
			answers[byte(by)]++
		}
		return nil
	})
	return answers, err
}

// plan moves a subnet so that at every moment somebody has it to whom its packets go; surprise so that for a while nobody has.
func plan(ctx context.Context, s subnet, from, to *host, clients []*host) error {
	if err := errors.Join(to.settle(s), to.announce(ctx, s)); err != nil {
		return err
	}
	both := []*host{from, to}
	if from.number > to.number {
		both = []*host{to, from}
	}
	if err := awaitVia(ctx, s, both, clients); err != nil {
		return err
	}
	if err := from.withdraw(ctx, s); err != nil {
		return err
	}
	if err := awaitVia(ctx, s, []*host{to}, clients); err != nil {
		return err
	}
	return from.leave(s)
}

func surprise(ctx context.Context, s subnet, from, to *host, clients []*host) error {
	if err := errors.Join(from.leave(s), from.withdraw(ctx, s)); err != nil {
		return err
	}
	if err := errors.Join(to.settle(s), to.announce(ctx, s)); err != nil {
		return err
	}
	return awaitVia(ctx, s, []*host{to}, clients)
}

// way is how a subnet moves from one host to another before the eyes of clients.
type way func(ctx context.Context, s subnet, from, to *host, clients []*host) error

// fates are what became of streams to a subnet that moved, by family.
type fates [len(families)]fate

// move moves the subnet of the last host but one, while a stream of each family from each client goes there.
func (m *mesh) move(ctx context.Context, from, to *host, how way) (became fates, err error) {
	one, _ := m.last()
	moving := subnet(one.number)
	var streams []*stream
	var begun time.Time
	defer func() {
		for _, s := range streams { // all at once: a stream takes its time
			err = errors.Join(err, s.end())
		}
		for _, s := range streams {
			probes, outcomeErr := s.outcome()
			became[s.family].add(probes, begun, to.number)
			err = errors.Join(err, outcomeErr)
		}
	}()
	for _, client := range m.clients() {
		for family := range families {
			s, err := startStream(client, moving, family)
			if err != nil {
				return became, err
			}
			streams = append(streams, s)
		}
	}
	if err := awaitAnswers(ctx, streams, from); err != nil {
		return became, err
	}
	begun = time.Now()
	if err := how(ctx, moving, from, to, m.clients()); err != nil {
		return became, err
	}
	return became, awaitAnswers(ctx, streams, to)
}

// shares are how many of a client's flows each of the two hosts answered, by family.
type shares [len(families)]map[byte]int

func (s *shares) of(family int, h *host) float64 {
	total := 0
	for _, n := range s[family] {
		total += n
	}
	return float64(s[family][h.number]) / float64(max(total, 1))
}

// share lets two hosts have a subnet, and every client start flows to it.
func (m *mesh) share(ctx context.Context, one, two *host) ([]shares, error) {
	for _, h := range []*host{one, two} {
		if err := errors.Join(h.settle(shared), h.announce(ctx, shared)); err != nil {
			return nil, err
		}
	}
	if err := awaitVia(ctx, shared, []*host{one, two}, m.clients()); err != nil {
		return nil, err
	}
	all := make([]shares, len(m.clients()))
	for i, client := range m.clients() {
		for family, name := range families {
			var err error
			if all[i][family], err = client.ask(ctx, shared, family, flows); err != nil {
				return nil, fmt.Errorf("%s flows from %s: %w", name, client.name, err)
			}
		}
	}
	return all, nil
}

// retire ends all routers, and waits until no agent follows a route of theirs.
func (m *mesh) retire() error {
	err := m.each(func(h *host) error {
		r := h.router
		h.router = nil
		return r.stop()
	})
	if err != nil {
		return err
	}
	for _, h := range m.hosts {
		for _, s := range m.subnets() {
			for family := range families {
				var left []netip.Addr
				err := stage.Await(fmt.Sprintf("%s to forget the way to %v", h.name, s.prefix(family)), func() (bool, error) {
					left = h.via(s, family)
					return len(left) == 0, nil
				})
				if err != nil {
					return fmt.Errorf("%w: it sends to %v", err, left)
				}
			}
		}
	}
	return nil
}

// subnets are all that have been announced.
func (m *mesh) subnets() []subnet {
	all := []subnet{shared}
	for _, h := range m.hosts {
		all = append(all, subnet(h.number))
	}
	return all
}

// check says what is not as it should be, of what did not end the play.
func (m *mesh) check(planned fates, all []shares) error {
	one, two := m.last()
	var errs []error
	for family, name := range families {
		if f := planned[family]; float64(f.lost) > spoilt*float64(f.sent) {
			errs = append(errs, fmt.Errorf("the planned move lost %d of %d probes by %s", f.lost, f.sent, name))
		}
	}
	for i, client := range m.clients() {
		for family, name := range families {
			for _, h := range []*host{one, two} {
				if got := all[i].of(family, h); math.Abs(got-0.5) > tolerance {
					errs = append(errs, fmt.Errorf("%s sent %.0f %% of its %s flows to %s, want about 50 %%", client.name, 100*got, name, h.name))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// moved is a move, for the report.
type moved struct {
	how      string
	from, to *host
	became   fates
}

func (m *mesh) report(out io.Writer, moves []moved, all []shares) {
	columns := []stage.Column{
		{Title: "MOVE"},
		{Title: "FROM, TO"},
		{Title: "BY"},
		{Title: "PROBES", Right: true},
		{Title: "LOST", Right: true},
		{Title: "LONGEST GAP", Right: true},
		{Title: "FOLLOWED AFTER", Right: true},
	}
	var rows [][]string
	for _, move := range moves {
		for family, name := range families {
			f := move.became[family]
			rows = append(rows, []string{
				move.how, move.from.name + " → " + move.to.name, name,
				fmt.Sprint(f.sent), fmt.Sprint(f.lost), milliseconds(f.gap), milliseconds(f.followed),
			})
		}
	}
	stage.WriteTable(out, columns, rows)

	one, two := m.last()
	fmt.Fprintln(out)
	columns = []stage.Column{{Title: "FLOWS OF"}, {Title: "TO"}, {Title: "BY"}, {Title: one.name, Right: true}, {Title: two.name, Right: true}}
	rows = nil
	for i, client := range m.clients() {
		for family, name := range families {
			row := []string{client.name, fmt.Sprint(shared.prefix(family)), name}
			for _, h := range []*host{one, two} {
				row = append(row, fmt.Sprintf("%.0f %%", 100*all[i].of(family, h)))
			}
			rows = append(rows, row)
		}
	}
	stage.WriteTable(out, columns, rows)
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
