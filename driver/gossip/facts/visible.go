package facts

// Hide keeps a host from winning, as one that is dead: its facts are kept and passed on. It works on
// a host that nothing is known of yet, and not on the state's own.
func (s *State) Hide(h Host) []Change {
	if o := s.owner(h); o != s.self && !o.hidden {
		o.hidden = true
		s.look(o)
	}
	return s.flush()
}

// Show undoes Hide, and Forget: what others know of the host is taken in again.
func (s *State) Show(h Host) []Change {
	o := s.owners[h]
	if o == nil {
		return nil
	}
	o.forgotten = false
	if o.hidden {
		o.hidden = false
		s.look(o)
	}
	return s.flush()
}

// look notes what changes by an owner's being hidden now, or no longer being so.
func (s *State) look(o *owner) {
	for _, l := range o.logs {
		for _, e := range l.entries {
			if !e.standing() {
				continue
			}
			var others *entry
			for other := e.scope.places[e.place()]; other != nil; other = other.next {
				if other != e && other.visible() && other.beats(others) {
					others = other
				}
			}
			with := others
			if e.beats(others) {
				with = e
			}
			if o.hidden {
				s.note(e, with, others)
			} else {
				s.note(e, others, with)
			}
		}
	}
}

// Forget drops what is known of a host, and that it is hidden. Others may not have forgotten it yet,
// so what they tell of its epochs up to now is ignored until Show; a later epoch is not.
// It does not work on the state's own host.
func (s *State) Forget(h Host) []Change {
	o := s.owners[h]
	if o == nil || o == s.self {
		return nil
	}
	for _, l := range o.logs {
		s.drop(l)
	}
	if len(o.logs) > 0 {
		o.forgotten, o.gone = true, o.epoch()
	}
	o.hidden, o.logs = false, nil
	return s.flush()
}

// Prune drops the tombstones, of all owners, that keep returns false for, and returns how many. A
// state that has not heard of them then gets all that stands in place of what it lacks. Kept in any
// case is what is needed until more is known: tombstones above an owner's watermark, or of an epoch
// that is not complete.
func (s *State) Prune(keep func(f Fact) bool) int {
	n := 0
	for _, o := range s.order {
		if o.tombstones == 0 || !o.logs[0].complete() {
			continue
		}
		l := o.logs[0]
		for _, e := range l.entries[:l.upTo(l.known.watermark())] {
			if e.dropped() || e.standing() || keep(e.fact()) {
				continue
			}
			s.swap(e, nil)
			l.floor = max(l.floor, e.counter)
			n++
		}
	}
	s.flush()
	return n
}
