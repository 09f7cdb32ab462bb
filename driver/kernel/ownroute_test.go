package kernel_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func route(link, prefix, via, source string) plan.Route {
	r := plan.Route{Link: link, Prefix: netip.MustParsePrefix(prefix)}
	if via != "" {
		r.Via = netip.MustParseAddr(via)
	}
	if source != "" {
		r.Source = netip.MustParseAddr(source)
	}
	return r
}

func TestHostRoutes(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	here(t, "ip link set lo up", "ip link add eth0 type veth peer name eth1", "ip link set eth0 up", "ip link set eth1 up",
		"ip addr add 198.18.0.1/24 dev eth0", "ip addr add fd00:1::1/64 dev eth0 nodad")
	all := []plan.Object{
		route("eth0", "198.18.1.2/32", "", ""),
		route("eth0", "198.18.2.0/24", "198.18.0.9", "198.18.0.1"),
		route("eth0", "0.0.0.0/0", "198.18.0.9", ""),
		route("eth0", "fd00:2::2/128", "", "fd00:1::1"),
		route("eth0", "fd00:3::/64", "fd00:1::9", ""),
		route("eth0", "::/0", "fd00:1::9", ""),
	}
	do(t, k, add(all...)...)
	do(t, k, add(all...)...) // again is fine
	holds(t, k, all...)
	here(t, "ip route add 198.18.8.0/24 dev eth0 proto 100 table 7",
		"ip route add blackhole 198.18.9.0/24 proto 100")
	if got := observeAll(t, k); len(plan.Diff(got, plan.Of(all...))) > 0 {
		t.Errorf("all there is:\n%s", got)
	}
	for prefix, want := range map[string]string{
		"198.18.1.2":    "198.18.1.2 dev eth0 proto 100 scope link",
		"198.18.2.0/24": "198.18.2.0/24 via 198.18.0.9 dev eth0 proto 100 src 198.18.0.1 onlink",
	} {
		if got := run(t, "ip", "route", "show", prefix); strings.TrimSpace(got) != want {
			t.Errorf("%q, not %q", got, want)
		}
	}

	// Changed: by the plan, and by hand.
	do(t, k, replace(route("eth0", "198.18.1.2/32", "198.18.0.7", "198.18.0.1"), route("eth0", "fd00:2::2/128", "fd00:1::7", ""))...)
	holds(t, k, route("eth0", "198.18.1.2/32", "198.18.0.7", "198.18.0.1"), route("eth0", "fd00:2::2/128", "fd00:1::7", ""))
	do(t, k, replace(all...)...)
	for _, change := range []string{
		"ip route del 198.18.1.2", "ip route flush proto 100 root 198.18.0.0/15", "ip -6 route flush proto 100", "ip addr del 198.18.0.1/24 dev eth0",
		"ip link set eth0 down", "ip route change 198.18.2.0/24 via 198.18.0.8 dev eth0 proto 100",
	} {
		here(t, change)
		if strings.HasPrefix(change, "ip addr") {
			here(t, "ip addr add 198.18.0.1/24 dev eth0")
		}
		if strings.HasPrefix(change, "ip link") {
			here(t, "ip link set eth0 up", "ip addr replace fd00:1::1/64 dev eth0 nodad")
		}
		repairs(t, k, change, all...)
	}

	// Somebody else's stays, whatever is asked for.
	here(t, "ip route add 198.18.7.0/24 dev eth0 proto static")
	before := run(t, "ip", "route", "show", "198.18.7.0/24")
	theirs := route("eth0", "198.18.7.0/24", "", "")
	if err := k.Do(context.Background(), add(theirs)); !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "not dockway's") {
		t.Errorf("over another's route: %v", err)
	}
	do(t, k, remove(theirs)...)
	if after := run(t, "ip", "route", "show", "198.18.7.0/24"); after != before {
		t.Errorf("another's route is now %s", after)
	}
	if err := k.Do(context.Background(), add(route("eth7", "198.18.6.0/24", "", ""))); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "link eth7") {
		t.Errorf("without its link: %v", err)
	}

	do(t, k, remove(all...)...)
	do(t, k, remove(append(all, route("eth7", "198.18.6.0/24", "", ""))...)...) // again is fine
	if got := observeAll(t, k); len(got) > 0 {
		t.Errorf("still there: %s", got)
	}
}

