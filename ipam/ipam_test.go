package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// memory is a store that fails when it is told to.
type memory struct {
	mu      sync.Mutex
	buckets map[string]map[string][]byte
	full    bool
	applied int
}

var errFull = errors.New("no space left on device")

func (s *memory) Apply(changes ...Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return errFull
	}
	s.applied++
	for _, c := range changes {
		if c.Value == nil {
			delete(s.buckets[c.Bucket], c.Key)
			continue
		}
		if s.buckets == nil {
			s.buckets = make(map[string]map[string][]byte)
		}
		if s.buckets[c.Bucket] == nil {
			s.buckets[c.Bucket] = make(map[string][]byte)
		}
		s.buckets[c.Bucket][c.Key] = slices.Clone(c.Value)
	}
	return nil
}

func (s *memory) Load(bucket string, each func(string, []byte) error) error {
	for _, k := range slices.Sorted(maps.Keys(s.buckets[bucket])) {
		if err := each(k, s.buckets[bucket][k]); err != nil {
			return err
		}
	}
	return nil
}

// dump is all of a manager's state that is to survive a restart, as text.
func dump(m *Manager) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%+v\n", m.choice)
	for _, p := range m.sorted() {
		fmt.Fprintf(&b, "%s range %s next %s gateway %s in range %d:", p.id(), p.inner, p.next, p.gateway, p.inRange)
		for _, a := range slices.SortedFunc(maps.Keys(p.grants), netip.Addr.Compare) {
			fmt.Fprintf(&b, " %s=%+v", a, p.grants[a].addressRecord)
		}
		b.WriteString(" freed:")
		for e := p.freed.Front(); e != nil; e = e.Next() {
			fmt.Fprintf(&b, " %s", e.Value)
		}
		fmt.Fprintf(&b, " shared %t\n", p.share != nil)
	}
	for _, s := range m.sharing() {
		if s.pools > 0 {
			fmt.Fprintf(&b, "%s: %d pools, blocks %v, claimed %v, ceded %v\n", s.subnet, s.pools, s.blocks, s.claimed, slices.SortedFunc(maps.Keys(s.ceded), netip.Prefix.Compare))
		}
	}
	return b.String()
}

func mustNew(t testing.TB, store Store, cfg Config) *Manager {
	t.Helper()
	m, err := New(store, nil, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustPool(t testing.TB, m *Manager, pool, inner string) string {
	t.Helper()
	r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: pool, SubPool: inner})
	if err != nil {
		t.Fatal(err)
	}
	return r.ID
}

