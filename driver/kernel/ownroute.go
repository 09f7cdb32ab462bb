package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// routeProtocol marks routes as ours: ip(8) shows them as "proto 100". The kernel gives protocols
// above 4 (RTPROT_STATIC) no meaning. This one is not in linux/rtnetlink.h nor in iproute2's
// rt_protos, and is none of those that routing programs use without an entry there, such as 30
// (Cilium), 80 (Calico) and 191 to 198 (FRR).
const routeProtocol = 100

// routeBody is struct rtmsg and attributes.
func routeBody(family byte, bits int, scope byte, flags uint32, a attrs) []byte {
	b := []byte{family, byte(bits), 0, 0, unix.RT_TABLE_MAIN, routeProtocol, scope, unix.RTN_UNICAST}
	return append(append(b, native32(flags)...), a...)
}

func routeFamily(a netip.Addr) byte { return byte(familyOf(a)) }

// putRoute adds a route; one of ours to the same prefix on the same link gives way to it. One of
// somebody else's to the prefix is left alone, and refuses ours.
func (k *Kernel) putRoute(ctx context.Context, r plan.Route) error {
	l, err := k.link(ctx, r.Link)
	if err != nil {
		return err
	}
	if l == nil {
		return fmt.Errorf("link %s: %w", r.Link, unix.ENODEV)
	}
	observed := plan.State{}
	if err := k.observeRouteKeys(ctx, []plan.Key{r.Key()}, observed); err != nil {
		return err
	}
	old, there := observed[r.Key()]
	if there && r.Same(old) {
		return nil
	}
	scope, flags := byte(unix.RT_SCOPE_LINK), uint32(0)
	a := attrs{}.put(unix.RTA_DST, r.Prefix.Addr().AsSlice()).u32(unix.RTA_OIF, uint32(l.index))
	if r.Via.IsValid() {
		// The router is on the link, whether or not the host has an address of its subnet.
		scope, flags = unix.RT_SCOPE_UNIVERSE, unix.RTNH_F_ONLINK
		a = a.put(unix.RTA_GATEWAY, r.Via.AsSlice())
	}
	if r.Source.IsValid() {
		a = a.put(unix.RTA_PREFSRC, r.Source.AsSlice())
	}
	add := message{kind: unix.RTM_NEWROUTE, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL,
		body: routeBody(routeFamily(r.Prefix.Addr()), r.Prefix.Bits(), scope, flags, a)}
	requests := []message{add}
	if there {
		requests = []message{withoutRoute(l.index, r.Prefix), add}
	}
	replies, err := k.route.exchange(ctx, requests...)
	if err != nil {
		return err
	}
	err = replies[len(replies)-1].err
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("the main table has a route to %s that is not dockway's: it is left alone; see ip route show %s: %w", r.Prefix, r.Prefix, err)
	}
	return err
}

// deleteRoute removes a route of ours; one that is not there is fine.
func (k *Kernel) deleteRoute(ctx context.Context, r plan.Route) error {
	l, err := k.link(ctx, r.Link)
	if err != nil || l == nil {
		return err
	}
	_, err = k.route.request(ctx, withoutRoute(l.index, r.Prefix))
	if isGone(err) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// withoutRoute removes a route of our protocol, whatever its router and source are.
func withoutRoute(link int32, p netip.Prefix) message {
	return message{kind: unix.RTM_DELROUTE, flags: unix.NLM_F_ACK, body: routeBody(routeFamily(p.Addr()), p.Bits(), unix.RT_SCOPE_NOWHERE, 0,
		attrs{}.put(unix.RTA_DST, p.Addr().AsSlice()).u32(unix.RTA_OIF, uint32(link)))}
}

// A ourRoute is a route of ours, with its link's index.
type ourRoute struct {
	plan.Route
	link int32
}

// ourRoutes lists the routes of ours of one family.
func (k *Kernel) ourRoutes(ctx context.Context, family byte) ([]ourRoute, error) {
	body := routeBody(family, 0, 0, 0, nil)
	body[7] = 0 // of any type; the kernel refuses to filter by some
	bodies, err := k.route.dump(ctx, unix.RTM_GETROUTE, body)
	if errors.Is(err, unix.ENOENT) { // a table that has never had a route
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []ourRoute
	for _, body := range bodies {
		if r, ok := parseRoute(body); ok && body[0] == family {
			out = append(out, r)
		}
	}
	return out, nil
}

// parseRoute reads a route that is ours: of the main table, unicast, of our protocol, to one link.
func parseRoute(body []byte) (r ourRoute, ok bool) {
	r.Prefix, ok = routePrefix(body)
	if !ok || body[5] != routeProtocol || body[7] != unix.RTN_UNICAST {
		return r, false
	}
	for kind, value := range attributes(body[unix.SizeofRtMsg:]) {
		switch kind {
		case unix.RTA_OIF:
			r.link = int32(number32(value))
		case unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(value)
		case unix.RTA_PREFSRC:
			r.Source, _ = netip.AddrFromSlice(value)
		}
	}
	return r, r.link != 0
}

// routePrefix is what a route of the main table, anybody's, leads to.
func routePrefix(body []byte) (netip.Prefix, bool) {
	if len(body) < unix.SizeofRtMsg || body[4] != unix.RT_TABLE_MAIN {
		return netip.Prefix{}, false
	}
	to := netip.IPv4Unspecified()
	if body[0] == unix.AF_INET6 {
		to = netip.IPv6Unspecified()
	}
	if value, ok := attribute(body[unix.SizeofRtMsg:], unix.RTA_DST); ok {
		to, _ = netip.AddrFromSlice(value)
	}
	p := netip.PrefixFrom(to, int(body[1]))
	return p, p.IsValid()
}

// observeRoutes lists the routes of ours. Those on links that are doomed are as good as gone.
func (k *Kernel) observeRoutes(ctx context.Context, families []byte, out plan.State) error {
	var found []ourRoute
	var indices []int32
	for _, family := range families {
		list, err := k.ourRoutes(ctx, family)
		if err != nil {
			return err
		}
		for _, r := range list {
			found = append(found, r)
			indices = append(indices, r.link)
		}
	}
	links, err := k.linksByIndex(ctx, nonZero(indices)...)
	if err != nil {
		return err
	}
	names := map[int32]string{}
	for _, l := range links {
		if l != nil && !l.doomed() {
			names[l.index] = l.name
		}
	}
	for _, r := range found {
		if r.Link = names[r.link]; r.Link != "" {
			out.Add(r.Route)
		}
	}
	return nil
}

// observeRouteKeys looks routes up that are named by link and prefix.
func (k *Kernel) observeRouteKeys(ctx context.Context, keys []plan.Key, out plan.State) error {
	if len(keys) == 0 {
		return nil
	}
	wanted := map[byte]bool{}
	for _, key := range keys {
		_, text, _ := strings.Cut(key.Name, " ")
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("%s: not of the form link prefix: %w", key, err)
		}
		wanted[routeFamily(prefix.Addr())] = true
	}
	var families []byte
	for _, family := range k.families() {
		if wanted[family] {
			families = append(families, family)
		}
	}
	found := plan.State{}
	if err := k.observeRoutes(ctx, families, found); err != nil {
		return err
	}
	for _, key := range keys {
		if o, ok := found[key]; ok {
			out.Add(o)
		}
	}
	return nil
}
