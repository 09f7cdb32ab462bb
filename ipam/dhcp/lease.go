package dhcp

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText is the address with colons.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads an address with colons or dashes.
func (m *MAC) UnmarshalText(text []byte) error {
	hw, err := net.ParseMAC(string(text))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("%q is not an Ethernet address", text)
	}
	copy(m[:], hw)
	return nil
}

// Infinite is the lifetime of a lease that never ends (RFC 2131, 3.3).
const Infinite = math.MaxUint32 * time.Second

// Request is who asks for an address, and where.
type Request struct {
	// Link is the link of the host whose LAN is asked: an uplink, which may be a port of a bridge or the lower link of
	// macvlans, or a VLAN link.
	Link string `json:"link"`
	// MAC is the container's.
	MAC MAC `json:"mac"`
	// IPv6 asks for an IPv6 address: the client's DUID-LL and the number of its one association are then made from the MAC.
	IPv6 bool `json:"ipv6,omitempty"`
	// Subnet is known to be on the link, as an IPv6 lease does not tell. Other prefixes are when a router advertises them.
	Subnet netip.Prefix `json:"subnet,omitzero"`
	// ClientID is for IPv4 option 61 with its type byte; 2 to 255 bytes. Empty: type 1 and the MAC, so that a server's reservation by
	// MAC holds.
	ClientID []byte `json:"client_id,omitempty"`
	// Hostname is told to the server (option 12; 39 of IPv6), which may enter it in the DNS. At most 255 printable bytes.
	Hostname string `json:"hostname,omitempty"`
	// Address is asked for, and no other is taken. Invalid: whatever the server chooses.
	Address netip.Addr `json:"address,omitzero"`
}

// Route is a classless static route (RFC 3442).
type Route struct {
	Prefix netip.Prefix `json:"prefix"`
	// Via is the router. Invalid: the destination is on the link itself.
	Via netip.Addr `json:"via,omitzero"`
}

// Lease is an address with what the server told about it. It survives being written as JSON and read again.
type Lease struct {
	Request

	// Prefix is the leased address and the length of its subnet's prefix. An IPv6 address whose subnet nobody tells has 128: all
	// else is reached by the gateway.
	Prefix netip.Prefix `json:"prefix"`
	// Gateway is the router of the default route; invalid: none was told. For IPv6 it is one that advertises itself, by its
	// link-local address. It can lie outside the prefix: it is then on the link
	// all the same, and takes a route of its own to be reached.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Routes are the other routes, in the server's order. When the server tells classless routes (option 121), the default
	// route is among those or there is none.
	Routes []Route      `json:"routes,omitempty"`
	DNS    []netip.Addr `json:"dns,omitempty"`
	// Domain is the container's own (option 15), Search what to try with short names (option 119). Both hold only names that are
	// safe to be written to resolv.conf.
	Domain string   `json:"domain,omitempty"`
	Search []string `json:"search,omitempty"`
	// MTU is of the link, 576 or more; 0: not told.
	MTU int `json:"mtu,omitempty"`

	// Server identifies the server; of IPv6 it is only whence its messages came, and ServerID identifies it (its DUID).
	// ServerMAC is who its frames came from: itself or a relay.
	Server    netip.Addr `json:"server"`
	ServerID  []byte     `json:"server_id,omitempty"`
	ServerMAC MAC        `json:"server_mac"`
	// Obtained is when the address was last asked for with success; the durations count from it.
	Obtained time.Time `json:"obtained"`
	// Lifetime is how long the address may be used (IPv6: its valid lifetime), or Infinite. From T1 on the server is asked to renew it, from T2 on any
	// server: 0 < T1 < T2 < Lifetime, or all are Infinite.
	Lifetime time.Duration `json:"lifetime"`
	T1       time.Duration `json:"t1"`
	T2       time.Duration `json:"t2"`
}

// Expires is when the address may no longer be used. That of an infinite lease is in a hundred years.
func (l Lease) Expires() time.Time { return l.Obtained.Add(l.Lifetime) }

// SameSettings says whether a container that was set up with one lease is set up right for the other: everything but the
// server and the times is the same.
func (l Lease) SameSettings(o Lease) bool {
	return l.Prefix == o.Prefix && l.Gateway == o.Gateway && l.Domain == o.Domain && l.MTU == o.MTU &&
		slices.Equal(l.Routes, o.Routes) && slices.Equal(l.DNS, o.DNS) && slices.Equal(l.Search, o.Search)
}

func (l Lease) String() string {
	return fmt.Sprintf("%s of %s on %s from server %s", l.Prefix, l.MAC, l.Link, l.Server)
}

// key says whose lease it is: a client has one of IPv4 and one of IPv6 for each MAC on a link.
func (r Request) key() key { return key{r.Link, r.MAC, r.IPv6} }

type key struct {
	link string
	mac  MAC
	ipv6 bool
}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.link, o.link), bytes.Compare(k.mac[:], o.mac[:]), boolean(k.ipv6)-boolean(o.ipv6))
}

// clientID is what option 61 says.
func (r Request) clientID() []byte {
	if len(r.ClientID) > 0 {
		return r.ClientID
	}
	return append([]byte{hardwareEthernet}, r.MAC[:]...)
}

func (r Request) validate() error {
	switch {
	case r.Link == "":
		return errors.New("no link is named: name the uplink whose LAN has the DHCP server")
	case r.MAC == MAC{} || r.MAC[0]&1 != 0:
		return fmt.Errorf("MAC %s cannot be a container's: it has to be a unicast address", r.MAC)
	case len(r.ClientID) == 1 || len(r.ClientID) > 255:
		return fmt.Errorf("client identifier of %d bytes: give 2 to 255, the first of them the type (RFC 2132, 9.14)", len(r.ClientID))
	case len(r.Hostname) > 255 || !printable(r.Hostname):
		return fmt.Errorf("host name %q: give at most 255 printable ASCII bytes without spaces", r.Hostname)
	case r.Address.IsValid() && !r.isHost(r.Address):
		return fmt.Errorf("address %s cannot be leased: ask for %s unicast address", r.Address, map[bool]string{false: "an IPv4", true: "a global IPv6"}[r.IPv6])
	}
	return nil
}

func (l Lease) validate() error {
	if err := l.Request.validate(); err != nil {
		return err
	}
	infinite := l.Lifetime == Infinite && l.T1 == Infinite && l.T2 == Infinite
	switch {
	case !l.isHost(l.Prefix.Addr()) || !l.IPv6 && !isHost(l.Server) || l.IPv6 && len(l.ServerID) == 0:
		return fmt.Errorf("lease of %s from server %s is incomplete", l.Prefix, l.Server)
	case !infinite && (l.T1 <= 0 || l.T2 <= l.T1 || l.Lifetime <= l.T2 || l.Lifetime > Infinite):
		return fmt.Errorf("lease of %s has impossible times: T1 %s, T2 %s, lifetime %s", l.Prefix, l.T1, l.T2, l.Lifetime)
	}
	return nil
}

// isHost says whether an IPv4 address can be a host's on a LAN.
func isHost(a netip.Addr) bool {
	return a.Is4() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && a.As4()[0] != 0 && a.As4()[0] < 240
}

// isHost says whether an address of the request's family can be a host's on a LAN.
func (r Request) isHost(a netip.Addr) bool {
	if r.IPv6 {
		return a.Is6() && !a.Is4In6() && a.Zone() == "" && (a.IsGlobalUnicast() || a.IsPrivate())
	}
	return isHost(a)
}

func boolean(b bool) int {
	if b {
		return 1
	}
	return 0
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
