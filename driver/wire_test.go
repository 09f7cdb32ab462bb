package driver

import (
	"context"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/policy"
)

// TestSharedSwitch: networks of one uplink share its switch, which comes with the first and goes
// with the last.
func TestSharedSwitch(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	held := plan.Switch{Name: "dwxeth1"}
	for _, i := range []int{3, 4} {
		must(t, s.CreateNetwork(ctx, webRequest(i)))
		agree(t, "create", s, k, st)
		k.holds(t, true, held)
	}
	must(t, s.DeleteNetwork(ctx, networkID(3)))
	agree(t, "delete one", s, k, st)
	k.holds(t, true, held)
	must(t, s.DeleteNetwork(ctx, networkID(4)))
	agree(t, "delete both", s, k, st)
	k.holds(t, false, held)
}

// TestUplinkChanges: another MAC of the uplink, and the gateway's, reach the rules with the next
// look.
func TestUplinkChanges(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	req := webRequest(4)
	req.Options["mode"] = "l2tunnel"
	must(t, s.CreateNetwork(ctx, req))
	join(t, s, 4)
	port := mode.Endpoint{ID: endpointID(400), External: true}.Port()
	element := func(name string) string {
		for key, o := range k.state {
			if e, ok := o.(plan.Element); ok && key.Kind == plan.KindElement && e.Set.Name == name && e.Elem == port {
				return e.Data
			}
		}
		return ""
	}
	if got := element("gateway"); got != "" {
		t.Errorf("the gateway is %s before it has answered", got)
	}
	k.gateway = plan.MAC{2, 0, 0, 0, 0, 0xfe}
	must(t, s.Repair(ctx))
	if got := element("gateway"); got != k.gateway.String() {
		t.Errorf("the gateway is %q, want %s", got, k.gateway)
	}
	k.uplinks["eth1"] = plan.Uplink{Name: "eth1", MAC: plan.MAC{2, 0, 0, 0, 0, 2}, MTU: 1500}
	must(t, s.Repair(ctx))
	if got := element("hostmac"); got != "02:00:00:00:00:02" {
		t.Errorf("frames carry %q, want the uplink's MAC", got)
	}
	delete(k.uplinks, "eth1")
	must(t, s.Repair(ctx))
	if got := element("hostmac"); got != "02:00:00:00:00:02" {
		t.Errorf("frames carry %q after the uplink vanished, want what they did", got)
	}
}

// TestUplinkReturnsAsAnother: when the uplink has another MAC, the wire is told of it three times: of the
// host, and of the containers that it finds there.
func TestUplinkReturnsAsAnother(t *testing.T) {
	for name, mine := range map[string]bool{"transparent": false, "l2bridge": true, "l2tunnel": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				k, st := newFakeKernel(), newFakeStore()
				s := newService(t, k, st)
				done := make(chan error)
				go func() { done <- s.Run(ctx) }()
				synctest.Wait()
				req := webRequest(4)
				req.Options["mode"] = name
				must(t, s.CreateNetwork(ctx, req))
				join(t, s, 4)
				said := func(what string, times int) {
					t.Helper()
					k.mu.Lock()
					defer k.mu.Unlock()
					got := map[plan.Neighbour]int{}
					for _, n := range k.said {
						got[n]++
					}
					k.said = nil
					mac := k.uplinks["eth1"].MAC
					want := map[plan.Neighbour]int{}
					if times > 0 {
						want[plan.Neighbour{Link: "eth1", Address: netip.MustParseAddr("198.18.4.200"), MAC: mac}] = times
					}
					if times > 0 && mine {
						want[plan.Neighbour{Link: "eth1", Address: endpointRequest(4, 0).Address.Addr(), MAC: mac}] = times
					}
					if !maps.Equal(got, want) {
						t.Errorf("%s: announced %v, want %v", what, got, want)
					}
				}
				time.Sleep(time.Minute) // virtual
				said("as it was", 0)
				uplink := plan.Uplink{Name: "eth1", MAC: plan.MAC{2, 0, 0, 0, 0, 2}, MTU: 1500, Switch: true, Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.4.200/24")}}
				k.mu.Lock()
				k.uplinks["eth1"] = uplink
				k.mu.Unlock()
				look := func() {
					s.nudge()
					time.Sleep(2 * settle) // virtual
				}
				look()
				said("at once", 1)
				for range 5 { // whatever else happens
					look()
				}
				said("not for every look", 0)
				time.Sleep(time.Minute)
				said("and again", 2)
				cancel()
				must(t, <-done)
			})
		})
	}
}

