package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Messages of neighbour discovery (RFC 4861, 4) and their options.
const (
	routerSolicitation     = 133
	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136

	optionSourceMAC = 1
	optionTargetMAC = 2
	optionPrefix    = 3
	optionMTU       = 5

	listenerReport = 143 // version 2 (RFC 3810)

	// neighbourHops is the hop limit of all of them: what was forwarded has less.
	neighbourHops = 255
)

var (
	nobody6    = netip.IPv6Unspecified()
	allRouters = netip.MustParseAddr("ff02::2")
	allMLD     = netip.MustParseAddr("ff02::16")
)

// linkLocal is the address that a kernel makes of a MAC (RFC 4291, appendix A).
func linkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// multicastMAC is where frames for a multicast address go (RFC 2464).
func multicastMAC(a netip.Addr) MAC {
	b := a.As16()
	return MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}
}

// solicitedNode is the multicast address that who has an address listens to (RFC 4291, 2.7.1).
func solicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]})
}

// neighbour is a message of neighbour discovery about a target.
type neighbour struct {
	from   MAC
	source netip.Addr
	kind   byte
	target netip.Addr
}

// solicitRouters asks who is a router.
func solicitRouters(m MAC) []byte {
	body := append([]byte{routerSolicitation, 7: 0}, optionSourceMAC, 1)
	return neighbourFrame(m, multicastMAC(allRouters), linkLocal(m), allRouters, append(body, m[:]...))
}

// probeNeighbour asks who has an address, as somebody who wants to take it (RFC 4862, 5.4.2).
func probeNeighbour(m MAC, a netip.Addr) []byte {
	to := solicitedNode(a)
	return neighbourFrame(m, multicastMAC(to), nobody6, to, append([]byte{neighbourSolicitation, 7: 0}, a.AsSlice()...))
}

// reply tells who has the address that somebody looks for.
func (n neighbour) reply(m MAC) []byte {
	const solicited, override = 0x40, 0x20
	body := append([]byte{neighbourAdvertisement, 4: solicited | override, 7: 0}, n.target.AsSlice()...)
	body = append(append(body, optionTargetMAC, 1), m[:]...)
	return neighbourFrame(m, n.from, n.target, n.source, body)
}

// joinGroup reports that a multicast address is listened to (MLDv2; RFC 3810, 5.2), to those who mind packets for somebody else
// (router alert; RFC 2711).
func joinGroup(m MAC, group netip.Addr) []byte {
	const toExclude = 4 // change to exclude mode, with nobody excluded
	body := append([]byte{listenerReport, 6: 0, 7: 1}, toExclude, 0, 0, 0)
	body = append(body, group.AsSlice()...)
	p := packet{m, multicastMAC(allMLD), linkLocal(m), allMLD, protocolICMP6, 1, body}.seal(2)
	p.protocol, p.payload = protocolHopByHop, append([]byte{protocolICMP6, 0, 5, 2, 0, 0, 1, 0}, p.payload...)
	return p.frame()
}

func neighbourFrame(from, to MAC, source, target netip.Addr, body []byte) []byte {
	return packet{from, to, source, target, protocolICMP6, neighbourHops, body}.seal(2).frame()
}

// readICMP6 reads a message of neighbour discovery; what is in it, others read.
func readICMP6(frame []byte) (packet, error) {
	p, err := readPacket(frame)
	switch {
	case err != nil:
		return packet{}, err
	case p.protocol != protocolICMP6 || !p.source.Is6():
		return packet{}, errors.New("packet is not ICMPv6")
	case len(p.payload) < 8 || p.payload[1] != 0:
		return packet{}, fmt.Errorf("message of %d bytes is not one of neighbour discovery", len(p.payload))
	case p.hops != neighbourHops:
		return packet{}, errors.New("message was forwarded")
	case p.sum() != 0xffff:
		return packet{}, errors.New("ICMPv6 checksum is wrong")
	}
	return p, nil
}

// readNeighbour reads a solicitation or advertisement of a neighbour.
func readNeighbour(p packet) (neighbour, error) {
	kind := p.payload[0]
	if kind != neighbourSolicitation && kind != neighbourAdvertisement || len(p.payload) < 24 {
		return neighbour{}, errors.New("message is not about a neighbour")
	}
	return neighbour{p.from, p.source, kind, netip.AddrFrom16([16]byte(p.payload[8:24]))}, nil
}

// claims says whether somebody else has the leased address, or is about to take it.
func (n neighbour) claims(l Lease) bool {
	return n.from != l.MAC && n.target == l.Prefix.Addr() && (n.kind == neighbourAdvertisement || n.source == nobody6)
}

// advertisement is what a router says of itself and the LAN.
type advertisement struct {
	router   netip.Addr
	leads    bool           // it is a default router
	prefixes []netip.Prefix // on the link
	mtu      int            // 0: not told
	at       time.Time
}

// readAdvertisement reads a router advertisement (RFC 4861, 4.2 and 6.1.2). Options that make no sense are none.
func readAdvertisement(p packet) (advertisement, error) {
	body := p.payload
	if body[0] != routerAdvertisement || len(body) < 16 || !p.source.IsLinkLocalUnicast() {
		return advertisement{}, errors.New("message is not a router's")
	}
	a := advertisement{router: p.source, leads: binary.BigEndian.Uint16(body[6:]) > 0}
	for options := body[16:]; len(options) >= 8; {
		length := int(options[1]) * 8
		if length == 0 || length > len(options) {
			return advertisement{}, errors.New("router advertisement is cut off")
		}
		o := options[:length]
		options = options[length:]
		switch {
		case o[0] == optionPrefix && length == 32 && o[3]&0x80 != 0 && binary.BigEndian.Uint32(o[4:]) > 0:
			prefix := netip.PrefixFrom(netip.AddrFrom16([16]byte(o[16:])), int(o[2])).Masked()
			if prefix.IsValid() && prefix.Bits() > 0 && !prefix.Addr().IsLinkLocalUnicast() && len(a.prefixes) < maxPrefixes {
				a.prefixes = append(a.prefixes, prefix)
			}
		case o[0] == optionMTU && length == 8:
			if mtu := binary.BigEndian.Uint32(o[4:]); mtu >= minMTU6 && mtu <= maxMTU {
				a.mtu = int(mtu)
			}
		}
	}
	return a, nil
}
