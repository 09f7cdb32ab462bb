// Package mode computes what each of the modes wants in the kernel, from the record of a network
// and its endpoints. It is pure: it reads nothing and changes nothing.
package mode

import (
	"fmt"
	"net/netip"

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

// Network is the record of a network.
type Network struct {
	ID       string   `json:"id"`
	Options  Options  `json:"options"`
	Internal bool     `json:"internal"`
	IPv4     []Subnet `json:"ipv4,omitempty"`
	IPv6     []Subnet `json:"ipv6,omitempty"`
}

// Endpoint is the record of an endpoint.
type Endpoint struct {
	ID        string           `json:"id"`
	NetworkID string           `json:"network_id"`
	Address   netip.Prefix     `json:"address"`  // invalid: no IPv4
	Address6  netip.Prefix     `json:"address6"` // invalid: no IPv6
	MAC       plan.MAC         `json:"mac"`
	Joined    bool             `json:"joined"` // a container has taken the other end
	Bindings  []policy.Binding `json:"bindings,omitempty"`
}

// Bridge is the name of the network's bridge.
func (n Network) Bridge() string { return "dwb" + short(n.ID, 12) }

// Alias is the mark that the network's links carry.
func (n Network) Alias() string { return "dockway network=" + n.ID }

// Subnets lists the network's subnets, IPv4 first.
func (n Network) Subnets() []Subnet {
	return append(append([]Subnet(nil), n.IPv4...), n.IPv6...)
}

// Port is the name of the endpoint's link in the host.
func (e Endpoint) Port() string { return "dwv" + short(e.ID, 11) }

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
