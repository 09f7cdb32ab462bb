package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Routes lists the routes of the main table, IPv4 and IPv6, default routes left out. A route of no
// link, such as a blackhole, has an empty link.
func (k *Kernel) Routes(ctx context.Context) ([]plan.HostRoute, error) {
	all, err := k.routes(ctx)
	return slices.DeleteFunc(all, func(r plan.HostRoute) bool { return r.Prefix.Bits() == 0 }), err
}

// Uplinks names the links that carry a default route, sorted.
func (k *Kernel) Uplinks(ctx context.Context) ([]string, error) {
	all, err := k.routes(ctx)
	var out []string
	for _, r := range all {
		if r.Prefix.Bits() == 0 && r.Link != "" {
			out = append(out, r.Link)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), err
}

// routes lists the main table, a route of several hops once for each.
func (k *Kernel) routes(ctx context.Context) ([]plan.HostRoute, error) {
	all, err := k.mainTable(ctx)
	if err != nil {
		return nil, err
	}
	var out []plan.HostRoute
	var indices []int32 // of out
	for _, r := range all {
		prefix, ok := prefixOf(r.Dst)
		if !ok {
			continue
		}
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
		}
		for _, hop := range hops {
			out = append(out, plan.HostRoute{Prefix: prefix, OnLink: hop.LinkIndex != 0 && hop.Gw == nil && hop.Via == nil})
			indices = append(indices, int32(hop.LinkIndex))
		}
	}
	links, err := k.linksByIndex(ctx, nonZero(indices)...)
	if err != nil {
		return nil, err
	}
	names, doomed := map[int32]string{}, map[int32]bool{}
	for _, l := range links {
		if l != nil {
			names[l.index], doomed[l.index] = l.name, l.doomed()
		}
	}
	var kept []plan.HostRoute
	for i, r := range out {
		if !doomed[indices[i]] {
			r.Link = names[indices[i]]
			kept = append(kept, r)
		}
	}
	return kept, nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	bits, size := n.Mask.Size()
	address, ok := netip.AddrFromSlice(n.IP)
	if size == 32 {
		address = address.Unmap()
	}
	return netip.PrefixFrom(address, bits), ok && size > 0
}

func (k *Kernel) mainTable(ctx context.Context) ([]netlink.Route, error) {
	for range dumpRetries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		routes, err := k.handle.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
		if err == nil {
			return routes, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	return nil, fmt.Errorf("list routes: %w", netlink.ErrDumpInterrupted)
}

// Own reports whether an address is one of the host's own: whether what is sent to it stays here.
func (k *Kernel) Own(ctx context.Context, a netip.Addr) (bool, error) {
	family := byte(unix.AF_INET6)
	if a.Is4() {
		family = unix.AF_INET
	}
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = family, byte(a.BitLen())
	bodies, err := k.route.request(ctx, message{kind: unix.RTM_GETROUTE, body: append(body, attrs{}.put(unix.RTA_DST, a.AsSlice())...)})
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL) {
		return false, nil // no route, or one that refuses
	}
	if err != nil {
		return false, fmt.Errorf("look up the route to %s: %w", a, err)
	}
	const typeOf = 7
	return len(bodies) > 0 && len(bodies[0]) > typeOf && bodies[0][typeOf] == unix.RTN_LOCAL, nil
}
