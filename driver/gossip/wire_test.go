package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// TestStreamsOfStrangers opens streams and sends no end of bytes: the rest of the cluster does not
// notice.
func TestStreamsOfStrangers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		to := netip.AddrPortFrom(address(1), port).String()
		for i := range 20 {
			from := c.net.station(netip.AddrPortFrom(address(1000+i), port))
			for range 20 {
				go func() {
					conn, err := from.DialTimeout(to, time.Second)
					if err != nil {
						return
					}
					elapse(time.Minute)
					_ = conn.Close()
				}()
			}
		}
		elapse(time.Second)
		w := c.hosts[1].wire
		w.mu.Lock()
		total, one := w.total, w.from[address(1000)]
		w.mu.Unlock()
		if total > maxStreams || one > maxFromAddress {
			t.Errorf("%d streams are open, %d of one address", total, one)
		}
		if got := c.hosts[1].Status().Refused["too many streams"]; got < 300 {
			t.Errorf("%d streams are counted as refused", got)
		}
		elapse(time.Minute)
		w.mu.Lock()
		if w.total != 0 || len(w.from) != 0 {
			t.Errorf("%d streams are left over", w.total)
		}
		w.mu.Unlock()

		// A message that says it is long is read only so far. 10 is memberlist's type of what is encrypted.
		from := c.net.station(netip.AddrPortFrom(address(1000), port))
		conn, err := from.DialTimeout(to, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		before := w.received.Load()
		header := append([]byte{244, 3}, "lab"...)
		header = binary.BigEndian.AppendUint32(append(header, 10), 20<<20)
		_, _ = conn.Write(append(header, make([]byte, 2*maxStream)...))
		elapse(20 * time.Second)
		if got := w.received.Load() - before; got > maxStream+1<<20 {
			t.Errorf("%d bytes were read", got)
		}
		_ = conn.Close()
		c.hosts[1].Set(endpoint(1, 1))
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(1, 1).Key: c.hosts[1].self})
	})
}

// TestMessagesOfOtherVersions counts what it does not understand and goes on.
func TestMessagesOfOtherVersions(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := run(t, 3)
		defer c.stop()
		one, two := c.hosts[1], c.hosts[2]
		node, _ := one.node(two.self)
		frame := func(op byte, content string) []byte { return appendFrame(msgRequest, 7, one.self, op, []byte(content)) }
		for _, message := range [][]byte{
			{}, {99}, []byte("\x63later version"), {msgStatement}, {msgStatement, 255, 255, 255}, {msgRequest}, {msgReply, 1, 2, 3}, {msgSeal}, {msgSeal, 9, 9, 9},
			frame(99, ""), frame(opSum, "x"), frame(opDigest, ""), frame(opDigest, "12345678\xff\xff\xff"),
			frame(opDelta, ""), frame(opDelta, "123456780\xff\xff\xff\xff"), frame(opClaim, "\xff"), frame(opUnclaim, "x"), frame(opKey, ""), frame(opKey, "\x09key"),
			appendFrame(msgReply, 7, one.self, 0, nil), appendFrame(msgRequest, 7, "nobody/1", opSum, nil),
			make([]byte, maxMessage+1),
		} {
			if err := one.list.SendReliable(node, message); err != nil {
				t.Fatal(err)
			}
			if len(message) < 100 {
				if err := one.list.SendBestEffort(node, message); err != nil {
					t.Fatal(err)
				}
			}
			elapse(100 * time.Millisecond)
		}
		elapse(2 * time.Second) // somebody unknown may become known
		refused := two.Status().Refused
		for _, reason := range []string{"unknown type", "malformed", "stranger"} {
			if refused[reason] < 2 {
				t.Errorf("%q is counted %d times of %v", reason, refused[reason], refused)
			}
		}
		if _, err := one.call(t.Context(), two.self, 99, nil); err == nil || !strings.Contains(err.Error(), "earlier version") {
			t.Errorf("an operation that the other does not know: %v", err)
		}
		one.Set(endpoint(1, 1))
		c.agree(time.Minute, map[facts.Key]facts.Host{endpoint(1, 1).Key: one.self})
	})
}

