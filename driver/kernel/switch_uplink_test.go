package kernel_test

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestLostRouter: the kernel keeps routes whose router is no longer on the link, but makes no new one.
func TestLostRouter(t *testing.T) {
	inNamespace(t)
	newLAN(t).plug(t)
	commands(t, `
		ip link set eth1 up
		ip addr add 198.18.0.2/24 dev eth1
		ip addr add 198.18.9.2/24 dev eth1
		ip addr add fd00:9::2/64 dev eth1 nodad
		ip route add 198.19.0.0/24 via 198.18.9.1 dev eth1
		ip route add 198.19.1.0/24 via 198.18.0.1 dev eth1
		ip -6 route add fd01::/64 via fd00:9::1 dev eth1
		ip nexthop add id 7 via 198.18.9.1 dev eth1
		ip route add 198.19.7.0/24 nhid 7
		ip addr del 198.18.9.2/24 dev eth1
		ip addr del fd00:9::2/64 dev eth1`)
	k := open(t, kernel.Config{})
	s := external("eth1")
	routes := func() string { return run(t, "ip", "route") + run(t, "ip", "-6", "route") }
	for _, link := range []string{"dwx1", "eth1"} {
		if link == "dwx1" {
			do(t, k, add(s)...)
			holds(t, k, s)
		} else {
			do(t, k, remove(s)...)
		}
		for _, want := range []string{
			"198.19.0.0/24 via 198.18.9.1 dev " + link + " onlink", "198.19.1.0/24 via 198.18.0.1 dev " + link + " \n",
			"fd01::/64 via fd00:9::1 dev " + link, "198.19.7.0/24 nhid 7 via 198.18.9.1 dev " + link,
		} {
			if !strings.Contains(routes(), want) {
				t.Errorf("no %q: %s", want, routes())
			}
		}
	}
}

// TestWatchIgnoresOwnMoves: of what a move does nothing ticks, if it takes no default route along.
func TestWatchIgnoresOwnMoves(t *testing.T) {
	newHost(t)
	commands(t, `
		ip route del default
		ip -6 route del default`)
	k := open(t, kernel.Config{})
	observeAll(t, k)
	ticks, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, v := external("eth1"), veth(1, "dwx1")
	do(t, k, add(s, v)...)
	silent(t, ticks, "a switch of our own")
	do(t, k, add(s)...)
	silent(t, ticks, "the same again")
	commands(t, "ip addr add 198.18.0.77/24 dev dwx1")
	silent(t, ticks, "an address of the host's on the switch")
	commands(t, "ip link set dwx1 down")
	hears(t, ticks, "a switch that is down")
	do(t, k, plan.Diff(observe(t, k, s), plan.Of(s))...)
	holds(t, k, s)
	calm(ticks)
	commands(t, "ip link set eth1 address 02:aa:00:00:00:77")
	hears(t, ticks, "another MAC")
	if got := observe(t, k, s)[s.Key()].(plan.Switch); got.Moved || got.Uplink != "eth1" {
		t.Errorf("with another MAC: %s", got)
	}
	do(t, k, plan.Diff(observe(t, k, s), plan.Of(s))...)
	holds(t, k, s)
	calm(ticks)
	do(t, k, remove(v, s)...)
	flush(t, k)
	silent(t, ticks, "the end of it")
	commands(t, "ip link set eth1 down")
	silent(t, ticks, "an uplink that nobody waits for any more")
}

