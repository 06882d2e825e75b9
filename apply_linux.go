package overlay

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"example.com/overlay/internal/kernel"
	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// netnsID identifies a network namespace; the zero value is one that is not known.
type netnsID struct{ dev, ino uint64 }

func netnsOf(stat *unix.Stat_t) netnsID { return netnsID{uint64(stat.Dev), stat.Ino} }

// currentNetNS is the namespace of the calling thread.
func currentNetNS() netnsID {
	var stat unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &stat) != nil {
		return netnsID{} // no procfs: names alone have to do
	}
	return netnsOf(&stat)
}

// reached asks the descriptors for the device's name, and makes sure that it has not left our namespace, where its number may
// be another's by now (kernel.md A24). The name is "" if every queue is closed.
func (d *tunDevice) reached() (name string, err error) {
	for _, q := range d.queues {
		closed := q.raw.Control(func(fd uintptr) {
			if name, _, err = getIff(int(fd)); err == nil {
				err = d.atHome(int(fd))
			}
		})
		if closed == nil {
			break
		}
	}
	if errors.Is(err, unix.EBADFD) {
		err = ErrGone
	}
	return name, err
}

// atHome compares namespaces, as far as the kernel tells: without CAP_NET_ADMIN it does not (kernel.md V17), but then nothing can
// be written either.
func (d *tunDevice) atHome(queue int) error {
	if d.home == (netnsID{}) {
		return nil
	}
	fd, err := deviceNetNS(queue)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err == nil && netnsOf(&stat) != d.home {
		return fmt.Errorf("%w: %w", ErrGone, errMoved)
	}
	return nil
}

// ownLink reads the link, and makes sure that it is the one behind our descriptors.
func (d *tunDevice) ownLink(c conn) (kernel.Link, error) {
	const tries = 100 // it may be renamed between two questions
	for range tries {
		name, err := d.reached()
		if err != nil {
			return kernel.Link{}, err
		}
		link, err := getLink(c, rtnl.GetLink(d.index))
		if err != nil || link.Name == name || name == "" {
			return link, err
		}
	}
	return kernel.Link{}, fmt.Errorf("%w: interface %d is another's now", ErrGone, d.index)
}

// phase groups the steps that may share a send: those of one phase do not depend on each other's success.
type phase uint8

const (
	phaseLink phase = iota
	phaseProcfs
	phaseAddress
	phaseUp // and routes: a link that is down refuses them (kernel.md V27)
	phaseDelRoute
)

func (s step) phase() phase {
	switch s.kind {
	case stepSetting:
		if _, ok := netlinkSettings[s.setting]; !ok || s.now {
			return phaseProcfs
		}
	case stepAddAddr, stepDelAddr:
		return phaseAddress
	case stepUp, stepAddRoute:
		return phaseUp
	case stepDelRoute:
		return phaseDelRoute
	}
	return phaseLink
}

// samePhase counts the steps up to the next phase.
func samePhase(steps []step) int {
	n := 1
	for n < len(steps) && steps[n].phase() == steps[0].phase() {
		n++
	}
	return n
}

// held says whether the kernel's refusal means that the step's end was reached already.
func (s step) held(err error) bool {
	switch s.kind {
	case stepAddAddr, stepAddRoute:
		return errors.Is(err, unix.EEXIST)
	case stepDelAddr:
		return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENXIO) // ENXIO: the device has no IPv6 any more
	case stepDelRoute:
		return errors.Is(err, unix.ESRCH)
	}
	return false
}

// apply carries out the steps of one phase and returns an error or nil for each.
func (d *tunDevice) apply(steps []step) []error {
	if steps[0].phase() == phaseProcfs {
		return d.writeProcfs(steps)
	}
	const most = 1000 // at a time: a hundred thousand messages need not all be there at once
	results := make([]error, 0, len(steps))
	for part := range slices.Chunk(steps, most) {
		if n := len(results); n > 0 && errors.Is(results[n-1], rtnl.ErrUnknown) { // nobody knows where we are: look first
			results = append(results, slices.Repeat(results[n-1:], len(steps)-n)...)
			break
		}
		requests := make([]rtnl.Message, len(part))
		for i := range part {
			requests[i] = d.request(&part[i])
		}
		for i, r := range d.ctl.Do(requests...) {
			if r.Err == nil && part[i].kind == stepDelRoute {
				r.Err = d.checkEcho(part[i].route, r.Answers)
			}
			results = append(results, r.Err)
		}
	}
	return results
}

