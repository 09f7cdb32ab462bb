package dhcp

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// four is DHCP for IPv4 (RFC 2131).
type four struct{}

func (four) name() string { return "" }

func (four) answers() traffic { return answers }

func (four) probes() traffic { return arpBoth }

func (four) numbers() uint32 { return math.MaxUint32 }

func (four) heard(l *lan, frame []byte, unsummed bool) {
	d, err := readDatagram(frame, unsummed)
	if err != nil {
		l.log.WithError(err).Debug("a frame to the DHCP client's port is ignored")
		return
	}
	id, ok := peekXID(d.payload)
	if !ok || d.toPort != clientPort {
		return
	}
	x := l.exchange(id)
	if x == nil || MAC(d.payload[offsetChaddr:]) != x.client {
		return // somebody else's
	}
	a, err := readAnswer(d.from, d.payload)
	x.hear(received{a, d.from, err})
}

func (four) listen(*exchange) {}

func (four) discover(x *exchange, r Request, wanted netip.Addr) []byte {
	return r.broadcast(x.stamp(r.discover(wanted)))
}

func (four) accept(x *exchange, offer Lease, after time.Duration) []byte {
	m := x.stamp(offer.selectOffer())
	m.NumSeconds = seconds(after) // the same in all these messages (RFC 2131, 4.4.1)
	return offer.Request.broadcast(m)
}

func (four) verify(x *exchange, l Lease) []byte { return l.Request.broadcast(x.stamp(l.verify())) }

func (four) renew(x *exchange, l Lease) []byte { return l.unicast(x.stamp(l.extend())) }

func (p four) rebind(x *exchange, l Lease, n int) []byte {
	if n%2 == 0 {
		return l.broadcast(x.stamp(l.extend()))
	}
	// The answer to the other request goes to the address, and does not come when nobody answers ARP for it, as when its
	// container is stopped. The answer to this one is a broadcast.
	return p.verify(x, l)
}

func (four) decline(x *exchange, l Lease) []byte {
	return l.Request.broadcast(x.stamp(l.decline("address is in use")))
}

func (four) release(x *exchange, l Lease) []byte { return l.unicast(x.stamp(l.release())) }

func (four) farewell() time.Duration { return 0 }

func (four) complete(_ context.Context, _ *exchange, l Lease) Lease { return l }

func (four) probe(l Lease) []byte {
	return arp{sender: l.MAC, senderIP: noAddress, wanted: l.Prefix.Addr()}.frame()
}

func (four) claimant(frame []byte, l Lease) MAC {
	if a, err := readARP(frame); err == nil && a.claims(l) {
		return a.sender
	}
	return MAC{}
}

// stamp numbers a message.
func (x *exchange) stamp(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	m.TransactionID = dhcpv4.TransactionID{byte(x.id >> 24), byte(x.id >> 16), byte(x.id >> 8), byte(x.id)}
	m.NumSeconds = seconds(time.Since(x.begun))
	return m
}

func seconds(d time.Duration) uint16 { return uint16(min(d/time.Second, 0xffff)) }

func (a answer4) offers() bool { return a.MessageType() == dhcpv4.MessageTypeOffer }

func (a answer4) of(l Lease) bool { return a.server() == l.Server }

func (a answer4) grant(l Lease, asked time.Time) (Lease, error) {
	switch a.MessageType() {
	case dhcpv4.MessageTypeNak:
		return Lease{}, &RefusedError{l.Prefix.Addr(), a.server(), a.reason()}
	case dhcpv4.MessageTypeAck:
		granted, err := a.lease(l.Request, asked)
		if err == nil && granted.Prefix.Addr() != l.Prefix.Addr() {
			err = fmt.Errorf("it is about %s, not %s", granted.Prefix, l.Prefix)
		}
		return granted, err
	}
	return Lease{}, errOther
}
