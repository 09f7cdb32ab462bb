package integration

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// Subnets of overlays in the tests, and the UDP port of VXLAN.
const (
	over4, over6 = "198.18.90.0/24", "fd00:90::/64"
	next4, next6 = "198.18.91.0/24", "fd00:91::/64"
	vxlanPort    = 14789
)

// overlay makes an overlay network of both families.
func (h *host) overlay(name string, vsid int, args ...string) {
	h.t.Helper()
	h.network(name, append([]string{"--subnet", over4, "--ipv6", "--subnet", over6, "-o", "mode=overlay", "-o", fmt.Sprintf("vsid=%d", vsid)}, args...)...)
}

// overlays is what dockway shows of an overlay network.
func (h *host) overlays(name string) (addresses map[string]string) {
	h.t.Helper()
	out, err := h.Dockway("overlay", name, "--json")
	if err != nil {
		h.t.Fatal(err)
	}
	var all []struct {
		Entries []struct {
			Address, MAC, Host string
			Here               bool
		}
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 {
		h.t.Fatalf("dockway overlay %s --json: %s", name, out)
	}
	addresses = map[string]string{}
	for _, e := range all[0].Entries {
		if e.Here {
			e.Host = h.Name
		}
		addresses[e.Address] = e.Host + " " + e.MAC
	}
	return addresses
}

// peers are the other hosts by their state.
func (h *host) peers() map[string]string {
	h.t.Helper()
	out, err := h.Dockway("peers", "--json")
	if err != nil {
		return nil
	}
	var all []struct {
		Name, State string
		Self        bool
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		h.t.Fatalf("dockway peers --json: %s", out)
	}
	states := map[string]string{}
	for _, p := range all {
		if !p.Self && states[p.Name] != "alive" { // one that is dead may have had the name
			states[p.Name] = p.State
		}
	}
	return states
}

// eventually fails the test unless something comes true within a time.
func eventually(t *testing.T, limit time.Duration, what string, is func() bool) {
	t.Helper()
	if err := lab.WaitFor(limit, what, func() (bool, error) { return is(), nil }); err != nil {
		t.Error(err)
	}
}

// together waits until all hosts see each other alive.
func together(t *testing.T, hosts ...*host) {
	t.Helper()
	for _, h := range hosts {
		eventually(t, 40*time.Second, h.Name+" sees the other hosts", func() bool {
			states := h.peers()
			for _, other := range hosts {
				if other != h && states[other.Name] != "alive" {
					return false
				}
			}
			return true
		})
	}
}

// onOverlay gives the hosts of the underlay, which see each other.
func onOverlay(t *testing.T) (*lab.Underlay, []*host) {
	t.Helper()
	u, hosts := onUnderlay(t)
	together(t, hosts...)
	return u, hosts
}

// member is a container of an overlay.
type member struct {
	host        *host
	name        string
	v4, v6, mac string
	from        from
}

// members starts a server on each host.
func members(t *testing.T, network string, hosts ...*host) []member {
	t.Helper()
	var out []member
	for i, h := range hosts {
		name := fmt.Sprintf("%s-%d", network, i)
		h.server(name, network)
		out = append(out, member{h, name, h.address(name, network), h.address6(name, network), h.mac(name, network), h.in(name)})
	}
	return out
}

// known waits until all hosts have told each other about the containers.
func known(t *testing.T, network string, all ...member) {
	t.Helper()
	for _, h := range all {
		eventually(t, soon, h.host.Name+" knows every container of "+network, func() bool {
			is := h.host.overlays(network)
			for _, m := range all {
				if is[m.v4] != m.host.Name+" "+m.mac || m.v6 != "" && is[m.v6] != m.host.Name+" "+m.mac {
					return false
				}
			}
			return true
		})
	}
}

// across makes the overlay network back on each host, with a server that all know.
func across(t *testing.T, hosts ...*host) []member {
	t.Helper()
	for _, h := range hosts {
		h.overlay("back", 5001)
	}
	all := members(t, "back", hosts...)
	known(t, "back", all...)
	return all
}

// everyPair has each reach each other, with its own address.
func everyPair(t *testing.T, all []member) {
	t.Helper()
	for _, a := range all {
		for _, b := range all {
			if a.name == b.name && a.host == b.host {
				continue
			}
			eachWay(b.v4, b.v6, func(proto, address, family string) {
				reaches(t, fmt.Sprintf("%s on %s to %s on %s", a.name, a.host.Name, b.name, b.host.Name), a.from, proto, address, map[string]string{"4": a.v4, "6": a.v6}[family])
			})
		}
	}
}

// serving has a host serve a port, over both transports.
func serving(t *testing.T, h *host, port string) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		p, err := h.Start("", shared.probe, "serve", network, port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Stop() })
	}
}

