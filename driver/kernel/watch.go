package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Watch ticks when the kernel no longer holds what ObserveAll last saw and Do last did: a link, an
// address, a route or a VLAN of ours was changed, rules or elements were, Docker's chain was, other
// links carry the default routes, the uplink of a switch left it, came back, or has addresses of its
// own, or a neighbour that was asked for has another MAC. What this Kernel does itself does not tick. Ticks that are not read become one.
// Events that were lost tick too. The channel is closed when ctx ends or the Kernel is closed.
//
// Sysctls send no events.
func (k *Kernel) Watch(ctx context.Context) (<-chan struct{}, error) {
	w := &watcher{k: k, events: make(chan event), ticks: make(chan struct{}, 1), names: map[int32]string{}, ports: map[int32]string{}}
	var err error
	if w.uplinks, err = k.Uplinks(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(k.life, cancel)
	for _, source := range []eventSource{
		{unix.NETLINK_ROUTE, []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_TC, unix.RTNLGRP_NEIGH}, routeEvent},
		{unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, k.nftEvent},
	} {
		s, err := k.subscribe(source)
		if err != nil {
			cancel()
			return nil, fmt.Errorf("watch: %w", err)
		}
		k.running.Go(func() { w.read(ctx, source, s) })
	}
	all, err := k.listLinks(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("watch: %w", err)
	}
	for _, l := range all {
		w.names[l.index] = l.name
	}
	for _, l := range all {
		if on := w.names[l.master]; isSwitch(on) && !strings.HasPrefix(l.name, vethPrefix) {
			w.ports[l.index] = on
		}
	}
	k.running.Go(func() {
		defer cancel()
		defer close(w.ticks)
		w.collect(ctx)
	})
	return w.ticks, nil
}

// settleTime is how long after a first event others are waited for.
const settleTime = 20 * time.Millisecond

// An event is what one message tells.
type event struct {
	link    *link // has changed; only its index is known when it is an address of it that has
	deleted bool
	prefix  netip.Prefix // of a route that has changed
	near    nearby       // has changed
	rules   bool         // something of nftables that matters
	lost    bool         // events were lost
}

type eventSource struct {
	protocol int
	groups   []int
	parse    func(h unix.NlMsghdr, body []byte) (event, bool)
}

func (k *Kernel) subscribe(source eventSource) (s *socket, err error) {
	err = k.inside(func() error {
		s, err = dial(source.protocol, source.groups...)
		return err
	})
	return s, err
}

// A watcher turns events into ticks.
type watcher struct {
	k       *Kernel
	events  chan event
	ticks   chan struct{}
	names   map[int32]string // of links
	ports   map[int32]string // on which switch a link of the host's is
	uplinks []string
}

// read passes events on until the context ends. A socket that fails is replaced.
func (w *watcher) read(ctx context.Context, source eventSource, s *socket) {
	pass := func(e event) {
		select {
		case w.events <- e:
		case <-ctx.Done():
		}
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	for ctx.Err() == nil {
		n, err := s.file.Read(s.buf)
		switch {
		case err == nil:
			for h, body := range messages(s.buf[:n]) {
				if e, ok := source.parse(h, body); ok {
					pass(e)
				}
			}
		case ctx.Err() != nil:
		case errors.Is(err, unix.ENOBUFS):
			pass(event{lost: true})
		default:
			w.k.log.WithError(err).Warn("netlink events cannot be read; opening the socket anew")
			stop()
			s.Close()
			pause(ctx, retryTime)
			if again, err := w.k.subscribe(source); err == nil {
				s = again
			}
			stop = context.AfterFunc(ctx, func() { s.Close() })
			pass(event{lost: true})
		}
	}
	stop()
	s.Close()
}

// routeEvent reads rtnetlink(7) events.
func routeEvent(h unix.NlMsghdr, body []byte) (event, bool) {
	switch h.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l := parseLink(body)
		return event{link: l, deleted: h.Type == unix.RTM_DELLINK}, l != nil
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(body) < unix.SizeofIfAddrmsg {
			return event{}, false
		}
		index := int32(binary.NativeEndian.Uint32(body[4:]))
		return event{link: &link{index: index}}, true
	case unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER, unix.RTM_NEWQDISC, unix.RTM_DELQDISC:
		index, ok := tcLink(body)
		return event{link: &link{index: index}}, ok
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		near, ok := parseNeighbour(body)
		return event{near: near}, ok
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		prefix, ok := routePrefix(body)
		return event{prefix: prefix}, ok
	}
	return event{}, false
}

