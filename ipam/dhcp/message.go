package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

const (
	// maxMessage is the longest message that servers are asked to send (option 57). It fits into one packet on any link that
	// can carry IPv6, so that no answer comes in fragments.
	maxMessage = 1200
	// minLifetime is the shortest lease that is taken. A shorter one would do little but make traffic.
	minLifetime = 10 * time.Second
	// minMTU is the smallest MTU that is believed: what every IPv4 host has to accept (RFC 791). maxMTU is IPv4's own limit.
	minMTU, maxMTU = 576, 65535
	// maxServers and maxSearch are how many name servers and search domains are taken. A search list of more than
	// maxSearchBytes is not read: with compression its decoding takes time that grows with the third power.
	maxServers, maxSearch, maxSearchBytes = 16, 32, 512
)

// Offsets in a message, which has no others that are read by hand (RFC 2131, 2).
const (
	offsetXID     = 4
	offsetChaddr  = 28
	offsetSname   = 44
	offsetFile    = 108
	offsetOptions = 240
)

// wantedOptions is what servers are asked for (option 55). Classless routes come before routers (RFC 3442).
var wantedOptions = dhcpv4.OptParameterRequestList(
	dhcpv4.OptionSubnetMask, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
	dhcpv4.OptionDomainName, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionDNSDomainSearchList,
	dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
)

// message makes a message of a client that has no address yet, who therefore wants the answer as a broadcast: nobody answers
// ARP for the address (RFC 2131, 4.1). What else the type of message takes, the caller adds.
func (r Request) message(kind dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	m := &dhcpv4.DHCPv4{
		OpCode:       dhcpv4.OpcodeBootRequest,
		HWType:       iana.HWTypeEthernet,
		ClientHWAddr: r.MAC[:],
		Options: dhcpv4.OptionsFromList(
			dhcpv4.OptMessageType(kind),
			dhcpv4.OptClientIdentifier(r.clientID()),
		),
	}
	if kind == dhcpv4.MessageTypeDiscover || kind == dhcpv4.MessageTypeRequest {
		m.SetBroadcast()
		m.UpdateOption(wantedOptions)
		m.UpdateOption(dhcpv4.OptMaxMessageSize(maxMessage))
		if r.Hostname != "" {
			m.UpdateOption(dhcpv4.OptHostName(r.Hostname))
		}
	}
	return m
}

// Each message is of one state of the client (RFC 2131, table 5).

// discover asks who has an address, preferably the wanted one.
func (r Request) discover(wanted netip.Addr) *dhcpv4.DHCPv4 {
	m := r.message(dhcpv4.MessageTypeDiscover)
	if wanted.IsValid() {
		m.UpdateOption(dhcpv4.OptRequestedIPAddress(wanted.AsSlice()))
	}
	return m
}

