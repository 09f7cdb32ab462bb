package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dockway/dockway/integration/lab"
)

// gated is dockway as a service of a machine without an engine. The test speaks to it as an engine does, and judges
// each change that it makes to the kernel and to its record.
type gated struct {
	*lab.Machine
	*caller
	t       *testing.T
	flags   []string
	process *lab.Process
	copies  string // of the record
	doing   string // what the test is at

	mu    sync.Mutex
	judge lab.Gate
}

const gatedDir = "/run/gated"

// newGated starts dockway on a machine of its own.
func newGated(t *testing.T, name, address string, flags ...string) *gated {
	t.Helper()
	m, err := shared.lab.Machine(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.lan.Plug(m, "eth0", address+"/24"); err != nil {
		t.Fatal(err)
	}
	socket := fmt.Sprintf("/proc/%d/root%s/dw.sock", m.PID(), gatedDir)
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	g := &gated{Machine: m, caller: &caller{client: &http.Client{Transport: transport, Timeout: 30 * time.Second}}, t: t, flags: flags, copies: t.TempDir()}
	g.must("ip route add default via " + peer4 + "; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER")
	g.start()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("at %s\nthe service: %.8000s\n%s", g.doing, g.process.Output(), g.state())
		}
		g.kill()
	})
	return g
}

func (g *gated) must(script string) {
	g.t.Helper()
	if _, err := g.Script(script); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gated) start(flags ...string) {
	g.t.Helper()
	root, err := lab.Root()
	if err != nil {
		g.t.Fatal(err)
	}
	args := []string{filepath.Join(root, "build/dockway"), "serve", "--socket", gatedDir + "/dw.sock", "--state-dir", gatedDir, "--collect-after", "1h"}
	g.process, err = g.StartGated(func(c lab.Change) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.judge == nil {
			return nil
		}
		return g.judge(c)
	}, "answers on", append(append(args, g.flags...), flags...)...)
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *gated) kill() {
	g.t.Helper()
	if err := g.process.Kill(); err != nil {
		g.t.Fatal(err)
	}
}

// judging has changes judged from now on; nil lets all be made.
func (g *gated) judging(judge lab.Gate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.judge = judge
}

// show is what dockway says of itself.
func (g *gated) show(what string) (string, error) {
	resp, err := g.client.Get("http://plugin/dockway/v1/" + what)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	said, err := io.ReadAll(resp.Body)
	return string(bytes.TrimSpace(said)), err
}

// said is what dockway says that it holds.
func (g *gated) said() string {
	var b strings.Builder
	for _, what := range []string{"networks", "endpoints", "ports"} {
		out, err := g.show(what)
		fmt.Fprintf(&b, "%s: %s%s\n", what, out, failure(err))
	}
	status, err := g.show("status")
	fmt.Fprintf(&b, "in sync: %t%s\n", strings.Contains(status, `"in_sync":true`), failure(err))
	return b.String()
}

// state is all that dockway holds on the machine: what it says, then what is in the kernel and on record.
func (g *gated) state() string {
	var b strings.Builder
	b.WriteString(g.said())
	out, err := g.Script(`
links='link\naddress\nroute show table all\nneigh show nud permanent\n'
nft -s list ruleset
printf "$links" | ip -o -batch -
for n in $(ls /run/dockway/netns 2>/dev/null); do
	echo namespace $n
	nsenter --net=/run/dockway/netns/$n sh -c "printf '$links' | ip -o -batch -; bridge fdb | grep -e ' dst ' -e ^02:42: || true; nft -s list ruleset" || echo "which is none"
done
cat /proc/sys/net/ipv4/ip_forward`)
	if err != nil {
		return failure(err)
	}
	b.WriteString(steadyState(out) + "\n")
	record, err := g.record()
	for _, bucket := range []string{"networks", "endpoints", "pools", "addresses"} {
		fmt.Fprintf(&b, "%d %s on record%s\n", len(record[bucket]), bucket, failure(err))
	}
	return b.String()
}

