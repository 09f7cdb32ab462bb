package mode

import (
	"errors"
	"fmt"
	"slices"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// maxEndpoints is the most endpoints that a network has on one host: a Linux bridge has at most
// 1023 ports (BR_MAX_PORTS), and a few are kept for repairs that overlap with removals.
const maxEndpoints = 1000

// Validate reports what in a network's record its mode cannot do.
func Validate(n Network) error {
	if len(n.Subnets()) == 0 {
		return fmt.Errorf("network %s has neither an IPv4 nor an IPv6 subnet", n.ID)
	}
	switch {
	case n.External():
		if err := validateExternal(n); err != nil {
			return err
		}
	case n.Overlay():
		if err := validateOverlay(n); err != nil {
			return err
		}
	}
	if len(n.IPv6) > 0 && n.Options.MTU != 0 && n.Options.MTU < minMTU6 {
		return fmt.Errorf("option mtu=%d: IPv6 needs at least %d (RFC 8200)", n.Options.MTU, minMTU6)
	}
	return nil
}

// ValidateWire reports what in a network's record the uplink cannot do.
func ValidateWire(n Network) error {
	switch {
	case n.Overlay() && n.MTU() > n.Wire.MTU:
		return fmt.Errorf("option mtu=%d: between the hosts, a frame of the network can carry %d, which is the MTU of the link less the encapsulation", n.MTU(), n.Wire.MTU)
	case n.Overlay() && len(n.IPv6) > 0 && n.MTU() < minMTU6:
		return fmt.Errorf("between the hosts, a frame of the network can carry %d, and IPv6 needs at least %d (RFC 8200)", n.MTU(), minMTU6)
	case n.Wire.Foreign && n.Options.VLAN != 0:
		return fmt.Errorf("option interface=%q is a bridge, and vlan=%d needs the network interface that carries the tag: name that", n.Options.Interface, n.Options.VLAN)
	case n.MTU() > n.Wire.MTU:
		return fmt.Errorf("option mtu=%d: the uplink %s carries at most %d", n.MTU(), n.Options.Interface, n.Wire.MTU)
	case len(n.IPv6) > 0 && n.MTU() < minMTU6:
		return fmt.Errorf("the uplink %s has MTU %d, and IPv6 needs at least %d (RFC 8200)", n.Options.Interface, n.MTU(), minMTU6)
	}
	return nil
}

// Full reports whether the network can take no more endpoints on this host.
func Full(endpoints int) bool { return endpoints >= maxEndpoints }

// Plan is the whole wanted state of one network: of the network itself and of each endpoint.
func Plan(n Network, endpoints []Endpoint) plan.State {
	s := PlanNetwork(n)
	for _, e := range endpoints {
		s.Merge(PlanEndpoint(n, e))
	}
	return s
}

// PlanNetwork is the part of Plan that does not depend on endpoints. Networks on the same external
// switch share it: what one wants of it can be wanted by another too.
func PlanNetwork(n Network) plan.State {
	switch {
	case n.External():
		return externalNetwork(n)
	case n.Overlay():
		return overlayNetwork(n)
	}
	return natNetwork(n)
}

// PlanEndpoint is an endpoint's part of Plan.
func PlanEndpoint(n Network, e Endpoint) plan.State {
	switch {
	case n.External():
		return externalEndpoint(n, e)
	case n.Overlay():
		return overlayEndpoint(n, e)
	}
	return natEndpoint(n, e)
}

// Publishes reports why containers of the network cannot publish a port, in HNS's words
// (HCN_E_MAPPING_NOT_SUPPORTED).
func Publishes(n Network, protocol policy.Protocol) error {
	switch {
	case n.relays() && protocol == policy.SCTP:
		return errors.New("port mapping is not supported on the given network for SCTP: in mode l2tunnel, and in a VLAN, ports are relayed")
	case n.Options.Mode == Transparent:
		return errors.New("port mapping is not supported on the given network: its containers are reached at their own addresses")
	case n.Options.Mode == Overlay:
		return errors.New("port mapping is not supported on the given network: leave outbound_nat=true out, and the engine's gateway network publishes ports")
	}
	return nil
}

// Host is what the networks need of the host, given the links that carry its default routes.
func Host(uplinks []string, networks ...Network) plan.State {
	s := plan.Of(
		plan.Table{Table: InetTable()},
		plan.Table{Table: BridgeTable()},
		plan.Admit{Family: "ip", Mark: admitted},
		plan.Admit{Family: "ip6", Mark: admitted},
	)
	for _, u := range slices.Sorted(slices.Values(uplinks)) {
		s.Add(plan.Element{Set: uplinkSet, Elem: u})
		if slices.ContainsFunc(networks, routesIPv6) {
			// A host that forwards IPv6 stops listening to routers, and so loses the default route
			// that it has from them, unless told to listen all the same (accept_ra in the kernel's
			// ip-sysctl document).
			s.Add(plan.Sysctl{Name: "net/ipv6/conf/" + u + "/accept_ra", From: "1", Value: "2"})
		}
	}
	return s
}

func routesIPv6(n Network) bool {
	return len(n.IPv6) > 0 && !n.Internal && n.Options.Mode != Transparent && (n.Options.Mode != Overlay || n.Options.OutboundNAT)
}
