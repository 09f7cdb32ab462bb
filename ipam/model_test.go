package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// machine drives a manager beside a model. Every operation may find the store full, and then must change nothing; at any
// moment the manager may be replaced by one that starts from the record.
type machine struct {
	store  *memory
	m      *Manager
	cfg    Config
	routes []netip.Prefix
}

func (s *machine) start(t *rapid.T) {
	m, err := New(s.store, func() ([]netip.Prefix, error) { return s.routes, nil }, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.m = m
}

// try runs an operation, now and then on a full disk first.
func (s *machine) try(t *rapid.T, op func() error) error {
	if rapid.IntRange(0, 3).Draw(t, "full") == 0 {
		before := dump(s.m)
		s.store.full = true
		err := op()
		s.store.full = false
		if after := dump(s.m); after != before {
			t.Fatalf("error %v changed\n%sto\n%s", err, before, after)
		}
		if err != nil && !errors.Is(err, errFull) {
			return err
		}
	}
	return op()
}

// survives compares the manager with one that starts from the record.
func (s *machine) survives(t *rapid.T) {
	want := dump(s.m)
	old := s.m
	s.start(t)
	if got := dump(s.m); got != want {
		t.Fatalf("restarted as\n%sfrom\n%s", got, want)
	}
	if !rapid.Bool().Draw(t, "restart") {
		s.m = old
	}
}

func TestAddressesAgainstAModel(t *testing.T) {
	pools := []struct{ subnet, inner string }{
		{"10.0.0.0/28", ""}, {"10.0.0.0/28", "10.0.0.8/29"}, {"10.0.0.0/28", "10.0.0.0/30"}, {"10.0.0.0/31", ""}, {"10.0.0.3/32", ""},
		{"fd00::/124", ""}, {"fd00::/64", "fd00::8/125"}, {"fd00::/127", ""},
	}
	rapid.Check(t, func(t *rapid.T) {
		of := rapid.SampledFrom(pools).Draw(t, "pool")
		s := &machine{store: &memory{}}
		s.start(t)
		var id string
		if err := s.try(t, func() error {
			r, err := s.m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: of.subnet, SubPool: of.inner})
			id = r.ID
			return err
		}); err != nil {
			t.Fatal(err)
		}
		subnet := netip.MustParsePrefix(of.subnet)

		// The model: who holds what, and the free addresses of the range in the order in which they are given.
		held := make(map[netip.Addr]bool)
		var free []netip.Addr
		inRange := make(map[netip.Addr]bool)
		for a := s.m.pools[id].first; a.Compare(s.m.pools[id].last) <= 0; a = a.Next() {
			free, inRange[a] = append(free, a), true
		}
		var all []netip.Addr
		for a := subnet.Addr(); subnet.Contains(a) && len(all) < 24; a = a.Next() {
			if checkAddress(subnet, a) == nil {
				all = append(all, a)
			}
		}
		take := func(a netip.Addr) {
			held[a] = true
			free = slices.DeleteFunc(free, func(b netip.Addr) bool { return a == b })
		}

		t.Repeat(map[string]func(*rapid.T){
			"any": func(t *rapid.T) {
				var got netip.Prefix
				err := s.try(t, func() (err error) {
					got, err = s.m.RequestAddress(context.Background(), endpointOf(id, "", "02:42:00:00:00:01", ""))
					return err
				})
				if len(free) == 0 {
					if !IsExhausted(err) {
						t.Fatalf("got %s, error %v of a full pool", got, err)
					}
					return
				}
				if err != nil || got != netip.PrefixFrom(free[0], subnet.Bits()) {
					t.Fatalf("got %s, error %v; want %s", got, err, free[0])
				}
				take(free[0])
			},
			"given": func(t *rapid.T) {
				a := rapid.SampledFrom(all).Draw(t, "address")
				err := s.try(t, func() error {
					_, err := s.m.RequestAddress(context.Background(), endpointOf(id, a.String(), "02:42:00:00:00:01", ""))
					return err
				})
				if held[a] != IsTaken(err) || !held[a] && err != nil {
					t.Fatalf("%s: held %t, error %v", a, held[a], err)
				}
				take(a)
			},
			"release": func(t *rapid.T) {
				a := rapid.SampledFrom(all).Draw(t, "address")
				if err := s.try(t, func() error { return s.m.ReleaseAddress(context.Background(), id, a.String()) }); err != nil {
					t.Fatal(err)
				}
				if held[a] && inRange[a] {
					free = append(free, a)
				}
				delete(held, a)
			},
			"": func(t *rapid.T) {
				s.survives(t)
				listed := s.m.Held(id)
				for _, h := range listed {
					if !held[h.Address] {
						t.Fatalf("%s is listed as held", h.Address)
					}
				}
				if info := s.m.Pools()[0]; len(listed) != len(held) || info.Held != len(held) || info.Total != uint64(len(inRange)) {
					t.Fatalf("listed %d, %+v; want %d of %d", len(listed), info, len(held), len(inRange))
				}
			},
		})
	})
}

func TestPoolsAgainstAModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		great := netip.MustParsePrefix("10.0.0.0/21")
		other := netip.MustParsePrefix("10.9.0.0/23")
		s := &machine{store: &memory{}, cfg: Config{Pools: []DefaultPool{{great, 24}, {other, 24}}}}
		s.start(t)
		all := make([]netip.Prefix, 0, 10)
		for _, base := range []netip.Prefix{great, other} {
			for n := range 1 << (24 - base.Bits()) {
				b := base.Addr().As4()
				b[2] += byte(n)
				all = append(all, netip.PrefixFrom(netip.AddrFrom4(b), 24))
			}
		}
		// The model: what is held, and when each pool was last released.
		held := make(map[string]netip.Prefix)
		released := make(map[netip.Prefix]int)
		clock := 0
		usable := func(p netip.Prefix) bool {
			for _, h := range held {
				if h.Overlaps(p) {
					return false
				}
			}
			return !slices.ContainsFunc(s.routes, func(r netip.Prefix) bool { return r.Bits() > 0 && r.Overlaps(p) })
		}
		request := func(t *rapid.T, pool string) (PoolReply, error) {
			var r PoolReply
			err := s.try(t, func() (err error) {
				r, err = s.m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: pool})
				return err
			})
			if err == nil {
				if _, twice := held[r.ID]; twice {
					t.Fatalf("id %s was given twice", r.ID)
				}
			}
			return r, err
		}

		t.Repeat(map[string]func(*rapid.T){
			"chosen": func(t *rapid.T) {
				r, err := request(t, "")
				candidates := slices.DeleteFunc(slices.Clone(all), func(p netip.Prefix) bool { return !usable(p) })
				if len(candidates) == 0 {
					if !IsExhausted(err) {
						t.Fatalf("got %s, error %v with nothing left", r.Pool, err)
					}
					return
				}
				if err != nil || !slices.Contains(candidates, r.Pool) {
					t.Fatalf("got %s, error %v; want one of %v", r.Pool, err, candidates)
				}
				for _, c := range candidates {
					if released[c] < released[r.Pool] {
						t.Fatalf("got %s, released at %d, before %s, released at %d", r.Pool, released[r.Pool], c, released[c])
					}
				}
				// What has been in use again since counts no longer as released.
				delete(released, r.Pool)
				held[r.ID] = r.Pool
			},
			"given": func(t *rapid.T) {
				p := rapid.SampledFrom(all).Draw(t, "subnet")
				r, err := request(t, p.String())
				if err != nil || r.Pool != p {
					t.Fatalf("got %s, error %v; want %s", r.Pool, err, p)
				}
				held[r.ID] = p
			},
			"release": func(t *rapid.T) {
				ids := []string{"dockway-local/999/10.0.0.0/24"}
				for id := range held {
					ids = append(ids, id)
				}
				slices.Sort(ids)
				id := rapid.SampledFrom(ids).Draw(t, "id")
				if err := s.try(t, func() error { return s.m.ReleasePool(context.Background(), id) }); err != nil {
					t.Fatal(err)
				}
				if p, ok := held[id]; ok {
					clock++
					released[p] = clock
					delete(held, id)
				}
			},
			"route": func(t *rapid.T) {
				s.routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
				for range rapid.IntRange(0, 2).Draw(t, "routes") {
					p := rapid.SampledFrom(all).Draw(t, "route")
					s.routes = append(s.routes, netip.PrefixFrom(p.Addr(), rapid.SampledFrom([]int{22, 23, 24, 25, 32}).Draw(t, "length")).Masked())
				}
			},
			"": func(t *rapid.T) {
				s.survives(t)
				if n := len(s.m.Pools()); n != len(held) {
					t.Fatalf("%d pools, want %d", n, len(held))
				}
				if n := len(s.m.choice.Released); n > releasedMax {
					t.Fatalf("%d releases are remembered", n)
				}
			},
		})
	})
}

