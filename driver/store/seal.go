package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// version is the format of the record: of the sealed values, and of what the head counts.
const version = 1

const sealSize = 1 + crc32.Size

// checksum covers the place of a value as well as the value, so that one that turns up elsewhere is noticed too.
// It is CRC32C (Castagnoli), as in iSCSI, RFC 3720.
func checksum(bucket, key, value []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(0, table, binary.AppendUvarint([]byte{version}, uint64(len(bucket))))
	sum = crc32.Update(sum, table, bucket)
	sum = crc32.Update(sum, table, binary.AppendUvarint(nil, uint64(len(key))))
	sum = crc32.Update(sum, table, key)
	return crc32.Update(sum, table, value)
}

// seal returns the value as it is stored: the version, the checksum, the value.
func seal(bucket, key, value []byte) []byte {
	sealed := append(make([]byte, 0, sealSize+len(value)), version)
	sealed = binary.BigEndian.AppendUint32(sealed, checksum(bucket, key, value))
	return append(sealed, value...)
}

// unseal returns the value, which aliases sealed, and its checksum.
func unseal(bucket, key, sealed []byte) ([]byte, uint32, error) {
	if len(sealed) < sealSize {
		return nil, 0, fmt.Errorf("%w: the value of %q in bucket %q is cut short", damaged, key, bucket)
	}
	if sealed[0] > version {
		return nil, 0, fmt.Errorf("%w: the value of %q in bucket %q has format %d, this dockway knows %d", newer, key, bucket, sealed[0], version)
	}
	value, sum := sealed[sealSize:], binary.BigEndian.Uint32(sealed[1:])
	if sealed[0] != version || sum != checksum(bucket, key, value) {
		return nil, 0, fmt.Errorf("%w: the value of %q in bucket %q does not match its checksum", damaged, key, bucket)
	}
	return value, sum, nil
}

// The head is the one value that the store keeps for itself.
const (
	headBucket = ".store"
	headKey    = "head"
	headSize   = 16
)

// head tells whether the values in the record are all those that were written: bbolt keeps no checksum of its pages, and a
// page that lost its last elements looks as sound as before.
type head struct {
	count uint64 // of the values
	sum   uint64 // of their checksums
}

func (h *head) add(sum uint32)    { h.count++; h.sum += uint64(sum) }
func (h *head) remove(sum uint32) { h.count--; h.sum -= uint64(sum) }

func (h head) seal() []byte {
	value := binary.BigEndian.AppendUint64(nil, h.count)
	return seal([]byte(headBucket), []byte(headKey), binary.BigEndian.AppendUint64(value, h.sum))
}

func unsealHead(sealed []byte) (head, error) {
	value, _, err := unseal([]byte(headBucket), []byte(headKey), sealed)
	if err != nil {
		return head{}, err
	}
	if len(value) != headSize {
		return head{}, fmt.Errorf("%w: the head has %d bytes, not %d", damaged, len(value), headSize)
	}
	return head{binary.BigEndian.Uint64(value), binary.BigEndian.Uint64(value[8:])}, nil
}
