// Package gossip is the only package that speaks memberlist: the hosts of a cluster find each other
// and tell each other their facts. It decides nothing about containers or the kernel: it says who is
// there, what each host states, and when any of it has changed.
//
// A single statement travels by memberlist's broadcasts and is passed on by who hears it first; that
// epidemic ends by itself and can miss a host. Exchanges of digests, and then of what differs, between
// random pairs of hosts carry every kind of fact to everybody, and carry bulk (see exchange).
package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// Limits of what identifies a host: a facts.Host has 128 bytes, and its description has to be within
// memberlist's 512.
const (
	maxName    = 64
	maxID      = 63
	maxVersion = 64
)

// fewest is how many hosts a fact is repeated for at least. By memberlist's rule hosts of a cluster of 10 to 99 say it
// eight times each, after which it has missed one of them in some hundred facts; that one hears of it in an exchange,
// seconds later. From 100 on they say it twelve times.
const fewest = 100

// Config is what a host needs to take part.
type Config struct {
	Name      string               // of the host, for people: 1 to 64 bytes without "/"
	ID        string               // random, kept on record by the caller: 1 to 63 bytes without "/"
	Epoch     uint64               // higher at each start
	Bind      netip.Addr           // where to listen; invalid: everywhere
	Port      uint16               // TCP and UDP; also of seeds that name none
	Advertise netip.Addr           // where others reach this host, also with VXLAN
	Seeds     []string             // host or host:port of any hosts of the cluster
	Label     string               // of the cluster, up to 255 bytes: what bears another is refused
	Keys      [][]byte             // of 16, 24 or 32 bytes (AES-GCM), the first is used to send; none: everything is in clear
	SaveKeys  func([][]byte) error // records the keys after a change; nil: they are not kept
	Transport memberlist.Transport // nil: TCP and UDP

	// Clocks are those of the facts that this host stated before it started, as SaveClocks recorded them:
	// a host that restarts does not lose to others what it had won from them, nor win what it had lost.
	// SaveClocks records those that have changed, soon after, many at a time and without any lock held; 0
	// is that of a fact that is taken back. nil: they are not kept.
	Clocks     map[facts.Key]uint64
	SaveClocks func(changed map[facts.Key]uint64) error

	// Busy says whether this host has given an address out of a block of its own. It is called
	// without any lock held, after the grant is on record: whoever hands out addresses marks one as
	// in use first and asks Holder then, so that one of the two sees the other.
	Busy func(subnet, block netip.Prefix) bool

	Version string        // of the program, for people
	Log     *logrus.Entry // nil: the standard logger
}

// Gossip is this host's part in the cluster. It is safe for concurrent use.
type Gossip struct {
	config  Config
	self    facts.Host
	log     *logrus.Entry
	refused *refusals
	wire    *wire
	keyring *memberlist.Keyring
	list    *memberlist.Memberlist
	ready   chan struct{} // closed when list is there
	closed  chan struct{} // closed when Run ends
	queue   memberlist.TransmitLimitedQueue
	living  atomic.Int32 // hosts that are alive or suspect, with this one
	changed chan struct{}
	kick    chan struct{} // somebody is in wanted
	burst   chan struct{} // more was learnt than broadcasts can carry
	clocked chan struct{} // something is in unsaved
	serving chan struct{} // a token for each request that is being served
	pushing chan struct{} // a token for each exchange that somebody else began

	unclaiming chan struct{} // a token for each request that takes a claim back

	ending sync.Mutex // held while saying farewell and shutting down: memberlist does not bear them side by side
	ended  bool
	keys   sync.Mutex // one change of keys at a time

	// mu guards all below. memberlist calls this package's delegates with its own lock held: nothing
	// of memberlist's is called with mu held.
	mu         sync.Mutex
	state      *facts.State
	counter    uint64               // of the last own fact that was broadcast
	claimed    uint64               // the number of the last claim
	peers      map[facts.Host]*peer // all but this host
	named      index                // peers, by their names
	recorded   index                // and by their IDs
	clocks     map[facts.Key]uint64 // on record, of what is not yet stated since the start; nil when sealed
	unsaved    map[facts.Key]uint64 // clocks that are not yet on record; 0: take it off
	away       bool
	synced     bool
	started    time.Time
	alone      map[string]bool   // seeds that are known to be this very host
	unresolved map[string]string // seeds whose name has no address, and why
	wanted     map[facts.Host]bool
	pending    pending
	calls      map[uint64]chan<- reply
	sessions   map[uint64]*session
	claims     []*claim
	grants     []grant
	tombs      map[tomb]time.Time
	memory     time.Duration // for tombstones and the dead
	clashes    map[clash]time.Time
	reported   map[facts.Key]bool // conflicts
	epoch      uint64
	counts     counts
}

