package gossip

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

func TestDeathAndReturn(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		s := endpoint(1, 1)
		c.hosts[n].Set(s)
		c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: c.hosts[n].self})
		c.hosts[n].kill()
		suspected, hidden := false, time.Duration(0)
		begin := time.Now()
		c.await(2*time.Minute, "the dead host's facts are hidden everywhere", func() bool {
			all := true
			for _, m := range c.living() {
				_, there := m.Lookup(5000, s.Prefix.Addr())
				for _, p := range m.Peers() {
					switch {
					case p.Name != fmt.Sprintf("h%d", n):
					case p.State == Suspect:
						suspected = true
						if !there {
							t.Fatalf("%s hides the facts of a suspect", m.self)
						}
					case p.State == Alive && !there:
						t.Fatalf("%s hides the facts of a living host", m.self)
					case p.State == Dead && there:
						t.Fatalf("%s shows the facts of a dead host", m.self)
					}
				}
				all = all && !there
			}
			hidden = time.Since(begin)
			return all
		})
		if !suspected || hidden < 3*time.Second {
			t.Errorf("dead after %v, suspected before: %v: suspicion must come first", hidden, suspected)
		}
		c.hosts[n].start(s)
		c.met(2 * time.Minute)
		c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: c.hosts[n].self})
		if _, ok := c.hosts[1].Lookup(5000, s.Prefix.Addr()); !ok {
			t.Error("the facts of the host that came back are not there")
		}
	})
}

func TestRestartKeepsWhatIsStatedAgain(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		kept, lost := endpoint(1, 1), endpoint(2, 1)
		c.hosts[n].Set(kept, lost)
		c.agree(time.Minute, map[facts.Key]facts.Host{kept.Key: c.hosts[n].self, lost.Key: c.hosts[n].self})
		c.hosts[n].kill()
		elapse(500 * time.Millisecond) // a restart of the plugin
		c.hosts[n].start(kept)
		c.await(time.Minute, "the old epoch is void everywhere", func() bool {
			for _, m := range c.living()[:n-1] {
				if _, ok := m.Lookup(5000, kept.Prefix.Addr()); !ok {
					t.Fatalf("%s lost a fact over a restart", m.self)
				}
				for _, p := range m.Peers() {
					if p.State == Dead || p.State == Away {
						t.Fatalf("%s takes %s for %s over a restart", m.self, p.Host, p.State)
					}
				}
				if _, ok := m.Lookup(5000, lost.Prefix.Addr()); ok {
					return false
				}
			}
			return true
		})
		c.met(time.Minute)
		c.agree(time.Minute, map[facts.Key]facts.Host{kept.Key: c.hosts[n].self})
	})
}

// TestRestartKeepsConflict: who has won a conflict, or lost it, does so after a restart too.
func TestRestartKeepsConflict(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		s, late := endpoint(1, 1), endpoint(1, 2)
		block := Statement{Key: facts.Key{Kind: facts.Block, Subnet: netip.MustParsePrefix("10.90.0.0/16"), Prefix: netip.MustParsePrefix("10.90.1.0/24")}}
		c.net.divide(func(a netip.Addr) bool { return a == address(2) })
		c.hosts[1].Set(s, block)
		c.hosts[2].Set(endpoint(2, 2), endpoint(3, 2), endpoint(4, 2), endpoint(5, 2), late)
		c.hosts[2].Delete(endpoint(2, 2).Key, endpoint(3, 2).Key)
		if err := c.hosts[2].Claim(t.Context(), block.Subnet, block.Prefix); err != nil {
			t.Fatal(err)
		}
		elapse(time.Minute)
		c.net.mend()
		c.met(2 * time.Minute)
		want := map[facts.Key]facts.Host{s.Key: c.hosts[2].self, endpoint(4, 2).Key: c.hosts[2].self, endpoint(5, 2).Key: c.hosts[2].self}
		c.agree(time.Minute, want)
		again := map[int][]Statement{1: {s, block}, 2: {late, block, endpoint(4, 2), endpoint(5, 2)}}
		for _, i := range []int{2, 1, 2} {
			c.hosts[i].kill()
			c.hosts[i].start(again[i]...)
			c.met(time.Minute)
			elapse(time.Minute)
			c.agree(0, want)
			for _, m := range c.living() {
				all := m.Status().Conflicts
				if len(all) != 2 || all[0].Facts[0].Owner != c.hosts[2].self || all[1].Facts[0].Owner != c.hosts[2].self {
					t.Errorf("h%d has restarted; %s sees the conflicts %+v, want two that h2 wins", i, m.self, all)
				}
			}
		}
		c.hosts[2].kill()
		if got := len(c.hosts[2].clocks); got != 4 {
			t.Errorf("%d clocks of h2 are on record, want those of the 4 facts that it states: %v", got, c.hosts[2].clocks)
		}
	})
}

