package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/ipam"
)

const (
	collectEvery = time.Minute
	collectAfter = 2 * time.Minute
)

// endpoints is what the collector asks of the network service.
type endpoints interface {
	Networks() []driver.NetworkInfo
	Endpoints() []driver.EndpointInfo
}

// held is what the collector asks of the address manager.
type held interface {
	Pools() []ipam.PoolInfo
	Held(poolID string) []ipam.Held
	// ReleaseHeld does nothing if the address was released since Held listed it.
	ReleaseHeld(context.Context, ipam.Held) error
}

// collector releases addresses that nobody will ever release: of an engine that was killed
// between asking for an address and making its endpoint, or that forgot an endpoint. It belongs
// to neither the network service nor the address manager, which do not know each other.
type collector struct {
	endpoints endpoints
	held      held
	log       *logrus.Entry
	unclaimed map[claim]time.Time // since when each address has had no endpoint
}

// claim is an address of a pool.
type claim struct {
	pool    string
	address netip.Addr
}

func newCollector(e endpoints, h held, log *logrus.Entry) *collector {
	return &collector{endpoints: e, held: h, log: log, unclaimed: map[claim]time.Time{}}
}

// run collects until ctx ends.
func (c *collector) run(ctx context.Context) error {
	ticker := time.NewTicker(collectEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			c.collect(ctx, now)
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
		if now.Sub(since) < collectAfter {
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
