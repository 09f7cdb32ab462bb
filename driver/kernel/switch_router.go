package kernel

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel renews the default routes that it has made of router advertisements, and only those. When
// it finds another by the same router in the way, it takes nothing of the advertisement at all, and
// the addresses of that network run out. So such a route is not copied like others: it goes out by
// the other link with a metric of one more, until one is there that the kernel takes for its own.
// rtnetlink cannot make such a route. The ioctl of IPv6 can, with any flag, but not with a protocol.

// An advertised is a default route that the kernel has made of router advertisements.
type advertised struct {
	router  netip.Addr
	metric  uint32
	flags   uint32 // RTF_…
	expires uint32 // in ticks, 0: never
}

// Flags of IPv6 routes, of linux/route.h and linux/ipv6_route.h.
const (
	rtfUp      = 0x1
	rtfGateway = 0x2
	rtfDefault = 0x00010000
	rtfAddress = 0x00040000 // RTF_ADDRCONF
	rtfExpires = 0x00400000
	rtfPref    = 0x18000000
)

// advertisedRoutes lists what routers have advertised on a link. The kernel tells the flags only here.
func (k *Kernel) advertisedRoutes(ctx context.Context, l *link) ([]advertised, error) {
	if !k.ipv6 {
		return nil, nil
	}
	var file []byte
	err := k.inside(func() (err error) {
		file, err = os.ReadFile("/proc/thread-self/net/ipv6_route")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list advertised routes: %w", err)
	}
	var out []advertised
	for line := range strings.Lines(string(file)) {
		f := strings.Fields(line)
		if len(f) != 10 || f[9] != l.name || f[1] != "00" {
			continue
		}
		router, err := hex.DecodeString(f[4])
		if err != nil {
			continue
		}
		address, _ := netip.AddrFromSlice(router)
		metric, _ := strconv.ParseUint(f[5], 16, 32)
		flags, _ := strconv.ParseUint(f[8], 16, 32)
		const needed = rtfDefault | rtfAddress | rtfGateway
		if flags&needed == needed {
			out = append(out, advertised{router: address, metric: uint32(metric), flags: uint32(flags) & (needed | rtfUp | rtfExpires | rtfPref)})
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	routes, err := k.listRoutes(ctx, unix.AF_INET6, l.index)
	for i := range out {
		for _, r := range routes {
			metric := r.attribute(unix.RTA_PRIORITY)
			info := r.attribute(unix.RTA_CACHEINFO)
			if r[1] == 0 && r.table() == unix.RT_TABLE_MAIN && len(metric) == 4 && binary.NativeEndian.Uint32(metric) == out[i].metric && len(info) >= 12 {
				out[i].expires = max(binary.NativeEndian.Uint32(info[8:]), 1)
			}
		}
	}
	return out, err
}

// request makes or removes the route with a metric.
func (a advertised) request(kind uint16, l *link, metric uint32) message {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[4], body[rtmProtocol], body[routeType] = unix.AF_INET6, unix.RT_TABLE_MAIN, unix.RTPROT_RA, unix.RTN_UNICAST
	if kind == unix.RTM_DELROUTE {
		body[rtmProtocol] = 0 // any
	}
	list := attrs{}.put(unix.RTA_GATEWAY, a.router.AsSlice()).u32(unix.RTA_OIF, uint32(l.index)).u32(unix.RTA_PRIORITY, metric)
	m := message{kind: kind, flags: unix.NLM_F_ACK, about: fmt.Sprintf("default route by %s out of %s", a.router, l.name), body: body}
	if kind == unix.RTM_NEWROUTE {
		m.flags |= unix.NLM_F_CREATE
		list = list.u8(unix.RTA_PREF, uint8(a.flags&rtfPref>>27))
		if a.flags&rtfExpires != 0 {
			list = list.u32(unix.RTA_EXPIRES, max(a.expires/ticks, 1))
		}
	}
	m.body = append(m.body, list...)
	return m
}

// turnAdvertised makes advertised routes go out by another link.
func turnAdvertised(list []advertised, from, to *link) []message {
	var out []message
	for _, a := range list {
		out = append(out, a.request(unix.RTM_NEWROUTE, to, a.metric+1), a.request(unix.RTM_DELROUTE, from, a.metric))
	}
	return out
}

// isAdvertised reports whether a request is for the slot of an advertised route.
func isAdvertised(m message, list []advertised) bool {
	r := hostRoute(m.body)
	metric := r.attribute(unix.RTA_PRIORITY)
	return r[0] == unix.AF_INET6 && r[1] == 0 && r.table() == unix.RT_TABLE_MAIN && len(metric) == 4 &&
		slices.ContainsFunc(list, func(a advertised) bool { return a.metric == binary.NativeEndian.Uint32(metric) })
}

// ownAdvertised gives the kernel the advertised routes of a link as its own.
func (k *Kernel) ownAdvertised(ctx context.Context, list []advertised, l *link) error {
	var spare []message
	for _, a := range list {
		if err := k.inside(func() error { return a.add(l) }); err != nil {
			return fmt.Errorf("default route by %s out of %s: %w", a.router, l.name, err)
		}
		spare = append(spare, a.request(unix.RTM_DELROUTE, l, a.metric+1))
	}
	return k.change(ctx, isAbsent, spare...)
}

// add makes the route by ioctl.
func (a advertised) add(l *link) error {
	request := struct { // struct in6_rtmsg
		dst, src, router [16]byte
		kind             uint32
		dstBits, srcBits uint16
		metric           uint32
		expires          uint // unsigned long
		flags            uint32
		index            int32
	}{router: a.router.As16(), metric: a.metric, expires: uint(a.expires), flags: a.flags, index: l.index}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&request)))
	if errno != 0 && errno != unix.EEXIST {
		return errno
	}
	return nil
}
