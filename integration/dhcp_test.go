package integration

import (
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
				if err != nil || !strings.Contains(fmt.Sprint(leases), mac) {
					t.Errorf("the server has no lease for %s: %v %v", mac, leases, err)
				}
				reaches(t, "outside to leased container", on(w.outside), "tcp", a+":80", outside4)
				reaches(t, "leased container to another subnet", h.in("leased-a"), "tcp", far4+":80", a)
				out := h.docker("exec", "leased-a", "sh", "-c", "ip -4 address show eth0; ip route")
				for _, want := range []string{"mtu 1400", a + "/24", "default via " + wireGateway, "198.19.77.0/24 via " + outside4} {
					if !strings.Contains(out, want) {
						t.Errorf("the container lacks %q of its lease: %s", want, out)
					}
				}

				if out, err := h.Dockway("endpoints", "--json"); err != nil || !strings.Contains(out, `"search":["lan.example"]`) {
					t.Errorf("dockway does not show the search domain of the lease: %s %v", out, err)
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
		h.refused("DHCP", "run", "--rm", "--name", "silent-a", "--network", "silent", lab.Image, "true")
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("the error came after %s", took)
		}
	})
}

// TestSLAAC: containers make IPv6 addresses of their own from the LAN's router advertisements.
func TestSLAAC(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		// dnsmasq is a router's daemon too.
		advertising, err := w.router.Start("router advertisement on eth0", filepath.Join(cache, "dockway", "dhcp", "usr", "sbin", "dnsmasq"), "--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null",
			"--port=0", "--user=root", "--group=root", "--pid-file=", "--dhcp-leasefile=/dev/null", "--interface=eth0", "--bind-interfaces", "--enable-ra", "--dhcp-range=::,constructor:eth0,ra-only")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := advertising.Stop(); err != nil {
				t.Error(err)
			}
		})
		h.network("auto", "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "slaac=true")
		network := "auto"
		if h.Engine == lab.Moby { // it switches IPv6 off where it gives no address
			network = "name=auto,driver-opt=com.docker.network.endpoint.sysctls=net.ipv6.conf.IFNAME.disable_ipv6=0"
		}
		h.server("auto-a", network, "--sysctl", "net.ipv6.conf.all.disable_ipv6=0")
		var address string
		settled(t, "the container has an address of its own making", func() bool {
			out := h.docker("exec", "auto-a", "ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "global")
			if _, after, ok := strings.Cut(out, "inet6 "); ok && !strings.Contains(out, "tentative") {
				address, _, _ = strings.Cut(after, "/")
			}
			return strings.HasPrefix(address, "fd00:64:")
		})
		reaches(t, "outside to container", on(w.outside), "tcp", "["+address+"]:80", outside6)
		reaches(t, "container to outside", h.in("auto-a"), "tcp", "["+outside6+"]:80", address)
		reaches(t, "container to another subnet, by the advertised router", h.in("auto-a"), "tcp", "["+far6+"]:80", address)
	})
}

// TestStableMAC: a container that is made again has the same MAC, where the engine tells its name.
func TestStableMAC(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		if h.Engine != lab.Moby {
			h.wired("stable", "transparent", "-o", "mac=stable") // accepted: the MAC is random
			return
		}
		w.serves(t, lab.Dnsmasq, nil)
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
		}
	})
}