func mustRequest(t testing.TB, m *Manager, r AddressRequest) string {
	t.Helper()
	p, err := m.RequestAddress(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	return p.String()
}

func gatewayOf(pool, address string) AddressRequest {
	return AddressRequest{PoolID: pool, Address: address, Options: map[string]string{"RequestAddressType": "com.docker.network.gateway"}}
}

func endpointOf(pool, address, mac, name string) AddressRequest {
	r := AddressRequest{PoolID: pool, Address: address, Options: map[string]string{"com.docker.network.endpoint.macaddress": mac}}
	if name != "" {
		r.Options["com.docker.network.endpoint.name"] = name
	}
	return r
}

// What `docker network create` and `docker run` ask for, in their order, as recorded from engines 20.10 and 29.
func TestNetworkAsTheEngineAsksForIt(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	ctx := context.Background()
	id := mustPool(t, m, "10.50.0.0/16", "10.50.1.0/24")
	for _, step := range []struct {
		request AddressRequest
		want    string
	}{
		{gatewayOf(id, "10.50.0.1"), "10.50.0.1/16"},
		{AddressRequest{PoolID: id, Address: "10.50.1.5"}, "10.50.1.5/16"}, // auxiliary
		{AddressRequest{PoolID: id, Address: "10.50.9.9"}, "10.50.9.9/16"}, // auxiliary, outside of the range
		{endpointOf(id, "10.50.1.77", "02:42:de:ad:00:01", "ra"), "10.50.1.77/16"},
		{endpointOf(id, "", "f6:8c:ef:8a:40:ec", "rb"), "10.50.1.0/16"},
		{endpointOf(id, "", "f6:8c:ef:8a:40:ed", ""), "10.50.1.1/16"},
	} {
		if got := mustRequest(t, m, step.request); got != step.want {
			t.Errorf("%+v: got %s, want %s", step.request, got, step.want)
		}
	}
	kinds := make(map[string]Kind)
	for _, h := range m.Held(id) {
		kinds[h.Address.String()] = h.Kind
	}
	want := map[string]Kind{
		"10.50.0.1": Gateway, "10.50.1.5": Auxiliary, "10.50.9.9": Auxiliary,
		"10.50.1.77": Endpoint, "10.50.1.0": Endpoint, "10.50.1.1": Endpoint,
	}
	if !maps.Equal(kinds, want) {
		t.Errorf("kinds %v, want %v", kinds, want)
	}
	info := m.Pools()[0]
	if info.ID != id || info.Space != Local || info.Subnet.String() != "10.50.0.0/16" || info.Range.String() != "10.50.1.0/24" ||
		info.Gateway.String() != "10.50.0.1" || info.Held != 6 || info.Total != 256 {
		t.Errorf("info %+v", info)
	}
	for range 2 { // the engine may release twice, and the gateway though it was never asked for
		for a := range want {
			if err := m.ReleaseAddress(ctx, id, a); err != nil {
				t.Error(err)
			}
		}
		if err := m.ReleaseAddress(ctx, id, "10.50.77.77"); err != nil {
			t.Error(err)
		}
		if err := m.ReleasePool(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if _, err := m.RequestAddress(ctx, endpointOf(id, "", "02:42:de:ad:00:01", "")); !IsUnknownPool(err) {
		t.Errorf("error %v", err)
	}
	if len(m.Pools())+len(m.Held(id))+len(store.buckets[poolBucket])+len(store.buckets[addressBucket]) != 0 {
		t.Errorf("left over: %v", store.buckets)
	}
}

// The order of dynamic addresses for pools of any length, up to the last one.
func TestAddressesOfEveryKindOfPool(t *testing.T) {
	for _, test := range []struct {
		pool, inner string
		want        string // all dynamic addresses, or the first ones and "..."
	}{
		{"10.0.0.0/30", "", "10.0.0.1/30 10.0.0.2/30"},
		{"10.0.0.9/29", "", "10.0.0.9/29 10.0.0.10/29 10.0.0.11/29 10.0.0.12/29 10.0.0.13/29 10.0.0.14/29"},
		{"10.0.0.0/31", "", "10.0.0.0/31 10.0.0.1/31"},
		{"10.0.0.5/32", "", "10.0.0.5/32"},
		{"10.0.0.0/24", "10.0.0.252/30", "10.0.0.252/24 10.0.0.253/24 10.0.0.254/24"},
		{"10.0.0.0/24", "10.0.0.7/32", "10.0.0.7/24"},
		{"10.0.0.0/24", "10.0.0.3/30", "10.0.0.1/24 10.0.0.2/24 10.0.0.3/24"},
		{"10.0.0.0/16", "10.0.1.0/24", "10.0.1.0/16 10.0.1.1/16 ..."},
		{"10.0.0.0/8", "", "10.0.0.1/8 10.0.0.2/8 ..."},
		{"fd00::/64", "", "fd00::1/64 fd00::2/64 ..."},
		{"fd00::/8", "", "fd00::1/8 fd00::2/8 ..."},
		{"fd00::/64", "fd00::ff00/126", "fd00::ff00/64 fd00::ff01/64 fd00::ff02/64 fd00::ff03/64"},
		{"fd00::/126", "", "fd00::1/126 fd00::2/126 fd00::3/126"},
		{"fd00::/127", "", "fd00::/127 fd00::1/127"},
		{"fd00::5/128", "", "fd00::5/128"},
	} {
		m := mustNew(t, &memory{}, Config{})
		id := mustPool(t, m, test.pool, test.inner)
		want, more := strings.CutSuffix(test.want, " ...")
		var got []string
		for range strings.Fields(want) {
			got = append(got, mustRequest(t, m, AddressRequest{PoolID: id}))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s in %s: got %s, want %s", test.inner, test.pool, got, want)
		}
		p, err := m.RequestAddress(context.Background(), AddressRequest{PoolID: id})
		if more && err != nil || !more && (!IsExhausted(err) || !strings.Contains(err.Error(), fmt.Sprintf("all %d addresses", len(got)))) {
			t.Errorf("%s in %s: after %s got %s, %v", test.inner, test.pool, got, p, err)
		}
		if total := m.Pools()[0].Total; !more && total != uint64(len(got)) {
			t.Errorf("%s in %s: total %d", test.inner, test.pool, total)
		}
	}
}

func TestRefusals(t *testing.T) {
	m := mustNew(t, &memory{}, Config{})
	id := mustPool(t, m, "10.0.0.0/24", "")
	id6 := mustPool(t, m, "fd00::/64", "")
	mustRequest(t, m, gatewayOf(id, ""))
	mustRequest(t, m, AddressRequest{PoolID: id, Address: "10.0.0.5"})
	mustRequest(t, m, endpointOf(id, "10.0.0.6", "02:42:00:00:00:06", "six"))
	mustRequest(t, m, endpointOf(id, "10.0.0.7", "02:42:00:00:00:07", ""))
	mustRequest(t, m, AddressRequest{PoolID: id, Address: "10.0.0.8", Options: map[string]string{optionSerial: "true"}})
	mustRequest(t, m, AddressRequest{PoolID: id, Address: "10.0.0.9", Endpoint: true})
	before := dump(m)
	for _, test := range []struct {
		request AddressRequest
		is      func(error) bool
		words   string
	}{
		{AddressRequest{PoolID: id, Address: "10.0.0.9", Endpoint: true}, IsTaken, "it is held by another endpoint"},
		{endpointOf(id, "10.0.0.1", "02:42:00:00:00:09", "x"), IsTaken, "address 10.0.0.1 in pool " + id + " is taken: it is the gateway"},
		{endpointOf(id, "10.0.0.5", "02:42:00:00:00:09", "x"), IsTaken, "it is an auxiliary address"},
		{AddressRequest{PoolID: id, Address: "10.0.0.5"}, IsTaken, "it is an auxiliary address"},
		{endpointOf(id, "10.0.0.6", "02:42:00:00:00:09", "x"), IsTaken, `it is held by container "six"`},
		{endpointOf(id, "10.0.0.7", "02:42:00:00:00:07", ""), IsTaken, "it is held by the endpoint with MAC address 02:42:00:00:00:07"},
		{endpointOf(id, "10.0.0.8", "02:42:00:00:00:09", ""), IsTaken, "it is held by another endpoint"},
		{gatewayOf(id, "10.0.0.6"), IsTaken, `container "six"`},
		{gatewayOf(id, "10.0.0.0"), IsInvalid, "it is the network address of 10.0.0.0/24"},
		{gatewayOf(id, "10.0.0.255"), IsInvalid, "it is the broadcast address of 10.0.0.0/24"},
		{gatewayOf(id6, "fd00::"), IsInvalid, "it is the routers' anycast address of fd00::/64"},
		{gatewayOf(id, "10.0.1.1"), IsInvalid, "it is not in the subnet 10.0.0.0/24"},
		{gatewayOf(id, "fd00::1"), IsInvalid, "it is not in the subnet 10.0.0.0/24"},
		{gatewayOf(id6, "10.0.0.1"), IsInvalid, "it is not in the subnet fd00::/64"},
		{gatewayOf(id, "::ffff:10.0.0.9"), IsInvalid, "write it as 10.0.0.9"},
		{gatewayOf(id, "10.0.0.9/24"), IsInvalid, "write it as 10.80.0.2"},
		{gatewayOf(id, "10.0.0.999"), IsInvalid, `address "10.0.0.999" is invalid`},
		{gatewayOf(id6, "fe80::1%eth0"), IsInvalid, "must not name an interface"},
		{gatewayOf("dockway-local/99/10.0.0.0/24", ""), IsUnknownPool, "dockway-local/99/10.0.0.0/24"},
		{gatewayOf("", ""), IsUnknownPool, "unknown pool"},
	} {
		_, err := m.RequestAddress(context.Background(), test.request)
		if !test.is(err) || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: error %v, want one with %q", test.request.Address, err, test.words)
		}
	}
	for _, test := range []struct {
		request PoolRequest
		words   string
	}{
		{PoolRequest{Space: "", Pool: "10.0.0.0/24"}, `address space "" is invalid`},
		{PoolRequest{Space: "LocalDefault", Pool: "10.0.0.0/24"}, "dockway-local or dockway-global"},
		{PoolRequest{Pool: "10.0.0.0"}, "write it as"},
		{PoolRequest{Pool: "10.0.0.0/33"}, "write it as"},
		{PoolRequest{Pool: "::ffff:10.0.0.0/120"}, "without ::ffff:"},
		{PoolRequest{Pool: "224.1.0.0/16"}, "multicast"},
		{PoolRequest{Pool: "ff02::/64"}, "multicast"},
		{PoolRequest{Pool: "127.0.0.0/8"}, "loopback"},
		{PoolRequest{Pool: "64.0.0.0/2"}, "loopback"},
		{PoolRequest{Pool: "0.0.0.1/8"}, "does not say which"},
		{PoolRequest{Pool: "10.0.0.0/24", V6: true}, "an IPv6 subnet is requested"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "10.0.1.0/24"}, "not inside the subnet"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "10.0.0.0/16"}, "not inside the subnet"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "fd00::/64"}, "not inside the subnet"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "half of it"}, "write it as"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "10.0.0.255/32"}, "no address that a container could have"},
		{PoolRequest{Pool: "10.0.0.0/24", SubPool: "10.0.0.0/32"}, "no address that a container could have"},
		{PoolRequest{SubPool: "10.0.0.0/32"}, "without a subnet"},
		{PoolRequest{Pool: "0.0.0.0/24", SubPool: "10.0.0.0/32"}, "without a subnet"},
		{PoolRequest{Pool: "10.0.0.0/24", Options: map[string]string{"gatway": "10.0.0.1"}}, `ipam option "gatway" is invalid: the only one is dhcp=true`},
		{PoolRequest{V6: true}, "no default pool"},
		{PoolRequest{Pool: "0.0.0.0/31"}, "no default pool"},
		{PoolRequest{Pool: "0.0.0.0/7"}, "no default pool"},
	} {
		if test.request.Space == "" && !strings.Contains(test.words, "space") {
			test.request.Space = string(Local)
		}
		_, err := m.RequestPool(context.Background(), test.request)
		if !IsInvalid(err) || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%+v: error %v, want one with %q", test.request, err, test.words)
		}
	}
	if err := m.ReleaseAddress(context.Background(), id, "what?"); !IsInvalid(err) {
		t.Errorf("error %v", err)
	}
	if after := dump(m); after != before {
		t.Errorf("a refusal changed\n%sto\n%s", before, after)
	}
}

