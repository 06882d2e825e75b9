//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"example.com/overlay/examples/internal/stage"
)

const (
	probes    = 20   // echoes from each host to each other, per family
	flows     = 500  // per client and family
	tolerance = 0.10 // of a gateway's share; 500 random flows stray that far once in millions of runs
	port      = 7
)

// result is what was measured from one host.
type result struct {
	rtt        [len(families)]time.Duration     // medians
	sent, lost [len(families)]int               // echoes
	bytes      int64                            // that TCP moved, in
	elapsed    time.Duration                    // this time
	chosen     [len(families)][len(weights)]int // flows by gateway; none of a gateway
}

func (r *result) gigabits() float64 {
	if r.elapsed <= 0 {
		return 0
	}
	return float64(r.bytes) * 8 / r.elapsed.Seconds() / 1e9
}

// share is the part of the flows of one family that went through a gateway.
func (r *result) share(family, gateway int) float64 {
	total := 0
	for _, n := range r.chosen[family] {
		total += n
	}
	return float64(r.chosen[family][gateway]) / float64(max(total, 1))
}

// ping sends echoes from every host to every other, one at a time.
func (l *lab) ping(ctx context.Context, results []result) error {
	for i, from := range l.hosts {
		for family := range families {
			r := &results[i]
			var rtts []time.Duration
			p, err := newPinger(from, family)
			if err != nil {
				return fmt.Errorf("ping from %s: %w", from.name, err)
			}
			for _, to := range l.hosts {
				if to == from || err != nil {
					continue
				}
				var some []time.Duration
				some, err = p.ping(ctx, to.networks[family].Addr(), probes)
				rtts = append(rtts, some...)
				r.sent[family] += probes
			}
			if err := errors.Join(err, p.conn.Close()); err != nil {
				return fmt.Errorf("ping from %s: %w", from.name, err)
			}
			r.lost[family] = r.sent[family] - len(rtts)
			r.rtt[family] = median(rtts)
		}
	}
	return nil
}

func median(of []time.Duration) time.Duration {
	if len(of) == 0 {
		return 0
	}
	slices.Sort(of)
	return of[len(of)/2]
}

// pinger sends ICMP echo requests through a raw socket.
type pinger struct {
	conn           *net.IPConn
	ipv6           bool
	request, reply byte // types
	sequence       uint16
}

func newPinger(from *host, family int) (*pinger, error) {
	p := &pinger{request: 8, reply: 0}
	network := "ip4:icmp"
	addr := from.networks[family].Addr()
	if addr.Is6() {
		p, network = &pinger{ipv6: true, request: 128, reply: 129}, "ip6:ipv6-icmp"
	}
	err := from.ns.Do(func() (err error) {
		p.conn, err = net.ListenIP(network, &net.IPAddr{IP: addr.AsSlice()})
		return err
	})
	return p, err
}

// ping returns the round-trip times of those of n echoes that came back.
func (p *pinger) ping(ctx context.Context, to netip.Addr, n int) ([]time.Duration, error) {
	var rtts []time.Duration
	for range n {
		rtt, err := p.echo(ctx, to)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err == nil:
			rtts = append(rtts, rtt)
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, err
		}
	}
	return rtts, nil
}

// echo sends one request and waits for its reply.
func (p *pinger) echo(ctx context.Context, to netip.Addr) (time.Duration, error) {
	defer stage.Limit(ctx, stage.Patience, p.conn)()
	p.sequence++
	packet := make([]byte, 64)
	packet[0] = p.request
	binary.BigEndian.PutUint16(packet[6:], p.sequence)
	if !p.ipv6 { // there the kernel does it
		binary.BigEndian.PutUint16(packet[2:], checksum(packet))
	}
	start := time.Now()
	if _, err := p.conn.WriteToIP(packet, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return 0, err
	}
	for answer := make([]byte, 1500); ; { // a raw socket gets a copy of every ICMP packet
		n, from, err := p.conn.ReadFromIP(answer)
		if err != nil {
			return 0, err
		}
		if n == len(packet) && answer[0] == p.reply && from.IP.Equal(to.AsSlice()) &&
			binary.BigEndian.Uint16(answer[6:]) == p.sequence {
			return time.Since(start), nil
		}
	}
}

// checksum is the Internet checksum of data of even length.
func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// steer starts flows from every client to the one address that both gateways have behind them, and counts who answers.
func (l *lab) steer(ctx context.Context, results []result) (err error) {
	var servers []*net.UDPConn
	var serving sync.WaitGroup
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.Close())
		}
		serving.Wait()
	}()
	for i, gateway := range l.gateways() {
		for _, prefix := range shared {
			s, err := gateway.ns.ListenUDP(netip.AddrPortFrom(prefix.Addr(), port))
			if err != nil {
				return fmt.Errorf("serve on %s: %w", gateway.name, err)
			}
			servers = append(servers, s)
			serving.Go(func() { stage.Answer(s, byte(i)) })
		}
	}
	for i, client := range l.clients() {
		for family, prefix := range shared {
			err := client.ns.Do(func() error { return ask(ctx, prefix.Addr(), &results[i].chosen[family]) })
			if err != nil {
				return fmt.Errorf("%s flows from %s to %v: %w", families[family], client.name, prefix.Addr(), err)
			}
		}
	}
	return nil
}

