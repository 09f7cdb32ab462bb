package dhcp

import (
	"encoding/json"
	"math"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

// granted is a server's answer, as it is read from the wire.
func granted(t testing.TB, change func(m *dhcpv4.DHCPv4)) (Lease, error) {
	t.Helper()
	s := newServer(1)
	request := Request{Link: link, MAC: container}.discover(netip.Addr{})
	m := s.answer(request, dhcpv4.MessageTypeAck, netip.MustParseAddr("198.18.1.100"))
	change(m)
	a, err := readAnswer(s.mac, m.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	return a.lease(Request{Link: link, MAC: container}, time.Unix(0, 0))
}

func raw(code dhcpv4.OptionCode, b ...byte) func(m *dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptGeneric(code, b)) }
}

func without(code dhcpv4.OptionCode) func(m *dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.DeleteOption(code) }
}

func yours(address string) func(m *dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.YourIPAddr = netip.MustParseAddr(address).AsSlice() }
}

func all(changes ...func(m *dhcpv4.DHCPv4)) func(m *dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) {
		for _, c := range changes {
			c(m)
		}
	}
}

func TestLeaseIsRefused(t *testing.T) {
	for _, c := range []struct {
		change func(m *dhcpv4.DHCPv4)
		why    string
	}{
		{without(dhcpv4.OptionServerIdentifier), "no server"},
		{raw(dhcpv4.OptionServerIdentifier, 0, 0, 0, 0), "no server"},
		{raw(dhcpv4.OptionServerIdentifier, 198, 18, 0), "no server"},
		{raw(dhcpv4.OptionServerIdentifier, 127, 0, 0, 1), "no server"},
		{yours("0.0.0.0"), "not an address for a host"},
		{yours("127.0.0.1"), "not an address for a host"},
		{yours("239.1.2.3"), "not an address for a host"},
		{yours("255.255.255.255"), "not an address for a host"},
		{yours("198.18.0.0"), "not a host's"},
		{yours("198.18.255.255"), "not a host's"},
		{raw(dhcpv4.OptionSubnetMask, 0, 0, 0, 0), "netmask"},
		{raw(dhcpv4.OptionSubnetMask, 255, 0, 255, 0), "netmask"},
		{raw(dhcpv4.OptionSubnetMask, 255, 255), "netmask"},
		{without(dhcpv4.OptionIPAddressLeaseTime), "no lifetime"},
		{raw(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 0), "too short"},
		{raw(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 9), "too short"},
		{raw(dhcpv4.OptionIPAddressLeaseTime, 0, 1), "no lifetime"},
	} {
		if l, err := granted(t, c.change); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%+v, %v; want: %s", l, err, c.why)
		}
	}
}

func TestLeasePrefix(t *testing.T) {
	for _, c := range []struct {
		change func(m *dhcpv4.DHCPv4)
		want   string
	}{
		{raw(dhcpv4.OptionSubnetMask, 255, 255, 255, 255), "198.18.1.100/32"},
		{all(raw(dhcpv4.OptionSubnetMask, 255, 255, 255, 254), yours("198.18.1.101")), "198.18.1.101/31"},
		{raw(dhcpv4.OptionSubnetMask, 128, 0, 0, 0), "198.18.1.100/1"},
		{without(dhcpv4.OptionSubnetMask), "198.18.1.100/24"},
		{raw(dhcpv4.OptionSubnetMask), "198.18.1.100/24"},
		{all(without(dhcpv4.OptionSubnetMask), yours("10.1.2.3")), "10.1.2.3/8"},
		{all(without(dhcpv4.OptionSubnetMask), yours("172.16.2.3")), "172.16.2.3/16"},
	} {
		if l, err := granted(t, c.change); err != nil || l.Prefix.String() != c.want {
			t.Errorf("%s, %v; want %s", l.Prefix, err, c.want)
		}
	}
}

