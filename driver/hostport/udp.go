package hostport

import (
	"container/list"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// datagramBatch is how many datagrams of one socket are passed on before the other sockets have
// their turn.
const datagramBatch = 32

// flows are the UDP clients of one port, at least one.
type flows struct {
	byClient map[client]*flow
	byUse    list.List // the one that has been idle longest is in front
}

// client is who sent a datagram, and the address of ours that it sent it to: the replies come from
// there.
type client struct {
	from, to netip.AddrPort // to: the port is left out
}

// flow passes datagrams on between one client and the target, through a socket of its own, so
// that the replies find their way (RFC 4787, section 4).
type flow struct {
	port   *port
	client client
	reply  unix.Sockaddr // the client's address
	source []byte        // ancillary data that makes a datagram come from the address that the client knows
	fd     int
	origin origin
	used   time.Time
	place  *list.Element
}

// receive takes datagrams of clients and passes them on. Those that cannot be passed on are lost,
// as UDP allows.
func (o *port) receive() {
	p := o.owner
	for range datagramBatch {
		n, oobn, _, from, err := unix.Recvmsg(o.fd, p.buffer, p.oob, 0)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil || from == nil {
			continue // EINTR, or an error that the network reported (ip(7)): it is reported once
		}
		to, source := destination(p.oob[:oobn])
		f := p.flow(o, client{addrPort(from), netip.AddrPortFrom(to, 0)}, from, source)
		if f == nil {
			continue
		}
		if _, err := unix.SendmsgN(f.fd, p.buffer[:n], nil, nil, unix.MSG_NOSIGNAL); err != nil {
			f.check(err)
		}
	}
}

// ready passes datagrams of the target back to the client.
func (f *flow) ready() {
	p := f.port.owner
	for range datagramBatch {
		n, _, _, _, err := unix.Recvmsg(f.fd, p.buffer, nil, 0)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			if !f.check(err) {
				return
			}
			continue
		}
		f.touch()
		// What does not go is lost.
		_, _ = unix.SendmsgN(f.port.fd, p.buffer[:n], f.source, f.reply, unix.MSG_NOSIGNAL)
	}
}

// check reports whether the flow can go on after an error: one that the network reported, such as
// port unreachable, is the client's to notice by the lack of a reply. A socket that an
// administrator took away (ss --kill) is replaced at the client's next datagram.
func (f *flow) check(err error) bool {
	if errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EDESTADDRREQ) {
		f.port.end(f)
		return false
	}
	return true
}

func (f *flow) touch() {
	f.used = f.port.owner.limits.now()
	f.port.flows.byUse.MoveToBack(f.place)
}

// flow finds the client's flow, or makes one; nil when that is refused. When the port has as many
// as it may, the one that has been idle longest makes room, so that nobody can shut others out with
// made-up addresses.
func (p *Ports) flow(o *port, c client, reply unix.Sockaddr, source []byte) *flow {
	if o.flows != nil {
		if f := o.flows.byClient[c]; f != nil {
			f.touch()
			return f
		}
		if len(o.flows.byClient) >= p.limits.flows || p.active >= p.limits.relays {
			o.end(o.flows.byUse.Front().Value.(*flow))
		}
	}
	if !p.admit(o, origin{unix.SOCK_DGRAM, c.from}) {
		return nil
	}
	fd, local, err := connect(unix.SOCK_DGRAM, o.hp.Target)
	f := &flow{port: o, client: c, reply: reply, source: source, fd: fd, origin: local}
	if err == nil {
		if err = p.loop.watch(fd, f); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		p.failing.warn(p.limits.now(), p.log.WithError(err),
			"relay %s from host port %s/udp to %s", c.from, o.hp.Host, o.hp.Target)
		return nil
	}
	if len(p.flowing) == 0 {
		p.sweepAt = p.limits.now().Add(p.limits.idle)
	}
	if o.flows == nil {
		o.flows = &flows{byClient: map[client]*flow{}}
		p.flowing[o] = true
	}
	p.begun(local)
	o.flows.byClient[c] = f
	f.place = o.flows.byUse.PushBack(f)
	f.used = p.limits.now()
	return f
}

// end closes a flow.
func (o *port) end(f *flow) {
	p := o.owner
	p.loop.forget(f.fd)
	unix.Close(f.fd)
	o.flows.byUse.Remove(f.place)
	delete(o.flows.byClient, f.client)
	if len(o.flows.byClient) == 0 {
		o.flows = nil
		delete(p.flowing, o)
	}
	p.ended(f.origin)
}

func (o *port) dropFlows() {
	for o.flows != nil {
		o.end(o.flows.byUse.Front().Value.(*flow))
	}
}

// sweep ends the flows that have been idle for long enough.
func (p *Ports) sweep(now time.Time) {
	for o := range p.flowing {
		for o.flows != nil {
			f := o.flows.byUse.Front().Value.(*flow)
			if now.Sub(f.used) < p.limits.idle {
				break
			}
			o.end(f)
		}
	}
}

// destination reads from a datagram's ancillary data (ip(7), IP_PKTINFO; RFC 3542, section 6) the
// address that it was sent to, and gives the ancillary data that has a reply come from there. For a
// datagram to a group the kernel chooses the source.
func destination(oob []byte) (netip.Addr, []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}, nil
	}
	for _, m := range messages {
		switch h, n := m.Header, len(m.Data); {
		case h.Level == unix.SOL_IP && h.Type == unix.IP_PKTINFO && n >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo: interface, our address, the destination in the packet
			var info unix.Inet4Pktinfo
			copy(info.Spec_dst[:], m.Data[4:8])
			return netip.AddrFrom4(info.Spec_dst), unix.PktInfo4(&info)
		case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_PKTINFO && n >= unix.SizeofInet6Pktinfo:
			// struct in6_pktinfo: the destination in the packet, interface (which the client's
			// address has, where it matters)
			var info unix.Inet6Pktinfo
			copy(info.Addr[:], m.Data[:16])
			addr := netip.AddrFrom16(info.Addr)
			if addr.IsMulticast() {
				return addr, nil
			}
			return addr, unix.PktInfo6(&info)
		}
	}
	return netip.Addr{}, nil
}
