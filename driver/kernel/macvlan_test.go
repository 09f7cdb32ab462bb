package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func macvlan(n int, lower string) plan.Macvlan {
	return plan.Macvlan{Name: fmt.Sprintf("dwm%d", n), Alias: fmt.Sprintf("dockway network=%d", n), Lower: lower, MAC: plan.MAC{2, 3, 0, 0, byte(n >> 8), byte(n)}, MTU: 1500, Up: true}
}

func TestMacvlan(t *testing.T) {
	l := newVLANLab(t)
	shim, c := macvlan(1, "eth0"), macvlan(2, "eth0")
	c.Name, c.Up, c.MTU = "dwc2", false, 1400
	do(t, l.k, add(shim, c)...)
	do(t, l.k, add(shim, c)...) // again is fine
	holds(t, l.k, shim, c)
	if all := observeAll(t, l.k); len(plan.Diff(all, plan.Of(shim, c))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	if got := run(t, "ip", "-d", "link", "show", "dwm1"); !strings.Contains(got, "macvlan mode bridge") || !strings.Contains(got, "addrgenmode none") {
		t.Errorf("not in mode bridge, or with addresses of its own: %s", got)
	}

	// A container's is the container's once the engine has moved it, and ours again if it comes back.
	p := newPlace(t)
	here(t, "ip link set dwc2 netns "+p.path)
	if got := observeAll(t, l.k); len(plan.Diff(got, plan.Of(shim))) > 0 {
		t.Errorf("with the container's gone: %s", got)
	}
	if got := observe(t, l.k, c); len(got) > 0 {
		t.Errorf("observed in another namespace: %s", got)
	}
	p.run(t, "ip link set dwc2 name eth0", "ip addr add 198.18.1.2/24 dev eth0", "ip link set eth0 up")
	// The host, the container and the wire reach each other.
	do(t, l.k, add(address("dwm1", "198.18.1.1/24"))...)
	l.far.run(t, "ip addr add 198.18.1.3/24 dev wire")
	l.settle(t)
	places := map[string]*place{"198.18.1.1": samePlace(t), "198.18.1.2": p, "198.18.1.3": l.far}
	for from := range places {
		for to := range places {
			if from != to {
				transfer(t, places[from], places[to], to, strings.NewReader("hello"), &strings.Builder{})
			}
		}
	}
	do(t, l.k, remove(address("dwm1", "198.18.1.1/24"))...)
	p.run(t, "ip link set eth0 down", "ip link set eth0 name dwc2", "ip link set dwc2 netns "+placePath())
	if got := observe(t, l.k, c); len(got) != 1 {
		t.Errorf("back from the container: %v", got)
	}

	// Changed in place, and by hand.
	index := linkIndex(t, "dwm1")
	changed := shim
	changed.MAC, changed.MTU, changed.Alias, changed.Up = plan.MAC{2, 3, 0, 0, 0, 9}, 1300, "dockway network=new", false
	do(t, l.k, replace(changed)...)
	holds(t, l.k, changed)
	do(t, l.k, replace(shim)...)
	if linkIndex(t, "dwm1") != index {
		t.Error("the link was made anew")
	}
	for _, change := range []string{
		"ip link set dwm1 down", "ip link set dwm1 mtu 1300", "ip link set dwm1 address 02:03:00:00:00:77",
		"ip link set dwm1 type macvlan mode private", "ip link del dwm1",
	} {
		here(t, change)
		repairs(t, l.k, change, shim, c)
	}
	// Of another lower link, or another kind.
	here(t, "ip link add eth1 type veth peer name eth2", "ip link set eth1 up")
	moved := shim
	moved.Lower = "eth1"
	do(t, l.k, replace(moved)...)
	holds(t, l.k, moved)
	here(t, "ip link del dwm1", "ip link add dwm1 type bridge")
	run(t, "ip", "link", "set", "dwm1", "alias", shim.Alias)
	repairs(t, l.k, "another kind", shim, c)

	do(t, l.k, remove(shim, c)...)
	if got := observeAll(t, l.k); len(got) > 0 {
		t.Errorf("still observed: %s", got)
	}
	do(t, l.k, remove(shim, c)...) // again is fine
	flush(t, l.k)
	if exists(t, "dwm1") || exists(t, "dwc2") {
		t.Error("deleted links are there")
	}
}

// TestMacvlanRefused: errors say what is wrong and what to do.
func TestMacvlanRefused(t *testing.T) {
	l := newVLANLab(t)
	here(t, "ip link add br0 type bridge", "ip link add eth1 type veth peer name eth2", "ip link set eth1 master br0", "ip link set eth0 mtu 1400")
	for want, m := range map[string]plan.Macvlan{
		"lower link eth7":                          macvlan(1, "eth7"),
		"eth1 is a port of bridge br0":             macvlan(1, "eth1"),
		"put it on br0, or take eth1 out of br0":   macvlan(1, "eth1"),
		"MTU 1500 is above the 1400 of lower link": macvlan(1, "eth0"),
	} {
		err := l.k.Do(context.Background(), add(m))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, not %q", m, err, want)
		}
		if exists(t, m.Name) {
			t.Error("a link was made")
		}
	}
	here(t, "ip link set eth0 mtu 1500")
	do(t, l.k, add(macvlan(1, "eth0"))...)
	twin := macvlan(2, "eth0")
	twin.MAC = macvlan(1, "eth0").MAC
	if err := l.k.Do(context.Background(), add(twin)); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "choose another") {
		t.Errorf("a second link with the MAC: %v", err)
	}
	do(t, l.k, remove(twin)...) // it is there, down
	flush(t, l.k)
	// Somebody else's, and the other end of an endpoint's pair.
	here(t, "ip link add dwm7 link eth0 type macvlan", "ip link add dwv7 type veth peer name dwc7")
	eventually(t, "the kernel has found our link up", func() bool { return strings.Contains(run(t, "ip", "link", "show", "dwm1"), " state UP ") })
	before := run(t, "ip", "-d", "link")
	for _, n := range []string{"dwm7", "dwc7"} {
		m := macvlan(7, "eth0")
		m.Name = n
		for _, op := range append(add(m), remove(m)...) {
			var foreign *kernel.ForeignError
			if err := l.k.Do(context.Background(), []plan.Op{op}); !errors.As(err, &foreign) {
				t.Errorf("%s: %v", op, err)
			}
		}
		if got := observe(t, l.k, m); len(got) > 0 {
			t.Errorf("observed what is not ours: %s", got)
		}
	}
	flush(t, l.k)
	if after := run(t, "ip", "-d", "link"); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
}
