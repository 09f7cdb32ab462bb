package mode_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/policy"
)

// A space is a network namespace: a container, the host, or a machine outside.
type space struct {
	t    *testing.T
	file *os.File
}

func newSpace(t *testing.T) space {
	t.Helper()
	s := space{t: t}
	inNamespace(t, func() {
		var err error
		if s.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { _ = s.file.Close() })
	s.run("ip link set lo up")
	return s
}

// in runs f on a thread in the namespace.
func (s space) in(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			s.t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// run runs commands, one a line.
func (s space) run(script string, args ...any) {
	s.t.Helper()
	var failure string
	s.in(func() {
		for line := range strings.Lines(fmt.Sprintf(script, args...)) {
			if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
				failure += fmt.Sprintf("%s: %v: %s", line, err, out)
			}
		}
	})
	if failure != "" {
		s.t.Fatal(failure)
	}
}

// take takes a link of another namespace as eth0.
func (s space) take(from space, link, address string) {
	s.t.Helper()
	from.run("ip link set %s netns /proc/%d/fd/%d", link, os.Getpid(), s.file.Fd())
	s.run("ip link set %s name eth0\nip address add %s dev eth0\nip link set eth0 up", link, address)
}

// serve answers connections to port 80 with a line.
func (s space) serve(line string) {
	s.t.Helper()
	s.in(func() {
		l, err := net.Listen("tcp", ":80")
		if err != nil {
			s.t.Error(err)
			return
		}
		s.t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, line)
				_ = conn.Close()
			}
		}()
	})
}

// ask is what is answered at an address, nothing when nothing gets there.
func (s space) ask(address string, patience time.Duration) (answer string) {
	s.in(func() {
		conn, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			return
		}
		text, _ := io.ReadAll(conn)
		_ = conn.Close()
		answer = string(text)
	})
	return answer
}

func (s space) reaches(what, address, answer string) {
	s.t.Helper()
	if got := s.ask(address, 5*time.Second); got != answer {
		s.t.Errorf("%s: %s answers %q, want %q", what, address, got, answer)
	}
}

func (s space) barred(what, address string) {
	s.t.Helper()
	if got := s.ask(address, 200*time.Millisecond); got != "" {
		s.t.Errorf("%s: %s answers %q, want nothing", what, address, got)
	}
}

// network makes a network's record with endpoints .2 and .3, of which one has a port published.
func network(number, published int, change func(*mode.Network)) (mode.Network, []mode.Endpoint) {
	prefix := fmt.Sprintf("198.19.%d.", number)
	n := mode.Network{
		ID: fmt.Sprintf("%012d", number), Options: mode.Options{Mode: mode.NAT, MTU: 1500, IfacePrefix: "eth"},
		IPv4: []mode.Subnet{{Pool: netip.MustParsePrefix(prefix + "0/24"), Gateway: netip.MustParseAddr(prefix + "1")}},
	}
	change(&n)
	var all []mode.Endpoint
	for i := 2; i <= 3; i++ {
		all = append(all, mode.Endpoint{
			ID: fmt.Sprintf("%d%010d", number, i), NetworkID: n.ID, Joined: true, MAC: plan.MAC{2, 0, 0, 0, byte(number), byte(i)},
			Address: netip.MustParsePrefix(fmt.Sprintf("%s%d/24", prefix, i)),
		})
	}
	if published != 0 {
		all[1].Bindings = []policy.Binding{{
			Protocol: policy.TCP, Host: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(published)),
			Container: netip.AddrPortFrom(all[1].Address.Addr(), 80),
		}}
	}
	return n, all
}

// TestTraffic sends packets through the rules of three networks: a plain one, an internal one, and one
// whose containers cannot reach each other. Every container has a default route and may do what it
// likes with it. The host is as Docker leaves one, and in some runs its owner's rules set the mark of
// dockway's on everything that comes.
func TestTraffic(t *testing.T) {
	for _, bridgeNF := range []int{0, 1} {
		for _, marked := range []bool{false, true} {
			t.Run(fmt.Sprintf("bridge-nf=%d,marked=%v", bridgeNF, marked), func(t *testing.T) { traffic(t, bridgeNF, marked) })
		}
	}
}

