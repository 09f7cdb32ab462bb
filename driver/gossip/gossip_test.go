package gossip

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// bubble runs a test in virtual time.
func bubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		test(t)
		elapse(streamTimeout) // for streams that were being opened
	})
}

// sizes runs a test with 3 and 25 hosts.
func sizes(t *testing.T, test func(t *testing.T, n int)) {
	for _, n := range []int{3, 25} {
		t.Run(fmt.Sprintf("%d hosts", n), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T) { test(t, n) })
		})
	}
}

func TestFactsReachEverybody(t *testing.T) {
	for _, loss := range []float64{0, 0.05, 0.25} {
		t.Run(fmt.Sprintf("loss %v", loss), func(t *testing.T) {
			sizes(t, func(t *testing.T, n int) {
				c := run(t, n)
				defer c.stop()
				c.net.lose(loss)
				want := map[facts.Key]facts.Host{}
				for i := 1; i <= n; i++ {
					for j := range 3 {
						s := endpoint(3*i+j, byte(i))
						c.hosts[i].Set(s)
						want[s.Key] = c.hosts[i].self
					}
				}
				c.agree(time.Minute, want)
				gone := endpoint(3, 1).Key
				c.hosts[1].Delete(gone)
				delete(want, gone)
				c.agree(time.Minute, want)
			})
		})
	}
}

func TestRemotes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		one, two := endpoint(1, 1), endpoint(2, 2)
		two6 := Statement{Key: EndpointKey(5000, netip.MustParseAddr("fd00::2")), MAC: two.MAC}
		c.hosts[1].Take()
		c.hosts[1].Set(one)
		c.hosts[2].Set(two, two6)
		c.agree(time.Minute, map[facts.Key]facts.Host{one.Key: c.hosts[1].self, two.Key: c.hosts[2].self, two6.Key: c.hosts[2].self})
		want := []Remote{
			{two.Prefix.Addr(), two.MAC, address(2), "h2/id2", "h2"},
			{two6.Prefix.Addr(), two.MAC, address(2), "h2/id2", "h2"},
		}
		if got := c.hosts[1].Remotes(5000); !slices.Equal(got, want) {
			t.Errorf("remotes of h1: %v, want %v", got, want)
		}
		if got := c.hosts[1].ByMAC(5000, two.MAC); !slices.Equal(got, want) {
			t.Errorf("remotes of h1 by MAC: %v, want %v", got, want)
		}
		if got, ok := c.hosts[1].Lookup(5000, two.Prefix.Addr()); !ok || got != want[0] {
			t.Errorf("lookup: %v %v, want %v", got, ok, want[0])
		}
		if got, ok := c.hosts[1].Lookup(5000, one.Prefix.Addr()); ok {
			t.Errorf("an own address is a remote: %v", got)
		}
		if got := c.hosts[1].Remotes(5001); len(got) != 0 {
			t.Errorf("remotes of another overlay: %v", got)
		}
		select {
		case <-c.hosts[1].Changed():
		default:
			t.Error("Changed has no token")
		}
		if got := c.hosts[1].Take(); len(got.Endpoints) != 3 || got.All || got.Blocks {
			t.Errorf("changes: %+v, want three endpoints", got)
		}
		if got := c.hosts[1].Take(); len(got.Endpoints) != 0 || got.Peers {
			t.Errorf("changes are told twice: %+v", got)
		}
		c.hosts[2].Set(Statement{Key: two.Key, MAC: [6]byte{2, 9}})
		c.hosts[2].Set(Statement{Key: two.Key, MAC: [6]byte{2, 10}})
		c.await(time.Minute, "h1 hears the second MAC", func() bool {
			r, _ := c.hosts[1].Lookup(5000, two.Prefix.Addr())
			return r.MAC == [6]byte{2, 10}
		})
		got := c.hosts[1].Take().Endpoints
		if len(got) != 1 || got[0].Before.MAC != two.MAC || got[0].After.MAC != [6]byte{2, 10} {
			t.Errorf("changes of one key are not put together: %+v", got)
		}
	})
}

