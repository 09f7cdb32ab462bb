package facts

import (
	"cmp"
	"net/netip"
	"slices"
)

// State is what one host knows: its own facts and those of others. It is not safe for concurrent
// use. Methods that change nothing may run side by side (all that return no changes and are not
// named below are such: Digest, Difference, Behind, Lookup, Each, Of, Owners, Conflicts, ByMAC,
// Holder, Usurped); iterators need the state unchanged for as long as they run.
//
// Changes are what the call did to the winners, at most one of each key.
type State struct {
	self    *owner
	own     *log
	owners  map[Host]*owner
	order   []*owner // by name
	nets    map[uint32]*scope
	subnets map[netip.Prefix]*scope
	clock   uint64 // the highest known
	usurped uint64

	// Of the call under way:
	moves     []move
	mixed     bool // a key may have changed twice
	unsettled []*log
}

// A move is a change that is yet to be written out: of the key of one, from before to after.
type move struct{ one, before, after *entry }

// New returns the state of a host that has stated nothing yet in an epoch that must be higher than
// its epochs before, and that must not exceed 2^63-1. The host then states with [State.Set] what is
// on its record, and says with [State.Seal] that this is all of it.
func New(self Host, epoch uint64) *State {
	s := &State{owners: map[Host]*owner{}, nets: map[uint32]*scope{}, subnets: map[netip.Prefix]*scope{}}
	s.self = s.owner(self)
	s.own = s.log(s.self, epoch)
	return s
}

// Witness has what this host states from now on be later than a clock: one that it knew of before it
// was restarted.
func (s *State) Witness(clock uint64) { s.clock = max(s.clock, clock) }

// later is a clock that is later than all that are known. Of the highest that others read there is no later one: a host that
// states it makes the clocks of all others equal to it, and must not make them useless, and their records too.
func (s *State) later() uint64 { return min(s.clock+1, maxNumber) }

// Set states a fact of this host's own. One that stands already and is equal is not stated again:
// that one is returned, and changes nothing. The MAC of a block is ignored. A key that is not
// [Key.Valid] is not stated: the zero Fact is returned.
func (s *State) Set(k Key, mac [6]byte) (Fact, []Change) { return s.Restate(k, mac, s.later()) }

// Restate is Set for a fact that this host stated in an epoch before, with the clock that it had
// then. With Set a restarted host, which knows of nobody yet, would state it with a low clock, and
// would lose a conflict that it had won.
func (s *State) Restate(k Key, mac [6]byte, clock uint64) (Fact, []Change) {
	if k.Valid() != nil {
		return Fact{}, nil
	}
	if k.Kind == Block {
		mac = [6]byte{}
	}
	if e := s.find(k, s.self); e != nil && e.standing() && e.mac == mac {
		return e.fact(), nil
	}
	return s.state(Fact{Key: k, MAC: mac, Clock: clock})
}

// Delete takes a statement of this host back, and returns the tombstone. Where there is none that
// stands, it returns the zero Fact.
func (s *State) Delete(k Key) (Fact, []Change) {
	if e := s.find(k, s.self); e == nil || !e.standing() {
		return Fact{}, nil
	}
	return s.state(Fact{Key: k, Clock: s.later(), Deleted: true})
}

// state adds a statement to the host's own log.
func (s *State) state(f Fact) (Fact, []Change) {
	f.Owner, f.Epoch, f.Counter = s.self.name, s.own.epoch, s.own.known.watermark()+1
	s.own.known = s.own.known.with(Span{f.Counter, f.Counter})
	s.put(s.own, f)
	return f, s.flush()
}

// Seal says that everything on this host's record is stated in this epoch. Once others know that,
// and all that was stated until then, they void what the host stated in epochs before.
func (s *State) Seal() {
	if s.own.seal == 0 {
		s.own.seal = s.own.known.watermark() + 1
	}
}

