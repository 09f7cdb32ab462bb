package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// The table of a bridge is a hash of MACs. One that is full refuses more, which then go slowly.
const (
	tableName = "dwfast"
	leaseName = "dwfast_lease"
	maxMACs   = 1 << 16 // 1 MiB of buckets; entries are allocated as they come
	keySize   = 8       // a MAC and two bytes of zero
)

// How a MAC is reached.
const (
	reach4      = 1 << iota // it may send and get IPv4
	reach6                  // and IPv6
	reachRemote             // by a VXLAN device or an uplink, not a port
)

// Where an entry has what, in bytes. The IPv6 source is there twice if there is only one.
const (
	linkAt    = 0
	reachAt   = 4
	source4At = 8
	source6At = 16
	heardAt   = 16 // of one behind an uplink, in place of the sources
	entrySize = 48
	sources6  = 2
)

// An entry says behind which link a MAC is and, for a port, what it may send as; for an uplink, when the
// bridge last had a frame of it.
type entry struct {
	link    uint32
	reach   uint32
	source4 netip.Addr
	source6 []netip.Addr
	heard   uint64 // nanoseconds of CLOCK_MONOTONIC
}

// portEntry is a container's.
func portEntry(link uint32, addresses []netip.Addr) (entry, error) {
	e := entry{link: link}
	for _, a := range addresses {
		switch {
		case !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6():
			return e, fmt.Errorf("%s is no container's address", a)
		case a.Is6():
			e.source6 = append(e.source6, a.WithZone(""))
			e.reach |= reach6
		case e.source4.IsValid():
			return e, fmt.Errorf("two IPv4 addresses, %s and %s: the fast path knows one of a port", e.source4, a)
		default:
			e.source4 = a
			e.reach |= reach4
		}
	}
	if len(e.source6) > sources6 {
		return e, fmt.Errorf("%d IPv6 addresses: the fast path knows %d of a port", len(e.source6), sources6)
	}
	return e, nil
}

func (e entry) bytes() (b [entrySize]byte) {
	binary.NativeEndian.PutUint32(b[linkAt:], e.link)
	binary.NativeEndian.PutUint32(b[reachAt:], e.reach)
	if e.reach&reachRemote != 0 {
		binary.NativeEndian.PutUint64(b[heardAt:], e.heard)
		return b
	}
	if e.source4.IsValid() {
		copy(b[source4At:], e.source4.AsSlice())
	}
	for i := range sources6 {
		if n := len(e.source6); n > 0 {
			copy(b[source6At+16*i:], e.source6[min(i, n-1)].AsSlice())
		}
	}
	return b
}

func readEntry(b [entrySize]byte) entry {
	e := entry{link: binary.NativeEndian.Uint32(b[linkAt:]), reach: binary.NativeEndian.Uint32(b[reachAt:])}
	if e.reach&reachRemote != 0 {
		return e
	}
	if e.reach&reach4 != 0 {
		e.source4 = netip.AddrFrom4([4]byte(b[source4At : source4At+4]))
	}
	if e.reach&reach6 != 0 {
		first, second := netip.AddrFrom16([16]byte(b[source6At:source6At+16])), netip.AddrFrom16([16]byte(b[source6At+16:]))
		e.source6 = []netip.Addr{first}
		if second != first {
			e.source6 = append(e.source6, second)
		}
	}
	return e
}

// addresses are all that a container may send as.
func (e entry) addresses() []netip.Addr {
	if e.source4.IsValid() {
		return append([]netip.Addr{e.source4}, e.source6...)
	}
	return e.source6
}

func keyOf(mac plan.MAC) [keySize]byte {
	var k [keySize]byte
	copy(k[:], mac[:])
	return k
}

func tableSpec() *ebpf.MapSpec {
	return &ebpf.MapSpec{Name: tableName, Type: ebpf.Hash, KeySize: keySize, ValueSize: entrySize, MaxEntries: maxMACs, Flags: unix.BPF_F_NO_PREALLOC}
}

// leaseSpec is until when what is said to be behind an uplink counts, in nanoseconds of CLOCK_MONOTONIC.
func leaseSpec() *ebpf.MapSpec {
	return &ebpf.MapSpec{Name: leaseName, Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
}

// put writes or replaces an entry, at once for all packets.
func put(table *ebpf.Map, mac plan.MAC, e entry) error {
	if mac[0]&1 != 0 || mac == (plan.MAC{}) {
		return fmt.Errorf("%s is no station's MAC", mac)
	}
	err := table.Put(keyOf(mac), e.bytes())
	if errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("MAC %s: %w", mac, ErrFull)
	}
	return err
}

// get looks a MAC up.
func get(table *ebpf.Map, mac plan.MAC) (e entry, there bool, err error) {
	var b [entrySize]byte
	switch err := table.Lookup(keyOf(mac), &b); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return e, false, nil
	case err != nil:
		return e, false, err
	}
	return readEntry(b), true, nil
}

// remove removes a MAC; one that is not there is fine.
func remove(table *ebpf.Map, mac plan.MAC) error {
	if err := table.Delete(keyOf(mac)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// each calls f with all entries of a table. What changes meanwhile may be there or not.
func each(table *ebpf.Map, f func(plan.MAC, entry)) error {
	const most = 4096 // at once; no bucket of the hash has more
	var at ebpf.MapBatchCursor
	keys, values := make([][keySize]byte, most), make([][entrySize]byte, most)
	for {
		n, err := table.BatchLookup(&at, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("list MACs: %w", err)
		}
		for i := range n {
			f(plan.MAC(keys[i][:6]), readEntry(values[i]))
		}
		if err != nil {
			return nil
		}
	}
}