// TestMissedNewcomer: a host that did not hear of another's coming hears of it by the next exchanges.
func TestMissedNewcomer(t *testing.T) {
	for range 20 { // memberlist's own full exchanges, every 30 s, can come first
		bubble(t, func(t *testing.T) {
			c := newCluster(t, 3, func(_ int, config *Config) { config.Seeds = []string{address(1).String()} })
			defer c.stop()
			c.hosts[1].start()
			c.hosts[2].start()
			c.met(time.Minute)
			c.net.divide(func(a netip.Addr) bool { return a == address(2) })
			c.hosts[3].start()
			c.await(time.Minute, "host 1 knows host 3", func() bool { return c.hosts[1].living.Load() == 3 })
			elapse(2 * time.Second)
			c.net.mend()
			c.await(3*exchangeEvery, "host 2 knows host 3", func() bool { return c.hosts[2].living.Load() == 3 })
		})
	}
}

// TestPartition divides the hosts for three minutes while both sides go on, and heals.
func TestPartition(t *testing.T) {
	for name, sever := range map[string]func(*cluster, int){
		"two ways": func(c *cluster, n int) {
			c.net.divide(func(a netip.Addr) bool { return a.Compare(address(n/2)) <= 0 })
		},
		"one way": func(c *cluster, n int) {
			for i := 1; i <= n/2; i++ {
				for j := n/2 + 1; j <= n; j++ {
					c.net.sever(address(i), address(j))
				}
			}
		},
		"one host hears nothing": func(c *cluster, n int) {
			for i := 1; i < n; i++ {
				c.net.sever(address(i), address(n))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			sizes(t, func(t *testing.T, n int) {
				c := run(t, n)
				defer c.stop()
				moved, gone := endpoint(1, byte(n)), endpoint(2, byte(n))
				c.hosts[n].Set(moved, gone)
				want := map[facts.Key]facts.Host{moved.Key: c.hosts[n].self, gone.Key: c.hosts[n].self}
				c.agree(time.Minute, want)
				sever(c, n)
				time.Sleep(90 * time.Second)
				// An address that moves is stated by its new host, whether or not the old one is heard.
				c.hosts[n].Delete(moved.Key, gone.Key)
				c.hosts[1].Set(endpoint(1, 1))
				want = map[facts.Key]facts.Host{moved.Key: c.hosts[1].self}
				for i := 1; i <= n; i++ {
					s := endpoint(100+i, byte(i))
					c.hosts[i].Set(s)
					want[s.Key] = c.hosts[i].self
				}
				time.Sleep(90 * time.Second)
				c.net.mend()
				healed := c.met(2 * time.Minute)
				healed += c.agree(time.Minute, want)
				t.Logf("healed in %v", healed)
				if r, ok := c.hosts[max(2, n-1)].Lookup(5000, moved.Prefix.Addr()); !ok || r.Host != c.hosts[1].self || r.MAC != endpoint(1, 1).MAC {
					t.Errorf("the address that moved is at %+v", r)
				}
			})
		})
	}
}

// TestHealWithoutSeeds divides a cluster whose seeds are gone.
func TestHealWithoutSeeds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 6)
		defer c.stop()
		c.hosts[1].kill()
		c.hosts[2].kill()
		c.net.divide(func(a netip.Addr) bool { return a.Compare(address(4)) <= 0 })
		time.Sleep(5 * time.Minute)
		for _, m := range c.living() {
			if got := m.Status().Alive; got != 2 {
				t.Fatalf("%s knows %d living hosts while divided", m.self, got)
			}
		}
		c.net.mend()
		c.met(2 * time.Minute)
	})
}

func TestAddressReuse(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n)
		defer c.stop()
		s := endpoint(1, 1)
		c.hosts[1].Set(s)
		c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: c.hosts[1].self})
		for turn := range 6 { // from host to host; the new one often is heard before the old one's end
			from, to := c.hosts[1+turn%2], c.hosts[1+(turn+1)%2]
			from.Delete(s.Key)
			to.Set(endpoint(1, byte(10+turn)))
			c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: to.self})
		}
		// Both at once: one wins everywhere, and the others say so.
		c.hosts[1].Set(endpoint(2, 1))
		c.hosts[2].Set(endpoint(2, 2))
		c.await(time.Minute, "the conflict is reported everywhere", func() bool {
			for _, m := range c.living() {
				if len(m.Status().Conflicts) != 1 {
					return false
				}
			}
			return true
		})
		c.agree(time.Minute, nil)
	})
}

