package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// shortcuts are the fast paths of a namespace's bridges. They are an acceleration: what goes wrong with
// one is told once, and then it counts as there, so that nothing waits for it. Attaching a port takes
// some 10 ms, in which the kernel waits for all its processors; it is done in the background.
type shortcuts struct {
	mu      sync.Mutex
	paths   map[string]*fastpath.Path  // by bridge
	devices map[string]string          // the bridges of VXLAN devices and uplinks that are attached
	counted map[plan.Key]plan.Shortcut // what counts as there, and is not, or not yet
	due     []plan.Shortcut            // ports to be attached
	waiting []plan.Shortcut            // those whose container's end has yet to leave
	told    bool                       // that some are not there
}

func (s *shortcuts) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, p := range s.paths {
		err = errors.Join(err, p.Close())
	}
	s.paths = nil
	return err
}

// path is the fast path of a bridge. The caller holds the lock.
func (k *Kernel) path(bridge string) (*fastpath.Path, error) {
	s := &k.shortcuts
	if p := s.paths[bridge]; p != nil {
		return p, nil
	}
	open := fastpath.Open
	if k.parent == nil {
		open = fastpath.OpenSwitch
	}
	p, err := open(k.namespace, bridge)
	if err != nil {
		return nil, err
	}
	if s.paths == nil {
		s.paths = map[string]*fastpath.Path{}
	}
	s.paths[bridge] = p
	return p, nil
}

// putShortcut attaches a VXLAN device or an uplink, or has a port attached soon.
func (k *Kernel) putShortcut(ctx context.Context, o plan.Shortcut) {
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counted == nil {
		s.counted, s.devices = map[plan.Key]plan.Shortcut{}, map[string]string{}
	}
	s.counted[o.Key()] = o
	if o.MAC != (plan.MAC{}) {
		s.due = append(s.due, o)
		k.shortener.wake()
		return
	}
	p, err := k.path(o.Bridge)
	if err == nil {
		err = k.attachRemote(ctx, p, o)
	}
	k.attached(o, err)
}

// attachRemote attaches what leads to others, and has the fast path know them.
func (k *Kernel) attachRemote(ctx context.Context, p *fastpath.Path, o plan.Shortcut) error {
	attach, follow := p.AttachVXLAN, k.follow
	if k.parent == nil {
		attach, follow = p.AttachUplink, k.hearStations
	}
	if err := attach(o.Link); err != nil {
		return err
	}
	if err := follow(ctx, p, o); err != nil {
		return err
	}
	k.shortcuts.devices[o.Link] = o.Bridge
	return nil
}

// attached takes note of what became of one. The caller holds the lock.
func (k *Kernel) attached(o plan.Shortcut, err error) {
	s := &k.shortcuts
	// An uplink that has gone may return: what is there then is another.
	gone := o.MAC == (plan.MAC{}) && (errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV))
	if err == nil || gone {
		delete(s.counted, o.Key())
		return
	}
	if !s.told {
		k.log.WithError(err).Warnf("TCP and UDP go by the bridge %s, which takes longer", o.Bridge)
	}
	s.told = true
}

// shortenDue attaches the ports that are due.
func (k *Kernel) shortenDue(ctx context.Context) error {
	s := &k.shortcuts
	s.mu.Lock()
	s.due, s.waiting = append(s.due, s.waiting...), nil
	s.mu.Unlock()
	for ctx.Err() == nil {
		s.mu.Lock()
		if len(s.due) == 0 {
			s.mu.Unlock()
			return nil
		}
		o := s.due[0]
		s.due = s.due[1:]
		if s.counted[o.Key()] != o { // not wanted any more, or otherwise
			s.mu.Unlock()
			continue
		}
		p, err := k.path(o.Bridge)
		s.mu.Unlock()
		if err == nil && k.parent == nil {
			err = k.bindMAC(ctx, o)
		}
		if err == nil {
			err = p.Attach(fastpath.Port{Link: o.Link, MAC: o.MAC, Addresses: slices.DeleteFunc(o.Addresses[:], func(a netip.Addr) bool { return !a.IsValid() })})
		}
		s.mu.Lock()
		if now, wanted := s.counted[o.Key()]; wanted && errors.Is(err, fastpath.ErrTogether) {
			if now == o {
				s.waiting = append(s.waiting, o)
			}
		} else if wanted {
			k.attached(o, err)
		} else if err == nil {
			err = k.detachPort(ctx, p, o)
			k.attached(o, err)
		}
		s.mu.Unlock()
	}
	return nil
}

