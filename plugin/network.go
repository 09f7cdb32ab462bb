package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// Keys that the engine puts into options.
const (
	engineKeys      = "com.docker.network."
	windowsKeys     = "com.docker.network.windowsshim." // options of the Windows driver, which are ours too
	mtuKey          = "com.docker.network.driver.mtu"
	ifNameKey       = "com.docker.network.endpoint.ifname"
	genericKey      = "com.docker.network.generic"
	internalKey     = "com.docker.network.internal"
	portMappingsKey = "com.docker.network.portmap"
)

// engineOnly are options of `docker network create -o` that the engine itself carries out and
// passes on all the same.
var engineOnly = map[string]bool{
	"com.docker.network.enable_ipv4":          true,
	"com.docker.network.enable_ipv6":          true,
	"com.docker.network.internal":             true,
	"com.docker.network.advertise_addr_nmsgs": true,
	"com.docker.network.advertise_addr_ms":    true,
}

// ref names a network, or an endpoint on it.
type ref struct {
	NetworkID  string
	EndpointID string
}

func (r ref) String() string {
	switch {
	case r.EndpointID != "":
		return fmt.Sprintf("endpoint %s on network %s", brief(r.EndpointID), brief(r.NetworkID))
	case r.NetworkID != "":
		return "network " + brief(r.NetworkID)
	}
	return ""
}

func (r ref) checkNetwork() error { return checkID("NetworkID", r.NetworkID) }

func (r ref) checkEndpoint() error {
	if err := r.checkNetwork(); err != nil {
		return err
	}
	return checkID("EndpointID", r.EndpointID)
}

// failed puts what was asked before what was wrong with it.
func (r ref) failed(verb string, err error) error {
	if about := r.String(); about != "" {
		verb += " " + about
	}
	return fmt.Errorf("%s: %w", verb, err)
}

type (
	capabilities struct {
		Scope             string // "local": the engine keeps the networks itself
		ConnectivityScope string // "local": names are resolved on this host only
		GwAllocChecker    bool
	}
	subnet struct {
		AddressSpace string
		Pool         string
		Gateway      string
		AuxAddresses map[string]string
	}
	networkInterface struct {
		Address     string `json:",omitempty"`
		AddressIPv6 string `json:",omitempty"`
		MacAddress  string `json:",omitempty"`
	}
	allocation struct {
		Options map[string]json.RawMessage
	}
	createEndpointReply struct {
		Interface networkInterface // only what the request left open: the engine refuses anything else
	}
	operInfo struct {
		Value struct{} // nothing in it would reach a user: engines look for Go types that JSON cannot carry
	}
	interfaceName struct {
		SrcName   string
		DstPrefix string
		DstName   string `json:",omitempty"`
	}
	joinReply struct {
		InterfaceName         interfaceName
		Gateway               string        `json:",omitempty"`
		GatewayIPv6           string        `json:",omitempty"`
		StaticRoutes          []staticRoute `json:",omitempty"`
		DisableGatewayService bool
	}
	staticRoute struct {
		Destination string
		RouteType   int
		NextHop     string `json:",omitempty"`
	}
)

// Types of a static route (libnetwork's types.NEXTHOP and types.CONNECTED).
const (
	routeNextHop   = 0
	routeConnected = 1
)

// Requests as the network service takes them.
type (
	allocateRequest struct {
		ref
		Options map[string]json.RawMessage
	}
	networkRequest  struct{ driver.NetworkRequest }
	endpointRequest struct{ driver.EndpointRequest }
	publishRequest  struct {
		ref
		Ports []policy.PortMapping
	}
)

func (r networkRequest) ref() ref        { return ref{NetworkID: r.ID} }
func (r networkRequest) String() string  { return r.ref().String() }
func (r endpointRequest) ref() ref       { return ref{NetworkID: r.NetworkID, EndpointID: r.ID} }
func (r endpointRequest) String() string { return r.ref().String() }

