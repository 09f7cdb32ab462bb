package gossip

import (
	"net/netip"
	"os/exec"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// TestManyHosts takes clusters through what happens to one. Of a thousand few are cut off, and
// little is lost: each host that is suspected for another is news of which all tell all.
func TestManyHosts(t *testing.T) {
	t.Run("25", func(t *testing.T) { bubble(t, func(t *testing.T) { many(t, 25, 10, 0.25) }) })
	t.Run("100", func(t *testing.T) { bubble(t, func(t *testing.T) { many(t, 100, 50, 0.25) }) })
	t.Run("1000", func(t *testing.T) {
		// A host has 15 goroutines, and the race detector bears no more than 8,128.
		if raced(t) {
			unraced(t)
			return
		}
		defer debug.SetGCPercent(debug.SetGCPercent(200)) // collecting garbage is a third of the work else
		bubble(t, func(t *testing.T) { many(t, 1000, 3, 0.05) })
	})
}

func many(t *testing.T, n, away int, loss float64) {
	c := gathered(t, n)
	defer c.stop()
	want := map[facts.Key]facts.Host{}
	set := func(m *member, s Statement) {
		m.Set(s)
		want[s.Key] = m.self
	}
	agree := func(what string) {
		t.Helper()
		t.Logf("%s: %v", what, c.agree(time.Minute, want))
	}

	var all []time.Duration
	const runs = 5
	for i := range runs {
		set(c.hosts[1+i*n/10], endpoint(i, 1))
		all = append(all, c.agree(time.Minute, want))
	}
	slices.Sort(all)
	took, best := all[runs/2], optimum(n) // one that misses a host waits for an exchange, as in the optimum it does not
	t.Logf("a fact reaches everybody: %v", took)
	if took > 2*best {
		t.Errorf("a fact takes %v to reach everybody; by memberlist's rule it could be there in %v", took, best)
	}

	h := c.hosts[n/2]
	kept, gone, moved := endpoint(10, 1), endpoint(11, 1), endpoint(12, 1)
	c.net.lose(loss)
	set(h, kept)
	set(h, gone)
	agree("facts while packets are lost")
	c.net.lose(0)
	h.Delete(gone.Key)
	delete(want, gone.Key)
	agree("a fact is taken back")

	set(h, gone)
	set(c.hosts[n], moved)
	agree("more facts")
	h.kill()
	h.start(kept) // and no more
	delete(want, gone.Key)
	agree("a host has restarted")

	c.net.divide(func(a netip.Addr) bool { return a.Compare(address(n-away)) <= 0 })
	rest := c.hosts[1 : n-away+1]
	t.Logf("a cut is noticed: %v", c.await(2*time.Minute, "those who are more know who cannot be reached", func() bool {
		return !slices.ContainsFunc(rest, func(m *member) bool { return int(m.living.Load()) != len(rest) })
	}))
	c.hosts[n].Delete(moved.Key)
	set(c.hosts[1], endpoint(12, 2))
	set(c.hosts[2], endpoint(13, 1))
	set(c.hosts[n-1], endpoint(14, 1))
	elapse(2 * time.Second)
	c.net.mend()
	t.Logf("all have met again: %v", c.met(2*time.Minute))
	agree("and agree")
}

// raced reports whether the race detector is at work.
func raced(t *testing.T) bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Fatal("the program does not say how it was built")
	}
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// unraced runs the test in a program without the race detector.
func unraced(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "test", "-race=false", "-count=1", "-v", "-run", "^"+t.Name()+"$", ".").CombinedOutput()
	t.Logf("without the race detector:\n%s", out)
	if err != nil {
		t.Error(err)
	}
}
