package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/network"

	"github.com/dockway/dockway/integration/lab"
)

// What the DHCPv6 server on the wire gives.
const leasedFrom6, leasedTo6, leasedPart6 = "fd00:64::200:0", "fd00:64::200:ffff", "fd00:64::200:"

// serves6 starts a server on the wire that leases addresses of both families, and is the IPv6 router of the LAN.
func (w *wire) serves6(t *testing.T, change func(*lab.DHCPConfig)) *lab.DHCPServer {
	t.Helper()
	return w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) {
		c.Subnet6, c.From6, c.To6, c.MTU = wire6, leasedFrom6, leasedTo6, 0
		if change != nil {
			change(c)
		}
	})
}

// leasing6 are the flags for a network whose IPv6 addresses are leased. The engine of Debian has no IPv6 without a
// subnet: this one has no address, but a length.
func (h *host) leasing6() []string {
	if h.Engine == lab.Moby {
		return []string{"--ipv6"}
	}
	return []string{"--ipv6", "--subnet", "::/64", "--ipam-opt", "dhcp=ipv6"}
}

// TestDHCPv6: without a subnet for IPv6, containers of a transparent network have the addresses of both families
// that the LAN's DHCP servers give, and the way outside that its routers tell.
func TestDHCPv6(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		server := w.serves6(t, nil)
		h.network("leased6", append(h.leasing6(), "-o", "mode=transparent", "-o", "interface="+containerUplink)...)
		h.server("leased6-a", "leased6")
		a, a6, mac := h.address("leased6-a", "leased6"), h.address6("leased6-a", "leased6"), h.mac("leased6-a", "leased6")
		if !strings.HasPrefix(a, "198.18.64.2") || !strings.HasPrefix(a6, leasedPart6) {
			t.Fatalf("the container has %s and %s, which are not the DHCP server's", a, a6)
		}
		leases, err := server.Leases()
		if err != nil || !strings.Contains(fmt.Sprint(leases), a6) {
			t.Errorf("the server has not leased %s: %v %v", a6, leases, err)
		}
		for _, l := range leases {
			if l.MAC != mac && h.Engine == lab.Moby { // which tells the name, so that both are known to be one container's
				t.Errorf("the server has leased %s to %s, the container has the MAC %s", l.IP, l.MAC, mac)
			}
		}
		reaches(t, "outside to leased container", on(w.outside), "tcp", "["+a6+"]:80", outside6)
		reaches(t, "outside to leased container, IPv4", on(w.outside), "tcp", a+":80", outside4)
		reaches(t, "leased container to outside", h.in("leased6-a"), "tcp", "["+outside6+"]:80", a6)
		reaches(t, "leased container to another subnet, by the advertised router", h.in("leased6-a"), "tcp", "["+far6+"]:80", a6)
		out := h.docker("exec", "leased6-a", "sh", "-c", "ip -6 address show eth0; ip -6 route")
		for _, want := range []string{a6 + "/64", "default via fe80::"} {
			if !strings.Contains(out, want) {
				t.Errorf("the container lacks %q: %s", want, out)
			}
		}
		if out, err := h.Dockway("endpoints", "--json"); err != nil || !strings.Contains(out, `"lease6":{"gateway":"fe80::`) || !strings.Contains(out, `"search":["lan.example"]`) {
			t.Errorf("dockway does not show what the lease tells: %s %v", out, err)
		}

		// A MAC that is given is known only when both addresses are leased already: they are leased for it anew.
		const given = "02:42:00:00:64:31"
		h.server("leased6-b", "leased6", "--mac-address", given)
		b6 := h.address6("leased6-b", "leased6")
		leases, err = server.Leases()
		var anew []string
		for _, l := range leases {
			if l.MAC == given {
				anew = append(anew, l.IP)
			}
		}
		slices.Sort(anew)
		if want := []string{h.address("leased6-b", "leased6"), b6}; err != nil || !slices.Equal(anew, want) {
			t.Errorf("the server has leased %v to %s, want %v: %v %v", anew, given, want, leases, err)
		}
		reaches(t, "leased container to the other", h.in("leased6-a"), "tcp", "["+b6+"]:80", a6)
		h.docker("rm", "-f", "leased6-b")

		// The lease outlives the plugin, and is given back with the container.
		h.killPlugin()
		reaches(t, "outside to leased container after the plugin's restart", on(w.outside), "tcp", "["+a6+"]:80", outside6)
		if told := h.leaseProblem("leased6-a", "leased6"); told != "" {
			t.Errorf("after the plugin's restart the lease is said to have the problem %q", told)
		}
		h.docker("rm", "-f", "leased6-a")
		settled(t, "the server has the leases back", func() bool {
			leases, err := server.Leases()
			return err == nil && len(leases) == 0
		})
	})
}