func (s *Server) handleNetworks() {
	none := func() any { return done{} }
	ok := func(err error) (any, error) { return done{}, err }

	tell(s, "NetworkDriver.GetCapabilities", http.MethodPost, func() any {
		return capabilities{Scope: "local", ConnectivityScope: "local"}
	})
	// Asked of global drivers only. The answer replaces the network's options.
	call(s, "NetworkDriver.AllocateNetwork", decodeAllocateNetwork, func(_ context.Context, r allocateRequest) (any, error) {
		return allocation{Options: r.Options}, nil
	})
	call(s, "NetworkDriver.FreeNetwork", decodeFreeNetwork, func(context.Context, ref) (any, error) {
		return done{}, nil
	})
	call(s, "NetworkDriver.CreateNetwork", decodeCreateNetwork, func(ctx context.Context, r networkRequest) (any, error) {
		return ok(s.Networks.CreateNetwork(ctx, r.NetworkRequest))
	})
	call(s, "NetworkDriver.DeleteNetwork", decodeDeleteNetwork, func(ctx context.Context, r ref) (any, error) {
		return ok(s.Networks.DeleteNetwork(ctx, r.NetworkID))
	})
	call(s, "NetworkDriver.CreateEndpoint", decodeCreateEndpoint, s.createEndpoint)
	call(s, "NetworkDriver.EndpointOperInfo", decodeEndpointOperInfo, func(context.Context, ref) (any, error) {
		return operInfo{}, nil
	})
	call(s, "NetworkDriver.DeleteEndpoint", decodeDeleteEndpoint, func(ctx context.Context, r ref) (any, error) {
		return ok(s.Networks.DeleteEndpoint(ctx, r.NetworkID, r.EndpointID))
	})
	call(s, "NetworkDriver.Join", decodeJoin, s.join)
	call(s, "NetworkDriver.Leave", decodeLeave, func(ctx context.Context, r ref) (any, error) {
		return ok(s.Networks.Leave(ctx, r.NetworkID, r.EndpointID))
	})
	call(s, "NetworkDriver.ProgramExternalConnectivity", decodeProgramExternalConnectivity, func(ctx context.Context, r publishRequest) (any, error) {
		return ok(s.Networks.Publish(ctx, r.NetworkID, r.EndpointID, r.Ports))
	})
	call(s, "NetworkDriver.RevokeExternalConnectivity", decodeRevokeExternalConnectivity, func(ctx context.Context, r ref) (any, error) {
		return ok(s.Networks.Unpublish(ctx, r.NetworkID, r.EndpointID))
	})
	// Swarm's nodes: of no use to networks of one host.
	tell(s, "NetworkDriver.DiscoverNew", http.MethodPost, none)
	tell(s, "NetworkDriver.DiscoverDelete", http.MethodPost, none)
}

func (s *Server) createEndpoint(ctx context.Context, r endpointRequest) (any, error) {
	reply, err := s.Networks.CreateEndpoint(ctx, r.EndpointRequest)
	if err != nil {
		return nil, err
	}
	var out createEndpointReply
	if r.MAC == (plan.MAC{}) && reply.MAC != (plan.MAC{}) {
		out.Interface.MacAddress = reply.MAC.String()
	}
	return out, nil
}

func (s *Server) join(ctx context.Context, r ref) (any, error) {
	reply, err := s.Networks.Join(ctx, r.NetworkID, r.EndpointID)
	if err != nil {
		return nil, err
	}
	out := joinReply{InterfaceName: interfaceName{SrcName: reply.SrcName, DstPrefix: reply.DstPrefix, DstName: reply.DstName}}
	if reply.Gateway.IsValid() {
		out.Gateway = reply.Gateway.String()
	}
	if reply.Gateway6.IsValid() {
		out.GatewayIPv6 = reply.Gateway6.String()
	}
	for _, r := range reply.Routes {
		wire := staticRoute{Destination: r.Prefix.String(), RouteType: routeConnected}
		if r.Via.IsValid() {
			wire.RouteType, wire.NextHop = routeNextHop, r.Via.String()
		}
		out.StaticRoutes = append(out.StaticRoutes, wire)
	}
	return out, nil
}

// decodeRef makes the decoder of a call that has no more to say than which network or endpoint.
func decodeRef(verb string, check func(ref) error) func([]byte) (ref, error) {
	return func(body []byte) (ref, error) {
		var r ref
		err := unmarshal(body, &r)
		if err == nil {
			err = check(r)
		}
		if err != nil {
			return r, r.failed(verb, err)
		}
		return r, nil
	}
}

