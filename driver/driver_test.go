package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// TestLife takes one container from `docker network create` to `docker network rm` and compares
// the kernel with what the record wants after each call.
func TestLife(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	empty := maps.Clone(k.state)
	req := endpointRequest(1, 0)
	steps := []struct {
		what string
		do   func() error
	}{
		{"create network", func() error { return s.CreateNetwork(ctx, webRequest(1)) }},
		{"create it again", func() error { return s.CreateNetwork(ctx, webRequest(1)) }},
		{"create endpoint", func() error { _, err := s.CreateEndpoint(ctx, req); return err }},
		{"create it again", func() error { _, err := s.CreateEndpoint(ctx, req); return err }},
		{"join", func() error { _, err := s.Join(ctx, req.NetworkID, req.ID); return err }},
		{"join again", func() error { _, err := s.Join(ctx, req.NetworkID, req.ID); return err }},
		{"publish", func() error {
			return s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(8080, 80), {Protocol: policy.UDP, ContainerPort: 53}})
		}},
		{"publish less", func() error { return s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(8080, 80)}) }},
		{"unpublish", func() error { return s.Unpublish(ctx, req.NetworkID, req.ID) }},
		{"leave", func() error { return s.Leave(ctx, req.NetworkID, req.ID) }},
		{"leave again", func() error { return s.Leave(ctx, req.NetworkID, req.ID) }},
		{"delete endpoint", func() error { return s.DeleteEndpoint(ctx, req.NetworkID, req.ID) }},
		{"delete it again", func() error { return s.DeleteEndpoint(ctx, req.NetworkID, req.ID) }},
		{"delete network", func() error { return s.DeleteNetwork(ctx, req.NetworkID) }},
		{"delete it again", func() error { return s.DeleteNetwork(ctx, req.NetworkID) }},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		agree(t, step.what, s, k, st)
	}
	maps.DeleteFunc(k.state, func(key plan.Key, _ plan.Object) bool { return key.Kind == plan.KindSysctl })
	if got := k.state.String(); got != empty.String() {
		t.Errorf("left in the kernel:\n%s\nwant:\n%s", got, empty)
	}
	if len(st.values) != 0 || len(s.ports) != 0 {
		t.Errorf("left on record: %v, ports %v", st.values, s.ports)
	}
}

// agree fails unless memory, disk and kernel tell the same.
func agree(t interface {
	Helper()
	Fatalf(string, ...any)
}, what string, s *Service, k *fakeKernel, st *fakeStore) {

	t.Helper()
	if ops := diff(k, s.wanted()); len(ops) > 0 {
		t.Fatalf("after %s the kernel is not what is wanted: %v", what, ops)
	}
	reloaded, err := New(k, st, noLeases{}, newFakePeersLike(s.peers), quiet())
	if err != nil {
		t.Fatalf("after %s: %v", what, err)
	}
	if got, want := reloaded.wanted().String(), s.wanted().String(); got != want {
		t.Fatalf("after %s a restart would want\n%s\nbut memory wants\n%s", what, got, want)
	}
	if fmt.Sprint(reloaded.Ports()) != fmt.Sprint(s.Ports()) || fmt.Sprint(reloaded.Endpoints()) != fmt.Sprint(joined(s.Endpoints())) || fmt.Sprint(uncounted(reloaded.Networks())) != fmt.Sprint(uncounted(s.Networks())) {
		t.Fatalf("after %s a restart would list other things", what)
	}
	if len(reloaded.ports) != len(s.ports) {
		t.Fatalf("after %s a restart would know %d host ports, memory knows %d", what, len(reloaded.ports), len(s.ports))
	}
}

// joined are the endpoints that are on record.
func joined(all []EndpointInfo) []EndpointInfo {
	return slices.DeleteFunc(all, func(e EndpointInfo) bool { return e.State != "joined" })
}

// uncounted leaves out how many endpoints networks have, recorded or not.
func uncounted(all []NetworkInfo) []NetworkInfo {
	for i := range all {
		all[i].Endpoints = 0
	}
	return all
}

func diff(k *fakeKernel, wanted plan.State) []plan.Op {
	k.mu.Lock()
	defer k.mu.Unlock()
	return plan.Diff(k.state, wanted)
}

