package lab_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/dockway/dockway/integration/lab"
)

// TestDHCP: each server gives what it is told to give, keeps its leases over a restart, knows
// reservations and releases, and says no once it is told of other addresses.
func TestDHCP(t *testing.T) {
	for _, program := range []lab.DHCPProgram{lab.Dnsmasq, lab.Kea} {
		t.Run(string(program), func(t *testing.T) { testDHCP(t, program) })
	}
}

func testDHCP(t *testing.T, program lab.DHCPProgram) {
	s := newSite(t)
	n, a, b := s.lan("lan"), s.machine("a"), s.machine("server")
	s.must(n.Plug(b, "eth0", "198.18.0.250/24"))
	s.must(n.PlugAs(a, "eth0", "02:08:00:00:00:01"))
	s.must(n.PlugAs(a, "eth1", "02:08:00:00:00:02"))
	config := lab.DHCPConfig{
		Subnet: "198.18.0.0/24", From: "198.18.0.10", To: "198.18.0.19", Router: "198.18.0.254",
		DNS: []string{"198.18.0.53", "198.18.0.54"}, Domain: "here.test", Search: []string{"here.test", "there.test"}, MTU: 1400,
		Routes:   map[string]string{"198.18.8.0/22": "198.18.0.8", "0.0.0.0/0": "198.18.0.254"},
		Reserved: map[string]string{"02:08:00:00:00:02": "198.18.0.77"},
		Lease:    150 * time.Second, Renew: 50 * time.Second, Rebind: 100 * time.Second,
	}
	server, err := b.DHCP(program, "eth0", config)
	s.must(err)
	wire := b.Capture(t, "eth0")

	client := s.dhcpClient(a, "eth0", "-x", "hostname:web")
	said := client.waitFor("bound")
	for _, want := range []string{
		"router=198.18.0.254", "dns=198.18.0.53 198.18.0.54", "domain=here.test", "search=here.test there.test", "mtu=1400",
		"staticroutes=0.0.0.0/0 198.18.0.254 198.18.8.0/22 198.18.0.8", "lease=150", "opt58=00000032", "opt59=00000064",
	} {
		if !strings.Contains(said, want+"\n") {
			t.Errorf("the client is not told %q: %s", want, said)
		}
	}
	ip := address(said)
	if !strings.HasPrefix(ip, "198.18.0.1") {
		t.Errorf("the client is given %q", ip)
	}
	for _, kind := range []string{"discover", "offer", "request", "ack"} {
		wire.Saw(t, lab.DHCP(kind))
	}
	lease := s.lease(server, ip)
	left := time.Until(lease.Until)
	if lease.MAC != "02:08:00:00:00:01" || lease.Host != "web" || left > 150*time.Second || left < 100*time.Second {
		t.Errorf("the lease is %+v", lease)
	}
	if other := address(s.dhcpClient(a, "eth1").waitFor("bound")); other != "198.18.0.77" {
		t.Errorf("the client with a reservation is given %s", other)
	}

	// Stopped and started, it knows the lease.
	s.must(server.Stop())
	wire.Forget()
	if out, err := a.Run("busybox", "udhcpc", "-n", "-q", "-t", "2", "-T", "1", "-i", "eth1", "-s", "/bin/true"); err == nil {
		t.Errorf("a server that is stopped answers: %s", out)
	}
	s.must(server.Start())
	if l := s.lease(server, ip); l.MAC != lease.MAC {
		t.Errorf("after a restart the lease is %+v", l)
	}
	client.renew()
	if got := address(client.waitFor("renew")); got != ip {
		t.Errorf("renewed, the address %s is %s", ip, got)
	}
	wire.Saw(t, lab.DHCP("request").From(ip))
	wire.Saw(t, lab.DHCP("ack"))
	wire.Never(t, lab.DHCP("nak"))

	// With other addresses, it says no; the client starts again.
	config.From, config.To = "198.18.0.100", "198.18.0.109"
	config.Reserved["02:08:00:00:00:01"] = "198.18.0.105"
	s.must(server.Reconfigure(config))
	if l, err := server.Leases(); err != nil || len(l) > 0 {
		t.Errorf("the new server has leases: %v %v", l, err)
	}
	client.renew()
	client.waitFor("nak")
	wire.Saw(t, lab.DHCP("nak"))
	now := address(client.waitFor("bound"))
	if now != "198.18.0.105" {
		t.Errorf("after the server's no, the address is %s", now)
	}

	// A client that comes back and asks for an address of yesterday is refused at once.
	const yesterday = "198.18.0.200"
	wire.Forget()
	s.ask(a, "send", "link", "eth1", askAgain(t, "02:08:00:00:00:03", yesterday))
	wire.Saw(t, lab.DHCP("nak").Mentioning("02:08:00:00:00:03"))

	client.signal("USR2")
	s.must(lab.WaitFor(5*time.Second, "the end of the lease", func() (bool, error) {
		all, err := server.Leases()
		return !slices.ContainsFunc(all, func(l lab.Lease) bool { return l.IP == now }), errors.Join(err, fmt.Errorf("%+v", all))
	}))
	wire.Saw(t, lab.DHCP("release").From(now))
}

