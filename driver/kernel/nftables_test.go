package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

func TestTableDisturbed(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	inet, bridge := plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()}
	do(t, k, add(inet, bridge)...)
	kept := []plan.Object{
		plan.Element{Set: wards, Elem: "10.0.0.2"},
		plan.Element{Set: ports, Elem: "192.0.2.1 . tcp . 80", Data: "10.0.0.2 . 8080"},
	}
	do(t, k, add(kept...)...)
	run(t, "nft", "add element inet dockway seen { 10.0.0.7 . 53 }")
	for _, change := range []string{
		"flush chain inet dockway forward",
		"add rule inet dockway forward accept",
		"insert rule inet dockway forward accept",
		"add chain inet dockway extra",
		"add chain inet dockway extra { type filter hook input priority 0; }",
		"add set inet dockway extra { type ipv4_addr; }",
		"delete rule inet dockway postrouting handle HANDLE",
		"replace rule inet dockway postrouting handle HANDLE ip saddr != @wards masquerade",
		"replace rule inet dockway postrouting handle HANDLE ip saddr @wards counter masquerade",
		"replace rule inet dockway postrouting handle HANDLE ip saddr @wards masquerade comment \"mine\"",
		"replace rule inet dockway output handle HANDLE fib daddr type { local, multicast } goto publish",
		"replace rule inet dockway output handle HANDLE fib daddr type { local } goto publish",
		"replace rule inet dockway output handle HANDLE fib daddr type != { local, broadcast } goto publish",
		"add chain inet dockway forward { policy drop; }",
		"delete table inet dockway",
		"flush ruleset",
	} {
		if before, chain, ok := strings.Cut(change, " handle HANDLE"); ok {
			fields := strings.Fields(before)
			change = before + " handle " + lastHandle(t, fields[len(fields)-1]) + chain
		}
		run(t, "nft", change)
		observed := observe(t, k, inet)
		diff := plan.Diff(observed, plan.Of(inet))
		if len(diff) != 1 {
			t.Errorf("not noticed: %s", change)
			continue
		}
		if diff[0].Verb == plan.Replace && !strings.Contains(diff[0].Old.(plan.Table).Table.String(), "departs") {
			t.Errorf("%s: %v", change, diff[0].Old)
		}
		do(t, k, diff...)
		holds(t, k, inet)
		if diff[0].Verb == plan.Add {
			if got := observe(t, k, kept...); len(got) > 0 {
				t.Errorf("%s: a table made anew has elements: %v", change, got)
			}
			do(t, k, add(kept...)...)
			run(t, "nft", "add element inet dockway seen { 10.0.0.7 . 53 }")
		}
		holds(t, k, kept...)
		if got := run(t, "nft", "list set inet dockway seen"); !strings.Contains(got, "10.0.0.7 . 53 expires") {
			t.Errorf("%s: what packets have left is lost: %s", change, got)
		}
	}
	do(t, k, remove(inet, bridge)...)
	do(t, k, remove(inet, bridge)...) // again is fine
	if got := run(t, "nft", "list ruleset"); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// lastHandle is the handle of the last rule of a chain.
func lastHandle(t *testing.T, chain string) string {
	t.Helper()
	handle := ""
	for _, line := range strings.Split(run(t, "nft", "-a", "list", "chain", "inet", "dockway", chain), "\n") {
		if _, h, ok := strings.Cut(line, "# handle "); ok && !strings.HasSuffix(line, "{ # handle "+h) {
			handle = h
		}
	}
	return handle
}

func TestForeignTables(t *testing.T) {
	inNamespace(t)
	run(t, "nft", "add table inet other; add table ip dockway; add chain ip dockway c; add set inet other wards { type ipv4_addr; }; add element inet other wards { 10.0.0.2 }")
	before := run(t, "nft", "list ruleset")
	k := open(t, kernel.Config{Tables: tables()})
	if got := observeAll(t, k); len(got) > 0 {
		t.Errorf("observed what is not ours: %s", got)
	}
	inet, bridge := plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()}
	e := plan.Element{Set: wards, Elem: "10.0.0.2"}
	do(t, k, add(inet, bridge, e)...)
	do(t, k, replace(inet, bridge)...)
	do(t, k, remove(e, inet, bridge)...)
	if after := run(t, "nft", "list ruleset"); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
}

