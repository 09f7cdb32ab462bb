package dhcp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// exchange is one conversation of a client: a message with its repetitions, and the answers. All carry its number.
type exchange struct {
	lan     *lan
	id      uint32
	client  MAC
	answers chan received
	begun   time.Time
	asked   time.Time // when the last message was sent
	trouble error     // why nothing came of a message or an answer, the last of all reasons
}

// begin begins an exchange, which has to be ended.
func (l *lan) begin(client MAC) *exchange {
	l.mu.Lock()
	defer l.mu.Unlock()
	x := &exchange{lan: l, client: client, answers: make(chan received, 64), begun: time.Now()}
	for taken := true; taken; _, taken = l.exchanges[x.id] {
		x.id = rand.Uint32() & l.protocol.numbers() // which cannot be guessed by somebody who does not see it on the wire
	}
	l.exchanges[x.id] = x
	return x
}

func (x *exchange) end() {
	x.lan.mu.Lock()
	defer x.lan.mu.Unlock()
	delete(x.lan.exchanges, x.id)
	x.lan.idleLocked()
}

// tell sends a message that has no answer.
func (x *exchange) tell(frame []byte) error { return x.lan.send(frame) }

// release gives a lease back, and lets the server say that it has heard if it is one of those that do.
func (x *exchange) release(l Lease) error {
	p := x.lan.protocol
	if p.farewell() == 0 {
		return x.tell(p.release(x, l))
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.farewell())
	defer cancel()
	x.trouble = nil
	err := x.ask(ctx, func(int) []byte { return p.release(x, l) }, func(int) time.Duration { return p.farewell() / 2 },
		func(r received) bool { return r.of(l) && !r.offers() })
	if isSilence(err) {
		return x.trouble
	}
	return err
}

// ask sends the frame made by message, again after each pause, and hands every answer to accept until that returns true. Both
// are given the number of the message, from 0. The error is the context's.
func (x *exchange) ask(ctx context.Context, message func(n int) []byte, pause func(n int) time.Duration, accept func(received) bool) error {
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		x.lan.protocol.listen(x)
		x.asked = time.Now()
		if err := x.lan.send(message(n)); err != nil {
			x.trouble = fmt.Errorf("send: %w", err)
		}
		if done, err := x.listen(ctx, pause(n), accept); done || err != nil {
			return err
		}
	}
}

// listen waits for an answer that is accepted.
func (x *exchange) listen(ctx context.Context, pause time.Duration, accept func(received) bool) (bool, error) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-timer.C:
			return false, nil
		case r := <-x.answers:
			if r.err != nil {
				x.trouble = fmt.Errorf("an answer from %s cannot be used: %w", r.from, r.err)
			} else if accept(r) {
				return true, nil
			}
		}
	}
}

// backoff is how long to wait for an answer to the nth message: 1, 2, 4 … 64 s, give or take a quarter, at most 1 s. RFC 2131
// (4.1) begins with 4 s; the shorter ones are there so that a lost packet does not cost a container's start so much.
func backoff(n int) time.Duration {
	pause := time.Second << min(n, 6)
	return around(pause, min(pause/4, time.Second))
}

// around is a random duration within fuzz of d.
func around(d, fuzz time.Duration) time.Duration {
	return d - fuzz + rand.N(2*fuzz+1)
}

// sleep waits until then, or for the context's end.
func sleep(ctx context.Context, until time.Time) error {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// isSilence says whether an exchange ended because its time was over, not because the caller gave up.
func isSilence(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
