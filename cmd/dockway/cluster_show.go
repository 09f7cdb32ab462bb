package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
)

// Peers and what follows are plugin.Cluster.
func (c *cluster) Peers() []driver.PeerInfo {
	g := c.now()
	if g == nil {
		return nil
	}
	var out []driver.PeerInfo
	for _, p := range g.Peers() {
		out = append(out, driver.PeerInfo{
			Name: p.Name, ID: string(p.Host), Address: p.Address, State: p.State, RTT: p.RTT, Facts: p.Facts, Version: p.Version, Self: p.Self,
		})
	}
	return out
}

func (c *cluster) Keys() []string {
	if g := c.now(); g != nil {
		return g.Keys()
	}
	return nil
}

func (c *cluster) ChangeKey(ctx context.Context, verb, key string) ([]driver.KeyReply, error) {
	g := c.now()
	if g == nil {
		return nil, errors.New("this dockway is in no cluster: set JOIN to the addresses of its hosts")
	}
	binary, err := parseKey(key)
	if err != nil {
		return nil, err
	}
	change, known := map[string]func(context.Context, []byte) []gossip.KeyResult{"add": g.KeyAdd, "use": g.KeyUse, "remove": g.KeyRemove}[verb]
	if !known {
		return nil, fmt.Errorf("keys cannot be changed by %q: use add, use or remove", verb)
	}
	var out []driver.KeyReply
	for _, r := range change(ctx, binary) {
		reply := driver.KeyReply{Host: hostName(r.Host)}
		if r.Err != nil {
			reply.Error = r.Err.Error()
		}
		out = append(out, reply)
	}
	return out, nil
}

// Warnings tell, for people, what is wrong in the cluster.
func (c *cluster) Warnings() []string {
	c.mu.Lock()
	g, problem := c.gossip, c.problem
	c.mu.Unlock()
	if problem != "" {
		return []string{"not in the cluster: " + problem}
	}
	if g == nil {
		return nil
	}
	status := g.Status()
	var out []string
	if !status.Synced && status.Alive < 2 {
		out = append(out, "no other host of the cluster has been reached yet: are those in JOIN running, and the gossip port open?")
	}
	if !status.Encrypted {
		out = append(out, "the cluster's gossip is not encrypted: set GOSSIP_KEY")
	}
	for _, seed := range slices.Sorted(maps.Keys(status.Unresolved)) {
		out = append(out, fmt.Sprintf("%s in JOIN does not resolve (%s): correct it, give the host's address, or let this host's DNS or /etc/hosts know it", seed, status.Unresolved[seed]))
	}
	for _, name := range status.Names {
		out = append(out, "several hosts of the cluster have one name, one of them "+name+": set NODE_NAME; if its record was copied from another host, remove that")
	}
	for _, conflict := range status.Conflicts {
		var hosts []string
		for _, f := range conflict.Facts {
			hosts = append(hosts, hostName(f.Owner))
		}
		out = append(out, fmt.Sprintf("%s is claimed by hosts %s: the first has it", conflict.Prefix, strings.Join(hosts, ", ")))
	}
	for _, reason := range slices.Sorted(maps.Keys(status.Refused)) {
		out = append(out, fmt.Sprintf("gossip refused %d times: %s", status.Refused[reason], reason))
	}
	return out
}

// hostName is the name that people gave a host.
func hostName(h facts.Host) string {
	name, _, _ := strings.Cut(string(h), "/")
	return name
}
