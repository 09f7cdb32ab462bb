package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// serves starts a DHCP server on the wire, in the router, for the time of a test.
func (w *wire) serves(t *testing.T, program lab.DHCPProgram, change func(*lab.DHCPConfig)) *lab.DHCPServer {
	t.Helper()
	config := lab.DHCPConfig{
		Subnet: wire4, From: "198.18.64.200", To: "198.18.64.220", Router: wireGateway, Domain: "lan.example", MTU: 1400, Lease: 2 * time.Minute,
		DNS:    []string{"198.18.64.53", "198.18.64.54"},
		Routes: map[string]string{"0.0.0.0/0": wireGateway, "198.18.65.0/24": wireGateway, "198.19.77.0/24": outside4},
	}
	if change != nil {
		change(&config)
	}
	server, err := w.router.DHCP(program, "eth0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// TestDHCP: without a subnet, containers of a transparent network have the addresses that the LAN's
// DHCP server gives.
func TestDHCP(t *testing.T) {
	for _, program := range []lab.DHCPProgram{lab.Dnsmasq, lab.Kea} {
		t.Run(string(program), func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire, h, _ *host) {
				const reserved, fixed = "198.18.64.230", "02:42:00:00:64:30"
				server := w.serves(t, program, func(c *lab.DHCPConfig) { c.Reserved = map[string]string{fixed: reserved} })
				h.network("leased", "-o", "mode=transparent", "-o", "interface="+containerUplink)
				h.server("leased-a", "leased")
				a, mac := h.address("leased-a", "leased"), h.mac("leased-a", "leased")
				if !strings.HasPrefix(a, "198.18.64.2") {
					t.Fatalf("the container has %s, which is not the DHCP server's", a)
				}
				leases, err := server.Leases()
				// Its name is sent where the engine tells it.
				name := map[lab.Engine]string{lab.Moby: "leased-a"}[h.Engine]
				if err != nil || len(leases) != 1 || leases[0].MAC != mac || leases[0].IP != a || leases[0].Host != name {
					t.Errorf("the server has not leased %s to %s for the name %q: %v %v", a, mac, name, leases, err)
				}
				reaches(t, "outside to leased container", on(w.outside), "tcp", a+":80", outside4)
				reaches(t, "leased container to another subnet", h.in("leased-a"), "tcp", far4+":80", a)
				out := h.docker("exec", "leased-a", "sh", "-c", "ip -4 address show eth0; ip route")
				for _, want := range []string{"mtu 1400", a + "/24", "default via " + wireGateway, "198.19.77.0/24 via " + outside4} {
					if !strings.Contains(out, want) {
						t.Errorf("the container lacks %q of its lease: %s", want, out)
					}
				}

				if out, err := h.Dockway("endpoints", "--json"); err != nil || !strings.Contains(out, `"dns":["198.18.64.53","198.18.64.54"],"search":["lan.example"]`) {
					t.Errorf("dockway does not show the DNS servers and the search domain of the lease: %s %v", out, err)
				}

				// The lease outlives the plugin, and is given back with the container.
				h.killPlugin()
				reaches(t, "outside to leased container after the plugin's restart", on(w.outside), "tcp", a+":80", outside4)
				seen := w.router.Capture(t, "eth0")
				h.docker("rm", "-f", "leased-a")
				seen.Saw(t, lab.DHCP("release").From(a))
			})
		})
	}
}

// TestDHCPAddress: with a subnet for DHCP, --ip asks for an address, and a reservation holds for
// --mac-address.
func TestDHCPAddress(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		const reserved, fixed = "198.18.64.230", "02:42:00:00:64:30"
		w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) { c.Reserved = map[string]string{fixed: reserved} })
		h.network("asked", "--subnet", wire4, "--gateway", "198.18.64.253", "--ipam-opt", "dhcp=true", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.client("asked-a", "asked", "--ip", "198.18.64.210")
		if a := h.address("asked-a", "asked"); a != "198.18.64.210" {
			t.Errorf("the container has %s, not the address asked for", a)
		}
		h.client("asked-b", "asked", "--ip", reserved, "--mac-address", fixed)
		if out := h.docker("exec", "asked-b", "ip", "address", "show", "eth0"); !strings.Contains(out, reserved+"/24") || !strings.Contains(out, fixed) {
			t.Errorf("the reservation does not hold: %s", out)
		}
		h.refused(reserved, "run", "--rm", "--network", "asked", "--ip", reserved, "--name", "asked-c", lab.Image, "true")
	})
}

