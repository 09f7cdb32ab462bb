package integration

import (
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// The wire is a second LAN of the shared hosts, for the modes that take an uplink: both hosts, a
// machine outside, and a router to a machine on another LAN.
type wire struct {
	lan     *lab.LAN
	outside *lab.Machine
	router  *lab.Router
	far     *lab.Machine
}

// Its addresses. Containers of a host have a part of the subnet to themselves.
const (
	wire4, wire6                 = "198.18.64.0/24", "fd00:64::/64"
	wireGateway, wireGateway6    = "198.18.64.254", "fd00:64::fe"
	outside4, outside6           = "198.18.64.100", "fd00:64::100"
	far4, far6                   = "198.18.65.100", "fd00:65::100"
	farGateway, farGateway6      = "198.18.65.254", "fd00:65::fe"
	containerUplink, wireServing = "eth1", ":80"
	// Addresses of the outside machine that no container has reason to ask.
	unasked4, unasked6 = "198.18.64.101", "fd00:64::101"
	// A second subnet of the wire, for a second network.
	second4, secondGateway, secondOutside4 = "198.18.66.0/24", "198.18.66.254", "198.18.66.100"
)

var (
	wireHost4 = map[lab.Engine]string{lab.Debian: "198.18.64.1", lab.Moby: "198.18.64.2"}
	wireHost6 = map[lab.Engine]string{lab.Debian: "fd00:64::1", lab.Moby: "fd00:64::2"}
	wirePart4 = map[lab.Engine]string{lab.Debian: "198.18.64.16/28", lab.Moby: "198.18.64.32/28"}
	wirePart6 = map[lab.Engine]string{lab.Debian: "fd00:64::16:0/112", lab.Moby: "fd00:64::32:0/112"}
)

// theWire makes the wire once, for all tests that use it. Machines outside serve port 80.
var theWire = sync.OnceValues(func() (*wire, error) {
	w := &wire{}
	var err error
	if w.lan, err = shared.lab.LAN("wire"); err != nil {
		return nil, err
	}
	behind, err := shared.lab.LAN("behind")
	if err != nil {
		return nil, err
	}
	if w.router, err = shared.lab.Router("router"); err != nil {
		return nil, err
	}
	if err := w.router.Plug(w.lan, "eth0", wireGateway+"/24", wireGateway6+"/64"); err != nil {
		return nil, err
	}
	if err := w.router.Plug(behind, "eth1", farGateway+"/24", farGateway6+"/64"); err != nil {
		return nil, err
	}
	machine := func(name string, n *lab.LAN, address, address6, gateway, gateway6 string) (*lab.Machine, error) {
		m, err := shared.lab.Machine(name)
		if err != nil {
			return nil, err
		}
		if err := n.Plug(m, "eth0", address+"/24", address6+"/64"); err != nil {
			return nil, err
		}
		if _, err := m.Script(fmt.Sprintf("sysctl -qw net.ipv6.conf.eth0.accept_ra=0; ip route add default via %s; ip -6 route add default via %s", gateway, gateway6)); err != nil {
			return nil, err
		}
		for _, network := range []string{"tcp", "udp"} {
			if _, err := m.Start("", shared.probe, "serve", network, wireServing); err != nil {
				return nil, err
			}
		}
		return m, nil
	}
	if w.outside, err = machine("outside", w.lan, outside4, outside6, wireGateway, wireGateway6); err != nil {
		return nil, err
	}
	if _, err := w.outside.Run("ip", "address", "add", secondOutside4+"/24", "dev", "eth0"); err != nil {
		return nil, err
	}
	if _, err := w.outside.Run("ip", "address", "add", unasked4+"/24", "dev", "eth0"); err != nil {
		return nil, err
	}
	if w.far, err = machine("far", behind, far4, far6, farGateway, farGateway6); err != nil {
		return nil, err
	}
	for engine, h := range shared.hosts {
		if err := h.Plug(w.lan, containerUplink, wireHost4[engine]+"/24", wireHost6[engine]+"/64"); err != nil {
			return nil, err
		}
		if err := h.Plug(w.lan, "eth2"); err != nil { // for those who share no switch
			return nil, err
		}
		if _, err := h.Script(fmt.Sprintf("sysctl -qw net.ipv6.conf.eth1.accept_ra=0 net.ipv6.conf.eth2.accept_ra=0; ip route add 198.18.65.0/24 via %s; ip -6 route add fd00:65::/64 via %s", wireGateway, wireGateway6)); err != nil {
			return nil, err
		}
	}
	return w, nil
})

// onWire runs a test on the host of each engine, with the other host beside it, and compares what
// the host has on its uplink before and after.
func onWire(t *testing.T, test func(t *testing.T, w *wire, h, other *host)) {
	w, err := theWire()
	if err != nil {
		t.Fatal(err)
	}
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		t.Run(string(engine), func(t *testing.T) {
			h := onHost(t, shared.hosts[engine])
			var before, after string
			settled(t, "the uplink's addresses are checked", func() bool {
				before = h.uplink()
				return !strings.Contains(before, "tentative")
			})
			w.forget(t)
			t.Run("", func(t *testing.T) { // its cleanups come first
				other := map[lab.Engine]lab.Engine{lab.Debian: lab.Moby, lab.Moby: lab.Debian}[engine]
				test(t, w, onHost(t, shared.hosts[engine]), onHost(t, shared.hosts[other]))
			})
			settled(t, "the uplink is as it was", func() bool {
				after = h.uplink()
				return after == before
			})
			if t.Failed() {
				t.Logf("the uplink was\n%s\nand now is\n%s", before, after)
			}
		})
	}
}

