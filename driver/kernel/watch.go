package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Watch ticks when the kernel no longer holds what ObserveAll last saw and Do last did: a link, an
// address, a route or a VLAN of ours was changed, rules or elements were, Docker's chain was, other
// links carry the default routes, the uplink of a switch left it, came back, or has addresses of its
// own, or a neighbour that was asked for has another MAC. In a namespace of ours, also one that is
// made later, an FDB or neighbour entry that was changed ticks too. What this Kernel does itself does
// not tick. Ticks that are not read become one.
// Events that were lost tick too. The channel is closed when ctx ends or the Kernel is closed.
//
// Sysctls send no events.
func (k *Kernel) Watch(ctx context.Context) (<-chan struct{}, error) {
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(k.life, cancel)
	w, err := k.newWatcher(ctx)
	if err == nil {
		err = k.watchWithin(ctx, w)
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("watch: %w", err)
	}
	ticks := make(chan struct{}, 1)
	k.running.Go(func() {
		defer cancel()
		defer close(ticks)
		defer k.unwatchWithin(w)
		w.collect(ctx, func() {
			select {
			case ticks <- struct{}{}:
			default:
			}
		})
	})
	return ticks, nil
}

// newWatcher begins to read events.
func (k *Kernel) newWatcher(ctx context.Context) (*watcher, error) {
	w := &watcher{k: k, events: make(chan event), names: map[int32]string{}, ports: map[int32]string{}}
	if k.parent == nil {
		var err error
		if w.uplinks, err = k.Uplinks(ctx); err != nil {
			return nil, err
		}
	}
	for _, source := range []eventSource{
		{unix.NETLINK_ROUTE, []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_TC, unix.RTNLGRP_NEIGH}, k.routeEvent},
		{unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, k.nftEvent},
	} {
		file, err := k.subscribe(source)
		if err != nil {
			return nil, err
		}
		k.running.Go(func() { w.read(ctx, source, file) })
	}
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		w.names[l.index] = l.name
	}
	for _, l := range all {
		if on := w.names[l.master]; isSwitch(on) && !strings.HasPrefix(l.name, vethPrefix) {
			w.ports[l.index] = on
		}
	}
	return w, nil
}

// watchWithin has a watcher hear of all namespaces of ours too.
func (k *Kernel) watchWithin(ctx context.Context, w *watcher) error {
	if err := k.openAll(); err != nil {
		return err
	}
	k.children.Lock()
	defer k.children.Unlock()
	if k.children.watches == nil {
		k.children.watches = map[*watcher]context.Context{}
	}
	k.children.watches[w] = ctx
	for _, child := range k.children.byName {
		if err := child.watchFor(ctx, w); err != nil {
			delete(k.children.watches, w)
			return err
		}
	}
	return nil
}

func (k *Kernel) unwatchWithin(w *watcher) {
	k.children.Lock()
	defer k.children.Unlock()
	delete(k.children.watches, w)
}

// watchFor passes on to a watcher of the host what ticks in this namespace, until ctx ends.
func (k *Kernel) watchFor(ctx context.Context, of *watcher) error {
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(k.life, cancel)
	w, err := k.newWatcher(ctx)
	if err != nil {
		cancel()
		return fmt.Errorf("watch network namespace %s: %w", k.name, err)
	}
	k.running.Go(func() {
		defer cancel()
		w.collect(ctx, func() { of.pass(ctx, event{changed: true}) })
	})
	return nil
}

// settleTime is how long after a first event others are waited for.
const settleTime = 20 * time.Millisecond

// An event is what one message tells.
type event struct {
	link    *link // has changed; only its index is known when it is an address of it that has
	deleted bool
	prefix  netip.Prefix // of a route that has changed
	near    nearby       // has changed
	entry   entryAt      // is not as it should be, or was not
	changed bool         // something that matters
	lost    bool         // events were lost
}

type eventSource struct {
	protocol int
	groups   []int
	parse    func(h unix.NlMsghdr, body []byte) (event, bool)
}

func (k *Kernel) subscribe(source eventSource) (file *os.File, err error) {
	err = k.inside(func() error {
		file, err = dial(source.protocol, source.groups...)
		return err
	})
	return file, err
}

// A watcher turns events into ticks.
type watcher struct {
	k       *Kernel
	events  chan event
	names   map[int32]string // of links
	ports   map[int32]string // on which switch a link of the host's is
	uplinks []string
}

func (w *watcher) pass(ctx context.Context, e event) {
	select {
	case w.events <- e:
	case <-ctx.Done():
	}
}

