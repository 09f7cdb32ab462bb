package driver

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// TestEveryOperationFails makes each kernel operation of random histories fail in turn, and the
// disk refuse at random: a call that fails changes nothing that a repair does not take back, and
// one that succeeds is complete.
func TestEveryOperationFails(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
		peers := newFakePeers()
		s := newPeer(t, k, st, peers)
		for range rapid.IntRange(1, 25).Draw(t, "calls") {
			net, ep := rapid.IntRange(1, 6).Draw(t, "network"), rapid.IntRange(0, 2).Draw(t, "endpoint")
			req := endpointRequest(net, ep)
			if rapid.IntRange(0, 3).Draw(t, "a peer") == 0 {
				tellSomething(t, peers)
			}
			before := s.wanted().String()
			k.failIn = rapid.IntRange(0, 12).Draw(t, "fail in")
			st.full = rapid.IntRange(0, 7).Draw(t, "disk") == 0
			var err error
			what := rapid.SampledFrom([]string{"create network", "delete network", "create endpoint", "join", "publish", "unpublish", "leave", "delete endpoint", "listen"}).Draw(t, "call")
			switch what {
			case "listen":
				s.listen(ctx)
				err = errors.Join(s.problem)
			case "create network":
				err = s.CreateNetwork(ctx, webRequest(net))
			case "delete network":
				err = s.DeleteNetwork(ctx, req.NetworkID)
			case "create endpoint":
				_, err = s.CreateEndpoint(ctx, req)
			case "join":
				_, err = s.Join(ctx, req.NetworkID, req.ID)
			case "publish":
				err = s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(uint16(8000+ep), 80), {Protocol: policy.UDP, ContainerPort: 53}})
			case "unpublish":
				err = s.Unpublish(ctx, req.NetworkID, req.ID)
			case "leave":
				err = s.Leave(ctx, req.NetworkID, req.ID)
			case "delete endpoint":
				err = s.DeleteEndpoint(ctx, req.NetworkID, req.ID)
			}
			k.failIn, st.full = 0, false
			if err != nil && s.wanted().String() != before {
				t.Fatalf("%s failed (%v) and yet changed the record", what, err)
			}
			if err == nil && len(peers.changes.Endpoints) == 0 {
				agree(t, what, s, k, st)
			}
			if err := s.Repair(ctx); err != nil {
				t.Fatalf("repair after %s: %v", what, err)
			}
			agree(t, what+" and a repair", s, k, st)
		}
	})
}

// mortal is a process that is killed after some steps, which are operations of the kernel and
// transactions of the disk. It checks before each operation that it is on record.
type mortal struct {
	*fakeKernel
	*fakeStore
	t    *rapid.T
	mu   sync.Mutex
	left int
	// ahead is set while an endpoint joins or publishes: what comes for it may be on its way to the record.
	ahead bool
}

func (m *mortal) step() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left--; m.left < 0 {
		return errors.New("killed")
	}
	return nil
}

func (m *mortal) Do(ctx context.Context, ops []plan.Op) error {
	record, err := New(m.fakeKernel, m.fakeStore, noLeases{}, newFakePeers(), quiet())
	if err != nil {
		m.t.Fatal(err)
	}
	wanted := record.wanted()
	for _, op := range ops {
		if err := m.step(); err != nil {
			return err
		}
		_, recorded := wanted[op.Object.Key()]
		if recorded != (op.Verb != plan.Delete) && !(m.ahead && op.Verb != plan.Delete) {
			m.t.Fatalf("%s, and the record wants it: %v", op, recorded)
		}
		if err := m.fakeKernel.Do(ctx, []plan.Op{op}); err != nil {
			return err
		}
	}
	return nil
}

func (m *mortal) Apply(changes ...Change) error {
	if err := m.step(); err != nil {
		return err
	}
	return m.fakeStore.Apply(changes...)
}

// TestKilled kills the process after any number of steps of random histories, in which operations of
// the kernel fail too, so that it may be killed on the way back: nothing is ever done
// that is not on record, but for what comes for an endpoint meanwhile, and the next process comes to terms
// with what it finds.
func TestKilled(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
		newService(t, k, st)
		m := &mortal{fakeKernel: k, fakeStore: st, t: t}
		for range 5 {
			m.left = 1000
			s := newService(t, m, m)
			m.left = rapid.IntRange(0, 60).Draw(t, "steps")
			for m.left >= 0 {
				net, ep := rapid.SampledFrom([]int{1, 2, 5}).Draw(t, "network"), rapid.IntRange(0, 2).Draw(t, "endpoint")
				req := endpointRequest(net, ep)
				what := rapid.SampledFrom([]string{"create network", "delete network", "start", "publish", "leave", "delete endpoint"}).Draw(t, "call")
				m.left-- // calls for which nothing is to be done end too
				k.failIn = rapid.IntRange(0, 12).Draw(t, "fail in")
				m.ahead = what == "start" || what == "publish"
				switch what {
				case "create network":
					_ = s.CreateNetwork(ctx, webRequest(net))
				case "delete network":
					_ = s.DeleteNetwork(ctx, req.NetworkID)
				case "start":
					_, _ = s.CreateEndpoint(ctx, req)
					_, _ = s.Join(ctx, req.NetworkID, req.ID)
				case "publish":
					_ = s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(uint16(8000+ep), 80)})
				case "leave":
					_ = s.Leave(ctx, req.NetworkID, req.ID)
				case "delete endpoint":
					_ = s.DeleteEndpoint(ctx, req.NetworkID, req.ID)
				}
			}
			maps.DeleteFunc(k.state, func(key plan.Key, _ plan.Object) bool { return key.Kind == plan.KindHostPort }) // sockets go with their process
			m.left, m.ahead, k.failIn = 1000, false, 0
			agree(t, "a kill", newService(t, m, m), k, st)
		}
	})
}

// halfKernel does half of what it is told, and fails, for as long as it is broken.
type halfKernel struct {
	*fakeKernel
	broken atomic.Bool
}

func (k *halfKernel) Do(ctx context.Context, ops []plan.Op) error {
	if !k.broken.Load() {
		return k.fakeKernel.Do(ctx, ops)
	}
	if err := k.fakeKernel.Do(ctx, ops[:len(ops)/2]); err != nil {
		return err
	}
	return errInjected
}

// TestHalfTakenBack has a change fail and its way back too: what is left of it is repaired as soon as
// the kernel takes it, though nothing reports it.
func TestHalfTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		k, st := &halfKernel{fakeKernel: newFakeKernel()}, newFakeStore()
		s := newService(t, k, st)
		must(t, s.CreateNetwork(ctx, webRequest(1)))
		join(t, s, 1)
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		k.broken.Store(true)
		if err := s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(8080, 80)}); !errors.Is(err, errInjected) {
			t.Errorf("publish: %v", err)
		}
		if ops := diff(k.fakeKernel, s.wanted()); len(ops) == 0 {
			t.Fatal("the change was taken back, or never began")
		}
		k.broken.Store(false)
		time.Sleep(2 * tryAgain) // virtual
		synctest.Wait()
		agree(t, "a while", s, k.fakeKernel, st)
		if status := s.Status(); !status.InSync {
			t.Errorf("status: %+v", status)
		}
		cancel()
		must(t, <-done)
	})
}
