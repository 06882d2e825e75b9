package overlay

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"example.com/overlay/internal/nstest"
)

// benchRig is a rig whose queue is also open as a plain file, to compare with: the least that a Go program can do.
func benchRig(b *testing.B) (*rig, *os.File) {
	b.Helper()
	r := newRig(b, Config{Networks: []netip.Prefix{own4}, TxQueueLen: 1000})
	f, err := r.q.File()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return r, f
}

// unwanted is a packet that the kernel drops as early as it can: for a multicast group that nobody is in.
func unwanted(size int) []byte {
	src, dst := netip.AddrPortFrom(peer4, 7), netip.MustParseAddrPort("224.0.0.200:7")
	return datagram(src, dst, make([]byte, size-28))
}

func BenchmarkQueueWrite(b *testing.B) {
	r, f := benchRig(b)
	for _, size := range []int{64, 1300} {
		packet := unwanted(size)
		framed := append(make([]byte, vnetHeaderSize), packet...)
		batch := make([]Packet, 64)
		for i := range batch {
			batch[i].Data = packet
		}
		for _, way := range []struct {
			name  string
			each  int
			write func() error
		}{
			{"file", 1, func() error { _, err := f.Write(framed); return err }},
			{"Write", 1, func() error { _, err := r.q.Write(packet); return err }},
			{"WriteBatch", len(batch), func() error { _, err := r.q.WriteBatch(batch); return err }},
		} {
			b.Run(fmt.Sprintf("%d/%s", size, way.name), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(size))
				for n := 0; n < b.N; n += way.each {
					if err := way.write(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkQueueRead(b *testing.B) {
	const ready = 500
	r, f := benchRig(b)
	w, buf := r.tap(), make([]byte, maxPacket)
	for _, size := range []int{64, 1300} {
		packet := filler(4, size, 1)
		for _, way := range []struct {
			name string
			read func() (int, error)
		}{
			{"file", func() (int, error) { _, err := f.Read(buf); return 1, err }},
			{"Read", func() (int, error) { _, err := r.q.Read(buf); return 1, err }},
			{"ReadBatch", func() (int, error) { packets, err := r.q.ReadBatch(); return len(packets), err }},
		} {
			b.Run(fmt.Sprintf("%d/%s", size, way.name), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(size))
				for done := 0; done < b.N; {
					b.StopTimer()
					todo := min(ready, b.N-done)
					for range todo {
						w.send(packet)
					}
					done += todo
					b.StartTimer()
					for todo > 0 {
						n, err := way.read()
						if err != nil {
							b.Fatal(err)
						}
						todo -= n
					}
				}
			})
		}
	}
}

// BenchmarkPingPong measures a packet on its way from a socket through the program, which swaps its addresses, and back.
func BenchmarkPingPong(b *testing.B) {
	r, f := benchRig(b)
	conn := r.udp(own4.Addr())
	if err := conn.SetDeadline(time.Time{}); err != nil {
		b.Fatal(err)
	}
	buf, got := make([]byte, maxPacket), make([]byte, 2000)
	turn := func(n int) []byte {
		p := buf[:n]
		src, dst := [4]byte(p[12:16]), [4]byte(p[16:20])
		copy(p[12:16], dst[:])
		copy(p[16:20], src[:])
		ports := [4]byte(p[20:24])
		copy(p[20:22], ports[2:])
		copy(p[22:24], ports[:2])
		return p
	}
	for _, way := range []struct {
		name string
		echo func() error
	}{
		{"file", func() error {
			n, err := f.Read(buf)
			if err == nil {
				_, err = f.Write(turn(n))
			}
			return err
		}},
		{"queue", func() error {
			n, err := r.q.Read(buf)
			if err == nil {
				_, err = r.q.Write(turn(n))
			}
			return err
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			b.ReportAllocs()
			stopped := make(chan error, 1)
			go func() {
				for {
					if err := way.echo(); err != nil || bytes.HasSuffix(buf[:1300], []byte("the end")) {
						stopped <- err
						return
					}
				}
			}()
			payload, peer := make([]byte, 1272), netip.AddrPortFrom(peer4, 7)
			ping := func() {
				if _, err := conn.WriteToUDPAddrPort(payload, peer); err != nil {
					b.Fatal(err)
				}
				if _, err := conn.Read(got); err != nil {
					b.Fatal(err)
				}
			}
			for range b.N {
				ping()
			}
			b.StopTimer()
			copy(payload[len(payload)-7:], "the end")
			ping()
			if err := <-stopped; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkLifecycle is one life, and in it the end, beside close(2) alone of the same.
func BenchmarkLifecycle(b *testing.B) {
	nstest.Require(b, nstest.NetAdmin, nstest.TUN)
	ns := nstest.New(b)
	cfg := lifeConfig(ns)
	for _, way := range []struct {
		name string
		end  func(d Device) time.Duration
	}{
		{"Close", func(d Device) time.Duration { return timed(b, d.Close) }},
		{"bare", func(d Device) time.Duration { return closeBare(b, d) }},
	} {
		b.Run(way.name, func(b *testing.B) {
			var ends time.Duration
			for range b.N {
				ends += way.end(openLife(b, cfg))
			}
			b.ReportMetric(float64(ends.Microseconds())/float64(b.N), "µs/end")
		})
	}
}
