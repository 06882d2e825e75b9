package virtio

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
)

// mergeCase is a burst, and how many packets there must be in each of its writes. The names are those of the kernel's own test of
// receive offload, tools/testing/selftests/net/lib/gro.c, as far as it has the case; where this differs from the kernel the case says
// so.
type mergeCase struct {
	name    string
	packets [][]byte
	want    []int
}

func (c mergeCase) run(t *testing.T, name string) {
	t.Run(name+"/"+c.name, func(t *testing.T) {
		if got := checkBurst(t, both(), plain(c.packets...), true); !slices.Equal(got, c.want) {
			t.Errorf("got writes of %v packets, want %v", got, c.want)
		}
	})
}

func TestMerge(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		name := map[bool]string{false: "v4", true: "v6"}[v6]
		for _, udp := range []bool{false, true} {
			protocol := map[bool]string{false: "TCP", true: "UDP"}[udp]
			for _, c := range slices.Concat(sizeMerges(v6, udp), checksumMerges(v6, udp), ipMerges(v6, udp), otherMerges(v6, udp)) {
				c.run(t, protocol+name)
			}
		}
		for _, c := range slices.Concat(flagMerges(v6), tcpMerges(v6)) {
			c.run(t, "TCP"+name)
		}
	}
	for _, udp := range []bool{false, true} {
		name := map[bool]string{false: "TCP", true: "UDP"}[udp]
		for _, c := range slices.Concat(idMerges(udp), merges4(udp)) {
			c.run(t, name+"v4")
		}
		for _, c := range merges6(udp) {
			c.run(t, name+"v6")
		}
	}
	for _, c := range udpMerges() {
		c.run(t, "UDP")
	}
}

// lengths builds packets of one flow.
func lengths(v6, udp bool, lengths ...int) (packets [][]byte) {
	s := streamOf(v6, udp, 1)
	for _, n := range lengths {
		packets = append(packets, s.next(n, tcpACK))
	}
	return packets
}

// upTo returns count times n and then the rest.
func upTo(count, n int, rest ...int) []int {
	return append(slices.Repeat([]int{n}, count), rest...)
}

func sizeMerges(v6, udp bool) []mergeCase {
	limit := 128
	if udp {
		limit = 64
	}
	headers := streamOf(v6, udp, 1).next(0, 0)
	room := 65_535 - len(headers)
	count := room / 4000
	return []mergeCase{
		{"single", lengths(v6, udp, 100), []int{1}},
		{"data_same", lengths(v6, udp, 100, 100), []int{2}},
		{"data_lrg_sml", lengths(v6, udp, 100, 50), []int{2}},
		{"data_lrg_1byte", lengths(v6, udp, 100, 1), []int{2}},
		{"data_sml_lrg", lengths(v6, udp, 50, 100), []int{1, 1}},
		{"smaller ends", lengths(v6, udp, 100, 100, 50, 50, 50), []int{3, 2}},
		{"smaller ends, even for a fitting one", lengths(v6, udp, 100, 50, 100), []int{2, 1}},
		{"one byte each", lengths(v6, udp, 1, 1, 1), []int{3}},
		{"large_max", lengths(v6, udp, upTo(count, 4000, room%4000, room%4000)...), []int{count + 1, 1}},
		{"large_rem", lengths(v6, udp, upTo(count, 4000, room%4000+1, room%4000+1)...), []int{count, 2}}, // the kernel: apart, by its timing
		{"largest", lengths(v6, udp, room, 1), []int{1, 1}},
		{"segments", lengths(v6, udp, upTo(limit+1, 10)...), []int{limit, 1}},
		{"segments, last one smaller", lengths(v6, udp, upTo(limit-1, 10, 5, 10)...), []int{limit, 1}},
	}
}

