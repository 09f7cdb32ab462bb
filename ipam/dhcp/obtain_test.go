package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"
)

func TestObtain(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		begin := time.Now()
		lease := h.obtain(t)
		within(t, "lease", time.Since(begin), 200*time.Millisecond, 200*time.Millisecond) // the probe's
		if lease.Prefix != netip.MustParsePrefix("198.18.1.100/16") || lease.Server != s.ip || lease.ServerMAC != s.mac {
			t.Errorf("lease %+v", lease)
		}
		if lease.Lifetime != time.Hour || lease.T1 != 30*time.Minute || lease.T2 != 52*time.Minute+30*time.Second || !lease.Obtained.Equal(begin) {
			t.Errorf("times of the lease: %+v", lease)
		}
		for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest} {
			m := h.received(s, kind)
			if len(m) != 1 || !m[0].broadcast || m[0].unicast || m[0].source != noAddress {
				t.Errorf("%s: %+v", kind, m)
			}
		}
		if n := len(h.Leases()); n != 0 {
			t.Errorf("%d leases are kept, though nobody asked for that", n)
		}
		if n := h.listening(); n != 1 {
			t.Errorf("%d transports listen just after", n)
		}
		pass(linger + time.Second)
		if n := h.listening(); n != 0 {
			t.Errorf("%d transports still listen", n)
		}
	}, s)
}

func TestObtainRepeatsWhatIsLost(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		begin := time.Now()
		h.lose = func(m *dhcpv4.DHCPv4, n int) bool {
			return m.MessageType() == dhcpv4.MessageTypeDiscover && n <= 2 || m.MessageType() == dhcpv4.MessageTypeRequest && n == 1
		}
		h.obtain(t)
		// two lost DISCOVERs cost 1 and 2 s, a REQUEST 1 s, the probe 0.2 s
		within(t, "lease", time.Since(begin), 3100*time.Millisecond, 5300*time.Millisecond)
	}, s)
}

func TestObtainTakesALateAnswer(t *testing.T) {
	onWire(t, func(t *testing.T, h *host) {
		h.delay = func(*dhcpv4.DHCPv4) time.Duration { return 3500 * time.Millisecond }
		begin := time.Now()
		h.obtain(t)
		within(t, "lease", time.Since(begin), 7200*time.Millisecond, 7200*time.Millisecond)
	}, newServer(1))
}

func TestObtainWithoutServer(t *testing.T) {
	s := newServer(1)
	s.silent = true
	onWire(t, func(t *testing.T, h *host) {
		begin := time.Now()
		_, err := h.Obtain(t.Context(), Request{Link: link, MAC: container})
		within(t, "error", time.Since(begin), 15*time.Second, 15*time.Second)
		if !errors.Is(err, ErrNoServer) || !strings.Contains(err.Error(), link) || !strings.Contains(err.Error(), "within 15s: check") {
			t.Errorf("error: %v", err)
		}
		sent := h.received(s, dhcpv4.MessageTypeDiscover)
		if len(sent) < 4 || len(sent) > 5 { // at 0, 1, 3 and 7 s, more or less, and perhaps just before 15 s
			t.Fatalf("%d messages were sent", len(sent))
		}
		for i, pause := range []time.Duration{1, 2, 4} {
			pause *= time.Second
			within(t, "message", sent[i+1].at.Sub(sent[i].at), pause*3/4, pause*5/4)
		}
	}, s)
}

func TestObtainOnABadLink(t *testing.T) {
	onWire(t, func(t *testing.T, h *host) {
		begin := time.Now()
		h.missing = errors.New("there is no link")
		if _, err := h.Obtain(t.Context(), Request{Link: link, MAC: container}); !errors.Is(err, h.missing) {
			t.Errorf("error: %v", err)
		}
		within(t, "error", time.Since(begin), 0, 0)
	})
}

func TestObtainWhenTheLinkIsMadeAgain(t *testing.T) {
	onWire(t, func(t *testing.T, h *host) {
		h.broken = unix.ENXIO
		begin := time.Now()
		h.obtain(t)
		within(t, "lease", time.Since(begin), 200*time.Millisecond, 200*time.Millisecond)
		if h.opened != 3 {
			t.Errorf("%d transports were opened, want one, its replacement, and that of the probe", h.opened)
		}
	}, newServer(1))
}

