package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// newOverlayHost makes a host alone.
func newOverlayHost(t testing.TB) *overlayHost {
	t.Helper()
	inNamespace(t)
	h := &overlayHost{place: newPlace(t), dir: pinDirectory(t)}
	h.k = h.open(t)
	h.run(t, "ip link set lo up")
	return h
}

// open opens the host once more, as another process does.
func (h *overlayHost) open(t testing.TB) *kernel.Kernel {
	t.Helper()
	return openIn(t, h.place, kernel.Config{Namespaces: h.dir, NamespaceTables: namespaceTables()})
}

// shared are the keys of what ObserveAll lists only when asked.
func shared(objects []plan.Object) (keys []plan.Key) {
	for _, o := range objects {
		if o.Key().Kind == plan.KindSysctl {
			keys = append(keys, o.Key())
		}
	}
	return keys
}

// complete checks that objects are what there is, key by key and from a look at everything.
func complete(t testing.TB, k *kernel.Kernel, when string, objects ...plan.Object) {
	t.Helper()
	for how, observed := range map[string]plan.State{"by key": observe(t, k, objects...), "of everything": observeAll(t, k, shared(objects)...)} {
		if left := plan.Diff(observed, plan.Of(objects...)); len(left) > 0 {
			t.Errorf("%s: from a look %s there is left to do: %v", when, how, left)
		}
	}
}

// TestNamespaceKinds puts every kind that a namespace has.
func TestNamespaceKinds(t *testing.T) {
	h := newOverlayHost(t)
	all := everything("198.18.0.1")
	if got := observe(t, h.k, all...); len(got) > 0 {
		t.Errorf("observed before anything is made: %s", got)
	}
	put(t, h.k, all...)
	complete(t, h.k, "put", all...)
	before := h.in(t, tenant, "ip -o link")
	put(t, h.k, all...)
	complete(t, h.k, "put again", all...)
	if after := h.in(t, tenant, "ip -o link"); after != before {
		t.Errorf("put again, links are others:\n%s\n%s", before, after)
	}
	for what, want := range map[string][]string{
		"ip -d link show dwo1": {"vxlan id 5001 local 198.18.0.1", "dstport 4790", "nolearning", "udpcsum", "master dwb1", "learning off", "flood off", "neigh_suppress on",
			"isolated off", "hairpin off", "mtu 1430", "alias dockway network=1", "addrgenmode none", "link-netnsid", ",UP"},
		"ip -d link show dwv1":                             {"learning off", "hairpin on", "master dwb1", "mtu 1430"},
		"ip link show lo":                                  {"UP"},
		"ip route":                                         {"default via 169.254.192.0 dev dwg0 proto 100"},
		"ip -6 addr show dev dwg0":                         {},
		"ip neigh show nud permanent":                      {"198.19.0.2 dev dwb1 lladdr 02:5a:00:00:00:02"},
		"ip -6 neigh show nud permanent":                   {"fd00:90::2 dev dwb1 lladdr 02:5a:00:00:00:02"},
		"bridge fdb show dev dwo1":                         {"02:5a:00:00:00:02 dst 198.18.0.2 link-netnsid 0 self static", "02:5a:00:00:00:02 master dwb1 static"},
		"bridge fdb show dev dwv1":                         {"02:5a:00:00:00:01 master dwb1 static"},
		"nft list table bridge dockway":                    {"iifname @inner"},
		"cat /proc/sys/net/bridge/bridge-nf-call-iptables": {"0"},
	} {
		got := h.in(t, tenant, what)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s lacks %q: %s", what, w, got)
			}
		}
		if len(want) == 0 && got != "" {
			t.Errorf("%s shows %s", what, got)
		}
	}
	host := h.run(t, "ip -d -o link")
	for _, w := range []string{"dwc1", "link/ether 02:5a:00:00:00:01", "dwg1"} {
		if !strings.Contains(host, w) {
			t.Errorf("the host lacks %s: %s", w, host)
		}
	}
	for _, w := range []string{"dwb1", "dwo1", "dwv1:", "vxlan"} {
		if strings.Contains(host, w) {
			t.Errorf("the host has %s: %s", w, host)
		}
	}
	if got := h.run(t, "ip -6 addr show dev dwg1"); got != "" {
		t.Errorf("the kernel gave the transit an address: %s", got)
	}
	if got := h.run(t, "cat /proc/sys/net/bridge/bridge-nf-call-iptables"); !strings.HasPrefix(got, "1") {
		t.Errorf("a setting of the namespace is the host's: %s", got)
	}
	info, err := os.Stat(h.dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of namespaces: %v, %v", info.Mode(), err)
	}

	// Another process beside, and a later one, find it all.
	beside := h.open(t)
	complete(t, beside, "another process", all...)
	if err := errors.Join(h.k.Close(), beside.Close()); err != nil {
		t.Fatal(err)
	}
	h.k = h.open(t)
	complete(t, h.k, "a later process", all...)

	// Deleted one by one, backwards.
	do(t, h.k, plan.Diff(observeAll(t, h.k), nil)...)
	if got := observeAll(t, h.k); len(got) > 0 {
		t.Errorf("deleted, and still listed: %s", got)
	}
	do(t, h.k, plan.Diff(plan.Of(all...), nil)...) // again is fine
	flush(t, h.k)
	eventually(t, "nothing is left", func() bool { return h.leftovers(t) == "" })
	put(t, h.k, all...) // what is being destroyed is waited for
	complete(t, h.k, "put at once after it was deleted", all...)
	// The namespace alone, with all that is in it.
	do(t, h.k, remove(plan.Namespace{Name: tenant})...)
	put(t, h.k, all...)
	complete(t, h.k, "put at once after its namespace was deleted", all...)
}

