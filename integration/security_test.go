package integration

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// Frames and packets, as octets.

const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd
)

func ethernet(to, from string, kind uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(hardware(to), hardware(from)...), kind), payload...)
}

func hardware(mac string) []byte {
	b, err := net.ParseMAC(mac)
	if err != nil {
		panic(err)
	}
	return b
}

// ip makes a packet of the addresses' family, and the frame's kind for it.
func ip(protocol byte, from, to string, payload []byte) (uint16, []byte) {
	src, dst := netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice()
	var b []byte
	if len(src) == net.IPv6len {
		b = binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(payload)))
		b = append(b, protocol, 255) // neighbour discovery asks for 255 hops
	} else {
		b = binary.BigEndian.AppendUint16([]byte{0x45, 0}, uint16(20+len(payload)))
		b = append(b, 0, 0, 0, 0, 64, protocol, 0, 0)
	}
	b = append(append(b, src...), dst...)
	if len(src) == net.IPv4len {
		binary.BigEndian.PutUint16(b[10:], checksum(b))
		return etherIPv4, append(b, payload...)
	}
	return etherIPv6, append(b, payload...)
}

func ipFrame(toMAC, fromMAC string, protocol byte, from, to string, payload []byte) []byte {
	kind, packet := ip(protocol, from, to, payload)
	return ethernet(toMAC, fromMAC, kind, packet)
}

// checksum is the internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// summed fills in the checksum of a UDP, TCP or ICMPv6 message, at an offset in it.
func summed(protocol byte, from, to string, offset int, message []byte) []byte {
	pseudo := append(netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice()...)
	pseudo = append(binary.BigEndian.AppendUint32(pseudo, uint32(len(message))), 0, 0, 0, protocol)
	binary.BigEndian.PutUint16(message[offset:], checksum(append(pseudo, message...)))
	return message
}

// udp makes a frame with a datagram.
func udp(toMAC, fromMAC, from string, fromPort uint16, to string, toPort uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, fromPort)
	b = binary.BigEndian.AppendUint16(b, toPort)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	b = append(append(b, 0, 0), text...)
	return ipFrame(toMAC, fromMAC, 17, from, to, summed(17, from, to, 6, b))
}

// content is what an IPv4 or IPv6 frame carries: the protocol, addresses and payload.
type content struct {
	protocol byte
	from, to string
	payload  []byte
}

func parse(frame []byte) (content, bool) {
	if len(frame) < 34 {
		return content{}, false
	}
	addr := func(b []byte) string { a, _ := netip.AddrFromSlice(b); return a.String() }
	b := frame[14:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == etherIPv4:
		return content{b[9], addr(b[12:16]), addr(b[16:20]), b[int(b[0]&15)*4:]}, true
	case kind == etherIPv6 && len(b) >= 40:
		return content{b[6], addr(b[8:24]), addr(b[24:40]), b[40:]}, true
	}
	return content{}, false
}

// sendFrames sends frames on a link, in their order.
func sendFrames(t *testing.T, f from, link string, frames ...[]byte) {
	t.Helper()
	args := []string{"send", "link", link}
	for _, frame := range frames {
		args = append(args, hex.EncodeToString(frame))
	}
	if out, err := f(args...); err != nil {
		t.Fatalf("send frames: %s: %v", out, err)
	}
}