// An engine that lost track asks again, and gets what it holds.
func TestAskedAgain(t *testing.T) {
	m := mustNew(t, &memory{}, Config{})
	id := mustPool(t, m, "10.0.0.0/24", "")
	for range 2 {
		if got := mustRequest(t, m, gatewayOf(id, "10.0.0.1")); got != "10.0.0.1/24" {
			t.Errorf("got %s", got)
		}
		if got := mustRequest(t, m, endpointOf(id, "10.0.0.9", "02:42:00:00:00:09", "web")); got != "10.0.0.9/24" {
			t.Errorf("got %s", got)
		}
	}
	if held := m.Held(id); len(held) != 2 {
		t.Errorf("held %v", held)
	}
}

// A swarm's new leader asks again for all that is allocated, and says of nothing whose it is.
func TestNewLeader(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	serial := map[string]string{optionSerial: "true"}
	gateway := map[string]string{optionSerial: "true", optionType: typeGateway}
	ask := func(options map[string]string) (id string) {
		r, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Global), Pool: "10.71.0.0/24", Options: options})
		if err != nil {
			t.Fatal(err)
		}
		return r.ID
	}
	first := ask(nil)
	if got := mustRequest(t, m, AddressRequest{PoolID: first, Options: gateway}); got != "10.71.0.1/24" {
		t.Errorf("gateway %s", got)
	}
	for _, want := range []string{"10.71.0.2/24", "10.71.0.3/24"} {
		if got := mustRequest(t, m, AddressRequest{PoolID: first, Options: serial}); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	m = mustNew(t, store, Config{})
	second := ask(gateway)
	mustRequest(t, m, AddressRequest{PoolID: second, Address: "10.71.0.1", Options: gateway})
	mustRequest(t, m, AddressRequest{PoolID: second, Address: "10.71.0.3", Options: serial})
	if _, err := m.RequestAddress(context.Background(), AddressRequest{PoolID: second, Address: "10.71.0.3", Options: serial}); !IsTaken(err) {
		t.Errorf("error %v", err)
	}
	// What the old leader freed meanwhile is not lost.
	if got := mustRequest(t, m, AddressRequest{PoolID: second, Options: serial}); got != "10.71.0.2/24" {
		t.Errorf("got %s", got)
	}
	// On the same machine, the swarm's node asks for the same in its own space.
	if _, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: "10.71.0.0/24"}); err != nil {
		t.Error(err)
	}
}

