// Package mode computes what each of the modes wants in the kernel, from the record of a network
// and its endpoints. It is pure: it reads nothing and changes nothing.
package mode

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// Subnet is an address pool of a network, as the engine gives it.
type Subnet struct {
	Space     string                `json:"space,omitempty"` // the address space of the pool: whose it is
	Pool      netip.Prefix          `json:"pool"`
	Gateway   netip.Addr            `json:"gateway"` // invalid: none
	Auxiliary map[string]netip.Addr `json:"auxiliary,omitempty"`
}

// Wire is where a network of an external mode is connected.
type Wire struct {
	Foreign bool     `json:"foreign,omitempty"` // the link that was named is a bridge of the host's: it is used as it is
	MAC     plan.MAC `json:"mac"`               // of the host on the wire
	MTU     int      `json:"mtu"`
	// Host and Host6 are the host's addresses on an uplink without a switch, invalid if it has none.
	Host  netip.Addr `json:"host,omitzero"`
	Host6 netip.Addr `json:"host6,omitzero"`
	// Local is the host's address among its peers, and Port the UDP port of VXLAN: of an overlay.
	Local netip.Addr `json:"local,omitzero"`
	Port  uint16     `json:"port,omitempty"`
	// Gateway is the MAC of the network's gateway, zero when it does not answer. It is not recorded: who
	// starts asks again.
	Gateway plan.MAC `json:"-"`
}

// Network is the record of a network.
type Network struct {
	ID       string   `json:"id"`
	Options  Options  `json:"options"`
	Wire     Wire     `json:"wire,omitzero"`
	Internal bool     `json:"internal"`
	Leased   bool     `json:"leased,omitempty"`  // IPv4 addresses come from the DHCP server of the LAN, and not from the subnet
	Leased6  bool     `json:"leased6,omitempty"` // and so do those of IPv6
	Transit  int      `json:"transit,omitempty"` // which pair of addresses leads outside, of those that overlays of this host have; from 1
	IPv4     []Subnet `json:"ipv4,omitempty"`
	IPv6     []Subnet `json:"ipv6,omitempty"`
}

// Lease is what a DHCP server told about an endpoint's address.
type Lease struct {
	Gateway netip.Addr    `json:"gateway,omitzero"`
	Routes  []StaticRoute `json:"routes,omitempty"`
	MTU     int           `json:"mtu,omitempty"` // 0: not told
	DNS     []netip.Addr  `json:"dns,omitempty"`
	Search  []string      `json:"search,omitempty"`
}

// StaticRoute is a route in a container.
type StaticRoute struct {
	Prefix netip.Prefix `json:"prefix"`
	Via    netip.Addr   `json:"via,omitzero"` // invalid: on the link itself
}

// Endpoint is the record of an endpoint.
type Endpoint struct {
	ID        string           `json:"id"`
	NetworkID string           `json:"network_id"`
	Address   netip.Prefix     `json:"address"`  // invalid: no IPv4
	Address6  netip.Prefix     `json:"address6"` // invalid: no IPv6
	MAC       plan.MAC         `json:"mac"`
	Joined    bool             `json:"joined"`             // a container has taken the other end
	External  bool             `json:"external,omitempty"` // its network is on an external switch
	Lease     Lease            `json:"lease,omitzero"`     // of the IPv4 address
	Lease6    Lease            `json:"lease6,omitzero"`    // and of that of IPv6
	IfName    string           `json:"ifname,omitempty"`   // of its link in the container; empty: the network's prefix and a number
	Bindings  []policy.Binding `json:"bindings,omitempty"`
}

// Bridge is the name of the network's bridge: its own, or the external switch that it shares with
// others of the same uplink and VLAN. An overlay has one for each subnet, of which this is the first.
func (n Network) Bridge() string {
	switch {
	case n.Overlay():
		return n.segments()[0].bridge()
	case !n.External():
		return "dwb" + short(n.ID, 12)
	case n.Wire.Foreign:
		return n.Options.Interface
	}
	return n.Options.linkName("dwx")
}

