package hostport

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// backlog is how many connections may wait to be accepted; the kernel makes it net.core.somaxconn
// if that is less (listen(2)).
const backlog = 4096

// open makes the socket that holds hp. It must be called in the loop's namespace.
//
// TCP: SO_REUSEADDR lets a port be taken over connections of the past (TIME_WAIT) and over those
// that a process before us relayed, but never over a socket that listens (ip(7), socket(7)). A
// socket that is only bound, with SO_REUSEADDR too, does not keep us from the port: once we listen
// it is that socket which can no longer. UDP has no such past, and there SO_REUSEADDR would share
// the port, so it is not set.
//
// SCTP: bound but not listening, which holds the port and has the kernel refuse associations to
// loopback, rather than take them and leave them unserved. -1 is returned when the kernel has no
// SCTP.
//
// -1 is returned, too, for every IPv6 address of a host that has no IPv6 (ipv6.disable=1): nobody can
// come by it, and nobody else can have it.
func open(hp plan.HostPort) (int, error) {
	typ, proto := unix.SOCK_STREAM, 0
	switch hp.Proto {
	case udp:
		typ = unix.SOCK_DGRAM
	case sctp:
		proto = unix.IPPROTO_SCTP
	}
	family, address, err := sockaddr(hp.Host)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if hp.Proto == sctp && (errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT)) {
		return -1, nil
	}
	if hp.Host.Addr() == netip.IPv6Unspecified() && errors.Is(err, unix.EAFNOSUPPORT) {
		return -1, nil
	}
	if err != nil {
		return -1, explain(fmt.Errorf("socket: %w", err), hp.Host)
	}
	if err := setUp(fd, hp.Proto, family, address); err != nil {
		unix.Close(fd)
		return -1, explain(err, hp.Host)
	}
	return fd, nil
}

func setUp(fd int, proto string, family int, address unix.Sockaddr) error {
	var options [][3]int
	if family == unix.AF_INET6 {
		options = append(options, [3]int{unix.SOL_IPV6, unix.IPV6_V6ONLY, 1})
	}
	switch proto {
	case tcp:
		options = append(options, [3]int{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})
	case udp:
		if family == unix.AF_INET6 {
			options = append(options, [3]int{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1})
		} else {
			options = append(options, [3]int{unix.SOL_IP, unix.IP_PKTINFO, 1})
		}
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return fmt.Errorf("setsockopt: %w", err)
		}
	}
	if err := unix.Bind(fd, address); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if proto == tcp {
		if err := unix.Listen(fd, backlog); err != nil {
			return fmt.Errorf("listen: %w", err) // EADDRINUSE: both were bound, the other was first to listen
		}
	}
	return nil
}

// origin is where one of our own connections comes from.
type origin struct {
	typ  int
	addr netip.AddrPort
}

// connect begins a connection (SOCK_STREAM) or makes an association (SOCK_DGRAM) to target, and
// does not wait. It must be called on the loop's thread.
func connect(typ int, target netip.AddrPort) (int, origin, error) {
	family, address, err := sockaddr(target)
	if err != nil {
		return -1, origin{}, err
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, origin{}, fmt.Errorf("socket: %w", err)
	}
	from, err := connectFrom(fd, typ, address)
	if err == nil && from == netip.AddrPortFrom(target.Addr().Unmap(), target.Port()) {
		err = unix.ECONNREFUSED // to itself: nobody listens, and the kernel chose that very port as ours
	}
	if err != nil {
		unix.Close(fd)
		return -1, origin{}, fmt.Errorf("connect: %w", err)
	}
	return fd, origin{typ, from}, nil
}

func connectFrom(fd, typ int, to unix.Sockaddr) (netip.AddrPort, error) {
	if typ == unix.SOCK_STREAM {
		// The port that the kernel chooses for this end can be published later: see open.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return netip.AddrPort{}, err
		}
	}
	if err := unix.Connect(fd, to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return netip.AddrPort{}, err
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return addrPort(local), nil
}

// resetSocket closes a TCP socket so that its peer is told that something went wrong (socket(7),
// SO_LINGER).
func resetSocket(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// sockaddr is the kernel's form of an address, and its family.
func sockaddr(at netip.AddrPort) (int, unix.Sockaddr, error) {
	addr := at.Addr().Unmap()
	if addr.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: addr.As4()}, nil
	}
	sa := &unix.SockaddrInet6{Port: int(at.Port()), Addr: addr.As16()}
	if zone := addr.Zone(); zone != "" {
		if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
			sa.ZoneId = uint32(n)
		} else if link, err := net.InterfaceByName(zone); err == nil { // in the thread's namespace
			sa.ZoneId = uint32(link.Index)
		} else {
			return 0, nil, fmt.Errorf("link %s of address %s: %w", zone, addr, err)
		}
	}
	return unix.AF_INET6, sa, nil
}

// addrPort is the reverse of sockaddr; a link is given by its index.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.ZoneId != 0 && addr.Is6() {
			addr = addr.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return netip.AddrPortFrom(addr, uint16(sa.Port))
	}
	return netip.AddrPort{}
}