// mac is a link's hardware address.
func mac(t *testing.T, run func(...string) (string, error), link string) string {
	t.Helper()
	out, err := run("cat", "/sys/class/net/"+link+"/address")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// exec prepares a command in a container.
func (h *host) exec(container string) func(...string) (string, error) {
	return func(args ...string) (string, error) {
		return h.Docker(append([]string{"exec", container}, args...)...)
	}
}

// linkWith is the link of the host that has an address.
func (h *host) linkWith(address string) string {
	h.t.Helper()
	out, err := h.Run("ip", "-o", "address", "show", "to", address)
	if err != nil || len(strings.Fields(out)) < 2 {
		h.t.Fatalf("no link has %s: %s, %v", address, out, err)
	}
	return strings.Fields(out)[1]
}

// watcher collects the frames that come in on a link.
type watcher struct {
	t    *testing.T
	cmd  *exec.Cmd
	text chan []byte // what the probe has said, when it has ended
}

// watchIn watches a container's link until a frame comes with the words end in it.
func (h *host) watchIn(container, link, end string) *watcher { //nolint:unparam // the call says which end, as of watchOn
	h.t.Helper()
	return watch(h.t, h.Machine, []string{"docker", "exec", container, "/probe"}, "link", link, end)
}

// watchOn watches a machine's link likewise.
func watchOn(t *testing.T, m *lab.Machine, link, end string) *watcher {
	t.Helper()
	return watch(t, m, []string{shared.probe}, "link", link, end)
}

func watch(t *testing.T, m *lab.Machine, probe []string, what ...string) *watcher {
	t.Helper()
	w := &watcher{t: t, cmd: m.Command(t.Context(), slices.Concat(probe, []string{"-timeout", "120s", "watch"}, what)...), text: make(chan []byte, 1)}
	pipe, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(pipe)
	w.cmd.Stderr = &bytes.Buffer{}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := out.ReadString('\n'); line != "watching\n" {
		t.Fatalf("the watch does not start: %q, %v: %s", line, err, w.cmd.Stderr)
	}
	// Read at once: a probe whose pipe is full stops looking, and its socket drops what it does not take.
	go func() {
		text, _ := io.ReadAll(out)
		w.text <- text
	}()
	return w
}

// frames waits for the end, and gives what came before it.
func (w *watcher) frames() [][]byte {
	w.t.Helper()
	text := <-w.text
	if err := w.cmd.Wait(); err != nil {
		w.t.Fatalf("watch: %v: %s", err, w.cmd.Stderr)
	}
	var all [][]byte
	for line := range strings.FieldsSeq(string(text)) {
		frame, err := hex.DecodeString(line)
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, frame)
	}
	return all
}

// said are the marks among these that were in frames.
func (w *watcher) said(marks ...string) []string {
	w.t.Helper()
	frames := bytes.Join(w.frames(), []byte{'\n'})
	var found []string
	for _, m := range marks {
		if bytes.Contains(frames, []byte(m)) {
			found = append(found, m)
		}
	}
	return found
}

// TestDefaultFirewall: of unasked packets only certain protocols come in, from whomever; everything
// goes out; and answers come back.
func TestDefaultFirewall(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("guard", "--subnet", "198.19.30.0/24", "--ipv6", "--subnet", "fd00:19:30::/64")
		h.client("guard-a", "guard", "--ip", "198.19.30.11", "--ip6", "fd00:19:30::11")
		h.client("guard-b", "guard", "--ip", "198.19.30.12", "--ip6", "fd00:19:30::12")
		h.client("guard-c", "guard", "--ip", "198.19.30.13", "--ip6", "fd00:19:30::13")
		a4, a6, aMAC := h.address("guard-a", "guard"), h.address6("guard-a", "guard"), mac(t, h.exec("guard-a"), "eth0")
		b4, b6, bMAC := h.address("guard-b", "guard"), h.address6("guard-b", "guard"), mac(t, h.exec("guard-b"), "eth0")
		c4, c6, cMAC := h.address("guard-c", "guard"), h.address6("guard-c", "guard"), mac(t, h.exec("guard-c"), "eth0")
		const gateway4, gateway6 = "198.19.30.1", "fd00:19:30::1"
		gatewayMAC, peerMAC, hostMAC := mac(t, h.Run, h.linkWith(gateway4)), mac(t, shared.peer.Run, "eth0"), mac(t, h.Run, "eth0")
		allowed4, allowed6 := []byte{1, 2, 6, 17}, []byte{6, 17, 58}

		message := func(text string) []byte { return append(make([]byte, 8), text...) }
		seen := h.watchIn("guard-c", "eth0", "the end")
		sendFrames(t, h.in("guard-c"), "eth0",
			ipFrame(aMAC, cMAC, 253, c4, a4, message("?")), ipFrame(aMAC, cMAC, 253, c6, a6, message("?")), ipFrame(aMAC, cMAC, 47, c4, a4, message("?")),
			ipFrame(gatewayMAC, cMAC, 253, c4, peer4, message("?")))
		sendFrames(t, h.in("guard-a"), "eth0",
			ipFrame(cMAC, aMAC, 253, a4, c4, message("answer of 253 over IPv4")), ipFrame(cMAC, aMAC, 253, a6, c6, message("answer of 253 over IPv6")),
			ipFrame(cMAC, aMAC, 47, a4, c4, message("answer of 47")), ipFrame(cMAC, aMAC, 254, a4, c4, message("unasked of 254")))
		sendFrames(t, on(shared.peer), "eth0",
			ipFrame(hostMAC, peerMAC, 253, peer4, h.ip, message("answer from outside")))
		sendFrames(t, h.in("guard-a"), "eth0", udp(cMAC, aMAC, a4, 1, c4, 1, "the end"))
		marks := []string{"answer of 253 over IPv4", "answer of 253 over IPv6", "answer of 47", "unasked of 254", "answer from outside"}
		same(t, "answers to a container that has asked", seen.said(marks...), []string{"answer of 253 over IPv4", "answer of 253 over IPv6", "answer of 47", "answer from outside"})

		seen = h.watchIn("guard-a", "eth0", "the end")
		sendFrames(t, h.in("guard-b"), "eth0", append(sweep(aMAC, bMAC, b4, a4), sweep(aMAC, bMAC, b6, a6)...)...)
		sendFrames(t, h.in("guard-b"), "eth0", udp(aMAC, bMAC, b4, 1, a4, 1, "the end"))
		all := seen.frames()
		same(t, "a container of the network to another, IPv4", swept(all, a4), allowed4)
		same(t, "a container of the network to another, IPv6", swept(all, a6), allowed6)

		seen = h.watchIn("guard-a", "eth0", "the end")
		sendPackets(t, on(h.Machine), a4, sweep(aMAC, gatewayMAC, gateway4, a4)...)
		sendPackets(t, on(h.Machine), a6, sweep(aMAC, gatewayMAC, gateway6, a6)...)
		sendPackets(t, on(h.Machine), a4, udp(aMAC, gatewayMAC, gateway4, 1, a4, 1, "the end"))
		all = seen.frames()
		same(t, "the host to a container, IPv4", swept(all, a4), allowed4)
		same(t, "the host to a container, IPv6", swept(all, a6), allowed6)

		seen = watchOn(t, shared.peer, "eth0", "the end")
		sendFrames(t, h.in("guard-c"), "eth0", append(sweep(gatewayMAC, cMAC, c4, peer4), sweep(gatewayMAC, cMAC, c6, peer6)...)...)
		sendFrames(t, h.in("guard-c"), "eth0", udp(gatewayMAC, cMAC, c4, 1, peer4, 1, "the end"))
		all = seen.frames()
		// Connection tracking takes these for broken (UDP-Lite by a wrong
		// pseudo header), and what it cannot track it cannot translate. A
		// lone fragment (44) leaves as the whole that it is.
		same(t, "a container to the outside, IPv4", swept(all, peer4), allBut(58, 136))
		same(t, "a container to the outside, IPv6", swept(all, peer6), allBut(1, 44, 59, 136))
	})
}

