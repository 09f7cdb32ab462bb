package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

var fixtureBuckets = []string{"addresses", "networks", "small"}

// fixture is the file of a record with all that bbolt's format has: branch and leaf pages, a value of several pages, an
// inline bucket, free pages, and room at the end. It returns what is in it as well.
func fixture(t testing.TB) ([]byte, map[string]string) {
	t.Helper()
	dir := t.TempDir()
	s := mustOpen(t, dir)
	var changes []Change
	for n := range 90 {
		changes = append(changes, Change{"addresses", fmt.Sprintf("17/10.0.0.%d", n), []byte(fmt.Sprintf(`{"kind":"endpoint","name":"container-%d"}`, n))})
	}
	changes = append(changes, Change{"networks", "big", []byte(strings.Repeat("x", 9000))}, Change{"small", "1", []byte("one")})
	for _, c := range [][]Change{changes, changes[:70], {{"addresses", "17/10.0.0.9", nil}}, {{"small", "2", []byte{}}}} {
		if err := s.Apply(c...); err != nil {
			t.Fatal(err)
		}
	}
	want := content(t, s, fixtureBuckets...)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	return data, want
}

func write(t testing.TB, dir string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, FileName)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// refused opens a damaged record, which must fail with a message for the person who runs dockway and leave the file alone.
func refused(t *testing.T, data []byte, words ...string) {
	t.Helper()
	path := write(t, t.TempDir(), data)
	s, err := Open(filepath.Dir(path))
	if err == nil {
		_ = s.Close()
		t.Fatal("opened")
	}
	for _, w := range append(words, path, "mv "+path) {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("no %q in: %v", w, err)
		}
	}
	if now, err := os.ReadFile(path); err != nil || !slices.Equal(now, data) {
		t.Errorf("the file was changed (%v)", err)
	}
}

// harmless opens a record whose damage, if any, is where nothing is kept: all must be there, and it must take changes.
func harmless(t *testing.T, data []byte, want map[string]string) {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, data)
	for _, value := range []string{"before", "after"} {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := content(t, s, fixtureBuckets...); !maps.Equal(got, want) {
			t.Errorf("%d values, want %d", len(got), len(want))
		}
		big := strings.Repeat(value, 2000)
		if err := s.Apply(Change{"small", "3", []byte(value)}, Change{"networks", "big", []byte(big)}); err != nil {
			t.Error(err)
		}
		want = maps.Clone(want)
		want["small/3"], want["networks/big"] = value, big
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTruncated(t *testing.T) {
	t.Parallel()
	data, want := fixture(t)
	used := int(max(u64(data[pageHeaderSize+40:]), u64(data[os.Getpagesize()+pageHeaderSize+40:]))) * os.Getpagesize()
	for size := range data {
		if err := check(data[:size]); size < used && !IsDamaged(err) {
			t.Fatalf("cut to %d of %d bytes: %v", size, used, err)
		} else if err == nil {
			harmless(t, data[:size], want) // only room at the end is missing
		}
	}
	for _, size := range []int{0, 1, 15, 16, 79, 80, 511, 4095, 4096, 4097, 8191, 8192, used - 4096, used - 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { refused(t, data[:size], "damaged") })
	}
}

func TestFlippedBits(t *testing.T) {
	t.Parallel()
	data, want := fixture(t)
	m, err := newestMeta(data)
	if err != nil {
		t.Fatal(err)
	}
	i := &image{data: data, pageSize: uint64(m.pageSize), pages: m.pages, seen: map[uint64]bool{0: true, 1: true}}
	if err := i.checkRecord(m.root); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	harmful, harmlessBytes := 0, 0
	for at := range data {
		if !i.seen[uint64(at)/i.pageSize] && at%499 != 0 {
			continue // a free page
		}
		flipped := slices.Clone(data)
		flipped[at] ^= 1 << rng.IntN(8)
		if err := check(flipped); err != nil {
			if !IsDamaged(err) && !IsNewer(err) {
				t.Fatalf("byte %d: %v", at, err)
			}
			if harmful++; harmful%500 == 0 {
				refused(t, flipped)
			}
			continue
		}
		// In the headers every harmless one is tried in earnest; in the room between, some.
		if harmlessBytes++; at%int(i.pageSize) < 32 || harmlessBytes%500 == 0 {
			harmless(t, flipped, want)
		}
	}
	if harmful < 5000 {
		t.Errorf("of %d bytes only %d matter", len(data), harmful)
	}
}

