package driver

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

const vsid = 5005 // of the network that webRequest(5) asks for

func remote(i int, host string) mode.Remote {
	return mode.Remote{
		VSID: vsid, Address: netip.MustParseAddr(fmt.Sprintf("198.18.5.%d", i)),
		MAC: plan.MAC{2, 0x42, 1, 0, 0, byte(i)}, VTEP: netip.MustParseAddr(host), Host: "host-" + host,
	}
}

// tellSomething has a peer tell of an endpoint that came, moved or went.
func tellSomething(t *rapid.T, p *fakePeers) {
	i := rapid.IntRange(100, 102).Draw(t, "remote")
	now := remote(i, rapid.SampledFrom([]string{"198.18.0.2", "198.18.0.3"}).Draw(t, "host"))
	before, _ := p.Remote(vsid, now.Address)
	if rapid.Bool().Draw(t, "gone") && before.Address.IsValid() {
		now = mode.Remote{}
	}
	p.tell(before, now)
}

func overlay(t *testing.T) (*Service, *fakeKernel, *fakeStore, *fakePeers) {
	k, st, peers := newFakeKernel(), newFakeStore(), newFakePeers()
	s := newPeer(t, k, st, peers)
	must(t, s.CreateNetwork(context.Background(), webRequest(5)))
	return s, k, st, peers
}

// entries are those of a remote endpoint in the kernel.
func entries(s *Service, r mode.Remote) []plan.Object {
	record, _ := s.record(networkID(5))
	return mode.PlanRemotes(record, []mode.Remote{r}).Sorted()
}

// TestPeersTell follows an endpoint of another host that comes, moves and goes.
func TestPeersTell(t *testing.T) {
	ctx := context.Background()
	s, k, _, peers := overlay(t)
	here, there := remote(100, "198.18.0.2"), remote(100, "198.18.0.3")
	there.MAC[5]++
	beside := remote(101, "198.18.0.2")
	beside.MAC = here.MAC // the other address of the same container
	for _, step := range []struct {
		what          string
		before, after mode.Remote
		holds, lacks  []mode.Remote
	}{
		{"it comes", mode.Remote{}, here, []mode.Remote{here}, nil},
		{"its other address comes", mode.Remote{}, beside, []mode.Remote{here, beside}, nil},
		{"its other address goes", beside, mode.Remote{}, []mode.Remote{here}, nil},
		{"the address moves", here, there, []mode.Remote{there}, nil},
		{"it goes", there, mode.Remote{}, nil, []mode.Remote{here, there, beside}},
	} {
		peers.tell(step.before, step.after)
		s.listen(ctx)
		for _, r := range step.holds {
			for _, o := range entries(s, r) {
				k.mu.Lock()
				if got := k.state[o.Key()]; got == nil || !o.Same(got) {
					t.Errorf("%s: the kernel holds %v, want %s", step.what, got, o)
				}
				k.mu.Unlock()
			}
		}
		for _, r := range step.lacks {
			for _, o := range entries(s, r) {
				k.holds(t, false, o)
			}
		}
		if ops := diff(k, s.wanted()); len(ops) > 0 {
			t.Errorf("%s: the kernel is not what is wanted: %v", step.what, ops)
		}
	}
}

// TestOnlyAddBeforeInSync starts among peers that are not known yet: what the kernel has of them stays
// until they are, and what nobody tells of goes then.
func TestOnlyAddBeforeInSync(t *testing.T) {
	ctx := context.Background()
	s, k, st, peers := overlay(t)
	old, fresh := remote(100, "198.18.0.2"), remote(101, "198.18.0.2")
	peers.tell(mode.Remote{}, old)
	s.listen(ctx)

	lost := newFakePeers()
	lost.unsynced = true
	s = newPeer(t, k, st, lost)
	lost.tell(mode.Remote{}, fresh)
	s.listen(ctx)
	lost.tell(old, mode.Remote{})
	s.listen(ctx)
	must(t, s.Repair(ctx))
	for _, o := range append(entries(s, old), entries(s, fresh)...) {
		k.holds(t, true, o)
	}
	for _, o := range mode.PlanPeers(netip.MustParseAddr("198.18.0.1"), 14789, peers.VTEPs()) { // else their frames are dropped
		k.holds(t, true, o)
	}
	lost.mu.Lock()
	lost.unsynced = false
	lost.mu.Unlock()
	must(t, s.Repair(ctx))
	for _, o := range entries(s, fresh) {
		k.holds(t, true, o)
	}
	for _, o := range mode.PlanRemotes(mustRecord(t, s), []mode.Remote{old}) {
		k.holds(t, false, o)
	}
}

func mustRecord(t *testing.T, s *Service) mode.Network {
	record, known := s.record(networkID(5))
	if !known {
		t.Fatal("the network is not on record")
	}
	return record
}

