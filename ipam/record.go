package ipam

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dockway/dockway/ipam/dhcp"
)

// On record are, in JSON: each pool by its serial number; each address held or freed by the pool's serial number, a slash and
// the address; how far the choosing of pools has come; and each block that this host has of a shared subnet by the subnet, a
// space and the block.
const (
	poolBucket    = "pools"
	addressBucket = "addresses"
	choiceBucket  = "pool-choice"
	choiceKey     = "choice"
	blockBucket   = "blocks"
)

type poolRecord struct {
	Space  Space        `json:"space"`
	Subnet netip.Prefix `json:"subnet"`
	Range  netip.Prefix `json:"range"`
	Next   netip.Addr   `json:"next"`
	Open   bool         `json:"open,omitempty"`
	LAN    string       `json:"lan,omitempty"`
	Shared bool         `json:"shared,omitempty"`
}

type blockRecord struct {
	Ceded []netip.Prefix `json:"ceded,omitempty"` // to other hosts
}

type addressRecord struct {
	Kind    Kind        `json:"kind,omitempty"` // empty: freed
	Name    string      `json:"name,omitempty"`
	MAC     string      `json:"mac,omitempty"`
	Freed   uint64      `json:"freed,omitempty"` // the pool's turn when it was
	Lease   *dhcp.Lease `json:"lease,omitempty"`
	Claimed bool        `json:"claimed,omitempty"` // by itself, since it was in none of this host's blocks
}

func (p *pool) key() string { return strconv.FormatUint(p.serial, 10) }

func (p *pool) addressKey(a netip.Addr) string { return p.key() + "/" + a.String() }

// change records the pool with a place to look for unused addresses next.
func (p *pool) change(next netip.Addr) Change {
	return Change{poolBucket, p.key(), encode(poolRecord{p.space, p.subnet, p.inner, next, p.open, p.lan, p.share != nil})}
}

func (p *pool) addressChange(a netip.Addr, r addressRecord) Change {
	return Change{addressBucket, p.addressKey(a), encode(r)}
}

// deletion takes a pool and all its addresses off the record.
func (p *pool) deletion() []Change {
	changes := []Change{{Bucket: poolBucket, Key: p.key()}}
	for a := range p.grants {
		changes = append(changes, Change{Bucket: addressBucket, Key: p.addressKey(a)})
	}
	return changes
}

func (s *share) blockKey(block netip.Prefix) string { return s.subnet.String() + " " + block.String() }

// change records a block, with what is ceded of it.
func (s *share) change(block netip.Prefix, ceded map[netip.Prefix]bool) Change {
	var r blockRecord
	for c := range ceded {
		if block.Overlaps(c) {
			r.Ceded = append(r.Ceded, c)
		}
	}
	slices.SortFunc(r.Ceded, netip.Prefix.Compare)
	return Change{blockBucket, s.blockKey(block), encode(r)}
}

// leaving takes the blocks off the record when the last pool leaves. The share is locked.
func (s *share) leaving() []Change {
	if s.pools > 1 {
		return nil
	}
	var changes []Change
	for b := range s.blocks {
		changes = append(changes, Change{Bucket: blockBucket, Key: s.blockKey(b)})
	}
	return changes
}

func (c choice) change() Change { return Change{choiceBucket, choiceKey, encode(c)} }

// encode returns the JSON of a record, which is never one that has none.
func encode(record any) []byte {
	b, err := json.Marshal(record)
	if err != nil {
		panic(err)
	}
	return b
}

