package driver

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Who speaks to an address remembers its MAC, and finds out that it has another only after half a minute.
// So it is announced: an address of an overlay that comes again on another host, or in another container,
// and on the wire, when an uplink comes again with another MAC, the host and every container behind it.

// On the wire it is told more than once, as RFC 5227 (section 2.3) says: a card that has just come may not
// send yet, and who has just heard the old MAC believes no other for a second.
const (
	announcements    = 3
	announceInterval = 2 * time.Second
)

// A herald is how often a network's other MAC is still to be told, and from when on.
type herald struct {
	left int
	next time.Time
}

// proclaim tells the wire of networks that it finds at another MAC than before, as far as that is due.
// It returns when there is more to tell, and false when there is not.
func (s *Service) proclaim(ctx context.Context) (next time.Time, more bool) {
	type due struct {
		record    mode.Network
		endpoints []mode.Endpoint
	}
	var all []due
	now := time.Now()
	s.each(func(n *network) {
		if n.herald.left > 0 && !now.Before(n.herald.next) {
			n.herald = herald{n.herald.left - 1, now.Add(announceInterval)}
			all = append(all, due{n.record, n.list()})
		}
		if h := n.herald; h.left > 0 && (!more || h.next.Before(next)) {
			next, more = h.next, true
		}
	})
	said := map[plan.Neighbour]bool{} // networks of one uplink share the host's addresses
	for _, d := range all {
		uplink, err := s.kernel.Uplink(ctx, d.record.Options.Interface)
		if err != nil {
			continue // gone again
		}
		for _, n := range d.record.Found(uplink.Addresses, d.endpoints) {
			said[n] = true
		}
	}
	if len(said) > 0 {
		s.tell(ctx, "", slices.Collect(maps.Keys(said)))
	}
	return next, more
}

// maxFormer is how many addresses are remembered.
const maxFormer = 1 << 16

// former are the MACs that addresses had before they went.
type former struct {
	mu   sync.Mutex
	macs map[place]plan.MAC
}

type place struct {
	namespace string
	address   netip.Addr
}

// went takes note of an address that went.
func (f *former) went(namespace string, a netip.Addr, mac plan.MAC) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.macs == nil || len(f.macs) >= maxFormer {
		f.macs = map[place]plan.MAC{}
	}
	f.macs[place{namespace, a}] = mac
}

// came reports whether an address that comes had another MAC before.
func (f *former) came(namespace string, a netip.Addr, mac plan.MAC) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := place{namespace, a}
	old, known := f.macs[p]
	delete(f.macs, p)
	return known && old != mac
}

// do carries out operations, and announces addresses of other hosts that they have given another MAC.
func (s *Service) do(ctx context.Context, ops []plan.Op) error {
	if err := s.kernel.Do(ctx, ops); err != nil {
		return err
	}
	moved := map[string][]plan.Neighbour{}
	for _, op := range ops {
		w, ok := op.Object.(plan.Within)
		if !ok {
			continue
		}
		n, ok := w.Object.(plan.Neighbour)
		if !ok {
			continue
		}
		if op.Verb == plan.Delete {
			s.former.went(w.Namespace, n.Address, n.MAC)
		} else if op.Verb == plan.Replace || s.former.came(w.Namespace, n.Address, n.MAC) {
			moved[w.Namespace] = append(moved[w.Namespace], n)
		}
	}
	for namespace, list := range moved {
		s.tell(ctx, namespace, list)
	}
	return nil
}

// arrived announces addresses of an endpoint of this host that others had before.
func (s *Service) arrived(ctx context.Context, n mode.Network, e mode.Endpoint) {
	var moved []mode.Remote
	for _, st := range n.Statements(e) {
		if s.former.came(n.Namespace(), st.Address, st.MAC) {
			moved = append(moved, mode.Remote{VSID: st.VSID, Address: st.Address, MAC: st.MAC})
		}
	}
	if len(moved) > 0 {
		s.tell(ctx, n.Namespace(), n.Neighbours(moved))
	}
}

// tell announces. Who does not hear it finds out by itself, so it is not worth an error.
func (s *Service) tell(ctx context.Context, namespace string, moved []plan.Neighbour) {
	if err := s.kernel.Announce(ctx, namespace, moved); err != nil {
		s.log.WithError(err).Warn("addresses that moved could not be announced")
	}
}
