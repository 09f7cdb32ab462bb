package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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

// survivors are hosts of their own, one for each engine: what is done to them disturbs no other
// test. They are started when the first test asks.
var survivors struct {
	sync.Once
	hosts map[lab.Engine]*lab.Host
	err   error
}

var survivor4 = map[lab.Engine]string{lab.Debian: "198.18.0.11", lab.Moby: "198.18.0.12"}

// tolerance is what a test may leave.
type tolerance string

// poolsLost: the engine repeats a release that broke off without a body, and then no more. The pool
// stays on record, without harm (docs/ipam.md).
const poolsLost tolerance = "pools that the engine did not release"

// eachSurvivor runs a test on both survivors, and fails when it leaves anything.
func eachSurvivor(t *testing.T, test func(t *testing.T, h *host), flags ...tolerance) {
	survivors.Do(func() {
		survivors.hosts = map[lab.Engine]*lab.Host{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for engine, ip := range survivor4 {
			wg.Go(func() {
				s, err := shared.host(string(engine)+"-survivor", engine)
				if err == nil {
					err = s.Plug(shared.lan, "eth0", ip+"/24")
				}
				if err == nil { // as on most hosts: masquerading and the watch depend on it
					_, err = s.Script("ip route replace default via " + peer4)
				}
				mu.Lock()
				defer mu.Unlock()
				survivors.hosts[engine] = s
				survivors.err = errors.Join(survivors.err, err)
			})
		}
		wg.Wait()
	})
	if survivors.err != nil {
		t.Fatal(survivors.err)
	}
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		t.Run(string(engine), func(t *testing.T) {
			h := onHost(t, survivors.hosts[engine])
			h.ip = survivor4[engine]
			// An engine may have disabled a plugin that an earlier test has killed too soon after its start.
			_, enabled := h.Docker("plugin", "enable", lab.Plugin)
			if err := h.WaitPlugin(""); err != nil {
				t.Fatal(errors.Join(err, enabled))
			}
			before, record := h.state(), h.record(t)
			t.Cleanup(func() { // runs after the test has removed what it made
				h.settles("nothing to be left", before)
				if after := h.record(t); after != record && !slices.Contains(flags, poolsLost) {
					t.Errorf("left on record: before\n%s\nafter\n%s", record, after)
				} else if after != record {
					t.Logf("the engine did not release all: before\n%s\nafter\n%s", record, after)
				}
			})
			test(t, h)
		})
	}
}

