package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/network"

	"github.com/dockway/dockway/integration/lab"
)

// TestSameNetwork: containers of one network reach each other by name and address, bridged.
func TestSameNetwork(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("same")
		h.server("same-a", "same")
		h.client("same-b", "same")
		a, b := h.address("same-a", "same"), h.address("same-b", "same")
		reaches(t, "container to container", h.in("same-b"), "tcp", a+":80", b)
		reaches(t, "container to container", h.in("same-b"), "udp", a+":80", b)
		reaches(t, "container to container by name", h.in("same-b"), "tcp", "same-a:80", b)
		if out := h.docker("exec", "same-b", "ping", "-c1", "-W2", a); !strings.Contains(out, "ttl=64") {
			t.Errorf("the TTL of a bridged packet was changed: %s", out)
		}
	})
}

// TestEngineAddresses: a network of the engine's own address manager, with nothing said but the driver, is one
// of mode nat, and has all that others have.
func TestEngineAddresses(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		create := func(name string, args ...string) {
			t.Helper()
			h.docker(append(append([]string{"network", "create", "-d", lab.Plugin}, args...), name)...)
			t.Cleanup(func() { h.docker("network", "rm", name) })
		}
		create("plain")
		create("plain-six", "--subnet", "198.19.41.0/24", "--ipv6", "--subnet", "fd00:19:41::/64")
		if out, err := h.Dockway("networks"); err != nil || strings.Count(out, "  nat  ") != 2 {
			t.Errorf("dockway networks shows other than two of mode nat: %s, %v", out, err)
		}
		h.server("plain-a", "plain", "-p", "8009:80")
		h.client("plain-b", "plain")
		h.server("plain-c", "plain-six", "-p", "8010:80", "--ip", "198.19.41.77", "--ip6", "fd00:19:41::77")
		for _, restarted := range []bool{false, true} {
			if restarted {
				h.killPlugin()
			}
			reaches(t, "same network", h.in("plain-b"), "tcp", h.address("plain-a", "plain")+":80", h.address("plain-b", "plain"))
			reaches(t, "container to outside", h.in("plain-b"), "tcp", peer4+":80", h.ip)
			reaches(t, "published port", on(shared.peer), "tcp", h.ip+":8009", peer4)
			reaches(t, "hairpin", h.in("plain-b"), "tcp", h.ip+":8009", "")
			reaches(t, "published port on localhost", on(h.Machine), "tcp", "127.0.0.1:8009", "")
			reaches(t, "published port over IPv6", on(shared.peer), "tcp", "["+host6[h.Engine]+"]:8010", peer6)
			reaches(t, "given address", on(h.Machine), "tcp", "198.19.41.77:80", "")
			barred(t, "another network", h.in("plain-b"), "tcp", "198.19.41.77:80")
		}
		h.docker("rm", "-f", "plain-a")
		barred(t, "the port of a container that is gone", on(shared.peer), "tcp", h.ip+":8009")
	})
}

// TestTwoNetworks: two nat networks cannot reach each other, except through published ports.
func TestTwoNetworks(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("one")
		h.network("two")
		h.server("one-a", "one", "-p", "8001:80", "-p", "8001:80/udp")
		h.client("two-b", "two")
		barred(t, "another network", h.in("two-b"), "tcp", h.address("one-a", "one")+":80")
		barred(t, "another network", h.in("two-b"), "udp", h.address("one-a", "one")+":80")
		if out, err := h.Docker("exec", "two-b", "ping", "-c1", "-W1", h.address("one-a", "one")); err == nil {
			t.Errorf("another network answers ping: %s", out)
		}
		reaches(t, "another network's published port", h.in("two-b"), "tcp", h.ip+":8001", "")
		reaches(t, "another network's published port", h.in("two-b"), "udp", h.ip+":8001", "")
	})
}

// TestOutside: the outside sees the host's address, and cannot reach a container's own.
func TestOutside(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("out", "--subnet", "198.19.7.0/24")
		h.server("out-a", "out")
		a := h.address("out-a", "out")
		reaches(t, "container to outside", h.in("out-a"), "tcp", peer4+":80", h.ip)
		reaches(t, "container to outside", h.in("out-a"), "udp", peer4+":80", h.ip)
		reaches(t, "host to container", on(h.Machine), "tcp", a+":80", "")
		serve := h.Command(t.Context(), shared.probe, "serve", "tcp", ":8299")
		if err := serve.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = h.Run("pkill", "-f", "serve tcp :8299"); _ = serve.Wait() })
		for _, of := range []string{"198.19.7.1", h.ip} { // the gateway, and the host on the LAN
			reaches(t, "container to a process of the host", h.in("out-a"), "tcp", of+":8299", a)
		}
		// Somebody on the LAN who knows the way.
		route(t, shared.peer, "198.19.7.0/24", h.ip)
		barred(t, "outside to a container's own address", on(shared.peer), "tcp", a+":80")
		barred(t, "outside to a container's own address", on(shared.peer), "udp", a+":80")
		if out, err := shared.peer.Run("ping", "-c1", "-W1", a); err == nil {
			t.Errorf("outside pings a container's own address: %s", out)
		}
	})
}

