package mode

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// An overlay network spans hosts. On each of them it has a namespace of its own, so that networks
// with the same subnets do not meet and the host's rules do not see its frames. In it, every subnet has
// a bridge: its ports are the containers, and a VXLAN device that leads to the other hosts. Who is
// where is known from gossip and written down beforehand (FDB and neighbour entries): nothing is
// flooded, nothing is learnt. The gateway is on every host, with one MAC (an anycast gateway); it
// leads from subnet to subnet, and outside if the network has outbound NAT.

// Overheads of VXLAN (RFC 7348, section 5): the outer IP and UDP headers, VXLAN's own, and the
// Ethernet header of what is encapsulated.
const (
	overhead4 = 20 + 8 + 8 + 14
	overhead6 = 40 + 8 + 8 + 14
)

// Links that lead from a namespace to the host: with the host's address, and with the container's.
const (
	translated = "dwgt"
	plain      = "dwge"
	transit    = "dwg*"
)

// Remote is an endpoint of an overlay network on another host.
type Remote struct {
	VSID    uint32
	Address netip.Addr
	MAC     plan.MAC
	VTEP    netip.Addr // the address of its host among the peers
	Host    string     // its name, for people
}

// Statement is what a host tells its peers about an endpoint of its own.
type Statement struct {
	VSID    uint32
	Address netip.Addr
	MAC     plan.MAC
}

// Sets of family inet, in the host.
var (
	tunnelPort = &nft.Set{Family: nft.Inet, Name: "vxlan", Key: []nft.Type{nft.Service}, Guard: true, Comment: "UDP ports of VXLAN"}
	peer4      = &nft.Set{Family: nft.Inet, Name: "peer4", Key: []nft.Type{nft.IPv4}, Comment: "hosts of the cluster"}
	peer6      = &nft.Set{Family: nft.Inet, Name: "peer6", Key: []nft.Type{nft.IPv6}, Comment: "hosts of the cluster"}
	tunnel4    = &nft.Set{Family: nft.Inet, Name: "tunnel4", Key: []nft.Type{nft.IPv4, nft.IPv4}, Size: maxTunnels, Comment: "hosts of the cluster, and this one"}
	tunnel6    = &nft.Set{Family: nft.Inet, Name: "tunnel6", Key: []nft.Type{nft.IPv6, nft.IPv6}, Size: maxTunnels, Comment: "hosts of the cluster, and this one"}

	overlayInet = []*nft.Set{tunnelPort, peer4, peer6, tunnel4, tunnel6}
)

// noUser is a user that nobody can be (uid_t -1): what any socket sends has another.
const noUser = "4294967295"

// overlayChains guard what is encapsulated, in every host of the cluster, with overlays or without. A
// container whose packets leave with the host's address could otherwise speak to its peers as the host
// does. Hosts may have more addresses than their peers know, and VXLAN listens at all of them: so what a
// peer's container sends to another one of this host's is refused here. Each frame of an overlay pays for
// these rules, and all UDP of the host for what leads to them.
var overlayChains = []*nft.Chain{
	{Name: "encapsulated", Rules: []nft.Rule{
		nft.R("each flow in it would be tracked as one of the host's", nft.In(tunnel4, nft.IPSAddr, nft.IPDAddr), nft.Notrack{}, nft.Accept),
		nft.R("each flow in it would be tracked as one of the host's (6)", nft.In(tunnel6, nft.IP6SAddr, nft.IP6DAddr), nft.Notrack{}, nft.Accept),
		nft.R("from peers only, at the address that they know", nft.Is(nft.FibDaddrType, "local"), nft.Drop),
	}},
	{Name: "encapsulating", Rules: []nft.Rule{
		nft.R("by the kernel, never by a process", nft.IsNot(nft.SKUID, noUser), nft.Drop),
		nft.R("each flow in it would be tracked as one of the host's", nft.Notrack{}, nft.Accept),
	}},
	{Name: "vxlanthrough", Type: "filter", Hook: "forward", Priority: prioRaw, Rules: []nft.Rule{
		nft.R("a container cannot pose as the host to its peers", nft.Is(nft.L4Proto, "udp"), nft.In(tunnelPort, nft.DPort), nft.In(peer4, nft.IPDAddr), nft.Drop),
		nft.R("a container cannot pose as the host to its peers (6)", nft.Is(nft.L4Proto, "udp"), nft.In(tunnelPort, nft.DPort), nft.In(peer6, nft.IP6DAddr), nft.Drop),
	}},
	{Name: "leave", Rules: []nft.Rule{
		nft.R("not to another overlay", nft.Is(nft.OIfName, transit), nft.Drop),
		nft.R("the outside", nft.Goto("admit")),
	}},
	{Name: "enter", Rules: []nft.Rule{
		nft.R("known flows", nft.AnyOf(nft.CtState, "established", "related"), nft.Goto("admit")),
		nft.R("nothing else comes in", nft.Drop),
	}},
}

