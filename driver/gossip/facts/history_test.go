package facts

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// A member is a host of a random history: its state, the model of what it has on record, and a view
// that is kept from the changes that it returned.
type member struct {
	*State
	record map[Key][6]byte
	todo   []Key // of the record, not yet stated in this epoch
	sealed bool
	view   map[Key]Fact
}

// history drives the members of a cluster.
type history struct {
	members []*member
	orderly bool   // the parts of a difference come in order, as in a stream
	said    []Fact // every statement ever made
}

func (m *member) see(t *rapid.T, changes []Change) {
	seen := map[Key]bool{}
	for _, c := range changes {
		if seen[c.Key] {
			t.Fatalf("%s: two changes of %v", m.self.name, c.Key)
		}
		seen[c.Key] = true
		if had := m.view[c.Key]; had.Owner != c.Before.Owner || had.MAC != c.Before.MAC {
			t.Fatalf("%s: change of %v from %v where %v held", m.self.name, c.Key, c.Before, had)
		}
		if c.Before.Owner == c.After.Owner && c.Before.MAC == c.After.MAC {
			t.Fatalf("%s: change of %v from %v to itself", m.self.name, c.Key, c.Before)
		}
		if c.After.Owner == "" {
			delete(m.view, c.Key)
		} else {
			m.view[c.Key] = c.After
		}
	}
}

func keys() []Key {
	var all []Key
	for vsid := range uint32(2) {
		for _, p := range []string{"10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32", "fd00::1/128"} {
			all = append(all, Key{Kind: Endpoint, VSID: 5000 + vsid, Prefix: netip.MustParsePrefix(p)})
		}
	}
	for _, p := range []string{"10.0.0.0/24", "10.0.0.0/25", "10.0.0.128/25", "10.0.0.128/26"} {
		all = append(all, Key{Kind: Block, Subnet: netip.MustParsePrefix("10.0.0.0/16"), Prefix: netip.MustParsePrefix(p)})
	}
	return all
}

func (h *history) draw(t *rapid.T, label string) *member {
	return h.members[rapid.IntRange(0, len(h.members)-1).Draw(t, label)]
}

func (h *history) say(t *rapid.T, m *member, f Fact, changes []Change) {
	m.see(t, changes)
	if f.Owner != "" {
		h.said = append(h.said, f)
	}
}

func (h *history) set(t *rapid.T) {
	m := h.draw(t, "host")
	k := rapid.SampledFrom(keys()).Draw(t, "key")
	var mac [6]byte
	if k.Kind == Endpoint {
		mac[5] = byte(rapid.IntRange(0, 2).Draw(t, "mac"))
	}
	m.record[k] = mac
	f, changes := m.Set(k, mac)
	h.say(t, m, f, changes)
	again, none := m.Set(k, mac)
	if again != f || len(none) > 0 {
		t.Fatalf("stated again as %v with changes %v, from %v", again, none, f)
	}
}

func (h *history) remove(t *rapid.T) {
	m := h.draw(t, "host")
	k := rapid.SampledFrom(keys()).Draw(t, "key")
	delete(m.record, k)
	f, changes := m.Delete(k)
	h.say(t, m, f, changes)
}

func (h *history) restart(t *rapid.T) {
	m := h.draw(t, "host")
	m.State = New(m.self.name, m.own.epoch+1)
	m.view, m.sealed = map[Key]Fact{}, false
	m.todo = slices.SortedFunc(maps.Keys(m.record), Key.compare)
}

// restate states some of what is on record, and seals when it has all.
func (h *history) restate(t *rapid.T) {
	h.restateOf(t, h.draw(t, "host"), rapid.IntRange(1, 6).Draw(t, "number"))
}

func (h *history) restateOf(t *rapid.T, m *member, n int) {
	for ; n > 0 && len(m.todo) > 0; n-- {
		k := m.todo[0]
		m.todo = m.todo[1:]
		if mac, ok := m.record[k]; ok {
			f, changes := m.Set(k, mac)
			h.say(t, m, f, changes)
		}
	}
	if len(m.todo) == 0 {
		m.Seal()
		m.sealed = true
	}
}

func (h *history) raise(t *rapid.T) {
	m := h.draw(t, "host")
	if !m.sealed {
		t.Skip("not sealed")
	}
	m.Raise(m.own.epoch + uint64(rapid.IntRange(1, 2).Draw(t, "by")))
	h.said = slices.AppendSeq(h.said, m.Of(m.self.name))
}

