package ipam

import (
	"cmp"
	"encoding/binary"
	"math"
	"net/netip"
	"slices"
	"sort"
)

// lastAddr returns the last address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// count returns how many addresses there are from first to last, both included, or the greatest uint64 if there are more.
func count(first, last netip.Addr) uint64 {
	a, b := first.As16(), last.As16()
	high := binary.BigEndian.Uint64(b[:8]) - binary.BigEndian.Uint64(a[:8])
	low := binary.BigEndian.Uint64(b[8:]) - binary.BigEndian.Uint64(a[8:])
	if binary.BigEndian.Uint64(b[8:]) < binary.BigEndian.Uint64(a[8:]) {
		high--
	}
	if high > 0 || low == math.MaxUint64 {
		return math.MaxUint64
	}
	return low + 1
}

// prefixes is a set of addresses: disjoint prefixes in ascending order.
type prefixes []netip.Prefix

// union returns the set of all addresses in the lists.
func union(lists ...[]netip.Prefix) prefixes {
	all := slices.Concat(lists...)
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	// Two prefixes are disjoint or one contains the other, and the greater one comes first.
	set := all[:0]
	for _, p := range all {
		if len(set) == 0 || !set[len(set)-1].Overlaps(p) {
			set = append(set, p)
		}
	}
	return set
}

// overlap returns a prefix of the set that overlaps p.
func (s prefixes) overlap(p netip.Prefix) (netip.Prefix, bool) {
	i := sort.Search(len(s), func(i int) bool { return s[i].Addr().Compare(p.Addr()) > 0 })
	for _, j := range []int{i - 1, i} {
		if j >= 0 && j < len(s) && s[j].Overlaps(p) {
			return s[j], true
		}
	}
	return netip.Prefix{}, false
}

// free returns the first prefix of a size in a range, not before from, that has no address of the set.
func (s prefixes) free(in netip.Prefix, size int, from netip.Addr) (netip.Prefix, bool) {
	for from.IsValid() && in.Contains(from) {
		p := netip.PrefixFrom(from, size).Masked()
		if p.Addr() != from {
			from = lastAddr(p).Next()
			continue
		}
		other, overlaps := s.overlap(p)
		if !overlaps {
			return p, true
		}
		if other.Bits() > size {
			other = p
		}
		from = lastAddr(other).Next()
	}
	return netip.Prefix{}, false
}
