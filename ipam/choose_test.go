package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParsePools(t *testing.T) {
	for s, want := range map[string]string{
		"":                                       "",
		" ":                                      "",
		"10.64.0.0/10:24":                        "10.64.0.0/10:24",
		"10.64.1.9/10:24":                        "10.64.0.0/10:24",
		" 10.0.0.0/16:24 , 10.1.0.0/16:20":       "10.0.0.0/16:24, 10.1.0.0/16:20",
		"fd00::/8:64":                            "fd00::/8:64",
		"10.0.0.0/24:24,fd00:1::/48:64":          "10.0.0.0/24:24, fd00:1::/48:64",
		"10.0.0.0/28:30,fd00::/126:126":          "10.0.0.0/28:30, fd00::/126:126",
		"10.0.0.0/16":                            "as 10.64.0.0/11:24",
		"10.0.0.0:24":                            "as 10.64.0.0/11:24",
		"fd00::/8":                               "as 10.64.0.0/11:24",
		"10.0.0.0/16:":                           `"" is no prefix length`,
		"10.0.0.0/16:x":                          `"x" is no prefix length`,
		"10.0.0.0/16:8":                          "only of /16 to /30",
		"10.0.0.0/16:31":                         "only of /16 to /30",
		"fd00::/64:127":                          "only of /64 to /126",
		"10.0.0.0/16:-1":                         "only of /16 to /30",
		"10.0.0/16:24":                           `"10.0.0/16" is no address range`,
		"10.0.0.0/16:24,":                        "as 10.64.0.0/11:24",
		"10.0.0.0/16:24,10.0.5.0/24:26":          "it overlaps 10.0.0.0/16:24",
		"127.0.0.0/8:24":                         "loopback",
		"::ffff:10.0.0.0/104:120":                "without ::ffff:",
		"0.0.0.0/0:24":                           "does not say which",
		"10.0.0.0/16:99999999999999999999999999": "is no prefix length",
	} {
		got, err := ParsePools(s)
		if err == nil && names(got) != want || err != nil && (!IsInvalid(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: got %v, error %v; want %s", s, got, err, want)
		}
	}
}

func TestDefaults(t *testing.T) {
	ask := func(t *testing.T, m *Manager, v6 bool) string {
		t.Helper()
		r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), V6: v6})
		if err != nil {
			t.Fatal(err)
		}
		return r.Pool.String()
	}
	a, b := mustNew(t, &memory{}, Config{Seed: "host a"}), mustNew(t, &memory{}, Config{Seed: "host b"})
	if got := []string{ask(t, a, false), ask(t, a, false), ask(t, b, false)}; strings.Join(got, " ") != "10.64.0.0/24 10.64.1.0/24 10.64.0.0/24" {
		t.Errorf("got %v", got)
	}
	six := ask(t, a, true)
	if other := ask(t, b, true); six == other || !strings.HasPrefix(six, "fd") || !strings.HasSuffix(six, "::/64") {
		t.Errorf("hosts chose %s and %s", six, other)
	}
	if again := ask(t, mustNew(t, &memory{}, Config{Seed: "host a"}), true); again != six {
		t.Errorf("the same host chose %s and %s", six, again)
	}
	// What is configured for one family leaves the other's default alone.
	m := mustNew(t, &memory{}, Config{Pools: []DefaultPool{{netip.MustParsePrefix("fd00:1::/48"), 56}}, Seed: "x"})
	if got := ask(t, m, true) + " " + ask(t, m, false); got != "fd00:1::/56 10.64.0.0/24" {
		t.Errorf("got %s", got)
	}
	for _, d := range []DefaultPool{{}, {netip.MustParsePrefix("10.0.0.1/16"), 24}, {netip.MustParsePrefix("10.0.0.0/16"), 8}} {
		if _, err := New(&memory{}, nil, Config{Pools: []DefaultPool{d}}); !IsInvalid(err) {
			t.Errorf("%v: error %v", d, err)
		}
	}
}