var (
	// fleeting is what the kernel chooses, or changes by itself.
	fleeting      = regexp.MustCompile(`(?m)^\d+: | state [A-Z]+|link/ether [0-9a-f:]*|@if\d+|valid_lft.*| linkdown|,?(NO-CARRIER|LOWER_UP|M-DOWN)`)
	fleetingLines = regexp.MustCompile(`(?m)^.*\b(fe80|ff00|33:33|01:00:5e):.*\n`)
)

// steadyState is the state without what is fleeting.
func steadyState(state string) string {
	return fleeting.ReplaceAllString(fleetingLines.ReplaceAllString(state+"\n", ""), "")
}

// record is what is on record, the keys by bucket, without addresses that are freed. It reads a copy, as dockway holds
// the record.
func (g *gated) record() (map[string][]string, error) {
	copied := filepath.Join(g.copies, "dockway.db")
	if out, err := exec.Command("cp", fmt.Sprintf("/proc/%d/root%s/dockway.db", g.PID(), gatedDir), copied).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer db.Close() //nolint:errcheck // only read
	keys := map[string][]string{}
	return keys, db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				if !bytes.Contains(v, []byte(`"freed"`)) {
					keys[string(name)] = append(keys[string(name)], string(k))
				}
				return nil
			})
		})
	})
}

// is tells whether the state is the wanted one. The kernel, which takes long, is asked last.
func (g *gated) is(want string) bool { return strings.HasPrefix(want, g.said()) && g.state() == want }

// settles waits until the state is the wanted one.
func (g *gated) settles(what, want string) {
	g.t.Helper()
	if err := lab.WaitFor(soon, what, func() (bool, error) { return g.is(want), nil }); err != nil {
		g.t.Fatalf("%v:\n%s", err, difference(want, g.state()))
	}
}

// settled waits until the state stays as it is.
func (g *gated) settled() (state string) {
	g.t.Helper()
	if err := lab.WaitFor(soon, "the state to stay", func() (bool, error) {
		before := state
		state = g.state()
		return state == before && strings.Contains(state, "in sync: true"), nil
	}); err != nil {
		g.t.Fatal(err)
	}
	return state
}

// difference is the lines that only one of two states has.
func difference(want, got string) string {
	var b strings.Builder
	w, h := strings.Split(want, "\n"), strings.Split(got, "\n")
	for _, line := range w {
		if !slices.Contains(h, line) {
			b.WriteString("missing: " + line + "\n")
		}
	}
	for _, line := range h {
		if !slices.Contains(w, line) {
			b.WriteString("not wanted: " + line + "\n")
		}
	}
	return b.String()
}

// order says which of the changes that are made side by side comes first.
type order string

const (
	kernelFirst order = "the kernel before the record"
	recordFirst order = "the record before the kernel"
)

// interrupted makes a call and has dockway killed before its n-th change, among them those after the answer until
// the state is the wanted one; of a call with less changes when all is done. Then dockway is started again.
func (g *gated) interrupted(n int, o order, call func() error, want string, flags ...string) (answered, early bool, changes []lab.Change) {
	g.t.Helper()
	var killed atomic.Bool
	g.judging(func(c lab.Change) error {
		if killed.Load() {
			return lab.ErrKill
		}
		if !c.Late && c.Disk == (o == kernelFirst) {
			return lab.ErrWait
		}
		if changes = append(changes, c); len(changes) == n {
			killed.Store(true)
			return lab.ErrKill
		}
		return nil
	})
	err := call()
	if err != nil && !killed.Load() {
		g.t.Fatalf("before change %d: %v", n, err)
	}
	if err == nil {
		if err := lab.WaitFor(soon, "all to be done", func() (bool, error) { return killed.Load() || g.is(want), nil }); err != nil {
			g.t.Fatalf("%v: %s", err, difference(want, g.state()))
		}
	}
	g.kill()
	g.judging(nil)
	g.start(flags...)
	return err == nil, killed.Load(), changes
}