// follow has the fast path know just those MACs behind a VXLAN device that its FDB knows, and from now
// on all that come and go.
func (k *Kernel) follow(ctx context.Context, p *fastpath.Path, o plan.Shortcut) error {
	all, err := k.listLinks(ctx)
	if err != nil {
		return err
	}
	there := plan.State{}
	if _, err := k.observeAllEntries(ctx, all, there); err != nil {
		return err
	}
	known, err := p.List()
	if err != nil {
		return err
	}
	var come, gone []plan.MAC
	for mac, device := range known.Remote {
		if device == o.Link && there[plan.FDB{Link: o.Link, MAC: mac}.Key()] == nil {
			gone = append(gone, mac)
		}
	}
	for _, entry := range there {
		if f, ok := entry.(plan.FDB); ok && f.Link == o.Link && known.Remote[f.MAC] != o.Link {
			come = append(come, f.MAC)
		}
	}
	return errors.Join(p.Remove(o.Link, gone...), p.Put(o.Link, come...))
}

// shortenEntries follows FDB entries of VXLAN devices that came and went.
func (k *Kernel) shortenEntries(done []mapping) {
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	come, gone := map[string][]plan.MAC{}, map[string][]plan.MAC{}
	for _, m := range done {
		if m.key.address.IsValid() || s.devices[m.link.name] == "" {
			continue
		}
		if m.Verb == plan.Delete {
			gone[m.link.name] = append(gone[m.link.name], m.key.mac)
		} else {
			come[m.link.name] = append(come[m.link.name], m.key.mac)
		}
	}
	for device := range s.devices {
		p := s.paths[s.devices[device]]
		if p == nil || len(come[device])+len(gone[device]) == 0 {
			continue
		}
		if err := errors.Join(p.Remove(device, gone[device]...), p.Put(device, come[device]...)); err != nil {
			k.log.WithError(err).Warn("some containers of other hosts are reached by the bridge, which takes longer")
		}
	}
}

func (k *Kernel) deleteShortcut(ctx context.Context, o plan.Shortcut) error {
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.counted, o.Key())
	if o.MAC == (plan.MAC{}) {
		delete(s.devices, o.Link)
		k.stations.mu.Lock()
		k.stations.forget(o.Bridge)
		k.stations.mu.Unlock()
	}
	p, err := k.path(o.Bridge)
	if errors.Is(err, fastpath.ErrUnsupported) || errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if o.MAC == (plan.MAC{}) {
		return p.Detach(o.Link)
	}
	return k.detachPort(ctx, p, o)
}

// endShortcuts ends the fast path of a switch that is to be deleted. Whoever made it may have been killed, and
// what is at the uplink is not observed unless it is followed.
func (k *Kernel) endShortcuts(bridge, uplink string) {
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	k.stations.mu.Lock()
	k.stations.forget(bridge)
	k.stations.mu.Unlock()
	delete(s.devices, uplink)
	var err error
	if p := s.paths[bridge]; p != nil {
		delete(s.paths, bridge)
		err = p.Close()
	}
	if err := errors.Join(err, fastpath.Free(k.namespace, uplink)); err != nil {
		k.log.WithError(err).Warnf("the way past switch %s may have left a program at %s, which does nothing without the switch", bridge, uplink)
	}
}

