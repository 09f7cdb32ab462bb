package hostport

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestRelayUDP(t *testing.T) {
	p, _ := start(t)
	serveUDP(t, container4+":53", "four")
	serveUDP(t, "["+container6+"]:53", "six")
	for _, c := range []struct{ host, target, dial, want string }{
		{"127.0.0.1:5353", container4 + ":53", "127.0.0.1:5353", "four"},
		{"0.0.0.0:5354", container4 + ":53", "127.0.0.2:5354", "four"}, // a connected client: takes replies from there only
		{"0.0.0.0:5355", container4 + ":53", host4 + ":5355", "four"},
		{"[::1]:5353", "[" + container6 + "]:53", "[::1]:5353", "six"},
		{"[::]:5356", container4 + ":53", "[::1]:5356", "four"},
		{"[::]:5357", container4 + ":53", "[" + container6 + "]:5357", "four"},
	} {
		hold(t, p, hostPort(udp, c.host, c.target))
		client := dialUDP(t, c.dial)
		for _, what := range []string{"hello", "", strings.Repeat("x", 65000)} { // the longest leaves room for the server's words
			if word, _, rest := ask(t, client, what); word != c.want || rest != what {
				t.Errorf("%s: %s answers with %d bytes, want %s and %d", c.dial, word, len(rest), c.want, len(what))
			}
		}
	}
}

// TestFlows checks that a client is always the same to the server, and two are not.
func TestFlows(t *testing.T) {
	p, _ := start(t)
	serveUDP(t, container4+":5300", "a")
	hold(t, p, hostPort(udp, "0.0.0.0:53", container4+":5300"))
	a, b := dialUDP(t, "127.0.0.1:53"), dialUDP(t, "127.0.0.1:53")
	_, first, _ := ask(t, a, "1")
	_, again, _ := ask(t, a, "2")
	_, other, _ := ask(t, b, "3")
	if first != again || first == other {
		t.Errorf("the server sees ports %d and %d of one client, %d of the other", first, again, other)
	}
	// One client that speaks to two addresses of the host gets its answers from each.
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	for _, to := range []string{"127.0.0.1:53", "127.0.0.2:53", "127.0.0.1:53"} {
		_, _ = c.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(hostPort(udp, to, to).Host))
		if _, from, err := c.ReadFrom(make([]byte, 100)); err != nil || from.String() != to {
			t.Errorf("asked %s, the answer comes from %v: %v", to, from, err)
		}
	}
	if n := active(p); n != 4 {
		t.Errorf("%d flows, want 4", n)
	}
}

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func TestFlowsExpire(t *testing.T) {
	now := &clock{now: time.Unix(1e9, 0)}
	p, _ := start(t, func(l *limits) { l.now = now.Now })
	serveUDP(t, container4+":53", "a")
	hold(t, p, hostPort(udp, "127.0.0.1:53", container4+":53"))
	idle, busy := dialUDP(t, "127.0.0.1:53"), dialUDP(t, "127.0.0.1:53")
	_, before, _ := ask(t, busy, "x")
	ask(t, idle, "x")
	now.advance(100 * time.Second)
	_, after, _ := ask(t, busy, "x")
	if n := active(p); before != after || n != 2 {
		t.Errorf("before the time: ports %d and %d, %d flows", before, after, n)
	}
	now.advance(35 * time.Second)
	p.loop.post(func() {}) // the loop waits by a clock that nobody advanced
	until(t, "the idle flow is forgotten", func() error { return same(1, active(p)) })
	if _, after, _ = ask(t, busy, "x"); after != before {
		t.Errorf("the busy flow was forgotten")
	}
	ask(t, idle, "x") // has a new one
	now.advance(time.Hour)
	p.loop.post(func() {})
	until(t, "all flows are forgotten", func() error { return same(0, active(p)) })
	var wait time.Duration
	p.loop.do(func() { wait = p.tick() })
	if wait >= 0 {
		t.Errorf("with nothing to do the loop waits for %s only", wait)
	}
}

