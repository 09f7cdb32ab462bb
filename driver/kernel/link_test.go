package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func bridge(n int) plan.Bridge {
	return plan.Bridge{Name: fmt.Sprintf("dwb%d", n), Alias: fmt.Sprintf("dockway network=%d", n), MAC: plan.MAC{2, 1, 0, 0, byte(n >> 8), byte(n)}, MTU: 1500, Up: true}
}

func veth(n int, bridge string) plan.Veth {
	return plan.Veth{
		Name: fmt.Sprintf("dwv%d", n), Alias: fmt.Sprintf("dockway endpoint=%d", n), Bridge: bridge, MTU: 1500, Up: true,
		Peer: fmt.Sprintf("dwc%d", n), PeerMAC: plan.MAC{2, 2, 0, 0, byte(n >> 8), byte(n)},
	}
}

func address(link, prefix string) plan.Address {
	return plan.Address{Link: link, Prefix: netip.MustParsePrefix(prefix)}
}

func TestLinks(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	b, v := bridge(1), veth(1, "dwb1")
	b.MTU, v.MTU = 1400, 1400
	do(t, k, add(b, v)...)
	holds(t, k, b, v)
	do(t, k, add(b, v)...) // again is fine
	holds(t, k, b, v)
	if all := observeAll(t, k); len(plan.Diff(all, plan.Of(b, v))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	for show, want := range map[string][]string{
		"dwb1": {"mtu 1400", "link/ether 02:01:00:00:00:01", "forward_delay 0", "stp_state 0", "addrgenmode none", "alias dockway network=1", "state UP"},
		"dwv1": {"mtu 1400", "master dwb1", "addrgenmode none", "hairpin on", "isolated off", "learning on", "alias dockway endpoint=1"},
		"dwc1": {"mtu 1400", "link/ether 02:02:00:00:00:01", "state DOWN"},
	} {
		got := run(t, "ip", "-d", "link", "show", show)
		for _, w := range want {
			if show == "dwb1" && w == "state UP" {
				w = ",UP" // a bridge whose ports have no carrier
			}
			if !strings.Contains(got, w) {
				t.Errorf("%s lacks %q: %s", show, w, got)
			}
		}
	}
	run(t, "ip", "link", "set", "dwc1", "up")
	if got := run(t, "ip", "-6", "addr", "show", "dev", "dwv1"); got != "" {
		t.Errorf("the kernel gave the port an address: %s", got)
	}

	// Changed in place.
	index := linkIndex(t, "dwv1")
	b2, v2 := b, v
	b2.MTU, v2.MTU, v2.Isolated, v2.Alias, b2.MAC = 1300, 1300, true, "dockway endpoint=new", plan.MAC{2, 1, 0, 0, 0, 9}
	do(t, k, replace(b2, v2)...)
	holds(t, k, b2, v2)
	if linkIndex(t, "dwv1") != index {
		t.Error("the port was made anew")
	}
	b2.Up, v2.Up = false, false
	do(t, k, replace(b2, v2)...)
	holds(t, k, b2, v2)
	do(t, k, replace(b, v)...)
	holds(t, k, b, v)

	// Changed by hand.
	run(t, "ip", "link", "del", "dwb1")
	ops := plan.Diff(observe(t, k, b, v), plan.Of(b, v))
	if got := fmt.Sprint(ops); !strings.HasPrefix(got, "[add link dwb1") || !strings.Contains(got, "replace link dwv1") {
		t.Errorf("a deleted bridge is repaired by %s", got)
	}
	do(t, k, ops...)
	holds(t, k, b, v)
	run(t, "ip", "link", "set", "dwv1", "nomaster", "down", "mtu", "1280")
	do(t, k, plan.Diff(observe(t, k, b, v), plan.Of(b, v))...)
	holds(t, k, b, v)

	run(t, "bridge", "link", "set", "dev", "dwv1", "hairpin", "off")
	do(t, k, plan.Diff(observe(t, k, b, v), plan.Of(b, v))...)
	if got := run(t, "ip", "-d", "link", "show", "dwv1"); !strings.Contains(got, "hairpin on") {
		t.Errorf("hairpin was turned off and stays off: %s", got)
	}

	// Of the wrong kind.
	run(t, "ip", "link", "del", "dwv1")
	run(t, "ip", "link", "add", "dwv1", "type", "bridge")
	run(t, "ip", "link", "set", "dwv1", "alias", "dockway endpoint=1")
	do(t, k, plan.Diff(observe(t, k, v), plan.Of(v))...)
	holds(t, k, v)

	// Deleted.
	do(t, k, remove(v, b)...)
	if left := observe(t, k, b, v); len(left) > 0 {
		t.Errorf("still observed: %s", left)
	}
	if left := observeAll(t, k); len(left) > 0 {
		t.Errorf("still listed: %s", left)
	}
	do(t, k, remove(v, b)...) // again is fine
	do(t, k, add(b, v)...)    // waits for what is doomed
	holds(t, k, b, v)
	do(t, k, remove(v, b)...)
	flush(t, k)
	if exists(t, "dwv1") || exists(t, "dwb1") || exists(t, "dwc1") {
		t.Error("flushed links are there")
	}
	do(t, k, remove(v, b)...)

}

// TestIdle: a link for a container is idle until the engine moves it into one, and again when it puts it
// back.
func TestIdle(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	do(t, k, add(bridge(1), veth(1, "dwb1"), veth(2, "dwb1"))...)
	idle := func(want ...string) {
		t.Helper()
		got, err := k.Idle(context.Background())
		if slices.Sort(got); err != nil || !slices.Equal(got, want) {
			t.Errorf("idle links: %v, %v; want %v", got, err, want)
		}
	}
	idle("dwc1", "dwc2")
	container := newPlace(t)
	here(t, "ip link set dwc1 netns "+container.path)
	container.run(t, "ip link set dwc1 name eth0")
	idle("dwc2")
	container.run(t, "ip link set eth0 name dwc1", "ip link set dwc1 netns "+placePath())
	idle("dwc1", "dwc2")
	do(t, k, remove(veth(1, "dwb1"))...)
	flush(t, k)
	idle("dwc2")
}

func TestSmallMTU(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	b, v := bridge(1), veth(1, "dwb1")
	b.MTU, v.MTU = 1000, 1000 // no IPv6 below 1280
	off := plan.Sysctl{Name: "net/ipv6/conf/dwb1/disable_ipv6", Value: "1"}
	noRA := plan.Sysctl{Name: "net/ipv6/conf/dwb1/accept_ra", Value: "0"}
	do(t, k, add(b, v, off, noRA)...)
	holds(t, k, b, v, off, noRA)
	if err := k.Do(context.Background(), add(plan.Sysctl{Name: off.Name, Value: "0"})); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("IPv6 on a link that cannot have it: %v", err)
	}
}