// TestRestart starts a second service on the first one's record: after a crash the kernel is as
// it was, after a reboot it is empty.
func TestRestart(t *testing.T) {
	for _, reboot := range []bool{false, true} {
		t.Run(fmt.Sprintf("reboot=%v", reboot), func(t *testing.T) {
			ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
			s := newService(t, k, st)
			must(t, s.CreateNetwork(ctx, webRequest(1)))
			join(t, s, 1)
			must(t, s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(8080, 80)}))
			before := s.Ports()
			if reboot {
				k.state = plan.State{}
			}
			k.done = nil
			again := newService(t, k, st)
			if !reboot {
				if len(k.done) > 0 {
					t.Errorf("a restart touched the kernel: %v", k.done)
				}
				if got := again.Ports(); fmt.Sprint(got) != fmt.Sprint(before) {
					t.Errorf("ports %v, want %v", got, before)
				}
				return
			}
			k.holds(t, true, plan.Bridge{Name: mode.Network{ID: networkID(1)}.Bridge()})
			if n := len(again.Endpoints()); n != 0 {
				t.Errorf("%d endpoints are on record whose containers are gone", n)
			}
			agree(t, "reboot", again, k, st)
		})
	}
}

// TestRecordFailed: the status says that the record takes no more changes.
func TestRecordFailed(t *testing.T) {
	st := newFakeStore()
	s := newService(t, newFakeKernel(), st)
	if got := s.Status().Warnings; len(got) > 0 {
		t.Errorf("warnings before there is trouble: %v", got)
	}
	st.failed = errors.New("restart dockway: input/output error")
	if got := s.Status().Warnings; len(got) != 1 || got[0] != st.failed.Error() {
		t.Errorf("warnings %v", got)
	}
}

// TestOrder checks the order of a change: guards first, openings last, and
// the other way round when it goes.
func TestOrder(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(1)))
	k.done = nil
	join(t, s, 1)
	must(t, s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(8080, 80)}))
	ranks := func(ops []plan.Op) (out []plan.Rank) {
		for _, op := range ops {
			out = append(out, op.Object.Rank())
		}
		return out
	}
	up := ranks(k.done)
	if up[0] != plan.RankGuard || up[len(up)-1] != plan.RankOpen {
		t.Errorf("a container comes in the order %v, want guards first and openings last", up)
	}
	k.done = nil
	must(t, s.Leave(ctx, networkID(1), endpointID(100)))
	down := ranks(k.done)
	for i := 1; i < len(down); i++ {
		if down[i] > down[i-1] {
			t.Errorf("a container goes in the order %v, want openings first and guards last", down)
		}
	}
}

// meetingKernel holds up the first call that looks at the kernel until another has come.
type meetingKernel struct {
	*fakeKernel
	once          sync.Once
	looking, come chan struct{}
}

func (k *meetingKernel) Observe(ctx context.Context, keys []plan.Key) (plan.State, error) {
	k.once.Do(func() { close(k.looking); <-k.come })
	return k.fakeKernel.Observe(ctx, keys)
}

// TestCreateAtOnce: who asks for a network that another call is just making is not granted it before it is
// there, for it may come to nothing.
func TestCreateAtOnce(t *testing.T) {
	for range 20 {
		ctx, k, st := context.Background(), &meetingKernel{fakeKernel: newFakeKernel(), looking: make(chan struct{}), come: make(chan struct{})}, newFakeStore()
		s := newService(t, k.fakeKernel, st)
		s.kernel, st.full = k, true
		first := make(chan error)
		go func() { first <- s.CreateNetwork(ctx, webRequest(1)) }()
		<-k.looking
		second := make(chan error)
		go func() { close(k.come); second <- s.CreateNetwork(ctx, webRequest(1)) }()
		if err := <-second; err == nil {
			t.Fatal("a network is granted that the disk has no room for")
		}
		if err := <-first; err == nil {
			t.Fatal("a network is made that the disk has no room for")
		}
		agree(t, "two calls for one network", s, k.fakeKernel, st)
	}
}

