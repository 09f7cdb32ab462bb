package fastpath_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// openers are the ways that kernels have for it.
var openers = map[string]opener{"tcx": fastpath.Open, "clsact": fastpath.OpenClsact}

// A census counts the frames that come to the bridge, by what is in them.
type census map[string]int

func (h *host) startCensus(t testing.TB) {
	t.Helper()
	h.over.load(t, `table bridge census {
	counter n_tcp {}
	counter n_udp {}
	counter n_icmp {}
	counter n_arp {}
	counter n_fragment {}
	chain prerouting {
		type filter hook prerouting priority -400
		ether type ip ip frag-off & 0x3fff != 0 counter name n_fragment
		ether type ip6 exthdr frag exists counter name n_fragment
		ether type arp counter name n_arp
		meta l4proto { icmp, ipv6-icmp } counter name n_icmp
		meta l4proto tcp counter name n_tcp
		meta l4proto udp counter name n_udp
	}
}`)
}

var counterForm = regexp.MustCompile(`counter n_(\w+) \{\s+packets (\d+)`)

// census gives the counts since the last time.
func (h *host) census(t testing.TB) census {
	t.Helper()
	out := census{}
	for _, m := range counterForm.FindAllStringSubmatch(h.over.run(t, "nft reset counters table bridge census"), -1) {
		out[m[1]], _ = strconv.Atoi(m[2])
	}
	if len(out) != 5 {
		t.Fatalf("the counters are gone: %v", out)
	}
	return out
}

// slowly checks how many frames of a kind the bridges of both hosts have seen since the last time.
func slowly(t testing.TB, hosts [2]*host, what, kind string, wanted bool) {
	t.Helper()
	n := hosts[0].census(t)[kind] + hosts[1].census(t)[kind]
	if wanted != (n > 0) {
		t.Errorf("%s: the bridges see %d frames of %s", what, n, kind)
	}
}

// hear opens a UDP port in the place.
func (p *place) hear(t testing.TB, address string, port int) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	p.do(t, func() (err error) {
		c, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(address), Port: port})
		return err
	})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// say sends datagrams from a port of a socket.
func say(t testing.TB, from *net.UDPConn, to *net.UDPConn, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if _, err := from.WriteTo([]byte(text), to.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
}

// hears expects the next datagrams.
func hears(t testing.TB, what string, c *net.UDPConn, texts ...string) {
	t.Helper()
	b := make([]byte, 1<<16)
	for _, text := range texts {
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := c.ReadFrom(b)
		if err != nil {
			t.Fatalf("%s: %.20q: %v", what, text, err)
		}
		if got := string(b[:n]); got != text {
			t.Fatalf("%s: %.20q (%d bytes) arrives, not %.20q", what, got, n, text)
		}
	}
}

// transferTCP sends so many bytes over a connection, and checks them.
func transferTCP(t testing.TB, from, to *place, address string, size int) {
	t.Helper()
	var l net.Listener
	to.do(t, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	defer l.Close()
	data := bytes.Repeat([]byte("0123456789abcdef~"), size/17+1)[:size]
	result := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			result <- err
			return
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if err == nil && !bytes.Equal(got, data) {
			err = fmt.Errorf("%d bytes arrive, or others, not %d", len(got), size)
		}
		result <- err
	}()
	var c net.Conn
	from.do(t, func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	_, err := c.Write(data)
	if err := errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-result:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("TCP to %s: not within 20 s", address)
	}
}

// A pair is a way between two containers.
type pair struct {
	name     string
	from, to *place
	address  string
	source   string
}

func pairs(hosts [2]*host) []pair {
	a, b, far := hosts[0].containers[0], hosts[0].containers[1], hosts[1].containers[0]
	return []pair{
		{"one host, IPv4", a, b, ip4(0, 1), ip4(0, 0)},
		{"one host, IPv6", a, b, ip6(0, 1), ip6(0, 0)},
		{"two hosts, IPv4", a, far, ip4(1, 0), ip4(0, 0)},
		{"two hosts, IPv6", a, far, ip6(1, 0), ip6(0, 0)},
	}
}

// lab makes two hosts with rules and a census; of the first's fast path there is a handle.
func lab(t testing.TB, how opener) (hosts [2]*host, first *fastpath.Path) {
	t.Helper()
	hosts = twoHosts(t, 2)
	for _, h := range hosts {
		h.bridgeNF(t, false)
		h.rules(t)
		h.startCensus(t)
		p := h.open(t, how)
		h.attach(t, p)
		if first == nil {
			first = p
		}
	}
	return hosts, first
}

func forEach(t *testing.T, f func(t *testing.T, how opener)) {
	for name, how := range openers {
		t.Run(name, func(t *testing.T) { f(t, how) })
	}
}

// What is TCP or UDP is not seen by the bridge once there is a fast path, and is seen without.
func TestPasses(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts := twoHosts(t, 2)
		for _, h := range hosts {
			h.bridgeNF(t, false)
			h.rules(t)
			h.startCensus(t)
		}
		all := func(when string, slow bool) {
			for _, p := range pairs(hosts) {
				what := when + ": " + p.name
				transferTCP(t, p.from, p.to, p.address, 1000)
				slowly(t, hosts, what, "tcp", slow)
				ear, mouth := p.to.hear(t, p.address, 0), p.from.hear(t, p.source, 0)
				say(t, mouth, ear, "there")
				hears(t, what, ear, "there")
				say(t, ear, mouth, "back")
				hears(t, what, mouth, "back")
				slowly(t, hosts, what, "udp", slow)
			}
		}
		all("without", true)
		var paths []*fastpath.Path
		for _, h := range hosts {
			p := h.open(t, how)
			h.attach(t, p)
			h.attach(t, p) // again is fine
			paths = append(paths, p)
		}
		all("attached", false)
		for i := range hosts {
			for _, link := range []string{"dwv0", "dwv1", "dwx1", "nothing"} {
				if err := paths[i].Detach(link); err != nil {
					t.Fatal(err)
				}
			}
			if s := list(t, paths[i]); len(s.Ports)+len(s.VXLAN)+len(s.Remote)+len(s.Half) > 0 {
				t.Errorf("after Detach there is %+v", s)
			}
		}
		all("detached", true)
	})
}