// TestNamespaceChanges changes what can be changed.
func TestNamespaceChanges(t *testing.T) {
	h := newOverlayHost(t)
	all := plan.Of(everything("198.18.0.1")...)
	do(t, h.k, plan.Diff(nil, all)...)
	left := func() []plan.Op {
		return plan.Diff(observeAll(t, h.k, shared(slices.Collect(maps.Values(all)))...), all)
	}
	change := func(what string, o plan.Object, steps int) {
		t.Helper()
		all.Add(o)
		for range steps {
			do(t, h.k, left()...)
		}
		if left := left(); len(left) > 0 {
			t.Errorf("%s: left to do: %v", what, left)
		}
	}
	const once, again = 1, 2 // again: what went with a device that is made anew comes back with the next look
	v := vxlan(testVNI, netip.MustParseAddr("198.18.0.9"))
	first := h.in(t, tenant, "ip -o link show dwo1")
	w := func(o plan.Object) plan.Object { return plan.Within{Namespace: tenant, Object: o} }
	change("another address of the host", w(v), once)
	if now := h.in(t, tenant, "ip -o link show dwo1"); now != first {
		t.Errorf("made anew: %s", now)
	}
	v.MTU, v.Isolated = 1300, true
	change("another MTU, isolated", w(v), once)
	v.VNI = 6001
	change("another VNI", w(v), again)
	v.Port = 4791
	change("another UDP port", w(v), again)
	v.Local = netip.MustParseAddr("fd00:18::1")
	all.Add(w(plan.FDB{Link: "dwo1", MAC: innerMAC(2), VTEP: netip.MustParseAddr("fd00:18::2")}))
	change("IPv6", w(v), again)
	v.Up = false
	change("down", w(v), once)
	b := innerBridge()
	b.MTU = 1300
	change("another MTU of the bridge, whose neighbours stay", w(b), once)
	b.MAC = innerMAC(77)
	change("another MAC of the bridge, whose neighbours go", w(b), again)
	transit := plan.Transit{Name: "dwg1", Alias: "dockway network=1", Namespace: tenant, Peer: "dwg0", MTU: 1300, Up: true}
	change("another MTU to the host", transit, once)
	transit.Alias = "dockway network=2"
	change("another alias", transit, once)
	transit.Namespace, transit.Up = tenant2, false
	for key := range all {
		if strings.Contains(key.Name, "dwg0") {
			delete(all, key)
		}
	}
	all.Add(plan.Namespace{Name: tenant2})
	change("another namespace", transit, again)
}

