package mode

import (
	"slices"
	"time"

	"github.com/dockway/dockway/driver/plan/nft"
)

// Bits of the packet mark.
const (
	// admitted says "dockway has accepted this packet". It is set in our forward chain, which takes
	// off what others have set before, and taken off again in the chain right behind the host's own
	// forward chains.
	admitted = 0x1000
	// bridged says "this frame is between a container and the wire, or between two containers", so
	// that where bridge-nf-call-iptables is on, it is not tracked as if the host routed it.
	bridged = 0x2000
)

// What an endpoint's facts are kept in. Everything about endpoints and ports is an element of
// these; the rules never change.
var (
	// endpoints are addresses that nobody but their own network may send to.
	endpoint4 = &nft.Set{Family: nft.Inet, Name: "endpoint4", Key: []nft.Type{nft.IPv4}, Size: maxAddresses, Guard: true, Comment: "addresses of containers"}
	endpoint6 = &nft.Set{Family: nft.Inet, Name: "endpoint6", Key: []nft.Type{nft.IPv6}, Size: maxAddresses, Guard: true, Comment: "addresses of containers"}
	// loopback are ports published on a loopback address.
	loopback = &nft.Set{Family: nft.Inet, Name: "loopback", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Guard: true, Comment: "ports published on 127.0.0.0/8"}
	// internal are the bridges of networks without a way out.
	internal = &nft.Set{Family: nft.Inet, Name: "internal", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "bridges of internal networks"}
	// isolated are the bridges of networks with disable_icc.
	isolated = &nft.Set{Family: nft.Inet, Name: "isolated", Key: []nft.Type{nft.IfName}, Guard: true, Comment: "bridges whose containers do not reach each other"}

	member4   = &nft.Set{Family: nft.Inet, Name: "member4", Key: []nft.Type{nft.IfName, nft.IPv4}, Size: maxAddresses, Comment: "which bridge has which container"}
	member6   = &nft.Set{Family: nft.Inet, Name: "member6", Key: []nft.Type{nft.IfName, nft.IPv6}, Size: maxAddresses, Comment: "which bridge has which container"}
	uplinkSet = &nft.Set{Family: nft.Inet, Name: "uplink", Key: []nft.Type{nft.IfName}, Comment: "links with a default route"}

	port4    = &nft.Set{Family: nft.Inet, Name: "port4", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv4, nft.Service}, Comment: "ports published on one address"}
	port6    = &nft.Set{Family: nft.Inet, Name: "port6", Key: []nft.Type{nft.IPv6, nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv6, nft.Service}, Comment: "ports published on one address"}
	anyPort4 = &nft.Set{Family: nft.Inet, Name: "anyport4", Key: []nft.Type{nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv4, nft.Service}, Comment: "ports published on every address"}
	anyPort6 = &nft.Set{Family: nft.Inet, Name: "anyport6", Key: []nft.Type{nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv6, nft.Service}, Comment: "ports published on every address"}

	source4    = &nft.Set{Family: nft.Bridge, Name: "source4", Key: []nft.Type{nft.IfName, nft.MAC, nft.IPv4}, Comment: "what a port may send as"}
	source6    = &nft.Set{Family: nft.Bridge, Name: "source6", Key: []nft.Type{nft.IfName, nft.MAC, nft.IPv6}, Comment: "what a port may send as"}
	autoconf   = &nft.Set{Family: nft.Bridge, Name: "autoconf", Key: []nft.Type{nft.IfName, nft.MAC}, Comment: "ports whose container makes its IPv6 addresses itself"}
	advised    = &nft.Set{Family: nft.Bridge, Name: "advised", Key: []nft.Type{nft.IfName}, Comment: "ports whose container heeds routers' advertisements"}
	station    = &nft.Set{Family: nft.Bridge, Name: "station", Key: []nft.Type{nft.IfName, nft.MAC}, Comment: "the container behind a port"}
	dualStack  = &nft.Set{Family: nft.Bridge, Name: "ipv6", Key: []nft.Type{nft.IfName}, Comment: "ports with IPv6"}
	published4 = &nft.Set{Family: nft.Bridge, Name: "published4", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Comment: "published ports that the default firewall would drop"}
	published6 = &nft.Set{Family: nft.Bridge, Name: "published6", Key: []nft.Type{nft.IPv6, nft.Protocol, nft.Service}, Comment: "published ports that the default firewall would drop"}
	flow4      = &nft.Set{Family: nft.Bridge, Name: "flow4", Key: []nft.Type{nft.IfName, nft.IPv4, nft.Protocol}, Dynamic: true, Timeout: flowTimeout, Size: maxFlows, Comment: "who a container has spoken to"}
	flow6      = &nft.Set{Family: nft.Bridge, Name: "flow6", Key: []nft.Type{nft.IfName, nft.IPv6, nft.Protocol}, Dynamic: true, Timeout: flowTimeout, Size: maxFlows, Comment: "who a container has spoken to"}
)

