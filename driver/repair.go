package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Time between two looks at the kernel when nothing has been reported, and before a failed repair
// is tried again.
const (
	lookAgain   = time.Minute
	idleLooks   = 5 // looks in which an endpoint without a container is kept: an engine needs seconds at most
	tryAgain    = 5 * time.Second
	settle      = 20 * time.Millisecond // changes come in groups: one repair for all of them
	repairLimit = 30 * time.Second
)

// Run compares the kernel with the record now and whenever something changed, and repairs what
// differs, until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	changed, err := s.kernel.Watch(ctx)
	if err != nil {
		return fmt.Errorf("watch the kernel: %w", err)
	}
	var hearing sync.WaitGroup
	hearing.Go(func() { s.hear(ctx) })
	defer hearing.Wait()
	idle := time.NewTicker(lookAgain)
	defer idle.Stop()
	for {
		wait := lookAgain
		if err := s.Repair(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.log.WithError(err).Error("the kernel does not hold what is on record; trying again")
			wait = tryAgain
		}
		if next, more := s.proclaim(ctx); more {
			wait = min(wait, time.Until(next))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-idle.C:
			s.collectIdle(ctx)
		case <-s.astray:
			gather(ctx)
		case <-changed:
			gather(ctx)
		}
	}
}

// gather waits for what comes together with a change.
func gather(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(settle):
	}
}

// nudge has Run repair at once: nothing would report what this process did, or learnt, itself.
func (s *Service) nudge() {
	select {
	case s.astray <- struct{}{}:
	default:
	}
}

// Repair makes everything with dockway's mark in the kernel what the record wants: after a start,
// after a reboot, after others changed it. Endpoints whose container is gone are collected. One
// network that cannot be repaired does not keep others from it.
func (s *Service) Repair(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	// Most looks find nothing to do, and calls need not wait for a look.
	s.all.RLock()
	work, err := s.compare(ctx)
	s.all.RUnlock()
	if err == nil && work.empty() {
		s.outOfSync(nil)
		return nil
	}
	s.all.Lock()
	defer s.all.Unlock()
	err = s.repair(ctx)
	s.outOfSync(err)
	return err
}

// work is what makes the kernel as wanted.
type work struct {
	gone  []mode.Endpoint // joined, but their link has vanished
	stale []plan.Op       // remove what nobody wants
	parts [][]plan.Op     // of the host and of each network
	moved []mode.Network  // whose uplink or gateway is another than it was
}

func (w work) empty() bool {
	return len(w.gone) == 0 && len(w.stale) == 0 && len(slices.Concat(w.parts...)) == 0 && len(w.moved) == 0
}

// compare finds what there is to do.
func (s *Service) compare(ctx context.Context) (work, error) {
	uplinks, err := s.kernel.Uplinks(ctx)
	if err != nil {
		return work{}, fmt.Errorf("read the host's default routes: %w", err)
	}
	var networks []mode.Network
	var endpoints [][]mode.Endpoint
	s.each(func(n *network) {
		networks = append(networks, n.record)
		endpoints = append(endpoints, n.list())
	})
	for i, n := range networks {
		networks[i] = s.refresh(ctx, n)
	}
	synced := s.peers.Synced()
	host := mode.Host(uplinks, networks...).Merge(s.planPeers())
	all := plan.State{}.Merge(host)
	remote := make([]plan.State, len(networks))
	for i, n := range networks {
		remote[i] = mode.PlanRemotes(n, s.remotes(n)) // all with dockway's mark, so observed in any case
		all.Merge(mode.Plan(n, endpoints[i]))
	}
	observed, err := s.kernel.ObserveAll(ctx, all.Keys())
	if err != nil {
		return work{}, fmt.Errorf("observe the kernel: %w", err)
	}
	w := work{moved: s.moved(networks)}
	wanted := []plan.State{host}
	all = plan.State{}.Merge(host)
	for i, n := range networks {
		var there []mode.Endpoint
		for _, e := range endpoints[i] {
			port := n.PortKey(e)
			if mode.PlanEndpoint(n, e)[port] != nil && observed[port] == nil {
				w.gone = append(w.gone, e)
			} else {
				there = append(there, e)
			}
		}
		state := mode.Plan(n, there).Merge(remote[i])
		all.Merge(state)
		for _, e := range there {
			// A link without an end in the host is in its container, or gone with it.
			delete(state, plan.Macvlan{Name: e.Peer()}.Key())
		}
		wanted = append(wanted, state)
	}
	stale := plan.State{}
	for k, o := range observed {
		if all[k] == nil && (synced || !mode.FromPeers(o)) { // until in sync, only add
			stale[k] = o
		}
	}
	w.stale = plan.Diff(stale, nil)
	// A guard that nobody wants any more may be wanted by what is still there, until it is made anew: VXLAN
	// devices of another UDP port.
	isGuard := func(op plan.Op) bool { return op.Object.Rank() == plan.RankGuard }
	guards := slices.DeleteFunc(slices.Clone(w.stale), func(op plan.Op) bool { return !isGuard(op) })
	w.stale = slices.DeleteFunc(w.stale, isGuard)
	for _, state := range wanted {
		part := plan.State{}
		for k := range state {
			if o, ok := observed[k]; ok {
				part[k] = o
			}
		}
		w.parts = append(w.parts, plan.Diff(part, state))
	}
	w.parts = append(w.parts, guards)
	return w, nil
}

