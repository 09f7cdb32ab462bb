package lab

import (
	"fmt"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VLAN makes a machine's link a trunk that carries a VLAN (1 to 4094): the machine gets a link,
// named as "eth0.20", that sends and receives the trunk's frames of this VLAN without their tags. It
// has the trunk's MAC address. What is sent on the trunk itself stays untagged. A program of the
// lab's does the tagging, so that the kernel need not know of VLANs, until it is stopped.
func (n *LAN) VLAN(m *Machine, link string, id int, addresses ...string) (*Process, error) {
	port, err := n.port(m, link)
	if err != nil {
		return nil, err
	}
	// A program that copies frames has to get them whole, as from a wire.
	if err := within(n.namespace(), func() error { return finishFrames(port) }); err != nil {
		return nil, fmt.Errorf("trunk %s of %s: %w", link, m.Name, err)
	}
	probe, err := n.lab.BuildProbe()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%s.%d", link, id)
	p, err := m.Start("trunking", probe, "trunk", link, strconv.Itoa(id), name)
	if err != nil {
		return nil, err
	}
	_, err = m.Script(fmt.Sprintf("ip link set %s up\n", name) + addAddresses(name, addresses))
	return p, err
}

// finishFrames makes the kernel cut what it sends on a link to the link's size, and sum it up,
// before it leaves.
func finishFrames(link string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // only asked
	for _, feature := range []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_STXCSUM} {
		value := struct{ command, on uint32 }{feature, 0}
		request := struct { // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(request.name[:unix.IFNAMSIZ-1], link)
		if _, _, err := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); err != 0 {
			return fmt.Errorf("switch offload %#x of %s off: %w", feature, link, err)
		}
	}
	return nil
}