// must runs a script on the host that has to succeed.
func (h *host) must(script string) string {
	h.t.Helper()
	out, err := h.Script(script)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// state is all that dockway holds on the host: what it shows, its links, addresses and rules.
func (h *host) state() string {
	h.t.Helper()
	var b strings.Builder
	for _, what := range []string{"networks", "endpoints", "ports"} {
		out, err := h.Dockway(what, "--json")
		fmt.Fprintf(&b, "%s: %s%s\n", what, out, failure(err))
	}
	out, err := h.kernelState()
	return b.String() + out + failure(err)
}

func failure(err error) string {
	if err == nil {
		return ""
	}
	return "\n!" + err.Error()
}

// kernelState is what of dockway's the kernel holds.
func (h *host) kernelState() (string, error) {
	return h.Script(`ip -o link | grep -o ' dw[a-z].*' | sort; ip -o address | grep -o ' dw[a-z].*' | sort; ip route | grep dw | sort
nft -s list table inet dockway; nft -s list table bridge dockway
for f in ip ip6; do echo "$f:$(nft -s list chain $f filter DOCKER-USER 2>&1 | grep 0x00001000)"; done`)
}

// pluginDir is where the engine keeps the plugin.
func (h *host) pluginDir() (string, error) {
	out, err := h.Docker("plugin", "inspect", "-f", "{{.Id}}", lab.Plugin)
	return filepath.Join(shared.lab.Dir(), h.Name, "data/plugins", out), err
}

// record counts what is on record in the plugin's state.
func (h *host) record(t *testing.T) string {
	t.Helper()
	dir, err := h.pluginDir()
	if err != nil {
		t.Fatal(err)
	}
	counts, err := count(filepath.Join(dir, "propagated-mount", "dockway.db"), filepath.Join(t.TempDir(), "dockway.db"))
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// count counts the values in a record by what they are about. It reads a copy, as somebody
// holds the record.
func count(path, copied string) (string, error) {
	if out, err := exec.Command("cp", path, copied).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		return "", err
	}
	defer db.Close() //nolint:errcheck // only read
	var b strings.Builder
	err = db.View(func(tx *bbolt.Tx) error {
		for _, bucket := range []string{"networks", "endpoints", "pools", "addresses"} {
			n := 0
			if b := tx.Bucket([]byte(bucket)); b != nil {
				n = b.Stats().KeyN
			}
			fmt.Fprintf(&b, "%d %s on record\n", n, bucket)
		}
		return nil
	})
	return b.String(), err
}

// held is a connection that is kept busy while something happens around it.
type held struct {
	t     *testing.T
	what  string
	stdin io.WriteCloser
	lines *bufio.Scanner
	said  bytes.Buffer
	cmd   *exec.Cmd
	since time.Time
}

// hold opens a connection with the probe that cmd runs.
func hold(t *testing.T, what string, command func(context.Context, ...string) *exec.Cmd, args ...string) *held {
	t.Helper()
	h := &held{t: t, what: what, cmd: command(t.Context(), args...), since: time.Now()}
	stdin, err := h.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	h.stdin, h.lines, h.cmd.Stderr = stdin, bufio.NewScanner(stdout), &h.said
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !h.lines.Scan() || h.lines.Text() != "holding" {
		_ = h.cmd.Wait()
		t.Fatalf("%s: no connection to hold: %s%s", what, h.lines.Text(), h.said.String())
	}
	return h
}

// flowed ends the connection, and fails the test unless it has carried every line until now. A
// line goes there and back each 10 ms; none may take longer than the probe's timeout.
func (h *held) flowed() {
	h.t.Helper()
	_ = h.stdin.Close()
	last := ""
	for h.lines.Scan() {
		last = h.lines.Text()
	}
	if err := h.cmd.Wait(); err != nil {
		h.t.Errorf("%s: the connection broke: %v: %s", h.what, err, h.said.String())
		return
	}
	h.t.Logf("%s: held for %s, %s lines there and back", h.what, time.Since(h.since).Round(time.Millisecond), last)
}

// broke fails the test if the connection still flows.
func (h *held) broke() {
	h.t.Helper()
	_ = h.stdin.Close()
	for h.lines.Scan() {
	}
	if h.cmd.Wait() == nil {
		h.t.Errorf("%s: the connection still flows", h.what)
	}
}

// holdFromOutside holds a connection from the LAN to a port.
func holdFromOutside(t *testing.T, address string) *held {
	t.Helper()
	return hold(t, "from outside to "+address, shared.peer.Command, shared.probe, "hold", "tcp", address)
}

// holdFromContainer holds a connection of a container's, but without the engine's help: it goes on
// without the engine.
func (h *host) holdFromContainer(container, address string) *held {
	h.t.Helper()
	pid := h.docker("inspect", "-f", "{{.State.Pid}}", container)
	return hold(h.t, container+" to "+address, h.Command, "nsenter", "-t", pid, "-n", shared.probe, "hold", "tcp", address)
}

// inside asks from a container without the engine's help.
func (h *host) inside(container string) from {
	h.t.Helper()
	pid := h.docker("inspect", "-f", "{{.State.Pid}}", container)
	return func(args ...string) (string, error) {
		return h.Run(append([]string{"nsenter", "-t", pid, "-n", shared.probe}, args...)...)
	}
}

// TestPluginKilled: what runs does not notice, and the next plugin finds everything as it was.
func TestPluginKilled(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("killed")
		free := h.state()
		h.server("killed-a", "killed", "-p", "8100:80", "-p", "8100:80/udp")
		h.client("killed-b", "killed")
		a := h.address("killed-a", "killed")
		b := h.inside("killed-b")
		conns := []*held{holdFromOutside(t, h.ip+":8100"), h.holdFromContainer("killed-b", a+":80")}
		before := h.state()

		pid, err := h.PluginPID()
		if err != nil {
			t.Fatal(err)
		}
		// The engine would start it again at once: it is stopped while traffic is tried.
		if err := h.PauseEngine(); err != nil {
			t.Fatal(err)
		}
		resume := sync.OnceFunc(func() {
			if err := h.ResumeEngine(); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(resume)
		h.must("kill -9 " + pid)
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "published port while the plugin is down", on(shared.peer), network, h.ip+":8100", peer4)
			reaches(t, "same network while the plugin is down", b, network, a+":80", "")
			reaches(t, "outside while the plugin is down", b, network, peer4+":80", h.ip)
		}
		if _, err := h.PluginPID(); err == nil {
			t.Error("the plugin was not down")
		}
		if after, err := h.kernelState(); err != nil || !strings.Contains(before, after) {
			t.Errorf("the kernel's state went with the plugin: %v: before\n%s\nafter\n%s", err, before, after)
		}
		resume()
		start := time.Now()
		if err := h.WaitPlugin(pid); err != nil {
			t.Fatal(err)
		}
		t.Logf("the plugin answers again and is in sync %s after the engine could start it", time.Since(start).Round(time.Millisecond))
		if after := h.state(); after != before {
			t.Errorf("killing the plugin changed what it holds: before\n%s\nafter\n%s", before, after)
		}
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "published port", on(shared.peer), network, h.ip+":8100", peer4)
		}
		for _, c := range conns {
			c.flowed()
		}
		h.docker("stop", "-t", "1", "killed-a")
		h.docker("rm", "killed-a")
		h.docker("rm", "-f", "killed-b")
		h.settles("what the containers had to be released", free)
	})
}