// read passes events on until the context ends. A socket that fails is replaced.
func (w *watcher) read(ctx context.Context, source eventSource, file *os.File) {
	w.k.hearers.add(file)
	defer func() { w.k.hearers.remove(file) }()
	stop := context.AfterFunc(ctx, func() { file.Close() })
	for ctx.Err() == nil {
		err := w.k.receive(file, func(b []byte) {
			for h, body := range messages(b) {
				if e, ok := source.parse(h, body); ok {
					w.pass(ctx, e)
				}
			}
		})
		switch {
		case err == nil, ctx.Err() != nil:
		case errors.Is(err, unix.ENOBUFS):
			w.pass(ctx, event{lost: true})
		default:
			w.k.log.WithError(err).Warn("netlink events cannot be read; opening the socket anew")
			stop()
			file.Close()
			pause(ctx, retryTime)
			if again, err := w.k.subscribe(source); err == nil {
				w.k.hearers.remove(file)
				w.k.hearers.add(again)
				file = again
			}
			stop = context.AfterFunc(ctx, func() { file.Close() })
			w.pass(ctx, event{lost: true})
		}
	}
	stop()
	file.Close()
}

// routeEvent reads rtnetlink(7) events.
func (k *Kernel) routeEvent(h unix.NlMsghdr, body []byte) (event, bool) {
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
		return k.neighbourEvent(h.Type == unix.RTM_DELNEIGH, body)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		prefix, ok := routePrefix(body)
		return event{prefix: prefix}, ok
	}
	return event{}, false
}

// neighbourEvent reads events of FDB and neighbour entries. As there may be very many after changes
// of our own, those that are as believed go no further.
func (k *Kernel) neighbourEvent(deleted bool, body []byte) (e event, ok bool) {
	if k.parent == nil && len(body) > 0 && body[0] != unix.AF_BRIDGE { // nobody asks for neighbours in a namespace of ours
		e.near, ok = parseNeighbour(body)
	}
	if h, parsed := parseHalf(body); parsed && !k.believed.explains(h, deleted) {
		e.entry, ok = entryAt{h.link, h.key}, true
	}
	return e, ok
}

// nftEvent reads events of nf_tables: those about tables of ours that are not our own doing, and
// those about Docker's chain. The attributes of every kind of message begin with the table's name.
func (k *Kernel) nftEvent(h unix.NlMsghdr, body []byte) (event, bool) {
	if port := k.nft.port.Load(); len(body) < nfgenSize || port != 0 && h.Pid == port {
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
			return event{changed: true}, s.Set == nil || !s.Dynamic
		}
		return event{changed: true}, true
	}
	if table != filterTable || family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_IPV6 {
		return event{}, false
	}
	switch kind {
	case unix.NFT_MSG_DELTABLE:
		return event{changed: true}, true
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		return event{changed: true}, name(unix.NFTA_CHAIN_NAME) == dockerUser
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		return event{changed: true}, name(unix.NFTA_RULE_CHAIN) == dockerUser
	}
	return event{}, false
}

// collect gathers events that come together, looks at what they are about, and ticks.
func (w *watcher) collect(ctx context.Context, tick func()) {
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
			tick()
		}
	}
}

// dirt is what has to be looked at.
type dirt struct {
	links   []string // and prefixes of routes
	entries map[entryAt]bool
	ends    []string // of pairs that lead here from the host
	routes  bool
	tick    bool // nothing has to be looked at: it matters
}

func (d dirt) clean() bool {
	return len(d.links) == 0 && len(d.entries) == 0 && len(d.ends) == 0 && !d.routes && !d.tick
}

func (w *watcher) note(d *dirt, e event) {
	if e.entry.link != 0 {
		if d.entries == nil {
			d.entries = map[entryAt]bool{}
		}
		d.entries[e.entry] = true
	}
	switch {
	case e.changed, e.lost:
		d.tick = true
	case e.near.address.IsValid():
		d.tick = d.tick || w.k.asked.news(e.near)
	case e.entry.link != 0:
	case e.prefix.IsValid():
		d.routes = d.routes || e.prefix.Bits() == 0 && w.k.parent == nil
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
			if w.k.parent != nil && isTransit(name) {
				d.ends = append(d.ends, endName(w.k.name, name))
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
	slices.Sort(d.ends)
	for _, name := range slices.Compact(d.ends) {
		if parent := w.k.parent; !parent.believed.holds(ctx, parent, name) {
			return true
		}
	}
	return !w.k.entriesHold(ctx, d.entries)
}
