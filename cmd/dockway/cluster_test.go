package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/store"
)

func quiet() *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}

func testCluster(t *testing.T, c clusterConfig) *cluster {
	t.Helper()
	record, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = record.Close() })
	settings, err := c.settings()
	if err != nil {
		t.Fatal(err)
	}
	cl, err := newCluster(settings, record, "id", quiet())
	if err != nil {
		t.Fatal(err)
	}
	cl.outgoing = func(context.Context, netip.Addr) (netip.Addr, error) { return netip.MustParseAddr("198.18.0.1"), nil }
	cl.busy = func(netip.Prefix, netip.Prefix) bool { return false }
	cl.blocks = func() map[netip.Prefix][]netip.Prefix { return nil }
	return cl
}

// freePort is a port of the loopback address that nobody has.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it is asked for its port only
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// TestStartAmidRequests: the address manager asks the cluster what is taken, with a lock held that it
// takes to list its blocks too. The cluster that starts meanwhile must not wait for it with its own.
func TestStartAmidRequests(t *testing.T) {
	cl := testCluster(t, clusterConfig{name: "a", advertise: "127.0.0.1", gossipPort: freePort(t), vxlanPort: "14789"})
	subnet := netip.MustParsePrefix("198.18.0.0/24")
	var manager sync.Mutex
	manager.Lock()
	listing := make(chan struct{})
	cl.blocks = func() map[netip.Prefix][]netip.Prefix {
		close(listing)
		manager.Lock()
		defer manager.Unlock()
		return map[netip.Prefix][]netip.Prefix{subnet: {subnet}}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- cl.run(ctx) }()
	<-listing
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		cl.Taken(subnet)
		manager.Unlock()
	}()
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Fatal("the cluster waits for the address manager, and the address manager for the cluster")
	}
	<-cl.Changed() // it has started
	if own := cl.Own(subnet); len(own) != 1 {
		t.Errorf("of the subnet it has %v, want what is on record", own)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestRestartKeepsClocks: what a host states has the clock on record that it was stated with, in whatever
// order it is stated again, and nothing else has one.
func TestRestartKeepsClocks(t *testing.T) {
	dir, port := t.TempDir(), freePort(t)
	subnet := netip.MustParsePrefix("198.18.0.0/24")
	at := func(i byte) mode.Statement {
		return mode.Statement{VSID: 5001, Address: netip.AddrFrom4([4]byte{198, 18, 0, i}), MAC: plan.MAC{2, 0, 0, 0, 0, i}}
	}
	key := func(i byte) facts.Key { return gossip.EndpointKey(5001, at(i).Address) }
	block := facts.Key{Kind: facts.Block, Subnet: subnet, Prefix: subnet}
	run := func(then func(*cluster), again ...mode.Statement) map[facts.Key]uint64 {
		t.Helper()
		record, err := store.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer record.Close() //nolint:errcheck // what is recorded is read before
		settings, err := clusterConfig{name: "a", advertise: "127.0.0.1", gossipPort: port, vxlanPort: "14789"}.settings()
		if err != nil {
			t.Fatal(err)
		}
		cl, err := newCluster(settings, record, "id", quiet())
		if err != nil {
			t.Fatal(err)
		}
		cl.blocks = func() map[netip.Prefix][]netip.Prefix { return map[netip.Prefix][]netip.Prefix{subnet: {subnet}} }
		cl.State(again...)
		cl.Restated()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- cl.run(ctx) }()
		for cl.now() == nil {
			select {
			case <-cl.Changed():
			case <-time.After(10 * time.Second):
				t.Fatal("the cluster has not started")
			}
		}
		then(cl)
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		clocks, err := loadClocks(record)
		if err != nil {
			t.Fatal(err)
		}
		return clocks
	}
	was := run(func(cl *cluster) {
		cl.State(at(1))
		cl.State(at(2))
		cl.State(at(3))
		cl.Withdraw(at(2))
	})
	if len(was) != 3 || was[block] == 0 || was[key(1)] <= was[block] || was[key(3)] <= was[key(1)] {
		t.Fatalf("on record: %v", was)
	}
	is := run(func(cl *cluster) { cl.State(at(4)) }, at(3), at(1))
	if is[key(4)] <= was[key(3)] {
		t.Errorf("what is new has clock %d, and what is older %d", is[key(4)], was[key(3)])
	}
	delete(is, key(4))
	if !maps.Equal(is, was) {
		t.Errorf("after a restart: %v; before: %v", is, was)
	}
	delete(was, key(1))
	if is = run(func(*cluster) {}, at(3)); !maps.Equal(is, was) {
		t.Errorf("after a restart without some: %v, want %v", is, was)
	}
}

