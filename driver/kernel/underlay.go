package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Underlay looks up the link of the host that has an address of the host's, and its MTU.
func (k *Kernel) Underlay(ctx context.Context, a netip.Addr) (name string, mtu int, err error) {
	bodies, err := k.route.dump(ctx, unix.RTM_GETADDR, addressBody(routeFamily(a), 0, 0, nil))
	if err != nil {
		return "", 0, fmt.Errorf("list addresses: %w", err)
	}
	for _, body := range bodies {
		index, prefix, ok := parseAddress(body)
		if !ok || prefix.Addr() != a {
			continue
		}
		links, err := k.linksByIndex(ctx, index)
		if err != nil {
			return "", 0, err
		}
		if l := links[0]; l != nil {
			return l.name, l.mtu, nil
		}
	}
	return "", 0, fmt.Errorf("no link of this host has the address %s: name one that it has: %w", a, unix.EADDRNOTAVAIL)
}

// Outgoing is the source address of what this host sends to an address; with an invalid one, of what
// it sends by its default route, that of IPv4 before that of IPv6.
func (k *Kernel) Outgoing(ctx context.Context, to netip.Addr) (netip.Addr, error) {
	if to.IsValid() {
		return k.sourceOf(ctx, to, 0)
	}
	all, err := k.mainTable(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	none := fmt.Errorf("this host has no default route: name an address of it that its peers reach: %w", unix.ENETUNREACH)
	for _, family := range k.families() {
		best := -1
		for i, r := range all {
			prefix, ok := prefixOf(r.Dst)
			if ok && prefix.Bits() == 0 && routeFamily(prefix.Addr()) == family && (r.LinkIndex != 0 || len(r.MultiPath) > 0) &&
				(best < 0 || r.Priority < all[best].Priority) {
				best = i
			}
		}
		if best < 0 {
			continue
		}
		r := all[best]
		if source, ok := netip.AddrFromSlice(r.Src); ok {
			return source.Unmap(), nil
		}
		link := r.LinkIndex
		if len(r.MultiPath) > 0 {
			link = r.MultiPath[0].LinkIndex
		}
		// Documentation addresses, which nobody has a route of his own to (RFC 5737, RFC 3849).
		outside := netip.AddrFrom4([4]byte{192, 0, 2, 1})
		if family == unix.AF_INET6 {
			outside = netip.MustParseAddr("2001:db8::1")
		}
		source, err := k.sourceOf(ctx, outside, int32(link))
		if err == nil && source.IsValid() {
			return source, nil
		}
		none = errors.Join(none, err)
	}
	return netip.Addr{}, none
}

// sourceOf asks for the route to an address, out of a link if one is named.
func (k *Kernel) sourceOf(ctx context.Context, to netip.Addr, link int32) (netip.Addr, error) {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = routeFamily(to), byte(to.BitLen())
	a := attrs{}.put(unix.RTA_DST, to.AsSlice())
	if link != 0 {
		a = a.u32(unix.RTA_OIF, uint32(link))
	}
	bodies, err := k.route.request(ctx, message{kind: unix.RTM_GETROUTE, body: slices.Concat(body, a)})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look up the route to %s: %w", to, err)
	}
	if len(bodies) == 0 || len(bodies[0]) < unix.SizeofRtMsg {
		return netip.Addr{}, fmt.Errorf("look up the route to %s: %w", to, unix.ENETUNREACH)
	}
	value, _ := attribute(bodies[0][unix.SizeofRtMsg:], unix.RTA_PREFSRC)
	source, ok := netip.AddrFromSlice(value)
	if !ok {
		return netip.Addr{}, fmt.Errorf("this host has no address to send to %s from: %w", to, unix.EADDRNOTAVAIL)
	}
	return source, nil
}