// TestDHCPWithoutServer: a server that does not answer is a clear error in time.
func TestDHCPWithoutServer(t *testing.T) {
	onWire(t, func(t *testing.T, _ *wire, h, _ *host) {
		h.network("silent", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		start := time.Now()
		h.refused("no DHCP server answered within 15s: check", "run", "--rm", "--name", "silent-a", "--network", "silent", lab.Image, "true")
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("the error came after %s", took)
		}
	})
}

// advertises has the router say on a link, of the wire or of a VLAN there, that it is one, and that hosts may make
// addresses of its subnet themselves, for the time of a test.
func (w *wire) advertises(t *testing.T, link string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	// dnsmasq is a router's daemon too.
	advertising, err := w.router.Start("router advertisement on "+link, filepath.Join(cache, "dockway", "dhcp", "usr", "sbin", "dnsmasq"), "--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null",
		"--port=0", "--user=root", "--group=root", "--pid-file=", "--dhcp-leasefile=/dev/null", "--interface="+link, "--bind-interfaces", "--enable-ra", "--dhcp-range=::,constructor:"+link+",ra-only")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := advertising.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// autoconfigured is the name of a network for docker run such that containers have IPv6: the engine of moby switches
// it off where it gives no address.
func (h *host) autoconfigured(network string) string {
	if h.Engine == lab.Moby {
		return "name=" + network + ",driver-opt=com.docker.network.endpoint.sysctls=net.ipv6.conf.IFNAME.disable_ipv6=0"
	}
	return network
}

// made is the address that a container has made itself of a prefix that is advertised, as "fd00:64::".
func (h *host) made(container, prefix string) (address string) {
	h.t.Helper()
	settled(h.t, container+" has an address of its own making", func() bool {
		out := h.docker("exec", container, "ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global")
		if _, after, ok := strings.Cut(out, "inet6 "); ok && !strings.Contains(out, "tentative") {
			address, _, _ = strings.Cut(after, "/")
		}
		return strings.HasPrefix(address, prefix)
	})
	if address == "" {
		h.t.FailNow()
	}
	return address
}

// TestSLAAC: containers make IPv6 addresses of their own from the LAN's router advertisements.
func TestSLAAC(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		w.advertises(t, "eth0")
		h.network("auto", "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "slaac=true")
		h.server("auto-a", h.autoconfigured("auto"), "--sysctl", "net.ipv6.conf.all.disable_ipv6=0")
		address := h.made("auto-a", "fd00:64::")
		reaches(t, "outside to container", on(w.outside), "tcp", "["+address+"]:80", outside6)
		reaches(t, "container to outside", h.in("auto-a"), "tcp", "["+outside6+"]:80", address)
		reaches(t, "container to another subnet, by the advertised router", h.in("auto-a"), "tcp", "["+far6+"]:80", address)
	})
}

