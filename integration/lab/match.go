package lab

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/gopacket/gopacket/layers"
)

// Match is a description of frames: ICMPFrom(a).To(b).VLAN(20). Each word of it narrows the ones
// before it. Addresses are given as text, and one that is no address panics.
type Match struct {
	words string
	test  func(Frame) bool // nil: every frame
}

// String is the description in words.
func (m Match) String() string {
	if m.words == "" {
		return "frame"
	}
	return m.words
}

func (m Match) fits(f Frame) bool { return m.test == nil || m.test(f) }

func (m Match) and(words string, test func(Frame) bool) Match {
	return Match{strings.TrimSpace(m.words + " " + words), func(f Frame) bool { return m.fits(f) && test(f) }}
}

// That narrows a description by a test of the caller's, with words for it.
func (m Match) That(words string, test func(Frame) bool) Match { return m.and(words, test) }

// And is what both describe.
func (m Match) And(o Match) Match {
	if o.test == nil {
		return m
	}
	return m.and(o.words, o.test)
}

// Not is what a description does not fit.
func Not(m Match) Match {
	return Match{"not (" + m.String() + ")", func(f Frame) bool { return !m.fits(f) }}
}

// Either is what at least one of the descriptions fits.
func Either(all ...Match) Match {
	var words []string
	for _, m := range all {
		words = append(words, m.String())
	}
	return Match{"either (" + strings.Join(words, ") or (") + ")", func(f Frame) bool {
		return slices.ContainsFunc(all, func(m Match) bool { return m.fits(f) })
	}}
}

// What frames can be.

// Frames is every frame.
func Frames() Match { return Match{} }

// ARP is requests and replies.
func ARP() Match {
	return Frames().and("ARP", func(f Frame) bool { return layer[*layers.ARP](f) != nil })
}

// ARPRequest asks who has To, From is who asks.
func ARPRequest() Match { return arp("ARP request", layers.ARPRequest) }

// ARPReply says what the MAC address of From is, to To.
func ARPReply() Match { return arp("ARP reply", layers.ARPReply) }

func arp(words string, operation uint16) Match {
	return Frames().and(words, func(f Frame) bool {
		l := layer[*layers.ARP](f)
		return l != nil && l.Operation == operation
	})
}

// IPv4 is packets of IPv4.
func IPv4() Match {
	return Frames().and("IPv4", func(f Frame) bool { return layer[*layers.IPv4](f) != nil })
}

// IPv6 is packets of IPv6.
func IPv6() Match {
	return Frames().and("IPv6", func(f Frame) bool { return layer[*layers.IPv6](f) != nil })
}

// TCP is segments of TCP, over IPv4 or IPv6.
func TCP() Match {
	return Frames().and("TCP", func(f Frame) bool { return layer[*layers.TCP](f) != nil })
}

// UDP is datagrams of UDP, over IPv4 or IPv6.
func UDP() Match {
	return Frames().and("UDP", func(f Frame) bool { return layer[*layers.UDP](f) != nil })
}

// ICMP is echo and error messages of ICMP and of ICMPv6: not neighbour discovery, nor multicast
// listeners.
func ICMP() Match {
	return Frames().and("ICMP", func(f Frame) bool {
		if m := layer[*layers.ICMPv6](f); m != nil {
			return m.TypeCode.Type() <= layers.ICMPv6TypeEchoReply
		}
		return layer[*layers.ICMPv4](f) != nil
	})
}

// ICMPFrom is ICMP from an address.
func ICMPFrom(ip string) Match { return ICMP().From(ip) }

// EchoRequest is ping's question, of IPv4 or IPv6.
func EchoRequest() Match {
	return icmp("echo request", layers.ICMPv4TypeEchoRequest, layers.ICMPv6TypeEchoRequest)
}

// EchoReply is the answer to ping.
func EchoReply() Match {
	return icmp("echo reply", layers.ICMPv4TypeEchoReply, layers.ICMPv6TypeEchoReply)
}