// TestPeersAreTold tells of endpoints while a container has them, and all again after a start.
func TestPeersAreTold(t *testing.T) {
	ctx := context.Background()
	s, k, st, peers := overlay(t)
	req := endpointRequest(5, 0)
	reply, err := s.CreateEndpoint(ctx, req)
	must(t, err)
	if len(peers.told) != 0 {
		t.Errorf("before a container joins: %v", peers.told)
	}
	want := map[mode.Statement]bool{{VSID: vsid, Address: req.Address.Addr(), MAC: reply.MAC}: true}
	_, err = s.Join(ctx, req.NetworkID, req.ID)
	must(t, err)
	if !maps.Equal(peers.told, want) {
		t.Errorf("after Join: %v, want %v", peers.told, want)
	}
	again := newFakePeers()
	s = newPeer(t, k, st, again)
	if !maps.Equal(again.told, want) || !again.restated {
		t.Errorf("after a start: %v, all of it: %v; want %v", again.told, again.restated, want)
	}
	must(t, s.Leave(ctx, req.NetworkID, req.ID))
	if len(again.told) != 0 {
		t.Errorf("after Leave: %v", again.told)
	}
	_, err = s.Join(ctx, req.NetworkID, req.ID)
	must(t, err)
	record := mustRecord(t, s)
	k.mu.Lock()
	delete(k.state, record.PortKey(mode.Endpoint{ID: req.ID}))
	k.mu.Unlock()
	must(t, s.Repair(ctx))
	if len(again.told) != 0 {
		t.Errorf("after the link vanished with its container: %v", again.told)
	}
}

// TestTakenElsewhere refuses what a container on another host has.
func TestTakenElsewhere(t *testing.T) {
	ctx := context.Background()
	s, _, _, peers := overlay(t)
	req := endpointRequest(5, 0)
	other := remote(100, "198.18.0.2")
	other.Address = req.Address.Addr()
	peers.tell(mode.Remote{}, other)
	if _, err := s.CreateEndpoint(ctx, req); err == nil || !strings.Contains(err.Error(), "is taken by a container on host host-198.18.0.2") {
		t.Errorf("its address: %v", err)
	}
	req = endpointRequest(5, 1)
	req.MAC = other.MAC
	if _, err := s.CreateEndpoint(ctx, req); err == nil || !strings.Contains(err.Error(), "MAC address "+other.MAC.String()+" is taken") {
		t.Errorf("its MAC: %v", err)
	}
}

// TestMACsAreRandom: in an overlay an address that comes again has another MAC.
func TestMACsAreRandom(t *testing.T) {
	ctx := context.Background()
	seen := map[plan.MAC]bool{}
	for range 3 {
		s, _, _, _ := overlay(t)
		reply, err := s.CreateEndpoint(ctx, endpointRequest(5, 0))
		must(t, err)
		if seen[reply.MAC] {
			t.Errorf("MAC %s has come twice for one address", reply.MAC)
		}
		seen[reply.MAC] = true
	}
}

// TestNamespaceGoesWhole: a network that goes takes its namespace, and nothing in it is deleted one by
// one.
func TestNamespaceGoesWhole(t *testing.T) {
	ctx := context.Background()
	s, k, _, peers := overlay(t)
	for i := range 100 {
		peers.tell(mode.Remote{}, remote(100+i, "198.18.0.2"))
	}
	s.listen(ctx)
	k.done = nil
	must(t, s.DeleteNetwork(ctx, networkID(5)))
	if len(k.done) > 3 {
		t.Errorf("deleting the network took %d operations: %v", len(k.done), k.done)
	}
	for key := range k.state {
		if key.Namespace != "" || key.Kind == plan.KindNamespace {
			t.Errorf("%s is left", key)
		}
	}
}

// TestOverlays of one host: the same subnet may be there twice, a VSID not.
func TestOverlays(t *testing.T) {
	ctx := context.Background()
	s, _, _, _ := overlay(t)
	same := webRequest(6)
	same.IPv4 = webRequest(5).IPv4
	must(t, s.CreateNetwork(ctx, same))
	twice := webRequest(6)
	twice.ID = networkID(7)
	if err := s.CreateNetwork(ctx, twice); err == nil || !strings.Contains(err.Error(), "VXLAN identifier 5006 is that of network") {
		t.Errorf("the same VSID: %v", err)
	}
	out := webRequest(6)
	for i, want := range []int{1, 2, 1} {
		out.ID, out.Options = networkID(20+i%2), map[string]string{"mode": "overlay", "vsid": fmt.Sprint(6000 + i%2), "outbound_nat": "true"}
		must(t, s.CreateNetwork(ctx, out))
		must(t, s.CreateNetwork(ctx, out)) // again
		if record, _ := s.record(out.ID); record.Transit != want {
			t.Errorf("network %d leads outside by pair %d, want %d", i, record.Transit, want)
		}
		if i == 1 {
			must(t, s.DeleteNetwork(ctx, networkID(20)))
		}
	}
}

