package mode

import (
	"errors"
	"fmt"
	"slices"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// CheckNetwork reports what in a network on record no version has written. It asks for what planning relies on, and for no
// more: what Validate asks for can become more, and a record of before still has to be read.
func CheckNetwork(n Network) error {
	o := n.Options
	switch {
	case !slices.Contains(every, o.Mode):
		return fmt.Errorf("mode %q is none", o.Mode)
	case len(n.Subnets()) == 0:
		return errors.New("it has no subnet")
	case n.External() && !isLinkName(o.Interface), !n.External() && o.Interface != "":
		return fmt.Errorf("interface %q in mode %s", o.Interface, o.Mode)
	case o.VLAN < 0 || o.VLAN > maxVLAN:
		return fmt.Errorf("VLAN %d", o.VLAN)
	case o.MTU < 0 || o.MTU > maxMTU || n.Wire.MTU < 0:
		return fmt.Errorf("MTU %d, %d on the wire", o.MTU, n.Wire.MTU)
	case n.Transit < 0 || n.Transit > MaxTransits:
		return fmt.Errorf("transit %d", n.Transit)
	case n.Leased && len(n.IPv4) == 0, n.Leased6 && len(n.IPv6) == 0:
		return errors.New("addresses are leased of a family without a subnet")
	case n.Overlay() && len(o.VSIDs) != max(len(n.IPv4), len(n.IPv6)):
		return fmt.Errorf("%d VXLAN identifiers for subnets %v and %v", len(o.VSIDs), n.IPv4, n.IPv6)
	}
	for _, vsid := range o.VSIDs {
		if vsid < minVSID || vsid > maxVSID {
			return fmt.Errorf("VXLAN identifier %d", vsid)
		}
	}
	for _, r := range o.MACPool {
		if macNumber(r.End) < macNumber(r.Start) {
			return fmt.Errorf("mac_pool from %s to %s", r.Start, r.End)
		}
	}
	for _, p := range o.Exceptions {
		if !p.IsValid() {
			return errors.New("outbound_nat_exceptions has an invalid prefix")
		}
	}
	for _, s := range n.Subnets() {
		if !s.Pool.IsValid() || s.Pool != s.Pool.Masked() || s.Gateway.IsValid() && !s.Pool.Contains(s.Gateway) {
			return fmt.Errorf("subnet %s with gateway %s", s.Pool, s.Gateway)
		}
	}
	if slices.ContainsFunc(n.IPv4, func(s Subnet) bool { return !s.Pool.Addr().Is4() }) || slices.ContainsFunc(n.IPv6, func(s Subnet) bool { return !s.Pool.Addr().Is6() }) {
		return errors.New("a subnet is of the other family")
	}
	return nil
}

// CheckEndpoint is CheckNetwork for an endpoint of a network.
func CheckEndpoint(n Network, e Endpoint) error {
	switch {
	case len(e.Addresses()) == 0:
		return errors.New("it has no address")
	case e.Address.IsValid() && !e.Address.Addr().Is4(), e.Address6.IsValid() && !e.Address6.Addr().Is6():
		return errors.New("an address is of the other family")
	case e.MAC == plan.MAC{}, e.MAC[0]&1 != 0:
		return fmt.Errorf("MAC address %s", e.MAC)
	case e.External != n.External():
		return fmt.Errorf("its link is not that of an endpoint of a network of mode %s", n.Options.Mode)
	case e.Lease.MTU < 0 || e.Lease6.MTU < 0:
		return fmt.Errorf("leased with MTU %d, %d", e.Lease.MTU, e.Lease6.MTU)
	}
	for _, b := range e.Bindings {
		known := slices.Contains([]policy.Protocol{policy.TCP, policy.UDP, policy.SCTP}, b.Protocol)
		if !known || !b.Host.IsValid() || !slices.Contains(e.Addresses(), b.Container.Addr()) {
			return fmt.Errorf("published port %s", b)
		}
	}
	return nil
}