// sweep is a sound packet of each IP protocol.
func sweep(toMAC, fromMAC, from, to string) [][]byte {
	var all [][]byte
	for p := range 256 {
		// As an IPv6 extension header this is eight octets long, and before a message of protocol 253.
		b := append([]byte{253, 0, 0, 0, 0, 0, 0, 0}, "sweep"...)
		switch {
		case p == 1 && !strings.Contains(from, ":"): // echo request
			b = append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, "sweep"...)
			binary.BigEndian.PutUint16(b[2:], checksum(b))
		case p == 6:
			b = append([]byte{0, 7, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 255, 255, 0, 0, 0, 0}, "sweep"...) // SYN
			b = summed(6, from, to, 16, b)
		case p == 17, p == 136: // UDP, and UDP-Lite, whose length is how much is covered
			b = append([]byte{0, 7, 0, 7, 0, 13, 0, 0}, "sweep"...)
			b = summed(byte(p), from, to, 6, b)
		case p == 58 && strings.Contains(from, ":"):
			b = append([]byte{128, 0, 0, 0, 0, 1, 0, 1}, "sweep"...)
			b = summed(58, from, to, 2, b)
		case p == 132:
			b = initChunk(7, 7)
		}
		all = append(all, ipFrame(toMAC, fromMAC, byte(p), from, to, b))
	}
	return all
}

// allBut are all protocols but some.
func allBut(except ...byte) (all []byte) {
	for p := range 256 {
		if !slices.Contains(except, byte(p)) {
			all = append(all, byte(p))
		}
	}
	return all
}

// swept are the protocols of a sweep that came for an address.
func swept(frames [][]byte, to string) []byte {
	var found []byte
	for _, f := range frames {
		if c, ok := parse(f); ok && c.to == to && (bytes.Contains(c.payload, []byte("sweep")) || c.protocol == 132) && !slices.Contains(found, c.protocol) {
			found = append(found, c.protocol)
		}
	}
	slices.Sort(found)
	return found
}

