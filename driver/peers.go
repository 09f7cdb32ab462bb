package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Peers are the other hosts of the cluster, and what they tell of their endpoints.
type Peers interface {
	// Self is the address that peers send to, invalid while it is not known, and the UDP port of VXLAN.
	// Without a cluster that is 0, and everything else here tells and does nothing.
	Self() (netip.Addr, uint16)
	// State tells the peers about endpoints of this host, Withdraw that they are gone. They return at
	// once.
	State(...mode.Statement)
	Withdraw(...mode.Statement)
	// Restated says that everything on record has been stated since the start.
	Restated()
	// Remotes lists the endpoints of other hosts in a VXLAN segment. Remote finds the one with an
	// address, OfMAC those with a MAC.
	Remotes(vsid uint32) []mode.Remote
	Remote(vsid uint32, a netip.Addr) (mode.Remote, bool)
	OfMAC(vsid uint32, mac plan.MAC) []mode.Remote
	// VTEPs lists the addresses of the other hosts that are not known to be dead.
	VTEPs() []netip.Addr
	// Synced reports whether this host knows what its peers know. Until then, what they do not tell
	// means nothing.
	Synced() bool
	// Warnings tell, for people, what is wrong in the cluster.
	Warnings() []string
	// Changed ticks when Take has something.
	Changed() <-chan struct{}
	Take() PeerChanges
}

// PeerChanges are what peers have told since the last time.
type PeerChanges struct {
	All       bool // hosts came or went, or so much has changed that it is easier to look at all
	Endpoints []EndpointChange
}

// EndpointChange is an endpoint of another host that came, went, or moved. The zero Remote is none.
type EndpointChange struct {
	VSID          uint32
	Before, After mode.Remote
}

// span finds out how an overlay network reaches the other hosts.
func (s *Service) span(ctx context.Context, record *mode.Network) error {
	local, port := s.peers.Self()
	if !local.IsValid() && port != 0 {
		return errors.New("this dockway is not in its cluster yet: try again; dockway status tells what it waits for")
	}
	if !local.IsValid() {
		return errors.New("mode overlay needs a cluster, and this dockway is in none: set JOIN to the addresses of its hosts (docker plugin disable dockway, docker plugin set dockway JOIN=…, docker plugin enable dockway)")
	}
	_, mtu, err := s.kernel.Underlay(ctx, local)
	if err != nil {
		return fmt.Errorf("the address that peers send to (ADVERTISE): %w", err)
	}
	record.Span(local, mtu, port)
	return mode.ValidateWire(*record)
}

// share has the address manager agree with other hosts on who gives which addresses, if it is the
// network's.
func (s *Service) share(record mode.Network) error {
	if !record.Overlay() {
		return nil
	}
	for _, subnet := range record.Subnets() {
		shared, err := s.leases.Share(subnet.Space, subnet.Pool)
		if err != nil {
			return fmt.Errorf("subnet %s: %w", subnet.Pool, err)
		}
		if !shared {
			s.log.WithField("network", brief(record.ID)).Warnf("the addresses of subnet %s come from an address manager that does not know what other hosts give: use --ipam-driver dockway:latest, or give each host an --ip-range of its own", subnet.Pool)
		}
	}
	return nil
}

// planPeers is what the host wants as one of the cluster.
func (s *Service) planPeers() plan.State {
	self, port := s.peers.Self()
	return mode.PlanPeers(self, port, s.peers.VTEPs())
}

// planNetwork is what a network wants but for its endpoints on this host.
func (s *Service) planNetwork(n mode.Network) plan.State {
	return mode.PlanNetwork(n).Merge(mode.PlanRemotes(n, s.remotes(n)))
}

// remotes are the endpoints of a network on other hosts.
func (s *Service) remotes(n mode.Network) []mode.Remote {
	var out []mode.Remote
	for _, vsid := range n.Options.VSIDs {
		out = append(out, s.peers.Remotes(vsid)...)
	}
	return out
}

// announce tells the peers what has become of an endpoint.
func (s *Service) announce(n mode.Network, before, after mode.Endpoint) {
	is := map[mode.Statement]bool{}
	for _, st := range n.Statements(after) {
		is[st] = true
	}
	var gone []mode.Statement
	for _, st := range n.Statements(before) {
		if !is[st] {
			gone = append(gone, st)
		}
	}
	for _, st := range gone {
		s.former.went(n.Namespace(), st.Address, st.MAC)
	}
	if len(gone) > 0 {
		s.peers.Withdraw(gone...)
	}
	if now := n.Statements(after); len(now) > 0 {
		s.peers.State(now...)
	}
}