var (
	decodeFreeNetwork                = decodeRef("free", ref.checkNetwork)
	decodeDeleteNetwork              = decodeRef("delete", ref.checkNetwork)
	decodeEndpointOperInfo           = decodeRef("describe", ref.checkEndpoint)
	decodeDeleteEndpoint             = decodeRef("delete", ref.checkEndpoint)
	decodeJoin                       = decodeRef("join", ref.checkEndpoint)
	decodeLeave                      = decodeRef("leave", ref.checkEndpoint)
	decodeRevokeExternalConnectivity = decodeRef("unpublish ports of", ref.checkEndpoint)
)

func decodeAllocateNetwork(body []byte) (allocateRequest, error) {
	var r allocateRequest
	err := unmarshal(body, &r)
	if err == nil {
		err = r.checkNetwork()
	}
	if err != nil {
		return r, r.failed("allocate", err)
	}
	return r, nil
}

func decodeCreateNetwork(body []byte) (networkRequest, error) {
	var wire struct {
		NetworkID string
		Options   map[string]json.RawMessage
		IPv4Data  []subnet
		IPv6Data  []subnet
	}
	var r networkRequest
	err := unmarshal(body, &wire)
	r.ID = wire.NetworkID
	if err == nil {
		err = r.ref().checkNetwork()
	}
	if err == nil {
		r.Options, r.Internal, err = networkOptions(wire.Options)
	}
	if err == nil {
		r.IPv4, r.IPv6, err = subnets(append(wire.IPv4Data, wire.IPv6Data...))
	}
	if err != nil {
		return r, r.ref().failed("create", err)
	}
	return r, nil
}

// networkOptions takes apart what the engine says of a network and what its user said with -o.
func networkOptions(wire map[string]json.RawMessage) (options map[string]string, internal bool, err error) {
	if raw, ok := wire[internalKey]; ok {
		if err := explain(json.Unmarshal(raw, &internal)); err != nil {
			return nil, false, fmt.Errorf("option %s: %w", internalKey, err)
		}
	}
	var generic map[string]json.RawMessage
	if raw, ok := wire[genericKey]; ok {
		if err := explain(json.Unmarshal(raw, &generic)); err != nil {
			return nil, false, fmt.Errorf("option %s: %w", genericKey, err)
		}
	}
	options, err = texts(generic, func(key string) bool { return !engineOnly[key] })
	return options, internal, err
}

// subnets sorts subnets by family: swarm puts those of IPv6 among those of IPv4.
func subnets(wire []subnet) (v4, v6 []mode.Subnet, err error) {
	for _, w := range wire {
		pool, err := parsePool(w.Pool)
		if err != nil {
			return nil, nil, fmt.Errorf("field Pool: %w", err)
		}
		s := mode.Subnet{Space: w.AddressSpace, Pool: pool}
		if s.Gateway, err = hostOf(pool, w.Gateway); err != nil {
			return nil, nil, fmt.Errorf("field Gateway of %s: %w", pool, err)
		}
		for name, address := range w.AuxAddresses {
			a, err := hostOf(pool, address)
			if err != nil {
				return nil, nil, fmt.Errorf("field AuxAddresses of %s: %s: %w", pool, quote(name), err)
			}
			if !a.IsValid() {
				continue
			}
			if s.Auxiliary == nil {
				s.Auxiliary = map[string]netip.Addr{}
			}
			s.Auxiliary[name] = a
		}
		if pool.Addr().Is4() {
			v4 = append(v4, s)
		} else {
			v6 = append(v6, s)
		}
	}
	return v4, v6, nil
}

// hostOf parses an address that has to be in a pool.
func hostOf(pool netip.Prefix, s string) (netip.Addr, error) {
	a, err := parseHost(s)
	if err == nil && a.IsValid() && !pool.Contains(a) {
		err = fmt.Errorf("%s is not in the subnet", a)
	}
	return a, err
}

