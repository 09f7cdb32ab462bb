package kernel_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

const (
	tenant   = "dwn1" // a namespace
	tenant2  = "dwn2"
	testVNI  = 5001
	testPort = 4790
)

// namespaceTables are those of a namespace of the tests.
func namespaceTables() []*nft.Table {
	return []*nft.Table{{
		Family: nft.Bridge, Name: "dockway", Sets: []*nft.Set{inner, warded},
		Chains: []*nft.Chain{{Name: "forward", Type: "filter", Hook: "forward", Priority: -200, Rules: []nft.Rule{
			nft.R("", nft.In(inner, nft.IIfName), nft.Is(nft.EtherType, "ip6"), nft.Drop),
		}}},
	}}
}

var (
	inner  = &nft.Set{Family: nft.Bridge, Name: "inner", Key: []nft.Type{nft.IfName}}
	warded = &nft.Set{Family: nft.Bridge, Name: "warded", Key: []nft.Type{nft.IfName}, Guard: true}
)

// pinDirectory is a directory for namespaces, which end with the test.
func pinDirectory(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "netns")
	t.Cleanup(func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			for unix.Unmount(filepath.Join(dir, e.Name()), unix.MNT_DETACH) == nil {
				continue
			}
		}
	})
	return dir
}

// openIn opens a place.
func openIn(t testing.TB, p *place, c kernel.Config) *kernel.Kernel {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	c.Log = logrus.NewEntry(logger)
	var k *kernel.Kernel
	p.do(t, func() (err error) {
		k, err = kernel.New(c)
		return err
	})
	t.Cleanup(func() {
		if err := k.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return k
}

// An overlayHost is a host of an overlay: a place, whose eth0 is its link to the others.
type overlayHost struct {
	*place
	k     *kernel.Kernel
	dir   string
	local netip.Addr
}

// newOverlayHosts makes hosts that are joined by a switch, which is in the test's namespace: the port
// of the first is u0. They know each other's MACs, so that all that is sent to all is the overlay's.
func newOverlayHosts(t testing.TB, n int, ipv6 bool) []*overlayHost {
	t.Helper()
	inNamespace(t)
	here(t, "ip link add underlay type bridge mcast_snooping 0", "ip link set underlay addrgenmode none", "ip link set underlay up")
	address := func(i int) (string, string) {
		if ipv6 {
			return fmt.Sprintf("fd00:18::%d", i+1), "/64"
		}
		return fmt.Sprintf("198.18.0.%d", i+1), "/24"
	}
	mac := func(i int) string { return fmt.Sprintf("02:18:00:00:00:%02x", i+1) }
	var hosts []*overlayHost
	for i := range n {
		h := &overlayHost{place: newPlace(t), dir: pinDirectory(t)}
		here(t, fmt.Sprintf("ip link add u%d type veth peer name eth0 address %s netns %s", i, mac(i), h.path),
			fmt.Sprintf("ip link set u%d master underlay addrgenmode none", i), fmt.Sprintf("ip link set u%d up", i))
		local, bits := address(i)
		nodad := ""
		if ipv6 {
			nodad = " nodad"
		}
		h.run(t, "ip link set lo up", "ip link set eth0 addrgenmode none", "ip link set eth0 up", "ip addr add "+local+bits+" dev eth0"+nodad)
		for j := range n {
			if other, _ := address(j); j != i {
				h.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent", other, mac(j)))
			}
		}
		h.local = netip.MustParseAddr(local)
		h.k = openIn(t, h.place, kernel.Config{Namespaces: h.dir, NamespaceTables: namespaceTables()})
		hosts = append(hosts, h)
	}
	return hosts
}

func within(namespace string, objects ...plan.Object) []plan.Object {
	out := make([]plan.Object, len(objects))
	for i, o := range objects {
		out[i] = plan.Within{Namespace: namespace, Object: o}
	}
	return out
}

const innerMTU = 1430

func innerBridge() plan.Bridge {
	return plan.Bridge{Name: "dwb1", Alias: "dockway network=1", MAC: plan.MAC{2, 90, 0, 0, 0, 254}, MTU: innerMTU, Up: true}
}

func vxlan(vni uint32, local netip.Addr) plan.VXLAN {
	return plan.VXLAN{Name: "dwo1", Alias: "dockway network=1", Bridge: "dwb1", VNI: vni, Local: local, Port: testPort, MTU: innerMTU, Up: true}
}

// base is an overlay without endpoints.
func base(namespace string, vni uint32, local netip.Addr) []plan.Object {
	return append([]plan.Object{plan.Namespace{Name: namespace}}, within(namespace,
		plan.Sysctl{Name: "net/bridge/bridge-nf-call-iptables", Value: "0"},
		plan.Sysctl{Name: "net/bridge/bridge-nf-call-ip6tables", Value: "0"},
		plan.Sysctl{Name: "net/bridge/bridge-nf-call-arptables", Value: "0"},
		innerBridge(), vxlan(vni, local),
	)...)
}

func innerMAC(n int) plan.MAC { return plan.MAC{2, 90, 0, 0, 0, byte(n)} }
func inner4(n int) netip.Addr { return netip.AddrFrom4([4]byte{198, 19, 0, byte(n)}) }
func inner6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd00:90::%d", n)) }

// port is an endpoint's, and who is behind it.
func port(n int) []plan.Object {
	return []plan.Object{
		plan.Veth{Name: fmt.Sprintf("dwv%d", n), Alias: fmt.Sprintf("dockway endpoint=%d", n), Bridge: "dwb1", MTU: innerMTU, Static: true, Up: true,
			Peer: fmt.Sprintf("dwc%d", n), PeerMAC: innerMAC(n)},
		plan.FDB{Link: fmt.Sprintf("dwv%d", n), MAC: innerMAC(n)},
	}
}

// remote is an endpoint of another host.
func remote(n int, vtep netip.Addr) []plan.Object {
	return []plan.Object{
		plan.FDB{Link: "dwo1", MAC: innerMAC(n), VTEP: vtep},
		plan.Neighbour{Link: "dwb1", Address: inner4(n), MAC: innerMAC(n)},
		plan.Neighbour{Link: "dwb1", Address: inner6(n), MAC: innerMAC(n)},
	}
}

// everything is an object of every kind that a namespace can have or need.
func everything(local string) []plan.Object { //nolint:unparam // the call says which address
	objects := base(tenant, testVNI, netip.MustParseAddr(local))
	objects = append(objects, within(tenant, port(1)...)...)
	objects = append(objects, within(tenant, remote(2, netip.MustParseAddr("198.18.0.2"))...)...)
	objects = append(objects, within(tenant,
		plan.Table{Table: namespaceTables()[0]},
		plan.Element{Set: inner, Elem: "dwv1"},
		plan.Element{Set: warded, Elem: "dwv1"},
		address("dwb1", "198.19.0.254/24"), address("dwb1", "fd00:90::fe/64"),
		address("dwg0", "169.254.192.1/31"),
		plan.Route{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Link: "dwg0", Via: netip.MustParseAddr("169.254.192.0")},
	)...)
	return append(objects,
		plan.Transit{Name: "dwg1", Alias: "dockway network=1", Namespace: tenant, Peer: "dwg0", MTU: innerMTU, Up: true},
		address("dwg1", "169.254.192.0/31"),
		plan.Neighbour{Link: "dwg1", Address: netip.MustParseAddr("169.254.192.1"), MAC: innerMAC(9)})
}

// put does what makes the kernel hold objects.
func put(t testing.TB, k *kernel.Kernel, objects ...plan.Object) {
	t.Helper()
	do(t, k, plan.Diff(nil, plan.Of(objects...))...)
}

// container makes the container of an endpoint, whose link the host has in its own namespace.
func (h *overlayHost) container(t testing.TB, n int) *place {
	t.Helper()
	c := newPlace(t)
	h.run(t, fmt.Sprintf("ip link set dwc%d netns %s name eth0", n, c.path))
	c.run(t, "ip link set lo up", "ip link set eth0 addrgenmode none", "ip link set eth0 up",
		fmt.Sprintf("ip addr add %s/24 dev eth0", inner4(n)), fmt.Sprintf("ip addr add %s/64 dev eth0 nodad", inner6(n)))
	return c
}

// in runs a command in a namespace of the host.
func (h *overlayHost) in(t testing.TB, namespace, command string) string { //nolint:unparam // the call says in which
	t.Helper()
	return h.run(t, "nsenter --net="+filepath.Join(h.dir, namespace)+" "+command)
}

// exchange sends a datagram and gets it back.
func exchange(t testing.TB, from, to *place, address netip.Addr) {
	t.Helper()
	if err := tryExchange(t, from, to, address, 5*time.Second); err != nil {
		t.Fatalf("datagram to %s and back: %v", address, err)
	}
}

func tryExchange(t testing.TB, from, to *place, address netip.Addr, limit time.Duration) error {
	t.Helper()
	var server net.PacketConn
	to.do(t, func() (err error) {
		server, err = net.ListenPacket("udp", net.JoinHostPort(address.String(), "0"))
		return err
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer server.Close()
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, who, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(b[:n], who)
		}
	})
	var client net.Conn
	from.do(t, func() (err error) {
		client, err = net.Dial("udp", server.LocalAddr().String())
		return err
	})
	defer client.Close()
	// The first may be lost: a link's queue starts some time after it has carrier.
	b := make([]byte, 1500)
	for end := time.Now().Add(limit); ; {
		if _, err := client.Write([]byte("there and back")); err != nil {
			return err
		}
		if err := client.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return err
		}
		n, err := client.Read(b)
		switch {
		case err == nil && string(b[:n]) != "there and back":
			return fmt.Errorf("what came back is %q", b[:n])
		case err == nil || time.Now().After(end):
			return err
		}
	}
}

