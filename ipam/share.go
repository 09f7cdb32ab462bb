package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// A pool can be shared with other hosts: each then gives addresses only out of blocks of the subnet that it has claimed for
// itself. An engine asks for a pool before it makes the network, so it is only when the network is made that somebody can
// tell that other hosts have it too.

const (
	// claimTries is how many blocks are asked for before a call gives up.
	claimTries = 32
	// claimAsks is how many of them may be known to be another host's: one may be free by now, and the others say whose
	// they are.
	claimAsks = 3
)

// share is what this host has of a subnet that it shares. It stays when the last pool of the subnet goes, for claims that
// are under way then.
type share struct {
	subnet netip.Prefix
	turn   chan struct{} // has a value while a block is being claimed

	mu       sync.Mutex
	pools    int                   // that are shared
	blocks   map[netip.Prefix]bool // that this host has
	ceded    map[netip.Prefix]bool // what others have within them, and whether the cluster has said so since New
	claimed  map[netip.Addr]int    // addresses claimed by themselves, and the pools that hold each
	claiming map[netip.Prefix]int  // claims under way
}

// shareOf returns the share of a subnet. The lists are locked.
func (m *Manager) shareOf(subnet netip.Prefix) *share {
	s := m.shares[subnet]
	if s == nil {
		s = &share{
			subnet: subnet, turn: make(chan struct{}, 1),
			blocks: map[netip.Prefix]bool{}, ceded: map[netip.Prefix]bool{}, claimed: map[netip.Addr]int{}, claiming: map[netip.Prefix]int{},
		}
		m.shares[subnet] = s
	}
	return s
}

// join counts a pool in, and what it has claimed by itself.
func (s *share) join(p *pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pools++
	for a, g := range p.grants {
		if g.Claimed {
			s.claimed[a]++
		}
	}
}

// leave counts a pool out. With the last one the blocks are nobody's. The share is locked.
func (s *share) leave(p *pool) {
	for a, g := range p.grants {
		if g.Claimed {
			s.unhold(a)
		}
	}
	if s.pools--; s.pools == 0 {
		clear(s.blocks)
		clear(s.ceded)
	}
}

// unhold counts a pool out that held an address which was claimed by itself. The share is locked.
func (s *share) unhold(a netip.Addr) {
	if s.claimed[a]--; s.claimed[a] == 0 {
		delete(s.claimed, a)
	}
}