// TestKilledInTheMiddle: the plugin dies again and again while the engine makes and removes networks
// and containers. Commands may fail; when all that they made is removed, nothing is left.
func TestKilledInTheMiddle(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("middle")
		var failed, done atomic.Int64
		var wg sync.WaitGroup
		ended := make(chan struct{})
		end := sync.OnceFunc(func() { close(ended); wg.Wait() })
		defer end()
		loop := func(step func(n int) error) {
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-ended:
						return
					default:
					}
					if err := step(n); err != nil {
						failed.Add(1)
						t.Log(err)
					} else {
						done.Add(1)
					}
				}
			})
		}
		for i := range 2 {
			loop(func(n int) error {
				_, err := h.Docker("run", "--rm", "--network", "middle", "-p", fmt.Sprintf("%d:80", 8110+i), "--name", fmt.Sprintf("middle-%d-%d", i, n), lab.Image, "true")
				return err
			})
		}
		loop(func(n int) error {
			name := fmt.Sprintf("middle-net-%d", n)
			_, err := h.Docker("network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, name)
			if err == nil {
				_, err = h.Docker("network", "rm", name)
			}
			return err
		})
		for range 10 {
			// The engine looks half a second after it has started a plugin whether it answers, and disables one that
			// has died meanwhile.
			time.Sleep(time.Duration(700+rand.IntN(800)) * time.Millisecond)
			pid, err := h.PluginPID()
			if err != nil {
				t.Fatal(err)
			}
			h.must("kill -9 " + pid)
			if err := h.WaitPlugin(pid); err != nil {
				t.Fatal(err)
			}
		}
		end()
		t.Logf("%d commands succeeded, %d failed", done.Load(), failed.Load())
		// Whoever uses the engine now tidies up.
		h.must(`for c in $(docker ps -aqf name=middle-); do docker rm -f $c; done
for n in $(docker network ls -qf name=middle-net-); do docker network rm $n; done`)
	}, poolsLost)
}

// repaired waits until what dockway holds is what it was, and logs how long that takes.
func (h *host) repaired(what, want string) {
	h.t.Helper()
	h.repairedBut(what, want, regexp.MustCompile("^$"))
}

// repairedBut does not look at what may differ.
func (h *host) repairedBut(what, want string, may *regexp.Regexp) {
	h.t.Helper()
	start := time.Now()
	var got string
	var err error
	if e := lab.WaitFor(soon, "the repair", func() (bool, error) {
		got, err = h.kernelState()
		return may.ReplaceAllString(got, "") == may.ReplaceAllString(want, ""), err
	}); e != nil {
		h.t.Errorf("%s: %v: want\n%s\ngot\n%s", what, e, want, got)
		return
	}
	h.t.Logf("%s: repaired after at most %s", what, time.Since(start).Round(time.Millisecond))
}

