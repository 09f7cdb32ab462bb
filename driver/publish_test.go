package driver

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

func TestPublish(t *testing.T) {
	dual := func(r EndpointRequest) EndpointRequest {
		r.Address6 = netip.MustParsePrefix("fd00:1::2/64")
		return r
	}
	processes := []uint16{7000} // the ports that they hold
	for port := uint16(7100); port <= 7500; port++ {
		processes = append(processes, port)
	}
	tests := []struct {
		name     string
		endpoint func(EndpointRequest) EndpointRequest
		mapping  policy.PortMapping
		want     string // bindings or error
	}{
		{"every address", nil, tcp(8080, 80), "0.0.0.0:8080 -> 198.18.1.2:80/tcp, [::]:8080 -> 198.18.1.2:80/tcp"},
		{"every address, dual stack", dual, tcp(8080, 80), "0.0.0.0:8080 -> 198.18.1.2:80/tcp, [::]:8080 -> [fd00:1::2]:80/tcp"},
		{"one IPv4 address", nil, policy.PortMapping{Protocol: policy.UDP, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 5353, ContainerPort: 53}, "127.0.0.1:5353 -> 198.18.1.2:53/udp"},
		{"one IPv6 address", dual, policy.PortMapping{Protocol: policy.TCP, HostIP: netip.MustParseAddr("::1"), HostPort: 80, ContainerPort: 80}, "[::1]:80 -> [fd00:1::2]:80/tcp"},
		{"range, first taken by a process", nil, policy.PortMapping{Protocol: policy.TCP, HostPort: 7000, HostPortEnd: 7002, ContainerPort: 80}, "0.0.0.0:7001 -> 198.18.1.2:80/tcp, [::]:7001 -> 198.18.1.2:80/tcp"},
		{"taken by a process", nil, tcp(7000, 80), "in use by process nginx (pid 1)"},
		{"range, more taken than are tried", nil, policy.PortMapping{Protocol: policy.TCP, HostPort: 7100, HostPortEnd: 7500, ContainerPort: 80}, "no free host port after 256 attempts, the last: host port 0.0.0.0:7355/tcp is in use by process nginx (pid 1)"},
		{"taken by an endpoint", nil, tcp(9000, 80), "host port 0.0.0.0:9000/tcp is published by endpoint 000000000c80 (198.18.2.2) of network 000000000020"},
		{"on one address, taken by an endpoint on every", nil, policy.PortMapping{Protocol: policy.TCP, HostIP: netip.MustParseAddr("198.18.0.1"), HostPort: 9000, ContainerPort: 80}, "host port 0.0.0.0:9000/tcp is published by endpoint 000000000c80"},
		{"no container port", nil, tcp(8080, 0), "container port 0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
			s := newService(t, k, st)
			web := webRequest(1)
			web.IPv6 = []mode.Subnet{{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")}}
			must(t, s.CreateNetwork(ctx, web))
			must(t, s.CreateNetwork(ctx, webRequest(2)))
			join(t, s, 2)
			must(t, s.Publish(ctx, networkID(2), endpointID(200), []policy.PortMapping{tcp(9000, 80)}))
			for _, port := range processes {
				k.taken[plan.HostPort{Proto: "tcp", Host: netip.AddrPortFrom(netip.IPv4Unspecified(), port)}.Key()] = true
			}
			req := endpointRequest(1, 0)
			if tt.endpoint != nil {
				req = tt.endpoint(req)
			}
			_, err := s.CreateEndpoint(ctx, req)
			must(t, err)
			_, err = s.Join(ctx, req.NetworkID, req.ID)
			must(t, err)
			err = s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tt.mapping})
			got := fmt.Sprint(err)
			if err == nil {
				var all []string
				for _, b := range s.networks[req.NetworkID].endpoints[req.ID].Bindings {
					all = append(all, b.String())
				}
				got = strings.Join(all, ", ")
			}
			if !strings.Contains(got, tt.want) {
				t.Errorf("publish %s: %s, want %s", tt.mapping, got, tt.want)
			}
			agree(t, tt.name, s, k, st)
		})
	}
}

// TestDynamicPortIsKept publishes a random port twice, as engines do when a container's role
// changes: its clients must find it where it was.
func TestDynamicPortIsKept(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(1)))
	join(t, s, 1)
	publish := func() uint16 {
		must(t, s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(0, 80)}))
		return s.Ports()[0].HostPort
	}
	first := publish()
	if first < firstDynamicPort || first > lastDynamicPort {
		t.Errorf("dynamic port %d, want %d to %d", first, firstDynamicPort, lastDynamicPort)
	}
	if second := publish(); second != first {
		t.Errorf("published again on %d, want %d as before", second, first)
	}
}

// slowKernel takes its time to look, so that calls overlap.
type slowKernel struct{ *fakeKernel }

func (k slowKernel) Observe(ctx context.Context, keys []plan.Key) (plan.State, error) {
	time.Sleep(time.Millisecond) // virtual
	return k.fakeKernel.Observe(ctx, keys)
}

// TestPublishAtOnce: of two containers of different networks that publish one host port at the same
// time, one gets it.
func TestPublishAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
		s := newService(t, slowKernel{k}, st)
		var failed [2]error
		for i := range failed {
			must(t, s.CreateNetwork(ctx, webRequest(1+i)))
			join(t, s, 1+i)
		}
		var wg sync.WaitGroup
		for i := range failed {
			wg.Go(func() {
				failed[i] = s.Publish(ctx, networkID(1+i), endpointID(100*(1+i)), []policy.PortMapping{tcp(8080, 80)})
			})
		}
		wg.Wait()
		if (failed[0] == nil) == (failed[1] == nil) {
			t.Errorf("two endpoints publish one port: %v and %v", failed[0], failed[1])
		}
		agree(t, "two publish one port", s, k, st)
	})
}

// TestRepairGoesOnPastTakenPort restarts when a process has taken a published port meanwhile: the
// rest is repaired, and the status says what is wrong.
func TestRepairGoesOnPastTakenPort(t *testing.T) {
	ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
	s := newService(t, k, st)
	must(t, s.CreateNetwork(ctx, webRequest(1)))
	join(t, s, 1)
	must(t, s.Publish(ctx, networkID(1), endpointID(100), []policy.PortMapping{tcp(8080, 80), tcp(8081, 81)}))
	maps.DeleteFunc(k.state, func(key plan.Key, _ plan.Object) bool {
		return key.Kind == plan.KindHostPort || key.Kind == plan.KindElement
	})
	lost := plan.HostPort{Proto: "tcp", Host: netip.MustParseAddrPort("0.0.0.0:8080")}
	k.taken[lost.Key()] = true
	err := s.Repair(ctx)
	if err == nil || !strings.Contains(s.Status().Problem, "in use by process nginx") {
		t.Errorf("repair: %v, status %+v, want the taken port named", err, s.Status())
	}
	if ops := diff(k, s.wanted()); len(ops) != 1 || ops[0].Object.Key() != lost.Key() {
		t.Errorf("left undone: %v, want only the taken port", ops)
	}
}
