package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// passes checks that frames go both ways between a container in VLAN 100 and the wire.
func (l *vlanLab) passes(t *testing.T, c *tap, after string) {
	t.Helper()
	l.settle(t)
	l.wire.receive(t, last(t, c, "out "+after))
	l.wire.send(t, "in "+after, tagged(100))
	c.receive(t, "in "+after)
}

func last(t *testing.T, p *tap, text string) string {
	t.Helper()
	p.send(t, text)
	return text
}

// TestVLANRepair: whatever somebody changes is observed, by name and among all, and put right.
func TestVLANRepair(t *testing.T) {
	l := newVLANLab(t)
	v, other := vlan(1, 100), vlan(2, 200)
	do(t, l.k, add(v, other)...)
	c := behind(t, v, 1).tap(t, "eth0")
	l.passes(t, c, "the beginning")
	index := linkIndex(t, "dwt1")
	for _, change := range []string{
		"tc filter del dev eth0 ingress pref 25719 handle 100 protocol 802.1Q bpf",
		"tc filter del dev eth0 ingress",
		"tc qdisc del dev eth0 clsact",
		"tc filter del dev dwt1 egress",
		"tc filter del dev dwt1 ingress",
		"tc qdisc del dev dwt1 clsact",
		"ip link set dwt1 down",
		"ip link set dwu1 down",
		"ip link set dwt1 mtu 1400",
		"ip link set eth0 mtu 1400",
		"ip link set eth0 mtu 1500",
		"ip link set dwt1 address 02:00:00:00:00:77",
		"ip link set eth0 address 02:00:00:00:00:02",
		"ip link set eth0 promisc off",
	} {
		here(t, change)
		repairs(t, l.k, change, v, other)
		l.passes(t, c, change)
	}
	run(t, "ip", "link", "set", "dwt1", "alias", "dockway network=another")
	repairs(t, l.k, "another alias", v, other)
	if linkIndex(t, "dwt1") != index {
		t.Error("the link was made anew, and has lost its switch")
	}
	if got := run(t, "ip", "addr", "show", "dev", "dwt1") + run(t, "ip", "addr", "show", "dev", "dwu1"); strings.Contains(got, "inet") || strings.Count(got, "NOARP") != 2 {
		t.Errorf("the pair speaks for the host: %s", got)
	}

	// Another number, another uplink: nothing of the old stays.
	moved := v
	moved.ID = 101
	do(t, l.k, replace(moved)...)
	holds(t, l.k, moved, other)
	here(t, "ip link add eth1 type veth peer name eth2", "ip link set eth1 up")
	moved.Uplink = "eth1"
	do(t, l.k, replace(moved)...)
	holds(t, l.k, moved, other)
	if got := run(t, "tc", "filter", "show", "dev", "eth0", "ingress"); strings.Contains(got, "dwt1") {
		t.Errorf("left on the old uplink: %s", got)
	}
	do(t, l.k, replace(v)...)
	if got := run(t, "ip", "link", "show", "eth1"); strings.Contains(got, "PROMISC") {
		t.Errorf("the old uplink is still promiscuous: %s", got)
	}
	l.passes(t, c, "moving back")

	// The link is deleted, half of it is gone, or it is of another kind. A link made anew is not on the bridge.
	for _, change := range []string{
		"ip link del dwt1", "ip link del dwu1", "ip link set dwu1 netns " + newPlace(t).path,
		"ip link set dwt1 netns " + newPlace(t).path,
	} {
		here(t, change)
		repairs(t, l.k, change, v, other)
		here(t, "ip link set dwt1 master br1")
		l.passes(t, c, change)
	}
	here(t, "ip link del dwt1", "ip link add dwt1 type bridge")
	run(t, "ip", "link", "set", "dwt1", "alias", v.Alias)
	repairs(t, l.k, "another kind", v, other)
}

