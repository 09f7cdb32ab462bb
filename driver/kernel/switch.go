package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// A switch holds what is the host's, so nothing about it may be lost, whenever this process ends.
// Every step adds to where something goes before it takes away from where it was, and what there is
// to do is always read from the kernel: whoever comes after a crash repeats the call, and it goes on
// where the other stopped. What would cut the host off if it were done by half is one write, which the
// kernel carries out to its end even if the process is killed meanwhile.

// isSwitch reports whether a link has the name of a switch.
func isSwitch(name string) bool { return strings.HasPrefix(name, switchPrefix) }

// putSwitch makes a switch, or what is left to do of it: the uplink becomes its port, and what the
// host had on the uplink moves to the switch.
func (k *Kernel) putSwitch(ctx context.Context, s plan.Switch) error {
	k.switching.Lock()
	defer k.switching.Unlock()
	bridge, err := k.findSwitch(ctx, s.Name)
	if err != nil {
		return err
	}
	if bridge != nil {
		k.believed.expect(s.Name, s.Uplink)
	}
	uplink, err := k.freeUplink(ctx, s, bridge)
	if err != nil {
		return err
	}
	made := bridge == nil
	if made {
		bridge, err = k.newSwitch(ctx, s, uplink)
	} else {
		var old []message
		if old, err = k.outdated(ctx, uplink, bridge); err == nil {
			err = k.change(ctx, isAbsent, append(old, putBack(uplink, bridge, s)...)...)
		}
	}
	if err != nil {
		return err
	}
	k.believed.expect(s.Name, s.Uplink)
	if uplink.master != bridge.index {
		// Whether the kernel lets it be a port shows here, where it is no port yet when the write ends.
		if err := k.change(ctx, nil, enslave(uplink, bridge), release(uplink)); err != nil {
			err = notEnslaved(uplink, err)
			if made {
				k.believed.expect(s.Name, "")
				err = errors.Join(err, k.doomSwitch(ctx, bridge))
			}
			return err
		}
	}
	return k.move(ctx, uplink, bridge, enslave(uplink, bridge))
}

// deleteSwitch gives the uplink back what it had, and what the host has put on the switch since, and
// deletes the switch. If the uplink is gone there is nobody to give it to.
func (k *Kernel) deleteSwitch(ctx context.Context, s plan.Switch) error {
	k.switching.Lock()
	defer k.switching.Unlock()
	bridge, err := k.findSwitch(ctx, s.Name)
	if err != nil || bridge == nil {
		k.believed.expect(s.Name, "")
		return err
	}
	uplink, err := k.uplinkOf(ctx, s, bridge)
	if err != nil {
		return err
	}
	k.believed.expect(s.Name, "")
	if uplink == nil {
		k.endShortcuts(s.Name, s.Uplink)
		if err := k.dropAddresses(ctx, bridge); err != nil {
			return err
		}
		return k.doomSwitch(ctx, bridge)
	}
	k.endShortcuts(s.Name, uplink.name)
	if !uplink.up || !bridge.up { // no route goes through a link that is down
		if err := k.change(ctx, nil, upLink(uplink), upLink(bridge)); err != nil {
			return err
		}
	}
	var turn []message
	if uplink.master == bridge.index {
		turn = append(turn, release(uplink))
	}
	if err := k.move(ctx, bridge, uplink, turn...); err != nil {
		return err
	}
	return k.doomSwitch(ctx, bridge)
}

// doomSwitch is doom for a switch. The reaper looks again whether it holds anything of the host's.
func (k *Kernel) doomSwitch(ctx context.Context, bridge *link) error {
	err := k.change(ctx, isGone, bridge.toGroup(doomedGroup))
	k.reaper.wake()
	return err
}

// findSwitch looks a switch up: nil when there is none. One that is to be deleted but holds what is
// the host's was put among the doomed by somebody else, and is there.
func (k *Kernel) findSwitch(ctx context.Context, name string) (*link, error) {
	for range attempts {
		l, err := k.link(ctx, name)
		switch {
		case err != nil || l == nil:
			return nil, err
		case l.doomed() || l.unfinished():
			holds, err := k.holdsHost(ctx, l)
			if err != nil {
				return nil, err
			}
			if holds {
				return l, nil
			}
			if _, err := k.route.request(ctx, deleteLink(name)); err != nil && !isGone(err) {
				return nil, err
			}
		case !l.ours() || l.kind != kindBridge:
			return nil, &ForeignError{Name: name, Alias: l.alias}
		default:
			return l, nil
		}
	}
	return nil, fmt.Errorf("link %s appears again and again: %w", name, unix.EEXIST)
}