// TestDHCPv6Address: with a subnet for DHCPv6 and IPv4 addresses of dockway's own, --ip6 asks for an address, and a
// reservation holds for --mac-address. The container has the port of its address only.
func TestDHCPv6Address(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		const reserved, fixed, asked = "fd00:64::300", "02:42:00:00:64:30", "fd00:64::200:77"
		server := w.serves6(t, func(c *lab.DHCPConfig) {
			c.Subnet, c.SLAAC, c.Reserved = "", true, map[string]string{fixed: reserved}
		})
		h.network("asked6", "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine],
			"--ipv6", "--subnet", wire6, "--ipam-opt", "dhcp=ipv6", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.server("asked6-a", "asked6", "--ip6", asked, "--cap-add", "NET_ADMIN")
		h.client("asked6-b", "asked6", "--ip6", reserved, "--mac-address", fixed)
		if a := h.address6("asked6-a", "asked6"); a != asked {
			t.Errorf("the container has %s, not the address asked for", a)
		}
		if out := h.docker("exec", "asked6-b", "ip", "address", "show", "eth0"); !strings.Contains(out, reserved+"/64") || !strings.Contains(out, fixed) {
			t.Errorf("the reservation does not hold: %s", out)
		}
		leases, err := server.Leases()
		if err != nil || !strings.Contains(fmt.Sprint(leases), h.mac("asked6-a", "asked6")) {
			t.Errorf("the server has no lease for %s: %v %v", h.mac("asked6-a", "asked6"), leases, err)
		}
		reaches(t, "outside to the container's own IPv4 address", on(w.outside), "tcp", h.address("asked6-a", "asked6")+":80", outside4)
		reaches(t, "the container to outside", h.in("asked6-a"), "tcp", "["+outside6+"]:80", asked)
		h.docker("exec", "asked6-a", "sh", "-c", "ip -6 address del "+asked+"/64 dev eth0; ip -6 address add fd00:64::200:78/64 dev eth0")
		settled(t, "the container's other address is checked", func() bool {
			return !strings.Contains(h.docker("exec", "asked6-a", "ip", "-6", "address", "show", "eth0"), "tentative")
		})
		barred(t, "the container to outside as another", h.in("asked6-a"), "tcp", "["+outside6+"]:80")
		h.refused(reserved, "run", "--rm", "--network", "asked6", "--ip6", reserved, "--name", "asked6-c", lab.Image, "true")

		// An address that a machine of the LAN uses already.
		const used = "fd00:64::200:79"
		w.holds(t, used)
		holder, err := w.outside.MAC("eth0")
		if err != nil {
			t.Fatal(err)
		}
		seen := w.router.Capture(t, "eth0")
		h.refused("address "+used+" is used by "+holder+" already", "run", "--rm", "--network", "asked6", "--ip6", used, "--name", "asked6-d", lab.Image, "true")
		seen.Saw(t, lab.DHCPv6("decline"))
	})
}

// TestDHCPv6Only: the network needs no IPv4, on the engine that has it; on the other it has IPv4 addresses of dockway's own.
func TestDHCPv6Only(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		w.serves6(t, func(c *lab.DHCPConfig) { c.Subnet = "" })
		if h.Engine == lab.Moby {
			h.onlyIPv6(t, "only6", map[string]string{"mode": "transparent", "interface": containerUplink})
		} else {
			h.network("only6", append(h.leasing6(), "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine],
				"-o", "mode=transparent", "-o", "interface="+containerUplink)...)
		}
		h.server("only6-a", "only6")
		a6 := h.address6("only6-a", "only6")
		reaches(t, "outside to leased container", on(w.outside), "tcp", "["+a6+"]:80", outside6)
		reaches(t, "leased container to another subnet", h.in("only6-a"), "tcp", "["+far6+"]:80", a6)
		if out := h.docker("exec", "only6-a", "ip", "-4", "route"); h.Engine == lab.Moby && strings.TrimSpace(out) != "" {
			t.Errorf("an IPv6 network gave the container IPv4 routes, so it has another network beside: %s", out)
		}
	})
}

