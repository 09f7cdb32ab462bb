package facts

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// The least bytes that things have when encoded. A length of a list is believed only if the bytes
// that are left could hold it, so that decoding allocates in proportion to what has come.
const (
	leastFact = 1 + 4 + 1 + 1     // flags, address, counter and clock
	leastMark = 2 + 1 + 1 + 1 + 1 // name, flags, epoch, seal and spans
	leastSpan = 1 + 1             // gap and length
)

// DecodeFacts reads what AppendFacts has written. It returns an error for anything else, and for
// facts that no host can state, and allocates in proportion to the length of b.
func DecodeFacts(b []byte) ([]Fact, error) {
	r := reader{left: b}
	r.begin(factsV1)
	n := r.length(leastFact)
	fs := make([]Fact, 0, n)
	var row row
	for range n {
		fs = append(fs, r.fact(&row))
		if r.err != nil {
			break
		}
	}
	if err := r.end(); err != nil {
		return nil, fmt.Errorf("decode facts: %w", err)
	}
	return fs, nil
}

// DecodeDigest reads what [Digest.Append] has written, as DecodeFacts does with facts.
func DecodeDigest(b []byte) (Digest, error) {
	r := reader{left: b}
	r.begin(digestV1)
	n := r.length(leastMark)
	d := make(Digest, 0, n)
	for i := range n {
		d = append(d, r.mark())
		if r.err == nil && i > 0 && d[i-1].compare(d[i]) >= 0 {
			r.fail(fmt.Errorf("owner %q in epoch %d is out of order", string(d[i].Owner), d[i].Epoch))
		}
		if r.err != nil {
			break
		}
	}
	if err := r.end(); err != nil {
		return nil, fmt.Errorf("decode digest: %w", err)
	}
	return d, nil
}

// DecodeDelta reads what [Delta.Append] has written, as DecodeFacts does with facts.
func DecodeDelta(b []byte) (Delta, error) {
	r := reader{left: b}
	r.begin(deltaV1)
	d := Delta{Owner: r.host(), Epoch: r.number(), Seal: r.number(), Floor: r.number(), Known: r.spans()}
	n := r.length(leastFact)
	if n > 0 {
		d.Facts = make([]Fact, 0, n)
	}
	row := rowOf(d.Owner, d.Epoch)
	for range n {
		d.Facts = append(d.Facts, r.fact(&row))
		if r.err != nil {
			break
		}
	}
	err := r.end()
	if err == nil {
		err = d.check()
	}
	if err != nil {
		return Delta{}, fmt.Errorf("decode delta: %w", err)
	}
	return d, nil
}

// A reader takes a message apart. After the first error it returns zeroes.
type reader struct {
	left []byte
	err  error
}

var errShort = errors.New("the message ends too early")

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.left = nil
}

// begin reads the first byte.
func (r *reader) begin(version byte) {
	if got := r.byte(); r.err == nil && got != version {
		r.fail(fmt.Errorf("the message begins with %#x: only %#x is understood", got, version))
	}
}

// end returns the first error; it is one if anything is left.
func (r *reader) end() error {
	if r.err == nil && len(r.left) > 0 {
		r.fail(fmt.Errorf("%d bytes follow the message", len(r.left)))
	}
	return r.err
}

func (r *reader) bytes(n int) []byte {
	if n > len(r.left) {
		r.fail(errShort)
		return make([]byte, n)
	}
	b := r.left[:n]
	r.left = r.left[n:]
	return b
}

func (r *reader) byte() byte { return r.bytes(1)[0] }

// number reads a number up to maxNumber.
func (r *reader) number() uint64 {
	v, n := binary.Uvarint(r.left)
	switch {
	case n == 0:
		r.fail(errShort)
		return 0
	case n < 0 || v > maxNumber:
		r.fail(errors.New("a number is above 2^63-1"))
		return 0
	}
	r.left = r.left[n:]
	return v
}

// length reads how many things follow that have at least so many bytes each.
func (r *reader) length(least int) int {
	n := r.number()
	if n > uint64(len(r.left)/least) {
		r.fail(fmt.Errorf("%d items are announced where %d bytes follow", n, len(r.left)))
		return 0
	}
	return int(n)
}