// gossip brings a member some statements in any order, some twice.
func (h *history) gossip(t *rapid.T) {
	if len(h.said) == 0 {
		t.Skip("nothing said")
	}
	m := h.draw(t, "to")
	fs := rapid.SliceOfN(rapid.SampledFrom(h.said), 1, 8).Draw(t, "facts")
	fs, err := DecodeFacts(AppendFacts(nil, fs))
	if err != nil {
		t.Fatal(err)
	}
	_, changes := m.Merge(fs)
	m.see(t, changes)
	if fresh, changes := m.Merge(fs); len(fresh) > 0 || len(changes) > 0 {
		t.Fatalf("news again: %v, changes %v", fresh, changes)
	}
}

// sync brings a member what another one knows, or a part of it, over the wire.
func (h *history) sync(t *rapid.T) {
	from, to := h.draw(t, "from"), h.draw(t, "to")
	limit := rapid.SampledFrom([]int{0, 60, 100, 300, 10000}).Draw(t, "limit")
	var deltas []Delta
	for d := range from.Difference(wire(t, to.Digest()), limit) {
		deltas = append(deltas, d)
	}
	switch rapid.IntRange(0, 3).Draw(t, "fault") {
	case 0: // the stream is cut
		deltas = deltas[:rapid.IntRange(0, len(deltas)).Draw(t, "cut")]
	case 1: // parts come in any order, some not at all and some twice
		if len(deltas) > 0 && !h.orderly {
			deltas = rapid.SliceOfN(rapid.SampledFrom(deltas), 0, len(deltas)).Draw(t, "parts")
		}
	}
	for _, d := range deltas {
		to.apply(t, d)
	}
}