// TestRulesRemoved: rules that somebody removes are back at once, and nothing that runs is
// cut off by their absence.
func TestRulesRemoved(t *testing.T) {
	stop := outsideServer(t)
	defer stop()
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("rules")
		h.network("rules-inner", "--internal")
		h.server("rules-a", "rules", "-p", "8120:80", "-p", "8120:80/udp")
		h.server("rules-b", "rules")
		h.client("rules-c", "rules-inner")
		a := h.address("rules-a", "rules")
		// One connection there and back by each way.
		conns := []*held{
			holdFromOutside(t, h.ip+":8120"),
			h.holdFromContainer("rules-b", a+":80"),
			h.holdFromContainer("rules-b", peer4+":80"),
			h.holdFromContainer("rules-b", h.ip+":8120"),
		}
		before, err := h.kernelState()
		if err != nil {
			t.Fatal(err)
		}
		without := withoutDockerUser(before)
		for _, damage := range []string{
			"nft delete table inet dockway",
			"nft delete table bridge dockway",
			"nft delete table inet dockway; nft delete table bridge dockway",
			"iptables -D DOCKER-USER -m mark --mark 0x1000/0x1000 -m comment --comment dockway -j ACCEPT",
			"ip6tables -F DOCKER-USER || true", // Debian's engine has none
			"iptables -F DOCKER-USER",
			"nft flush table inet dockway",
			"nft flush chain inet dockway forward",
			"nft flush map inet dockway anyport4",
			"nft flush set bridge dockway source4",
			"nft add rule inet dockway forward drop",
			"nft add element inet dockway internal '{ eth0 }'",
			"nft flush ruleset",
		} {
			if damage == "nft flush ruleset" {
				// Docker's own rules are lost too, with the chain that ours is in: Docker makes them anew only at its
				// next start. Without any rule of NAT on the host the kernel translates no connection either: one that
				// is translated and carries something in that moment is reset.
				before = without
				for _, c := range conns {
					c.flowed()
				}
				conns = []*held{h.holdFromContainer("rules-b", a+":80")}
			}
			h.must(damage)
			h.repaired(damage, before)
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, "published port after "+damage, on(shared.peer), network, h.ip+":8120", peer4)
			}
		}
		for _, c := range conns {
			c.flowed()
		}
		if out, err := h.Dockway("status"); err != nil || !strings.Contains(out, "in sync    yes") {
			t.Errorf("dockway status: %s, %v", out, err)
		}
		barred(t, "an internal network", h.inside("rules-c"), "tcp", peer4+":80")
		if err := h.restartEngine(); err != nil { // Docker's rules come back
			t.Fatal(err)
		}
	})
}

// withoutDockerUser is a state without Docker's chain, and so without the rule in it.
func withoutDockerUser(state string) string {
	return regexp.MustCompile(`(?m)^(ip6?):.*$`).ReplaceAllString(state, "$1:")
}

// TestLinksRemoved: links and addresses that somebody removes or changes are back at once.
func TestLinksRemoved(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("links-removed", "--subnet", "198.19.30.0/24")
		h.server("links-removed-a", "links-removed", "-p", "8130:80")
		h.client("links-removed-b", "links-removed")
		a, b := h.address("links-removed-a", "links-removed"), h.inside("links-removed-b")
		bridge := h.must("ip -o address | grep -o 'dwb[^ ]*  *inet 198.19.30.1' | cut -d' ' -f1")
		id := h.docker("inspect", "-f", `{{(index .NetworkSettings.Networks "links-removed").EndpointID}}`, "links-removed-a")
		link := h.must("ip -o link | grep endpoint=" + id + " | grep -o 'dwv[^@]*'")
		before, err := h.kernelState()
		if err != nil {
			t.Fatal(err)
		}
		conns := []*held{holdFromOutside(t, h.ip+":8130"), h.holdFromContainer("links-removed-b", a+":80")}
		for _, damage := range []string{
			"ip link delete " + bridge,
			"ip link set " + bridge + " down",
			"ip link set " + bridge + " mtu 1000",
			"ip address flush dev " + bridge,
			"ip address delete 198.19.30.1/24 dev " + bridge,
			"ip link set " + link + " nomaster",
			"ip link set " + link + " down",
		} {
			h.must(damage)
			h.repairedBut(damage, before, regexp.MustCompile(`link/ether [0-9a-f:]*|[0-9]+: |state [A-Z]*|valid_lft`))
			reaches(t, "published port after "+damage, on(shared.peer), "tcp", h.ip+":8130", peer4)
			reaches(t, "same network after "+damage, b, "tcp", a+":80", "")
		}
		for _, c := range conns {
			c.flowed()
		}

		// The container's own end goes with the host's: its network is lost until it is started again.
		h.must("ip link delete " + link)
		start := time.Now()
		if err := lab.WaitFor(soon, "the endpoint to be collected", func() (bool, error) {
			out, err := h.Dockway("ports", "--json")
			return strings.TrimSpace(out) == "[]", err
		}); err != nil {
			t.Error(err)
		}
		t.Logf("endpoint of a deleted link collected, its port released after at most %s", time.Since(start).Round(time.Millisecond))
		barred(t, "the port of a deleted link", on(shared.peer), "tcp", h.ip+":8130")
		h.server("links-removed-c", "links-removed", "-p", "8130:80") // the port is free
		h.docker("rm", "-f", "links-removed-c")
		h.docker("restart", "-t", "1", "links-removed-a")
		reaches(t, "published port after a restart", on(shared.peer), "tcp", h.ip+":8130", peer4)
		reaches(t, "same network after a restart", b, "tcp", h.address("links-removed-a", "links-removed")+":80", "")
	})
}

