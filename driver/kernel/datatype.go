package kernel

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"

	"github.com/dockway/dockway/driver/plan/nft"
)

// A datatype is how values of one kind are written in text and in the kernel. The text is the
// one that nft(8) lists, names of interfaces without quotes.
type datatype struct {
	nft    nftables.SetDatatype
	host   bool // in the machine's byte order rather than the network's
	parse  func(string) ([]byte, error)
	format func([]byte) string
}

// size is what a value takes in registers and in set keys that have parts: whole 32-bit words.
func (d datatype) size() int { return int(d.nft.Bytes) }

// magic is nft(8)'s number of the type.
func (d datatype) magic() uint32 { return d.nft.GetNFTMagic() }

var datatypes = map[nft.Type]datatype{
	nft.IfName:   {nft: nftables.TypeIFName, host: true, parse: parseName, format: text},
	nft.MAC:      {nft: nftables.TypeEtherAddr, parse: parseMAC, format: func(b []byte) string { return net.HardwareAddr(b).String() }},
	nft.IPv4:     {nft: nftables.TypeIPAddr, parse: parseIPv4, format: formatIP},
	nft.IPv6:     {nft: nftables.TypeIP6Addr, parse: parseIPv6, format: formatIP},
	nft.Protocol: named(nftables.TypeInetProto, false, protocols),
	nft.Service:  named(nftables.TypeInetService, false, nil),
}

// Datatypes of fields that no set of ours holds.
var (
	etherType  = named(nftables.TypeEtherType, false, names{"ip": 0x0800, "arp": 0x0806, "ip6": 0x86dd, "8021q": 0x8100, "8021ad": 0x88a8})
	pktType    = named(nftables.TypePktType, true, names{"host": 0, "broadcast": 1, "multicast": 2, "other": 3})
	icmpType   = named(nftables.TypeICMPType, false, names{"echo-reply": 0, "destination-unreachable": 3, "redirect": 5, "echo-request": 8, "time-exceeded": 11})
	icmpv6Type = named(nftables.TypeICMP6Type, false, names{
		"destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3, "parameter-problem": 4,
		"echo-request": 128, "echo-reply": 129, "mld-listener-query": 130, "mld-listener-report": 131,
		"mld-listener-done": 132, "nd-router-solicit": 133, "nd-router-advert": 134, "nd-neighbor-solicit": 135,
		"nd-neighbor-advert": 136, "nd-redirect": 137, "router-renumbering": 138, "mld2-listener-report": 143,
	})
	uid          = named(nftables.TypeUID, true, nil)
	arpOperation = named(nftables.TypeARPOp, false, names{"request": 1, "reply": 2})
	fibType      = named(nftables.TypeFIBAddr, true, names{
		"unspec": 0, "unicast": 1, "local": 2, "broadcast": 3, "anycast": 4, "multicast": 5, "blackhole": 6, "unreachable": 7, "prohibit": 8,
	})
	ctState  = named(nftables.TypeCTState, true, names{"invalid": 1, "established": 2, "related": 4, "new": 8, "untracked": 64})
	ctStatus = named(nftables.TypeCTStatus, true, names{"expected": 1, "seen-reply": 2, "assured": 4, "confirmed": 8, "snat": 16, "dnat": 32, "dying": 512})
)

var protocols = names{
	"icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "dccp": 33, "gre": 47, "esp": 50, "ah": 51, "ipv6-icmp": 58, "sctp": 132, "udplite": 136,
}

// names are the values that have one; all others are written as numbers.
type names map[string]uint32

// named is a number of which some values have a name.
func named(t nftables.SetDatatype, host bool, known names) datatype {
	byValue := map[uint32]string{}
	for name, v := range known {
		byValue[v] = name
	}
	return datatype{nft: t, host: host,
		parse: func(s string) ([]byte, error) {
			v, ok := known[s]
			if !ok {
				n, err := strconv.ParseUint(s, 10, 8*int(t.Bytes))
				if err != nil {
					return nil, fmt.Errorf("%q is no %s", s, t.Name)
				}
				v = uint32(n)
			}
			return number(v, int(t.Bytes), host), nil
		},
		format: func(b []byte) string {
			v := value(b, host)
			if name, ok := byValue[v]; ok {
				return name
			}
			return strconv.FormatUint(uint64(v), 10)
		},
	}
}

