package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// transport carries Ethernet frames on one link.
type transport interface {
	// Send puts a frame on the wire.
	Send(frame []byte) error
	// Receive waits for a frame and reads it into the buffer, which is as long as the longest frame; what is longer is cut off.
	// unsummed: the frame comes from this very machine, and its UDP checksum is not there yet. After Close the error is
	// os.ErrClosed; any other error is of the moment.
	Receive(buffer []byte) (n int, unsummed bool, err error)
	Close() error
}

// traffic is what a transport receives.
type traffic int

const (
	answers  traffic = iota // UDP over IPv4 to port 68
	arpBoth                 // ARP: replies, and requests, since a probe of somebody else's is news too
	answers6                // UDP over IPv6 to port 546; router advertisements; and who looks for a neighbour
	ndBoth                  // neighbour discovery: solicitations and advertisements
)

// maxFrame is the longest frame that is read.
const maxFrame = 2048

// filters let pass nothing but the traffic, and no fragments. They look at frames as they are without VLAN tag.
var filters = map[traffic][]bpf.Instruction{
	answers: {
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherIPv4, SkipTrue: 8},
		bpf.LoadAbsolute{Off: ethernetHeader + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolUDP, SkipTrue: 6},
		bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x3fff, SkipTrue: 4}, // more fragments, or an offset
		bpf.LoadMemShift{Off: ethernetHeader},
		bpf.LoadIndirect{Off: ethernetHeader + 2, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: clientPort, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{Val: 0},
	},
	answers6: {
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherIPv6, SkipTrue: 9},
		bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: protocolICMP6, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolUDP, SkipTrue: 6},
		bpf.LoadAbsolute{Off: ethernetHeader + ip6Header + 2, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: clientPort6, SkipTrue: 3, SkipFalse: 4},
		bpf.LoadAbsolute{Off: ethernetHeader + ip6Header, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: routerAdvertisement, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: neighbourSolicitation, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{Val: 0},
	},
	ndBoth: {
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherIPv6, SkipTrue: 6},
		bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolICMP6, SkipTrue: 4},
		bpf.LoadAbsolute{Off: ethernetHeader + ip6Header, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: neighbourSolicitation, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: neighbourAdvertisement, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{Val: 0},
	},
	arpBoth: {
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherARP, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{Val: 0},
	},
}

// socket is a transport on a link of the kernel (packet(7)).
//
// It listens to all protocols, since only then it hears frames before a bridge takes them, and promiscuously, since they are
// for the MACs of others. So it costs every frame on the link the run of its filter while it is open.
type socket struct {
	*os.File
	raw interface {
		Read(func(fd uintptr) bool) error
	}
	control []byte
	closed  atomic.Bool
}

// openSocket opens a link of the calling thread's network namespace, which has to be Ethernet and up.
func openSocket(name string, t traffic) (transport, error) {
	link, err := net.InterfaceByName(name)
	switch {
	case err != nil:
		return nil, fmt.Errorf("there is no link %s: name the uplink of the network: %w", name, err)
	case len(link.HardwareAddr) != 6 || link.Flags&net.FlagLoopback != 0:
		return nil, fmt.Errorf("link %s is not Ethernet: DHCP takes an uplink with a MAC", name)
	case link.Flags&net.FlagUp == 0:
		return nil, fmt.Errorf("link %s is down: set it up", name)
	}
	program, err := assemble(filters[t])
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) // deaf until it is bound
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (it takes CAP_NET_RAW): %w", err)
	}
	err = errors.Join(
		os.NewSyscallError("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, program)),
		os.NewSyscallError("PACKET_AUXDATA", unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)),
		os.NewSyscallError("PACKET_IGNORE_OUTGOING", unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)),
		os.NewSyscallError("PACKET_ADD_MEMBERSHIP", unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP,
			&unix.PacketMreq{Ifindex: int32(link.Index), Type: unix.PACKET_MR_PROMISC})),
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: link.Index})),
	)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open a packet socket on %s: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), "packet socket on "+name)
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &socket{File: file, raw: raw, control: make([]byte, 128)}, nil
}

func (s *socket) Send(frame []byte) error {
	_, err := s.Write(frame)
	return err
}

func (s *socket) Close() error {
	s.closed.Store(true)
	return s.File.Close()
}

// Receive is of one goroutine.
func (s *socket) Receive(buffer []byte) (n int, unsummed bool, err error) {
	for {
		var controls int
		var failed error
		err := s.raw.Read(func(fd uintptr) bool {
			n, controls, _, _, failed = unix.Recvmsg(int(fd), buffer, s.control, 0)
			return failed != unix.EAGAIN
		})
		switch err = errors.Join(err, failed); {
		case s.closed.Load():
			return 0, false, os.ErrClosed // the error itself is of a package that cannot be imported
		case failed == unix.EINTR:
			continue
		case err != nil:
			return 0, false, err
		}
		aux := readAuxiliary(s.control[:controls])
		if aux.tagged() {
			continue // another LAN's
		}
		return n, aux.Status&unix.TP_STATUS_CSUMNOTREADY != 0, nil
	}
}

// auxiliary is struct tpacket_auxdata of linux/if_packet.h.
type auxiliary struct {
	Status, Len, Snaplen        uint32
	Mac, Net, VlanTCI, VlanTPID uint16
}

// tagged says whether the frame came with a VLAN tag (which the kernel has taken off) that names a VLAN: VLAN 0 is the
// untagged LAN with a priority.
func (a auxiliary) tagged() bool {
	return a.Status&unix.TP_STATUS_VLAN_VALID != 0 && a.VlanTCI&0xfff != 0
}

func readAuxiliary(control []byte) (a auxiliary) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return a
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA {
			_, _ = binary.Decode(m.Data, binary.NativeEndian, &a)
		}
	}
	return a
}

func assemble(program []bpf.Instruction) (*unix.SockFprog, error) {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, fmt.Errorf("assemble the filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}, nil
}

func networkOrder(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}
