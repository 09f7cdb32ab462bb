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
