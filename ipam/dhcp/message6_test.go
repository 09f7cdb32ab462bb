package dhcp

import (
	"bytes"
	"context"
	"errors"
	"math"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

var (
	request6 = Request{IPv6: true, Link: link, MAC: container}
	leased6  = Lease{
		Request: request6, Prefix: netip.MustParsePrefix("fd00:18::1:5/64"), Gateway: netip.MustParseAddr("fe80::1"), MTU: 1400,
		ServerID: []byte{0, 3, 0, 1, 2, 0, 0, 0, 0, 1}, Lifetime: time.Hour, T1: time.Minute, T2: 2 * time.Minute,
	}
)

// reply6 is a server's reply to the container that grants fd00:18::1:5.
func reply6(changes ...func(m *dhcpv6.Message)) []byte {
	m := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply}
	m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionClientID, OptionData: request6.duid()})
	m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionServerID, OptionData: leased6.ServerID})
	m.AddOption(&dhcpv6.OptIANA{IaId: request6.association(), Options: dhcpv6.IdentityOptions{Options: dhcpv6.Options{address6Option("fd00:18::1:5", 1000, 2000)}}})
	for _, c := range changes {
		c(m)
	}
	return m.ToBytes()
}

func status6(code iana.StatusCode) dhcpv6.Option {
	return &dhcpv6.OptStatusCode{StatusCode: code, StatusMessage: "so\nit is"}
}

// associated puts options into the client's association, instead of the address.
func associated(t1, t2 uint32, options ...dhcpv6.Option) func(m *dhcpv6.Message) {
	return func(m *dhcpv6.Message) {
		m.UpdateOption(&dhcpv6.OptIANA{
			IaId: request6.association(), T1: time.Duration(t1) * time.Second, T2: time.Duration(t2) * time.Second,
			Options: dhcpv6.IdentityOptions{Options: options},
		})
	}
}

func address6Option(a string, preferred, valid uint32) dhcpv6.Option {
	return &dhcpv6.OptIAAddress{
		IPv6Addr: netip.MustParseAddr(a).AsSlice(), PreferredLifetime: time.Duration(preferred) * time.Second, ValidLifetime: time.Duration(valid) * time.Second,
	}
}

func top(o dhcpv6.Option) func(m *dhcpv6.Message) {
	return func(m *dhcpv6.Message) { m.UpdateOption(o) }
}

func granted6(t *testing.T, payload []byte) (Lease, error) {
	t.Helper()
	a, err := readAnswer6(MAC{2, 0, 0, 0, 0, 1}, netip.MustParseAddr("fe80::2"), payload, container)
	if err != nil {
		t.Fatal(err)
	}
	return a.grant(leased6, time.Unix(0, 0))
}