func TestObtainRefusesAWrongRequest(t *testing.T) {
	onWire(t, func(t *testing.T, h *host) {
		for _, r := range []Request{
			{},
			{Link: link},
			{Link: link, MAC: broadcastMAC},
			{MAC: container},
			{Link: link, MAC: container, ClientID: []byte{1}},
			{Link: link, MAC: container, ClientID: make([]byte, 256)},
			{Link: link, MAC: container, Hostname: "a b"},
			{Link: link, MAC: container, Hostname: strings.Repeat("a", 256)},
			{Link: link, MAC: container, Address: netip.MustParseAddr("fd00::1")},
			{Link: link, MAC: container, Address: netip.MustParseAddr("224.0.0.1")},
		} {
			if _, err := h.Obtain(t.Context(), r); err == nil {
				t.Errorf("request %+v is taken", r)
			}
		}
		if h.opened != 0 {
			t.Error("the link was opened")
		}
	}, newServer(1))
}

func TestObtainAnAddress(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		r := Request{Link: link, MAC: container, Address: netip.MustParseAddr("198.18.1.100")}
		lease, err := h.Obtain(t.Context(), r)
		if err != nil || lease.Prefix.Addr() != r.Address {
			t.Fatalf("%v, %v", lease, err)
		}
		if m := h.received(s, dhcpv4.MessageTypeDiscover); m[0].requested != r.Address {
			t.Errorf("asked for %s", m[0].requested)
		}
	}, s)
}

func TestObtainWhenAnotherAddressIsOffered(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		begin := time.Now()
		asked := netip.MustParseAddr("198.18.1.7")
		_, err := h.Obtain(t.Context(), Request{Link: link, MAC: container, Address: asked})
		var offered *OfferedError
		if !errors.As(err, &offered) || offered.Offered != netip.MustParseAddr("198.18.1.100") || offered.Asked != asked || offered.Server != s.ip {
			t.Errorf("error: %v", err)
		}
		within(t, "error", time.Since(begin), otherServers, otherServers)
		if n := len(h.received(s, dhcpv4.MessageTypeRequest)); n != 0 {
			t.Errorf("the offer was taken")
		}
	}, s)
}

func TestObtainFromTheServerThatHasTheAddress(t *testing.T) {
	wrong, right := newServer(1), newServer(2)
	onWire(t, func(t *testing.T, h *host) {
		h.delay = func(m *dhcpv4.DHCPv4) time.Duration {
			if oneAddress(m.ServerIdentifier()) == right.ip {
				return otherServers / 2
			}
			return 0
		}
		lease, err := h.Obtain(t.Context(), Request{Link: link, MAC: container, Address: netip.MustParseAddr("198.18.2.100")})
		if err != nil || lease.Server != right.ip {
			t.Fatalf("%v, %v", lease, err)
		}
		if m := h.received(wrong, dhcpv4.MessageTypeRequest); len(m) != 1 || m[0].named != right.ip {
			t.Errorf("the other server was not turned down: %+v", m)
		}
	}, wrong, right)
}

func TestObtainRefused(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		s.refuse = func(dhcpv4.MessageType) bool { return true }
		begin := time.Now()
		_, err := h.Obtain(t.Context(), Request{Link: link, MAC: container})
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Server != s.ip || refused.Reason != "not yours" {
			t.Errorf("error: %v", err)
		}
		within(t, "error", time.Since(begin), 15*time.Second, 15*time.Second)
		if n := len(h.received(s, dhcpv4.MessageTypeDiscover)); n < 3 || n > 6 {
			t.Errorf("%d tries", n)
		}
		s.refuse = func(dhcpv4.MessageType) bool { return len(s.seen)%3 != 0 }
		h.obtain(t)
	}, s)
}

func TestObtainWhenTheAddressIsTaken(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		first := s.next
		h.hosts[first] = MAC{2, 9, 9, 9, 9, 9}
		lease := h.obtain(t)
		if lease.Prefix.Addr() != first.Next() {
			t.Errorf("leased %s", lease.Prefix)
		}
		if m := h.received(s, dhcpv4.MessageTypeDecline); len(m) != 1 || m[0].requested != first || m[0].named != s.ip || m[0].unicast {
			t.Errorf("declined: %+v", m)
		}
		h.hosts[s.next] = h.hosts[first]
		other := MAC{2, 0x42, 0, 0, 0, 2}
		_, err := h.Obtain(t.Context(), Request{Link: link, MAC: other, Address: s.next})
		var taken *TakenError
		if !errors.As(err, &taken) || taken.Holder != h.hosts[first] {
			t.Errorf("error: %v", err)
		}
		h.hosts[lease.Prefix.Addr()] = container // the container itself is no stranger
		h.obtain(t)
	}, s)
}

