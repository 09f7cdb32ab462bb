package gossip

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestStrangers(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Config)
		reason string
		both   bool
	}{
		"wrong key":   {func(c *Config) { c.Keys = [][]byte{[]byte("ffffffffffffffff")} }, "wrong key", true},
		"no key":      {func(c *Config) { c.Keys = nil }, "not encrypted", false},
		"wrong label": {func(c *Config) { c.Label = "another" }, "wrong label", false},
		"no label":    {func(c *Config) { c.Label = "" }, "wrong label", false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				c := newCluster(t, 4, func(i int, config *Config) {
					if i == 4 {
						test.change(config)
					}
				})
				defer c.stop()
				for i := 1; i <= 3; i++ {
					c.hosts[i].start()
				}
				c.met(time.Minute)
				c.hosts[4].start(endpoint(4, 4))
				c.hosts[1].Set(endpoint(1, 1))
				elapse(10 * time.Minute)
				for i := 1; i <= 4; i++ {
					m := c.hosts[i]
					want := 3
					if i == 4 {
						want = 1
					}
					if got := m.Status().Alive; got != want {
						t.Errorf("%s knows %d hosts, want %d", m.self, got, want)
					}
				}
				if len(c.hosts[4].view()) != 1 || len(c.hosts[1].view()) != 1 {
					t.Errorf("facts have crossed: %v, %v", c.hosts[4].view(), c.hosts[1].view())
				}
				if c.hosts[4].Synced() {
					t.Error("the stranger takes itself to be in sync")
				}
				if got := c.hosts[1].Status().Refused[test.reason]; got == 0 {
					t.Errorf("the cluster counts %v, want %q", c.hosts[1].Status().Refused, test.reason)
				}
				if got := c.hosts[4].Status(); test.both && got.Refused[test.reason] == 0 {
					t.Errorf("the stranger counts %v, want %q", got.Refused, test.reason)
				} else if len(got.Errors) == 0 {
					t.Error("the stranger does not say what is wrong")
				}
				c.log.mu.Lock()
				defer c.log.mu.Unlock()
				if lines := len(c.log.lines); lines == 0 || lines > 100 {
					t.Errorf("%d lines are logged in ten minutes", lines)
				}
				if said := "gossip: refused (" + test.reason + "): "; !slices.ContainsFunc(c.log.lines, func(line string) bool { return strings.HasPrefix(line, said) }) {
					t.Errorf("no line is %q: %q", said, c.log.lines)
				}
			})
		})
	}
}

func TestKeyRotation(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		saved := make([][][]byte, n+1)
		c := run(t, n, func(i int, config *Config) {
			config.SaveKeys = func(keys [][]byte) error { saved[i] = keys; return nil }
		})
		defer c.stop()
		first, second := c.keys[0], []byte("fedcba9876543210fedcba9876543210")
		ok := func(results []KeyResult) {
			t.Helper()
			if len(results) != n {
				t.Fatalf("%d hosts answered, want %d", len(results), n)
			}
			for _, r := range results {
				if r.Err != nil {
					t.Fatalf("%s: %v", r.Host, r.Err)
				}
			}
		}
		bad := func(results []KeyResult) {
			t.Helper()
			for _, r := range results {
				if r.Err == nil {
					t.Fatalf("%s agreed", r.Host)
				}
			}
		}
		stop, done := make(chan struct{}), make(chan int)
		go func() { // facts flow all the while
			for i := 1; ; i++ {
				select {
				case <-stop:
					done <- i
					return
				case <-time.After(100 * time.Millisecond):
					c.hosts[1+i%n].Set(endpoint(i%200, byte(i%n)))
				}
			}
		}()
		ctx := t.Context()
		bad(c.hosts[1].KeyUse(ctx, second))
		bad(c.hosts[1].KeyRemove(ctx, first))
		bad(c.hosts[1].KeyAdd(ctx, []byte("short")))
		for _, turn := range []struct{ from, to []byte }{{first, second}, {second, first}, {first, second}} {
			ok(c.hosts[1].KeyAdd(ctx, turn.to))
			elapse(3 * time.Second)
			ok(c.hosts[n].KeyUse(ctx, turn.to))
			elapse(3 * time.Second)
			bad(c.hosts[2].KeyRemove(ctx, turn.to))
			ok(c.hosts[2].KeyRemove(ctx, turn.from))
			elapse(3 * time.Second)
		}
		close(stop)
		<-done
		c.agree(time.Minute, nil)
		for i := 1; i <= n; i++ {
			if got := c.hosts[i].Status(); got.Refused["wrong key"] > 0 || got.Alive != n {
				t.Errorf("%s lost messages: %+v", got.Self, got)
			}
			if got := c.hosts[i].Keys(); !slices.Equal(got, []string{Fingerprint(second)}) {
				t.Errorf("%s has keys %v", c.hosts[i].self, got)
			}
			if len(saved[i]) != 1 || !bytes.Equal(saved[i][0], second) {
				t.Errorf("%s has recorded %d keys", c.hosts[i].self, len(saved[i]))
			}
		}
	})
}

// TestKeyThatOneHostLacks does not cut it off.
func TestKeyThatOneHostLacks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		second := []byte("fedcba9876543210")
		c.hosts[3].kill()
		c.await(2*time.Minute, "it is dead", func() bool { return c.hosts[1].Status().Alive == 2 })
		if r := c.hosts[1].KeyAdd(t.Context(), second); len(r) != 2 || r[0].Err != nil {
			t.Fatalf("add: %v", r)
		}
		c.hosts[3].start()
		c.met(time.Minute)
		failed := 0
		for _, r := range c.hosts[1].KeyUse(t.Context(), second) {
			if r.Err != nil {
				failed++
			}
		}
		if failed != 1 {
			t.Errorf("%d hosts lack the key, want 1", failed)
		}
		for _, m := range c.living() {
			if m.Keys()[0] != Fingerprint(c.keys[0]) {
				t.Errorf("%s uses the new key", m.self)
			}
		}
	})
}
