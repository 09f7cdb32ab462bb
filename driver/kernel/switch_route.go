package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	rtaNextHopID = 30  // RTA_NH_ID
	sizeofNHMsg  = 8   // struct nhmsg
	ticks        = 100 // of a second (USER_HZ)

	// Where struct rtmsg has them.
	rtmProtocol = 5
	routeType   = 7

	// What a user may say of a next hop; the kernel tells more, such as that it is dead.
	nextHopFlags = unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE
)

// A hostRoute is a route as the kernel lists it: struct rtmsg and attributes. It is copied with every
// attribute, known here or not.
type hostRoute []byte

// listRoutes lists the routes of all tables, of one family: those through a link, or all when index
// is 0. What goes with a next hop object is left out.
func (k *Kernel) listRoutes(ctx context.Context, family byte, index int32) ([]hostRoute, error) {
	request := make([]byte, unix.SizeofRtMsg)
	request[0] = family
	if index != 0 {
		request = append(request, attrs{}.u32(unix.RTA_OIF, uint32(index))...)
	}
	bodies, err := k.route.dump(ctx, unix.RTM_GETROUTE, request)
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []hostRoute
	for _, body := range bodies {
		if len(body) >= unix.SizeofRtMsg && body[0] == family {
			r := hostRoute(body)
			if r.flags()&unix.RTM_F_CLONED == 0 && r.attribute(rtaNextHopID) == nil && (index == 0 || r.through(index)) {
				out = append(out, r)
			}
		}
	}
	return out, nil
}

func (r hostRoute) attribute(kind uint16) []byte {
	value, _ := attribute(r[unix.SizeofRtMsg:], kind)
	return value
}

func (r hostRoute) flags() uint32 { return binary.NativeEndian.Uint32(r[8:]) }

func (r hostRoute) table() uint32 {
	if table := r.attribute(unix.RTA_TABLE); table != nil {
		return number32(table)
	}
	return uint32(r[4])
}

// comesAndGoes reports whether the kernel makes the route itself for an address, and removes it with it.
func (r hostRoute) comesAndGoes() bool {
	return r.table() == unix.RT_TABLE_LOCAL && r[rtmProtocol] == unix.RTPROT_KERNEL
}

// through reports whether the route, or one hop of it, goes out by a link.
func (r hostRoute) through(index int32) bool {
	if number32(r.attribute(unix.RTA_OIF)) == uint32(index) {
		return true
	}
	for hop := r.attribute(unix.RTA_MULTIPATH); len(hop) >= unix.SizeofRtNexthop; hop = nextHop(hop) {
		if binary.NativeEndian.Uint32(hop[4:]) == uint32(index) {
			return true
		}
	}
	return false
}

// only reports whether the route goes out by no other link.
func (r hostRoute) only(index int32) bool {
	if !r.through(index) {
		return false
	}
	for hop := r.attribute(unix.RTA_MULTIPATH); len(hop) >= unix.SizeofRtNexthop; hop = nextHop(hop) {
		if binary.NativeEndian.Uint32(hop[4:]) != uint32(index) {
			return false
		}
	}
	return true
}

// nextHop is what follows the first struct rtnexthop.
func nextHop(hops []byte) []byte {
	n := aligned(int(binary.NativeEndian.Uint16(hops)))
	if n < unix.SizeofRtNexthop || n > len(hops) {
		return nil
	}
	return hops[n:]
}

// routed reports whether a router is on the way.
func (r hostRoute) routed() bool {
	for kind := range attributes(r[unix.SizeofRtMsg:]) {
		if kind == unix.RTA_GATEWAY || kind == unix.RTA_VIA || kind == unix.RTA_MULTIPATH {
			return true
		}
	}
	return false
}

// slot names what the kernel looks a route up by before it compares next hops: two routes of one slot
// are tried in their order.
func (r hostRoute) slot() string {
	return fmt.Sprint(r[1:4], r.table(), r.attribute(unix.RTA_DST), r.attribute(unix.RTA_SRC), r.attribute(unix.RTA_PRIORITY))
}

