package gossip

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// Statement is what this host says of a key.
type Statement struct {
	facts.Key
	MAC [6]byte // of an Endpoint
}

// Remote is a container on another host.
type Remote struct {
	Address  netip.Addr
	MAC      [6]byte
	VTEP     netip.Addr // where its host is reached
	Host     facts.Host
	HostName string
}

// Changes are what was different at one Take from the one before.
type Changes struct {
	Peers     bool           // hosts came, went, moved or changed their state, or this one is in sync now
	Blocks    bool           // who has which block of addresses
	Endpoints []facts.Change // one a key: what held at the last Take, and what holds now
	All       bool           // more endpoints than are listed: look at all
}

type pending struct {
	peers, blocks, all bool
	endpoints          map[facts.Key]facts.Change
}

// Set states facts of this host and returns them. What it states already is not stated again, and until
// Seal what has a clock on record is stated with that. A key that is not valid gives the zero Fact.
func (g *Gossip) Set(statements ...Statement) []facts.Fact {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]facts.Fact, len(statements))
	for i, s := range statements {
		var changes []facts.Change
		if clock := g.clocks[s.Key]; clock > 0 {
			out[i], changes = g.state.Restate(s.Key, s.MAC, clock)
			delete(g.clocks, s.Key)
		} else {
			out[i], changes = g.state.Set(s.Key, s.MAC)
		}
		g.note(changes)
		g.stated(out[i])
	}
	return out
}

// stated broadcasts a fact of this host's, unless it has been, and has its clock recorded. mu is held.
func (g *Gossip) stated(f facts.Fact) {
	if f.Counter <= g.counter {
		return
	}
	g.counter = f.Counter
	g.enqueue(f)
	if f.Deleted {
		f.Clock = 0
	}
	g.record(f.Key, f.Clock)
}

// record has the clock of a fact recorded; 0: taken off the record. mu is held.
func (g *Gossip) record(k facts.Key, clock uint64) {
	if g.config.SaveClocks != nil {
		g.unsaved[k] = clock
		wake(g.clocked)
	}
}

// Delete takes statements of this host back; unknown ones are fine.
func (g *Gossip) Delete(keys ...facts.Key) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, k := range keys {
		f, changes := g.state.Delete(k)
		g.note(changes)
		g.stated(f)
	}
}

// Seal says that this host has stated everything it knew before it started: what it stated in
// earlier epochs and has not stated again does not hold any more.
func (g *Gossip) Seal() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state.Seal()
	for k := range g.clocks { // not stated again
		g.record(k, 0)
	}
	g.clocks = nil
	for _, m := range g.state.Digest() {
		if m.Own {
			g.enqueueSeal(facts.Delta{Owner: m.Owner, Epoch: m.Epoch, Seal: m.Seal})
		}
	}
}

// keepClocks keeps the record up to date until ctx ends.
func (g *Gossip) keepClocks(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			g.saveClocks()
			return
		case <-g.clocked:
			if !g.saveClocks() {
				wait(ctx, firstRetry)
			}
		}
	}
}

// saveClocks records what is not on record yet. False says that it could not.
func (g *Gossip) saveClocks() bool {
	g.mu.Lock()
	changed := g.unsaved
	g.unsaved = map[facts.Key]uint64{}
	g.mu.Unlock()
	if len(changed) == 0 {
		return true
	}
	err := g.config.SaveClocks(changed)
	if err == nil {
		return true
	}
	g.refused.say(logrus.ErrorLevel, "clocks", "gossip: the order of what this host states could not be recorded, so that after a restart it could lose an address which another host has too: "+err.Error())
	g.mu.Lock()
	defer g.mu.Unlock()
	for k, clock := range changed {
		if _, newer := g.unsaved[k]; !newer {
			g.record(k, clock)
		}
	}
	return false
}

// Remotes are the containers of other hosts in an overlay: of those hosts that are not dead and
// whose address is known, and of several that claim one address only the one that wins everywhere.
func (g *Gossip) Remotes(vsid uint32) []Remote {
	out := g.listRemotes(vsid)
	slices.SortFunc(out, func(a, b Remote) int { return a.Address.Compare(b.Address) }) // which takes longer than the list
	return out
}

