package ipam

import (
	"container/list"
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/dockway/dockway/ipam/dhcp"
)

// pool is one subnet that was requested, and the addresses in it.
//
// An address is reused as late as possible: first come those never used, in ascending order, then those freed, in the order in
// which they were. Of the freed ones so many are remembered that it takes freedMax others before one comes again; what is
// forgotten is found by passing over the range another time. So memory is in proportion to the addresses held and freed,
// and time constant, the passing over held ones shared out among those who get an address by it.
type pool struct {
	serial        uint64
	space         Space
	subnet, inner netip.Prefix // inner: the range to choose addresses from
	first, last   netip.Addr   // of the range
	size          uint64       // addresses from first to last, or the greatest uint64
	open          bool         // the addresses can be leased: no subnet was given, or DHCP was asked for

	mu      sync.Mutex
	lan     string                // the link on whose LAN the addresses are leased; empty: they are not
	share   *share                // with other hosts; nil: the addresses are all this host's to give. Once set it stays
	gone    bool                  // released while somebody waited for the lock
	used    uint64                // the manager's count of calls when this pool's last one came
	next    netip.Addr            // where to look for unused addresses; invalid when the range was passed over
	grants  map[netip.Addr]*grant // held and freed
	freed   list.List             // of netip.Addr, oldest first
	inRange uint64                // grants from first to last
	turn    uint64                // counts grants and releases
	gateway netip.Addr
}

// grant is what is known of one address: who holds it or, once it is freed, its place among the freed.
type grant struct {
	addressRecord
	since time.Time
	turn  uint64
	freed *list.Element // nil while it is held
	// refused says why the DHCP server no longer grants the lease; nil: it does. It is not recorded: who starts asks again.
	refused error
}

const (
	// freedMax is how many freed addresses a pool remembers.
	freedMax = 1 << 14
	// freedBatch is how many of them are forgotten at once, so that passing over the range again yields as many.
	freedBatch = 1 << 10
)

func newPool(serial uint64, space Space, subnet, inner netip.Prefix) *pool {
	p := &pool{serial: serial, space: space, subnet: subnet, inner: inner, grants: make(map[netip.Addr]*grant)}
	p.first, p.last = bounds(subnet, inner)
	p.next = p.first
	p.size = count(p.first, p.last)
	return p
}

func (p *pool) id() string { return fmt.Sprintf("%s/%d/%s", p.space, p.serial, p.subnet) }

func (p *pool) held() int { return len(p.grants) - p.freed.Len() }

func (p *pool) contains(a netip.Addr) bool { return p.first.Compare(a) <= 0 && a.Compare(p.last) <= 0 }

// choose returns the address whose turn it is, and where to go on looking for unused ones after it.
func (p *pool) choose() (a, next netip.Addr, ok bool) {
	if p.inRange-uint64(p.freed.Len()) == p.size {
		return netip.Addr{}, p.next, false
	}
	a = p.unused(p.next)
	if !a.IsValid() && p.inRange < p.size {
		a = p.unused(p.first) // one that was forgotten
	}
	if !a.IsValid() {
		return p.freed.Front().Value.(netip.Addr), netip.Addr{}, true
	}
	if a == p.last {
		return a, netip.Addr{}, true
	}
	return a, a.Next(), true
}

// unused returns the first address not before a, if any, that is neither held nor remembered as freed.
func (p *pool) unused(a netip.Addr) netip.Addr {
	for a.IsValid() && p.contains(a) {
		if p.grants[a] == nil {
			return a
		}
		a = a.Next()
	}
	return netip.Addr{}
}

// give makes a grant that is on record.
func (p *pool) give(a netip.Addr, r addressRecord) {
	if g := p.grants[a]; g != nil {
		p.freed.Remove(g.freed)
	} else if p.contains(a) {
		p.inRange++
	}
	p.turn++
	p.grants[a] = &grant{addressRecord: r, since: time.Now(), turn: p.turn}
	if r.Kind == Gateway {
		p.gateway = a
	}
}

// free turns a grant into a freed address, which is to be remembered from the turn-th change of the pool on.
func (p *pool) free(a netip.Addr, turn uint64) {
	if p.gateway == a {
		p.gateway = netip.Addr{}
	}
	p.turn = turn
	if p.contains(a) {
		p.grants[a] = &grant{addressRecord: addressRecord{Freed: turn}, turn: turn, freed: p.freed.PushBack(a)}
	} else {
		delete(p.grants, a)
	}
}

// forget forgets the address freed first.
func (p *pool) forget() {
	delete(p.grants, p.freed.Remove(p.freed.Front()).(netip.Addr))
	p.inRange--
}

// RequestAddress gives an address of a pool, with the length of the pool's prefix: the one requested, wherever in the subnet
// it is, or one of the range whose turn it is. IsTaken, IsExhausted, IsUnknownPool and IsInvalid tell why not. Asked again
// for an address by who holds it, be it a gateway or a container known by its name, it gives that again.
func (m *Manager) RequestAddress(ctx context.Context, r AddressRequest) (netip.Prefix, error) {
	a, err := parseAddress(r.Address)
	if err != nil {
		return netip.Prefix{}, err
	}
	p, err := m.use(ctx, r.PoolID)
	if err != nil {
		return netip.Prefix{}, err
	}
	record := addressRecord{Kind: r.kind(), Name: r.Options[optionName], MAC: r.Options[optionMAC]}
	if p.lan != "" && record.Kind == Endpoint && !a.IsValid() {
		p.mu.Unlock() // a DHCP server can take seconds
		return m.requestLease(ctx, p, record, record.MAC)
	}
	if p.share != nil && record.Kind == Endpoint {
		p.mu.Unlock() // other hosts can take a second
		if a.IsValid() {
			return m.requestOne(ctx, p, a, record)
		}
		return m.requestOwn(ctx, p, record)
	}
	defer p.mu.Unlock()
	if a.IsValid() {
		return m.giveGiven(p, a, record)
	}
	a, next, ok := p.choose()
	if !ok {
		return netip.Prefix{}, fmt.Errorf("pool %s is %w: all %d addresses of %s are held; remove containers, or create a network with a larger subnet or range", r.PoolID, exhausted, p.size, p.inner)
	}
	return m.give(p, a, next, record)
}

