package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	seedCheck  = 5 * time.Second  // how often a seed that is a member is looked at
	lookUp     = 5 * time.Second  // for the address of a seed
	reunion    = 10 * time.Second // how often a lost member is tried
	reunions   = 8                // about so many hosts of a cluster do it at a time
)

// joinSeed keeps a seed in the cluster: whenever it is no living member, it is tried again.
func (g *Gossip) joinSeed(ctx context.Context, seed string) {
	retry := firstRetry
	for ctx.Err() == nil {
		pause, err := g.trySeed(ctx, seed)
		switch {
		case err != nil:
			g.failed("seed "+seed, err)
			pause, retry = jitter(retry), min(2*retry, lastRetry)
		default:
			retry = firstRetry
		}
		if !wait(ctx, pause) {
			return
		}
	}
}

func (g *Gossip) trySeed(ctx context.Context, seed string) (pause time.Duration, err error) {
	host, port, err := splitSeed(seed, g.config.Port)
	if err != nil {
		return 0, err
	}
	var addrs []netip.Addr
	if addr, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{addr}
	} else {
		asking, cancel := context.WithTimeout(ctx, lookUp)
		addrs, err = net.DefaultResolver.LookupNetIP(asking, "ip", host)
		cancel()
		if ctx.Err() == nil {
			g.resolved(seed, err)
		}
		if err != nil {
			return 0, err
		}
	}
	self := 0
	for _, addr := range addrs {
		at := netip.AddrPortFrom(addr.Unmap(), port)
		if port == g.config.Port && (at.Addr() == g.config.Advertise || at.Addr() == g.config.Bind || at.Addr().IsLoopback() && !g.config.Advertise.IsLoopback()) {
			self++
			continue
		}
		var joined bool
		if joined, err = g.join(at); err == nil {
			pause = jitter(seedCheck)
			if !joined {
				pause = jitter(firstRetry) // it has to hear first that it is taken for dead
			}
		}
	}
	g.mu.Lock()
	g.alone[seed] = self > 0 && self == len(addrs)
	g.mu.Unlock()
	if pause > 0 {
		return pause, nil
	}
	return lastRetry, err
}

// resolved notes whether a seed has an address.
func (g *Gossip) resolved(seed string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil {
		delete(g.unresolved, seed)
		return
	}
	if g.unresolved[seed] == "" {
		g.log.Warnf("gossip: seed %s does not resolve: %v: it is tried again", seed, err)
	}
	g.unresolved[seed] = err.Error()
}

// join makes a host a member, unless it is one. False without an error says
// that they have talked, but that it is not known to be alive yet.
func (g *Gossip) join(at netip.AddrPort) (bool, error) {
	member := func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.at(at) != nil
	}
	if member() {
		return true, nil
	}
	if _, err := g.list.Join([]string{at.String()}); err != nil {
		return false, fmt.Errorf("join %s: %w", at, err)
	}
	return member(), nil
}

// rejoin tries members that were lost, a random one at a time: after a partition nobody else would,
// as memberlist does not talk to the dead. One success is enough for all of both sides to meet.
func (g *Gossip) rejoin(ctx context.Context) {
	pause := reunion
	for wait(ctx, jitter(pause)) {
		pause = reunion
		var lost []*peer
		g.mu.Lock()
		if rand.IntN(max(1, int(g.living.Load()))) < reunions {
			for _, p := range g.peers {
				if !p.alive && p.node.Name != "" {
					lost = append(lost, p)
				}
			}
		}
		var host facts.Host
		var at netip.AddrPort
		if len(lost) > 0 {
			p := lost[rand.IntN(len(lost))]
			host, at = facts.Host(p.node.Name), p.address()
		}
		g.mu.Unlock()
		if host == "" {
			continue
		}
		switch joined, err := g.join(at); {
		case err != nil:
			g.failed("host "+string(host), err)
		case !joined:
			pause = firstRetry
		}
	}
}

// jitter is d, more or less a quarter.
func jitter(d time.Duration) time.Duration {
	return d*3/4 + rand.N(d/2)
}