func TestCreateNetworkRefuses(t *testing.T) {
	host := []plan.HostRoute{
		{Prefix: netip.MustParsePrefix("198.18.50.0/23"), Link: "eth0", OnLink: true},
		{Prefix: netip.MustParsePrefix("198.18.60.128/25"), Link: "tun0"},
		{Prefix: netip.MustParsePrefix("198.18.0.0/15"), Link: "eth0"},
	}
	tests := []struct {
		name string
		req  NetworkRequest
		want string
	}{
		{"overlaps a network", NetworkRequest{ID: networkID(9), IPv4: webRequest(1).IPv4}, "subnet 198.18.1.0/24 overlaps 198.18.1.0/24 of network"},
		{"overlaps the LAN", webRequest(50), "overlaps the host's route to 198.18.50.0/23 on eth0"},
		{"hides a routed part", webRequest(60), "overlaps the host's route to 198.18.60.128/25 on tun0"},
		{"inside a wide route", webRequest(70), ""},
		{"its link's name is taken", NetworkRequest{ID: networkID(1)[:12] + "f", IPv4: webRequest(2).IPv4}, "its ID begins as that of network " + networkID(1)},
		{"same ID, other subnet", NetworkRequest{ID: networkID(1), IPv4: webRequest(2).IPv4}, "exists with other settings"},
		{"misspelled option", NetworkRequest{ID: networkID(9), Options: map[string]string{"mtuu": "1"}, IPv4: webRequest(9).IPv4}, `option "mtuu" is not known: did you mean "mtu"?`},
		{"bad value", NetworkRequest{ID: networkID(9), Options: map[string]string{"mtu": "tiny"}, IPv4: webRequest(9).IPv4}, `option mtu="tiny": not a number of bytes from 68 to 65535`},
		{"no subnet", NetworkRequest{ID: networkID(9)}, "neither an IPv4 nor an IPv6 subnet"},
		{"ID is no ID", NetworkRequest{ID: "../../etc"}, "is not one of an engine"},
		{"other mode", NetworkRequest{ID: networkID(9), Options: map[string]string{"mode": "overlay"}, IPv4: webRequest(9).IPv4}, "-o vsid=5001"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, st := newFakeKernel(), newFakeStore()
			s := newService(t, k, st)
			must(t, s.CreateNetwork(context.Background(), webRequest(1)))
			k.routes = host
			err := s.CreateNetwork(context.Background(), tt.req)
			if got := fmt.Sprint(err); (tt.want == "") != (err == nil) || !strings.Contains(got, tt.want) {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			agree(t, tt.name, s, k, st)
		})
	}
}

func TestCreateEndpointRefuses(t *testing.T) {
	change := func(f func(*EndpointRequest)) EndpointRequest {
		r := endpointRequest(1, 5)
		f(&r)
		return r
	}
	tests := []struct {
		name string
		req  EndpointRequest
		want string
	}{
		{"unknown network", endpointRequest(3, 0), "not known to dockway"},
		{"address taken", change(func(r *EndpointRequest) { r.Address = netip.MustParsePrefix("198.18.1.2/24") }), "address 198.18.1.2 is taken by endpoint"},
		{"gateway's address", change(func(r *EndpointRequest) { r.Address = netip.MustParsePrefix("198.18.1.1/24") }), "is the network's gateway"},
		{"foreign address", change(func(r *EndpointRequest) { r.Address = netip.MustParsePrefix("198.18.9.2/24") }), "in no subnet of the network"},
		{"multicast MAC", change(func(r *EndpointRequest) { r.MAC = plan.MAC{1} }), "multicast"},
		{"MAC taken", change(func(r *EndpointRequest) { r.MAC = plan.MAC{2, 2, 2, 2, 2, 2} }), "MAC address 02:02:02:02:02:02 is taken"},
		{"option", change(func(r *EndpointRequest) { r.Options = map[string]string{"qoss": "1"} }), `"qoss" is not known`},
		{"link's name", change(func(r *EndpointRequest) {
			r.Options = map[string]string{"com.docker.network.endpoint.ifname": "sixteen-letters-"}
		}), "up to 15 letters"},
		{"no address", change(func(r *EndpointRequest) { r.Address = netip.Prefix{} }), "no address"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, st := newFakeKernel(), newFakeStore()
			s := newService(t, k, st)
			must(t, s.CreateNetwork(context.Background(), webRequest(1)))
			first := endpointRequest(1, 0)
			first.MAC = plan.MAC{2, 2, 2, 2, 2, 2}
			_, err := s.CreateEndpoint(context.Background(), first)
			must(t, err)
			_, err = s.Join(context.Background(), first.NetworkID, first.ID)
			must(t, err)
			_, err = s.CreateEndpoint(context.Background(), tt.req)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			agree(t, tt.name, s, k, st)
		})
	}
}

