package dhcp

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/sirupsen/logrus"
)

// wire is a LAN in memory: clients, DHCP servers and hosts that answer ARP.
type wire struct {
	mu      sync.Mutex
	ports   []*port
	opened  int
	servers []*server
	hosts   map[netip.Addr]MAC
	broken  error                                // of Send, once
	missing error                                // of opening
	lose    func(m *dhcpv4.DHCPv4, n int) bool   // the nth message of its type from clients is lost
	counts  map[dhcpv4.MessageType]int           // of messages from clients
	delay   func(m *dhcpv4.DHCPv4) time.Duration // of a server's answer
}

func newWire(servers ...*server) *wire {
	return &wire{servers: servers, hosts: map[netip.Addr]MAC{}, counts: map[dhcpv4.MessageType]int{}}
}

// port is one transport on the wire.
type port struct {
	wire   *wire
	t      traffic
	frames chan []byte
	once   sync.Once
	closed chan struct{}
}

func (w *wire) open(link string, t traffic) (transport, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.missing != nil {
		return nil, w.missing
	}
	p := &port{wire: w, t: t, frames: make(chan []byte, 1<<14), closed: make(chan struct{})}
	w.ports = append(w.ports, p)
	w.opened++
	return p, nil
}

// listening is how many transports for answers are open.
func (w *wire) listening() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(w.ports), func(p *port) bool { return p.t != answers }))
}

func (p *port) Close() error {
	p.wire.mu.Lock()
	defer p.wire.mu.Unlock()
	p.wire.ports = slices.DeleteFunc(p.wire.ports, func(o *port) bool { return o == p })
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *port) Receive(buffer []byte) (int, bool, error) {
	select {
	case f := <-p.frames:
		return copy(buffer, f), false, nil
	case <-p.closed:
		return 0, false, os.ErrClosed
	}
}

func (p *port) Send(frame []byte) error {
	w := p.wire
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.broken; err != nil {
		w.broken = nil
		return err
	}
	if binary.BigEndian.Uint16(frame[12:]) == etherARP {
		a, err := readARP(frame)
		if err != nil {
			return err
		}
		if mac, ok := w.hosts[a.wanted]; ok {
			w.transmit(arpBoth, arp{reply: true, sender: mac, senderIP: a.wanted, target: a.sender, wanted: a.senderIP}.frame())
		}
		return nil
	}
	d, err := readDatagram(frame, false)
	if err != nil {
		return fmt.Errorf("a client sent a bad frame: %w", err)
	}
	m, err := dhcpv4.FromBytes(d.payload)
	if err != nil {
		return fmt.Errorf("a client sent a bad message: %w", err)
	}
	w.counts[m.MessageType()]++
	if w.lose != nil && w.lose(m, w.counts[m.MessageType()]) {
		return nil
	}
	for _, s := range w.servers {
		if d.to != broadcastMAC && d.to != s.mac {
			continue
		}
		if reply := s.receive(d, m); reply != nil {
			frame := s.frame(reply)
			var delay time.Duration
			if w.delay != nil {
				delay = w.delay(reply)
			}
			time.AfterFunc(delay, func() {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.transmit(answers, frame)
			})
		}
	}
	return nil
}

// transmit gives a frame to all who listen.
func (w *wire) transmit(t traffic, frame []byte) {
	for _, p := range w.ports {
		if p.t == t {
			select {
			case p.frames <- frame:
			default:
				panic("nobody reads a port of the wire")
			}
		}
	}
}

// server is a DHCP server that is strict about what RFC 2131 says that clients send.
type server struct {
	mac      MAC
	ip       netip.Addr
	next     netip.Addr // the next free address
	lifetime time.Duration
	silent   bool
	offers   bool                               // false: only knows old leases
	refuse   func(kind dhcpv4.MessageType) bool // nil: never
	edit     func(m *dhcpv4.DHCPv4)             // changes an answer

	leases map[MAC]netip.Addr
	seen   []seen
}

// seen is a message that a server has got.
type seen struct {
	at        time.Time
	kind      dhcpv4.MessageType
	ciaddr    netip.Addr
	requested netip.Addr
	named     netip.Addr // server
	unicast   bool       // in Ethernet
	source    netip.Addr
	broadcast bool // flag
}

func newServer(n byte) *server {
	return &server{
		mac:      MAC{2, 0, 0, 0, 0, n},
		ip:       netip.AddrFrom4([4]byte{198, 18, 0, n}),
		next:     netip.AddrFrom4([4]byte{198, 18, n, 100}),
		lifetime: time.Hour,
		offers:   true,
		leases:   map[MAC]netip.Addr{},
	}
}

// received lists what the server has got, by type.
func (w *wire) received(s *server, kind dhcpv4.MessageType) []seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.seen), func(m seen) bool { return m.kind != kind })
}