// TestKeysAtAnotherAddress: gossip that begins anew has the keys that the cluster has now, and not those that it had when dockway
// was started.
func TestKeysAtAnotherAddress(t *testing.T) {
	was, is := make([]byte, 16), bytes.Repeat([]byte{1}, 16)
	cl := testCluster(t, clusterConfig{name: "a", advertise: "127.0.0.1", gossipPort: freePort(t), vxlanPort: "14789", key: base64.StdEncoding.EncodeToString(was)})
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, want := range [][]byte{was, is} {
		g, err := cl.start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := g.Keys(); len(got) != 1 || got[0] != gossip.Fingerprint(want) {
			t.Errorf("the keys are %v, want %s", got, gossip.Fingerprint(want))
		}
		for _, change := range []func() []gossip.KeyResult{
			func() []gossip.KeyResult { return g.KeyAdd(t.Context(), is) },
			func() []gossip.KeyResult { return g.KeyUse(t.Context(), is) },
			func() []gossip.KeyResult { return g.KeyRemove(t.Context(), was) },
		} {
			for _, r := range change() {
				if r.Err != nil {
					t.Error(r.Err)
				}
			}
		}
		if err := g.Run(over); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := loadKeys(cl.record, was); err != nil || len(kept.Keys) != 1 || !bytes.Equal(kept.Keys[0], is) {
		t.Errorf("on record: %v, %v", kept, err)
	}
}

// TestAddressGoesAndComes: a host with another address besides does not move to that while its DHCP client starts anew.
func TestAddressGoesAndComes(t *testing.T) {
	const lost, has = "198.18.0.9", "127.0.0.1"
	cl := testCluster(t, clusterConfig{name: "a", join: "somewhere", gossipPort: "7947", vxlanPort: "14789"})
	other := "198.18.0.1"
	cl.outgoing = func(context.Context, netip.Addr) (netip.Addr, error) { return netip.ParseAddr(other) }
	for i, look := range []struct {
		self, other string
		want        bool
	}{
		{lost, "198.18.0.1", false}, {has, "198.18.0.1", false},
		{lost, "198.18.0.1", false}, {lost, "", false},
		{lost, "198.18.0.1", false}, {lost, "198.18.0.2", false}, {lost, "198.18.0.2", true},
	} {
		cl.self, other = netip.MustParseAddr(look.self), look.other
		if got := cl.moved(t.Context()); got != look.want {
			t.Errorf("look %d: moved %v", i, got)
		}
	}
}

// TestAddressOfSeeds: the host's own address is what it sends to a seed from; seeds that are names, or
// loopback addresses, say nothing of it.
func TestAddressOfSeeds(t *testing.T) {
	def := netip.MustParseAddr("198.18.0.1")
	for join, want := range map[string]string{
		"198.18.7.2":            "198.18.7.1",
		"198.18.7.2:9000":       "198.18.7.1",
		"somewhere,198.18.7.2":  "198.18.7.1",
		"somewhere":             "198.18.0.1",
		"127.0.0.1":             "198.18.0.1",
		"127.0.1.1, 198.18.7.2": "198.18.7.1",
		"198.18.7.1":            "198.18.7.1", // itself: the kernel sends that from there, by the loopback link
	} {
		cl := testCluster(t, clusterConfig{name: "a", join: join, gossipPort: "7947", vxlanPort: "14789"})
		cl.outgoing = func(_ context.Context, to netip.Addr) (netip.Addr, error) {
			if to.IsValid() {
				return netip.MustParseAddr("198.18.7.1"), nil
			}
			return def, nil
		}
		if got, err := cl.address(context.Background()); err != nil || got.String() != want {
			t.Errorf("JOIN=%q: the address is %s (%v), want %s", join, got, err, want)
		}
	}
}

// TestSeedThatDoesNotResolve is told with what to do, and no reason not to start.
func TestSeedThatDoesNotResolve(t *testing.T) {
	cl := testCluster(t, clusterConfig{name: "a", join: "nowhere.invalid:80", advertise: "127.0.0.1", gossipPort: freePort(t), vxlanPort: "14789"})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- cl.run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	const want = "nowhere.invalid:80 in JOIN does not resolve (lookup nowhere.invalid"
	shown(t, 20*time.Second, want, func() string { return strings.Join(cl.Warnings(), "\n") })
}

// shown polls until what is shown has words in it.
func shown(t *testing.T, within time.Duration, want string, what func() string) {
	t.Helper()
	late := time.After(within)
	for tick := time.Tick(20 * time.Millisecond); ; {
		is := what()
		if strings.Contains(is, want) {
			return
		}
		select {
		case <-tick:
		case <-late:
			t.Fatalf("for %s there is no %q in:\n%s", within, want, is)
		}
	}
}

// TestAddressChanges: a host whose interface gets another address takes part with that one, and the others
// find it there. An address that is only gone is waited for.
func TestAddressChanges(t *testing.T) {
	t.Parallel()
	hosts := []*process{start(t, t.TempDir(), "--node-name", "one", "--advertise", "wan"), start(t, t.TempDir(), "--node-name", "two", "--join", "198.18.0.1,198.18.0.3")}
	run := func(host int, command string) string {
		t.Helper()
		enter := []string{"-t", strconv.Itoa(hosts[host].cmd.Process.Pid), "-n"}
		out, err := exec.Command("nsenter", append(enter, strings.Fields(command)...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		return string(out)
	}
	ip := func(host int, args string) {
		t.Helper()
		run(host, "ip "+args)
	}
	says := func(host int, within time.Duration, command, want string) {
		t.Helper()
		shown(t, within, want, func() string {
			out, _ := runCommand(map[string]string{"DOCKER_HOST": "unix:///nowhere"}, command, "--socket", hosts[host].socket)
			return out // in no cluster, dockway peers fails
		})
	}
	says(0, 10*time.Second, "status", `ADVERTISE="wan": this host has no such interface yet`)
	ip(0, "link add wan type veth peer name wan netns "+strconv.Itoa(hosts[1].cmd.Process.Pid))
	for host, address := range []string{"198.18.0.1/24", "198.18.0.2/24"} {
		ip(host, "address add "+address+" dev wan")
		ip(host, "link set wan up")
	}
	says(1, 30*time.Second, "peers", "one              198.18.0.1  alive")
	says(0, 30*time.Second, "peers", "two              198.18.0.2  alive")

	ip(0, "address del 198.18.0.1/24 dev wan")
	says(0, 20*time.Second, "status", "this host has lost the address 198.18.0.1, at which the others reach it")
	ip(0, "address add 198.18.0.3/24 dev wan")
	says(0, 20*time.Second, "peers", "one (this host)  198.18.0.3  alive")
	says(1, 90*time.Second, "peers", "one              198.18.0.3  alive")
	says(0, 20*time.Second, "peers", "two              198.18.0.2  alive")
	// VXLAN is taken at the one address, and from the other.
	for host, tunnel := range []string{"198.18.0.2 . 198.18.0.3", "198.18.0.3 . 198.18.0.2"} {
		shown(t, 20*time.Second, "elements = { "+tunnel+" }", func() string { return run(host, "nft list set inet dockway tunnel4") })
	}
	if out := hosts[1].cli("status"); strings.Contains(out, "one name") {
		t.Errorf("it is taken for two hosts:\n%s", out)
	}
}
