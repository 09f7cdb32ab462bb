package ipam

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/dockway/dockway/ipam/dhcp"
)

// A pool can be leased: its addresses are then those that the DHCP server of a LAN gives, wherever they are, and not the
// pool's own. An engine asks for a pool before it makes the network, so it is only when the network is made that somebody
// can tell which LAN it is on.

// Leaser leases addresses from the DHCP server of a LAN. *dhcp.Client is one.
type Leaser interface {
	Obtain(context.Context, dhcp.Request) (dhcp.Lease, error)
	// Keep renews a lease until it is released.
	Keep(dhcp.Lease) error
	Release(context.Context, dhcp.Lease) error
}

// optionDHCP is the --ipam-opt with which a subnet that is given is leased from.
const optionDHCP = "dhcp"

// LeaseFrom has the addresses of a pool leased on a link's LAN, if the pool was requested without a subnet or for
// DHCP: it reports whether it was. Asked again, it takes the link named last.
func (m *Manager) LeaseFrom(subnet netip.Prefix, link string) (bool, error) {
	for _, p := range m.sorted() {
		p.mu.Lock()
		leased, err := m.leaseFrom(p, subnet, link)
		p.mu.Unlock()
		if leased || err != nil {
			return leased, err
		}
	}
	return false, nil
}

func (m *Manager) leaseFrom(p *pool, subnet netip.Prefix, link string) (bool, error) {
	if p.gone || p.space != Local || p.subnet != subnet.Masked() || !p.open || m.leaser == nil {
		return false, nil
	}
	before := p.lan
	p.lan = link
	if before == link {
		return true, nil
	}
	if err := m.store.Apply(p.change(p.next)); err != nil {
		p.lan = before
		return false, fmt.Errorf("leasing the addresses of pool %s on %s: %w", p.id(), link, err)
	}
	return true, nil
}

// Lease gives the lease of an address that was requested from a leased pool, for a container with this MAC; the zero one
// leaves the choice to the address manager. An address that was given by the user is leased only now, and one that was leased for
// another MAC is leased anew.
func (m *Manager) Lease(ctx context.Context, subnet netip.Prefix, a netip.Addr, mac dhcp.MAC) (dhcp.Lease, error) {
	p, held, err := m.leased(subnet, a)
	if err != nil {
		return dhcp.Lease{}, err
	}
	switch {
	case held.Lease != nil && (mac == dhcp.MAC{} || mac == held.Lease.MAC):
		return *held.Lease, nil
	case mac == dhcp.MAC{}:
		if mac, err = m.client(p, held.Name); err != nil {
			return dhcp.Lease{}, err
		}
	}
	if held.Lease != nil {
		if err := m.leaser.Release(ctx, *held.Lease); err != nil {
			return dhcp.Lease{}, fmt.Errorf("giving back the lease of %s: %w", a, err)
		}
	}
	lease, err := m.leaser.Obtain(ctx, p.leaseRequest(mac, held.Name, a))
	if err != nil {
		return dhcp.Lease{}, fmt.Errorf("leasing %s for %s: %w", a, mac, err)
	}
	if err := m.hold(p, a, held, lease); err != nil {
		return dhcp.Lease{}, m.giveBack(ctx, lease, err)
	}
	return lease, nil
}

// hold records the lease of an address that is held, and has it kept.
func (m *Manager) hold(p *pool, a netip.Addr, held *grant, lease dhcp.Lease) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone || p.grants[a] != held {
		return fmt.Errorf("address %s was released meanwhile", a)
	}
	record := held.addressRecord
	record.Lease = &lease
	if err := m.store.Apply(p.addressChange(a, record)); err != nil {
		return fmt.Errorf("leasing %s: %w", a, err)
	}
	held.addressRecord = record
	return m.leaser.Keep(lease)
}

// Name is of the container that holds an address of the subnet, if the engine told it.
func (m *Manager) Name(subnet netip.Prefix, a netip.Addr) string {
	for _, p := range m.sorted() {
		p.mu.Lock()
		g := p.grants[a]
		found := !p.gone && p.subnet == subnet.Masked() && g != nil && g.freed == nil
		p.mu.Unlock()
		if found {
			return g.Name
		}
	}
	return ""
}

// leased finds an address of a leased pool that is held.
func (m *Manager) leased(subnet netip.Prefix, a netip.Addr) (*pool, *grant, error) {
	for _, p := range m.sorted() {
		p.mu.Lock()
		g := p.grants[a]
		found := !p.gone && p.lan != "" && p.subnet == subnet.Masked() && g != nil && g.freed == nil
		p.mu.Unlock()
		if found {
			return p, g, nil
		}
	}
	return nil, nil, fmt.Errorf("address %s of subnet %s is not one that dockway's address manager has leased or was asked to lease", a, subnet)
}

// requestLease gives a container an address of the LAN.
func (m *Manager) requestLease(ctx context.Context, p *pool, record addressRecord, mac string) (netip.Prefix, error) {
	var client dhcp.MAC
	var err error
	if mac != "" {
		err = client.UnmarshalText([]byte(mac))
	} else {
		client, err = m.client(p, record.Name)
	}
	if err != nil {
		return netip.Prefix{}, err
	}
	lease, err := m.leaser.Obtain(ctx, p.leaseRequest(client, record.Name, netip.Addr{}))
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("leasing an address on %s: %w", p.lan, err)
	}
	switch same, err := m.giveLeased(p, record, lease); {
	case same:
		return netip.Prefix{}, err
	case err != nil:
		return netip.Prefix{}, m.giveBack(ctx, lease, err)
	}
	return lease.Prefix, nil
}