func icmp(words string, type4, type6 uint8) Match {
	return Frames().and(words, func(f Frame) bool {
		if m := layer[*layers.ICMPv6](f); m != nil {
			return m.TypeCode.Type() == type6
		}
		m := layer[*layers.ICMPv4](f)
		return m != nil && m.TypeCode.Type() == type4
	})
}

// ICMPType is ICMP (RFC 792) of a type.
func ICMPType(number uint8) Match {
	return Frames().and(fmt.Sprintf("ICMP type %d", number), func(f Frame) bool {
		m := layer[*layers.ICMPv4](f)
		return m != nil && m.TypeCode.Type() == number
	})
}

// ICMPv6Type is ICMPv6 (RFC 4443) of a type.
func ICMPv6Type(number uint8) Match {
	return Frames().and(fmt.Sprintf("ICMPv6 type %d", number), func(f Frame) bool {
		m := layer[*layers.ICMPv6](f)
		return m != nil && m.TypeCode.Type() == number
	})
}

// NeighbourSolicitation asks who has About.
func NeighbourSolicitation() Match {
	return ICMPv6Type(layers.ICMPv6TypeNeighborSolicitation).called("neighbour solicitation")
}

// NeighbourAdvertisement says what the MAC address of About is.
func NeighbourAdvertisement() Match {
	return ICMPv6Type(layers.ICMPv6TypeNeighborAdvertisement).called("neighbour advertisement")
}

func (m Match) called(words string) Match { return Match{words, m.test} }

// DHCP is messages of DHCP for IPv4 of a type: "discover", "offer", "request", "decline", "ack",
// "nak", "release" or "inform".
func DHCP(kind string) Match {
	return Frames().and("DHCP "+kind, func(f Frame) bool {
		m := layer[*layers.DHCPv4](f)
		return m != nil && strings.EqualFold(dhcpType(m).String(), kind)
	})
}

// DHCPv6 is messages of DHCP for IPv6 of a type: "solicit", "advertise", "request", "renew", "rebind",
// "reply", "release" or "decline".
func DHCPv6(kind string) Match {
	return Frames().and("DHCPv6 "+kind, func(f Frame) bool {
		m := layer[*layers.DHCPv6](f)
		return m != nil && strings.EqualFold(m.MsgType.String(), kind)
	})
}

// SourceMAC is frames from a MAC address.
func SourceMAC(mac string) Match { return Frames().SourceMAC(mac) }

// DestinationMAC is frames to a MAC address.
func DestinationMAC(mac string) Match { return Frames().DestinationMAC(mac) }

// Mentions is frames in which the six bytes of a MAC address are somewhere: in the Ethernet header,
// in ARP, in an option of neighbour discovery, in DHCP.
func Mentions(mac string) Match { return Frames().Mentioning(mac) }

// What narrows them.

// From is frames from an IP address; of ARP, those whose sender has it.
func (m Match) From(ip string) Match {
	want := netip.MustParseAddr(ip)
	return m.and("from "+ip, func(f Frame) bool { from, _ := f.ends(); return from == want })
}

// To is frames to an IP address; of ARP, those whose target has it.
func (m Match) To(ip string) Match {
	want := netip.MustParseAddr(ip)
	return m.and("to "+ip, func(f Frame) bool { _, to := f.ends(); return to == want })
}

// FromPort is segments and datagrams from a port.
func (m Match) FromPort(port int) Match {
	return m.and(fmt.Sprintf("from port %d", port), func(f Frame) bool { from, _ := f.ports(); return from == port })
}

// ToPort is segments and datagrams to a port.
func (m Match) ToPort(port int) Match {
	return m.and(fmt.Sprintf("to port %d", port), func(f Frame) bool { _, to := f.ports(); return to == port })
}