// TestFloodOfRequests serves only so many at a time.
func TestFloodOfRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		release := make(chan struct{})
		c := run(t, 3, func(i int, config *Config) {
			config.Busy = func(netip.Prefix, netip.Prefix) bool { <-release; return false }
		})
		defer c.stop()
		two := c.hosts[2]
		if err := two.Claim(t.Context(), subnet, subnet); err != nil {
			t.Fatal(err)
		}
		for i := range 1000 {
			content := encodeClaim(&claim{subnet: subnet, block: block(i, 32)})
			two.receive(appendFrame(msgRequest, uint64(i), c.hosts[1].self, opClaim, content))
		}
		elapse(time.Second)
		n := len(two.serving) // one may be of an exchange
		if n < maxServing-2 || n > maxServing {
			t.Errorf("%d requests are served at a time", n)
		}
		if got := two.Status().Refused["busy"]; got < uint64(1000-maxServing) || got > uint64(1002-maxServing) {
			t.Errorf("%d requests are counted as refused", got)
		}
		close(release)
		elapse(10 * time.Second)
		if n := len(two.serving); n != 0 {
			t.Errorf("%d requests are left over", n)
		}
	})
}

// TestOverSockets runs three hosts over TCP and UDP of the loopback interface.
func TestOverSockets(t *testing.T) {
	free, err := net.Listen("tcp", "127.86.1.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(free.Addr().(*net.TCPAddr).Port)
	_ = free.Close()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(t.Context())
	var hosts []*Gossip
	var done []chan error
	for i := byte(1); i <= 3; i++ {
		at := netip.AddrFrom4([4]byte{127, 86, 1, i})
		g, err := New(Config{
			Name: "s" + strconv.Itoa(int(i)), ID: "id", Epoch: 1, Bind: at, Advertise: at, Port: port, Seeds: []string{"127.86.1.1"},
			Label: "sockets", Keys: [][]byte{bytes.Repeat([]byte{i / 4}, 32)}, Log: logrus.NewEntry(logger),
		})
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, g)
		ended := make(chan error, 1)
		done = append(done, ended)
		go func() { ended <- g.Run(ctx) }()
	}
	poll := func(what string, holds func() bool) {
		t.Helper()
		limit, tick := time.After(30*time.Second), time.NewTicker(10*time.Millisecond)
		defer tick.Stop()
		for !holds() {
			select {
			case <-limit:
				t.Fatalf("not within 30 s: %s: %+v", what, hosts[0].Status())
			case <-tick.C:
			}
		}
	}
	poll("all know each other and are in sync", func() bool {
		for _, g := range hosts {
			if g.Status().Alive != 3 || !g.Synced() {
				return false
			}
		}
		return true
	})
	var all []Statement
	for i := range 5000 {
		all = append(all, endpoint(i, 3))
	}
	hosts[2].Set(all...)
	poll("the facts are there", func() bool { return len(hosts[0].Remotes(5000)) == 5000 && len(hosts[1].Remotes(5000)) == 5000 })
	if err := hosts[1].Claim(ctx, subnet, block(0, 24)); err != nil {
		t.Error(err)
	}
	if _, ok := IsTaken(hosts[0].Claim(ctx, subnet, block(0, 24))); !ok {
		t.Error("a block is claimed twice")
	}
	poll("round trips are measured", func() bool {
		for _, p := range hosts[0].Peers() {
			if !p.Self && (p.RTT <= 0 || p.State != Alive) {
				return false
			}
		}
		return true
	})
	cancel()
	for _, ended := range done {
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	// The port is free again.
	again, err := net.Listen("tcp", netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 86, 1, 1}), port).String())
	if err != nil {
		t.Error(err)
	} else {
		_ = again.Close()
	}
}

