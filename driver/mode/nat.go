package mode

import (
	"crypto/sha256"
	"net/netip"
	"strconv"
	"strings"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/policy"
)

// natNetwork is what a nat network wants but for its endpoints: a bridge that has the gateways.
func natNetwork(n Network) plan.State {
	noIPv6 := "0"
	if len(n.IPv6) == 0 {
		noIPv6 = "1"
	}
	mac := n.bridgeMAC()
	s := plan.Of(
		plan.Bridge{Name: n.Bridge(), Alias: n.Alias(), MAC: mac, MTU: n.MTU(), Up: true},
		plan.Sysctl{Name: "net/ipv6/conf/" + n.Bridge() + "/accept_ra", Value: "0"},
		plan.Sysctl{Name: "net/ipv6/conf/" + n.Bridge() + "/disable_ipv6", Value: noIPv6},
	)
	for _, subnet := range n.Subnets() {
		if subnet.Gateway.IsValid() {
			s.Add(plan.Address{Link: n.Bridge(), Prefix: netip.PrefixFrom(subnet.Gateway, subnet.Pool.Bits())})
		}
	}
	if len(n.IPv6) > 0 { // the kernel solicits containers' neighbours from a link-local address only
		s.Add(plan.Address{Link: n.Bridge(), Prefix: netip.PrefixFrom(linkLocal(mac), 64)})
	}
	if n.Internal {
		s.Add(element(internal, n.Bridge()))
	}
	if n.Options.DisableICC {
		s.Add(element(isolated, n.Bridge()))
	}
	return s
}

// bridgeMAC is the MAC of a nat network's gateway.
func (n Network) bridgeMAC() plan.MAC { return macFrom("bridge " + n.ID) }

// natEndpoint is what one endpoint of a nat network wants. Before a container joins it, nothing.
func natEndpoint(n Network, e Endpoint) plan.State {
	s := plan.State{}
	if !e.Joined {
		return s
	}
	s.Merge(port(n, e))
	if n.Options.DisableICC {
		s.Add(element(silent, e.Port()), element(host, e.Port(), n.bridgeMAC().String()))
	}
	if e.Address.IsValid() {
		addr := e.Address.Addr().String()
		s.Add(element(endpoint4, addr), element(member4, n.Bridge(), addr))
		if !n.Internal {
			s.Add(routing4)
		}
	}
	if e.Address6.IsValid() {
		addr := e.Address6.Addr().String()
		s.Add(element(endpoint6, addr), element(member6, n.Bridge(), addr))
		if !n.Internal {
			s.Add(routing6)
		}
	}
	for _, b := range e.Bindings {
		s.Merge(publish(b))
	}
	return s
}

// The host routes between networks.
var (
	routing4 = plan.Sysctl{Name: "net/ipv4/ip_forward", Value: "1"}
	routing6 = plan.Sysctl{Name: "net/ipv6/conf/all/forwarding", Value: "1"}
)

// isolates reports whether the switch keeps ports of the network from each other. In an l2tunnel network they
// never reach each other, but the gateway's ARP answers go back by the port itself, which an isolated one
// refuses; and it would refuse what is for a published port of a nat or l2bridge network, where rules do it instead.
func isolates(n Network) bool {
	return n.Options.DisableICC && (n.Options.Mode == Transparent || n.Options.Mode == Overlay)
}

// port is an endpoint's link, and what may be sent on it.
func port(n Network, e Endpoint) plan.State {
	s := security(n, e)
	s.Add(plan.Veth{Name: e.Port(), Alias: e.Alias(), Bridge: n.Bridge(), MTU: e.MTU(n), Isolated: isolates(n), Up: true, Peer: e.Peer(), PeerMAC: e.MAC})
	return s
}

// security is what may be sent on an endpoint's link.
func security(n Network, e Endpoint) plan.State {
	s := plan.Of(element(station, e.Port(), e.MAC.String()))
	if e.Address.IsValid() {
		s.Add(
			element(source4, e.Port(), e.MAC.String(), e.Address.Addr().String()),
			element(source4, e.Port(), e.MAC.String(), "0.0.0.0"), // ARP probes (RFC 5227)
		)
	}
	if n.Options.SLAAC {
		s.Add(element(autoconf, e.Port(), e.MAC.String()), element(advised, e.Port()), element(dualStack, e.Port()))
	}
	if e.Address6.IsValid() {
		s.Add(
			element(source6, e.Port(), e.MAC.String(), e.Address6.Addr().String()),
			element(source6, e.Port(), e.MAC.String(), linkLocal(e.MAC).String()),
			element(source6, e.Port(), e.MAC.String(), "::"), // duplicate address detection (RFC 4862)
			element(dualStack, e.Port()),
		)
	}
	return s
}

// publish is what one port mapping in force wants.
func publish(b policy.Binding) plan.State {
	s := plan.Of(hold(b))
	proto, port := string(b.Protocol), strconv.Itoa(int(b.Host.Port()))
	container := b.Container.Addr()
	target := container.String() + " . " + strconv.Itoa(int(b.Container.Port()))
	anyPort, onePort, published := anyPort4, port4, published4
	if container.Is6() {
		anyPort, onePort, published = anyPort6, port6, published6
	}
	switch host := b.Host.Addr(); {
	case host.IsLoopback():
		if host.Is4() {
			s.Add(element(loopback, host.String(), proto, port))
		}
	case host.Is4() != container.Is4(): // only a relay leads from one family to the other
	case host.IsUnspecified():
		s.Add(plan.Element{Set: anyPort, Elem: proto + " . " + port, Data: target})
	default:
		s.Add(plan.Element{Set: onePort, Elem: host.String() + " . " + proto + " . " + port, Data: target})
	}
	if b.Protocol == policy.SCTP {
		s.Add(element(published, container.String(), proto, strconv.Itoa(int(b.Container.Port()))))
	}
	return s
}

// hold keeps the port of the host for the mapping.
func hold(b policy.Binding) plan.HostPort {
	return plan.HostPort{Proto: string(b.Protocol), Host: b.Host, Target: b.Container}
}

// macFrom is a locally administered MAC that is always the same for a text.
func macFrom(text string) plan.MAC {
	sum := sha256.Sum256([]byte(text))
	mac := plan.MAC(sum[:6])
	mac[0] = mac[0]&^1 | 2 // unicast, locally administered (IEEE 802, section 8.4)
	return mac
}

func element(set *nft.Set, key ...string) plan.Element {
	return plan.Element{Set: set, Elem: strings.Join(key, " . ")}
}

// linkLocal is the IPv6 link-local address that the kernel derives from a MAC (RFC 4291,
// appendix A).
func linkLocal(m plan.MAC) netip.Addr {
	a := [16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]}
	return netip.AddrFrom16(a)
}
