package facts

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

func endpoint(vsid uint32, addr string) Key {
	a := netip.MustParseAddr(addr)
	return Key{Kind: Endpoint, VSID: vsid, Prefix: netip.PrefixFrom(a, a.BitLen())}
}

func block(subnet, prefix string) Key {
	return Key{Kind: Block, Subnet: netip.MustParsePrefix(subnet), Prefix: netip.MustParsePrefix(prefix)}
}

func mac(n byte) [6]byte { return [6]byte{2, 0, 0, 0, 0, n} }

var (
	key1 = endpoint(5001, "10.0.0.1")
	key2 = endpoint(5001, "10.0.0.2")
	key3 = endpoint(5001, "fd00::3")
)

// tell applies what one state knows and another one lacks, and returns the changes and the bytes.
func tell(t *testing.T, from, to *State) (changes []Change, bytes int) {
	t.Helper()
	for d := range from.Difference(to.Digest(), 1000) {
		bytes += len(d.Append(nil))
		c, err := to.Apply(d)
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, c...)
	}
	if to.Behind(from.Digest()) {
		t.Fatal("still behind")
	}
	return changes, bytes
}

// holds fails unless the winner of a key is that of an owner; none for "".
func holds(t *testing.T, s *State, k Key, owner Host) {
	t.Helper()
	f, ok := s.Lookup(k)
	if f.Owner != owner || ok != (owner != "") {
		t.Fatalf("%v is held by %q, not by %q", k, f.Owner, owner)
	}
}

// brief writes changes as text.
func brief(changes []Change) string {
	var all []string
	for _, c := range changes {
		all = append(all, fmt.Sprintf("%v %s/%d>%s/%d", c.Prefix.Addr(), c.Before.Owner, c.Before.MAC[5], c.After.Owner, c.After.MAC[5]))
	}
	slices.Sort(all)
	return fmt.Sprint(all)
}

func expect(t *testing.T, what string, changes []Change, want string) {
	t.Helper()
	if got := brief(changes); got != want {
		t.Fatalf("%s: changes %s, want %s", what, got, want)
	}
}

func TestOwnStatements(t *testing.T) {
	s := New("a", 3)
	f, changes := s.Set(key1, mac(1))
	if want := (Fact{Key: key1, MAC: mac(1), Owner: "a", Epoch: 3, Counter: 1, Clock: 1}); f != want {
		t.Fatalf("stated %v, want %v", f, want)
	}
	expect(t, "set", changes, "[10.0.0.1 /0>a/1]")
	if again, changes := s.Set(key1, mac(1)); again != f || changes != nil {
		t.Fatalf("stated again: %v, %v", again, changes)
	}
	f, changes = s.Set(key1, mac(2))
	if f.Counter != 2 {
		t.Fatalf("another MAC is stated as %v", f)
	}
	expect(t, "another MAC", changes, "[10.0.0.1 a/1>a/2]")
	if f, changes := s.Delete(key2); f != (Fact{}) || changes != nil {
		t.Fatalf("unknown key deleted: %v, %v", f, changes)
	}
	f, changes = s.Delete(key1)
	if want := (Fact{Key: key1, Owner: "a", Epoch: 3, Counter: 3, Clock: 3, Deleted: true}); f != want {
		t.Fatalf("tombstone %v, want %v", f, want)
	}
	expect(t, "delete", changes, "[10.0.0.1 a/2>/0]")
	if f, _ := s.Delete(key1); f != (Fact{}) {
		t.Fatalf("deleted again: %v", f)
	}
	if got := slices.Collect(s.Owners()); len(got) != 1 || got[0] != (Owner{Host: "a", Epoch: 3, Tombstones: 1}) {
		t.Fatalf("owners %v", got)
	}

	s.Merge([]Fact{{Key: key2, Owner: "b", Epoch: 1, Counter: 1, Clock: 41}})
	if f, _ := s.Set(key1, mac(1)); f.Clock != 42 || f.Counter != 4 {
		t.Fatalf("stated with clock 41 known: %v", f)
	}
	if f, _ := s.Set(block("10.0.0.0/16", "10.0.1.0/24"), mac(1)); f.MAC != [6]byte{} {
		t.Fatalf("block with a MAC: %v", f)
	}
	for _, k := range []Key{{}, {Kind: Endpoint, VSID: 1}, endpoint(0, "10.0.0.1"), block("10.0.0.0/16", "10.1.0.0/24")} {
		if f, changes := s.Set(k, mac(1)); f != (Fact{}) || changes != nil {
			t.Fatalf("invalid key %v is stated as %v", k, f)
		}
	}
}

