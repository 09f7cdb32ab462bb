package integration

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// TestAddresses: what --subnet, --ip-range, --gateway, --aux-address and --ip promise.
func TestAddresses(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("addr", "--subnet", "198.19.20.0/24", "--ip-range", "198.19.20.128/30", "--gateway", "198.19.20.254",
			"--aux-address", "printer=198.19.20.129", "--aux-address", "far=198.19.20.7")
		var got []string
		for i := range 3 { // .128 to .131 but for the printer
			name := fmt.Sprint("addr-", i)
			h.client(name, "addr")
			got = append(got, h.address(name, "addr"))
		}
		if want := "198.19.20.128 198.19.20.130 198.19.20.131"; strings.Join(got, " ") != want {
			t.Errorf("containers got %v, want %s", got, want)
		}
		if out := h.docker("exec", "addr-0", "ip", "route"); !strings.Contains(out, "default via 198.19.20.254") {
			t.Errorf("the gateway is not the one asked for: %s", out)
		}
		h.refused("198.19.20.128/30", "run", "--rm", "--network", "addr", lab.Image, "true")
		h.client("addr-9", "addr", "--ip", "198.19.20.9") // outside of the range, inside the subnet
		for _, taken := range []string{"198.19.20.9", "198.19.20.7", "198.19.20.254"} {
			h.refused("taken", "run", "--rm", "--network", "addr", "--ip", taken, lab.Image, "true")
		}
		h.docker("rm", "-f", "addr-1")
		h.client("addr-again", "addr")
		if a := h.address("addr-again", "addr"); a != "198.19.20.130" {
			t.Errorf("the freed address is not given again: got %s", a)
		}
	})
}

// TestGreatSubnets: a /8 and a /64, with containers at both ends of them.
func TestGreatSubnets(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("great", "--subnet", "10.0.0.0/8", "--ipv6", "--subnet", "fd00:19:42::/64")
		h.server("great-a", "great", "--ip", "10.255.255.254", "--ip6", "fd00:19:42:0:ffff:ffff:ffff:ffff")
		h.client("great-b", "great")
		if four, six := h.address("great-b", "great"), h.address6("great-b", "great"); four != "10.0.0.2" || six != "fd00:19:42::2" {
			t.Errorf("the first container got %s and %s", four, six)
		}
		reaches(t, "the last address", h.in("great-b"), "tcp", "10.255.255.254:80", "10.0.0.2")
		reaches(t, "the last address, IPv6", h.in("great-b"), "tcp", "[fd00:19:42:0:ffff:ffff:ffff:ffff]:80", "fd00:19:42::2")
		h.refused("broadcast", "run", "--rm", "--network", "great", "--ip", "10.255.255.255", lab.Image, "true")
	})
}

// TestChosenSubnets: networks without --subnet get different ones, none that the host routes.
func TestChosenSubnets(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		if _, err := h.Script("ip route add 10.64.0.0/23 via " + peer4); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = h.Script("ip route del 10.64.0.0/23") })
		routed := netip.MustParsePrefix("10.64.0.0/23")
		var all []netip.Prefix
		for i := range 3 {
			name := fmt.Sprint("chosen-", i)
			h.network(name, "--ipv6")
			var configs []struct{ Subnet netip.Prefix }
			if err := json.Unmarshal([]byte(h.docker("network", "inspect", "-f", "{{json .IPAM.Config}}", name)), &configs); err != nil {
				t.Fatal(err)
			}
			for _, c := range configs {
				if c.Subnet.Overlaps(routed) {
					t.Errorf("network %s got %s, which the host has a route to", name, c.Subnet)
				}
				for _, other := range all {
					if c.Subnet.Overlaps(other) {
						t.Errorf("network %s got %s, which overlaps %s of another", name, c.Subnet, other)
					}
				}
				all = append(all, c.Subnet)
			}
		}
		if len(all) < 3 {
			t.Errorf("three networks have %d subnets", len(all))
		}
	})
}

// TestAddressesSurvive: kill -9 of the plugin loses no address and gives none twice.
func TestAddressesSurvive(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("keep", "--subnet", "198.19.21.0/24")
		h.client("keep-a", "keep")
		h.killPlugin()
		h.client("keep-b", "keep")
		if a, b := h.address("keep-a", "keep"), h.address("keep-b", "keep"); a == b {
			t.Errorf("two containers have %s", a)
		}
		h.refused("taken", "run", "--rm", "--network", "keep", "--ip", h.address("keep-a", "keep"), lab.Image, "true")
	})
}
