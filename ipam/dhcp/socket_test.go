package dhcp

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSocketHears sends frames from the LAN: what a client has to hear, whoever it is for, and what it must not.
func TestSocketHears(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	ear, err := b.Client.open(uplink, answers)
	if err != nil {
		t.Fatal(err)
	}
	defer ear.Close()
	lan := b.sender(t)

	offer := func(change func(d *datagram)) []byte {
		d := datagram{
			from: MAC{2, 0, 0, 0, 0, 1}, to: container, source: address("198.18.0.1"), target: address("198.18.1.10"),
			sourcePort: serverPort, toPort: clientPort, payload: make([]byte, 300),
		}
		change(&d)
		return d.frame()
	}
	patch := func(f []byte, at int, b ...byte) []byte {
		f = bytes.Clone(f)
		copy(f[at:], b)
		return f
	}
	good := offer(func(*datagram) {})
	tagged := func(tag ...byte) []byte { return slices.Concat(good[:12], []byte{0x81, 0}, tag, good[12:]) }
	for _, f := range [][]byte{
		offer(func(d *datagram) { d.toPort = serverPort }),
		offer(func(d *datagram) { d.toPort = 53 }),
		patch(good, 23, 6),    // TCP
		patch(good, 20, 0x20), // first fragment
		patch(good, 20, 0, 1), // a later one
		patch(good, 12, 0x86), // not IPv4
		tagged(0, 7),          // VLAN 7
		tagged(0xe0, 7),       // with a priority
		patch(good, 14, 0x4f), // a header so long that something else is in the port's place
		arp{senderIP: address("198.18.0.1"), wanted: address("198.18.1.10")}.frame(),
	} {
		lan(f)
	}
	wanted := [][]byte{
		good, // to a MAC that is not the link's
		offer(func(d *datagram) { d.to, d.target = broadcastMAC, everybody }),
		slices.Concat(good[:14], []byte{0x46}, good[15:34], []byte{1, 1, 1, 1}, good[34:]), // with IP options
		tagged(0xe0, 0), // the untagged LAN, with a priority
	}
	for _, f := range wanted {
		lan(f)
	}
	wanted[3] = good // the tag is taken off

	patience := time.AfterFunc(10*time.Second, func() { ear.Close() })
	defer patience.Stop()
	buffer := make([]byte, maxFrame)
	for i, f := range wanted {
		n, unsummed, err := ear.Receive(buffer)
		if err != nil || !bytes.Equal(buffer[:n], f) || unsummed {
			t.Fatalf("frame %d: % x, unsummed %t, %v\nwant % x", i, buffer[:n], unsummed, err, f)
		}
	}

	closed := make(chan error)
	go func() {
		_, _, err := ear.Receive(buffer)
		closed <- err
	}()
	ear.Close()
	select {
	case err := <-closed:
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close does not end Receive")
	}
}

// TestSocketIsPromiscuous: a network card drops frames to other MACs, unless a bridge or somebody else wants them. A veth drops
// nothing, so this looks at what the link is told.
func TestSocketIsPromiscuous(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.ip(t, b.host, "link set "+uplink+" nomaster")
	promiscuous := func() bool {
		return !strings.Contains(b.ip(t, b.host, "-d link show "+uplink), "promiscuity 0")
	}
	if promiscuous() {
		t.Fatal("the link is promiscuous before")
	}
	ear, err := b.Client.open(uplink, answers)
	if err != nil {
		t.Fatal(err)
	}
	if !promiscuous() {
		t.Error("the link is not promiscuous")
	}
	ear.Close()
	if promiscuous() {
		t.Error("the link stays promiscuous")
	}
}