// TestMTUPutBack: a link whose MTU somebody made too small for IPv6 has none until it is put back.
func TestMTUPutBack(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	b, v := bridge(1), veth(1, "dwb1")
	do(t, k, add(b, v)...)
	run(t, "ip", "link", "set", "dwc1", "up")
	for _, o := range []plan.Object{b, v} {
		name := o.Key().Name
		run(t, "ip", "link", "set", name, "mtu", "1000")
		do(t, k, plan.Op{Verb: plan.Replace, Object: o, Old: o})
		if got := run(t, "ip", "-6", "addr", "show", "dev", name); got != "" {
			t.Errorf("the kernel gave %s an address: %s", name, got)
		}
	}
	holds(t, k, b, v)
}

func TestForeignLinks(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	run(t, "ip", "link", "add", "dwb1", "type", "bridge")
	run(t, "ip", "link", "add", "dwv1", "type", "veth", "peer", "dwc1")
	run(t, "ip", "link", "set", "dwv1", "alias", "somebody's")
	before := run(t, "ip", "-d", "link")
	b, v := bridge(1), veth(1, "dwb1")
	if got := observe(t, k, b, v, address("dwb1", "10.0.0.1/24")); len(got) > 0 {
		t.Errorf("observed what is not ours: %s", got)
	}
	if got := observeAll(t, k); len(got) > 0 {
		t.Errorf("observed what is not ours: %s", got)
	}
	for _, op := range append(append(add(b, v, address("dwb1", "10.0.0.1/24")), replace(b, v)...), remove(v, b, address("dwb1", "10.0.0.1/24"))...) {
		var foreign *kernel.ForeignError
		err := k.Do(context.Background(), []plan.Op{op})
		if !errors.As(err, &foreign) || !strings.Contains(err.Error(), op.String()) {
			t.Errorf("%s: %v", op, err)
		}
	}
	flush(t, k)
	if after := run(t, "ip", "-d", "link"); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
	if err := k.Do(context.Background(), add(veth(2, "dwb3"))); err == nil || !strings.Contains(err.Error(), "bridge dwb3") {
		t.Errorf("a port of a bridge that is not there: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	b, other := bridge(1), bridge(2)
	four, six, local := address("dwb1", "10.0.0.1/24"), address("dwb1", "fd00::1/64"), address("dwb1", "fe80::1/64")
	elsewhere := address("dwb2", "10.0.0.1/24")
	do(t, k, add(b, other, four, six, local, elsewhere)...)
	do(t, k, add(four, six, local)...) // again is fine
	holds(t, k, b, four, six, local, elsewhere)
	if all := observeAll(t, k); len(plan.Diff(all, plan.Of(b, other, four, six, local, elsewhere))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	if got := run(t, "ip", "addr", "show", "dev", "dwb1"); strings.Contains(got, "tentative") {
		t.Errorf("duplicate address detection: %s", got)
	}
	if got := run(t, "ip", "route"); !strings.Contains(got, "10.0.0.0/24 dev dwb1") {
		t.Errorf("no route to the subnet: %s", got)
	}
	do(t, k, remove(four, six)...)
	do(t, k, remove(four, six, address("dwb9", "10.0.0.1/24"))...) // again is fine
	holds(t, k, local, elsewhere)
	if got := observe(t, k, four, six); len(got) > 0 {
		t.Errorf("still there: %s", got)
	}
	if err := k.Do(context.Background(), add(address("dwb9", "10.0.0.1/24"))); err == nil {
		t.Error("an address was added to a link that is not there")
	}
}

func TestSysctls(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	b := bridge(1)
	forward := plan.Sysctl{Name: "net/ipv4/ip_forward", Value: "1"}
	dotted := plan.Sysctl{Name: "net.ipv4.conf.dwb1.rp_filter", Value: "2"}
	noIPv6 := plan.Sysctl{Name: "net/ipv6/conf/dwb1/disable_ipv6", Value: "1"}
	if got := observe(t, k, dotted, noIPv6); len(got) > 0 {
		t.Errorf("settings of a link that is not there: %s", got)
	}
	do(t, k, add(b, forward, dotted, noIPv6)...)
	holds(t, k, b, forward, dotted, noIPv6)
	do(t, k, remove(forward)...)
	holds(t, k, forward) // never deleted
	if err := k.Do(context.Background(), add(plan.Sysctl{Name: "net/ipv4/no_such_thing", Value: "1"})); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a setting that there is not: %v", err)
	}
	chosen := plan.Sysctl{Name: "net/ipv6/conf/dwb1/accept_ra", Value: "0"}
	do(t, k, add(chosen, plan.Sysctl{Name: chosen.Name, Value: "2", From: "1"})...)
	holds(t, k, chosen) // somebody's choice, not the value to change
	// From another thread, which is in the machine's own namespace, it is the same.
	from := make(chan plan.State)
	go func() { from <- observe(t, k, dotted) }()
	if got := <-from; got[dotted.Key()] != plan.Object(dotted) {
		t.Errorf("seen from another thread: %v", got)
	}
}

func TestSysctlsElsewhere(t *testing.T) {
	inNamespace(t)
	root := t.TempDir()
	if err := os.MkdirAll(root+"/net/ipv4", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/net/ipv4/ip_forward", []byte("0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	k := open(t, kernel.Config{ProcSys: root})
	forward := plan.Sysctl{Name: "net/ipv4/ip_forward", Value: "1"}
	do(t, k, add(forward)...)
	if got, _ := os.ReadFile(root + "/net/ipv4/ip_forward"); !strings.HasPrefix(string(got), "1") {
		t.Errorf("wrote %q", got)
	}
	holds(t, k, forward)
}

func flush(t testing.TB, k *kernel.Kernel) {
	t.Helper()
	if err := k.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}