// step is one of the calls that make something, with the one that takes it back.
type step struct {
	name     string
	method   string
	do, undo func() error
	orders   []order  // of changes that are made side by side; nil: none are
	kernel   bool     // it changes the kernel
	collect  []string // flags of a dockway that soon collects what an engine cannot take back, not knowing it
}

// life is what an engine asks for a container, from the pool to the ports.
type life struct {
	*gated
	steps []step
	pool  string
}

const gatedSubnet = "198.19.100.0/24"

// newLife makes the calls of a life of a network with options. An overlay's addresses, which the whole cluster
// gives, and those of the LAN, are not asked for. What is made side by side comes in each of the orders.
func newLife(g *gated, options map[string]string, addresses, ports bool, orders ...order) *life {
	l := &life{gated: g}
	network, endpoint := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	gateway, address := "198.19.100.1", "198.19.100.7"
	pool := func(method string, more map[string]any) func() error {
		return func() error {
			request := map[string]any{"PoolID": l.pool}
			for k, v := range more {
				request[k] = v
			}
			return l.call("IpamDriver."+method, request)
		}
	}
	driver := func(method string, more map[string]any) func() error {
		request := map[string]any{"NetworkID": network, "EndpointID": endpoint}
		for k, v := range more {
			request[k] = v
		}
		return func() error { return l.call("NetworkDriver."+method, request) }
	}
	if addresses {
		l.steps = append(l.steps,
			step{name: "pool", method: "IpamDriver.RequestPool", undo: pool("ReleasePool", nil), do: func() error {
				var reply struct{ PoolID string }
				err := l.ask("IpamDriver.RequestPool", map[string]any{"AddressSpace": "dockway-local", "Pool": gatedSubnet}, &reply)
				if err == nil {
					l.pool = reply.PoolID
				}
				return err
			}},
			step{name: "gateway", method: "IpamDriver.RequestAddress", undo: pool("ReleaseAddress", map[string]any{"Address": gateway}),
				do: pool("RequestAddress", map[string]any{"Address": gateway, "Options": map[string]any{"RequestAddressType": "com.docker.network.gateway"}})})
	}
	space := "dockway-local"
	if !addresses {
		space = "LocalDefault" // of Docker's own address manager
	}
	subnet := map[string]any{"AddressSpace": space, "Pool": gatedSubnet, "Gateway": gateway + "/24"}
	l.steps = append(l.steps, step{name: "network", kernel: true, method: "NetworkDriver.CreateNetwork", undo: driver("DeleteNetwork", nil),
		do: driver("CreateNetwork", map[string]any{"Options": map[string]any{"com.docker.network.generic": options}, "IPv4Data": []any{subnet}})})
	if addresses {
		l.steps = append(l.steps, step{name: "address", collect: []string{"--collect-after", "1s"}, method: "IpamDriver.RequestAddress", undo: pool("ReleaseAddress", map[string]any{"Address": address}),
			do: pool("RequestAddress", map[string]any{"Address": address, "Options": map[string]any{"com.docker.network.endpoint.name": "web"}})})
	}
	l.steps = append(l.steps,
		step{name: "endpoint", method: "NetworkDriver.CreateEndpoint", undo: driver("DeleteEndpoint", nil),
			do: driver("CreateEndpoint", map[string]any{"Interface": map[string]any{"Address": address + "/24", "MacAddress": "02:42:00:00:00:07"}, "Options": map[string]any{}})},
		step{name: "join", kernel: true, method: "NetworkDriver.Join", undo: driver("Leave", nil), orders: orders,
			do: driver("Join", map[string]any{"SandboxKey": "/run/docker/netns/gated", "Options": map[string]any{}})})
	if ports {
		bindings := []map[string]any{}
		for _, proto := range []int{6, 17} {
			bindings = append(bindings, map[string]any{"Proto": proto, "Port": 80, "HostPort": 8200, "HostPortEnd": 8200})
		}
		l.steps = append(l.steps, step{name: "ports", kernel: true, method: "NetworkDriver.ProgramExternalConnectivity", undo: driver("RevokeExternalConnectivity", nil), orders: orders,
			do: driver("ProgramExternalConnectivity", map[string]any{"Options": map[string]any{"com.docker.network.portmap": bindings}})})
	}
	return l
}