// newSwitch makes the bridge. Like every link it is born doomed; it has the uplink's settings before
// it gets its mark.
func (k *Kernel) newSwitch(ctx context.Context, s plan.Switch, uplink *link) (*link, error) {
	// With an MTU that somebody has set the kernel leaves it alone; else a container's smaller one
	// would become the host's. What is there already counts as not set.
	other := uplink.mtu + 1
	if uplink.mtu >= maxMTU {
		other = uplink.mtu - 1
	}
	create := createLink(s.Name, attrs{}.put(unix.IFLA_ADDRESS, uplink.mac[:]).u32(unix.IFLA_MTU, uint32(other)).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindBridge).
			nest(unix.IFLA_INFO_DATA, attrs{}.
				u32(unix.IFLA_BR_FORWARD_DELAY, 0).u32(unix.IFLA_BR_STP_STATE, 0))))
	if err := k.change(ctx, nil, create); err != nil {
		return nil, err
	}
	l, err := k.finishSwitch(ctx, s, uplink)
	if err != nil {
		return nil, errors.Join(err, k.change(ctx, isGone, deleteLink(s.Name)))
	}
	return l, nil
}

func (k *Kernel) finishSwitch(ctx context.Context, s plan.Switch, uplink *link) (*link, error) {
	if err := k.change(ctx, nil, tuneLink(s.Name, attrs{}.u32(unix.IFLA_MTU, uint32(uplink.mtu)))); err != nil {
		return nil, err
	}
	if err := k.copySettings(uplink.name, s.Name); err != nil {
		return nil, err
	}
	// The link-local address moves like any other; the kernel is not to make one of its own before.
	if err := k.change(ctx, nil, inPlaceOf(uplink, s, k.withoutAutoconf(attrs{}, uplink.mtu))); err != nil {
		return nil, err
	}
	l, err := k.link(ctx, s.Name)
	if err == nil && l == nil {
		err = fmt.Errorf("link %s: %w", s.Name, unix.ENODEV)
	}
	return l, err
}

// inPlaceOf makes a bridge look like the uplink from outside, and gives it its mark.
func inPlaceOf(uplink *link, s plan.Switch, a attrs) message {
	return changeLink(s.Name, true, a.put(unix.IFLA_ADDRESS, uplink.mac[:]).
		u32(unix.IFLA_MTU, uint32(uplink.mtu)).str(unix.IFLA_IFALIAS, s.Alias))
}

// putBack lists what a bridge that is there lacks to look so. What is as it should be is not touched:
// even with the same MAC the kernel forgets all neighbours.
func putBack(uplink, bridge *link, s plan.Switch) []message {
	var a attrs
	if bridge.mac != uplink.mac {
		a = a.put(unix.IFLA_ADDRESS, uplink.mac[:])
	}
	if bridge.mtu != uplink.mtu {
		a = a.u32(unix.IFLA_MTU, uint32(uplink.mtu))
	}
	if bridge.alias != s.Alias {
		a = a.str(unix.IFLA_IFALIAS, s.Alias)
	}
	if len(a) == 0 && bridge.up && bridge.group == 0 {
		return nil
	}
	return []message{changeLink(s.Name, true, a)}
}

func enslave(port, bridge *link) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, about: "make " + port.name + " a port", body: linkBody(port.index, 0, 0, attrs{}.u32(unix.IFLA_MASTER, uint32(bridge.index)))}
}

func release(port *link) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(port.index, 0, 0, attrs{}.u32(unix.IFLA_MASTER, 0))}
}

func upLink(l *link) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(l.index, unix.IFF_UP, unix.IFF_UP, nil)}
}

// largestWrite is how many changes the kernel is asked for at once. Their answers wait to be read.
const largestWrite = 512