// same fails the test if a list is not as wanted, and says how.
func same[T comparable](t *testing.T, what string, got, want []T) {
	t.Helper()
	minus := func(a, b []T) (left []any) {
		for _, x := range a {
			if !slices.Contains(b, x) {
				left = append(left, x)
			}
		}
		return left
	}
	if more, less := minus(got, want), minus(want, got); more != nil || less != nil {
		t.Errorf("%s: %v came and should not, %v did not come", what, more, less)
	}
}

// sendPackets sends the packets of frames by way of the routes.
func sendPackets(t *testing.T, f from, to string, frames ...[]byte) {
	t.Helper()
	args := []string{"send", "ip", to}
	for _, frame := range frames {
		args = append(args, hex.EncodeToString(frame[14:]))
	}
	out, err := f(args...)
	if err != nil {
		t.Fatalf("send packets: %s: %v", out, err)
	}
	if out != "" {
		t.Logf("Linux does not send all: %s", out)
	}
}

// speaker is a container that speaks to a station of its LAN, and may pretend to be another.
type speaker struct {
	mac, v4, v6        string // its own
	toMAC, to4, to6    string // whom it speaks to
	gateway4, gateway6 string
	foreign4, foreign6 string // addresses of nobody
}

const (
	foreignMAC, floodedMAC = "02:42:00:00:00:99", "ff:ff:ff:ff:ff:ff"
	allNodes, allNodesMAC  = "ff02::1", "33:33:00:00:00:01"
	bridgeGroup, lldpGroup = "01:80:c2:00:00:00", "01:80:c2:00:00:0e"
)

// forgery is a frame that has its own name in it.
type forgery struct {
	what  string
	frame func(mark string) []byte
	only6 bool
}

// honest is what a container may say.
func (s speaker) honest() []forgery {
	link := linkLocal(s.mac)
	return []forgery{
		{"its own IPv4 address", func(m string) []byte { return udp(s.toMAC, s.mac, s.v4, 7, s.to4, 7, m) }, false},
		{"its own IPv6 address", func(m string) []byte { return udp(s.toMAC, s.mac, s.v6, 7, s.to6, 7, m) }, true},
		{"its link-local address", func(m string) []byte { return udp(s.toMAC, s.mac, link, 7, s.to6, 7, m) }, true},
		{"a flood", func(m string) []byte { return udp(floodedMAC, s.mac, s.v4, 7, "255.255.255.255", 7, m) }, false},
		{"an ARP request", func(m string) []byte { return arp(floodedMAC, s.mac, 1, s.mac, s.v4, s.to4, m) }, false},
		{"an ARP probe", func(m string) []byte { return arp(floodedMAC, s.mac, 1, s.mac, "0.0.0.0", s.v4, m) }, false},
		{"gratuitous ARP for itself", func(m string) []byte { return arp(floodedMAC, s.mac, 2, s.mac, s.v4, s.v4, m) }, false},
		{"neighbour advertisement for itself", func(m string) []byte { return nd(allNodesMAC, s.mac, 136, s.v6, allNodes, s.v6, m) }, true},
		{"neighbour solicitation", func(m string) []byte { return nd(s.toMAC, s.mac, 135, s.v6, s.to6, s.to6, m) }, true},
	}
}