func TestSameName(t *testing.T) {
	sizes(t, func(t *testing.T, n int) {
		c := run(t, n, func(i int, config *Config) {
			if i == n {
				config.Name = "h1"
			}
		})
		defer c.stop()
		c.await(time.Minute, "everybody reports the name", func() bool {
			for _, m := range c.living() {
				if got := m.Status().Names; len(got) != 2 || got[0] != "h1/id1 at "+address(1).String() {
					return false
				}
			}
			return true
		})
		said := 0
		c.log.mu.Lock()
		for _, line := range c.log.lines {
			if strings.Contains(line, "two hosts have one name") {
				said++
			}
		}
		c.log.mu.Unlock()
		if said != n {
			t.Errorf("%d hosts logged it %d times, want once each", n, said)
		}
		one, other := endpoint(1, 1), endpoint(2, 2)
		c.hosts[1].Set(one)
		c.hosts[n].Set(other)
		c.agree(time.Minute, map[facts.Key]facts.Host{one.Key: "h1/id1", other.Key: c.hosts[n].self})
		c.hosts[n].kill()
		c.await(2*time.Minute, "the report ends with one of them", func() bool {
			return !slices.ContainsFunc(c.living(), func(m *member) bool { return len(m.Status().Names) > 0 })
		})
	})
}

func TestSameIdentity(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 3, func(i int, config *Config) {
			if i == 3 {
				config.Name, config.ID = "h2", "id2" // a copied record
			}
		})
		defer c.stop()
		c.hosts[1].start()
		c.hosts[2].start()
		c.met(time.Minute)
		c.hosts[3].start()
		c.await(time.Minute, "the first host reports it", func() bool {
			return slices.Contains(c.hosts[1].Status().Names, "h2/id2 at "+netip.AddrPortFrom(address(3), port).String())
		})
	})
}

func TestSynced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 3, func(i int, config *Config) {
			if i == 1 {
				config.Seeds = []string{address(1).String()}
			}
		})
		defer c.stop()
		c.hosts[2].start(endpoint(2, 2))
		time.Sleep(10 * time.Minute)
		if c.hosts[2].Synced() {
			t.Error("a host whose seeds are away is in sync")
		}
		if got := c.hosts[2].Status().Errors; len(got) == 0 {
			t.Error("nothing says why")
		}
		c.hosts[3].start()
		c.hosts[1].start()
		c.await(time.Second, "the host that is its own seed is in sync", func() bool { return c.hosts[1].Synced() })
		c.met(time.Minute)
		c.agree(time.Second, map[facts.Key]facts.Host{endpoint(2, 2).Key: c.hosts[2].self})
	})
}

// TestAllStartAtOnce: a host that has met only others that have just started themselves does not know what
// is, until it has met all.
func TestAllStartAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 3, func(i int, config *Config) { config.Seeds = []string{address(1).String(), address(2).String()} })
		defer c.stop()
		c.hosts[1].start()
		c.hosts[2].start()
		late := endpoint(3, 3)
		for range 100 {
			elapse(100 * time.Millisecond)
			if c.hosts[1].Synced() || c.hosts[2].Synced() {
				t.Fatal("a host is in sync before the third is there")
			}
		}
		c.hosts[3].start(late)
		c.met(time.Minute)
		for _, m := range c.living() {
			if _, there := m.Lookup(5000, late.Prefix.Addr()); !there && m.self != c.hosts[3].self {
				t.Errorf("%s is in sync without what the third states", m.self)
			}
		}
		c.hosts[3].kill()
		c.hosts[3].start(late)
		c.await(5*time.Second, "who comes back to those who know is in sync at once", func() bool { return c.hosts[3].Synced() })
	})
}

// TestSyncedMeansAll has a host join a cluster with many facts: once it is in sync it has all.
func TestSyncedMeansAll(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 3)
		defer c.stop()
		want := map[facts.Key]facts.Host{}
		var all []Statement
		for i := range 15_000 {
			s := endpoint(i, 1)
			all = append(all, s)
			want[s.Key] = "h1/id1"
		}
		c.hosts[1].start(all...)
		c.hosts[2].start()
		c.met(time.Minute)
		c.agree(time.Minute, want)
		c.hosts[3].start()
		c.await(time.Minute, "the third is in sync", func() bool { return c.hosts[3].Synced() })
		if got := len(c.hosts[3].view()); got != len(want) {
			t.Errorf("in sync with %d facts of %d", got, len(want))
		}
		if changes := c.hosts[3].Take(); len(changes.Endpoints) != len(want) || changes.All {
			t.Errorf("%d changes are told, all: %v", len(changes.Endpoints), changes.All)
		}
	})
}