// TestWatchExternal: changes to VLANs, their uplinks, macvlans and routes tick, and our own do not.
func TestWatchExternal(t *testing.T) {
	l := newVLANLab(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ticks, err := l.k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wanted := []plan.Object{
		vlan(1, 100), vlan(2, 200), macvlan(1, "dwt1"), address("dwm1", "198.18.1.1/24"),
		route("dwm1", "198.18.2.0/24", "198.18.1.9", ""), route("eth0", "198.18.3.3/32", "", ""),
	}
	repair := func() {
		t.Helper()
		do(t, l.k, plan.Diff(observeAll(t, l.k), plan.Of(wanted...))...)
	}
	repair()
	do(t, l.k, add(vlan(3, 300), route("eth0", "198.18.4.4/32", "", ""))...)
	do(t, l.k, remove(vlan(3, 300), route("eth0", "198.18.4.4/32", "", ""))...)
	flush(t, l.k)
	silent(t, ticks, "what we did ourselves")
	for _, change := range []string{
		"tc filter del dev eth0 ingress pref 25719 handle 100 protocol 802.1Q bpf",
		"tc filter del dev eth0 ingress",
		"tc qdisc del dev eth0 clsact",
		"tc filter del dev dwt1 egress",
		"tc filter del dev dwt1 ingress",
		"tc qdisc del dev dwt1 clsact",
		"ip link set dwt1 mtu 1400",
		"ip link set eth0 mtu 1600",
		"ip link set eth0 mtu 1500",
		"ip link set eth0 promisc off",
		"ip link set dwu1 down",
		"ip link set dwm1 down",
		"ip link set dwm1 address 02:03:00:00:00:77",
		"ip link del dwm1",
		"ip link del dwt1",
		"ip route del 198.18.2.0/24",
		"ip route change 198.18.2.0/24 via 198.18.1.8 dev dwm1 proto static",
		"ip route replace 198.18.3.3/32 dev lo",
	} {
		if strings.HasSuffix(change, "dev lo") {
			here(t, "ip link set lo up")
			silent(t, ticks, "what is not ours")
		}
		here(t, change)
		hears(t, ticks, change)
		calm(ticks)
		if strings.HasPrefix(change, "ip route change") {
			here(t, "ip route del 198.18.2.0/24")
		}
		if strings.HasPrefix(change, "ip route replace") {
			here(t, "ip route del 198.18.3.3/32")
		}
		repair()
		calm(ticks) // of what is deleted in the background
		holds(t, l.k, wanted...)
		if left := plan.Diff(observeAll(t, l.k), plan.Of(wanted...)); len(left) > 0 {
			t.Errorf("after %s and the repair: %v", change, left)
		}
		silent(t, ticks, "the repair of "+change)
	}
	// The route goes with the link's carrier or state, without a word.
	here(t, "ip link set eth0 down")
	hears(t, ticks, "the uplink goes down, and a route with it")
	here(t, "ip link set eth0 up")
	repair()
	calm(ticks)
	// The uplink is renamed, goes and returns.
	here(t, "ip link set eth0 name eth9")
	hears(t, ticks, "the uplink is renamed")
	calm(ticks)
	here(t, "ip link set eth9 name eth0")
	silent(t, ticks, "all is as it should be again")
	here(t, "ip link del eth0")
	hears(t, ticks, "the uplink goes")
	calm(ticks)
	l.plug(t)
	repair()
	calm(ticks)
	holds(t, l.k, wanted...)

	// What is not ours.
	here(t, "tc filter add dev eth0 egress pref 7 protocol all u32 match u8 0 0 flowid 1:1",
		"ip link add eth1 type veth peer name eth2", "tc qdisc add dev eth1 clsact", "tc qdisc del dev eth1 clsact",
		"ip link add dwc9 link eth1 type macvlan", "ip link del eth1", "ip addr add 198.18.9.1/24 dev eth0", "ip route add 198.18.8.0/24 dev eth0")
	silent(t, ticks, "what is not ours")
}