// TestEngineKilled: with live-restore containers do not notice; without, what they held is free when
// the engine is back.
func TestEngineKilled(t *testing.T) {
	for _, live := range []bool{true, false} {
		t.Run(fmt.Sprintf("live-restore=%t", live), func(t *testing.T) {
			eachSurvivor(t, func(t *testing.T, h *host) {
				if live {
					h.engineFlags("--live-restore")
				}
				h.network("crash")
				free := h.state()
				h.server("crash-a", "crash", "-p", "8140:80")
				h.client("crash-b", "crash")
				a, b := h.address("crash-a", "crash"), h.inside("crash-b")
				joined := h.state()
				conns := []*held{holdFromOutside(t, h.ip+":8140"), h.holdFromContainer("crash-b", a+":80")}
				if err := h.KillEngine(); err != nil {
					t.Fatal(err)
				}
				if live {
					reaches(t, "published port without the engine", on(shared.peer), "tcp", h.ip+":8140", peer4)
					reaches(t, "same network without the engine", b, "tcp", a+":80", "")
				}
				if err := h.StartEngine(); err != nil {
					t.Fatal(err)
				}
				if live {
					reaches(t, "published port after the engine's return", on(shared.peer), "tcp", h.ip+":8140", peer4)
					reaches(t, "same network after the engine's return", b, "tcp", a+":80", "")
					h.settles("all to be as it was", joined)
					for _, c := range conns {
						c.flowed()
					}
					h.docker("stop", "-t", "1", "crash-a", "crash-b")
				} else {
					for _, c := range conns {
						c.broke()
					}
				}
				h.settles("the endpoints to go", free)
				barred(t, "the port of a container that is gone", on(shared.peer), "tcp", h.ip+":8140")
				h.docker("start", "crash-a", "crash-b")
				reaches(t, "published port of a container started again", on(shared.peer), "tcp", h.ip+":8140", peer4)
				reaches(t, "same network, started again", h.inside("crash-b"), "tcp", h.address("crash-a", "crash")+":80", "")
			})
		})
	}
}

// engineFlags restarts the engine with other flags, until the test's end.
func (h *host) engineFlags(flags ...string) {
	h.t.Helper()
	was := h.Flags
	restart := func() {
		h.t.Helper()
		if err := h.restartEngine(); err != nil {
			h.t.Fatal(err)
		}
	}
	h.Flags = flags
	restart()
	h.t.Cleanup(func() { h.Flags = was; restart() })
}

// TestReboot: nothing is left of the kernel's state, and everything is put back from the record.
func TestReboot(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("boot", "--subnet", "198.19.40.0/24")
		free := h.state()
		h.server("boot-a", "boot", "-p", "8150:80")
		h.server("boot-always", "boot", "-p", "8151:80", "--restart", "always")
		if err := h.Reboot(); err != nil {
			t.Fatal(err)
		}
		h.must("ip route replace default via " + peer4)
		reaches(t, "published port of a container that restarts always", on(shared.peer), "tcp", h.ip+":8151", peer4)
		barred(t, "published port of one that does not", on(shared.peer), "tcp", h.ip+":8150")
		if out, err := h.Dockway("endpoints", "--json"); err != nil || strings.Count(out, `"endpoint"`) != 1 {
			t.Errorf("one endpoint should be left: %s, %v", out, err)
		}
		h.docker("start", "boot-a")
		reaches(t, "published port of a container started again", on(shared.peer), "tcp", h.ip+":8150", peer4)
		reaches(t, "same network", h.inside("boot-always"), "tcp", h.address("boot-a", "boot")+":80", "")
		h.docker("rm", "-f", "boot-a", "boot-always")
		h.settles("what the containers had to be released", free)
	})
}

