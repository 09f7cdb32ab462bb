package gossip

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// TestDayOfPartition cuts a host off for just less than a day, which is how long what is taken back is kept in mind. What the
// others took back meanwhile, and what it took back itself, holds nowhere once they have met and compared what they know,
// and neither does it when that is forgotten.
func TestDayOfPartition(t *testing.T) {
	if raced(t) { // two days
		unraced(t)
		return
	}
	bubble(t, func(t *testing.T) {
		c := run(t, 3, func(_ int, config *Config) { config.Log.Logger.SetLevel(0) })
		defer c.stop()
		one, two, cut := c.hosts[1], c.hosts[2], c.hosts[3]
		kept, ofOne, ofTwo, ofCut := endpoint(1, 1), endpoint(2, 1), endpoint(3, 2), endpoint(4, 3)
		one.Set(kept, ofOne)
		two.Set(ofTwo)
		cut.Set(ofCut)
		c.agree(time.Minute, map[facts.Key]facts.Host{kept.Key: one.self, ofOne.Key: one.self, ofTwo.Key: two.self, ofCut.Key: cut.self})

		c.net.divide(func(a netip.Addr) bool { return a == address(3) })
		begin := time.Now()
		one.Delete(ofOne.Key)
		two.Delete(ofTwo.Key)
		cut.Delete(ofCut.Key)
		tombstones := func(m *member) (owners []facts.Host) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for o := range m.state.Owners() {
				if o.Tombstones > 0 {
					owners = append(owners, o.Host)
				}
			}
			return owners
		}
		has := func(m *member, owners ...facts.Host) bool { return slices.Equal(tombstones(m), owners) }
		oneName, twoName, cutName := one.self, two.self, cut.self
		c.await(time.Minute, "the host that is left has heard it", func() bool { return has(one, oneName, twoName) })
		two.kill() // and cannot say it again

		elapse(time.Until(begin.Add(forgetAfter - time.Minute)))
		if !has(one, oneName, twoName) || !has(cut, cutName) {
			t.Fatalf("before the day is over, taken back is of %v and, at the host that is cut off, of %v", tombstones(one), tombstones(cut))
		}
		if got := cut.known(); got != 3 { // else the test is of nothing
			t.Fatalf("the host that is cut off knows of %d facts, want the 3 of others", got)
		}
		c.net.mend()
		want := map[facts.Key]facts.Host{kept.Key: one.self}
		c.met(2 * time.Minute)
		c.agree(exchangeEvery, want)
		nowhere := func(limit time.Duration, holds func() bool) {
			t.Helper()
			c.await(limit, "what was taken back is forgotten", func() bool {
				for _, m := range c.living() {
					for _, s := range []Statement{ofOne, ofTwo, ofCut} {
						if f, back := m.view()[s.Key]; back {
							t.Fatalf("%v after it was taken back, %s has %v again", time.Since(begin), m.self, f)
						}
					}
				}
				return holds()
			})
		}
		healed := time.Now()
		// Each forgets what it has known of for a day, and the dead host with what that said. It looks every 10 minutes or so.
		nowhere(4*forgetEvery, func() bool {
			return has(one, cutName) && has(cut, oneName)
		})
		c.agree(0, want)
		elapse(time.Until(healed.Add(forgetAfter)))
		nowhere(4*forgetEvery, func() bool { return has(one) && has(cut) })
		elapse(time.Minute)
		c.agree(0, want)
	})
}
