package hostport

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// me is how this process is named in a conflict.
func me(t *testing.T) string {
	t.Helper()
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("process %s (pid %d)", strings.TrimSpace(string(comm)), os.Getpid())
}

// socket is another program's: it binds, and listens if backlog is not negative.
func socket(t *testing.T, typ int, at string, backlog int, options ...int) int {
	t.Helper()
	family, sa, err := sockaddr(hostPort(tcp, at, container4+":1").Host)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		t.Fatal(err)
	}
	if backlog >= 0 {
		if err := unix.Listen(fd, backlog); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

// conflict wants a conflict whose holder has this text.
func conflict(t *testing.T, p *Ports, hp plan.HostPort, holder string) {
	t.Helper()
	err := p.Hold(hp)
	var inUse *plan.PortInUseError
	if !errors.As(err, &inUse) || inUse.Port != hp {
		t.Errorf("%s: got %v, want a PortInUseError", hp, err)
		return
	}
	if want := fmt.Sprintf("host port %s/%s is in use by %s", hp.Host, hp.Proto, holder); err.Error() != want {
		t.Errorf("\n got %s\nwant %s", err, want)
	}
}

// TestConflicts has other sockets of every sort in the way.
func TestConflicts(t *testing.T) {
	const stream, dgram, reuse, reusePort = unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SO_REUSEADDR, unix.SO_REUSEPORT
	p, _ := start(t)
	mine := me(t)
	for i, c := range []struct {
		name    string
		typ     int
		other   string
		backlog int
		options []int
		proto   string
		host    string
		free    bool
	}{
		{"listener", stream, "0.0.0.0", 1, []int{reuse}, tcp, "0.0.0.0", false},
		{"listener without backlog", stream, "0.0.0.0", 0, []int{reuse}, tcp, "0.0.0.0", false},
		{"listener without reuse", stream, "0.0.0.0", 1, nil, tcp, "0.0.0.0", false},
		{"listener that shares", stream, "0.0.0.0", 1, []int{reuse, reusePort}, tcp, "0.0.0.0", false},
		{"wildcard over address", stream, "127.0.0.1", 1, []int{reuse}, tcp, "0.0.0.0", false},
		{"address under wildcard", stream, "0.0.0.0", 1, []int{reuse}, tcp, "127.0.0.1", false},
		{"other address", stream, "127.0.0.2", 1, []int{reuse}, tcp, "127.0.0.1", true},
		{"dual-stack wildcard", stream, "[::]", 1, []int{reuse}, tcp, "0.0.0.0", false},
		{"dual-stack wildcard, IPv6", stream, "[::]", 1, []int{reuse}, tcp, "[::]", false},
		{"other family", stream, "0.0.0.0", 1, []int{reuse}, tcp, "[::]", true},
		{"IPv6 address", stream, "[::1]", 1, []int{reuse}, tcp, "[::]", false},
		{"other protocol", stream, "0.0.0.0", 1, []int{reuse}, udp, "0.0.0.0", true},
		{"bound for itself", stream, "0.0.0.0", -1, nil, tcp, "0.0.0.0", false},
		{"bound, willing to share, not listening", stream, "0.0.0.0", -1, []int{reuse}, tcp, "0.0.0.0", true},
		{"udp", dgram, "0.0.0.0", -1, nil, udp, "0.0.0.0", false},
		{"udp that shares addresses", dgram, "127.0.0.1", -1, []int{reuse}, udp, "0.0.0.0", false},
		{"udp that shares ports", dgram, "0.0.0.0", -1, []int{reusePort}, udp, "127.0.0.1", false},
		{"dual-stack udp", dgram, "[::]", -1, nil, udp, "0.0.0.0", false},
		{"IPv6 udp", dgram, "[::1]", -1, nil, udp, "[::]", false},
	} {
		t.Log(c.name)
		port := fmt.Sprintf(":%d", 4000+i)
		fd := socket(t, c.typ, c.other+port, c.backlog, c.options...)
		hp := hostPort(c.proto, c.host+port, container4+":80")
		if !c.free {
			conflict(t, p, hp, mine)
			continue
		}
		hold(t, p, hp)
		if c.backlog < 0 {
			if err := unix.Listen(fd, 1); !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("the other socket can still listen: %v", err)
			}
		}
	}
}