func decodeCreateEndpoint(body []byte) (endpointRequest, error) {
	var wire struct {
		NetworkID  string
		EndpointID string
		Interface  networkInterface
		Options    map[string]json.RawMessage
	}
	var r endpointRequest
	err := unmarshal(body, &wire)
	r.NetworkID, r.ID = wire.NetworkID, wire.EndpointID
	if err == nil {
		err = r.ref().checkEndpoint()
	}
	if err == nil {
		err = r.readInterface(wire.Interface)
	}
	if err == nil {
		r.Options, err = texts(wire.Options, forDriver)
	}
	if err != nil {
		return r, r.ref().failed("create", err)
	}
	return r, nil
}

func (r *endpointRequest) readInterface(wire networkInterface) (err error) {
	if r.Address, err = parseAddress(wire.Address); err != nil {
		return fmt.Errorf("field Interface.Address: %w", err)
	}
	if r.Address6, err = parseAddress(wire.AddressIPv6); err != nil {
		return fmt.Errorf("field Interface.AddressIPv6: %w", err)
	}
	if r.Address.IsValid() && !r.Address.Addr().Is4() {
		return fmt.Errorf("field Interface.Address: %s is not an IPv4 address", r.Address)
	}
	if r.Address6.IsValid() && !r.Address6.Addr().Is6() {
		return fmt.Errorf("field Interface.AddressIPv6: %s is not an IPv6 address", r.Address6)
	}
	if r.MAC, err = parseMAC(wire.MacAddress); err != nil {
		return fmt.Errorf("field Interface.MacAddress: %w", err)
	}
	return nil
}

// forDriver tells a user's --driver-opt from the engine's own keys, which stand beside it. The
// whole namespace is the engine's, so that keys of later engines do no harm.
func forDriver(key string) bool {
	return !strings.HasPrefix(key, engineKeys) || strings.HasPrefix(key, windowsKeys) || key == mtuKey || key == ifNameKey
}

// texts gives the options that are wanted as text: they were text when a user typed them.
func texts(wire map[string]json.RawMessage, wanted func(key string) bool) (map[string]string, error) {
	var out map[string]string
	for key, raw := range wire {
		if !wanted(key) {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		switch raw[0] { // valid JSON without leading space: the decoder took it apart
		case '"':
			var s string
			if err := explain(json.Unmarshal(raw, &s)); err != nil {
				return nil, fmt.Errorf("option %s: %w", quote(key), err)
			}
			out[key] = s
		case '{', '[':
			return nil, fmt.Errorf("option %s has structure: a string is needed", quote(key))
		case 'n':
			out[key] = ""
		default:
			out[key] = string(raw)
		}
	}
	return out, nil
}

func decodeProgramExternalConnectivity(body []byte) (publishRequest, error) {
	var wire struct {
		ref
		Options map[string]json.RawMessage
	}
	err := unmarshal(body, &wire)
	r := publishRequest{ref: wire.ref}
	if err == nil {
		err = r.checkEndpoint()
	}
	if err == nil {
		r.Ports, err = portMappings(wire.Options[portMappingsKey])
	}
	if err != nil {
		return r, r.failed("publish ports of", err)
	}
	return r, nil
}

// portMappings decodes what was given with `docker run --publish`.
func portMappings(raw json.RawMessage) ([]policy.PortMapping, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var wire []struct {
		Proto       int
		Port        uint16
		HostIP      string
		HostPort    uint16
		HostPortEnd uint16
	}
	if err := explain(json.Unmarshal(raw, &wire)); err != nil {
		return nil, fmt.Errorf("option %s: %w", portMappingsKey, err)
	}
	var out []policy.PortMapping
	for _, w := range wire {
		m := policy.PortMapping{ContainerPort: w.Port, HostPort: w.HostPort, HostPortEnd: w.HostPortEnd}
		var err error
		if m.Protocol, err = policy.ProtocolByNumber(w.Proto); err != nil {
			return nil, fmt.Errorf("container port %d: %w", w.Port, err)
		}
		if m.HostIP, err = netip.ParseAddr(w.HostIP); err != nil && w.HostIP != "" {
			return nil, fmt.Errorf("container port %d/%s: host address %s is not an address", w.Port, m.Protocol, quote(w.HostIP))
		}
		m.HostIP = m.HostIP.Unmap()
		if err := m.Validate(); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}
