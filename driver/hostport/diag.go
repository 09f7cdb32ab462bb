package hostport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// States of a socket (tcp_states.h).
const (
	timeWait  = 6
	listening = 10
)

// inetDiagV6Only is the attribute INET_DIAG_SKV6ONLY of linux/inet_diag.h.
const inetDiagV6Only = 11

// diagSocket is a socket as sock_diag(7) shows it.
type diagSocket struct {
	state         uint8
	local, remote netip.AddrPort
	v6only        bool
	uid, inode    uint32
}

// openDiag opens a netlink socket in the thread's network namespace for diagnose; -1 when there is
// none to be had.
func openDiag() int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return -1
	}
	// The kernel answers at once or not at all.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		unix.Close(fd)
		return -1
	}
	return fd
}

// diagnose lists the sockets of the namespace that keep hp from being held. It fails when the
// kernel cannot show them.
func diagnose(fd int, hp plan.HostPort) ([]diagSocket, error) {
	proto, ok := map[string]uint8{tcp: unix.IPPROTO_TCP, udp: unix.IPPROTO_UDP, sctp: unix.IPPROTO_SCTP}[hp.Proto]
	if !ok {
		return nil, fmt.Errorf("list sockets of %s: %w", hp.Proto, unix.EPROTONOSUPPORT)
	}
	families := []uint8{unix.AF_INET6}
	if hp.Host.Addr().Unmap().Is4() {
		families = []uint8{unix.AF_INET, unix.AF_INET6}
	}
	var all []diagSocket
	var errs []error
	for _, family := range families {
		found, err := dump(fd, family, proto, hp.Host.Port())
		if err != nil {
			errs = append(errs, fmt.Errorf("list sockets of %s: %w", hp.Proto, err))
		}
		for _, s := range found {
			if s.inTheWay(hp.Host.Addr()) {
				all = append(all, s)
			}
		}
	}
	return all, errors.Join(errs...)
}

// dump asks for all sockets of a port, in every state, also those that are only bound
// (struct inet_diag_req_v2, sock_diag(7)).
func dump(fd int, family, proto uint8, port uint16) ([]diagSocket, error) {
	const size = unix.SizeofNlMsghdr + 56
	q := make([]byte, 0, size)
	q = binary.NativeEndian.AppendUint32(q, size)
	q = binary.NativeEndian.AppendUint16(q, unix.SOCK_DIAG_BY_FAMILY)
	q = binary.NativeEndian.AppendUint16(q, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	q = append(q, make([]byte, 8)...) // sequence and sender: one question at a time
	q = append(q, family, proto, 0, 0)
	q = binary.NativeEndian.AppendUint32(q, ^uint32(0)) // states
	q = binary.BigEndian.AppendUint16(q, port)
	q = append(q, make([]byte, size-len(q))...)
	if err := unix.Sendto(fd, q, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var found []diagSocket
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return found, err
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return found, err
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return found, nil
			case unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return found, unix.EBADMSG
				}
				return found, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			case unix.SOCK_DIAG_BY_FAMILY:
				if s, ok := parseDiag(m.Data); ok && s.local.Port() == port {
					found = append(found, s)
				}
			}
		}
	}
}

// parseDiag reads a struct inet_diag_msg and the one attribute that matters.
func parseDiag(b []byte) (diagSocket, bool) {
	const size = 72
	if len(b) < size {
		return diagSocket{}, false
	}
	addr := func(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)).Unmap() }
	if b[0] == unix.AF_INET {
		addr = func(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
	}
	s := diagSocket{
		state:  b[1],
		local:  netip.AddrPortFrom(addr(b[8:24]), binary.BigEndian.Uint16(b[4:])),
		remote: netip.AddrPortFrom(addr(b[24:40]), binary.BigEndian.Uint16(b[6:])),
		uid:    binary.NativeEndian.Uint32(b[64:]),
		inode:  binary.NativeEndian.Uint32(b[68:]),
	}
	for a := b[size:]; len(a) >= unix.SizeofNlAttr; {
		n := int(binary.NativeEndian.Uint16(a))
		if n < unix.SizeofNlAttr || n > len(a) {
			break
		}
		if binary.NativeEndian.Uint16(a[2:]) == inetDiagV6Only && n > unix.SizeofNlAttr {
			s.v6only = a[unix.SizeofNlAttr] != 0
		}
		a = a[min((n+3)&^3, len(a)):]
	}
	return s, true
}