func TestChoosing(t *testing.T) {
	var routes []netip.Prefix
	var routesErr error
	m, err := New(&memory{}, func() ([]netip.Prefix, error) { return routes, routesErr }, Config{
		Pools: []DefaultPool{{netip.MustParsePrefix("10.0.0.0/22"), 24}, {netip.MustParsePrefix("10.9.0.0/23"), 24}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ids := make(map[string]string)
	ask := func(pool, want string) {
		t.Helper()
		r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: pool})
		if err != nil || r.Pool.String() != want {
			t.Errorf("got %s, error %v; want %s", r.Pool, err, want)
		}
		ids[want] = r.ID
	}
	exhausted := func() {
		t.Helper()
		_, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local)})
		if !IsExhausted(err) || !strings.Contains(err.Error(), "10.0.0.0/22:24, 10.9.0.0/23:24") {
			t.Errorf("error %v", err)
		}
	}
	release := func(pool string) {
		t.Helper()
		if err := m.ReleasePool(context.Background(), ids[pool]); err != nil {
			t.Error(err)
		}
	}
	routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("10.0.0.128/25"), netip.MustParsePrefix("fd00::/64")}
	ask("", "10.0.1.0/24")
	release("10.0.1.0/24")
	ask("", "10.0.2.0/24") // not the one just released
	ask("10.0.3.77/32", "10.0.3.77/32")
	ask("0.0.0.0/0", "10.9.0.0/24")
	ask("0.0.0.0/26", "10.9.1.0/26")
	ask("0.0.0.0/26", "10.9.1.64/26")
	ask("", "10.0.1.0/24") // nothing else is left
	exhausted()
	routes = nil
	ask("", "10.0.0.0/24") // the route is gone
	exhausted()
	release("10.9.0.0/24")
	release("10.0.2.0/24")
	release("10.0.3.77/32")
	routes = []netip.Prefix{netip.MustParsePrefix("10.8.0.0/15")}
	ask("", "10.0.2.0/24") // 10.9.0.0/24 was released before, but a route overlaps it
	routes = nil
	ask("", "10.9.0.0/24")
	ask("", "10.0.3.0/24")
	exhausted()
	routesErr = errors.New("netlink: no answer")
	if _, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local)}); !errors.Is(err, routesErr) {
		t.Errorf("error %v", err)
	}
	ask("10.0.0.0/24", "10.0.0.0/24") // a given one needs no routes, and may be what is held
}

// A route that covers all of a great range is passed over at once, and the engine's loop, which keeps what it cannot use
// and asks again, comes to an end.
func TestChoosingFromAGreatRange(t *testing.T) {
	m, err := New(&memory{}, func() ([]netip.Prefix, error) {
		return []netip.Prefix{netip.MustParsePrefix("fd00::/9"), netip.MustParsePrefix("fd80::/10"), netip.MustParsePrefix("fdc0::/64")}, nil
	}, Config{Pools: []DefaultPool{{netip.MustParsePrefix("fd00::/8"), 64}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"fdc0:0:0:1::/64", "fdc0:0:0:2::/64"} {
		r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), V6: true})
		if err != nil || r.Pool.String() != want {
			t.Errorf("got %s, error %v; want %s", r.Pool, err, want)
		}
	}
}

func TestEveryDefaultPoolIsChosenOnce(t *testing.T) {
	m := mustNew(t, &memory{}, Config{Pools: []DefaultPool{{netip.MustParsePrefix("10.0.0.0/12"), 22}}})
	for round := range 2 {
		seen := make(map[netip.Prefix]bool)
		for {
			r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Global)})
			if IsExhausted(err) {
				break
			}
			if err != nil || seen[r.Pool] {
				t.Fatalf("%s: seen %t, error %v", r.Pool, seen[r.Pool], err)
			}
			seen[r.Pool] = true
		}
		if len(seen) != 1024 {
			t.Errorf("round %d: %d pools", round, len(seen))
		}
		for _, p := range m.Pools() {
			if err := m.ReleasePool(context.Background(), p.ID); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(m.choice.Released); n != releasedMax {
			t.Errorf("%d releases are remembered", n)
		}
	}
}