// onlyIPv6 makes a network without IPv4. Debian's command line does not have the flag: the engine itself is asked.
func (h *host) onlyIPv6(t *testing.T, name string, options map[string]string) {
	t.Helper()
	engine, err := h.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close() //nolint:errcheck // asked and answered
	off, on6 := false, true
	if _, err := engine.NetworkCreate(t.Context(), name, network.CreateOptions{
		Driver: lab.Plugin, EnableIPv4: &off, EnableIPv6: &on6, IPAM: &network.IPAM{Driver: lab.Plugin}, Options: options,
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.docker("network", "rm", name) })
}

// TestDHCPv6WithoutServer: a server that does not answer is a clear error in time.
func TestDHCPv6WithoutServer(t *testing.T) {
	onWire(t, func(t *testing.T, _ *wire, h, _ *host) {
		h.network("silent6", append(h.leasing6(), "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine],
			"-o", "mode=transparent", "-o", "interface="+containerUplink)...)
		start := time.Now()
		_, err := h.Docker("run", "--rm", "--name", "silent6-a", "--network", "silent6", lab.Image, "true")
		if err == nil {
			t.Fatal("the container has an address of a server that does not answer")
		}
		for _, words := range []string{"on " + containerUplink + " for", "no DHCP server answered over IPv6 within 15s: check"} {
			if !strings.Contains(err.Error(), words) {
				t.Errorf("the error lacks %q: %v", words, err)
			}
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("the error came after %s", took)
		}
	})
}

// TestDHCPv6Renewal: a lease is renewed at T1 with the server that gave it; one that the server gives in place of it
// is told: a running container keeps what it has.
func TestDHCPv6Renewal(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		const t1 = 4 * time.Second
		w.advertises(t, "eth0")
		var config lab.DHCPConfig
		server := w.serves(t, lab.Kea6, func(c *lab.DHCPConfig) {
			c.Subnet6, c.From6, c.To6, c.Renew, c.Rebind = wire6, leasedFrom6, leasedTo6, t1, 100*time.Second
			config = *c
		})
		h.network("renewed6", append(h.leasing6(), "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine],
			"-o", "mode=transparent", "-o", "interface="+containerUplink)...)
		h.server("renewed6-a", "renewed6")
		a6, mac := h.address6("renewed6-a", "renewed6"), h.mac("renewed6-a", "renewed6")
		seen := w.router.Capture(t, "eth0").Patient(3 * t1)
		seen.Saw(t, lab.DHCPv6("renew").SourceMAC(mac))
		seen.Saw(t, lab.DHCPv6("reply").DestinationMAC(mac))
		if told := h.leaseProblem("renewed6-a", "renewed6"); told != "" {
			t.Errorf("a lease that is renewed is said to have the problem %q", told)
		}

		// The server has the address reserved for somebody else now, and another for the container.
		const another = "fd00:64::300"
		config.Reserved = map[string]string{mac: another, "02:42:00:00:64:31": a6}
		if err := server.Reconfigure(config); err != nil {
			t.Fatal(err)
		}
		told := ""
		if err := lab.WaitFor(5*t1, "the lease's problem to be told", func() (bool, error) {
			told = h.leaseProblem("renewed6-a", "renewed6")
			return strings.Contains(told, another), nil
		}); err != nil {
			t.Error(err)
		}
		if !strings.Contains(told, another) || !strings.Contains(told, a6) {
			t.Errorf("dockway tells %q of the lease, want %s and %s in it", told, a6, another)
		}
		if words := "the DHCP server gives " + another + "/64 in place of " + a6; !strings.Contains(h.Log(1000), words) {
			t.Errorf("the log lacks %q", words)
		}
		reaches(t, "outside to the container, which keeps its address", on(w.outside), "tcp", "["+a6+"]:80", outside6)
		h.killPlugin()
		settled(t, "the lease's problem to be told after the plugin's restart", func() bool {
			return strings.Contains(h.leaseProblem("renewed6-a", "renewed6"), another)
		})
		seen.Forget()
		h.docker("rm", "-f", "renewed6-a")
		seen.Saw(t, lab.DHCPv6("release").SourceMAC(mac))
		settled(t, "the server has the lease back", func() bool {
			leases, err := server.Leases()
			return err == nil && len(leases) == 0
		})
	})
}
