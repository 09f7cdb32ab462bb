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
	SKUID        Field = "meta skuid"   // user of the socket that sends; nothing matches what no socket sends
	L4Proto      Field = "meta l4proto"
	EtherType    Field = "meta protocol" // of what a VLAN tag, if any, is before
	FrameType    Field = "ether type"    // that of the VLAN tag, if any
	PktType      Field = "meta pkttype"
	EtherSAddr   Field = "ether saddr"
	EtherDAddr   Field = "ether daddr"
	IPSAddr      Field = "ip saddr"
	IPDAddr      Field = "ip daddr"
	IP6SAddr     Field = "ip6 saddr"
	IP6DAddr     Field = "ip6 daddr"
	SPort        Field = "th sport"
	DPort        Field = "th dport"
	ICMPType     Field = "icmp type"
	ICMPv6Type   Field = "icmpv6 type"
	NDTarget     Field = "@th,64,128" // target address of neighbour discovery (icmpv6 taddr), RFC 4861 section 4.3 and 4.4; in lookups only
	NDOption     Field = "@th,192,16" // type and length of the first option of a neighbour solicitation or advertisement (RFC 4861, section 4.6)
	NDOptionMAC  Field = "@th,208,48" // the link-layer address in it
	NDSecond     Field = "@th,256,16" // type and length of what follows a first option of 8 octets
	RSOption     Field = "@th,64,16"  // type and length of the first option of a router solicitation
	RSOptionMAC  Field = "@th,80,48"  // the link-layer address in it
	RSSecond     Field = "@th,128,16" // type and length of what follows a first option of 8 octets
	ARPOperation Field = "arp operation"
	ARPSenderMAC Field = "arp saddr ether"
	ARPSenderIP  Field = "arp saddr ip"
	ARPTargetMAC Field = "arp daddr ether"
	ARPTargetIP  Field = "arp daddr ip"
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
// Values are in nft's own order and names, so that it prints as nft does.
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

// Write writes a field of the packet: Value, or what the map holds for the fields in From, or without
// a map what the one field in From holds. A rule ends where the map holds nothing.
type Write struct {
	Field Field
	Value string
	From  []Field
	Map   *Set
}

// Update adds the fields to a dynamic set, or renews their timeout.
type Update struct {
	Fields []Field
	Set    *Set
}

// MarkSet sets one bit of the packet mark.
type MarkSet struct{ Bit uint32 }

// MarkClear clears one bit of the packet mark.
type MarkClear struct{ Bit uint32 }

// MarkIs matches packets with the bit in their mark.
type MarkIs struct{ Bit uint32 }

// Masquerade rewrites the source to the address of the output interface.
type Masquerade struct{}

// Notrack keeps the packet out of connection tracking.
type Notrack struct{}

// Verdict ends a rule.
type Verdict struct {
	Kind  string // "accept", "drop", "return", "jump", "goto"
	Chain string
}

// The verdicts.
var (
	Accept = Verdict{Kind: "accept"}
	Drop   = Verdict{Kind: "drop"}
	Return = Verdict{Kind: "return"}
)

// Jump continues in chain and comes back.
func Jump(chain string) Verdict { return Verdict{Kind: "jump", Chain: chain} }

// Goto continues in chain and does not come back.
func Goto(chain string) Verdict { return Verdict{Kind: "goto", Chain: chain} }

// Is matches a field that has the value.
func Is(f Field, value string) Match { return Match{Field: f, Value: value} }

// IsNot matches a field that has any other value.
func IsNot(f Field, value string) Match { return Match{Field: f, Not: true, Value: value} }

// In matches fields that are, together, an element of the set.
func In(s *Set, f ...Field) Lookup { return Lookup{Fields: f, Set: s} }

// NotIn matches fields that are, together, no element of the set.
func NotIn(s *Set, f ...Field) Lookup { return Lookup{Fields: f, Not: true, Set: s} }

// AnyOf matches a field that has one of the values.
func AnyOf(f Field, values ...string) OneOf { return OneOf{Field: f, Values: values} }

// NoneOf matches a field that has none of the values.
func NoneOf(f Field, values ...string) OneOf { return OneOf{Field: f, Not: true, Values: values} }

// To writes a value to a field.
func To(f Field, value string) Write { return Write{Field: f, Value: value} }

// Copy writes another field to a field.
func Copy(f, from Field) Write { return Write{Field: f, From: []Field{from}} }

// Mapped writes to a field what the map holds for other fields.
func Mapped(f Field, m *Set, from ...Field) Write {
	return Write{Field: f, From: from, Map: m}
}

// R makes a rule.
func R(comment string, stmts ...Stmt) Rule { return Rule{Stmts: stmts, Comment: comment} }

func (m Match) String() string {
	return fmt.Sprintf("%s%s %s", m.Field, notOf(m.Field, m.Not), quote(m.Field, m.Value))
}

