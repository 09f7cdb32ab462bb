package hostport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// acceptBatch is how many connections of one port are taken before the other sockets have their turn.
const acceptBatch = 16

// keepAlive finds ends that have vanished without a word, such as a container whose link was
// removed, within two minutes.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// accept takes connections that wait, and begins to relay them.
func (o *port) accept() {
	p := o.owner
	for range acceptBatch {
		fd, from, err := unix.Accept4(o.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case err == nil:
			p.relay(o, fd, origin{unix.SOCK_STREAM, addrPort(from)})
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			// The connection still waits, so the loop would be told of it again at once.
			p.failing.warn(p.limits.now(), p.log.WithError(err),
				"accept connections to host port %s/tcp: trying again in %s", o.hp.Host, p.limits.rearm)
			p.pause(o)
			return
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBADF), errors.Is(err, unix.ENOTSOCK):
			p.lost(o, err) // it does not listen any more
			return
		default:
			// ECONNABORTED, EINTR, or an error of the network that accept(2) passes on: that
			// connection is gone from the queue.
		}
	}
}

// pause leaves the port's connections in the kernel's queue until a relay ends or some time has
// passed.
func (p *Ports) pause(o *port) {
	p.loop.forget(o.fd)
	if len(p.paused) == 0 {
		p.rearmAt = p.limits.now().Add(p.limits.rearm)
	}
	p.paused[o] = true
}

// resume lets the paused ports try again.
func (p *Ports) resume() {
	for o := range p.paused {
		if err := p.loop.watch(o.fd, o); err != nil {
			p.failing.warn(p.limits.now(), p.log.WithError(err),
				"listen again on host port %s/tcp: trying again in %s", o.hp.Host, p.limits.rearm)
			p.rearmAt = p.limits.now().Add(p.limits.rearm)
			return
		}
		delete(p.paused, o)
	}
}

// relay relays an accepted connection to the port's target, or resets it.
func (p *Ports) relay(o *port, fd int, from origin) {
	if !p.admit(o, from) {
		resetSocket(fd)
		return
	}
	server, local, err := connect(unix.SOCK_STREAM, o.hp.Target)
	if err != nil {
		p.log.WithError(err).Debugf("relay %s from host port %s/tcp to %s", from.addr, o.hp.Host, o.hp.Target)
		resetSocket(fd)
		return
	}
	r := &relay{origin: local}
	if r.client.TCPConn, err = conn(fd); err != nil {
		resetSocket(server)
	} else if r.server.TCPConn, err = conn(server); err != nil {
		abort(r.client.TCPConn)
	}
	if err != nil {
		p.failing.warn(p.limits.now(), p.log.WithError(err),
			"relay %s from host port %s/tcp", from.addr, o.hp.Host)
		return
	}
	if o.relays == nil {
		o.relays = map[*relay]struct{}{}
	}
	o.relays[r] = struct{}{}
	p.begun(r.origin)
	p.relays.Go(func() {
		if err := r.run(p.limits.dial); err != nil {
			p.log.WithError(err).Debugf("relay %s from host port %s/tcp", from.addr, o.hp.Host)
		}
		p.loop.post(func() {
			delete(o.relays, r)
			p.ended(r.origin)
		})
	})
}

// admit reports whether a client may be relayed. It refuses our own: the target is a
// port that we hold, and a relay would go round for ever.
func (p *Ports) admit(o *port, from origin) bool {
	switch {
	case p.origins[from] > 0:
		p.looping.warn(p.limits.now(), p.log,
			"host port %s/%s: its target %s leads back to this process", o.hp.Host, o.hp.Proto, o.hp.Target)
	case p.active >= p.limits.relays:
		p.full.warn(p.limits.now(), p.log,
			"host port %s/%s: refused %s, %d connections are being relayed", o.hp.Host, o.hp.Proto, from.addr, p.active)
	default:
		return true
	}
	return false
}