func list(t testing.TB, p *fastpath.Path) fastpath.State {
	t.Helper()
	s, err := p.List()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Packets as large as TCP makes them stay so, and all bytes arrive.
func TestSegmentationOffload(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, _ := lab(t, how)
		const size = 16 << 20
		for _, p := range pairs(hosts) {
			before := packets(t, p.from, "eth0")
			transferTCP(t, p.from, p.to, p.address, size)
			slowly(t, hosts, p.name, "tcp", false)
			if n := packets(t, p.from, "eth0") - before; n > size/1400/4 {
				t.Errorf("%s: %d MiB are sent in %d packets", p.name, size>>20, n)
			}
		}
	})
}

// packets is how many a link of the place has sent.
func packets(t testing.TB, p *place, link string) int {
	t.Helper()
	text := p.run(t, "ip -s link show "+link+" | awk '/TX:/ { getline; print $2 }' | head -1")
	n, err := strconv.Atoi(text[:len(text)-1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What is not plain TCP or UDP goes by the bridge, and arrives.
func TestSlow(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, _ := lab(t, how)
		a := hosts[0].containers[0]
		for _, p := range pairs(hosts) {
			a.ping(t, p.address)
			slowly(t, hosts, p.name, "icmp", true)

			ear, mouth := p.to.hear(t, p.address, 0), a.hear(t, p.source, 0)
			long := string(bytes.Repeat([]byte("fragment"), 1000))
			say(t, mouth, ear, long, "short")
			var got []string
			for range 2 {
				got = append(got, next(t, ear))
			}
			slices.Sort(got) // the short one may be first: fragments take another way
			if got[0] != long || got[1] != "short" {
				t.Errorf("%s: of a datagram in fragments and one that is whole there arrive %d bytes and %.20q", p.name, len(got[0]), got[1])
			}
			slowly(t, hosts, p.name, "fragment", true)

			if p.address == ip4(0, 1) || p.address == ip4(1, 0) {
				setOption(t, mouth)
				say(t, mouth, ear, "with an option")
				hears(t, p.name, ear, "with an option")
				slowly(t, hosts, p.name+", option", "udp", true)
			}
		}
		a.run(t, "ip neigh flush dev eth0 nud permanent")
		ear, mouth := hosts[0].containers[1].hear(t, ip4(0, 1), 0), a.hear(t, ip4(0, 0), 0)
		say(t, mouth, ear, "after ARP")
		hears(t, "ARP", ear, "after ARP")
		slowly(t, hosts, "ARP", "arp", true)
	})
}

// ping sends an echo request (RFC 792, RFC 4443) and expects the reply.
func (p *place) ping(t testing.TB, address string) {
	t.Helper()
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if netip.MustParseAddr(address).Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var c net.Conn
	p.do(t, func() (err error) {
		c, err = net.Dial(network, address)
		return err
	})
	defer c.Close()
	message := []byte{request, 0, 0, 0, 0, 7, 0, 1}
	binary.BigEndian.PutUint16(message[2:], checksum(message)) // the kernel knows better for IPv6
	_, err := c.Write(message)
	if err := errors.Join(err, c.SetReadDeadline(time.Now().Add(5*time.Second))); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 1500); ; {
		n, err := c.Read(b)
		if err != nil {
			t.Fatalf("ping %s: %v", address, err)
		}
		got := b[:n]
		if reply == 0 {
			got = got[20:] // behind the IPv4 header
		}
		if len(got) == len(message) && got[0] == reply && bytes.Equal(got[4:], message[4:]) {
			return
		}
	}
}

