package mode

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/policy"
)

// The modes transparent, l2bridge and l2tunnel put containers on the physical network: their
// ports are on an external switch, a bridge that holds an uplink. They differ in what the wire
// sees, which is decided in chains of the bridge family:
//
//	transparent  the container's own MAC and address
//	l2bridge     the host's MAC and the container's address: the MAC is replaced on the way out,
//	             and put back, by address, on the way in
//	l2tunnel     as l2bridge, and whatever a container sends is sent to the gateway, whose MAC
//	             every ARP request of a container is answered with

// External reports whether networks of the mode are on an external switch.
func (m Name) External() bool { return m == Transparent || m == L2Bridge || m == L2Tunnel }

// Names of the ports on external switches, of the switches, and of the uplinks of those in a VLAN.
const (
	externalPorts = "dwv-*"
	switches      = "dwx*"
	vlans         = "dwt*"
)

// Sets of family bridge: what the chains of the external modes know about endpoints.
var (
	inside4 = &nft.Set{Family: nft.Bridge, Name: "inside4", Key: []nft.Type{nft.MAC, nft.IPv4}, Comment: "containers on external switches"}
	inside6 = &nft.Set{Family: nft.Bridge, Name: "inside6", Key: []nft.Type{nft.MAC, nft.IPv6}, Comment: "containers on external switches"}
	host    = &nft.Set{Family: nft.Bridge, Name: "host", Key: []nft.Type{nft.IfName, nft.MAC}, Comment: "the host, as a port's container reaches it"}
	l2port  = &nft.Set{Family: nft.Bridge, Name: "l2port", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "ports whose frames carry the host's MAC on the wire"}
	hostMAC = &nft.Set{Family: nft.Bridge, Name: "hostmac", Key: []nft.Type{nft.IfName}, Data: []nft.Type{nft.MAC}, Comment: "the MAC that a port's frames carry on the wire"}
	behind4 = &nft.Set{Family: nft.Bridge, Name: "behind4", Key: []nft.Type{nft.MAC, nft.IPv4}, Data: []nft.Type{nft.MAC}, Comment: "containers behind the host's MAC"}
	behind6 = &nft.Set{Family: nft.Bridge, Name: "behind6", Key: []nft.Type{nft.MAC, nft.IPv6}, Data: []nft.Type{nft.MAC}, Comment: "containers behind the host's MAC"}
	routed4 = &nft.Set{Family: nft.Bridge, Name: "routed4", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Comment: "published ports: the host routes what comes and goes"}
	routed6 = &nft.Set{Family: nft.Bridge, Name: "routed6", Key: []nft.Type{nft.IPv6, nft.Protocol, nft.Service}, Comment: "published ports: the host routes what comes and goes"}
	tunnel  = &nft.Set{Family: nft.Bridge, Name: "tunnel", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "ports whose frames all go to the gateway"}
	gateway = &nft.Set{Family: nft.Bridge, Name: "gateway", Key: []nft.Type{nft.IfName}, Data: []nft.Type{nft.MAC}, Comment: "the gateway that they go to"}
	tenant4 = &nft.Set{Family: nft.Bridge, Name: "tenant4", Key: []nft.Type{nft.IfName}, Data: []nft.Type{nft.IPv4}, Comment: "whom the gateway's ARP answers are for"}

	apart = &nft.Set{Family: nft.Bridge, Name: "apart", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "ports in a VLAN, which the host is not in"}
	// The gateways of l2tunnel networks in a VLAN are all that the host asks for there.
	sought = &nft.Set{Family: nft.Bridge, Name: "sought", Key: []nft.Type{nft.IfName, nft.IPv4}, Comment: "gateways in a VLAN, which the host looks for"}

	// Containers that do not reach each other. Not every kernel tells the bridge of a port (meta
	// ibrname), so an address counts on all switches.
	silent  = &nft.Set{Family: nft.Bridge, Name: "silent", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "ports of networks with disable_icc"}
	silent4 = &nft.Set{Family: nft.Bridge, Name: "silent4", Key: []nft.Type{nft.IPv4}, Guard: true, Comment: "containers of networks with disable_icc"}
	silent6 = &nft.Set{Family: nft.Bridge, Name: "silent6", Key: []nft.Type{nft.IPv6}, Guard: true, Comment: "containers of networks with disable_icc"}

	externalSets = []*nft.Set{apart, sought, inside4, inside6, host, l2port, hostMAC, behind4, behind6, routed4, routed6, tunnel, gateway, tenant4, silent, silent4, silent6}
)