func (s *Service) repair(ctx context.Context) error {
	w, err := s.compare(ctx)
	if err != nil {
		return err
	}
	s.follow(w.moved)
	problems := []error{s.collect(w.gone), s.settle(ctx, w.stale)}
	for _, ops := range w.parts {
		problems = append(problems, s.settle(ctx, ops))
	}
	s.askGateways(ctx)
	return errors.Join(problems...)
}

// settle carries out a part of a repair. A host port that somebody took meanwhile does not keep
// the rest from it: what comes from outside is still led to the container.
func (s *Service) settle(ctx context.Context, ops []plan.Op) error {
	if len(ops) == 0 {
		return nil
	}
	s.index.Lock()
	if s.synced { // what the first look finds, nobody took away
		s.repairs += uint64(len(ops))
	}
	s.index.Unlock()
	s.log.Infof("the kernel differs from the record in %d things, the first: %s", len(ops), ops[0])
	var problems []error
	for {
		err := s.do(ctx, ops)
		var inUse *plan.PortInUseError
		if !errors.As(err, &inUse) {
			return errors.Join(append(problems, err)...)
		}
		problems = append(problems, err)
		left := slices.DeleteFunc(slices.Clone(ops), func(op plan.Op) bool { return op.Object.Key() == inUse.Port.Key() })
		if len(left) == len(ops) {
			return errors.Join(problems...)
		}
		ops = left
	}
}

// collect forgets endpoints whose link has vanished with their container: the engine may have
// crashed and never say so, and what is gone is not made anew.
func (s *Service) collect(gone []mode.Endpoint) error {
	for _, e := range gone {
		if err := s.store.Apply(endpointGone(e)); err != nil {
			return fmt.Errorf("collect endpoint %s: %w", brief(e.ID), err)
		}
		s.networks[e.NetworkID].remove(s, e)
		s.log.WithField("endpoint", brief(e.ID)).Infof("endpoint collected: its link %s is gone, and its container with it", e.Port())
	}
	return nil
}

// collectIdle removes endpoints that have had no container for some looks. An engine that was killed, or
// that did not get its answer, never comes back to one that it has made. And one that cannot reach dockway
// removes a container all the same: it puts the container's end of the link back into the host, and does not
// say so later.
func (s *Service) collectIdle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	s.all.Lock()
	defer s.all.Unlock()
	links, err := s.kernel.Idle(ctx)
	if err != nil {
		s.log.WithError(err).Warn("cannot tell which endpoints have no container")
		return
	}
	for _, n := range s.networks {
		for _, e := range n.list() {
			if e.Joined && !slices.Contains(links, e.Peer()) {
				delete(n.idle, e.ID)
				continue
			}
			if n.idle[e.ID]++; n.idle[e.ID] < idleLooks {
				continue
			}
			log := s.log.WithField("endpoint", brief(e.ID))
			if e.Joined {
				if err := s.change(ctx, n, mode.PlanEndpoint(n.record, e), nil, endpointGone(e)); err != nil {
					log.WithError(err).Warn("endpoint without a container not collected")
					continue
				}
			}
			n.remove(s, e)
			log.Info("endpoint collected: it has no container")
		}
	}
}