// TestLinkMadeAgain deletes the uplink under an open client, and makes another of the same name.
func TestLinkMadeAgain(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.dnsmasq(t)
	lease := b.obtain(t, Request{})
	b.ip(t, b.host, "link set "+uplink+" down")
	b.ip(t, b.host, "link set "+uplink+" up")
	if again := b.obtain(t, Request{}); again.Prefix != lease.Prefix {
		t.Errorf("leased %s", again.Prefix)
	}
	b.ip(t, b.host, "link del "+uplink)
	if _, err := b.Obtain(t.Context(), Request{Link: "eth9", MAC: container}); err == nil {
		t.Error("leased on a link that is not there")
	}
	b.ip(t, b.host, "link add "+uplink+" type veth peer name lan0")
	b.move(t, "lan0", b.lan)
	b.ip(t, b.host, "link set "+uplink+" up")
	b.ip(t, b.lan, "link set lan0 up")
	b.ip(t, b.lan, "address add "+serverNet+" dev lan0")
	server := b.dnsmasq(t)
	if again := b.obtain(t, Request{}); again.Prefix != lease.Prefix {
		t.Errorf("leased %s, the server said %s", again.Prefix, server.out)
	}
}

// sender sends frames as they are from lan0.
func (b *lab) sender(t *testing.T) func(frame []byte) {
	t.Helper()
	var p transport
	b.inside(t, b.lan, func() (err error) {
		p, err = openSocket("lan0", arpBoth)
		return err
	})
	t.Cleanup(func() { p.Close() })
	return func(frame []byte) {
		t.Helper()
		if err := p.Send(frame); err != nil {
			t.Fatal(os.NewSyscallError("send", err))
		}
	}
}

// TestSocketHears6 is the same for IPv6.
func TestSocketHears6(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	udp := func(change func(d *datagram)) []byte {
		d := datagram{
			from: MAC{2, 0, 0, 0, 0, 1}, to: container, source: address("fe80::1"), target: linkLocal(container),
			sourcePort: serverPort6, toPort: clientPort6, payload: make([]byte, 100),
		}
		change(&d)
		return d.frame()
	}
	good := udp(func(*datagram) {})
	lookFor := neighbourFrame(MAC{2, 0, 0, 0, 0, 1}, MAC{0x33, 0x33}, address("fe80::1"), solicitedNode(linkLocal(container)), []byte{neighbourSolicitation, 23: 0})
	advertise := neighbourFrame(MAC{2, 0, 0, 0, 0, 1}, MAC{0x33, 0x33}, address("fe80::1"), address("ff02::1"), []byte{routerAdvertisement, 15: 0})
	told := neighbour{from: container, source: address("fe80::1"), target: address("fd00::1")}.reply(MAC{2, 0, 0, 0, 0, 1})
	fragment := packet{MAC{2, 0, 0, 0, 0, 1}, container, address("fe80::1"), linkLocal(container), 44, 64, append([]byte{protocolUDP, 0, 0, 1, 0, 0, 0, 1}, good[ethernetHeader+ip6Header:]...)}.frame()
	for _, c := range []struct {
		t      traffic
		wanted [][]byte
		others [][]byte
	}{
		{answers6, [][]byte{good, lookFor, advertise}, [][]byte{
			udp(func(d *datagram) { d.toPort = serverPort6 }), fragment, told, solicitRouters(container), example.frame(), arp{senderIP: noAddress, wanted: noAddress}.frame(),
		}},
		{ndBoth, [][]byte{lookFor, told}, [][]byte{good, advertise, solicitRouters(container), example.frame(), joinGroup(container, address("ff02::1:ff00:1"))}},
	} {
		ear, err := b.Client.open(uplink, c.t)
		if err != nil {
			t.Fatal(err)
		}
		defer ear.Close()
		lan := b.sender(t)
		for _, f := range slices.Concat(c.others, c.wanted) {
			lan(f)
		}
		patience := time.AfterFunc(10*time.Second, func() { ear.Close() })
		defer patience.Stop()
		buffer := make([]byte, maxFrame)
		for i := 0; i < len(c.wanted); {
			n, _, err := ear.Receive(buffer)
			switch {
			case err != nil:
				t.Fatalf("traffic %d, frame %d: %v", c.t, i, err)
			case MAC(buffer[6:12]) != MAC{2, 0, 0, 0, 0, 1} && MAC(buffer[6:12]) != container:
				continue // a kernel's own
			case !bytes.Equal(buffer[:n], c.wanted[i]):
				t.Fatalf("traffic %d, frame %d: % x\nwant % x", c.t, i, buffer[:n], c.wanted[i])
			}
			i++
		}
	}
}