// begun and ended count our own connections.
func (p *Ports) begun(from origin) {
	p.active++
	p.origins[from]++
}

func (p *Ports) ended(from origin) {
	p.active--
	if p.origins[from]--; p.origins[from] == 0 {
		delete(p.origins, from)
	}
	p.resume() // there are free file descriptors now
}

// relay is one TCP connection that is passed on.
type relay struct {
	origin         origin
	client, server end
	broken         atomic.Bool // one end was reset: the other shall know
}

// end is one end's connection.
type end struct {
	*net.TCPConn
	finished atomic.Bool // nothing more is sent to it
}

// run copies both ways until both ends have closed their side, or one is reset.
func (r *relay) run(dial time.Duration) error {
	if err := connected(r.server.TCPConn, dial); err != nil {
		r.reset() // as if the port were closed, though the client has been accepted by now
		return err
	}
	back := make(chan struct{})
	go func() {
		defer close(back)
		r.copy(&r.client, &r.server)
	}()
	r.copy(&r.server, &r.client)
	<-back
	if r.broken.Load() {
		r.reset()
	}
	return errors.Join(closed(r.client.TCPConn), closed(r.server.TCPConn))
}

// copy passes on what src sends, up to its end of file, which is passed on as well (a
// half-close, RFC 9293 section 3.6). Between TCP sockets the data stays in the kernel (splice(2)).
func (r *relay) copy(dst, src *end) {
	_, err := io.Copy(dst.TCPConn, src.TCPConn)
	// When the other direction met with the reset of src first, it looks here like an end of file.
	// An orderly end leaves a connection only when both sides have ended.
	reset := dead(src.TCPConn) && !src.finished.Load()
	if err == nil && !reset {
		dst.finished.Store(true)
		_ = dst.CloseWrite() // fails when dst has been reset, which the other direction notices
		return
	}
	r.broken.Store(true)
	if !dead(dst.TCPConn) {
		r.reset() // src was reset, or there is no way to go on: both shall know
		return
	}
	// dst takes no more. What it sent before still goes to src; then the other direction ends too.
}

// reset ends the relay at once, and lets both ends know that this is not an orderly end. It is safe
// to call at any time, from any goroutine.
func (r *relay) reset() {
	abort(r.client.TCPConn)
	abort(r.server.TCPConn)
}

func abort(c *net.TCPConn) {
	_ = c.SetLinger(0) // fails for a closed one only
	c.Close()
}

func closed(c *net.TCPConn) error {
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// conn makes a connection of Go's of a socket, which may still be connecting. The socket is taken
// over, or reset when this fails.
func conn(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "tcp relay")
	defer f.Close() // FileConn makes a descriptor of its own
	c, err := net.FileConn(f)
	if err == nil {
		t := c.(*net.TCPConn) // what FileConn makes of a TCP socket
		if err = t.SetKeepAliveConfig(keepAlive); err == nil {
			return t, nil
		}
		t.Close()
	}
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // for f.Close
	return nil, fmt.Errorf("use socket: %w", err)
}

// connected waits until a connection that was begun is there or has failed: the socket can be
// written to then (connect(2), EINPROGRESS).
func connected(c *net.TCPConn, within time.Duration) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if err := c.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	var failure error
	err = raw.Write(func(fd uintptr) bool {
		var errno int
		if errno, failure = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); failure != nil {
			return true
		}
		if errno != 0 {
			failure = unix.Errno(errno)
			return true
		}
		_, err := unix.Getpeername(int(fd))
		return err == nil
	})
	if err = errors.Join(failure, err); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return c.SetWriteDeadline(time.Time{})
}

// tcpClose is the state of a socket without a connection (tcp_states.h, TCP_CLOSE).
const tcpClose = 7

// dead reports whether the connection has been reset or has timed out.
func dead(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	gone := true
	if err := raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
		gone = err != nil || info.State == tcpClose
	}); err != nil {
		return true
	}
	return gone
}
