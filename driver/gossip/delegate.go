package gossip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// delegate is what memberlist calls, with locks of its own held.
type delegate Gossip

// NodeMeta describes this host.
func (d *delegate) NodeMeta(int) []byte {
	g := (*Gossip)(d)
	g.mu.Lock()
	defer g.mu.Unlock()
	return meta{away: g.away, epoch: g.config.Epoch, vtep: g.config.Advertise, version: g.config.Version}.encode()
}

// NotifyMsg takes a message of another host; buf is memberlist's.
func (d *delegate) NotifyMsg(buf []byte) { (*Gossip)(d).receive(buf) }

// GetBroadcasts gives what to send with the next packet.
func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.queue.GetBroadcasts(overhead, limit)
}

// LocalState has nothing to say: memberlist's full exchanges are too rare for facts in a large
// cluster, and cannot be divided.
func (d *delegate) LocalState(bool) []byte { return nil }

// MergeRemoteState has nothing to hear.
func (d *delegate) MergeRemoteState([]byte, bool) {}

// NotifyAlive refuses hosts that do not describe themselves.
func (d *delegate) NotifyAlive(node *memberlist.Node) error {
	if len(node.Name) > maxName+maxID+1 {
		return fmt.Errorf("its name has %d bytes", len(node.Name))
	}
	_, err := decodeMeta(node.Meta)
	return err
}

// NotifyConflict hears that a host is alive at two addresses.
func (d *delegate) NotifyConflict(existing, other *memberlist.Node) {
	g := (*Gossip)(d)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.clashed(true, existing.Name+" at "+existing.Address(), other.Name+" at "+other.Address())
}

// NotifyJoin hears that a host is alive which was not.
func (d *delegate) NotifyJoin(node *memberlist.Node) { (*Gossip)(d).came(node) }

// NotifyUpdate hears that a host describes itself anew: it has restarted, or is about to stop.
func (d *delegate) NotifyUpdate(node *memberlist.Node) { (*Gossip)(d).came(node) }

// NotifyLeave hears that a host is dead: what it stated is hidden, unless it said that it will be back.
func (d *delegate) NotifyLeave(node *memberlist.Node) {
	g := (*Gossip)(d)
	g.mu.Lock()
	defer g.mu.Unlock()
	host := facts.Host(node.Name)
	p := g.peers[host]
	if p == nil || !p.alive {
		return
	}
	p.alive, p.suspect, p.since, p.rtt = false, false, time.Now(), 0
	g.living.Add(-1)
	for _, other := range g.recorded[idOf(host)] {
		if o := g.peers[other]; other != host && o.alive && sameRecord(host, p, other, o) {
			g.drop(host, renamed)
			return
		}
	}
	if p.meta.away {
		g.log.Infof("gossip: host %s at %s is away; what it stated holds for %s", nameOf(host), p.meta.vtep, awayHolds)
		p.away = true
		since := p.since
		time.AfterFunc(awayHolds, func() { g.missed(host, since) })
		g.peersChanged()
		return
	}
	g.log.Infof("gossip: host %s at %s is dead", nameOf(host), p.meta.vtep)
	g.note(g.state.Hide(host))
	g.peersChanged()
}

// awayHolds is how long a host that stopped in order to be back has for it: an upgrade takes seconds,
// and its containers go on meanwhile.
const awayHolds = 5 * time.Minute

// missed gives a host up that is away since then and not back.
func (g *Gossip) missed(host facts.Host, since time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[host]
	if p == nil || !p.away || p.since != since {
		return
	}
	p.away = false
	g.log.Infof("gossip: host %s at %s was away and is not back: it is dead", nameOf(host), p.meta.vtep)
	g.note(g.state.Hide(host))
	g.peersChanged()
}

// came brings a host up to date that is alive.
func (g *Gossip) came(node *memberlist.Node) {
	host := facts.Host(node.Name)
	m, err := decodeMeta(node.Meta)
	if err != nil {
		return // NotifyAlive has refused it
	}
	if host == g.self || g.former(host) && m.vtep == g.config.Advertise {
		return // this host, or others have not missed it by its former name yet
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[host]
	if p == nil {
		p = g.meet(host)
	}
	if p.meta.vtep != m.vtep {
		g.moved(host)
	}
	news := !p.alive || m.epoch != p.meta.epoch
	p.meta, p.suspect, p.away = m, false, false
	p.node = memberlist.Node{Name: node.Name, Addr: append([]byte(nil), node.Addr...), Port: node.Port}
	if !p.alive {
		p.alive, p.since = true, time.Now()
		g.living.Add(1)
		g.log.Infof("gossip: host %s at %s is there", nameOf(host), m.vtep)
	}
	g.note(g.state.Show(host))
	for _, other := range slices.Clone(g.recorded[idOf(host)]) {
		if o := g.peers[other]; other != host && !o.alive && sameRecord(other, o, host, p) {
			g.drop(other, renamed)
		}
	}
	g.compare(host, p)
	g.peersChanged()
	// In a large cluster it is enough that a few meet whoever comes.
	if news && (!g.synced || rand.IntN(max(1, int(g.living.Load()))) < fanout) && len(g.wanted) < fanout {
		g.wanted[host] = true
		wake(g.kick)
	}
}

// NotifyPingComplete hears how long a probe took.
func (d *delegate) NotifyPingComplete(node *memberlist.Node, rtt time.Duration, _ []byte) {
	g := (*Gossip)(d)
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[facts.Host(node.Name)]; p != nil && p.alive {
		p.rtt, p.suspect = rtt, false
	}
}

// AckPayload has nothing to say.
func (d *delegate) AckPayload() []byte { return nil }

// suspected hears that a probe of a host failed. memberlist says it only in its log.
func (g *Gossip) suspected(host facts.Host) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[host]; p != nil && p.alive {
		p.suspect = true
	}
}

func (g *Gossip) at(addr netip.AddrPort) *peer {
	for _, p := range g.peers {
		if p.alive && p.address() == addr {
			return p
		}
	}
	return nil
}
