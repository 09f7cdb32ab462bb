package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// The marks of ownership: a link is ours when its name and its alias both say so.
const (
	bridgePrefix  = "dwb"
	switchPrefix  = "dwx"
	vethPrefix    = "dwv"
	vlanPrefix    = "dwt"
	vxlanPrefix   = "dwo"
	transitPrefix = "dwg"
	aliasPrefix   = "dockway "
)

// Link groups of links that are to be deleted, and of those that are being deleted. They keep
// their alias, so that what a process has doomed the next one can reap.
const (
	doomedGroup = 0x6477
	dyingGroup  = 0x6478
)

const (
	kindBridge = "bridge"
	kindVeth   = "veth"
	kindTun    = "tun"
	kindVXLAN  = "vxlan"

	maxMTU          = 65535  // of a bridge
	minMTU6         = 1280   // a link with less has no IPv6 (RFC 8200)
	addrGenModeNone = 1      // IN6_ADDR_GEN_MODE_NONE
	skipStats       = 1 << 3 // RTEXT_FILTER_SKIP_STATS
)

// A link is a network interface as rtnetlink(7) shows it.
type link struct {
	index       int32
	name        string
	alias       string
	kind        string
	mac         plan.MAC
	mtu         int
	master      int32
	lower       int32  // of a macvlan; of a veth, its other end; 0: in another namespace
	beyond      int32  // that, when it is in another namespace
	nsid        int32  // the number of the namespace that lower or, of a VXLAN device, its socket is in; -1: this one
	mode        uint32 // of a macvlan
	group       uint32
	up          bool
	carrier     bool
	promiscuous bool // somebody made it so; a switch that it is a port of does not count
	isolated    bool
	hairpin     bool
	learns      bool // of a port: who is behind it
	suppresses  bool // of a port: ARP and neighbour discovery that the bridge answers
	floods      bool // of a port: frames to unknown MACs
	state       int  // of a port: BR_STATE_… of linux/if_bridge.h; -1: it is none, or that is not told
	tunnel      tunnel
	ethernet    bool
	loopback    bool
	genMode     int // how the kernel makes IPv6 addresses of the link's own (IN6_ADDR_GEN_MODE_…); -1: the link has no IPv6
}

// named reports whether the link has a name of the form that ours have.
func (l *link) named() bool {
	for _, prefix := range []string{bridgePrefix, switchPrefix, vethPrefix, vlanPrefix, vxlanPrefix, transitPrefix} {
		if strings.HasPrefix(l.name, prefix) {
			return true
		}
	}
	return isMacvlan(l.name)
}

// ours reports whether the link bears our mark and is not to be deleted.
func (l *link) ours() bool {
	return l.named() && strings.HasPrefix(l.alias, aliasPrefix) && !l.leaving()
}

// doomed reports whether the link is ours and is to be deleted.
func (l *link) doomed() bool {
	return l.named() && strings.HasPrefix(l.alias, aliasPrefix) && l.leaving()
}

// unfinished reports whether the link has been born and has no mark yet.
func (l *link) unfinished() bool { return l.named() && l.alias == "" && l.leaving() }

func (l *link) leaving() bool { return l.group == doomedGroup || l.group == dyingGroup }

// toGroup moves a link into a link group.
func (l *link) toGroup(group uint32) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(l.index, 0, 0, attrs{}.u32(unix.IFLA_GROUP, group))}
}

// linkBody is struct ifinfomsg and attributes.
func linkBody(index int32, flags, change uint32, a attrs) []byte {
	b := []byte{unix.AF_UNSPEC, 0, 0, 0}
	b = append(b, native32(uint32(index))...)
	b = append(b, native32(flags)...)
	b = append(b, native32(change)...)
	return append(b, a...)
}

func parseLink(body []byte) *link {
	if len(body) < unix.SizeofIfInfomsg {
		return nil
	}
	flags := binary.NativeEndian.Uint32(body[8:])
	l := &link{
		index:       int32(binary.NativeEndian.Uint32(body[4:])),
		up:          flags&unix.IFF_UP != 0,
		carrier:     flags&unix.IFF_LOWER_UP != 0,
		promiscuous: flags&unix.IFF_PROMISC != 0,
		loopback:    flags&unix.IFF_LOOPBACK != 0,
		genMode:     -1,
		nsid:        -1,
		state:       -1,
	}
	for kind, value := range attributes(body[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = text(value)
		case unix.IFLA_IFALIAS:
			l.alias = text(value)
		case unix.IFLA_ADDRESS:
			copy(l.mac[:], value)
			l.ethernet = binary.NativeEndian.Uint16(body[2:]) == unix.ARPHRD_ETHER && len(value) == len(l.mac)
		case unix.IFLA_MTU:
			l.mtu = int(number32(value))
		case unix.IFLA_MASTER:
			l.master = int32(number32(value))
		case unix.IFLA_LINK:
			l.lower = int32(number32(value))
		case unix.IFLA_LINK_NETNSID:
			if len(value) == 4 {
				l.nsid = int32(number32(value))
			}
		case unix.IFLA_GROUP:
			l.group = number32(value)
		case unix.IFLA_AF_SPEC:
			six, _ := attribute(value, unix.AF_INET6)
			if mode, ok := attribute(six, unix.IFLA_INET6_ADDR_GEN_MODE); ok && len(mode) > 0 {
				l.genMode = int(mode[0])
			}
		case unix.IFLA_LINKINFO:
			k, _ := attribute(value, unix.IFLA_INFO_KIND)
			l.kind = text(k)
			data, _ := attribute(value, unix.IFLA_INFO_DATA)
			switch l.kind {
			case kindMacvlan:
				l.mode = macvlanMode(data)
			case kindVXLAN:
				l.tunnel = parseTunnel(data)
			}
			port, _ := attribute(value, unix.IFLA_INFO_SLAVE_DATA)
			l.isolated = isSet(port, unix.IFLA_BRPORT_ISOLATED)
			l.hairpin = isSet(port, unix.IFLA_BRPORT_MODE)
			l.learns = isSet(port, unix.IFLA_BRPORT_LEARNING)
			l.suppresses = isSet(port, unix.IFLA_BRPORT_NEIGH_SUPPRESS)
			l.floods = isSet(port, unix.IFLA_BRPORT_UNICAST_FLOOD)
			l.state = portState(port, l.state)
		case unix.IFLA_PROTINFO: // in what a bridge tells of its ports
			if body[0] == unix.AF_BRIDGE {
				l.state = portState(value, l.state)
			}
		}
	}
	if l.nsid >= 0 {
		l.beyond, l.lower = l.lower, 0
	}
	return l
}

// isSet reads an attribute that is on or off.
func isSet(list []byte, kind uint16) bool {
	value, ok := attribute(list, kind)
	return ok && len(value) > 0 && value[0] != 0
}

// portState reads whether a port forwards, or what is to be taken for it if that is not told.
func portState(list []byte, otherwise int) int {
	if value, ok := attribute(list, unix.IFLA_BRPORT_STATE); ok && len(value) > 0 {
		return int(value[0])
	}
	return otherwise
}

// links looks links up by name, nil for those that are not there.
func (k *Kernel) links(ctx context.Context, names ...string) ([]*link, error) {
	requests := make([]message, len(names))
	for i, name := range names {
		requests[i] = message{kind: unix.RTM_GETLINK, body: linkBody(0, 0, 0, attrs{}.
			str(unix.IFLA_IFNAME, name).u32(unix.IFLA_EXT_MASK, skipStats))}
	}
	return k.getLinks(ctx, requests)
}

// linksByIndex is links by number.
func (k *Kernel) linksByIndex(ctx context.Context, indices ...int32) ([]*link, error) {
	requests := make([]message, len(indices))
	for i, index := range indices {
		requests[i] = message{kind: unix.RTM_GETLINK, body: linkBody(index, 0, 0, attrs{}.u32(unix.IFLA_EXT_MASK, skipStats))}
	}
	return k.getLinks(ctx, requests)
}

func (k *Kernel) getLinks(ctx context.Context, requests []message) ([]*link, error) {
	out := make([]*link, 0, len(requests))
	for len(requests) > 0 {
		n := min(len(requests), lookUps)
		replies, err := k.route.exchange(ctx, requests[:n]...)
		if err != nil {
			return nil, err
		}
		for _, r := range replies {
			switch {
			case isGone(r.err):
				out = append(out, nil)
			case r.err != nil:
				return nil, fmt.Errorf("look link up: %w", r.err)
			case len(r.bodies) == 0:
				return nil, errors.New("look link up: the kernel says nothing")
			default:
				out = append(out, parseLink(r.bodies[0]))
			}
		}
		requests = requests[n:]
	}
	return out, nil
}

// isGone reports whether a link or address is not there (any more).
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// Idle lists the links that were made for containers and are in the host's namespace. Their names say so: the
// other end of a port bears no mark.
func (k *Kernel) Idle(ctx context.Context) ([]string, error) {
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil, err
	}
	var idle []string
	for _, l := range all {
		if strings.HasPrefix(l.name, containerPrefix) {
			idle = append(idle, l.name)
		}
	}
	return idle, nil
}

// link looks one link up: nil when there is none.
func (k *Kernel) link(ctx context.Context, name string) (*link, error) {
	found, err := k.links(ctx, name)
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// listLinks lists all links of the namespace, without their counters.
func (k *Kernel) listLinks(ctx context.Context) ([]*link, error) {
	bodies, err := k.route.dump(ctx, unix.RTM_GETLINK, linkBody(0, 0, 0, attrs{}.u32(unix.IFLA_EXT_MASK, skipStats)))
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := make([]*link, 0, len(bodies))
	for _, body := range bodies {
		if l := parseLink(body); l != nil {
			out = append(out, l)
		}
	}
	return out, nil
}

// related is the link that the plan's view of this one names: that of a macvlan its lower link, that
// of others their switch.
func (l *link) related() int32 {
	if isMacvlan(l.name) {
		return l.lower
	}
	return l.master
}

// object is the plan's view of a link of ours other than a switch, given the name of the related one. A link of the
// wrong kind is shown under the kind that its name promises, with nothing right about it; so is a
// port without the hairpin that every port gets, of which a plan does not speak. What a VLAN is
// beside its link is for observeVLAN to find.
func (l *link) object(related string) plan.Object {
	switch {
	case strings.HasPrefix(l.name, vlanPrefix):
		return plan.VLAN{Name: l.name, Alias: l.alias}
	case isMacvlan(l.name):
		return l.macvlan(related)
	case strings.HasPrefix(l.name, vxlanPrefix):
		return l.vxlan(related)
	}
	if strings.HasPrefix(l.name, bridgePrefix) {
		if l.kind != kindBridge {
			return plan.Bridge{Name: l.name, Alias: l.alias}
		}
		return plan.Bridge{Name: l.name, Alias: l.alias, MAC: l.mac, MTU: l.mtu, Up: l.up}
	}
	if l.kind != kindVeth || !l.hairpin {
		return plan.Veth{Name: l.name, Alias: l.alias}
	}
	return plan.Veth{Name: l.name, Alias: l.alias, Bridge: related, MTU: l.mtu, Isolated: l.isolated, Static: l.master != 0 && !l.learns, Up: l.up}
}

// observeLinks looks links up by name. What does not bear our mark is not observed.
func (k *Kernel) observeLinks(ctx context.Context, names []string, out plan.State) error {
	found, err := k.links(ctx, names...)
	if err != nil {
		return err
	}
	var ours, vlans []*link
	var related []int32
	var missing []string // VLANs
	for i, l := range found {
		isVLAN := strings.HasPrefix(names[i], vlanPrefix)
		switch {
		case l != nil && l.ours() && isVLAN:
			vlans = append(vlans, l)
		case l != nil && l.ours():
			ours = append(ours, l)
			related = append(related, l.related())
		case isVLAN:
			missing = append(missing, names[i])
		}
	}
	if err := k.observeVLANs(ctx, vlans, missing, out); err != nil {
		return err
	}
	bridges, err := k.linksByIndex(ctx, nonZero(related)...)
	if err != nil {
		return err
	}
	byIndex := map[int32]string{}
	for _, b := range bridges {
		if b != nil {
			byIndex[b.index] = b.name
		}
	}
	for _, l := range ours {
		out.Add(l.object(byIndex[l.related()]))
	}
	return nil
}

func nonZero(list []int32) []int32 {
	seen := map[int32]bool{0: true}
	var out []int32
	for _, v := range list {
		if !seen[v] {
			seen[v] = true
			out = append(out, v)
		}
	}
	return out
}

// ForeignError says that a name that dockway needs is taken by something that is not dockway's.
type ForeignError struct{ Name, Alias string }

func (e *ForeignError) Error() string {
	return fmt.Sprintf("link %s exists and is not dockway's (alias %q): it is left alone", e.Name, e.Alias)
}

// mine looks a link of ours up: nil when there is none, or one that is doomed.
func (k *Kernel) mine(ctx context.Context, name string) (*link, error) {
	l, err := k.link(ctx, name)
	if err != nil || l == nil {
		return nil, err
	}
	if l.doomed() || l.unfinished() {
		return nil, nil
	}
	if !l.ours() {
		return nil, &ForeignError{Name: name, Alias: l.alias}
	}
	return l, nil
}

// putLink makes a link, or makes one of ours that is there what the plan wants: that may first
// have to be prepared for what is configured then.
func (k *Kernel) putLink(ctx context.Context, name, kind string, mtu int, create, configure message, prepare ...message) error {
	return k.putLinkBy(ctx, k.route, name, kind, mtu, create, configure, prepare...)
}

// putLinkBy is putLink of a link that is made from the network namespace of a socket.
func (k *Kernel) putLinkBy(ctx context.Context, by *socket, name, kind string, mtu int, create, configure message, prepare ...message) error {
	patience := time.Now().Add(departTime)
	for try := 0; try < attempts || k.parent != nil && time.Now().Before(patience); try++ {
		err := k.newLink(ctx, by, name, create, configure)
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		l, err := k.link(ctx, name)
		switch {
		case err != nil:
			return err
		case l == nil && k.parent != nil:
			// What is in the way is in another namespace, such as one that was let go and is being destroyed.
			pause(ctx, departTime/100)
			if ctx.Err() != nil {
				return ctx.Err()
			}
		case l == nil: // gone since
		case l.doomed():
			if err := k.reap(ctx); err != nil {
				return err
			}
		case l.unfinished() || l.ours() && l.kind != kind:
			if _, err := k.route.request(ctx, deleteLink(name)); err != nil && !isGone(err) {
				return err
			}
		case !l.ours():
			return &ForeignError{Name: name, Alias: l.alias}
		default:
			if k.ipv6 && l.mtu < minMTU6 && mtu >= minMTU6 {
				// It has no IPv6, and settings of it would be refused. It gets IPv6 with the MTU; while it is down, so
				// that it gets no address of its own.
				prepare = append(prepare, downLink(name), tuneLink(name, attrs{}.u32(unix.IFLA_MTU, uint32(mtu))),
					tuneLink(name, k.withoutAutoconf(attrs{}, mtu)))
			}
			for _, step := range append(prepare, configure) {
				if _, err := k.route.request(ctx, step); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return fmt.Errorf("link %s, or its other end, is in the way and is no link of dockway's: %w", name, unix.EEXIST)
}

const (
	attempts   = 3               // bounds how often a link is made whose name is taken now and free then
	departTime = 2 * time.Second // several times what the kernel takes to destroy a namespace
)

// newLink makes a link. The kernel cannot give it its mark in the same step: so it is born doomed,
// and if this process dies before the next step, the link does too.
func (k *Kernel) newLink(ctx context.Context, by *socket, name string, create, configure message) error {
	if _, err := by.request(ctx, create); err != nil {
		return err
	}
	_, err := k.route.request(ctx, configure)
	if err != nil {
		_, undo := k.route.request(ctx, deleteLink(name))
		return errors.Join(err, undo)
	}
	return nil
}

func deleteLink(name string) message {
	return message{kind: unix.RTM_DELLINK, flags: unix.NLM_F_ACK, body: linkBody(0, 0, 0, attrs{}.str(unix.IFLA_IFNAME, name))}
}

func createLink(name string, a attrs) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL,
		body: linkBody(0, 0, 0, append(attrs{}.str(unix.IFLA_IFNAME, name).u32(unix.IFLA_GROUP, doomedGroup), a...))}
}

func changeLink(name string, up bool, a attrs) message {
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK,
		body: linkBody(0, flags, unix.IFF_UP, append(attrs{}.str(unix.IFLA_IFNAME, name).u32(unix.IFLA_GROUP, 0), a...))}
}

func downLink(name string) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(0, 0, unix.IFF_UP, attrs{}.str(unix.IFLA_IFNAME, name))}
}

func tuneLink(name string, a attrs) message {
	return message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(0, 0, 0, append(attrs{}.str(unix.IFLA_IFNAME, name), a...))}
}

// withoutAutoconf keeps the kernel from giving the link an IPv6 address of its own: addresses on
// our links are those in the plan.
func (k *Kernel) withoutAutoconf(a attrs, mtu int) attrs {
	if !k.ipv6 || mtu < minMTU6 {
		return a
	}
	return a.nest(unix.IFLA_AF_SPEC, attrs{}.nest(unix.AF_INET6, attrs{}.u8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenModeNone)))
}

func (k *Kernel) putBridge(ctx context.Context, b plan.Bridge) error {
	create := createLink(b.Name, attrs{}.put(unix.IFLA_ADDRESS, b.MAC[:]).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindBridge).
			nest(unix.IFLA_INFO_DATA, attrs{}.
				u32(unix.IFLA_BR_FORWARD_DELAY, 0).u32(unix.IFLA_BR_STP_STATE, 0))))
	what := attrs{}.u32(unix.IFLA_MTU, uint32(b.MTU)).str(unix.IFLA_IFALIAS, b.Alias)
	// Given its MAC once more, a link would lose its neighbour entries, permanent ones too.
	if old, err := k.link(ctx, b.Name); err != nil {
		return err
	} else if old == nil || old.mac != b.MAC {
		what = what.put(unix.IFLA_ADDRESS, b.MAC[:])
	}
	configure := changeLink(b.Name, b.Up, k.withoutAutoconf(what, b.MTU))
	return k.putLink(ctx, b.Name, kindBridge, b.MTU, create, configure)
}

// bridge looks up a bridge that a port is to be on: one of ours, or one of the host's.
func (k *Kernel) bridge(ctx context.Context, name string) (*link, error) {
	l, err := k.link(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case l == nil || l.doomed() || l.unfinished():
		return nil, fmt.Errorf("bridge %s: %w", name, unix.ENODEV)
	case l.kind != kindBridge:
		return nil, fmt.Errorf("link %s is no bridge (kind %q): name one that is, or an uplink, with interface=", name, l.kind)
	}
	return l, nil
}

func (k *Kernel) putVeth(ctx context.Context, v plan.Veth) error {
	bridge, err := k.bridge(ctx, v.Bridge)
	if err != nil {
		return err
	}
	// One queue each way is all that a veth uses unless it is told otherwise. Asked for no number, the kernel makes one
	// for every CPU and then waits, twice, for all CPUs to let go of those that are too many.
	shape := attrs{}.u32(unix.IFLA_MTU, uint32(v.MTU)).u32(unix.IFLA_NUM_TX_QUEUES, 1).u32(unix.IFLA_NUM_RX_QUEUES, 1)
	peer := append(attrs{}.str(unix.IFLA_IFNAME, v.Peer).put(unix.IFLA_ADDRESS, v.PeerMAC[:]), shape...)
	if k.parent != nil {
		peer = peer.u32(unix.IFLA_NET_NS_FD, uint32(k.parent.namespace.Fd()))
	}
	create := createLink(v.Name, append(attrs{}.u32(unix.IFLA_MASTER, uint32(bridge.index)), shape...).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindVeth).
			nest(unix.IFLA_INFO_DATA, attrs{}.nest(nl.VETH_INFO_PEER, linkBody(0, 0, 0, peer)))))
	// What a port is told goes to the switch that it is on already.
	enslave := message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK,
		body: linkBody(0, 0, 0, attrs{}.str(unix.IFLA_IFNAME, v.Name).u32(unix.IFLA_MASTER, uint32(bridge.index)))}
	// Hairpin, so that a container reaches a published port of its own: what comes back to the
	// port that it came from is its own packet, after DNAT, on hosts with bridge-nf-call-iptables.
	configure := changeLink(v.Name, v.Up, k.withoutAutoconf(attrs{}.
		u32(unix.IFLA_MTU, uint32(v.MTU)).str(unix.IFLA_IFALIAS, v.Alias).
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_SLAVE_KIND, kindBridge).
			nest(unix.IFLA_INFO_SLAVE_DATA, attrs{}.u8(unix.IFLA_BRPORT_MODE, 1).
				u8(unix.IFLA_BRPORT_ISOLATED, flag(v.Isolated)).u8(unix.IFLA_BRPORT_LEARNING, flag(!v.Static)))), v.MTU))
	return k.putLink(ctx, v.Name, kindVeth, v.MTU, create, configure, enslave)
}

func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
