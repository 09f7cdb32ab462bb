// Package integration proves on real engines what dockway promises: the lab starts hosts with
// engines, and the tests speak to them with the docker command line, as users do.
package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// world is what the tests share: a LAN, a host for each engine, and a peer outside.
type world struct {
	lab   *lab.Lab
	lan   *lab.LAN
	peer  *lab.Machine
	hosts map[lab.Engine]*lab.Host
	probe string // the probe program
	built string // build/plugin
}

var shared world

// The LAN's addresses.
const (
	peer4, peer6 = "198.18.0.100", "fd00:18::100"
)

var (
	host4 = map[lab.Engine]string{lab.Debian: "198.18.0.1", lab.Moby: "198.18.0.2"}
	host6 = map[lab.Engine]string{lab.Debian: "fd00:18::1", lab.Moby: "fd00:18::2"}
)

func TestMain(m *testing.M) {
	lab.Main()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	start := time.Now()
	if err := shared.start(); err != nil {
		fmt.Fprintln(os.Stderr, "the lab does not start:", err)
		if shared.lab != nil {
			shared.lab.Close()
		}
		return 1
	}
	defer shared.lab.Close()
	fmt.Printf("lab ready after %s\n", time.Since(start).Round(time.Second))
	return m.Run()
}

func (w *world) start() (err error) {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	w.built = filepath.Join(root, "build", "plugin")
	if _, err := os.Stat(filepath.Join(w.built, "rootfs", "dockway")); err != nil {
		return fmt.Errorf("the plugin is not built (make plugin): %w", err)
	}
	if w.lab, err = lab.New(func(format string, args ...any) { fmt.Printf(format+"\n", args...) }); err != nil {
		return err
	}
	w.probe = filepath.Join(w.lab.Dir(), "probe")
	build := exec.Command("go", "build", "-o", w.probe, "./integration/probe")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the probe: %w: %s", err, out)
	}
	if w.lan, err = w.lab.LAN("lan"); err != nil {
		return err
	}
	if w.peer, err = w.lab.Machine("peer"); err != nil {
		return err
	}
	if err := w.lan.Plug(w.peer, "eth0", peer4+"/24", peer6+"/64"); err != nil {
		return err
	}
	w.hosts = map[lab.Engine]*lab.Host{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failed error
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		wg.Go(func() {
			h, err := w.host(string(engine), engine)
			if err == nil {
				err = h.Plug(w.lan, "eth0", host4[engine]+"/24", host6[engine]+"/64")
			}
			mu.Lock()
			defer mu.Unlock()
			w.hosts[engine] = h
			if err != nil {
				failed = fmt.Errorf("host with engine %s: %w", engine, err)
			}
		})
	}
	wg.Wait()
	return failed
}

// host starts a host with the plugin, not yet on any LAN.
func (w *world) host(name string, engine lab.Engine, flags ...string) (*lab.Host, error) {
	h, err := w.lab.Host(name, engine, flags...)
	if err != nil {
		return h, err
	}
	if err := h.LoadImage(w.probe); err != nil {
		return h, err
	}
	return h, h.InstallPlugin(w.built, "LOG_LEVEL=debug", "COLLECT_AFTER=3s")
}

// eachEngine runs a test on the shared host of each engine.
func eachEngine(t *testing.T, test func(t *testing.T, h *host)) {
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		t.Run(string(engine), func(t *testing.T) {
			test(t, onHost(t, shared.hosts[engine]))
		})
	}
}

// host is a lab host within a test: what fails, fails the test, and what the test makes is
// removed at its end.
type host struct {
	*lab.Host
	t            *testing.T
	ip           string // on the LAN
	wire4, wire6 string // on the wire
}

func onHost(t *testing.T, h *lab.Host) *host {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			ruleset, _ := h.Script("nft list ruleset | head -400; ip address; ip route; ip neigh; iptables -S FORWARD; iptables -S DOCKER-USER")
			t.Logf("%s:\n%s\n%s", h.Name, ruleset, h.Log(40))
		}
	})
	return &host{Host: h, t: t, ip: host4[h.Engine], wire4: wireHost4[h.Engine], wire6: wireHost6[h.Engine]}
}

