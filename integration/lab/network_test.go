package lab_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/dockway/dockway/integration/lab"
)

// The tests' addresses.
const (
	a4, b4 = "198.18.0.1", "198.18.0.2"
	a6, b6 = "fd00:18::1", "fd00:18::2"
)

// site is a lab within a test: what fails, fails the test.
type site struct {
	*lab.Lab
	t     *testing.T
	probe string
}

func newSite(t *testing.T) *site {
	t.Helper()
	l, err := lab.New(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	probe, err := l.BuildProbe()
	if err != nil {
		t.Fatal(err)
	}
	return &site{l, t, probe}
}

func (s *site) lan(name string) *lab.LAN {
	s.t.Helper()
	n, err := s.LAN(name)
	s.must(err)
	return n
}

func (s *site) machine(name string) *lab.Machine {
	s.t.Helper()
	m, err := s.Machine(name)
	s.must(err)
	return m
}

// pair is a LAN with two machines on it, a and b.
func (s *site) pair() (n *lab.LAN, a, b *lab.Machine) {
	s.t.Helper()
	n, a, b = s.lan("lan"), s.machine("a"), s.machine("b")
	s.must(n.Plug(a, "eth0", a4+"/24", a6+"/64"))
	s.must(n.Plug(b, "eth0", b4+"/24", b6+"/64"))
	return n, a, b
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) run(m *lab.Machine, args ...string) string {
	s.t.Helper()
	out, err := m.Run(args...)
	s.must(err)
	return out
}

// ask runs the probe on a machine.
func (s *site) ask(m *lab.Machine, args ...string) string {
	s.t.Helper()
	return s.run(m, append([]string{s.probe}, args...)...)
}

// pings tells whether an address answers within a second.
func (s *site) pings(m *lab.Machine, address string) bool {
	out, err := m.Run(s.probe, "-timeout", "1s", "ping", address, "1", "?")
	return err == nil && out == "1"
}

func (s *site) reach(m *lab.Machine, address string) {
	s.t.Helper()
	if err := lab.WaitFor(5*time.Second, address, func() (bool, error) { return s.pings(m, address), nil }); err != nil {
		s.t.Errorf("%s does not reach it: %v", m.Name, err)
	}
}

func (s *site) mac(m *lab.Machine, link string) string {
	s.t.Helper()
	mac, err := m.MAC(link)
	s.must(err)
	return mac
}

// TestDumbSwitch: whatever a frame carries, the LAN passes it on as it is, and nothing of its own.
func TestDumbSwitch(t *testing.T) {
	s := newSite(t)
	_, a, b := s.pair()
	for _, m := range []*lab.Machine{a, b} { // they would speak of themselves
		s.run(m, "sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=1")
	}
	c := b.Capture(t, "eth0")
	head := "0208aabbccdd" + "0208aabbccee" // neither is anybody's
	frames := map[string]string{
		"an unknown destination": head + "88b5",
		"a VLAN tag":             head + "8100" + "0064" + "88b5",
		"two VLAN tags":          head + "88a8" + "0065" + "8100" + "0066" + "88b5",
		"a priority tag":         head + "8100" + "a000" + "88b5",
		"an unjoined group":      "01005e7f0009" + "0208aabbccee" + "0800" + "4500001c000000000111000c" + "c6120001" + "effF0009",
		"an IPv6 group":          "3333deadbeef" + "0208aabbccee" + "86dd" + "6000000000003bff",
		"LLDP":                   "0180c200000e" + "0208aabbccee" + "88cc",
	}
	for what, frame := range frames {
		mark := "mark of " + what
		s.ask(a, "send", "link", "eth0", frame+fmt.Sprintf("%x", mark+strings.Repeat(" ", 40)))
		got := c.Saw(t, lab.Frames().Received().Carrying(mark))
		if want := strings.ToLower(frame); !strings.HasPrefix(fmt.Sprintf("%x", got.Data), want) {
			t.Errorf("%s: %s came as %x", what, want, got.Data)
		}
	}
	c.Saw(t, lab.Frames().VLAN(0x64))
	c.Saw(t, lab.Frames().VLAN(0x65))
	c.AllFrames(t, "is what was sent", lab.Frames().Received().Carrying("mark of "))
}

// TestUnplug: a link that is taken out and put in again comes back with its name, and with its MAC
// address or another.
func TestUnplug(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	before := s.mac(b, "eth0")
	s.reach(a, b4)

	s.must(n.Unplug(b, "eth0"))
	if out, err := b.Run("ip", "link", "show", "eth0"); err == nil {
		t.Errorf("an unplugged link is still there: %s", out)
	}
	if s.pings(a, b4) {
		t.Error("an unplugged machine answers")
	}
	s.must(n.Plug(b, "eth0", b4+"/24"))
	if now := s.mac(b, "eth0"); now != before {
		t.Errorf("the link had MAC %s and comes back with %s", before, now)
	}
	s.reach(a, b4)

	const other, third = "02:08:00:00:00:01", "02:08:00:00:00:02"
	s.must(n.Unplug(b, "eth0"))
	s.must(n.PlugAs(b, "eth0", other, b4+"/24"))
	if out := s.ask(a, "arp", "eth0", b4); out != other {
		t.Errorf("%s answers for the link that was plugged as %s", out, other)
	}
	s.must(b.SetMAC("eth0", third))
	if out := s.ask(a, "arp", "eth0", b4); out != third {
		t.Errorf("%s answers for the link whose MAC address was set to %s", out, third)
	}

	s.must(n.Cut(b, "eth0"))
	if s.pings(a, b4) {
		t.Error("a machine answers without a cable")
	}
	if out := s.run(b, "ip", "-o", "link", "show", "eth0"); !strings.Contains(out, "NO-CARRIER") {
		t.Errorf("a link without a cable has a carrier: %s", out)
	}
	s.must(n.Mend(b, "eth0"))
	s.run(a, "ip", "neigh", "flush", "all") // nobody has told it of the other address
	s.reach(a, b4)
	if err := n.Cut(b, "eth7"); err == nil {
		t.Error("a link that is not plugged could be cut")
	}
}

// TestNeighbours: the probe tells who answers for an address, and how many answer ping.
func TestNeighbours(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	mac := s.mac(b, "eth0")
	for _, question := range [][]string{{"arp", "eth0", b4}, {"nd", "eth0", b6}} {
		if out := s.ask(a, question...); out != mac {
			t.Errorf("%s: %q answers, want %s", question, out, mac)
		}
	}
	twin := s.machine("twin")
	s.must(n.Plug(twin, "eth0", b4+"/24", b6+"/64"))
	for _, question := range [][]string{{"arp", "eth0", b4}, {"nd", "eth0", b6}} {
		if out := s.ask(a, question...); !strings.Contains(out, mac) || !strings.Contains(out, s.mac(twin, "eth0")) {
			t.Errorf("%s: two have the address, and %q answer", question, out)
		}
	}
	for _, question := range [][]string{{"arp", "eth0", "198.18.0.9"}, {"nd", "eth0", "fd00:18::9"}} {
		if out, err := a.Run(append([]string{s.probe, "-timeout", "300ms"}, question...)...); err == nil {
			t.Errorf("%s: %s answers for an address that nobody has", question, out)
		}
	}
	c := b.Capture(t, "eth0")
	for _, address := range []string{b4, b6} {
		s.run(twin, "ip", "address", "flush", "dev", "eth0")
		s.reach(a, address)
		if out := s.ask(a, "ping", address, "3", "the mark"); out != "3" {
			t.Errorf("of 3 pings to %s %s were answered", address, out)
		}
		if got := c.Count(lab.EchoRequest().To(address).Received().Carrying("the mark")); got != 3 {
			t.Errorf("of 3 pings to %s %d were seen", address, got)
		}
	}
}

// TestRouter: a router forwards between two LANs and back into one, counts, drops what it is told
// to, and can be dead.
func TestRouter(t *testing.T) {
	s := newSite(t)
	left, right := s.lan("left"), s.lan("right")
	r, err := s.Router("router")
	s.must(err)
	s.must(r.Plug(left, "eth0", "198.18.0.254/24", "fd00:18::254/64"))
	s.must(r.Plug(right, "eth1", "198.18.1.254/24", "fd00:18:1::254/64"))
	a, near, far := s.machine("a"), s.machine("near"), s.machine("far")
	s.must(left.Plug(a, "eth0", a4+"/24", a6+"/64"))
	s.must(left.Plug(near, "eth0", b4+"/24", b6+"/64"))
	s.must(right.Plug(far, "eth0", "198.18.1.1/24", "fd00:18:1::1/64"))
	ways := map[string]string{b4: a4, b6: a6, "198.18.1.1": a4, "fd00:18:1::1": a6}
	for _, m := range []*lab.Machine{a, near} { // they reach each other only by way of the router
		s.run(m, "sysctl", "-qw", "net.ipv4.conf.all.accept_redirects=1", "net.ipv4.conf.eth0.accept_redirects=1", "net.ipv6.conf.eth0.accept_redirects=1")
		_, err := m.Script(`
for other in 1 2; do ip route add 198.18.0.$other via 198.18.0.254; ip route add fd00:18::$other via fd00:18::254; done
ip route add default via 198.18.0.254; ip route add default via fd00:18::254`)
		s.must(err)
	}
	_, err = far.Script("ip route add default via 198.18.1.254; ip route add default via fd00:18:1::254")
	s.must(err)

	seen := a.Capture(t, "eth0")
	for to, from := range ways {
		s.reach(a, to)
		before, err := r.Forwarded(from, to)
		s.must(err)
		s.ask(a, "ping", to, "5", "?")
		if now, err := r.Forwarded(from, to); err != nil || now != before+5 {
			t.Errorf("of 5 packets from %s to %s %d were counted: %v", from, to, now-before, err)
		}
	}
	if n, err := r.Forwarded(a4, "198.18.0.99"); err != nil || n != 0 {
		t.Errorf("%d packets were counted that nobody sent: %v", n, err)
	}
	seen.Never(t, lab.ICMPType(5))
	seen.Never(t, lab.ICMPv6Type(137))

	for to, from := range ways {
		family := "ip"
		if strings.Contains(to, ":") {
			family = "ip6"
		}
		rule, err := r.Drop(fmt.Sprintf("%s saddr %s %s daddr %s", family, from, family, to))
		s.must(err)
		passed, err := r.Forwarded(from, to)
		s.must(err)
		if s.pings(a, to) {
			t.Errorf("the router forwards to %s what it is to drop", to)
		}
		if n, err := rule.Dropped(); err != nil || n != 1 {
			t.Errorf("the rule dropped %d packets to %s, want 1: %v", n, to, err)
		}
		if n, err := r.Forwarded(from, to); err != nil || n != passed {
			t.Errorf("what is dropped is counted as forwarded: %v", err)
		}
		s.must(rule.Remove())
		s.reach(a, to)
	}
	s.must(r.Die())
	for to := range ways {
		if s.pings(a, to) {
			t.Errorf("%s is reached through a dead router", to)
		}
	}
	s.must(r.Revive())
	for to := range ways {
		s.reach(a, to)
	}
}

// TestVLAN: a machine is a member of VLANs on a trunk, beside the LAN that is not tagged. Full-size
// packets, segments in numbers and groups pass.
func TestVLAN(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	for _, id := range []int{20, 30} {
		for i, m := range []*lab.Machine{a, b} {
			p, err := n.VLAN(m, "eth0", id, fmt.Sprintf("198.18.%d.%d/24", id, i+1), fmt.Sprintf("fd00:18:%d::%d/64", id, i+1))
			s.must(err)
			t.Cleanup(func() {
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wire := b.Capture(t, "eth0")
	inside := b.Capture(t, "eth0.20")
	for _, to := range []string{b4, "198.18.20.2", "198.18.30.2", b6, "fd00:18:20::2", "fd00:18:30::2"} {
		s.reach(a, to)
	}
	wire.Saw(t, lab.EchoRequest().To(b4).Untagged().Received())
	wire.Saw(t, lab.EchoReply().From(b4).Untagged().Sent())
	wire.Saw(t, lab.ARPRequest().To("198.18.20.2").VLAN(20).Received())
	wire.Saw(t, lab.EchoRequest().To("198.18.20.2").VLAN(20).Received().DestinationMAC(s.mac(b, "eth0")))
	wire.Saw(t, lab.EchoReply().From("198.18.20.2").VLAN(20).Sent().SourceMAC(s.mac(b, "eth0")))
	wire.Saw(t, lab.NeighbourSolicitation().About("fd00:18:30::2").VLAN(30).Received())
	wire.Never(t, lab.Either(lab.Frames().To("198.18.20.2"), lab.Frames().To("198.18.30.2")).Untagged())
	inside.AllFrames(t, "is of VLAN 20, its tag taken off", lab.Not(lab.Either(lab.Frames().To(b4), lab.Frames().To("198.18.30.2"))).Untagged())

	// What the sender leaves to its link to cut and to sum up reaches the tagging program whole, as it
	// would from a wire.
	wire.Forget()
	for _, address := range []string{"198.18.20.2:90", b4 + ":91"} {
		stream, err := s.Stream(a, b, address)
		s.must(err)
		_, err = stream.End()
		s.must(err)
	}
	segments := wire.Where(lab.TCP().Received().Untagged())
	segments.AllFrames(t, "fits the link", lab.Frames().That("at most 1514 bytes", func(f lab.Frame) bool { return len(f.Data) <= 1514 }))
	segments.AllFrames(t, "is summed up", lab.Frames().That("with right checksums", func(f lab.Frame) bool {
		p := gopacket.NewPacket(f.Data, layers.LayerTypeEthernet, gopacket.Default)
		if tcp, ok := p.TransportLayer().(*layers.TCP); !ok || tcp.SetNetworkLayerForChecksum(p.NetworkLayer()) != nil {
			return false
		}
		err, wrong := p.VerifyChecksums()
		return err == nil && len(wrong) == 0
	}))
}