// TestSLAACElsewhere: so they do in a VLAN, and without a switch. The host hears nothing of a VLAN's routers.
func TestSLAACElsewhere(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		w.trunked(t)
		for m, address := range map[*lab.Machine]string{w.router.Machine: vlanGateway6, w.outside: vlanOutside6} {
			if _, err := m.Script("echo 0 >/proc/sys/net/ipv6/conf/eth0.20/accept_ra; ip address add " + address + "/64 dev eth0.20 nodad"); err != nil {
				t.Fatal(err)
			}
		}
		w.advertises(t, "eth0")
		w.advertises(t, "eth0.20")
		part := map[lab.Engine]string{lab.Debian: "198.18.68.16/28", lab.Moby: "198.18.68.32/28"}[h.Engine]
		untagged := []string{"--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine]}
		tagged := []string{"--subnet", vlan4, "--gateway", vlanGateway, "--ip-range", part, "-o", fmt.Sprint("vlan=", vlanID)}
		for _, c := range []struct {
			name, prefix, other, outside string
			flags                        []string
		}{
			{"direct", "fd00:64::", "fd00:68::", outside6, append(untagged, "-o", "backend=macvlan")},
			{"tagged", "fd00:68::", "fd00:64::", vlanOutside6, tagged},
			{"tagged-direct", "fd00:68::", "fd00:64::", vlanOutside6, append(tagged, "-o", "backend=macvlan")},
		} {
			name := "auto-" + c.name
			h.network(name, append(c.flags, "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "slaac=true")...)
			for _, container := range []string{name + "-a", name + "-b"} {
				h.server(container, h.autoconfigured(name), "--sysctl", "net.ipv6.conf.all.disable_ipv6=0")
			}
			a, b := h.made(name+"-a", c.prefix), h.made(name+"-b", c.prefix)
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, c.name+": outside to container", on(w.outside), network, "["+a+"]:80", c.outside)
				reaches(t, c.name+": container to outside", h.in(name+"-a"), network, "["+c.outside+"]:80", a)
				reaches(t, c.name+": container to container", h.in(name+"-b"), network, "["+a+"]:80", b)
				reaches(t, c.name+": container to another subnet, by the advertised router", h.in(name+"-a"), network, "["+far6+"]:80", a)
				reaches(t, c.name+": outside to container, IPv4", on(w.outside), network, h.address(name+"-a", name)+":80", "")
			}
			if out := h.docker("exec", name+"-a", "ip", "-6", "address", "show", "dev", "eth0"); strings.Contains(out, c.other) {
				t.Errorf("%s: the container hears routers that it should not: %s", c.name, out)
			}
			if out := h.must("ip -6 address; ip -6 route"); strings.Contains(out, "fd00:68::") {
				t.Errorf("%s: the host has made itself an address of the VLAN, or a route: %s", c.name, out)
			}
			h.docker("rm", "-f", name+"-a", name+"-b")
			h.docker("network", "rm", name)
		}
	})
}

// TestStableMAC: a container that is made again has the same MAC, where the engine tells its name.
func TestStableMAC(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		if h.Engine != lab.Moby {
			h.wired("stable", "transparent", "-o", "mac=stable") // accepted: the MAC is random
			return
		}
		var config lab.DHCPConfig
		server := w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) { config = *c })
		h.wired("stable", "transparent", "-o", "mac=stable")
		h.network("stable-leased", "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "mac=stable")
		for _, network := range []string{"stable", "stable-leased"} {
			h.client("stable-a", network)
			mac, address := h.mac("stable-a", network), h.address("stable-a", network)
			h.docker("rm", "-f", "stable-a")
			h.client("stable-b", network)
			h.client("stable-a", network)
			if again := h.mac("stable-a", network); again != mac {
				t.Errorf("%s: made again, the container has MAC %s, before %s", network, again, mac)
			}
			if again := h.address("stable-a", network); network == "stable-leased" && again != address {
				t.Errorf("made again, the container has address %s, before %s", again, address)
			}
			h.docker("rm", "-f", "stable-a", "stable-b")
			if network != "stable-leased" {
				continue
			}
			// A reservation on the server holds for it.
			const reserved = "198.18.64.230"
			config.Reserved = map[string]string{mac: reserved}
			if err := server.Reconfigure(config); err != nil {
				t.Fatal(err)
			}
			h.client("stable-a", network)
			if again := h.address("stable-a", network); again != reserved {
				t.Errorf("the container has %s, and %s is reserved for its MAC %s", again, reserved, mac)
			}
			h.docker("rm", "-f", "stable-a")
		}
	})
}

