package gossip

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// The states of a Peer.
const (
	Alive   = "alive"
	Suspect = "suspect" // this host's last attempt to reach it failed; its facts hold until it is found dead
	Away    = "away"    // it stopped and said that it will be back; its facts hold for a while
	Dead    = "dead"
)

// Peer is a host of the cluster, as this host sees it.
type Peer struct {
	Host    facts.Host
	Name    string
	Address netip.Addr // of the underlay; invalid if only facts of the host are known
	State   string
	RTT     time.Duration // of the last probe, 0 if there was none
	Facts   int           // that it states and has not taken back
	Version string
	Epoch   uint64
	Since   time.Time // of the state
	Self    bool
}

// peer is another host. One that never was a member, but of which facts were heard, is dead.
type peer struct {
	meta    meta
	node    memberlist.Node // name, address and port
	alive   bool            // or suspect
	suspect bool
	away    bool // not alive, but back soon
	since   time.Time
	rtt     time.Duration
	sealed  uint64 // the last epoch that was heard to be sealed
}

func (p *peer) state() string {
	switch {
	case p.alive && p.suspect:
		return Suspect
	case p.alive:
		return Alive
	case p.away:
		return Away
	}
	return Dead
}

// holds reports whether what the peer states is in force.
func (p *peer) holds() bool { return p.alive || p.away }

// address is where the peer is reached, invalid if it never was a member.
func (p *peer) address() netip.AddrPort {
	addr, _ := netip.AddrFromSlice(p.node.Addr)
	return netip.AddrPortFrom(addr.Unmap(), p.node.Port)
}

// Peers are the hosts of the cluster with this one, by name, also those that are dead or have left
// and are not forgotten yet.
func (g *Gossip) Peers() []Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	count := map[facts.Host]int{}
	for o := range g.state.Owners() {
		count[o.Host] = o.Facts
	}
	out := []Peer{{
		Host: g.self, Name: g.config.Name, Address: g.config.Advertise, State: Alive, Facts: count[g.self],
		Version: g.config.Version, Epoch: g.epoch, Self: true,
	}}
	for host, p := range g.peers {
		if g.succeeded(host) {
			continue // others may still speak of it
		}
		out = append(out, Peer{
			Host: host, Name: nameOf(host), Address: p.meta.vtep, State: p.state(), RTT: p.rtt, Facts: count[host],
			Version: p.meta.version, Epoch: p.meta.epoch, Since: p.since,
		})
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Compare(a.Host, b.Host) })
	return out
}

