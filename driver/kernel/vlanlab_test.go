package kernel_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// A place is another network namespace: a container, or what is at the other end of a wire.
type place struct {
	path string
	work chan func()
}

// newPlace makes a namespace, which ends with the test.
func newPlace(t testing.TB) *place {
	t.Helper()
	return startPlace(t, func() error { return unix.Unshare(unix.CLONE_NEWNET) })
}

// samePlace is the test's own namespace, on another thread.
func samePlace(t testing.TB) *place {
	t.Helper()
	file, err := os.Open(threadNamespace)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return startPlace(t, func() error { return unix.Setns(int(file.Fd()), unix.CLONE_NEWNET) })
}

func startPlace(t testing.TB, enter func() error) *place {
	t.Helper()
	p := &place{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		p.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- enter()
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

// run runs commands in the place.
func (p *place) run(t testing.TB, commands ...string) string {
	t.Helper()
	var all strings.Builder
	p.do(t, func() error {
		for _, command := range commands {
			args := strings.Fields(command)
			out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", command, err, out)
			}
			all.Write(out)
		}
		return nil
	})
	return all.String()
}

// here runs commands in the test's namespace.
func here(t testing.TB, commands ...string) {
	t.Helper()
	for _, command := range commands {
		args := strings.Fields(command)
		run(t, args[0], args[1:]...)
	}
}

// A frame is one of the tests' frames, of an Ethernet type that nobody else uses.
type frame struct {
	vlan     int // 0: without a tag
	priority int
	inner    int // a second tag
	text     string
	size     int // with the header, without the tag
}

const (
	testType  = 0x88b5 // local experimental (IEEE 802)
	noTag     = 0
	etherSize = 14
)

// A tap sends and receives frames on one link.
type tap struct {
	file *os.File
	name string
	link unix.SockaddrLinklayer
}

// newTap opens a link of the calling thread's namespace.
func newTap(name string) (*tap, error) {
	l, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err != nil {
		return nil, err
	}
	address := unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index}
	return &tap{file: os.NewFile(uintptr(fd), "tap"), name: name, link: address}, errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
		unix.Bind(fd, &address))
}

// tap opens a link of the place.
func (p *place) tap(t testing.TB, name string) *tap {
	t.Helper()
	var out *tap
	p.do(t, func() (err error) {
		out, err = newTap(name)
		return err
	})
	t.Cleanup(func() { out.file.Close() })
	return out
}

// send sends a frame to all: with tags of these Ethernet types and VLANs, in the frame's own bytes.
func (p *tap) send(t testing.TB, text string, tags ...[2]uint16) {
	t.Helper()
	p.write(t, newFrame(text, tags...))
}

// lie is send, and tells the kernel that the frame is untagged IPv4. A macvlan says if it is refused.
func (p *tap) lie(t testing.TB, text string, tags ...[2]uint16) {
	t.Helper()
	l := p.link
	l.Protocol = binary.NativeEndian.Uint16([]byte{8, 0})
	raw, err := p.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = unix.Sendto(int(fd), newFrame(text, tags...), 0, &l) })
	if err != nil || failure != nil && failure != unix.ENOBUFS {
		t.Fatal(err, failure)
	}
}

func newFrame(text string, tags ...[2]uint16) []byte {
	b := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 9, 0, 0, 0, 9}
	for _, tag := range tags {
		b = binary.BigEndian.AppendUint16(b, tag[0])
		b = binary.BigEndian.AppendUint16(b, tag[1])
	}
	b = binary.BigEndian.AppendUint16(b, testType)
	b = append(b, byte(len(text)>>8), byte(len(text)))
	b = append(b, text...)
	return append(b, make([]byte, max(0, 60-len(b)))...)
}

func (p *tap) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := p.file.Write(b); err != nil {
		t.Fatalf("send on %s: %v", p.name, err)
	}
}

func tagged(vlan uint16) [2]uint16 { return [2]uint16{unix.ETH_P_8021Q, vlan} }

// receive gives the frames that arrive, up to and without the one that says last.
func (p *tap) receive(t testing.TB, last string) []frame {
	t.Helper()
	var out []frame
	for {
		f, ok := p.next(t, 5*time.Second)
		if !ok {
			t.Fatalf("%q does not arrive on %s; what does: %v", last, p.name, out)
		}
		if f.text == last {
			return out
		}
		out = append(out, f)
	}
}

// one gives the next frame, which says text.
func (p *tap) one(t testing.TB, text string) frame {
	t.Helper()
	f, ok := p.next(t, 5*time.Second)
	if !ok {
		t.Fatalf("%q does not arrive on %s", text, p.name)
	}
	if f.text != text {
		t.Fatalf("%+v arrives on %s, not %q", f, p.name, text)
	}
	return f
}

// next gives the next frame of the tests that comes in.
func (p *tap) next(t testing.TB, limit time.Duration) (frame, bool) {
	t.Helper()
	for {
		f, kind, ok := p.read(t, limit)
		if !ok || kind == testType {
			return f, ok
		}
	}
}

