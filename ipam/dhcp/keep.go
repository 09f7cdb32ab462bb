package dhcp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// confirmAfterRestart is how long a recorded lease is asked about before it simply goes on.
	confirmAfterRestart = 15 * time.Second
	// restartFuzz spreads the questions about all leases that are recorded on a host (RFC 2131, 4.4.1, has 1 to 10 s).
	restartFuzz = 10 * time.Second
	// leastPause and mostPause bound the least pause between two requests for more time: 60 s in RFC 2131 (4.4.5), less for a
	// lease so short that it would have no second request.
	leastPause, mostPause = 4 * time.Second, time.Minute
)

// keeper keeps one lease. Its states are BOUND (waiting for T1), RENEWING and REBINDING in extend, INIT-REBOOT in confirm, and
// those from INIT on in acquisition.
type keeper struct {
	*Client
	lan      *lan
	cancel   context.CancelFunc
	done     chan struct{}
	previous *keeper // of the same lease, which has to end first

	mu    sync.Mutex
	lease Lease
}

func (k *keeper) current() Lease {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.lease
}

// run goes on until the context ends.
func (k *keeper) run(ctx context.Context, recorded bool) {
	defer close(k.done)
	if k.previous != nil {
		<-k.previous.done
		k.previous = nil
	}
	next := k.extend
	if recorded {
		next = k.confirm
	}
	for {
		held := k.current()
		lease, err := next(ctx, held)
		var refused *RefusedError
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			k.take(held, lease)
			next = k.extend
		case errors.Is(err, errSilent):
			next = k.extend
		case errors.As(err, &refused):
			k.report(held, Event{Kind: Refused, Previous: held, Err: err})
			next = k.again
		default:
			k.report(held, Event{Kind: Expired, Previous: held, Err: err})
			next = k.again
		}
	}
}

var (
	// errSilent says that nobody answered, which by itself changes nothing.
	errSilent = errors.New("no answer")
	// errExpired says that the address may no longer be used.
	errExpired = errors.New("the lease was not renewed in time")
)

// take replaces the lease.
func (k *keeper) take(held, lease Lease) {
	k.mu.Lock()
	k.lease = lease
	k.mu.Unlock()
	kind := Renewed
	if !held.SameSettings(lease) {
		kind = Changed
	}
	k.report(lease, Event{Kind: kind, Previous: held})
}

func (k *keeper) report(lease Lease, e Event) {
	log := k.log.WithField("lease", lease.String())
	switch e.Kind {
	case Renewed:
		log.Debug("the lease is renewed")
	case Changed:
		log.WithField("previous", e.Previous.String()).Warn("the lease has changed, and its container has not")
	default:
		log.WithError(e.Err).Warnf("the lease is %s; it is asked for again", e.Kind)
	}
	k.changed(lease, e)
}

// confirm asks about a lease from before a restart. When nobody answers it holds, as RFC 2131 (3.2) allows.
func (k *keeper) confirm(ctx context.Context, held Lease) (Lease, error) {
	left := time.Until(held.Expires())
	if left <= 0 {
		return Lease{}, errExpired
	}
	if err := sleep(ctx, time.Now().Add(rand.N(min(restartFuzz, left/4)+1))); err != nil {
		return Lease{}, err
	}
	return k.ask(ctx, held, time.Now().Add(min(confirmAfterRestart, left/2)), backoff,
		func(x *exchange, _ int) []byte { return k.lan.protocol.verify(x, held) },
		func(answer) bool { return true })
}

// extend waits for T1 and asks for more time: the server that granted the lease, and from T2 on everybody.
func (k *keeper) extend(ctx context.Context, held Lease) (Lease, error) {
	t1 := held.T1
	if t1 != Infinite {
		t1 -= rand.N(t1/20 + 1) // leases of the same moment are not renewed at the same moment
	}
	if err := sleep(ctx, held.Obtained.Add(t1)); err != nil {
		return Lease{}, err
	}
	lease, err := k.ask(ctx, held, held.Obtained.Add(held.T2), held.halfOfTheRest(held.T2),
		func(x *exchange, _ int) []byte { return k.lan.protocol.renew(x, held) },
		func(a answer) bool { return a.of(held) })
	if !errors.Is(err, errSilent) {
		return lease, err
	}
	renewing := err
	lease, err = k.ask(ctx, held, held.Expires(), held.halfOfTheRest(held.Lifetime),
		func(x *exchange, n int) []byte { return k.lan.protocol.rebind(x, held, n) },
		func(answer) bool { return true })
	if errors.Is(err, errSilent) {
		return Lease{}, fmt.Errorf("%w: asked its server: %v; asked everybody: %v", errExpired, renewing, err) //nolint:errorlint // it is not errSilent any more
	}
	return lease, err
}

// halfOfTheRest is the pause between requests for more time: half of the time that is left (RFC 2131, 4.4.5).
func (l Lease) halfOfTheRest(end time.Duration) func(int) time.Duration {
	least := min(max(l.Lifetime/16, leastPause), mostPause)
	return func(int) time.Duration { return max(time.Until(l.Obtained.Add(end))/2, least) }
}

// again asks for a new lease, with the same address if that can be had, for as long as it takes.
func (k *keeper) again(ctx context.Context, held Lease) (Lease, error) {
	return acquisition{Client: k.Client, lan: k.lan, request: held.Request, wanted: held.Prefix.Addr()}.run(ctx)
}

// ask asks for the lease until then, whoever may answer. Without an answer the error is errSilent.
func (k *keeper) ask(ctx context.Context, held Lease, until time.Time, pause func(int) time.Duration,
	frame func(*exchange, int) []byte, mayAnswer func(answer) bool,
) (lease Lease, err error) {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	x := k.lan.begin(held.MAC)
	defer x.end()
	var refused error
	err = x.ask(ctx, func(n int) []byte { return frame(x, n) }, pause, func(r received) bool {
		if !mayAnswer(r.answer) {
			return false
		}
		granted, no, done := r.verdict(held, x)
		switch {
		case !done:
			return false
		case no == nil:
			lease, refused = granted, nil
			return true
		case r.of(held):
			refused = no
			return true
		case refused == nil: // who knows nothing of the lease can be the first to say so
			refused = no
			time.AfterFunc(otherServers, cancel)
		}
		return false
	})
	switch {
	case refused != nil:
		return Lease{}, refused
	case isSilence(err) && x.trouble != nil:
		return Lease{}, fmt.Errorf("%w (%w)", errSilent, x.trouble)
	case isSilence(err):
		return Lease{}, errSilent
	}
	return lease, err
}
