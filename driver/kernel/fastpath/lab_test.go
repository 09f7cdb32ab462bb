package fastpath_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// A place is a network namespace: a host, an overlay's namespace on it, or a container.
type place struct {
	path string
	work chan func()
}

// newPlace makes a namespace, which ends with the test.
func newPlace(t testing.TB) *place {
	t.Helper()
	p := &place{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		p.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range p.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("these tests need root: network namespace: %v", err)
	}
	t.Cleanup(func() { close(p.work) })
	return p
}

// do calls f in the place.
func (p *place) do(t testing.TB, f func() error) {
	t.Helper()
	result := make(chan error)
	p.work <- func() { result <- f() }
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

// run runs commands in the place, one a line.
func (p *place) run(t testing.TB, commands string) string {
	t.Helper()
	var out []byte
	p.do(t, func() (err error) {
		if out, err = exec.Command("sh", "-ec", commands).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", commands, err, out)
		}
		return nil
	})
	return string(out)
}

// An opener is Open, or stands in for it.
type opener func(*os.File, string) (*fastpath.Path, error)

// open opens the fast path of the host's bridge.
func (h *host) open(t testing.TB, how opener) *fastpath.Path {
	t.Helper()
	file, err := os.Open(h.over.path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	path, err := how(file, "dwb1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = path.Close() })
	return path
}

// A host of a lab has an overlay's namespace with a bridge, a VXLAN device and containers.
type host struct {
	n          int
	under      *place // the host's own network: eth0 is its end of the wire
	over       *place // the overlay's namespace
	containers []*place
}

// The addresses of the lab: those of a host's wire, and of a container of an overlay.
func wire(host int) string { return fmt.Sprintf("198.18.0.%d", host+1) }
func mac(host, i int) plan.MAC {
	return plan.MAC{2, 0x64, 0x77, 0, byte(host), byte(i + 2)}
}
func ip4(host, i int) string { return fmt.Sprintf("198.19.%d.%d", host, i+2) }
func ip6(host, i int) string { return fmt.Sprintf("fd00:90::%d:%d", host, i+2) }

// twoHosts makes two hosts, joined by a veth pair, each with so many containers.
func twoHosts(t testing.TB, containers int) [2]*host { return twoHostsAt(t, containers, 4790) }

// twoHostsAt is twoHosts with another UDP port of VXLAN.
func twoHostsAt(t testing.TB, containers, port int) [2]*host {
	t.Helper()
	var hosts [2]*host
	for n := range hosts {
		hosts[n] = &host{n: n, under: newPlace(t), over: newPlace(t)}
		for range containers {
			hosts[n].containers = append(hosts[n].containers, newPlace(t))
		}
	}
	hosts[0].under.run(t, "ip link add eth0 type veth peer name eth0 netns "+hosts[1].under.path)
	for n, h := range hosts {
		h.under.run(t, fmt.Sprintf("ip link set eth0 up; ip link set lo up; ip addr add %s/24 dev eth0", wire(n)))
		h.under.run(t, fmt.Sprintf("ip link add dwx1 netns %s type vxlan id 5001 local %s dev eth0 dstport %d nolearning udpcsum", h.over.path, wire(n), port))
		h.over.run(t, `ip link add dwb1 type bridge
ip link set dwb1 addrgenmode none up
ip link set dwx1 mtu 1450 master dwb1 addrgenmode none up
bridge link set dev dwx1 learning off flood off neigh_suppress on`)
		for i, c := range h.containers {
			h.over.run(t, fmt.Sprintf("ip link add dwv%d mtu 1450 type veth peer name eth0 address %s mtu 1450 netns %s\n", i, mac(n, i), c.path)+
				fmt.Sprintf("ip link set dwv%[1]d master dwb1 addrgenmode none up; bridge link set dev dwv%[1]d learning off\n", i)+
				fmt.Sprintf("bridge fdb replace %s dev dwv%d master static", mac(n, i), i))
			c.run(t, fmt.Sprintf(`sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
ip link set lo up; ip link set eth0 addrgenmode none up
ip addr add %s/16 dev eth0; ip addr add %s/64 dev eth0 nodad`, ip4(n, i), ip6(n, i)))
		}
	}
	for n, h := range hosts {
		for i := range h.containers {
			far := hosts[1-n]
			far.over.run(t, fmt.Sprintf("bridge fdb replace %[1]s dev dwx1 master static; bridge fdb replace %[1]s dev dwx1 self permanent dst %[2]s\n", mac(n, i), wire(n)))
			for _, c := range append(append([]*place{}, hosts[0].containers...), hosts[1].containers...) {
				if c != h.containers[i] {
					c.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent; ip neigh replace %s lladdr %s dev eth0 nud permanent", ip4(n, i), mac(n, i), ip6(n, i), mac(n, i)))
				}
			}
		}
	}
	return hosts
}

// bridgeNF says whether the namespace's iptables see the overlay's frames, as by default they do.
func (h *host) bridgeNF(t testing.TB, on bool) {
	t.Helper()
	v := "0"
	if on {
		v = "1"
	}
	h.over.run(t, "for f in /proc/sys/net/bridge/bridge-nf-call-*; do echo "+v+" >$f; done")
}

// rules loads dockway's own rules for frames, and admits the containers.
func (h *host) rules(t testing.TB) {
	t.Helper()
	table, err := os.ReadFile("../../mode/testdata/bridge.nft")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for line := range strings.Lines(string(table)) {
		// What nft(8) cannot read back of its own listing; none of it is about TCP or UDP.
		if !strings.Contains(line, "@th,64,128") && !strings.Contains(line, "map @hostmac return") {
			text.WriteString(line)
		}
	}
	for i := range h.containers {
		port := fmt.Sprintf("dwv%d", i)
		fmt.Fprintf(&text, "add element bridge dockway source4 { %s . %s . %s }\n", port, mac(h.n, i), ip4(h.n, i))
		fmt.Fprintf(&text, "add element bridge dockway source6 { %s . %s . %s }\n", port, mac(h.n, i), ip6(h.n, i))
		fmt.Fprintf(&text, "add element bridge dockway station { %s . %s }\n", port, mac(h.n, i))
		fmt.Fprintf(&text, "add element bridge dockway ipv6 { %s }\n", port)
	}
	file := t.TempDir() + "/bridge.nft"
	if err := os.WriteFile(file, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	h.over.run(t, "nft -f "+file)
}

// port is a container's port.
func (h *host) port(i int) fastpath.Port {
	return fastpath.Port{
		Link: fmt.Sprintf("dwv%d", i), MAC: mac(h.n, i),
		Addresses: []netip.Addr{netip.MustParseAddr(ip4(h.n, i)), netip.MustParseAddr(ip6(h.n, i))},
	}
}

// attach gives all of the host the fast path, and tells it what is on the other.
func (h *host) attach(t testing.TB, p *fastpath.Path) {
	t.Helper()
	if err := h.attachAll(p); err != nil {
		t.Fatal(err)
	}
}

func (h *host) attachAll(p *fastpath.Path) error {
	all := []error{p.AttachVXLAN("dwx1")}
	for i := range h.containers {
		all = append(all, p.Attach(h.port(i)), p.Put("dwx1", mac(1-h.n, i)))
	}
	return errors.Join(all...)
}