// forged is what it may not.
func (s speaker) forged() []forgery {
	link := linkLocal(s.mac)
	return []forgery{
		{"foreign MAC", func(m string) []byte { return udp(s.toMAC, foreignMAC, s.v4, 7, s.to4, 7, m) }, false},
		{"foreign MAC, IPv6", func(m string) []byte { return udp(s.toMAC, foreignMAC, s.v6, 7, s.to6, 7, m) }, true},
		{"foreign address", func(m string) []byte { return udp(s.toMAC, s.mac, s.foreign4, 7, s.to4, 7, m) }, false},
		{"foreign IPv6 address", func(m string) []byte { return udp(s.toMAC, s.mac, s.foreign6, 7, s.to6, 7, m) }, true},
		{"foreign link-local address", func(m string) []byte { return udp(s.toMAC, s.mac, linkLocal(foreignMAC), 7, s.to6, 7, m) }, true},
		{"the gateway's address", func(m string) []byte { return udp(s.toMAC, s.mac, s.gateway4, 7, s.to4, 7, m) }, false},
		{"the receiver's own address", func(m string) []byte { return udp(s.toMAC, s.toMAC, s.to4, 7, s.to4, 7, m) }, false},
		{"ARP with foreign sender address", func(m string) []byte { return arp(floodedMAC, s.mac, 1, s.mac, s.foreign4, s.to4, m) }, false},
		{"ARP with foreign sender MAC", func(m string) []byte { return arp(floodedMAC, s.mac, 1, foreignMAC, s.v4, s.to4, m) }, false},
		{"ARP of a foreign station", func(m string) []byte { return arp(floodedMAC, foreignMAC, 1, foreignMAC, s.v4, s.to4, m) }, false},
		{"ARP answer for the gateway", func(m string) []byte { return arp(s.toMAC, s.mac, 2, s.mac, s.gateway4, s.to4, m) }, false},
		{"gratuitous ARP for the gateway", func(m string) []byte { return arp(floodedMAC, s.mac, 2, s.mac, s.gateway4, s.gateway4, m) }, false},
		{"neighbour advertisement for the gateway", func(m string) []byte { return nd(allNodesMAC, s.mac, 136, s.v6, allNodes, s.gateway6, m) }, true},
		{"neighbour advertisement for a foreign address", func(m string) []byte { return nd(s.toMAC, s.mac, 136, link, s.to6, s.foreign6, m) }, true},
		{"router advertisement", func(m string) []byte {
			return ipFrame(allNodesMAC, s.mac, 58, link, allNodes, advert(link, allNodes, m))
		}, true},
		{"router advertisement to one", func(m string) []byte { return ipFrame(s.toMAC, s.mac, 58, link, s.to6, advert(link, s.to6, m)) }, true},
		{"router advertisement behind options", func(m string) []byte {
			return ipFrame(allNodesMAC, s.mac, 60, link, allNodes, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, advert(link, allNodes, m)...))
		}, true},
		{"redirect", func(m string) []byte { return nd(s.toMAC, s.mac, 137, link, s.to6, s.foreign6, m) }, true},
		{"DHCP server's answer", func(m string) []byte { return udp(s.toMAC, s.mac, s.v4, 67, s.to4, 68, m) }, false},
		{"DHCP server's flooded answer", func(m string) []byte { return udp(floodedMAC, s.mac, s.v4, 67, "255.255.255.255", 68, m) }, false},
		{"DHCP server's answer from another port", func(m string) []byte { return udp(s.toMAC, s.mac, s.v4, 6767, s.to4, 68, m) }, false},
		{"DHCPv6 server's answer", func(m string) []byte { return udp(s.toMAC, s.mac, link, 547, s.to6, 546, m) }, true},
		{"DHCPv6 server's answer from another port", func(m string) []byte { return udp(s.toMAC, s.mac, link, 5470, s.to6, 546, m) }, true},
		{"VLAN tag", func(m string) []byte { return tagged(0x8100, udp(s.toMAC, s.mac, s.v4, 7, s.to4, 7, m)) }, false},
		{"service provider's tag", func(m string) []byte { return tagged(0x88a8, udp(s.toMAC, s.mac, s.v4, 7, s.to4, 7, m)) }, false},
		{"BPDU", func(m string) []byte {
			return ethernet(bridgeGroup, s.mac, uint16(3+len(m)), append([]byte{0x42, 0x42, 3}, m...))
		}, false},
		{"BPDU to one", func(m string) []byte {
			return ethernet(s.toMAC, s.mac, uint16(3+len(m)), append([]byte{0x42, 0x42, 3}, m...))
		}, false},
		{"LLDP", func(m string) []byte { return ethernet(lldpGroup, s.mac, 0x88cc, []byte(m)) }, false},
		{"a protocol that is neither IP nor ARP", func(m string) []byte { return ethernet(s.toMAC, s.mac, 0x88b5, []byte(m)) }, false},
	}
}

// marked are the frames of forgeries, and the marks in them.
func marked(six bool, all ...forgery) (frames [][]byte, marks []string) {
	for _, f := range all {
		if !f.only6 || six {
			frames, marks = append(frames, f.frame(f.what+".")), append(marks, f.what+".")
		}
	}
	return frames, marks
}

// split is a router advertisement whose type is in the second fragment.
func (s speaker) split(mark string) [][]byte {
	link := linkLocal(s.mac)
	options := []byte{58, 0, 1, 4, 0, 0, 0, 0}
	return [][]byte{
		ipFrame(s.toMAC, s.mac, 44, link, s.to6, append([]byte{60, 0, 0, 1, 0, 0, 0, 9}, options...)),
		ipFrame(s.toMAC, s.mac, 44, link, s.to6, append([]byte{60, 0, 0, 8, 0, 0, 0, 9}, advert(link, s.to6, mark)...)),
	}
}