// A second network with the same subnet, which the network driver may refuse, takes nothing from the first.
func TestSameSubnetTwice(t *testing.T) {
	m := mustNew(t, &memory{}, Config{})
	first := mustPool(t, m, "10.0.0.0/24", "")
	mustRequest(t, m, gatewayOf(first, "10.0.0.1"))
	mustRequest(t, m, endpointOf(first, "", "02:42:00:00:00:02", "web"))
	before := m.Held(first)
	second := mustPool(t, m, "10.0.0.0/24", "")
	mustRequest(t, m, gatewayOf(second, "10.0.0.1"))
	if err := errors.Join(m.ReleaseAddress(context.Background(), second, "10.0.0.1"), m.ReleasePool(context.Background(), second)); err != nil {
		t.Fatal(err)
	}
	after := m.Held(first)
	if len(before) != 2 || len(after) != 2 {
		t.Errorf("held %v, then %v", before, after)
	}
}

func TestTwinsAreBounded(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	mustPool(t, m, "10.0.0.0/24", "10.0.0.128/25")
	var ids []string
	for range twinsMax {
		ids = append(ids, mustPool(t, m, "10.0.0.0/24", ""))
	}
	mustRequest(t, m, gatewayOf(ids[0], ""))
	mustRequest(t, m, gatewayOf(ids[1], ""))
	m.Held(ids[0]) // so it is in use
	m.Held(ids[2])
	store.full = true
	before := dump(m)
	if _, err := m.RequestPool(context.Background(), PoolRequest{Space: string(Local), Pool: "10.0.0.0/24"}); !errors.Is(err, errFull) || dump(m) != before {
		t.Errorf("error %v", err)
	}
	store.full = false
	for range 3 {
		mustPool(t, m, "10.0.0.0/24", "")
	}
	if n := len(m.Pools()); n != twinsMax+1 {
		t.Errorf("%d pools", n)
	}
	for i, gone := range []bool{false, false, false, true, true, true, false} {
		if _, err := m.RequestAddress(context.Background(), AddressRequest{PoolID: ids[i]}); IsUnknownPool(err) != gone {
			t.Errorf("pool %d: %v", i, err)
		}
	}
	if got, want := dump(mustNew(t, store, Config{})), dump(m); got != want {
		t.Errorf("restarted as\n%sfrom\n%s", got, want)
	}
}