// TestNamespaceRepaired: what others change ticks, is seen, and is put back; what we do does not tick.
func TestNamespaceRepaired(t *testing.T) {
	h := newOverlayHost(t)
	ticks, err := h.k.Watch(ctx())
	if err != nil {
		t.Fatal(err)
	}
	all := everything("198.18.0.1")
	second := within(tenant, port(5)...)
	all = append(all, second...)
	wanted := plan.Of(all...)
	put(t, h.k, all...)
	silent(t, ticks, "what we did ourselves")
	observeAll(t, h.k)
	path := filepath.Join(h.dir, tenant)
	plug := func() { // it may be a new one
		t.Helper()
		h.run(t, "ip link set dwc1 addrgenmode none", "ip link set dwc1 up")
		eventually(t, "the port forwards", func() bool { return strings.Contains(h.in(t, tenant, "bridge link show dev dwv1"), "state forwarding") })
	}
	for _, change := range []string{
		"ip link del dwo1", "ip link del dwv1", "ip link del dwb1", "ip link del dwg0",
		"ip link set dwo1 nomaster", "ip link set dwo1 down", "ip link set dwo1 mtu 1300", "ip link set dwb1 down",
		"bridge link set dev dwo1 learning on", "bridge link set dev dwo1 flood on", "bridge link set dev dwo1 neigh_suppress off",
		"bridge link set dev dwo1 isolated on", "bridge link set dev dwv1 learning on",
		"ip link set dwo1 type vxlan local 198.18.0.9", "ip link set dwo1 type vxlan learning",
		"ip link set dwg0 mtu 1300", "ip link set dwg0 down", "ip link set dwg0 alias other",
		"bridge fdb del 02:5a:00:00:00:02 dev dwo1 self", "bridge fdb del 02:5a:00:00:00:02 dev dwo1 master",
		"bridge fdb replace 02:5a:00:00:00:02 dev dwo1 self dst 198.18.0.77 static", "bridge fdb replace 02:5a:00:00:00:02 dev dwo1 self dst 198.18.0.2 dynamic",
		"bridge fdb replace 02:5a:00:00:00:02 dev dwv1 master static", "bridge fdb replace 02:5a:00:00:00:01 dev dwv1 master dynamic",
		"bridge fdb replace 02:5a:00:00:00:02 dev dwo1 self dst 198.18.0.2 port 99 static",
		"bridge fdb del 02:5a:00:00:00:01 dev dwv1 master", "bridge fdb replace 02:5a:00:00:00:02 dev dwo1 self nhid 7 static",
		"bridge fdb add 02:5a:00:00:00:99 dev dwo1 self dst 198.18.0.2 static", "bridge fdb add 00:00:00:00:00:00 dev dwo1 self dst 198.18.0.2",
		"ip neigh del 198.19.0.2 dev dwb1", "ip neigh replace 198.19.0.2 lladdr 02:00:00:00:00:99 dev dwb1 nud permanent", "ip neigh replace 198.19.0.2 lladdr 02:5a:00:00:00:02 dev dwb1 nud stale",
		"ip -6 neigh del fd00:90::2 dev dwb1", "ip neigh add 198.19.0.99 lladdr 02:00:00:00:00:99 dev dwb1 nud permanent",
		"ip addr del 198.19.0.254/24 dev dwb1", "ip addr add 198.19.1.254/24 dev dwb1", "ip addr del 169.254.192.1/31 dev dwg0",
		"ip route del default", "nft flush ruleset", "nft delete element bridge dockway inner { dwv1 }",
		"host ip link set dwg1 down", "host ip link del dwg1", "host ip link set dwg1 mtu 1300", "host ip addr del 169.254.192.0/31 dev dwg1", "host ip neigh del 169.254.192.1 dev dwg1",
	} {
		plug()
		if strings.Contains(change, "nhid") {
			h.run(t, "ip nexthop add id 3 via 198.18.0.77 fdb")
			h.run(t, "ip nexthop add id 7 group 3 fdb")
			h.in(t, tenant, "bridge fdb del 02:5a:00:00:00:02 dev dwo1 self")
		}
		calm(ticks)
		if command, ok := strings.CutPrefix(change, "host "); ok {
			h.run(t, command)
		} else {
			h.run(t, "nsenter --net="+path+" "+change)
		}
		hears(t, ticks, change)
		calm(ticks)
		one, every := plan.Diff(observe(t, h.k, all...), wanted), plan.Diff(observeAll(t, h.k, shared(all)...), wanted)
		if len(every) == 0 {
			t.Errorf("not seen: %s", change)
		}
		if strings.Contains(change, "add ") || strings.Contains(change, "dev dwv1 master static") { // beside what is wanted, or another key
			one = every
		}
		if fmt.Sprint(one) != fmt.Sprint(every) {
			t.Errorf("after %s there is to do: %v; from a look at everything: %v", change, one, every)
		}
		do(t, h.k, every...)
		complete(t, h.k, "repaired after "+change, all...)
		silent(t, ticks, "the repair of "+change)
		if t.Failed() {
			t.FailNow()
		}
	}
	// The namespace is taken away, and another is put in its place.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if got := observe(t, h.k, all...); got[plan.Namespace{Name: tenant}.Key()] != nil {
		t.Errorf("observed without its namespace: %s", got)
	}
	do(t, h.k, plan.Diff(observeAll(t, h.k), wanted)...)
	do(t, h.k, plan.Diff(observeAll(t, h.k), wanted)...)
	complete(t, h.k, "repaired after the namespace was taken away", all...)

	// What is not ours there.
	plug()
	calm(ticks)
	for _, change := range []string{"ip link add eth1 type veth peer eth2", "ip link set eth1 up", "ip addr add 192.0.2.2/24 dev eth1", "nft add table inet other", "ip route add 192.0.3.0/24 dev eth1",
		"bridge fdb add 02:5a:00:00:00:98 dev dwv1 master dynamic", "ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev eth1 nud permanent"} {
		h.in(t, tenant, change)
	}
	silent(t, ticks, "what is not ours")
	complete(t, h.k, "with what is not ours", all...)
}