// ask starts flows, each from a port of its own, and counts which gateway answers. It runs in the client's namespace.
func ask(ctx context.Context, addr netip.Addr, chosen *[len(weights)]int) error {
	for i := range flows {
		gateway, err := stage.Ask(ctx, netip.AddrPortFrom(addr, port))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("flow %d of %d: %w", i+1, flows, err)
		case gateway >= len(chosen):
			return fmt.Errorf("answer from gateway %d, which there is not", gateway)
		}
		chosen[gateway]++
	}
	return nil
}

// stream moves TCP from each host to the next, in turn, for d altogether.
func (l *lab) stream(ctx context.Context, d time.Duration, results []result) error {
	for i, from := range l.hosts {
		to := l.hosts[(i+1)%len(l.hosts)]
		if err := stream(ctx, from, to, d/time.Duration(len(l.hosts)), &results[i]); err != nil {
			return fmt.Errorf("TCP from %s to %s: %w", from.name, to.name, err)
		}
	}
	return nil
}

func stream(ctx context.Context, from, to *host, d time.Duration, r *result) error {
	out, in, err := connect(ctx, from, to)
	if err != nil {
		return err
	}
	defer in.Close()
	defer out.Close()
	defer stage.Limit(ctx, d+stage.Patience, out, in)()

	start := time.Now()
	var sent int64
	var sendErr error
	var sending sync.WaitGroup
	sending.Go(func() { sent, sendErr = send(out, start.Add(d)) })
	received, err := receive(in)
	sending.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := errors.Join(sendErr, err); err != nil {
		return err
	}
	if sent != received {
		return fmt.Errorf("%d bytes sent, %d received", sent, received)
	}
	r.bytes, r.elapsed = received, time.Since(start)
	return nil
}

// connect opens a connection between two hosts and returns both ends.
func connect(ctx context.Context, from, to *host) (out, in *net.TCPConn, err error) {
	var listener *net.TCPListener
	err = to.ns.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp", &net.TCPAddr{IP: to.networks[0].Addr().AsSlice()})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	if err := listener.SetDeadline(time.Now().Add(stage.Patience)); err != nil {
		return nil, nil, err
	}
	err = from.ns.Do(func() error {
		dialer := &net.Dialer{Timeout: stage.Patience}
		conn, err := dialer.DialContext(ctx, "tcp", listener.Addr().String())
		if err == nil {
			out = conn.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	// What is in flight shall fit the device's queue of 500 packets, and not take long to drain at the end.
	if err = out.SetWriteBuffer(256 << 10); err == nil {
		in, err = listener.AcceptTCP()
	}
	if err != nil {
		return nil, nil, errors.Join(err, out.Close())
	}
	return out, in, nil
}

// send writes until the time is over, once at least, and says so to the other end.
func send(conn *net.TCPConn, until time.Time) (total int64, err error) {
	for buffer := make([]byte, 128<<10); ; {
		n, err := conn.Write(buffer)
		total += int64(n)
		if err != nil || time.Now().After(until) {
			return total, errors.Join(err, conn.CloseWrite())
		}
	}
}

// receive reads to the end.
func receive(conn *net.TCPConn) (total int64, err error) {
	for buffer := make([]byte, 128<<10); ; {
		n, err := conn.Read(buffer)
		total += int64(n)
		switch {
		case errors.Is(err, io.EOF):
			return total, nil
		case err != nil:
			return total, err
		}
	}
}

// check says what of the results is not as it should be.
func (l *lab) check(results []result) error {
	var errs []error
	for i, h := range l.hosts {
		r := &results[i]
		for family, name := range families {
			if r.lost[family] > 0 {
				errs = append(errs, fmt.Errorf("%s lost %d of %d %s echoes", h.name, r.lost[family], r.sent[family], name))
			}
		}
		if r.bytes == 0 {
			errs = append(errs, fmt.Errorf("%s sent nothing by TCP", h.name))
		}
	}
	for i, h := range l.clients() {
		for family, name := range families {
			errs = append(errs, l.checkShares(h, name, &results[i], family))
		}
	}
	return errors.Join(errs...)
}

func (l *lab) checkShares(h *host, name string, r *result, family int) error {
	total := 0
	for _, w := range weights {
		total += w
	}
	for i, gateway := range l.gateways() {
		want := float64(weights[i]) / float64(total)
		if got := r.share(family, i); math.Abs(got-want) > tolerance {
			return fmt.Errorf("%s sent %.0f %% of its %s flows through %s, want about %.0f %%",
				h.name, 100*got, name, gateway.name, 100*want)
		}
	}
	return nil
}
