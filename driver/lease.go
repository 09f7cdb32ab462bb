package driver

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

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
	// Granted gives what the DHCP server grants now where an address of such a pool was leased: that address
	// or another, and what it tells about it. The error says why it grants nothing.
	Granted(pool netip.Prefix, a netip.Addr) (netip.Addr, mode.Lease, error)
	// Share has the addresses of a pool given in agreement with the other hosts of the cluster, if the
	// pool is the address manager's. It reports whether it is.
	Share(space string, pool netip.Prefix) (bool, error)
	// Name is of the container that has the address, if the engine told it.
	Name(pool netip.Prefix, a netip.Addr) string
}

// leaseFrom has the address manager lease the network's addresses, if it can.
func (s *Service) leaseFrom(record *mode.Network) error {
	if record.Options.Mode != mode.Transparent {
		return nil
	}
	var err, err6 error
	if len(record.IPv4) == 1 {
		record.Leased, err = s.leases.LeaseFrom(record.IPv4[0].Pool, record.Uplink())
	}
	if len(record.IPv6) == 1 {
		record.Leased6, err6 = s.leases.LeaseFrom(record.IPv6[0].Pool, record.Uplink())
	}
	return errors.Join(err, err6)
}

// leased is what an endpoint has from the DHCP servers of its LAN.
type leased struct {
	mac           plan.MAC // that its address is leased for, zero when none is
	lease, lease6 mode.Lease
}

// lease gives the MAC that an endpoint's addresses are leased for, and what the DHCP server told about
// them; nothing when they are not leased. It takes seconds when the server does not answer, so nothing is
// locked meanwhile.
//
// The address manager knows a container by its name only, which engines before 29 do not tell. There
// the IPv6 address is then leased for another MAC: it is who asks for it that counts, not who uses it.
func (s *Service) lease(ctx context.Context, req EndpointRequest) (got leased, err error) {
	record, known := s.record(req.NetworkID)
	if !known {
		return leased{}, nil
	}
	if record.Leased6 && req.Address6.IsValid() {
		if got.mac, got.lease6, err = s.leases.Lease(ctx, record.IPv6[0].Pool, req.Address6.Addr(), req.MAC); err != nil {
			return leased{}, err
		}
	}
	if record.Leased && req.Address.IsValid() {
		if got.mac, got.lease, err = s.leases.Lease(ctx, record.IPv4[0].Pool, req.Address.Addr(), req.MAC); err != nil {
			return leased{}, err
		}
	}
	return got, nil
}

// leasedRoutes are the routes that a lease tells, after one to its gateway if that is not in the
// address's subnet: it is on the link all the same, as an IPv6 router's link-local address is.
func leasedRoutes(address netip.Prefix, l mode.Lease) []mode.StaticRoute {
	routes := slices.Clone(l.Routes)
	if g := l.Gateway; g.IsValid() && !address.Masked().Contains(g) {
		routes = slices.Insert(routes, 0, mode.StaticRoute{Prefix: netip.PrefixFrom(g, g.BitLen())})
	}
	return routes
}

// leaseProblem says, for people, what the DHCP servers grant else than an endpoint has. Only the engine
// could change a container that runs.
func (s *Service) leaseProblem(n mode.Network, e mode.Endpoint) string {
	var problems []string
	if n.Leased && e.Address.IsValid() {
		problems = append(problems, s.differs(n.IPv4[0].Pool, e.Address.Addr(), e.Lease))
	}
	if n.Leased6 && e.Address6.IsValid() {
		problems = append(problems, s.differs(n.IPv6[0].Pool, e.Address6.Addr(), e.Lease6))
	}
	return strings.Join(slices.DeleteFunc(problems, func(p string) bool { return p == "" }), "; ")
}

// differs says what the DHCP server grants else than an address, with what it told about it.
func (s *Service) differs(pool netip.Prefix, a netip.Addr, told mode.Lease) string {
	now, lease, err := s.leases.Granted(pool, a)
	switch {
	case err != nil:
		return err.Error()
	case now != a:
		return fmt.Sprintf("the DHCP server gives %s in place of %s: the container keeps what it has until it is restarted", now, a)
	case !bytes.Equal(encode(lease), encode(told)):
		return fmt.Sprintf("the DHCP server tells more or less about %s than when the container was started: it keeps what it has until it is restarted", a)
	}
	return ""
}

// ChooseMAC chooses the MAC of a container of a network, by its name if that is known, before the
// engine has told of its endpoint.
func (s *Service) ChooseMAC(pool netip.Prefix, name string) (plan.MAC, error) {
	var found *network
	s.each(func(n *network) {
		if slices.ContainsFunc(n.record.Subnets(), func(s mode.Subnet) bool { return s.Pool == pool }) {
			found = n
		}
	})
	if found == nil {
		return plan.MAC{}, fmt.Errorf("no network has the subnet %s", pool)
	}
	s.index.Lock()
	defer s.index.Unlock()
	return s.chooseMAC(found, rand.Text(), name)
}

// OnLAN is the MAC of who of this host has an address on a link's LAN, the host itself or a container of any network there;
// zero when nobody has. Who asks the LAN by the link does not ask them.
func (s *Service) OnLAN(ctx context.Context, link string, a netip.Addr) (found plan.MAC) {
	own, _ := s.kernel.Own(ctx, a) // else the endpoint is refused
	s.each(func(n *network) {
		if !n.record.External() || n.record.Uplink() != link {
			return
		}
		if own {
			found = n.record.Wire.MAC
		}
		if id, taken := n.addresses[a]; taken {
			found = n.endpoints[id].MAC
		}
	})
	return found
}

// chooseMAC chooses an endpoint's MAC, always the same for a seed: for the container's name, if the
// network asks for that and the name is known.
func (s *Service) chooseMAC(n *network, seed, name string) (plan.MAC, error) {
	if n.record.Options.StableMAC && name != "" {
		seed = n.record.Bridge() + " " + n.record.Options.Name + " " + name
	}
	return n.record.Options.ChooseMAC(seed, func(m plan.MAC) bool {
		return n.stations[m] != "" || slices.ContainsFunc(n.record.Options.VSIDs, func(vsid uint32) bool { return len(s.peers.OfMAC(vsid, m)) > 0 })
	})
}
