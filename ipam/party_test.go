package ipam

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
)

// party is a cluster of hosts in memory, which can be cut apart, and whose claims can be refused, held up and counted.
type party struct {
	claims sync.Mutex // one claim at a time; never taken by the calls that are to answer at once
	mu     sync.Mutex
	hosts  map[string]*guest
	side   map[string]int // of the partition that each host is on
	// before a claim is asked for, with no lock held; an error is the claim's.
	before func(host string, block netip.Prefix) error
	// after a claim was granted and before its host hears of it.
	after func(block netip.Prefix)
}

// guest is one host's Cluster.
type guest struct {
	party *party
	name  string
	busy  func(subnet, prefix netip.Prefix) bool // of the manager of now
	own   map[claim]bool
	taken map[claim]string // by whom, as far as this host has heard
	asked []netip.Prefix   // every claim that was made
}

type claim struct{ subnet, block netip.Prefix }

func newParty() *party {
	return &party{hosts: map[string]*guest{}, side: map[string]int{}}
}

func (c *party) guest(name string) *guest {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.hosts[name]
	if g == nil {
		g = &guest{party: c, name: name, own: map[claim]bool{}, taken: map[claim]string{}, busy: func(_, _ netip.Prefix) bool { return false }}
		c.hosts[name] = g
	}
	return g
}

var errCut = errors.New("cut off")

func (g *guest) Claim(ctx context.Context, subnet, block netip.Prefix) error {
	c := g.party
	if c.before != nil {
		if err := c.before(g.name, block); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := g.ask(claim{subnet, block}); err != nil {
		return err
	}
	if c.after != nil {
		c.after(block)
	}
	return nil
}

// ask asks the hosts that can be reached.
func (g *guest) ask(k claim) error {
	c := g.party
	c.claims.Lock()
	defer c.claims.Unlock()
	c.mu.Lock()
	g.asked = append(g.asked, k.block)
	if g.own[k] {
		c.mu.Unlock()
		return nil
	}
	var others []*guest
	for _, name := range slices.Sorted(maps.Keys(c.hosts)) {
		if h := c.hosts[name]; h != g && c.side[name] == c.side[g.name] {
			others = append(others, h)
		}
	}
	c.mu.Unlock()
	for i, h := range others {
		if held := h.answer(g.name, k); held.Host != "" {
			c.mu.Lock()
			for _, h := range others[:i] {
				delete(h.taken, k)
			}
			c.mu.Unlock()
			return held
		}
	}
	c.mu.Lock()
	g.own[k] = true
	c.mu.Unlock()
	return nil
}

// answer is a claim as the other host answers it.
func (g *guest) answer(host string, k claim) TakenError {
	c := g.party
	c.mu.Lock()
	ask := false
	for own := range g.own {
		if own.subnet != k.subnet || !own.block.Overlaps(k.block) {
			continue
		}
		if !k.block.IsSingleIP() || own.block.IsSingleIP() {
			c.mu.Unlock()
			return TakenError{Block: own.block, Host: g.name}
		}
		ask = true
	}
	g.taken[k] = host
	c.mu.Unlock()
	if ask && g.busy(k.subnet, k.block) {
		c.mu.Lock()
		delete(g.taken, k)
		c.mu.Unlock()
		return TakenError{Block: k.block, Host: g.name}
	}
	return TakenError{}
}

func (g *guest) Release(subnet, block netip.Prefix) {
	c := g.party
	c.mu.Lock()
	defer c.mu.Unlock()
	k := claim{subnet, block}
	if !g.own[k] {
		return
	}
	delete(g.own, k)
	for name, h := range c.hosts {
		if c.side[name] == c.side[g.name] && h.taken[k] == g.name {
			delete(h.taken, k)
		}
	}
}

func (g *guest) Taken(subnet netip.Prefix) (all []netip.Prefix) {
	g.party.mu.Lock()
	defer g.party.mu.Unlock()
	for k := range g.taken {
		if k.subnet == subnet {
			all = append(all, k.block)
		}
	}
	return all
}

func (g *guest) Own(subnet netip.Prefix) (all []netip.Prefix) {
	g.party.mu.Lock()
	defer g.party.mu.Unlock()
	for k := range g.own {
		if k.subnet == subnet {
			all = append(all, k.block)
		}
	}
	return all
}

// restarted is what becomes of a guest whose host restarts: it knows nothing, and what its manager states is its own.
func (g *guest) restarted(m *Manager) {
	g.party.mu.Lock()
	defer g.party.mu.Unlock()
	g.own, g.taken = map[claim]bool{}, map[claim]string{}
	for subnet, blocks := range m.Blocks() {
		for _, b := range blocks {
			g.own[claim{subnet, b}] = true
		}
	}
}

// tell has all hosts hear what the others have. Of what two have, the one whose name comes first keeps it;
// a single address within another's block was ceded by that.
func (c *party) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := slices.Sorted(maps.Keys(c.hosts))
	for i, name := range names {
		for k := range c.hosts[name].own {
			for _, first := range names[:i] {
				for o := range c.hosts[first].own {
					if o.subnet == k.subnet && o.block.Overlaps(k.block) && o.block.IsSingleIP() == k.block.IsSingleIP() {
						delete(c.hosts[name].own, k)
					}
				}
			}
		}
	}
	for _, g := range c.hosts {
		g.taken = map[claim]string{}
		for other, h := range c.hosts {
			if h == g {
				continue
			}
			for k := range h.own {
				g.taken[k] = other
			}
		}
	}
}

func (g *guest) asks() int {
	g.party.mu.Lock()
	defer g.party.mu.Unlock()
	return len(g.asked)
}

// host is a manager in a cluster.
type host struct {
	*Manager
	*guest
	store *memory
}

func (c *party) host(t testing.TB, name string) *host {
	t.Helper()
	h := &host{guest: c.guest(name), store: &memory{}}
	h.start(t)
	return h
}

// start starts the manager, or another one in its place, from the record.
func (h *host) start(t testing.TB) {
	t.Helper()
	h.Manager = mustNew(t, h.store, Config{Seed: h.name, Cluster: h.guest})
	h.party.mu.Lock()
	defer h.party.mu.Unlock()
	h.guest.busy = h.Manager.Busy
}

// network makes a network of a subnet, as an engine and a driver do, and returns its pool.
func (h *host) network(t testing.TB, subnet, inner string) string {
	t.Helper()
	id := mustPool(t, h.Manager, subnet, inner)
	mustRequest(t, h.Manager, gatewayOf(id, netip.MustParsePrefix(subnet).Addr().Next().String()))
	if err := h.Share(netip.MustParsePrefix(subnet)); err != nil {
		t.Fatal(err)
	}
	return id
}

func (h *host) endpoint(pool, address, name string) (netip.Addr, error) {
	p, err := h.RequestAddress(context.Background(), endpointOf(pool, address, "02:42:00:00:00:01", name))
	return p.Addr(), err
}

func (h *host) mustEndpoint(t testing.TB, pool, address string) netip.Addr {
	t.Helper()
	a, err := h.endpoint(pool, address, "")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// blocks lists what the record has of a subnet.
func (h *host) blocks(subnet string) []netip.Prefix { return h.Blocks()[netip.MustParsePrefix(subnet)] }
