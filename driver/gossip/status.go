package gossip

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// Status is for people: what to look at when hosts do not find or understand each other.
type Status struct {
	Self       facts.Host
	Synced     bool
	Encrypted  bool
	Alive      int               // hosts that are alive or suspect, with this one
	Facts      int               // all that is known, without tombstones
	Tombstones int               // statements taken back that are still kept
	Queued     int               // statements that wait to be broadcast
	Heard      uint64            // statements that came by broadcast
	Learnt     uint64            // changes that came by exchanges
	Exchanges  uint64            // that this host began and ended well
	Bytes      uint64            // of exchanges, both ways
	Sent       uint64            // bytes written to streams
	Received   uint64            // bytes read from streams
	Refused    map[string]uint64 // messages and streams that were refused, by reason
	Refusal    string            // the last, with its reason
	Conflicts  []facts.Conflict  // keys that several hosts state, and blocks that overlap
	Names      []string          // names or identities that several hosts bear
	Unresolved map[string]string // seeds that are names and have no address now, and why
	Errors     map[string]Failure
}

// Failure is the last error with a seed or a host.
type Failure struct {
	At    time.Time
	Error string
}

type counts struct {
	heard, learnt, exchanges, bytes uint64
	errors                          map[string]Failure
}

// Status says how the cluster looks from here.
func (g *Gossip) Status() Status {
	synced := g.Synced()
	g.refused.mu.Lock()
	refused, last := maps.Clone(g.refused.count), g.refused.last
	g.refused.mu.Unlock()
	if n := g.wire.over.Load(); n > 0 {
		if refused == nil {
			refused = map[string]uint64{}
		}
		refused["too many streams"] += n
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Status{
		Self: g.self, Synced: synced, Encrypted: g.keyring != nil, Alive: int(g.living.Load()), Queued: g.queue.NumQueued(),
		Heard: g.counts.heard, Learnt: g.counts.learnt, Exchanges: g.counts.exchanges, Bytes: g.counts.bytes,
		Sent: g.wire.sent.Load(), Received: g.wire.received.Load(), Refused: refused, Refusal: last,
		Conflicts: g.conflicts(), Names: g.sharedNames(), Unresolved: maps.Clone(g.unresolved), Errors: maps.Clone(g.counts.errors),
	}
	for o := range g.state.Owners() {
		s.Facts += o.Facts
		s.Tombstones += o.Tombstones
	}
	return s
}

// sharedNames are the names that several living hosts bear now, and hosts that were seen alive at two
// addresses lately. mu is held.
func (g *Gossip) sharedNames() []string {
	at := map[string]map[netip.Addr]facts.Host{}
	add := func(host facts.Host, addr netip.Addr) {
		if at[nameOf(host)] == nil {
			at[nameOf(host)] = map[netip.Addr]facts.Host{}
		}
		at[nameOf(host)][addr] = host
	}
	add(g.self, g.config.Advertise)
	for host, p := range g.peers {
		if p.alive {
			add(host, p.meta.vtep)
		}
	}
	var out []string
	for _, hosts := range at {
		for addr, host := range hosts {
			if len(hosts) > 1 {
				out = append(out, string(host)+" at "+addr.String())
			}
		}
	}
	for c, seen := range g.clashes {
		if c.identity && time.Since(seen) < forgetEvery {
			out = append(out, c.a, c.b)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// failed records the last error with somebody.
func (g *Gossip) failed(who string, err error) {
	g.mu.Lock()
	if g.counts.errors == nil || len(g.counts.errors) >= maxRemembered {
		g.counts.errors = map[string]Failure{}
	}
	g.counts.errors[who] = Failure{time.Now(), err.Error()}
	g.mu.Unlock()
	g.log.Debugf("gossip: %s: %v", who, err)
}

// conflicts are the keys that several hosts state, and blocks of several hosts that overlap, but for
// single addresses that were lent out of a block. mu is held.
func (g *Gossip) conflicts() []facts.Conflict {
	var out []facts.Conflict
	for _, c := range g.state.Conflicts() {
		if c.Kind == facts.Block {
			all := c.Facts
			c.Facts = slices.DeleteFunc(slices.Clone(all), func(f facts.Fact) bool {
				return !slices.ContainsFunc(all, func(other facts.Fact) bool {
					return f.Owner != other.Owner && f.Prefix.Overlaps(other.Prefix) && f.Prefix.IsSingleIP() == other.Prefix.IsSingleIP()
				})
			})
		}
		if len(c.Facts) > 1 {
			out = append(out, c)
		}
	}
	return out
}

// report logs each conflict once, and takes back this host's name from whoever used it.
func (g *Gossip) report() {
	g.mu.Lock()
	defer g.mu.Unlock()
	known := map[facts.Key]bool{}
	for _, c := range g.conflicts() {
		if len(known) == maxRemembered {
			break
		}
		if known[c.Key] = true; g.reported[c.Key] {
			continue
		}
		text := ""
		for _, f := range c.Facts {
			text += ", " + string(f.Owner) + " has " + f.Prefix.String()
		}
		where := c.Subnet.String()
		if c.Kind == facts.Endpoint {
			where = fmt.Sprintf("VSID %d", c.VSID)
		}
		g.log.Errorf("gossip: several hosts have one address in %s: %s wins%s: remove the containers of the others, or release their blocks", where, c.Facts[0].Owner, text)
	}
	g.reported = known
	if usurper := g.state.Usurped(); usurper > 0 {
		g.epoch, g.counter = usurper+1, 0
		g.state.Raise(g.epoch)
		g.log.Errorf("gossip: others know facts of this host %s that it did not state: its record was lost, is older, or was copied to another host; it states what it has again in epoch %d", g.self, g.epoch)
		wake(g.burst)
	}
}