// netlinkSettings are the settings that RTM_SETLINK knows.
var netlinkSettings = map[setting]func(index, value int) rtnl.Message{
	settingIPv4Redirects:   ipv4Setting(rtnl.IPv4AcceptRedirects),
	settingIPv4Sends:       ipv4Setting(rtnl.IPv4SendRedirects),
	settingIPv4SourceRoute: ipv4Setting(rtnl.IPv4AcceptSourceRoute),
	settingIPv4Promote:     ipv4Setting(rtnl.IPv4PromoteSecondaries),
	settingIPv6AddrGen:     rtnl.SetLinkAddrGenMode,
}

func ipv4Setting(number int) func(index, value int) rtnl.Message {
	return func(index, value int) rtnl.Message { return rtnl.SetLinkIPv4(index, number, value) }
}

// request is the step as a message.
func (d *tunDevice) request(s *step) rtnl.Message {
	switch s.kind {
	case stepMTU:
		return rtnl.SetLinkMTU(d.index, s.to)
	case stepTxQueueLen:
		return rtnl.SetLinkTxQueueLen(d.index, s.to)
	case stepSetting:
		return netlinkSettings[s.setting](d.index, s.to)
	case stepAddAddr:
		return rtnl.AddAddr(d.index, s.addr)
	case stepDelAddr:
		return rtnl.DelAddr(d.index, s.addr)
	case stepUp:
		return rtnl.SetLinkUp(d.index, s.to != 0)
	case stepAddRoute:
		return rtnl.AddRoute(s.route)
	case stepDelRoute:
		if s.exact {
			return rtnl.DelRouteExactly(s.route)
		}
		return rtnl.DelRoute(s.route)
	}
	panic("overlay: a step without a kind") // plan makes none
}

// checkEcho makes sure that the kernel deleted what it was asked to: it takes metric 0 for any, so a route of ours with
// another metric may have gone where the one meant was gone already (kernel.md V13). That one is put back.
func (d *tunDevice) checkEcho(meant kernel.Route, answers []rtnl.Message) error {
	var err error
	for _, m := range answers {
		r, _, bad := rtnl.DecodeRoute(m)
		if bad != nil || r.RouteKey == meant.RouteKey && r.Protocol == meant.Protocol && r.Link == meant.Link {
			continue
		}
		r.Message = string(m.Body)
		err = unix.ESRCH
		if back := d.ctl.Do(rtnl.AddRoute(r))[0].Err; back != nil && !errors.Is(back, unix.EEXIST) {
			err = fmt.Errorf("%s went instead, and cannot be put back: %w", routeText(r), back)
		}
	}
	return err
}

// writeProcfs writes IPv6 settings that netlink cannot set. The directory is found by name and used only if the name is still the
// device's afterwards; one that was renamed since answers ENOENT.
func (d *tunDevice) writeProcfs(steps []step) []error {
	results := make([]error, len(steps))
	for range 3 {
		dir, err := d.openProcfs()
		for i, s := range steps {
			results[i] = err
			if err == nil {
				results[i] = writeAt(dir, strings.TrimPrefix(string(s.setting), "ipv6/"), s.to)
			}
		}
		if err == nil {
			unix.Close(dir)
		}
		if !errors.Is(errors.Join(results...), unix.ENOENT) {
			break
		}
	}
	return results
}

// openProcfs opens the device's directory of IPv6 settings.
func (d *tunDevice) openProcfs() (int, error) {
	if d.procfs < 0 {
		return -1, errors.New("/proc/sys/net/ipv6/conf could not be opened")
	}
	link, err := d.ownLink(d.ctl)
	if err != nil {
		return -1, err
	}
	dir, err := unix.Openat(d.procfs, link.Name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	again, err := d.ownLink(d.ctl)
	if err == nil && again.Name != link.Name {
		err = unix.ENOENT
	}
	if err != nil {
		unix.Close(dir)
		return -1, err
	}
	return dir, nil
}

func writeAt(dir int, name string, value int) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, strconv.AppendInt(nil, int64(value), 10))
	return err
}

// readProcfs reads a setting below /proc/sys/net/ipv6/conf; "" if it cannot.
func (d *tunDevice) readProcfs(path string) string {
	fd, err := unix.Openat(d.procfs, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var b [16]byte
	n, _ := unix.Read(fd, b[:])
	return strings.TrimSpace(string(b[:max(n, 0)]))
}