func (s *server) receive(d datagram, m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	v := seen{
		at: time.Now(), kind: m.MessageType(), ciaddr: oneAddress(m.ClientIPAddr), requested: oneAddress(m.RequestedIPAddress()),
		named: oneAddress(m.ServerIdentifier()), unicast: d.to != broadcastMAC, source: d.source, broadcast: m.IsBroadcast(),
	}
	s.seen = append(s.seen, v)
	if s.silent || d.to != broadcastMAC && d.target != s.ip {
		return nil
	}
	client := MAC(m.ClientHWAddr)
	had, known := s.leases[client]
	switch v.kind {
	case dhcpv4.MessageTypeDiscover:
		if !s.offers {
			return nil
		}
		if !known {
			had, s.next = s.next, s.next.Next()
			s.leases[client] = had
		}
		return s.answer(m, dhcpv4.MessageTypeOffer, had)
	case dhcpv4.MessageTypeRequest:
		asked := v.requested
		switch {
		case v.named.IsValid(): // SELECTING
			if v.ciaddr != noAddress || !v.requested.IsValid() || v.source != noAddress {
				return nil
			}
			if v.named != s.ip {
				delete(s.leases, client)
				return nil
			}
		case v.requested.IsValid(): // INIT-REBOOT
			if v.ciaddr != noAddress || v.unicast {
				return nil
			}
		default: // RENEWING, REBINDING
			asked = v.ciaddr
			if v.source != v.ciaddr {
				return nil
			}
		}
		switch {
		case s.refuse != nil && s.refuse(v.kind), known && asked != had:
			return s.answer(m, dhcpv4.MessageTypeNak, netip.IPv4Unspecified())
		case !known:
			return nil
		}
		return s.answer(m, dhcpv4.MessageTypeAck, had)
	case dhcpv4.MessageTypeRelease:
		if v.ciaddr == had && v.named == s.ip {
			delete(s.leases, client)
		}
	case dhcpv4.MessageTypeDecline:
		if v.requested == had && v.named == s.ip {
			delete(s.leases, client)
		}
	}
	return nil
}

func (s *server) answer(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, address netip.Addr) *dhcpv4.DHCPv4 {
	a := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: iana.HWTypeEthernet, TransactionID: m.TransactionID,
		ClientHWAddr: m.ClientHWAddr, YourIPAddr: address.AsSlice(), Flags: m.Flags, Options: dhcpv4.Options{},
	}
	a.UpdateOption(dhcpv4.OptMessageType(kind))
	a.UpdateOption(dhcpv4.OptServerIdentifier(s.ip.AsSlice()))
	if kind != dhcpv4.MessageTypeNak {
		a.UpdateOption(dhcpv4.OptIPAddressLeaseTime(s.lifetime))
		a.UpdateOption(dhcpv4.OptSubnetMask([]byte{255, 255, 0, 0}))
		a.UpdateOption(dhcpv4.OptRouter([]byte{198, 18, 0, 1}))
	} else {
		a.UpdateOption(dhcpv4.OptMessage("not yours"))
	}
	if s.edit != nil {
		s.edit(a)
	}
	return a
}

// frame is the answer on the wire. The LAN is a hub, so to whom does not matter.
func (s *server) frame(m *dhcpv4.DHCPv4) []byte {
	return datagram{
		from: s.mac, to: broadcastMAC, source: s.ip, target: everybody,
		sourcePort: serverPort, toPort: clientPort, payload: m.ToBytes(),
	}.frame()
}

// news is what a client reported.
type news struct {
	at    time.Time
	lease Lease
	Event
}

// host is a client on a wire, and what it reports.
type host struct {
	*Client
	*wire
	holders map[netip.Addr]MAC // on the host itself, on link
	mu      sync.Mutex
	news    []news
}

const link = "uplink0"

var container = MAC{0x02, 0x42, 0, 0, 0, 1}

// onWire runs a test in virtual time, with a client on a LAN of these servers.
func onWire(t *testing.T, test func(t *testing.T, h *host), servers ...*server) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &host{wire: newWire(servers...)}
		h.start(t)
		test(t, h)
	})
}

// start starts a client on the host, as after a restart when there was one.
func (h *host) start(t *testing.T) {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	h.Client = newClient(Config{Log: logrus.NewEntry(logger), Changed: func(l Lease, e Event) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.news = append(h.news, news{time.Now(), l, e})
	}, Holder: func(on string, a netip.Addr) MAC {
		if on != link {
			return MAC{}
		}
		return h.holders[a]
	}}, h.wire.open)
	c := h.Client
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

func (h *host) obtain(t *testing.T) Lease {
	t.Helper()
	lease, err := h.Obtain(t.Context(), Request{Link: link, MAC: container})
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func (h *host) keep(t *testing.T, l Lease) {
	t.Helper()
	if err := h.Keep(l); err != nil {
		t.Fatal(err)
	}
}

func (h *host) reported() []news {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.news)
}

// kinds are those of the reported events.
func (h *host) kinds() (kinds []Kind) {
	for _, n := range h.reported() {
		kinds = append(kinds, n.Kind)
	}
	return kinds
}

// change changes servers or the wire.
func (h *host) change(f func()) {
	h.wire.mu.Lock()
	defer h.wire.mu.Unlock()
	f()
}

// within fails the test unless something happened at a time after the start.
func within(t *testing.T, what string, got, least, most time.Duration) {
	t.Helper()
	if got < least || got > most {
		t.Errorf("%s after %s, want %s to %s", what, got, least, most)
	}
}

// pass lets virtual time pass, and all that is due then happen.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
