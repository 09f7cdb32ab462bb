package hostport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Addresses in every test's namespace, which has nothing but its loopback link. The containers'
// are the host's own here: nothing in this package can tell.
const (
	host4      = "198.18.0.1"
	container4 = "198.18.7.2"
	other4     = "198.18.7.3"
	container6 = "fd00:7::2"
)

// namespace moves the test's goroutine into a network namespace of its own, for good: its thread
// ends with it. Sockets must be made by that goroutine, or by one that called join.
func namespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace (as root): %v", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{host4 + "/32", container4 + "/32", other4 + "/32", container6 + "/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD // to be used at once
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatalf("add %s: %v", a, err)
		}
	}
}

// lines is a log to look into.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), s)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func logger() (*logrus.Entry, *lines) {
	out := &lines{}
	log := logrus.New()
	log.SetOutput(out)
	log.SetLevel(logrus.DebugLevel)
	return logrus.NewEntry(log), out
}

// start makes a namespace and a Ports in it, and checks in the end that nothing of it is left.
func start(t *testing.T, change ...func(*limits)) (*Ports, *lines) {
	t.Helper()
	namespace(t)
	return startHere(t, change...)
}

func startHere(t *testing.T, change ...func(*limits)) (*Ports, *lines) {
	t.Helper()
	log, out := logger()
	l := limitsFor(4096)
	for _, c := range change {
		c(&l)
	}
	runtime.GC() // finalizers of other tests' files
	files, routines := openFiles(t), runtime.NumGoroutine()
	p, err := newPorts(log, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log:\n%s", out)
			return
		}
		until(t, "every file descriptor is closed", func() error { return same(files, openFiles(t)) })
		until(t, "every goroutine has ended", func() error { return same(routines, runtime.NumGoroutine()) })
		if len(p.held)+len(p.origins)+p.active+len(p.paused)+len(p.flowing) != 0 {
			t.Errorf("left behind: %d held, %d origins, %d active, %d paused, %d flowing", len(p.held), len(p.origins), p.active, len(p.paused), len(p.flowing))
		}
	})
	return p, out
}

// openFiles counts the process's descriptors. The pipes that Go keeps for splice(2) are not
// counted: they go when the garbage collector says so.
func openFiles(t testing.TB) int {
	t.Helper()
	n := 0
	for _, fd := range names("/proc/self/fd") {
		link, err := os.Readlink("/proc/self/fd/" + fd)
		if err == nil && !strings.HasPrefix(link, "pipe:") {
			n++
		}
	}
	return n
}

func same(want, got int) error {
	if want != got {
		return fmt.Errorf("%d, want %d", got, want)
	}
	return nil
}

// until polls, for at most ten seconds.
func until(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
		<-time.After(2 * time.Millisecond)
	}
}

func hostPort(proto, host, target string) plan.HostPort {
	return plan.HostPort{Proto: proto, Host: netip.MustParseAddrPort(host), Target: netip.MustParseAddrPort(target)}
}

func hold(t testing.TB, p *Ports, hp plan.HostPort) {
	t.Helper()
	if err := p.Hold(hp); err != nil {
		t.Fatal(err)
	}
}

func release(t testing.TB, p *Ports, hp plan.HostPort) {
	t.Helper()
	if err := p.Release(hp); err != nil {
		t.Fatal(err)
	}
}

// listenTCP is a container's server, which hands over each connection.
func listenTCP(t testing.TB, at string, serve func(*net.TCPConn)) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
}

// echo answers with a word first, to tell servers apart.
func echo(word string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		_, _ = io.WriteString(c, word)
		_, _ = io.Copy(c, c)
	}
}

func dialTCP(t testing.TB, to string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", to, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// serveUDP is a container's server that answers with the word, the client's port as it sees it, and
// what was sent.
func serveUDP(t testing.TB, at, word string) {
	t.Helper()
	c, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo(append([]byte(fmt.Sprintf("%s %d ", word, from.(*net.UDPAddr).Port)), b[:n]...), from)
			}
		}
	})
	t.Cleanup(func() { c.Close(); done.Wait() })
}

// dialUDP is a connected client: it takes replies only from where it sends to.
func dialUDP(t testing.TB, to string) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ask sends a datagram and waits for the reply.
func ask(t testing.TB, c *net.UDPConn, what string) (word string, port int, rest string) {
	t.Helper()
	if _, err := c.Write([]byte(what)); err != nil {
		t.Fatalf("send %q: %v", what, err)
	}
	b := make([]byte, 1<<16)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("reply to %.20q: %v", what, err)
	}
	parts := strings.SplitN(string(b[:n]), " ", 3)
	if len(parts) != 3 {
		t.Fatalf("reply to %.20q: %q", what, b[:n])
	}
	_, _ = fmt.Sscan(parts[1], &port)
	return parts[0], port, parts[2]
}
