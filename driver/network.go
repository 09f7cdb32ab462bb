package driver

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// network is a network in memory: what the store holds of it.
type network struct {
	mu        sync.Mutex
	record    mode.Network
	endpoints map[string]mode.Endpoint
	addresses map[netip.Addr]string // endpoints by address
	stations  map[plan.MAC]string   // and by Ethernet address
	idle      map[string]int        // looks in which an endpoint had no container
	stored    bool                  // the record is on disk
	gone      bool                  // deleted while a call waited for mu
	herald    herald                // of another MAC on the wire; s.index guards it
}

func newNetwork(record mode.Network) *network {
	return &network{
		record: record, endpoints: map[string]mode.Endpoint{}, idle: map[string]int{},
		addresses: map[netip.Addr]string{}, stations: map[plan.MAC]string{},
	}
}

// errUnknown is the engine naming something that is not on record.
var errUnknown = errors.New("not known to dockway")

// reserve enters a new network into the index, unless its subnets cannot be had. It reports
// whether just this network exists already.
func (s *Service) reserve(n *network, routes []plan.HostRoute) (exists bool, err error) {
	s.index.Lock()
	defer s.index.Unlock()
	if old, ok := s.networks[n.record.ID]; ok {
		if same(old.record, n.record) {
			return true, nil
		}
		return false, fmt.Errorf("create network %s: it exists with other settings: delete it first", brief(n.record.ID))
	}
	for _, other := range s.networks {
		switch {
		case n.record.External():
		case n.record.Overlay():
			for _, vsid := range n.record.Options.VSIDs {
				if slices.Contains(other.record.Options.VSIDs, vsid) {
					return false, fmt.Errorf("create network %s: VXLAN identifier %d is that of network %s on this host: choose another with -o vsid=…, or use that network", brief(n.record.ID), vsid, other.name())
				}
			}
			if other.record.Namespace() == n.record.Namespace() {
				return false, alike(n.record, other.record, "namespace "+n.record.Namespace())
			}
		case other.record.Bridge() == n.record.Bridge():
			return false, alike(n.record, other.record, "bridge "+n.record.Bridge())
		}
	}
	if err := s.chooseTransit(n); err != nil {
		return false, err
	}
	for _, subnet := range n.record.Subnets() {
		if n.record.Overlay() && len(n.record.Options.Exceptions) == 0 {
			continue // in a namespace of its own
		}
		for _, other := range s.networks {
			if other.record.Overlay() && len(other.record.Options.Exceptions) == 0 {
				continue
			}
			for _, taken := range other.record.Subnets() {
				if taken.Pool.Overlaps(subnet.Pool) {
					return false, fmt.Errorf("create network %s: subnet %s overlaps %s of network %s: choose another with --subnet", brief(n.record.ID), subnet.Pool, taken.Pool, other.name())
				}
			}
		}
		for _, r := range routes {
			// A wider route to a router gives way to the network's own; one on a link, or inside
			// the subnet, would be cut off. A network on the wire has no route of its own.
			if !n.record.External() && r.Prefix.Overlaps(subnet.Pool) && (r.OnLink || r.Prefix.Bits() >= subnet.Pool.Bits()) && !strings.HasPrefix(r.Link, "dwb") {
				return false, fmt.Errorf("create network %s: subnet %s overlaps the host's route to %s on %s: choose another with --subnet", brief(n.record.ID), subnet.Pool, r.Prefix, r.Link)
			}
		}
	}
	s.networks[n.record.ID] = n
	return false, nil
}

// alike refuses a network whose links would have the names of another's: a name has room for the
// beginning of an ID only.
func alike(n, other mode.Network, what string) error {
	return fmt.Errorf("create network %s: its ID begins as that of network %s does, which has the %s: an engine makes IDs at random, so try again", n.ID, other.ID, what)
}

// chooseTransit gives an overlay that leads outside a pair of addresses that no other has. The caller
// holds s.index.
func (s *Service) chooseTransit(n *network) error {
	if !n.record.Options.OutboundNAT {
		return nil
	}
	taken := map[int]bool{}
	for _, other := range s.networks {
		taken[other.record.Transit] = true
	}
	for i := 1; i <= mode.MaxTransits; i++ {
		if !taken[i] {
			n.record.Transit = i
			return nil
		}
	}
	return fmt.Errorf("create network %s: %d overlay networks with outbound_nat=true are on this host, and there is no room for more", brief(n.record.ID), mode.MaxTransits)
}