// transits are rules of the host's forward chain: what leaves an overlay by its gateway.
var transits = []nft.Rule{
	nft.R("from an overlay", nft.Is(nft.IIfName, transit), nft.Goto("leave")),
	nft.R("to an overlay", nft.Is(nft.OIfName, transit), nft.Goto("enter")),
}

// NamespaceTables are the tables of an overlay's namespace.
func NamespaceTables() []*nft.Table {
	return []*nft.Table{namespaceInet(), portTable(nil, nil)}
}

func namespaceInet() *nft.Table {
	return &nft.Table{
		Family: nft.Inet, Name: "dockway",
		Sets: []*nft.Set{isolated},
		Chains: []*nft.Chain{
			{Name: "input", Type: "filter", Hook: "input", Priority: prioFilter, Rules: []nft.Rule{
				nft.R("the gateway answers pings, and neighbour discovery", nft.AnyOf(nft.L4Proto, "icmp", "ipv6-icmp"), nft.Accept),
				nft.R("nothing else is served", nft.Drop),
			}},
			{Name: "forward", Type: "filter", Hook: "forward", Priority: prioFilter, Rules: []nft.Rule{
				nft.R("disable_icc: not through the gateway either", nft.In(isolated, nft.IIfName), nft.Is(nft.OIfName, bridges), nft.Drop),
				nft.R("from subnet to subnet, and to the outside", nft.Is(nft.IIfName, bridges), nft.Accept),
				nft.R("known flows", nft.AnyOf(nft.CtState, "established", "related"), nft.Accept),
				nft.R("nothing else comes in", nft.Drop),
			}},
			{Name: "postrouting", Type: "nat", Hook: "postrouting", Priority: prioSrcNAT, Rules: []nft.Rule{
				nft.R("the host sees the network", nft.Is(nft.OIfName, translated+"*"), nft.Masquerade{}),
			}},
		},
	}
}

// segment is one VXLAN segment of an overlay network: the subnets, one of a family, that it carries.
type segment struct {
	VSID       uint32
	IPv4, IPv6 Subnet // with an invalid pool: none
}

func (g segment) bridge() string { return "dwb" + strconv.FormatUint(uint64(g.VSID), 10) }
func (g segment) vxlan() string  { return "dwo" + strconv.FormatUint(uint64(g.VSID), 10) }

// carries reports whether an address is on the segment.
func (g segment) carries(a netip.Addr) bool {
	return g.IPv4.Pool.IsValid() && g.IPv4.Pool.Contains(a) || g.IPv6.Pool.IsValid() && g.IPv6.Pool.Contains(a)
}

