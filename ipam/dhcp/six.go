package dhcp

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// routersTime is how long routers are waited for: half a second at most until they answer, and three since what they said
	// last to everybody (RFC 4861, 10).
	routersTime = 3500 * time.Millisecond
	// routersFresh is how long what a router has said counts for the next container.
	routersFresh = time.Minute
	// routersPause is how long to wait before routers are asked again.
	routersPause = time.Second
	// farewell6 is how long a server has to say that it has heard of a release. Without that the address is not free at once.
	farewell6 = 500 * time.Millisecond

	maxRouters, maxPrefixes = 16, 16
)

// six is DHCP for IPv6 (RFC 8415), and what of neighbour discovery it takes: servers look for the link-local address that they
// answer to, which nobody has before the container starts; and only routers tell which prefixes are on the link, and who leads
// elsewhere.
//
// The first server that offers an address is taken, as with IPv4, and not the one that its administrator prefers of those that
// do within a second: a container waits.
//
// Everything goes to all servers and relays, never to one server by its address: whether it may, a server says with an
// option that is deprecated, and nothing is won.
type six struct {
	mu      sync.Mutex
	routers []advertisement // the last of each router
	news    chan struct{}   // closed with the next
}

func newSix() *six { return &six{news: make(chan struct{})} }

func (*six) name() string { return " over IPv6" }

func (*six) answers() traffic { return answers6 }

func (*six) probes() traffic { return ndBoth }

func (*six) numbers() uint32 { return 1<<24 - 1 }

// listen tells switches that listen for it (MLD snooping) that who looks for the client is to be heard here. They forget it
// within minutes, and servers can be asked for hours. A frame that cannot be sent is one of many.
func (*six) listen(x *exchange) { _ = x.tell(joinGroup(x.client, solicitedNode(linkLocal(x.client)))) }

func (s *six) heard(l *lan, frame []byte, unsummed bool) {
	if len(frame) > ethernetHeader+6 && frame[ethernetHeader+6] == protocolICMP6 {
		if err := s.neighbour(l, frame); err != nil {
			l.log.WithError(err).Debug("a message of neighbour discovery is ignored")
		}
		return
	}
	d, err := readDatagram(frame, unsummed)
	if err != nil {
		l.log.WithError(err).Debug("a frame to the DHCPv6 client's port is ignored")
		return
	}
	id, ok := peekXID6(d.payload)
	if !ok || d.toPort != clientPort6 {
		return
	}
	x := l.exchange(id)
	if x == nil || d.target != linkLocal(x.client) {
		return // somebody else's
	}
	a, err := readAnswer6(d.from, d.source, d.payload, x.client)
	x.hear(received{a, d.from, err})
}

// neighbour takes note of what a router says, and answers who looks for the clients of exchanges.
func (s *six) neighbour(l *lan, frame []byte) error {
	p, err := readICMP6(frame)
	if err != nil {
		return err
	}
	if p.payload[0] == routerAdvertisement {
		a, err := readAdvertisement(p)
		if err == nil {
			a.at = time.Now()
			s.note(a)
		}
		return err
	}
	n, err := readNeighbour(p)
	if err != nil || n.kind != neighbourSolicitation || n.source == nobody6 { // who wants to take an address is not told that it is taken
		return err
	}
	for _, client := range l.clients() {
		if n.target == linkLocal(client) {
			return l.send(n.reply(client))
		}
	}
	return nil
}

func (s *six) note(a advertisement) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routers = slices.DeleteFunc(s.routers, func(o advertisement) bool { return o.router == a.router || a.at.Sub(o.at) > routersFresh })
	if len(s.routers) < maxRouters {
		s.routers = append(s.routers, a)
	}
	close(s.news)
	s.news = make(chan struct{})
}

// fresh is what routers have said lately, and what is closed when one says more.
func (s *six) fresh() ([]advertisement, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routers = slices.DeleteFunc(s.routers, func(o advertisement) bool { return time.Since(o.at) > routersFresh })
	return slices.Clone(s.routers), s.news
}

// complete waits for routers, for a while.
func (s *six) complete(ctx context.Context, x *exchange, l Lease) Lease {
	ctx, cancel := context.WithTimeout(ctx, routersTime)
	defer cancel()
	routers, news := s.fresh()
	for len(routers) == 0 && ctx.Err() == nil {
		_ = x.tell(solicitRouters(x.client))
		timer := time.NewTimer(routersPause)
		select {
		case <-news:
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		routers, news = s.fresh()
	}
	prefixes := []netip.Prefix{l.Subnet}
	for _, r := range routers {
		prefixes = append(prefixes, r.prefixes...)
		if !l.Gateway.IsValid() && r.leads {
			l.Gateway = r.router
		}
		if l.MTU == 0 {
			l.MTU = r.mtu
		}
	}
	for _, p := range prefixes {
		if p.Contains(l.Prefix.Addr()) {
			l.Prefix = netip.PrefixFrom(l.Prefix.Addr(), p.Bits())
			break
		}
	}
	return l
}

func (*six) farewell() time.Duration { return farewell6 }

func (*six) probe(l Lease) []byte { return probeNeighbour(l.MAC, l.Prefix.Addr()) }

func (*six) claimant(frame []byte, l Lease) MAC {
	p, err := readICMP6(frame)
	if err != nil {
		return MAC{}
	}
	if n, err := readNeighbour(p); err == nil && n.claims(l) {
		return n.from
	}
	return MAC{}
}