// TestExternalRefuses: what external modes cannot do is refused with what to do, and nothing is left.
func TestExternalRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*NetworkRequest)
		want   string
	}{
		{"no uplink named", func(r *NetworkRequest) { delete(r.Options, "interface") }, "-o interface="},
		{"no such uplink", func(r *NetworkRequest) { r.Options["interface"] = "eth9" }, `option interface="eth9"`},
		{"internal", func(r *NetworkRequest) { r.Internal = true }, "--internal"},
		{"MTU", func(r *NetworkRequest) { r.Options["mtu"] = "9000" }, "carries at most 1500"},
		{"VLAN of a bridge", func(r *NetworkRequest) { r.Options["interface"], r.Options["vlan"] = "br0", "20" }, "is a bridge"},
		{"macvlan on a switch's uplink", func(r *NetworkRequest) { r.Options["backend"], r.Options["interface"] = "macvlan", "eth3" }, "macvlan links cannot share it"},
		{"several uplinks", func(r *NetworkRequest) { r.Options["interface"] = "eth1,eth2" }, "bond"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, st := newFakeKernel(), newFakeStore()
			k.uplinks["eth3"] = plan.Uplink{Name: "eth3", MTU: 1500, Switch: true}
			k.uplinks["br0"] = plan.Uplink{Name: "br0", MTU: 1500, Bridge: true}
			s := newService(t, k, st)
			req := webRequest(4)
			tt.change(&req)
			err := s.CreateNetwork(context.Background(), req)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
			agree(t, "refusal", s, k, st)
		})
	}
}

// TestTransparentPublishesNothing, in HNS's words.
func TestTransparentPublishesNothing(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(4)))
	join(t, s, 4)
	must(t, s.Publish(ctx, networkID(4), endpointID(400), nil))
	err := s.Publish(ctx, networkID(4), endpointID(400), []policy.PortMapping{tcp(8080, 80)})
	if err == nil || !strings.Contains(err.Error(), "port mapping is not supported on the given network") {
		t.Errorf("got %v", err)
	}
	agree(t, "refusal", s, k, st)
}

// TestHostsOwnAddress: a container cannot have an address of the host's, which would cut the host off.
func TestHostsOwnAddress(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(4)))
	req := endpointRequest(4, 0)
	k.own = map[netip.Addr]bool{req.Address.Addr(): true}
	if _, err := s.CreateEndpoint(ctx, req); err == nil || !strings.Contains(err.Error(), "the host's own") {
		t.Errorf("got %v", err)
	}
	agree(t, "refusal", s, k, st)
}

// TestGatewayKnown: a gateway that the host knows already reaches the rules at once, without a tick.
func TestGatewayKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k, st := newFakeKernel(), newFakeStore()
		s := newService(t, k, st)
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		k.gateway = plan.MAC{2, 0, 0, 0, 0, 0xfe}
		req := webRequest(4)
		req.Options["mode"] = "l2tunnel"
		must(t, s.CreateNetwork(ctx, req))
		join(t, s, 4)
		time.Sleep(time.Second) // virtual
		k.holds(t, true, plan.Element{Set: &nft.Set{Family: nft.Bridge, Name: "gateway"}, Elem: mode.Endpoint{ID: endpointID(400), External: true}.Port()})
		cancel()
		must(t, <-done)
	})
}
