// Package driver is the network service: it records what networks and endpoints are wanted, then
// converges the kernel to the record. It does not speak to the engine, the kernel or the disk
// itself: it declares what it needs of them.
package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Kernel observes and changes what the host holds with dockway's mark.
type Kernel interface {
	// Observe gives those of the keys' objects that exist. Its cost does not depend on how much
	// else there is.
	Observe(ctx context.Context, keys []plan.Key) (plan.State, error)
	// ObserveAll gives everything that bears dockway's mark, and the keys in also.
	ObserveAll(ctx context.Context, also []plan.Key) (plan.State, error)
	// Do carries out operations in order and stops at the first that fails. Each is idempotent.
	Do(ctx context.Context, ops []plan.Op) error
	// Watch ticks when something of dockway's, or something that it depends on, has changed.
	Watch(ctx context.Context) (<-chan struct{}, error)
	// Routes lists the host's routes but for default routes.
	Routes(ctx context.Context) ([]plan.HostRoute, error)
	// Uplinks lists the links that carry a default route.
	Uplinks(ctx context.Context) ([]string, error)
	// Uplink looks a link up that an external switch is to be made of. The error says why it cannot
	// be, and what to do.
	Uplink(ctx context.Context, name string) (plan.Uplink, error)
	// Neighbour gives the MAC of a neighbour on a link, zero while it does not answer. Watch ticks
	// when one that was asked for changes.
	Neighbour(ctx context.Context, link string, a netip.Addr) (plan.MAC, error)
	// Underlay finds the link that has an address of the host's, and its MTU.
	Underlay(ctx context.Context, a netip.Addr) (link string, mtu int, err error)
	// Announce tells those behind links of a namespace, or with no name of the host's, which MAC addresses have
	// now.
	Announce(ctx context.Context, namespace string, entries []plan.Neighbour) error
	// Own reports whether an address is one of the host's own.
	Own(ctx context.Context, a netip.Addr) (bool, error)
	// Idle lists the links that were made for containers and are in the host's namespace: a container is
	// still to take them, or the engine has put them back.
	Idle(ctx context.Context) ([]string, error)
	// Warnings tells, for people, what on this host can keep networks from working.
	Warnings() []string
}

// Store keeps values by bucket and key over restarts.
type Store interface {
	// Apply makes all changes or none; when it returns nil they are on the disk.
	Apply(changes ...Change) error
	Load(bucket string, each func(key string, value []byte) error) error
	// Failed tells why no more changes can be applied, whatever becomes of the cause, and what to do; nil: they can.
	Failed() error
}

// Change sets one value of the store, or deletes it when Value is nil. It is an alias so that a
// store need not import this package.
type Change = struct {
	Bucket string
	Key    string
	Value  []byte
}

const (
	networkBucket  = "networks"
	endpointBucket = "endpoints"
)

// Service is the network driver. Its methods may be called side by side; calls on one network
// take turns.
type Service struct {
	kernel Kernel
	store  Store
	leases Leases
	peers  Peers
	log    *logrus.Entry
	former former // what addresses of overlays were

	// all is held for reading by every call and for writing by a repair, which needs the record
	// to stand still.
	all sync.RWMutex
	// wire is held while networks that share an external switch come or go.
	wire sync.Mutex

	index    sync.Mutex // guards what follows, and the endpoints of every network
	networks map[string]*network
	ports    map[portNumber][]holder // who publishes which host ports
	links    map[string]string       // endpoints by the name of their link, as endpointKey has them
	problem  error                   // why the kernel is not what the record wants
	synced   bool                    // it has been, since the start
	repairs  uint64

	astray chan struct{} // holds a token when Run is to repair at once
}

// New loads the record. The kernel is not touched before Run or the first call.
func New(kernel Kernel, store Store, leases Leases, peers Peers, log *logrus.Entry) (*Service, error) {
	s := &Service{kernel: kernel, store: store, leases: leases, peers: peers, log: log, networks: map[string]*network{}, ports: map[portNumber][]holder{}, links: map[string]string{}, problem: errors.New("not yet compared with the kernel"), astray: make(chan struct{}, 1)}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("reading the networks on record: %w", err)
	}
	peers.Restated()
	return s, nil
}