// New begins to listen. It fails if the port is in use, an address cannot be used, or a key, the
// name or the label is not valid. What it returned has to be ended by Run.
func New(config Config) (*Gossip, error) {
	if err := config.check(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	entry := config.Log
	if entry == nil {
		entry = logrus.NewEntry(logrus.StandardLogger())
	}
	g := &Gossip{
		config:     config,
		epoch:      config.Epoch,
		self:       facts.Host(config.Name + "/" + config.ID),
		log:        entry,
		ready:      make(chan struct{}),
		closed:     make(chan struct{}),
		changed:    make(chan struct{}, 1),
		kick:       make(chan struct{}, 1),
		burst:      make(chan struct{}, 1),
		clocked:    make(chan struct{}, 1),
		serving:    make(chan struct{}, maxServing),
		pushing:    make(chan struct{}, maxPushing),
		unclaiming: make(chan struct{}, maxUnclaiming),
		peers:      map[facts.Host]*peer{},
		named:      index{},
		recorded:   index{},
		clocks:     maps.Clone(config.Clocks),
		unsaved:    map[facts.Key]uint64{},
		alone:      map[string]bool{},
		unresolved: map[string]string{},
		wanted:     map[facts.Host]bool{},
		calls:      map[uint64]chan<- reply{},
		sessions:   map[uint64]*session{},
		tombs:      map[tomb]time.Time{},
		memory:     forgetAfter,
		clashes:    map[clash]time.Time{},
		started:    time.Now(),
	}
	g.refused = &refusals{log: entry, suspected: g.suspected}
	g.state = facts.New(g.self, config.Epoch)
	for _, clock := range g.clocks {
		g.state.Witness(clock)
	}
	g.living.Store(1)
	g.queue = memberlist.TransmitLimitedQueue{NumNodes: func() int { return max(fewest, int(g.living.Load())) }}

	mc := memberlist.DefaultLANConfig()
	g.queue.RetransmitMult = mc.RetransmitMult
	mc.Name = string(g.self)
	mc.Label = config.Label
	mc.Logger = log.New(g.refused, "", 0)
	mc.BindAddr, mc.BindPort = config.Bind.String(), int(config.Port)
	mc.AdvertiseAddr, mc.AdvertisePort = config.Advertise.String(), int(config.Port)
	mc.EnableCompression = false // LZW costs more than it saves, and facts hardly repeat
	mc.HandoffQueueDepth = 4096
	mc.DeadNodeReclaimTime = mc.GossipToTheDeadTime // a host that comes back with another address
	mc.Delegate, mc.Events, mc.Ping, mc.Alive, mc.Conflict = (*delegate)(g), (*delegate)(g), (*delegate)(g), (*delegate)(g), (*delegate)(g)
	if len(config.Keys) > 0 {
		ring, err := memberlist.NewKeyring(config.Keys, config.Keys[0])
		if err != nil {
			return nil, fmt.Errorf("gossip: a key is not valid: %w", err)
		}
		g.keyring, mc.Keyring = ring, ring
	} else {
		entry.Warn("gossip: no key is set: everybody who reaches this host can read and state facts")
	}
	inner := config.Transport
	if inner == nil {
		sockets, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{mc.BindAddr}, BindPort: mc.BindPort, Logger: mc.Logger,
		})
		if err != nil {
			return nil, fmt.Errorf("gossip: cannot listen at %s, port %d (the port may be in use, or the address not be one of this host): %w", mc.BindAddr, mc.BindPort, err)
		}
		inner = sockets
	}
	g.wire = newWire(inner)
	mc.Transport = g.wire
	list, err := memberlist.Create(mc)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gossip: %w", err), g.wire.Shutdown())
	}
	g.list = list
	close(g.ready)
	return g, nil
}