// forget has everybody on the wire forget the neighbours: nobody knows a container of an earlier test
// any more, whose address is used again.
func (w *wire) forget(t *testing.T) {
	t.Helper()
	for _, m := range []*lab.Machine{w.outside, w.router.Machine, shared.hosts[lab.Debian].Machine, shared.hosts[lab.Moby].Machine} {
		if _, err := m.Run("ip", "neigh", "flush", "all"); err != nil {
			t.Fatal(err)
		}
	}
}

// passes fails the test unless the server is reached through the gateway, from one address to the other.
func (w *wire) passes(t *testing.T, what, from, to string, f from, address string) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		before, err := w.router.Forwarded(from, to)
		if err != nil {
			t.Fatal(err)
		}
		reaches(t, what, f, network, address, from)
		if after, err := w.router.Forwarded(from, to); err != nil || after <= before {
			t.Errorf("%s over %s does not pass the gateway: it forwarded %d packets before, %d after (%v)", what, network, before, after, err)
		}
	}
}

// settled fails the test unless something comes true soon.
func settled(t *testing.T, what string, is func() bool) {
	t.Helper()
	if err := lab.WaitFor(soon, what, func() (bool, error) { return is(), nil }); err != nil {
		t.Error(err)
	}
}

// uplink is what the host has on its uplink, but for anycast addresses, which come with forwarding.
func (h *host) uplink() string {
	h.t.Helper()
	out, err := h.Script("ip -o link show eth1 | sed 's/^[0-9]*: //; s/@[^:]*//; s/qdisc.*//; s/,UP,LOWER_UP//'; cat /sys/class/net/eth1/address; ip -o address show eth1 | sed 's/^[0-9]*: //'; ip route show table all dev eth1 | grep -v anycast | sort; ip -6 route show table all dev eth1 | grep -v anycast | sort; ip -o link show type bridge | grep dwx || true")
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// wired makes a network of a mode on the wire, with the host's part of its subnets.
func (h *host) wired(name, mode string, args ...string) {
	h.t.Helper()
	all := []string{"--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode=" + mode, "-o", "interface=" + containerUplink}
	if mode != "l2tunnel" {
		all = append(all, "--ipv6", "--subnet", wire6, "--gateway", wireGateway6, "--ip-range", wirePart6[h.Engine])
	}
	h.network(name, append(all, args...)...)
}

// mac is a container's MAC on a network.
func (h *host) mac(container, network string) string {
	h.t.Helper()
	return h.docker("inspect", "-f", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).MacAddress}}", network), container)
}

// each names both transports and both families of an endpoint's addresses.
func eachWay(v4, v6 string, try func(network, address, family string)) {
	for _, network := range []string{"tcp", "udp"} {
		try(network, v4+":80", "4")
		if v6 != "" {
			try(network, "["+v6+"]:80", "6")
		}
	}
}