// after reads a number as its difference from another one.
func (r *reader) after(before uint64) uint64 {
	diff, n := binary.Varint(r.left)
	if n == 0 {
		r.fail(errShort)
		return 0
	}
	v := int64(before) + diff
	if n < 0 || v < 0 || diff < 0 != (v < int64(before)) {
		r.fail(errors.New("a number is not from 0 to 2^63-1"))
		return 0
	}
	r.left = r.left[n:]
	return uint64(v)
}

func (r *reader) host() Host {
	n := r.length(1)
	if n > maxHost {
		r.fail(fmt.Errorf("host name of %d bytes: it must have 1 to %d", n, maxHost))
		return ""
	}
	h := Host(r.bytes(n))
	if err := h.Valid(); err != nil {
		r.fail(err)
		return ""
	}
	return h
}

func (r *reader) spans() []Span {
	n := r.length(leastSpan)
	if n == 0 {
		return nil
	}
	all := make([]Span, 0, n)
	next := uint64(1)
	for range n {
		first := next + r.number()
		last := first + r.number()
		if first > maxNumber || last > maxNumber {
			r.fail(errors.New("a counter is above 2^63-1"))
		}
		if r.err != nil {
			return nil
		}
		all = append(all, Span{first, last})
		next = last + 2
	}
	return all
}

func (r *reader) mark() Mark {
	m := Mark{Owner: r.host()}
	flags := r.byte()
	m.Own, m.Forgotten = flags&isOwn != 0, flags&isForgotten != 0
	if flags&^(isOwn|isForgotten) != 0 {
		r.fail(fmt.Errorf("flags %#x of an owner are unknown", flags))
	}
	m.Epoch, m.Seal, m.Known = r.number(), r.number(), r.spans()
	return m
}

// fact reads the next fact of a row.
func (r *reader) fact(row *row) Fact {
	flags := r.byte()
	if flags&^factsFlags != 0 {
		r.fail(fmt.Errorf("flags %#x of a fact are unknown", flags))
	}
	before := row.before
	f := Fact{Key: Key{Kind: Kind(flags & kindMask)}, Deleted: flags&isDeleted != 0}
	if flags&sameOwner != 0 {
		f.Owner, f.Epoch = before.Owner, before.Epoch
		if len(row.owners) == 0 {
			r.fail(errors.New("the first fact names no owner"))
		}
	} else {
		f.Owner, f.Epoch = r.owner(row), r.number()
	}
	switch {
	case flags&sameScope != 0:
		f.VSID, f.Subnet = before.VSID, before.Subnet
	case f.Kind == Block:
		f.Subnet = r.prefix(flags)
	default:
		f.VSID = uint32(min(r.number(), maxVSID+1))
	}
	if f.Kind == Block {
		f.Prefix = r.prefix(flags)
	} else {
		addr := r.addr(flags)
		f.Prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if flags&hasMAC != 0 {
		f.MAC = [6]byte(r.bytes(6))
	}
	f.Counter, f.Clock = r.after(before.Counter), r.after(before.Clock)
	if r.err == nil {
		r.err = f.valid(flags&hasMAC != 0)
	}
	row.before = f
	return f
}

// valid returns an error unless a host can have stated the fact.
func (f Fact) valid(mac bool) error {
	if err := f.Key.Valid(); err != nil {
		return err
	}
	switch {
	case f.Counter == 0:
		return fmt.Errorf("fact of %v: counter 0", f.Prefix)
	case mac && (f.Kind != Endpoint || f.Deleted):
		return fmt.Errorf("fact of %v: only an endpoint that stands has a MAC", f.Prefix)
	}
	return nil
}

// owner reads the number of an owner, and the name of a new one.
func (r *reader) owner(row *row) Host {
	switch i := r.number(); {
	case i < uint64(len(row.owners)):
		return row.owners[i]
	case i > uint64(len(row.owners)):
		r.fail(fmt.Errorf("owner %d is not named", i))
		return ""
	}
	h := r.host()
	row.owners = append(row.owners, h)
	return h
}

func (r *reader) prefix(flags byte) netip.Prefix {
	bits := int(r.byte())
	return netip.PrefixFrom(r.addr(flags), bits)
}

func (r *reader) addr(flags byte) netip.Addr {
	if flags&isIPv6 != 0 {
		return netip.AddrFrom16([16]byte(r.bytes(16)))
	}
	return netip.AddrFrom4([4]byte(r.bytes(4)))
}
