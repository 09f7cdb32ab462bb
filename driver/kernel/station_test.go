package kernel_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// A lanHost is a host with an external switch, on a LAN that is the test's namespace.
type lanHost struct {
	*overlayHost
	uplink plan.Shortcut
}

const wiredSwitch = "dwxeth1"

// newLANHost makes it, with a switch and ports of containers that are not there yet.
func newLANHost(t *testing.T, containers int) *lanHost {
	t.Helper()
	inNamespace(t)
	here(t, "ip link add lan type bridge mcast_snooping 0", "ip link set lan addrgenmode none up")
	h := &lanHost{&overlayHost{place: newPlace(t)}, plan.Shortcut{Bridge: wiredSwitch, Link: "eth1"}}
	h.plugUplink(t)
	h.run(t, "ip link set lo up", "ip addr add 198.19.0.100/24 dev eth1")
	h.k = openIn(t, h.place, kernel.Config{})
	put(t, h.k, h.objects(containers)...)
	h.load(t, `table bridge census { counter frames { }
	chain prerouting { type filter hook prerouting priority -400; meta l4proto udp counter name frames; }
}`)
	return h
}

func (h *lanHost) plugUplink(t *testing.T) {
	t.Helper()
	here(t, "ip link add u0 type veth peer name eth1 address 02:90:00:00:00:64 netns "+h.path, "ip link set u0 master lan addrgenmode none up")
	h.run(t, "ip link set eth1 addrgenmode none up")
}

func (h *lanHost) load(t *testing.T, rules string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run(t, "nft -f "+file)
}

func (h *lanHost) objects(containers int) []plan.Object {
	all := []plan.Object{plan.Switch{Name: wiredSwitch, Alias: "dockway uplink=eth1", Uplink: "eth1", Up: true, Moved: true}, h.uplink}
	for i := range containers {
		v := veth(i+1, wiredSwitch)
		v.PeerMAC = innerMAC(i + 1)
		all = append(all, v, h.shortcut(i+1))
	}
	return all
}

func (h *lanHost) shortcut(n int) plan.Shortcut {
	return plan.Shortcut{Bridge: wiredSwitch, Link: fmt.Sprintf("dwv%d", n), MAC: innerMAC(n), Addresses: [3]netip.Addr{inner4(n), inner6(n)}}
}

// station makes a machine on the LAN; plugged into the host's switch, it is a virtual machine of the host.
func (h *lanHost) station(t *testing.T, n int) *place {
	t.Helper()
	s := newPlace(t)
	s.run(t, "ip link set lo up")
	h.plug(t, s, n, false)
	return s
}

func (h *lanHost) plug(t *testing.T, s *place, n int, into bool) {
	t.Helper()
	make := fmt.Sprintf("ip link add s%d type veth peer name eth0 address %s netns %s", n, innerMAC(n), s.path)
	if into {
		h.run(t, make, fmt.Sprintf("ip link set s%d master %s addrgenmode none up", n, wiredSwitch))
	} else {
		here(t, make, fmt.Sprintf("ip link set s%d master lan addrgenmode none up", n))
	}
	s.run(t, "ip link set eth0 addrgenmode none up", fmt.Sprintf("ip addr add %s/24 dev eth0", inner4(n)))
}

var udpForm = regexp.MustCompile(`packets (\d+)`)

