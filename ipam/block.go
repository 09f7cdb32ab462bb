package ipam

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"sort"
)

// blockBits is the length of the blocks that the range of a shared pool is cut into: three eighths of its host bits, rounded
// down, number the addresses of a block, and the others the blocks. So a /16 has 1,024 blocks of /26, a /24 has 32 of /29,
// a /64 has 2^40 of /104, and what is smaller than a /29 has blocks of one address.
func blockBits(r netip.Prefix) int {
	host := r.Addr().BitLen() - r.Bits()
	return r.Addr().BitLen() - host*3/8
}

// blockCount is how many blocks a range has, as text.
func blockCount(r netip.Prefix) string {
	bits := blockBits(r) - r.Bits()
	if bits > 20 {
		return fmt.Sprintf("2^%d", bits)
	}
	return fmt.Sprint(1 << bits)
}

// place is where in a range a host looks for a block, having been refused so many: each time at another place, which is
// the host's own, so that two hosts which got into each other's way part.
func place(seed string, r netip.Prefix, refused int) netip.Addr {
	sum := sha256.Sum256(fmt.Appendf(nil, "dockway block of %s for %s, refused %d times", r, seed, refused))
	b := r.Addr().AsSlice()
	for bit := r.Bits(); bit < blockBits(r); bit++ {
		b[bit/8] |= sum[bit/8] & (0x80 >> (bit % 8))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// freeBlock returns the first block of the range, all around from a place on, that overlaps nothing in a set and has
// addresses to give.
func (p *pool) freeBlock(from netip.Addr, avoid prefixes) (netip.Prefix, bool) {
	size := blockBits(p.inner)
	for _, start := range []netip.Addr{from, p.inner.Addr()} {
		b, ok := avoid.free(p.inner, size, start)
		for ok && p.room(prefixes{b}) == 0 {
			b, ok = avoid.free(p.inner, size, lastAddr(b).Next())
		}
		if ok {
			return b, true
		}
	}
	return netip.Prefix{}, false
}

// room is how many addresses of the range are in a set and not held.
func (p *pool) room(set prefixes) uint64 {
	var n uint64
	for _, b := range set {
		first, last := b.Addr(), lastAddr(b)
		if first.Compare(p.first) < 0 {
			first = p.first
		}
		if last.Compare(p.last) > 0 {
			last = p.last
		}
		if first.Compare(last) <= 0 {
			n += count(first, last)
		}
	}
	for a, g := range p.grants {
		if g.freed == nil && p.contains(a) && set.contains(a) {
			n--
		}
	}
	return n
}

// chooseOwn returns the address whose turn it is among those of this host's blocks that no other host has, and where to go
// on looking for unused ones after it.
func (p *pool) chooseOwn(own, others prefixes) (a, next netip.Addr, ok bool) {
	a = p.unusedOwn(p.next, own, others)
	if !a.IsValid() {
		a = p.unusedOwn(p.first, own, others) // in a newer block, or one that was forgotten
	}
	if a.IsValid() {
		if a == p.last {
			return a, netip.Addr{}, true
		}
		return a, a.Next(), true
	}
	for e := p.freed.Front(); e != nil; e = e.Next() {
		if a := e.Value.(netip.Addr); own.contains(a) && !others.contains(a) {
			return a, netip.Addr{}, true
		}
	}
	return netip.Addr{}, p.next, false
}

// unusedOwn returns the first address of own blocks not before a, if any, that is neither held nor remembered as freed.
func (p *pool) unusedOwn(a netip.Addr, own, others prefixes) netip.Addr {
	for a.IsValid() && p.contains(a) {
		block, ok := own.from(a)
		if !ok {
			break
		}
		if !block.Contains(a) {
			a = block.Addr()
			continue
		}
		if other, ok := others.overlap(single(a)); ok {
			a = lastAddr(other).Next()
			continue
		}
		if p.grants[a] == nil {
			return a
		}
		a = a.Next()
	}
	return netip.Addr{}
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func (s prefixes) contains(a netip.Addr) bool {
	_, ok := s.overlap(single(a))
	return ok
}

// from returns the first prefix of the set that does not end before a.
func (s prefixes) from(a netip.Addr) (netip.Prefix, bool) {
	i := sort.Search(len(s), func(i int) bool { return lastAddr(s[i]).Compare(a) >= 0 })
	if i == len(s) {
		return netip.Prefix{}, false
	}
	return s[i], true
}

// meeting returns those of a list that overlap the set.
func (s prefixes) meeting(list []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range list {
		if _, ok := s.overlap(p); ok {
			all = append(all, p)
		}
	}
	return all
}
