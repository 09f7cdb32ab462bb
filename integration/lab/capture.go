package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// T is what a capture needs of a test: *testing.T has it.
type T interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(f func())
}

// Capture is what passes a machine's link, from the moment when Capture has returned, in both
// directions. What it is asked reads as a sentence:
//
//	c := host.Capture(t, "eth1")
//	ping(…)
//	c.Saw(t, lab.EchoRequest().From(container).SourceMAC(mac))
//	c.Never(t, lab.Mentions(otherMAC))
//	c.Where(lab.Frames().Sent()).AllFrames(t, "carries the host's MAC", lab.SourceMAC(hostMAC))
//
// A link that is removed has no more frames: one that comes in its place needs a capture of its own.
type Capture struct {
	*tape
	only  Match
	limit time.Duration
}

// tape holds the frames of a link.
type tape struct {
	name  string // machine and link
	file  *os.File
	raw   syscall.RawConn
	start time.Time

	mu     sync.Mutex
	frames []Frame
	lost   uint32
	buffer []byte
	beside []byte
}

const (
	patience = 5 * time.Second       // of Saw
	moment   = 50 * time.Millisecond // for what another CPU has in hand
)

// Capture starts to capture on a link of the machine, and ends with the test.
func (m *Machine) Capture(t T, link string) *Capture {
	t.Helper()
	return capture(t, m.namespace(), link, m.Name+" "+link)
}

// CaptureIn is Capture on a container's link.
func (h *Host) CaptureIn(t T, container, link string) *Capture {
	t.Helper()
	pid, err := h.Docker("inspect", "-f", "{{.State.Pid}}", container)
	if err != nil {
		t.Fatalf("capture in container %s: %v", container, err)
	}
	// The host's /proc counts as the engine does.
	return capture(t, fmt.Sprintf("/proc/%d/root/proc/%s/ns/net", h.PID(), pid), link, container+" "+link)
}

func capture(t T, namespace, link, name string) *Capture {
	t.Helper()
	c := &tape{name: name, start: time.Now(), buffer: make([]byte, 1<<17), beside: make([]byte, 256)}
	fd := -1
	err := within(namespace, func() (err error) {
		fd, err = openPacketSocket(link)
		return err
	})
	if err != nil {
		t.Fatalf("capture on %s: %v", name, err)
	}
	c.file = os.NewFile(uintptr(fd), name)
	if c.raw, err = c.file.SyscallConn(); err != nil {
		t.Fatalf("capture on %s: %v", name, err)
	}
	t.Cleanup(func() { _ = c.file.Close() }) // which ends the reader
	go func() {
		for {
			if err := c.raw.Read(func(fd uintptr) bool { return c.drain(int(fd)) > 0 }); err != nil {
				return
			}
		}
	}()
	return &Capture{tape: c, only: Frames(), limit: patience}
}

// openPacketSocket does not make the link promiscuous, which others could notice: a veth link shows
// every frame as it is.
func openPacketSocket(link string) (int, error) {
	i, err := net.InterfaceByName(link)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}),
	)
}

