package plan

import (
	"fmt"
	"net/netip"
)

// Namespace is a network namespace of ours. It outlives the process that made it; what is in it goes
// with it.
type Namespace struct{ Name string }

// Within is an object in a namespace of ours, rather than in the host's.
type Within struct {
	Namespace string
	Object
}

// VXLAN is a port of Bridge that carries frames to other hosts (RFC 7348) and floods nothing: FDB
// entries say which host has which MAC, nothing is learnt, and the bridge answers ARP and neighbour
// discovery for its neighbours (neigh_suppress). It is in a namespace of ours, and what it
// encapsulates in the host's. UDP checksums are on.
type VXLAN struct {
	Name     string
	Alias    string // the mark of ownership
	Bridge   string
	VNI      uint32 // 24 bits
	Local    netip.Addr
	Port     uint16 // UDP, of every host
	MTU      int    // of what is encapsulated
	Isolated bool   // cannot reach isolated ports (disable_icc)
	Up       bool
}

// Transit is a pair of links between the host and a namespace of ours, both ends up.
type Transit struct {
	Name      string // in the host
	Alias     string // the mark of ownership, on both ends
	Namespace string
	Peer      string // in the namespace
	MTU       int
	Up        bool // both ends
}

// FDB says behind which port of its bridge a MAC is (a static entry of the bridge), and with VTEP
// also on which host (a permanent entry of the VXLAN device, which the port then is).
type FDB struct {
	Link string
	MAC  MAC
	VTEP netip.Addr // invalid: the port is no VXLAN device
}

// Neighbour is a permanent neighbour entry: the MAC of an address on a link.
type Neighbour struct {
	Link    string
	Address netip.Addr
	MAC     MAC
}

// Shortcut takes TCP and UDP between a port, or with no MAC a VXLAN device or the uplink of an external
// switch, and others of its bridge past the bridge and its rules, by eBPF. It is an acceleration: where the
// kernel has none, it counts as there.
type Shortcut struct {
	Bridge    string
	Link      string
	MAC       MAC           // of the container behind the port; zero: the link is a VXLAN device or an uplink
	Addresses [3]netip.Addr // what the container may send as: one of IPv4, two of IPv6; the rest invalid
}

// Key is the object's in its namespace.
func (w Within) Key() Key {
	k := w.Object.Key()
	k.Namespace = w.Namespace
	return k
}
func (n Namespace) Key() Key { return Key{Kind: KindNamespace, Name: n.Name} }
func (v VXLAN) Key() Key     { return Key{Kind: KindVXLAN, Name: v.Name} }
func (t Transit) Key() Key   { return Key{Kind: KindTransit, Name: t.Name} }
func (f FDB) Key() Key       { return Key{Kind: KindFDB, Name: f.Link + " " + f.MAC.String()} }
func (s Shortcut) Key() Key {
	return Key{Kind: KindShortcut, Name: s.Bridge + " " + s.Link + " " + s.MAC.String()}
}
func (n Neighbour) Key() Key {
	return Key{Kind: KindNeighbour, Name: n.Link + " " + n.Address.String()}
}

func (Namespace) Rank() Rank { return RankNamespace }
func (VXLAN) Rank() Rank     { return RankLink } // after Bridge: kinds of a rank are in alphabetical order
func (Transit) Rank() Rank   { return RankLink }
func (FDB) Rank() Rank       { return RankNeighbour }
func (Neighbour) Rank() Rank { return RankNeighbour }
func (Shortcut) Rank() Rank  { return RankOpen }

func (w Within) Same(o Object) bool {
	other, ok := o.(Within)
	return ok && w.Namespace == other.Namespace && w.Object.Same(other.Object)
}
func (n Namespace) Same(o Object) bool { return n == o }
func (v VXLAN) Same(o Object) bool     { return v == o }
func (t Transit) Same(o Object) bool   { return t == o }
func (f FDB) Same(o Object) bool       { return f == o }
func (n Neighbour) Same(o Object) bool { return n == o }
func (s Shortcut) Same(o Object) bool  { return s == o }

func (w Within) String() string    { return w.Object.String() + " in " + w.Namespace }
func (n Namespace) String() string { return "netns " + n.Name }
func (v VXLAN) String() string {
	return fmt.Sprintf("link %s type vxlan id %d local %s dstport %d nolearning udpcsum master %s neigh_suppress mtu %d%s%s alias %q",
		v.Name, v.VNI, v.Local, v.Port, v.Bridge, v.MTU, flag(v.Isolated, "isolated"), flag(v.Up, "up"), v.Alias)
}
func (t Transit) String() string {
	return fmt.Sprintf("link %s type veth peer %s in %s mtu %d%s alias %q", t.Name, t.Peer, t.Namespace, t.MTU, flag(t.Up, "up"), t.Alias)
}
func (f FDB) String() string {
	text := fmt.Sprintf("fdb %s dev %s master static", f.MAC, f.Link)
	if f.VTEP.IsValid() {
		text += " self dst " + f.VTEP.String()
	}
	return text
}
func (n Neighbour) String() string {
	return fmt.Sprintf("neigh %s lladdr %s dev %s permanent", n.Address, n.MAC, n.Link)
}
func (s Shortcut) String() string {
	text := fmt.Sprintf("shortcut %s of %s", s.Link, s.Bridge)
	if s.MAC != (MAC{}) {
		text += " for " + s.MAC.String()
	}
	for _, a := range s.Addresses {
		if a.IsValid() {
			text += " " + a.String()
		}
	}
	return text
}
