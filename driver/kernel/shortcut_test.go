package kernel_test

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// TestShortcuts: what is planned is attached, and MACs of other hosts follow the FDB, also those that
// came and went while nobody looked.
func TestShortcuts(t *testing.T) {
	hosts := newOverlayHosts(t, 2, false)
	a, b := hosts[0], hosts[1]
	device := plan.Within{Namespace: tenant, Object: plan.Shortcut{Bridge: "dwb1", Link: "dwo1"}}
	port1 := plan.Within{Namespace: tenant, Object: plan.Shortcut{Bridge: "dwb1", Link: "dwv1", MAC: innerMAC(1), Addresses: [3]netip.Addr{inner4(1), inner6(1)}}}
	objects := append(base(tenant, testVNI, a.local), within(tenant, append(port(1), remote(2, b.local)...)...)...)
	put(t, a.k, append(objects, device, port1)...)
	holds(t, a.k, device, port1)
	a.shortened(t, "dwv1")

	known := func(what string, want ...int) {
		t.Helper()
		state := a.shortcuts(t)
		var macs []plan.MAC
		for _, n := range want {
			macs = append(macs, innerMAC(n))
		}
		got := slices.SortedFunc(maps.Keys(state.Remote), func(a, b plan.MAC) int { return strings.Compare(a.String(), b.String()) })
		if !slices.Equal(got, macs) {
			t.Errorf("%s: MACs behind the VXLAN device are %v, want %v", what, got, macs)
		}
	}
	known("at first", 2)
	do(t, a.k, add(within(tenant, remote(3, b.local)...)...)...)
	known("another came", 2, 3)
	do(t, a.k, remove(within(tenant, remote(2, b.local)...)...)...)
	known("one went", 3)

	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	enter := "nsenter --net=" + filepath.Join(a.dir, tenant) + " "
	a.run(t, enter+"bridge fdb del "+innerMAC(3).String()+" dev dwo1 self", enter+"bridge fdb del "+innerMAC(3).String()+" dev dwo1 master",
		enter+"bridge fdb replace "+innerMAC(4).String()+" dev dwo1 self master static dst "+b.local.String())
	again := openIn(t, a.place, kernel.Config{Namespaces: a.dir, NamespaceTables: namespaceTables()})
	holds(t, again, port1)
	if ops := plan.Diff(observe(t, again, device), plan.Of(device)); len(ops) != 1 {
		t.Errorf("a new process takes the device for followed: %v", ops)
	}
	do(t, again, add(device)...)
	known("after what went on meanwhile", 4)
	holds(t, again, device, port1)

	do(t, again, remove(port1)...)
	if state := a.shortcuts(t); len(state.Ports) != 0 || len(state.VXLAN) != 1 {
		t.Errorf("with the port's gone there are %+v", state)
	}
	if got := observe(t, again, port1, device); len(got) != 1 {
		t.Errorf("with the port's gone, what is observed is %s", got)
	}
}

// TestWithoutShortcuts: where there can be none they count as there, until they are not wanted.
func TestWithoutShortcuts(t *testing.T) {
	hosts := newOverlayHosts(t, 1, false)
	a := hosts[0]
	lost := plan.Within{Namespace: tenant, Object: plan.Shortcut{Bridge: "dwb1", Link: "dwv9", MAC: innerMAC(9), Addresses: [3]netip.Addr{inner4(9)}}}
	put(t, a.k, append(base(tenant, testVNI, a.local), lost)...)
	holds(t, a.k, lost)
	do(t, a.k, remove(lost)...)
	if got := observe(t, a.k, lost); len(got) != 0 {
		t.Errorf("one that is not wanted any more is observed: %s", got)
	}
}

// shortened waits until a port is attached.
func (h *overlayHost) shortened(t *testing.T, link string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; {
		if slices.ContainsFunc(h.shortcuts(t).Ports, func(p fastpath.Port) bool { return p.Link == link }) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("port %s is not attached", link)
		}
	}
}

// shortcuts is what is attached to the bridge of the host's overlay.
func (h *overlayHost) shortcuts(t *testing.T) fastpath.State {
	t.Helper()
	file, err := os.Open(filepath.Join(h.dir, tenant))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // read only
	path, err := fastpath.Open(file, "dwb1")
	if err != nil {
		t.Fatal(err)
	}
	defer path.Close() //nolint:errcheck // nothing is written
	state, err := path.List()
	if err != nil {
		t.Fatal(err)
	}
	return state
}
