package gossip

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip/facts"
)

const port = 7947

// cluster is hosts in a network in memory. It has to be in a synctest bubble.
type cluster struct {
	t     testing.TB
	net   *network
	hosts []*member
	log   *book
	keys  [][]byte
}

// member is a host, running or not. Its record survives.
type member struct {
	*Gossip
	config Config
	memory time.Duration // 0: as it is
	clocks map[facts.Key]uint64
	c      *cluster
	cancel context.CancelFunc
	done   chan struct{}
}

// book keeps what was logged.
type book struct {
	mu    sync.Mutex
	lines []string
}

func (b *book) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel, logrus.ErrorLevel} }
func (b *book) Fire(e *logrus.Entry) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, e.Message)
	return nil
}

func address(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}) }

// newCluster makes hosts 1 to n that know hosts 1 and 2 as seeds; none is running.
func newCluster(t testing.TB, n int, change ...func(i int, c *Config)) *cluster {
	c := &cluster{t: t, net: newNetwork(), log: &book{}, keys: [][]byte{[]byte("0123456789abcdef")}}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	if testing.Verbose() && n <= 4 {
		logger.SetOutput(t.Output())
		logger.SetLevel(logrus.DebugLevel)
	}
	logger.AddHook(c.log)
	c.hosts = make([]*member, n+1)
	for i := 1; i <= n; i++ {
		config := Config{
			Name: fmt.Sprintf("h%d", i), ID: fmt.Sprintf("id%d", i), Port: port, Advertise: address(i), Label: "lab",
			Seeds: []string{address(1).String(), fmt.Sprintf("%s:%d", address(min(2, n)), port)},
			Keys:  c.keys, Version: "1", Log: logrus.NewEntry(logger).WithField("host", i),
		}
		for _, f := range change {
			f(i, &config)
		}
		m := &member{config: config, c: c, clocks: map[facts.Key]uint64{}}
		m.config.SaveClocks = func(changed map[facts.Key]uint64) error {
			for k, clock := range changed {
				if m.clocks[k] = clock; clock == 0 {
					delete(m.clocks, k)
				}
			}
			return nil
		}
		c.hosts[i] = m
	}
	return c
}

// run starts a cluster and waits until every host knows every other.
func run(t testing.TB, n int, change ...func(i int, c *Config)) *cluster {
	c := newCluster(t, n, change...)
	for i := 1; i <= n; i++ {
		c.hosts[i].start()
	}
	c.met(time.Minute)
	return c
}

// gathered is a cluster of any size that is a while old: its hosts have met and know the same. As they
// start, memberlist has each tell each of each a dozen times, which at 1,000 hosts are 16 million
// messages. Here they meet by one full exchange each, up a tree and down again, and have nothing left
// to say. All after that is as it is elsewhere.
func gathered(t testing.TB, n int) *cluster {
	c := newCluster(t, n, func(_ int, c *Config) { c.Log.Logger.SetLevel(logrus.WarnLevel) })
	for _, m := range c.hosts[1:] {
		m.open()
	}
	c.hosts[1].synced = true // it was the first
	c.tree(func(a, b *member) {
		if _, err := a.list.Join([]string{b.wire.Transport.(*station).addr.String()}); err != nil {
			t.Error(err)
		}
		a.hush()
		b.hush()
	})
	c.tree(func(a, b *member) {
		if _, err := b.exchange(context.Background(), a.self); err != nil {
			t.Error(err)
		}
	})
	for _, m := range c.hosts[1:] {
		m.hush()
		m.run()
	}
	c.met(0)
	return c
}

// hush has a host forget what it was about to say, and whom it was about to ask, because of hosts
// that it met.
func (m *member) hush() {
	membership := reflect.ValueOf(m.list).Elem().FieldByName("broadcasts")
	(*memberlist.TransmitLimitedQueue)(membership.UnsafePointer()).Reset()
	m.queue.Reset()
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.wanted)
	for _, token := range []chan struct{}{m.kick, m.burst} {
		select {
		case <-token:
		default:
		}
	}
}

