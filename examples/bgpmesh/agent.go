//go:build linux

package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"

	"example.com/overlay"
)

// agent is a whole overlay host: it carries packets between its overlay device and other hosts' UDP sockets. It does not
// encrypt and believes everybody: the two places where a VPN would do its work are marked.
type agent struct {
	dev   overlay.Device
	queue overlay.Queue
	udp   *net.UDPConn
	peers map[netip.Addr]netip.AddrPort // overlay address of a host to its underlay address; never changes here

	loops               sync.WaitGroup
	sendErr, receiveErr error // why the loops ended, nil by Close
}

// startAgent opens and configures the device and starts to carry packets. The agent closes udp; on error the caller does.
func startAgent(cfg overlay.Config, udp *net.UDPConn, peers map[netip.Addr]netip.AddrPort) (*agent, error) {
	dev, err := overlay.New(cfg)
	if err != nil {
		return nil, err
	}
	if err := dev.Activate(); err != nil { // addresses, MTU, routes, link up
		return nil, errors.Join(err, dev.Close())
	}
	a := &agent{dev: dev, queue: dev.Queues()[0], udp: udp, peers: peers}
	a.loops.Go(func() { a.sendErr = a.send() })
	a.loops.Go(func() { a.receiveErr = a.receive() })
	return a, nil
}

// send takes packets from the kernel and sends each to the overlay host that is its next hop.
func (a *agent) send() error {
	var datagram []byte
	for {
		packets, err := a.queue.ReadBatch()
		if err != nil {
			return unlessClosed(err)
		}
		for _, p := range packets {
			hop, ok := a.dev.NextHop(p.Data, nil) // the destination itself, or a gateway chosen by flow and weight
			peer, known := a.peers[hop]
			if !ok || !known {
				continue // nobody to send it to
			}
			for i := range p.Segments() { // one, or the many packets of a superpacket
				datagram = p.AppendSegment(datagram[:0], i)
				// A VPN encrypts datagram here.
				if _, err := a.udp.WriteToUDPAddrPort(datagram, peer); errors.Is(err, net.ErrClosed) {
					return nil
				} // any other error is this packet's: it is lost, as packets may be
			}
		}
	}
}

// receive takes packets from other hosts and hands them to the kernel.
func (a *agent) receive() error {
	buffer := make([]byte, 65535)
	for {
		n, _, err := a.udp.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return unlessClosed(err)
		}
		// A VPN decrypts here, and drops what does not come from an address of the peer that sent it.
		_, err = a.queue.Write(buffer[:n])
		if errors.Is(err, os.ErrClosed) || errors.Is(err, overlay.ErrGone) {
			return unlessClosed(err)
		} // any other error is this packet's
	}
}

// Close wakes both loops, waits for them, and returns what went wrong in the agent's life.
func (a *agent) Close() error {
	err := errors.Join(a.dev.Close(), a.udp.Close())
	a.loops.Wait()
	return errors.Join(err, a.sendErr, a.receiveErr)
}

func unlessClosed(err error) error {
	if errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