func wire(t interface{ Fatal(...any) }, d Digest) Digest {
	d, err := DecodeDigest(d.Append(nil))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (m *member) apply(t *rapid.T, d Delta) {
	d, err := DecodeDelta(d.Append(nil))
	if err != nil {
		t.Fatal(err)
	}
	changes, err := m.Apply(d)
	if err != nil {
		t.Fatal(err)
	}
	m.see(t, changes)
}

func (h *history) hide(t *rapid.T) {
	m, other := h.draw(t, "at"), h.draw(t, "host")
	m.see(t, m.Hide(other.self.name))
}

func (h *history) show(t *rapid.T) {
	m, other := h.draw(t, "at"), h.draw(t, "host")
	m.see(t, m.Show(other.self.name))
}

func (h *history) forget(t *rapid.T) {
	m, other := h.draw(t, "at"), h.draw(t, "host")
	m.see(t, m.Forget(other.self.name))
}

func (h *history) prune(t *rapid.T) {
	m := h.draw(t, "at")
	m.Prune(func(f Fact) bool {
		if !f.Deleted {
			t.Fatalf("asked whether to keep %v", f)
		}
		return rapid.Bool().Draw(t, "keep")
	})
	m.see(t, nil)
}

// exchange lets all members tell each other everything, and fails unless that ends.
func (h *history) exchange(t *rapid.T) {
	for range 4 {
		for _, from := range h.members {
			for _, to := range h.members {
				behind := to.Behind(wire(t, from.Digest()))
				sent := 0
				for d := range from.Difference(wire(t, to.Digest()), 100) {
					to.apply(t, d)
					sent++
				}
				if from != to && behind != (sent > 0) {
					t.Fatalf("%s behind %s: %v, and was sent %d deltas", to.self.name, from.self.name, behind, sent)
				}
			}
		}
	}
	for _, from := range h.members {
		for _, to := range h.members {
			if to.Behind(from.Digest()) {
				t.Fatalf("%s is still behind %s:\n%v\n%v", to.self.name, from.self.name, to.Digest(), from.Digest())
			}
			for d := range from.Difference(to.Digest(), 1000) {
				t.Fatalf("%s still lacks %v of %s", to.self.name, d, from.self.name)
			}
		}
	}
}

// check compares what each state answers with what follows from its facts one by one.
func (h *history) check(t *rapid.T) {
	for _, m := range h.members {
		all := map[Key][]Fact{}
		for o := range m.Owners() {
			n := 0
			for f := range m.Of(o.Host) {
				n++
				if !o.Hidden {
					all[f.Key] = append(all[f.Key], f)
				}
			}
			if n != o.Facts {
				t.Fatalf("%s: %s has %d facts, not %d", m.self.name, o.Host, n, o.Facts)
			}
		}
		holds := map[Key]Fact{}
		contested := map[Key]int{}
		for k, fs := range all {
			slices.SortFunc(fs, winnerFirst)
			holds[k] = fs[0]
			if k.Kind == Endpoint && len(fs) > 1 {
				contested[k] = len(fs)
			}
		}
		each := map[Key]Fact{}
		for _, kind := range []Kind{Endpoint, Block} {
			for f := range m.Each(kind, 0) {
				each[f.Key] = f
			}
		}
		if !maps.Equal(each, holds) {
			t.Fatalf("%s: yields %v, not %v", m.self.name, each, holds)
		}
		for _, k := range keys() {
			f, ok := m.Lookup(k)
			want, held := holds[k]
			if f != want || ok != held {
				t.Fatalf("%s: %v is looked up as %v, not %v", m.self.name, k, f, want)
			}
			if seen := m.view[k]; seen.Owner != f.Owner || seen.MAC != f.MAC {
				t.Fatalf("%s: changes left %v of %v where %v holds", m.self.name, seen, k, f)
			}
			if ok && k.Kind == Endpoint && f.MAC != [6]byte{} && !slices.Contains(m.ByMAC(k.VSID, f.MAC), f) {
				t.Fatalf("%s: %v is not found by its MAC", m.self.name, f)
			}
		}
		for vsid := uint32(5000); vsid < 5002; vsid++ {
			for mac := range byte(3) {
				for _, f := range m.ByMAC(vsid, [6]byte{5: mac}) {
					if f.MAC[5] != mac || f.VSID != vsid || holds[f.Key] != f {
						t.Fatalf("%s: %v found for MAC %d of %d", m.self.name, f, mac, vsid)
					}
				}
			}
		}
		for _, c := range m.Conflicts() {
			if c.Kind == Endpoint {
				if contested[c.Key] != len(c.Facts) || c.Facts[0] != holds[c.Key] {
					t.Fatalf("%s: conflict %v where %v holds", m.self.name, c, holds[c.Key])
				}
				delete(contested, c.Key)
				continue
			}
			for _, f := range c.Facts {
				holders := m.Holder(f.Subnet, f.Prefix)
				if !slices.ContainsFunc(holders, func(other Fact) bool { return other.Owner != f.Owner }) || !slices.Contains(holders, f) {
					t.Fatalf("%s: %v conflicts with nothing", m.self.name, f)
				}
			}
		}
		if len(contested) > 0 {
			t.Fatalf("%s: conflicts of %v are not reported", m.self.name, contested)
		}
		m.checkInside(t)
	}
}

// checkInside checks what the state relies on.
func (m *member) checkInside(t interface{ Fatalf(string, ...any) }) {
	held := map[*entry]bool{}
	for _, sc := range slices.Concat(slices.Collect(maps.Values(m.nets)), slices.Collect(maps.Values(m.subnets))) {
		n := 0
		for at, list := range sc.places {
			for e := list; e != nil; e = e.next {
				held[e] = true
				n++
				if e.scope != sc || e.place() != at || e.dropped() {
					t.Fatalf("%s: misplaced %v", m.self.name, e.fact())
				}
			}
		}
		if n != sc.size || n == 0 {
			t.Fatalf("%s: scope of %d entries has %d", m.self.name, sc.size, n)
		}
		indexed := 0
		for mac, list := range sc.macs {
			for e := list; e != nil; e = e.sameMAC.next {
				indexed++
				if !held[e] || e.mac != mac {
					t.Fatalf("%s: misplaced by MAC: %v", m.self.name, e.fact())
				}
			}
		}
		for e := range held {
			if e.scope == sc && e.indexed() {
				indexed--
			}
		}
		if indexed != 0 {
			t.Fatalf("%s: %d MACs indexed too often", m.self.name, indexed)
		}
	}
	for _, o := range m.order {
		for i, l := range o.logs {
			if i > 0 && (l.complete() || l.epoch <= o.logs[i-1].epoch) {
				t.Fatalf("%s: %s has a log too many", m.self.name, o.name)
			}
			if l.floor > l.known.watermark() || l.floor > 0 && l.seal == 0 {
				t.Fatalf("%s: %s: floor %d above %v", m.self.name, o.name, l.floor, l.known)
			}
			live := 0
			for j, e := range l.entries {
				if j > 0 && e.counter < l.entries[j-1].counter {
					t.Fatalf("%s: %s: log out of order", m.self.name, o.name)
				}
				if e.dropped() {
					continue
				}
				live++
				if !held[e] || e.log != l || !l.known.has(e.counter) {
					t.Fatalf("%s: %s: stray entry %v", m.self.name, o.name, e.fact())
				}
				delete(held, e)
			}
			if live != l.live {
				t.Fatalf("%s: %s: %d live entries, not %d", m.self.name, o.name, live, l.live)
			}
		}
	}
	if len(held) > 0 {
		t.Fatalf("%s: %d entries are in no log", m.self.name, len(held))
	}
}

// stands returns what a host has stated and not taken back, as text that is the same for equal facts.
func (m *member) stands(h Host) string {
	var lines []string
	for f := range m.Of(h) {
		lines = append(lines, fmt.Sprintf("%v %x", f.Key, f.MAC))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &history{orderly: rapid.Bool().Draw(t, "orderly")}
		for i := range rapid.IntRange(2, 4).Draw(t, "hosts") {
			m := &member{State: New(Host(rune('a'+i)), 1), record: map[Key][6]byte{}, view: map[Key]Fact{}}
			h.members = append(h.members, m)
		}
		t.Repeat(map[string]func(*rapid.T){
			"":        h.check,
			"set":     h.set,
			"set2":    h.set,
			"set3":    h.set,
			"remove":  h.remove,
			"restart": h.restart,
			"restate": h.restate,
			"raise":   h.raise,
			"gossip":  h.gossip,
			"gossip2": h.gossip,
			"sync":    h.sync,
			"sync2":   h.sync,
			"sync3":   h.sync,
			"hide":    h.hide,
			"show":    h.show,
			"forget":  h.forget,
			"prune":   h.prune,
		})

		// All that know of a host from others know the same, also of one that is still restating; unless
		// a part of a difference came without those before it, and who could repeat them is gone.
		for _, m := range h.members {
			for _, other := range h.members {
				m.see(t, m.Show(other.self.name))
			}
		}
		h.exchange(t)
		h.check(t)
		for _, owner := range h.members {
			var first *member
			for _, m := range h.members {
				if m == owner {
					continue
				}
				if first == nil {
					first = m
				}
				if a, b := first.stands(owner.self.name), m.stands(owner.self.name); a != b && h.orderly {
					t.Fatalf("of %s, %s knows\n%s\nand %s\n%s", owner.self.name, first.self.name, a, m.self.name, b)
				}
			}
		}

		// Once all have restated what they have on record, all know that and nothing else.
		for _, m := range h.members {
			h.restateOf(t, m, len(m.todo)+1)
		}
		h.exchange(t)
		h.check(t)
		one := h.members[0]
		for _, m := range h.members {
			if m.Digest().Sum() != one.Digest().Sum() {
				t.Fatalf("%s and %s differ:\n%v\n%v", one.self.name, m.self.name, one.Digest(), m.Digest())
			}
			if got, want := fmt.Sprint(m.Conflicts()), fmt.Sprint(one.Conflicts()); got != want {
				t.Fatalf("%s has conflicts %v, and %s %v", m.self.name, got, one.self.name, want)
			}
			if !maps.Equal(m.view, one.view) && fmt.Sprint(pairs(m.view)) != fmt.Sprint(pairs(one.view)) {
				t.Fatalf("%s sees %v, and %s %v", m.self.name, m.view, one.self.name, one.view)
			}
			if m.Usurped() != 0 {
				t.Fatalf("%s is usurped in epoch %d", m.self.name, m.Usurped())
			}
			for _, owner := range h.members {
				want := &member{State: New(owner.self.name, 1)}
				for k, mac := range owner.record {
					want.Set(k, mac)
				}
				if a, b := m.stands(owner.self.name), want.stands(owner.self.name); a != b {
					t.Fatalf("%s knows of %s\n%s\nnot\n%s", m.self.name, owner.self.name, a, b)
				}
			}
		}
	})
}

