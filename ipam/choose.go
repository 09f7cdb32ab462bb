package ipam

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/dockway/dockway/ipam/dhcp"
)

const (
	// releasedMax is how many released subnets are remembered so as not to be chosen again soon.
	releasedMax = 256
	// twinsMax is how many pools of one space, subnet and range can be held. More are not in use but left behind, most
	// likely by a swarm's leader: whenever leadership comes back, it requests all its pools again and releases none.
	twinsMax = 256
)

// PoolReply is the answer to a PoolRequest. The ID is new for every request.
type PoolReply struct {
	ID   string
	Pool netip.Prefix
	Data map[string]string
}

// RequestPool grants a pool that is given, or chooses one that overlaps neither a route of the host nor a pool that is held.
// What one request gets is a pool of its own, also when the subnet is the same as another's: see docs/ipam.md for why.
// IsInvalid and IsExhausted tell why not.
func (m *Manager) RequestPool(ctx context.Context, r PoolRequest) (PoolReply, error) {
	w, err := parsePoolRequest(r)
	if err != nil {
		return PoolReply{}, err
	}
	var routes []netip.Prefix
	if !w.subnet.IsValid() && m.routes != nil {
		if routes, err = m.routes(); err != nil {
			return PoolReply{}, fmt.Errorf("choosing a subnet that no route of this host overlaps: %w", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return PoolReply{}, err
	}
	next := m.choice.clone()
	if !w.subnet.IsValid() {
		if w.subnet, err = m.choose(&next, w, routes); err != nil {
			return PoolReply{}, err
		}
		w.inner = w.subnet
	}
	next.Serial++
	p := newPool(next.Serial, w.space, w.subnet, w.inner)
	p.open = w.open
	changes := []Change{p.change(p.next), next.change()}
	if twin := m.surplus(p); twin != nil {
		twin.mu.Lock()
		defer twin.mu.Unlock()
		err = m.drop(twin, changes...)
	} else {
		err = m.store.Apply(changes...)
	}
	if err != nil {
		return PoolReply{}, fmt.Errorf("granting pool %s: %w", w.subnet, err)
	}
	p.used = m.uses.Add(1)
	m.choice, m.pools[p.id()] = next, p
	return PoolReply{ID: p.id(), Pool: w.subnet}, nil
}

// ReleasePool frees a pool and all its addresses. An unknown one is released already.
func (m *Manager) ReleasePool(ctx context.Context, id string) error {
	leases, err := m.releasePool(ctx, id)
	var all sync.WaitGroup
	for _, lease := range leases {
		all.Go(func() { _ = m.giveBack(ctx, lease, nil) })
	}
	all.Wait()
	return err
}

// releasePool does so, and returns the leases of addresses that were still held, which are yet to be given back.
func (m *Manager) releasePool(ctx context.Context, id string) (leases []dhcp.Lease, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[id]
	if p == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	next := m.choice.clone()
	next.release(p.subnet)
	if err := m.drop(p, next.change()); err != nil {
		return nil, fmt.Errorf("releasing pool %s: %w", id, err)
	}
	m.choice = next
	for _, g := range p.grants {
		if g.Lease != nil {
			leases = append(leases, *g.Lease)
		}
	}
	return leases, nil
}

// drop takes a pool off the list and, together with other changes, off the record; both locks are held. This host's blocks go
// with the last pool of a shared subnet.
func (m *Manager) drop(p *pool, with ...Change) error {
	changes := append(p.deletion(), with...)
	if p.share != nil {
		p.share.mu.Lock()
		defer p.share.mu.Unlock()
		changes = append(changes, p.share.leaving()...)
	}
	if err := m.store.Apply(changes...); err != nil {
		return err
	}
	p.gone = true
	delete(m.pools, p.id())
	if p.share != nil {
		p.share.leave(p)
		m.settle(p.share)
	}
	return nil
}

// surplus returns the pool that must go for another one of its kind, if any: the one not used for longest.
func (m *Manager) surplus(kind *pool) *pool {
	var oldest *pool
	twins, last := 0, uint64(0)
	for _, p := range m.pools {
		if p.space != kind.space || p.subnet != kind.subnet || p.inner != kind.inner {
			continue
		}
		twins++
		p.mu.Lock()
		if oldest == nil || p.used < last || p.used == last && p.serial < oldest.serial {
			oldest, last = p, p.used
		}
		p.mu.Unlock()
	}
	if twins < twinsMax {
		return nil
	}
	return oldest
}

// choice is how far the choosing of pools has come.
type choice struct {
	Serial   uint64         `json:"serial"`   // of the last pool
	Last4    netip.Prefix   `json:"last4"`    // the last one chosen
	Last6    netip.Prefix   `json:"last6"`    //
	Released []netip.Prefix `json:"released"` // not to be chosen again soon, oldest first
}

func (c choice) clone() choice {
	c.Released = slices.Clone(c.Released)
	return c
}

func (c *choice) release(subnet netip.Prefix) {
	c.Released = append(c.Released, subnet)
	if surplus := len(c.Released) - releasedMax; surplus > 0 {
		c.Released = c.Released[surplus:]
	}
}

// choose returns the subnet whose turn it is: the next one after the last chosen, all the ranges around, that overlaps nothing
// and was not released lately; if there is none, the one released first.
func (m *Manager) choose(c *choice, w wanted, routes []netip.Prefix) (netip.Prefix, error) {
	last := &c.Last4
	if w.v6 {
		last = &c.Last6
	}
	var ranges []DefaultPool
	for _, d := range m.ranges {
		if w.size != 0 {
			d.Size = w.size
		}
		if d.Prefix.Addr().Is6() == w.v6 && d.Size >= d.Prefix.Bits() && d.Size <= d.Prefix.Addr().BitLen()-2 {
			ranges = append(ranges, d)
		}
	}
	if len(ranges) == 0 {
		return netip.Prefix{}, fmt.Errorf("choosing a subnet is %w: no default pool is configured to cut one of this family and length from; give --subnet", invalid)
	}
	// A default route leads anywhere, so it is no reason to avoid a subnet.
	routes = slices.DeleteFunc(slices.Clone(routes), func(p netip.Prefix) bool { return p.Bits() <= 0 })
	var held []netip.Prefix
	for p := range maps.Values(m.pools) {
		held = append(held, p.subnet)
	}
	var chosen netip.Prefix
	found := func(ignored int) (ok bool) {
		chosen, ok = next(ranges, *last, union(routes, held, c.Released[ignored:]))
		return ok
	}
	// The more of the oldest releases are ignored, the more room there is; no more than needed are.
	ignored := sort.Search(len(c.Released)+1, found)
	if ignored > len(c.Released) {
		return netip.Prefix{}, fmt.Errorf("choosing a subnet: the default pools %s are %w: all is held, or overlaps a route of this host; remove unused networks, give --subnet, or configure more default pools", names(ranges), exhausted)
	}
	found(ignored)
	c.Released = slices.DeleteFunc(c.Released, chosen.Overlaps)
	*last = chosen
	return chosen, nil
}

// next returns the first subnet after the last one, all the ranges around, with no address in a set.
func next(ranges []DefaultPool, last netip.Prefix, avoid prefixes) (netip.Prefix, bool) {
	start, from := 0, ranges[0].Prefix.Addr()
	for i, d := range ranges {
		if last.IsValid() && d.Prefix.Contains(last.Addr()) {
			start, from = i, lastAddr(last).Next()
		}
	}
	for n := range len(ranges) + 1 { // once more the first, from its beginning
		d := ranges[(start+n)%len(ranges)]
		if n > 0 {
			from = d.Prefix.Addr()
		}
		if p, ok := avoid.free(d.Prefix, d.Size, from); ok {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func names(ranges []DefaultPool) string {
	var all []string
	for _, d := range ranges {
		all = append(all, d.String())
	}
	return strings.Join(all, ", ")
}