// TestTooManyFlows has more clients than a port may have: the one that was silent longest goes.
func TestTooManyFlows(t *testing.T) {
	for _, change := range []func(*limits){func(l *limits) { l.flows = 2 }, func(l *limits) { l.relays = 2 }, func(l *limits) { l.flows = 1 }} {
		t.Run("", func(t *testing.T) {
			p, _ := start(t, change)
			serveUDP(t, container4+":53", "a")
			hold(t, p, hostPort(udp, "127.0.0.1:53", container4+":53"))
			a, b, c := dialUDP(t, "127.0.0.1:53"), dialUDP(t, "127.0.0.1:53"), dialUDP(t, "127.0.0.1:53")
			ask(t, a, "x")
			_, first, _ := ask(t, b, "x")
			ask(t, c, "x") // in place of a
			limit := min(p.limits.flows, p.limits.relays)
			if n := active(p); n != limit {
				t.Errorf("%d flows, want %d", n, limit)
			}
			if _, again, _ := ask(t, b, "x"); limit == 2 && first != again {
				t.Error("the wrong flow went")
			}
		})
	}
}

func TestUDPTargetChanges(t *testing.T) {
	p, _ := start(t)
	serveUDP(t, container4+":53", "old")
	serveUDP(t, other4+":53", "new")
	hp := hostPort(udp, "127.0.0.1:53", container4+":53")
	hold(t, p, hp)
	c := dialUDP(t, "127.0.0.1:53")
	_, before, _ := ask(t, c, "x")
	hold(t, p, hp) // no change
	if word, after, _ := ask(t, c, "x"); word != "old" || before != after {
		t.Errorf("%q answers to port %d, before to %d", word, after, before)
	}
	hp.Target = hostPort(udp, "127.0.0.1:53", other4+":53").Target
	hold(t, p, hp)
	if word, _, _ := ask(t, c, "x"); word != "new" {
		t.Errorf("%q answers after the change", word)
	}
	if n := active(p); n != 1 {
		t.Errorf("%d flows", n)
	}
}

// TestFlowKilled takes a flow's socket away, as ss --kill does.
func TestFlowKilled(t *testing.T) {
	p, _ := start(t)
	serveUDP(t, container4+":53", "a")
	hp := hostPort(udp, "127.0.0.1:53", container4+":53")
	hold(t, p, hp)
	c := dialUDP(t, "127.0.0.1:53")
	ask(t, c, "x")
	p.loop.do(func() {
		for _, f := range p.find(hp).flows.byClient {
			unspecified := unix.RawSockaddr{Family: unix.AF_UNSPEC} // dissolves the association, connect(2)
			if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(f.fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified)); errno != 0 {
				t.Errorf("disconnect: %v", errno)
			}
		}
	})
	if _, err := c.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	until(t, "the flow is given up", func() error { return same(0, active(p)) })
	if word, _, rest := ask(t, c, "y"); word != "a" || rest != "y" {
		t.Errorf("got %q, %q", word, rest)
	}
}

// TestUDPRefused has a target where nobody listens, then somebody does.
func TestUDPRefused(t *testing.T) {
	p, _ := start(t)
	hold(t, p, hostPort(udp, "127.0.0.1:53", container4+":53"))
	hold(t, p, hostPort(udp, "127.0.0.1:54", "203.0.113.9:53")) // there is no route
	c := dialUDP(t, "127.0.0.1:53")
	for range 3 {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := dialUDP(t, "127.0.0.1:54").Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	until(t, "the client has a flow", func() error { return same(1, active(p)) })
	serveUDP(t, container4+":53", "a")
	if word, _, _ := ask(t, c, "y"); word != "a" {
		t.Errorf("got %q", word)
	}
}

// TestUDPManyClients asks from many sockets at once.
func TestUDPManyClients(t *testing.T) {
	p, _ := start(t)
	serveUDP(t, container4+":53", "a")
	hold(t, p, hostPort(udp, "127.0.0.1:53", container4+":53"))
	clients := make([]*net.UDPConn, 100)
	for i := range clients {
		clients[i] = dialUDP(t, "127.0.0.1:53")
	}
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			for n := range 10 {
				what := fmt.Sprintf("%d-%d", i, n)
				if _, _, rest := ask(t, c, what); rest != what {
					t.Errorf("asked %s, got %s", what, rest)
				}
			}
		})
	}
	wg.Wait()
	release(t, p, hostPort(udp, "127.0.0.1:53", container4+":53"))
	if n := active(p); n != 0 {
		t.Errorf("%d flows after the release", n)
	}
}
