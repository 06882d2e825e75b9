package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// openPipe returns a Pipe that is up.
func openPipe(t *testing.T, cfg Config) (dev, host Device) {
	t.Helper()
	dev, host, err := Pipe(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close(); host.Close() })
	wantError(t, "Activate", dev.Activate(), nil)
	wantEvents(t, dev, EventUp)
	return dev, host
}

// checkGoroutines fails a test that leaves goroutines behind.
func checkGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
			}
		}
	})
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func wantStats(t *testing.T, d Device, want Stats) {
	t.Helper()
	if got := d.Stats(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// wantEvents takes the events that wait.
func wantEvents(t *testing.T, d Device, want ...EventKind) {
	t.Helper()
	var got []EventKind
	for len(d.Events()) > 0 {
		got = append(got, (<-d.Events()).Kind)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got events %v, want %v", got, want)
	}
}

func wantPackets(t *testing.T, got [][]byte, want ...[]byte) {
	t.Helper()
	if !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

// echo is a packet to 10.0.0.2.
func echo(text string) []byte {
	return flow4(netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), protoICMP, []byte("\x08\x00\x00\x00"+text)...)
}

func write(t *testing.T, q Queue, packets ...Packet) {
	t.Helper()
	if n, err := q.WriteBatch(packets); n != len(packets) || err != nil {
		t.Errorf("WriteBatch: got %d, %v, want %d taken", n, err, len(packets))
	}
}

// readSome reads so many packets one by one.
func readSome(t *testing.T, q Queue, n int) (packets [][]byte) {
	t.Helper()
	buffer := make([]byte, 65535)
	for range n {
		size, err := q.Read(buffer)
		wantError(t, "Read", err, nil)
		packets = append(packets, bytes.Clone(buffer[:size]))
	}
	return packets
}

func dataOf(packets []Packet) (data [][]byte) {
	for _, p := range packets {
		data = append(data, p.Data)
	}
	return data
}

func segmentsOf(p Packet) (packets [][]byte) {
	for i := range p.Segments() {
		packets = append(packets, p.AppendSegment(nil, i))
	}
	return packets
}

func TestPipeCarries(t *testing.T) {
	dev, host := openPipe(t, Config{Queues: 3})
	for i, q := range dev.Queues() {
		for _, way := range [][2]Queue{{q, host.Queues()[i]}, {host.Queues()[i], q}} {
			scratch := echo("once")
			if n, err := way[0].Write(scratch); n != 28 || err != nil {
				t.Fatalf("Write: got %d, %v", n, err)
			}
			clear(scratch) // the writer's again
			write(t, way[0], Packet{Data: echo("more")}, Packet{Data: echo("and more")})
			packets, err := way[1].ReadBatch()
			wantError(t, "ReadBatch", err, nil)
			_ = append(packets[0].Data, "spoils no neighbour"...)
			wantPackets(t, dataOf(packets), echo("once"), echo("more"), echo("and more"))
			write(t, way[0], Packet{Data: echo("last")})
			wantPackets(t, readSome(t, way[1], 1), echo("last"))
		}
	}
	stats := Stats{ReadPackets: 12, ReadBytes: 3 * (3*28 + 32), WritePackets: 12, WriteBytes: 3 * (3*28 + 32)}
	wantStats(t, dev, stats)
	wantStats(t, host, stats)
}

func TestPipeDownUntilActivate(t *testing.T) {
	dev, host, err := Pipe(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	defer dev.Close()
	got := make(chan [][]byte)
	go func() { got <- readSome(t, dev.Queues()[0], 1) }() // may wait before Activate
	if n, err := dev.Queues()[0].WriteBatch([]Packet{{Data: echo("a")}, {Data: echo("b")}}); n != 0 || err != ErrDown {
		t.Errorf("WriteBatch while down: got %d, %v", n, err)
	}
	wantError(t, "host's Activate", host.Activate(), nil)
	write(t, host.Queues()[0], Packet{Data: echo("too early")})
	wantStats(t, dev, Stats{WriteDown: 2, ReadDropped: 1})
	if dev.State().Up || !host.State().Up {
		t.Errorf("up: got %v and %v, want only host to be", dev.State().Up, host.State().Up)
	}
	wantError(t, "Activate", dev.Activate(), nil)
	wantError(t, "second Activate", dev.Activate(), nil)
	wantEvents(t, dev, EventUp)
	wantEvents(t, host)
	write(t, host.Queues()[0], Packet{Data: echo("in time")})
	wantPackets(t, <-got, echo("in time"))
}

func TestPipeSuperpackets(t *testing.T) {
	for offload, super := range map[Offload]Packet{OffloadTCP: {superTCP4(250), 100}, OffloadUDP: {superUDP6(250), 100}} {
		for _, none := range []Offload{0, OffloadTCP, OffloadUDP} {
			t.Run(fmt.Sprintf("%v without %v", offload, none), func(t *testing.T) {
				dev, host := openPipe(t, Config{NoOffload: none})
				carrySuperpackets(t, dev.Queues()[0], host.Queues()[0], super, offload == none)
				carrySuperpackets(t, host.Queues()[0], dev.Queues()[0], super, offload == none)
				s := dev.Stats()
				if s.ReadPackets != 9 || s.WritePackets != 9 || s.WriteSuper != 3 || s.ReadSuper != 3 && offload != none {
					t.Errorf("got %+v", s)
				}
				if got := dev.State().Offload; got != (OffloadTCP|OffloadUDP)&^none {
					t.Errorf("got offload %v", got)
				}
			})
		}
	}
}

// carrySuperpackets sends three: the first for Read, the last for ReadBatch, the other for both.
func carrySuperpackets(t *testing.T, from, to Queue, super Packet, split bool) {
	write(t, from, super, super, super)
	parts := segmentsOf(super)
	wantPackets(t, readSome(t, to, 4), append(parts, parts[0])...)
	rest, err := to.ReadBatch()
	wantError(t, "ReadBatch", err, nil)
	if split {
		wantPackets(t, dataOf(rest), append(parts[1:], parts...)...)
		return
	}
	wantPackets(t, dataOf(rest), parts[1:]...)
	if whole, err := to.ReadBatch(); err != nil || len(whole) != 1 || whole[0].SegmentSize != super.SegmentSize {
		t.Errorf("got %d packets, %v, want one superpacket", len(whole), err)
	} else {
		wantPackets(t, dataOf(whole), super.Data)
	}
}

func TestPipeRefuses(t *testing.T) {
	dev, host := openPipe(t, Config{})
	bad := map[error]Packet{
		errEmpty:     {},
		errTooLong:   {Data: echo(strings.Repeat("x", 65536-24))},
		errMalformed: {Data: echo("no TCP, no UDP"), SegmentSize: 4},
		errNotIP:     {Data: []byte("\xffnot IP")},
	}
	for reason, p := range bad {
		for _, d := range []Device{dev, host} {
			n, err := d.Queues()[0].WriteBatch([]Packet{p, {Data: echo("good")}})
			if d == host && reason == errNotIP { // a packet socket of the host sends what it likes
				wantError(t, "host's WriteBatch", err, nil)
				continue
			}
			var op *OpError
			if n != 1 || !errors.Is(err, reason) || !errors.As(err, &op) || op.Device != "pipe0" {
				t.Errorf("got %d, %v, want 1 taken and an *OpError: %v", n, err, reason)
			}
		}
	}
	if n, err := dev.Queues()[0].Write(nil); n != 0 || !errors.Is(err, errEmpty) {
		t.Errorf("empty Write: got %d, %v", n, err)
	}
	wantStats(t, dev, Stats{WriteRefused: 5, WritePackets: 4, WriteBytes: 4 * 28})
	wantStats(t, host, Stats{WriteRefused: 3, WritePackets: 5, WriteBytes: 4*28 + 7})
}

func TestPipeFilters(t *testing.T) {
	dev, host := openPipe(t, Config{})
	redirect := echo("")
	redirect[headerLen4] = 5
	write(t, dev.Queues()[0], Packet{Data: redirect}) // counts as taken
	wantStats(t, dev, Stats{WriteFiltered: 1})
	write(t, host.Queues()[0], Packet{Data: redirect}) // a kernel may send it
	wantPackets(t, readSome(t, dev.Queues()[0], 1), redirect)
	wantError(t, "Reload", dev.Reload(Config{NoFilter: true}), nil)
	write(t, dev.Queues()[0], Packet{Data: redirect})
	wantPackets(t, readSome(t, host.Queues()[0], 1), redirect)
}

func TestPipeDropsWhenFull(t *testing.T) {
	for length, room := range map[int]int{0: 500, 3: 3} {
		dev, host := openPipe(t, Config{TxQueueLen: length})
		for _, way := range [][2]Device{{dev, host}, {host, dev}} {
			from, to := way[0].Queues()[0], way[1].Queues()[0]
			for i := range room + 7 {
				write(t, from, Packet{Data: echo(fmt.Sprint(i))})
			}
			write(t, from, Packet{superTCP4(250), 100})
			if n := way[1].Stats().ReadDropped; n != 10 {
				t.Errorf("room for %d: %d packets dropped, want 10", room, n)
			}
			wantPackets(t, readSome(t, to, 1), echo("0")) // the others still wait
			write(t, from, Packet{Data: echo("last")}, Packet{Data: echo("lost")})
			wantPackets(t, readSome(t, to, room)[room-2:], echo(fmt.Sprint(room-1)), echo("last"))
		}
	}
}

func TestPipeShortBuffer(t *testing.T) {
	dev, host := openPipe(t, Config{})
	super := Packet{superTCP4(101), 100}
	write(t, host.Queues()[0], Packet{Data: echo("too long")}, super)
	for range 2 {
		_, err := dev.Queues()[0].Read(make([]byte, 31))
		wantError(t, "Read", err, io.ErrShortBuffer)
	}
	wantPackets(t, readSome(t, dev.Queues()[0], 1), segmentsOf(super)[1])
	wantStats(t, dev, Stats{ReadDropped: 2, ReadPackets: 1, ReadBytes: 41, ReadSuper: 1})
}

// Flows of a closed queue move to another, its backlog is lost (kernel.md U51, V18).
func TestPipeClosedQueue(t *testing.T) {
	dev, host := openPipe(t, Config{Queues: 2})
	in, out := dev.Queues(), host.Queues()
	parked := make(chan error)
	go func() { _, err := in[0].ReadBatch(); parked <- err }()
	wantError(t, "Close", in[0].Close(), nil)
	wantError(t, "a parked read", <-parked, os.ErrClosed)
	_, err := in[0].Write(echo(""))
	wantError(t, "Write to a closed queue", err, os.ErrClosed)
	write(t, out[1], Packet{Data: echo("to the second")})
	write(t, out[0], Packet{Data: echo("moved there")})
	wantPackets(t, readSome(t, in[1], 2), echo("to the second"), echo("moved there"))
	write(t, in[1], Packet{Data: echo("still open")})
	wantPackets(t, readSome(t, out[1], 1), echo("still open"))

	super := Packet{superTCP4(250), 100}
	write(t, out[1], super, Packet{Data: echo("lost")}, super)
	readSome(t, in[1], 1)
	wantEvents(t, dev)
	in[1].Close() // nobody holds the device any more
	wantEvents(t, dev, EventGone)
	wantEvents(t, host, EventGone)
	if n := dev.Stats().ReadDropped; n != 2+1+3 {
		t.Errorf("%d packets dropped, want 6", n)
	}
	wantError(t, "Reload", dev.Reload(Config{Queues: 2}), ErrGone)
	_, err = out[1].Write(echo(""))
	wantError(t, "Write to nobody", err, ErrGone)
}

// wantEnded calls all that can fail of a device with two queues.
func wantEnded(t *testing.T, d Device, want error) {
	t.Helper()
	wantError(t, "Activate", d.Activate(), want)
	wantError(t, "Reload", d.Reload(Config{Queues: 2}), want)
	for _, q := range d.Queues() {
		_, err := q.Read(make([]byte, 99))
		wantError(t, "Read", err, want)
		_, err = q.ReadBatch()
		wantError(t, "ReadBatch", err, want)
		_, err = q.Write(echo(""))
		wantError(t, "Write", err, want)
		_, err = q.WriteBatch([]Packet{{Data: echo("")}})
		wantError(t, "WriteBatch", err, want)
		_, err = q.WriteBatch(nil)
		wantError(t, "empty WriteBatch", err, want)
		if want == os.ErrClosed {
			_, err = q.File()
			wantError(t, "File", err, want)
			wantError(t, "second Close", q.Close(), nil)
		}
	}
	if s := d.State(); s.Index != 0 || s.Up {
		t.Errorf("got %v", s)
	}
}

// Whichever end closes, its own calls end with os.ErrClosed, the other's with ErrGone.
func TestPipeClose(t *testing.T) {
	for _, hostCloses := range []bool{false, true} {
		checkGoroutines(t)
		dev, host := openPipe(t, Config{Queues: 2})
		write(t, dev.Queues()[1], Packet{Data: echo("the kernel has it")})
		write(t, host.Queues()[0], Packet{Data: echo("lost")})
		first, second := dev, host
		if hostCloses {
			first, second = host, dev
		}
		parked := make(chan error)
		park := func(q Queue) { go func() { _, err := q.Read(make([]byte, 99)); parked <- err }() }
		park(dev.Queues()[1])
		park(host.Queues()[0])
		time.Sleep(time.Millisecond)
		wantError(t, "Close", first.Close(), nil)
		if a, b := <-parked, <-parked; !(a == os.ErrClosed && b == ErrGone || a == ErrGone && b == os.ErrClosed) {
			t.Errorf("parked reads: got %v and %v", a, b)
		}
		if !hostCloses {
			wantPackets(t, readSome(t, host.Queues()[1], 1), echo("the kernel has it"))
		}
		wantEnded(t, first, os.ErrClosed)
		wantEnded(t, second, ErrGone)
		wantEvents(t, second, EventGone)
		if _, open := <-first.Events(); open {
			t.Error("an event for who closed")
		}
		if n := dev.Stats().ReadDropped; n != 1 {
			t.Errorf("%d packets dropped, want 1", n)
		}
		wantError(t, "second Close", first.Close(), nil)
		wantError(t, "Close of the other", second.Close(), nil)
		wantEnded(t, second, os.ErrClosed)
	}
}

func TestPipeConfig(t *testing.T) {
	for field, cfg := range map[string]Config{"Disabled": {Disabled: true}, "MTU": {MTU: 1}} {
		_, _, err := Pipe(cfg)
		if refused := new(ConfigError); !errors.As(err, &refused) || refused.Field != field {
			t.Errorf("got %v, want a *ConfigError of %s", err, field)
		}
	}
	cfg := Config{Name: "t%d", MTU: 1400, Networks: prefixes("10.0.0.1/24"), Routes: []Route{routeTo("10.0.0.2/32", "10.0.0.7")}}
	dev, host := openPipe(t, cfg)
	for _, s := range []State{dev.State(), host.State()} {
		if s.Name != "t0" || s.Index != 1 || s.MTU != 1400 || !s.Up {
			t.Errorf("got %v", s)
		}
	}
	if s := dev.State(); !slices.Equal(s.Networks, cfg.Networks) || !strings.Contains(s.String(), "route 10.0.0.2/32 via 10.0.0.7") {
		t.Errorf("got %v", s)
	}
	wantHop := func(d Device, want string) {
		t.Helper()
		hop, ok := d.NextHop(echo(""), nil)
		if _, known := d.RoutesFor(netip.MustParseAddr("10.0.0.2")); known != ok || ok != (want != "") || ok && hop.String() != want {
			t.Errorf("got %v, %v and %v, want %q", hop, ok, known, want)
		}
	}
	wantHop(dev, "10.0.0.7")
	wantHop(host, "")
	fixed := cfg
	fixed.Queues = 2
	wantError(t, "Reload of a fixed field", dev.Reload(fixed), ErrRestart)
	wantError(t, "host's Reload", host.Reload(cfg), errors.ErrUnsupported)
	wantEvents(t, dev)
	cfg.Routes, cfg.MTU = nil, 1500
	wantError(t, "Reload", dev.Reload(cfg), nil)
	wantEvents(t, dev, EventChanged)
	wantHop(dev, "10.0.0.2")
	_, err := dev.Queues()[0].File()
	wantError(t, "File", err, errors.ErrUnsupported)
}

// What a writer was told is taken is read or counted as dropped, whoever closes what meanwhile.
func TestPipeConcurrently(t *testing.T) {
	checkGoroutines(t)
	for round := range 40 {
		dev, host := openPipe(t, Config{Queues: 3, TxQueueLen: 20})
		var all sync.WaitGroup
		untilEnd := func(call func() error) {
			all.Go(func() {
				for err := error(nil); !errors.Is(err, os.ErrClosed) && !errors.Is(err, ErrGone); err = call() {
					runtime.Gosched() // or Close waits for a turn
				}
			})
		}
		for _, d := range []Device{dev, host} {
			for _, q := range d.Queues() {
				untilEnd(func() error { _, err := q.WriteBatch([]Packet{{Data: echo("")}, {superTCP4(250), 100}}); return err })
				untilEnd(func() error { _, err := q.Write(echo("one")); return err })
				untilEnd(func() error { _, err := q.ReadBatch(); return err })
				untilEnd(func() error { _, err := q.Read(make([]byte, 300)); return err })
			}
			untilEnd(func() error { _ = d.State().String(); d.NextHop(echo(""), nil); return d.Activate() })
			untilEnd(func() error { return d.Reload(Config{Queues: 3, TxQueueLen: 20, MTU: 1300 + round}) })
		}
		time.Sleep(time.Duration(round%10) * 100 * time.Microsecond)
		d, h := dev.Queues(), host.Queues()
		for _, end := range [][]func() error{
			{dev.Close, host.Close},
			{host.Close, host.Close, dev.Close},
			{d[1].Close, dev.Close, dev.Close, host.Close},
			{h[0].Close, h[1].Close, h[2].Close, d[0].Close, d[1].Close, d[2].Close},
		}[round%4] {
			all.Go(func() { end() })
		}
		all.Wait()
		for _, s := range [][2]Stats{{dev.Stats(), host.Stats()}, {host.Stats(), dev.Stats()}} {
			if s[0].WritePackets != s[1].ReadPackets+s[1].ReadDropped {
				t.Fatalf("round %d: wrote %d, read %d, dropped %d", round, s[0].WritePackets, s[1].ReadPackets, s[1].ReadDropped)
			}
		}
	}
}

// A superpacket that is split is taken whole or not at all, whatever of the other end closes meanwhile: else the first of its
// packets would be counted there, and by nobody here.
func TestPipeSplitsAllOrNothing(t *testing.T) {
	for _, queues := range []int{1, 3} {
		for range 20 {
			dev, host := openPipe(t, Config{Queues: queues, NoOffload: OffloadTCP})
			super := Packet{superTCP4(20000), 10}
			begun := make(chan bool, 1)
			var all sync.WaitGroup
			all.Go(func() {
				for err := error(nil); err == nil; {
					_, err = dev.Queues()[0].WriteBatch([]Packet{super})
					select {
					case begun <- true:
					default:
					}
				}
			})
			<-begun
			for _, q := range host.Queues() {
				q.Close()
			}
			all.Wait()
			if wrote, dropped := dev.Stats().WritePackets, host.Stats().ReadDropped; wrote != dropped {
				t.Fatalf("%d queues: wrote %d, dropped %d", queues, wrote, dropped)
			}
		}
	}
}

func TestPipeAllocs(t *testing.T) {
	dev, host := openPipe(t, Config{NoOffload: OffloadUDP})
	batch := []Packet{{Data: echo("one")}, {superTCP4(250), 100}, {superUDP6(250), 100}}
	buffer := make([]byte, 65535)
	for _, way := range [][2]Queue{{dev.Queues()[0], host.Queues()[0]}, {host.Queues()[0], dev.Queues()[0]}} {
		if n := testing.AllocsPerRun(200, func() { way[0].WriteBatch(batch); way[1].ReadBatch() }); n != 0 {
			t.Errorf("WriteBatch and ReadBatch: %v allocations", n)
		}
		if n := testing.AllocsPerRun(200, func() { way[0].Write(batch[0].Data); way[1].Read(buffer) }); n != 0 {
			t.Errorf("Write and Read: %v allocations", n)
		}
	}
}