// Raise states everything that stands of this host's own again, in a higher epoch, and seals it. A
// fact keeps its clock, so no winner changes. It does nothing unless the epoch is higher.
func (s *State) Raise(epoch uint64) {
	old := s.own
	if epoch <= old.epoch {
		return
	}
	s.self.logs = nil
	s.own = s.log(s.self, epoch)
	counter := uint64(0)
	for _, e := range old.entries {
		switch {
		case e.standing():
			counter++
			s.swap(e, s.own.add(e.scope, e.place(), e.mac, counter, e.clock, 0))
		case !e.dropped():
			s.swap(e, nil)
		}
	}
	if counter > 0 {
		s.own.known = spans{{1, counter}}
	}
	s.own.seal = counter + 1
	if epoch > s.usurped {
		s.usurped = 0
	}
	s.flush()
}

// Usurped returns the highest epoch in which somebody else states facts as this host, or 0: then its
// record was lost or copied. The host has to [State.Raise] its epoch above that, or others go by
// what they know of the other one. It is 0 again when the host has.
func (s *State) Usurped() uint64 { return s.usurped }

// recognise notes a fact of this host that it has not stated.
func (s *State) recognise(f Fact) {
	switch {
	case f.Epoch < s.own.epoch:
		return
	case f.Epoch == s.own.epoch && s.stated(f):
		return
	}
	s.usurped = max(s.usurped, f.Epoch)
}

// stated reports whether this host may have stated a fact in this epoch.
func (s *State) stated(f Fact) bool {
	if !s.own.known.has(f.Counter) {
		return false
	}
	switch e := s.find(f.Key, s.self); {
	case e == nil:
		return f.Counter <= s.own.floor
	case e.counter == f.Counter:
		return e.fact() == f
	default:
		return e.counter > f.Counter
	}
}

// Merge adds single facts, as gossip brings them: in any order, several times, from anybody. It
// returns those that were news, which are worth telling others, and ignores facts of this host.
func (s *State) Merge(fs []Fact) (fresh []Fact, changes []Change) {
	for i, f := range fs {
		if s.learn(f) {
			if fresh == nil {
				fresh = make([]Fact, 0, len(fs)-i)
			}
			fresh = append(fresh, f)
		}
	}
	return fresh, s.flush()
}

// learn adds a single fact, and reports whether it was news.
func (s *State) learn(f Fact) bool {
	s.clock = max(s.clock, f.Clock)
	if f.Owner == s.self.name {
		s.recognise(f)
		return false
	}
	o := s.owner(f.Owner)
	if o.void(f.Epoch) {
		return false
	}
	l := s.log(o, f.Epoch)
	if l.known.has(f.Counter) {
		return false
	}
	l.known = l.known.with(Span{f.Counter, f.Counter})
	news := s.put(l, f)
	s.void(l)
	return news
}

// put adds a fact to a log, unless its owner has made a later statement of the key.
func (s *State) put(l *log, f Fact) bool {
	s.clock = max(s.clock, f.Clock)
	sc, at := s.scope(f.Key), placeOf(f.Prefix)
	old := sc.of(at, l.owner)
	if old != nil && !old.before(l.epoch, f.Counter) {
		return false
	}
	var flags uint8
	if f.Deleted {
		flags = tombstone
	}
	s.swap(old, l.add(sc, at, f.MAC, f.Counter, f.Clock, flags))
	return true
}

// void drops what the owner stated in older epochs than that of the log, if the log is complete.
func (s *State) void(l *log) {
	o := l.owner
	if !l.complete() {
		return
	}
	o.forgotten = false // older epochs are void anyway
	for o.logs[0] != l {
		s.drop(o.logs[0])
		o.logs = slices.Delete(o.logs, 0, 1)
	}
}

// drop takes a log's entries out of their scopes.
func (s *State) drop(l *log) {
	for _, e := range l.entries {
		if !e.dropped() {
			s.swap(e, nil)
		}
	}
}