// Sets of family inet: containers of l2bridge networks, whose published ports the host routes.
var (
	open4     = &nft.Set{Family: nft.Inet, Name: "open4", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Comment: "published ports of containers on external switches"}
	open6     = &nft.Set{Family: nft.Inet, Name: "open6", Key: []nft.Type{nft.IPv6, nft.Protocol, nft.Service}, Comment: "published ports of containers on external switches"}
	behindIP4 = &nft.Set{Family: nft.Inet, Name: "behind4", Key: []nft.Type{nft.IPv4}, Comment: "containers behind the host's MAC"}
	behindIP6 = &nft.Set{Family: nft.Inet, Name: "behind6", Key: []nft.Type{nft.IPv6}, Comment: "containers behind the host's MAC"}

	// external are the switches, twice: what comes in by one and goes out by the same.
	external = &nft.Set{Family: nft.Inet, Name: "external", Key: []nft.Type{nft.IfName, nft.IfName}, Comment: "external switches"}

	externalInet = []*nft.Set{external, open4, open6, behindIP4, behindIP6}
)

// published accepts what the host routes for published ports of containers on external switches.
// What it does not accept is the host's own to decide.
var published = &nft.Chain{Name: "published", Rules: append(slices.Clone(transits), []nft.Rule{
	nft.R("to a published port", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP4, nft.IPDAddr), nft.Goto("admit")),
	nft.R("and back", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP4, nft.IPSAddr), nft.Goto("admit")),
	nft.R("to a published port (6)", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP6, nft.IP6DAddr), nft.Goto("admit")),
	nft.R("and back (6)", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP6, nft.IP6SAddr), nft.Goto("admit")),
	nft.R("straight to the container's address", nft.In(open4, nft.IPDAddr, nft.L4Proto, nft.DPort), nft.Goto("admit")),
	nft.R("and back", nft.In(open4, nft.IPSAddr, nft.L4Proto, nft.SPort), nft.Is(nft.CtState, "established"), nft.Goto("admit")),
	nft.R("straight to the container's address (6)", nft.In(open6, nft.IP6DAddr, nft.L4Proto, nft.DPort), nft.Goto("admit")),
	nft.R("and back (6)", nft.In(open6, nft.IP6SAddr, nft.L4Proto, nft.SPort), nft.Is(nft.CtState, "established"), nft.Goto("admit")),
}...)}

// sent is what the host itself sends. It is kept from telling the LAN and containers of the shorter way
// past it, when it routes what belongs to a published port back into the switch: with the container's
// MAC.
var sent = &nft.Chain{Name: "sent", Type: "filter", Hook: "output", Priority: prioRaw, Rules: []nft.Rule{
	nft.R("between hosts of the cluster", nft.Is(nft.L4Proto, "udp"), nft.In(tunnelPort, nft.DPort), nft.Goto("encapsulating")),
	nft.R("there is no shorter way", nft.Is(nft.ICMPType, "redirect"), nft.In(external, nft.OIfName, nft.OIfName), nft.Drop),
	nft.R("there is no shorter way (6)", nft.Is(nft.ICMPv6Type, "nd-redirect"), nft.In(external, nft.OIfName, nft.OIfName), nft.Drop),
}}

// First options of neighbour discovery messages, type and length (RFC 4861, section 4.6.1).
const (
	sourceLinkLayer = "0x101"
	targetLinkLayer = "0x201"
	nonce           = "0xe01" // RFC 7527: of duplicate address detection
)

var unicast = nft.NoneOf(nft.PktType, "broadcast", "multicast")

