package main

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/ipam"
	"github.com/dockway/dockway/ipam/dhcp"
)

// leases stands between the network service and the address manager, which do not know each other:
// the one knows on which LAN a network is and which MACs its containers have, the other leases their
// addresses there.
type leases struct {
	addresses atomic.Pointer[ipam.Manager]
	networks  atomic.Pointer[driver.Service]
	log       *logrus.Entry
}

func (l *leases) LeaseFrom(pool netip.Prefix, link string) (bool, error) {
	return l.addresses.Load().LeaseFrom(pool, link)
}

func (l *leases) Lease(ctx context.Context, pool netip.Prefix, a netip.Addr, mac plan.MAC) (plan.MAC, mode.Lease, error) {
	lease, err := l.addresses.Load().Lease(ctx, pool, a, dhcp.MAC(mac))
	if err != nil {
		return plan.MAC{}, mode.Lease{}, err
	}
	return plan.MAC(lease.MAC), told(lease), nil
}

func (l *leases) Granted(pool netip.Prefix, a netip.Addr) (netip.Addr, mode.Lease, error) {
	lease, err := l.addresses.Load().Granted(pool, a)
	return lease.Prefix.Addr(), told(lease), err
}

// told is what the DHCP server told with a lease.
func told(lease dhcp.Lease) mode.Lease {
	told := mode.Lease{Gateway: lease.Gateway, MTU: lease.MTU, DNS: lease.DNS, Search: lease.Search}
	if len(told.Search) == 0 && lease.Domain != "" {
		told.Search = []string{lease.Domain}
	}
	for _, r := range lease.Routes {
		told.Routes = append(told.Routes, mode.StaticRoute{Prefix: r.Prefix, Via: r.Via})
	}
	return told
}

func (l *leases) Share(space string, pool netip.Prefix) (bool, error) {
	if ipam.Space(space) != ipam.Local {
		return false, nil
	}
	return true, l.addresses.Load().Share(pool)
}

func (l *leases) Name(pool netip.Prefix, a netip.Addr) string {
	return l.addresses.Load().Name(pool, a)
}

// mac chooses a container's MAC for the address manager.
func (l *leases) mac(pool netip.Prefix, name string) (dhcp.MAC, error) {
	networks := l.networks.Load()
	if networks == nil {
		return dhcp.MAC{}, errors.New("dockway is starting: try again")
	}
	mac, err := networks.ChooseMAC(pool, name)
	return dhcp.MAC(mac), err
}

// holder is who of this host has an address on a link's LAN.
func (l *leases) holder(link string, a netip.Addr) dhcp.MAC {
	networks := l.networks.Load()
	if networks == nil {
		return dhcp.MAC{}
	}
	return dhcp.MAC(networks.OnLAN(context.Background(), link, a))
}

// changed records what became of a lease, and tells what a container cannot be told: its address is
// the engine's to set, and it sets it once.
func (l *leases) changed(lease dhcp.Lease, e dhcp.Event) {
	addresses := l.addresses.Load()
	if addresses == nil {
		return // the next renewal is told again
	}
	log := l.log.WithFields(logrus.Fields{"lease": lease.String(), "event": string(e.Kind)})
	if e.Err != nil {
		log = log.WithError(e.Err)
	}
	switch e.Kind {
	case dhcp.Renewed:
		log.Debug("lease renewed")
	case dhcp.Changed:
		if lease.Prefix == e.Previous.Prefix {
			log.Errorf("the DHCP server tells more or less about %s than before: the container keeps what it has until it is restarted", lease.Prefix)
			break
		}
		log.Errorf("the DHCP server gives %s in place of %s: the container keeps what it has until it is restarted", lease.Prefix, e.Previous.Prefix)
	default:
		log.Errorf("the DHCP server no longer grants %s: the container keeps it until it is stopped, and dockway goes on asking", lease.Prefix)
	}
	if e.Kind != dhcp.Renewed && e.Kind != dhcp.Changed {
		addresses.Refused(lease, e.Err)
		return
	}
	holder, held, err := addresses.Leased(lease)
	if err != nil {
		log.WithError(err).Error("lease not recorded")
	} else if held {
		log.WithField("holder", holder).Debug("lease recorded")
	}
}
