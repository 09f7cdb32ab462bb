package driver

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// lan is an address manager that leases the addresses of all pools: it has chosen a MAC for each family, and takes one
// that is asked for.
type lan struct {
	noLeases
	lease4, lease6 mode.Lease
	now            map[netip.Addr]netip.Addr // what is granted in place of an address
	problem        error
}

var mac4, mac6 = plan.MAC{2, 0, 0, 0, 0, 4}, plan.MAC{2, 0, 0, 0, 0, 6}

func (l *lan) LeaseFrom(netip.Prefix, string) (bool, error) { return true, nil }

func (l *lan) Lease(_ context.Context, pool netip.Prefix, _ netip.Addr, mac plan.MAC) (plan.MAC, mode.Lease, error) {
	chosen, lease := mac4, l.lease4
	if pool.Addr().Is6() {
		chosen, lease = mac6, l.lease6
	}
	if mac != (plan.MAC{}) {
		chosen = mac
	}
	return chosen, lease, l.problem
}

func (l *lan) Granted(pool netip.Prefix, a netip.Addr) (netip.Addr, mode.Lease, error) {
	if now, ok := l.now[a]; ok {
		a = now
	}
	_, lease, err := l.Lease(context.Background(), pool, a, plan.MAC{})
	return a, lease, err
}

// TestLeased: an endpoint has what the leases of its families tell, wherever its addresses are.
func TestLeased(t *testing.T) {
	pool6, a4, a6 := netip.MustParsePrefix("fd00:9::/64"), netip.MustParsePrefix("198.19.7.9/24"), netip.MustParsePrefix("fd00:18::9/64")
	router := netip.MustParseAddr("fe80::fe")
	toRouter := mode.StaticRoute{Prefix: netip.PrefixFrom(router, 128)}
	static := mode.StaticRoute{Prefix: netip.MustParsePrefix("198.19.77.0/24"), Via: netip.MustParseAddr("198.19.7.254")}
	l := &lan{
		lease4: mode.Lease{Gateway: netip.MustParseAddr("198.19.7.254"), Routes: []mode.StaticRoute{static}, MTU: 1450},
		lease6: mode.Lease{Gateway: router, MTU: 1400},
	}
	for what, c := range map[string]struct {
		address, address6 netip.Prefix
		mac, want         plan.MAC
		routes            []mode.StaticRoute
		mtu               int
	}{
		"both":    {a4, a6, plan.MAC{}, mac4, []mode.StaticRoute{static, toRouter}, 1400},
		"IPv6":    {netip.Prefix{}, a6, plan.MAC{}, mac6, []mode.StaticRoute{toRouter}, 1400},
		"IPv4":    {a4, netip.Prefix{}, plan.MAC{}, mac4, []mode.StaticRoute{static}, 1450},
		"own MAC": {a4, a6, plan.MAC{2, 1}, plan.MAC{2, 1}, []mode.StaticRoute{static, toRouter}, 1400},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, k := context.Background(), newFakeKernel()
			s, err := New(k, newFakeStore(), l, newFakePeers(), quiet())
			if err != nil {
				t.Fatal(err)
			}
			network := webRequest(4)
			network.IPv6 = []mode.Subnet{{Pool: pool6}}
			if !c.address6.IsValid() {
				network.IPv6 = nil
			}
			if !c.address.IsValid() {
				network.IPv4 = nil
			}
			if err := s.CreateNetwork(ctx, network); err != nil {
				t.Fatal(err)
			}
			req := EndpointRequest{NetworkID: network.ID, ID: endpointID(1), Address: c.address, Address6: c.address6, MAC: c.mac}
			if _, err := s.CreateEndpoint(ctx, req); err != nil {
				t.Fatal(err)
			}
			reply, err := s.Join(ctx, req.NetworkID, req.ID)
			if err != nil || !reflect.DeepEqual(reply.Routes, c.routes) || c.address6.IsValid() && reply.Gateway6 != router || c.address.IsValid() && reply.Gateway != l.lease4.Gateway {
				t.Errorf("%+v, %v", reply, err)
			}
			n, e, err := s.endpoint(req.NetworkID, req.ID)
			if err != nil {
				t.Fatal(err)
			}
			n.mu.Unlock()
			if e.MAC != c.want || e.MTU(n.record) != c.mtu {
				t.Errorf("MAC %s, want %s; MTU %d, want %d", e.MAC, c.want, e.MTU(n.record), c.mtu)
			}
			if info := s.Endpoints()[0]; info.LeaseProblem != "" || (info.Lease6 != nil) != c.address6.IsValid() || (info.Lease != nil) != c.address.IsValid() {
				t.Errorf("%+v", info)
			}
		})
	}
}

// TestLeaseProblems: what is wrong with either lease is told.
func TestLeaseProblems(t *testing.T) {
	ctx, l := context.Background(), &lan{now: map[netip.Addr]netip.Addr{}}
	s, err := New(newFakeKernel(), newFakeStore(), l, newFakePeers(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	network := webRequest(4)
	network.IPv6 = []mode.Subnet{{Pool: netip.MustParsePrefix("fd00:9::/64")}}
	req := endpointRequest(4, 1)
	req.Address6 = netip.MustParsePrefix("fd00:18::9/64")
	if err := s.CreateNetwork(ctx, network); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateEndpoint(ctx, req); err != nil {
		t.Fatal(err)
	}
	l.now[req.Address6.Addr()] = netip.MustParseAddr("fd00:18::10")
	want := "the DHCP server gives fd00:18::10 in place of fd00:18::9: the container keeps what it has until it is restarted"
	if got := s.Endpoints()[0].LeaseProblem; got != want {
		t.Errorf("told %q, want %q", got, want)
	}
	l.problem = errors.New("none is granted")
	if got, want := s.Endpoints()[0].LeaseProblem, "none is granted; none is granted"; got != want {
		t.Errorf("told %q, want %q", got, want)
	}
	if _, err := s.CreateEndpoint(ctx, EndpointRequest{NetworkID: network.ID, ID: endpointID(2), Address6: netip.MustParsePrefix("fd00:18::11/64")}); !errors.Is(err, l.problem) {
		t.Errorf("an endpoint whose IPv6 address is not leased: %v", err)
	}
}

// TestOnLAN: the host and its containers on a LAN are found by the link that leads there, and no others.
func TestOnLAN(t *testing.T) {
	ctx, k := context.Background(), newFakeKernel()
	s := newService(t, k, newFakeStore())
	container := endpointRequest(4, 1)
	container.MAC = plan.MAC{2, 1}
	must(t, s.CreateNetwork(ctx, webRequest(4)))
	if _, err := s.CreateEndpoint(ctx, container); err != nil {
		t.Fatal(err)
	}
	host, nobody := netip.MustParseAddr("198.18.4.200"), netip.MustParseAddr("198.18.4.201")
	k.own = map[netip.Addr]bool{host: true}
	for _, c := range []struct {
		link    string
		address netip.Addr
		want    plan.MAC
	}{
		{"eth1", container.Address.Addr(), container.MAC},
		{"eth1", host, k.uplinks["eth1"].MAC},
		{"eth1", nobody, plan.MAC{}},
		{"eth2", container.Address.Addr(), plan.MAC{}},
		{"eth2", host, plan.MAC{}},
	} {
		if got := s.OnLAN(ctx, c.link, c.address); got != c.want {
			t.Errorf("%s on %s: %s, want %s", c.address, c.link, got, c.want)
		}
	}
	if k.uplinks["eth1"].MAC == (plan.MAC{}) {
		t.Error("the uplink has no MAC")
	}
}