// TestObtainWhenTheHostHasTheAddress: nobody on the LAN answers for what the host itself, or a container on it, has there.
func TestObtainWhenTheHostHasTheAddress(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		first := s.next
		h.holders = map[netip.Addr]MAC{first: {2, 8, 8, 8, 8, 8}, first.Next(): container} // the container itself is no stranger
		lease := h.obtain(t)
		if lease.Prefix.Addr() != first.Next() {
			t.Errorf("leased %s", lease.Prefix)
		}
		if m := h.received(s, dhcpv4.MessageTypeDecline); len(m) != 1 || m[0].requested != first {
			t.Errorf("declined: %+v", m)
		}
	}, s)
}

// TestObtainGivenUp cancels while the server keeps its acknowledgement back: the address must not stay leased.
func TestObtainGivenUp(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		h.delay = func(m *dhcpv4.DHCPv4) time.Duration {
			if m.MessageType() == dhcpv4.MessageTypeAck {
				return time.Minute
			}
			return 0
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		begin := time.Now()
		if _, err := h.Obtain(ctx, Request{Link: link, MAC: container}); err == nil {
			t.Error("leased")
		}
		within(t, "error", time.Since(begin), 500*time.Millisecond, 500*time.Millisecond)
		if len(s.leases) != 0 {
			t.Errorf("the server still has %v", s.leases)
		}
		pass(time.Hour)
	}, s)
}

// TestObtainAmongHostileAnswers has a server send all kinds of rubbish before its offer. None of it may do anything.
func TestObtainAmongHostileAnswers(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		rubbish := func(a *dhcpv4.DHCPv4, change func(m *dhcpv4.DHCPv4)) []byte {
			m, err := dhcpv4.FromBytes(a.ToBytes())
			if err != nil {
				t.Fatal(err)
			}
			m.YourIPAddr = []byte{198, 18, 66, 66}
			m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeOffer))
			change(m)
			return s.frame(m)
		}
		s.edit = func(a *dhcpv4.DHCPv4) {
			if a.MessageType() != dhcpv4.MessageTypeOffer {
				return
			}
			good := rubbish(a, func(*dhcpv4.DHCPv4) {})
			cut := func(n int) []byte { return good[:n] }
			flip := func(i int) []byte { f := slices.Clone(good); f[i] ^= 0x55; return f }
			frames := [][]byte{
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.TransactionID[0]++ }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = []byte{2, 0x42, 0, 0, 0, 9} }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = append(slices.Clone(m.ClientHWAddr), 0) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootRequest }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.HWType = 6 }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.DeleteOption(dhcpv4.OptionDHCPMessageType) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.DeleteOption(dhcpv4.OptionServerIdentifier) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.DeleteOption(dhcpv4.OptionIPAddressLeaseTime) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(0)) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptSubnetMask([]byte{255, 0, 255, 0})) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.YourIPAddr = []byte{224, 0, 0, 1} }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.YourIPAddr = []byte{198, 18, 255, 255} }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeAck)) }),
				rubbish(a, func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak)) }),
				cut(0), cut(13), cut(41), cut(42), cut(100), cut(282), cut(285), cut(len(good) / 2),
				flip(12), flip(14), flip(16), flip(20), flip(23), flip(26), flip(37), flip(38), flip(60),
			}
			for _, f := range frames {
				h.transmit(answers, f)
			}
		}
		begin := time.Now()
		lease := h.obtain(t)
		if lease.Prefix.Addr() != netip.MustParseAddr("198.18.1.100") {
			t.Errorf("leased %s", lease.Prefix)
		}
		within(t, "lease", time.Since(begin), 200*time.Millisecond, 200*time.Millisecond)
	}, s)
}

// TestObtainSaysWhyAnOfferIsUseless has a server whose offers cannot be used.
func TestObtainSaysWhyAnOfferIsUseless(t *testing.T) {
	s := newServer(1)
	s.edit = func(a *dhcpv4.DHCPv4) { a.UpdateOption(dhcpv4.OptIPAddressLeaseTime(3 * time.Second)) }
	onWire(t, func(t *testing.T, h *host) {
		_, err := h.Obtain(t.Context(), Request{Link: link, MAC: container})
		if err == nil || !strings.Contains(err.Error(), "a lifetime of 3 s is too short") {
			t.Errorf("error: %v", err)
		}
	}, s)
}