// everybodyReaches tries who is on the wire with who: containers a and b of the host and c of the other,
// the hosts, and the machines outside. Nobody's address is translated.
func (w *wire) everybodyReaches(t *testing.T, h, other *host, network string) {
	t.Helper()
	h.serves()
	other.serves()
	type station struct {
		name   string
		from   from
		v4, v6 string
	}
	container := func(h *host, name, what string) station {
		return station{what, h.in(network + name), h.address(network+name, network), h.address6(network+name, network)}
	}
	a := container(h, "-a", "container")
	c := container(other, "-c", "other host's container")
	outside, far := station{"outside", on(w.outside), outside4, outside6}, station{"another subnet", on(w.far), far4, far6}
	reach := func(from, to station) {
		t.Helper()
		eachWay(to.v4, to.v6, func(proto, address, family string) {
			reaches(t, from.name+" to "+to.name, from.from, proto, address, map[string]string{"4": from.v4, "6": from.v6}[family])
		})
	}
	for _, from := range []station{
		outside, far, container(h, "-b", "container beside"), c,
		{"host", on(h.Machine), wireHost4[h.Engine], wireHost6[h.Engine]},
		{"other host", on(other.Machine), wireHost4[other.Engine], wireHost6[other.Engine]},
	} {
		reach(from, a)
	}
	for _, to := range []station{outside, far, c} {
		reach(a, to)
	}
	for what, to := range map[string]*host{"its host": h, "the other host": other} {
		for _, proto := range []string{"tcp", "udp"} {
			reaches(t, "container to "+what, a.from, proto, fmt.Sprintf("%s:%d", to.wire4, hostServing), a.v4)
			reaches(t, "container to "+what+", IPv6", a.from, proto, fmt.Sprintf("[%s]:%d", to.wire6, hostServing), a.v6)
		}
	}
}

// TestTransparent: containers are on the LAN as machines are.
func TestTransparent(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		h.wired("lan", "transparent")
		other.wired("lan", "transparent")
		h.server("lan-a", "lan")
		h.client("lan-b", "lan")
		other.server("lan-c", "lan")
		a, a6, mac := h.address("lan-a", "lan"), h.address6("lan-a", "lan"), h.mac("lan-a", "lan")
		seen, uplink := w.outside.Capture(t, "eth0"), h.Capture(t, containerUplink)
		w.everybodyReaches(t, h, other, "lan")
		if out := h.docker("exec", "lan-b", "ping", "-c1", "-W2", a); !strings.Contains(out, "ttl=64") {
			t.Errorf("the TTL between two containers was changed: %s", out)
		}
		for _, ip := range []string{a, a6} {
			seen.Saw(t, lab.TCP().From(ip).SourceMAC(mac))
			seen.Saw(t, lab.TCP().To(ip).DestinationMAC(mac))
			for _, c := range []*lab.Capture{seen, uplink} {
				c.Where(lab.Frames().From(ip)).AllFrames(t, "carries the container's MAC", lab.SourceMAC(mac))
			}
			uplink.Saw(t, lab.TCP().From(ip).Sent())
		}
		w.pastSwitch(t, h, a, mac)
		h.refused("port mapping is not supported on the given network", "run", "--rm", "--network", "lan", "-p", "8080:80", lab.Image, "true")
		h.refused("carries at most 1500", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", "198.19.90.0/24", "-o", "mode=transparent", "-o", "interface=eth1", "-o", "mtu=9000", "wrong")
		h.refused(`option interface="eth7"`, "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", "198.19.90.0/24", "-o", "mode=transparent", "-o", "interface=eth7", "wrong")
		h.refused(`option interface="lo"`, "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", "198.19.90.0/24", "-o", "mode=transparent", "-o", "interface=lo", "wrong")
	})
}

