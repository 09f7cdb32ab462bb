package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

const (
	// confirmTime is how long a server that offered an address has to confirm it, before everybody is asked again.
	confirmTime = 7 * time.Second
	// otherServers is how long other servers have to offer the right address when one has offered a wrong one, or to grant a
	// lease of theirs when one has refused it.
	otherServers = time.Second
)

// ErrNoServer is wrapped by the error of an Obtain that no server answered at all.
var ErrNoServer = errors.New("no DHCP server answered")

// OfferedError says that a certain address was asked for and none but others were offered.
type OfferedError struct {
	Asked, Offered netip.Addr
	Server         netip.Addr // who offered
}

func (e *OfferedError) Error() string {
	return fmt.Sprintf("address %s was asked for, but server %s offers %s, which was not taken: "+
		"ask for no address, or for one that is free and in the server's range or reserved for this MAC", e.Asked, e.Server, e.Offered)
}

// TakenError says that a server leased an address that somebody on the LAN uses already.
type TakenError struct {
	Address netip.Addr
	Holder  MAC
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("address %s is used by %s already, without the DHCP server's knowledge: "+
		"give that host another address, or exclude this one from the server's range", e.Address, e.Holder)
}

// RefusedError says that a server answered with DHCPNAK.
type RefusedError struct {
	Address netip.Addr
	Server  netip.Addr // invalid: it did not say who it is
	Reason  string     // in the server's words, which may be none
}

func (e *RefusedError) Error() string {
	text := fmt.Sprintf("server %s refuses address %s", e.Server, e.Address)
	if e.Reason != "" {
		text += fmt.Sprintf(" (%q)", e.Reason)
	}
	return text + ": see the server's log"
}

// acquisition is the way from no address to a lease (RFC 2131, 3.1).
type acquisition struct {
	*Client
	lan     *lan
	request Request
	wanted  netip.Addr // asked for; invalid: any
	only    bool       // no other address than the wanted one is taken
}

// run tries until it has a lease or the context ends. Its error is the most telling of those of all tries. An address that
// alone is acceptable and cannot be had is an error at once.
func (a acquisition) run(ctx context.Context) (Lease, error) {
	var told error
	for n := 0; ; n++ {
		lease, err := a.try(ctx)
		if err == nil {
			return lease, nil
		}
		if told == nil || !errors.Is(err, ErrNoServer) {
			told = err
		}
		var offered *OfferedError
		var taken *TakenError
		if a.only && (errors.As(err, &offered) || errors.As(err, &taken)) {
			return Lease{}, err
		}
		if sleep(ctx, time.Now().Add(backoff(n))) != nil {
			return Lease{}, told
		}
	}
}

// try goes the way once.
func (a acquisition) try(ctx context.Context) (Lease, error) {
	x := a.lan.begin(a.request.MAC)
	defer x.end()
	offer, err := a.choose(ctx, x)
	if err != nil {
		return Lease{}, err
	}
	lease, err := a.confirm(ctx, x, offer)
	var refused *RefusedError
	switch {
	case errors.As(err, &refused):
		return Lease{}, err
	case err == nil && a.only && lease.Prefix.Addr() != a.wanted:
		_ = x.release(lease)
		return Lease{}, &OfferedError{a.wanted, lease.Prefix.Addr(), lease.Server}
	case err != nil: // the server may have leased the address, and its answer was lost
		_ = x.release(offer)
		return Lease{}, err
	}
	lease = a.lan.protocol.complete(ctx, x, lease)
	holder, err := a.probeAddress(ctx, a.lan.protocol, lease)
	switch {
	case ctx.Err() != nil:
		_ = x.release(lease)
		return Lease{}, ctx.Err()
	case err != nil:
		a.log.WithError(err).WithField("lease", lease).Warn("whether the leased address is used by somebody else could not be asked")
	case holder != MAC{}:
		err := &TakenError{lease.Prefix.Addr(), holder}
		a.log.WithField("lease", lease).Warnf("the leased address is declined: %v", err)
		_ = x.tell(a.lan.protocol.decline(x, lease))
		return Lease{}, err
	}
	return lease, nil
}

// choose waits for the first offer that will do.
func (a acquisition) choose(ctx context.Context, x *exchange) (Lease, error) {
	deadline, cancel := context.WithCancel(ctx)
	defer cancel()
	var offer Lease
	var other *OfferedError
	err := x.ask(deadline,
		func(int) []byte { return a.lan.protocol.discover(x, a.request, a.wanted) },
		backoff,
		func(m received) bool {
			if !m.offers() {
				return false
			}
			lease, err := m.lease(a.request, x.asked)
			switch {
			case err != nil:
				x.trouble = fmt.Errorf("the offer from %s cannot be used: %w", m.from, err)
				return false
			case a.only && lease.Prefix.Addr() != a.wanted:
				if other == nil {
					other = &OfferedError{a.wanted, lease.Prefix.Addr(), lease.Server}
					time.AfterFunc(otherServers, cancel)
				}
				return false
			}
			offer = lease
			return true
		})
	switch {
	case err == nil:
		return offer, nil
	case other != nil:
		return Lease{}, other
	case x.trouble != nil:
		return Lease{}, x.trouble
	case isSilence(err):
		return Lease{}, fmt.Errorf("%w%s within %s: check that one serves this LAN or VLAN, that a cable or switch leads to it, and that switch "+
			"and hypervisor let frames of the container's MAC pass (MAC spoofing, promiscuous mode)", ErrNoServer, a.lan.protocol.name(), time.Since(x.begun).Round(time.Second))
	}
	return Lease{}, err
}

// confirm asks for what was offered.
func (a acquisition) confirm(ctx context.Context, x *exchange, offer Lease) (Lease, error) {
	deadline, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	var lease Lease
	var refused error
	after := time.Since(x.begun)
	x.trouble = nil // what was wrong with other offers
	err := x.ask(deadline,
		func(int) []byte { return a.lan.protocol.accept(x, offer, after) },
		backoff,
		func(m received) (done bool) {
			if !m.of(offer) {
				return false
			}
			lease, refused, done = m.verdict(offer, x)
			return done
		})
	switch {
	case refused != nil:
		return Lease{}, refused
	case err == nil:
		return lease, nil
	case isSilence(err) && x.trouble != nil:
		return Lease{}, x.trouble
	case isSilence(err):
		return Lease{}, fmt.Errorf("server %s offered %s, but did not confirm it within %s: see the server's log", offer.Server, offer.Prefix, confirmTime)
	}
	return Lease{}, err
}

// verdict reads the answer to a request for an address: the lease, or the refusal. What is neither does not count.
func (r received) verdict(asked Lease, x *exchange) (lease Lease, refused error, done bool) {
	lease, err := r.grant(asked, x.asked)
	var no *RefusedError
	switch {
	case err == nil:
		return lease, nil, true
	case errors.As(err, &no):
		return Lease{}, no, true
	case !errors.Is(err, errOther):
		x.trouble = fmt.Errorf("the answer from %s cannot be used: %w", r.from, err)
	}
	return Lease{}, nil, false
}