// TestInternal: no way out and none in, but for the host.
func TestInternal(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("inner", "--internal")
		h.server("inner-a", "inner")
		h.client("inner-b", "inner")
		reaches(t, "same internal network", h.in("inner-b"), "tcp", h.address("inner-a", "inner")+":80", "")
		reaches(t, "host to internal network", on(h.Machine), "tcp", h.address("inner-a", "inner")+":80", "")
		if out := h.docker("exec", "inner-b", "ip", "route"); strings.Contains(out, "default") {
			t.Errorf("an internal network has a default route: %s", out)
		}
		h.docker("run", "--rm", "--network", "inner", "--cap-add", "NET_ADMIN", lab.Image, "sh", "-c",
			fmt.Sprintf("ip route add default via $(ip -4 route | sed 's/0.24.*/1/'); ! /probe -timeout 700ms ask tcp %s:80", peer4))
	})
}

// TestDisableICC: containers of the network cannot reach each other but by published ports, the outside they can,
// whether or not the host's rules see bridged frames.
func TestDisableICC(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("noicc", "--subnet", "198.19.11.0/24", "--ipv6", "--subnet", "fd00:19:11::/64", "-o", "disable_icc=true")
		h.server("noicc-a", "noicc", "-p", "8002:80", "-p", "8002:80/udp")
		h.client("noicc-b", "noicc")
		a, a6 := h.address("noicc-a", "noicc"), h.address6("noicc-a", "noicc")
		const bridgeNF = "sysctl -qw net.bridge.bridge-nf-call-iptables=%[1]d net.bridge.bridge-nf-call-ip6tables=%[1]d"
		was := h.must("sysctl -n net.bridge.bridge-nf-call-ip6tables")
		t.Cleanup(func() {
			h.must("sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=" + was)
		})
		for _, seen := range []int{1, 0} {
			h.must(fmt.Sprintf(bridgeNF, seen))
			what := fmt.Sprintf("disable_icc, bridge-nf-call-iptables=%d", seen)
			for _, network := range []string{"tcp", "udp"} {
				for _, own := range []string{a + ":80", "[" + a6 + "]:80"} {
					barred(t, what, h.in("noicc-b"), network, own)
				}
				for _, port := range []string{h.ip + ":8002", "198.19.11.1:8002", "[" + host6[h.Engine] + "]:8002"} {
					reaches(t, what+": container to a published port of its network", h.in("noicc-b"), network, port, "")
					reaches(t, what+": container to its own published port", h.in("noicc-a"), network, port, "")
				}
				reaches(t, what+": outside to published port", on(shared.peer), network, h.ip+":8002", peer4)
				reaches(t, what+": outside to published port, IPv6", on(shared.peer), network, "["+host6[h.Engine]+"]:8002", peer6)
				reaches(t, what+": container to outside", h.in("noicc-b"), network, peer4+":80", h.ip)
			}
			for _, own := range []string{a, a6} {
				if out, err := h.Docker("exec", "noicc-b", "ping", "-c1", "-W1", own); err == nil {
					t.Errorf("%s: a container pings another: %s", what, out)
				}
			}
			if out, err := h.in("noicc-b")("-timeout", "700ms", "arp", "eth0", a); err == nil {
				t.Errorf("%s: a container finds another: %s", what, out)
			}
		}
	})
}