// Gossip raises the watermark where nothing is missing, and what is missing is all that is sent.
func TestWatermark(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	var fs []Fact
	for i := range byte(6) {
		f, _ := a.Set(key1, mac(i))
		fs = append(fs, f)
	}
	f, _ := a.Set(key2, mac(1))
	known := func(want ...Span) {
		t.Helper()
		for _, m := range b.Digest().of("a") {
			if !slices.Equal(m.Known, want) {
				t.Fatalf("%v known, want %v", m.Known, want)
			}
		}
	}
	fresh, changes := b.Merge([]Fact{fs[0], fs[1]})
	if len(fresh) != 2 {
		t.Fatalf("fresh: %v", fresh)
	}
	expect(t, "two statements of a key", changes, "[10.0.0.1 /0>a/1]")
	known(Span{1, 2})
	b.Merge([]Fact{f})
	known(Span{1, 2}, Span{7, 7})
	fresh, _ = b.Merge([]Fact{fs[5], fs[4], fs[5]})
	if !slices.Equal(fresh, fs[5:]) {
		t.Fatalf("fresh: %v; a superseded statement is no news", fresh)
	}
	known(Span{1, 2}, Span{5, 7})
	if b.Digest().of("a")[0].Watermark() != 2 {
		t.Fatalf("watermark %d", b.Digest().of("a")[0].Watermark())
	}
	for d := range a.Difference(b.Digest(), 1000) {
		if d.Owner == "a" && (len(d.Facts) > 0 || !slices.Equal(d.Known, []Span{{3, 4}})) {
			t.Fatalf("%v is sent where 3 and 4 are missing and superseded", d)
		}
	}
	expect(t, "what was missing", first(tell(t, a, b)), "[]")
	known(Span{1, 7})
}

func first(changes []Change, _ int) []Change { return changes }

// A host that restarts and states the same again changes nothing, at any moment; what it does not
// state again goes when it has stated all.
func TestRestart(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	for i, k := range []Key{key1, key2, key3} {
		a.Set(k, mac(byte(i)))
	}
	a.Seal()
	tell(t, a, b)
	tell(t, b, c)

	a = New("a", 2)
	f, _ := a.Set(key1, mac(0))
	_, changes := b.Merge([]Fact{f})
	expect(t, "restated, by gossip", changes, "[]")
	f, _ = a.Set(key2, mac(7))
	_, changes = b.Merge([]Fact{f})
	expect(t, "restated with another MAC", changes, "[10.0.0.2 a/1>a/7]")
	holds(t, b, key3, "a")

	// The old epoch is still passed on: a host that joins now sees what the others see.
	d := New("d", 1)
	tell(t, b, d)
	holds(t, d, key3, "a")
	expect(t, "before the seal", first(tell(t, a, b)), "[]")

	a.Seal()
	if !b.Behind(a.Digest()) {
		t.Fatal("the seal is not known and not missed")
	}
	expect(t, "sealed", first(tell(t, a, b)), "[fd00::3 a/2>/0]")
	expect(t, "sealed, from a third", first(tell(t, b, c)), "[10.0.0.2 a/1>a/7 fd00::3 a/2>/0]")
	expect(t, "sealed, to who joined", first(tell(t, b, d)), "[fd00::3 a/2>/0]")

	old1 := New("e", 1)
	old1.Merge([]Fact{{Key: key3, MAC: mac(2), Owner: "a", Epoch: 1, Counter: 3, Clock: 3}})
	for d := range old1.Difference(b.Digest(), 1000) {
		if d.Owner == "a" {
			t.Fatalf("void facts are sent: %v", d)
		}
	}

	// The old epoch is void, whoever tells of it.
	old := Fact{Key: key3, MAC: mac(2), Owner: "a", Epoch: 1, Counter: 9, Clock: 100}
	if fresh, changes := b.Merge([]Fact{old}); len(fresh) > 0 || len(changes) > 0 {
		t.Fatalf("a void fact is news: %v", changes)
	}
	if changes, err := b.Apply(Delta{Owner: "a", Epoch: 1, Known: []Span{{9, 9}}, Facts: []Fact{old}}); err != nil || len(changes) > 0 {
		t.Fatalf("a void fact is applied: %v, %v", changes, err)
	}
	if n := len(b.Digest().of("a")); n != 1 {
		t.Fatalf("%d epochs are known", n)
	}
}

