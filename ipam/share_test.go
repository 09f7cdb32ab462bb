package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestBlocks(t *testing.T) {
	for _, test := range []struct {
		inner string
		bits  int
		count string
	}{
		{"10.0.0.0/8", 23, "32768"}, {"10.90.0.0/16", 26, "1024"}, {"10.90.0.0/20", 28, "256"}, {"10.90.0.0/24", 29, "32"}, {"10.90.0.0/26", 30, "16"},
		{"10.90.0.0/28", 31, "8"}, {"10.90.0.0/29", 31, "4"}, {"10.90.0.0/30", 32, "4"}, {"10.90.0.0/31", 32, "2"}, {"10.90.0.0/32", 32, "1"},
		{"fd00::/64", 104, "2^40"}, {"fd00::/112", 122, "1024"}, {"fd00::/128", 128, "1"},
	} {
		r := netip.MustParsePrefix(test.inner)
		if blockBits(r) != test.bits || blockCount(r) != test.count {
			t.Errorf("%s has %s blocks of /%d, want %s of /%d", r, blockCount(r), blockBits(r), test.count, test.bits)
		}
		seen := make(map[netip.Addr]bool)
		for n := range 50 {
			a := place("host", r, n)
			if !r.Contains(a) || netip.PrefixFrom(a, test.bits).Masked().Addr() != a {
				t.Errorf("in %s, %s is not the first address of a block", r, a)
			}
			seen[a] = true
		}
		if test.bits-r.Bits() > 7 && len(seen) < 40 {
			t.Errorf("in %s a host looks in %d places", r, len(seen))
		}
	}
}

// Two hosts give addresses out of blocks of their own; the gateway's and auxiliary addresses are the same on both.
func TestShared(t *testing.T) {
	const subnet = "10.90.0.0/16"
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	for _, h := range []*host{a, b} {
		id := mustPool(t, h.Manager, subnet, "")
		mustRequest(t, h.Manager, gatewayOf(id, "10.90.0.1"))
		mustRequest(t, h.Manager, AddressRequest{PoolID: id, Address: "10.90.0.5"})
		for range 2 { // again is no harm
			if err := h.Share(netip.MustParsePrefix("10.90.7.7/16")); err != nil {
				t.Fatal(err)
			}
		}
		if h.asks() != 0 || len(h.Blocks()) != 0 || !h.Pools()[0].Shared {
			t.Errorf("asked %v, has %v, %+v", h.asked, h.Blocks(), h.Pools()[0])
		}
		for range 70 { // more than one block
			h.mustEndpoint(t, id, "")
		}
		if blocks := h.blocks(subnet); len(blocks) != 2 || blocks[0].Bits() != 26 || h.asks() != 2 {
			t.Errorf("blocks %v, asked %v", blocks, h.asked)
		}
		for _, held := range h.Held(id) {
			if held.Kind == Endpoint && !union(h.blocks(subnet)).contains(held.Address) {
				t.Errorf("%s is in none of %v", held.Address, h.blocks(subnet))
			}
		}
	}
	never(t, a, b)
	if a.blocks(subnet)[0] == b.blocks(subnet)[0] {
		t.Errorf("both start at %s", a.blocks(subnet)[0])
	}
}

// never fails if two hosts hold one address for a container of each.
func never(t interface {
	Helper()
	Fatalf(string, ...any)
}, hosts ...*host) {
	t.Helper()
	holder := make(map[netip.Addr]string)
	for _, h := range hosts {
		mine := make(map[netip.Addr]bool) // pools of two tenants may both hold it
		for _, p := range h.Pools() {
			for _, held := range h.Held(p.ID) {
				if held.Kind != Endpoint {
					continue
				}
				if other, twice := holder[held.Address]; twice && !mine[held.Address] {
					t.Fatalf("%s is held by hosts %s and %s", held.Address, other, h.name)
				}
				holder[held.Address], mine[held.Address] = h.name, true
			}
		}
	}
}