func TestGrant6(t *testing.T) {
	for _, c := range []struct {
		what           string
		change         func(m *dhcpv6.Message)
		want           string
		t1, t2, expiry uint32
	}{
		{"times of the client's choice", associated(0, 0, address6Option("fd00:18::1:5", 1000, 2000)), "fd00:18::1:5/64", 500, 800, 2000},
		{"the server's times", associated(100, 200, address6Option("fd00:18::1:5", 1000, 2000)), "fd00:18::1:5/64", 100, 200, 2000},
		{"times out of order", associated(300, 200, address6Option("fd00:18::1:5", 1000, 2000)), "fd00:18::1:5/64", 114, 200, 2000},
		{"no preferred time", associated(0, 0, address6Option("fd00:18::1:5", 0, 2000)), "fd00:18::1:5/64", 1000, 1600, 2000},
		{"for ever", associated(0, 0, address6Option("fd00:18::1:5", math.MaxUint32, math.MaxUint32)), "fd00:18::1:5/64", math.MaxUint32, math.MaxUint32, math.MaxUint32},
		{"its own of several", associated(0, 0, address6Option("fd00:18::1:6", 1000, 2000), address6Option("fd00:18::1:5", 1000, 2000)), "fd00:18::1:5/64", 500, 800, 2000},
		{"another in its place", associated(0, 0, address6Option("fd00:18::1:5", 0, 0), address6Option("fd00:18::1:6", 1000, 2000)), "fd00:18::1:6/64", 500, 800, 2000},
		{"another in another subnet", associated(0, 0, address6Option("fd00:19::1:6", 1000, 2000)), "fd00:19::1:6/128", 500, 800, 2000},
		{"with success", associated(0, 0, address6Option("fd00:18::1:5", 1000, 2000), status6(iana.StatusSuccess)), "fd00:18::1:5/64", 500, 800, 2000},
	} {
		l, err := granted6(t, reply6(c.change))
		second := func(n uint32) time.Duration { return time.Duration(n) * time.Second }
		if err != nil || l.Prefix.String() != c.want || l.T1.Truncate(time.Second) != second(c.t1) || l.T2 != second(c.t2) || l.Lifetime != second(c.expiry) {
			t.Errorf("%s: %s, T1 %s, T2 %s, lifetime %s, %v", c.what, l.Prefix, l.T1, l.T2, l.Lifetime, err)
			continue
		}
		if l.Gateway != leased6.Gateway || l.MTU != leased6.MTU || l.Server != netip.MustParseAddr("fe80::2") || !slices.Equal(l.ServerID, leased6.ServerID) {
			t.Errorf("%s: %+v", c.what, l)
		}
		if err := l.validate(); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

func TestRefused6(t *testing.T) {
	for _, c := range []struct {
		what    string
		change  func(m *dhcpv6.Message)
		refused bool
		why     string
	}{
		{"no binding", associated(0, 0, status6(iana.StatusNoBinding)), true, "NoBinding: soit is"},
		{"not on the link", top(status6(iana.StatusNotOnLink)), true, "NotOnLink"},
		{"no addresses", associated(0, 0, status6(iana.StatusNoAddrsAvail)), true, "NoAddrsAvail"},
		{"the lifetime is over", associated(0, 0, address6Option("fd00:18::1:5", 0, 0)), true, "no address is granted any more"},
		{"a failure of the moment", top(status6(iana.StatusUnspecFail)), false, "UnspecFail"},
		{"nothing of the association", func(m *dhcpv6.Message) { m.Options.Del(dhcpv6.OptionIANA) }, false, "association"},
		{"another association", top(&dhcpv6.OptIANA{IaId: [4]byte{9}}), false, "association"},
		{"no address", associated(0, 0), false, "no address"},
		{"a short lifetime", associated(0, 0, address6Option("fd00:18::1:5", 1, 9)), false, "too short"},
		{"a link-local address", associated(0, 0, address6Option("fe80::5", 1000, 2000)), true, "no address"},
		{"a multicast address", associated(0, 0, address6Option("ff0e::5", 1000, 2000)), true, "no address"},
		{"an offer", func(m *dhcpv6.Message) { m.MessageType = dhcpv6.MessageTypeAdvertise }, false, errOther.Error()},
	} {
		l, err := granted6(t, reply6(c.change))
		var refused *RefusedError
		if err == nil || errors.As(err, &refused) != c.refused || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %+v, %v", c.what, l, err)
		}
	}
}

// TestElapsed6: who has asked for long says so, and does not begin anew.
func TestElapsed6(t *testing.T) {
	for asking, want := range map[time.Duration]time.Duration{2 * time.Second: 2 * time.Second, 11 * time.Minute: maxElapsed} {
		d, err := readDatagram(newSix().rebind(&exchange{begun: time.Now().Add(-asking)}, leased6, 0), false)
		if err != nil {
			t.Fatal(err)
		}
		m, err := dhcpv6.MessageFromBytes(d.payload)
		if err != nil {
			t.Fatal(err)
		}
		if said := m.Options.ElapsedTime(); said < want || said > want+time.Second {
			t.Errorf("after %s it says %s", asking, said)
		}
	}
}

// recorder is a transport on which nobody answers.
type recorder struct {
	mu     sync.Mutex
	frames [][]byte
	closed chan struct{}
}

func (r *recorder) Send(frame []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frames = append(r.frames, frame)
	return nil
}

func (r *recorder) Receive([]byte) (int, bool, error) {
	<-r.closed
	return 0, false, os.ErrClosed
}

func (r *recorder) Close() error {
	close(r.closed)
	return nil
}

// TestHeardWhileAsking: switches forget within minutes that the client listens, and some ask for longer.
func TestHeardWhileAsking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{closed: make(chan struct{})}
		c := newClient(Config{}, func(string, traffic) (transport, error) { return r, nil })
		defer c.Close()
		l, err := c.lan(request6)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		x := l.begin(container)
		defer x.end()
		_ = x.ask(ctx, func(n int) []byte { return l.protocol.rebind(x, leased6, n) }, backoff, func(received) bool { return false })
		r.mu.Lock()
		defer r.mu.Unlock()
		joins := 0
		for i, f := range r.frames {
			if bytes.Equal(f, joinGroup(container, solicitedNode(linkLocal(container)))) {
				joins++
			} else if joins == 0 {
				t.Errorf("frame %d is before all reports", i)
			}
		}
		if asked := len(r.frames) - joins; asked < 50 || joins < asked {
			t.Errorf("asked %d times, and reported %d times what is listened to", asked, joins)
		}
	})
}

