package kernel

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// maxVNI is the largest VXLAN identifier (RFC 7348, section 5).
const maxVNI = 1<<24 - 1

// A tunnel is what only a VXLAN device has.
type tunnel struct {
	vni   uint32
	local netip.Addr
	port  uint16
	learn bool
	csum  bool // UDP checksums over IPv4; over IPv6 they are on unless asked otherwise
	plain bool // nothing that no plan speaks of: no group or host that all unknown goes to, no lower link, no lack of checksums
}

// parseTunnel reads IFLA_INFO_DATA of a VXLAN device.
func parseTunnel(data []byte) tunnel {
	t := tunnel{plain: true}
	for kind, value := range attributes(data) {
		switch kind {
		case unix.IFLA_VXLAN_ID:
			t.vni = number32(value)
		case unix.IFLA_VXLAN_LOCAL, unix.IFLA_VXLAN_LOCAL6:
			t.local, _ = netip.AddrFromSlice(value)
		case unix.IFLA_VXLAN_PORT:
			if len(value) == 2 {
				t.port = binary.BigEndian.Uint16(value)
			}
		case unix.IFLA_VXLAN_LEARNING:
			t.learn = !isZero(value)
		case unix.IFLA_VXLAN_UDP_CSUM:
			t.csum = !isZero(value)
		case unix.IFLA_VXLAN_GROUP, unix.IFLA_VXLAN_GROUP6, unix.IFLA_VXLAN_LINK, unix.IFLA_VXLAN_COLLECT_METADATA,
			unix.IFLA_VXLAN_UDP_ZERO_CSUM6_TX, unix.IFLA_VXLAN_UDP_ZERO_CSUM6_RX,
			unix.IFLA_VXLAN_PROXY, unix.IFLA_VXLAN_RSC, unix.IFLA_VXLAN_L2MISS, unix.IFLA_VXLAN_L3MISS:
			t.plain = t.plain && isZero(value)
		}
	}
	return t
}

// fits reports whether a device can become what is wanted: the rest cannot be changed.
func (l *link) fits(v plan.VXLAN) bool {
	t := l.tunnel
	return l.kind == kindVXLAN && l.nsid >= 0 && t.vni == v.VNI && t.port == v.Port && t.local.Is4() == v.Local.Is4() && t.csum && t.plain
}

// vxlan is the plan's view of a link that its name promises to be a VXLAN device. Of one that is not
// what every such device is, nothing is right.
func (l *link) vxlan(bridge string) plan.VXLAN {
	t := l.tunnel
	v := plan.VXLAN{Name: l.name, Alias: l.alias, Bridge: bridge, VNI: t.vni, Local: t.local, Port: t.port, MTU: l.mtu, Isolated: l.isolated, Up: l.up}
	if !l.fits(v) || t.learn || l.learns || l.floods || l.hairpin || !l.suppresses {
		return plan.VXLAN{Name: l.name, Alias: l.alias}
	}
	return v
}