// TestLinkSettings: mtu, --ip, --mac-address, iface_prefix and the name of the link are what the container has.
func TestLinkSettings(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("links", "--subnet", "198.19.8.0/24", "-o", "com.docker.network.driver.mtu=1400", "-o", "iface_prefix=net", "-o", "network_name=links")
		h.client("links-a", "links", "--ip", "198.19.8.77", "--mac-address", "02:42:00:00:00:77")
		out := h.docker("exec", "links-a", "ip", "address", "show", "net0")
		for _, want := range []string{"mtu 1400", "198.19.8.77/24", "02:42:00:00:00:77"} {
			if !strings.Contains(out, want) {
				t.Errorf("the container's link lacks %q: %s", want, out)
			}
		}
		if out, err := h.Run("ip", "-o", "link", "show", "type", "bridge"); err != nil || !strings.Contains(out, "mtu 1400") {
			t.Errorf("no bridge has MTU 1400: %s %v", out, err)
		}
		// Engines before moby 2.0 do not let a driver say the whole name.
		named := map[lab.Engine]string{lab.Debian: "net0", lab.Moby: "lan0"}[h.Engine]
		const option = "driver-opt=com.docker.network.endpoint.ifname="
		if out := h.docker("run", "--rm", "--network", "name=links,"+option+"lan0", lab.Image, "ip", "-o", "link"); !strings.Contains(out, named+"@") {
			t.Errorf("the container has no link %s: %s", named, out)
		}
		h.refused(`ifname="a/b": a link's name begins with a letter`, "run", "--rm", "--network", "name=links,"+option+"a/b", lab.Image, "true")
		h.refused("taken", "run", "--rm", "--network", "links", "--ip", "198.19.8.77", lab.Image, "true")
		h.refused(`did you mean "mtu"?`, "network", "create", "-d", lab.Plugin, "-o", "mut=1", "wrong")
		h.refused("overlaps", "network", "create", "-d", lab.Plugin, "--subnet", "198.19.8.0/25", "wrong")
		h.refused("overlaps the host's route to 198.18.0.0/24 on eth0", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", "198.18.0.0/25", "wrong")
	})
}

// TestSeveralNetworks: a container joins and leaves networks while it runs, and can be restarted.
func TestSeveralNetworks(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("left", "--subnet", "198.19.43.0/24")
		h.network("right")
		h.client("left-c", "left")
		h.client("right-c", "right")
		h.server("both", "left", "-p", "8003:80")
		barred(t, "before it is connected", h.in("right-c"), "tcp", "both:80")
		h.docker("network", "connect", "right", "both")
		reaches(t, "first network", h.in("left-c"), "tcp", h.address("both", "left")+":80", "")
		reaches(t, "second network", h.in("right-c"), "tcp", h.address("both", "right")+":80", "")
		reaches(t, "published port", on(shared.peer), "tcp", h.ip+":8003", peer4)
		h.docker("restart", "-t", "1", "both")
		reaches(t, "first network after a restart", h.in("left-c"), "tcp", h.address("both", "left")+":80", "")
		reaches(t, "second network after a restart", h.in("right-c"), "tcp", h.address("both", "right")+":80", "")
		reaches(t, "published port after a restart", on(shared.peer), "tcp", h.ip+":8003", peer4)
		right := h.address("both", "right")
		h.docker("network", "disconnect", "right", "both")
		barred(t, "after it is disconnected", h.in("right-c"), "tcp", right+":80")
		reaches(t, "first network still", h.in("left-c"), "tcp", h.address("both", "left")+":80", "")
		// The network that the container's default route and its port are of goes: the other takes over.
		h.docker("network", "connect", "right", "both")
		left := h.address("both", "left")
		h.docker("network", "disconnect", "left", "both")
		barred(t, "the network that was the gateway", h.in("left-c"), "tcp", left+":80")
		reaches(t, "the other network", h.in("right-c"), "tcp", h.address("both", "right")+":80", "")
		reaches(t, "container to outside by the other network", h.in("both"), "tcp", peer4+":80", h.ip)
		if all := h.ports(h.address("both", "right"), 80); len(all["tcp"]) != 1 || all["tcp"][0] != 8003 {
			t.Errorf("the other network has the ports %v", all)
		}
		reaches(t, "published port by the other network", on(shared.peer), "tcp", h.ip+":8003", peer4)
		h.docker("network", "connect", "--ip", "198.19.43.77", "left", "both")
		reaches(t, "connected again, with an address that was asked for", h.in("left-c"), "tcp", "198.19.43.77:80", "")
		reaches(t, "published port, connected again", on(shared.peer), "tcp", h.ip+":8003", peer4)
	})
}

// TestDualStack: IPv6 beside IPv4, with everything that IPv4 has.
func TestDualStack(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("dual", "--subnet", "198.19.9.0/24", "--ipv6", "--subnet", "fd00:19:9::/64")
		h.server("dual-a", "dual", "-p", "8004:80", "--ip6", "fd00:19:9::77")
		h.client("dual-b", "dual")
		if a := h.address6("dual-a", "dual"); a != "fd00:19:9::77" {
			t.Errorf("--ip6 gave %s", a)
		}
		h.refused("taken", "run", "--rm", "--network", "dual", "--ip6", "fd00:19:9::77", lab.Image, "true")
		b := h.address6("dual-b", "dual")
		reaches(t, "same network", h.in("dual-b"), "tcp", "[fd00:19:9::77]:80", b)
		reaches(t, "container to outside", h.in("dual-b"), "tcp", "["+peer6+"]:80", host6[h.Engine])
		reaches(t, "published port over IPv6", on(shared.peer), "tcp", "["+host6[h.Engine]+"]:8004", peer6)
		reaches(t, "published port over IPv4", on(shared.peer), "tcp", h.ip+":8004", peer4)
		reaches(t, "published port on localhost", on(h.Machine), "tcp", "[::1]:8004", "")
		reaches(t, "hairpin", h.in("dual-b"), "tcp", "["+host6[h.Engine]+"]:8004", "")
		route(t, shared.peer, "fd00:19:9::/64", host6[h.Engine])
		barred(t, "outside to a container's own address", on(shared.peer), "tcp", "[fd00:19:9::77]:80")
	})
}

