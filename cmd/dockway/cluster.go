package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
	"github.com/dockway/dockway/driver/store"
)

// clusterRetry is the time between two attempts to take part in the cluster, while the host's
// address is not there yet.
const clusterRetry = 2 * time.Second

// addressCheck is the time between two looks whether the host still has the address that peers know.
// One that goes and comes, as with a DHCP client that starts anew, is kept: it takes two looks in a row
// that find one and the same other address.
const addressCheck = 5 * time.Second

// farewellTime is how long telling the others that this host will be back may take: an engine kills
// its plugin 10 s after it has asked it to stop, of which drainTime may be gone.
const farewellTime = time.Second

// cluster stands between the network service and the address manager on the one side and gossip on
// the other, which do not know each other. It is there before the host has the address that it is to
// be reached at, and remembers what it is told until then.
type cluster struct {
	settings clusterSettings
	config   gossip.Config
	record   *store.Store
	log      *logrus.Entry
	outgoing func(context.Context, netip.Addr) (netip.Addr, error)
	busy     func(subnet, block netip.Prefix) bool
	blocks   func() map[netip.Prefix][]netip.Prefix // of this host, on record
	changed  chan struct{}
	next     netip.Addr // that the last look found, in place of the one that is lost

	mu       sync.Mutex
	keys     [][]byte       // as they were set or changed last
	gossip   *gossip.Gossip // nil: not yet
	self     netip.Addr
	stated   map[facts.Key]gossip.Statement
	restated bool
	begun    bool   // and nobody has been told yet
	problem  string // why it is not yet, or what keeps it from others
}

// newCluster opens nothing: run does.
func newCluster(s clusterSettings, record *store.Store, id string, log *logrus.Entry) (*cluster, error) {
	cl := &cluster{
		settings: s, record: record, log: log,
		changed: make(chan struct{}, 1), stated: map[facts.Key]gossip.Statement{},
	}
	if !s.on {
		return cl, nil
	}
	kept, err := loadKeys(record, s.key)
	if err != nil {
		return nil, err
	}
	epoch, err := raiseEpoch(record)
	if err != nil {
		return nil, err
	}
	cl.config = gossip.Config{
		Name: s.name, ID: id, Epoch: epoch, Port: s.gossip, Seeds: s.seeds, Label: s.label, Version: version, Log: log,
		SaveKeys: func(keys [][]byte) error {
			cl.mu.Lock()
			cl.keys = keys
			cl.mu.Unlock()
			return keptKeys{Setting: kept.Setting, Keys: keys}.save(record)
		},
		SaveClocks: func(changed map[facts.Key]uint64) error { return saveClocks(record, changed) },
		Busy:       func(subnet, block netip.Prefix) bool { return cl.busy(subnet, block) },
	}
	cl.keys = kept.Keys
	return cl, nil
}

// run takes part in the cluster until ctx ends. The host's address may not be there yet: an engine
// starts before the network has one.
func (c *cluster) run(ctx context.Context) error {
	if !c.settings.on {
		return nil
	}
	for {
		g, err := c.start(ctx)
		if err == nil {
			var moved bool
			if moved, err = c.follow(ctx, g); !moved {
				return err
			}
			continue
		}
		if c.troubled(err.Error()) {
			c.log.WithError(err).Error("not in the cluster yet; trying again")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(clusterRetry):
		}
	}
}

// troubled notes why this host is in no cluster, "" for nothing. It reports whether that is new.
func (c *cluster) troubled(problem string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.problem
	c.problem = problem
	return was != problem
}

// start finds the address that peers send to, and begins to gossip.
func (c *cluster) start(ctx context.Context) (*gossip.Gossip, error) {
	config := c.config
	var err error
	if config.Advertise, err = c.address(ctx); err != nil {
		return nil, err
	}
	config.Bind = config.Advertise
	c.mu.Lock()
	config.Keys = c.keys
	c.mu.Unlock()
	if config.Clocks, err = loadClocks(c.record); err != nil {
		return nil, err
	}
	g, err := gossip.New(config)
	if err != nil {
		return nil, err
	}
	// Before mu: who lists them has locks of its own, with which it calls this cluster. What it gives back
	// meanwhile, it gives back again when it finds it here.
	own := c.blocks()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.stated {
		g.Set(s)
	}
	for subnet, blocks := range own {
		for _, block := range blocks {
			g.Set(gossip.Statement{Key: facts.Key{Kind: facts.Block, Subnet: subnet, Prefix: block}})
		}
	}
	if c.restated {
		g.Seal()
	}
	c.gossip, c.self, c.problem, c.begun = g, config.Advertise, "", true
	return g, nil
}