// TestClocksThatCannotBeRecorded are tried again, unless newer ones have come.
func TestClocksThatCannotBeRecorded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var full atomic.Bool
		full.Store(true)
		c := newCluster(t, 1)
		m := c.hosts[1]
		save := m.config.SaveClocks
		m.config.SaveClocks = func(changed map[facts.Key]uint64) error {
			if full.Load() {
				return errors.New("the disk is full")
			}
			return save(changed)
		}
		m.start(endpoint(1, 1), endpoint(2, 1))
		defer c.stop()
		elapse(5 * time.Second)
		m.Delete(endpoint(1, 1).Key)
		full.Store(false)
		elapse(5 * time.Second)
		m.kill()
		if want := map[facts.Key]uint64{endpoint(2, 1).Key: 2}; !maps.Equal(m.clocks, want) {
			t.Errorf("on record: %v, want %v", m.clocks, want)
		}
		c.log.mu.Lock()
		defer c.log.mu.Unlock()
		if said := strings.Count(strings.Join(c.log.lines, "\n"), "the disk is full"); said != 1 {
			t.Errorf("it is logged %d times in some seconds", said)
		}
	})
}

func TestForget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 4)
		defer c.stop()
		for _, m := range c.hosts[1:] {
			m.memory = 40 * time.Minute // instead of a day, to be done sooner
			m.start()
		}
		c.met(time.Minute)
		c.hosts[4].Set(endpoint(4, 4))
		c.hosts[1].Set(endpoint(1, 1))
		c.hosts[1].Delete(endpoint(1, 1).Key)
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(4, 4).Key: c.hosts[4].self})
		c.hosts[4].kill()
		elapse(30 * time.Minute)
		for _, m := range c.living() {
			if s := m.Status(); s.Facts != 1 || s.Tombstones != 1 || len(m.Peers()) != 4 {
				t.Errorf("%s forgot too early: %+v", m.self, s)
			}
		}
		for _, m := range c.living() { // what is seen at one look is forgotten 40 minutes later, at the next look
			c.await(time.Hour, string(m.self)+" forgets", func() bool {
				s := m.Status()
				return s.Facts == 0 && s.Tombstones == 0 && len(m.Peers()) == 3
			})
		}
		c.hosts[4].start(endpoint(4, 4))
		c.met(time.Minute)
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(4, 4).Key: c.hosts[4].self})
	})
}

// TestAway: what a host stated that stops in order to be back holds until it is back, or has had its
// time.
func TestAway(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		s := endpoint(1, 1)
		h := c.hosts[n]
		self := h.self
		h.Set(s)
		c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: self})
		goes := func() {
			h.Away(t.Context())
			h.kill()
			c.await(2*time.Minute, "everybody knows that the host is away", func() bool {
				for _, m := range c.living() {
					if !slices.ContainsFunc(m.Peers(), func(p Peer) bool { return p.Host == self && p.State == Away }) {
						return false
					}
				}
				return true
			})
		}
		holds := func(want bool) bool {
			for _, m := range c.living() {
				if m.self == self {
					continue
				}
				_, there := m.Lookup(5000, s.Prefix.Addr())
				if there != want || slices.Contains(m.VTEPs(), address(n)) != want {
					return false
				}
			}
			return true
		}
		goes()
		elapse(awayHolds / 2)
		if !holds(true) {
			t.Error("what it stated is forgotten while it is away")
		}
		h.start(s)
		c.met(time.Minute)
		elapse(awayHolds) // the time that it had does not count any more
		if !holds(true) {
			t.Error("what it stated is forgotten though it is back")
		}
		goes()
		c.await(awayHolds+time.Minute, "everybody has given up the host that is not back", func() bool { return holds(false) })
		h.start(s)
		c.met(time.Minute)
		c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: self})
	})
}
