package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Sizes and numbers of the headers (IEEE 802.3, RFC 791, RFC 768, RFC 826).
const (
	ethernetHeader = 14
	ipHeader       = 20
	udpHeader      = 8
	arpPacket      = 28

	etherIPv4 = 0x0800
	etherARP  = 0x0806

	protocolUDP      = 17
	hardwareEthernet = 1

	serverPort = 67
	clientPort = 68
)

var (
	broadcastMAC = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	noAddress    = netip.IPv4Unspecified()
	everybody    = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// datagram is a UDP datagram in an Ethernet frame.
type datagram struct {
	from, to           MAC
	source, target     netip.Addr
	sourcePort, toPort uint16
	payload            []byte
}

// frame writes the datagram as it goes on the wire, from the Ethernet header on.
func (d datagram) frame() []byte {
	f := make([]byte, ethernetHeader+ipHeader+udpHeader+len(d.payload))
	putEthernet(f, d.to, d.from, etherIPv4)

	ip := f[ethernetHeader:]
	ip[0] = 4<<4 | ipHeader/4
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[8] = 64 // time to live
	ip[9] = protocolUDP
	source, target := d.source.As4(), d.target.As4()
	copy(ip[12:], source[:])
	copy(ip[16:], target[:])
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip[:ipHeader]))

	udp := ip[ipHeader:]
	binary.BigEndian.PutUint16(udp, d.sourcePort)
	binary.BigEndian.PutUint16(udp[2:], d.toPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	copy(udp[udpHeader:], d.payload)
	checksum := ^udpSum(ip, udp)
	if checksum == 0 {
		checksum = 0xffff // 0 says that there is none
	}
	binary.BigEndian.PutUint16(udp[6:], checksum)
	return f
}

// readDatagram reads a frame. The payload is part of it. The UDP checksum counts unless unsummed says that the sender left it
// to a network card that the frame has not passed. Whole datagrams only: fragments are an error.
func readDatagram(f []byte, unsummed bool) (datagram, error) {
	if len(f) < ethernetHeader+ipHeader+udpHeader {
		return datagram{}, fmt.Errorf("frame of %d bytes is too short for UDP over IPv4", len(f))
	}
	if t := binary.BigEndian.Uint16(f[12:]); t != etherIPv4 {
		return datagram{}, fmt.Errorf("EtherType 0x%04x is not IPv4", t)
	}
	ip := f[ethernetHeader:]
	header, length := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	switch {
	case ip[0]>>4 != 4:
		return datagram{}, fmt.Errorf("IP version %d is not 4", ip[0]>>4)
	case header < ipHeader || length < header+udpHeader || length > len(ip):
		return datagram{}, fmt.Errorf("IPv4 header of %d bytes and packet of %d do not fit into %d", header, length, len(ip))
	case sum(0, ip[:header]) != 0xffff:
		return datagram{}, errors.New("IPv4 header checksum is wrong")
	case binary.BigEndian.Uint16(ip[6:])&0x3fff != 0:
		return datagram{}, errors.New("packet is a fragment")
	case ip[9] != protocolUDP:
		return datagram{}, fmt.Errorf("IP protocol %d is not UDP", ip[9])
	}
	udp := ip[header:length]
	size := int(binary.BigEndian.Uint16(udp[4:]))
	if size < udpHeader || size > len(udp) {
		return datagram{}, fmt.Errorf("UDP length %d does not fit into %d bytes", size, len(udp))
	}
	udp = udp[:size]
	if binary.BigEndian.Uint16(udp[6:]) != 0 && !unsummed && udpSum(ip, udp) != 0xffff {
		return datagram{}, errors.New("UDP checksum is wrong")
	}
	return datagram{
		to:         MAC(f[0:6]),
		from:       MAC(f[6:12]),
		source:     netip.AddrFrom4([4]byte(ip[12:16])),
		target:     netip.AddrFrom4([4]byte(ip[16:20])),
		sourcePort: binary.BigEndian.Uint16(udp),
		toPort:     binary.BigEndian.Uint16(udp[2:]),
		payload:    udp[udpHeader:],
	}, nil
}

// udpSum sums a UDP datagram and the pseudo header made of its IP header.
func udpSum(ip, udp []byte) uint16 {
	return sum(uint32(sum(uint32(protocolUDP+len(udp)), ip[12:20])), udp)
}

// sum is the Internet checksum before its complement (RFC 1071).
func sum(total uint32, b []byte) uint16 {
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
