package lab

import (
	"crypto/sha256"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// LAN is an Ethernet segment: a bridge on a machine of its own. It forwards as an unmanaged switch
// does, whatever a frame carries: VLAN tags, multicast and any address, and no firewall sees it.
// It sends nothing by itself.
type LAN struct {
	*Machine
	lab *Lab

	mu    sync.Mutex
	ports map[string]string // by machine and link
	rules int
}

// LAN makes a segment.
func (l *Lab) LAN(name string) (*LAN, error) {
	m, err := l.Machine(name)
	if err != nil {
		return nil, err
	}
	// The mask lets all link-local groups through (LLDP, 802.1X) but those that the kernel keeps:
	// STP, pause frames and LACP. Without IPv6 no port speaks of itself.
	_, err = m.Script(`
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 net.ipv4.ip_forward=0
sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 net.bridge.bridge-nf-call-arptables=0
ip link add lan type bridge mcast_snooping 0 stp_state 0 group_fwd_mask 0xfff8
ip link set lan up`)
	return &LAN{Machine: m, lab: l, ports: map[string]string{}}, err
}

// Plug connects a machine to the segment with a link and addresses ("198.18.0.1/24"). The link has
// the same MAC address each time it is plugged.
func (n *LAN) Plug(m *Machine, link string, addresses ...string) error {
	return n.PlugAs(m, link, hardware(m.Name, link), addresses...)
}

// PlugAs is Plug with a MAC address of the caller's choice.
func (n *LAN) PlugAs(m *Machine, link, mac string, addresses ...string) error {
	n.lab.mu.Lock()
	n.lab.links++
	port := "p" + strconv.Itoa(n.lab.links)
	n.lab.mu.Unlock()
	// Only the network namespace of the LAN: PIDs are this process's.
	args := []string{"-t", strconv.Itoa(n.PID()), "-n", "--", "ip", "link", "add", port, "type", "veth",
		"peer", "name", link, "address", mac, "netns", strconv.Itoa(m.PID())}
	if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("plug %s into %s: %w: %s", m.Name, n.Name, err, out)
	}
	n.mu.Lock()
	n.ports[m.Name+" "+link] = port
	n.mu.Unlock()
	if _, err := n.Script(fmt.Sprintf("ip link set %s master lan up", port)); err != nil {
		return err
	}
	_, err := m.Script(fmt.Sprintf("ip link set %s up\n", link) + addAddresses(link, addresses))
	return err
}

// addAddresses is the script that gives a link addresses, which are of use at once.
func addAddresses(link string, addresses []string) string {
	script := ""
	for _, a := range addresses {
		nodad := ""
		if strings.Contains(a, ":") {
			nodad = " nodad"
		}
		script += fmt.Sprintf("ip address add %s dev %s%s\n", a, link, nodad)
	}
	return script
}

// Unplug removes a machine's link, as when a network card is taken out: what stood on it is gone
// with it. Plug or PlugAs brings a link of that name back, under another index.
func (n *LAN) Unplug(m *Machine, link string) error {
	port, err := n.port(m, link)
	if err != nil {
		return err
	}
	if _, err := n.Run("ip", "link", "delete", port); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.ports, m.Name+" "+link)
	return nil
}

// Cut takes the cable out of a machine's link: the link stays, without carrier.
func (n *LAN) Cut(m *Machine, link string) error { return n.setPort(m, link, "down") }

// Mend puts the cable back that Cut took out.
func (n *LAN) Mend(m *Machine, link string) error { return n.setPort(m, link, "up") }

func (n *LAN) setPort(m *Machine, link, state string) error {
	port, err := n.port(m, link)
	if err != nil {
		return err
	}
	_, err = n.Run("ip", "link", "set", port, state)
	return err
}

// port is the segment's end of a machine's link.
func (n *LAN) port(m *Machine, link string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	port, ok := n.ports[m.Name+" "+link]
	if !ok {
		return "", fmt.Errorf("%s of %s is not plugged into %s", link, m.Name, n.Name)
	}
	return port, nil
}

// MAC is the address of a machine's link.
func (m *Machine) MAC(link string) (string, error) {
	return m.Run("cat", "/sys/class/net/"+link+"/address")
}

// SetMAC changes the address of a machine's link, while it is in use. Neighbours are not told.
func (m *Machine) SetMAC(link, mac string) error {
	_, err := m.Run("ip", "link", "set", link, "address", mac)
	return err
}

// hardware is the address of a machine's link: the same after each reboot, as its neighbours expect.
func hardware(machine, link string) string {
	sum := sha256.Sum256([]byte(machine + " " + link))
	return fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", sum[0], sum[1], sum[2], sum[3], sum[4])
}
