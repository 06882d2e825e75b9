package overlay

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"example.com/overlay/internal/virtio"
	"golang.org/x/sys/unix"
)

// offloads is what a device's queues may hand over unsplit. The grant is for both directions: what the kernel does not hand to
// the program it need not take either, and Config means both.
type offloads struct {
	granted atomic.Uint32 // Offload, by the kernel and Config
	blocked atomic.Uint32 // Offload that the kernel refuses to take, for now
	older   atomic.Bool   // the kernel takes at most 64 datagrams at once: one before 6.9
	fails   *atomic.Uint64

	mu     sync.Mutex
	again  time.Time          // when what is blocked is to be tried
	probes map[Offload][]byte // of what is blocked
	tell   func(why error)    // nil: nobody
	clock  func() time.Time   // nil: time.Now
}

// offloadPause is how long the kernel is not asked again to take what it refused.
const offloadPause = time.Minute

// offloadMask is the kernel's mask for a set. It takes no segmentation without checksums, nor one IP version's datagrams alone.
func offloadMask(o Offload) int {
	mask := 0
	if o&OffloadTCP != 0 {
		mask |= unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	}
	if o&OffloadUDP != 0 {
		mask |= unix.TUN_F_CSUM | unix.TUN_F_USO4 | unix.TUN_F_USO6
	}
	return mask
}

// offloadsOf sets the offloads of the device that a descriptor belongs to.
func offloadsOf(fd int) func(mask int) error {
	return func(mask int) error { return setOffload(fd, mask) }
}

// grant asks the kernel for the offloads of a device whose packets have a virtio header, best first, and returns what it got. The
// mask is the device's and outlives descriptors, so it is set in any case, to 0 too (kernel.md C1, U49).
func grant(set func(mask int) error, header int, without Offload) (Offload, error) {
	wanted := (OffloadTCP | OffloadUDP) &^ without
	if header == 0 {
		wanted = 0
	}
	var err error
	for _, rung := range []Offload{wanted, wanted & OffloadTCP, 0} { // kernels before 6.2 have none for UDP
		if err = set(offloadMask(rung)); err == nil {
			return rung, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return 0, fmt.Errorf("set offload: %w", err)
}

// usable returns what may be written unsplit now.
func (o *offloads) usable() Offload { return Offload(o.granted.Load() &^ o.blocked.Load()) }

// How many datagrams there may be in one superpacket: since 6.9, and before.
const (
	manyDatagrams = 128
	fewDatagrams  = 64
)

func (o *offloads) datagrams() int {
	if o.older.Load() {
		return fewDatagrams
	}
	return manyDatagrams
}

func (o *offloads) now() time.Time {
	if o.clock != nil {
		return o.clock()
	}
	return time.Now()
}

// note tells what is blocked, for State; "": nothing.
func (o *offloads) note() string {
	if kinds := Offload(o.granted.Load() & o.blocked.Load()); kinds != 0 {
		return fmt.Sprintf("the kernel takes no superpackets of %v for now", kinds)
	}
	return ""
}

// refused notes that the kernel answered EINVAL to a superpacket. It may so answer to any malformed packet; only if it also refuses
// one that is known to be good has it lost the ability, as some updates did (kernel.md V24, C3).
func (o *offloads) refused(h virtio.Header, segments int, write func(packet []byte) error) {
	kind := OffloadTCP
	switch h.GSOType {
	case virtio.GSONone: // a checksum alone
		return
	case virtio.GSOUDPL4:
		kind = OffloadUDP
	}
	o.fails.Add(1)
	refuses := func(probe []byte) error {
		if err := write(probe); errors.Is(err, unix.EINVAL) {
			return err
		}
		return nil
	}
	probe := virtio.Probe(h.GSOType, 2)
	if err := refuses(probe); err != nil {
		o.block(kind, probe, err)
	} else if kind == OffloadUDP && segments > fewDatagrams && !o.older.Load() && refuses(virtio.Probe(h.GSOType, fewDatagrams+1)) != nil {
		o.older.Store(true)
	}
}

func (o *offloads) block(kind Offload, probe []byte, err error) {
	o.mu.Lock()
	fresh := o.probes[kind] == nil
	if o.probes == nil {
		o.probes = make(map[Offload][]byte)
	}
	o.probes[kind], o.again = probe, o.now().Add(offloadPause)
	o.blocked.Or(uint32(kind))
	o.mu.Unlock()
	if fresh && o.tell != nil {
		o.tell(fmt.Errorf("the kernel takes no superpackets of %v: %w", kind, err))
	}
}

// retry asks the kernel, from time to time, whether it takes again what it refused.
func (o *offloads) retry(write func(packet []byte) error) {
	if o.blocked.Load() == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.now().Before(o.again) {
		return
	}
	o.again = o.now().Add(offloadPause)
	for kind, probe := range o.probes {
		if write(probe) == nil {
			delete(o.probes, kind)
			o.blocked.And(^uint32(kind))
		}
	}
}

// regrant changes what the queues of a device in use may hand over. The kernel takes any part of what it has granted before: if it
// does not now, the device has lost an ability.
func (d *tunDevice) regrant(without Offload) {
	for _, q := range d.queues {
		var granted Offload
		var err error
		if q.raw.Control(func(fd uintptr) { granted, err = grant(offloadsOf(int(fd)), q.header, without) }) != nil {
			continue // closed
		}
		if err != nil {
			d.note(err)
		}
		d.offloads.granted.Store(uint32(granted))
		return // it is the device's
	}
}