func checksumMerges(v6, udp bool) []mergeCase {
	five := func(change func(p [][]byte)) [][]byte {
		p := streamOf(v6, udp, 1).data(5, 100)
		change(p)
		return p
	}
	cases := []mergeCase{
		{"csum of the first", five(func(p [][]byte) { spoil(p[0]) }), []int{1, 4}},
		{"tcp_csum", five(func(p [][]byte) { spoil(p[1]) }), []int{1, 1, 3}},
		{"csum in the middle", five(func(p [][]byte) { spoil(p[2]) }), []int{2, 1, 2}},
		{"csum of the last", five(func(p [][]byte) { spoil(p[4]) }), []int{4, 1}},
		{"csum of all", five(func(p [][]byte) { spoil(p[0]); spoil(p[1]); spoil(p[2]); spoil(p[3]); spoil(p[4]) }), []int{1, 1, 1, 1, 1}},
	}
	cases = append(cases, mergeCase{"csum, the other zero", five(func(p [][]byte) {
		// The complement of a sum added to it gives all ones: so a checksum in the payload, in its own place of it, makes the next 0.
		field := transportOf(p[2]) + map[bool]int{false: 16, true: 6}[udp]
		copy(p[2][len(p[2])-2:], []byte{0, 0})
		refinish(p[2])
		copy(p[2][len(p[2])-2:], p[2][field:field+2])
		refinish(p[2])
		p[2][field], p[2][field+1] = ^p[2][field], ^p[2][field+1]
	}), []int{2, 1, 2}})
	if v6 {
		return cases
	}
	return append(cases,
		mergeCase{"ip csum in the middle", five(func(p [][]byte) { p[2][10] ^= 1 }), []int{2, 1, 2}},
		mergeCase{"ip csum of the first", five(func(p [][]byte) { p[0][10] ^= 1 }), []int{1, 4}},
	)
}

func flagMerges(v6 bool) []mergeCase {
	// The third of five packets has the flags, and n bytes.
	third := func(flags uint8, n int) [][]byte {
		s := streamOf(v6, false, 1)
		return append(append(s.data(2, 100), s.next(n, flags)), s.data(2, 100)...)
	}
	all := func(flags uint8) [][]byte {
		s := streamOf(v6, false, 1)
		return [][]byte{s.next(100, flags), s.next(100, flags), s.next(100, flags)}
	}
	alone := []int{1, 1, 1}
	return []mergeCase{
		{"flags_psh", third(tcpACK|tcpPSH, 100), []int{3, 2}},
		{"flags_psh, smaller", third(tcpACK|tcpPSH, 10), []int{3, 2}},
		{"flags_syn", third(tcpACK|0x02, 0), []int{2, 1, 2}},
		{"flags_syn with data", third(tcpACK|0x02, 100), []int{2, 1, 2}},
		{"flags_rst", third(tcpACK|0x04, 0), []int{2, 1, 2}},
		{"flags_rst with data", third(tcpACK|0x04, 100), []int{2, 1, 2}},
		{"flags_urg", third(tcpACK|0x20, 0), []int{2, 1, 2}},
		{"flags_urg with data", third(tcpACK|0x20, 100), []int{2, 1, 2}},
		{"flags_cwr", third(tcpACK|tcpCWR, 100), []int{2, 1, 2}}, // the kernel: {2, 3}
		{"flags_fin", third(tcpACK|tcpFIN, 100), []int{2, 1, 2}}, // the kernel: {3, 2}
		{"flags_ece", third(tcpACK|tcpECE, 100), []int{2, 1, 2}},
		{"no ack", third(0, 100), []int{2, 1, 2}},
		{"ack", third(tcpACK, 0), []int{2, 1, 2}},
		{"ack twice", lengths(v6, false, 0, 0, 0), []int{1, 1, 1}},
		{"all psh", all(tcpACK | tcpPSH), alone},
		{"all syn", all(tcpACK | 0x02), alone},
		{"all rst", all(tcpACK | 0x04), alone},
		{"all urg", all(tcpACK | 0x20), alone},
		{"all cwr", all(tcpACK | tcpCWR), alone},
		{"all fin", all(tcpACK | tcpFIN), alone},
		{"all ece", all(tcpACK | tcpECE), []int{3}},
		{"none ack", all(0), alone},
	}
}