// onLink is the request that makes the kernel believe that all routers are on the link.
func (r hostRoute) onLink() hostRoute {
	out := slices.Clone(r)
	for hop := out.attribute(unix.RTA_MULTIPATH); len(hop) >= unix.SizeofRtNexthop; hop = nextHop(hop) {
		end := len(hop) - len(nextHop(hop))
		if hostRoute.routed(append(make(hostRoute, unix.SizeofRtMsg), hop[unix.SizeofRtNexthop:end]...)) {
			hop[2] |= unix.RTNH_F_ONLINK
		}
	}
	if r.routed() && r.attribute(unix.RTA_MULTIPATH) == nil {
		binary.NativeEndian.PutUint32(out[8:], r.flags()|unix.RTNH_F_ONLINK)
	}
	return out
}

// on is the request that makes the route out of another link, without what changes by itself.
func (r hostRoute) on(from, to int32) hostRoute {
	body := slices.Clone(r[:unix.SizeofRtMsg])
	binary.NativeEndian.PutUint32(body[8:], r.flags()&nextHopFlags)
	var list attrs
	for kind, value := range rawAttributes(r[unix.SizeofRtMsg:]) {
		switch kindOf(kind) {
		case unix.RTA_CACHEINFO, unix.RTA_EXPIRES:
			continue
		case unix.RTA_OIF:
			if number32(value) == uint32(from) {
				value = native32(uint32(to))
			}
		case unix.RTA_MULTIPATH:
			value = slices.Clone(value)
			for hop := value; len(hop) >= unix.SizeofRtNexthop; hop = nextHop(hop) {
				hop[2] &= nextHopFlags
				if binary.NativeEndian.Uint32(hop[4:]) == uint32(from) {
					binary.NativeEndian.PutUint32(hop[4:], uint32(to))
				}
			}
		}
		list = list.put(kind, value)
	}
	return append(body, list...)
}

// expiring is the route with the time that the listed one has left: it is told in one attribute and
// asked for in another.
func (r hostRoute) expiring(listed hostRoute) hostRoute {
	info := listed.attribute(unix.RTA_CACHEINFO)
	if len(info) < 12 {
		return r
	}
	left := int32(binary.NativeEndian.Uint32(info[8:])) // rta_expires
	if left == 0 {
		return r
	}
	return append(slices.Clone(r), attrs{}.u32(unix.RTA_EXPIRES, uint32(max(left/ticks, 1)))...)
}

func (r hostRoute) String() string {
	to := "default"
	if address, ok := netip.AddrFromSlice(r.attribute(unix.RTA_DST)); ok {
		to = netip.PrefixFrom(address, int(r[1])).String()
	}
	return fmt.Sprintf("%s table %d", to, r.table())
}

// copyRoutes makes every route through a link go through another: in its place where the kernel can,
// else beside it. Those by a router come last: routers are found by routes on the link.
func (k *Kernel) copyRoutes(ctx context.Context, from, to *link, unchecked bool) (direct, routed []message, err error) {
	for _, family := range k.families() {
		all, err := k.listRoutes(ctx, family, 0)
		if err != nil {
			return nil, nil, err
		}
		slots := map[string][]hostRoute{}
		for _, r := range all {
			slots[r.slot()] = append(slots[r.slot()], r)
		}
		for _, r := range all {
			switch {
			case !r.through(from.index):
			case r.routed():
				routed = append(routed, r.copy(slots[r.slot()], from, to, unchecked)...)
			default:
				direct = append(direct, r.copy(slots[r.slot()], from, to, unchecked)...)
			}
		}
	}
	return direct, routed, nil
}

// copy makes a route through a link go through another, given all of its slot.
func (r hostRoute) copy(slot []hostRoute, from, to *link, unchecked bool) []message {
	copied := r.on(from.index, to.index)
	there := slices.IndexFunc(slot, func(s hostRoute) bool { return bytes.Equal(s.on(0, 0), copied) })
	if there < 0 && unchecked {
		copied = copied.onLink()
	}
	inPlace := &slot[0][0] == &r[0] && r.replaces(slot)
	var changes []message
	request := func(kind, mode uint16, r hostRoute) {
		changes = append(changes, message{kind: kind, flags: unix.NLM_F_ACK | mode, body: r, about: fmt.Sprintf("route %s out of %s", r, to.name)})
	}
	switch {
	case r.comesAndGoes() && (r[0] == unix.AF_INET6 || !inPlace): // its copy came with the address
	case inPlace:
		if there >= 0 { // it came with an address, too: behind this, and perhaps behind those of other links
			request(unix.RTM_DELROUTE, 0, copied)
		}
		request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, copied.expiring(r))
	case there < 0:
		request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, copied.expiring(r))
	}
	return changes
}

