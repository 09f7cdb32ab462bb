package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// moves bounds how often the host may put something on a link while it is emptied.
const moves = 5

// move takes everything that the host has on a link to another: addresses, neighbours, next hops and
// routes. At every moment each address is on one of them or on both, and each destination has a route.
// The turn, by which packets begin to come in by the other link, is made with that of the routes.
func (k *Kernel) move(ctx context.Context, from, to *link, turn ...message) error {
	for try := range moves {
		err := k.moveAll(ctx, from, to, turn)
		if errors.Is(err, unix.EEXIST) && try < moves-1 {
			continue // the kernel, too, has just given the link an address
		}
		if err != nil {
			return fmt.Errorf("move the host's addresses and routes from %s to %s: %w", from.name, to.name, err)
		}
		left, err := k.hostAddresses(ctx, from)
		if err != nil {
			return err
		}
		routes, err := k.routesLeft(ctx, from, hostRoute.only)
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
	removed := func(err error) bool { return errors.Is(err, unix.EADDRNOTAVAIL) }
	if err := k.change(ctx, removed, addAddresses(addresses, there, from, to)...); err != nil {
		return err
	}
	if err := k.awaitLocal(ctx, from, to); err != nil {
		return err
	}
	neighbours, err := k.neighbours(ctx, from)
	if err != nil {
		return err
	}
	if err := k.change(ctx, isDone, copyNeighbours(neighbours, to)...); err != nil {
		return err
	}
	if err := k.turnOver(ctx, from, to, turn); err != nil {
		return err
	}
	if err := k.moveGenMode(ctx, from, to); err != nil {
		return err
	}
	// Back to front: the secondary addresses of a subnet before the primary, which takes them with it,
	// and the link-local one before the others.
	slices.Reverse(addresses)
	if err := k.change(ctx, isAbsent, slices.Concat(dropNeighbours(neighbours), removeAddresses(addresses))...); err != nil {
		return err
	}
	return k.dropRoutes(ctx, from)
}

// turnOver makes the turn, and next hops and routes go out by the other link.
func (k *Kernel) turnOver(ctx context.Context, from, to *link, turn []message) error {
	advertised, err := k.advertisedRoutes(ctx, from)
	if err != nil {
		return err
	}
	own := turnAdvertised(advertised, from, to)
	for _, unchecked := range []bool{false, true} {
		hops, err := k.moveNextHops(ctx, from, to, unchecked)
		if err != nil {
			return err
		}
		direct, routed, err := k.copyRoutes(ctx, from, to, unchecked)
		if err != nil {
			return err
		}
		if len(advertised) > 0 { // others of their slot wait for the next time
			routed = slices.DeleteFunc(routed, func(m message) bool { return isAdvertised(m, advertised) })
		}
		// The kernel throws next hops away when their link loses its carrier, as a switch does with its
		// uplink: they are there only while it has one.
		changes := slices.Concat(turn, direct, hops, own, routed)
		if isSwitch(from.name) {
			changes = slices.Concat(direct, hops, turn, own, routed)
		}
		// The kernel checks only when a route is made that the router is on the link. One whose router
		// no longer is goes on as it is, unchecked. If that is refused too, the host loses it with the
		// switch: it led nowhere, and must not keep the switch from being deleted.
		missed := false
		err = k.change(ctx, func(err error) bool {
			unreachable := errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EINVAL)
			switch {
			case isDone(err):
			case unreachable && !unchecked:
				missed = true
			case unreachable && isSwitch(from.name):
				k.log.WithError(err).Warnf("a route whose router was not on %s is lost", from.name)
			default:
				return false
			}
			return true
		}, changes...)
		if err != nil {
			return err
		}
		if !missed {
			break
		}
	}
	return k.ownAdvertised(ctx, advertised, to)
}

// localTime is how long the kernel may take to use an IPv6 address that is added without a proof,
// which it does behind the answer, usually within a millisecond.
const localTime = 2 * time.Second

// awaitLocal waits until what is for the host's IPv6 addresses on a link would be taken without them.
func (k *Kernel) awaitLocal(ctx context.Context, from, to *link) error {
	if !k.ipv6 {
		return nil
	}
	wanted, err := k.localRoutes(ctx, from)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(localTime); ; pause(ctx, time.Millisecond) {
		there, err := k.localRoutes(ctx, to)
		if err != nil {
			return err
		}
		maps.DeleteFunc(wanted, func(a netip.Addr, _ bool) bool { return there[a] })
		switch {
		case len(wanted) == 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("the kernel has not begun to use %d addresses on %s within %s", len(wanted), to.name, localTime)
		}
	}
}

// localRoutes are the IPv6 addresses by which the kernel takes packets as the host's because of a link.
func (k *Kernel) localRoutes(ctx context.Context, l *link) (map[netip.Addr]bool, error) {
	routes, err := k.listRoutes(ctx, unix.AF_INET6, l.index)
	out := map[netip.Addr]bool{}
	for _, r := range routes {
		if r.comesAndGoes() && r[routeType] == unix.RTN_LOCAL {
			address, _ := netip.AddrFromSlice(r.attribute(unix.RTA_DST))
			out[address] = true
		}
	}
	return out, err
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

// leftBehind reports whether an uplink still has what should be its switch's, or another MAC or MTU.
func (k *Kernel) leftBehind(ctx context.Context, uplink, bridge *link) (bool, error) {
	if uplink.mac != bridge.mac || uplink.mtu != bridge.mtu {
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
	return k.routesLeft(ctx, uplink, hostRoute.through)
}

// families are those that the kernel has.
func (k *Kernel) families() []byte {
	if k.ipv6 {
		return []byte{unix.AF_INET, unix.AF_INET6}
	}
	return []byte{unix.AF_INET}
}