// TestDHCPRenewal: a lease is renewed at T1 with the server that gave it; one that the server does not
// renew is asked for anew, and what comes of it is told: a running container keeps what it has.
func TestDHCPRenewal(t *testing.T) {
	for _, program := range []lab.DHCPProgram{lab.Dnsmasq, lab.Kea} {
		t.Run(string(program), func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire, h, _ *host) {
				const t1 = 4 * time.Second
				var config lab.DHCPConfig
				server := w.serves(t, program, func(c *lab.DHCPConfig) {
					c.Renew, c.Rebind = t1, 100*time.Second
					config = *c
				})
				h.network("renewed", "-o", "mode=transparent", "-o", "interface="+containerUplink)
				h.server("renewed-a", "renewed")
				a, mac := h.address("renewed-a", "renewed"), h.mac("renewed-a", "renewed")
				until := func() time.Time { t.Helper(); return leasedUntil(t, server, a, mac) }
				first, seen := until(), w.router.Capture(t, "eth0").Patient(3*t1)
				seen.Saw(t, lab.DHCP("request").From(a).To(wireGateway).SourceMAC(mac))
				seen.Saw(t, lab.DHCP("ack").To(a))
				settled(t, "the server has more time on record for the lease", func() bool { return until().After(first) })
				if told := h.leaseProblem("renewed-a", "renewed"); told != "" {
					t.Errorf("a lease that is renewed is said to have the problem %q", told)
				}

				// The server has the address reserved for somebody else now, and another for the container.
				const another = "198.18.64.231"
				config.Reserved = map[string]string{mac: another, "02:42:00:00:64:31": a}
				seen.Forget()
				if err := server.Reconfigure(config); err != nil {
					t.Fatal(err)
				}
				seen.Saw(t, lab.DHCP("nak"))
				told := ""
				settled(t, "the lease's problem to be told", func() bool {
					told = h.leaseProblem("renewed-a", "renewed")
					return strings.Contains(told, another)
				})
				if !strings.Contains(told, another) || !strings.Contains(told, a) {
					t.Errorf("dockway tells %q of the lease, want %s and %s in it", told, a, another)
				}
				for _, words := range []string{"the DHCP server no longer grants " + a, "the DHCP server gives " + another + "/24 in place of " + a} {
					if !strings.Contains(h.Log(1000), words) {
						t.Errorf("the log lacks %q", words)
					}
				}
				reaches(t, "outside to the container, which keeps its address", on(w.outside), "tcp", a+":80", outside4)
				reaches(t, "the container, which keeps its address, to outside", h.in("renewed-a"), "tcp", outside4+":80", a)
				h.killPlugin()
				settled(t, "the lease's problem to be told after the plugin's restart", func() bool {
					return strings.Contains(h.leaseProblem("renewed-a", "renewed"), another)
				})
				// Started again, it has what the server grants.
				seen.Forget()
				h.docker("restart", "-t", "0", "renewed-a")
				seen.Saw(t, lab.DHCP("release").From(another))
				if again := h.address("renewed-a", "renewed"); again == a || !strings.HasPrefix(again, "198.18.64.2") {
					t.Errorf("started again, the container has %s, which is another's now", again)
				}
				if told := h.leaseProblem("renewed-a", "renewed"); told != "" {
					t.Errorf("started again, the container's lease is said to have the problem %q", told)
				}
				w.forget(t)
				reaches(t, "outside to the container, which is started again", on(w.outside), "tcp", h.address("renewed-a", "renewed")+":80", outside4)
			})
		})
	}
}