// pastSwitch checks that TCP of a container with the wire goes past the switch, also after the plugin was
// killed, and that a station that moves from the wire to a port of the switch, and back, is reached.
func (w *wire) pastSwitch(t *testing.T, h *host, a, mac string) {
	t.Helper()
	h.must(`nft -f - <<'E'
table bridge census {
	counter frames { }
	chain prerouting {
		type filter hook prerouting priority -400
		ether saddr ` + mac + ` meta l4proto tcp counter name frames
		ether daddr ` + mac + ` meta l4proto tcp counter name frames
	}
}
E`)
	defer h.must("nft delete table bridge census")
	past := func(what string, from from, target, seen string) {
		t.Helper()
		settled(t, what+": past the switch", func() bool {
			h.must("nft reset counter bridge census frames")
			reaches(t, what, from, "tcp", target+":80", seen)
			return strings.Contains(h.must("nft list counter bridge census frames"), "packets 0 ")
		})
	}
	past("outside to container", on(w.outside), a, outside4)
	past("container to outside", h.in("lan-a"), outside4, a)
	past("container to container", h.in("lan-b"), a, h.address("lan-b", "lan"))
	if err := h.KillPlugin(); err != nil {
		t.Fatal(err)
	}
	reaches(t, "outside to container while the plugin is dead", on(w.outside), "tcp", a+":80", outside4)
	reaches(t, "container to outside while the plugin is dead", h.in("lan-a"), "tcp", outside4+":80", a)
	past("outside to container after the plugin's death", on(w.outside), a, outside4)
	past("container to outside after the plugin's death", h.in("lan-a"), outside4, a)

	const roamer4 = "198.18.64.120"
	roamer, err := shared.lab.Machine("roamer-" + string(h.Engine))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.lan.Plug(roamer, "eth0", roamer4+"/24"); err != nil {
		t.Fatal(err)
	}
	serving, err := roamer.Start("", shared.probe, "serve", "tcp", wireServing)
	if err != nil {
		t.Fatal(err)
	}
	past("container to a station", h.in("lan-a"), roamer4, a)
	address, err := roamer.MAC("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.lan.Unplug(roamer, "eth0"); err != nil {
		t.Fatal(err)
	}
	// As when a virtual machine moves to this host.
	if out, err := exec.Command("nsenter", "-t", strconv.Itoa(h.PID()), "-n", "--", "ip", "link", "add", "vm0", "type", "veth",
		"peer", "name", "eth0", "address", address, "netns", strconv.Itoa(roamer.PID())).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	h.must("ip link set vm0 master " + externalSwitch + " up")
	if _, err := roamer.Script("ip link set eth0 up; ip address add " + roamer4 + "/24 dev eth0"); err != nil {
		t.Fatal(err)
	}
	reaches(t, "a station that has moved to the host to container", on(roamer), "tcp", a+":80", roamer4)
	reaches(t, "container to a station that has moved to the host", h.in("lan-a"), "tcp", roamer4+":80", a)
	h.must("ip link delete vm0")
	if err := w.lan.Plug(roamer, "eth0", roamer4+"/24"); err != nil {
		t.Fatal(err)
	}
	reaches(t, "a station that has moved back to container", on(roamer), "tcp", a+":80", roamer4)
	past("container to a station that has moved back", h.in("lan-a"), roamer4, a)
	if err := errors.Join(serving.Stop(), w.lan.Unplug(roamer, "eth0")); err != nil {
		t.Error(err)
	}
}

