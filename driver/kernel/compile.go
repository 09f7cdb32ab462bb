package kernel

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan/nft"
)

// A field is how something of a packet is loaded into a register, and what must be known of the
// packet before: the facts that nft(8) adds to a rule by itself.
type field struct {
	datatype
	load     func(register uint32) expr.Any
	facts    []fact
	checksum bool // of ICMPv6, covers it
}

var fields = map[nft.Field]field{
	nft.IIfName:      meta(datatypes[nft.IfName], expr.MetaKeyIIFNAME),
	nft.OIfName:      meta(datatypes[nft.IfName], expr.MetaKeyOIFNAME),
	nft.OIfKind:      meta(datatypes[nft.IfName], metaOIfKind),
	nft.SKUID:        meta(uid, expr.MetaKeySKUID),
	nft.L4Proto:      meta(datatypes[nft.Protocol], expr.MetaKeyL4PROTO),
	nft.EtherType:    meta(etherType, expr.MetaKeyPROTOCOL),
	nft.FrameType:    payload(etherType, expr.PayloadBaseLLHeader, 12, isEthernet),
	nft.PktType:      meta(pktType, expr.MetaKeyPKTTYPE),
	nft.EtherDAddr:   payload(datatypes[nft.MAC], expr.PayloadBaseLLHeader, 0, isEthernet),
	nft.EtherSAddr:   payload(datatypes[nft.MAC], expr.PayloadBaseLLHeader, 6, isEthernet),
	nft.IPSAddr:      payload(datatypes[nft.IPv4], expr.PayloadBaseNetworkHeader, 12, isIPv4),
	nft.IPDAddr:      payload(datatypes[nft.IPv4], expr.PayloadBaseNetworkHeader, 16, isIPv4),
	nft.IP6SAddr:     payload(datatypes[nft.IPv6], expr.PayloadBaseNetworkHeader, 8, isIPv6),
	nft.IP6DAddr:     payload(datatypes[nft.IPv6], expr.PayloadBaseNetworkHeader, 24, isIPv6),
	nft.SPort:        payload(datatypes[nft.Service], expr.PayloadBaseTransportHeader, 0),
	nft.DPort:        payload(datatypes[nft.Service], expr.PayloadBaseTransportHeader, 2),
	nft.ICMPType:     payload(icmpType, expr.PayloadBaseTransportHeader, 0, isIPv4, isICMP),
	nft.ICMPv6Type:   payload(icmpv6Type, expr.PayloadBaseTransportHeader, 0, isIPv6, isICMPv6),
	nft.NDTarget:     payload(datatypes[nft.IPv6], expr.PayloadBaseTransportHeader, 8, isIPv6, isICMPv6),
	nft.NDOption:     payload(raw16(), expr.PayloadBaseTransportHeader, 24, isIPv6, isICMPv6),
	nft.NDOptionMAC:  covered(payload(datatypes[nft.MAC], expr.PayloadBaseTransportHeader, 26, isIPv6, isICMPv6)),
	nft.NDSecond:     payload(raw16(), expr.PayloadBaseTransportHeader, 32, isIPv6, isICMPv6),
	nft.RSOption:     payload(raw16(), expr.PayloadBaseTransportHeader, 8, isIPv6, isICMPv6),
	nft.RSOptionMAC:  covered(payload(datatypes[nft.MAC], expr.PayloadBaseTransportHeader, 10, isIPv6, isICMPv6)),
	nft.RSSecond:     payload(raw16(), expr.PayloadBaseTransportHeader, 16, isIPv6, isICMPv6),
	nft.ARPOperation: payload(arpOperation, expr.PayloadBaseNetworkHeader, 6, isARP),
	nft.ARPSenderMAC: payload(datatypes[nft.MAC], expr.PayloadBaseNetworkHeader, 8, isARP),
	nft.ARPSenderIP:  payload(datatypes[nft.IPv4], expr.PayloadBaseNetworkHeader, 14, isARP),
	nft.ARPTargetMAC: payload(datatypes[nft.MAC], expr.PayloadBaseNetworkHeader, 18, isARP),
	nft.ARPTargetIP:  payload(datatypes[nft.IPv4], expr.PayloadBaseNetworkHeader, 24, isARP),
	nft.CtState:      ct(ctState, expr.CtKeySTATE),
	nft.CtStatus:     ct(ctStatus, expr.CtKeySTATUS),
	nft.FibDaddrType: {datatype: fibType, load: func(r uint32) expr.Any {
		return &expr.Fib{Register: r, FlagDADDR: true, ResultADDRTYPE: true}
	}},
}

const metaOIfKind expr.MetaKey = 27 // NFT_META_OIFKIND