// read gives the next frame of any Ethernet type that comes in.
func (p *tap) read(t testing.TB, limit time.Duration) (f frame, kind uint16, ok bool) {
	t.Helper()
	if err := p.file.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	raw, err := p.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	b, control := make([]byte, 1<<17), make([]byte, 256)
	var n, c int
	var from unix.Sockaddr
	var failure error
	err = raw.Read(func(fd uintptr) bool {
		n, c, _, from, failure = unix.Recvmsg(int(fd), b, control, 0)
		return failure != unix.EAGAIN
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return f, 0, false
	}
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
	if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING || n < etherSize+2 {
		return f, 0, true
	}
	messages, err := unix.ParseSocketControlMessage(control[:c])
	if err != nil {
		t.Fatal(err)
	}
	f.size = n
	for _, m := range messages {
		const valid = 1 << 4 // TP_STATUS_VLAN_VALID
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && binary.NativeEndian.Uint32(m.Data)&valid != 0 {
			tci := binary.NativeEndian.Uint16(m.Data[16:])
			f.vlan, f.priority = int(tci&0xfff), int(tci>>12)
		}
	}
	rest := b[12:n]
	if kind = binary.BigEndian.Uint16(rest); kind == unix.ETH_P_8021Q || kind == unix.ETH_P_8021AD {
		f.inner = int(binary.BigEndian.Uint16(rest[2:]))
		rest = rest[4:]
		kind = binary.BigEndian.Uint16(rest)
	}
	if kind == testType {
		if length := int(binary.BigEndian.Uint16(rest[2:])); length <= len(rest)-4 {
			f.text = string(rest[4 : 4+length])
		}
	}
	return f, kind, true
}

// A vlanLab is a host, which is the test's namespace: its uplink eth0 is one end of a wire, whose
// other end is in a place of its own.
type vlanLab struct {
	k    *kernel.Kernel
	far  *place
	wire *tap // the far end
}

func newVLANLab(t testing.TB) *vlanLab {
	t.Helper()
	inNamespace(t)
	l := &vlanLab{k: open(t, kernel.Config{}), far: newPlace(t)}
	l.plug(t)
	return l
}

// plug makes the wire.
func (l *vlanLab) plug(t testing.TB) {
	t.Helper()
	here(t, "ip link add eth0 address 02:00:00:00:00:01 type veth peer name wire netns "+l.far.path,
		"ip link set eth0 addrgenmode none up")
	l.far.run(t, "ip link set wire addrgenmode none up")
	l.wire = l.far.tap(t, "wire")
}

// settle waits until both ends of the wire send: the kernel starts a link's queue some time after it
// has carrier again, and drops until then.
func (l *vlanLab) settle(t testing.TB) {
	t.Helper()
	eventually(t, "the wire is up", func() bool {
		ends := run(t, "ip", "link", "show", "eth0") + l.far.run(t, "ip link show wire")
		return strings.Count(ends, "state UP") == 2 && !strings.Contains(ends, "qdisc noop ")
	})
}

func vlan(n, id int) plan.VLAN {
	return plan.VLAN{Name: fmt.Sprintf("dwt%d", n), Alias: fmt.Sprintf("dockway network=%d", n), Uplink: "eth0", ID: id, Up: true}
}

// container makes a place whose eth0 is a port of a bridge of the host.
func container(t testing.TB, bridge string, n int) *place {
	t.Helper()
	p := newPlace(t)
	port := fmt.Sprintf("c%d", n)
	here(t, fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s", port, p.path),
		fmt.Sprintf("ip link set %s master %s addrgenmode none up", port, bridge))
	p.run(t, "ip link set eth0 addrgenmode none up")
	eventually(t, "all ports of "+bridge+" forward", func() bool {
		ports := run(t, "bridge", "link", "show")
		return strings.Count(ports, "master "+bridge+" ") == strings.Count(ports, "master "+bridge+" state forwarding ")
	})
	return p
}

// behind makes a bridge with a VLAN's link as its port, and a container on it.
func behind(t testing.TB, v plan.VLAN, n int) *place {
	t.Helper()
	bridge := fmt.Sprintf("br%d", n)
	here(t, "ip link add "+bridge+" type bridge", "ip link set "+bridge+" addrgenmode none up", "ip link set "+v.Name+" master "+bridge)
	return container(t, bridge, n)
}

// repairs does what there is to do, and checks that it was something.
func repairs(t testing.TB, k *kernel.Kernel, after string, wanted ...plan.Object) {
	t.Helper()
	one := plan.Diff(observe(t, k, wanted...), plan.Of(wanted...))
	all := plan.Diff(observeAll(t, k), plan.Of(wanted...))
	if len(one) == 0 || fmt.Sprint(one) != fmt.Sprint(all) {
		t.Errorf("after %s there is to do: %v; from a look at everything: %v", after, one, all)
	}
	if err := k.Do(context.Background(), all); err != nil {
		t.Fatalf("after %s: %v", after, err)
	}
	holds(t, k, wanted...)
	if left := plan.Diff(observeAll(t, k), plan.Of(wanted...)); len(left) > 0 {
		t.Errorf("after %s and the repair there is left to do: %v", after, left)
	}
}

// placePath is the test's own namespace for commands of others.
func placePath() string { return fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()) }
