package facts

import (
	"encoding/binary"
	"net/netip"
)

// The first byte of a message says what it holds, and in which version.
const (
	factsV1  = 0x11
	digestV1 = 0x21
	deltaV1  = 0x31
)

// A fact begins with a byte of these flags; its kind is in the lowest two bits.
const (
	kindMask   = 0x03
	isDeleted  = 0x04
	isIPv6     = 0x08
	hasMAC     = 0x10
	sameScope  = 0x20 // VSID or subnet are those of the fact before
	sameOwner  = 0x40 // owner and epoch are those of the fact before
	factsFlags = kindMask | isDeleted | isIPv6 | hasMAC | sameScope | sameOwner
)

// A mark or a delta has a byte of these flags after the name of the owner.
const (
	isOwn       = 0x01
	isForgotten = 0x02
)

// AppendFacts appends the encoding of facts, as DecodeFacts reads it, to dst: an owner's name once,
// and about 20 bytes a fact (IPv6: 32).
func AppendFacts(dst []byte, fs []Fact) []byte {
	dst = append(dst, factsV1)
	dst = binary.AppendUvarint(dst, uint64(len(fs)))
	var r row
	for _, f := range fs {
		dst = r.append(dst, f)
	}
	return dst
}

// Append appends the encoding of the digest, as DecodeDigest reads it, to dst.
func (d Digest) Append(dst []byte) []byte {
	dst = append(dst, digestV1)
	dst = binary.AppendUvarint(dst, uint64(len(d)))
	for _, m := range d {
		var flags byte
		if m.Own {
			flags |= isOwn
		}
		if m.Forgotten {
			flags |= isForgotten
		}
		dst = append(appendHost(dst, m.Owner), flags)
		dst = binary.AppendUvarint(dst, m.Epoch)
		dst = binary.AppendUvarint(dst, m.Seal)
		dst = appendSpans(dst, m.Known)
	}
	return dst
}

// Append appends the encoding of the delta, as DecodeDelta reads it, to dst.
func (d Delta) Append(dst []byte) []byte {
	dst = appendHost(append(dst, deltaV1), d.Owner)
	dst = binary.AppendUvarint(dst, d.Epoch)
	dst = binary.AppendUvarint(dst, d.Seal)
	dst = binary.AppendUvarint(dst, d.Floor)
	dst = appendSpans(dst, d.Known)
	dst = binary.AppendUvarint(dst, uint64(len(d.Facts)))
	r := rowOf(d.Owner, d.Epoch)
	for _, f := range d.Facts {
		dst = r.append(dst, f)
	}
	return dst
}

func appendHost(dst []byte, h Host) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(h))), h...)
}

// appendSpans appends spans as the gap before each and its length, less the least that they can be.
func appendSpans(dst []byte, all []Span) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(all)))
	next := uint64(1)
	for _, s := range all {
		dst = binary.AppendUvarint(dst, s.First-next)
		dst = binary.AppendUvarint(dst, s.Last-s.First)
		next = s.Last + 2
	}
	return dst
}

// A row is the facts of a message: each is written as its difference from the one before.
type row struct {
	owners []Host          // in the order in which they were named
	index  map[Host]uint64 // of owners, once there are several
	before Fact
}

// rowOf returns a row whose owner and epoch are named already.
func rowOf(owner Host, epoch uint64) row {
	return row{owners: []Host{owner}, before: Fact{Owner: owner, Epoch: epoch}}
}

func (r *row) append(dst []byte, f Fact) []byte {
	flags := byte(f.Kind) & kindMask
	if f.Deleted {
		flags |= isDeleted
	}
	if f.Prefix.Addr().Is6() {
		flags |= isIPv6
	}
	if f.MAC != [6]byte{} {
		flags |= hasMAC
	}
	if f.Kind == r.before.Kind && f.VSID == r.before.VSID && f.Subnet == r.before.Subnet {
		flags |= sameScope
	}
	if len(r.owners) > 0 && f.Owner == r.before.Owner && f.Epoch == r.before.Epoch {
		flags |= sameOwner
	}
	dst = append(dst, flags)
	if flags&sameOwner == 0 {
		dst = binary.AppendUvarint(r.appendOwner(dst, f.Owner), f.Epoch)
	}
	if flags&sameScope == 0 {
		if f.Kind == Block {
			dst = appendPrefix(dst, f.Subnet)
		} else {
			dst = binary.AppendUvarint(dst, uint64(f.VSID))
		}
	}
	if f.Kind == Block {
		dst = appendPrefix(dst, f.Prefix)
	} else {
		dst = appendAddr(dst, f.Prefix.Addr())
	}
	if flags&hasMAC != 0 {
		dst = append(dst, f.MAC[:]...)
	}
	dst = binary.AppendVarint(dst, int64(f.Counter-r.before.Counter))
	dst = binary.AppendVarint(dst, int64(f.Clock-r.before.Clock))
	r.before = f
	return dst
}

// appendOwner appends the number of an owner; a new one's name follows it.
func (r *row) appendOwner(dst []byte, h Host) []byte {
	i, known := r.index[h]
	if !known {
		if r.index == nil {
			r.index = map[Host]uint64{}
		}
		i = uint64(len(r.owners))
		r.index[h] = i
		r.owners = append(r.owners, h)
		return appendHost(binary.AppendUvarint(dst, i), h)
	}
	return binary.AppendUvarint(dst, i)
}

func appendPrefix(dst []byte, p netip.Prefix) []byte {
	return appendAddr(append(dst, byte(p.Bits())), p.Addr())
}

func appendAddr(dst []byte, a netip.Addr) []byte {
	if a.Is4() {
		b := a.As4()
		return append(dst, b[:]...)
	}
	b := a.As16()
	return append(dst, b[:]...)
}
