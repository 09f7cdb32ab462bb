package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Sizes and numbers of the headers (IEEE 802.3, RFC 791, RFC 8200, RFC 768, RFC 826).
const (
	ethernetHeader = 14
	ipHeader       = 20
	ip6Header      = 40
	udpHeader      = 8
	arpPacket      = 28

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherARP  = 0x0806

	protocolUDP      = 17
	protocolICMP6    = 58
	protocolHopByHop = 0
	hardwareEthernet = 1

	serverPort  = 67
	clientPort  = 68
	serverPort6 = 547
	clientPort6 = 546
)

var (
	broadcastMAC = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	noAddress    = netip.IPv4Unspecified()
	everybody    = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// packet is an IP packet in an Ethernet frame, without IP options or extension headers of its own.
type packet struct {
	from, to       MAC
	source, target netip.Addr
	protocol       byte
	hops           byte // time to live, or hop limit
	payload        []byte
}

// frame writes the packet as it goes on the wire, from the Ethernet header on.
func (p packet) frame() []byte {
	if p.source.Is6() {
		f := make([]byte, ethernetHeader+ip6Header, ethernetHeader+ip6Header+len(p.payload))
		putEthernet(f, p.to, p.from, etherIPv6)
		ip := f[ethernetHeader:]
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(len(p.payload)))
		ip[6], ip[7] = p.protocol, p.hops
		copy(ip[8:], p.source.AsSlice())
		copy(ip[24:], p.target.AsSlice())
		return append(f, p.payload...)
	}
	f := make([]byte, ethernetHeader+ipHeader, ethernetHeader+ipHeader+len(p.payload))
	putEthernet(f, p.to, p.from, etherIPv4)
	ip := f[ethernetHeader:]
	ip[0] = 4<<4 | ipHeader/4
	binary.BigEndian.PutUint16(ip[2:], uint16(ipHeader+len(p.payload)))
	ip[8], ip[9] = p.hops, p.protocol
	copy(ip[12:], p.source.AsSlice())
	copy(ip[16:], p.target.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip))
	return append(f, p.payload...)
}

// sum sums the payload and the pseudo header made of the rest, for the checksum of UDP (RFC 768) and of ICMPv6 (RFC 4443).
func (p packet) sum() uint16 {
	pseudo := sum(sum(uint16(p.protocol), p.source.AsSlice()), p.target.AsSlice())
	length := [2]byte{byte(len(p.payload) >> 8), byte(len(p.payload))}
	return sum(sum(pseudo, length[:]), p.payload)
}

// seal writes the checksum of the payload to its place in it.
func (p packet) seal(at int) packet {
	checksum := ^p.sum()
	if checksum == 0 {
		checksum = 0xffff // 0 says in UDP that there is none
	}
	binary.BigEndian.PutUint16(p.payload[at:], checksum)
	return p
}

// readPacket reads a frame. The payload is part of it. Whole packets only: fragments are an error.
func readPacket(f []byte) (packet, error) {
	if len(f) < ethernetHeader+ipHeader {
		return packet{}, fmt.Errorf("frame of %d bytes is too short for IP", len(f))
	}
	p := packet{to: MAC(f[0:6]), from: MAC(f[6:12])}
	ip := f[ethernetHeader:]
	switch t := binary.BigEndian.Uint16(f[12:]); t {
	case etherIPv4:
		header, length := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
		switch {
		case ip[0]>>4 != 4:
			return packet{}, fmt.Errorf("IP version %d is not 4", ip[0]>>4)
		case header < ipHeader || length < header || length > len(ip):
			return packet{}, fmt.Errorf("IPv4 header of %d bytes and packet of %d do not fit into %d", header, length, len(ip))
		case sum(0, ip[:header]) != 0xffff:
			return packet{}, errors.New("IPv4 header checksum is wrong")
		case binary.BigEndian.Uint16(ip[6:])&0x3fff != 0:
			return packet{}, errors.New("packet is a fragment")
		}
		p.hops, p.protocol, p.payload = ip[8], ip[9], ip[header:length]
		p.source, p.target = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
	case etherIPv6: // extension headers are other protocols, which nobody here asks for
		if len(ip) < ip6Header || ip[0]>>4 != 6 {
			return packet{}, fmt.Errorf("%d bytes of IP version %d are no IPv6 packet", len(ip), ip[0]>>4)
		}
		length := int(binary.BigEndian.Uint16(ip[4:]))
		if length > len(ip)-ip6Header {
			return packet{}, fmt.Errorf("IPv6 payload of %d bytes does not fit into %d", length, len(ip)-ip6Header)
		}
		p.protocol, p.hops, p.payload = ip[6], ip[7], ip[ip6Header:ip6Header+length]
		p.source, p.target = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
	default:
		return packet{}, fmt.Errorf("EtherType 0x%04x is not IP", t)
	}
	return p, nil
}