// TestUpgrade: make install on a host that has dockway takes a new plugin in place of the old one,
// and what runs does not notice.
func TestUpgrade(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("upgrade")
		h.network("nat") // which install makes when there is none
		h.server("upgrade-a", "upgrade", "-p", "8180:80")
		h.client("upgrade-b", "upgrade")
		a := h.address("upgrade-a", "upgrade")
		before, record := h.state(), h.record(t)
		conns := []*held{holdFromOutside(t, h.ip+":8180"), h.holdFromContainer("upgrade-b", a+":80")}
		settings := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin)
		old, err := h.pluginDir()
		if err != nil {
			t.Fatal(err)
		}
		h.must("mkdir -p /run/bin; DOCKWAY_BIN=/run/bin " + root + "/integration/install.sh; /run/bin/dockway version")
		if after, err := h.pluginDir(); err != nil || after == old {
			t.Errorf("the plugin is the same as before: %v", err)
		}
		if now := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin); now != settings {
			t.Errorf("the plugin's settings were %s and are %s", settings, now)
		}
		h.settles("all to be as it was", before)
		if after := h.record(t); after != record {
			t.Errorf("the record changed: before\n%s\nafter\n%s", record, after)
		}
		reaches(t, "published port after the upgrade", on(shared.peer), "tcp", h.ip+":8180", peer4)
		for _, c := range conns {
			c.flowed()
		}
		h.client("upgrade-c", "upgrade")
		reaches(t, "a container made after the upgrade", h.inside("upgrade-c"), "tcp", a+":80", "")
	})
}

// TestDamagedRecord: dockway does not start on it and says what to do; with a copy all is well.
func TestDamagedRecord(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("damaged")
		h.server("damaged-a", "damaged", "-p", "8190:80")
		before := h.state()
		dir, err := h.pluginDir()
		if err != nil {
			t.Fatal(err)
		}
		db := filepath.Join(dir, "propagated-mount", "dockway.db")
		h.docker("plugin", "disable", "-f", lab.Plugin)
		h.must("cp " + db + " /run/copy.db")
		h.must("truncate -s 5000 " + db)
		broken := h.must("cksum " + db)
		if out, err := h.Docker("plugin", "enable", lab.Plugin); err == nil {
			t.Errorf("dockway starts on a truncated record: %s", out)
		}
		if err := lab.WaitFor(soon, "the engine's log to say which record is damaged, and what to do", func() (bool, error) {
			log := h.Log(500)
			return strings.Contains(log, "the record /var/lib/dockway/dockway.db is damaged") && strings.Contains(log, "put a backup in its place"), nil
		}); err != nil {
			t.Error(err)
		}
		if after := h.must("cksum " + db); after != broken {
			t.Errorf("the damaged record was changed: %s, then %s", broken, after)
		}
		reaches(t, "published port while dockway refuses", on(shared.peer), "tcp", h.ip+":8190", peer4)
		h.must("cp /run/copy.db " + db)
		// The engine takes a moment to get over a plugin that died at once.
		if err := lab.WaitFor(20*time.Second, "the plugin to be enabled again", func() (bool, error) {
			_, _ = h.Docker("plugin", "disable", "-f", lab.Plugin)
			_, err := h.Docker("plugin", "enable", lab.Plugin)
			return err == nil && h.WaitPlugin("") == nil, err
		}); err != nil {
			t.Fatal(err)
		}
		h.settles("all to be as it was", before)
		reaches(t, "published port", on(shared.peer), "tcp", h.ip+":8190", peer4)
	})
}