func TestReadAnswer6(t *testing.T) {
	for what, change := range map[string]func(m *dhcpv6.Message){
		"a client's message": func(m *dhcpv6.Message) { m.MessageType = dhcpv6.MessageTypeSolicit },
		"no server":          func(m *dhcpv6.Message) { m.Options.Del(dhcpv6.OptionServerID) },
		"no client":          func(m *dhcpv6.Message) { m.Options.Del(dhcpv6.OptionClientID) },
		"another client": top(&dhcpv6.OptionGeneric{
			OptionCode: dhcpv6.OptionClientID, OptionData: Request{MAC: MAC{2, 9}}.duid(),
		}),
	} {
		if a, err := readAnswer6(container, nobody6, reply6(change), container); err == nil {
			t.Errorf("%s is read: %v", what, a)
		}
	}
	whole := reply6()
	for n := header6; n < len(whole); n++ {
		if a, err := readAnswer6(container, nobody6, whole[:n], container); err == nil {
			if _, err := a.grant(leased6, time.Now()); err == nil {
				t.Errorf("a message cut to %d bytes grants something", n)
			}
		}
	}
}

func TestNames6(t *testing.T) {
	l, err := granted6(t, reply6(
		top(dhcpv6.OptDNS(netip.MustParseAddr("fd00::53").AsSlice(), netip.MustParseAddr("fe80::53").AsSlice(), netip.MustParseAddr("ff02::fb").AsSlice())),
		top(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: []string{"lan.example", "evil\nexample", "lan.example"}})),
	))
	if err != nil || !slices.Equal(l.DNS, []netip.Addr{netip.MustParseAddr("fd00::53")}) || !slices.Equal(l.Search, []string{"lan.example"}) {
		t.Errorf("%+v, %v", l, err)
	}
	long := strings.Repeat("a.", 300)
	if l, err := granted6(t, reply6(top(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: []string{long}})))); err != nil || len(l.Search) != 0 {
		t.Errorf("a search list of %d bytes: %+v, %v", len(long), l, err)
	}
}

