package kernel

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// moves bounds how often the host may put something on a link while it is emptied.
const moves = 5

// move takes everything that the host has on a link to another: addresses, next hops and routes. At
// every moment each address is on one of them or on both, and each destination has a route. The turn,
// by which packets begin to come in by the other link, is made with that of the routes.
func (k *Kernel) move(ctx context.Context, from, to *link, turn ...message) error {
	for range moves {
		if err := k.moveAll(ctx, from, to, turn); err != nil {
			return fmt.Errorf("move the host's addresses and routes from %s to %s: %w", from.name, to.name, err)
		}
		left, err := k.hostAddresses(ctx, from)
		if err != nil {
			return err
		}
		routes, err := k.routesLeft(ctx, from)
		if err != nil {
			return err
		}
		if len(left) == 0 && !routes {
			return nil
		}
	}
	return fmt.Errorf("somebody keeps putting addresses or routes on %s: tell the network configuration of the host to leave it alone", from.name)
}

func (k *Kernel) moveAll(ctx context.Context, from, to *link, turn []message) error {
	addresses, err := k.hostAddresses(ctx, from)
	if err != nil {
		return err
	}
	there, err := k.hostAddresses(ctx, to)
	if err != nil {
		return err
	}
	if err := k.change(ctx, nil, addAddresses(addresses, there, from, to)...); err != nil {
		return err
	}
	hops, err := k.moveNextHops(ctx, from, to)
	if err != nil {
		return err
	}
	direct, routed, err := k.copyRoutes(ctx, from, to)
	if err != nil {
		return err
	}
	if err := k.change(ctx, isDone, slices.Concat(turn, direct, hops, routed)...); err != nil {
		return err
	}
	if err := k.moveGenMode(ctx, from, to); err != nil {
		return err
	}
	// Back to front: the secondary addresses of a subnet before the primary, which takes them with it,
	// and the link-local one before the others.
	slices.Reverse(addresses)
	if err := k.change(ctx, isGone, removeAddresses(addresses)...); err != nil {
		return err
	}
	return k.dropRoutes(ctx, from)
}

// moveGenMode moves the mode in which the kernel makes IPv6 addresses of the link's own. The link
// that is left makes none: it would bring them back.
func (k *Kernel) moveGenMode(ctx context.Context, from, to *link) error {
	now, err := k.linksByIndex(ctx, from.index, to.index)
	if err != nil {
		return err
	}
	for _, l := range now {
		if l == nil || l.genMode < 0 {
			return nil
		}
	}
	if now[0].genMode == addrGenModeNone {
		return nil // moved already, or there was none
	}
	return k.change(ctx, nil, setGenMode(to, now[0].genMode), setGenMode(from, addrGenModeNone))
}

func setGenMode(l *link, mode int) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, about: "IPv6 address mode of " + l.name,
		body: linkBody(l.index, 0, 0, attrs{}.nest(unix.IFLA_AF_SPEC, attrs{}.
			nest(unix.AF_INET6, attrs{}.u8(unix.IFLA_INET6_ADDR_GEN_MODE, uint8(mode)))))}
}

// leftBehind reports whether an uplink still has what should be its switch's.
func (k *Kernel) leftBehind(ctx context.Context, uplink, bridge *link) (bool, error) {
	if uplink.mac != bridge.mac {
		return true, nil
	}
	addresses, err := k.hostAddresses(ctx, uplink)
	if err != nil {
		return false, err
	}
	var local bool
	for _, a := range addresses {
		if !a.linkLocal() {
			return true, nil
		}
		local = true
	}
	if local && uplink.genMode != addrGenModeNone {
		return true, nil // the move ended before it took link-local addresses away
	}
	return k.routesLeft(ctx, uplink)
}

// families are those that the kernel has.
func (k *Kernel) families() []byte {
	if k.ipv6 {
		return []byte{unix.AF_INET, unix.AF_INET6}
	}
	return []byte{unix.AF_INET}
}
