package main

import (
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
)

// bareRules are the least netlink for a container's rules: what guards its port in one
// transaction, and what publishes one TCP port in another.
type bareRules struct {
	conn  *nftables.Conn
	table *nftables.Table
	guard [4]*nftables.Set
	ports *nftables.Set
}

// newBareRules makes a table with sets of the shapes that dockway's have. No rule reads them.
func newBareRules() (*bareRules, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, err
	}
	b := &bareRules{conn: conn, table: conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "bare"})}
	link, mac, addr := nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	for i, key := range [][]nftables.SetDatatype{{addr}, {link, addr}, {link, mac}, {link, mac, addr}} {
		b.guard[i] = &nftables.Set{Table: b.table, Name: string(rune('a' + i)), KeyType: nftables.MustConcatSetType(key...), Concatenation: len(key) > 1}
		if err := conn.AddSet(b.guard[i], nil); err != nil {
			return nil, err
		}
	}
	b.ports = &nftables.Set{
		Table: b.table, Name: "ports", IsMap: true, Concatenation: true,
		KeyType: nftables.MustConcatSetType(proto, port), DataType: nftables.MustConcatSetType(addr, port),
	}
	if err := conn.AddSet(b.ports, nil); err != nil {
		return nil, err
	}
	return b, conn.Flush()
}

// add puts the elements of one more container.
func (b *bareRules) add(i int) (time.Duration, error) {
	link := make([]byte, 16)
	copy(link, "bh")
	copy(link[2:], binaryutil.BigEndian.PutUint32(uint32(i)))
	mac := append(append([]byte{2, 0}, binaryutil.BigEndian.PutUint32(uint32(i))...), 0, 0)
	addr := netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)}).AsSlice()
	join := func(parts ...[]byte) (key []byte) {
		for _, p := range parts {
			key = append(key, p...)
		}
		return key
	}
	port := append(binaryutil.BigEndian.PutUint16(uint16(20000+i)), 0, 0)
	start := time.Now()
	for set, key := range map[*nftables.Set][]byte{
		b.guard[0]: addr, b.guard[1]: join(link, addr), b.guard[2]: join(link, mac), b.guard[3]: join(link, mac, addr),
	} {
		if err := b.conn.SetAddElements(set, []nftables.SetElement{{Key: key}}); err != nil {
			return 0, err
		}
	}
	// The address that a container probes for others with.
	if err := b.conn.SetAddElements(b.guard[3], []nftables.SetElement{{Key: join(link, mac, make([]byte, 4))}}); err != nil {
		return 0, err
	}
	if err := b.conn.Flush(); err != nil {
		return 0, err
	}
	published := nftables.SetElement{Key: join([]byte{6, 0, 0, 0}, port), Val: join(addr, []byte{0, 80, 0, 0})}
	if err := b.conn.SetAddElements(b.ports, []nftables.SetElement{published}); err != nil {
		return 0, err
	}
	if err := b.conn.Flush(); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// remove takes the table away.
func (b *bareRules) remove() error {
	b.conn.DelTable(b.table)
	return b.conn.Flush()
}