func meta(d datatype, key expr.MetaKey) field {
	return field{datatype: d, load: func(r uint32) expr.Any { return &expr.Meta{Key: key, Register: r} }}
}

func ct(d datatype, key expr.CtKey) field {
	return field{datatype: d, load: func(r uint32) expr.Any { return &expr.Ct{Key: key, Register: r} }}
}

func payload(d datatype, base expr.PayloadBase, offset uint32, facts ...fact) field {
	return field{datatype: d, facts: facts, load: func(r uint32) expr.Any {
		return &expr.Payload{DestRegister: r, Base: base, Offset: offset, Len: uint32(d.size())}
	}}
}

func covered(f field) field {
	f.checksum = true
	return f
}

// A fact is something about a packet that has to be checked before its headers are read.
type fact string

const (
	isEthernet fact = "ether"
	isIPv4     fact = "ip"
	isIPv6     fact = "ip6"
	isARP      fact = "arp"
	isICMP     fact = "icmp"
	isICMPv6   fact = "ipv6-icmp"
)

// check is a fact's test, the one that nft(8) uses in the family and leaves out of its lists.
func check(f fact, family nft.Family) (load expr.Any, want []byte, err error) {
	switch {
	case f == isICMP:
		return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1}, []byte{unix.IPPROTO_ICMP}, nil
	case f == isICMPv6:
		return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1}, []byte{unix.IPPROTO_ICMPV6}, nil
	case family == nft.Inet && f == isIPv4:
		return &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: unix.NFT_REG_1}, []byte{unix.NFPROTO_IPV4}, nil
	case family == nft.Inet && f == isIPv6:
		return &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: unix.NFT_REG_1}, []byte{unix.NFPROTO_IPV6}, nil
	case family == nft.Bridge && f == isEthernet:
		return nil, nil, nil
	case family == nft.Bridge && f == isARP:
		want, err = etherType.parse(string(f))
		return &expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseLLHeader, Offset: 12, Len: 2}, want, err
	case family == nft.Bridge:
		want, err = etherType.parse(string(f))
		return &expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: unix.NFT_REG_1}, want, err
	}
	return nil, nil, fmt.Errorf("rules of family %s cannot read %s headers", family, f)
}

// An anonymousSet holds the values of one rule; it lives and dies with the rule.
type anonymousSet struct {
	id       uint32 // its name for the rest of the transaction
	key      datatype
	elements []attrs
	verdicts bool // a map of verdicts
}

// name is a template: the kernel puts a number in.
func (a anonymousSet) name() string {
	if a.verdicts {
		return "__map%d"
	}
	return "__set%d"
}

// A compiler turns one rule's statements into the kernel's expressions.
type compiler struct {
	family nft.Family
	known  map[fact]bool
	exprs  []expr.Any
	sets   []anonymousSet
	nextID func() uint32
}

func (c *compiler) emit(e ...expr.Any) { c.exprs = append(c.exprs, e...) }

func (c *compiler) statement(s nft.Stmt) error {
	switch s := s.(type) {
	case nft.Match:
		return c.match(s)
	case nft.OneOf:
		return c.oneOf(s)
	case nft.Lookup:
		if err := c.load(s.Fields, s.Set.Key); err != nil {
			return err
		}
		c.emit(&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: s.Set.Name, Invert: s.Not})
	case nft.VMap:
		return c.vmap(s)
	case nft.DNAT:
		return c.dnat(s)
	case nft.Write:
		return c.write(s)
	case nft.Update:
		if err := c.load(s.Fields, s.Set.Key); err != nil {
			return err
		}
		c.emit(&expr.Dynset{SrcRegKey: unix.NFT_REG_1, SetName: s.Set.Name, Operation: unix.NFT_DYNSET_OP_UPDATE})
	case nft.MarkSet:
		c.mark(^s.Bit, s.Bit)
		c.emit(&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1, SourceRegister: true})
	case nft.MarkClear:
		c.mark(^s.Bit, 0)
		c.emit(&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1, SourceRegister: true})
	case nft.MarkIs:
		c.mark(s.Bit, 0)
		c.emit(&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: native32(s.Bit)})
	case nft.Masquerade:
		c.emit(&expr.Masq{})
	case nft.Notrack:
		c.emit(&expr.Notrack{})
	case nft.Verdict:
		v, err := verdict(s)
		if err != nil {
			return err
		}
		c.emit(v)
	default:
		return fmt.Errorf("statement %T is not known", s)
	}
	return nil
}

// mark loads the packet mark and computes mark & mask ^ xor.
func (c *compiler) mark(mask, xor uint32) {
	c.emit(&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		bitwise(native32(mask), native32(xor)))
}

func bitwise(mask, xor []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: uint32(len(mask)), Mask: mask, Xor: xor}
}