// drain takes over what the socket holds, and tells how many frames these were.
func (c *tape) drain(fd int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := 0; ; {
		size, besides, _, from, err := unix.Recvmsg(fd, c.buffer, c.beside, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
			continue // ENETDOWN comes once, when the link goes down
		} else if err != nil {
			return n
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		data := withTag(c.buffer[:size], c.beside[:besides])
		c.frames = append(c.frames, decode(time.Since(c.start), ll.Pkttype == unix.PACKET_OUTGOING, data))
		n++
	}
}

// withTag is a copy of a frame with the VLAN tag that the kernel has taken out of it, if it has one.
func withTag(frame, beside []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(beside)
	if err != nil {
		messages = nil
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < int(unsafe.Sizeof(unix.TpacketAuxdata{})) {
			continue
		}
		aux := (*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
		if aux.Status&unix.TP_STATUS_VLAN_VALID == 0 || len(frame) < 12 {
			break
		}
		kind := uint16(unix.ETH_P_8021Q)
		if aux.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
			kind = aux.Vlan_tpid
		}
		whole := append(make([]byte, 0, len(frame)+4), frame[:12]...)
		whole = append(whole, byte(kind>>8), byte(kind), byte(aux.Vlan_tci>>8), byte(aux.Vlan_tci))
		return append(whole, frame[12:]...)
	}
	return append([]byte(nil), frame...)
}

// Frames gives the frames so far that match, in the order of their passing.
func (c *Capture) Frames(m Match) []Frame {
	_ = c.raw.Control(func(fd uintptr) { // it fails on a capture that has ended
		c.drain(int(fd))
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.mu.Lock()
			c.lost += s.Drops
			c.mu.Unlock()
		}
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []Frame
	for _, f := range c.frames {
		if c.only.fits(f) && m.fits(f) {
			found = append(found, f)
		}
	}
	return found
}

// Count is the number of frames so far that match.
func (c *Capture) Count(m Match) int { return len(c.Frames(m)) }

// Where is the capture without the frames that do not match.
func (c *Capture) Where(m Match) *Capture {
	return &Capture{tape: c.tape, only: c.only.And(m), limit: c.limit}
}

// Patient is the capture with another time for Saw to wait: it is 5 seconds otherwise.
func (c *Capture) Patient(limit time.Duration) *Capture {
	return &Capture{tape: c.tape, only: c.only, limit: limit}
}

// Forget drops the frames so far.
func (c *Capture) Forget() {
	time.Sleep(moment)
	c.Frames(Frames())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = nil
}

// Saw fails the test unless a frame matches, now or within 5 seconds. It gives the first.
func (c *Capture) Saw(t T, m Match) Frame {
	t.Helper()
	var found []Frame
	err := WaitFor(c.limit, "", func() (bool, error) {
		found = c.Frames(m)
		return len(found) > 0, nil
	})
	if err != nil {
		t.Errorf("%s: within %s there was no %s; %s", c.what(), c.limit, m, c.list(c.Frames(Frames())))
		return Frame{}
	}
	return found[0]
}

// Never fails the test if a frame so far matches. Frames that are on their way through the kernel
// have a moment to come, and no more: first wait for what comes after them.
func (c *Capture) Never(t T, m Match) {
	t.Helper()
	time.Sleep(moment)
	if found := c.Frames(m); len(found) > 0 {
		t.Errorf("%s: there must be no %s; %s", c.what(), m, c.list(found))
	}
	c.whole(t)
}

// AllFrames fails the test unless each frame so far matches, and unless there is one: what each frame
// does is said in words ("carries the host's MAC").
func (c *Capture) AllFrames(t T, what string, m Match) {
	t.Helper()
	time.Sleep(moment)
	all := c.Frames(Frames())
	if len(all) == 0 {
		t.Errorf("%s: no frame, so none that %s", c.what(), what)
	}
	if others := c.Frames(Not(m)); len(others) > 0 {
		t.Errorf("%s: not every frame %s: of %d, not so %s", c.what(), what, len(all), c.list(others))
	}
	c.whole(t)
}

// whole fails the test if the capture lacks frames: it cannot say then what never was.
func (c *Capture) whole(t T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost > 0 {
		t.Errorf("%s: %d frames came too fast for the capture", c.name, c.lost)
	}
}

// what names the capture, and what it is limited to.
func (c *Capture) what() string {
	if c.only.words == "" {
		return c.name
	}
	return c.name + " (" + c.only.String() + ")"
}

// list gives frames one line each, the last ones if they are many.
func (c *Capture) list(frames []Frame) string {
	const most = 60
	if len(frames) == 0 {
		return "seen was nothing"
	}
	lines := []string{fmt.Sprintf("seen were %d:", len(frames))}
	if len(frames) > most {
		lines = append(lines, "…")
	}
	for _, f := range frames[max(0, len(frames)-most):] {
		lines = append(lines, f.String())
	}
	return strings.Join(lines, "\n\t")
}