// askAgain is the request of a client that knows its address from before (RFC 2131, INIT-REBOOT), as a frame
// in hexadecimal.
func askAgain(t *testing.T, mac, ip string) string {
	t.Helper()
	own, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	network := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4zero, DstIP: net.IPv4bcast}
	udp := &layers.UDP{SrcPort: 68, DstPort: 67}
	b := gopacket.NewSerializeBuffer()
	err = errors.Join(udp.SetNetworkLayerForChecksum(network), gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: own, DstMAC: net.HardwareAddr{255, 255, 255, 255, 255, 255}, EthernetType: layers.EthernetTypeIPv4}, network, udp,
		&layers.DHCPv4{Operation: layers.DHCPOpRequest, HardwareType: layers.LinkTypeEthernet, HardwareLen: 6, ClientHWAddr: own, Xid: 7, Options: layers.DHCPOptions{
			layers.NewDHCPOption(layers.DHCPOptMessageType, []byte{byte(layers.DHCPMsgTypeRequest)}),
			layers.NewDHCPOption(layers.DHCPOptRequestIP, net.ParseIP(ip).To4()),
		}}))
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b.Bytes())
}

func (s *site) lease(server *lab.DHCPServer, ip string) lab.Lease {
	s.t.Helper()
	all, err := server.Leases()
	s.must(err)
	i := slices.IndexFunc(all, func(l lab.Lease) bool { return l.IP == ip })
	if i < 0 {
		s.t.Fatalf("no lease of %s is among %+v: %s", ip, all, server.Log())
	}
	return all[i]
}

// dhcpClient is busybox's client, with a script that prints what it hears and gives the link the address.
type dhcpClient struct {
	*lab.Process
	s       *site
	m       *lab.Machine
	pidFile string
	read    int // of its output
}

func (s *site) dhcpClient(m *lab.Machine, link string, args ...string) *dhcpClient {
	s.t.Helper()
	pid := "/run/udhcpc-" + link
	script := pid + ".sh"
	_, err := m.Script(`cat >` + script + ` <<'.'
#!/bin/sh
echo "<$1"
env
echo "$1>"
ip address flush dev $interface
[ -z "$ip" ] || ip address add $ip/$mask dev $interface
.
chmod +x ` + script)
	s.must(err)
	full := append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "busybox", "udhcpc", "-f", "-t", "20", "-T", "1", "-A", "1", "-i", link, "-p", pid, "-s", script,
		"-O", "search", "-O", "mtu", "-O", "staticroutes", "-O", "58", "-O", "59"}, args...)
	p, err := m.Start("deconfig>", full...)
	s.must(err)
	s.t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			s.t.Error(err)
		}
	})
	return &dhcpClient{Process: p, s: s, m: m, pidFile: pid}
}

// waitFor gives what the client hears with the next event of a name.
func (c *dhcpClient) waitFor(event string) string {
	c.s.t.Helper()
	var said string
	err := lab.WaitFor(15*time.Second, "the client's "+event, func() (bool, error) {
		_, after, ok := strings.Cut(c.Output()[c.read:], "<"+event+"\n")
		if !ok {
			return false, nil
		}
		said, after, ok = strings.Cut(after, event+">\n")
		if ok {
			c.read = len(c.Output()) - len(after)
		}
		return ok, nil
	})
	if err != nil {
		c.s.t.Fatalf("%v: %s", err, c.Output())
	}
	return said
}

func (c *dhcpClient) renew() { c.signal("USR1") }

func (c *dhcpClient) signal(name string) {
	c.s.t.Helper()
	_, err := c.m.Script("kill -" + name + " $(cat " + c.pidFile + ")")
	c.s.must(err)
}

// address is the client's, in what it hears.
func address(said string) string {
	for line := range strings.Lines(said) {
		if v, ok := strings.CutPrefix(line, "ip="); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