func next(t testing.TB, c *net.UDPConn) string {
	t.Helper()
	b := make([]byte, 1<<16)
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, _, err := c.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// setOption has a socket send IPv4 options: no operation, four times.
func setOption(t testing.TB, c *net.UDPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	if err := raw.Control(func(fd uintptr) {
		failure = unix.SetsockoptString(int(fd), unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x01")
	}); err != nil || failure != nil {
		t.Fatal(err, failure)
	}
}

// A datagram is one of UDP that is written byte by byte.
type datagram struct {
	from, to       plan.MAC
	source, target string
	ports          [2]uint16
	text           string
}

func (d datagram) frame() []byte {
	source, target := netip.MustParseAddr(d.source), netip.MustParseAddr(d.target)
	b := append(slices.Clone(d.to[:]), d.from[:]...)
	udp := binary.BigEndian.AppendUint16(nil, d.ports[0])
	udp = binary.BigEndian.AppendUint16(udp, d.ports[1])
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(d.text)))
	udp = append(append(udp, 0, 0), d.text...)
	pseudo := append(append(source.AsSlice(), target.AsSlice()...), 0, unix.IPPROTO_UDP)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	if source.Is6() {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IPV6)
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(len(udp)))
		b = append(b, unix.IPPROTO_UDP, 64)
		b = append(append(b, source.AsSlice()...), target.AsSlice()...)
		return append(b, udp...)
	}
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
	header := []byte{0x45, 0}
	header = binary.BigEndian.AppendUint16(header, uint16(20+len(udp)))
	header = append(header, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	header = append(append(header, source.AsSlice()...), target.AsSlice()...)
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return append(append(b, header...), udp...)
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// inject sends a frame from the place's eth0.
func (p *place) inject(t testing.TB, frame []byte) {
	t.Helper()
	p.do(t, func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Index})
	})
}

// What is not the port's own, and a DHCP server's answers, are left to the rules, which drop them.
func TestPortSecurity(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, _ := lab(t, how)
		a := hosts[0].containers[0]
		for _, p := range pairs(hosts) {
			to := mac(0, 1)
			if p.to == hosts[1].containers[0] {
				to = mac(1, 0)
			}
			foreign, neighbour, server, client := "198.19.0.99", ip4(0, 1), uint16(67), uint16(68)
			if netip.MustParseAddr(p.address).Is6() {
				foreign, neighbour, server, client = "fd00:90::99", ip6(0, 1), 547, 546
			}
			ear := p.to.hear(t, p.address, 99)
			own := datagram{from: mac(0, 0), to: to, source: p.source, target: p.address, ports: [2]uint16{99, 99}, text: "own"}
			a.inject(t, own.frame())
			hears(t, p.name, ear, "own")
			slowly(t, hosts, p.name+", own", "udp", false)
			for what, change := range map[string]func(*datagram){
				"foreign source":      func(d *datagram) { d.source = foreign },
				"a neighbour's":       func(d *datagram) { d.source = neighbour },
				"foreign MAC":         func(d *datagram) { d.from = plan.MAC{2, 9, 9, 9, 9, 9} },
				"a neighbour's MAC":   func(d *datagram) { d.from = mac(0, 1) },
				"a neighbour's, both": func(d *datagram) { d.from, d.source = mac(0, 1), neighbour },
				"unspecified source":  func(d *datagram) { d.source = unspecified(d.source) },
				"DHCP server":         func(d *datagram) { d.ports = [2]uint16{server, client} },
				"its other port":      func(d *datagram) { d.ports[1] = client },
				"to itself":           func(d *datagram) { d.to = mac(0, 0) },
				"unknown MAC":         func(d *datagram) { d.to = plan.MAC{2, 9, 9, 9, 9, 9} },
			} {
				d := own
				d.text = what
				change(&d)
				a.inject(t, d.frame())
				slowly(t, hosts, p.name+", "+what, "udp", true)
			}
			// A tag that only tells a priority, which a container would overlook.
			tagged := datagram{from: own.from, to: own.to, source: own.source, target: own.target, ports: own.ports, text: "tagged"}.frame()
			a.inject(t, slices.Insert(tagged, 12, 0x81, 0, 0xe0, 0))
			slowly(t, hosts, p.name+", tagged", "udp", true)
			a.inject(t, own.frame())
			hears(t, p.name+", after what is dropped", ear, "own")
		}
	})
}

