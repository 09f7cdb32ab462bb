// Package nft is a small typed vocabulary of nftables rules that prints itself in nft's syntax.
// It is data only: package kernel turns it into netlink messages.
//
// The texts are those of nft(8) list output, so that what a mode wants can be compared, line by line,
// with what `nft list table` shows.
package nft

import (
	"fmt"
	"strings"
	"time"
)

// Family is an nftables address family.
type Family string

// The families that dockway programs.
const (
	Inet   Family = "inet"
	Bridge Family = "bridge"
)

// Type is the type of a set's key or value, one part of a concatenation.
type Type string

// Data types, by their nft names.
const (
	IfName   Type = "ifname"       // interface name, up to 15 bytes
	MAC      Type = "ether_addr"   // 48-bit Ethernet address
	IPv4     Type = "ipv4_addr"    // 32-bit address
	IPv6     Type = "ipv6_addr"    // 128-bit address
	Protocol Type = "inet_proto"   // IP protocol number
	Service  Type = "inet_service" // 16-bit port
)

// Field is something of a packet that a rule reads.
type Field string

// Fields, by their nft names.
const (
	IIfName      Field = "iifname"
	OIfName      Field = "oifname"
	OIfKind      Field = "meta oifkind" // rtnl kind of the output interface, such as "bridge"
	L4Proto      Field = "meta l4proto"
	EtherType    Field = "meta protocol"
	PktType      Field = "meta pkttype"
	EtherSAddr   Field = "ether saddr"
	IPSAddr      Field = "ip saddr"
	IPDAddr      Field = "ip daddr"
	IP6SAddr     Field = "ip6 saddr"
	IP6DAddr     Field = "ip6 daddr"
	SPort        Field = "th sport"
	DPort        Field = "th dport"
	ICMPv6Type   Field = "icmpv6 type"
	NDTarget     Field = "icmpv6 taddr" // target address of neighbour discovery, RFC 4861 section 4.3 and 4.4
	ARPSenderMAC Field = "arp saddr ether"
	ARPSenderIP  Field = "arp saddr ip"
	CtState      Field = "ct state"
	CtStatus     Field = "ct status"
	FibDaddrType Field = "fib daddr type"
)

// Table is everything that one family's table holds but the elements of its sets.
type Table struct {
	Family Family
	Name   string
	Sets   []*Set
	Chains []*Chain
}

// Set is a named set, or a map when Data is not empty.
type Set struct {
	Family  Family
	Name    string
	Key     []Type
	Data    []Type        // a map's value; empty for a set
	Dynamic bool          // elements are added by packets (`update`), never by us
	Timeout time.Duration // lifetime of a dynamic element
	Size    int           // most elements; 0 = no bound
	Guard   bool          // its elements forbid rather than allow: added first, removed last
	Comment string
}

// Chain is a base chain when Hook is not empty, else one that rules jump to.
type Chain struct {
	Name     string
	Type     string // "filter" or "nat", base chains only
	Hook     string // "prerouting", "forward", …
	Priority int
	Rules    []Rule
}

// Rule is one rule. Its comment says why it is there and identifies it when the kernel is compared.
type Rule struct {
	Stmts   []Stmt
	Comment string
}

// Stmt is one expression or statement of a rule.
type Stmt interface{ String() string }

// Match compares a field with one value: an exact one, a prefix ("127.0.0.0/8"), or for
// interface names one that ends in "*".
type Match struct {
	Field Field
	Not   bool
	Value string
}

// OneOf compares a field with several values (an anonymous set; comma list for ct state and status).
type OneOf struct {
	Field  Field
	Not    bool
	Values []string
}

// Lookup looks a concatenation of fields up in a named set.
type Lookup struct {
	Fields []Field
	Not    bool
	Set    *Set
}

// VMap picks a verdict by a field's value.
type VMap struct {
	Field Field
	Cases []Case
}

// Case is one line of a VMap.
type Case struct {
	Value   string
	Verdict Verdict
}

// DNAT rewrites the destination to what the map holds for the fields; no entry, no change.
type DNAT struct {
	Fields []Field
	Map    *Set // value: address and port
}

// Update adds the fields to a dynamic set, or renews their timeout.
type Update struct {
	Fields []Field
	Set    *Set
}

// MarkSet sets one bit of the packet mark; MarkClear clears it; MarkIs matches it.
type (
	MarkSet   struct{ Bit uint32 }
	MarkClear struct{ Bit uint32 }
	MarkIs    struct{ Bit uint32 }
)

// Masquerade rewrites the source to the address of the output interface.
type Masquerade struct{}

// Notrack keeps the packet out of connection tracking.
type Notrack struct{}

// Verdict ends a rule.
type Verdict struct {
	Kind  string // "accept", "drop", "jump", "goto"
	Chain string
}

// The verdicts.
var (
	Accept = Verdict{Kind: "accept"}
	Drop   = Verdict{Kind: "drop"}
)

// Jump continues in chain and comes back.
func Jump(chain string) Verdict { return Verdict{Kind: "jump", Chain: chain} }

// Goto continues in chain and does not come back.
func Goto(chain string) Verdict { return Verdict{Kind: "goto", Chain: chain} }

// Is and IsNot compare a field with one value.
func Is(f Field, value string) Match    { return Match{Field: f, Value: value} }
func IsNot(f Field, value string) Match { return Match{Field: f, Not: true, Value: value} }