// segments are the network's, in the order of its VSIDs. Subnets are paired with these in the order of
// their addresses: docker's command line gives them to each engine in another order.
func (n Network) segments() []segment {
	byAddress := func(a, b Subnet) int { return a.Pool.Compare(b.Pool) }
	v4, v6 := slices.SortedFunc(slices.Values(n.IPv4), byAddress), slices.SortedFunc(slices.Values(n.IPv6), byAddress)
	out := make([]segment, 0, len(n.Options.VSIDs))
	for i, vsid := range n.Options.VSIDs {
		g := segment{VSID: vsid}
		if i < len(v4) {
			g.IPv4 = v4[i]
		}
		if i < len(v6) {
			g.IPv6 = v6[i]
		}
		out = append(out, g)
	}
	return out
}

// segmentOf is the segment of an endpoint. One that no segment carries is refused by
// ValidateEndpoint.
func (n Network) segmentOf(e Endpoint) segment {
	for _, g := range n.segments() {
		for _, a := range e.Addresses() {
			if g.carries(a) {
				return g
			}
		}
	}
	return n.segments()[0]
}

// Namespace is the name of an overlay's namespace; empty: the network is in the host's.
func (n Network) Namespace() string {
	if !n.Overlay() {
		return ""
	}
	return "dwn" + short(n.ID, 12)
}

// PortKey is the key of an endpoint's link in the host.
func (n Network) PortKey(e Endpoint) plan.Key {
	return plan.Key{Kind: plan.KindVeth, Name: e.Port(), Namespace: n.Namespace()}
}

// validateOverlay reports what in a network's record cannot be an overlay.
func validateOverlay(n Network) error {
	if len(n.Options.VSIDs) == 0 {
		return errors.New("mode overlay needs a VXLAN identifier, the same on every host: give -o vsid=5001, or another from 4096 to 16777214")
	}
	if subnets := max(len(n.IPv4), len(n.IPv6)); subnets != len(n.Options.VSIDs) {
		return fmt.Errorf("option vsid: the network has %d subnets of a family and %d VXLAN identifiers: give one for each, in the order of their addresses", subnets, len(n.Options.VSIDs))
	}
	if n.Options.OutboundNAT && n.Internal {
		return errors.New("option outbound_nat=true leads outside, and an internal network does not: leave one of them out")
	}
	if len(n.Options.Exceptions) > 0 && !n.Options.OutboundNAT {
		return errors.New("option outbound_nat_exceptions is for networks with outbound_nat=true: give both")
	}
	if n.Options.OutboundNAT || len(n.Options.VSIDs) > 1 {
		for _, s := range n.Subnets() {
			if !s.Gateway.IsValid() {
				return fmt.Errorf("subnet %s has no gateway, and its containers need one to leave it: give --gateway", s.Pool)
			}
		}
	}
	return nil
}

// ValidateEndpoint reports what in an endpoint's record its network cannot do.
func ValidateEndpoint(n Network, e Endpoint) error {
	if !n.Overlay() {
		return nil
	}
	for _, a := range e.Addresses() {
		if g := n.segmentOf(e); !g.carries(a) {
			return fmt.Errorf("address %s is not on VXLAN segment %d as the endpoint's other address is: give two of one segment with --ip and --ip6", a, g.VSID)
		}
	}
	return nil
}

// Span takes note of the link that leads to the other hosts: the host's address on it, its MTU, and
// the UDP port of VXLAN.
func (n *Network) Span(local netip.Addr, mtu int, port uint16) {
	overhead := overhead4
	if local.Is6() {
		overhead = overhead6
	}
	n.Wire.Local, n.Wire.MTU, n.Wire.Port = local, mtu-overhead, port
}

// Statements are what the host tells its peers about an endpoint: nothing before a container joins
// it.
func (n Network) Statements(e Endpoint) []Statement {
	if !n.Overlay() || !e.Joined {
		return nil
	}
	var out []Statement
	for _, a := range e.Addresses() {
		out = append(out, Statement{VSID: n.segmentOf(e).VSID, Address: a, MAC: e.MAC})
	}
	return out
}

