package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// mode is one of dockway's modes as it is shown: on each host a network, and on that two containers
// that serve port 80, called NETWORK1 and NETWORK2.
type mode struct {
	name    string
	network string
	sides   []*side
	before  func(s *side) error      // what is done first, on each host
	with    func(s *side) [][]string // docker commands that make it
	ready   func(s *side) error      // waits for what has to be there, on all hosts
	rows    []row
}

// side is a mode on one host.
type side struct {
	*host
	ip       string // the host's own, on the LAN of the mode
	pool     string // where the containers' addresses are from
	one, two string // these addresses
	gateway  string // of the containers
	other    *side  // on the next host

	was  string       // the uplink, before the network
	seen *lab.Capture // what has passed the host's link since
	ends []func()     // of the capture
}

// mode puts a mode on as many hosts as there are pools.
func (w *world) mode(name, network string, ip func(*host) string, pools ...string) *mode {
	m := &mode{name: name, network: network}
	for i, pool := range pools {
		m.sides = append(m.sides, &side{host: w.hosts[i], ip: ip(w.hosts[i]), pool: pool})
	}
	for i, s := range m.sides {
		s.other = m.sides[(i+1)%len(m.sides)]
	}
	m.ready = w.serves
	return m
}

// create is the docker command that makes a network.
func create(name string, args ...string) []string {
	return append(append([]string{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin}, args...), name)
}

// serving is the docker command that starts a container that serves port 80.
func serving(name, network string, args ...string) []string {
	all := append([]string{"run", "-d", "--name", name, "--network", network}, args...)
	return append(all, lab.Image, "sh", "-c", "/probe serve udp :80 & exec /probe serve tcp :80")
}

// on is the mode's side on a host, or nil.
func (m *mode) on(h *host) *side {
	for _, s := range m.sides {
		if s.host == h {
			return s
		}
	}
	return nil
}

// names are those of the mode's hosts.
func (m *mode) names() string {
	var names []string
	for _, s := range m.sides {
		names = append(names, s.Name)
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " and " + names[last]
}

// setUp makes the mode's networks and containers, on all hosts alike, and waits until they serve.
func (w *world) setUp(m *mode) error {
	for _, c := range m.with(m.sides[0]) {
		fmt.Println("  " + paint(dim, "$ "+brief(c)))
	}
	err := each(m.sides, func(s *side) error {
		if err := m.before(s); err != nil {
			return err
		}
		for _, c := range m.with(s) {
			if _, err := s.Docker(c...); err != nil {
				return err
			}
		}
		for _, ask := range []struct {
			container, field string
			to               *string
		}{{"1", "IPAddress", &s.one}, {"2", "IPAddress", &s.two}, {"1", "Gateway", &s.gateway}} {
			var err error
			if *ask.to, err = s.inspect(m.network+ask.container, ask.field); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return each(m.sides, m.ready)
}

// serves waits until the host reaches its containers.
func (w *world) serves(s *side) error {
	for _, ip := range []string{s.one, s.two} {
		err := lab.WaitFor(5*time.Second, "the containers on "+s.Name, func() (bool, error) {
			_, err := s.Run(w.probe, "-timeout", "1s", "ask", "tcp", ip+":80")
			return err == nil, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// inspect gives a field of what the engine knows of a container that is on one network.
func (h *host) inspect(container, field string) (string, error) {
	return h.Docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{."+field+"}}{{end}}", container)
}

// brief is a docker command without what runs in the container, on two lines if it is long.
func brief(command []string) string {
	line, _, more := strings.Cut("docker "+strings.Join(command, " "), " sh -c")
	if more {
		line += " …"
	}
	if len(line) > 114 {
		line = strings.Replace(line, " --subnet", " \\\n      --subnet", 1)
	}
	return line
}
