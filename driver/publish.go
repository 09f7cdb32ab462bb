package driver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// The ports that are tried when the host port is left to dockway: the range that Linux gives
// clients (net.ipv4.ip_local_port_range), as Docker does.
const (
	firstDynamicPort = 32768
	lastDynamicPort  = 60999
)

// attempts is how many host ports are tried for a mapping that leaves a choice.
const attempts = 256

// Publish maps ports of the host to the endpoint: these, and no others of before. The error
// names who holds a port that cannot be had.
func (s *Service) Publish(ctx context.Context, networkID, id string, mappings []policy.PortMapping) error {
	for _, m := range mappings {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	s.all.RLock()
	defer s.all.RUnlock()
	n, e, err := s.endpoint(networkID, id)
	if err != nil {
		return fmt.Errorf("publish ports of endpoint %s: %w", brief(id), err)
	}
	defer n.mu.Unlock()
	if n.record.Internal || !e.Joined {
		mappings = nil // nothing leads there
	}
	for _, m := range mappings {
		if err := mode.Publishes(n.record, m.Protocol); err != nil {
			return fmt.Errorf("publish ports of endpoint %s on network %s: %w", brief(id), n.name(), err)
		}
	}
	if err := s.publish(ctx, n, e, mappings); err != nil {
		return fmt.Errorf("publish ports of endpoint %s on network %s: %w", brief(id), n.name(), err)
	}
	return nil
}

// Unpublish takes all port mappings of the endpoint back.
func (s *Service) Unpublish(ctx context.Context, networkID, id string) error {
	return s.drop(ctx, "unpublish ports of endpoint", networkID, id, func(e mode.Endpoint) (mode.Endpoint, bool) {
		e.Bindings = nil
		return e, true
	})
}

// publish picks host ports, tries them, and picks others in place of those that turn out taken.
func (s *Service) publish(ctx context.Context, n *network, e mode.Endpoint, mappings []policy.PortMapping) error {
	taken := map[plan.Key]error{} // host ports that could not be had
	var inUse *plan.PortInUseError
	for range attempts {
		bindings, err := s.bind(n, e, mappings, taken)
		if err != nil {
			return err
		}
		after := e
		after.Bindings = bindings
		if !slices.Equal(bindings, e.Bindings) {
			err = s.replace(ctx, n, after)
		}
		s.unclaim(n, after)
		if !errors.As(err, &inUse) {
			return err
		}
		taken[inUse.Port.Key()] = inUse
	}
	return fmt.Errorf("no free host port after %d attempts, the last: %w", attempts, inUse)
}

// bind chooses the host ports of all mappings, and claims them: calls on other networks choose at
// the same time.
func (s *Service) bind(n *network, e mode.Endpoint, mappings []policy.PortMapping, unavailable map[plan.Key]error) ([]policy.Binding, error) {
	s.index.Lock()
	defer s.index.Unlock()
	var all []policy.Binding
	mine := map[portNumber][]policy.Binding{}
	conflict := func(b policy.Binding) error {
		if slices.ContainsFunc(mine[numberOf(b)], func(m policy.Binding) bool { return overlap(m.Host.Addr(), b.Host.Addr()) }) {
			return fmt.Errorf("host port %s/%s is published twice by this container", b.Host, b.Protocol)
		}
		if err := unavailable[plan.HostPort{Proto: string(b.Protocol), Host: b.Host}.Key()]; err != nil {
			return err
		}
		return s.published(b, e.ID)
	}
	for _, m := range mappings {
		bindings, err := choose(e, m, conflict)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m, err)
		}
		for _, b := range bindings {
			mine[numberOf(b)] = append(mine[numberOf(b)], b)
		}
		all = append(all, bindings...)
	}
	for _, b := range all {
		s.list(holder{n, e.ID, b, true})
	}
	return all, nil
}

// unclaim gives up the claims that bind made: the endpoint publishes the ports now, or does not.
func (s *Service) unclaim(n *network, e mode.Endpoint) {
	s.index.Lock()
	defer s.index.Unlock()
	for _, b := range e.Bindings {
		s.unlist(holder{n, e.ID, b, true})
	}
}

