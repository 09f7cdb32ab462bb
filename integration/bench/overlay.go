package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// Networks between hosts, against the bare underlay: the engine's own overlay, which needs a swarm, and
// dockway's. The client is on one host, the server on another, and a third is a member.

// path is a way from the client to the server.
type path struct {
	name   string
	server netip.Addr
	client func(args ...string) []string // the command on the client's host that runs this program
}

const (
	overlayHosts = 3
	vsid         = "5001"
	// Latency is to be 1.15 times as good as on Docker's overlay, and throughput no worse.
	overlayLatency, overlayRate = 1 / 1.15, 1
)

// overlays are the networks that are compared.
var overlays = []struct {
	name, subnet string
	server       string
	client       string
	create       []string
	everywhere   bool // to be created on each host
}{
	{"Docker's overlay", "10.91.0.0/24", "10.91.0.20", "10.91.0.21", []string{"-d", "overlay", "--attachable"}, false},
	{"dockway's overlay", "10.92.0.0/24", "10.92.0.20", "10.92.0.21", []string{"-d", lab.Plugin, "--ipam-driver", lab.Plugin, "-o", "mode=overlay", "-o", "vsid=" + vsid}, true},
}

// overlay measures the paths in turn.
func (b *bench) overlay() error {
	hosts, err := b.swarm()
	if err != nil {
		return err
	}
	bare, err := b.bareUnderlay(hosts)
	if err != nil {
		return err
	}
	least, err := b.bareVXLAN(hosts)
	if err != nil {
		return err
	}
	paths, missing := []path{bare, least}, map[string]error{}
	for i, o := range overlays {
		p, err := b.overOverlay(hosts, i)
		if err != nil && o.everywhere { // dockway's: the engine's own is measured without it
			missing[o.name] = err
			continue
		} else if err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
		paths = append(paths, p)
	}
	for _, w := range []struct {
		what, name string
		goal       float64
	}{
		{"rr", names["rr"] + " between hosts", overlayLatency},
		{"crr", names["crr"] + " between hosts", overlayLatency},
		{"send", "1 GB, client to server on another host", overlayRate},
		{"receive", "1 GB, server to client on another host", overlayRate},
	} {
		var rounds []func() (time.Duration, error)
		for _, p := range paths {
			rounds = append(rounds, func() (time.Duration, error) { return b.askOver(hosts[1], p, w.what) })
		}
		m, err := b.interleave(b.rounds, rounds...)
		if err != nil {
			return err
		}
		for i, p := range paths[1:] {
			share := 100 * float64(median(m[0])) / float64(median(m[i+1]))
			b.report.compareRounds(w.name+", "+p.name, m[i+1], m[0], fmt.Sprintf("the bare underlay: %.0f %% of it", share), noGoal)
		}
		const kernels, docker, dockway = 1, 2, 3 // places in paths
		if len(paths) > dockway {
			b.report.compareRounds("the same, dockway's overlay", m[dockway], m[docker], "Docker's overlay", w.goal)
			b.report.compareRounds("the same, dockway's overlay", m[dockway], m[kernels], "the kernel's VXLAN by hand", noGoal)
		}
	}
	for name, err := range missing {
		said := strings.Split(err.Error(), "daemon: ")
		b.report.plain(name, "not measured", said[len(said)-1])
	}
	return nil
}

// swarm starts hosts on an underlay, with the plugin, and makes a swarm of their engines.
func (b *bench) swarm() ([]*lab.Host, error) {
	root, err := lab.Root()
	if err != nil {
		return nil, err
	}
	u, err := b.lab.Underlay(lab.UnderlayConfig{Name: "over", Hosts: overlayHosts, First: b.host.Engine, Same: true, Plugin: filepath.Join(root, "build", "plugin"), Probe: b.self})
	if err != nil {
		return nil, err
	}
	if _, err := u.Hosts[0].Docker("swarm", "init", "--advertise-addr", lab.UnderlayAddress(0)); err != nil {
		return nil, err
	}
	token, err := u.Hosts[0].Docker("swarm", "join-token", "-q", "worker")
	if err != nil {
		return nil, err
	}
	for i, h := range u.Hosts[1:] {
		if _, err := h.Docker("swarm", "join", "--advertise-addr", lab.UnderlayAddress(i+1), "--token", token, lab.UnderlayAddress(0)+":2377"); err != nil {
			return nil, err
		}
	}
	return u.Hosts, nil
}

// bareUnderlay is from host to host. Client and server are in containers, too, and so in control groups
// like those of the others, but in the hosts' own network.
func (b *bench) bareUnderlay(hosts []*lab.Host) (path, error) {
	p := path{"the bare underlay", netip.MustParseAddr(lab.UnderlayAddress(0)), inContainer("bare-client")}
	err := errors.Join(
		runOn(hosts[0], "bare-server", []string{"--network", "host"}, "/probe", "serve", cpu),
		runOn(hosts[1], "bare-client", []string{"--network", "host"}, "sleep", "100000"))
	if err != nil {
		return p, err
	}
	return p, b.reached(hosts[1], p)
}

func inContainer(name string) func(args ...string) []string {
	return func(args ...string) []string { return append([]string{"docker", "exec", name, "/probe"}, args...) }
}

func runOn(h *lab.Host, name string, network []string, command ...string) error {
	args := append([]string{"run", "-d", "--cap-add", "SYS_NICE", "--name", name}, network...)
	_, err := h.Docker(append(append(args, lab.Image), command...)...)
	return err
}

// overOverlay makes a network and its containers.
func (b *bench) overOverlay(hosts []*lab.Host, n int) (path, error) {
	o, name := overlays[n], fmt.Sprintf("overlay%d", n)
	on := hosts[:1]
	if o.everywhere {
		on = hosts
	}
	create := append(append([]string{"network", "create", "--subnet", o.subnet}, o.create...), name)
	for _, h := range on {
		if _, err := h.Docker(create...); err != nil {
			return path{}, err
		}
	}
	err := errors.Join(
		runOn(hosts[0], name+"-server", []string{"--network", name, "--ip", o.server}, "/probe", "serve", cpu),
		runOn(hosts[1], name+"-client", []string{"--network", name, "--ip", o.client}, "sleep", "100000"))
	if err != nil {
		return path{}, err
	}
	p := path{o.name, netip.MustParseAddr(o.server), inContainer(name + "-client")}
	return p, b.reached(hosts[1], p)
}

// reached waits until the server of a path answers.
func (b *bench) reached(from *lab.Host, p path) error {
	return lab.WaitFor(20*time.Second, "the server to be reached over "+p.name, func() (bool, error) {
		_, err := b.askOver(from, p, "rr")
		return err == nil, err
	})
}

// askOver measures one round.
func (b *bench) askOver(from *lab.Host, p path, what string) (time.Duration, error) {
	var l latency
	err := b.run(from.Machine, &l, p.client("measure", what, netip.AddrPortFrom(p.server, uint16(portOf(what))).String(), cpu, fmt.Sprint(b.each.Milliseconds()))...)
	if what == "send" || what == "receive" {
		l.P50 *= 1e9 / piece
	}
	return l.P50, err
}