// TestSixtyFourAtOnce makes calls on the same and on different networks and endpoints at once.
func TestSixtyFourAtOnce(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			net, ep := 1+i%6, i%8
			req := endpointRequest(net, ep)
			_ = s.CreateNetwork(ctx, webRequest(net))
			_, _ = s.CreateEndpoint(ctx, req)
			_, _ = s.Join(ctx, req.NetworkID, req.ID)
			_ = s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(uint16(8000+ep), 80)})
			_, _, _, _ = s.Status(), s.Networks(), s.Endpoints(), s.Ports()
			switch i % 3 {
			case 0:
				_ = s.Leave(ctx, req.NetworkID, req.ID)
			case 1:
				_ = s.DeleteEndpoint(ctx, req.NetworkID, req.ID)
			}
			if i%16 == 15 {
				_ = s.DeleteNetwork(ctx, req.NetworkID)
			}
			_ = s.Repair(ctx)
		})
	}
	wg.Wait()
	must(t, s.Repair(ctx))
	agree(t, "64 calls at once", s, k, st)
}

// TestRun repairs what somebody else took away, without being asked.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k, st := newFakeKernel(), newFakeStore()
		k.tick = make(chan struct{}, 1)
		s := newService(t, k, st)
		must(t, s.CreateNetwork(ctx, webRequest(1)))
		join(t, s, 1)
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		before := s.Status().Repairs
		k.mu.Lock()
		for key, o := range k.state {
			if o.Key().Kind == plan.KindElement || o.Key().Kind == plan.KindTable {
				delete(k.state, key)
			}
		}
		k.mu.Unlock()
		k.tick <- struct{}{}
		synctest.Wait()
		time.Sleep(2 * settle) // virtual
		synctest.Wait()
		agree(t, "a flush", s, k, st)
		if before != 0 || s.Status().Repairs == 0 || !s.Status().InSync {
			t.Errorf("status %+v, want repairs counted since the start, and in sync; before it was %d", s.Status(), before)
		}
		cancel()
		must(t, <-done)
	})
}

// TestForgottenEndpoints: an endpoint that the engine never came back to, because it or the answer
// was lost, neither keeps its address from others nor stays for ever.
func TestForgottenEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k, st := newFakeKernel(), newFakeStore()
		k.tick = make(chan struct{}, 1)
		s := newService(t, k, st)
		must(t, s.CreateNetwork(ctx, webRequest(1)))
		join(t, s, 1)
		for i := 1; i <= 2; i++ {
			_, err := s.CreateEndpoint(ctx, endpointRequest(1, i))
			must(t, err)
		}
		other := endpointRequest(1, 7)
		other.Address = endpointRequest(1, 1).Address
		_, err := s.CreateEndpoint(ctx, other)
		must(t, err)
		agree(t, "an address given again", s, k, st)
		_, err = s.Join(ctx, other.NetworkID, other.ID)
		must(t, err)
		if n := len(s.Endpoints()); n != 3 {
			t.Errorf("%d endpoints are on record, want 3: two joined, one new", n)
		}
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		time.Sleep((idleLooks + 1) * lookAgain) // virtual
		synctest.Wait()
		if n := len(s.Endpoints()); n != 2 {
			t.Errorf("%d endpoints are on record, want 2: those that are joined", n)
		}
		agree(t, "some minutes", s, k, st)
		cancel()
		must(t, <-done)
	})
}