func TestLeaseTimes(t *testing.T) {
	second := func(n uint32) []byte { return []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)} }
	for _, c := range []struct{ lifetime, t1, t2, wantT1, wantT2 uint32 }{
		{800, 0, 0, 400, 700},
		{800, 100, 200, 100, 200},
		{800, 500, 0, 500, 700},
		{800, 0, 600, 342, 600},
		{800, 600, 300, 171, 300},
		{800, 800, 800, 400, 700},
		{800, 100, 900, 100, 700},
		{800, 300, 300, 171, 300},
		{800, math.MaxUint32, math.MaxUint32, 400, 700},
		{10, 1, 1, 1, 8},
		{math.MaxUint32, 100, 200, math.MaxUint32, math.MaxUint32},
		{math.MaxUint32 - 1, 0, 0, math.MaxUint32 / 2, 3758096382},
	} {
		l, err := granted(t, all(raw(dhcpv4.OptionIPAddressLeaseTime, second(c.lifetime)...),
			raw(dhcpv4.OptionRenewTimeValue, second(c.t1)...), raw(dhcpv4.OptionRebindingTimeValue, second(c.t2)...)))
		if err != nil || l.T1/time.Second != time.Duration(c.wantT1) || l.T2/time.Second != time.Duration(c.wantT2) ||
			l.Lifetime != time.Duration(c.lifetime)*time.Second {
			t.Errorf("%+v: T1 %s, T2 %s, lifetime %s, %v", c, l.T1, l.T2, l.Lifetime, err)
		}
		if err := l.validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestLeaseRoutes(t *testing.T) {
	classless := func(routes ...string) func(m *dhcpv4.DHCPv4) {
		var b dhcpv4.Routes
		for _, r := range routes {
			prefix, via, _ := strings.Cut(r, " ")
			_, dest, err := net.ParseCIDR(prefix)
			if err != nil {
				t.Fatal(err)
			}
			b = append(b, &dhcpv4.Route{Dest: dest, Router: net.ParseIP(via)})
		}
		return raw(dhcpv4.OptionClasslessStaticRoute, b.ToBytes()...)
	}
	for _, c := range []struct {
		name    string
		change  func(m *dhcpv4.DHCPv4)
		gateway string
		routes  []string
	}{
		{"one router", func(*dhcpv4.DHCPv4) {}, "198.18.0.1", nil},
		{"no router", without(dhcpv4.OptionRouter), "invalid IP", nil},
		{"the second router is in the prefix", raw(dhcpv4.OptionRouter, 10, 0, 0, 1, 198, 18, 0, 2), "198.18.0.2", nil},
		{"no router is in the prefix", raw(dhcpv4.OptionRouter, 10, 0, 0, 1, 10, 0, 0, 2), "10.0.0.1", nil},
		{"the router is the client", raw(dhcpv4.OptionRouter, 198, 18, 1, 100), "invalid IP", nil},
		{"the router is nobody", raw(dhcpv4.OptionRouter, 0, 0, 0, 0, 224, 0, 0, 1), "invalid IP", nil},
		{"the option is cut off", raw(dhcpv4.OptionRouter, 198, 18, 0), "invalid IP", nil},
		{"classless without default", classless("10.0.0.0/8 198.18.0.7"), "invalid IP", []string{"10.0.0.0/8 198.18.0.7"}},
		{"classless with default", classless("10.0.0.0/8 198.18.0.7", "0.0.0.0/0 198.18.0.8"), "198.18.0.8", []string{"10.0.0.0/8 198.18.0.7"}},
		{"on the link", classless("169.254.169.254/32 0.0.0.0"), "invalid IP", []string{"169.254.169.254/32 invalid IP"}},
		{"via the client or nobody", classless("10.0.0.0/8 198.18.1.100", "11.0.0.0/8 255.255.255.255"), "invalid IP", nil},
		{"host bits", raw(dhcpv4.OptionClasslessStaticRoute, 12, 10, 255, 198, 18, 0, 7), "invalid IP", []string{"10.240.0.0/12 198.18.0.7"}},
		{"classless is cut off", raw(dhcpv4.OptionClasslessStaticRoute, 24, 10, 0, 0, 198), "198.18.0.1", nil},
		{"classless has a prefix of 33", raw(dhcpv4.OptionClasslessStaticRoute, 33, 10, 0, 0, 1, 1, 198, 18, 0, 7), "198.18.0.1", nil},
	} {
		l, err := granted(t, c.change)
		var routes []string
		for _, r := range l.Routes {
			routes = append(routes, r.Prefix.String()+" "+r.Via.String())
		}
		if err != nil || l.Gateway.String() != c.gateway || !slices.Equal(routes, c.routes) {
			t.Errorf("%s: gateway %s, routes %q, %v", c.name, l.Gateway, routes, err)
		}
	}
}

func TestLeaseNames(t *testing.T) {
	search := func(names ...string) func(m *dhcpv4.DHCPv4) {
		return raw(dhcpv4.OptionDNSDomainSearchList, (&rfc1035label.Labels{Labels: names}).ToBytes()...)
	}
	l, err := granted(t, all(
		raw(dhcpv4.OptionDomainName, []byte("Lan.example.\x00")...),
		search("a.example", "a.example", "evil\nnameserver 6.6.6.6", "b.example", "-x.example", "semi;colon", "_msdcs.corp"),
		raw(dhcpv4.OptionDomainNameServer, 198, 18, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0, 198, 18, 0, 1, 8, 8, 8, 8),
		raw(dhcpv4.OptionInterfaceMTU, 5, 120),
	))
	if err != nil {
		t.Fatal(err)
	}
	if l.Domain != "Lan.example" || !slices.Equal(l.Search, []string{"a.example", "b.example", "_msdcs.corp"}) || l.MTU != 1400 ||
		!slices.Equal(l.DNS, []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("8.8.8.8")}) {
		t.Errorf("%+v", l)
	}
	for _, bad := range []string{"a b", "a\nb", "", ".", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a", "ü.example", "a\x00b"} {
		if l, err := granted(t, all(raw(dhcpv4.OptionDomainName, []byte(bad)...), search(bad))); err != nil || l.Domain != "" || len(l.Search) != 0 {
			t.Errorf("%q: %q, %q, %v", bad, l.Domain, l.Search, err)
		}
	}
	for _, bad := range [][]byte{{}, {1}, {0, 68}, {2, 63}, {5, 220, 0}} {
		if l, err := granted(t, raw(dhcpv4.OptionInterfaceMTU, bad...)); err != nil || l.MTU != 0 {
			t.Errorf("MTU % x: %d, %v", bad, l.MTU, err)
		}
	}
	// A pointer to itself, a pointer out of the option, and a label that is cut off.
	for _, bad := range [][]byte{{0xc0, 0}, {0xc0, 77}, {0xc0}, {9, 'a'}, {1, 'a', 0xc0, 0}} {
		if l, err := granted(t, raw(dhcpv4.OptionDNSDomainSearchList, bad...)); err != nil || len(l.Search) != 0 {
			t.Errorf("search % x: %q, %v", bad, l.Search, err)
		}
	}
}