func (g *Gossip) listRemotes(vsid uint32) []Remote {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []Remote
	for f := range g.state.Each(facts.Endpoint, vsid) {
		if r, ok := g.remote(f); ok {
			out = append(out, r)
		}
	}
	return out
}

// ByMAC are the containers of other hosts in an overlay with that MAC: several addresses of one, or
// by mistake several.
func (g *Gossip) ByMAC(vsid uint32, mac [6]byte) []Remote {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []Remote
	for _, f := range g.state.ByMAC(vsid, mac) {
		if r, ok := g.remote(f); ok {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Remote) int { return a.Address.Compare(b.Address) })
	return out
}

// Lookup finds the container of another host with an address.
func (g *Gossip) Lookup(vsid uint32, addr netip.Addr) (Remote, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f, ok := g.state.Lookup(EndpointKey(vsid, addr))
	if !ok {
		return Remote{}, false
	}
	return g.remote(f)
}

// EndpointKey is the key of a container's address.
func EndpointKey(vsid uint32, addr netip.Addr) facts.Key {
	addr = addr.Unmap()
	return facts.Key{Kind: facts.Endpoint, VSID: vsid, Prefix: netip.PrefixFrom(addr, addr.BitLen())}
}

func (g *Gossip) remote(f facts.Fact) (Remote, bool) {
	p := g.peers[f.Owner]
	if p == nil || !p.holds() || !p.meta.vtep.IsValid() || f.Deleted {
		return Remote{}, false
	}
	return Remote{f.Prefix.Addr(), f.MAC, p.meta.vtep, f.Owner, nameOf(f.Owner)}, true
}

// Changed has a token when Take has something to say.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// Take gives what changed since it was last called.
func (g *Gossip) Take() Changes {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := Changes{Peers: g.pending.peers, Blocks: g.pending.blocks, All: g.pending.all}
	for _, change := range g.pending.endpoints {
		c.Endpoints = append(c.Endpoints, change)
	}
	g.pending = pending{}
	return c
}

// Synced says whether an exchange with another host has brought both to the same knowledge since the
// start, or no seed but this very host is configured, so that there is nobody to wait for. It stays
// false while no seed answers.
func (g *Gossip) Synced() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.synced {
		return true
	}
	for _, seed := range g.config.Seeds {
		if !g.alone[seed] {
			return false
		}
	}
	return true
}