// A flow of a protocol that the default firewall keeps out is forgotten after the time that
// connection tracking gives a generic flow (nf_conntrack_generic_timeout).
const (
	flowTimeout = 10 * time.Minute
	maxFlows    = 65536
)

// Sets in which every packet of the host is looked up have a bound, far above what a host holds: a bridge has
// 1,023 ports. The kernel searches a table of fixed size faster than one that grows, and one takes 16 bytes
// for each element that it could have.
const (
	maxAddresses = 16 << 10
	maxTunnels   = 32 << 10
)

// Priorities of nftables hooks, by their names in nft(8).
const (
	prioRaw        = -300
	prioDstNAT     = -100
	prioFilter     = 0
	prioSrcNAT     = 100
	prioBrDstNAT   = -300
	prioBrFilter   = -200
	justBefore     = -1
	justAfter      = 1
	bridges        = "dwb*"
	ports          = "dwv*"
	loopbackPrefix = "127.0.0.0/8"
)

// InetTable is the part of the rules that routed packets pass, and bridged ones on hosts where
// bridge-nf-call-iptables is on.
func InetTable() *nft.Table {
	return &nft.Table{
		Family: nft.Inet, Name: "dockway",
		Sets: slices.Concat([]*nft.Set{endpoint4, endpoint6, loopback, internal, isolated, member4, member6, uplinkSet, port4, port6, anyPort4, anyPort6}, externalInet, overlayInet),
		Chains: append([]*nft.Chain{
			{Name: "raw", Type: "filter", Hook: "prerouting", Priority: prioRaw, Rules: []nft.Rule{
				nft.R("between hosts of the cluster", nft.Is(nft.L4Proto, "udp"), nft.In(tunnelPort, nft.DPort), nft.Jump("encapsulated")),
				nft.R("on an external switch: bridged, needs no tracking", nft.MarkIs{Bit: bridged}, nft.Notrack{}, nft.Accept),
				nft.R("same network: bridged, needs no tracking", nft.Is(nft.IIfName, bridges), nft.In(member4, nft.IIfName, nft.IPDAddr), nft.Notrack{}, nft.Accept),
				nft.R("same network: bridged, needs no tracking (6)", nft.Is(nft.IIfName, bridges), nft.In(member6, nft.IIfName, nft.IP6DAddr), nft.Notrack{}, nft.Accept),
				nft.R("a container's own address is for its network and the host", nft.In(endpoint4, nft.IPDAddr), nft.IsNot(nft.IIfName, "lo"), nft.Drop),
				nft.R("a container's own address is for its network and the host (6)", nft.In(endpoint6, nft.IP6DAddr), nft.IsNot(nft.IIfName, "lo"), nft.Drop),
				nft.R("published on loopback: for the host only", nft.Is(nft.IPDAddr, loopbackPrefix), nft.IsNot(nft.IIfName, "lo"), nft.In(loopback, nft.IPDAddr, nft.L4Proto, nft.DPort), nft.Drop),
			}},
			{Name: "prerouting", Type: "nat", Hook: "prerouting", Priority: prioDstNAT, Rules: []nft.Rule{
				nft.R("to an address of this host", nft.Is(nft.FibDaddrType, "local"), nft.Jump("publish")),
			}},
			{Name: "output", Type: "nat", Hook: "output", Priority: prioDstNAT, Rules: []nft.Rule{
				nft.R("from this host to an address of it", nft.Is(nft.FibDaddrType, "local"), nft.Jump("publish")),
			}},
			{Name: "publish", Rules: []nft.Rule{
				nft.R("loopback is relayed", nft.Is(nft.IPDAddr, loopbackPrefix), nft.Accept),
				nft.R("loopback is relayed (6)", nft.Is(nft.IP6DAddr, "::1"), nft.Accept),
				nft.R("published on one address", nft.DNAT{Fields: []nft.Field{nft.IPDAddr, nft.L4Proto, nft.DPort}, Map: port4}),
				nft.R("published on every address", nft.DNAT{Fields: []nft.Field{nft.L4Proto, nft.DPort}, Map: anyPort4}),
				nft.R("published on one address (6)", nft.DNAT{Fields: []nft.Field{nft.IP6DAddr, nft.L4Proto, nft.DPort}, Map: port6}),
				nft.R("published on every address (6)", nft.DNAT{Fields: []nft.Field{nft.L4Proto, nft.DPort}, Map: anyPort6}),
			}},
			{Name: "forward", Type: "filter", Hook: "forward", Priority: prioFilter + justBefore, Rules: []nft.Rule{
				nft.R("a mark that others have set says nothing", nft.MarkIs{Bit: admitted}, nft.MarkClear{Bit: admitted}),
				nft.R("on an external switch: bridged", nft.MarkIs{Bit: bridged}, nft.In(external, nft.IIfName, nft.OIfName), nft.Goto("admit")),
				nft.R("not of a nat network", nft.IsNot(nft.IIfName, bridges), nft.IsNot(nft.OIfName, bridges), nft.Goto("published")),
				nft.R("disable_icc: not through the gateway either", nft.In(isolated, nft.IIfName), nft.Is(nft.CtState, "untracked"), nft.Drop),
				nft.R("same network", nft.In(member4, nft.IIfName, nft.IPDAddr), nft.Goto("admit")),
				nft.R("same network (6)", nft.In(member6, nft.IIfName, nft.IP6DAddr), nft.Goto("admit")),
				nft.R("known flows", nft.AnyOf(nft.CtState, "established", "related"), nft.Goto("admit")),
				nft.R("same network: flooded, never routed", nft.Is(nft.IIfName, bridges), nft.Is(nft.OIfName, bridges), nft.AnyOf(nft.PktType, "broadcast", "multicast"), nft.Goto("admit")),
				nft.R("same network: link-local, never routed", nft.Is(nft.IIfName, bridges), nft.NotIn(isolated, nft.IIfName), nft.Is(nft.IP6DAddr, "fe80::/10"), nft.Goto("admit")),
				nft.R("internal networks have no way out, nor to a published port", nft.In(internal, nft.IIfName), nft.Drop),
				nft.R("untracked or broken: would leave untranslated", nft.AnyOf(nft.CtState, "invalid", "untracked"), nft.Drop),
				nft.R("published ports", nft.Is(nft.CtStatus, "dnat"), nft.Goto("admit")),
				nft.R("nothing else comes in, from outside or from another network", nft.Is(nft.OIfName, bridges), nft.Drop),
				nft.R("to an overlay", nft.Is(nft.OIfName, transit), nft.Goto("enter")),
				nft.R("the outside, by an external switch", nft.Is(nft.OIfName, switches), nft.Goto("admit")),
				nft.R("another switch of this host: its owner's rules decide", nft.Is(nft.OIfKind, "bridge"), nft.NotIn(uplinkSet, nft.OIfName), nft.Accept),
				nft.R("the outside", nft.Goto("admit")),
			}},
			published,
			sent,
			{Name: "admit", Rules: []nft.Rule{
				nft.R("for DOCKER-USER, where the policy of FORWARD may be drop", nft.MarkSet{Bit: admitted}, nft.Accept),
			}},
			{Name: "admitted", Type: "filter", Hook: "forward", Priority: prioFilter + justAfter, Rules: []nft.Rule{
				nft.R("the mark has served", nft.MarkIs{Bit: admitted}, nft.MarkClear{Bit: admitted | bridged}),
			}},
			{Name: "postrouting", Type: "nat", Hook: "postrouting", Priority: prioSrcNAT, Rules: []nft.Rule{
				nft.R("container to a published port: replies must come back here", nft.Is(nft.OIfName, bridges), nft.Is(nft.CtStatus, "dnat"), nft.In(endpoint4, nft.IPSAddr), nft.Masquerade{}),
				nft.R("container to a published port: replies must come back here (6)", nft.Is(nft.OIfName, bridges), nft.Is(nft.CtStatus, "dnat"), nft.In(endpoint6, nft.IP6SAddr), nft.Masquerade{}),
				nft.R("container of an external switch to a published port: replies must come back here", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP4, nft.IPSAddr), nft.In(behindIP4, nft.IPDAddr), nft.Masquerade{}),
				nft.R("container of an external switch to a published port: replies must come back here (6)", nft.Is(nft.CtStatus, "dnat"), nft.In(behindIP6, nft.IP6SAddr), nft.In(behindIP6, nft.IP6DAddr), nft.Masquerade{}),
				nft.R("the outside sees the host", nft.IsNot(nft.OIfName, bridges), nft.In(endpoint4, nft.IPSAddr), nft.Masquerade{}),
				nft.R("the outside sees the host (6)", nft.IsNot(nft.OIfName, bridges), nft.In(endpoint6, nft.IP6SAddr), nft.Masquerade{}),
				nft.R("from an overlay", nft.Is(nft.IPSAddr, transit4.String()), nft.Masquerade{}),
				nft.R("from an overlay (6)", nft.Is(nft.IP6SAddr, transit6.String()), nft.Masquerade{}),
			}},
		}, overlayChains...),
	}
}