// follow runs the gossip and passes on that something has changed. At the end it tells the others
// that this host will be back: its containers go on while the plugin is upgraded. When the host has another
// address, it ends the gossip in order that one with the new address begins: moved.
func (c *cluster) follow(ctx context.Context, g *gossip.Gossip) (moved bool, err error) {
	talking, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- g.Run(talking) }()
	c.wake() // this host's own address is known now
	check := time.NewTicker(addressCheck)
	defer check.Stop()
	for {
		select {
		case err := <-ended:
			return false, err
		case <-check.C:
			if !c.moved(ctx) {
				continue
			}
			epoch, err := raiseEpoch(c.record)
			if err != nil {
				c.log.WithError(err).Error("the count of starts could not be recorded; trying again")
				continue
			}
			c.config.Epoch = epoch
			c.mu.Lock()
			c.gossip = nil
			c.mu.Unlock()
			stop()
			if err := <-ended; err != nil {
				c.log.WithError(err).Warn("gossip at the former address")
			}
			return true, nil
		case <-ctx.Done():
			farewell, cancel := context.WithTimeout(talking, farewellTime)
			g.Away(farewell)
			cancel()
			stop()
			return false, <-ended
		case <-g.Changed():
			if err := c.keepEpoch(g.Epoch()); err != nil {
				c.log.WithError(err).Error("the count of starts could not be recorded")
			}
			c.wake()
		}
	}
}

// moved reports whether the host has lost the address that peers know, and has another of its family to
// offer. One that it only lost, it may get back.
func (c *cluster) moved(ctx context.Context) bool {
	self, _ := c.Self()
	has, err := hasAddress(self)
	switch {
	case err != nil:
		c.log.WithError(err).Warn("look for the address that peers know")
		return false
	case has:
		c.next = netip.Addr{}
		c.troubled("")
		return false
	}
	now, err := c.address(ctx)
	if err == nil && now != self && now.Is4() == self.Is4() {
		if c.next != now {
			c.next = now
			return false
		}
		c.log.Warnf("this host's address in the cluster has changed from %s to %s: the others take it there once they have found it dead", self, now)
		return true
	}
	c.next = netip.Addr{}
	problem := fmt.Sprintf("this host has lost the address %s, at which the others reach it: give it back, or set ADVERTISE to the one that it has", self)
	if c.troubled(problem) {
		c.log.Error(problem)
	}
	return false
}

func hasAddress(a netip.Addr) (bool, error) {
	all, err := net.InterfaceAddrs()
	for _, one := range all {
		if p, err := netip.ParsePrefix(one.String()); err == nil && p.Addr().Unmap() == a {
			return true, nil
		}
	}
	return false, err
}

// keepEpoch records an epoch that is higher than the one on record.
func (c *cluster) keepEpoch(epoch uint64) error {
	if epoch <= c.config.Epoch {
		return nil
	}
	if err := saveEpoch(c.record, epoch); err != nil {
		return err
	}
	c.config.Epoch = epoch
	return nil
}

func (c *cluster) wake() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// address is the one that ADVERTISE names, or that of the interface that it names, or else the one
// that the host sends to the first seed with.
func (c *cluster) address(ctx context.Context) (netip.Addr, error) {
	if c.settings.address.IsValid() {
		return c.settings.address, nil
	}
	if name := c.settings.link; name != "" {
		link, err := net.InterfaceByName(name)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("ADVERTISE=%q: this host has no such interface yet: %w", name, err)
		}
		addrs, err := link.Addrs()
		if err != nil {
			return netip.Addr{}, fmt.Errorf("ADVERTISE=%q: %w", name, err)
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
				return p.Addr().Unmap(), nil
			}
		}
		return netip.Addr{}, fmt.Errorf("ADVERTISE=%q: the interface has no address yet", name)
	}
	for _, seed := range c.config.Seeds {
		host := seed
		if h, _, err := net.SplitHostPort(seed); err == nil {
			host = h
		}
		to, err := netip.ParseAddr(host)
		if err != nil || to.IsLoopback() {
			continue // a name, or where no other host reaches this one
		}
		if from, err := c.outgoing(ctx, to); err == nil && !from.IsLoopback() {
			return from, nil
		} else if err == nil {
			return to, nil // this very host
		}
	}
	from, err := c.outgoing(ctx, netip.Addr{})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("the address that other hosts reach this one at: %w; set ADVERTISE to an address or an interface", err)
	}
	return from, nil
}

func (c *cluster) now() *gossip.Gossip {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gossip
}