// VTEPs are the underlay addresses of the other hosts that are alive, suspect or away.
func (g *Gossip) VTEPs() []netip.Addr {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []netip.Addr
	for _, p := range g.peers {
		if p.holds() && p.meta.vtep.IsValid() {
			out = append(out, p.meta.vtep)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// some gives up to n living peers at random. mu is held.
func (g *Gossip) some(n int) []facts.Host {
	var hosts []facts.Host
	for host, p := range g.peers {
		if p.alive {
			hosts = append(hosts, host)
		}
	}
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	return hosts[:min(n, len(hosts))]
}

// meet begins to keep what is known of a host. mu is held.
func (g *Gossip) meet(host facts.Host) *peer {
	p := &peer{}
	g.peers[host] = p
	g.named.add(nameOf(host), host)
	g.recorded.add(idOf(host), host)
	return p
}

// unmeet ends that. mu is held.
func (g *Gossip) unmeet(host facts.Host) {
	delete(g.peers, host)
	g.named.remove(nameOf(host), host)
	g.recorded.remove(idOf(host), host)
}

// index finds hosts by a part of them.
type index map[string][]facts.Host

func (x index) add(part string, host facts.Host) { x[part] = append(x[part], host) }

func (x index) remove(part string, host facts.Host) {
	left := slices.DeleteFunc(x[part], func(other facts.Host) bool { return other == host })
	if x[part] = left; len(left) == 0 {
		delete(x, part)
	}
}

// nameOf is the part of a host that people know.
func nameOf(host facts.Host) string {
	for i := range len(host) {
		if host[i] == '/' {
			return string(host[:i])
		}
	}
	return string(host)
}

// idOf is the part of a host that stays when it is given another name.
func idOf(host facts.Host) string { return strings.TrimPrefix(string(host[len(nameOf(host)):]), "/") }

// sameRecord reports whether two hosts are one by two names: they have one record, and are at one address.
// What it stated by the former name, it states by the new one.
func sameRecord(a facts.Host, p *peer, b facts.Host, q *peer) bool {
	return p.meta.vtep == q.meta.vtep && idOf(a) == idOf(b)
}

// former reports whether a host has this host's record and another name.
func (g *Gossip) former(host facts.Host) bool { return host != g.self && idOf(host) == g.config.ID }

// succeeded reports whether a host is this one by a name that it has no more. What was ever heard of at another address is no
// such: it is a host to which this one's record was copied. mu is held.
func (g *Gossip) succeeded(host facts.Host) bool {
	p := g.peers[host]
	return g.former(host) && (p == nil || !p.alive && (!p.meta.vtep.IsValid() || p.meta.vtep == g.config.Advertise))
}

// Why a host is dropped.
const (
	renamed = "it has another name now"
	expired = "it has been dead for long"
)

// drop forgets a host. mu is held.
func (g *Gossip) drop(host facts.Host, why string) {
	g.log.Infof("gossip: host %s is forgotten: %s", nameOf(host), why)
	g.note(g.state.Forget(host))
	g.unmeet(host)
	g.peersChanged()
}

// meta is what a host says of itself with its membership.
type meta struct {
	away    bool // about to stop, to be back soon
	epoch   uint64
	vtep    netip.Addr
	version string
}

const metaFormat = 1

// metaAway is the bit that says that the host is about to stop, to be back soon.
const metaAway = 1

func (m meta) encode() []byte {
	var plans byte
	if m.away {
		plans |= metaAway
	}
	b := binary.AppendUvarint([]byte{metaFormat, plans}, m.epoch)
	addr := m.vtep.AsSlice()
	b = append(append(b, byte(len(addr))), addr...)
	return append(append(b, byte(len(m.version))), m.version...)
}

var errMeta = errors.New("its description cannot be read: it may be of another program or a later version")

// decodeMeta leaves room for later versions to add to the end.
func decodeMeta(b []byte) (m meta, err error) {
	if len(b) < 2 || b[0] != metaFormat {
		return m, errMeta
	}
	m.away = b[1]&metaAway != 0
	b = b[2:]
	epoch, n := binary.Uvarint(b)
	if n <= 0 {
		return m, errMeta
	}
	m.epoch = epoch
	addr, b, ok := cutBytes(b[n:])
	if !ok {
		return m, errMeta
	}
	if len(addr) > 0 {
		if m.vtep, ok = netip.AddrFromSlice(addr); !ok {
			return m, errMeta
		}
		if m.vtep = m.vtep.Unmap(); m.vtep.IsUnspecified() || m.vtep.IsMulticast() {
			return m, errMeta
		}
	}
	version, _, ok := cutBytes(b)
	if !ok || len(version) > maxVersion {
		return m, errMeta
	}
	m.version = string(version)
	return m, nil
}

// cutBytes cuts what begins with one byte of length.
func cutBytes(b []byte) (head, rest []byte, ok bool) {
	if len(b) < 1 || len(b)-1 < int(b[0]) {
		return nil, nil, false
	}
	n := int(b[0]) + 1
	return b[1:n], b[n:], true
}

// clash is a name that two living hosts bear at different addresses, or one host at two addresses.
type clash struct {
	identity bool
	a, b     string
}

// compare reports it if another living host has the name of host, which has come or changed. One
// at the same address is what the host was before it lost its record. mu is held.
func (g *Gossip) compare(host facts.Host, p *peer) {
	found := func(other facts.Host, addr netip.Addr) {
		if other != host && addr != p.meta.vtep {
			g.clashed(false, string(host)+" at "+p.meta.vtep.String(), string(other)+" at "+addr.String())
		}
	}
	if nameOf(host) == g.config.Name {
		found(g.self, g.config.Advertise)
	}
	for _, other := range g.named[nameOf(host)] {
		if o := g.peers[other]; o.alive {
			found(other, o.meta.vtep)
		}
	}
}

func (g *Gossip) clashed(identity bool, a, b string) {
	c := clash{identity, min(a, b), max(a, b)}
	_, known := g.clashes[c]
	if len(g.clashes) >= maxRemembered {
		clear(g.clashes)
	}
	if g.clashes[c] = time.Now(); !known {
		g.log.Errorf("gossip: two hosts have one name or identity: %s, and %s: rename one, or remove the record that was copied to it", c.a, c.b)
	}
}

// moved takes back that a host was alive at two addresses: it has another. A copy of it is heard of again.
// mu is held.
func (g *Gossip) moved(host facts.Host) {
	for c := range g.clashes {
		if c.identity && strings.HasPrefix(c.a, string(host)+" at ") {
			delete(g.clashes, c)
		}
	}
}
