package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/ipam"
)

const (
	collectAfter = 2 * time.Minute
	collectEvery = time.Minute
)

// host is a network service and an address manager in one, at a moment that the test moves.
type host struct {
	now       time.Time
	networks  []driver.NetworkInfo
	endpoints []driver.EndpointInfo
	pools     []ipam.PoolInfo
	held      map[string][]ipam.Held // by pool; Age is left out
	given     map[claim]time.Time
	err       error
	released  []string
	deleted   []string
}

func (h *host) DeleteNetwork(_ context.Context, id string) error {
	if h.err != nil {
		return h.err
	}
	h.deleted = append(h.deleted, id)
	h.networks = slices.DeleteFunc(h.networks, func(n driver.NetworkInfo) bool { return n.ID == id })
	return nil
}

func (h *host) Networks() []driver.NetworkInfo   { return h.networks }
func (h *host) Endpoints() []driver.EndpointInfo { return h.endpoints }
func (h *host) Pools() []ipam.PoolInfo           { return h.pools }

func (h *host) Held(pool string) []ipam.Held {
	out := slices.Clone(h.held[pool])
	for i, a := range out {
		out[i].Age = h.now.Sub(h.given[claim{pool, a.Address}])
	}
	return out
}

func (h *host) ReleaseHeld(_ context.Context, a ipam.Held) error {
	if h.err != nil {
		return h.err
	}
	h.released = append(h.released, a.Address.String())
	h.held[a.PoolID] = slices.DeleteFunc(h.held[a.PoolID], func(b ipam.Held) bool { return b.Address == a.Address })
	return nil
}

func (h *host) give(pool, address string, kind ipam.Kind) {
	a := netip.MustParseAddr(address)
	h.held[pool] = append(h.held[pool], ipam.Held{PoolID: pool, Address: a, Kind: kind})
	h.given[claim{pool, a}] = h.now
}

