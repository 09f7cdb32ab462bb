package gossip

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// Limits of streams that others open, before memberlist can tell who they are. It reads a whole
// message into memory to verify it.
const (
	maxStreams     = 64
	maxFromAddress = 16
	maxStream      = 8 << 20 // bytes; an exchange of memberlist's about 10,000 members has 3 MiB
	streamTimeout  = 10 * time.Second
)

// wire is a transport with limits: memberlist itself takes any number of streams, and writes to one
// for ever if nobody reads at its end.
type wire struct {
	memberlist.Transport
	streams chan net.Conn
	stop    chan struct{}
	once    sync.Once

	over           atomic.Uint64 // streams refused
	sent, received atomic.Uint64 // bytes of streams

	mu      sync.Mutex
	total   int
	from    map[netip.Addr]int
	dialled map[*stream]bool // streams to others; nil after Shutdown
}

func newWire(inner memberlist.Transport) *wire {
	w := &wire{Transport: inner, streams: make(chan net.Conn), stop: make(chan struct{}), from: map[netip.Addr]int{}, dialled: map[*stream]bool{}}
	go w.accept()
	return w
}

func (w *wire) accept() {
	for {
		select {
		case conn := <-w.Transport.StreamCh():
			conn, ok := w.admit(conn)
			if !ok {
				continue
			}
			select {
			case w.streams <- conn:
			case <-w.stop:
				_ = conn.Close()
			}
		case <-w.stop:
			return
		}
	}
}

func (w *wire) admit(conn net.Conn) (net.Conn, bool) {
	var addr netip.Addr
	if at, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
		addr = at.Addr().Unmap()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.total >= maxStreams || w.from[addr] >= maxFromAddress {
		w.over.Add(1)
		_ = conn.Close()
		return nil, false
	}
	w.total++
	w.from[addr]++
	return &stream{Conn: conn, wire: w, left: maxStream, release: func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.total--
		if w.from[addr]--; w.from[addr] == 0 {
			delete(w.from, addr)
		}
	}}, true
}

// StreamCh gives the streams that were admitted.
func (w *wire) StreamCh() <-chan net.Conn { return w.streams }

// DialTimeout gives a stream that ends within streamTimeout, whatever the other end does, and with
// Shutdown: a host that does not answer must not keep this one from stopping.
func (w *wire) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	dialled := make(chan result, 1)
	go func() {
		conn, err := w.Transport.DialTimeout(addr, timeout)
		dialled <- result{conn, err}
	}()
	var conn net.Conn
	select {
	case r := <-dialled:
		if r.err != nil {
			return nil, r.err
		}
		conn = r.conn
	case <-w.stop:
		go func() {
			if r := <-dialled; r.err == nil {
				_ = r.conn.Close()
			}
		}()
		return nil, net.ErrClosed
	}
	if err := conn.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	s := &stream{Conn: conn, wire: w, left: maxStream}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dialled == nil { // it has stopped meanwhile
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	w.dialled[s] = true
	s.release = func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.dialled, s)
	}
	return s, nil
}

// Shutdown ends the transport, and the streams to others; streams are taken until it has.
func (w *wire) Shutdown() error {
	err := w.Transport.Shutdown()
	w.once.Do(func() { close(w.stop) })
	w.mu.Lock()
	defer w.mu.Unlock()
	for s := range w.dialled {
		_ = s.Conn.Close() // who uses it releases it
	}
	w.dialled = nil
	return err
}

// stream is a connection whose reader takes only so much.
type stream struct {
	net.Conn
	wire    *wire
	left    int
	once    sync.Once
	release func()
}

func (s *stream) Read(b []byte) (int, error) {
	if s.left <= 0 {
		s.wire.over.Add(1)
		return 0, net.ErrClosed
	}
	n, err := s.Conn.Read(b[:min(len(b), s.left)])
	s.left -= n
	s.wire.received.Add(uint64(n))
	return n, err
}

func (s *stream) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	s.wire.sent.Add(uint64(n))
	return n, err
}

func (s *stream) Close() error {
	s.once.Do(s.release)
	return s.Conn.Close()
}
