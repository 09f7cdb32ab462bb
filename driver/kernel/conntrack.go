package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// A publication is an entry of a DNAT map that has come or gone. Connections that are tracked
// from before would go on to where it led, or to where the packets went without it: of UDP, which
// has no end, for as long as somebody sends.
type publication struct {
	protocol byte
	host     netip.Addr // invalid: every address of this host
	port     uint16
	target   netip.AddrPort
	gone     bool
}

// publications are those whose connections are to be forgotten.
type publications struct {
	sync.Mutex
	list []publication
}

// published reports what an operation on an element changed about published ports.
func published(op elementOp) []publication {
	s := op.set
	if len(s.Data) != 2 || s.Data[1] != nft.Service {
		return nil
	}
	p := publication{target: target(op.data)}
	key := op.key
	for i, part := range s.Key {
		size := s.key[i].size()
		switch part {
		case nft.IPv4, nft.IPv6:
			p.host, _ = netip.AddrFromSlice(key[:size])
		case nft.Protocol:
			p.protocol = key[0]
		case nft.Service:
			p.port = uint16(value(key[:size], false))
		}
		key = key[min(aligned(size), len(key)):]
	}
	if op.Verb != plan.Add {
		was := p
		was.gone = true
		if old, ok := op.Old.(plan.Element); ok {
			if e, err := s.element(old.Elem, old.Data); err == nil {
				was.target = target(e.data)
			}
		}
		if op.Verb == plan.Delete {
			return []publication{was}
		}
		return []publication{was, p}
	}
	if p.protocol != unix.IPPROTO_UDP {
		return nil
	}
	return []publication{p}
}

// target is the value of a DNAT map: address and port.
func target(data []byte) netip.AddrPort {
	n := len(data) - 4
	if n <= 0 {
		return netip.AddrPort{}
	}
	a, _ := netip.AddrFromSlice(data[:n])
	return netip.AddrPortFrom(a, uint16(value(data[n:n+2], false)))
}

// matches reports whether a connection is to be forgotten.
func (p publication) matches(f *netlink.ConntrackFlow, local map[netip.Addr]bool) bool {
	to, _ := netip.AddrFromSlice(f.Forward.DstIP)
	to = to.Unmap()
	from, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
	led := netip.AddrPortFrom(from.Unmap(), f.Reverse.SrcPort)
	switch {
	case f.Forward.Protocol != p.protocol || f.Forward.DstPort != p.port || p.host.IsValid() && to != p.host:
		return false
	case p.gone:
		return led == p.target
	}
	return led != p.target && (p.host.IsValid() || local[to])
}

// forget has connections forgotten in the background.
func (k *Kernel) forget(ops []elementOp) {
	var list []publication
	for _, op := range ops {
		list = append(list, published(op)...)
	}
	if len(list) == 0 {
		return
	}
	k.stale.Lock()
	k.stale.list = append(k.stale.list, list...)
	k.stale.Unlock()
	k.forgetter.wake()
}

// forgetFlows deletes the tracked connections of ports that are no longer published as they were.
func (k *Kernel) forgetFlows(context.Context) error {
	k.stale.Lock()
	list := k.stale.list
	k.stale.list = nil
	k.stale.Unlock()
	if len(list) == 0 {
		return nil
	}
	filter := &staleFlows{byPort: map[uint16][]publication{}, local: map[netip.Addr]bool{}}
	families := map[netlink.InetFamily]bool{}
	for _, p := range list {
		filter.byPort[p.port] = append(filter.byPort[p.port], p)
		families[familyOf(p.target.Addr())] = true
	}
	addresses, err := k.handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			filter.local[ip.Unmap()] = true
		}
	}
	for family := range families {
		_, err := k.handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

func familyOf(a netip.Addr) netlink.InetFamily {
	if a.Is4() {
		return netlink.InetFamily(netlink.FAMILY_V4)
	}
	return netlink.InetFamily(netlink.FAMILY_V6)
}

// staleFlows is a filter for ConntrackDeleteFilters.
type staleFlows struct {
	byPort map[uint16][]publication
	local  map[netip.Addr]bool
}

func (s *staleFlows) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	for _, p := range s.byPort[f.Forward.DstPort] {
		if p.matches(f, s.local) {
			return true
		}
	}
	return false
}