// TestVLANUplinkReturns: an uplink that vanishes and returns has another index.
func TestVLANUplinkReturns(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	do(t, l.k, add(v)...)
	c := behind(t, v, 1).tap(t, "eth0")
	here(t, "ip link del eth0")
	if got := plan.Diff(observeAll(t, l.k), plan.Of(v)); len(got) != 1 || got[0].Verb != plan.Replace {
		t.Errorf("without its uplink there is to do: %v", got)
	}
	if err := l.k.Do(context.Background(), replace(v)); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "uplink eth0") {
		t.Errorf("without its uplink: %v", err)
	}
	l.plug(t)
	repairs(t, l.k, "the uplink's return", v)
	l.passes(t, c, "the uplink's return")
	// Another link has the uplink's name.
	here(t, "ip link set eth0 down", "ip link set eth0 name eth9", "ip link set eth9 up", "ip link add eth0 type veth peer name eth8", "ip link set eth0 up")
	repairs(t, l.k, "an exchange of uplinks", v)
	here(t, "ip link del eth0", "ip link set eth9 down", "ip link set eth9 name eth0", "ip link set eth0 up")
	repairs(t, l.k, "the exchange back", v)
	l.passes(t, c, "the exchange back")
	do(t, l.k, remove(v)...)
	here(t, "ip link del eth0")
	do(t, l.k, remove(v)...) // again is fine, without the uplink too
	flush(t, l.k)
	if exists(t, "dwt1") || exists(t, "dwu1") {
		t.Error("the pair is there")
	}
}

// TestVLANDelete: nothing stays but what is somebody else's.
func TestVLANDelete(t *testing.T) {
	l := newVLANLab(t)
	v, other := vlan(1, 100), vlan(2, 200)
	clean := func() {
		t.Helper()
		flush(t, l.k)
		for _, hook := range []string{"ingress", "egress"} {
			if got := run(t, "tc", "filter", "show", "dev", "eth0", hook); got != "" {
				t.Errorf("filters are there: %s", got)
			}
		}
		if got := run(t, "ip", "link"); strings.Contains(got, "dwt") || strings.Contains(got, "dwu") || strings.Contains(got, "PROMISC") {
			t.Errorf("links are there: %s", got)
		}
		if left := observeAll(t, l.k); len(left) > 0 {
			t.Errorf("observed: %s", left)
		}
	}
	do(t, l.k, add(v, other)...)
	if got := run(t, "ip", "link", "show", "eth0"); !strings.Contains(got, "PROMISC") {
		t.Errorf("the uplink is not promiscuous: %s", got)
	}
	do(t, l.k, remove(v)...)
	holds(t, l.k, other)
	if left := observe(t, l.k, v); len(left) > 0 {
		t.Errorf("observed: %s", left)
	}
	do(t, l.k, remove(other, v)...)
	clean()
	do(t, l.k, add(v)...)
	holds(t, l.k, v)
	do(t, l.k, remove(v)...)
	clean()

	// What is left when the link is gone is found, by name and among all, and removed.
	do(t, l.k, add(v, other)...)
	here(t, "ip link del dwt1")
	if got := observe(t, l.k, v); len(got) != 1 {
		t.Errorf("filters without a link are not observed: %v", got)
	}
	if ops := plan.Diff(observeAll(t, l.k), plan.Of(other)); len(ops) != 1 || ops[0].Verb != plan.Delete {
		t.Errorf("filters without a link: to do %v", ops)
	} else {
		do(t, l.k, ops...)
	}
	holds(t, l.k, other)
	here(t, "ip link del dwt2")
	do(t, l.k, plan.Diff(observeAll(t, l.k), nil)...)
	clean()

	// Of a link that somebody made his own, what is ours goes.
	do(t, l.k, add(v)...)
	here(t, "ip link set dwt1 alias somebody's")
	var foreign *kernel.ForeignError
	if err := l.k.Do(context.Background(), plan.Diff(observeAll(t, l.k), nil)); !errors.As(err, &foreign) {
		t.Errorf("somebody else's link: %v", err)
	}
	if !exists(t, "dwt1") {
		t.Error("somebody else's link was deleted")
	}
	here(t, "ip link del dwt1")
	clean()

	// An uplink that somebody made promiscuous stays so.
	here(t, "ip link set eth0 promisc on")
	do(t, l.k, add(v)...)
	do(t, l.k, remove(v)...)
	if got := run(t, "ip", "link", "show", "eth0"); !strings.Contains(got, "PROMISC") {
		t.Errorf("the uplink is not promiscuous any more: %s", got)
	}
}

