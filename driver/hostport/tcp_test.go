package hostport

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// readWord reads one letter: which server it is.
func readWord(t testing.TB, c *net.TCPConn) string {
	t.Helper()
	b := make([]byte, 1)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("read from %s: %v", c.RemoteAddr(), err)
	}
	return string(b)
}

// exchange checks that the server at the other end echoes.
func exchange(t testing.TB, c *net.TCPConn, what string) {
	t.Helper()
	b := make([]byte, len(what))
	if _, err := io.WriteString(c, what); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil || string(b) != what {
		t.Fatalf("sent %q, got %q: %v", what, b, err)
	}
}

// wantReset reads until the connection ends, which must be by a reset.
func wantReset(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the connection ends with %v, want a reset", err)
	}
}

// wantRefusal dials, and wants the connection reset, be it so soon that dialling fails.
func wantRefusal(t testing.TB, to string) {
	t.Helper()
	c, err := net.DialTimeout("tcp", to, 5*time.Second)
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = io.Copy(io.Discard, c)
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the connection to %s ends with %v, want a reset", to, err)
	}
}

func TestRelayTCP(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("4"))
	listenTCP(t, "["+container6+"]:80", echo("6"))
	for _, c := range []struct{ host, target, dial, want string }{
		{"127.0.0.1:8080", container4 + ":80", "127.0.0.1:8080", "4"},
		{"0.0.0.0:8081", container4 + ":80", "127.0.0.2:8081", "4"},
		{"[::1]:8080", "[" + container6 + "]:80", "[::1]:8080", "6"},
		{"[::]:8082", container4 + ":80", "[::1]:8082", "4"},
		{"[::]:8083", container4 + ":80", "[" + container6 + "]:8083", "4"},
	} {
		hold(t, p, hostPort(tcp, c.host, c.target))
		conn := dialTCP(t, c.dial)
		if got := readWord(t, conn); got != c.want {
			t.Errorf("%s answers %q, want %q", c.dial, got, c.want)
		}
		exchange(t, conn, "hello")
	}
}

func TestHalfClose(t *testing.T) {
	p, _ := start(t)
	answered := make(chan struct{})
	listenTCP(t, container4+":80", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "x")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c) // what comes after our end
		if string(b) == "still here" {
			close(answered)
		}
	})
	listenTCP(t, container4+":81", func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		_, _ = c.Write(append(b, '!')) // after the client's end
	})
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	hold(t, p, hostPort(tcp, "127.0.0.1:81", container4+":81"))

	c := dialTCP(t, "127.0.0.1:80")
	if b, err := io.ReadAll(c); err != nil || string(b) != "x" {
		t.Fatalf("read %q, %v", b, err)
	}
	_, _ = io.WriteString(c, "still here")
	_ = c.CloseWrite()
	select {
	case <-answered:
	case <-time.After(10 * time.Second):
		t.Error("the server did not get what was sent after its own end")
	}

	c = dialTCP(t, "127.0.0.1:81")
	_, _ = io.WriteString(c, "question")
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "question!" {
		t.Errorf("read %q, %v", b, err)
	}
}

// TestTransfer sends much in both directions at once.
func TestTransfer(t *testing.T) {
	const size = 32 << 20
	p, _ := start(t)
	data := func(seed byte) io.Reader {
		return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)
	}
	sum := func(r io.Reader) []byte {
		h := sha256.New()
		n, err := io.Copy(h, r)
		return fmt.Appendf(nil, "%x %d %v", h.Sum(nil), n, err)
	}
	received := make(chan []byte, 1)
	listenTCP(t, container4+":80", func(c *net.TCPConn) {
		var wg sync.WaitGroup
		wg.Go(func() { received <- sum(c) })
		_, _ = io.Copy(c, data(1))
		_ = c.CloseWrite()
		wg.Wait()
	})
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	c := dialTCP(t, "127.0.0.1:80")
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(c, data(2))
		_ = c.CloseWrite()
	})
	if got, want := sum(c), sum(data(1)); !bytes.Equal(got, want) {
		t.Errorf("from the server: %s, want %s", got, want)
	}
	wg.Wait()
	if got, want := <-received, sum(data(2)); !bytes.Equal(got, want) {
		t.Errorf("from the client: %s, want %s", got, want)
	}
}

