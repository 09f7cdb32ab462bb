package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

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
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Reader
}

// watchIn watches a container's link until a frame comes with the words end in it.
func (h *host) watchIn(container, link, end string) *watcher {
	h.t.Helper()
	return watch(h.t, h.Machine, "docker", "exec", container, "/probe", "-timeout", "15s", "watch", "link", link, end)
}

// watchOn watches a machine's link likewise.
func watchOn(t *testing.T, m *lab.Machine, link, end string) *watcher {
	t.Helper()
	return watch(t, m, shared.probe, "-timeout", "15s", "watch", "link", link, end)
}

func watch(t *testing.T, m *lab.Machine, args ...string) *watcher {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	w := &watcher{t: t, cmd: m.Command(ctx, args...)}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.out, w.cmd.Stderr = bufio.NewReader(out), &bytes.Buffer{}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := w.out.ReadString('\n'); line != "watching\n" {
		t.Fatalf("the watch does not start: %q, %v: %s", line, err, w.cmd.Stderr)
	}
	return w
}

// frames waits for the end, and gives what came before it.
func (w *watcher) frames() [][]byte {
	w.t.Helper()
	text, err := io.ReadAll(w.out)
	if end := w.cmd.Wait(); err != nil || end != nil {
		w.t.Fatalf("watch: %v, %v: %s", err, end, w.cmd.Stderr)
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
			ipFrame(cMAC, aMAC, 253, a4, c4, message("answer of 253")), ipFrame(cMAC, aMAC, 253, a6, c6, message("answer of 253 over IPv6")),
			ipFrame(cMAC, aMAC, 47, a4, c4, message("answer of 47")), ipFrame(cMAC, aMAC, 254, a4, c4, message("unasked of 254")))
		sendFrames(t, on(shared.peer), "eth0",
			ipFrame(hostMAC, peerMAC, 253, peer4, h.ip, message("answer from outside")))
		sendFrames(t, h.in("guard-a"), "eth0", udp(cMAC, aMAC, a4, 1, c4, 1, "the end"))
		marks := []string{"answer of 253", "answer of 253 over IPv6", "answer of 47", "unasked of 254", "answer from outside"}
		same(t, "answers to a container that has asked", seen.said(marks...), []string{"answer of 253", "answer of 253 over IPv6", "answer of 47", "answer from outside"})

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
