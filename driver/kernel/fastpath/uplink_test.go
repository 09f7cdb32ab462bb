package fastpath_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// A wired host has an external switch with an uplink to a station of the LAN, and two containers.
type wired struct {
	*host
	station *place
	path    *fastpath.Path
}

const (
	station4, station6 = "198.19.9.2", "fd00:90::9:2"
	host4              = "198.19.9.1"
)

var (
	stationMAC = mac(9, 0)
	hostMAC    = plan.MAC{2, 0x64, 0x77, 1, 0, 1}
)

// long is what no test takes.
const long = time.Hour

// switchOpeners are openers of a switch that need not hear the station again while a test runs.
var switchOpeners = map[string]opener{"tcx": fastpath.OpenSwitchHearing(long), "clsact": fastpath.OpenSwitchClsact(long)}

// forSwitch calls f with each of the ways that kernels have for it.
func forSwitch(t *testing.T, f func(t *testing.T, w *wired)) {
	for name, how := range switchOpeners {
		t.Run(name, func(t *testing.T) {
			w := newWired(t)
			w.path = w.open(t, how)
			if err := errors.Join(w.path.AttachUplink("eth1"), w.path.Attach(w.port(0)), w.path.Attach(w.port(1)), w.path.Hear(stationMAC), w.path.Trust(long)); err != nil {
				t.Fatal(err)
			}
			f(t, w)
		})
	}
}

func newWired(t *testing.T) *wired {
	t.Helper()
	w := &wired{host: &host{over: newPlace(t)}, station: newPlace(t)}
	w.over.run(t, fmt.Sprintf(`ip link set lo up
ip link add dwb1 address %[1]s type bridge mcast_snooping 0
ip link set dwb1 addrgenmode none up
ip link add eth1 address %[1]s type veth peer name eth0 address %[2]s netns %[3]s
ip link set eth1 master dwb1 addrgenmode none up
ip addr add %[4]s/16 dev dwb1
tc qdisc add dev eth1 clsact`, hostMAC, stationMAC, w.station.path, host4))
	w.over.do(t, func() error { return fastpath.PutVLANFilter("eth1") }) // the two do not keep each other out
	w.bridgeNF(t, false)
	for i := range 2 {
		c := newPlace(t)
		w.containers = append(w.containers, c)
		w.over.run(t, fmt.Sprintf(`ip link add dwv%[1]d type veth peer name eth0 address %[2]s netns %[3]s
ip link set dwv%[1]d master dwb1 addrgenmode none up`, i, mac(0, i), c.path))
	}
	addresses := map[*place][2]string{w.station: {station4, station6}, w.containers[0]: {ip4(0, 0), ip6(0, 0)}, w.containers[1]: {ip4(0, 1), ip6(0, 1)}}
	macs := map[*place]plan.MAC{w.station: stationMAC, w.containers[0]: mac(0, 0), w.containers[1]: mac(0, 1)}
	for p, own := range addresses {
		p.run(t, fmt.Sprintf(`sysctl -qw net.ipv6.conf.all.accept_dad=0
ip link set lo up; ip link set eth0 addrgenmode none up
ip addr add %s/16 dev eth0; ip addr add %s/64 dev eth0 nodad
ip neigh replace %s lladdr %s dev eth0 nud permanent`, own[0], own[1], host4, hostMAC))
		for other, theirs := range addresses {
			if other != p {
				p.run(t, fmt.Sprintf("ip neigh replace %[1]s lladdr %[3]s dev eth0 nud permanent; ip neigh replace %[2]s lladdr %[3]s dev eth0 nud permanent", theirs[0], theirs[1], macs[other]))
			}
		}
		w.over.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev dwb1 nud permanent", own[0], macs[p]))
	}
	w.startCensus(t)
	return w
}

// slowly checks whether the switch has seen frames of a kind since the last time.
func (w *wired) slowly(t *testing.T, what, kind string, wanted bool) {
	t.Helper()
	if n := w.census(t)[kind]; wanted != (n > 0) {
		t.Errorf("%s: the switch sees %d frames of %s", what, n, kind)
	}
}

// both sends a datagram there and one back.
func (w *wired) both(t *testing.T, what string, from, to *net.UDPConn, slow bool) {
	t.Helper()
	w.census(t)
	say(t, from, to, what)
	hears(t, what, to, what)
	w.slowly(t, what+", there", "udp", slow)
	say(t, to, from, what)
	hears(t, what, from, what)
	w.slowly(t, what+", back", "udp", slow)
}

// TestWire: what is TCP or UDP between containers, and between them and who is on the wire, is not seen by
// the switch; all else is.
func TestWire(t *testing.T) {
	forSwitch(t, func(t *testing.T, w *wired) {
		a, b := w.containers[0], w.containers[1]
		for _, p := range []pair{
			{"IPv4 to the wire", a, w.station, station4, ip4(0, 0)}, {"IPv6 to the wire", a, w.station, station6, ip6(0, 0)},
			{"IPv4 from the wire", w.station, a, ip4(0, 0), station4}, {"IPv6 from the wire", w.station, a, ip6(0, 0), station6},
			{"IPv4 beside", a, b, ip4(0, 1), ip4(0, 0)}, {"IPv6 beside", a, b, ip6(0, 1), ip6(0, 0)},
		} {
			before := packets(t, p.from, "eth0")
			transferTCP(t, p.from, p.to, p.address, 16<<20)
			w.slowly(t, p.name, "tcp", false)
			if n := packets(t, p.from, "eth0") - before; n > 16<<20/1400/4 {
				t.Errorf("%s: 16 MiB are sent in %d packets", p.name, n)
			}
			ear, mouth := p.to.hear(t, p.address, 0), p.from.hear(t, p.source, 0)
			w.both(t, p.name, mouth, ear, false)
			p.from.ping(t, p.address)
			w.slowly(t, p.name, "icmp", true)
			pieces := string(slices.Repeat([]byte("fragment"), 1000))
			say(t, mouth, ear, pieces)
			hears(t, p.name, ear, pieces)
			w.slowly(t, p.name, "fragment", true)
		}
		ear := w.over.hear(t, host4, 0)
		for _, mouth := range []*net.UDPConn{a.hear(t, ip4(0, 0), 0), w.station.hear(t, station4, 0)} {
			say(t, mouth, ear, "to the host")
			hears(t, "the host", ear, "to the host")
			w.slowly(t, "to the host", "udp", true)
			say(t, ear, mouth, "from the host")
			hears(t, "from the host", mouth, "from the host")
		}
	})
}

// TestWireSecurity: what is not as it should be is the switch's affair.
func TestWireSecurity(t *testing.T) {
	forSwitch(t, func(t *testing.T, w *wired) {
		stranger := plan.MAC{2, 9, 9, 9, 9, 9}
		own := datagram{from: mac(0, 0), to: stationMAC, source: ip4(0, 0), target: station4, ports: [2]uint16{99, 99}, text: "own"}
		own6 := own
		own6.source, own6.target = ip6(0, 0), station6
		reply := datagram{from: stationMAC, to: mac(0, 0), source: station4, target: ip4(0, 0), ports: [2]uint16{99, 99}, text: "reply"}
		reply6 := reply
		reply6.source, reply6.target = station6, ip6(0, 0)
		try := func(from *place, d datagram, what string, slow bool, change func(*datagram)) {
			t.Helper()
			d.text = what
			change(&d)
			w.census(t)
			from.inject(t, d.frame())
			// What comes from the station crosses a link, whose other end takes it a moment later.
			if slow {
				eventually(t, what+" is seen by the switch", func() bool { return w.census(t)["udp"] > 0 })
				return
			}
			w.slowly(t, what, "udp", false)
		}
		a, s := w.containers[0], w.station
		for family, d := range map[string]datagram{"4": own, "6": own6} {
			foreign, server, client := "198.19.0.99", uint16(67), uint16(68)
			if family == "6" {
				foreign, server, client = "fd00:90::99", 547, 546
			}
			try(a, d, "own "+family, false, func(*datagram) {})
			try(a, d, "foreign source "+family, true, func(d *datagram) { d.source = foreign })
			try(a, d, "foreign MAC "+family, true, func(d *datagram) { d.from = stranger })
			try(a, d, "the station's MAC "+family, true, func(d *datagram) { d.from = stationMAC })
			try(a, d, "the host's MAC "+family, true, func(d *datagram) { d.from = hostMAC })
			try(a, d, "to the host "+family, true, func(d *datagram) { d.to = hostMAC })
			try(a, d, "to a stranger "+family, true, func(d *datagram) { d.to = stranger })
			try(a, d, "to all "+family, true, func(d *datagram) { d.to = plan.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} })
			try(a, d, "to itself "+family, true, func(d *datagram) { d.to = mac(0, 0) })
			try(a, d, "DHCP server "+family, true, func(d *datagram) { d.ports = [2]uint16{server, client} })
			try(a, d, "DHCP server, another port "+family, true, func(d *datagram) { d.ports[1] = client })
		}
		ear := a.hear(t, "0.0.0.0", 99) // for both
		for i, d := range []datagram{reply, reply6} {
			family := []string{"4", "6"}[i]
			foreign := map[string]string{"4": "198.19.0.99", "6": "fd00:90::99"}[family]
			try(s, d, "reply "+family, false, func(*datagram) {})
			try(s, d, "from a stranger "+family, true, func(d *datagram) { d.from = stranger })
			try(s, d, "from the host's MAC "+family, true, func(d *datagram) { d.from = hostMAC })
			try(s, d, "from the container's MAC "+family, true, func(d *datagram) { d.from = mac(0, 0) })
			try(s, d, "from the other container's MAC "+family, true, func(d *datagram) { d.from = mac(0, 1) })
			try(s, d, "to another address "+family, true, func(d *datagram) { d.target = foreign })
			try(s, d, "to the host "+family, true, func(d *datagram) { d.to = hostMAC })
			try(s, d, "to a stranger "+family, true, func(d *datagram) { d.to = stranger })
			try(s, d, "to the station itself "+family, true, func(d *datagram) { d.to = stationMAC })
		}
		hears(t, "the reply", ear, "reply 4")
		tagged := slices.Insert(reply.frame(), 12, 0x81, 0, 0xe0, 0)
		s.inject(t, tagged)
		s.inject(t, reply.frame())
		hears(t, "what comes after a tagged frame", ear, "from a stranger 4") // by the switch, without rules
	})
}

// TestTrust: what is said of the wire counts while it is said, and containers' own MACs stay theirs.
func TestTrust(t *testing.T) {
	forSwitch(t, func(t *testing.T, w *wired) {
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		ear, mouth, beside := w.station.hear(t, station4, 0), w.containers[0].hear(t, ip4(0, 0), 0), w.containers[1].hear(t, ip4(0, 1), 0)
		must(w.path.Hear(mac(0, 0), mac(0, 1)))
		w.both(t, "containers that are also heard on the wire", mouth, beside, false)
		must(w.path.Forget(mac(0, 0), mac(0, 1)))
		w.both(t, "and are no more", mouth, beside, false)
		w.both(t, "trusted", mouth, ear, false)
		must(w.path.Trust(0))
		w.both(t, "not trusted", mouth, ear, true)
		w.both(t, "beside, not trusted", mouth, beside, false)
		must(w.path.Trust(long))
		w.both(t, "trusted again", mouth, ear, false)
		must(w.path.Trust(100 * time.Millisecond))
		eventually(t, "the moment is over", func() bool {
			say(t, mouth, ear, "x")
			hears(t, "a moment", ear, "x")
			return w.census(t)["udp"] > 0
		})
		w.both(t, "after it", mouth, ear, true)
		must(w.path.Trust(long))
		must(w.path.Forget(stationMAC))
		w.both(t, "forgotten", mouth, ear, true)
		must(w.path.Hear(stationMAC))
		w.both(t, "heard again", mouth, ear, false)
		if got := list(t, w.path); len(got.Ports) != 2 || !slices.Equal(got.VXLAN, []string{"eth1"}) || got.Remote[stationMAC] != "eth1" || len(got.Half) > 0 {
			t.Errorf("there is %+v", got)
		}

		must(w.path.Detach("eth1"))
		w.both(t, "detached", mouth, ear, true)
		w.both(t, "beside, detached", mouth, beside, false)
		if n := programs(t, w.host, "eth1"); n != 0 {
			t.Errorf("%d programs are at the uplink after Detach", n)
		}
		for what, err := range map[string]error{
			"no link": w.path.AttachUplink("nothing"), "no port": w.path.AttachUplink("lo"), "multicast": w.path.Hear(plan.MAC{1}),
		} {
			if err == nil {
				t.Errorf("%s is taken", what)
			}
		}
	})
}

// TestHeardAgain: a station that says enough past the switch for it to be remembered is heard by it, from time to
// time: else the switch would forget it, and send to all ports what is for it.
func TestHeardAgain(t *testing.T) {
	w := newWired(t)
	w.path = w.open(t, fastpath.OpenSwitchHearing(2*time.Second))
	if err := errors.Join(w.path.AttachUplink("eth1"), w.path.Attach(w.port(0)), w.path.Hear(stationMAC), w.path.Trust(long)); err != nil {
		t.Fatal(err)
	}
	ear, mouth := w.containers[0].hear(t, ip4(0, 0), 0), w.station.hear(t, station4, 0)
	w.both(t, "just heard", mouth, ear, false)
	for range 2 {
		w.census(t)
		eventually(t, "the switch hears the station again", func() bool {
			say(t, mouth, ear, "x")
			hears(t, "the container", ear, "x")
			return w.census(t)["udp"] > 0
		})
		if fdb := w.over.run(t, "bridge fdb show dev eth1"); !strings.Contains(fdb, stationMAC.String()) {
			t.Errorf("the switch knows behind its uplink only %s", fdb)
		}
		w.both(t, "heard again", mouth, ear, false)
	}
}

// TestFoundAgain: another process finds what is there, and goes on with it.
func TestFoundAgain(t *testing.T) {
	forSwitch(t, func(t *testing.T, w *wired) {
		_, hook, _ := strings.Cut(t.Name(), "/")
		other := w.open(t, switchOpeners[hook])
		if got := list(t, other); len(got.Ports) != 2 || got.Remote[stationMAC] != "eth1" {
			t.Errorf("another process finds %+v", got)
		}
		if port, there, err := other.Lookup("eth1", plan.MAC{}); err != nil || !there {
			t.Errorf("the uplink: %v, %t, %v", port, there, err)
		}
		ear, mouth := w.station.hear(t, station4, 0), w.containers[0].hear(t, ip4(0, 0), 0)
		w.both(t, "as it was", mouth, ear, false)
		if err := other.Hear(plan.MAC{2, 9}); err == nil {
			t.Error("who has not attached the uplink hears by it")
		}
		if err := errors.Join(other.AttachUplink("eth1"), other.Attach(w.port(0)), other.Trust(0)); err != nil {
			t.Fatal(err)
		}
		w.both(t, "the other trusts no more", mouth, ear, true)
		if n := programs(t, w.host, "dwv0"); n != 1 {
			t.Errorf("%d programs are at the port", n)
		}
		// The interface vanishes and returns as another.
		w.over.run(t, "ip link del eth1")
		w.over.run(t, fmt.Sprintf("ip link add eth1 address %s type veth peer name eth0 address %s netns %s; ip link set eth1 master dwb1 addrgenmode none up", hostMAC, stationMAC, w.station.path))
		w.station.run(t, fmt.Sprintf("ip link set eth0 addrgenmode none up; ip addr add %s/16 dev eth0; ip neigh replace %s lladdr %s dev eth0 nud permanent", station4, ip4(0, 0), mac(0, 0)))
		if _, there, err := other.Lookup("eth1", plan.MAC{}); err != nil || there {
			t.Errorf("the new uplink: %t, %v", there, err)
		}
		ear = w.station.hear(t, station4, 0)
		if err := other.Trust(long); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(other.AttachUplink("eth1"), other.Hear(stationMAC)); err != nil {
			t.Fatal(err)
		}
		w.both(t, "after its return", mouth, ear, false)
		w.over.run(t, "ip link del dwb1")
		if err := other.Detach("eth1"); err != nil {
			t.Errorf("without the switch: %v", err)
		}
		if _, err := fastpath.OpenSwitch(os.Stdin, "dwb1"); err == nil {
			t.Error("what is no namespace is taken")
		}
	})
}