func TestGarbage(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	garbage := make([]byte, 65536)
	for i := range garbage {
		garbage[i] = byte(rng.Uint32())
	}
	refused(t, garbage, "damaged")
	refused(t, make([]byte, 32768), "damaged")
	refused(t, []byte("{}\n"), "damaged")
}

// A page of an older state in the place of a newer one is sound in itself.
func TestLostWrite(t *testing.T) {
	data, _ := fixture(t)
	m, err := newestMeta(data)
	if err != nil {
		t.Fatal(err)
	}
	size := uint64(m.pageSize)
	root := slices.Clone(data)
	p := root[m.root*size:]
	binary.NativeEndian.PutUint16(p[10:], u16(p[10:])-1) // one bucket less
	refused(t, root, "values")
}

// seals a meta page anew after a change to it.
func resum(data []byte, at int) {
	h := fnv.New64a()
	_, _ = h.Write(data[at+pageHeaderSize : at+pageHeaderSize+metaSize-8])
	binary.NativeEndian.PutUint64(data[at+pageHeaderSize+metaSize-8:], h.Sum64())
}

func TestNewerFormats(t *testing.T) {
	data, _ := fixture(t)
	bolt := slices.Clone(data)
	for _, at := range []int{0, os.Getpagesize()} {
		binary.NativeEndian.PutUint32(bolt[at+pageHeaderSize+4:], 3)
		resum(bolt, at)
	}
	refused(t, bolt, "written by a newer dockway", "bbolt format 3")

	dir := t.TempDir()
	path := write(t, dir, data)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		sealed := head{}.seal()
		sealed[0] = version + 1
		return tx.Bucket([]byte(headBucket)).Put([]byte(headKey), sealed)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if data, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	// Another program wrote last, as the list of free pages tells; without it the version is what is left to complain of.
	refused(t, data, "another program")
	newest := 0
	if u64(data[pageHeaderSize+48:]) < u64(data[os.Getpagesize()+pageHeaderSize+48:]) {
		newest = os.Getpagesize()
	}
	binary.NativeEndian.PutUint64(data[newest+pageHeaderSize+32:], noFreelist)
	resum(data, newest)
	refused(t, data, "written by a newer dockway", "format 2")
}

func TestOddNumbersInMetaPages(t *testing.T) {
	data, _ := fixture(t)
	for field, values := range map[int][]uint64{
		8:  {0, 1, 511, 4095, 1 << 13, 1 << 25, 1<<32 - 1},    // page size (and flags above it)
		16: {0, 1, 1 << 20, 1 << 63},                          // root
		40: {0, 2, 4, 1 << 20, 1 << 36, 1<<36 + 1, 1<<64 - 1}, // pages
		48: {0, 1, 1 << 40, 1<<64 - 1},                        // txid
	} {
		for _, v := range values {
			for _, page := range []int{0, os.Getpagesize()} {
				odd := slices.Clone(data)
				binary.NativeEndian.PutUint64(odd[page+pageHeaderSize+field:], v)
				resum(odd, page)
				if err := check(odd); err != nil && !IsDamaged(err) {
					t.Errorf("%d in field %d: %v", v, field, err)
				}
			}
		}
	}
}

func FuzzCheck(f *testing.F) {
	data, _ := fixture(f)
	f.Add(uint32(0), []byte{})
	f.Add(uint32(pageHeaderSize), data[pageHeaderSize:pageHeaderSize+metaSize])
	f.Add(uint32(3*os.Getpagesize()), []byte("\x03\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"))
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		patched := slices.Clone(data)
		copy(patched[int(at)%len(patched):], patch)
		for _, page := range []int{0, os.Getpagesize()} {
			resum(patched, page)
		}
		if err := check(patched); err != nil && !IsDamaged(err) && !IsNewer(err) {
			t.Error(err)
		}
		if err := check(patch); err != nil && !IsDamaged(err) && !IsNewer(err) {
			t.Error(err)
		}
	})
}

func FuzzUnseal(f *testing.F) {
	f.Add([]byte("b"), []byte("k"), seal([]byte("b"), []byte("k"), []byte("v")))
	f.Add([]byte(headBucket), []byte(headKey), head{3, 4}.seal())
	f.Fuzz(func(t *testing.T, bucket, key, sealed []byte) {
		value, _, err := unseal(bucket, key, sealed)
		if err == nil && !slices.Equal(seal(bucket, key, value), sealed) {
			t.Errorf("%q is not what is sealed", value)
		}
		if h, err := unsealHead(sealed); err == nil && !slices.Equal(h.seal(), sealed) {
			t.Errorf("%v is not what is sealed", h)
		}
	})
}
