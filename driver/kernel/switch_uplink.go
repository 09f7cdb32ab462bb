package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Uplink looks up a link that a switch is to hold, or that is a bridge and is used as it is. The
// error of one that cannot be an uplink says why, and what to do.
func (k *Kernel) Uplink(ctx context.Context, name string) (plan.Uplink, error) {
	l, master, err := k.linkAndMaster(ctx, name)
	if err != nil {
		return plan.Uplink{}, err
	}
	if err := l.checkUplink(name); err != nil {
		return plan.Uplink{}, err
	}
	u := plan.Uplink{Name: name, MAC: l.mac, MTU: l.mtu, Bridge: l.kind == kindBridge}
	u.Switch = master != nil && master.ours() && isSwitch(master.name)
	holder := l
	if u.Switch {
		holder = master
	}
	addresses, err := k.hostAddresses(ctx, holder)
	if err != nil {
		return plan.Uplink{}, err
	}
	for _, a := range addresses {
		if !a.linkLocal() {
			u.Addresses = append(u.Addresses, a.prefix())
		}
	}
	switch {
	case l.master == 0:
	case u.Switch:
		return u, nil // up or not: it is the switch's
	default:
		return plan.Uplink{}, l.portOf(master)
	}
	return u, l.checkUp()
}

// freeUplink looks up what a switch is to hold. All that speaks against it is said before anything is
// changed.
func (k *Kernel) freeUplink(ctx context.Context, s plan.Switch, bridge *link) (*link, error) {
	l, master, err := k.linkAndMaster(ctx, s.Uplink)
	if err != nil {
		return nil, err
	}
	if err := l.checkUplink(s.Uplink); err != nil {
		return nil, err
	}
	switch {
	case l.kind == kindBridge:
		return nil, fmt.Errorf("uplink %s is a bridge: it is used as it is, and needs no switch", l.name)
	case l.master == 0:
		return l, l.checkUp()
	case bridge != nil && l.master == bridge.index:
		return l, nil
	}
	return nil, l.portOf(master)
}

func (k *Kernel) linkAndMaster(ctx context.Context, name string) (l, master *link, err error) {
	if l, err = k.link(ctx, name); err != nil || l == nil || l.master == 0 {
		return l, nil, err
	}
	found, err := k.linksByIndex(ctx, l.master)
	if err != nil {
		return nil, nil, err
	}
	return l, found[0], nil
}

// checkUplink says why a link cannot be an uplink at all.
func (l *link) checkUplink(name string) error {
	switch {
	case l == nil:
		return fmt.Errorf("uplink %s is not there: plug it in, or name another link of the host with interface= (%w)", name, unix.ENODEV)
	case l.named() && !strings.HasPrefix(l.name, vlanPrefix):
		return fmt.Errorf("uplink %s is one of dockway's own links: name a link of the host with interface=", name)
	case l.loopback:
		return fmt.Errorf("uplink %s is the loopback link, which leads nowhere: name a network card with interface=", name)
	case !l.ethernet:
		return fmt.Errorf("uplink %s is not Ethernet, so a switch cannot hold it: name a network card with interface=", name)
	}
	return nil
}

func (l *link) checkUp() error {
	if l.up {
		return nil
	}
	return fmt.Errorf("uplink %s is down: bring it up (ip link set %s up), or name another with interface= (%w)", l.name, l.name, unix.ENETDOWN)
}

// portOf is the refusal of a link that is somebody's already.
func (l *link) portOf(master *link) error {
	if master == nil {
		return fmt.Errorf("uplink %s is a port of another link: take it out, or name another with interface=", l.name)
	}
	return fmt.Errorf("uplink %s is a port of %s already: name %s with interface=, or take %s out of it (ip link set %s nomaster)",
		l.name, master.name, master.name, l.name, l.name)
}

// notEnslaved explains why the kernel does not make a link a port.
func notEnslaved(uplink *link, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("uplink %s is in use by another link (a macvlan, an ipvlan or a bond takes all its packets): remove that, or name another uplink with interface= (%w)", uplink.name, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("uplink %s cannot be a port of a bridge, as a wireless one cannot: name another with interface= (%w)", uplink.name, err)
	}
	return err
}