// TestPortSecurity: a container cannot speak as somebody else, nor as a router, a DHCP server or a
// switch.
func TestPortSecurity(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("spoof", "--subnet", "198.19.31.0/24", "--ipv6", "--subnet", "fd00:19:31::/64")
		h.client("spoof-a", "spoof")
		h.client("spoof-b", "spoof")
		s := speaker{
			mac: mac(t, h.exec("spoof-a"), "eth0"), v4: h.address("spoof-a", "spoof"), v6: h.address6("spoof-a", "spoof"),
			toMAC: mac(t, h.exec("spoof-b"), "eth0"), to4: h.address("spoof-b", "spoof"), to6: h.address6("spoof-b", "spoof"),
			gateway4: "198.19.31.1", gateway6: "fd00:19:31::1", foreign4: "198.19.31.99", foreign6: "fd00:19:31::99",
		}
		frames, want := marked(true, s.honest()...)
		forged, marks := marked(true, s.forged()...)
		// Nor is a router advertisement whose type is in the second fragment put together on the way.
		const split = "router advertisement in fragments"
		frames = append(append(frames, forged...), s.split(split)...)
		marks = append(marks, split)

		seen := h.watchIn("spoof-b", "eth0", "the end")
		sendFrames(t, h.in("spoof-a"), "eth0", frames...)
		sendFrames(t, h.in("spoof-a"), "eth0", udp(s.toMAC, s.mac, s.v4, 7, s.to4, 7, "the end"))
		same(t, "from one container to another", seen.said(append(marks, want...)...), want)
	})
}

// TestGuardedFromTheStart: a container is guarded when its first packet comes. It is started while
// somebody floods its address, and the host's side of its link is watched from before.
func TestGuardedFromTheStart(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("flood", "--subnet", "198.19.33.0/24")
		h.client("flood-a", "flood", "--ip", "198.19.33.11")
		const address, station = "198.19.33.12", "02:42:00:00:33:12"
		aMAC := mac(t, h.exec("flood-a"), "eth0")
		text := func(s string) []byte { return append(make([]byte, 8), s...) }
		args := []string{"flood", "link", "eth0"}
		for _, frame := range [][]byte{
			udp(station, aMAC, "198.19.33.11", 7, address, 7, "allowed"),
			ipFrame(station, aMAC, 253, "198.19.33.11", address, text("forbidden")),
			ipFrame(station, aMAC, 132, "198.19.33.11", address, append(initChunk(7, 7), "forbidden"...)),
		} {
			args = append(args, hex.EncodeToString(frame))
		}
		seen := watch(t, h.Machine, []string{shared.probe}, "out", "dwv", "the end")
		h.docker(append([]string{"exec", "-d", "flood-a", "/probe"}, args...)...)
		for i := range 3 {
			name := "flood-b" + strconv.Itoa(i)
			h.client(name, "flood", "--ip", address, "--mac-address", station)
			h.docker("exec", name, "ip", "address")
			if i < 2 {
				h.docker("rm", "-f", name)
			}
		}
		sendFrames(t, h.in("flood-a"), "eth0", udp(station, aMAC, "198.19.33.11", 7, address, 7, "the end"))
		same(t, "from before the container's start", seen.said("allowed", "forbidden"), []string{"allowed"})
	})
}