func tcpMerges(v6 bool) []mergeCase {
	third := func(offset int, b ...byte) [][]byte {
		p := streamOf(v6, false, 1).data(4, 100)
		editTransport(p[2], offset, b...)
		return p
	}
	wrap := streamOf(v6, false, 1)
	wrap.seq = 0xffffff00
	stamped := func(options ...[]byte) (packets [][]byte) {
		s := streamOf(v6, false, 1)
		for _, o := range options {
			s.tcpOptions = o
			packets = append(packets, s.next(100, tcpACK))
		}
		return packets
	}
	a, b := []byte{1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0}, []byte{1, 1, 8, 10, 0, 0, 0, 100, 0, 0, 0, 0}
	other, last := []byte{1, 8, 10, 0, 0, 0, 100, 0, 0, 0, 0, 1}, []byte{8, 10, 0, 0, 0, 100, 0, 0, 0, 0, 1, 1}
	short := streamOf(v6, false, 1)
	short.tcpOptions = a
	shorter := short.data(2, 1)
	short.tcpOptions = nil
	shorter = append(shorter, slices.Clip(short.next(1, tcpACK)))
	seq := streamOf(v6, false, 1)
	gap := seq.data(2, 100)
	seq.seq++
	gap = append(gap, seq.data(2, 100)...)
	again := streamOf(v6, false, 1).data(3, 100)
	return []mergeCase{
		{"tcp_seq", gap, []int{2, 2}},
		{"tcp_seq wraps", wrap.data(4, 100), []int{4}},
		{"tcp_seq again", [][]byte{again[0], again[1], again[1], again[2]}, []int{2, 2}}, // IPv4: the third has the id of the second
		{"tcp_seq swapped", [][]byte{again[1], again[0], again[2]}, []int{1, 1, 1}},
		{"tcp_ts", stamped(a, a, b, other, last), []int{2, 1, 1, 1}},
		{"tcp_ts same", stamped(a, a, a, a, a), []int{5}},
		{"tcp_opt", stamped(a, a, []byte{1, 3, 3, 0}), []int{2, 1}},
		{"tcp_opt none", stamped(a, a, nil, nil), []int{2, 2}},
		{"tcp_opt none, of one byte", shorter, []int{2, 1}},
		{"acknowledged", third(8, 1), []int{2, 1, 1}},
		{"window", third(14, 1), []int{2, 1, 1}},
		{"reserved bits", third(12, 0x51), []int{2, 1, 1}},
		{"urgent pointer", third(18, 1), []int{2, 1, 1}}, // the kernel loses it
	}
}

func ipMerges(v6, udp bool) []mergeCase {
	third := func(offset int, b ...byte) [][]byte {
		p := streamOf(v6, udp, 1).data(4, 100)
		edit(p[2], offset, b...)
		return p
	}
	alone := []int{2, 1, 1}
	if v6 {
		return []mergeCase{
			{"ip_ecn", third(1, 0x20), alone},
			{"ip_tos", third(0, 0x61), alone},
			{"ip_ttl", third(7, 9), alone},
			{"flow label", third(3, 9), alone},
		}
	}
	return []mergeCase{
		{"ip_ecn", third(1, 2), alone},
		{"ip_tos", third(1, 0x10), alone},
		{"ip_ttl", third(8, 9), alone},
	}
}

// ids builds packets with these identifications, and "don't fragment" or not.
func ids(udp bool, df byte, ids ...uint16) (packets [][]byte) {
	s := streamOf(false, udp, 1)
	s.rest[1] = df << 6
	for _, id := range ids {
		s.id = id
		packets = append(packets, s.next(100, tcpACK))
	}
	return packets
}

func idMerges(udp bool) []mergeCase {
	mixed := ids(udp, 1, 8, 9, 10, 11)
	edit(mixed[2], 6, 0)
	return []mergeCase{
		{"ip_id_df1_inc", ids(udp, 1, 8, 9, 10), []int{3}},
		{"ip_id_df1_fixed", ids(udp, 1, 8, 8, 8), []int{3}},
		{"ip_id_df0_inc", ids(udp, 0, 8, 9, 10), []int{3}},
		{"ip_id_df0_fixed", ids(udp, 0, 8, 8, 8), []int{1, 1, 1}}, // the kernel since 6.18: {3}
		{"ip_id_df1_inc_fixed", ids(udp, 1, 8, 9, 9), []int{2, 1}},
		{"ip_id_df1_fixed_inc", ids(udp, 1, 8, 8, 9), []int{2, 1}},
		{"ip_id_df1_fixed_inc, as if counted", ids(udp, 1, 8, 8, 10), []int{2, 1}},
		{"ip_id_df1_inc_fixed, as the first", ids(udp, 1, 8, 9, 8), []int{2, 1}},
		{"ip_id_df0_seq, wraps", ids(udp, 0, 0xfffe, 0xffff, 0, 1), []int{4}},
		{"ip_id gap", ids(udp, 1, 8, 10, 11), []int{1, 2}},
		{"ip_id backwards", ids(udp, 1, 8, 7, 6), []int{1, 1, 1}},
		{"ip_id 0", ids(udp, 1, 0, 0, 0), []int{3}},
		{"df differs", mixed, []int{2, 1, 1}},
	}
}