// TestL2Bridge: the wire sees the host's MAC, and the containers' addresses.
func TestL2Bridge(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		h.wired("pods", "l2bridge")
		other.wired("pods", "l2bridge")
		h.server("pods-a", "pods")
		h.server("pods-b", "pods")
		other.server("pods-c", "pods")
		a, a6, mac := h.address("pods-a", "pods"), h.address6("pods-a", "pods"), h.mac("pods-a", "pods")
		bMAC, cMAC := h.mac("pods-b", "pods"), other.mac("pods-c", "pods")
		hostMAC, err := h.MAC(containerUplink)
		if err != nil {
			t.Fatal(err)
		}
		seen, uplink := w.outside.Capture(t, "eth0"), h.Capture(t, containerUplink)
		inside := h.CaptureIn(t, "pods-b", "eth0")
		w.everybodyReaches(t, h, other, "pods")
		// The hosts find the containers of others, and are found: from everywhere, by the host's MAC.
		if out, err := w.outside.Run(shared.probe, "arp", "eth0", a); err != nil || out != hostMAC {
			t.Errorf("ARP for a container is answered with %q (%v), want the host's MAC %s", out, err, hostMAC)
		}
		if out, err := w.outside.Run(shared.probe, "nd", "eth0", a6); err != nil || out != hostMAC {
			t.Errorf("neighbour discovery for a container is answered with %q (%v), want the host's MAC %s", out, err, hostMAC)
		}
		for _, ip := range []string{a, a6} {
			seen.Saw(t, lab.TCP().From(ip).SourceMAC(hostMAC))
			seen.Saw(t, lab.TCP().To(ip).DestinationMAC(hostMAC))
			inside.Saw(t, lab.TCP().From(ip).SourceMAC(mac).DestinationMAC(bMAC))
		}
		seen.Saw(t, lab.ARPReply().SenderMAC(hostMAC).SourceMAC(hostMAC))
		seen.Saw(t, lab.NeighbourAdvertisement().LinkLayer(hostMAC).SourceMAC(hostMAC))
		seen.Saw(t, lab.NeighbourSolicitation().LinkLayer(hostMAC).SourceMAC(hostMAC))
		// Whoever it is for, the uplink carries nothing else: the outside machine hears only what it is sent.
		uplink.Saw(t, lab.TCP().From(a).To(far4).Sent())
		uplink.Saw(t, lab.TCP().From(far6).To(a6).Received())
		for _, hidden := range []string{mac, bMAC, cMAC} {
			seen.Never(t, lab.Mentions(hidden))
			uplink.Never(t, lab.Mentions(hidden))
		}
	})
}

// TestL2BridgePublishes: ports are published as in a nat network.
func TestL2BridgePublishes(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		h.wired("pub", "l2bridge")
		h.server("pub-a", "pub", "-p", "8080:80", "-p", "8080:80/udp")
		h.client("pub-b", "pub")
		h.network("pub-nat")
		h.client("pub-c", "pub-nat")
		a, a6 := h.address("pub-a", "pub"), h.address6("pub-a", "pub")
		b, b6 := h.address("pub-b", "pub"), h.address6("pub-b", "pub")
		saw := func(v4, v6, family string) string { return map[string]string{"4": v4, "6": v6}[family] }
		for _, network := range []string{"tcp", "udp"} {
			for family, address := range map[string]string{"4": wireHost4[h.Engine] + ":8080", "6": "[" + wireHost6[h.Engine] + "]:8080"} {
				reaches(t, "outside to published port", on(w.outside), network, address, saw(outside4, outside6, family))
				reaches(t, "another subnet to published port", on(w.far), network, address, saw(far4, far6, family))
				reaches(t, "host to its published port", on(h.Machine), network, address, "")
				reaches(t, "container to published port", h.in("pub-b"), network, address, "")
				reaches(t, "container to its own published port", h.in("pub-a"), network, address, "")
				reaches(t, "other host to published port", on(other.Machine), network, address, saw(wireHost4[other.Engine], wireHost6[other.Engine], family))
			}
			reaches(t, "LAN of the host's other link to published port", on(shared.peer), network, h.ip+":8080", "")
			reaches(t, "container of a nat network to published port", h.in("pub-c"), network, wireHost4[h.Engine]+":8080", "")
			reaches(t, "host to its published port on loopback", on(h.Machine), network, "127.0.0.1:8080", "")
		}
		// Nobody is told of the container itself on the way: its MAC stays hidden.
		seen := w.outside.Capture(t, "eth0")
		// Its own address still works, though the host routes what belongs to a published port.
		eachWay(a, a6, func(network, address, family string) {
			reaches(t, "outside to the container's own address", on(w.outside), network, address, saw(outside4, outside6, family))
			reaches(t, "another subnet to the container's own address", on(w.far), network, address, saw(far4, far6, family))
			reaches(t, "container to the container's own address", h.in("pub-b"), network, address, saw(b, b6, family))
			reaches(t, "host to the container's own address", on(h.Machine), network, address, "")
		})
		seen.Never(t, lab.Mentions(h.mac("pub-a", "pub")))
		h.docker("rm", "-f", "pub-a")
		barred(t, "released port", on(w.outside), "tcp", wireHost4[h.Engine]+":8080")
	})
}