func TestCollector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		m := mustNew(t, store, Config{})
		ctx := context.Background()
		id := mustPool(t, m, "10.0.0.0/29", "")
		subnet := netip.MustParsePrefix("10.0.0.0/29")
		mustRequest(t, m, gatewayOf(id, ""))
		mustRequest(t, m, endpointOf(id, "", "02:42:00:00:00:02", "old"))
		time.Sleep(time.Hour) // of the test's own time
		mustRequest(t, m, endpointOf(id, "", "02:42:00:00:00:03", "young"))
		held := m.Held(id)
		if len(held) != 3 || held[1].Name != "old" || held[1].Age != time.Hour || held[1].MAC != "02:42:00:00:00:02" || held[2].Age != 0 || held[0].Kind != Gateway {
			t.Fatalf("held %+v", held)
		}
		// Between the look and the release, the address got another holder.
		if err := m.ReleaseAddress(ctx, id, "10.0.0.2"); err != nil {
			t.Fatal(err)
		}
		mustRequest(t, m, endpointOf(id, "10.0.0.2", "02:42:00:00:00:04", "new"))
		if err := m.ReleaseHeld(ctx, held[1]); err != nil || len(m.Held(id)) != 3 {
			t.Errorf("error %v, held %v", err, m.Held(id))
		}
		// So it is with addresses on record from before a restart.
		m = mustNew(t, store, Config{})
		held = m.Held(id)
		if len(held) != 3 || held[1].Name != "new" || held[1].Age != 0 {
			t.Fatalf("held %+v", held)
		}
		for range 2 {
			if err := m.ReleaseHeld(ctx, held[1]); err != nil || len(m.Held(id)) != 2 {
				t.Errorf("error %v, held %v", err, m.Held(id))
			}
		}
		mustRequest(t, m, endpointOf(id, "10.0.0.2", "02:42:00:00:00:05", "newest"))
		if err := m.ReleaseHeld(ctx, held[1]); err != nil || len(m.Held(id)) != 3 {
			t.Errorf("error %v, held %v", err, m.Held(id))
		}
		// By subnet and address: endpoints only, and not when it could be another's.
		twin := mustPool(t, m, "10.0.0.0/29", "")
		mustRequest(t, m, endpointOf(twin, "10.0.0.2", "02:42:00:00:00:06", ""))
		for a, left := range map[string]int{"10.0.0.1": 3, "10.0.0.2": 3, "10.0.0.6": 3} {
			if err := m.ReleaseEndpoint(ctx, subnet, netip.MustParseAddr(a)); err != nil || len(m.Held(id)) != left {
				t.Errorf("%s: error %v, held %v", a, err, m.Held(id))
			}
		}
		if err := m.ReleaseEndpoint(ctx, subnet, netip.MustParseAddr("10.0.0.3")); err != nil || len(m.Held(id)) != 2 {
			t.Errorf("error %v, held %v", err, m.Held(id))
		}
		if err := m.ReleasePool(ctx, twin); err != nil {
			t.Fatal(err)
		}
		if err := m.ReleaseEndpoint(ctx, subnet, netip.MustParseAddr("10.0.0.2")); err != nil || len(m.Held(id)) != 1 {
			t.Errorf("error %v, held %v", err, m.Held(id))
		}
	})
}

