package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// home is the machine's own network namespace, which no test may touch.
var home, _ = os.Readlink(threadNamespace)

const threadNamespace = "/proc/thread-self/ns/net"

// inNamespace moves the test to a network namespace of its own, which ends with the test's thread.
func inNamespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread() // for good: the thread is not given back
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("these tests need root: unshare: %v", err)
	}
}

// open opens the test's namespace.
func open(t testing.TB, c kernel.Config) *kernel.Kernel {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	c.Log = logrus.NewEntry(logger)
	k, err := kernel.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// run runs a command in the test's namespace, which is the thread's.
func run(t testing.TB, command string, args ...string) string {
	t.Helper()
	return runInput(t, "", command, args...)
}

func runInput(t testing.TB, input, command string, args ...string) string {
	t.Helper()
	if here, _ := os.Readlink(threadNamespace); here == home {
		t.Fatal("a command would be run in the machine's own namespace")
	}
	cmd := exec.Command(command, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", command, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func do(t testing.TB, k *kernel.Kernel, ops ...plan.Op) {
	t.Helper()
	if err := k.Do(context.Background(), ops); err != nil {
		t.Fatal(err)
	}
}

func add(objects ...plan.Object) []plan.Op     { return ops(plan.Add, objects) }
func replace(objects ...plan.Object) []plan.Op { return ops(plan.Replace, objects) }
func remove(objects ...plan.Object) []plan.Op  { return ops(plan.Delete, objects) }

func ops(verb plan.Verb, objects []plan.Object) []plan.Op {
	out := make([]plan.Op, len(objects))
	for i, o := range objects {
		out[i] = plan.Op{Verb: verb, Object: o}
	}
	return out
}

func observe(t testing.TB, k *kernel.Kernel, objects ...plan.Object) plan.State {
	t.Helper()
	s, err := k.Observe(context.Background(), plan.Of(objects...).Keys())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func observeAll(t testing.TB, k *kernel.Kernel, also ...plan.Key) plan.State {
	t.Helper()
	s, err := k.ObserveAll(context.Background(), also)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// holds checks that the kernel holds exactly these objects of those that these keys name.
func holds(t testing.TB, k *kernel.Kernel, objects ...plan.Object) {
	t.Helper()
	observed := observe(t, k, objects...)
	if ops := plan.Diff(observed, plan.Of(objects...)); len(ops) > 0 {
		t.Errorf("the kernel does not hold what it should: left to do: %v", ops)
		for _, o := range observed {
			if table, ok := o.(plan.Table); ok {
				t.Log(table.Table)
			}
		}
	}
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

var (
	wards    = &nft.Set{Family: nft.Inet, Name: "wards", Key: []nft.Type{nft.IPv4}, Guard: true, Comment: "who is guarded"}
	members  = &nft.Set{Family: nft.Inet, Name: "members", Key: []nft.Type{nft.IfName, nft.IPv4}, Comment: "which bridge has whom"}
	members6 = &nft.Set{Family: nft.Inet, Name: "members6", Key: []nft.Type{nft.IfName, nft.IPv6}}
	links    = &nft.Set{Family: nft.Inet, Name: "links", Key: []nft.Type{nft.IfName}}
	few      = &nft.Set{Family: nft.Inet, Name: "few", Key: []nft.Type{nft.IPv4}, Size: 3}
	ports    = &nft.Set{Family: nft.Inet, Name: "ports", Key: []nft.Type{nft.IPv4, nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv4, nft.Service}, Size: 65536}
	ports6   = &nft.Set{Family: nft.Inet, Name: "ports6", Key: []nft.Type{nft.IPv6, nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv6, nft.Service}}
	anyPort  = &nft.Set{Family: nft.Inet, Name: "anyport", Key: []nft.Type{nft.Protocol, nft.Service}, Data: []nft.Type{nft.IPv4, nft.Service}}
	seen     = &nft.Set{Family: nft.Inet, Name: "seen", Key: []nft.Type{nft.IPv4, nft.Service}, Dynamic: true, Timeout: 90 * time.Second, Size: 100}

	senders  = &nft.Set{Family: nft.Bridge, Name: "senders", Key: []nft.Type{nft.IfName, nft.MAC, nft.IPv4}}
	senders6 = &nft.Set{Family: nft.Bridge, Name: "senders6", Key: []nft.Type{nft.IfName, nft.MAC, nft.IPv6}}
	stations = &nft.Set{Family: nft.Bridge, Name: "stations", Key: []nft.Type{nft.IfName, nft.MAC}}
	flows    = &nft.Set{Family: nft.Bridge, Name: "flows", Key: []nft.Type{nft.IPv6, nft.IPv6, nft.Protocol}, Dynamic: true, Timeout: 10 * time.Minute, Size: 1000}
)

// inetTable has every statement that means something to routed packets.
func inetTable() *nft.Table {
	return &nft.Table{
		Family: nft.Inet, Name: "dockway",
		Sets: []*nft.Set{wards, members, members6, links, few, ports, ports6, anyPort, seen},
		Chains: []*nft.Chain{
			{Name: "raw", Type: "filter", Hook: "prerouting", Priority: -300, Rules: []nft.Rule{
				nft.R("", nft.Is(nft.IIfName, "dwb*"), nft.In(members, nft.IIfName, nft.IPDAddr), nft.Notrack{}, nft.Accept),
				nft.R("", nft.Is(nft.IIfName, "dwb*"), nft.NotIn(members6, nft.IIfName, nft.IP6DAddr), nft.Drop),
				nft.R("guards are closed to all others", nft.In(wards, nft.IPDAddr), nft.IsNot(nft.IIfName, "lo"), nft.Drop),
				nft.R("", nft.Is(nft.IPDAddr, "127.0.0.0/8"), nft.In(ports, nft.IPDAddr, nft.L4Proto, nft.DPort), nft.Drop),
				nft.R("", nft.IsNot(nft.IPSAddr, "10.0.0.0/9"), nft.Is(nft.IPDAddr, "10.1.2.3"), nft.Accept),
				nft.R("", nft.Is(nft.IP6SAddr, "fe80::/10"), nft.IsNot(nft.IP6DAddr, "fe80::/64"), nft.Is(nft.IP6DAddr, "ff02::1"), nft.Accept),
				nft.R("", nft.Is(nft.IP6DAddr, "::1"), nft.Update{Set: seen, Fields: []nft.Field{nft.IPSAddr, nft.DPort}}),
				nft.R("", nft.Update{Set: seen, Fields: []nft.Field{nft.IPSAddr, nft.DPort}}),
				nft.R("", nft.AnyOf(nft.IIfName, "lo", "dwb1"), nft.Is(nft.ICMPv6Type, "nd-router-advert"), nft.Drop),
			}},
			{Name: "mangle", Type: "filter", Hook: "prerouting", Priority: -150},
			{Name: "early", Type: "filter", Hook: "prerouting", Priority: -305},
			{Name: "in", Type: "filter", Hook: "input", Priority: 50},
			{Name: "odd", Type: "filter", Hook: "input", Priority: 11},
			{Name: "prerouting", Type: "nat", Hook: "prerouting", Priority: -100, Rules: []nft.Rule{
				nft.R("to this host", nft.Is(nft.FibDaddrType, "local"), nft.Jump("publish")),
			}},
			{Name: "output", Type: "nat", Hook: "output", Priority: -100, Rules: []nft.Rule{
				nft.R("", nft.AnyOf(nft.FibDaddrType, "local", "broadcast"), nft.Goto("publish")),
			}},
			{Name: "publish", Rules: []nft.Rule{
				nft.R("one address", nft.DNAT{Fields: []nft.Field{nft.IPDAddr, nft.L4Proto, nft.DPort}, Map: ports}),
				nft.R("one address (6)", nft.DNAT{Fields: []nft.Field{nft.IP6DAddr, nft.L4Proto, nft.DPort}, Map: ports6}),
				nft.R("any address", nft.DNAT{Fields: []nft.Field{nft.L4Proto, nft.DPort}, Map: anyPort}),
			}},
			{Name: "forward", Type: "filter", Hook: "forward", Priority: -1, Rules: []nft.Rule{
				nft.R("", nft.AnyOf(nft.CtState, "established", "related"), nft.MarkSet{Bit: 0x1000}, nft.Accept),
				nft.R("", nft.NoneOf(nft.CtState, "established", "related"), nft.Is(nft.CtState, "invalid"), nft.Drop),
				nft.R("", nft.IsNot(nft.CtState, "new"), nft.IsNot(nft.CtStatus, "dnat"), nft.Is(nft.CtStatus, "snat"), nft.Drop),
				nft.R("", nft.Is(nft.OIfKind, "bridge"), nft.NotIn(links, nft.OIfName), nft.Accept),
				nft.R("", nft.AnyOf(nft.PktType, "broadcast", "multicast"), nft.IsNot(nft.PktType, "host"), nft.Accept),
				nft.R("", nft.Is(nft.EtherType, "ip"), nft.NoneOf(nft.L4Proto, "icmp", "igmp", "tcp", "udp", "ipv6-icmp"), nft.Drop),
				nft.R("", nft.Is(nft.L4Proto, "udp"), nft.Is(nft.SPort, "67"), nft.Is(nft.DPort, "68"), nft.Drop),
				nft.R("", nft.Is(nft.L4Proto, "tcp"), nft.Is(nft.IIfName, "lo"), nft.Is(nft.DPort, "68"), nft.Drop),
				nft.R("", nft.IsNot(nft.L4Proto, "udp"), nft.Is(nft.SPort, "67"), nft.AnyOf(nft.DPort, "68", "69"), nft.Drop),
				nft.R("", nft.Is(nft.L4Proto, "tcp"), nft.In(anyPort, nft.L4Proto, nft.DPort), nft.Accept),
				nft.R("", nft.VMap{Field: nft.IIfName, Cases: []nft.Case{{Value: "lo", Verdict: nft.Accept}, {Value: "dwb1", Verdict: nft.Goto("admit")}}}),
			}},
			{Name: "admit", Rules: []nft.Rule{nft.R("yes", nft.Accept)}},
			{Name: "admitted", Type: "filter", Hook: "forward", Priority: 1, Rules: []nft.Rule{
				nft.R("", nft.MarkIs{Bit: 0x1000}, nft.MarkClear{Bit: 0x1000}),
			}},
			{Name: "postrouting", Type: "nat", Hook: "postrouting", Priority: 100, Rules: []nft.Rule{
				nft.R("", nft.In(wards, nft.IPSAddr), nft.Masquerade{}),
			}},
		},
	}
}

// bridgeTable has every statement that means something to frames.
func bridgeTable() *nft.Table {
	return &nft.Table{
		Family: nft.Bridge, Name: "dockway",
		Sets: []*nft.Set{senders, senders6, stations, flows},
		Chains: []*nft.Chain{
			{Name: "prerouting", Type: "filter", Hook: "prerouting", Priority: -300, Rules: []nft.Rule{
				nft.R("", nft.IsNot(nft.IIfName, "dwv*"), nft.Accept),
				nft.R("", nft.VMap{Field: nft.FrameType, Cases: []nft.Case{{Value: "ip", Verdict: nft.Goto("from4")}, {Value: "arp", Verdict: nft.Goto("fromarp")}, {Value: "ip6", Verdict: nft.Jump("from6")}}}),
				nft.R("", nft.Drop),
			}},
			{Name: "from4", Rules: []nft.Rule{
				nft.R("", nft.NotIn(senders, nft.IIfName, nft.EtherSAddr, nft.IPSAddr), nft.Drop),
				nft.R("", nft.Is(nft.EtherSAddr, "02:00:00:00:00:01"), nft.Is(nft.IPSAddr, "10.0.0.2"), nft.Accept),
				nft.R("", nft.Is(nft.L4Proto, "udp"), nft.Is(nft.SPort, "67"), nft.Is(nft.DPort, "68"), nft.Drop),
			}},
			{Name: "from6", Rules: []nft.Rule{
				nft.R("", nft.NotIn(senders6, nft.IIfName, nft.EtherSAddr, nft.IP6SAddr), nft.Drop),
				nft.R("", nft.Is(nft.L4Proto, "ipv6-icmp"), nft.Goto("fromnd")),
				nft.R("", nft.Update{Set: flows, Fields: []nft.Field{nft.IP6SAddr, nft.IP6DAddr, nft.L4Proto}}),
				nft.R("", nft.In(flows, nft.IP6DAddr, nft.IP6SAddr, nft.L4Proto), nft.Accept),
			}},
			{Name: "fromnd", Rules: []nft.Rule{
				nft.R("", nft.AnyOf(nft.ICMPv6Type, "nd-router-advert", "nd-redirect"), nft.Drop),
				nft.R("", nft.Is(nft.ICMPv6Type, "nd-neighbor-advert"), nft.NotIn(senders6, nft.IIfName, nft.EtherSAddr, nft.NDTarget), nft.Drop),
			}},
			{Name: "fromarp", Rules: []nft.Rule{
				nft.R("", nft.NotIn(senders, nft.IIfName, nft.EtherSAddr, nft.ARPSenderIP), nft.Drop),
				nft.R("", nft.NotIn(senders, nft.IIfName, nft.ARPSenderMAC, nft.ARPSenderIP), nft.Drop),
				nft.R("", nft.Is(nft.ARPSenderMAC, "02:00:00:00:00:01"), nft.Is(nft.ARPSenderIP, "10.0.0.2"), nft.Drop),
			}},
			{Name: "forward", Type: "filter", Hook: "forward", Priority: -200},
			{Name: "output", Type: "filter", Hook: "output", Priority: 100},
			{Name: "late", Type: "filter", Hook: "postrouting", Priority: 300},
			{Name: "postrouting", Type: "filter", Hook: "postrouting", Priority: -199, Rules: []nft.Rule{
				nft.R("", nft.Is(nft.EtherType, "ip6"), nft.NotIn(stations, nft.OIfName, nft.EtherSAddr), nft.Drop),
				nft.R("", nft.NoneOf(nft.EtherType, "ip", "ip6"), nft.Accept),
				nft.R("", nft.AnyOf(nft.PktType, "broadcast", "multicast"), nft.In(stations, nft.OIfName, nft.EtherSAddr), nft.Drop),
			}},
		},
	}
}

func tables() []*nft.Table { return []*nft.Table{inetTable(), bridgeTable()} }

func TestTablesReadAsTheyPrint(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	for _, table := range tables() {
		do(t, k, add(plan.Table{Table: table})...)
		got := run(t, "nft", "-s", "list", "table", string(table.Family), table.Name)
		if want := table.String(); got != want {
			t.Errorf("nft lists another table %s:\n%s", table.Family, lineDiff(want, got))
		}
		holds(t, k, plan.Table{Table: table})
	}
}

// lineDiff shows where two texts part.
func lineDiff(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	var b strings.Builder
	for i := range max(len(w), len(g)) {
		var a, c string
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			c = g[i]
		}
		if a != c {
			fmt.Fprintf(&b, "line %d\n want %s\n nft  %s\n", i+1, a, c)
		}
	}
	return b.String()
}

// threadFile is a file of the test thread's network namespace.
func threadFile(name string) string { return "/proc/thread-self/net/" + name }

// linkNames lists the links of the test's namespace.
func linkNames(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile(threadFile("dev"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, line := range strings.Split(string(b), "\n") {
		if name, _, ok := strings.Cut(line, ":"); ok {
			out = append(out, strings.TrimSpace(name))
		}
	}
	return out
}

func exists(t testing.TB, link string) bool { return slices.Contains(linkNames(t), link) }

func linkIndex(t testing.TB, name string) string {
	t.Helper()
	index, _, _ := strings.Cut(run(t, "ip", "-o", "link", "show", name), ":")
	return index
}

// takenPort is one that somebody else has.
const takenPort = 99

// heldPorts holds ports in memory.
type heldPorts map[plan.Key]plan.HostPort

func (h heldPorts) Hold(p plan.HostPort) error {
	if p.Host.Port() == takenPort {
		return &plan.PortInUseError{Port: p, Holder: "this test"}
	}
	h[p.Key()] = p
	return nil
}

func (h heldPorts) Release(p plan.HostPort) error { delete(h, p.Key()); return nil }

func (h heldPorts) Lookup(key plan.Key) (plan.HostPort, bool) { p, ok := h[key]; return p, ok }
func (h heldPorts) Held() []plan.HostPort                     { return slices.Collect(maps.Values(h)) }

func TestHostPorts(t *testing.T) {
	inNamespace(t)
	held := heldPorts{}
	k := open(t, kernel.Config{Sockets: held})
	port := func(host, target string) plan.HostPort {
		return plan.HostPort{Proto: "tcp", Host: netip.MustParseAddrPort(host), Target: netip.MustParseAddrPort(target)}
	}
	one, two := port("127.0.0.1:80", "10.0.0.2:80"), port("0.0.0.0:81", "10.0.0.2:80")
	do(t, k, add(one, two)...)
	holds(t, k, one, two)
	if all := observeAll(t, k); len(plan.Diff(all, plan.Of(one, two))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	moved := port("127.0.0.1:80", "10.0.0.3:80")
	var inUse *plan.PortInUseError
	if err := k.Do(context.Background(), add(port("127.0.0.1:99", "10.0.0.2:80"))); !errors.As(err, &inUse) || !strings.HasPrefix(err.Error(), "add socket tcp 127.0.0.1:99") {
		t.Errorf("a port that is taken: %v", err)
	}
	do(t, k, plan.Diff(observe(t, k, moved), plan.Of(moved))...)
	holds(t, k, moved)
	do(t, k, remove(moved, two)...)
	if len(held) > 0 {
		t.Errorf("still held: %v", held)
	}
	without := open(t, kernel.Config{})
	if err := without.Do(context.Background(), add(one)); err == nil {
		t.Error("a port was held by nobody")
	}
}
