package main

import (
	"fmt"
	"net/netip"

	"github.com/dockway/dockway/integration/lab"
)

// The least that an overlay is made of: containers, bridge and VXLAN of the kernel's, with all that is
// known of the other side entered by hand, and no firewall at the bridge.

// bareEnd is one side of it.
type bareEnd struct{ container, mac, address string }

// bareVXLAN makes it between two hosts.
func (b *bench) bareVXLAN(hosts []*lab.Host) (path, error) {
	ends := [2]bareEnd{{"least-server", "02:90:00:00:00:20", "10.90.0.20"}, {"least-client", "02:90:00:00:00:21", "10.90.0.21"}}
	commands := [2][]string{{"/probe", "serve", cpu}, {"sleep", "100000"}}
	for i, own := range ends {
		other := 1 - i
		if err := runOn(hosts[i], own.container, []string{"--network", "none"}, commands[i]...); err != nil {
			return path{}, err
		}
		if _, err := hosts[i].Script(bareScript(own, ends[other], lab.UnderlayAddress(i), lab.UnderlayAddress(other))); err != nil {
			return path{}, err
		}
	}
	p := path{"the kernel's VXLAN by hand", netip.MustParseAddr(ends[0].address), inContainer(ends[1].container)}
	return p, b.reached(hosts[1], p)
}

// bareScript makes one side.
func bareScript(own, other bareEnd, local, remote string) string {
	return fmt.Sprintf(`pid=$(docker inspect -f '{{.State.Pid}}' %[1]s)
ip netns add least
ip netns exec least sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 net.bridge.bridge-nf-call-arptables=0
ip link add least-vx mtu 1450 type vxlan id 5999 local %[4]s dstport 14790 nolearning udpcsum
ip link set least-vx netns least
ip -n least link add least-br mtu 1450 type bridge mcast_snooping 0
ip link add least-c mtu 1450 netns least type veth peer name eth0 mtu 1450 address %[2]s netns $pid
for l in least-vx least-c; do ip -n least link set $l master least-br; bridge -n least link set dev $l learning off; done
for l in least-vx least-c least-br; do ip -n least link set $l up; done
bridge -n least fdb replace %[6]s dev least-vx master static
bridge -n least fdb replace %[6]s dev least-vx dst %[5]s self permanent
bridge -n least fdb replace %[2]s dev least-c master static
c="nsenter -t $pid -n"
$c ip address add %[3]s/24 dev eth0
$c ip link set eth0 up
$c ip neigh replace %[7]s lladdr %[6]s dev eth0 nud permanent`,
		own.container, own.mac, own.address, local, remote, other.mac, other.address)
}
