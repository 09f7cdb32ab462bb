package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const neighbourUsage = `probe arp LINK ADDRESS                print the hardware address of each who answers ARP for an IPv4 address
probe nd LINK ADDRESS                 the same by neighbour solicitation, for an IPv6 address
probe ping ADDRESS COUNT TEXT         send echo requests that carry TEXT, print how many come back with it`

// others is how long further answers are waited for after the first.
const others = 200 * time.Millisecond

// arp asks who has an address (RFC 826), past the kernel's own table. Without an address of its own
// the link asks as one that probes (RFC 5227).
func arp(link, address string, timeout time.Duration) error {
	i, target, err := question(link, address, netip.Addr.Is4)
	if err != nil {
		return err
	}
	own := netip.IPv4Unspecified()
	if a := ownAddress(i, netip.Addr.Is4); a.IsValid() {
		own = a
	}
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, i.HardwareAddr...)
	b = append(append(b, own.AsSlice()...), 0, 0, 0, 0, 0, 0)
	b = append(b, target.AsSlice()...)
	frame := ethernet(net.HardwareAddr{255, 255, 255, 255, 255, 255}, i.HardwareAddr, unix.ETH_P_ARP, b)
	return whoAnswers(link, address, frame, unix.ETH_P_ARP, timeout, func(f []byte) net.HardwareAddr {
		if len(f) >= 28 && f[7] == 2 && bytes.Equal(f[14:18], target.AsSlice()) {
			return net.HardwareAddr(f[8:14])
		}
		return nil
	})
}

// nd asks who has an address by neighbour discovery (RFC 4861, 4.3).
func nd(link, address string, timeout time.Duration) error {
	i, target, err := question(link, address, netip.Addr.Is6)
	if err != nil {
		return err
	}
	own := ownAddress(i, netip.Addr.Is6)
	if !own.IsValid() {
		return fmt.Errorf("%s has no IPv6 address to ask from", link)
	}
	ip := target.As16()
	group := net.HardwareAddr{0x33, 0x33, 0xff, ip[13], ip[14], ip[15]}
	multicast := append([]byte{0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff}, ip[13:]...)
	message := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, ip[:]...)
	message = append(append(message, 1, 1), i.HardwareAddr...)
	pseudo := append(append(own.AsSlice(), multicast...), 0, 0, 0, byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(message[2:], checksum(append(pseudo, message...)))
	packet := append([]byte{0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255}, own.AsSlice()...)
	packet = append(append(packet, multicast...), message...)
	frame := ethernet(group, i.HardwareAddr, unix.ETH_P_IPV6, packet)
	return whoAnswers(link, address, frame, unix.ETH_P_IPV6, timeout, func(f []byte) net.HardwareAddr {
		// An advertisement of the target with its link-layer address as the first option.
		if len(f) >= 72 && f[6] == unix.IPPROTO_ICMPV6 && f[40] == 136 && bytes.Equal(f[48:64], ip[:]) && f[64] == 2 {
			return net.HardwareAddr(f[66:72])
		}
		return nil
	})
}

// question is the link and the address of a question.
func question(link, address string, family func(netip.Addr) bool) (*net.Interface, netip.Addr, error) {
	i, err := net.InterfaceByName(link)
	if err != nil {
		return nil, netip.Addr{}, fmt.Errorf("link %s: %w", link, err)
	}
	target, err := netip.ParseAddr(address)
	if err == nil && !family(target) {
		err = fmt.Errorf("%s is of the other family", address)
	}
	return i, target, err
}

// ownAddress is an address of the link, one of the family's.
func ownAddress(i *net.Interface, family func(netip.Addr) bool) netip.Addr {
	all, err := i.Addrs()
	if err != nil {
		return netip.Addr{}
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && family(p.Addr()) {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

func ethernet(to, from net.HardwareAddr, kind uint16, payload []byte) []byte {
	b := append(append([]byte{}, to...), from...)
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

// whoAnswers sends a question each 200 ms and prints who answers. answer reads a frame from behind
// its Ethernet header.
func whoAnswers(link, address string, frame []byte, kind uint16, timeout time.Duration, answer func([]byte) net.HardwareAddr) error {
	fd, err := packets(link, kind)
	if err != nil {
		return err
	}
	wait := unix.Timeval{Usec: 20000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	deadline, again := time.Now().Add(timeout), time.Time{}
	heard := map[string]bool{}
	b := make([]byte, 1<<16)
	for time.Now().Before(deadline) {
		if len(heard) == 0 && time.Now().After(again) {
			if _, err := unix.Write(fd, frame); err != nil {
				return fmt.Errorf("ask on %s: %w", link, err)
			}
			again = time.Now().Add(others)
		}
		n, from, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || passing(err) {
			continue
		} else if err != nil {
			return err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < 14 {
			continue
		}
		who := answer(b[14:n])
		if who == nil || heard[who.String()] {
			continue
		}
		if len(heard) == 0 {
			deadline = time.Now().Add(others)
		}
		heard[who.String()] = true
		fmt.Println(who)
	}
	if len(heard) == 0 {
		return fmt.Errorf("nobody on %s answers for %s within %s", link, address, timeout)
	}
	return nil
}

// ping sends echo requests, each when the last was answered or the timeout has passed since. It
// fails when no reply comes.
func ping(address, count, text string, timeout time.Duration) error {
	to, err := netip.ParseAddr(address)
	if err != nil {
		return err
	}
	times, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	conn, err := net.ListenPacket(network, "")
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // asked and answered
	came, id := 0, uint16(os.Getpid())
	b := make([]byte, 1<<16)
	for n := range times {
		message := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16([]byte{request, 0, 0, 0}, id), uint16(n))
		message = append(message, text...)
		if to.Is4() { // the kernel sums up ICMPv6
			binary.BigEndian.PutUint16(message[2:], checksum(message))
		}
		if _, err := conn.WriteTo(message, &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()}); err != nil {
			fmt.Fprintln(os.Stderr, "probe:", err) // no way, for now
		}
		if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		for {
			l, _, err := conn.ReadFrom(b)
			if err != nil {
				break
			}
			if l >= 8 && b[0] == reply && bytes.Equal(b[4:l], message[4:]) {
				came++
				break
			}
		}
	}
	fmt.Println(came)
	if came == 0 {
		return fmt.Errorf("%s does not answer", address)
	}
	return nil
}

// checksum is the internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i, x := range b {
		sum += uint32(x) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