// TestL2Tunnel: everything goes out to the gateway and comes back.
func TestL2Tunnel(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		h.wired("tenant", "l2tunnel")
		other.wired("tenant", "l2tunnel")
		h.server("tenant-a", "tenant", "-p", "8081:80")
		h.server("tenant-b", "tenant")
		other.server("tenant-c", "tenant")
		a, b, c := h.address("tenant-a", "tenant"), h.address("tenant-b", "tenant"), other.address("tenant-c", "tenant")
		mac := h.mac("tenant-a", "tenant")
		gateway, err := w.router.MAC("eth0")
		if err != nil {
			t.Fatal(err)
		}
		seen := w.router.Capture(t, "eth0")
		w.passes(t, "container to container of the same host", b, a, h.in("tenant-b"), a+":80")
		w.passes(t, "container to container of another host", a, c, h.in("tenant-a"), c+":80")
		w.passes(t, "host to its container", wireHost4[h.Engine], a, on(h.Machine), a+":80")
		h.serves()
		hostServed := fmt.Sprintf("%s:%d", h.wire4, hostServing)
		w.passes(t, "container to its host", a, h.wire4, h.in("tenant-a"), hostServed)
		w.passes(t, "container to another subnet", a, far4, h.in("tenant-a"), far4+":80")
		w.passes(t, "container to the LAN", a, outside4, h.in("tenant-a"), outside4+":80")
		reaches(t, "another subnet to container", on(w.far), "tcp", a+":80", far4)
		reaches(t, "LAN to container", on(w.outside), "tcp", a+":80", outside4)
		reaches(t, "outside to published port", on(w.outside), "tcp", wireHost4[h.Engine]+":8081", "")
		reaches(t, "host to published port", on(h.Machine), "tcp", "127.0.0.1:8081", "")
		for _, neighbour := range []string{b, c, wireHost4[h.Engine], outside4, wireGateway, "198.18.64.99"} {
			if out, err := h.Docker("exec", "tenant-a", "/probe", "arp", "eth0", neighbour); err != nil || out != gateway {
				t.Errorf("ARP for %s is answered with %q (%v), want the gateway's MAC %s", neighbour, out, err, gateway)
			}
		}
		seen.Never(t, lab.Mentions(mac))

		drop, err := w.router.Drop(fmt.Sprintf("ip saddr %s ip daddr %s", b, a))
		if err != nil {
			t.Fatal(err)
		}
		barred(t, "container to container, against the gateway's rule", h.in("tenant-b"), "tcp", a+":80")
		if n, err := drop.Dropped(); err != nil || n == 0 {
			t.Errorf("the gateway has dropped %d packets (%v)", n, err)
		}
		reaches(t, "the other way, which the rule allows but for the answers", h.in("tenant-a"), "udp", c+":80", a)
		if err := drop.Remove(); err != nil {
			t.Fatal(err)
		}
		reaches(t, "container to container, without the rule", h.in("tenant-b"), "tcp", a+":80", b)

		if err := w.router.Die(); err != nil {
			t.Fatal(err)
		}
		barred(t, "container to container, gateway dead", h.in("tenant-b"), "tcp", a+":80")
		barred(t, "host to container, gateway dead", on(h.Machine), "tcp", a+":80")
		barred(t, "container to its host, gateway dead", h.in("tenant-b"), "tcp", hostServed)
		barred(t, "container to the LAN, gateway dead", h.in("tenant-b"), "tcp", outside4+":80")
		barred(t, "container to another subnet, gateway dead", h.in("tenant-b"), "tcp", far4+":80")
		barred(t, "container to another host's container, gateway dead", h.in("tenant-b"), "tcp", c+":80")
		barred(t, "LAN to container, gateway dead", on(w.outside), "tcp", a+":80")
		if err := w.router.Revive(); err != nil {
			t.Fatal(err)
		}
		reaches(t, "container to container, gateway back", h.in("tenant-b"), "tcp", a+":80", b)
	})
}

// TestL2TunnelWithoutAddress: an uplink on which the host has no address.
func TestL2TunnelWithoutAddress(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		h.wired("spare", "l2tunnel", "-o", "interface=eth2")
		h.server("spare-a", "spare")
		h.server("spare-b", "spare")
		a, b := h.address("spare-a", "spare"), h.address("spare-b", "spare")
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "container to container", h.in("spare-b"), network, a+":80", b)
			reaches(t, "outside to container", on(w.outside), network, a+":80", outside4)
			reaches(t, "container to another subnet", h.in("spare-a"), network, far4+":80", a)
		}
	})
}

