package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var errDead = errors.New("killed")

// mortal is a host's store and cluster until it is killed, at a given step: of each change there is a moment before and one
// after it. What a dead one does has no effect.
type mortal struct {
	*memory
	*guest
	steps int
}

// step runs an operation unless the host is dead before it, and reports an error if it is dead after it.
func (m *mortal) step(op func() error) error {
	if m.steps <= 0 {
		return errDead
	}
	m.steps--
	if err := op(); err != nil {
		return err
	}
	if m.steps--; m.steps < 0 {
		return errDead
	}
	return nil
}

func (m *mortal) Apply(changes ...Change) error {
	return m.step(func() error { return m.memory.Apply(changes...) })
}

func (m *mortal) Claim(ctx context.Context, subnet, block netip.Prefix) error {
	return m.step(func() error { return m.guest.Claim(ctx, subnet, block) })
}

func (m *mortal) Release(subnet, block netip.Prefix) {
	_ = m.step(func() error {
		m.guest.Release(subnet, block)
		return nil
	})
}

// A host is killed at every step of its life. Whatever it has given stays its own, nothing else stays claimed, and nobody
// gets an address that it holds; be it that the cluster remembers what was claimed, or only what is stated again.
func TestSharedKilled(t *testing.T) {
	subnet := netip.MustParsePrefix("10.90.0.0/27") // 16 blocks of 2
	finished := 0
	for kill := 1; finished < 2; kill++ {
		if kill > 500 {
			t.Fatal("the life of a host never ends")
		}
		for _, remembers := range []bool{true, false} {
			c := newParty()
			a, b := c.host(t, "a"), c.host(t, "b")
			other := b.network(t, subnet.String(), "")
			b.mustEndpoint(t, other, "")
			m := &mortal{a.store, a.guest, kill}
			a.Manager = mustNew(t, m, Config{Seed: "a", Cluster: m})
			a.guest.busy = a.Manager.Busy
			given, releasing, err := life(a, subnet)
			if err == nil {
				finished++
			} else if !errors.Is(err, errDead) {
				t.Fatalf("killed at %d: %v", kill, err)
			}

			a.start(t)
			if !remembers {
				a.restarted(a.Manager)
				c.tell()
			}
			if len(a.sharing()) == 0 {
				a.network(t, subnet.String(), "") // what is left of one before is found then
			}
			if err := a.ClaimAhead(t.Context()); err != nil {
				t.Fatalf("killed at %d: %v", kill, err)
			}
			own, has := a.Own(subnet), a.Blocks()[subnet]
			slices.SortFunc(own, netip.Prefix.Compare)
			if !slices.Equal(own, has) {
				t.Errorf("killed at %d: the cluster has %v, the record %v", kill, own, has)
			}
			for address := range given {
				if address == releasing {
					continue
				}
				if !a.Busy(subnet, single(address)) || !union(has).contains(address) {
					t.Errorf("killed at %d: %s was given; own are %v", kill, address, has)
				}
				if _, err := b.endpoint(other, address.String(), ""); !IsTaken(err) {
					t.Errorf("killed at %d: %s, held by host a: %v", kill, address, err)
				}
			}
			for err == nil {
				_, err = b.endpoint(other, "", "")
			}
			never(t, a, b)
		}
	}
}

// life is what happens to a host: what it has given at the end, or when it was killed, and what it was releasing then.
func life(h *host, subnet netip.Prefix) (given map[netip.Addr]bool, releasing netip.Addr, err error) {
	given = make(map[netip.Addr]bool)
	ctx := context.Background()
	r, err := h.RequestPool(ctx, PoolRequest{Space: string(Local), Pool: subnet.String()})
	if err != nil {
		return given, releasing, err
	}
	if _, err := h.RequestAddress(ctx, gatewayOf(r.ID, "10.90.0.1")); err != nil {
		return given, releasing, err
	}
	if err := h.Share(subnet); err != nil {
		return given, releasing, err
	}
	for round := range 2 {
		for _, address := range []string{"", "10.90.0.9", "", "10.90.0.20", ""} {
			a, err := h.endpoint(r.ID, address, "")
			if err != nil {
				return given, releasing, err
			}
			given[a] = true
			if err := h.ClaimAhead(ctx); err != nil {
				return given, releasing, err
			}
		}
		for _, a := range []string{"10.90.0.9", "10.90.0.20"} {
			releasing = netip.MustParseAddr(a)
			if err := h.ReleaseAddress(ctx, r.ID, a); err != nil {
				return given, releasing, err
			}
			delete(given, releasing)
		}
		if round == 0 {
			continue
		}
		all := given
		given = make(map[netip.Addr]bool) // they may or may not be held now
		if err := h.ReleasePool(ctx, r.ID); err != nil {
			return given, releasing, err
		}
		if left := h.Blocks(); len(left) > 0 {
			return all, releasing, fmt.Errorf("after the release %v is left", left)
		}
	}
	return given, releasing, nil
}

