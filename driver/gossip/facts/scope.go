package facts

import "net/netip"

// An entry is a fact as a state holds it: 80 bytes. It belongs to the log that states it and to the
// scope that it is about.
type entry struct {
	scope   *scope
	log     *log
	next    *entry // the same key's of another owner
	mac     [6]byte
	flags   uint8
	bits    uint8 // of the prefix, as if of IPv6
	addr    [16]byte
	counter uint64
	clock   uint64
	sameMAC struct{ prev, next *entry } // in the scope
}

const (
	tombstone uint8 = 1 << iota
	dropped         // superseded or void: the log has yet to lose it
	moved           // became the winner in the call under way
)

// A place is where in its scope a fact is.
type place struct {
	addr [16]byte
	bits uint8
}

func placeOf(p netip.Prefix) place {
	at := place{p.Addr().As16(), uint8(p.Bits())}
	if p.Addr().Is4() {
		at.bits += 96
	}
	return at
}

func (e *entry) place() place   { return place{e.addr, e.bits} }
func (e *entry) standing() bool { return e.flags&(tombstone|dropped) == 0 }
func (e *entry) dropped() bool  { return e.flags&dropped != 0 }

// visible reports whether the entry takes part in who wins.
func (e *entry) visible() bool { return e.standing() && !e.log.owner.hidden }

func (e *entry) prefix() netip.Prefix {
	addr := netip.AddrFrom16(e.addr).Unmap()
	bits := int(e.bits)
	if addr.Is4() {
		bits -= 96
	}
	return netip.PrefixFrom(addr, bits)
}

func (e *entry) key() Key {
	return Key{Kind: e.scope.kind, VSID: e.scope.vsid, Subnet: e.scope.subnet, Prefix: e.prefix()}
}

// fact returns the entry as a fact: the zero Fact for none.
func (e *entry) fact() Fact {
	if e == nil {
		return Fact{}
	}
	return Fact{
		Key: e.key(), MAC: e.mac, Owner: e.log.owner.name, Epoch: e.log.epoch,
		Counter: e.counter, Clock: e.clock, Deleted: e.flags&tombstone != 0,
	}
}

// before reports whether the entry's statement is older than another one of its owner.
func (e *entry) before(epoch, counter uint64) bool {
	return e.log.epoch < epoch || e.log.epoch == epoch && e.counter < counter
}

// beats says which of two visible facts of one key wins: that with the higher clock, and of two
// concurrent ones that of the lower name. So all hosts agree that know both.
func (e *entry) beats(other *entry) bool {
	if other == nil || e.clock != other.clock {
		return other == nil || e.clock > other.clock
	}
	return e.log.owner.name < other.log.owner.name
}

// A scope is what holds keys: the endpoints of a VSID, or the blocks of a subnet.
type scope struct {
	kind   Kind
	vsid   uint32
	subnet netip.Prefix
	places map[place]*entry   // the first of a list: one entry of each owner that states the key
	macs   map[[6]byte]*entry // the first of a list: all standing endpoints with this MAC
	size   int                // entries
}

// best returns the winner of a list of one key's entries: nil if none is visible.
func best(list *entry) *entry {
	var winner *entry
	for e := list; e != nil; e = e.next {
		if e.visible() && e.beats(winner) {
			winner = e
		}
	}
	return winner
}

// of returns the entry of an owner.
func (s *scope) of(at place, o *owner) *entry {
	e := s.places[at]
	for e != nil && e.log.owner != o {
		e = e.next
	}
	return e
}

// swap removes an entry and adds another one of the same key and owner, either of which may be nil,
// and returns the key's winners before and after.
func (s *scope) swap(remove, add *entry) (before, after *entry) {
	var at place
	if add != nil {
		at = add.place()
	} else {
		at = remove.place()
	}
	list := s.places[at]
	before = best(list)
	if remove != nil {
		s.unlink(remove)
		if list == remove {
			list = remove.next
		} else {
			for e := list; e != nil; e = e.next {
				if e.next == remove {
					e.next = remove.next
				}
			}
		}
	}
	if add != nil {
		s.link(add)
		add.next = list
		list = add
	}
	if list == nil {
		delete(s.places, at)
	} else {
		s.places[at] = list
	}
	return before, best(list)
}

// link counts an entry and adds it to its MAC's list.
func (s *scope) link(e *entry) {
	s.size++
	e.log.owner.count(e, 1)
	e.log.live++
	if !e.indexed() {
		return
	}
	if s.macs == nil {
		s.macs = map[[6]byte]*entry{}
	}
	first := s.macs[e.mac]
	e.sameMAC.next = first
	if first != nil {
		first.sameMAC.prev = e
	}
	s.macs[e.mac] = e
}

// unlink takes an entry out of its MAC's list and marks it as dropped.
func (s *scope) unlink(e *entry) {
	s.size--
	e.log.owner.count(e, -1)
	e.log.live--
	if e.indexed() {
		prev, next := e.sameMAC.prev, e.sameMAC.next
		if next != nil {
			next.sameMAC.prev = prev
		}
		switch {
		case prev != nil:
			prev.sameMAC.next = next
		case next != nil:
			s.macs[e.mac] = next
		default:
			delete(s.macs, e.mac)
		}
		e.sameMAC.prev, e.sameMAC.next = nil, nil
	}
	e.flags |= dropped
}

// indexed reports whether the entry is to be found by its MAC.
func (e *entry) indexed() bool { return e.standing() && e.mac != [6]byte{} }
