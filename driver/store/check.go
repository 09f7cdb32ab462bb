package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
)

// The parts of bbolt's file format (version 2) that the check reads. Numbers are in the byte order of the machine.
//
//	page    id 8, flags 2, count 2, overflow 4, then count elements, then the keys and values that they point at
//	meta    (in pages 0 and 1) magic 4, version 4, page size 4, flags 4, root bucket 16, freelist 8, pages 8, txid 8, FNV-1a 8
//	branch  element: position 4, key size 4, page 8
//	leaf    element: flags 4, position 4, key size 4, value size 4; positions count from the element's own start
//	bucket  root page 8, sequence 8; with root 0, a leaf page follows inline
const (
	bboltMagic   = 0xED0CDAED
	bboltVersion = 2

	pageHeaderSize   = 16
	metaSize         = 64
	elementSize      = 16
	bucketHeaderSize = 16

	branchFlag = 0x01
	leafFlag   = 0x02
	metaFlag   = 0x04

	bucketElement = 0x01

	noFreelist = ^uint64(0)
)

func u16(b []byte) uint16 { return binary.NativeEndian.Uint16(b) }
func u32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

type meta struct {
	pageSize          uint32
	root, pages, txid uint64
	freelist          uint64
}

// image is the content of a record's file under check.
type image struct {
	data     []byte
	pageSize uint64
	pages    uint64 // in use or once used: those from 0 up to this one
	seen     map[uint64]bool
}

// check reads the whole of a record's file: the two meta pages, every page of the tree, the order of the keys, every
// value's checksum, and whether any value is missing. It allocates in proportion to the file and never panics.
func check(data []byte) error {
	if len(data) == 0 {
		return fmt.Errorf("%w: the file is empty", damaged)
	}
	m, err := newestMeta(data)
	if err != nil {
		return err
	}
	i := &image{data: data, pageSize: uint64(m.pageSize), pages: m.pages, seen: make(map[uint64]bool)}
	return i.checkRecord(m.root)
}

func newestMeta(data []byte) (meta, error) {
	first, err := readMeta(data, 0, 0)
	if err != nil {
		return meta{}, err
	}
	size := uint64(first.pageSize)
	if size < 1<<10 || size > 1<<24 || size&(size-1) != 0 {
		return meta{}, fmt.Errorf("%w: pages of %d bytes", damaged, size)
	}
	if uint64(len(data))%size != 0 {
		return meta{}, fmt.Errorf("%w: the file is truncated to %d bytes", damaged, len(data))
	}
	// bbolt would go on with one sound meta page. But which one is damaged, the newer or the older? If the newer, changes
	// that were acknowledged would be lost.
	second, err := readMeta(data, size, 1)
	if err != nil {
		return meta{}, err
	}
	newest, older := first, second
	if second.txid > first.txid {
		newest, older = second, first
	}
	switch {
	case second.pageSize != first.pageSize, newest.txid != older.txid+1:
		return meta{}, fmt.Errorf("%w: the two meta pages do not belong together", damaged)
	case uint64(len(data)) < newest.pages*size:
		return meta{}, fmt.Errorf("%w: the file is truncated to %d bytes of at least %d", damaged, len(data), newest.pages*size)
	case newest.freelist != noFreelist:
		return meta{}, fmt.Errorf("%w: it was last written by another program", damaged)
	}
	return newest, nil
}

func readMeta(data []byte, at, page uint64) (meta, error) {
	if uint64(len(data)) < at+pageHeaderSize+metaSize {
		return meta{}, fmt.Errorf("%w: the file is truncated to %d bytes", damaged, len(data))
	}
	header, b := data[at:], data[at+pageHeaderSize:]
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaSize-8])
	switch {
	case u32(b) != bboltMagic:
		return meta{}, fmt.Errorf("%w: meta page %d does not begin as a bbolt file does", damaged, page)
	case u64(b[metaSize-8:]) != sum.Sum64():
		return meta{}, fmt.Errorf("%w: meta page %d does not match its checksum", damaged, page)
	case u32(b[4:]) > bboltVersion:
		return meta{}, fmt.Errorf("%w: bbolt format %d, this dockway knows %d", newer, u32(b[4:]), bboltVersion)
	case u32(b[4:]) != bboltVersion, u64(header) != page, u16(header[8:]) != metaFlag:
		return meta{}, fmt.Errorf("%w: meta page %d is not one", damaged, page)
	}
	m := meta{pageSize: u32(b[8:]), root: u64(b[16:]), freelist: u64(b[32:]), pages: u64(b[40:]), txid: u64(b[48:])}
	if m.txid%2 != page || m.pages < 3 || m.pages > 1<<36 {
		return meta{}, fmt.Errorf("%w: meta page %d is of transaction %d, %d pages", damaged, page, m.txid, m.pages)
	}
	return m, nil
}