// raw16 is a number of two bytes that nft(8) knows no type of; it lists such in hexadecimal.
func raw16() datatype {
	t := nftables.TypeInteger
	t.Bytes = 2
	return datatype{nft: t,
		parse: func(s string) ([]byte, error) {
			n, err := strconv.ParseUint(s, 0, 16)
			if err != nil {
				return nil, fmt.Errorf("%q is no number of two bytes", s)
			}
			return number(uint32(n), 2, false), nil
		},
		format: func(b []byte) string { return fmt.Sprintf("%#x", value(b, false)) },
	}
}

// number writes a value of one, two or four bytes; only those of four have a host byte order.
func number(v uint32, size int, host bool) []byte {
	if host && size == 4 {
		return native32(v)
	}
	return binary.BigEndian.AppendUint32(nil, v)[4-size:]
}

func value(b []byte, host bool) uint32 {
	if host && len(b) == 4 {
		return binary.NativeEndian.Uint32(b)
	}
	var v uint32
	for _, c := range b {
		v = v<<8 | uint32(c)
	}
	return v
}

func parseName(s string) ([]byte, error) {
	s = strings.Trim(s, `"`)
	if s == "" || len(s) >= nameSize || strings.ContainsAny(s, " /\x00") {
		return nil, fmt.Errorf("%q is no interface name", s)
	}
	b := make([]byte, nameSize)
	copy(b, s)
	return b, nil
}

const nameSize = 16 // IFNAMSIZ

func parseMAC(s string) ([]byte, error) {
	mac, err := net.ParseMAC(s)
	if err == nil && len(mac) != 6 {
		err = fmt.Errorf("%q is no Ethernet address", s)
	}
	return mac, err
}

func parseIPv4(s string) ([]byte, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && !a.Is4() {
		err = fmt.Errorf("%q is no IPv4 address", s)
	}
	return a.AsSlice(), err
}

func parseIPv6(s string) ([]byte, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && (!a.Is6() || a.Zone() != "") {
		err = fmt.Errorf("%q is no IPv6 address", s)
	}
	return a.AsSlice(), err
}

// formatIP keeps the family: 16 bytes are IPv6, also ::ffff:10.0.0.1.
func formatIP(b []byte) string {
	a, _ := netip.AddrFromSlice(b)
	return a.String()
}

// A tuple is the datatypes of a set's key or value: the parts of a concatenation.
type tuple []datatype

func tupleOf(types []nft.Type) (tuple, error) {
	t := make(tuple, len(types))
	for i, name := range types {
		d, ok := datatypes[name]
		if !ok {
			return nil, fmt.Errorf("unknown nftables type %q", name)
		}
		t[i] = d
	}
	return t, nil
}

// length is the size of a value in bytes: parts of a concatenation fill whole words.
func (t tuple) length() int {
	if len(t) == 1 {
		return t[0].size()
	}
	n := 0
	for _, d := range t {
		n += aligned(d.size())
	}
	return n
}

// magic is nft's number for the type.
func (t tuple) magic() uint32 {
	var m uint32
	for _, d := range t {
		m = m<<nftables.SetConcatTypeBits | d.magic()
	}
	return m
}

const separator = " . "

// parse turns text such as "10.0.0.2 . tcp . 80" into the bytes of a key or a value.
func (t tuple) parse(s string) ([]byte, error) {
	parts := strings.Split(s, separator)
	if len(parts) != len(t) {
		return nil, fmt.Errorf("%q has %d parts, not %d", s, len(parts), len(t))
	}
	var out []byte
	for i, part := range parts {
		b, err := t[i].parse(part)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		out = append(out, b...)
		if len(t) > 1 {
			out = pad(out)
		}
	}
	return out, nil
}

// format is the reverse of parse, in one canonical text.
func (t tuple) format(b []byte) (string, error) {
	if len(b) != t.length() {
		return "", fmt.Errorf("%d bytes where a value has %d", len(b), t.length())
	}
	parts := make([]string, len(t))
	for i, d := range t {
		parts[i] = d.format(b[:d.size()])
		b = b[min(aligned(d.size()), len(b)):]
	}
	return strings.Join(parts, separator), nil
}