// load reads what is on record.
func (m *Manager) load() error {
	if err := m.store.Load(choiceBucket, func(key string, value []byte) error {
		if err := json.Unmarshal(value, &m.choice); err != nil {
			return fmt.Errorf("record %s/%s: %w", choiceBucket, key, err)
		}
		return nil
	}); err != nil {
		return err
	}
	pools := make(map[string]*pool)
	if err := m.store.Load(poolBucket, func(key string, value []byte) error {
		p, shared, err := decodePool(key, value)
		if err != nil {
			return fmt.Errorf("record %s/%s: %w", poolBucket, key, err)
		}
		if p.serial > m.choice.Serial {
			return fmt.Errorf("record %s/%s: only %d pools were ever granted", poolBucket, key, m.choice.Serial)
		}
		pools[key], m.pools[p.id()] = p, p
		if shared {
			p.share = m.shareOf(p.subnet)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := m.store.Load(addressBucket, func(key string, value []byte) error {
		serial, _, _ := strings.Cut(key, "/")
		p := pools[serial]
		if p == nil {
			return fmt.Errorf("record %s/%s: there is no such pool", addressBucket, key)
		}
		if err := p.load(key, value); err != nil {
			return fmt.Errorf("record %s/%s: %w", addressBucket, key, err)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, p := range pools {
		p.line()
		if p.share != nil {
			p.share.join(p)
		}
	}
	return m.store.Load(blockBucket, func(key string, value []byte) error {
		if err := m.loadBlock(key, value); err != nil {
			return fmt.Errorf("record %s/%s: %w", blockBucket, key, err)
		}
		return nil
	})
}

func (m *Manager) loadBlock(key string, value []byte) error {
	of, which, _ := strings.Cut(key, " ")
	subnet, err := netip.ParsePrefix(of)
	if err != nil {
		return err
	}
	block, err := netip.ParsePrefix(which)
	if err != nil {
		return err
	}
	var r blockRecord
	if err := json.Unmarshal(value, &r); err != nil {
		return err
	}
	s := m.shares[subnet]
	if s == nil {
		return fmt.Errorf("no pool of %s is shared", subnet)
	}
	if block != block.Masked() || block.Bits() < subnet.Bits() || !subnet.Contains(block.Addr()) || s.blockKey(block) != key {
		return fmt.Errorf("block %s of %s is %w", block, subnet, invalid)
	}
	s.blocks[block] = true
	for _, c := range r.Ceded {
		if !c.IsValid() || !block.Overlaps(c) {
			return fmt.Errorf("%s, ceded of block %s, is %w", c, block, invalid)
		}
		s.ceded[c] = false
	}
	return nil
}

// decodePool reads a pool, and whether it is shared.
func decodePool(key string, value []byte) (*pool, bool, error) {
	serial, err := strconv.ParseUint(key, 10, 64)
	if err != nil {
		return nil, false, err
	}
	var r poolRecord
	if err := json.Unmarshal(value, &r); err != nil {
		return nil, false, err
	}
	w, err := parsePoolRequest(PoolRequest{Space: string(r.Space), Pool: r.Subnet.String(), SubPool: r.Range.String()})
	if err != nil {
		return nil, false, err
	}
	p := newPool(serial, w.space, w.subnet, w.inner)
	p.next, p.open, p.lan = r.Next, r.Open, r.LAN
	if w.subnet != r.Subnet || w.inner != r.Range || r.Next.IsValid() && !p.contains(r.Next) || p.key() != key {
		return nil, false, fmt.Errorf("range %s of %s from %s is %w", r.Range, r.Subnet, r.Next, invalid)
	}
	return p, r.Shared, nil
}

// load takes over one address on record; line puts the freed ones in order after the last.
func (p *pool) load(key string, value []byte) error {
	a, err := netip.ParseAddr(strings.TrimPrefix(key, p.key()+"/"))
	if err != nil {
		return err
	}
	var r addressRecord
	if err := json.Unmarshal(value, &r); err != nil {
		return err
	}
	if err := checkAddress(p.subnet, a); err != nil && r.Lease == nil || p.addressKey(a) != key {
		return cmp.Or(err, error(invalid))
	}
	switch {
	case r.Kind == "" && r.Freed == 0, r.Kind != "" && r.Freed != 0, r.Freed != 0 && !p.contains(a):
		return fmt.Errorf("it is %w: neither held nor freed", invalid)
	case r.Claimed && (r.Kind != Endpoint || p.share == nil):
		return fmt.Errorf("it is %w: claimed, but no endpoint's of a shared pool", invalid)
	case r.Kind != "" && r.Kind != Gateway && r.Kind != Auxiliary && r.Kind != Endpoint:
		return fmt.Errorf("kind %q is %w", r.Kind, invalid)
	}
	if p.contains(a) {
		p.inRange++
	}
	if r.Kind == Gateway {
		p.gateway = a
	}
	p.grants[a] = &grant{addressRecord: r, since: time.Now(), turn: r.Freed}
	return nil
}

func (p *pool) line() {
	var freed []netip.Addr
	for a, g := range p.grants {
		if g.Freed != 0 {
			freed = append(freed, a)
			p.turn = max(p.turn, g.Freed)
		}
	}
	slices.SortFunc(freed, func(a, b netip.Addr) int { return cmp.Compare(p.grants[a].Freed, p.grants[b].Freed) })
	for _, a := range freed {
		p.grants[a].freed = p.freed.PushBack(a)
	}
}
