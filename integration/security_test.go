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
