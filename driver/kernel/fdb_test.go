package kernel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// remotes are entries of many endpoints on other hosts: one of the FDB for each, and with neighbours
// one of those too.
func remotes(n int, neighbours bool) []plan.Object {
	var fdb, near []plan.Object
	for i := range n {
		mac := plan.MAC{2, 91, 0, byte(i >> 16), byte(i >> 8), byte(i)}
		fdb = append(fdb, plan.FDB{Link: "dwo1", MAC: mac, VTEP: netip.AddrFrom4([4]byte{198, 18, 1, byte(i)})})
		if neighbours {
			near = append(near, plan.Neighbour{Link: "dwb1", Address: netip.AddrFrom4([4]byte{198, byte(19 - i>>16), byte(i >> 8), byte(i)}), MAC: mac})
		}
	}
	return within(tenant, append(fdb, near...)...)
}

func bare(t testing.TB) *overlayHost {
	t.Helper()
	h := newOverlayHost(t)
	put(t, h.k, base(tenant, testVNI, netip.MustParseAddr("198.18.0.1"))...)
	return h
}

// TestManyEntries: entries by the ten thousand do not tick, are found as they were put, and those that
// fail are named.
func TestManyEntries(t *testing.T) {
	h := bare(t)
	ticks, err := h.k.Watch(ctx())
	if err != nil {
		t.Fatal(err)
	}
	many := remotes(20_000, true)
	do(t, h.k, add(many...)...)
	silent(t, ticks, "what we did ourselves")
	all := append(base(tenant, testVNI, netip.MustParseAddr("198.18.0.1")), many...)
	complete(t, h.k, "put", all...)
	for _, i := range []int{0, 255, 256, 19_999} { // moved to another host, and back
		w := many[i].(plan.Within)
		f := w.Object.(plan.FDB)
		f.VTEP = netip.MustParseAddr("198.18.0.99")
		do(t, h.k, replace(within(tenant, f)...)...)
		holds(t, h.k, within(tenant, f)...)
	}
	do(t, h.k, replace(many...)...)
	complete(t, h.k, "put again", all...)
	silent(t, ticks, "what we did ourselves, again")
	h.in(t, tenant, "bridge fdb del 02:5b:00:00:01:00 dev dwo1 self")
	hears(t, ticks, "one of many that was deleted")
	calm(ticks)
	do(t, h.k, plan.Diff(observeAll(t, h.k, shared(all)...), plan.Of(all...))...)
	do(t, h.k, remove(many...)...)
	do(t, h.k, remove(many...)...) // again is fine
	silent(t, ticks, "what we deleted ourselves")
	if got := h.in(t, tenant, "bridge fdb show dev dwo1") + h.in(t, tenant, "ip neigh show nud permanent"); strings.Count(got, "\n") != 1 { // the device's own MAC
		t.Errorf("left: %.300s", got)
	}
	broken := within(tenant, plan.FDB{Link: "dwo1", MAC: plan.MAC{1, 0, 0, 0, 0, 1}, VTEP: netip.MustParseAddr("fd00::1")})
	err = h.k.Do(ctx(), add(append(many[:300:300], broken...)...))
	if want := broken[0].(plan.Within).Object.String(); err == nil || len(err.Error()) < len(want) || !containsAll(err.Error(), "add "+want, tenant) {
		t.Errorf("an entry that the kernel refuses: %v", err)
	}
	if err := h.k.Do(ctx(), add(within(tenant, plan.FDB{Link: "dwo9", MAC: innerMAC(1)})...)); err == nil {
		t.Error("an entry on a link that is not there")
	}
	if err := h.k.Do(ctx(), add(plan.FDB{Link: "dwo9", MAC: innerMAC(1)})); err == nil {
		t.Error("an entry in the host")
	}
}

// BenchmarkFDB loads 100,000 FDB entries, and neighbours beside them, into a namespace.
func BenchmarkFDB(b *testing.B) {
	const n = 100_000
	for name, neighbours := range map[string]bool{"fdb": false, "fdb-and-neighbours": true} {
		for _, watched := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/watched=%t", name, watched), func(b *testing.B) {
				h := bare(b)
				if watched {
					ticks, err := h.k.Watch(ctx())
					if err != nil {
						b.Fatal(err)
					}
					defer func() {
						select {
						case <-ticks:
							b.Log("it ticked")
						case <-time.After(quiet):
						}
					}()
				}
				ops := add(remotes(n, neighbours)...)
				b.ResetTimer()
				for b.Loop() {
					do(b, h.k, ops...)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(ops)), "ns/entry")
			})
		}
	}
}

// BenchmarkObserveEntries looks 100,000 FDB and neighbour entries over, and one of them up.
func BenchmarkObserveEntries(b *testing.B) {
	h := bare(b)
	many := remotes(100_000, true)
	do(b, h.k, add(many...)...)
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			observeAll(b, h.k)
		}
	})
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			observe(b, h.k, many[77])
		}
	})
	later := openIn(b, h.place, kernel.Config{Namespaces: h.dir, NamespaceTables: namespaceTables()})
	b.Run("later", func(b *testing.B) {
		for b.Loop() {
			observe(b, later, many[77])
		}
	})
}