func TestElements(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	inet, bridge := plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()}
	objects := []plan.Object{
		// The order of a plan: elements of guards come before the tables that they are in.
		plan.Element{Set: wards, Elem: "10.0.0.2"},
		inet, bridge,
		plan.Element{Set: members, Elem: "dwb1 . 10.0.0.2"},
		plan.Element{Set: members6, Elem: "dwb1 . fd00::2"},
		plan.Element{Set: links, Elem: "eth0"},
		plan.Element{Set: ports, Elem: "192.0.2.1 . tcp . 80", Data: "10.0.0.2 . 8080"},
		plan.Element{Set: ports, Elem: "192.0.2.1 . sctp . 80", Data: "10.0.0.2 . 8080"},
		plan.Element{Set: ports6, Elem: "2001:db8::1 . udp . 53", Data: "fd00::2 . 53"},
		plan.Element{Set: anyPort, Elem: "udp . 53", Data: "10.0.0.2 . 53"},
		plan.Element{Set: senders, Elem: "dwv1 . 02:02:00:00:00:01 . 10.0.0.2"},
		plan.Element{Set: senders6, Elem: "dwv1 . 02:02:00:00:00:01 . ::"},
		plan.Element{Set: stations, Elem: "dwv1 . 02:02:00:00:00:01"},
	}
	do(t, k, add(objects...)...)
	holds(t, k, objects...)
	if all := observeAll(t, k); len(plan.Diff(all, plan.Of(objects...))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	for _, want := range []string{
		`192.0.2.1 . tcp . 80 : 10.0.0.2 . 8080`, `2001:db8::1 . udp . 53 : fd00::2 . 53`, `"dwb1" . fd00::2`, `"eth0"`,
	} {
		if got := run(t, "nft", "list ruleset"); !strings.Contains(strings.ReplaceAll(got, "http", "80"), want) {
			t.Errorf("nft does not list %s in\n%s", want, got)
		}
	}
	// What is there already, half there, there with another value, or gone already.
	moved := plan.Element{Set: anyPort, Elem: "udp . 53", Data: "10.0.0.3 . 53"}
	fresh := plan.Element{Set: links, Elem: "eth1"}
	do(t, k, add(objects...)...)
	do(t, k, add(moved, fresh)...)
	holds(t, k, moved, fresh)
	do(t, k, plan.Op{Verb: plan.Replace, Object: objects[9], Old: moved})
	holds(t, k, objects[9])
	do(t, k, replace(moved)...)
	holds(t, k, moved)
	do(t, k, replace(plan.Element{Set: links, Elem: "eth2"})...) // what is to be replaced is gone
	do(t, k, remove(fresh, moved, objects[0])...)
	do(t, k, remove(fresh, moved, objects[0], objects[3])...) // again, but for one
	if got := observe(t, k, fresh, moved, objects[0], objects[3]); len(got) > 0 {
		t.Errorf("still there: %s", got)
	}
	holds(t, k, objects[4:9]...)

	// An error names its operation, and takes back the whole run.
	bad := plan.Element{Set: links, Elem: "a name that is too long"}
	if err := k.Do(context.Background(), add(fresh, bad)); err == nil || !strings.Contains(err.Error(), bad.String()) {
		t.Errorf("a bad element: %v", err)
	}
	run(t, "nft", "flush ruleset")
	err := k.Do(context.Background(), add(plan.Element{Set: links, Elem: "eth3"}))
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "eth3") {
		t.Errorf("an element without its table: %v", err)
	}
	do(t, k, remove(objects[3:]...)...)
	if _, err := k.Observe(context.Background(), []plan.Key{{Kind: plan.KindElement, Name: "inet nothing 10.0.0.1"}}); err == nil {
		t.Error("a set of no table of ours was looked up")
	}
}

