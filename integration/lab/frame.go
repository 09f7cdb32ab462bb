package lab

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Frame is an Ethernet frame of a capture. What of it cannot be decoded is just not there.
type Frame struct {
	At   time.Duration // since the capture began
	Sent bool          // by the machine; otherwise it came in
	Data []byte        // with its VLAN tags

	packet gopacket.Packet
}

func decode(at time.Duration, sent bool, data []byte) Frame {
	// It recovers from panics of decoders.
	return Frame{at, sent, data, gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true})}
}

// own are the frame's layers, without those of a frame that is encapsulated in it.
func (f Frame) own() []gopacket.Layer {
	if f.packet == nil {
		return nil
	}
	all := f.packet.Layers()
	for i, x := range all {
		if x.LayerType() == layers.LayerTypeVXLAN {
			return all[:i]
		}
	}
	return all
}

// layer is a frame's outermost layer of a kind, nil if it has none.
func layer[L gopacket.Layer](f Frame) (l L) {
	for _, x := range f.own() {
		if found, ok := x.(L); ok {
			return found
		}
	}
	return l
}

// vlans are the tags' VLANs, from the outermost.
func (f Frame) vlans() (ids []uint16) {
	for _, x := range f.own() {
		if tag, ok := x.(*layers.Dot1Q); ok {
			ids = append(ids, tag.VLANIdentifier)
		}
	}
	return ids
}

// ends are the addresses that the frame goes from and to: of IP, or those that ARP speaks of.
func (f Frame) ends() (from, to netip.Addr) {
	addr := func(b []byte) netip.Addr {
		a, _ := netip.AddrFromSlice(b)
		return a.Unmap()
	}
	switch ip4, ip6, arp := layer[*layers.IPv4](f), layer[*layers.IPv6](f), layer[*layers.ARP](f); {
	case arp != nil:
		return addr(arp.SourceProtAddress), addr(arp.DstProtAddress)
	case ip4 != nil:
		return addr(ip4.SrcIP), addr(ip4.DstIP)
	case ip6 != nil:
		return addr(ip6.SrcIP), addr(ip6.DstIP)
	}
	return netip.Addr{}, netip.Addr{}
}

// ports are those of TCP and UDP, 0 for others.
func (f Frame) ports() (from, to int) {
	if tcp := layer[*layers.TCP](f); tcp != nil {
		return int(tcp.SrcPort), int(tcp.DstPort)
	}
	if udp := layer[*layers.UDP](f); udp != nil {
		return int(udp.SrcPort), int(udp.DstPort)
	}
	return 0, 0
}

// neighbour is what a message of neighbour discovery says: its target, and the link-layer addresses
// in its options.
func (f Frame) neighbour() (target netip.Addr, macs []net.HardwareAddr) {
	var options layers.ICMPv6Options
	var about net.IP
	if m := layer[*layers.ICMPv6NeighborSolicitation](f); m != nil {
		about, options = m.TargetAddress, m.Options
	} else if m := layer[*layers.ICMPv6NeighborAdvertisement](f); m != nil {
		about, options = m.TargetAddress, m.Options
	} else if m := layer[*layers.ICMPv6RouterSolicitation](f); m != nil {
		options = m.Options
	} else if m := layer[*layers.ICMPv6RouterAdvertisement](f); m != nil {
		options = m.Options
	} else if m := layer[*layers.ICMPv6Redirect](f); m != nil {
		about, options = m.TargetAddress, m.Options
	}
	for _, o := range options {
		if (o.Type == layers.ICMPv6OptSourceAddress || o.Type == layers.ICMPv6OptTargetAddress) && len(o.Data) >= 6 {
			macs = append(macs, net.HardwareAddr(o.Data[:6]))
		}
	}
	target, _ = netip.AddrFromSlice(about)
	return target, macs
}

// String tells of a frame in a line, in tcpdump's words.
func (f Frame) String() string {
	way := "In "
	if f.Sent {
		way = "Out"
	}
	s := fmt.Sprintf("%9.4f %s ", f.At.Seconds(), way)
	eth := layer[*layers.Ethernet](f)
	if eth == nil {
		return s + fmt.Sprintf("no Ethernet frame: %x", f.Data)
	}
	s += fmt.Sprintf("%s > %s, ", eth.SrcMAC, eth.DstMAC)
	for _, id := range f.vlans() {
		s += fmt.Sprintf("vlan %d, ", id)
	}
	return s + f.content() + fmt.Sprintf(", length %d", len(f.Data))
}

