package dhcp

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var example = datagram{
	from: container, to: broadcastMAC, source: noAddress, target: everybody, sourcePort: clientPort, toPort: serverPort, payload: []byte("odd"),
}

// TestFrame compares with a frame that was put together by hand.
func TestFrame(t *testing.T) {
	want := []byte{
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0x42, 0, 0, 0, 1, 0x08, 0x00,
		0x45, 0, 0, 31, 0, 0, 0, 0, 64, 17, 0x7a, 0xcf, 0, 0, 0, 0, 255, 255, 255, 255,
		0, 68, 0, 67, 0, 11, 0xc5, 0x9b - 20, 'o', 'd', 'd',
	}
	// UDP: ~(0000 0000 ffff ffff + 0011 + 000b + 0044 + 0043 + 000b + 6f64 + 6400)
	total := uint32(0xffff) + 0xffff + 0x11 + 0xb + 0x44 + 0x43 + 0xb + 0x6f64 + 0x6400
	total = total&0xffff + total>>16
	want[40], want[41] = byte(^total>>8), byte(^total)
	if got := example.frame(); !bytes.Equal(got, want) {
		t.Errorf("got  % x\nwant % x", got, want)
	}
}

func TestReadDatagram(t *testing.T) {
	good := example.frame()
	got, err := readDatagram(append(bytes.Clone(good), 1, 2, 3), false) // with padding of Ethernet
	if err != nil || !reflect.DeepEqual(got, example) {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range good {
		if _, err := readDatagram(good[:n], false); err == nil {
			t.Errorf("a frame cut to %d bytes is read", n)
		}
		for _, bit := range []byte{1, 16, 128} {
			bad := bytes.Clone(good)
			bad[n] ^= bit
			d, err := readDatagram(bad, false)
			if macs := n < 12; macs != (err == nil) {
				t.Errorf("byte %d changed: %+v, %v", n, d, err)
			}
		}
	}
	for name, change := range map[string]func(f []byte){
		"fragment":        func(f []byte) { f[20] = 0x20 },
		"last fragment":   func(f []byte) { f[21] = 1 },
		"short header":    func(f []byte) { f[14] = 0x44 },
		"IPv6":            func(f []byte) { f[14] = 0x65 },
		"TCP":             func(f []byte) { f[23] = 6 },
		"UDP too long":    func(f []byte) { f[39] = 12 },
		"UDP too short":   func(f []byte) { f[39] = 7 },
		"packet too long": func(f []byte) { f[17]++ },
	} {
		f := bytes.Clone(good)
		change(f)
		f[24], f[25] = 0, 0
		checksum := ^sum(0, f[14:34])
		f[24], f[25] = byte(checksum>>8), byte(checksum)
		f[40], f[41] = 0, 0
		if _, err := readDatagram(f, false); err == nil {
			t.Errorf("%s: read", name)
		}
	}
	for _, c := range []struct {
		high, low byte
		unsummed  bool
		ok        bool
	}{{0, 0, false, true}, {1, 2, false, false}, {1, 2, true, true}} {
		f := bytes.Clone(good)
		f[40], f[41] = c.high, c.low
		if _, err := readDatagram(f, c.unsummed); (err == nil) != c.ok {
			t.Errorf("UDP checksum %x%x, unsummed %t: %v", c.high, c.low, c.unsummed, err)
		}
	}
}

func TestARP(t *testing.T) {
	want := arp{reply: true, sender: container, senderIP: netip.MustParseAddr("198.18.0.1"), target: MAC{2, 3}, wanted: netip.MustParseAddr("198.18.0.2")}
	f := want.frame()
	if got, err := readARP(f); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for i := 12; i < 20; i++ {
		bad := bytes.Clone(f)
		bad[i] ^= 0x40
		if got, err := readARP(bad); err == nil {
			t.Errorf("byte %d changed: %+v", i, got)
		}
	}
}

func TestClaims(t *testing.T) {
	l := Lease{Request: Request{MAC: container}, Prefix: netip.MustParsePrefix("198.18.0.2/16")}
	other, address := MAC{2, 9}, l.Prefix.Addr()
	for _, c := range []struct {
		arp
		want bool
	}{
		{arp{reply: true, sender: other, senderIP: address}, true},
		{arp{sender: other, senderIP: address, wanted: netip.MustParseAddr("198.18.0.9")}, true},
		{arp{sender: other, senderIP: noAddress, wanted: address}, true}, // who is about to take it
		{arp{sender: other, senderIP: netip.MustParseAddr("198.18.0.9"), wanted: address}, false},
		{arp{sender: container, senderIP: address}, false},
		{arp{sender: container, senderIP: noAddress, wanted: address}, false},
	} {
		if got := c.claims(l); got != c.want {
			t.Errorf("%+v: %t", c.arp, got)
		}
	}
}

// FuzzFrame reads whatever the LAN may send. What is taken for a lease must be one that can be kept.
func FuzzFrame(f *testing.F) {
	s := newServer(1)
	m := s.answer(Request{Link: link, MAC: container}.discover(netip.Addr{}), dhcpv4.MessageTypeAck, netip.MustParseAddr("198.18.1.100"))
	f.Add(s.frame(m), true)
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionOptionOverload, []byte{3}))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDNSDomainSearchList, []byte{1, 'a', 0, 1, 'b', 0xc0, 0}))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, []byte{8, 10, 198, 18, 0, 7, 0, 198, 18, 0, 1}))
	m.UpdateOption(dhcpv4.OptDomainName("example.org"))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{5, 120}))
	m.UpdateOption(dhcpv4.OptRenewTimeValue(time.Minute))
	f.Add(s.frame(m), true)
	f.Add(arp{sender: container, senderIP: noAddress, wanted: s.ip}.frame(), false)
	f.Fuzz(func(t *testing.T, frame []byte, unsummed bool) {
		if a, err := readARP(frame); err == nil {
			a.claims(Lease{})
		}
		d, err := readDatagram(frame, unsummed)
		if err != nil {
			return
		}
		fuzzMessage(t, d.from, d.payload)
	})
}