func TestNeighbours(t *testing.T) {
	router := netip.MustParseAddr("fe80::fe")
	body := []byte{routerAdvertisement, 0, 0, 0, 64, 0x80, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
	prefix := func(flags byte, p string) []byte {
		pr := netip.MustParsePrefix(p)
		return append([]byte{optionPrefix, 4, byte(pr.Bits()), flags, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0}, pr.Addr().AsSlice()...)
	}
	all := slices.Concat(body, prefix(0xc0, "fd00:18::/64"), prefix(0x40, "fd00:19::/64"), prefix(0x80, "fe80::/64"), []byte{optionMTU, 1, 0, 0, 0, 0, 5, 120})
	read := func(source netip.Addr, hops byte, body []byte) (advertisement, error) {
		to := netip.MustParseAddr("ff02::1")
		p, err := readICMP6(packet{MAC{2, 9}, multicastMAC(to), source, to, protocolICMP6, hops, slices.Clone(body)}.seal(2).frame())
		if err != nil {
			return advertisement{}, err
		}
		return readAdvertisement(p)
	}
	want := advertisement{router: router, leads: true, prefixes: []netip.Prefix{netip.MustParsePrefix("fd00:18::/64")}, mtu: 1400}
	if got, err := read(router, 255, all); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := read(router, 64, all); err == nil {
		t.Errorf("forwarded: %+v", got)
	}
	if got, err := read(netip.MustParseAddr("fd00:18::fe"), 255, all); err == nil {
		t.Errorf("not from a link-local address: %+v", got)
	}
	if got, err := read(router, 255, append(slices.Clone(all), 1, 0, 0, 0, 0, 0, 0, 0)); err == nil {
		t.Errorf("an option without a length: %+v", got)
	}
	all[6], all[7] = 0, 0
	if got, err := read(router, 255, all); err != nil || got.leads {
		t.Errorf("no default router: %+v, %v", got, err)
	}

	l, other := leased6, MAC{2, 9}
	for what, c := range map[string]struct {
		frame []byte
		want  MAC
	}{
		"who has it":         {neighbour{from: other, source: router, target: l.Prefix.Addr()}.reply(other), other},
		"who is about to":    {probeNeighbour(other, l.Prefix.Addr()), other},
		"the client":         {probeNeighbour(container, l.Prefix.Addr()), MAC{}},
		"about another":      {probeNeighbour(other, netip.MustParseAddr("fd00::1")), MAC{}},
		"a router's":         {solicitRouters(other), MAC{}},
		"not ICMPv6":         {example.frame(), MAC{}},
		"listens to a group": {joinGroup(other, solicitedNode(l.Prefix.Addr())), MAC{}},
	} {
		if got := newSix().claimant(c.frame, l); got != c.want {
			t.Errorf("%s: %s", what, got)
		}
	}
}

// FuzzFrame6 reads whatever the LAN may send over IPv6.
func FuzzFrame6(f *testing.F) {
	f.Add(datagram{from: MAC{2, 0, 0, 0, 0, 1}, to: container, source: netip.MustParseAddr("fe80::1"), target: linkLocal(container), sourcePort: serverPort6, toPort: clientPort6, payload: reply6()}.frame(), false)
	f.Add(probeNeighbour(container, leased6.Prefix.Addr()), false)
	f.Add(solicitRouters(container), false)
	f.Fuzz(func(t *testing.T, frame []byte, unsummed bool) {
		newSix().claimant(frame, leased6)
		if p, err := readICMP6(frame); err == nil {
			fuzzNeighbour(t, p)
		}
		if d, err := readDatagram(frame, unsummed); err == nil {
			fuzzMessage6(t, d.payload)
		}
	})
}

// FuzzMessage6 is FuzzFrame6 behind the checksums.
func FuzzMessage6(f *testing.F) {
	f.Add(reply6(), false)
	f.Add(reply6(associated(1, 2, address6Option("fd00:18::1:5", 0, 0), status6(iana.StatusNoBinding))), false)
	f.Add(reply6(top(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: []string{"lan.example"}}))), false)
	f.Add(append([]byte{routerAdvertisement, 0, 0, 0, 64, 0x80, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, optionMTU, 1, 0, 0, 0, 0, 5, 120), true)
	f.Fuzz(func(t *testing.T, payload []byte, icmp bool) {
		switch {
		case len(payload) > maxFrame:
		case !icmp:
			fuzzMessage6(t, payload)
		case len(payload) >= 8:
			fuzzNeighbour(t, packet{source: netip.MustParseAddr("fe80::1"), payload: payload})
		}
	})
}

func fuzzNeighbour(t *testing.T, p packet) {
	if n, err := readNeighbour(p); err == nil {
		n.claims(leased6)
		n.reply(container)
	}
	a, err := readAdvertisement(p)
	if err != nil {
		return
	}
	if len(a.prefixes) > maxPrefixes || a.mtu != 0 && a.mtu < minMTU6 || !a.router.IsLinkLocalUnicast() {
		t.Errorf("%+v", a)
	}
}

func fuzzMessage6(t *testing.T, payload []byte) {
	if _, ok := peekXID6(payload); !ok {
		return
	}
	a, err := readAnswer6(container, netip.MustParseAddr("fe80::1"), payload, container)
	if err != nil {
		return
	}
	for _, held := range []Lease{leased6, {Request: request6}} {
		l, err := a.read(held, time.Now())
		if err != nil {
			continue
		}
		if err := l.validate(); err != nil {
			t.Errorf("%+v: %v", l, err)
		}
		if len(l.Search) > maxSearch || len(l.DNS) > maxServers {
			t.Errorf("%+v", l)
		}
		for _, name := range l.Search {
			if !printable(name) {
				t.Errorf("name %q", name)
			}
		}
	}
}