// Overlay reports whether the network spans hosts.
func (n Network) Overlay() bool { return n.Options.Mode == Overlay }

// Leads reports whether containers reach the outside by the network's own gateway. An internal
// network leads nowhere, and for an overlay engines have a gateway network, unless it translates itself.
func (n Network) Leads() bool {
	return !n.Internal && (!n.Overlay() || n.Options.OutboundNAT)
}

// MTU is the largest packet of the network's containers, in bytes.
func (n Network) MTU() int {
	if n.Options.MTU == 0 {
		return n.Wire.MTU
	}
	return n.Options.MTU
}

// MTU is the largest packet of an endpoint: a DHCP server, or a router of an IPv6 LAN, can ask for less than
// the network allows.
func (e Endpoint) MTU(n Network) int {
	mtu := n.MTU()
	for _, told := range []int{e.Lease.MTU, e.Lease6.MTU} {
		if told != 0 {
			mtu = min(mtu, told)
		}
	}
	return mtu
}

// FromLAN reports whether addresses of the family of a are leased from the LAN's DHCP server.
func (n Network) FromLAN(a netip.Addr) bool {
	return a.Is4() && n.Leased || a.Is6() && n.Leased6
}

// TunnelGateway is the gateway that everything is sent to, invalid when the mode has no such.
func (n Network) TunnelGateway() netip.Addr {
	if n.Options.Mode != L2Tunnel || len(n.IPv4) == 0 {
		return netip.Addr{}
	}
	return n.IPv4[0].Gateway
}

// External reports whether the network is on an external switch.
func (n Network) External() bool { return n.Options.Mode.External() }

// Uplink is the link by which the network is on its LAN: the one that was named, or the VLAN's.
func (n Network) Uplink() string {
	if n.Options.VLAN != 0 {
		return n.Options.linkName("dwt")
	}
	return n.Options.Interface
}

// linkName names a link that is for one uplink and VLAN: readable where it fits.
func (o Options) linkName(prefix string) string {
	name := o.Interface
	if o.VLAN != 0 {
		name += "." + strconv.Itoa(o.VLAN)
	}
	if len(name) > linkNameSize-len(prefix) {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:])[:linkNameSize-len(prefix)]
	}
	return prefix + name
}

// linkNameSize is the most characters of an interface's name (IFNAMSIZ less its end).
const linkNameSize = 15

// Alias is the mark that the network's links carry.
func (n Network) Alias() string { return "dockway network=" + n.ID }

// Subnets lists the network's subnets, IPv4 first.
func (n Network) Subnets() []Subnet {
	return append(append([]Subnet(nil), n.IPv4...), n.IPv6...)
}

// Port is the name of the endpoint's link in the host. Rules tell from it what kind of switch the
// port is on.
func (e Endpoint) Port() string {
	if e.External {
		return "dwv-" + short(e.ID, 11)
	}
	return "dwv" + short(e.ID, 11)
}

// Peer is the name of the endpoint's other link before the engine moves it into the container.
func (e Endpoint) Peer() string { return "dwc" + short(e.ID, 11) }

// Alias is the mark that the endpoint's link in the host carries.
func (e Endpoint) Alias() string {
	return fmt.Sprintf("dockway network=%s endpoint=%s", e.NetworkID, e.ID)
}

// Addresses lists the endpoint's addresses, IPv4 first.
func (e Endpoint) Addresses() []netip.Addr {
	var out []netip.Addr
	for _, p := range []netip.Prefix{e.Address, e.Address6} {
		if p.IsValid() {
			out = append(out, p.Addr())
		}
	}
	return out
}

// short cuts an ID to what fits into an interface name (15 bytes with its prefix).
func short(id string, n int) string {
	if len(id) > n {
		return id[:n]
	}
	return id
}
