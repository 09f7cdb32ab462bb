package dhcp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

const (
	// minMTU6 is the smallest MTU that is believed for IPv6: what every link has (RFC 8200).
	minMTU6 = 1280
	// maxOption is the longest option that is read: decoding long ones can take long (maxSearchBytes).
	maxOption = maxSearchBytes
	// header6 is the type of a message and its number (RFC 8415, 8).
	header6 = 4
	// maxElapsed is the longest time that a client can say that it has been asking, in hundredths of a second (RFC 8415, 21.9).
	maxElapsed = math.MaxUint16 * 10 * time.Millisecond
)

// allServers are all servers and relays on the link (RFC 8415, 7.1).
var allServers = netip.MustParseAddr("ff02::1:2")

// duid identifies a client by its MAC (DUID-LL; RFC 8415, 11.4), so that a server's reservation by MAC holds.
func (r Request) duid() []byte {
	return append([]byte{0, byte(dhcpv6.DUID_LL), 0, hardwareEthernet}, r.MAC[:]...)
}

// association numbers the client's one association of an address (IA_NA).
func (r Request) association() [4]byte { return [4]byte(r.MAC[2:]) }

// message6 makes a message about an address, or about any if that is invalid, to a server or, if it is nil, to all.
func (r Request) message6(x *exchange, kind dhcpv6.MessageType, server []byte, address netip.Addr) []byte {
	m := &dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{byte(x.id >> 16), byte(x.id >> 8), byte(x.id)}}
	m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionClientID, OptionData: r.duid()})
	if server != nil {
		m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionServerID, OptionData: server})
	}
	m.AddOption(dhcpv6.OptElapsedTime(min(time.Since(x.begun), maxElapsed)))
	association := &dhcpv6.OptIANA{IaId: r.association()}
	if address.IsValid() {
		association.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: address.AsSlice()})
	}
	m.AddOption(association)
	if kind != dhcpv6.MessageTypeRelease && kind != dhcpv6.MessageTypeDecline {
		m.AddOption(dhcpv6.OptRequestedOption(dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList, dhcpv6.OptionSolMaxRT))
		if name, ok := domainName(r.Hostname); ok {
			m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionFQDN, OptionData: hostname6(name)})
		}
	}
	return datagram{
		from: r.MAC, to: multicastMAC(allServers), source: linkLocal(r.MAC), target: allServers,
		sourcePort: clientPort6, toPort: serverPort6, payload: m.ToBytes(),
	}.frame()
}

// hostname6 is a name without its domain, which the server may enter in the DNS (RFC 4704, 4).
func hostname6(name string) []byte {
	const serverUpdates = 1
	option := []byte{serverUpdates}
	for label := range strings.SplitSeq(name, ".") {
		option = append(append(option, byte(len(label))), label...)
	}
	return option
}

func (*six) discover(x *exchange, r Request, wanted netip.Addr) []byte {
	return r.message6(x, dhcpv6.MessageTypeSolicit, nil, wanted)
}

func (*six) accept(x *exchange, offer Lease, _ time.Duration) []byte {
	return offer.message6(x, dhcpv6.MessageTypeRequest, offer.ServerID, offer.Prefix.Addr())
}

// verify rebinds: a server that knows the lease grants it more time, and one that does not says so. (Confirm would only tell
// whether the address is right for the link.)
func (s *six) verify(x *exchange, l Lease) []byte { return s.rebind(x, l, 0) }

func (*six) renew(x *exchange, l Lease) []byte {
	return l.message6(x, dhcpv6.MessageTypeRenew, l.ServerID, l.Prefix.Addr())
}

func (*six) rebind(x *exchange, l Lease, _ int) []byte {
	return l.message6(x, dhcpv6.MessageTypeRebind, nil, l.Prefix.Addr())
}

func (*six) decline(x *exchange, l Lease) []byte {
	return l.message6(x, dhcpv6.MessageTypeDecline, l.ServerID, l.Prefix.Addr())
}

func (*six) release(x *exchange, l Lease) []byte {
	return l.message6(x, dhcpv6.MessageTypeRelease, l.ServerID, l.Prefix.Addr())
}

// answer6 is a server's message.
type answer6 struct {
	from   MAC // the server, or the relay
	source netip.Addr
	server []byte
	*dhcpv6.Message
}

// peekXID6 reads the transaction of a message, so that those of others on the LAN cost nothing more.
func peekXID6(payload []byte) (uint32, bool) {
	if len(payload) < header6 {
		return 0, false
	}
	return binary.BigEndian.Uint32(payload) & (1<<24 - 1), true
}

// readAnswer6 reads a server's message to a client. Options that nobody here asks for are passed over.
func readAnswer6(from MAC, source netip.Addr, payload []byte, client MAC) (answer6, error) {
	kind := dhcpv6.MessageType(payload[0])
	if kind != dhcpv6.MessageTypeAdvertise && kind != dhcpv6.MessageTypeReply {
		return answer6{}, fmt.Errorf("message of type %s is not an answer", kind)
	}
	a := answer6{from, source, nil, &dhcpv6.Message{MessageType: kind}}
	if err := a.Options.FromBytesWithParser(payload[header6:], readOption6); err != nil {
		return answer6{}, err
	}
	if id := a.GetOneOption(dhcpv6.OptionServerID); id != nil {
		a.server = id.ToBytes()
	}
	id := a.GetOneOption(dhcpv6.OptionClientID)
	switch {
	case len(a.server) == 0:
		return answer6{}, errors.New("no server is named")
	case id == nil || !bytes.Equal(id.ToBytes(), Request{MAC: client}.duid()):
		return answer6{}, errors.New("message is for another client")
	}
	return a, nil
}

