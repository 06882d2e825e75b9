package virtio

import "testing"

// benchBurst interleaves packets of flows, count each, with n bytes of payload.
func benchBurst(v6, udp bool, flows, count, n int) (burst []sent) {
	streams := make([]*stream, flows)
	for i := range streams {
		streams[i] = streamOf(v6, udp, byte(i))
		streams[i].rest[4] = byte(i >> 8)
		if !udp {
			streams[i].tcpOptions = make([]byte, 12)
		}
	}
	for range count {
		for _, s := range streams {
			burst = append(burst, sent{data: s.next(n, tcpACK)})
		}
	}
	return burst
}

func BenchmarkCoalesce(b *testing.B) {
	for _, k := range []struct {
		name  string
		burst []sent
	}{
		{"TCPv4/1x45x1448", benchBurst(false, false, 1, 45, 1448)},
		{"TCPv6/1x45x1448", benchBurst(true, false, 1, 45, 1428)},
		{"TCPv4/8x45x1448", benchBurst(false, false, 8, 45, 1448)},
		{"UDPv4/1x45x1300", benchBurst(false, true, 1, 45, 1300)},
		{"UDPv4/1x64x64", benchBurst(false, true, 1, 64, 64)},
		{"UDPv6/8x16x64", benchBurst(true, true, 8, 16, 64)},
		{"UDPv4/128x1x64", benchBurst(false, true, 128, 1, 64)},
		{"TCPv6/512x1x1448", benchBurst(true, false, 512, 1, 1448)},
		{"TCPv4/1x1x1448", benchBurst(false, false, 1, 1, 1448)},
		{"fragments/128", fragments(128, 0)},
		{"fragments between flows/128", fragments(64, 64)},
	} {
		b.Run(k.name, func(b *testing.B) {
			c := both()
			var bytes int
			for _, p := range k.burst {
				bytes += len(p.data)
			}
			b.SetBytes(int64(bytes))
			b.ReportAllocs()
			for b.Loop() {
				for i, p := range k.burst {
					c.Add(i, p.data, p.size)
				}
				c.Writes()
				c.Reset()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(k.burst)), "ns/packet")
		})
	}
}

// fragments are the dearest: each looks at all open flows.
func fragments(count, flows int) (burst []sent) {
	burst = benchBurst(false, true, flows, 1, 64)
	s := streamOf(false, true, 0)
	s.dst = []byte{1, 2, 3, 4}
	for range count {
		burst = append(burst, sent{data: fragment(s.next(64, 0), 1, 1)})
	}
	return burst
}