func (l *life) index(name string) int {
	return slices.IndexFunc(l.steps, func(s step) bool { return s.name == name })
}

// grant makes a call that has to be granted.
func (l *life) grant(what string, call func() error) {
	l.t.Helper()
	if err := patient(call); err != nil {
		l.t.Fatalf("%s: %v", what, err)
	}
}

// patient makes a call, and tries again as it is told to while dockway has not yet found its cluster.
func patient(call func() error) (err error) {
	_ = lab.WaitFor(soon, "", func() (bool, error) {
		err = call()
		return err == nil || !strings.Contains(err.Error(), "not in its cluster yet: try again"), nil
	})
	return err
}

// again repeats a call of which dockway was killed. One that finds that the endpoint is not known any more is
// repeated with a new one: an endpoint is on record from Join on.
func (l *life) again(i int, call func() error) {
	l.t.Helper()
	err := patient(call)
	if endpoint := l.index("endpoint"); i > endpoint && err != nil && strings.Contains(err.Error(), "not known to dockway") {
		l.grant("create the endpoint again", l.steps[endpoint].do)
		err = call()
	}
	if err != nil {
		l.t.Fatalf("%s repeated: %v", l.steps[i].name, err)
	}
}

// remade makes the endpoint again that a container has not joined, and dockway forgot when it was killed.
func (l *life) remade(i int) {
	l.t.Helper()
	if endpoint := l.index("endpoint"); i >= endpoint {
		l.grant("create the endpoint again", l.steps[endpoint].do)
	}
}

// tidyPools releases the pools that the engine does not know of, which are one at most: a pool that is asked for
// again is another one.
func (l *life) tidyPools() {
	l.t.Helper()
	record, err := l.record()
	if err != nil {
		l.t.Fatal(err)
	}
	left := 0
	for _, serial := range record["pools"] {
		if id := "dockway-local/" + serial + "/" + gatedSubnet; id != l.pool {
			l.grant("release a pool that was lost", func() error { return l.call("IpamDriver.ReleasePool", map[string]any{"PoolID": id}) })
			left++
		}
	}
	if left > 1 {
		l.t.Fatalf("%d pools are left of one request", left)
	}
}

