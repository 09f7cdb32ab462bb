package driver

import (
	"net/netip"
	"time"

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
	DstName   string // its name, whole; moby 2.0 and later take it
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
	// Lease is what the DHCP server told about the IPv4 address, if one gave it, and Lease6 what it and
	// the LAN's routers told about the IPv6 address.
	Lease  *mode.Lease `json:"lease,omitempty"`
	Lease6 *mode.Lease `json:"lease6,omitempty"`
	// LeaseProblem says what the servers grant else now; empty: they grant what the container has.
	LeaseProblem string `json:"lease_problem,omitempty"`
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

// PeerInfo is one host of the cluster, as `dockway peers` shows it.
type PeerInfo struct {
	Name    string        `json:"name"`
	ID      string        `json:"id"`
	Address netip.Addr    `json:"address"`
	State   string        `json:"state"` // "alive", "suspect", "away" or "dead"
	RTT     time.Duration `json:"rtt_ns"`
	Facts   int           `json:"facts"` // what it states: addresses of containers, and parts of subnets that it gives addresses from
	Version string        `json:"version"`
	Self    bool          `json:"self"`
}

// OverlayInfo is one overlay network, as `dockway overlay` shows it.
type OverlayInfo struct {
	ID      string        `json:"id"`
	Name    string        `json:"name"`
	VSIDs   []uint32      `json:"vsids"`
	Entries []OverlayItem `json:"entries"`
}

// OverlayItem is an address of an overlay network.
type OverlayItem struct {
	VSID    uint32     `json:"vsid"`
	Address netip.Addr `json:"address"`
	MAC     string     `json:"mac"`
	Host    string     `json:"host"`
	VTEP    netip.Addr `json:"vtep"`
	Here    bool       `json:"here"` // the container is on this host
}

// KeyReply tells what a host made of a change of the gossip's keys.
type KeyReply struct {
	Host  string `json:"host"`
	Error string `json:"error"` // empty: it has followed
}
