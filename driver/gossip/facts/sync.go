package facts

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
)

// Mark is what a state knows of one owner in one epoch.
type Mark struct {
	Owner     Host
	Epoch     uint64
	Seal      uint64 // one more than the counter at which the owner sealed the epoch; 0: not known to be sealed
	Known     []Span // the counters known, in ascending order; superseded statements count as known
	Own       bool   // the owner is the state's own host
	Forgotten bool   // the owner was forgotten: its epochs up to this one are not wanted
}

// Watermark returns the counter up to which every statement is known.
func (m Mark) Watermark() uint64 { return spans(m.Known).watermark() }

// complete reports whether the epoch voids the owner's older ones.
func (m Mark) complete() bool { return m.Seal != 0 && m.Watermark()+1 >= m.Seal }

// Digest is what a state knows, without the facts: 20 to 40 bytes a host when encoded, however many
// facts there are. It is ordered by owner and epoch. The floor of a log is not in it: each state
// prunes by itself, and so has floors of its own, which matter only to what it sends.
type Digest []Mark

// Sum returns a hash that two digests share if neither state lacks anything that the other has. It
// does for a digest while nothing changes.
func (d Digest) Sum() [16]byte {
	plain := make(Digest, 0, len(d))
	for _, m := range d {
		if !m.Forgotten {
			m.Own = false
			plain = append(plain, m)
		}
	}
	const markSize = 48 // about
	sum := sha256.Sum256(plain.Append(make([]byte, 0, markSize*len(plain))))
	return [16]byte(sum[:16])
}

// of returns the marks of an owner.
func (d Digest) of(h Host) []Mark {
	first := sort.Search(len(d), func(i int) bool { return d[i].Owner >= h })
	last := first
	for last < len(d) && d[last].Owner == h {
		last++
	}
	return d[first:last]
}

// Delta is a part of what one state knows of one log and another state lacks. Of the counters in
// Known, every statement that is not superseded is in Facts. Where Floor is not 0, tombstones up to
// it are gone: then Known and Facts are a part of a snapshot of everything up to the floor, and what
// is in no part of it does not stand.
type Delta struct {
	Owner Host
	Epoch uint64
	Seal  uint64 // as of Mark
	Floor uint64
	Known []Span
	Facts []Fact // in the order of their counters
}

// check returns an error unless the delta holds together.
func (d Delta) check() error {
	if err := d.Owner.Valid(); err != nil {
		return err
	}
	last := uint64(0)
	for i, span := range d.Known {
		if i > 0 && span.First <= last+1 || span.First == 0 || span.Last < span.First || span.Last > maxNumber {
			return fmt.Errorf("counters %d to %d are out of order", span.First, span.Last)
		}
		last = span.Last
	}
	if d.Floor > 0 && last > d.Floor {
		return fmt.Errorf("snapshot up to %d goes to %d", d.Floor, last)
	}
	last = 0
	known := spans(d.Known)
	for _, f := range d.Facts {
		switch {
		case f.Owner != d.Owner || f.Epoch != d.Epoch:
			return fmt.Errorf("fact of %q in epoch %d among those of %q in epoch %d", string(f.Owner), f.Epoch, string(d.Owner), d.Epoch)
		case f.Counter <= last:
			return errors.New("facts are out of order")
		case !known.has(f.Counter):
			return fmt.Errorf("fact %d is not among the counters known", f.Counter)
		}
		last = f.Counter
	}
	return nil
}

// Digest returns what the state knows. It shares nothing with the state.
func (s *State) Digest() Digest {
	marks, n := 0, 0
	for _, o := range s.order {
		marks += max(1, len(o.logs))
		for _, l := range o.logs {
			n += len(l.known)
		}
	}
	d := make(Digest, 0, marks)
	all := make([]Span, 0, n)
	for _, o := range s.order {
		if o.forgotten {
			d = append(d, Mark{Owner: o.name, Epoch: o.gone, Forgotten: true})
		}
		for _, l := range o.logs {
			first := len(all)
			all = append(all, l.known...)
			d = append(d, Mark{Owner: o.name, Epoch: l.epoch, Seal: l.seal, Known: all[first:len(all):len(all)], Own: o == s.self})
		}
	}
	return d
}

// Difference yields what the state that a digest is of lacks, in parts whose encoding has at most
// about limit bytes, or one fact. They are to be applied in this order, and none after one that is
// lost: newer epochs come before older ones, and later statements before earlier ones, so that no
// part brings a change that a later one takes back, and a statement is not taken for superseded
// before the one that supersedes it is known. Another order costs exchanges, until the owner is met.
func (s *State) Difference(remote Digest, limit int) iter.Seq[Delta] {
	return func(yield func(Delta) bool) {
		for _, o := range s.order {
			marks := remote.of(o.name)
			for _, l := range slices.Backward(o.logs) {
				if !l.difference(marks, limit, yield) {
					return
				}
			}
		}
	}
}

