package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// lockWait is how long Open waits for another process to let go of the record: a dockway that is being stopped
	// ends within that time.
	lockWait = 2 * time.Second

	newSuffix = ".new-"
)

// Open opens the record in a directory, and makes both when there is none. A record that is damaged, newer, in use, or
// that cannot be written is refused with an error that names the file, what is wrong and what to do; IsDamaged, IsNewer and
// IsInUse tell these apart. Open never changes a record that it refuses.
func Open(dir string) (*Store, error) {
	path := filepath.Join(dir, FileName)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the record %s: %w%s", path, err, remedy(err))
	}
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		if err := create(path); err != nil {
			return nil, fmt.Errorf("creating the record %s: %w%s", path, err, remedy(err))
		}
	}
	db, err := open(path, openChecked)
	switch {
	case errors.Is(err, damaged):
		return nil, fmt.Errorf("the record %s is %w: dockway does not start on it, so that nothing is lost unnoticed; "+
			"put a backup in its place, or move it away (mv %s %s.damaged): dockway then starts with an empty record, "+
			"and the networks, endpoints, published ports and address pools in the damaged one must be created anew",
			path, err, path, path)
	case errors.Is(err, newer):
		return nil, fmt.Errorf("the record %s is %w: run that dockway or a later one, or move the file away (mv %s %s.newer) "+
			"and create the networks and address pools in it anew", path, err, path, path)
	case errors.Is(err, inUse):
		return nil, fmt.Errorf("the record %s is %w: stop it first, or give this one another state directory", path, err)
	case err != nil:
		return nil, fmt.Errorf("opening the record %s: %w%s", path, err, remedy(err))
	}
	if leftovers, err := filepath.Glob(path + newSuffix + "*"); err == nil {
		for _, l := range leftovers {
			_ = os.Remove(l) // what a crash in create left; in nobody's way
		}
	}
	return &Store{path: path, db: db, commit: (*bbolt.Tx).Commit}, nil
}

func open(path string, file func(string, int, os.FileMode) (*os.File, error)) (db *bbolt.DB, err error) {
	err = guarded(func() error {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: lockWait,
			// The list of free pages is found at every start by walking the tree, which the check needs to do anyway;
			// not to write it saves a write a transaction and leaves one thing less that can be damaged.
			NoFreelistSync: true,
			FreelistType:   bbolt.FreelistMapType,
			OpenFile:       file,
		})
		return err
	})
	return db, err
}

// create makes an empty record so that at every moment there is either a whole one at path or none.
func create(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newSuffix+"*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := open(f.Name(), nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(headBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(headKey), head{}.seal())
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	// A link, unlike a rename, fails when another dockway was faster.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openChecked opens and locks the record and checks all of it with plain reads, before bbolt maps it into memory:
// bbolt trusts its pages, and a damaged one can end the process beyond recovery.
func openChecked(path string, flag int, mode os.FileMode) (_ *os.File, err error) {
	f, err := os.OpenFile(path, flag&^os.O_CREATE, mode)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("it is not a file"))
	}
	if err := lock(f); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	return f, check(data)
}

// lock takes the lock that bbolt takes as well, on the same open file, so that nobody writes between check and use.
func lock(f *os.File) error {
	deadline := time.NewTimer(lockWait)
	defer deadline.Stop()
	again := time.NewTicker(lockWait / 100)
	defer again.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-again.C:
		case <-deadline.C:
			return inUse
		}
	}
}
