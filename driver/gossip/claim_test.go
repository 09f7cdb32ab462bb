package gossip

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

var subnet = netip.MustParsePrefix("10.90.0.0/16")

func block(n, bits int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 90, byte(n >> 8), byte(n)}), bits)
}

// taken fails unless a claim did because of a host.
func taken(t *testing.T, err error, holder facts.Host) {
	t.Helper()
	if got, ok := IsTaken(err); !ok || got != holder || !strings.Contains(err.Error(), string(holder)) {
		t.Errorf("error %v, want one that %s has it", err, holder)
	}
}

func TestClaim(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		ctx := t.Context()
		one, two := c.hosts[1], c.hosts[2]
		begin := time.Now()
		if err := one.Claim(ctx, subnet, block(0, 24)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 100*time.Millisecond {
			t.Errorf("a claim took %v", took)
		}
		if err := one.Claim(ctx, subnet, block(0, 24)); err != nil {
			t.Errorf("claimed again: %v", err)
		}
		for _, b := range []netip.Prefix{block(0, 24), block(128, 25), block(0, 23), block(5, 32)} { // at once: no fact is known yet
			taken(t, two.Claim(ctx, subnet, b), one.self)
		}
		if err := two.Claim(ctx, netip.MustParsePrefix("10.91.0.0/16"), block(0, 24)); err == nil {
			t.Error("a block outside its subnet is claimed")
		}
		if err := two.Claim(ctx, netip.MustParsePrefix("10.0.0.0/8"), block(0, 24)); err != nil {
			t.Errorf("the block of another subnet: %v", err)
		}
		c.await(time.Minute, "everybody knows the block", func() bool {
			for _, m := range c.living() {
				if list := m.Blocks(subnet); len(list) != 1 || list[0].Owner != one.self || list[0].Prefix != block(0, 24) {
					return false
				}
			}
			return true
		})
		taken(t, two.Claim(ctx, subnet, block(0, 24)), one.self)
		one.Release(subnet, block(0, 24))
		c.await(time.Minute, "the block is free", func() bool { return two.Claim(ctx, subnet, block(0, 24)) == nil })
		if got := one.Holder(subnet, block(7, 32)); len(got) != 1 || got[0].Owner != two.self {
			t.Errorf("the holder is %v", got)
		}
	})
}

// TestRefusedClaims leave nothing behind at those who would have agreed, however often a host asks.
func TestRefusedClaims(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		one, two := c.hosts[1], c.hosts[2]
		if err := one.Claim(t.Context(), subnet, block(0, 24)); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			taken(t, two.Claim(t.Context(), subnet, block(0, 24)), one.self)
		}
		grants := func(m *member) (list []grant) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return slices.DeleteFunc(slices.Clone(m.grants), func(g grant) bool { return g.void || g.to == one.self })
		}
		c.await(grantHolds/2, "nothing is kept for the host that was refused", func() bool {
			return !slices.ContainsFunc(c.living(), func(m *member) bool { return len(grants(m)) > 0 })
		})
	})
}

// TestManyRefusedClaims: taking claims back does not keep a host from the next ones, in a large cluster too
// and where some do not answer.
func TestManyRefusedClaims(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := gathered(t, 200)
		defer c.stop()
		one, two := c.hosts[1], c.hosts[2]
		one.mu.Lock()
		one.claims = []*claim{{subnet: subnet, block: subnet}} // no other's goes first
		one.mu.Unlock()
		for _, m := range c.hosts[180:] {
			c.net.sever(two.config.Advertise, m.config.Advertise)
		}
		for i := range 32 { // as often as the address manager tries
			taken(t, two.Claim(t.Context(), subnet, block(i<<8, 24)), one.self)
		}
	})
}

// TestClaimBeyondTheLost: a claim asks every host that can be reached, however many cannot be, which are not yet found
// dead. The latter cost it little more time than one does.
func TestClaimBeyondTheLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := gathered(t, 200)
		defer c.stop()
		one, reached := c.hosts[1], c.hosts[2:31]
		for _, m := range c.hosts[31:] {
			c.net.sever(one.config.Advertise, m.config.Advertise)
		}
		begin := time.Now()
		if err := one.Claim(t.Context(), subnet, block(0, 24)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > claimTimeout+100*time.Millisecond {
			t.Errorf("the claim took %v", took)
		}
		asked := 0
		for _, m := range reached {
			if len(m.Holder(subnet, block(0, 24))) == 1 {
				asked++
			}
		}
		if asked < len(reached) {
			t.Errorf("of %d hosts that can be reached, %d were asked", len(reached), asked)
		}
		last := reached[len(reached)-1]
		if err := last.Claim(t.Context(), subnet, block(1<<8, 24)); err != nil {
			t.Fatal(err)
		}
		taken(t, one.Claim(t.Context(), subnet, block(1<<8, 24)), last.self)
	})
}