// A capture is what crosses a link, both ways.
type capture struct {
	file   *os.File
	mu     sync.Mutex
	frames [][]byte
}

// captureHere captures on a link of the test's namespace.
func captureHere(t testing.TB, link string) *capture {
	t.Helper()
	p, err := newTap(link)
	if err != nil {
		t.Fatal(err)
	}
	c := &capture{file: p.file}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1<<17)
		for {
			n, err := p.file.Read(b)
			if err != nil {
				return
			}
			c.mu.Lock()
			c.frames = append(c.frames, append([]byte(nil), b[:n]...))
			c.mu.Unlock()
		}
	})
	t.Cleanup(func() { p.file.Close(); wg.Wait() })
	return c
}

// taken gives what was captured since it was last asked.
func (c *capture) taken() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.frames
	c.frames = nil
	return out
}

// encapsulated is the frame in a VXLAN packet.
func encapsulated(frame []byte) (vni uint32, inside []byte, err error) {
	if len(frame) < etherSize {
		return 0, nil, errors.New("short frame")
	}
	rest := frame[etherSize:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); kind {
	case unix.ETH_P_IP:
		rest = rest[20:]
	case unix.ETH_P_IPV6:
		rest = rest[40:]
	default:
		return 0, nil, fmt.Errorf("Ethernet type %04x", kind)
	}
	if to := binary.BigEndian.Uint16(rest[2:]); to != testPort {
		return 0, nil, fmt.Errorf("UDP port %d", to)
	}
	if binary.BigEndian.Uint16(rest[6:]) == 0 {
		return 0, nil, errors.New("no UDP checksum")
	}
	if rest[8] != 8 {
		return 0, nil, fmt.Errorf("VXLAN flags %x", rest[8])
	}
	return binary.BigEndian.Uint32(rest[12:]) >> 8, rest[16:], nil
}

