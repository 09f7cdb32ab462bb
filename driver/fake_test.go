package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
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
	idle    []string            // links for containers that no container has
	failIn  int                 // the operation, counted from 1, that fails; 0: none
	done    []plan.Op
	said    []plan.Neighbour // announced
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
	for _, op := range tablesFirst(ops) {
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

// tablesFirst is the order in which a kernel carries operations out: of a run of those on tables and
// elements, those on tables first.
func tablesFirst(ops []plan.Op) []plan.Op {
	kind := func(op plan.Op) plan.Kind { return op.Object.Key().Kind }
	ops = slices.Clone(ops)
	for start := 0; start < len(ops); start++ {
		end := start
		for ; end < len(ops); end++ {
			if k := kind(ops[end]); k != plan.KindTable && k != plan.KindElement {
				break
			}
		}
		slices.SortStableFunc(ops[start:end], func(a, b plan.Op) int {
			return cmp.Compare(kind(b), kind(a)) // "table" is behind "element"
		})
		start = max(start, end)
	}
	return ops
}

func (k *fakeKernel) do(op plan.Op) error {
	key := op.Object.Key()
	if op.Verb == plan.Delete {
		delete(k.state, key)
		if key.Kind == plan.KindNamespace {
			maps.DeleteFunc(k.state, func(other plan.Key, _ plan.Object) bool { return other.Namespace == key.Name })
		}
		return nil
	}
	object := op.Object
	if w, ok := object.(plan.Within); ok {
		if k.state[plan.Namespace{Name: w.Namespace}.Key()] == nil {
			return fmt.Errorf("no namespace %s", w.Namespace)
		}
		object = w.Object
	}
	there := func(o plan.Object) bool {
		key := o.Key()
		key.Namespace = op.Object.Key().Namespace
		return k.state[key] != nil
	}
	isLink := func(name string) bool {
		for _, o := range k.state {
			if t, ok := o.(plan.Transit); ok && (key.Namespace == "" && t.Name == name || key.Namespace == t.Namespace && t.Peer == name) {
				return true
			}
		}
		return there(plan.Bridge{Name: name}) || there(plan.VXLAN{Name: name}) || there(plan.Veth{Name: name})
	}
	switch o := object.(type) {
	case plan.Veth:
		if !there(plan.Bridge{Name: o.Bridge}) && !there(plan.Switch{Name: o.Bridge}) && !k.uplinks[o.Bridge].Bridge {
			return fmt.Errorf("no link %s", o.Bridge)
		}
	case plan.VXLAN:
		if !there(plan.Bridge{Name: o.Bridge}) {
			return fmt.Errorf("no link %s", o.Bridge)
		}
	case plan.Address:
		if !isLink(o.Link) {
			return fmt.Errorf("no link %s", o.Link)
		}
	case plan.Shortcut:
		external := there(plan.Switch{Name: o.Bridge})
		_, uplink := k.uplinks[o.Link]
		if !isLink(o.Link) && !(external && uplink) || !isLink(o.Bridge) && !external {
			return fmt.Errorf("no link %s of %s", o.Link, o.Bridge)
		}
	case plan.FDB:
		if !isLink(o.Link) {
			return fmt.Errorf("no link %s", o.Link)
		}
	case plan.Neighbour:
		if !isLink(o.Link) {
			return fmt.Errorf("no link %s", o.Link)
		}
	case plan.Element:
		if key := (plan.Key{Kind: plan.KindTable, Name: string(o.Set.Family) + " dockway", Namespace: key.Namespace}); k.state[key] == nil {
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

func (k *fakeKernel) Announce(_ context.Context, _ string, entries []plan.Neighbour) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.said = append(k.said, entries...)
	return nil
}

func (k *fakeKernel) Underlay(context.Context, netip.Addr) (string, int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return "eth0", 1500, k.fail()
}

// inHost says which links for containers no container has.
func (k *fakeKernel) inHost(links ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.idle = links
}

func (k *fakeKernel) Idle(context.Context) ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.idle, k.fail()
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
	failed error // for good
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

func (s *fakeStore) Failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
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
func (noLeases) Granted(_ netip.Prefix, a netip.Addr) (netip.Addr, mode.Lease, error) {
	return a, mode.Lease{}, nil
}
func (noLeases) Name(netip.Prefix, netip.Addr) string { return "" }

func (noLeases) Share(string, netip.Prefix) (bool, error) { return true, nil }

// fakePeers are the other hosts: what they tell is set, and what they are told is kept.
type fakePeers struct {
	mu       sync.Mutex
	remotes  []mode.Remote
	told     map[mode.Statement]bool
	restated bool
	unsynced bool
	changes  PeerChanges
	tick     chan struct{}
}

func newFakePeers() *fakePeers {
	return &fakePeers{told: map[mode.Statement]bool{}, tick: make(chan struct{}, 1)}
}

func (p *fakePeers) Self() (netip.Addr, uint16) { return netip.MustParseAddr("198.18.0.1"), 14789 }
func (p *fakePeers) Warnings() []string         { return nil }
func (p *fakePeers) Changed() <-chan struct{}   { return p.tick }

// VTEPs is one, or none yet before this host is in sync.
func (p *fakePeers) VTEPs() []netip.Addr {
	if !p.Synced() {
		return nil
	}
	return []netip.Addr{netip.MustParseAddr("198.18.0.2")}
}

func (p *fakePeers) State(list ...mode.Statement) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, st := range list {
		p.told[st] = true
	}
}

func (p *fakePeers) Withdraw(list ...mode.Statement) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, st := range list {
		delete(p.told, st)
	}
}

func (p *fakePeers) Restated() { p.restated = true }

func (p *fakePeers) Synced() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.unsynced
}