func (o OneOf) String() string {
	if o.Field == CtState || o.Field == CtStatus {
		return fmt.Sprintf("%s%s %s", o.Field, notOf(o.Field, o.Not), strings.Join(o.Values, ","))
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

func (w Write) String() string {
	switch {
	case w.Map != nil:
		return fmt.Sprintf("%s set %s map @%s", w.Field, concat(w.From), w.Map.Name)
	case len(w.From) > 0:
		return fmt.Sprintf("%s set %s", w.Field, concat(w.From))
	}
	return fmt.Sprintf("%s set %s", w.Field, quote(w.Field, w.Value))
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

// String prints the rule as nft does, which writes a protocol that is matched and the ports read
// after it as one: `udp dport 67`.
func (r Rule) String() string {
	parts := make([]string, 0, len(r.Stmts)+1)
	ports := strings.NewReplacer()
	for i, s := range r.Stmts {
		if m, ok := s.(Match); ok && m.Field == L4Proto && !m.Not && readsPorts(r.Stmts[i+1:]) {
			ports = strings.NewReplacer(string(SPort), m.Value+" sport", string(DPort), m.Value+" dport")
			continue
		}
		parts = append(parts, ports.Replace(s.String()))
	}
	if r.Comment != "" {
		parts = append(parts, fmt.Sprintf("comment %q", r.Comment))
	}
	return strings.Join(parts, " ")
}

func readsPorts(stmts []Stmt) bool {
	for _, s := range stmts {
		if text := s.String(); strings.Contains(text, string(SPort)) || strings.Contains(text, string(DPort)) {
			return true
		}
	}
	return false
}

// String prints the table as `nft -s list table` does, elements left out.
func (t *Table) String() string {
	var parts []string
	for _, s := range t.Sets {
		parts = append(parts, s.String())
	}
	for _, c := range t.Chains {
		parts = append(parts, c.text(t.Family))
	}
	return fmt.Sprintf("table %s %s {\n%s}\n", t.Family, t.Name, strings.Join(parts, "\n"))
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
	switch {
	case s.Dynamic && s.Timeout > 0:
		b.WriteString("\t\tflags dynamic,timeout\n")
	case s.Dynamic:
		b.WriteString("\t\tflags dynamic\n")
	}
	if s.Timeout > 0 {
		fmt.Fprintf(&b, "\t\ttimeout %s\n", duration(s.Timeout))
	}
	if s.Comment != "" {
		fmt.Fprintf(&b, "\t\tcomment %q\n", s.Comment)
	}
	b.WriteString("\t}\n")
	return b.String()
}

// String prints the chain as `nft list chain` does in a table of family inet.
func (c *Chain) String() string { return c.text(Inet) }

func (c *Chain) text(family Family) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
	if c.Hook != "" {
		fmt.Fprintf(&b, "\t\ttype %s hook %s priority %s; policy accept;\n", c.Type, c.Hook, c.priority(family))
	}
	for _, r := range c.Rules {
		fmt.Fprintf(&b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
	return b.String()
}

// A priority has a name, in some hooks or in all.
type priority struct {
	value int
	name  string
	hooks string
}

var priorities = map[Family][]priority{
	Inet: {
		{-300, "raw", ""}, {-150, "mangle", ""}, {-100, "dstnat", "prerouting"},
		{0, "filter", ""}, {50, "security", ""}, {100, "srcnat", "input postrouting"},
	},
	Bridge: {
		{-300, "dstnat", "prerouting"}, {-200, "filter", ""},
		{100, "out", "output"}, {300, "srcnat", "postrouting"},
	},
}

// priority prints a name, with what is added to it or taken from it if that is not more than 10.
func (c *Chain) priority(family Family) string {
	for _, p := range priorities[family] {
		if p.hooks != "" && !strings.Contains(p.hooks, c.Hook) {
			continue
		}
		switch offset := c.Priority - p.value; {
		case offset == 0:
			return p.name
		case offset > 0 && offset <= 10:
			return fmt.Sprintf("%s + %d", p.name, offset)
		case offset < 0 && offset >= -10:
			return fmt.Sprintf("%s - %d", p.name, -offset)
		}
	}
	return fmt.Sprint(c.Priority)
}

// duration prints the parts that are not zero: 1h30m.
func duration(d time.Duration) string {
	var b strings.Builder
	for _, unit := range []struct {
		length time.Duration
		name   string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}, {time.Millisecond, "ms"}} {
		if n := d / unit.length; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, unit.name)
			d -= n * unit.length
		}
	}
	return b.String()
}

// notOf is the word for none of these: fields that are flags have one of their own, for != would
// compare them as a whole.
func notOf(f Field, n bool) string {
	if n && (f == CtState || f == CtStatus) {
		return " !"
	}
	return not(n)
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