// TestNamespaceDirectory: namespaces are only in a directory that nobody else can write to.
func TestNamespaceDirectory(t *testing.T) {
	h := newOverlayHost(t)
	n := plan.Namespace{Name: tenant}
	none := openIn(t, h.place, kernel.Config{})
	for _, o := range everything("198.18.0.1")[:3] {
		if err := none.Do(ctx(), add(o)); err == nil || !strings.Contains(err.Error(), "there is no directory for network namespaces") {
			t.Errorf("%s without a directory: %v", o, err)
		}
	}
	if got := observe(t, none, everything("198.18.0.1")...); len(got) > 0 {
		t.Errorf("observed without a directory: %s", got)
	}
	observeAll(t, none)
	for _, name := range []string{"other", "dw/../../x", ""} {
		if err := h.k.Do(ctx(), add(plan.Namespace{Name: name})); err == nil || !strings.Contains(err.Error(), "begins with") {
			t.Errorf("namespace %q: %v", name, err)
		}
	}
	if err := h.k.Do(ctx(), add(within(tenant, innerBridge())...)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("in a namespace that is not there: %v", err)
	}
	do(t, h.k, remove(within(tenant, innerBridge())...)...)

	// Half made: a file and no mount; and a file of that name that is none.
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.dir, tenant), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := observeAll(t, h.k); len(got) > 0 {
		t.Errorf("half made, and observed: %s", got)
	}
	do(t, h.k, add(n)...)
	holds(t, h.k, n)
	if info, err := os.Stat(h.dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory is open to others: %v %v", info.Mode(), err)
	}
	do(t, h.k, remove(n)...)

	// Symbolic links, and the directory of somebody else.
	elsewhere := filepath.Join(filepath.Dir(h.dir), "elsewhere")
	if err := os.Symlink(elsewhere, filepath.Join(h.dir, tenant)); err != nil {
		t.Fatal(err)
	}
	if err := h.k.Do(ctx(), add(n)); err == nil {
		t.Error("a namespace in the place of a symbolic link")
	}
	if _, err := os.Stat(elsewhere); err == nil {
		t.Error("a symbolic link was followed")
	}
	if err := os.Remove(filepath.Join(h.dir, tenant)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(h.dir, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	if err := h.k.Do(ctx(), add(n)); err == nil || !strings.Contains(err.Error(), "belongs to user 1000") {
		t.Errorf("in the directory of somebody else: %v", err)
	}
	if err := errors.Join(os.Remove(h.dir), os.Symlink(t.TempDir(), h.dir)); err != nil {
		t.Fatal(err)
	}
	if err := h.k.Do(ctx(), add(n)); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("in a directory that is a symbolic link: %v", err)
	}
	if err := os.Remove(h.dir); err != nil {
		t.Fatal(err)
	}

	// Without CAP_SYS_ADMIN.
	h.do(t, func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			return err
		}
		less := data
		less[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		if err := unix.Capset(&header, &less[0]); err != nil {
			return err
		}
		err := h.k.Do(ctx(), add(n))
		if back := unix.Capset(&header, &data[0]); back != nil {
			return back
		}
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
			t.Errorf("without CAP_SYS_ADMIN: %v", err)
		}
		return nil
	})
	do(t, h.k, add(n)...)
	holds(t, h.k, n)
}

