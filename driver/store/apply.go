package store

import (
	"errors"
	"fmt"

	"go.etcd.io/bbolt"
)

// request is one caller's changes on their way to the disk.
type request struct {
	changes []Change
	done    bool
	err     error
}

// Apply makes the changes, all of them or none, and returns when they are on the disk. Changes to one key take effect in
// the order given, concurrent calls in any order. After an error the record is as it was before the call, and later calls
// succeed once the cause is gone; only when the disk failed so that nobody can know what is on it do all later calls fail,
// until the record is opened anew.
func (s *Store) Apply(changes ...Change) error {
	r := &request{changes: changes}
	for _, c := range changes {
		if c.Bucket == "" || c.Bucket == headBucket || c.Key == "" || len(c.Key) > bbolt.MaxKeySize || len(c.Value) > bbolt.MaxValueSize-sealSize {
			return fmt.Errorf("bucket %q, key %q, %d bytes: not a change that can be recorded", c.Bucket, c.Key, len(c.Value))
		}
	}
	s.mu.Lock()
	s.waiting = append(s.waiting, r)
	s.mu.Unlock()

	// Whoever writes next writes for all that wait: one transaction costs two fsyncs, however much is in it.
	s.writing.Lock()
	defer s.writing.Unlock()
	if !r.done {
		s.mu.Lock()
		group := s.waiting
		s.waiting = nil
		s.mu.Unlock()
		s.settle(group)
	}
	if r.err != nil {
		return fmt.Errorf("recording %d changes in %s: %w%s", len(changes), s.path, r.err, remedy(r.err))
	}
	return nil
}

// settle writes a group in one transaction and, if that fails, each of it alone, so that none fails for another's sake.
func (s *Store) settle(group []*request) {
	err := s.write(group...)
	for _, r := range group {
		if r.done, r.err = true, err; err != nil && len(group) > 1 {
			r.err = s.write(r)
		}
	}
}

func (s *Store) write(group ...*request) error {
	if s.closed {
		return errors.New("the record is closed")
	}
	if s.failed != nil {
		return fmt.Errorf("not written since an earlier failure, restart dockway: %w", s.failed)
	}
	var id int
	err := s.guarded(func() error {
		tx, err := s.db.Begin(true)
		if err != nil {
			return err
		}
		id = tx.ID()
		changed, err := change(tx, group)
		if err != nil || !changed {
			return errors.Join(err, tx.Rollback())
		}
		return s.commit(tx)
	})
	if err != nil && s.visible(id) {
		// The last fsync failed: the change may or may not be on the disk, and the kernel says so only once.
		s.mu.Lock()
		s.failed = err
		s.mu.Unlock()
		return fmt.Errorf("nobody knows whether it is on the disk, restart dockway: %w", err)
	}
	return err
}

// Failed tells why the record takes no more changes, and what to do; nil: it takes them.
func (s *Store) Failed() error {
	s.mu.Lock()
	err := s.failed
	s.mu.Unlock()
	switch {
	case err != nil:
		return fmt.Errorf("the record %s takes no more changes, restart dockway: %w%s", s.path, err, remedy(err))
	case s.faulted.Load():
		return fmt.Errorf("%s: %w", s.path, faulted)
	}
	return nil
}

// visible reports whether the transaction with this id was the last to be written, however its commit ended.
func (s *Store) visible(id int) bool {
	last := 0
	err := s.guarded(func() error {
		return s.db.View(func(tx *bbolt.Tx) error { last = tx.ID(); return nil })
	})
	return err != nil || last >= id
}

// change makes the changes of a group in a transaction and reports whether the record differs for it.
func change(tx *bbolt.Tx, group []*request) (bool, error) {
	own := tx.Bucket([]byte(headBucket))
	h, err := unsealHead(own.Get([]byte(headKey)))
	if err != nil {
		return false, err
	}
	changed := false
	for _, r := range group {
		for _, c := range r.changes {
			bucket, key := []byte(c.Bucket), []byte(c.Key)
			b := tx.Bucket(bucket)
			var old []byte
			if b != nil {
				old = b.Get(key)
			}
			if old == nil && c.Value == nil {
				continue
			}
			changed = true
			if old != nil {
				_, sum, err := unseal(bucket, key, old)
				if err != nil {
					return false, err
				}
				h.remove(sum)
			}
			if c.Value == nil {
				if err := b.Delete(key); err != nil {
					return false, err
				}
				continue
			}
			if b == nil {
				if b, err = tx.CreateBucket(bucket); err != nil {
					return false, err
				}
			}
			sealed := seal(bucket, key, c.Value)
			if err := b.Put(key, sealed); err != nil {
				return false, err
			}
			h.add(checksum(bucket, key, c.Value))
		}
	}
	if !changed {
		return false, nil
	}
	return true, own.Put([]byte(headKey), h.seal())
}
