package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// inBubble runs a benchmark's work in virtual time: testing has no bubble for benchmarks.
func inBubble(b *testing.B, work func(b *testing.B)) {
	b.Helper()
	done := make(chan bool, 1)
	testing.RunTests(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{
		Name: b.Name(), F: func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { work(b) })
			done <- !t.Failed()
		},
	}})
	if !<-done {
		b.Fail()
	}
}

// optimum is the time that a fact takes to reach everybody if hosts do nothing but pass it on by
// memberlist's rule, on average of runs: each that knows it tells 3 at random per interval, a number
// of times that grows with the logarithm of the cluster's size. Runs that miss a host do not count.
func optimum(n int) time.Duration {
	budget, total, runs := 4*len(fmt.Sprint(n)), 0, 0
	for runs < 200 {
		left := make([]int, n)
		left[0] = budget
		knowing, ticks := 1, 0
		for telling := true; knowing < n && telling; ticks++ {
			telling = false
			for i, rest := range append([]int(nil), left...) {
				for k := 0; k < 3 && rest-k > 0; k++ {
					telling = true
					left[i]--
					if j := rand.IntN(n); j != i && left[j] == 0 {
						left[j] = budget
						knowing++
					}
				}
				if rest > 0 && left[i] == 0 {
					left[i] = -1 // it has said it often enough
				}
			}
		}
		if knowing == n {
			total += ticks
			runs++
		}
	}
	return 200 * time.Millisecond * time.Duration(total) / time.Duration(runs)
}

// BenchmarkFact measures in virtual time how long a fact takes to reach every host.
func BenchmarkFact(b *testing.B) {
	for _, n := range []int{25, 100, 300, 1000} {
		b.Run(fmt.Sprint(n, " hosts"), func(b *testing.B) {
			inBubble(b, func(b *testing.B) {
				c := gathered(b, n)
				defer c.stop()
				time.Sleep(5 * time.Second)
				var sum, worst time.Duration
				const runs = 20
				for i := range runs {
					s := endpoint(i, 1)
					m := c.hosts[1+rand.IntN(n)]
					m.Set(s)
					took := c.await(time.Minute, "every host has the fact", func() bool {
						for _, other := range c.hosts[1:] {
							if _, ok := other.Lookup(5000, s.Prefix.Addr()); !ok && other != m {
								return false
							}
						}
						return true
					})
					sum, worst = sum+took, max(worst, took)
					time.Sleep(2 * time.Second)
				}
				b.ReportMetric((sum / runs).Seconds(), "s/fact")
				b.ReportMetric(worst.Seconds(), "s/slowest")
				b.ReportMetric(float64(sum/runs)/float64(optimum(n)), "of-optimum")
			})
		})
	}
}

// BenchmarkBurst measures in virtual time how long 10,000 facts of one host take to reach 50.
func BenchmarkBurst(b *testing.B) {
	inBubble(b, func(b *testing.B) {
		const n, count = 50, 10_000
		c := run(b, n)
		defer c.stop()
		time.Sleep(30 * time.Second)
		before := c.net.streamed.Load()
		var all []Statement
		for i := range count {
			all = append(all, endpoint(i, 1))
		}
		c.hosts[7].Set(all...)
		took := c.await(10*time.Minute, "every host has all", func() bool {
			for _, m := range c.hosts[1:] {
				if m.known() != count {
					return false
				}
			}
			return true
		})
		b.ReportMetric(took.Seconds(), "s/burst")
		b.ReportMetric(float64(c.net.streamed.Load()-before)/n/count, "B/fact/host")
	})
}

// BenchmarkIdleSync measures the bytes of an exchange in which nothing has changed.
func BenchmarkIdleSync(b *testing.B) {
	inBubble(b, func(b *testing.B) {
		const n, count = 25, 100_000
		c := newCluster(b, n)
		defer c.stop()
		for i := 1; i <= n; i++ {
			var all []Statement
			for k := range count / n {
				all = append(all, endpoint(i*count/n+k, byte(i)))
			}
			c.hosts[i].start(all...)
		}
		c.met(10 * time.Minute)
		c.await(10*time.Minute, "every host has all", func() bool {
			for _, m := range c.hosts[1:] {
				if m.known() != count {
					return false
				}
			}
			return true
		})
		time.Sleep(time.Minute)
		m := c.hosts[3]
		m.mu.Lock()
		full := 0
		for d := range m.state.Difference(facts.Digest{}, chunk) {
			full += len(d.Append(nil))
		}
		digest := len(m.state.Digest().Append(nil))
		m.mu.Unlock()
		before := m.Status().Bytes
		if _, err := m.exchange(context.Background(), c.hosts[4].self); err != nil {
			b.Fatal(err)
		}
		idle := m.Status().Bytes - before
		b.ReportMetric(float64(idle), "B/idle-sync")
		b.ReportMetric(float64(digest), "B/digest")
		b.ReportMetric(float64(full), "B/full")
		b.ReportMetric(100*float64(idle)/float64(full), "%idle")
	})
}