// In and NotIn look fields up in a set.
func In(s *Set, f ...Field) Lookup    { return Lookup{Fields: f, Set: s} }
func NotIn(s *Set, f ...Field) Lookup { return Lookup{Fields: f, Not: true, Set: s} }

// AnyOf and NoneOf compare a field with several values.
func AnyOf(f Field, values ...string) OneOf  { return OneOf{Field: f, Values: values} }
func NoneOf(f Field, values ...string) OneOf { return OneOf{Field: f, Not: true, Values: values} }

// R makes a rule.
func R(comment string, stmts ...Stmt) Rule { return Rule{Stmts: stmts, Comment: comment} }

func (m Match) String() string {
	return fmt.Sprintf("%s%s %s", m.Field, not(m.Not), quote(m.Field, m.Value))
}

func (o OneOf) String() string {
	if o.Field == CtState || o.Field == CtStatus {
		return fmt.Sprintf("%s%s %s", o.Field, not(o.Not), strings.Join(o.Values, ","))
	}
	quoted := make([]string, len(o.Values))
	for i, v := range o.Values {
		quoted[i] = quote(o.Field, v)
	}
	return fmt.Sprintf("%s%s { %s }", o.Field, not(o.Not), strings.Join(quoted, ", "))
}

func (l Lookup) String() string {
	return fmt.Sprintf("%s%s @%s", concat(l.Fields), not(l.Not), l.Set.Name)
}

func (v VMap) String() string {
	cases := make([]string, len(v.Cases))
	for i, c := range v.Cases {
		cases[i] = fmt.Sprintf("%s : %s", quote(v.Field, c.Value), c.Verdict)
	}
	return fmt.Sprintf("%s vmap { %s }", v.Field, strings.Join(cases, ", "))
}

func (d DNAT) String() string {
	family := "ip"
	if d.Map.Data[0] == IPv6 {
		family = "ip6"
	}
	return fmt.Sprintf("dnat %s to %s map @%s", family, concat(d.Fields), d.Map.Name)
}

func (u Update) String() string {
	return fmt.Sprintf("update @%s { %s }", u.Set.Name, concat(u.Fields))
}
func (m MarkSet) String() string  { return fmt.Sprintf("meta mark set meta mark | 0x%08x", m.Bit) }
func (m MarkIs) String() string   { return fmt.Sprintf("meta mark & 0x%08x == 0x%08x", m.Bit, m.Bit) }
func (Masquerade) String() string { return "masquerade" }
func (Notrack) String() string    { return "notrack" }

func (m MarkClear) String() string {
	return fmt.Sprintf("meta mark set meta mark & 0x%08x", ^m.Bit)
}

func (v Verdict) String() string {
	if v.Chain != "" {
		return v.Kind + " " + v.Chain
	}
	return v.Kind
}

func (r Rule) String() string {
	parts := make([]string, 0, len(r.Stmts)+1)
	for _, s := range r.Stmts {
		parts = append(parts, s.String())
	}
	if r.Comment != "" {
		parts = append(parts, fmt.Sprintf("comment %q", r.Comment))
	}
	return strings.Join(parts, " ")
}

// String prints the table as `nft list table` does, elements left out.
func (t *Table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", t.Family, t.Name)
	for _, s := range t.Sets {
		b.WriteString(s.String())
		b.WriteByte('\n')
	}
	for i, c := range t.Chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(c.String())
	}
	b.WriteString("}\n")
	return b.String()
}

// String prints the set's declaration as `nft list table` does.
func (s *Set) String() string {
	var b strings.Builder
	kind, typ := "set", types(s.Key)
	if len(s.Data) > 0 {
		kind, typ = "map", typ+" : "+types(s.Data)
	}
	fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s\n", kind, s.Name, typ)
	if s.Size > 0 {
		fmt.Fprintf(&b, "\t\tsize %d\n", s.Size)
	}
	if s.Dynamic {
		b.WriteString("\t\tflags dynamic,timeout\n")
	}
	if s.Timeout > 0 {
		fmt.Fprintf(&b, "\t\ttimeout %dm\n", int(s.Timeout.Minutes()))
	}
	if s.Comment != "" {
		fmt.Fprintf(&b, "\t\tcomment %q\n", s.Comment)
	}
	b.WriteString("\t}\n")
	return b.String()
}

// String prints the chain as `nft list chain` does.
func (c *Chain) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
	if c.Hook != "" {
		fmt.Fprintf(&b, "\t\ttype %s hook %s priority %d; policy accept;\n", c.Type, c.Hook, c.Priority)
	}
	for _, r := range c.Rules {
		fmt.Fprintf(&b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
	return b.String()
}

func not(n bool) string {
	if n {
		return " !="
	}
	return ""
}

func quote(f Field, v string) string {
	if f == IIfName || f == OIfName || f == OIfKind {
		return fmt.Sprintf("%q", v)
	}
	return v
}

func concat(f []Field) string {
	s := make([]string, len(f))
	for i := range f {
		s[i] = string(f[i])
	}
	return strings.Join(s, " . ")
}

func types(t []Type) string {
	s := make([]string, len(t))
	for i := range t {
		s[i] = string(t[i])
	}
	return strings.Join(s, " . ")
}