// BridgeTable is the part of the rules that every frame passes that enters or leaves a port of
// ours: port security in, the default firewall out. A port without elements is shut.
func BridgeTable() *nft.Table { return portTable(externalSets, externalChains) }

// portTable is it with the sets and chains of the modes that have it.
func portTable(sets []*nft.Set, chains []*nft.Chain) *nft.Table {
	return &nft.Table{
		Family: nft.Bridge, Name: "dockway",
		Sets: append([]*nft.Set{source4, source6, autoconf, advised, station, dualStack, published4, published6, flow4, flow6}, sets...),
		Chains: append([]*nft.Chain{
			{Name: "prerouting", Type: "filter", Hook: "prerouting", Priority: prioBrDstNAT, Rules: []nft.Rule{
				nft.R("not ours", nft.IsNot(nft.IIfName, ports), nft.Accept),
				nft.R("port security", nft.VMap{Field: nft.FrameType, Cases: []nft.Case{{Value: "ip", Verdict: nft.Goto("from4")}, {Value: "arp", Verdict: nft.Goto("fromarp")}, {Value: "ip6", Verdict: nft.Goto("from6")}}}),
				nft.R("neither IP nor ARP: VLAN tags, BPDUs and the like", nft.Drop),
			}},
			{Name: "from4", Rules: []nft.Rule{
				nft.R("foreign source", nft.NotIn(source4, nft.IIfName, nft.EtherSAddr, nft.IPSAddr), nft.Drop),
				nft.R("tcp", nft.Is(nft.L4Proto, "tcp"), nft.Accept),
				nft.R("containers serve no DHCP", nft.Is(nft.L4Proto, "udp"), nft.Is(nft.DPort, "68"), nft.Drop),
				nft.R("protocols that come back without asking", nft.AnyOf(nft.L4Proto, "icmp", "igmp", "udp"), nft.Accept),
				nft.R("replies of other protocols may come back", nft.Update{Set: flow4, Fields: []nft.Field{nft.IIfName, nft.IPDAddr, nft.L4Proto}}),
			}},
			{Name: "from6", Rules: []nft.Rule{
				nft.R("makes its addresses itself", nft.In(autoconf, nft.IIfName, nft.EtherSAddr), nft.Goto("fromany6")),
				nft.R("foreign source", nft.NotIn(source6, nft.IIfName, nft.EtherSAddr, nft.IP6SAddr), nft.Drop),
				nft.R("tcp", nft.Is(nft.L4Proto, "tcp"), nft.Accept),
				nft.R("neighbour discovery", nft.Is(nft.L4Proto, "ipv6-icmp"), nft.Goto("fromnd")),
				nft.R("containers serve no DHCPv6", nft.Is(nft.L4Proto, "udp"), nft.Is(nft.DPort, "546"), nft.Drop),
				nft.R("protocols that come back without asking", nft.Is(nft.L4Proto, "udp"), nft.Accept),
				nft.R("replies of other protocols may come back", nft.Update{Set: flow6, Fields: []nft.Field{nft.IIfName, nft.IP6DAddr, nft.L4Proto}}),
			}},
			{Name: "fromnd", Rules: []nft.Rule{
				nft.R("containers are no routers", nft.AnyOf(nft.ICMPv6Type, "nd-router-advert", "nd-redirect"), nft.Drop),
				nft.R("advertises a foreign address", nft.Is(nft.ICMPv6Type, "nd-neighbor-advert"), nft.NotIn(source6, nft.IIfName, nft.EtherSAddr, nft.NDTarget), nft.Drop),
			}},
			{Name: "fromany6", Rules: []nft.Rule{
				nft.R("containers are no routers", nft.AnyOf(nft.ICMPv6Type, "nd-router-advert", "nd-redirect"), nft.Drop),
				nft.R("containers serve no DHCPv6", nft.Is(nft.L4Proto, "udp"), nft.Is(nft.DPort, "546"), nft.Drop),
				nft.R("protocols that come back without asking", nft.AnyOf(nft.L4Proto, "tcp", "udp", "ipv6-icmp"), nft.Accept),
				nft.R("replies of other protocols may come back", nft.Update{Set: flow6, Fields: []nft.Field{nft.IIfName, nft.IP6DAddr, nft.L4Proto}}),
			}},
			{Name: "fromarp", Rules: []nft.Rule{
				nft.R("foreign source", nft.NotIn(source4, nft.IIfName, nft.EtherSAddr, nft.ARPSenderIP), nft.Drop),
				nft.R("foreign sender", nft.NotIn(source4, nft.IIfName, nft.ARPSenderMAC, nft.ARPSenderIP), nft.Drop),
			}},
			{Name: "postrouting", Type: "filter", Hook: "postrouting", Priority: prioBrFilter, Rules: []nft.Rule{
				nft.R("the mark has served", nft.MarkClear{Bit: admitted | bridged}),
				nft.R("not ours", nft.IsNot(nft.OIfName, ports), nft.Accept),
				nft.R("most of it", nft.Is(nft.EtherType, "ip"), nft.Is(nft.L4Proto, "tcp"), nft.Accept),
				nft.R("no IPv6 for endpoints without it", nft.Is(nft.EtherType, "ip6"), nft.NotIn(dualStack, nft.OIfName), nft.Drop),
				nft.R("its addresses and routes are given", nft.Is(nft.ICMPv6Type, "nd-router-advert"), nft.NotIn(advised, nft.OIfName), nft.Drop),
				nft.R("the port's own flood, sent back by hairpin", nft.AnyOf(nft.PktType, "broadcast", "multicast"), nft.In(station, nft.OIfName, nft.EtherSAddr), nft.Drop),
				nft.R("HNS's default firewall", nft.Is(nft.EtherType, "ip"), nft.AnyOf(nft.L4Proto, "icmp", "igmp", "udp"), nft.Accept),
				nft.R("HNS's default firewall (6)", nft.Is(nft.EtherType, "ip6"), nft.AnyOf(nft.L4Proto, "tcp", "udp", "ipv6-icmp"), nft.Accept),
				nft.R("not IP", nft.NoneOf(nft.EtherType, "ip", "ip6"), nft.Accept),
				nft.R("published", nft.In(published4, nft.IPDAddr, nft.L4Proto, nft.DPort), nft.Accept),
				nft.R("published (6)", nft.In(published6, nft.IP6DAddr, nft.L4Proto, nft.DPort), nft.Accept),
				nft.R("replies", nft.In(flow4, nft.OIfName, nft.IPSAddr, nft.L4Proto), nft.Accept),
				nft.R("replies (6)", nft.In(flow6, nft.OIfName, nft.IP6SAddr, nft.L4Proto), nft.Accept),
				nft.R("every other protocol", nft.Drop),
			}},
		}, chains...),
	}
}