// swap replaces an entry by another one of the same key and owner; either may be nil.
func (s *State) swap(remove, add *entry) {
	one := cmp.Or(add, remove)
	before, after := one.scope.swap(remove, add)
	if one.scope.size == 0 {
		if one.scope.kind == Block {
			delete(s.subnets, one.scope.subnet)
		} else {
			delete(s.nets, one.scope.vsid)
		}
	}
	s.note(one, before, after)
	if remove != nil {
		s.touch(remove.log)
	}
	if add != nil {
		s.touch(add.log)
	}
}

// note records a change, unless the winner's owner and MAC are the same.
func (s *State) note(one, before, after *entry) {
	if before != nil && before != after && before.flags&moved != 0 {
		s.mixed = true
	}
	if before == after || before != nil && after != nil && before.log.owner == after.log.owner && before.mac == after.mac {
		return
	}
	if after != nil {
		after.flags |= moved
	}
	s.moves = append(s.moves, move{one, before, after})
}

// touch has a log settled when the call ends.
func (s *State) touch(l *log) {
	if !l.unsettled {
		l.unsettled = true
		s.unsettled = append(s.unsettled, l)
	}
}

// flush ends a call that changes the state, and returns its changes.
func (s *State) flush() []Change {
	for _, l := range s.unsettled {
		l.settle()
	}
	s.unsettled = s.unsettled[:0]
	if len(s.moves) == 0 {
		return nil
	}
	changes := make([]Change, len(s.moves))
	var lost, won bool
	for i, m := range s.moves {
		changes[i] = Change{Key: m.one.key(), Before: m.before.fact(), After: m.after.fact()}
		lost, won = lost || m.after == nil, won || m.before == nil
		if m.after != nil {
			m.after.flags &^= moved
		}
	}
	if s.mixed || lost && won {
		changes = coalesce(changes)
	}
	s.moves, s.mixed = nil, false
	return changes
}

// coalesce makes the changes of a key into one.
func coalesce(changes []Change) []Change {
	at := make(map[Key]int, len(changes))
	merged := changes[:0]
	for _, c := range changes {
		if i, ok := at[c.Key]; ok {
			merged[i].After = c.After
			continue
		}
		at[c.Key] = len(merged)
		merged = append(merged, c)
	}
	return slices.DeleteFunc(merged, func(c Change) bool {
		return c.Before.Owner == c.After.Owner && c.Before.MAC == c.After.MAC
	})
}

// owner returns what is known of a host.
func (s *State) owner(h Host) *owner {
	o := s.owners[h]
	if o == nil {
		o = &owner{name: h}
		s.owners[h] = o
		i, _ := slices.BinarySearchFunc(s.order, h, func(o *owner, h Host) int { return cmp.Compare(o.name, h) })
		s.order = slices.Insert(s.order, i, o)
	}
	return o
}

// log returns an owner's log of an epoch, which must not be void.
func (s *State) log(o *owner, epoch uint64) *log {
	if l := o.log(epoch); l != nil {
		return l
	}
	l := &log{owner: o, epoch: epoch}
	i, _ := slices.BinarySearchFunc(o.logs, epoch, func(l *log, epoch uint64) int { return cmp.Compare(l.epoch, epoch) })
	o.logs = slices.Insert(o.logs, i, l)
	return l
}

// scope returns where the facts of a key are, and makes it if there are none.
func (s *State) scope(k Key) *scope {
	sc := s.scopeOf(k)
	if sc == nil {
		sc = &scope{kind: k.Kind, vsid: k.VSID, subnet: k.Subnet, places: map[place]*entry{}}
		if k.Kind == Block {
			s.subnets[k.Subnet] = sc
		} else {
			s.nets[k.VSID] = sc
		}
	}
	return sc
}

// scopeOf returns where the facts of a key are, or nil.
func (s *State) scopeOf(k Key) *scope {
	if k.Kind == Block {
		return s.subnets[k.Subnet]
	}
	return s.nets[k.VSID]
}

// find returns an owner's entry of a key, or nil.
func (s *State) find(k Key, o *owner) *entry {
	if sc := s.scopeOf(k); sc != nil {
		return sc.of(placeOf(k.Prefix), o)
	}
	return nil
}