// externalChains come after port security has let a frame pass.
var externalChains = []*nft.Chain{
	{Name: "external", Type: "filter", Hook: "prerouting", Priority: prioBrDstNAT + justAfter, Rules: []nft.Rule{
		nft.R("from a container", nft.Is(nft.IIfName, externalPorts), nft.Goto("leaving")),
		nft.R("disable_icc, internal switches: to the host only", nft.Is(nft.IIfName, ports), nft.In(silent, nft.IIfName), nft.NotIn(host, nft.IIfName, nft.EtherDAddr), unicast, nft.Drop),
		nft.R("internal switches", nft.Is(nft.IIfName, ports), nft.Accept),
		nft.R("bridged", nft.In(inside4, nft.EtherDAddr, nft.IPDAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("bridged (6)", nft.In(inside6, nft.EtherDAddr, nft.IP6DAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("published: the host routes it", nft.In(routed4, nft.IPDAddr, nft.L4Proto, nft.DPort), nft.Accept),
		nft.R("published: the host routes it (6)", nft.In(routed6, nft.IP6DAddr, nft.L4Proto, nft.DPort), nft.Accept),
		nft.R("to a container behind the host's MAC", nft.Mapped(nft.EtherDAddr, behind4, nft.EtherDAddr, nft.IPDAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("to a container behind the host's MAC (6)", nft.Mapped(nft.EtherDAddr, behind6, nft.EtherDAddr, nft.IP6DAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("ARP for it", nft.Mapped(nft.ARPTargetMAC, behind4, nft.EtherDAddr, nft.ARPTargetIP), nft.Copy(nft.EtherDAddr, nft.ARPTargetMAC)),
	}},
	{Name: "leaving", Rules: []nft.Rule{
		nft.R("disable_icc", nft.In(silent, nft.IIfName), nft.Jump("silence")),
		nft.R("with its own MAC", nft.NotIn(l2port, nft.IIfName), nft.Goto("plain")),
		nft.R("everything through the gateway", nft.In(tunnel, nft.IIfName), nft.Goto("tunnelling")),
		nft.R("to a container on this host", nft.In(inside4, nft.EtherDAddr, nft.IPDAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("to a container on this host (6)", nft.In(inside6, nft.EtherDAddr, nft.IP6DAddr), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("published: the host routes it", nft.In(routed4, nft.IPSAddr, nft.L4Proto, nft.SPort), unicast, nft.Mapped(nft.EtherDAddr, hostMAC, nft.IIfName), nft.To(nft.PktType, "host"), nft.Accept),
		nft.R("published: the host routes it (6)", nft.In(routed6, nft.IP6SAddr, nft.L4Proto, nft.SPort), unicast, nft.Mapped(nft.EtherDAddr, hostMAC, nft.IIfName), nft.To(nft.PktType, "host"), nft.Accept),
		nft.R("to the wire", nft.NotIn(host, nft.IIfName, nft.EtherDAddr), unicast, nft.MarkSet{Bit: bridged}),
	}},
	{Name: "plain", Rules: []nft.Rule{
		nft.R("to the wire, or to a container on this host", nft.NotIn(host, nft.IIfName, nft.EtherDAddr), unicast, nft.MarkSet{Bit: bridged}),
	}},
	{Name: "silence", Rules: []nft.Rule{
		nft.R("not by way of a router either", nft.In(silent4, nft.IPDAddr), nft.Drop),
		nft.R("not by way of a router either (6)", nft.In(silent6, nft.IP6DAddr), nft.Drop),
	}},
	{Name: "tunnelling", Rules: []nft.Rule{
		nft.R("announces its own address", nft.In(source4, nft.IIfName, nft.ARPSenderMAC, nft.ARPTargetIP), nft.Accept),
		nft.R("every neighbour has the gateway's MAC", nft.Is(nft.ARPOperation, "request"), nft.IsNot(nft.ARPSenderIP, "0.0.0.0"),
			nft.Mapped(nft.EtherDAddr, gateway, nft.IIfName), nft.To(nft.ARPOperation, "reply"),
			nft.Copy(nft.ARPSenderIP, nft.ARPTargetIP), nft.Mapped(nft.ARPTargetIP, tenant4, nft.IIfName),
			nft.Copy(nft.ARPTargetMAC, nft.ARPSenderMAC), nft.Copy(nft.ARPSenderMAC, nft.EtherDAddr),
			nft.Copy(nft.EtherDAddr, nft.EtherSAddr), nft.To(nft.PktType, "host"), nft.Accept),
		nft.R("answers whom it is asked by", nft.Is(nft.ARPOperation, "reply"), nft.Accept),
		nft.R("to the gateway", unicast, nft.Mapped(nft.EtherDAddr, gateway, nft.IIfName), nft.MarkSet{Bit: bridged}, nft.Accept),
		nft.R("a gateway that is not there", unicast, nft.Drop),
	}},
	{Name: "forward", Type: "filter", Hook: "forward", Priority: prioBrFilter, Rules: []nft.Rule{
		nft.R("from a container", nft.Is(nft.IIfName, externalPorts), nft.Goto("away")),
		nft.R("to a container", nft.Is(nft.OIfName, externalPorts), nft.Goto("home")),
		// What is for one alone was for the host, by its MAC, when it came. Where bridge-nf-call-iptables is on, the
		// kernel translates what is for a published port after that, and bridges it.
		nft.R("disable_icc, internal switches: only to a published port", nft.In(silent, nft.IIfName), nft.In(silent, nft.OIfName), nft.AnyOf(nft.PktType, "broadcast", "multicast"), nft.Drop),
	}},
	{Name: "home", Rules: []nft.Rule{
		nft.R("of another VLAN", nft.AnyOf(nft.FrameType, "8021q", "8021ad"), nft.Drop),
		nft.R("bridged: no rule of the host's is meant", nft.MarkSet{Bit: bridged}),
	}},
	{Name: "away", Rules: []nft.Rule{
		nft.R("bridged: no rule of the host's is meant", nft.MarkSet{Bit: bridged}),
		nft.R("disable_icc", nft.Is(nft.OIfName, externalPorts), nft.In(silent, nft.IIfName), nft.In(silent, nft.OIfName), nft.NotIn(tunnel, nft.IIfName), nft.Goto("discreet")),
		nft.R("with its own MAC", nft.NotIn(l2port, nft.IIfName), nft.Accept),
		nft.R("nothing but through the gateway", nft.Is(nft.OIfName, externalPorts), nft.In(tunnel, nft.IIfName), nft.IsNot(nft.PktType, "host"), nft.Drop),
		nft.R("stays on this host", nft.Is(nft.OIfName, externalPorts), nft.Accept),
		nft.R("the host's MAC in ARP", nft.Mapped(nft.ARPSenderMAC, hostMAC, nft.IIfName)),
		nft.R("and as whom it looks for", nft.In(station, nft.IIfName, nft.ARPTargetMAC), nft.Mapped(nft.ARPTargetMAC, hostMAC, nft.IIfName)),
		nft.R("the host's MAC in neighbour discovery", nft.Is(nft.L4Proto, "ipv6-icmp"), nft.Jump("nd")),
		nft.R("the host's MAC", nft.Mapped(nft.EtherSAddr, hostMAC, nft.IIfName), nft.Accept),
		nft.R("not yet, or no longer, connected", nft.Drop),
	}},
	{Name: "discreet", Rules: []nft.Rule{
		// What is sent to the address of one has been dropped by now. Where bridge-nf-call-iptables is on, the kernel
		// translates what is for a published port after that, and bridges it.
		nft.R("to a published port", nft.In(silent4, nft.IPDAddr), unicast, nft.Accept),
		nft.R("to a published port (6)", nft.In(silent6, nft.IP6DAddr), unicast, nft.Accept),
		nft.R("nothing else: ARP, neighbour discovery, multicast", nft.Drop),
	}},
	{Name: "input", Type: "filter", Hook: "input", Priority: prioBrFilter, Rules: []nft.Rule{
		nft.R("a gateway tells its MAC", nft.In(sought, nft.IIfName, nft.ARPSenderIP), nft.Accept),
		nft.R("the host is not in the VLAN", nft.Is(nft.IIfName, vlans), nft.Drop),
		nft.R("the host is not in the VLAN", nft.In(apart, nft.IIfName), nft.Drop),
	}},
	{Name: "output", Type: "filter", Hook: "output", Priority: prioBrFilter, Rules: []nft.Rule{
		nft.R("looks for a gateway, as nobody", nft.In(sought, nft.OIfName, nft.ARPTargetIP), nft.Is(nft.ARPOperation, "request"), nft.To(nft.ARPSenderIP, "0.0.0.0"), nft.Accept),
		nft.R("the host is not in the VLAN", nft.Is(nft.OIfName, vlans), nft.Drop),
		nft.R("the host is not in the VLAN", nft.In(apart, nft.OIfName), nft.Drop),
	}},
	{Name: "nd", Rules: []nft.Rule{
		// No message of Linux has two options. One of length 0 makes the message void (RFC 4861, section 4.6).
		nft.R("could tell the container's MAC in a second option", nft.AnyOf(nft.ICMPv6Type, "nd-neighbor-solicit", "nd-neighbor-advert"), nft.IsNot(nft.NDSecond, "0x0"), nft.Drop),
		nft.R("could tell the container's MAC in a second option", nft.Is(nft.ICMPv6Type, "nd-router-solicit"), nft.IsNot(nft.RSSecond, "0x0"), nft.Drop),
		nft.R("solicits", nft.Is(nft.ICMPv6Type, "nd-neighbor-solicit"), nft.Is(nft.NDOption, sourceLinkLayer), nft.Mapped(nft.NDOptionMAC, hostMAC, nft.IIfName), nft.Return),
		nft.R("advertises", nft.Is(nft.ICMPv6Type, "nd-neighbor-advert"), nft.Is(nft.NDOption, targetLinkLayer), nft.Mapped(nft.NDOptionMAC, hostMAC, nft.IIfName), nft.Return),
		nft.R("looks for routers", nft.Is(nft.ICMPv6Type, "nd-router-solicit"), nft.Is(nft.RSOption, sourceLinkLayer), nft.Mapped(nft.RSOptionMAC, hostMAC, nft.IIfName), nft.Return),
		nft.R("would tell the container's MAC in another place", nft.AnyOf(nft.ICMPv6Type, "nd-neighbor-solicit", "nd-neighbor-advert"), nft.IsNot(nft.NDOption, nonce), nft.Drop),
		nft.R("would tell the container's MAC in another place", nft.Is(nft.ICMPv6Type, "nd-router-solicit"), nft.IsNot(nft.RSOption, nonce), nft.Drop),
	}},
}

// validateExternal reports what in a network's record no external mode can do.
func validateExternal(n Network) error {
	m := n.Options.Mode
	switch {
	case n.Options.Interface == "":
		return fmt.Errorf("mode %s needs an uplink: give -o interface=… with the network interface, or the bridge, that leads to the LAN", m)
	case n.Internal:
		return fmt.Errorf("an internal network has no uplink: leave --internal out, or use mode nat in place of %s", m)
	case n.Options.Macvlan && n.Options.DisableICC:
		return errors.New("option disable_icc needs a switch: leave backend=macvlan out")
	case m == L2Tunnel && len(n.IPv6) > 0:
		return errors.New("mode l2tunnel is for IPv4: leave --ipv6 out")
	}
	for _, s := range n.IPv4 {
		if m == L2Tunnel && !s.Gateway.IsValid() {
			return fmt.Errorf("mode l2tunnel sends everything through the gateway, and subnet %s has none: give --gateway", s.Pool)
		}
	}
	return nil
}

// externalNetwork is what a network on an external switch wants but for its endpoints. Networks of
// the same uplink and VLAN share it.
func externalNetwork(n Network) plan.State {
	s := plan.State{}
	if !n.Options.Macvlan {
		s.Add(element(external, n.Bridge(), n.Bridge()))
	}
	if n.Wire.Foreign {
		return s
	}
	if n.Options.VLAN != 0 {
		if g := n.TunnelGateway(); g.IsValid() {
			s.Add(element(sought, n.Uplink(), g.String()))
		}
		s.Add(plan.VLAN{Name: n.Uplink(), Alias: n.wireAlias(), Uplink: n.Options.Interface, ID: n.Options.VLAN, Up: true})
	}
	if n.Options.Macvlan {
		if n.Options.HostAccess {
			s.Merge(shim(n))
		}
		return s
	}
	s.Add(plan.Switch{Name: n.Bridge(), Alias: n.wireAlias(), Uplink: n.Uplink(), Up: true, Moved: true})
	if n.bypasses() {
		s.Add(plan.Shortcut{Bridge: n.Bridge(), Link: n.Uplink()})
	}
	return s
}

// bypasses reports whether TCP and UDP of a network on an external switch can go past it: no rule of the
// switch drops or changes them, and its uplink, which is known, is the wire. In a VLAN it is not: a program
// that puts the tag on comes after it. Nor is it where containers may send more than the uplink carries: the
// switch drops what is too large, and programs hand it over.
func (n Network) bypasses() bool {
	return n.Options.Mode == Transparent && n.Options.VLAN == 0 && !n.Wire.Foreign &&
		!n.Options.Macvlan && !n.Options.DisableICC && !n.Options.SlowPath && n.MTU() <= n.Wire.MTU
}

// Connect takes note of the uplink as it is.
func (n *Network) Connect(u plan.Uplink) {
	n.Wire.MAC, n.Wire.MTU, n.Wire.Host, n.Wire.Host6 = u.MAC, u.MTU, netip.Addr{}, netip.Addr{}
	if !n.Options.Macvlan {
		return // the addresses are the switch's
	}
	for _, p := range slices.Backward(u.Addresses) { // the first is the one that counts
		if p.Addr().Is4() {
			n.Wire.Host = p.Addr()
		} else {
			n.Wire.Host6 = p.Addr()
		}
	}
}

// wireAlias is the mark of what networks of the same uplink and VLAN share.
func (n Network) wireAlias() string {
	alias := "dockway uplink=" + n.Options.Interface
	if n.Options.VLAN != 0 {
		alias += " vlan=" + strconv.Itoa(n.Options.VLAN)
	}
	return alias
}

// externalEndpoint is what one endpoint on an external switch wants. Before a container joins it,
// nothing.
func externalEndpoint(n Network, e Endpoint) plan.State {
	s := plan.State{}
	if !e.Joined {
		return s
	}
	if n.Options.Macvlan {
		return macvlanEndpoint(n, e)
	}
	s.Merge(port(n, e))
	if n.Options.VLAN != 0 {
		s.Add(element(apart, e.Port()))
	}
	s.Add(element(host, e.Port(), n.Wire.MAC.String()))
	mac := e.MAC.String()
	if e.Address.IsValid() {
		s.Add(element(inside4, mac, e.Address.Addr().String()))
	}
	if e.Address6.IsValid() {
		s.Add(element(inside6, mac, e.Address6.Addr().String()), element(inside6, mac, linkLocal(e.MAC).String()))
	}
	if n.Options.DisableICC {
		s.Merge(silence(e))
	}
	if n.bypasses() {
		s.Add(plan.Shortcut{Bridge: n.Bridge(), Link: e.Port(), MAC: e.MAC, Addresses: sources(e)})
	}
	if n.Options.Mode == Transparent {
		return s
	}
	s.Merge(behindHost(n, e))
	for _, b := range e.Bindings {
		s.Merge(publishExternal(n, b))
	}
	if n.Options.Mode == L2Tunnel {
		s.Merge(throughGateway(n, e))
	}
	return s
}

// silence keeps an endpoint from others that do not reach each other. Ports that are isolated would
// still do so by way of a router, and in an l2tunnel network always do.
func silence(e Endpoint) plan.State {
	s := plan.Of(element(silent, e.Port()))
	if e.Address.IsValid() {
		s.Add(element(silent4, e.Address.Addr().String()))
	}
	if e.Address6.IsValid() {
		s.Add(element(silent6, e.Address6.Addr().String()), element(silent6, linkLocal(e.MAC).String()))
	}
	return s
}

// macvlanEndpoint is what an endpoint without a switch wants: a link, which leaves with the container,
// and the way for the host to it.
func macvlanEndpoint(n Network, e Endpoint) plan.State {
	s := plan.Of(plan.Macvlan{Name: e.Peer(), Alias: e.Alias(), Lower: n.Uplink(), MAC: e.MAC, MTU: e.MTU(n), Up: false})
	if !n.Options.HostAccess {
		return s
	}
	for _, a := range e.Addresses() {
		source := n.Wire.Host
		if a.Is6() {
			source = n.Wire.Host6
		}
		s.Add(plan.Route{Prefix: netip.PrefixFrom(a, a.BitLen()), Link: n.shim(), Source: source})
	}
	return s
}

// shim is the host's own macvlan link, by which it reaches its containers: what the host sends on
// the uplink itself goes to the wire only. It answers for the host's addresses: for IPv4 it does so
// as any link of the host, for IPv6 it needs them.
func shim(n Network) plan.State {
	mac := macFrom("shim " + n.shim() + n.Wire.MAC.String())
	s := plan.Of(plan.Macvlan{Name: n.shim(), Alias: n.wireAlias(), Lower: n.Uplink(), MAC: mac, MTU: n.Wire.MTU, Up: true})
	if n.Wire.Host6.IsValid() {
		s.Add(
			plan.Address{Link: n.shim(), Prefix: netip.PrefixFrom(n.Wire.Host6, 128)},
			plan.Address{Link: n.shim(), Prefix: netip.PrefixFrom(linkLocal(mac), 64)},
		)
	}
	return s
}

// shim is the name of that link.
func (n Network) shim() string { return n.Options.linkName("dwm") }

// relays reports whether published ports are relayed.
func (n Network) relays() bool {
	return n.Options.Mode == L2Tunnel || n.External() && n.Options.VLAN != 0
}

// behindHost has the wire see the host's MAC in place of the container's.
func behindHost(n Network, e Endpoint) plan.State {
	wire, mac := n.Wire.MAC.String(), e.MAC.String()
	s := plan.Of(
		element(l2port, e.Port()),
		plan.Element{Set: hostMAC, Elem: e.Port(), Data: wire},
	)
	if e.Address.IsValid() {
		addr := e.Address.Addr().String()
		s.Add(plan.Element{Set: behind4, Elem: wire + " . " + addr, Data: mac}, element(behindIP4, addr))
	}
	if e.Address6.IsValid() {
		addr := e.Address6.Addr().String()
		s.Add(
			plan.Element{Set: behind6, Elem: wire + " . " + addr, Data: mac}, element(behindIP6, addr),
			plan.Element{Set: behind6, Elem: wire + " . " + linkLocal(e.MAC).String(), Data: mac},
		)
	}
	return s
}

// Found are the addresses that the wire finds at the host's MAC: the host's own, those of its uplink
// that are given, and those of containers behind it. On a bridge of the host's there are none to tell
// of: which of its ports is the wire is not known.
func (n Network) Found(own []netip.Prefix, endpoints []Endpoint) []plan.Neighbour {
	if !n.External() || n.Wire.Foreign || n.Options.Macvlan {
		return nil
	}
	var out []plan.Neighbour
	add := func(a netip.Addr) {
		out = append(out, plan.Neighbour{Link: n.Uplink(), Address: a, MAC: n.Wire.MAC})
	}
	if n.Options.VLAN == 0 { // where the host is
		for _, p := range own {
			add(p.Addr())
		}
	}
	if n.Options.Mode == Transparent {
		return out // its containers have MACs of their own
	}
	for _, e := range endpoints {
		if !e.Joined {
			continue
		}
		for _, a := range e.Addresses() {
			add(a)
		}
		if e.Address6.IsValid() {
			add(linkLocal(e.MAC))
		}
	}
	return out
}

// throughGateway sends what the container sends, and what the host sends it, to the gateway. In a VLAN
// the host reaches containers as anybody does who is not in it: by routes of its own.
func throughGateway(n Network, e Endpoint) plan.State {
	addr := e.Address.Addr()
	s := plan.Of(
		element(tunnel, e.Port()),
		plan.Element{Set: tenant4, Elem: e.Port(), Data: addr.String()},
	)
	if n.Wire.Gateway != (plan.MAC{}) {
		s.Add(plan.Element{Set: gateway, Elem: e.Port(), Data: n.Wire.Gateway.String()})
	}
	i := slices.IndexFunc(n.IPv4, func(s Subnet) bool { return s.Pool.Contains(addr) })
	if i >= 0 && n.Options.VLAN == 0 {
		s.Add(plan.Route{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Link: n.Bridge(), Via: n.IPv4[i].Gateway})
	}
	return s
}

// publishExternal is what one port mapping in force wants. In an l2bridge network the host routes the
// flows of the port, which would else go between container and wire without it. It relays them in a
// VLAN, which it is not in, and in an l2tunnel network: a packet that comes by the switch cannot be
// translated and sent out by it again, for where bridge-nf-call-iptables is on, the kernel bridges it.
func publishExternal(n Network, b policy.Binding) plan.State {
	if n.relays() {
		return plan.Of(hold(b))
	}
	addr, proto, port := b.Container.Addr(), string(b.Protocol), strconv.Itoa(int(b.Container.Port()))
	routed, open, routing := routed4, open4, routing4
	if addr.Is6() {
		routed, open, routing = routed6, open6, routing6
	}
	return publish(b).Merge(plan.Of(routing, element(routed, addr.String(), proto, port), element(open, addr.String(), proto, port)))
}
