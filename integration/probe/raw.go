package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const rawUsage = `probe send link LINK FRAME...         send Ethernet frames, given in hexadecimal
probe send ip ADDRESS PACKET...       send IP packets, header included, by way of the routes
probe flood link LINK FRAME...        send the frames over and over, until ended
probe watch link LINK END             print the frames that come in, until one that has END in it; "watching" first
probe watch out PREFIX END            the same of the frames that go out on links of that name, also of links to come`

// raw runs the commands that speak below TCP and UDP.
func raw(command, target string, args []string, timeout time.Duration) error {
	switch command {
	case "send link":
		frames, send, err := frameSender(target, args)
		if err != nil {
			return err
		}
		return each(frames, send)
	case "flood link":
		frames, send, err := frameSender(target, args)
		if err != nil {
			return err
		}
		fmt.Println("flooding")
		for {
			_ = each(frames, send) // the link may come later, or be busy
			time.Sleep(time.Millisecond)
		}
	case "send ip":
		return sendPackets(target, args)
	case "watch link", "watch out":
		if len(args) == 1 {
			return watch(command == "watch out", target, args[0], timeout)
		}
	}
	return errors.New(usage)
}

func each(frames [][]byte, send func([]byte) error) error {
	for _, f := range frames {
		if err := send(f); err != nil {
			return fmt.Errorf("send %x: %w", f, err)
		}
	}
	return nil
}

func unhex(args []string) ([][]byte, error) {
	var all [][]byte
	for _, a := range args {
		b, err := hex.DecodeString(a)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	return all, nil
}

// packets opens a packet socket on a link, or on all.
func packets(link string, protocol uint16) (int, error) {
	i := &net.Interface{}
	if link != "" {
		var err error
		if i, err = net.InterfaceByName(link); err != nil {
			return -1, err
		}
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: i.Index})
}

func frameSender(link string, args []string) ([][]byte, func([]byte) error, error) {
	frames, err := unhex(args)
	if err != nil {
		return nil, nil, err
	}
	fd, err := packets(link, 0)
	return frames, func(f []byte) error { _, err := unix.Write(fd, f); return err }, err
}

// sendPackets sends what Linux sends: some packets it refuses, and these are named on stderr.
func sendPackets(address string, args []string) error {
	frames, err := unhex(args)
	if err != nil {
		return err
	}
	to, err := netip.ParseAddr(address)
	if err != nil {
		return err
	}
	family, sockaddr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16()})
	if to.Is4() {
		family, sockaddr = unix.AF_INET, &unix.SockaddrInet4{Addr: to.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	for _, f := range frames {
		if err := unix.Sendto(fd, f, 0, sockaddr); err != nil {
			fmt.Fprintf(os.Stderr, "refused %x: %v\n", f, err)
		}
	}
	return nil
}

// watch prints frames. Those that were sent before END on the same way have come when END has, but
// for those that another CPU has in hand: these have a moment more.
func watch(out bool, link, end string, timeout time.Duration) error {
	const moment = 50 * time.Millisecond
	on := link
	if out {
		on = ""
	}
	fd, err := packets(on, unix.ETH_P_ALL)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20) // less, where not permitted
	}
	fmt.Println("watching")
	deadline, ended := time.Now().Add(timeout), false
	names := map[int]string{}
	b := make([]byte, 1<<16)
	for {
		left := time.Until(deadline)
		if left <= 0 && ended {
			return nil
		} else if left <= 0 {
			return fmt.Errorf("no frame with %q in it came within %s", end, timeout)
		}
		t := unix.NsecToTimeval(int64(max(left, time.Millisecond)))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t); err != nil {
			return err
		}
		n, from, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
			continue
		} else if err != nil {
			return err
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || out != (ll.Pkttype == unix.PACKET_OUTGOING) {
			continue
		}
		if out && !watched(ll.Ifindex, link, names) {
			continue
		}
		if bytes.Contains(b[:n], []byte(end)) {
			if !ended {
				deadline, ended = time.Now().Add(moment), true
			}
			continue
		}
		fmt.Println(hex.EncodeToString(b[:n]))
	}
}

// watched tells whether a link's name begins with prefix. Names are asked for once: to ask for each
// frame is slower than frames come in a flood.
func watched(index int, prefix string, names map[int]string) bool {
	if names[index] == "" {
		i, err := net.InterfaceByIndex(index)
		if err != nil {
			return false
		}
		names[index] = i.Name
	}
	return strings.HasPrefix(names[index], prefix)
}
