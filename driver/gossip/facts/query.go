package facts

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
)

// Lookup returns the fact that holds for a key: that of the highest clock among hosts that are not
// hidden, and of the lower name where clocks are equal.
func (s *State) Lookup(k Key) (Fact, bool) {
	sc := s.scopeOf(k)
	if sc == nil || !k.Prefix.IsValid() {
		return Fact{}, false
	}
	e := best(sc.places[placeOf(k.Prefix)])
	return e.fact(), e != nil
}

// Each yields the facts that hold, of a kind and a VSID, or of all VSIDs for 0, in no order.
func (s *State) Each(kind Kind, vsid uint32) iter.Seq[Fact] {
	return func(yield func(Fact) bool) {
		for sc := range s.scopes(kind, vsid) {
			for _, list := range sc.places {
				if e := best(list); e != nil && !yield(e.fact()) {
					return
				}
			}
		}
	}
}

// scopes yields the scopes of a kind and a VSID, or of all VSIDs for 0.
func (s *State) scopes(kind Kind, vsid uint32) iter.Seq[*scope] {
	return func(yield func(*scope) bool) {
		switch {
		case kind == Block && vsid == 0:
			for _, sc := range s.subnets {
				if !yield(sc) {
					return
				}
			}
		case kind == Endpoint && vsid == 0:
			for _, sc := range s.nets {
				if !yield(sc) {
					return
				}
			}
		case kind == Endpoint:
			if sc := s.nets[vsid]; sc != nil {
				yield(sc)
			}
		}
	}
}

// Of yields the facts of a host that it has not taken back, hidden or not, in the order in which it
// stated them.
func (s *State) Of(h Host) iter.Seq[Fact] {
	return func(yield func(Fact) bool) {
		o := s.owners[h]
		if o == nil {
			return
		}
		for _, l := range o.logs {
			for _, e := range l.entries {
				if e.standing() && !yield(e.fact()) {
					return
				}
			}
		}
	}
}

// Owner is a host that states facts.
type Owner struct {
	Host       Host
	Epoch      uint64 // the highest known
	Facts      int    // that stand
	Tombstones int
	Hidden     bool
}

// Owners yields the hosts that anything is known of, by name.
func (s *State) Owners() iter.Seq[Owner] {
	return func(yield func(Owner) bool) {
		for _, o := range s.order {
			if len(o.logs) > 0 && !yield(Owner{o.name, o.epoch(), o.standing, o.tombstones, o.hidden}) {
				return
			}
		}
	}
}

// ByMAC returns the facts that hold and have a MAC, in a VSID.
func (s *State) ByMAC(vsid uint32, mac [6]byte) []Fact {
	sc := s.nets[vsid]
	if sc == nil {
		return nil
	}
	var fs []Fact
	for e := sc.macs[mac]; e != nil; e = e.sameMAC.next {
		if best(sc.places[e.place()]) == e {
			fs = append(fs, e.fact())
		}
	}
	slices.SortFunc(fs, func(a, b Fact) int { return a.Prefix.Compare(b.Prefix) })
	return fs
}

// Holder returns the blocks of a subnet that overlap a prefix, the winner first; also those of hosts that
// are hidden, whose containers come back with addresses out of them. It looks at all blocks of the
// subnet.
func (s *State) Holder(subnet, prefix netip.Prefix) []Fact {
	sc := s.subnets[subnet]
	if sc == nil {
		return nil
	}
	var fs []Fact
	for _, e := range sc.all((*entry).standing) {
		if e.prefix().Overlaps(prefix) {
			fs = append(fs, e.fact())
		}
	}
	slices.SortFunc(fs, winnerFirst)
	return fs
}

// Conflict is a key that two or more hosts state. A block also conflicts with those of other hosts
// that it overlaps: then the key is that of the block that contains all the others.
type Conflict struct {
	Key
	Facts []Fact // the winner first
}

// Conflicts returns the conflicts of hosts that are not hidden, in the order of their keys. It looks
// at the networks in which two hosts state one key, and at all blocks.
func (s *State) Conflicts() []Conflict {
	var all []Conflict
	for _, sc := range s.nets {
		if sc.size > len(sc.places) {
			all = sc.contested(all)
		}
	}
	for _, sc := range s.subnets {
		all = sc.overlaps(all)
	}
	slices.SortFunc(all, func(a, b Conflict) int { return a.Key.compare(b.Key) })
	return all
}

// contested adds the keys that several hosts state.
func (sc *scope) contested(to []Conflict) []Conflict {
	for _, list := range sc.places {
		if list.next == nil {
			continue
		}
		var fs []Fact
		for e := list; e != nil; e = e.next {
			if e.visible() {
				fs = append(fs, e.fact())
			}
		}
		if len(fs) > 1 {
			slices.SortFunc(fs, winnerFirst)
			to = append(to, Conflict{fs[0].Key, fs})
		}
	}
	return to
}

// overlaps adds the blocks that overlap others of other hosts.
func (sc *scope) overlaps(to []Conflict) []Conflict {
	var blocks []Fact
	for _, e := range sc.all((*entry).visible) {
		blocks = append(blocks, e.fact())
	}
	slices.SortFunc(blocks, func(a, b Fact) int { return cmp.Or(a.Prefix.Compare(b.Prefix), winnerFirst(a, b)) })
	for len(blocks) > 0 {
		// Of two prefixes one contains the other or they are disjoint, and the greater one comes first.
		outer, n := blocks[0], 1
		for n < len(blocks) && outer.Prefix.Overlaps(blocks[n].Prefix) {
			n++
		}
		if fs := disputed(blocks[:n]); len(fs) > 0 {
			slices.SortFunc(fs, winnerFirst)
			to = append(to, Conflict{outer.Key, fs})
		}
		blocks = blocks[n:]
	}
	return to
}

// disputed returns the blocks that overlap one of another owner, of blocks in the order of their
// prefixes.
func disputed(blocks []Fact) []Fact {
	in := make([]bool, len(blocks))
	var around []int // the blocks that contain the one at hand
	for i, b := range blocks {
		for n := len(around); n > 0 && !blocks[around[n-1]].Prefix.Overlaps(b.Prefix); n-- {
			around = around[:n-1]
		}
		for _, j := range around {
			if blocks[j].Owner != b.Owner {
				in[i], in[j] = true, true
			}
		}
		around = append(around, i)
	}
	var fs []Fact
	for i, b := range blocks {
		if in[i] {
			fs = append(fs, b)
		}
	}
	return fs
}

// all returns the facts of the scope that are as asked, in no order.
func (sc *scope) all(is func(*entry) bool) []*entry {
	var all []*entry
	for _, list := range sc.places {
		for e := list; e != nil; e = e.next {
			if is(e) {
				all = append(all, e)
			}
		}
	}
	return all
}

// winnerFirst orders facts that are in each other's way, the same at every host.
func winnerFirst(a, b Fact) int {
	return cmp.Or(cmp.Compare(b.Clock, a.Clock), cmp.Compare(a.Owner, b.Owner), a.Prefix.Compare(b.Prefix))
}
