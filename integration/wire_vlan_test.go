package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// trunked puts the outside machine and the router into the VLAN.
func (w *wire) trunked(t *testing.T) {
	t.Helper()
	for m, address := range map[*lab.Machine]string{w.router.Machine: vlanGateway, w.outside: vlanOutside4} {
		trunk, err := w.lan.VLAN(m, "eth0", vlanID, address+"/24")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := trunk.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// routed leads the host into the VLAN, where it is not itself, by the router.
func (h *host) routed() {
	h.t.Helper()
	h.must("ip route add " + vlan4 + " via " + wireGateway)
	h.t.Cleanup(func() { h.must("ip route delete " + vlan4 + " via " + wireGateway) })
}

// tagged makes a network in the VLAN, with the host's part of its subnet.
func (h *host) tagged(name, mode string, args ...string) {
	h.t.Helper()
	part := map[lab.Engine]string{lab.Debian: "198.18.68.16/28", lab.Moby: "198.18.68.32/28"}[h.Engine]
	h.network(name, append([]string{"--subnet", vlan4, "--gateway", vlanGateway, "--ip-range", part,
		"-o", "mode=" + mode, "-o", "interface=" + containerUplink, "-o", fmt.Sprint("vlan=", vlanID)}, args...)...)
}

// TestVLANTunnel: in a VLAN too everything goes out to the gateway, which is the VLAN's, and comes back.
func TestVLANTunnel(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		w.trunked(t)
		seen := w.outside.Capture(t, "eth0")
		h.tagged("vtenant", "l2tunnel")
		other.tagged("vtenant", "l2tunnel")
		h.routed()
		h.server("vtenant-a", "vtenant", "-p", "8090:80", "-p", "8090:80/udp")
		h.server("vtenant-b", "vtenant")
		other.server("vtenant-c", "vtenant")
		a, b, c := h.address("vtenant-a", "vtenant"), h.address("vtenant-b", "vtenant"), other.address("vtenant-c", "vtenant")
		gateway, err := w.router.MAC("eth0.20")
		if err != nil {
			t.Fatal(err)
		}
		w.passes(t, "container to container of the same host", b, a, h.in("vtenant-b"), a+":80")
		w.passes(t, "container to container of another host", a, c, h.in("vtenant-a"), c+":80")
		w.passes(t, "container to the VLAN", a, vlanOutside4, h.in("vtenant-a"), vlanOutside4+":80")
		w.passes(t, "container to another subnet", a, far4, h.in("vtenant-a"), far4+":80")
		w.passes(t, "host to its container", h.wire4, a, on(h.Machine), a+":80")
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "outside in the VLAN to container", on(w.outside), network, a+":80", vlanOutside4)
			reaches(t, "outside to published port", on(w.outside), network, h.wire4+":8090", "")
			reaches(t, "host to published port", on(h.Machine), network, "127.0.0.1:8090", "")
		}
		for _, neighbour := range []string{b, c, vlanOutside4, vlanGateway, "198.18.68.99"} {
			if out, err := h.Docker("exec", "vtenant-a", "/probe", "arp", "eth0", neighbour); err != nil || out != gateway {
				t.Errorf("ARP for %s is answered with %q (%v), want the gateway's MAC %s", neighbour, out, err, gateway)
			}
		}
		seen.Saw(t, lab.TCP().From(a).VLAN(vlanID))
		seen.Never(t, lab.Mentions(h.mac("vtenant-a", "vtenant")))
		// The host, which is not in the VLAN, looks for the gateway all the same, but tells no address of its own.
		seen.Saw(t, lab.ARPRequest().VLAN(vlanID).From("0.0.0.0").To(vlanGateway))
		seen.Never(t, lab.ARP().VLAN(vlanID).From(h.wire4))
		seen.Never(t, lab.ARP().VLAN(vlanID).From(h.ip))

		drop, err := w.router.Drop(fmt.Sprintf("ip saddr %s ip daddr %s", b, a))
		if err != nil {
			t.Fatal(err)
		}
		barred(t, "container to container, against the gateway's rule", h.in("vtenant-b"), "tcp", a+":80")
		if err := drop.Remove(); err != nil {
			t.Fatal(err)
		}
		h.killPlugin()
		reaches(t, "container to container, after the plugin's restart", h.in("vtenant-b"), "tcp", a+":80", b)

		// A gateway that is another machine now, which says so.
		const another = "02:64:00:00:00:fe"
		if err := w.router.SetMAC("eth0.20", another); err != nil {
			t.Fatal(err)
		}
		sendFrames(t, on(w.router.Machine), "eth0.20", arp("ff:ff:ff:ff:ff:ff", another, 1, another, vlanGateway, vlanGateway, ""))
		reaches(t, "container to container, by the gateway's other MAC", h.in("vtenant-b"), "tcp", a+":80", b)
		h.refused("port mapping is not supported on the given network for SCTP", "run", "--rm", "--network", "vtenant", "-p", "8091:80/sctp", lab.Image, "true")
	})
}