func (c *compiler) field(name nft.Field) (field, error) {
	f, ok := fields[name]
	if !ok {
		return field{}, fmt.Errorf("field %q is not known", name)
	}
	for _, need := range f.facts {
		if c.known[need] {
			continue
		}
		load, want, err := check(need, c.family)
		if err != nil {
			return field{}, fmt.Errorf("%s: %w", name, err)
		}
		if load != nil {
			c.emit(load, &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: want})
		}
		c.known[need] = true
	}
	return f, nil
}

// load lays fields out in consecutive registers, as a set with a key of these types wants them.
func (c *compiler) load(names []nft.Field, types []nft.Type) error {
	if len(names) != len(types) {
		return fmt.Errorf("%d fields looked up in a set of %d", len(names), len(types))
	}
	loads := make([]field, len(names))
	for i, name := range names {
		f, err := c.field(name)
		if err != nil {
			return err
		}
		if f.magic() != datatypes[types[i]].magic() {
			return fmt.Errorf("%s looked up where the set has %s", name, types[i])
		}
		loads[i] = f
	}
	word := 0
	for _, f := range loads {
		c.emit(f.load(register(word)))
		word += aligned(f.size()) / 4
	}
	return nil
}

// register names the register that begins at a 32-bit word, as the kernel does: by 16 bytes where
// it can.
func register(word int) uint32 {
	if word%4 == 0 {
		return uint32(unix.NFT_REG_1 + word/4)
	}
	return uint32(unix.NFT_REG32_00 + word)
}

func (c *compiler) match(m nft.Match) error {
	if m.Field == nft.CtState || m.Field == nft.CtStatus {
		return c.flags(m.Field, m.Not, []string{m.Value})
	}
	f, err := c.field(m.Field)
	if err != nil {
		return err
	}
	op := expr.CmpOpEq
	if m.Not {
		op = expr.CmpOpNeq
	}
	load := f.load(unix.NFT_REG_1)
	var want []byte
	switch {
	case strings.HasSuffix(m.Value, "*"):
		want = []byte(strings.TrimSuffix(m.Value, "*"))
		c.emit(load)
	case strings.Contains(m.Value, "/"):
		if want, err = c.prefix(load, m.Value); err != nil {
			return fmt.Errorf("%s: %w", m.Field, err)
		}
	default:
		if want, err = f.parse(m.Value); err != nil {
			return fmt.Errorf("%s: %w", m.Field, err)
		}
		c.emit(load)
		if !m.Not {
			c.learn(m)
		}
	}
	c.emit(&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: want})
	return nil
}

// learn remembers what a rule's own match says about the packet.
func (c *compiler) learn(m nft.Match) {
	switch {
	case m.Field == nft.EtherType && c.family == nft.Bridge:
		c.known[fact(m.Value)] = true
	case m.Field == nft.L4Proto:
		c.known[fact(m.Value)] = true
	}
}

// prefix loads an address so that it can be compared with a prefix: the leading bytes, or all of
// it with the rest masked out.
func (c *compiler) prefix(load expr.Any, text string) ([]byte, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return nil, err
	}
	header, ok := load.(*expr.Payload)
	address := p.Masked().Addr().AsSlice()
	if !ok || int(header.Len) != len(address) || p.Bits() == 0 {
		return nil, fmt.Errorf("cannot be compared with %s", text)
	}
	if p.Bits()%8 == 0 {
		header.Len = uint32(p.Bits() / 8)
		c.emit(header)
		return address[:header.Len], nil
	}
	mask := make([]byte, len(address))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	c.emit(header, bitwise(mask, make([]byte, len(mask))))
	return address, nil
}

// flags matches fields of which one bit, or none of the bits, is to be set.
func (c *compiler) flags(name nft.Field, none bool, values []string) error {
	f, err := c.field(name)
	if err != nil {
		return err
	}
	var mask uint32
	for _, v := range values {
		b, err := f.parse(v)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		mask |= value(b, f.host)
	}
	op := expr.CmpOpNeq
	if none {
		op = expr.CmpOpEq
	}
	c.emit(f.load(unix.NFT_REG_1), bitwise(native32(mask), native32(0)),
		&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: native32(0)})
	return nil
}

func (c *compiler) oneOf(o nft.OneOf) error {
	if o.Field == nft.CtState || o.Field == nft.CtStatus {
		return c.flags(o.Field, o.Not, o.Values)
	}
	f, err := c.field(o.Field)
	if err != nil {
		return err
	}
	set := anonymousSet{id: c.nextID(), key: f.datatype}
	for _, v := range o.Values {
		b, err := f.parse(v)
		if err != nil {
			return fmt.Errorf("%s: %w", o.Field, err)
		}
		set.elements = append(set.elements, elementAttrs(b, nil))
	}
	c.sets = append(c.sets, set)
	c.emit(f.load(unix.NFT_REG_1),
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: set.name(), SetID: set.id, Invert: o.Not})
	return nil
}

