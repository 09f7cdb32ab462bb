package kernel_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestNeighbour: a neighbour is found out by asking, and Watch ticks when it answers, when it has
// another MAC, and not for neighbours that nobody asked for.
func TestNeighbour(t *testing.T) {
	inNamespace(t)
	ctx := context.Background()
	run(t, "sh", "-ec", `
		ip link add lan type veth peer name far
		ip link set lan up; ip address add 198.18.0.1/24 dev lan
		ip link set far address 02:00:00:00:00:02 up`)
	k := open(t, kernel.Config{Tables: tables()})
	gateway, other := netip.MustParseAddr("198.18.0.254"), netip.MustParseAddr("198.18.0.253")
	ask := func() plan.MAC {
		t.Helper()
		mac, err := k.Neighbour(ctx, "lan", gateway)
		if err != nil {
			t.Fatal(err)
		}
		return mac
	}
	if _, err := k.Neighbour(ctx, "nowhere", gateway); err == nil {
		t.Error("a link that is not there has neighbours")
	}
	ticks, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if mac := ask(); mac != (plan.MAC{}) {
		t.Errorf("%s is known before anybody asked: %s", gateway, mac)
	}
	calm(ticks)
	run(t, "ip", "neigh", "replace", other.String(), "lladdr", "02:00:00:00:00:99", "dev", "lan", "nud", "reachable")
	silent(t, ticks, "a neighbour that nobody asked for")
	for _, mac := range []string{"02:00:00:00:00:02", "02:00:00:00:00:03"} {
		run(t, "ip", "neigh", "replace", gateway.String(), "lladdr", mac, "dev", "lan", "nud", "reachable")
		hears(t, ticks, "the gateway has "+mac)
		if got := ask(); got.String() != mac {
			t.Errorf("the gateway has %s, want %s", got, mac)
		}
		calm(ticks)
	}
	// It is asked with ARP: the request arrives at the other end.
	run(t, "ip", "neigh", "del", gateway.String(), "dev", "lan")
	hears(t, ticks, "the gateway is forgotten")
	ask()
	eventually(t, "the kernel asks for the gateway", func() bool {
		return run(t, "ip", "neigh", "show", gateway.String(), "dev", "lan") != ""
	})
}

func TestOwn(t *testing.T) {
	inNamespace(t)
	run(t, "sh", "-ec", "ip link add lan type veth peer name far; ip link set lan up; ip link set far up; ip link set lo up; ip address add 198.18.0.1/24 dev lan; ip -6 address add fd00::1/64 dev lan nodad; ip route add blackhole 198.18.9.0/24")
	k := open(t, kernel.Config{Tables: tables()})
	eventually(t, "the kernel to use the IPv6 address", func() bool { return strings.HasPrefix(run(t, "ip", "-6", "route", "get", "fd00::1"), "local") })
	for address, want := range map[string]bool{
		"198.18.0.1": true, "127.0.0.1": true, "fd00::1": true, "::1": true,
		"198.18.0.2": false, "198.18.5.1": false, "198.18.9.1": false, "fd00::2": false, "fd09::1": false,
	} {
		if own, err := k.Own(context.Background(), netip.MustParseAddr(address)); err != nil || own != want {
			t.Errorf("%s is the host's own: %v, %v; want %v", address, own, err, want)
		}
	}
}