// TestBulk: 100,000 facts reach a host that lacks them in messages far below the limit. An exchange in which nothing has changed
// takes a hundredth of that at most.
func TestBulk(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const count = 100_000
		c := newCluster(t, 2)
		defer c.stop()
		one, two := c.hosts[1], c.hosts[2]
		var all []Statement
		for i := range count {
			s := endpoint(i%50_000, 1)
			s.VSID += uint32(i / 50_000)
			all = append(all, s)
		}
		one.start(all...)
		two.start()
		c.met(time.Minute)
		c.await(time.Minute, "the other host has all", func() bool { return two.known() == count })
		if got := c.net.longest.Load(); got < chunk || got > maxMessage/4 {
			t.Errorf("the longest message has %d bytes: parts have about %d, and the limit is %d", got, chunk, maxMessage)
		}
		full := c.net.streamed.Load()
		elapse(time.Minute)
		before := two.Status().Bytes
		if sent, err := two.exchange(t.Context(), one.self); sent > 0 || err != nil {
			t.Fatal(sent, err)
		}
		if idle := int64(two.Status().Bytes - before); 100*idle > full {
			t.Errorf("an exchange of nothing takes %d bytes, and that of all %d", idle, full)
		}
	})
}

// TestLongPartition lasts longer than a dead host is remembered.
func TestLongPartition(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 3)
		defer c.stop()
		for _, m := range c.hosts[1:] {
			m.memory = 30 * time.Minute // instead of a day, to be done sooner
			m.start()
		}
		c.met(time.Minute)
		want := map[facts.Key]facts.Host{}
		for i := 1; i <= 3; i++ {
			c.hosts[i].Set(endpoint(i, byte(i)), endpoint(10+i, byte(i)))
			want[endpoint(i, byte(i)).Key] = c.hosts[i].self
		}
		time.Sleep(time.Minute)
		c.net.divide(func(a netip.Addr) bool { return a == address(3) })
		time.Sleep(20 * time.Minute)
		for i := 1; i <= 3; i++ {
			c.hosts[i].Delete(endpoint(10+i, byte(i)).Key)
		}
		time.Sleep(time.Hour)
		c.net.mend()
		c.met(2 * time.Minute)
		c.agree(time.Minute, want)
	})
}

func TestNewRefuses(t *testing.T) {
	good := Config{Name: "h", ID: "i", Port: port, Advertise: netip.MustParseAddr("127.0.0.1")}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for want, change := range map[string]func(*Config){
		"name":           func(c *Config) { c.Name = "a/b" },
		"ID":             func(c *Config) { c.ID = "" },
		"port 0":         func(c *Config) { c.Port = 0 },
		"advertise":      func(c *Config) { c.Advertise = netip.Addr{} },
		"24 or 32":       func(c *Config) { c.Keys = [][]byte{[]byte("short")} },
		"label":          func(c *Config) { c.Label = strings.Repeat("x", 256) },
		"no seed":        func(c *Config) { c.Seeds = []string{"a:b:c"} },
		"already in use": func(c *Config) { c.Bind, c.Port = good.Advertise, uint16(taken.Addr().(*net.TCPAddr).Port) },
		"cannot assign":  func(c *Config) { c.Bind = netip.MustParseAddr("198.19.255.254") },
	} {
		config := good
		change(&config)
		if _, err := New(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

func TestHundredHosts(t *testing.T) {
	if raced(t) { // a quarter of all the time that the package takes, and TestManyHosts is raced with as many
		unraced(t)
		return
	}
	bubble(t, func(t *testing.T) {
		c := run(t, 100)
		defer c.stop()
		s := endpoint(1, 1)
		c.hosts[7].Set(s)
		took := c.agree(time.Minute, map[facts.Key]facts.Host{s.Key: c.hosts[7].self})
		t.Logf("a fact reached 100 hosts in %v", took)
		want := map[facts.Key]facts.Host{s.Key: c.hosts[7].self}
		for i := range 400 {
			other := endpoint(10+i, 9)
			c.hosts[9].Set(other)
			want[other.Key] = c.hosts[9].self
		}
		took = c.agree(time.Minute, want)
		t.Logf("400 facts reached 100 hosts in %v", took)
		for i := 91; i <= 100; i++ {
			c.hosts[i].kill()
		}
		c.await(2*time.Minute, "everybody knows who is dead", func() bool {
			return !slices.ContainsFunc(c.living(), func(m *member) bool { return m.living.Load() != 90 })
		})
	})
}

// TestRandomHistories cuts, heals, kills, starts, states and takes back at random. In the end all
// living hosts know the same, and nobody points to a host that does not own the address.
func TestRandomHistories(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T) { history(t, rand.New(rand.NewPCG(seed, 4))) })
		})
	}
}