// selectOffer takes one server's offer, and so turns the others' down.
func (l Lease) selectOffer() *dhcpv4.DHCPv4 {
	m := l.verify()
	m.UpdateOption(dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
	return m
}

// verify asks whether the lease still holds, as after a restart (INIT-REBOOT). The answer is a broadcast.
func (l Lease) verify() *dhcpv4.DHCPv4 {
	m := l.message(dhcpv4.MessageTypeRequest)
	m.UpdateOption(dhcpv4.OptRequestedIPAddress(l.Prefix.Addr().AsSlice()))
	return m
}

// extend asks for more time (RENEWING, REBINDING). The answer goes to the address.
func (l Lease) extend() *dhcpv4.DHCPv4 {
	m := l.message(dhcpv4.MessageTypeRequest)
	m.SetUnicast()
	m.ClientIPAddr = l.Prefix.Addr().AsSlice()
	return m
}

// release gives the address back.
func (l Lease) release() *dhcpv4.DHCPv4 {
	m := l.message(dhcpv4.MessageTypeRelease)
	m.ClientIPAddr = l.Prefix.Addr().AsSlice()
	m.UpdateOption(dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
	return m
}

// decline tells the server that somebody else uses the address.
func (l Lease) decline(why string) *dhcpv4.DHCPv4 {
	m := l.message(dhcpv4.MessageTypeDecline)
	m.UpdateOption(dhcpv4.OptRequestedIPAddress(l.Prefix.Addr().AsSlice()))
	m.UpdateOption(dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
	m.UpdateOption(dhcpv4.OptMessage(why))
	return m
}

// broadcast puts a message into a frame for everybody.
func (r Request) broadcast(m *dhcpv4.DHCPv4) []byte {
	return datagram{
		from: r.MAC, to: broadcastMAC, source: noAddress, target: everybody,
		sourcePort: clientPort, toPort: serverPort, payload: m.ToBytes(),
	}.frame()
}

// broadcast puts a message that says that the client has the address into a frame for everybody.
func (l Lease) broadcast(m *dhcpv4.DHCPv4) []byte {
	return datagram{
		from: l.MAC, to: broadcastMAC, source: l.Prefix.Addr(), target: everybody,
		sourcePort: clientPort, toPort: serverPort, payload: m.ToBytes(),
	}.frame()
}

// unicast puts a message into a frame for the lease's server, or the relay to it. Who that is on the link is in the lease; a
// lease that does not say has it sent to everybody on the link.
func (l Lease) unicast(m *dhcpv4.DHCPv4) []byte {
	to := l.ServerMAC
	if to == (MAC{}) {
		to = broadcastMAC
	}
	return datagram{
		from: l.MAC, to: to, source: l.Prefix.Addr(), target: l.Server,
		sourcePort: clientPort, toPort: serverPort, payload: m.ToBytes(),
	}.frame()
}

// answer4 is a server's message.
type answer4 struct {
	from MAC // the server, or the relay
	*dhcpv4.DHCPv4
}

// peekXID reads the transaction of a message, so that those of others on the LAN cost nothing more.
func peekXID(payload []byte) (uint32, bool) {
	if len(payload) < offsetOptions {
		return 0, false
	}
	return binary.BigEndian.Uint32(payload[offsetXID:]), true
}

// readAnswer reads a server's message, options in the fields sname and file included (option 52).
func readAnswer(from MAC, payload []byte) (answer4, error) {
	m, err := dhcpv4.FromBytes(payload)
	if err != nil {
		return answer4{}, err
	}
	if overload := m.GetOneOption(dhcpv4.OptionOptionOverload); len(overload) == 1 {
		if overload[0]&1 != 0 {
			err = errors.Join(err, m.Options.FromBytes(payload[offsetFile:offsetOptions-4]))
		}
		if overload[0]&2 != 0 {
			err = errors.Join(err, m.Options.FromBytes(payload[offsetSname:offsetFile]))
		}
		if err != nil {
			return answer4{}, err
		}
	}
	switch kind := m.MessageType(); {
	case m.OpCode != dhcpv4.OpcodeBootReply:
		return answer4{}, errors.New("message is not from a server")
	case m.HWType != iana.HWTypeEthernet || len(m.ClientHWAddr) != 6:
		return answer4{}, errors.New("message is not for an Ethernet client")
	case kind != dhcpv4.MessageTypeOffer && kind != dhcpv4.MessageTypeAck && kind != dhcpv4.MessageTypeNak:
		return answer4{}, fmt.Errorf("message of type %s is not an answer", kind)
	}
	return answer4{from, m}, nil
}

// server is who the answer says it is from; invalid: it does not say.
func (a answer4) server() netip.Addr {
	return oneAddress(a.GetOneOption(dhcpv4.OptionServerIdentifier))
}

// reason is the server's own words.
func (a answer4) reason() string {
	return plain(a.Message())
}

// plain is a server's text, made safe for a log.
func plain(text string) string {
	if len(text) > 128 {
		text = text[:128]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, text)
}

// lease reads what an offer or acknowledgement grants. The error says what makes it useless.
//
// What is missing or makes no sense has no part in the lease, except: no address, server or lifetime, a netmask that is none,
// or an address that cannot be a host's in the subnet is an error; without a netmask the address's class decides (RFC 950), as
// with other clients; T1 and T2 that are not in order have their defaults (RFC 2131, 4.4.5).
func (a answer4) lease(r Request, asked time.Time) (Lease, error) {
	l := Lease{Request: r, Server: a.server(), ServerMAC: a.from, Obtained: asked}
	if !isHost(l.Server) {
		return Lease{}, errors.New("no server is named")
	}
	address := oneAddress(a.YourIPAddr)
	if !isHost(address) {
		return Lease{}, fmt.Errorf("%s is not an address for a host", a.YourIPAddr)
	}
	bits, err := prefixLength(address, a.GetOneOption(dhcpv4.OptionSubnetMask))
	if err != nil {
		return Lease{}, err
	}
	l.Prefix = netip.PrefixFrom(address, bits)
	if bits < 31 && (address == l.Prefix.Masked().Addr() || address == lastAddress(l.Prefix)) {
		return Lease{}, fmt.Errorf("%s is the address of the subnet or its broadcast address, not a host's", l.Prefix)
	}
	if l.Lifetime, err = lifetime(a.GetOneOption(dhcpv4.OptionIPAddressLeaseTime)); err != nil {
		return Lease{}, err
	}
	l.T1, l.T2 = renewalTimes(l.Lifetime, a.IPAddressRenewalTime(0), a.IPAddressRebindingTime(0))

	l.Gateway, l.Routes = a.routes(l.Prefix)
	for _, ip := range a.DNS() {
		if d := oneAddress(ip); isHost(d) && len(l.DNS) < maxServers && !slices.Contains(l.DNS, d) {
			l.DNS = append(l.DNS, d)
		}
	}
	if name, ok := domainName(a.DomainName()); ok {
		l.Domain = name
	}
	for _, label := range a.search() {
		if name, ok := domainName(label); ok && len(l.Search) < maxSearch && !slices.Contains(l.Search, name) {
			l.Search = append(l.Search, name)
		}
	}
	if b := a.GetOneOption(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		if mtu := int(binary.BigEndian.Uint16(b)); mtu >= minMTU && mtu <= maxMTU {
			l.MTU = mtu
		}
	}
	return l, nil
}

// search reads option 119.
func (a answer4) search() []string {
	if len(a.GetOneOption(dhcpv4.OptionDNSDomainSearchList)) > maxSearchBytes {
		return nil
	}
	if labels := a.DomainSearch(); labels != nil {
		return labels.Labels
	}
	return nil
}

// routes reads option 121, and only without it option 3 (RFC 3442). Of several routers the first in the prefix is taken, or
// the first at all when none is.
func (a answer4) routes(prefix netip.Prefix) (gateway netip.Addr, routes []Route) {
	usable := func(router netip.Addr) bool { return isHost(router) && router != prefix.Addr() }
	if told := a.ClasslessStaticRoute(); len(told) > 0 {
		for _, t := range told {
			bits, _ := t.Dest.Mask.Size()
			route := Route{Prefix: netip.PrefixFrom(oneAddress(t.Dest.IP), bits).Masked(), Via: oneAddress(t.Router)}
			switch {
			case route.Via == noAddress:
				route.Via = netip.Addr{} // on the link
			case !usable(route.Via):
				continue
			}
			if bits > 0 {
				routes = append(routes, route)
			} else if !gateway.IsValid() {
				gateway = route.Via
			}
		}
		return gateway, routes
	}
	for _, ip := range a.Router() {
		router := oneAddress(ip)
		if !usable(router) {
			continue
		}
		if prefix.Contains(router) {
			return router, nil
		}
		if !gateway.IsValid() {
			gateway = router
		}
	}
	return gateway, nil
}

func prefixLength(address netip.Addr, mask []byte) (int, error) {
	if len(mask) == 0 {
		switch first := address.As4()[0]; {
		case first < 128:
			return 8, nil
		case first < 192:
			return 16, nil
		}
		return 24, nil
	}
	ones, bits := net.IPMask(mask).Size()
	if bits != 32 || ones == 0 {
		return 0, fmt.Errorf("netmask %s is none", net.IPMask(mask))
	}
	return ones, nil
}

// lifetime reads option 51.
func lifetime(seconds []byte) (time.Duration, error) {
	if len(seconds) != 4 {
		return 0, errors.New("the lease has no lifetime")
	}
	n := binary.BigEndian.Uint32(seconds)
	if n == math.MaxUint32 {
		return Infinite, nil
	}
	if d := time.Duration(n) * time.Second; d >= minLifetime {
		return d, nil
	}
	return 0, fmt.Errorf("a lifetime of %d s is too short: the least is %s", n, minLifetime)
}

// renewalTimes puts T1 and T2 in order.
func renewalTimes(lifetime, t1, t2 time.Duration) (time.Duration, time.Duration) {
	if lifetime == Infinite {
		return Infinite, Infinite
	}
	if t2 <= time.Second || t2 >= lifetime {
		t2 = lifetime / 8 * 7
	}
	if t1 <= 0 || t1 >= t2 {
		t1 = min(lifetime/2, t2/7*4)
	}
	return t1, t2
}

// domainName checks a name for what a resolver can use, and nothing that could break its file: letters, digits, hyphens and
// underscores in labels of 1 to 63 bytes, 253 in all (RFC 1035, 2.3.4). A dot at the end is taken off.
func domainName(s string) (string, bool) {
	s = strings.TrimSuffix(strings.TrimRight(s, "\x00"), ".")
	if s == "" || len(s) > 253 {
		return "", false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' {
			return "", false
		}
		for i := range len(label) {
			switch c := label[i]; {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
			default:
				return "", false
			}
		}
	}
	return s, true
}

// oneAddress reads an IPv4 address; anything else is the invalid one.
func oneAddress(b []byte) netip.Addr {
	if len(b) != 4 {
		return netip.Addr{}
	}
	return netip.AddrFrom4([4]byte(b))
}

// lastAddress is the subnet's broadcast address.
func lastAddress(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|math.MaxUint32>>p.Bits())
	return netip.AddrFrom4(b)
}