func TestRefused(t *testing.T) {
	p, _ := start(t)
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80")) // nobody listens there
	wantRefusal(t, "127.0.0.1:80")
	hold(t, p, hostPort(tcp, "127.0.0.1:81", "203.0.113.9:80")) // there is no route
	wantRefusal(t, "127.0.0.1:81")
}

// TestSilentTarget has a target that never answers: the client is reset in time, and nobody else
// waits meanwhile.
func TestSilentTarget(t *testing.T) {
	p, _ := start(t, func(l *limits) { l.dial = 300 * time.Millisecond })
	silent := socket(t, unix.SOCK_STREAM, container4+":80", 0) // takes one connection, and never accepts
	first := dialTCP(t, container4+":80")
	defer first.Close()
	listenTCP(t, container4+":81", echo("b"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	hold(t, p, hostPort(tcp, "127.0.0.1:81", container4+":81"))
	stuck := dialTCP(t, "127.0.0.1:80")
	readWord(t, dialTCP(t, "127.0.0.1:81"))
	wantReset(t, stuck)
	_ = unix.Shutdown(silent, unix.SHUT_RDWR)
}

// TestReset passes a reset on, both ways.
func TestReset(t *testing.T) {
	p, _ := start(t)
	ended := make(chan error, 1)
	listenTCP(t, container4+":80", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "x")
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	listenTCP(t, container4+":81", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "last words")
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	hold(t, p, hostPort(tcp, "127.0.0.1:81", container4+":81"))
	c := dialTCP(t, "127.0.0.1:80")
	readWord(t, c)
	_ = c.SetLinger(0)
	c.Close()
	if err := <-ended; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server's connection ends with %v, want a reset", err)
	}
	c = dialTCP(t, "127.0.0.1:81")
	b := make([]byte, 10)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "x")
	wantReset(t, c)
}

// TestServerGone has a server that answers and leaves while the client is still sending: the
// client gets the answer, then an error.
func TestServerGone(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_, _ = io.WriteString(c, "too large")
		_ = c.CloseWrite()
	}) // closed with data unread: a reset follows
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	c := dialTCP(t, "127.0.0.1:80")
	stopped := make(chan error)
	go func() {
		var err error
		for chunk := make([]byte, 1<<16); err == nil; {
			_, err = c.Write(chunk)
		}
		stopped <- err
	}()
	b := make([]byte, 9)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "too large" {
		t.Errorf("answer %q, %v", b, err)
	}
	if err := <-stopped; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("sending ends with %v", err)
	}
}

func TestTargetChanges(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("a"))
	listenTCP(t, other4+":80", echo("b"))
	hp := hostPort(tcp, "127.0.0.1:80", container4+":80")
	hold(t, p, hp)
	before := dialTCP(t, "127.0.0.1:80")
	if got := readWord(t, before); got != "a" {
		t.Errorf("first target: %q", got)
	}
	hp.Target = hostPort(tcp, "127.0.0.1:80", other4+":80").Target
	hold(t, p, hp)
	if got := readWord(t, dialTCP(t, "127.0.0.1:80")); got != "b" {
		t.Errorf("second target: %q", got)
	}
	exchange(t, before, "still with the first")
}

func TestReleaseEndsRelays(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("a"))
	hp, other := hostPort(tcp, "127.0.0.1:80", container4+":80"), hostPort(tcp, "127.0.0.1:81", container4+":80")
	hold(t, p, hp)
	hold(t, p, other)
	c, stays := dialTCP(t, "127.0.0.1:80"), dialTCP(t, "127.0.0.1:81")
	readWord(t, c)
	readWord(t, stays)
	release(t, p, hp)
	wantReset(t, c)
	exchange(t, stays, "hello")
	if _, err := net.Dial("tcp", "127.0.0.1:80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a released port: %v", err)
	}
	until(t, "one relay is left", func() error { return same(1, active(p)) })
}