func TestShareRefused(t *testing.T) {
	subnet := netip.MustParsePrefix("10.90.0.0/16")
	alone := mustNew(t, &memory{}, Config{})
	mustPool(t, alone, subnet.String(), "")
	if err := alone.Share(subnet); err == nil || !strings.Contains(err.Error(), "this dockway has no cluster: set JOIN, so that") {
		t.Errorf("error %v", err)
	}
	h := newParty().host(t, "a")
	if _, err := h.RequestPool(t.Context(), PoolRequest{Space: string(Global), Pool: subnet.String()}); err != nil {
		t.Fatal(err)
	}
	if err := h.Share(subnet); !IsUnknownPool(err) || !strings.Contains(err.Error(), subnet.String()) {
		t.Errorf("error %v", err)
	}
	mustPool(t, h.Manager, subnet.String(), "")
	h.store.full = true
	before := dump(h.Manager)
	if err := h.Share(subnet); !errors.Is(err, errFull) || dump(h.Manager) != before {
		t.Errorf("error %v, now\n%s", err, dump(h.Manager))
	}
	h.store.full = false
	if err := h.Share(subnet); err != nil {
		t.Error(err)
	}
	if infos := h.Pools(); infos[0].Shared || !infos[1].Shared {
		t.Errorf("pools %+v", infos)
	}
	// On record it is shared also when there is no cluster any more.
	alone = mustNew(t, h.store, Config{})
	if _, err := alone.RequestAddress(t.Context(), endpointOf(alone.Pools()[1].ID, "", "02:42:00:00:00:01", "")); !errors.Is(err, errNoCluster) {
		t.Errorf("error %v", err)
	}
}

// Every address of every host's range is given once, and then it is said who has the subnet.
func TestSharedExhausted(t *testing.T) {
	for _, test := range []struct {
		subnet, inner string
		total         int
	}{
		{"10.90.0.0/24", "", 253}, {"10.90.0.0/24", "10.90.0.64/27", 32}, {"10.90.0.0/29", "", 5}, {"10.90.0.0/30", "", 1}, {"10.90.0.0/31", "", 1},
		{"fd00::/120", "", 254}, {"fd00::/64", "fd00::8000/122", 64},
	} {
		c := newParty()
		var hosts []*host
		var pools []string
		for n := range 3 {
			h := c.host(t, fmt.Sprintf("host%d", n))
			hosts, pools = append(hosts, h), append(pools, h.network(t, test.subnet, test.inner))
		}
		given, failed := 0, 0
		for n := 0; failed < 3; n++ {
			a, err := hosts[n%3].endpoint(pools[n%3], "", "")
			if err == nil {
				given, failed = given+1, 0
				if test.inner != "" && !netip.MustParsePrefix(test.inner).Contains(a) {
					t.Errorf("%s is not in %s", a, test.inner)
				}
				continue
			}
			if !IsExhausted(err) || !strings.Contains(err.Error(), "subnet "+test.subnet) {
				t.Fatal(err)
			}
			failed++
		}
		// Each host asked until it got nothing more, so nothing is left in anybody's blocks.
		if given != test.total {
			t.Errorf("%s in %s: %d addresses were given, want %d", test.inner, test.subnet, given, test.total)
		}
		never(t, hosts...)
	}
	c := newParty()
	a, b := c.host(t, "alpha"), c.host(t, "beta")
	first, second := a.network(t, "10.90.0.0/29", ""), b.network(t, "10.90.0.0/29", "")
	for range 5 {
		a.mustEndpoint(t, first, "")
	}
	_, err := b.endpoint(second, "", "")
	const want = "subnet 10.90.0.0/29 is exhausted for this host: of the 4 blocks of /31 in 10.90.0.0/29 it has 0, with no address left, and other hosts (such as alpha) have 3 blocks and addresses"
	if !IsExhausted(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %s", err, want)
	}
	if b.asks() != claimAsks {
		t.Errorf("asked %v", b.asked)
	}
}

// What other hosts are known to have is not asked for while there is something else.
func TestTakenIsAvoided(t *testing.T) {
	for _, name := range strings.Split("bcdefghij", "") {
		c := newParty()
		a, b := c.host(t, "a"), c.host(t, name)
		first, second := a.network(t, "10.90.0.0/28", ""), b.network(t, "10.90.0.0/28", "")
		for range 11 {
			a.mustEndpoint(t, first, "")
		}
		b.mustEndpoint(t, second, "")
		if b.asks() != 1 {
			t.Errorf("host %s asked %v", name, b.asked)
		}
	}
}