func unspecified(a string) string {
	if netip.MustParseAddr(a).Is6() {
		return "::"
	}
	return "0.0.0.0"
}

// A MAC that is removed goes by the bridge from the next packet on, to and from, and so does one that
// was never known.
func TestRemove(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, path := lab(t, how)
		ear, mouth := hosts[1].containers[0].hear(t, ip4(1, 0), 0), hosts[0].containers[0].hear(t, ip4(0, 0), 0)
		try := func(what string, there, back bool) {
			t.Helper()
			for range 20 {
				say(t, mouth, ear, "x")
				hears(t, what, ear, "x")
			}
			if n := hosts[0].census(t)["udp"]; n != map[bool]int{false: 0, true: 20}[there] {
				t.Errorf("%s: %d of 20 frames go out by the bridge", what, n)
			}
			for range 20 {
				say(t, ear, mouth, "y")
				hears(t, what, mouth, "y")
			}
			if n := hosts[0].census(t)["udp"]; n != map[bool]int{false: 0, true: 20}[back] {
				t.Errorf("%s: %d of 20 frames come in by the bridge", what, n)
			}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		try("attached", false, false)
		must(path.Remove("dwx1", mac(1, 0)))
		try("the other's MAC removed", true, false)
		must(path.Put("dwx1", mac(1, 0)))
		try("the other's MAC put", false, false)
		must(path.Remove("dwv0", mac(0, 0), mac(7, 7), mac(1, 0)))
		try("the port's MAC removed", true, true)
		if s := list(t, path); !slices.Equal(s.Half, []string{"dwv0"}) {
			t.Errorf("with the port's MAC removed, half attached are %q", s.Half)
		}
		must(path.Attach(hosts[0].port(0)))
		try("attached again", false, false)
		other := hosts[0].port(0)
		other.Addresses = []netip.Addr{netip.MustParseAddr("198.19.0.77"), other.Addresses[1]}
		must(path.Attach(other))
		try("attached with another address", true, false)
		other.Addresses = other.Addresses[1:]
		must(path.Attach(other))
		try("attached without IPv4", true, true)
		must(path.Attach(hosts[0].port(0)))
		must(path.Detach("dwx1"))
		try("VXLAN device detached", true, true)
	})
}

// A container has its IPv6 addresses, each, and no third.
func TestTwoAddresses(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, path := lab(t, how)
		a, b := hosts[0].containers[0], hosts[0].containers[1]
		first, second := ip6(0, 0), "fd00:90::aaaa"
		a.run(t, "ip addr add "+second+"/64 dev eth0 nodad; ip addr add fd00:90::bbbb/64 dev eth0 nodad")
		for _, s := range []string{second, "fd00:90::bbbb"} {
			b.run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent", s, mac(0, 0)))
			hosts[0].over.run(t, fmt.Sprintf("nft add element bridge dockway source6 { dwv0 . %s . %s }", mac(0, 0), s))
		}
		port := hosts[0].port(0)
		port.Addresses = append(port.Addresses, netip.MustParseAddr(second))
		if err := path.Attach(port); err != nil {
			t.Fatal(err)
		}
		if s := list(t, path); fmt.Sprint(s.Ports[0]) != fmt.Sprint(port) {
			t.Errorf("there is %v, not %v", s.Ports[0], port)
		}
		ear := b.hear(t, ip6(0, 1), 0)
		for source, slow := range map[string]bool{first: false, second: false, "fd00:90::bbbb": true} {
			say(t, a.hear(t, source, 0), ear, source)
			hears(t, source, ear, source)
			slowly(t, hosts, source, "udp", slow)
		}
	})
}