func (c *compiler) vmap(m nft.VMap) error {
	f, err := c.field(m.Field)
	if err != nil {
		return err
	}
	set := anonymousSet{id: c.nextID(), key: f.datatype, verdicts: true}
	for _, one := range m.Cases {
		key, err := f.parse(one.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Field, err)
		}
		v, err := verdict(one.Verdict)
		if err != nil {
			return err
		}
		data := attrs{}.be32(unix.NFTA_VERDICT_CODE, uint32(v.Kind))
		if v.Chain != "" {
			data = data.str(unix.NFTA_VERDICT_CHAIN, v.Chain)
		}
		set.elements = append(set.elements, elementAttrs(key, attrs{}.nest(unix.NFTA_DATA_VERDICT, data)))
	}
	c.sets = append(c.sets, set)
	c.emit(f.load(unix.NFT_REG_1), &expr.Lookup{
		SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: set.name(), SetID: set.id,
	})
	return nil
}

// dnat looks address and port up and puts them where the kernel's NAT expression reads them.
func (c *compiler) dnat(d nft.DNAT) error {
	if err := c.load(d.Fields, d.Map.Key); err != nil {
		return err
	}
	data, err := tupleOf(d.Map.Data)
	if err != nil {
		return err
	}
	if len(data) != 2 || d.Map.Data[1] != nft.Service {
		return fmt.Errorf("dnat to map %s, whose values are no address and port", d.Map.Name)
	}
	family := uint32(unix.NFPROTO_IPV4)
	if d.Map.Data[0] == nft.IPv6 {
		family = unix.NFPROTO_IPV6
	}
	port := register(data[0].size() / 4)
	c.emit(
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, IsDestRegSet: true, SetName: d.Map.Name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: unix.NFT_REG_1, RegAddrMax: unix.NFT_REG_1, RegProtoMin: port, RegProtoMax: port})
	return nil
}

// offset of the checksum in an ICMPv6 header (RFC 4443)
const icmpv6Checksum = 2

func (c *compiler) write(w nft.Write) error {
	to, err := c.field(w.Field)
	if err != nil {
		return err
	}
	switch {
	case w.Map != nil:
		if err := c.load(w.From, w.Map.Key); err != nil {
			return err
		}
		if len(w.Map.Data) != 1 || datatypes[w.Map.Data[0]].size() != to.size() {
			return fmt.Errorf("%s set to what map %s holds, which does not fit", w.Field, w.Map.Name)
		}
		c.emit(&expr.Lookup{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, IsDestRegSet: true, SetName: w.Map.Name})
	case len(w.From) == 1:
		from, err := c.field(w.From[0])
		if err != nil {
			return err
		}
		if from.size() != to.size() {
			return fmt.Errorf("%s set to %s, which does not fit", w.Field, w.From[0])
		}
		c.emit(from.load(unix.NFT_REG_1))
	default:
		value, err := to.parse(w.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", w.Field, err)
		}
		c.emit(&expr.Immediate{Register: unix.NFT_REG_1, Data: value})
	}
	switch header := to.load(unix.NFT_REG_1).(type) {
	case *expr.Meta:
		c.emit(&expr.Meta{Key: header.Key, Register: unix.NFT_REG_1, SourceRegister: true})
	case *expr.Payload:
		store := &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: unix.NFT_REG_1, Base: header.Base, Offset: header.Offset, Len: header.Len}
		if to.checksum {
			store.CsumType, store.CsumOffset = expr.CsumTypeInet, icmpv6Checksum
		}
		c.emit(store)
	default:
		return fmt.Errorf("%s cannot be written", w.Field)
	}
	return nil
}

var verdicts = map[string]expr.VerdictKind{
	"accept": expr.VerdictAccept, "drop": expr.VerdictDrop, "return": expr.VerdictReturn, "jump": expr.VerdictJump, "goto": expr.VerdictGoto,
}

func verdict(v nft.Verdict) (*expr.Verdict, error) {
	kind, ok := verdicts[v.Kind]
	if !ok {
		return nil, fmt.Errorf("verdict %q is not known", v.Kind)
	}
	return &expr.Verdict{Kind: kind, Chain: v.Chain}, nil
}

// elementAttrs is one element of a set: a key and, in a map, what data holds.
func elementAttrs(key []byte, data attrs) attrs {
	e := attrs{}.nest(unix.NFTA_SET_ELEM_KEY, attrs{}.put(unix.NFTA_DATA_VALUE, key))
	if data != nil {
		e = e.nest(unix.NFTA_SET_ELEM_DATA, data)
	}
	return e
}
