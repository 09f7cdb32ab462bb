// Package facts is what the hosts of a cluster know of each other, as data: facts that their owners
// state, and how the knowledge of two hosts is compared, sent and merged. It has no clock, does no
// input or output, and starts nothing.
//
// An owner states facts about itself only. Its statements are a log: they are numbered by a counter
// in an epoch that rises with each start of the owner. What a state knows of a log is the set of the
// counters that it has heard of, and of each key the latest statement. A [Digest] holds the sets, so
// two states that compare digests see what each lacks, whatever way and in whatever order the rest
// came. The end is the same in any order, and when a statement comes twice.
package facts

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
)

// Host identifies a host for its life: a name with a random part that the host keeps on record.
type Host string

// Kind says what a fact is about.
type Kind uint8

// The kinds.
const (
	Endpoint Kind = 1 // an address of a container: VSID, Prefix (/32 or /128) and MAC
	Block    Kind = 2 // a part of a subnet whose addresses its owner hands out: Subnet and Prefix
)

// Key is what a fact is about. Two hosts can state facts of one key; one of them wins everywhere.
type Key struct {
	Kind   Kind
	VSID   uint32       // VXLAN network identifier, 24 bits; 0 for a Block
	Subnet netip.Prefix // invalid for an Endpoint
	Prefix netip.Prefix
}

// Fact is one statement of its owner.
type Fact struct {
	Key
	MAC     [6]byte // of an Endpoint
	Owner   Host
	Epoch   uint64 // of the owner: higher after each start of it
	Counter uint64 // of the owner in the epoch: each statement has the next
	Clock   uint64 // Lamport's: higher than that of any fact the owner knew of when it stated this
	Deleted bool   // a tombstone: the owner takes the statement back
}

// Change says that another fact than before holds for a key, of all owners that are not hidden. The
// zero Fact (with no Owner) stands for none.
type Change struct {
	Key
	Before, After Fact
}

const (
	maxHost = 128       // bytes of a host's name
	maxVSID = 1<<24 - 1 // RFC 7348, section 5
)

// Valid returns an error unless the name can be sent: 1 to 128 printable ASCII bytes.
func (h Host) Valid() error {
	if len(h) == 0 || len(h) > maxHost {
		return fmt.Errorf("host name of %d bytes: it must have 1 to %d", len(h), maxHost)
	}
	for i := range len(h) {
		if h[i] < ' ' || h[i] > '~' {
			return fmt.Errorf("host name %q: byte %d is not printable ASCII", string(h), i)
		}
	}
	return nil
}

// Valid returns an error unless a host can state a fact of the key.
func (k Key) Valid() error {
	if err := proper(k.Prefix); err != nil {
		return err
	}
	switch k.Kind {
	case Endpoint:
		switch {
		case !k.Prefix.IsSingleIP():
			return fmt.Errorf("endpoint %v: it must be one address", k.Prefix)
		case k.VSID == 0 || k.VSID > maxVSID:
			return fmt.Errorf("endpoint %v: VSID %d is not from 1 to %d", k.Prefix, k.VSID, maxVSID)
		case k.Subnet != netip.Prefix{}:
			return fmt.Errorf("endpoint %v: it must have no subnet", k.Prefix)
		}
	case Block:
		if err := proper(k.Subnet); err != nil {
			return fmt.Errorf("subnet of block %v: %w", k.Prefix, err)
		}
		switch {
		case k.VSID != 0:
			return fmt.Errorf("block %v: it must have no VSID", k.Prefix)
		case k.Prefix.Bits() < k.Subnet.Bits() || !k.Subnet.Contains(k.Prefix.Addr()):
			return fmt.Errorf("block %v: it is not in its subnet %v", k.Prefix, k.Subnet)
		}
	default:
		return fmt.Errorf("kind %d: there is no such kind", k.Kind)
	}
	return nil
}

// proper returns an error unless one prefix is written in one way.
func proper(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return errors.New("invalid prefix")
	case p != p.Masked():
		return fmt.Errorf("prefix %v has bits beyond its length", p)
	case p.Addr().Is4In6():
		return fmt.Errorf("prefix %v is IPv4 written as IPv6", p)
	}
	return nil
}

// compare orders keys.
func (k Key) compare(other Key) int {
	return cmp.Or(cmp.Compare(k.Kind, other.Kind), cmp.Compare(k.VSID, other.VSID),
		k.Subnet.Compare(other.Subnet), k.Prefix.Compare(other.Prefix))
}