func (s *Service) outOfSync(err error) {
	s.index.Lock()
	defer s.index.Unlock()
	s.problem = err
	s.synced = s.synced || err == nil
}

// Status tells how the service is.
func (s *Service) Status() Status {
	warnings := append(s.kernel.Warnings(), s.peers.Warnings()...)
	if err := s.store.Failed(); err != nil {
		warnings = append(warnings, err.Error())
	}
	s.index.Lock()
	defer s.index.Unlock()
	st := Status{Networks: len(s.networks), InSync: s.problem == nil, Repairs: s.repairs, Warnings: warnings}
	if s.problem != nil {
		st.Problem = s.problem.Error()
	}
	for _, n := range s.networks {
		st.Endpoints += len(n.endpoints)
		for _, e := range n.endpoints {
			st.Ports += len(e.Bindings)
		}
	}
	return st
}

// Networks lists the networks by name.
func (s *Service) Networks() []NetworkInfo {
	out := []NetworkInfo{}
	s.each(func(n *network) {
		info := NetworkInfo{ID: n.record.ID, Name: n.record.Options.Name, Mode: string(n.record.Options.Mode), Bridge: n.record.Bridge(), Endpoints: len(n.endpoints), Internal: n.record.Internal, MTU: n.record.MTU()}
		for _, subnet := range n.record.Subnets() {
			info.Subnets = append(info.Subnets, subnet.Pool.String())
			info.Spaces = append(info.Spaces, subnet.Space)
		}
		out = append(out, info)
	})
	return out
}

// Endpoints lists the endpoints by network.
func (s *Service) Endpoints() []EndpointInfo {
	out := []EndpointInfo{}
	problems := map[int]func() string{} // of leases; the address manager is not asked while anything is locked
	s.each(func(n *network) {
		record := n.record
		for _, e := range n.sorted() {
			info := EndpointInfo{ID: e.ID, Network: e.NetworkID, MAC: e.MAC.String(), Link: e.Port(), State: "created"}
			if e.Joined {
				info.State = "joined"
			}
			if n.record.Leased {
				info.Lease = &e.Lease
			}
			if n.record.Leased6 {
				info.Lease6 = &e.Lease6
			}
			if n.record.Leased || n.record.Leased6 {
				problems[len(out)] = func() string { return s.leaseProblem(record, e) }
			}
			if e.Address.IsValid() {
				info.Address = e.Address.String()
			}
			if e.Address6.IsValid() {
				info.Address6 = e.Address6.String()
			}
			out = append(out, info)
		}
	})
	for i, problem := range problems {
		out[i].LeaseProblem = problem()
	}
	return out
}

// Ports lists the published ports by network and endpoint.
func (s *Service) Ports() []PortInfo {
	out := []PortInfo{}
	s.each(func(n *network) {
		for _, e := range n.sorted() {
			for _, b := range e.Bindings {
				out = append(out, PortInfo{Network: e.NetworkID, Endpoint: e.ID, Protocol: b.Protocol, HostIP: b.Host.Addr().String(), HostPort: b.Host.Port(), ContainerIP: b.Container.Addr().String(), ContainerPort: b.Container.Port()})
			}
		}
	})
	return out
}

// each shows the networks, by ID, while nothing changes them.
func (s *Service) each(show func(*network)) {
	s.index.Lock()
	defer s.index.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		show(s.networks[id])
	}
}

func (n *network) sorted() []mode.Endpoint {
	var out []mode.Endpoint
	for _, id := range slices.Sorted(maps.Keys(n.endpoints)) {
		out = append(out, n.endpoints[id])
	}
	return out
}
