package gossip

import (
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
)

var _ = synctest.Wait // this is all in virtual time

// network is an underlay in memory: it delays, loses and cuts.
type network struct {
	latency time.Duration

	mu    sync.Mutex
	loss  float64 // of packets; a lost segment of a stream comes later
	cuts  map[[2]netip.Addr]bool
	cut   func(from, to netip.Addr) bool // cuts more
	hosts map[netip.AddrPort]*station

	packets, bytes, streamed atomic.Int64
	longest                  atomic.Int64 // bytes of one direction of a stream
}

func newNetwork() *network {
	return &network{latency: time.Millisecond, cuts: map[[2]netip.Addr]bool{}, hosts: map[netip.AddrPort]*station{}}
}

// sever cuts one direction.
func (n *network) sever(from, to netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cuts[[2]netip.Addr{from, to}] = true
}

func (n *network) lose(share float64) {
	n.mu.Lock()
	n.loss = share
	n.mu.Unlock()
}

// divide cuts everything between two parts; nil mends.
func (n *network) divide(left func(netip.Addr) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = nil
	if left != nil {
		n.cut = func(a, b netip.Addr) bool { return left(a) != left(b) }
	}
}

func (n *network) mend() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = nil
	clear(n.cuts)
}

func (n *network) passes(from, to netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cuts[[2]netip.Addr{from, to}] && (n.cut == nil || !n.cut(from, to))
}

func (n *network) loses() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.loss > 0 && rand.Float64() < n.loss
}

// delay is how long a segment of a stream takes, with what is sent again.
func (n *network) delay() time.Duration {
	d, again := n.latency, 200*time.Millisecond
	for n.loses() && again < 10*time.Second {
		d += again
		again *= 2
	}
	return d
}

func (n *network) at(addr netip.AddrPort) *station {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.hosts[addr]
}

// station is a host's place in the network: a memberlist.Transport.
type station struct {
	net     *network
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
	stop    chan struct{}
	once    sync.Once
}

func (n *network) station(addr netip.AddrPort) *station {
	s := &station{net: n, addr: addr, packets: make(chan *memberlist.Packet, 4096), streams: make(chan net.Conn), stop: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[addr] = s
	return s
}

func (s *station) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return s.addr.Addr().AsSlice(), int(s.addr.Port()), nil
}

func (s *station) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	s.net.packets.Add(1)
	s.net.bytes.Add(int64(len(b)))
	if s.net.loses() {
		return time.Now(), nil
	}
	b = append([]byte(nil), b...)
	time.AfterFunc(s.net.latency, func() {
		other := s.net.at(to)
		if other == nil || !s.net.passes(s.addr.Addr(), to.Addr()) {
			return
		}
		select {
		case other.packets <- &memberlist.Packet{Buf: b, From: net.UDPAddrFromAddrPort(s.addr), Timestamp: time.Now()}:
		default:
		}
	})
	return time.Now(), nil
}

func (s *station) PacketCh() <-chan *memberlist.Packet { return s.packets }
func (s *station) StreamCh() <-chan net.Conn           { return s.streams }

func (s *station) Shutdown() error {
	s.once.Do(func() { close(s.stop) })
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	if s.net.hosts[s.addr] == s {
		delete(s.net.hosts, s.addr)
	}
	return nil
}

func (s *station) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	refuse := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	rtt := s.net.delay() + s.net.delay()
	if !s.net.passes(s.addr.Addr(), to.Addr()) || !s.net.passes(to.Addr(), s.addr.Addr()) || rtt > timeout {
		time.Sleep(max(timeout, 0))
		return refuse(os.ErrDeadlineExceeded)
	}
	time.Sleep(rtt)
	other := s.net.at(to)
	if other == nil {
		return refuse(syscall.ECONNREFUSED)
	}
	near, far := pipe(s.net, s.addr, to)
	select {
	case other.streams <- far:
		return near, nil
	case <-other.stop:
		return refuse(syscall.ECONNREFUSED)
	}
}

// half is one direction of a stream.
type half struct {
	net      *network
	from, to netip.Addr
	ready    chan struct{} // something has come

	mu    sync.Mutex
	total int64
	sent  [][]byte // on their way; nil is the end
	busy  bool
	buf   []byte
	ended bool
}

// send puts a segment on its way; segments arrive in order.
func (h *half) send(b []byte) {
	h.net.streamed.Add(int64(len(b)))
	h.mu.Lock()
	defer h.mu.Unlock()
	h.total += int64(len(b))
	if b == nil { // once a stream: the race detector makes it dear
		for longest := h.net.longest.Load(); h.total > longest && !h.net.longest.CompareAndSwap(longest, h.total); {
			longest = h.net.longest.Load()
		}
	}
	h.sent = append(h.sent, b)
	if !h.busy {
		h.busy = true
		time.AfterFunc(h.net.delay(), h.arrive)
	}
}

func (h *half) arrive() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.net.passes(h.from, h.to) {
		if len(h.sent) > 0 && h.sent[len(h.sent)-1] == nil { // nobody waits for it any more
			h.ended = true
			wake(h.ready)
			return
		}
		time.AfterFunc(time.Second, h.arrive)
		return
	}
	for _, b := range h.sent {
		h.buf = append(h.buf, b...)
		h.ended = h.ended || b == nil
	}
	h.sent, h.busy = nil, false
	wake(h.ready)
}

// end is one end of a stream: a net.Conn.
type end struct {
	in, out     *half
	near, far   netip.AddrPort
	mu          sync.Mutex
	read, write time.Time
	closed      bool
}

func pipe(n *network, a, b netip.AddrPort) (net.Conn, net.Conn) {
	ab := &half{net: n, from: a.Addr(), to: b.Addr(), ready: make(chan struct{}, 1)}
	ba := &half{net: n, from: b.Addr(), to: a.Addr(), ready: make(chan struct{}, 1)}
	return &end{in: ba, out: ab, near: a, far: b}, &end{in: ab, out: ba, near: b, far: a}
}

func (e *end) Read(b []byte) (int, error) {
	for {
		e.mu.Lock()
		deadline, closed := e.read, e.closed
		e.mu.Unlock()
		if closed {
			return 0, net.ErrClosed
		}
		e.in.mu.Lock()
		n := copy(b, e.in.buf)
		e.in.buf = e.in.buf[n:]
		ended := e.in.ended
		e.in.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if ended {
			return 0, io.EOF
		}
		var timeout <-chan time.Time
		if !deadline.IsZero() {
			timer := time.NewTimer(time.Until(deadline))
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-e.in.ready:
		case <-timeout:
			return 0, os.ErrDeadlineExceeded
		}
	}
}

func (e *end) Write(b []byte) (int, error) {
	e.mu.Lock()
	deadline, closed := e.write, e.closed
	e.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	if !deadline.IsZero() && time.Now().After(deadline) {
		return 0, os.ErrDeadlineExceeded
	}
	e.out.send(append([]byte{}, b...))
	return len(b), nil
}

func (e *end) Close() error {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	e.mu.Unlock()
	if !closed {
		wake(e.in.ready)
		e.out.send(nil)
	}
	return nil
}

func (e *end) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(e.near) }
func (e *end) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(e.far) }

func (e *end) SetDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.read, e.write = t, t
	return nil
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.read = t
	return nil
}

func (e *end) SetWriteDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.write = t
	return nil
}