// TestDHCPRebinding: after a restart of the plugin a lease is confirmed; when its server does not answer any more, any other
// is asked.
func TestDHCPRebinding(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		var config lab.DHCPConfig
		server := w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) {
			c.Renew, c.Rebind = 3*time.Second, 6*time.Second
			config = *c
		})
		h.network("rebound", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.server("rebound-a", "rebound")
		a, mac := h.address("rebound-a", "rebound"), h.mac("rebound-a", "rebound")
		seen := w.router.Capture(t, "eth0").Patient(30 * time.Second)
		h.killPlugin()
		seen.Saw(t, lab.DHCP("request").From("0.0.0.0").To("255.255.255.255").SourceMAC(mac))
		seen.Saw(t, lab.DHCP("request").From(a).To(wireGateway).SourceMAC(mac)) // and goes on as before
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
		second, err := w.outside.DHCP(lab.Dnsmasq, "eth0", config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := second.Stop(); err != nil {
				t.Error(err)
			}
		})
		seen.Saw(t, lab.DHCP("request").From(a).To("255.255.255.255").SourceMAC(mac))
		settled(t, "the other server has the lease on record", func() bool {
			leases, err := second.Leases()
			return err == nil && len(leases) == 1 && leases[0].IP == a && leases[0].MAC == mac
		})
		if told := h.leaseProblem("rebound-a", "rebound"); told != "" {
			t.Errorf("a lease that another server goes on with is said to have the problem %q", told)
		}
		reaches(t, "outside to container", on(w.outside), "tcp", a+":80", outside4)
	})
}

// TestDHCPDeclined: a leased address that is used already, by a machine of the LAN, by the host or by another of its containers,
// is declined, and another taken. Who asks for such an address is told who has it.
func TestDHCPDeclined(t *testing.T) {
	for _, program := range []lab.DHCPProgram{lab.Dnsmasq, lab.Kea} {
		t.Run(string(program), func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire, h, _ *host) {
				var config lab.DHCPConfig
				server := w.serves(t, program, func(c *lab.DHCPConfig) { config = *c })
				const mac, asked, unheard = "02:64:00:00:03:00", "198.18.64.219", "198.18.64.230"
				h.wired("declined-fixed", "transparent")
				h.client("declined-b", "declined-fixed")
				machine, err := w.outside.MAC("eth0")
				if err != nil {
					t.Fatal(err)
				}
				itself, err := h.MAC(containerUplink)
				if err != nil {
					t.Fatal(err)
				}
				w.holds(t, asked, unheard)
				h.network("declined", "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "mac_pool="+mac+","+mac)
				for _, c := range []struct{ what, address, holder string }{
					{"a machine of the LAN", unheard, machine},
					{"the host", h.wire4, itself},
					{"another container", h.address("declined-b", "declined-fixed"), h.mac("declined-b", "declined-fixed")},
				} {
					config.Reserved = map[string]string{mac: c.address} // it is offered first
					if err := server.Reconfigure(config); err != nil {
						t.Fatal(err)
					}
					seen := w.router.Capture(t, "eth0")
					h.server("declined-a", "declined")
					a := h.address("declined-a", "declined")
					if a == c.address || !strings.HasPrefix(a, "198.18.64.2") {
						t.Errorf("the container has %s, and %s has %s", a, c.what, c.address)
					}
					seen.Saw(t, lab.DHCP("decline").SourceMAC(mac))
					settled(t, "the server is told", func() bool {
						_, after, said := strings.Cut(server.Log(), "DECLINE")
						return said && strings.Contains(after, c.address)
					})
					if words := c.address + " is used by " + c.holder + " already"; !strings.Contains(h.Log(1000), words) {
						t.Errorf("%s: the log lacks %q", c.what, words)
					}
					if leasedUntil(t, server, a, mac).IsZero() {
						t.Errorf("%s: the server has not leased %s to %s", c.what, a, mac)
					}
					w.forget(t)
					reaches(t, c.what+": outside to the container", on(w.outside), "tcp", a+":80", "")
					h.docker("rm", "-f", "declined-a")
				}

				h.docker("rm", "-f", "declined-b")
				h.docker("network", "rm", "declined-fixed")
				h.network("declined-asked", "--subnet", wire4, "--gateway", "198.18.64.253", "--ipam-opt", "dhcp=true", "-o", "mode=transparent", "-o", "interface="+containerUplink)
				h.refused("address "+asked+" is used by "+machine+" already", "run", "--rm", "--network", "declined-asked", "--ip", asked, lab.Image, "true")
			})
		})
	}
}

