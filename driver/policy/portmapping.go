// Package policy holds the policies that an endpoint can carry, by HNS's names: what they mean,
// what is valid, and their part of the wanted kernel state.
package policy

import (
	"fmt"
	"net/netip"
)

// Protocol is an IP protocol by its lower-case name.
type Protocol string

// The protocols whose ports can be mapped.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// ProtocolByNumber gives the protocol of an IANA protocol number: 6, 17 or 132.
func ProtocolByNumber(n int) (Protocol, error) {
	switch n {
	case 6:
		return TCP, nil
	case 17:
		return UDP, nil
	case 132:
		return SCTP, nil
	}
	return "", fmt.Errorf("protocol number %d cannot be published: use tcp (6), udp (17) or sctp (132)", n)
}

// PortMapping publishes a port of a container on the host (HNS: PortMapping, v1 NAT).
type PortMapping struct {
	Protocol      Protocol   `json:"protocol"`
	ContainerPort uint16     `json:"container_port"`
	HostIP        netip.Addr `json:"host_ip"`       // invalid or unspecified: every address of the host
	HostPort      uint16     `json:"host_port"`     // first port to try; 0: any free port
	HostPortEnd   uint16     `json:"host_port_end"` // last port to try; 0: HostPort
}

// Binding is a port mapping in force: one host address (unspecified for every address of that
// family) and one host port.
type Binding struct {
	Protocol  Protocol       `json:"protocol"`
	Host      netip.AddrPort `json:"host"`
	Container netip.AddrPort `json:"container"`
}

func (b Binding) String() string {
	return fmt.Sprintf("%s -> %s/%s", b.Host, b.Container, b.Protocol)
}

// Validate reports what is wrong with a mapping.
func (m PortMapping) Validate() error {
	if m.ContainerPort == 0 {
		return fmt.Errorf("port mapping %s: container port 0 is not a port: give 1 to 65535", m)
	}
	if m.HostPortEnd != 0 && m.HostPortEnd < m.HostPort {
		return fmt.Errorf("port mapping %s: host port range ends before it begins", m)
	}
	if m.HostIP.IsValid() && (m.HostIP.IsMulticast() || m.HostIP.Zone() != "") {
		return fmt.Errorf("port mapping %s: %s is not an address that a host can own", m, m.HostIP)
	}
	return nil
}

func (m PortMapping) String() string {
	host := "*"
	if m.HostIP.IsValid() {
		host = m.HostIP.String()
	}
	ports := fmt.Sprint(m.HostPort)
	if m.HostPortEnd > m.HostPort {
		ports = fmt.Sprintf("%d-%d", m.HostPort, m.HostPortEnd)
	}
	return fmt.Sprintf("%s:%s:%d/%s", host, ports, m.ContainerPort, m.Protocol)
}