func (p *fakePeers) Take() PeerChanges {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { p.changes = PeerChanges{} }()
	return p.changes
}

func (p *fakePeers) filter(keep func(mode.Remote) bool) (out []mode.Remote) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.remotes {
		if keep(r) {
			out = append(out, r)
		}
	}
	return out
}

func (p *fakePeers) Remotes(vsid uint32) []mode.Remote {
	return p.filter(func(r mode.Remote) bool { return r.VSID == vsid })
}

func (p *fakePeers) OfMAC(vsid uint32, mac plan.MAC) []mode.Remote {
	return p.filter(func(r mode.Remote) bool { return r.VSID == vsid && r.MAC == mac })
}

func (p *fakePeers) Remote(vsid uint32, a netip.Addr) (mode.Remote, bool) {
	found := p.filter(func(r mode.Remote) bool { return r.VSID == vsid && r.Address == a })
	if len(found) == 0 {
		return mode.Remote{}, false
	}
	return found[0], true
}

// tell has a peer say that an endpoint is no longer before but after.
func (p *fakePeers) tell(before, after mode.Remote) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remotes = slices.DeleteFunc(p.remotes, func(r mode.Remote) bool { return r == before })
	change := EndpointChange{VSID: before.VSID, Before: before, After: after}
	if after.Address.IsValid() {
		p.remotes = append(p.remotes, after)
		change.VSID = after.VSID
	}
	p.changes.Endpoints = append(p.changes.Endpoints, change)
}

// newFakePeersLike are peers that say the same.
func newFakePeersLike(other Peers) *fakePeers {
	p := newFakePeers()
	p.remotes = slices.Clone(other.(*fakePeers).remotes)
	return p
}

func newService(t interface{ Fatal(...any) }, k Kernel, st Store) *Service {
	return newPeer(t, k, st, newFakePeers())
}

// newPeer is a service with other hosts.
func newPeer(t interface{ Fatal(...any) }, k Kernel, st Store, peers Peers) *Service {
	s, err := New(k, st, noLeases{}, peers, quiet())
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
	all := mode.Host([]string{"eth0"}).Merge(s.planPeers())
	s.each(func(n *network) {
		all.Merge(mode.Plan(n.record, n.list()), mode.PlanRemotes(n.record, s.remotes(n.record)))
	})
	return all
}

func networkID(i int) string  { return fmt.Sprintf("%011x%053x", i, i) }
func endpointID(i int) string { return fmt.Sprintf("%011x%053x", i, i) }

// webRequest asks for a network of mode nat, but for 3 and 4, which are external and share an uplink,
// and for 5 and 6, which span hosts.
func webRequest(i int) NetworkRequest {
	var options map[string]string
	switch i {
	case 3, 4:
		options = map[string]string{"mode": map[int]string{3: "l2bridge", 4: "transparent"}[i], "interface": "eth1"}
	case 5, 6:
		options = map[string]string{"mode": "overlay", "vsid": fmt.Sprint(5000 + i)}
	}
	return NetworkRequest{Options: options, ID: networkID(i), IPv4: []mode.Subnet{{Pool: netip.MustParsePrefix(fmt.Sprintf("198.18.%d.0/24", i)), Gateway: netip.MustParseAddr(fmt.Sprintf("198.18.%d.1", i))}}}
}

func endpointRequest(net, i int) EndpointRequest {
	return EndpointRequest{NetworkID: networkID(net), ID: endpointID(net*100 + i), Address: netip.MustParsePrefix(fmt.Sprintf("198.18.%d.%d/24", net, i+2))}
}

func tcp(host, container uint16) policy.PortMapping {
	return policy.PortMapping{Protocol: policy.TCP, HostPort: host, ContainerPort: container}
}
