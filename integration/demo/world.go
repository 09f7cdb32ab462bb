package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// world is what the demo plays in: hosts on two LANs. On the first they have nat networks, and overlay
// networks between them. On the second, the wire, are the networks of the other modes; a router leads
// from there to another subnet.
type world struct {
	ctx     context.Context
	start   time.Time
	probe   string // the program that asks and answers
	built   string // the plugin
	lab     *lab.Lab
	outside *lab.Machine // on the first LAN
	desk    *lab.Machine // on the wire
	far     *lab.Machine // in the other subnet
	router  *lab.Router
	hosts   []*host
	mu      sync.Mutex
	failed  int
}

// host is one of the simulated hosts. The third is on the first LAN only.
type host struct {
	*lab.Host
	name    string
	engine  lab.Engine
	version string // of its engine
	lanIP   string
	wireIP  string // empty: it is not on the wire
}

const (
	outsideIP  = "198.18.0.100"
	wire       = "198.18.64.0/24"
	deskIP     = "198.18.64.100"
	gatewayIP  = "198.18.64.254"
	behind     = "198.18.65.0/24"
	farIP      = "198.18.65.100"
	farGateway = "198.18.65.254"
	underlay   = "eth0" // of the hosts, to the first LAN
	uplink     = "eth1" // and to the wire
)

// prepare starts the lab.
func (w *world) prepare() error {
	title("The lab: three hosts with engines of their own, machines on their LANs, and a router to another subnet")
	root, err := lab.Root()
	if err != nil {
		return err
	}
	w.built = filepath.Join(root, "build", "plugin")
	if _, err := os.Stat(filepath.Join(w.built, "rootfs", "dockway")); err != nil {
		return fmt.Errorf("the plugin is not built (make plugin): %w", err)
	}
	if w.lab, err = lab.New(w.say); err != nil {
		return err
	}
	if w.probe, err = w.lab.BuildProbe(); err != nil {
		return err
	}
	lans := map[string]*lab.LAN{}
	for _, name := range []string{"lan", "wire", "behind"} {
		if lans[name], err = w.lab.LAN(name); err != nil {
			return err
		}
	}
	if w.router, err = w.lab.Router("router"); err != nil {
		return err
	}
	if err := errors.Join(w.router.Plug(lans["wire"], "eth0", gatewayIP+"/24"), w.router.Plug(lans["behind"], "eth1", farGateway+"/24")); err != nil {
		return err
	}
	for _, m := range []struct {
		name, lan, ip, gateway string
		to                     **lab.Machine
	}{
		{"outside", "lan", outsideIP, "", &w.outside},
		{"desk", "wire", deskIP, gatewayIP, &w.desk},
		{"far", "behind", farIP, farGateway, &w.far},
	} {
		if *m.to, err = w.machine(m.name, lans[m.lan], m.ip, m.gateway); err != nil {
			return err
		}
	}
	w.say("outside: %s; desk: %s, on another LAN; far: %s, behind a router; all serve port 80", outsideIP, deskIP, farIP)
	w.hosts = []*host{
		{name: "debian", engine: lab.Debian, lanIP: "198.18.0.1", wireIP: "198.18.64.1"},
		{name: "moby", engine: lab.Moby, lanIP: "198.18.0.2", wireIP: "198.18.64.2"},
		{name: "third", engine: lab.Debian, lanIP: "198.18.0.3"},
	}
	key, err := w.outside.Run(filepath.Join(root, "build", "dockway"), "keygen")
	if err != nil {
		return err
	}
	settings := []string{"JOIN=198.18.0.1,198.18.0.2", "GOSSIP_KEY=" + key}
	return each(w.hosts, func(h *host) error { return w.raise(h, lans["lan"], lans["wire"], settings) })
}

// machine starts a machine that serves port 80.
func (w *world) machine(name string, lan *lab.LAN, ip, gateway string) (*lab.Machine, error) {
	m, err := w.lab.Machine(name)
	if err != nil {
		return nil, err
	}
	if err := lan.Plug(m, "eth0", ip+"/24"); err != nil {
		return nil, err
	}
	if gateway != "" {
		if _, err := m.Run("ip", "route", "add", "default", "via", gateway); err != nil {
			return nil, err
		}
	}
	return m, w.serve(m, ip)
}

// serve answers on port 80 of a machine's addresses, until the lab ends. A datagram to one is not
// answered from another.
func (w *world) serve(m *lab.Machine, ips ...string) error {
	_, err := m.Start("", w.probe, "serve", "tcp", ":80")
	for _, ip := range ips {
		_, failed := m.Start("", w.probe, "serve", "udp", ip+":80")
		err = errors.Join(err, failed)
	}
	return err
}

// raise starts a host and installs the plugin.
func (w *world) raise(h *host, lan, wire *lab.LAN, settings []string) error {
	w.say("%s: starting its engine", h.name)
	var err error
	if h.Host, err = w.lab.Host(h.name, h.engine); err != nil {
		return err
	}
	if h.version, err = h.engineVersion(); err != nil {
		return err
	}
	if err := errors.Join(h.Plug(lan, underlay, h.lanIP+"/24"), h.LoadImage(w.probe)); err != nil {
		return err
	}
	ips := []string{h.lanIP}
	if h.wireIP != "" {
		ips = append(ips, h.wireIP)
		if err := h.Plug(wire, uplink, h.wireIP+"/24"); err != nil {
			return err
		}
		if _, err := h.Run("ip", "route", "add", behind, "via", gatewayIP); err != nil {
			return err
		}
	}
	w.say("%s: %s, %s runs", h.Name, strings.Join(ips, " and "), h.version)
	if err := w.serve(h.Machine, ips...); err != nil {
		return err
	}
	if err := h.InstallPlugin(w.built, settings...); err != nil {
		return err
	}
	w.say("%s: plugin %s is installed and enabled, %s", h.Name, lab.Plugin, settings[0])
	return nil
}

// engineVersion is short. An engine built from Go modules does not know its own: its folder does.
func (h *host) engineVersion() (string, error) {
	said, err := h.Docker("version", "-f", "{{.Server.Version}}")
	if err != nil {
		return "", err
	}
	where, err := h.Script("readlink -f $(command -v dockerd)")
	if err != nil {
		return "", err
	}
	if built := regexp.MustCompile(`moby-(v[0-9.]+(?:-(?:beta|rc)\.[0-9]+)?)`).FindStringSubmatch(where); built != nil {
		return "moby " + built[1], nil
	}
	said, _, _ = strings.Cut(said, "+")
	return "Docker " + said, nil
}
