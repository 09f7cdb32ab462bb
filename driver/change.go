package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// replace changes an endpoint's record and converges the kernel to it. On failure both are as
// they were.
func (s *Service) replace(ctx context.Context, n *network, e mode.Endpoint) error {
	old := n.endpoints[e.ID]
	var changes []Change
	switch {
	case e.Joined:
		changes = append(changes, Change{endpointBucket, endpointKey(e), encode(e)})
	case old.Joined:
		changes = append(changes, endpointGone(e))
	}
	if err := s.change(ctx, n, mode.PlanEndpoint(n.record, old), mode.PlanEndpoint(n.record, e), changes...); err != nil {
		return err
	}
	n.put(s, e)
	return nil
}

// change is the one way in which anything changes: record and converge, and when that fails record
// and converge back. The caller holds n.mu and updates the memory of n when change returns nil.
func (s *Service) change(ctx context.Context, n *network, before, after plan.State, changes ...Change) error {
	// The disk keeps the call waiting: the kernel is looked at meanwhile. What comes for an endpoint is
	// made meanwhile, too: not on record, it is nobody's, and the next start removes it. What goes, goes
	// off the record first, and that of a network is a journal.
	var recorded error
	var disk sync.WaitGroup
	if len(changes) > 0 {
		disk.Go(func() { recorded = s.store.Apply(changes...) })
	}
	ops, err := s.look(ctx, before, after)
	if slices.ContainsFunc(changes, func(c Change) bool { return c.Bucket != endpointBucket || c.Value == nil }) {
		if disk.Wait(); recorded != nil {
			return recorded
		}
	}
	if err == nil {
		err = s.do(ctx, ops)
	}
	var inUse *plan.PortInUseError
	if err != nil && !errors.As(err, &inUse) && ctx.Err() == nil && s.stand(ctx, n, after) == nil {
		err = s.converge(ctx, before, after)
	}
	disk.Wait()
	if err == nil && recorded == nil {
		return nil
	}
	// The caller's context may be what failed: the way back must not depend on it.
	ctx = context.WithoutCancel(ctx)
	if recorded != nil {
		err = recorded
	} else if undoErr := s.store.Apply(n.before(changes)...); undoErr != nil {
		err = errors.Join(err, fmt.Errorf("take the record back: %w", undoErr))
	}
	if undoErr := s.converge(ctx, after, before); undoErr != nil {
		s.outOfSync(undoErr)
		s.nudge()
		s.log.WithError(undoErr).Warn("a failed change could not be taken back at once")
	}
	return err
}

// converge makes the kernel hold what is in wanted of the keys in either state.
func (s *Service) converge(ctx context.Context, before, wanted plan.State) error {
	ops, err := s.look(ctx, before, wanted)
	if err != nil {
		return err
	}
	return s.do(ctx, ops)
}

// force converges what is in either state, also what does not differ in them: before is only what
// may be there.
func (s *Service) force(ctx context.Context, before, wanted plan.State) error {
	observed, err := s.kernel.Observe(ctx, (plan.State{}).Merge(before, wanted).Keys())
	if err != nil {
		return err
	}
	return s.do(ctx, plan.Diff(observed, wanted))
}

// look finds what has to be done to converge. It looks at what differs in the two states; when
// nothing does, the call is a repeated one, and it looks at all.
func (s *Service) look(ctx context.Context, before, wanted plan.State) ([]plan.Op, error) {
	differ := plan.State{}
	for key, o := range (plan.State{}).Merge(before, wanted) {
		if before[key] == nil || wanted[key] == nil || !wanted[key].Same(before[key]) {
			differ[key] = o
		}
	}
	if len(differ) == 0 {
		differ = wanted
	}
	if len(differ) == 0 {
		return nil, nil
	}
	keys := differ.Keys()
	wanted = maps.Clone(wanted)
	maps.DeleteFunc(wanted, func(key plan.Key, _ plan.Object) bool { return differ[key] == nil })
	observed, err := s.kernel.Observe(ctx, keys)
	if err != nil {
		return nil, err
	}
	return plan.Diff(observed, wanted), nil
}

// stand puts in place what everything on the network stands on: before it is made, and again in
// case somebody took it away just now and the repair has not come yet.
func (s *Service) stand(ctx context.Context, n *network, wanted plan.State) error {
	uplinks, err := s.kernel.Uplinks(ctx)
	if err != nil {
		return err
	}
	base := mode.Host(uplinks, n.record).Merge(s.planPeers())
	if len(wanted) > 0 {
		base.Merge(s.planNetwork(n.record))
	}
	return s.converge(ctx, nil, base)
}