// The VLAN that machines outside are in, and its addresses.
const (
	vlanID, vlan4, vlanGateway = 20, "198.18.68.0/24", "198.18.68.254"
	vlanOutside4               = "198.18.68.100"
	vlan6, vlanOutside6        = "fd00:68::/64", "fd00:68::100"
	vlanGateway6               = "fd00:68::fe"
)

// TestVLAN: frames leave with the tag, and only those with it come in.
func TestVLAN(t *testing.T) {
	for _, mode := range []string{"transparent", "l2bridge"} {
		t.Run(mode, func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire, h, other *host) {
				trunk, err := w.lan.VLAN(w.outside, "eth0", vlanID, vlanOutside4+"/24", vlanOutside6+"/64")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := trunk.Stop(); err != nil {
						t.Error(err)
					}
				})
				create := func(h *host, name string, id int, subnet, gateway, part string, more ...string) {
					h.network(name, append([]string{"--subnet", subnet, "--gateway", gateway, "--ip-range", part, "-o", "mode=" + mode, "-o", "interface=" + containerUplink, "-o", fmt.Sprint("vlan=", id)}, more...)...)
				}
				create(h, "tagged", vlanID, vlan4, vlanGateway, "198.18.68.16/28", "--ipv6", "--subnet", vlan6, "--ip-range", "fd00:68::16:0/112")
				create(other, "tagged", vlanID, vlan4, vlanGateway, "198.18.68.32/28", "--ipv6", "--subnet", vlan6, "--ip-range", "fd00:68::32:0/112")
				create(h, "tagged21", 21, "198.18.69.0/24", "198.18.69.254", "198.18.69.16/28")
				h.wired("untagged", mode)
				h.server("tagged-a", "tagged")
				other.server("tagged-b", "tagged")
				h.server("tagged21-a", "tagged21")
				h.server("untagged-a", "untagged")
				a, b := h.address("tagged-a", "tagged"), other.address("tagged-b", "tagged")
				a6, b6 := h.address6("tagged-a", "tagged"), other.address6("tagged-b", "tagged")
				a21, plain := h.address("tagged21-a", "tagged21"), h.address("untagged-a", "untagged")

				seen := w.outside.Capture(t, "eth0")
				for _, network := range []string{"tcp", "udp"} {
					reaches(t, "outside in the VLAN to container", on(w.outside), network, a+":80", vlanOutside4)
					reaches(t, "container to outside in the VLAN", h.in("tagged-a"), network, vlanOutside4+":80", a)
					reaches(t, "container to other host's container in the VLAN", h.in("tagged-a"), network, b+":80", a)
					reaches(t, "other host's container to container in the VLAN", other.in("tagged-b"), network, a+":80", b)
					reaches(t, "outside in the VLAN to container, IPv6", on(w.outside), network, "["+a6+"]:80", vlanOutside6)
					reaches(t, "container to outside in the VLAN, IPv6", h.in("tagged-a"), network, "["+vlanOutside6+"]:80", a6)
					reaches(t, "container to other host's container in the VLAN, IPv6", h.in("tagged-a"), network, "["+b6+"]:80", a6)
					reaches(t, "outside to untagged container", on(w.outside), network, plain+":80", outside4)
					reaches(t, "host to outside, untagged", on(h.Machine), network, outside4+":80", wireHost4[h.Engine])
				}
				seen.Saw(t, lab.TCP().From(a).VLAN(vlanID))
				seen.Saw(t, lab.TCP().From(a6).VLAN(vlanID))
				seen.Saw(t, lab.TCP().From(plain).Untagged())
				for _, ip := range []string{a, a6} {
					seen.Where(lab.Frames().From(ip)).AllFrames(t, "carries the tag", lab.Frames().VLAN(vlanID))
				}
				if mode == "l2bridge" { // in neighbour discovery too
					seen.Never(t, lab.Mentions(h.mac("tagged-a", "tagged")))
				}
				seen.Where(lab.Frames().From(plain)).AllFrames(t, "carries no tag", lab.Frames().Untagged())

				// Somebody in one VLAN with addresses of another: nobody answers.
				foreign := func(container, address, target string) {
					t.Helper()
					h.docker("run", "--rm", "--cap-add", "NET_ADMIN", "--network", "container:"+container, lab.Image, "ip", "address", "add", address, "dev", "eth0")
					if out, err := h.Docker("exec", container, "/probe", "-timeout", "700ms", "arp", "eth0", target); err == nil {
						t.Errorf("%s finds %s of another VLAN: %s", container, target, out)
					}
				}
				foreign("tagged21-a", "198.18.68.77/24", a)
				foreign("untagged-a", "198.18.68.78/24", a)
				foreign("tagged-a", "198.18.69.77/24", a21)
				// The host is not in the VLAN: it answers there for none of its addresses.
				if out, err := h.Docker("exec", "tagged-a", "/probe", "-timeout", "700ms", "arp", "eth0", wireHost4[h.Engine]); err == nil {
					t.Errorf("a container finds its host in VLAN %d: %s", vlanID, out)
				}
				if out, err := w.outside.Run(shared.probe, "-timeout", "700ms", "arp", "eth0.20", wireHost4[h.Engine]); err == nil {
					t.Errorf("VLAN %d finds the host: %s", vlanID, out)
				}
				if out, err := w.outside.Run(shared.probe, "-timeout", "700ms", "arp", "eth0", a); err == nil {
					t.Errorf("the untagged LAN finds a container of VLAN %d: %s", vlanID, out)
				}
				h.refused("not a VLAN identifier", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "-o", "mode="+mode, "-o", "interface=eth1", "-o", "vlan=4095", "wrong")
			})
		})
	}
}