// TestNamespaceTaken: what the host has of a VXLAN device's is somebody else's.
func TestNamespaceTaken(t *testing.T) {
	h := newOverlayHost(t)
	put(t, h.k, plan.Namespace{Name: tenant}, within(tenant, innerBridge())[0])
	put(t, h.k, plan.Namespace{Name: tenant2}, within(tenant2, innerBridge())[0])
	v := vxlan(testVNI, netip.MustParseAddr("198.18.0.1"))
	try := func(what string, wants ...string) {
		t.Helper()
		err := h.k.Do(ctx(), add(within(tenant, v)...))
		for _, want := range wants {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if got := observeAll(t, h.k); got[(plan.Within{Namespace: tenant, Object: v}).Key()] != nil {
			t.Errorf("%s: there is half a device: %s", what, got)
		}
	}
	h.run(t, "ip link add other type vxlan id 5001 dstport 4790 local 198.18.0.1")
	try("a VNI that is taken", "5001", "4790", "link other")
	h.run(t, "ip link del other")
	do(t, h.k, add(within(tenant2, v)...)...)
	try("a VNI that is taken by another network", "link dwo1 of network namespace dwn2")
	do(t, h.k, remove(within(tenant2, v)...)...)
	flush(t, h.k)
	var fd int
	h.do(t, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		return errors.Join(err, unix.Bind(fd, &unix.SockaddrInet4{Port: testPort}))
	})
	try("a UDP port that is taken", "UDP port 4790", "ss -ulpn")
	unix.Close(fd)
	do(t, h.k, add(within(tenant, v)...)...)
	holds(t, h.k, within(tenant, v)...)
}

// TestNamespaceKilled kills a process that makes and deletes everything, at any time.
func TestNamespaceKilled(t *testing.T) {
	h := newOverlayHost(t)
	all := everything("198.18.0.1")
	for round := range 25 {
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), restless+"="+h.dir)
		var output strings.Builder
		child.Stderr = &output
		h.do(t, child.Start)
		looks := 0
		eventually(t, "the other process is at work", func() bool {
			if strings.Contains(h.run(t, "ip -o link"), "dwg1") {
				looks++
			}
			return looks > round%7
		})
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := child.Wait(); !strings.Contains(fmt.Sprint(err), "killed") {
			t.Fatalf("the other process ended by itself: %v %s", err, output.String())
		}
		if round%2 == 0 {
			do(t, h.k, plan.Diff(observeAll(t, h.k, shared(all)...), plan.Of(all...))...)
			do(t, h.k, plan.Diff(observeAll(t, h.k, shared(all)...), plan.Of(all...))...)
			complete(t, h.k, "killed, then put", all...)
		}
		do(t, h.k, plan.Diff(observeAll(t, h.k), nil)...)
		do(t, h.k, remove(plan.Namespace{Name: tenant})...)
		flush(t, h.k)
		eventually(t, "nothing is left of what was unfinished", func() bool { return h.leftovers(t) == "" })
		if t.Failed() {
			t.FailNow()
		}
	}
}