// CreateNetwork makes a network. The same request again is granted.
func (s *Service) CreateNetwork(ctx context.Context, req NetworkRequest) error {
	record, err := parseNetwork(req)
	if err != nil {
		return fmt.Errorf("create network %s: %w", brief(req.ID), err)
	}
	s.all.RLock()
	defer s.all.RUnlock()

	routes, err := s.kernel.Routes(ctx)
	if err != nil {
		return fmt.Errorf("create network %s: read the host's routes: %w", brief(req.ID), err)
	}
	defer s.lockWire(record)()
	if err := s.connect(ctx, &record); err != nil {
		return fmt.Errorf("create network %s: %w", brief(req.ID), err)
	}
	if err := s.leaseFrom(&record); err != nil {
		return fmt.Errorf("create network %s: %w", brief(req.ID), err)
	}
	if err := s.share(record); err != nil {
		return fmt.Errorf("create network %s: %w", brief(req.ID), err)
	}
	n := newNetwork(record)
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		exists, err := s.reserve(n, routes)
		if err != nil {
			return err
		}
		if !exists {
			break
		}
		// Another call may be just making it, and that may come to nothing.
		if made, err := s.lock(record.ID); err == nil {
			made.mu.Unlock()
			return nil
		}
	}
	if err := s.stand(ctx, n, nil); err != nil {
		s.forget(n)
		return fmt.Errorf("create network %s: prepare the host: %w", brief(req.ID), err)
	}
	record = n.record // with what reserve has chosen
	if err := s.change(ctx, n, s.shared(n), s.planNetwork(record), Change{networkBucket, record.ID, encode(record)}); err != nil {
		s.forget(n)
		return fmt.Errorf("create network %s: %w", brief(req.ID), err)
	}
	n.stored = true
	s.askGateways(ctx)
	s.log.WithField("network", brief(req.ID)).Infof("network created: mode %s, subnets %s", record.Options.Mode, pools(record))
	return nil
}

// DeleteNetwork removes a network and what is left on it. An unknown one is gone already.
func (s *Service) DeleteNetwork(ctx context.Context, id string) error {
	s.all.RLock()
	defer s.all.RUnlock()
	record, known := s.record(id)
	if !known {
		return nil
	}
	defer s.lockWire(record)()
	n, err := s.lock(id)
	if errors.Is(err, errUnknown) {
		return nil
	} else if err != nil {
		return fmt.Errorf("delete network %s: %w", brief(id), err)
	}
	defer n.mu.Unlock()

	changes := []Change{{Bucket: networkBucket, Key: id}}
	for _, e := range n.endpoints {
		changes = append(changes, endpointGone(e))
	}
	all := s.planNetwork(n.record).Merge(mode.Plan(n.record, n.list()))
	if err := s.change(ctx, n, all, s.shared(n), changes...); err != nil {
		return fmt.Errorf("delete network %s: %w", brief(id), err)
	}
	s.forget(n)
	s.log.WithField("network", brief(id)).Info("network deleted")
	return nil
}

// CreateEndpoint takes note of an endpoint. The same request again is granted. It is recorded when
// a container joins it: before, it wants nothing of the kernel, and an engine that finds it unknown
// after a crash makes it anew.
func (s *Service) CreateEndpoint(ctx context.Context, req EndpointRequest) (EndpointReply, error) {
	leased, err := s.lease(ctx, req)
	if err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s: %w", brief(req.ID), err)
	}
	s.all.RLock()
	defer s.all.RUnlock()
	n, err := s.lock(req.NetworkID)
	if err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s: %w", brief(req.ID), err)
	}
	defer n.mu.Unlock()

	s.evict(n, req)
	e, err := s.parseEndpoint(ctx, n, req, leased)
	if err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s on network %s: %w", brief(req.ID), n.name(), err)
	}
	if err := s.claimLink(e); err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s on network %s: %w", brief(req.ID), n.name(), err)
	}
	if err := s.replace(ctx, n, e); err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s on network %s: %w", brief(req.ID), n.name(), err)
	}
	if req.MAC != (plan.MAC{}) {
		return EndpointReply{}, nil
	}
	return EndpointReply{MAC: e.MAC}, nil
}

// claimLink refuses an endpoint whose link would have the name of another's: a name has room for the
// beginning of an ID only.
func (s *Service) claimLink(e mode.Endpoint) error {
	s.index.Lock()
	defer s.index.Unlock()
	if other, taken := s.links[e.Port()]; taken && other != endpointKey(e) {
		network, id, _ := strings.Cut(other, "/")
		return fmt.Errorf("its ID begins as that of endpoint %s on network %s does, which has the link %s: an engine makes IDs at random, so try again", id, brief(network), e.Port())
	}
	s.links[e.Port()] = endpointKey(e)
	return nil
}

