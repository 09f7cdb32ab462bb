package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// A macvlan in mode bridge is the host's own, or a container's until the engine moves it into the
// container. The other end of an endpoint's veth pair has the container's prefix too, and no mark.
const (
	shimPrefix      = "dwm"
	containerPrefix = "dwc"
	kindMacvlan     = "macvlan"
	modeBridge      = 4 // MACVLAN_MODE_BRIDGE
)

// isMacvlan reports whether a link's name promises a macvlan.
func isMacvlan(name string) bool {
	return strings.HasPrefix(name, shimPrefix) || strings.HasPrefix(name, containerPrefix)
}

// macvlan is the plan's view of a link that its name promises to be one. Of another kind or mode,
// nothing about it is right.
func (l *link) macvlan(lower string) plan.Macvlan {
	m := plan.Macvlan{Name: l.name, Alias: l.alias}
	if l.kind == kindMacvlan && l.mode == modeBridge {
		m.Lower, m.MAC, m.MTU, m.Up = lower, l.mac, l.mtu, l.up
	}
	return m
}

// macvlanMode reads IFLA_INFO_DATA of a macvlan.
func macvlanMode(data []byte) uint32 {
	if mode, ok := attribute(data, unix.IFLA_MACVLAN_MODE); ok && len(mode) == 4 {
		return binary.NativeEndian.Uint32(mode)
	}
	return 0
}

// putMacvlan makes a macvlan. One that is on another lower link, or of another mode, is made anew:
// neither can be changed.
func (k *Kernel) putMacvlan(ctx context.Context, m plan.Macvlan) error {
	lower, err := k.link(ctx, m.Lower)
	switch {
	case err != nil:
		return err
	case lower == nil:
		return fmt.Errorf("lower link %s: %w: name a link of the host", m.Lower, unix.ENODEV)
	case m.MTU > lower.mtu:
		return fmt.Errorf("MTU %d is above the %d of lower link %s: choose a smaller one", m.MTU, lower.mtu, m.Lower)
	}
	old, err := k.mine(ctx, m.Name)
	if err != nil {
		return err
	}
	if old != nil && old.kind == kindMacvlan && (old.lower != lower.index || old.mode != modeBridge) {
		if _, err := k.route.request(ctx, deleteLink(m.Name)); err != nil && !isGone(err) {
			return err
		}
	}
	what := attrs{}.put(unix.IFLA_ADDRESS, m.MAC[:]).u32(unix.IFLA_MTU, uint32(m.MTU))
	create := createLink(m.Name, append(attrs{}.
		u32(unix.IFLA_LINK, uint32(lower.index)).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindMacvlan).
			nest(unix.IFLA_INFO_DATA, attrs{}.u32(unix.IFLA_MACVLAN_MODE, modeBridge))), what...))
	configure := tuneLink(m.Name, k.withoutAutoconf(append(attrs{}.
		u32(unix.IFLA_GROUP, 0).str(unix.IFLA_IFALIAS, m.Alias), what...), m.MTU))
	err = k.putLink(ctx, m.Name, kindMacvlan, m.MTU, create, configure)
	if err == nil {
		// By itself: with carrier at once, it would have an IPv6 address before it is told to have none.
		_, err = k.route.request(ctx, changeLink(m.Name, m.Up, nil))
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return k.busy(ctx, lower, err)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("another link on %s has the MAC %s: choose another: %w", lower.name, m.MAC, err)
	}
	return err
}

// busy says who has a lower link that a macvlan could not be put on.
func (k *Kernel) busy(ctx context.Context, lower *link, err error) error {
	if lower.master == 0 {
		return fmt.Errorf("lower link %s is taken by links of another kind, such as an ipvlan: remove them: %w", lower.name, err)
	}
	masters, lookup := k.linksByIndex(ctx, lower.master)
	if lookup != nil {
		return errors.Join(err, lookup)
	}
	if masters[0] == nil {
		return err
	}
	return fmt.Errorf("lower link %s is a port of %s %s, and a port cannot carry a macvlan: put it on %s, or take %s out of %s: %w",
		lower.name, masters[0].kind, masters[0].name, masters[0].name, lower.name, masters[0].name, err)
}