// An address that is asked for is given out of an own block, or claimed by itself, until it is released.
func TestSharedGiven(t *testing.T) {
	const subnet = "10.90.0.0/16"
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	first, second := a.network(t, subnet, ""), b.network(t, subnet, "")
	held := a.mustEndpoint(t, first, "")
	block := a.blocks(subnet)[0]
	free := lastAddr(block).Prev()

	a.mustEndpoint(t, first, free.Next().String())
	if a.asks() != 1 {
		t.Errorf("for an address of its own block it asked %v", a.asked)
	}
	for range 2 { // who holds it gets it again
		if got, err := a.endpoint(first, "10.90.250.9", "web"); err != nil || got.String() != "10.90.250.9" {
			t.Fatalf("got %s, %v", got, err)
		}
	}
	if want := []netip.Prefix{block, netip.MustParsePrefix("10.90.250.9/32")}; !slices.Equal(a.blocks(subnet), want) || a.asks() != 2 {
		t.Errorf("has %v, want %v; asked %v", a.blocks(subnet), want, a.asked)
	}
	for _, other := range []string{held.String(), "10.90.250.9"} {
		_, err := b.endpoint(second, other, "")
		if want := fmt.Sprintf("address %s of subnet %s is taken: it is held by host a", other, subnet); !IsTaken(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	for _, bad := range []string{"10.90.0.0", "10.90.255.255", "10.91.0.1", "10.90.0.1"} {
		if _, err := b.endpoint(second, bad, ""); !IsInvalid(err) && !IsTaken(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if len(b.blocks(subnet)) != 0 {
		t.Errorf("refused, b has %v", b.blocks(subnet))
	}

	// One that the other host does not hold is given within its block, and not by itself.
	if got := b.mustEndpoint(t, second, free.String()); got != free {
		t.Fatalf("got %s", got)
	}
	if _, err := a.endpoint(first, free.String(), ""); !IsTaken(err) || !strings.Contains(err.Error(), "host b") {
		t.Errorf("error %v", err)
	}
	for range 70 {
		if got := a.mustEndpoint(t, first, ""); got == free {
			t.Fatalf("%s is held by host b", got)
		}
	}
	never(t, a, b)

	// Released, it is anybody's again.
	if err := errors.Join(b.ReleaseAddress(t.Context(), second, free.String()), a.ReleaseAddress(t.Context(), first, "10.90.250.9")); err != nil {
		t.Fatal(err)
	}
	if len(b.Own(netip.MustParsePrefix(subnet))) != 0 || len(b.Blocks()) != 0 || len(a.blocks(subnet)) != 2 {
		t.Errorf("b has %v and %v, a has %v", b.Own(netip.MustParsePrefix(subnet)), b.Blocks(), a.blocks(subnet))
	}
	a.mustEndpoint(t, first, free.String())
	b.mustEndpoint(t, second, "10.90.250.9")
	never(t, a, b)
}

// With a full disk nothing is claimed that stays so.
func TestSharedDiskFull(t *testing.T) {
	subnet := netip.MustParsePrefix("10.90.0.0/16")
	h := newParty().host(t, "a")
	id := h.network(t, subnet.String(), "")
	before := dump(h.Manager)
	h.store.full = true
	for _, address := range []string{"", "10.90.3.7"} {
		if _, err := h.endpoint(id, address, ""); !errors.Is(err, errFull) {
			t.Errorf("error %v", err)
		}
	}
	if dump(h.Manager) != before || len(h.Own(subnet)) != 0 || h.asks() != 2 {
		t.Errorf("now\n%sand the cluster has %v", dump(h.Manager), h.Own(subnet))
	}
	h.store.full = false
	h.mustEndpoint(t, id, "")
	h.mustEndpoint(t, id, "10.90.3.7")
	before = dump(h.Manager)
	h.store.full = true
	if err := errors.Join(h.ReleaseAddress(t.Context(), id, "10.90.3.7")); !errors.Is(err, errFull) || dump(h.Manager) != before {
		t.Errorf("error %v", err)
	}
	if err := h.ReleasePool(t.Context(), id); !errors.Is(err, errFull) || dump(h.Manager) != before || len(h.Own(subnet)) != 2 {
		t.Errorf("error %v", err)
	}
	h.store.full = false
	if err := h.ReleasePool(t.Context(), id); err != nil || len(h.Own(subnet)) != 0 || len(h.Blocks()) != 0 || len(h.store.buckets[blockBucket]) != 0 {
		t.Errorf("error %v, has %v, record %v", err, h.Own(subnet), h.store.buckets[blockBucket])
	}
}

// Networks of two tenants have one subnet and the same blocks, but addresses of their own.
func TestSharedTenants(t *testing.T) {
	const subnet = "10.90.0.0/16"
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	first, second := a.network(t, subnet, ""), a.network(t, subnet, "")
	other := b.network(t, subnet, "")
	one, two := a.mustEndpoint(t, first, ""), a.mustEndpoint(t, second, "")
	if one != two || a.asks() != 1 {
		t.Errorf("got %s and %s, asked %v", one, two, a.asked)
	}
	// A pool that is asked for is not shared before its own network is made.
	third := mustPool(t, a.Manager, subnet, "")
	if a.Pools()[2].Shared {
		t.Error("shared before its time")
	}
	for _, pool := range []string{first, second} {
		a.mustEndpoint(t, pool, "10.90.200.2")
	}
	for i, pool := range []string{third, first} {
		if err := a.ReleasePool(t.Context(), pool); err != nil || len(a.blocks(subnet)) != 2 {
			t.Errorf("%d: error %v, blocks %v", i, err, a.blocks(subnet))
		}
	}
	if _, err := b.endpoint(other, "10.90.200.2", ""); !IsTaken(err) {
		t.Errorf("error %v", err)
	}
	a.start(t)
	if err := a.ReleaseAddress(t.Context(), second, "10.90.200.2"); err != nil || len(a.blocks(subnet)) != 1 {
		t.Errorf("error %v, blocks %v", err, a.blocks(subnet))
	}
	b.mustEndpoint(t, other, "10.90.200.2")
	if err := a.ReleasePool(t.Context(), second); err != nil || len(a.Blocks())+len(a.Own(netip.MustParsePrefix(subnet))) != 0 {
		t.Errorf("error %v, blocks %v", err, a.Blocks())
	}
	// One that makes way for a surplus twin gives up its blocks too.
	a.network(t, subnet, "")
	a.mustEndpoint(t, a.Pools()[0].ID, "")
	for range twinsMax {
		mustPool(t, a.Manager, subnet, "")
	}
	if len(a.Blocks()) != 0 {
		t.Errorf("blocks %v", a.Blocks())
	}
}

// Other ranges of one subnet have blocks of other sizes.
func TestSharedRanges(t *testing.T) {
	const subnet = "10.90.0.0/16"
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	wide, narrow := a.network(t, subnet, ""), b.network(t, subnet, "10.90.3.0/28")
	both := b.network(t, subnet, "")
	for range 40 {
		a.mustEndpoint(t, wide, "")
		b.mustEndpoint(t, both, "")
	}
	for range 16 {
		if got := b.mustEndpoint(t, narrow, ""); !netip.MustParsePrefix("10.90.3.0/28").Contains(got) {
			t.Errorf("got %s", got)
		}
	}
	if _, err := b.endpoint(narrow, "", ""); !IsExhausted(err) {
		t.Errorf("error %v", err)
	}
	never(t, a, b)
}

// The next block is claimed before it is needed, when less than a quarter of one is left.
func TestClaimAhead(t *testing.T) {
	const subnet = "fd00::/112" // blocks of 64
	h := newParty().host(t, "a")
	id := h.network(t, subnet, "")
	ahead := func(want int) {
		t.Helper()
		if err := h.ClaimAhead(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(h.blocks(subnet)); n != want {
			t.Fatalf("%d blocks, want %d", n, want)
		}
	}
	ahead(0) // nobody has asked for an address
	for len(h.Due()) > 0 {
		<-h.Due()
	}
	var all []netip.Addr
	for range 48 {
		all = append(all, h.mustEndpoint(t, id, ""))
	}
	if len(h.Due()) != 1 {
		t.Error("ClaimAhead is not due")
	}
	ahead(1)
	all = append(all, h.mustEndpoint(t, id, ""))
	ahead(2)
	ahead(2)
	asked := h.asks()
	for range 64 {
		all = append(all, h.mustEndpoint(t, id, ""))
	}
	if h.asks() != asked {
		t.Errorf("asked %v while there was a spare block", h.asked)
	}
	for _, a := range all { // free blocks stay
		if err := h.ReleaseAddress(t.Context(), id, a.String()); err != nil {
			t.Fatal(err)
		}
	}
	ahead(2)
	// Addresses come again as late as possible, and no further block is needed for that.
	last := make(map[netip.Addr]int)
	for n := range 1000 {
		a := h.mustEndpoint(t, id, "")
		if before, again := last[a]; again && n-before < 128 {
			t.Fatalf("%s came again after %d", a, n-before)
		}
		last[a] = n
		if err := h.ReleaseAddress(t.Context(), id, a.String()); err != nil {
			t.Fatal(err)
		}
		ahead(2)
	}
}

// While a block is claimed the pool is not locked, and who waits for one does not claim another.
func TestClaimedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const subnet = "10.90.0.0/16"
		c := newParty()
		h := c.host(t, "a")
		id := h.network(t, subnet, "")
		given := h.mustEndpoint(t, id, "10.90.9.9")
		c.before = func(string, netip.Prefix) error {
			time.Sleep(time.Second)
			return nil
		}
		// Some claims are heard of while others are granted, but not heard of yet.
		c.after = func(block netip.Prefix) { time.Sleep(time.Duration(block.Addr().As4()[3]) * time.Millisecond) }
		asked := h.asks()
		start := time.Now()
		var wg sync.WaitGroup
		for range 40 {
			wg.Go(func() {
				if _, err := h.endpoint(id, "", ""); err != nil {
					t.Error(err)
				}
			})
		}
		for n := range 10 { // claimed side by side
			wg.Go(func() {
				if _, err := h.endpoint(id, fmt.Sprintf("10.90.10.%d", n), ""); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			if err := h.ClaimAhead(t.Context()); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if _, err := h.RequestAddress(ctx, endpointOf(id, "", "02:42:00:00:00:01", "")); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		if n := len(h.Held(id)); n != 2 { // the gateway and 10.90.9.9
			t.Errorf("%d addresses are held", n)
		}
		if err := h.ReleaseAddress(t.Context(), id, given.String()); err != nil {
			t.Error(err)
		}
		mustRequest(t, h.Manager, AddressRequest{PoolID: id, Address: "10.90.0.7"})
		if time.Since(start) != 0 {
			t.Errorf("waited %s for a claim", time.Since(start))
		}
		wg.Wait()
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("took %s", took)
		}
		if blocks := h.blocks(subnet); len(blocks) > 2+10 || h.asks()-asked != len(blocks) {
			t.Errorf("has %v, asked %v", blocks, h.asked[asked:])
		}
		own := h.Own(netip.MustParsePrefix(subnet))
		slices.SortFunc(own, netip.Prefix.Compare)
		if !slices.Equal(own, h.blocks(subnet)) {
			t.Errorf("the cluster has %v, the record %v", own, h.blocks(subnet))
		}
	})
}

// A pool that is released while a block is claimed for it leaves nothing claimed; nor does an address whose caller is gone.
func TestReleasedWhileClaiming(t *testing.T) {
	for _, address := range []string{"", "10.90.9.9"} {
		for _, gone := range []string{"pool", "pool for good", "caller"} {
			subnet := netip.MustParsePrefix("10.90.0.0/16")
			c := newParty()
			h := c.host(t, "a")
			id := h.network(t, subnet.String(), "")
			ctx, cancel := context.WithCancel(t.Context())
			var again string
			c.before = func(string, netip.Prefix) error {
				c.before = nil
				if gone == "caller" {
					return nil
				}
				if err := h.ReleasePool(t.Context(), id); err != nil {
					return err
				}
				if gone == "pool for good" {
					return nil
				}
				again = h.network(t, subnet.String(), "") // the same subnet, while the claim is under way
				return nil
			}
			if gone == "caller" {
				h.Manager.cluster = late{h.guest, cancel}
			}
			_, err := h.RequestAddress(ctx, endpointOf(id, address, "02:42:00:00:00:01", ""))
			cancel()
			if want := map[string]bool{"pool": IsUnknownPool(err), "pool for good": IsUnknownPool(err), "caller": errors.Is(err, context.Canceled)}; !want[gone] {
				t.Errorf("%s, %s gone: error %v", address, gone, err)
			}
			if err := h.ClaimAhead(t.Context()); err != nil {
				t.Error(err)
			}
			if own, has := h.Own(subnet), h.blocks(subnet.String()); !slices.Equal(own, has) || (address != "" || gone == "pool for good") && len(own) != 0 {
				t.Errorf("%s, %s gone: the cluster has %v, the record %v", address, gone, own, has)
			}
			h.start(t)
			if again != "" {
				h.mustEndpoint(t, again, "")
			}
		}
	}
}

// late is a cluster that answers a claim when its caller has just gone.
type late struct {
	*guest
	cancel func()
}

func (l late) Claim(ctx context.Context, subnet, block netip.Prefix) error {
	defer l.cancel()
	return l.guest.Claim(ctx, subnet, block)
}

// What other hosts claim meanwhile is tried elsewhere, not for ever; what fails otherwise is an error.
func TestClaimRefused(t *testing.T) {
	const subnet = "10.90.0.0/16"
	c := newParty()
	h := c.host(t, "a")
	id := h.network(t, subnet, "")
	refusals := 5
	c.before = func(_ string, block netip.Prefix) error {
		if refusals--; refusals >= 0 {
			return TakenError{Block: block, Host: "b"}
		}
		return nil
	}
	h.mustEndpoint(t, id, "")
	if n := len(h.blocks(subnet)); n != 1 {
		t.Errorf("%d blocks", n)
	}
	// What is refused is not asked for again, though the cluster does not list it.
	few := netip.MustParsePrefix("10.91.0.0/28") // 8 blocks of 2
	last := netip.MustParsePrefix("10.91.0.14/31")
	for n := range 8 {
		for _, hint := range []netip.Prefix{{}, netip.MustParsePrefix("10.91.0.0/29")} {
			var asked []netip.Prefix
			h := newParty().host(t, fmt.Sprintf("host%d", n))
			h.party.before = func(_ string, block netip.Prefix) error {
				asked = append(asked, block)
				if block != last {
					return TakenError{Block: hint, Host: "b"}
				}
				return nil
			}
			h.mustEndpoint(t, h.network(t, few.String(), ""), "")
			distinct := union(asked)
			within := hint.IsValid() && len(union([]netip.Prefix{hint}).meeting(asked)) > 1
			if len(distinct) != len(asked) || within {
				t.Errorf("refused %s, it asked %v", hint, asked)
			}
		}
	}
	c.before = func(_ string, block netip.Prefix) error {
		refusals--
		return TakenError{Block: block, Host: "b"}
	}
	fresh := c.host(t, "fresh")
	id = fresh.network(t, subnet, "")
	refusals = 1000
	if _, err := fresh.endpoint(id, "", ""); err == nil || IsExhausted(err) || IsTaken(err) || !strings.Contains(err.Error(), "(b): try again") || refusals != 1000-claimTries {
		t.Errorf("after %d refusals: error %v", 1000-refusals, err)
	}
	c.before = func(string, netip.Prefix) error { return errCut }
	for _, address := range []string{"", "10.90.9.9"} {
		if _, err := fresh.endpoint(id, address, ""); !errors.Is(err, errCut) || !strings.Contains(err.Error(), "of subnet 10.90.0.0/16") {
			t.Errorf("error %v", err)
		}
	}
	if err := fresh.ClaimAhead(t.Context()); err != nil || len(fresh.Blocks()) != 0 {
		t.Errorf("error %v, has %v", err, fresh.Blocks())
	}
}

// A host that restarts, even alone, gives of its own blocks without asking, but not what others have within them.
func TestSharedRestart(t *testing.T) {
	subnet := netip.MustParsePrefix("10.90.0.0/24") // blocks of 8
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	first, second := a.network(t, subnet.String(), ""), b.network(t, subnet.String(), "")
	a.mustEndpoint(t, first, "")
	block := a.blocks(subnet.String())[0]
	<-a.Due()
	ceded := b.mustEndpoint(t, second, lastAddr(block).String())
	if len(a.Due()) != 1 {
		t.Error("what was ceded is not to be recorded")
	}
	single := a.mustEndpoint(t, first, lastAddr(b.taken0(t, block)).String())
	<-a.Due()
	if err := a.ClaimAhead(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := a.Blocks()
	a.start(t)
	if got := a.Blocks(); fmt.Sprint(got) != fmt.Sprint(before) || !slices.Contains(got[subnet], netip.PrefixFrom(single, 32)) {
		t.Errorf("on record %v, want %v", got, before)
	}
	c.side["a"] = 1
	a.own, a.taken = map[claim]bool{}, map[claim]string{}
	asked := a.asks()
	for a.asks() == asked {
		if got := a.mustEndpoint(t, first, ""); a.asks() == asked && (!block.Contains(got) || got == ceded) {
			t.Fatalf("alone, %s of %s was given", got, block)
		}
	}
	if !a.Busy(subnet, netip.PrefixFrom(single, 32)) || !a.Busy(subnet, block) || a.Busy(subnet, netip.PrefixFrom(ceded, 32)) || a.Busy(netip.MustParsePrefix("10.91.0.0/24"), block) {
		t.Error("what is held is not busy, or what is not is")
	}
	// It claims again what the cluster has lost.
	if err := a.ClaimAhead(t.Context()); err != nil {
		t.Fatal(err)
	}
	own := a.Own(subnet)
	slices.SortFunc(own, netip.Prefix.Compare)
	if !slices.Equal(own, a.Blocks()[subnet]) {
		t.Errorf("the cluster has %v, the record %v", own, a.Blocks()[subnet])
	}
	// It does not take what it has not been told of for given up.
	a.start(t)
	if _, kept := a.shares[subnet].ceded[netip.PrefixFrom(ceded, 32)]; !kept {
		t.Errorf("%s is held by host b, and on record is but %v", ceded, a.shares[subnet].ceded)
	}
	// Told what the other has, and then that it has it no more, it gives it.
	c.side["a"] = 0
	c.tell()
	if err := a.ClaimAhead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.ReleaseAddress(t.Context(), second, ceded.String()); err != nil {
		t.Fatal(err)
	}
	if err := a.ClaimAhead(t.Context()); err != nil {
		t.Fatal(err)
	}
	asked = a.asks()
	if a.mustEndpoint(t, first, ceded.String()); a.asks() != asked {
		t.Errorf("for an address of its block it asked %v", a.asked[asked:])
	}
	never(t, a, b)
}

// taken0 is a block that neither this host nor another has.
func (g *guest) taken0(t *testing.T, not netip.Prefix) netip.Prefix {
	t.Helper()
	p, ok := union([]netip.Prefix{not, netip.MustParsePrefix("10.90.0.0/29"), netip.MustParsePrefix("10.90.0.248/29")}).free(netip.MustParsePrefix("10.90.0.0/24"), 29, netip.MustParseAddr("10.90.0.0"))
	if !ok {
		t.Fatal("no block is free")
	}
	return p
}

// In a partition both sides may claim one block. At the heal one of them loses it: it says so, and gives nothing of it any more.
func TestPartition(t *testing.T) {
	subnet := netip.MustParsePrefix("10.90.0.0/29") // 4 blocks of 2, of which one has but the gateway
	c := newParty()
	a, b := c.host(t, "a"), c.host(t, "b")
	first, second := a.network(t, subnet.String(), ""), b.network(t, subnet.String(), "")
	c.side["b"] = 1
	for range 5 {
		a.mustEndpoint(t, first, "")
		b.mustEndpoint(t, second, "")
	}
	c.side["b"] = 0
	c.tell()
	const hers, his = "10.90.0.4", "10.90.0.5" // of b, and of a alone, from now on
	if err := errors.Join(a.ReleaseAddress(t.Context(), first, hers), b.ReleaseAddress(t.Context(), second, his)); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"", his} {
		if got, err := b.endpoint(second, address, ""); err == nil {
			t.Errorf("%s was given, which is host a's", got)
		}
	}
	err := b.ClaimAhead(t.Context())
	if held := (TakenError{}); !errors.As(err, &held) || held.Host != "a" || !strings.Contains(err.Error(), "is no longer this host's") {
		t.Errorf("error %v", err)
	}
	// What its containers have, it has by itself; of that, it tells what a's have too.
	if held := b.Blocks()[subnet]; len(held) != 4 || slices.ContainsFunc(held, func(p netip.Prefix) bool { return !p.IsSingleIP() }) || len(a.Blocks()[subnet]) != 3 {
		t.Errorf("a has %v, b has %v", a.Blocks(), b.Blocks())
	}
	if err := a.ClaimAhead(t.Context()); err != nil {
		t.Error(err)
	}
	if err := b.ClaimAhead(t.Context()); err == nil || strings.Count(err.Error(), "is held by host a") != 3 || strings.Contains(err.Error(), "no longer") {
		t.Errorf("error %v", err)
	}
	b.start(t)
	if held := b.Blocks()[subnet]; len(held) != 4 {
		t.Errorf("on record is %v", held)
	}
	for _, address := range []string{"", hers} {
		if got, err := a.endpoint(first, address, ""); err == nil {
			t.Errorf("%s was given, which a container of host b has", got)
		}
	}
	if err := b.ReleaseAddress(t.Context(), second, hers); err != nil {
		t.Fatal(err)
	}
	if got := a.mustEndpoint(t, first, ""); got.String() != hers {
		t.Errorf("%s was given, and %s is free", got, hers)
	}
}

// Many containers on many hosts at once: no address is given twice, and no more blocks are claimed than needed.
func TestSharedManyAtOnce(t *testing.T) {
	const subnet, each = "10.90.0.0/20", 64
	c := newParty()
	var hosts []*host
	var wg sync.WaitGroup
	for n := range 8 {
		h := c.host(t, fmt.Sprintf("host%d", n))
		hosts = append(hosts, h)
		pool := h.network(t, subnet, "")
		for caller := range each {
			wg.Go(func() {
				address := ""
				if caller%8 == 0 { // the same ones on all hosts
					address = fmt.Sprintf("10.90.14.%d", caller)
				}
				a, err := h.endpoint(pool, address, "")
				if err != nil && !(address != "" && IsTaken(err)) {
					t.Error(err)
				}
				if err == nil && caller%3 == 0 {
					if err := h.ReleaseAddress(context.Background(), pool, a.String()); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Go(func() {
			for range 10 {
				if err := h.ClaimAhead(context.Background()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	never(t, hosts...)
	for _, h := range hosts {
		blocks := 0
		for _, b := range h.blocks(subnet) {
			if !b.IsSingleIP() {
				blocks++
			}
		}
		if blocks > each/16+3 { // the first and the last may be a part, and one is spare
			t.Errorf("host %s has %d blocks of 16 for %d containers", h.name, blocks, each)
		}
		own := h.Own(netip.MustParsePrefix(subnet))
		slices.SortFunc(own, netip.Prefix.Compare)
		if !slices.Equal(own, h.blocks(subnet)) {
			t.Errorf("host %s: the cluster has %v, the record %v", h.name, own, h.blocks(subnet))
		}
		if got, want := dump(mustNew(t, h.store, Config{})), dump(h.Manager); got != want {
			t.Errorf("restarted as\n%sfrom\n%s", got, want)
		}
	}
}