func TestVanishingUplink(t *testing.T) {
	l := newHost(t)
	k := open(t, kernel.Config{})
	s, v := external("eth1"), veth(1, "dwx1")
	do(t, k, add(s, v)...)
	holds(t, k, s, v)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ticks, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	observeAll(t, k)
	calm(ticks)

	commands(t, "ip addr add 198.18.0.20/24 dev eth1")
	hears(t, ticks, "an address on the uplink")
	if got := observe(t, k, s); got[s.Key()].(plan.Switch).Moved {
		t.Errorf("all moved: %s", got)
	}
	do(t, k, add(s)...)
	holds(t, k, s)
	if got := run(t, "ip", "addr", "show", "dev", "dwx1"); !strings.Contains(got, "198.18.0.20/24") {
		t.Errorf("the address was not moved: %s", got)
	}
	calm(ticks)

	commands(t, "ip link set eth1 nomaster")
	hears(t, ticks, "an uplink that was taken out")
	do(t, k, add(s)...)
	holds(t, k, s, v)
	calm(ticks)

	commands(t, "ip link del eth1")
	hears(t, ticks, "an uplink that vanished")
	calm(ticks)
	lone := s
	lone.Uplink, lone.Moved = "", false
	if got := observeAll(t, k); got[s.Key()] != plan.Object(lone) {
		t.Errorf("without the uplink: %s", got)
	}
	if err := k.Do(context.Background(), add(s)); err == nil || !strings.Contains(err.Error(), "uplink eth1 is not there") {
		t.Errorf("without the uplink: %v", err)
	}
	holds(t, k, v)
	if got := run(t, "ip", "addr", "show", "dev", "dwx1"); !strings.Contains(got, "198.18.0.2/24") {
		t.Errorf("the host lost its address: %s", got)
	}
	calm(ticks)

	l.plug(t)
	commands(t, "ip link set eth1 up")
	hears(t, ticks, "an uplink that came back")
	do(t, k, add(s)...)
	holds(t, k, s, v)
	l.answers(t, "198.18.0.2")
	calm(ticks)

	// It comes back and the network goes: the host gets everything back on it, also while the kernel takes
	// its time to prove an address that is proved on the switch.
	commands(t, "ip link del eth1")
	l.plug(t)
	run(t, "sh", "-c", "echo 9 > /proc/sys/net/ipv6/conf/eth1/dad_transmits; ip link set eth1 up")
	eventually(t, "the kernel to give the uplink an address", func() bool {
		return strings.Contains(run(t, "ip", "addr", "show", "dev", "eth1", "tentative"), "fe80:")
	})
	do(t, k, remove(v)...)
	do(t, k, plan.Diff(observeAll(t, k), plan.State{})...)
	flush(t, k)
	if got := run(t, "ip", "addr", "show", "dev", "eth1"); !strings.Contains(got, "198.18.0.2/24") || exists(t, "dwx1") {
		t.Errorf("the host did not get its address back: %s", got)
	}
	l.answers(t, "198.18.0.2")

	// It does not come back.
	do(t, k, add(s)...)
	commands(t, "ip link del eth1")
	do(t, k, remove(s)...)
	flush(t, k)
	if exists(t, "dwx1") {
		t.Error("a switch without its uplink is still there")
	}
}

// TestUplinkMTU: a switch follows the MTU of its uplink. The host would send more than the uplink carries,
// and the switch drop it without a word; or never use what it does carry.
func TestUplinkMTU(t *testing.T) {
	l := newHost(t)
	k := open(t, kernel.Config{})
	before := hostState(t)
	s, v := external("eth1"), veth(1, "dwx1")
	v.MTU = 1300 // a port with less changes nothing
	do(t, k, add(s, v)...)
	observeAll(t, k)
	ticks, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	moved := movable(t, "dwx1")
	for _, change := range []struct{ link, to, want string }{{"eth1", "1450", "1450"}, {"eth1", "9000", "9000"}, {"dwx1", "1450", "9000"}, {"eth1", "1500", "1500"}} {
		what := change.link + " with MTU " + change.to
		run(t, "ip", "link", "set", change.link, "mtu", change.to)
		hears(t, ticks, what)
		if got := observe(t, k, s)[s.Key()].(plan.Switch); got.Moved {
			t.Errorf("%s: all moved: %s", what, got)
		}
		do(t, k, plan.Diff(observe(t, k, s), plan.Of(s))...)
		holds(t, k, s, v)
		if got := run(t, "ip", "link", "show", "dwx1"); !strings.Contains(got, "mtu "+change.want+" ") {
			t.Errorf("%s: the switch lacks MTU %s: %s", what, change.want, got)
		}
		calm(ticks)
	}
	same(t, "not all is there after changes of the MTU", moved, movable(t, "dwx1"))
	l.answers(t, "198.18.0.2")
	do(t, k, remove(v, s)...)
	flush(t, k)
	same(t, "not as it was", before, hostState(t))
}

