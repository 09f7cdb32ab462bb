package gossip

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"
)

// TestClaimAfterStart: a host that has just started knows of no other, and asks all the same, what a dead one has
// included. While it reaches none it waits, unless that lasts.
func TestClaimAfterStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		ctx, one, two, three := t.Context(), c.hosts[1], c.hosts[2], c.hosts[3]
		for i, m := range []*member{one, two} {
			if err := m.Claim(ctx, subnet, block(i<<8, 24)); err != nil {
				t.Fatal(err)
			}
		}
		elapse(time.Minute)
		dead := two.self
		two.kill()
		three.kill()
		elapse(time.Minute)
		three.start()
		taken(t, three.Claim(ctx, subnet, block(0, 24)), one.self)
		taken(t, three.Claim(ctx, subnet, block(1<<8, 24)), dead)

		three.kill()
		c.net.divide(func(a netip.Addr) bool { return a == address(3) })
		three.start()
		short, cancel := context.WithTimeout(ctx, gathering/2)
		defer cancel()
		if err := three.Claim(short, subnet, block(0, 24)); !errors.Is(err, errUnacquainted) {
			t.Errorf("claimed before anybody has been met: %v", err)
		}
		begin := time.Now()
		if err := three.Claim(ctx, subnet, block(2<<8, 24)); err != nil {
			t.Errorf("a host that is cut off: %v", err)
		}
		if took := time.Since(begin); took > gathering/2+time.Second {
			t.Errorf("that took %v", took)
		}
	})
}

// TestClaimInTime: who does not answer keeps nobody waiting for longer than a second, however long the caller
// would wait; and a claim whose caller waits no more is no claim.
func TestClaimInTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		one := c.hosts[1]
		c.net.sever(address(2), address(1))
		c.net.sever(address(3), address(1))
		claim := func(limit time.Duration, b netip.Prefix) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			begin := time.Now()
			err := one.Claim(ctx, subnet, b)
			return time.Since(begin), err
		}
		if took, err := claim(20*time.Second, block(1<<8, 24)); err != nil || took > claimTimeout+100*time.Millisecond {
			t.Errorf("with hosts that do not answer a claim took %v: %v", took, err)
		}
		if _, err := claim(claimTimeout/2, block(2<<8, 24)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a claim that was not waited for: %v", err)
		}
		if holders := one.Holder(subnet, block(2<<8, 24)); len(holders) > 0 {
			t.Errorf("it is held: %v", holders)
		}
	})
}