// TestLeftEndpoints: an endpoint whose container the engine removed while dockway was away is not there
// for ever, nor is its port. Its link is in the host again; one that a container is still to take is too,
// for a while.
func TestLeftEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k, st := newFakeKernel(), newFakeStore()
		s := newService(t, k, st)
		for i := 1; i <= 3; i++ {
			must(t, s.CreateNetwork(ctx, webRequest(i)))
			join(t, s, i)
		}
		must(t, s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(8080, 80)}))
		left, late := mode.Endpoint{ID: endpointID(100)}, mode.Endpoint{ID: endpointID(200)}
		k.inHost(left.Peer(), late.Peer())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		looks := func(n int) {
			time.Sleep(time.Duration(n)*lookAgain + time.Second) // virtual
			synctest.Wait()
		}
		looks(idleLooks - 1)
		if n := len(s.Endpoints()); n != 3 {
			t.Errorf("%d endpoints are on record, want 3: engines need some time", n)
		}
		k.inHost(left.Peer())
		looks(idleLooks - 1)
		k.inHost(left.Peer(), late.Peer())
		looks(1)
		if all := s.Endpoints(); len(all) != 2 || all[0].ID != endpointID(200) || len(s.Ports()) != 0 {
			t.Errorf("on record are %v with ports %v, want the two that containers have, or had a moment ago", all, s.Ports())
		}
		agree(t, "some minutes", s, k, st)
		must(t, s.Publish(ctx, networkID(2), endpointID(200), []policy.PortMapping{tcp(8080, 80)}))
		cancel()
		must(t, <-done)
	})
}

// TestLinkInContainer: the engine is told of the name that a container's link is to have, after a restart too.
func TestLinkInContainer(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(1)))
	named := endpointRequest(1, 0)
	named.Options = map[string]string{"com.docker.network.endpoint.ifname": "lan0"}
	for _, req := range []EndpointRequest{named, endpointRequest(1, 1)} {
		_, err := s.CreateEndpoint(ctx, req)
		must(t, err)
		for _, when := range []string{"first", "after a restart"} {
			reply, err := s.Join(ctx, req.NetworkID, req.ID)
			must(t, err)
			if want := req.Options["com.docker.network.endpoint.ifname"]; reply.DstName != want || reply.DstPrefix != "eth" {
				t.Errorf("%s: %+v, want name %q or prefix eth", when, reply, want)
			}
			s = newService(t, k, st)
		}
	}
}

// TestLinkNames gives endpoints IDs that begin alike: links have no room for more of an ID, and
// those of two endpoints must not be one.
func TestLinkNames(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	for i := 1; i <= 2; i++ {
		must(t, s.CreateNetwork(ctx, webRequest(i)))
	}
	join(t, s, 1)
	first := endpointRequest(1, 0)
	alike := endpointRequest(1, 1)
	alike.ID = first.ID[:11] + "f"
	elsewhere := endpointRequest(2, 0)
	elsewhere.ID = alike.ID
	again := endpointRequest(2, 1)
	again.ID = first.ID
	refused := func(when string) {
		t.Helper()
		for _, req := range []EndpointRequest{alike, elsewhere, again} {
			want := "its ID begins as that of endpoint " + first.ID
			if _, err := s.CreateEndpoint(ctx, req); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s, endpoint %s on network %s: %v, want %s", when, req.ID, req.NetworkID, err, want)
			}
		}
		agree(t, when, s, k, st)
	}
	refused("beside a joined endpoint")
	s = newService(t, k, st)
	refused("after a restart")
	must(t, s.Leave(ctx, first.NetworkID, first.ID))
	refused("beside one that left")
	must(t, s.DeleteEndpoint(ctx, first.NetworkID, first.ID))
	_, err := s.CreateEndpoint(ctx, elsewhere)
	must(t, err)
	must(t, s.DeleteNetwork(ctx, elsewhere.NetworkID))
	_, err = s.CreateEndpoint(ctx, alike)
	must(t, err)
}

// join makes a network's first endpoint and joins a container to it.
func join(t *testing.T, s *Service, net int) {
	t.Helper()
	req := endpointRequest(net, 0)
	_, err := s.CreateEndpoint(context.Background(), req)
	must(t, err)
	_, err = s.Join(context.Background(), req.NetworkID, req.ID)
	must(t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