// prefixes lists what this host has, in order. The share is locked.
func (s *share) prefixes() []netip.Prefix {
	all := slices.Collect(maps.Keys(s.blocks))
	for a := range s.claimed {
		if !s.blocks[single(a)] {
			all = append(all, single(a))
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// Share has the pools of a subnet in space Local, as they are now, give addresses to containers only out of blocks that this
// host has claimed. It asks nobody: the first address is what the first block is claimed for. IsUnknownPool tells that
// there is no such pool.
func (m *Manager) Share(subnet netip.Prefix) error {
	subnet = subnet.Masked()
	if m.cluster == (noCluster{}) {
		return fmt.Errorf("sharing subnet %s with other hosts: %w", subnet, errNoCluster)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var joining []*pool
	var changes []Change
	known := false
	for _, p := range m.pools {
		if p.space != Local || p.subnet != subnet {
			continue
		}
		known = true
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.share == nil {
			p.share = m.shareOf(subnet)
			joining, changes = append(joining, p), append(changes, p.change(p.next))
		}
	}
	if !known {
		return fmt.Errorf("sharing subnet %s with other hosts: %w: this address manager has none of it, so it cannot keep hosts from giving one address twice", subnet, unknownPool)
	}
	if len(joining) == 0 {
		return nil
	}
	if err := m.store.Apply(changes...); err != nil {
		for _, p := range joining {
			p.share = nil
		}
		return fmt.Errorf("sharing subnet %s with other hosts: %w", subnet, err)
	}
	for _, p := range joining {
		p.share.join(p)
	}
	return nil
}

// Blocks lists what this host has of each shared subnet, on record: blocks, and addresses claimed by themselves. It is for
// the cluster to have them again after a restart.
func (m *Manager) Blocks() map[netip.Prefix][]netip.Prefix {
	all := make(map[netip.Prefix][]netip.Prefix)
	for _, s := range m.sharing() {
		s.mu.Lock()
		if has := s.prefixes(); len(has) > 0 {
			all[s.subnet] = has
		}
		s.mu.Unlock()
	}
	return all
}

// Busy reports whether an address in a prefix is held here, in a pool of the subnet that is shared.
func (m *Manager) Busy(subnet, prefix netip.Prefix) bool {
	defer m.wake() // what is ceded is to be put on record
	for _, p := range m.sorted() {
		if p.space != Local || p.subnet != subnet.Masked() {
			continue
		}
		p.mu.Lock()
		busy := !p.gone && p.share != nil && p.holds(prefix)
		p.mu.Unlock()
		if busy {
			return true
		}
	}
	return false
}

func (p *pool) holds(prefix netip.Prefix) bool {
	if prefix.IsSingleIP() {
		g := p.grants[prefix.Addr()]
		return g != nil && g.freed == nil
	}
	for a, g := range p.grants {
		if g.freed == nil && prefix.Contains(a) {
			return true
		}
	}
	return false
}

// Due has a value when there may be something for ClaimAhead to do.
func (m *Manager) Due() <-chan struct{} { return m.due }

func (m *Manager) wake() {
	select {
	case m.due <- struct{}{}:
	default:
	}
}

// ClaimAhead does what must not make a container wait: it claims the next block of each pool that has less than a quarter
// of one left, claims again what is on record but not in Cluster.Own, gives up what is in Cluster.Own but not on record, and
// records what other hosts have inside of this host's blocks. It is to be called whenever Due has a value, and every now and
// then. Its errors are for people; what failed is tried again by the next call.
func (m *Manager) ClaimAhead(ctx context.Context) error {
	var errs []error
	for _, s := range m.sharing() {
		errs = append(errs, m.tend(ctx, s))
	}
	for _, p := range m.sorted() {
		p.mu.Lock()
		shared := p.share != nil && !p.gone
		p.mu.Unlock()
		if !shared {
			continue
		}
		// With no block left there is nothing to do until an address is asked for in vain.
		if err := m.grow(ctx, p, p.stocked, 0); !IsExhausted(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// requestOwn gives a container an address out of this host's blocks, or out of another one, which it claims.
func (m *Manager) requestOwn(ctx context.Context, p *pool, record addressRecord) (netip.Prefix, error) {
	for {
		got, ok, err := m.giveOwn(ctx, p, record)
		if ok || err != nil {
			return got, err
		}
		if err := m.grow(ctx, p, p.canGive, claimAsks); err != nil {
			return netip.Prefix{}, err
		}
	}
}

// giveOwn gives an address out of this host's blocks, if there is one.
func (m *Manager) giveOwn(ctx context.Context, p *pool, record addressRecord) (netip.Prefix, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.alive(ctx); err != nil {
		return netip.Prefix{}, false, err
	}
	a, next, ok := p.chooseOwn(m.view(p.share))
	if !ok {
		return netip.Prefix{}, false, nil
	}
	defer m.wake()
	got, err := m.give(p, a, next, record)
	return got, true, err
}

// requestOne gives a container the address that it asks for. One outside of this host's blocks is claimed by itself.
func (m *Manager) requestOne(ctx context.Context, p *pool, a netip.Addr, record addressRecord) (netip.Prefix, error) {
	got, ok, err := m.giveOne(ctx, p, a, record)
	if ok || err != nil {
		return got, err
	}
	record.Claimed = true
	err = m.claim(ctx, p.share, single(a), func() (err error) {
		got, _, err = m.giveOne(ctx, p, a, record)
		return err
	})
	if held := (TakenError{}); errors.As(err, &held) {
		return netip.Prefix{}, fmt.Errorf("address %s of subnet %s is %w: it is held by host %s; give another with --ip, or none, or if its container has just been removed, try again in a moment", a, p.subnet, taken, held.Host)
	}
	return got, err
}

// giveOne gives the address that is asked for, if it is this host's to give: claimed, or in one of its blocks.
func (m *Manager) giveOne(ctx context.Context, p *pool, a netip.Addr, record addressRecord) (netip.Prefix, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.alive(ctx); err != nil {
		return netip.Prefix{}, false, err
	}
	if err := checkAddress(p.subnet, a); err != nil {
		return netip.Prefix{}, false, err
	}
	held := p.holds(single(a))
	if own, others := m.view(p.share); !held && !record.Claimed && (!own.contains(a) || others.contains(a)) {
		return netip.Prefix{}, false, nil
	}
	got, err := m.giveGiven(p, a, record)
	if err != nil || held {
		return got, true, err
	}
	if record.Claimed {
		p.share.mu.Lock()
		p.share.claimed[a]++
		p.share.mu.Unlock()
	}
	m.wake()
	return got, true, nil
}

func (p *pool) alive(ctx context.Context) error {
	if p.gone {
		return fmt.Errorf("%w %q: it was released meanwhile", unknownPool, p.id())
	}
	return ctx.Err() // who asked waits no more, and would never release what it got
}

// grow claims a block for a pool, unless it has enough when its turn comes: of those who want one at once, the first claims
// it. So many blocks that other hosts are known to have may be asked for as well.
func (m *Manager) grow(ctx context.Context, p *pool, enough func(own, others prefixes) bool, asks int) error {
	s := p.share
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return fmt.Errorf("claiming a block of subnet %s: %w", s.subnet, ctx.Err())
	}
	var refused []netip.Prefix
	hosts := make(map[string]bool)
	for try := range claimTries {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("claiming a block of subnet %s: %w", s.subnet, err)
		}
		p.mu.Lock()
		own, within := m.view(s)
		if p.gone || enough(own, within) {
			p.mu.Unlock()
			return nil
		}
		others := m.cluster.Taken(s.subnet)
		from := place(m.seed, p.inner, try)
		block, ok := p.freeBlock(from, union(own, others, refused))
		if !ok && asks > 0 {
			asks--
			block, ok = p.freeBlock(from, union(own, refused))
		}
		p.mu.Unlock()
		if !ok {
			return p.noBlock(own, others, slices.Sorted(maps.Keys(hosts)))
		}
		err := m.claim(ctx, s, block, func() error { return m.keepBlock(s, block) })
		held := TakenError{}
		if err == nil || !errors.As(err, &held) {
			return err
		}
		refused, hosts[held.Host] = append(refused, block), true
		if held.Block.IsValid() {
			refused = append(refused, held.Block.Masked())
		}
	}
	return fmt.Errorf("claiming a block of subnet %s: %d were claimed by other hosts meanwhile (%s): try again", s.subnet, claimTries, strings.Join(slices.Sorted(maps.Keys(hosts)), ", "))
}

// noBlock is the error when a pool's range has no block left to claim.
func (p *pool) noBlock(own, others []netip.Prefix, hosts []string) error {
	inner := prefixes{p.inner}
	who := ""
	if len(hosts) > 0 {
		who = " (such as " + strings.Join(hosts, ", ") + ")"
	}
	return fmt.Errorf("subnet %s is %w for this host: of the %s blocks of /%d in %s it has %d, with no address left, and other hosts%s have %d blocks and addresses; remove containers, or the network from hosts, or create it with a larger subnet",
		p.subnet, exhausted, blockCount(p.inner), blockBits(p.inner), p.inner, len(inner.meeting(own)), who, len(inner.meeting(others)))
}

// canGive reports whether there is an address to give.
func (p *pool) canGive(own, others prefixes) bool {
	_, _, ok := p.chooseOwn(own, others)
	return ok
}

// stocked reports whether a quarter of a block is free. A pool of which no address was asked for needs none.
func (p *pool) stocked(own, others prefixes) bool {
	own = union(prefixes{p.inner}.meeting(own))
	if len(own) == 0 {
		return true
	}
	var lost []netip.Prefix
	for _, o := range others {
		if b, ok := own.overlap(o); ok && b.Bits() > o.Bits() {
			lost = append(lost, own.meeting([]netip.Prefix{o})...)
			continue
		}
		lost = append(lost, o)
	}
	size := uint64(1) << (p.inner.Addr().BitLen() - blockBits(p.inner))
	return 4*(p.room(own)-p.room(union(lost))) >= size
}

// claim has the cluster make a prefix this host's, and then has it kept. What is not kept is released.
func (m *Manager) claim(ctx context.Context, s *share, prefix netip.Prefix, keep func() error) error {
	s.mu.Lock()
	s.claiming[prefix]++
	s.mu.Unlock()
	err := m.cluster.Claim(ctx, s.subnet, prefix)
	if err != nil {
		err = fmt.Errorf("claiming %s of subnet %s: %w", prefix, s.subnet, err)
	} else {
		err = keep()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claiming[prefix]--; s.claiming[prefix] == 0 {
		delete(s.claiming, prefix)
	}
	m.settle(s)
	return err
}

// settle releases what the cluster has for this host's and nobody here knows of: what was released here, and claims whose
// outcome was not recorded. The share is locked.
func (m *Manager) settle(s *share) {
	for _, own := range m.cluster.Own(s.subnet) {
		if !s.blocks[own] && (!own.IsSingleIP() || s.claimed[own.Addr()] == 0) && s.claiming[own] == 0 {
			m.cluster.Release(s.subnet, own)
		}
	}
}

// keepBlock puts a block that was claimed on record.
func (m *Manager) keepBlock(s *share, block netip.Prefix) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pools == 0 {
		return fmt.Errorf("claiming block %s of subnet %s: %w: it was released meanwhile", block, s.subnet, unknownPool)
	}
	if err := m.store.Apply(s.change(block, s.ceded)); err != nil {
		return fmt.Errorf("claiming block %s of subnet %s: %w", block, s.subnet, err)
	}
	s.blocks[block] = true
	return nil
}

// loseBlock gives a block up that turned out to be another host's. Addresses of it that containers have are claimed by
// themselves before the block is released, so that the other host does not give them too.
func (m *Manager) loseBlock(ctx context.Context, s *share, block netip.Prefix, why error) error {
	s.mu.Lock()
	s.claiming[block]++ // not to be released yet
	s.mu.Unlock()
	held, err := m.forsake(s, block)
	if err == nil {
		err = fmt.Errorf("block %s of subnet %s is no longer this host's: containers of both hosts may have one address: %w", block, s.subnet, why)
	}
	errs := []error{err}
	for _, a := range held {
		errs = append(errs, m.claim(ctx, s, single(a), func() error { return nil }))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claiming[block]--; s.claiming[block] == 0 {
		delete(s.claiming, block)
	}
	m.settle(s)
	return errors.Join(errs...)
}

// forsake takes a block off the record, where the addresses of it that containers have are claimed by themselves from now on.
// It returns these.
func (m *Manager) forsake(s *share, block netip.Prefix) (held []netip.Addr, err error) {
	changes := []Change{{Bucket: blockBucket, Key: s.blockKey(block)}}
	var grants []*grant
	m.mu.Lock() // several pools are locked
	defer m.mu.Unlock()
	for _, p := range m.pools {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.share != s || p.gone {
			continue
		}
		for a, g := range p.grants {
			if g.freed != nil || g.Kind != Endpoint || g.Claimed || !block.Contains(a) {
				continue
			}
			record := g.addressRecord
			record.Claimed = true
			changes, grants, held = append(changes, p.addressChange(a, record)), append(grants, g), append(held, a)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := m.store.Apply(changes...); err != nil {
		return nil, fmt.Errorf("giving up block %s of subnet %s: %w", block, s.subnet, err)
	}
	delete(s.blocks, block)
	for i, g := range grants {
		g.Claimed = true
		s.claimed[held[i]]++
	}
	slices.SortFunc(held, netip.Addr.Compare)
	return slices.Compact(held), nil
}

// unclaim gives up an address that was claimed by itself, when no pool holds it any more.
func (m *Manager) unclaim(s *share, a netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unhold(a)
	m.settle(s)
}

// tend makes a share, the record and the cluster agree.
func (m *Manager) tend(ctx context.Context, s *share) error {
	s.mu.Lock()
	m.settle(s)
	errs := []error{m.cede(s)}
	own, others := m.cluster.Own(s.subnet), m.cluster.Taken(s.subnet)
	doubtful := slices.DeleteFunc(s.prefixes(), func(p netip.Prefix) bool {
		return slices.Contains(own, p) && !(s.blocks[p] && contested(p, others))
	})
	s.mu.Unlock()
	for _, p := range doubtful {
		err := m.claim(ctx, s, p, func() error { return nil })
		s.mu.Lock()
		block := s.blocks[p]
		s.mu.Unlock()
		if errors.As(err, new(TakenError)) && block {
			err = m.loseBlock(ctx, s, p, err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// contested reports whether another host has part of a block, and not only addresses that it was let have.
func contested(block netip.Prefix, others []netip.Prefix) bool {
	return slices.ContainsFunc(others, func(o netip.Prefix) bool { return o.Overlaps(block) && (!o.IsSingleIP() || block.IsSingleIP()) })
}

// cede records what other hosts have within this host's blocks, so that it is not given either after a restart, before the
// cluster has told. What was ceded before New and is no longer, unknown to this manager, stays so until the block is
// released: it cannot be told from what the cluster has not told yet. The share is locked.
func (m *Manager) cede(s *share) error {
	own := union(slices.Collect(maps.Keys(s.blocks)))
	next := make(map[netip.Prefix]bool)
	for c, told := range s.ceded {
		if _, ok := own.overlap(c); ok && !told {
			next[c] = false
		}
	}
	for _, c := range own.meeting(m.cluster.Taken(s.subnet)) {
		next[c] = true
	}
	changed := make(map[netip.Prefix]bool)
	for b := range s.blocks {
		for _, of := range []struct{ these, those map[netip.Prefix]bool }{{next, s.ceded}, {s.ceded, next}} {
			for c := range of.these {
				if _, same := of.those[c]; !same && b.Overlaps(c) {
					changed[b] = true
				}
			}
		}
	}
	var changes []Change
	for b := range changed {
		changes = append(changes, s.change(b, next))
	}
	if len(changes) > 0 {
		if err := m.store.Apply(changes...); err != nil {
			return fmt.Errorf("recording what other hosts have of subnet %s: %w", s.subnet, err)
		}
	}
	s.ceded = next
	return nil
}

// view returns this host's blocks, and what other hosts have within them.
func (m *Manager) view(s *share) (own, others prefixes) {
	s.mu.Lock()
	defer s.mu.Unlock()
	own = union(slices.Collect(maps.Keys(s.blocks)))
	var ceded []netip.Prefix
	for c, told := range s.ceded {
		if !told {
			ceded = append(ceded, c)
		}
	}
	return own, union(own.meeting(m.cluster.Taken(s.subnet)), ceded)
}

// sharing lists the shares, in the order of their subnets.
func (m *Manager) sharing() []*share {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.SortedFunc(maps.Values(m.shares), func(a, b *share) int { return a.subnet.Compare(b.subnet) })
}
