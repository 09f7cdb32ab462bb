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
// the address; and how far the choosing of pools has come.
const (
	poolBucket    = "pools"
	addressBucket = "addresses"
	choiceBucket  = "pool-choice"
	choiceKey     = "choice"
)

type poolRecord struct {
	Space  Space        `json:"space"`
	Subnet netip.Prefix `json:"subnet"`
	Range  netip.Prefix `json:"range"`
	Next   netip.Addr   `json:"next"`
	Open   bool         `json:"open,omitempty"`
	LAN    string       `json:"lan,omitempty"`
}

type addressRecord struct {
	Kind  Kind        `json:"kind,omitempty"` // empty: freed
	Name  string      `json:"name,omitempty"`
	MAC   string      `json:"mac,omitempty"`
	Freed uint64      `json:"freed,omitempty"` // the pool's turn when it was
	Lease *dhcp.Lease `json:"lease,omitempty"`
}

func (p *pool) key() string { return strconv.FormatUint(p.serial, 10) }

func (p *pool) addressKey(a netip.Addr) string { return p.key() + "/" + a.String() }

// change records the pool with a place to look for unused addresses next.
func (p *pool) change(next netip.Addr) Change {
	return Change{poolBucket, p.key(), encode(poolRecord{p.space, p.subnet, p.inner, next, p.open, p.lan})}
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
		p, err := decodePool(key, value)
		if err != nil {
			return fmt.Errorf("record %s/%s: %w", poolBucket, key, err)
		}
		if p.serial > m.choice.Serial {
			return fmt.Errorf("record %s/%s: only %d pools were ever granted", poolBucket, key, m.choice.Serial)
		}
		pools[key], m.pools[p.id()] = p, p
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
	}
	return nil
}

func decodePool(key string, value []byte) (*pool, error) {
	serial, err := strconv.ParseUint(key, 10, 64)
	if err != nil {
		return nil, err
	}
	var r poolRecord
	if err := json.Unmarshal(value, &r); err != nil {
		return nil, err
	}
	w, err := parsePoolRequest(PoolRequest{Space: string(r.Space), Pool: r.Subnet.String(), SubPool: r.Range.String()})
	if err != nil {
		return nil, err
	}
	p := newPool(serial, w.space, w.subnet, w.inner)
	p.next, p.open, p.lan = r.Next, r.Open, r.LAN
	if w.subnet != r.Subnet || w.inner != r.Range || r.Next.IsValid() && !p.contains(r.Next) || p.key() != key {
		return nil, fmt.Errorf("range %s of %s from %s is %w", r.Range, r.Subnet, r.Next, invalid)
	}
	return p, nil
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