func merges4(udp bool) []mergeCase {
	four := func(change func(s *stream, p [][]byte) [][]byte) [][]byte {
		s := streamOf(false, udp, 1)
		return change(s, s.data(3, 100))
	}
	optioned := func(n int) [][]byte {
		s := streamOf(false, udp, 1)
		s.options = make([]byte, n)
		return s.data(2, 100)
	}
	return []mergeCase{
		{"ip_opt", four(func(s *stream, p [][]byte) [][]byte {
			s.options = []byte{68, 4, 5, 0}
			p[2] = s.next(100, tcpACK)
			s.options = nil
			return append(p, s.next(100, tcpACK))
		}), []int{2, 1, 1}},
		{"ip_opt all", optioned(4), []int{1, 1}},
		{"ip_frag4", four(func(_ *stream, p [][]byte) [][]byte {
			fragment(p[1], 1, 0)
			return p
		}), []int{1, 1, 1}},
		{"ip_frag4, a later one", four(func(_ *stream, p [][]byte) [][]byte {
			fragment(p[1], 0, 1)
			return p
		}), []int{1, 1, 1}},
		{"reserved bit", four(func(_ *stream, p [][]byte) [][]byte {
			edit(p[1], 6, 0xc0)
			return p
		}), []int{1, 1, 1}},
		{"total length", four(func(s *stream, p [][]byte) [][]byte {
			p[1] = append(p[1], 0)
			return p
		}), []int{1, 1, 1}},
		{"total length, checksums right", four(func(_ *stream, p [][]byte) [][]byte {
			p[1][3]--
			finishIP(p[1])
			return p
		}), []int{1, 1, 1}},
		{"reserved bit in all", func() [][]byte {
			p := streamOf(false, udp, 1).data(3, 100)
			return [][]byte{edit(p[0], 6, 0xc0), edit(p[1], 6, 0xc0), edit(p[2], 6, 0xc0)}
		}(), []int{1, 1, 1}},
		{"ip csum, the other zero", otherZero4(udp), []int{1, 1, 1}},
	}
}

// otherZero4 returns packets, the second of which has a header checksum of all ones, where splitting writes 0.
func otherZero4(udp bool) [][]byte {
	s := streamOf(false, udp, 1)
	for {
		at := *s
		p := s.data(3, 100)
		if p[1][10] == 0 && p[1][11] == 0 {
			p[1][10], p[1][11] = 0xff, 0xff
			return p
		}
		*s = at
		s.id++
	}
}

func merges6(udp bool) []mergeCase {
	extended := func(bodies ...byte) (packets [][]byte) {
		s := streamOf(true, udp, 1)
		for _, b := range bodies {
			s.extensions = []extension{ext(60, 0, 30, 4, b, 0, 0, 0)}
			packets = append(packets, s.next(100, tcpACK))
		}
		return packets
	}
	routed := streamOf(true, udp, 1)
	body := append([]byte{2, 4, 1, 0, 0, 0, 0}, bytes.Repeat([]byte{9}, 16)...)
	routed.extensions = []extension{{protocol: 43, body: body, final: body[7:]}}
	wrong := streamOf(true, udp, 1)
	wrong.extensions = []extension{{protocol: 43, body: body}}
	kind := streamOf(true, udp, 1)
	var kinds [][]byte
	for _, protocol := range []uint8{protoHopByHop, protoDestOpts} {
		kind.extensions = []extension{ext(protocol, 0, 30, 4, 0, 0, 0, 0)}
		kinds = append(kinds, kind.next(100, tcpACK))
	}
	long := streamOf(true, udp, 1)
	long.extensions = []extension{ext(60, append([]byte{26}, make([]byte, 26*8+6)...)...)}
	s := streamOf(true, udp, 1)
	p := append(s.data(3, 100), s.next(100, tcpACK))
	p[2] = fragment(p[2], 0, 0)
	length := streamOf(true, udp, 1).data(3, 100)
	length[1] = append(length[1], 0)
	lies := streamOf(true, udp, 1).data(3, 100)
	lies[1][5]--
	return []mergeCase{
		{"ip_frag6", p, []int{2, 1, 1}},
		{"ip_v6ext_same", extended(1, 1, 1), []int{3}},
		{"ip_v6ext_diff", extended(1, 2, 2), []int{1, 2}},
		{"ip_v6ext of another kind", kinds, []int{1, 1}},
		{"payload length", length, []int{1, 1, 1}},
		{"payload length, checksums right", lies, []int{1, 1, 1}},
		{"routing with segments left, csum of the next address", wrong.data(2, 100), []int{1, 1}},
		{"routing with segments left", routed.data(2, 100), []int{1, 1}},
		{"long headers", long.data(2, 100), []int{1, 1}},
	}
}

