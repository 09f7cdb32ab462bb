package driver

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"regexp"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// identifier is what engines name networks and endpoints by: 64 hexadecimal digits, or 25
// letters and digits in a swarm. It becomes part of link names and aliases.
var identifier = regexp.MustCompile(`^[0-9A-Za-z]{12,64}$`)

// parseNetwork makes the record that a request asks for.
func parseNetwork(req NetworkRequest) (mode.Network, error) {
	if !identifier.MatchString(req.ID) {
		return mode.Network{}, fmt.Errorf("network ID %q is not one of an engine: 12 to 64 letters and digits", req.ID)
	}
	options, err := mode.ParseOptions(req.Options)
	if err != nil {
		return mode.Network{}, err
	}
	n := mode.Network{ID: req.ID, Options: options, Internal: req.Internal, IPv4: req.IPv4, IPv6: req.IPv6}
	for _, subnet := range n.Subnets() {
		if !subnet.Pool.IsValid() || subnet.Pool != subnet.Pool.Masked() {
			return mode.Network{}, fmt.Errorf("subnet %s is not a network prefix", subnet.Pool)
		}
		if subnet.Gateway.IsValid() && !subnet.Pool.Contains(subnet.Gateway) {
			return mode.Network{}, fmt.Errorf("gateway %s is not in subnet %s", subnet.Gateway, subnet.Pool)
		}
	}
	if err := mode.Validate(n); err != nil {
		return mode.Network{}, err
	}
	return n, nil
}

// same reports whether two records ask for the same network, however it is connected now.
func same(a, b mode.Network) bool {
	a.Wire, b.Wire = mode.Wire{}, mode.Wire{}
	a.Leased, b.Leased = false, false
	a.Leased6, b.Leased6 = false, false
	a.Transit, b.Transit = 0, 0
	return bytes.Equal(encode(a), encode(b))
}

// parseEndpoint makes the record that a request asks for. The caller holds n.mu.
func (s *Service) parseEndpoint(ctx context.Context, n *network, req EndpointRequest, leased leased) (mode.Endpoint, error) {
	if !identifier.MatchString(req.ID) {
		return mode.Endpoint{}, fmt.Errorf("endpoint ID %q is not one of an engine: 12 to 64 letters and digits", req.ID)
	}
	ifName, err := mode.ParseEndpointOptions(req.Options)
	if err != nil {
		return mode.Endpoint{}, err
	}
	e := mode.Endpoint{ID: req.ID, IfName: ifName, NetworkID: req.NetworkID, Address: req.Address, Address6: req.Address6, MAC: req.MAC, External: n.record.External(), Lease: leased.lease, Lease6: leased.lease6}
	if len(e.Addresses()) == 0 {
		return mode.Endpoint{}, errors.New("it has no address: the network's address manager gave none")
	}
	for _, a := range e.Addresses() {
		if err := n.free(a, e.ID); err != nil {
			return mode.Endpoint{}, err
		}
		if !n.record.External() {
			continue
		}
		if own, err := s.kernel.Own(ctx, a); err != nil {
			return mode.Endpoint{}, fmt.Errorf("address %s: %w", a, err)
		} else if own {
			return mode.Endpoint{}, fmt.Errorf("address %s is the host's own: make the network with an --ip-range without it, or set it apart with --aux-address", a)
		}
	}
	if err := mode.ValidateEndpoint(n.record, e); err != nil {
		return mode.Endpoint{}, err
	}
	old, exists := n.endpoints[req.ID]
	switch {
	case e.MAC == plan.MAC{} && leased.mac != plan.MAC{}:
		e.MAC = leased.mac
	case e.MAC == plan.MAC{} && exists:
		e.MAC = old.MAC
	case e.MAC == plan.MAC{}:
		name := ""
		if n.record.Options.StableMAC {
			name = s.leases.Name(n.record.Subnets()[0].Pool, e.Addresses()[0])
		}
		// By its address: who has spoken to an earlier container with it need not find out that its MAC
		// is another, which takes half a minute. But an address that moves to another host must not look
		// like the old one there.
		seed := e.Addresses()[0].String()
		if n.record.Overlay() {
			seed = rand.Text()
		}
		mac, err := s.chooseMAC(n, seed, name)
		if err != nil {
			return mode.Endpoint{}, err
		}
		e.MAC = mac
	case e.MAC[0]&1 != 0:
		return mode.Endpoint{}, fmt.Errorf("MAC address %s is a multicast address: give a unicast one (even first byte)", e.MAC)
	default:
		if holder := n.stations[e.MAC]; holder != "" && holder != e.ID {
			return mode.Endpoint{}, fmt.Errorf("MAC address %s is taken by endpoint %s: give another with --mac-address", e.MAC, brief(holder))
		}
	}
	if exists {
		e.Joined, e.Bindings = old.Joined, old.Bindings
		if !bytes.Equal(encode(e), encode(old)) {
			return mode.Endpoint{}, errors.New("it exists with other settings: delete it first")
		}
		return e, nil
	}
	if err := s.foreign(n.record, e); err != nil {
		return mode.Endpoint{}, err
	}
	if mode.Full(len(n.endpoints)) {
		return mode.Endpoint{}, fmt.Errorf("the network has %d endpoints on this host, and a Linux bridge has no room for more: use another network", len(n.endpoints))
	}
	return e, nil
}

// free reports why an address cannot be an endpoint's.
func (n *network) free(a netip.Addr, id string) error {
	inside := false
	for _, s := range n.record.Subnets() {
		if a == s.Gateway {
			return fmt.Errorf("address %s is the network's gateway", a)
		}
		inside = inside || s.Pool.Contains(a)
	}
	if !inside && !n.record.FromLAN(a) {
		return fmt.Errorf("address %s is in no subnet of the network (%s)", a, pools(n.record))
	}
	if holder, taken := n.addresses[a]; taken && holder != id {
		return fmt.Errorf("address %s is taken by endpoint %s", a, brief(holder))
	}
	return nil
}
