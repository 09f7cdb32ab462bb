// Package plan describes kernel state as data: what is wanted, what was observed, and the
// operations that lead from one to the other. It neither reads nor changes anything.
package plan

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/dockway/dockway/driver/plan/nft"
)

// Object is one thing in the kernel (or, for HostPort, one socket of ours). Objects are
// comparable structs.
type Object interface {
	// Key identifies the object: the kernel can hold only one with this key.
	Key() Key
	// Rank says when in a change the object's turn comes.
	Rank() Rank
	// Same reports whether the observed object of the same key needs no change.
	Same(observed Object) bool
	// String is one line in the words of ip(8), nft(8) or sysctl(8).
	String() string
}

// Key is an object's kind and its name within the kind, and the namespace that it is in.
type Key struct {
	Kind      Kind
	Name      string
	Namespace string // one of ours; empty: the host's
}

func (k Key) String() string {
	if k.Namespace != "" {
		return string(k.Kind) + " " + k.Name + " in " + k.Namespace
	}
	return string(k.Kind) + " " + k.Name
}

// Kind is one of the handful of things that a plan can hold.
type Kind string

// The kinds.
const (
	KindNamespace Kind = "namespace"
	KindTable     Kind = "table"
	KindAdmit     Kind = "admit"
	KindVLAN      Kind = "vlan"
	KindSwitch    Kind = "switch"
	KindBridge    Kind = "bridge"
	KindVeth      Kind = "veth"
	KindMacvlan   Kind = "macvlan"
	KindVXLAN     Kind = "vxlan"
	KindTransit   Kind = "transit"
	KindSysctl    Kind = "sysctl"
	KindAddress   Kind = "address"
	KindNeighbour Kind = "neighbour"
	KindFDB       Kind = "fdb"
	KindRoute     Kind = "route"
	KindElement   Kind = "element"
	KindHostPort  Kind = "hostport"
	KindShortcut  Kind = "shortcut"
)

// Rank orders a change: lower ranks are added first and removed last, so that a guard stands
// before the link comes up and outlives it, and what opens a way comes last and goes first.
type Rank int

// The ranks, in order (design, invariant 4).
const (
	RankNamespace Rank = iota
	RankGuard
	RankVLAN
	RankSwitch
	RankLink
	RankSysctl
	RankAddress
	RankNeighbour
	RankRoute
	RankReserve
	RankOpen
)

// State is a set of objects.
type State map[Key]Object

// Of makes a state of objects.
func Of(objects ...Object) State {
	s := State{}
	s.Add(objects...)
	return s
}

// Add puts objects into the state.
func (s State) Add(objects ...Object) {
	for _, o := range objects {
		s[o.Key()] = o
	}
}

// Merge puts all objects of other states into s and returns it.
func (s State) Merge(others ...State) State {
	for _, o := range others {
		maps.Copy(s, o)
	}
	return s
}

// Keys lists the state's keys, in no order.
func (s State) Keys() []Key { return slices.Collect(maps.Keys(s)) }

// Sorted lists the objects by rank, then by key.
func (s State) Sorted() []Object {
	all := make([]ranked, 0, len(s))
	for key, o := range s {
		all = append(all, ranked{o.Rank(), key, Op{Object: o}})
	}
	out := make([]Object, 0, len(all))
	for _, r := range order(all) {
		out = append(out, r.Object)
	}
	return out
}

// ranked is an operation with what it is sorted by: to find out a key takes long.
type ranked struct {
	rank Rank
	key  Key
	Op
}

// order sorts by rank, then by key.
func order(all []ranked) []ranked {
	slices.SortFunc(all, func(a, b ranked) int { return cmp.Or(cmp.Compare(a.rank, b.rank), compareKeys(a.key, b.key)) })
	return all
}

