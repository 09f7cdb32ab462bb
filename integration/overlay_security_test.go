package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// overlayPair is an overlay with a container that speaks, one beside it, and one on another host.
func overlayPair(t *testing.T, vsid int, name string) (hosts []*host, a, beside, other member) {
	t.Helper()
	_, hosts = onOverlay(t)
	container := func(h *host, name, network string) member {
		h.client(name, network)
		return member{h, name, h.address(name, network), h.address6(name, network), h.mac(name, network), h.in(name)}
	}
	hosts[0].overlay(name, vsid)
	hosts[1].overlay(name, vsid)
	a, beside, other = container(hosts[0], name+"-a", name), container(hosts[0], name+"-b", name), container(hosts[1], name+"-c", name)
	known(t, name, a, beside, other)
	return hosts, a, beside, other
}

// TestOverlayPortSecurity: a container cannot speak as somebody else, nor as a router, a DHCP server or
// a switch: not to another of its host, and not to one of another host.
func TestOverlayPortSecurity(t *testing.T) {
	_, a, beside, other := overlayPair(t, 5041, "forge")
	for _, to := range []member{beside, other} {
		s := speaker{
			mac: a.mac, v4: a.v4, v6: a.v6, toMAC: to.mac, to4: to.v4, to6: to.v6,
			gateway4: "198.18.90.1", gateway6: "fd00:90::1", foreign4: "198.18.90.99", foreign6: "fd00:90::99",
		}
		frames, want := marked(true, s.honest()...)
		forged, marks := marked(true, s.forged()...)
		const split = "router advertisement in fragments"
		frames = append(append(frames, forged...), s.split(split)...)
		marks = append(append(marks, split), want...)
		if to.host != a.host { // what is for all stays on the host
			want = without(want, "a flood.", "an ARP request.", "an ARP probe.", "gratuitous ARP for itself.", "neighbour advertisement for itself.")
		}
		seen := to.host.watchIn(to.name, "eth0", "the end")
		sendFrames(t, a.from, "eth0", frames...)
		sendFrames(t, a.from, "eth0", udp(to.mac, a.mac, a.v4, 7, to.v4, 7, "the end"))
		same(t, "to "+to.name+" on "+to.host.Name, seen.said(marks...), want)
	}
}

// TestOverlayFirewall: of unasked packets only certain protocols come in, from containers of this host
// and of another.
func TestOverlayFirewall(t *testing.T) {
	_, a, beside, other := overlayPair(t, 5042, "guard")
	for _, from := range []member{beside, other} {
		seen := a.host.watchIn(a.name, "eth0", "the end")
		sendFrames(t, from.from, "eth0", append(sweep(a.mac, from.mac, from.v4, a.v4), sweep(a.mac, from.mac, from.v6, a.v6)...)...)
		sendFrames(t, from.from, "eth0", udp(a.mac, from.mac, from.v4, 1, a.v4, 1, "the end"))
		all := seen.frames()
		same(t, from.name+" on "+from.host.Name+", IPv4", swept(all, a.v4), []byte{1, 2, 6, 17})
		same(t, from.name+" on "+from.host.Name+", IPv6", swept(all, a.v6), []byte{6, 17, 58})
	}
}

// TestOverlayForged: what is encapsulated is taken from peers only, and no process and no container can
// send it for its host.
func TestOverlayForged(t *testing.T) {
	hosts, a, _, other := overlayPair(t, 5043, "inner")
	u, err := theUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := shared.lab.Machine("stranger")
	if err != nil {
		t.Fatal(err)
	}
	const strangerIP = "198.18.80.99"
	if err := u.LAN.Plug(stranger, "eth0", strangerIP+"/24"); err != nil {
		t.Fatal(err)
	}
	hostMAC, strangerMAC := mac(t, hosts[0].Run, "eth0"), mac(t, stranger.Run, "eth0")
	header := "\x08\x00\x00\x00\x00\x13\xb3\x00" // VXLAN, identifier 5043 (RFC 7348, section 5)
	forged := func(from, mark string) []byte {
		inner := udp(a.mac, other.mac, other.v4, 7, a.v4, 7, mark)
		return udp(hostMAC, strangerMAC, from, 7, hosts[0].ip, vxlanPort, header+string(inner))
	}
	seen := a.host.watchIn(a.name, "eth0", "the end")
	sendFrames(t, on(stranger), "eth0",
		forged(strangerIP, "from a stranger"),
		forged(hosts[1].ip, "as a peer would")) // so the frame is right: only who sends it is not
	sendFrames(t, other.from, "eth0", udp(a.mac, other.mac, other.v4, 7, a.v4, 7, "the end"))
	same(t, "what is encapsulated", seen.said("from a stranger", "as a peer would"), []string{"as a peer would"})

	wire := hosts[0].Capture(t, "eth0")
	at := fmt.Sprintf("%s:%d", hosts[0].ip, vxlanPort)
	if out, err := hosts[1].Run(shared.probe, "-timeout", "300ms", "ask", "udp", at); err == nil || !strings.Contains(out+err.Error(), "not permitted") {
		t.Errorf("a process of a peer sends to the VXLAN port: %s, %v", out, err)
	}
	hosts[1].network("natted")
	hosts[1].client("natted-a", "natted")
	hosts[1].client("docker-a", "bridge")
	for _, container := range []string{"natted-a", "docker-a", other.name} {
		_, _ = hosts[1].in(container)("-timeout", "300ms", "ask", "udp", at)
	}
	reaches(t, "another port", hosts[1].in("natted-a"), "tcp", servingOn(t, hosts[0], ":88"), hosts[1].ip)
	wire.Never(t, lab.UDP().From(hosts[1].ip).ToPort(vxlanPort).Carrying("?"))
}

