package store

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

func mustOpen(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// content reads the given buckets whole, with "bucket/key" as keys.
func content(t testing.TB, s *Store, buckets ...string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, b := range buckets {
		err := s.Load(b, func(key string, value []byte) error {
			all[b+"/"+key] = string(value)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func TestApplyAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "on the way")
	s := mustOpen(t, dir)
	if want := filepath.Join(dir, "dockway.db"); s.Path() != want {
		t.Errorf("path %s, want %s", s.Path(), want)
	}
	apply := func(changes ...Change) {
		t.Helper()
		if err := s.Apply(changes...); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	apply(Change{"none", "such", nil})
	apply(Change{"a", "1", []byte("one")}, Change{"b", "1", []byte{}}, Change{"a", "2", []byte("two")})
	apply(Change{"a", "1", []byte("uno")}, Change{"a", "2", nil}, Change{"a", "3", []byte("x")}, Change{"a", "3", nil})
	want := map[string]string{"a/1": "uno", "b/1": ""}
	if got := content(t, s, "a", "b", "none"); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if err := s.Apply(Change{"a", "1", nil}); err == nil {
		t.Error("a closed store took a change")
	}
	if got := content(t, mustOpen(t, dir), "a", "b"); !maps.Equal(got, want) {
		t.Errorf("after reopening: got %v, want %v", got, want)
	}
}

func TestApplyRefusesWhatItCannotKeep(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	for _, c := range []Change{
		{"", "key", []byte("v")},
		{"bucket", "", []byte("v")},
		{"bucket", strings.Repeat("k", 32769), []byte("v")},
		{headBucket, headKey, []byte("v")},
	} {
		if err := s.Apply(Change{"bucket", "before", []byte("v")}, c); err == nil {
			t.Errorf("bucket %q, key of %d bytes: taken", c.Bucket, len(c.Key))
		}
	}
	if got := content(t, s, "bucket"); len(got) != 0 {
		t.Errorf("half a change was made: %v", got)
	}
}

func TestLoadStopsAtTheFirstErrorAndMayCallTheStore(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	for _, k := range []string{"1", "2", "3"} {
		if err := s.Apply(Change{"b", k, []byte(k)}); err != nil {
			t.Fatal(err)
		}
	}
	stop, calls := errors.New("stop"), 0
	err := s.Load("b", func(key string, _ []byte) error {
		if calls++; calls == 2 {
			return stop
		}
		return s.Apply(Change{"b", key, nil})
	})
	if !errors.Is(err, stop) || calls != 2 || !strings.Contains(err.Error(), `key "2" in bucket "b" of `+s.Path()) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

// The store is a map of maps, whatever is done to it, also when it is opened anew at any moment.
func TestStoreIsAMap(t *testing.T) {
	dirs := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(dirs, fmt.Sprint(n))
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		buckets := []string{"a", "b"}
		change := rapid.Custom(func(t *rapid.T) Change {
			c := Change{Bucket: rapid.SampledFrom(buckets).Draw(t, "bucket"), Key: rapid.StringMatching("[a-z]{1,2}").Draw(t, "key")}
			if size := rapid.SampledFrom([]int{-1, -1, 0, 5, 300, 9000}).Draw(t, "size"); size >= 0 {
				c.Value = []byte(strings.Repeat(rapid.StringMatching("[0-9]").Draw(t, "value"), size))
			}
			return c
		})
		model := make(map[string]string)
		t.Repeat(map[string]func(*rapid.T){
			"apply": func(t *rapid.T) {
				changes := rapid.SliceOfN(change, 1, 8).Draw(t, "changes")
				if err := s.Apply(changes...); err != nil {
					t.Fatal(err)
				}
				for _, c := range changes {
					if c.Value == nil {
						delete(model, c.Bucket+"/"+c.Key)
					} else {
						model[c.Bucket+"/"+c.Key] = string(c.Value)
					}
				}
			},
			"reopen": func(t *rapid.T) {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if s, err = Open(dir); err != nil {
					t.Fatal(err)
				}
			},
			"": func(t *rapid.T) {
				got := make(map[string]string)
				for _, b := range buckets {
					if err := s.Load(b, func(k string, v []byte) error { got[b+"/"+k] = string(v); return nil }); err != nil {
						t.Fatal(err)
					}
				}
				if !maps.Equal(got, model) {
					t.Fatalf("got %d values, want %d", len(got), len(model))
				}
			},
		})
	})
}

func TestConcurrentCallers(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	const callers, rounds = 64, 10
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for r := range rounds {
				key := fmt.Sprintf("%d-%d", c, r)
				if err := s.Apply(Change{"b", key, []byte(key)}, Change{"last", fmt.Sprint(c), []byte(key)}); err != nil {
					t.Error(err)
				}
				if err := s.Load("last", func(string, []byte) error { return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, dir)
	if got := len(content(t, s, "b")); got != callers*rounds {
		t.Errorf("%d values, want %d", got, callers*rounds)
	}
	for k, v := range content(t, s, "last") {
		if want := fmt.Sprintf("%s-%d", strings.TrimPrefix(k, "last/"), rounds-1); v != want {
			t.Errorf("%s = %s, want %s", k, v, want)
		}
	}
}

// One caller's failure is nobody else's, also when they are written together.
func TestGroupFailsOneByOne(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	good := &request{changes: []Change{{"b", "good", []byte("v")}}}
	bad := &request{changes: []Change{{"b", "", []byte("v")}}}
	s.settle([]*request{good, bad})
	if good.err != nil || bad.err == nil || !good.done || !bad.done {
		t.Errorf("good: %v, bad: %v", good.err, bad.err)
	}
	if got := content(t, s, "b"); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

func TestCommitThatFailsBeforeItShows(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	s.commit = func(tx *bbolt.Tx) error { return errors.Join(syscall.ENOSPC, tx.Rollback()) }
	err := s.Apply(Change{"b", "k", []byte("v")})
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free some space") || !strings.Contains(err.Error(), s.Path()) {
		t.Errorf("error %v", err)
	}
	s.commit = (*bbolt.Tx).Commit
	if err := s.Apply(Change{"b", "later", []byte("v")}); err != nil {
		t.Errorf("after the cause is gone: %v", err)
	}
	if got := content(t, s, "b"); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

// After an fsync that failed, what the kernel shows need not be on the disk, and a second fsync would not tell.
func TestCommitThatFailsAfterItShows(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	s.commit = func(tx *bbolt.Tx) error { return errors.Join(tx.Commit(), syscall.EIO) }
	if err := s.Failed(); err != nil {
		t.Errorf("before there is trouble: %v", err)
	}
	if err := s.Apply(Change{"b", "k", []byte("v")}); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "restart dockway") {
		t.Errorf("error %v", err)
	}
	s.commit = (*bbolt.Tx).Commit
	if err := s.Apply(Change{"b", "later", []byte("v")}); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "restart dockway") {
		t.Errorf("error %v", err)
	}
	if err := s.Failed(); err == nil || !strings.Contains(err.Error(), s.Path()) || !strings.Contains(err.Error(), "restart dockway: ") || !strings.Contains(err.Error(), "input/output error; look for disk errors") {
		t.Errorf("it says %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, dir).Apply(Change{"b", "later", []byte("v")}); err != nil {
		t.Errorf("after reopening: %v", err)
	}
}

// A file that is cut short while it is open faults in the memory that it is mapped to: an error, not the end of the process.
func TestFileCutShortWhileOpen(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	if err := s.Apply(Change{"b", "k", make([]byte, 10000)}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.Path(), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Load("b", func(string, []byte) error { return nil }); err == nil {
			t.Error("loaded from an empty file")
		}
	}
	if err := s.Failed(); err == nil || !strings.Contains(err.Error(), "restart dockway") {
		t.Errorf("it says %v", err)
	}
}

func BenchmarkApply(b *testing.B) {
	s := mustOpen(b, b.TempDir())
	value := make([]byte, 200)
	for n := 0; b.Loop(); n++ {
		if err := s.Apply(Change{"b", fmt.Sprint(n % 10000), value}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkApplyParallel(b *testing.B) {
	s := mustOpen(b, b.TempDir())
	value := make([]byte, 200)
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for n := 0; pb.Next(); n++ {
			if err := s.Apply(Change{"b", fmt.Sprint(n % 10000), value}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
