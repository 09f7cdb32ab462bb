package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// fakeKernel holds objects and refuses what a kernel refuses: a port of a bridge that is not
// there, an element of a table that is not there, a host port that is taken. Every operation can
// be made to fail.
type fakeKernel struct {
	mu      sync.Mutex
	state   plan.State
	taken   map[plan.Key]bool // host ports of somebody else
	routes  []plan.HostRoute
	uplinks map[string]plan.Uplink
	gateway plan.MAC
	own     map[netip.Addr]bool // addresses of the host
	failIn  int                 // the operation, counted from 1, that fails; 0: none
	done    []plan.Op
	tick    chan struct{}
}

var errInjected = errors.New("injected failure")

func newFakeKernel() *fakeKernel {
	return &fakeKernel{uplinks: map[string]plan.Uplink{"eth1": {Name: "eth1", MAC: plan.MAC{2, 0, 0, 0, 0, 1}, MTU: 1500}}, state: plan.State{}, taken: map[plan.Key]bool{}, tick: make(chan struct{}, 1)}
}

func (k *fakeKernel) Observe(_ context.Context, keys []plan.Key) (plan.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.fail(); err != nil {
		return nil, err
	}
	found := plan.State{}
	for _, key := range keys {
		if o, ok := k.state[key]; ok {
			found[key] = o
		}
	}
	return found, nil
}

func (k *fakeKernel) ObserveAll(context.Context, []plan.Key) (plan.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.state), k.fail()
}

func (k *fakeKernel) Do(_ context.Context, ops []plan.Op) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, op := range ops {
		if err := k.fail(); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		if err := k.do(op); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		k.done = append(k.done, op)
	}
	return nil
}

func (k *fakeKernel) do(op plan.Op) error {
	key := op.Object.Key()
	if op.Verb == plan.Delete {
		delete(k.state, key)
		return nil
	}
	switch o := op.Object.(type) {
	case plan.Veth:
		if k.state[plan.Bridge{Name: o.Bridge}.Key()] == nil && k.state[plan.Switch{Name: o.Bridge}.Key()] == nil && !k.uplinks[o.Bridge].Bridge {
			return fmt.Errorf("no link %s", o.Bridge)
		}
	case plan.Address:
		if k.state[plan.Bridge{Name: o.Link}.Key()] == nil {
			return fmt.Errorf("no link %s", o.Link)
		}
	case plan.Element:
		if k.state[plan.Key{Kind: plan.KindTable, Name: string(o.Set.Family) + " dockway"}] == nil {
			return fmt.Errorf("no table for %s", o.Set.Name)
		}
	case plan.HostPort:
		if k.taken[key] {
			return &plan.PortInUseError{Port: o, Holder: "process nginx (pid 1)"}
		}
	}
	k.state[key] = op.Object
	return nil
}

// fail counts down to the operation that is to fail. The caller holds mu.
func (k *fakeKernel) fail() error {
	if k.failIn == 0 {
		return nil
	}
	if k.failIn--; k.failIn == 0 {
		return errInjected
	}
	return nil
}

func (k *fakeKernel) Watch(context.Context) (<-chan struct{}, error)   { return k.tick, nil }
func (k *fakeKernel) Routes(context.Context) ([]plan.HostRoute, error) { return k.routes, nil }
func (k *fakeKernel) Uplinks(context.Context) ([]string, error)        { return []string{"eth0"}, nil }
func (k *fakeKernel) Uplink(_ context.Context, name string) (plan.Uplink, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	uplink, ok := k.uplinks[name]
	if !ok {
		return plan.Uplink{}, fmt.Errorf("no link %s", name)
	}
	return uplink, k.fail()
}

func (k *fakeKernel) Neighbour(context.Context, string, netip.Addr) (plan.MAC, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.gateway, k.fail()
}

func (k *fakeKernel) Own(_ context.Context, a netip.Addr) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.own[a], k.fail()
}

func (k *fakeKernel) Warnings() []string { return nil }
func (k *fakeKernel) holds(t *testing.T, want bool, o plan.Object) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if got := k.state[o.Key()] != nil; got != want {
		t.Errorf("kernel holds %s: %v, want %v", o.Key(), got, want)
	}
}

// fakeStore is a disk that can be full.
type fakeStore struct {
	mu     sync.Mutex
	values map[[2]string][]byte
	full   bool
}

func newFakeStore() *fakeStore { return &fakeStore{values: map[[2]string][]byte{}} }

func (s *fakeStore) Apply(changes ...Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return errors.New("no space left on device")
	}
	for _, c := range changes {
		if key := [2]string{c.Bucket, c.Key}; c.Value == nil {
			delete(s.values, key)
		} else {
			s.values[key] = c.Value
		}
	}
	return nil
}

func (s *fakeStore) Load(bucket string, each func(string, []byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r, v := range s.values {
		if r[0] == bucket {
			if err := each(r[1], v); err != nil {
				return err
			}
		}
	}
	return nil
}

func quiet() *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}

// noLeases is an address manager that leases nothing.
type noLeases struct{}

func (noLeases) LeaseFrom(netip.Prefix, string) (bool, error) { return false, nil }
func (noLeases) Lease(context.Context, netip.Prefix, netip.Addr, plan.MAC) (plan.MAC, mode.Lease, error) {
	return plan.MAC{}, mode.Lease{}, errInjected
}
func (noLeases) Name(netip.Prefix, netip.Addr) string { return "" }

func newService(t interface{ Fatal(...any) }, k Kernel, st Store) *Service {
	s, err := New(k, st, noLeases{}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Repair(context.Background()); err != nil {
		t.Fatal(err)
	}
	return s
}

// wanted is everything that the record wants of the kernel.
func (s *Service) wanted() plan.State {
	all := mode.Host([]string{"eth0"})
	s.each(func(n *network) { all.Merge(mode.Plan(n.record, n.list())) })
	return all
}

func networkID(i int) string  { return fmt.Sprintf("%011x%053x", i, i) }
func endpointID(i int) string { return fmt.Sprintf("%011x%053x", i, i) }

// webRequest asks for a network of mode nat, but for 3 and 4, which are external and share an uplink.
func webRequest(i int) NetworkRequest {
	var options map[string]string
	if i == 3 || i == 4 {
		options = map[string]string{"mode": map[int]string{3: "l2bridge", 4: "transparent"}[i], "interface": "eth1"}
	}
	return NetworkRequest{Options: options, ID: networkID(i), IPv4: []mode.Subnet{{Pool: netip.MustParsePrefix(fmt.Sprintf("198.18.%d.0/24", i)), Gateway: netip.MustParseAddr(fmt.Sprintf("198.18.%d.1", i))}}}
}

func endpointRequest(net, i int) EndpointRequest {
	return EndpointRequest{NetworkID: networkID(net), ID: endpointID(net*100 + i), Address: netip.MustParsePrefix(fmt.Sprintf("198.18.%d.%d/24", net, i+2))}
}

func tcp(host, container uint16) policy.PortMapping {
	return policy.PortMapping{Protocol: policy.TCP, HostPort: host, ContainerPort: container}
}