// content is what a frame carries, in words.
func (f Frame) content() string {
	if arp := layer[*layers.ARP](f); arp != nil {
		from, to := f.ends()
		if arp.Operation == layers.ARPReply {
			return fmt.Sprintf("ARP reply %s is-at %s (to %s, %s)", from, net.HardwareAddr(arp.SourceHwAddress), to, net.HardwareAddr(arp.DstHwAddress))
		}
		return fmt.Sprintf("ARP request who-has %s tell %s (%s)", to, from, net.HardwareAddr(arp.SourceHwAddress))
	}
	from, to := f.ends()
	if !from.IsValid() {
		var kinds []string
		for _, l := range f.packet.Layers()[1:] {
			kinds = append(kinds, l.LayerType().String())
		}
		return strings.TrimSpace(fmt.Sprintf("ethertype %#04x %s", uint16(layer[*layers.Ethernet](f).EthernetType), strings.Join(kinds, "/")))
	}
	ends := fmt.Sprintf("%s > %s: ", from, to)
	if a, b := f.ports(); a != 0 || b != 0 {
		ends = fmt.Sprintf("%s > %s: ", netip.AddrPortFrom(from, uint16(a)), netip.AddrPortFrom(to, uint16(b)))
	}
	return ends + f.message()
}

// message is what an IP packet carries, in words.
func (f Frame) message() string {
	if dhcp := layer[*layers.DHCPv4](f); dhcp != nil {
		return fmt.Sprintf("DHCP %s, client %s, yours %s", strings.ToLower(dhcpType(dhcp).String()), dhcp.ClientHWAddr, dhcp.YourClientIP)
	}
	if tcp := layer[*layers.TCP](f); tcp != nil {
		flags := ""
		for _, x := range []struct {
			is   bool
			word string
		}{{tcp.SYN, "S"}, {tcp.FIN, "F"}, {tcp.RST, "R"}, {tcp.PSH, "P"}, {tcp.ACK, "."}} {
			if x.is {
				flags += x.word
			}
		}
		return fmt.Sprintf("TCP [%s] seq %d, ack %d, %d bytes", flags, tcp.Seq, tcp.Ack, len(tcp.Payload))
	}
	if vni, inner, ok := f.VXLAN(); ok {
		return fmt.Sprintf("VXLAN vni %d, inside %s", vni, strings.TrimSpace(inner.String()[len("   0.0000 In "):]))
	}
	if udp := layer[*layers.UDP](f); udp != nil {
		return fmt.Sprintf("UDP, %d bytes", len(udp.Payload))
	}
	if icmp := layer[*layers.ICMPv4](f); icmp != nil {
		return fmt.Sprintf("ICMP %s, id %d, seq %d", icmp.TypeCode, icmp.Id, icmp.Seq)
	}
	if icmp := layer[*layers.ICMPv6](f); icmp != nil {
		s := fmt.Sprintf("ICMPv6 %s", icmp.TypeCode)
		target, macs := f.neighbour()
		if target.IsValid() {
			s += " of " + target.String()
		}
		for _, mac := range macs {
			s += ", link-layer address " + mac.String()
		}
		return s
	}
	if ip := layer[*layers.IPv4](f); ip != nil {
		return fmt.Sprintf("IP protocol %d, fragment offset %d", ip.Protocol, ip.FragOffset)
	}
	if ip := layer[*layers.IPv6](f); ip != nil {
		return fmt.Sprintf("IPv6, next header %d", ip.NextHeader)
	}
	return "?"
}

func dhcpType(m *layers.DHCPv4) layers.DHCPMsgType {
	for _, o := range m.Options {
		if o.Type == layers.DHCPOptMessageType && len(o.Data) == 1 {
			return layers.DHCPMsgType(o.Data[0])
		}
	}
	return layers.DHCPMsgTypeUnspecified
}