func history(t *testing.T, r *rand.Rand) {
	n := 3 + r.IntN(6)
	c := run(t, n)
	defer c.stop()
	owned := make([]map[int]Statement, n+1) // of each host, on its record
	for i := range owned {
		owned[i] = map[int]Statement{}
	}
	record := func(i int) (out []Statement) {
		for _, s := range owned[i] {
			out = append(out, s)
		}
		return out
	}
	for range 40 {
		i, k := 1+r.IntN(n), r.IntN(12)
		m := c.hosts[i]
		running := m.Gossip != nil
		switch what := r.IntN(12); {
		case what < 4: // state
			s := endpoint(k, byte(r.IntN(256)))
			owned[i][k] = s
			if running {
				m.Set(s)
			}
		case what < 7: // take back
			delete(owned[i], k)
			if running {
				m.Delete(endpoint(k, 0).Key)
			}
		case what == 7 && running:
			m.kill()
		case what == 8 && !running:
			m.start(record(i)...)
		case what == 9:
			c.net.sever(address(i), address(1+r.IntN(n)))
		case what == 10:
			side := r.IntN(1 << n)
			c.net.divide(func(a netip.Addr) bool { return side>>(int(a.As4()[3])-1)&1 == 1 })
		case what == 11:
			c.net.mend()
		}
		c.net.lose([]float64{0, 0, 0.05, 0.25}[r.IntN(4)])
		time.Sleep(rand.N([]time.Duration{time.Second, 10 * time.Second, 2 * time.Minute}[r.IntN(3)]))
	}
	c.net.mend()
	c.net.lose(0)
	if r.IntN(2) == 0 { // else those that are away stay away
		for i := 1; i <= n; i++ {
			if c.hosts[i].Gossip == nil {
				c.hosts[i].start(record(i)...)
			}
		}
	}
	if len(c.living()) == 0 {
		c.hosts[1].start(record(1)...)
		c.hosts[2].start(record(2)...)
	}
	for i := 3; i <= n; i++ { // somebody has to be there who is known to all
		if c.hosts[1].Gossip == nil && c.hosts[2].Gossip == nil {
			c.hosts[1].start(record(1)...)
		}
	}
	if len(c.living()) > 1 {
		c.met(5 * time.Minute)
	}
	c.agree(2*time.Minute, nil)
	time.Sleep(time.Minute)
	c.agree(0, nil)
	claimed := map[int]bool{}
	for i, m := range c.hosts {
		if m == nil || m.Gossip == nil {
			continue
		}
		for k := range owned[i] {
			claimed[k] = true
		}
		for _, remote := range m.Remotes(5000) {
			bytes := remote.Address.As4()
			at := int(strings.TrimPrefix(remote.HostName, "h")[0] - '0')
			s, ok := owned[at][int(bytes[3])]
			if !ok || c.hosts[at].Gossip == nil || remote.MAC != s.MAC || remote.VTEP != address(at) {
				t.Errorf("%s points %s to %s with %x, which owns it: %v", m.self, remote.Address, remote.HostName, remote.MAC, ok)
			}
		}
	}
	if got := len(c.living()[0].view()); got != len(claimed) {
		t.Errorf("%d addresses are known, %d are owned", got, len(claimed))
	}
}

// elapse lets virtual time pass.
func elapse(d time.Duration) { time.Sleep(d) }

// TestSeedIsThisHost: a name of this host can lead to a loopback address, as in Debian's /etc/hosts.
// With no other seed there is nobody to wait for.
func TestSeedIsThisHost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 1, func(_ int, c *Config) { c.Seeds, c.Bind = []string{"127.0.1.1"}, c.Advertise })
		c.hosts[1].start()
		defer c.stop()
		elapse(time.Second)
		if !c.hosts[1].Synced() {
			t.Error("a host whose only seed is itself waits for others")
		}
	})
}