// nftEvent reads events of nf_tables: those about tables of ours that are not our own doing, and
// those about Docker's chain. The attributes of every kind of message begin with the table's name.
func (k *Kernel) nftEvent(h unix.NlMsghdr, body []byte) (event, bool) {
	if len(body) < nfgenSize || h.Pid == k.nft.port {
		return event{}, false
	}
	family, body := body[0], body[nfgenSize:]
	name := func(kind uint16) string {
		value, _ := attribute(body, kind)
		return text(value)
	}
	table := name(unix.NFTA_TABLE_NAME)
	kind := int(h.Type & 0xff)
	for _, t := range k.tableList {
		if nfFamily(t.Family) != family || t.Name != table {
			continue
		}
		if kind == unix.NFT_MSG_NEWSETELEM || kind == unix.NFT_MSG_DELSETELEM {
			s := k.sets[string(t.Family)+" "+name(unix.NFTA_SET_ELEM_LIST_SET)]
			return event{rules: true}, s.Set == nil || !s.Dynamic
		}
		return event{rules: true}, true
	}
	if table != filterTable || family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_IPV6 {
		return event{}, false
	}
	switch kind {
	case unix.NFT_MSG_DELTABLE:
		return event{rules: true}, true
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		return event{rules: true}, name(unix.NFTA_CHAIN_NAME) == dockerUser
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		return event{rules: true}, name(unix.NFTA_RULE_CHAIN) == dockerUser
	}
	return event{}, false
}

// collect gathers events that come together, looks at what they are about, and ticks.
func (w *watcher) collect(ctx context.Context) {
	for {
		var d dirt
		select {
		case <-ctx.Done():
			return
		case e := <-w.events:
			w.note(&d, e)
		}
		if d.clean() {
			continue
		}
		settled := time.NewTimer(settleTime)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				settled.Stop()
				return
			case e := <-w.events:
				w.note(&d, e)
			case <-settled.C:
				waiting = false
			}
		}
		if w.matters(ctx, d) {
			select {
			case w.ticks <- struct{}{}:
			default:
			}
		}
	}
}

// dirt is what has to be looked at.
type dirt struct {
	links  []string // and prefixes of routes
	routes bool
	tick   bool // nothing has to be looked at: it matters
}

func (d dirt) clean() bool { return len(d.links) == 0 && !d.routes && !d.tick }

func (w *watcher) note(d *dirt, e event) {
	switch {
	case e.rules, e.lost:
		d.tick = true
	case e.near.address.IsValid():
		d.tick = d.tick || w.k.asked.news(e.near)
	case e.prefix.IsValid():
		d.routes = d.routes || e.prefix.Bits() == 0
		if w.k.believed.about(e.prefix.String()) {
			d.links = append(d.links, e.prefix.String())
		}
	default:
		d.routes = d.routes || slices.Contains(w.uplinks, e.link.name)
		w.notePort(d, e)
		for _, name := range []string{w.names[e.link.index], e.link.name} {
			if w.k.believed.about(name) {
				d.links = append(d.links, name)
			}
		}
		if e.link.ours() {
			d.links = append(d.links, e.link.name)
		}
		switch {
		case e.deleted:
			delete(w.names, e.link.index)
		case e.link.name != "":
			w.names[e.link.index] = e.link.name
		}
	}
}

// notePort takes note of what an event says about switches: their ports, and the uplinks that they
// wait for.
func (w *watcher) notePort(d *dirt, e event) {
	if on, ok := w.ports[e.link.index]; ok {
		d.links = append(d.links, on)
	}
	if e.link.name == "" {
		return // an address
	}
	d.links = append(d.links, w.k.believed.expecting(e.link.name)...)
	delete(w.ports, e.link.index)
	if on := w.names[e.link.master]; isSwitch(on) && !e.deleted && !strings.HasPrefix(e.link.name, vethPrefix) {
		w.ports[e.link.index] = on
		d.links = append(d.links, on)
	}
}

// matters looks whether the kernel still holds what it should.
func (w *watcher) matters(ctx context.Context, d dirt) bool {
	tick := d.tick
	if d.routes {
		uplinks, err := w.k.Uplinks(ctx)
		tick = tick || err != nil || !slices.Equal(uplinks, w.uplinks)
		w.uplinks = uplinks
	}
	if tick {
		return true
	}
	slices.Sort(d.links)
	for _, name := range slices.Compact(d.links) {
		if !w.k.believed.holds(ctx, w.k, name) {
			return true
		}
	}
	return false
}

// beliefs are what links of ours, their addresses, and VLANs and routes should be: what ObserveAll
// last saw, and Do has done since. Only Watch asks.
type beliefs struct {
	sync.Mutex
	clock   uint64
	byLink  map[string]map[plan.Key]belief // by links, and by prefixes of routes
	uplinks map[string]string              // of switches, also while they are not there
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
	case plan.Address:
		return "", []string{o.Link}
	case plan.Route:
		return "", []string{o.Link, o.Prefix.String()}
	}
	return "", nil
}

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
	if key.Kind == plan.KindVLAN { // as it was, it may have been of another uplink
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
func (b *beliefs) saw(s plan.State, at uint64) {
	b.Lock()
	defer b.Unlock()
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
	var vlans []string
	var routes []plan.Key
	b.Lock()
	for key, belief := range b.byLink[name] {
		wanted.Add(belief.object)
		switch key.Kind {
		case plan.KindVLAN:
			vlans = append(vlans, key.Name)
		case plan.KindRoute:
			routes = append(routes, key)
		}
	}
	b.Unlock()
	if err := errors.Join(k.observeLinks(ctx, vlans, observed), k.observeRouteKeys(ctx, routes, observed)); err != nil {
		return false
	}
	if strings.Contains(name, "/") { // a prefix
		return len(plan.Diff(observed, wanted)) == 0
	}
	observe := k.observeLinks
	if isSwitch(name) {
		observe = k.observeSwitches
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
