package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// The modes that put containers on the physical network, against the engine's own driver that does so,
// macvlan. The peer on the LAN is the client, the server is in a container.

// contender is a network on an uplink of the host, with a server on it. The uplinks are alike.
type contender struct {
	name   string
	uplink string
	subnet string // its beginning: the host has .1 in it, the server .16, the peer .100
	create []string
}

// rate is the goal against macvlan, in time: 0.98 times as many requests, or bytes, in the same time.
const rate = 1 / 0.98

// contenders are what is compared, the last two without a bridge. Slow is transparent whose frames all go by
// the bridge.
func contenders() (transparent, slow, l2bridge, macvlan, backend contender) {
	dockway := func(mode, uplink string, more ...string) []string {
		return append([]string{"-d", lab.Plugin, "--ipam-driver", lab.Plugin, "-o", "mode=" + mode, "-o", "interface=" + uplink}, more...)
	}
	transparent = contender{"transparent", "eth1", "198.18.64", dockway("transparent", "eth1")}
	slow = contender{"slow", "eth1", "198.18.68", dockway("transparent", "eth1", "-o", "fast_path=false")}
	l2bridge = contender{"l2bridge", "eth1", "198.18.65", dockway("l2bridge", "eth1")}
	macvlan = contender{"macvlan", "eth2", "198.18.66", []string{"-d", "macvlan", "-o", "parent=eth2"}}
	backend = contender{"backend-macvlan", "eth3", "198.18.67", dockway("transparent", "eth3", "-o", "backend=macvlan", "-o", "host_access=true")}
	return transparent, slow, l2bridge, macvlan, backend
}

func (b *bench) wire() error {
	transparent, slow, l2bridge, macvlan, backend := contenders()
	for _, c := range []contender{transparent, slow, l2bridge, macvlan, backend} {
		if err := b.enter(c); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	if _, err := b.askOnWire("rr", b.host.Machine, macvlan, filtered); err == nil {
		return errors.New("the host reaches containers of Docker's macvlan: it is said to be unable to")
	}
	for _, w := range []struct{ what, name string }{
		{"rr", names["rr"] + ", LAN to container"},
		{"crr", names["crr"] + ", LAN to container"},
		{"send", "1 GB, LAN to container"},
		{"receive", "1 GB, container to LAN"},
	} {
		round := func(from *lab.Machine, c contender, filter string) func() (time.Duration, error) {
			return func() (time.Duration, error) { return b.askOnWire(w.what, from, c, filter) }
		}
		m, err := b.interleave(b.rounds,
			round(b.peer, transparent, filtered), round(b.peer, macvlan, filtered), round(b.peer, transparent, unfiltered),
			round(b.peer, l2bridge, filtered), round(b.peer, backend, filtered), round(b.host.Machine, transparent, filtered),
			round(b.peer, slow, filtered), round(b.host.Machine, backend, filtered))
		if err != nil {
			return err
		}
		b.report.compareRounds(w.name+", transparent", m[0], m[1], "Docker's macvlan", rate)
		b.report.compareRounds("the same, bridge-nf-call-iptables=0", m[2], m[1], "Docker's macvlan", rate)
		b.report.compareRounds("the same, fast_path=false", m[6], m[1], "Docker's macvlan", noGoal)
		b.report.compareRounds("the same, backend=macvlan, host_access=true", m[4], m[1], "Docker's macvlan", rate)
		b.report.compareRounds("the same, l2bridge", m[3], m[0], "transparent", noGoal)
		b.report.compareRounds("the same, with the host for the LAN, transparent", m[5], m[0], "the LAN (macvlan: not reached)", noGoal)
		b.report.compareRounds("the same, with the host for the LAN, backend=macvlan", m[7], m[4], "the LAN (macvlan: not reached)", noGoal)
	}
	return nil
}

// plugUplinks gives the host three uplinks of one kind, and the peer an address in every subnet.
func (b *bench) plugUplinks() error {
	_, err := b.peer.Script("for n in 64 65 66 67 68; do ip address add 198.18.$n.100/24 dev eth0; done")
	return errors.Join(err,
		b.host.Plug(b.lan, "eth1", "198.18.64.1/24", "198.18.65.1/24", "198.18.68.1/24"),
		b.host.Plug(b.lan, "eth2", "198.18.66.1/24"),
		b.host.Plug(b.lan, "eth3", "198.18.67.1/24"))
}

// enter makes a contender's network and starts its server, unless another part has done so.
func (b *bench) enter(c contender) error {
	if _, err := b.host.Docker("container", "inspect", c.name+"-server"); err == nil {
		return nil
	}
	args := append([]string{"network", "create", "--subnet", c.subnet + ".0/24", "--gateway", c.subnet + ".254", "--ip-range", c.subnet + ".16/28"}, c.create...)
	if _, err := b.host.Docker(append(args, c.name)...); err != nil {
		return err
	}
	if _, err := b.host.Docker("run", "-d", "--cap-add", "SYS_NICE", "--name", c.name+"-server", "--network", c.name, "--ip", c.subnet+".16", lab.Image, "/probe", "serve", cpu); err != nil {
		return err
	}
	return lab.WaitFor(5*time.Second, "the server to be reached", func() (bool, error) {
		_, err := b.askOnWire("rr", b.peer, c, filtered)
		return err == nil, err
	})
}

// Whether bridged frames pass iptables, as bridge-nf-call-iptables has it.
const (
	filtered   = "1" // as on most hosts with an engine
	unfiltered = "0"
)

// askOnWire measures one round. What passes in bytes is given as the time of a GB.
func (b *bench) askOnWire(what string, from *lab.Machine, c contender, filter string) (time.Duration, error) {
	if _, err := b.host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+filter, "net.bridge.bridge-nf-call-ip6tables="+filter); err != nil {
		return 0, err
	}
	var l latency
	err := b.run(from, &l, b.self, "measure", what, fmt.Sprintf("%s.16:%d", c.subnet, portOf(what)), cpu, fmt.Sprint(b.each.Milliseconds()))
	if what == "send" || what == "receive" {
		l.P50 *= 1e9 / piece
	}
	return l.P50, err
}