// seen is how many frames of UDP the switch has seen since the last time.
func (h *lanHost) seen(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(udpForm.FindStringSubmatch(h.run(t, "nft reset counter bridge census frames"))[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// passes waits until what two say to each other goes past the switch, or goes by it.
func (h *lanHost) passes(t *testing.T, what string, from, to *place, address netip.Addr, past bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s: past the switch: %t", what, past), func() bool {
		h.seen(t)
		exchange(t, from, to, address)
		return (h.seen(t) == 0) == past
	})
}

// list is what is attached to the switch.
func (h *lanHost) list(t *testing.T) fastpath.State {
	t.Helper()
	file, err := os.Open(h.path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // read only
	path, err := fastpath.OpenSwitch(file, wiredSwitch)
	if err != nil {
		t.Fatal(err)
	}
	defer path.Close() //nolint:errcheck // nothing is written
	state, err := path.List()
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// TestStations: containers and whom the switch has heard on the wire reach each other past it, wherever
// these are, and go, for as long as somebody follows.
func TestStations(t *testing.T) {
	h := newLANHost(t, 2)
	holds(t, h.k, h.objects(2)...)
	if n := len(h.list(t).Ports); n != 0 {
		t.Errorf("%d ports are attached whose container's end is here", n)
	}
	a, b, s, other := h.container(t, 1), h.container(t, 2), h.station(t, 3), h.station(t, 4)
	both := func(what string, past bool) {
		t.Helper()
		h.passes(t, what+": to the wire", a, s, inner4(3), past)
		h.passes(t, what+": from the wire", s, a, inner4(1), past)
	}
	both("at first", true)
	h.passes(t, "beside", a, b, inner4(2), true)
	h.passes(t, "another", other, b, inner4(2), true)
	holds(t, h.k, h.objects(2)...)

	t.Log("the station becomes a virtual machine of the host, and says so")
	here(t, "ip link del s3")
	h.plug(t, s, 3, true)
	exchange(t, s, b, inner4(2))
	exchange(t, a, s, inner4(3))
	both("moved", false)
	if on := h.list(t).Remote[innerMAC(3)]; on != "" {
		t.Errorf("who has moved is still on %s", on)
	}
	h.passes(t, "another, meanwhile", a, other, inner4(4), true)
	h.run(t, "ip link del s3")
	h.plug(t, s, 3, false)
	exchange(t, s, b, inner4(2))
	both("moved back", true)

	t.Log("somebody on the LAN sends with the host's MAC, and the container's")
	for _, mac := range []string{"02:90:00:00:00:64", innerMAC(2).String()} {
		other.run(t, "ip link set eth0 address "+mac)
		_ = tryExchange(t, other, a, inner4(1), 50*time.Millisecond)
		exchange(t, a, h.place, netip.MustParseAddr("198.19.0.100"))
		exchange(t, b, a, inner4(1))
		if on := h.list(t).Remote[plan.MAC{2, 0x90, 0, 0, 0, 0x64}]; on != "" {
			t.Errorf("the host is on %s", on)
		}
	}
	if got := h.run(t, "bridge fdb show dev dwv2"); !strings.Contains(got, innerMAC(2).String()) {
		t.Errorf("who says on the LAN to be a container is believed: behind its port is %s", got)
	}
	exchange(t, h.place, b, inner4(2))
	other.run(t, "ip link set eth0 address "+innerMAC(4).String())

	t.Log("the uplink is taken out of the switch, and put back")
	h.run(t, "ip link set eth1 nomaster")
	eventually(t, "nobody is on the wire", func() bool { return len(h.list(t).Remote) == 0 })
	h.run(t, "ip link set eth1 master "+wiredSwitch)
	both("put back", true)

	t.Log("the switch forgets")
	h.run(t, "bridge fdb flush dev eth1 master")
	both("forgotten", true)
}

// TestStationsAfter: what follows ends with the process, and goes on with the next.
func TestStationsAfter(t *testing.T) {
	h := newLANHost(t, 2)
	a, b, s := h.container(t, 1), h.container(t, 2), h.station(t, 3)
	h.passes(t, "at first", a, s, inner4(3), true)
	h.passes(t, "at first, beside", a, b, inner4(2), true)
	if err := h.k.Close(); err != nil {
		t.Fatal(err)
	}
	h.passes(t, "with nobody who follows", a, s, inner4(3), false)
	h.passes(t, "from the wire, with nobody who follows", s, a, inner4(1), false)
	h.passes(t, "beside, with nobody who follows", a, b, inner4(2), true)

	h.k = openIn(t, h.place, kernel.Config{})
	if left := plan.Diff(observe(t, h.k, h.objects(2)...), plan.Of(h.objects(2)...)); len(left) != 1 || left[0].Object.Key() != h.uplink.Key() {
		t.Errorf("a new process is left to do %v", left)
	}
	if all := observeAll(t, h.k); all[h.shortcut(1).Key()] == nil || all[h.uplink.Key()] != nil {
		t.Errorf("all there is: %s", all)
	}
	put(t, h.k, h.objects(2)...)
	holds(t, h.k, h.objects(2)...)
	h.passes(t, "the next process", a, s, inner4(3), true)

	t.Log("the interface vanishes, and returns")
	here(t, "ip link del u0")
	if got := observe(t, h.k, h.uplink, h.shortcut(1)); got[h.uplink.Key()] != nil || got[h.shortcut(1).Key()] == nil {
		t.Errorf("without the interface, there is %s", got)
	}
	h.passes(t, "without the interface, beside", a, b, inner4(2), true)
	if err := h.k.Do(ctx(), plan.Diff(observe(t, h.k, h.objects(2)...), plan.Of(h.objects(2)...))); err == nil {
		t.Error("a switch is repaired without its interface")
	}
	do(t, h.k, add(h.uplink)...) // it went just now
	h.plugUplink(t)
	do(t, h.k, plan.Diff(observe(t, h.k, h.objects(2)...), plan.Of(h.objects(2)...))...)
	holds(t, h.k, h.objects(2)...)
	h.passes(t, "returned", a, s, inner4(3), true)

	t.Log("the switch vanishes, and is made anew")
	h.run(t, "ip link del "+wiredSwitch)
	eventually(t, "it is made", func() bool {
		return h.k.Do(ctx(), plan.Diff(observe(t, h.k, h.objects(2)...), plan.Of(h.objects(2)...))) == nil
	})
	h.passes(t, "made anew", a, s, inner4(3), true)
	h.passes(t, "made anew, beside", a, b, inner4(2), true)
	eventually(t, "the switch is told again who is behind its ports", func() bool {
		return strings.Contains(h.run(t, "bridge fdb show dev dwv1"), "sticky")
	})

	t.Log("more happens than a socket holds")
	var batch strings.Builder
	const many = 30000
	for i := range many {
		fmt.Fprintf(&batch, "fdb replace 02:91:00:%02x:%02x:%02x dev eth1 master dynamic\n", i>>16, i>>8&255, i&255)
	}
	file := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run(t, "bridge -batch "+file)
	eventually(t, "all are known", func() bool { return len(h.list(t).Remote) >= many })
	h.passes(t, "among many", a, s, inner4(3), true)

	do(t, h.k, remove(h.shortcut(1))...)
	h.passes(t, "without the port's", a, s, inner4(3), false)
	if got := h.run(t, "bridge fdb show dev dwv1"); strings.Contains(got, "sticky") {
		t.Errorf("what the switch was told of the port it has not forgotten: %s", got)
	}
	h.passes(t, "the other's", b, s, inner4(3), true)
	do(t, h.k, remove(h.uplink)...)
	h.passes(t, "without the uplink's", b, s, inner4(3), false)
	if got := h.list(t); len(got.Ports) != 1 || len(got.VXLAN)+len(got.Remote) > 0 {
		t.Errorf("without the uplink's, there is %+v", got)
	}
	do(t, h.k, plan.Diff(observeAll(t, h.k), nil)...)
	if left := observeAll(t, h.k); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
	do(t, h.k, remove(h.objects(2)...)...) // again is fine
}

// TestStationsBlocked: an uplink that the spanning tree, or somebody, keeps from forwarding is not gone by.
func TestStationsBlocked(t *testing.T) {
	h := newLANHost(t, 2)
	a, b, s := h.container(t, 1), h.container(t, 2), h.station(t, 3)
	h.passes(t, "at first", a, s, inner4(3), true)
	// They need not ask who has the address, which goes by the switch, and would be in vain.
	a.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent", inner4(3), innerMAC(3)))
	s.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent", inner4(1), innerMAC(1)))
	for state, name := range []string{"disabled", "listening", "learning"} { // blocking it is with STP only
		h.run(t, "bridge link set dev eth1 state "+strconv.Itoa(state))
		eventually(t, "nothing passes an uplink that is "+name, func() bool {
			return tryExchange(t, a, s, inner4(3), 50*time.Millisecond) != nil && tryExchange(t, s, a, inner4(1), 50*time.Millisecond) != nil
		})
		h.passes(t, "beside an uplink that is "+name, a, b, inner4(2), true)
		h.run(t, "bridge link set dev eth1 state 3")
		h.passes(t, "forwarding again", a, s, inner4(3), true)
	}

	t.Log("a process that starts finds it so")
	h.run(t, "bridge link set dev eth1 state 2")
	if err := h.k.Close(); err != nil {
		t.Fatal(err)
	}
	h.k = openIn(t, h.place, kernel.Config{})
	put(t, h.k, h.objects(2)...)
	for range 3 {
		if err := tryExchange(t, a, s, inner4(3), trustStep); err == nil {
			t.Error("a process that starts goes by an uplink that is blocked")
		}
	}
	h.run(t, "bridge link set dev eth1 state 3")
	h.passes(t, "forwarding at last", a, s, inner4(3), true)
}

const trustStep = time.Second // after which who is on the wire is confirmed

// TestSwitchGone: a switch leaves nothing at the uplink, also when another process made the way past it.
func TestSwitchGone(t *testing.T) {
	h := newLANHost(t, 1)
	a, s := h.container(t, 1), h.station(t, 2)
	h.passes(t, "at first", a, s, inner4(2), true)
	if n := h.programs(t, "eth1"); n != 1 {
		t.Errorf("at the uplink are %d programs", n)
	}
	if err := h.k.Close(); err != nil {
		t.Fatal(err)
	}
	h.k = openIn(t, h.place, kernel.Config{})
	do(t, h.k, plan.Diff(observeAll(t, h.k), nil)...)
	if left := observeAll(t, h.k); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
	if n := h.programs(t, "eth1"); n != 0 {
		t.Errorf("left at the uplink: %d programs", n)
	}
}

// programs counts those at the ingress of a link of the host.
func (h *lanHost) programs(t *testing.T, name string) (n int) {
	t.Helper()
	h.do(t, func() error {
		l, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		there, err := link.QueryPrograms(link.QueryOptions{Target: l.Index, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			n = len(there.Programs)
		}
		return err
	})
	return n
}
