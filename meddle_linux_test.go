package overlay

import (
	"strings"
	"sync"

	"example.com/overlay/internal/rtnl"
	"golang.org/x/sys/unix"
)

// meddler sits between a device and the kernel. Its fields are set before the device is used.
type meddler struct {
	conn
	mu  sync.Mutex
	n   int      // operations so far: each request and each dump is one
	log []string // what they were

	before func(n int, m rtnl.Message)            // called before the n-th, from 1
	fail   func(n int, m rtnl.Message) misfortune // what becomes of it
}

// misfortune is what befalls an operation.
type misfortune struct {
	err  error // nil: nothing
	done bool  // it is carried out all the same
}

// meddle puts a meddler in front of d's connection for Activate, Reload and healing, after setting it up. The returned function
// takes it away.
func meddle(d *tunDevice, setUp ...func(*meddler)) (m *meddler, remove func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	real := d.ctl
	m = &meddler{conn: real}
	for _, set := range setUp {
		set(m)
	}
	d.ctl = m
	return m, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.ctl = real
	}
}

func (m *meddler) next(request rtnl.Message) misfortune {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.n++
	m.log = append(m.log, messageName(request))
	if m.before != nil {
		m.before(m.n, request)
	}
	if m.fail == nil {
		return misfortune{}
	}
	return m.fail(m.n, request)
}

func (m *meddler) Do(requests ...rtnl.Message) []rtnl.Result {
	results := make([]rtnl.Result, len(requests))
	var rest []rtnl.Message
	var places []int
	for i, r := range requests {
		bad := m.next(r)
		results[i].Err = bad.err
		if bad.err == nil || bad.done {
			rest, places = append(rest, r), append(places, i)
		}
	}
	if len(rest) == 0 {
		return results
	}
	for i, r := range m.conn.Do(rest...) {
		if results[places[i]].Err == nil {
			results[places[i]] = r
		}
	}
	return results
}

func (m *meddler) Dump(request rtnl.Message) ([]rtnl.Message, error) {
	if bad := m.next(request); bad.err != nil {
		return nil, bad.err
	}
	return m.conn.Dump(request)
}

// changes lists the operations that are no questions.
func (m *meddler) changes() (list []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range m.log {
		if !strings.HasPrefix(name, "GET") {
			list = append(list, name)
		}
	}
	return list
}

// around is a connection that does something before and after its first request.
type around struct {
	conn
	before, after func() // nil: nothing
	done          bool
}

func (a *around) Do(requests ...rtnl.Message) []rtnl.Result {
	first := !a.done
	a.done = true
	if first && a.before != nil {
		a.before()
	}
	results := a.conn.Do(requests...)
	if first && a.after != nil {
		a.after()
	}
	return results
}

func messageName(m rtnl.Message) string {
	names := map[uint16]string{
		unix.RTM_NEWLINK: "NEWLINK", unix.RTM_DELLINK: "DELLINK", unix.RTM_GETLINK: "GETLINK", unix.RTM_SETLINK: "SETLINK",
		unix.RTM_NEWADDR: "NEWADDR", unix.RTM_DELADDR: "DELADDR", unix.RTM_GETADDR: "GETADDR",
		unix.RTM_NEWROUTE: "NEWROUTE", unix.RTM_DELROUTE: "DELROUTE", unix.RTM_GETROUTE: "GETROUTE",
	}
	return names[m.Type]
}