func FuzzParsePools(f *testing.F) {
	for _, s := range []string{"10.64.0.0/11:24,fd00::/8:64", "fd00::/8:64", ":", "/:", "0.0.0.0/0:0", "::/0:64"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		pools, err := ParsePools(s)
		if err != nil {
			if !IsInvalid(err) {
				t.Error(err)
			}
			return
		}
		if again, err := ParsePools(names(pools)); err != nil || !slices.Equal(again, pools) {
			t.Errorf("%q reads as %v, and that as %v, error %v", s, pools, again, err)
		}
		if _, err := New(&memory{}, nil, Config{Pools: pools}); err != nil {
			t.Error(err)
		}
	})
}

// Whatever is requested: a pool that is granted gives addresses of its own, and comes back from the record.
func FuzzRequests(f *testing.F) {
	f.Add("dockway-local", "10.0.0.0/24", "10.0.0.128/25", "key", false, "10.0.0.5")
	f.Add("dockway-global", "fd00::/64", "", "", true, "fd00::")
	f.Add("dockway-local", "0.0.0.0/26", "", "com.docker.network.x", false, "")
	f.Add("dockway-local", "::ffff:10.0.0.0/120", "::/0", "RequestAddressType", true, "::ffff:10.0.0.5")
	f.Fuzz(func(t *testing.T, space, pool, inner, option string, v6 bool, address string) {
		store := &memory{}
		m := mustNew(t, store, Config{Seed: "x"})
		ctx := context.Background()
		request := PoolRequest{Space: space, Pool: pool, SubPool: inner, V6: v6}
		if option != "" {
			request.Options = map[string]string{option: "x"}
		}
		r, err := m.RequestPool(ctx, request)
		if err != nil {
			if !IsInvalid(err) {
				t.Error(err)
			}
			return
		}
		for _, a := range []string{"", address} {
			p, err := m.RequestAddress(ctx, AddressRequest{PoolID: r.ID, Address: a})
			switch {
			case err != nil && (a == "" || !IsInvalid(err) && !IsTaken(err) && !IsExhausted(err)):
				t.Error(err)
			case err == nil && (p.Bits() != r.Pool.Bits() || !r.Pool.Contains(p.Addr()) || checkAddress(r.Pool, p.Addr()) != nil):
				t.Errorf("%s of %s", p, r.Pool)
			}
		}
		if got, want := dump(mustNew(t, store, Config{})), dump(m); got != want {
			t.Errorf("restarted as\n%sfrom\n%s", got, want)
		}
		if err := m.ReleaseAddress(ctx, r.ID, address); err != nil && !IsInvalid(err) {
			t.Error(err)
		}
	})
}

func FuzzRecord(f *testing.F) {
	f.Add("7", `{"space":"dockway-local","subnet":"10.0.0.0/24","range":"10.0.0.0/24","next":"10.0.0.1","shared":true}`, "7/10.0.0.9", `{"kind":"endpoint","claimed":true}`, `{"serial":9}`, "10.0.0.0/24 10.0.0.8/29", `{"ceded":["10.0.0.8/32"]}`)
	f.Add("1", `{"space":"dockway-global","subnet":"fd00::/64","range":"fd00::/65","next":""}`, "1/fd00::9", `{"freed":3}`, `{"serial":9,"last6":"fd00::/64","released":["10.0.0.0/24",""]}`, "fd00::/64 fd00::/65", `{}`)
	f.Fuzz(func(t *testing.T, poolKey, pool, addressKey, address, choice, blockKey, block string) {
		store := &memory{}
		if err := store.Apply(
			Change{choiceBucket, choiceKey, []byte(choice)}, Change{poolBucket, poolKey, []byte(pool)}, Change{addressBucket, addressKey, []byte(address)},
			Change{blockBucket, blockKey, []byte(block)},
		); err != nil {
			t.Fatal(err)
		}
		m, err := New(store, nil, Config{Seed: "x"})
		if err != nil {
			return
		}
		for _, v6 := range []bool{false, true} {
			if _, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), V6: v6}); err != nil && !IsExhausted(err) {
				t.Error(err)
			}
		}
		for _, p := range m.Pools() {
			got, err := m.RequestAddress(context.Background(), AddressRequest{PoolID: p.ID})
			if err != nil && !IsExhausted(err) && !errors.Is(err, errNoCluster) || err == nil && !p.Range.Contains(got.Addr()) {
				t.Errorf("%s, error %v", got, err)
			}
			for _, h := range m.Held(p.ID) {
				if err := m.ReleaseHeld(context.Background(), h); err != nil {
					t.Error(err)
				}
			}
		}
		if got, want := dump(mustNew(t, store, Config{Seed: "x"})), dump(m); got != want {
			t.Errorf("restarted as\n%sfrom\n%s", got, want)
		}
	})
}

