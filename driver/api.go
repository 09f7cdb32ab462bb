package driver

import (
	"net/netip"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// NetworkRequest asks for a network (CNM: CreateNetwork).
type NetworkRequest struct {
	ID       string
	Options  map[string]string // what was given with -o, keys as given
	Internal bool              // --internal
	IPv4     []mode.Subnet
	IPv6     []mode.Subnet
}

// EndpointRequest asks for an endpoint on a network (CNM: CreateEndpoint).
type EndpointRequest struct {
	NetworkID string
	ID        string
	Address   netip.Prefix // IPv4 address with its subnet's length; invalid: none
	Address6  netip.Prefix // IPv6 likewise
	MAC       plan.MAC     // zero: dockway chooses
	Options   map[string]string
}

// EndpointReply tells what dockway chose for the endpoint.
type EndpointReply struct {
	MAC plan.MAC // zero: the request named one
}

// JoinReply tells the engine which link to move into the container and where it leads.
type JoinReply struct {
	SrcName   string // link in the host's namespace
	DstPrefix string // the engine adds a number: eth0
	Gateway   netip.Addr
	Gateway6  netip.Addr
	Routes    []mode.StaticRoute
}

// Status is what `dockway status` shows.
type Status struct {
	Networks  int      `json:"networks"`
	Endpoints int      `json:"endpoints"`
	Ports     int      `json:"ports"`
	InSync    bool     `json:"in_sync"`  // the kernel holds what the record wants
	Problem   string   `json:"problem"`  // why not
	Repairs   uint64   `json:"repairs"`  // changes that others made to the kernel and dockway undid
	Warnings  []string `json:"warnings"` // what on this host can keep networks from working
}

// NetworkInfo is one network, as `dockway networks` shows it.
type NetworkInfo struct {
	ID        string   `json:"id"`
	Name      string   `json:"name"`
	Mode      string   `json:"mode"`
	Subnets   []string `json:"subnets"`
	Spaces    []string `json:"address_spaces"` // of each subnet
	Bridge    string   `json:"bridge"`
	Endpoints int      `json:"endpoints"`
	Internal  bool     `json:"internal"`
	MTU       int      `json:"mtu"`
}

// EndpointInfo is one endpoint, as `dockway endpoints` shows it.
type EndpointInfo struct {
	ID       string `json:"endpoint"`
	Network  string `json:"network"`
	Address  string `json:"address"`
	Address6 string `json:"address6"`
	MAC      string `json:"mac"`
	Link     string `json:"link"`
	State    string `json:"state"` // "created" or "joined"
	// Lease is what the DHCP server told about the address, if one gave it.
	Lease *mode.Lease `json:"lease,omitempty"`
}

// PortInfo is one published port, as `dockway ports` shows it.
type PortInfo struct {
	Network       string          `json:"network"`
	Endpoint      string          `json:"endpoint"`
	Protocol      policy.Protocol `json:"proto"`
	HostIP        string          `json:"host_ip"`
	HostPort      uint16          `json:"host_port"`
	ContainerIP   string          `json:"container_ip"`
	ContainerPort uint16          `json:"container_port"`
}