// foreign reports why an endpoint cannot have an address or a MAC: one on another host has it.
func (s *Service) foreign(n mode.Network, e mode.Endpoint) error {
	for _, st := range n.Statements(asJoined(e)) {
		if r, taken := s.peers.Remote(st.VSID, st.Address); taken {
			return fmt.Errorf("address %s is taken by a container on host %s; if that has just been removed, try again in a moment", st.Address, r.Host)
		}
		for _, r := range s.peers.OfMAC(st.VSID, st.MAC) {
			return fmt.Errorf("MAC address %s is taken by a container on host %s: give another with --mac-address, or if that container has just been removed, try again in a moment", st.MAC, r.Host)
		}
	}
	return nil
}

func asJoined(e mode.Endpoint) mode.Endpoint {
	e.Joined = true
	return e
}

// hear follows what peers tell, until ctx ends.
func (s *Service) hear(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.peers.Changed():
			s.listen(ctx)
		}
	}
}

// listen converges the kernel to what peers have told. What cannot be done at once, a repair does.
func (s *Service) listen(ctx context.Context) {
	told := s.peers.Take()
	if told.All {
		s.nudge()
		return
	}
	if err := s.followPeers(ctx, told.Endpoints); err != nil && ctx.Err() == nil {
		s.outOfSync(err)
		s.nudge()
		s.log.WithError(err).Warn("what peers have told could not be programmed at once")
	}
}

// followPeers carries out changes of endpoints on other hosts.
func (s *Service) followPeers(ctx context.Context, changes []EndpointChange) error {
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	s.all.RLock()
	defer s.all.RUnlock()
	var networks []*network
	s.each(func(n *network) {
		if n.record.Overlay() {
			networks = append(networks, n)
		}
	})
	var problems []error
	for _, n := range networks {
		problems = append(problems, s.followOn(ctx, n, changes))
	}
	return errors.Join(problems...)
}

// followOn carries them out on one network.
func (s *Service) followOn(ctx context.Context, n *network, changes []EndpointChange) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.gone || !n.stored {
		return nil // its creation asks for what is known then
	}
	before, after := plan.State{}, plan.State{}
	for _, c := range changes {
		for _, r := range []mode.Remote{c.Before, c.After} {
			if !r.Address.IsValid() {
				continue
			}
			// What others want of the same MAC stays, and what was told meanwhile counts.
			before.Merge(mode.PlanRemotes(n.record, []mode.Remote{r}))
			after.Merge(mode.PlanRemotes(n.record, s.peers.OfMAC(c.VSID, r.MAC)))
			if now, ok := s.peers.Remote(c.VSID, r.Address); ok {
				after.Merge(mode.PlanRemotes(n.record, []mode.Remote{now}))
			}
		}
	}
	if !s.peers.Synced() { // only add
		for key := range before {
			if after[key] == nil {
				delete(before, key)
			}
		}
	}
	if len(before) == 0 && len(after) == 0 {
		return nil
	}
	return s.force(ctx, before, after)
}

// Overlays lists the overlay networks with all their addresses, those of this host first.
func (s *Service) Overlays() []OverlayInfo {
	type overlay struct {
		record    mode.Network
		endpoints []mode.Endpoint
	}
	var overlays []overlay
	s.each(func(n *network) {
		if n.record.Overlay() {
			overlays = append(overlays, overlay{n.record, n.list()})
		}
	})
	// Others can go on: there may be 100,000 addresses.
	out := []OverlayInfo{}
	self, _ := s.peers.Self()
	for _, o := range overlays {
		n := o.record
		info := OverlayInfo{ID: n.ID, Name: n.Options.Name, VSIDs: n.Options.VSIDs, Entries: []OverlayItem{}}
		slices.SortFunc(o.endpoints, func(a, b mode.Endpoint) int { return strings.Compare(a.ID, b.ID) })
		for _, e := range o.endpoints {
			for _, st := range n.Statements(e) {
				info.Entries = append(info.Entries, OverlayItem{VSID: st.VSID, Address: st.Address, MAC: st.MAC.String(), VTEP: self, Here: true})
			}
		}
		for _, r := range s.remotes(n) {
			info.Entries = append(info.Entries, OverlayItem{VSID: r.VSID, Address: r.Address, MAC: r.MAC.String(), Host: r.Host, VTEP: r.VTEP})
		}
		out = append(out, info)
	}
	return out
}