// What comes from another host and is not for a container of this one is the bridge's affair.
func TestNotForUs(t *testing.T) {
	forEach(t, func(t *testing.T, how opener) {
		hosts, path := lab(t, how)
		h := hosts[0]
		h.under.run(t, "ip link add dwx2 netns "+h.over.path+" type vxlan id 5002 local "+wire(0)+" dev eth0 dstport 4790 nolearning udpcsum")
		h.over.run(t, "ip link set dwx2 mtu 1450 master dwb1 addrgenmode none up")
		for device, sent := range map[string]int{"dwx1": 0, "dwx2": 1} { // not back where it comes from
			lost := plan.MAC{2, 9, 9, 9, 9, device[3]}
			hosts[1].over.run(t, fmt.Sprintf("bridge fdb replace %[1]s dev dwx1 master static; bridge fdb replace %[1]s dev dwx1 self permanent dst %[2]s", lost, wire(0)))
			h.over.run(t, fmt.Sprintf("bridge fdb replace %[1]s dev %[2]s master static; bridge fdb replace %[1]s dev %[2]s self permanent dst %[3]s", lost, device, wire(1)))
			if err := path.Put(device, lost); err != nil {
				t.Fatal(err)
			}
			h.census(t)
			before := packets(t, h.over, device)
			d := datagram{from: mac(1, 0), to: lost, source: ip4(1, 0), target: ip4(0, 0), ports: [2]uint16{9, 9}, text: "lost"}
			hosts[1].containers[0].inject(t, d.frame())
			eventually(t, "a frame for a MAC behind "+device+" is at the bridge", func() bool { return h.census(t)["udp"] == 1 })
			if n := packets(t, h.over, device) - before; n != sent {
				t.Errorf("%s sends %d frames, not %d", device, n, sent)
			}
		}
	})
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

// A port that has been another's is not reached by the other's MAC.
func TestAnotherMAC(t *testing.T) {
	h := twoHosts(t, 2)[0]
	p := h.open(t, fastpath.Open)
	h.attach(t, p)
	port := h.port(0)
	port.MAC = plan.MAC{2, 0, 0, 0, 0, 9}
	if err := p.Attach(port); err != nil {
		t.Fatal(err)
	}
	s := list(t, p)
	if len(s.Ports) != 2 || s.Ports[0].MAC != port.MAC {
		t.Errorf("after another MAC there is %+v", s)
	}
	h.over.run(t, "ip link del dwv0")
	if s := list(t, p); len(s.Ports) != 1 || len(s.Half) > 0 {
		t.Errorf("without the link there is %+v", s)
	}
}

// A process that is killed leaves all as it is, and the next goes on with it.
func TestKilled(t *testing.T) {
	for name, how := range openers {
		t.Run(name, func(t *testing.T) { killed(t, name, how) })
	}
}

func killed(t *testing.T, name string, how opener) {
	hosts := twoHosts(t, 2)
	for _, h := range hosts {
		h.bridgeNF(t, false)
		h.rules(t)
		h.startCensus(t)
		c, out := h.over.start(t, 0, "attach "+name+" "+strconv.Itoa(h.n)+" /proc/self/ns/net")
		if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
			t.Fatal(err)
		}
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
	}
	all := func(when string) {
		t.Helper()
		for _, p := range pairs(hosts) {
			transferTCP(t, p.from, p.to, p.address, 1000)
			slowly(t, hosts, when+": "+p.name, "tcp", false)
		}
	}
	all("killed")
	for _, h := range hosts {
		p := h.open(t, how)
		s := list(t, p)
		wanted := fastpath.State{
			Ports: []fastpath.Port{h.port(0), h.port(1)}, VXLAN: []string{"dwx1"},
			Remote: map[plan.MAC]string{mac(1-h.n, 0): "dwx1", mac(1-h.n, 1): "dwx1"},
		}
		if fmt.Sprint(s) != fmt.Sprint(wanted) {
			t.Errorf("after a kill there is\n%+v, not\n%+v", s, wanted)
		}
		h.attach(t, p)
		if n := programs(t, h, "dwv0"); n != 1 {
			t.Errorf("after a kill and Attach, %d programs are at the port", n)
		}
	}
	all("found again")
	p := hosts[0].open(t, how)
	if err := p.Detach("dwv0"); err != nil {
		t.Fatal(err)
	}
	transferTCP(t, hosts[0].containers[0], hosts[0].containers[1], ip4(0, 1), 1000)
	slowly(t, hosts, "detached by another process", "tcp", true)
}

// programs counts what is at a link's ingress.
func programs(t testing.TB, h *host, link string) int {
	t.Helper()
	var n int
	h.over.do(t, func() (err error) {
		n, err = fastpath.CountPrograms(link)
		return err
	})
	return n
}