// String prints one object a line, sorted.
func (s State) String() string {
	var b strings.Builder
	for _, o := range s.Sorted() {
		b.WriteString(o.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// Verb is what an operation does.
type Verb string

// The verbs.
const (
	Add     Verb = "add"
	Replace Verb = "replace"
	Delete  Verb = "delete"
)

// Op is one operation. Old is what Replace found.
type Op struct {
	Verb   Verb
	Object Object
	Old    Object
}

func (o Op) String() string { return string(o.Verb) + " " + o.Object.String() }

// Diff lists the operations that make observed what is wanted: first what goes, openings
// before guards, then what comes, guards before openings. What is observed but not wanted is
// deleted, so observed must hold only what is ours. What is in a namespace goes with it.
func Diff(observed, wanted State) []Op {
	var gone, come []ranked // of hundreds of thousands that there may be, few differ: only these are sorted
	for key, o := range observed {
		if key.Kind == KindSysctl {
			continue // shared with everybody on the host: what it was before is not ours to know
		}
		if namespace := (Key{Kind: KindNamespace, Name: key.Namespace}); observed[namespace] != nil && wanted[namespace] == nil {
			continue
		}
		if _, ok := wanted[key]; !ok {
			gone = append(gone, ranked{o.Rank(), key, Op{Verb: Delete, Object: o}})
		}
	}
	slices.Reverse(order(gone))
	for key, w := range wanted {
		switch o, ok := observed[key]; {
		case !ok:
			come = append(come, ranked{w.Rank(), key, Op{Verb: Add, Object: w}})
		case !w.Same(o):
			come = append(come, ranked{w.Rank(), key, Op{Verb: Replace, Object: w, Old: o}})
		}
	}
	var out []Op
	for _, r := range append(gone, order(come)...) {
		out = append(out, r.Op)
	}
	return out
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// Table is one nftables table of ours without its elements.
type Table struct{ *nft.Table }

// Admit is the one rule in a chain that is not ours: packets that our forward chain has marked
// with Mark are accepted in Docker's DOCKER-USER chain, so that a FORWARD policy of DROP does
// not undo our verdict. A host without that chain needs no rule: there it is always the same.
type Admit struct {
	Family string // "ip" or "ip6"
	Mark   uint32
}

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	const digits = "0123456789abcdef"
	var text [17]byte
	for i, b := range m {
		text[3*i], text[3*i+1] = digits[b>>4], digits[b&15]
		if i > 0 {
			text[3*i-1] = ':'
		}
	}
	return string(text[:])
}

// MarshalText and UnmarshalText are the address with colons.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads an address with colons or dashes.
func (m *MAC) UnmarshalText(text []byte) error {
	hw, err := net.ParseMAC(string(text))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("%q is not an Ethernet address", text)
	}
	copy(m[:], hw)
	return nil
}

// Bridge is a network's switch. Up is always wanted.
type Bridge struct {
	Name  string
	Alias string // the mark of ownership
	MAC   MAC
	MTU   int
	Up    bool
}

// VLAN is a link that carries one VLAN of an uplink: what is sent on it leaves the uplink with the
// tag (IEEE 802.1Q), and what the uplink gets with the tag arrives on it, untagged.
type VLAN struct {
	Name   string
	Alias  string // the mark of ownership
	Uplink string
	ID     int // 1 to 4094
	Up     bool
}

// Switch is an external switch: a bridge that holds an uplink, and in its place has the uplink's
// MAC and MTU and the host's addresses and routes. They go back to the uplink with its deletion.
type Switch struct {
	Name   string
	Alias  string // the mark of ownership
	Uplink string // a link of the host, or a VLAN
	Up     bool
	Moved  bool // the MAC, every address and every route of the uplink are the bridge's; always wanted
}

// Macvlan is a link that shares Lower with the host and with other such links, which it reaches
// (mode bridge of macvlan): a container's, before the engine moves it into the container, or the
// host's own.
type Macvlan struct {
	Name  string
	Alias string // the mark of ownership
	Lower string // an uplink or a VLAN
	MAC   MAC
	MTU   int
	Up    bool
}

// Route is a route of ours in the main table, with our protocol number.
type Route struct {
	Prefix netip.Prefix
	Link   string
	Via    netip.Addr // the router; invalid: on the link itself
	Source netip.Addr // the address that the host prefers as its own; invalid: the kernel's choice
}

// Veth is an endpoint's port: the host's end, a port of Bridge. Peer and PeerMAC are used only
// when the pair is made: after Join the container's end has left and is not ours. The container's end
// is made in the host's namespace, where engines look for it, also when the port is in one of ours.
type Veth struct {
	Name     string
	Alias    string // the mark of ownership
	Bridge   string
	MTU      int
	Isolated bool // cannot reach other isolated ports (disable_icc)
	Static   bool // does not learn who is behind it (learning off): FDB entries say so
	Up       bool
	Peer     string
	PeerMAC  MAC
}

// Address is an address on a link of ours.
type Address struct {
	Link   string
	Prefix netip.Prefix
}

// Sysctl is a kernel setting. It is never deleted: it goes with its link, or stays.
type Sysctl struct {
	Name  string // dotted or slashed path below /proc/sys, such as "net/ipv4/ip_forward"
	Value string
	From  string // not empty: only this value is changed, any other is somebody's choice
}

// Element is one element of a set or map of ours; Key and Data are in nft's syntax.
type Element struct {
	Set  *nft.Set
	Data string // empty for a set
	Elem string
}

// HostPort is a port of the host that is held by a socket of ours, so that nobody else takes it,
// and whose connections that arrive at the socket (those to a loopback address, which no DNAT
// may touch) are relayed to Target.
type HostPort struct {
	Proto  string // "tcp", "udp" or "sctp"
	Host   netip.AddrPort
	Target netip.AddrPort
}

func (t Table) Key() Key   { return Key{Kind: KindTable, Name: string(t.Family) + " " + t.Name} }
func (a Admit) Key() Key   { return Key{Kind: KindAdmit, Name: a.Family} }
func (v VLAN) Key() Key    { return Key{Kind: KindVLAN, Name: v.Name} }
func (s Switch) Key() Key  { return Key{Kind: KindSwitch, Name: s.Name} }
func (b Bridge) Key() Key  { return Key{Kind: KindBridge, Name: b.Name} }
func (m Macvlan) Key() Key { return Key{Kind: KindMacvlan, Name: m.Name} }
func (r Route) Key() Key   { return Key{Kind: KindRoute, Name: r.Link + " " + r.Prefix.String()} }
func (v Veth) Key() Key    { return Key{Kind: KindVeth, Name: v.Name} }
func (a Address) Key() Key { return Key{Kind: KindAddress, Name: a.Link + " " + a.Prefix.String()} }
func (s Sysctl) Key() Key  { return Key{Kind: KindSysctl, Name: s.Name} }
func (e Element) Key() Key {
	return Key{Kind: KindElement, Name: fmt.Sprintf("%s %s %s", e.Set.Family, e.Set.Name, e.Elem)}
}
func (p HostPort) Key() Key { return Key{Kind: KindHostPort, Name: p.Proto + " " + p.Host.String()} }

func (Table) Rank() Rank    { return RankGuard }
func (Admit) Rank() Rank    { return RankOpen }
func (VLAN) Rank() Rank     { return RankVLAN }
func (Switch) Rank() Rank   { return RankSwitch }
func (Bridge) Rank() Rank   { return RankLink }
func (Macvlan) Rank() Rank  { return RankLink }
func (Route) Rank() Rank    { return RankRoute }
func (Veth) Rank() Rank     { return RankLink } // after Bridge: kinds of a rank are in alphabetical order
func (Address) Rank() Rank  { return RankAddress }
func (Sysctl) Rank() Rank   { return RankSysctl }
func (HostPort) Rank() Rank { return RankReserve }

func (e Element) Rank() Rank {
	if e.Set.Guard {
		return RankGuard
	}
	return RankOpen
}

// Same compares the printed rules: two tables that print the same are the same.
func (t Table) Same(o Object) bool {
	other, ok := o.(Table)
	return ok && t.Table.String() == other.Table.String()
}
func (a Admit) Same(o Object) bool    { return a == o }
func (v VLAN) Same(o Object) bool     { return v == o }
func (s Switch) Same(o Object) bool   { return s == o }
func (b Bridge) Same(o Object) bool   { return b == o }
func (m Macvlan) Same(o Object) bool  { return m == o }
func (r Route) Same(o Object) bool    { return r == o }
func (a Address) Same(o Object) bool  { return a == o }
func (e Element) Same(o Object) bool  { return e == o }
func (p HostPort) Same(o Object) bool { return p == o }

// Same is true of every value but the one to change, if only that is to change.
func (s Sysctl) Same(o Object) bool {
	other, ok := o.(Sysctl)
	return ok && (other.Value == s.Value || s.From != "" && other.Value != s.From)
}

// Same leaves out the container's end.
func (v Veth) Same(o Object) bool {
	other, ok := o.(Veth)
	other.Peer, other.PeerMAC = v.Peer, v.PeerMAC
	return ok && v == other
}

func (t Table) String() string { return "nft table " + t.Key().Name }
func (a Admit) String() string {
	return fmt.Sprintf("nft rule %s filter DOCKER-USER mark 0x%x accept", a.Family, a.Mark)
}
func (v VLAN) String() string {
	return fmt.Sprintf("link %s vlan %d of %s%s alias %q", v.Name, v.ID, v.Uplink, flag(v.Up, "up"), v.Alias)
}
func (s Switch) String() string {
	return fmt.Sprintf("link %s type bridge in place of %s%s%s alias %q", s.Name, s.Uplink, flag(s.Up, "up"), flag(s.Moved, "moved"), s.Alias)
}
func (m Macvlan) String() string {
	return fmt.Sprintf("link %s link %s type macvlan mode bridge address %s mtu %d%s alias %q", m.Name, m.Lower, m.MAC, m.MTU, flag(m.Up, "up"), m.Alias)
}
func (r Route) String() string {
	text := "route " + r.Prefix.String()
	if r.Via.IsValid() {
		text += " via " + r.Via.String()
	}
	text += " dev " + r.Link
	if r.Source.IsValid() {
		text += " src " + r.Source.String()
	}
	return text
}
func (b Bridge) String() string {
	return fmt.Sprintf("link %s type bridge address %s mtu %d%s alias %q", b.Name, b.MAC, b.MTU, flag(b.Up, "up"), b.Alias)
}
func (v Veth) String() string {
	return fmt.Sprintf("link %s type veth peer %s address %s master %s mtu %d%s%s alias %q",
		v.Name, v.Peer, v.PeerMAC, v.Bridge, v.MTU, flag(v.Isolated, "isolated"), flag(v.Up, "up"), v.Alias)
}
func (a Address) String() string { return fmt.Sprintf("address %s dev %s", a.Prefix, a.Link) }
func (s Sysctl) String() string  { return fmt.Sprintf("sysctl %s=%s", s.Name, s.Value) }
func (e Element) String() string {
	if e.Data == "" {
		return fmt.Sprintf("nft element %s dockway %s { %s }", e.Set.Family, e.Set.Name, e.Elem)
	}
	return fmt.Sprintf("nft element %s dockway %s { %s : %s }", e.Set.Family, e.Set.Name, e.Elem, e.Data)
}
func (p HostPort) String() string {
	return fmt.Sprintf("socket %s %s relay to %s", p.Proto, p.Host, p.Target)
}

func flag(on bool, word string) string {
	if on {
		return " " + word
	}
	return ""
}

// PortInUseError says that a host port could not be held because somebody else has it.
type PortInUseError struct {
	Port   HostPort
	Holder string // who has it, as far as this process can see
}

func (e *PortInUseError) Error() string {
	return fmt.Sprintf("host port %s/%s is in use by %s", e.Port.Host, e.Port.Proto, e.Holder)
}

// HostRoute is a route of the host, as observed.
type HostRoute struct {
	Prefix netip.Prefix
	Link   string
	OnLink bool // the prefix is on the link itself, not behind a router
}