func TestUplinks(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	commands(t, `
		ip link add eth1 type veth peer eth2
		ip link add eth3 type veth peer eth4
		ip link set eth3 up
		ip link set eth4 up
		ip link set eth4 address 02:aa:00:00:00:04 mtu 1400
		ip link add br0 type bridge
		ip link set br0 up
		ip link add eth5 master br0 type veth peer eth6
		ip link set eth5 up
		ip link set eth6 up
		ip link add low0 link eth6 type macvlan mode bridge
		ip link set lo up
		ip tuntap add tun0 mode tun
		ip link set tun0 up`)
	do(t, k, add(bridge(1))...)
	state := func() string { return run(t, "ip", "-o", "addr") + fmt.Sprint(linkNames(t)) }
	eventually(t, "all addresses are proved", func() bool {
		return strings.Count(state(), "fe80::") >= 4 && !strings.Contains(state(), "tentative")
	})
	before := state()
	for uplink, want := range map[string]string{
		"eth9": "interface=", "eth1": "ip link set eth1 up", "lo": "loopback", "tun0": "not Ethernet", "eth5": "port of br0", "dwb1": "dockway's own",
	} {
		for what, err := range map[string]error{
			"look up": second(k.Uplink(context.Background(), uplink)), "add": k.Do(context.Background(), add(external(uplink))),
		} {
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), uplink) {
				t.Errorf("%s %s: %v", what, uplink, err)
			}
		}
	}
	for uplink, want := range map[string]string{"br0": "used as it is", "eth6": "macvlan"} {
		if err := k.Do(context.Background(), add(external(uplink))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", uplink, err)
		}
		flush(t, k)
	}
	same(t, "refused and changed", before, state())
	u, err := k.Uplink(context.Background(), "eth4")
	if want := (plan.Uplink{Name: "eth4", MAC: plan.MAC{2, 0xaa, 0, 0, 0, 4}, MTU: 1400}); err != nil || !reflect.DeepEqual(u, want) {
		t.Errorf("uplink %+v, %v", u, err)
	}
	if u, err := k.Uplink(context.Background(), "br0"); err != nil || !u.Bridge || u.Switch {
		t.Errorf("a bridge as uplink: %+v, %v", u, err)
	}
	do(t, k, add(external("eth4"))...)
	if u, err := k.Uplink(context.Background(), "eth4"); err != nil || u.Bridge || !u.Switch || u.MTU != 1400 {
		t.Errorf("an uplink that is in use: %+v, %v", u, err)
	}
	other := plan.Switch{Name: "dwx2", Alias: "dockway network=x2", Uplink: "eth4", Up: true, Moved: true}
	if err := k.Do(context.Background(), add(other)); err == nil || !strings.Contains(err.Error(), "port of dwx1") || exists(t, "dwx2") {
		t.Errorf("an uplink of another switch: %v", err)
	}

	// Ports of a switch, and of the host's own bridge.
	small := veth(1, "dwx1")
	small.MTU = 1300
	onBridge := veth(2, "br0")
	do(t, k, add(small, onBridge)...)
	holds(t, k, external("eth4"), small, onBridge)
	if all := observeAll(t, k); len(plan.Diff(all, plan.Of(bridge(1), external("eth4"), small, onBridge))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	if got := run(t, "ip", "link", "show", "dwx1"); !strings.Contains(got, "mtu 1400") {
		t.Errorf("a port has changed the host's MTU: %s", got)
	}
	if err := k.Do(context.Background(), add(veth(3, "eth4"))); err == nil || !strings.Contains(err.Error(), "no bridge") {
		t.Errorf("a port of what is no bridge: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }
