package kernel

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// A VLAN is made of what every kernel has, with or without 8021q and VLAN-aware bridges: a veth
// pair, of which one end is the VLAN's link and the other idle, up only so that the first has
// carrier; at the egress of the link a filter that tags what is sent there and sends it out of the
// uplink; at the ingress of the uplink a filter for each VLAN that moves the frames with its tag to
// the link, without the tag; and at the ingress of the link one that keeps them from the host's own
// network. Everything else on the uplink goes its way.
//
// The uplink has to be promiscuous, as the port of a switch is: else its hardware keeps back frames
// to containers, and those of VLANs that nobody has registered with it.
const (
	vlanPeerPrefix = "dwu"
	minVLAN        = 1
	maxVLAN        = 4094
)

func vlanPeer(name string) string { return vlanPeerPrefix + strings.TrimPrefix(name, vlanPrefix) }

// putVLAN makes a VLAN, or makes one what the plan wants. What lets frames in comes last.
func (k *Kernel) putVLAN(ctx context.Context, v plan.VLAN) error {
	if v.ID < minVLAN || v.ID > maxVLAN {
		return fmt.Errorf("VLAN %d is not in %d to %d", v.ID, minVLAN, maxVLAN)
	}
	k.vlans.Lock()
	defer k.vlans.Unlock()
	uplink, err := k.link(ctx, v.Uplink)
	switch {
	case err != nil:
		return err
	case uplink == nil:
		return fmt.Errorf("uplink %s: %w", v.Uplink, unix.ENODEV)
	case uplink.mac == plan.MAC{}:
		return fmt.Errorf("uplink %s is no Ethernet link: it cannot carry VLANs", v.Uplink)
	case strings.HasPrefix(v.Uplink, vlanPrefix):
		return fmt.Errorf("uplink %s is itself a VLAN: name the uplink that it is of", v.Uplink)
	}
	// Loaded before anything is made: it is what may be refused.
	push, err := loadProgram("dockway_push", pushTag(v.ID, uplink.index))
	if err != nil {
		return err
	}
	defer push.Close()
	if err := k.vlanFree(ctx, v, uplink); err != nil {
		return err
	}
	l, err := k.putVLANLink(ctx, v, uplink)
	if err != nil {
		return err
	}
	t := tagging{id: v.ID, uplink: uplink.name, uplinkIndex: uplink.index, link: l.name, linkIndex: l.index}
	if err := k.putOutside(ctx, l, t, push); err != nil {
		return fmt.Errorf("link %s: %w", l.name, err)
	}
	if err := k.setVLANFlags(ctx, l, v.Up); err != nil {
		return err
	}
	if err := k.putInside(ctx, uplink, t); err != nil {
		return fmt.Errorf("uplink %s: %w", uplink.name, err)
	}
	// What fed the link before it was of this uplink and number.
	return k.withdraw(ctx, v.Name, func(f filter) bool { return f == inFilter(t) })
}

// putOutside puts the filters at a VLAN's link.
func (k *Kernel) putOutside(ctx context.Context, l *link, t tagging, push *ebpf.Program) error {
	if err := k.hooked(ctx, l.index); err != nil {
		return err
	}
	hooks, err := k.hooks(ctx)
	if err != nil {
		return err
	}
	if kind := hooks[l.index]; kind != kindClsact {
		return fmt.Errorf("it has a qdisc %q in the place of %s: remove it with tc qdisc del dev %s ingress", kind, kindClsact, l.name)
	}
	if err := k.install(ctx, shutFilter(l.index), "dockway_shut", shutHost()); err != nil {
		return err
	}
	return k.attach(ctx, outFilter(t), push)
}

// putInside puts the filter of a VLAN at its uplink.
func (k *Kernel) putInside(ctx context.Context, uplink *link, t tagging) error {
	if err := k.hooked(ctx, uplink.index); err != nil {
		return err
	}
	if !uplink.promiscuous {
		if err := k.install(ctx, marker(uplink.index), "dockway_marker", passAll()); err != nil {
			return err
		}
		if err := k.setPromiscuous(ctx, uplink.index, unix.IFF_PROMISC); err != nil {
			return err
		}
	}
	return k.install(ctx, inFilter(t), "dockway_pop", popTag(t.id, t.linkIndex))
}

// vlanFree refuses a VLAN that another link of ours carries, or whose place somebody has.
func (k *Kernel) vlanFree(ctx context.Context, v plan.VLAN, uplink *link) error {
	list, err := k.filters(ctx, uplink.index, hookIn)
	if err != nil {
		return err
	}
	for _, f := range list {
		if f.handle != uint32(v.ID) {
			continue
		}
		t, ok := parseTagging(f.name)
		if !ok {
			return fmt.Errorf("uplink %s has a filter of priority %d and handle 0x%x that is not dockway's (%q): it is left alone; remove it with tc(8)",
				uplink.name, filterPriority, f.handle, f.name)
		}
		if t.link == v.Name {
			continue
		}
		other, err := k.link(ctx, t.link)
		if err != nil {
			return err
		}
		if other != nil && other.ours() && other.index == t.linkIndex {
			return fmt.Errorf("VLAN %d of %s is already on link %s", v.ID, uplink.name, t.link)
		}
	}
	return nil
}

// putVLANLink makes the pair. The link is what the uplink is to those on it: it has its MAC and MTU.
func (k *Kernel) putVLANLink(ctx context.Context, v plan.VLAN, uplink *link) (*link, error) {
	peer := vlanPeer(v.Name)
	if err := k.clearVLANLink(ctx, v.Name, peer); err != nil {
		return nil, err
	}
	mtu := attrs{}.u32(unix.IFLA_MTU, uint32(uplink.mtu))
	create := createLink(v.Name, append(slices.Clone(mtu), attrs{}.
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindVeth).
			nest(unix.IFLA_INFO_DATA, attrs{}.nest(nl.VETH_INFO_PEER,
				linkBody(0, 0, 0, append(attrs{}.str(unix.IFLA_IFNAME, peer), mtu...)))))...))
	configure := tuneLink(v.Name, k.withoutAutoconf(append(attrs{}.
		u32(unix.IFLA_GROUP, 0).put(unix.IFLA_ADDRESS, uplink.mac[:]).str(unix.IFLA_IFALIAS, v.Alias), mtu...), uplink.mtu))
	if err := k.putLink(ctx, v.Name, kindVeth, uplink.mtu, create, configure); err != nil {
		return nil, err
	}
	l, err := k.mine(ctx, v.Name)
	if err == nil && l == nil {
		err = fmt.Errorf("link %s: %w", v.Name, unix.ENODEV) // somebody was quicker
	}
	if err != nil {
		return nil, err
	}
	_, err = k.route.request(ctx, message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK,
		body: linkBody(l.lower, 0, 0, k.withoutAutoconf(attrs{}.str(unix.IFLA_IFALIAS, v.Alias), uplink.mtu))})
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", peer, err)
	}
	return l, nil
}

// clearVLANLink takes away half a pair: one whose other end somebody moved to another namespace.
func (k *Kernel) clearVLANLink(ctx context.Context, name, peer string) error {
	l, err := k.mine(ctx, name)
	if err != nil {
		return err
	}
	half := ""
	if l == nil {
		other, err := k.link(ctx, peer)
		if err != nil {
			return err
		}
		if other != nil && other.kind == kindVeth && other.lower == 0 && strings.HasPrefix(other.alias, aliasPrefix) {
			half = peer
		}
	} else if l.kind == kindVeth && l.lower == 0 {
		half = name
	}
	if half == "" {
		return nil
	}
	if _, err := k.route.request(ctx, deleteLink(half)); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// setVLANFlags brings the pair up, or the link down. Nobody on either end speaks for the host: no
// ARP is answered, and no IPv6 spoken. The host takes part in the VLAN by a link of its own.
func (k *Kernel) setVLANFlags(ctx context.Context, l *link, up bool) error {
	ends, err := k.linksByIndex(ctx, l.lower)
	if err != nil {
		return err
	}
	for _, end := range []*link{ends[0], l} {
		if end == nil {
			continue
		}
		if k.ipv6 {
			if err := k.putSysctl(plan.Sysctl{Name: "net/ipv6/conf/" + end.name + "/disable_ipv6", Value: "1"}); err != nil {
				return err
			}
		}
		flags := uint32(unix.IFF_NOARP | unix.IFF_UP)
		if end == l && !up {
			flags = unix.IFF_NOARP
		}
		_, err := k.route.request(ctx, message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK,
			body: linkBody(end.index, flags, unix.IFF_NOARP|unix.IFF_UP, nil)})
		if err != nil {
			return fmt.Errorf("link %s: %w", end.name, err)
		}
	}
	return nil
}

func (k *Kernel) setPromiscuous(ctx context.Context, index int32, flag uint32) error {
	_, err := k.route.request(ctx, message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK, body: linkBody(index, flag, unix.IFF_PROMISC, nil)})
	if isGone(err) {
		return nil
	}
	return err
}

// withdraw removes the filters by which uplinks feed a VLAN's link, but for those to keep. The last
// VLAN of an uplink takes with it what we made of the uplink; its filter goes last, so that after a
// crash under way it is still found.
func (k *Kernel) withdraw(ctx context.Context, name string, keep func(filter) bool) error {
	all, err := k.allInFilters(ctx)
	if err != nil {
		return err
	}
	for index, list := range all {
		var gone []filter
		rest, marked := 0, false
		for _, f := range list {
			t, ok := parseTagging(f.name)
			switch {
			case f == marker(index):
				marked = true
			case !ok: // not ours
			case t.link == name && !keep(f):
				gone = append(gone, f)
			default:
				rest++
			}
		}
		if marked && rest == 0 {
			if err := k.setPromiscuous(ctx, index, 0); err != nil {
				return err
			}
			gone = append([]filter{marker(index)}, gone...)
		}
		for _, f := range gone {
			if err := k.detach(ctx, f); err != nil {
				return fmt.Errorf("filter %q: %w", f.name, err)
			}
		}
	}
	return nil
}

// deleteVLAN removes a VLAN, or what is left of one: filters of ours go even if the link is somebody
// else's by now.
func (k *Kernel) deleteVLAN(ctx context.Context, v plan.VLAN) error {
	k.vlans.Lock()
	defer k.vlans.Unlock()
	if err := k.withdraw(ctx, v.Name, func(filter) bool { return false }); err != nil {
		return err
	}
	return k.doom(ctx, v.Name)
}

// observeVLANs looks VLANs up: the links of ours that there are, and for the other names what is
// left of them. The cost does not depend on how many others there are, unless something is left.
func (k *Kernel) observeVLANs(ctx context.Context, links []*link, missing []string, out plan.State) error {
	for _, l := range links {
		v, err := k.observeVLAN(ctx, l, nil)
		if err != nil {
			return fmt.Errorf("link %s: %w", l.name, err)
		}
		out.Add(v)
	}
	if len(missing) == 0 {
		return nil
	}
	all, err := k.allInFilters(ctx)
	if err != nil {
		return err
	}
	for _, left := range leftovers(all) {
		if slices.Contains(missing, left.Name) {
			out.Add(left)
		}
	}
	return nil
}

// observeAllVLANs looks at all links of VLANs, and for filters whose link is gone.
func (k *Kernel) observeAllVLANs(ctx context.Context, links []*link, out plan.State) error {
	all, err := k.allInFilters(ctx)
	if err != nil {
		return err
	}
	for _, left := range leftovers(all) {
		out.Add(left)
	}
	for _, l := range links {
		v, err := k.observeVLAN(ctx, l, all)
		if err != nil {
			return fmt.Errorf("link %s: %w", l.name, err)
		}
		out.Add(v)
	}
	return nil
}

// leftovers are VLANs as filters on uplinks promise them, without a link.
func leftovers(all map[int32][]filter) []plan.VLAN {
	names := map[string]bool{}
	for _, list := range all {
		for _, f := range list {
			if t, ok := parseTagging(f.name); ok && strings.HasPrefix(t.link, vlanPrefix) {
				names[t.link] = true
			}
		}
	}
	var out []plan.VLAN
	for name := range maps.Keys(names) {
		out = append(out, plan.VLAN{Name: name})
	}
	return out
}

// observeVLAN is the plan's view of a VLAN's link: with its number and its uplink if everything is
// as putVLAN makes it. The filters of what comes in are looked up unless they are given.
func (k *Kernel) observeVLAN(ctx context.Context, l *link, in map[int32][]filter) (plan.VLAN, error) {
	v := plan.VLAN{Name: l.name, Alias: l.alias}
	if l.kind != kindVeth {
		return v, nil
	}
	v.Up = l.up && l.carrier
	out, err := k.filters(ctx, l.index, hookOut)
	if err != nil || len(out) != 1 {
		return v, err
	}
	t, ok := parseTagging(out[0].name)
	if !ok || out[0] != outFilter(t) || t.link != l.name || t.linkIndex != l.index {
		return v, nil
	}
	uplinks, err := k.linksByIndex(ctx, t.uplinkIndex)
	if err != nil {
		return v, err
	}
	u := uplinks[0]
	if u == nil || u.name != t.uplink || u.mac != l.mac || u.mtu != l.mtu || !u.promiscuous {
		return v, nil
	}
	if in == nil {
		in = map[int32][]filter{}
		for _, index := range []int32{l.index, u.index} {
			if in[index], err = k.filters(ctx, index, hookIn); err != nil {
				return v, err
			}
		}
	}
	feeds := feeding(l.name, in)
	if len(feeds) == 1 && feeds[0] == inFilter(t) && slices.Equal(in[l.index], []filter{shutFilter(l.index)}) {
		v.ID, v.Uplink = t.id, t.uplink
	}
	return v, nil
}

// feeding are the filters that say that they feed a link.
func feeding(name string, in map[int32][]filter) []filter {
	var out []filter
	for _, list := range in {
		for _, f := range list {
			if t, ok := parseTagging(f.name); ok && t.link == name {
				out = append(out, f)
			}
		}
	}
	return out
}