// What an owner has restated is not missed where the old epoch is sent as a snapshot.
func TestRestartSnapshot(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	a.Set(key1, mac(1))
	a.Set(key2, mac(2))
	a.Seal()
	tell(t, a, b)
	a.Delete(key2)
	tell(t, a, c)
	c.Prune(func(Fact) bool { return false })
	a = New("a", 2)
	f, _ := a.Set(key1, mac(1))
	c.Merge([]Fact{f})
	var all []Change
	for d := range c.Difference(b.Digest(), 1000) {
		changes, err := b.Apply(d)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, changes...)
	}
	expect(t, "snapshot of the old epoch", all, "[10.0.0.2 a/2>/0]")
}

// A seal without all that comes before it voids nothing.
func TestSealIncomplete(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	a.Set(key1, mac(1))
	a.Set(key2, mac(2))
	a.Seal()
	tell(t, a, b)
	a = New("a", 2)
	a.Set(key1, mac(1))
	a.Set(key3, mac(3))
	a.Set(key2, mac(2))
	a.Seal()
	var parts []Delta
	for d := range a.Difference(b.Digest(), 0) {
		parts = append(parts, d)
	}
	if len(parts) != 3 || parts[0].Seal == 0 {
		t.Fatalf("sent as %v", parts)
	}
	for i, want := range []string{"[]", "[fd00::3 /0>a/3]", "[]"} {
		changes, err := b.Apply(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		expect(t, fmt.Sprint("part ", i), changes, want)
		holds(t, b, key1, "a")
		holds(t, b, key2, "a")
	}

	// Gossip completes it as well.
	a = New("a", 3)
	f, _ := a.Set(key2, mac(2))
	a.Seal()
	if _, err := b.Apply(Delta{Owner: "a", Epoch: 3, Seal: 2}); err != nil {
		t.Fatal(err)
	}
	_, changes := b.Merge([]Fact{f})
	expect(t, "the last one by gossip", changes, "[10.0.0.1 a/1>/0 fd00::3 a/3>/0]")
}

// A host that has nothing left after a restart voids what it had.
func TestRestartEmpty(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	a.Set(key1, mac(1))
	a.Seal()
	tell(t, a, b)
	a = New("a", 2)
	a.Seal()
	expect(t, "nothing restated", first(tell(t, a, b)), "[10.0.0.1 a/1>/0]")
}

// Tombstones that are pruned reach whoever has not heard of them as what is not in a snapshot, and
// nothing goes before the snapshot is whole.
func TestPrune(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	for i := range byte(20) {
		a.Set(endpoint(5001, fmt.Sprintf("10.0.1.%d", i)), mac(i))
	}
	a.Set(key1, mac(1))
	a.Seal()
	tell(t, a, b)
	tell(t, a, c)
	a.Delete(key1)
	a.Set(endpoint(5001, "10.0.1.7"), mac(77))
	a.Delete(endpoint(5001, "10.0.1.9"))
	a.Set(key2, mac(2))
	tell(t, a, c)
	if n := a.Prune(func(f Fact) bool { return f.Prefix.Addr() != key1.Prefix.Addr() }); n != 1 {
		t.Fatalf("%d tombstones pruned", n)
	}
	if n := a.Prune(func(Fact) bool { return false }); n != 1 {
		t.Fatalf("%d tombstones pruned", n)
	}
	if _, bytes := tell(t, a, c); bytes > 0 {
		t.Fatalf("%d bytes for one who knew of the tombstones", bytes)
	}
	var parts []Delta
	for d := range a.Difference(b.Digest(), 100) {
		if d.Owner == "a" {
			parts = append(parts, d)
		}
	}
	if len(parts) < 4 || parts[0].Floor != 0 || parts[1].Floor == 0 {
		t.Fatalf("sent as %v", parts)
	}
	for i, d := range parts {
		holds(t, b, key1, "a")
		holds(t, b, endpoint(5001, "10.0.1.9"), "a")
		changes, err := b.Apply(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range changes {
			if c.After.Owner == "" && i < len(parts)-1 {
				t.Fatalf("part %d of %d dropped %v", i, len(parts), c)
			}
		}
	}
	holds(t, b, key1, "")
	holds(t, b, endpoint(5001, "10.0.1.9"), "")
	if f, _ := b.Lookup(endpoint(5001, "10.0.1.7")); f.MAC != mac(77) {
		t.Fatalf("%v is not what its owner states", f)
	}
	holds(t, b, endpoint(5001, "10.0.1.3"), "a")
	// b, which has never heard of the tombstones, tells d the same, which has an old view of a.
	d := New("d", 1)
	d.Merge([]Fact{{Key: key1, MAC: mac(1), Owner: "a", Epoch: 1, Counter: 21, Clock: 21}})
	tell(t, b, d)
	holds(t, d, key1, "")
	if fresh, _ := d.Merge([]Fact{{Key: key1, MAC: mac(1), Owner: "a", Epoch: 1, Counter: 21, Clock: 21}}); len(fresh) > 0 {
		t.Fatal("a fact came back after its tombstone was pruned")
	}
}

// Parts of snapshots with other floors make no whole: of the counters of one, the other knows nothing.
func TestSnapshotsApart(t *testing.T) {
	s := New("b", 1)
	fact := func(k Key, counter uint64) Fact {
		return Fact{Key: k, MAC: mac(1), Owner: "a", Epoch: 1, Counter: counter, Clock: counter}
	}
	apply := func(floor, from, to uint64, fs ...Fact) {
		t.Helper()
		if _, err := s.Apply(Delta{Owner: "a", Epoch: 1, Seal: 1, Floor: floor, Known: []Span{{from, to}}, Facts: fs}); err != nil {
			t.Fatal(err)
		}
	}
	// Whoever has the floor 20 has heard of a tombstone of key1 above 10.
	apply(20, 11, 20, fact(key2, 12))
	if got := s.Digest().of("a")[0].Known; !slices.Equal(got, []Span{{12, 12}}) {
		t.Fatalf("%v known of a part", got)
	}
	apply(10, 1, 10, fact(key1, 7))
	if got := s.Digest().of("a")[0].Watermark(); got != 10 {
		t.Fatalf("%d known, want 10", got)
	}
	apply(20, 11, 20, fact(key2, 12))
	apply(20, 1, 10)
	if got := s.Digest().of("a")[0].Watermark(); got != 20 {
		t.Fatalf("%d known, want 20", got)
	}
	holds(t, s, key1, "")
	holds(t, s, key2, "a")
}

// A tombstone is kept while what it took back may still come.
func TestPruneKeeps(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	one, _ := a.Set(key1, mac(1))
	none := func(Fact) bool { return false }
	gone, _ := a.Delete(key1)
	if a.Prune(none) != 0 {
		t.Fatal("pruned before the seal")
	}
	a.Seal()
	b.Merge([]Fact{gone})
	if b.Prune(none) != 0 {
		t.Fatal("pruned above the watermark")
	}
	b.Merge([]Fact{one})
	holds(t, b, key1, "")
	tell(t, a, b)
	if a.Prune(none) != 1 || b.Prune(none) != 1 {
		t.Fatal("not pruned")
	}
	late := Delta{Owner: "a", Epoch: 1, Known: []Span{{1, 1}}, Facts: []Fact{one}}
	if changes, err := b.Apply(late); err != nil || len(changes) > 0 {
		t.Fatalf("a delta that comes late brings back what was taken back: %v, %v", changes, err)
	}
	a.Set(key1, mac(1))
	gone, _ = a.Delete(key1)
	b.Merge([]Fact{gone})
	if b.Prune(none) != 0 {
		t.Fatal("pruned above the watermark of a complete epoch")
	}
}

func TestConflict(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	a.Set(key1, mac(1))
	b.Set(key1, mac(2))
	expect(t, "equal clocks", first(tell(t, a, b)), "[10.0.0.1 b/2>a/1]")
	expect(t, "equal clocks", first(tell(t, b, a)), "[]")
	b.Delete(key1)
	b.Set(key1, mac(2))
	expect(t, "a later claim", first(tell(t, b, a)), "[10.0.0.1 a/1>b/2]")
	tell(t, a, c)
	tell(t, b, c)
	for _, s := range []*State{a, b, c} {
		holds(t, s, key1, "b")
		got := s.Conflicts()
		if len(got) != 1 || got[0].Key != key1 || len(got[0].Facts) != 2 || got[0].Facts[0].Owner != "b" || got[0].Facts[1].Owner != "a" {
			t.Fatalf("conflicts %v", got)
		}
	}
	if got := c.ByMAC(5001, mac(1)); len(got) > 0 {
		t.Fatalf("%v does not hold", got)
	}
	expect(t, "hide", c.Hide("b"), "[10.0.0.1 b/2>a/1]")
	expect(t, "hide again", c.Hide("b"), "[]")
	if got := c.Conflicts(); len(got) > 0 {
		t.Fatalf("conflicts with who is hidden: %v", got)
	}
	if got := c.ByMAC(5001, mac(1)); len(got) != 1 || got[0].Owner != "a" {
		t.Fatalf("by MAC: %v", got)
	}
	if got := slices.Collect(c.Of("b")); len(got) != 1 {
		t.Fatalf("facts of who is hidden: %v", got)
	}
	f, _ := b.Set(key2, mac(3))
	_, changes := c.Merge([]Fact{f})
	expect(t, "of who is hidden", changes, "[]")
	expect(t, "show", c.Show("b"), "[10.0.0.1 a/1>b/2 10.0.0.2 /0>b/3]")

	// The move of an address within one call is one change.
	f1, _ := b.Delete(key1)
	f2, _ := a.Set(key1, mac(9))
	_, changes = c.Merge([]Fact{f1, f2})
	expect(t, "move", changes, "[10.0.0.1 b/2>a/9]")
	f1, _ = b.Delete(key2)
	f2, _ = a.Set(key2, mac(8))
	_, changes = c.Merge([]Fact{f1, f2})
	expect(t, "move", changes, "[10.0.0.2 b/3>a/8]")
	f1, _ = b.Set(key3, mac(1))
	b.Raise(2)
	for f2 = range b.Of("b") {
	}
	tell(t, b, a)
	f3, _ := a.Set(key3, mac(4))
	_, changes = c.Merge([]Fact{f1, f2, f3})
	expect(t, "a claim, restated, and lost", changes, "[fd00::3 /0>a/4]")
	expect(t, "hide of self", a.Hide("a"), "[]")
	holds(t, a, key1, "a")
}

// Raise and Restate keep the winner of a conflict; Set by a host that knows of nobody does not.
func TestRestate(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	b.Set(key2, mac(2))
	b.Set(key1, mac(2))
	tell(t, b, a)
	won, _ := a.Set(key1, mac(1))
	a.Seal()
	tell(t, a, b)
	a = New("a", 2)
	f, _ := a.Restate(key1, mac(1), won.Clock)
	if f.Clock != won.Clock {
		t.Fatalf("restated as %v", f)
	}
	a.Seal()
	expect(t, "restated", first(tell(t, a, b)), "[]")
	a.Raise(5)
	expect(t, "raised", first(tell(t, a, b)), "[]")
	a = New("a", 6)
	a.Set(key1, mac(1))
	a.Seal()
	expect(t, "set", first(tell(t, a, b)), "[10.0.0.1 a/1>b/2]")
	holds(t, a, key1, "a") // it has yet to hear of b
	expect(t, "set", first(tell(t, b, a)), "[10.0.0.1 a/1>b/2 10.0.0.2 /0>b/2]")
}

// TestHighestClock: what is stated after the highest clock that can be told can be told too, and put on record.
func TestHighestClock(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	a.Merge([]Fact{{Key: key1, MAC: mac(9), Owner: "z", Epoch: 1, Counter: 1, Clock: maxNumber}})
	a.Witness(maxNumber)
	set, _ := a.Set(key2, mac(1))
	a.Set(key3, mac(1))
	gone, _ := a.Delete(key3)
	if set.Clock > maxNumber || gone.Clock > maxNumber {
		t.Errorf("clocks %d and %d", set.Clock, gone.Clock)
	}
	list, err := DecodeFacts(AppendFacts(nil, []Fact{set, gone}))
	if err != nil {
		t.Fatal(err)
	}
	b.Merge(list)
	holds(t, b, key2, "a")
	holds(t, b, key3, "")
}

func TestUsurped(t *testing.T) {
	for _, epoch := range []uint64{1, 2} {
		b := New("b", 1)
		lost := New("a", 2)
		lost.Set(key1, mac(1))
		lost.Set(key2, mac(2))
		lost.Seal()
		tell(t, lost, b)

		// The record is lost: the host starts in an epoch that it has used.
		for how, hear := range map[string]func(a *State){
			"gossip":   func(a *State) { a.Merge(slices.Collect(b.Of("a"))) },
			"exchange": func(a *State) { refused(t, b, a) },
		} {
			a := New("a", epoch)
			a.Set(key3, mac(3))
			a.Seal()
			if a.Usurped() != 0 {
				t.Fatal("usurped by nobody")
			}
			hear(a)
			holds(t, a, key1, "")
			if a.Usurped() != 2 {
				t.Fatalf("epoch %d, %s: usurped in epoch %d, want 2", epoch, how, a.Usurped())
			}
			a.Raise(2)
			a.Raise(a.Usurped() + 1)
			if a.Usurped() != 0 {
				t.Fatal("usurped after it raised its epoch")
			}
			other := New("c", 1)
			tell(t, b, other)
			expect(t, "raised", first(tell(t, a, other)), "[10.0.0.1 a/1>/0 10.0.0.2 a/2>/0 fd00::3 /0>a/3]")
			hear(a)
			if a.Usurped() != 0 {
				t.Fatal("usurped by an old epoch")
			}
		}
	}
}

// One who states as this host in the same epoch is noticed by any statement that this host has not
// made.
func TestUsurpedSameEpoch(t *testing.T) {
	for what, one := range map[string]struct {
		counter uint64
		state   func(a *State)
	}{
		"a counter not used":       {1, func(*State) {}},
		"a key not stated":         {1, func(a *State) { a.Set(key2, mac(1)) }},
		"another MAC":              {1, func(a *State) { a.Set(key1, mac(2)) }},
		"a counter of another key": {3, func(a *State) { a.Set(key2, mac(2)); a.Set(key1, mac(1)); a.Set(key3, mac(3)) }},
	} {
		a := New("a", 1)
		one.state(a)
		f := Fact{Key: key1, MAC: mac(1), Owner: "a", Epoch: 1, Counter: one.counter, Clock: 9}
		if fresh, changes := a.Merge([]Fact{f}); len(fresh) > 0 || len(changes) > 0 || a.Usurped() != 1 {
			t.Errorf("%s: usurped in epoch %d, changes %v", what, a.Usurped(), changes)
		}
		if f, _ := a.Set(key1, mac(7)); f.Clock != 10 {
			t.Errorf("%s: clock %d after one of 9", what, f.Clock)
		}
	}
}

// refused is tell to a host that refuses what is told of itself.
func refused(t *testing.T, from, to *State) {
	t.Helper()
	for d := range from.Difference(to.Digest(), 1000) {
		if changes, err := to.Apply(d); err != nil || len(changes) > 0 {
			t.Fatalf("changes %v, %v", changes, err)
		}
	}
}

// A host's own statements that come back to it are nothing new, whatever became of them.
func TestNotUsurped(t *testing.T) {
	a, b := New("a", 1), New("b", 1)
	var fs []Fact
	for i := range byte(4) {
		f1, _ := a.Set(key1, mac(i))
		f2, _ := a.Delete(key1)
		f3, _ := a.Set(key2, mac(i))
		fs = append(fs, f1, f2, f3)
	}
	a.Seal()
	a.Prune(func(Fact) bool { return false })
	b.Merge(fs)
	a.Merge(fs)
	tell(t, b, a)
	if a.Usurped() != 0 {
		t.Fatalf("usurped in epoch %d", a.Usurped())
	}
}

// Who is forgotten does not come back through others that have not forgotten it yet.
func TestForget(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	a.Set(key1, mac(1))
	a.Seal()
	tell(t, a, b)
	tell(t, b, c)
	tell(t, c, b)
	b.Hide("a")
	expect(t, "forget who is hidden", b.Forget("a"), "[]")
	if b.Behind(c.Digest()) {
		t.Fatal("what is forgotten is missed")
	}
	expect(t, "from another", first(tell(t, c, b)), "[]")
	if _, bytes := tell(t, c, b); bytes > 0 {
		t.Fatalf("%d bytes of what is forgotten", bytes)
	}
	if fresh, _ := b.Merge(slices.Collect(c.Of("a"))); len(fresh) > 0 {
		t.Fatal("what is forgotten is news")
	}
	if n := len(slices.Collect(b.Owners())); n != 2 {
		t.Fatalf("%d owners", n)
	}
	expect(t, "hide", c.Hide("a"), "[10.0.0.1 a/1>/0]")
	expect(t, "forget", c.Forget("a"), "[]")
	if b.Digest().Sum() != c.Digest().Sum() {
		t.Fatal("those who have forgotten the same differ")
	}

	b.Show("a")
	expect(t, "back in the same epoch", first(tell(t, a, b)), "[10.0.0.1 /0>a/1]")
	a = New("a", 2)
	a.Set(key1, mac(2))
	a.Seal()
	expect(t, "back in another epoch", first(tell(t, a, c)), "[10.0.0.1 /0>a/2]")
	if got := c.Digest().of("a"); len(got) != 1 || got[0].Forgotten {
		t.Fatalf("who is back is known as %v", got)
	}
	expect(t, "forget who is not hidden", c.Forget("a"), "[10.0.0.1 a/2>/0]")
	expect(t, "forget oneself", a.Forget("a"), "[]")
	holds(t, a, key1, "a")
}

func TestBlocks(t *testing.T) {
	a, b, c := New("a", 1), New("b", 1), New("c", 1)
	const subnet = "10.0.0.0/16"
	a.Set(block(subnet, "10.0.0.0/24"), mac(1))
	a.Set(block(subnet, "10.0.1.0/24"), mac(1))
	a.Set(block(subnet, "10.0.1.0/25"), mac(1)) // in one of its own: no conflict
	b.Set(block(subnet, "10.0.8.0/24"), mac(1))
	b.Set(block(subnet, "10.0.0.128/25"), mac(1))
	b.Set(block("10.0.0.0/15", "10.0.0.0/24"), mac(1)) // of another subnet
	c.Set(block(subnet, "10.0.8.0/24"), mac(1))
	states := []*State{a, b, c}
	for _, from := range states {
		for _, to := range states {
			tell(t, from, to)
		}
	}
	for _, from := range states {
		for _, to := range states {
			tell(t, from, to)
		}
	}
	p := netip.MustParsePrefix
	for _, s := range states {
		var got []string
		for _, c := range s.Conflicts() {
			line := c.Prefix.String()
			for _, f := range c.Facts {
				line += fmt.Sprintf(" %s:%v", f.Owner, f.Prefix)
			}
			got = append(got, line)
		}
		want := "[10.0.0.0/24 b:10.0.0.128/25 a:10.0.0.0/24 10.0.8.0/24 b:10.0.8.0/24 c:10.0.8.0/24]"
		if fmt.Sprint(got) != want {
			t.Fatalf("conflicts %v, want %s", got, want)
		}
		holder := func(subnet, prefix string) (all string) {
			for _, f := range s.Holder(p(subnet), p(prefix)) {
				all += fmt.Sprintf("%s:%v ", f.Owner, f.Prefix)
			}
			return all
		}
		for _, one := range [][3]string{
			{subnet, "10.0.0.200/32", "b:10.0.0.128/25 a:10.0.0.0/24 "},
			{subnet, "10.0.0.1/32", "a:10.0.0.0/24 "},
			{subnet, "10.0.0.0/23", "a:10.0.1.0/25 a:10.0.1.0/24 b:10.0.0.128/25 a:10.0.0.0/24 "},
			{subnet, "10.0.9.0/24", ""},
			{"10.0.0.0/15", "10.0.0.1/32", "b:10.0.0.0/24 "},
			{"10.0.0.0/14", "10.0.0.1/32", ""},
		} {
			if got := holder(one[0], one[1]); got != one[2] {
				t.Fatalf("%s of %s is held by %s, want %s", one[1], one[0], got, one[2])
			}
		}
	}
	a.Hide("b")
	if got := a.Holder(p(subnet), p("10.0.0.200/32")); len(got) != 2 || got[0].Owner != "b" {
		t.Fatalf("with b hidden, held by %v", got)
	}
	a.Forget("b")
	if got := a.Holder(p(subnet), p("10.0.0.200/32")); len(got) != 1 || got[0].Owner != "a" {
		t.Fatalf("with b forgotten, held by %v", got)
	}
}

func TestEach(t *testing.T) {
	s := New("a", 1)
	other := endpoint(5002, "10.0.0.1")
	for i, k := range []Key{key1, key2, other, block("10.0.0.0/16", "10.0.0.0/24")} {
		s.Set(k, mac(byte(i)))
	}
	for _, one := range []struct {
		kind Kind
		vsid uint32
		want int
	}{{Endpoint, 5001, 2}, {Endpoint, 5002, 1}, {Endpoint, 5003, 0}, {Endpoint, 0, 3}, {Block, 0, 1}, {Block, 5001, 0}, {3, 0, 0}} {
		n := 0
		for f := range s.Each(one.kind, one.vsid) {
			n++
			if f.Kind != one.kind || one.vsid != 0 && f.VSID != one.vsid {
				t.Errorf("%v of kind %d, VSID %d", f, one.kind, one.vsid)
			}
		}
		if n != one.want {
			t.Errorf("%d facts of kind %d, VSID %d, want %d", n, one.kind, one.vsid, one.want)
		}
	}
	if got := s.ByMAC(5001, mac(0)); len(got) != 1 || got[0].Key != key1 {
		t.Errorf("by MAC: %v", got)
	}
	if got := s.ByMAC(5002, mac(0)); len(got) != 0 {
		t.Errorf("by MAC in another network: %v", got)
	}
	if _, ok := s.Lookup(Key{Kind: Endpoint, VSID: 5001}); ok {
		t.Error("no prefix is found")
	}
}

// The parts of a difference keep to the limit, whatever it is.
func TestLimit(t *testing.T) {
	a := New("a", 1)
	for i := range 2000 {
		k := endpoint(5001, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).String())
		a.Set(k, mac(1))
		if i%3 == 0 {
			a.Delete(k)
		}
	}
	a.Seal()
	a.Prune(func(f Fact) bool { return f.Counter > 1000 })
	holes := Mark{Owner: "a", Epoch: 1}
	for c := uint64(3); c < 2400; c += 2 {
		holes.Known = append(holes.Known, Span{c, c})
	}
	for _, remote := range []Digest{nil, {holes}} {
		for _, limit := range []int{100, 1000, 10_000} {
			n := 0
			var known spans
			for d := range a.Difference(remote, limit) {
				if !slices.Equal(spans(d.Known).minus(known), d.Known) {
					t.Errorf("%v is told twice", d.Known)
				}
				known = known.union(d.Known)
				if got := len(d.Append(nil)); got > limit+20 {
					t.Errorf("%d bytes, where the limit is %d", got, limit)
				}
				n += len(d.Facts)
			}
			if n < 1300 {
				t.Errorf("only %d facts", n)
			}
		}
	}
}

// Costs that an overlay of many hosts relies on.
func TestCosts(t *testing.T) {
	hosts, fs := cluster(1000)
	encoded := len(AppendFacts(nil, fs))
	if encoded > 40*many {
		t.Errorf("%d facts take %d bytes", many, encoded)
	}
	a, b := merged(fs), New("other", 1)
	tell(t, a, b)
	tell(t, b, a)
	digest := a.Digest()
	if got := len(digest.Append(nil)); got > 40*(len(hosts)+2) {
		t.Errorf("a digest of %d hosts takes %d bytes", len(hosts), got)
	}
	if _, bytes := tell(t, a, b); bytes > 0 {
		t.Errorf("%d bytes where nothing changed", bytes)
	}
	if a.Digest().Sum() != b.Digest().Sum() {
		t.Error("digests of equal states have different sums")
	}
	one, _ := a.Set(key1, mac(1))
	if a.Digest().Sum() == b.Digest().Sum() {
		t.Error("digests of different states have equal sums")
	}
	if _, bytes := tell(t, a, b); bytes > 100 {
		t.Errorf("%d bytes for one fact", bytes)
	}
	if f, _ := b.Lookup(key1); f != one {
		t.Errorf("%v arrived as %v", one, f)
	}
	if got := heapOf(func() any { return merged(fs) }); got > 30e6 {
		t.Errorf("%d facts take %.0f bytes in memory", many, got)
	}
}
