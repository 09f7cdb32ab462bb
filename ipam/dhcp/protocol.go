package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// protocol is what DHCP for IPv4 (RFC 2131) and for IPv6 (RFC 8415) do not have in common: what is said, and how. When it is
// said, and what comes of it, is the same for both. There is one for each LAN. What it makes are whole frames.
type protocol interface {
	// name is for people.
	name() string
	// answers is what has to be heard while something is asked, probes while somebody is looked for who uses an address.
	answers() traffic
	probes() traffic
	// numbers is a mask of the bits that the number of an exchange has.
	numbers() uint32
	// heard takes note of a frame of those. It finds the exchange that a message is of.
	heard(l *lan, frame []byte, unsummed bool)

	// listen makes the way ready for the answers to a message.
	listen(x *exchange)
	// discover asks who has an address, preferably the wanted one.
	discover(x *exchange, r Request, wanted netip.Addr) []byte
	// accept takes one server's offer, so long after the discovery began.
	accept(x *exchange, offer Lease, after time.Duration) []byte
	// verify asks whoever may answer whether a lease from before a restart holds.
	verify(x *exchange, l Lease) []byte
	// renew asks the lease's server for more time, rebind whoever may answer, with message n of those, from 0.
	renew(x *exchange, l Lease) []byte
	rebind(x *exchange, l Lease, n int) []byte
	// decline tells the server that somebody else uses the address.
	decline(x *exchange, l Lease) []byte
	// release gives the address back.
	release(x *exchange, l Lease) []byte
	// farewell is how long a server has to say that it has heard that; 0: it does not say.
	farewell() time.Duration

	// complete adds what a container needs to know beside what the server tells.
	complete(ctx context.Context, x *exchange, l Lease) Lease
	// probe asks who uses the address; claimant reads who does, or is about to, from a frame: no MAC says nobody.
	probe(l Lease) []byte
	claimant(frame []byte, l Lease) MAC
}

// protocol is the one that a request is for.
func (r Request) protocol() protocol {
	if r.IPv6 {
		return newSix()
	}
	return four{}
}

// answer is a server's message.
type answer interface {
	// offers says whether it is the answer to a discovery.
	offers() bool
	// of says whether it is from the server that the lease is from.
	of(l Lease) bool
	// lease reads what is offered to a client that asked at that time.
	lease(r Request, asked time.Time) (Lease, error)
	// grant reads what became of a lease that was asked for at that time. The error is a *RefusedError if the server does not
	// grant it, and errOther if the message is about something else.
	grant(l Lease, asked time.Time) (Lease, error)
}

// errOther says that a message does not answer the question.
var errOther = errors.New("the message is about something else")

// received is an answer, or what is wrong with it.
type received struct {
	answer
	from MAC // the server, or the relay
	err  error
}
