// Package store is the record on disk: values by bucket and key in one bbolt file, changed in transactions that survive
// kill -9, a full disk and a crash of the machine, and checked whole before they are believed again.
//
// It is not for meaning: what the values say is the business of the packages that keep them, and nothing is cached here.
package store

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
)

// FileName is the name of the record in the state directory.
const FileName = "dockway.db"

// Change is one key that is set, or, when Value is nil, deleted. It is an alias of an unnamed type so that packages which
// declare what they need of a store do not have to import this one.
type Change = struct {
	Bucket string // any name but ".store"; made when it is first used
	Key    string // 1 to 32,768 bytes
	Value  []byte // opaque; nil deletes, empty does not
}

// Store is an open record. It is safe for concurrent use.
type Store struct {
	path   string
	db     *bbolt.DB
	commit func(*bbolt.Tx) error // (*bbolt.Tx).Commit, but for tests

	faulted atomic.Bool // bbolt panicked

	mu      sync.Mutex
	waiting []*request // for the next transaction, in the order of arrival
	failed  error      // why nothing more can be written until the record is opened anew; changed by who writes

	writing sync.Mutex // held by who writes; guards closed
	closed  bool
}

// Path returns the record's file.
func (s *Store) Path() string { return s.path }

// Close waits for the transaction under way and closes the record. Closing twice is fine.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.faulted.Load() {
		return nil // the file and its lock go with the process
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing %s: %w", s.path, err)
	}
	return nil
}

// Load calls each for every key of a bucket, in the order of the keys; a bucket never written to has none. The values are
// the caller's to keep. Load sees one moment of the record, and each may call the store. It stops at the first error of
// each, a value that the caller cannot use, and returns it with what to do; a value that is not what was written is an error for which IsDamaged holds.
func (s *Store) Load(bucket string, each func(key string, value []byte) error) error {
	type item struct {
		key   string
		value []byte
	}
	var items []item
	err := s.guarded(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			b := tx.Bucket([]byte(bucket))
			if b == nil {
				return nil
			}
			return b.ForEach(func(k, v []byte) error {
				value, _, err := unseal([]byte(bucket), k, v)
				if err != nil {
					return err
				}
				items = append(items, item{string(k), append([]byte{}, value...)})
				return nil
			})
		})
	})
	if err != nil {
		return fmt.Errorf("reading bucket %q of %s: %w", bucket, filepath.Clean(s.path), err)
	}
	for _, i := range items {
		if err := each(i.key, i.value); err != nil {
			return fmt.Errorf("key %q in bucket %q of %s: %w: it may have been written by another version of dockway: run that one; or put a backup of "+
				"the file in its place, or move it away and create what is on it anew", i.key, bucket, filepath.Clean(s.path), err)
		}
	}
	return nil
}
