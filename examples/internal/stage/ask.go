package stage

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// Answer tells everybody who asks the number of the host, and what was asked, until the socket is closed.
func Answer(s *net.UDPConn, number byte) {
	for buffer := make([]byte, 64); ; {
		n, from, err := s.ReadFromUDPAddrPort(buffer[1:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			buffer[0] = number
			_, _ = s.WriteToUDPAddrPort(buffer[:1+n], from) // if it fails, the client misses the answer
		}
	}
}

// Ask starts a flow, from a port of its own in the calling thread's namespace, and returns the number of the host that answers.
func Ask(ctx context.Context, addr netip.AddrPort) (number int, err error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer Limit(ctx, Patience, conn)()
	if _, err := conn.Write([]byte("who?")); err != nil {
		return 0, err
	}
	var answer [1]byte
	_, err = conn.Read(answer[:])
	return int(answer[0]), err
}

// Limit makes whatever waits on the connections give up after d, or when ctx ends. The function that it returns releases ctx.
func Limit(ctx context.Context, d time.Duration, conns ...net.Conn) (release func() bool) {
	set := func(t time.Time) {
		for _, c := range conns {
			_ = c.SetDeadline(t) // it fails only if c is closed, and then nobody waits
		}
	}
	set(time.Now().Add(d))
	return context.AfterFunc(ctx, func() { set(time.Now()) })
}