func (k *Kernel) detachPort(ctx context.Context, p *fastpath.Path, o plan.Shortcut) error {
	err := p.DetachPort(o.Link, o.MAC)
	if k.parent == nil {
		err = errors.Join(err, k.unbindMAC(ctx, o))
	}
	return err
}

const ntfSticky = 1 << 6 // NTF_STICKY of linux/neighbour.h

// bindMAC tells a switch who is behind a port of ours, once and for all. It would learn that, but hears
// little of whom goes past it: it would forget, and then send what it still has for the container to all
// ports, or believe anybody on the LAN who says to be it.
func (k *Kernel) bindMAC(ctx context.Context, o plan.Shortcut) error {
	l, err := k.mine(ctx, o.Link)
	if err == nil && l == nil {
		err = unix.ENODEV
	}
	if err == nil {
		_, err = k.route.request(ctx, bind(l.index, o.MAC))
	}
	if err != nil {
		return fmt.Errorf("tell switch %s that %s is behind %s: %w", o.Bridge, o.MAC, o.Link, err)
	}
	return nil
}

func bind(port int32, mac plan.MAC) message {
	return message{kind: unix.RTM_NEWNEIGH, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_REPLACE,
		body: fdbBody(port, staticFDB, unix.NTF_MASTER|ntfSticky, mac)}
}

// unbindMAC has the switch learn it again. A link that is gone, or going, takes that with it.
func (k *Kernel) unbindMAC(ctx context.Context, o plan.Shortcut) error {
	l, err := k.link(ctx, o.Link)
	if err != nil || l == nil || !l.ours() {
		return err
	}
	_, err = k.route.request(ctx, message{kind: unix.RTM_DELNEIGH, flags: unix.NLM_F_ACK, body: fdbBody(l.index, 0, unix.NTF_MASTER, o.MAC)})
	if noEntry(err) || errors.Is(err, unix.EINVAL) { // EINVAL: it is no port
		return nil
	}
	return err
}

// observeShortcut looks one up by its key.
func (k *Kernel) observeShortcut(key plan.Key, out plan.State) error {
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := s.counted[key]; ok {
		out.Add(o)
		return nil
	}
	var o plan.Shortcut
	var mac string
	if _, err := fmt.Sscan(key.Name, &o.Bridge, &o.Link, &mac); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if err := o.MAC.UnmarshalText([]byte(mac)); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	p, err := k.path(o.Bridge)
	if err != nil {
		return nil // no bridge, or no fast path: nothing is there
	}
	if port, there, err := p.Lookup(o.Link, o.MAC); err == nil && there && k.following(o) {
		copy(o.Addresses[:], port.Addresses)
		out.Add(o)
	}
	return nil
}

// following reports whether the MACs behind a VXLAN device or an uplink are followed, since the start of
// this process.
func (k *Kernel) following(o plan.Shortcut) bool {
	return o.MAC != (plan.MAC{}) || k.shortcuts.devices[o.Link] == o.Bridge
}

// observeAllShortcuts lists those of the namespace's bridges: in the host's, of switches.
func (k *Kernel) observeAllShortcuts(all []*link, out plan.State) error {
	prefix := bridgePrefix
	if k.parent == nil {
		prefix = switchPrefix
	}
	s := &k.shortcuts
	s.mu.Lock()
	defer s.mu.Unlock()
	for o := range maps.Values(s.counted) {
		out.Add(o)
	}
	for _, l := range all {
		if !l.ours() || l.kind != kindBridge || !strings.HasPrefix(l.name, prefix) {
			continue
		}
		p, err := k.path(l.name)
		if err != nil {
			continue
		}
		state, err := p.List()
		if err != nil {
			return err
		}
		for _, port := range state.Ports {
			o := plan.Shortcut{Bridge: l.name, Link: port.Link, MAC: port.MAC}
			copy(o.Addresses[:], port.Addresses)
			out.Add(o)
		}
		for _, device := range state.VXLAN {
			if o := (plan.Shortcut{Bridge: l.name, Link: device}); k.following(o) {
				out.Add(o)
			}
		}
	}
	return nil
}