// Routes are an endpoint's routes to the other subnets of its network.
func (n Network) Routes(e Endpoint) []StaticRoute {
	if !n.Overlay() || n.Options.OutboundNAT {
		return nil
	}
	own := n.segmentOf(e)
	var out []StaticRoute
	for _, g := range n.segments() {
		if g.VSID == own.VSID {
			continue
		}
		if e.Address.IsValid() && g.IPv4.Pool.IsValid() {
			out = append(out, StaticRoute{Prefix: g.IPv4.Pool, Via: own.IPv4.Gateway})
		}
		if e.Address6.IsValid() && g.IPv6.Pool.IsValid() {
			out = append(out, StaticRoute{Prefix: g.IPv6.Pool, Via: own.IPv6.Gateway})
		}
	}
	return out
}

// within puts objects into a namespace.
func within(namespace string, s plan.State) plan.State {
	out := make(plan.State, len(s))
	for key, o := range s {
		key.Namespace = namespace
		out[key] = plan.Within{Namespace: namespace, Object: o}
	}
	return out
}

// overlayNetwork is what an overlay network wants but for its endpoints, here and on other hosts.
func overlayNetwork(n Network) plan.State {
	s := plan.State{}
	for _, t := range NamespaceTables() {
		s.Add(plan.Table{Table: t})
	}
	for _, family := range []string{"iptables", "ip6tables", "arptables"} {
		s.Add(plan.Sysctl{Name: "net/bridge/bridge-nf-call-" + family, From: "1", Value: "0"})
	}
	for _, g := range n.segments() {
		s.Merge(segmentState(n, g))
	}
	if n.Options.OutboundNAT || len(n.Options.VSIDs) > 1 {
		if len(n.IPv4) > 0 {
			s.Add(routing4)
		}
		if len(n.IPv6) > 0 {
			s.Add(routing6)
		}
	}
	host := PlanPeers(n.Wire.Local, n.Wire.Port, nil) // known from the record before the cluster is
	host.Add(plan.Namespace{Name: n.Namespace()})
	if n.Options.OutboundNAT {
		inside, outside := outbound(n)
		s.Merge(inside)
		host.Merge(outside)
	}
	return host.Merge(within(n.Namespace(), s))
}

// segmentState is a segment's bridge, with the gateway, and its VXLAN device.
func segmentState(n Network, g segment) plan.State {
	noIPv6 := "1"
	if g.IPv6.Pool.IsValid() {
		noIPv6 = "0"
	}
	// The same on every host: a container that has spoken to the gateway need not ask again elsewhere.
	mac := macFrom("anycast gateway " + strconv.FormatUint(uint64(g.VSID), 10))
	s := plan.Of(
		plan.Bridge{Name: g.bridge(), Alias: n.Alias(), MAC: mac, MTU: n.MTU(), Up: true},
		plan.Sysctl{Name: "net/ipv6/conf/" + g.bridge() + "/accept_ra", Value: "0"},
		plan.Sysctl{Name: "net/ipv6/conf/" + g.bridge() + "/disable_ipv6", Value: noIPv6},
		plan.VXLAN{Name: g.vxlan(), Alias: n.Alias(), Bridge: g.bridge(), VNI: g.VSID, Local: n.Wire.Local, Port: n.Wire.Port, MTU: n.MTU(), Isolated: n.Options.DisableICC, Up: true},
	)
	for _, subnet := range []Subnet{g.IPv4, g.IPv6} {
		if subnet.Gateway.IsValid() {
			s.Add(plan.Address{Link: g.bridge(), Prefix: netip.PrefixFrom(subnet.Gateway, subnet.Pool.Bits())})
		}
	}
	if g.IPv6.Pool.IsValid() { // the kernel solicits containers' neighbours from a link-local address only
		s.Add(plan.Address{Link: g.bridge(), Prefix: netip.PrefixFrom(linkLocal(mac), 64)})
	}
	if n.Options.DisableICC {
		s.Add(element(isolated, g.bridge()))
	} else if !n.Options.SlowPath {
		s.Add(plan.Shortcut{Bridge: g.bridge(), Link: g.vxlan()})
	}
	return s
}