// TestHeldAgainstOthers tries to take held ports, in every way that others have.
func TestHeldAgainstOthers(t *testing.T) {
	p, _ := start(t)
	hold(t, p, hostPort(tcp, "0.0.0.0:80", container4+":80"))
	hold(t, p, hostPort(udp, "127.0.0.1:80", container4+":80"))
	for _, c := range []struct {
		typ int
		at  string
	}{{unix.SOCK_STREAM, "0.0.0.0:80"}, {unix.SOCK_STREAM, "127.0.0.2:80"}, {unix.SOCK_STREAM, "[::]:80"}, {unix.SOCK_DGRAM, "0.0.0.0:80"}, {unix.SOCK_DGRAM, "[::]:80"}} {
		family, sa, err := sockaddr(hostPort(tcp, c.at, container4+":1").Host)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Socket(family, c.typ, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT} {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Bind(fd, sa); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("another socket gets %s of type %d: %v", c.at, c.typ, err)
		}
		unix.Close(fd)
	}
}

func TestConflictWithOurOwn(t *testing.T) {
	p, _ := start(t)
	hold(t, p, hostPort(tcp, "0.0.0.0:80", container4+":8080"))
	conflict(t, p, hostPort(tcp, "127.0.0.1:80", other4+":80"), "dockway's host port 0.0.0.0:80/tcp, published for 198.18.7.2:8080")
	hold(t, p, hostPort(udp, "127.0.0.1:80", container4+":8080"))
	conflict(t, p, hostPort(udp, "0.0.0.0:80", other4+":80"), "dockway's host port 127.0.0.1:80/udp, published for 198.18.7.2:8080")
}

// TestConflictWithClient has a connection's own end in the way.
func TestConflictWithClient(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, host4+":7", echo(""))
	c := dialTCP(t, host4+":7")
	conflict(t, p, hostPort(tcp, fmt.Sprintf("0.0.0.0:%d", c.LocalAddr().(*net.TCPAddr).Port), container4+":80"), me(t)+", for its connection to 198.18.0.1:7")
}

// TestPastConnections takes a port whose connections are in TIME-WAIT: those of a relay before us are
// not in the way, those of a client of the host are, for a minute.
func TestPastConnections(t *testing.T) {
	p, _ := start(t)
	l, err := net.Listen("tcp4", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	client := dialTCP(t, "127.0.0.1:8080")
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	server.Close() // first: this end goes to TIME-WAIT
	_, _ = client.Read(make([]byte, 1))
	hp := hostPort(tcp, "127.0.0.1:8080", container4+":80")
	client.Close()
	timeWaiting(t, hp)
	hold(t, p, hp)

	listenTCP(t, host4+":7", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	client = dialTCP(t, host4+":7")
	hp = hostPort(tcp, fmt.Sprintf("0.0.0.0:%d", client.LocalAddr().(*net.TCPAddr).Port), container4+":80")
	client.Close()
	timeWaiting(t, hp)
	conflict(t, p, hp, "a past connection to 198.18.0.1:7, which the kernel keeps for a minute (TIME-WAIT)")
}

func timeWaiting(t *testing.T, hp plan.HostPort) {
	t.Helper()
	until(t, "the connection is in TIME-WAIT", func() error {
		fd := openDiag()
		defer unix.Close(fd)
		found, err := diagnose(fd, hp)
		if err == nil && (len(found) != 1 || found[0].state != timeWait) {
			err = fmt.Errorf("found %v", found)
		}
		return err
	})
}

// TestUnseenHolder checks the texts for a holder that this process cannot look into.
func TestUnseenHolder(t *testing.T) {
	namespace(t)
	var h holders
	hp := hostPort(tcp, "0.0.0.0:8080", container4+":80")
	const nobody = "another process of this host (`ss -ltnp sport = :8080` names it)"
	if got := h.of(hp, -1); got != nobody {
		t.Errorf("without sock_diag: %s", got)
	}
	if got := h.of(hp, openDiag()); got != nobody {
		t.Errorf("gone meanwhile: %s", got)
	}
	// A socket that no process has open as a descriptor: it is in a message on its way.
	fd := socket(t, unix.SOCK_STREAM, "0.0.0.0:8080", 1)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if err := unix.Sendmsg(pair[0], nil, unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if got, want := h.of(hp, openDiag()), "another process of this host (uid 0; `ss -ltnp sport = :8080` names it)"; got != want {
		t.Errorf("unseen: %s, want %s", got, want)
	}
	for proto, want := range map[string]string{udp: "ss -lunp sport = :8080", sctp: "ss -lSnp sport = :8080"} {
		hp.Proto = proto
		if got := ssCommand(hp); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Add(make([]byte, 72))
	f.Add(append(make([]byte, 72), 5, 0, inetDiagV6Only, 0, 1, 0, 0, 0))
	f.Add(append(make([]byte, 72), 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ok := parseDiag(b); ok != (len(b) >= 72) {
			t.Errorf("ok is %v for %d bytes", ok, len(b))
		}
	})
}