func TestWhoGaveUpGetsNothing(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	id := mustPool(t, m, "10.0.0.0/24", "")
	mustRequest(t, m, gatewayOf(id, ""))
	before, applied := dump(m), store.applied
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, poolErr := m.RequestPool(ctx, PoolRequest{Space: string(Local)})
	_, addressErr := m.RequestAddress(ctx, AddressRequest{PoolID: id})
	for _, err := range []error{poolErr, addressErr, m.ReleasePool(ctx, id), m.ReleaseAddress(ctx, id, "10.0.0.1")} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
	if dump(m) != before || store.applied != applied {
		t.Error("something changed")
	}
}

func TestManyAtOnce(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	shared := mustPool(t, m, "10.0.0.0/16", "")
	var mu sync.Mutex
	holders := make(map[string]int)
	var wg sync.WaitGroup
	for caller := range 64 {
		wg.Go(func() {
			ctx := context.Background()
			own, err := m.RequestPool(ctx, PoolRequest{Space: string(Local)})
			if err != nil {
				t.Error(err)
				return
			}
			for range 50 {
				for _, id := range []string{shared, own.ID} {
					p, err := m.RequestAddress(ctx, AddressRequest{PoolID: id})
					if err != nil {
						t.Error(err)
						return
					}
					key := id + " " + p.String()
					mu.Lock()
					if other, held := holders[key]; held {
						t.Errorf("%s was given to %d and %d", key, other, caller)
					}
					holders[key] = caller
					mu.Unlock()
					if p.Addr().As4()[3]%3 == 0 {
						continue
					}
					mu.Lock()
					delete(holders, key)
					mu.Unlock()
					if err := m.ReleaseAddress(ctx, id, p.Addr().String()); err != nil {
						t.Error(err)
					}
				}
				m.Pools()
				m.Held(own.ID)
			}
			if caller%2 == 0 {
				if err := m.ReleasePool(ctx, own.ID); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(m.Pools()); n != 33 {
		t.Errorf("%d pools", n)
	}
	if got, want := dump(mustNew(t, store, Config{})), dump(m); got != want {
		t.Errorf("restarted as\n%sfrom\n%s", got, want)
	}
}

// Two callers fight for one pool: one releases it while the other asks.
func TestReleasedWhileAsked(t *testing.T) {
	m := mustNew(t, &memory{}, Config{})
	for range 200 {
		id := mustPool(t, m, "10.0.0.0/24", "")
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if _, err := m.RequestAddress(context.Background(), AddressRequest{PoolID: id}); err != nil && !IsUnknownPool(err) {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			if err := m.ReleasePool(context.Background(), id); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if n := len(m.Pools()); n != 0 {
			t.Fatalf("%d pools", n)
		}
	}
}

// In a pool of more addresses than are remembered once freed, none comes again soon, none is lost, and memory is bounded.
func TestLongRun(t *testing.T) {
	store := &memory{}
	m := mustNew(t, store, Config{})
	id := mustPool(t, m, "10.0.0.0/17", "")
	ctx := context.Background()
	for range 300 { // held for ever
		mustRequest(t, m, AddressRequest{PoolID: id})
	}
	const hosts = 1<<15 - 2
	last := make(map[string]int)
	for n := range 5 * hosts {
		a := mustRequest(t, m, AddressRequest{PoolID: id})
		if before, again := last[a]; again && n-before < freedMax-freedBatch {
			t.Fatalf("%s came again after %d", a, n-before)
		}
		last[a] = n
		if err := m.ReleaseAddress(ctx, id, strings.TrimSuffix(a, "/17")); err != nil {
			t.Fatal(err)
		}
		if remembered := len(m.pools[id].grants) - 300; remembered > freedMax+1 {
			t.Fatalf("%d freed addresses are remembered", remembered)
		}
	}
	if len(last) != hosts-300 {
		t.Errorf("%d addresses were used, want %d", len(last), hosts-300)
	}
	if got, want := dump(mustNew(t, store, Config{})), dump(m); got != want {
		t.Error("restarted differently")
	}
	// All of them can be held at once.
	for range hosts - 300 {
		mustRequest(t, m, AddressRequest{PoolID: id})
	}
	if _, err := m.RequestAddress(ctx, AddressRequest{PoolID: id}); !IsExhausted(err) {
		t.Errorf("error %v", err)
	}
}

func TestDamagedRecord(t *testing.T) {
	const pool = `{"space":"dockway-local","subnet":"10.0.0.0/24","range":"10.0.0.0/24","next":"10.0.0.1"}`
	const shared = `{"space":"dockway-local","subnet":"10.0.1.0/24","range":"10.0.1.0/24","next":"10.0.1.1","shared":true}`
	const choice = `{"serial":7}`
	for name, test := range map[string]struct{ bucket, key, value, words string }{
		"pool is no JSON":          {poolBucket, "3", "{", "pools/3"},
		"pool's key is no number":  {poolBucket, "x", pool, "pools/x"},
		"pool's key is odd":        {poolBucket, "03", pool, "pools/03"},
		"pool of the future":       {poolBucket, "8", pool, "only 7 pools"},
		"pool in no space":         {poolBucket, "3", strings.Replace(pool, "dockway-local", "", 1), "address space"},
		"pool without subnet":      {poolBucket, "3", strings.Replace(pool, `"10.0.0.0/24"`, `""`, 1), "pools/3"},
		"pool with host bits":      {poolBucket, "3", strings.Replace(pool, `"10.0.0.0/24"`, `"10.0.0.9/24"`, 1), "invalid"},
		"next is outside":          {poolBucket, "3", strings.Replace(pool, `"10.0.0.1"`, `"10.0.1.1"`, 1), "invalid"},
		"address of no pool":       {addressBucket, "4/10.0.0.1", `{"kind":"endpoint"}`, "no such pool"},
		"address is no JSON":       {addressBucket, "7/10.0.0.1", `{`, "addresses/7/10.0.0.1"},
		"address is none":          {addressBucket, "7/10.0.0", `{"kind":"endpoint"}`, "addresses/7/10.0.0"},
		"address is odd":           {addressBucket, "7//10.0.0.1", `{"kind":"endpoint"}`, "addresses/7//10.0.0.1"},
		"address is outside":       {addressBucket, "7/10.0.1.1", `{"kind":"endpoint"}`, "not in the subnet"},
		"address of unknown kind":  {addressBucket, "7/10.0.0.1", `{"kind":"guest"}`, "guest"},
		"address neither nor":      {addressBucket, "7/10.0.0.1", `{}`, "neither"},
		"address held and freed":   {addressBucket, "7/10.0.0.1", `{"kind":"endpoint","freed":3}`, "neither"},
		"claimed, not shared":      {addressBucket, "7/10.0.0.1", `{"kind":"endpoint","claimed":true}`, "shared"},
		"claimed, but freed":       {addressBucket, "6/10.0.1.1", `{"freed":3,"claimed":true}`, "shared"},
		"block is no JSON":         {blockBucket, "10.0.1.0/24 10.0.1.8/29", `{`, "blocks/10.0.1.0/24 10.0.1.8/29"},
		"block's key is odd":       {blockBucket, "10.0.1.0/24", `{}`, "blocks/10.0.1.0/24"},
		"block's subnet is none":   {blockBucket, "10.0.1 10.0.1.8/29", `{}`, "blocks/10.0.1 "},
		"block has host bits":      {blockBucket, "10.0.1.0/24 10.0.1.9/29", `{}`, "invalid"},
		"block is outside":         {blockBucket, "10.0.1.0/24 10.0.2.8/29", `{}`, "invalid"},
		"block is too great":       {blockBucket, "10.0.1.0/24 10.0.0.0/16", `{}`, "invalid"},
		"block is not shared":      {blockBucket, "10.0.0.0/24 10.0.0.8/29", `{}`, "no pool of 10.0.0.0/24 is shared"},
		"ceded is outside":         {blockBucket, "10.0.1.0/24 10.0.1.8/29", `{"ceded":["10.0.1.32/32"]}`, "ceded"},
		"ceded is nothing":         {blockBucket, "10.0.1.0/24 10.0.1.8/29", `{"ceded":[""]}`, "ceded"},
		"choice is no JSON":        {choiceBucket, choiceKey, `[]`, "pool-choice/choice"},
		"choice has an odd prefix": {choiceBucket, choiceKey, `{"serial":9,"last4":"x"}`, "pool-choice/choice"},
	} {
		store := &memory{}
		good := []Change{{choiceBucket, choiceKey, []byte(choice)}, {poolBucket, "7", []byte(pool)}, {addressBucket, "7/10.0.0.9", []byte(`{"kind":"endpoint"}`)}, {poolBucket, "6", []byte(shared)}}
		if err := store.Apply(append(good, Change{test.bucket, test.key, []byte(test.value)})...); err != nil {
			t.Fatal(err)
		}
		if _, err := New(store, nil, Config{}); err == nil || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