// docker runs a docker command that has to succeed.
func (h *host) docker(args ...string) string {
	h.t.Helper()
	out, err := h.Docker(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// killPlugin ends the plugin without warning, and waits until the engine has started it again.
func (h *host) killPlugin() {
	h.t.Helper()
	pid, err := h.PluginPID()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.KillPlugin(); err != nil {
		h.t.Fatal(err)
	}
	if err := h.WaitPlugin(pid); err != nil {
		h.t.Fatal(err)
	}
}

// refused runs a docker command that has to fail and say certain words.
func (h *host) refused(words string, args ...string) {
	h.t.Helper()
	out, err := h.Docker(args...)
	if err == nil {
		h.t.Errorf("docker %s succeeded: %s", strings.Join(args, " "), out)
	} else if !strings.Contains(err.Error(), words) {
		h.t.Errorf("docker %s says %q, want %q in it", strings.Join(args, " "), out, words)
	}
}

// network makes a network with the plugin's address manager and removes it at the test's end.
func (h *host) network(name string, args ...string) {
	h.t.Helper()
	h.docker(append(append([]string{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin}, args...), name)...)
	h.t.Cleanup(func() {
		if out, err := h.Docker("network", "rm", name); err != nil && !strings.Contains(out, "not found") && !strings.Contains(out, "No such") {
			h.t.Error(err)
		}
	})
}

// server starts a container that answers each client with its address, on TCP and UDP port 80.
func (h *host) server(name, network string, args ...string) {
	h.t.Helper()
	h.start(name, network, args, "sh", "-c", "/probe serve udp :80 & exec /probe serve tcp :80")
}

// client starts a container that does nothing.
func (h *host) client(name, network string, args ...string) {
	h.t.Helper()
	h.start(name, network, args, "sleep", "100000")
}

func (h *host) start(name, network string, args []string, command ...string) {
	h.t.Helper()
	h.t.Cleanup(func() { _, _ = h.Docker("rm", "-f", name) }) // the test may have removed it
	full := append([]string{"run", "-d", "--stop-signal", "KILL", "--name", name, "--network", network}, args...)
	h.docker(append(append(full, lab.Image), command...)...)
}

// address is a container's IPv4 address on a network.
func (h *host) address(container, network string) string {
	h.t.Helper()
	return h.docker("inspect", "-f", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).IPAddress}}", network), container)
}

// address6 is its IPv6 address.
func (h *host) address6(container, network string) string {
	h.t.Helper()
	return h.docker("inspect", "-f", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).GlobalIPv6Address}}", network), container)
}

// from asks a server from a place, and gives what the server saw, without the port.
type from func(args ...string) (string, error)

func (h *host) in(container string) from {
	return func(args ...string) (string, error) {
		return h.Docker(append([]string{"exec", container, "/probe"}, args...)...)
	}
}

func on(m *lab.Machine) from {
	return func(args ...string) (string, error) {
		return m.Run(append([]string{shared.probe}, args...)...)
	}
}

// soon is how long tests wait for what comes at once: longer than the second in which repairs are promised, since
// tests share their machine with others, and far shorter than the minute after which dockway looks by itself.
const soon = 20 * time.Second

// reaches fails the test unless the server is reached and sees the client as seen (any, if empty).
func reaches(t *testing.T, what string, f from, network, address, seen string) {
	t.Helper()
	var said string
	err := lab.WaitFor(soon, what, func() (bool, error) {
		out, err := f("-timeout", "1s", "ask", network, address)
		said = out
		return err == nil, err
	})
	if err != nil {
		t.Errorf("%s: %s over %s is not reached: %v", what, address, network, err)
		return
	}
	client := said[:max(0, strings.LastIndex(said, ":"))]
	if seen != "" && client != seen && client != "["+seen+"]" {
		t.Errorf("%s: %s over %s sees the client as %s, want %s", what, address, network, said, seen)
	}
}

// barred fails the test if the server is reached.
func barred(t *testing.T, what string, f from, network, address string) {
	t.Helper()
	if said, err := f("-timeout", "700ms", "ask", network, address); err == nil {
		t.Errorf("%s: %s over %s is reached, and sees %s", what, address, network, said)
	}
}