// giveLeased gives the address of a lease, which is then kept. It cannot if that is held already, and then reports whether it is by the same client:
// who gave the lease back would take it from that.
func (m *Manager) giveLeased(p *pool, record addressRecord, lease dhcp.Lease) (same bool, err error) {
	a := lease.Prefix.Addr()
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.grants[a]
	switch {
	case p.gone:
		err = fmt.Errorf("%w %q: it was released meanwhile", unknownPool, p.id())
	case g != nil && g.freed == nil:
		same = g.Lease != nil && g.Lease.MAC == lease.MAC
		err = fmt.Errorf("the DHCP server gave %s, which is %w: it is %s", a, taken, g.holder())
	default:
		record.Lease = &lease
		err = m.store.Apply(p.addressChange(a, record))
	}
	if err != nil {
		return same, fmt.Errorf("giving address %s of pool %s: %w", a, p.id(), err)
	}
	p.give(a, record)
	return false, m.leaser.Keep(lease)
}

// client chooses the MAC of a container that is to lease an address. One that is known by its name, and has leased only an
// address of the other family on this LAN, is the same client there.
func (m *Manager) client(p *pool, name string) (dhcp.MAC, error) {
	var known []dhcp.MAC
	taken := map[dhcp.MAC]bool{}
	for _, o := range m.sorted() {
		o.mu.Lock()
		for _, g := range o.grants {
			switch {
			case g.Lease == nil || g.Lease.Link != p.lan:
			case g.Lease.IPv6 == p.subnet.Addr().Is6():
				taken[g.Lease.MAC] = true
			case name != "" && g.Name == name:
				known = append(known, g.Lease.MAC)
			}
		}
		o.mu.Unlock()
	}
	for _, mac := range known {
		if !taken[mac] {
			return mac, nil
		}
	}
	return m.mac(p.subnet, name)
}

// leaseRequest asks for an address on the pool's LAN; an invalid one is any.
func (p *pool) leaseRequest(mac dhcp.MAC, name string, a netip.Addr) dhcp.Request {
	r := dhcp.Request{Link: p.lan, MAC: mac, Hostname: name, Address: a}
	if p.subnet.Addr().Is6() {
		r.IPv6, r.Subnet = true, p.subnet
	}
	return r
}

// giveBack gives up a lease that cannot be used, because of err. A lease that cannot be given back ends by itself. No pool may
// be locked: it waits for the DHCP server, and for what is told of the lease (Leased).
func (m *Manager) giveBack(ctx context.Context, lease dhcp.Lease, err error) error {
	_ = m.leaser.Release(context.WithoutCancel(ctx), lease)
	return err
}

// Leased takes note of what became of a lease. It returns what holds the address, for people, and false when nobody does.
func (m *Manager) Leased(lease dhcp.Lease) (holder string, held bool, err error) {
	held = m.holding(lease, func(p *pool, a netip.Addr, g *grant) {
		holder = g.holder()
		record := g.addressRecord
		record.Lease = &lease
		if err = m.store.Apply(p.addressChange(a, record)); err != nil {
			err = fmt.Errorf("recording the lease of %s: %w", a, err)
			return
		}
		g.addressRecord, g.refused = record, nil
	})
	return holder, held, err
}

// Refused takes note that a lease is no longer granted, and why.
func (m *Manager) Refused(lease dhcp.Lease, why error) {
	m.holding(lease, func(_ *pool, _ netip.Addr, g *grant) { g.refused = why })
}

// Granted gives the lease of an address as the DHCP server grants it now: it can be of another address. The error says why the
// server grants none.
func (m *Manager) Granted(subnet netip.Prefix, a netip.Addr) (dhcp.Lease, error) {
	p, g, err := m.leased(subnet, a)
	if err != nil {
		return dhcp.Lease{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case g.refused != nil:
		return dhcp.Lease{}, fmt.Errorf("the DHCP server no longer grants %s: %w", g.Lease.Prefix.Addr(), g.refused)
	case g.Lease == nil:
		return dhcp.Lease{}, fmt.Errorf("address %s is not leased yet", a)
	}
	return *g.Lease, nil
}

// holding shows the address that a lease is recorded for, which nobody else changes meanwhile. It reports whether there is one.
func (m *Manager) holding(lease dhcp.Lease, show func(*pool, netip.Addr, *grant)) bool {
	for _, p := range m.sorted() {
		p.mu.Lock()
		for a, g := range p.grants {
			if g.Lease != nil && g.Lease.MAC == lease.MAC && g.Lease.IPv6 == lease.IPv6 && p.lan == lease.Link {
				show(p, a, g)
				p.mu.Unlock()
				return true
			}
		}
		p.mu.Unlock()
	}
	return false
}

// keep takes the leases on record over.
func (m *Manager) keep() error {
	for _, p := range m.pools {
		for a, g := range p.grants {
			if g.Lease == nil || m.leaser == nil {
				continue
			}
			if err := m.leaser.Keep(*g.Lease); err != nil {
				return fmt.Errorf("the lease of %s: %w", a, err)
			}
		}
	}
	return nil
}