// TestLateUnclaim: what takes a failed claim back may come after the host has claimed the block again, and so
// may the failed claim.
func TestLateUnclaim(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 2)
		defer c.stop()
		one, two := c.hosts[1], c.hosts[2]
		failed := &claim{subnet: subnet, block: block(0, 24), number: 7}
		again := &claim{subnet: subnet, block: block(0, 24), number: 8}
		has := func(when string, want int) {
			t.Helper()
			if got := one.Holder(subnet, block(7, 32)); len(got) != want {
				t.Errorf("%s: the holders are %v, want %d", when, got, want)
			}
		}
		for _, claimed := range []*claim{failed, again, again, failed} {
			if status, answer, _ := one.serveClaim(two.self, encodeClaim(claimed)); status != statusOK {
				t.Fatalf("%d %s", status, answer)
			}
			has("claimed", 1)
		}
		one.serveUnclaim(two.self, encodeClaim(failed))
		has("the failed one taken back", 1)
		one.serveUnclaim(two.self, encodeClaim(again))
		has("both taken back", 0)
		mine := &claim{subnet: subnet, block: block(0, 24), rank: [32]byte{255, 255, 255}}
		claiming := func(list ...*claim) {
			one.mu.Lock()
			defer one.mu.Unlock()
			one.claims = list
		}
		claiming(mine)
		if status, answer, _ := one.serveClaim(two.self, encodeClaim(again)); status != statusNo || mine.lost != "" {
			t.Errorf("a claim that was taken back before it came: %d %s, and this host's own lost to %q", status, answer, mine.lost)
		}
		claiming()
		has("it came late", 0)
		again.number++
		if status, answer, _ := one.serveClaim(two.self, encodeClaim(again)); status != statusOK {
			t.Errorf("claimed once more: %d %s", status, answer)
		}
		has("claimed once more", 1)
	})
}

// TestContendedClaims has all hosts claim one block within a moment. Exactly one gets it.
func TestContendedClaims(t *testing.T) {
	for _, loss := range []float64{0, 0.05} {
		t.Run(fmt.Sprint("loss ", loss), func(t *testing.T) {
			sizes(t, func(t *testing.T, n int) {
				c := run(t, n)
				defer c.stop()
				c.net.lose(loss)
				for round := range 6 + 60/n {
					spread := []time.Duration{1, 2 * time.Millisecond, 20 * time.Millisecond}[round%3]
					done := make(chan error)
					var winner atomic.Value
					for _, m := range c.living() {
						go func() {
							elapse(rand.N(spread))
							bits := 24 + rand.IntN(2)
							err := m.Claim(context.Background(), subnet, block(256*round, bits))
							if _, ok := IsTaken(err); err != nil && !ok {
								t.Errorf("%s: %v", m.self, err)
							}
							if err == nil {
								winner.Store(m.self)
							}
							done <- err
						}()
					}
					won := 0
					for range n {
						if <-done == nil {
							won++
						}
					}
					if won != 1 && !(loss > 0 && won == 0) {
						t.Fatalf("round %d: %d hosts have the block", round, won)
					}
					if won == 1 && round%2 == 0 {
						c.await(time.Minute, "everybody knows who", func() bool {
							for _, m := range c.living() {
								if h := m.Holder(subnet, block(256*round, 24)); len(h) != 1 || h[0].Owner != winner.Load() {
									return false
								}
							}
							return true
						})
					}
				}
			})
		})
	}
}

// TestClaimYields has another host ask for a block that this one is asking for.
func TestClaimYields(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		g := c.hosts[1].Gossip
		granted := map[bool]int{}
		for i := range 64 {
			b := block(256*i, 24)
			mine := &claim{subnet: subnet, block: b, rank: rank(g.self, subnet, b)}
			g.mu.Lock()
			g.claims = []*claim{mine}
			g.mu.Unlock()
			holder, _ := g.consider(c.hosts[2].self, &claim{subnet: subnet, block: b})
			theirs := rank(c.hosts[2].self, subnet, b)
			first := bytes.Compare(mine.rank[:], theirs[:]) < 0
			if (holder == g.self) != first || (mine.lost == c.hosts[2].self) == first {
				t.Errorf("goes first: %v, but the holder is %q and it lost to %q", first, holder, mine.lost)
			}
			granted[first]++
		}
		if granted[true] < 10 || granted[false] < 10 {
			t.Errorf("the hash prefers a host: %v", granted)
		}
		g.mu.Lock()
		g.claims = nil
		g.mu.Unlock()
	})
}