// datagram is a UDP datagram in an Ethernet frame.
type datagram struct {
	from, to           MAC
	source, target     netip.Addr
	sourcePort, toPort uint16
	payload            []byte
}

// frame writes the datagram as it goes on the wire, from the Ethernet header on.
func (d datagram) frame() []byte {
	udp := make([]byte, udpHeader, udpHeader+len(d.payload))
	binary.BigEndian.PutUint16(udp, d.sourcePort)
	binary.BigEndian.PutUint16(udp[2:], d.toPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpHeader+len(d.payload)))
	udp = append(udp, d.payload...)
	return packet{d.from, d.to, d.source, d.target, protocolUDP, 64, udp}.seal(6).frame()
}

// readDatagram reads a frame. The payload is part of it. The UDP checksum counts unless unsummed says that the sender left it
// to a network card that the frame has not passed.
func readDatagram(f []byte, unsummed bool) (datagram, error) {
	p, err := readPacket(f)
	if err != nil {
		return datagram{}, err
	}
	udp := p.payload
	switch {
	case p.protocol != protocolUDP:
		return datagram{}, fmt.Errorf("IP protocol %d is not UDP", p.protocol)
	case len(udp) < udpHeader:
		return datagram{}, fmt.Errorf("packet with %d bytes is too short for UDP", len(udp))
	}
	size := int(binary.BigEndian.Uint16(udp[4:]))
	if size < udpHeader || size > len(udp) {
		return datagram{}, fmt.Errorf("UDP length %d does not fit into %d bytes", size, len(udp))
	}
	p.payload = udp[:size]
	none := binary.BigEndian.Uint16(udp[6:]) == 0 && p.source.Is4() // IPv6 always has one (RFC 8200)
	if !none && !unsummed && p.sum() != 0xffff {
		return datagram{}, errors.New("UDP checksum is wrong")
	}
	return datagram{
		from: p.from, to: p.to, source: p.source, target: p.target,
		sourcePort: binary.BigEndian.Uint16(udp), toPort: binary.BigEndian.Uint16(udp[2:]), payload: udp[udpHeader:size],
	}, nil
}

// sum is the Internet checksum before its complement (RFC 1071).
func sum(begin uint16, b []byte) uint16 {
	total := uint32(begin)
	for ; len(b) >= 2; b = b[2:] {
		total += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		total += uint32(b[0]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}

// arp is an ARP packet for IPv4 over Ethernet.
type arp struct {
	reply            bool
	sender, target   MAC
	senderIP, wanted netip.Addr
}

// frame writes the packet as a broadcast, padded to the least length of a frame.
func (a arp) frame() []byte {
	f := make([]byte, 60)
	putEthernet(f, broadcastMAC, a.sender, etherARP)
	p := f[ethernetHeader:]
	binary.BigEndian.PutUint16(p, hardwareEthernet)
	binary.BigEndian.PutUint16(p[2:], etherIPv4)
	p[4], p[5] = 6, 4
	p[7] = 1
	if a.reply {
		p[7] = 2
	}
	copy(p[8:], a.sender[:])
	copy(p[14:], a.senderIP.AsSlice())
	copy(p[18:], a.target[:])
	copy(p[24:], a.wanted.AsSlice())
	return f
}

func readARP(f []byte) (arp, error) {
	if len(f) < ethernetHeader+arpPacket || binary.BigEndian.Uint16(f[12:]) != etherARP {
		return arp{}, errors.New("frame is not ARP")
	}
	p := f[ethernetHeader:]
	if [6]byte(p) != [6]byte{0, hardwareEthernet, etherIPv4 >> 8, etherIPv4 & 255, 6, 4} {
		return arp{}, errors.New("ARP is not for IPv4 over Ethernet")
	}
	operation := binary.BigEndian.Uint16(p[6:])
	if operation != 1 && operation != 2 {
		return arp{}, fmt.Errorf("ARP operation %d is neither request nor reply", operation)
	}
	return arp{
		reply:    operation == 2,
		sender:   MAC(p[8:14]),
		senderIP: netip.AddrFrom4([4]byte(p[14:18])),
		target:   MAC(p[18:24]),
		wanted:   netip.AddrFrom4([4]byte(p[24:28])),
	}, nil
}

func putEthernet(f []byte, to, from MAC, etherType uint16) {
	copy(f, to[:])
	copy(f[6:], from[:])
	binary.BigEndian.PutUint16(f[12:], etherType)
}