// TestFullDisk: dockway as a plain service of the host, whose state has no room: calls fail and say
// why, nothing half-made is left, and with room they succeed. On a disk that is read-only it does
// not start. (TestFailingDisk has it turn read-only while dockway runs.)
func TestFullDisk(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	eachSurvivor(t, func(t *testing.T, h *host) {
		// The two would each undo what the other does to the tables.
		h.docker("plugin", "disable", lab.Plugin)
		t.Cleanup(func() { h.docker("plugin", "enable", lab.Plugin) })
		h.must("mkdir -p /run/small && mount -t tmpfs -o size=512k none /run/small")
		t.Cleanup(func() { h.must("umount -l /run/small") })
		service := h.Command(context.Background(), root+"/build/dockway", "serve", "--socket", "/run/docker/plugins/dw2.sock", "--state-dir", "/run/small")
		var said bytes.Buffer
		service.Stdout, service.Stderr = &said, &said
		if err := service.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			h.must("pkill -TERM -f '^[^ ]*/dockway serve --socket /run/docker/plugins/dw2.sock'")
			if err := service.Wait(); err != nil || t.Failed() {
				t.Logf("the service: %v: %s", err, said.String())
			}
			_, _ = h.Docker("network", "rm", "disk-net", "disk-more")
		})
		dockway := func(what string) string {
			t.Helper()
			out, err := h.Dockway(what, "--json", "--socket", "/run/docker/plugins/dw2.sock")
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		if err := lab.WaitFor(soon, "the service", func() (bool, error) {
			out, err := h.Dockway("status", "--json", "--socket", "/run/docker/plugins/dw2.sock")
			return err == nil && strings.Contains(out, `"in_sync":true`), err
		}); err != nil {
			t.Fatal(err)
		}
		create := []string{"network", "create", "-d", "dw2", "--ipam-driver", "dw2"}
		h.docker(append(create, "disk-net")...)
		h.start("disk-a", "disk-net", []string{"-p", "8195:80"}, "/probe", "serve", "tcp", ":80")
		reaches(t, "published port of a plain service", on(shared.peer), "tcp", h.ip+":8195", peer4)
		held := func() string {
			kernel, err := h.kernelState()
			return dockway("networks") + dockway("endpoints") + dockway("ports") + kernel + failure(err)
		}
		before := held()
		for _, trouble := range []struct{ make, words, end string }{
			{"dd if=/dev/zero of=/run/small/filler bs=4k status=none || true", "no space left on device; free some space", "rm /run/small/filler"},
		} {
			h.must(trouble.make)
			for n := range 200 { // the record may have pages of its own left
				name := fmt.Sprintf("disk-more-%d", n)
				out, err := h.Docker(append(create, name)...)
				if err == nil {
					h.docker("network", "rm", name)
					if n == 199 {
						t.Errorf("%s: networks can still be made", trouble.make)
					}
					continue
				}
				if !strings.Contains(out, trouble.words) {
					t.Errorf("%s: docker network create says %q, want %q", trouble.make, out, trouble.words)
				}
				break
			}
			after := ""
			if err := lab.WaitFor(soon, "nothing half-made to be left", func() (bool, error) { // links go in the background
				after = held()
				return after == before, nil
			}); err != nil {
				t.Errorf("%s: %v: before\n%s\nafter\n%s", trouble.make, err, before, after)
			}
			reaches(t, "published port, "+trouble.make, on(shared.peer), "tcp", h.ip+":8195", peer4)
			h.must(trouble.end)
			h.docker(append(create, "disk-more")...)
			h.docker("network", "rm", "disk-more")
		}
		h.docker("rm", "-f", "disk-a")
		h.docker("network", "rm", "disk-net")
		if out, err := h.Script("mkdir -p /run/fixed && mount -t tmpfs -o ro none /run/fixed && " + root + "/build/dockway serve --socket /run/docker/plugins/dw3.sock --state-dir /run/fixed"); err == nil || !strings.Contains(out, "read-only file system; mount that file system read-write") {
			t.Errorf("dockway on a read-only disk: %v: %s", err, out)
		}
		h.must("umount /run/fixed")
	})
}

func (h *host) restartEngine() error {
	if err := h.StopEngine(); err != nil {
		return err
	}
	return h.StartEngine()
}

// settles waits until what dockway holds is what it was.
func (h *host) settles(what, want string) {
	h.t.Helper()
	var got string
	if err := lab.WaitFor(20*time.Second, what, func() (bool, error) {
		got = h.state()
		return got == want, nil
	}); err != nil {
		h.t.Errorf("%v: want\n%s\ngot\n%s", err, want, got)
	}
}