// Random histories of some hosts: no address is ever held by two of them, and what a host holds is in what it has.
func TestSharedAgainstAModel(t *testing.T) {
	subnets := []struct{ subnet, inner string }{
		{"10.90.0.0/26", ""}, {"10.90.0.0/28", ""}, {"10.90.0.0/24", "10.90.0.32/28"}, {"10.90.0.0/30", ""}, {"fd00::/123", ""}, {"fd00::/64", "fd00::40/124"},
	}
	rapid.Check(t, func(t *rapid.T) {
		of := rapid.SampledFrom(subnets).Draw(t, "subnet")
		subnet := netip.MustParsePrefix(of.subnet)
		c := newParty()
		refuse := 0
		c.before = func(_ string, block netip.Prefix) error {
			if refuse--; refuse == 0 {
				return rapid.SampledFrom([]error{errCut, TakenError{Block: block, Host: "nobody"}}).Draw(t, "refusal")
			}
			return nil
		}
		var hosts []*host
		for _, name := range []string{"a", "b", "c"} {
			h := &host{guest: c.guest(name), store: &memory{}}
			h.restart(t)
			hosts = append(hosts, h)
		}
		var all []netip.Addr
		first := subnet.Addr()
		if of.inner != "" {
			first = netip.MustParsePrefix(of.inner).Addr()
		}
		for a := first; subnet.Contains(a) && len(all) < 32; a = a.Next() {
			if checkAddress(subnet, a) == nil && a != subnet.Addr().Next() {
				all = append(all, a)
			}
		}
		network := func(h *host) error {
			r, err := h.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: of.subnet, SubPool: of.inner})
			if err != nil {
				return err
			}
			if _, err := h.RequestAddress(context.Background(), gatewayOf(r.ID, subnet.Addr().Next().String())); err != nil {
				return err
			}
			return h.Share(subnet)
		}
		pick := func(t *rapid.T) (*host, string) {
			h := rapid.SampledFrom(hosts).Draw(t, "host")
			h.store.full = rapid.IntRange(0, 9).Draw(t, "full") == 0
			var pools []string
			for _, p := range h.Pools() {
				if p.Shared {
					pools = append(pools, p.ID)
				}
			}
			if len(pools) == 0 {
				return h, ""
			}
			return h, rapid.SampledFrom(pools).Draw(t, "pool")
		}
		request := func(t *rapid.T, address string) {
			h, pool := pick(t)
			if pool == "" {
				return
			}
			got, err := h.endpoint(pool, address, "")
			switch {
			case err != nil:
				if !IsTaken(err) && !IsExhausted(err) && !errors.Is(err, errFull) && !errors.Is(err, errCut) {
					t.Fatal(err)
				}
			case address != "" && got.String() != address, address == "" && !h.inRange(pool, got):
				t.Fatalf("asked for %q, got %s", address, got)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"network": func(t *rapid.T) {
				h, _ := pick(t)
				if len(h.Pools()) > 2 {
					return
				}
				if err := network(h); err != nil && !errors.Is(err, errFull) {
					t.Fatal(err)
				}
			},
			"any":   func(t *rapid.T) { request(t, "") },
			"any2":  func(t *rapid.T) { request(t, "") },
			"any3":  func(t *rapid.T) { request(t, "") },
			"given": func(t *rapid.T) { request(t, rapid.SampledFrom(all).Draw(t, "address").String()) },
			"release": func(t *rapid.T) {
				h, pool := pick(t)
				var held []Held
				for _, a := range h.Held(pool) {
					if a.Kind == Endpoint {
						held = append(held, a)
					}
				}
				if len(held) == 0 {
					return
				}
				if err := h.ReleaseAddress(context.Background(), pool, rapid.SampledFrom(held).Draw(t, "held").Address.String()); err != nil && !errors.Is(err, errFull) {
					t.Fatal(err)
				}
			},
			"release pool": func(t *rapid.T) {
				h, pool := pick(t)
				if err := h.ReleasePool(context.Background(), pool); err != nil && !errors.Is(err, errFull) {
					t.Fatal(err)
				}
			},
			"ahead": func(t *rapid.T) {
				h, _ := pick(t)
				if err := h.ClaimAhead(context.Background()); err != nil && !errors.Is(err, errFull) && !errors.Is(err, errCut) && !errors.As(err, new(TakenError)) {
					t.Fatal(err)
				}
			},
			"restart": func(t *rapid.T) {
				h, _ := pick(t)
				before := dump(h.Manager)
				h.restart(t)
				if after := dump(h.Manager); after != before {
					t.Fatalf("restarted as\n%sfrom\n%s", after, before)
				}
				if rapid.Bool().Draw(t, "void") {
					h.restarted(h.Manager)
					c.tell()
				}
			},
			"refuse": func(t *rapid.T) { refuse = rapid.IntRange(1, 4).Draw(t, "next") },
			"": func(t *rapid.T) {
				never(t, hosts...)
				for _, h := range hosts {
					own := union(h.Own(subnet))
					for _, p := range h.Pools() {
						for _, a := range h.Held(p.ID) {
							if a.Kind == Endpoint && !own.contains(a.Address) {
								t.Fatalf("host %s holds %s, and has but %v", h.name, a.Address, own)
							}
							if !h.Busy(subnet, single(a.Address)) && p.Shared {
								t.Fatalf("host %s holds %s, which is not busy", h.name, a.Address)
							}
						}
					}
				}
			},
		})
	})
}

func (h *host) inRange(pool string, a netip.Addr) bool { return h.Manager.pools[pool].contains(a) }

// restart starts the manager from the record.
func (h *host) restart(t *rapid.T) {
	m, err := New(h.store, nil, Config{Seed: h.name, Cluster: h.guest})
	if err != nil {
		t.Fatal(err)
	}
	h.Manager, h.guest.busy = m, m.Busy
}
