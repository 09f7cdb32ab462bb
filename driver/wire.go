package driver

import (
	"context"
	"fmt"
	"maps"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Networks of the external modes share what connects them to the wire: one switch for each uplink
// and VLAN. It comes with the first of them and goes with the last.

// connect finds out what the network's uplink is. The error says why it cannot be one.
func (s *Service) connect(ctx context.Context, record *mode.Network) error {
	if record.Overlay() {
		return s.span(ctx, record)
	}
	if !record.External() {
		return nil
	}
	uplink, err := s.kernel.Uplink(ctx, record.Options.Interface)
	if err != nil {
		return fmt.Errorf("option interface=%q: %w", record.Options.Interface, err)
	}
	if record.Options.Macvlan && record.Options.VLAN == 0 && uplink.Switch {
		return fmt.Errorf("option interface=%q: the switch of another network holds it, and macvlan links cannot share it: leave backend=macvlan out, or name another", record.Options.Interface)
	}
	record.Wire.Foreign = uplink.Bridge
	record.Connect(uplink)
	return mode.ValidateWire(*record)
}

// refresh looks whether the uplink, or the gateway of a network that sends everything there, is
// another than it was. An uplink that is not there now stays what it was.
func (s *Service) refresh(ctx context.Context, record mode.Network) mode.Network {
	if record.Overlay() {
		now := record
		if s.span(ctx, &now) == nil {
			return now
		}
		return record
	}
	if !record.External() {
		return record
	}
	if uplink, err := s.kernel.Uplink(ctx, record.Options.Interface); err == nil && uplink.Bridge == record.Wire.Foreign {
		record.Connect(uplink)
	}
	if gateway := record.TunnelGateway(); gateway.IsValid() {
		record.Wire.Gateway, _ = s.kernel.Neighbour(ctx, record.Bridge(), gateway)
	}
	return record
}

// askGateways has the kernel look for the gateways that everything is sent to, now that the switches
// are there. It tells with a tick when they answer; those that it knows already, it has told.
func (s *Service) askGateways(ctx context.Context) {
	var records []mode.Network
	s.each(func(n *network) { records = append(records, n.record) })
	for _, record := range records {
		if gateway := record.TunnelGateway(); gateway.IsValid() {
			if mac, err := s.kernel.Neighbour(ctx, record.Bridge(), gateway); err == nil && mac != record.Wire.Gateway {
				s.nudge()
			}
		}
	}
}

// moved lists the networks that are connected in another way than memory has it.
func (s *Service) moved(networks []mode.Network) []mode.Network {
	var out []mode.Network
	s.each(func(n *network) {
		for _, now := range networks {
			if now.ID == n.record.ID && now.Wire != n.record.Wire {
				out = append(out, now)
			}
		}
	})
	return out
}

// follow takes note of it. It need not be on disk: who starts looks again. The caller holds s.all
// for writing.
func (s *Service) follow(networks []mode.Network) {
	s.index.Lock() // the command line reads beside
	defer s.index.Unlock()
	for _, now := range networks {
		n := s.networks[now.ID]
		if n.record.External() && n.record.Wire.MAC != now.Wire.MAC {
			n.herald = herald{left: announcements}
		}
		n.record.Wire = now.Wire
		if now.Overlay() {
			s.log.WithField("network", n.name()).Infof("the link between the hosts has changed: address %s, MTU of the network %d", now.Wire.Local, now.Wire.MTU)
			continue
		}
		s.log.WithField("network", n.name()).Infof("the wire has changed: host %s, MTU %d, gateway %s", now.Wire.MAC, now.Wire.MTU, now.Wire.Gateway)
	}
}

// shared is what other networks, or the host as one of a cluster, want of what the network wants too.
func (s *Service) shared(n *network) plan.State {
	own := mode.PlanNetwork(n.record)
	both := s.planPeers()
	maps.DeleteFunc(both, func(key plan.Key, _ plan.Object) bool { return own[key] == nil })
	s.each(func(other *network) {
		if other == n || !shares(other.record) || !shares(n.record) {
			return
		}
		for key, o := range mode.PlanNetwork(other.record) {
			if own[key] != nil {
				both[key] = o
			}
		}
	})
	return both
}

// lockWire keeps others from making or removing what networks share. It returns what unlocks.
func (s *Service) lockWire(record mode.Network) func() {
	if !shares(record) {
		return func() {}
	}
	s.wire.Lock()
	return s.wire.Unlock
}

// shares reports whether a network shares anything in the kernel with others: a switch, or the guard
// of what comes encapsulated.
func shares(n mode.Network) bool { return n.External() || n.Overlay() }