// giveGiven gives an address that is asked for, unless somebody else holds it. The pool is locked.
func (m *Manager) giveGiven(p *pool, a netip.Addr, record addressRecord) (netip.Prefix, error) {
	if err := checkAddress(p.subnet, a); err != nil {
		return netip.Prefix{}, err
	}
	if g := p.grants[a]; g != nil && g.freed == nil {
		if g.same(record) {
			return netip.PrefixFrom(a, p.subnet.Bits()), nil
		}
		return netip.Prefix{}, fmt.Errorf("address %s in pool %s is %w: it is %s", a, p.id(), taken, g.holder())
	}
	return m.give(p, a, p.next, record)
}

// give gives an address that nobody holds, and records where to look for unused ones next. The pool is locked.
func (m *Manager) give(p *pool, a, next netip.Addr, record addressRecord) (netip.Prefix, error) {
	changes := []Change{p.addressChange(a, record)}
	if next != p.next {
		changes = append(changes, p.change(next))
	}
	if err := m.store.Apply(changes...); err != nil {
		return netip.Prefix{}, fmt.Errorf("giving address %s of pool %s: %w", a, p.id(), err)
	}
	p.next = next
	p.give(a, record)
	return netip.PrefixFrom(a, p.subnet.Bits()), nil
}

// ReleaseAddress frees an address. One that is not held, or of an unknown pool, is released already.
func (m *Manager) ReleaseAddress(ctx context.Context, poolID, address string) error {
	a, err := parseAddress(address)
	if err != nil {
		return err
	}
	return m.release(ctx, poolID, a, func(*grant) bool { return true })
}

// ReleaseHeld frees an address that Held listed, unless it was released since, whoever holds it now. It is for addresses
// that nobody claims after a crash.
func (m *Manager) ReleaseHeld(ctx context.Context, h Held) error {
	return m.release(ctx, h.PoolID, h.Address, func(g *grant) bool { return g.turn == h.turn })
}

// ReleaseEndpoint frees the address of an endpoint that is gone, for a caller that knows its subnet but not its pool. If
// several pools of that subnet have an endpoint with the address, none is freed, since nobody can tell whose it was.
func (m *Manager) ReleaseEndpoint(ctx context.Context, subnet netip.Prefix, a netip.Addr) error {
	var found []Held
	for _, p := range m.sorted() {
		p.mu.Lock()
		if g := p.grants[a]; !p.gone && p.subnet == subnet.Masked() && g != nil && g.freed == nil && g.Kind == Endpoint {
			found = append(found, Held{PoolID: p.id(), Address: a, turn: g.turn})
		}
		p.mu.Unlock()
	}
	if len(found) != 1 {
		return nil
	}
	return m.ReleaseHeld(ctx, found[0])
}

func (m *Manager) release(ctx context.Context, poolID string, a netip.Addr, only func(*grant) bool) error {
	p, err := m.use(ctx, poolID)
	if IsUnknownPool(err) {
		return nil
	}
	if err != nil {
		return err
	}
	lease, err := m.freeHeld(p, a, only)
	p.mu.Unlock()
	if lease != nil { // a DHCP server can take its time, and who keeps the lease may be about to tell of it
		_ = m.giveBack(ctx, *lease, nil)
	}
	return err
}

// freeHeld frees an address if it is held, and returns its lease, if there is one, which is yet to be given back. The pool is
// locked.
func (m *Manager) freeHeld(p *pool, a netip.Addr, only func(*grant) bool) (*dhcp.Lease, error) {
	g := p.grants[a]
	if g == nil || g.freed != nil || !only(g) {
		return nil, nil
	}
	turn, forgotten := p.turn+1, 0
	change := p.addressChange(a, addressRecord{Freed: turn})
	if !p.contains(a) {
		change.Value = nil
	}
	changes := []Change{change}
	if p.freed.Len() >= freedMax {
		for e := p.freed.Front(); forgotten < freedBatch; e = e.Next() {
			changes = append(changes, Change{Bucket: addressBucket, Key: p.addressKey(e.Value.(netip.Addr))})
			forgotten++
		}
	}
	if err := m.store.Apply(changes...); err != nil {
		return nil, fmt.Errorf("releasing address %s of pool %s: %w", a, p.id(), err)
	}
	p.free(a, turn)
	for range forgotten {
		p.forget()
	}
	if g.Claimed {
		m.unclaim(p.share, a)
	}
	return g.Lease, nil
}

// same reports whether a request is from who holds the address: an engine that lost track of it, for within a pool there is
// one gateway address to ask for, and within an engine one container of a name.
func (g *grant) same(r addressRecord) bool {
	return g.Kind == r.Kind && (r.Kind == Gateway || r.Kind == Endpoint && r.Name != "" && g.Name == r.Name)
}

func (g *grant) holder() string {
	switch {
	case g.Kind == Gateway:
		return "the gateway"
	case g.Kind == Auxiliary:
		return "an auxiliary address"
	case g.Name != "":
		return fmt.Sprintf("held by container %q", g.Name)
	case g.MAC != "":
		return "held by the endpoint with MAC address " + g.MAC
	}
	return "held by another endpoint"
}