// TestNamespaceLeavesNothing: no file, goroutine, thread's namespace, mount or link stays behind.
func TestNamespaceLeavesNothing(t *testing.T) {
	h := newOverlayHost(t)
	if err := h.k.Close(); err != nil {
		t.Fatal(err)
	}
	goroutines, files, known := runtime.NumGoroutine(), openFiles(t), threadNamespaces(t)
	for round := range 5 {
		k := h.open(t)
		watching, cancel := context.WithCancel(ctx())
		if _, err := k.Watch(watching); err != nil {
			t.Fatal(err)
		}
		many := openFiles(t)
		put(t, k, everything("198.18.0.1")...)
		observeAll(t, k)
		if got := openFiles(t) - many; got > 6 {
			t.Errorf("a namespace takes %d open files", got)
		}
		if round%2 == 0 {
			do(t, k, plan.Diff(observeAll(t, k), nil)...)
		} else {
			do(t, k, remove(plan.Namespace{Name: tenant}, plan.Transit{Name: "dwg1"})...)
			eventually(t, "the container's end is gone", func() bool { return !strings.Contains(h.run(t, "ip -o link"), "dw") })
		}
		cancel()
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, fmt.Sprintf("there are %d goroutines again", goroutines), func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, fmt.Sprintf("there are %d open files again", files), func() bool { return openFiles(t) <= files })
	for name := range threadNamespaces(t) {
		if !known[name] {
			t.Errorf("a thread is in %s", name)
		}
	}
}

// TestNamespaceFreesIdentifiers: the VXLAN identifier of a namespace that was let go is free at once, however long the kernel
// takes to destroy the rest: somebody still uses the namespace here.
func TestNamespaceFreesIdentifiers(t *testing.T) {
	h := newOverlayHost(t)
	put(t, h.k, base(tenant, testVNI, netip.MustParseAddr("198.18.0.1"))...)
	user, err := os.Open(filepath.Join(h.dir, tenant))
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	do(t, h.k, remove(plan.Namespace{Name: tenant})...)
	put(t, h.k, base(tenant2, testVNI, netip.MustParseAddr("198.18.0.1"))...)
}

// threadNamespaces are those that the threads of this process are in.
func threadNamespaces(t testing.TB) map[string]bool {
	t.Helper()
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, thread := range threads {
		if to, err := os.Readlink(thread); err == nil {
			out[to] = true
		}
	}
	return out
}

// TestManyNamespaces: a hundred are found and observed by a later process.
func TestManyNamespaces(t *testing.T) {
	h := newOverlayHost(t)
	const n = 40
	var all []plan.Object
	for i := range n {
		name := fmt.Sprintf("dwn%d", i)
		all = append(all, base(name, uint32(testVNI+i), netip.MustParseAddr("198.18.0.1"))...)
		all = append(all, within(name, remote(2, netip.MustParseAddr("198.18.0.2"))...)...)
	}
	put(t, h.k, all...)
	complete(t, h.k, "put", all...)
	complete(t, h.open(t), "a later process", all...)
	do(t, h.k, plan.Diff(plan.Of(all...), nil)...)
	eventually(t, "nothing is left", func() bool { return h.leftovers(t) == "" })
}

// TestLeftFiles: what a process leaves that is killed between the making of a namespace's file and its mount is removed
// at the next start, and nothing else.
func TestLeftFiles(t *testing.T) {
	h := newOverlayHost(t)
	put(t, h.k, base("dwn2", testVNI, netip.MustParseAddr("198.18.0.1"))...)
	for name, content := range map[string]string{"dwn1": "", "dwn3": "somebody's", "other": ""} {
		if err := os.WriteFile(filepath.Join(h.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k := h.open(t)
	entries, err := os.ReadDir(h.dir)
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if err != nil || !slices.Equal(left, []string{"dwn2", "dwn3", "other"}) {
		t.Errorf("left are %v, %v", left, err)
	}
	complete(t, k, "kept", base("dwn2", testVNI, netip.MustParseAddr("198.18.0.1"))...)
}

func containsAll(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}