// sources are the addresses that an endpoint may send as, IPv4 first.
func sources(e Endpoint) (out [3]netip.Addr) {
	i := 0
	if e.Address.IsValid() {
		out[i] = e.Address.Addr()
		i++
	}
	if e.Address6.IsValid() {
		out[i], out[i+1] = e.Address6.Addr(), linkLocal(e.MAC)
	}
	return out
}

// Pairs of addresses that lead from overlays to the host: link-local ones (RFC 3927), away from
// where clouds have their metadata, and unique local ones (RFC 4193).
var (
	transit4 = netip.MustParsePrefix("169.254.192.0/19")
	transit6 = netip.MustParsePrefix("fd64:6f63:6b77:6179::/64")
)

// MaxTransits is how many overlays of one host can have outbound NAT.
const MaxTransits = 2047

// transitPair are the addresses of the host and of the namespace, for the nth network and, with
// plain, for what leaves it untranslated.
func transitPair(n int, ipv6, plain bool) (host, namespace netip.Prefix) {
	at := uint32(4 * n)
	if plain {
		at += 2
	}
	if ipv6 {
		a := transit6.Addr().As16()
		binary.BigEndian.PutUint32(a[12:], at)
		host := netip.AddrFrom16(a)
		return netip.PrefixFrom(host, 127), netip.PrefixFrom(host.Next(), 127)
	}
	a := transit4.Addr().As4()
	first := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(a[:])+at)))
	return netip.PrefixFrom(first, 31), netip.PrefixFrom(first.Next(), 31)
}