// TestWithoutIPv6: on a network without IPv6 a container has none at all, not even if it tries.
func TestWithoutIPv6(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("nosix", "--subnet", "198.19.34.0/24")
		h.client("nosix-a", "nosix")
		h.client("nosix-b", "nosix")
		a4, aMAC := h.address("nosix-a", "nosix"), mac(t, h.exec("nosix-a"), "eth0")
		b4, bMAC := h.address("nosix-b", "nosix"), mac(t, h.exec("nosix-b"), "eth0")
		if out := h.docker("exec", "nosix-a", "ip", "-6", "address", "show", "dev", "eth0"); out != "" {
			t.Errorf("a container of a network without IPv6 has an IPv6 address: %s", out)
		}
		if out, err := h.Run("ip", "-6", "address", "show", "dev", h.linkWith("198.19.34.1")); err != nil || out != "" {
			t.Errorf("the bridge of a network without IPv6 has an IPv6 address: %s, %v", out, err)
		}
		own, others, gateway := linkLocal(aMAC), linkLocal(bMAC), mac(t, h.Run, h.linkWith("198.19.34.1"))
		container := h.watchIn("nosix-b", "eth0", "the end")
		// What comes in on the bridge is what its ports have let through.
		bridge := watchOn(t, h.Machine, h.linkWith("198.19.34.1"), "the end")
		sendFrames(t, h.in("nosix-a"), "eth0",
			udp(bMAC, aMAC, own, 7, others, 7, "IPv6 to a container"),
			udp("33:33:00:00:00:01", aMAC, own, 7, "ff02::1", 7, "IPv6 to all"),
			udp(gateway, aMAC, own, 7, peer6, 7, "IPv6 to the gateway"),
			udp(bMAC, aMAC, a4, 7, b4, 7, "IPv4"),
			udp(gateway, aMAC, a4, 7, "198.19.34.1", 7, "IPv4"))
		// From the host's side, past the port security of whoever sends.
		sendFrames(t, on(h.Machine), h.linkWith("198.19.34.1"),
			udp(bMAC, gateway, linkLocal(gateway), 7, others, 7, "IPv6 from the host"),
			udp("33:33:00:00:00:01", gateway, linkLocal(gateway), 7, "ff02::1", 7, "IPv6 from the host to all"))
		sendFrames(t, h.in("nosix-a"), "eth0",
			udp(bMAC, aMAC, a4, 7, b4, 7, "the end"),
			udp(gateway, aMAC, a4, 7, "198.19.34.1", 7, "the end"))
		marks := []string{"IPv4", "IPv6"}
		same(t, "at a container without IPv6", container.said(marks...), []string{"IPv4"})
		same(t, "at the host", bridge.said(marks...), []string{"IPv4"})
	})
}

// TestEndpointWithoutIPv6: a container for which the engine asks no IPv6 address has no IPv6 on a network that
// has, neither to send nor to hear. Engines before 28 ask one for every container.
func TestEndpointWithoutIPv6(t *testing.T) {
	h := onHost(t, shared.hosts[lab.Moby])
	h.network("mixed", "--subnet", "198.19.44.0/24", "--ipv6", "--subnet", "fd00:19:44::/64")
	h.client("mixed-a", "mixed", "--sysctl", "net.ipv6.conf.all.disable_ipv6=1")
	h.client("mixed-b", "mixed")
	a4, a6, aMAC := h.address("mixed-a", "mixed"), h.address6("mixed-a", "mixed"), mac(t, h.exec("mixed-a"), "eth0")
	b4, b6, bMAC := h.address("mixed-b", "mixed"), h.address6("mixed-b", "mixed"), mac(t, h.exec("mixed-b"), "eth0")
	if a6 != "" || b6 == "" {
		t.Fatalf("the containers have %q and %q: only the second should have IPv6", a6, b6)
	}
	for _, way := range []struct{ from, fromMAC, from4, from6, to, toMAC, to4, to6 string }{
		{"mixed-a", aMAC, a4, linkLocal(aMAC), "mixed-b", bMAC, b4, b6},
		{"mixed-b", bMAC, b4, b6, "mixed-a", aMAC, a4, linkLocal(aMAC)},
	} {
		seen := h.watchIn(way.to, "eth0", "the end")
		sendFrames(t, h.in(way.from), "eth0",
			udp(way.toMAC, way.fromMAC, way.from6, 7, way.to6, 7, "IPv6"),
			udp(allNodesMAC, way.fromMAC, way.from6, 7, allNodes, 7, "IPv6 to all"),
			udp(way.toMAC, way.fromMAC, way.from4, 7, way.to4, 7, "IPv4"),
			udp(way.toMAC, way.fromMAC, way.from4, 7, way.to4, 7, "the end"))
		same(t, way.from+" to "+way.to, seen.said("IPv6", "IPv4"), []string{"IPv4"})
	}
}