// heard merges a broadcast, and passes on what is new.
func (g *Gossip) heard(buf []byte) {
	list, err := facts.DecodeFacts(buf)
	if err != nil {
		g.refused.refuse("malformed", "a statement: "+err.Error())
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts.heard += uint64(len(list))
	for _, f := range list {
		if !g.hideStranger(f.Owner) {
			return
		}
	}
	fresh, changes := g.state.Merge(list)
	g.note(changes)
	for _, f := range fresh {
		g.enqueue(f)
	}
}

// heardSeal merges the broadcast of a seal, and passes it on if it is new.
func (g *Gossip) heardSeal(buf []byte) {
	d, err := facts.DecodeDelta(buf)
	if err == nil && (len(d.Facts) > 0 || len(d.Known) > 0) {
		err = errors.New("facts in it")
	}
	if err != nil {
		g.refused.refuse("malformed", "a seal: "+err.Error())
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts.heard++
	if !g.hideStranger(d.Owner) || !g.newSeal(d) {
		return
	}
	if changes, err := g.state.Apply(d); err == nil {
		g.note(changes)
		g.enqueueSeal(d)
	}
}

// newSeal says whether the seal of a delta is one that was not heard of. mu is held.
func (g *Gossip) newSeal(d facts.Delta) bool {
	p := g.peers[d.Owner]
	if p == nil || d.Seal == 0 || d.Epoch <= p.sealed {
		return false
	}
	p.sealed = d.Epoch
	return true
}

// hideStranger hides the facts of an owner that has never been a member. False says that there are
// too many hosts already. mu is held.
func (g *Gossip) hideStranger(owner facts.Host) bool {
	if owner == g.self || g.peers[owner] != nil {
		return true // hidden or shown when its state changed
	}
	if len(g.peers) >= maxPeers {
		return false
	}
	g.meet(owner).since = time.Now()
	g.note(g.state.Hide(owner))
	return true
}

// note records changes for Take. mu is held.
func (g *Gossip) note(changes []facts.Change) {
	p := &g.pending
	for _, c := range changes {
		if c.Kind != facts.Endpoint {
			p.blocks = true
			g.settle(c)
			continue
		}
		if p.all {
			continue
		}
		if earlier, ok := p.endpoints[c.Key]; ok {
			c.Before = earlier.Before
		}
		if p.endpoints == nil {
			p.endpoints = map[facts.Key]facts.Change{}
		}
		if c.Before == c.After {
			delete(p.endpoints, c.Key)
			continue
		}
		p.endpoints[c.Key] = c
		if len(p.endpoints) > maxPending {
			p.all, p.endpoints = true, nil
		}
	}
	if len(changes) > 0 {
		wake(g.changed)
	}
}

func (g *Gossip) peersChanged() {
	g.pending.peers = true
	wake(g.changed)
}

// enqueue broadcasts a fact. mu is held.
func (g *Gossip) enqueue(f facts.Fact) { g.send(newBroadcast(f)) }

// enqueueSeal broadcasts the seal of a delta, without facts. mu is held.
func (g *Gossip) enqueueSeal(d facts.Delta) {
	d = facts.Delta{Owner: d.Owner, Epoch: d.Epoch, Seal: d.Seal}
	g.send(&broadcast{"seal " + string(d.Owner), d.Append([]byte{msgSeal})})
}

// send queues a broadcast, unless so much is waiting that exchanges are faster. mu is held.
func (g *Gossip) send(b *broadcast) {
	switch {
	case g.living.Load() < 2:
	case g.queue.NumQueued() >= maxQueued:
		wake(g.burst)
	default:
		g.queue.QueueBroadcast(b)
	}
}

// broadcast is a fact in memberlist's queue. A later one of the same key and owner replaces it.
type broadcast struct {
	name    string
	message []byte
}

func newBroadcast(f facts.Fact) *broadcast {
	name := []byte{byte(f.Kind)}
	name = binary.BigEndian.AppendUint32(name, f.VSID)
	for _, prefix := range []netip.Prefix{f.Subnet, f.Prefix} {
		name = append(prefix.AppendTo(name), ' ')
	}
	return &broadcast{string(append(name, f.Owner...)), facts.AppendFacts([]byte{msgStatement}, []facts.Fact{f})}
}

// Name is the same for statements that replace each other.
func (b *broadcast) Name() string { return b.name }

// Message is what is sent.
func (b *broadcast) Message() []byte { return b.message }

// Invalidates is not asked of what has a name.
func (b *broadcast) Invalidates(memberlist.Broadcast) bool { return false }

// Finished has nothing to do.
func (b *broadcast) Finished() {}

const (
	forgetAfter = 24 * time.Hour // tombstones, and hosts that are dead
	forgetEvery = 10 * time.Minute
)

// tomb identifies a tombstone.
type tomb struct {
	facts.Key
	owner          facts.Host
	epoch, counter uint64
}

// forget drops what outlived every partition that is promised to heal well.
func (g *Gossip) forget(ctx context.Context) {
	for wait(ctx, jitter(forgetEvery)) {
		now := time.Now() // its monotonic part counts
		g.mu.Lock()
		for host, p := range g.peers {
			if !p.holds() && now.Sub(p.since) > g.memory {
				g.drop(host, expired)
			}
		}
		kept := map[tomb]time.Time{}
		g.state.Prune(func(f facts.Fact) bool {
			t := tomb{f.Key, f.Owner, f.Epoch, f.Counter}
			seen, ok := g.tombs[t]
			if !ok {
				seen = now
			}
			if now.Sub(seen) > g.memory {
				return false
			}
			kept[t] = seen
			return true
		})
		g.tombs = kept
		g.mu.Unlock()
	}
}
