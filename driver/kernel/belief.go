package kernel

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/dockway/dockway/driver/plan"
)

// beliefs are what links of ours, their addresses, and VLANs and routes should be: what ObserveAll
// last saw, and Do has done since. Only Watch asks.
type beliefs struct {
	sync.Mutex
	clock   uint64
	byLink  map[string]map[plan.Key]belief // by links, and by prefixes of routes
	uplinks map[string]string              // of switches, also while they are not there
	entries entries
}

type belief struct {
	object plan.Object
	since  uint64
}

// linksOf are the link that an object is, if it is one, and those whose events can be about it.
func linksOf(o plan.Object) (itself string, names []string) {
	switch o := o.(type) {
	case plan.Bridge:
		return o.Name, []string{o.Name}
	case plan.Switch:
		return o.Name, []string{o.Name}
	case plan.Veth:
		return o.Name, []string{o.Name}
	case plan.VLAN:
		return o.Name, []string{o.Name, o.Uplink}
	case plan.Macvlan:
		return o.Name, []string{o.Name}
	case plan.VXLAN:
		return o.Name, []string{o.Name}
	case plan.Transit:
		return o.Name, []string{o.Name, endName(o.Namespace, o.Peer)}
	case plan.Address:
		return "", []string{o.Link}
	case plan.Route:
		return "", []string{o.Link, o.Prefix.String()}
	}
	return "", nil
}

// endName names the end in a namespace of ours of a pair that leads there.
func endName(namespace, link string) string { return namespace + " " + link }

// about reports whether events of a link, or of routes to a prefix, can matter.
func (b *beliefs) about(name string) bool {
	b.Lock()
	defer b.Unlock()
	return len(b.byLink[name]) > 0
}

// now is the time before an observation.
func (b *beliefs) now() uint64 {
	b.Lock()
	defer b.Unlock()
	return b.clock
}

// did takes note of an operation.
func (b *beliefs) did(op plan.Op) {
	itself, names := linksOf(op.Object)
	if len(names) == 0 {
		return
	}
	b.Lock()
	defer b.Unlock()
	b.clock++
	key := op.Object.Key()
	if key.Kind == plan.KindVLAN || key.Kind == plan.KindTransit { // as it was, it may have been of another uplink or namespace
		for _, objects := range b.byLink {
			delete(objects, key)
		}
	}
	if op.Verb != plan.Delete {
		b.put(op.Object)
		return
	}
	for _, name := range names {
		delete(b.byLink[name], key)
	}
	delete(b.byLink, itself)
	for index, port := range b.entries {
		if port.name == itself {
			delete(b.entries, index)
		}
	}
}

func (b *beliefs) put(o plan.Object) {
	_, names := linksOf(o)
	if b.byLink == nil {
		b.byLink = map[string]map[plan.Key]belief{}
	}
	for _, name := range names {
		if name == "" { // of what is broken
			continue
		}
		if b.byLink[name] == nil {
			b.byLink[name] = map[plan.Key]belief{}
		}
		b.byLink[name][o.Key()] = belief{o, b.clock}
	}
	if s, ok := o.(plan.Switch); ok && s.Uplink != "" {
		b.wait(s.Name, s.Uplink)
	}
}

// saw takes note of all that there was at a time; what has been done since counts for more.
func (b *beliefs) saw(s plan.State, found entries, at uint64) {
	b.Lock()
	defer b.Unlock()
	for index, port := range b.entries {
		for key, value := range port.byKey {
			if value.since > at {
				found.put(&link{index: index, name: port.name}, key, value)
			}
		}
	}
	b.entries = found
	old := b.byLink
	b.byLink = nil
	for _, o := range s {
		b.put(o)
	}
	for name, objects := range old {
		for key, belief := range objects {
			if belief.since > at {
				delete(b.byLink[name], key)
				b.put(belief.object)
			}
		}
	}
}

// expect takes note of the uplink that a switch waits for; none when it is empty.
func (b *beliefs) expect(name, uplink string) {
	b.Lock()
	defer b.Unlock()
	b.wait(name, uplink)
}

func (b *beliefs) wait(name, uplink string) {
	if b.uplinks == nil {
		b.uplinks = map[string]string{}
	}
	b.uplinks[name] = uplink
	if uplink == "" {
		delete(b.uplinks, name)
	}
}

func (b *beliefs) expected(name string) string {
	b.Lock()
	defer b.Unlock()
	return b.uplinks[name]
}

// expecting names the switches that wait for an uplink.
func (b *beliefs) expecting(uplink string) []string {
	b.Lock()
	defer b.Unlock()
	var out []string
	for name, u := range b.uplinks {
		if u == uplink {
			out = append(out, name)
		}
	}
	return out
}

// returned reports whether the uplink that a switch has not, and waits for, is there to be taken.
func (k *Kernel) returned(ctx context.Context, name string, observed plan.State) bool {
	s, ok := observed[plan.Switch{Name: name}.Key()].(plan.Switch)
	expected := k.believed.expected(name)
	if !ok || expected == "" || s.Uplink == expected {
		return false
	}
	_, err := k.freeUplink(ctx, plan.Switch{Name: name, Uplink: expected}, nil)
	return err == nil
}

// holds reports whether a link and its addresses are as believed. Mostly they are, after changes of
// our own, and operations under way need not wait for the look; if not, it waits for those.
func (b *beliefs) holds(ctx context.Context, k *Kernel, name string) bool {
	if b.hold(ctx, k, name) {
		return true
	}
	k.doing.Lock()
	defer k.doing.Unlock()
	return b.hold(ctx, k, name)
}

func (b *beliefs) hold(ctx context.Context, k *Kernel, name string) bool {
	wanted, observed := plan.State{}, plan.State{}
	var vlans, transits []string
	var routes []plan.Key
	b.Lock()
	for key, belief := range b.byLink[name] {
		wanted.Add(belief.object)
		switch key.Kind {
		case plan.KindVLAN:
			vlans = append(vlans, key.Name)
		case plan.KindRoute:
			routes = append(routes, key)
		case plan.KindTransit:
			transits = append(transits, key.Name)
		}
	}
	b.Unlock()
	if err := errors.Join(k.observeLinks(ctx, vlans, observed), k.observeTransits(ctx, transits, observed), k.observeRouteKeys(ctx, routes, observed)); err != nil {
		return false
	}
	if strings.ContainsAny(name, "/ ") { // a prefix, or the other end of a pair
		return len(plan.Diff(observed, wanted)) == 0
	}
	observe := k.observeLinks
	switch {
	case isSwitch(name):
		observe = k.observeSwitches
	case isTransit(name):
		observe = k.observeTransits
	}
	if err := observe(ctx, []string{name}, observed); err != nil {
		return false
	}
	l, err := k.link(ctx, name)
	if err != nil {
		return false
	}
	if k.returned(ctx, name, observed) {
		return false
	}
	if l != nil && l.ours() && !isSwitch(name) {
		if err := k.observeAddresses(ctx, l.index, map[int32]string{l.index: name}, observed); err != nil {
			return false
		}
	}
	return len(plan.Diff(observed, wanted)) == 0
}