// change carries out changes of a switch in one write, or in as few as may be. The first that the
// kernel refuses is the error, but for what is fine.
func (k *Kernel) change(ctx context.Context, fine func(error) bool, changes ...message) error {
	for len(changes) > 0 {
		n := min(len(changes), largestWrite)
		var died error
		if k.interrupt != nil {
			n, died = k.interrupt(n)
		}
		batch := changes[:n]
		if n > 0 {
			replies, err := k.route.exchange(ctx, batch...)
			if err != nil {
				return err
			}
			for i, r := range replies {
				if r.err == nil || fine != nil && fine(r.err) {
					continue
				}
				if batch[i].about != "" {
					return fmt.Errorf("%s: %w", batch[i].about, r.err)
				}
				return r.err
			}
		}
		if died != nil {
			return died
		}
		changes = changes[n:]
	}
	return nil
}

// observeSwitches looks switches up by name.
func (k *Kernel) observeSwitches(ctx context.Context, names []string, out plan.State) error {
	found, err := k.links(ctx, names...)
	if err != nil {
		return err
	}
	for _, l := range found {
		if l == nil || !l.ours() {
			continue
		}
		ports, err := k.portsOf(ctx, l)
		if err != nil {
			return err
		}
		if err := k.observeSwitch(ctx, l, ports, out); err != nil {
			return err
		}
	}
	return nil
}

// observeSwitch adds a switch of ours, given its ports.
func (k *Kernel) observeSwitch(ctx context.Context, l *link, ports []*link, out plan.State) error {
	s := plan.Switch{Name: l.name, Alias: l.alias}
	if l.kind != kindBridge {
		out.Add(s)
		return nil
	}
	s.Up = l.up
	if uplink := uplinkAmong(l, ports); uplink != nil {
		left, err := k.leftBehind(ctx, uplink, l)
		if err != nil {
			return fmt.Errorf("switch %s: %w", l.name, err)
		}
		s.Uplink, s.Moved = uplink.name, !left
	}
	out.Add(s)
	return nil
}

// portsOf lists a bridge's ports.
func (k *Kernel) portsOf(ctx context.Context, bridge *link) ([]*link, error) {
	bodies, err := k.route.dump(ctx, unix.RTM_GETLINK, linkBody(0, 0, 0, attrs{}.
		u32(unix.IFLA_MASTER, uint32(bridge.index)).u32(unix.IFLA_EXT_MASK, skipStats)))
	if err != nil {
		return nil, fmt.Errorf("list ports of %s: %w", bridge.name, err)
	}
	var out []*link
	for _, body := range bodies {
		if l := parseLink(body); l != nil && l.master == bridge.index {
			out = append(out, l)
		}
	}
	return out, nil
}

// uplinkAmong finds the uplink among the ports of a switch: the one whose MAC the switch has. If
// there is none it is the first that is no container's or virtual machine's: its MAC may have been
// changed.
func uplinkAmong(bridge *link, ports []*link) *link {
	var first *link
	for _, p := range ports {
		if p.master != bridge.index || strings.HasPrefix(p.name, vethPrefix) {
			continue
		}
		if p.mac == bridge.mac {
			return p
		}
		if first == nil && p.kind != kindTun {
			first = p
		}
	}
	return first
}

// uplinkOf finds the link that a switch stands in for: its port, or, when that was taken out, the one
// of its name, or of its MAC. There may be none.
func (k *Kernel) uplinkOf(ctx context.Context, s plan.Switch, bridge *link) (*link, error) {
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil, err
	}
	if port := uplinkAmong(bridge, all); port != nil {
		return port, nil
	}
	expected := k.believed.expected(s.Name)
	var alike []*link
	for _, l := range all {
		switch {
		case l.master != 0 || l.named() && !strings.HasPrefix(l.name, vlanPrefix):
		case l.name == s.Uplink || l.name == expected:
			return l, nil
		case l.mac == bridge.mac:
			alike = append(alike, l)
		}
	}
	if len(alike) == 1 {
		return alike[0], nil
	}
	return nil, nil
}

// holdsHost reports whether a switch holds what is the host's: an uplink, or an address.
func (k *Kernel) holdsHost(ctx context.Context, l *link) (bool, error) {
	ports, err := k.portsOf(ctx, l)
	if err != nil {
		return false, err
	}
	if uplinkAmong(l, ports) != nil {
		return true, nil
	}
	addresses, err := k.hostAddresses(ctx, l)
	if err != nil {
		return false, err
	}
	for _, a := range addresses {
		if !a.linkLocal() {
			return true, nil
		}
	}
	return false, nil
}
