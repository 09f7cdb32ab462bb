package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"syscall"
)

// condition is what is wrong with a record, for callers that decide on it.
type condition string

func (c condition) Error() string { return string(c) }

const (
	damaged condition = "damaged"
	newer   condition = "written by a newer dockway"
	inUse   condition = "in use: another dockway runs on it"
	faulted condition = "the record cannot be read any more, restart dockway"
)

// IsDamaged reports whether the record, or a value in it, is not what was written.
func IsDamaged(err error) bool { return errors.Is(err, damaged) }

// IsNewer reports whether the record is in a format of a later dockway.
func IsNewer(err error) bool { return errors.Is(err, newer) }

// IsInUse reports whether another process holds the record.
func IsInUse(err error) bool { return errors.Is(err, inUse) }

// remedy says what to do about an error of the file system.
func remedy(err error) string {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "; free some space on that file system"
	case errors.Is(err, syscall.EROFS):
		return "; mount that file system read-write"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "; dockway must be allowed to read and write it"
	case errors.Is(err, syscall.EIO):
		return "; look for disk errors in the kernel's log"
	}
	return ""
}

// guarded calls f and makes an error of a panic, among them the fault that a memory-mapped file causes when the disk below
// it fails or somebody cuts it short.
func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", faulted, r)
		}
	}()
	return f()
}

// guarded calls f, which uses the database. After a panic bbolt may hold its locks for ever, so it is not called again.
func (s *Store) guarded(f func() error) error {
	if s.faulted.Load() {
		return faulted
	}
	err := guarded(f)
	if errors.Is(err, faulted) {
		s.faulted.Store(true)
	}
	return err
}