// TestMacvlan: containers are on the LAN without a switch, and the host with a link of its own.
func TestMacvlan(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		h.wired("direct", "transparent", "-o", "backend=macvlan", "-o", "host_access=true")
		h.server("direct-a", "direct")
		h.client("direct-b", "direct")
		a, a6, mac := h.address("direct-a", "direct"), h.address6("direct-a", "direct"), h.mac("direct-a", "direct")
		b, b6 := h.address("direct-b", "direct"), h.address6("direct-b", "direct")
		saw := func(v4, v6, family string) string { return map[string]string{"4": v4, "6": v6}[family] }
		if out, err := h.Run("ip", "address", "show", containerUplink); err != nil || !strings.Contains(out, wireHost4[h.Engine]) {
			t.Errorf("the host's address has left its uplink: %s %v", out, err)
		}
		seen := w.outside.Capture(t, "eth0")
		eachWay(a, a6, func(network, address, family string) {
			reaches(t, "outside to container", on(w.outside), network, address, saw(outside4, outside6, family))
			reaches(t, "another subnet to container", on(w.far), network, address, saw(far4, far6, family))
			reaches(t, "container to container", h.in("direct-b"), network, address, saw(b, b6, family))
			reaches(t, "host to its container", on(h.Machine), network, address, "")
		})
		eachWay(outside4, outside6, func(network, address, family string) {
			reaches(t, "container to outside", h.in("direct-a"), network, address, saw(a, a6, family))
		})
		for _, ip := range []string{a, a6} {
			seen.Saw(t, lab.TCP().From(ip).SourceMAC(mac))
		}
		serving, err := h.Start("", shared.probe, "serve", "tcp", ":81")
		if err != nil {
			t.Fatal(err)
		}
		reaches(t, "container to its host", h.in("direct-a"), "tcp", wireHost4[h.Engine]+":81", a)
		if err := serving.Stop(); err != nil {
			t.Error(err)
		}
		// The plugin's repair leaves links alone that are in containers.
		h.killPlugin()
		reaches(t, "outside to container after the plugin's restart", on(w.outside), "tcp", a+":80", outside4)
		if out, err := h.Run("ip", "-o", "link", "show", "type", "macvlan"); err != nil || strings.Count(out, "\n") > 0 || !strings.Contains(out, "dwm") {
			t.Errorf("the host has more links than its own: %s %v", out, err)
		}
		h.refused("needs a switch", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", "198.19.91.0/24", "-o", "mode=transparent", "-o", "interface=eth1", "-o", "backend=macvlan", "-o", "disable_icc=true", "wrong")
		h.refused("port mapping is not supported", "run", "--rm", "--network", "direct", "-p", "8080:80", lab.Image, "true")
	})
}