// TestVLANCrash: after a crash between any two steps, what there is can be completed, and removed.
func TestVLANCrash(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	// What a process leaves that dies before each step of making, and of deleting.
	for _, left := range []string{
		"ip link del dwt1",
		"tc filter del dev eth0 ingress pref 25719 handle 100 protocol 802.1Q bpf",
		"tc filter del dev eth0 ingress pref 25719 handle 100 protocol 802.1Q bpf; ip link set eth0 promisc off",
		"tc filter del dev eth0 ingress; ip link set eth0 promisc off",
		"tc filter del dev eth0 ingress; ip link set eth0 promisc off; ip link set dwt1 down",
		"tc filter del dev eth0 ingress; ip link set eth0 promisc off; ip link set dwt1 down; ip link set dwu1 down; tc filter del dev dwt1 egress",
		"tc filter del dev eth0 ingress; ip link set eth0 promisc off; ip link set dwt1 down; ip link set dwu1 down; tc qdisc del dev dwt1 clsact; ip link set dwu1 alias nothing",
		"ip link set eth0 promisc off",
		"ip link set eth0 promisc off; tc filter del dev eth0 ingress pref 25719 handle 0x1000 protocol 802.1Q bpf",
	} {
		for _, repair := range []bool{true, false} {
			do(t, l.k, add(v)...)
			here(t, strings.Split(left, "; ")...)
			if repair {
				repairs(t, l.k, left, v)
			}
			do(t, l.k, plan.Diff(observeAll(t, l.k), nil)...)
			flush(t, l.k)
			if got := run(t, "tc", "filter", "show", "dev", "eth0", "ingress") + run(t, "ip", "link"); strings.Contains(got, "dw") || strings.Contains(got, "PROMISC") {
				t.Errorf("after a crash that left %q there is: %s", left, got)
			}
		}
	}
	// A link that was born and never finished, with its idle end.
	here(t, "ip link add dwt1 group 25719 type veth peer dwu1")
	do(t, l.k, add(v)...)
	holds(t, l.k, v)
}

// TestVLANStray: a filter of ours that feeds a VLAN's link from elsewhere too, as a crash leaves it in
// the middle of a change, is observed and goes.
func TestVLANStray(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	here(t, "ip link add eth1 type veth peer name eth2", "ip link set eth1 up", "tc qdisc add dev eth1 clsact")
	do(t, l.k, add(v)...)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	for link, id := range map[string]int{"eth0": 101, "eth1": 100} {
		index := func(name string) int {
			l, err := net.InterfaceByName(name)
			if err != nil {
				t.Fatal(err)
			}
			return l.Index
		}
		err = netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs:  netlink.FilterAttrs{LinkIndex: index(link), Parent: netlink.HANDLE_MIN_INGRESS, Handle: uint32(id), Priority: 0x6477, Protocol: unix.ETH_P_8021Q},
			Fd:           program.FD(),
			Name:         fmt.Sprintf("dockway vlan %d of %s/%d on dwt1/%d", id, link, index(link), index("dwt1")),
			DirectAction: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := plan.Diff(observeAll(t, l.k), plan.Of(v)); len(got) != 1 || got[0].Verb != plan.Replace {
			t.Errorf("with a second filter on %s there is to do: %v", link, got)
		}
		do(t, l.k, plan.Diff(observeAll(t, l.k), plan.Of(v))...)
		holds(t, l.k, v)
		if got := run(t, "tc", "filter", "show", "dev", link, "ingress"); strings.Contains(got, fmt.Sprintf("dockway vlan %d of %s", id, link)) {
			t.Errorf("the filter is still there: %s", got)
		}
	}
}

