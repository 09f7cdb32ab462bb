package dhcp

import (
	"context"
	"errors"
	"time"
)

// probes is how often it is asked who has an address.
const probes = 2

// probeAddress asks the host and the LAN whether somebody uses a leased address already, the LAN as RFC 5227 and RFC 4862 say but
// in a fraction of their time, since a container waits. It returns who does, or no MAC.
func (c *Client) probeAddress(ctx context.Context, p protocol, l Lease) (MAC, error) {
	if holder := c.holder(l.Link, l.Prefix.Addr()); holder != (MAC{}) && holder != l.MAC {
		return holder, nil
	}
	if c.probe < 0 {
		return MAC{}, nil
	}
	t, err := c.open(l.Link, p.probes())
	if err != nil {
		return MAC{}, err
	}
	heard := make(chan MAC, 1)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		buffer := make([]byte, maxFrame)
		for {
			n, _, err := t.Receive(buffer)
			if err != nil {
				return // closed; or the link is down, and then there is nobody to hear
			}
			if holder := p.claimant(buffer[:n], l); holder != (MAC{}) {
				heard <- holder
				return
			}
		}
	}()
	defer func() { <-gone }()
	defer t.Close()

	for range probes {
		if err := t.Send(p.probe(l)); err != nil {
			return MAC{}, err
		}
		timer := time.NewTimer(c.probe / probes)
		select {
		case holder := <-heard:
			timer.Stop()
			return holder, nil
		case <-ctx.Done():
			timer.Stop()
			return MAC{}, errors.New("given up")
		case <-timer.C:
		}
	}
	return MAC{}, nil
}

// claims says whether somebody else has the leased address, or is about to take it.
func (a arp) claims(l Lease) bool {
	if a.sender == l.MAC {
		return false
	}
	probe := !a.reply && a.senderIP == noAddress && a.wanted == l.Prefix.Addr()
	return probe || a.senderIP == l.Prefix.Addr()
}