// replaces reports whether the kernel would replace this route, the first of its slot, and not
// another: for IPv6 it takes the first that has a router or has none, as the new one has.
func (r hostRoute) replaces(slot []hostRoute) bool {
	return r[0] == unix.AF_INET || len(slot) == 1 || !slices.ContainsFunc(slot, hostRoute.routed)
}

// dropRoutes removes the routes through a link alone, but for those that go with something else.
func (k *Kernel) dropRoutes(ctx context.Context, from *link) error {
	var changes []message
	for _, family := range k.families() {
		left, err := k.listRoutes(ctx, family, from.index)
		if err != nil {
			return err
		}
		for _, r := range left {
			if r.comesAndGoes() || !r.only(from.index) {
				continue
			}
			changes = append(changes, message{kind: unix.RTM_DELROUTE, flags: unix.NLM_F_ACK, body: r.on(0, 0), about: fmt.Sprintf("remove route %s out of %s", r, from.name)})
		}
	}
	return k.change(ctx, isAbsent, changes...)
}

// isDone reports whether a route that is to come is there, or one that is to go is not.
func isDone(err error) bool { return errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH) }

// isAbsent reports whether what is to go is not there.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || isGone(err)
}

// routesLeft reports whether routes that count or next hops go out by a link, beside the one for
// link-local addresses.
func (k *Kernel) routesLeft(ctx context.Context, l *link, counts func(hostRoute, int32) bool) (bool, error) {
	local := netip.MustParsePrefix("fe80::/64")
	for _, family := range k.families() {
		left, err := k.listRoutes(ctx, family, l.index)
		if err != nil {
			return false, err
		}
		for _, r := range left {
			if r.comesAndGoes() || !counts(r, l.index) {
				continue
			}
			address, _ := netip.AddrFromSlice(r.attribute(unix.RTA_DST))
			if netip.PrefixFrom(address, int(r[1])) != local || r.routed() {
				return true, nil
			}
		}
	}
	hops, err := k.nextHops(ctx, l.index)
	return len(hops) > 0, err
}

// nextHops lists the next hop objects of a link: struct nhmsg and attributes. Routes that name one
// follow it.
func (k *Kernel) nextHops(ctx context.Context, index int32) ([][]byte, error) {
	request := append(make([]byte, sizeofNHMsg), attrs{}.u32(unix.NHA_OIF, uint32(index))...)
	bodies, err := k.route.dump(ctx, unix.RTM_GETNEXTHOP, request)
	if isGone(err) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // the link is, or the kernel is older than 5.3
	}
	if err != nil {
		return nil, fmt.Errorf("list next hops: %w", err)
	}
	return slices.DeleteFunc(bodies, func(b []byte) bool { return len(b) < sizeofNHMsg }), nil
}

// moveNextHops makes the next hop objects of a link go out by another.
func (k *Kernel) moveNextHops(ctx context.Context, from, to *link, unchecked bool) ([]message, error) {
	hops, err := k.nextHops(ctx, from.index)
	var changes []message
	for _, hop := range hops {
		body := slices.Clone(hop[:sizeofNHMsg])
		body[1] = 0 // the scope is not for users to say
		flags := binary.NativeEndian.Uint32(hop[4:]) & unix.RTNH_F_ONLINK
		if _, ok := attribute(hop[sizeofNHMsg:], unix.NHA_GATEWAY); ok && unchecked {
			flags |= unix.RTNH_F_ONLINK
		}
		binary.NativeEndian.PutUint32(body[4:], flags)
		var list attrs
		for kind, value := range rawAttributes(hop[sizeofNHMsg:]) {
			if kindOf(kind) == unix.NHA_OIF {
				value = native32(uint32(to.index))
			}
			list = list.put(kind, value)
		}
		changes = append(changes, message{kind: unix.RTM_NEWNEXTHOP, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_REPLACE, body: append(body, list...), about: "next hop out of " + to.name})
	}
	return changes, err
}