// TestVLANMacvlan: macvlan links of a VLAN, alone on the uplink and beside a switch.
func TestVLANMacvlan(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		w.trunked(t)
		h.tagged("vdirect", "transparent", "-o", "backend=macvlan")
		h.routed()
		h.server("vdirect-a", "vdirect")
		h.client("vdirect-b", "vdirect")
		a, b, mac := h.address("vdirect-a", "vdirect"), h.address("vdirect-b", "vdirect"), h.mac("vdirect-a", "vdirect")
		seen := w.outside.Capture(t, "eth0")
		works := func(what string) {
			t.Helper()
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, what+": outside in the VLAN to container", on(w.outside), network, a+":80", vlanOutside4)
				reaches(t, what+": container to outside in the VLAN", h.in("vdirect-b"), network, vlanOutside4+":80", b)
				reaches(t, what+": container to container", h.in("vdirect-b"), network, a+":80", b)
				reaches(t, what+": container to another subnet", h.in("vdirect-b"), network, far4+":80", b)
				reaches(t, what+": host to its container, by the router", on(h.Machine), network, a+":80", h.wire4)
				reaches(t, what+": host to outside, untagged", on(h.Machine), network, outside4+":80", h.wire4)
			}
		}
		works("alone")
		if out := h.must("ip address show " + containerUplink); !strings.Contains(out, h.wire4) {
			t.Errorf("the host's address has left its uplink: %s", out)
		}
		seen.Saw(t, lab.TCP().From(a).SourceMAC(mac).VLAN(vlanID))
		seen.Where(lab.Frames().SourceMAC(mac)).AllFrames(t, "carries the tag", lab.Frames().VLAN(vlanID))
		if out, err := w.outside.Run(shared.probe, "-timeout", "700ms", "arp", "eth0", a); err == nil {
			t.Errorf("the untagged LAN finds a container of VLAN %d: %s", vlanID, out)
		}
		for from, place := range map[string]from{"a container": h.in("vdirect-a"), "the VLAN": on(w.outside)} {
			link := map[string]string{"a container": "eth0", "the VLAN": "eth0.20"}[from]
			if out, err := place("-timeout", "700ms", "arp", link, h.wire4); err == nil {
				t.Errorf("%s finds the host in VLAN %d: %s", from, vlanID, out)
			}
		}
		h.wired("vbeside", "transparent")
		h.server("vbeside-a", "vbeside")
		plain := h.address("vbeside-a", "vbeside")
		works("beside a switch")
		reaches(t, "untagged container", on(w.outside), "tcp", plain+":80", outside4)
		h.killPlugin()
		works("after the plugin's restart")
		h.docker("rm", "-f", "vbeside-a")
		h.docker("network", "rm", "vbeside")
		works("without the switch")
		h.refused("port mapping is not supported", "run", "--rm", "--network", "vdirect", "-p", "8092:80", lab.Image, "true")

		// Who wants the host in the VLAN can have it there.
		h.docker("rm", "-f", "vdirect-a", "vdirect-b")
		h.docker("network", "rm", "vdirect")
		w.forget(t)
		h.tagged("vshim", "transparent", "-o", "backend=macvlan", "-o", "host_access=true")
		h.server("vshim-a", "vshim")
		a = h.address("vshim-a", "vshim")
		before, err := w.router.Forwarded(h.wire4, a)
		if err != nil {
			t.Fatal(err)
		}
		reaches(t, "host to its container, by its own link", on(h.Machine), "tcp", a+":80", h.wire4)
		if after, err := w.router.Forwarded(h.wire4, a); err != nil || after != before {
			t.Errorf("the router forwarded %d packets from the host to its container (%v)", after-before, err)
		}
		if out, err := w.outside.Run(shared.probe, "arp", "eth0.20", h.wire4); err != nil {
			t.Errorf("the VLAN does not find the host: %s %v", out, err)
		}
	})
}

// TestVLANPublishes: the host is not in the VLAN, so it relays published ports by way of the router.
func TestVLANPublishes(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, other *host) {
		w.trunked(t)
		h.tagged("vpub", "l2bridge")
		h.routed()
		h.server("vpub-a", "vpub", "-p", "8093:80", "-p", "8093:80/udp")
		h.client("vpub-b", "vpub")
		a, b := h.address("vpub-a", "vpub"), h.address("vpub-b", "vpub")
		works := func(what string) {
			t.Helper()
			for _, network := range []string{"tcp", "udp"} {
				for _, address := range []string{h.wire4 + ":8093", "[" + h.wire6 + "]:8093"} {
					reaches(t, what+": outside to published port", on(w.outside), network, address, h.wire4)
					reaches(t, what+": another subnet to published port", on(w.far), network, address, h.wire4)
					reaches(t, what+": host to its published port", on(h.Machine), network, address, "")
					reaches(t, what+": other host to published port", on(other.Machine), network, address, h.wire4)
				}
				reaches(t, what+": container to published port", h.in("vpub-b"), network, h.wire4+":8093", h.wire4)
				reaches(t, what+": container to its own published port", h.in("vpub-a"), network, h.wire4+":8093", h.wire4)
				reaches(t, what+": host to its published port on loopback", on(h.Machine), network, "127.0.0.1:8093", "")
				// Nothing of it is routed by the host as in an untagged network.
				reaches(t, what+": outside in the VLAN to the container's own address", on(w.outside), network, a+":80", vlanOutside4)
				reaches(t, what+": container to the container's own address", h.in("vpub-b"), network, a+":80", b)
			}
		}
		works("at first")
		h.killPlugin()
		works("after the plugin's restart")
		h.refused("port mapping is not supported on the given network for SCTP", "run", "--rm", "--network", "vpub", "-p", "8094:80/sctp", lab.Image, "true")
		h.docker("rm", "-f", "vpub-a")
		barred(t, "released port", on(w.outside), "tcp", h.wire4+":8093")
	})
}