func TestClaimOfOneAddress(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		var busy atomic.Bool
		c := run(t, n, func(i int, config *Config) {
			config.Busy = func(s, b netip.Prefix) bool { return s == subnet && busy.Load() }
		})
		defer c.stop()
		ctx := t.Context()
		one, two, three := c.hosts[1], c.hosts[2], c.hosts[3]
		if err := one.Claim(ctx, subnet, block(0, 24)); err != nil {
			t.Fatal(err)
		}
		elapse(30 * time.Second)
		if err := two.Claim(ctx, subnet, block(5, 32)); err != nil {
			t.Fatal(err)
		}
		if got := one.Holder(subnet, block(5, 32)); len(got) != 2 || got[0].Owner != two.self && got[1].Owner != two.self {
			t.Errorf("at once the lender takes the address to be of %v", got)
		}
		taken(t, three.Claim(ctx, subnet, block(5, 32)), two.self)
		taken(t, two.Claim(ctx, subnet, block(0, 25)), one.self)
		elapse(2 * time.Minute)
		if got := one.Holder(subnet, block(5, 32)); len(got) != 2 {
			t.Errorf("later the lender takes the address to be of %v", got)
		}
		for _, m := range c.living() {
			if got := m.Status().Conflicts; len(got) != 0 {
				t.Errorf("what was lent is a conflict: %v", got)
			}
		}
		busy.Store(true)
		taken(t, two.Claim(ctx, subnet, block(6, 32)), one.self)
		if got := one.Holder(subnet, block(6, 32)); len(got) != 1 {
			t.Errorf("what was not lent is of %v", got)
		}
		busy.Store(false)
		c.net.sever(address(1), address(2))
		taken(t, two.Claim(ctx, subnet, block(7, 32)), one.self) // it cannot agree
	})
}

// TestClaimInPartition claims on both sides; it is reported where they meet.
func TestClaimInPartition(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		ctx := t.Context()
		c.net.divide(func(a netip.Addr) bool { return a == address(n) })
		begin := time.Now()
		if err := c.hosts[1].Claim(ctx, subnet, block(0, 24)); err != nil {
			t.Fatalf("a member that cannot be reached has a say: %v", err)
		}
		if took := time.Since(begin); took > 1100*time.Millisecond {
			t.Errorf("the claim took %v", took)
		}
		taken(t, c.hosts[2].Claim(ctx, subnet, block(0, 24)), c.hosts[1].self)
		if err := c.hosts[n].Claim(ctx, subnet, block(0, 25)); err != nil {
			t.Fatal(err)
		}
		elapse(time.Minute)
		c.net.mend()
		c.met(2 * time.Minute)
		c.await(time.Minute, "everybody reports it", func() bool {
			for _, m := range c.living() {
				if s := m.Status(); len(s.Conflicts) != 1 || len(s.Conflicts[0].Facts) != 2 {
					return false
				}
			}
			return true
		})
		elapse(time.Minute)
		c.log.mu.Lock()
		said := 0
		for _, line := range c.log.lines {
			if strings.Contains(line, "several hosts have one address in "+subnet.String()) {
				said++
			}
		}
		c.log.mu.Unlock()
		if said != n {
			t.Errorf("%d hosts logged it %d times", n, said)
		}
		c.hosts[n].Release(subnet, block(0, 25))
		c.await(time.Minute, "the report ends", func() bool { return len(c.hosts[1].Status().Conflicts) == 0 })
	})
}

// TestClaimFromCopy has a host with another name and address, but a copy of this host's record, as of an image of it. It is no former
// self of this host: while it cannot be reached, it keeps what it has.
func TestClaimFromCopy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3, func(i int, config *Config) {
			if i == 3 {
				config.ID = "id1"
			}
		})
		defer c.stop()
		copied := c.hosts[3]
		if err := copied.Claim(t.Context(), subnet, block(0, 24)); err != nil {
			t.Fatal(err)
		}
		stated := func(m *member) bool {
			return slices.ContainsFunc(m.Blocks(subnet), func(f facts.Fact) bool { return f.Owner == copied.self && f.Counter > 0 })
		}
		c.await(time.Minute, "the others hear of the block", func() bool { return stated(c.hosts[1]) && stated(c.hosts[2]) })
		c.net.divide(func(a netip.Addr) bool { return a == address(3) })
		dead := func(m *member) bool {
			return slices.ContainsFunc(m.Peers(), func(p Peer) bool { return p.Host == copied.self && p.State == Dead })
		}
		c.await(2*time.Minute, "the others miss it", func() bool { return dead(c.hosts[1]) && dead(c.hosts[2]) })
		for _, m := range c.hosts[1:3] {
			taken(t, m.Claim(t.Context(), subnet, block(0, 24)), copied.self)
		}
	})
}

// TestLostRecord has a host start again in an epoch that others have heard of.
func TestLostRecord(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		m := c.hosts[n]
		m.Set(endpoint(1, 1), endpoint(2, 1))
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(1, 1).Key: m.self, endpoint(2, 1).Key: m.self})
		m.kill()
		m.config.Epoch = 0
		m.start(endpoint(3, 1))
		c.met(time.Minute)
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(3, 1).Key: m.self})
		if m.Epoch() < 2 {
			t.Errorf("the epoch is %d", m.Epoch())
		}
	})
}
