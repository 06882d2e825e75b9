package overlay

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
)

// newIdle returns the device of Config.Disabled, for hosts that only relay. It has no kernel part: RoutesFor and NextHop answer,
// reads wait for Close, writes are counted and dropped. The Name "" becomes disabled, and %d becomes 0. cfg is valid.
func newIdle(cfg Config) Device {
	d := newMemoryDevice(newWire(cfg), memoryName(cfg.Name, "disabled"))
	d.logTo(cfg.Logger)
	d.up.Store(true) // nothing to bring up: writes succeed from the start
	d.publish(d.wire.cfg.Load())
	return d
}

// memoryDevice is a device without a kernel: an end of a Pipe or, with no peer, the device of Config.Disabled. It has no
// goroutine, and nothing that the garbage collector would not take.
type memoryDevice struct {
	core
	name    string
	host    bool          // plays the kernel
	peer    *memoryDevice // nil: none, what is written is dropped
	wire    *wire
	queues  []*memoryQueue
	open    atomic.Int32 // queues that are not closed
	up      atomic.Bool
	closing atomic.Bool
	mu      sync.Mutex // one of Activate, Reload, Close at a time
	telling sync.Mutex // locked after mu; Close waits for it
	once    sync.Once
}

func newMemoryDevice(w *wire, name string) *memoryDevice {
	d := &memoryDevice{name: name, wire: w}
	for i := range w.cfg.Load().queues() {
		q := &memoryQueue{device: d, index: i}
		q.arrived.L = &q.mu
		d.queues = append(d.queues, q)
	}
	d.open.Store(int32(len(d.queues)))
	return d
}

// alive returns why the device can be configured no more, or nil.
func (d *memoryDevice) alive() error {
	switch {
	case d.closing.Load():
		return os.ErrClosed
	case d.wire.gone.Load():
		return ErrGone
	}
	return nil
}

// tell is notify, but for a device that is closed or being closed: to who asked for it the end is no news, and once Close
// returns nothing more is logged.
func (d *memoryDevice) tell(kind EventKind) {
	d.telling.Lock()
	defer d.telling.Unlock()
	if !d.closing.Load() {
		d.notify(Event{Kind: kind})
	}
}

// Activate implements Device.
func (d *memoryDevice) Activate() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.alive(); err != nil {
		return err
	}
	if !d.up.Swap(true) {
		d.tell(EventUp)
	}
	return nil
}

// Reload implements Device.
func (d *memoryDevice) Reload(cfg Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.alive(); err != nil {
		return err
	}
	if d.host {
		return opError("reload", d.name, errors.ErrUnsupported)
	}
	if err := cfg.Validate(); err != nil {
		return err
	}
	old := d.wire.cfg.Load()
	if err := restart(old, &cfg); err != nil {
		return err
	}
	next := cfg.clone()
	d.wire.cfg.Store(&next)
	d.publish(&next)
	if d.peer != nil && d.up.Load() && old.deviceMTU() != next.deviceMTU() {
		d.tell(EventChanged)
	}
	return nil
}

// Close implements Device.
func (d *memoryDevice) Close() error {
	d.closing.Store(true)
	d.once.Do(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, q := range d.queues {
			q.Close() // the last one cuts the wire
		}
		d.telling.Lock() // waits for who tells
		defer d.telling.Unlock()
		d.events.close()
	})
	return nil
}

// lose tells an end that the link is gone, and wakes its readers. What the kernel was given it has; what it has not handed
// over is lost with the link.
func (d *memoryDevice) lose() {
	d.tell(EventGone)
	for _, q := range d.queues {
		q.wake()
		if !d.host {
			q.discard()
		}
	}
}

// Queues implements Device.
func (d *memoryDevice) Queues() []Queue {
	queues := make([]Queue, len(d.queues))
	for i, q := range d.queues {
		queues[i] = q
	}
	return queues
}

// Stats implements Device.
func (d *memoryDevice) Stats() Stats {
	all := make([]*traffic, len(d.queues))
	for i, q := range d.queues {
		all[i] = &q.traffic
	}
	return d.stats(all...)
}

// State implements Device.
func (d *memoryDevice) State() State {
	cfg := d.wire.cfg.Load()
	s := State{Name: d.name, MTU: cfg.deviceMTU(), table: d.tree.current.Load()}
	if d.peer != nil {
		s.Offload = (OffloadTCP | OffloadUDP) &^ cfg.NoOffload
		if d.alive() == nil {
			s.Index, s.Up = 1, d.up.Load()
		}
	}
	s.report = report{queues: len(d.queues), stats: d.Stats()}
	if !d.host {
		s.report.config = cfg.clone()
		s.Networks = cfg.clone().Networks
	}
	return s
}