func udpMerges() []mergeCase {
	var cases []mergeCase
	for _, v6 := range []bool{false, true} {
		third := func(change func(p, t []byte)) [][]byte {
			p := streamOf(v6, true, 1).data(5, 100)
			change(p[2], p[2][transportOf(p[2]):])
			return p
		}
		cases = append(cases,
			mergeCase{fmt.Sprint("without checksum, v6 ", v6), third(func(_, t []byte) { t[6], t[7] = 0, 0 }), []int{2, 1, 2}},
			mergeCase{fmt.Sprint("length, v6 ", v6), third(func(_, t []byte) { t[5]-- }), []int{2, 1, 2}},
			mergeCase{fmt.Sprint("length, checksum right, v6 ", v6), third(func(_, t []byte) { t[5]--; t[7]++ }), []int{2, 1, 2}},
			mergeCase{fmt.Sprint("nothing in it, v6 ", v6), lengths(v6, true, 100, 100, 0, 100, 100), []int{2, 1, 2}},
			mergeCase{fmt.Sprint("only empty ones, v6 ", v6), lengths(v6, true, 0, 0, 0), []int{1, 1, 1}},
		)
	}
	return cases
}

// otherMerges have two flows, or what may belong to one.
func otherMerges(v6, udp bool) []mergeCase {
	a, b := streamOf(v6, udp, 1), streamOf(v6, udp, 2)
	x, y := a.data(4, 100), b.data(4, 100)
	between := func(p []byte) [][]byte { return [][]byte{x[0], x[1], p, x[2], x[3]} }
	far := streamOf(v6, udp, 1)
	far.dst = bytes.Repeat([]byte{9}, len(far.dst))
	icmp := bytes.Clone(y[0])
	icmp[map[bool]int{false: 9, true: 6}[v6]] = 58
	other := streamOf(v6, !udp, 1)
	var capacity [][]byte
	for round := range 2 {
		for i := range 8 {
			s := streamOf(v6, udp, byte(i))
			s.seq, s.id = s.seq+uint32(round)*100, s.id+uint16(round)
			capacity = append(capacity, s.next(100, tcpACK))
		}
	}
	return []mergeCase{
		{"capacity", capacity, []int{2, 2, 2, 2, 2, 2, 2, 2}},
		{"two flows", [][]byte{x[0], y[0], x[1], y[1], y[2], x[2]}, []int{3, 3}},
		{"another source port", between(editTransport(bytes.Clone(x[2]), 0, 99)), []int{4, 1}},
		{"another protocol", between(other.next(100, tcpACK)), []int{4, 1}},
		{"another flow's fragment", between(fragment(bytes.Clone(y[0]), 1, 1)), []int{2, 1, 2}},
		{"another flow's last fragment", between(fragment(bytes.Clone(y[0]), 0, 1)), []int{2, 1, 2}},
		{"fragment between other addresses", between(fragment(far.next(100, tcpACK), 1, 1)), []int{4, 1}},
		{"ICMP", between(refinish(icmp)), []int{2, 1, 2}},
		{"cut short", between(x[2][:transportOf(x[2])+6]), []int{2, 1, 2}},
		{"cut in the addresses", between(x[2][:18]), []int{4, 1}},
		{"nothing", between(nil), []int{4, 1}},
		{"version 5", between(append([]byte{0x55}, x[2][1:]...)), []int{4, 1}},
	}
}
