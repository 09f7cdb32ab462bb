package facts

import (
	"cmp"
	"slices"
)

// An owner is a host that states facts, as a state knows it.
type owner struct {
	name       Host
	logs       []*log // by epoch; more than one only while it is unknown whether the last is complete
	standing   int
	tombstones int
	hidden     bool
	forgotten  bool // up to the epoch gone
	gone       uint64
}

// count keeps the numbers of an owner's entries.
func (o *owner) count(e *entry, n int) {
	if e.flags&tombstone != 0 {
		o.tombstones += n
	} else {
		o.standing += n
	}
}

// void reports whether what the owner stated in an epoch is of no account.
func (o *owner) void(epoch uint64) bool {
	if o.forgotten && epoch <= o.gone {
		return true
	}
	return len(o.logs) > 0 && o.logs[0].complete() && epoch < o.logs[0].epoch
}

// log returns the log of an epoch, or nil if the owner has none.
func (o *owner) log(epoch uint64) *log {
	for _, l := range o.logs {
		if l.epoch == epoch {
			return l
		}
	}
	return nil
}

// epoch returns the highest epoch known.
func (o *owner) epoch() uint64 {
	if len(o.logs) == 0 {
		return 0
	}
	return o.logs[len(o.logs)-1].epoch
}

// A log is what a state knows of an owner's statements in one epoch: the counters that it has heard
// of, and of each key the latest statement. Whatever else was stated is superseded or, up to the
// floor, a tombstone that was pruned.
type log struct {
	owner    *owner
	epoch    uint64
	seal     uint64 // one more than the counter up to which the log restates the owner's record; 0: not known
	floor    uint64 // the highest counter of a pruned tombstone; never above the watermark
	known    spans
	snapshot *snapshot

	entries   []*entry // with dropped ones between; the first sorted of them in the order of their counters
	sorted    int
	live      int // entries that are not dropped
	unsettled bool
}

// complete reports whether the log is sealed and known up to the seal, which voids older epochs.
func (l *log) complete() bool { return l.seal != 0 && l.known.watermark()+1 >= l.seal }

// append adds an entry. When entries come out of order, settle has to sort them in.
func (l *log) append(e *entry) {
	n := len(l.entries)
	if l.sorted == n && (n == 0 || l.entries[n-1].counter < e.counter) {
		l.sorted++
	}
	l.entries = append(l.entries, e)
}

// settle sorts in what came out of order, at a cost of what lies above it, and forgets dropped
// entries once they are the most.
func (l *log) settle() {
	l.unsettled = false
	if len(l.entries) > 2*l.live+16 {
		l.sorted = len(l.entries[:l.sorted]) - countDropped(l.entries[:l.sorted])
		l.entries = slices.Clip(slices.DeleteFunc(l.entries, (*entry).dropped))
	}
	if l.sorted == len(l.entries) {
		return
	}
	late := slices.Clone(l.entries[l.sorted:])
	slices.SortFunc(late, func(a, b *entry) int { return cmp.Compare(a.counter, b.counter) })
	i, j := l.sorted-1, len(late)-1
	for to := len(l.entries) - 1; j >= 0; to-- {
		if i >= 0 && l.entries[i].counter > late[j].counter {
			l.entries[to] = l.entries[i]
			i--
		} else {
			l.entries[to] = late[j]
			j--
		}
	}
	l.sorted = len(l.entries)
}

func countDropped(entries []*entry) int {
	n := 0
	for _, e := range entries {
		if e.dropped() {
			n++
		}
	}
	return n
}

// upTo returns how many entries of a settled log have counters up to the given one.
func (l *log) upTo(counter uint64) int {
	n, found := slices.BinarySearchFunc(l.entries, counter, func(e *entry, c uint64) int { return cmp.Compare(e.counter, c) })
	if found {
		n++
	}
	return n
}

// add adds a statement, as an entry that no scope holds yet.
func (l *log) add(s *scope, at place, mac [6]byte, counter, clock uint64, flags uint8) *entry {
	e := &entry{scope: s, log: l, mac: mac, flags: flags, bits: at.bits, addr: at.addr, counter: counter, clock: clock}
	l.append(e)
	return e
}