func traffic(t *testing.T, bridgeNF int, marked bool) {
	host, lan, far := newSpace(t), newSpace(t), newSpace(t)
	host.run(`ip link add up0 type veth peer name out0
ip link add up1 type veth peer name out1
ip address add 198.18.0.1/24 dev up0
ip address add fd00:18::1/64 dev up0 nodad
ip address add 198.18.1.1/24 dev up1
ip link set up0 up
ip link set up1 up`)
	lan.take(host, "out0", "198.18.0.100/24")
	far.take(host, "out1", "198.18.1.100/24")
	host.run(`ip route add default via 198.18.0.100
iptables -N DOCKER-USER
iptables -A FORWARD -j DOCKER-USER
iptables -P FORWARD DROP
sysctl -qw net.bridge.bridge-nf-call-iptables=%[1]d net.bridge.bridge-nf-call-ip6tables=%[1]d
ip6tables -N DOCKER-USER
ip6tables -A FORWARD -j DOCKER-USER
ip6tables -P FORWARD DROP`, bridgeNF)
	lan.run("ip route add 198.19.0.0/16 via 198.18.0.1\nip route add 198.18.1.0/24 via 198.18.0.1")
	far.run("ip route add default via 198.18.1.1")
	if marked {
		host.run(`nft add table inet owner
nft 'add chain inet owner pre { type filter hook prerouting priority mangle; }'
nft add rule inet owner pre meta mark set 0x1000`)
	}

	open, openEndpoints := network(1, 8001, func(n *mode.Network) {
		n.IPv6 = []mode.Subnet{{Pool: netip.MustParsePrefix("fd00:19:1::/64"), Gateway: netip.MustParseAddr("fd00:19:1::1")}}
	})
	for i := range openEndpoints {
		openEndpoints[i].Address6 = netip.MustParsePrefix(fmt.Sprintf("fd00:19:1::%d/64", i+2))
	}
	inner, innerEndpoints := network(2, 0, func(n *mode.Network) { n.Internal = true })
	apart, apartEndpoints := network(3, 8003, func(n *mode.Network) {
		n.Options.DisableICC = true
		n.IPv6 = []mode.Subnet{{Pool: netip.MustParsePrefix("fd00:19:3::/64"), Gateway: netip.MustParseAddr("fd00:19:3::1")}}
	})
	for i := range apartEndpoints {
		apartEndpoints[i].Address6 = netip.MustParsePrefix(fmt.Sprintf("fd00:19:3::%d/64", i+2))
	}
	apartEndpoints[1].Bindings = append(apartEndpoints[1].Bindings, policy.Binding{
		Protocol: policy.TCP, Host: netip.MustParseAddrPort("[::]:8003"), Container: netip.MustParseAddrPort("[fd00:19:3::3]:80"),
	})
	wanted := mode.Host([]string{"up0"}).Merge(mode.Plan(open, openEndpoints), mode.Plan(inner, innerEndpoints), mode.Plan(apart, apartEndpoints))
	maps.DeleteFunc(wanted, func(k plan.Key, _ plan.Object) bool { return k.Kind == plan.KindHostPort })
	var k *kernel.Kernel
	var err error
	host.in(func() {
		if k, err = kernel.New(kernel.Config{Tables: []*nft.Table{mode.InetTable(), mode.BridgeTable()}}); err == nil {
			err = k.Do(context.Background(), plan.Diff(nil, wanted))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })

	containers := map[string]space{}
	for _, e := range append(append(openEndpoints, innerEndpoints...), apartEndpoints...) {
		c := newSpace(t)
		c.run("sysctl -qw net.ipv6.conf.default.accept_dad=0") // which would take a second
		c.take(host, e.Peer(), e.Address.String())
		gateway := e.Address.Masked().Addr().Next()
		c.run("ip route add default via %s", gateway)
		if e.Address6.IsValid() {
			c.run("ip address add %s dev eth0\nip route add default via %s", e.Address6, e.Address6.Masked().Addr().Next())
		}
		c.serve("container " + e.Address.Addr().String())
		containers[e.Address.Addr().String()] = c
	}
	lan.serve("outside")
	far.serve("far")
	open2, inner2, apart2 := containers["198.19.1.2"], containers["198.19.2.2"], containers["198.19.3.2"]

	open2.reaches("same network", "198.19.1.3:80", "container 198.19.1.3")
	open2.reaches("outside", "198.18.0.100:80", "outside")
	open2.reaches("a published port of its network", "198.18.0.1:8001", "container 198.19.1.3")
	containers["198.19.1.3"].reaches("a published port of its own", "198.18.0.1:8001", "container 198.19.1.3")
	open2.barred("another network", "198.19.3.3:80")
	open2.reaches("a published port of another network", "198.18.0.1:8003", "container 198.19.3.3")
	heard := containers["198.19.1.3"].listen()
	open2.say(linkLocalOf(containers["198.19.1.3"], open2)+":7", "hello")
	if got := <-heard; got != "hello" {
		t.Errorf("same network, link-local: a container hears %q", got)
	}
	lan.reaches("outside to a published port", "198.18.0.1:8001", "container 198.19.1.3")
	lan.barred("outside to a container's own address", "198.19.1.3:80")
	lan.barred("outside to a container's own address, internal", "198.19.2.3:80")
	lan.barred("what is none of dockway's", "198.18.1.100:80")

	inner2.reaches("same internal network", "198.19.2.3:80", "container 198.19.2.3")
	host.reaches("host to an internal network", "198.19.2.3:80", "container 198.19.2.3")
	inner2.barred("internal, to the outside", "198.18.0.100:80")
	inner2.barred("internal, to another network", "198.19.1.3:80")
	inner2.barred("internal, to a published port at the host's address", "198.18.0.1:8001")
	inner2.barred("internal, to a published port at its gateway's address", "198.19.2.1:8001")
	inner2.barred("internal, to a published port at another gateway's address", "198.19.1.1:8001")

	apart2.reaches("disable_icc, to the outside", "198.18.0.100:80", "outside")
	lan.reaches("disable_icc, outside to a published port", "198.18.0.1:8003", "container 198.19.3.3")
	apart3 := containers["198.19.3.3"]
	for _, port := range []string{"198.18.0.1:8003", "[fd00:18::1]:8003"} {
		apart2.reaches("disable_icc, to a published port of its network", port, "container 198.19.3.3")
		apart3.reaches("disable_icc, to a published port of its own", port, "container 198.19.3.3")
	}
	for _, own := range []string{"198.19.3.3:80", "[fd00:19:3::3]:80"} {
		apart2.barred("disable_icc", own)
	}
	// A datagram needs no answer, which would not find the same way, and goes to a MAC without asking whose it is.
	gatewayMAC := bridgeOf(t, apart).MAC
	linkLocal := strings.Trim(linkLocalOf(apart3, apart2), "[]")
	for _, address := range []string{"198.19.3.3", "fd00:19:3::3", linkLocal} {
		neighbour, _, _ := strings.Cut(address, "%")
		heard = apart3.listen()
		apart2.say(net.JoinHostPort(address, "7"), "directly")
		for mac, way := range map[plan.MAC]string{apartEndpoints[1].MAC: "at its MAC", gatewayMAC: "at the gateway's MAC"} {
			apart2.run("ip neigh replace %s lladdr %s dev eth0", neighbour, mac)
			apart2.say(net.JoinHostPort(address, "7"), way)
		}
		apart2.run("ip neigh del %s dev eth0", neighbour)
		host.say("198.19.3.3:7", "by the host")
		if got := <-heard; got != "by the host" {
			t.Errorf("disable_icc: %s hears another %s", address, got)
		}
	}
	_, link, _ := strings.Cut(linkLocal, "%")
	heard = apart3.listen()
	apart2.say(net.JoinHostPort("ff02::1%"+link, "7"), "at an address of all")
	host.say("198.19.3.3:7", "by the host")
	if got := <-heard; got != "by the host" {
		t.Errorf("disable_icc: a container hears another %s", got)
	}
}

// bridgeOf is the switch of a nat network.
func bridgeOf(t *testing.T, n mode.Network) plan.Bridge {
	t.Helper()
	for _, o := range mode.PlanNetwork(n) {
		if b, ok := o.(plan.Bridge); ok {
			return b
		}
	}
	t.Fatalf("network %s has no bridge", n.ID)
	return plan.Bridge{}
}

// linkLocalOf is a container's link-local address, as another sees it, when both have one.
func linkLocalOf(s, seenBy space) string {
	s.t.Helper()
	find := func(s space) (address netip.Addr, index int) {
		s.in(func() {
			deadline := time.After(10 * time.Second)
			for {
				link, err := net.InterfaceByName("eth0")
				if err != nil {
					s.t.Error(err)
					return
				}
				all, _ := link.Addrs()
				for _, a := range all {
					if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
						address, index = p.Addr(), link.Index
						return
					}
				}
				select {
				case <-deadline:
					s.t.Errorf("eth0 has no link-local address: %v", all)
					return
				case <-time.After(time.Millisecond):
				}
			}
		})
		return address, index
	}
	address, _ := find(s)
	_, index := find(seenBy)
	return fmt.Sprintf("[%s%%%d]", address, index)
}