func newHost() (*host, *collector) {
	h := &host{
		now:      time.Unix(1_000_000, 0),
		networks: []driver.NetworkInfo{{ID: "n", Subnets: []string{"10.64.0.0/24", "fd00::/64"}}},
		pools: []ipam.PoolInfo{
			{ID: "four", Space: ipam.Local, Subnet: netip.MustParsePrefix("10.64.0.0/24")},
			{ID: "six", Space: ipam.Local, Subnet: netip.MustParsePrefix("fd00::/64")},
			{ID: "other", Space: ipam.Local, Subnet: netip.MustParsePrefix("10.65.0.0/24")},
			{ID: "swarm", Space: ipam.Global, Subnet: netip.MustParsePrefix("10.64.0.0/24")},
		},
		held:  map[string][]ipam.Held{},
		given: map[claim]time.Time{},
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	return h, newCollector(h, h, collectAfter, logrus.NewEntry(log))
}

// minutes lets minutes pass, with a look after each, and gives what was released.
func (h *host) minutes(c *collector, n int) []string {
	h.released = nil
	for range n {
		h.now = h.now.Add(time.Minute)
		c.collect(context.Background(), h.now)
	}
	slices.Sort(h.released)
	return h.released
}

func TestCollectsWhatNobodyClaims(t *testing.T) {
	h, c := newHost()
	h.give("four", "10.64.0.1", ipam.Gateway)
	h.give("four", "10.64.0.2", ipam.Endpoint)
	h.give("four", "10.64.0.3", ipam.Endpoint)
	h.give("four", "10.64.0.4", ipam.Auxiliary)
	h.give("six", "fd00::2", ipam.Endpoint)
	h.give("six", "fd00::3", ipam.Endpoint)
	h.give("other", "10.65.0.2", ipam.Endpoint) // of another driver's network
	h.give("swarm", "10.64.0.9", ipam.Endpoint) // of the swarm's leader
	h.endpoints = []driver.EndpointInfo{{Address: "10.64.0.2/24", Address6: "fd00::2/64"}}
	if got := h.minutes(c, 2); got != nil {
		t.Errorf("released early: %q", got)
	}
	if got, want := h.minutes(c, 1), []string{"10.64.0.3", "fd00::3"}; !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
	if got := h.minutes(c, 10); got != nil {
		t.Errorf("released later: %q", got)
	}
}

// An endpoint that is gone leaves its address for the engine to release.
func TestCollectsAfterAnEndpointIsGone(t *testing.T) {
	h, c := newHost()
	h.give("four", "10.64.0.2", ipam.Endpoint)
	h.endpoints = []driver.EndpointInfo{{Address: "10.64.0.2/24"}}
	if got := h.minutes(c, 60); got != nil {
		t.Errorf("released with its endpoint there: %q", got)
	}
	h.endpoints = nil
	if got := h.minutes(c, 2); got != nil {
		t.Errorf("released before the engine could: %q", got)
	}
	if got := h.minutes(c, 1); len(got) != 1 {
		t.Errorf("not released: %q", got)
	}
}

// An address that was released and given again between two looks counts from then.
func TestCollectCountsFromTheLastHolder(t *testing.T) {
	h, c := newHost()
	h.give("four", "10.64.0.2", ipam.Endpoint)
	if got := h.minutes(c, 2); got != nil {
		t.Fatalf("released early: %q", got)
	}
	h.now = h.now.Add(30 * time.Second)
	h.given[claim{"four", netip.MustParseAddr("10.64.0.2")}] = h.now // to the next container
	if got := h.minutes(c, 2); got != nil {
		t.Errorf("taken from its next holder: %q", got)
	}
	if got := h.minutes(c, 1); len(got) != 1 {
		t.Errorf("not released: %q", got)
	}
}

// Two pools with one subnet: nobody can tell whose addresses they are.
func TestCollectLeavesWhatIsNotCertain(t *testing.T) {
	h, c := newHost()
	h.pools = append(h.pools, ipam.PoolInfo{ID: "twin", Space: ipam.Local, Subnet: netip.MustParsePrefix("10.64.0.0/24")})
	h.give("four", "10.64.0.2", ipam.Endpoint)
	h.give("twin", "10.64.0.3", ipam.Endpoint)
	if got := h.minutes(c, 10); got != nil {
		t.Errorf("released %q", got)
	}
}

func TestCollectTriesAgain(t *testing.T) {
	h, c := newHost()
	h.give("four", "10.64.0.2", ipam.Endpoint)
	h.err = errors.New("no space left on device")
	if got := h.minutes(c, 5); got != nil {
		t.Errorf("released %q", got)
	}
	h.err = nil
	if got := h.minutes(c, 1); len(got) != 1 {
		t.Errorf("not tried again: %q", got)
	}
}

func TestCollectForgetsWhatIsGone(t *testing.T) {
	h, c := newHost()
	for i := range 200 {
		h.give("four", fmt.Sprintf("10.64.0.%d", i+2), ipam.Endpoint)
	}
	h.minutes(c, 1)
	h.held = map[string][]ipam.Held{}
	h.minutes(c, 1)
	if len(c.unclaimed) != 0 {
		t.Errorf("%d addresses remembered", len(c.unclaimed))
	}
}

// TestCollectsNetworksThatNoEngineKnows: only those whose pools were dockway's and are released,
// and only after a while.
func TestCollectsNetworksThatNoEngineKnows(t *testing.T) {
	h, c := newHost()
	network := func(id, subnet, space string, endpoints int) driver.NetworkInfo {
		return driver.NetworkInfo{ID: id, Subnets: []string{subnet}, Spaces: []string{space}, Endpoints: endpoints}
	}
	local := string(ipam.Local)
	h.networks = []driver.NetworkInfo{
		network("lost", "10.1.0.0/24", local, 0),
		network("used", "10.2.0.0/24", local, 1),
		network("pooled", "10.3.0.0/24", local, 0),
		network("engine's", "10.4.0.0/24", "LocalDefault", 0),
	}
	h.pools = []ipam.PoolInfo{{ID: "p", Space: ipam.Local, Subnet: netip.MustParsePrefix("10.3.0.0/24")}}
	c.collectNetworks(t.Context(), h.now)
	if len(h.deleted) > 0 {
		t.Errorf("removed at once: %v", h.deleted)
	}
	h.err = errors.New("busy")
	c.collectNetworks(t.Context(), h.now.Add(collectAfter))
	h.err = nil
	c.collectNetworks(t.Context(), h.now.Add(collectAfter+collectEvery))
	if fmt.Sprint(h.deleted) != "[lost]" {
		t.Errorf("removed %v, want only the network whose pool is released", h.deleted)
	}
}