// holds gives the outside machine addresses for the time of a test.
func (w *wire) holds(t *testing.T, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		more := "/32 dev eth0"
		if strings.Contains(a, ":") {
			more = "/128 dev eth0 nodad"
		}
		if _, err := w.outside.Script("ip address add " + a + more); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = w.outside.Script("ip address delete " + a + more) })
	}
}

// TestDHCPRefused: a server that offers an address and then refuses it is told of in time; one that grants it meanwhile is
// asked again.
func TestDHCPRefused(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		var config lab.DHCPConfig
		server := w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) {
			c.Most = 1
			config = *c
		})
		h.network("refused", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.client("refused-a", "refused")
		seen := w.router.Capture(t, "eth0").Patient(soon)
		h.refused("server "+wireGateway+" refuses address 198.18.64.2", "run", "--rm", "--name", "refused-b", "--network", "refused", lab.Image, "true")
		seen.Saw(t, lab.DHCP("nak"))

		seen.Forget()
		started := make(chan error, 1)
		t.Cleanup(func() { _, _ = h.Docker("rm", "-f", "refused-b") })
		go func() {
			_, err := h.Docker("run", "-d", "--stop-signal", "KILL", "--name", "refused-b", "--network", "refused", lab.Image, "sleep", "100000")
			started <- err
		}()
		seen.Saw(t, lab.DHCP("nak"))
		config.Most, config.From = 0, "198.18.64.210" // it has forgotten the lease of the first
		if err := server.Reconfigure(config); err != nil {
			t.Error(err)
		}
		if err := <-started; err != nil {
			t.Errorf("an address that is granted on another try: %v", err)
		}
	})
}

// TestDHCPForeignRefusal: a second server on the LAN, which refuses what it has not given, neither keeps an address from being
// leased nor takes one away after a restart of the plugin. The refusal of the first does: the address is asked for anew.
func TestDHCPForeignRefusal(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		var config lab.DHCPConfig
		first := w.serves(t, lab.Dnsmasq, func(c *lab.DHCPConfig) {
			c.Renew = 4 * time.Second
			config = *c
		})
		h.network("foreign", "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.server("foreign-a", "foreign")
		a, mac := h.address("foreign-a", "foreign"), h.mac("foreign-a", "foreign")
		until := func() time.Time { t.Helper(); return leasedUntil(t, first, a, mac) }

		other := config
		other.From, other.To = "198.18.64.240", "198.18.64.245"
		foreign, err := w.outside.DHCP(lab.Dnsmasq, "eth0", other)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := foreign.Stop(); err != nil {
				t.Error(err)
			}
		})
		seen := w.router.Capture(t, "eth0").Patient(30 * time.Second)
		h.killPlugin()
		seen.Saw(t, lab.DHCP("nak").From(outside4))
		asked := until()
		settled(t, "the lease to be renewed", func() bool { return until().After(asked) })
		if told := h.leaseProblem("foreign-a", "foreign"); told != "" {
			t.Errorf("a lease that a foreign server refuses is said to have the problem %q", told)
		}
		reaches(t, "outside to container", on(w.outside), "tcp", a+":80", outside4)

		// Whoever offers first: the other refuses what is taken of it.
		seen.Forget()
		h.server("foreign-b", "foreign")
		seen.Saw(t, lab.DHCP("nak"))
		b, bMAC := h.address("foreign-b", "foreign"), h.mac("foreign-b", "foreign")
		if leasedUntil(t, first, b, bMAC).IsZero() && leasedUntil(t, foreign, b, bMAC).IsZero() {
			t.Errorf("no server has leased %s to %s", b, bMAC)
		}
		reaches(t, "outside to the other container", on(w.outside), "tcp", b+":80", outside4)
		h.docker("rm", "-f", "foreign-b")

		// Now it is the server of the lease.
		if err := foreign.Stop(); err != nil {
			t.Fatal(err)
		}
		config.Renew = 0 // it is asked because of the restart, not to renew
		config.Reserved = map[string]string{"02:42:00:00:64:31": a}
		if err := first.Reconfigure(config); err != nil {
			t.Fatal(err)
		}
		seen.Forget()
		h.killPlugin()
		seen.Saw(t, lab.DHCP("nak").From(wireGateway))
		settled(t, "the lease's problem to be told", func() bool {
			return strings.Contains(h.leaseProblem("foreign-a", "foreign"), a)
		})
	})
}