// pairs returns who holds what.
func pairs(view map[Key]Fact) map[string]string {
	all := map[string]string{}
	for k, f := range view {
		all[fmt.Sprint(k)] = fmt.Sprint(f.Owner, f.MAC)
	}
	return all
}

// The end is the same in whatever order single facts come, and in whatever groups.
func TestMergeOrder(t *testing.T) {
	owner := New("a", 1)
	var said []Fact
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		k := keys()[r.IntN(len(keys()))]
		var f Fact
		if r.IntN(2) == 0 {
			f, _ = owner.Delete(k)
		} else {
			f, _ = owner.Set(k, [6]byte{5: byte(r.IntN(3))})
		}
		if f.Owner != "" {
			said = append(said, f)
		}
	}
	owner.Seal()
	for range 20 {
		r.Shuffle(len(said), func(i, j int) { said[i], said[j] = said[j], said[i] })
		s := New("b", 1)
		for rest := said; len(rest) > 0; {
			n := min(len(rest), 1+r.IntN(20))
			s.Merge(rest[:n])
			rest = rest[n:]
		}
		got := &member{State: s}
		got.checkInside(t)
		if a, b := got.stands("a"), (&member{State: owner}).stands("a"); a != b {
			t.Fatalf("merged to\n%s\nfrom\n%s", a, b)
		}
		if s.owners["a"].logs[0].known.watermark() != owner.own.known.watermark() {
			t.Fatalf("knows %v of %v", s.owners["a"].logs[0].known, owner.own.known)
		}
	}
}