// choose finds the first host port of the mapping's range that is free in all its bindings.
func choose(e mode.Endpoint, m policy.PortMapping, conflict func(policy.Binding) error) ([]policy.Binding, error) {
	var taken error
ports:
	for port := range candidates(e, m) {
		bindings, err := bindings(e, m, port)
		if err != nil {
			return nil, err
		}
		for _, b := range bindings {
			if err := conflict(b); err != nil {
				taken = err
				continue ports
			}
		}
		return bindings, nil
	}
	return nil, taken
}

// candidates are the host ports to try, in order: those that the endpoint has for the mapping
// already, then the range asked for, or dynamic ports from a random one on.
func candidates(e mode.Endpoint, m policy.PortMapping) func(func(uint16) bool) {
	return func(yield func(uint16) bool) {
		if m.HostPort != 0 {
			for p := int(m.HostPort); p <= max(int(m.HostPort), int(m.HostPortEnd)); p++ {
				if !yield(uint16(p)) {
					return
				}
			}
			return
		}
		for _, b := range e.Bindings {
			if b.Protocol == m.Protocol && b.Container.Port() == m.ContainerPort && !yield(b.Host.Port()) {
				return
			}
		}
		const size = lastDynamicPort - firstDynamicPort + 1
		start := rand.IntN(size)
		for i := range size {
			if !yield(uint16(firstDynamicPort + (start+i)%size)) {
				return
			}
		}
	}
}

// bindings are what a mapping means on one host port: for every address of the host, one binding
// for each family.
func bindings(e mode.Endpoint, m policy.PortMapping, port uint16) ([]policy.Binding, error) {
	v4, v6 := e.Address.Addr(), e.Address6.Addr()
	binding := func(host, container netip.Addr) policy.Binding {
		return policy.Binding{Protocol: m.Protocol, Host: netip.AddrPortFrom(host, port), Container: netip.AddrPortFrom(container, m.ContainerPort)}
	}
	either := func(first, second netip.Addr) netip.Addr {
		if first.IsValid() {
			return first
		}
		return second
	}
	var out []policy.Binding
	switch host := m.HostIP.Unmap(); {
	case !host.IsValid():
		if v4.IsValid() {
			out = append(out, binding(netip.IPv4Unspecified(), v4))
		}
		out = append(out, binding(netip.IPv6Unspecified(), either(v6, v4)))
	case host.Is4() && !v4.IsValid():
		return nil, fmt.Errorf("the container has no IPv4 address to publish on %s", host)
	case host.Is4():
		out = append(out, binding(host, v4))
	default:
		out = append(out, binding(host, either(v6, v4)))
	}
	return out, nil
}

// portNumber is a port of some address of the host.
type portNumber struct {
	protocol policy.Protocol
	port     uint16
}

func numberOf(b policy.Binding) portNumber { return portNumber{b.Protocol, b.Host.Port()} }

// holder is an endpoint that publishes a port.
type holder struct {
	network  *network
	endpoint string
	binding  policy.Binding
	claim    bool // it is about to
}

// list and unlist keep what published looks up. The caller holds s.index.
func (s *Service) list(h holder) {
	number := numberOf(h.binding)
	s.ports[number] = append(s.ports[number], h)
}

func (s *Service) unlist(h holder) {
	number := numberOf(h.binding)
	left := slices.DeleteFunc(s.ports[number], func(other holder) bool { return other == h })
	if s.ports[number] = left; len(left) == 0 {
		delete(s.ports, number)
	}
}

// published reports that another endpoint publishes the host port, or is about to, on the same
// address or on every address of the family. The caller holds s.index.
func (s *Service) published(b policy.Binding, but string) error {
	for _, h := range s.ports[numberOf(b)] {
		if h.endpoint != but && overlap(h.binding.Host.Addr(), b.Host.Addr()) {
			return fmt.Errorf("host port %s/%s is published by endpoint %s (%s) of network %s: stop that container or choose another port", h.binding.Host, h.binding.Protocol, brief(h.endpoint), h.binding.Container.Addr(), h.network.name())
		}
	}
	return nil
}

// overlap reports whether a port on one address takes the same port on another.
func overlap(a, b netip.Addr) bool {
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}