// TestFullSet: what does not fit into a set is named, and what there is stays.
func TestFullSet(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	inet := plan.Table{Table: inetTable()}
	one := func(i int) plan.Object { return plan.Element{Set: few, Elem: fmt.Sprint("192.0.2.", i)} }
	do(t, k, add(inet, one(1), one(2), one(3))...)
	err := k.Do(t.Context(), add(one(4)))
	if err == nil || !strings.Contains(err.Error(), "192.0.2.4") || !strings.Contains(err.Error(), "set few has room for 3 elements, and is full") {
		t.Errorf("error %v, want one that names the element and the set", err)
	}
	holds(t, k, one(1), one(2), one(3))
	do(t, k, remove(one(1))...)
	do(t, k, add(one(4))...)
	holds(t, k, one(2), one(3), one(4))
}

func TestElementsAsText(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	do(t, k, add(plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()})...)
	part := map[nft.Type]*rapid.Generator[string]{
		nft.IfName:   rapid.StringMatching(`[a-z][a-z0-9_.:-]{0,14}`),
		nft.MAC:      rapid.Map(rapid.SliceOfN(rapid.Byte(), 6, 6), func(b []byte) string { return plan.MAC(b).String() }),
		nft.IPv4:     rapid.Map(rapid.SliceOfN(rapid.Byte(), 4, 4), addressText),
		nft.IPv6:     rapid.Map(rapid.SliceOfN(rapid.Byte(), 16, 16), addressText),
		nft.Service:  rapid.Map(rapid.Uint16(), func(n uint16) string { return fmt.Sprint(n) }),
		nft.Protocol: rapid.SampledFrom([]string{"icmp", "igmp", "tcp", "udp", "sctp", "ipv6-icmp", "0", "103", "255"}),
	}
	text := func(rt *rapid.T, types []nft.Type) string {
		var parts []string
		for _, typ := range types {
			parts = append(parts, part[typ].Draw(rt, string(typ)))
		}
		return strings.Join(parts, " . ")
	}
	sets := []*nft.Set{wards, members, members6, links, ports, ports6, anyPort, senders, senders6, stations}
	rapid.Check(t, func(rt *rapid.T) {
		var wanted []plan.Object
		seen := map[plan.Key]bool{}
		for range rapid.IntRange(1, 20).Draw(rt, "elements") {
			s := rapid.SampledFrom(sets).Draw(rt, "set")
			e := plan.Element{Set: s, Elem: text(rt, s.Key)}
			if len(s.Data) > 0 {
				e.Data = text(rt, s.Data)
			}
			if !seen[e.Key()] {
				seen[e.Key()] = true
				wanted = append(wanted, e)
			}
		}
		do(t, k, add(wanted...)...)
		holds(t, k, wanted...)
		all := observeAll(t, k)
		for _, table := range tables() {
			delete(all, plan.Table{Table: table}.Key())
		}
		if diff := plan.Diff(all, plan.Of(wanted...)); len(diff) > 0 {
			rt.Fatalf("the kernel's text is another: %v", diff)
		}
		do(t, k, remove(wanted...)...)
	})
}

func addressText(b []byte) string {
	a, _ := netip.AddrFromSlice(b)
	return a.String()
}

func TestManyElements(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	inet := plan.Table{Table: inetTable()}
	do(t, k, add(inet)...)
	many := manyPorts(10_000)
	do(t, k, add(many...)...)
	do(t, k, add(many...)...)
	holds(t, k, many[:100]...)
	if all := observeAll(t, k); len(all) != len(many)+1 {
		t.Errorf("%d of %d elements", len(all)-1, len(many))
	}
	do(t, k, replace(inet)...)
	if all := observeAll(t, k); len(all) != len(many)+1 {
		t.Errorf("%d of %d elements after the table was made anew", len(all)-1, len(many))
	}
	run(t, "nft", "delete element inet dockway ports { 192.0.2.1 . tcp . 7 }")
	do(t, k, remove(many...)...)
	if all := observeAll(t, k); len(all) != 1 {
		t.Errorf("%d elements are left", len(all)-1)
	}
}

