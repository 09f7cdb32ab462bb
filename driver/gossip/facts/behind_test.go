package facts

// Behind reports whether the state that a digest is of knows anything that this one lacks.
func (s *State) Behind(remote Digest) bool {
	for _, m := range remote {
		if m.Forgotten {
			continue
		}
		o := s.owners[m.Owner]
		switch {
		case o == nil:
			return true
		case o.void(m.Epoch), o == s.self && m.Epoch < s.own.epoch:
			continue
		}
		if l := o.log(m.Epoch); l == nil || l.seal == 0 && m.Seal != 0 || !l.known.covers(m.Known) {
			return true
		}
	}
	return false
}