// tree does something for pairs of hosts along a binary tree: so that what each of a pair knows the
// other knows too, first the root, host 1, knows all, and then everybody.
func (c *cluster) tree(do func(a, b *member)) {
	n := len(c.hosts) - 1
	level := func(step int) {
		var all sync.WaitGroup
		for i := 1; i+step <= n; i += 2 * step {
			all.Go(func() { do(c.hosts[i], c.hosts[i+step]) })
		}
		all.Wait()
	}
	step := 1
	for ; step < n; step *= 2 {
		level(step)
	}
	for ; step > 0; step /= 2 {
		level(step)
	}
}

// start runs a host with the next epoch and what it is to state.
func (m *member) start(statements ...Statement) {
	m.c.t.Helper()
	m.open(statements...)
	m.run()
}

// open has a host listen and answer.
func (m *member) open(statements ...Statement) {
	m.c.t.Helper()
	m.config.Epoch++
	config := m.config
	config.Clocks = maps.Clone(m.clocks)
	config.Transport = m.c.net.station(netip.AddrPortFrom(config.Advertise, config.Port))
	g, err := New(config)
	if err != nil {
		m.c.t.Fatal(err)
	}
	if m.memory > 0 {
		g.memory = m.memory
	}
	m.Gossip, m.done = g, make(chan struct{})
	m.Set(statements...)
	m.Seal()
}

func (m *member) run() {
	g := m.Gossip
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	go func() {
		defer close(m.done)
		if err := g.Run(ctx); err != nil {
			m.c.t.Error(err)
		}
	}()
}

// kill ends a host without a word.
func (m *member) kill() {
	m.cancel()
	<-m.done
	m.Gossip = nil
}

func (c *cluster) stop() {
	for _, m := range c.living() {
		m.kill()
	}
	elapse(time.Minute) // what is under way times out
}

func (c *cluster) living() []*member {
	var out []*member
	for _, m := range c.hosts {
		if m != nil && m.Gossip != nil {
			out = append(out, m)
		}
	}
	return out
}

// await polls until a condition holds, and says how long it took.
func (c *cluster) await(limit time.Duration, what string, holds func() bool) time.Duration {
	c.t.Helper()
	begin := time.Now()
	for !holds() {
		if time.Since(begin) > limit {
			for _, m := range c.living()[:min(4, len(c.living()))] {
				c.t.Logf("%s: %+v", m.self, m.Status())
			}
			c.t.Fatalf("after %v still not: %s", limit, what)
		}
		elapse(10 * time.Millisecond)
	}
	return time.Since(begin)
}

// met waits until every living host sees all others alive, and is in sync.
func (c *cluster) met(limit time.Duration) time.Duration {
	c.t.Helper()
	return c.await(limit, "all hosts know each other and are in sync", func() bool {
		living := c.living()
		for _, m := range living {
			if int(m.Gossip.living.Load()) != len(living) || !m.Synced() {
				return false
			}
		}
		return true
	})
}

// view is what a host takes to hold.
func (m *member) view() map[facts.Key]facts.Fact {
	m.mu.Lock()
	defer m.mu.Unlock()
	view := map[facts.Key]facts.Fact{}
	for vsid := range uint32(4) {
		for f := range m.state.Each(facts.Endpoint, 5000+vsid) {
			view[f.Key] = f
		}
	}
	return view
}

// known is how many facts it knows, without tombstones.
func (m *member) known() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for o := range m.state.Owners() {
		n += o.Facts
	}
	return n
}

// agree waits until all living hosts have the same view, and it is the one that is wanted, if any.
func (c *cluster) agree(limit time.Duration, want map[facts.Key]facts.Host) time.Duration {
	c.t.Helper()
	return c.await(limit, "all hosts have the same view", func() bool {
		var first map[facts.Key]facts.Fact
		for i, m := range c.living() {
			view := m.view()
			if i == 0 {
				first = view
			}
			if len(view) != len(first) {
				return false
			}
			for k, f := range view {
				if first[k] != f {
					return false
				}
			}
		}
		if want == nil {
			return true
		}
		for k, owner := range want {
			if first[k].Owner != owner {
				return false
			}
		}
		return len(want) == len(first)
	})
}

// endpoint is a container with address number n in overlay 5000 and a MAC of its host's.
func endpoint(n int, mac byte) Statement {
	addr := netip.AddrFrom4([4]byte{10, 90, byte(n >> 8), byte(n)})
	return Statement{Key: EndpointKey(5000, addr), MAC: [6]byte{2, mac, 0, 0, byte(n >> 8), byte(n)}}
}