func manyPorts(n int) []plan.Object {
	out := make([]plan.Object, n)
	for i := range out {
		out[i] = plan.Element{Set: ports, Elem: fmt.Sprintf("192.0.2.1 . tcp . %d", i+1), Data: fmt.Sprintf("10.0.%d.%d . 80", i/250, i%250+1)}
	}
	return out
}

// TestMadeAnewInTraffic replaces a table again and again while another process adds elements.
func TestMadeAnewInTraffic(t *testing.T) {
	inNamespace(t)
	k, other := open(t, kernel.Config{Tables: tables()}), open(t, kernel.Config{Tables: tables()})
	inet := plan.Table{Table: inetTable()}
	do(t, k, add(inet)...)
	many := manyPorts(500)
	done := make(chan error)
	go func() {
		var err error
		for _, e := range many {
			err = errors.Join(err, other.Do(context.Background(), add(e)))
			_, lookUp := other.Observe(context.Background(), []plan.Key{inet.Key()})
			err = errors.Join(err, lookUp)
		}
		done <- err
	}()
	for working := true; working; {
		// Refused when there never is a moment without a change by others: nothing is lost then either.
		if err := k.Do(context.Background(), replace(inet)); err != nil && !errors.Is(err, unix.ERESTART) {
			t.Error(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			working = false
		default:
		}
	}
	if got := observeAll(t, k); len(got) != len(many)+1 {
		t.Errorf("%d of %d elements", len(got)-1, len(many))
	}
}

func TestBadTables(t *testing.T) {
	inNamespace(t)
	rule := func(family nft.Family, sets []*nft.Set, s ...nft.Stmt) *nft.Table {
		return &nft.Table{Family: family, Name: "dockway", Sets: sets, Chains: []*nft.Chain{{Name: "c", Rules: []nft.Rule{nft.R("", s...)}}}}
	}
	for want, table := range map[string]*nft.Table{
		"field \"nonsense\"":     rule(nft.Inet, nil, nft.Is("nonsense", "1")),
		"cannot read arp":        rule(nft.Inet, nil, nft.Is(nft.ARPSenderIP, "10.0.0.1")),
		"no inet_proto":          rule(nft.Inet, nil, nft.Is(nft.L4Proto, "quic")),
		"2 fields looked up":     rule(nft.Inet, []*nft.Set{wards}, nft.In(wards, nft.IIfName, nft.IPSAddr)),
		"where the set has":      rule(nft.Inet, []*nft.Set{wards}, nft.In(wards, nft.IIfName)),
		"no address and port":    rule(nft.Inet, []*nft.Set{wards}, nft.DNAT{Fields: []nft.Field{nft.IPDAddr}, Map: wards}),
		"verdict \"perhaps\"":    rule(nft.Inet, nil, nft.Verdict{Kind: "perhaps"}),
		"cannot be compared":     rule(nft.Inet, nil, nft.Is(nft.IPSAddr, "fe80::/10")),
		"longer than":            {Family: nft.Inet, Name: "dockway", Chains: []*nft.Chain{{Name: "c", Rules: []nft.Rule{nft.R(strings.Repeat("x", 128))}}}},
		"hook \"nowhere\"":       {Family: nft.Inet, Name: "dockway", Chains: []*nft.Chain{{Name: "c", Hook: "nowhere"}}},
		"nftables type \"mark\"": {Family: nft.Inet, Name: "dockway", Sets: []*nft.Set{{Name: "s", Key: []nft.Type{"mark"}}}},
	} {
		if _, err := kernel.New(kernel.Config{Tables: []*nft.Table{table}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
