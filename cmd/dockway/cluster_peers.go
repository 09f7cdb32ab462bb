package main

import (
	"net/netip"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// Self and what follows are driver.Peers.
func (c *cluster) Self() (netip.Addr, uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.settings.on {
		return netip.Addr{}, 0
	}
	return c.self, c.settings.vxlan
}

func (c *cluster) State(list ...mode.Statement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range list {
		s := gossip.Statement{Key: gossip.EndpointKey(st.VSID, st.Address), MAC: st.MAC}
		c.stated[s.Key] = s
		if c.gossip != nil {
			c.gossip.Set(s)
		}
	}
}

func (c *cluster) Withdraw(list ...mode.Statement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range list {
		key := gossip.EndpointKey(st.VSID, st.Address)
		delete(c.stated, key)
		if c.gossip != nil {
			c.gossip.Delete(key)
		}
	}
}

func (c *cluster) Restated() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restated = true
	if c.gossip != nil {
		c.gossip.Seal()
	}
}

func (c *cluster) Remotes(vsid uint32) []mode.Remote {
	g := c.now()
	if g == nil {
		return nil
	}
	return remotes(vsid, g.Remotes(vsid)...)
}

func (c *cluster) Remote(vsid uint32, a netip.Addr) (mode.Remote, bool) {
	g := c.now()
	if g == nil {
		return mode.Remote{}, false
	}
	r, ok := g.Lookup(vsid, a)
	if !ok {
		return mode.Remote{}, false
	}
	return remotes(vsid, r)[0], true
}

func (c *cluster) OfMAC(vsid uint32, mac plan.MAC) []mode.Remote {
	g := c.now()
	if g == nil {
		return nil
	}
	return remotes(vsid, g.ByMAC(vsid, mac)...)
}

func remotes(vsid uint32, list ...gossip.Remote) []mode.Remote {
	var out []mode.Remote
	for _, r := range list {
		out = append(out, mode.Remote{VSID: vsid, Address: r.Address, MAC: r.MAC, VTEP: r.VTEP, Host: r.HostName})
	}
	return out
}

func (c *cluster) VTEPs() []netip.Addr {
	if g := c.now(); g != nil {
		return g.VTEPs()
	}
	return nil
}

// Synced is true without a cluster: there is nobody to know more.
func (c *cluster) Synced() bool {
	if g := c.now(); g != nil {
		return g.Synced()
	}
	return !c.settings.on
}

func (c *cluster) Changed() <-chan struct{} { return c.changed }

func (c *cluster) Take() driver.PeerChanges {
	g := c.now()
	if g == nil {
		return driver.PeerChanges{}
	}
	c.mu.Lock()
	begun := c.begun
	c.begun = false
	c.mu.Unlock()
	told := g.Take()
	out := driver.PeerChanges{All: begun || told.All || told.Peers}
	for _, t := range told.Endpoints {
		change := driver.EndpointChange{VSID: t.VSID}
		for f, r := range map[facts.Fact]*mode.Remote{t.Before: &change.Before, t.After: &change.After} {
			if f.Owner != "" && f.Owner != g.Self() {
				*r = mode.Remote{VSID: t.VSID, Address: f.Prefix.Addr(), MAC: f.MAC}
			}
		}
		if change.Before != change.After {
			out.Endpoints = append(out.Endpoints, change)
		}
	}
	return out
}
