package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/ipam"
)

// minCollect is the shortest time after which something is collected: longer than an engine ever
// takes between two calls of one operation.
const minCollect = time.Second

// endpoints is what the collector asks of the network service.
type endpoints interface {
	Networks() []driver.NetworkInfo
	Endpoints() []driver.EndpointInfo
	DeleteNetwork(ctx context.Context, id string) error
}

// held is what the collector asks of the address manager.
type held interface {
	Pools() []ipam.PoolInfo
	Held(poolID string) []ipam.Held
	// ReleaseHeld does nothing if the address was released since Held listed it.
	ReleaseHeld(context.Context, ipam.Held) error
}

// collector releases addresses, and removes networks, that nobody will ever come back for: of an
// engine that was killed between two calls, or that did not get its answer. It belongs to neither
// the network service nor the address manager, which do not know each other.
type collector struct {
	endpoints endpoints
	held      held
	after     time.Duration
	log       *logrus.Entry
	unclaimed map[claim]time.Time  // since when each address has had no endpoint
	poolless  map[string]time.Time // since when each network has had no pool
}

// claim is an address of a pool.
type claim struct {
	pool    string
	address netip.Addr
}

func newCollector(e endpoints, h held, after time.Duration, log *logrus.Entry) *collector {
	return &collector{endpoints: e, held: h, after: after, log: log, unclaimed: map[claim]time.Time{}, poolless: map[string]time.Time{}}
}

// run collects until ctx ends.
func (c *collector) run(ctx context.Context) error {
	ticker := time.NewTicker(c.after / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			c.collect(ctx, now)
			c.collectNetworks(ctx, now)
		}
	}
}

// collect releases the addresses that have had no endpoint for long enough.
func (c *collector) collect(ctx context.Context, now time.Time) {
	unclaimed := map[claim]time.Time{}
	for _, h := range c.candidates() {
		k := claim{h.PoolID, h.Address}
		since, known := c.unclaimed[k]
		if !known || h.Age < now.Sub(since) { // given anew meanwhile
			since = now
		}
		if now.Sub(since) < c.after {
			unclaimed[k] = since
			continue
		}
		log := c.log.WithFields(logrus.Fields{"pool": h.PoolID, "address": h.Address, "container": h.Name})
		if err := c.held.ReleaseHeld(ctx, h); err != nil {
			log.WithError(err).Warn("address without an endpoint not released")
			unclaimed[k] = since
			continue
		}
		log.Info("address without an endpoint released")
	}
	c.unclaimed = unclaimed
}

// collectNetworks removes the networks that no engine knows: they have no endpoints, and their pools,
// which were this address manager's, are released. An engine that does not get the answer to
// CreateNetwork releases the pools, and never asks for the network to be deleted.
func (c *collector) collectNetworks(ctx context.Context, now time.Time) {
	// The networks are listed before the pools: a pool is there before its network.
	networks := c.endpoints.Networks()
	pooled := map[string]bool{}
	for _, p := range c.held.Pools() {
		pooled[p.Subnet.String()] = true
	}
	poolless := map[string]time.Time{}
	for _, n := range networks {
		orphan := n.Endpoints == 0
		for i, subnet := range n.Subnets {
			orphan = orphan && n.Spaces[i] == string(ipam.Local) && !pooled[subnet]
		}
		if !orphan {
			continue
		}
		since, known := c.poolless[n.ID]
		if !known {
			since = now
		}
		if now.Sub(since) < c.after {
			poolless[n.ID] = since
			continue
		}
		log := c.log.WithField("network", brief(n.ID))
		if err := c.endpoints.DeleteNetwork(ctx, n.ID); err != nil {
			log.WithError(err).Warn("network that no engine knows not removed")
			poolless[n.ID] = since
			continue
		}
		log.Info("network collected: its address pools are released, so no engine knows it")
	}
	c.poolless = poolless
}

// candidates are the endpoint addresses, of pools that dockway's networks use, without endpoint.
func (c *collector) candidates() []ipam.Held {
	pools := map[netip.Prefix][]string{} // by subnet
	for _, p := range c.held.Pools() {
		if p.Space == ipam.Local {
			pools[p.Subnet] = append(pools[p.Subnet], p.ID)
		}
	}
	// The addresses are listed before the endpoints: one that gets its endpoint meanwhile is in both.
	var all []ipam.Held
	for _, n := range c.endpoints.Networks() {
		for _, s := range n.Subnets {
			subnet, err := netip.ParsePrefix(s)
			// Of two pools with one subnet nobody can tell which is the network's.
			if ids := pools[subnet]; err == nil && len(ids) == 1 {
				all = append(all, c.held.Held(ids[0])...)
			}
		}
	}
	claimed := map[netip.Addr]bool{}
	for _, e := range c.endpoints.Endpoints() {
		for _, s := range []string{e.Address, e.Address6} {
			if p, err := netip.ParsePrefix(s); err == nil {
				claimed[p.Addr()] = true
			}
		}
	}
	var out []ipam.Held
	for _, h := range all {
		if h.Kind == ipam.Endpoint && !claimed[h.Address] {
			out = append(out, h)
		}
	}
	return out
}