// outbound is the way to the outside: what it wants in the namespace and in the host. What leaves is
// translated twice, to the network's own address on the way to the host and to the host's there, so
// that networks with the same subnets can share the host. Exceptions leave by a link of their own.
func outbound(n Network) (inside, outside plan.State) {
	inside, outside = plan.State{}, plan.State{}
	add := func(prefix string, plain bool, destinations func(ipv6 bool) []netip.Prefix) {
		link := prefix + short(n.ID, 11)
		outside.Add(
			plan.Transit{Name: link, Alias: n.Alias(), Namespace: n.Namespace(), Peer: prefix + "0", MTU: n.MTU(), Up: true},
			plan.Sysctl{Name: "net/ipv6/conf/" + link + "/accept_ra", Value: "0"},
		)
		for _, ipv6 := range []bool{false, true} {
			subnets := n.IPv4
			if ipv6 {
				subnets = n.IPv6
			}
			if len(subnets) == 0 {
				continue
			}
			host, namespace := transitPair(n.Transit, ipv6, plain)
			outside.Add(plan.Address{Link: link, Prefix: host})
			inside.Add(plan.Address{Link: prefix + "0", Prefix: namespace})
			for _, d := range destinations(ipv6) {
				inside.Add(plan.Route{Prefix: d, Link: prefix + "0", Via: host.Addr()})
			}
			if plain {
				for _, s := range subnets {
					outside.Add(plan.Route{Prefix: s.Pool, Link: link, Via: namespace.Addr()})
				}
			}
		}
	}
	add(translated, false, func(ipv6 bool) []netip.Prefix {
		if ipv6 {
			return []netip.Prefix{netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
		}
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
	})
	if len(n.Options.Exceptions) > 0 {
		add(plain, true, func(ipv6 bool) (out []netip.Prefix) {
			for _, p := range n.Options.Exceptions {
				if p.Addr().Is6() == ipv6 {
					out = append(out, p)
				}
			}
			return out
		})
	}
	return inside, outside
}

// overlayEndpoint is what one endpoint of this host wants. Before a container joins it, nothing.
func overlayEndpoint(n Network, e Endpoint) plan.State {
	if !e.Joined {
		return plan.State{}
	}
	s := security(n, e)
	bridge := n.segmentOf(e).bridge()
	if !isolates(n) && !n.Options.SlowPath {
		s.Add(plan.Shortcut{Bridge: bridge, Link: e.Port(), MAC: e.MAC, Addresses: sources(e)})
	}
	s.Add(
		plan.Veth{Name: e.Port(), Alias: e.Alias(), Bridge: bridge, MTU: e.MTU(n), Isolated: isolates(n), Static: true, Up: true, Peer: e.Peer(), PeerMAC: e.MAC},
		plan.FDB{Link: e.Port(), MAC: e.MAC},
	)
	s = within(n.Namespace(), s)
	if n.Options.OutboundNAT { // by the host, which forwards from the first endpoint on, as for nat networks
		if e.Address.IsValid() {
			s.Add(routing4)
		}
		if e.Address6.IsValid() {
			s.Add(routing6)
		}
	}
	return s
}

// PlanRemotes is what endpoints on other hosts want of this one. Those of other networks want
// nothing; nor do those that the kernel would refuse, which would keep the others from it.
func PlanRemotes(n Network, remotes []Remote) plan.State {
	segments := n.segments()
	s := plan.State{}
	for _, r := range remotes {
		i := slices.IndexFunc(segments, func(g segment) bool { return g.VSID == r.VSID })
		if i < 0 || !n.reaches(r) {
			continue
		}
		bridge, vxlan := segments[i].bridge(), segments[i].vxlan()
		s.Add(
			plan.FDB{Link: vxlan, MAC: r.MAC, VTEP: r.VTEP},
			plan.Neighbour{Link: bridge, Address: r.Address, MAC: r.MAC},
		)
		if r.Address.Is6() {
			s.Add(plan.Neighbour{Link: bridge, Address: linkLocal(r.MAC), MAC: r.MAC})
		}
	}
	return within(n.Namespace(), s)
}

// reaches reports whether frames can be sent to an endpoint on another host: to a station's MAC, and a
// host of the same family of addresses, which a VXLAN device has one of. Of one that went, the host is
// not known any more.
func (n Network) reaches(r Remote) bool {
	return r.MAC != plan.MAC{} && r.MAC[0]&1 == 0 && (!r.VTEP.IsValid() || r.VTEP.Is4() == n.Wire.Local.Is4())
}

// Neighbours are the addresses of an overlay network on a host, or of endpoints on others, as neighbours
// on its bridges.
func (n Network) Neighbours(list []Remote) []plan.Neighbour {
	var out []plan.Neighbour
	for _, r := range list {
		for _, g := range n.segments() {
			if g.VSID == r.VSID {
				out = append(out, plan.Neighbour{Link: g.bridge(), Address: r.Address, MAC: r.MAC})
			}
		}
	}
	return out
}

// PlanPeers guards the UDP port of VXLAN and lets hosts of the cluster in, given the address of this one
// and theirs. What is not known yet is invalid or 0.
func PlanPeers(self netip.Addr, port uint16, vteps []netip.Addr) plan.State {
	s := plan.State{}
	if port != 0 {
		s.Add(element(tunnelPort, strconv.Itoa(int(port))))
	}
	for _, a := range vteps {
		peer, tunnel := peer4, tunnel4
		if a.Is6() {
			peer, tunnel = peer6, tunnel6
		}
		s.Add(element(peer, a.String()))
		if self.IsValid() && self.Is4() == a.Is4() {
			s.Add(element(tunnel, a.String(), self.String()))
		}
	}
	return s
}

// FromPeers reports whether an object is there because of what other hosts have told.
func FromPeers(o plan.Object) bool {
	if w, ok := o.(plan.Within); ok {
		o = w.Object
	}
	switch o := o.(type) {
	case plan.Neighbour:
		return true
	case plan.FDB:
		return o.VTEP.IsValid()
	case plan.Element:
		return slices.Contains([]*nft.Set{peer4, peer6, tunnel4, tunnel6}, o.Set)
	}
	return false
}