// TestDHCPElsewhere: addresses are leased, kept and given back in a VLAN too, and without a switch.
func TestDHCPElsewhere(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		w.trunked(t)
		tagged := []string{"-o", fmt.Sprint("vlan=", vlanID)}
		direct := []string{"-o", "backend=macvlan"}
		for _, c := range []struct {
			name, link, subnet, gateway, part, outside string
			flags                                      []string
		}{
			{"direct", "eth0", wire4, wireGateway, "198.18.64.2", outside4, direct},
			{"tagged", "eth0.20", vlan4, vlanGateway, "198.18.68.2", vlanOutside4, tagged},
			{"tagged-direct", "eth0.20", vlan4, vlanGateway, "198.18.68.2", vlanOutside4, append(tagged, direct...)},
		} {
			server, err := w.router.DHCP(lab.Dnsmasq, c.link, lab.DHCPConfig{
				Subnet: c.subnet, From: c.part + "00", To: c.part + "20", Router: c.gateway, Lease: 2 * time.Minute, Renew: 3 * time.Second,
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := server.Stop(); err != nil {
					t.Error(err)
				}
			})
			name := "elsewhere-" + c.name
			h.network(name, append(c.flags, "-o", "mode=transparent", "-o", "interface="+containerUplink)...)
			h.server(name+"-a", name)
			a, mac := h.address(name+"-a", name), h.mac(name+"-a", name)
			if !strings.HasPrefix(a, c.part) {
				t.Fatalf("%s: the container has %s, which is not the DHCP server's", c.name, a)
			}
			until := func() time.Time { t.Helper(); return leasedUntil(t, server, a, mac) }
			first := until()
			if first.IsZero() {
				t.Errorf("%s: the server has not leased %s to %s", c.name, a, mac)
			}
			w.forget(t)
			reaches(t, c.name+": outside to leased container", on(w.outside), "tcp", a+":80", c.outside)
			reaches(t, c.name+": leased container to another subnet", h.in(name+"-a"), "tcp", far4+":80", a)
			if err := lab.WaitFor(20*time.Second, "the lease to be renewed", func() (bool, error) { return until().After(first), nil }); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			if told := h.leaseProblem(name+"-a", name); told != "" {
				t.Errorf("%s: a lease that is renewed is said to have the problem %q", c.name, told)
			}
			h.docker("rm", "-f", name+"-a")
			settled(t, c.name+": the server has the lease back", func() bool { return until().IsZero() })
			h.docker("network", "rm", name)
			if err := server.Stop(); err != nil {
				t.Error(err)
			}
		}
	})
}

// leaseProblem is what dockway tells of the lease of a container's address.
func (h *host) leaseProblem(container, network string) string {
	h.t.Helper()
	out, err := h.Dockway("endpoints", "--json")
	if err != nil {
		h.t.Fatal(err)
	}
	var all []struct {
		Address string `json:"address"`
		Problem string `json:"lease_problem"`
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		h.t.Fatalf("%v: %s", err, out)
	}
	for _, e := range all {
		if strings.HasPrefix(e.Address, h.address(container, network)+"/") {
			return e.Problem
		}
	}
	h.t.Fatalf("dockway does not show %s: %s", container, out)
	return ""
}

// leasedUntil is when the server's lease of an address to a MAC ends; zero: it has none on record.
func leasedUntil(t *testing.T, server *lab.DHCPServer, ip, mac string) (end time.Time) {
	t.Helper()
	leases, err := server.Leases()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases {
		if l.MAC == mac && l.IP == ip {
			end = l.Until
		}
	}
	return end
}