// TestOverlay: containers of three hosts are on one network. What the wire sees is VXLAN with the
// network's identifier and nothing that is flooded, and nothing of what stays on a host.
func TestOverlay(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, h := range hosts {
		h.overlay("back", 5001)
	}
	all := members(t, "back", hosts...)
	hosts[0].client("beside", "back")
	beside := member{hosts[0], "beside", hosts[0].address("beside", "back"), hosts[0].address6("beside", "back"), hosts[0].mac("beside", "back"), hosts[0].in("beside")}
	known(t, "back", append(slices.Clone(all), beside)...)

	wire := hosts[0].Capture(t, "eth0")
	everyPair(t, all)
	for _, m := range all[1:] {
		wire.Saw(t, lab.Encapsulated(vxlanPort).From(hosts[0].ip).To(m.host.ip).VNI(5001).Inside(lab.UDP().From(all[0].v4).To(m.v4).SourceMAC(all[0].mac).DestinationMAC(m.mac)))
		wire.Saw(t, lab.Encapsulated(vxlanPort).From(m.host.ip).To(hosts[0].ip).VNI(5001).Inside(lab.TCP().From(m.v6).To(all[0].v6)))
	}
	wire.Never(t, lab.Encapsulated(vxlanPort).Inside(lab.Group()))
	wire.Never(t, lab.Encapsulated(vxlanPort).Inside(lab.ARP()))
	wire.Never(t, lab.Encapsulated(vxlanPort).Inside(lab.NeighbourSolicitation()))
	wire.Never(t, lab.Encapsulated(vxlanPort).ChecksumMissing())

	wire.Forget()
	eachWay(all[0].v4, all[0].v6, func(proto, address, family string) {
		reaches(t, "on the same host", beside.from, proto, address, map[string]string{"4": beside.v4, "6": beside.v6}[family])
	})
	// Two hosts talk to each other only when somebody there does.
	wire.Never(t, lab.Encapsulated(vxlanPort))
	if mtu := hosts[0].docker("exec", "beside", "cat", "/sys/class/net/eth0/mtu"); mtu != "1450" {
		t.Errorf("the MTU in the container is %s, want 1450", mtu)
	}
	// An address that nobody has is asked for on this host only.
	_, _ = beside.from("-timeout", "500ms", "ask", "tcp", "198.18.90.250:80")
	wire.Never(t, lab.Encapsulated(vxlanPort))

	for _, h := range hosts {
		if out, err := h.Dockway("peers"); err != nil || strings.Count(out, "alive") != 3 {
			t.Errorf("dockway peers: %v\n%s", err, out)
		}
	}
	// Who is gone is gone everywhere.
	hosts[1].docker("rm", "-f", all[1].name)
	for _, h := range hosts {
		eventually(t, soon, h.Name+" knows that the container is gone", func() bool { return h.overlays("back")[all[1].v4] == "" })
	}
	// And comes back on another host with the same address.
	hosts[2].server("moved", "back", "--ip", all[1].v4)
	moved := member{hosts[2], "moved", all[1].v4, "", hosts[2].mac("moved", "back"), hosts[2].in("moved")}
	if moved.mac == all[1].mac {
		t.Errorf("on another host the address has the same MAC, %s", moved.mac)
	}
	for _, m := range []member{all[0], all[2]} {
		eventually(t, soon, m.host.Name+" knows where the address has gone", func() bool {
			return m.host.overlays("back")[moved.v4] == "under-3 "+moved.mac
		})
		reaches(t, "the address that moved", m.from, "tcp", moved.v4+":80", m.v4)
	}
}

