package main

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/store"
	"github.com/dockway/dockway/ipam"
)

// claimant is a host that gives addresses of a subnet which it shares.
type claimant struct {
	t         *testing.T
	cluster   *cluster
	addresses *ipam.Manager
	subnet    netip.Prefix
	pool      string
}

// take gives a container an address.
func (c *claimant) take() netip.Addr {
	c.t.Helper()
	got, err := c.addresses.RequestAddress(c.t.Context(), ipam.AddressRequest{PoolID: c.pool, Endpoint: true})
	if err != nil {
		c.t.Fatal(err)
	}
	return got.Addr()
}

func (c *claimant) await(what string, holds func() bool) {
	c.t.Helper()
	shown(c.t, 20*time.Second, "yes", func() string {
		if holds() {
			return "yes"
		}
		return what
	})
}

// TestBlockOfTwo: two hosts that have claimed one block without each other agree whose it is when they meet. The other one
// gives it up, and has no more of it than what its containers have, which the first does not give then.
func TestBlockOfTwo(t *testing.T) {
	subnet, port := netip.MustParsePrefix("10.90.0.0/16"), freePort(t)
	// begin runs a host until its end; with another as a seed, if it has been run before.
	begin := func(name, at, join string, record *store.Store) (c *claimant, end func()) {
		settings, err := clusterConfig{name: name, advertise: at, join: join, gossipPort: port, vxlanPort: "14789"}.settings()
		if err != nil {
			t.Fatal(err)
		}
		cl, err := newCluster(settings, record, name, quiet())
		if err != nil {
			t.Fatal(err)
		}
		c = &claimant{t: t, cluster: cl, subnet: subnet}
		if c.addresses, err = ipam.New(record, nil, ipam.Config{Seed: "the same place", Cluster: cl}); err != nil {
			t.Fatal(err)
		}
		cl.busy, cl.blocks = c.addresses.Busy, c.addresses.Blocks
		cl.Restated()
		ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
		ended := make(chan error, 1)
		go func() { ended <- cl.run(ctx) }()
		c.await("it has not begun", func() bool { return cl.now() != nil })
		if pools := c.addresses.Pools(); len(pools) > 0 {
			c.pool = pools[0].ID
		} else {
			info, err := c.addresses.RequestPool(t.Context(), ipam.PoolRequest{Space: string(ipam.Local), Pool: subnet.String()})
			if err != nil {
				t.Fatal(err)
			}
			if c.pool = info.ID; c.addresses.Share(subnet) != nil {
				t.Fatal("the subnet is not shared")
			}
		}
		return c, func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}
	open := func() *store.Store {
		record, err := store.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = record.Close() })
		return record
	}

	one, end := begin("one", "127.86.2.1", "", open())
	defer end()
	record := open()
	two, end := begin("two", "127.86.2.2", "", record)
	both := one.take()
	if got := two.take(); got != both {
		t.Fatalf("apart, one gives %s and two %s", both, got)
	}
	alone := two.take()
	block := one.cluster.Own(subnet)[0]
	end()

	two, end = begin("two", "127.86.2.2", "127.86.2.1", record)
	defer end()
	for _, c := range []*claimant{one, two} {
		c.await("it does not know of the other's block", func() bool { return slices.Contains(c.cluster.Taken(subnet), block) })
	}
	if err := one.addresses.ClaimAhead(t.Context()); err != nil {
		t.Error(err)
	}
	err := two.addresses.ClaimAhead(t.Context())
	for _, want := range []string{"block " + block.String() + " of subnet 10.90.0.0/16 is no longer this host's", "claiming " + both.String() + "/32 of subnet 10.90.0.0/16: ", "held by host one"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("two tells %v, want %q", err, want)
		}
	}
	if held := two.addresses.Blocks()[subnet]; slices.Contains(held, block) || len(held) != 2 {
		t.Errorf("on record two has %v", held)
	}
	one.await("two has not released the block", func() bool { return !slices.Contains(one.cluster.Taken(subnet), block) })
	if got := two.cluster.Own(subnet); !slices.Equal(got, []netip.Prefix{netip.PrefixFrom(alone, 32)}) {
		t.Errorf("in the cluster two has %v, want %s", got, alone)
	}
	for range 3 {
		if got := one.take(); got == alone || !block.Contains(got) {
			t.Errorf("one gives %s of its block %s; two has %s", got, block, alone)
		}
	}
	if got := two.take(); block.Contains(got) {
		t.Errorf("two gives %s, of the block that is one's", got)
	}
}