// A great pool takes no more memory than a small one, and a request of one of which much is held no more time than
// of one of which little is: a search through what is held would take 32 times as long.
func TestCostOfGreatPools(t *testing.T) {
	memory := func(pool string) uint64 {
		m := mustNew(t, discard{}, Config{})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		id := mustPool(t, m, pool, "")
		for range 200 {
			mustRequest(t, m, AddressRequest{PoolID: id})
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	small := memory("10.0.0.0/24")
	for _, pool := range []string{"10.0.0.0/8", "fd00::/64", "fd00::/8"} {
		if great := memory(pool); great > 2*small {
			t.Errorf("200 addresses of %s take %d bytes, of a /24 %d", pool, great, small)
		}
	}
	for _, pool := range []string{"10.0.0.0/8", "fd00::/64"} {
		m := mustNew(t, discard{}, Config{})
		var ids [2]string
		for i, held := range []int{1 << 10, 1 << 15} {
			ids[i] = mustPool(t, m, pool, "")
			for range held {
				mustRequest(t, m, AddressRequest{PoolID: ids[i]})
			}
		}
		least := [2]time.Duration{time.Hour, time.Hour} // what else the machine does only adds to it
		for range 20 {
			for i, id := range ids {
				start := time.Now()
				for range 100 {
					a, _, _ := strings.Cut(mustRequest(t, m, AddressRequest{PoolID: id}), "/")
					if err := m.ReleaseAddress(t.Context(), id, a); err != nil {
						t.Fatal(err)
					}
				}
				least[i] = min(least[i], time.Since(start))
			}
		}
		if least[1] > 8*least[0] {
			t.Errorf("%s: 100 requests take %s with 1,024 held, and %s with 32,768", pool, least[0], least[1])
		}
	}
}

// The cost of a request does not depend on the size of the pool, nor on how much of it is held.
func BenchmarkRequestRelease(b *testing.B) {
	for _, pool := range []struct {
		subnet string
		hosts  int
	}{{"10.0.0.0/24", 254}, {"10.0.0.0/16", 1<<16 - 2}, {"10.0.0.0/8", 1<<24 - 2}, {"fd00::/64", 1 << 62}} {
		for _, held := range []int{0, min(pool.hosts-1, 1<<20)} {
			b.Run(fmt.Sprintf("%s/held=%d", pool.subnet, held), func(b *testing.B) {
				store := discard{}
				m := mustNew(b, store, Config{})
				id := mustPool(b, m, pool.subnet, "")
				for range held {
					mustRequest(b, m, AddressRequest{PoolID: id})
				}
				ctx := context.Background()
				b.ReportAllocs()
				for b.Loop() {
					p, err := m.RequestAddress(ctx, AddressRequest{PoolID: id})
					if err != nil {
						b.Fatal(err)
					}
					if err := m.ReleaseAddress(ctx, id, p.Addr().String()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkRequestPool(b *testing.B) {
	for _, held := range []int{0, 1000, 8000} {
		b.Run(fmt.Sprintf("held=%d", held), func(b *testing.B) {
			m := mustNew(b, discard{}, Config{})
			for range held {
				mustPool(b, m, "", "")
			}
			for b.Loop() {
				if err := m.ReleasePool(context.Background(), mustPool(b, m, "", "")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// discard is a store that costs nothing.
type discard struct{}

func (discard) Apply(...Change) error                         { return nil }
func (discard) Load(string, func(string, []byte) error) error { return nil }