func readOption6(code dhcpv6.OptionCode, data []byte) (dhcpv6.Option, error) {
	switch code {
	case dhcpv6.OptionIANA, dhcpv6.OptionStatusCode, dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList:
		if len(data) <= maxOption {
			return dhcpv6.ParseOption(code, data)
		}
		code = 0 // of no use, and reserved
	}
	return &dhcpv6.OptionGeneric{OptionCode: code, OptionData: bytes.Clone(data)}, nil
}

func (a answer6) offers() bool { return a.MessageType == dhcpv6.MessageTypeAdvertise }

func (a answer6) of(l Lease) bool { return bytes.Equal(a.server, l.ServerID) }

func (a answer6) lease(r Request, asked time.Time) (Lease, error) {
	return a.read(Lease{Request: r}, asked)
}

// grant: what servers do not tell stays as it was.
func (a answer6) grant(l Lease, asked time.Time) (Lease, error) {
	if a.MessageType != dhcpv6.MessageTypeReply {
		return Lease{}, errOther
	}
	granted, err := a.read(l, asked)
	var no *status
	if errors.As(err, &no) && no.final() {
		return Lease{}, &RefusedError{l.Prefix.Addr(), a.source, no.Error()}
	}
	return granted, err
}

// status is why a server grants nothing.
type status struct {
	code    iana.StatusCode
	message string // in the server's words, which may be none
}

func (s *status) Error() string {
	if s.message == "" {
		return s.code.String()
	}
	return fmt.Sprintf("%s: %s", s.code, s.message)
}

// final says whether it is of no use to go on asking for the same (RFC 8415, 18.2.10).
func (s *status) final() bool {
	return s.code == iana.StatusNoBinding || s.code == iana.StatusNoAddrsAvail || s.code == iana.StatusNotOnLink
}

func failure(o *dhcpv6.OptStatusCode) error {
	if o == nil || o.StatusCode == iana.StatusSuccess {
		return nil
	}
	return &status{o.StatusCode, plain(o.StatusMessage)}
}

// read reads what is granted to a client that has a lease, or asks for its first (which has no address). The error says what
// makes it useless, and is a *status if the server does.
//
// The client's address is the one that it has, if that is still granted, or else the first that is. T1 and T2 that are not told
// are half and four fifths of the preferred lifetime (RFC 8415, 14.2 and 21.4); other ones that are not in order have the
// defaults that those of IPv4 have.
func (a answer6) read(l Lease, asked time.Time) (Lease, error) {
	if err := failure(a.Options.Status()); err != nil {
		return Lease{}, err
	}
	at := slices.IndexFunc(a.Options.IANA(), func(ia *dhcpv6.OptIANA) bool { return ia.IaId == l.association() })
	if at < 0 {
		return Lease{}, errors.New("it says nothing about the client's association")
	}
	association := a.Options.IANA()[at]
	if err := failure(association.Options.Status()); err != nil {
		return Lease{}, err
	}
	var chosen *dhcpv6.OptIAAddress
	for _, o := range association.Options.Addresses() {
		address := address6(o.IPv6Addr)
		if o.ValidLifetime == 0 || !l.isHost(address) || failure(o.Options.Status()) != nil {
			continue
		}
		if chosen == nil || address == l.Prefix.Addr() {
			chosen = o
		}
	}
	switch {
	case chosen == nil && len(association.Options.Addresses()) == 0:
		return Lease{}, errors.New("it has no address")
	case chosen == nil:
		return Lease{}, &status{iana.StatusNoBinding, "no address is granted any more"}
	case chosen.ValidLifetime < minLifetime:
		return Lease{}, fmt.Errorf("a lifetime of %s is too short: the least is %s", chosen.ValidLifetime, minLifetime)
	}
	l.Prefix = l.subnetOf(address6(chosen.IPv6Addr))
	l.Server, l.ServerID, l.ServerMAC, l.Obtained = a.source, a.server, a.from, asked
	l.Lifetime = chosen.ValidLifetime
	preferred := min(chosen.PreferredLifetime, chosen.ValidLifetime)
	if preferred == 0 {
		preferred = chosen.ValidLifetime
	}
	t1, t2 := association.T1, association.T2
	if t1 == 0 {
		t1 = preferred / 2
	}
	if t2 == 0 {
		t2 = preferred / 5 * 4
	}
	l.T1, l.T2 = renewalTimes(l.Lifetime, t1, t2)
	l.DNS, l.Search = a.names()
	return l, nil
}

// subnetOf gives an address the length of the lease's prefix if it is in that, and else of all bits.
func (l Lease) subnetOf(a netip.Addr) netip.Prefix {
	if l.Prefix.IsValid() && l.Prefix.Contains(a) {
		return netip.PrefixFrom(a, l.Prefix.Bits())
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// names are the name servers and the search domains.
func (a answer6) names() (servers []netip.Addr, search []string) {
	for _, ip := range a.Options.DNS() {
		d := address6(ip)
		if usable := d.IsGlobalUnicast() || d.IsPrivate(); usable && !d.Is4In6() && len(servers) < maxServers && !slices.Contains(servers, d) {
			servers = append(servers, d)
		}
	}
	labels := a.Options.DomainSearchList()
	if labels == nil {
		return servers, nil
	}
	for _, label := range labels.Labels {
		if name, ok := domainName(label); ok && len(search) < maxSearch && !slices.Contains(search, name) {
			search = append(search, name)
		}
	}
	return servers, search
}

// address6 reads an IPv6 address; anything else is the invalid one.
func address6(b []byte) netip.Addr {
	if len(b) != 16 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte(b))
}
