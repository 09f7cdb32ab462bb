package lab

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// Underlay is hosts with engines of both kinds in turn, each with the plugin, on one LAN of MTU 1500,
// as the hosts of an overlay are. What it is made of does the rest: Capture on a host's "eth0", Block
// and Part, KillPlugin, PowerOff and PowerOn.
type Underlay struct {
	*LAN
	Hosts []*Host
}

// UnderlayConfig says how.
type UnderlayConfig struct {
	Name    string   // of the LAN, and with a number from 1 of the hosts
	Hosts   int      // at most 200
	First   Engine   // of the first host; the others follow in turn. Empty: Debian
	Same    bool     // all engines are as the first
	Plugin  string   // folder with config.json and rootfs; empty: no plugin
	Probe   string   // becomes /probe in the image; empty: BuildProbe
	Flags   []string // of dockerd
	Setting []string // of every plugin ("VXLAN_PORT=14790"). Those of UnderlaySettings are given before
}

// UnderlayAddress is the IPv4 address of a host, counted from 0.
func UnderlayAddress(host int) string { return fmt.Sprintf("198.18.80.%d", host+1) }

// UnderlayAddress6 is its IPv6 address.
func UnderlayAddress6(host int) string { return fmt.Sprintf("fd00:80::%x", host+1) }

// UnderlaySettings are the settings of a host's plugin: it joins the first two hosts, and is reached
// at its link to the LAN.
func UnderlaySettings(name string, hosts int) []string {
	var join []string
	for i := range min(2, hosts) {
		join = append(join, UnderlayAddress(i))
	}
	return []string{"NODE_NAME=" + name, "JOIN=" + strings.Join(join, ","), "ADVERTISE=eth0"}
}

// Underlay starts one.
func (l *Lab) Underlay(c UnderlayConfig) (*Underlay, error) {
	lan, err := l.LAN(c.Name)
	if err != nil {
		return nil, err
	}
	if c.Probe == "" {
		if c.Probe, err = l.BuildProbe(); err != nil {
			return nil, err
		}
	}
	u := &Underlay{LAN: lan, Hosts: make([]*Host, c.Hosts)}
	failed := make([]error, c.Hosts)
	var wg sync.WaitGroup
	for i := range c.Hosts {
		wg.Go(func() { u.Hosts[i], failed[i] = l.underlayHost(c, lan, i) })
	}
	wg.Wait()
	return u, errors.Join(failed...)
}

func (l *Lab) underlayHost(c UnderlayConfig, lan *LAN, i int) (*Host, error) {
	engines := []Engine{Debian, Moby}
	if c.First == Moby {
		engines = []Engine{Moby, Debian}
	}
	engine := engines[0]
	if !c.Same {
		engine = engines[i%len(engines)]
	}
	h, err := l.Host(fmt.Sprintf("%s-%d", c.Name, i+1), engine, c.Flags...)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(h.Plug(lan, "eth0", UnderlayAddress(i)+"/24", UnderlayAddress6(i)+"/64"), h.LoadImage(c.Probe)); err != nil {
		return nil, err
	}
	if c.Plugin == "" {
		return h, nil
	}
	return h, h.InstallPlugin(c.Plugin, append(UnderlaySettings(h.Name, c.Hosts), c.Setting...)...)
}

// Machines are hosts by their numbers from 0, as Part wants them.
func (u *Underlay) Machines(hosts ...int) (out []*Machine) {
	for _, i := range hosts {
		out = append(out, u.Hosts[i].Machine)
	}
	return out
}