// servingOn has a host serve a port, and gives its address.
func servingOn(t *testing.T, h *host, port string) string {
	t.Helper()
	serving(t, h, port)
	return h.ip + port
}

// TestOverlayKeys: the gossip's key is changed on all hosts at once, and nothing is lost; who has another
// is not let in.
func TestOverlayKeys(t *testing.T) {
	_, hosts := onOverlay(t)
	keygen := func() string {
		t.Helper()
		out, err := hosts[0].Dockway("keygen")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	first, second, wrong := keygen(), keygen(), keygen()
	for _, h := range hosts {
		if err := h.SetPlugin("GOSSIP_KEY=" + first); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.SetPlugin("GOSSIP_KEY="); err != nil {
				t.Error(err)
			}
		})
	}
	together(t, hosts...)
	all := across(t, hosts[:2]...)
	pulse := hosts[0].pulse(all[0].name, hosts[1].spot(all[1].name), all[1].v4+":90")
	for _, step := range [][]string{{"add", second}, {"use", second}, {"remove", first}} {
		out, err := hosts[0].Dockway(append([]string{"key"}, step...)...)
		if err != nil || strings.Count(out, "done") != len(hosts) {
			t.Fatalf("dockway key %s: %v\n%s", step[0], err, out)
		}
		together(t, hosts...)
	}
	ended(t, "while the key was changed", pulse)
	hosts[1].server("later", "back")
	eventually(t, soon, "with the new key the hosts understand each other", func() bool {
		return hosts[0].overlays("back")[hosts[1].address("later", "back")] != ""
	})
	// The new key is on record, also where the setting is the old one.
	hosts[2].killPlugin()
	together(t, hosts...)

	if err := hosts[2].SetPlugin("GOSSIP_KEY=" + wrong); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts[:2] {
		eventually(t, 60*time.Second, h.Name+" does not let a host in that has another key", func() bool { return h.peers()[hosts[2].Name] != "alive" })
		eventually(t, 20*time.Second, h.Name+" tells of it", func() bool {
			out, err := h.Dockway("status")
			return err == nil && strings.Contains(out, "gossip refused")
		})
	}
	if states := hosts[2].peers(); states[hosts[0].Name] == "alive" {
		t.Errorf("the host with another key sees %v", states)
	}
}

// TestOverlayThousand: a thousand endpoints of one host, as the engine asks for them, are known to the
// others, and gone when they are gone.
func TestOverlayThousand(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, h := range hosts[:2] {
		h.network("many", "--subnet", "198.19.64.0/20", "-o", "mode=overlay", "-o", "vsid=5051")
	}
	const endpoints = 1000
	c, id := hosts[0].caller(), hosts[0].docker("network", "inspect", "-f", "{{.Id}}", "many")
	before := hosts[1].entries("5051")
	start := time.Now()
	for n := range endpoints {
		at := map[string]any{"NetworkID": id, "EndpointID": endpointID(n)}
		address := fmt.Sprintf("198.19.%d.%d/20", 64+n%16, 10+n/16)
		if err := c.call("NetworkDriver.CreateEndpoint", map[string]any{"NetworkID": id, "EndpointID": endpointID(n), "Interface": map[string]any{"Address": address}, "Options": map[string]any{}}); err != nil {
			t.Fatal(err)
		}
		at["SandboxKey"], at["Options"] = "/run/docker/netns/many", map[string]any{}
		if err := c.call("NetworkDriver.Join", at); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d endpoints in %s", endpoints, time.Since(start).Round(time.Millisecond))
	eventually(t, 20*time.Second, "the other host has them all in its kernel", func() bool { return hosts[1].entries("5051") == before+2*endpoints })
	for n := range endpoints {
		if err := c.call("NetworkDriver.DeleteEndpoint", map[string]any{"NetworkID": id, "EndpointID": endpointID(n)}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, "the other host has none left", func() bool { return hosts[1].entries("5051") == before })
}

// entries counts the permanent neighbour entries and those of the VXLAN device in a segment's namespace.
func (h *host) entries(vsid string) (count int) {
	h.t.Helper()
	out := h.must(fmt.Sprintf(`for n in /run/docker/plugins/dockway-netns/dwn*; do
		nsenter --net=$n sh -c 'test -e /sys/class/net/dwo%[1]s || ip link show dwo%[1]s >/dev/null 2>&1 || exit 0; ip neigh show dev dwb%[1]s nud permanent; bridge fdb show dev dwo%[1]s | grep dst'
	done | wc -l`, vsid))
	if _, err := fmt.Sscan(out, &count); err != nil {
		h.t.Fatalf("entries: %q", out)
	}
	return count
}