// listen gives the first datagram that comes to port 7.
func (s space) listen() <-chan string {
	s.t.Helper()
	heard := make(chan string, 1)
	s.in(func() {
		conn, err := net.ListenPacket("udp", ":7")
		if err != nil {
			s.t.Error(err)
			return
		}
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		go func() {
			b := make([]byte, 100)
			n, _, err := conn.ReadFrom(b)
			_ = conn.Close()
			heard <- string(b[:n]) + errorText(err)
		}()
	})
	return heard
}

func errorText(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}

// say sends a datagram.
func (s space) say(address, text string) {
	s.t.Helper()
	s.in(func() {
		conn, err := net.Dial("udp", address)
		if err == nil {
			_, err = io.WriteString(conn, text)
			_ = conn.Close()
		}
		if err != nil {
			s.t.Errorf("say %q to %s: %v", text, address, err)
		}
	})
}

// TestEncapsulatedTraffic sends datagrams to the UDP port of VXLAN, here 7, of a host of a cluster that
// has no overlay network: only a peer is heard, only at the address that it knows, and neither a
// container nor a process of this host can speak to a peer.
func TestEncapsulatedTraffic(t *testing.T) {
	host, peer, stranger := newSpace(t), newSpace(t), newSpace(t)
	host.run(`ip link add up0 type veth peer name out0
ip link add up1 type veth peer name out1
ip address add 198.18.0.1/24 dev up0
ip address add 198.18.0.2/24 dev up0
ip address add 198.18.1.1/24 dev up1
ip link set up0 up
ip link set up1 up`)
	peer.take(host, "out0", "198.18.0.100/24")
	stranger.take(host, "out1", "198.18.1.100/24")
	stranger.run("ip route add default via 198.18.1.1")
	peer.run("ip route add default via 198.18.0.1\nip address add 198.18.0.101/24 dev eth0")
	n, endpoints := network(1, 0, func(*mode.Network) {})
	cluster := mode.PlanPeers(netip.MustParseAddr("198.18.0.1"), 7, []netip.Addr{netip.MustParseAddr("198.18.0.100")})
	wanted := mode.Host([]string{"up0"}).Merge(cluster, mode.Plan(n, endpoints))
	var k *kernel.Kernel
	var err error
	host.in(func() {
		if k, err = kernel.New(kernel.Config{Tables: []*nft.Table{mode.InetTable(), mode.BridgeTable()}}); err == nil {
			err = k.Do(context.Background(), plan.Diff(nil, wanted))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	container := newSpace(t)
	container.take(host, endpoints[0].Peer(), endpoints[0].Address.String())
	container.run("ip route add default via %s", n.IPv4[0].Gateway)

	heard := host.listen()
	stranger.say("198.18.0.1:7", "stranger")
	peer.say("198.18.0.2:7", "peer, to an address that it does not know")
	container.say("198.18.0.1:7", "container")
	peer.say("198.18.0.1:7", "peer")
	if got := <-heard; got != "peer" {
		t.Errorf("the host hears the %s", got)
	}
	heard = peer.listen()
	container.say("198.18.0.100:7", "container")
	host.in(func() { // refused at once, or not sent
		if conn, err := net.Dial("udp", "198.18.0.100:7"); err == nil {
			_, _ = io.WriteString(conn, "process")
			_ = conn.Close()
		}
	})
	stranger.say("198.18.0.100:7", "stranger")
	peer.say("198.18.0.100:7", "itself")
	if got := <-heard; got != "itself" {
		t.Errorf("the peer hears a %s", got)
	}
}