// TestIPv6Only: a network without IPv4, on the engine that has it.
func TestIPv6Only(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	h := onHost(t, shared.hosts[lab.Moby])
	// Debian's command line does not have the flag: ask the engine itself.
	off, on6 := false, true
	engine, err := h.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close() //nolint:errcheck // asked and answered
	if _, err := engine.NetworkCreate(t.Context(), "six", network.CreateOptions{
		Driver: lab.Plugin, EnableIPv4: &off, EnableIPv6: &on6,
		IPAM: &network.IPAM{Driver: lab.Plugin, Config: []network.IPAMConfig{{Subnet: "fd00:19:10::/64"}}},
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.docker("network", "rm", "six") })
	h.server("six-a", "six", "-p", "8005:80")
	h.client("six-b", "six")
	reaches(t, "same network", h.in("six-b"), "tcp", "["+h.address6("six-a", "six")+"]:80", h.address6("six-b", "six"))
	reaches(t, "container to outside", h.in("six-b"), "tcp", "["+peer6+"]:80", host6[h.Engine])
	reaches(t, "published port", on(shared.peer), "tcp", "["+host6[h.Engine]+"]:8005", peer6)
	if out := h.docker("exec", "six-a", "ip", "-4", "route"); strings.TrimSpace(out) != "" {
		t.Errorf("an IPv6 network gave the container IPv4 routes, so it has another network beside: %s", out)
	}
}

// TestBesideDocker: dockway and the engine's own bridges leave each other their rules, on a host as engines
// leave one: it forwards nothing that no rule lets pass, and has its rules see bridged frames.
func TestBesideDocker(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		if out := h.must("iptables -S FORWARD; cat /proc/sys/net/bridge/bridge-nf-call-iptables"); !strings.HasPrefix(out, "-P FORWARD DROP\n") || !strings.HasSuffix(out, "\n1") {
			t.Errorf("the host is not as most are: %s", out)
		}
		h.network("ours")
		h.docker("network", "create", "theirs")
		t.Cleanup(func() { h.docker("network", "rm", "theirs") })
		h.server("ours-a", "ours", "-p", "8006:80")
		h.server("theirs-a", "theirs", "-p", "8007:80")
		h.server("theirs-b", "theirs") // engines before 28 let everybody to the address of a published port
		barred(t, "dockway to an unpublished port of Docker's", h.in("ours-a"), "tcp", h.address("theirs-b", "theirs")+":80")
		barred(t, "Docker to an unpublished port of dockway's", h.in("theirs-a"), "tcp", h.address("ours-a", "ours")+":80")
		reaches(t, "dockway to a published port of Docker's", h.in("ours-a"), "tcp", h.ip+":8007", "")
		reaches(t, "Docker to a published port of dockway's", h.in("theirs-a"), "tcp", h.ip+":8006", "")
		reaches(t, "outside to Docker's", on(shared.peer), "tcp", h.ip+":8007", peer4)
		reaches(t, "outside to ours", on(shared.peer), "tcp", h.ip+":8006", peer4)
		h.refused("in use", "run", "--rm", "--network", "ours", "-p", "8007:80", lab.Image, "true")
	})
}

// outsideServer runs a server on the outside peer, on port 80 of both protocols.
func outsideServer(t *testing.T) (stop func()) {
	t.Helper()
	var stops []func()
	for _, network := range []string{"tcp", "udp"} {
		cmd := shared.peer.Command(t.Context(), shared.probe, "serve", network, ":80")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stops = append(stops, func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
	return func() {
		for _, s := range stops {
			s()
		}
		// nsenter is killed, and what it started with it or not: the port has to be free again.
		_, _ = shared.peer.Run("pkill", "-f", "serve (tcp|udp) :80")
	}
}

// route tells a machine of a way for the time of the test.
func route(t *testing.T, m *lab.Machine, subnet, via string) {
	t.Helper()
	if _, err := m.Run("ip", "route", "replace", subnet, "via", via); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = m.Run("ip", "route", "del", subnet) })
}
