package facts

import (
	"bytes"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// samples are facts of every form.
func samples() []Fact {
	fs := []Fact{
		{Key: Key{Kind: Endpoint, VSID: 5001, Prefix: netip.MustParsePrefix("10.90.0.2/32")}, MAC: [6]byte{2, 0, 0, 0, 0, 1}, Owner: "one/8f3a", Epoch: 7, Counter: 1, Clock: 5},
		{Key: Key{Kind: Endpoint, VSID: 5001, Prefix: netip.MustParsePrefix("fd00::2/128")}, MAC: [6]byte{2, 0, 0, 0, 0, 1}, Owner: "one/8f3a", Epoch: 7, Counter: 2, Clock: 6},
		{Key: Key{Kind: Endpoint, VSID: maxVSID, Prefix: netip.MustParsePrefix("10.90.0.2/32")}, Owner: "one/8f3a", Epoch: 7, Counter: 4, Clock: 9, Deleted: true},
		{Key: Key{Kind: Block, Subnet: netip.MustParsePrefix("10.90.0.0/16"), Prefix: netip.MustParsePrefix("10.90.4.0/24")}, Owner: "two/11", Epoch: maxNumber, Counter: maxNumber, Clock: maxNumber},
		{Key: Key{Kind: Block, Subnet: netip.MustParsePrefix("10.90.0.0/16"), Prefix: netip.MustParsePrefix("10.90.0.0/16")}, Owner: "one/8f3a", Epoch: 7, Counter: 5, Clock: 1, Deleted: true},
		{Key: Key{Kind: Block, Subnet: netip.MustParsePrefix("fd00:1::/64"), Prefix: netip.MustParsePrefix("fd00:1::100/120")}, Owner: Host(strings.Repeat("x", maxHost)), Epoch: 0, Counter: 1, Clock: 0},
	}
	return fs
}

func sampleDigest() Digest {
	return Digest{
		{Owner: "one/8f3a", Epoch: 6, Known: []Span{{1, 4}, {6, 6}, {9, 1000}}, Own: true},
		{Owner: "one/8f3a", Epoch: 7, Seal: 1},
		{Owner: "three", Epoch: 9, Forgotten: true},
		{Owner: "two/11", Epoch: maxNumber, Seal: 3, Known: []Span{{1, maxNumber}}},
	}
}

func sampleDelta() Delta {
	return Delta{Owner: "one/8f3a", Epoch: 7, Seal: 3, Known: []Span{{1, 2}, {4, 4}}, Facts: samples()[:3]}
}

func TestEncoding(t *testing.T) {
	fs, err := DecodeFacts(AppendFacts(nil, samples()))
	if err != nil || !slices.Equal(fs, samples()) {
		t.Errorf("facts came back as %v, %v", fs, err)
	}
	g, err := DecodeDigest(sampleDigest().Append(nil))
	if err != nil || !reflect.DeepEqual(g, sampleDigest()) {
		t.Errorf("digest came back as %v, %v", g, err)
	}
	d, err := DecodeDelta(sampleDelta().Append(nil))
	if err != nil || !reflect.DeepEqual(d, sampleDelta()) {
		t.Errorf("delta came back as %v, %v", d, err)
	}
	if b := AppendFacts([]byte("head"), nil); !bytes.HasPrefix(b, []byte("head")) || len(b) != 6 {
		t.Errorf("no facts are appended as %x", b)
	}
}

// A message that is cut anywhere, or has bytes too many, is refused.
func TestDecodeDamaged(t *testing.T) {
	for name, one := range map[string]struct {
		message []byte
		decode  func([]byte) error
	}{
		"facts":  {AppendFacts(nil, samples()), func(b []byte) error { _, err := DecodeFacts(b); return err }},
		"digest": {sampleDigest().Append(nil), func(b []byte) error { _, err := DecodeDigest(b); return err }},
		"delta":  {sampleDelta().Append(nil), func(b []byte) error { _, err := DecodeDelta(b); return err }},
	} {
		for n := range len(one.message) {
			if one.decode(one.message[:n]) == nil {
				t.Errorf("%s: %d bytes of %d are accepted", name, n, len(one.message))
			}
		}
		if one.decode(append(slices.Clone(one.message), 0)) == nil {
			t.Errorf("%s: a byte too many is accepted", name)
		}
		other := slices.Clone(one.message)
		other[0]++
		if one.decode(other) == nil {
			t.Errorf("%s: another version is accepted", name)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	endpoint, block := samples()[0], samples()[3]
	with := func(f Fact, change func(f *Fact)) Fact {
		change(&f)
		return f
	}
	for what, f := range map[string]Fact{
		"no owner":                  with(endpoint, func(f *Fact) { f.Owner = "" }),
		"a long owner":              with(endpoint, func(f *Fact) { f.Owner = Host(strings.Repeat("x", maxHost+1)) }),
		"an unprintable owner":      with(endpoint, func(f *Fact) { f.Owner = "a\n" }),
		"an owner of UTF-8":         with(endpoint, func(f *Fact) { f.Owner = "ä" }),
		"no kind":                   with(endpoint, func(f *Fact) { f.Kind = 0 }),
		"an unknown kind":           with(endpoint, func(f *Fact) { f.Kind = 3 }),
		"no VSID":                   with(endpoint, func(f *Fact) { f.VSID = 0 }),
		"a great VSID":              with(endpoint, func(f *Fact) { f.VSID = maxVSID + 1 }),
		"a VSID of 32 bits":         with(endpoint, func(f *Fact) { f.VSID = math.MaxUint32 }),
		"IPv4 as IPv6":              with(endpoint, func(f *Fact) { f.Prefix = netip.MustParsePrefix("::ffff:10.0.0.1/128") }),
		"a tombstone with a MAC":    with(endpoint, func(f *Fact) { f.Deleted = true }),
		"a block with a MAC":        with(block, func(f *Fact) { f.MAC[0] = 2 }),
		"counter 0":                 with(endpoint, func(f *Fact) { f.Counter = 0 }),
		"a counter of 64 bits":      with(endpoint, func(f *Fact) { f.Counter = 1 << 63 }),
		"a clock of 64 bits":        with(endpoint, func(f *Fact) { f.Clock = math.MaxUint64 }),
		"an epoch of 64 bits":       with(endpoint, func(f *Fact) { f.Epoch = 1 << 63 }),
		"a subnet with host bits":   with(block, func(f *Fact) { f.Subnet = netip.MustParsePrefix("10.90.0.1/16") }),
		"a block with host bits":    with(block, func(f *Fact) { f.Prefix = netip.MustParsePrefix("10.90.4.1/24") }),
		"a block not in a subnet":   with(block, func(f *Fact) { f.Prefix = netip.MustParsePrefix("10.91.4.0/24") }),
		"a block beyond a subnet":   with(block, func(f *Fact) { f.Prefix = netip.MustParsePrefix("10.88.0.0/13") }),
		"a subnet of 33 bits":       with(block, func(f *Fact) { f.Subnet = netip.PrefixFrom(f.Subnet.Addr(), 33) }),
		"a block of another family": with(block, func(f *Fact) { f.Subnet = netip.MustParsePrefix("fd00::/64") }),
	} {
		if got, err := DecodeFacts(AppendFacts(nil, []Fact{f})); err == nil {
			t.Errorf("%s is accepted as %v", what, got)
		}
	}

	delta := func(change func(d *Delta)) Delta {
		d := sampleDelta()
		d.Facts = slices.Clone(d.Facts)
		d.Known = slices.Clone(d.Known)
		change(&d)
		return d
	}
	for what, d := range map[string]Delta{
		"a fact of another owner":  delta(func(d *Delta) { d.Facts[1].Owner = "b" }),
		"a fact of another epoch":  delta(func(d *Delta) { d.Facts[1].Epoch++ }),
		"a fact twice":             delta(func(d *Delta) { d.Facts[1].Counter = 1 }),
		"facts out of order":       delta(func(d *Delta) { slices.Reverse(d.Facts) }),
		"a fact that is not known": delta(func(d *Delta) { d.Facts[2].Counter = 3 }),
		"counters out of order":    delta(func(d *Delta) { slices.Reverse(d.Known) }),
		"counters that touch":      delta(func(d *Delta) { d.Known[1].First = 3 }),
		"counter 0":                delta(func(d *Delta) { d.Known[0].First = 0 }),
		"counters beyond 63 bits":  delta(func(d *Delta) { d.Known[1].Last = 1 << 63 }),
		"a span backwards":         delta(func(d *Delta) { d.Known[1].Last = 3 }),
		"a low floor":              delta(func(d *Delta) { d.Floor = 3 }),
		"no owner":                 delta(func(d *Delta) { d.Owner = "" }),
	} {
		if got, err := DecodeDelta(d.Append(nil)); err == nil {
			t.Errorf("delta with %s is accepted as %v", what, got)
		}
		s := New("self", 1)
		if changes, err := s.Apply(d); err == nil || len(changes) > 0 || len(s.Digest()) > 1 {
			t.Errorf("delta with %s is applied", what)
		}
	}

	for what, d := range map[string]Digest{
		"an owner twice":      {{Owner: "a", Epoch: 1}, {Owner: "a", Epoch: 1}},
		"owners out of order": {{Owner: "b", Epoch: 1}, {Owner: "a", Epoch: 2}},
		"no owner":            {{Epoch: 1}},
	} {
		if got, err := DecodeDigest(d.Append(nil)); err == nil {
			t.Errorf("digest with %s is accepted as %v", what, got)
		}
	}
	for what, b := range map[string][]byte{
		"an unknown flag of a fact":     {factsV1, 1, 0x80 | byte(Endpoint), 0, 1, 'a', 1, 1, 10, 0, 0, 1, 2, 2},
		"a fact that names no owner":    {factsV1, 1, sameOwner | byte(Endpoint), 1, 10, 0, 0, 1, 2, 2},
		"an owner that is not named":    {factsV1, 1, byte(Endpoint), 1, 1, 'a', 1, 1, 10, 0, 0, 1, 2, 2},
		"a clock that goes below 0":     {factsV1, 1, byte(Endpoint), 0, 1, 'a', 1, 1, 10, 0, 0, 1, 2, 1},
		"a scope of a fact before":      {factsV1, 1, sameScope | byte(Endpoint), 0, 1, 'a', 1, 10, 0, 0, 1, 2, 2},
		"a number of more than 64 bits": {factsV1, 1, byte(Endpoint), 0, 1, 'a', 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1, 10, 0, 0, 1, 2, 2},
	} {
		if got, err := DecodeFacts(b); err == nil {
			t.Errorf("%s is accepted as %v", what, got)
		}
	}
	if got, err := DecodeFacts([]byte{factsV1, 1, byte(Endpoint), 0, 1, 'a', 1, 1, 10, 0, 0, 1, 2, 2}); err != nil {
		t.Errorf("a good fact is refused: %v, %v", got, err)
	}
	if got, err := DecodeDigest([]byte{digestV1, 1, 1, 'a', 4, 1, 1, 0}); err == nil {
		t.Errorf("an unknown flag of an owner is accepted as %v", got)
	}
}

// bounded runs a decoder, and fails if it allocates out of proportion to what it was given.
func bounded(t *testing.T, n int, decode func()) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	decode()
	runtime.ReadMemStats(&after)
	// A fact of 8 bytes becomes one of 136; the rest is errors, and what the test itself needs.
	if got := after.TotalAlloc - before.TotalAlloc; got > uint64(64*n+64<<10) {
		t.Fatalf("%d bytes made it allocate %d", n, got)
	}
}

// A short message that announces much must not be believed.
func TestDecodeBounded(t *testing.T) {
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}
	for _, b := range [][]byte{
		slices.Concat([]byte{factsV1}, huge),
		slices.Concat([]byte{factsV1, 1, byte(Endpoint), 0}, huge),
		slices.Concat([]byte{digestV1}, huge),
		slices.Concat([]byte{digestV1, 1}, huge),
		slices.Concat([]byte{digestV1, 1, 1, 'a', 0, 1, 1}, huge),
		slices.Concat([]byte{deltaV1}, huge),
		slices.Concat([]byte{deltaV1, 1, 'a', 1, 1, 0}, huge),
		slices.Concat([]byte{deltaV1, 1, 'a', 1, 1, 0, 0}, huge),
	} {
		b = append(b, make([]byte, 8)...)
		bounded(t, len(b), func() {
			_, err1 := DecodeFacts(b)
			_, err2 := DecodeDigest(b)
			_, err3 := DecodeDelta(b)
			if err1 == nil || err2 == nil || err3 == nil {
				t.Errorf("%x is accepted", b)
			}
		})
	}
}

func FuzzDecodeFacts(f *testing.F) {
	f.Add(AppendFacts(nil, samples()))
	f.Add(AppendFacts(nil, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var fs []Fact
		var err error
		bounded(t, len(b), func() { fs, err = DecodeFacts(b) })
		if err != nil {
			return
		}
		again, err := DecodeFacts(AppendFacts(nil, fs))
		if err != nil || !slices.Equal(again, fs) {
			t.Fatalf("%v came back as %v, %v", fs, again, err)
		}
		s := &member{State: New("self", 1)}
		s.Merge(fs)
		if fresh, changes := s.Merge(fs); len(fresh) > 0 || len(changes) > 0 {
			t.Fatalf("%v were news again: %v, %v", fs, fresh, changes)
		}
	})
}

func FuzzDecodeDigest(f *testing.F) {
	f.Add(sampleDigest().Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var d Digest
		var err error
		bounded(t, len(b), func() { d, err = DecodeDigest(b) })
		if err != nil {
			return
		}
		again, err := DecodeDigest(d.Append(nil))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(d) {
			t.Fatalf("%v came back as %v, %v", d, again, err)
		}
		s := New("one/8f3a", 7)
		s.Merge(samples())
		s.Behind(d)
		for part := range s.Difference(d, 100) {
			if _, err := DecodeDelta(part.Append(nil)); err != nil {
				t.Fatalf("the difference from %v has %v: %v", d, part, err)
			}
		}
	})
}

func FuzzDecodeDelta(f *testing.F) {
	f.Add(sampleDelta().Append(nil))
	snapshot := sampleDelta()
	snapshot.Floor = 5
	f.Add(snapshot.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var d Delta
		var err error
		bounded(t, len(b), func() { d, err = DecodeDelta(b) })
		if err != nil {
			return
		}
		again, err := DecodeDelta(d.Append(nil))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(d) {
			t.Fatalf("%v came back as %v, %v", d, again, err)
		}
		for _, self := range []Host{"self", d.Owner} {
			s := New(self, 1)
			s.Merge(samples())
			if _, err := s.Apply(d); err != nil {
				t.Fatalf("%v is decoded and not applied: %v", d, err)
			}
			if changes, err := s.Apply(d); err != nil || len(changes) > 0 {
				t.Fatalf("%v made changes again: %v, %v", d, changes, err)
			}
		}
	})
}