// TestVLANForeign: what is somebody else's stays as it is.
func TestVLANForeign(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	here(t, "tc qdisc add dev eth0 clsact",
		"tc filter add dev eth0 ingress pref 7 protocol all u32 match u8 0 0 flowid 1:1",
		"tc filter add dev eth0 ingress pref 50000 protocol 802.1Q u32 match u8 0 0 flowid 1:1",
		"tc filter add dev eth0 egress pref 7 protocol all u32 match u8 0 0 flowid 1:1")
	theirs := func() string {
		return run(t, "tc", "qdisc", "show", "dev", "eth0") + run(t, "tc", "filter", "show", "dev", "eth0", "ingress") + run(t, "tc", "filter", "show", "dev", "eth0", "egress")
	}
	before := theirs()
	do(t, l.k, add(v)...)
	holds(t, l.k, v)
	do(t, l.k, remove(v)...)
	flush(t, l.k)
	if after := theirs(); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
	// The older qdisc, which has but the one hook.
	here(t, "tc qdisc del dev eth0 clsact", "tc qdisc add dev eth0 ingress")
	before = theirs()
	do(t, l.k, add(v)...)
	holds(t, l.k, v)
	c := behind(t, v, 1).tap(t, "eth0")
	l.passes(t, c, "adding to the qdisc ingress")
	do(t, l.k, remove(v)...)
	flush(t, l.k)
	if after := theirs(); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
	// Somebody is where our filters go.
	here(t, "tc filter add dev eth0 ingress pref 25719 protocol 802.1Q u32 match u8 0 0 flowid 1:1")
	before = theirs()
	if err := l.k.Do(context.Background(), add(v)); err == nil || !strings.Contains(err.Error(), "uplink eth0") {
		t.Errorf("our priority is taken: %v", err)
	}
	do(t, l.k, remove(v)...)
	flush(t, l.k)
	if after := theirs(); after != before {
		t.Errorf("changed what is not ours:\n%s\n%s", before, after)
	}
	here(t, "tc filter del dev eth0 ingress pref 25719")
	// Somebody has the link's name.
	here(t, "ip link add dwt1 type bridge")
	for _, op := range append(add(v), remove(v)...) {
		var foreign *kernel.ForeignError
		if err := l.k.Do(context.Background(), []plan.Op{op}); !errors.As(err, &foreign) {
			t.Errorf("%s: %v", op, err)
		}
	}
	if got := observeAll(t, l.k); len(got) > 0 {
		t.Errorf("observed what is not ours: %s", got)
	}
}

func TestVLANRefused(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	do(t, l.k, add(v)...)
	for want, wrong := range map[string]plan.VLAN{
		"VLAN 0 is not in 1 to 4094":    {Name: "dwt2", Alias: "dockway", Uplink: "eth0"},
		"VLAN 4095 is not in 1 to 4094": {Name: "dwt2", Alias: "dockway", Uplink: "eth0", ID: 4095},
		"uplink eth7":                   {Name: "dwt2", Alias: "dockway", Uplink: "eth7", ID: 5},
		"uplink lo is no Ethernet link": {Name: "dwt2", Alias: "dockway", Uplink: "lo", ID: 5},
		"itself a VLAN":                 {Name: "dwt2", Alias: "dockway", Uplink: "dwt1", ID: 5},
		"already on link dwt1":          {Name: "dwt2", Alias: "dockway", Uplink: "eth0", ID: 100},
	} {
		if err := l.k.Do(context.Background(), add(wrong)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, not %q", wrong, err, want)
		}
	}
	if exists(t, "dwt2") {
		t.Error("a link was made for nothing")
	}
	holds(t, l.k, v)
	for _, id := range []int{1, 4094} {
		do(t, l.k, add(vlan(10+id, id))...)
		holds(t, l.k, v, vlan(10+id, id))
	}
}

// TestVLANCapabilities: with CAP_BPF and CAP_NET_ADMIN alone it works, and without CAP_BPF the error
// says so. Capabilities are the thread's, and this one ends with the test.
func TestVLANCapabilities(t *testing.T) {
	l := newVLANLab(t)
	runtime.LockOSThread()
	limit := func(capabilities ...int) {
		t.Helper()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data, kept [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			t.Fatal(err)
		}
		for i := range kept {
			kept[i].Permitted = data[i].Permitted
		}
		for _, c := range capabilities {
			kept[c/32].Effective |= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &kept[0]); err != nil {
			t.Fatal(err)
		}
	}
	limit(unix.CAP_NET_ADMIN, unix.CAP_DAC_OVERRIDE)
	err := l.k.Do(context.Background(), add(vlan(1, 100)))
	if !errors.Is(err, unix.EPERM) || !strings.Contains(fmt.Sprint(err), "lacks CAP_BPF") {
		t.Errorf("without CAP_BPF: %v", err)
	}
	if exists(t, "dwt1") {
		t.Error("a link was made for nothing")
	}
	limit(unix.CAP_BPF)
	err = l.k.Do(context.Background(), add(vlan(1, 100)))
	if !errors.Is(err, unix.EPERM) || !strings.Contains(fmt.Sprint(err), "lacks CAP_NET_ADMIN") {
		t.Errorf("without CAP_NET_ADMIN: %v", err)
	}
	limit(unix.CAP_NET_ADMIN, unix.CAP_BPF)
	do(t, l.k, add(vlan(1, 100))...)
	holds(t, l.k, vlan(1, 100))
	limit(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN)
	do(t, l.k, add(vlan(2, 200))...)
	holds(t, l.k, vlan(1, 100), vlan(2, 200))
}