func TestRefuses(t *testing.T) {
	h := twoHosts(t, 1)[0]
	p := h.open(t, fastpath.Open)
	h.over.run(t, "ip link add dwv8 type veth peer name other; ip link set dwv8 master dwb1; ip link add dwv9 type veth peer name another")
	with := func(change func(*fastpath.Port)) fastpath.Port {
		port := h.port(0)
		change(&port)
		return port
	}
	address := func(a ...string) func(*fastpath.Port) {
		return func(p *fastpath.Port) {
			p.Addresses = nil
			for _, a := range a {
				p.Addresses = append(p.Addresses, netip.MustParseAddr(a))
			}
		}
	}
	for what, err := range map[string]error{
		"no link":               p.Attach(with(func(p *fastpath.Port) { p.Link = "nothing" })),
		"no port":               p.Attach(with(func(p *fastpath.Port) { p.Link = "dwv9" })),
		"VXLAN device":          p.Attach(with(func(p *fastpath.Port) { p.Link = "dwx1" })),
		"both ends here":        p.Attach(with(func(p *fastpath.Port) { p.Link = "dwv8" })),
		"multicast MAC":         p.Attach(with(func(p *fastpath.Port) { p.MAC[0] |= 1 })),
		"no MAC":                p.Attach(with(func(p *fastpath.Port) { p.MAC = plan.MAC{} })),
		"unspecified address":   p.Attach(with(address("0.0.0.0"))),
		"unspecified address 6": p.Attach(with(address("::"))),
		"mapped address":        p.Attach(with(address("::ffff:198.19.0.1"))),
		"two IPv4 addresses":    p.Attach(with(address("198.19.0.1", "198.19.0.2"))),
		"three IPv6 addresses":  p.Attach(with(address("fd00::1", "fd00::2", "fd00::3"))),
		"VXLAN on a port":       p.AttachVXLAN("dwv0"),
		"remote on a port":      p.Put("dwv0", mac(1, 0)),
		"remote multicast":      p.Put("dwx1", plan.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
	} {
		if err == nil {
			t.Errorf("%s is taken", what)
		}
	}
	if s := list(t, p); len(s.Ports)+len(s.VXLAN)+len(s.Remote) > 0 {
		t.Errorf("after refusals there is %+v", s)
	}
	many := make([]plan.MAC, 1<<16+1)
	for i := range many {
		many[i] = plan.MAC{2, 1, 0, byte(i >> 16), byte(i >> 8), byte(i)}
	}
	if err := p.Put("dwx1", many...); !errors.Is(err, fastpath.ErrFull) {
		t.Errorf("%d MACs: %v", len(many), err)
	}
	if n := len(list(t, p).Remote); n != 1<<16 {
		t.Errorf("a full table has %d MACs", n)
	}
}

func TestUnsupported(t *testing.T) {
	h := twoHosts(t, 1)[0]
	file, err := os.Open(h.over.path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, refusal := range []error{unix.EPERM, unix.EINVAL, unix.ENOSYS} {
		if p, err := fastpath.OpenRefused(file, "dwb1", refusal); !errors.Is(err, fastpath.ErrUnsupported) || !errors.Is(err, refusal) {
			t.Errorf("%v: %v, %v", refusal, p, err)
		}
	}
	if _, err := fastpath.Open(file, "nothing"); err == nil || errors.Is(err, fastpath.ErrUnsupported) {
		t.Errorf("no bridge: %v", err)
	}
}

// TestBusyNamespace: links that come and go beside do not keep anybody from what is there.
func TestBusyNamespace(t *testing.T) {
	h := twoHosts(t, 1)[0]
	p := h.open(t, fastpath.Open)
	h.attach(t, p)
	h.over.run(t, "for i in $(seq 100); do echo link add other$i type bridge; done | ip -batch -")
	var churn *exec.Cmd
	h.over.do(t, func() error {
		churn = exec.Command("sh", "-c", "while :; do for i in $(seq 100); do echo link add here type bridge; echo link del here; done; done | ip -batch -")
		churn.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		return churn.Start()
	})
	defer func() { _ = churn.Wait() }()
	defer func() { _ = syscall.Kill(-churn.Process.Pid, syscall.SIGKILL) }()
	for range 100 {
		if got := list(t, p); len(got.Ports) != 1 || len(got.VXLAN) != 1 {
			t.Fatalf("there is %+v", got)
		}
		h.open(t, fastpath.Open)
	}
}