// Self is this host.
func (g *Gossip) Self() facts.Host { return g.self }

// Epoch is that of this host. It rises above Config.Epoch if others know of a higher one, because this
// host's record was lost: the caller records it, so that the next start is above it.
func (g *Gossip) Epoch() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.epoch
}

// Run joins the seeds and keeps joining them and the members that were lost, exchanges facts and
// forgets old ones until ctx ends. Then it stops silently: for the others this host is alive until
// they have found it dead, so that a restart is no departure. Away, called before, gives a restart more
// time.
func (g *Gossip) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	for _, seed := range g.config.Seeds {
		all.Go(func() { g.joinSeed(ctx, seed) })
	}
	all.Go(func() { g.rejoin(ctx) })
	all.Go(func() { g.antiEntropy(ctx) })
	all.Go(func() { g.spread(ctx) })
	all.Go(func() { g.forget(ctx) })
	if g.config.SaveClocks != nil {
		all.Go(func() { g.keepClocks(ctx) })
	}
	<-ctx.Done()
	cancel()
	g.ending.Lock()
	defer g.ending.Unlock()
	if g.ended {
		return nil
	}
	g.ended = true
	err := g.list.Shutdown()
	close(g.closed)
	all.Wait()
	if err != nil {
		return fmt.Errorf("gossip: stop: %w", err)
	}
	return nil
}

// Away tells the others that this host stops in order to be back soon: what it stated holds for some
// minutes, and not only until they have found it dead. It takes a few gossip rounds, 3 seconds at
// most, and has to come before the end of Run's context.
func (g *Gossip) Away(ctx context.Context) {
	g.ending.Lock()
	defer g.ending.Unlock()
	if g.ended {
		return
	}
	g.mu.Lock()
	g.away = true
	hosts := g.some(len(g.peers))
	g.mu.Unlock()
	// Each by itself, and then through memberlist, whose broadcasts can miss a host.
	asking, cancel := context.WithTimeout(ctx, time.Second)
	g.each(hosts, func(host facts.Host) { _, _ = g.call(asking, host, opAway, nil) })
	cancel()
	wait := 2 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	if ctx.Err() != nil || wait <= 0 {
		return
	}
	if err := g.list.UpdateNode(wait); err != nil {
		g.log.WithError(err).Warn("gossip: not every host may have heard that this one will be back")
	}
}

// each does something for several hosts, many at a time. Those for which it takes long, as they do not answer, keep nobody
// waiting: however many they are, the others soon have their turn.
func (g *Gossip) each(hosts []facts.Host, do func(facts.Host)) {
	var all sync.WaitGroup
	slots := make(chan struct{}, abreast)
	for _, host := range hosts {
		slots <- struct{}{}
		all.Go(func() {
			slow := time.AfterFunc(patience, func() { <-slots })
			do(host)
			if slow.Stop() {
				<-slots
			}
		})
	}
	all.Wait()
}

// wake puts a token in a channel that holds one.
func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// wait returns false if ctx ended before d was over.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// clone makes a copy of keys that nobody else changes.
func clone(keys [][]byte) [][]byte {
	out := make([][]byte, len(keys))
	for i, key := range keys {
		out[i] = append([]byte(nil), key...)
	}
	return out
}