// Protocol is packets of an IP protocol: the number in the IPv4 header, or in the last header of
// IPv6 that can be read.
func (m Match) Protocol(number int) Match {
	return m.and(fmt.Sprintf("of protocol %d", number), func(f Frame) bool {
		if ip := layer[*layers.IPv4](f); ip != nil {
			return int(ip.Protocol) == number
		}
		ip := layer[*layers.IPv6](f)
		if ip == nil {
			return false
		}
		last := ip.NextHeader
		for _, l := range f.own() {
			switch l := l.(type) {
			case *layers.IPv6HopByHop:
				last = l.NextHeader
			case *layers.IPv6Routing:
				last = l.NextHeader
			case *layers.IPv6Fragment:
				last = l.NextHeader
			case *layers.IPv6Destination:
				last = l.NextHeader
			}
		}
		return int(last) == number
	})
}

// SourceMAC is frames whose Ethernet header says they come from an address.
func (m Match) SourceMAC(mac string) Match {
	want := parseMAC(mac)
	return m.and("from MAC "+mac, func(f Frame) bool {
		eth := layer[*layers.Ethernet](f)
		return eth != nil && bytes.Equal(eth.SrcMAC, want)
	})
}

// DestinationMAC is frames whose Ethernet header says they go to an address.
func (m Match) DestinationMAC(mac string) Match {
	want := parseMAC(mac)
	return m.and("to MAC "+mac, func(f Frame) bool {
		eth := layer[*layers.Ethernet](f)
		return eth != nil && bytes.Equal(eth.DstMAC, want)
	})
}

// Mentioning is frames in which the six bytes of a MAC address are somewhere.
func (m Match) Mentioning(mac string) Match {
	want := parseMAC(mac)
	return m.and("with "+mac+" in it", func(f Frame) bool { return bytes.Contains(f.Data, want) })
}

// SenderMAC is ARP whose sender says it has a MAC address.
func (m Match) SenderMAC(mac string) Match {
	want := parseMAC(mac)
	return m.and("with the sender's MAC "+mac, func(f Frame) bool {
		arp := layer[*layers.ARP](f)
		return arp != nil && bytes.Equal(arp.SourceHwAddress, want)
	})
}

// TargetMAC is ARP with a MAC address as its target's.
func (m Match) TargetMAC(mac string) Match {
	want := parseMAC(mac)
	return m.and("with the target's MAC "+mac, func(f Frame) bool {
		arp := layer[*layers.ARP](f)
		return arp != nil && bytes.Equal(arp.DstHwAddress, want)
	})
}

// About is neighbour discovery whose target is an address.
func (m Match) About(ip string) Match {
	want := netip.MustParseAddr(ip)
	return m.and("about "+ip, func(f Frame) bool { target, _ := f.neighbour(); return target == want })
}

// LinkLayer is neighbour discovery with a MAC address in an option (source or target link-layer
// address).
func (m Match) LinkLayer(mac string) Match {
	want := parseMAC(mac)
	return m.and("with link-layer address "+mac, func(f Frame) bool {
		_, macs := f.neighbour()
		return slices.ContainsFunc(macs, func(a net.HardwareAddr) bool { return bytes.Equal(a, want) })
	})
}

// VLAN is frames whose outermost tag is of a VLAN.
func (m Match) VLAN(id int) Match {
	return m.and(fmt.Sprintf("in VLAN %d", id), func(f Frame) bool {
		ids := f.vlans()
		return len(ids) > 0 && int(ids[0]) == id
	})
}

// Untagged is frames without a VLAN tag.
func (m Match) Untagged() Match {
	return m.and("without a VLAN tag", func(f Frame) bool { return len(f.vlans()) == 0 })
}

// Carrying is frames with a text somewhere in them.
func (m Match) Carrying(text string) Match {
	return m.and(fmt.Sprintf("carrying %q", text), func(f Frame) bool { return bytes.Contains(f.Data, []byte(text)) })
}

// Sent is frames that the machine of the capture sends.
func (m Match) Sent() Match {
	return m.and("sent", func(f Frame) bool { return f.Sent })
}

// Received is frames that come in to the machine of the capture.
func (m Match) Received() Match {
	return m.and("received", func(f Frame) bool { return !f.Sent })
}

func parseMAC(mac string) net.HardwareAddr {
	a, err := net.ParseMAC(mac)
	if err != nil {
		panic(err)
	}
	return a
}