// TestOverload has options in the fields sname and file, as servers do that run out of space.
func TestOverload(t *testing.T) {
	s := newServer(1)
	m := s.answer(Request{Link: link, MAC: container}.discover(netip.Addr{}), dhcpv4.MessageTypeAck, netip.MustParseAddr("198.18.1.100"))
	m.DeleteOption(dhcpv4.OptionRouter)
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionOptionOverload, []byte{3}))
	b := m.ToBytes()
	copy(b[offsetFile:], []byte{3, 4, 198, 18, 0, 5, 255})
	copy(b[offsetSname:], []byte{0, 26, 2, 5, 120, 255})
	a, err := readAnswer(s.mac, b)
	if err != nil {
		t.Fatal(err)
	}
	l, err := a.lease(Request{Link: link, MAC: container}, time.Now())
	if err != nil || l.Gateway != netip.MustParseAddr("198.18.0.5") || l.MTU != 1400 {
		t.Errorf("%+v, %v", l, err)
	}
	copy(b[offsetSname:], []byte{26, 63, 5, 120, 255})
	if _, err := readAnswer(s.mac, b); err == nil {
		t.Error("an option that does not fit into the field is read")
	}
}

func TestRecord(t *testing.T) {
	l, err := granted(t, all(
		raw(dhcpv4.OptionClasslessStaticRoute, 8, 10, 198, 18, 0, 7, 8, 11, 0, 0, 0, 0),
		raw(dhcpv4.OptionDomainNameServer, 198, 18, 0, 1), raw(dhcpv4.OptionDomainName, 'a')))
	if err != nil {
		t.Fatal(err)
	}
	l.ClientID, l.Hostname, l.Address = []byte{0, 1, 2}, "web", netip.MustParseAddr("198.18.1.100")
	for _, l := range []Lease{l, {}} {
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var read Lease
		if err := json.Unmarshal(text, &read); err != nil {
			t.Fatal(err)
		}
		if !read.Obtained.Equal(l.Obtained) {
			t.Errorf("obtained %s, read %s", l.Obtained, read.Obtained)
		}
		read.Obtained = l.Obtained
		if !reflect.DeepEqual(read, l) {
			t.Errorf("recorded %+v\nread     %+v\nin %s", l, read, text)
		}
	}
}

func TestMessageLimits(t *testing.T) {
	r := Request{Link: link, MAC: container, ClientID: make([]byte, 255), Hostname: strings.Repeat("h", 255)}
	l := Lease{Request: r, Prefix: netip.MustParsePrefix("198.18.1.100/16"), Server: netip.MustParseAddr("198.18.0.1")}
	if n := len(r.broadcast(l.selectOffer())); n > 1024 {
		t.Errorf("the longest message is a frame of %d bytes", n)
	}
	if n := len(Request{Link: link, MAC: container}.discover(netip.Addr{}).ToBytes()); n < 300 {
		t.Errorf("the shortest message has %d bytes: some relays drop less than 300", n)
	}
}