func active(p *Ports) (n int) {
	p.loop.do(func() { n = p.active })
	return n
}

// TestNothingLeaks relays a thousand connections one after the other.
func TestNothingLeaks(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("a"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	files, routines := openFiles(t), runtime.NumGoroutine()
	for i := range 1000 {
		c := dialTCP(t, "127.0.0.1:80")
		readWord(t, c)
		if i%2 == 0 {
			_ = c.SetLinger(0)
		}
		c.Close()
	}
	until(t, "all relays have ended", func() error { return same(0, active(p)) })
	until(t, "all goroutines have ended", func() error { return same(routines, runtime.NumGoroutine()) })
	until(t, "all descriptors are closed", func() error { return same(files, openFiles(t)) })
}

func TestTooManyRelays(t *testing.T) {
	p, log := start(t, func(l *limits) { l.relays = 2 })
	listenTCP(t, container4+":80", echo("a"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	a, b := dialTCP(t, "127.0.0.1:80"), dialTCP(t, "127.0.0.1:80")
	readWord(t, a)
	readWord(t, b)
	wantRefusal(t, "127.0.0.1:80")
	wantRefusal(t, "127.0.0.1:80")
	if !log.has("host port 127.0.0.1:80/tcp: refused 127.0.0.1:") || !log.has("2 connections are being relayed") {
		t.Errorf("log: %s", log)
	}
	exchange(t, a, "hello")
	a.Close()
	until(t, "a relay has ended", func() error { return same(1, active(p)) })
	readWord(t, dialTCP(t, "127.0.0.1:80"))
}

// TestLoop has targets that lead back to a port that is held.
func TestLoop(t *testing.T) {
	p, log := start(t)
	hold(t, p, hostPort(tcp, "0.0.0.0:80", host4+":80"))     // itself
	hold(t, p, hostPort(tcp, "0.0.0.0:81", host4+":82"))     // one another
	hold(t, p, hostPort(tcp, "0.0.0.0:82", host4+":81"))     //
	hold(t, p, hostPort(udp, "0.0.0.0:80", host4+":80"))     //
	hold(t, p, hostPort(tcp, host4+":40000", host4+":1234")) // nobody there
	for _, to := range []string{"127.0.0.1:80", "127.0.0.1:81", host4 + ":40000"} {
		wantRefusal(t, to)
	}
	if _, err := dialUDP(t, "127.0.0.1:80").Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	until(t, "all relays have ended but the UDP client's", func() error { return same(1, active(p)) })
	if !log.has("host port 0.0.0.0:80/tcp: its target 198.18.0.1:80 leads back to this process") {
		t.Errorf("log: %s", log)
	}
}

// TestLastWords has a server that is reset after it answered, which is noticed by a write: the answer
// reaches the client, then the reset does.
func TestLastWords(t *testing.T) {
	namespace(t)
	pair := func(at string) (near, far *net.TCPConn) {
		accepted := make(chan *net.TCPConn, 1)
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			c, _ := l.Accept()
			accepted <- c.(*net.TCPConn)
		}()
		near = dialTCP(t, at)
		far = <-accepted
		t.Cleanup(func() { far.Close() })
		return near, far
	}
	var r relay
	var client, server *net.TCPConn
	r.client.TCPConn, client = pair(host4 + ":1")
	r.server.TCPConn, server = pair(container4 + ":80")
	_, _ = io.WriteString(client, "x")
	_, _ = io.WriteString(server, "answer")
	_ = server.SetLinger(0)
	server.Close()
	r.copy(&r.server, &r.client)
	if !r.broken.Load() {
		t.Error("the reset went unnoticed")
	}
	r.copy(&r.client, &r.server)
	b := make([]byte, 6)
	if _, err := io.ReadFull(client, b); err != nil || string(b) != "answer" {
		t.Errorf("got %q, %v", b, err)
	}
	wantReset(t, client)
}

// TestOwnPorts publishes a port that one of our own connections comes from.
func TestOwnPorts(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("a"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	c := dialTCP(t, "127.0.0.1:80")
	readWord(t, c)
	var from uint16
	p.loop.do(func() {
		for o := range p.origins {
			from = o.addr.Port()
		}
	})
	hold(t, p, hostPort(tcp, fmt.Sprintf("0.0.0.0:%d", from), container4+":80"))
	exchange(t, c, "hello")
}

// TestOutOfFiles lets accept fail for want of descriptors: the connection waits, the loop does not
// spin, and the relay comes about when there are descriptors again, be it that some time has passed
// or that a relay has ended.
func TestOutOfFiles(t *testing.T) {
	t.Run("timer", func(t *testing.T) { outOfFiles(t, 50*time.Millisecond, false) })
	t.Run("relay ends", func(t *testing.T) { outOfFiles(t, time.Hour, true) })
}

func outOfFiles(t *testing.T, rearm time.Duration, end bool) {
	p, log := start(t, func(l *limits) { l.rearm = rearm })
	listenTCP(t, container4+":80", echo("a"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	earlier := dialTCP(t, "127.0.0.1:80")
	readWord(t, earlier)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// The client's socket is there before the limit, which then is lower than any new descriptor.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	timeout := unix.Timeval{Sec: 10}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	}
	defer restore()
	_, to, _ := sockaddr(hostPort(tcp, "127.0.0.1:80", container4+":80").Host)
	if err := unix.Connect(fd, to); err != nil {
		t.Fatal(err)
	}
	until(t, "the listener pauses", func() error {
		paused := 0
		p.loop.do(func() { paused = len(p.paused) })
		return same(1, paused)
	})
	if !log.has("accept connections to host port 127.0.0.1:80/tcp: trying again in " + rearm.String()) {
		t.Errorf("log: %s", log)
	}
	if err := p.Hold(hostPort(tcp, "127.0.0.1:81", container4+":80")); !errors.Is(err, unix.EMFILE) {
		t.Errorf("hold without descriptors: %v", err)
	}
	restore()
	if end {
		earlier.Close()
	}
	b := make([]byte, 1)
	if _, err := unix.Read(fd, b); err != nil || string(b) != "a" {
		t.Errorf("after the descriptors came back: %q, %v", b, err)
	}
}

// TestListenerKilled takes the listener away, as ss --kill does: it is not listed any more, and can
// be held anew.
func TestListenerKilled(t *testing.T) {
	p, log := start(t)
	listenTCP(t, container4+":80", echo("a"))
	hp := hostPort(tcp, "127.0.0.1:80", container4+":80")
	hold(t, p, hp)
	p.loop.do(func() { _ = unix.Shutdown(p.find(hp).fd, unix.SHUT_RD) })
	until(t, "the port is lost", func() error { return same(0, len(p.Held())) })
	if !log.has("the socket of host port 127.0.0.1:80/tcp is gone") {
		t.Errorf("log: %s", log)
	}
	hold(t, p, hp)
	readWord(t, dialTCP(t, "127.0.0.1:80"))
}

// TestManyClients relays to many at once.
func TestManyClients(t *testing.T) {
	p, _ := start(t)
	listenTCP(t, container4+":80", echo("a"))
	hold(t, p, hostPort(tcp, "127.0.0.1:80", container4+":80"))
	clients := make([]*net.TCPConn, 200)
	for i := range clients {
		clients[i] = dialTCP(t, "127.0.0.1:80")
	}
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			b := make([]byte, 5)
			_, _ = io.WriteString(c, fmt.Sprintf("%04d", i))
			if _, err := io.ReadFull(c, b); err != nil || string(b) != fmt.Sprintf("a%04d", i) {
				t.Errorf("client %d: %q, %v", i, b, err)
			}
		})
	}
	wg.Wait()
}