// TestRunHears programs what peers tell without being asked.
func TestRunHears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k, st, peers := newFakeKernel(), newFakeStore(), newFakePeers()
		k.tick, peers.tick = make(chan struct{}, 1), make(chan struct{}, 1)
		s := newPeer(t, k, st, peers)
		must(t, s.CreateNetwork(ctx, webRequest(5)))
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		r := remote(100, "198.18.0.2")
		peers.tell(mode.Remote{}, r)
		peers.tick <- struct{}{}
		synctest.Wait()
		for _, o := range entries(s, r) {
			k.holds(t, true, o)
		}
		cancel()
		must(t, <-done)
	})
}

// TestAnnounces: an address that comes again with another MAC is announced, from whichever host to
// whichever, and nothing else is.
func TestAnnounces(t *testing.T) {
	ctx := context.Background()
	s, k, _, peers := overlay(t)
	said := func(what string, want ...plan.MAC) {
		t.Helper()
		var got []plan.MAC
		for _, n := range k.said {
			got = append(got, n.MAC)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: announced %v, want %v", what, got, want)
		}
		k.said = nil
	}
	tell := func(before, after mode.Remote) {
		peers.tell(before, after)
		s.listen(ctx)
	}
	here, there := remote(2, "198.18.0.2"), remote(2, "198.18.0.3")
	there.MAC[5]++
	tell(mode.Remote{}, here)
	said("it comes")
	tell(here, there)
	said("it moves", there.MAC)
	tell(there, mode.Remote{})
	tell(mode.Remote{}, there)
	said("it comes again as it was")
	tell(there, mode.Remote{})
	req := endpointRequest(5, 0) // 198.18.5.2, as above
	reply, err := s.CreateEndpoint(ctx, req)
	must(t, err)
	_, err = s.Join(ctx, req.NetworkID, req.ID)
	must(t, err)
	said("it comes to this host", reply.MAC)
	must(t, s.DeleteEndpoint(ctx, req.NetworkID, req.ID))
	tell(mode.Remote{}, here)
	said("it goes from this host", here.MAC)
}

// TestGuardWithoutOverlays: what guards the UDP port of VXLAN is there on every host of a cluster, before
// its first overlay network and after its last: a container of this host would pose as it to others.
func TestGuardWithoutOverlays(t *testing.T) {
	k, st, peers := newFakeKernel(), newFakeStore(), newFakePeers()
	s := newPeer(t, k, st, peers)
	check := func() {
		t.Helper()
		for _, o := range mode.PlanPeers(netip.MustParseAddr("198.18.0.1"), 14789, peers.VTEPs()) {
			k.holds(t, true, o)
		}
	}
	check()
	must(t, s.CreateNetwork(context.Background(), webRequest(5)))
	must(t, s.DeleteNetwork(context.Background(), networkID(5)))
	check()
}

// notYet are peers of a host that has no address yet.
type notYet struct{ *fakePeers }

func (notYet) Self() (netip.Addr, uint16) { return netip.Addr{}, 14789 }

// TestNotYetInTheCluster says so, and not that there is none.
func TestNotYetInTheCluster(t *testing.T) {
	s := newPeer(t, newFakeKernel(), newFakeStore(), notYet{newFakePeers()})
	if err := s.CreateNetwork(context.Background(), webRequest(5)); err == nil || !strings.Contains(err.Error(), "is not in its cluster yet: try again") {
		t.Error(err)
	}
}

// otherPort are peers that agreed on another UDP port.
type otherPort struct{ *fakePeers }

func (otherPort) Self() (netip.Addr, uint16) { return netip.MustParseAddr("198.18.0.1"), 24789 }

// TestGuardOutlivesPort: when the UDP port of VXLAN changes, the old one is guarded until no device has
// it, and the new one before one has.
func TestGuardOutlivesPort(t *testing.T) {
	_, k, st, _ := overlay(t)
	k.done = nil
	newPeer(t, k, st, otherPort{newFakePeers()})
	at := func(verb plan.Verb, text string) int {
		i := slices.IndexFunc(k.done, func(op plan.Op) bool { return op.Verb == verb && strings.Contains(op.Object.String(), text) })
		if i < 0 {
			t.Fatalf("no %s of %q in %v", verb, text, k.done)
		}
		return i
	}
	guarded, made, unguarded := at(plan.Add, "vxlan { 24789 }"), at(plan.Replace, "type vxlan id"), at(plan.Delete, "vxlan { 14789 }")
	if guarded > made || made > unguarded {
		t.Errorf("the new port is guarded at step %d, the device changed at %d, the old port let go at %d", guarded, made, unguarded)
	}
}