// FuzzMessage is FuzzFrame behind the checksums.
func FuzzMessage(f *testing.F) {
	s := newServer(1)
	m := s.answer(Request{Link: link, MAC: container}.discover(netip.Addr{}), dhcpv4.MessageTypeAck, netip.MustParseAddr("198.18.1.100"))
	f.Add(m.ToBytes())
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionOptionOverload, []byte{3}))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDNSDomainSearchList, []byte{1, 'a', 0, 1, 'b', 0xc0, 0}))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, []byte{8, 10, 198, 18, 0, 7, 0, 198, 18, 0, 1}))
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, payload []byte) { fuzzMessage(t, container, payload) })
}

func fuzzMessage(t *testing.T, from MAC, payload []byte) {
	if len(payload) > maxFrame {
		return
	}
	if _, ok := peekXID(payload); !ok {
		return
	}
	a, err := readAnswer(from, payload)
	if err != nil {
		return
	}
	if reason := a.reason(); len(reason) > 128 || reason != "" && !printable(string(bytes.ReplaceAll([]byte(reason), []byte(" "), nil))) {
		t.Errorf("reason %q", reason)
	}
	l, err := a.lease(Request{Link: link, MAC: container}, time.Now())
	if err != nil {
		return
	}
	if err := l.validate(); err != nil {
		t.Errorf("%+v: %v", l, err)
	}
	if l.Gateway.IsValid() && !isHost(l.Gateway) || len(l.Search) > maxSearch || len(l.DNS) > maxServers || l.MTU != 0 && l.MTU < minMTU {
		t.Errorf("%+v", l)
	}
	for _, name := range append(l.Search, l.Domain) {
		if !printable(name) {
			t.Errorf("name %q", name)
		}
	}
}

// FuzzLeaseRecord takes leases over from any record. One that is kept is written back as it was, and all that is sent about it
// are frames that a server reads.
func FuzzLeaseRecord(f *testing.F) {
	obtained := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, l := range []Lease{
		{Request: Request{Link: link, MAC: container, Hostname: "web"}, Prefix: netip.MustParsePrefix("198.18.0.2/16"), Gateway: netip.MustParseAddr("198.18.0.1"), Server: netip.MustParseAddr("198.18.0.3"),
			Routes: []Route{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("198.18.0.7")}}, Obtained: obtained, T1: time.Minute, T2: 2 * time.Minute, Lifetime: 3 * time.Minute},
		{Request: Request{Link: link, MAC: container, IPv6: true}, Prefix: netip.MustParsePrefix("fd00::2/64"), ServerID: []byte{0, 3, 0, 1, 2, 0, 0, 0, 0, 1}, Obtained: obtained, T1: Infinite, T2: Infinite, Lifetime: Infinite},
	} {
		record, err := json.Marshal(l)
		if err != nil {
			f.Fatal(err)
		}
		var again Lease
		if err := json.Unmarshal(record, &again); err != nil || !reflect.DeepEqual(l, again) {
			f.Fatalf("%+v is read as %+v: %v", l, again, err)
		}
		f.Add(record)
	}
	f.Fuzz(func(t *testing.T, record []byte) {
		var l, again Lease
		if json.Unmarshal(record, &l) != nil || l.validate() != nil {
			return
		}
		written, err := json.Marshal(l)
		if err == nil {
			err = json.Unmarshal(written, &again)
		}
		if err != nil || !l.SameSettings(again) || !l.Obtained.Equal(again.Obtained) || again.validate() != nil || again.key() != l.key() {
			t.Fatalf("%+v is read as %+v from %s: %v", l, again, written, err)
		}
		p, x := l.protocol(), &exchange{}
		for what, frame := range map[string][]byte{
			"discover": p.discover(x, l.Request, l.Prefix.Addr()), "verify": p.verify(x, l), "renew": p.renew(x, l),
			"rebind": p.rebind(x, l, 1), "decline": p.decline(x, l), "release": p.release(x, l),
		} {
			if d, err := readDatagram(frame, false); err != nil || d.from != l.MAC || len(d.payload) == 0 {
				t.Errorf("to %s, %x is sent about %+v: %v", what, frame, l, err)
			}
		}
		p.claimant(p.probe(l), l)
	})
}
