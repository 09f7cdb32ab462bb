// Package ipam is the address manager: address pools, and the addresses handed out of them, each to one holder at a time.
//
// It is not for networks: it knows neither what a pool is used for nor whether two of them can be routed on one host, and
// it never touches an interface.
package ipam

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dockway/dockway/ipam/dhcp"
)

// Space is one of Docker's two address spaces. The engine names one with every pool that it asks for.
type Space string

const (
	// Local is for networks of one engine, and for a swarm node's share in a network of the swarm.
	Local Space = "dockway-local"
	// Global is for networks of a swarm, asked for by the swarm's leader.
	Global Space = "dockway-global"
)

// Store keeps values by bucket and key over restarts.
type Store interface {
	// Apply makes all changes or none; when it returns nil they are on the disk.
	Apply(changes ...Change) error
	// Load calls each for every key of a bucket, in any order, and stops at its first error.
	Load(bucket string, each func(key string, value []byte) error) error
}

// Change sets one value of the store, or deletes it when Value is nil. It is an alias so that a store need not import this
// package.
type Change = struct {
	Bucket, Key string
	Value       []byte
}

// Config says what to choose from when a pool is requested without a subnet, and whom to ask for addresses that are not
// this host's alone to give.
type Config struct {
	// Pools to choose from, in this order. A family that is not in it has its default: for IPv4 10.64.0.0/11 cut into /24,
	// for IPv6 a unique local /48 (RFC 4193) derived from Seed, cut into /64.
	Pools []DefaultPool
	// Seed identifies the host, so that two hosts choose different IPv6 pools, and different blocks of a shared one. Without it
	// there is no default for IPv6.
	Seed string
	// Leaser leases the addresses of leased pools; nil: no pool is.
	Leaser Leaser
	// MAC chooses the MAC of a container of a subnet that is leased from, which may have a name. Engines tell the address
	// manager of a container before they tell the network driver.
	MAC func(subnet netip.Prefix, name string) (dhcp.MAC, error)
	// Cluster is the other hosts, for pools that are shared with them; nil: no pool can be.
	Cluster Cluster
}

// Manager hands out pools and addresses. Every change is recorded before it is answered; after an error nothing has
// changed. It is safe for concurrent use: calls on one pool wait for each other, calls on different pools do not.
type Manager struct {
	store  Store
	routes func() ([]netip.Prefix, error)
	ranges []DefaultPool
	leaser Leaser
	mac    func(subnet netip.Prefix, name string) (dhcp.MAC, error)
	uses   atomic.Uint64 // counts calls, to know which pool was used last

	seed    string
	cluster Cluster
	due     chan struct{} // there is something for ClaimAhead

	mu     sync.RWMutex // over the lists of pools and shares; taken before a pool's own lock, and that before a share's
	pools  map[string]*pool
	shares map[netip.Prefix]*share // by subnet
	choice choice
}

// New returns a manager of what the store has on record. The host's routes are asked for whenever a pool is to be chosen;
// nil means there are none to avoid. A store whose record makes no sense is an error.
func New(store Store, routes func() ([]netip.Prefix, error), cfg Config) (*Manager, error) {
	ranges, err := defaultPools(cfg)
	if err != nil {
		return nil, err
	}
	m := &Manager{
		store: store, routes: routes, ranges: ranges, leaser: cfg.Leaser, mac: cfg.MAC,
		seed: cfg.Seed, cluster: cfg.Cluster, due: make(chan struct{}, 1),
		pools: make(map[string]*pool), shares: make(map[netip.Prefix]*share),
	}
	if m.cluster == nil {
		m.cluster = noCluster{}
	}
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("reading the address pools on record: %w", err)
	}
	if err := m.keep(); err != nil {
		return nil, fmt.Errorf("taking over the leases on record: %w", err)
	}
	return m, nil
}

// PoolInfo describes a pool that is held.
type PoolInfo struct {
	ID      string
	Space   Space
	Subnet  netip.Prefix
	Range   netip.Prefix // where addresses are chosen from: the subnet, or the --ip-range in it
	Gateway netip.Addr   // invalid when none was requested
	Held    int          // addresses held, also those outside of the range
	Total   uint64       // addresses that can be chosen; the greatest uint64 when there are more
	Shared  bool         // with other hosts: this one gives only out of its blocks
}

// Pools lists the pools held, oldest first.
func (m *Manager) Pools() []PoolInfo {
	var infos []PoolInfo
	for _, p := range m.sorted() {
		p.mu.Lock()
		if !p.gone {
			infos = append(infos, PoolInfo{
				ID: p.id(), Space: p.space, Subnet: p.subnet, Range: p.inner,
				Gateway: p.gateway, Held: p.held(), Total: p.size, Shared: p.share != nil,
			})
		}
		p.mu.Unlock()
	}
	return infos
}

func (m *Manager) sorted() []*pool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.SortedFunc(maps.Values(m.pools), func(a, b *pool) int { return cmp.Compare(a.serial, b.serial) })
}

// Held is an address that somebody holds.
type Held struct {
	PoolID  string
	Space   Space
	Subnet  netip.Prefix
	Address netip.Addr
	Kind    Kind
	Name    string        // of the container, if the engine told it (29 and later)
	MAC     string        // of the endpoint, if the engine told it
	Age     time.Duration // since it was given, or since New, whichever is shorter

	turn uint64
}

// Held lists the addresses held in a pool in their order. An unknown pool has none.
func (m *Manager) Held(poolID string) []Held {
	p, err := m.use(context.Background(), poolID)
	if err != nil {
		return nil
	}
	defer p.mu.Unlock()
	var all []Held
	for addr, g := range p.grants {
		if g.freed == nil {
			all = append(all, Held{
				PoolID: poolID, Space: p.space, Subnet: p.subnet, Address: addr,
				Kind: g.Kind, Name: g.Name, MAC: g.MAC, Age: time.Since(g.since), turn: g.turn,
			})
		}
	}
	slices.SortFunc(all, func(a, b Held) int { return a.Address.Compare(b.Address) })
	return all
}

// use returns a pool with its lock taken.
func (m *Manager) use(ctx context.Context, id string) (*pool, error) {
	m.mu.RLock()
	p := m.pools[id]
	m.mu.RUnlock()
	if p != nil {
		p.mu.Lock()
		if err := ctx.Err(); err != nil {
			p.mu.Unlock()
			return nil, err // who asked waits no more, and would never release what it got
		}
		if !p.gone {
			p.used = m.uses.Add(1)
			return p, nil
		}
		p.mu.Unlock()
	}
	return nil, fmt.Errorf("%w %q: it was released, or never requested", unknownPool, id)
}