// checkRecord checks the tree of buckets and compares what is in it with the head.
func (i *image) checkRecord(root uint64) error {
	var found head
	var sealedHead []byte
	values := func(bucket []byte) visitor {
		return func(key, value []byte, flags uint32) error {
			if flags != 0 {
				return fmt.Errorf("%w: bucket %q has a bucket in it", damaged, bucket)
			}
			_, sum, err := unseal(bucket, key, value)
			if err != nil {
				return err
			}
			if string(bucket) == headBucket {
				sealedHead = value
				return nil
			}
			found.add(sum)
			return nil
		}
	}
	buckets := func(name, value []byte, flags uint32) error {
		if flags != bucketElement || len(value) < bucketHeaderSize {
			return fmt.Errorf("%w: %q is not a bucket", damaged, name)
		}
		if page := u64(value); page != 0 {
			return i.walk(page, new([]byte), nil, values(name))
		}
		return leaf(value[bucketHeaderSize:], new([]byte), nil, values(name))
	}
	if err := i.walk(root, new([]byte), nil, buckets); err != nil {
		return err
	}
	want, err := unsealHead(sealedHead)
	if err != nil {
		return err
	}
	if found != want {
		return fmt.Errorf("%w: it has %d values, %d were written", damaged, found.count, want.count)
	}
	return nil
}

// visitor is given each element of a tree in the order of the keys.
type visitor func(key, value []byte, flags uint32) error

// page returns the bytes of a page with its overflow, which must not have been met before.
func (i *image) page(id uint64) ([]byte, error) {
	if id < 2 || id >= i.pages {
		return nil, fmt.Errorf("%w: a page points at page %d of %d", damaged, id, i.pages)
	}
	p := i.data[id*i.pageSize:]
	overflow := uint64(u32(p[12:]))
	if u64(p) != id || id+overflow >= i.pages {
		return nil, fmt.Errorf("%w: page %d says it is page %d and %d more", damaged, id, u64(p), overflow)
	}
	for n := id; n <= id+overflow; n++ {
		if i.seen[n] {
			return nil, fmt.Errorf("%w: page %d is in two places", damaged, n)
		}
		i.seen[n] = true
	}
	return p[:(overflow+1)*i.pageSize], nil
}

// walk visits the tree below a page. Its keys must come after *last, which it moves on, and before end unless that is nil.
func (i *image) walk(id uint64, last *[]byte, end []byte, visit visitor) error {
	p, err := i.page(id)
	if err != nil {
		return err
	}
	if u16(p[8:]) == leafFlag {
		return leaf(p, last, end, visit)
	}
	count := uint64(u16(p[10:]))
	if u16(p[8:]) != branchFlag || count == 0 || pageHeaderSize+count*elementSize > uint64(len(p)) {
		return fmt.Errorf("%w: page %d is neither branch nor leaf", damaged, id)
	}
	key := func(n uint64) ([]byte, error) {
		at := pageHeaderSize + n*elementSize
		return slice(p, at+uint64(u32(p[at:])), uint64(u32(p[at+4:])))
	}
	for n := range count {
		start, err := key(n)
		if err != nil {
			return err
		}
		// What is below an element begins at its key or after it, and ends before the next one's.
		if bytes.Compare(start, *last) <= 0 {
			return fmt.Errorf("%w: the keys of page %d are out of order", damaged, id)
		}
		below := end
		if n+1 < count {
			if below, err = key(n + 1); err != nil {
				return err
			}
		}
		first := true
		err = i.walk(u64(p[pageHeaderSize+n*elementSize+8:]), last, below, func(k, v []byte, flags uint32) error {
			if first && bytes.Compare(k, start) < 0 {
				return fmt.Errorf("%w: the keys below page %d are out of order", damaged, id)
			}
			first = false
			return visit(k, v, flags)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// leaf visits the elements of a leaf page.
func leaf(p []byte, last *[]byte, end []byte, visit visitor) error {
	if len(p) < pageHeaderSize || u16(p[8:]) != leafFlag {
		return fmt.Errorf("%w: a leaf page is not one", damaged)
	}
	count := uint64(u16(p[10:]))
	if pageHeaderSize+count*elementSize > uint64(len(p)) {
		return fmt.Errorf("%w: a leaf page of %d bytes has %d elements", damaged, len(p), count)
	}
	for n := range count {
		at := pageHeaderSize + n*elementSize
		flags, start, size := u32(p[at:]), at+uint64(u32(p[at+4:])), uint64(u32(p[at+8:]))
		key, err := slice(p, start, size)
		if err != nil {
			return err
		}
		value, err := slice(p, start+size, uint64(u32(p[at+12:])))
		if err != nil {
			return err
		}
		if bytes.Compare(key, *last) <= 0 || end != nil && bytes.Compare(key, end) >= 0 {
			return fmt.Errorf("%w: key %q is out of order", damaged, key)
		}
		*last = key
		if err := visit(key, value, flags); err != nil {
			return err
		}
	}
	return nil
}

func slice(p []byte, start, size uint64) ([]byte, error) {
	if start > uint64(len(p)) || size > uint64(len(p))-start {
		return nil, fmt.Errorf("%w: an element of a page points outside of it", damaged)
	}
	return p[start : start+size], nil
}