// evict forgets endpoints without a container that stand in a new one's way. The engine has given
// their address, or MAC address, to somebody else: it does not know them any more.
func (s *Service) evict(n *network, req EndpointRequest) {
	for _, id := range []string{n.addresses[req.Address.Addr()], n.addresses[req.Address6.Addr()], n.stations[req.MAC]} {
		if e, ok := n.endpoints[id]; ok && e.ID != req.ID && !e.Joined {
			n.remove(s, e)
			s.log.WithField("endpoint", brief(e.ID)).Info("endpoint collected: its address was given to another")
		}
	}
}

// DeleteEndpoint removes an endpoint with its link and ports. An unknown one is gone already.
func (s *Service) DeleteEndpoint(ctx context.Context, networkID, id string) error {
	return s.drop(ctx, "delete endpoint", networkID, id, func(mode.Endpoint) (mode.Endpoint, bool) {
		return mode.Endpoint{}, false
	})
}

// Join makes the endpoint's links and names the one that the engine moves into the container.
func (s *Service) Join(ctx context.Context, networkID, id string) (JoinReply, error) {
	s.all.RLock()
	defer s.all.RUnlock()
	n, e, err := s.endpoint(networkID, id)
	if err != nil {
		return JoinReply{}, fmt.Errorf("join endpoint %s: %w", brief(id), err)
	}
	defer n.mu.Unlock()

	e.Joined = true
	if err := s.replace(ctx, n, e); err != nil {
		return JoinReply{}, fmt.Errorf("join endpoint %s to network %s: %w", brief(id), n.name(), err)
	}
	s.arrived(ctx, n.record, e)
	reply := JoinReply{SrcName: e.Peer(), DstPrefix: n.record.Options.IfacePrefix, DstName: e.IfName}
	reply.Routes = n.record.Routes(e)
	if n.record.Leads() {
		reply.Gateway = gateway(n.record.IPv4, e.Address)
		reply.Gateway6 = gateway(n.record.IPv6, e.Address6)
	}
	if n.record.Leased {
		reply.Gateway = e.Lease.Gateway
		reply.Routes = append(reply.Routes, leasedRoutes(e.Address, e.Lease)...)
	}
	if n.record.Leased6 {
		reply.Gateway6 = e.Lease6.Gateway
		reply.Routes = append(reply.Routes, leasedRoutes(e.Address6, e.Lease6)...)
	}
	return reply, nil
}

// Leave removes the endpoint's links and ports. An unknown endpoint has left already.
func (s *Service) Leave(ctx context.Context, networkID, id string) error {
	return s.drop(ctx, "leave endpoint", networkID, id, func(e mode.Endpoint) (mode.Endpoint, bool) {
		e.Joined, e.Bindings = false, nil
		return e, true
	})
}

// drop changes an endpoint to less than it was; what is not there needs no change.
func (s *Service) drop(ctx context.Context, what, networkID, id string, less func(mode.Endpoint) (mode.Endpoint, bool)) error {
	s.all.RLock()
	defer s.all.RUnlock()
	n, e, err := s.endpoint(networkID, id)
	if errors.Is(err, errUnknown) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s %s: %w", what, brief(id), err)
	}
	defer n.mu.Unlock()
	after, keep := less(e)
	if keep {
		err = s.replace(ctx, n, after)
	} else {
		err = s.change(ctx, n, mode.PlanEndpoint(n.record, e), nil, endpointGone(e))
		if err == nil {
			n.remove(s, e)
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s of network %s: %w", what, brief(id), n.name(), err)
	}
	return nil
}

func pools(n mode.Network) string {
	var out []string
	for _, s := range n.Subnets() {
		out = append(out, s.Pool.String())
	}
	return strings.Join(out, ", ")
}

// gateway is the gateway of the subnet that has the address.
func gateway(subnets []mode.Subnet, address netip.Prefix) netip.Addr {
	for _, s := range subnets {
		if address.IsValid() && s.Pool.Contains(address.Addr()) {
			return s.Gateway
		}
	}
	return netip.Addr{}
}

// brief is an ID as the engine shows it.
func brief(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