// TestNFTablesBackend: beside an engine that speaks nftables itself, which has no DOCKER-USER.
func TestNFTablesBackend(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	const ip4, ip6 = "198.18.0.3", "fd00:18::3"
	started, err := shared.host("nftables", lab.Moby, "--firewall-backend=nftables", "--ip-forward=false")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = started.StopEngine() })
	if err := started.Plug(shared.lan, "eth0", ip4+"/24", ip6+"/64"); err != nil {
		t.Fatal(err)
	}
	h := onHost(t, started)
	h.ip = ip4
	if out, err := h.Run("nft", "list", "tables"); err != nil || !strings.Contains(out, "docker-bridges") {
		t.Fatalf("the engine has made no tables: %s, %v", out, err)
	}
	h.network("ours", "--subnet", "198.19.35.0/24", "--ipv6", "--subnet", "fd00:19:35::/64")
	h.docker("network", "create", "theirs")
	t.Cleanup(func() { h.docker("network", "rm", "theirs") })
	h.server("ours-a", "ours", publish("8160:80")...)
	h.client("ours-b", "ours")
	h.server("theirs-a", "theirs", publish("8161:80")...)
	a, theirs := h.address("ours-a", "ours"), h.address("theirs-a", "theirs")
	for _, transport := range transports {
		reaches(t, "same network", h.in("ours-b"), transport, a+":80", h.address("ours-b", "ours"))
		reaches(t, "container to outside", h.in("ours-a"), transport, peer4+":80", ip4)
		reaches(t, "container to outside, IPv6", h.in("ours-a"), transport, "["+peer6+"]:80", ip6)
		reaches(t, "published port", on(shared.peer), transport, ip4+":8160", peer4)
		reaches(t, "published port, IPv6", on(shared.peer), transport, "["+ip6+"]:8160", peer6)
		reaches(t, "published port from the host", on(h.Machine), transport, ip4+":8160", "")
		reaches(t, "published port on localhost", on(h.Machine), transport, "127.0.0.1:8160", "")
		reaches(t, "hairpin", h.in("ours-b"), transport, ip4+":8160", "198.19.35.1")
		barred(t, "dockway to an unpublished port of Docker's", h.in("ours-a"), transport, theirs+":80")
		barred(t, "Docker to an unpublished port of dockway's", h.in("theirs-a"), transport, a+":80")
		reaches(t, "Docker to a published port of dockway's", h.in("theirs-a"), transport, ip4+":8160", "")
		reaches(t, "dockway to a published port of Docker's", h.in("ours-a"), transport, ip4+":8161", "")
		reaches(t, "outside to Docker's", on(shared.peer), transport, ip4+":8161", peer4)
	}
}

func linkLocal(mac string) string {
	m := hardware(mac)
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]}).String()
}

// arp makes a frame with an ARP request (1) or answer (2), and text behind it.
func arp(toMAC, fromMAC string, operation byte, senderMAC, sender, target, text string) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, operation}, hardware(senderMAC)...)
	b = append(b, netip.MustParseAddr(sender).AsSlice()...)
	b = append(append(b, 0, 0, 0, 0, 0, 0), netip.MustParseAddr(target).AsSlice()...)
	return ethernet(toMAC, fromMAC, etherARP, append(b, text...))
}

// option is an option of neighbour discovery that nobody knows, with text in it.
func option(text string) []byte {
	b := append([]byte{200, byte((len(text) + 2 + 7) / 8)}, text...)
	return append(b, make([]byte, int(b[1])*8-len(b))...)
}

// nd makes a frame with a neighbour solicitation (135), advertisement (136) or redirect (137).
func nd(toMAC, fromMAC string, kind byte, from, to, target, text string) []byte {
	b := append([]byte{kind, 0, 0, 0, 0x20, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
	if kind == 137 {
		b = append(b, netip.MustParseAddr(target).AsSlice()...)
	}
	return ipFrame(toMAC, fromMAC, 58, from, to, summed(58, from, to, 2, append(b, option(text)...)))
}

// ndOf is a message of neighbour discovery with options as they are given: a solicitation (135) or
// advertisement (136) of a target, or a router solicitation (133), which has none.
func ndOf(toMAC, fromMAC string, kind byte, from, to, target string, options ...[]byte) []byte {
	b := []byte{kind, 0, 0, 0, 0, 0, 0, 0}
	if kind != 133 {
		b = append(b, netip.MustParseAddr(target).AsSlice()...)
	}
	return ipFrame(toMAC, fromMAC, 58, from, to, summed(58, from, to, 2, append(b, bytes.Join(options, nil)...)))
}

// linkLayer is the option that says a MAC: the source's (1) or the target's (2).
func linkLayer(kind byte, mac string) []byte { return append([]byte{kind, 1}, hardware(mac)...) }

// nonce is the option of duplicate address detection (RFC 7527).
func nonce() []byte { return []byte{14, 1, 1, 2, 3, 4, 5, 6} }

// advert is a router advertisement.
func advert(from, to, text string) []byte {
	b := append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, option(text)...)
	return summed(58, from, to, 2, b)
}

func tagged(kind uint16, frame []byte) []byte {
	return slices.Concat(frame[:12], binary.BigEndian.AppendUint16(nil, kind), []byte{0, 5}, frame[12:])
}
