package driver

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Leases is what the network service asks of the address manager about networks whose addresses
// the DHCP server of their LAN gives.
type Leases interface {
	// LeaseFrom has the addresses of a pool leased on a link's LAN, if the pool was requested so
	// that they can be. It reports whether they are.
	LeaseFrom(pool netip.Prefix, link string) (bool, error)
	// Lease gives the lease of an address of such a pool, for a container with this MAC, or with one
	// that the address manager chooses when it is zero.
	Lease(ctx context.Context, pool netip.Prefix, a netip.Addr, mac plan.MAC) (plan.MAC, mode.Lease, error)
	// Name is of the container that has the address, if the engine told it.
	Name(pool netip.Prefix, a netip.Addr) string
}

// leaseFrom has the address manager lease the network's addresses, if it can.
func (s *Service) leaseFrom(record *mode.Network) error {
	if record.Options.Mode != mode.Transparent || len(record.IPv4) != 1 {
		return nil
	}
	leased, err := s.leases.LeaseFrom(record.IPv4[0].Pool, record.Uplink())
	record.Leased = leased
	return err
}

// lease gives the MAC that an endpoint's address is leased for, and what the DHCP server told about
// it; nothing when it is not leased. It takes seconds when the server does not answer, so nothing is
// locked meanwhile.
func (s *Service) lease(ctx context.Context, req EndpointRequest) (plan.MAC, mode.Lease, error) {
	record, known := s.record(req.NetworkID)
	if !known || !record.Leased || !req.Address.IsValid() {
		return plan.MAC{}, mode.Lease{}, nil
	}
	return s.leases.Lease(ctx, record.IPv4[0].Pool, req.Address.Addr(), req.MAC)
}

// ChooseMAC chooses the MAC of a container of a network, by its name if that is known, before the
// engine has told of its endpoint.
func (s *Service) ChooseMAC(pool netip.Prefix, name string) (plan.MAC, error) {
	var found *network
	s.each(func(n *network) {
		if len(n.record.IPv4) > 0 && n.record.IPv4[0].Pool == pool {
			found = n
		}
	})
	if found == nil {
		return plan.MAC{}, fmt.Errorf("no network has the subnet %s", pool)
	}
	s.index.Lock()
	defer s.index.Unlock()
	return found.chooseMAC(rand.Text(), name)
}

// chooseMAC chooses an endpoint's MAC, always the same for a seed: for the container's name, if the
// network asks for that and the name is known.
func (n *network) chooseMAC(seed, name string) (plan.MAC, error) {
	if n.record.Options.StableMAC && name != "" {
		seed = n.record.Bridge() + " " + n.record.Options.Name + " " + name
	}
	return n.record.Options.ChooseMAC(seed, func(m plan.MAC) bool { return n.stations[m] != "" })
}
