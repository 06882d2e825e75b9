package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// question asks who answers for a route of ours.
type question struct {
	route   kernel.Route
	dst     netip.Addr
	refused error // the answer for another address of it
}

// shadows tells where somebody else answers in our place.
func (d *tunDevice) shadows(have *observed, want *desired, cfg *Config) {
	found := d.shadowsOf(have, want, cfg, want.routes)
	d.viewMu.Lock()
	d.shadowed = found
	d.viewMu.Unlock()
	d.tellShadows(found)
}

// someShadows is shadows where only these prefixes may have got or lost one, of which the routes are left; it returns those that are
// new.
func (d *tunDevice) someShadows(have *observed, want *desired, cfg *Config, routes []kernel.Route, looked map[netip.Prefix]bool) []shadow {
	found := d.shadowsOf(have, want, cfg, routes)
	all, news := overshadow(d.shadowed, found, looked) // changed only by who holds d.mu, as we do
	d.viewMu.Lock()
	d.shadowed = all
	d.viewMu.Unlock()
	return news
}

// worthAsking are those of cfg's routes for these prefixes of which it is worth asking who answers: in the main table, and, where
// they are many, with a rival.
func (d *tunDevice) worthAsking(cfg *Config, want *desired, prefixes map[netip.Prefix]bool) (routes []kernel.Route) {
	if len(prefixes) > fewQuestions {
		if rivals, ok := d.rivals(func(p netip.Prefix) bool { return prefixes[p] }, want.protocol); ok {
			prefixes = rivals
		}
	}
	if len(prefixes) == 0 {
		return nil
	}
	for i := range cfg.Routes {
		if r := &cfg.Routes[i]; prefixes[r.Prefix] && !r.NoInstall && r.table() == kernel.TableMain {
			routes = append(routes, want.route(cfg, cfg.keyOf(r), d.index, cfg.routeMTU(r)))
		}
	}
	return routes
}

func (d *tunDevice) tellShadows(found []shadow) {
	if len(found) == 0 {
		return
	}
	d.notify(Event{Kind: EventShadowed, N: len(found), Err: errors.New(brief(found, func(s shadow) string { return s.text }))})
}

// shadowsOf asks the kernel about routes: an equal route of another interface that stands before ours is never seen in a look
// at our own (kernel.md V12).
func (d *tunDevice) shadowsOf(have *observed, want *desired, cfg *Config, routes []kernel.Route) []shadow {
	const looks = 4 // a stranger's longer prefix may hide a route of ours: another address then
	var found []shadow
	seen := make(map[shadow]bool)
	note := func(s shadow) {
		if !seen[s] {
			seen[s] = true
			found = append(found, s)
		}
	}
	for _, r := range obscured(have, want) {
		note(ownShadow(r, have.link.Name))
	}
	routes = asked(routes)
	if len(routes) > fewQuestions {
		if rivals, ok := d.rivals(d.tree.routed, want.protocol); ok {
			routes = slices.DeleteFunc(slices.Clone(routes), func(r kernel.Route) bool { return !rivals[r.Prefix] })
		}
	}
	probes := newProbes(cfg.Networks, d.tree.longest)
	var questions []question
	for _, r := range routes {
		if dst, ok := probes.first(r.Prefix); ok {
			questions = append(questions, question{route: r, dst: dst})
		}
	}
	for look := 0; look < looks && len(questions) > 0; look++ {
		var again []question
		for i, result := range d.match(questions) {
			q := questions[i]
			other, shadow := d.answer(&q, result, want)
			if shadow.text != "" {
				note(shadow)
			} else if dst, ok := probes.after(q.route.Prefix, other); ok {
				again = append(again, question{q.route, dst, q.refused})
			}
		}
		questions = again
	}
	return found
}

// fewQuestions is how many there may be before a look at all that others have is cheaper.
const fewQuestions = 256

// rivals are the concerned prefixes for which somebody else has a route of that very prefix, through whatever interface; false: they
// cannot be told.
func (d *tunDevice) rivals(concerned func(netip.Prefix) bool, protocol uint8) (map[netip.Prefix]bool, bool) {
	rivals := make(map[netip.Prefix]bool)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		request := rtnl.GetAllRoutes(family)
		request.Keep = func(m rtnl.Message) bool {
			prefix, by := rtnl.PeekRoute(m)
			if (by != protocol || rtnl.PeekLink(m) != d.index) && concerned(prefix) { // another device of ours is a rival too
				rivals[prefix] = true
			}
			return false
		}
		if _, err := d.ctl.Dump(request); err != nil {
			return nil, false
		}
	}
	return rivals, true
}

// ownShadow is cast by a route through the device itself.
func ownShadow(r kernel.Route, device string) shadow {
	return shadow{r.Prefix, fmt.Sprintf("%v is answered by %s itself, protocol %d, mtu %d", r.Prefix, device, r.Protocol, r.MTU)}
}

func (d *tunDevice) match(questions []question) []rtnl.Result {
	requests := make([]rtnl.Message, len(questions))
	for i, q := range questions {
		requests[i] = rtnl.MatchRoute(q.dst)
	}
	return d.ctl.Do(requests...)
}

// answer says who answers for q instead of us. other, if set, is what the answer is about instead: a longer prefix.
func (d *tunDevice) answer(q *question, result rtnl.Result, want *desired) (other netip.Prefix, by shadow) {
	r := q.route
	if refused := (*rtnl.Error)(nil); errors.As(result.Err, &refused) {
		if q.refused != nil || r.Prefix.IsSingleIP() {
			return other, shadow{r.Prefix, fmt.Sprintf("%v is answered by a route that leads nowhere: %v", r.Prefix, refused)}
		}
		q.refused = refused // perhaps of a part of it only: look at the other half
		return netip.PrefixFrom(q.dst, r.Prefix.Bits()+1).Masked(), by
	}
	if result.Err != nil || len(result.Answers) != 1 {
		return other, by // not told
	}
	got, _, err := rtnl.DecodeRoute(result.Answers[0])
	switch {
	case err != nil, got.Prefix.Bits() < r.Prefix.Bits(): // a shorter one: ours went since we looked
		return other, by
	case got.Prefix != r.Prefix:
		if got.Link == d.index {
			return other, by
		}
		return got.Prefix, by
	case got.Link != d.index:
		return other, shadow{r.Prefix, fmt.Sprintf("%v is answered by %s, protocol %d", r.Prefix, d.linkName(got.Link), got.Protocol)}
	case got.Protocol != want.protocol:
		d.trust.contested = true
		if !want.does(got, r) {
			by = ownShadow(got, d.linkName(d.index))
		}
	}
	return other, by
}

// linkName names another interface for people.
func (d *tunDevice) linkName(index int) string {
	if index == 0 {
		return "several interfaces"
	}
	link, err := getLink(d.ctl, rtnl.GetLink(index))
	if err != nil {
		return fmt.Sprintf("interface %d", index)
	}
	return link.Name
}