func (s *Service) forget(n *network) {
	for _, e := range n.list() {
		n.remove(s, e)
	}
	s.index.Lock()
	defer s.index.Unlock()
	n.gone = true
	delete(s.networks, n.record.ID)
}

// record is what is known of a network.
func (s *Service) record(id string) (mode.Network, bool) {
	s.index.Lock()
	defer s.index.Unlock()
	n, ok := s.networks[id]
	if !ok {
		return mode.Network{}, false
	}
	return n.record, true
}

// lock finds a network and takes its lock.
func (s *Service) lock(id string) (*network, error) {
	s.index.Lock()
	n, ok := s.networks[id]
	s.index.Unlock()
	if ok {
		n.mu.Lock()
		if !n.gone {
			return n, nil
		}
		n.mu.Unlock()
	}
	return nil, fmt.Errorf("network %s is %w: it may have been made by another plugin of that name, or its record is lost; create it again", brief(id), errUnknown)
}

// endpoint finds an endpoint and takes its network's lock.
func (s *Service) endpoint(networkID, id string) (*network, mode.Endpoint, error) {
	n, err := s.lock(networkID)
	if err != nil {
		return nil, mode.Endpoint{}, err
	}
	if e, ok := n.endpoints[id]; ok {
		return n, e, nil
	}
	defer n.mu.Unlock()
	return nil, mode.Endpoint{}, fmt.Errorf("endpoint %s of network %s is %w", brief(id), n.name(), errUnknown)
}

// put and remove change an endpoint in memory. The index lock lets the command line read while a
// call holds the network's.
func (n *network) put(s *Service, e mode.Endpoint) {
	s.index.Lock()
	defer s.index.Unlock()
	s.announce(n.record, n.endpoints[e.ID], e)
	n.unlist(s, n.endpoints[e.ID])
	n.endpoints[e.ID] = e
	n.stations[e.MAC] = e.ID
	s.links[e.Port()] = endpointKey(e)
	for _, a := range e.Addresses() {
		n.addresses[a] = e.ID
	}
	for _, b := range e.Bindings {
		s.list(holder{n, e.ID, b, false})
	}
}

func (n *network) remove(s *Service, e mode.Endpoint) {
	s.index.Lock()
	defer s.index.Unlock()
	s.announce(n.record, n.endpoints[e.ID], mode.Endpoint{})
	n.unlist(s, n.endpoints[e.ID])
	delete(n.endpoints, e.ID)
	delete(n.idle, e.ID)
}

// unlist takes an endpoint out of what it can be found by.
func (n *network) unlist(s *Service, e mode.Endpoint) {
	delete(n.stations, e.MAC)
	delete(s.links, e.Port())
	for _, a := range e.Addresses() {
		delete(n.addresses, a)
	}
	for _, b := range e.Bindings {
		s.unlist(holder{n, e.ID, b, false})
	}
}

// before are the changes that take changes back, by what the memory of n still holds.
func (n *network) before(changes []Change) []Change {
	undo := make([]Change, 0, len(changes))
	for _, c := range changes {
		c.Value = nil
		if c.Bucket == networkBucket && n.stored {
			c.Value = encode(n.record)
		}
		if c.Bucket == endpointBucket {
			_, id, _ := strings.Cut(c.Key, "/")
			if e, ok := n.endpoints[id]; ok && e.Joined {
				c.Value = encode(e)
			}
		}
		undo = append(undo, c)
	}
	return undo
}

func (n *network) list() []mode.Endpoint { return slices.Collect(maps.Values(n.endpoints)) }

func (n *network) name() string {
	if n.record.Options.Name != "" {
		return n.record.Options.Name
	}
	return brief(n.record.ID)
}

func endpointKey(e mode.Endpoint) string { return e.NetworkID + "/" + e.ID }

func endpointGone(e mode.Endpoint) Change { return Change{Bucket: endpointBucket, Key: endpointKey(e)} }
