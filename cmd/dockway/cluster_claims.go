package main

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/ipam"
)

// Claim and what follows are ipam.Cluster.
func (c *cluster) Claim(ctx context.Context, subnet, block netip.Prefix) error {
	g := c.now()
	if g == nil {
		return errors.New("this host is not in the cluster yet, so nobody can be asked: try again")
	}
	err := g.Claim(ctx, subnet, block)
	if holder, taken := gossip.IsTaken(err); taken {
		return ipam.TakenError{Block: block, Host: hostName(holder)}
	}
	return err
}

func (c *cluster) Release(subnet, block netip.Prefix) {
	if g := c.now(); g != nil {
		g.Release(subnet, block)
	}
}

func (c *cluster) Taken(subnet netip.Prefix) []netip.Prefix { return c.held(subnet, false) }
func (c *cluster) Own(subnet netip.Prefix) []netip.Prefix   { return c.held(subnet, true) }

func (c *cluster) held(subnet netip.Prefix, own bool) []netip.Prefix {
	g := c.now()
	if g == nil {
		return nil
	}
	var out []netip.Prefix
	for _, f := range g.Blocks(subnet) {
		if (f.Owner == g.Self()) == own {
			out = append(out, f.Prefix)
		}
	}
	return out
}

// tendEvery is how often the address manager makes what it has on record agree with the cluster when it
// is not asked for anything: what failed is tried again then, such as while hosts could not be reached.
const tendEvery = time.Minute

// claimAhead has the address manager claim blocks before they are needed, until ctx ends.
func claimAhead(addresses *ipam.Manager, log *logrus.Entry) func(context.Context) error {
	return func(ctx context.Context) error {
		again := time.NewTicker(tendEvery)
		defer again.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-addresses.Due():
			case <-again.C:
			}
			if err := addresses.ClaimAhead(ctx); err != nil && ctx.Err() == nil {
				log.WithError(err).Info("addresses could not be claimed ahead; they are when they are needed")
			}
		}
	}
}