// killEachStep kills dockway at each step of a call and of the one that takes it back. What the engine does then, it
// does both: it repeats the call, or it gives up.
func (l *life) killEachStep(i int) {
	l.t.Helper()
	s := l.steps[i]
	start := time.Now()
	base := l.settled()
	l.grant(s.name, s.do)
	full := l.settled()
	l.grant("take back "+s.name, s.undo)
	l.settles("the state before "+s.name, base)
	orders := s.orders
	if orders == nil {
		orders = []order{recordFirst}
	}
	runs, most := 0, map[string][]lab.Change{}
	for _, o := range orders {
		for n := 1; ; n++ {
			more := false
			run := func(what string, call func() error, want string, flags []string, then func(answered bool)) {
				l.t.Helper()
				l.doing = fmt.Sprintf("%s, killed at change %d, %s", what, n, o)
				answered, early, changes := l.interrupted(n, o, call, want, flags...)
				runs++
				more = more || early
				if len(changes) > len(most[what]) {
					most[what] = changes
				}
				then(answered)
			}
			restart := func() { // not to collect what is yet to be used
				if s.collect != nil {
					l.kill()
					l.start()
				}
			}
			// The engine repeats the call.
			run(s.method, s.do, full, nil, func(answered bool) {
				if !answered {
					l.again(i, s.do)
				}
				if s.name == "pool" {
					l.tidyPools()
				}
				l.remade(i)
				l.settles("what a call makes that is repeated", full)
			})
			run("what takes back "+s.method, s.undo, base, nil, func(answered bool) {
				if !answered {
					l.again(i, s.undo)
				}
				l.remade(i - 1)
				l.settles("nothing to be left by a removal that is repeated", base)
			})
			// The engine repeats the call without a body, which is refused, and gives up.
			run(s.method, s.do, full, s.collect, func(bool) {
				if status, said, err := l.raw(s.method, ""); err != nil || status < 400 {
					l.t.Fatalf("%s without a body: %d %s, %v", s.method, status, said, err)
				}
				switch {
				case s.name == "pool":
					l.pool = ""
					l.tidyPools()
				case s.collect == nil:
					l.grant("take back "+s.name, s.undo)
				}
				l.remade(i - 1)
				l.settles("nothing to be left by a call that is given up", base)
			})
			if i > 0 && s.name != "network" { // a network is removed by its user, who can repeat it
				outer := l.steps[i-1]
				restart()
				l.grant(s.name, s.do)
				l.settles("what a call makes", full)
				run("what takes back "+s.method, s.undo, base, s.collect, func(bool) {
					if s.collect == nil {
						l.grant("take back "+outer.name, outer.undo)
						l.remade(i - 2)
						l.grant(outer.name, outer.do)
					}
					l.settles("nothing to be left by a removal that is given up", base)
				})
				restart()
			}
			if !more {
				break
			}
		}
	}
	l.t.Logf("%s: killed %d times in %s", s.name, runs, time.Since(start).Round(time.Second))
	if s.name == "endpoint" {
		return // it is not on record before a container joins it
	}
	for what, changes := range most {
		l.t.Logf("%s makes these changes at most: %v", what, changes)
		for _, disk := range []bool{true, false} {
			if !slices.ContainsFunc(changes, func(c lab.Change) bool { return c.Disk == disk }) && (disk || s.kernel) {
				l.t.Errorf("%s was killed at no change of the kernel, or none of the record", what)
			}
		}
	}
}

// lostNetwork makes a network whose engine has not got the answer: it releases the pool, and never asks for the
// network to be removed.
func (l *life) lostNetwork(empty string) {
	l.t.Helper()
	network := l.index("network")
	base := l.settled()
	l.grant("network", l.steps[network].do)
	l.kill()
	l.start("--collect-after", "1s")
	for _, s := range slices.Backward(l.steps[:network]) {
		l.grant("take back "+s.name, s.undo)
	}
	l.settles("a network that no engine knows to be collected", empty)
	l.kill()
	l.start()
	for _, s := range l.steps[:network] {
		l.grant(s.name, s.do)
	}
	l.settles("all to be as it was", base)
}

// TestKilledAtEachStep: dockway dies before each change that a call makes to the kernel or to the record, and after the
// last one, before the answer. When it is back, the call is granted that the engine repeats, and makes what it always makes;
// or the engine gives up and removes what it knows of, and nothing is left.
func TestKilledAtEachStep(t *testing.T) {
	for _, c := range []struct {
		name, address    string
		options          map[string]string
		addresses, ports bool
		orders           []order
		flags            []string
	}{
		{name: "nat", address: "198.18.0.61", addresses: true, ports: true, orders: []order{kernelFirst, recordFirst}},
		{name: "transparent", address: "198.18.0.62", options: map[string]string{"mode": "transparent", "interface": "eth0"}, orders: []order{recordFirst}},
		{name: "overlay", address: "198.18.0.63", options: map[string]string{"mode": "overlay", "vsid": "5072"}, orders: []order{kernelFirst}, flags: []string{"--advertise", "198.18.0.63"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLife(newGated(t, "gated-"+c.name, c.address, c.flags...), c.options, c.addresses, c.ports, c.orders...)
			// What is made once and kept.
			for _, s := range l.steps {
				l.grant(s.name, s.do)
			}
			for _, s := range slices.Backward(l.steps) {
				l.grant("take back "+s.name, s.undo)
			}
			empty := l.settled()
			for i, s := range l.steps {
				if s.name == "network" && c.addresses {
					l.lostNetwork(empty)
				}
				if s.kernel || c.addresses { // what else there is is the same for all
					l.killEachStep(i)
				}
				l.grant(s.name, s.do)
			}
		})
	}
}