// checkUnderlay checks that all that was captured is VXLAN of one segment from host to host, and that
// what is in it is for one container: it says how much there was for whom.
func checkUnderlay(t testing.TB, c *capture, vni uint32) map[plan.MAC]int { //nolint:unparam // the call says which segment
	t.Helper()
	out := map[plan.MAC]int{}
	frames := c.taken()
	for _, f := range frames {
		if binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IPV6 && f[20] == unix.IPPROTO_HOPOPTS {
			continue // a host's own, about the groups that it is in (RFC 3810)
		}
		got, inside, err := encapsulated(f)
		switch {
		case f[0]&1 != 0:
			t.Errorf("sent to all on the underlay: %x", f)
		case err != nil:
			t.Errorf("no VXLAN on the underlay: %v: %x", err, f)
		case got != vni:
			t.Errorf("VNI %d, not %d", got, vni)
		case inside[0]&1 != 0 || binary.BigEndian.Uint16(inside[12:]) == unix.ETH_P_ARP:
			t.Errorf("encapsulated for all: %x", inside)
		default:
			out[plan.MAC(inside[:6])]++
		}
	}
	return out
}

// leftovers lists what is left of namespaces in a directory, and of links of ours in the host.
func (h *overlayHost) leftovers(t testing.TB) string {
	t.Helper()
	var out []string
	entries, _ := os.ReadDir(h.dir)
	for _, e := range entries {
		out = append(out, e.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.dir) {
			out = append(out, line)
		}
	}
	for line := range strings.Lines(h.run(t, "ip -o link")) {
		if strings.Contains(line, ": dw") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func ctx() context.Context { return context.Background() }