// TestOverlayOutside: without a gateway of its own an overlay leaves by the engine's, which publishes
// ports; an internal one does not leave.
func TestOverlayOutside(t *testing.T) {
	_, hosts := onOverlay(t)
	a, b := hosts[0], hosts[1]
	serving(t, b, ":85")
	a.overlay("back", 5001)
	a.overlay("inner", 5002, "--internal")
	a.server("leaves", "back", "-p", "8085:80")
	a.client("stays", "inner")
	reaches(t, "the outside", a.in("leaves"), "tcp", b.ip+":85", a.ip)
	reaches(t, "a published port", on(b.Machine), "tcp", a.ip+":8085", "")
	barred(t, "the outside from an internal network", a.in("stays"), "tcp", b.ip+":85")
	// A container's address is not to be reached from outside of the network.
	for _, m := range []*host{a, b} {
		if out, err := m.Script("ip route get " + a.address("leaves", "back")); err == nil && !strings.Contains(out, "via") {
			t.Errorf("%s has a way to a container: %s", m.Name, out)
		}
	}
}

// TestOverlayNAT: a network with outbound_nat leads outside itself, with the host's address, but for the
// exceptions, and publishes nothing.
func TestOverlayNAT(t *testing.T) {
	_, hosts := onOverlay(t)
	a, b := hosts[0], hosts[2]
	serving(t, b, ":86")
	// A second address of the other host, which is an exception, and the way back from it.
	b.must("ip address add 198.18.81.1/32 dev lo; ip route add 198.18.90.0/24 via " + a.ip)
	a.must("ip route add 198.18.81.1/32 via " + b.ip)
	t.Cleanup(func() {
		b.must("ip address del 198.18.81.1/32 dev lo; ip route del 198.18.90.0/24")
		a.must("ip route del 198.18.81.1/32")
	})
	for _, h := range hosts[:2] {
		h.overlay("out", 5003, "-o", "outbound_nat=true", "-o", "outbound_nat_exceptions=198.18.81.0/24")
	}
	all := members(t, "out", hosts[:2]...)
	known(t, "out", all...)
	everyPair(t, all)
	reaches(t, "the outside", all[0].from, "tcp", b.ip+":86", a.ip)
	reaches(t, "the outside", all[0].from, "udp", b.ip+":86", a.ip)
	reaches(t, "the outside (6)", all[0].from, "tcp", "["+lab.UnderlayAddress6(2)+"]:86", lab.UnderlayAddress6(0))
	reaches(t, "an exception", all[0].from, "tcp", "198.18.81.1:86", all[0].v4)
	barred(t, "from outside", on(b.Machine), "tcp", all[0].v4+":80")
	if links := a.docker("exec", all[0].name, "ls", "/sys/class/net"); strings.Contains(links, "eth1") {
		t.Errorf("the container has a link to the engine's gateway network: %s", links)
	}
	a.refused("port mapping is not supported on the given network", "run", "--rm", "--network", "out", "-p", "8086:80", lab.Image, "true")
}

