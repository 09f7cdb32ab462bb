package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Announce tells those behind a link, of a namespace of ours or with no name of the host's, which MAC an
// address has now, so that who has known another need not find out by itself: an ARP announcement
// (RFC 5227, section 2.3), or an unsolicited neighbour advertisement (RFC 4861, section 7.2.6). What it
// sends on a port of a bridge leaves by that port, and neither the bridge nor its rules see it.
func (k *Kernel) Announce(_ context.Context, namespace string, entries []plan.Neighbour) error {
	if namespace == "" {
		return k.announce(entries)
	}
	child, leave, err := k.enter(namespace)
	if err != nil || child == nil {
		return err
	}
	defer leave()
	if err := child.announce(entries); err != nil {
		return fmt.Errorf("network namespace %s: %w", namespace, err)
	}
	return nil
}

func (k *Kernel) announce(entries []plan.Neighbour) error {
	return k.inside(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("announce addresses: %w", err)
		}
		defer unix.Close(fd) //nolint:errcheck // nothing is waiting to be sent
		var problems []error
		for _, e := range entries {
			link, err := net.InterfaceByName(e.Link)
			if err == nil {
				err = unix.Sendto(fd, announcement(e), 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6})
			}
			if err != nil {
				problems = append(problems, fmt.Errorf("announce %s on %s: %w", e.Address, e.Link, err))
			}
		}
		return errors.Join(problems...)
	})
}

// announcement is the frame.
func announcement(e plan.Neighbour) []byte {
	address := e.Address.AsSlice()
	if e.Address.Is4() {
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, e.MAC[:]...)
		frame = append(frame, 0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1) // ARP: Ethernet, IPv4, request
		frame = append(append(frame, e.MAC[:]...), address...)
		return append(append(frame, 0, 0, 0, 0, 0, 0), address...)
	}
	everybody := net.IPv6linklocalallnodes
	message := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, address...) // advertisement: override
	message = append(append(message, 2, 1), e.MAC[:]...)               // target link-layer address
	pseudo := append(append([]byte{}, address...), everybody...)
	pseudo = append(binary.BigEndian.AppendUint32(pseudo, uint32(len(message))), 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(message[2:], internetChecksum(append(pseudo, message...)))
	frame := append([]byte{0x33, 0x33, 0, 0, 0, 1}, e.MAC[:]...)
	frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255)
	frame = append(append(frame, address...), everybody...)
	return append(frame, message...)
}

// internetChecksum is RFC 1071's, of an even number of bytes.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