func TestFrame(t *testing.T) {
	id, from, code, content, ok := decodeFrame(appendFrame(msgRequest, 1<<63+5, "h/1", 4, []byte("content")))
	if !ok || id != 1<<63+5 || from != "h/1" || code != 4 || string(content) != "content" {
		t.Error(id, from, code, string(content), ok)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(appendFrame(msgRequest, 1, "h/1", opClaim, encodeClaim(&claim{subnet: subnet, block: block(0, 24)})))
	f.Add(meta{epoch: 300, vtep: address(1), version: "1.2"}.encode())
	f.Add(meta{away: true, vtep: netip.MustParseAddr("fd00::1")}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeMeta(b); err == nil {
			again, err := decodeMeta(m.encode())
			if err != nil || again != m || len(m.encode()) > 512 {
				t.Errorf("%+v becomes %+v, %v", m, again, err)
			}
		}
		if id, from, code, content, ok := decodeFrame(b); ok {
			if !bytes.Equal(appendFrame(b[0], id, from, code, content), b) {
				t.Errorf("the frame %x is another when encoded", b)
			}
			if c, ok := decodeClaim(content); ok && !covers(c.subnet, c.block) {
				t.Errorf("a claim of %v in %v", c.block, c.subnet)
			}
		}
	})
}

// FuzzServe has a host take what a peer sends it. Nobody states anything for another host.
func FuzzServe(f *testing.F) {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	self := netip.AddrPortFrom(address(1), port)
	g, err := New(Config{
		Name: "h1", ID: "id1", Epoch: 1, Port: port, Advertise: self.Addr(), Keys: [][]byte{make([]byte, 16)},
		Transport: newNetwork().station(self), Log: logrus.NewEntry(logger),
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		if err := g.Run(ended); err != nil {
			f.Error(err)
		}
	})
	peer := facts.New("h2/id2", 1)
	mine, theirs := endpoint(1, 1), endpoint(2, 2)
	_, _ = peer.Set(theirs.Key, theirs.MAC)
	peer.Seal()
	sum, id := peer.Digest().Sum(), make([]byte, 8)
	delta := append(make([]byte, 8), 1)
	for d := range peer.Difference(nil, chunk) {
		part := d.Append(nil)
		delta = append(binary.BigEndian.AppendUint32(delta, uint32(len(part))), part...)
		f.Add(byte(0), append([]byte{msgSeal}, facts.Delta{Owner: d.Owner, Epoch: d.Epoch, Seal: d.Seal}.Append(nil)...))
		f.Add(byte(0), facts.AppendFacts([]byte{msgStatement}, d.Facts))
	}
	f.Add(byte(opSum), sum[:])
	f.Add(byte(opDigest), peer.Digest().Append(id[:8:8]))
	f.Add(byte(opDelta), delta)
	f.Add(byte(opClaim), encodeClaim(&claim{subnet: subnet, block: block(0, 24)}))
	f.Add(byte(opUnclaim), encodeClaim(&claim{subnet: subnet, block: block(0, 24)}))
	f.Add(byte(opKey), append([]byte{keyAdd}, make([]byte, 32)...))
	f.Add(byte(opAway), []byte{})
	f.Fuzz(func(t *testing.T, op byte, content []byte) {
		g.mu.Lock()
		g.state = facts.New(g.self, 1)
		own, _ := g.state.Set(mine.Key, mine.MAC)
		g.mu.Unlock()
		if op == 0 {
			g.receive(content)
		} else {
			status, answer, then := g.serve(op, "h2/id2", content)
			if status > statusUnknown || status == statusFailed && len(answer) == 0 {
				t.Errorf("status %d, %q", status, answer)
			}
			if then != nil {
				then()
			}
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if all := slices.Collect(g.state.Of(g.self)); !slices.Equal(all, []facts.Fact{own}) {
			t.Errorf("this host states %v, and has stated %v", all, own)
		}
	})
}

// TestStopsAtOnce ends a host while it waits for one that does not answer: an engine that asks its plugin
// to stop kills it after 10 s, and there is more to end than this.
func TestStopsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := newCluster(t, 2)
		c.net.sever(address(1), address(2))
		c.hosts[1].start()
		elapse(time.Second) // a seed is being dialled
		since := time.Now()
		c.hosts[1].kill()
		if took := time.Since(since); took > time.Second {
			t.Errorf("stopping took %s", took)
		}
	})
}
