package kernel_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// hears waits for a tick.
func hears(t *testing.T, ticks <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ticks:
	case <-time.After(10 * time.Second):
		t.Fatalf("no tick after: %s", what)
	}
}

// calm waits until nothing ticks any more.
func calm(ticks <-chan struct{}) {
	for {
		select {
		case <-ticks:
		case <-time.After(quiet):
			return
		}
	}
}

const quiet = 150 * time.Millisecond // several times what a tick takes

// silent checks that nothing ticks.
func silent(t *testing.T, ticks <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ticks:
		t.Errorf("a tick after: %s", what)
	case <-time.After(quiet):
	}
}

func TestWatch(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ticks, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wanted := []plan.Object{
		plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()},
		plan.Element{Set: wards, Elem: "10.0.0.2"},
		bridge(1), veth(1, "dwb1"), address("dwb1", "10.0.0.1/24"), address("dwb1", "fd00::1/64"),
		plan.Admit{Family: "ip", Mark: 0x1000}, plan.Admit{Family: "ip6", Mark: 0x1000},
	}
	temporary := []plan.Object{bridge(2), veth(2, "dwb2"), address("dwb2", "10.2.0.1/24"), plan.Element{Set: wards, Elem: "10.0.0.3"}}
	repair := func() {
		t.Helper()
		do(t, k, plan.Diff(observeAll(t, k, plan.Of(wanted...).Keys()...), plan.Of(wanted...))...)
	}
	repair()
	do(t, k, add(temporary...)...)
	do(t, k, remove(veth(2, "dwb2"), temporary[3], temporary[2], temporary[0])...)
	flush(t, k)
	silent(t, ticks, "what we did ourselves")

	disowned := map[string]string{"ip link set dwv1 alias nobody's": "dwv1", "ip link set dwb1 name other": "other"}
	for _, change := range []string{
		"nft flush chain inet dockway forward",
		"nft add rule bridge dockway from4 accept",
		"nft delete element inet dockway wards { 10.0.0.2 }",
		"nft add element inet dockway wards { 10.0.0.4 }",
		"nft delete table bridge dockway",
		"nft flush ruleset",
		"ip link set dwv1 down",
		"ip link set dwv1 mtu 1300",
		"ip link set dwv1 nomaster",
		"ip link set dwv1 alias nobody's",
		"ip link set dwb1 address 02:01:00:00:00:77",
		"ip link set dwb1 name other",
		"ip link del dwv1",
		"ip link del dwb1",
		"ip addr del 10.0.0.1/24 dev dwb1",
		"ip addr del fd00::1/64 dev dwb1",
		"ip addr add 10.7.0.1/24 dev dwb1",
		"ip addr add fd00::7/64 dev dwb1",
		"bridge link set dev dwv1 isolated on",
		"bridge link set dev dwv1 hairpin off",
		"iptables -N DOCKER-USER",
		"iptables -F DOCKER-USER",
		"ip6tables -N DOCKER-USER",
		"nft delete table ip filter",
	} {
		args := strings.Fields(change)
		run(t, args[0], args[1:]...)
		hears(t, ticks, change)
		if name, ok := disowned[change]; ok { // not ours any more, and in the way
			run(t, "ip", "link", "del", name)
			calm(ticks)
		}
		if strings.HasPrefix(change, "ip link del") { // takes its time, and may tick twice
			calm(ticks)
		}
		repair()
		holds(t, k, wanted...)
		silent(t, ticks, "the repair of "+change)
	}

	// Another process, later: what it has seen is what should be.
	later := open(t, kernel.Config{Tables: tables()})
	laterTicks, err := later.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	observeAll(t, later)
	run(t, "ip", "link", "set", "dwb1", "txqueuelen", "77")
	silent(t, laterTicks, "a change that no plan speaks of")
	run(t, "ip", "link", "set", "dwb1", "mtu", "1400")
	hears(t, laterTicks, "a change that plans speak of")
	calm(ticks)
	repair()

	// What is not ours.
	for _, change := range []string{
		"ip link add eth1 type veth peer eth2", "ip link set eth1 up", "ip addr add 192.0.2.2/24 dev eth1",
		"nft add table inet other", "nft delete table inet other", "iptables -A FORWARD -j ACCEPT",
		"nft add element inet dockway seen { 10.0.0.7 . 53 }",
	} {
		args := strings.Fields(change)
		run(t, args[0], args[1:]...)
	}
	silent(t, ticks, "what is not ours")

	// The way out.
	run(t, "ip", "link", "set", "eth2", "up")
	for _, change := range []string{
		"ip route add default via 192.0.2.1", "ip route del default via 192.0.2.1", "ip route add default via 192.0.2.1",
		"ip link set eth1 down", // takes the route with it, without a word
		"ip link set eth1 up", "ip -6 route add default dev eth1 metric 5", "ip -6 route del default",
	} {
		before, err := k.Uplinks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		args := strings.Fields(change)
		run(t, args[0], args[1:]...)
		after, err := k.Uplinks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Join(before, " ") != strings.Join(after, " ") {
			hears(t, ticks, change)
		}
		silent(t, ticks, change+", a second time")
	}

	cancel()
	eventually(t, "the channel is closed", func() bool {
		select {
		case _, open := <-ticks:
			return !open
		default:
			return false
		}
	})
}

func TestRoutes(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	for _, command := range []string{
		"ip link add eth1 type veth peer eth2", "ip link set eth1 up", "ip link set eth2 up",
		"ip addr add 192.0.2.2/24 dev eth1", "ip addr add 2001:db8::2/64 dev eth1 nodad",
		"ip route add 10.0.0.0/8 via 192.0.2.1", "ip route add blackhole 10.9.0.0/16",
		"ip route add 10.10.0.0/16 nexthop via 192.0.2.1 nexthop dev eth2",
		"ip route add default via 192.0.2.1", "ip -6 route add default via 2001:db8::1",
		"ip route add default dev eth2 table 77", "ip route add 172.16.0.0/12 dev eth1 table 77",
	} {
		args := strings.Fields(command)
		run(t, args[0], args[1:]...)
	}
	routes, err := k.Routes(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range routes {
		if r.Prefix.Addr().IsLinkLocalUnicast() {
			continue
		}
		line := r.Prefix.String() + " " + r.Link
		if r.OnLink {
			line += " onlink"
		}
		got = append(got, line)
	}
	want := "10.0.0.0/8 eth1, 10.9.0.0/16 , 10.10.0.0/16 eth1, 10.10.0.0/16 eth2 onlink, 192.0.2.0/24 eth1 onlink, 2001:db8::/64 eth1 onlink"
	if strings.Join(got, ", ") != want {
		t.Errorf("routes\n %s, not\n %s", strings.Join(got, ", "), want)
	}
	uplinks, err := k.Uplinks(context.Background())
	if err != nil || strings.Join(uplinks, " ") != "eth1" {
		t.Errorf("uplinks %v, %v", uplinks, err)
	}
}