// TestOverlayTenants: two networks have the same subnet, and the same addresses, and do not meet.
func TestOverlayTenants(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, tenant := range []struct {
		name string
		vsid int
	}{{"red", 5011}, {"blue", 5012}} {
		for i, h := range hosts[:2] {
			h.overlay(tenant.name, tenant.vsid, "-o", "network_name="+tenant.name)
			h.start(fmt.Sprintf("%s-%d", tenant.name, i), tenant.name, []string{"--ip", fmt.Sprintf("198.18.90.%d", 200+i)}, "sh", "-c", "/probe serve tcp :80")
		}
	}
	wire := hosts[0].Capture(t, "eth0")
	for vsid, tenant := range map[int]string{5011: "red", 5012: "blue"} {
		eventually(t, soon, "the hosts know "+tenant, func() bool { return hosts[0].overlays(tenant)["198.18.90.201"] != "" })
		wire.Forget()
		reaches(t, tenant, hosts[0].in(tenant+"-0"), "tcp", "198.18.90.201:80", "198.18.90.200")
		wire.Saw(t, lab.Encapsulated(vxlanPort).VNI(vsid))
		wire.AllFrames(t, "of the tenant's own network", lab.Either(lab.Not(lab.Encapsulated(vxlanPort)), lab.Encapsulated(vxlanPort).VNI(vsid)))
	}
	hosts[1].docker("rm", "-f", "blue-1")
	eventually(t, soon, "it is gone", func() bool { return hosts[0].overlays("blue")["198.18.90.201"] == "" })
	barred(t, "the other tenant's container with the address", hosts[0].in("blue-0"), "tcp", "198.18.90.201:80")
	reaches(t, "its own", hosts[0].in("red-0"), "tcp", "198.18.90.201:80", "198.18.90.200")
	hosts[0].refused("VXLAN identifier 5011 is that of network red", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", next4, "-o", "mode=overlay", "-o", "vsid=5011", "third")
}

// TestOverlaySubnets: several subnets of a network have a segment each, and a gateway on every host
// between them.
func TestOverlaySubnets(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, h := range hosts[:2] {
		h.network("two", "--subnet", over4, "--subnet", next4, "--ipv6", "--subnet", over6, "--subnet", next6, "-o", "mode=overlay", "-o", "vsid=5021,5022", "--internal")
	}
	var all []member
	for i, h := range hosts[:2] {
		for j, subnet := range []string{"90", "91"} {
			name := fmt.Sprintf("two-%d%d", i, j)
			h.server(name, "two", "--ip", fmt.Sprintf("198.18.%s.%d", subnet, 100+i), "--ip6", fmt.Sprintf("fd00:%s::%x", subnet, 0x100+i))
			all = append(all, member{h, name, h.address(name, "two"), h.address6(name, "two"), h.mac(name, "two"), h.in(name)})
		}
	}
	known(t, "two", all...)
	wire := hosts[0].Capture(t, "eth0")
	everyPair(t, all)
	wire.Saw(t, lab.Encapsulated(vxlanPort).VNI(5022).Inside(lab.TCP().From(all[0].v4).To(all[3].v4)))
	wire.Never(t, lab.Encapsulated(vxlanPort).Inside(lab.Group()))
}

// TestOverlayICC: with disable_icc containers of a network do not reach each other, on the same host,
// on others, and through the gateway.
func TestOverlayICC(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, h := range hosts[:2] {
		h.overlay("apart", 5031, "-o", "disable_icc=true", "-o", "outbound_nat=true")
	}
	all := members(t, "apart", hosts[:2]...)
	hosts[0].client("apart-beside", "apart")
	known(t, "apart", all...)
	serving(t, hosts[1], ":87")
	reaches(t, "the outside", all[0].from, "tcp", hosts[1].ip+":87", "")
	barred(t, "another host's container", all[1].from, "tcp", all[0].v4+":80")
	barred(t, "the same host's container", hosts[0].in("apart-beside"), "tcp", all[0].v4+":80")
	barred(t, "the same host's container (6)", hosts[0].in("apart-beside"), "tcp", "["+all[0].v6+"]:80")
}

// TestOverlaySurvives: nothing is lost while plugins are killed, upgraded, and told other settings.
func TestOverlaySurvives(t *testing.T) {
	_, hosts := onOverlay(t)
	all := across(t, hosts[:2]...)
	pulse := hosts[0].pulse(all[0].name, hosts[1].spot(all[1].name), all[1].v4+":90")
	hosts[0].killPlugin()
	hosts[1].killPlugin()
	for _, h := range hosts[:2] {
		if err := h.SetPlugin("LOG_LEVEL=debug"); err != nil { // disables and enables it
			t.Fatal(err)
		}
	}
	together(t, hosts...)
	known(t, "back", all...)
	ended(t, "while plugins were killed and disabled", pulse)
	everyPair(t, all)

	// What others take away is put back.
	netns := "nsenter --net=" + strings.TrimSpace(hosts[0].must("ls -d /run/docker/plugins/dockway-netns/dwn* | head -1"))
	for _, harm := range []string{
		netns + " sh -c 'bridge fdb del " + all[1].mac + " dev dwo5001 self; bridge fdb del " + all[1].mac + " dev dwo5001 master'",
		netns + " ip neigh flush all nud permanent",
		netns + " ip link del dwo5001",
		netns + " nft flush ruleset",
		"nft delete table inet dockway",
	} {
		hosts[0].must(harm)
		reaches(t, "after "+harm, all[0].from, "tcp", all[1].v4+":80", all[0].v4)
	}
}

// TestOverlayPartition: a host that is cut off keeps what it knows, and loses nothing but what was sent
// meanwhile. What changed on both sides is known to all after the cut has healed.
func TestOverlayPartition(t *testing.T) {
	u, hosts := onOverlay(t)
	all := across(t, hosts...)
	pulse := hosts[0].pulse(all[0].name, hosts[1].spot(all[1].name), all[1].v4+":90")
	steady := hosts[1].pulse(all[1].name, hosts[2].spot(all[2].name), all[2].v4+":91")
	cut := lab.Span{From: time.Now()}
	p, err := u.Part(u.Machines(0), u.Machines(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts[1:] {
		eventually(t, 60*time.Second, h.Name+" finds the host dead", func() bool { return h.peers()[hosts[0].Name] == "dead" })
	}
	hosts[0].server("late-0", "back")
	hosts[1].server("late-1", "back")
	const claimed = "198.18.90.99" // on both sides
	hosts[0].client("twice-0", "back", "--ip", claimed)
	hosts[1].client("twice-1", "back", "--ip", claimed)
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
	healed := time.Now()
	together(t, hosts...)
	late := []member{
		{hosts[0], "late-0", hosts[0].address("late-0", "back"), "", hosts[0].mac("late-0", "back"), hosts[0].in("late-0")},
		{hosts[1], "late-1", hosts[1].address("late-1", "back"), "", hosts[1].mac("late-1", "back"), hosts[1].in("late-1")},
	}
	known(t, "back", append(slices.Clone(all), late...)...)
	t.Logf("known to all %s after the cut healed", time.Since(healed).Round(100*time.Millisecond))
	cut.To = time.Now()
	winner := ""
	for _, h := range hosts {
		eventually(t, 20*time.Second, h.Name+" tells of the address that two hosts claim", func() bool {
			out, err := h.Dockway("status")
			return err == nil && strings.Contains(out, claimed+"/32 is claimed by hosts under-")
		})
		eventually(t, 20*time.Second, h.Name+" gives it to the same host as all", func() bool {
			who := strings.Fields(h.overlays("back")[claimed] + " nobody")[0]
			if winner == "" {
				winner = who
			}
			return who == winner
		})
	}
	for i, h := range hosts[:2] {
		h.docker("rm", "-f", fmt.Sprintf("twice-%d", i))
	}
	reaches(t, "what came in the cut", late[0].from, "tcp", late[1].v4+":80", late[0].v4)
	reaches(t, "and back", late[1].from, "tcp", late[0].v4+":80", late[1].v4)
	if r := ended(t, "across the cut", pulse, cut); r.LostIn(cut) == 0 {
		t.Error("nothing was lost in the cut")
	}
	ended(t, "beside the cut", steady)
}

// TestOverlayOverIPv6: the hosts may reach each other over IPv6, and VXLAN may have another port.
func TestOverlayOverIPv6(t *testing.T) {
	_, hosts := onOverlay(t)
	const port = 14790
	set := func(settings func(i int) []string) {
		for i, h := range hosts {
			if err := h.SetPlugin(settings(i)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	set(func(i int) []string {
		return []string{"ADVERTISE=" + lab.UnderlayAddress6(i), "JOIN=" + lab.UnderlayAddress6(0) + "," + lab.UnderlayAddress6(1), fmt.Sprintf("VXLAN_PORT=%d", port)}
	})
	t.Cleanup(func() {
		set(func(int) []string {
			return []string{"ADVERTISE=eth0", "JOIN=" + lab.UnderlayAddress(0) + "," + lab.UnderlayAddress(1), fmt.Sprintf("VXLAN_PORT=%d", vxlanPort)}
		})
	})
	together(t, hosts...)
	for _, h := range hosts {
		h.overlay("six", 5061)
	}
	all := members(t, "six", hosts...)
	known(t, "six", all...)
	wire := hosts[0].Capture(t, "eth0")
	everyPair(t, all)
	wire.Saw(t, lab.Encapsulated(port).From(lab.UnderlayAddress6(0)).To(lab.UnderlayAddress6(1)).VNI(5061).Inside(lab.TCP().From(all[0].v4).To(all[1].v4)))
	wire.Never(t, lab.Encapsulated(vxlanPort))
	if mtu := hosts[0].docker("exec", all[0].name, "cat", "/sys/class/net/eth0/mtu"); mtu != "1430" {
		t.Errorf("the MTU in the container is %s, want 1430", mtu)
	}
}

// TestOverlayHostDies: a host that loses its power is found dead, and its containers are forgotten;
// when it is back, so are they.
func TestOverlayHostDies(t *testing.T) {
	_, hosts := onOverlay(t)
	all := across(t, hosts...)
	last := hosts[2]
	last.PowerOff()
	for _, h := range hosts[:2] {
		eventually(t, 60*time.Second, h.Name+" finds the host dead", func() bool { return h.peers()[last.Name] == "dead" })
		eventually(t, soon, h.Name+" forgets its containers", func() bool { return h.overlays("back")[all[2].v4] == "" })
	}
	if err := last.PowerOn(); err != nil {
		t.Fatal(err)
	}
	if err := last.WaitPlugin(""); err != nil {
		t.Fatal(err)
	}
	together(t, hosts...)
	last.docker("start", all[2].name)
	all[2].v4, all[2].v6, all[2].mac = last.address(all[2].name, "back"), last.address6(all[2].name, "back"), last.mac(all[2].name, "back")
	known(t, "back", all...)
	everyPair(t, all)
}

// TestOverlayAddresses: three hosts that give addresses at the same time never give one twice, and one
// that is taken elsewhere is refused.
func TestOverlayAddresses(t *testing.T) {
	_, hosts := onOverlay(t)
	for _, h := range hosts {
		h.overlay("back", 5001)
	}
	var mu sync.Mutex
	holders := map[string][]string{}
	var wg sync.WaitGroup
	for _, h := range hosts {
		wg.Go(func() {
			for i := range 12 {
				name := fmt.Sprintf("many-%d", i)
				out, err := h.Docker("create", "--name", name, "--network", "back", lab.Image, "sleep", "1000")
				if err == nil {
					out, err = h.Docker("start", name)
				}
				if err != nil {
					t.Errorf("%s on %s: %v: %s", name, h.Name, err, out)
					return
				}
				address, _ := h.Docker("inspect", "-f", `{{(index .NetworkSettings.Networks "back").IPAddress}}`, name)
				mu.Lock()
				holders[address] = append(holders[address], h.Name+" "+name)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, h := range hosts {
		for i := range 12 {
			t.Cleanup(func() { _, _ = h.Docker("rm", "-f", fmt.Sprintf("many-%d", i)) })
		}
	}
	for address, who := range holders {
		if len(who) != 1 || address == "" {
			t.Errorf("address %q was given to %v", address, who)
		}
	}
	taken := hosts[1].address("many-0", "back")
	hosts[0].refused(taken, "run", "--rm", "--network", "back", "--ip", taken, lab.Image, "true")
}

// setting gives a host's plugin other settings, and until the test's end only.
func (h *host) setting(change, back []string) {
	h.t.Helper()
	h.t.Cleanup(func() {
		if err := h.SetPlugin(back...); err != nil {
			h.t.Error(err)
		}
	})
	if err := h.SetPlugin(change...); err != nil {
		h.t.Fatal(err)
	}
}

// says waits until dockway status has words in it, or has none of them any more.
func (h *host) says(within time.Duration, has bool, words ...string) {
	h.t.Helper()
	var out string
	eventually(h.t, within, fmt.Sprintf("%s to tell (%t) %q", h.Name, has, words), func() bool {
		out, _ = h.Dockway("status")
		return out != "" && !slices.ContainsFunc(words, func(w string) bool { return strings.Contains(out, w) != has })
	})
	if h.t.Failed() {
		h.t.Logf("%s: dockway status:\n%s", h.Name, out)
	}
}

// TestOverlaySameName: all hosts tell of a name that two have; both keep their containers, and when one
// has another name all is as it was: it keeps its part of the subnet, and nothing of its former name stays.
func TestOverlaySameName(t *testing.T) {
	_, hosts := onOverlay(t)
	all := across(t, hosts...)
	pulse := hosts[0].pulse(all[0].name, hosts[2].spot(all[2].name), all[2].v4+":90")
	name, twin := "NODE_NAME="+hosts[2].Name, hosts[1].Name
	hosts[2].setting([]string{"NODE_NAME=" + twin}, []string{name})
	for _, h := range hosts {
		h.says(20*time.Second, true, "several hosts of the cluster have one name, one of them "+twin+"/", "at "+hosts[1].ip+": set NODE_NAME", "at "+hosts[2].ip+": set NODE_NAME")
		if out, err := h.Dockway("peers"); err != nil || strings.Count(out, twin+"/") != 2 {
			t.Errorf("%s: dockway peers does not tell them apart: %v\n%s", h.Name, err, out)
		}
	}
	if err := hosts[2].SetPlugin(name); err != nil {
		t.Fatal(err)
	}
	together(t, hosts...)
	for _, h := range hosts {
		h.says(30*time.Second, false, "one name", "is claimed by")
		eventually(t, 30*time.Second, h.Name+" forgets the former name", func() bool {
			out, err := h.Dockway("peers")
			return err == nil && strings.Count(out, twin) == 1
		})
	}
	known(t, "back", all...)
	ended(t, "while a host had another's name", pulse)
	everyPair(t, all)
	hosts[2].server("later", "back")
	if was, is := netip.MustParseAddr(all[2].v4), hosts[2].address("later", "back"); is != was.Next().String() {
		t.Errorf("after %s the host gives %s: it has lost its part of the subnet", was, is)
	}
}

// TestOverlayOtherCluster: hosts with another label are not let in, and both sides tell. A host that finds
// the others by name comes in again; a name that does not resolve is told, until it does.
func TestOverlayOtherCluster(t *testing.T) {
	_, hosts := onOverlay(t)
	last := hosts[2]
	was := []string{"CLUSTER=dockway", "JOIN=" + lab.UnderlayAddress(0) + "," + lab.UnderlayAddress(1)}
	last.setting([]string{"CLUSTER=another"}, was)
	for _, h := range hosts[:2] {
		h.says(20*time.Second, true, "times: wrong label")
		if log := h.Log(300); !strings.Contains(log, "gossip: refused (wrong label)") {
			t.Errorf("the log of %s says nothing of it", h.Name)
		}
		eventually(t, 30*time.Second, h.Name+" does not see the host of another cluster", func() bool { return h.peers()[last.Name] != "alive" })
	}
	last.says(20*time.Second, true, "no other host of the cluster has been reached yet")
	if states := last.peers(); len(states) > 0 {
		t.Errorf("the host of another cluster sees %v", states)
	}

	last.must("cp /etc/hosts /run/hosts; echo " + hosts[0].ip + " first.example >>/etc/hosts")
	t.Cleanup(func() { last.must("cat /run/hosts >/etc/hosts") })
	if err := last.SetPlugin("CLUSTER=dockway", "JOIN=first.example,second.example:7947"); err != nil {
		t.Fatal(err)
	}
	together(t, hosts...)
	last.says(20*time.Second, true, "second.example:7947 in JOIN does not resolve (lookup second.example")
	last.must("echo " + hosts[1].ip + " second.example >>/etc/hosts")
	last.says(40*time.Second, false, "does not resolve")
}

// TestOverlaySettings: what cannot be is refused with what to do.
func TestOverlaySettings(t *testing.T) {
	_, hosts := onOverlay(t)
	create := func(args ...string) []string {
		return append(append([]string{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", over4, "-o", "mode=overlay"}, args...), "never")
	}
	hosts[0].refused("give -o vsid=5001", create()...)
	hosts[0].refused("from 4096 to 16777214", create("-o", "vsid=7")...)
	hosts[0].refused("does not encrypt", create("-o", "vsid=5001", "-o", "encrypted=true")...)
	hosts[0].refused("a frame of the network can carry 1450", create("-o", "vsid=5001", "-o", "mtu=1500")...)
	eachEngine(t, func(t *testing.T, h *host) {
		h.refused("set JOIN to the addresses of its hosts", create("-o", "vsid=5001")...)
	})

	// A plugin that cannot work with its settings is not enabled. The engine says only that, after it has
	// waited 10 s for the end of what has ended; its log has the reason.
	h := onHost(t, shared.hosts[lab.Moby])
	h.docker("plugin", "disable", "-f", lab.Plugin)
	h.docker("plugin", "set", lab.Plugin, "JOIN=198.18.80.300")
	h.refused("dockway.sock", "plugin", "enable", lab.Plugin)
	if log := h.Log(30); !strings.Contains(log, "198.18.80.300") || !strings.Contains(log, "is no seed: give an address or a name of a host") {
		t.Errorf("the engine's log:\n%s", log)
	}
	h.docker("plugin", "set", lab.Plugin, "JOIN=")
	eventually(t, 60*time.Second, "with settings that can be, the plugin is enabled", func() bool {
		_, _ = h.Docker("plugin", "disable", "-f", lab.Plugin)
		_, err := h.Docker("plugin", "enable", lab.Plugin)
		return err == nil && h.WaitPlugin("") == nil
	})
}