// putVXLAN makes a VXLAN device, or makes one what the plan wants. It is made from the host's network
// namespace, in this one: so its socket is in the host's. One whose identifier, UDP port or family
// is another is made anew, without the FDB entries that it had: they come after it. It is up last.
func (k *Kernel) putVXLAN(ctx context.Context, v plan.VXLAN) error {
	switch {
	case k.parent == nil:
		return errors.New("a VXLAN device is in a network namespace of dockway's, never in the host's")
	case !strings.HasPrefix(v.Name, vxlanPrefix):
		return fmt.Errorf("the name of a VXLAN device begins with %q", vxlanPrefix)
	case v.VNI > maxVNI:
		return fmt.Errorf("VXLAN identifier %d is above %d", v.VNI, maxVNI)
	case !v.Local.IsValid() || v.Port == 0:
		return errors.New("a VXLAN device needs an address and a UDP port of the host")
	}
	bridge, err := k.bridge(ctx, v.Bridge)
	if err != nil {
		return err
	}
	old, err := k.mine(ctx, v.Name)
	if err != nil {
		return err
	}
	if old != nil && !old.fits(v) {
		if _, err := k.route.request(ctx, deleteLink(v.Name)); err != nil && !isGone(err) {
			return err
		}
	}
	local, id := uint16(unix.IFLA_VXLAN_LOCAL), attrs{}.u32(unix.IFLA_VXLAN_ID, v.VNI)
	if v.Local.Is6() {
		local = unix.IFLA_VXLAN_LOCAL6
	}
	changing := attrs{}.put(local, v.Local.AsSlice()).u8(unix.IFLA_VXLAN_LEARNING, 0)
	shape := append(id, changing...).put(unix.IFLA_VXLAN_PORT, binary.BigEndian.AppendUint16(nil, v.Port)).u8(unix.IFLA_VXLAN_UDP_CSUM, 1)
	create := createLink(v.Name, attrs{}.u32(unix.IFLA_NET_NS_FD, uint32(k.namespace.Fd())).
		u32(unix.IFLA_MASTER, uint32(bridge.index)).u32(unix.IFLA_MTU, uint32(v.MTU)).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindVXLAN).nest(unix.IFLA_INFO_DATA, shape)))
	// What a port is told goes to the switch that it is on already.
	prepare := []message{tuneLink(v.Name, attrs{}.u32(unix.IFLA_MASTER, uint32(bridge.index)))}
	if old != nil && (old.tunnel.local != v.Local || old.tunnel.learn) {
		prepare = append(prepare, tuneLink(v.Name, attrs{}.
			nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindVXLAN).nest(unix.IFLA_INFO_DATA, changing))))
	}
	info := attrs{}.str(unix.IFLA_INFO_SLAVE_KIND, kindBridge).nest(unix.IFLA_INFO_SLAVE_DATA, attrs{}.
		u8(unix.IFLA_BRPORT_LEARNING, 0).u8(unix.IFLA_BRPORT_UNICAST_FLOOD, 0).u8(unix.IFLA_BRPORT_NEIGH_SUPPRESS, 1).
		u8(unix.IFLA_BRPORT_MODE, 0).u8(unix.IFLA_BRPORT_ISOLATED, flag(v.Isolated)))
	configure := tuneLink(v.Name, k.withoutAutoconf(attrs{}.
		u32(unix.IFLA_GROUP, 0).u32(unix.IFLA_MTU, uint32(v.MTU)).str(unix.IFLA_IFALIAS, v.Alias).
		nest(unix.IFLA_LINKINFO, info), v.MTU))
	err = k.putLinkBy(ctx, k.parent.route, v.Name, kindVXLAN, v.MTU, create, configure, prepare...)
	if err != nil {
		return k.vxlanRefused(ctx, v, err)
	}
	if _, err = k.route.request(ctx, changeLink(v.Name, v.Up, nil)); err != nil && old == nil {
		_, undo := k.route.request(ctx, deleteLink(v.Name))
		err = errors.Join(err, undo)
	}
	return k.vxlanRefused(ctx, v, err)
}

// vxlanRefused says who likely has what a VXLAN device needs of the host: a process the UDP port, or
// another device the identifier on it.
func (k *Kernel) vxlanRefused(ctx context.Context, v plan.VXLAN, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("UDP port %d of the host is taken, by a process (ss -ulpn sport = :%d tells which) or by VXLAN devices of another make, such as those of Docker's own overlay networks: choose another for all hosts: %w", v.Port, v.Port, err)
	case errors.Is(err, unix.EEXIST):
		holder := cmp.Or(k.parent.holderOf(ctx, v), "a link in a network namespace of somebody else's, such as one of Docker's own overlay networks")
		return fmt.Errorf("VXLAN identifier %d on UDP port %d of the host is taken by %s: choose another for all hosts: %w", v.VNI, v.Port, holder, err)
	}
	return err
}

// holderOf names the VXLAN device that has an identifier on a UDP port, if this process can see it.
func (k *Kernel) holderOf(ctx context.Context, v plan.VXLAN) string {
	children, leave := k.all()
	defer leave()
	if l := k.linkWith(ctx, v); l != nil {
		return "link " + l.name
	}
	for name, child := range children {
		if l := child.linkWith(ctx, v); l != nil {
			return "link " + l.name + " of network namespace " + name
		}
	}
	return ""
}

func (k *Kernel) linkWith(ctx context.Context, v plan.VXLAN) *link {
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil
	}
	for _, l := range all {
		if l.kind == kindVXLAN && l.tunnel.vni == v.VNI && l.tunnel.port == v.Port {
			return l
		}
	}
	return nil
}