// difference yields what of a log is missing where its owner is known by the marks.
func (l *log) difference(marks []Mark, limit int, yield func(Delta) bool) bool {
	var there *Mark
	for i, m := range marks {
		switch {
		case m.Forgotten && l.epoch <= m.Epoch, (m.Own || m.complete()) && l.epoch < m.Epoch:
			return true
		case m.Epoch == l.epoch && !m.Forgotten:
			there = &marks[i]
		}
	}
	if there == nil {
		there = &Mark{}
	} else if spans(there.Known).covers(l.known) && (l.seal == 0 || there.Seal != 0) {
		return true
	}
	missing := l.known.minus(there.Known)
	p := part{log: l, limit: limit, yield: yield}
	p.start(0)
	if there.Watermark() >= l.floor {
		return p.add(missing) && p.end()
	}
	all := spans{{1, l.floor}}
	if above := missing.minus(all); len(above) > 0 && !(p.add(above) && p.end()) {
		return false
	}
	p.start(l.floor)
	return p.add(all) && p.end()
}

// A part is a delta that is being filled.
type part struct {
	log   *log
	limit int
	yield func(Delta) bool
	delta Delta
	size  int
	row   row
	room  []byte
}

// start begins a delta.
func (p *part) start(floor uint64) {
	p.delta = Delta{Owner: p.log.owner.name, Epoch: p.log.epoch, Seal: p.log.seal, Floor: floor}
	p.size = len(p.delta.Owner) + 24
	p.row = rowOf(p.delta.Owner, p.delta.Epoch)
}

// end yields the delta.
func (p *part) end() bool {
	slices.Reverse(p.delta.Known)
	slices.Reverse(p.delta.Facts)
	return p.yield(p.delta)
}

// add fills in spans from the last to the first, in as many deltas as it takes; the last one is left
// to end.
func (p *part) add(missing spans) bool {
	const spanSize = 4 // about: two differences
	entries := p.log.entries
	for _, span := range slices.Backward(missing) {
		last := span.Last
		for i := p.log.upTo(last) - 1; i >= 0 && entries[i].counter >= span.First; i-- {
			e := entries[i]
			if e.dropped() {
				continue
			}
			f := e.fact()
			p.room = p.row.append(p.room[:0], f)
			if p.size+len(p.room) > p.limit && len(p.delta.Facts) > 0 {
				if e.counter < last {
					p.delta.Known = append(p.delta.Known, Span{e.counter + 1, last})
				}
				floor := p.delta.Floor
				if !p.end() {
					return false
				}
				p.start(floor)
				p.room = p.row.append(p.room[:0], f)
				last = e.counter
			}
			p.size += len(p.room)
			p.delta.Facts = append(p.delta.Facts, f)
		}
		p.delta.Known = append(p.delta.Known, Span{span.First, last})
		if p.size += spanSize; p.size > p.limit && span != missing[0] {
			floor := p.delta.Floor
			if !p.end() {
				return false
			}
			p.start(floor)
		}
	}
	return true
}

// Apply adds a part of what another state knows. A part that comes twice or late does no harm; one
// that does not hold together is refused, and changes nothing.
func (s *State) Apply(d Delta) ([]Change, error) {
	if err := d.check(); err != nil {
		return nil, fmt.Errorf("delta of %q: %w", string(d.Owner), err)
	}
	o := s.owner(d.Owner)
	if o == s.self {
		s.meet(d)
		return nil, nil
	}
	if o.void(d.Epoch) {
		return nil, nil
	}
	l := s.log(o, d.Epoch)
	for _, f := range d.Facts {
		if !l.known.has(f.Counter) {
			s.put(l, f)
		}
	}
	l.seal = max(l.seal, d.Seal)
	if d.Floor == 0 {
		l.known = l.known.union(d.Known)
	} else {
		s.assemble(l, d)
	}
	s.void(l)
	return s.flush(), nil
}

// meet notes whether another state knows anything of this host that this host has not stated.
func (s *State) meet(d Delta) {
	if d.Epoch > s.own.epoch || d.Epoch == s.own.epoch && !s.own.known.covers(d.Known) {
		s.usurped = max(s.usurped, d.Epoch)
	}
	for _, f := range d.Facts {
		s.clock = max(s.clock, f.Clock)
		s.recognise(f)
	}
}

// A snapshot is what has come so far of everything that stands of a log up to a floor. Until it is
// whole its facts count as single ones: to know of a counter whose tombstone is pruned, and not
// yet of all before it, would let a fact stand that the tombstone has taken back.
type snapshot struct {
	floor   uint64
	covered spans
	listed  []uint64 // counters of its facts
}

// assemble adds a part of a snapshot, and drops what does not stand once there are all.
func (s *State) assemble(l *log, d Delta) {
	if l.known.watermark() >= d.Floor {
		l.snapshot = nil
		return
	}
	sn := l.snapshot
	if sn == nil || sn.floor != d.Floor {
		sn = &snapshot{floor: d.Floor}
		l.snapshot = sn
	}
	var single spans
	for _, f := range d.Facts {
		single = single.with(Span{f.Counter, f.Counter})
		sn.listed = append(sn.listed, f.Counter)
	}
	l.known = l.known.union(single)
	sn.covered = sn.covered.union(d.Known)
	if sn.covered.watermark() < sn.floor {
		return
	}
	slices.Sort(sn.listed)
	for _, e := range l.entries {
		if _, listed := slices.BinarySearch(sn.listed, e.counter); !listed && !e.dropped() && e.counter <= sn.floor {
			s.swap(e, nil)
		}
	}
	l.known = l.known.with(Span{1, sn.floor})
	l.floor = max(l.floor, sn.floor)
	l.snapshot = nil
}

// compare orders marks.
func (m Mark) compare(other Mark) int {
	return cmp.Or(cmp.Compare(m.Owner, other.Owner), cmp.Compare(m.Epoch, other.Epoch))
}
