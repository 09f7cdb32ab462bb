package kernel_test

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestVLANShutToHost: a station in the VLAN that knows the host's MAC reaches none of the host's
// addresses on the uplink; but it reaches the host's own link in the VLAN. (With a bridge above, what
// the bridge itself takes for the host is not the VLAN's to say.)
func TestVLANShutToHost(t *testing.T) {
	for name, above := range map[string]func(t *testing.T, l *vlanLab){
		"nothing": func(*testing.T, *vlanLab) {},
		"macvlan": func(t *testing.T, l *vlanLab) {
			m := macvlan(1, "dwt1")
			m.Name = "dwc1"
			do(t, l.k, add(m)...)
			p := newPlace(t)
			here(t, "ip link set dwc1 netns "+p.path)
			p.run(t, "ip link set dwc1 up", "ip addr add 198.18.5.7/24 dev dwc1")
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newVLANLab(t)
			here(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0", "sysctl -qw net.ipv4.conf.default.rp_filter=0")
			do(t, l.k, add(vlan(1, 100))...)
			above(t, l)
			here(t, "ip addr add 198.18.1.9/24 dev eth0", "ip addr add 198.18.4.9/32 dev eth0")
			l.station(t, 100, "198.18.5.2/24")
			l.far.run(t, "ip addr add 198.18.1.2/24 dev wire", "ip route add 198.18.4.9/32 dev dwm9",
				"ip neigh add 198.18.4.9 lladdr 02:00:00:00:00:01 dev dwm9 nud permanent")
			l.settle(t)

			host := listenUDP(t, samePlace(t), "0.0.0.0:0")
			far := listenUDP(t, l.far, "0.0.0.0:0")
			say := func(text, to string) {
				t.Helper()
				if _, err := far.WriteToUDPAddrPort([]byte(text), netip.AddrPortFrom(netip.MustParseAddr(to), uint16(host.LocalAddr().(*net.UDPAddr).Port))); err != nil {
					t.Fatal(err)
				}
			}
			say("from the VLAN", "198.18.4.9")
			for range 2 { // by the second answer, the first would have come too
				say("untagged", "198.18.1.9")
				if got := hear(t, host); got != "untagged" {
					t.Errorf("the host hears what was sent %s", got)
				}
			}

			// ARP.
			for range 2 {
				l.wire.write(t, askFor("198.18.1.9", 100))
				l.wire.write(t, askFor("198.18.1.9", noTag))
				for answered := false; !answered; {
					f, kind, ok := l.wire.read(t, 5*time.Second)
					if !ok {
						t.Fatal("no answer to an ARP request")
					}
					if kind != etherARP {
						continue
					}
					if answered = f.vlan == noTag; !answered {
						t.Errorf("the host answers ARP in the VLAN: %+v", f)
					}
				}
			}
		})
	}
	l := newVLANLab(t)
	do(t, l.k, add(vlan(1, 100), macvlan(1, "dwt1"), address("dwm1", "198.18.5.1/24"))...)
	l.station(t, 100, "198.18.5.2/24")
	l.settle(t)
	host := listenUDP(t, samePlace(t), "198.18.5.1:7000")
	far := listenUDP(t, l.far, "0.0.0.0:0")
	if _, err := far.WriteToUDPAddrPort([]byte("hello"), netip.MustParseAddrPort("198.18.5.1:7000")); err != nil {
		t.Fatal(err)
	}
	if got := hear(t, host); got != "hello" {
		t.Errorf("the host hears %s", got)
	}
}

const etherARP = 0x0806

// askFor is an ARP request (RFC 826).
func askFor(address string, vlan uint16) []byte {
	mac := []byte{2, 9, 0, 0, 0, 9}
	b := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...)
	if vlan != noTag {
		b = append(b, 0x81, 0, byte(vlan>>8), byte(vlan))
	}
	b = append(b, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(append(b, mac...), 198, 18, 1, 99)
	return append(append(b, 0, 0, 0, 0, 0, 0), netip.MustParseAddr(address).AsSlice()...)
}

func listenUDP(t testing.TB, p *place, address string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	p.do(t, func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

func hear(t testing.TB, c *net.UDPConn) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}
