package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

const trunkUsage = `probe trunk LINK VLAN NAME             be NAME, a link with LINK's frames of a VLAN without their tags, until ended`

// tagLength is what an 802.1Q tag adds to a frame, after the two addresses.
const (
	tagLength = 4
	addresses = 12
)

// trunk copies frames between a packet socket on a link and a tap device, and takes off and puts on
// the tag.
func trunk(link, vlan, name string) error {
	id, err := strconv.ParseUint(vlan, 10, 12)
	if err != nil || id == 0 || id == 4095 {
		return fmt.Errorf("VLAN %q is not from 1 to 4094", vlan)
	}
	fd, err := packets(link, unix.ETH_P_ALL)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		return err
	}
	tap, err := openTap(link, name)
	if err != nil {
		return err
	}
	fmt.Println("trunking")
	failed := make(chan error)
	go func() { failed <- untag(fd, tap, uint16(id)) }()
	go func() { failed <- tag(tap, fd, uint16(id)) }()
	return <-failed
}

// untag copies the VLAN's frames that come in. The kernel takes the tag off before a packet socket
// sees the frame, and tells of it beside.
func untag(fd, tap int, id uint16) error {
	frame, beside := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(int(unsafe.Sizeof(unix.TpacketAuxdata{}))))
	for {
		n, besides, _, from, err := unix.Recvmsg(fd, frame, beside, 0)
		if passing(err) {
			continue
		} else if err != nil {
			return fmt.Errorf("receive from the trunk: %w", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if got, ok := tagOf(beside[:besides]); !ok || got != id {
			continue
		}
		if _, err := unix.Write(tap, frame[:n]); err != nil && !errors.Is(err, unix.EIO) { // EIO: it is down
			return fmt.Errorf("pass a frame on: %w", err)
		}
	}
}

// tagOf is the VLAN in what the kernel says beside a frame.
func tagOf(beside []byte) (uint16, bool) {
	messages, err := unix.ParseSocketControlMessage(beside)
	if err != nil {
		return 0, false
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < int(unsafe.Sizeof(unix.TpacketAuxdata{})) {
			continue
		}
		aux := (*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
		return aux.Vlan_tci & 0xfff, aux.Status&unix.TP_STATUS_VLAN_VALID != 0
	}
	return 0, false
}

// tag copies the tap's frames out on the trunk.
func tag(tap, fd int, id uint16) error {
	frame := make([]byte, 1<<16)
	for {
		n, err := unix.Read(tap, frame)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("read from the link: %w", err)
		}
		if n < addresses {
			continue
		}
		tagged := bytes.NewBuffer(make([]byte, 0, n+tagLength))
		tagged.Write(frame[:addresses])
		tagged.Write(binary.BigEndian.AppendUint16([]byte{0x81, 0}, id))
		tagged.Write(frame[addresses:n])
		if _, err := unix.Write(fd, tagged.Bytes()); err != nil && !passing(err) {
			return fmt.Errorf("send on the trunk: %w", err)
		}
	}
}

// passing tells whether an error says something of the moment: the link is down, or busy.
func passing(err error) bool {
	return errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENOBUFS)
}

// openTap makes a device that lives as long as this process, with a link's address and MTU. It
// offloads nothing: frames come out of it whole.
func openTap(like, name string) (int, error) {
	model, err := net.InterfaceByName(like)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return -1, fmt.Errorf("make tap %s: %w", name, err)
	}
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(control) //nolint:errcheck // only asked
	request.SetUint32(uint32(model.MTU))
	if err := unix.IoctlIfreq(control, unix.SIOCSIFMTU, request); err != nil {
		return -1, fmt.Errorf("set the MTU of %s: %w", name, err)
	}
	hardware := struct { // struct ifreq
		name   [unix.IFNAMSIZ]byte
		family uint16
		data   [22]byte
	}{family: unix.ARPHRD_ETHER}
	copy(hardware.name[:unix.IFNAMSIZ-1], name)
	copy(hardware.data[:], model.HardwareAddr)
	if _, _, err := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFHWADDR, uintptr(unsafe.Pointer(&hardware))); err != 0 {
		return -1, fmt.Errorf("set the address of %s: %w", name, err)
	}
	return fd, nil
}
