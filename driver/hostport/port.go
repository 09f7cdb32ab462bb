package hostport

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// port is one held port. It is touched in the loop's turn only.
type port struct {
	owner  *Ports
	hp     plan.HostPort
	fd     int                 // -1: held in memory only
	relays map[*relay]struct{} // TCP connections
	flows  *flows              // UDP clients; nil: none
}

// ready is called by the loop when something has arrived.
func (o *port) ready() {
	if o.hp.Proto == udp {
		o.receive()
		return
	}
	o.accept()
}

// take holds hp, or gives a held one its new target. The error wraps EADDRINUSE when somebody
// outside this package has the port.
func (p *Ports) take(hp plan.HostPort) error {
	if p.closed {
		return net.ErrClosed
	}
	n := number{hp.Proto, hp.Host.Port()}
	for _, o := range p.held[n] {
		if o.hp.Host == hp.Host {
			if o.hp.Target != hp.Target {
				o.hp.Target = hp.Target
				o.dropFlows()
			}
			return nil
		}
		if overlap(o.hp.Host.Addr(), hp.Host.Addr()) {
			holder := fmt.Sprintf("dockway's host port %s/%s, published for %s", o.hp.Host, o.hp.Proto, o.hp.Target)
			return &plan.PortInUseError{Port: hp, Holder: holder}
		}
	}
	fd, err := open(hp)
	if err != nil {
		return err
	}
	o := &port{owner: p, hp: hp, fd: fd}
	if hp.Proto != sctp && fd >= 0 {
		if err := p.loop.watch(fd, o); err != nil {
			unix.Close(fd)
			return err
		}
	}
	p.held[n] = append(p.held[n], o)
	return nil
}

// find gives the held port of hp's protocol and host address, or nil.
func (p *Ports) find(hp plan.HostPort) *port {
	for _, o := range p.held[number{hp.Proto, hp.Host.Port()}] {
		if o.hp.Host == hp.Host {
			return o
		}
	}
	return nil
}

// drop closes the port and all that goes through it.
func (p *Ports) drop(o *port) {
	n := number{o.hp.Proto, o.hp.Host.Port()}
	if p.held[n] = slices.DeleteFunc(p.held[n], func(x *port) bool { return x == o }); len(p.held[n]) == 0 {
		delete(p.held, n)
	}
	delete(p.paused, o)
	if o.fd >= 0 {
		p.loop.forget(o.fd)
		unix.Close(o.fd)
	}
	for r := range o.relays {
		r.reset()
	}
	o.dropFlows()
}

// lost drops a port whose socket the kernel or an administrator (ss --kill) has taken away: it
// is not listed any more, so that whoever wants it holds it anew.
func (p *Ports) lost(o *port, err error) {
	p.log.WithError(err).Warnf("the socket of host port %s/%s is gone", o.hp.Host, o.hp.Proto)
	p.drop(o)
}

// overlap reports whether sockets on these addresses exclude one another (ip(7), bind rules as for
// INADDR_ANY). IPv6 sockets of ours are for IPv6 only, so the families have nothing to do with one
// another.
func overlap(a, b netip.Addr) bool {
	a, b = a.Unmap(), b.Unmap()
	return a.Is4() == b.Is4() && (a == b || a.IsUnspecified() || b.IsUnspecified())
}

// fromKey reads back a HostPort's key. What is none gives a HostPort that nobody holds.
func fromKey(key plan.Key) plan.HostPort {
	proto, host, _ := strings.Cut(key.Name, " ")
	at, err := netip.ParseAddrPort(host)
	if err != nil || key.Kind != plan.KindHostPort {
		return plan.HostPort{}
	}
	return plan.HostPort{Proto: proto, Host: at}
}

// explain puts into words what a failed socket call means for the port.
func explain(err error, host netip.AddrPort) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return err // explained by whoever has it
	}
	var why string
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		why = fmt.Sprintf("%s is not an address of this host", host.Addr())
	case errors.Is(err, unix.EACCES):
		why = fmt.Sprintf("port %d is privileged and CAP_NET_BIND_SERVICE is missing", host.Port())
	case errors.Is(err, unix.EMFILE):
		why = fmt.Sprintf("this process may open no more than %d files (RLIMIT_NOFILE)", fileLimit())
	case errors.Is(err, unix.ENFILE):
		why = "this host may open no more files (fs.file-max)"
	case errors.Is(err, unix.EAFNOSUPPORT):
		why = "the kernel does not have this address family"
	case errors.Is(err, unix.EINVAL) && host.Addr().IsLinkLocalUnicast() && host.Addr().Zone() == "":
		why = fmt.Sprintf("a link-local address wants its link, such as %s%%eth0", host.Addr())
	default:
		return err
	}
	return fmt.Errorf("%s: %w", why, err)
}
